"""A procedural world of drawn people and their captions: every scene can be drawn in two styles, with the same attributes in both.

"plain" is soft and shaded like a picture book; "ink" has thick outlines, hard shadows, spiky hair, halftone and speed lines.
Shapes are signed distances (negative inside) on a pixel grid, for a batch of pictures at once. x points right, y up; the picture is
[-1, 1] on both axes, so any size shows the same scene. A person is drawn in units of the head: chin near y = -1, skull near y = 1.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import torch

from common.noise import generator_for

STYLES = ("plain", "ink")
# Colours by value and style (plain, ink): far enough apart to be told from each other after a lossy autoencoder, in either style.
HAIR = dict(
    black=("#3d3744", "#24232f"),
    brown=("#83573a", "#854a20"),
    blond=("#efcd7c", "#ffd43e"),
    red=("#c9573a", "#f03c20"),
    blue=("#5f93cf", "#2f74f0"),
    white=("#eeeae6", "#f3f4fb"),
)
EYES = dict(brown=("#7d4a29", "#8c4716"), blue=("#3f8fdc", "#1486ff"), green=("#4fa45c", "#12b04a"), purple=("#9a5fc4", "#a030e6"))
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


# ---------------------------------------------------------------- attributes and captions


def draw_attributes(count: int, seed: int) -> torch.Tensor:
    """Independent uniform attributes: int64 [count, len(ATTRIBUTES)], columns in the order of ATTRIBUTES."""
    uniform = torch.rand(count, len(NAMES), generator=generator_for("attributes", seed))
    return (uniform * torch.tensor([len(values) for values in ATTRIBUTES.values()])).long()


def describe(row: torch.Tensor) -> dict[str, str]:
    """One row of attributes [len(ATTRIBUTES)] in words."""
    return {name: ATTRIBUTES[name][value] for name, value in zip(NAMES, row.tolist())}


def caption(of: dict[str, str], kept: set[str], order: float, swap: bool) -> str:
    """Words for the attributes in `kept`; `order` in [0, 1) picks the sequence of the clauses, `swap` turns round the pairs in them."""
    tail = " in a ponytail" if {"hair", "hairstyle"} <= kept and of["hairstyle"] == "ponytail" else ""
    shape = f"{of['hairstyle']} " if "hairstyle" in kept and not tail and of["hairstyle"] != "ponytail" else ""
    features = [f"{shape}{of['hair']} hair{tail}"] * ("hair" in kept) + [f"{of['eyes']} eyes"] * ("eyes" in kept)
    clothes = [f"a {of['clothing']} {of['garment'] if 'garment' in kept else 'top'}"] * ("clothing" in kept)
    clothes += [f"a {of['headgear']}"] * ("headgear" in kept and of["headgear"] != "none")
    clauses = [
        "with " + " and ".join(features[::-1] if swap else features) if features else "",
        ("wearing " if swap else "in ") + " and ".join(clothes) if clothes else "",
        f"in front of {of['background']}" if "background" in kept else "",
    ]
    clauses = [clauses[i] for i in ((0, 1, 2), (1, 0, 2), (0, 2, 1), (2, 0, 1))[int(order * 4)]]
    mood = f"{of['mood']} " if "mood" in kept else ""
    framing = ("a portrait of " if of["framing"] == "portrait" else "a half body picture of ") if "framing" in kept else ""
    waving = "waving" if "pose" in kept and of["pose"] == "waving" else ""
    return " ".join(part for part in (f"{framing}a {mood}{of['who']}", *clauses, waving) if part)


def captions(attributes: torch.Tensor, seed: int, full: bool = False) -> list[str]:
    """One caption for each row of `attributes` [N, len(ATTRIBUTES)]; each leaves out some attributes, unless `full`."""
    draws = torch.rand(len(attributes), len(NAMES) + 2, generator=generator_for("captions", seed)).tolist()
    said = {"hair": 0.9, "eyes": 0.85, "clothing": 0.9, "background": 0.85, "headgear": 0.85, "pose": 0.85, "garment": 0.85}
    result = []
    for row, (order, swap, *keep) in zip(attributes, draws):
        kept = {name for name, number in zip(NAMES, keep) if full or number < said.get(name, 0.5)}
        result.append(caption(describe(row), kept, order, swap < 0.5))
    return result


# ---------------------------------------------------------------- painting

# What differs between pictures of equal attributes: a number in [0, 1) for each name. The last three place the parts of a background.
JITTER = ("x", "y", "scale", "tilt", "skin", "hair", "cloth", "iris", "phase", "amount", "gaze", "first", "second", "third")
INK, LINE = "#1d1730", 0.027  # colour of outlines, and their width: they grow outwards, so that fills keep their size
SHADE = ("#d2c5d8", "#c0b2d2")  # (plain, ink); multiplies the colours that lie in shadow


def rgb(code: str) -> list[float]:
    """Hexadecimal red, green, blue -> three numbers in [0, 1]."""
    return [int(code[i : i + 2], 16) / 255 for i in (1, 3, 5)]


def cover(d, px):
    """The share of a pixel of width `px` that lies inside an edge at signed distance `d`."""
    return (0.5 - d / px).clamp(0, 1)


def step(x, start, end):
    """Smooth from 0 at `start` to 1 at `end`."""
    t = ((x - start) / (end - start)).clamp(0, 1)
    return t * t * (3 - 2 * t)


def circle(x, y, cx, cy, r):
    return ((x - cx).square() + (y - cy).square()).sqrt() - r


def ellipse(x, y, cx, cy, rx, ry):
    """First order in the distance: exact at the edge, which is all that coverage and outlines need."""
    u, v = (x - cx) / rx, (y - cy) / ry
    f = (u * u + v * v).sqrt()
    return f * (f - 1) / ((u / rx).square() + (v / ry).square() + 1e-6).sqrt()


def capsule(x, y, x0, y0, x1, y1, r0, r1):
    """A thick line from (x0, y0) to (x1, y1) whose radius goes from r0 to r1."""
    dx, dy = x1 - x0, y1 - y0
    u, v = x - x0, y - y0
    t = ((u * dx + v * dy) / (dx * dx + dy * dy)).clamp(0, 1)
    return ((u - t * dx).square() + (v - t * dy).square()).sqrt() - r0 - (r1 - r0) * t


def box(x, y, cx, cy, hx, hy, r):
    """A rectangle of half sizes hx, hy with corners of radius r."""
    u, v = (x - cx).abs() - hx + r, (y - cy).abs() - hy + r
    return (u.clamp(min=0).square() + v.clamp(min=0).square()).sqrt() + torch.maximum(u, v).clamp(max=0) - r


def join(first, *others, k=0.0):
    """Union of shapes, whose seams are rounded over a distance k."""
    for other in others:
        fillet = (k - (first - other).abs()).clamp(min=0) if k else 0.0
        first = torch.minimum(first, other) - (fillet * fillet / (4 * k) if k else 0.0)
    return first


def both(first, *others):
    """Intersection of shapes; both(a, -b) cuts b out of a."""
    for other in others:
        first = torch.maximum(first, other)
    return first


@dataclass
class Frame:
    """Coordinates x, y [N, h, w] in a window (rows, columns) of the pictures; px [N, 1, 1] is a pixel's width, unit half a picture's."""

    x: torch.Tensor
    y: torch.Tensor
    px: torch.Tensor
    unit: torch.Tensor
    rows: slice
    columns: slice


class Scene:
    """Pictures while they are painted: what is known of them on the CPU, the canvas [N, 3, size, size] in [0, 1] on its device."""

    def __init__(self, attributes, jitter, style, canvas):
        self.attributes, self.jitter, self.style, self.canvas = attributes, jitter, STYLES.index(style), canvas
        self.ink, self.size = style == "ink", canvas.shape[-1]

    def only(self, name: str, *values: str) -> Iterator["Scene"]:
        """The pictures whose attribute `name` is one of `values`, to paint on in a loop of one round, or none where there are none."""
        rows = torch.isin(self.column(name), torch.tensor([ATTRIBUTES[name].index(value) for value in values])).nonzero()[:, 0]
        if len(rows):
            there = rows.to(self.canvas.device)
            some = Scene(self.attributes[rows], self.jitter[rows], STYLES[self.style], self.canvas[there])
            yield some
            self.canvas[there] = some.canvas

    def column(self, name):
        return self.attributes[:, NAMES.index(name)]

    def draw(self, name, low=0.0, high=1.0):
        """Each picture's own number between low and high: [N], on the CPU."""
        return low + (high - low) * self.jitter[:, JITTER.index(name)]

    def send(self, numbers):
        """[N] or [N, 3] -> [N, 1, 1] or [N, 3, 1, 1] on the canvas's device."""
        return numbers.float().to(self.canvas.device)[..., None, None]

    def rand(self, name, low=0.0, high=1.0):
        return self.send(self.draw(name, low, high))

    def numbers(self, name, **table):
        """table[value][k] for each picture's value of attribute `name`: a list over k of [N, 1, 1]."""
        return [self.send(column) for column in torch.tensor(list(table.values()))[self.column(name)].unbind(1)]

    def named(self, name, table, jitter, spread):
        """The style's colour for attribute `name`, a little lighter or darker from picture to picture: [N, 3, 1, 1]."""
        colours = torch.tensor([rgb(pair[self.style]) for pair in table.values()])[self.column(name)]
        return self.send(colours * self.draw(jitter, 1 - spread, 1 + spread)[:, None]).clamp(max=1)

    def fixed(self, *codes):
        """A colour by style (or one for both), the same in every picture: [1, 3, 1, 1]."""
        return torch.tensor(rgb(codes[self.style % len(codes)]), device=self.canvas.device).view(1, 3, 1, 1)

    @cached_property
    def hair(self):
        return self.named("hair", HAIR, "hair", 0.05)

    @cached_property
    def cloth(self):
        return self.named("clothing", CLOTHING, "cloth", 0.05)

    @cached_property
    def skin(self):
        light, dark = self.fixed("#fbdcc3", "#ffdfc2"), self.fixed("#cf9670", "#d69663")
        return light + (dark - light) * self.rand("skin").square()[:, None]

    @cached_property
    def build(self):
        """The proportions in WHO: a list of [N, 1, 1]."""
        return self.numbers("who", **WHO)

    def wave(self, t):
        """A wave of period 1 between 0 and 1 with cusps at 0: round lobes in plain, spikes in ink."""
        t = (2 * (t - t.floor()) - 1).abs()
        return 1 - t if self.ink else 1 - t * t

    def span(self, low, high):
        """The pixels between two coordinates, as a slice that is never empty."""
        first, last = (min(max(math.floor((n + 1) / 2 * self.size), 0), self.size - 1) for n in (low, high))
        return slice(first, last + 1)

    def frame(self, cx, cy, scale, angle, window) -> Frame:
        """A frame at (cx, cy), `scale` large and turned by `angle` (each [N]), where its own window (x0, x1, y0, y1) is seen."""
        cos, sin = angle.cos() * scale, angle.sin() * scale
        corners = [(x, y) for x in window[:2] for y in window[2:]]
        across = torch.stack([cx + x * cos - y * sin for x, y in corners])
        down = -torch.stack([cy + x * sin + y * cos for x, y in corners])
        rows, columns = (self.span(n.min().item(), n.max().item()) for n in (down, across))
        centres = (torch.arange(self.size, device=self.canvas.device) + 0.5) * (2 / self.size) - 1
        u, v = centres[columns] - self.send(cx), -centres[rows, None] - self.send(cy)
        cos, sin, unit = (self.send(n) for n in (cos / scale**2, sin / scale**2, 1 / scale))
        return Frame(u * cos + v * sin, v * cos - u * sin, 2 / self.size * unit, unit, rows, columns)

    def everywhere(self) -> Frame:
        zero = torch.zeros(len(self.attributes))
        return self.frame(zero, zero, zero + 1, zero, (-1, 1, -1, 1))

    def head(self, *window, tilted=1.0) -> Frame:
        half = self.column("framing") == 1
        scale = torch.where(half, 0.40, 0.50) * self.draw("scale", 0.95, 1.05)
        x, y = self.draw("x", -0.08, 0.08), torch.where(half, 0.28, 0.11) + self.draw("y", -0.04, 0.04)
        return self.frame(x, y, scale, tilted * self.draw("tilt", -0.16, 0.16), window)

    def body(self, *window) -> Frame:
        """The head turns about its middle; the body stands upright below."""
        return self.head(*window, tilted=0.0)

    def paint(self, at, d, colour, shadow=None, line=1.0, alpha=1.0, soft=0.7):
        """Fill where d < 0. Where `shadow` > 0 lies shade: over a distance `soft` in plain, behind a hard edge in ink; ink has outlines."""
        there = self.canvas[:, :, at.rows, at.columns]
        if self.ink and line:
            there.lerp_(self.fixed(INK), cover(d - line * LINE * at.unit, at.px)[:, None])
        if shadow is not None:
            shade = cover(-shadow, at.px) if self.ink else step(shadow, -soft, soft)
            colour = colour * (1 - (1 - self.fixed(*SHADE)) * shade[:, None])
        there.lerp_(colour.expand_as(there), (cover(d, at.px) * alpha)[:, None])

    def mark(self, at, d, colour, alpha=1.0):
        """Fill without shade or outline."""
        self.paint(at, d, colour, line=0, alpha=alpha)


