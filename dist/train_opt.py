"""LoRA for a card of 8 GB or more: 768 px, rank 8, Min-SNR weighting, offset noise, EMA, text embeddings on disk.

python train_opt.py --resolution 768
python train_opt.py --demo
"""

# Made by tools/bundle.py from train_opt.py and 84 modules; edit those, not this file.

import importlib.abc
import importlib.util
import os
import sys

MODULES = {}

# ============================================================================================ common/__init__.py

MODULES['common/__init__.py'] = r'''
"""The data flow of the suite, and the wings in which it lies. Imports go down only, as a test reads them.

image, caption ─ data/dataset ─▶ Sample ─ data/caching ─▶ moments, text ─ data/batching ─▶ Batch ─ model/noise ─▶ x_t
     (model/loading: VAE and text encoders are on the GPU only while they encode)                                    │
                                                                                                                     ▼
images ◀─ render/sampling ◀─ adapter file ◀─ train/results ◀─ train/loops ◀─ train/engine: unet ─▶ loss ─▶ flat gradient
     (model/adapters: LoRA layers, the flat parameter buffer, optimizer, EMA)

train          assembly, the step, the loop, checkpoints, results
render         adapters -> pictures and grids
data           pictures and captions -> Batch             adapter_files  one file per format, writer facing reader
fast           the same numbers, sooner; skip it first    model          SDXL and its adapter on the device
cli            flags, checks, errors; without torch       system         the machine, launchers, signals; without torch
"""

import os
import sys


def _interrupted_or(hook):
    """`hook` for every error that nothing has caught, but for Ctrl-C before `run` can answer it: one line."""

    def excepthook(kind, error, traceback):
        if issubclass(kind, KeyboardInterrupt):
            sys.stderr.write(
                f"{os.path.basename(sys.argv[0])}: interrupted\n"
            )  # Python then ends by SIGINT: 130 in a shell
        else:
            hook(kind, error, traceback)

    return excepthook


sys.excepthook = _interrupted_or(sys.excepthook)

# PEFT refuses to make any adapter beside a torchao older than 0.16, which Kaggle and Colab have. Nothing here uses it.
sys.modules["torchao"] = None
'''

# ============================================================================== common/adapter_files/__init__.py

MODULES['common/adapter_files/__init__.py'] = r'''
"""Adapters in and out: one file per format, the writer facing the reader; other tools' files."""
'''

# ================================================================================ common/adapter_files/checks.py

MODULES['common/adapter_files/checks.py'] = r'''
"""What an adapter file must hold: layers of this model, whole pairs, finite values, a configuration that PEFT knows."""

import dataclasses
import math
from importlib.metadata import version
from pathlib import Path

import torch

from common.errors import UserError

# PEFT starts these from decompositions of W and subtracts them from it: without the changed W they mean something else.
_INITS_THAT_CHANGE_THE_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")


def adaptable_layers(module: torch.nn.Module) -> dict:
    """{name: frozen weight} of the layers that can have an adapter."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    kinds = (torch.nn.Linear, torch.nn.Conv2d, BaseTunerLayer)
    return {name: layer.weight for name, layer in module.named_modules() if isinstance(layer, kinds)}


def misfit(file: Path, keys: list, total: int) -> UserError:
    """The refusal of a file with keys that belong to no layer of this model."""
    return UserError(
        f"--lora {file}: {len(keys)} of {total} keys fit nothing in this SDXL, e.g. {keys[0]}; "
        "an adapter of another kind or model?"
    )


def check_weights(file: Path, module: torch.nn.Module, weights: dict) -> None:
    """Refuse PEFT keys whose layer `module` does not have, of a wrong shape, or without their other half."""
    if misfits := misfitting_keys(module, weights):
        raise misfit(file, misfits, len(weights))


def misfitting_keys(module: torch.nn.Module, weights: dict) -> list:
    """The keys that check_weights refuses."""
    shapes = {name: weight.shape for name, weight in adaptable_layers(module).items()}
    return [key for key in weights if not _fits(shapes, weights, *key.rpartition(".lora_")[::2])]


def _fits(shapes, weights, layer, kind):
    down = weights.get(f"{layer}.lora_A.weight")
    up = weights.get(f"{layer}.lora_B.weight")
    shape = shapes.get(layer)
    if down is None or up is None or shape is None or kind not in ("A.weight", "B.weight", "magnitude_vector"):
        return False
    if kind == "magnitude_vector" and weights[f"{layer}.lora_magnitude_vector"].numel() != shape[0]:
        return False
    return down.shape[1:] == shape[1:] and up.shape[:2] == (shape[0], down.shape[0])


def check_values(file: Path, weights: dict) -> None:
    """Refuse {component: {PEFT key: tensor}} that is not finite, or that changes nothing."""
    tensors = {key: tensor for part in weights.values() for key, tensor in part.items()}
    if whole := [key for key, tensor in tensors.items() if not tensor.is_floating_point()]:
        dtype = tensors[whole[0]].dtype
        raise UserError(f"--lora {file}: {len(whole)} tensors hold {dtype}, e.g. {whole[0]}; only floats are read")
    if bad := [key for key, tensor in tensors.items() if not tensor.isfinite().all()]:
        raise UserError(
            f"--lora {file}: {len(bad)} tensors hold NaN or infinity, e.g. {bad[0]}; "
            "the training that wrote it diverged"
        )

    # a pair changes something when neither half is zero, a magnitude when it is not
    nonzero = {key: tensor.any() for key, tensor in tensors.items()}
    firsts = [key for key in tensors if "lora_B" not in key]
    if not any(nonzero[key] and nonzero.get(key.replace("lora_A", "lora_B"), True) for key in firsts):
        raise UserError(
            f"--lora {file}: would change nothing, one half of every pair is zero, e.g. {next(iter(tensors))}; "
            "was it trained?"
        )


def rendering_config(file: Path, source: str, described: dict) -> dict:
    """What a file says of its adapter -> LoraConfig arguments for rendering: without the dropout of its training.

    What a newer PEFT has added is left out where it is switched off, and refused where it is not.

    Args:
        source: where in the file it stands, for messages.
    """
    from peft import LoraConfig

    # what only a newer PEFT knows
    known = {field.name for field in dataclasses.fields(LoraConfig)}
    if newer := sorted(name for name, value in described.items() if name not in known and value):
        raise UserError(
            f"--lora {file}: its {source} asks for {', '.join(newer)}, which PEFT {version('peft')} does not know; "
            "pip install -U peft"
        )

    # what means something else here
    init = described.get("init_lora_weights")
    if isinstance(init, str) and init.startswith(_INITS_THAT_CHANGE_THE_BASE):
        raise UserError(
            f"--lora {file}: its {source} says init_lora_weights {init!r}, which changed the base model too; "
            "convert it to LoRA with PEFT"
        )
    numbers = {name: described.get(name, 1) for name in ("r", "lora_alpha")} | (described.get("alpha_pattern") or {})
    for name, value in numbers.items():
        check_number(file, f"{name} in its {source}", value)
    return {name: value for name, value in described.items() if name in known} | {"lora_dropout": 0.0}


def check_number(file: Path, name: str, value: float) -> None:
    """Refuse what is not a finite number."""
    if not isinstance(value, (int, float)) or not math.isfinite(value):
        raise UserError(
            f"--lora {file}: {name} is {value}, not a number; the file is damaged, or its training diverged"
        )
'''

# ====================================================================== common/adapter_files/diffusers_format.py

MODULES['common/adapter_files/diffusers_format.py'] = r'''
"""diffusers' adapter file, written and read: LAYER.lora.down.weight and .up.weight, PEFT's settings in the metadata."""

import json
from pathlib import Path

import torch

from common.adapter_files.checks import rendering_config
from common.adapter_files.names import COMPONENTS, portable
from common.errors import UserError
from common.files import write_safetensors

WEIGHTS = "pytorch_lora_weights.safetensors"
ADAPTER_METADATA = "lora_adapter_metadata"  # where diffusers looks for rank, alpha and DoRA


def save_adapter(
    path: Path, unet: torch.nn.Module, recipe: dict, text_encoders: tuple[torch.nn.Module, ...] | list = ()
) -> None:
    """Write the adapters of the UNet, and of both text encoders if given, with the recipe that trained them.

    The metadata holds what PEFT needs to rebuild the adapters. Without it diffusers would take alpha = rank, and
    rank 16 / alpha 32 would load at half strength.
    """
    from peft import get_peft_model_state_dict

    weights, described = {}, {}
    for component, module in zip(COMPONENTS, (unet, *text_encoders)):
        part = {portable(component, name): tensor for name, tensor in get_peft_model_state_dict(module).items()}
        weights |= {f"{component}.{name}": tensor for name, tensor in _spelt_by_diffusers(component, part).items()}
        described |= {f"{component}.{name}": value for name, value in _settings(module.peft_config["default"]).items()}
    metadata = {
        "format": "pt",
        ADAPTER_METADATA: json.dumps(described, sort_keys=True),
        "recipe": json.dumps(recipe, sort_keys=True),
    }
    write_safetensors(path, weights, metadata)


def read_settings(file: Path, metadata: dict) -> dict:
    """{component: LoraConfig arguments} that diffusers wrote into a file's metadata; {} where there are none.

    The keys of such a file are read by layer_reading.py, with those of other tools.
    Raises:
        UserError: settings that cannot be read, or that mean something else in the installed PEFT.
    """
    try:
        described = json.loads(metadata.get(ADAPTER_METADATA, "{}"))
        fields = [(*key.partition(".")[::2], value) for key, value in described.items()]
    except (ValueError, AttributeError):
        raise UserError(f"--lora {file}: its {ADAPTER_METADATA} cannot be read; the file is damaged") from None
    components = {component for component, _, _ in fields}
    parts = {component: {name: value for part, name, value in fields if part == component} for component in components}
    return {component: rendering_config(file, ADAPTER_METADATA, part) for component, part in parts.items()}


def _settings(config):
    """What of a LoraConfig a loader needs.

    Not the dropout of training, which would act while rendering; nor defaults, of which an older PEFT may not know all.
    """
    from peft import LoraConfig

    settings = {**config.to_dict(), "lora_dropout": 0.0}
    defaults = LoraConfig().to_dict()
    always = ("r", "lora_alpha", "rank_pattern")  # diffusers 0.37 and 0.39 look the pattern up unasked
    needed = {name: value for name, value in settings.items() if name in always or value != defaults[name]}
    return {name: sorted(value) if isinstance(value, set) else value for name, value in needed.items()}


def _spelt_by_diffusers(component, weights):
    """PEFT's keys -> diffusers', the same way for every layer.

    Its own conversion respells only the attention layers of a UNet. Of a file with two spellings its loader reads only
    that of the first key.
    """
    from diffusers.utils import convert_state_dict_to_diffusers

    if component != "unet":
        return convert_state_dict_to_diffusers(weights)
    return {
        name.replace(".lora_A.", ".lora.down.").replace(".lora_B.", ".lora.up."): tensor
        for name, tensor in weights.items()
    }
'''

# ================================================================================== common/adapter_files/dora.py

MODULES['common/adapter_files/dora.py'] = r'''
"""DoRA for other tools: as the dora_scale of ComfyUI and Forge, and as a plain LoRA for tools that know no DoRA.

DoRA is W' = (W + s B A) m / ||W + s B A||, norms over rows (arXiv 2402.09353, eq. 5). W is always the weight that the
reader of the file has: of a run on 4-bit weights the whole one in the model's files. PEFT and diffusers use m with it
too.
"""

from collections.abc import Callable
from pathlib import Path

import torch
from safetensors import safe_open

# What a kohya file with DoRA says of itself. An open proposal would have ComfyUI divide by ||W + s B A|| instead.
DORA_NORM = "dora_norm"
METADATA = {
    DORA_NORM: "base",
    "dora_formula": "(W + alpha / rank * up @ down) * dora_scale / norm(W), norms over rows",
    "dora_exact_in": "ComfyUI v0.3.77 and others with this formula "
    "(comfy/weight_adapter/base.py, weight_decompose); Forge",
    "dora_wrong_in": "A1111 (norms over columns); kohya's sd-scripts and plain diffusers (dora_scale ignored)",
}


def frozen_weights(unet: torch.nn.Module, files: list[Path]) -> Callable[[str], torch.Tensor]:
    """name of an adapted layer -> its W as readers have it: a 4-bit layer's is read from the model's `files`."""
    homes = {}

    def weight(name):
        held = unet.get_submodule(name).get_base_layer().weight
        if held.dtype != torch.uint8:
            return held.detach()
        if not homes:
            for file in files:
                with safe_open(file, "pt") as tensors:
                    homes.update(dict.fromkeys(tensors.keys(), file))
        with safe_open(homes[f"{name}.weight"], "pt", device=str(held.device)) as tensors:
            return tensors.get_tensor(f"{name}.weight")

    return weight


def dora_scale(magnitude: torch.Tensor, weight: torch.Tensor, delta: torch.Tensor) -> torch.Tensor:
    """PEFT's magnitude m -> the dora_scale [N, 1] with which ComfyUI and Forge compute the same weight.

    For a scale of this shape, with more axes of 1 for a convolution, they compute (W + s B A) dora_scale / ||W||:
    weight_decompose in https://github.com/comfyanonymous/ComfyUI, comfy/weight_adapter/base.py.
    """
    base, merged = row_norms(weight, delta)
    return (magnitude.float().flatten() * base / merged).view(-1, *[1] * (weight.dim() - 1))


def change(magnitude: torch.Tensor, weight: torch.Tensor, delta: torch.Tensor) -> torch.Tensor:
    """W' - W, fp32, of the shape of W."""
    _, merged = row_norms(weight, delta)
    gain = (magnitude.float().flatten() / merged).view(-1, *[1] * (weight.dim() - 1))
    return (weight.float() + delta.to(merged.dtype)) * gain - weight.float()


def row_norms(weight: torch.Tensor, delta: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(||W||, ||W + delta||) over rows, each [N], in fp32."""
    weight = weight.detach().float()
    return weight.flatten(1).norm(dim=1), (weight + delta.detach().to(weight)).flatten(1).norm(dim=1)


def low_rank(matrix: torch.Tensor, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The U [N, R], D [R, K] whose product is nearest to a matrix [N, K] (Eckart-Young).

    U and D are of equal size, for fp16's sake. From the eigenvectors of the smaller Gram matrix, in fp64: R of them
    are needed, and nothing of the other side.
    """
    if len(matrix) > matrix.shape[1]:
        up, down = low_rank(matrix.t(), rank)
        return down.t(), up.t()
    values, vectors = torch.linalg.eigh(matrix.double() @ matrix.double().t())  # ascending
    rank = min(rank, len(values))

    # what is nothing but rounding is not blown up
    smallest = (1e-12 * values[-1]).clamp(min=torch.finfo(torch.float32).tiny)
    roots = torch.maximum(values[-rank:], smallest).sqrt().sqrt()
    vectors = vectors[:, -rank:]
    return (vectors * roots).float(), (vectors.t() @ matrix.double() / roots[:, None]).float()
'''

# ========================================================================= common/adapter_files/into_pipeline.py

MODULES['common/adapter_files/into_pipeline.py'] = r'''
"""Adapter files -> adapters in a pipeline; what diffusers and PEFT leave out with a warning is an error."""

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from common.adapter_files.names import COMPONENTS
from common.adapter_files.reading import read_adapter

if TYPE_CHECKING:  # slow to import
    from diffusers import StableDiffusionXLPipeline
from common.errors import UserError


def load_adapter(
    pipeline: "StableDiffusionXLPipeline", file: Path, name: str, *, say: Callable[[str], None] = print
) -> None:
    """Load an adapter file as the adapter `name` of a pipeline; its scale is 1 until set_adapters is called.

    Equal to load_lora_weights where that works. PEFT injects layers in training mode: the model's parts are in eval
    mode afterwards. `say` is told what is left out.

    Raises:
        UserError: what read_adapter refuses, and keys that the loaders did not use.
    """
    modules = {component: getattr(pipeline, component) for component in COMPONENTS}
    weights, configs = read_adapter(file, modules, say)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Already found a `peft_config`")  # several adapters side by side are meant
        for component, part in weights.items():
            _load_into(modules[component], component, name, part, configs[component])
            modules[component].eval()
            _check_loaded(file, modules[component], name, part)


def _load_into(module, component, name, weights, config):
    """Into text encoders through PEFT itself: transformers 5.24.0 asks for a version of it that does not exist."""
    from peft import LoraConfig, inject_adapter_in_model, set_peft_model_state_dict

    if component == "unet":
        module.load_lora_adapter(weights, prefix=None, adapter_name=name, metadata=config, low_cpu_mem_usage=True)
    else:
        inject_adapter_in_model(
            LoraConfig(**config), module, adapter_name=name, low_cpu_mem_usage=True, state_dict=weights
        )
        set_peft_model_state_dict(module, weights, adapter_name=name, low_cpu_mem_usage=True)


def _check_loaded(file, module, name, weights):
    """diffusers and PEFT only warn about what they leave out, and initialise it at random."""
    from peft import get_peft_model_state_dict

    # PEFT's default for embedding layers would ask the hub about the base model that the adapter names
    loaded = get_peft_model_state_dict(module, adapter_name=name, save_embedding_layers=False)
    used = {key for key, tensor in loaded.items() if key in weights and torch.equal(tensor, weights[key].to(tensor))}
    if left_out := sorted((weights.keys() | loaded.keys()) - used):
        raise UserError(
            f"--lora {file}: {len(left_out)} of {len(weights)} keys were not used by the loader, e.g. {left_out[0]}"
        )
'''

# ================================================================================= common/adapter_files/kohya.py

MODULES['common/adapter_files/kohya.py'] = r'''
"""A layer in kohya's format, which ComfyUI, A1111 and Forge read: written as LoRA or DoRA, read with all of LyCORIS.

The format, https://github.com/kohya-ss/sd-scripts (networks/lora.py): per layer `lora_down`, `lora_up`, `alpha` and,
for DoRA, `dora_scale` [N, 1] of a weight [N, K]. Layers are named by the original SDXL layout with underscores.
"""

import json
from collections.abc import Callable
from pathlib import Path

import torch

from common.adapter_files import dora, lycoris
from common.adapter_files.checks import check_number
from common.adapter_files.names import COMPONENTS, DOWN, MAGNITUDE, UP, kohya_key
from common.errors import UserError
from common.files import write_safetensors


def save_kohya(
    path: Path,
    unet: torch.nn.Module,
    recipe: dict,
    text_encoders: tuple[torch.nn.Module, ...] | list = (),
    *,
    weight_of: Callable[[str], torch.Tensor] | None = None,
    dora_rank: int | None = None,
) -> float:
    """Write the adapters of the UNet, and of both text encoders if given, in fp16 (dora_scale in fp32).

    Args:
        weight_of: see dora.frozen_weights; the model's own weights when None.
        dora_rank: write DoRA layers as LoRA of this rank instead, for tools that know no DoRA.
    Returns:
        the share of the DoRA layers' change that is in the file, by its norm: 1 without `dora_rank`.
    """
    weight_of = weight_of or dora.frozen_weights(unet, [])
    tensors = {}
    squares = torch.zeros(2)  # norms of what `dora_rank` leaves out, and of all
    for component, module in zip(COMPONENTS, (unet, *text_encoders)):
        for layer, parts in _by_layer(module).items():
            key = kohya_key(component, layer, unet.config.layers_per_block)
            up, down = parts["B.weight"], parts["A.weight"]
            alpha = module.peft_config["default"].lora_alpha

            # DoRA: a scale beside the pair, or another pair in its place
            if "magnitude_vector" in parts:
                delta = module.get_submodule(layer).get_delta_weight("default")
                magnitude, weight = parts["magnitude_vector"], weight_of(layer)
                if dora_rank:
                    up, down, norms = _as_lora(dora.change(magnitude, weight, delta), dora_rank)
                    alpha = len(down)
                    squares += norms
                else:
                    tensors[f"{key}.dora_scale"] = dora.dora_scale(magnitude, weight, delta)

            tensors[f"{key}.{DOWN}"] = down.half()
            tensors[f"{key}.{UP}"] = up.half()
            tensors[f"{key}.alpha"] = torch.tensor(float(alpha))

    share = (1 - squares[0] / squares[1]).clamp(min=0).sqrt().item() if dora_rank else 1.0
    write_safetensors(path, tensors, _metadata(unet.peft_config["default"], recipe, dora_rank, share))
    return share


def _by_layer(module):
    """{layer: {"A.weight": tensor, "B.weight": tensor, "magnitude_vector": tensor of DoRA}}."""
    from peft import get_peft_model_state_dict

    layers = {}
    for name, tensor in get_peft_model_state_dict(module).items():
        layer, _, kind = name.rpartition(".lora_")
        layers.setdefault(layer, {})[kind] = tensor
    return layers


def _as_lora(change, rank):
    """The best LoRA of `rank` for a change -> (up, down, squared norms of what it leaves out and of all [2])."""
    up, down = dora.low_rank(change.flatten(1), rank)
    left_out = (change.flatten(1) - up @ down).square().sum()
    kernel = change.shape[2:]
    up, down = up.reshape(len(up), -1, *[1] * len(kernel)), down.reshape(-1, *change.shape[1:])
    return up, down, torch.stack([left_out, change.square().sum()]).cpu()


def _metadata(config, recipe, dora_rank, share):
    """What a file says of itself; modelspec is https://github.com/Stability-AI/ModelSpec, ss_ are kohya's own."""
    velocity = recipe.get("prediction_type") == "v_prediction"
    metadata = {
        "ss_network_module": "networks.lora",
        "ss_network_dim": str(dora_rank or config.r),
        "ss_network_alpha": str(dora_rank or config.lora_alpha),
        "ss_base_model_version": "sdxl_base_v1-0",
        "modelspec.sai_model_spec": "1.0.0",
        "modelspec.architecture": "stable-diffusion-xl-v1-base/lora",
        "modelspec.prediction_type": "v" if velocity else "epsilon",
        "ss_v_parameterization": str(velocity),
        "ss_zero_terminal_snr": str(recipe.get("zero_terminal_snr", False)),
    }

    # DoRA, and what has become of it
    if dora_rank:
        metadata["dora_as_lora"] = f"rank {dora_rank} of the DoRA's change: {share:.4f} of its norm"
    elif config.use_dora:
        metadata |= dora.METADATA
    return {**metadata, "format": "pt", "recipe": json.dumps(recipe, sort_keys=True)}


def read_layer(
    file: Path, layer: str, *, weight: torch.Tensor, parts: dict, metadata: dict, identities: dict
) -> tuple[dict, float] | None:
    """One layer's tensors -> ({PEFT kind: tensor}, alpha); None where they do not make a change of `weight`.

    Args:
        file, layer: for messages.
        weight: the frozen weight, [N, K] or [N, channels, height, width].
        parts: {kind: tensor}; kinds of kohya, LyCORIS and MAGNITUDE, which diffusers writes.
        metadata: of the file.
        identities: see lycoris.full_rank.
    Raises:
        UserError: an alpha that is no number.
    """
    alpha = _alpha(file, layer, parts.get("alpha"))
    dora_scale = parts.get("dora_scale")
    magnitude = parts.get(MAGNITUDE)
    factors = {kind: tensor for kind, tensor in parts.items() if kind not in ("alpha", "dora_scale", MAGNITUDE)}

    # the change as a pair of matrices
    pair = lycoris.read_pair(factors, alpha)
    n, k = len(weight), weight[0].numel()
    if pair is None or pair.up.shape[1] != len(pair.down) or (len(pair.up), pair.down.shape[1]) != (n, k):
        return None
    if UP not in factors:
        pair = lycoris.smallest(pair, weight, identities)

    # DoRA: over rows a magnitude, over columns another change
    if dora_scale is not None:
        if dora_scale.numel() == n and len(dora_scale) == n:
            magnitude = _magnitude(weight, pair, dora_scale, metadata)
        elif tuple(dora_scale.shape[:2]) == (1, weight.shape[1]) and dora_scale.numel() == weight.shape[1]:
            pair = lycoris.full_rank(lycoris.column_dora(weight, pair, dora_scale), weight, identities)
        else:
            return None

    # of the shapes that PEFT gives them
    kernel = weight.shape[2:]
    kinds = {
        "lora_A.weight": pair.down.view(-1, *weight.shape[1:]),
        "lora_B.weight": pair.up.reshape(n, -1, *[1] * len(kernel)),
    }
    if magnitude is not None:
        kinds[MAGNITUDE] = magnitude.view(1, -1, 1, 1) if kernel else magnitude.flatten()
    return kinds, pair.scale * len(pair.down)


def _alpha(file, layer, tensor):
    if tensor is None:
        return None
    if tensor.numel() != 1:
        raise UserError(
            f"--lora {file}: the alpha of {layer} is a tensor of {tensor.numel()} numbers; the file is damaged"
        )
    check_number(file, f"the alpha of {layer}", float(tensor))
    return float(tensor)


def _magnitude(weight, pair, dora_scale, metadata):
    """A dora_scale over rows -> PEFT's magnitude [N].

    In our files it goes with ||W||, in LyCORIS's with ||W + s U D||.
    """
    magnitude = dora_scale.float().flatten()
    if metadata.get(dora.DORA_NORM) == "base":
        base, merged = dora.row_norms(weight, pair.product().view(weight.shape))
        magnitude = magnitude * merged / base
    return magnitude
'''

# ========================================================================= common/adapter_files/layer_reading.py

MODULES['common/adapter_files/layer_reading.py'] = r'''
"""Files that name a layer and a kind in every key (kohya, LyCORIS, ComfyUI, diffusers) -> PEFT's names and settings."""

from pathlib import Path

from common.adapter_files import diffusers_format, lycoris
from common.adapter_files.checks import adaptable_layers, misfit
from common.adapter_files.kohya import read_layer
from common.adapter_files.names import DOWN, MAGNITUDE, UP, layer_spellings

EMBEDDINGS = "bundle_emb."  # textual inversions that A1111 packs beside an adapter
_DOWN_SUFFIXES = (".lora.down.weight", "_lora.down.weight", ".lora_linear_layer.down.weight", ".lora_A.weight")
_UP_SUFFIXES = (".lora.up.weight", "_lora.up.weight", ".lora_linear_layer.up.weight", ".lora_B.weight")
_SUFFIXES = {
    **{f".{kind}": kind for kind in (*lycoris.KINDS, "alpha", "dora_scale", MAGNITUDE)},
    **dict.fromkeys(_DOWN_SUFFIXES, DOWN),
    **dict.fromkeys(_UP_SUFFIXES, UP),
}


def read_layers(file: Path, tensors: dict, metadata: dict, modules: dict) -> tuple[dict, dict]:
    """Keys LAYER.KIND, where the layer may have any of the names it has anywhere.

    alpha comes from the metadata that diffusers writes, or from tensors, else it is the rank.
    Returns:
        as adapter_reading.read_adapter.
    Raises:
        UserError: names that this model does not have, layers that are incomplete, an alpha that is no number.
    """
    weights_of = {component: adaptable_layers(module) for component, module in modules.items()}
    layers = _by_layer(file, tensors, layer_spellings(weights_of, modules["unet"].config.layers_per_block))

    # each layer as a pair and, with DoRA, a magnitude
    weights, alphas, identities = {}, {}, {}
    for (component, layer), keys in layers.items():
        weight = weights_of[component][layer]
        parts = {kind: _readable(tensors[key]).to(weight.device) for kind, key in keys.items()}
        read = read_layer(file, layer, weight=weight, parts=parts, metadata=metadata, identities=identities)
        if read is None:
            raise misfit(file, list(keys.values()), len(tensors))
        kinds, alpha = read
        alphas.setdefault(component, {})[layer] = alpha
        weights.setdefault(component, {}).update({f"{layer}.{kind}": tensor for kind, tensor in kinds.items()})

    # rank and alpha: as diffusers wrote them, or as the tensors say
    written = diffusers_format.read_settings(file, metadata)
    by_tensors = {component for (component, _), keys in layers.items() if keys.keys() - {DOWN, UP, MAGNITUDE}}
    configs = {
        component: written[component]
        if component in written.keys() - by_tensors
        else lora_arguments(part, alphas[component])
        for component, part in weights.items()
    }
    return weights, configs


def _by_layer(file, tensors, spellings):
    """{(component, layer): {kind: key}}."""
    layers, unknown = {}, []
    for key in tensors:
        name = key.replace(".processor.", ".")
        if MAGNITUDE in key:
            name = name.removesuffix(".weight")
        suffix = next((suffix for suffix in _SUFFIXES if name.endswith(suffix)), None)
        place = spellings.get(name.removesuffix(suffix)) if suffix else None

        # no layer of this model, or a second tensor for one place
        if place is None or _SUFFIXES[suffix] in layers.get(place, {}):
            unknown.append(key)
        else:
            layers.setdefault(place, {})[_SUFFIXES[suffix]] = key
    if unknown:
        raise misfit(file, unknown, len(tensors))
    return layers


def _readable(tensor):
    """8-bit floats as fp16, which holds each of them exactly; torch computes with neither kind."""
    return tensor.half() if tensor.is_floating_point() and tensor.element_size() == 1 else tensor


def lora_arguments(weights: dict, alphas: dict) -> dict:
    """LoraConfig arguments for {PEFT key: tensor} of one component and the alpha of each of its layers."""
    suffix = ".lora_A.weight"
    ranks = {key.removesuffix(suffix): len(tensor) for key, tensor in weights.items() if key.endswith(suffix)}
    rank, alpha = next(iter(ranks.values())), next(iter(alphas.values()))
    return dict(
        r=rank,
        lora_alpha=alpha,
        rank_pattern={f"^{layer}": value for layer, value in ranks.items() if value != rank},
        alpha_pattern={f"^{layer}": value for layer, value in alphas.items() if value != alpha},
        target_modules=list(ranks),
        use_dora=any(key.endswith(MAGNITUDE) for key in weights),
    )
'''

# =============================================================================== common/adapter_files/lycoris.py

MODULES['common/adapter_files/lycoris.py'] = r'''
"""What a layer's tensors in a kohya or LyCORIS file say: the change of its weight as one pair of matrices.

The formulas are those of https://github.com/KohakuBlueleaf/LyCORIS (lycoris/functional). A change of a weight W [N, K],
for a convolution K = channels x height x width, is s U D with U [N, R], D [R, K] and a scale s. Kronecker and Hadamard
products of such pairs are pairs again. So every algorithm is exactly a LoRA of some rank R: it loads, scales, mixes and
merges as one.
"""

from typing import NamedTuple

import torch


class Pair(NamedTuple):
    """The change s U D of a weight, see above."""

    up: torch.Tensor
    down: torch.Tensor
    scale: float = 1.0

    def product(self) -> torch.Tensor:
        """The change itself, [N, K], fp32."""
        return self.scale * (self.up.float() @ self.down.float())


def read_pair(tensors: dict, alpha: float | None) -> Pair | None:
    """The change that {kind: tensor} of one layer means; None when they are not exactly those of an algorithm.

    `alpha` is the layer's, None where the file has none: then the scale is 1. Linear layers and convolutions alike.
    """
    read = _ALGORITHMS.get(frozenset(tensors))
    if read is None:
        return None
    try:
        (up, down), rank = read(tensors)
    except RuntimeError:  # their shapes do not go together
        return None
    return Pair(up, down.flatten(1), 1.0 if alpha is None or rank is None else alpha / rank)


def smallest(pair: Pair, weight: torch.Tensor, identities: dict) -> Pair:
    """The same change, as `full_rank` where that is fewer numbers than a pair of high rank."""
    (n, rank), k = pair.up.shape, pair.down.shape[1]
    return pair if rank * (n + k) <= n * k else full_rank(pair.product(), weight, identities)


def full_rank(change: torch.Tensor, weight: torch.Tensor, identities: dict) -> Pair:
    """Any change [N, K] as a pair: itself, and an identity on its shorter side.

    In the dtype and on the device of `weight`.
    `identities` {size: matrix} is filled: layers share them, or they would take as much memory as the changes do.
    """
    size = min(change.shape)
    if size not in identities:
        identities[size] = torch.eye(size, dtype=weight.dtype, device=weight.device)
    change = change.to(weight)
    return Pair(identities[size], change) if len(change) == size else Pair(change, identities[size])


def column_dora(weight: torch.Tensor, pair: Pair, dora_scale: torch.Tensor) -> torch.Tensor:
    """What a DoRA over input columns changes, [N, K]: (W + d) dora_scale / ||W + d|| - W, norms over columns.

    lycoris/modules/locon.py with wd_on_output off; ComfyUI's weight_decompose does the same. `dora_scale` is
    [1, channels], with more axes of 1 for a convolution.
    """
    weight = weight.detach().float()
    merged = weight + pair.product().to(weight).view(weight.shape)
    norms = merged.transpose(0, 1).flatten(1).norm(dim=1)
    gains = (dora_scale.to(weight).flatten() / norms).view(1, -1, *[1] * (weight.dim() - 2))
    return (merged * gains - weight).flatten(1)


# One function per algorithm: {kind: tensor} -> ((U, D), rank that divides alpha).


def _lora(t):
    """U D; a mid [R, R, height, width] is Tucker's core between them (LoCon, lora_mid)."""
    up, down = t["lora_up.weight"].flatten(1), t["lora_down.weight"]
    if "lora_mid.weight" in t:
        up, down = up.float(), _around(t["lora_mid.weight"], down.flatten(1))
    return (up, down), up.shape[1]


def _loha(t):
    """(w1_a w1_b) o (w2_a w2_b), element by element: of two sums of R outer products a sum of R x R."""
    up1, down1 = _factor(t, "hada_w1", "hada_t1")
    up2, down2 = _factor(t, "hada_w2", "hada_t2")
    up = (up1[:, :, None] * up2[:, None, :]).flatten(1)
    down = (down1[:, None, :] * down2[None, :, :]).flatten(0, 1)
    return (up, down), len(t["hada_w1_b"])


def _lokr(t):
    """kron(w1, w2). alpha counts only where a factor is decomposed; of two ranks w2's divides it, as in ComfyUI."""
    up1, down1 = _factor(t, "lokr_w1")
    up2, down2 = _factor(t, "lokr_w2", "lokr_t2")
    rank = next((len(t[kind]) for kind in ("lokr_w2_b", "lokr_w1_b") if kind in t), None)
    return (torch.kron(up1, up2), torch.kron(down1, down2)), rank


def _factor(t, name, core=None):
    """One factor as U [n, r], D [r, k]: whole beside an identity, or w_a w_b, or w_a and w_b around a Tucker core."""
    if name in t:
        whole = t[name].float().flatten(1)
        return full_rank(whole, whole, {})[:2]
    a, b = t[f"{name}_a"].float(), t[f"{name}_b"].float()
    return (a.t().contiguous(), _around(t[core], b)) if core in t else (a, b.flatten(1))


def _around(core, b):
    """A Tucker core [R, R, height, width] times b [R, channels] -> [R, channels x height x width]."""
    return torch.einsum("ijhw,jk->ikhw", core.float(), b.float()).flatten(1).contiguous()


def _decomposed(name, core=None):
    return [f"{name}_a", f"{name}_b", *([core] if core else [])]


_LORA = ["lora_up.weight", "lora_down.weight"]
_ALGORITHMS = {
    frozenset(_LORA): _lora,
    frozenset([*_LORA, "lora_mid.weight"]): _lora,
    frozenset(_decomposed("hada_w1") + _decomposed("hada_w2")): _loha,
    frozenset(_decomposed("hada_w1", "hada_t1") + _decomposed("hada_w2", "hada_t2")): _loha,
    **{
        frozenset(w1 + w2): _lokr
        for w1 in (["lokr_w1"], _decomposed("lokr_w1"))
        for w2 in (["lokr_w2"], _decomposed("lokr_w2"), _decomposed("lokr_w2", "lokr_t2"))
    },
}
KINDS = frozenset().union(*_ALGORITHMS)
'''

# ================================================================================= common/adapter_files/names.py

MODULES['common/adapter_files/names.py'] = r'''
"""Names of SDXL's layers in adapter files: those of diffusers, the original layout, kohya, LyCORIS and ComfyUI."""

import re

COMPONENTS = ("unet", "text_encoder", "text_encoder_2")
KOHYA_PREFIXES = {"unet": "lora_unet_", "text_encoder": "lora_te1_", "text_encoder_2": "lora_te2_"}
COMFYUI_PREFIXES = {
    "unet": "diffusion_model.",
    "text_encoder": "text_encoders.clip_l.transformer.",
    "text_encoder_2": "text_encoders.clip_g.transformer.",
}
LYCORIS_PREFIX = "lycoris_"  # of the UNet's layers

# Kinds of a layer's tensors: kohya's names of the pair, which LyCORIS shares, and PEFT's of DoRA's magnitude.
DOWN = "lora_down.weight"
UP = "lora_up.weight"
MAGNITUDE = "lora_magnitude_vector"

# diffusers' old names of what it calls to_out.0 in the UNet, and of the projections in text encoders
_OLD_PROJECTIONS = {
    ".q_proj": ".to_q",
    ".k_proj": ".to_k",
    ".v_proj": ".to_v",
    ".out_proj": ".to_out",
    ".to_out.0": ".to_out",
}


def layer_spellings(layers: dict, layers_per_block: int) -> dict:
    """Every name by which a file may call one of `layers` {component: names} -> (component, name)."""
    places = [(component, layer) for component, names in layers.items() for layer in names]
    return {spelling: place for place in places for spelling in _spellings(*place, layers_per_block)}


def _spellings(component, layer, layers_per_block):
    shared = shared_name(component, layer, layers_per_block)
    yield COMFYUI_PREFIXES[component] + shared
    for name in (layer, shared):
        yield KOHYA_PREFIXES[component] + name.replace(".", "_")
        if component == "unet":
            yield LYCORIS_PREFIX + name.replace(".", "_")
    for name in (layer, portable(component, layer)):
        yield f"{component}.{name}"
        for now, before in _OLD_PROJECTIONS.items():
            if name.endswith(now):
                yield f"{component}.{name.removesuffix(now)}{before}"


def portable(component: str, name: str) -> str:
    """A name as every tool knows it: transformers 5 dropped `text_model.` from those in CLIPTextModel."""
    return name if component == "unet" else f"text_model.{name.removeprefix('text_model.')}"


def kohya_key(component: str, layer: str, layers_per_block: int) -> str:
    """Name of a layer in a kohya file: prefix, then its shared name with underscores for dots."""
    return KOHYA_PREFIXES[component] + shared_name(component, layer, layers_per_block).replace(".", "_")


def shared_name(component: str, layer: str, layers_per_block: int) -> str:
    """The name that tools outside of diffusers share: of the UNet's original layout, or the encoder's portable one."""
    return original_name(layer, layers_per_block) if component == "unet" else portable(component, layer)


_IN_BLOCK = re.compile(r"(down|mid|up)_blocks?(?:\.(\d+))?\.(resnets|attentions|downsamplers|upsamplers)\.(\d+)\.(.+)")
_PARTS = {"resnets": 0, "downsamplers": 0, "attentions": 1, "upsamplers": 2}
_OUTSIDE_BLOCKS = {
    "conv_in": "input_blocks.0.0",
    "conv_out": "out.2",
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
}
_IN_RESNET = {
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}


def original_name(name: str, layers_per_block: int) -> str:
    """Module name in diffusers' UNet -> in the original one.

    https://github.com/Stability-AI/generative-models, openaimodel.py. There the blocks of all levels are numbered
    through. Within one, 0 is the residual part (or the downsampler), 1 the attention, 2 the upsampler, which in SDXL
    comes only after attention.
    """
    found = _IN_BLOCK.fullmatch(name)
    if not found:
        return _OUTSIDE_BLOCKS.get(name, name)
    side, level, kind, index, rest = found.groups()
    level = int(level or 0)
    index = int(index)
    if kind == "resnets":
        rest = _IN_RESNET.get(rest, rest)
    elif kind == "downsamplers":
        rest = "op"

    # the middle block, then those of the levels
    if side == "mid":
        return f"middle_block.{1 if kind == 'attentions' else 2 * index}.{rest}"
    if kind.endswith("samplers"):
        index = layers_per_block  # they close their level
    first = level * (layers_per_block + 1)
    if side == "down":
        return f"input_blocks.{1 + first + index}.{_PARTS[kind]}.{rest}"
    return f"output_blocks.{first + index}.{_PARTS[kind]}.{rest}"
'''

# =========================================================================== common/adapter_files/peft_format.py

MODULES['common/adapter_files/peft_format.py'] = r'''
"""PEFT's adapter folder, written and read: adapter_model.safetensors and adapter_config.json beside it."""

import copy
import json
from pathlib import Path

import torch

from common.adapter_files.checks import misfitting_keys, rendering_config
from common.adapter_files.names import COMPONENTS
from common.errors import UserError
from common.files import read_safetensors, write_safetensors

PEFT_WEIGHTS = "adapter_model.safetensors"
PEFT_CONFIG = "adapter_config.json"
PEFT_PREFIX = "base_model.model."


def save_peft(
    folder: Path, unet: torch.nn.Module, recipe: dict, text_encoders: tuple[torch.nn.Module, ...] | list = ()
) -> None:
    """Write the UNet's adapter into `folder`, those of text encoders into its text_encoder and text_encoder_2.

    As PeftModel.save_pretrained writes it for a whole model, so `PeftModel.from_pretrained(unet, folder)` reads it
    back.
    """
    from peft import get_peft_model_state_dict

    for component, module in zip(COMPONENTS, (unet, *text_encoders)):
        part = folder if component == "unet" else folder / component
        weights = {f"{PEFT_PREFIX}{name}": tensor for name, tensor in get_peft_model_state_dict(module).items()}
        write_safetensors(part / PEFT_WEIGHTS, weights, {"format": "pt", "recipe": json.dumps(recipe, sort_keys=True)})

        # the configuration, for use and not for more training
        config = copy.copy(module.peft_config["default"])
        config.base_model_name_or_path = recipe["base_model"]
        config.inference_mode = True
        config.lora_dropout = 0.0  # of training: the recipe keeps it
        base = type(module)
        mapping = {"base_model_class": base.__name__, "parent_library": base.__module__}
        config.save_pretrained(part, auto_mapping_dict=mapping)


def read_peft(file: Path, modules: dict) -> tuple[dict, dict]:
    """A folder of the UNet or of one text encoder, and the folders of text encoders that save_peft puts into it.

    Returns:
        as adapter_reading.read_adapter.
    Raises:
        UserError: no configuration, or one that cannot be read or is of another kind of adapter.
    """
    nested = [file.parent / component / PEFT_WEIGHTS for component in COMPONENTS[1:]]
    weights, configs = {}, {}
    for part in (file, *(part for part in nested if part.exists())):
        config = _config(part)
        tensors, _ = read_safetensors(part, from_anywhere=True)
        named = {key.removeprefix(PEFT_PREFIX): tensor for key, tensor in tensors.items()}
        component, named = _component(modules, named)
        weights[component] = named
        configs[component] = config
    return weights, configs


def _config(file):
    """LoraConfig arguments beside a PEFT file."""
    place = file.parent / PEFT_CONFIG
    if not place.exists():
        raise UserError(f"--lora {file}: a PEFT file needs its {PEFT_CONFIG} beside it")
    try:
        described = dict(json.loads(place.read_text()))
    except (ValueError, TypeError):
        raise UserError(f"--lora {place}: cannot be read as JSON; download or copy it again") from None
    if (kind := described.get("peft_type")) != "LORA":
        raise UserError(f"--lora {file.parent}: holds a PEFT adapter of type {kind}; only LoRA and DoRA are supported")
    return rendering_config(file, PEFT_CONFIG, described)


def _component(modules, weights):
    """(component, weights under its names) of the first component that has all the layers; the UNet when none has."""
    named = {
        component: weights if component == "unet" else _named_as_in(modules[component], weights)
        for component in COMPONENTS
    }
    return next((pair for pair in named.items() if not misfitting_keys(modules[pair[0]], pair[1])), ("unet", weights))


def _named_as_in(encoder, weights):
    """The opposite of adapter_names.portable, where `encoder` is one without the prefix."""
    flat = all(not name.startswith("text_model.") for name, _ in encoder.named_modules())
    return {name.removeprefix("text_model.") if flat else name: tensor for name, tensor in weights.items()}
'''

# =============================================================================== common/adapter_files/reading.py

MODULES['common/adapter_files/reading.py'] = r'''
"""Adapter files of every format -> weights under PEFT's names: `find_adapter` resolves a path, `read_adapter` reads it.

What would fit in part or change nothing is refused: diffusers and PEFT do both with a warning.
"""

from collections.abc import Callable
from pathlib import Path

from safetensors import SafetensorError, safe_open

from common.adapter_files import diffusers_format, layer_reading, peft_format
from common.adapter_files.checks import check_values, check_weights
from common.errors import UserError
from common.files import read_safetensors


def find_adapter(place: str | Path) -> Path:
    """What `--lora place` means -> Path of a readable .safetensors file.

    `place` is such a file, a folder that a training run or diffusers wrote (its final weights, not those of a step), or
    a PEFT folder.

    Raises:
        UserError: nothing there, a pickle, a damaged file.
    """
    path = Path(place)
    file = _weights_in(path) if path.is_dir() else path
    if not file.exists():
        raise UserError(f"--lora {path}: no such file or folder")
    if file.suffix != ".safetensors":
        raise UserError(f"--lora {file}: only .safetensors files are read; pickles (.bin, .pt, .ckpt) can run code")

    # it can be opened, and holds tensors
    try:
        with safe_open(file, "pt") as tensors:
            empty = not tensors.keys()
    except SafetensorError as error:
        raise UserError(
            f"--lora {file}: damaged or not a safetensors file ({error}); download or copy it again"
        ) from None
    if empty:
        raise UserError(f"--lora {file}: has no tensors in it")
    return file


def _weights_in(folder):
    of_step = folder.parent / f"pytorch_lora_weights_{folder.name.removeprefix('checkpoint-')}.safetensors"
    if folder.name.startswith("checkpoint-") and of_step.exists():
        return of_step  # a checkpoint itself holds what training needs, and no adapter file
    for name in (diffusers_format.WEIGHTS, peft_format.PEFT_WEIGHTS):
        if (folder / name).exists():
            return folder / name
    if pickles := sorted(folder.glob("*.bin")):
        return pickles[0]
    steps = sorted(folder.glob("*.safetensors"))
    hint = f"; name one of its files, e.g. {steps[-1].name}" if steps else ""
    raise UserError(f"--lora {folder}: neither {diffusers_format.WEIGHTS} nor {peft_format.PEFT_WEIGHTS} in it{hint}")


def read_adapter(file: Path, modules: dict, say: Callable = print) -> tuple[dict, dict]:
    """Read an adapter file, of whatever format, for a model's `modules` {component: module}.

    `say` is told what is left out.

    Returns:
        ({component: {PEFT key: tensor}}, {component: LoraConfig arguments}).
    Raises:
        UserError: keys or shapes that fit nothing in this model, weights that are not finite or change nothing, a
            configuration that the installed PEFT does not know.
    """
    tensors, metadata = read_safetensors(file, from_anywhere=True)
    if bundled := {key for key in tensors if key.startswith(layer_reading.EMBEDDINGS)}:
        words = ", ".join(sorted({key.removeprefix(layer_reading.EMBEDDINGS).partition(".")[0] for key in bundled}))
        say(f"{file}: the text embeddings in it ({words}) are left out, its layers are used")
        tensors = {key: tensor for key, tensor in tensors.items() if key not in bundled}
    if not tensors:
        raise UserError(f"--lora {file}: holds text embeddings and no layers; it is no adapter")

    if all(key.startswith(peft_format.PEFT_PREFIX) for key in tensors):
        weights, configs = peft_format.read_peft(file, modules)
    else:
        weights, configs = layer_reading.read_layers(file, tensors, metadata, modules)
    check_values(file, weights)
    for component, part in weights.items():
        check_weights(file, modules[component], part)
    return weights, configs
'''

# ======================================================================================== common/cli/__init__.py

MODULES['common/cli/__init__.py'] = r'''
"""The command line: flags and what is true of them, checks, hub ids, one line for an error; without torch."""
'''

# ==================================================================================== common/cli/command_line.py

MODULES['common/cli/command_line.py'] = r'''
"""The command line as a dataclass: `parse()` reads its flags, and --help shows them in groups.

Nothing here imports torch: `--help`, a misspelt flag and a wrong value are answered at once.
"""

import argparse
import dataclasses
import difflib
import json
import os
import re
import shutil
import sys
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar, get_args

from common.cli.flag_facts import GROUPS, SHARE, default_of, local_path
from common.cli.other_tools import our_name
from common.errors import UserError
from common.system import packages
from common.system.places import CACHE_DIR

packages.require_parser()

import argparse_dataclass  # noqa: E402

DEMO_ROOT = Path(CACHE_DIR) / "demo"
TRUTH_VALUES = ("true", "false", "yes", "no", "on", "off", "1", "0", "none")
WIDTH = 100  # columns of --help at most
HELP_COLUMN = 34
METAVARS = {int: "N", float: "X", str: "TEXT", local_path: "PATH"}
Flags = TypeVar("Flags")


def parse(cls: type[Flags], argv: Sequence[str] | None = None) -> Flags:
    """Read `argv` (the command line when None) into the dataclass `cls`.

    `--demo` changes defaults; what is typed still wins.

    Raises:
        UserError: for whatever argparse refuses.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    typed = {text[2:].partition("=")[0].replace("-", "_") for text in argv if text.startswith("--")}
    parser = Parser(cls)
    names = {field.name for field in dataclasses.fields(cls)}
    parser.refuse_values_of_switches(argv)
    if "demo" in typed & names:
        # a typed list would be added to a default one, and the demo's folder of images would win over a typed data set
        owned = typed | ({"train_data_dir"} if "dataset_name" in typed else set())
        parser.set_defaults(**{name: value for name, value in _demo_defaults(cls).items() if name not in owned})
    if "num_train_epochs" in typed and "max_train_steps" in names - typed:
        parser.set_defaults(max_train_steps=None)  # typed epochs win over steps that are only a default
    return parser.parse_args(argv)


def _demo_defaults(cls: type) -> dict[str, Any]:
    """What `--demo` changes: see common/cli/demo_settings.py, and the flags' own facts."""
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # matrices this small lose time to a second thread, up to tenfold
    from common.cli.demo_settings import demo_settings

    fields = {field.name: field for field in dataclasses.fields(cls)}
    own = {name: field.metadata["demo"] for name, field in fields.items() if "demo" in field.metadata}
    return {name: value for name, value in {**demo_settings(DEMO_ROOT), **own}.items() if name in fields}


def print_config(flags: Any) -> None:
    """What --dry_run shows: the resolved flags as JSON."""
    print(json.dumps(dataclasses.asdict(flags), indent=2))


# ---------------------------------------------------------------- the parser


class Parser(argparse_dataclass.ArgumentParser):
    """argparse-dataclass with groups, both spellings of a name, and switches that can be cleared.

    Lists are repeatable, the help names defaults, and errors are raised as UserError.
    """

    def __init__(self, cls: type):
        self._fields = {field.name: field for field in dataclasses.fields(cls)}
        self._groups = {}
        super().__init__(
            cls,
            usage="%(prog)s [--flag VALUE ...]",
            description=cls.__doc__,
            allow_abbrev=False,
            formatter_class=_Formatter,
        )

    def add_argument(self, *names, **kwargs):
        """Called by argparse for -h, and by argparse-dataclass for each field."""
        if names[0] == "-h":
            return super().add_argument(*names, **kwargs)
        dest = kwargs.pop("dest", names[0][2:].replace("-", "_"))
        field = self._fields[dest]
        kwargs |= _reading(field, kwargs)

        # Only what was typed reaches the dataclass, which owns the defaults.
        kwargs["default"] = argparse.SUPPRESS
        kwargs["help"] = f"{kwargs['help']} (default: {_shown(default_of(field))})".replace("%", "%%")
        spellings = dict.fromkeys((f"--{dest}", f"--{dest.replace('_', '-')}"))

        # All groups are made at the first flag, so that they stand in the order of GROUPS; empty ones are not shown.
        self._groups = self._groups or {title: self.add_argument_group(title) for title in GROUPS}
        group = self._groups.get(field.metadata.get("group"), super())
        return group.add_argument(*spellings, dest=dest, **kwargs)

    def error(self, message):
        for typed in re.findall(r"--[\w-]+", message) if message.startswith("unrecognized") else ():
            message += self._hint(typed)
        raise UserError(f"{message} (--help lists every flag)")

    def _hint(self, typed: str) -> str:
        """What may be meant by an unknown flag: another tool's name for one of ours, or a misspelt one."""
        theirs = typed.lstrip("-").replace("-", "_")
        if ours := our_name(theirs, set(self._fields)):
            return f"; {typed} is called --{ours} here"
        known = [option for action in self._actions for option in action.option_strings]
        close = difflib.get_close_matches(typed, known, n=1)
        return f"; did you mean {close[0]}?" if close else ""

    def refuse_values_of_switches(self, argv: Sequence[str]) -> None:
        """A switch takes no value: argparse would call the `false` of `--use_ema false` a stray word.

        Raises:
            UserError: naming the two spellings that there are.
        """
        switches = [action for action in self._actions if isinstance(action, Switch)]
        names = {option: action.dest for action in switches for option in action.option_strings}
        for typed, following in zip(argv, [*argv[1:], ""]):
            option, joined, value = typed.partition("=")
            value = value if joined else following
            if option in names and (joined or value.lower() in TRUTH_VALUES):
                name = names[option]
                raise UserError(
                    f"{option} {value}: a switch takes no value; write --{name} to set it, --no_{name} to clear it"
                )


class Switch(argparse.Action):
    """A bool: `--x` sets it, `--no_x` (or `--no-x`) clears it."""

    def __init__(self, option_strings, dest, **kwargs):
        negated = [f"--no{s}{option[2:]}" for option in option_strings for s in "_-"]
        super().__init__([*option_strings, *negated], dest, nargs=0, **kwargs)

    def __call__(self, parser, namespace, values, option_string=None):
        setattr(namespace, self.dest, option_string in self.option_strings[: len(self.option_strings) // 3])


def _reading(field: dataclasses.Field, kwargs: dict[str, Any]) -> dict[str, Any]:
    """argparse's words for how a flag is read; `kwargs` are argparse-dataclass's, of which "type" goes for a switch."""
    if str(kwargs.get("action")).startswith("store_") or kwargs.get("type") is bool:
        kwargs.pop("type", None)
        return {"action": Switch}
    reading = {"metavar": _metavar(field, kwargs)}
    if "nargs" in kwargs:
        reading["action"] = "extend"
    if type(None) in get_args(field.type):
        reading["type"] = _or_none(kwargs["type"])
        if "choices" in kwargs:
            reading["choices"] = [*kwargs["choices"], None]
    return reading


def _metavar(field: dataclasses.Field, kwargs: dict[str, Any]) -> str:
    """What stands for a value in --help: the choices, or one word."""
    if "choices" in kwargs:
        none = ["none"] if type(None) in get_args(field.type) else []
        return "{" + ",".join([*kwargs["choices"], *none]) + "}"
    usual = "SHARE" if field.metadata.get("range") is SHARE else METAVARS[kwargs["type"]]
    return field.metadata.get("metavar", usual)


def _or_none(convert):
    """A type for argparse that also takes the word "none"."""

    def converter(text):
        return None if text.lower() == "none" else convert(text)

    converter.__name__ = convert.__name__
    return converter


def _shown(default: Any) -> Any:
    """A default as --help names it."""
    if default is None or default == []:
        return "none"
    return " ".join(default) if isinstance(default, list) else default


class _Formatter(argparse.HelpFormatter):
    """One spelling of each flag, and WIDTH columns at most."""

    def __init__(self, prog):
        width = min(WIDTH, shutil.get_terminal_size().columns)
        super().__init__(prog, max_help_position=HELP_COLUMN, width=width)

    def _split_lines(self, text, width):
        return textwrap.wrap(text, width, break_on_hyphens=False, break_long_words=False)  # paths stay whole

    def _format_action_invocation(self, action):
        if action.dest == "help":
            return super()._format_action_invocation(action)
        name = f"--{action.dest}"
        if isinstance(action, Switch):
            return f"{name} / --no_{action.dest}"
        return f"{name} {action.metavar}" + (" ..." if action.nargs == "+" else "")
'''

# =================================================================================== common/cli/demo_settings.py

MODULES['common/cli/demo_settings.py'] = r'''
"""What `--demo` means.

It trains the small SDXL on the ink drawings in demo/assets. Where those are absent
(one-file scripts) or not wanted (tests), the tiny random SDXL of common/model/tiny.py and its images take their place.
"""

import os
from pathlib import Path

import common

ASSETS = Path(common.__file__).resolve().parents[1] / "demo" / "assets"
# The small UNet has attention at 8 x 8 and 4 x 4 latents only: its adapter takes in the other linear layers there too.
SMALL_DEMO = dict(
    resolution=128,
    train_batch_size=8,
    gradient_accumulation_steps=1,
    gradient_checkpointing=False,
    max_train_steps=250,
    lr_warmup_steps=10,
    learning_rate=2e-3,
    caption_dropout=0.1,
    lora_target_modules=["to_q", "to_k", "to_v", "to_out.0", "ff.net.0.proj", "ff.net.2", "proj_in", "proj_out"],
    checkpointing_steps=125,
    validation_steps=125,
    steps=20,
    guidance_scale=5.0,
    prompts=[
        "a smiling boy with short blond hair and blue eyes wearing a red hoodie in front of the sea",
        "a portrait of a girl with black hair in a ponytail and green eyes wearing a purple kimono "
        "in front of a night sky",
        "a laughing woman with long red hair and purple eyes wearing a green jacket in front of a forest",
    ],
)
TINY_DEMO = dict(
    resolution=64,
    max_train_steps=24,
    lr_warmup_steps=4,
    learning_rate=1e-3,
    checkpointing_steps=12,
    validation_steps=12,
    steps=8,
    prompts=[
        "a laughing boy with blue eyes and orange hair, dressed in black, in front of a green hill",
        "a smiling girl with green eyes and pink hair, dressed in white, in front of the sea",
        "a smiling cat with brown eyes and yellow fur, dressed in blue, in front of a sunset",
    ],
)
# Part of the folder names: raise it when common/model/tiny.py or common/model/tiny_pictures.py builds something else.
VERSION = 2


def is_tiny() -> bool:
    """Whether the random model stands in for the trained one: that is absent, or TINY_DEMO=1 is set, as in tests."""
    return os.environ.get("TINY_DEMO") == "1" or not (ASSETS / "model").is_dir()


def demo_settings(root: Path) -> dict:
    """What --demo sets, by flag; the tiny model and its images belong under `root`, and may not be there yet."""
    if is_tiny():
        own = TINY_DEMO
        model = root / f"model-v{VERSION}"
        data = root / f"data-v{VERSION}"
    else:
        own = SMALL_DEMO
        model = ASSETS / "model"
        data = ASSETS / "data"
    return dict(pretrained_model_name_or_path=str(model), train_data_dir=[str(data)], **own)
'''

# ===================================================================================== common/cli/flag_checks.py

MODULES['common/cli/flag_checks.py'] = r'''
"""What must hold of the flags before anything heavy is imported or anything is written: ranges, places, packages.

Nothing here imports torch: what cannot work is refused at once.
"""

import contextlib
import importlib.util
import netrc
import os
import tempfile
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from common import run_folder
from common.cli.command_line import DEMO_ROOT
from common.cli.flag_facts import outside_range
from common.cli.flags import TrainFlags
from common.cli.model_flags import ModelFlags
from common.errors import UserError
from common.system import packages

POLYNOMIAL_END = 1e-7  # the learning rate at which diffusers' polynomial schedule ends


def check(flags: TrainFlags) -> None:
    """Refuse values that cannot work, before anything heavy is imported or anything is written.

    Raises:
        UserError: naming the flag, the value and the cure.
    """
    check_ranges(flags)

    # What needs another flag beside it.
    if flags.early_stopping_patience and not flags.validation_split:
        raise UserError("--early_stopping_patience needs a held-out loss: add --validation_split 0.05")
    if flags.keep_tokens and not (flags.shuffle_tags or flags.tag_dropout):
        raise UserError(
            f"--keep_tokens {flags.keep_tokens}: keeps tags in place that nothing moves;"
            " add --shuffle_tags or --tag_dropout"
        )

    if flags.lr_scheduler == "polynomial" and flags.learning_rate <= POLYNOMIAL_END:
        raise UserError(
            f"--learning_rate {flags.learning_rate}: polynomial ends at {POLYNOMIAL_END};"
            " give more, or another --lr_scheduler"
        )
    if not all(name.strip() for name in flags.lora_target_modules):
        raise UserError(
            "--lora_target_modules: an empty name would mean every layer; give the ends of layer names, e.g. to_q to_k"
        )

    _check_places(flags)
    _check_packages(flags)
    check_model(flags)


def check_ranges(flags: Any) -> None:
    """Every number is in the range that stands at its flag.

    Raises:
        UserError: naming the flag, the value and what it must be.
    """
    if complaint := outside_range(flags):
        raise UserError(complaint)


def check_model(flags: ModelFlags) -> None:
    """What every script needs: packages, a model that is there if it is meant to be local, and places to write to."""
    if found := packages.lacking():
        raise UserError(packages.refusal(found))
    for name in ("output_dir", "cache_dir"):
        check_writable(name, getattr(flags, name))
    for name in ("pretrained_model_name_or_path", "pretrained_vae_model_name_or_path"):
        place = getattr(flags, name)
        looks_local = place and (
            place.startswith(("/", ".", "~")) or place.endswith(".safetensors") or place.count("/") > 1
        )
        if looks_local and "://" not in place and not os.path.exists(place) and not _of_the_demo(place):
            raise UserError(f"--{name} {place}: no such folder or file")


def check_writable(name: str, place: str) -> None:
    """A folder that is there with the right to write in it, or that can be made."""
    path = Path(place).absolute()
    nearest = next(folder for folder in (path, *path.parents) if os.path.exists(folder))
    if not nearest.is_dir():
        raise UserError(f"--{name} {place}: {nearest} is a file; name a folder")
    try:  # rights alone do not tell: a disk may be read-only, and /proc takes no folders
        tempfile.TemporaryDirectory(dir=nearest).cleanup()
    except OSError as error:
        said = f"no right to write in {nearest} ({error.strerror})"
        raise UserError(f"--{name} {place}: {said}; name another folder") from None


def _of_the_demo(place):
    return Path(place).is_relative_to(DEMO_ROOT)  # built when it is needed


def _check_places(flags):
    output = Path(flags.output_dir)
    resume = flags.resume_from_checkpoint
    for name in flags.train_data_dir:
        if not _of_the_demo(name):
            _check_data_dir(name, output)
    if resume not in (None, "latest") and not os.path.isdir(resume):
        raise UserError(f"--resume_from_checkpoint {resume}: no such checkpoint folder")
    run_folder.check_free(output)

    # A run that is there is gone on with, or left alone.
    continues = resume == "latest" or (resume and Path(resume).resolve().parent == output.resolve())
    if not continues and any((output / name).exists() for name in ("metrics.jsonl", run_folder.WEIGHTS)):
        raise UserError(
            f"--output_dir {output}: already holds a run; continue it with --resume_from_checkpoint latest,"
            " or name another folder"
        )
    if resume == "latest" and (output / run_folder.WEIGHTS).exists() and not run_folder.find_checkpoints(output):
        raise UserError(
            f"--resume_from_checkpoint latest: {output} holds a finished run, which would be written over,"
            " and no checkpoint to go on from; name another --output_dir"
        )


def _check_data_dir(name, output):
    folder, _ = find_data_dir(name)
    if output.resolve().is_relative_to(folder.resolve()):
        raise UserError(
            f"--output_dir {output}: lies in --train_data_dir {folder}, so the pictures of the run would be trained on;"
            " name a folder outside, and move a run that is there already"
        )


def _check_packages(flags):
    wanted = (  # (whether it is asked for, package, by what)
        (flags.use_8bit_adam, "bitsandbytes", "--use_8bit_adam"),
        (flags.quantize == "nf4", "bitsandbytes", "--quantize nf4"),
        (
            flags.enable_xformers_memory_efficient_attention,
            "xformers",
            "--enable_xformers_memory_efficient_attention",
        ),
        (flags.report_to != "none", flags.report_to, f"--report_to {flags.report_to}"),
    )
    for is_wanted, package, typed in wanted:
        if is_wanted and importlib.util.find_spec(package) is None:
            raise UserError(f"{typed} needs a package that is not installed: pip install {package}")
    if flags.report_to == "wandb":
        _check_wandb_login()


def _check_wandb_login():
    """wandb itself would ask for a key, or fail, when everything is loaded; it reads the same three places."""
    if os.environ.get("WANDB_API_KEY") or os.environ.get("WANDB_MODE") in ("offline", "disabled", "dryrun"):
        return
    server = urlsplit(os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")).hostname
    usual = [os.path.expanduser(f"~/{name}") for name in (".netrc", "_netrc")]
    places = [os.environ["NETRC"]] if "NETRC" in os.environ else usual
    for place in filter(os.path.isfile, places):
        with contextlib.suppress(netrc.NetrcParseError, OSError):
            if netrc.netrc(place).authenticators(server):
                return
    raise UserError(
        "--report_to wandb: not logged in; run wandb login, set WANDB_API_KEY,"
        " or WANDB_MODE=offline to keep it on this disk"
    )


def find_data_dir(name: str) -> tuple[Path, int]:
    """(folder, weight) of a value of --train_data_dir: of NAME or /kaggle/input/NAME weight 1, of NAME:2 weight 2.

    A folder whose own name ends in a colon and a number is found first.

    Raises:
        UserError: there is no such folder, or the weight is no whole number from 1.
    """
    before, _, after = name.rpartition(":")
    for place, weight in ((name, "1"), (before, after)):
        for folder in (Path(place), Path("/kaggle/input") / place):
            if place and folder.is_dir():
                if not (weight.isdecimal() and int(weight)):
                    raise UserError(
                        f"--train_data_dir {name}: {weight!r} is no weight; give a whole number from 1, e.g. {folder}:2"
                    )
                return folder, int(weight)
    raise UserError(f"--train_data_dir {name}: no such folder (also looked in /kaggle/input)")
'''

# ====================================================================================== common/cli/flag_facts.py

MODULES['common/cli/flag_facts.py'] = r'''
"""What is true of one flag stands at its `flag(...)`: help, group, range, whether a resumed run may change it.

Whoever needs the flags of which something is true asks for them here; there is no second list of their names.
"""

import argparse
import dataclasses
import math
import os
from collections.abc import Callable
from typing import Any, Literal

GROUPS = (  # the titles of --help, in its order
    "trying it out",
    "pictures",
    "model",
    "data",
    "captions",
    "adapter",
    "optimisation",
    "loss",
    "memory and speed",
    "validation",
    "output",
)

# ---------------------------------------------------------------- ranges

Range = Callable[[float], str | None]  # of a value: None where the flag may have it, else what it must be


def allowing(holds: Callable[[float], bool], must: str) -> Range:
    """The numbers for which `holds`; of others it is said that they `must`."""
    return lambda value: None if holds(value) else must


def multiple_of(step: int, least: int = 64) -> Range:
    """Whole multiples of `step` from `least`; of another number the nearest one is named."""

    def complaint(value: float) -> str | None:
        if value >= least and value % step == 0:
            return None
        nearest = max(least, round(value / step) * step)
        return f"must be a multiple of {step}, at least {least}; the nearest is {nearest}"

    return complaint


ANY = allowing(math.isfinite, "must be a number")
POSITIVE = allowing(lambda value: 0 < value < math.inf, "must be greater than 0, and finite")
FROM_ZERO = allowing(lambda value: 0 <= value < math.inf, "must be 0 or greater, and finite")
FROM_ONE = allowing(lambda value: value >= 1, "must be at least 1")
SHARE = allowing(lambda value: 0 <= value < 1, "must be at least 0 and less than 1")
SEED = allowing(lambda value: 0 <= value < 2**32, "must be at least 0 and less than 2^32")

# ---------------------------------------------------------------- the declaration


def flag(
    default: Any,
    help: str,
    *,
    group: str | None = None,
    range: Range | None = None,
    resume: Literal["free"] | None = None,
    changes_a_pass: bool = False,
    type: Callable[[str], Any] | None = None,
    choices: list[str] | None = None,
    metavar: str | None = None,
    demo: Any = None,
) -> Any:
    """One command-line flag. A list default makes it repeatable: `--x a --x b` and `--x a b` are the same.

    Args:
        group: one of GROUPS, under which --help shows it.
        range: the numbers it may have.
        resume: "free" where a resumed run may change it without a word, since it does not change what is computed.
        changes_a_pass: the memory or the time of a training pass depends on it, so a remembered plan does.
        type: what makes a value of a text, where that is not the field's type.
        metavar: what stands for its value in --help, where that is not N, X, SHARE, TEXT or PATH.
        demo: the default that --demo gives it.
    Raises:
        ValueError: a group or a word for `resume` that there is not.
    """
    if group not in (None, *GROUPS):
        raise ValueError(f"group={group!r}: not one of {GROUPS}")
    if resume not in (None, "free"):
        raise ValueError(f'resume={resume!r}: "free" or nothing')
    facts = dict(help=help, group=group, range=range, resume=resume, changes_a_pass=changes_a_pass)
    facts |= dict(type=type, choices=choices, metavar=metavar, demo=demo)
    return _field(default, {name: fact for name, fact in facts.items() if not (fact is None or fact is False)})


def _field(default: Any, facts: dict[str, Any]) -> Any:
    if isinstance(default, list):
        return dataclasses.field(default_factory=lambda: list(default), metadata={**facts, "nargs": "+"})
    return dataclasses.field(default=default, metadata=facts)


class Described:
    """Base of flag dataclasses: a subclass that overrides a flag gives what differs, and keeps the other facts."""

    def __init_subclass__(cls) -> None:
        inherited = {field.name: field for field in dataclasses.fields(cls)} if dataclasses.is_dataclass(cls) else {}
        for name in inherited.keys() & cls.__dict__.get("__annotations__", {}).keys():
            own = cls.__dict__[name]
            facts = dict(inherited[name].metadata)
            if isinstance(own, dataclasses.Field):
                facts |= own.metadata
                own = default_of(own)
            setattr(cls, name, _field(own, facts))


def local_path(text: str) -> str:
    """The type of a flag that names a file or folder (or, for some, a hub id): `~` is the home folder."""
    if not text.strip():
        raise argparse.ArgumentTypeError("is empty; name a file or folder")
    return os.path.expanduser(text)


# ---------------------------------------------------------------- questions


def default_of(field: dataclasses.Field) -> Any:
    """The default of a flag; of a list a new one."""
    return field.default if field.default_factory is dataclasses.MISSING else field.default_factory()


def names_where(flags: Any, **facts: Any) -> list[str]:
    """The names of the flags, of a dataclass or one of its instances, that have all of `facts`, in their order."""
    return [
        field.name
        for field in dataclasses.fields(flags)
        if all(field.metadata.get(name) == fact for name, fact in facts.items())
    ]


def outside_range(flags: Any) -> str | None:
    """What is wrong with the first flag whose value is outside its range: flag, value and what it must be."""
    for field in dataclasses.fields(flags):
        value = getattr(flags, field.name)
        if "range" in field.metadata and value is not None and (must := field.metadata["range"](value)):
            return f"--{field.name} {value}: {must}"
    return None
'''

# =========================================================================================== common/cli/flags.py

MODULES['common/cli/flags.py'] = r'''
"""The flags of the trainers, as a documented dataclass. What must hold of several of them stands in flag_checks.py.

Nothing here imports torch: a wrong value is answered at once.
"""

from dataclasses import dataclass
from typing import List, Literal, Optional

from common.cli.flag_facts import FROM_ZERO, POSITIVE, SEED, SHARE, flag, local_path, multiple_of
from common.cli.model_flags import ModelFlags

ATTENTION_PROJECTIONS = ["to_q", "to_k", "to_v", "to_out.0"]
FEED_FORWARD = ["ff.net.0.proj", "ff.net.2"]


@dataclass
class TrainFlags(ModelFlags):
    """The flags every trainer has. A trainer's own class overrides defaults and adds the flags of its technique."""

    # data
    dataset_name: str = flag("lambdalabs/naruto-blip-captions", "hub data set of image-caption pairs", group="data")
    train_data_dir: List[str] = flag(
        [],
        "folder of images with metadata.jsonl/.csv or .txt captions, of parquet or arrow files, or written by"
        " save_to_disk; repeatable; FOLDER:2 shows each of its images twice an epoch, and so does a folder 2_NAME in"
        " it; wins over --dataset_name; a name under /kaggle/input works too",
        type=local_path,
        group="data",
    )
    image_column: str = flag("image", "column of the images in a hub data set", group="data")
    caption_column: str = flag("text", "column of the captions in a hub data set or a metadata file", group="data")
    max_train_samples: Optional[int] = flag(None, "use only the first N samples", group="data", range=POSITIVE)
    max_bad_images: int = flag(
        0, "unreadable images are named and skipped; more than this many end the run", group="data", range=FROM_ZERO
    )
    resolution: int = flag(
        1024,
        "pixels: side of the square crop, or of the square with the area of a bucket; a multiple of 32",
        group="data",
        range=multiple_of(32),
        metavar="PX",
    )
    center_crop: bool = flag(
        True,
        "crop the middle; otherwise each image has one random crop, drawn from its content so that it can be cached",
        group="data",
    )
    random_flip: bool = flag(False, "mirror half of the training examples", group="data")
    aspect_ratio_buckets: bool = flag(
        False,
        "keep the aspect ratio: crop to the nearest of the buckets between 1:2 and 2:1 with the area of --resolution",
        group="data",
        changes_a_pass=True,
    )
    caption_dropout: float = flag(
        0.0,
        "share of training examples that see the unconditional input instead of their caption",
        group="captions",
        range=SHARE,
    )
    trigger_word: Optional[str] = flag(
        None, "word put before every caption, e.g. the name of the style; a comma is put after it", group="captions"
    )
    caption_prefix: Optional[str] = flag(
        None, "text put before every caption, and before the trigger word, and a comma after it", group="captions"
    )
    caption_suffix: Optional[str] = flag(None, "text put after every caption, and a comma before it", group="captions")
    shuffle_tags: bool = flag(
        False, "train each caption with the parts between its commas in several random orders", group="captions"
    )
    keep_tokens: int = flag(
        0, "this many first tags of a caption stay first and are never dropped", group="captions", range=FROM_ZERO
    )
    tag_dropout: float = flag(
        0.0, "share of a caption's other tags that a variant of it lacks", group="captions", range=SHARE
    )
    caption_variants: int = flag(
        8,
        "with --shuffle_tags or --tag_dropout: texts made of each caption, one drawn each epoch;"
        " each takes 0.3 MB of cache",
        group="captions",
        range=POSITIVE,
    )
    text_cache: Literal["ram", "disk", "none"] = flag(
        "ram",
        "text embeddings: encoded once and held in RAM, encoded once and kept on disk, or encoded in every step",
        group="memory and speed",
        changes_a_pass=True,
    )
    # adapter
    quantize: Literal["none", "nf4"] = flag(
        "none",
        "keep the frozen UNet's linear layers in 16 bits, or in 4 (bitsandbytes NF4, double quantisation)",
        group="memory and speed",
        changes_a_pass=True,
    )
    lora_rank: int = flag(16, "rank r of the adapter", group="adapter", range=POSITIVE, changes_a_pass=True)
    lora_alpha: Optional[int] = flag(
        None,
        "the adapter is scaled by alpha / rank; none means the rank, so a scale of 1",
        group="adapter",
        range=POSITIVE,
    )
    lora_dropout: float = flag(
        0.0,
        "dropout on the adapter's input; its masks are seeded by step and pass, so they depend on how a batch is split",
        group="adapter",
        range=SHARE,
        changes_a_pass=True,
    )
    lora_target_modules: List[str] = flag(
        ATTENTION_PROJECTIONS,
        "UNet layers that get an adapter, by the end of their names",
        group="adapter",
        changes_a_pass=True,
    )
    lora_backend: Literal["fused", "peft"] = flag(
        "fused",
        "forward passes: adapted layers as one function, fewer passes over memory; or PEFT's and diffusers' own",
        group="memory and speed",
        changes_a_pass=True,
    )
    auto_fit: bool = flag(
        True,
        "on a GPU, measure how many images fit a pass and what must be recomputed; the effective batch stays",
        group="memory and speed",
    )
    max_vram_gb: Optional[float] = flag(
        None,
        "GiB of GPU memory to stay within; none means what is free",
        group="memory and speed",
        range=POSITIVE,
        metavar="GIB",
    )
    cuda_graph: bool = flag(
        True,
        "on a GPU, launch the kernels of a pass once and replay them",
        group="memory and speed",
        changes_a_pass=True,
    )
    train_text_encoder: bool = flag(
        False,
        "give both text encoders LoRA too (q, k, v, out; never DoRA); captions are then encoded in every step",
        group="adapter",
        changes_a_pass=True,
    )
    text_encoder_lr: float = flag(
        5e-5, "peak learning rate of the text encoders' adapters", group="optimisation", range=POSITIVE
    )
    enable_xformers_memory_efficient_attention: bool = flag(
        False, "attention by xformers instead of torch's own kernels", group="memory and speed", changes_a_pass=True
    )
    # optimisation
    train_batch_size: int = flag(
        1, "examples in one forward pass on one device", group="memory and speed", range=POSITIVE, resume="free"
    )
    gradient_accumulation_steps: int = flag(
        4,
        "passes in one optimizer step on one device; effective batch = batch size x accumulation, which several"
        " processes share out",
        group="optimisation",
        range=POSITIVE,
        resume="free",
    )
    gradient_checkpointing: bool = flag(
        True,
        "recompute activations in the backward pass: less memory, a third more work",
        group="memory and speed",
        changes_a_pass=True,
    )
    num_train_epochs: int = flag(
        10, "passes over the data, unless --max_train_steps is given", group="optimisation", range=POSITIVE
    )
    max_train_steps: Optional[int] = flag(
        None, "optimizer steps; wins over --num_train_epochs", group="optimisation", range=POSITIVE
    )
    learning_rate: float = flag(1e-4, "peak learning rate", group="optimisation", range=POSITIVE)
    lr_scheduler: Literal[
        "linear", "cosine", "cosine_with_restarts", "polynomial", "constant", "constant_with_warmup"
    ] = flag("cosine", "schedule of the learning rate over the optimizer steps", group="optimisation")
    lr_warmup_steps: int = flag(100, "optimizer steps of linear warm-up", group="optimisation", range=FROM_ZERO)
    lr_num_cycles: int = flag(
        2, "cosines of cosine_with_restarts; 1 never restarts", group="optimisation", range=POSITIVE
    )
    lr_power: float = flag(1.0, "exponent of polynomial; 1 is linear", group="optimisation", range=POSITIVE)
    use_8bit_adam: bool = flag(
        False, "AdamW with 8-bit state (bitsandbytes)", group="optimisation", changes_a_pass=True
    )
    adam_beta1: float = flag(0.9, "decay of AdamW's first moment", group="optimisation", range=SHARE, metavar="X")
    adam_beta2: float = flag(0.999, "decay of AdamW's second moment", group="optimisation", range=SHARE, metavar="X")
    adam_weight_decay: float = flag(1e-2, "decoupled weight decay", group="optimisation", range=FROM_ZERO)
    adam_epsilon: float = flag(1e-8, "AdamW's epsilon", group="optimisation", range=FROM_ZERO)
    max_grad_norm: float = flag(
        1.0, "gradients are clipped to this norm; 0 switches clipping off", group="optimisation", range=FROM_ZERO
    )
    seed: int = flag(
        42, "seed of data order, noise, timesteps and adapter initialisation", group="optimisation", range=SEED
    )
    # loss
    min_snr_gamma: Optional[float] = flag(
        None,
        "Min-SNR loss weighting with this gamma (arXiv 2303.09556); none is plain MSE",
        group="loss",
        range=POSITIVE,
    )
    offset_noise_strength: float = flag(
        0.0, "strength of noise that is constant over an image's channel", group="loss", range=FROM_ZERO
    )
    use_ema: bool = flag(
        False,
        "keep an exponential moving average of the adapter, saved to ema_unet/",
        group="optimisation",
        changes_a_pass=True,
    )
    ema_decay: float = flag(
        0.9999,
        "decay of the average, reached by the ramp (1 + step) / (10 + step)",
        group="optimisation",
        range=SHARE,
        metavar="X",
    )
    # output
    output_dir: str = flag(
        "outputs/train", "where everything the run writes goes", type=local_path, group="output", resume="free"
    )
    save_peft: bool = flag(
        False,
        "write the final adapter as PEFT folders too: peft/, and text encoders in folders within it",
        group="output",
        resume="free",
    )
    checkpointing_steps: int = flag(
        500, "optimizer steps between checkpoints; 0 writes none on the way", group="output", range=FROM_ZERO
    )
    checkpoints_total_limit: Optional[int] = flag(
        3, "keep this many newest checkpoints; the weight files of all steps stay", group="output", range=POSITIVE
    )
    resume_from_checkpoint: Optional[str] = flag(
        None,
        "'latest' or the path of a checkpoint folder: go on exactly where it was",
        type=local_path,
        group="output",
        resume="free",
    )
    max_train_minutes: Optional[float] = flag(
        None,
        "stop early, with everything saved, this many minutes after the start",
        group="output",
        range=POSITIVE,
        resume="free",
        metavar="MINUTES",
    )
    report_to: Literal["none", "tensorboard", "wandb"] = flag(
        "none", "tracker that gets the numbers of metrics.jsonl too", group="output", resume="free"
    )
    validation_prompt: List[str] = flag([], "prompt to render while training; repeatable", group="validation")
    validation_steps: int = flag(
        500,
        "optimizer steps between validations: images (of the average with --use_ema) and held-out loss (without it)",
        group="validation",
        range=POSITIVE,
    )
    validation_split: float = flag(
        0.0,
        "share of the data held out for a validation loss at fixed noise and timesteps",
        group="validation",
        range=SHARE,
    )
    early_stopping_patience: Optional[int] = flag(
        None, "stop after this many validations without a better held-out loss", group="validation", range=POSITIVE
    )

    def __post_init__(self):
        if self.lora_alpha is None:
            self.lora_alpha = self.lora_rank
'''

# ============================================================================================= common/cli/hub.py

MODULES['common/cli/hub.py'] = r'''
"""Is it here, and can it be had? Hub ids are answered for quickly, before anything waits on a dead network."""

import json
import os
from pathlib import Path

from common.cli.command_line import DEMO_ROOT
from common.cli.hub_ids import check_id
from common.errors import UserError
from common.system import launch
from common.system.attached import find_attached

PROBE_S = 5  # the libraries retry for up to 47 s before they say the same

FP16_VAE = "madebyollin/sdxl-vae-fp16-fix"  # the original SDXL VAE overflows in fp16
# What makes a VAE the original one, of which FP16_VAE is a drop-in replacement.
ORIGINAL_VAE = dict(
    scaling_factor=0.13025,
    latent_channels=4,
    block_out_channels=[128, 256, 512, 512],
    latents_mean=None,
    latents_std=None,
)
PARTS = ("unet", "text_encoder", "text_encoder_2", "vae")
CONFIGS = ("model_index.json", "scheduler/", "tokenizer/", "tokenizer_2/")


def check(flags):
    """Every repo that the flags name and that is not a local path is cached or within reach.

    A default that is not gives way, in `flags`, to what is attached to a Kaggle notebook.

    Raises:
        UserError: naming the flag, the repo and the ways to work offline.
    """
    for name in _flags_of_ids(flags):  # all of them first: an id that is none needs no network to be refused
        check_id(getattr(flags, name), name)
    if "dataset_name" in vars(flags) and not flags.train_data_dir:
        _require_or_take(flags, "dataset_name", "dataset", "README.md", kind="data", into="train_data_dir")
    if not os.path.exists(flags.pretrained_model_name_or_path) and not _in_demo(flags.pretrained_model_name_or_path):
        _require_or_take(flags, "pretrained_model_name_or_path", "model", "model_index.json", kind="models")
    model = Path(flags.pretrained_model_name_or_path)
    vae = flags.pretrained_vae_model_name_or_path
    if model.is_file() and not os.path.isdir(flags.config_name_or_path):
        _require_or_take(flags, "config_name_or_path", "model", "model_index.json", kind="models")
    if not model.exists() and not _in_demo(model):
        vae = vae or default_vae(flags.pretrained_model_name_or_path, flags.revision)
    if vae and not Path(vae).is_dir():
        _require(vae, "model", "pretrained_vae_model_name_or_path", "config.json")


def _flags_of_ids(flags):
    """The names of the flags whose values are no local paths, and so hub ids."""
    if "dataset_name" in vars(flags) and not flags.train_data_dir:
        yield "dataset_name"
    for name in ("pretrained_model_name_or_path", "pretrained_vae_model_name_or_path"):
        place = getattr(flags, name)
        if place is not None and not os.path.exists(place) and not _in_demo(place):
            yield name
    if os.path.isfile(flags.pretrained_model_name_or_path) and not os.path.isdir(flags.config_name_or_path):
        yield "config_name_or_path"


def _in_demo(place):
    return Path(place).is_relative_to(DEMO_ROOT)  # built when it is needed


def _require_or_take(flags, name, repo_type, filename, *, kind, into=None):
    """`_require` of what the flag `name` says.

    Where a default cannot be had, the flag `into` gets the one attached folder of its kind.
    """
    repo_id = getattr(flags, name)
    into = into or name
    try:
        _require(repo_id, repo_type, name, filename)
    except UserError as error:
        is_default = repo_id == type(flags).__dataclass_fields__[name].default
        folders = getattr(find_attached(), kind) if is_default else []
        if not folders:
            raise
        if len(folders) > 1:
            raise UserError(f"{error}; attached are {', '.join(folders)}: name one with --{into}") from None
        setattr(flags, into, folders if isinstance(getattr(flags, into), list) else folders[0])
        if launch.rank() == 0:
            print(f"--{name} {repo_id} cannot be had: taking {folders[0]}, which is attached to this notebook")


def _require(repo_id, repo_type, flag, filename):
    """Return when `repo_id` is cached (it then holds `filename`, which every such repo has) or the hub knows it."""
    from huggingface_hub import HfApi, try_to_load_from_cache
    from huggingface_hub.errors import RepositoryNotFoundError

    if isinstance(try_to_load_from_cache(repo_id, filename, repo_type=repo_type), str):
        return
    offline = "offline, give a local path instead, or try --demo"
    if os.environ.get("HF_HUB_OFFLINE", "0") not in ("0", ""):
        raise UserError(f"--{flag} {repo_id}: not in the local cache, and HF_HUB_OFFLINE is set; {offline}")
    try:
        HfApi().repo_info(repo_id, repo_type=repo_type, timeout=PROBE_S)
    except RepositoryNotFoundError:
        raise UserError(
            f"--{flag} {repo_id}: no such {repo_type} on the hub, or it needs a login (huggingface-cli login)"
        ) from None
    except Exception as error:  # whatever the HTTP stack of the day raises for a dead network
        raise UserError(f"--{flag} {repo_id}: the hub cannot be reached ({type(error).__name__}); {offline}") from None


# ---------------------------------------------------------------- downloading


def default_vae(repo_id, revision):
    """FP16_VAE where the model's own VAE is SDXL's original one.

    None where it is another: the model's UNet knows only that.
    """
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

    try:
        config = json.loads(
            Path(hf_hub_download(repo_id, "vae/config.json", revision=revision)).read_text(encoding="utf-8")
        )
    except LocalEntryNotFoundError:
        return FP16_VAE  # a cached model whose VAE was never needed
    except EntryNotFoundError:
        return None  # a repo that holds a single file
    return FP16_VAE if all(config.get(name) == value for name, value in ORIGINAL_VAE.items()) else None


def download_model(repo_id, variant, revision, *, with_vae, say):
    """Only the model's files that are used (fp16: about 7 GB, not 14) -> its local folder, or its single file.

    Args:
        variant: weight files to prefer; parts without it come as plain ones, with a line.
    Raises:
        UserError: no such revision, no access, or no safetensors files of a model.
    """
    files = _files_of(repo_id, revision)
    if files is None:
        return _model_in(download_files(repo_id, None, revision), repo_id)
    if "model_index.json" not in files:
        file = _single_file(files, repo_id)
        say(f"model: {repo_id} holds the single file {file}, and no diffusers folder: taking that")
        return download_files(repo_id, [file], revision) / file
    parts = {part: _weights_of(part, files, variant, repo_id) for part in PARTS if part != "vae" or with_vae}
    plain = [part for part, chosen in parts.items() if variant and not any(f".{variant}" in file for file in chosen)]
    if plain:
        say(f"model: {repo_id} has no {variant} files of {', '.join(plain)}: taking the plain ones")
    configs = [file for file in files if file.startswith(CONFIGS) or file.partition("/")[2] == "config.json"]
    return download_files(repo_id, configs + sum(parts.values(), []), revision)


def download_files(repo_id, patterns, revision=None):
    """The local folder with the files of `repo_id` that match; with None, what an earlier download has left there.

    Raises:
        UserError: no access, or nothing there.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import GatedRepoError, LocalEntryNotFoundError

    try:
        return Path(
            snapshot_download(repo_id, revision=revision, allow_patterns=patterns, local_files_only=patterns is None)
        )
    except GatedRepoError:
        raise UserError(f"{repo_id}: accept its terms on the hub, then log in (hf auth login)") from None
    except LocalEntryNotFoundError:
        raise UserError(
            f"{repo_id}: not in the local cache, and the hub cannot be reached; give a local path instead"
        ) from None


def _files_of(repo_id, revision):
    """Names of all files of a repo, None where the hub cannot be asked."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import RevisionNotFoundError

    try:
        return HfApi().list_repo_files(repo_id, revision=revision)
    except RevisionNotFoundError:
        raise UserError(f"--revision {revision}: {repo_id} has no such branch, tag or commit") from None
    except Exception:  # whatever the HTTP stack of the day raises for a dead network
        return None


def _model_in(folder, repo_id):
    if (folder / "model_index.json").exists():
        return folder
    return folder / _single_file([path.name for path in folder.iterdir()], repo_id)


def _single_file(files, repo_id):
    """The one model file among `files`.

    Raises:
        UserError: there is none, or more than one.
    """
    found = sorted(file for file in files if file.endswith(".safetensors") and "/" not in file)
    if len(found) == 1:
        return found[0]
    what = f"several single files ({', '.join(found[:3])})" if found else "no safetensors file"
    raise UserError(
        f"--pretrained_model_name_or_path {repo_id}: it has no model_index.json and {what};"
        " download one file and give its path"
    )


def _weights_of(part, files, variant, repo_id):
    """The weight files of a part: those of the variant when there are any, else the plain ones."""
    names = [
        file for file in files if file.startswith(f"{part}/") and file.endswith(".safetensors") and file.count("/") == 1
    ]
    chosen = [file for file in names if variant and f".{variant}" in file] or [
        file for file in names if file.count(".") == 1
    ]
    if not chosen:
        raise UserError(
            f"--pretrained_model_name_or_path {repo_id}: no safetensors files of its {part}"
            " (only those are read; pickles can run code)"
        )
    return chosen
'''

# ========================================================================================= common/cli/hub_ids.py

MODULES['common/cli/hub_ids.py'] = r'''
"""What a hub id looks like, and what else people give where one is wanted: answered before anything is asked."""

import os
import re
from pathlib import PureWindowsPath
from urllib.parse import urlsplit

from common.errors import UserError

NAME = r"\w(?:[\w.-]*\w)?"
HUB_ID = re.compile(rf"(?:{NAME}/)?{NAME}", re.ASCII)
LONGEST = 96
HUBS = ("huggingface.co", "hf.co", "www.huggingface.co")
INSTEAD = {  # what to do where the value is no hub id
    "dataset_name": "for a folder of images use --train_data_dir FOLDER",
    "pretrained_model_name_or_path": "name a folder or .safetensors file that exists, or a hub id OWNER/NAME",
    "pretrained_vae_model_name_or_path": "name a folder that exists, or a hub id OWNER/NAME",
    "config_name_or_path": "name a folder that exists, or a hub id OWNER/NAME",
}


def check_id(repo_id: str, flag: str) -> None:
    """Refuse what cannot be a hub id.

    Raises:
        UserError: naming the flag, what the value is instead, and the cure.
    """
    instead = INSTEAD[flag]
    if not repo_id.strip():
        raise UserError(f"--{flag}: is empty; {instead}")
    if "://" in repo_id or repo_id.partition("/")[0] in HUBS:
        raise UserError(
            f"--{flag} {repo_id}: is a web address; {_id_in(repo_id) or f'download what is there, and {instead}'}"
        )

    # A place on this machine, or nothing that the hub has.
    if "\\" in repo_id or PureWindowsPath(repo_id).drive:
        raise UserError(f"--{flag} {repo_id}: is a Windows path, and nothing is there; {instead}")
    if os.path.isdir(repo_id):
        raise UserError(f"--{flag} {repo_id}: is a folder here, not a hub id; {instead}")
    if not HUB_ID.fullmatch(repo_id) or len(repo_id) > LONGEST or ".." in repo_id or "--" in repo_id:
        raise UserError(
            f"--{flag} {repo_id}: is no hub id (OWNER/NAME of letters, digits, - _ .), and no such place is here;"
            f" {instead}"
        )


def _id_in(address: str) -> str | None:
    """The cure for the address of a page on the hub: the id in it."""
    parts = urlsplit(address if "://" in address else f"https://{address}")
    names = [name for name in parts.path.split("/") if name and name != "datasets"]
    return f"write its id, {'/'.join(names[:2])}" if parts.hostname in HUBS and len(names) > 1 else None
'''

# ===================================================================================== common/cli/model_flags.py

MODULES['common/cli/model_flags.py'] = r'''
"""Which model, at which precision, and where the cache is: the flags that every script has."""

from dataclasses import dataclass
from typing import Literal, Optional

from common.cli.flag_facts import Described, flag, local_path
from common.system.places import CACHE_DIR


@dataclass
class ModelFlags(Described):
    """Which model to load, and how: the same for every script."""

    pretrained_model_name_or_path: str = flag(
        "stabilityai/stable-diffusion-xl-base-1.0",
        "SDXL: hub id, local folder or single .safetensors file",
        type=local_path,
        group="model",
        changes_a_pass=True,
    )
    pretrained_vae_model_name_or_path: Optional[str] = flag(
        None,
        "VAE: hub id or folder; none means the model's own, or for a hub model with SDXL's original one"
        " madebyollin/sdxl-vae-fp16-fix",
        type=local_path,
        group="model",
    )
    config_name_or_path: str = flag(
        "stabilityai/stable-diffusion-xl-base-1.0",
        "where configs and tokenizers of a single-file model come from: hub id or folder",
        type=local_path,
        group="model",
    )
    variant: Optional[str] = flag(
        "fp16", "weight files to prefer; plain ones are used where a local folder has no such variant", group="model"
    )
    revision: Optional[str] = flag(None, "branch, tag or commit of the hub model", group="model")
    prediction_type: Optional[str] = flag(
        None,
        "what the model predicts, for files that do not say it; none means by its files",
        choices=["epsilon", "v_prediction"],
        group="model",
    )
    zero_terminal_snr: Optional[bool] = flag(
        None,
        "the last timestep is pure noise (arXiv 2305.08891), for files that do not say it; none means by its files",
        group="model",
    )
    mixed_precision: Literal["no", "fp16", "bf16"] = flag(
        "fp16", "precision of the model on a GPU; a CPU computes in fp32", group="memory and speed", changes_a_pass=True
    )
    cache_dir: str = flag(
        CACHE_DIR,
        "where encoded images and captions, and unpacked single-file models, are kept between runs",
        type=local_path,
        group="output",
        resume="free",
    )
    dry_run: bool = flag(False, "print the resolved configuration as JSON and stop", group="trying it out")
    demo: bool = flag(
        False,
        "a small SDXL and a small data set that come with the suite: no network, minutes on a CPU",
        group="trying it out",
    )
'''

# ===================================================================================== common/cli/other_tools.py

MODULES['common/cli/other_tools.py'] = r'''
"""What diffusers, kohya's scripts, A1111 and PEFT call our flags: hints for those who come from there."""

OTHER_NAMES = {
    "learning_rate": "lr unet_lr peak_lr",
    "lora_rank": "rank r lora_r network_dim dim lora_dim",
    "lora_alpha": "alpha network_alpha",
    "lora_dropout": "dropout network_dropout",
    "lora_target_modules": "target_modules",
    "train_batch_size": "batch_size train_batch bs per_device_train_batch_size micro_batch_size",
    "gradient_accumulation_steps": "gradient_accumulation grad_accum accumulation_steps grad_accum_steps",
    "num_train_epochs": "epochs num_epochs max_train_epochs",
    "max_train_steps": "steps max_steps num_steps train_steps",
    "lr_warmup_steps": "warmup_steps warmup lr_warmup",
    "offset_noise_strength": "noise_offset offset_noise",
    "min_snr_gamma": "snr_gamma",
    "caption_dropout": "caption_dropout_rate proportion_empty_prompts",
    "aspect_ratio_buckets": "enable_bucket buckets bucketing",
    "random_flip": "flip_aug",
    "use_ema": "ema",
    "use_8bit_adam": "adam8bit optimizer_type optimizer use_8bit_adamw",
    "enable_xformers_memory_efficient_attention": "xformers",
    "mixed_precision": "fp16 bf16 precision dtype torch_dtype",
    "train_data_dir": "data_dir data train_dir image_dir instance_data_dir instance_data_root",
    "dataset_name": "dataset",
    "caption_column": "text_column",
    "pretrained_model_name_or_path": "model model_name base_model model_path pretrained_model ckpt checkpoint",
    "pretrained_vae_model_name_or_path": "vae vae_path",
    "output_dir": "output out out_dir outdir save_dir",
    "resume_from_checkpoint": "resume network_weights",
    "checkpointing_steps": "save_steps save_every_n_steps checkpoint_every",
    "checkpoints_total_limit": "save_total_limit save_last_n_steps max_checkpoints",
    "validation_steps": "sample_every_n_steps validation_epochs",
    "validation_prompt": "validation_prompts sample_prompts",
    "report_to": "log_with",
    "trigger_word": "trigger",
    "lr_scheduler": "scheduler_type lr_scheduler_type",
    "lr_num_cycles": "lr_scheduler_num_cycles num_cycles",
    "lr_power": "lr_scheduler_power",
    "adam_weight_decay": "weight_decay",
    "adam_epsilon": "eps epsilon",
    "max_grad_norm": "grad_clip gradient_clip clip_grad_norm",
    "text_encoder_lr": "text_lr text_encoder_lr1 text_encoder_learning_rate",
    "shuffle_tags": "shuffle_caption shuffle_captions",
    "tag_dropout": "caption_tag_dropout_rate",
    "text_cache": "cache_text_encoder_outputs cache_text_encoder_outputs_to_disk",
    "quantize": "load_in_4bit quantization base_model_precision",
    "prediction_type": "v_parameterization v_pred",
    "image_column": "img_column",
    "max_train_samples": "max_samples num_samples",
    "max_vram_gb": "vram",
    "validation_split": "val_split validation_ratio eval_split",
    "lora": "lora_weights lora_path lora_model adapter adapter_path network_weights",
    "lora_scale": "lora_weight multiplier network_mul",
    "prompt": "prompts",
    "negative_prompt": "negative",
    "steps": "num_inference_steps inference_steps sampling_steps",
    "guidance_scale": "guidance cfg cfg_scale scale",
    "guidance_rescale": "cfg_rescale",
    "num_images": "num_images_per_prompt num_samples n_samples n_iter images_per_prompt batch_count",
    "scheduler": "sampler sampler_name",
    "image": "init_image input_image",
    "strength": "denoising_strength",
    "resolution": "size width height image_size",
}


def our_name(theirs: str, known: set[str]) -> str | None:
    """What another tool's flag is called here; None where no flag of `known` is meant.

    Args:
        theirs: without dashes before it, and with underscores in it.
    """
    return next((ours for ours, names in OTHER_NAMES.items() if theirs in names.split() and ours in known), None)
'''

# ========================================================================================= common/cli/running.py

MODULES['common/cli/running.py'] = r'''
"""`run()` calls a script's main, and says in one line how it ended where it did not end well."""

import contextlib
import dataclasses
import errno
import os
import shlex
import signal
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterator
from typing import Any

from common import errors
from common.errors import UserError, one_line
from common.system import launch, stopping

# What a training's "ended" says when there is nothing to go on with.
GONE_TO_THE_END = (None, "finished", "early stopping")
DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM)


def run(main: Callable[[], Any]) -> Any:
    """Call a script's main -> its result. A UserError becomes one line on stderr and exit status 2.

    So do a full disk and a full GPU. A signal outside of the training loop is one line and exit status 128 + its
    number: 130 after Ctrl-C. Any other error is one line and 1, with its traceback in a file. A training that a signal
    or the time limit has ended names as its last line the command that goes on. A reader of stdout who leaves
    (`| head`) does not end the run; without one for stderr either, it saves and ends.
    """
    stopping.end_in_order()
    with _outliving_its_reader():
        try:
            result = main()
        except (KeyboardInterrupt, Exception) as error:
            said, status = _told(error)
        else:
            if isinstance(result, dict) and result.get("ended") not in GONE_TO_THE_END and launch.rank() == 0:
                print(f"to go on: {launch.resuming_command(sys.argv)}", flush=True)
            launch.leave_group()
            return result
    if launch.rank() == 0 or status in (1, 2):
        launch.say_last(said)
    sys.exit(status)


def _told(error: BaseException) -> tuple[str, int]:
    """(what is said, the exit status) of an error that ends a script."""
    if isinstance(error, KeyboardInterrupt):
        number = error.args[0] if error.args else signal.SIGINT
        return stopping.ended_by(number), 128 + number
    if isinstance(error, UserError):
        return f"error: {error}", 2
    if isinstance(error, OSError) and error.errno in DISK_ERRORS:
        return f"error: {one_line(str(error))}: make room there, or name another place", 2
    if errors.ran_out(error):
        return f"error: {errors.OutOfMemory('while loading')}", 2
    return _unforeseen(error), 1


def _unforeseen(error: Exception) -> str:
    """The line for an error that no check has foreseen.

    Its traceback is written to the output folder, or where that is not there to a temporary one.
    """
    # The first frames are main's, whose `flags` name the output folder.
    locals_of = [frame.f_locals.get("flags") for frame, _ in traceback.walk_tb(error.__traceback__)]
    output_dir = next((vars(flags).get("output_dir") for flags in locals_of if dataclasses.is_dataclass(flags)), None)
    place = output_dir if output_dir and os.path.isdir(output_dir) else None
    try:
        descriptor, file = tempfile.mkstemp(prefix="error_", suffix=".txt", dir=place)
    except OSError:  # the folder itself may be at fault
        descriptor, file = tempfile.mkstemp(prefix="error_", suffix=".txt")

    with open(descriptor, "w") as report:
        report.write(f"{shlex.join(sys.argv)}\nPython {sys.version}\n\n{''.join(traceback.format_exception(error))}")
    what = f"{type(error).__name__}: {one_line(str(error))}"
    return f"error: unforeseen {what}; the traceback is in {file}, please report it with that file"


class _Outlet:
    """Standard output or error whose reader may leave: what is still written goes nowhere."""

    def __init__(self, stream):
        self._stream = stream

    def write(self, text):
        with self._to_nowhere_if_closed():
            return self._stream.write(text)

    def flush(self):
        with self._to_nowhere_if_closed():
            self._stream.flush()

    @contextlib.contextmanager
    def _to_nowhere_if_closed(self):
        try:
            yield
        except BrokenPipeError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), self._stream.fileno())
            if self._stream.fileno() == 2:  # nobody is left to hear of faults: save and end, as a killed notebook wants
                os.kill(os.getpid(), signal.SIGTERM)

    def __getattr__(self, name):
        return getattr(self._stream, name)


@contextlib.contextmanager
def _outliving_its_reader() -> Iterator[None]:
    with contextlib.redirect_stdout(_Outlet(sys.stdout)), contextlib.redirect_stderr(_Outlet(sys.stderr)):
        try:
            yield
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
'''

# ======================================================================================= common/data/__init__.py

MODULES['common/data/__init__.py'] = r'''
"""Pictures and captions -> Batch: reading, framing, encoding once, the cache."""
'''

# ======================================================================================= common/data/batching.py

MODULES['common/data/batching.py'] = r'''
"""Which sample comes when, with which noise: cached entries + (seed, step, index) -> Batch.

The trajectory is a function of the seed alone. It does not depend on how an effective batch is cut into forward passes,
on the number of processes, or on where a run was interrupted.
"""

from dataclasses import dataclass, replace
from functools import lru_cache

import torch

from common.data import framing
from common.data.caching import CachedText, LatentCache, LiveText
from common.data.captions import CaptionOptions
from common.model import noise

VALIDATION_DRAWS = 4  # timesteps per held-out sample, spread evenly over the schedule


@dataclass(frozen=True)
class Batch:
    """Examples of one shape, ready for a forward pass. Every tensor starts with B; latents are [B, C, h, w].

    `tensors`: mean, std, posterior_eps, eps, t, time_ids [B, 6], weight [B] (each example's share of the step's loss),
    keep_text [B] (0 where the caption is dropped), and what the text conditioning needs.
    """

    tensors: dict[str, torch.Tensor]
    names: list[str]

    def __len__(self) -> int:
        return len(self.names)


@lru_cache(maxsize=2)
def _epoch_order(seed, epoch, count):
    return torch.randperm(count, generator=noise.generator_for(seed, "epoch", epoch)).tolist()


def sample_at(position: int, count: int, seed: int) -> int:
    """Index of the sample at `position` of an endless sequence of epochs, each a fresh permutation."""
    epoch, offset = divmod(position, count)
    return _epoch_order(seed, epoch, count)[offset]


class Examples:
    """Training examples by number.

    Args:
        captions: from a sample's caption to the texts that are trained.
        num_timesteps: length T of the noise schedule.
        zero_unconditional: the model's unconditional input is zeros (SDXL base), not the encoded empty prompt.
    """

    def __init__(
        self,
        latents: LatentCache,
        text: CachedText | LiveText,
        *,
        seed: int,
        num_timesteps: int,
        captions: CaptionOptions,
        flip_share: float = 0.0,
        drop_share: float = 0.0,
        offset_strength: float = 0.0,
        zero_unconditional: bool = True,
    ) -> None:
        self.latents = latents
        self.text = text
        self.seed = seed
        self.num_timesteps = num_timesteps
        self.captions = captions
        self.occurrences = [index for index, sample in enumerate(latents.samples) for _ in range(sample.repeats)]
        self.draw_options = dict(flip_share=flip_share, drop_share=drop_share, offset_strength=offset_strength)
        self.zero_unconditional = zero_unconditional

    def __len__(self) -> int:
        """Examples of an epoch: the samples, each as often as it is repeated."""
        return len(self.occurrences)

    def effective_batch(self, number: int, size: int, micro_size: int, rank: int = 0, world: int = 1) -> list[Batch]:
        """This process's share of effective batch `number`: Batches of at most `micro_size` examples of one shape."""
        rows = [self._training_row(number, i, size) for i in range(rank, size, world)]
        return _group(rows, micro_size)

    def validation_batches(self, micro_size: int, rank: int = 0, world: int = 1) -> list[Batch]:
        """Every sample at VALIDATION_DRAWS fixed timesteps with fixed noise, caption kept, not flipped."""
        rows = [self._validation_row(number) for number in range(rank, len(self.latents) * VALIDATION_DRAWS, world)]
        return _group(rows, micro_size)

    def probes(self, timesteps: list[int]) -> list[Batch]:
        """Batches of one example: one sample after the other at the `timesteps` given, in one of its training texts.

        Noise is fixed, the picture not flipped.
        """
        rows = []
        for number, t in enumerate(timesteps):
            index = number % len(self.latents)
            caption = self.captions.variant(self.latents.samples[index].caption, 0)
            rows.append(self._fixed_row(index, t, caption, "probe", number))
        return _group(rows, 1)

    def name_at(self, position: int) -> str:
        """Name of the sample at `position` of the run, for messages."""
        return self.latents.samples[self.occurrences[sample_at(position, len(self), self.seed)]].name

    def _training_row(self, number, i, size):
        position = number * size + i
        occurrence = sample_at(position, len(self), self.seed)
        index = self.occurrences[occurrence]
        generator = noise.generator_for(self.seed, number, i)
        draws = noise.draw(generator, self.latents.shape(index), self.num_timesteps, **self.draw_options)
        caption = self._drawn_caption(self.latents.samples[index].caption, position // len(self), occurrence)
        return self._row(index, draws, caption, weight=1 / size)

    def _drawn_caption(self, caption, epoch, occurrence):
        """The variant that this occurrence of a sample has in this epoch."""
        number = 0
        if self.captions.count > 1:
            generator = noise.generator_for(self.seed, "caption", epoch, occurrence)
            number = int(torch.randint(self.captions.count, (), generator=generator))
        return self.captions.variant(caption, number)

    def _validation_row(self, number):
        index, part = divmod(number, VALIDATION_DRAWS)
        t = int((part + (index + 0.5) / len(self.latents)) / VALIDATION_DRAWS * self.num_timesteps)
        caption = self.captions.plain(self.latents.samples[index].caption)
        return self._fixed_row(index, t, caption, "validation", part)

    def _fixed_row(self, index, t, caption, purpose, number):
        """A sample at timestep t, caption kept, not flipped, with noise that is the same in every run."""
        # Not from the run's seed: the losses of runs with several seeds are to be compared
        generator = noise.generator_for(purpose, self.latents.samples[index].key, number)
        draws = noise.draw(generator, self.latents.shape(index), self.num_timesteps)
        fixed = replace(draws, flip=False, drop_caption=False, timestep=t)
        return self._row(index, fixed, caption, weight=1.0)

    def _row(self, index, draws, caption, weight):
        """(name, {field: tensor}) of one example."""
        sample = self.latents.samples[index]
        mean, std = self.latents.moments(index, draws.flip)
        caption = "" if draws.drop_caption and not self.zero_unconditional else caption
        keep = 0.0 if draws.drop_caption and self.zero_unconditional else 1.0
        return sample.name, dict(
            mean=mean,
            std=std,
            posterior_eps=draws.posterior_eps,
            eps=draws.eps,
            t=torch.tensor(draws.timestep),
            time_ids=framing.time_ids(sample, self.latents.framings[index], draws.flip),
            weight=torch.tensor(weight),
            keep_text=torch.tensor(keep),
            **self.text.fields(caption),
        )


def _group(rows, micro_size):
    """Rows -> Batches of one shape each, in order of first appearance, none larger than `micro_size`."""
    by_shape = {}
    for name, fields in rows:
        by_shape.setdefault(fields["mean"].shape, []).append((name, fields))
    parts = [group[i : i + micro_size] for group in by_shape.values() for i in range(0, len(group), micro_size)]
    return [_stack(part) for part in parts]


def _stack(rows):
    """Rows of one shape -> Batch; pinned, so that the GPU can fetch it unaided."""
    names, fields = zip(*rows)
    tensors = {key: torch.stack([row[key] for row in fields]) for key in fields[0]}
    if torch.cuda.is_available():
        tensors = {key: tensor.pin_memory() for key, tensor in tensors.items()}
    return Batch(tensors, list(names))
'''

# ======================================================================================== common/data/caching.py

MODULES['common/data/caching.py'] = r'''
"""Everything frozen is computed once: Samples -> latent moments and text embeddings, keyed by content.

A key is a hash of all that made the entry: a changed image or caption is a new entry, a stale one cannot be found.
"""

import collections
import concurrent.futures
import contextlib
import hashlib
import os
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from tqdm import tqdm

from common.cli.hub import FP16_VAE
from common.data import dataset, encoding, framing
from common.data.dataset import Sample
from common.data.pairs import fault, or_fault
from common.data.store import Store
from common.errors import UserError
from common.model import device, loading

# Raise them when the same inputs give other numbers: old entries are then never found.
LATENTS_VERSION = 2  # 2: colour profiles are converted to sRGB, thin pictures cropped before they are resized
TEXT_VERSION = 1
LATENT_CHANNELS, PIXELS_PER_LATENT = 4, 8
VAE_PIXELS = 1024 * 1024  # encoded at once: one picture of 1024 px, four of 512
TEXT_BATCH = 32


def content_key(*parts) -> str:
    """Hash of the repr of `parts`, as 32 hex digits."""
    return hashlib.blake2b(repr(parts).encode(), digest_size=16).hexdigest()


# ---------------------------------------------------------------- images


def cache_latents(
    samples: list[Sample],
    model: loading.Model,
    *,
    host: device.Host,
    cache_dir: Path | str,
    max_bad: int,
    flips: tuple[bool, ...] = (False,),
    bad_before: int = 0,
    **options,
) -> "LatentCache":
    """Encode the pictures that are not in the cache yet -> LatentCache over the samples that could be read.

    Args:
        flips: (False,) or (False, True): which mirror images are needed.
        bad_before: unreadable pictures that were counted already.
        options: arguments of `framing.frame`.
    Raises:
        UserError: more than `max_bad` pictures cannot be decoded, or the VAE gives non-finite latents.
    """
    # What is needed, and what of it is missing
    made_by = content_key("latents", LATENTS_VERSION, loading.fingerprint(model.variant, model.vae), str(host.dtype))
    store = Store(Path(cache_dir) / "latents" / made_by)
    framings = [framing.frame(sample, **options) for sample in samples]
    wanted = {_latent_key(s, f, flip): (s, f, flip) for s, f in zip(samples, framings) for flip in flips}
    store.drop_damaged(wanted)
    missing = [job for key, job in wanted.items() if key not in store]

    # Every process shares out the same list, before any of them adds to the store
    host.barrier()
    mine = missing[host.rank :: host.world]
    bad = dict(host.gather(_encode_images(mine, store, model, host) if missing else []))
    host.barrier()
    store.reload()

    # Without those that cannot be decoded
    dataset.refuse_bad(list(bad.values()), max_bad, bad_before, host.say)
    kept = [(s, f) for s, f in zip(samples, framings) if s.key not in bad]
    if any(_latent_key(s, f, flip) not in store for s, f in kept for flip in flips):
        raise UserError(
            f"--cache_dir {cache_dir}: entries were removed while they were being made; run the command again"
        )
    host.say(f"latents: {len(wanted)} in the cache, {len(missing)} of them new ({store.folder})")
    if not kept:
        raise UserError("none of the images could be decoded")
    return LatentCache([s for s, _ in kept], [f for _, f in kept], store)


@dataclass(frozen=True)
class LatentCache:
    """The samples of a run with their framing and their latent moments."""

    samples: list[Sample]
    framings: list[framing.Framing]
    store: Store

    def __len__(self) -> int:
        return len(self.samples)

    def shape(self, index: int) -> tuple[int, int, int]:
        """(C, h, w) of a sample's latent, flipped or not: SDXL's VAE halves the sides of a picture three times."""
        framed = self.framings[index]
        return LATENT_CHANNELS, framed.height // PIXELS_PER_LATENT, framed.width // PIXELS_PER_LATENT

    def moments(self, index: int, flip: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
        """(mean, std), each [C, h, w], normalised: z = mean + std * eps is what the UNet is trained on."""
        return self.store[_latent_key(self.samples[index], self.framings[index], flip)]

    def subset(self, samples: list[Sample]) -> "LatentCache":
        """The same cache, restricted to `samples`."""
        wanted = {id(sample) for sample in samples}
        kept = [i for i, sample in enumerate(self.samples) if id(sample) in wanted]
        return replace(self, samples=[self.samples[i] for i in kept], framings=[self.framings[i] for i in kept])


def _latent_key(sample, framing, flip):
    return content_key(sample.key, framing, flip)


def _encode_images(jobs, store, model, host):
    """Fill `store` with the moments of the jobs -> [(sample key, what is wrong)] of what cannot be decoded."""
    encoder = encoding.ImageEncoder(model, host)
    bad = []
    bar = tqdm(total=len(jobs), desc="encoding images", unit="img", disable=not host.is_main)
    with bar, contextlib.ExitStack() as at_exit:
        at_exit.callback(store.flush)  # an interrupted encode goes on from here

        # Batches of one shape, each encoded as soon as it is full
        batches = collections.defaultdict(list)
        for job, image in _decoded(jobs):
            bar.update()
            if isinstance(image, Exception):
                sample = job[0]
                bad.append((sample.key, f"{sample.name} ({fault(image)})"))
                continue
            batch = batches[image.shape]
            batch.append((job, image))
            if (len(batch) + 1) * image[0].numel() > VAE_PIXELS:
                _encode_batch(batches.pop(image.shape), store, encoder, host)

        # What is left over
        for batch in batches.values():
            _encode_batch(batch, store, encoder, host)
    del encoder
    device.free_memory(host.device)
    return bad


def _decoded(jobs):
    """Yield (job, pixels or the exception), decoding a few pictures ahead on every core."""
    workers = os.cpu_count() or 1

    def decode(job):
        return or_fault(lambda: framing.pixels(*job))

    with concurrent.futures.ThreadPoolExecutor(workers) as pool:
        ahead = collections.deque()
        for job in jobs:
            ahead.append((job, pool.submit(decode, job)))
            if len(ahead) > 2 * workers:
                done, future = ahead.popleft()
                yield done, future.result()
        while ahead:
            done, future = ahead.popleft()
            yield done, future.result()


def _encode_batch(batch, store, encoder, host):
    mean, std = encoder([image for _, image in batch])
    mean, std = mean.to(host.dtype), std.to(host.dtype)
    for (job, _), m, s in zip(batch, mean, std):
        if not (m.isfinite().all() and s.isfinite().all()):
            raise UserError(
                f"{job[0].name}: the VAE gives non-finite latents in {encoder.dtype_name};"
                f" use --pretrained_vae_model_name_or_path {FP16_VAE}"
            )
        store[_latent_key(*job)] = (m, s)


# ---------------------------------------------------------------- captions


class CachedText:
    """Captions whose embeddings were computed once. A batch carries the embeddings."""

    encoders = ()  # none stay on the device

    def __init__(self, store: Store) -> None:
        self.store = store

    def fields(self, caption: str) -> dict[str, torch.Tensor]:
        """What one example's batch row carries: prompt_embeds [77, 2048] and pooled [1280]."""
        prompt_embeds, pooled = self.store[content_key(caption)]
        return {"prompt_embeds": prompt_embeds, "pooled": pooled}

    def __call__(self, fields: dict[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        """(prompt_embeds [B, 77, 2048], pooled [B, 1280]) on the device."""
        return fields["prompt_embeds"], fields["pooled"]


class LiveText:
    """Captions that are encoded in every step, by encoders that stay on the device. A batch carries token ids."""

    def __init__(self, pairs: list[tuple]) -> None:
        self.tokenizers, self.encoders = zip(*pairs)

    def fields(self, caption: str) -> dict[str, torch.Tensor]:
        """What one example's batch row carries: input_ids [2, 77]."""
        return {"input_ids": encoding.tokenize(self.tokenizers, [caption])[0]}

    def __call__(self, fields: dict[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        """(prompt_embeds [B, 77, 2048], pooled [B, 1280]) on the device."""
        return encoding.encode_text(self.encoders, fields["input_ids"])


def cache_text(
    captions: list[str], model: loading.Model, *, host: device.Host, mode: str, cache_dir: Path | str
) -> CachedText | LiveText:
    """Text conditioning for `captions`: CachedText in RAM ("ram") or on disk ("disk"), or LiveText ("none")."""
    if mode == "none":
        return LiveText(loading.load_text_encoders(model, host))

    # What is needed, and what of it is missing
    parts = [model.folder / name for name in ("text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2")]
    made_by = content_key("text", TEXT_VERSION, loading.fingerprint(model.variant, *parts), str(host.dtype))
    store = Store(Path(cache_dir) / "text" / made_by if mode == "disk" else None)
    store.drop_damaged(content_key(caption) for caption in captions)
    distinct = list(dict.fromkeys(captions))
    missing = [caption for caption in distinct if content_key(caption) not in store]

    # On disk it is shared out, as the images are; each process has its own RAM
    host.barrier()
    mine = missing[host.rank :: host.world] if mode == "disk" else missing
    if missing:
        _encode_captions(mine, store, model, host)
    host.barrier()
    store.reload()
    where = store.folder or "kept in RAM"
    host.say(f"text: {len(distinct)} distinct captions, {len(missing)} of them encoded now ({where})")
    return CachedText(store)


def _encode_captions(captions, store, model, host):
    encoder = encoding.CaptionEncoder(model, host)
    if cut := sum(len(encoder.tokenizers[0](caption).input_ids) > encoding.MAX_TOKENS for caption in captions):
        host.say(f"text: {cut} captions are longer than {encoding.MAX_TOKENS} tokens; what follows is not seen")
    with contextlib.ExitStack() as at_exit:
        at_exit.callback(store.flush)
        for start in tqdm(range(0, len(captions), TEXT_BATCH), desc="encoding captions", disable=not host.is_main):
            batch = captions[start : start + TEXT_BATCH]
            prompt_embeds, pooled = encoder(batch)
            for caption, p, q in zip(batch, prompt_embeds.to(host.dtype), pooled.to(host.dtype)):
                store[content_key(caption)] = (p, q)
    del encoder
    device.free_memory(host.device)
'''

# ======================================================================================= common/data/captions.py

MODULES['common/data/captions.py'] = r'''
"""A sample's own caption -> the texts that are trained: trigger word, prefix and suffix, tags shuffled and dropped.

Tags are drawn as a few variants of each caption, numbered from 0, so that their embeddings can be cached. A variant is
a function of the caption, its number and the options alone: runs with other seeds find the same texts in the cache.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from common.cli.flags import TrainFlags
from common.data.dataset import Sample
from common.data.pairs import few
from common.model.noise import generator_for


@dataclass(frozen=True)
class CaptionOptions:
    """What is put around a caption, and what is done to its tags, the parts between its commas.

    Args:
        keep_tags: this many first tags stay in place and are never dropped.
        tag_dropout: share of the other tags that a variant lacks.
        variants: how many texts a caption has where tags are shuffled or dropped.
    """

    trigger_word: str | None = None
    prefix: str | None = None
    suffix: str | None = None
    shuffle_tags: bool = False
    keep_tags: int = 0
    tag_dropout: float = 0.0
    variants: int = 1

    @property
    def count(self) -> int:
        """Variants of one caption: 1 where nothing is drawn."""
        return self.variants if self.shuffle_tags or self.tag_dropout else 1

    def plain(self, caption: str) -> str:
        """The text that is validated: every tag in its place."""
        return compose(caption, self)

    def variant(self, caption: str, number: int) -> str:
        """One of the `count` texts that are trained."""
        draws = self.shuffle_tags or self.tag_dropout
        return compose(caption, self, generator_for("caption variant", caption, number) if draws else None)


def options_of(flags: TrainFlags) -> CaptionOptions:
    """What a trainer's flags say about captions."""
    return CaptionOptions(
        trigger_word=flags.trigger_word,
        prefix=flags.caption_prefix,
        suffix=flags.caption_suffix,
        shuffle_tags=flags.shuffle_tags,
        keep_tags=flags.keep_tokens,
        tag_dropout=flags.tag_dropout,
        variants=flags.caption_variants,
    )


def texts(samples: list[Sample], held_out: list[Sample], options: CaptionOptions) -> Iterator[str]:
    """Every text that the training of `samples` can ask for, and the validation of those that are `held_out`."""
    validated = {sample.key for sample in held_out}
    for sample in samples:
        if sample.key in validated:
            yield options.plain(sample.caption)
        else:
            yield from (options.variant(sample.caption, number) for number in range(options.count))


def summary(samples: list[Sample], bad: int, options: CaptionOptions) -> str:
    """How many pictures were read; the first without a caption are named, since they may be masks or outputs."""
    empty = [sample.name for sample in samples if not sample.caption]
    epoch = sum(sample.repeats for sample in samples)
    repeated = f" ({epoch} examples an epoch)" if epoch > len(samples) else ""
    trained_as = f"the caption {options.plain('')!r}" if options.plain("") else "the empty prompt"
    named = f": {few(empty)}" if empty else ""
    uncaptioned = f"{len(empty)} with an empty caption (trained as {trained_as}){named}"
    return f"data: {len(samples)} images{repeated}, {bad} unreadable, {uncaptioned}"


def compose(caption: str, options: CaptionOptions, generator: torch.Generator | None = None) -> str:
    """prefix, trigger word, caption, suffix: those that are not empty, joined by a comma and a space.

    Without a generator the caption stays as it is written. With one it is cut at its commas into tags, and empty tags
    are left out. The first `keep_tags` stay. Each of the others is dropped with the probability `tag_dropout`, and
    those that remain are put into a random order with `shuffle_tags`. Both draws are made whatever is switched on, so
    that switching one on leaves the other alone.
    """
    body = [caption] if generator is None else _drawn_tags(caption, options, generator)
    parts = [options.prefix, options.trigger_word, *body, options.suffix]
    return ", ".join(part.strip() for part in parts if part and part.strip())


def _drawn_tags(caption, options, generator):
    tags = [tag.strip() for tag in caption.split(",") if tag.strip()]
    kept = tags[: options.keep_tags]
    others = tags[options.keep_tags :]
    shares = torch.rand(len(others), generator=generator).tolist()
    shuffled = torch.randperm(len(others), generator=generator).tolist()
    order = shuffled if options.shuffle_tags else range(len(others))
    return kept + [others[i] for i in order if shares[i] >= options.tag_dropout]
'''

# ======================================================================================== common/data/dataset.py

MODULES['common/data/dataset.py'] = r'''
"""Pairs of sources.py -> Samples: every picture measured, the unreadable counted; and which Samples are held out."""

import functools
import hashlib
from collections.abc import Callable
from dataclasses import KW_ONLY, dataclass

from common.data import decoding
from common.data.pairs import Pair, fault, few, or_fault
from common.data.sources import read_pairs
from common.errors import UserError


@dataclass(frozen=True)
class Sample:
    """One training pair, which an epoch shows `repeats` times.

    `key` is a hash of the file's bytes; width and height are those of the upright picture, in pixels.
    """

    name: str
    key: str
    _: KW_ONLY
    caption: str
    width: int
    height: int
    read: Callable[[], bytes]
    repeats: int = 1


def load_samples(
    dataset_name: str,
    folders: list[str],
    *,
    image_column: str,
    caption_column: str,
    max_samples: int | None = None,
    max_bad: int = 0,
    say: Callable[[str], None] = print,
) -> tuple[list[Sample], int]:
    """All readable samples of some folders, or of a hub data set where none is named, and a count of what was skipped.

    Args:
        folders: values of --train_data_dir.
        say: takes one line for everything that is left out, or not as it seems.
    Returns:
        (samples, bad): a list of Sample, and the number of unreadable images.
    Raises:
        UserError: no such data, no captions, or more than `max_bad` unreadable images.
    """
    pairs = read_pairs(dataset_name, folders, image_column=image_column, caption_column=caption_column, say=say)
    odd_profiles = []
    found = [(pair, or_fault(functools.partial(_measured, pair, odd_profiles))) for pair in pairs[:max_samples]]
    samples = [sample for _, sample in found if isinstance(sample, Sample)]
    bad = [f"{pair.name} ({fault(error)})" for pair, error in found if isinstance(error, Exception)]

    # what cannot be trained on
    refuse_bad(bad, max_bad, say=say)
    if odd_profiles:
        say(f"data: taken as sRGB, the colour profile cannot be used: {len(odd_profiles)} ({few(odd_profiles)})")
    if not samples:
        source = " ".join(folders) or dataset_name
        found = f"none of its {len(bad)} images can be read, e.g. {bad[0]}" if bad else "holds no image"
        raise UserError(f"{source}: {found}")
    return samples, len(bad)


def refuse_bad(bad: list[str], max_bad: int, before: int = 0, say: Callable[[str], None] = print) -> None:
    """Name unreadable images; more than `max_bad` of them, counting those found `before`, are a UserError."""
    if bad and before + len(bad) > max_bad:
        more = f" and {len(bad) - 1} more" if len(bad) > 1 else ""
        allowed = f"--max_bad_images {before + len(bad)}"
        raise UserError(f"unreadable image {bad[0]}{more}: repair or remove it, or allow it with {allowed}")
    for name in bad:
        say(f"skipped unreadable image {name}")


def _measured(pair: Pair, odd_profiles: list[str]) -> Sample:
    """The Sample of a pair; a colour profile that cannot be used puts its name on the list."""
    data = pair.read()
    measured = decoding.measure(data)
    if not measured.profile_is_usable:
        odd_profiles.append(pair.name)
    key = hashlib.blake2b(data, digest_size=16).hexdigest()
    size = dict(width=measured.width, height=measured.height)
    caption = (pair.caption or "").strip()
    return Sample(pair.name, key, caption=caption, **size, read=pair.read, repeats=pair.repeats)


def hold_out(samples: list[Sample], share: float) -> tuple[list[Sample], list[Sample]]:
    """Split off a `share` of the samples (at least one when share > 0) -> (training, held out).

    Chosen by content, so that runs with other seeds, and on data that has grown, are measured on the same pictures.
    Equal pictures are never on both sides.
    """
    if not share:
        return samples, []
    different = {sample.key for sample in samples}
    keys = sorted(different, key=lambda key: hashlib.blake2b(f"held out {key}".encode()).digest())
    count = max(1, round(len(keys) * share))
    if count >= len(keys):
        raise UserError(f"--validation_split {share}: leaves none of the {len(keys)} different pictures to train on")
    held_out = set(keys[:count])
    training = [sample for sample in samples if sample.key not in held_out]
    return training, [sample for sample in samples if sample.key in held_out]
'''

# ======================================================================================= common/data/decoding.py

MODULES['common/data/decoding.py'] = r'''
"""The bytes of a picture file -> its size and its pixels: upright, in sRGB, without transparency.

Size and pixels come from the same opened file and the same orientation, so that they cannot disagree.
"""

import functools
import io
import struct
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageCms

ORIENTATION = 0x0112  # EXIF and TIFF
_TURN = Image.Transpose
_TURNS = {
    2: _TURN.FLIP_LEFT_RIGHT,
    3: _TURN.ROTATE_180,
    4: _TURN.FLIP_TOP_BOTTOM,
    5: _TURN.TRANSPOSE,
    6: _TURN.ROTATE_270,
    7: _TURN.TRANSVERSE,
    8: _TURN.ROTATE_90,
}
_PROFILE_MODES = {"RGB": "RGB", "GRAY": "L", "CMYK": "CMYK", "Lab": "LAB"}  # colour space of a profile -> Pillow's mode
_BEHIND_PIXELS = (b"Raw profile type exif", b"XML:com.adobe.xmp")  # PNG texts that may hold an orientation


class Measured(NamedTuple):
    """What a header says. Sizes are those of the upright picture, in pixels."""

    width: int
    height: int
    profile_is_usable: bool  # True where there is none


def measure(data: bytes) -> Measured:
    """Size of a picture, from its header wherever that is enough.

    Raises:
        Exception: whatever Pillow raises for a file it cannot open.
    """
    image, orientation = _open(data)
    with image:
        width, height = image.size
        turned_by_pillow = image.format == "TIFF" and ORIENTATION in image.tag_v2  # its size is upright already
        if orientation >= 5 and not turned_by_pillow:
            width, height = height, width
        try:
            _profile_of(image)
        except ValueError:
            return Measured(width, height, False)
    return Measured(width, height, True)


def decode(data: bytes) -> Image.Image:
    """The upright picture in sRGB, transparency laid over white: mode RGB.

    A colour profile that cannot be used is taken for sRGB.

    Raises:
        Exception: whatever Pillow raises for a file it cannot decode.
    """
    image, orientation = _open(data)
    with image:
        image.load()
        turn = None if image.format == "TIFF" else _TURNS.get(orientation)  # Pillow turns TIFF while it loads
        try:
            profile = _profile_of(image)
        except ValueError:
            profile = None
        return _to_rgb(image if turn is None else image.transpose(turn), profile)


# ---------------------------------------------------------------- orientation


def _open(data):
    """(the opened image, its orientation 1 to 8); pixels are decoded only where the orientation stands behind them."""
    image = Image.open(io.BytesIO(data))
    if image.format == "PNG" and _has_orientation_behind_pixels(data):
        image.load()
    return image, _orientation(image)


def _orientation(image):
    """EXIF's or XMP's orientation; 1, as stored, where it says nothing that has a meaning."""
    try:
        value = Image.Image.getexif(image).get(ORIENTATION, 1)  # PngImageFile's own decodes the whole picture first
    except MemoryError:
        raise
    except Exception:  # a damaged note on a sound picture: struct.error, TypeError, ValueError and more
        return 1
    return int(value) if value in range(1, 9) else 1


def _has_orientation_behind_pixels(data):
    """Whether a PNG has EXIF or XMP after its first IDAT chunk, where reading the header does not come."""
    start = 8
    after_pixels = False
    while start + 8 <= len(data):
        length, kind = struct.unpack_from(">I4s", data, start)
        holds_text = kind in (b"tEXt", b"zTXt", b"iTXt") and data[start + 8 : start + 40].startswith(_BEHIND_PIXELS)
        if after_pixels and (kind == b"eXIf" or holds_text):
            return True
        after_pixels = after_pixels or kind == b"IDAT"
        start += 12 + length
    return False


# ---------------------------------------------------------------- colour


def _to_rgb(image, profile):
    image = _eight_bits(image)
    if not image.has_transparency_data:
        return _in_srgb(image, profile)
    with_alpha = image.convert("RGBA")
    colours = with_alpha.getchannel("R") if _family(image.mode) == "L" else with_alpha.convert("RGB")
    converted = _in_srgb(colours, profile)
    converted.putalpha(with_alpha.getchannel("A"))
    return Image.alpha_composite(Image.new("RGBA", image.size, "white"), converted).convert("RGB")


def _eight_bits(image):
    if not (image.mode.startswith("I") or image.mode == "F"):
        return image
    white = 1.0 if image.mode == "F" else 65535.0  # Pillow's own conversion of 16-bit grey clips it to white
    return Image.fromarray((np.asarray(image, dtype=np.float32) / white * 255).clip(0, 255).astype(np.uint8))


def _in_srgb(image, profile):
    """An image without transparency, mode 1, L, P, RGB, CMYK, LAB ... -> RGB."""
    mode, transform = profile or (None, None)
    if image.mode == "LAB" and transform is None:
        lab = ImageCms.createProfile("LAB")
        srgb = ImageCms.createProfile("sRGB")
        return ImageCms.profileToProfile(image, lab, srgb, outputMode="RGB")
    if transform is None:
        return image.convert("RGB")
    return ImageCms.applyTransform(image.convert(mode), transform)


def _family(mode):
    """The kind of colours that an image of Pillow's `mode` holds: L, RGB, CMYK or LAB."""
    if mode in ("CMYK", "LAB"):
        return mode
    return "L" if mode[0] in "1LIF" else "RGB"


def _profile_of(image):
    """(mode, transform) of an image's colour profile, see `_transform`; None where it has none.

    Raises:
        ValueError: the profile is damaged, or one for other colours than the image's.
    """
    profile = image.info.get("icc_profile")
    return _transform(profile, _family(image.mode)) if profile else None


@functools.lru_cache(maxsize=64)
def _transform(profile, family):
    """(mode the image must have, transform to sRGB); the transform is None for a profile that says sRGB anyway."""
    try:
        source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        mode = _PROFILE_MODES.get(source.profile.xcolor_space.strip())
        if mode != family and (family, mode) != ("L", "RGB"):  # grey pictures may carry the profile of a display
            raise ValueError(f"a profile of {source.profile.xcolor_space.strip()} colours in a picture of {family}")
        transform = ImageCms.buildTransform(source, ImageCms.createProfile("sRGB"), mode, "RGB")
    except (ImageCms.PyCMSError, OSError, TypeError, AttributeError) as error:
        raise ValueError(f"the colour profile cannot be used ({error})") from None
    return mode, None if _changes_nothing(transform, mode) else transform


def _changes_nothing(transform, mode):
    """Whether a transform moves no colour of a 9 x 9 x 9 lattice by more than 1 of 255, which is rounding."""
    if mode not in ("RGB", "L"):
        return False
    steps = np.linspace(0, 255, 9).astype(np.uint8)
    lattice = np.stack(np.meshgrid(steps, steps, steps), axis=-1).reshape(27, 27, 3)
    colours = Image.fromarray(lattice).convert(mode)
    moved = np.asarray(ImageCms.applyTransform(colours, transform)).astype(int) - np.asarray(colours.convert("RGB"))
    return np.abs(moved).max() <= 1
'''

# ======================================================================================= common/data/encoding.py

MODULES['common/data/encoding.py'] = r'''
"""Pictures -> latent moments, captions -> text conditioning; in leaner ways where GPU memory runs out."""

import functools
from collections.abc import Sequence

import torch

from common.model import loading
from common.model.device import Host
from common.model.memory import StepDown

MAX_TOKENS = 77


# ---------------------------------------------------------------- images


class ImageEncoder:
    """Pictures -> normalised latent moments, by the VAE on the device.

    Where memory runs out, pictures go through one at a time, then on the CPU.
    """

    def __init__(self, model: loading.Model, host: Host) -> None:
        ways = {"on the GPU": host, "it works on the CPU, slowly,": host.on_cpu()}
        load = {way: functools.partial(loading.load_vae, model, place) for way, place in ways.items()}
        self._vae = StepDown("while loading the VAE", load, host)()
        ways = {
            "together": self._moments,
            "one at a time": self._one_by_one,
            "one at a time on the CPU, which is slow,": self._one_by_one_on_cpu,
        }
        self._encode = StepDown("while encoding images", ways, host)

    @property
    def dtype_name(self) -> str:
        return str(self._vae.dtype).removeprefix("torch.")

    def __call__(self, images: list[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        """[fp32 [3, H, W]] of one shape -> (mean, std), each fp32 [B, C, h, w] on the CPU."""
        return self._encode(images)

    @torch.no_grad()
    def _moments(self, images):
        pixels = torch.stack(images).to(self._vae.device, self._vae.dtype)
        posterior = self._vae.encode(pixels).latent_dist
        mean, std = _normalise(self._vae.config, posterior.mean.float(), posterior.std.float())
        return mean.cpu(), std.cpu()

    def _one_by_one(self, images):
        means, stds = zip(*(self._moments([image]) for image in images))
        return torch.cat(means), torch.cat(stds)

    def _one_by_one_on_cpu(self, images):
        self._vae.to("cpu", torch.float32)
        return self._one_by_one(images)


def _normalise(config, mean, std):
    """Posterior of the VAE -> posterior of the latents the UNet sees (some fine-tunes ship channel statistics)."""
    if getattr(config, "latents_mean", None) is None:
        return mean * config.scaling_factor, std * config.scaling_factor
    centre = torch.tensor(config.latents_mean, device=mean.device).view(1, -1, 1, 1)
    scale = config.scaling_factor / torch.tensor(config.latents_std, device=mean.device).view(1, -1, 1, 1)
    return (mean - centre) * scale, std * scale


# ---------------------------------------------------------------- captions


def tokenize(tokenizers: Sequence, captions: list[str]) -> torch.Tensor:
    """Token ids of both tokenizers, padded and cut to 77: [B, 2, 77]."""
    options = dict(padding="max_length", max_length=MAX_TOKENS, truncation=True, return_tensors="pt")
    return torch.stack([tokenizer(captions, **options).input_ids for tokenizer in tokenizers], dim=1)


def encode_text(encoders: Sequence, input_ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """SDXL's text conditioning: ids [B, 2, 77] -> (prompt_embeds [B, 77, 768 + 1280], pooled [B, 1280]).

    The penultimate hidden states of both encoders side by side; `pooled` is bigG's projected end-of-text
    (arXiv 2307.01952, sec. 2.1).
    """
    outputs = [encoder(ids, output_hidden_states=True) for encoder, ids in zip(encoders, input_ids.unbind(1))]
    return torch.cat([output.hidden_states[-2] for output in outputs], dim=-1), outputs[1].text_embeds


class CaptionEncoder:
    """Captions -> text conditioning, by the encoders on the device.

    Where memory runs out, captions go through one at a time, then on the CPU.
    """

    def __init__(self, model: loading.Model, host: Host) -> None:
        ways = {"on the GPU": host, "they work on the CPU": host.on_cpu()}
        load = {way: functools.partial(loading.load_text_encoders, model, place) for way, place in ways.items()}
        self.tokenizers, self._encoders = zip(*StepDown("while loading the text encoders", load, host)())
        ways = {"together": self._together, "one at a time": self._one_by_one, "on the CPU": self._on_cpu}
        self._encode = StepDown("while encoding captions", ways, host)

    def __call__(self, captions: list[str]) -> tuple[torch.Tensor, torch.Tensor]:
        """Captions -> (prompt_embeds [B, 77, 2048], pooled [B, 1280]) on the CPU."""
        return self._encode(captions)

    @torch.no_grad()
    def _together(self, captions):
        input_ids = tokenize(self.tokenizers, captions).to(self._encoders[0].device)
        prompt_embeds, pooled = encode_text(self._encoders, input_ids)
        return prompt_embeds.cpu(), pooled.cpu()

    def _one_by_one(self, captions):
        embeds, pooled = zip(*(self._together([caption]) for caption in captions))
        return torch.cat(embeds), torch.cat(pooled)

    def _on_cpu(self, captions):
        for encoder in self._encoders:
            encoder.to("cpu", torch.float32)
        return self._together(captions)
'''

# ======================================================================================== common/data/framing.py

MODULES['common/data/framing.py'] = r'''
"""A Sample -> Framing (how its picture is resized and cropped) -> time_ids, which SDXL is told, and pixels."""

from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image, ImageOps

from common.data import decoding
from common.data.dataset import Sample

BUCKET_RATIO = 2.0  # widest and tallest bucket
THIN = 8  # a resized picture with more than this many times the area of its crop is cropped first
LARGEST_FP16 = 65504.0


@dataclass(frozen=True)
class Framing:
    """How a picture becomes a training square or bucket: resize to cover, then crop. All in pixels."""

    resized: tuple[int, int]  # (width, height)
    left: int
    top: int
    width: int
    height: int


def buckets(resolution: int) -> list[tuple[int, int]]:
    """[(width, height)] between 1:2 and 2:1, sides a multiple of a step, area at most resolution^2.

    SDXL, arXiv 2307.01952, app. I.
    """
    step = 64 if resolution >= 512 else 16
    sides = range(resolution // step * step, int(resolution * BUCKET_RATIO), step)
    wide = [(width, resolution**2 // width // step * step) for width in sides]
    wide = [(w, h) for w, h in wide if h and 1 <= w / h <= BUCKET_RATIO] + [(resolution, resolution)]
    return sorted({*wide, *((h, w) for w, h in wide)})


def frame(sample: Sample, resolution: int, *, center_crop: bool = True, aspect_ratio_buckets: bool = False) -> Framing:
    """Choose the Framing of a sample. A random crop is drawn from the image's content: it is the same in every run."""
    # what is left of the picture
    width = height = resolution
    if aspect_ratio_buckets:
        ratio = sample.width / sample.height
        width, height = min(buckets(resolution), key=lambda bucket: abs(np.log(bucket[0] / bucket[1] / ratio)))

    # resized to cover that
    scale = max(width / sample.width, height / sample.height)
    resized = max(width, round(sample.width * scale)), max(height, round(sample.height * scale))

    # where the crop lies in it
    spare_x = resized[0] - width
    spare_y = resized[1] - height
    across, down = (0.5, 0.5) if center_crop else np.random.default_rng(int(sample.key, 16)).random(2)
    left = round(spare_x * across)
    return Framing(resized, left=left, top=round(spare_y * down), width=width, height=height)


def time_ids(sample: Sample, framing: Framing, flip: bool = False) -> torch.Tensor:
    """SDXL's micro-conditioning: (original height, width, crop top, left, target height, width) in pixels, [6].

    Original size is the file's; the crop is counted in the resized picture, from the edge that is left after a flip.
    The crop of a line of pixels can lie beyond what fp16 holds, and counts as its largest number then.
    """
    left = framing.resized[0] - framing.left - framing.width if flip else framing.left
    ids = [sample.height, sample.width, framing.top, left, framing.height, framing.width]
    return torch.tensor(ids, dtype=torch.float32).clamp(max=LARGEST_FP16)


def pixels(sample: Sample, framing: Framing, flip: bool = False) -> torch.Tensor:
    """Decode, turn upright, resize, crop, flip -> fp32 [3, H, W] in [-1, 1].

    Raises:
        Exception: whatever Pillow raises for a file that cannot be decoded.
    """
    image = decoding.decode(sample.read())
    if image.size != (sample.width, sample.height):
        raise ValueError(f"is {image.size}, but its header says {(sample.width, sample.height)}")
    image = _cut(image, framing)
    if flip:
        image = ImageOps.mirror(image)
    return torch.from_numpy(np.asarray(image, dtype=np.float32).transpose(2, 0, 1) / 127.5 - 1.0)


def _cut(image, framing):
    """Resize and crop; a thin picture is cropped first, or a line of 1 x 1000 pixels would become 1024 x 1,024,000."""
    right = framing.left + framing.width
    bottom = framing.top + framing.height
    if framing.resized[0] * framing.resized[1] <= THIN * framing.width * framing.height:
        resized = image.resize(framing.resized, Image.Resampling.LANCZOS)
        return resized.crop((framing.left, framing.top, right, bottom))

    # The same crop, in the coordinates of the picture as it is.
    across = image.width / framing.resized[0]
    down = image.height / framing.resized[1]
    end = min(right * across, image.width), min(bottom * down, image.height)
    box = (framing.left * across, framing.top * down, *end)
    return image.resize((framing.width, framing.height), Image.Resampling.LANCZOS, box=box)
'''

# ================================================================================= common/data/metadata_files.py

MODULES['common/data/metadata_files.py'] = r'''
"""metadata.jsonl and metadata.csv -> rows, strictly: what could be read in two ways is refused by line and cure."""

import csv
import io
import json
import re
from pathlib import Path

from common.errors import UserError

DELIMITERS = ",;\t"
# The start of a row within a quoted text: then the quote was never meant to reach that far.
_ROW_IN_TEXT = re.compile(r"\n[^\n,;\t]+\.[a-zA-Z0-9]{2,4}[,;\t]")


def read_rows(path: Path, caption_column: str) -> list[tuple[str, str | None]]:
    """(file name, caption) of every row of a metadata file; a caption may be None.

    Raises:
        UserError: naming the file, the line, what is wrong and the cure.
    """
    rows = _jsonl_rows(path) if path.suffix == ".jsonl" else _csv_rows(path, caption_column)
    return [_checked(path, number, row, caption_column) for number, row in rows]


def read_text(path: Path) -> str:
    """A UTF-8 file as text, with or without a byte order mark.

    Raises:
        UserError: the file is not UTF-8.
    """
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: is not UTF-8 text ({error.reason} at byte {error.start}); save it as UTF-8") from None


def _checked(path, number, row, caption_column):
    if not isinstance(row, dict):
        raise UserError(f"{path}: line {number} is not an object with file_name and {caption_column}")
    for column in ("file_name", caption_column):
        if column not in row:
            columns = ", ".join(map(str, row))
            raise UserError(f"{path}: line {number} has no {column!r} (it has {columns}); see --caption_column")
        value = row[column]
        if not isinstance(value, (str, type(None))) or (column == "file_name" and not value):
            raise UserError(f"{path}: line {number}: {column} is {value!r}, not a text; see --caption_column")
    return row["file_name"], row[caption_column]


def _jsonl_rows(path):
    rows = []
    for number, line in enumerate(read_text(path).split("\n"), 1):  # splitlines() would cut captions at U+2028 too
        if line.strip():
            try:
                rows.append((number, json.loads(line)))
            except json.JSONDecodeError as error:
                raise UserError(f"{path}: line {number} is not JSON ({error.msg})") from None
    return rows


def _csv_rows(path, caption_column):
    text = read_text(path)
    delimiter = _delimiter(text, caption_column)
    records = _csv_records(path, text, delimiter)
    if not records:
        return []
    columns = [name.strip() for name in records[0][1]]
    for number, fields in records[1:]:
        _check_fields(path, number, fields, columns, delimiter)
    return [(number, dict(zip(columns, fields))) for number, fields in records[1:]]


def _delimiter(text, caption_column):
    """The delimiter that splits the heading into most of file_name and the caption column; the comma before others."""
    heading = text.partition("\n")[0]
    wanted = {"file_name", caption_column}
    return max(DELIMITERS, key=lambda delimiter: len(wanted & {name.strip(' "') for name in heading.split(delimiter)}))


def _csv_records(path, text, delimiter):
    """[(number of its first line, fields)] of every row that is not blank, the heading included."""
    reader = csv.reader(io.StringIO(text), delimiter=delimiter, strict=True, skipinitialspace=True)
    records = []
    number = 1
    try:
        for fields in reader:
            if any(_ROW_IN_TEXT.search(field) for field in fields):
                raise csv.Error("a quote is opened and the rows after it are read as its text")
            if fields:
                records.append((number, fields))
            number = reader.line_num + 1
    except csv.Error as error:
        cure = 'close every quote, and write a quote within quotes twice ("")'
        raise UserError(f"{path}: line {number} cannot be read ({error}); {cure}") from None
    return records


def _check_fields(path, number, fields, columns, delimiter):
    shown = {",": "commas", ";": "semicolons", "\t": "tabs"}[delimiter]
    counted = f"{path}: line {number} has {len(fields)} fields where the heading has {len(columns)}"
    if len(fields) > len(columns):
        raise UserError(f'{counted}; put a caption that holds {shown} between double quotes ("...")')
    if len(fields) < len(columns):
        raise UserError(f"{counted} (delimiter: {shown}); write every field, an empty one too")
'''

# ========================================================================================== common/data/pairs.py

MODULES['common/data/pairs.py'] = r'''
"""Pair: a picture that was found and its caption, before either is read; and the words for files with faults."""

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import NamedTuple, TypeVar

T = TypeVar("T")


class Pair(NamedTuple):
    """`read` gives the bytes of the picture's file; an epoch shows the picture `repeats` times."""

    name: str
    caption: str | None
    read: Callable[[], bytes]
    repeats: int = 1


def read_file(path: Path) -> bytes:
    """The bytes of a regular file; a pipe or a device would never end.

    Raises:
        OSError: it is something else, or cannot be read.
    """
    if path.exists() and not path.is_file():
        raise OSError("is not a regular file")
    return path.read_bytes()


def few(names: Iterable, shown: int = 3) -> str:
    """The first names in a row: `a, b, c and 4 more`."""
    names = [str(name) for name in names]
    more = f" and {len(names) - shown} more" if len(names) > shown else ""
    return ", ".join(names[:shown]) + more


def or_fault(read: Callable[[], T]) -> T | Exception:
    """What `read()` returns, or the exception it raises.

    Pillow and the libraries below it raise nearly any class for a damaged file.
    """
    try:
        return read()
    except MemoryError:  # the machine's, not the file's
        raise
    except Exception as error:
        return error


def fault(error: Exception) -> str:
    """What is wrong, in one line."""
    return " ".join(str(error).split()) or type(error).__name__
'''

# ======================================================================================== common/data/sources.py

MODULES['common/data/sources.py'] = r'''
"""--train_data_dir or --dataset_name -> Pairs: folders with metadata or .txt captions here, tables in tables.py.

Whatever is left out, or taken in without being meant to be, is counted and named in one line.
"""

import functools
import os
import re
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from common.cli.flag_checks import find_data_dir
from common.data import tables
from common.data.metadata_files import read_rows, read_text
from common.data.pairs import Pair, few, read_file
from common.errors import UserError

IMAGE_SUFFIXES = set(
    ".png .apng .jpg .jpeg .jpe .jfif .webp .bmp .dib .gif .tif .tiff .avif .jp2 .j2k .jpx .tga .ppm".split()
)
OTHER_SUFFIXES = set(".heic .heif .jxl .svg .psd .xcf .kra .clip .eps .dng .cr2 .cr3 .nef .arw .raf .orf .rw2".split())
METADATA = ("metadata.jsonl", "metadata.csv")
REPEATS = re.compile(r"(\d+)_")  # the start of a folder's name, as kohya's scripts read it
MOST_REPEATS = 1000  # beyond it, the number is rather a year
REGULARISATION = re.compile(r"(\d+_)?reg(s|ulari[sz]ation)?([ _-]?(images|imgs|data|set))?", re.IGNORECASE)
# What a trainer, and infer.py, leave behind.
RUN_FILES = (("config.json", "metrics.jsonl"), ("manifest.json", "compare.png"))


class Found(NamedTuple):
    """What lies in a folder and below it; `left_out` maps a reason to files."""

    pictures: list[Path]
    left_out: dict[str, list[Path]]


def read_pairs(
    dataset_name: str, folders: list[str], *, image_column: str, caption_column: str, say: Callable[[str], None]
) -> list[Pair]:
    """The pairs of every folder, one after the other, or of the hub data set where no folder is named.

    Raises:
        UserError: naming the flag or the file.
    """
    columns = tables.Columns(image_column, caption_column)
    if not folders:
        return tables.hub_pairs(dataset_name, columns, say)
    pairs = []
    for name in folders:
        folder, weight = find_data_dir(name)
        pairs += [pair._replace(repeats=pair.repeats * weight) for pair in _folder_pairs(folder, columns, say)]
    return pairs


# ---------------------------------------------------------------- one folder


def _folder_pairs(folder, columns, say):
    if tables.is_saved(folder):
        return tables.saved_pairs(folder, columns, say)
    found = _find(folder)
    if metadata := [folder / name for name in METADATA if (folder / name).is_file()]:
        for path in metadata[1:]:
            say(f"data: {path} is left out, {metadata[0].name} beside it is read")
        return _metadata_pairs(metadata[0], found, columns.caption_column, say)
    _say_left_out(folder, found.left_out, say)
    if not found.pictures and (files := tables.table_files(folder)):
        return tables.file_pairs(folder, files, columns, say)
    return _text_pairs(folder, found.pictures, columns.caption_column, say)


def _find(folder):
    """Every picture below a folder, in order of names, without what is not meant to be trained on."""
    runs = _run_folders(folder)
    pictures = []
    left_out = {}
    for path in sorted(folder.rglob("*")):
        suffix = path.suffix.lower()
        if suffix not in IMAGE_SUFFIXES | OTHER_SUFFIXES or _is_litter(path, folder) or path.is_dir():
            continue
        reason = _reason_to_leave(path, folder, runs)
        if reason:
            left_out.setdefault(reason, []).append(path)
        else:
            pictures.append(path)
    return Found(pictures, left_out)


def _is_litter(path, folder):
    """Hidden files, and what notebooks and archivers leave behind: copies that would be trained on twice."""
    return any(part.startswith(".") or part == "__MACOSX" for part in path.relative_to(folder).parts)


def _run_folders(folder):
    """Output folders of this suite below `folder`."""
    parents = {path.parent for name in ("metrics.jsonl", "compare.png") for path in folder.rglob(name)} - {folder}
    return {place for place in parents if any(all((place / name).is_file() for name in names) for names in RUN_FILES)}


def _reason_to_leave(path, folder, runs):
    if path.suffix.lower() in OTHER_SUFFIXES:
        return "of kinds that cannot be read here (convert them to PNG)"
    if runs.intersection(path.parents):
        return "output of an earlier run"
    if any(REGULARISATION.fullmatch(part) for part in path.relative_to(folder).parts[:-1]):
        return "regularisation pictures (they belong to DreamBooth's prior loss, which is not trained here)"
    return None


def _say_left_out(folder, left_out, say):
    for reason, paths in left_out.items():
        if paths:
            shown = few(path.relative_to(folder) for path in paths)
            say(f"data: left out in {folder}, {reason}: {len(paths)} ({shown})")


# ---------------------------------------------------------------- captions


def _metadata_pairs(metadata, found, caption_column, say):
    """The pictures that the rows name, whatever they are; all others are left out."""
    folder = metadata.parent
    rows = [(folder / name, caption) for name, caption in read_rows(metadata, caption_column)]
    named = {os.path.normpath(path) for path, _ in rows}
    by_reason = {f"not named in {metadata.name}": found.pictures, **found.left_out}
    for reason, paths in by_reason.items():
        by_reason[reason] = [path for path in paths if os.path.normpath(path) not in named]
    _say_left_out(folder, by_reason, say)
    return [Pair(str(path), caption, functools.partial(read_file, path)) for path, caption in rows]


def _text_pairs(folder, pictures, caption_column, say):
    """Pictures with a .txt beside them; folders named as kohya's scripts read them (`10_name`) are repeated."""
    if not pictures:
        raise UserError(f"--train_data_dir {folder}: no images in it (looked for {' '.join(sorted(IMAGE_SUFFIXES))})")
    texts = [path.with_suffix(".txt") for path in pictures]
    if not any(text.is_file() for text in texts):
        elsewhere = sorted(folder.glob("*/metadata.*"))
        hint = f" (there is {elsewhere[0]}: name that folder)" if elsewhere else ""
        raise UserError(
            f"--train_data_dir {folder}: no captions{hint}; add metadata.jsonl or .csv (columns file_name and"
            f" {caption_column}), or a .txt beside each image ({texts[0].name})"
        )
    repeats = _repeats(folder, pictures, say)
    captions = [read_text(text) if text.is_file() else "" for text in texts]
    rows = zip(pictures, captions, repeats)
    return [Pair(str(path), caption, functools.partial(read_file, path), times) for path, caption, times in rows]


def _repeats(folder, pictures, say):
    """How often an epoch shows each picture: the number before its folder's name, one level below the data folder."""
    parts = [path.relative_to(folder).parts for path in pictures]
    tops = [names[0] if len(names) > 1 else "" for names in parts]
    times = {name: int(number[1]) for name in dict.fromkeys(tops) if (number := REPEATS.match(name))}
    for name, number in times.items():
        if not 1 <= number <= MOST_REPEATS:
            raise UserError(
                f"--train_data_dir {folder}: the name of {name} would mean {number} repeats"
                f" (1 to {MOST_REPEATS} can be given so); rename it, e.g. 1_{name}"
            )

    # said, because a name may be no more than a name
    if times:
        counted = Counter(name for name in tops if name in times)
        shown = few((f"{name} (images: {count})" for name, count in counted.items()), 10)
        say(f"data: folders repeated as their names say: {shown}")
    return [times.get(name, 1) for name in tops]
'''

# ========================================================================================== common/data/store.py

MODULES['common/data/store.py'] = r'''
"""What was computed once, under the key of what it was computed from.

Pairs of tensors lie in files that any number of processes share.
"""

import uuid
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from common import files

SHARD_ENTRIES = 64


class Store:
    """key -> tuple of tensors, in memory-mapped safetensors shards in one folder, or in RAM when `folder` is None.

    Shards are written whole under a new name and never changed, so any number of processes may share a folder.
    """

    def __init__(self, folder: Path | None = None):
        self.folder = folder
        self._pending = {}
        self._shards = {}  # path -> the open file
        self._shard_of = {}  # key -> the open file
        self.reload()

    def reload(self):
        """Find the shards that other processes have written since."""
        for path in sorted(self.folder.glob("*.safetensors")) if self.folder else ():
            if path not in self._shards:
                try:
                    self._shards[path] = safe_open(path, "pt")
                    self._shard_of.update((key, self._shards[path]) for key in _keys_in(self._shards[path]))
                except FileNotFoundError:
                    continue  # another process has found it damaged
                except SafetensorError as error:
                    self._remove(path, error)

    def drop_damaged(self, keys):
        """Remove the damaged ones of the shards that hold one of `keys`: all their entries are made again."""
        wanted = set(keys)
        for path, shard in list(self._shards.items()):
            if not wanted.isdisjoint(_keys_in(shard)) and (damaged := files.first_damage(shard)):
                del self._shards[path]
                self._remove(path, f"{damaged} is not what was written")
        self._shard_of = {key: shard for shard in self._shards.values() for key in _keys_in(shard)}

    def _remove(self, path, damage):
        path.unlink(missing_ok=True)  # another process may have seen it too
        print(f"cache: {path} is damaged ({damage}) and was removed; its entries are encoded again")

    def __contains__(self, key):
        return key in self._pending or key in self._shard_of

    def __getitem__(self, key):
        if key in self._pending:
            return self._pending[key]
        shard = self._shard_of[key]
        return shard.get_tensor(f"{key}.0"), shard.get_tensor(f"{key}.1")

    def __setitem__(self, key, pair):
        self._pending[key] = tuple(tensor.clone(memory_format=torch.contiguous_format) for tensor in pair)
        if self.folder and len(self._pending) >= SHARD_ENTRIES:
            self.flush()

    def flush(self):
        """Write what is pending as one more shard: complete or absent, never half."""
        if not self.folder or not self._pending:
            return
        path = self.folder / f"{uuid.uuid4().hex}.safetensors"
        files.write_safetensors(
            path, {f"{key}.{i}": tensor for key, pair in self._pending.items() for i, tensor in enumerate(pair)}
        )
        self._pending = {}
        self.reload()


def _keys_in(shard):
    """Keys of the entries in an open shard."""
    return {name.rpartition(".")[0] for name in shard.keys()}
'''

# ========================================================================================= common/data/tables.py

MODULES['common/data/tables.py'] = r'''
"""A table that `datasets` reads -> Pairs: a hub data set, a save_to_disk folder, parquet or arrow files.

Pictures stay encoded bytes, memory-mapped by `datasets`, which is imported where a table is read.
"""

import functools
import re
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from common.data.pairs import Pair, fault, read_file
from common.errors import UserError

TABLE_KINDS = ("parquet", "arrow")
# The split in the name of a table's file.
SPLIT = re.compile(r"(?<![a-z])(train|validation|valid|val|test|dev)(?![a-z])")


class Columns(NamedTuple):
    """The flags that name the columns of a table."""

    image_column: str
    caption_column: str


def hub_pairs(dataset_name: str, columns: Columns, say: Callable[[str], None]) -> list[Pair]:
    """The pairs of a hub data set."""
    from datasets import load_dataset

    splits = _loaded(dataset_name, load_dataset, dataset_name)
    return _pairs(splits, dataset_name, columns, folder=Path("."), say=say)


def is_saved(folder: Path) -> bool:
    """Whether `datasets` wrote this folder with save_to_disk."""
    names = {path.name for path in folder.iterdir()}
    return "dataset_dict.json" in names or {"state.json", "dataset_info.json"} <= names


def saved_pairs(folder: Path, columns: Columns, say: Callable[[str], None]) -> list[Pair]:
    """The pairs of a folder that save_to_disk wrote."""
    from datasets import load_from_disk

    splits = _loaded(folder, load_from_disk, str(folder))
    return _pairs(splits, folder, columns, folder=folder, say=say)


def table_files(folder: Path) -> list[Path]:
    """Parquet files below a folder; where there is none, arrow files."""
    kinds = (sorted(folder.rglob(f"*.{kind}")) for kind in TABLE_KINDS)
    return next(filter(None, kinds), [])


def file_pairs(folder: Path, files: list[Path], columns: Columns, say: Callable[[str], None]) -> list[Pair]:
    """The pairs of parquet or arrow files; their names say which split they belong to, as on the hub."""
    from datasets import load_dataset

    by_split = {}
    for path in files:
        split = SPLIT.search(path.name.lower())
        by_split.setdefault(split[1] if split else "train", []).append(str(path))
    splits = _loaded(folder, load_dataset, files[0].suffix[1:], data_files=by_split)
    return _pairs(splits, folder, columns, folder=folder, say=say)


def _loaded(source, load, *arguments, **options):
    """What a function of `datasets` loads, as {split: Dataset}."""
    from datasets.exceptions import DatasetsError

    try:
        loaded = load(*arguments, **options)
    except (DatasetsError, ValueError) as error:
        raise UserError(f"{source}: cannot be read as a data set ({fault(error)})") from None
    return loaded if isinstance(loaded, dict) else {"train": loaded}


def _pairs(splits, source, columns, *, folder, say):
    """The pairs of a data set's split train, or of its first; paths in it are relative to `folder`."""
    split = "train" if "train" in splits else next(iter(splits))
    if split != "train":
        say(f"data: {source} has no split named train; its split {split} is used (it has: {', '.join(splits)})")
    data = splits[split]
    for flag, column in columns._asdict().items():
        if column not in data.column_names:
            raise UserError(f"--{flag} {column}: {source} has the columns {', '.join(data.column_names)}")
    captions = _captions(data, source, columns.caption_column)
    read = functools.partial(_read, _encoded(data, source, columns.image_column), columns.image_column, folder)
    return [Pair(f"{source}[{i}]", caption, functools.partial(read, i)) for i, caption in enumerate(captions)]


def _captions(data, source, column):
    """A caption or None for every row: texts as they are, labels by their names.

    Raises:
        UserError: the column holds something else.
    """
    from datasets import ClassLabel

    values = data.select_columns([column])[:][column]
    feature = data.features[column]
    if isinstance(feature, ClassLabel):
        return [None if value is None or value < 0 else feature.names[value] for value in values]
    for i, value in enumerate(values):
        if not isinstance(value, (str, type(None))):
            shown = repr(value) if len(repr(value)) < 60 else f"{repr(value)[:57]}..."
            raise UserError(
                f"--caption_column {column}: row {i} of {source} holds {shown} ({type(value).__name__}), not a text;"
                f" name a column with one text a row (columns: {', '.join(data.column_names)})"
            )
    return values


def _encoded(data, source, column):
    """The pictures alone, as {"bytes", "path"}: reading a whole row would decode the pictures of other columns too."""
    from datasets import Image

    try:
        return data.select_columns([column]).cast_column(column, Image(decode=False))
    except (TypeError, ValueError, NotImplementedError) as error:  # what pyarrow raises
        kind = data.features[column]
        raise UserError(f"--image_column {column}: {source} has no images there but {kind} ({fault(error)})") from None


def _read(data, column, folder, index):
    """The bytes of one picture."""
    cell = data[index][column]
    if cell is None or (cell["bytes"] is None and cell["path"] is None):
        raise ValueError("is null")
    return cell["bytes"] if cell["bytes"] is not None else read_file(folder / cell["path"])
'''

# ============================================================================================== common/errors.py

MODULES['common/errors.py'] = r'''
"""What ends a script with one line for its user."""

LONGEST_WORD = 300
LONGEST_LINE = 1500


class UserError(Exception):
    """A fault the user can mend: one line that names the flag or the file, what is wrong and what to do.

    Long values are shortened.
    """

    def __init__(self, message: str):
        super().__init__(one_line(message))


def one_line(text: str) -> str:
    """`text` without line breaks, and without the middle of what nobody reads to its end."""
    words = [_without_middle(word, LONGEST_WORD) for word in text.split()]
    return _without_middle(" ".join(words), LONGEST_LINE)


def _without_middle(text: str, longest: int) -> str:
    """`text` of at most `longest` characters: its beginning and its end."""
    return text if len(text) <= longest else f"{text[: longest // 2]}...{text[3 - longest // 2 :]}"


# ---------------------------------------------------------------- out of GPU memory

ALLOCATION_FAILED = ("out of memory", "ALLOC_FAILED")  # torch's and CUDA's words; those of cuBLAS and cuDNN
# All of it may change when a run is resumed; --lora_rank and --use_8bit_adam may not.
OUT_OF_MEMORY_ADVICE = (
    "end what else is on this GPU, lower --resolution, or use --quantize nf4;"
    " --resume_from_checkpoint latest takes all of these"
)


class OutOfMemory(UserError):
    """GPU memory is used up, and there is no leaner way left to try."""

    def __init__(self, doing: str, advice: str = OUT_OF_MEMORY_ADVICE) -> None:
        super().__init__(f"out of GPU memory {doing}: {advice}")


def ran_out(error: BaseException) -> bool:
    """Whether `error` says that GPU memory is used up: not every library raises torch's own class of RuntimeError."""
    if isinstance(error, OutOfMemory):
        return True
    return isinstance(error, RuntimeError) and any(words in str(error) for words in ALLOCATION_FAILED)
'''

# ======================================================================================= common/fast/__init__.py

MODULES['common/fast/__init__.py'] = r'''
"""The same numbers, sooner: fused layers, kernels, CUDA graphs. Skip it at first reading."""
'''

# ================================================================================= common/fast/adapter_layers.py

MODULES['common/fast/adapter_layers.py'] = r'''
"""LoRA and DoRA linear layers as one autograd function over a frozen fp16 or NF4 weight.

PEFT keeps the parameters, their names and the configuration; only the forward pass of its layers is replaced. That
saves on every layer fp32 copies of the activations, a dozen kernel launches, and most of what PEFT keeps for the
backward pass.

Notation: x [M, K] input, W [N, K] frozen weight, A [r, K] and B [N, r] adapter, s = alpha / r, d dropout, m [N] DoRA
magnitude, n [N] row norms of W + s B A, g = m / n.
"""

from collections.abc import Callable, Iterable

import torch
import torch.nn.functional as F

from common.errors import UserError
from common.fast.kernel_check import adopt_kernels
from common.fast.operations import OF_DORA, gain_backward, row_norms, scale_rows, seeded_dropout, update_gain
from common.model.adapters import FlatParameters


class AdapterLinear(torch.autograd.Function):
    """y = g (x W^T + s d(x) A^T B^T) + bias, with g = 1 for LoRA (LoRA: arXiv 2106.09685, DoRA: arXiv 2402.09353).

    As in section 4.3 of DoRA, n is a constant in the backward pass. Dropout acts on the adapter's branch only.
    Forward g multiplies the rows of W and B; backward it multiplies dy, which is read for m's gradient anyway. Kept
    for the backward pass are x, which the layers of an attention block share; x A^T, which is small; and for DoRA y,
    which attention keeps anyway. The backward pass reads, or dequantises, W once more.
    """

    @staticmethod
    def forward(ctx, x, A, B, m, layer):
        x2 = x.reshape(-1, x.shape[-1])
        xa = layer.drop(x2) @ layer.a.t()
        y = F.linear(x2, layer.scaled_weight(), layer.bias).addmm_(xa, layer.scaled_b.t(), alpha=layer.scale)
        ctx.layer = layer
        ctx.shape = x.shape
        ctx.save_for_backward(x2, xa, None if m is None else y)
        return y.view(*x.shape[:-1], -1)

    @staticmethod
    def backward(ctx, dy):
        """Gradients of A, B and m are added where they are kept, in fp32, and not handed to autograd."""
        layer = ctx.layer
        x2, xa, y = ctx.saved_tensors
        dy = dy.reshape(-1, dy.shape[-1])

        # parameters
        if y is not None:
            dy = gain_backward(dy.contiguous(), y, bias=layer.bias, gain=layer.gain, m=layer.m, dm=layer.m.grad)
        dxa = dy @ layer.b
        add_product(layer.A.grad, dxa.t(), layer.drop(x2), layer.scale)
        add_product(layer.B.grad, dy.t(), xa, layer.scale)

        # input
        dx = None
        if ctx.needs_input_grad[0]:
            dx = dy @ layer.weight()
            if layer.p:
                layer.drop(dxa @ layer.a, add_to=dx, alpha=layer.scale)
            else:
                dx.addmm_(dxa, layer.a, alpha=layer.scale)
            dx = dx.view(ctx.shape)
        return dx, None, None, None, None


# Whether cuBLAS computes fp32 products of fp16 matrices, which spares a rounding and three kernels: from torch 2.10 on.
FP32_PRODUCTS = tuple(int(part) for part in torch.__version__.split(".")[:2]) >= (2, 10)


def add_product(total: torch.Tensor, x: torch.Tensor, y: torch.Tensor, scale: float) -> None:
    """total += scale x y, for an fp32 total."""
    if x.is_cuda and FP32_PRODUCTS and x.dtype != torch.float32:
        torch.addmm(total, x, y, out_dtype=torch.float32, alpha=scale, out=total)
    elif x.dtype == torch.float32:
        total.addmm_(x, y, alpha=scale)
    else:
        total.add_(x @ y, alpha=scale)


class FusedLayer:
    """The forward pass of one PEFT layer.

    Args:
        layer: a PEFT Linear or Linear4bit with one active adapter.
        flat: adapters.FlatParameters; holds the copies of A and B in the compute dtype.
        seed: int64 scalar tensor, the dropout seed of the forward pass in hand.
        salt: number of the layer.
    """

    def __init__(self, layer: torch.nn.Module, flat: FlatParameters, seed: torch.Tensor, salt: int) -> None:
        base = layer.get_base_layer()
        (name,) = layer.active_adapters
        self.layer = layer
        self.peft_forward = layer.forward
        self.base = base.weight
        self.bias = base.bias

        # the adapter: fp32 parameters, and a and b in the compute dtype
        self.scale = layer.scaling[name]
        self.A = layer.lora_A[name].weight
        self.B = layer.lora_B[name].weight
        self.a = flat.compute_copy(self.A)
        self.b = flat.compute_copy(self.B)

        # dropout
        self._p = getattr(layer.lora_dropout[name], "p", 0.0)
        self.seed = seed
        self.salt = salt

        # DoRA
        self.m = layer.lora_magnitude_vector[name].weight if name in layer.lora_magnitude_vector else None
        self.gain = None
        self.scaled_b = self.b
        if self.m is not None:
            # PEFT measures it in fp16; exactly n, the layer starts as the frozen one
            self.m.data.copy_(row_norms(self.weight(), self.A.data, self.B.data, self.scale))
            self.gain = torch.ones_like(self.m.data)
            self.scaled_b = self.b.clone()

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        if self.layer.disable_adapters:
            return self.peft_forward(x)
        return AdapterLinear.apply(x, self.A, self.B, self.m, self)

    @property
    def p(self) -> float:
        """Dropout probability, 0 outside training."""
        return self._p if self.layer.training else 0.0

    def drop(self, x: torch.Tensor, **into) -> torch.Tensor:
        """d(x); the same mask whenever it is called with the same seed. d is its own transpose."""
        return seeded_dropout(x, self.p, self.seed, self.salt, **into) if self.p else x

    def scaled_weight(self) -> torch.Tensor:
        """W with its rows multiplied by g, if there is one; as `scaled_b` is B."""
        return self.weight() if self.gain is None else scale_rows(self.weight(), self.gain)

    def weight(self) -> torch.Tensor:
        """W [N, K] in the compute dtype, dequantised into memory of its own if it is NF4."""
        if self.base.dtype != torch.uint8:
            return self.base
        from bitsandbytes.functional import dequantize_4bit

        return dequantize_4bit(self.base.data, self.base.quant_state)

    @torch.no_grad()
    def update_gain(self) -> None:
        """Set g, and B multiplied by it, after the parameters changed."""
        update_gain(self.weight(), self.A, self.B, m=self.m, scale=self.scale, gain=self.gain, b=self.scaled_b)


def fuse(
    models: Iterable[torch.nn.Module], flat: FlatParameters, seed: torch.Tensor, say: Callable[[str], None] = print
) -> None:
    """Replace the forward pass of every PEFT layer in `models`; DoRA's gains then follow `flat.publish()`.

    Args:
        flat, seed: as of FusedLayer.
        say: prints a line.
    Raises:
        UserError: a convolution has an adapter.
    """
    from peft.tuners.tuners_utils import BaseTunerLayer

    layers = [module for model in models for module in model.modules() if isinstance(module, BaseTunerLayer)]
    if any(isinstance(layer.get_base_layer(), torch.nn.Conv2d) for layer in layers):
        raise UserError(
            "--lora_target_modules: adapters of convolutions have no fused forward pass; add --lora_backend peft"
        )
    for salt, layer in enumerate(layers):
        layer.forward = FusedLayer(layer, flat, seed, salt)
        if layer.forward.m is not None:
            flat.followers.append(layer.forward.update_gain)
    _adopt_kernels([layer.forward for layer in layers], say)
    flat.publish()


def _adopt_kernels(layers, say):
    """The kernels that these layers will launch."""
    first = layers[0]
    wanted = [seeded_dropout] if any(layer._p for layer in layers) else []
    wanted += OF_DORA if any(layer.m is not None for layer in layers) else ()
    adopt_kernels(wanted, first.a.device, dtype=first.a.dtype, rank=len(first.A), say=say)
'''

# ================================================================================== common/fast/frozen_layers.py

MODULES['common/fast/frozen_layers.py'] = r'''
"""SDXL's UNet with fewer passes over memory: the layers, parameters and names of diffusers, shorter ways through them.

On a GPU images stay in channels-last order: cuDNN's fp16 convolutions compute in it, and in it an image is a sequence
of pixels without being copied. What is frozen is not asked for gradients: a convolution keeps nothing for the
backward pass, a normalisation only its input. Images are [B, C, H, W], sequences [B, S, C], the time embedding [B,
D].
"""

import functools
from collections.abc import Callable

import torch
import torch.nn.functional as F

from common.fast.kernel_check import adopt_kernels
from common.fast.operations import OF_THE_UNET, add_bias, add_norm, geglu, group_norm


class _FrozenConv(torch.autograd.Function):
    """A convolution whose weight needs no gradient, so that its input need not be kept."""

    @staticmethod
    def forward(ctx, x, conv, bias):
        ctx.conv = conv
        ctx.shape = x.shape
        return F.conv2d(x, conv.weight, bias, conv.stride, conv.padding)

    @staticmethod
    def backward(ctx, dy):
        conv = ctx.conv
        sizes = zip(ctx.shape[2:], dy.shape[2:], conv.stride, conv.padding, conv.kernel_size)
        left_over = [size - ((n - 1) * stride - 2 * padding + kernel) for size, n, stride, padding, kernel in sizes]

        # not torch.nn.grad.conv2d_input: without an input it takes the order of memory for NCHW, and copies dy twice
        geometry = dict(stride=conv.stride, padding=conv.padding, output_padding=left_over)
        return F.conv_transpose2d(dy, conv.weight, **geometry), None, None


def convolution(conv: torch.nn.Conv2d, x: torch.Tensor) -> torch.Tensor:
    """Conv2d."""
    return _convolve(x, conv, conv.bias)


def _convolve(x, conv, bias=None):
    if x.is_cuda:
        return _FrozenConv.apply(x.contiguous(memory_format=torch.channels_last), conv, bias)
    # memory is not what a CPU lacks, and this is faster
    return F.conv2d(x, conv.weight, bias, conv.stride, conv.padding)


def resnet_block(block: torch.nn.Module, x: torch.Tensor, temb: torch.Tensor) -> torch.Tensor:
    """ResnetBlock2D. The biases of its convolutions are added where something else is added anyway."""
    h = _convolve(group_norm(x, block.norm1, silu=True), block.conv1)
    h = group_norm(h, block.norm2, silu=True, shift=block.time_emb_proj(F.silu(temb)) + block.conv1.bias)
    h = _convolve(h, block.conv2)
    bias = block.conv2.bias
    if block.conv_shortcut is not None:
        x = _convolve(x, block.conv_shortcut)
        bias = bias + block.conv_shortcut.bias
    return add_bias(x, h, bias)


def transformer(
    model: torch.nn.Module, x: torch.Tensor, encoder_hidden_states: torch.Tensor | None = None, **unused
) -> tuple[torch.Tensor]:
    """Transformer2DModel: an image as a sequence, its blocks, and back."""
    batch, channels, height, width = x.shape
    h = group_norm(x, model.norm).permute(0, 2, 3, 1).reshape(batch, height * width, channels)
    h = model.proj_in(h)
    for block in model.transformer_blocks:
        if torch.is_grad_enabled() and model.gradient_checkpointing:
            h = model._gradient_checkpointing_func(block, h, None, encoder_hidden_states)
        else:
            h = block(h, None, encoder_hidden_states)
    return (model.proj_out(h).view(batch, height, width, channels).permute(0, 3, 1, 2) + x,)


def transformer_block(
    block: torch.nn.Module,
    h: torch.Tensor,
    no_mask: None = None,
    encoder_hidden_states: torch.Tensor | None = None,
    *unused,
    **unused_too,
) -> torch.Tensor:
    """BasicTransformerBlock: self-attention, cross-attention, feed-forward."""
    h, n = add_norm(h, None, block.norm1)
    h, n = add_norm(h, block.attn1(n), block.norm2)
    h, n = add_norm(h, block.attn2(n, encoder_hidden_states), block.norm3)
    return h + block.ff(n)


def attention(
    attn: torch.nn.Module, x: torch.Tensor, encoder_hidden_states: torch.Tensor | None = None, **unused
) -> torch.Tensor:
    """An attention processor: x [B, S, C], and what is attended to, [B, T, D] -> [B, S, C]."""
    context = x if encoder_hidden_states is None else encoder_hidden_states
    projected = attn.to_q(x), attn.to_k(context), attn.to_v(context)
    heads = F.scaled_dot_product_attention(*(y.unflatten(-1, (attn.heads, -1)).transpose(1, 2) for y in projected))
    return attn.to_out[0](heads.transpose(1, 2).flatten(2))


def gated_activation(module: torch.nn.Module, x: torch.Tensor) -> torch.Tensor:
    """GEGLU."""
    return geglu(module.proj(x))


def normalisation(norm: torch.nn.GroupNorm, x: torch.Tensor) -> torch.Tensor:
    """GroupNorm outside of the blocks above."""
    return group_norm(x, norm)


def _is_plain(block):
    """The resnet block of SDXL, none of its many relatives, and no adapter on its convolutions."""
    convolutions = [block.conv1, block.conv2, *([block.conv_shortcut] if block.conv_shortcut is not None else [])]
    options = block.time_embedding_norm, block.skip_time_act, block.output_scale_factor, block.dropout.p
    return (
        all(type(conv) is torch.nn.Conv2d for conv in convolutions)
        and options == ("default", False, 1.0, 0.0)
        and isinstance(block.nonlinearity, torch.nn.SiLU)
        and block.upsample is None
        and block.downsample is None
    )


def _is_plain_convolution(conv):
    return conv.padding_mode == "zeros" and conv.groups == 1 and conv.dilation == (1, 1)


def _is_plain_transformer_block(block):
    return block.norm_type == "layer_norm" and block.pos_embed is None


@functools.cache
def forwards() -> dict[type, tuple[Callable, Callable]]:
    """{class: (forward pass, whether it computes a module of this class)}.

    By class and not by name: PEFT's Conv2d has the name of torch's.
    """
    from diffusers.models.activations import GEGLU
    from diffusers.models.attention import BasicTransformerBlock
    from diffusers.models.resnet import ResnetBlock2D
    from diffusers.models.transformers.transformer_2d import Transformer2DModel

    return {
        torch.nn.Conv2d: (convolution, _is_plain_convolution),
        torch.nn.GroupNorm: (normalisation, lambda norm: norm.affine),
        ResnetBlock2D: (resnet_block, _is_plain),
        Transformer2DModel: (transformer, lambda model: model.use_linear_projection),
        BasicTransformerBlock: (transformer_block, _is_plain_transformer_block),
        GEGLU: (gated_activation, lambda module: True),
    }


def fuse_unet(unet: torch.nn.Module, device: torch.device, say: Callable[[str], None] = print) -> None:
    """Replace the forward passes of a frozen UNet2DConditionModel by those above, where they compute the same.

    Args:
        device: where it will compute.
        say: prints a line.
    """
    from diffusers.models.attention_processor import AttnProcessor2_0

    adopt_kernels(OF_THE_UNET, device, dtype=unet.conv_in.weight.dtype, say=say)
    for module in list(unet.modules()):
        forward, computes = forwards().get(type(module), (None, None))
        if forward and computes(module):
            module.forward = functools.partial(forward, module)
        if type(getattr(module, "processor", None)) is AttnProcessor2_0:
            module.processor = attention
        if isinstance(module, torch.nn.Conv2d) and device.type == "cuda":
            # also 1 x 1 kernels, which count as contiguous in either order: cuDNN goes by the strides
            module.weight.data = torch.empty_like(module.weight, memory_format=torch.channels_last).copy_(module.weight)


def unfuse_unet(unet: torch.nn.Module) -> None:
    """Give every layer its own forward pass back: hooks on single layers do not see what the fused passes read."""
    for module in unet.modules():
        if getattr(module.__dict__.get("forward"), "func", None) in [forward for forward, _ in forwards().values()]:
            del module.forward
'''

# ========================================================================================= common/fast/graphs.py

MODULES['common/fast/graphs.py'] = r'''
"""CUDA graphs: the thousands of kernels of a pass are launched from Python once, and replayed with one call afterwards.

On a Kaggle or Colab CPU an SDXL LoRA step is bound by launching some 40,000 small kernels, not by the GPU.
"""

import functools
from collections.abc import Callable

import torch


@functools.lru_cache
def _side_stream(device):
    """One for the whole process: cuBLAS keeps 32 MiB for every stream that it has ever worked on."""
    return torch.cuda.Stream(device)


class Graphed:
    """A function of named tensors, captured once per set of shapes.

    The first call with new shapes runs the function as it is, which also warms it up; the second captures it; then it
    is replayed. The graphs share their memory, so only one result may be in use at a time.

    Args:
        function: dict of tensors -> tensor. It must not wait for the GPU, and what it reads besides its argument must
            stay in place. What it writes in place (gradients) is written by every call exactly once.
        say: prints the line that explains a fallback.
        has_smaller: whether the caller has something smaller to do when memory runs out during the capture, and wants
            to hear of it; otherwise the function is launched from Python from then on.
    """

    def __init__(
        self,
        function: Callable[[dict[str, torch.Tensor]], torch.Tensor],
        device: torch.device,
        *,
        enabled: bool = True,
        say: Callable[[str], None] = print,
        has_smaller: bool = True,
    ) -> None:
        self.function = function
        self.device = device
        self.say = say
        self.has_smaller = has_smaller
        self.enabled = enabled and device.type == "cuda"
        self._seen = set()
        self._graphs = {}
        self._pool = None

    def __call__(self, tensors: dict[str, torch.Tensor]) -> torch.Tensor:
        """Copy `tensors` to the device without waiting, and run the function on them.

        Returns:
            its result, valid until the next call.
        """
        shapes = tuple((name, tuple(tensor.shape)) for name, tensor in tensors.items())
        if not self.enabled or shapes not in self._seen:
            self._seen.add(shapes)
            return self._warm_up({name: tensor.to(self.device, non_blocking=True) for name, tensor in tensors.items()})
        if shapes not in self._graphs and not self._capture(shapes, tensors):
            return self(tensors)
        graph, inputs, result = self._graphs[shapes]
        for name, tensor in tensors.items():
            inputs[name].copy_(tensor, non_blocking=True)
        graph.replay()
        return result

    def clear(self) -> None:
        """Give the graphs' memory back; the next calls capture them again."""
        self._seen = set()
        self._graphs = {}
        self._pool = None  # a pool does not outlive its last graph
        if self.enabled:
            torch.cuda.synchronize()
            torch.cuda.empty_cache()

    def _warm_up(self, tensors):
        if not self.enabled:
            return self.function(tensors)
        # cuBLAS and autograd set themselves up per stream. A capture may not: they do it here, beside the main stream.
        side = _side_stream(self.device)
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            result = self.function(tensors)
        torch.cuda.current_stream().wait_stream(side)
        return result

    def _capture(self, shapes, tensors):
        inputs = {name: tensor.to(self.device, copy=True) for name, tensor in tensors.items()}  # replays write to them
        graph = torch.cuda.CUDAGraph()

        try:
            # The outer context restores the stream, which a capture that fails at its end does not. The stream is
            # torch's own, not the warm-up's: there the graph would go on using a cuBLAS workspace outside of its pool.
            with torch.cuda.stream(torch.cuda.current_stream()), torch.cuda.graph(graph, pool=self._pool):
                result = self.function(inputs)
        except RuntimeError as error:
            # Not every library raises torch's own class
            if self.has_smaller and "out of memory" in str(error).lower():
                raise torch.OutOfMemoryError(str(error)) from error
            self.enabled = False
            self.say(f"no CUDA graph, launching from Python: {str(error).splitlines()[0]}")
            return False

        self._pool = self._pool or graph.pool()
        self._graphs[shapes] = graph, inputs, result
        return True
'''

# ============================================================================= common/fast/group_norm_kernels.py

MODULES['common/fast/group_norm_kernels.py'] = r'''
"""Triton kernels of GroupNorm with frozen weights, with what comes before and after it, in two passes over memory.

It reads channels-last images, adds the time embedding before and applies SiLU after. The backward pass gives the
gradient of the input only, and keeps nothing but the input. All sums are in fp32 over deviations from the mean, never
differences of large squares.

`group_norm` below the kernels is the GPU's form of that in operations.py. Of a batch of images, pixels are cut into
tiles of ROWS. In all kernels u = x + centre, z = u scale + bias is y before SiLU, and dx = dz scale - offset - slope u.
SIZE is the number of a group's channels. Source: arXiv 1803.08494, eq. 1 and 2.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl

COLUMNS = 64
TILES = 32


@triton.jit
def _tile(pixels, channels, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Of this program's tile of an image: offsets [ROWS, COLUMNS], channels [1, COLUMNS], and the masks of both."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)[:, None]
    channel = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    offsets = tl.program_id(2).to(tl.int64) * pixels * channels + row * channels + channel
    channel_mask = channel < channels
    return offsets, channel, (row < pixels) & channel_mask, channel_mask


@triton.jit
def _group_tiles(start, tiles, channels, SIZE, TILES: tl.constexpr, WIDTH: tl.constexpr):
    """Of this program's group, in what is kept per tile: tiles [TILES, 1], offsets [TILES, WIDTH], mask."""
    tile = start + tl.arange(0, TILES)[:, None]
    in_group = tl.arange(0, WIDTH)[None, :]
    offsets = (tl.program_id(1) * tiles + tile) * channels + tl.program_id(0) * SIZE + in_group
    return tile, offsets, (tile < tiles) & (in_group < SIZE)


@triton.jit
def _moments_kernel(
    x, shift, mean, deviation, pixels, channels, SHIFT: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr
):
    """Of every tile and channel of x + shift: mean, and deviation = the sum of squared deviations from it.

    x: [images, pixels, channels]; shift: [images, channels]; mean, deviation: fp32 [images, tiles, channels].
    """
    offsets, channel, mask, channel_mask = _tile(pixels, channels, ROWS, COLUMNS)
    value = tl.load(x + offsets, mask=mask, other=0.0).to(tl.float32)
    if SHIFT:
        value += tl.load(shift + tl.program_id(2) * channels + channel, mask=channel_mask, other=0.0).to(tl.float32)
    count = tl.minimum(ROWS, pixels - tl.program_id(0) * ROWS)
    average = tl.sum(tl.where(mask, value, 0.0), axis=0)[None, :] / count
    residual = tl.where(mask, value - average, 0.0)
    out = (tl.program_id(2) * tl.num_programs(0) + tl.program_id(0)) * channels + channel
    tl.store(mean + out, average, mask=channel_mask)
    tl.store(deviation + out, tl.sum(residual * residual, axis=0)[None, :], mask=channel_mask)


@triton.jit
def _merge_moments_kernel(
    mean, deviation, weight, shift, scale, centre, inverse, tiles, pixels, channels, SIZE, eps,
    SHIFT: tl.constexpr, ROWS: tl.constexpr, TILES: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """Of every group: inverse = 1 / standard deviation; of its channels: scale = inverse weight, centre = shift - mean.

    mean, deviation: fp32 [images, tiles, channels]; weight: [channels]; shift: [images, channels].
    scale, centre: fp32 [images, channels]; inverse: fp32 [images, groups].
    """
    # mean of the group
    total = pixels * SIZE
    sums = tl.zeros((TILES, WIDTH), dtype=tl.float32)
    for start in range(0, tiles, TILES):
        tile, offsets, mask = _group_tiles(start, tiles, channels, SIZE=SIZE, TILES=TILES, WIDTH=WIDTH)
        sums += tl.load(mean + offsets, mask=mask, other=0.0) * tl.minimum(ROWS, pixels - tile * ROWS)
    average = tl.sum(tl.sum(sums, axis=1), axis=0) / total

    # inverse of its standard deviation
    sums = tl.zeros((TILES, WIDTH), dtype=tl.float32)
    for start in range(0, tiles, TILES):
        tile, offsets, mask = _group_tiles(start, tiles, channels, SIZE=SIZE, TILES=TILES, WIDTH=WIDTH)
        residual = tl.where(mask, tl.load(mean + offsets, mask=mask, other=0.0) - average, 0.0)
        count = tl.minimum(ROWS, pixels - tile * ROWS)
        sums += tl.load(deviation + offsets, mask=mask, other=0.0) + residual * residual * count
    r = tl.rsqrt(tl.sum(tl.sum(sums, axis=1), axis=0) / total + eps)
    tl.store(inverse + tl.program_id(1) * tl.num_programs(0) + tl.program_id(0), r)

    # what its channels are multiplied by and moved by
    channel = tl.program_id(0) * SIZE + tl.arange(0, WIDTH)
    mask = tl.arange(0, WIDTH) < SIZE
    out = tl.program_id(1) * channels + channel
    tl.store(scale + out, r * tl.load(weight + channel, mask=mask, other=0.0).to(tl.float32), mask=mask)
    added = tl.zeros((WIDTH,), dtype=tl.float32)
    if SHIFT:
        added += tl.load(shift + out, mask=mask, other=0.0).to(tl.float32)
    tl.store(centre + out, added - average, mask=mask)


@triton.jit
def _group_norm_kernel(
    x, scale, centre, bias, y, pixels, channels, SILU: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr
):
    """y = (x + centre) scale + bias, through SiLU if asked for.

    x, y: [images, pixels, channels]; scale, centre: fp32 [images, channels]; bias: [channels].
    """
    offsets, channel, mask, channel_mask = _tile(pixels, channels, ROWS, COLUMNS)
    of_image = tl.program_id(2) * channels + channel
    value = tl.load(x + offsets, mask=mask, other=0.0).to(tl.float32)
    u = value + tl.load(centre + of_image, mask=channel_mask, other=0.0)
    k = tl.load(scale + of_image, mask=channel_mask, other=0.0)
    z = u * k + tl.load(bias + channel, mask=channel_mask, other=0.0).to(tl.float32)
    if SILU:
        z = z * tl.sigmoid(z)
    tl.store(y + offsets, z, mask=mask)


@triton.jit
def _group_gradient(
    x, dy, scale, centre, bias, pixels, channels, SILU: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr
):
    """Of this program's tile: offsets, channels and masks as in `_tile`; in fp32 u = x + centre, dL/dz and scale.

    The derivative of SiLU is s (1 + z (1 - s)) with s = sigmoid(z).
    x, dy: [images, pixels, channels]; scale, centre: fp32 [images, channels]; bias: [channels].
    """
    offsets, channel, mask, channel_mask = _tile(pixels, channels, ROWS, COLUMNS)
    of_image = tl.program_id(2) * channels + channel
    value = tl.load(x + offsets, mask=mask, other=0.0).to(tl.float32)
    u = value + tl.load(centre + of_image, mask=channel_mask, other=0.0)
    k = tl.load(scale + of_image, mask=channel_mask, other=0.0)
    dz = tl.load(dy + offsets, mask=mask, other=0.0).to(tl.float32)
    if SILU:
        z = u * k + tl.load(bias + channel, mask=channel_mask, other=0.0).to(tl.float32)
        s = tl.sigmoid(z)
        dz = dz * s * (1 + z * (1 - s))
    return offsets, channel, mask, channel_mask, u, dz, k


@triton.jit
def _gradient_sums_kernel(
    x, dy, scale, centre, bias, sum_dz, sum_dz_u, pixels, channels,
    SILU: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Of every tile and channel: sum_dz = the sum of dz scale, sum_dz_u = that of dz scale u.

    x, dy, scale, centre, bias: as of `_group_gradient`; sum_dz, sum_dz_u: fp32 [images, tiles, channels].
    """
    _, channel, mask, channel_mask, u, dz, k = _group_gradient(
        x, dy, scale=scale, centre=centre, bias=bias, pixels=pixels, channels=channels,
        SILU=SILU, ROWS=ROWS, COLUMNS=COLUMNS,
    )  # fmt: skip
    out = (tl.program_id(2) * tl.num_programs(0) + tl.program_id(0)) * channels + channel
    dz = tl.where(mask, dz * k, 0.0)
    tl.store(sum_dz + out, tl.sum(dz, axis=0)[None, :], mask=channel_mask)
    tl.store(sum_dz_u + out, tl.sum(dz * u, axis=0)[None, :], mask=channel_mask)


@triton.jit
def _merge_gradient_kernel(
    sum_dz, sum_dz_u, inverse, offset, slope, tiles, pixels, channels, SIZE, TILES: tl.constexpr, WIDTH: tl.constexpr
):  # fmt: skip
    """Of every group: offset = mean of dz scale, slope = inverse^2 times the mean of dz scale u.

    sum_dz, sum_dz_u: fp32 [images, tiles, channels]; inverse, offset, slope: fp32 [images, groups].
    """
    first = tl.zeros((TILES, WIDTH), dtype=tl.float32)
    second = tl.zeros((TILES, WIDTH), dtype=tl.float32)
    for start in range(0, tiles, TILES):
        _, offsets, mask = _group_tiles(start, tiles, channels, SIZE=SIZE, TILES=TILES, WIDTH=WIDTH)
        first += tl.load(sum_dz + offsets, mask=mask, other=0.0)
        second += tl.load(sum_dz_u + offsets, mask=mask, other=0.0)
    group = tl.program_id(1) * tl.num_programs(0) + tl.program_id(0)
    total = pixels * SIZE
    r = tl.load(inverse + group)
    tl.store(offset + group, tl.sum(tl.sum(first, axis=1), axis=0) / total)
    tl.store(slope + group, tl.sum(tl.sum(second, axis=1), axis=0) / total * r * r)


@triton.jit
def _group_norm_backward_kernel(
    x, dy, scale, centre, bias, offset, slope, dx, pixels, channels, SIZE,
    SILU: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """dx = dz scale - offset - slope u.

    x, dy, scale, centre, bias: as of `_group_gradient`; offset, slope: fp32 [images, groups].
    dx: [images, pixels, channels].
    """
    offsets, channel, mask, channel_mask, u, dz, k = _group_gradient(
        x, dy, scale=scale, centre=centre, bias=bias, pixels=pixels, channels=channels,
        SILU=SILU, ROWS=ROWS, COLUMNS=COLUMNS,
    )  # fmt: skip
    group = tl.program_id(2) * (channels // SIZE) + channel // SIZE
    a = tl.load(offset + group, mask=channel_mask, other=0.0)
    b = tl.load(slope + group, mask=channel_mask, other=0.0)
    tl.store(dx + offsets, dz * k - a - b * u, mask=mask)


class _Tiling(NamedTuple):
    """How a batch of images is cut: [images, pixels, channels] into tiles [rows, COLUMNS], and channels into groups."""

    images: int
    pixels: int
    channels: int
    groups: int
    rows: int

    @classmethod
    def of(cls, x: torch.Tensor, groups: int) -> "_Tiling":
        """For x [images, channels, height, width]: few tiles for large images, many for small ones."""
        images, channels, height, width = x.shape
        pixels = height * width
        return cls(images, pixels, channels, groups, max(32, triton.next_power_of_2(triton.cdiv(pixels, 256))))

    @property
    def tiles(self):
        """Tiles of one image, from top to bottom."""
        return triton.cdiv(self.pixels, self.rows)

    @property
    def size(self):
        """Channels of a group."""
        return self.channels // self.groups

    @property
    def grid(self):
        """A program for every tile."""
        return self.tiles, triton.cdiv(self.channels, COLUMNS), self.images

    @property
    def image(self):
        """Arguments of the kernels that work on tiles."""
        return dict(pixels=self.pixels, channels=self.channels, ROWS=self.rows, COLUMNS=COLUMNS)

    @property
    def group(self):
        """Arguments of the kernels that merge the tiles of a group."""
        sizes = dict(tiles=self.tiles, pixels=self.pixels, channels=self.channels, SIZE=self.size)
        return dict(**sizes, TILES=TILES, WIDTH=triton.next_power_of_2(self.size))


class _GroupNorm(torch.autograd.Function):
    """Keeps x, and the few numbers of its groups, for the backward pass."""

    @staticmethod
    def forward(ctx, x, norm, silu, shift):
        x = x.contiguous(memory_format=torch.channels_last)
        shift_or_any = x if shift is None else shift.contiguous()
        tiling = _Tiling.of(x, norm.num_groups)
        images, channels = x.shape[:2]
        new = lambda *shape: torch.empty(shape, device=x.device, dtype=torch.float32)  # noqa: E731

        # moments of every tile, then of every group
        mean, deviation = new(images, tiling.tiles, channels), new(images, tiling.tiles, channels)
        scale, centre, inverse = new(images, channels), new(images, channels), new(images, norm.num_groups)
        moments = dict(mean=mean, deviation=deviation, SHIFT=shift is not None)
        _moments_kernel[tiling.grid](x, shift_or_any, **moments, **tiling.image)
        _merge_moments_kernel[(norm.num_groups, images)](
            **moments, weight=norm.weight, shift=shift_or_any, scale=scale, centre=centre, inverse=inverse,
            eps=norm.eps, ROWS=tiling.rows, **tiling.group,
        )  # fmt: skip

        # y
        y = torch.empty_like(x)
        _group_norm_kernel[tiling.grid](x, scale, centre, norm.bias, y, SILU=silu, **tiling.image)
        ctx.save_for_backward(x, scale, centre, inverse)
        ctx.norm, ctx.silu, ctx.tiling = norm, silu, tiling
        return y

    @staticmethod
    def backward(ctx, dy):
        x, scale, centre, inverse = ctx.saved_tensors
        tiling, norm = ctx.tiling, ctx.norm
        dy = dy.contiguous(memory_format=torch.channels_last)
        given = dict(x=x, dy=dy, scale=scale, centre=centre, bias=norm.bias, SILU=ctx.silu)

        # sums of every tile, then means of every group
        sum_dz = torch.empty(len(x), tiling.tiles, x.shape[1], device=x.device, dtype=torch.float32)
        sum_dz_u = torch.empty_like(sum_dz)
        offset, slope = torch.empty_like(inverse), torch.empty_like(inverse)
        _gradient_sums_kernel[tiling.grid](**given, sum_dz=sum_dz, sum_dz_u=sum_dz_u, **tiling.image)
        _merge_gradient_kernel[(norm.num_groups, len(x))](
            sum_dz, sum_dz_u, inverse=inverse, offset=offset, slope=slope, **tiling.group
        )

        # dx
        dx = torch.empty_like(x)
        _group_norm_backward_kernel[tiling.grid](
            **given, offset=offset, slope=slope, dx=dx, SIZE=tiling.size, **tiling.image
        )
        dshift = dx.sum((2, 3)) if ctx.needs_input_grad[3] else None
        return dx, None, None, dshift


def group_norm(
    x: torch.Tensor, norm: torch.nn.GroupNorm, *, silu: bool = False, shift: torch.Tensor | None = None
) -> torch.Tensor:
    return _GroupNorm.apply(x, norm, silu, shift)
'''

# =================================================================================== common/fast/kernel_check.py

MODULES['common/fast/kernel_check.py'] = r'''
"""Kernels prove themselves at the start: a small launch of each, forward and backward, against its plain form in fp32.

Triton no longer supports every card that PyTorch does, and some machines have no C compiler or no Triton. A kernel that
cannot be compiled or launched, or is wrong on this card, costs speed and not the run: its operation stays plain.
"""

from collections.abc import Callable, Sequence

import torch

from common.errors import ran_out
from common.fast import operations
from common.fast.operations import Operation

# Largest error of an element, as a share of the largest element: some roundings of the dtype.
TOLERANCES = {torch.float32: 1e-4, torch.float16: 5e-3, torch.bfloat16: 4e-2}


def adopt_kernels(
    wanted: Sequence[Operation], device: torch.device, *, dtype: torch.dtype, rank: int = 16, say: Callable = print
) -> None:
    """Let operations compute by their kernels on a GPU, where these work; a line names those that do not, and why.

    On a CPU it does nothing.

    Args:
        wanted: the operations of the layers that will compute. What this process tried before is not tried again.
        dtype: of the frozen weights.
        rank: of the adapter.
    """
    if device.type == "cuda":
        try_kernels(wanted, device, dtype=dtype, rank=rank, say=say)


def try_kernels(
    wanted: Sequence[Operation], device: torch.device, *, dtype: torch.dtype, rank: int = 16, say: Callable = print
) -> None:
    """`adopt_kernels` on any device: Triton's interpreter runs kernels on a CPU."""
    tried = (str(device), dtype, rank)
    untried = [operation for operation in wanted if tried not in operation.faults]
    if untried:
        say(f"GPU kernels: compiling and checking {len(untried)}; up to a minute the first time, seconds later on")
    names_by_fault = {}
    for operation in untried:
        fault = operation.faults[tried] = _fault(operation, device, dtype, rank)
        names_by_fault.setdefault(fault, []).append(operation.__name__)
    for fault, names in names_by_fault.items():
        if fault is not None:
            say(f"GPU kernels: plain PyTorch, which is slower, in place of {', '.join(names)}: {fault}")
    for operation in wanted:
        operation.on_gpu = operation.plain if operation.faults[tried] else kernel_of(operation)


def refused() -> list[str]:
    """Names of the operations with a fault: with their plain forms a pass takes other time and memory."""
    return [operation.__name__ for operation in operations.EVERY_OPERATION if any(operation.faults.values())]


def kernel_of(operation: Operation) -> Callable:
    """The GPU's form of an operation.

    Raises:
        ImportError: there is no Triton.
    """
    from common.fast import group_norm_kernels, kernels, residual_kernels

    modules = kernels, group_norm_kernels, residual_kernels
    return next(vars(module)[operation.__name__] for module in modules if operation.__name__ in vars(module))


def _fault(operation, device, dtype, rank):
    """Why an operation's kernels cannot be used, or None."""
    attempt = ATTEMPTS[operation]
    try:
        found = attempt(kernel_of(operation), _Inputs(device, dtype), rank)
        expected = attempt(operation.plain, _Inputs(device, dtype, exact=True), rank)
        error = torch.stack([_error(*pair) for pair in zip(found, expected, strict=True)]).max().item()  # NaN stays NaN
    except Exception as fault:  # a compiler's, a driver's, a library's: each has classes of its own
        if ran_out(fault):
            raise
        return f"{type(fault).__name__}: {' '.join(str(fault).split())[:200]}"
    return None if error <= TOLERANCES[dtype] else f"wrong numbers, an error of {error:.2g}"


def _error(found, expected):
    """Largest difference as a share of the largest expected element."""
    return (found.double() - expected.double()).abs().max() / expected.double().abs().max()


class _Inputs:
    """Random tensors, always the same: in `dtype` for kernels, the same numbers in fp32 for the exact result."""

    def __init__(self, device, dtype, exact=False):
        self.device, self.dtype, self.exact = device, dtype, exact
        self.generator = torch.Generator().manual_seed(0)

    def __call__(self, *shape, dtype=None):
        values = torch.randn(shape, generator=self.generator).to(dtype or self.dtype)
        return values.to(self.device, torch.float32 if self.exact else values.dtype)

    def weights_of(self, norm):
        """`norm` with random frozen weights."""
        for name in ("weight", "bias"):
            setattr(norm, name, torch.nn.Parameter(self(*getattr(norm, name).shape), requires_grad=False))
        return norm


# One small launch of each, of shapes that SDXL has too: (form, source of inputs, rank) -> what is compared.


def _attempt_dropout(form, new, rank):
    x = new(64, 640)
    y = new(64, 640)
    seed = torch.tensor(7, device=x.device)
    return form(x, 0.1, seed, 3), form(x, 0.1, seed, 3, add_to=y, alpha=0.5)


def _attempt_geglu(form, new, rank):
    h = new(64, 2 * 2560).requires_grad_()
    y = form(h)
    y.backward(new(*y.shape))
    return y, h.grad


def _attempt_gain_backward(form, new, rank):
    dy, y, bias = new(512, 640), new(512, 640), new(640)
    gain, m, dm = (new(640, dtype=torch.float32) for _ in range(3))
    per_column = dict(gain=gain, m=m, dm=dm)
    return form(dy, y, bias=bias, **per_column), form(dy, y, bias=None, **per_column), dm


def _attempt_scale_rows(form, new, rank):
    return [form(new(64, 640), new(64, dtype=torch.float32))]


def _attempt_update_gain(form, new, rank):
    w, b = new(640, 640), new(640, rank)
    A, B, m, gain = (new(*shape, dtype=torch.float32) for shape in ((rank, 640), (640, rank), (640,), (640,)))
    form(w, A, B, m=m, scale=0.5, gain=gain, b=b)
    return gain, b


def _attempt_group_norm(form, new, rank):
    x, shift = new(2, 320, 32, 32).requires_grad_(), new(2, 320).requires_grad_()
    norm = new.weights_of(torch.nn.GroupNorm(32, 320))
    y, z = form(x, norm, silu=True, shift=shift), form(x, norm)
    torch.autograd.backward([y, z], [new(*x.shape), new(*x.shape)])
    return y, z, x.grad, shift.grad


def _attempt_add_norm(form, new, rank):
    h, a = new(64, 640).requires_grad_(), new(64, 640).requires_grad_()
    norm = new.weights_of(torch.nn.LayerNorm(640))
    outputs = [*form(h, a, norm), *form(h, None, norm)]
    torch.autograd.backward(outputs, [new(64, 640) for _ in outputs])
    return *outputs, h.grad, a.grad


def _attempt_add_bias(form, new, rank):
    x, h, bias = new(2, 320, 32, 32).requires_grad_(), new(2, 320, 32, 32).requires_grad_(), new(320)
    y = form(x, h, bias)
    y.backward(new(*y.shape))
    return y, x.grad, h.grad


ATTEMPTS = {
    operations.seeded_dropout: _attempt_dropout,
    operations.geglu: _attempt_geglu,
    operations.gain_backward: _attempt_gain_backward,
    operations.scale_rows: _attempt_scale_rows,
    operations.update_gain: _attempt_update_gain,
    operations.group_norm: _attempt_group_norm,
    operations.add_norm: _attempt_add_norm,
    operations.add_bias: _attempt_add_bias,
}
'''

# ======================================================================================== common/fast/kernels.py

MODULES['common/fast/kernels.py'] = r'''
"""Triton kernels of the adapter layers and of the gated activation; imported only where there is a GPU and Triton.

The functions below the kernels are the GPU's forms of the operations of the same names in operations.py, which says
what they compute and of what shapes. Every program works on one block or tile; what lies outside of a tensor is
masked.
"""

import functools

import torch
import triton
import triton.language as tl

from common.fast.operations import spread_salt

BLOCK = 1024


@triton.jit
def _dropout_kernel(x, add_to, out, seed, salt, n, p, alpha, ADD: tl.constexpr, BLOCK: tl.constexpr):
    """out = alpha / (1 - p) x where a hash of seed, salt and place says keep, else 0; plus add_to.

    x, add_to, out: [n]; seed: int64 scalar; salt, n, p, alpha: numbers.
    The integer hash is one of https://github.com/skeeto/hash-prospector.
    """
    offsets = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = offsets < n
    bits = offsets.to(tl.uint32) * 0x9E3779B9 + tl.load(seed).to(tl.uint32) + salt
    bits = (bits ^ (bits >> 16)) * 0x21F0AAAD
    bits = (bits ^ (bits >> 15)) * 0xD35A2D97
    uniform = ((bits ^ (bits >> 15)) >> 8).to(tl.float32) / 16777216.0
    result = tl.where(uniform >= p, tl.load(x + offsets, mask=mask).to(tl.float32) * (alpha / (1 - p)), 0.0)
    if ADD:
        result += tl.load(add_to + offsets, mask=mask).to(tl.float32)
    tl.store(out + offsets, result, mask=mask)


@triton.jit
def _load_halves(h, width, BLOCK: tl.constexpr):
    """Of this program's part of a row: column offsets, mask, value and gate in fp32.

    h: [rows, 2 width].
    """
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = column < width
    start = h + tl.program_id(0).to(tl.int64) * 2 * width
    value = tl.load(start + column, mask=mask).to(tl.float32)
    gate = tl.load(start + width + column, mask=mask).to(tl.float32)
    return column, mask, value, gate


@triton.jit
def _geglu_kernel(h, out, width, BLOCK: tl.constexpr):
    """out = value gelu(gate), with gelu(x) = x cdf(x) of the normal distribution (arXiv 1606.08415, eq. 1).

    h = [value, gate]: [rows, 2 width]; out: [rows, width].
    """
    column, mask, value, gate = _load_halves(h, width, BLOCK)
    cdf = 0.5 * (1 + tl.erf(gate * 0.7071067811865476))
    tl.store(out + tl.program_id(0).to(tl.int64) * width + column, value * gate * cdf, mask=mask)


@triton.jit
def _geglu_backward_kernel(dy, h, dh, width, BLOCK: tl.constexpr):
    """dh = dy [gelu(gate), value gelu'(gate)], with gelu'(x) = cdf(x) + x density(x).

    dy: [rows, width]; h, dh: [rows, 2 width].
    """
    column, mask, value, gate = _load_halves(h, width, BLOCK)
    row = tl.program_id(0).to(tl.int64)
    d = tl.load(dy + row * width + column, mask=mask).to(tl.float32)
    cdf = 0.5 * (1 + tl.erf(gate * 0.7071067811865476))
    density = tl.exp(-0.5 * gate * gate) * 0.3989422804014327
    start = dh + row * 2 * width
    tl.store(start + column, d * gate * cdf, mask=mask)
    tl.store(start + width + column, d * value * (cdf + gate * density), mask=mask)


@triton.jit
def _gain_backward_kernel(
    dy, y, bias, gain, m, scaled, partial, arrived, dm, rows, columns,
    BIAS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """scaled = dy gain; dm += the sum over the rows of dy (y - bias) / m (arXiv 2402.09353, section 4.3).

    dy, y, scaled: [rows, columns]; bias: [columns]; gain, m, dm: fp32 [columns].
    partial: fp32 [tiles of rows, columns], the sums of every tile.
    arrived: int32 [tiles of columns], 0 before and after.
    """
    # one tile
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)[:, None]
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    column_mask = column < columns
    offsets = row * columns + column[None, :]
    mask = (row < rows) & column_mask[None, :]
    d = tl.load(dy + offsets, mask=mask, other=0.0).to(tl.float32)
    u = tl.load(y + offsets, mask=mask, other=0.0).to(tl.float32)
    if BIAS:
        u -= tl.load(bias + column, mask=column_mask, other=0.0).to(tl.float32)[None, :]
    g = tl.load(gain + column, mask=column_mask, other=0.0)
    tl.store(scaled + offsets, d * g[None, :], mask=mask)
    tl.store(partial + tl.program_id(0) * columns + column, tl.sum(d * u, axis=0), mask=column_mask)

    # The atomic addition publishes what every thread of the program has stored.
    # The last program for these columns adds up all tiles.
    tl.debug_barrier()
    if tl.atomic_add(arrived + tl.program_id(1), 1) == tl.num_programs(0) - 1:
        sums = tl.zeros((PARTS, COLUMNS), dtype=tl.float32)
        for start in range(0, tl.num_programs(0), PARTS):
            part = start + tl.arange(0, PARTS)[:, None]
            part_mask = (part < tl.num_programs(0)) & column_mask[None, :]
            sums += tl.load(partial + part * columns + column[None, :], mask=part_mask, other=0.0)
        total = tl.sum(sums, axis=0) / tl.load(m + column, mask=column_mask, other=1.0)
        tl.store(dm + column, tl.load(dm + column, mask=column_mask, other=0.0) + total, mask=column_mask)
        tl.store(arrived + tl.program_id(1), 0)


@triton.jit
def _scale_rows_kernel(w, gain, out, columns, BLOCK: tl.constexpr):
    """out = diag(gain) w, one row a program.

    w, out: [rows, columns]; gain: fp32 [rows].
    """
    row = tl.program_id(0)
    column = tl.arange(0, BLOCK)
    mask = column < columns
    value = tl.load(w + row * columns + column, mask=mask).to(tl.float32) * tl.load(gain + row)
    tl.store(out + row * columns + column, value, mask=mask)


@triton.jit
def _gain_kernel(
    w, A, B, m, gain, b, scale, rows, columns, rank, RANK: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr
):  # fmt: skip
    """gain = m / the norms of the rows of w + scale B A; b = diag(gain) B. A group of rows a program, tile by tile.

    w: [rows, columns]; A: fp32 [rank, columns]; B: fp32 [rows, rank].
    m, gain: fp32 [rows]; b: [rows, rank]. DoRA's m / n: arXiv 2402.09353, eq. 5.
    """
    # B, of all columns of this program's rows
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    row_mask = row < rows
    j = tl.arange(0, RANK)
    j_mask = j < rank
    b_offsets = row[:, None] * rank + j[None, :]
    b_mask = row_mask[:, None] & j_mask[None, :]
    of_b = tl.load(B + b_offsets, mask=b_mask, other=0.0)

    # squares of w + scale B A; tf32x3 is as exact as fp32, and before sm_80 it is fp32
    squares = tl.zeros((ROWS, COLUMNS), dtype=tl.float32)
    for start in range(0, columns, COLUMNS):
        column = start + tl.arange(0, COLUMNS)
        column_mask = column < columns
        a_mask = j_mask[:, None] & column_mask[None, :]
        w_mask = row_mask[:, None] & column_mask[None, :]
        of_a = tl.load(A + j[:, None] * columns + column[None, :], mask=a_mask, other=0.0)
        of_w = tl.load(w + row[:, None] * columns + column[None, :], mask=w_mask, other=0.0).to(tl.float32)
        value = of_w + scale * tl.dot(of_b, of_a, input_precision="tf32x3")
        squares += value * value

    # the gain, and B with it
    g = tl.load(m + row, mask=row_mask, other=0.0) / tl.sqrt(tl.sum(squares, axis=1))
    tl.store(gain + row, g, mask=row_mask)
    tl.store(b + b_offsets, of_b * g[:, None], mask=b_mask)


def seeded_dropout(
    x: torch.Tensor,
    p: float,
    seed: torch.Tensor,
    salt: int,
    *,
    add_to: torch.Tensor | None = None,
    alpha: float = 1.0,
) -> torch.Tensor:
    x = x.contiguous()
    n = x.numel()
    out = torch.empty_like(x) if add_to is None else add_to
    grid = (triton.cdiv(n, BLOCK),)
    _dropout_kernel[grid](
        x, out, out, seed, spread_salt(salt), n=n, p=p, alpha=alpha, ADD=add_to is not None, BLOCK=BLOCK
    )
    return out


class _Geglu(torch.autograd.Function):
    """Keeps only h for the backward pass."""

    @staticmethod
    def forward(ctx, h):
        h = h.contiguous()
        ctx.save_for_backward(h)
        width = h.shape[-1] // 2
        out = h.new_empty(*h.shape[:-1], width)
        _geglu_kernel[(out.numel() // width, triton.cdiv(width, BLOCK))](h, out, width, BLOCK=BLOCK)
        return out

    @staticmethod
    def backward(ctx, dy):
        (h,) = ctx.saved_tensors
        dy = dy.contiguous()
        dh = torch.empty_like(h)
        width = dy.shape[-1]
        _geglu_backward_kernel[(dy.numel() // width, triton.cdiv(width, BLOCK))](dy, h, dh, width, BLOCK=BLOCK)
        return dh


geglu = _Geglu.apply


def gain_backward(
    dy: torch.Tensor,
    y: torch.Tensor,
    *,
    bias: torch.Tensor | None,
    gain: torch.Tensor,
    m: torch.Tensor,
    dm: torch.Tensor,
) -> torch.Tensor:
    rows, columns = dy.shape
    scaled = torch.empty_like(dy)
    grid = triton.cdiv(rows, 128), triton.cdiv(columns, 64)
    partial = torch.empty(grid[0], columns, device=dy.device, dtype=torch.float32)
    sums = dict(partial=partial, arrived=_arrivals(dy.device), dm=dm)
    sizes = dict(rows=rows, columns=columns, BIAS=bias is not None, ROWS=128, COLUMNS=64, PARTS=128)
    bias_or_any = dy if bias is None else bias
    _gain_backward_kernel[grid](dy, y, bias=bias_or_any, gain=gain, m=m, scaled=scaled, **sums, **sizes)
    return scaled


@functools.lru_cache
def _arrivals(device):
    """Counters that are 0 between kernels; more of them than any layer has groups of 64 columns."""
    return torch.zeros(4096, device=device, dtype=torch.int32)


def scale_rows(w: torch.Tensor, gain: torch.Tensor) -> torch.Tensor:
    out = torch.empty_like(w)
    _scale_rows_kernel[(len(w),)](w, gain, out, w.shape[1], BLOCK=triton.next_power_of_2(w.shape[1]))
    return out


def update_gain(
    w: torch.Tensor,
    A: torch.Tensor,
    B: torch.Tensor,
    *,
    m: torch.Tensor,
    scale: float,
    gain: torch.Tensor,
    b: torch.Tensor,
) -> None:
    rows, columns = w.shape
    padded = max(16, triton.next_power_of_2(len(A)))
    sizes = dict(rows=rows, columns=columns, rank=len(A))
    tile = dict(RANK=padded, ROWS=16, COLUMNS=max(16, 4096 // padded))  # of A it fits the shared memory of any card
    _gain_kernel[(triton.cdiv(rows, 16),)](w, A, B, m=m, gain=gain, b=b, scale=scale, **sizes, **tile, num_warps=4)
'''

# ===================================================================================== common/fast/operations.py

MODULES['common/fast/operations.py'] = r'''
"""Operations that kernels compute in fewer passes over memory: seeded dropout, GEGLU, DoRA's gains, normalisations.

Every operation has two forms. The plain one below computes anywhere. The kernels of the same name in kernels.py,
group_norm_kernels.py and residual_kernels.py take its place on a GPU, once kernel_check.py has found that they
compute the same there.
"""

import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F


class Operation:
    """A function whose first argument says where it computes.

    Attributes:
        plain: its form in PyTorch. On a GPU it neither waits nor draws random numbers: a CUDA graph can hold it.
        on_gpu: the form that a GPU computes, `plain` until kernels are found to work.
        faults: {what was tried, see kernel_check: why its kernels cannot be used there, or None}.
    """

    def __init__(self, plain: Callable) -> None:
        functools.update_wrapper(self, plain)
        self.plain = self.on_gpu = plain
        self.faults = {}

    def __call__(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        return (self.on_gpu if x.is_cuda else self.plain)(x, *args, **kwargs)


@Operation
def seeded_dropout(
    x: torch.Tensor,
    p: float,
    seed: torch.Tensor,
    salt: int,
    *,
    add_to: torch.Tensor | None = None,
    alpha: float = 1.0,
) -> torch.Tensor:
    """d(x): each element zeroed with probability p, the others divided by 1 - p.

    d is a linear function of x and its own transpose.
    Nothing is stored for the backward pass, and a replayed CUDA graph or a recomputed block makes the same mask again.

    Args:
        x: tensor of any shape.
        seed: int64 scalar tensor on x's device, read when the GPU computes.
        salt: integer that differs between layers.
        add_to: when given, it becomes add_to + alpha d(x), in place.
    """
    keep = _uniform(x.numel(), seed, salt).view(x.shape) >= p
    dropped = torch.where(keep, x.float() * (alpha / (1 - p)), 0.0)
    return dropped.to(x.dtype) if add_to is None else add_to.add_(dropped)


def _uniform(count, seed, salt):
    """fp32 [count] in [0, 1): a hash of seed, salt and position, see https://github.com/skeeto/hash-prospector.

    The hash is one of unsigned 32-bit integers, for which PyTorch has few operations: these are the low bits of int64.
    """
    bits_32 = 0xFFFFFFFF
    bits = torch.arange(count, device=seed.device) * 0x9E3779B9 + (seed & bits_32) + spread_salt(salt) & bits_32
    bits = (bits ^ bits >> 16) * 0x21F0AAAD & bits_32
    bits = (bits ^ bits >> 15) * 0xD35A2D97 & bits_32
    return ((bits ^ bits >> 15) >> 8).float() / 2**24


def spread_salt(salt: int) -> int:
    """31 bits that differ widely between neighbouring layers."""
    return salt * 0x5EBCA6B % 2**31


@Operation
def geglu(h: torch.Tensor) -> torch.Tensor:
    """value * gelu(gate) of h = [value, gate] along the last dimension: [..., 2D] -> [..., D] (arXiv 2002.05202)."""
    value, gate = h.chunk(2, dim=-1)
    return value * F.gelu(gate)


@Operation
def gain_backward(
    dy: torch.Tensor,
    y: torch.Tensor,
    *,
    bias: torch.Tensor | None,
    gain: torch.Tensor,
    m: torch.Tensor,
    dm: torch.Tensor,
) -> torch.Tensor:
    """diag(gain) dy in dy's dtype, the gradient before the gain; dm += sum over rows of dy (y - bias) / m, in place.

    dm is the gradient of the magnitude m (arXiv 2402.09353, section 4.3).
    One call at a time: the kernels of all calls share their counters.

    Args:
        dy, y: [M, N]; bias: [N] or None; gain, m, dm: fp32 [N].
    """
    u = y.float() if bias is None else y.float() - bias
    dm.addcdiv_((dy * u).sum(0), m)
    return (dy * gain).to(dy.dtype)


@Operation
def scale_rows(w: torch.Tensor, gain: torch.Tensor) -> torch.Tensor:
    """diag(gain) w in w's dtype, rounded once: [N, K], fp32 [N] -> [N, K]."""
    return (w * gain[:, None]).to(w.dtype)


def row_norms(w: torch.Tensor, A: torch.Tensor, B: torch.Tensor, scale: float) -> torch.Tensor:
    """n: the norms of the rows of w + scale B A, in fp32. [N, K], fp32 [r, K], fp32 [N, r] -> [N].

    By n^2 = ||w||^2 + 2 s rowsum((w A^T) o B) + s^2 rowsum((B A A^T) o B), which needs no second matrix like w.
    """
    w = w.float()
    return (w.square().sum(1) + 2 * scale * ((w @ A.t()) * B).sum(1) + scale**2 * ((B @ (A @ A.t())) * B).sum(1)).sqrt()


@Operation
def update_gain(
    w: torch.Tensor,
    A: torch.Tensor,
    B: torch.Tensor,
    *,
    m: torch.Tensor,
    scale: float,
    gain: torch.Tensor,
    b: torch.Tensor,
) -> None:
    """gain = m / n and b = diag(gain) B, in place; n as in `row_norms` (arXiv 2402.09353, eq. 5).

    Args:
        w: [N, K]; A: fp32 [r, K]; B: fp32 [N, r]; m, gain: fp32 [N]; b: [N, r] in w's dtype.
    """
    torch.div(m, row_norms(w, A, B, scale), out=gain)
    b.copy_(B * gain[:, None])


@Operation
def group_norm(
    x: torch.Tensor, norm: torch.nn.GroupNorm, *, silu: bool = False, shift: torch.Tensor | None = None
) -> torch.Tensor:
    """silu(GroupNorm(x + shift)), with silu and shift as asked for.

    Args:
        x: [B, C, H, W]; channels-last on a GPU.
        norm: torch.nn.GroupNorm whose parameters need no gradient.
        shift: [B, C] or None.
    """
    x = x if shift is None else x + shift[:, :, None, None]
    y = F.group_norm(x, norm.num_groups, norm.weight, norm.bias, norm.eps)
    return F.silu(y) if silu else y


@Operation
def add_norm(h: torch.Tensor, a: torch.Tensor | None, norm: torch.nn.LayerNorm) -> tuple[torch.Tensor, torch.Tensor]:
    """(h + a, LayerNorm(h + a)), or (h, LayerNorm(h)) when a is None; both [..., C].

    The parameters of `norm` need no gradient.
    """
    total = h if a is None else a + h
    return total, norm(total)


@Operation
def add_bias(x: torch.Tensor, h: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    """x + h + bias: [B, C, H, W], the same, and [C], which needs no gradient."""
    return x + (h + bias[:, None, None])


OF_DORA = (gain_backward, scale_rows, update_gain)
OF_THE_UNET = (geglu, group_norm, add_norm, add_bias)
EVERY_OPERATION = (seeded_dropout, *OF_DORA, *OF_THE_UNET)
'''

# =============================================================================== common/fast/residual_kernels.py

MODULES['common/fast/residual_kernels.py'] = r'''
"""Triton kernels of what is added to a residual stream: LayerNorm with the sum before it, and a sum with a bias.

The weights are frozen, so the backward pass gives the gradient of the input only. LayerNorm keeps nothing but its
input; its sums are in fp32 over deviations from the mean. The functions below the kernels are the GPU's forms of the
operations of the same names in operations.py.
"""

import torch
import triton
import triton.language as tl

BLOCK = 1024


@triton.jit
def _add_norm_kernel(h, a, weight, bias, total, y, width, eps, ADD: tl.constexpr, BLOCK: tl.constexpr):
    """total = h + a, y = LayerNorm(total) (arXiv 1607.06450, eq. 3), one row a program.

    h, a, total, y: [rows, width]; weight, bias: [width].
    """
    column = tl.arange(0, BLOCK)
    mask = column < width
    offsets = tl.program_id(0).to(tl.int64) * width + column
    value = tl.load(h + offsets, mask=mask, other=0.0).to(tl.float32)
    if ADD:
        value += tl.load(a + offsets, mask=mask, other=0.0).to(tl.float32)
        tl.store(total + offsets, value, mask=mask)
        # what is stored is what the backward pass will see
        value = value.to(total.dtype.element_ty).to(tl.float32)
    residual = tl.where(mask, value - tl.sum(value, axis=0) / width, 0.0)
    r = tl.rsqrt(tl.sum(residual * residual, axis=0) / width + eps)
    w = tl.load(weight + column, mask=mask, other=0.0).to(tl.float32)
    b = tl.load(bias + column, mask=mask, other=0.0).to(tl.float32)
    tl.store(y + offsets, residual * r * w + b, mask=mask)


@triton.jit
def _add_norm_backward_kernel(total, dy, dtotal, weight, dx, width, eps, BLOCK: tl.constexpr):
    """dx = dtotal + the gradient through LayerNorm(total), one row a program.

    total, dy, dtotal, dx: [rows, width]; weight: [width].
    """
    column = tl.arange(0, BLOCK)
    mask = column < width
    offsets = tl.program_id(0).to(tl.int64) * width + column
    value = tl.load(total + offsets, mask=mask, other=0.0).to(tl.float32)
    residual = tl.where(mask, value - tl.sum(value, axis=0) / width, 0.0)
    r = tl.rsqrt(tl.sum(residual * residual, axis=0) / width + eps)
    w = tl.load(weight + column, mask=mask, other=0.0).to(tl.float32)
    g = tl.load(dy + offsets, mask=mask, other=0.0).to(tl.float32) * w
    g = r * (g - tl.sum(g, axis=0) / width - residual * r * r * tl.sum(g * residual, axis=0) / width)
    tl.store(dx + offsets, g + tl.load(dtotal + offsets, mask=mask, other=0.0).to(tl.float32), mask=mask)


@triton.jit
def _add_bias_kernel(x, h, bias, y, channels, n, BLOCK: tl.constexpr):
    """y = x + h + bias, one block a program.

    x, h, y: [n], channels last; bias: [channels].
    """
    offsets = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = offsets < n
    value = tl.load(x + offsets, mask=mask).to(tl.float32) + tl.load(h + offsets, mask=mask).to(tl.float32)
    tl.store(y + offsets, value + tl.load(bias + offsets % channels, mask=mask).to(tl.float32), mask=mask)


class _AddNorm(torch.autograd.Function):
    """Keeps only the sum for the backward pass."""

    @staticmethod
    def forward(ctx, h, a, norm):
        h = h.contiguous()
        a_or_any = h if a is None else a.contiguous()
        total = h if a is None else torch.empty_like(h)
        y = torch.empty_like(h)
        width = h.shape[-1]
        sizes = dict(width=width, eps=norm.eps, ADD=a is not None, BLOCK=triton.next_power_of_2(width))
        _add_norm_kernel[(h.numel() // width,)](
            h, a_or_any, weight=norm.weight, bias=norm.bias, total=total, y=y, **sizes
        )
        ctx.save_for_backward(total)
        ctx.norm, ctx.added = norm, a is not None
        return total, y

    @staticmethod
    def backward(ctx, dtotal, dy):
        (total,) = ctx.saved_tensors
        width = dy.shape[-1]
        dx = torch.empty_like(total)
        sizes = dict(width=width, eps=ctx.norm.eps, BLOCK=triton.next_power_of_2(width))
        _add_norm_backward_kernel[(total.numel() // width,)](
            total, dy.contiguous(), dtotal=dtotal.contiguous(), weight=ctx.norm.weight, dx=dx, **sizes
        )
        return dx, dx if ctx.added else None, None


add_norm = _AddNorm.apply


class _AddBias(torch.autograd.Function):
    """Keeps nothing for the backward pass."""

    @staticmethod
    def forward(ctx, x, h, bias):
        x = x.contiguous(memory_format=torch.channels_last)
        h = h.contiguous(memory_format=torch.channels_last)
        y = torch.empty_like(x)
        n = x.numel()
        _add_bias_kernel[(triton.cdiv(n, BLOCK),)](x, h, bias, y, channels=x.shape[1], n=n, BLOCK=BLOCK)
        return y

    @staticmethod
    def backward(ctx, dy):
        return dy, dy, None


add_bias = _AddBias.apply
'''

# =============================================================================================== common/files.py

MODULES['common/files.py'] = r'''
"""Files that a reader finds whole or not at all, on the disk before they count.

safetensors files know when a byte has changed.
"""

import contextlib
import errno
import json
import os
import re
import shutil
import uuid
from collections.abc import Iterator
from pathlib import Path

import torch
import xxhash
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from common.errors import UserError

# Key in a safetensors file's metadata: {tensor name: hash}, and the hash of the other metadata under "".
HASHES = "xxh3_64"
# What file systems answer that cannot sync a folder.
NO_FOLDER_SYNC = (errno.EINVAL, errno.ENOSYS, errno.ENOTSUP, errno.EBADF)


class DamagedFile(UserError):
    """A file that is not what was written."""


# ---------------------------------------------------------------- whole or absent


def partial_name(path: Path) -> Path:
    """A name beside `path` that no other process uses, to write to until it can take the place of `path`."""
    return path.with_name(f"{path.name}.{os.getpid()}-{uuid.uuid4().hex[:8]}.partial")


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """The name to write to: afterwards it is on the disk and takes the place of `path`; after an error it is gone."""
    partial = partial_name(path)
    try:
        yield partial
        _sync(partial)
        os.replace(partial, path)
        _sync(path.parent)
    finally:
        with contextlib.suppress(OSError):  # that of the block itself says more
            partial.unlink(missing_ok=True)


@contextlib.contextmanager
def replacing_folder(folder: Path) -> Iterator[Path]:
    """The same for a folder, which is yet to be made; one that has the name already is removed."""
    partial = partial_name(folder)
    try:
        yield partial
        _sync(partial)
        if folder.exists():
            remove_folder(folder, replaced_by=partial)
        else:
            partial.rename(folder)
        _sync(folder.parent)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def remove_folder(folder: Path, replaced_by: Path | None = None) -> None:
    """Remove a folder so that it is whole or absent at every instant; another one may take its name."""
    doomed = partial_name(folder)
    folder.rename(doomed)
    if replaced_by is not None:
        replaced_by.rename(folder)
    shutil.rmtree(doomed)


def _sync(path: Path) -> None:
    """Wait until a file, or the names in a folder, would outlast a power cut (fsync).

    Windows has no such call for folders.
    """
    if path.is_dir() and os.name == "nt":
        return
    descriptor = os.open(path, os.O_RDONLY if os.name != "nt" else os.O_RDWR)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if not (path.is_dir() and error.errno in NO_FOLDER_SYNC):
            raise
    finally:
        os.close(descriptor)


def write_json(path: Path, value) -> None:
    """Write JSON so that a reader finds the old file or the new one, never a part."""
    with replacing(path) as partial:
        partial.write_text(json.dumps(value, indent=2) + "\n")


# ---------------------------------------------------------------- tensors


def write_safetensors(path: Path, tensors: dict, metadata: dict | None = None) -> None:
    """The same for tensors, with a hash of each in the metadata.

    Raises:
        OSError: where it cannot be written; safetensors has an error of its own for that, with the number in its text.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    copies = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}
    metadata = metadata or {}
    hashes = {"": _hash_of_metadata(metadata), **{name: _hash(name, tensor) for name, tensor in copies.items()}}
    with replacing(path) as partial:
        try:
            save_file(copies, partial, {**metadata, HASHES: json.dumps(hashes)})
        except SafetensorError as error:
            number = re.search(r"os error (\d+)", str(error))
            if number is None:
                raise
            raise OSError(int(number[1]), os.strerror(int(number[1])), str(path)) from None
        partial.chmod(0o644)  # safetensors makes its files unreadable for others


def read_safetensors(path: Path, *, from_anywhere: bool = False) -> tuple[dict, dict]:
    """({name: tensor on the CPU}, metadata) of a safetensors file, each tensor as it was written.

    Args:
        from_anywhere: another tool may have written it and copied our metadata into it;
            it is then read as one without hashes.
    Raises:
        DamagedFile: naming the file and what in it has changed.
    """
    try:
        with safe_open(path, "pt") as opened:
            if damaged := first_damage(opened, from_anywhere=from_anywhere):
                raise DamagedFile(f"{path}: damaged, {damaged} is not what was written; make it or copy it again")
            return {name: opened.get_tensor(name) for name in opened.keys()}, opened.metadata() or {}
    except SafetensorError as error:
        raise DamagedFile(f"{path}: damaged or not a safetensors file ({error}); make it or copy it again") from None


def first_damage(opened, *, from_anywhere: bool = False) -> str | None:
    """What in an open safetensors file is not as it was written; None where all is, and where the file has no hashes.

    With `from_anywhere` a file in which no matrix agrees is one of another tool, which kept our metadata:
    it has no hashes of its own.
    """
    metadata = dict(opened.metadata() or {})
    try:
        hashes = dict(json.loads(metadata.pop(HASHES, "{}")))
    except (ValueError, TypeError):
        return "its metadata"
    if not hashes:
        return None

    # Compare what is there with what was written.
    names = set(opened.keys())
    wrong = [
        name for name in hashes if name and (name not in names or _hash(name, opened.get_tensor(name)) != hashes[name])
    ]
    matrices = {name for name in names if len(shape := opened.get_slice(name).get_shape()) > 1 and all(shape)}
    if from_anywhere and len(matrices) > 1 and matrices <= set(wrong):
        return None
    if wrong:
        return wrong[0]
    return None if hashes.get("") == _hash_of_metadata(metadata) else "its metadata"


def _hash(name: str, tensor: torch.Tensor) -> str:
    digest = xxhash.xxh3_64(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
    digest.update(tensor.reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def _hash_of_metadata(metadata: dict) -> str:
    return xxhash.xxh3_64_hexdigest(json.dumps(metadata, sort_keys=True).encode())


def save_png(path, image, text):
    """Write a PIL image as PNG with `text` {chunk name: str} in it; a reader finds all of it or nothing."""
    from PIL.PngImagePlugin import PngInfo

    info = PngInfo()
    for name, value in text.items():
        info.add_text(name, value)
    with replacing(path) as partial:
        image.save(partial, format="PNG", pnginfo=info)
'''

# ====================================================================================== common/model/__init__.py

MODULES['common/model/__init__.py'] = r'''
"""SDXL and its adapter on the device: loading, weights, what the model predicts, noise, out of memory."""
'''

# ====================================================================================== common/model/adapters.py

MODULES['common/model/adapters.py'] = r'''
"""Which layers get an adapter, and where its numbers lie: in one flat fp32 buffer that PEFT's parameters view."""

import contextlib
from collections.abc import Iterable, Iterator, Sequence

import torch

from common.errors import UserError
from common.model.device import side_by_side

TEXT_PROJECTIONS = ["q_proj", "k_proj", "v_proj", "out_proj"]


def add_lora(
    unet: torch.nn.Module,
    targets: Sequence[str],
    rank: int,
    alpha: float,
    dropout: float = 0.0,
    use_dora: bool = False,
) -> None:
    """Give every UNet layer whose name ends in one of `targets` a PEFT adapter, with fp32 weights on whatever base.

    A is initialised from torch's global CPU generator (seed it first), B with zeros. PEFT owns names and config.
    Raises:
        UserError: a target that matches no layer, or one that cannot be adapted.
    """
    from diffusers.training_utils import cast_training_params
    from peft import LoraConfig
    from peft.tuners.tuners_utils import BaseTunerLayer

    # every target is a layer that can have one
    adaptable = (torch.nn.Linear, torch.nn.Conv2d, BaseTunerLayer)
    for target in targets:
        found = [module for name, module in unet.named_modules() if name == target or name.endswith(f".{target}")]
        if not found:
            raise UserError(f"--lora_target_modules {target}: no layer of this UNet has a name that ends so")
        if other := [type(module).__name__ for module in found if not isinstance(module, adaptable)]:
            raise UserError(
                f"--lora_target_modules {target}: only linear layers and convolutions can have an adapter, "
                f"this is a {other[0]}"
            )

    # in fp32: on an fp16 base PEFT makes fp16 weights, which turn NaN after one step
    config = LoraConfig(r=rank, lora_alpha=alpha, lora_dropout=dropout, target_modules=list(targets), use_dora=use_dora)
    unet.add_adapter(config)
    cast_training_params(unet, torch.float32)


def add_text_lora(encoders: Iterable[torch.nn.Module], rank: int, alpha: float, dropout: float = 0.0) -> None:
    """The same for the attention projections of the text encoders; plain LoRA, as diffusers cannot reload DoRA there.

    By PEFT itself: transformers' add_adapter asks for the newest PEFT, that of 5.24.0 for one that does not exist.
    """
    from diffusers.training_utils import cast_training_params
    from peft import LoraConfig, inject_adapter_in_model

    for encoder in encoders:
        config = LoraConfig(r=rank, lora_alpha=alpha, lora_dropout=dropout, target_modules=TEXT_PROJECTIONS)
        inject_adapter_in_model(config, encoder)
        cast_training_params(encoder, torch.float32)
        encoder.train()


def trainable(module: torch.nn.Module) -> list[tuple[str, torch.nn.Parameter]]:
    """[(name, parameter)] of what will be trained."""
    return [(name, parameter) for name, parameter in module.named_parameters() if parameter.requires_grad]


def count(module: torch.nn.Module) -> int:
    """All parameters of a module, adapters included; 4-bit weights count as the numbers they hold, two to a byte."""
    return sum(p.numel() * (2 if p.dtype == torch.uint8 else 1) for p in module.parameters())


@contextlib.contextmanager
def without_dropout(modules: Iterable[torch.nn.Module]) -> Iterator[None]:
    """Inside, `modules` compute as they will after training."""
    training = [module for module in modules if module.training]
    for module in training:
        module.eval()
    try:
        yield
    finally:
        for module in training:
            module.train()


class FlatParameters:
    """All trainable numbers in one fp32 buffer and all their gradients in another.

    Norm, clipping, zeroing, all-reduce, EMA and saving are then one operation each, and an optimizer has one parameter
    per group instead of 1,120.

    Args:
        groups: [(named parameters, options)]; options are those of a torch optimizer's group (lr, weight_decay).
        dtype: in which the forward pass computes; a copy of the buffer in it is renewed by `publish`.
    """

    def __init__(self, groups: list[tuple[list, dict]], dtype: torch.dtype = torch.float32) -> None:
        named = [pair for pairs, _ in groups for pair in pairs]
        self.layout = [(name, tuple(parameter.shape)) for name, parameter in named]
        self.data = torch.cat([parameter.detach().float().flatten() for _, parameter in named])
        self.grad = torch.zeros_like(self.data)
        self._compute = self.data if dtype == torch.float32 else self.data.to(dtype)

        # PEFT's parameters become views
        self._parts = {}
        start = 0
        for _, parameter in named:
            part = self._parts[parameter] = slice(start, start := start + parameter.numel())
            parameter.data = self.data[part].view_as(parameter)
            parameter.grad = self.grad[part].view_as(parameter)

        # the optimizer's groups are longer views
        self.groups = []
        start = 0
        for pairs, options in groups:
            part = slice(start, start := start + sum(parameter.numel() for _, parameter in pairs))
            flat = torch.nn.Parameter(self.data[part])
            flat.grad = self.grad[part]
            self.groups.append({"params": [flat], **options})

        self.followers = []  # what else is derived from the parameters: functions that `publish` calls

    def __len__(self) -> int:
        return self.data.numel()

    def compute_copy(self, parameter: torch.nn.Parameter) -> torch.Tensor:
        """The view of a parameter in the compute dtype; it follows the parameter at every `publish`."""
        return self._compute[self._parts[parameter]].view_as(parameter)

    @torch.no_grad()
    def publish(self) -> None:
        """After the numbers changed: renew everything that is derived from them."""
        if self._compute is not self.data:
            self._compute.copy_(self.data)
        side_by_side(self.followers, self.data.device)


def make_optimizer(
    flat: FlatParameters,
    use_8bit: bool,
    lr: float,
    betas: tuple[float, float],
    weight_decay: float,
    eps: float,
) -> torch.optim.Optimizer:
    """AdamW over the flat groups: torch's, fused on a GPU, or bitsandbytes' with 8-bit state."""
    options = dict(lr=lr, betas=betas, weight_decay=weight_decay, eps=eps)
    if use_8bit:
        import bitsandbytes

        return bitsandbytes.optim.AdamW8bit(flat.groups, **options)
    return torch.optim.AdamW(flat.groups, **options, fused=flat.data.is_cuda)


class EMA:
    """Exponential moving average of the flat buffer, with the ramp min(decay, (1 + step) / (10 + step)).

    Without the ramp a decay of 0.9999 would still be 74 % initialisation after 3,000 steps.
    """

    def __init__(self, flat: FlatParameters, decay: float) -> None:
        self.flat = flat
        self.decay = decay
        self.average = flat.data.clone()

    def update(self, step: int) -> None:
        """Once per optimizer step; `step` counts from 1."""
        self.average.lerp_(self.flat.data, 1 - min(self.decay, (1 + step) / (10 + step)))

    @contextlib.contextmanager
    def applied(self) -> Iterator[None]:
        """Inside, the adapter computes with the average; the trained values come back afterwards, bit for bit."""
        trained = self.flat.data.to("cpu", copy=True)  # there is room for it, whatever else is on the device
        self.flat.data.copy_(self.average)
        self.flat.publish()
        try:
            yield
        finally:
            self.flat.data.copy_(trained)
            self.flat.publish()
'''

# ======================================================================================== common/model/device.py

MODULES['common/model/device.py'] = r'''
"""--mixed_precision and the hardware -> Host: this process, its device and dtype; and the memory that it takes."""

import contextlib
import functools
import gc
import logging
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import KW_ONLY, dataclass, field, replace
from datetime import timedelta
from typing import TypeVar

import psutil
import torch
from accelerate import PartialState
from accelerate.utils import gather_object, parse_flag_from_env

from common.errors import UserError
from common.system.cards import unsupported_card

GIB = 2**30
# One process may encode, convert or render while the others wait. The default is 10 minutes.
LONGEST_WAIT = timedelta(hours=12)
T = TypeVar("T")


@dataclass
class EarlierPeak:
    """The highest allocated memory before torch's counter was last reset: torch has one for the whole process."""

    gib: float = 0.0


@dataclass(frozen=True)
class Host:
    """One process of the run: its device, the dtype of the frozen model, and its place among the processes."""

    device: torch.device
    dtype: torch.dtype
    _: KW_ONLY
    reason: str  # why this device and dtype
    rank: int
    world: int  # number of processes
    started_s: float  # when the run began, on the monotonic clock
    earlier_peak: EarlierPeak = field(default_factory=EarlierPeak)

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def on_cpu(self) -> "Host":
        """The same process computing on its CPU, in fp32."""
        return replace(self, device=torch.device("cpu"), dtype=torch.float32)

    def say(self, line: str) -> None:
        """Print a line once, however many processes there are."""
        if self.is_main:
            print(line, flush=True)

    def gather(self, items: list[T]) -> list[T]:
        """The lists of all processes as one list, on every process."""
        with _all_processes():
            return gather_object(items) if self.world > 1 else items

    def barrier(self) -> None:
        """Return when every process has come here."""
        with _all_processes():
            PartialState().wait_for_everyone()

    def main_first(self, make: Callable[[], T]) -> T:
        """`make()` on the main process, then on the others, which find what it left on the disk.

        Where it fails on the main process, the others end without a word.
        """
        if not self.is_main:
            if self.gather([]) != [True]:
                raise SystemExit(0)  # the launcher then reports the main process, not this one
            return make()
        done = False
        try:
            made = make()
            done = True
            return made
        finally:
            self.gather([done])

    def sum(self, tensor: torch.Tensor) -> torch.Tensor:
        """Sum `tensor` over all processes, in place: one all-reduce, or nothing to do for a single process."""
        if self.world > 1:
            with _all_processes():
                torch.distributed.all_reduce(tensor)
        return tensor

    def peak_gib(self) -> float:
        """Highest memory of the run so far in GiB: allocated on the GPU, or resident in RAM on a CPU."""
        if self.device.type != "cuda":
            return peak_ram_gib()
        return max(self.earlier_peak.gib, torch.cuda.max_memory_allocated(self.device) / GIB)

    def start_new_peak(self) -> None:
        """Let torch.cuda.max_memory_allocated count from here; `peak_gib` remembers what was before."""
        self.earlier_peak.gib = self.peak_gib()
        torch.cuda.reset_peak_memory_stats(self.device)


@contextlib.contextmanager
def _all_processes() -> Iterator[None]:
    """Around a call that all processes make together.

    Raises:
        UserError: it failed, as it does when another process has ended.
    """
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        ended = "another process of this run has ended, and said why; --resume_from_checkpoint latest goes on"
        raise UserError(f"{ended} ({str(error).splitlines()[0]})") from None


def start(mixed_precision: str = "fp16", seed: int = 0) -> Host:
    """Join the process group of `accelerate launch` or torchrun, if any; choose device and dtype, and say so.

    Seeds torch's global generators, from which only adapter initialisation and LoRA dropout draw.

    Raises:
        UserError: a card that this PyTorch was not built for; bf16 on a card that only emulates it.
    """
    started_s = time.monotonic()
    quieten_libraries()
    torch.manual_seed(seed)

    # Join the processes; without a GPU they talk by gloo.
    use_cpu = parse_flag_from_env("ACCELERATE_USE_CPU", not torch.cuda.is_available())
    state = PartialState(cpu=use_cpu, timeout=LONGEST_WAIT)
    device = state.device if state.device.type == "cuda" else torch.device("cpu")

    # Forget what an earlier run in this process has left.
    free_memory(device)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)

    # Choose the dtype, and say it all.
    dtype, reason = _choose_dtype(device, mixed_precision)
    place = dict(rank=state.process_index, world=state.num_processes)
    host = Host(device, dtype, reason=reason, started_s=started_s, **place)
    idle = torch.cuda.device_count() - host.world if device.type == "cuda" else 0
    if idle > 0:
        host.say(f"note: {idle} more GPU{'s'[: idle > 1]} here, idle: accelerate launch --quiet uses all of them")
    processes = f", {host.world} processes" if host.world > 1 else ""
    host.say(f"device: {device.type}, {str(dtype).removeprefix('torch.')}{processes} ({reason})")
    return host


def quieten_libraries() -> None:
    """Their notices and loading bars would drown the run's own lines; their errors still come through."""
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # it speaks while it is imported
    import diffusers
    import transformers

    for library in (diffusers, transformers):
        library.utils.logging.set_verbosity_error()
        library.utils.logging.disable_progress_bar()


def _choose_dtype(device, mixed_precision):
    """(dtype of the frozen model, why)."""
    if device.type != "cuda":
        return torch.float32, "no CUDA GPU was found; a CPU computes fp16 ten times slower than fp32"
    name = torch.cuda.get_device_name(device)
    capability = torch.cuda.get_device_capability(device)
    if fault := unsupported_card(name, capability, torch.cuda.get_arch_list()):
        raise UserError(fault)
    if mixed_precision == "no":
        return torch.float32, f"{name}, --mixed_precision no"
    if mixed_precision == "bf16":
        # torch.cuda.is_bf16_supported() says True by emulation; only capability 8.0 and up has the units.
        if capability < (8, 0):
            card = f"{name} (sm_{capability[0]}{capability[1]})"
            raise UserError(f"--mixed_precision bf16: {card} has no bf16 units; use fp16")
        return torch.bfloat16, f"{name}, --mixed_precision bf16"
    return torch.float16, f"{name}; fp32 adapter weights and loss scaling"


def limit_memory(device: torch.device, max_gib: float | None) -> float:
    """Hold this process to `max_gib` of GPU memory, or to what is free if that is less or None -> the limit in GiB.

    torch limits the current device, which is this one.
    """
    free_gib = (torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device)) / GIB
    limit_gib = min(max_gib or free_gib, free_gib)
    total_bytes = torch.cuda.get_device_properties(device).total_memory
    torch.cuda.set_per_process_memory_fraction(limit_gib * GIB / total_bytes)
    return limit_gib


def peak_ram_gib() -> float:
    """Highest resident memory of this process so far, in GiB."""
    if sys.platform == "win32":
        return psutil.Process().memory_info().peak_wset / GIB
    import resource  # not there on Windows

    unit_bytes = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit_bytes / GIB


def seconds_since_start() -> float:
    """Seconds since this process was started, imports included."""
    return time.time() - psutil.Process().create_time()


def free_memory(device: torch.device) -> None:
    """Free what nothing holds any more, models in reference cycles too, and hand the GPU's cached blocks back to it.

    After an error, call it outside of the `except` block, which still holds the tensors.
    """
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


@functools.lru_cache
def _parallel_streams(device):
    return [torch.cuda.Stream(device) for _ in range(8)]


def side_by_side(functions: list[Callable[[], None]], device: torch.device) -> None:
    """Call functions that are independent of each other; on a GPU, eight of their small kernels run at a time."""
    streams = _parallel_streams(device) if device.type == "cuda" and functions else []
    for stream in streams:
        stream.wait_stream(torch.cuda.current_stream())
    try:
        for i, function in enumerate(functions):
            with torch.cuda.stream(streams[i % len(streams)] if streams else None):
                function()
    finally:
        for stream in streams:
            torch.cuda.current_stream().wait_stream(stream)
'''

# ======================================================================================= common/model/loading.py

MODULES['common/model/loading.py'] = r'''
"""A model's name -> its files (Model) -> its parts on the device: noise schedule, VAE, text encoders, UNet.

Whatever the user names (hub id, folder, single file) becomes one diffusers folder first. There is never a second copy
of a part in RAM.

Heavy libraries are imported where they are used: with warm caches a run needs neither VAE nor text encoders.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import torch

from common.cli import hub
from common.errors import UserError
from common.model import model_kind, single_file, weights
from common.model.model_kind import Kind
from common.model.noise import NoiseSchedule

if TYPE_CHECKING:
    from collections.abc import Callable

    from diffusers import AutoencoderKL, UNet2DConditionModel
    from transformers import CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

    from common.cli.model_flags import ModelFlags
    from common.model.device import Host

VAE_FILES = ["config.json", "diffusion_pytorch_model.safetensors"]


@dataclass(frozen=True)
class Model:
    """A local diffusers folder of SDXL, and the folder of the VAE that goes with it.

    `scheduler`: the configuration of its noise schedule, which says what `kind` says.
    """

    name: str
    folder: Path
    vae: Path
    variant: str | None
    kind: Kind
    scheduler: dict


# ---------------------------------------------------------------- finding it


def model_of(flags: ModelFlags, say: Callable[[str], None] = print) -> Model:
    """`find_model` by the flags of a script; `say` gets one line about what it is."""
    return find_model(
        flags.pretrained_model_name_or_path,
        flags.pretrained_vae_model_name_or_path,
        variant=flags.variant,
        revision=flags.revision,
        config=flags.config_name_or_path,
        cache_dir=flags.cache_dir,
        prediction_type=flags.prediction_type,
        zero_terminal_snr=flags.zero_terminal_snr,
        say=say,
    )


def find_model(
    name: str,
    vae: str | None = None,
    *,
    variant: str | None = "fp16",
    revision: str | None = None,
    config: str = "stabilityai/stable-diffusion-xl-base-1.0",
    cache_dir: str = ".",
    prediction_type: str | None = None,
    zero_terminal_snr: bool | None = None,
    say: Callable[[str], None] = print,
) -> Model:
    """Turn what the user named into local folders, downloading only the files that are used.

    Checks that they are a whole SDXL, by the configurations and the headers of the weight files.

    Args:
        name: a folder, a .safetensors file in the original layout, or a hub id.
        vae: a folder or hub id; None for the model's own, or its drop-in replacement.
        config: folder or hub id of the configurations that go with a single file.
        cache_dir: where a single file is converted to.
        prediction_type, zero_terminal_snr: what the model's files are silent about.
    Raises:
        UserError: not a diffusers model, not SDXL, not supported; a weight that is missing or does not fit.
    """
    # hub id or single file -> folder
    named = f"--pretrained_model_name_or_path {name}"
    place = Path(name)
    if not place.exists():
        vae = vae or hub.default_vae(name, revision)
        place = hub.download_model(name, variant, revision, with_vae=vae is None, say=say)
    folder = single_file.convert(place, config, Path(cache_dir)) if place.is_file() else place

    # what it is, and what it predicts
    model_kind.check_folder(folder, named)
    scheduler = model_kind.read_object(folder, model_kind.SCHEDULER, named)
    marks = model_kind.marks_in_scheduler(scheduler)
    if place.is_file():
        marks = {setting: found + marks[setting] for setting, found in model_kind.marks_in_file(place, named).items()}
    kind = model_kind.decide(named, marks, prediction_type=prediction_type, zero_terminal_snr=zero_terminal_snr)
    vae_folder = _own_vae(folder, named) if vae is None else _named_vae(vae)
    say(f"model: {name} {kind}; VAE: {vae or 'its own'}")
    scheduler = model_kind.scheduler_of(scheduler, kind)
    model = Model(name, folder, vae=vae_folder, variant=variant, kind=kind, scheduler=scheduler)
    _check_weights(model)
    return model


def _own_vae(folder, named):
    """The folder of a model's own VAE."""
    return _checked_vae([folder / "vae"], named)


def _named_vae(vae):
    """The folder of the VAE that a flag names, a model's or its own."""
    folder = Path(vae)
    if not folder.is_dir():
        folder = hub.download_files(vae, VAE_FILES + [f"vae/{name}" for name in VAE_FILES])
    return _checked_vae([folder, folder / "vae"], f"--pretrained_vae_model_name_or_path {vae}")


def _checked_vae(candidates, named):
    """The first of the folders that holds a VAE, which must be SDXL's."""
    folder = next((folder for folder in candidates if (folder / "config.json").exists()), None)
    if folder is None:
        cure = f"name one: --pretrained_vae_model_name_or_path {hub.FP16_VAE}"
        raise UserError(f"{named}: no VAE in it (vae/config.json); {cure}")
    config = model_kind.read_object(folder, "config.json", f"{named}: its vae")
    class_name = config.get("_class_name")
    channels = config.get("latent_channels", 4)
    if class_name != "AutoencoderKL" or channels != 4:
        raise UserError(f"{named}: its vae is {class_name} of {channels} channels, SDXL's is AutoencoderKL of 4")
    return folder


def _check_weights(model):
    """Every part is there and fits its configuration, before anything is encoded with one of them."""
    for part, class_name in model_kind.PARTS.items():
        weights.check_weights(weights.empty_part(class_name, model.folder / part), _files_of(model, part))
    vae = weights.empty_part("AutoencoderKL", model.vae)
    weights.check_weights(vae, weights.weight_files(model.vae, model.variant))


def _files_of(model, part):
    stem = weights.TRANSFORMERS_STEM if part.startswith("text_encoder") else weights.DIFFUSERS_STEM
    return weights.weight_files(model.folder / part, model.variant, stem)


def fingerprint(variant: str | None, *folders: Path) -> list[tuple[str, int, int]]:
    """What identifies the models in `folders` for the caches: (path, bytes, mtime) of every file that is loaded.

    Reads no weights.
    """
    files = []
    for folder in folders:
        loaded = weights.variant_in(folder, variant) or ""
        found = [path for path in folder.glob("*.safetensors") if _variant_of(path) == loaded]
        files += sorted([*found, *folder.glob("*.json"), *folder.glob("*.txt")])
    return [(str(path.resolve()), path.stat().st_size, path.stat().st_mtime_ns) for path in files]


def _variant_of(path):
    """fp16 of model.fp16-00001-of-00002.safetensors; "" of model.safetensors."""
    return path.stem.partition(".")[2].partition("-")[0]


# ---------------------------------------------------------------- its parts


def load_noise_schedule(model: Model, device: torch.device) -> NoiseSchedule:
    """The training noise schedule that belongs to the model's scheduler configuration -> NoiseSchedule on `device`."""
    return NoiseSchedule(model_kind.alphas_cumprod(model.scheduler).to(device), model.kind.prediction_type)


def load_vae(model: Model, host: Host) -> AutoencoderKL:
    """AutoencoderKL on the device; in fp32 where its config says that fp16 overflows (`force_upcast`)."""
    vae = weights.empty_part("AutoencoderKL", model.vae)
    dtype = torch.float32 if vae.config.force_upcast else host.dtype
    weights.fill(vae, weights.weight_files(model.vae, model.variant), device=host.device, dtype=dtype)
    return vae.requires_grad_(False).eval()


def load_text_encoders(
    model: Model, host: Host
) -> list[tuple[CLIPTokenizer, CLIPTextModel | CLIPTextModelWithProjection]]:
    """(tokenizer, encoder) of CLIP-L and of bigG, whose projection makes `pooled`."""
    pairs = []
    for suffix in ("", "_2"):
        part = f"text_encoder{suffix}"
        encoder = weights.empty_part(model_kind.PARTS[part], model.folder / part)
        weights.fill(encoder, _files_of(model, part), device=host.device, dtype=host.dtype)
        tokenizer = _load_tokenizer(model.folder / f"tokenizer{suffix}", encoder.config.vocab_size)
        pairs.append((tokenizer, encoder.to(host.device).requires_grad_(False).eval()))
    return pairs


def _load_tokenizer(folder, vocab_size):
    """The tokenizer in `folder`, which must fit an encoder of `vocab_size` embeddings."""
    from transformers import CLIPTokenizer

    try:
        tokenizer = CLIPTokenizer.from_pretrained(folder)
    except (OSError, ValueError) as error:
        raise UserError(f"{folder}: cannot be read ({str(error).splitlines()[0]})") from None
    if not 100 < len(tokenizer) <= vocab_size:  # without its files a tokenizer loads with 2 words
        raise UserError(f"{folder}: {len(tokenizer)} words for {vocab_size} embeddings; files missing?")
    return tokenizer


def load_unet(model: Model, host: Host, quantize: Literal["none", "nf4"] = "none") -> UNet2DConditionModel:
    """The UNet, frozen, built without memory and filled straight on the device: RAM holds 0.5 GiB of it at a time.

    `quantize="nf4"` keeps the weights of its linear layers in 4 bits (bitsandbytes NF4, double quantisation), except
    those of the time and size embeddings. Each is quantised as it arrives, so the device never holds the fp16 model.
    """
    unet = weights.empty_part(model_kind.PARTS["unet"], model.folder / "unet")
    if quantize == "nf4":
        with torch.device("meta"):
            _make_linears_4bit(unet, host.dtype)
    weights.fill(unet, _files_of(model, "unet"), device=host.device, dtype=host.dtype)
    return unet.requires_grad_(False).train()


def _make_linears_4bit(unet, compute_dtype):
    from bitsandbytes.nn import Linear4bit

    options = dict(compute_dtype=compute_dtype, quant_type="nf4", compress_statistics=True)
    for name, module in list(unet.named_modules()):
        if type(module) is torch.nn.Linear and not name.startswith(("time_embedding", "add_embedding")):
            parent, _, child = name.rpartition(".")
            layer = Linear4bit(module.in_features, module.out_features, bias=module.bias is not None, **options)
            # Else a CPU with these units repacks the weights in eval mode, which cuts their gradient.
            layer.support_avx512bf16_for_cpu = False
            setattr(unet.get_submodule(parent), child, layer)
    unet.is_loaded_in_4bit = True  # what PEFT asks before it treats a layer as 4-bit


def zero_unconditional(model: Model) -> bool:
    """Whether the model's unconditional input is zeros (SDXL base) rather than the encoded empty prompt."""
    return json.loads((model.folder / "model_index.json").read_text()).get("force_zeros_for_empty_prompt", True)
'''

# ======================================================================================== common/model/memory.py

MODULES['common/model/memory.py'] = r'''
"""Out of GPU memory: what is tried next."""

from collections.abc import Callable

from common.errors import OutOfMemory, ran_out
from common.model import device


class StepDown:
    """Ways to do one thing, from the fastest to the leanest. A way that ran out of memory is not tried again.

    Args:
        doing: what is done, for messages: "while encoding images".
        ways: {what a way is called, for messages: function}; all of them take the same arguments.
        host: the process whose device is cleared after a failure.
    """

    def __init__(self, doing: str, ways: dict[str, Callable], host: device.Host) -> None:
        self.doing = doing
        self.ways = list(ways.items())
        self.host = host

    def __call__(self, *arguments):
        """Return what the first way gives that does not run out of memory.

        Raises:
            OutOfMemory: the last one ran out too.
        """
        while self.ways:
            try:
                return self.ways[0][1](*arguments)
            except RuntimeError as error:
                if not ran_out(error):
                    raise
            device.free_memory(self.host.device)
            self.ways.pop(0)
            if self.ways:
                print(f"out of GPU memory {self.doing}: {self.ways[0][0]} from here on", flush=True)
        raise OutOfMemory(self.doing)
'''

# ==================================================================================== common/model/model_kind.py

MODULES['common/model/model_kind.py'] = r'''
"""A model's configuration files and the flags -> Kind: is it SDXL, what does its UNet predict, on which noise schedule.

The flags speak where the files are silent.

v-prediction: arXiv 2202.00512. Zero-terminal SNR (the last timestep is pure noise): arXiv 2305.08891.
"""

import inspect
import json
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError, safe_open

from common.errors import UserError

PARTS = dict(unet="UNet2DConditionModel", text_encoder="CLIPTextModel", text_encoder_2="CLIPTextModelWithProjection")
SCHEDULER = "scheduler/scheduler_config.json"
READ = ["model_index.json", SCHEDULER, *(f"tokenizer{part}/tokenizer_config.json" for part in ("", "_2"))]
EPSILON = "epsilon"
V_PREDICTION = "v_prediction"
# The samplers whose configuration describes DDPM's noise schedule. EDM and flow matching have another one.
DDPM_FAMILY = (
    "DDPM DDIM DDPMParallel DDIMParallel PNDM LMSDiscrete EulerDiscrete EulerAncestralDiscrete HeunDiscrete"
    " KDPM2Discrete KDPM2AncestralDiscrete DPMSolverMultistep DPMSolverSinglestep DPMSolverSDE DEISMultistep"
    " UniPCMultistep SASolver LCM TCD"
).split()
_SPELLINGS = {
    "v": V_PREDICTION,
    "v_prediction": V_PREDICTION,
    "v-prediction": V_PREDICTION,
    "epsilon": EPSILON,
    "eps": EPSILON,
}


class Mark(NamedTuple):
    """What one place in a model's files says about it."""

    value: object
    where: str


class Kind(NamedTuple):
    """What the noise schedule and the UNet's target are. `said_by`: the flag, or the place in the model's files."""

    prediction_type: str  # EPSILON or V_PREDICTION
    zero_terminal_snr: bool
    said_by: str

    def __str__(self):
        snr = ", zero-terminal SNR" if self.zero_terminal_snr else ""
        return f"predicts {self.prediction_type}{snr} (by {self.said_by})"


# ---------------------------------------------------------------- is it SDXL


def read_object(folder: Path, file: str, named: str) -> dict:
    """The JSON object in folder/file.

    Args:
        named: the flag and its value, for the message.
    Raises:
        UserError: there is none, or it cannot be read.
    """
    try:
        return dict(json.loads((folder / file).read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        raise UserError(f"{named}: no readable {file} in it; SDXL has one") from None


def check_folder(folder: Path, named: str) -> None:
    """Refuse what is not SDXL, by its configuration files: Stable Diffusion 1.5 would be loaded far before it fails.

    Raises:
        UserError: naming the flag, the part and what is not supported about it.
    """
    if not (folder / "model_index.json").exists():
        raise UserError(f"{named}: no model_index.json in it, so it is not a diffusers model folder")
    for file in READ:
        read_object(folder, file, named)
    configs = {part: read_object(folder, f"{part}/config.json", named) for part in PARTS}
    for part, wanted in PARTS.items():
        found = configs[part].get("_class_name") or (configs[part].get("architectures") or ["nothing known"])[0]
        if found != wanted:
            raise UserError(f"{named}: its {part} is {found}, SDXL's is {wanted}")
    _check_unet(configs["unet"], configs["text_encoder"], configs["text_encoder_2"], named=named)
    check_scheduler(read_object(folder, SCHEDULER, named), named)


def _check_unet(unet, text_encoder, text_encoder_2, *, named):
    """Refuse a UNet whose inputs are not SDXL's, or which does not fit the text encoders: by their configurations."""
    for name in ("in_channels", "out_channels"):
        if unet.get(name, 4) != 4:
            hint = " (an inpainting or editing model)" if name == "in_channels" else ""
            raise UserError(f"{named}: its unet has {unet[name]} {name}{hint}; only SDXL models with 4 are supported")
    if unet.get("addition_embed_type") != "text_time":
        raise UserError(f"{named}: its unet takes no picture sizes (addition_embed_type), so it is not SDXL's")
    if unet.get("time_cond_proj_dim") is not None:
        guidance = "the guidance as an input (time_cond_proj_dim, as LCM has)"
        raise UserError(f"{named}: its unet takes {guidance}, which is not supported")

    # What the text encoders give is what it takes: per token, and pooled beside six numbers of sizes.
    try:
        tokens = text_encoder["hidden_size"] + text_encoder_2["hidden_size"]
        pooled = 6 * unet["addition_time_embed_dim"] + text_encoder_2["projection_dim"]
    except (KeyError, TypeError):
        lacking = "the configuration of its unet or of a text encoder lacks widths that SDXL has"
        raise UserError(f"{named}: {lacking}") from None
    for name, width in (("cross_attention_dim", tokens), ("projection_class_embeddings_input_dim", pooled)):
        if (found := unet.get(name)) != width:
            raise UserError(
                f"{named}: its unet has the {name} {found}, its text encoders give {width}; they do not fit"
            )


def check_scheduler(config: dict, named: str) -> None:
    """Refuse a noise schedule or a target that training does not know.

    Raises:
        UserError: naming the flag and what the configuration says.
    """
    name = str(config.get("_class_name"))
    is_ddpm = name.removesuffix("Scheduler") in DDPM_FAMILY
    if not is_ddpm or config.get("use_flow_sigmas") or config.get("timestep_type") == "continuous":
        other = "another noise schedule than SDXL's (EDM or flow matching?)"
        raise UserError(f"{named}: its scheduler, {name}, has {other}: not supported")
    if (found := config.get("prediction_type", EPSILON)) not in (EPSILON, V_PREDICTION):
        raise UserError(f"{named}: prediction type {found!r} is not supported, only {EPSILON} and {V_PREDICTION}")

    # a schedule in numbers
    try:
        finite = bool(alphas_cumprod(config).isfinite().all())
    except (TypeError, ValueError, NotImplementedError, RuntimeError):
        finite = False
    if not finite:
        raise UserError(f"{named}: its {SCHEDULER} describes no noise schedule that can be computed")


def alphas_cumprod(config: dict) -> torch.Tensor:
    """The noise schedule of a scheduler configuration: [T], in fp32 on the CPU."""
    from diffusers import DDPMScheduler

    # from_config would import every scheduler there is, for seconds, to warn about settings of another one.
    known = inspect.signature(DDPMScheduler.__init__).parameters
    return DDPMScheduler(**{name: config[name] for name in known if name in config}).alphas_cumprod.float()


# ---------------------------------------------------------------- what it predicts


def marks_in_file(file: Path, named: str) -> dict[str, list[Mark]]:
    """{"prediction_type": [Mark], "zero_terminal_snr": [Mark]}: what a single file says of itself.

    Raises:
        UserError: a damaged file, a prediction type that is not supported.
    """
    try:
        with safe_open(file, "pt") as tensors:
            keys = set(tensors.keys())
            metadata = tensors.metadata() or {}
    except (SafetensorError, OSError) as error:
        raise UserError(f"{named}: damaged, or no safetensors file ({error}); download or copy it again") from None

    # NoobAI's keys
    prediction = [Mark(V_PREDICTION, "its key v_pred")] if "v_pred" in keys else []
    zero_snr = [Mark(True, "its key ztsnr")] if "ztsnr" in keys else []

    # modelspec's metadata
    if (spec := metadata.get("modelspec.prediction_type")) is not None:
        if spec.lower() not in _SPELLINGS:
            raise UserError(f"{named}: modelspec.prediction_type {spec!r} is not supported, only {EPSILON} and v")
        prediction.append(Mark(_SPELLINGS[spec.lower()], "its modelspec.prediction_type"))

    # kohya's metadata
    if metadata.get("ss_v_parameterization") in ("True", "False"):
        value = V_PREDICTION if metadata["ss_v_parameterization"] == "True" else EPSILON
        prediction.append(Mark(value, "its ss_v_parameterization"))
    if metadata.get("ss_zero_terminal_snr") == "True":
        zero_snr.append(Mark(True, "its ss_zero_terminal_snr"))
    return {"prediction_type": prediction, "zero_terminal_snr": zero_snr}


def marks_in_scheduler(config: dict) -> dict[str, list[Mark]]:
    """The same of a scheduler configuration.

    Only what differs from the default counts: converters leave the default where nothing was said.
    """
    where = "its scheduler configuration"
    return {
        "prediction_type": [Mark(V_PREDICTION, where)] if config.get("prediction_type") == V_PREDICTION else [],
        "zero_terminal_snr": [Mark(True, where)] if config.get("rescale_betas_zero_snr") else [],
    }


def decide(
    named: str,
    marks: dict[str, list[Mark]],
    *,
    prediction_type: str | None = None,
    zero_terminal_snr: bool | None = None,
) -> Kind:
    """What the files say, or the flags where they are given -> Kind.

    Args:
        marks: [Mark] for each of the two settings.
        prediction_type, zero_terminal_snr: the flags, None where they were not given.
    Raises:
        UserError: the files contradict each other, or the flag contradicts them.
    """
    prediction = _agreed(named, "prediction_type", marks["prediction_type"], asked=prediction_type, default=EPSILON)
    zero_snr = _agreed(named, "zero_terminal_snr", marks["zero_terminal_snr"], asked=zero_terminal_snr, default=False)
    said_by = [prediction.where, *([zero_snr.where] if zero_snr.value and zero_snr.where != prediction.where else [])]
    return Kind(prediction.value, zero_snr.value, " and ".join(said_by))


def _agreed(named, setting, marks, *, asked, default):
    """The Mark that counts. Trainers write the default where nobody said anything, so a flag may contradict that."""
    told = [mark for mark in marks if mark.value != default]
    if asked is not None:
        if told and all(mark.value != asked for mark in marks):
            contradicted = f"{told[0].where}, by which {named} has {told[0].value}"
            raise UserError(f"--{setting} {asked}: contradicts {contradicted}; leave the flag out")
        return Mark(asked, f"--{setting}")
    if told and len(told) < len(marks):
        other = next(mark for mark in marks if mark.value == default)
        said = f"{told[0].where} says {told[0].value}, {other.where} says {other.value}"
        raise UserError(f"{named}: {said}; decide with --{setting}")
    return next(iter(marks), Mark(default, "its scheduler configuration"))


def scheduler_of(config: dict, kind: Kind) -> dict:
    """A scheduler configuration that says what `kind` says.

    Zero-terminal SNR starts at the last timestep: "trailing" spacing (arXiv 2305.08891, sec. 3.3).
    """
    config = {**config, "prediction_type": kind.prediction_type}
    zero_snr = {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
    return {**config, **zero_snr} if kind.zero_terminal_snr else config
'''

# ========================================================================================= common/model/noise.py

MODULES['common/model/noise.py'] = r'''
"""What noise does to a latent, and what the loss makes of it: pure functions of tensors.

Notation: z latent, eps noise, a = alphas_cumprod[t], snr = a / (1 - a). Shapes: [B, C, H, W] unless said otherwise.
"""

import hashlib
from dataclasses import dataclass

import torch
import torch.nn.functional as F

QUARTERS = 4  # the loss is also reported by quarter of the timesteps


@dataclass(frozen=True)
class Draws:
    """All that is random about one training example."""

    flip: bool
    drop_caption: bool
    timestep: int
    posterior_eps: torch.Tensor  # [C, H, W]
    eps: torch.Tensor  # [C, H, W], offset noise included


def generator_for(*identity) -> torch.Generator:
    """A CPU generator that depends on `identity` alone: the same draws in any batch, any process, beside any device."""
    digest = hashlib.blake2b(repr(identity).encode(), digest_size=8).digest()
    return torch.Generator("cpu").manual_seed(int.from_bytes(digest, "little") >> 1)


def draw(
    generator: torch.Generator,
    shape: tuple[int, int, int],
    num_timesteps: int,
    flip_share: float = 0.0,
    drop_share: float = 0.0,
    offset_strength: float = 0.0,
) -> Draws:
    """Draw everything for one example whose latent has `shape` = (C, H, W).

    Every number is drawn whether it is used or not, so that switching one option on leaves the other draws alone.
    Offset noise is part of the noise to predict: eps' = eps + s * n, n ~ N(0, 1) per channel
    (https://www.crosslabs.org/blog/diffusion-with-offset-noise).
    """
    flip, drop = torch.rand(2, generator=generator).tolist()
    timestep = int(torch.randint(num_timesteps, (), generator=generator))
    posterior_eps = torch.randn(shape, generator=generator)
    eps = torch.randn(shape, generator=generator)
    offset = torch.randn((shape[0], 1, 1), generator=generator)
    return Draws(
        flip=flip < flip_share,
        drop_caption=drop < drop_share,
        timestep=timestep,
        posterior_eps=posterior_eps,
        eps=eps + offset_strength * offset,
    )


@dataclass(frozen=True)
class NoiseSchedule:
    """The forward process of a model: alphas_cumprod [T] in fp32 on the training device, and what the UNet predicts."""

    alphas_cumprod: torch.Tensor
    prediction_type: str  # "epsilon" or "v_prediction"

    def noise(self, z: torch.Tensor, eps: torch.Tensor, t: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(x_t, the UNet's target), both [B, C, H, W], for timesteps `t` [B].

        x_t = sqrt(a) z + sqrt(1 - a) eps (arXiv 2006.11239, eq. 4); the target is eps, or
        v = sqrt(a) eps - sqrt(1 - a) z (arXiv 2202.00512, app. D).
        """
        a = self.alphas_cumprod[t].view(-1, 1, 1, 1)
        x_t = a.sqrt() * z + (1 - a).sqrt() * eps
        if self.prediction_type == "epsilon":
            return x_t, eps
        return x_t, a.sqrt() * eps - (1 - a).sqrt() * z

    def min_snr_weight(self, t: torch.Tensor, gamma: float) -> torch.Tensor:
        """Loss weights [B] of Min-SNR-gamma (arXiv 2303.09556, sec. 3.4).

        min(snr, g) / snr for epsilon prediction, min(snr, g) / (snr + 1) for v prediction. For epsilon, noisy steps
        (snr <= g) keep weight 1, with snr = 0 too, where it would be 0 / 0.
        """
        a = self.alphas_cumprod[t]
        snr = a / (1 - a)
        if self.prediction_type == "epsilon":
            return (gamma / snr).clamp(max=1.0)
        return snr.clamp(max=gamma) / (snr + 1)


def mse_per_sample(prediction: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Mean squared error of each example in fp32: [B, C, H, W] twice -> [B]."""
    return F.mse_loss(prediction.float(), target.float(), reduction="none").mean(dim=(1, 2, 3))


def by_quarter(values: torch.Tensor, t: torch.Tensor, num_timesteps: int) -> torch.Tensor:
    """Sum `values` [B] into the quarter of the schedule that their timestep `t` [B] lies in -> [QUARTERS]."""
    sums = torch.zeros(QUARTERS, dtype=values.dtype, device=values.device)
    return sums.index_add_(0, t * QUARTERS // num_timesteps, values)
'''

# ==================================================================================== common/model/schedulers.py

MODULES['common/model/schedulers.py'] = r'''
"""The name in --scheduler -> a sampler of diffusers. Nothing here imports torch, so that flags can list the names."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from diffusers import SchedulerMixin

    from common.model.model_kind import Kind

KARRAS = dict(use_karras_sigmas=True)
EXACT = dict(use_karras_sigmas=False)
# name -> (class of diffusers, what differs from the model's own scheduler configuration)
SCHEDULERS = {
    "euler": ("EulerDiscreteScheduler", {}),  # what SDXL ships with
    "euler_a": ("EulerAncestralDiscreteScheduler", {}),
    "ddim": ("DDIMScheduler", {}),
    "dpmpp_2m": ("DPMSolverMultistepScheduler", EXACT),
    "dpmpp_2m_karras": ("DPMSolverMultistepScheduler", KARRAS),
    "dpmpp_2m_sde_karras": ("DPMSolverMultistepScheduler", dict(algorithm_type="sde-dpmsolver++", **KARRAS)),
    "unipc": ("UniPCMultistepScheduler", {}),
    "lcm": ("LCMScheduler", {}),
}


def make_scheduler(name: str, config: dict) -> SchedulerMixin:
    """The scheduler `name` of SCHEDULERS with the noise schedule of `config`, which is loading.Model's `scheduler`."""
    import diffusers

    class_name, options = SCHEDULERS[name]
    return getattr(diffusers, class_name).from_config(config, **options)


def default_guidance_rescale(kind: Kind) -> float:
    """The rescale where no flag gives one: 0.7 for zero-terminal SNR (arXiv 2305.08891, sec. 3.4), else none (0)."""
    return 0.7 if kind.zero_terminal_snr else 0.0
'''

# ===================================================================================== common/model/schedules.py

MODULES['common/model/schedules.py'] = r'''
"""What changes with the step: the learning rate, which is a function of it, and the loss scale, which remembers."""

from collections.abc import Callable

import torch

GROWTH_INTERVAL = 2000  # steps without an overflow before the loss scale doubles


class LossScale:
    """Dynamic loss scaling for fp16: halved at an overflow, doubled after GROWTH_INTERVAL good steps; else always 1."""

    def __init__(self, dtype: torch.dtype, device: torch.device) -> None:
        self.enabled = dtype == torch.float16
        start = 2.0**12 if self.enabled else 1.0
        self.value = torch.full((), start, device=device)  # on the device: a CUDA graph reads it
        self.good_steps = 0

    def update(self, overflow: bool) -> None:
        if not self.enabled:
            return
        self.good_steps = 0 if overflow else self.good_steps + 1
        if overflow:
            self.value.mul_(0.5)
        elif self.good_steps % GROWTH_INTERVAL == 0:
            self.value.mul_(2.0)

    def state(self) -> dict[str, float]:
        return {"value": self.value.item(), "good_steps": self.good_steps}

    def load_state(self, state: dict[str, float]) -> None:
        self.value.fill_(state["value"])
        self.good_steps = state["good_steps"]


def lr_schedule(
    name: str, *, warmup_steps: int, total_steps: int, peak_lr: float, num_cycles: int = 1, power: float = 1.0
) -> Callable[[int], float]:
    """One of diffusers' schedules as a function without state: steps done -> factor of the peak learning rate.

    `num_cycles` counts the cosines of "cosine_with_restarts"; `power` is the exponent of "polynomial".
    """
    from diffusers.optimization import get_scheduler

    unused = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=peak_lr)  # "polynomial" ends at an absolute rate
    lengths = dict(num_warmup_steps=warmup_steps, num_training_steps=total_steps)
    return get_scheduler(name, unused, num_cycles=num_cycles, power=power, **lengths).lr_lambdas[0]
'''

# =================================================================================== common/model/single_file.py

MODULES['common/model/single_file.py'] = r'''
"""A single .safetensors checkpoint in the original layout -> a diffusers folder (fp16), made once, whole or not at all.

RAM holds one part at a time. diffusers converts the names; the result is checked against the architecture.
"""

import hashlib
import shutil
import time
import uuid
from pathlib import Path

from safetensors import safe_open

from common.cli import hub
from common.errors import UserError
from common.files import write_safetensors
from common.model import model_kind, weights

VERSION = 1  # raise it when the same file gives another folder: old ones are then never found
PREFIXES = {
    "unet": "model.diffusion_model.",
    "text_encoder": "conditioner.embedders.0.transformer.",
    "text_encoder_2": "conditioner.embedders.1.model.",
    "vae": "first_stage_model.",
}
CLASSES = {**model_kind.PARTS, "vae": "AutoencoderKL"}
DEAD_S = 3600  # a conversion takes minutes
_OF_EDM = ("edm_mean", "edm_std", "edm_vpred.sigma_max", "edm_vpred.sigma_min")  # by which ComfyUI knows such models
_OF_ADAPTERS = ("lora_", "lora.", "lokr_", "hada_", "dora_scale")
_COPIED = ("model_index.json", "scheduler/*.json", "tokenizer/*", "tokenizer_2/*", "*/config.json")


def convert(path: Path, config: str, cache_dir: Path) -> Path:
    """The folder of `path` under `cache_dir`. It has no vae folder where the file has no VAE.

    Args:
        config: folder or hub id of the configurations and tokenizers.
    Raises:
        UserError: not a whole SDXL checkpoint, or not of the architecture that `config` describes.
        OSError: the folder cannot be written.
    """
    # what the file is
    named = f"--pretrained_model_name_or_path {path}"
    if path.suffix != ".safetensors":
        raise UserError(f"{named}: only .safetensors files are read; pickles can run code")
    names = list(weights.shapes_in(path))
    _refuse_foreign(names, named)

    # the configurations and tokenizers that go with it
    configs = Path(config) if Path(config).is_dir() else hub.download_files(config, list(_COPIED))
    model_kind.check_folder(configs, f"--config_name_or_path {config}")
    found = [file for pattern in _COPIED for file in configs.glob(pattern) if file.is_file()]
    copied = {file.relative_to(configs): file.read_bytes() for file in found}

    # one folder for this file and these configurations, made where it is not there yet
    stat = path.stat()
    contents = sorted((str(file), content) for file, content in copied.items())
    identity = VERSION, stat.st_size, stat.st_mtime_ns, contents
    key = hashlib.blake2b(repr(identity).encode(), digest_size=16).hexdigest()
    folder = cache_dir / "single_file" / f"{path.stem}-{key}"
    if not folder.exists():
        _write(folder, path, names, copied)
    return folder


def _refuse_foreign(names, named):
    if any(mark in name for name in names for mark in _OF_ADAPTERS):
        cure = "name the model here, and infer.py takes adapters by --lora"
        raise UserError(f"{named}: is an adapter (LoRA), not a model; {cure}")
    if edm := [name for name in _OF_EDM if name in names]:
        raise UserError(f"{named}: is an EDM model (it has the key {edm[0]}), which is not supported")
    if any(name.startswith("cond_stage_model.") for name in names):
        raise UserError(f"{named}: is Stable Diffusion 1 or 2, not SDXL")
    if any(name.startswith("conditioner.embedders.0.model.") for name in names):
        raise UserError(f"{named}: is SDXL's refiner, not its base model")
    for part, prefix in PREFIXES.items():
        if part != "vae" and not any(name.startswith(prefix) for name in names):
            needed = "a whole SDXL checkpoint in the original layout is needed"
            raise UserError(f"{named}: has no {part} (no names in {prefix}); {needed}")


def _write(folder, path, names, copied):
    """Convert into a folder of its own name, then rename it: other processes see it whole.

    Of two that convert the same file, the second drops its own folder.
    """
    _remove_dead(folder.parent)
    partial = folder.with_name(f"{folder.name}.{uuid.uuid4().hex}.partial")
    try:
        for file, content in copied.items():
            (partial / file).parent.mkdir(parents=True, exist_ok=True)
            (partial / file).write_bytes(content)
        # Every part is checked before the first is written.
        parts = {part: _read_part(path, names, part, partial / part) for part in PREFIXES}
        for part, tensors in parts.items():
            _write_part(tensors, part, partial / part)
        try:
            partial.rename(folder)
        except OSError:
            if not folder.is_dir():
                raise
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _remove_dead(place):
    """Remove what killed processes have left: conversions that were begun more than DEAD_S ago."""
    for partial in place.glob("*.partial"):
        if time.time() - partial.stat().st_mtime > DEAD_S:
            shutil.rmtree(partial, ignore_errors=True)


def _read_part(path, names, part, folder):
    """{name in diffusers: tensor} of a part, mapped rather than read; none of them where the file has no VAE.

    Raises:
        UserError: it does not fit folder/config.json.
    """
    own = [name for name in names if name.startswith(PREFIXES[part])]
    if not own:
        return {}

    # under diffusers' names
    empty = weights.empty_part(CLASSES[part], folder)
    with safe_open(path, "pt") as file:
        tensors = {name: file.get_tensor(name) for name in own}
    try:
        tensors = _respell(part, tensors, empty)
    except (KeyError, IndexError, ValueError, RuntimeError) as error:
        raise UserError(f"{path}: its {part} is incomplete, or of another architecture ({error})") from None

    # whole, and of the shapes that the configuration gives
    try:
        matched = weights.match(empty, {name: tuple(tensor.shape) for name, tensor in tensors.items()}, path)
        weights.refuse_missing(empty, set(matched.values()), path)
    except UserError as error:
        raise UserError(f"{error}; is it complete, and is --config_name_or_path of its architecture?") from None
    return {name: tensors[name] for name in matched}


def _write_part(tensors, part, folder):
    if not tensors:
        return shutil.rmtree(folder, ignore_errors=True)  # a configuration without weights
    stem = weights.TRANSFORMERS_STEM if part.startswith("text_encoder") else weights.DIFFUSERS_STEM
    shards = _shards(tensors)
    for i, shard in enumerate(shards, 1):
        halves = {name: tensors[name].half() for name in shard}
        write_safetensors(folder / f"{stem}-{i:05d}-of-{len(shards):05d}.safetensors", halves, {"format": "pt"})


def _respell(part, tensors, empty):
    """Weights by their original names -> by diffusers' names."""
    from diffusers.loaders.single_file_utils import (
        convert_ldm_unet_checkpoint,
        convert_ldm_vae_checkpoint,
        convert_open_clip_checkpoint,
    )

    if part == "unet":
        return convert_ldm_unet_checkpoint(tensors, empty.config)
    if part == "vae":
        return convert_ldm_vae_checkpoint(tensors, empty.config)
    if part == "text_encoder_2":
        return convert_open_clip_checkpoint(empty, tensors, prefix=PREFIXES[part])
    return {name.removeprefix(PREFIXES[part]): tensor for name, tensor in tensors.items()}


def _shards(tensors):
    """Names in lists of at most CHUNK_BYTES in fp16 (or one tensor): no more than that is copied at a time."""
    shards, size = [[]], 0
    for name, tensor in tensors.items():
        size += 2 * tensor.numel()
        if shards[-1] and size > weights.CHUNK_BYTES:
            shards.append([])
            size = 2 * tensor.numel()
        shards[-1].append(name)
    return shards
'''

# ========================================================================================== common/model/tiny.py

MODULES['common/model/tiny.py'] = r'''
"""The demo where its trained model is absent: a tiny SDXL with random weights beside a drawn, captioned image set.

Both are made in about a second and without a network. torch and diffusers are imported when the model is made.
"""

import os
import re
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path

from common.cli.demo_settings import demo_settings
from common.model import tiny_pictures

# SDXL's topology and noise schedule, from the config files of stabilityai/stable-diffusion-xl-base-1.0.
# The widths are left open.
UNET = dict(
    layers_per_block=2,
    use_linear_projection=True,
    addition_embed_type="text_time",
    down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
)
VAE = dict(
    layers_per_block=2,
    latent_channels=4,
    scaling_factor=0.13025,
    force_upcast=False,
    down_block_types=("DownEncoderBlock2D",) * 4,
    up_block_types=("UpDecoderBlock2D",) * 4,
)
SCHEDULER = dict(
    beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", timestep_spacing="leading", steps_offset=1
)
# 64 px are 8 latents a side. Text is 32 + 48 = 80 wide; pooled text (64) and six time ids of 8 numbers make 112.
TINY = dict(
    unet=dict(
        sample_size=8,
        block_out_channels=(16, 32, 64),
        norm_num_groups=8,
        transformer_layers_per_block=[1, 1, 2],
        attention_head_dim=[1, 2, 4],
        cross_attention_dim=80,
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=112,
    ),
    text_encoder=dict(
        hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, projection_dim=32
    ),
    text_encoder_2=dict(
        hidden_size=48,
        intermediate_size=96,
        num_hidden_layers=3,
        num_attention_heads=3,
        projection_dim=64,
        hidden_act="gelu",
    ),
    vae=dict(sample_size=64, block_out_channels=(8, 16, 16, 24), norm_num_groups=8),
)

# The vocabulary: every word of the pictures' captions, and what users add to them
WORDS = (
    *tiny_pictures.WHO,
    *tiny_pictures.MOODS,
    *tiny_pictures.EYES,
    *tiny_pictures.HAIR,
    *tiny_pictures.SCENES,
    "with eyes and hair fur dressed in front of",
    "Naruto style",
)


def tokenizers(texts: Iterable[str]) -> tuple:
    """(tokenizer, tokenizer_2) with a byte-level vocabulary.

    The order is CLIP's: bytes, bytes that end a word, merges, start, end.
    Every word of `texts` becomes one token; other text costs about one a letter.
    As SDXL's, they pad with end-of-text and "!" (id 0).
    """
    from tokenizers.pre_tokenizers import ByteLevel
    from transformers import CLIPTokenizer

    merges = merges_of(sorted({word for text in texts for word in re.findall(r"\w+|[^\w\s]+", text.lower())}))
    letters = sorted(ByteLevel.alphabet())
    tokens = [
        *letters,
        *(f"{letter}</w>" for letter in letters),
        *("".join(pair) for pair in merges),
        "<|startoftext|>",
        "<|endoftext|>",
    ]
    ids = {token: i for i, token in enumerate(dict.fromkeys(tokens))}
    return tuple(
        CLIPTokenizer(vocab=ids, merges=merges, pad_token=pad, model_max_length=77) for pad in ("<|endoftext|>", "!")
    )


def merges_of(words: list[str]) -> list[tuple[str, str]]:
    """Byte-pair merges that make one token of each word.

    The most frequent pair comes first; of equals the first in the alphabet.
    The trainer of `tokenizers` leaves the order of equals to chance.
    Embeddings trained in one process would be of no use in the next.
    """
    merges = []
    pieces = [[*word[:-1], f"{word[-1]}</w>"] for word in words]
    while pairs := Counter(pair for word in pieces for pair in zip(word, word[1:])):
        merges.append(min(pairs, key=lambda pair: (-pairs[pair], pair)))
        for word in pieces:
            for i in reversed([i for i, pair in enumerate(zip(word, word[1:])) if pair == merges[-1]]):
                word[i : i + 2] = ["".join(word[i : i + 2])]
    return merges


def sdxl(widths: dict[str, dict], texts: Iterable[str], device: str):
    """StableDiffusionXLPipeline with SDXL's topology and untrained fp32 weights, on `device` ("meta": shapes only).

    `widths` holds the open config values of unet, text_encoder, text_encoder_2 and vae; see `tokenizers` for `texts`.
    """
    import torch
    from diffusers import AutoencoderKL, EulerDiscreteScheduler, StableDiffusionXLPipeline, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    first, second = tokenizers(texts)
    # pooling looks for the config's eos_token_id, so it has to be the tokenizer's own
    ids = dict(vocab_size=len(first), bos_token_id=first.bos_token_id, eos_token_id=first.eos_token_id)
    with torch.device(device):
        parts = dict(
            unet=UNet2DConditionModel(**UNET, **widths["unet"]),
            vae=AutoencoderKL(**VAE, **widths["vae"]),
            text_encoder=CLIPTextModel(CLIPTextConfig(**ids | widths["text_encoder"])),
            text_encoder_2=CLIPTextModelWithProjection(CLIPTextConfig(**ids | widths["text_encoder_2"])),
        )
    return StableDiffusionXLPipeline(
        **parts, tokenizer=first, tokenizer_2=second, scheduler=EulerDiscreteScheduler(**SCHEDULER)
    )


def build_model(folder: Path) -> None:
    """Writes a tiny random SDXL as a diffusers folder (fp32 safetensors, the same weights every time)."""
    import torch

    from common.model.device import quieten_libraries

    quieten_libraries()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        sdxl(TINY, WORDS, "cpu").save_pretrained(folder)


def build_once(folder: Path, build: Callable[[Path], None]) -> Path:
    """`folder`, built if absent.

    It appears whole or not at all; of two processes that build at once the first one wins.
    """
    if not folder.exists():
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".building-", dir=folder.parent) as scratch:
            build(Path(scratch) / folder.name)
            try:
                os.replace(Path(scratch) / folder.name, folder)
            except OSError:
                if not folder.exists():
                    raise
    return folder


def demo_assets(root: Path) -> tuple[Path, Path]:
    """(model folder, image folder) of the demo; the first call builds those of the tiny one."""
    settings = demo_settings(root)
    model = Path(settings["pretrained_model_name_or_path"])
    data = Path(settings["train_data_dir"][0])
    return build_once(model, build_model), build_once(data, tiny_pictures.build_images)
'''

# ================================================================================= common/model/tiny_pictures.py

MODULES['common/model/tiny_pictures.py'] = r'''
"""The pictures of the tiny demo: characters in flat colours and dark outlines, and captions of what they show."""

import json
import math
import random
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from PIL import Image, ImageDraw

Point = tuple[float, float]


class Ellipse(NamedTuple):
    """In scene units: 1/100 of the shorter side; x counts from the middle, y up from the lower edge."""

    fill: str
    centre: Point
    radii: Point


class Polygon(NamedTuple):
    """In scene units, see Ellipse."""

    fill: str
    corners: tuple[Point, ...]


INK, SKIN = "#2b2340", "#ffdcbf"
EYES = dict(blue="#3f8ff0", green="#3fb96a", brown="#8a5630", purple="#9a5be0")
WHO, MOODS = ("boy", "girl", "cat"), ("smiling", "laughing")
HAIR = dict(orange="#ff9038", black="#4a4560", pink="#ff8fb8", yellow="#ffd84d", white="#eeeef6", blue="#5aa7f2")
# A scene is a sky and shapes from back to front.
SCENES = {
    "a green hill": (
        "#a9e2ff",
        Ellipse("#fff3a0", (-34, 84), (10, 10)),
        Ellipse("#8fd66a", (40, 0), (70, 44)),
        Ellipse("#63bd58", (-40, -12), (80, 40)),
    ),
    "the sea": (
        "#c9f0ff",
        Ellipse("#ffffff", (40, 84), (18, 7)),
        Polygon("#3fa3e0", ((-80, -9), (-80, 44), (80, 44), (80, -9))),
        Ellipse("#ffe2a0", (-10, -20), (90, 36)),
    ),
    "a sunset": (
        "#ffb36b",
        Ellipse("#ff6b5e", (28, 62), (26, 26)),
        Ellipse("#9a5a8c", (-46, 8), (60, 38)),
        Ellipse("#6f4480", (50, -4), (60, 34)),
    ),
    "a snowy mountain": (
        "#d6ecff",
        Polygon("#8fa3cf", ((-80, 0), (-28, 98), (34, 0))),
        Polygon("#ffffff", ((-41, 76), (-28, 98), (-13, 76), (-27, 68))),
        Ellipse("#eef6ff", (0, -30), (100, 58)),
    ),
    "a pink garden": (
        "#ffe6ef",
        Ellipse("#ffb0cc", (-44, 82), (24, 18)),
        Ellipse("#ffb0cc", (46, 74), (22, 17)),
        Ellipse("#a5dc8c", (0, -26), (100, 56)),
    ),
}

# Outlines that are the same in every character, and where the hair of girls falls.
SHOULDERS = ((-32, -9), (-28, 14), (-12, 22), (12, 22), (28, 14), (32, -9))
LONG_HAIR = ((-33, 44), (-37, 8), (-18, 12), (18, 12), (37, 8), (33, 44))
FRINGE = ((-26, 46), (-19, 50), (-13, 59), (-4, 51), (3, 60), (10, 51), (17, 57), (26, 46))
ABOVE_THE_FRINGE = ((27, 62), (14, 72), (-14, 72), (-27, 62))
LAUGH = ((-7, 31), (7, 31), (5, 25), (0, 23), (-5, 25))
SMILE = ((-6, 29), (-4, 27), (-1.5, 26), (1.5, 26), (4, 27), (6, 29))
SHAPES_PX = ((96, 96), (128, 96), (96, 128))  # width and height


class Ink:
    """A picture of flat colours in dark outlines, painted enlarged and then shrunk: Pillow's shapes have hard edges."""

    def __init__(self, width_px: int, height_px: int, sky: str):
        self.size = (width_px, height_px)
        enlarged = 4 if min(width_px, height_px) < 512 else 2
        self.image = Image.new("RGB", (width_px * enlarged, height_px * enlarged), sky)
        self.brush = ImageDraw.Draw(self.image)
        self.unit = min(self.image.size) / 100

    def pixels(self, points: Iterable[Point]) -> list[Point]:
        """Scene units -> pixels of the enlarged picture."""
        return [(self.image.width / 2 + x * self.unit, self.image.height - y * self.unit) for x, y in points]

    def paint(self, shape: Ellipse | Polygon, line: float = 1.6) -> None:
        """A filled shape with an outline `line` units wide."""
        if isinstance(shape, Ellipse):
            (x, y), (rx, ry) = shape.centre, shape.radii
            bounds = self.pixels([(x - rx, y + ry), (x + rx, y - ry)])
            self.brush.ellipse(bounds, shape.fill, INK if line else None, round(line * self.unit))
        else:
            self.brush.polygon(self.pixels(shape.corners), shape.fill)
            if line:
                self.stroke((*shape.corners, *shape.corners[:2]), line=line)

    def stroke(self, points: Iterable[Point], line: float = 1.6) -> None:
        self.brush.line(self.pixels(points), INK, round(line * self.unit), joint="curve")


def spikes(centre: Point, inner: float, outer: float, *, count: int, start: int, end: int) -> tuple[Point, ...]:
    """Corners of a fan of `count` points between two angles (degrees, counter-clockwise from three o'clock)."""
    x, y = centre
    corners = []
    for i in range(2 * count + 1):
        angle = math.radians(start + (end - start) * i / (2 * count))
        r = outer if i % 2 else inner
        corners.append((x + r * math.cos(angle), y + r * math.sin(angle)))
    return tuple(corners)


def paint_head(ink: Ink, who: str, hair: str) -> None:
    """Head, and hair or ears, around (0, 44)."""
    # What lies behind the head
    if who == "cat":
        for side in (-1, 1):
            ink.paint(Polygon(hair, ((side * 25, 50), (side * 23, 86), (side * 5, 66))))
            ink.paint(Polygon("#ffb3b8", ((side * 21, 60), (side * 20.5, 76), (side * 12, 66))), line=0)
    elif who == "girl":
        ink.paint(Ellipse(hair, (0, 44), (33, 36)))
        ink.paint(Polygon(hair, LONG_HAIR))
        ink.paint(Ellipse(hair, (0, 44), (31.5, 34.5)), line=0)
    else:
        ink.paint(Polygon(hair, spikes((0, 47), 28, 41, count=9, start=-15, end=195)))

    # The head, and the hair over the forehead
    ink.paint(Ellipse(hair if who == "cat" else SKIN, (0, 44), (26, 24)))
    if who != "cat":
        ink.paint(Polygon(hair, FRINGE + ABOVE_THE_FRINGE), line=0)
        ink.stroke(FRINGE)


def paint_face(ink: Ink, who: str, mood: str, eyes: str) -> None:
    # Cheeks and eyes
    for side in (-1, 1):
        ink.paint(Ellipse("#ff9d9d", (side * 18, 31), (4, 2.4)), line=0)
        ink.paint(Ellipse(eyes, (side * 11, 40), (6.4, 7.8)))
        ink.paint(Ellipse(INK, (side * 11, 39), (2.2, 3.6)), line=0)
        ink.paint(Ellipse("#ffffff", (side * 11 - 2, 43), (2, 2.4)), line=0)

    # Mouth, and a cat's nose
    if mood == "laughing":
        ink.paint(Polygon("#d8505a", LAUGH))
    else:
        ink.stroke(SMILE, line=2)
    if who == "cat":
        ink.paint(Polygon("#ff8f9a", ((-2.5, 35), (2.5, 35), (0, 32))), line=1)


def render_character(rng: random.Random, width_px: int, height_px: int) -> tuple[Image.Image, str]:
    """One picture and its caption; every attribute is chosen independently of the others."""
    choices = (WHO, MOODS, EYES, HAIR, HAIR, SCENES)
    who, mood, eyes, hair, clothes, scene = (rng.choice(list(values)) for values in choices)

    # From back to front: scene, body, head
    sky, *shapes = SCENES[scene]
    ink = Ink(width_px, height_px, sky)
    for shape in shapes:
        ink.paint(shape, line=1)
    ink.paint(Polygon(HAIR[clothes], SHOULDERS))
    paint_head(ink, who, HAIR[hair])
    paint_face(ink, who, mood, EYES[eyes])

    looks = f"{eyes} eyes and {hair} {'fur' if who == 'cat' else 'hair'}"
    text = f"a {mood} {who} with {looks}, dressed in {clothes}, in front of {scene}"
    return ink.image.resize(ink.size, Image.Resampling.LANCZOS), text


def build_images(folder: Path) -> None:
    """Writes 24 PNGs of three shapes and metadata.jsonl (file_name, text); the same ones every time."""
    rng = random.Random(0)
    folder.mkdir(parents=True)
    with (folder / "metadata.jsonl").open("w", encoding="utf-8") as metadata:
        for i in range(24):
            image, text = render_character(rng, *rng.choice(SHAPES_PX))
            image.save(folder / f"{i:03d}.png")
            metadata.write(json.dumps({"file_name": f"{i:03d}.png", "text": text}) + "\n")
'''

# ======================================================================================= common/model/weights.py

MODULES['common/model/weights.py'] = r'''
"""A part's configuration and safetensors files -> the module, filled: UNet, VAE and text encoders go the same way.

The part is built without memory, checked against its files and filled from them. `fill` is strict: a weight that is
missing, unknown or of another shape is refused before anything of the part is loaded.
"""

import itertools
import re
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from common.errors import UserError

CHUNK_BYTES = 512 * 2**20
DIFFUSERS_STEM = "diffusion_pytorch_model"
TRANSFORMERS_STEM = "model"
# What older and other tools keep beside the weights of a text encoder: SDXL computes with none of it.
_UNUSED = re.compile(r"(^|\.)(position_ids|logit_scale|text_projection\.weight)$")
# The attention of a VAE as diffusers before 0.17 named it.
_OLD_ATTENTION = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}


def empty_part(class_name: str, folder: Path) -> torch.nn.Module:
    """The part that folder/config.json describes, on the meta device: names and shapes, no memory.

    Raises:
        UserError: a configuration that the class does not take.
    """
    import diffusers
    import transformers
    from accelerate import init_empty_weights

    try:
        if class_name.startswith("CLIP"):
            config = transformers.CLIPTextConfig.from_pretrained(folder)
            with init_empty_weights(include_buffers=False):  # position_ids is in no file: it must be computed
                return getattr(transformers, class_name)(config)
        part = getattr(diffusers, class_name)
        with torch.device("meta"):
            return part.from_config(part.load_config(folder))
    except (TypeError, ValueError, KeyError, IndexError, AttributeError, RuntimeError, ZeroDivisionError) as error:
        why = " ".join(str(error).split())[:200]
        raise UserError(f"{folder}/config.json: describes no {class_name} ({why})") from None


# ---------------------------------------------------------------- its files


def variant_in(folder: Path, variant: str | None) -> str | None:
    """`variant` where the folder has weights of it, else None: the plain ones."""
    return variant if variant and any(folder.glob(f"*.{variant}*.safetensors")) else None


def weight_files(folder: Path, variant: str | None, stem: str = DIFFUSERS_STEM) -> list[Path]:
    """The safetensors files of a part: those of the variant when there are any, else the plain ones.

    One file, or its numbered shards in order.

    Raises:
        UserError: there are none.
    """
    found = variant_in(folder, variant)
    name = f"{stem}.{found}" if found else stem
    whole = folder / f"{name}.safetensors"
    if whole.exists():
        return [whole]
    suffix = f".{found}" if found else ""
    spellings = f"{name}-?????-of-?????.safetensors", f"{stem}-?????-of-?????{suffix}.safetensors"
    shards = sorted({shard for spelling in spellings for shard in folder.glob(spelling)})
    if not shards:
        raise UserError(f"{folder}: no {name}.safetensors in it (only safetensors are read; pickles can run code)")
    return shards


def shapes_in(file: Path) -> dict[str, tuple[int, ...]]:
    """{name: shape} of a safetensors file, in the order of its data; only the header is read.

    Raises:
        UserError: a damaged file.
    """
    try:
        with safe_open(file, "pt") as tensors:
            return {name: tuple(tensors.get_slice(name).get_shape()) for name in tensors.offset_keys()}
    except (SafetensorError, OSError) as error:
        raise UserError(f"{file}: damaged ({error}); download or copy it again") from None


def match(module: torch.nn.Module, shapes: dict[str, tuple[int, ...]], file: Path) -> dict[str, str]:
    """{name in the file: name in the module} for the weights of `shapes` that the module has.

    Raises:
        UserError: a weight that the module does not have, or has in another shape.
    """
    wanted = module.state_dict()
    names = {}
    for name, shape in shapes.items():
        own = next((spelling for spelling in _spellings(name) if spelling in wanted), None)
        if own is None and _UNUSED.search(name):
            continue
        if own is None:
            raise UserError(f"{file}: {name} does not belong to this architecture ({type(module).__name__})")
        asked = list(wanted[own].shape)
        if list(shape) != asked:
            raise UserError(f"{file}: {name} has the shape {list(shape)}, its configuration asks for {asked}")
        names[name] = own
    return names


def _spellings(name):
    """A weight's name in the files of all versions -> what it may be called in the module of this one."""
    before, _, layer = name.rpartition(".")[0].rpartition(".")
    respelt = f"{before}.{_OLD_ATTENTION[layer]}.{name.rpartition('.')[2]}" if layer in _OLD_ATTENTION else name
    # transformers 5 dropped `text_model.` from the names inside CLIPTextModel; files have it, or not
    return name, respelt, name.removeprefix("text_model."), f"text_model.{name}"


def refuse_missing(module: torch.nn.Module, found: set[str], where: Path) -> None:
    """Check that `found` names every weight of the module; `where` is the file or folder that should have held them.

    Raises:
        UserError: one is missing.
    """
    if missing := sorted(module.state_dict().keys() - found):
        example = f"{missing[0]} of {type(module).__name__}"
        raise UserError(f"{where}: {len(missing)} of its weights are missing, e.g. {example}")


def check_weights(module: torch.nn.Module, files: list[Path]) -> dict[Path, dict[str, str]]:
    """{file: {name in the file: name in the module}}. Reads headers only.

    Raises:
        UserError: a damaged file; a weight that is missing, unknown or of another shape. It names the file.
    """
    matched = {file: match(module, shapes_in(file), file) for file in files}
    found = set(itertools.chain.from_iterable(names.values() for names in matched.values()))
    refuse_missing(module, found, files[0] if len(files) == 1 else files[0].parent)
    return matched


# ---------------------------------------------------------------- filling


def fill(module: torch.nn.Module, files: list[Path], *, device: torch.device, dtype: torch.dtype) -> None:
    """Fill a module made on the meta device from safetensors files, in `dtype`, straight on `device`.

    A file is mapped for CHUNK_BYTES at a time: what was read is not counted as ours for longer than that.

    Raises:
        UserError: see `check_weights`.
    """
    for file, names in check_weights(module, files).items():
        for chunk in _chunks(file, names):
            with safe_open(file, "pt", device=str(device)) as tensors:
                weights = {names[name]: tensors.get_tensor(name).to(dtype) for name in chunk}
            for name in [name for name in weights if name.endswith(".weight") and _is_4bit(module, name)]:
                _quantise(module.get_submodule(name.removesuffix(".weight")), weights.pop(name), device)
            module.load_state_dict(weights, strict=False, assign=True)


def _quantise(layer, weight, device):
    empty = layer.weight
    options = dict(compress_statistics=empty.compress_statistics, quant_type=empty.quant_type, module=layer)
    unquantised = type(empty)(weight, requires_grad=False, **options)
    layer.weight = unquantised.to(device)  # Params4bit quantises when it is moved


def _is_4bit(module, weight_name):
    """By the name of its class: bitsandbytes may not be installed."""
    return type(module.get_parameter(weight_name)).__name__ == "Params4bit"


def _chunks(file, names):
    """The tensor `names` of a file, in its own order, in lists of about CHUNK_BYTES."""
    sizes = {name: 2 * torch.Size(shape).numel() for name, shape in shapes_in(file).items() if name in names}
    ends = itertools.accumulate(sizes.values())
    for _, group in itertools.groupby(zip(sizes, ends), key=lambda pair: pair[1] // CHUNK_BYTES):
        yield [name for name, _ in group]
'''

# ===================================================================================== common/render/__init__.py

MODULES['common/render/__init__.py'] = r'''
"""Adapters -> pictures and grids."""
'''

# ===================================================================================== common/render/sampling.py

MODULES['common/render/sampling.py'] = r'''
"""Adapters -> images. One generator per image, so an image is the same alone or in a batch, on any device."""

import dataclasses
import math

import torch

from common import errors
from common.adapter_files import into_pipeline
from common.errors import UserError
from common.fast import frozen_layers
from common.fast.graphs import Graphed
from common.model import device, loading
from common.model.schedulers import make_scheduler

STEPS, GUIDANCE = 30, 7.5
# GiB on the GPU, fp16: all of SDXL's weights, those of the UNet, and what one image of 1024 px needs beside them.
ALL_GIB, UNET_GIB, IMAGE_GIB = 6.5, 4.8, 4.0


def generator(seed):
    """The CPU generator of one image."""
    return torch.Generator("cpu").manual_seed(seed)


@dataclasses.dataclass(frozen=True)
class Settings:
    """What an image depends on beside prompt, seed and adapters.

    `image` (PIL, already `resolution` px square) makes it img2img.
    """

    resolution: int = 1024
    steps: int = STEPS
    guidance_scale: float = GUIDANCE
    guidance_rescale: float = 0.0
    negative_prompt: str | None = None
    image: object = None
    strength: float = 0.6

    @property
    def steps_run(self):
        """img2img starts part of the way."""
        return self.steps if self.image is None else int(self.steps * self.strength)


def choose_memory(memory, host, settings, batch_size):
    """The memory tier that `--memory` means here: gpu (everything), offload (the part at work), sequential (a layer).

    Returns:
        (tier, the reason for it, for people to read).
    Raises:
        UserError: a tier that moves weights to and from a GPU, without a GPU.
    """
    if host.device.type != "cuda":
        if memory in ("offload", "sequential"):
            raise UserError(f"--memory {memory}: needs a CUDA GPU; on a {host.device.type} use --memory auto")
        return host.device.type, "no GPU"
    if memory != "auto":
        return memory, f"--memory {memory}"

    # The fastest tier that fits what is free
    free_gib = torch.cuda.mem_get_info(host.device)[0] / device.GIB
    scale = torch.finfo(host.dtype).bits / 16
    image_gib = IMAGE_GIB * batch_size * (settings.resolution / 1024) ** 2
    for tier, weights_gib in (("gpu", ALL_GIB), ("offload", UNET_GIB)):
        need_gib = scale * (weights_gib + image_gib)
        if need_gib <= free_gib:
            return tier, f"{free_gib:.1f} GiB of GPU memory free, about {need_gib:.1f} needed"
    return (
        "sequential",
        f"{free_gib:.1f} GiB of GPU memory free, {need_gib:.1f} needed even for one part at a time; slow",
    )


class Sampler:
    """One loaded SDXL, the adapters beside it, and the memory tier that it runs in. Not thread-safe.

    Adapters are never fused: every call names the active ones, and the base is the same model with all of them off.
    Use: `Sampler(...)`, `load` for each adapter, `place`, then `render`.
    """

    def __init__(self, model, host, scheduler, memory, *, img2img=False, cuda_graph=True):
        import diffusers

        self.host = host
        self.memory = memory
        self.cuda_graph = cuda_graph
        self.adapters = []
        self._active = None
        self._graph = None
        self._most_images = math.inf

        # What is offloaded lives in RAM; what is not goes straight to the GPU, so RAM never holds the model twice.
        home = dataclasses.replace(host, device=torch.device("cpu")) if memory in ("offload", "sequential") else host
        (tokenizer, text_encoder), (tokenizer_2, text_encoder_2) = loading.load_text_encoders(model, home)

        # The pipeline of diffusers around these parts
        pipeline = diffusers.StableDiffusionXLImg2ImgPipeline if img2img else diffusers.StableDiffusionXLPipeline
        self.pipeline = pipeline(
            vae=loading.load_vae(model, home).to(host.dtype),  # the pipeline itself upcasts a VAE that needs it
            text_encoder=text_encoder,
            text_encoder_2=text_encoder_2,
            tokenizer=tokenizer,
            tokenizer_2=tokenizer_2,
            unet=loading.load_unet(model, home).eval(),
            scheduler=make_scheduler(scheduler, model.scheduler),
            force_zeros_for_empty_prompt=loading.zero_unconditional(model),
            add_watermarker=False,
        )
        self.pipeline.set_progress_bar_config(disable=True)
        self.pipeline.vae.enable_slicing()  # a batch is decoded image by image: same pixels, less memory

    def load(self, file):
        """Load an adapter file; returns the name to activate it by. Before `place`."""
        name = f"adapter{len(self.adapters):02d}"
        into_pipeline.load_adapter(self.pipeline, file, name, say=self.host.say)
        self.adapters.append(name)
        return name

    def place(self):
        """Put the memory tier into effect: a UNet that is whole on the GPU has fused layers, if it stays, a graph."""
        unet = self.pipeline.unet
        if self.memory in ("gpu", "offload"):
            frozen_layers.fuse_unet(unet, self.host.device, self.host.say)
        if self.memory == "gpu":
            self._replay(unet)
        elif self.memory == "offload":
            self.pipeline.enable_model_cpu_offload(device=self.host.device)
        elif self.memory == "sequential":
            frozen_layers.unfuse_unet(unet)
            self.pipeline.enable_sequential_cpu_offload(device=self.host.device)

    def _replay(self, unet):
        """Let the UNet's passes be captured and replayed, see graphs.Graphed."""
        launch = unet.forward

        def predict(fields):
            added = {name: fields[name] for name in ("text_embeds", "time_ids")}
            return launch(
                fields["sample"], fields["timestep"], fields["text"], added_cond_kwargs=added, return_dict=False
            )[0]

        graph = self._graph = Graphed(predict, self.host.device, enabled=self.cuda_graph, say=self.host.say)

        def forward(sample, timestep, encoder_hidden_states, added_cond_kwargs, **none_of_the_rest):
            predicted = graph(dict(sample=sample, timestep=timestep, text=encoder_hidden_states, **added_cond_kwargs))
            return (predicted.clone(),)  # schedulers keep some; the next replay writes over it

        unet.forward = forward

    def _stop_replaying(self):
        if self._graph:
            self._graph.clear()
            del self.pipeline.unet.forward
            self._graph = None

    def render(self, adapters, prompt, seeds, settings, on_step=lambda images: None):
        """Images of one prompt, one per seed; out of GPU memory, the same in a smaller way that is announced.

        Args:
            adapters: [(name, scale)] to be active together; none is the base model.
            on_step: called after every denoising step with the number of images in it.
        Raises:
            UserError: out of memory in the smallest plan.
        """
        if len(seeds) > self._most_images:
            parts = [seeds[i : i + self._most_images] for i in range(0, len(seeds), self._most_images)]
            return [image for part in parts for image in self.render(adapters, prompt, part, settings, on_step)]
        try:
            return self._render(adapters, prompt, seeds, settings, on_step)
        except RuntimeError as error:
            if not errors.ran_out(error):
                raise
        # outside of this block the failed call's tensors are free
        self.pipeline.vae.to(
            dtype=self.host.dtype
        )  # cut short while upcast, it would stay in fp32 and fail every later call
        self.pipeline.maybe_free_model_hooks()
        if self._graph:
            self._graph.clear()
        device.free_memory(self.host.device)
        if len(seeds) > 1:
            self.host.say(f"out of GPU memory with {len(seeds)} images at a time: trying half")
            self._most_images = len(seeds) // 2  # of later prompts too
            return self.render(adapters, prompt, seeds, settings, on_step)
        self._step_down(settings)
        return self.render(adapters, prompt, seeds, settings, on_step)

    def _render(self, adapters, prompt, seeds, settings, on_step):
        def after_step(pipeline, step, t, tensors):
            on_step(len(seeds))
            return tensors

        self._activate(adapters)
        size = dict(height=settings.resolution, width=settings.resolution)
        framing = size if settings.image is None else dict(image=settings.image, strength=settings.strength)
        return self.pipeline(
            prompt=[prompt] * len(seeds),
            # Not "": only for None the pipeline uses the zeros that SDXL was trained with.
            negative_prompt=[settings.negative_prompt] * len(seeds) if settings.negative_prompt else None,
            num_inference_steps=settings.steps,
            guidance_scale=settings.guidance_scale,
            guidance_rescale=settings.guidance_rescale,
            generator=[generator(seed) for seed in seeds],
            callback_on_step_end=after_step,
            **framing,
        ).images

    def _activate(self, adapters):
        if not self.adapters or adapters == self._active:
            return
        self._active = adapters
        if self._graph:
            self._graph.clear()  # adapters and their scales are part of it
        if not adapters:
            return self.pipeline.disable_lora()
        self.pipeline.enable_lora()
        self.pipeline.set_adapters([name for name, _ in adapters], [scale for _, scale in adapters])

    def _step_down(self, settings):
        """The next smaller plan: gpu, offload, VAE in tiles, sequential."""
        if self.memory == "gpu":
            self.memory, plan = "offload", "only the part at work stays on the GPU"
        elif not self.pipeline.vae.use_tiling:
            plan = "the VAE works in tiles"
            self.pipeline.vae.enable_tiling()
        elif self.memory == "offload":
            self.memory, plan = "sequential", "one layer at a time on the GPU, which is slow"
        else:
            raise UserError(
                f"--resolution {settings.resolution}: out of GPU memory in the smallest plan; lower it, or free the GPU"
            )
        self.host.say(f"out of GPU memory: {plan}")
        self._stop_replaying()
        self.pipeline.remove_all_hooks()
        self.place()
'''

# ============================================================================ common/render/validation_images.py

MODULES['common/render/validation_images.py'] = r'''
"""Validation prompts -> images, by the UNet that is being trained and the text conditioning that training has."""

import functools

import torch
from tqdm import tqdm

from common.model import device, loading, memory
from common.model.adapters import without_dropout
from common.model.schedulers import default_guidance_rescale, make_scheduler
from common.render.sampling import GUIDANCE, STEPS, generator


@torch.no_grad()
def render_while_training(unet, text, model, host, *, prompts, resolution, seed):
    """One image per prompt with the UNet as it stands; the VAE is loaded for the decoding only, and gone afterwards.

    Returns:
        list of PIL images, `resolution` px square; prompt i has seed + i.
    Raises:
        torch.OutOfMemoryError: the denoising does not fit; the decoding steps down to tiles and to the CPU.
    """
    from diffusers import StableDiffusionXLPipeline

    # The pipeline without its VAE, which would take memory while the UNet needs it
    scheduler = make_scheduler("euler", model.scheduler)
    absent = dict(vae=None, text_encoder=None, text_encoder_2=None, tokenizer=None, tokenizer_2=None)
    zeros = loading.zero_unconditional(model)
    pipeline = StableDiffusionXLPipeline(
        unet=unet, scheduler=scheduler, **absent, force_zeros_for_empty_prompt=zeros, add_watermarker=False
    )
    pipeline.set_progress_bar_config(disable=True)

    # One prompt at a time, each to its latent
    unconditional = (None, None) if zeros else condition(text, "", host)
    latents = []
    with without_dropout([unet, *text.encoders]):
        for i, prompt in enumerate(tqdm(prompts, desc="validation images", leave=False)):
            prompt_embeds, pooled = condition(text, prompt, host)
            latents += pipeline(
                prompt_embeds=prompt_embeds,
                pooled_prompt_embeds=pooled,
                negative_prompt_embeds=unconditional[0],
                negative_pooled_prompt_embeds=unconditional[1],
                height=resolution,
                width=resolution,
                # The settings that infer.py has by default
                num_inference_steps=STEPS,
                guidance_scale=GUIDANCE,
                guidance_rescale=default_guidance_rescale(model.kind),
                generator=generator(seed + i),
                output_type="latent",
            ).images

    # The VAE has the memory to itself
    del pipeline
    device.free_memory(host.device)
    return _decode(latents, model, host)


def _decode(latents, model, host):
    """[latent [C, h, w]] -> PIL images, by the VAE on the device; where memory runs out, in tiles, then on the CPU."""
    from diffusers.image_processor import VaeImageProcessor

    vae = loading.load_vae(model, host)
    whole = functools.partial(_to_pixels, vae=vae)

    def in_tiles(latent):
        vae.enable_tiling()
        return whole(latent)

    def on_cpu(latent):
        vae.disable_tiling()
        vae.to("cpu", torch.float32)
        return whole(latent)

    ways = {"whole": whole, "in tiles": in_tiles, "on the CPU, which is slow,": on_cpu}
    decode = memory.StepDown("while decoding", ways, host)
    return VaeImageProcessor().postprocess(torch.stack([decode(latent) for latent in latents]), output_type="pil")


def _to_pixels(latent, vae):
    """One latent [C, h, w] -> fp32 [3, H, W] in [-1, 1] on the CPU; some fine-tunes ship channel statistics."""
    config, latent = vae.config, latent[None].to(vae.device, vae.dtype)
    if config.latents_mean is None:
        latent = latent / config.scaling_factor
    else:
        mean, std = (
            torch.tensor(numbers).to(latent).view(1, -1, 1, 1) for numbers in (config.latents_mean, config.latents_std)
        )
        latent = latent * std / config.scaling_factor + mean
    return vae.decode(latent, return_dict=False)[0][0].float().cpu()


def condition(text, caption, host):
    """(prompt_embeds [1, 77, 2048], pooled [1, 1280]) of a caption that `text` (see caching) knows."""
    return text({name: value[None].to(host.device) for name, value in text.fields(caption).items()})
'''

# ========================================================================================== common/run_folder.py

MODULES['common/run_folder.py'] = r'''
"""An output folder: which run owns it, what dead runs have left in it, and its checkpoints by step.

Nothing here imports torch: a folder that cannot be used is refused at once.
"""

import contextlib
import errno
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

from common.errors import UserError

WEIGHTS = "pytorch_lora_weights.safetensors"
LOCK = ".lock"
NO_LOCKS = (errno.ENOTSUP, errno.ENOLCK, errno.EINVAL)  # what file systems without locks answer, some network drives
KAGGLE_INPUT = Path("/kaggle/input")
WRITTEN_BELOW = (".", "ema_unet", "kohya", "peft", "images")  # where a run writes files through partial ones
LITTER = re.compile(r".+\.\d+-[0-9a-f]{8}\.partial|(checkpoint-\d+|.+\.(json|jsonl|png|safetensors))\.partial")


# ---------------------------------------------------------------- one run at a time


@contextlib.contextmanager
def owned(folder: Path, host) -> Iterator[None]:
    """Inside, `folder` belongs to this run alone, and what dead runs left half written is gone.

    The lock is the kernel's: it ends with the process that holds it. A folder that was made here and stays empty is
    removed.

    Args:
        host: the device.Host; its main process holds the lock, and all of them hear of a refusal.
    Raises:
        UserError: another run is writing there.
    """
    is_new = not folder.exists()
    lock = _take_lock(folder) if host.is_main else None
    try:
        if not all(host.gather([lock is not None or not host.is_main])):
            raise _in_use(folder)
        if host.is_main:
            remove_litter(folder)
        yield
    finally:
        if lock is not None:
            _give_back(lock)
            if is_new:
                with contextlib.suppress(OSError):  # not empty
                    folder.rmdir()


def check_free(folder: Path) -> None:
    """Refuse early, before anything is loaded, what `owned` would refuse.

    One process of a launch asks: they would meet each other.

    Raises:
        UserError: another run is writing there.
    """
    if os.environ.get("RANK", "0") == "0" and (folder / LOCK).exists():
        lock = _take_lock(folder)
        if lock is None:
            raise _in_use(folder)
        _give_back(lock)


def _take_lock(folder: Path):
    """The lock of `folder`, taken as far as its file system has locks; None where another process has it."""
    from filelock import FileLock, Timeout

    folder.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder / LOCK)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        return None
    except OSError as error:
        if error.errno not in NO_LOCKS:
            raise
    return lock


def _give_back(lock) -> None:
    """Release a lock, and remove its file while nobody else can have it."""
    with contextlib.suppress(OSError):  # Windows removes it at the release
        os.unlink(lock.lock_file)
    lock.release()


def _in_use(folder: Path) -> UserError:
    return UserError(f"--output_dir {folder}: another run is writing there; wait for it, or name another folder")


def remove_litter(folder: Path) -> None:
    """Remove what runs that were killed have left half written."""
    for place in WRITTEN_BELOW:
        for path in (folder / place).glob("*.partial"):
            if LITTER.fullmatch(path.name):
                shutil.rmtree(path) if path.is_dir() else path.unlink()


# ---------------------------------------------------------------- checkpoints


def find_checkpoints(folder: Path | str) -> list[Path]:
    """Complete checkpoint folders, the oldest step first."""
    found = [path for path in Path(folder).glob("checkpoint-*") if re.fullmatch(r"checkpoint-\d+", path.name)]
    return sorted(found, key=step_of)


def step_of(checkpoint: Path) -> int:
    """The optimizer step in a checkpoint folder's name; 0 where somebody has given it another one."""
    number = re.fullmatch(r"checkpoint-(\d+)", checkpoint.name)
    return int(number[1]) if number else 0


def find_resume(resume_from_checkpoint: str | None, output_dir: Path | str) -> list[Path]:
    """The folders that `--resume_from_checkpoint` means, the one to try first at the front; [] where there is none.

    'latest' is the newest of this output folder, and the older ones in case it is damaged. On Kaggle each version of a
    notebook starts with an empty one: there it is those of a folder of the same name below /kaggle/input, where the
    output of an earlier version lies.
    """
    if resume_from_checkpoint != "latest":
        return [Path(resume_from_checkpoint)] if resume_from_checkpoint else []
    return (find_checkpoints(output_dir) or _of_earlier_versions(Path(output_dir).resolve().name))[::-1]


def _of_earlier_versions(name: str) -> list[Path]:
    """Complete checkpoint folders in folders called `name` below /kaggle/input, by their step."""
    return sorted(
        (folder for place in KAGGLE_INPUT.glob(f"**/{name}") for folder in find_checkpoints(place)), key=step_of
    )
'''

# ===================================================================================== common/system/__init__.py

MODULES['common/system/__init__.py'] = r'''
"""What this machine has and how a process lives on it: GPU, packages, folders, launchers, signals; without torch."""
'''

# ===================================================================================== common/system/attached.py

MODULES['common/system/attached.py'] = r'''
"""What is attached to a Kaggle notebook below /kaggle/input: models, captioned pictures and wheels.

There may be no internet, and these are all there is.
"""

import os
import time
from typing import NamedTuple

KAGGLE_INPUT = "/kaggle/input"
DEPTH = 6  # folders below the root: Kaggle's own layout takes up to five
SEARCH_S = 1.5  # a data set of a million files is not searched to its end
IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff")


class Attached(NamedTuple):
    """Folders, each list sorted."""

    models: list[str]  # with model_index.json
    data: list[str]  # with metadata.jsonl or .csv, or with a .txt beside a picture
    wheels: list[str]  # with .whl files


def find_attached(root: str = KAGGLE_INPUT) -> Attached:
    """Search `root`, which may be absent; below a model or a data folder nothing more is looked for."""
    found = Attached([], [], [])
    started_s = time.monotonic()
    for folder, below, files in os.walk(root):
        below.sort()
        if any(name.endswith(".whl") for name in files):
            found.wheels.append(folder)

        # A model or a data set ends the search of its branch, as do depth and time.
        if "model_index.json" in files:
            found.models.append(folder)
            below.clear()
        elif _holds_captions(files):
            found.data.append(folder)
            below.clear()
        elif folder.count(os.sep) - root.count(os.sep) >= DEPTH or time.monotonic() - started_s > SEARCH_S:
            below.clear()
    return Attached(*map(sorted, found))


def _holds_captions(files: list[str]) -> bool:
    """Whether these are the files of a folder that `--train_data_dir` can read."""
    if "metadata.jsonl" in files or "metadata.csv" in files:
        return True
    texts = {name.removesuffix(".txt") for name in files if name.endswith(".txt")}
    return any(os.path.splitext(name)[0] in texts for name in files if name.lower().endswith(IMAGE_SUFFIXES))
'''

# ======================================================================================== common/system/cards.py

MODULES['common/system/cards.py'] = r'''
"""A GPU's name and capability -> why this PyTorch cannot compute on it, or None. Nothing here imports torch."""

import re


def unsupported_card(name: str, capability: tuple[int, int], built_for: list[str]) -> str | None:
    """Why PyTorch cannot compute on a card, and what to do, in one line; None when it can.

    Code for sm_XY runs on cards of the same X and at least that Y. Code for compute_XY runs on every later one
    (CUDA C++ programming guide, application compatibility). Builds for other makers' cards name neither: not judged.

    Args:
        name, capability, built_for: of torch.cuda.get_device_name, get_device_capability and get_arch_list.
    """
    matches = [re.fullmatch(r"(sm|compute)_(\d+)(\d)[a-z]?", architecture) for architecture in built_for]
    codes = [(match[1], (int(match[2]), int(match[3]))) for match in matches if match]
    if not codes or any(_runs(kind, built, capability) for kind, built in codes):
        return None
    oldest = min(built for _, built in codes)
    return (
        f"{name} (sm_{capability[0]}{capability[1]}): this PyTorch has no code for it,"
        f" only for sm_{oldest[0]}{oldest[1]} and other cards; choose another GPU (Kaggle: choose GPU T4 x2)"
    )


def _runs(kind, built, capability):
    return built <= capability if kind == "compute" else built[0] == capability[0] and built[1] <= capability[1]
'''

# ======================================================================================= common/system/launch.py

MODULES['common/system/launch.py'] = r'''
"""How this process was started: alone, by `accelerate launch` or by torchrun; and the command that goes on."""

import json
import os
import re
import shlex
import signal
import sys
import time

SPEAKS_AFTER_S = 2.0  # a launcher that has seen one process fail ends the others well within it


def rank() -> int:
    """The place of this process among those of the run, from 0."""
    return int(os.environ.get("RANK", 0))


def say_last(said: str) -> None:
    """One line on stderr before the process ends, said once.

    Another process than the first speaks only if none has ended the run.
    """
    line = f"{os.path.basename(sys.argv[0])}: {said}"
    if rank():
        signal.signal(signal.SIGTERM, signal.SIG_DFL)  # by which the launcher ends the others
        time.sleep(SPEAKS_AFTER_S)
        line += f" (process {rank()})"
    print(line, file=sys.stderr, flush=True)
    if "TORCHELASTIC_ERROR_FILE" in os.environ:  # torchrun shows its content at the end of its own report
        with open(os.environ["TORCHELASTIC_ERROR_FILE"], "w") as file:
            json.dump({"message": line, "timestamp": int(time.time())}, file)


def leave_group() -> None:
    """Take leave of the other processes; without it torch warns at the end."""
    distributed = sys.modules.get("torch.distributed")
    if distributed and distributed.is_available() and distributed.is_initialized():
        distributed.destroy_process_group()


def resuming_command(argv: list[str]) -> str:
    """The command line `argv`, quoted for a shell, with its launcher and `--resume_from_checkpoint latest`."""
    kept = []
    words = iter(argv)
    for word in words:
        if re.fullmatch("--resume[_-]from[_-]checkpoint", word):
            next(words, None)
        elif not re.match("--resume[_-]from[_-]checkpoint=", word):
            kept.append(word)
    return shlex.join([*_launcher(), *kept, "--resume_from_checkpoint", "latest"])


def _launcher():
    """The words before the script; a launcher's own options are not known here, but for the number of processes."""
    world = os.environ.get("LOCAL_WORLD_SIZE", "1")
    if "ACCELERATE_MIXED_PRECISION" in os.environ:  # every launch by accelerate sets it
        return ["accelerate", "launch", "--quiet", *(["--num_processes", world] if world != "1" else [])]
    if "TORCHELASTIC_RUN_ID" in os.environ:
        return ["torchrun", "--nproc_per_node", world]
    return ["python"]
'''

# ===================================================================================== common/system/packages.py

MODULES['common/system/packages.py'] = r'''
"""The packages the suite needs, in the ranges it was tested with. Nothing here imports them."""

import importlib.util
import os
import re
import sys
from importlib.metadata import PackageNotFoundError, version

# The same as requirements.txt, which a one-file script does not have beside it.
# Floors: what Kaggle and Colab ship with (hosts/). Upper bounds: the newest minor release that was tested.
REQUIREMENTS = {
    "torch": ">=2.6",  # transformers switches PyTorch off below
    "diffusers": ">=0.37.1,<0.43",
    "transformers": ">=5.0,<5.25",
    "peft": ">=0.19.1,<0.22",
    "accelerate": ">=1.13,<1.16",
    "bitsandbytes": ">=0.50.2,<0.51",
    "datasets": ">=4.0,<5.3",
    "argparse-dataclass": ">=2.0,<3",
    "huggingface_hub": ">=1.11,<2.5",
    "safetensors": ">=0.7,<0.9",
    "tqdm": ">=4.67",
    "pillow": ">=11.3",
    "numpy": ">=2.0",
    "psutil": ">=5.9.5",
    "matplotlib": ">=3.10",
}
MODULES = {"argparse-dataclass": "argparse_dataclass", "pillow": "PIL"}  # where the name to import is another one
WHERE_USED = ("bitsandbytes",)  # asked for by the flags that use it


def lacking() -> dict[str, str | None]:
    """{package: its version, or None when it is absent} of what is missing or too old, those of WHERE_USED left out.

    The upper bounds are for pip: a newer package may well work.
    """
    found = {}
    for name, wanted in REQUIREMENTS.items():
        if name in WHERE_USED:
            continue
        if is_absent(name):
            found[name] = None
        elif (installed := installed_version(name)) and release(installed) < release(wanted.removeprefix(">=")):
            found[name] = installed
    return found


def is_absent(name: str) -> bool:
    return importlib.util.find_spec(MODULES.get(name, name)) is None


def installed_version(name: str) -> str | None:
    """None also where a package lies on the path without its metadata."""
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def release(text: str) -> tuple[int, ...]:
    """The numbers a version or a list of bounds begins with: (2, 6, 0) of 2.6.0+cu124."""
    return tuple(int(number) for number in re.match(r"\d+(\.\d+)*", text)[0].split("."))


def refusal(found: dict[str, str | None]) -> str:
    """One line that names what `lacking` found, with the command that brings it."""
    said = ", ".join(f"{name} is missing" if has is None else f"{name} {has} is too old" for name, has in found.items())
    return f"{said}: pip install " + " ".join(f'"{name}{REQUIREMENTS[name]}"' for name in found)


def require_parser() -> None:
    """End with one line and exit status 2 where argparse-dataclass is absent: common.cli.command_line imports it."""
    if is_absent("argparse-dataclass"):
        print(f"{os.path.basename(sys.argv[0])}: error: {refusal(lacking())}", file=sys.stderr)
        sys.exit(2)
'''

# ======================================================================================= common/system/places.py

MODULES['common/system/places.py'] = r'''
"""Where the suite keeps things on this machine. Nothing but Python is needed to ask."""

import os

CACHE_DIR = os.path.join(os.environ.get("XDG_CACHE_HOME", os.path.expanduser("~/.cache")), "sdxl-style")
'''

# ===================================================================================== common/system/stopping.py

MODULES['common/system/stopping.py'] = r'''
"""How a run is asked to end: signals and the time limit; what the first Ctrl-C says, and what later ones do."""

import contextlib
import math
import os
import signal
import socket
import stat
import sys
import threading
import time

from common.system import launch

# Windows has no SIGHUP.
SIGNALS = [signal.Signals[name] for name in ("SIGINT", "SIGTERM", "SIGHUP") if name in signal.Signals.__members__]
DOUBLE_PRESS_S = 1.0  # a second press within it is the same request


def end_in_order() -> None:
    """From here on a signal raises KeyboardInterrupt(its number), so that what is open gets closed and kept.

    Its double is ignored.
    """
    raised_s = -math.inf

    def end(number, frame):
        nonlocal raised_s
        if time.monotonic() - raised_s <= DOUBLE_PRESS_S:
            return
        raised_s = time.monotonic()
        _leave_the_terminal(number)
        # numpy, imported by torch, would swallow the exception, and be half a numpy from then on
        if _imports(frame):
            _say(ended_by(number))
            os._exit(128 + number)
        raise KeyboardInterrupt(number)

    _handle(end)


def ended_by(number: int) -> str:
    """What is said of a process that a signal has ended."""
    return "interrupted" if number == signal.SIGINT else f"ended by {signal.Signals(number).name}"


def _leave_the_terminal(number):
    """At a SIGHUP: a terminal that is gone fails every write to it, which must not stop the saving.

    A file or pipe is written on.
    """
    for stream in (1, 2) if signal.Signals(number).name == "SIGHUP" else ():
        if stat.S_ISCHR(os.fstat(stream).st_mode):
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, stream)
            os.close(nowhere)


def _imports(frame):
    """Whether `frame` is within an import."""
    while frame is not None and not frame.f_code.co_filename.startswith("<frozen importlib._bootstrap"):
        frame = frame.f_back
    return frame is not None


def _say(line):
    """Say `line` below the progress bar; the main thread may be in the middle of using the stream."""
    if launch.rank() != 0:
        return
    with contextlib.suppress(OSError):  # Ctrl-C ends what reads the lines too: `2>&1 | tee log`
        os.write(2, f"\n{os.path.basename(sys.argv[0])}: {line}\n".encode())


def _handle(handler):
    """Install `handler` for SIGNALS -> {number: the handler before}; a SIGHUP that nohup switched off stays off."""
    wanted = [number for number in SIGNALS if number.name != "SIGHUP" or signal.getsignal(number) != signal.SIG_IGN]
    return {number: signal.signal(number, handler) for number in wanted}


class StopRequest:
    """SIGINT, SIGTERM, SIGHUP or the time limit: the step in flight is finished, then a checkpoint is written.

    The limit is `ends_s` less what ending takes: the step in flight and the next one, a checkpoint, and the results,
    which take about as long as two more. The loop reports to `step_took` and `save_took`, and keeps `doing` up to date.

    Args:
        ends_s: on the monotonic clock; by then everything must be saved.
    """

    def __init__(self, ends_s: float = math.inf):
        self._signal = None
        self._ends_s = ends_s
        self._longest_step_s = 0.0
        self._longest_save_s = 0.0
        self.doing = "saving"  # what is done before the run ends, for the answer to a signal

    def step_took(self, seconds: float) -> None:
        self._longest_step_s = max(self._longest_step_s, seconds)

    def save_took(self, seconds: float) -> None:
        self._longest_save_s = max(self._longest_save_s, seconds)

    @property
    def reason(self) -> str | None:
        ending_s = 2 * self._longest_step_s + 3 * self._longest_save_s
        return self._signal or ("time limit reached" if time.monotonic() + ending_s > self._ends_s else None)

    @contextlib.contextmanager
    def listening(self):
        """The first signal asks for a stop and is answered; after DOUBLE_PRESS_S another Ctrl-C ends the process."""
        before = _handle(self._ask)
        # Python runs a handler between two of its own instructions, and a wait for the GPU can take many seconds:
        # the answer comes from a thread, which the interpreter's wakeup descriptor tells at once.
        ours, interpreters = socket.socketpair()
        interpreters.setblocking(False)
        descriptor_before = signal.set_wakeup_fd(interpreters.fileno(), warn_on_full_buffer=False)
        thread = threading.Thread(target=self._answer, args=(ours,), daemon=True)
        thread.start()
        try:
            yield
        finally:
            signal.set_wakeup_fd(descriptor_before)
            for number, handler in before.items():
                signal.signal(number, handler)
            interpreters.close()  # which ends the thread
            thread.join()
            ours.close()

    def _ask(self, number, frame=None):
        _leave_the_terminal(number)
        self._signal = self._signal or f"{signal.Signals(number).name} received"

    def _answer(self, numbers):
        """Answer the signals whose numbers arrive as bytes, until the other end is closed."""
        first_s = None
        while received := numbers.recv(1):
            number = received[0]
            if number not in SIGNALS:
                continue
            if first_s is None:
                first_s = time.monotonic()
                self._ask(number)
                again = "; press again to lose it" if number == signal.SIGINT else ""
                _say(f"{signal.Signals(number).name}: {self.doing}{again}")
            elif number == signal.SIGINT and time.monotonic() - first_s > DOUBLE_PRESS_S:
                _say("ended at once; --resume_from_checkpoint latest goes on from the last checkpoint")
                os._exit(128 + number)
'''

# ====================================================================================== common/train/__init__.py

MODULES['common/train/__init__.py'] = r'''
"""Batch -> adapter: assembly, one step, the loop, checkpoints, the report, the results."""
'''

# ====================================================================================== common/train/assembly.py

MODULES['common/train/assembly.py'] = r'''
"""A training run put together from its flags, for all trainers: data, engine, loop.

What a trainer's own technique is (which layers get which adapter, on which weights) stays in the trainer.
"""

import functools
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from common import files, run_folder
from common.cli.command_line import DEMO_ROOT
from common.data import batching, caching, captions, dataset
from common.fast import adapter_layers, frozen_layers
from common.model import adapters, device, loading, noise
from common.model.device import Host
from common.model.schedules import lr_schedule
from common.model.tiny import demo_assets
from common.system import stopping
from common.train import loops, pass_plan, prediction, report, results, resuming
from common.train.engine import Engine, EngineSettings
from common.train.run_length import RunLength, run_length, uneven_shares


@dataclass(frozen=True)
class Data:
    """Everything the loop reads, encoded once."""

    model: loading.Model
    schedule: noise.NoiseSchedule
    text: caching.CachedText | caching.LiveText
    trained_encoders: tuple  # the text encoders, where they get adapters too
    examples: batching.Examples
    held_out: batching.Examples | None
    length: RunLength


# ---------------------------------------------------------------- data


def load_data(flags, host: Host) -> Data:
    """Image-caption pairs and a model -> Samples, their latent moments and text embeddings, training and held out."""
    if host.device.type == "cuda":
        device.limit_memory(host.device, flags.max_vram_gb)
    if flags.demo:
        host.main_first(lambda: demo_assets(DEMO_ROOT))

    # Pictures with captions, and the model that will see them
    samples, bad = dataset.load_samples(
        flags.dataset_name,
        flags.train_data_dir,
        image_column=flags.image_column,
        caption_column=flags.caption_column,
        max_samples=flags.max_train_samples,
        max_bad=flags.max_bad_images,
        say=host.say,
    )
    host.say(captions.summary(samples, bad, captions.options_of(flags)))
    model = host.main_first(lambda: loading.model_of(flags, host.say))

    # What is frozen is computed once
    latents = _cache_latents(flags, samples, model, host, bad)
    training, held_out = dataset.hold_out(latents.samples, flags.validation_split)
    text = _cache_text(flags, latents.samples, held_out, model, host)

    # Training examples by number
    schedule = loading.load_noise_schedule(model, host.device)
    make_examples = _examples_maker(flags, model, schedule, text)
    examples = make_examples(latents.subset(training))
    return Data(
        model=model,
        schedule=schedule,
        text=text,
        trained_encoders=tuple(text.encoders) if flags.train_text_encoder else (),
        examples=examples,
        held_out=make_examples(latents.subset(held_out)) if held_out else None,
        length=run_length(flags, host, len(examples)),
    )


def _cache_latents(flags, samples, model, host, bad):
    return caching.cache_latents(
        samples,
        model,
        host=host,
        cache_dir=flags.cache_dir,
        max_bad=flags.max_bad_images,
        flips=(False, True) if flags.random_flip else (False,),
        bad_before=bad,
        resolution=flags.resolution,
        center_crop=flags.center_crop,
        aspect_ratio_buckets=flags.aspect_ratio_buckets,
    )


def _cache_text(flags, samples, held_out, model, host):
    wanted = [*captions.texts(samples, held_out, captions.options_of(flags)), "", *flags.validation_prompt]
    mode = "none" if flags.train_text_encoder else flags.text_cache
    return caching.cache_text(wanted, model, host=host, mode=mode, cache_dir=flags.cache_dir)


def _examples_maker(flags, model, schedule, text) -> Callable[[caching.LatentCache], batching.Examples]:
    """Everything about Examples but the samples they are of."""
    return functools.partial(
        batching.Examples,
        text=text,
        seed=flags.seed,
        num_timesteps=len(schedule.alphas_cumprod),
        captions=captions.options_of(flags),
        flip_share=0.5 if flags.random_flip else 0.0,
        drop_share=flags.caption_dropout,
        offset_strength=flags.offset_noise_strength,
        zero_unconditional=loading.zero_unconditional(model),
    )


# ---------------------------------------------------------------- engine


def build_engine(flags, host: Host, unet: torch.nn.Module, data: Data) -> Engine:
    """The UNet with its adapter -> Engine: flat buffer, forward pass, optimizer, learning-rate schedule, EMA."""
    is_fused = flags.lora_backend == "fused"
    if flags.enable_xformers_memory_efficient_attention:
        unet.enable_xformers_memory_efficient_attention()
    recompute = None
    if flags.gradient_checkpointing:
        # The fused layers' dropout is a function of a seed: no generator to rewind before the second forward pass
        recompute = pass_plan.BlockRecompute(preserve_rng_state=not is_fused)
        unet.enable_gradient_checkpointing(recompute)

    # What is trained, as one flat buffer
    encoders = data.trained_encoders
    groups = [(adapters.trainable(unet), {})]
    if encoders:
        adapters.add_text_lora(encoders, rank=flags.lora_rank, alpha=flags.lora_alpha, dropout=flags.lora_dropout)
        pairs = [pair for encoder in encoders for pair in adapters.trainable(encoder)]
        groups.append((pairs, {"lr": flags.text_encoder_lr}))
    flat = adapters.FlatParameters(groups, host.dtype if is_fused else torch.float32)

    # The same numbers, sooner
    dropout_seed = torch.zeros((), dtype=torch.int64, device=host.device)
    if is_fused:
        adapter_layers.fuse([unet, *encoders], flat, dropout_seed, host.say)
        frozen_layers.fuse_unet(unet, host.device, host.say)
    _say_what_is_trained(flags, host, flat, [unet, *encoders])

    # What moves it
    optimizer = _make_optimizer(flags, flat)
    return Engine(
        unet=unet,
        text=data.text,
        schedule=data.schedule,
        flat=flat,
        optimizer=optimizer,
        lr_factor=_lr_factor(flags, data.length.total_steps),
        host=host,
        dropout_seed=dropout_seed,
        ema=adapters.EMA(flat, flags.ema_decay) if flags.use_ema else None,
        recompute=recompute,
        settings=EngineSettings(flags.max_grad_norm, flags.min_snr_gamma, flags.seed, flags.cuda_graph),
    )


def _say_what_is_trained(flags, host, flat, modules):
    everything = sum(adapters.count(module) for module in modules)
    share = f"{len(flat):,} trainable parameters, {100 * len(flat) / everything:.2f} % of {everything:,}"
    scale = f"; scaled by alpha / rank = {flags.lora_alpha} / {flags.lora_rank}"
    host.say(f"adapter: {share}{scale if flags.lora_alpha != flags.lora_rank else ''}")


def _make_optimizer(flags, flat):
    return adapters.make_optimizer(
        flat,
        use_8bit=flags.use_8bit_adam,
        lr=flags.learning_rate,
        betas=(flags.adam_beta1, flags.adam_beta2),
        weight_decay=flags.adam_weight_decay,
        eps=flags.adam_epsilon,
    )


def _lr_factor(flags, total_steps):
    return lr_schedule(
        flags.lr_scheduler,
        warmup_steps=flags.lr_warmup_steps,
        total_steps=total_steps,
        peak_lr=flags.learning_rate,
        num_cycles=flags.lr_num_cycles,
        power=flags.lr_power,
    )


# ---------------------------------------------------------------- training


def train(flags, engine: Engine, data: Data) -> dict:
    """Run the loop, from a checkpoint if asked to, and write the results.

    Returns:
        {"output_dir", "step", "ended", "weights", "metrics": the last line of metrics.jsonl}.
    Raises:
        UserError: another run is writing to the output folder; what `resume` and the loop refuse; a file that cannot
            be written.
    """
    with run_folder.owned(Path(flags.output_dir), engine.host):
        run = _prepare(flags, engine, data)
        try:
            with run.stopping.listening():
                ended = loops.train(run)
                run.stopping.doing = "writing the results"
                engine.run_pass.clear()
                run.results.write()
        except OSError as error:
            raise run.results.rescue(run.progress, error) from None
        return run.results.summary(run.progress, ended, data.length.total_steps)


def _prepare(flags, engine, data) -> loops.Run:
    """From which step, how much at a time, and where what is measured goes."""
    host, length, output_dir = engine.host, data.length, Path(flags.output_dir)
    prediction.check(engine, data)

    # Where it starts
    recipe = results.recipe_of(flags, data)
    progress = resuming.resume(flags, engine, recipe, length)
    if host.is_main:
        files.write_json(output_dir / "config.json", recipe)

    # How a step is cut
    plan = pass_plan.choose(flags, engine, data)
    if shares := uneven_shares(flags, host.world, length.effective_batch):
        host.say(shares)
    size = f"{length.effective_batch} images, {plan.micro_batch} at a time"
    host.say(f"training: {length.total_steps} steps of {size}, from step {progress.step}")

    # Where its numbers go
    log = report.Report(
        output_dir=output_dir,
        total_steps=length.total_steps,
        resumed_step=progress.step,
        report_to=flags.report_to,
        config=asdict(flags),
        is_main=host.is_main,
    )

    # What the loop works on
    return loops.Run(
        engine=engine,
        examples=data.examples,
        held_out=data.held_out,
        length=length,
        plan=plan,
        progress=progress,
        results=results.Results(flags, engine, data, recipe, saved_step=progress.step),
        report=log,
        stopping=stopping.StopRequest(length.ends_s),
    )


def export_dora_as_lora(flags, engine: Engine, data: Data) -> None:
    """Write the plain LoRA that is nearest to a DoRA, and say how near."""
    rank, host = flags.export_dora_as_lora, engine.host
    if host.is_main:
        host.say(f"--export_dora_as_lora {rank}: takes about a second a layer on a CPU, less on a GPU")
        made = results.Results(flags, engine, data, results.recipe_of(flags, data))
        share = made.save_kohya("_as_lora", dora_rank=rank)
        host.say(
            f"kohya/*_as_lora.safetensors: a LoRA of rank {rank} with {share:.1%} of the DoRA's change, by its norm"
        )
'''

# ==================================================================================== common/train/checkpoint.py

MODULES['common/train/checkpoint.py'] = r'''
"""Checkpoints: everything needed to go on exactly where a run was. A folder is complete or absent."""

import json
import math
from pathlib import Path

import torch
import xxhash

from common import run_folder
from common.errors import UserError
from common.files import DamagedFile, read_safetensors, remove_folder, replacing_folder, write_json, write_safetensors

STATE_HASH = "state.json"  # in the metadata of state.safetensors: what belongs together is read together or not at all
DAMAGE = (OSError, ValueError, KeyError, TypeError, AttributeError, DamagedFile)  # what reading a damaged one raises


def save_checkpoint(output_dir: Path, step: int, engine, progress: dict, limit: int | None) -> None:
    """Write checkpoint-STEP/: the engine's state and `progress`; then drop all but the `limit` newest."""
    state = engine.state()
    tensors = {name: value for name, value in state.items() if torch.is_tensor(value)}
    plain = {name: value for name, value in state.items() if name not in tensors}
    plain["progress"] = progress

    folder = Path(output_dir) / f"checkpoint-{step:06d}"
    with replacing_folder(folder) as partial:
        write_safetensors(partial / "state.safetensors", tensors, {STATE_HASH: _fingerprint(plain)})
        write_json(partial / "state.json", plain)
    for old in run_folder.find_checkpoints(output_dir)[:-limit] if limit else ():
        remove_folder(old)


def load_checkpoint(folder: Path, engine) -> dict:
    """Put the engine where the checkpoint was made; returns its `progress`.

    What is refused leaves the engine as it was.
    Raises:
        DamagedFile: a checkpoint that is not what was written, or not finite.
        UserError: one of another adapter or optimizer.
    """
    try:
        state, progress = _read(folder)
        engine.load_state(state)
    except DAMAGE as error:
        raise DamagedFile(
            f"--resume_from_checkpoint {folder}: damaged or incomplete ({type(error).__name__}: {error});"
            " remove it, or name an earlier one"
        ) from None
    except UserError as error:
        raise UserError(f"--resume_from_checkpoint {folder}: {error}") from None
    return progress


def _read(folder):
    """(the engine's state, with its tensors on the CPU; progress)."""
    tensors, metadata = read_safetensors(folder / "state.safetensors")
    plain = json.loads((folder / "state.json").read_text())
    if metadata.get(STATE_HASH) not in (None, _fingerprint(plain)):
        raise ValueError("state.json is not what was written")
    progress = plain.pop("progress")
    numbers = [progress[name] for name in ("step", "batches", "effective_batch")]
    if not all(isinstance(number, (int, float)) and 0 <= number < math.inf for number in numbers):
        raise ValueError(f"state.json has {numbers} for steps, batches and images a step")
    return {**plain, **tensors}, progress


def _fingerprint(plain):
    """Hash of what state.json says, however it is laid out."""
    return xxhash.xxh3_64_hexdigest(json.dumps(plain, sort_keys=True).encode())


def read_config(output_dir: Path) -> dict:
    """The recipe in a run's config.json, {"flags", "data": {"images", "fingerprint"}}; empty if absent or damaged."""
    try:
        recipe = json.loads((output_dir / "config.json").read_text())
        data = {"images": int(recipe["data"]["images"]), "fingerprint": str(recipe["data"]["fingerprint"])}
        return {"flags": dict(recipe["flags"]), "data": data}
    except (OSError, ValueError, KeyError, TypeError):
        return {"flags": {}, "data": {}}
'''

# ======================================================================================== common/train/engine.py

MODULES['common/train/engine.py'] = r'''
"""One optimizer step, in one place: forward, loss, backward, all-reduce, overflow check, clipping, optimizer, EMA.

Within the passes nothing waits for the GPU; the CPU reads one small vector per step, which is also the log line.
"""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch

from common import errors
from common.fast.graphs import Graphed
from common.model import memory, noise
from common.model.adapters import EMA, FlatParameters, without_dropout
from common.model.device import Host, free_memory
from common.model.schedules import LossScale
from common.train.engine_state import check_state, first_not_finite, load_optimizer_state, optimizer_state
from common.train.pass_plan import BlockRecompute
from common.train.step_numbers import StepNumbers, StepResult


class PassOutOfMemory(Exception):
    """A pass needs more GPU memory than there is: on this process (`here`), or only on another one."""

    def __init__(self, here: bool) -> None:
        super().__init__("out of GPU memory in a pass")
        self.here = here


@dataclass(frozen=True)
class EngineSettings:
    """What may be set about a step."""

    max_grad_norm: float  # 0: no clipping
    min_snr_gamma: float | None = None  # None: plain MSE
    seed: int = 0  # of the LoRA dropout masks, together with the step, the pass within it and the process
    cuda_graph: bool = True  # replay passes instead of launching them, on a GPU


class Engine:
    """The UNet, its flat parameters and its optimizer.

    Args:
        text: maps a batch's fields to (prompt_embeds, pooled), see caching.CachedText.
        schedule: on the device.
        lr_factor: optimizer steps done -> factor of the peak learning rate, see schedules.lr_schedule.
        dropout_seed: int64 scalar on the device, from which fused layers derive their masks.
        ema: None where no average is kept.
        recompute: of the UNet; None where it recomputes nothing.
    """

    def __init__(
        self,
        *,
        unet: torch.nn.Module,
        text: Callable[[dict], tuple[torch.Tensor, torch.Tensor]],
        schedule: noise.NoiseSchedule,
        flat: FlatParameters,
        optimizer: torch.optim.Optimizer,
        lr_factor: Callable[[int], float],
        host: Host,
        dropout_seed: torch.Tensor,
        ema: EMA | None,
        recompute: BlockRecompute | None,
        settings: EngineSettings,
    ) -> None:
        self.unet = unet
        self.text = text
        self.schedule = schedule
        self.num_timesteps = len(schedule.alphas_cumprod)
        self.host = host
        self.settings = settings

        # What a step moves, and what moves it
        self.flat = flat
        self.ema = ema
        self.optimizer = optimizer
        self.peak_lrs = [group["lr"] for group in optimizer.param_groups]
        self.lr_factor = lr_factor
        self.loss_scale = LossScale(host.dtype, host.device)
        self.dropout_seed = dropout_seed
        self.recompute = recompute

        # What is launched once and replayed; what is done where memory is short
        graph = dict(device=host.device, enabled=settings.cuda_graph, say=host.say)
        self.run_pass = Graphed(lambda fields: self.forward_backward(fields), **graph)
        self.publish = Graphed(lambda _: flat.publish(), **graph, has_smaller=False)
        ways = {
            "as in training": self._summed_mse,
            "one image at a time": self._one_at_a_time,
            "no held-out loss": self._no_room,
        }
        self._validate = memory.StepDown("while validating", ways, host)

    def predict(self, fields: dict[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        """Run the UNet on a batch's fields -> (prediction, target), both [B, C, h, w]."""
        z = fields["mean"].float() + fields["std"].float() * fields["posterior_eps"]
        x_t, target = self.schedule.noise(z, fields["eps"], fields["t"])

        # A dropped caption is zeros, for SDXL base
        prompt_embeds, pooled = self.text(fields)
        keep = fields["keep_text"].to(prompt_embeds.dtype)
        prompt_embeds = prompt_embeds * keep[:, None, None]
        added = {"text_embeds": pooled * keep[:, None], "time_ids": fields["time_ids"].to(self.host.dtype)}
        x_t = x_t.to(self.host.dtype)
        return self.unet(x_t, fields["t"], prompt_embeds, added_cond_kwargs=added, return_dict=False)[0], target

    def losses(self, fields: dict[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        """(weighted loss of these examples, as optimised; their share of the step's numbers, a StepNumbers vector)."""
        mse = noise.mse_per_sample(*self.predict(fields))
        weighted = mse * fields["weight"]
        if self.settings.min_snr_gamma is not None:
            weighted = weighted * self.schedule.min_snr_weight(fields["t"], self.settings.min_snr_gamma)
        loss = weighted.sum()

        # What the log line shows
        mse = mse.detach()
        numbers = StepNumbers.pack(
            mse.device,
            loss=loss.detach(),
            mse=(mse * fields["weight"]).sum(),
            mse_by_quarter=noise.by_quarter(mse, fields["t"], self.num_timesteps),
            count_by_quarter=noise.by_quarter(torch.ones_like(mse), fields["t"], self.num_timesteps),
        )
        return loss, numbers

    def forward_backward(self, fields: dict[str, torch.Tensor]) -> torch.Tensor:
        """Add the gradients of these examples to the flat gradient -> StepNumbers vector on the device."""
        loss, numbers = self.losses(fields)
        (loss * self.loss_scale.value).backward()
        return numbers

    def step(
        self, number: int, batches: list, stop: bool = False, meanwhile: Callable[[], None] = lambda: None
    ) -> StepResult:
        """One attempt at an optimizer step on this process's share of an effective batch.

        Args:
            number: optimizer steps done after this one, from 1.
            batches: batching.Batch list; their weights, over all processes, sum to 1.
            stop: this process was asked to stop; every process hears of it with the statistics.
            meanwhile: called while the GPU works, before the CPU waits for it.
        Raises:
            PassOutOfMemory: a pass does not fit on some process; nothing has moved.
        """
        # The gradient of this process's share
        device = self.host.device
        total = self._passes(number, batches)
        here = total is None
        flags = StepNumbers.pack(device, stops=float(stop), out_of_memory=float(here))
        total = flags if here else total + flags
        meanwhile()

        # Every process takes part in the sums, whether its passes fitted or not: the others would wait for ever
        self.host.sum(self.flat.grad)
        self.host.sum(total)

        # Inf or NaN anywhere shows in the norm: it is the overflow check too
        norm = torch.linalg.vector_norm(self.flat.grad) / self.loss_scale.value
        total = total + StepNumbers.pack(device, grad_norm=norm, loss_scale=self.loss_scale.value)
        numbers = StepNumbers.unpack(total)  # the one wait of the step
        if numbers.out_of_memory:
            self.flat.grad.zero_()
            raise PassOutOfMemory(here)
        return self._finish(number, numbers)

    def _passes(self, number, batches):
        """StepNumbers vector of all batches, and their gradient in `flat`; None, and zeros, if one does not fit."""
        try:
            total = 0
            for index, batch in enumerate(batches):
                self._seed_dropout(number, index)
                total = total + self.run_pass(batch.tensors)
            return total
        except RuntimeError as error:
            if not errors.ran_out(error):
                raise

        # Outside of the block above the failed pass's tensors are free
        self.run_pass.clear()
        free_memory(self.host.device)
        self.flat.grad.zero_()
        return None

    def _seed_dropout(self, number, index):
        identity = self.settings.seed, "dropout", number, index, self.host.rank
        seed = noise.generator_for(*identity).initial_seed() >> 1
        torch.manual_seed(seed)  # for PEFT's own dropout
        self.dropout_seed.fill_(seed)

    def _finish(self, number, numbers):
        """Clip, update the parameters and the average -> StepResult; after an overflow only the loss scale moves."""
        applied = math.isfinite(numbers.grad_norm) and math.isfinite(numbers.loss)
        lr_factor = self.lr_factor(number - 1)
        if applied:
            self._clip(numbers)
            for group, peak in zip(self.optimizer.param_groups, self.peak_lrs):
                group["lr"] = peak * lr_factor
            self._update()
            if self.ema is not None:
                self.ema.update(number)

        # Ready for the next attempt
        self.loss_scale.update(overflow=not applied)
        self.flat.grad.zero_()
        return StepResult(
            loss=numbers.loss,
            mse=numbers.mse,
            mse_quarters=numbers.mse_quarters(),
            grad_norm=numbers.grad_norm,
            loss_scale=numbers.loss_scale,
            lr=self.peak_lrs[0] * lr_factor,
            stop=numbers.stops > 0,
            applied=applied,
        )

    def _clip(self, numbers):
        """Take the loss scale off the gradient, and what its norm has beyond the limit."""
        limit = self.settings.max_grad_norm
        clip = min(1.0, limit / (numbers.grad_norm + 1e-6)) if limit else 1.0
        self.flat.grad.mul_(clip / numbers.loss_scale)

    def _update(self):
        """Step the optimizer.

        Its first step makes its state: the graphs make room for it, as it could not be repeated half done.
        """
        if not self.optimizer.state:
            self.run_pass.clear()
        self.optimizer.step()
        self.publish({})

    # ---------------------------------------------------------------- held-out loss

    @torch.no_grad()
    def validate(self, make_batches: Callable[[int], Iterable], micro_batch: int) -> float | None:
        """Mean unweighted mse over the examples of `make_batches(micro_batch)`, on every process; without dropout.

        Where memory runs out, the graphs of the passes are dropped and the examples go through one at a time.
        Returns:
            the mean; None when some process had no room for a single example.
        """
        with without_dropout([self.unet, *self.text.encoders]):
            totals = self._validate(make_batches, micro_batch)
        total, examples = self.host.sum(totals).tolist()
        return total / examples if math.isfinite(examples) else None

    def _one_at_a_time(self, make_batches, micro_batch):
        self.run_pass.clear()
        return self._summed_mse(make_batches, 1)

    def _no_room(self, make_batches, micro_batch):
        return torch.full((2,), math.nan, device=self.host.device)

    def _summed_mse(self, make_batches, micro_batch):
        """[sum of mse, number of examples] of validation batches, on the device."""
        totals = torch.zeros(2, device=self.host.device)
        for batch in make_batches(micro_batch):
            fields = {name: tensor.to(self.host.device, non_blocking=True) for name, tensor in batch.tensors.items()}
            mse = noise.mse_per_sample(*self.predict(fields))
            totals += torch.stack([mse.sum(), torch.tensor(float(len(batch)), device=mse.device)])
        return totals

    # ---------------------------------------------------------------- state

    def optimizer_state_bytes(self) -> int:
        """What the optimizer will keep on the device: two moments, of 1 byte each with 8-bit state, else 4."""
        return 2 * len(self.flat) * (1 if "8bit" in type(self.optimizer).__name__ else 4)

    def state(self) -> dict[str, object]:
        """What training moves and what it belongs to: {name: tensor, not copied, or a value that JSON can hold}."""
        average = {} if self.ema is None else {"ema": self.ema.average}
        return {
            "layout": self.flat.layout,
            "optimizer_class": type(self.optimizer).__name__,
            "flat": self.flat.data,
            **average,
            **optimizer_state(self.optimizer, self.flat),
            "loss_scale": self.loss_scale.state(),
        }

    def load_state(self, state: dict[str, object]) -> None:
        """Go on from a `state`, whose tensors may lie on the CPU. What is refused leaves the engine as it was.

        Raises:
            UserError: the state of another adapter or optimizer.
            ValueError, KeyError, TypeError, AttributeError: not the whole state of an engine, or not finite.
        """
        check_state(state, self.state())
        self.flat.data.copy_(state["flat"])
        self.flat.publish()
        if self.ema is not None:
            self.ema.average.copy_(state["ema"])
        load_optimizer_state(self.optimizer, self.flat, state)
        self.loss_scale.load_state(state["loss_scale"])

    def not_finite(self) -> str | None:
        """The first tensor of the state that holds a NaN or an infinity, by its name; None where all is finite."""
        return first_not_finite(self.state())
'''

# ================================================================================== common/train/engine_state.py

MODULES['common/train/engine_state.py'] = r'''
"""The state of an engine, {name: tensor or plain value}: the optimizer's part of it, and what is refused as none."""

import math

import torch

from common.errors import UserError
from common.model.adapters import FlatParameters


def optimizer_state(optimizer: torch.optim.Optimizer, flat: FlatParameters) -> dict[str, object]:
    """{"optimizer.GROUP.KEY": tensor} of the flat groups, and "optimizer": {the same: number} of what is no tensor."""
    tensors, numbers = {}, {}
    for i, group in enumerate(flat.groups):
        for key, value in optimizer.state[group["params"][0]].items():
            kind = tensors if torch.is_tensor(value) else numbers
            kind[f"optimizer.{i}.{key}"] = value
    return {**tensors, "optimizer": numbers}


def load_optimizer_state(optimizer: torch.optim.Optimizer, flat: FlatParameters, state: dict[str, object]) -> None:
    """Put the optimizer where `optimizer_state` was taken; its tensors are copied to where the optimizer needs them."""
    tensors = {name: value for name, value in state.items() if name.startswith("optimizer.")}
    for name, value in {**tensors, **state["optimizer"]}.items():
        _, group, key = name.split(".", 2)
        parameter = flat.groups[int(group)]["params"][0]
        # torch keeps AdamW's step count on the CPU unless the optimizer is fused
        on_cpu = key == "step" and not optimizer.defaults.get("fused")
        device = torch.device("cpu") if on_cpu else flat.data.device
        optimizer.state[parameter][key] = value.to(device, copy=True) if torch.is_tensor(value) else value


def first_not_finite(state: dict[str, object]) -> str | None:
    """Name of the first tensor that holds a NaN or an infinity; None where all is finite."""
    tensors = {name: value for name, value in state.items() if torch.is_tensor(value)}
    floats = {name: tensor for name, tensor in tensors.items() if tensor.is_floating_point()}
    # Both show in the extremes, which take one pass and no memory
    return next((name for name, tensor in floats.items() if not torch.stack(tensor.aminmax()).isfinite().all()), None)


def check_state(state: dict[str, object], own: dict[str, object]) -> None:
    """Refuse what an engine whose state is `own` cannot go on from.

    Raises:
        UserError: the state of another adapter or optimizer.
        ValueError, KeyError, TypeError, AttributeError: not the whole state of an engine, or not finite.
    """
    numbers = [state["loss_scale"]["value"], state["loss_scale"]["good_steps"]]
    if not all(isinstance(number, (int, float)) and 0 <= number < math.inf for number in numbers):
        raise ValueError(f"{numbers} for loss scale and good steps")
    if what := first_not_finite(state):
        raise ValueError(f"{what} holds NaN or infinity")
    if absent := {"optimizer_class", "optimizer", "flat"} - state.keys():
        raise ValueError(f"no {min(absent)} in it")

    # Whole, but of another run
    layout = [(name, tuple(shape)) for name, shape in state["layout"]]  # JSON has lists
    if layout != own["layout"]:
        raise UserError(
            f"its adapter has {_size(layout)}, this one {_size(own['layout'])}; resume with the same script, base"
            " model, --lora_rank, --lora_target_modules, --strategy and --train_text_encoder"
        )
    if state["optimizer_class"] != own["optimizer_class"]:
        raise UserError(f"made with {state['optimizer_class']}; resume with the same --use_8bit_adam")
    if ("ema" in state) != ("ema" in own):
        raise UserError(f"made {'with' if 'ema' in state else 'without'} --use_ema; resume the same way")


def _size(layout):
    return f"{sum(math.prod(shape) for _, shape in layout):,} numbers in {len(layout)} weights"
'''

# ========================================================================================= common/train/loops.py

MODULES['common/train/loops.py'] = r'''
"""Steps, from the first or from a checkpoint, to the last: validation, checkpoints, early stop, time limit, signals."""

import contextlib
import math
import time
from collections.abc import Callable
from dataclasses import dataclass

from common.data.batching import Batch, Examples
from common.errors import UserError
from common.model import device
from common.system.stopping import StopRequest
from common.train.engine import Engine, PassOutOfMemory
from common.train.pass_plan import PassPlan, smallest_pass_too_large
from common.train.report import Report
from common.train.results import Results
from common.train.run_length import RunLength
from common.train.step_numbers import StepResult

NON_FINITE_LIMIT = 3  # batches in a row without a finite loss, before the run gives up
SMALLEST_SCALE = 2.0**-10


@dataclass
class Progress:
    """Where a run stands; saved with every checkpoint."""

    step: int = 0  # optimizer steps done
    batches: int = 0  # effective batches used: the steps, and those skipped for a loss that was not finite
    effective_batch: int = 0  # images of a step; another number would read the data from another place
    best_val_loss: float = math.inf
    validations_without_gain: int = 0


@dataclass(frozen=True)
class Run:
    """What the loop works on."""

    engine: Engine
    examples: Examples
    held_out: Examples | None
    length: RunLength
    plan: PassPlan  # stepped down when a pass does not fit the memory
    progress: Progress  # moves with every step
    results: Results
    report: Report  # closed at the end
    stopping: StopRequest  # listening


def train(run: Run) -> str:
    """Run to the last step, or until a signal, the time limit or early stopping ends it; returns why it ended.

    Raises:
        UserError: the run has diverged, the loss is not finite NON_FINITE_LIMIT times in a row, or no plan fits the
            memory (the latter two after a checkpoint).
    """
    length, progress, stopping = run.length, run.progress, run.stopping
    attempts = _Attempts(run)
    ended = "early stopping" if _is_out_of_patience(run) else None  # a run that had stopped early stays so
    with contextlib.closing(run.report):
        while progress.step < length.total_steps and not ended:
            # One optimizer step
            started_s = time.monotonic()
            result = attempts.step()
            if result is None:
                continue

            # What it measured
            row = _row(run, result, time.monotonic() - started_s)
            validates = progress.step % length.validation_steps == 0 or progress.step == length.total_steps
            if validates and run.held_out is not None:
                row |= _validate(run)
            run.report.log(row)

            # Saved first, then rendered: pictures need memory that training does not
            if validates and run.results.has_pictures:
                _save(run)
                run.results.render(progress.step)
            stopping.step_took(time.monotonic() - started_s)

            # Whether to go on
            ended = _reason_to_end(run, result)
            if not ended and length.checkpointing_steps and progress.step % length.checkpointing_steps == 0:
                stopping.save_took(_save(run))
        _save(run)
    return ended or "finished"


# ---------------------------------------------------------------- one step


class _Attempts:
    """Attempts at the next step of a run, until one is applied."""

    def __init__(self, run: Run) -> None:
        self.run = run
        self._batches = _Prefetch(self._make_batches)
        self._non_finite = 0  # batches skipped in a row

    def step(self) -> StepResult | None:
        """One attempt; None where nothing was applied, and the next attempt is smaller, or goes to the next batch.

        Raises:
            UserError: see `train`.
        """
        progress, host, stopping = self.run.progress, self.run.engine.host, self.run.stopping
        # The flag of a process travels with its next step, so that all of them stop after the same one
        or_next = " or the next" if host.world > 1 else ""
        stopping.doing = f"finishing step {progress.step + 1}{or_next}, then saving"

        # Forward, backward, update; meanwhile the next batches
        batches = self._batches(progress.batches)
        make_next = lambda: self._batches.prepare(progress.batches + 1)  # noqa: E731
        try:
            result = self.run.engine.step(progress.step + 1, batches, stopping.reason is not None, make_next)
        except PassOutOfMemory as error:
            self._batches.forget()
            self._step_down(error.here)
            return None

        # Whether it counts
        if not result.applied:
            self._after_not_finite(result)
            return None
        self._non_finite = 0
        progress.step += 1
        progress.batches += 1
        return result

    def _make_batches(self, number) -> list[Batch]:
        run, host = self.run, self.run.engine.host
        size = run.length.effective_batch
        return run.examples.effective_batch(number, size, run.plan.micro_batch, host.rank, host.world)

    def _step_down(self, here):
        """After a pass that did not fit on some process: the next smaller plan where it did not."""
        plan, host = self.run.plan, self.run.engine.host
        has_smaller = plan.step_down() if here else True
        if not all(host.gather([has_smaller])):
            _save(self.run)
            raise smallest_pass_too_large(plan.recompute) from None
        if here:
            all_recomputed = plan.recompute and not plan.recompute.kept
            recomputed = "every block recomputed" if all_recomputed else "as before otherwise"
            self.run.report.say(
                f"out of GPU memory: the step is repeated with {plan.micro_batch} images a pass, {recomputed}"
            )

    def _after_not_finite(self, result):
        """Skip the batch; a mere overflow of gradients is tried again at half the scale."""
        scale, report = self.run.engine.loss_scale, self.run.report
        if math.isfinite(result.loss) and scale.enabled and result.loss_scale > SMALLEST_SCALE:
            report.say(
                f"gradients overflowed in fp16 at loss scale {result.loss_scale:g}: the step is repeated at half of it"
            )
            self._non_finite = 0
            return
        report.say(f"loss {result.loss}, gradient norm {result.grad_norm}: the batch is skipped")
        self.run.progress.batches += 1
        self._non_finite += 1
        if self._non_finite == NON_FINITE_LIMIT:
            _save(self.run)
            raise UserError(_non_finite_message(self.run))


class _Prefetch:
    """The result of `make(number)`, made ahead of time when `prepare` is given a chance."""

    def __init__(self, make: Callable[[int], list]) -> None:
        self._make = make
        self._number = None
        self._made = None

    def prepare(self, number: int) -> None:
        if number != self._number:
            self._number = number
            self._made = self._make(number)

    def forget(self) -> None:
        self._number = None

    def __call__(self, number: int) -> list:
        self.prepare(number)
        return self._made


def _non_finite_message(run):
    size, last = run.length.effective_batch, run.progress.batches
    positions = range((last - NON_FINITE_LIMIT) * size, last * size)
    names = dict.fromkeys(run.examples.name_at(position) for position in positions)
    saved = "; a checkpoint was saved" if run.progress.step else ""
    return (
        f"the loss was not finite in {NON_FINITE_LIMIT} batches in a row, made of {', '.join(names)}; look at these"
        f" images, lower --learning_rate, or use --mixed_precision no{saved}"
    )


# ---------------------------------------------------------------- after it


def _row(run, result, seconds):
    """One line of metrics.jsonl."""
    progress, size = run.progress, run.length.effective_batch
    return dict(
        step=progress.step,
        epoch=round(progress.batches * size / len(run.examples), 4),
        loss=result.loss,
        mse=result.mse,
        **{f"mse_t{i}": value for i, value in enumerate(result.mse_quarters)},
        lr=result.lr,
        grad_norm=result.grad_norm,
        loss_scale=result.loss_scale,
        s_per_img=seconds / size,
        peak_gib=run.engine.host.peak_gib(),
        seconds=round(device.seconds_since_start(), 2),
    )


def _validate(run):
    """What a validation adds to the row of metrics; the progress counts how long there was no gain."""
    progress, host = run.progress, run.engine.host
    make_batches = lambda size: run.held_out.validation_batches(size, host.rank, host.world)  # noqa: E731
    loss = run.engine.validate(make_batches, run.plan.micro_batch)
    if loss is None:  # there was no memory for it, which has been said
        return {}
    gained = loss < progress.best_val_loss
    progress.best_val_loss = min(loss, progress.best_val_loss)
    progress.validations_without_gain = 0 if gained else progress.validations_without_gain + 1
    return {"val_loss": loss}


def _save(run):
    """Save the step, unless it is saved already, and plot what led to it; returns the seconds it took."""
    started_s = time.monotonic()
    run.results.save_step(run.progress)
    run.report.plot()
    return time.monotonic() - started_s


def _reason_to_end(run, result):
    """Why no further step is taken; None where the run goes on, or is at its last step."""
    asked = result.stop or (run.engine.host.world == 1 and run.stopping.reason is not None)
    if asked and run.progress.step < run.length.total_steps:
        return run.stopping.reason or "stopped by another process"
    return "early stopping" if _is_out_of_patience(run) else None


def _is_out_of_patience(run):
    patience = run.length.early_stopping_patience
    return patience is not None and run.progress.validations_without_gain >= patience
'''

# ===================================================================================== common/train/pass_plan.py

MODULES['common/train/pass_plan.py'] = r'''
"""How much goes through a pass: measured on this card, with these images, instead of guessed; and remembered.

Recomputing activations in the backward pass (arXiv 1604.06174) trades up to a third more work for most of the memory,
block by block; a larger pass uses the GPU better. `choose` times what fits and takes the fastest.
"""

import contextlib
import json
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import NamedTuple

import torch
from torch.utils.checkpoint import checkpoint as recomputed

from common import errors
from common.cli.flag_facts import names_where
from common.data import caching
from common.fast import kernel_check
from common.files import write_json
from common.model import device
from common.model.device import GIB

VERSION = 3  # raise it when a pass takes other time or memory than before: remembered plans are then measured again
SPARE_GIB = 0.75  # workspaces of cuBLAS and cuDNN, and the allocator's fragments
LARGEST_PASS = 8
TIMED_CANDIDATES = 3
NOT_A_PLAN = (OSError, ValueError, KeyError, TypeError, AttributeError)  # absent, damaged, or of another UNet


class BlockRecompute:
    """What diffusers calls with every block of a UNet: recomputes it in the backward pass, unless it is in `kept`.

    Args:
        preserve_rng_state: needed by layers whose dropout draws from the device's generator.
    """

    def __init__(self, preserve_rng_state: bool = False) -> None:
        self.preserve_rng_state = preserve_rng_state
        self.kept = set()
        self.sizes = None  # a dict while blocks are measured: block -> bytes that it would keep

    def __call__(self, block: torch.nn.Module, *args):
        if self.sizes is not None:
            before = torch.cuda.memory_allocated()
            output = block(*args)
            self.sizes[block] = torch.cuda.memory_allocated() - before
            del output
        if block in self.kept:
            return block(*args)
        return recomputed(block, *args, use_reentrant=False, preserve_rng_state=self.preserve_rng_state)


@dataclass
class PassPlan:
    """How a step is cut into passes: `micro_batch` images each, and what is recomputed (None: nothing)."""

    micro_batch: int
    recompute: BlockRecompute | None = None
    remembered: Path | None = None  # the file that holds it for later runs

    def step_down(self) -> bool:
        """Take the next smaller plan, and let no later run start with this one; False when there is none."""
        if self.remembered:
            self.remembered.unlink(missing_ok=True)
        if self.recompute and self.recompute.kept:
            self.recompute.kept = set()
        elif self.micro_batch > 1:
            self.micro_batch = -(-self.micro_batch // 2)
        else:
            return False
        return True


def smallest_pass_too_large(recompute: BlockRecompute | None) -> errors.OutOfMemory:
    """The one line for a card that has no room for one image a pass."""
    if recompute is None:
        return errors.OutOfMemory(
            "with one image a pass", f"add --gradient_checkpointing, or {errors.OUT_OF_MEMORY_ADVICE}"
        )
    return errors.OutOfMemory("with one image a pass and every block recomputed")


# ---------------------------------------------------------------- chosen for a run


def choose(flags, engine, data) -> PassPlan:
    """On a GPU the plan that is fastest by measurement, unless --no_auto_fit; else --train_batch_size images a pass.

    Args:
        engine: ready to train; gradients are zero again afterwards.
        data: assembly.Data.
    """
    host = engine.host
    if host.device.type != "cuda" or not flags.auto_fit:
        return PassPlan(flags.train_batch_size, engine.recompute)

    # Anew, as encoding may have left less; in eighths, as what is free differs by some MiB from run to run
    budget_gib = int(8 * device.limit_memory(host.device, flags.max_vram_gb)) / 8
    effective_batch = data.length.effective_batch
    share = len(range(host.rank, effective_batch, host.world))  # if uneven, the first processes have one more

    def make_batches(micro_batch):
        return data.examples.effective_batch(0, effective_batch, micro_batch, host.rank, host.world)

    # Measured, or read from where a run like this one has left it
    shape = make_batches(1)[0].tensors["mean"].shape
    gpu = torch.cuda.get_device_name(), torch.backends.cuda.flash_sdp_enabled(), budget_gib, host.rank
    remembered = Path(flags.cache_dir) / "plans" / f"{plan_key(flags, gpu, share, shape, len(engine.flat))}.json"
    plan, line = recall_or_measure(engine, make_batches, share=share, budget_gib=budget_gib, remembered=remembered)
    host.say(line)
    return plan


def plan_key(flags, *measured_with) -> str:
    """What a remembered plan belongs to: the flags and versions that change a pass, and what it was measured with."""
    versions = VERSION, version("torch"), version("diffusers"), kernel_check.refused()
    values = [getattr(flags, name) for name in names_where(flags, changes_a_pass=True)]
    return caching.content_key("plan", *versions, *measured_with, values)


def recall_or_measure(
    engine, make_batches: Callable[[int], list], *, share: int, budget_gib: float, remembered: Path
) -> tuple[PassPlan, str]:
    """The fastest plan within `budget_gib` of GPU memory for `share` images a step on this process.

    Args:
        make_batches: micro_batch -> the batches of one step.
        remembered: the file that keeps the result for runs like this one; what it holds is not measured again.
    Returns:
        (PassPlan, the line that says what was chosen).
    """
    with contextlib.suppress(*NOT_A_PLAN):
        micro_batch, kept, line = _read_plan(remembered, engine.unet)
        if engine.recompute:
            engine.recompute.kept = kept
        plan = PassPlan(micro_batch, engine.recompute, remembered)
        return plan, f"{line} (as an earlier run measured, {remembered})"

    plan, line, seconds = _measure(engine, make_batches, share, budget_gib)
    if math.isfinite(seconds):
        _write_plan(remembered, plan, line, engine.unet)
    return replace(plan, remembered=remembered), line


def _read_plan(remembered, unet):
    """(images a pass, blocks that are not recomputed, the line that says it); raises one of NOT_A_PLAN."""
    plan = json.loads(remembered.read_text())
    micro_batch, line = plan["micro_batch"], plan["line"]
    if not (isinstance(micro_batch, int) and 1 <= micro_batch <= LARGEST_PASS and isinstance(line, str)):
        raise ValueError(f"{remembered}: {micro_batch} images a pass")
    return micro_batch, {unet.get_submodule(name) for name in plan["kept"] if name}, line


def _write_plan(remembered, plan, line, unet):
    kept = plan.recompute.kept if plan.recompute else ()
    names = [name for name, module in unet.named_modules() if module in kept]
    remembered.parent.mkdir(parents=True, exist_ok=True)
    write_json(remembered, {"micro_batch": plan.micro_batch, "kept": names, "line": line})


# ---------------------------------------------------------------- measured


class Trial(NamedTuple):
    """A plan that was timed."""

    seconds: float  # per image; infinite when it does not fit
    micro_batch: int
    kept: set  # blocks that are not recomputed


def _measure(engine, make_batches, share, budget_gib):
    """(PassPlan, the line that says it, seconds per image: infinite when nothing that was tried fits)."""
    engine.host.say(
        "measuring how many images fit a pass: about 10 s on a fast card, up to a minute on a T4; remembered afterwards"
    )
    base, lowest, sizes = _probe(engine, make_batches(1)[0])
    room = (budget_gib - SPARE_GIB) * GIB - base

    # Time the largest passes that may fit, and take the fastest
    divisors = [n for n in range(1, min(share, LARGEST_PASS) + 1) if share % n == 0]
    candidates = [n for n in divisors if n * lowest <= room or n == 1]
    trials = []
    for micro_batch in candidates[-TIMED_CANDIDATES:]:
        spare = (room - micro_batch * lowest) / micro_batch
        trials.append(_try(engine, make_batches, micro_batch=micro_batch, sizes=sizes, room=spare))
    best = min(trials, key=lambda trial: trial.seconds)
    if engine.recompute:
        engine.recompute.kept = best.kept

    # What to say of it
    used_gib = (base + best.micro_batch * (lowest + sum(sizes[block] for block in best.kept))) / GIB
    passes = share // best.micro_batch
    cut = f"{best.micro_batch} image{'s'[: best.micro_batch > 1]} in {passes} pass{'es' if passes > 1 else ''}"
    blocks = f"{len(sizes) - len(best.kept)} of {len(sizes)} blocks recomputed"
    speed = f"{best.seconds:.3f} s/img" if math.isfinite(best.seconds) else "the least there is"
    line = f"plan: {cut}, {blocks}, {speed}, about {used_gib:.1f} of {budget_gib:.1f} GiB"
    return PassPlan(best.micro_batch, engine.recompute), line, best.seconds


def _try(engine, make_batches, *, micro_batch, sizes, room) -> Trial:
    """Time passes of one size. The room in bytes an image is an estimate: if too much, half of it, then none."""
    for part in (1.0, 0.5, 0.0):
        kept = _blocks_to_keep(sizes, part * room)
        seconds = _seconds_per_image(engine, make_batches, micro_batch, kept)
        if math.isfinite(seconds) or not kept:
            break
    return Trial(seconds, micro_batch, kept)


def _probe(engine, batch):
    """One pass of one image, every block recomputed.

    Returns:
        (bytes before it, optimizer state included; peak bytes above those; {block: bytes it would keep}).
    """
    before = torch.cuda.memory_allocated()
    base = before + engine.optimizer_state_bytes()
    if engine.recompute:
        engine.recompute.sizes = {}

    # The pass, with its peak
    engine.host.start_new_peak()
    try:
        engine.forward_backward({name: tensor.to(engine.host.device) for name, tensor in batch.tensors.items()})
    except RuntimeError as error:
        if errors.ran_out(error):
            raise smallest_pass_too_large(engine.recompute) from None
        raise
    lowest = torch.cuda.max_memory_allocated() - before
    engine.flat.grad.zero_()

    # The sizes of the blocks, where some can be recomputed
    sizes = {}
    if engine.recompute:
        sizes = engine.recompute.sizes
        engine.recompute.sizes = None
    return base, lowest, sizes


def _blocks_to_keep(sizes, room):
    """As many blocks as keep their activations in `room` bytes; the last first: their activations live shortest."""
    kept = set()
    for block, size in reversed(sizes.items()):
        if size <= room:
            kept.add(block)
            room -= size
    return kept


def _seconds_per_image(engine, make_batches, micro_batch, kept):
    """Time one pass as it will be run; infinite when it does not fit after all."""
    if engine.recompute:
        engine.recompute.kept = kept
    tensors = make_batches(micro_batch)[0].tensors
    seconds = math.inf

    # Launched as it is, captured, replayed twice: the last one counts
    try:
        for _ in range(4):
            started_s = time.perf_counter()
            engine.run_pass(tensors)
            torch.cuda.synchronize()
            seconds = (time.perf_counter() - started_s) / micro_batch
    except RuntimeError as error:
        if not errors.ran_out(error):
            raise
        seconds = math.inf

    # As if nothing had been run
    engine.run_pass.clear()
    engine.flat.grad.zero_()
    return seconds
'''

# ==================================================================================== common/train/prediction.py

MODULES['common/train/prediction.py'] = r'''
"""What the frozen UNet predicts, measured before it is trained: epsilon or v, by its error on a few cached samples.

The two targets, eps and v = sqrt(a) eps - sqrt(1 - a) z, differ most where noise is strong (a small). There v is nearly
-z, of which a UNet for epsilon knows nothing; a UNet for v, in turn, has little of eps in its output. Four forward
passes of one image decide.
"""

from dataclasses import replace

import torch

from common.data.batching import Examples
from common.errors import UserError
from common.model import noise
from common.model.adapters import without_dropout
from common.model.model_kind import EPSILON, V_PREDICTION
from common.train.engine import Engine

LEVELS = (0.1, 0.06, 0.03, 0.015)  # alphas_cumprod of the passes: timesteps 680 to 890 of SDXL's 1000
# A target is predicted when its error, as a share of its own mean square, is below PREDICTED, and below CLEARLY times
# that of the other target. An untrained UNet has 1 and more for both.
PREDICTED = 0.85
CLEARLY = 0.7


@torch.no_grad()
def relative_errors(engine: Engine, examples: Examples) -> dict[str, float]:
    """{prediction type: squared error of the UNet against that target, as a share of the target's own mean square}."""
    schedules = {kind: replace(engine.schedule, prediction_type=kind) for kind in (EPSILON, V_PREDICTION)}
    timesteps = [int((engine.schedule.alphas_cumprod - level).abs().argmin()) for level in LEVELS]
    errors = dict.fromkeys(schedules, 0.0)
    squares = dict.fromkeys(schedules, 0.0)
    with without_dropout([engine.unet, *engine.text.encoders]):
        for batch in examples.probes(timesteps):
            fields = {name: tensor.to(engine.host.device) for name, tensor in batch.tensors.items()}
            predicted, _ = engine.predict(fields)
            z = fields["mean"].float() + fields["std"].float() * fields["posterior_eps"]
            for kind, schedule in schedules.items():
                target = schedule.noise(z, fields["eps"], fields["t"])[1]
                errors[kind] += noise.mse_per_sample(predicted, target).item()
                squares[kind] += target.square().mean().item()
    return {kind: errors[kind] / squares[kind] for kind in schedules}


def check(engine: Engine, data) -> None:
    """Compare what the model's files or the flags say with what its UNet does, before the first step.

    A UNet that was not trained yet, or one in between, passes. A mark of v-prediction in the model's own files is
    nobody's default: there a disagreement is said, and training goes on.

    Args:
        data: assembly.Data.
    Raises:
        UserError: the UNet clearly predicts the other target.
    """
    kind = data.model.kind
    other = V_PREDICTION if kind.prediction_type == EPSILON else EPSILON
    errors = relative_errors(engine, data.examples)
    if not (errors[other] < PREDICTED and errors[other] < CLEARLY * errors[kind.prediction_type]):
        return

    # What was said against what was measured
    said = kind.prediction_type
    measured = (
        f"--pretrained_model_name_or_path {data.model.name}: is said to predict {said} (by {kind.said_by}), but its"
        f" error is {errors[other]:.2f} for {other} and {errors[said]:.2f} for {said} (untrained: 1)"
    )
    if kind.prediction_type == V_PREDICTION and not kind.said_by.startswith("--prediction_type"):
        engine.host.say(f"warning: {measured}; if that mark is wrong, correct it: what is trained would be of no use")
        return
    raise UserError(f"{measured}; use --prediction_type {other}")
'''

# ======================================================================================== common/train/report.py

MODULES['common/train/report.py'] = r'''
"""What a run shows: one progress bar, metrics.jsonl, a tracker, training.png, and grids of labelled images."""

import importlib
import json
from pathlib import Path

from tqdm import tqdm

from common.files import replacing

# Notebooks cut the bar at 80 columns; the numbers come first and what is left belongs to the bar itself.
BAR_FORMAT = "{n_fmt}/{total_fmt} |{bar}| {elapsed}<{remaining}{postfix}"
REQUIRED = ("step", "loss", "mse", "lr")  # what makes a line of metrics.jsonl a row
TRACKERS = {"tensorboard": "TensorBoardTracker", "wandb": "WandBTracker"}


class Report:
    """Numbers of a run, written by the main process only.

    Args:
        resumed_step: rows after it, from a run that was killed, are dropped from metrics.jsonl.
        report_to: "none", "tensorboard" or "wandb"; accelerate's trackers do the rest.
        config: the flags, for the tracker.
    """

    def __init__(self, output_dir, total_steps, resumed_step, report_to, config, is_main):
        self.is_main = is_main
        self.bar = tqdm(total=total_steps, initial=resumed_step, bar_format=BAR_FORMAT, disable=not is_main)
        if not is_main:
            return

        # Rows up to the step that is resumed are kept; metrics.jsonl grows from there.
        self.path = Path(output_dir) / "metrics.jsonl"
        kept = [row for row in read_metrics(self.path) if row["step"] <= resumed_step] if resumed_step else []
        with replacing(self.path) as partial:
            partial.write_text("".join(json.dumps(row) + "\n" for row in kept))
        self.file = self.path.open("a")
        self.plotted_rows = 0
        self.rows = len(kept)

        # A tracker takes scalars only as its configuration.
        self.tracker = None
        if report_to != "none":
            tracker_class = getattr(importlib.import_module("accelerate.tracking"), TRACKERS[report_to])
            where = {"logging_dir": str(output_dir)} if report_to == "tensorboard" else {}
            self.tracker = tracker_class(Path(output_dir).name, **where)
            self.tracker.start()
            scalars = {
                key: value if isinstance(value, (bool, int, float, str)) else str(value)
                for key, value in config.items()
            }
            self.tracker.store_init_configuration(scalars)

    def log(self, row):
        """One optimizer step: to the bar, the file and the tracker."""
        if not self.is_main:
            return
        self.bar.set_postfix_str(shown_numbers(row), refresh=False)
        self.bar.update()
        self.file.write(json.dumps(row) + "\n")
        self.file.flush()
        self.rows += 1
        if self.tracker:
            self.tracker.log(
                {key: value for key, value in row.items() if isinstance(value, (int, float))}, step=row["step"]
            )
        if "val_loss" in row:
            self.plot()

    def plot(self):
        """Plot training.png anew, unless it shows all there is already.

        A picture is not worth a run: what goes wrong is said.
        """
        if not self.is_main or self.rows == self.plotted_rows:
            return
        self.plotted_rows = self.rows
        try:
            plot_training(self.path.parent)
        except Exception as error:
            self.say(f"training.png could not be drawn ({type(error).__name__}: {error})")

    def say(self, line):
        """Print a line without breaking the bar."""
        if self.is_main:
            self.bar.write(line)

    def close(self):
        self.bar.close()
        if self.is_main:
            self.file.close()
            self.plot()
            if self.tracker:
                self.tracker.finish()


def shown_numbers(row):
    """What the bar says of a step: "loss 0.1234 lr 1.0e-04 2.345 s/img 13.05 GiB"."""
    return f"loss {row['loss']:.4f} lr {row['lr']:.1e} {row['s_per_img']:.3f} s/img {row['peak_gib']:.2f} GiB"


def read_metrics(path):
    """Rows of a metrics.jsonl; a line that is damaged, or cut short by a kill, is left out."""
    rows = []
    for line in path.read_text(errors="replace").splitlines() if path.exists() else ():
        try:
            row = json.loads(line)
            if all(isinstance(row[name], (int, float)) for name in REQUIRED):
                rows.append(row)
        except (ValueError, KeyError, TypeError):  # no JSON, or not a row of ours
            continue
    return rows


def plot_training(output_dir):
    """training.png from metrics.jsonl.

    A panel each shows the loss that is minimised, the mse beside the held-out mse, and the learning rate.
    """
    from matplotlib.figure import Figure

    rows = read_metrics(Path(output_dir) / "metrics.jsonl")
    if not rows:
        return
    panels = [name for name in ("loss", "mse") if name == "mse" or any(row["loss"] != row["mse"] for row in rows)]
    figure = Figure(figsize=(9, 2.6 * len(panels) + 1.6), layout="constrained")
    *above, bottom = figure.subplots(len(panels) + 1, 1, sharex=True, height_ratios=[*[2] * len(panels), 1])
    for axis, name in zip(above, panels):
        _draw_loss(axis, rows, name)
    bottom.plot([row["step"] for row in rows], [row["lr"] for row in rows], color="tab:green")
    bottom.set_ylabel("learning rate")
    bottom.set_xlabel("optimizer step")
    for axis in (*above, bottom):
        axis.spines[["top", "right"]].set_visible(False)
    with replacing(Path(output_dir) / "training.png") as partial:
        figure.savefig(partial, format="png", dpi=120)


def _draw_loss(axis, rows, name):
    """One panel: `name` of each step, its running mean, and beside the mse that of the held-out images."""
    steps = [row["step"] for row in rows]
    values = [row[name] for row in rows]
    axis.plot(steps, values, color="0.75", linewidth=0.8, label="each step")
    axis.plot(steps, _running_mean(values, max(5, len(values) // 20)), color="tab:blue", label="running mean")
    held_out = [(row["step"], row["val_loss"]) for row in rows if "val_loss" in row]
    if held_out and name == "mse":
        axis.plot(*zip(*held_out), color="tab:red", marker="o", markersize=3, label="held out")
    axis.set_ylabel({"loss": "loss, as weighted", "mse": "mse"}[name])
    axis.legend(frameon=False)


def _running_mean(values, window):
    sums = [0.0]
    for value in values:
        sums.append(sums[-1] + value)
    return [(sums[i + 1] - sums[max(0, i + 1 - window)]) / min(i + 1, window) for i in range(len(values))]
'''

# ======================================================================================= common/train/results.py

MODULES['common/train/results.py'] = r'''
"""What a run writes beside its log: adapter files, checkpoints, validation pictures; elsewhere if the folder fails."""

import contextlib
import tempfile
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path

from common import errors, run_folder
from common.adapter_files import diffusers_format, dora, kohya, peft_format
from common.data import caching
from common.errors import UserError
from common.model import device, weights
from common.render import validation_images
from common.train import checkpoint, report

PACKAGES = ("torch", "diffusers", "transformers", "peft", "accelerate")
LICENSE_NOTE = (
    "a derivative of base_model, under its licence (SDXL base 1.0: CreativeML Open RAIL++-M); the images have theirs"
)


def recipe_of(flags, data) -> dict:
    """What config.json and every adapter file say about how they were made."""
    latents = data.examples.latents
    examples = [(sample.key, sample.caption) for sample in latents.samples for _ in range(sample.repeats)]
    return {
        "flags": asdict(flags),
        "base_model": data.model.name,
        "revision": flags.revision,
        "license_note": LICENSE_NOTE,
        "vae": str(data.model.vae),
        "prediction_type": data.model.kind.prediction_type,
        "zero_terminal_snr": data.model.kind.zero_terminal_snr,
        "data": {"images": len(latents), "fingerprint": caching.content_key(examples)},
        "versions": {package: version(package) for package in PACKAGES},
    }


class Results:
    """The files of one run in its output folder, written by the main process.

    Args:
        recipe: see `recipe_of`.
        saved_step: the step whose files are there already: that of the checkpoint that the run goes on from.
    """

    def __init__(self, flags, engine, data, recipe: dict, saved_step: int = 0) -> None:
        self.flags = flags
        self.engine = engine
        self.host = engine.host
        self.data = data
        self.recipe = recipe
        self.output_dir = Path(flags.output_dir)
        self._saved_step = saved_step

    @property
    def name(self) -> str:
        return self.output_dir.resolve().name

    @property
    def has_pictures(self) -> bool:
        """Whether `render` has a prompt to render."""
        return bool(self.flags.validation_prompt)

    # ---------------------------------------------------------------- on the way

    def save_step(self, progress) -> None:
        """Write the adapter file and a checkpoint of a step, unless they are there already.

        Raises:
            UserError: the run has diverged; what is not finite is not saved, so the newest checkpoint is one to go on
                from.
        """
        if what := self.engine.not_finite():
            raise UserError(self._diverged(what, progress.step))
        step = progress.step
        if self.host.is_main and step != self._saved_step:
            # The adapter file first: from the checkpoint on, a killed run would not come back to write it
            self._save_adapter(self.output_dir / f"pytorch_lora_weights_{step:06d}.safetensors")
            limit = self.flags.checkpoints_total_limit
            checkpoint.save_checkpoint(self.output_dir, step, self.engine, asdict(progress), limit)
        self._saved_step = step
        self.host.barrier()

    def _diverged(self, what, step):
        """The weights themselves are at fault, whatever images the last batches held."""
        saved = run_folder.find_checkpoints(self.output_dir)
        cure = "start again"
        if saved:
            cure = f"--resume_from_checkpoint latest goes on from step {run_folder.step_of(saved[-1])}"
        return (
            f"the training has diverged: after step {step} its own numbers ({what}) hold NaN or infinity;"
            f" nothing was saved of them. Lower --learning_rate, or use --mixed_precision no; {cure}"
        )

    def render(self, step: int) -> None:
        """samples/STEP_I.png for every --validation_prompt, with the average if there is one.

        Where memory runs out there are none, which is said.
        """
        if not self.host.is_main:
            return
        self.engine.run_pass.clear()  # its memory is needed for the pictures; the next steps capture it again
        try:
            images = self._pictures()
        except (RuntimeError, errors.OutOfMemory) as error:
            if not errors.ran_out(error):
                raise
            self.host.say(f"no validation images of step {step}: out of GPU memory; everything trained so far is saved")
            images = []

        # Outside of the block above what did not fit is free
        device.free_memory(self.host.device)
        folder = self.output_dir / "samples"
        folder.mkdir(exist_ok=True)
        for i, image in enumerate(images):
            image.save(folder / f"{step:06d}_{i}.png")

    def _pictures(self):
        average = self.engine.ema
        with average.applied() if average else contextlib.nullcontext():
            return validation_images.render_while_training(
                unet=self.engine.unet,
                text=self.data.text,
                model=self.data.model,
                host=self.host,
                prompts=self.flags.validation_prompt,
                resolution=self.flags.resolution,
                seed=self.flags.seed,
            )

    # ---------------------------------------------------------------- at the end

    def write(self) -> None:
        """The adapter in every format asked for, and its average."""
        if self.host.is_main:
            self._write_adapter(self.output_dir)
            if self.engine.ema is not None:
                with self.engine.ema.applied():
                    self._write_adapter(self.output_dir / "ema_unet", ending="_ema")
            if self.flags.save_peft:
                peft_format.save_peft(self.output_dir / "peft", **self._adapters())
        self.host.barrier()

    def _write_adapter(self, folder, ending=""):
        self._save_adapter(folder / diffusers_format.WEIGHTS)
        self.save_kohya(ending)

    def _save_adapter(self, path):
        diffusers_format.save_adapter(path, **self._adapters())

    def save_kohya(self, ending: str = "", **options) -> float:
        """Write kohya/NAME`ending`.safetensors, with the options and the result of kohya.save_kohya."""
        unet_files = weights.weight_files(self.data.model.folder / "unet", self.data.model.variant)
        weight_of = dora.frozen_weights(self.engine.unet, unet_files)
        path = self.output_dir / "kohya" / f"{self.name}{ending}.safetensors"
        return kohya.save_kohya(path, **self._adapters(), weight_of=weight_of, **options)

    def _adapters(self):
        return dict(unet=self.engine.unet, recipe=self.recipe, text_encoders=self.data.trained_encoders)

    def summary(self, progress, ended: str, total_steps: int) -> dict:
        """Say how the run went and what reads its files -> what a trainer's main returns."""
        on_device = f"{self.host.peak_gib():.2f} GiB on the {self.host.device.type}"
        peaks = f"peak {on_device}, {device.peak_ram_gib():.2f} GiB of RAM"
        where = f"everything is in {self.output_dir}"
        self.host.say(f"{ended} after step {progress.step} of {total_steps}; {peaks}; {where}")
        for_others = f"kohya/{self.name}.safetensors: for {_readers(self.engine.unet)}"
        self.host.say(f"{diffusers_format.WEIGHTS}: for diffusers and infer.py; {for_others}")

        # The last line of metrics.jsonl speaks for the run
        rows = report.read_metrics(self.output_dir / "metrics.jsonl")
        return {
            "output_dir": str(self.output_dir),
            "step": progress.step,
            "ended": ended,
            "weights": str(self.output_dir / diffusers_format.WEIGHTS),
            "metrics": rows[-1] if rows else None,
        }

    # ---------------------------------------------------------------- when the folder fails

    def rescue(self, progress, error: OSError) -> UserError:
        """Save to the local disk, as a file cannot be read or written (a Drive that was unmounted, say).

        Returns:
            the error that says where.
        """
        place = Path(tempfile.mkdtemp(prefix=f"{self.name}-"))
        self._save_adapter(place / diffusers_format.WEIGHTS)
        checkpoint.save_checkpoint(place, progress.step, self.engine, asdict(progress), None)
        what = " ".join(str(error).split())  # diffusers' errors have several lines
        return UserError(
            f"the run ended on a file error ({what}): perhaps --output_dir {self.output_dir} is full or gone, or a file"
            f" of the model is; adapter and checkpoint of step {progress.step} are in {place}: go on with --output_dir"
            f" elsewhere --resume_from_checkpoint {run_folder.find_checkpoints(place)[-1]}"
        )


def _readers(unet):
    """The tools that read a kohya file of this adapter."""
    if not unet.peft_config["default"].use_dora:
        return "ComfyUI, Forge, A1111 and kohya's scripts"
    return (
        "ComfyUI and Forge only (A1111 and kohya's scripts draw a DoRA wrong and do not say so:"
        " --export_dora_as_lora RANK)"
    )
'''

# ====================================================================================== common/train/resuming.py

MODULES['common/train/resuming.py'] = r'''
"""Where a run starts: at the beginning, or exactly where a checkpoint was made."""

from pathlib import Path

from common import files, run_folder
from common.cli.flag_facts import names_where
from common.errors import UserError
from common.train import checkpoint, loops


def resume(flags, engine, recipe, length):
    """The Progress to start from; what differs from the run's beginning is said.

    Raises:
        UserError: a damaged or foreign checkpoint, another effective batch, newer checkpoints beside it.
    """
    host = engine.host
    found = run_folder.find_resume(flags.resume_from_checkpoint, flags.output_dir)
    if not found:
        if flags.resume_from_checkpoint:
            host.say(f"no checkpoint in {flags.output_dir} yet: starting at the beginning")
        return loops.Progress(effective_batch=length.effective_batch)

    # Later checkpoints of the same folder would be taken for its continuation.
    newest = max([*run_folder.find_checkpoints(flags.output_dir), found[0]], key=run_folder.step_of)
    if run_folder.step_of(newest) > run_folder.step_of(found[0]):
        raise UserError(
            f"--resume_from_checkpoint {found[0]}: {newest} is newer and would be mixed up with what follows;"
            " resume with 'latest', move the newer ones away, or name another --output_dir"
        )

    # The state of the run, and the images of a step, on which it depends.
    folder, progress = _load_newest(found, engine)
    if progress.effective_batch != length.effective_batch:
        raise UserError(
            f"--resume_from_checkpoint: the run has {progress.effective_batch} images a step,"
            f" now there are {length.effective_batch} (--train_batch_size x --gradient_accumulation_steps);"
            " resume with the same product"
        )
    _set_aside(found[: found.index(folder)], Path(flags.output_dir), host)

    # What differs is said, but for flags that change nothing of what is computed.
    before = checkpoint.read_config(folder.parent)
    free = names_where(flags, resume="free")
    for name, value in recipe["flags"].items():
        if before["flags"].get(name, value) != value and name not in free:
            host.say(f"resuming with --{name} {value}, which was {before['flags'][name]}")
    if before["data"] not in ({}, recipe["data"]):
        was = before["data"]["images"]
        now = recipe["data"]["images"]
        host.say(
            f"resuming with other data: {now} images now, {was} before, or edited ones;"
            " the run is no longer that of its first data"
        )
    host.say(f"resumed from {folder}")
    return progress


def _load_newest(found, engine):
    """(folder, Progress) of the first checkpoint of `found` that is as it was written; the others are named.

    Raises:
        UserError: none is.
    """
    for folder in found:
        try:
            return folder, loops.Progress(**checkpoint.load_checkpoint(folder, engine))
        except files.DamagedFile as error:
            if folder == found[-1]:
                raise
            engine.host.say(f"passed over: {error}")


def _set_aside(damaged, output_dir, host):
    """Rename damaged checkpoints of this run: as its newest they would be kept, and sound ones rotated away."""
    host.barrier()
    for folder in damaged if host.is_main else ():
        if folder.parent == output_dir:
            folder.rename(files.partial_name(folder).with_suffix(".damaged"))
'''

# ==================================================================================== common/train/run_length.py

MODULES['common/train/run_length.py'] = r'''
"""How long a run takes, in optimizer steps, and how many images a step has on however many processes."""

import math
from dataclasses import dataclass

from common.model.device import Host


@dataclass(frozen=True)
class RunLength:
    """How long a run takes, and after how many steps what happens. Steps are optimizer steps."""

    total_steps: int
    effective_batch: int
    checkpointing_steps: int
    validation_steps: int
    early_stopping_patience: int | None = None
    ends_s: float = math.inf  # on the monotonic clock: by then everything must be saved


def run_length(flags, host: Host, num_examples: int) -> RunLength:
    """The same on however many processes: they share out the images of a step, of which each has at least one."""
    effective_batch = max(flags.train_batch_size * flags.gradient_accumulation_steps, host.world)
    return RunLength(
        total_steps=total_steps(flags.max_train_steps, flags.num_train_epochs, num_examples, effective_batch),
        effective_batch=effective_batch,
        checkpointing_steps=flags.checkpointing_steps,
        validation_steps=flags.validation_steps,
        early_stopping_patience=flags.early_stopping_patience,
        ends_s=host.started_s + 60 * (flags.max_train_minutes or math.inf),
    )


def total_steps(max_train_steps: int | None, num_train_epochs: int, num_samples: int, effective_batch: int) -> int:
    """Optimizer steps of a run: `max_train_steps`, or as many as cover the epochs. Windows run across epoch ends."""
    return max_train_steps or math.ceil(num_train_epochs * num_samples / effective_batch)


def uneven_shares(flags, world: int, effective_batch: int) -> str | None:
    """What is done where the images of a step cannot be shared out evenly; None where they can."""
    asked = flags.train_batch_size * flags.gradient_accumulation_steps
    if asked < world:
        return (
            f"note: {asked} images a step cannot be shared by {world} processes: each takes one, so the effective"
            f" batch is {world}"
        )
    least, larger = divmod(effective_batch, world)
    if not larger:
        return None
    return (
        f"note: {effective_batch} images a step cannot be shared evenly by {world} processes: {larger} of them take"
        f" {least + 1}, the others {least}; the effective batch stays {effective_batch}"
    )
'''

# ================================================================================== common/train/step_numbers.py

MODULES['common/train/step_numbers.py'] = r'''
"""What a step measures, and how it travels: one vector on the device, then one line of metrics."""

from dataclasses import dataclass
from typing import NamedTuple

import torch

from common.model import noise


class StepNumbers(NamedTuple):
    """What one attempt at a step measures.

    On the device it is one fp32 vector, so that passes and processes add up in one operation. `pack` and `unpack`
    alone know the order; a field that is not packed is 0.
    """

    loss: float  # as optimised
    mse: float
    mse_by_quarter: list  # sums over the examples of each quarter of the timesteps
    count_by_quarter: list
    stops: float  # processes that were asked to stop
    out_of_memory: float  # processes whose passes did not fit
    grad_norm: float
    loss_scale: float

    @classmethod
    def pack(cls, device: torch.device, **fields: torch.Tensor | float) -> torch.Tensor:
        parts = []
        for name in cls._fields:
            value = fields.get(name, 0.0)
            size = noise.QUARTERS if name.endswith("_by_quarter") else 1
            parts.append(value.view(size) if torch.is_tensor(value) else torch.full((size,), value, device=device))
        return torch.cat(parts)

    @classmethod
    def unpack(cls, vector: torch.Tensor) -> "StepNumbers":
        """Wait for the device and read a vector of `pack`."""
        numbers = iter(vector.tolist())
        quarter = lambda: [next(numbers) for _ in range(noise.QUARTERS)]  # noqa: E731
        return cls(*(quarter() if name.endswith("_by_quarter") else next(numbers) for name in cls._fields))

    def mse_quarters(self) -> list[float | None]:
        """Mean mse by quarter of the timesteps, None where the step had none."""
        return [total / n if n else None for total, n in zip(self.mse_by_quarter, self.count_by_quarter)]


@dataclass(frozen=True)
class StepResult:
    """What one attempt at an optimizer step gave. It is not `applied` when gradients or loss were not finite."""

    loss: float
    mse: float
    mse_quarters: list[float | None]
    grad_norm: float
    loss_scale: float
    lr: float
    stop: bool  # some process was asked to stop
    applied: bool
'''

# ============================================================================= how the texts above become modules


class _Texts(importlib.abc.MetaPathFinder, importlib.abc.InspectLoader):
    """Imports a module from its text; Python's own machinery does the rest."""

    def _path(self, name):
        path = name.replace(".", "/")
        return f"{path}/__init__.py" if self.is_package(name) else f"{path}.py"

    def is_package(self, name):
        return name.replace(".", "/") + "/__init__.py" in MODULES

    def get_source(self, name):
        return MODULES[self._path(name)].removeprefix("\n")

    def get_code(self, name):
        return self.source_to_code(self.get_source(name), os.path.join(_HERE, self._path(name)))

    def find_spec(self, name, path=None, target=None):
        if self._path(name) not in MODULES:
            return None
        spec = importlib.util.spec_from_loader(name, self, origin=os.path.join(_HERE, self._path(name)))
        spec.has_location = True
        return spec


_HERE = os.path.dirname(os.path.abspath(__file__))
sys.meta_path.insert(0, _Texts())


# ================================================================================================== train_opt.py

import common  # noqa: F401  # isort: skip  (first: from here on Ctrl-C is one line)
from dataclasses import dataclass
from typing import Literal, Optional

from common.cli import hub
from common.cli.command_line import parse, print_config
from common.cli.flag_checks import check
from common.cli.flags import TrainFlags
from common.cli.running import run


@dataclass
class Flags(TrainFlags):
    """Fine-tune SDXL to a style with LoRA, fit for a card of 8 GB and faster on larger ones."""

    output_dir: str = "outputs/train_opt"
    resolution: int = 768
    text_cache: Literal["ram", "disk", "none"] = "disk"
    lora_rank: int = 8
    gradient_accumulation_steps: int = 8
    num_train_epochs: int = 15
    max_train_steps: Optional[int] = 3000
    lr_warmup_steps: int = 150
    min_snr_gamma: Optional[float] = 5.0
    offset_noise_strength: float = 0.1
    use_ema: bool = True


def main(argv=None):
    """Train; returns {"output_dir", "step", "ended", "weights", "metrics"}."""
    flags = parse(Flags, argv)
    check(flags)
    if flags.dry_run:
        return print_config(flags)
    hub.check(flags)

    from common.model import adapters, device, loading
    from common.train import assembly

    host = device.start(flags.mixed_precision, flags.seed)
    data = assembly.load_data(flags, host)  # image, caption -> Sample -> cached latents and text
    unet = loading.load_unet(data.model, host, flags.quantize)  # frozen
    adapters.add_lora(unet, flags.lora_target_modules, flags.lora_rank, flags.lora_alpha, flags.lora_dropout)
    engine = assembly.build_engine(flags, host, unet, data)  # flat buffer, optimizer, schedule, EMA
    return assembly.train(flags, engine, data)  # steps, validation, checkpoints, results


if __name__ == "__main__":
    run(main)
