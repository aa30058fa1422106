"""One labelled picture of many, in letters that there is a font for."""

from functools import cache
from pathlib import Path

CELL_PX, GAP_PX = (256, 512), 10
MOST_LINES = 20  # of one label: a prompt may have any length
PAPER, INK, PALE_INK = "#ffffff", "#1c1c22", "#77777f"


def grid(rows, column_titles, row_labels, footer):
    """PIL images in rows and columns: titles on top, labels at the left, `footer` in small print below.

    A row grows with a long label. Letters that no font of this machine has are written as their code.

    Args:
        rows: list of rows of PIL images, all of one size. A side has 256 to 512 px: less cannot be seen beside its
            label, more makes a file that nobody can send.
    """
    from PIL import Image, ImageDraw

    side = min(max(rows[0][0].width, CELL_PX[0]), CELL_PX[1])
    left = side * 2 // 3
    titles = [_Text(title, side / 14, side) for title in column_titles]
    labels = [_label(label, side, left - GAP_PX) for label in row_labels]
    top = max(title.height for title in titles) + 2 * GAP_PX
    width = left + len(titles) * (side + GAP_PX) + GAP_PX
    small_print = _Text(footer, side / 20, width - 2 * GAP_PX)
    heights = [max(side, label.height) + GAP_PX for label in labels]
    height = top + sum(heights) + small_print.height + GAP_PX

    sheet = Image.new("RGB", (width, height), PAPER)
    pen = ImageDraw.Draw(sheet)
    for j, title in enumerate(titles):
        x = left + GAP_PX + j * (side + GAP_PX) + side // 2
        title.write(pen, (x, top - GAP_PX), INK, anchor="md", align="center")
    y = top
    for label, images, row_height in zip(labels, rows, heights):
        label.write(pen, (GAP_PX, y + (row_height - GAP_PX) // 2), INK, anchor="lm")
        for j, image in enumerate(images):
            # Enlarged pixels stay sharp: a small image should look like what it is.
            method = Image.Resampling.NEAREST if image.width < side else Image.Resampling.LANCZOS
            sheet.paste(image.convert("RGB").resize((side, side), method), (left + GAP_PX + j * (side + GAP_PX), y))
        y += row_height
    small_print.write(pen, (GAP_PX, height - GAP_PX), PALE_INK, anchor="ld")
    return sheet


def _label(text, side, width_px):
    """A row's label: in small print where it would be taller than its pictures."""
    usual = _Text(text, side / 14, width_px)
    return usual if usual.height <= side else _Text(text, side / 20, width_px)


class _Text:
    """A text in a font that has its letters, broken into lines of `width_px`."""

    def __init__(self, text, size_px, width_px):
        from PIL import Image, ImageDraw, ImageFont

        file, text = legible(text)
        self._font = ImageFont.truetype(file, size_px)
        lines = _wrap(text, self._font, width_px)
        self._text = "\n".join(lines if len(lines) <= MOST_LINES else [*lines[: MOST_LINES - 1], "..."])
        box = ImageDraw.Draw(Image.new("L", (1, 1))).multiline_textbbox((0, 0), self._text, self._font)
        self.height = round(box[3])

    def write(self, pen, place, colour, **options):
        pen.multiline_text(place, self._text, colour, self._font, **options)


def _wrap(text, font, width_px):
    """Lines of `text` that fit; a word that is too long alone is broken, as are scripts without spaces."""
    lines = [""]
    for word in text.split():
        while font.getlength(word) > width_px:
            fitting = next(n for n in range(len(word) - 1, 0, -1) if font.getlength(word[:n]) <= width_px)
            lines.append(word[:fitting])
            word = word[fitting:]
        longer = f"{lines[-1]} {word}".strip()
        if font.getlength(longer) <= width_px:
            lines[-1] = longer
        else:
            lines.append(word)
    return [line for line in lines if line]


# ---------------------------------------------------------------- fonts


def legible(text: str) -> tuple[str, str]:
    """(font file, the text as it can be written with it).

    DejaVu Sans, which comes with matplotlib, has Latin, Greek and Cyrillic; for other letters the machine's fonts are
    looked through. Where none has them all, the missing ones are written as their code (\\u3042), not as boxes.
    """
    letters = {ord(letter) for letter in text if not letter.isspace()}
    for file in (dejavu(), *(_system_fonts() if letters - _letters_of(dejavu()) else ())):
        if letters <= _letters_of(file):
            return file, text
    written = _letters_of(dejavu())
    return dejavu(), "".join(
        letter if ord(letter) in written or letter.isspace() else ascii(letter)[1:-1] for letter in text
    )


def dejavu() -> str:
    import matplotlib

    return str(Path(matplotlib.get_data_path()) / "fonts/ttf/DejaVuSans.ttf")


@cache
def _system_fonts() -> list[str]:
    """The font files in the usual folders of this machine, by name: the same one is taken every time."""
    from matplotlib import font_manager

    return sorted(font_manager.findSystemFonts())


@cache
def _letters_of(file: str) -> set[int]:
    """Code points that a font has a glyph for; none where the file cannot be read."""
    from matplotlib.ft2font import FT2Font

    try:
        return set(FT2Font(file).get_charmap())
    except (OSError, RuntimeError):
        return set()
