"""DoRA, weight-decomposed LoRA (arXiv 2402.09353): the adapter also learns the length of every row of the weights.

accelerate launch train_dora.py
accelerate launch train_dora.py --quantize nf4
python train_dora.py --demo
"""

# Made by tools/bundle.py from train_dora.py and 31 modules; edit those, not this file.

import importlib.abc
import importlib.util
import os
import sys

MODULES = {}

# ============================================================================================ common/__init__.py

MODULES['common'] = r'''
"""The data flow of the suite, one module per arrow.

image, caption ─ dataset ─▶ Sample ─ caching ─▶ Batch(moments, text, time_ids) ─ noise ─▶ x_t, target
     (loading: VAE and text encoders are on the GPU only while they encode)                 │
                                                                                            ▼
images ◀─ sampling ◀─ adapter file ◀─ checkpoint ◀─ loops ◀─ engine: unet ─▶ loss ─▶ flat gradient ─▶ optimizer ─▶ EMA
                                                               (adapters: LoRA layers, the flat parameter buffer)
"""
'''

# ===================================================================================== common/adapter_loading.py

MODULES['common.adapter_loading'] = r'''
"""Adapter files -> adapters in a pipeline; what diffusers, transformers and PEFT leave out with a warning is an error."""

import warnings

import torch

from common.adapter_reading import read_adapter
from common.command_line import UserError
from common.formats import COMPONENTS


def load_adapter(pipeline, file, name):
    """Load an adapter file into a StableDiffusionXLPipeline under the adapter name `name`; its scale is 1 until set_adapters says otherwise.

    Equal to load_lora_weights where that works.
    Raises:
        UserError: what read_adapter refuses, and keys that the loaders did not use.
    """
    modules = {component: getattr(pipeline, component) for component in COMPONENTS}
    weights, configs = read_adapter(file, modules)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Already found a `peft_config`")  # several adapters side by side are meant
        for component in weights:
            _load_into(pipeline, component, name, weights[component], configs[component])
            _check_loaded(file, modules[component], name, weights[component])


def _load_into(pipeline, component, name, weights, config):
    if component == "unet":
        pipeline.unet.load_lora_adapter(weights, prefix=None, adapter_name=name, metadata=config, low_cpu_mem_usage=True)
    else:
        prefixed = {f"{component}.{key}": tensor for key, tensor in weights.items()}
        encoder, config = getattr(pipeline, component), {f"{component}.{key}": value for key, value in config.items()}
        pipeline.load_lora_into_text_encoder(
            prefixed, None, encoder, prefix=component, adapter_name=name, metadata=config, low_cpu_mem_usage=True
        )


def _check_loaded(file, module, name, weights):
    """diffusers, transformers and PEFT only warn about what they leave out, and draw it at random (DoRA magnitudes of text encoders)."""
    from peft import get_peft_model_state_dict

    # PEFT's default for embedding layers would ask the hub about the base model that the adapter names
    loaded = get_peft_model_state_dict(module, adapter_name=name, save_embedding_layers=False)
    used = {key for key, tensor in loaded.items() if key in weights and torch.equal(tensor.cpu(), weights[key].to(tensor.dtype))}
    if left_out := sorted((weights.keys() | loaded.keys()) - used):
        raise UserError(f"--lora {file}: {len(left_out)} of {len(weights)} keys were not used by the loader, e.g. {left_out[0]}")
'''

# ===================================================================================== common/adapter_reading.py

MODULES['common.adapter_reading'] = r'''
"""Adapter files of every format -> weights under PEFT's names: `find_adapter` says what a path means, `read_adapter` reads it.

What would fit in part or change nothing is refused: diffusers and PEFT do both with a warning.
"""

import json
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file

from common import formats
from common.command_line import UserError

KOHYA_KINDS = {"lora_down.weight": "lora_A.weight", "lora_up.weight": "lora_B.weight", "dora_scale": "lora_magnitude_vector"}


def find_adapter(place):
    """What `--lora place` means -> Path of a readable .safetensors file.

    `place` is such a file, a folder that a training run or diffusers wrote (its final weights, not those of a step), or a PEFT folder.
    Raises:
        UserError: nothing there, a pickle, a damaged file.
    """
    path = Path(place)
    file = _weights_in(path) if path.is_dir() else path
    if not file.exists():
        raise UserError(f"--lora {path}: no such file or folder")
    if file.suffix != ".safetensors":
        raise UserError(f"--lora {file}: only .safetensors files are read; pickles (.bin, .pt, .ckpt) can run code")
    try:
        with safe_open(file, "pt") as tensors:
            empty = not tensors.keys()
    except SafetensorError as error:
        raise UserError(f"--lora {file}: damaged or not a safetensors file ({error}); download or copy it again") from None
    if empty:
        raise UserError(f"--lora {file}: has no tensors in it")
    return file


def _weights_in(folder):
    for name in (formats.WEIGHTS, formats.PEFT_WEIGHTS):
        if (folder / name).exists():
            return folder / name
    if pickles := sorted(folder.glob("*.bin")):
        return pickles[0]
    steps = sorted(folder.glob("*.safetensors"))
    hint = f"; name one of its files, e.g. {steps[-1].name}" if steps else ""
    raise UserError(f"--lora {folder}: neither {formats.WEIGHTS} nor {formats.PEFT_WEIGHTS} in it{hint}")


def read_adapter(file, modules):
    """Read an adapter file, of whatever format, for a model's `modules` {component: module}.

    alpha comes from the file's metadata or its .alpha tensors, else it is the rank.
    Returns:
        ({component: {PEFT key: tensor}}, {component: LoraConfig arguments}).
    Raises:
        UserError: keys or shapes that fit nothing in this model, weights that are not finite or change nothing.
    """
    with safe_open(file, "pt") as opened:
        tensors, metadata = {key: opened.get_tensor(key) for key in opened.keys()}, opened.metadata() or {}  # noqa: SIM118 (not a dict)
    read = _reader_for(tensors)
    weights, configs = read(file, tensors, metadata, modules)
    _check_values(file, weights)
    for component, part in weights.items():
        if misfits := _misfits(modules[component], part):
            raise _misfit(file, misfits, len(part))
    return weights, configs


def _reader_for(tensors):
    if all(key.startswith("lora_") for key in tensors):
        return _read_kohya
    if all(key.startswith(formats.PEFT_PREFIX) for key in tensors):
        return _read_peft
    return _read_diffusers


def _read_diffusers(file, tensors, metadata, modules):
    """Keys COMPONENT.LAYER.lora.down.weight and their older spellings. Returns as read_adapter."""
    from diffusers.utils import convert_state_dict_to_diffusers, convert_state_dict_to_peft, convert_unet_state_dict_to_peft

    config = json.loads(metadata.get(formats.ADAPTER_METADATA, "{}"))
    weights, configs = {}, {}
    parts = {
        component: {k.partition(".")[2]: v for k, v in tensors.items() if k.startswith(f"{component}.")} for component in formats.COMPONENTS
    }
    if sum(map(len, parts.values())) < len(tensors):
        raise _misfit(file, [key for key in tensors if key.partition(".")[0] not in formats.COMPONENTS], len(tensors))
    for component, part in parts.items():
        if not part:
            continue
        if component == "unet":
            part = convert_unet_state_dict_to_peft(part)
        else:
            part = _named_as_in(modules[component], convert_state_dict_to_peft(convert_state_dict_to_diffusers(part)))
        weights[component] = part
        described = {key.removeprefix(f"{component}."): value for key, value in config.items() if key.startswith(f"{component}.")}
        configs[component] = described or _describe(part, {})
    return weights, configs


def _named_as_in(encoder, weights):
    """The opposite of formats.portable, where `encoder` is one without the prefix."""
    flat = all(not name.startswith("text_model.") for name, _ in encoder.named_modules())
    return {name.removeprefix("text_model.") if flat else name: tensor for name, tensor in weights.items()}


def _read_kohya(file, tensors, metadata, modules):
    """Keys PREFIX_LAYER_WITH_UNDERSCORES.KIND; the layer's name is looked up among those the model has. Returns as read_adapter."""
    layers_per_block = modules["unet"].config.layers_per_block
    known = {}
    for component, module in modules.items():
        for layer, _ in module.named_modules():
            known[formats.KOHYA_PREFIXES[component] + layer.replace(".", "_")] = component, layer
            known[formats.kohya_key(component, layer, layers_per_block)] = component, layer
    weights, alphas, unknown = {}, {}, []
    for key, tensor in tensors.items():
        prefix, _, kind = key.partition(".")
        component, layer = known.get(prefix, (None, None))
        if component is None or kind not in (*KOHYA_KINDS, "alpha"):
            unknown.append(key)
        elif kind == "alpha":
            alphas.setdefault(component, {})[layer] = tensor.item()
        else:
            weights.setdefault(component, {})[f"{layer}.{KOHYA_KINDS[kind]}"] = tensor
    if unknown:
        raise _misfit(file, unknown, len(tensors))
    for component, part in weights.items():
        for key in [key for key in part if key.endswith("lora_magnitude_vector")]:
            layer = key.removesuffix(".lora_magnitude_vector")
            part[key] = _magnitude(file, modules[component].get_submodule(layer).weight, part, layer, alphas[component], metadata)
    return weights, {component: _describe(part, alphas.get(component, {})) for component, part in weights.items()}


def _magnitude(file, weight, weights, layer, alphas, metadata):
    """A kohya file's dora_scale -> PEFT's magnitude, [out] or [1, out, 1, 1]. In our files it goes with ||W||, in LyCORIS's with ||W + s B A||."""
    dora_scale, down, up = (weights[f"{layer}.{kind}"].float() for kind in ("lora_magnitude_vector", "lora_A.weight", "lora_B.weight"))
    if len(dora_scale) != len(up):
        raise UserError(f"--lora {file}: its dora_scale runs over input columns, e.g. in {layer}; PEFT's DoRA knows output rows only")
    magnitude = dora_scale.flatten()
    if metadata.get(formats.DORA_NORM) == "base":
        base, merged = formats.row_norms(weight.cpu(), alphas[layer] / len(down) * (up.flatten(1) @ down.flatten(1)).view(weight.shape))
        magnitude = magnitude * merged / base
    return magnitude if weight.dim() == 2 else magnitude.view(1, -1, 1, 1)


def _read_peft(file, tensors, metadata, modules):
    """A PEFT folder of the UNet or of one text encoder; what save_peft wrote has folders of the text encoders in it. Returns as read_adapter."""
    nested = [file.parent / component for component in formats.COMPONENTS[1:]]
    files = [find_adapter(folder) for folder in nested if (folder / formats.PEFT_CONFIG).exists()]
    weights, configs = {}, {}
    for part, content in [(file, tensors), *((file, load_file(file)) for file in files)]:
        config = _peft_config(part)
        component, named = _peft_component(modules, {key.removeprefix(formats.PEFT_PREFIX): tensor for key, tensor in content.items()})
        weights[component], configs[component] = named, config
    return weights, configs


def _peft_config(file):
    """LoraConfig arguments beside a PEFT file."""
    from peft import LoraConfig

    if not (file.parent / formats.PEFT_CONFIG).exists():
        raise UserError(f"--lora {file}: a PEFT file needs its {formats.PEFT_CONFIG} beside it")
    kind = json.loads((file.parent / formats.PEFT_CONFIG).read_text()).get("peft_type")
    if kind != "LORA":
        raise UserError(f"--lora {file.parent}: holds a PEFT adapter of type {kind}; only LoRA and DoRA are supported")
    return LoraConfig.from_pretrained(file.parent).to_dict()


def _peft_component(modules, weights):
    """(component, weights under its names) of the first component that has all the layers; the UNet when none has."""
    named = {component: weights if component == "unet" else _named_as_in(modules[component], weights) for component in formats.COMPONENTS}
    return next((pair for pair in named.items() if not _misfits(modules[pair[0]], pair[1])), ("unet", weights))


def _describe(weights, alphas):
    """LoraConfig arguments for {PEFT key: tensor} of one component; a layer that `alphas` does not name has alpha = rank."""
    ranks = {key.removesuffix(".lora_A.weight"): len(tensor) for key, tensor in weights.items() if key.endswith(".lora_A.weight")}
    alphas = {layer: alphas.get(layer, rank) for layer, rank in ranks.items()}
    r, lora_alpha = next(iter(ranks.values()), 1), next(iter(alphas.values()), 1)
    return dict(
        r=r,
        lora_alpha=lora_alpha,
        rank_pattern={f"^{layer}": rank for layer, rank in ranks.items() if rank != r},
        alpha_pattern={f"^{layer}": alpha for layer, alpha in alphas.items() if alpha != lora_alpha},
        target_modules=list(ranks),
        use_dora=any(key.endswith("lora_magnitude_vector") for key in weights),
    )


# ---------------------------------------------------------------- checks


def _misfit(file, keys, total):
    return UserError(
        f"--lora {file}: {len(keys)} of {total} keys fit nothing in this SDXL, e.g. {keys[0]}; an adapter of another kind or model?"
    )


def _check_values(file, weights):
    tensors = {key: tensor for part in weights.values() for key, tensor in part.items()}
    if bad := [key for key, tensor in tensors.items() if not tensor.isfinite().all()]:
        raise UserError(f"--lora {file}: {len(bad)} tensors hold NaN or infinity, e.g. {bad[0]}; the training that wrote it diverged")
    if not any(tensor.any() for key, tensor in tensors.items() if not key.endswith("lora_A.weight")):
        raise UserError(f"--lora {file}: would change nothing, every lora_B is zero, e.g. {next(iter(tensors))}; was it trained?")


def _misfits(module, weights):
    """Keys whose layer `module` does not have, whose shape is wrong for it, or that lack their other half."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    layers = (torch.nn.Linear, torch.nn.Conv2d, BaseTunerLayer)
    shapes = {name: layer.weight.shape for name, layer in module.named_modules() if isinstance(layer, layers)}
    return [key for key in weights if not _fits(shapes, weights, *key.rpartition(".lora_")[::2])]


def _fits(shapes, weights, layer, kind):
    down, up, shape = weights.get(f"{layer}.lora_A.weight"), weights.get(f"{layer}.lora_B.weight"), shapes.get(layer)
    if down is None or up is None or shape is None or kind not in ("A.weight", "B.weight", "magnitude_vector"):
        return False
    return down.shape[1:] == shape[1:] and up.shape[:2] == (shape[0], down.shape[0])
'''

# ============================================================================================ common/adapters.py

MODULES['common.adapters'] = r'''
"""Which layers get an adapter, and where its numbers live: one flat fp32 buffer, of which PEFT's parameters are views."""

import contextlib

import torch

from common.command_line import UserError
from common.graphs import side_by_side

TEXT_PROJECTIONS = ["q_proj", "k_proj", "v_proj", "out_proj"]


def add_lora(unet, targets, rank, alpha, dropout=0.0, use_dora=False):
    """Give every UNet layer whose name ends in one of `targets` a PEFT adapter, with fp32 weights on whatever base.

    A is initialised from torch's global CPU generator (seed it first), B with zeros. PEFT owns names and config.
    Raises:
        UserError: a target that matches no layer, or one that cannot be adapted.
    """
    from diffusers.training_utils import cast_training_params
    from peft import LoraConfig
    from peft.tuners.tuners_utils import BaseTunerLayer

    for target in targets:
        found = [module for name, module in unet.named_modules() if name == target or name.endswith(f".{target}")]
        if not found:
            raise UserError(f"--lora_target_modules {target}: no layer of this UNet has a name that ends so")
        if other := [module for module in found if not isinstance(module, (torch.nn.Linear, torch.nn.Conv2d, BaseTunerLayer))]:
            kind = type(other[0]).__name__
            raise UserError(f"--lora_target_modules {target}: only linear layers and convolutions can have an adapter, this is a {kind}")
    unet.add_adapter(LoraConfig(r=rank, lora_alpha=alpha, lora_dropout=dropout, target_modules=list(targets), use_dora=use_dora))
    cast_training_params(unet, torch.float32)  # on an fp16 base PEFT makes fp16 weights, which turn NaN after one step


def add_text_lora(encoders, rank, alpha, dropout=0.0):
    """The same for the attention projections of the text encoders; plain LoRA, as diffusers cannot reload DoRA there."""
    from diffusers.training_utils import cast_training_params
    from peft import LoraConfig

    for encoder in encoders:
        encoder.add_adapter(LoraConfig(r=rank, lora_alpha=alpha, lora_dropout=dropout, target_modules=TEXT_PROJECTIONS))
        cast_training_params(encoder, torch.float32)
        encoder.train()


def trainable(module):
    """[(name, parameter)] of what will be trained."""
    return [(name, parameter) for name, parameter in module.named_parameters() if parameter.requires_grad]


def count(module):
    """All parameters of a module, adapters included; 4-bit weights count as the numbers they hold, two to a byte."""
    return sum(p.numel() * (2 if p.dtype == torch.uint8 else 1) for p in module.parameters())


@contextlib.contextmanager
def without_dropout(modules):
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

    Norm, clipping, zeroing, all-reduce, EMA and checkpointing are then one operation each, and an optimizer has one
    parameter per group instead of 1,120.

    Args:
        groups: [(named parameters, options)]; options are those of a torch optimizer's parameter group (lr, weight_decay).
        dtype: in which the forward pass computes; a copy of the buffer in it is renewed by `publish`.
    """

    def __init__(self, groups, dtype=torch.float32):
        named = [pair for pairs, _ in groups for pair in pairs]
        self.layout = [(name, tuple(parameter.shape)) for name, parameter in named]
        self.data = torch.cat([parameter.detach().float().flatten() for _, parameter in named])
        self.grad = torch.zeros_like(self.data)
        self._compute = self.data if dtype == torch.float32 else self.data.to(dtype)
        self._parts, start = {}, 0
        for _, parameter in named:
            part = self._parts[parameter] = slice(start, start := start + parameter.numel())
            parameter.data = self.data[part].view_as(parameter)
            parameter.grad = self.grad[part].view_as(parameter)
        self.groups, start = [], 0
        for pairs, options in groups:
            part = slice(start, start := start + sum(parameter.numel() for _, parameter in pairs))
            flat = torch.nn.Parameter(self.data[part])
            flat.grad = self.grad[part]
            self.groups.append({"params": [flat], **options})

        self.followers = []  # what else is derived from the parameters: functions that `publish` calls

    def __len__(self):
        return self.data.numel()

    def compute_copy(self, parameter):
        """The view of a parameter in the compute dtype; it follows the parameter at every `publish`."""
        return self._compute[self._parts[parameter]].view_as(parameter)

    @torch.no_grad()
    def publish(self):
        """After the numbers changed: renew everything that is derived from them."""
        if self._compute is not self.data:
            self._compute.copy_(self.data)
        side_by_side(self.followers, self.data.device)


def make_optimizer(flat, use_8bit, lr, betas, weight_decay, eps):
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

    def __init__(self, flat, decay):
        self.flat, self.decay, self.average = flat, decay, flat.data.clone()

    def update(self, step):
        """Once per optimizer step; `step` counts from 1."""
        self.average.lerp_(self.flat.data, 1 - min(self.decay, (1 + step) / (10 + step)))

    @contextlib.contextmanager
    def applied(self):
        """Inside, the adapter computes with the average; the trained values come back afterwards, bit for bit."""
        trained = self.flat.data.clone()
        self.flat.data.copy_(self.average)
        self.flat.publish()
        try:
            yield
        finally:
            self.flat.data.copy_(trained)
            self.flat.publish()
'''

# ============================================================================================ common/assembly.py

