"""Dropout as a pure function of a seed: nothing is stored for the backward pass, and a CUDA graph or a checkpoint replays it."""

import torch

if torch.cuda.is_available():  # Triton comes with the CUDA builds of torch only
    import triton
    import triton.language as tl

    @triton.jit
    def _dropout_kernel(x, out, seed, salt, n, p, BLOCK: tl.constexpr):
        i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
        keep = tl.rand(tl.load(seed) + salt, i) >= p
        kept = tl.load(x + i, mask=i < n).to(tl.float32) / (1 - p)
        tl.store(out + i, tl.where(keep, kept, 0.0), mask=i < n)


def seeded_dropout(x, p, seed, salt):
    """x with each element zeroed with probability p and the others divided by 1 - p; linear in x.

    Args:
        x: contiguous tensor of any shape.
        seed: int64 scalar tensor on x's device, read when the kernel runs, so that a replayed graph sees its new value.
        salt: integer that differs between layers.
    """
    if not x.is_cuda:
        generator = torch.Generator().manual_seed(int(seed) + salt)
        return x * (torch.rand(x.shape, generator=generator) >= p).to(x.dtype) / (1 - p)
    out = torch.empty_like(x)
    n = x.numel()
    _dropout_kernel[(triton.cdiv(n, 1024),)](x, out, seed, salt, n, p, BLOCK=1024)
    return out
