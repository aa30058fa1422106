"""What the pictures of the world are painted with: shapes, and a canvas that knows what each picture shows.

Shapes are signed distances (negative inside) on a pixel grid, for a batch of pictures at once. x points right, y up.
The picture is [-1, 1] on both axes, so any size shows the same scene.
A person is painted in units of the head: chin near y = -1, skull near y = 1.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import torch

from demo.world import ATTRIBUTES, CLOTHING, HAIR, NAMES, STYLES, WHO

# What differs between pictures of equal attributes: a number in [0, 1) for each name.
# The last three place the parts of a background.
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
INK = "#1d1730"  # colour of outlines
LINE = 0.027  # width of outlines; they grow outwards, so that fills keep their size
SHADE = ("#d2c5d8", "#c0b2d2")  # (plain, ink); multiplies the colours that lie in shadow


Number = float | torch.Tensor
Pair = tuple[Number, Number]  # x and y: of the pixels [N, h, w], of a point, or half sizes; for a capsule two radii


def rgb(code: str) -> list[float]:
    """Hexadecimal red, green, blue -> three numbers in [0, 1]."""
    return [int(code[i : i + 2], 16) / 255 for i in (1, 3, 5)]


def cover(d: torch.Tensor, px: Number) -> torch.Tensor:
    """The share of a pixel of width `px` that lies inside an edge at signed distance `d`."""
    return (0.5 - d / px).clamp(0, 1)


def step(x: torch.Tensor, start: float, end: float) -> torch.Tensor:
    """Smooth from 0 at `start` to 1 at `end`."""
    t = ((x - start) / (end - start)).clamp(0, 1)
    return t * t * (3 - 2 * t)


def circle(xy: Pair, centre: Pair, r: Number) -> torch.Tensor:
    (x, y), (cx, cy) = xy, centre
    return ((x - cx).square() + (y - cy).square()).sqrt() - r


def ellipse(xy: Pair, centre: Pair, radii: Pair) -> torch.Tensor:
    """First order in the distance: exact at the edge, which is all that coverage and outlines need."""
    (x, y), (cx, cy), (rx, ry) = xy, centre, radii
    u = (x - cx) / rx
    v = (y - cy) / ry
    f = (u * u + v * v).sqrt()
    return f * (f - 1) / ((u / rx).square() + (v / ry).square() + 1e-6).sqrt()


def capsule(xy: Pair, start: Pair, end: Pair, radii: Pair) -> torch.Tensor:
    """A thick line whose radius goes from the first of `radii` at `start` to the second at `end`."""
    (x, y), (x0, y0), (x1, y1), (r0, r1) = xy, start, end, radii
    dx = x1 - x0
    dy = y1 - y0
    u = x - x0
    v = y - y0
    t = ((u * dx + v * dy) / (dx * dx + dy * dy)).clamp(0, 1)
    return ((u - t * dx).square() + (v - t * dy).square()).sqrt() - r0 - (r1 - r0) * t


def box(xy: Pair, centre: Pair, half: Pair, r: float) -> torch.Tensor:
    """A rectangle of half sizes `half` with corners of radius r."""
    (x, y), (cx, cy), (hx, hy) = xy, centre, half
    u = (x - cx).abs() - hx + r
    v = (y - cy).abs() - hy + r
    return (u.clamp(min=0).square() + v.clamp(min=0).square()).sqrt() + torch.maximum(u, v).clamp(max=0) - r


def join(first: torch.Tensor, *others: torch.Tensor, k: float = 0.0) -> torch.Tensor:
    """Union of shapes, whose seams are rounded over a distance k."""
    for other in others:
        fillet = (k - (first - other).abs()).clamp(min=0) if k else 0.0
        first = torch.minimum(first, other) - (fillet * fillet / (4 * k) if k else 0.0)
    return first


def both(first: torch.Tensor, *others: torch.Tensor) -> torch.Tensor:
    """Intersection of shapes; both(a, -b) cuts b out of a."""
    for other in others:
        first = torch.maximum(first, other)
    return first


@dataclass
class Frame:
    """Coordinates x, y [N, h, w] in a window (rows, columns) of the pictures.

    px [N, 1, 1] is the width of a pixel, unit [N, 1, 1] that of half a picture.
    """

    x: torch.Tensor
    y: torch.Tensor
    px: torch.Tensor
    unit: torch.Tensor
    rows: slice
    columns: slice

    @property
    def xy(self) -> Pair:
        return self.x, self.y


class Build(NamedTuple):
    """Proportions of a person, in the order of WHO."""

    face: torch.Tensor
    jaw: torch.Tensor
    eyes: torch.Tensor
    shoulders: torch.Tensor
    neck: torch.Tensor
    brows: torch.Tensor


class Scene:
    """Pictures while they are painted.

    On the CPU: attributes int64 [N, len(ATTRIBUTES)] and jitter [N, len(JITTER)].
    On its device: the canvas [N, 3, size, size] in [0, 1].
    """

    def __init__(self, attributes: torch.Tensor, jitter: torch.Tensor, style: str, canvas: torch.Tensor):
        self.attributes = attributes
        self.jitter = jitter
        self.style = STYLES.index(style)
        self.ink = style == "ink"
        self.canvas = canvas
        self.size = canvas.shape[-1]

    def only(self, name: str, *values: str) -> Iterator["Scene"]:
        """The pictures whose attribute `name` is one of `values`, to paint on.

        A loop over them has one round, or none where there are no such pictures.
        """
        wanted = torch.tensor([ATTRIBUTES[name].index(value) for value in values])
        rows = torch.isin(self.column(name), wanted).nonzero()[:, 0]
        if len(rows):
            on_device = rows.to(self.canvas.device)
            some = Scene(self.attributes[rows], self.jitter[rows], STYLES[self.style], self.canvas[on_device])
            yield some
            self.canvas[on_device] = some.canvas

    def column(self, name: str) -> torch.Tensor:
        return self.attributes[:, NAMES.index(name)]

    def draw(self, name: str, low: float = 0.0, high: float = 1.0) -> torch.Tensor:
        """Each picture's own number between low and high: [N], on the CPU."""
        return low + (high - low) * self.jitter[:, JITTER.index(name)]

    def send(self, numbers: torch.Tensor) -> torch.Tensor:
        """[N] or [N, 3] -> [N, 1, 1] or [N, 3, 1, 1] on the canvas's device."""
        return numbers.float().to(self.canvas.device)[..., None, None]

    def rand(self, name: str, low: float = 0.0, high: float = 1.0) -> torch.Tensor:
        return self.send(self.draw(name, low, high))

    def numbers(self, name: str, **table: tuple[float, ...]) -> list[torch.Tensor]:
        """table[value][k] for each picture's value of attribute `name`: a list over k of [N, 1, 1]."""
        return [self.send(column) for column in torch.tensor(list(table.values()))[self.column(name)].unbind(1)]

    def named(self, name: str, table: dict, *, jitter: str, spread: float) -> torch.Tensor:
        """The style's colour for attribute `name`, a little lighter or darker from picture to picture: [N, 3, 1, 1]."""
        colours = torch.tensor([rgb(pair[self.style]) for pair in table.values()])[self.column(name)]
        return self.send(colours * self.draw(jitter, 1 - spread, 1 + spread)[:, None]).clamp(max=1)

    def fixed(self, *codes: str) -> torch.Tensor:
        """A colour by style (or one for both), the same in every picture: [1, 3, 1, 1]."""
        return torch.tensor(rgb(codes[self.style % len(codes)]), device=self.canvas.device).view(1, 3, 1, 1)

    @cached_property
    def hair(self) -> torch.Tensor:
        return self.named("hair", HAIR, jitter="hair", spread=0.05)

    @cached_property
    def cloth(self) -> torch.Tensor:
        return self.named("clothing", CLOTHING, jitter="cloth", spread=0.05)

    @cached_property
    def skin(self) -> torch.Tensor:
        light = self.fixed("#fbdcc3", "#ffdfc2")
        dark = self.fixed("#cf9670", "#d69663")
        return light + (dark - light) * self.rand("skin").square()[:, None]

    @cached_property
    def build(self) -> Build:
        """The proportions in WHO, each [N, 1, 1]."""
        return Build(*self.numbers("who", **WHO))

    def wave(self, t: torch.Tensor) -> torch.Tensor:
        """A wave of period 1 between 0 and 1 with cusps at 0: round lobes in plain, spikes in ink."""
        t = (2 * (t - t.floor()) - 1).abs()
        return 1 - t if self.ink else 1 - t * t

    def span(self, low: float, high: float) -> slice:
        """The pixels between two coordinates, as a slice that is never empty."""
        first, last = (min(max(math.floor((n + 1) / 2 * self.size), 0), self.size - 1) for n in (low, high))
        return slice(first, last + 1)

    def frame(self, centre: Pair, *, scale, angle, window: tuple[float, ...]) -> Frame:
        """A frame at `centre`, `scale` large and turned by `angle` (each [N]), where its window (x0, x1, y0, y1) is."""
        # The rows and columns that the turned window touches
        cx, cy = centre
        cos = angle.cos() * scale
        sin = angle.sin() * scale
        corners = [(x, y) for x in window[:2] for y in window[2:]]
        across = torch.stack([cx + x * cos - y * sin for x, y in corners])
        down = -torch.stack([cy + x * sin + y * cos for x, y in corners])
        rows, columns = (self.span(n.min().item(), n.max().item()) for n in (down, across))

        # The frame's coordinates of their pixels
        centres = (torch.arange(self.size, device=self.canvas.device) + 0.5) * (2 / self.size) - 1
        u = centres[columns] - self.send(cx)
        v = -centres[rows, None] - self.send(cy)
        cos, sin, unit = (self.send(n) for n in (cos / scale**2, sin / scale**2, 1 / scale))
        x = u * cos + v * sin
        y = v * cos - u * sin
        return Frame(x, y, px=2 / self.size * unit, unit=unit, rows=rows, columns=columns)

    def everywhere(self) -> Frame:
        zero = torch.zeros(len(self.attributes))
        return self.frame((zero, zero), scale=zero + 1, angle=zero, window=(-1, 1, -1, 1))

    def head(self, *window: float, tilted: float = 1.0) -> Frame:
        """A frame in units of the head; `window` is x0, x1, y0, y1."""
        half = self.column("framing") == 1
        scale = torch.where(half, 0.40, 0.50) * self.draw("scale", 0.95, 1.05)
        x = self.draw("x", -0.08, 0.08)
        y = torch.where(half, 0.28, 0.11) + self.draw("y", -0.04, 0.04)
        return self.frame((x, y), scale=scale, angle=tilted * self.draw("tilt", -0.16, 0.16), window=window)

    def body(self, *window: float) -> Frame:
        """The head turns about its middle; the body stands upright below."""
        return self.head(*window, tilted=0.0)

    def paint(self, at: Frame, d, colour, shadow=None, *, line: float = 1.0, alpha=1.0, soft: float = 0.7) -> None:
        """Fill where d < 0, in ink with an outline.

        Where `shadow` > 0 lies shade: it grows over a distance `soft` in plain and has a hard edge in ink.
        """
        window = self.canvas[:, :, at.rows, at.columns]
        if self.ink and line:
            window.lerp_(self.fixed(INK), cover(d - line * LINE * at.unit, at.px)[:, None])
        if shadow is not None:
            shade = cover(-shadow, at.px) if self.ink else step(shadow, -soft, soft)
            colour = colour * (1 - (1 - self.fixed(*SHADE)) * shade[:, None])
        window.lerp_(colour.expand_as(window), (cover(d, at.px) * alpha)[:, None])

    def mark(self, at: Frame, d, colour, alpha=1.0) -> None:
        """Fill without shade or outline."""
        self.paint(at, d, colour, line=0, alpha=alpha)