MODULES['common.assembly'] = r'''
"""A training run put together from its flags, for all trainers: data, engine, loop, results.

What a trainer's own technique is (which layers get which adapter, on which weights) stays in the trainer.
"""

import contextlib
import functools
import math
import tempfile
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path

import torch

from common import (
    adapters,
    batching,
    caching,
    checkpoint,
    dataset,
    device,
    files,
    fit,
    formats,
    fused,
    fused_unet,
    loading,
    loops,
    report,
    sampling,
)
from common.command_line import DEMO_ROOT, UserError
from common.engine import Engine, lr_schedule
from demo.build import demo_assets


@dataclass(frozen=True)
class Data:
    """Everything the loop reads, encoded once."""

    model: loading.Model
    schedule: object  # noise.NoiseSchedule
    text: object  # caching.CachedText or caching.LiveText
    examples: batching.Examples
    held_out: batching.Examples | None


def load_data(flags, host):
    """Image-caption pairs and a model -> Data: Samples, their latent moments and text embeddings, training and held out."""
    if flags.demo:
        demo_assets(DEMO_ROOT)
    samples, bad = dataset.load_samples(
        flags.dataset_name, flags.train_data_dir, flags.image_column, flags.caption_column, flags.max_train_samples, flags.max_bad_images
    )
    empty = sum(not sample.caption for sample in samples)
    host.say(f"data: {len(samples)} images, {bad} unreadable, {empty} with an empty caption (trained as the empty prompt)")
    model = loading.find_model(
        flags.pretrained_model_name_or_path,
        flags.pretrained_vae_model_name_or_path,
        flags.variant,
        flags.revision,
        flags.config_name_or_path,
        flags.cache_dir,
    )
    framing = dict(resolution=flags.resolution, center_crop=flags.center_crop, aspect_ratio_buckets=flags.aspect_ratio_buckets)
    flips = (False, True) if flags.random_flip else (False,)
    latents = caching.cache_latents(samples, model, host, flags.cache_dir, flags.max_bad_images, flips, bad, **framing)
    captions = [sample.caption for sample in samples] + ["", *flags.validation_prompt]
    text_cache = "none" if flags.train_text_encoder else flags.text_cache
    text = caching.cache_text(captions, model, host, text_cache, flags.cache_dir)
    schedule = loading.load_noise_schedule(model, host.device)
    training, held_out = dataset.hold_out(latents.samples, flags.validation_split)
    draws = dict(
        flip_share=0.5 if flags.random_flip else 0.0,
        drop_share=flags.caption_dropout,
        offset_strength=flags.offset_noise_strength,
        zero_unconditional=loading.zero_unconditional(model),
    )
    make = functools.partial(batching.Examples, text=text, seed=flags.seed, num_timesteps=len(schedule.alphas_cumprod), **draws)
    return Data(model, schedule, text, make(latents.subset(training)), make(latents.subset(held_out)) if held_out else None)


def build_engine(flags, host, unet, data):
    """The UNet with its adapter -> Engine: flat buffer, forward pass, optimizer, learning-rate schedule, EMA."""
    fused_layers = flags.lora_backend == "fused"
    if flags.enable_xformers_memory_efficient_attention:
        unet.enable_xformers_memory_efficient_attention()
    checkpointing = None
    if flags.gradient_checkpointing:
        # the fused layers' dropout is a function of a seed, so there is no generator to rewind before the second forward pass
        checkpointing = fit.BlockCheckpointing(preserve_rng_state=not fused_layers)
        unet.enable_gradient_checkpointing(checkpointing)
    encoders = _trained_encoders(flags, data)
    if encoders:
        adapters.add_text_lora(encoders, flags.lora_rank, flags.lora_alpha, flags.lora_dropout)
    groups = [(adapters.trainable(unet), {})]
    groups += [([pair for encoder in encoders for pair in adapters.trainable(encoder)], {"lr": flags.text_encoder_lr})] if encoders else []
    flat = adapters.FlatParameters(groups, host.dtype if fused_layers else torch.float32)
    dropout_seed = torch.zeros((), dtype=torch.int64, device=host.device)
    if fused_layers:
        fused.fuse([unet, *encoders], flat, dropout_seed)
        fused_unet.fuse_unet(unet, host.device)
    everything = sum(adapters.count(module) for module in (unet, *encoders))
    host.say(f"adapter: {len(flat):,} trainable parameters, {100 * len(flat) / everything:.2f} % of {everything:,}")
    betas = (flags.adam_beta1, flags.adam_beta2)
    return Engine(
        unet,
        data.text,
        data.schedule,
        flat,
        adapters.make_optimizer(flat, flags.use_8bit_adam, flags.learning_rate, betas, flags.adam_weight_decay, flags.adam_epsilon),
        lr_schedule(flags.lr_scheduler, flags.lr_warmup_steps, _plan(flags, host, data).total_steps, flags.learning_rate),
        host,
        flags.max_grad_norm,
        flags.min_snr_gamma,
        adapters.EMA(flat, flags.ema_decay) if flags.use_ema else None,
        flags.seed,
        dropout_seed,
        flags.cuda_graph,
        checkpointing,
    )


def train(flags, engine, data):
    """Run the loop, from a checkpoint if asked to, and write the results -> {"output_dir", "step", "ended", "weights", "metrics"}."""
    host, output_dir, plan = engine.host, Path(flags.output_dir), _plan(flags, engine.host, data)
    recipe = _recipe(flags, data)
    progress = _resume(flags, engine, recipe, plan)
    if host.is_main:
        output_dir.mkdir(parents=True, exist_ok=True)
        files.write_json(output_dir / "config.json", recipe)
    passes = _fit(flags, engine, data, plan)
    host.say(
        f"training: {plan.total_steps} steps of {plan.effective_batch} images, {passes.micro_batch} at a time, from step {progress.step}"
    )
    log = report.Report(output_dir, plan.total_steps, progress.step, flags.report_to, asdict(flags), host.is_main)
    draw = functools.partial(_draw_samples, flags, engine, data)
    save_adapter = functools.partial(formats.save_adapter, unet=engine.unet, recipe=recipe, text_encoders=_trained_encoders(flags, data))
    save = lambda step: save_adapter(output_dir / f"pytorch_lora_weights_{step:06d}.safetensors")  # noqa: E731
    try:
        try:
            progress, ended = loops.train(engine, data.examples, data.held_out, plan, passes, log, progress, draw, save)
        finally:
            log.close()
        engine.run_pass.clear()
        if host.is_main:
            _write_results(output_dir, engine.ema, save_adapter)
            name = f"{output_dir.resolve().name}.safetensors"
            formats.save_kohya(output_dir / "kohya" / name, engine.unet, recipe, _trained_encoders(flags, data))
            if flags.save_peft:
                formats.save_peft(output_dir / "peft", engine.unet, recipe, _trained_encoders(flags, data))
            report.plot_training(output_dir)
    except OSError as error:
        raise _rescued(engine, output_dir, progress, save_adapter, error) from None
    host.barrier()
    memory = f"peak {device.peak_gib(host.device):.2f} GiB on the {host.device.type}, {device.peak_ram_gib():.2f} GiB of RAM"
    host.say(f"{ended} after step {progress.step} of {plan.total_steps}; {memory}; everything is in {output_dir}")
    rows = report.read_metrics(output_dir / "metrics.jsonl")
    return {
        "output_dir": str(output_dir),
        "step": progress.step,
        "ended": ended,
        "weights": str(output_dir / formats.WEIGHTS),
        "metrics": rows[-1] if rows else None,  # the last line of metrics.jsonl
    }


def _rescued(engine, output_dir, progress, save_adapter, error):
    """A file cannot be read or written (a Drive that was unmounted, say): save to the local disk -> the UserError that says where."""
    place = Path(tempfile.mkdtemp(prefix=f"{output_dir.resolve().name}-"))
    save_adapter(place / formats.WEIGHTS)
    checkpoint.save_checkpoint(place, progress.step, engine, asdict(progress), None)
    what = " ".join(str(error).split())  # diffusers' errors have several lines
    return UserError(
        f"the run ended on a file error ({what}): perhaps --output_dir {output_dir} is full or gone, or a file of the model is; adapter and"
        f" checkpoint of step {progress.step} are in {place}: go on with --output_dir elsewhere"
        f" --resume_from_checkpoint {checkpoint.find_checkpoints(place)[-1]}"
    )


def _trained_encoders(flags, data):
    return data.text.encoders if flags.train_text_encoder else ()


# Flags on which the memory and the time of a pass depend, beside the shape of its images and the number of trainable parameters.
_CHANGES_A_PASS = (
    "pretrained_model_name_or_path mixed_precision aspect_ratio_buckets text_cache quantize lora_rank lora_target_modules lora_backend"
    " lora_dropout gradient_checkpointing cuda_graph train_text_encoder use_8bit_adam use_ema enable_xformers_memory_efficient_attention"
).split()


def _fit(flags, engine, data, plan):
    """On a GPU the measured Fit, unless --no_auto_fit; else the documented micro-batch."""
    host = engine.host
    if host.device.type != "cuda" or not flags.auto_fit:
        return fit.Fit(flags.train_batch_size, engine.checkpointing)
    there_gib = (torch.cuda.mem_get_info()[0] + torch.cuda.memory_reserved()) / device.GIB
    budget_gib = min(flags.max_vram_gb or there_gib, there_gib)
    torch.cuda.set_per_process_memory_fraction(budget_gib * device.GIB / torch.cuda.get_device_properties(host.device).total_memory)

    def make_batches(micro_batch):
        return data.examples.effective_batch(0, plan.effective_batch, micro_batch, host.rank, host.world)

    share = plan.effective_batch // host.world
    budget_gib = int(8 * budget_gib) / 8  # what is free differs by some MiB from run to run; the plan need not
    shape = make_batches(1)[0].tensors["mean"].shape
    gpu = torch.cuda.get_device_name(), torch.backends.cuda.flash_sdp_enabled(), budget_gib, host.rank
    remembered = Path(flags.cache_dir) / "plans" / f"{_plan_key(flags, gpu, share, shape, len(engine.flat))}.json"
    chosen, line = fit.measured(engine, make_batches, share, engine.checkpointing, budget_gib, remembered)
    host.say(line)
    return chosen


def _plan_key(flags, *measured_with):
    """What a remembered Fit belongs to."""
    versions = fit.VERSION, version("torch"), version("diffusers")
    return caching.content_key("plan", *versions, *measured_with, [getattr(flags, name) for name in _CHANGES_A_PASS])


def _plan(flags, host, data):
    effective_batch = flags.train_batch_size * flags.gradient_accumulation_steps * host.world
    return loops.Plan(
        Path(flags.output_dir),
        loops.total_steps(flags.max_train_steps, flags.num_train_epochs, len(data.examples.latents), effective_batch),
        effective_batch,
        flags.checkpointing_steps,
        flags.checkpoints_total_limit,
        flags.validation_steps,
        flags.early_stopping_patience,
        host.started_s + 60 * (flags.max_train_minutes or math.inf),
    )


def _recipe(flags, data):
    """What config.json and every adapter file say about how they were made."""
    packages = ("torch", "diffusers", "transformers", "peft", "accelerate")
    latents = data.examples.latents
    return {
        "flags": asdict(flags),
        "base_model": data.model.name,
        "revision": flags.revision,
        "license_note": "a derivative of base_model, under its licence (SDXL base 1.0: CreativeML Open RAIL++-M); the images have theirs",
        "vae": str(data.model.vae),
        "data": {"images": len(latents), "fingerprint": caching.content_key([(s.key, s.caption) for s in latents.samples])},
        "versions": {package: version(package) for package in packages},
    }


# Flags that may differ between a run and its continuation without a word: they do not change what is computed.
_FREE_TO_CHANGE = {
    "resume_from_checkpoint",
    "max_train_minutes",
    "output_dir",
    "save_peft",
    "cache_dir",
    "report_to",
    "train_batch_size",
    "gradient_accumulation_steps",
}


def _resume(flags, engine, recipe, plan):
    """The Progress to start from; what differs from the run's beginning is said, what cannot go on is refused.

    Raises:
        UserError: a damaged or foreign checkpoint, another effective batch, newer checkpoints beside it.
    """
    host, folder = engine.host, checkpoint.find_resume(flags.resume_from_checkpoint, flags.output_dir)
    if folder is None:
        if flags.resume_from_checkpoint:
            host.say(f"no checkpoint in {flags.output_dir} yet: starting at the beginning")
        return loops.Progress(effective_batch=plan.effective_batch)
    newest = max([*checkpoint.find_checkpoints(flags.output_dir), folder], key=checkpoint.step_of)
    if checkpoint.step_of(newest) > checkpoint.step_of(folder):
        raise UserError(
            f"--resume_from_checkpoint {folder}: {newest} is newer and would be mixed up with what follows;"
            " resume with 'latest', move the newer ones away, or name another --output_dir"
        )
    progress = loops.Progress(**checkpoint.load_checkpoint(folder, engine))
    if progress.effective_batch != plan.effective_batch:
        raise UserError(
            f"--resume_from_checkpoint: the run has {progress.effective_batch} images a step, now there are {plan.effective_batch}"
            " (batch size x accumulation x processes); resume with the same product"
        )
    before = checkpoint.read_config(folder.parent)
    for name, value in recipe["flags"].items():
        if before["flags"].get(name, value) != value and name not in _FREE_TO_CHANGE:
            host.say(f"resuming with --{name} {value}, which was {before['flags'][name]}")
    if before["data"] not in ({}, recipe["data"]):
        was, now = before["data"]["images"], recipe["data"]["images"]
        host.say(f"resuming with other data: {now} images now, {was} before, or edited ones; the run is no longer that of its first data")
    host.say(f"resumed from {folder}")
    return progress


def _draw_samples(flags, engine, data, step):
    """samples/STEP_I.png for every --validation_prompt, with the average where there is one."""
    if not flags.validation_prompt or not engine.host.is_main:
        return
    engine.run_pass.clear()  # its memory is needed for the pictures; the next steps capture it again
    with engine.ema.applied() if engine.ema else contextlib.nullcontext():
        images = sampling.draw_while_training(
            engine.unet, data.text, data.model, engine.host, flags.validation_prompt, flags.resolution, flags.seed
        )
    folder = Path(flags.output_dir) / "samples"
    folder.mkdir(exist_ok=True)
    for i, image in enumerate(images):
        image.save(folder / f"{step:06d}_{i}.png")


def _write_results(output_dir, ema, save_adapter):
    save_adapter(output_dir / formats.WEIGHTS)
    if ema is not None:
        with ema.applied():
            save_adapter(output_dir / "ema_unet" / formats.WEIGHTS)
'''

# ============================================================================================ common/batching.py

MODULES['common.batching'] = r'''
"""Which sample comes when, with which noise: cached entries + (seed, step, index) -> Batch.

The trajectory is a function of the seed alone. It does not depend on how an effective batch is cut into forward passes,
on the number of processes, or on where a run was interrupted.
"""

from dataclasses import dataclass
from functools import lru_cache

import torch

from common import dataset, noise

VALIDATION_DRAWS = 4  # timesteps per held-out sample, spread evenly over the schedule


@dataclass(frozen=True)
class Batch:
    """Examples of one shape, ready for a forward pass. Every tensor starts with B; latents are [B, C, h, w].

    `tensors`: mean, std, posterior_eps, eps, t, time_ids [B, 6], weight [B] (each example's share of the step's loss),
    keep_text [B] (0 where the caption is dropped), and what the text conditioning needs.
    """

    tensors: dict
    names: list

    def __len__(self):
        return len(self.names)


@lru_cache(maxsize=2)
def _epoch_order(seed, epoch, count):
    return torch.randperm(count, generator=noise.generator_for(seed, "epoch", epoch)).tolist()


def sample_at(position, count, seed):
    """Index of the sample at `position` of an endless sequence of epochs, each a fresh permutation."""
    epoch, offset = divmod(position, count)
    return _epoch_order(seed, epoch, count)[offset]


class Examples:
    """Training examples by number.

    Args:
        latents: caching.LatentCache.
        text: caching.CachedText or caching.LiveText.
        num_timesteps: length T of the noise schedule.
        zero_unconditional: the model's unconditional input is zeros (SDXL base), not the encoded empty prompt.
    """

    def __init__(self, latents, text, seed, num_timesteps, flip_share=0.0, drop_share=0.0, offset_strength=0.0, zero_unconditional=True):
        self.latents, self.text, self.seed, self.num_timesteps = latents, text, seed, num_timesteps
        self.draw_options = dict(flip_share=flip_share, drop_share=drop_share, offset_strength=offset_strength)
        self.zero_unconditional = zero_unconditional

    def effective_batch(self, number, size, micro_size, rank=0, world=1):
        """This process's share of effective batch `number`, as Batches of at most `micro_size` examples of one shape."""
        rows = [self._training_row(number, i, size) for i in range(rank, size, world)]
        return _group(rows, micro_size)

    def validation_batches(self, micro_size, rank=0, world=1):
        """Every sample at VALIDATION_DRAWS fixed timesteps with fixed noise, caption kept, not flipped."""
        rows = [self._validation_row(number) for number in range(rank, len(self.latents) * VALIDATION_DRAWS, world)]
        return _group(rows, micro_size)

    def name_at(self, position):
        """Name of the sample at `position` of the run, for messages."""
        return self.latents.samples[sample_at(position, len(self.latents), self.seed)].name

    def _training_row(self, number, i, size):
        index = sample_at(number * size + i, len(self.latents), self.seed)
        shape = self.latents.moments(index)[0].shape
        draws = noise.draw(noise.generator_for(self.seed, number, i), shape, self.num_timesteps, **self.draw_options)
        return self._row(index, draws, weight=1 / size)

    def _validation_row(self, number):
        index, part = divmod(number, VALIDATION_DRAWS)
        # not from the run's seed: the losses of runs with several seeds are to be compared
        generator = noise.generator_for("validation", self.latents.samples[index].key, part)
        draws = noise.draw(generator, self.latents.moments(index)[0].shape, self.num_timesteps)
        t = int((part + (index + 0.5) / len(self.latents)) / VALIDATION_DRAWS * self.num_timesteps)
        return self._row(index, noise.Draws(False, False, t, draws.posterior_eps, draws.eps), weight=1.0)

    def _row(self, index, draws, weight):
        """(name, {field: tensor}) of one example."""
        sample, framing = self.latents.samples[index], self.latents.framings[index]
        mean, std = self.latents.moments(index, draws.flip)
        caption = "" if draws.drop_caption and not self.zero_unconditional else sample.caption
        keep = 0.0 if draws.drop_caption and self.zero_unconditional else 1.0
        return sample.name, dict(
            mean=mean,
            std=std,
            posterior_eps=draws.posterior_eps,
            eps=draws.eps,
            t=torch.tensor(draws.timestep),
            time_ids=dataset.time_ids(sample, framing, draws.flip),
            weight=torch.tensor(weight),
            keep_text=torch.tensor(keep),
            **self.text.fields(caption),
        )


def _group(rows, micro_size):
    """Rows -> Batches of one shape each, in order of first appearance, none larger than `micro_size`; pinned, so that the GPU can fetch them unaided."""
    by_shape, pin = {}, torch.cuda.is_available()
    for name, fields in rows:
        by_shape.setdefault(fields["mean"].shape, []).append((name, fields))
    batches = []
    for group in by_shape.values():
        for start in range(0, len(group), micro_size):
            names, fields = zip(*group[start : start + micro_size])
            tensors = {key: torch.stack([row[key] for row in fields]) for key in fields[0]}
            batches.append(Batch({key: tensor.pin_memory() if pin else tensor for key, tensor in tensors.items()}, list(names)))
    return batches
'''

# ============================================================================================= common/caching.py

MODULES['common.caching'] = r'''
"""Everything frozen is computed once: Samples -> latent moments and text embeddings, keyed by content.

A key is a hash of all that made the entry, so a changed image or caption is a new entry and a stale one cannot be found.
"""

import collections
import concurrent.futures
import contextlib
import hashlib
import os
import uuid
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from tqdm import tqdm

from common import dataset, device, loading
from common.command_line import UserError
from common.files import write_safetensors
from common.hub import FP16_VAE

VERSION = 1  # raise it when the same inputs give other numbers: old entries are then never found
SHARD_ENTRIES = 64
VAE_PIXELS = 1024 * 1024  # encoded at once: one picture of 1024 px, four of 512
TEXT_BATCH = 32
MAX_TOKENS = 77


def content_key(*parts):
    """Hash of the repr of `parts`, as 32 hex digits."""
    return hashlib.blake2b(repr(parts).encode(), digest_size=16).hexdigest()


class Store:
    """key -> tuple of tensors, in memory-mapped safetensors shards in one folder, or in RAM when `folder` is None.

    Shards are written whole under a new name and never changed, so any number of processes may share a folder.
    """

    def __init__(self, folder=None):
        self.folder = folder
        self._pending, self._shards, self._shard_of = {}, {}, {}
        self.reload()

    def reload(self):
        """Find the shards that other processes have written since."""
        for path in sorted(self.folder.glob("*.safetensors")) if self.folder else ():
            if path not in self._shards:
                try:
                    self._shards[path] = safe_open(path, "pt")
                    self._shard_of.update((name.rpartition(".")[0], self._shards[path]) for name in self._shards[path].keys())
                except SafetensorError as error:
                    path.unlink(missing_ok=True)  # another process may have seen it too
                    print(f"cache: {path} is damaged ({error}) and was removed; its entries are encoded again")

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
        write_safetensors(path, {f"{key}.{i}": tensor for key, pair in self._pending.items() for i, tensor in enumerate(pair)})
        self._pending = {}
        self.reload()


# ---------------------------------------------------------------- images


def cache_latents(samples, model, host, cache_dir, max_bad, flips=(False,), bad_before=0, **framing):
    """Encode the pictures that are not in the cache yet -> LatentCache over the samples that could be read.

    Args:
        bad_before: unreadable pictures that were counted already.
        flips: (False,) or (False, True): which mirror images are needed.
        framing: arguments of `dataset.frame`.
    Raises:
        UserError: more than `max_bad` pictures cannot be decoded, or the VAE gives non-finite latents.
    """
    made_by = content_key("latents", VERSION, loading.fingerprint(model.variant, model.vae), str(host.dtype))
    store = Store(Path(cache_dir) / "latents" / made_by)
    framings = [dataset.frame(sample, **framing) for sample in samples]
    wanted = {_latent_key(s, f, flip): (s, f, flip) for s, f in zip(samples, framings) for flip in flips}
    missing = [job for key, job in wanted.items() if key not in store]
    host.barrier()  # every process shares out the same list, before any of them adds to the store
    bad = dict(host.gather(_encode_images(missing[host.rank :: host.world], store, model, host) if missing else []))
    host.barrier()
    store.reload()
    dataset.refuse_bad(list(bad.values()), max_bad, bad_before)
    kept = [(s, f) for s, f in zip(samples, framings) if s.key not in bad]
    if any(_latent_key(s, f, flip) not in store for s, f in kept for flip in flips):
        raise UserError(f"--cache_dir {cache_dir}: entries were removed while they were being made; run the command again")
    host.say(f"latents: {len(wanted)} in the cache, {len(missing)} of them new ({store.folder})")
    if not kept:
        raise UserError("none of the images could be decoded")
    return LatentCache([s for s, _ in kept], [f for _, f in kept], store)


@dataclass(frozen=True)
class LatentCache:
    """The samples of a run with their framing and their latent moments."""

    samples: list
    framings: list
    store: Store

    def __len__(self):
        return len(self.samples)

    def moments(self, index, flip=False):
        """(mean, std), each [C, h, w], normalised: z = mean + std * eps is what the UNet is trained on."""
        return self.store[_latent_key(self.samples[index], self.framings[index], flip)]

    def subset(self, samples):
        """The same cache, restricted to `samples`."""
        wanted = {id(sample) for sample in samples}
        kept = [i for i, sample in enumerate(self.samples) if id(sample) in wanted]
        return replace(self, samples=[self.samples[i] for i in kept], framings=[self.framings[i] for i in kept])


def _latent_key(sample, framing, flip):
    return content_key(sample.key, framing, flip)


def _encode_images(jobs, store, model, host):
    """Fill `store` with the moments of the jobs -> [(sample key, what is wrong)] of the pictures that cannot be decoded."""
    vae, bad = loading.load_vae(model, host), []
    bar = tqdm(total=len(jobs), desc="encoding images", unit="img", disable=not host.is_main)
    with bar, contextlib.ExitStack() as at_exit:
        at_exit.callback(store.flush)  # an interrupted encode goes on from here
        batches = collections.defaultdict(list)
        for job, image in _decoded(jobs):
            bar.update()
            if isinstance(image, Exception):
                bad.append((job[0].key, f"{job[0].name} ({image})"))
                continue
            batch = batches[image.shape]
            batch.append((job, image))
            if (len(batch) + 1) * image[0].numel() > VAE_PIXELS:
                _encode_batch(batches.pop(image.shape), store, vae, host)
        for batch in batches.values():
            _encode_batch(batch, store, vae, host)
    del vae
    device.free_memory(host.device)
    return bad


def _decoded(jobs):
    """Yield (job, pixels or the exception), decoding a few pictures ahead on every core."""
    workers = os.cpu_count() or 1

    def decode(job):
        try:
            return dataset.pixels(*job)
        except (OSError, ValueError, SyntaxError) as error:
            return error

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


@torch.no_grad()
def _encode_batch(batch, store, vae, host):
    posterior = vae.encode(torch.stack([image for _, image in batch]).to(host.device, vae.dtype)).latent_dist
    mean, std = _normalise(vae.config, posterior.mean.float(), posterior.std.float())
    mean, std = mean.to("cpu", host.dtype), std.to("cpu", host.dtype)
    for (job, _), m, s in zip(batch, mean, std):
        if not (m.isfinite().all() and s.isfinite().all()):
            raise UserError(
                f"{job[0].name}: the VAE gives non-finite latents in {str(vae.dtype).removeprefix('torch.')};"
                f" use --pretrained_vae_model_name_or_path {FP16_VAE}"
            )
        store[_latent_key(*job)] = (m, s)


def _normalise(config, mean, std):
    """Posterior of the VAE -> posterior of the latents the UNet sees (some fine-tunes ship channel statistics)."""
    if getattr(config, "latents_mean", None) is None:
        return mean * config.scaling_factor, std * config.scaling_factor
    centre = torch.tensor(config.latents_mean, device=mean.device).view(1, -1, 1, 1)
    scale = config.scaling_factor / torch.tensor(config.latents_std, device=mean.device).view(1, -1, 1, 1)
    return (mean - centre) * scale, std * scale


# ---------------------------------------------------------------- captions


def tokenize(tokenizers, captions):
    """Token ids of both tokenizers, padded and cut to 77: [B, 2, 77]."""
    options = dict(padding="max_length", max_length=MAX_TOKENS, truncation=True, return_tensors="pt")
    return torch.stack([tokenizer(captions, **options).input_ids for tokenizer in tokenizers], dim=1)


def encode_text(encoders, input_ids):
    """SDXL's text conditioning: ids [B, 2, 77] -> (prompt_embeds [B, 77, 768 + 1280], pooled [B, 1280]).

    The penultimate hidden states of both encoders side by side; `pooled` is bigG's projected end-of-text (arXiv 2307.01952, sec. 2.1).
    """
    outputs = [encoder(ids, output_hidden_states=True) for encoder, ids in zip(encoders, input_ids.unbind(1))]
    return torch.cat([output.hidden_states[-2] for output in outputs], dim=-1), outputs[1].text_embeds


class CachedText:
    """Captions whose embeddings were computed once. A batch carries the embeddings."""

    encoders = ()  # none stay on the device

    def __init__(self, store):
        self.store = store

    def fields(self, caption):
        """What one example's batch row carries: prompt_embeds [77, 2048] and pooled [1280]."""
        prompt_embeds, pooled = self.store[content_key(caption)]
        return {"prompt_embeds": prompt_embeds, "pooled": pooled}

    def __call__(self, fields):
        """(prompt_embeds [B, 77, 2048], pooled [B, 1280]) on the device."""
        return fields["prompt_embeds"], fields["pooled"]


class LiveText:
    """Captions that are encoded in every step, by encoders that stay on the device. A batch carries token ids."""

    def __init__(self, pairs):
        self.tokenizers, self.encoders = zip(*pairs)

    def fields(self, caption):
        return {"input_ids": tokenize(self.tokenizers, [caption])[0]}

    def __call__(self, fields):
        return encode_text(self.encoders, fields["input_ids"])


def cache_text(captions, model, host, mode, cache_dir):
    """Text conditioning for `captions`: CachedText in RAM or on disk, or LiveText when `mode` is "none"."""
    if mode == "none":
        return LiveText(loading.load_text_encoders(model, host))
    parts = [model.folder / name for name in ("text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2")]
    made_by = content_key("text", VERSION, loading.fingerprint(model.variant, *parts), str(host.dtype))
    store = Store(Path(cache_dir) / "text" / made_by if mode == "disk" else None)
    missing = [caption for caption in dict.fromkeys(captions) if content_key(caption) not in store]
    host.barrier()  # as for the images
    mine = missing[host.rank :: host.world] if mode == "disk" else missing  # each process has its own RAM
    if missing:
        _encode_captions(mine, store, model, host)
    host.barrier()
    store.reload()
    host.say(
        f"text: {len(dict.fromkeys(captions))} distinct captions, {len(missing)} of them encoded now ({store.folder or 'kept in RAM'})"
    )
    return CachedText(store)


@torch.no_grad()
def _encode_captions(captions, store, model, host):
    pairs = loading.load_text_encoders(model, host)
    tokenizers, encoders = zip(*pairs)
    cut = sum(len(tokenizers[0](caption).input_ids) > MAX_TOKENS for caption in captions)
    if cut:
        host.say(f"text: {cut} captions are longer than {MAX_TOKENS} tokens; what follows is not seen")
    with contextlib.ExitStack() as at_exit:
        at_exit.callback(store.flush)
        for start in tqdm(range(0, len(captions), TEXT_BATCH), desc="encoding captions", disable=not host.is_main):
            batch = captions[start : start + TEXT_BATCH]
            prompt_embeds, pooled = encode_text(encoders, tokenize(tokenizers, batch).to(host.device))
            for caption, p, q in zip(batch, prompt_embeds.to("cpu", host.dtype), pooled.to("cpu", host.dtype)):
                store[content_key(caption)] = (p, q)
    del pairs, encoders
    device.free_memory(host.device)
'''

# ========================================================================================== common/checkpoint.py

MODULES['common.checkpoint'] = r'''
"""Checkpoints: everything needed to go on exactly where a run was. A folder is complete or absent."""

import json
import math
import re
import shutil
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from common.command_line import UserError
from common.files import write_json, write_safetensors

KAGGLE_INPUT = Path("/kaggle/input")


def save_checkpoint(output_dir, step, engine, progress, limit):
    """Write checkpoint-STEP/: flat parameters, average, optimizer state and `progress`; then drop all but `limit` newest."""
    folder = Path(output_dir) / f"checkpoint-{step:06d}"
    partial = folder.with_name(folder.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    tensors, numbers = {"flat": engine.flat.data}, {}
    if engine.ema is not None:
        tensors["ema"] = engine.ema.average
    for i, group in enumerate(engine.flat.groups):
        for key, value in engine.optimizer.state[group["params"][0]].items():
            (tensors if torch.is_tensor(value) else numbers)[f"optimizer.{i}.{key}"] = value
    write_safetensors(partial / "state.safetensors", tensors)
    scale = {"value": engine.loss_scale.value.item(), "good_steps": engine.loss_scale.good_steps}
    made_with = {"layout": engine.flat.layout, "optimizer_class": type(engine.optimizer).__name__}
    write_json(partial / "state.json", {**made_with, "optimizer": numbers, "loss_scale": scale, "progress": progress})
    shutil.rmtree(folder, ignore_errors=True)
    partial.rename(folder)
    for old in find_checkpoints(output_dir)[:-limit] if limit else ():
        shutil.rmtree(old)


def find_checkpoints(output_dir):
    """Complete checkpoint folders, oldest first."""
    return sorted(path for path in Path(output_dir).glob("checkpoint-*") if re.fullmatch(r"checkpoint-\d+", path.name))


def find_resume(resume_from_checkpoint, output_dir):
    """The folder that `--resume_from_checkpoint` means, or None when there is nothing to resume.

    'latest' is the newest of this output folder; on Kaggle, where each version of a notebook starts with an empty one, else the newest of
    a folder of the same name below /kaggle/input, where the output of an earlier version was attached.
    """
    if resume_from_checkpoint != "latest":
        return Path(resume_from_checkpoint) if resume_from_checkpoint else None
    found = find_checkpoints(output_dir) or _checkpoints_of_earlier_versions(Path(output_dir).resolve().name)
    return found[-1] if found else None


def _checkpoints_of_earlier_versions(name):
    """Complete checkpoint folders in folders called `name` below /kaggle/input, by their step."""
    return sorted((folder for place in KAGGLE_INPUT.glob(f"**/{name}") for folder in find_checkpoints(place)), key=step_of)


def step_of(folder):
    """The optimizer step in a checkpoint folder's name; 0 where somebody has given it another one."""
    number = re.fullmatch(r"checkpoint-(\d+)", folder.name)
    return int(number[1]) if number else 0


def read_config(output_dir):
    """The recipe in a run's config.json: {"flags": ..., "data": ...}, empty where it is absent or damaged."""
    try:
        recipe = json.loads((output_dir / "config.json").read_text())
        return {"flags": dict(recipe["flags"]), "data": dict(recipe["data"])}
    except (OSError, ValueError, KeyError, TypeError):
        return {"flags": {}, "data": {}}


def _numbers(layout):
    return f"{sum(math.prod(shape) for _, shape in layout):,} numbers in {len(layout)} weights"


def load_checkpoint(folder, engine):
    """Put the engine where the checkpoint was made; returns its `progress`.

    Raises:
        UserError: a damaged checkpoint, or one of another adapter.
    """
    try:
        state = json.loads((folder / "state.json").read_text())
        layout, optimizer_class = [(name, tuple(shape)) for name, shape in state["layout"]], state["optimizer_class"]
        tensors = load_file(folder / "state.safetensors", device=str(engine.host.device))
    except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
        raise UserError(
            f"--resume_from_checkpoint {folder}: damaged or incomplete ({type(error).__name__}: {error}); remove it, or name an earlier one"
        ) from None
    if layout != engine.flat.layout:
        raise UserError(
            f"--resume_from_checkpoint {folder}: its adapter has {_numbers(layout)}, this one {_numbers(engine.flat.layout)}; resume with the"
            " same script, base model, --lora_rank, --lora_target_modules, --strategy and --train_text_encoder"
        )
    if optimizer_class != type(engine.optimizer).__name__:
        raise UserError(f"--resume_from_checkpoint {folder}: made with {optimizer_class}; resume with the same --use_8bit_adam")
    if ("ema" in tensors) != (engine.ema is not None):
        raise UserError(
            f"--resume_from_checkpoint {folder}: made {'with' if 'ema' in tensors else 'without'} --use_ema; resume the same way"
        )
    engine.flat.data.copy_(tensors.pop("flat"))
    engine.flat.publish()
    if engine.ema is not None:
        engine.ema.average.copy_(tensors.pop("ema"))
    for name, value in {**tensors, **state["optimizer"]}.items():
        _, group, key = name.split(".", 2)
        parameter = engine.flat.groups[int(group)]["params"][0]
        # torch keeps AdamW's step count on the CPU unless the optimizer is fused
        on_cpu = key == "step" and torch.is_tensor(value) and not engine.optimizer.defaults.get("fused")
        engine.optimizer.state[parameter][key] = value.cpu() if on_cpu else value
    engine.loss_scale.value.fill_(state["loss_scale"]["value"])
    engine.loss_scale.good_steps = state["loss_scale"]["good_steps"]
    return state["progress"]
'''

