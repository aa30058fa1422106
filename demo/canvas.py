"""What the pictures of the world are painted with: shapes, and a canvas that knows what each picture shows.

Shapes are signed distances (negative inside) on a pixel grid, for a batch of pictures at once. x points right, y up; the picture is
[-1, 1] on both axes, so any size shows the same scene. A person is drawn in units of the head: chin near y = -1, skull near y = 1.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import torch

from demo.world import ATTRIBUTES, CLOTHING, HAIR, NAMES, STYLES, WHO

# What differs between pictures of equal attributes: a number in [0, 1) for each name. The last three place the parts of a background.
JITTER = (
    "x",
    "y",
    "scale",
    "tilt",
    "skin",
    "hair",
    "cloth",
    "iris",
    "phase",
    "amount",
    "gaze",
    "first",
    "second",
    "third",
)
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
        rows = torch.isin(
            self.column(name), torch.tensor([ATTRIBUTES[name].index(value) for value in values])
        ).nonzero()[:, 0]
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
