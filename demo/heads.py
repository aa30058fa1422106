"""The heads of the people of the world: hair, face, eyes, mouth. `s` is a canvas.Scene, `at` a canvas.Frame in it."""

import math

import torch

from demo.canvas import INK, both, box, capsule, circle, ellipse, join, step
from demo.world import EYES


def skull(s, at):
    """Distance to the outline of the hair on the head: lobes in plain, spikes in ink, neither below the ears."""
    y = at.y - 0.14
    r = circle((at.x, y), (0, 0), 0)
    turn = torch.atan2(at.x, y) / math.tau
    lean = 0.25 * (r - 1) * turn.sign() if s.ink else 0.0
    (flat,) = s.numbers("headgear", none=(0.0,), headband=(0.0,), cap=(0.8,), straw_hat=(0.8,))
    waves = s.wave(turn * (11 if s.ink else 9) + s.rand("phase") + lean)
    locks = waves * s.rand("amount", 0.75, 1.15) * (1 - flat * step(y, 0.1, 0.4))
    return (r - 0.98 - (0.30 if s.ink else 0.07) * locks * step(-turn.abs(), -0.42, -0.3)) * (0.62 if s.ink else 0.95)


def ponytail(s, at) -> None:
    x = -at.x
    y = at.y
    locks = (
        capsule((x, y), (0.7, 0.85), (1.15, 0.95), (0.14, 0.25)),
        capsule((x, y), (1.15, 0.95), (1.5, 0.4), (0.25, 0.3)),
        capsule((x, y), (1.5, 0.4), (1.42, -0.75), (0.3, 0.02)),
        capsule((x, y), (1.35, 0.5), (1.75, -0.35), (0.2, 0.02)),
    )
    s.paint(at, join(*locks, k=0.0 if s.ink else 0.15), s.hair, 1.38 - x - y * 0.2)
    s.paint(at, box((x, y), (0.9, 0.88), (0.1, 0.2), 0.08), s.fixed("#c9605a", "#e0263a"))


def back_hair(s) -> None:
    """What hair is seen behind the body."""
    for some in s.only("hairstyle", "ponytail"):
        ponytail(some, some.head(-2.1, -0.4, -1.5, 1.6))
    at = s.head(-1.5, 1.5, -1.2, 1.6)
    s.paint(at, skull(s, at), s.hair * 0.9, -0.6 * at.y - 0.3)
    for some in s.only("hairstyle", "long"):
        at = some.head(-1.4, 1.4, -2.4, 0.6)
        hem = -1.8 - (0.4 if s.ink else 0.12) * some.wave(at.x * 2.2 + some.rand("phase"))
        sides = at.x.abs() - 1.0 + 0.10 * at.y.clamp(max=0) * (at.y + 1.6)
        some.paint(at, both(sides, (hem - at.y) * 0.6, at.y - 0.4), some.hair * 0.9, at.x - at.y - 1.6)


def fringe(s, x):
    """Lower edge of the front hair at x: lobes or spikes over the forehead, as low at the sides as the hairstyle."""
    (sides,) = s.numbers("hairstyle", short=(0.55,), long=(1.0,), ponytail=(0.7,))
    locks = s.wave(x * (1.9 if s.ink else 1.4) + s.rand("phase")) * s.rand("amount", 0.85, 1.1)
    return 0.52 - (0.42 if s.ink else 0.22) * locks - sides * step(x.abs(), 0.62, 0.92)


def jawline(s, at):
    """Distance to the outline of the face, narrower towards the chin."""
    width = s.build.face * (1 - s.build.jaw * (0.15 - at.y).clamp(min=0).square())
    return ellipse((at.x / width, at.y), (0, -0.04), (1, 0.92))


def face(s) -> None:
    """Ears, skin, cheeks and nose, and what only some have."""
    at = s.head(-1.2, 1.2, -1.15, 1.1)
    x, y = at.xy
    ears = ellipse((x.abs() / s.build.face, y), (1.0, -0.2), (0.16, 0.22))
    s.paint(at, ears, s.skin * 0.94, -0.3 * y - 0.1)
    s.mark(at, ears + 0.09, s.skin * 0.75)

    # Skin, and the shadow of the hair on it
    shape = jawline(s, at)
    s.paint(at, shape, s.skin, x * 0.75 - y * 0.45 - 0.62, soft=0.5)
    s.mark(at, both(shape, (fringe(s, x) - 0.10 - y) * 0.55), s.skin * s.fixed("#d8b8b4", "#c49aa8"), 0.75)

    # Cheeks: a flat patch in ink, a blush in plain
    cheeks = ellipse((x.abs(), y), (0.56, -0.47), (0.2, 0.11))
    blush = s.fixed("#ee8f80", "#ff8f8a")
    if s.ink:
        s.mark(at, cheeks, blush, 0.5)
    else:
        s.mark(at, cheeks - 0.12, blush, 0.6 * step(-cheeks, -0.1, 0.13))

    # Nose
    s.mark(at, capsule(at.xy, (0.02, -0.41), (0.06, -0.5), (0.02, 0.033)), s.skin * (0.45 if s.ink else 0.78))

    # Beard, plaster or earrings
    for some in s.only("who", "man"):
        beard(some, some.head(-1.0, 1.0, -1.15, -0.1))
    for some in s.only("who", "boy"):
        at = some.head(-0.8, -0.3, -0.65, -0.3)
        plaster = box((at.x, at.y + 0.25 * at.x), (-0.56, -0.62), (0.16, 0.055), 0.05)
        some.paint(at, plaster, some.fixed("#f3e3cd", "#fff3dc"), line=0.6)
    for some in s.only("who", "woman"):
        at = some.head(-1.1, 1.1, -0.75, -0.3)
        some.paint(at, circle((at.x.abs(), at.y), (0.84, -0.5), 0.085), some.fixed("#edc75f", "#ffd21f"), line=0.8)