# ======================================================================================== common/command_line.py

MODULES['common.command_line'] = r'''
"""The command line as a dataclass: `flag()` declares one option, `parse()` reads them, `run()` calls a script's main.

Nothing here imports torch: `--help`, a misspelt flag and a wrong value are answered at once.
"""

import argparse
import dataclasses
import difflib
import errno
import json
import os
import re
import sys
from pathlib import Path
from typing import get_args

import argparse_dataclass

CACHE_DIR = os.path.join(os.environ.get("XDG_CACHE_HOME", os.path.expanduser("~/.cache")), "sdxl-style")
DEMO_ROOT = Path(CACHE_DIR) / "demo"


class UserError(Exception):
    """A fault the user can mend: one line that names the flag or the file, what is wrong and what to do."""


def flag(default, help, **metadata):
    """One command-line flag. A list default makes it repeatable: `--x a --x b` and `--x a b` are the same."""
    if isinstance(default, list):
        return dataclasses.field(default_factory=lambda: list(default), metadata={"help": help, "nargs": "+", **metadata})
    return dataclasses.field(default=default, metadata={"help": help, **metadata})


def local_path(text):
    """The type of a flag that names a file or folder (or, for some, a hub id): `~` is the home folder."""
    if not text.strip():
        raise argparse.ArgumentTypeError("is empty; name a file or folder")
    return os.path.expanduser(text)


class Switch(argparse.Action):
    """A bool: `--x` sets it, `--no_x` (or `--no-x`) clears it."""

    def __init__(self, option_strings, dest, **kwargs):
        negated = [f"--no{s}{option[2:]}" for option in option_strings for s in "_-"]
        super().__init__([*option_strings, *negated], dest, nargs=0, **kwargs)

    def __call__(self, parser, namespace, values, option_string=None):
        setattr(namespace, self.dest, option_string in self.option_strings[: len(self.option_strings) // 3])


class Parser(argparse_dataclass.ArgumentParser):
    """argparse-dataclass with both spellings of a name, switches that can be cleared, repeatable lists, defaults in
    the help, and errors raised as UserError."""

    def __init__(self, cls):
        self._shown_defaults = {f.name: _shown(f) for f in dataclasses.fields(cls)}
        self._optional = {f.name for f in dataclasses.fields(cls) if type(None) in get_args(f.type)}
        super().__init__(cls, description=cls.__doc__, allow_abbrev=False)

    def add_argument(self, *names, **kwargs):
        if names[0] == "-h":
            return super().add_argument(*names, **kwargs)
        dest = kwargs.pop("dest", names[0][2:].replace("-", "_"))
        if str(kwargs.get("action")).startswith("store_"):
            kwargs["action"] = Switch
        elif "nargs" in kwargs:
            kwargs["action"] = "extend"
        if dest in self._optional:
            kwargs["type"] = _or_none(kwargs["type"])
        kwargs["default"] = argparse.SUPPRESS  # only what was typed reaches the dataclass, which owns the defaults
        kwargs["help"] = f"{kwargs['help']} (default: {self._shown_defaults[dest]})".replace("%", "%%")
        spellings = dict.fromkeys((f"--{dest}", f"--{dest.replace('_', '-')}"))
        return super().add_argument(*spellings, dest=dest, **kwargs)

    def error(self, message):
        known = [option for action in self._actions for option in action.option_strings]
        for typed in re.findall(r"--[\w-]+", message) if message.startswith("unrecognized") else ():
            close = difflib.get_close_matches(typed, known, n=1)
            message += f"; did you mean {close[0]}?" if close else ""
        raise UserError(f"{message} (--help lists every flag)")


def _or_none(convert):
    """A type for argparse that also takes the word "none"."""

    def converter(text):
        return None if text.lower() == "none" else convert(text)

    converter.__name__ = convert.__name__
    return converter


def _shown(field):
    default = field.default_factory() if field.default is dataclasses.MISSING else field.default
    return " ".join(default) if isinstance(default, list) and default else default or ("none" if default in (None, []) else default)


def parse(cls, argv=None):
    """Read `argv` (the command line when None) into the dataclass `cls`. `--demo` changes defaults; what is typed still wins.

    Raises:
        UserError: for whatever argparse refuses.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    typed = {text[2:].partition("=")[0].replace("-", "_") for text in argv if text.startswith("--")}
    parser = Parser(cls)
    if "demo" in typed:
        # a typed list would be added to a default one
        parser.set_defaults(**{name: value for name, value in _demo_defaults(cls).items() if name not in typed})
    if "num_train_epochs" in typed and "max_train_steps" not in typed:
        parser.set_defaults(max_train_steps=None)  # typed epochs win over steps that are only a default
    return parser.parse_args(argv)


def _demo_defaults(cls):
    """What `--demo` changes: see demo/settings.py, and the class's own DEMO."""
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # matrices this small lose time to a second thread, up to tenfold
    from demo.settings import demo_settings

    names = {field.name for field in dataclasses.fields(cls)}
    return {name: value for name, value in {**demo_settings(DEMO_ROOT), **cls.DEMO}.items() if name in names}


def print_config(flags):
    """What --dry_run shows: the resolved flags as JSON."""
    print(json.dumps(dataclasses.asdict(flags), indent=2))


DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM)


def run(main):
    """Call a script's main; a UserError becomes one line on stderr and exit status 2, as does a full disk; Ctrl-C one line and 130."""
    try:
        return main()
    except KeyboardInterrupt:
        said, status = "interrupted", 130
    except UserError as error:
        said, status = f"error: {error}", 2
    except OSError as error:
        if error.errno not in DISK_ERRORS:
            raise
        said, status = f"error: {error}: make room there, or name another place", 2
    print(f"{os.path.basename(sys.argv[0])}: {said}", file=sys.stderr)
    sys.exit(status)


class Described:
    """Base of flag dataclasses: a subclass that overrides a field gives the new default only, and keeps the help."""

    def __init_subclass__(cls):
        inherited = {field.name: field for field in dataclasses.fields(cls)} if dataclasses.is_dataclass(cls) else {}
        for name in cls.__dict__.get("__annotations__", {}):
            default = cls.__dict__.get(name)
            if name in inherited and not isinstance(default, dataclasses.Field):
                metadata = dict(inherited[name].metadata)
                setattr(cls, name, flag(default, metadata.pop("help"), **metadata))
'''

# ============================================================================================= common/dataset.py

MODULES['common.dataset'] = r'''
"""Image-caption pairs from the hub or a folder -> Sample; and a sample's picture -> pixels with its micro-conditioning."""

import csv
import functools
import hashlib
import io
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Callable

import numpy as np
import torch
from PIL import Image, ImageOps

from common.command_line import UserError
from common.flags import find_data_dir

IMAGE_SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff"}
BUCKET_RATIO = 2.0  # widest and tallest bucket


@dataclass(frozen=True)
class Sample:
    """One training pair. `key` is a hash of the file's bytes; width and height are those of the upright picture, in pixels."""

    name: str
    key: str
    caption: str
    width: int
    height: int
    read: Callable[[], bytes]


@dataclass(frozen=True)
class Framing:
    """How a picture becomes a training square or bucket: resize to cover, then crop. All in pixels."""

    resized: tuple  # (width, height)
    left: int
    top: int
    width: int
    height: int


# ---------------------------------------------------------------- sources


def load_samples(dataset_name, train_data_dir, image_column, caption_column, max_samples, max_bad):
    """All readable samples of a folder or a hub data set, and a count of what was skipped.

    Returns:
        (samples, bad): a list of Sample, and the number of unreadable images.
    Raises:
        UserError: no such data, no captions, or more than `max_bad` unreadable images.
    """
    if train_data_dir is not None:
        source, pairs = train_data_dir, _folder_pairs(find_data_dir(train_data_dir), caption_column)
    else:
        source, pairs = dataset_name, _hub_pairs(dataset_name, image_column, caption_column)
    samples, bad = [], []
    for name, caption, read in pairs[:max_samples]:
        try:
            samples.append(_open_sample(name, caption, read))
        except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
            bad.append(f"{name} ({error})")
    refuse_bad(bad, max_bad)
    if not samples:
        raise UserError(f"{source}: holds no image" if not bad else f"{source}: none of its {len(bad)} images can be read, e.g. {bad[0]}")
    return samples, len(bad)


def refuse_bad(bad, max_bad, before=0):
    """Name unreadable images; more than `max_bad` of them, counting those found `before`, are a UserError."""
    if bad and before + len(bad) > max_bad:
        more = f" and {len(bad) - 1} more" if len(bad) > 1 else ""
        raise UserError(f"unreadable image {bad[0]}{more}: repair or remove it, or allow it with --max_bad_images {before + len(bad)}")
    for name in bad:
        print(f"skipped unreadable image {name}")


def _open_sample(name, caption, read):
    data = read()
    with Image.open(io.BytesIO(data)) as image:  # reads the header only
        width, height = image.size
        in_header = image.format != "PNG" or "exif" in image.info  # Pillow decodes a whole PNG to look behind the pixels
        if in_header and image.getexif().get(0x0112, 1) >= 5:  # orientations 5-8 lie on their side
            width, height = height, width
    key = hashlib.blake2b(data, digest_size=16).hexdigest()
    return Sample(name, key, (caption or "").strip(), width, height, read)


def _folder_pairs(folder, caption_column):
    """[(file name, caption, read)] of a folder with metadata.jsonl, metadata.csv or .txt captions beside the images."""
    for metadata, rows_of in (("metadata.jsonl", _jsonl_rows), ("metadata.csv", _csv_rows)):
        if (folder / metadata).exists():
            return _metadata_pairs(folder / metadata, rows_of(folder / metadata), caption_column)
    images = sorted(path for path in folder.rglob("*") if path.suffix.lower() in IMAGE_SUFFIXES and not _is_litter(path, folder))
    if not images:
        raise UserError(f"--train_data_dir {folder}: no images in it (looked for {' '.join(sorted(IMAGE_SUFFIXES))})")
    captions = [path.with_suffix(".txt") for path in images]
    if not any(path.exists() for path in captions):
        elsewhere = sorted(folder.glob("*/metadata.*"))
        hint = f" (there is {elsewhere[0]}: name that folder)" if elsewhere else ""
        raise UserError(
            f"--train_data_dir {folder}: no captions{hint}; add metadata.jsonl or .csv (columns file_name and {caption_column}),"
            f" or a .txt beside each image ({captions[0].name})"
        )
    return [(str(image), _read_text(text) if text.exists() else "", image.read_bytes) for image, text in zip(images, captions)]


def _is_litter(path, folder):
    """Hidden files, and what notebooks and archivers leave behind: copies that would be trained on twice."""
    return any(part.startswith(".") or part == "__MACOSX" for part in path.relative_to(folder).parts)


def _metadata_pairs(metadata, rows, caption_column):
    for number, row in enumerate(rows, 1):
        if not isinstance(row, dict):
            raise UserError(f"{metadata}: row {number} is not an object with file_name and {caption_column}")
        for column in ("file_name", caption_column):
            if column not in row:
                raise UserError(f"{metadata}: row {number} has no {column!r} (it has {', '.join(map(str, row))}); see --caption_column")
            if not isinstance(row[column], (str, type(None))) or (row[column] is None and column == "file_name"):
                raise UserError(f"{metadata}: row {number}: {column} is {row[column]!r}, not a text")
    folder = metadata.parent
    return [(str(folder / row["file_name"]), row[caption_column], (folder / row["file_name"]).read_bytes) for row in rows]


def _jsonl_rows(path):
    rows = []
    for number, line in enumerate(_read_text(path).split("\n"), 1):  # splitlines() would cut captions at U+2028 too
        if line.strip():
            try:
                rows.append(json.loads(line))
            except json.JSONDecodeError as error:
                raise UserError(f"{path}: line {number} is not JSON ({error.msg})") from None
    return rows


def _csv_rows(path):
    return list(csv.DictReader(io.StringIO(_read_text(path))))


def _read_text(path):
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: is not UTF-8 text ({error.reason} at byte {error.start}); save it as UTF-8") from None


def _hub_pairs(dataset_name, image_column, caption_column):
    """The same of a hub data set's train split; pictures stay encoded bytes, memory-mapped by `datasets`."""
    from datasets import Image as ImageFeature
    from datasets import load_dataset

    data = load_dataset(dataset_name, split="train")
    for flag, column in (("image_column", image_column), ("caption_column", caption_column)):
        if column not in data.column_names:
            raise UserError(f"--{flag} {column}: {dataset_name} has the columns {', '.join(data.column_names)}")
    data = data.cast_column(image_column, ImageFeature(decode=False))
    captions = data[caption_column]

    def read(index):
        cell = data[index][image_column]
        return cell["bytes"] if cell["bytes"] is not None else Path(cell["path"]).read_bytes()

    return [(f"{dataset_name}[{i}]", captions[i], functools.partial(read, i)) for i in range(len(data))]


def hold_out(samples, share):
    """Split off a `share` of the samples (at least one when share > 0) -> (training, held out).

    Chosen by content, so that runs with other seeds, and on data that has grown, are measured on the same pictures; equal
    pictures are never on both sides.
    """
    if not share:
        return samples, []
    keys = sorted({sample.key for sample in samples}, key=lambda key: hashlib.blake2b(f"held out {key}".encode()).digest())
    count = max(1, round(len(keys) * share))
    if count >= len(keys):
        raise UserError(f"--validation_split {share}: leaves none of the {len(keys)} different pictures to train on")
    held_out = set(keys[:count])
    return [s for s in samples if s.key not in held_out], [s for s in samples if s.key in held_out]


# ---------------------------------------------------------------- framing


def buckets(resolution):
    """[(width, height)] between 1:2 and 2:1, sides a multiple of a step, area at most resolution^2 (SDXL, arXiv 2307.01952, app. I)."""
    step = 64 if resolution >= 512 else 16
    sides = range(resolution // step * step, int(resolution * BUCKET_RATIO), step)
    wide = [(width, resolution**2 // width // step * step) for width in sides]
    wide = [(w, h) for w, h in wide if h and 1 <= w / h <= BUCKET_RATIO] + [(resolution, resolution)]
    return sorted({*wide, *((h, w) for w, h in wide)})


def frame(sample, resolution, center_crop=True, aspect_ratio_buckets=False):
    """Choose the Framing of a sample. A random crop is drawn from the image's content, so it is the same in every run."""
    width, height = resolution, resolution
    if aspect_ratio_buckets:
        ratio = sample.width / sample.height
        width, height = min(buckets(resolution), key=lambda bucket: abs(np.log(bucket[0] / bucket[1] / ratio)))
    scale = max(width / sample.width, height / sample.height)
    resized = max(width, round(sample.width * scale)), max(height, round(sample.height * scale))
    spare_x, spare_y = resized[0] - width, resized[1] - height
    across, down = (0.5, 0.5) if center_crop else np.random.default_rng(int(sample.key, 16)).random(2)
    return Framing(resized, round(spare_x * across), round(spare_y * down), width, height)


def time_ids(sample, framing, flip=False):
    """SDXL's micro-conditioning of one example: (original height, width, crop top, left, target height, width), pixels, [6].

    Original size is the file's; the crop is counted in the resized picture, from the edge that is left after a flip.
    """
    left = framing.resized[0] - framing.left - framing.width if flip else framing.left
    return torch.tensor([sample.height, sample.width, framing.top, left, framing.height, framing.width], dtype=torch.float32)


def pixels(sample, framing, flip=False):
    """Decode, turn upright, resize, crop, flip -> fp32 [3, H, W] in [-1, 1].

    Raises:
        OSError, ValueError or SyntaxError from Pillow, for a file that cannot be decoded.
    """
    with Image.open(io.BytesIO(sample.read())) as image:
        image = _to_rgb(ImageOps.exif_transpose(image))
    if image.size != (sample.width, sample.height):
        raise ValueError(f"is {image.size}, but its header says {(sample.width, sample.height)}")
    image = image.resize(framing.resized, Image.Resampling.LANCZOS)
    image = image.crop((framing.left, framing.top, framing.left + framing.width, framing.top + framing.height))
    if flip:
        image = ImageOps.mirror(image)
    return torch.from_numpy(np.asarray(image, dtype=np.float32).transpose(2, 0, 1) / 127.5 - 1.0)


def _to_rgb(image):
    if image.mode.startswith("I") or image.mode == "F":  # 16-bit grey: Pillow's own conversion clips it to white
        white = 1.0 if image.mode == "F" else 65535.0
        image = Image.fromarray((np.asarray(image, dtype=np.float32) / white * 255).clip(0, 255).astype(np.uint8))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return image.convert("RGB")
'''

# ============================================================================================== common/device.py

MODULES['common.device'] = r'''
"""Where to compute and in which precision, and why: decided here once, printed once."""

import gc
import logging
import resource
import time
from dataclasses import dataclass

import psutil
import torch
from accelerate import PartialState
from accelerate.utils import gather_object, parse_flag_from_env

from common.command_line import UserError

GIB = 2**30
_earlier_peak_gib = 0.0  # before the peak was last counted anew; torch keeps one counter for the whole process


@dataclass(frozen=True)
class Host:
    """One process of the run: its device, the dtype of the frozen model, and its place among the processes."""

    device: torch.device
    dtype: torch.dtype
    reason: str
    rank: int
    world: int
    started_s: float  # when the run began, on the monotonic clock

    @property
    def is_main(self):
        return self.rank == 0

    def say(self, line):
        if self.is_main:
            print(line, flush=True)

    def gather(self, items):
        """The lists of all processes as one list, on every process."""
        return gather_object(items) if self.world > 1 else items

    def barrier(self):
        PartialState().wait_for_everyone()

    def sum(self, tensor):
        """Sum `tensor` over all processes, in place: one all-reduce, or nothing to do for a single process."""
        if self.world > 1:
            torch.distributed.all_reduce(tensor)
        return tensor


def start(mixed_precision="fp16", seed=0):
    """Join the process group that `accelerate launch` or torchrun prepared, if any; choose device and dtype, and say so.

    Seeds torch's global generators, from which only adapter initialisation and LoRA dropout draw.

    Raises:
        UserError: for bf16 on a card that only emulates it.
    """
    global _earlier_peak_gib
    started_s, _earlier_peak_gib = time.monotonic(), 0.0
    quieten_libraries()
    torch.manual_seed(seed)
    state = PartialState(cpu=parse_flag_from_env("ACCELERATE_USE_CPU", not torch.cuda.is_available()))  # on CPUs: gloo
    where = state.device if state.device.type == "cuda" else torch.device("cpu")
    gc.collect()  # what an earlier run in this process has left
    free_memory(where)
    if where.type == "cuda":
        torch.cuda.reset_peak_memory_stats(where)
    dtype, reason = _choose_dtype(where, mixed_precision)
    host = Host(where, dtype, reason, state.process_index, state.num_processes, started_s)
    processes = f", {host.world} processes" if host.world > 1 else ""
    idle = torch.cuda.device_count() - host.world if host.device.type == "cuda" else 0
    if idle > 0:
        host.say(f"note: {idle} more GPU{'s'[: idle > 1]} here, idle: accelerate launch uses all of them")
    host.say(f"device: {host.device.type}, {str(dtype).removeprefix('torch.')}{processes} ({reason})")
    return host


def quieten_libraries():
    """Their notices and loading bars would drown the run's own lines; their errors still come through."""
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # it speaks while it is imported
    import diffusers
    import transformers

    for library in (diffusers, transformers):
        library.utils.logging.set_verbosity_error()
        library.utils.logging.disable_progress_bar()


def _choose_dtype(device, mixed_precision):
    if device.type != "cuda":
        return torch.float32, "no CUDA GPU was found; a CPU computes fp16 ten times slower than fp32"
    name, capability = torch.cuda.get_device_name(device), torch.cuda.get_device_capability(device)
    if mixed_precision == "no":
        return torch.float32, f"{name}, --mixed_precision no"
    if mixed_precision == "bf16":
        # torch.cuda.is_bf16_supported() says True by emulation; only capability 8.0 and up has the units.
        if capability < (8, 0):
            raise UserError(f"--mixed_precision bf16: {name} (sm_{capability[0]}{capability[1]}) has no bf16 units; use fp16")
        return torch.bfloat16, f"{name}, --mixed_precision bf16"
    return torch.float16, f"{name}; fp32 adapter weights and loss scaling"


def peak_gib(device):
    """Highest memory of the run so far in GiB: allocated on the GPU, or resident in RAM on a CPU."""
    return max(_earlier_peak_gib, torch.cuda.max_memory_allocated(device) / GIB) if device.type == "cuda" else peak_ram_gib()


def start_new_peak(device):
    """Let torch.cuda.max_memory_allocated count from here; `peak_gib` remembers what was before."""
    global _earlier_peak_gib
    _earlier_peak_gib = peak_gib(device)
    torch.cuda.reset_peak_memory_stats(device)


def peak_ram_gib():
    """Highest resident memory of this process so far, in GiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / GIB


def seconds_since_start():
    """Seconds since this process was started, imports included."""
    return time.time() - psutil.Process().create_time()


def free_memory(device):
    """Hand cached blocks of freed models back to the GPU."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
'''

# ============================================================================================== common/engine.py

