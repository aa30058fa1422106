"""metrics.jsonl, training.png and the letters of the grid."""

import json
from pathlib import Path

import matplotlib
import pytest
from PIL import Image

from common.render import grids
from common.train import report

FONTS = Path(matplotlib.get_data_path()) / "fonts/ttf"
ROW = {"step": 1, "loss": 0.5, "mse": 0.6, "lr": 1e-4}


def write(folder, *lines):
    (folder / "metrics.jsonl").write_bytes(
        b"\n".join(line if isinstance(line, bytes) else json.dumps(line).encode() for line in lines)
    )


@pytest.mark.parametrize(
    "bad",
    [b"{", b"\x00" * 30, b"[1]", b'{"step": 2}', b'"step"', b'{"step": "2", "loss": 1, "mse": 1, "lr": 1}', b"\xff"],
)
def test_a_bad_line_loses_nothing_else(tmp_path, bad):
    write(tmp_path, ROW, bad, {**ROW, "step": 3}, bad)
    assert [row["step"] for row in report.read_metrics(tmp_path / "metrics.jsonl")] == [1, 3]


@pytest.fixture
def figures(monkeypatch):
    """The figures that are saved, to be looked into."""
    from matplotlib.figure import Figure

    saved, original = [], Figure.savefig
    monkeypatch.setattr(
        Figure, "savefig", lambda self, *rest, **options: saved.append(self) or original(self, *rest, **options)
    )
    return saved


def lines_of(axis):
    return {line.get_label(): list(zip(*line.get_data())) for line in axis.get_lines()}


def test_each_loss_has_an_axis_and_the_held_out_loss_stands_beside_the_mse(tmp_path, figures):
    """The loss is weighted (Min-SNR) and smaller than the mse: the held-out mse beside it would look like overfitting."""
    write(tmp_path, *({**ROW, "step": step, **({"val_loss": 0.7} if step == 4 else {})} for step in range(1, 5)))
    report.plot_training(tmp_path)
    loss, mse, lr = map(lines_of, figures[0].axes)
    assert loss["each step"] == [(step, 0.5) for step in range(1, 5)] and "held out" not in loss
    assert mse["each step"] == [(step, 0.6) for step in range(1, 5)] and mse["held out"] == [(4, 0.7)]
    assert list(lr.values()) == [[(step, 1e-4) for step in range(1, 5)]]
    with Image.open(tmp_path / "training.png") as picture:
        assert min(picture.size) > 300


def test_where_the_loss_is_the_mse_it_is_drawn_once(tmp_path, figures):
    write(tmp_path, {**ROW, "mse": 0.5}, {**ROW, "step": 2, "mse": 0.5})
    report.plot_training(tmp_path)
    assert [axis.get_ylabel() for axis in figures[0].axes] == ["mse", "learning rate"]


def test_the_plot_is_drawn_at_validations_checkpoints_and_the_end_and_shows_all_there_is(train, figures):
    train("--max_train_steps", 5, "--checkpointing_steps", 2, "--validation_steps", 3, "--validation_split", 0.25)
    shown = [len(lines_of(figure.axes[0])["each step"]) for figure in figures]
    assert shown == [2, 3, 4, 5]


def test_a_plot_that_cannot_be_drawn_costs_no_step(train, monkeypatch, capsys):
    monkeypatch.setattr(report, "plot_training", lambda folder: 1 / 0)
    run = train("--max_train_steps", 2, "--checkpointing_steps", 1)
    assert run.result["ended"] == "finished" and (run.dir / "checkpoint-000002").exists() and run.weights()
    assert "training.png could not be drawn (ZeroDivisionError" in capsys.readouterr().out


# ---------------------------------------------------------------- letters


@pytest.mark.parametrize("text", ["a fox in Naruto style", "лиса в лесу", "αβγ, Ünïcödé"])
def test_latin_greek_and_cyrillic_need_no_other_font(text, monkeypatch):
    monkeypatch.setattr(grids, "_system_fonts", lambda: pytest.fail("searched"))
    assert grids.legible(text) == (grids.dejavu(), text)


def test_other_letters_are_written_in_a_font_of_the_machine_that_has_them(monkeypatch):
    """Here DejaVu stands for that font, and one without Cyrillic for DejaVu."""
    monkeypatch.setattr(grids, "dejavu", lambda: str(FONTS / "cmr10.ttf"))
    monkeypatch.setattr(
        grids, "_system_fonts", lambda: [str(FONTS / "cmb10.ttf"), __file__, str(FONTS / "DejaVuSans.ttf")]
    )
    assert grids.legible("лиса") == (str(FONTS / "DejaVuSans.ttf"), "лиса")


def test_letters_that_no_font_has_are_written_as_their_code(monkeypatch):
    monkeypatch.setattr(grids, "_system_fonts", lambda: [])
    assert grids.legible("ナルト ramen") == (grids.dejavu(), "\\u30ca\\u30eb\\u30c8 ramen")


def test_a_long_label_makes_its_row_taller_and_a_longer_one_is_cut():
    image = Image.new("RGB", (256, 256), "#804020")

    def height(label):
        return grids.grid([[image]], ["base"], [label], "small print").height

    assert height("a fox") < height("fox " * 200) <= height("fox " * 6000) < height("a fox") + 256


def test_a_label_is_nowhere_over_a_picture():
    image = Image.new("RGB", (256, 256), "#804020")
    sheet = grids.grid([[image], [image]], ["base"], ["fox " * 500, "w" * 500], "small print")
    brown = sum(count for count, colour in sheet.getcolors(1 << 20) if colour == (0x80, 0x40, 0x20))
    assert brown == 2 * 256 * 256