# ---------------------------------------------------------------- backgrounds


def sky(s, at, top, bottom):
    """From `bottom` to `top`: a soft gradient, or in ink flat bands with halftone dots above."""
    t = (at.y * 0.5 + s.rand("first", 0.42, 0.58)).clamp(0, 1)
    t = (t * 3.99).floor() / 3 if s.ink else t
    top, bottom = s.fixed(*top), s.fixed(*bottom)
    s.canvas[:] = bottom + (top - bottom) * t[:, None]
    if s.ink:
        u, v = (at.x + at.y) * 9, (at.x - at.y) * 9
        dots = circle(u - u.floor(), v - v.floor(), 0.5, 0.5, (at.y + 0.35) * 0.3) / 12.7
        s.mark(at, dots, top, alpha=0.55)


def speed_lines(s, at, colour, alpha):
    """Rays around the head, in ink only."""
    if s.ink:
        turn = torch.atan2(at.x, at.y - 0.1) * (23 / math.tau) + s.rand("second", 0, 5)
        r = circle(at.x, at.y, 0, 0.1, 0)
        width = 0.16 * ((r - 0.65) / 0.7).clamp(0, 1) * (0.6 + 0.4 * torch.sin(turn.floor() * 2.4))
        s.mark(at, ((turn - turn.floor() - 0.5).abs() - width) * r * (math.tau / 23), s.fixed(colour), alpha)