MODULES['common.engine'] = r'''
"""One optimizer step, in one place: forward, loss, backward, all-reduce, overflow check, clipping, optimizer, EMA.

Within the passes of a step nothing waits for the GPU; the host reads one small tensor per step, which is also the log line.
"""

import math
from dataclasses import dataclass

import torch

from common import noise
from common.adapters import without_dropout
from common.graphs import Graphed

GROWTH_INTERVAL = 2000  # steps without an overflow before the loss scale doubles


class LossScale:
    """Dynamic loss scaling for fp16: halved at an overflow, doubled after GROWTH_INTERVAL good steps; 1 for other dtypes."""

    def __init__(self, dtype, device):
        self.enabled = dtype == torch.float16
        self.value = torch.full((), 2.0**12 if self.enabled else 1.0, device=device)  # on the device: a CUDA graph reads it
        self.good_steps = 0

    def update(self, overflow):
        if not self.enabled:
            return
        self.good_steps = 0 if overflow else self.good_steps + 1
        if overflow:
            self.value.mul_(0.5)
        elif self.good_steps % GROWTH_INTERVAL == 0:
            self.value.mul_(2.0)


def lr_schedule(name, warmup_steps, total_steps, peak_lr):
    """One of diffusers' schedules as a function: optimizer steps done -> factor of the peak learning rate. It has no state."""
    from diffusers.optimization import get_scheduler

    unused = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=peak_lr)  # "polynomial" ends at an absolute rate
    return get_scheduler(name, unused, num_warmup_steps=warmup_steps, num_training_steps=total_steps).lr_lambdas[0]


class PassOutOfMemory(Exception):
    """A forward and backward pass needs more GPU memory than there is."""


@dataclass(frozen=True)
class StepResult:
    """What one attempt at an optimizer step gave. `applied` is False when gradients overflowed or the loss was not finite."""

    loss: float
    mse: float
    mse_quarters: list  # mean mse by quarter of the timesteps, None where the step had none
    grad_norm: float
    loss_scale: float
    lr: float
    stop: bool  # some process was asked to stop
    applied: bool


class Engine:
    """The UNet, its flat parameters and its optimizer.

    Args:
        text: maps a batch's fields to (prompt_embeds, pooled), see caching.CachedText.
        schedule: noise.NoiseSchedule on the device.
        lr_factor: optimizer steps done -> factor of the peak learning rate, see `lr_schedule`.
        min_snr_gamma: None for plain MSE.
        ema: adapters.EMA or None.
        seed: of the LoRA dropout masks, together with the step, the pass within it and the process.
        dropout_seed: int64 scalar on the device, from which fused layers derive their masks.
        cuda_graph: replay passes instead of launching them, on a GPU.
        checkpointing: fit.BlockCheckpointing of the UNet, or None when it recomputes nothing.
    """

    def __init__(
        self,
        unet,
        text,
        schedule,
        flat,
        optimizer,
        lr_factor,
        host,
        max_grad_norm,
        min_snr_gamma=None,
        ema=None,
        seed=0,
        dropout_seed=None,
        cuda_graph=True,
        checkpointing=None,
    ):
        self.unet, self.text, self.schedule, self.flat, self.ema = unet, text, schedule, flat, ema
        self.optimizer, self.lr_factor, self.host, self.checkpointing = optimizer, lr_factor, host, checkpointing
        self.peak_lrs = [group["lr"] for group in optimizer.param_groups]
        self.max_grad_norm, self.min_snr_gamma, self.seed, self.dropout_seed = max_grad_norm, min_snr_gamma, seed, dropout_seed
        self.loss_scale = LossScale(host.dtype, host.device)
        self.num_timesteps = len(schedule.alphas_cumprod)
        self.run_pass = Graphed(lambda fields: self.forward_backward(fields), host.device, enabled=cuda_graph, say=host.say)
        self.publish = Graphed(lambda _: flat.publish(), host.device, enabled=cuda_graph, say=host.say, has_smaller=False)

    def optimizer_state_bytes(self):
        """What the optimizer will keep on the device: two moments, of 1 byte each with 8-bit state, else 4."""
        return 2 * len(self.flat) * (1 if "8bit" in type(self.optimizer).__name__ else 4)

    def predict(self, fields):
        """Run the UNet on a batch's fields -> (prediction, target), both [B, C, h, w]."""
        z = fields["mean"].float() + fields["std"].float() * fields["posterior_eps"]
        x_t, target = self.schedule.noise(z, fields["eps"], fields["t"])
        prompt_embeds, pooled = self.text(fields)
        keep = fields["keep_text"].to(prompt_embeds.dtype)
        added = {"text_embeds": pooled * keep[:, None], "time_ids": fields["time_ids"].to(self.host.dtype)}
        x_t, prompt_embeds = x_t.to(self.host.dtype), prompt_embeds * keep[:, None, None]
        return self.unet(x_t, fields["t"], prompt_embeds, added_cond_kwargs=added, return_dict=False)[0], target

    def losses(self, fields):
        """(loss as optimised, statistics): the weighted loss of these examples, and [mse, mse by quarter, count by quarter]."""
        mse = noise.mse_per_sample(*self.predict(fields))
        weighted = mse * fields["weight"]
        if self.min_snr_gamma is not None:
            weighted = weighted * self.schedule.min_snr_weight(fields["t"], self.min_snr_gamma)
        mse, t = mse.detach(), fields["t"]
        quarters = [noise.by_quarter(values, t, self.num_timesteps) for values in (mse, torch.ones_like(mse))]
        return weighted.sum(), torch.cat([(mse * fields["weight"]).sum().view(1), *quarters])

    def forward_backward(self, fields):
        """Add the gradients of these examples to the flat gradient -> [loss, *statistics] on the device."""
        loss, statistics = self.losses(fields)
        (loss * self.loss_scale.value).backward()
        return torch.cat([loss.detach().view(1), statistics])

    def step(self, number, batches, stop=False, meanwhile=lambda: None):
        """One attempt at an optimizer step on this process's share of an effective batch.

        Args:
            number: optimizer steps done after this one, from 1.
            batches: batching.Batch list; their weights, over all processes, sum to 1.
            stop: this process was asked to stop; every process hears of it with the statistics.
            meanwhile: called while the GPU works, before the host waits for it.
        Raises:
            PassOutOfMemory: a pass does not fit; nothing has moved.
        """
        total = torch.cat([self._passes(number, batches), torch.full((1,), float(stop), device=self.host.device)])
        meanwhile()
        self.host.sum(self.flat.grad)
        self.host.sum(total)
        norm = (
            torch.linalg.vector_norm(self.flat.grad) / self.loss_scale.value
        )  # inf or NaN anywhere shows here: this is the overflow check too
        numbers = torch.cat([total, norm.view(1), self.loss_scale.value.view(1)]).tolist()  # the one wait of the step
        return self._finish(number, *numbers)

    def _passes(self, number, batches):
        try:
            total = 0
            for index, batch in enumerate(batches):
                self._seed_dropout(number, index)
                total = total + self.run_pass(batch.tensors)
            return total
        except torch.OutOfMemoryError:
            pass  # outside of this block the failed pass's tensors are free
        self.flat.grad.zero_()
        self.run_pass.clear()
        raise PassOutOfMemory

    def _seed_dropout(self, number, index):
        seed = noise.generator_for(self.seed, "dropout", number, index, self.host.rank).initial_seed() >> 1
        torch.manual_seed(seed)  # for PEFT's own dropout
        if self.dropout_seed is not None:
            self.dropout_seed.fill_(seed)

    def _finish(self, number, loss, mse, *rest):
        sums, counts, (stop, norm, scale) = rest[: noise.QUARTERS], rest[noise.QUARTERS : 2 * noise.QUARTERS], rest[2 * noise.QUARTERS :]
        applied, lr_factor = math.isfinite(norm) and math.isfinite(loss), self.lr_factor(number - 1)
        if applied:
            clip = min(1.0, self.max_grad_norm / (norm + 1e-6)) if self.max_grad_norm else 1.0
            self.flat.grad.mul_(clip / scale)
            for group, peak in zip(self.optimizer.param_groups, self.peak_lrs):
                group["lr"] = peak * lr_factor
            self.optimizer.step()
            self.publish({})
            if self.ema is not None:
                self.ema.update(number)
        self.loss_scale.update(overflow=not applied)
        self.flat.grad.zero_()
        quarters = [total / n if n else None for total, n in zip(sums, counts)]
        return StepResult(loss, mse, quarters, norm, scale, self.peak_lrs[0] * lr_factor, stop > 0, applied)

    @torch.no_grad()
    def validate(self, batches):
        """Mean unweighted mse over validation batches, on every process; without dropout."""
        totals = torch.zeros(2, device=self.host.device)
        with without_dropout([self.unet, *self.text.encoders]):
            for batch in batches:
                fields = {name: tensor.to(self.host.device, non_blocking=True) for name, tensor in batch.tensors.items()}
                mse = noise.mse_per_sample(*self.predict(fields))
                totals += torch.stack([mse.sum(), torch.tensor(float(len(batch)), device=mse.device)])
        total, examples = self.host.sum(totals).tolist()
        return total / examples
'''

# =============================================================================================== common/files.py

MODULES['common.files'] = r'''
"""Files that a reader finds whole or not at all."""

import json
import os
import re

from safetensors import SafetensorError
from safetensors.torch import save_file


def write_json(path, value):
    """Write JSON so that a reader finds the old file or the new one, never a part."""
    partial = path.with_name(path.name + ".partial")
    partial.write_text(json.dumps(value, indent=2) + "\n")
    os.replace(partial, path)


def write_safetensors(path, tensors, metadata=None):
    """The same for tensors.

    Raises:
        OSError: where it cannot be written; safetensors has an error of its own for that, with the number in its text.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    try:
        save_file({name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}, partial, metadata)
    except SafetensorError as error:
        number = re.search(r"os error (\d+)", str(error))
        if number is None:
            raise
        raise OSError(int(number[1]), os.strerror(int(number[1])), str(path)) from None
    partial.chmod(0o644)  # safetensors makes its files unreadable for others
    os.replace(partial, path)
'''

# ================================================================================================= common/fit.py

MODULES['common.fit'] = r'''
"""How much goes through a pass: measured on this card, with these images, instead of guessed; and remembered.

Recomputing activations in the backward pass (checkpointing, arXiv 1604.06174) trades up to a third more work for most of the
memory, block by block; a larger pass uses the GPU better. `measured` times what fits and takes the fastest.
"""

import json
import math
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Optional

import torch
from torch.utils.checkpoint import checkpoint

from common.device import GIB, start_new_peak
from common.files import write_json

VERSION = 2  # raise it when a pass takes other time or memory than before: remembered plans are then measured again
SPARE_GIB = 0.75  # workspaces of cuBLAS and cuDNN, and the allocator's fragments
LARGEST_PASS = 8
TIMED_CANDIDATES = 3


class BlockCheckpointing:
    """The checkpoint function of a UNet: recomputes every block in the backward pass, except those in `kept`.

    Args:
        preserve_rng_state: needed by layers whose dropout draws from the device's generator.
    """

    def __init__(self, preserve_rng_state=False):
        self.preserve_rng_state = preserve_rng_state
        self.kept = set()
        self.sizes = None  # a dict while blocks are measured: block -> bytes that it would keep

    def __call__(self, block, *args):
        if self.sizes is not None:
            before = torch.cuda.memory_allocated()
            output = block(*args)
            self.sizes[block] = torch.cuda.memory_allocated() - before
            del output
        if block in self.kept:
            return block(*args)
        return checkpoint(block, *args, use_reentrant=False, preserve_rng_state=self.preserve_rng_state)


@dataclass
class Fit:
    """How a run cuts its effective batch: `micro_batch` images a pass, and what is recomputed (None: nothing)."""

    micro_batch: int
    checkpointing: Optional[BlockCheckpointing] = None
    remembered: Optional[Path] = None  # the file that holds it for later runs

    def step_down(self):
        """The next smaller plan after an out-of-memory, which no later run starts with; False when there is none."""
        if self.remembered:
            self.remembered.unlink(missing_ok=True)
        if self.checkpointing and self.checkpointing.kept:
            self.checkpointing.kept = set()
        elif self.micro_batch > 1:
            self.micro_batch = -(-self.micro_batch // 2)
        else:
            return False
        return True


def measured(engine, make_batches, share, checkpointing, budget_gib, remembered):
    """The fastest Fit within `budget_gib` of GPU memory for `share` images a step on this process.

    Args:
        engine: ready to train; gradients are zero again afterwards.
        make_batches: micro_batch -> the batches of one step.
        checkpointing: BlockCheckpointing of the UNet, or None where nothing may be recomputed.
        remembered: Path of the file that keeps the result for runs like this one; what it holds is not measured again.
    Returns:
        (Fit, the line that says what was chosen).
    """
    try:
        plan = json.loads(remembered.read_text())
        if checkpointing:
            checkpointing.kept = {engine.unet.get_submodule(name) for name in plan["kept"]}
        return Fit(plan["micro_batch"], checkpointing, remembered), f"{plan['line']} (as an earlier run measured, {remembered})"
    except (OSError, ValueError, KeyError, AttributeError):
        pass  # there is none, or it is damaged or of another UNet
    fit, line, seconds = _measure(engine, make_batches, share, checkpointing, budget_gib)
    if math.isfinite(seconds):
        kept = [name for name, module in engine.unet.named_modules() if checkpointing and module in checkpointing.kept]
        remembered.parent.mkdir(parents=True, exist_ok=True)
        write_json(remembered, {"micro_batch": fit.micro_batch, "kept": kept, "line": line})
    return replace(fit, remembered=remembered), line


def _measure(engine, make_batches, share, checkpointing, budget_gib):
    """(Fit, the line that says it, seconds per image: infinite when nothing that was tried fits)."""
    base, lowest, sizes = _probe(engine, make_batches(1)[0], checkpointing)
    room = (budget_gib - SPARE_GIB) * GIB - base
    candidates = []
    for size in (n for n in range(1, min(share, LARGEST_PASS) + 1) if share % n == 0):
        if size * lowest <= room or size == 1:
            candidates.append((size, _blocks_to_keep(sizes, (room - size * lowest) / size)))
    timed = [(_seconds_per_image(engine, make_batches, checkpointing, *c), *c) for c in candidates[-TIMED_CANDIDATES:]]
    seconds, size, kept = min(timed, key=lambda row: row[0])
    if checkpointing:
        checkpointing.kept = kept
    used_gib = (base + size * (lowest + sum(sizes[block] for block in kept))) / GIB
    passes = share // size
    line = (
        f"plan: {size} image{'s'[: size > 1]} in {passes} pass{'es' if passes > 1 else ''}, {len(sizes) - len(kept)} of {len(sizes)} blocks"
        f" recomputed, {seconds:.3f} s/img, about {used_gib:.1f} of {budget_gib:.1f} GiB"
    )
    return Fit(size, checkpointing), line, seconds


def _probe(engine, batch, checkpointing):
    """One pass of one image -> bytes before it, optimizer state included; peak bytes above that; {block: bytes it would keep}."""
    base = torch.cuda.memory_allocated() + engine.optimizer_state_bytes()
    before = torch.cuda.memory_allocated()
    if checkpointing:
        checkpointing.sizes = {}
    start_new_peak(engine.host.device)
    engine.forward_backward({name: tensor.to(engine.host.device) for name, tensor in batch.tensors.items()})
    lowest, sizes = torch.cuda.max_memory_allocated() - before, {}
    if checkpointing:
        sizes, checkpointing.sizes = checkpointing.sizes, None
    engine.flat.grad.zero_()
    return base, lowest, sizes


def _blocks_to_keep(sizes, room):
    """As many blocks as keep their activations in `room` bytes; the last first, as theirs are needed for the shortest time."""
    kept = set()
    for block, size in reversed(sizes.items()):
        if size <= room:
            kept.add(block)
            room -= size
    return kept


def _seconds_per_image(engine, make_batches, checkpointing, size, kept):
    """Time one pass as it will be run; infinite when it does not fit after all."""
    if checkpointing:
        checkpointing.kept = kept
    tensors, seconds = make_batches(size)[0].tensors, float("inf")
    try:
        for _ in range(4):  # as it is, captured, replayed twice
            started = time.perf_counter()
            engine.run_pass(tensors)
            torch.cuda.synchronize()
            seconds = (time.perf_counter() - started) / size
    except torch.OutOfMemoryError:
        seconds = float("inf")
    engine.run_pass.clear()
    engine.flat.grad.zero_()
    return seconds
'''

# =============================================================================================== common/flags.py

MODULES['common.flags'] = r'''
"""The flags of the scripts, as documented dataclasses; `check()` refuses what cannot work.

Nothing here imports torch: a wrong value is answered at once.
"""

import importlib.util
import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, List, Literal, Optional

from common.command_line import CACHE_DIR, DEMO_ROOT, Described, UserError, flag, local_path

ATTENTION_PROJECTIONS = ["to_q", "to_k", "to_v", "to_out.0"]


@dataclass
class ModelFlags(Described):
    """Which model to load, and how: the same for every script."""

    DEMO: ClassVar[dict] = {}  # what a script's own --demo changes beside the settings of all

    pretrained_model_name_or_path: str = flag(
        "stabilityai/stable-diffusion-xl-base-1.0", "SDXL: hub id, local folder or single .safetensors file", type=local_path
    )
    pretrained_vae_model_name_or_path: Optional[str] = flag(
        None,
        "VAE: hub id or folder; none means madebyollin/sdxl-vae-fp16-fix for a hub model and the model's own VAE for a local one",
        type=local_path,
    )
    config_name_or_path: str = flag(
        "stabilityai/stable-diffusion-xl-base-1.0",
        "where configs and tokenizers of a single-file model come from: hub id or folder",
        type=local_path,
    )
    variant: Optional[str] = flag("fp16", "weight files to prefer; plain ones are used where a local folder has no such variant")
    revision: Optional[str] = flag(None, "branch, tag or commit of the hub model")
    mixed_precision: Literal["no", "fp16", "bf16"] = flag("fp16", "precision of the model on a GPU; a CPU computes in fp32")
    cache_dir: str = flag(
        CACHE_DIR, "where encoded images and captions, and unpacked single-file models, are kept between runs", type=local_path
    )
    dry_run: bool = flag(False, "print the resolved configuration as JSON and stop")
    demo: bool = flag(False, "a small SDXL and a small data set that come with the suite: no network, minutes on a CPU")


@dataclass
class TrainFlags(ModelFlags):
    """The flags every trainer has. A trainer's own class overrides defaults and adds the flags of its technique."""

    # data
    dataset_name: str = flag("lambdalabs/naruto-blip-captions", "hub data set of image-caption pairs")
    train_data_dir: Optional[str] = flag(
        None,
        "folder of images with metadata.jsonl/.csv or .txt captions; wins over --dataset_name; a name under /kaggle/input works too",
        type=local_path,
    )
    image_column: str = flag("image", "column of the images in a hub data set")
    caption_column: str = flag("text", "column of the captions in a hub data set or a metadata file")
    max_train_samples: Optional[int] = flag(None, "use only the first N samples")
    max_bad_images: int = flag(0, "unreadable images are named and skipped; more than this many end the run")
    resolution: int = flag(1024, "pixels: side of the square crop, or of the square with the area of a bucket; a multiple of 32")
    center_crop: bool = flag(
        True, "crop the middle; otherwise each image has one random crop, drawn from its content so that it can be cached"
    )
    random_flip: bool = flag(False, "mirror half of the training examples")
    aspect_ratio_buckets: bool = flag(
        False, "keep the aspect ratio: crop to the nearest of the buckets between 1:2 and 2:1 with the area of --resolution"
    )
    caption_dropout: float = flag(0.0, "share of training examples that see the unconditional input instead of their caption")
    text_cache: Literal["ram", "disk", "none"] = flag(
        "ram", "text embeddings: encoded once and held in RAM, encoded once and kept on disk, or encoded in every step"
    )
    # adapter
    quantize: Literal["none", "nf4"] = flag(
        "none", "keep the frozen UNet's linear layers in 16 bits, or in 4 (bitsandbytes NF4, double quantisation)"
    )
    lora_rank: int = flag(16, "rank r of the adapter")
    lora_alpha: int = flag(16, "the adapter is scaled by alpha / rank")
    lora_dropout: float = flag(
        0.0, "dropout on the adapter's input; its masks are seeded by step and pass, so they depend on how a batch is split"
    )
    lora_target_modules: List[str] = flag(ATTENTION_PROJECTIONS, "UNet layers that get an adapter, by the end of their names")
    lora_backend: Literal["fused", "peft"] = flag(
        "fused", "forward passes: adapted layers as one function, frozen ones with fewer passes over memory; or PEFT's and diffusers' own"
    )
    auto_fit: bool = flag(True, "on a GPU, measure how many images fit a pass and what must be recomputed; the effective batch stays")
    max_vram_gb: Optional[float] = flag(None, "GiB of GPU memory to stay within; none means what is free")
    cuda_graph: bool = flag(True, "on a GPU, launch the kernels of a pass once and replay them")
    train_text_encoder: bool = flag(
        False, "give both text encoders LoRA too (q, k, v, out projections; never DoRA); captions are then encoded in every step"
    )
    text_encoder_lr: float = flag(5e-5, "peak learning rate of the text encoders' adapters")
    enable_xformers_memory_efficient_attention: bool = flag(False, "attention by xformers instead of torch's own kernels")
    # optimisation
    train_batch_size: int = flag(1, "examples in one forward pass on one device")
    gradient_accumulation_steps: int = flag(4, "passes in one optimizer step; effective batch = batch size x accumulation x processes")
    gradient_checkpointing: bool = flag(True, "recompute activations in the backward pass: less memory, a third more work")
    num_train_epochs: int = flag(10, "passes over the data, unless --max_train_steps is given")
    max_train_steps: Optional[int] = flag(None, "optimizer steps; wins over --num_train_epochs")
    learning_rate: float = flag(1e-4, "peak learning rate")
    lr_scheduler: Literal["linear", "cosine", "cosine_with_restarts", "polynomial", "constant", "constant_with_warmup"] = flag(
        "cosine", "schedule of the learning rate over the optimizer steps"
    )
    lr_warmup_steps: int = flag(100, "optimizer steps of linear warm-up")
    use_8bit_adam: bool = flag(False, "AdamW with 8-bit state (bitsandbytes)")
    adam_beta1: float = flag(0.9, "decay of AdamW's first moment")
    adam_beta2: float = flag(0.999, "decay of AdamW's second moment")
    adam_weight_decay: float = flag(1e-2, "decoupled weight decay")
    adam_epsilon: float = flag(1e-8, "AdamW's epsilon")
    max_grad_norm: float = flag(1.0, "gradients are clipped to this norm; 0 switches clipping off")
    seed: int = flag(42, "seed of data order, noise, timesteps and adapter initialisation")
    # loss
    min_snr_gamma: Optional[float] = flag(None, "Min-SNR loss weighting with this gamma (arXiv 2303.09556); none is plain MSE")
    offset_noise_strength: float = flag(0.0, "strength of noise that is constant over an image's channel")
    use_ema: bool = flag(False, "keep an exponential moving average of the adapter, saved to ema_unet/")
    ema_decay: float = flag(0.9999, "decay of the average, reached by the ramp (1 + step) / (10 + step)")
    # output
    output_dir: str = flag("outputs/train", "where everything the run writes goes", type=local_path)
    save_peft: bool = flag(False, "write the final adapter as PEFT folders too: peft/, and text encoders in folders within it")
    checkpointing_steps: int = flag(500, "optimizer steps between checkpoints; 0 writes none on the way")
    checkpoints_total_limit: Optional[int] = flag(3, "keep this many newest checkpoints; the weight files of all steps stay")
    resume_from_checkpoint: Optional[str] = flag(
        None, "'latest' or the path of a checkpoint folder: go on exactly where it was", type=local_path
    )
    max_train_minutes: Optional[float] = flag(None, "stop early, with everything saved, this many minutes after the start")
    report_to: Literal["none", "tensorboard", "wandb"] = flag("none", "tracker that gets the numbers of metrics.jsonl too")
    validation_prompt: List[str] = flag([], "prompt to draw while training; repeatable")
    validation_steps: int = flag(
        500, "optimizer steps between validations: images (of the average with --use_ema) and held-out loss (without it)"
    )
    validation_split: float = flag(0.0, "share of the data held out for a validation loss at fixed noise and timesteps")
    early_stopping_patience: Optional[int] = flag(None, "stop after this many validations without a better held-out loss")


def check(flags):
    """Refuse values that cannot work, before anything heavy is imported or anything is written.

    Raises:
        UserError: naming the flag, the value and the cure.
    """
    positive = "lora_rank lora_alpha train_batch_size gradient_accumulation_steps num_train_epochs max_train_steps max_train_samples "
    positive += "learning_rate text_encoder_lr min_snr_gamma max_train_minutes validation_steps early_stopping_patience checkpoints_total_limit max_vram_gb"
    for name in positive.split():
        value = getattr(flags, name)
        if value is not None and not 0 < value < math.inf:
            raise UserError(f"--{name} {value}: must be greater than 0, and finite")
    for (
        name
    ) in "max_bad_images lr_warmup_steps adam_weight_decay adam_epsilon max_grad_norm offset_noise_strength checkpointing_steps".split():
        if not 0 <= getattr(flags, name) < math.inf:
            raise UserError(f"--{name} {getattr(flags, name)}: must be 0 or greater, and finite")
    for name in "caption_dropout lora_dropout adam_beta1 adam_beta2 ema_decay validation_split".split():
        if not 0 <= getattr(flags, name) < 1:
            raise UserError(f"--{name} {getattr(flags, name)}: must be at least 0 and less than 1")
    if flags.resolution < 64 or flags.resolution % 32:
        nearest = max(64, round(flags.resolution / 32) * 32)
        raise UserError(f"--resolution {flags.resolution}: must be a multiple of 32, at least 64; the nearest is {nearest}")
    if flags.early_stopping_patience and not flags.validation_split:
        raise UserError("--early_stopping_patience needs a held-out loss: add --validation_split 0.05")
    if not all(name.strip() for name in flags.lora_target_modules):
        raise UserError("--lora_target_modules: an empty name would mean every layer; give the ends of layer names, e.g. to_q to_k")
    _check_places(flags)
    _check_packages(flags)
    check_model(flags)


def check_model(flags):
    """The part of `check` that every script needs: a model that is meant to be local is there, and what is written finds a place."""
    if not 0 <= flags.seed < 2**32:
        raise UserError(f"--seed {flags.seed}: must be at least 0 and less than 2^32")
    for name in ("output_dir", "cache_dir"):
        check_writable(name, getattr(flags, name))
    for name in ("pretrained_model_name_or_path", "pretrained_vae_model_name_or_path"):
        place = getattr(flags, name)
        looks_local = place and (place.startswith(("/", ".", "~")) or place.endswith(".safetensors") or place.count("/") > 1)
        if looks_local and not os.path.exists(place) and not _of_the_demo(place):
            raise UserError(f"--{name} {place}: no such folder or file")


def check_writable(name, place):
    """A folder that is there with the right to write in it, or that can be made."""
    path = Path(place).absolute()
    nearest = next(folder for folder in (path, *path.parents) if os.path.exists(folder))
    if not nearest.is_dir():
        raise UserError(f"--{name} {place}: {nearest} is a file; name a folder")
    if not os.access(nearest, os.W_OK | os.X_OK):
        raise UserError(f"--{name} {place}: no right to write in {nearest}; name another folder")


def _of_the_demo(place):
    return Path(place).is_relative_to(DEMO_ROOT)  # built when it is needed


def _check_places(flags):
    if flags.train_data_dir is not None and not _of_the_demo(flags.train_data_dir):
        find_data_dir(flags.train_data_dir)
    output, resume = Path(flags.output_dir), flags.resume_from_checkpoint
    if resume not in (None, "latest") and not os.path.isdir(resume):
        raise UserError(f"--resume_from_checkpoint {resume}: no such checkpoint folder")
    continues = resume == "latest" or (resume and Path(resume).resolve().parent == output.resolve())
    if not continues and any((output / name).exists() for name in ("metrics.jsonl", "pytorch_lora_weights.safetensors")):
        raise UserError(
            f"--output_dir {output}: already holds a run; continue it with --resume_from_checkpoint latest, or name another folder"
        )


def _check_packages(flags):
    wanted = [("bitsandbytes", "--use_8bit_adam")] if flags.use_8bit_adam else []
    wanted += [("bitsandbytes", "--quantize nf4")] if flags.quantize == "nf4" else []
    wanted += [("xformers", "--enable_xformers_memory_efficient_attention")] if flags.enable_xformers_memory_efficient_attention else []
    wanted += [(flags.report_to, f"--report_to {flags.report_to}")] if flags.report_to != "none" else []
    for package, typed in wanted:
        if importlib.util.find_spec(package) is None:
            raise UserError(f"{typed} needs a package that is not installed: pip install {package}")


def find_data_dir(name):
    """The folder `name`, or /kaggle/input/`name`, as a Path.

    Raises:
        UserError: when neither is a folder.
    """
    for folder in (Path(name), Path("/kaggle/input") / name):
        if folder.is_dir():
            return folder
    raise UserError(f"--train_data_dir {name}: no such folder (also looked in /kaggle/input)")
'''

# ============================================================================================= common/formats.py

