"""What the runs of tools/study.py say: a row per method, paired differences, study.md with a table and a paragraph.

A row of `rows` is one run: {"method", "seed", "steps", "mse", "val_loss", "s_per_img", "peak_gib", "trainable",
"adapter_mb"} and, of the demo, SCORES.
"""

import itertools
import statistics

LOSSES = {"mse": "final training mse", "val_loss": "held-out loss"}
# Of the demo's pictures, by demo/score.py
SCORES = {"style": "in the ink style", "attributes": "attributes kept"}
# n -> Student's t with n - 1 degrees of freedom, 95 %, two-sided
T_95 = {2: 12.71, 3: 4.30, 4: 3.18, 5: 2.78, 6: 2.57, 7: 2.45, 8: 2.36, 9: 2.31, 10: 2.26}


def summarize(rows: list[dict], base: int) -> list[dict]:
    """One row per method from those of its seeds; `base`: parameters of the frozen UNet."""
    table = []
    for method in dict.fromkeys(row["method"] for row in rows):
        # What does not depend on the seed
        own = [row for row in rows if row["method"] == method]
        entry = {key: own[0][key] for key in ("method", "steps", "trainable", "adapter_mb")}
        entry |= dict(seeds=len(own), share_percent=100 * entry["trainable"] / (base + entry["trainable"]))

        # What does
        for loss in measured(rows):
            values = [row[loss] for row in own]
            entry |= {loss: statistics.fmean(values), f"{loss}_std": statistics.stdev(values)}
        entry["s_per_img"] = statistics.median(row["s_per_img"] for row in own)
        entry["peak_gib"] = None if own[0]["peak_gib"] is None else max(row["peak_gib"] for row in own)
        table.append(entry)
    return table


def measured(rows: list[dict]) -> dict[str, str]:
    """{key: title} of the columns that have a spread over the seeds."""
    return {key: title for key, title in {**LOSSES, **SCORES}.items() if key in rows[0]}


def compare(rows: list[dict]) -> list[dict]:
    """Differences from the first method, paired by seed: the runs of a seed see the same samples with the same noise.

    `beyond_chance`: more than t standard errors, which chance alone exceeds once in twenty.
    """
    by_run = {(row["method"], row["seed"]): row for row in rows}
    seeds = sorted({row["seed"] for row in rows})
    first, *others = dict.fromkeys(row["method"] for row in rows)
    compared = []
    for loss, method in itertools.product(measured(rows), others):
        values = [by_run[method, seed][loss] - by_run[first, seed][loss] for seed in seeds]
        mean = statistics.fmean(values)
        error = statistics.stdev(values) / len(seeds) ** 0.5
        beyond = abs(mean) > standard_errors(len(seeds)) * error
        compared.append(dict(loss=loss, method=method, mean=mean, standard_error=error, beyond_chance=beyond))
    return compared


def standard_errors(seeds: int) -> float:
    """How many make a difference count."""
    return T_95[min(seeds, max(T_95))]


def markdown(study: dict, *, demo: bool) -> str:
    """study.md: the table, what may be concluded from it, the grid."""
    columns = measured(study["runs"])
    titles = ["method", "trainable", "share of UNet + adapter", *columns.values(), "s/img", "peak GiB", "adapter MB"]
    lines = [titles, ["---"] * len(titles)]
    for row in study["methods"]:
        losses = [f"{row[loss]:.4f} ± {row[f'{loss}_std']:.4f}" for loss in columns]
        peak = "only on a GPU" if row["peak_gib"] is None else f"{row['peak_gib']:.2f}"
        what = [row["method"], f"{row['trainable']:,}", f"{row['share_percent']:.2f} %"]
        lines.append([*what, *losses, f"{row['s_per_img']:.4f}", peak, f"{row['adapter_mb']:.1f}"])
    table = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    return f"# The methods at equal budget\n\n{table}\n\n{conclusion(study, demo=demo)}\n\n![grid](compare.png)\n"


def conclusion(study: dict, *, demo: bool) -> str:
    """One paragraph: which differences exceed the spread over seeds, and which do not."""
    from common.cli.demo_settings import is_tiny

    # How the runs were compared
    n, steps, first = (study["methods"][0][key] for key in ("seeds", "steps", "method"))
    said = [
        f"n = {n} seeds, {steps} steps each; ± is the standard deviation over the seeds.",
        "The runs of a seed see the same samples with the same noise and hold out the same ones,",
        f"so each method is compared with {first} seed by seed: mean difference ± its standard error.",
        f"One of more than {standard_errors(n)} standard errors counts as different;",
        "chance alone exceeds that once in twenty.",
    ]

    # What differs, and what does not
    columns = {**LOSSES, **SCORES}
    for loss, beyond in itertools.product(columns, (True, False)):
        rows = [row for row in study["differences"] if row["loss"] == loss and row["beyond_chance"] == beyond]
        named = ", ".join(f"{row['method']} ({row['mean']:+.5f} ± {row['standard_error']:.5f})" for row in rows)
        if rows:
            said.append(f"By {columns[loss]}, {'different' if beyond else 'not to be told'} from {first}: {named}.")

    # What the random model cannot say
    if demo and is_tiny():
        said.append("The demo model's weights are random here: this shows that the comparison works,")
        said.append("not which method is better.")
    return " ".join(said)
