"""Renders images with SDXL and LoRA adapters, side by side with --compare; --merge makes them one model.

python infer.py --compare
python infer.py --compare --lora outputs/train_sdxl --lora outputs/train_dora:0.8
python infer.py --lora outputs/train_opt --prompt "a fox in Naruto style" --num_images 4
python infer.py --merge merged --lora outputs/train_opt --lora outputs/train_dora:0.5
python infer.py --demo --compare
"""

# Made by tools/bundle.py from infer.py and 59 modules; edit those, not this file.

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

# =============================================================================== common/adapter_files/merging.py

MODULES['common/adapter_files/merging.py'] = r'''
"""Adapters fused into the model that they were loaded beside, and that model written as a new diffusers folder."""

import json
import os
import shutil
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING

from safetensors import SafetensorError

from common.errors import UserError
from common.files import write_json
from common.model.model_kind import SCHEDULER

if TYPE_CHECKING:  # slow to import
    from diffusers import StableDiffusionXLPipeline

    from common.model.loading import Model

SAVED = ("unet", "text_encoder", "text_encoder_2", "vae")
# byte for byte: saved again, tokenizers lose files that other tools read
COPIED = ("scheduler", "tokenizer", "tokenizer_2")


def merge(
    pipeline: "StableDiffusionXLPipeline", adapters: list[tuple[str, float]], model: "Model", place: Path, record: dict
) -> None:
    """Fuse adapters into a pipeline, layer by layer in place, and write it to a new folder, whole or not at all.

    The folder renders what `set_adapters` renders at the same scales, for several LoRA and DoRA adapters together too.

    Args:
        adapters: [(name in the pipeline, scale)].
        model: the loading.Model that the pipeline was loaded from; its own folder is only read.
        place: Path of the new folder.
        record: what merge.json in it says.
    Raises:
        UserError: no room on the disk, not writable, merged weights that are not finite.
    """
    _check_room(pipeline, place)
    _fuse(pipeline, adapters)
    partial = place.with_name(f"{place.name}.{os.getpid()}.partial")
    try:
        _write(pipeline, model, partial, record)
        partial.rename(place)
    except (OSError, SafetensorError) as error:
        raise UserError(f"--merge {place}: cannot be written ({error})") from None
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _check_room(pipeline, place):
    tensors = chain.from_iterable(getattr(pipeline, name).parameters() for name in SAVED)
    disk = next(folder for folder in place.absolute().parents if folder.is_dir())
    needed = sum(tensor.nbytes for tensor in tensors)
    free = shutil.disk_usage(disk).free
    if needed > free:
        raise UserError(
            f"--merge {place}: needs {needed / 1e6:,.0f} MB, but only {free / 1e6:,.0f} MB are free on that disk"
        )


def _fuse(pipeline, adapters):
    """Add the adapters to the weights and take their layers out: what remains is a plain model."""
    pipeline.set_adapters([name for name, _ in adapters], [scale for _, scale in adapters])
    try:
        pipeline.fuse_lora(safe_fusing=True)  # at the scales just set; lora_scale would come on top
    except ValueError:
        raise UserError(f"--merge: the merged weights are not finite in {pipeline.dtype}; lower the scales") from None
    pipeline.unload_lora_weights()


def _write(pipeline, model, folder, record):
    """The weights as the libraries save them; everything that no adapter changes as it lies in the model's folder."""
    for name in SAVED:
        getattr(pipeline, name).save_pretrained(folder / name)
    for name in COPIED:
        shutil.copytree(model.folder / name, folder / name)
    shutil.copy(model.folder / "model_index.json", folder)
    # a flag, or the model's single file, may have said what the scheduler is
    if json.loads((folder / SCHEDULER).read_text()) != model.scheduler:
        write_json(folder / SCHEDULER, model.scheduler)
    write_json(folder / "merge.json", record)
    for file in folder.rglob("*.safetensors"):
        file.chmod(0o644)  # safetensors makes its files unreadable for others
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

# =================================================================================== common/cli/render_checks.py

MODULES['common/cli/render_checks.py'] = r'''
"""What infer.py refuses before anything heavy is imported: values out of range, contradictions, taken places."""

import os
from pathlib import Path

from common import run_folder
from common.cli.flag_checks import check_model, check_ranges
from common.errors import UserError