MODULES['common.formats'] = r'''
"""Adapter files that load elsewhere: diffusers' format, kohya's (ComfyUI, A1111, Forge), PEFT's. `adapter_loading` reads them."""

import copy
import json
import re

import torch

from common.files import write_safetensors

WEIGHTS = "pytorch_lora_weights.safetensors"
PEFT_WEIGHTS, PEFT_CONFIG, PEFT_PREFIX = "adapter_model.safetensors", "adapter_config.json", "base_model.model."
ADAPTER_METADATA = "lora_adapter_metadata"  # where diffusers looks for rank, alpha and DoRA
DORA_NORM = "dora_norm"  # our key in a kohya file's metadata: what its dora_scale is to be divided by
COMPONENTS = ("unet", "text_encoder", "text_encoder_2")
KOHYA_PREFIXES = {"unet": "lora_unet_", "text_encoder": "lora_te1_", "text_encoder_2": "lora_te2_"}


def save_adapter(path, unet, recipe, text_encoders=()):
    """Write the adapters of the UNet, and of both text encoders if given, in diffusers' format, with what PEFT needs to rebuild them
    and the recipe that trained them.

    Without the metadata diffusers would take alpha = rank, and rank 16 / alpha 32 would load at half strength.
    """
    from peft import get_peft_model_state_dict

    weights, described = {}, {}
    for component, module in zip(COMPONENTS, (unet, *text_encoders)):
        part = {portable(component, name): tensor for name, tensor in get_peft_model_state_dict(module).items()}
        weights |= {f"{component}.{name}": tensor for name, tensor in _spelt_by_diffusers(component, part).items()}
        config = module.peft_config["default"].to_dict()
        described |= {f"{component}.{key}": sorted(value) if isinstance(value, set) else value for key, value in config.items()}
    metadata = {"format": "pt", ADAPTER_METADATA: json.dumps(described, sort_keys=True), "recipe": json.dumps(recipe, sort_keys=True)}
    write_safetensors(path, weights, metadata)


def _spelt_by_diffusers(component, weights):
    """PEFT's keys -> diffusers', the same way for every layer.

    Its own conversion respells only the attention layers of a UNet, and of a file with two spellings its loader reads that of the first key.
    """
    from diffusers.utils import convert_state_dict_to_diffusers

    if component != "unet":
        return convert_state_dict_to_diffusers(weights)
    return {name.replace(".lora_A.", ".lora.down.").replace(".lora_B.", ".lora.up."): tensor for name, tensor in weights.items()}


def save_peft(folder, unet, recipe, text_encoders=()):
    """Write the same adapters as PEFT folders: the UNet's is `folder`, those of text encoders lie in its text_encoder and text_encoder_2.

    As PeftModel.save_pretrained writes it for a whole model, so `PeftModel.from_pretrained(unet, folder)` reads it back.
    """
    from peft import get_peft_model_state_dict

    for component, module in zip(COMPONENTS, (unet, *text_encoders)):
        part = folder if component == "unet" else folder / component
        weights = {f"{PEFT_PREFIX}{name}": tensor for name, tensor in get_peft_model_state_dict(module).items()}
        write_safetensors(part / PEFT_WEIGHTS, weights, {"format": "pt", "recipe": json.dumps(recipe, sort_keys=True)})
        config = copy.copy(module.peft_config["default"])
        config.base_model_name_or_path, config.inference_mode = recipe["base_model"], True
        base = type(module)
        config.save_pretrained(part, auto_mapping_dict={"base_model_class": base.__name__, "parent_library": base.__module__})


def save_kohya(path, unet, recipe, text_encoders=()):
    """Write the same adapters for ComfyUI, A1111, Forge and kohya's scripts, in fp16 (dora_scale in fp32).

    Their format, https://github.com/kohya-ss/sd-scripts (networks/lora.py): per layer `lora_down`, `lora_up`, `alpha`
    and, for DoRA, `dora_scale` [out, 1]; layers are named by the original SDXL layout with underscores.
    """
    from peft import get_peft_model_state_dict

    config, tensors = unet.peft_config["default"], {}
    for component, module in zip(COMPONENTS, (unet, *text_encoders)):
        for name, tensor in get_peft_model_state_dict(module).items():
            layer, _, kind = name.rpartition(".lora_")
            key = kohya_key(component, layer, unet.config.layers_per_block)
            if kind == "magnitude_vector":
                tensors[f"{key}.dora_scale"] = _dora_scale(module.get_submodule(layer), tensor)
            else:
                tensors[f"{key}.{ {'A.weight': 'lora_down', 'B.weight': 'lora_up'}[kind] }.weight"] = tensor.half()
                tensors[f"{key}.alpha"] = torch.tensor(float(module.peft_config["default"].lora_alpha))
    metadata = {"ss_network_module": "networks.lora", "ss_network_dim": str(config.r), "ss_network_alpha": str(config.lora_alpha)}
    metadata |= {"ss_base_model_version": "sdxl_base_v1-0", "modelspec.sai_model_spec": "1.0.0"}
    metadata |= {"modelspec.architecture": "stable-diffusion-xl-v1-base/lora"}
    if config.use_dora:
        metadata[DORA_NORM] = "base"
    write_safetensors(path, tensors, {**metadata, "format": "pt", "recipe": json.dumps(recipe, sort_keys=True)})


def _dora_scale(layer, magnitude):
    """PEFT's magnitude m -> the dora_scale [out, 1] (convolutions: [out, 1, 1, 1]) with which ComfyUI and Forge compute the same weight.

    DoRA is (W + s B A) m / ||W + s B A|| (arXiv 2402.09353, eq. 5), norms over rows. For a scale of this shape they compute
    (W + s B A) dora_scale / ||W|| (weight_decompose in https://github.com/comfyanonymous/ComfyUI, comfy/weight_adapter/base.py).
    """
    from peft.utils.integrations import dequantize_module_weight

    weight = dequantize_module_weight(layer.get_base_layer())
    base, merged = row_norms(weight, layer.get_delta_weight("default"))
    return (magnitude.float().flatten() * base / merged).view(-1, *[1] * (weight.dim() - 1))


def row_norms(weight, delta):
    """(||W||, ||W + delta||) over rows, each [out], in fp32."""
    weight = weight.detach().float()
    return weight.flatten(1).norm(dim=1), (weight + delta.detach().to(weight)).flatten(1).norm(dim=1)


def portable(component, name):
    """A name as every tool knows it: transformers 5 dropped `text_model.` from those inside CLIPTextModel."""
    return name if component == "unet" else f"text_model.{name.removeprefix('text_model.')}"


def kohya_key(component, layer, layers_per_block):
    """Name of a layer in a kohya file: prefix, then the UNet's original or the text encoder's portable name, with underscores."""
    name = _original_layout(layer, layers_per_block) if component == "unet" else portable(component, layer)
    return KOHYA_PREFIXES[component] + name.replace(".", "_")


_OUTSIDE_BLOCKS = {
    "conv_in": "input_blocks.0.0",
    "conv_out": "out.2",
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
}
_IN_RESNET = {"conv1": "in_layers.2", "time_emb_proj": "emb_layers.1", "conv2": "out_layers.3", "conv_shortcut": "skip_connection"}


def _original_layout(name, layers_per_block):
    """Module name in diffusers' UNet -> in the original one (https://github.com/Stability-AI/generative-models, openaimodel.py).

    There the blocks of all levels are numbered through; within one, 0 is the residual part (or the downsampler), 1 the attention
    (or an upsampler without one before it), 2 the upsampler.
    """
    found = re.fullmatch(r"(down|mid|up)_blocks?(?:\.(\d+))?\.(resnets|attentions|downsamplers|upsamplers)\.(\d+)\.(.+)", name)
    if not found:
        return _OUTSIDE_BLOCKS.get(name, name)
    side, level, kind, index, rest = found[1], int(found[2] or 0), found[3], int(found[4]), found[5]
    rest = _IN_RESNET.get(rest, rest) if kind == "resnets" else "op" if kind == "downsamplers" else rest
    if side == "mid":
        return f"middle_block.{1 if kind == 'attentions' else 2 * index}.{rest}"
    if kind.endswith("samplers"):
        index = layers_per_block  # they close their level
    first = level * (layers_per_block + 1)
    part = {"resnets": 0, "downsamplers": 0, "attentions": 1, "upsamplers": 2}[kind]  # SDXL upsamples only after attention
    return f"input_blocks.{1 + first + index}.{part}.{rest}" if side == "down" else f"output_blocks.{first + index}.{part}.{rest}"
'''

# =============================================================================================== common/fused.py

MODULES['common.fused'] = r'''
"""LoRA and DoRA linear layers as one autograd function over a frozen fp16 or NF4 weight.

PEFT keeps the parameters, their names and the configuration; only the forward pass of its layers is replaced. What that saves
on every layer: fp32 copies of the activations, a dozen kernel launches, and most of what PEFT keeps for the backward pass.

Notation: x [M, K] input, W [N, K] frozen weight, A [r, K] and B [N, r] adapter, s = alpha / r, d dropout, m [N] DoRA
magnitude, n [N] row norms of W + s B A, g = m / n.
"""

import torch
import torch.nn.functional as F

from common.command_line import UserError
from common.kernels import gain_backward, row_norms, scale_rows, seeded_dropout, update_gain


class AdapterLinear(torch.autograd.Function):
    """y = g (x W^T + s d(x) A^T B^T) + bias, with g = 1 for LoRA (LoRA: arXiv 2106.09685, DoRA: arXiv 2402.09353).

    As in section 4.3 of DoRA, n is a constant in the backward pass; dropout acts on the adapter's branch only. Forward g multiplies
    the rows of W and B, backward dy, which is read for m's gradient anyway. Kept for the backward pass: x, which the layers of an
    attention block share; x A^T, which is small; and for DoRA y, which attention keeps anyway. W is read, or dequantised, once more.
    """

    @staticmethod
    def forward(ctx, x, A, B, m, layer):
        x2 = x.reshape(-1, x.shape[-1])
        xa = layer.drop(x2) @ layer.a.t()
        y = F.linear(x2, layer.scaled_weight(), layer.bias).addmm_(xa, layer.scaled_b.t(), alpha=layer.scale)
        ctx.layer, ctx.shape = layer, x.shape
        ctx.save_for_backward(x2, xa, None if m is None else y)
        return y.view(*x.shape[:-1], -1)

    @staticmethod
    def backward(ctx, dy):
        """Gradients of A, B and m are added where they are kept, in fp32, and not handed to autograd."""
        layer, (x2, xa, y) = ctx.layer, ctx.saved_tensors
        dy, dx = dy.reshape(-1, dy.shape[-1]), None
        if y is not None:
            dy = gain_backward(dy.contiguous(), y, layer.bias, layer.gain, layer.m, layer.m.grad)
        dxa = dy @ layer.b
        add_product(layer.A.grad, dxa.t(), layer.drop(x2), layer.scale)
        add_product(layer.B.grad, dy.t(), xa, layer.scale)
        if ctx.needs_input_grad[0]:
            dx = dy @ layer.weight()
            if layer.p:
                layer.drop(dxa @ layer.a, add_to=dx, alpha=layer.scale)
            else:
                dx.addmm_(dxa, layer.a, alpha=layer.scale)
            dx = dx.view(ctx.shape)
        return dx, None, None, None, None


# Whether cuBLAS may be asked for an fp32 product of fp16 matrices, which spares a rounding and three kernels; from torch 2.10 on.
FP32_PRODUCTS = tuple(int(part) for part in torch.__version__.split(".")[:2]) >= (2, 10)


def add_product(total, x, y, scale):
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

    def __init__(self, layer, flat, seed, salt):
        base, (name,) = layer.get_base_layer(), layer.active_adapters
        self.layer, self.peft_forward = layer, layer.forward
        self.base, self.bias, self.scale = base.weight, base.bias, layer.scaling[name]
        self.A, self.B = layer.lora_A[name].weight, layer.lora_B[name].weight
        self.a, self.b = flat.compute_copy(self.A), flat.compute_copy(self.B)
        self.scaled_b = self.b
        self.m = layer.lora_magnitude_vector[name].weight if name in layer.lora_magnitude_vector else None
        self._p, self.seed, self.salt, self.gain = getattr(layer.lora_dropout[name], "p", 0.0), seed, salt, None
        if self.m is not None:
            # PEFT measures it in fp16; exactly n, the layer starts as the frozen one
            self.m.data.copy_(row_norms(self.weight(), self.A.data, self.B.data, self.scale))
            self.gain, self.scaled_b = torch.ones_like(self.m.data), self.b.clone()

    def __call__(self, x):
        if self.layer.disable_adapters:
            return self.peft_forward(x)
        return AdapterLinear.apply(x, self.A, self.B, self.m, self)

    @property
    def p(self):
        """Dropout probability, 0 outside training."""
        return self._p if self.layer.training else 0.0

    def drop(self, x, **into):
        """d(x); the same mask whenever it is called with the same seed. d is its own transpose."""
        return seeded_dropout(x, self.p, self.seed, self.salt, **into) if self.p else x

    def scaled_weight(self):
        """W with its rows multiplied by g, if there is one; as `scaled_b` is B."""
        return self.weight() if self.gain is None else scale_rows(self.weight(), self.gain)

    def weight(self):
        """W [N, K] in the compute dtype, dequantised into memory of its own if it is NF4."""
        if self.base.dtype != torch.uint8:
            return self.base
        from bitsandbytes.functional import dequantize_4bit

        return dequantize_4bit(self.base.data, self.base.quant_state)

    @torch.no_grad()
    def update_gain(self):
        """Set g, and B multiplied by it, after the parameters changed."""
        update_gain(self.weight(), self.A, self.B, self.m, self.scale, self.gain, self.scaled_b)


def fuse(models, flat, seed):
    """Replace the forward pass of every PEFT layer in `models`; DoRA's gains then follow `flat.publish()`.

    Raises:
        UserError: a convolution has an adapter.
    """
    from peft.tuners.tuners_utils import BaseTunerLayer

    layers = [module for model in models for module in model.modules() if isinstance(module, BaseTunerLayer)]
    if any(isinstance(layer.get_base_layer(), torch.nn.Conv2d) for layer in layers):
        raise UserError("--lora_target_modules: adapters of convolutions have no fused forward pass; add --lora_backend peft")
    for salt, layer in enumerate(layers):
        layer.forward = FusedLayer(layer, flat, seed, salt)
        if layer.forward.m is not None:
            flat.followers.append(layer.forward.update_gain)
    flat.publish()
'''

# ========================================================================================== common/fused_unet.py

MODULES['common.fused_unet'] = r'''
"""SDXL's UNet with fewer passes over memory: the layers, parameters and names of diffusers, shorter ways through them.

On a GPU images stay in channels-last order, which is what cuDNN's fp16 convolutions compute in, and in which an image is a
sequence of pixels without being copied. What is frozen is not asked for gradients: a convolution keeps nothing for the
backward pass, a normalisation only its input.
"""

import functools

import torch
import torch.nn.functional as F

from common.kernels import geglu
from common.norm_kernels import add_bias, add_norm, group_norm


class _FrozenConv(torch.autograd.Function):
    """A convolution whose weight needs no gradient, so that its input need not be kept."""

    @staticmethod
    def forward(ctx, x, conv, bias):
        ctx.conv, ctx.shape = conv, x.shape
        return F.conv2d(x, conv.weight, bias, conv.stride, conv.padding)

    @staticmethod
    def backward(ctx, dy):
        conv, sizes = ctx.conv, zip(ctx.shape[2:], dy.shape[2:], ctx.conv.stride, ctx.conv.padding, ctx.conv.kernel_size)
        left_over = [size - ((n - 1) * stride - 2 * padding + kernel) for size, n, stride, padding, kernel in sizes]
        # not torch.nn.grad.conv2d_input: for want of an input it takes the order of memory for NCHW, and copies dy twice
        return F.conv_transpose2d(dy, conv.weight, None, conv.stride, conv.padding, left_over), None, None


def convolution(conv, x):
    return _convolve(x, conv, conv.bias)


def _convolve(x, conv, bias=None):
    if x.is_cuda:
        return _FrozenConv.apply(x.contiguous(memory_format=torch.channels_last), conv, bias)
    return F.conv2d(x, conv.weight, bias, conv.stride, conv.padding)  # memory is not what a CPU lacks, and this is faster


def resnet_block(block, x, temb):
    """ResnetBlock2D. The biases of its convolutions are added where something else is added anyway."""
    h = _convolve(group_norm(x, block.norm1, silu=True), block.conv1)
    h = group_norm(h, block.norm2, silu=True, shift=block.time_emb_proj(F.silu(temb)) + block.conv1.bias)
    h, bias = _convolve(h, block.conv2), block.conv2.bias
    if block.conv_shortcut is not None:
        x, bias = _convolve(x, block.conv_shortcut), bias + block.conv_shortcut.bias
    return add_bias(x, h, bias)


def transformer(model, x, encoder_hidden_states=None, **unused):
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


def transformer_block(block, h, no_mask=None, encoder_hidden_states=None, *unused, **unused_too):
    """BasicTransformerBlock: self-attention, cross-attention, feed-forward."""
    h, n = add_norm(h, None, block.norm1)
    h, n = add_norm(h, block.attn1(n), block.norm2)
    h, n = add_norm(h, block.attn2(n, encoder_hidden_states), block.norm3)
    return h + block.ff(n)


def attention(attn, x, encoder_hidden_states=None, **unused):
    """An attention processor: x [B, S, C], and what is attended to, [B, T, D] -> [B, S, C]."""
    context = x if encoder_hidden_states is None else encoder_hidden_states
    projected = attn.to_q(x), attn.to_k(context), attn.to_v(context)
    heads = F.scaled_dot_product_attention(*(y.unflatten(-1, (attn.heads, -1)).transpose(1, 2) for y in projected))
    return attn.to_out[0](heads.transpose(1, 2).flatten(2))


def gated_activation(module, x):
    """GEGLU."""
    return geglu(module.proj(x))


def normalisation(norm, x):
    """GroupNorm outside of the blocks above."""
    return group_norm(x, norm)


def _is_plain(block):
    """The resnet block of SDXL, none of its many relatives, and no adapter on its convolutions."""
    convolutions = [block.conv1, block.conv2, *([block.conv_shortcut] if block.conv_shortcut is not None else [])]
    return (
        all(type(conv) is torch.nn.Conv2d for conv in convolutions)
        and (block.time_embedding_norm, block.skip_time_act, block.output_scale_factor, block.dropout.p) == ("default", False, 1.0, 0.0)
        and isinstance(block.nonlinearity, torch.nn.SiLU)
        and block.upsample is None
        and block.downsample is None
    )


@functools.cache
def forwards():
    """{class: (forward pass, whether it knows a module of this class)}; by class, as PEFT's Conv2d has the name of torch's."""
    from diffusers.models.activations import GEGLU
    from diffusers.models.attention import BasicTransformerBlock
    from diffusers.models.resnet import ResnetBlock2D
    from diffusers.models.transformers.transformer_2d import Transformer2DModel

    return {
        torch.nn.Conv2d: (convolution, lambda conv: conv.padding_mode == "zeros" and conv.groups == 1 and conv.dilation == (1, 1)),
        torch.nn.GroupNorm: (normalisation, lambda norm: norm.affine),
        ResnetBlock2D: (resnet_block, _is_plain),
        Transformer2DModel: (transformer, lambda model: model.use_linear_projection),
        BasicTransformerBlock: (transformer_block, lambda block: block.norm_type == "layer_norm" and block.pos_embed is None),
        GEGLU: (gated_activation, lambda module: True),
    }


def fuse_unet(unet, device):
    """Replace the forward passes of a frozen UNet2DConditionModel by those above; what they do not know stays as it is.

    Args:
        device: where it will compute.
    """
    from diffusers.models.attention_processor import AttnProcessor2_0

    for module in list(unet.modules()):
        forward, known = forwards().get(type(module), (None, None))
        if forward and known(module):
            module.forward = functools.partial(forward, module)
        if type(getattr(module, "processor", None)) is AttnProcessor2_0:
            module.processor = attention
        if isinstance(module, torch.nn.Conv2d) and device.type == "cuda":
            # also 1 x 1 kernels, which count as contiguous in either order: cuDNN goes by the strides
            module.weight.data = torch.empty_like(module.weight, memory_format=torch.channels_last).copy_(module.weight)


def unfuse_unet(unet):
    """Give every layer its own forward pass back: hooks on single layers do not see what the fused passes read."""
    for module in unet.modules():
        if getattr(module.__dict__.get("forward"), "func", None) in [forward for forward, _ in forwards().values()]:
            del module.forward
'''

# ============================================================================================== common/graphs.py

MODULES['common.graphs'] = r'''
"""CUDA graphs: the thousands of kernels of a pass are launched from Python once, and replayed with one call afterwards.

On a Kaggle or Colab CPU an SDXL LoRA step is bound by launching some 40,000 small kernels, not by the GPU.
"""

import functools

import torch


@functools.lru_cache
def _side_stream(device):
    """One for the whole process: cuBLAS keeps 32 MiB for every stream that it has ever worked on."""
    return torch.cuda.Stream(device)


@functools.lru_cache
def _parallel_streams(device):
    return [torch.cuda.Stream(device) for _ in range(8)]


def side_by_side(functions, device):
    """Call functions that are independent of each other; on a GPU, eight of the small kernels that they launch run at a time."""
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


class Graphed:
    """A function of named tensors, captured once per set of shapes.

    The first call with new shapes runs the function as it is, which also warms it up; the second captures it; then it is
    replayed. All graphs of one `pool` share their memory, so only one result may be in use at a time.

    Args:
        function: dict of tensors -> tensor. It must not wait for the GPU, and what it reads besides its argument must stay in
            place. What it writes in place (gradients) is written by every call exactly once.
        say: prints the line that explains a fallback.
        has_smaller: whether the caller has something smaller to do when memory runs out during the capture, and wants to hear of it;
            otherwise the function is launched from Python from then on.
    """

    def __init__(self, function, device, pool=None, enabled=True, say=print, has_smaller=True):
        self.function, self.device, self.pool, self.say, self.has_smaller = function, device, pool, say, has_smaller
        self.enabled = enabled and device.type == "cuda"
        self._seen, self._graphs = set(), {}

    def __call__(self, tensors):
        """Copy `tensors` to the device without waiting, run the function on them, return its result (valid until the next call)."""
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

    def clear(self):
        """Give the graphs' memory back; the next calls capture them again."""
        self._seen, self._graphs, self.pool = set(), {}, None  # a pool does not outlive its last graph
        if self.enabled:
            torch.cuda.synchronize()
            torch.cuda.empty_cache()

    def _warm_up(self, tensors):
        if not self.enabled:
            return self.function(tensors)
        # cuBLAS and autograd set themselves up per stream; capture is not allowed to, so they do it here, beside the main stream
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
            # The outer context restores the stream, which a capture that fails at its end does not. The stream is torch's own, not
            # the warm-up's: there the graph would go on using a cuBLAS workspace that is not in its pool.
            with torch.cuda.stream(torch.cuda.current_stream()), torch.cuda.graph(graph, pool=self.pool):
                result = self.function(inputs)
        except RuntimeError as error:
            if self.has_smaller and "out of memory" in str(error).lower():  # not every library raises torch's own class
                raise torch.OutOfMemoryError(str(error)) from error
            self.enabled = False
            self.say(f"no CUDA graph, launching from Python: {str(error).splitlines()[0]}")
            return False
        self.pool = self.pool or graph.pool()
        self._graphs[shapes] = graph, inputs, result
        return True
'''

# ================================================================================================= common/hub.py

MODULES['common.hub'] = r'''
"""Is it here, and can it be had? One place that answers for hub ids, quickly, before anything waits on a dead network."""

import os
from pathlib import Path

from common.command_line import DEMO_ROOT, UserError

PROBE_S = 5  # the libraries retry for up to 47 s before they say the same


FP16_VAE = "madebyollin/sdxl-vae-fp16-fix"  # the original SDXL VAE overflows in fp16


def check(flags):
    """Every repo that the flags name and that is not a local path is cached or within reach.

    Raises:
        UserError: naming the flag, the repo and the ways to work offline.
    """
    if "dataset_name" in vars(flags) and flags.train_data_dir is None:
        _require(flags.dataset_name, "dataset", "dataset_name", "README.md")
    model, vae = Path(flags.pretrained_model_name_or_path), flags.pretrained_vae_model_name_or_path
    is_local, in_demo = model.exists(), model.is_relative_to(DEMO_ROOT)
    if model.is_file() and not os.path.isdir(flags.config_name_or_path):
        _require(flags.config_name_or_path, "model", "config_name_or_path", "model_index.json")
    if not is_local and not in_demo:
        _require(flags.pretrained_model_name_or_path, "model", "pretrained_model_name_or_path", "model_index.json")
        vae = vae or FP16_VAE
    if vae and not Path(vae).is_dir():
        _require(vae, "model", "pretrained_vae_model_name_or_path", "config.json")


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
        raise UserError(f"--{flag} {repo_id}: no such {repo_type} on the hub, or it needs a login (huggingface-cli login)") from None
    except Exception as error:  # whatever the HTTP stack of the day raises for a dead network
        raise UserError(f"--{flag} {repo_id}: the hub cannot be reached ({type(error).__name__}); {offline}") from None
'''

# ============================================================================================= common/kernels.py

