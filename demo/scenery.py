"""What lies behind the people of the world: skies, hills, trees, mountains, and the seven backgrounds made of them."""

import math

import torch

from demo.canvas import both, circle, ellipse, join
from demo.world import BACKGROUNDS


def sky(s, at, top, bottom):
    """From `bottom` to `top`: a soft gradient, or in ink flat bands with halftone dots above."""
    t = (at.y * 0.5 + s.rand("first", 0.42, 0.58)).clamp(0, 1)
    t = (t * 3.99).floor() / 3 if s.ink else t
    top = s.fixed(*top)
    bottom = s.fixed(*bottom)
    s.canvas[:] = bottom + (top - bottom) * t[:, None]
    if s.ink:
        u = (at.x + at.y) * 9
        v = (at.x - at.y) * 9
        dots = circle((u - u.floor(), v - v.floor()), (0.5, 0.5), (at.y + 0.35) * 0.3) / 12.7
        s.mark(at, dots, top, alpha=0.55)


def speed_lines(s, at, colour, alpha):
    """Rays around the head, in ink only."""
    if s.ink:
        turn = torch.atan2(at.x, at.y - 0.1) * (23 / math.tau) + s.rand("second", 0, 5)
        r = circle(at.xy, (0, 0.1), 0)
        width = 0.16 * ((r - 0.65) / 0.7).clamp(0, 1) * (0.6 + 0.4 * torch.sin(turn.floor() * 2.4))
        s.mark(at, ((turn - turn.floor() - 0.5).abs() - width) * r * (math.tau / 23), s.fixed(colour), alpha)


def cloud(s, at, colours, *, centre, size, alpha=1.0) -> None:
    x = (at.x - centre[0]) / size
    y = (at.y - centre[1]) / size
    base = ellipse((x, y), (0, 0), (1.9, 0.42))
    heaps = [
        circle((x, y), middle, r) for middle, r in (((-0.85, 0.3), 0.55), ((0.05, 0.62), 0.8), ((0.95, 0.25), 0.6))
    ]
    d = join(base, *heaps, k=0.15) * size
    s.paint(at, d, s.fixed(*colours), (0.25 - y - x * 0.2) * size, line=0.8, alpha=alpha, soft=0.8 * size)


def land(s, at, colours, *, height, line=1.0) -> None:
    """What lies below `height`, whose usual steepness is 0.5."""
    d = (at.y - height) / math.hypot(1, 0.5)
    s.paint(at, d, s.fixed(*colours), None if s.ink else height - at.y - 0.35, line=line, soft=0.5)


def hills(s, at, colours, *, level, height, count, jitter) -> None:
    """A wave `height` above and below `level`; the number named `jitter` places it."""
    land(s, at, colours, height=level + height * torch.sin(at.x * count + s.rand(jitter, 0, 6)))


def trees(s, at, colours, *, top, width, jitter) -> None:
    """A row of firs, whose tiers are rounded in plain and jagged in ink."""
    t = at.x / width + s.rand(jitter, 0, 5)
    down = top + 0.16 * torch.sin(t.floor() * 2.7) - at.y
    tier = down.clamp(min=0) * 3.2
    reach = down * 0.26 + (0.15 if s.ink else 0.12) * (tier - tier.floor()) - 0.05
    across = (t - t.floor() - 0.5) * width
    d = both(across.abs() - reach.clamp(max=0.6 * width), -down) * 0.85
    s.paint(at, d, s.fixed(*colours), across - 0.03 if s.ink else across + 0.2 * down - 0.25, line=0.8, soft=0.3)


def mountains(s, at, colours, *, level, height, count, jitter) -> None:
    """A row of peaks with snow on them."""
    t = at.x * count + s.rand(jitter, 0, 5)
    across = t - t.floor() - 0.5
    rise = (0.8 + 0.2 * torch.sin(t.floor() * 2.7)) * (1 - ((2 * across).square() + (0 if s.ink else 0.01)).sqrt())
    d = (at.y - level - height * rise) / math.hypot(1, 2 * height * count)
    side = (across + 0.03 * s.wave(at.y * 3)) / count
    below_the_snow = (level + height * (0.42 + 0.14 * s.wave(t * 5)) - at.y) / 2
    s.paint(at, d, s.fixed(*colours), side, soft=0.25)
    s.paint(at, both(d, below_the_snow), s.fixed("#ffffff"), side, line=0.4, soft=0.25)


def red_sky(s, at):
    sky(s, at, ("#b53c4a", "#c4121f"), ("#f3a58c", "#ff5a3c"))
    speed_lines(s, at, "#7d0716", 0.6)
    for cx, cy, size in ((-0.72, 0.55, 0.2), (0.8, 0.7, 0.17), (0.92, 0.0, 0.15), (-0.95, -0.1, 0.13)):
        centre = (cx + s.rand("third", -0.12, 0.12), cy)
        cloud(s, at, ("#983a4c", "#8e0c22"), centre=centre, size=size, alpha=0.9)
    hills(s, at, ("#6e2d42", "#5a0a22"), level=-0.55, height=0.07, count=3, jitter="second")


