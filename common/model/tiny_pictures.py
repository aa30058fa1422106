"""The pictures of the tiny demo: characters in flat colours and dark outlines, and captions of what they show."""

import json
import math
import random
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from PIL import Image, ImageDraw

Point = tuple[float, float]


class Ellipse(NamedTuple):
    """In scene units: 1/100 of the shorter side; x counts from the middle, y up from the lower edge."""

    fill: str
    centre: Point
    radii: Point


class Polygon(NamedTuple):
    """In scene units, see Ellipse."""

    fill: str
    corners: tuple[Point, ...]


INK, SKIN = "#2b2340", "#ffdcbf"
EYES = dict(blue="#3f8ff0", green="#3fb96a", brown="#8a5630", purple="#9a5be0")
WHO, MOODS = ("boy", "girl", "cat"), ("smiling", "laughing")
HAIR = dict(orange="#ff9038", black="#4a4560", pink="#ff8fb8", yellow="#ffd84d", white="#eeeef6", blue="#5aa7f2")
# A scene is a sky and shapes from back to front.
SCENES = {
    "a green hill": (
        "#a9e2ff",
        Ellipse("#fff3a0", (-34, 84), (10, 10)),
        Ellipse("#8fd66a", (40, 0), (70, 44)),
        Ellipse("#63bd58", (-40, -12), (80, 40)),
    ),
    "the sea": (
        "#c9f0ff",
        Ellipse("#ffffff", (40, 84), (18, 7)),
        Polygon("#3fa3e0", ((-80, -9), (-80, 44), (80, 44), (80, -9))),
        Ellipse("#ffe2a0", (-10, -20), (90, 36)),
    ),
    "a sunset": (
        "#ffb36b",
        Ellipse("#ff6b5e", (28, 62), (26, 26)),
        Ellipse("#9a5a8c", (-46, 8), (60, 38)),
        Ellipse("#6f4480", (50, -4), (60, 34)),
    ),
    "a snowy mountain": (
        "#d6ecff",
        Polygon("#8fa3cf", ((-80, 0), (-28, 98), (34, 0))),
        Polygon("#ffffff", ((-41, 76), (-28, 98), (-13, 76), (-27, 68))),
        Ellipse("#eef6ff", (0, -30), (100, 58)),
    ),
    "a pink garden": (
        "#ffe6ef",
        Ellipse("#ffb0cc", (-44, 82), (24, 18)),
        Ellipse("#ffb0cc", (46, 74), (22, 17)),
        Ellipse("#a5dc8c", (0, -26), (100, 56)),
    ),
}

# Outlines that are the same in every character, and where the hair of girls falls.
SHOULDERS = ((-32, -9), (-28, 14), (-12, 22), (12, 22), (28, 14), (32, -9))
LONG_HAIR = ((-33, 44), (-37, 8), (-18, 12), (18, 12), (37, 8), (33, 44))
FRINGE = ((-26, 46), (-19, 50), (-13, 59), (-4, 51), (3, 60), (10, 51), (17, 57), (26, 46))
ABOVE_THE_FRINGE = ((27, 62), (14, 72), (-14, 72), (-27, 62))
LAUGH = ((-7, 31), (7, 31), (5, 25), (0, 23), (-5, 25))
SMILE = ((-6, 29), (-4, 27), (-1.5, 26), (1.5, 26), (4, 27), (6, 29))
SHAPES_PX = ((96, 96), (128, 96), (96, 128))  # width and height


class Ink:
    """A picture of flat colours in dark outlines, painted enlarged and then shrunk: Pillow's shapes have hard edges."""

    def __init__(self, width_px: int, height_px: int, sky: str):
        self.size = (width_px, height_px)
        enlarged = 4 if min(width_px, height_px) < 512 else 2
        self.image = Image.new("RGB", (width_px * enlarged, height_px * enlarged), sky)
        self.brush = ImageDraw.Draw(self.image)
        self.unit = min(self.image.size) / 100

    def pixels(self, points: Iterable[Point]) -> list[Point]:
        """Scene units -> pixels of the enlarged picture."""
        return [(self.image.width / 2 + x * self.unit, self.image.height - y * self.unit) for x, y in points]

    def paint(self, shape: Ellipse | Polygon, line: float = 1.6) -> None:
        """A filled shape with an outline `line` units wide."""
        if isinstance(shape, Ellipse):
            (x, y), (rx, ry) = shape.centre, shape.radii
            bounds = self.pixels([(x - rx, y + ry), (x + rx, y - ry)])
            self.brush.ellipse(bounds, shape.fill, INK if line else None, round(line * self.unit))
        else:
            self.brush.polygon(self.pixels(shape.corners), shape.fill)
            if line:
                self.stroke((*shape.corners, *shape.corners[:2]), line=line)

    def stroke(self, points: Iterable[Point], line: float = 1.6) -> None:
        self.brush.line(self.pixels(points), INK, round(line * self.unit), joint="curve")