def check(flags) -> None:
    """Refuse values that cannot work, before anything heavy is imported or anything is written.

    Raises:
        UserError: naming the flag, the value and the cure.
    """
    # Ranges, and the image to start from
    check_ranges(flags)
    if flags.image and int(flags.steps * flags.strength) < 1:
        raise UserError(f"--strength {flags.strength}: of {flags.steps} steps it leaves none; raise one of the two")
    if flags.image and not os.path.isfile(flags.image):
        raise UserError(f"--image {flags.image}: no such file")

    # Adapters, places and the model
    if not flags.lora and not flags.compare and (flags.ema or flags.lora_scale != 1):
        name = "--ema" if flags.ema else "--lora_scale"
        raise UserError(f"{name}: there is no adapter it could apply to; add --lora PATH")
    if flags.merge is not None:
        check_merge(flags)
    run_folder.check_free(Path(flags.output_dir))
    check_model(flags)


def check_merge(flags) -> None:
    """The part of `check` for --merge: there is something to merge, and a new place for it outside of the model.

    Raises:
        UserError: naming the flag, the value and the cure.
    """
    place = Path(flags.merge)
    model = Path(flags.pretrained_model_name_or_path)
    if not flags.lora:
        raise UserError(f"--merge {place}: no adapter to merge; add --lora PATH[:SCALE]")
    for name in ("compare", "prompt", "image"):
        if getattr(flags, name):
            raise UserError(f"--merge {place}: draws nothing, so --{name} has no meaning; leave it out")
    if place.resolve().is_relative_to(model.resolve()):
        raise UserError(f"--merge {place}: is in the model's own folder, which stays as it is; name a folder elsewhere")
    if os.path.lexists(place):
        raise UserError(f"--merge {place}: exists already, and nothing is written over; name a new folder")
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

# ============================================================================== common/render/chosen_adapters.py

MODULES['common/render/chosen_adapters.py'] = r'''
"""The adapters that a command line means: PATH or PATH:SCALE, those that lie in outputs/, and their averaged weights.

Nothing here imports torch: an adapter that is not there is refused at once.
"""

import re
from pathlib import Path
from typing import NamedTuple

from common import run_folder
from common.errors import UserError

EMA_FOLDER = "ema_unet"


class Adapter(NamedTuple):
    """An adapter as the user named it: a file or folder, and how strongly it counts."""

    path: Path
    scale: float


def parse_lora(text: str) -> Adapter:
    """`PATH` or `PATH:SCALE` -> Adapter. The whole text counts as a path when it is one, so names with colons work.

    Raises:
        UserError: no such path, or what stands behind the colon is no number.
    """
    scaled = re.fullmatch(r"(.+):([+-]?(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?)", text)
    if scaled and not Path(text).exists():
        path, scale = Path(scaled[1]), float(scaled[2])
    else:
        path, scale = Path(text), 1.0
    if not path.exists():
        raise UserError(f"--lora {text}: {_what_is_wrong(text)}")
    return Adapter(path, scale)


def _what_is_wrong(text):
    """Of a text that names no adapter: the scale, where the rest is there; else the path."""
    before, _, after = text.rpartition(":")
    if before and Path(before).exists():
        return f"{before} is there, but {after!r} is no number; a scale is written {before}:0.8"
    if re.fullmatch(r"[\d.,]+", text):
        return "is no file or folder; a scale is written behind its adapter, PATH:0.8"
    return "no such file or folder (PATH or PATH:SCALE)"


def chosen_adapters(flags) -> list[Adapter]:
    """The adapters of --lora, or for --compare those in outputs/; averaged ones with --ema; scaled by --lora_scale.

    Raises:
        UserError: no such adapter, no averaged weights, nothing to compare.
    """
    chosen = [parse_lora(text) for text in flags.lora]
    if flags.ema:
        chosen = [_averaged(adapter) for adapter in chosen]
    if flags.compare and not chosen:
        chosen = _adapters_in_outputs(flags)
    return [Adapter(adapter.path, adapter.scale * flags.lora_scale) for adapter in chosen]


def _averaged(adapter):
    if not (adapter.path / EMA_FOLDER).is_dir():
        raise UserError(f"--ema: no {EMA_FOLDER} in {adapter.path}; train with --use_ema, or leave --ema out")
    return Adapter(adapter.path / EMA_FOLDER, adapter.scale)


def _adapters_in_outputs(flags):
    """What --compare takes where no adapter is named."""
    pattern = f"*/{EMA_FOLDER}/{run_folder.WEIGHTS}" if flags.ema else f"*/{run_folder.WEIGHTS}"
    places = [Path("outputs"), *[Path("outputs/demo")] * flags.demo]  # where `make demo` trains
    chosen = [Adapter(path.parent, 1.0) for place in places for path in sorted(place.glob(pattern))]
    if not chosen:
        raise UserError(
            f"--compare: no adapter given and no outputs/{pattern} here; add --lora PATH, or train one first"
        )
    print(f"no --lora given: comparing {', '.join(str(adapter.path) for adapter in chosen)}")
    return chosen
'''

