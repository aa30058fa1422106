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
