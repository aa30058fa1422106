"""Paints the people of the world, and whole pictures: `render`.

"plain" is soft and shaded like a picture book; "ink" has thick outlines, hard shadows, spiky hair, halftone and speed lines.
"""

import math

import torch

from common.noise import generator_for
from demo.canvas import INK, JITTER, Scene, both, box, capsule, circle, ellipse, join, step
from demo.scenery import background
from demo.world import EYES, STYLES


def skull(s, at):
    """Distance to the outline of the hair on the head: lobes in plain, spikes in ink, neither below the ears."""
    y = at.y - 0.14
    r, turn = circle(at.x, y, 0, 0, 0), torch.atan2(at.x, y) / math.tau
    lean = 0.25 * (r - 1) * turn.sign() if s.ink else 0.0
    (flat,) = s.numbers("headgear", none=(0.0,), headband=(0.0,), cap=(0.8,), straw_hat=(0.8,))
    locks = (
        s.wave(turn * (11 if s.ink else 9) + s.rand("phase") + lean)
        * s.rand("amount", 0.75, 1.15)
        * (1 - flat * step(y, 0.1, 0.4))
    )
    return (r - 0.98 - (0.30 if s.ink else 0.07) * locks * step(-turn.abs(), -0.42, -0.3)) * (0.62 if s.ink else 0.95)


def back_hair(s):
    for some in s.only("hairstyle", "ponytail"):
        at = some.head(-2.1, -0.4, -1.5, 1.6)
        x, y = -at.x, at.y
        tail = [capsule(x, y, 0.7, 0.85, 1.15, 0.95, 0.14, 0.25), capsule(x, y, 1.15, 0.95, 1.5, 0.4, 0.25, 0.3)]
        tail += [capsule(x, y, 1.5, 0.4, 1.42, -0.75, 0.3, 0.02), capsule(x, y, 1.35, 0.5, 1.75, -0.35, 0.2, 0.02)]
        some.paint(at, join(*tail, k=0.0 if some.ink else 0.15), some.hair, 1.38 - x - y * 0.2)
        some.paint(at, box(x, y, 0.9, 0.88, 0.1, 0.2, 0.08), some.fixed("#c9605a", "#e0263a"))
    at = s.head(-1.5, 1.5, -1.2, 1.6)
    s.paint(at, skull(s, at), s.hair * 0.9, -0.6 * at.y - 0.3)
    for some in s.only("hairstyle", "long"):
        at = some.head(-1.4, 1.4, -2.4, 0.6)
        hem = -1.8 - (0.4 if s.ink else 0.12) * some.wave(at.x * 2.2 + some.rand("phase"))
        sides = at.x.abs() - 1.0 + 0.10 * at.y.clamp(max=0) * (at.y + 1.6)
        some.paint(at, both(sides, (hem - at.y) * 0.6, at.y - 0.4), some.hair * 0.9, at.x - at.y - 1.6)


def torso(s, at):
    shoulder = s.build[3]
    return box(at.x, at.y + 0.30 * (at.x / shoulder).square(), 0, -3.2, shoulder, 1.9, 0.3)


def body(s):
    at = s.body(-2.2, 2.2, -4.0, -0.5)
    x, y, shoulder, neck = at.x, at.y, s.build[3], s.build[4]
    s.paint(at, box(x, y, 0, -1.2, neck, 0.6, 0.1), s.skin, y + 1.22)
    s.paint(at, capsule(x.abs() - shoulder, y, -0.12, -1.95, 0.16, -3.6, 0.26, 0.24), s.cloth * 0.9, x - 0.2)
    s.paint(at, torso(s, at), s.cloth, x * 0.7 - shoulder * 0.35 - (y + 2.2) * 0.25)
    for garment in (jacket, shirt, kimono, hoodie):
        for some in s.only("garment", garment.__name__):
            garment(some, some.body(-1.5, 1.5, -4.0, -0.6))


