"""Times the optimizer step of the trainers on the full-size SDXL architecture, by running the trainers themselves.

    python benchmarks/full_size.py --model /tmp/sdxl --images /tmp/images        # random weights, no download
    python benchmarks/train_step.py --model /tmp/sdxl --images /tmp/images [--only sdxl,dora@1024 | --matrix] [-- FLAGS]

Every row is one run of a trainer in a process of its own, so peaks, RAM and the time to the first step are that row's.
A row that fails, out of memory or otherwise, is a result: {"row", "failed"}. Flags after `--` go to every trainer.
The last line is JSON; what its keys mean is in benchmarks/README.md.
"""

import argparse
import contextlib
import datetime
import json
import shlex
import subprocess
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

from benchmarks.row_process import FORWARD_TFLOP, STEPS, T4_GIB, in_own_process
from benchmarks.table import markdown, read_runs
from common import files
from common.cli.running import run
from common.errors import UserError

ROOT = Path(__file__).resolve().parents[1]
LORA = ["--resolution", "512", "--lora_alpha", "32", "--lora_dropout", "0.1", "--use_8bit_adam"]
TEXT = ["--train_text_encoder", "--use_8bit_adam", "--train_batch_size", "3", "--gradient_accumulation_steps", "1"]
ROWS = {
    "sdxl": ("train_sdxl", []),
    "opt": ("train_opt", []),
    "qlora": ("train_qlora", []),
    "qlora_normal": ("train_qlora", ["--strategy", "normal"]),
    "dora": ("train_dora", []),
    "lora": ("train_sdxl", LORA),
    "text": ("train_sdxl", TEXT),
}
MATRIX = [f"{name}@{px}" for name in ("sdxl", "opt", "qlora", "qlora_normal", "dora", "text") for px in FORWARD_TFLOP]
# How the trainer's lines on what goes through a pass begin
PLAN_LINES = ("plan", "training: ", "out of GPU memory: ", "no CUDA graph")


def main(argv: list[str] | None = None) -> None:
    """Run the rows asked for, each in a process of its own; print a Markdown table and one line of JSON."""
    options = parse(argv)
    earlier = read_runs(options.out) if options.out and options.out.exists() else []
    if not torch.cuda.is_available():
        raise UserError("a CUDA GPU is needed")
    result = {**description(options), "rows": []}
    with contextlib.nullcontext(options.cache_dir) if options.cache_dir else tempfile.TemporaryDirectory() as cache_dir:
        for name in options.rows:
            row = run_row(name, options, cache_dir=cache_dir, matmul_tflops=result["matmul_tflops"])
            result["rows"].append(row)
            print(json.dumps(row), flush=True)

            # After every row: what was measured stays when the next one is killed
            if options.out:
                options.out.parent.mkdir(parents=True, exist_ok=True)
                files.write_json(options.out, [*earlier, result])

    # A table to read, and JSON to keep
    print(markdown(result["rows"]))
    print(json.dumps(result))


def parse(argv: list[str] | None) -> argparse.Namespace:
    """The command line -> options; `rows` and `cap_gib` follow from it.

    Raises:
        UserError: an unknown row, or a cap that is none.
    """
    options = command_line().parse_args(argv)
    options.rows = MATRIX if options.matrix else options.only.split(",")
    for name in options.rows:
        if name.partition("@")[0] not in ROWS:
            raise UserError(f"--only {name}: no such row; there are {' '.join(ROWS)}")
    if options.vram_gb is not None and not options.vram_gb > 0:
        raise UserError(f"--vram_gb {options.vram_gb}: must be greater than 0")
    options.cap_gib = options.vram_gb or (T4_GIB if options.as_t4 else None)
    return options