def beard(s, at) -> None:
    ragged = 0.10 * s.wave(at.x * 3.5) if s.ink else 0.0
    shape = both(jawline(s, at), at.y + 0.80 - 0.95 * at.x.square() + ragged)
    s.paint(at, shape, s.hair * 0.88, at.x - 0.2, line=0.5)


def eyes(s) -> None:
    """Both at once: x counts from the middle of each eye."""
    at = s.head(-0.85, 0.85, -0.55, 0.35)
    side = at.x.sign()
    x = (at.x.abs() - 0.39) * side / s.build.eyes
    y = (at.y + 0.13) / s.build.eyes
    white = ellipse((x, y), (0, 0), (0.25, 0.28))
    s.paint(at, white, s.fixed("#fffdf8", "#ffffff"), y - 0.1, line=0.3, soft=0.25)

    # Iris and pupil look where the gaze goes
    gaze = (x - s.rand("gaze", -0.03, 0.03) + 0.015 * side, y)
    iris = both(ellipse(gaze, (0, -0.01), (0.20, 0.25)), white)
    colour = s.named("eyes", EYES, jitter="iris", spread=0.04)
    s.mark(at, iris, colour * 0.5)
    s.paint(at, iris + 0.03, colour, y - 0.06, line=0, soft=0.2)
    s.mark(at, ellipse(gaze, (0, 0.0), (0.075, 0.105)), s.fixed("#2a1d24", "#14101f"))

    # Reflections
    glow = both(ellipse(gaze, (0, -0.17), (0.12, 0.06)), iris + 0.03)
    lights = join(ellipse(gaze, (-0.075, 0.09), (0.07, 0.075)), circle(gaze, (0.085, -0.1), 0.034))
    s.mark(at, glow, colour * 0.45 + 0.55, 0.85)
    s.mark(at, lights, s.fixed("#ffffff"))

    # Lids and lashes
    (lashes,) = s.numbers("who", man=(0.0,), woman=(0.05,), boy=(0.0,), girl=(0.05,))
    lid = both(ellipse((x, y), (0, 0.0), (0.29, 0.325)), -ellipse((x, y), (0, -0.07), (0.30, 0.315)))
    lash = capsule((x * side, y), (0.18, 0.2), (0.36, 0.25), (lashes, lashes * 0.2)) + 0.02 * (lashes == 0)
    s.mark(at, join(lid, lash) - (0.02 if s.ink else 0.0), s.fixed("#4a3138", INK))


def mouth(s) -> None:
    window = (-0.5, 0.5, -0.95, -0.45)
    lips = s.fixed("#8c4038", INK)
    for some in s.only("mood", "serious"):
        at = some.head(*window)
        line = (at.x, at.y + 0.4 * at.x.square())
        some.mark(at, capsule(line, (-0.15, -0.67), (0.15, -0.67), (0.026, 0.026)), lips)
    for some in s.only("mood", "smiling"):
        at = some.head(*window)
        line = (at.x, at.y - 1.3 * at.x.square())
        some.mark(at, capsule(line, (-0.23, -0.72), (0.23, -0.72), (0.028, 0.028)), lips)

    # A laugh shows tongue and teeth
    for some in s.only("mood", "laughing"):
        at = some.head(*window)
        hole = both(ellipse(at.xy, (0, -0.58), (0.27, 0.26)), at.y - 0.3 * at.x.square() + 0.6)
        tongue = ellipse(at.xy, (0, -0.83), (0.17, 0.11))
        some.paint(at, hole, some.fixed("#8a3030", "#7a0f1c"), line=0.8)
        some.mark(at, both(hole + 0.015, tongue), some.fixed("#e88a80", "#ff7a78"))
        some.mark(at, both(hole + 0.02, -0.665 - at.y), some.fixed("#ffffff"))


def front_hair(s) -> None:
    """What hair is seen before face and body, and the brows."""
    for some in s.only("hairstyle", "long"):
        at = some.head(-1.3, 1.3, -2.3, 0.4)
        side = at.x.abs() + 0.06 * torch.sin(at.y * 3)
        strand = capsule((side, at.y), (0.93, 0.1), (0.95, -1.85), (0.18, 0.02 if some.ink else 0.11))
        some.paint(at, strand, some.hair, side - 1.0)

    # The hair over the forehead, and the light on it
    at = s.head(-1.5, 1.5, -1.0, 1.6)
    shape = both(skull(s, at), (fringe(s, at.x) - at.y) * 0.55)
    shine = (at.y - 0.84 + 0.28 * at.x.square() - (0.07 if s.ink else 0.03) * s.wave(at.x * 4)).abs() - 0.045
    s.paint(at, shape, s.hair, at.x * 0.7 - at.y - 0.1, soft=0.9)
    s.mark(at, both(shine, (at.x + 0.12).abs() - 0.5, shape + 0.05), s.hair * 0.5 + 0.5, 0.7 if s.ink else 0.35)

    # Brows, raised and slanted by the mood
    at = s.head(-0.9, 0.9, -0.1, 0.7)
    up, slant = s.numbers("mood", serious=(-0.11, 0.3), smiling=(0.0, -0.12), laughing=(0.03, -0.24))
    thick = s.build.brows
    x = at.x.abs() - 0.4
    y = at.y - 0.29 - up + 0.6 * x.square() - slant * x
    s.mark(at, capsule((x, y), (-0.19, 0), (0.19, 0), (thick * 1.1, thick * 0.5)), s.hair * 0.5)