def cloud(s, at, cx, cy, size, colours, alpha=1.0):
    x, y = (at.x - cx) / size, (at.y - cy) / size
    d = join(
        ellipse(x, y, 0, 0, 1.9, 0.42), *(circle(x, y, *c) for c in ((-0.85, 0.3, 0.55), (0.05, 0.62, 0.8), (0.95, 0.25, 0.6))), k=0.15
    )
    s.paint(at, d * size, s.fixed(*colours), (0.25 - y - x * 0.2) * size, 0.8, alpha, soft=0.8 * size)


def land(s, at, height, colours, slope=0.5, line=1.0):
    """What lies below `height`; `slope` is its usual steepness."""
    s.paint(at, (at.y - height) / math.hypot(1, slope), s.fixed(*colours), None if s.ink else height - at.y - 0.35, line, soft=0.5)


def hills(s, at, level, height, count, name, colours):
    land(s, at, level + height * torch.sin(at.x * count + s.rand(name, 0, 6)), colours)


def trees(s, at, top, width, name, colours):
    """A row of firs, whose tiers are rounded in plain and jagged in ink."""
    t = at.x / width + s.rand(name, 0, 5)
    down = top + 0.16 * torch.sin(t.floor() * 2.7) - at.y
    tier = down.clamp(min=0) * 3.2
    reach = down * 0.26 + (0.15 if s.ink else 0.12) * (tier - tier.floor()) - 0.05
    across = (t - t.floor() - 0.5) * width
    d = both(across.abs() - reach.clamp(max=0.6 * width), -down) * 0.85
    s.paint(at, d, s.fixed(*colours), across - 0.03 if s.ink else across + 0.2 * down - 0.25, line=0.8, soft=0.3)