MODULES['common.kernels'] = r'''
"""Small GPU kernels where PyTorch would pass over memory several times: dropout from a seed, GEGLU, DoRA's norms and gradients.

Each has a plain PyTorch form too: the same formula on a CPU, and what the kernels are tested against.
"""

import functools

import torch
import torch.nn.functional as F

if torch.cuda.is_available():  # Triton comes with the CUDA builds of torch only
    import triton
    import triton.language as tl

    @triton.jit
    def _dropout_kernel(x, add_to, out, seed, salt, n, p, alpha, ADD: tl.constexpr, BLOCK: tl.constexpr):
        i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
        bits = i.to(tl.uint32) * 0x9E3779B9 + tl.load(seed).to(tl.uint32) + salt
        bits = (bits ^ (bits >> 16)) * 0x21F0AAAD  # the integer hash of https://github.com/skeeto/hash-prospector
        bits = (bits ^ (bits >> 15)) * 0xD35A2D97
        keep = ((bits ^ (bits >> 15)) >> 8).to(tl.float32) / 16777216.0 >= p
        result = tl.where(keep, tl.load(x + i, mask=i < n).to(tl.float32) * (alpha / (1 - p)), 0.0)
        if ADD:
            result += tl.load(add_to + i, mask=i < n).to(tl.float32)
        tl.store(out + i, result, mask=i < n)

    @triton.jit
    def _geglu_kernel(h, out, width, BLOCK: tl.constexpr):
        row, i = tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
        at, inside = row * 2 * width + i, i < width
        value = tl.load(h + at, mask=inside).to(tl.float32)
        gate = tl.load(h + at + width, mask=inside).to(tl.float32)
        tl.store(out + row * width + i, value * gate * 0.5 * (1 + tl.erf(gate * 0.7071067811865476)), mask=inside)

    @triton.jit
    def _geglu_backward_kernel(dy, h, dh, width, BLOCK: tl.constexpr):
        row, i = tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
        at, inside = row * 2 * width + i, i < width
        value = tl.load(h + at, mask=inside).to(tl.float32)
        gate = tl.load(h + at + width, mask=inside).to(tl.float32)
        d = tl.load(dy + row * width + i, mask=inside).to(tl.float32)
        cdf = 0.5 * (1 + tl.erf(gate * 0.7071067811865476))
        tl.store(dh + at, d * gate * cdf, mask=inside)
        tl.store(dh + at + width, d * value * (cdf + gate * tl.exp(-0.5 * gate * gate) * 0.3989422804014327), mask=inside)

    @triton.jit
    def _gain_backward_kernel(
        dy, y, bias, gain, m, scaled, partial, arrived, dm, rows, columns,
        BIAS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, PARTS: tl.constexpr,
    ):  # fmt: skip
        row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)[:, None]
        column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
        known, at = column < columns, row * columns + column[None, :]
        inside = (row < rows) & known[None, :]
        d = tl.load(dy + at, mask=inside, other=0.0).to(tl.float32)
        u = tl.load(y + at, mask=inside, other=0.0).to(tl.float32)
        if BIAS:
            u -= tl.load(bias + column, mask=known, other=0.0).to(tl.float32)[None, :]
        tl.store(scaled + at, d * tl.load(gain + column, mask=known, other=0.0)[None, :], mask=inside)
        tl.store(partial + tl.program_id(0) * columns + column, tl.sum(d * u, axis=0), mask=known)
        tl.debug_barrier()  # the atomic addition publishes what every thread of the program has stored
        if tl.atomic_add(arrived + tl.program_id(1), 1) == tl.num_programs(0) - 1:  # the last program for these columns adds all up
            sums = tl.zeros((PARTS, COLUMNS), dtype=tl.float32)
            for start in range(0, tl.num_programs(0), PARTS):
                part = start + tl.arange(0, PARTS)[:, None]
                there = (part < tl.num_programs(0)) & known[None, :]
                sums += tl.load(partial + part * columns + column[None, :], mask=there, other=0.0)
            total = tl.sum(sums, axis=0) / tl.load(m + column, mask=known, other=1.0)
            tl.store(dm + column, tl.load(dm + column, mask=known, other=0.0) + total, mask=known)
            tl.store(arrived + tl.program_id(1), 0)

    @triton.jit
    def _scale_rows_kernel(w, gain, out, columns, BLOCK: tl.constexpr):
        row, i = tl.program_id(0), tl.arange(0, BLOCK)
        value = tl.load(w + row * columns + i, mask=i < columns).to(tl.float32) * tl.load(gain + row)
        tl.store(out + row * columns + i, value, mask=i < columns)

    @triton.jit
    def _gain_kernel(w, A, B, m, gain, b, scale, rows, columns, rank, RANK: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
        row, j = tl.program_id(0) * ROWS + tl.arange(0, ROWS), tl.arange(0, RANK)
        squares, known = tl.zeros((ROWS, COLUMNS), dtype=tl.float32), row < rows
        in_b = row[:, None] * rank + j[None, :], known[:, None] & (j < rank)[None, :]
        of_b = tl.load(B + in_b[0], mask=in_b[1], other=0.0)
        for start in range(0, columns, COLUMNS):
            column = start + tl.arange(0, COLUMNS)
            inside = (column < columns)[None, :]
            of_a = tl.load(A + j[:, None] * columns + column[None, :], mask=(j < rank)[:, None] & inside, other=0.0)
            of_w = tl.load(w + row[:, None] * columns + column[None, :], mask=known[:, None] & inside, other=0.0).to(tl.float32)
            value = of_w + scale * tl.dot(of_b, of_a, input_precision="tf32x3")  # as exact as fp32; before sm_80 it is fp32
            squares += value * value
        g = tl.load(m + row, mask=known, other=0.0) / tl.sqrt(tl.sum(squares, axis=1))
        tl.store(gain + row, g, mask=known)
        tl.store(b + in_b[0], of_b * g[:, None], mask=in_b[1])


BLOCK = 1024


def seeded_dropout(x, p, seed, salt, add_to=None, alpha=1.0):
    """d(x): each element zeroed with probability p, the others divided by 1 - p. A linear function of x and its own transpose.

    Nothing is stored for the backward pass, and a replayed CUDA graph or a recomputed block makes the same mask again.

    Args:
        x: tensor of any shape.
        seed: int64 scalar tensor on x's device, read when the kernel runs.
        salt: integer that differs between layers.
        add_to: when given, it becomes add_to + alpha d(x), in place.
    """
    if not x.is_cuda:
        generator = torch.Generator().manual_seed(int(seed) + salt)
        dropped = x * (torch.rand(x.shape, generator=generator) >= p).to(x.dtype) / (1 - p)
        return dropped if add_to is None else add_to.add_(dropped, alpha=alpha)
    x, salt = x.contiguous(), salt * 0x5EBCA6B % 2**31
    out, n = torch.empty_like(x) if add_to is None else add_to, x.numel()
    _dropout_kernel[(triton.cdiv(n, BLOCK),)](x, out, out, seed, salt, n, p, alpha, ADD=add_to is not None, BLOCK=BLOCK)
    return out


class Geglu(torch.autograd.Function):
    """h [..., 2D] -> value * gelu(gate) [..., D] (arXiv 2002.05202), keeping only h for the backward pass."""

    @staticmethod
    def forward(ctx, h):
        h = h.contiguous()
        ctx.save_for_backward(h)
        out = h.new_empty(*h.shape[:-1], width := h.shape[-1] // 2)
        _geglu_kernel[(out.numel() // width, triton.cdiv(width, BLOCK))](h, out, width, BLOCK=BLOCK)
        return out

    @staticmethod
    def backward(ctx, dy):
        (h,) = ctx.saved_tensors
        dy, dh, width = dy.contiguous(), torch.empty_like(h), dy.shape[-1]
        _geglu_backward_kernel[(dy.numel() // width, triton.cdiv(width, BLOCK))](dy, h, dh, width, BLOCK=BLOCK)
        return dh


def geglu(h):
    """value * gelu(gate) of h = [value, gate] along the last dimension: [..., 2D] -> [..., D]."""
    if h.is_cuda:
        return Geglu.apply(h)
    value, gate = h.chunk(2, dim=-1)
    return value * F.gelu(gate)


def gain_backward(dy, y, bias, gain, m, dm):
    """diag(gain) dy in dy's dtype, the gradient before the gain; and dm += sum over rows of dy (y - bias) / m, that of the magnitude.

    One call at a time: on a GPU all of them count in the same place.

    Args:
        dy, y: [M, N]; bias: [N] or None; gain, m, dm: fp32 [N].
    """
    if not dy.is_cuda:
        dm.addcdiv_((dy * (y if bias is None else y - bias)).sum(0, dtype=torch.float32), m)
        return (dy * gain).to(dy.dtype)
    (rows, columns), bias_or_any, scaled = dy.shape, dy if bias is None else bias, torch.empty_like(dy)
    grid = triton.cdiv(rows, 128), triton.cdiv(columns, 64)
    partial, arrived = torch.empty(grid[0], columns, device=dy.device, dtype=torch.float32), _arrivals(dy.device)
    sizes = dict(BIAS=bias is not None, ROWS=128, COLUMNS=64, PARTS=128)
    _gain_backward_kernel[grid](dy, y, bias_or_any, gain, m, scaled, partial, arrived, dm, rows, columns, **sizes)
    return scaled


@functools.lru_cache
def _arrivals(device):
    """Counters that are 0 between kernels; more of them than any layer has groups of 64 columns."""
    return torch.zeros(4096, device=device, dtype=torch.int32)


def scale_rows(w, gain):
    """diag(gain) w in w's dtype, rounded once: [N, K], fp32 [N] -> [N, K]."""
    if not w.is_cuda:
        return (w * gain[:, None]).to(w.dtype)
    out = torch.empty_like(w)
    _scale_rows_kernel[(len(w),)](w, gain, out, w.shape[1], BLOCK=triton.next_power_of_2(w.shape[1]))
    return out


def row_norms(w, A, B, scale):
    """n: the norms of the rows of w + scale B A, in fp32. [N, K], fp32 [r, K], fp32 [N, r] -> [N].

    By the identity n^2 = ||w||^2 + 2 s rowsum((w A^T) o B) + s^2 rowsum((B A A^T) o B), which needs no second matrix like w.
    """
    w = w.float()
    return (w.square().sum(1) + 2 * scale * ((w @ A.t()) * B).sum(1) + scale**2 * ((B @ (A @ A.t())) * B).sum(1)).sqrt()


def update_gain(w, A, B, m, scale, gain, b):
    """gain = m / n and b = diag(gain) B, in place; n as in `row_norms`, on a GPU by one pass over w, tile by tile."""
    if not w.is_cuda:
        torch.div(m, row_norms(w, A, B, scale), out=gain)
        b.copy_(B * gain[:, None])
    else:
        rank = max(16, triton.next_power_of_2(len(A)))
        options = dict(RANK=rank, ROWS=16, COLUMNS=max(16, 4096 // rank), num_warps=4)  # a tile of A fits the shared memory of any card
        _gain_kernel[(triton.cdiv(len(w), 16),)](w, A, B, m, gain, b, scale, *w.shape, len(A), **options)
'''

# ============================================================================================= common/loading.py

MODULES['common.loading'] = r'''
"""A model's files -> its parts on the device: noise schedule, VAE, text encoders, UNet. Never a second copy in RAM.

Whatever the user names (hub id, folder, single file) becomes one diffusers folder first; nothing else knows the difference.
Heavy libraries are imported where they are used: with warm caches a run needs neither VAE nor text encoders.
"""

import inspect
import itertools
import json
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Optional

import torch
from safetensors import SafetensorError, safe_open

from common.command_line import UserError
from common.hub import FP16_VAE
from common.noise import NoiseSchedule

VAE_FILES = ["config.json", "diffusion_pytorch_model.safetensors"]
PARTS = dict(unet="UNet2DConditionModel", text_encoder="CLIPTextModel", text_encoder_2="CLIPTextModelWithProjection")
READ = ["model_index.json", "scheduler/scheduler_config.json", *(f"tokenizer{part}/tokenizer_config.json" for part in ("", "_2"))]
CHUNK_BYTES = 512 * 2**20


@dataclass(frozen=True)
class Model:
    """A local diffusers folder of SDXL, and the folder of the VAE that goes with it."""

    name: str
    folder: Path
    vae: Path
    variant: Optional[str]


# ---------------------------------------------------------------- finding it


def find_model(name, vae=None, variant="fp16", revision=None, config="stabilityai/stable-diffusion-xl-base-1.0", cache_dir="."):
    """Turn what the user named into local folders, downloading only the files that are used (fp16: about 7 GB, not 14).

    Raises:
        UserError: not a diffusers model.
    """
    place = Path(name)
    if place.is_file():
        folder = _convert_single_file(place, config, Path(cache_dir))
    elif place.is_dir():
        folder = place
    else:
        vae = vae or FP16_VAE
        folder = _download_pipeline(name, variant, revision)
    _check_parts(name, folder)
    return Model(name, folder, _find_vae(vae or str(folder)), variant)


def _check_parts(name, folder):
    """Refuse what is not SDXL: Stable Diffusion 1.5 would be loaded far before it fails."""
    named = f"--pretrained_model_name_or_path {name}"
    if not (folder / "model_index.json").exists():
        raise UserError(f"{named}: no model_index.json in it, so it is not a diffusers model folder")
    for file in READ:
        _read_object(folder, file, named)
    for part, wanted in PARTS.items():
        config = _read_object(folder, f"{part}/config.json", named)
        found = config.get("_class_name") or (config.get("architectures") or ["nothing known"])[0]
        if found != wanted:
            raise UserError(f"{named}: its {part} is {found}, SDXL's is {wanted}")


def _read_object(folder, file, named):
    """The JSON object in folder/file; `named` is the flag and its value, for the message where there is none."""
    try:
        return dict(json.loads((folder / file).read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        raise UserError(f"{named}: no readable {file} in it; SDXL has one") from None


def _download_pipeline(repo_id, variant, revision):
    from diffusers import StableDiffusionXLPipeline

    unused = dict(vae=None, feature_extractor=None, image_encoder=None, safety_checker=None)
    return Path(StableDiffusionXLPipeline.download(repo_id, variant=variant, revision=revision, use_safetensors=True, **unused))


def _find_vae(vae):
    folder = Path(vae)
    if not folder.is_dir():
        from huggingface_hub import snapshot_download

        folder = Path(snapshot_download(vae, allow_patterns=VAE_FILES + [f"vae/{name}" for name in VAE_FILES]))
    for candidate in (folder, folder / "vae"):
        if (candidate / "config.json").exists():
            _read_object(candidate, "config.json", f"--pretrained_vae_model_name_or_path {vae}")
            return candidate
    raise UserError(f"--pretrained_vae_model_name_or_path {vae}: no config.json in it or in its vae folder")


def _convert_single_file(path, config, cache_dir):
    """A .safetensors checkpoint in the original layout -> a diffusers folder (fp16) under `cache_dir`, made once."""
    from diffusers import StableDiffusionXLPipeline

    if path.suffix != ".safetensors":
        raise UserError(f"--pretrained_model_name_or_path {path}: only .safetensors files are read; pickles can run code")
    stat = path.stat()
    folder = cache_dir / "single_file" / f"{path.stem}-{stat.st_size}-{stat.st_mtime_ns}"
    if not folder.exists():
        partial = folder.with_name(f"{folder.name}.{os.getpid()}")
        try:
            pipeline = StableDiffusionXLPipeline.from_single_file(str(path), config=config, dtype=torch.float16)
        except (SafetensorError, OSError, KeyError, ValueError) as error:
            raise UserError(f"--pretrained_model_name_or_path {path}: not a readable SDXL checkpoint ({error})") from None
        pipeline.save_pretrained(partial)
        shutil.rmtree(folder, ignore_errors=True)
        partial.rename(folder)
    return folder


def fingerprint(variant, *folders):
    """What identifies the models in `folders` for the caches: the files that are loaded, with size and time of change. Reads no weights."""
    files = []
    for folder in folders:
        loaded = _variant_in(folder, variant) or ""  # the part after the first dot: model.fp16-00001-of-00002.safetensors
        weights = [path for path in folder.glob("*.safetensors") if path.stem.partition(".")[2].partition("-")[0] == loaded]
        files += sorted([*weights, *folder.glob("*.json"), *folder.glob("*.txt")])
    return [(str(path.resolve()), path.stat().st_size, path.stat().st_mtime_ns) for path in files]


# ---------------------------------------------------------------- its parts


def load_noise_schedule(model, device):
    """The training noise schedule that belongs to the model's scheduler configuration -> NoiseSchedule on `device`."""
    from diffusers import DDPMScheduler

    config = DDPMScheduler.load_config(model.folder, subfolder="scheduler")
    # not from_config: it imports every scheduler there is, for seconds, to warn about settings that belong to another one
    scheduler = DDPMScheduler(**{name: config[name] for name in inspect.signature(DDPMScheduler.__init__).parameters if name in config})
    if scheduler.config.prediction_type not in ("epsilon", "v_prediction"):
        raise UserError(
            f"{model.name}: prediction type {scheduler.config.prediction_type!r} is not supported, only epsilon and v_prediction"
        )
    return NoiseSchedule(scheduler.alphas_cumprod.to(device, torch.float32), scheduler.config.prediction_type)


def load_vae(model, host):
    """AutoencoderKL on the device; in fp32 where its config says that fp16 overflows (`force_upcast`)."""
    from diffusers import AutoencoderKL

    upcast = AutoencoderKL.load_config(model.vae).get("force_upcast", True)
    dtype = torch.float32 if upcast else host.dtype
    vae = AutoencoderKL.from_pretrained(model.vae, variant=_variant_in(model.vae, model.variant), dtype=dtype, use_safetensors=True)
    return vae.to(host.device).requires_grad_(False).eval()


def load_text_encoders(model, host):
    """[(tokenizer, encoder)] of CLIP-L and bigG. The second must be CLIPTextModelWithProjection: its projection makes `pooled`."""
    from transformers import CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

    pairs = []
    for part, cls in (("", CLIPTextModel), ("_2", CLIPTextModelWithProjection)):
        folder = model.folder / f"text_encoder{part}"
        variant = _variant_in(folder, model.variant)
        encoder = cls.from_pretrained(folder, variant=variant, dtype=host.dtype, use_safetensors=True).to(host.device)
        try:
            tokenizer = CLIPTokenizer.from_pretrained(model.folder / f"tokenizer{part}")
        except (OSError, ValueError) as error:
            raise UserError(f"{model.folder}/tokenizer{part}: cannot be read ({str(error).splitlines()[0]})") from None
        if not 100 < len(tokenizer) <= encoder.config.vocab_size:  # without its files a tokenizer loads with 2 words
            raise UserError(
                f"{model.folder}/tokenizer{part}: {len(tokenizer)} words for {encoder.config.vocab_size} embeddings; files missing?"
            )
        pairs.append((tokenizer, encoder.requires_grad_(False).eval()))
    return pairs


def load_unet(model, host, quantize="none"):
    """The UNet, frozen, built without memory and filled straight on the device: RAM holds 0.5 GiB of it at a time.

    `quantize="nf4"` keeps the weights of its linear layers in 4 bits (bitsandbytes NF4, double quantisation), except those of the
    time and size embeddings; each is quantised as it arrives, so the device never holds the fp16 model either.
    """
    from diffusers import UNet2DConditionModel

    folder = model.folder / "unet"
    with torch.device("meta"):
        unet = UNet2DConditionModel.from_config(UNet2DConditionModel.load_config(folder))
        if quantize == "nf4":
            _make_linears_4bit(unet, host.dtype)
    fill(unet, weight_files(folder, model.variant), host.device, host.dtype)
    return unet.requires_grad_(False).train()


def _make_linears_4bit(unet, compute_dtype):
    from bitsandbytes.nn import Linear4bit

    for name, module in list(unet.named_modules()):
        if type(module) is torch.nn.Linear and not name.startswith(("time_embedding", "add_embedding")):
            parent, _, child = name.rpartition(".")
            options = dict(bias=module.bias is not None, compute_dtype=compute_dtype, quant_type="nf4", compress_statistics=True)
            layer = Linear4bit(module.in_features, module.out_features, **options)
            layer.support_avx512bf16_for_cpu = False  # else such a CPU repacks the weights in eval mode, which cuts their gradient
            setattr(unet.get_submodule(parent), child, layer)
    unet.is_loaded_in_4bit = True  # what PEFT asks before it treats a layer as 4-bit


def weight_files(folder, variant):
    """The safetensors files of a component: those of the variant when there are any, else the plain ones."""
    stem = f"diffusion_pytorch_model.{_variant_in(folder, variant)}" if _variant_in(folder, variant) else "diffusion_pytorch_model"
    files = sorted({*folder.glob(f"{stem}.safetensors"), *folder.glob(f"{stem}-*-of-*.safetensors")})
    if not files:
        raise UserError(f"{folder}: no {stem}.safetensors in it (only safetensors are read; pickles can run code)")
    return files


def fill(module, files, device, dtype):
    """Fill a module made on the meta device from safetensors files.

    A file is mapped for CHUNK_BYTES at a time: what was read is not counted as ours for longer than that.
    Raises:
        UserError: a damaged file, or names that do not fit the module.
    """
    missing = set(module.state_dict())
    for file in files:
        for names in _chunks(file):
            with safe_open(file, "pt", device=str(device)) as tensors:
                chunk = {name: tensors.get_tensor(name).to(dtype) for name in names}
            if unknown := chunk.keys() - missing:
                raise UserError(f"{file}: {sorted(unknown)[0]} does not belong to this architecture")
            missing -= chunk.keys()
            for name in [name for name in chunk if name.endswith(".weight") and _is_4bit(module, name)]:
                layer = module.get_submodule(name.removesuffix(".weight"))
                empty = layer.weight
                options = dict(
                    requires_grad=False, compress_statistics=empty.compress_statistics, quant_type=empty.quant_type, module=layer
                )
                layer.weight = type(empty)(chunk.pop(name), **options).to(device)  # Params4bit quantises when it is moved
            module.load_state_dict(chunk, strict=False, assign=True)
    if missing:
        raise UserError(f"{files[0].parent}: {len(missing)} weights are missing, e.g. {sorted(missing)[0]}")


def _is_4bit(module, weight_name):
    return type(module.get_parameter(weight_name)).__name__ == "Params4bit"  # by name: bitsandbytes may not be installed


def _chunks(file):
    """The tensor names of a file, in its own order, in lists of about CHUNK_BYTES."""
    try:
        with safe_open(file, "pt") as tensors:
            names = list(tensors.offset_keys())
            sizes = {name: 2 * torch.Size(tensors.get_slice(name).get_shape()).numel() for name in names}
    except SafetensorError as error:
        raise UserError(f"{file}: damaged ({error}); download or copy it again") from None
    ends = itertools.accumulate(sizes.values())
    for _, group in itertools.groupby(zip(names, ends), key=lambda pair: pair[1] // CHUNK_BYTES):
        yield [name for name, _ in group]


def _variant_in(folder, variant):
    return variant if variant and any(folder.glob(f"*.{variant}*.safetensors")) else None


def zero_unconditional(model):
    """Whether the model's unconditional input is zeros (SDXL base) rather than the encoded empty prompt."""
    return json.loads((model.folder / "model_index.json").read_text()).get("force_zeros_for_empty_prompt", True)
'''

# =============================================================================================== common/loops.py

MODULES['common.loops'] = r'''
"""Steps, from the first or from a checkpoint, to the last: validation, checkpoints, early stop, time limit, signals."""

import contextlib
import math
import signal
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Optional

from common import checkpoint, device
from common.command_line import UserError
from common.engine import PassOutOfMemory

NON_FINITE_LIMIT = 3  # batches in a row without a finite loss, before the run gives up
SMALLEST_SCALE = 2.0**-10


@dataclass(frozen=True)
class Plan:
    """How long, how much at a time, and what happens on the way. Steps are optimizer steps."""

    output_dir: Path
    total_steps: int
    effective_batch: int
    checkpointing_steps: int
    checkpoints_total_limit: Optional[int]
    validation_steps: int
    early_stopping_patience: Optional[int] = None
    ends_s: float = math.inf  # on the monotonic clock: by then everything must be saved


@dataclass
class Progress:
    """Where a run stands; saved with every checkpoint."""

    step: int = 0  # optimizer steps done
    batches: int = 0  # effective batches used: the steps, and those skipped for a loss that was not finite
    effective_batch: int = 0  # images of a step; another number would read the data from another place
    best_val_loss: float = math.inf
    validations_without_gain: int = 0


def total_steps(max_train_steps, num_train_epochs, num_samples, effective_batch):
    """Optimizer steps of a run: `max_train_steps` wins; otherwise as many as cover the epochs. Windows run across epoch ends."""
    return max_train_steps or math.ceil(num_train_epochs * num_samples / effective_batch)


def train(engine, examples, held_out, plan, fit, report, progress, draw_samples, save_weights):
    """Run to the end of the plan, or until a signal, the time limit or early stopping ends it; returns (progress, why it ended).

    Args:
        examples, held_out: batching.Examples; held_out may be None.
        fit: fit.Fit, how a step is cut into passes; stepped down when one does not fit the memory.
        draw_samples: step -> None, draws the validation images.
        save_weights: step -> None, writes the adapter files of a checkpointed step.
    Raises:
        UserError: the loss is not finite NON_FINITE_LIMIT times in a row (after a checkpoint).
    """
    host, non_finite = engine.host, 0
    ended = "early stopping" if _out_of_patience(plan, progress) else "finished"  # a run that had stopped early stays so
    stopping = StopRequest(plan.ends_s)
    fetch = _Prefetch(lambda number: examples.effective_batch(number, plan.effective_batch, fit.micro_batch, host.rank, host.world))
    save = _Saver(engine, plan, save_weights, progress.step)
    with stopping.listening():
        while progress.step < plan.total_steps and ended == "finished":
            step_started = time.monotonic()
            batches = fetch(progress.batches)
            try:
                result = engine.step(progress.step + 1, batches, stopping.reason is not None, lambda: fetch.prepare(progress.batches + 1))
            except PassOutOfMemory:
                _step_down(fit, report)
                fetch.forget()
                continue
            if not result.applied:
                skipped = _skip_batch(engine, result, report)
                progress.batches += skipped
                non_finite = non_finite + 1 if skipped else 0
                if non_finite == NON_FINITE_LIMIT:
                    save(progress)
                    raise UserError(_non_finite_message(examples, progress, plan))
                continue
            non_finite = 0
            progress.step, progress.batches = progress.step + 1, progress.batches + 1
            row = _row(result, progress, plan, len(examples.latents), time.monotonic() - step_started, engine)
            if progress.step % plan.validation_steps == 0 or progress.step == plan.total_steps:
                draw_samples(progress.step)
                if held_out is not None:
                    row["val_loss"] = _validate(engine, held_out, fit.micro_batch, progress)
            report.log(row)
            stopping.longest_step_s = max(stopping.longest_step_s, time.monotonic() - step_started)
            if result.stop:
                ended = stopping.reason or "stopped by another process"
            elif _out_of_patience(plan, progress):
                ended = "early stopping"
            elif plan.checkpointing_steps and progress.step % plan.checkpointing_steps == 0:
                stopping.longest_save_s = max(stopping.longest_save_s, save(progress))
        save(progress)
    return progress, ended


def _out_of_patience(plan, progress):
    return plan.early_stopping_patience is not None and progress.validations_without_gain >= plan.early_stopping_patience


class StopRequest:
    """SIGINT, SIGTERM or the time limit: the step in flight is finished, then a checkpoint is written.

    The limit is `ends_s` less what ending takes: the step in flight and the next one, a checkpoint, and the results, which
    take about as long as two more. The loop keeps `longest_step_s` and `longest_save_s` up to date.
    """

    def __init__(self, ends_s):
        self._signal, self._ends_s = None, ends_s
        self.longest_step_s, self.longest_save_s = 0.0, 0.0

    @property
    def reason(self):
        ending_s = 2 * self.longest_step_s + 3 * self.longest_save_s
        return self._signal or ("time limit reached" if time.monotonic() + ending_s > self._ends_s else None)

    @contextlib.contextmanager
    def listening(self):
        """Inside, the first signal asks for a stop; a second one acts as usual."""
        before = {}

        def ask(number, frame):
            self._signal = f"{signal.Signals(number).name} received"
            signal.signal(number, before[number])

        for number in (signal.SIGINT, signal.SIGTERM):
            before[number] = signal.signal(number, ask)
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


class _Prefetch:
    """The result of `make(number)`, made ahead of time when `prepare` is given a chance."""

    def __init__(self, make):
        self._make, self._number, self._made = make, None, None

    def prepare(self, number):
        if number != self._number:
            self._number, self._made = number, self._make(number)

    def forget(self):
        self._number = None

    def __call__(self, number):
        self.prepare(number)
        return self._made


class _Saver:
    """Writes the adapter file and a checkpoint of a step, unless that step's are there already; returns the seconds it took."""

    def __init__(self, engine, plan, save_weights, step):
        self._engine, self._plan, self._save_weights, self._saved = engine, plan, save_weights, step

    def __call__(self, progress):
        started = time.monotonic()
        if self._engine.host.is_main and progress.step != self._saved:
            self._save_weights(progress.step)  # first: from the checkpoint on, a killed run would not come back to write it
            limit = self._plan.checkpoints_total_limit
            checkpoint.save_checkpoint(self._plan.output_dir, progress.step, self._engine, asdict(progress), limit)
        self._saved = progress.step
        self._engine.host.barrier()
        return time.monotonic() - started


def _step_down(fit, report):
    if not fit.step_down():
        raise UserError(
            "out of GPU memory with one image a pass and every block recomputed: lower --resolution or --lora_rank, use --use_8bit_adam,"
            " or train_qlora.py; --resume_from_checkpoint latest goes on from the last checkpoint"
        )
    recomputed = "every block recomputed" if fit.checkpointing and not fit.checkpointing.kept else "as before otherwise"
    report.say(f"out of GPU memory: the step is repeated with {fit.micro_batch} images a pass, {recomputed}")


def _skip_batch(engine, result, report):
    """After a step that was not applied: whether to drop its batch. A mere gradient overflow is tried again at half the scale."""
    if math.isfinite(result.loss) and engine.loss_scale.enabled and result.loss_scale > SMALLEST_SCALE:
        report.say(f"gradients overflowed in fp16 at loss scale {result.loss_scale:g}: the step is repeated at half of it")
        return False
    report.say(f"loss {result.loss}, gradient norm {result.grad_norm}: the batch is skipped")
    return True


def _non_finite_message(examples, progress, plan):
    first = (progress.batches - NON_FINITE_LIMIT) * plan.effective_batch
    names = dict.fromkeys(examples.name_at(i) for i in range(first, progress.batches * plan.effective_batch))
    return (
        f"the loss was not finite in {NON_FINITE_LIMIT} batches in a row, made of {', '.join(names)}; look at these images,"
        f" lower --learning_rate, or use --mixed_precision no{'; a checkpoint was saved' if progress.step else ''}"
    )


def _row(result, progress, plan, num_samples, seconds, engine):
    """One line of metrics.jsonl."""
    return dict(
        step=progress.step,
        epoch=round(progress.batches * plan.effective_batch / num_samples, 4),
        loss=result.loss,
        mse=result.mse,
        **{f"mse_t{i}": value for i, value in enumerate(result.mse_quarters)},
        lr=result.lr,
        grad_norm=result.grad_norm,
        loss_scale=result.loss_scale,
        s_per_img=seconds / plan.effective_batch,
        peak_gib=device.peak_gib(engine.host.device),
        seconds=round(device.seconds_since_start(), 2),
    )


def _validate(engine, held_out, micro_batch, progress):
    loss = engine.validate(held_out.validation_batches(micro_batch, engine.host.rank, engine.host.world))
    gained = loss < progress.best_val_loss
    progress.best_val_loss = min(loss, progress.best_val_loss)
    progress.validations_without_gain = 0 if gained else progress.validations_without_gain + 1
    return loss
'''