def blue_sky(s, at):
    sky(s, at, ("#5fa6de", "#1c86f2"), ("#d9effa", "#8fd8ff"))
    speed_lines(s, at, "#ffffff", 0.35)
    for cx, cy, size in ((-0.72, 0.55, 0.24), (0.78, 0.36, 0.28), (-0.95, -0.05, 0.2)):
        centre = (cx + s.rand("third", -0.15, 0.15), cy)
        cloud(s, at, ("#ffffff",), centre=centre, size=size, alpha=0.95)
    hills(s, at, ("#a5cf8a", "#8fdc4a"), level=-0.4, height=0.08, count=2.6, jitter="second")
    hills(s, at, ("#c6dd8f", "#5cbf3a"), level=-0.55, height=0.1, count=2, jitter="first")


def forest(s, at):
    sky(s, at, ("#cfe3b8", "#b7e37a"), ("#f4f5d6", "#eef9b0"))
    trees(s, at, ("#a9c99a", "#7cc95c"), top=0.72, width=0.34, jitter="first")
    trees(s, at, ("#76a878", "#2f9a4a"), top=0.48, width=0.46, jitter="second")
    trees(s, at, ("#4d8262", "#14703a"), top=0.1, width=0.62, jitter="third")


def sea(s, at):
    sky(s, at, ("#9fd6ea", "#59c9f5"), ("#f4faf2", "#d8f8ff"))
    cloud(s, at, ("#ffffff",), centre=(s.rand("third", 0.5, 0.85), 0.66), size=0.2)
    hills(s, at, ("#8fb7b5", "#37b08c"), level=0.12, height=0.1, count=4, jitter="first")
    waves = (
        (0.12, 3.2, "first", "#4a9ab6", "#0f8fc4"),
        (-0.14, 2.2, "second", "#66b7c6", "#12b3d1"),
        (-0.45, 1.5, "third", "#92d3d2", "#4be0dd"),
    )
    for level, count, name, *colours in waves:
        crest = level - 0.07 * s.wave(at.x * count + s.rand(name, 0, 5))
        land(s, at, colours, height=crest, line=0.7)
        s.mark(at, (at.y - crest + 0.05).abs() - 0.016, s.fixed("#ffffff"), 0.75)


def sunset(s, at):
    sky(s, at, ("#8f6fa8", "#7a2fa8"), ("#ffc27a", "#ffb020"))
    speed_lines(s, at, "#fff0a0", 0.5)
    sun = circle(at.xy, (s.rand("third", -0.66, -0.5), 0.1), 0.3)
    s.mark(at, sun - 0.14, s.fixed("#fff0b8", "#ffe93b"), 0.25)
    s.paint(at, sun, s.fixed("#fff0b8", "#ffe93b"))
    cloud(s, at, ("#e79a9c", "#ff6f8a"), centre=(0.75, s.rand("second", 0.4, 0.6)), size=0.18, alpha=0.8)
    hills(s, at, ("#b06c83", "#a83a7d"), level=-0.1, height=0.1, count=2.5, jitter="second")
    hills(s, at, ("#6b4468", "#4a1a5e"), level=-0.42, height=0.12, count=3, jitter="first")


def night(s, at):
    sky(s, at, ("#232a52", "#0d0f3c"), ("#5a5f97", "#2c2f8f"))
    for i in range(14):
        cx = math.sin(i * 12.9) * 0.98
        cy = 0.98 - (i * 0.37 % 1) * 1.3
        r = 0.022 + 0.014 * (i % 3)
        s.mark(at, (at.x - cx).abs() + (at.y - cy).abs() - r, s.fixed("#fff6cf"), 0.9)
    cx = s.rand("third", 0.56, 0.74)
    moon = circle(at.xy, (cx, 0.6), 0.25)
    s.mark(at, moon - 0.12, s.fixed("#fff3c4"), 0.15)
    s.paint(at, moon, s.fixed("#fdf1c8", "#ffef9a"), (at.x - cx) * 0.7 - at.y + 0.5, line=0.7)
    hills(s, at, ("#3b4172", "#242478"), level=-0.18, height=0.12, count=2.6, jitter="second")
    trees(s, at, ("#222647", "#0c0d33"), top=-0.05, width=0.3, jitter="first")


def snow(s, at):
    sky(s, at, ("#9dbde2", "#5fb0ff"), ("#f5ebef", "#d4ecff"))
    mountains(s, at, ("#a3b3d3", "#8c9fe0"), level=-0.25, height=1.05, count=0.75, jitter="first")
    mountains(s, at, ("#7f8fb8", "#5466b8"), level=-0.6, height=0.95, count=1.0, jitter="second")
    hills(s, at, ("#f5f7fc", "#f0f6ff"), level=-0.6, height=0.07, count=2.5, jitter="third")


def background(s):
    for name, paint in zip(BACKGROUNDS, (red_sky, blue_sky, forest, sea, sunset, night, snow)):
        for some in s.only("background", name):
            paint(some, some.everywhere())