def command_line() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="folder made by full_size.py")
    parser.add_argument("--images", required=True, help="folder made by full_size.py")

    # Which rows
    rows = parser.add_mutually_exclusive_group()
    some = f"rows of {' '.join(ROWS)}; NAME@RESOLUTION for another one (default: all)"
    rows.add_argument("--only", default=",".join(ROWS), help=some)
    rows.add_argument("--matrix", action="store_true", help="every row but lora at 512, 768 and 1024 px")

    # How they are measured
    fixed = "the documented micro-batch with every block recomputed: no measured plan"
    parser.add_argument("--fixed", action="store_true", help=fixed)
    as_t4 = f"only what a T4 can run: no flash attention, {T4_GIB} GiB"
    parser.add_argument("--as_t4", action="store_true", help=as_t4)
    parser.add_argument("--vram_gb", type=float, metavar="GIB", help="cap the GPU memory of every row")
    parser.add_argument("--profile", action="store_true", help="print the kernels of each row's profiled step")
    cache = "keep encoded images and captions here (default: a temporary folder for all rows)"
    parser.add_argument("--cache_dir", metavar="DIR", help=cache)
    parser.add_argument("flags", nargs="*", help="after --: flags for every trainer")

    # What is recorded of them
    parser.add_argument("--label", default="", help="names the run in the JSON, for benchmarks/table.py")
    parser.add_argument("--commit", help="recorded in the JSON instead of git's answer, for a copy that is no checkout")
    parser.add_argument("--out", type=Path, metavar="FILE", help="JSON file that this run is added to")
    return parser


def description(options: argparse.Namespace) -> dict:
    """What a run's rows have in common: code, machine and settings. Measures the GPU's matrix rate.

    Raises:
        UserError: the GPU's matrix rate could not be measured.
    """
    gpu, _ = in_own_process("gpu")
    if "failed" in gpu:
        raise UserError(f"the GPU's matrix rate was not measured: {gpu['failed']}")
    return dict(
        commit=options.commit or git_commit(),
        date=datetime.datetime.now(datetime.UTC).date().isoformat(),
        **gpu,
        torch=torch.__version__,
        cap_gib=options.cap_gib,
        as_t4=options.as_t4,
        fixed=options.fixed,
        label=options.label,
        flags=options.flags,
        command=command(options),
    )


def git_commit() -> str:
    """The checkout's commit, marked where files differ from it; "unknown" without git or a checkout."""
    try:
        described = subprocess.run(["git", "describe", "--always", "--dirty"], cwd=ROOT, capture_output=True, text=True)
    except FileNotFoundError:
        return "unknown"
    return described.stdout.strip() or "unknown"


def command(options: argparse.Namespace) -> str:
    """The command that measures the same again, without what only concerns files and output."""
    parts = ["python", "benchmarks/train_step.py", "--model", "M", "--images", "I"]
    parts += ["--matrix"] if options.matrix else ["--only", options.only]
    parts += [f"--{name}" for name in ("fixed", "as_t4") if getattr(options, name)]
    parts += ["--vram_gb", f"{options.vram_gb:g}"] if options.vram_gb else []
    parts += ["--", *options.flags] if options.flags else []
    return shlex.join(parts)


def run_row(name: str, options: argparse.Namespace, *, cache_dir: str | Path, matmul_tflops: float) -> dict:
    """One run of a trainer in a process of its own -> the row's figures, or {"row", "failed": one line}."""
    cached = set(Path(cache_dir).rglob("*"))
    with tempfile.TemporaryDirectory() as folder:
        script, argv = trainer_command(name, options, cache_dir=cache_dir, output_dir=f"{folder}/run")
        settings = dict(cap_gib=options.cap_gib, as_t4=options.as_t4, profile=options.profile)
        result, printed = in_own_process("measure", script=script, argv=argv, matmul_tflops=matmul_tflops, **settings)
    if "failed" in result:
        return {"row": name, **result}
    return {"row": name, **result, "plan": plan_in(printed), "caches_warm": set(Path(cache_dir).rglob("*")) == cached}


def trainer_command(
    name: str, options: argparse.Namespace, *, cache_dir: str | Path, output_dir: str
) -> tuple[str, list[str]]:
    """(trainer, its flags) of the row `name`; flags that were typed after -- win over the row's own."""
    row, _, resolution = name.partition("@")
    script, own = ROWS[row]
    argv = [*own, *(["--resolution", resolution] if resolution else [])]
    argv += ["--max_vram_gb", str(options.cap_gib)] if options.cap_gib else []
    argv += ["--no_auto_fit"] if options.fixed else []
    argv += ["--pretrained_model_name_or_path", options.model, "--train_data_dir", options.images, *options.flags]

    # What no typed flag may change
    argv += ["--cache_dir", str(cache_dir), "--output_dir", output_dir]
    argv += ["--max_train_steps", str(STEPS), "--checkpointing_steps", "0"]
    return script, argv


def plan_in(printed: str) -> str:
    """What the trainer said of how it cuts a step into passes."""
    return "; ".join(line for line in printed.splitlines() if line.startswith(PLAN_LINES))


if __name__ == "__main__":
    run(main)
