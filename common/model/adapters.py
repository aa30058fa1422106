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