def jacket(s, at):
    x, y, side = at.x, at.y, at.x.abs()
    s.paint(
        at, both(side - 0.12 - (y + 2.4).clamp(min=0) * 0.24, y + 1.12), s.fixed("#f6f0e6", "#fdfdff"), y + 1.35, 0.5
    )
    s.paint(at, ellipse(x, y, 0, -1.14, 0.33, 0.3), s.skin, y + 1.25, 0.4)
    s.mark(at, both(side - 0.028, y + 2.2), s.cloth * 0.5)
    lapel = join(
        capsule(side, y, 0.40, -1.05, 0.14, -2.3, 0.13, 0.03), capsule(side, y, 0.42, -1.15, 0.54, -1.6, 0.13, 0.05)
    )
    s.paint(at, lapel, s.cloth * 0.92, -y - 1.5, 0.9)
    s.mark(at, capsule(side, y, 0.5, -2.95, 0.72, -2.8, 0.03, 0.03), s.cloth * 0.5)


def shirt(s, at):
    x, y = at.x, at.y
    s.paint(at, ellipse(x, y, 0, -1.26, 0.47, 0.36), s.cloth * 0.72, line=0.5)
    s.paint(at, ellipse(x, y, 0, -1.2, 0.36, 0.3), s.skin, y + 1.3, 0.4)
    for middle, half in ((-2.05, 0.07), (-2.28, 0.035)):
        s.mark(at, both((y - middle + 0.1 * x.square()).abs() - half, torso(s, at) + 0.02), s.cloth * 0.45 + 0.5, 0.9)


def kimono(s, at):
    x, y, within = at.x, at.y, torso(s, at)
    s.paint(at, both(x.abs() - 0.40 * (y + 2.1), y + 1.1), s.skin, y + 1.3, 0.4)
    under, over = (
        capsule(x, y, -0.52, -0.95, 0.02, -1.85, 0.15, 0.15),
        capsule(x, y, 0.52, -0.95, -0.42, -2.5, 0.15, 0.15),
    )
    for lapel in (under, over):
        s.paint(at, both(lapel, within - 0.14), s.fixed("#f8f1e2", "#ffffff"), x * 0.5 - y - 2.1, 0.8)
    s.paint(at, both((y + 2.75).abs() - 0.3, within), s.cloth * 0.5, x - 0.2, 0.8)


def hoodie(s, at):
    x, y = at.x, at.y
    s.paint(at, ellipse(x, y, 0, -1.25, 0.86, 0.42), s.cloth * 0.95, -y - 1.35)
    s.paint(at, ellipse(x, y, 0, -1.16, 0.5, 0.3), s.cloth * 0.5, line=0.3)
    s.paint(at, ellipse(x, y, 0, -1.08, 0.34, 0.3), s.skin, y + 1.2, 0.3)
    s.paint(at, capsule(x.abs(), y, 0.26, -1.55, 0.3, -2.1, 0.045, 0.06), s.fixed("#fbf6ec", "#ffffff"), line=0.5)


def fringe(s, x):
    """The lower edge of the front hair at x: over the forehead lobes or spikes, at the sides as low as the hairstyle says."""
    (sides,) = s.numbers("hairstyle", short=(0.55,), long=(1.0,), ponytail=(0.7,))
    locks = s.wave(x * (1.9 if s.ink else 1.4) + s.rand("phase")) * s.rand("amount", 0.85, 1.1)
    return 0.52 - (0.42 if s.ink else 0.22) * locks - sides * step(x.abs(), 0.62, 0.92)


def jawline(at, width, jaw):
    """Distance to the outline of the face, narrower towards the chin."""
    return ellipse(at.x / (width * (1 - jaw * (0.15 - at.y).clamp(min=0).square())), at.y, 0, -0.04, 1, 0.92)


