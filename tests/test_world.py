"""The drawn world: pictures that depend on their row alone, attributes that can be read off the pixels, captions that tell the truth."""

import pytest
import torch

from demo.canvas import rgb
from demo.painting import render
from demo.world import ATTRIBUTES, CLOTHING, EYES, HAIR, NAMES, STYLES, captions, describe, draw_attributes

PALETTES = {"hair": HAIR, "eyes": EYES, "clothing": CLOTHING}


def with_value(attributes, name, value):
    """The same attributes but for `name`, which gets the value of index `value` everywhere."""
    changed = attributes.clone()
    changed[:, NAMES.index(name)] = value
    return changed


def shown_by(name, attributes, **options):
    """Where a picture depends on attribute `name`: [N, size, size] bool."""
    first, second = (
        render(with_value(attributes, name, value), 3, **options).int() for value in (0, len(ATTRIBUTES[name]) - 1)
    )
    return (first - second).abs().amax(1) > 24


@pytest.fixture(scope="module")
def attributes():
    return draw_attributes(20, 5)


# ---------------------------------------------------------------- pictures


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("size", [60, 128])
def test_a_picture_is_a_matter_of_its_row_and_the_seed(attributes, style, size):
    pictures = render(attributes, 7, style, size)
    assert pictures.dtype == torch.uint8 and pictures.shape == (20, 3, size, size)
    assert torch.equal(render(attributes, 7, style, size), pictures)
    for count in (1, 3, 17):  # alone, within a chunk, across chunks
        assert torch.equal(render(attributes[:count], 7, style, size), pictures[:count])
    assert (render(attributes, 8, style, size) != pictures).flatten(1).any(1).all()


def test_no_pictures_are_a_batch_too():
    assert render(draw_attributes(0, 0), 0).shape == (0, 3, 128, 128) and captions(draw_attributes(0, 0), 0) == []


def test_a_larger_picture_shows_the_same(attributes):
    small, large = (render(attributes, 1, "plain", size).float() for size in (64, 256))
    assert (torch.nn.functional.avg_pool2d(large, 4) - small).abs().mean() < 2.5


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("name", NAMES)
def test_every_attribute_shows(attributes, style, name):
    """Changed alone, it changes what a person can see; the least is a mouth."""
    share = shown_by(name, attributes, style=style, size=64).float().mean((1, 2))
    assert share.min() > 0.004


@pytest.mark.parametrize("style", STYLES)
def test_eye_colour_is_a_matter_of_two_large_irises(attributes, style):
    shown = shown_by("eyes", attributes, style=style)
    assert shown.float().mean((1, 2)).max() < 0.06
    rows, columns = shown.any(2), shown.any(1)
    assert rows.sum(1).max() < 0.3 * 128
    if style == "plain":  # ink's fringe has points that may hide a part
        widths = [[len(run) for run in "".join("x" if c else " " for c in line).split()] for line in columns.tolist()]
        assert all(len(runs) == 2 and min(runs) >= 8 for runs in widths), widths


@pytest.mark.parametrize("name", PALETTES)
def test_colours_are_told_apart_in_both_styles(attributes, name):
    """What an attribute rules is, on its lit side, closest in colour to its own entry of the palette; even to that of the other style."""
    right = {}
    truth = attributes[:, NAMES.index(name)]
    for drawn, style in enumerate(STYLES):
        pictures = render(attributes, 3, style).float() / 255
        regions = shown_by(name, attributes, style=style)
        lit = torch.stack([picture[:, region].quantile(0.65, dim=1) for picture, region in zip(pictures, regions)])
        for asked in range(len(STYLES)):
            palette = torch.tensor([rgb(pair[asked]) for pair in PALETTES[name].values()])
            right[style, drawn == asked] = (torch.cdist(lit, palette).argmin(1) == truth).float().mean().item()
    assert all(share >= (0.95 if own else 0.9) for (_, own), share in right.items()), right


def test_ink_has_more_and_harder_edges_and_stronger_colours(attributes):
    plain, ink = (render(attributes, 3, style).float() / 255 for style in STYLES)
    steps = [picture.mean(1).diff(dim=2).abs() for picture in (plain, ink)]
    hard = [(step > 0.25).float().mean((1, 2)) for step in steps]
    assert (hard[1] > hard[0]).all() and hard[1].mean() > 2.5 * hard[0].mean()
    saturation = [(picture.amax(1) - picture.amin(1)).mean((1, 2)) for picture in (plain, ink)]
    assert (saturation[1] > saturation[0]).float().mean() > 0.9


def test_an_unknown_style_is_named(attributes):
    with pytest.raises(ValueError, match="oil"):
        render(attributes, 0, "oil")


# ---------------------------------------------------------------- attributes and captions


def test_attributes_are_uniform_and_independent():
    count = 20_000
    drawn = draw_attributes(count, 1)
    assert drawn.dtype == torch.int64 and torch.equal(draw_attributes(50, 1), drawn[:50])
    columns = [torch.nn.functional.one_hot(drawn[:, i], len(ATTRIBUTES[name])).double() for i, name in enumerate(NAMES)]
    for i, first in enumerate(columns):
        assert (first.mean(0) * first.shape[1] - 1).abs().max() < 0.08
        for second in columns[:i]:
            expected = count / first.shape[1] / second.shape[1]
            degrees = first.shape[1] * second.shape[1] - 1
            chi_square = ((first.T @ second - expected).square() / expected).sum()
            assert chi_square < degrees + 5 * (2 * degrees) ** 0.5  # its mean, and five times its spread


def test_full_captions_name_every_attribute_and_none_that_is_not_there():
    drawn = draw_attributes(500, 2)
    for row, caption in zip(drawn, captions(drawn, 0, full=True)):
        of, words = describe(row), caption.split()
        assert f"{of['hair']} hair" in caption and f"{of['eyes']} eyes" in caption
        assert f"{of['clothing']} {of['garment']}" in caption and f"in front of {of['background']}" in caption
        assert of["mood"] in words and of["who"] in words and ("waving" in words) == (of["pose"] == "waving")
        assert of["framing"] in caption
        for name, none in (("headgear", "none"), ("hairstyle", None)):
            assert [value for value in ATTRIBUTES[name] if f" {value}" in caption] == [of[name]] * (of[name] != none)


def test_captions_leave_things_out_but_never_lie():
    drawn = draw_attributes(2000, 3)
    named = {"hair": "{} hair", "eyes": "{} eyes", "background": "in front of {}", "headgear": "a {}", "mood": "{} "}
    said = dict.fromkeys(named, 0)
    for row, caption in zip(drawn, captions(drawn, 1)):
        of = describe(row)
        for name, phrase in named.items():
            values = [value for value in ATTRIBUTES[name] if phrase.format(value) in caption]
            assert values in ([], [of[name]])
            said[name] += len(values)
    assert all(0.3 < count / 2000 < 0.97 for count in said.values()), said


def test_captions_vary_with_the_seed_are_short_and_have_few_words():
    drawn = draw_attributes(3000, 4)
    written = captions(drawn, 0) + captions(drawn, 0, full=True)
    assert captions(drawn[:10], 0) == written[:10] != captions(drawn[:10], 1)
    assert all(
        caption == caption.lower() and len(caption.split()) < 38 for caption in written
    )  # 40 tokens with start and end
    assert len({word for caption in written for word in caption.split()}) < 150
    clothes_first = [
        caption.find(" in a ") < caption.find(" with ")
        for caption in written
        if " in a " in caption and " with " in caption
    ]
    assert 0.2 < sum(clothes_first) / len(clothes_first) < 0.8