def spikes(centre: Point, inner: float, outer: float, *, count: int, start: int, end: int) -> tuple[Point, ...]:
    """Corners of a fan of `count` points between two angles (degrees, counter-clockwise from three o'clock)."""
    x, y = centre
    corners = []
    for i in range(2 * count + 1):
        angle = math.radians(start + (end - start) * i / (2 * count))
        r = outer if i % 2 else inner
        corners.append((x + r * math.cos(angle), y + r * math.sin(angle)))
    return tuple(corners)


def paint_head(ink: Ink, who: str, hair: str) -> None:
    """Head, and hair or ears, around (0, 44)."""
    # What lies behind the head
    if who == "cat":
        for side in (-1, 1):
            ink.paint(Polygon(hair, ((side * 25, 50), (side * 23, 86), (side * 5, 66))))
            ink.paint(Polygon("#ffb3b8", ((side * 21, 60), (side * 20.5, 76), (side * 12, 66))), line=0)
    elif who == "girl":
        ink.paint(Ellipse(hair, (0, 44), (33, 36)))
        ink.paint(Polygon(hair, LONG_HAIR))
        ink.paint(Ellipse(hair, (0, 44), (31.5, 34.5)), line=0)
    else:
        ink.paint(Polygon(hair, spikes((0, 47), 28, 41, count=9, start=-15, end=195)))

    # The head, and the hair over the forehead
    ink.paint(Ellipse(hair if who == "cat" else SKIN, (0, 44), (26, 24)))
    if who != "cat":
        ink.paint(Polygon(hair, FRINGE + ABOVE_THE_FRINGE), line=0)
        ink.stroke(FRINGE)


def paint_face(ink: Ink, who: str, mood: str, eyes: str) -> None:
    # Cheeks and eyes
    for side in (-1, 1):
        ink.paint(Ellipse("#ff9d9d", (side * 18, 31), (4, 2.4)), line=0)
        ink.paint(Ellipse(eyes, (side * 11, 40), (6.4, 7.8)))
        ink.paint(Ellipse(INK, (side * 11, 39), (2.2, 3.6)), line=0)
        ink.paint(Ellipse("#ffffff", (side * 11 - 2, 43), (2, 2.4)), line=0)

    # Mouth, and a cat's nose
    if mood == "laughing":
        ink.paint(Polygon("#d8505a", LAUGH))
    else:
        ink.stroke(SMILE, line=2)
    if who == "cat":
        ink.paint(Polygon("#ff8f9a", ((-2.5, 35), (2.5, 35), (0, 32))), line=1)


def render_character(rng: random.Random, width_px: int, height_px: int) -> tuple[Image.Image, str]:
    """One picture and its caption; every attribute is chosen independently of the others."""
    choices = (WHO, MOODS, EYES, HAIR, HAIR, SCENES)
    who, mood, eyes, hair, clothes, scene = (rng.choice(list(values)) for values in choices)

    # From back to front: scene, body, head
    sky, *shapes = SCENES[scene]
    ink = Ink(width_px, height_px, sky)
    for shape in shapes:
        ink.paint(shape, line=1)
    ink.paint(Polygon(HAIR[clothes], SHOULDERS))
    paint_head(ink, who, HAIR[hair])
    paint_face(ink, who, mood, EYES[eyes])

    looks = f"{eyes} eyes and {hair} {'fur' if who == 'cat' else 'hair'}"
    text = f"a {mood} {who} with {looks}, dressed in {clothes}, in front of {scene}"
    return ink.image.resize(ink.size, Image.Resampling.LANCZOS), text


def build_images(folder: Path) -> None:
    """Writes 24 PNGs of three shapes and metadata.jsonl (file_name, text); the same ones every time."""
    rng = random.Random(0)
    folder.mkdir(parents=True)
    with (folder / "metadata.jsonl").open("w", encoding="utf-8") as metadata:
        for i in range(24):
            image, text = render_character(rng, *rng.choice(SHAPES_PX))
            image.save(folder / f"{i:03d}.png")
            metadata.write(json.dumps({"file_name": f"{i:03d}.png", "text": text}) + "\n")