def face(s):
    at = s.head(-1.2, 1.2, -1.15, 1.1)
    x, y, (width, jaw) = at.x, at.y, s.build[:2]
    ears = ellipse(x.abs() / width, y, 1.0, -0.2, 0.16, 0.22)
    s.paint(at, ears, s.skin * 0.94, -0.3 * y - 0.1)
    s.mark(at, ears + 0.09, s.skin * 0.75)
    shape = jawline(at, width, jaw)
    s.paint(at, shape, s.skin, x * 0.75 - y * 0.45 - 0.62, soft=0.5)
    s.mark(at, both(shape, (fringe(s, x) - 0.10 - y) * 0.55), s.skin * s.fixed("#d8b8b4", "#c49aa8"), 0.75)
    cheeks = ellipse(x.abs(), y, 0.56, -0.47, 0.2, 0.11)
    s.mark(
        at,
        cheeks if s.ink else cheeks - 0.12,
        s.fixed("#ee8f80", "#ff8f8a"),
        0.5 if s.ink else 0.6 * step(-cheeks, -0.1, 0.13),
    )
    s.mark(at, capsule(x, y, 0.02, -0.41, 0.06, -0.5, 0.02, 0.033), s.skin * (0.45 if s.ink else 0.78))
    for some in s.only("who", "man"):
        at = some.head(-1.0, 1.0, -1.15, -0.1)
        width, jaw = some.build[:2]
        ragged = 0.10 * some.wave(at.x * 3.5) if some.ink else 0.0
        some.paint(
            at,
            both(jawline(at, width, jaw), at.y + 0.80 - 0.95 * at.x.square() + ragged),
            some.hair * 0.88,
            at.x - 0.2,
            line=0.5,
        )
    for some in s.only("who", "boy"):
        at = some.head(-0.8, -0.3, -0.65, -0.3)
        some.paint(
            at,
            box(at.x, at.y + 0.25 * at.x, -0.56, -0.62, 0.16, 0.055, 0.05),
            some.fixed("#f3e3cd", "#fff3dc"),
            line=0.6,
        )
    for some in s.only("who", "woman"):
        at = some.head(-1.1, 1.1, -0.75, -0.3)
        some.paint(at, circle(at.x.abs(), at.y, 0.84, -0.5, 0.085), some.fixed("#edc75f", "#ffd21f"), line=0.8)


def eyes(s):
    at = s.head(-0.85, 0.85, -0.55, 0.35)
    side = at.x.sign()
    x, y = (at.x.abs() - 0.39) * side / s.build[2], (at.y + 0.13) / s.build[2]
    (lashes,) = s.numbers("who", man=(0.0,), woman=(0.05,), boy=(0.0,), girl=(0.05,))
    white = ellipse(x, y, 0, 0, 0.25, 0.28)
    s.paint(at, white, s.fixed("#fffdf8", "#ffffff"), y - 0.1, line=0.3, soft=0.25)
    gaze = x - s.rand("gaze", -0.03, 0.03) + 0.015 * side
    iris, colour = both(ellipse(gaze, y, 0, -0.01, 0.20, 0.25), white), s.named("eyes", EYES, "iris", 0.04)
    s.mark(at, iris, colour * 0.5)
    s.paint(at, iris + 0.03, colour, y - 0.06, line=0, soft=0.2)
    s.mark(at, ellipse(gaze, y, 0, 0.0, 0.075, 0.105), s.fixed("#2a1d24", "#14101f"))
    s.mark(at, both(ellipse(gaze, y, 0, -0.17, 0.12, 0.06), iris + 0.03), colour * 0.45 + 0.55, 0.85)
    s.mark(
        at, join(ellipse(gaze, y, -0.075, 0.09, 0.07, 0.075), circle(gaze, y, 0.085, -0.1, 0.034)), s.fixed("#ffffff")
    )
    lid = both(ellipse(x, y, 0, 0.0, 0.29, 0.325), -ellipse(x, y, 0, -0.07, 0.30, 0.315))
    lash = capsule(x * side, y, 0.18, 0.2, 0.36, 0.25, lashes, lashes * 0.2) + 0.02 * (lashes == 0)
    s.mark(at, join(lid, lash) - (0.02 if s.ink else 0.0), s.fixed("#4a3138", INK))


