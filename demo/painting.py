"""Paints whole pictures of the world: `render`.

"plain" is soft and shaded like a picture book; "ink" has thick outlines, hard shadows, spiky hair, halftone and rays.
"""

import torch

from common.model.noise import generator_for
from demo.canvas import JITTER, Scene
from demo.clothes import body, hand, headgear
from demo.heads import back_hair, eyes, face, front_hair, mouth
from demo.scenery import background
from demo.world import STYLES

PARTS = (background, back_hair, body, face, eyes, mouth, front_hair, headgear, hand)  # from back to front


def render(attributes: torch.Tensor, seed: int, style: str = "plain", size: int = 128, device="cpu") -> torch.Tensor:
    """Pictures uint8 [N, 3, size, size] of `attributes` int64 [N, len(ATTRIBUTES)].

    Picture i depends on its attributes, `seed` and i, and on no other picture.
    """
    if style not in STYLES:
        raise ValueError(f"style is one of {STYLES}, not {style!r}")
    jitter = torch.rand(len(attributes), len(JITTER), generator=generator_for("jitter", seed))
    batch_size = 16 if torch.device(device).type == "cpu" else 512  # what fits a CPU's cache, and a GPU's memory
    result = torch.empty(len(attributes), 3, size, size, dtype=torch.uint8, device=device)
    for first in range(0, len(attributes), batch_size):
        some = slice(first, first + batch_size)
        canvas = torch.empty(len(jitter[some]), 3, size, size, device=device)
        scene = Scene(attributes[some].cpu(), jitter[some], style, canvas)
        for part in PARTS:
            part(scene)
        result[some] = (scene.canvas * 255).round()
    return result