# ====================================================================================== common/render/columns.py

MODULES['common/render/columns.py'] = r'''
"""The columns of a comparison: the base model and its adapters, with titles and file names that are their own."""

import itertools
import re
from pathlib import Path
from typing import NamedTuple

from common.errors import UserError
from common.render import manifest
from common.render.chosen_adapters import EMA_FOLDER


class Column(NamedTuple):
    """One way to render every prompt."""

    title: str
    active: list  # [(name in the pipeline, scale)], none of them for the base
    sources: list  # of the adapters, for the manifest
    stem: str  # what its files' names begin with


def make_columns(flags, sampler, adapters: list, files: list[Path]) -> list[Column]:
    """Load the adapters: with --compare the base and each adapter are a column, else all of them together are one.

    Adapters found in outputs/ may belong to another model (the demo's, say): those are named and left out.
    """
    # Every adapter that fits, with its title and source
    loaded = []
    for adapter, file in zip(adapters, files):
        try:
            name = sampler.load(file)
        except UserError as error:
            if flags.lora:
                raise
            sampler.host.say(f"left out: {error}")
            continue
        source = {"path": str(file), "scale": adapter.scale, "sha256": manifest.sha256(file)}
        loaded.append((title_of(file, adapter.scale), [(name, adapter.scale)], [source]))

    # Side by side, or together
    if flags.compare and not loaded:
        raise UserError("--compare: none of the adapters in outputs/ fits this model; name one with --lora")
    if not flags.compare:
        titles, active, sources = zip(*loaded) if loaded else (["base"], [], [])
        loaded = [(" + ".join(titles), sum(active, []), sum(sources, []))]

    # Titles and file names of their own
    columns = []
    for title, active, sources in [("base", [], []), *loaded] if flags.compare else loaded:
        title = unused(title, [column.title for column in columns], "{} ({})")
        columns.append(Column(title, active, sources, stem_of(title, [column.stem for column in columns])))
    return columns


def stem_of(title: str, used: list[str]) -> str:
    """`title` as the beginning of a file name that no other column has."""
    return unused(re.sub(r"[^\w.-]+", "_", title).strip("_"), used, "{}_{}")


def unused(name: str, used: list[str], numbered: str) -> str:
    """`name`, or the first of `numbered`'s with 2, 3, ... that is not in `used` yet."""
    names = itertools.chain([name], (numbered.format(name, i) for i in itertools.count(2)))
    return next(one for one in names if one not in used)


def title_of(file: Path, scale: float) -> str:
    """An adapter's name in pictures and files: its run's folder, with step, EMA, kohya and scale where they matter."""
    folder, step = file.resolve().parent, re.fullmatch(r"pytorch_lora_weights_(\d+)", file.stem)
    if folder.name == EMA_FOLDER:
        title = f"{folder.parent.name} EMA"
    elif step:
        title = f"{folder.name} step {int(step[1])}"
    elif folder.name == "kohya":
        title = f"{file.stem} kohya"
    elif folder.name == "peft":
        title = f"{folder.parent.name} peft"
    else:
        title = folder.name if file.stem in ("pytorch_lora_weights", "adapter_model") else file.stem
    return title if scale == 1 else f"{title} x{scale:g}"
'''

# ======================================================================================== common/render/grids.py