def mouth(s):
    window, lips = (-0.5, 0.5, -0.95, -0.45), s.fixed("#8c4038", INK)
    for some in s.only("mood", "serious"):
        at = some.head(*window)
        some.mark(at, capsule(at.x, at.y + 0.4 * at.x.square(), -0.15, -0.67, 0.15, -0.67, 0.026, 0.026), lips)
    for some in s.only("mood", "smiling"):
        at = some.head(*window)
        some.mark(at, capsule(at.x, at.y - 1.3 * at.x.square(), -0.23, -0.72, 0.23, -0.72, 0.028, 0.028), lips)
    for some in s.only("mood", "laughing"):
        at = some.head(*window)
        hole = both(ellipse(at.x, at.y, 0, -0.58, 0.27, 0.26), at.y - 0.3 * at.x.square() + 0.6)
        some.paint(at, hole, some.fixed("#8a3030", "#7a0f1c"), line=0.8)
        some.mark(at, both(hole + 0.015, ellipse(at.x, at.y, 0, -0.83, 0.17, 0.11)), some.fixed("#e88a80", "#ff7a78"))
        some.mark(at, both(hole + 0.02, -0.665 - at.y), some.fixed("#ffffff"))


def front_hair(s):
    for some in s.only("hairstyle", "long"):
        at = some.head(-1.3, 1.3, -2.3, 0.4)
        side = at.x.abs() + 0.06 * torch.sin(at.y * 3)
        some.paint(
            at, capsule(side, at.y, 0.93, 0.1, 0.95, -1.85, 0.18, 0.02 if some.ink else 0.11), some.hair, side - 1.0
        )
    at = s.head(-1.5, 1.5, -1.0, 1.6)
    shape = both(skull(s, at), (fringe(s, at.x) - at.y) * 0.55)
    s.paint(at, shape, s.hair, at.x * 0.7 - at.y - 0.1, soft=0.9)
    shine = (at.y - 0.84 + 0.28 * at.x.square() - (0.07 if s.ink else 0.03) * s.wave(at.x * 4)).abs() - 0.045
    s.mark(at, both(shine, (at.x + 0.12).abs() - 0.5, shape + 0.05), s.hair * 0.5 + 0.5, 0.7 if s.ink else 0.35)
    at = s.head(-0.9, 0.9, -0.1, 0.7)
    up, slant = s.numbers("mood", serious=(-0.11, 0.3), smiling=(0.0, -0.12), laughing=(0.03, -0.24))
    x, y, thick = at.x.abs() - 0.4, at.y, s.build[5]
    y = y - 0.29 - up + 0.6 * x.square() - slant * x
    s.mark(at, capsule(x, y, -0.19, 0, 0.19, 0, thick * 1.1, thick * 0.5), s.hair * 0.5)


def headgear(s):
    for value, draw in (("headband", headband), ("cap", cap), ("straw hat", straw_hat)):
        for some in s.only("headgear", value):
            draw(some, some.head(-1.9, 1.9, -0.2, 1.9))
    for some in s.only("headgear", "none"):
        for girl in some.only("who", "girl"):
            at = girl.head(-1.0, -0.3, 0.3, 1.0)
            petals = join(
                *(
                    circle(at.x, at.y, -0.66 + 0.1 * math.sin(i * 1.257), 0.62 + 0.1 * math.cos(i * 1.257), 0.075)
                    for i in range(5)
                )
            )
            girl.paint(at, petals, girl.fixed("#f2a7b5", "#ff6fa0"), line=0.8)
            girl.mark(at, circle(at.x, at.y, -0.66, 0.62, 0.06), girl.fixed("#fbe7a8", "#ffe14a"))