def mountains(s, at, level, height, count, name, colours):
    t = at.x * count + s.rand(name, 0, 5)
    across = t - t.floor() - 0.5
    rise = (0.8 + 0.2 * torch.sin(t.floor() * 2.7)) * (1 - ((2 * across).square() + (0 if s.ink else 0.01)).sqrt())
    d, side = (at.y - level - height * rise) / math.hypot(1, 2 * height * count), (across + 0.03 * s.wave(at.y * 3)) / count
    s.paint(at, d, s.fixed(*colours), side, soft=0.25)
    s.paint(at, both(d, (level + height * (0.42 + 0.14 * s.wave(t * 5)) - at.y) / 2), s.fixed("#ffffff"), side, 0.4, soft=0.25)


def red_sky(s, at):
    sky(s, at, ("#b53c4a", "#c4121f"), ("#f3a58c", "#ff5a3c"))
    speed_lines(s, at, "#7d0716", 0.6)
    for cx, cy, size in ((-0.72, 0.55, 0.2), (0.8, 0.7, 0.17), (0.92, 0.0, 0.15), (-0.95, -0.1, 0.13)):
        cloud(s, at, cx + s.rand("third", -0.12, 0.12), cy, size, ("#983a4c", "#8e0c22"), 0.9)
    hills(s, at, -0.55, 0.07, 3, "second", ("#6e2d42", "#5a0a22"))