MODULES['common/render/grids.py'] = r'''
"""One labelled picture of many, in letters that there is a font for."""

from functools import cache
from pathlib import Path

CELL_PX, GAP_PX = (256, 512), 10
MOST_LINES = 20  # of one label: a prompt may have any length
PAPER, INK, PALE_INK = "#ffffff", "#1c1c22", "#77777f"


def grid(rows, column_titles, row_labels, footer):
    """PIL images in rows and columns: titles on top, labels at the left, `footer` in small print below.

    A row grows with a long label. Letters that no font of this machine has are written as their code.

    Args:
        rows: list of rows of PIL images, all of one size. A side has 256 to 512 px: less cannot be seen beside its
            label, more makes a file that nobody can send.
    """
    from PIL import Image, ImageDraw

    side = min(max(rows[0][0].width, CELL_PX[0]), CELL_PX[1])
    left = side * 2 // 3
    titles = [_Text(title, side / 14, side) for title in column_titles]
    labels = [_label(label, side, left - GAP_PX) for label in row_labels]
    top = max(title.height for title in titles) + 2 * GAP_PX
    width = left + len(titles) * (side + GAP_PX) + GAP_PX
    small_print = _Text(footer, side / 20, width - 2 * GAP_PX)
    heights = [max(side, label.height) + GAP_PX for label in labels]
    height = top + sum(heights) + small_print.height + GAP_PX

    sheet = Image.new("RGB", (width, height), PAPER)
    pen = ImageDraw.Draw(sheet)
    for j, title in enumerate(titles):
        x = left + GAP_PX + j * (side + GAP_PX) + side // 2
        title.write(pen, (x, top - GAP_PX), INK, anchor="md", align="center")
    y = top
    for label, images, row_height in zip(labels, rows, heights):
        label.write(pen, (GAP_PX, y + (row_height - GAP_PX) // 2), INK, anchor="lm")
        for j, image in enumerate(images):
            # Enlarged pixels stay sharp: a small image should look like what it is.
            method = Image.Resampling.NEAREST if image.width < side else Image.Resampling.LANCZOS
            sheet.paste(image.convert("RGB").resize((side, side), method), (left + GAP_PX + j * (side + GAP_PX), y))
        y += row_height
    small_print.write(pen, (GAP_PX, height - GAP_PX), PALE_INK, anchor="ld")
    return sheet


def _label(text, side, width_px):
    """A row's label: in small print where it would be taller than its pictures."""
    usual = _Text(text, side / 14, width_px)
    return usual if usual.height <= side else _Text(text, side / 20, width_px)


class _Text:
    """A text in a font that has its letters, broken into lines of `width_px`."""

    def __init__(self, text, size_px, width_px):
        from PIL import Image, ImageDraw, ImageFont

        file, text = legible(text)
        self._font = ImageFont.truetype(file, size_px)
        lines = _wrap(text, self._font, width_px)
        self._text = "\n".join(lines if len(lines) <= MOST_LINES else [*lines[: MOST_LINES - 1], "..."])
        box = ImageDraw.Draw(Image.new("L", (1, 1))).multiline_textbbox((0, 0), self._text, self._font)
        self.height = round(box[3])

    def write(self, pen, place, colour, **options):
        pen.multiline_text(place, self._text, colour, self._font, **options)


def _wrap(text, font, width_px):
    """Lines of `text` that fit; a word that is too long alone is broken, as are scripts without spaces."""
    lines = [""]
    for word in text.split():
        while font.getlength(word) > width_px:
            fitting = next(n for n in range(len(word) - 1, 0, -1) if font.getlength(word[:n]) <= width_px)
            lines.append(word[:fitting])
            word = word[fitting:]
        longer = f"{lines[-1]} {word}".strip()
        if font.getlength(longer) <= width_px:
            lines[-1] = longer
        else:
            lines.append(word)
    return [line for line in lines if line]


# ---------------------------------------------------------------- fonts


def legible(text: str) -> tuple[str, str]:
    """(font file, the text as it can be written with it).

    DejaVu Sans, which comes with matplotlib, has Latin, Greek and Cyrillic; for other letters the machine's fonts are
    looked through. Where none has them all, the missing ones are written as their code (\\u3042), not as boxes.
    """
    letters = {ord(letter) for letter in text if not letter.isspace()}
    for file in (dejavu(), *(_system_fonts() if letters - _letters_of(dejavu()) else ())):
        if letters <= _letters_of(file):
            return file, text
    written = _letters_of(dejavu())
    return dejavu(), "".join(
        letter if ord(letter) in written or letter.isspace() else ascii(letter)[1:-1] for letter in text
    )


def dejavu() -> str:
    import matplotlib

    return str(Path(matplotlib.get_data_path()) / "fonts/ttf/DejaVuSans.ttf")


@cache
def _system_fonts() -> list[str]:
    """The font files in the usual folders of this machine, by name: the same one is taken every time."""
    from matplotlib import font_manager

    return sorted(font_manager.findSystemFonts())


@cache
def _letters_of(file: str) -> set[int]:
    """Code points that a font has a glyph for; none where the file cannot be read."""
    from matplotlib.ft2font import FT2Font

    try:
        return set(FT2Font(file).get_charmap())
    except (OSError, RuntimeError):
        return set()
'''

