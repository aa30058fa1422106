"""What the people of the world wear, and the body under it. `s` is a canvas.Scene, `at` a canvas.Frame in it."""

import math

from demo.canvas import INK, both, box, capsule, circle, ellipse, join


def torso(s, at):
    shoulders = s.build.shoulders
    return box((at.x, at.y + 0.30 * (at.x / shoulders).square()), (0, -3.2), (shoulders, 1.9), 0.3)


def body(s) -> None:
    """Neck, arms and torso, and the garment over them."""
    at = s.body(-2.2, 2.2, -4.0, -0.5)
    x, y = at.xy
    shoulders = s.build.shoulders
    arms = capsule((x.abs() - shoulders, y), (-0.12, -1.95), (0.16, -3.6), (0.26, 0.24))
    s.paint(at, box(at.xy, (0, -1.2), (s.build.neck, 0.6), 0.1), s.skin, y + 1.22)
    s.paint(at, arms, s.cloth * 0.9, x - 0.2)
    s.paint(at, torso(s, at), s.cloth, x * 0.7 - shoulders * 0.35 - (y + 2.2) * 0.25)

    for garment in (jacket, shirt, kimono, hoodie):
        for some in s.only("garment", garment.__name__):
            garment(some, some.body(-1.5, 1.5, -4.0, -0.6))


def jacket(s, at) -> None:
    # Shirt and neck in the opening
    y = at.y
    side = at.x.abs()
    opening = both(side - 0.12 - (y + 2.4).clamp(min=0) * 0.24, y + 1.12)
    s.paint(at, opening, s.fixed("#f6f0e6", "#fdfdff"), y + 1.35, line=0.5)
    s.paint(at, ellipse(at.xy, (0, -1.14), (0.33, 0.3)), s.skin, y + 1.25, line=0.4)

    # Zip, lapels and pockets
    upper = capsule((side, y), (0.40, -1.05), (0.14, -2.3), (0.13, 0.03))
    lower = capsule((side, y), (0.42, -1.15), (0.54, -1.6), (0.13, 0.05))
    s.mark(at, both(side - 0.028, y + 2.2), s.cloth * 0.5)
    s.paint(at, join(upper, lower), s.cloth * 0.92, -y - 1.5, line=0.9)
    s.mark(at, capsule((side, y), (0.5, -2.95), (0.72, -2.8), (0.03, 0.03)), s.cloth * 0.5)


def shirt(s, at) -> None:
    x, y = at.xy
    s.paint(at, ellipse(at.xy, (0, -1.26), (0.47, 0.36)), s.cloth * 0.72, line=0.5)
    s.paint(at, ellipse(at.xy, (0, -1.2), (0.36, 0.3)), s.skin, y + 1.3, line=0.4)
    for middle, half in ((-2.05, 0.07), (-2.28, 0.035)):
        stripe = (y - middle + 0.1 * x.square()).abs() - half
        s.mark(at, both(stripe, torso(s, at) + 0.02), s.cloth * 0.45 + 0.5, 0.9)


def kimono(s, at) -> None:
    x, y = at.xy
    within = torso(s, at)
    under = capsule(at.xy, (-0.52, -0.95), (0.02, -1.85), (0.15, 0.15))
    over = capsule(at.xy, (0.52, -0.95), (-0.42, -2.5), (0.15, 0.15))
    s.paint(at, both(x.abs() - 0.40 * (y + 2.1), y + 1.1), s.skin, y + 1.3, line=0.4)
    for lapel in (under, over):
        s.paint(at, both(lapel, within - 0.14), s.fixed("#f8f1e2", "#ffffff"), x * 0.5 - y - 2.1, line=0.8)
    s.paint(at, both((y + 2.75).abs() - 0.3, within), s.cloth * 0.5, x - 0.2, line=0.8)


def hoodie(s, at) -> None:
    x, y = at.xy
    strings = capsule((x.abs(), y), (0.26, -1.55), (0.3, -2.1), (0.045, 0.06))
    s.paint(at, ellipse(at.xy, (0, -1.25), (0.86, 0.42)), s.cloth * 0.95, -y - 1.35)
    s.paint(at, ellipse(at.xy, (0, -1.16), (0.5, 0.3)), s.cloth * 0.5, line=0.3)
    s.paint(at, ellipse(at.xy, (0, -1.08), (0.34, 0.3)), s.skin, y + 1.2, line=0.3)
    s.paint(at, strings, s.fixed("#fbf6ec", "#ffffff"), line=0.5)


