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