# =============================================================================================== common/noise.py

MODULES['common.noise'] = r'''
"""What noise does to a latent, and what the loss makes of it. Pure functions of tensors; the draws belong to the samples.

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


def generator_for(*identity):
    """A CPU generator that depends on `identity` alone: the same draws in any batch, any process, beside any device."""
    digest = hashlib.blake2b(repr(identity).encode(), digest_size=8).digest()
    return torch.Generator("cpu").manual_seed(int.from_bytes(digest, "little") >> 1)


def draw(generator, shape, num_timesteps, flip_share=0.0, drop_share=0.0, offset_strength=0.0):
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
    return Draws(flip < flip_share, drop < drop_share, timestep, posterior_eps, eps + offset_strength * offset)


@dataclass(frozen=True)
class NoiseSchedule:
    """The forward process of a model: alphas_cumprod [T] in fp32 on the training device, and what the UNet predicts."""

    alphas_cumprod: torch.Tensor
    prediction_type: str  # "epsilon" or "v_prediction"

    def noise(self, z, eps, t):
        """x_t and the UNet's target: x_t = sqrt(a) z + sqrt(1 - a) eps (arXiv 2006.11239, eq. 4);
        v = sqrt(a) eps - sqrt(1 - a) z (arXiv 2202.00512, app. D). `t` is [B], the rest [B, C, H, W]."""
        a = self.alphas_cumprod[t].view(-1, 1, 1, 1)
        x_t = a.sqrt() * z + (1 - a).sqrt() * eps
        return x_t, eps if self.prediction_type == "epsilon" else a.sqrt() * eps - (1 - a).sqrt() * z

    def min_snr_weight(self, t, gamma):
        """Loss weights [B] of Min-SNR-gamma (arXiv 2303.09556, sec. 3.4): min(snr, g) / snr for epsilon prediction,
        min(snr, g) / (snr + 1) for v prediction. Noisy steps (snr <= g) keep weight 1; snr = 0 gives 1, not 0 / 0."""
        a = self.alphas_cumprod[t]
        snr = a / (1 - a)
        if self.prediction_type == "epsilon":
            return (gamma / snr).clamp(max=1.0)
        return snr.clamp(max=gamma) / (snr + 1)


def mse_per_sample(prediction, target):
    """Mean squared error of each example in fp32: [B, C, H, W] twice -> [B]."""
    return F.mse_loss(prediction.float(), target.float(), reduction="none").mean(dim=(1, 2, 3))


def by_quarter(values, t, num_timesteps):
    """Sum `values` [B] into the quarter of the schedule that their timestep `t` [B] lies in -> [QUARTERS]."""
    return torch.zeros(QUARTERS, dtype=values.dtype, device=values.device).index_add_(0, t * QUARTERS // num_timesteps, values)
'''

# ======================================================================================== common/norm_kernels.py

MODULES['common.norm_kernels'] = r'''
"""Normalisations of frozen layers on a GPU, in one or two passes over memory, with what comes before and after them.

GroupNorm reads channels-last images, adds the time embedding before and applies SiLU after; LayerNorm adds the residual before.
Their weights are frozen, so the backward pass gives the input's gradient only and keeps nothing but the input.
All sums are in fp32 over deviations from the mean, never differences of large squares.
"""

import torch
import torch.nn.functional as F

if torch.cuda.is_available():  # Triton comes with the CUDA builds of torch only
    import triton
    import triton.language as tl

    @triton.jit
    def _tile(pixels, channels, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
        """Offsets in one image, channel numbers and mask of the tile of this program."""
        row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)[:, None]
        column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)[None, :]
        at = tl.program_id(2).to(tl.int64) * pixels * channels + row * channels + column
        return at, column, (row < pixels) & (column < channels)

    @triton.jit
    def _moments_kernel(x, shift, mean, deviation, pixels, channels, SHIFT: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
        """Of every tile and channel: mean, and sum of squared deviations from it."""
        at, column, inside = _tile(pixels, channels, ROWS, COLUMNS)
        value = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
        if SHIFT:
            value += tl.load(shift + tl.program_id(2) * channels + column, mask=column < channels, other=0.0).to(tl.float32)
        count = tl.minimum(ROWS, pixels - tl.program_id(0) * ROWS)
        average = tl.sum(tl.where(inside, value, 0.0), axis=0)[None, :] / count
        apart = tl.where(inside, value - average, 0.0)
        to = (tl.program_id(2) * tl.num_programs(0) + tl.program_id(0)) * channels + column
        tl.store(mean + to, average, mask=column < channels)
        tl.store(deviation + to, tl.sum(apart * apart, axis=0)[None, :], mask=column < channels)

    @triton.jit
    def _group_tile(start, tiles, channels, SIZE, TILES: tl.constexpr, WIDTH: tl.constexpr):
        """Tile numbers, offsets in per-tile sums and mask: the channels of this program's group."""
        tile = start + tl.arange(0, TILES)[:, None]
        inside_group = tl.arange(0, WIDTH)[None, :]
        at = (tl.program_id(1) * tiles + tile) * channels + tl.program_id(0) * SIZE + inside_group
        return tile, at, (tile < tiles) & (inside_group < SIZE)

    @triton.jit
    def _merge_moments_kernel(
        mean, deviation, weight, shift, scale, centre, inverse, tiles, pixels, channels, SIZE, eps,
        SHIFT: tl.constexpr, ROWS: tl.constexpr, TILES: tl.constexpr, WIDTH: tl.constexpr,
    ):  # fmt: skip
        """Of every group: 1 / standard deviation; of every channel: y = (x + centre) scale + bias."""
        total = pixels * SIZE
        sums = tl.zeros((TILES, WIDTH), dtype=tl.float32)
        for start in range(0, tiles, TILES):
            tile, at, inside = _group_tile(start, tiles, channels, SIZE, TILES, WIDTH)
            sums += tl.load(mean + at, mask=inside, other=0.0) * tl.minimum(ROWS, pixels - tile * ROWS)
        average = tl.sum(tl.sum(sums, axis=1), axis=0) / total
        sums = tl.zeros((TILES, WIDTH), dtype=tl.float32)
        for start in range(0, tiles, TILES):
            tile, at, inside = _group_tile(start, tiles, channels, SIZE, TILES, WIDTH)
            apart = tl.where(inside, tl.load(mean + at, mask=inside, other=0.0) - average, 0.0)
            sums += tl.load(deviation + at, mask=inside, other=0.0) + apart * apart * tl.minimum(ROWS, pixels - tile * ROWS)
        r = tl.rsqrt(tl.sum(tl.sum(sums, axis=1), axis=0) / total + eps)
        tl.store(inverse + tl.program_id(1) * tl.num_programs(0) + tl.program_id(0), r)
        channel, inside = tl.program_id(0) * SIZE + tl.arange(0, WIDTH), tl.arange(0, WIDTH) < SIZE
        to = tl.program_id(1) * channels + channel
        tl.store(scale + to, r * tl.load(weight + channel, mask=inside, other=0.0).to(tl.float32), mask=inside)
        added = tl.load(shift + to, mask=inside, other=0.0).to(tl.float32) if SHIFT else tl.zeros((WIDTH,), dtype=tl.float32)
        tl.store(centre + to, added - average, mask=inside)

    @triton.jit
    def _group_norm_kernel(x, scale, centre, bias, y, pixels, channels, SILU: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
        at, column, inside = _tile(pixels, channels, ROWS, COLUMNS)
        of_channel, known = tl.program_id(2) * channels + column, column < channels
        u = tl.load(x + at, mask=inside, other=0.0).to(tl.float32) + tl.load(centre + of_channel, mask=known, other=0.0)
        z = u * tl.load(scale + of_channel, mask=known, other=0.0) + tl.load(bias + column, mask=known, other=0.0).to(tl.float32)
        if SILU:
            z = z * tl.sigmoid(z)
        tl.store(y + at, z, mask=inside)

    @triton.jit
    def _group_gradient(x, dy, scale, centre, bias, pixels, channels, SILU: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
        """Of this program's tile: offsets, channels, mask, deviation u from the group's mean, dL/dz, scale."""
        at, column, inside = _tile(pixels, channels, ROWS, COLUMNS)
        of_channel, known = tl.program_id(2) * channels + column, column < channels
        u = tl.load(x + at, mask=inside, other=0.0).to(tl.float32) + tl.load(centre + of_channel, mask=known, other=0.0)
        k, dz = tl.load(scale + of_channel, mask=known, other=0.0), tl.load(dy + at, mask=inside, other=0.0).to(tl.float32)
        if SILU:
            z = u * k + tl.load(bias + column, mask=known, other=0.0).to(tl.float32)
            s = tl.sigmoid(z)
            dz = dz * s * (1 + z * (1 - s))
        return at, column, inside, u, dz, k

    @triton.jit
    def _gradient_sums_kernel(
        x, dy, scale, centre, bias, sum_dz, sum_dz_u, pixels, channels, SILU: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr
    ):
        """Of every tile and channel: sums of dz scale and of dz scale u."""
        _, column, inside, u, dz, k = _group_gradient(x, dy, scale, centre, bias, pixels, channels, SILU, ROWS, COLUMNS)
        to = (tl.program_id(2) * tl.num_programs(0) + tl.program_id(0)) * channels + column
        dz = tl.where(inside, dz * k, 0.0)
        tl.store(sum_dz + to, tl.sum(dz, axis=0)[None, :], mask=column < channels)
        tl.store(sum_dz_u + to, tl.sum(dz * u, axis=0)[None, :], mask=column < channels)

    @triton.jit
    def _merge_gradient_kernel(
        sum_dz, sum_dz_u, inverse, offset, slope, tiles, pixels, channels, SIZE, TILES: tl.constexpr, WIDTH: tl.constexpr
    ):
        """Of every group: dx = dz scale - offset - slope u."""
        first, second = tl.zeros((TILES, WIDTH), dtype=tl.float32), tl.zeros((TILES, WIDTH), dtype=tl.float32)
        for start in range(0, tiles, TILES):
            _, at, inside = _group_tile(start, tiles, channels, SIZE, TILES, WIDTH)
            first += tl.load(sum_dz + at, mask=inside, other=0.0)
            second += tl.load(sum_dz_u + at, mask=inside, other=0.0)
        to, total = tl.program_id(1) * tl.num_programs(0) + tl.program_id(0), pixels * SIZE
        r = tl.load(inverse + to)
        tl.store(offset + to, tl.sum(tl.sum(first, axis=1), axis=0) / total)
        tl.store(slope + to, tl.sum(tl.sum(second, axis=1), axis=0) / total * r * r)

    @triton.jit
    def _group_norm_backward_kernel(
        x, dy, scale, centre, bias, offset, slope, dx, pixels, channels, SIZE,
        SILU: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    ):  # fmt: skip
        at, column, inside, u, dz, k = _group_gradient(x, dy, scale, centre, bias, pixels, channels, SILU, ROWS, COLUMNS)
        group, known = tl.program_id(2) * (channels // SIZE) + column // SIZE, column < channels
        a, b = tl.load(offset + group, mask=known, other=0.0), tl.load(slope + group, mask=known, other=0.0)
        tl.store(dx + at, dz * k - a - b * u, mask=inside)

    @triton.jit
    def _add_norm_kernel(h, a, weight, bias, total, y, width, eps, ADD: tl.constexpr, BLOCK: tl.constexpr):
        i = tl.arange(0, BLOCK)
        at, inside = tl.program_id(0).to(tl.int64) * width + i, i < width
        value = tl.load(h + at, mask=inside, other=0.0).to(tl.float32)
        if ADD:
            value += tl.load(a + at, mask=inside, other=0.0).to(tl.float32)
            tl.store(total + at, value, mask=inside)
            value = value.to(total.dtype.element_ty).to(tl.float32)  # what is stored is what the backward pass will see
        apart = tl.where(inside, value - tl.sum(value, axis=0) / width, 0.0)
        r = tl.rsqrt(tl.sum(apart * apart, axis=0) / width + eps)
        w, b = tl.load(weight + i, mask=inside, other=0.0).to(tl.float32), tl.load(bias + i, mask=inside, other=0.0).to(tl.float32)
        tl.store(y + at, apart * r * w + b, mask=inside)

    @triton.jit
    def _add_norm_backward_kernel(total, dy, dtotal, weight, dx, width, eps, BLOCK: tl.constexpr):
        i = tl.arange(0, BLOCK)
        at, inside = tl.program_id(0).to(tl.int64) * width + i, i < width
        value = tl.load(total + at, mask=inside, other=0.0).to(tl.float32)
        apart = tl.where(inside, value - tl.sum(value, axis=0) / width, 0.0)
        r = tl.rsqrt(tl.sum(apart * apart, axis=0) / width + eps)
        g = tl.load(dy + at, mask=inside, other=0.0).to(tl.float32) * tl.load(weight + i, mask=inside, other=0.0).to(tl.float32)
        g = r * (g - tl.sum(g, axis=0) / width - apart * r * r * tl.sum(g * apart, axis=0) / width)
        tl.store(dx + at, g + tl.load(dtotal + at, mask=inside, other=0.0).to(tl.float32), mask=inside)

    @triton.jit
    def _add_bias_kernel(x, h, bias, y, channels, n, BLOCK: tl.constexpr):
        i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
        value = tl.load(x + i, mask=i < n).to(tl.float32) + tl.load(h + i, mask=i < n).to(tl.float32)
        tl.store(y + i, value + tl.load(bias + i % channels, mask=i < n).to(tl.float32), mask=i < n)


COLUMNS, TILES, BLOCK = 64, 32, 1024


def _rows(pixels):
    """Pixels of a tile: few tiles for large images, many for small ones."""
    return max(32, triton.next_power_of_2(triton.cdiv(pixels, 256)))


class _GroupNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, shift, norm, silu):
        x = x.contiguous(memory_format=torch.channels_last)
        (images, channels, height, width), size = x.shape, norm.num_channels // norm.num_groups
        pixels, rows = height * width, _rows(height * width)
        tiles = triton.cdiv(pixels, rows)
        new = lambda *shape: torch.empty(shape, device=x.device, dtype=torch.float32)  # noqa: E731
        mean, deviation = new(images, tiles, channels), new(images, tiles, channels)
        scale, centre, inverse = new(images, channels), new(images, channels), new(images, norm.num_groups)
        grid, shifted = (tiles, triton.cdiv(channels, COLUMNS), images), shift is not None
        shift_or_any = shift.contiguous() if shifted else x
        _moments_kernel[grid](x, shift_or_any, mean, deviation, pixels, channels, SHIFT=shifted, ROWS=rows, COLUMNS=COLUMNS)
        _merge_moments_kernel[(norm.num_groups, images)](
            mean, deviation, norm.weight, shift_or_any, scale, centre, inverse, tiles, pixels, channels, size, norm.eps,
            SHIFT=shifted, ROWS=rows, TILES=TILES, WIDTH=triton.next_power_of_2(size),
        )  # fmt: skip
        y = torch.empty_like(x)
        _group_norm_kernel[grid](x, scale, centre, norm.bias, y, pixels, channels, SILU=silu, ROWS=rows, COLUMNS=COLUMNS)
        ctx.save_for_backward(x, scale, centre, inverse)
        ctx.norm, ctx.silu, ctx.tiling = norm, silu, (grid, rows, tiles, pixels, size)
        return y

    @staticmethod
    def backward(ctx, dy):
        (x, scale, centre, inverse), norm, (grid, rows, tiles, pixels, size) = ctx.saved_tensors, ctx.norm, ctx.tiling
        (images, channels), dy = scale.shape, dy.contiguous(memory_format=torch.channels_last)
        sum_dz = torch.empty(images, tiles, channels, device=x.device, dtype=torch.float32)
        sum_dz_u, offset, slope = torch.empty_like(sum_dz), torch.empty_like(inverse), torch.empty_like(inverse)
        given, how = (x, dy, scale, centre, norm.bias), dict(SILU=ctx.silu, ROWS=rows, COLUMNS=COLUMNS)
        _gradient_sums_kernel[grid](*given, sum_dz, sum_dz_u, pixels, channels, **how)
        _merge_gradient_kernel[(norm.num_groups, images)](
            sum_dz, sum_dz_u, inverse, offset, slope, tiles, pixels, channels, size, TILES=TILES, WIDTH=triton.next_power_of_2(size)
        )
        dx = torch.empty_like(x)
        _group_norm_backward_kernel[grid](*given, offset, slope, dx, pixels, channels, size, **how)
        dshift = dx.sum((2, 3)) if ctx.needs_input_grad[1] else None
        return dx, dshift, None, None


def group_norm(x, norm, silu=False, shift=None):
    """silu(GroupNorm(x + shift)), with silu and shift as asked for.

    Args:
        x: [B, C, H, W]; channels-last on a GPU.
        norm: torch.nn.GroupNorm whose parameters need no gradient.
        shift: [B, C] or None.
    """
    if x.is_cuda:
        return _GroupNorm.apply(x, shift, norm, silu)
    x = x if shift is None else x + shift[:, :, None, None]
    y = F.group_norm(x, norm.num_groups, norm.weight, norm.bias, norm.eps)
    return F.silu(y) if silu else y


class _AddNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, h, a, norm):
        h, width = h.contiguous(), h.shape[-1]
        total, y = h if a is None else torch.empty_like(h), torch.empty_like(h)
        a_or_any = h if a is None else a.contiguous()
        _add_norm_kernel[(h.numel() // width,)](
            h, a_or_any, norm.weight, norm.bias, total, y, width, norm.eps, ADD=a is not None, BLOCK=triton.next_power_of_2(width)
        )
        ctx.save_for_backward(total)
        ctx.norm, ctx.added = norm, a is not None
        return total, y

    @staticmethod
    def backward(ctx, dtotal, dy):
        ((total,), norm, width) = ctx.saved_tensors, ctx.norm, dy.shape[-1]
        dx, block = torch.empty_like(total), triton.next_power_of_2(width)
        _add_norm_backward_kernel[(total.numel() // width,)](
            total, dy.contiguous(), dtotal.contiguous(), norm.weight, dx, width, norm.eps, BLOCK=block
        )
        return dx, dx if ctx.added else None, None


def add_norm(h, a, norm):
    """(h + a, LayerNorm(h + a)), or (h, LayerNorm(h)) when a is None; both [..., C]. The parameters of `norm` need no gradient."""
    if h.is_cuda:
        return _AddNorm.apply(h, a, norm)
    total = h if a is None else a + h
    return total, norm(total)


class _AddBias(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, h, bias):
        x, h = (image.contiguous(memory_format=torch.channels_last) for image in (x, h))
        y = torch.empty_like(x)
        _add_bias_kernel[(triton.cdiv(x.numel(), BLOCK),)](x, h, bias, y, x.shape[1], x.numel(), BLOCK=BLOCK)
        return y

    @staticmethod
    def backward(ctx, dy):
        return dy, dy, None


def add_bias(x, h, bias):
    """x + h + bias: [B, C, H, W], the same, and [C], which needs no gradient."""
    return _AddBias.apply(x, h, bias) if x.is_cuda else x + (h + bias[:, None, None])
'''

# ============================================================================================== common/report.py

MODULES['common.report'] = r'''
"""What a run shows: one progress bar, metrics.jsonl, a tracker, training.png, and grids of labelled images."""

import importlib
import json
import os
from pathlib import Path

from tqdm import tqdm

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
        self.bar = tqdm(total=total_steps, initial=resumed_step, desc="training", unit="step", disable=not is_main)
        if not is_main:
            return
        self.path = Path(output_dir) / "metrics.jsonl"
        kept = [row for row in read_metrics(self.path) if row["step"] <= resumed_step] if resumed_step else []
        partial = self.path.with_name(self.path.name + ".partial")
        partial.write_text("".join(json.dumps(row) + "\n" for row in kept))
        os.replace(partial, self.path)
        self.file = self.path.open("a")
        self.tracker = None
        if report_to != "none":
            tracker_class = getattr(importlib.import_module("accelerate.tracking"), TRACKERS[report_to])
            where = {"logging_dir": str(output_dir)} if report_to == "tensorboard" else {}
            self.tracker = tracker_class(Path(output_dir).name, **where)
            self.tracker.start()
            scalars = {key: value if isinstance(value, (bool, int, float, str)) else str(value) for key, value in config.items()}
            self.tracker.store_init_configuration(scalars)

    def log(self, row):
        """One optimizer step: to the bar, the file and the tracker."""
        if not self.is_main:
            return
        shown = dict(loss=f"{row['loss']:.4f}", lr=f"{row['lr']:.1e}", s_img=f"{row['s_per_img']:.3f}", peak_gib=f"{row['peak_gib']:.2f}")
        self.bar.set_postfix(shown, refresh=False)
        self.bar.update()
        self.file.write(json.dumps(row) + "\n")
        self.file.flush()
        if self.tracker:
            self.tracker.log({key: value for key, value in row.items() if isinstance(value, (int, float))}, step=row["step"])

    def say(self, line):
        """Print a line without breaking the bar."""
        if self.is_main:
            self.bar.write(line)

    def close(self):
        self.bar.close()
        if self.is_main:
            self.file.close()
            if self.tracker:
                self.tracker.finish()


def read_metrics(path):
    """Rows of a metrics.jsonl; a last line cut short by a kill is left out."""
    rows = []
    for line in path.read_text().splitlines() if path.exists() else ():
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return rows


def plot_training(output_dir):
    """training.png from metrics.jsonl: loss with a running mean, held-out loss, and the learning rate."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    rows = read_metrics(Path(output_dir) / "metrics.jsonl")
    if not rows:
        return
    steps, losses = [row["step"] for row in rows], [row["loss"] for row in rows]
    figure, (top, bottom) = plt.subplots(2, 1, figsize=(9, 6), sharex=True, height_ratios=[3, 1], constrained_layout=True)
    top.plot(steps, losses, color="0.75", linewidth=0.8, label="loss of each step")
    top.plot(steps, _running_mean(losses, max(5, len(losses) // 20)), color="tab:blue", label="running mean")
    held_out = [(row["step"], row["val_loss"]) for row in rows if "val_loss" in row]
    if held_out:
        top.plot(*zip(*held_out), color="tab:red", marker="o", markersize=3, label="held-out mse")
    top.set_ylabel("loss")
    top.legend(frameon=False)
    bottom.plot(steps, [row["lr"] for row in rows], color="tab:green")
    bottom.set_ylabel("learning rate")
    bottom.set_xlabel("optimizer step")
    for axis in (top, bottom):
        axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(Path(output_dir) / "training.png", dpi=120)
    plt.close(figure)


def _running_mean(values, window):
    sums = [0.0]
    for value in values:
        sums.append(sums[-1] + value)
    return [(sums[i + 1] - sums[max(0, i + 1 - window)]) / min(i + 1, window) for i in range(len(values))]


def save_png(path, image, text):
    """Write a PIL image as PNG with `text` {chunk name: str} in it; a reader finds all of it or nothing."""
    from PIL.PngImagePlugin import PngInfo

    info = PngInfo()
    for name, value in text.items():
        info.add_text(name, value)
    partial = path.with_name(path.name + ".partial")
    image.save(partial, format="PNG", pnginfo=info)
    os.replace(partial, path)


CELL_PX, GAP_PX = (256, 512), 10
PAPER, INK, PALE_INK = "#ffffff", "#1c1c22", "#77777f"


def grid(rows, column_titles, row_labels, footer):
    """One labelled picture of many: titles on top, labels at the left, `footer` in small print below.

    Args:
        rows: list of rows of PIL images, all of one size. A side is drawn with 256 to 512 px: less cannot be seen beside its
            label, more makes a file that nobody can send.
    """
    import matplotlib
    from PIL import Image, ImageDraw, ImageFont

    side = min(max(rows[0][0].width, CELL_PX[0]), CELL_PX[1])
    letters = Path(matplotlib.get_data_path()) / "fonts/ttf/DejaVuSans.ttf"  # Pillow's own font stops at ASCII
    font, small = ImageFont.truetype(letters, side / 14), ImageFont.truetype(letters, side / 20)
    left = side * 2 // 3
    titles = [_wrap(title, font, side) for title in column_titles]
    top = max(_height(title, font) for title in titles) + 2 * GAP_PX
    width = left + len(titles) * (side + GAP_PX) + GAP_PX
    footer = _wrap(footer, small, width - 2 * GAP_PX)
    height = top + len(rows) * (side + GAP_PX) + _height(footer, small) + GAP_PX
    sheet = Image.new("RGB", (width, height), PAPER)
    pen = ImageDraw.Draw(sheet)
    for j, title in enumerate(titles):
        x = left + GAP_PX + j * (side + GAP_PX) + side // 2
        pen.multiline_text((x, top - GAP_PX), title, INK, font, anchor="md", align="center")
    for i, (label, images) in enumerate(zip(row_labels, rows)):
        y = top + i * (side + GAP_PX)
        pen.multiline_text((GAP_PX, y + side // 2), _wrap(label, font, left - GAP_PX), INK, font, anchor="lm")
        for j, image in enumerate(images):
            # Enlarged pixels stay sharp: a small image should look like what it is.
            method = Image.Resampling.NEAREST if image.width < side else Image.Resampling.LANCZOS
            sheet.paste(image.convert("RGB").resize((side, side), method), (left + GAP_PX + j * (side + GAP_PX), y))
    pen.multiline_text((GAP_PX, height - GAP_PX), footer, PALE_INK, small, anchor="ld")
    return sheet


def _wrap(text, font, width_px):
    """`text` broken into lines that fit; a word that is too long alone is cut."""
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
    return "\n".join(line for line in lines if line)


def _height(text, font):
    from PIL import Image, ImageDraw

    return ImageDraw.Draw(Image.new("L", (1, 1))).multiline_textbbox((0, 0), text, font)[3]
'''