def headband(s, at):
    x, y = at.x, at.y + 0.16 * at.x.square()
    cloth = both((y - 0.6).abs() - 0.15, circle(at.x, at.y, 0, 0.14, 1.04))
    s.paint(at, cloth, s.fixed("#4a5679", "#23306b"), x - 0.3)
    if s.ink:
        s.paint(at, box(x, y, 0, 0.6, 0.42, 0.15, 0.05), s.fixed("#dfe6f0"), x * 0.9 - y + 0.55, 0.9)
        s.mark(at, join(circle(x.abs(), y, 0.34, 0.6, 0.03), circle(x, y, 0, 0.6, 0.075).abs() - 0.02), s.fixed(INK))
    else:
        s.mark(at, both((y - 0.6).abs() - 0.04, cloth), s.fixed("#e8dcc4"))


def cap(s, at):
    x, y = at.x, at.y
    dome = both(ellipse(x, y, 0, 0.3, 1.06, 0.98), 0.5 - 0.1 * x.square() - y)
    s.paint(at, circle(x, y, 0, 1.29, 0.09), s.cloth * 0.7)
    s.paint(at, dome, s.cloth * 0.95, x * 0.6 - y + 0.85)
    s.mark(at, both(ellipse(x, y, 0, 0.4, 0.55, 0.9).abs() - 0.018, dome + 0.03), s.cloth * 0.55, 0.8)
    s.paint(
        at, ellipse(x, y + 0.25 * x.square(), 0, 0.56, 0.98, 0.2), s.cloth * 0.72, 0.5 - 0.25 * x.square() - y, soft=0.3
    )


def straw_hat(s, at):
    x, y = at.x, at.y + 0.06 * at.x.square()
    straw = s.fixed("#e3c27f", "#f2bf3d")
    crown = both(ellipse(x, y, 0, 0.62, 0.95, 0.94), 0.6 - y)
    s.paint(at, crown, straw, x * 0.6 - y + 0.9)
    s.paint(at, both(crown, (y - 0.8).abs() - 0.14), s.fixed("#b8504c", "#d81f2a"), line=0.5)
    s.paint(at, box(x, y, 0, 0.6, 1.55, 0.13, 0.13), straw, 0.6 - y, soft=0.4)


def hand(s):
    for some in s.only("pose", "waving"):
        at = some.body(0.6, 2.2, -4.0, 0.3)
        x, y = at.x, at.y
        some.paint(at, capsule(x, y, 1.15, -2.6, 1.4, -1.1, 0.26, 0.24), some.cloth, x - 1.4)
        fingers = ((1.18, -0.28), (1.36, -0.16), (1.55, -0.18), (1.72, -0.32))
        palm = [ellipse(x, y, 1.43, -0.66, 0.24, 0.26), capsule(x, y, 1.4, -0.75, 1.12, -0.6, 0.09, 0.07)]
        some.paint(
            at, join(*palm, *(capsule(x, y, 1.44, -0.62, *end, 0.09, 0.075) for end in fingers)), some.skin, x - 1.5
        )


# ---------------------------------------------------------------- pictures


def paint_all(attributes, jitter, style, size, device):
    """Pictures in [0, 1]: [n, 3, size, size]."""
    s = Scene(attributes, jitter, style, torch.empty(len(attributes), 3, size, size, device=device))
    for part in (background, back_hair, body, face, eyes, mouth, front_hair, headgear, hand):
        part(s)
    return s.canvas


def render(attributes: torch.Tensor, seed: int, style: str = "plain", size: int = 128, device="cpu") -> torch.Tensor:
    """Draws `attributes` [N, len(ATTRIBUTES)]: uint8 [N, 3, size, size]. Picture i is a matter of its attributes, `seed` and i."""
    if style not in STYLES:
        raise ValueError(f"style is one of {STYLES}, not {style!r}")
    jitter = torch.rand(len(attributes), len(JITTER), generator=generator_for("jitter", seed))
    at_once = 16 if torch.device(device).type == "cpu" else 512  # what fits a CPU's cache, and a GPU's memory
    result = torch.empty(len(attributes), 3, size, size, dtype=torch.uint8, device=device)
    for first in range(0, len(attributes), at_once):
        some = slice(first, first + at_once)
        result[some] = (paint_all(attributes[some].cpu(), jitter[some], style, size, device) * 255).round()
    return result
