"""benchmarks/exactness.py: two runs compared, or a refusal before anything is trained or overwritten."""

import json

import pytest

from benchmarks import exactness
from common.errors import UserError


def test_two_runs_are_compared_and_plotted(root, start, tmp_path):
    out, picture = tmp_path / "exactness.json", tmp_path / "exactness.png"
    process = start(
        root / "benchmarks/exactness.py", "--out", out, "--steps", 4, "--", "--demo", "--lr_warmup_steps", 0
    )
    said, _ = process.communicate(timeout=3600)
    result = json.loads(said.splitlines()[-1])
    assert process.returncode == 0 and result["steps"] == 4 and result["largest"] < 1e-3
    runs = json.loads(out.read_text())["runs"]
    assert runs.keys() == exactness.RUNS.keys() and all(len(run["loss"]) == 4 for run in runs.values())
    exactness.main(["--plot", str(out), str(picture)])
    assert picture.stat().st_size > 10_000


def test_differences_are_relative_to_the_plain_run():
    runs = {
        "as it comes": {"loss": [1.0, 0.9, 2.0], "s_per_img": 0.1},
        "plainly": {"loss": [1.0, 1.0, 4.0], "s_per_img": 0.3},
    }
    compared = exactness.compared(runs)
    assert compared == dict(steps=3, median=pytest.approx(0.1), largest=pytest.approx(0.5), times_as_fast=3.0)


@pytest.mark.parametrize(
    ("argv", "named"),
    [
        (["--plot", "FOLDER/none.json", "x.png"], "--plot .*none.json: not what --out writes"),
        (["--plot", "FOLDER/empty.json", "x.png"], "--plot .*empty.json: not what --out writes"),
        (["--plot", "FOLDER/good.json", "FOLDER/x.xyz"], "--plot .*x.xyz: cannot be written"),
        (["--plot", "FOLDER/good.json", "FOLDER/none/x.png"], "--plot .*none/x.png: cannot be written"),
        (["--steps", "0"], "--steps 0"),
        (["--out", "FOLDER/none/x.json"], "--out .*x.json: cannot be written"),
    ],
)
def test_exactness_refuses_before_it_trains(argv, named, tmp_path):
    run = {"loss": [1.0, 0.5], "s_per_img": 0.1}
    (tmp_path / "good.json").write_text(json.dumps({"runs": {"as it comes": run, "plainly": run}}))
    (tmp_path / "empty.json").write_text("{}")
    with pytest.raises(UserError, match=named):
        exactness.main([text.replace("FOLDER", str(tmp_path)) for text in argv])


def test_a_run_that_was_stopped_is_not_compared_and_leaves_an_earlier_result(tmp_path, monkeypatch):
    (tmp_path / "good.json").write_text("earlier")
    monkeypatch.setattr("train_opt.main", lambda argv: {"ended": "SIGINT received", "step": 1})
    with pytest.raises(UserError, match="SIGINT received after step 1 of 9"):
        exactness.main(["--steps", "9", "--out", str(tmp_path / "good.json")])
    assert (tmp_path / "good.json").read_text() == "earlier"
