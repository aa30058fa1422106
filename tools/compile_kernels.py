"""Compiles every kernel for cards that need not be there, in all the variants that full-size SDXL asks for.

    python tools/compile_kernels.py --cards 75 80

The layers run forward and backward on PyTorch's meta device, which knows shapes and no numbers. Every launch of a
kernel is compiled instead. The exit status is 1 when one does not compile, or asks for more shared memory than the card
has. Needs Triton (pip install triton, 190 MB), which brings its own compiler; no GPU.
"""

import argparse
import sys
from collections import defaultdict
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

from common.cli.running import run
from common.errors import UserError

RESOLUTIONS = (64, 512, 544, 768, 1024)  # px; 64 and 544: few tiles, and sizes that 16 does not divide
RANKS = (1, 4, 6, 8, 16, 32, 64, 128)
DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}
# {capability: shared memory of a block of threads}, CUDA C++ programming guide, table of compute capabilities
SHARED_KIB = {75: 64, 80: 163, 86: 99, 89: 99, 90: 227}


class Card:
    """Triton's driver of a card that is not there: it can say what it is, and launch nothing."""

    def __init__(self, capability: int):
        from triton.backends.compiler import GPUTarget

        self.target = GPUTarget("cuda", capability, 32)

    def get_current_target(self):
        return self.target

    def get_current_device(self):
        return self.target.arch

    def get_current_stream(self, device):
        return 0


class Compiled:
    """What was compiled: {kernel: {variant}}, the most shared memory that each kernel takes, and the errors."""

    def __init__(self):
        self.variants = defaultdict(set)
        self.shared_bytes = defaultdict(int)
        self.errors = {}

    def launch(self, original, kernel, *args, **options):
        """In place of JITFunction.run."""
        name = kernel.fn.__name__
        try:
            binary = original(kernel, *args, **options | {"warmup": True})
        except Exception as error:  # of any stage of the compiler
            self.errors.setdefault(f"{name}: {' '.join(str(error).split())[:300]}", None)
            return
        self.variants[name].add(binary.hash)
        self.shared_bytes[name] = max(self.shared_bytes[name], binary.metadata.shared)


def compile_all(capability: int, unet: torch.nn.Module, encoders: list, dtypes: list[torch.dtype]) -> Compiled:
    """Every launch of the UNet's and the adapters' operations, compiled for one card."""
    import triton
    from triton.runtime.jit import JITFunction

    triton.runtime.driver.set_active(Card(capability))
    compiled = Compiled()
    original = JITFunction.run
    JITFunction.run = lambda kernel, *args, **options: compiled.launch(original, kernel, *args, **options)
    try:
        for dtype in dtypes:
            unet.to(dtype)
            for resolution in RESOLUTIONS:
                run_unet(unet, resolution, dtype)
            for shape in sorted({linear_shape(layer) for model in (unet, *encoders) for layer in linears(model)}):
                run_adapter(*shape, dtype)
    finally:
        JITFunction.run = original
    return compiled


def run_unet(unet: torch.nn.Module, resolution: int, dtype: torch.dtype) -> None:
    """One image, forward and backward."""
    side = resolution // 8
    new = lambda *shape: torch.empty(*shape, dtype=dtype, device="meta").requires_grad_()  # noqa: E731
    added = {"text_embeds": new(1, 1280), "time_ids": new(1, 6)}
    t = torch.zeros(1, dtype=torch.int64, device="meta")
    prediction = unet(new(1, 4, side, side), t, new(1, 77, 2048), added_cond_kwargs=added, return_dict=False)[0]
    prediction.backward(torch.empty_like(prediction))


def linears(model: torch.nn.Module) -> list[torch.nn.Linear]:
    return [layer for layer in model.modules() if type(layer) is torch.nn.Linear]


def linear_shape(layer: torch.nn.Linear) -> tuple[int, int, bool]:
    """(rows, columns, whether it has a bias)."""
    return layer.out_features, layer.in_features, layer.bias is not None


def run_adapter(rows: int, columns: int, bias: bool, dtype: torch.dtype) -> None:
    """The operations of an adapter beside a weight [rows, columns], for images and for text."""
    from common.fast import kernels

    new = lambda *shape, dtype=dtype: torch.empty(*shape, dtype=dtype, device="meta")  # noqa: E731
    full = lambda *shape: new(*shape, dtype=torch.float32)  # noqa: E731
    w = new(rows, columns)
    seed = torch.zeros((), dtype=torch.int64, device="meta")
    for length in (4096, 77, 1):
        for salt in (0, 1, 16):
            kernels.seeded_dropout(new(length, columns), 0.1, seed, salt)
            kernels.seeded_dropout(new(length, columns), 0.1, seed, salt, add_to=new(length, columns), alpha=0.5)
        per_column = dict(bias=new(rows) if bias else None, gain=full(rows), m=full(rows), dm=full(rows))
        kernels.gain_backward(new(length, rows), new(length, rows), **per_column)
    kernels.scale_rows(w, full(rows))
    for rank in RANKS:
        per_row = dict(m=full(rows), gain=full(rows), b=new(rows, rank))
        kernels.update_gain(w, full(rank, columns), full(rows, rank), scale=0.5, **per_row)


def fused_sdxl() -> tuple[torch.nn.Module, list[torch.nn.Module]]:
    """(UNet, text encoders) of full size on the meta device; the UNet computes by its kernels."""
    from benchmarks.full_size import FULL
    from common.fast import frozen_layers, kernel_check, operations
    from common.model import device
    from common.model.tiny import sdxl

    device.quieten_libraries()
    pipeline = sdxl(FULL, ["a picture"], "meta")
    unet = pipeline.unet.requires_grad_(False)
    frozen_layers.fuse_unet(unet, torch.device("meta"))
    for operation in operations.OF_THE_UNET:
        operation.plain = kernel_check.kernel_of(operation)
    return unet, [pipeline.text_encoder, pipeline.text_encoder_2]


def report(capability: int, compiled: Compiled) -> int:
    """A line a kernel, the errors, and the number of faults."""
    limit_kib = SHARED_KIB[capability]
    faults = list(compiled.errors)
    for name, variants in sorted(compiled.variants.items()):
        kib = compiled.shared_bytes[name] / 1024
        print(f"sm_{capability} {name:30} {len(variants):4} variants, at most {kib:5.1f} KiB of shared memory")
        faults += [f"{name}: {kib:.1f} KiB of shared memory, {limit_kib} there"] if kib > limit_kib else []
    total = sum(map(len, compiled.variants.values()))
    summary = f"sm_{capability}: {total} variants of {len(compiled.variants)} kernels compiled, {len(faults)} faults"
    print(*faults, summary, sep="\n")
    return len(faults)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    cards = dict(type=int, default=[75, 80], choices=SHARED_KIB, help="capabilities (default: 75 80)")
    parser.add_argument("--cards", nargs="+", **cards)
    frozen = dict(default=["fp16"], choices=DTYPES, help="of the frozen weights (default: fp16)")
    parser.add_argument("--dtypes", nargs="+", **frozen)
    flags = parser.parse_args()
    try:
        import triton
    except ImportError:
        raise UserError("Triton is missing: pip install triton") from None

    # Every card in turn
    unet, encoders = fused_sdxl()
    print(f"Triton {triton.__version__}, {' '.join(flags.dtypes)}")
    dtypes = [DTYPES[name] for name in flags.dtypes]
    faults = [report(card, compile_all(card, unet, encoders, dtypes)) for card in flags.cards]
    return 1 if any(faults) else 0


if __name__ == "__main__":
    run(lambda: sys.exit(main()))
