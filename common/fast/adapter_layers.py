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