# ============================================================================================ common/sampling.py

MODULES['common.sampling'] = r'''
"""Adapters -> images. One generator per image, so an image is the same alone or in a batch, on any device."""

import dataclasses
import gc
import math

import torch
from tqdm import tqdm

from common import adapter_loading, device, fused_unet, loading
from common.adapters import without_dropout
from common.command_line import UserError
from common.graphs import Graphed
from common.schedulers import make_scheduler

STEPS, GUIDANCE = 30, 7.5
# GiB on the GPU, fp16: all of SDXL's weights, those of the UNet, and what one image of 1024 px needs beside them.
ALL_GIB, UNET_GIB, IMAGE_GIB = 6.5, 4.8, 4.0


def generator(seed):
    """The CPU generator of one image."""
    return torch.Generator("cpu").manual_seed(seed)


def condition(text, caption, host):
    """(prompt_embeds [1, 77, 2048], pooled [1, 1280]) of a caption that `text` (see caching) knows."""
    return text({name: value[None].to(host.device) for name, value in text.fields(caption).items()})


@torch.no_grad()
def draw_while_training(unet, text, model, host, prompts, resolution, seed):
    """One image per prompt with the UNet as it stands; the VAE is loaded for the decoding only, and gone afterwards.

    Returns:
        list of PIL images, `resolution` px square; prompt i is drawn with seed + i.
    """
    from diffusers import EulerDiscreteScheduler, StableDiffusionXLPipeline

    scheduler = EulerDiscreteScheduler.from_pretrained(model.folder, subfolder="scheduler")
    vae = loading.load_vae(model, host).to(host.dtype)  # the pipeline itself upcasts a VAE that needs it
    no_text = dict(text_encoder=None, text_encoder_2=None, tokenizer=None, tokenizer_2=None)
    zeros = loading.zero_unconditional(model)
    pipeline = StableDiffusionXLPipeline(
        vae, unet=unet, scheduler=scheduler, **no_text, force_zeros_for_empty_prompt=zeros, add_watermarker=False
    )
    pipeline.set_progress_bar_config(disable=True)
    unconditional = (None, None) if zeros else condition(text, "", host)
    images = []
    with without_dropout([unet, *text.encoders]):
        for i, prompt in enumerate(tqdm(prompts, desc="validation images", leave=False)):
            prompt_embeds, pooled = condition(text, prompt, host)
            images += pipeline(
                prompt_embeds=prompt_embeds,
                pooled_prompt_embeds=pooled,
                negative_prompt_embeds=unconditional[0],
                negative_pooled_prompt_embeds=unconditional[1],
                height=resolution,
                width=resolution,
                num_inference_steps=STEPS,
                guidance_scale=GUIDANCE,
                generator=generator(seed + i),
            ).images
    del pipeline, vae
    gc.collect()
    device.free_memory(host.device)
    return images


@dataclasses.dataclass(frozen=True)
class Settings:
    """What an image depends on beside prompt, seed and adapters. `image` (PIL, already `resolution` px square) makes it img2img."""

    resolution: int = 1024
    steps: int = STEPS
    guidance_scale: float = GUIDANCE
    negative_prompt: str | None = None
    image: object = None
    strength: float = 0.6

    @property
    def steps_run(self):
        """img2img starts part of the way."""
        return self.steps if self.image is None else int(self.steps * self.strength)


def choose_memory(memory, host, settings, batch_size):
    """The memory tier that `--memory` means here: gpu (all of it on the device), offload (the part at work), sequential (layer by layer).

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
    free_gib = torch.cuda.mem_get_info(host.device)[0] / device.GIB
    scale = torch.finfo(host.dtype).bits / 16
    image_gib = IMAGE_GIB * batch_size * (settings.resolution / 1024) ** 2
    for tier, weights_gib in (("gpu", ALL_GIB), ("offload", UNET_GIB)):
        need_gib = scale * (weights_gib + image_gib)
        if need_gib <= free_gib:
            return tier, f"{free_gib:.1f} GiB of GPU memory free, about {need_gib:.1f} needed"
    return "sequential", f"{free_gib:.1f} GiB of GPU memory free, {need_gib:.1f} needed even for one part at a time; slow"


class Sampler:
    """One loaded SDXL, the adapters beside it, and the memory tier that it runs in. Not thread-safe.

    Adapters are never fused: every call names the active ones, and the base is the same model with all of them switched off.
    Use: `Sampler(...)`, `load` for each adapter, `place`, then `draw`.
    """

    def __init__(self, model, host, scheduler, memory, img2img=False, cuda_graph=True):
        import diffusers

        self.host, self.memory, self.cuda_graph, self.adapters = host, memory, cuda_graph, []
        self._active, self._graph, self._most_images = None, None, math.inf
        # What is offloaded lives in RAM; what is not goes straight to the GPU, so RAM never holds the model twice.
        home = dataclasses.replace(host, device=torch.device("cpu")) if memory in ("offload", "sequential") else host
        (tokenizer, text_encoder), (tokenizer_2, text_encoder_2) = loading.load_text_encoders(model, home)
        pipeline = diffusers.StableDiffusionXLImg2ImgPipeline if img2img else diffusers.StableDiffusionXLPipeline
        self.pipeline = pipeline(
            vae=loading.load_vae(model, home).to(host.dtype),  # the pipeline itself upcasts a VAE that needs it
            text_encoder=text_encoder,
            text_encoder_2=text_encoder_2,
            tokenizer=tokenizer,
            tokenizer_2=tokenizer_2,
            unet=loading.load_unet(model, home).eval(),
            scheduler=make_scheduler(scheduler, model.folder),
            force_zeros_for_empty_prompt=loading.zero_unconditional(model),
            add_watermarker=False,
        )
        self.pipeline.set_progress_bar_config(disable=True)
        self.pipeline.vae.enable_slicing()  # a batch is decoded image by image: same pixels, less memory

    def load(self, file):
        """Load an adapter file; returns the name to activate it by. Before `place`."""
        name = f"adapter{len(self.adapters):02d}"
        adapter_loading.load_adapter(self.pipeline, file, name)
        self.adapters.append(name)
        return name

    def place(self):
        """Put the memory tier into effect. A UNet that is on the GPU as a whole computes with fused layers, one that stays there as a graph."""
        unet = self.pipeline.unet
        if self.memory in ("gpu", "offload"):
            fused_unet.fuse_unet(unet, self.host.device)
        if self.memory == "gpu":
            self._replay(unet)
        elif self.memory == "offload":
            self.pipeline.enable_model_cpu_offload(device=self.host.device)
        elif self.memory == "sequential":
            fused_unet.unfuse_unet(unet)
            self.pipeline.enable_sequential_cpu_offload(device=self.host.device)

    def _replay(self, unet):
        """Let the UNet's passes be captured and replayed, see graphs.Graphed."""
        launch = unet.forward

        def predict(fields):
            added = {name: fields[name] for name in ("text_embeds", "time_ids")}
            return launch(fields["sample"], fields["timestep"], fields["text"], added_cond_kwargs=added, return_dict=False)[0]

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

    def draw(self, adapters, prompt, seeds, settings, on_step=lambda images: None):
        """Images of one prompt, one per seed. Out of GPU memory: a smaller plan is announced and the same images are drawn again.

        Args:
            adapters: [(name, scale)] to be active together; none is the base model.
            on_step: called after every denoising step with the number of images in it.
        Raises:
            UserError: out of memory in the smallest plan.
        """
        if len(seeds) > self._most_images:
            parts = [seeds[i : i + self._most_images] for i in range(0, len(seeds), self._most_images)]
            return [image for part in parts for image in self.draw(adapters, prompt, part, settings, on_step)]
        try:
            return self._draw(adapters, prompt, seeds, settings, on_step)
        except torch.OutOfMemoryError:
            pass  # outside of this block the failed call's tensors are free
        self.pipeline.vae.to(dtype=self.host.dtype)  # cut short while upcast, it would stay in fp32 and fail every later call
        self.pipeline.maybe_free_model_hooks()
        if self._graph:
            self._graph.clear()
        gc.collect()
        device.free_memory(self.host.device)
        if len(seeds) > 1:
            self.host.say(f"out of GPU memory with {len(seeds)} images at a time: trying half")
            self._most_images = len(seeds) // 2  # of later prompts too
            return self.draw(adapters, prompt, seeds, settings, on_step)
        self._step_down(settings)
        return self.draw(adapters, prompt, seeds, settings, on_step)

    def _draw(self, adapters, prompt, seeds, settings, on_step):
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
            raise UserError(f"--resolution {settings.resolution}: out of GPU memory in the smallest plan; lower it, or free the GPU")
        self.host.say(f"out of GPU memory: {plan}")
        self._stop_replaying()
        self.pipeline.remove_all_hooks()
        self.place()
'''

# ========================================================================================== common/schedulers.py

MODULES['common.schedulers'] = r'''
"""The samplers that --scheduler names. Nothing here imports torch, so that flags can list them."""

KARRAS, EXACT = dict(use_karras_sigmas=True), dict(use_karras_sigmas=False)
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


def make_scheduler(name, folder):
    """The scheduler `name` of SCHEDULERS with the noise schedule of the model in `folder`."""
    import diffusers

    class_name, options = SCHEDULERS[name]
    scheduler = getattr(diffusers, class_name)
    return scheduler.from_config(scheduler.load_config(folder, subfolder="scheduler"), **options)
'''

# ============================================================================================== demo/__init__.py

MODULES['demo'] = r'''
"""What `--demo` runs on: a tiny SDXL and a small drawn image set, made on the spot."""
'''

# ================================================================================================= demo/build.py

MODULES['demo.build'] = r'''
"""The tiny demo: an SDXL with random weights and a drawn, captioned image set, made in about a second and without a network."""

import json
import math
import os
import random
import re
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path

from PIL import Image, ImageDraw

from demo.settings import demo_settings

# The topology and the noise schedule of SDXL (config.json files of stabilityai/stable-diffusion-xl-base-1.0); the widths are left open.
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
SCHEDULER = dict(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", timestep_spacing="leading", steps_offset=1)
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
    text_encoder=dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, projection_dim=32),
    text_encoder_2=dict(
        hidden_size=48, intermediate_size=96, num_hidden_layers=3, num_attention_heads=3, projection_dim=64, hidden_act="gelu"
    ),
    vae=dict(sample_size=64, block_out_channels=(8, 16, 16, 24), norm_num_groups=8),
)

INK, SKIN = "#2b2340", "#ffdcbf"
EYES = dict(blue="#3f8ff0", green="#3fb96a", brown="#8a5630", purple="#9a5be0")
WHO, MOODS = ("boy", "girl", "cat"), ("smiling", "laughing")
HAIR = dict(orange="#ff9038", black="#4a4560", pink="#ff8fb8", yellow="#ffd84d", white="#eeeef6", blue="#5aa7f2")
# A scene is a sky and, from back to front, shapes: four numbers are an ellipse (x, y, rx, ry), more are the corners of a polygon.
# Unit: 1/100 of the shorter side; x counts from the middle, y up from the lower edge.
SCENES = {
    "a green hill": ("#a9e2ff", ("#fff3a0", -34, 84, 10, 10), ("#8fd66a", 40, 0, 70, 44), ("#63bd58", -40, -12, 80, 40)),
    "the sea": ("#c9f0ff", ("#ffffff", 40, 84, 18, 7), ("#3fa3e0", -80, -9, -80, 44, 80, 44, 80, -9), ("#ffe2a0", -10, -20, 90, 36)),
    "a sunset": ("#ffb36b", ("#ff6b5e", 28, 62, 26, 26), ("#9a5a8c", -46, 8, 60, 38), ("#6f4480", 50, -4, 60, 34)),
    "a snowy mountain": (
        "#d6ecff",
        ("#8fa3cf", -80, 0, -28, 98, 34, 0),
        ("#ffffff", -41, 76, -28, 98, -13, 76, -27, 68),
        ("#eef6ff", 0, -30, 100, 58),
    ),
    "a pink garden": ("#ffe6ef", ("#ffb0cc", -44, 82, 24, 18), ("#ffb0cc", 46, 74, 22, 17), ("#a5dc8c", 0, -26, 100, 56)),
}


def tokenizers(texts: Iterable[str]):
    """(tokenizer, tokenizer_2) with a byte-level vocabulary in CLIP's order: bytes, bytes that end a word, merges, start, end.

    Every word of `texts` becomes one token; other text costs about one a letter. As SDXL's, they pad with end-of-text and "!" (id 0).
    """
    from tokenizers.pre_tokenizers import ByteLevel
    from transformers import CLIPTokenizer

    merges = merges_of(sorted({word for text in texts for word in re.findall(r"\w+|[^\w\s]+", text.lower())}))
    letters = sorted(ByteLevel.alphabet())
    tokens = [*letters, *(f"{letter}</w>" for letter in letters), *("".join(pair) for pair in merges), "<|startoftext|>", "<|endoftext|>"]
    ids = {token: i for i, token in enumerate(dict.fromkeys(tokens))}
    return tuple(CLIPTokenizer(vocab=ids, merges=merges, pad_token=pad, model_max_length=77) for pad in ("<|endoftext|>", "!"))


def merges_of(words: list[str]) -> list[tuple[str, str]]:
    """Byte-pair merges that make one token of each word: the most frequent pair first, of equals the first in the alphabet.

    The trainer of `tokenizers` leaves the order of equals to chance: embeddings trained in one process would be of no use in the next.
    """
    merges, pieces = [], [[*word[:-1], f"{word[-1]}</w>"] for word in words]
    while pairs := Counter(pair for word in pieces for pair in zip(word, word[1:])):
        merges.append(min(pairs, key=lambda pair: (-pairs[pair], pair)))
        for word in pieces:
            for at in reversed([i for i, pair in enumerate(zip(word, word[1:])) if pair == merges[-1]]):
                word[at : at + 2] = ["".join(word[at : at + 2])]
    return merges


def sdxl(widths: dict[str, dict], texts: Iterable[str], device: str):
    """StableDiffusionXLPipeline with SDXL's topology and untrained fp32 weights, made on `device` ("meta": shapes only).

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
    return StableDiffusionXLPipeline(**parts, tokenizer=first, tokenizer_2=second, scheduler=EulerDiscreteScheduler(**SCHEDULER))


def build_model(folder: Path) -> None:
    """Writes a tiny random SDXL as a diffusers folder (fp32 safetensors, the same weights every time)."""
    import torch

    from common.device import quieten_libraries

    quieten_libraries()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        words = [*WHO, *MOODS, *EYES, *HAIR, *SCENES, "with eyes and hair fur dressed in front of", "Naruto style"]
        sdxl(TINY, words, "cpu").save_pretrained(folder)


class Ink:
    """A picture of flat colours in dark outlines; drawn enlarged and then shrunk, because Pillow's shapes have hard edges."""

    def __init__(self, width_px: int, height_px: int, sky: str):
        self.size, enlarged = (width_px, height_px), 4 if min(width_px, height_px) < 512 else 2
        self.image = Image.new("RGB", (width_px * enlarged, height_px * enlarged), sky)
        self.draw, self.unit = ImageDraw.Draw(self.image), min(self.image.size) / 100

    def pixels(self, numbers) -> list[float]:
        """x, y, x, y, ... in scene units -> pixels of the enlarged picture."""
        return [self.image.width / 2 + n * self.unit if i % 2 == 0 else self.image.height - n * self.unit for i, n in enumerate(numbers)]

    def shape(self, fill: str, *numbers: float, line: float = 1.6) -> None:
        """An ellipse (x, y, rx, ry) or a polygon (x, y, x, y, x, y, ...) with an outline."""
        if len(numbers) == 4:
            x, y, rx, ry = numbers
            self.draw.ellipse(self.pixels((x - rx, y + ry, x + rx, y - ry)), fill, INK if line else None, round(line * self.unit))
        else:
            self.draw.polygon(self.pixels(numbers), fill)
            if line:
                self.stroke(*numbers, *numbers[:4], line=line)

    def stroke(self, *numbers: float, line: float = 1.6) -> None:
        self.draw.line(self.pixels(numbers), INK, round(line * self.unit), joint="curve")


def spikes(x: float, y: float, inner: float, outer: float, count: int, start: int, end: int) -> list[float]:
    """Corners of a fan of `count` points between two angles (degrees, counter-clockwise from three o'clock)."""
    angles = [math.radians(start + (end - start) * i / (2 * count)) for i in range(2 * count + 1)]
    return [n for i, a in enumerate(angles) for r in [outer if i % 2 else inner] for n in (x + r * math.cos(a), y + r * math.sin(a))]


def draw_head(ink: Ink, who: str, hair: str) -> None:
    """Head, and hair or ears, around (0, 44)."""
    if who == "cat":
        for side in (-1, 1):
            ink.shape(hair, side * 25, 50, side * 23, 86, side * 5, 66)
            ink.shape("#ffb3b8", side * 21, 60, side * 20.5, 76, side * 12, 66, line=0)
    elif who == "girl":
        ink.shape(hair, 0, 44, 33, 36)
        ink.shape(hair, -33, 44, -37, 8, -18, 12, 18, 12, 37, 8, 33, 44)
        ink.shape(hair, 0, 44, 31.5, 34.5, line=0)
    else:
        ink.shape(hair, *spikes(0, 47, 28, 41, 9, -15, 195))
    ink.shape(hair if who == "cat" else SKIN, 0, 44, 26, 24)
    if who != "cat":
        fringe = (-26, 46, -19, 50, -13, 59, -4, 51, 3, 60, 10, 51, 17, 57, 26, 46)
        ink.shape(hair, *fringe, 27, 62, 14, 72, -14, 72, -27, 62, line=0)
        ink.stroke(*fringe)


def draw_face(ink: Ink, who: str, mood: str, eyes: str) -> None:
    for side in (-1, 1):
        ink.shape("#ff9d9d", side * 18, 31, 4, 2.4, line=0)
        ink.shape(eyes, side * 11, 40, 6.4, 7.8)
        ink.shape(INK, side * 11, 39, 2.2, 3.6, line=0)
        ink.shape("#ffffff", side * 11 - 2, 43, 2, 2.4, line=0)
    if mood == "laughing":
        ink.shape("#d8505a", -7, 31, 7, 31, 5, 25, 0, 23, -5, 25)
    else:
        ink.stroke(-6, 29, -4, 27, -1.5, 26, 1.5, 26, 4, 27, 6, 29, line=2)
    if who == "cat":
        ink.shape("#ff8f9a", -2.5, 35, 2.5, 35, 0, 32, line=1)


def draw_character(rng: random.Random, width_px: int, height_px: int) -> tuple[Image.Image, str]:
    """One picture and its caption; every attribute is chosen independently of the others."""
    who, mood, eyes, hair, clothes, scene = (rng.choice(list(choices)) for choices in (WHO, MOODS, EYES, HAIR, HAIR, SCENES))
    sky, *shapes = SCENES[scene]
    ink = Ink(width_px, height_px, sky)
    for fill, *numbers in shapes:
        ink.shape(fill, *numbers, line=1)
    ink.shape(HAIR[clothes], -32, -9, -28, 14, -12, 22, 12, 22, 28, 14, 32, -9)
    draw_head(ink, who, HAIR[hair])
    draw_face(ink, who, mood, EYES[eyes])
    text = f"a {mood} {who} with {eyes} eyes and {hair} {'fur' if who == 'cat' else 'hair'}, dressed in {clothes}, in front of {scene}"
    return ink.image.resize(ink.size, Image.Resampling.LANCZOS), text


def build_images(folder: Path, count: int = 24) -> None:
    """Writes `count` PNGs of three shapes and metadata.jsonl (file_name, text); the same ones every time."""
    rng = random.Random(0)
    folder.mkdir(parents=True)
    with (folder / "metadata.jsonl").open("w", encoding="utf-8") as metadata:
        for i in range(count):
            image, text = draw_character(rng, *rng.choice([(96, 96), (128, 96), (96, 128)]))
            image.save(folder / f"{i:03d}.png")
            metadata.write(json.dumps({"file_name": f"{i:03d}.png", "text": text}) + "\n")


def build_once(folder: Path, build: Callable[[Path], None]) -> Path:
    """`folder`, built if absent. It appears complete or not at all; of two processes that build at once the first one wins."""
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
    model, data = Path(settings["pretrained_model_name_or_path"]), Path(settings["train_data_dir"])
    return build_once(model, build_model), build_once(data, build_images)
'''

# ============================================================================================== demo/settings.py

MODULES['demo.settings'] = r'''
"""What `--demo` means: the small trained SDXL and the ink drawings in demo/assets; where those are absent (one-file scripts), or not
wanted (tests), the tiny random SDXL and the images of demo/build.py.
"""

import os
from pathlib import Path

ASSETS = Path(__file__).resolve().parent / "assets"
# The small UNet has attention at 8 x 8 and 4 x 4 latents only, so its adapter takes in the other linear layers of those blocks too.
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
        "a portrait of a girl with black hair in a ponytail and green eyes wearing a purple kimono in front of a night sky",
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
VERSION = 2  # part of the folder names: raise it when anything in demo/build.py changes what is built


def is_tiny() -> bool:
    """Whether the random model stands in for the trained one: its files are absent, or TINY_DEMO=1 asks for it, as the tests do."""
    return os.environ.get("TINY_DEMO") == "1" or not (ASSETS / "model").is_dir()


def demo_settings(root: Path) -> dict:
    """What --demo sets, by flag; the tiny model and its images have their place under `root`, and may not be there yet."""
    model, data = (root / f"model-v{VERSION}", root / f"data-v{VERSION}") if is_tiny() else (ASSETS / "model", ASSETS / "data")
    return dict(pretrained_model_name_or_path=str(model), train_data_dir=str(data), **(TINY_DEMO if is_tiny() else SMALL_DEMO))
'''

# ======================================================================================== how the texts above become modules


class _Texts(importlib.abc.MetaPathFinder, importlib.abc.InspectLoader):
    """Imports a module from its text; Python's own machinery does the rest."""

    def _path(self, name):
        path = name.replace(".", "/")
        return f"{path}/__init__.py" if self.is_package(name) else f"{path}.py"

    def is_package(self, name):
        return any(other.startswith(f"{name}.") for other in MODULES)

    def get_source(self, name):
        return MODULES[name].removeprefix("\n")

    def get_code(self, name):
        return self.source_to_code(self.get_source(name), os.path.join(_HERE, self._path(name)))

    def find_spec(self, name, path=None, target=None):
        if name not in MODULES:
            return None
        spec = importlib.util.spec_from_loader(name, self, origin=os.path.join(_HERE, self._path(name)))
        spec.has_location = True
        return spec


_HERE = os.path.dirname(os.path.abspath(__file__))
sys.meta_path.insert(0, _Texts())


# ================================================================================================= train_dora.py

from dataclasses import dataclass

from common import hub
from common.command_line import parse, print_config, run
from common.flags import TrainFlags, check


@dataclass
class Flags(TrainFlags):
    """Fine-tune SDXL to a style with DoRA, on an fp16 or an NF4 base (QDoRA)."""

    output_dir: str = "outputs/train_dora"
    resolution: int = 512
    lora_rank: int = 16
    lora_alpha: int = 32
    lora_dropout: float = 0.1
    gradient_accumulation_steps: int = 4
    num_train_epochs: int = 3
    lr_warmup_steps: int = 10
    use_8bit_adam: bool = True


def main(argv=None):
    """Train; returns {"output_dir", "step", "ended", "weights", "metrics"}."""
    flags = parse(Flags, argv)
    check(flags)
    if flags.dry_run:
        return print_config(flags)
    hub.check(flags)

    from common import adapters, assembly, device, loading

    host = device.start(flags.mixed_precision, flags.seed)
    data = assembly.load_data(flags, host)  # image, caption -> Sample -> cached latents and text
    unet = loading.load_unet(data.model, host, flags.quantize)  # frozen
    adapters.add_lora(unet, flags.lora_target_modules, flags.lora_rank, flags.lora_alpha, flags.lora_dropout, use_dora=True)
    engine = assembly.build_engine(flags, host, unet, data)  # flat buffer, optimizer, schedule, EMA
    return assembly.train(flags, engine, data)  # steps, validation, checkpoints, results


if __name__ == "__main__":
    run(main)