# ===================================================================================== common/render/manifest.py

MODULES['common/render/manifest.py'] = r'''
"""What infer.py leaves behind: images that carry their parameters, manifest.json, and compare.png.

Heavy libraries are imported where they are used: infer.py answers --help without them.
"""

import contextlib
import hashlib
import itertools
import json
from importlib.metadata import version
from pathlib import Path


def save_image(flags, column, index, prompt, seed, image):
    """Write one PNG with its parameters in it: "parameters" as A1111 writes them, "settings" as JSON -> its record."""
    from common import files

    names = ("steps", "guidance_scale", "guidance_rescale", "scheduler", "resolution", "image", "strength")
    settings = {name: getattr(flags, name) for name in names if flags.image or name not in ("image", "strength")}
    settings |= {"model": flags.pretrained_model_name_or_path, "adapters": column.sources}
    record = dict(column=column.title, prompt=prompt, negative_prompt=flags.negative_prompt, seed=seed, **settings)
    lines = [prompt] + ([f"Negative prompt: {flags.negative_prompt}"] if flags.negative_prompt else [])
    facts = [f"Steps: {flags.steps}, Sampler: {flags.scheduler}, CFG scale: {flags.guidance_scale}, Seed: {seed}"]
    facts += [f"Size: {image.width}x{image.height}, Model: {Path(flags.pretrained_model_name_or_path).name}"]
    facts += [f"Lora: {source['path']}:{source['scale']:g}" for source in column.sources]
    path = _unused(Path(flags.output_dir) / f"images/{column.stem}_{index:02d}_{seed}.png")
    parameters = "\n".join([*lines, ", ".join(facts)])
    files.save_png(path, image, {"parameters": parameters, "settings": json.dumps(record)})
    return {"file": f"images/{path.name}", "sha256": sha256(path), **record}


def _unused(path):
    """`path`, or where an earlier drawing has that name, the first of path_2, path_3, ... that is free."""
    numbered = (path.with_name(f"{path.stem}_{number}{path.suffix}") for number in itertools.count(2))
    return next(name for name in itertools.chain([path], numbered) if not name.exists())


def write_results(flags, sampler, model, columns, records, load_s):
    """compare.png and manifest.json -> what the manifest says."""
    from common import files

    host = sampler.host
    output_dir = Path(flags.output_dir)
    drawn_s = sum(record["seconds"] for record in records)

    # What was loaded, on what, how long it took, and what came of it.
    manifest = {
        **provenance(flags, model),
        "device": {
            "type": host.device.type,
            "dtype": dtype_name(host),
            "memory": sampler.memory,
            "reason": host.reason,
        },
        # Loading, and what follows it.
        "timings": {
            "load_s": round(load_s, 2),
            "draw_s": round(drawn_s, 2),
            "s_per_image": round(drawn_s / len(records), 3),
        },
        "peak_gib": round(host.peak_gib(), 2),
        "columns": [{"title": column.title, "adapters": column.sources} for column in columns],
        "images": records,
    }

    # Earlier results get out of the way, then these take their places.
    if kept := keep_earlier(output_dir):
        host.say(f"earlier results are kept as {' and '.join(kept)}")
    if flags.compare:
        write_comparison(flags, host, manifest)
    files.write_json(output_dir / "manifest.json", manifest)
    made = "compare.png, " if flags.compare else ""
    host.say(
        f"{len(records)} images, {drawn_s / len(records):.2f} s each;"
        f" {made}manifest.json and images/ are in {output_dir}"
    )
    return manifest


def keep_earlier(output_dir):
    """compare.png and manifest.json are of the last call: those of the one before get a number, the same for both.

    Returns:
        the names that they have now.
    """
    from common import files

    grid = output_dir / "compare.png"
    manifest = output_dir / "manifest.json"
    if not (grid.exists() or manifest.exists()):
        return []
    number = next(n for n in itertools.count(1) if not any((output_dir / name).exists() for name in _numbered(n)))
    grid_kept, manifest_kept = (output_dir / name for name in _numbered(number))
    if grid.exists():
        grid.rename(grid_kept)
    if manifest.exists():
        manifest.rename(manifest_kept)
        with contextlib.suppress(ValueError, TypeError):  # not one of ours: it keeps what it says
            earlier = dict(json.loads(manifest_kept.read_text()))
            files.write_json(manifest_kept, earlier | ({"grid": grid_kept.name} if "grid" in earlier else {}))
    return [path.name for path in (grid_kept, manifest_kept) if path.exists()]


def _numbered(number):
    return f"compare_{number}.png", f"manifest_{number}.json"


def write_comparison(flags, host, manifest):
    """compare.png, and in the manifest how far each column is from the base.

    That is the mean absolute difference of pixels, 0 to 255.
    """
    from PIL import Image

    from common import files
    from common.render import grids

    output_dir = Path(flags.output_dir)
    titles = [column["title"] for column in manifest["columns"]]
    rows = {}  # (prompt, seed) -> one image per column
    for record in manifest["images"]:
        with Image.open(output_dir / record["file"]) as image:
            rows.setdefault((record["prompt"], record["seed"]), []).append(image.convert("RGB"))

    # Each column beside the base, which is the first.
    for i, column in enumerate(manifest["columns"]):
        column["mean_abs_difference_from_base"] = sum(difference(row[0], row[i]) for row in rows.values()) / len(rows)
        if i and not column["mean_abs_difference_from_base"]:
            host.say(f"{column['title']}: not one pixel differs from the base")

    # The sheet, and what no font of this machine can write on it.
    labels = [prompt if flags.num_images == 1 else f"{prompt} (seed {seed})" for prompt, seed in rows]
    model = Path(manifest["model"]["name"]).name
    footer = f"{model}, {flags.resolution} px, {flags.steps} steps of {flags.scheduler}"
    footer += f", guidance {flags.guidance_scale:g}, seed {flags.seed}"
    for text in [*titles, *labels]:
        if grids.legible(text)[1] != text:
            host.say(
                f"compare.png: no font here has all letters of {text!r}; install one, e.g. Noto Sans CJK;"
                " until then their codes stand there"
            )
    sheet = grids.grid(list(rows.values()), titles, labels, f"{footer}; the same noise in every column")
    manifest["grid"] = "compare.png"
    files.save_png(output_dir / "compare.png", sheet, {"parameters": footer})


def difference(image, other):
    """Mean absolute difference of two RGB images over all pixels and channels, 0 to 255."""
    from PIL import ImageChops, ImageStat

    return sum(ImageStat.Stat(ImageChops.difference(image, other)).mean) / 3


def provenance(flags, model):
    """What was loaded, by which packages: for manifest.json and merge.json."""
    packages = ("torch", "diffusers", "transformers", "peft")
    return {
        "model": {
            "name": model.name,
            "vae": str(model.vae),
            "revision": flags.revision,
            "variant": model.variant,
            "prediction_type": model.kind.prediction_type,
            "zero_terminal_snr": model.kind.zero_terminal_snr,
        },
        "versions": {package: version(package) for package in packages},
    }


def dtype_name(host):
    return str(host.dtype).removeprefix("torch.")


def sha256(path):
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()
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


# ====================================================================================================== infer.py

import common  # noqa: F401  # isort: skip  (first: from here on Ctrl-C is one line)
import itertools
import time
from dataclasses import dataclass
from pathlib import Path
from typing import List, Literal, Optional

from common import run_folder
from common.cli import hub, render_checks
from common.cli.command_line import DEMO_ROOT, parse, print_config
from common.cli.flag_facts import ANY, FROM_ONE, FROM_ZERO, SEED, allowing, flag, local_path, multiple_of
from common.cli.model_flags import ModelFlags
from common.cli.running import run
from common.errors import UserError
from common.model.schedulers import SCHEDULERS, default_guidance_rescale
from common.render import manifest
from common.render.chosen_adapters import chosen_adapters

REFERENCE_PROMPTS = [
    "Naruto Uzumaki eating ramen",
    "Bill Gates in Naruto style",
    "A boy with blue eyes in Naruto style",
]


@dataclass
class Flags(ModelFlags):
    """Draw images with SDXL and LoRA adapters, or compare adapters with the base model."""

    # what to draw
    compare: bool = flag(
        False,
        "one grid, compare.png: every prompt with the base model and with every adapter alone, at identical seeds",
        group="pictures",
    )
    lora: List[str] = flag(
        [],
        "adapter, PATH or PATH:SCALE: a run's folder, .safetensors file (diffusers, kohya) or PEFT folder; repeatable",
        type=local_path,
        group="adapter",
        metavar="PATH[:SCALE]",
    )
    ema: bool = flag(False, "use the averaged weights of each adapter folder, PATH/ema_unet", group="adapter")
    lora_scale: float = flag(1.0, "multiplies the scale of every adapter", group="adapter", range=ANY)
    merge: Optional[str] = flag(
        None,
        "draw nothing, but write a model folder of this name, with the adapters in its weights; it must not exist yet",
        type=local_path,
        group="adapter",
    )
    prompt: List[str] = flag(
        [],
        'what to show, in quotes; several: --prompt "a fox" "a cat"; none means the reference prompts',
        group="pictures",
    )
    negative_prompt: Optional[str] = flag(None, "what to keep out of the images", group="pictures")
    seed: int = flag(
        42, "image i of a prompt is drawn with seed + i, whatever else is drawn beside it", group="pictures", range=SEED
    )
    num_images: int = flag(1, "images of each prompt", group="pictures", range=FROM_ONE)
    resolution: int = flag(
        1024, "pixels: side of the square image; a multiple of 8", group="pictures", range=multiple_of(8), metavar="PX"
    )
    steps: int = flag(30, "denoising steps", group="pictures", range=FROM_ONE)
    guidance_scale: float = flag(
        7.5,
        "strength of the prompt (classifier-free guidance); 1 switches guidance off",
        group="pictures",
        range=FROM_ZERO,
    )
    guidance_rescale: Optional[float] = flag(
        None,
        "0 to 1: guided noise is scaled back to the spread of unguided one;"
        " none means 0.7 with zero-terminal SNR, else 0",
        group="pictures",
        range=allowing(lambda value: 0 <= value <= 1, "must be at least 0 and at most 1"),
    )
    scheduler: str = flag("euler", "sampler", choices=list(SCHEDULERS), group="pictures")
    image: Optional[str] = flag(
        None, "start from this image (img2img); it is cropped to a square", type=local_path, group="pictures"
    )
    strength: float = flag(
        0.6,
        "with --image: share of the steps that is run, 1 forgets the image",
        group="pictures",
        range=allowing(lambda share: 0 < share <= 1, "must be more than 0 and at most 1"),
        metavar="SHARE",
    )
    # machine
    cuda_graph: bool = flag(
        True,
        "on a GPU that holds the whole model, launch the kernels of a denoising step once and replay them",
        group="memory and speed",
    )
    memory: Literal["auto", "gpu", "offload", "sequential"] = flag(
        "auto",
        "weights on the GPU: all, only the part at work (8 GB cards), or one layer at a time (slow);"
        " auto goes by what is free",
        group="memory and speed",
    )
    batch_size: int = flag(1, "images of one prompt that are drawn together", group="memory and speed", range=FROM_ONE)
    output_dir: str = flag(
        "outputs/infer",
        "where compare.png, manifest.json and images/ go; those of earlier drawings are kept",
        type=local_path,
        demo="outputs/demo",
        group="output",
    )


def main(argv=None):
    """Render, or merge; returns what manifest.json or merge.json says."""
    # Every mistake is answered before torch is imported
    flags = parse(Flags, argv)
    render_checks.check(flags)
    adapters = chosen_adapters(flags)
    if flags.dry_run:
        return print_config(flags)
    hub.check(flags)

    from common.adapter_files import reading
    from common.model import device, loading
    from common.model.tiny import demo_assets
    from common.render import sampling
    from common.render.columns import make_columns

    # What is given: files and an image to start from
    if flags.demo:
        demo_assets(DEMO_ROOT)
    start_s = time.monotonic()
    files = [reading.find_adapter(adapter.path) for adapter in adapters]
    image = load_image(flags.image, flags.resolution)
    host = device.start(flags.mixed_precision, flags.seed)
    if not host.is_main:
        return None  # under `accelerate launch` one process renders

    # What every image depends on
    model = loading.model_of(flags, host.say)
    if flags.guidance_rescale is None:
        flags.guidance_rescale = default_guidance_rescale(model.kind)
    settings = settings_of(flags, image)

    # The model in its memory tier, the adapters beside it
    memory, reason = sampling.choose_memory(flags.memory, host, settings, min(flags.batch_size, flags.num_images))
    host.say(f"memory: {memory} ({reason})")
    options = dict(img2img=image is not None, cuda_graph=flags.cuda_graph)
    sampler = sampling.Sampler(model, host, flags.scheduler, memory, **options)
    columns = make_columns(flags, sampler, adapters, files)
    if flags.merge:
        return merge(flags, sampler, model, columns[0])
    sampler.place()
    load_s = time.monotonic() - start_s

    # images/*.png, then manifest.json and compare.png
    with run_folder.owned(Path(flags.output_dir), host):
        records = render(flags, sampler, columns, settings)
        return manifest.write_results(flags, sampler, model, columns=columns, records=records, load_s=load_s)


def settings_of(flags, image):
    """What every image depends on, whatever its prompt, seed and adapters."""
    from common.render import sampling

    return sampling.Settings(
        resolution=flags.resolution,
        steps=flags.steps,
        guidance_scale=flags.guidance_scale,
        guidance_rescale=flags.guidance_rescale,
        negative_prompt=flags.negative_prompt,
        image=image,
        strength=flags.strength,
    )


def load_image(path, resolution):
    """--image as RGB, the largest middle square scaled to `resolution` px; None without one."""
    if path is None:
        return None
    from PIL import Image, ImageOps, UnidentifiedImageError

    try:
        with Image.open(path) as image:
            return ImageOps.fit(
                ImageOps.exif_transpose(image).convert("RGB"), (resolution, resolution), Image.Resampling.LANCZOS
            )
    except (UnidentifiedImageError, OSError) as error:
        raise UserError(f"--image {path}: cannot be read ({error})") from None


def render(flags, sampler, columns, settings):
    """Every prompt and seed in every column -> records for the manifest; each image is on disk once it is made."""
    from tqdm import tqdm

    # What is to be rendered
    prompts = prompts_of(flags)
    seeds = [flags.seed + i for i in range(flags.num_images)]
    batches = [seeds[i : i + flags.batch_size] for i in range(0, len(seeds), flags.batch_size)]
    warn_of_long_prompts(sampler, prompts)
    (Path(flags.output_dir) / "images").mkdir(parents=True, exist_ok=True)

    # Batch by batch
    records = []
    steps = len(columns) * len(prompts) * len(seeds) * settings.steps_run
    with tqdm(total=steps, desc="rendering", unit="step") as bar:
        for column, (i, prompt), batch in itertools.product(columns, enumerate(prompts), batches):
            start_s = time.monotonic()
            images = sampler.render(column.active, prompt, batch, settings, bar.update)
            seconds = round((time.monotonic() - start_s) / len(batch), 3)

            # On the disk at once, and a word on black ones
            for seed, image in zip(batch, images):
                saved = manifest.save_image(flags, column, index=i, prompt=prompt, seed=seed, image=image)
                records.append({**saved, "seconds": seconds})
                if image.convert("L").getextrema()[1] == 0:
                    cure = "try --mixed_precision no or another VAE"
                    bar.write(f"{saved['file']} is all black: not finite in {sampler.host.dtype}; {cure}")
    return records


def prompts_of(flags):
    """Each of --prompt once, or the demo's own, or the reference prompts."""
    from common.cli.demo_settings import demo_settings

    if flags.prompt:
        return list(dict.fromkeys(flags.prompt))
    return demo_settings(DEMO_ROOT)["prompts"] if flags.demo else REFERENCE_PROMPTS


def warn_of_long_prompts(sampler, prompts):
    tokenizer = sampler.pipeline.tokenizer
    for prompt in prompts:
        if (excess := len(tokenizer(prompt).input_ids) - tokenizer.model_max_length) > 0:
            sampler.host.say(f"prompt too long, its last {excess} tokens are ignored: {prompt}")


def merge(flags, sampler, model, column):
    """Write the model with the adapters of `column` in its weights -> what its merge.json says."""
    from common.adapter_files import merging

    host = sampler.host
    place = Path(flags.merge)
    record = {**manifest.provenance(flags, model), "dtype": manifest.dtype_name(host), "adapters": column.sources}
    host.say(f"merging {column.title}")
    merging.merge(sampler.pipeline, column.active, model, place, record)
    use = "name it with --pretrained_model_name_or_path, or load it with from_pretrained"
    host.say(f"the merged model is in {place}: {use}")
    return record


if __name__ == "__main__":
    run(main)
