"""Runs the trainers on little GPU memory, with validation pictures and a held-out loss, and says what they left behind.

    python benchmarks/full_size.py --model /tmp/sdxl --images /tmp/images        # random weights, no download
    python benchmarks/low_memory.py --model /tmp/sdxl --images /tmp/images [--only train_opt,train_sdxl] [--gib 7.6,6.5]

Every row is a trainer with its own defaults, six steps long, validated after three, in a process of its own. A run that
ends because nothing fits is a result. One that ends with steps that no checkpoint holds, or with a traceback, makes the
exit status 1. The last line is JSON.
"""

import argparse
import itertools
import json
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
STEPS = 6
VALIDATION_STEPS = 3
# What the lines worth showing hold
TELLING = ("plan", "out of GPU memory", "no validation images", "finished", "error")
COLUMNS = ("script", "gib", "status", "steps", "saved_steps", "held_out_losses", "pictures", "lost")


def main() -> int:
    """Run every script at every limit; print a table and one line of JSON; returns the exit status."""
    options = parse()
    rows = []
    with tempfile.TemporaryDirectory() as scratch:
        for script, gib in itertools.product(options.only.split(","), options.gib.split(",")):
            rows.append(run_row(script, gib, options, Path(scratch)))
            print(json.dumps(rows[-1], indent=1), flush=True)

    # A table to read, and JSON to keep
    print(f"| {' | '.join(COLUMNS)} |\n|{'---|' * len(COLUMNS)}")
    for row in rows:
        print(f"| {' | '.join(str(row[column]) for column in COLUMNS)} |")
    print(json.dumps(rows))
    return int(any(row["lost"] or row["traceback"] for row in rows))


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="folder made by full_size.py")
    parser.add_argument("--images", required=True, help="folder made by full_size.py")
    parser.add_argument("--only", default="train_opt,train_sdxl,train_qlora", help="trainers (default: %(default)s)")
    parser.add_argument("--gib", default="7.6,6.5,5.5", help="limits of GPU memory (default: %(default)s)")
    parser.add_argument("flags", nargs="*", help="after --: flags for every trainer")
    return parser.parse_args()


def run_row(script: str, gib: str, options: argparse.Namespace, scratch: Path) -> dict:
    """One trainer within `gib` GiB -> what it said and what it left."""
    output_dir = scratch / f"{script}-{gib}"
    flags = {
        "pretrained_model_name_or_path": options.model,
        "train_data_dir": options.images,
        "max_vram_gb": gib,
        "max_train_steps": STEPS,
        "validation_steps": VALIDATION_STEPS,
        "validation_split": 0.1,
        "validation_prompt": "a fox in the snow",
        "cache_dir": scratch / "cache",
        "output_dir": output_dir,
    }
    typed = [text for name, value in flags.items() for text in (f"--{name}", str(value))]
    command = [sys.executable, f"{script}.py", *typed, *options.flags]
    process = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)

    # What it said
    lines = [line for line in (process.stdout + process.stderr).replace("\r", "\n").splitlines() if line.strip()]
    said = {
        "traceback": any(line.startswith("Traceback") for line in lines),
        "said": [line for line in lines if any(words in line for words in TELLING)][-8:],
    }
    return {"script": script, "gib": float(gib), **what_is_left(output_dir, process.returncode), **said}


def what_is_left(output_dir: Path, status: int) -> dict:
    """What of a run that ended with exit status `status` can be used afterwards."""
    metrics = output_dir / "metrics.jsonl"
    trained = [json.loads(line) for line in metrics.read_text().splitlines()] if metrics.exists() else []
    saved = max((int(path.name.partition("-")[2]) for path in output_dir.glob("checkpoint-*")), default=0)
    has_adapter = (output_dir / "pytorch_lora_weights.safetensors").exists()
    return {
        "status": status,
        "steps": len(trained),
        "saved_steps": saved,
        "held_out_losses": sum("val_loss" in row for row in trained),
        "pictures": len(list((output_dir / "samples").glob("*.png"))),
        "lost": saved < len(trained) or (status == 0 and not has_adapter),
    }


if __name__ == "__main__":
    sys.exit(main())
