"""A procedural world of people, as attributes and captions. Every scene can be rendered in two styles."""

import torch

from common.model.noise import generator_for

STYLES = ("plain", "ink")
# Colours by value and style (plain, ink).
# They are far enough apart to be told from each other after a lossy autoencoder, in either style.
HAIR = dict(
    black=("#3d3744", "#24232f"),
    brown=("#83573a", "#854a20"),
    blond=("#efcd7c", "#ffd43e"),
    red=("#c9573a", "#f03c20"),
    blue=("#5f93cf", "#2f74f0"),
    white=("#eeeae6", "#f3f4fb"),
)
EYES = dict(
    brown=("#7d4a29", "#8c4716"),
    blue=("#3f8fdc", "#1486ff"),
    green=("#4fa45c", "#12b04a"),
    purple=("#9a5fc4", "#a030e6"),
)
CLOTHING = dict(
    red=("#d0605a", "#ea2f2f"),
    yellow=("#edc65c", "#ffca12"),
    green=("#6dab6d", "#27a544"),
    blue=("#5b86c6", "#2a5be2"),
    purple=("#9472b8", "#8c3ccb"),
    white=("#f1ece3", "#fafaff"),
)
# Proportions by who: face width, jaw taper, eye size, shoulder width, thickness of neck and of brows.
WHO = dict(
    man=(0.84, 0.16, 0.86, 1.32, 0.36, 0.060),
    woman=(0.80, 0.34, 1.00, 1.00, 0.24, 0.034),
    boy=(0.88, 0.24, 1.00, 1.02, 0.27, 0.048),
    girl=(0.88, 0.30, 1.10, 0.90, 0.22, 0.034),
)
BACKGROUNDS = ("a red sky", "a blue sky", "a forest", "the sea", "a sunset", "a night sky", "snowy mountains")
ATTRIBUTES: dict[str, tuple[str, ...]] = {
    "who": tuple(WHO),
    "hair": tuple(HAIR),
    "hairstyle": ("short", "long", "ponytail"),
    "eyes": tuple(EYES),
    "clothing": tuple(CLOTHING),
    "garment": ("jacket", "shirt", "kimono", "hoodie"),
    "headgear": ("none", "headband", "cap", "straw hat"),
    "background": BACKGROUNDS,
    "mood": ("serious", "smiling", "laughing"),
    "pose": ("still", "waving"),
    "framing": ("portrait", "half body"),
}
NAMES = tuple(ATTRIBUTES)
# How often a caption that may leave out attributes names this one; the others are named in every second.
SAID = dict(hair=0.9, eyes=0.85, clothing=0.9, background=0.85, headgear=0.85, pose=0.85, garment=0.85)


def draw_attributes(count: int, seed: int) -> torch.Tensor:
    """Independent uniform attributes: int64 [count, len(ATTRIBUTES)], columns in the order of ATTRIBUTES."""
    uniform = torch.rand(count, len(NAMES), generator=generator_for("attributes", seed))
    return (uniform * torch.tensor([len(values) for values in ATTRIBUTES.values()])).long()


def describe(row: torch.Tensor) -> dict[str, str]:
    """One row of attributes [len(ATTRIBUTES)] in words."""
    return {name: ATTRIBUTES[name][value] for name, value in zip(NAMES, row.tolist())}


def caption(of: dict[str, str], kept: set[str], order: float, swap: bool) -> str:
    """Words for the attributes in `kept`.

    `order` in [0, 1) picks the sequence of the clauses; `swap` turns round the pairs in them.
    """
    # Hair, eyes and clothes
    tail = " in a ponytail" if {"hair", "hairstyle"} <= kept and of["hairstyle"] == "ponytail" else ""
    shape = f"{of['hairstyle']} " if "hairstyle" in kept and not tail and of["hairstyle"] != "ponytail" else ""
    features = [f"{shape}{of['hair']} hair{tail}"] * ("hair" in kept) + [f"{of['eyes']} eyes"] * ("eyes" in kept)
    clothes = [f"a {of['clothing']} {of['garment'] if 'garment' in kept else 'top'}"] * ("clothing" in kept)
    clothes += [f"a {of['headgear']}"] * ("headgear" in kept and of["headgear"] != "none")

    # The clauses in their order
    clauses = [
        "with " + " and ".join(features[::-1] if swap else features) if features else "",
        ("wearing " if swap else "in ") + " and ".join(clothes) if clothes else "",
        f"in front of {of['background']}" if "background" in kept else "",
    ]
    clauses = [clauses[i] for i in ((0, 1, 2), (1, 0, 2), (0, 2, 1), (2, 0, 1))[int(order * 4)]]

    # The words around them
    mood = f"{of['mood']} " if "mood" in kept else ""
    framing = "a portrait of " if of["framing"] == "portrait" else "a half body picture of "
    framing = framing if "framing" in kept else ""
    waving = "waving" if "pose" in kept and of["pose"] == "waving" else ""
    return " ".join(part for part in (f"{framing}a {mood}{of['who']}", *clauses, waving) if part)


def captions(attributes: torch.Tensor, seed: int, full: bool = False) -> list[str]:
    """One caption for each row of `attributes` [N, len(ATTRIBUTES)]; each leaves out some attributes, unless `full`."""
    draws = torch.rand(len(attributes), len(NAMES) + 2, generator=generator_for("captions", seed)).tolist()
    result = []
    for row, (order, swap, *keep) in zip(attributes, draws):
        kept = {name for name, number in zip(NAMES, keep) if full or number < SAID.get(name, 0.5)}
        result.append(caption(describe(row), kept, order, swap < 0.5))
    return result