def blue_sky(s, at):
    sky(s, at, ("#5fa6de", "#1c86f2"), ("#d9effa", "#8fd8ff"))
    speed_lines(s, at, "#ffffff", 0.35)
    for cx, cy, size in ((-0.72, 0.55, 0.24), (0.78, 0.36, 0.28), (-0.95, -0.05, 0.2)):
        cloud(s, at, cx + s.rand("third", -0.15, 0.15), cy, size, ("#ffffff",), 0.95)
    hills(s, at, -0.4, 0.08, 2.6, "second", ("#a5cf8a", "#8fdc4a"))
    hills(s, at, -0.55, 0.1, 2, "first", ("#c6dd8f", "#5cbf3a"))


def forest(s, at):
    sky(s, at, ("#cfe3b8", "#b7e37a"), ("#f4f5d6", "#eef9b0"))
    trees(s, at, 0.72, 0.34, "first", ("#a9c99a", "#7cc95c"))
    trees(s, at, 0.48, 0.46, "second", ("#76a878", "#2f9a4a"))
    trees(s, at, 0.1, 0.62, "third", ("#4d8262", "#14703a"))


def sea(s, at):
    sky(s, at, ("#9fd6ea", "#59c9f5"), ("#f4faf2", "#d8f8ff"))
    cloud(s, at, s.rand("third", 0.5, 0.85), 0.66, 0.2, ("#ffffff",))
    hills(s, at, 0.12, 0.1, 4, "first", ("#8fb7b5", "#37b08c"))
    waves = (
        (0.12, 3.2, "first", "#4a9ab6", "#0f8fc4"),
        (-0.14, 2.2, "second", "#66b7c6", "#12b3d1"),
        (-0.45, 1.5, "third", "#92d3d2", "#4be0dd"),
    )
    for level, count, name, *colours in waves:
        crest = level - 0.07 * s.wave(at.x * count + s.rand(name, 0, 5))
        land(s, at, crest, colours, line=0.7)
        s.mark(at, (at.y - crest + 0.05).abs() - 0.016, s.fixed("#ffffff"), 0.75)


def sunset(s, at):
    sky(s, at, ("#8f6fa8", "#7a2fa8"), ("#ffc27a", "#ffb020"))
    speed_lines(s, at, "#fff0a0", 0.5)
    sun = circle(at.x, at.y, s.rand("third", -0.66, -0.5), 0.1, 0.3)
    s.mark(at, sun - 0.14, s.fixed("#fff0b8", "#ffe93b"), 0.25)
    s.paint(at, sun, s.fixed("#fff0b8", "#ffe93b"))
    cloud(s, at, 0.75, s.rand("second", 0.4, 0.6), 0.18, ("#e79a9c", "#ff6f8a"), 0.8)
    hills(s, at, -0.1, 0.1, 2.5, "second", ("#b06c83", "#a83a7d"))
    hills(s, at, -0.42, 0.12, 3, "first", ("#6b4468", "#4a1a5e"))


def night(s, at):
    sky(s, at, ("#232a52", "#0d0f3c"), ("#5a5f97", "#2c2f8f"))
    for i in range(14):
        cx, cy, r = math.sin(i * 12.9) * 0.98, 0.98 - (i * 0.37 % 1) * 1.3, 0.022 + 0.014 * (i % 3)
        s.mark(at, (at.x - cx).abs() + (at.y - cy).abs() - r, s.fixed("#fff6cf"), 0.9)
    cx = s.rand("third", 0.56, 0.74)
    moon = circle(at.x, at.y, cx, 0.6, 0.25)
    s.mark(at, moon - 0.12, s.fixed("#fff3c4"), 0.15)
    s.paint(at, moon, s.fixed("#fdf1c8", "#ffef9a"), (at.x - cx) * 0.7 - at.y + 0.5, 0.7)
    hills(s, at, -0.18, 0.12, 2.6, "second", ("#3b4172", "#242478"))
    trees(s, at, -0.05, 0.3, "first", ("#222647", "#0c0d33"))


def snow(s, at):
    sky(s, at, ("#9dbde2", "#5fb0ff"), ("#f5ebef", "#d4ecff"))
    mountains(s, at, -0.25, 1.05, 0.75, "first", ("#a3b3d3", "#8c9fe0"))
    mountains(s, at, -0.6, 0.95, 1.0, "second", ("#7f8fb8", "#5466b8"))
    hills(s, at, -0.6, 0.07, 2.5, "third", ("#f5f7fc", "#f0f6ff"))


