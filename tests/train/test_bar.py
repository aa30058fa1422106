"""The progress bar in a narrow place."""

import pytest
from tqdm import tqdm

from common.train import report


@pytest.mark.parametrize("columns", [80, 120])
@pytest.mark.parametrize(("step", "elapsed_s", "rate"), [(1, 95, None), (700, 30_000, 0.01), (2999, 41_025, 0.00003)])
def test_a_bar_of_80_columns_shows_every_number(columns, step, elapsed_s, rate):
    """Notebooks cut it there; 3,000 steps on a slow card take hours. The last row's remaining time has eight characters."""
    row = dict(loss=0.123456, lr=9.87e-5, s_per_img=12.345678, peak_gib=13.054)
    postfix = report.shown_numbers(row)
    shown = tqdm.format_meter(
        step, 3000, elapsed_s, ncols=columns, bar_format=report.BAR_FORMAT, postfix=postfix, rate=rate
    )
    assert len(shown) <= columns
    for part in (f"{step}/3000", "loss 0.1235", "lr 9.9e-05", "12.346 s/img", "13.05 GiB"):
        assert part in shown