def hand(s) -> None:
    """A raised arm and its open hand."""
    for some in s.only("pose", "waving"):
        at = some.body(0.6, 2.2, -4.0, 0.3)
        some.paint(at, capsule(at.xy, (1.15, -2.6), (1.4, -1.1), (0.26, 0.24)), some.cloth, at.x - 1.4)
        palm = ellipse(at.xy, (1.43, -0.66), (0.24, 0.26))
        thumb = capsule(at.xy, (1.4, -0.75), (1.12, -0.6), (0.09, 0.07))
        tips = ((1.18, -0.28), (1.36, -0.16), (1.55, -0.18), (1.72, -0.32))
        fingers = [capsule(at.xy, (1.44, -0.62), tip, (0.09, 0.075)) for tip in tips]
        some.paint(at, join(palm, thumb, *fingers), some.skin, at.x - 1.5)


def headgear(s) -> None:
    for value, paint in (("headband", headband), ("cap", cap), ("straw hat", straw_hat)):
        for some in s.only("headgear", value):
            paint(some, some.head(-1.9, 1.9, -0.2, 1.9))
    for some in s.only("headgear", "none"):
        for girl in some.only("who", "girl"):
            flower(girl, girl.head(-1.0, -0.3, 0.3, 1.0))


def flower(s, at) -> None:
    angles = [i * 1.257 for i in range(5)]
    centres = [(-0.66 + 0.1 * math.sin(angle), 0.62 + 0.1 * math.cos(angle)) for angle in angles]
    petals = join(*(circle(at.xy, centre, 0.075) for centre in centres))
    s.paint(at, petals, s.fixed("#f2a7b5", "#ff6fa0"), line=0.8)
    s.mark(at, circle(at.xy, (-0.66, 0.62), 0.06), s.fixed("#fbe7a8", "#ffe14a"))


def headband(s, at) -> None:
    """A strip of cloth: with a seam in plain, with a metal plate in ink."""
    x = at.x
    y = at.y + 0.16 * x.square()
    cloth = both((y - 0.6).abs() - 0.15, circle(at.xy, (0, 0.14), 1.04))
    s.paint(at, cloth, s.fixed("#4a5679", "#23306b"), x - 0.3)
    if s.ink:
        plate = box((x, y), (0, 0.6), (0.42, 0.15), 0.05)
        rivets = circle((x.abs(), y), (0.34, 0.6), 0.03)
        ring = circle((x, y), (0, 0.6), 0.075).abs() - 0.02
        s.paint(at, plate, s.fixed("#dfe6f0"), x * 0.9 - y + 0.55, line=0.9)
        s.mark(at, join(rivets, ring), s.fixed(INK))
    else:
        s.mark(at, both((y - 0.6).abs() - 0.04, cloth), s.fixed("#e8dcc4"))


def cap(s, at) -> None:
    x, y = at.xy
    dome = both(ellipse(at.xy, (0, 0.3), (1.06, 0.98)), 0.5 - 0.1 * x.square() - y)
    seam = ellipse(at.xy, (0, 0.4), (0.55, 0.9)).abs() - 0.018
    peak = ellipse((x, y + 0.25 * x.square()), (0, 0.56), (0.98, 0.2))
    s.paint(at, circle(at.xy, (0, 1.29), 0.09), s.cloth * 0.7)
    s.paint(at, dome, s.cloth * 0.95, x * 0.6 - y + 0.85)
    s.mark(at, both(seam, dome + 0.03), s.cloth * 0.55, 0.8)
    s.paint(at, peak, s.cloth * 0.72, 0.5 - 0.25 * x.square() - y, soft=0.3)


def straw_hat(s, at) -> None:
    x = at.x
    y = at.y + 0.06 * x.square()
    straw = s.fixed("#e3c27f", "#f2bf3d")
    crown = both(ellipse((x, y), (0, 0.62), (0.95, 0.94)), 0.6 - y)
    s.paint(at, crown, straw, x * 0.6 - y + 0.9)
    s.paint(at, both(crown, (y - 0.8).abs() - 0.14), s.fixed("#b8504c", "#d81f2a"), line=0.5)
    s.paint(at, box((x, y), (0, 0.6), (1.55, 0.13), 0.13), straw, 0.6 - y, soft=0.4)