# ---------------------------------------------------------------- people


def skull(s, at):
    """Distance to the outline of the hair on the head: lobes in plain, spikes in ink, neither below the ears."""
    y = at.y - 0.14
    r, turn = circle(at.x, y, 0, 0, 0), torch.atan2(at.x, y) / math.tau
    lean = 0.25 * (r - 1) * turn.sign() if s.ink else 0.0
    (flat,) = s.numbers("headgear", none=(0.0,), headband=(0.0,), cap=(0.8,), straw_hat=(0.8,))
    locks = s.wave(turn * (11 if s.ink else 9) + s.rand("phase") + lean) * s.rand("amount", 0.75, 1.15) * (1 - flat * step(y, 0.1, 0.4))
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
    s.paint(at, both(side - 0.12 - (y + 2.4).clamp(min=0) * 0.24, y + 1.12), s.fixed("#f6f0e6", "#fdfdff"), y + 1.35, 0.5)
    s.paint(at, ellipse(x, y, 0, -1.14, 0.33, 0.3), s.skin, y + 1.25, 0.4)
    s.mark(at, both(side - 0.028, y + 2.2), s.cloth * 0.5)
    lapel = join(capsule(side, y, 0.40, -1.05, 0.14, -2.3, 0.13, 0.03), capsule(side, y, 0.42, -1.15, 0.54, -1.6, 0.13, 0.05))
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
    under, over = capsule(x, y, -0.52, -0.95, 0.02, -1.85, 0.15, 0.15), capsule(x, y, 0.52, -0.95, -0.42, -2.5, 0.15, 0.15)
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
    s.mark(at, cheeks if s.ink else cheeks - 0.12, s.fixed("#ee8f80", "#ff8f8a"), 0.5 if s.ink else 0.6 * step(-cheeks, -0.1, 0.13))
    s.mark(at, capsule(x, y, 0.02, -0.41, 0.06, -0.5, 0.02, 0.033), s.skin * (0.45 if s.ink else 0.78))
    for some in s.only("who", "man"):
        at = some.head(-1.0, 1.0, -1.15, -0.1)
        width, jaw = some.build[:2]
        ragged = 0.10 * some.wave(at.x * 3.5) if some.ink else 0.0
        some.paint(at, both(jawline(at, width, jaw), at.y + 0.80 - 0.95 * at.x.square() + ragged), some.hair * 0.88, at.x - 0.2, line=0.5)
    for some in s.only("who", "boy"):
        at = some.head(-0.8, -0.3, -0.65, -0.3)
        some.paint(at, box(at.x, at.y + 0.25 * at.x, -0.56, -0.62, 0.16, 0.055, 0.05), some.fixed("#f3e3cd", "#fff3dc"), line=0.6)
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
    s.mark(at, join(ellipse(gaze, y, -0.075, 0.09, 0.07, 0.075), circle(gaze, y, 0.085, -0.1, 0.034)), s.fixed("#ffffff"))
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
        some.paint(at, capsule(side, at.y, 0.93, 0.1, 0.95, -1.85, 0.18, 0.02 if some.ink else 0.11), some.hair, side - 1.0)
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
                *(circle(at.x, at.y, -0.66 + 0.1 * math.sin(i * 1.257), 0.62 + 0.1 * math.cos(i * 1.257), 0.075) for i in range(5))
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
    s.paint(at, ellipse(x, y + 0.25 * x.square(), 0, 0.56, 0.98, 0.2), s.cloth * 0.72, 0.5 - 0.25 * x.square() - y, soft=0.3)


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
        some.paint(at, join(*palm, *(capsule(x, y, 1.44, -0.62, *end, 0.09, 0.075) for end in fingers)), some.skin, x - 1.5)


# ---------------------------------------------------------------- pictures


def paint_all(attributes, jitter, style, size, device):
    """Pictures in [0, 1]: [n, 3, size, size]."""
    s = Scene(attributes, jitter, style, torch.empty(len(attributes), 3, size, size, device=device))
    for name, scenery in zip(BACKGROUNDS, (red_sky, blue_sky, forest, sea, sunset, night, snow)):
        for some in s.only("background", name):
            scenery(some, some.everywhere())
    for part in (back_hair, body, face, eyes, mouth, front_hair, headgear, hand):
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
