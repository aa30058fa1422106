"""Can this machine train, and with which script? Packages, disk, memory, GPU, hub and data in one table, in seconds, and a verdict.

python verify_setup.py
python verify_setup.py --json
"""

import concurrent.futures
import importlib.util
import json
import logging
import os
import platform
import shutil
import sys
import time
from dataclasses import asdict, dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Optional

from common import hub
from common.flags import CACHE_DIR, flag, parse, run

REPOS = (("model", "stabilityai/stable-diffusion-xl-base-1.0"), ("model", hub.FP16_VAE), ("dataset", "lambdalabs/naruto-blip-captions"))
OPTIONAL = ("xformers", "tensorboard", "wandb")
NEEDED_DISK_GB, NEEDED_RAM_GIB = 12, 6  # model 7 GB, caches, checkpoints; 4 GiB measured while loading, and the system's share
SPARE_GIB = 0.75


@dataclass(frozen=True)
class Script:
    """What a trainer's defaults need. `least_gib`: measured peak with one image a pass and every block recomputed."""

    name: str
    least_gib: float
    comfortable_gib: float  # below it the script runs, but another one suits the card better
    images: int  # of its documented run: steps x effective batch, or epochs x 1,221
    tflop: float  # of a forward pass, per image
    share: float  # of the matrix rate, counted on two forward passes, that the step reached on an H100


SCRIPTS = (
    Script("train_sdxl.py", 5.8, 13.0, 2000 * 4, 6.761, 0.33),
    Script("train_opt.py", 5.5, 5.5, 3000 * 8, 3.641, 0.32),
    Script("train_dora.py", 5.4, 5.4, 3 * 1221, 1.589, 0.16),
    Script("train_qlora.py", 3.1, 3.1, 3 * 1221, 1.589, 0.17),
)


@dataclass
class Flags:
    """Check whether this machine can run the suite, and which script suits it."""

    json: bool = flag(False, "print one JSON object instead of the table")


@dataclass
class Facts:
    """What the probes found; `problems` are those that stop every script."""

    python: str
    packages: dict  # name -> (installed version or None, wanted range, fits)
    host: str  # "Kaggle", "Colab" or "plain"
    cores: int
    ram_gib: float
    disk_gb: dict  # folder -> free GB
    hub: dict  # repo id -> "cached", "reachable" or why not
    kaggle_inputs: list
    gpus: list = field(default_factory=list)  # dicts: name, capability, total_gib, free_gib
    smoke: dict = field(default_factory=dict)  # test -> "ok" or the error
    matmul_tflops: Optional[float] = None


def main(argv=None):
    """Probe, judge, print; returns the exit status: 0 when the recommended script can run, 1 when something needed is missing."""
    flags = parse(Flags, argv)
    started = time.monotonic()
    facts = probe()
    verdict = judge(facts)
    seconds = round(time.monotonic() - started, 1)
    print(json.dumps({**asdict(facts), **verdict, "seconds": seconds}, indent=2) if flags.json else table(facts, verdict, seconds))
    return 1 if verdict["problems"] else 0


# ---------------------------------------------------------------- probes


def probe():
    """Everything, the hub meanwhile in threads -> Facts."""
    import psutil

    with concurrent.futures.ThreadPoolExecutor(len(REPOS)) as pool:
        answers = pool.map(lambda repo: hub_state(*repo), REPOS)
        gpus, smoke, rate = probe_gpu()
        hub_states = dict(zip((repo_id for _, repo_id in REPOS), answers))
    return Facts(
        python=platform.python_version(),
        packages=probe_packages(Path(__file__).with_name("requirements.txt")),
        host=host_kind(),
        cores=len(os.sched_getaffinity(0)),
        ram_gib=psutil.virtual_memory().total / 2**30,
        disk_gb={str(place): free_gb(place) for place in (Path.cwd(), Path(CACHE_DIR), hub_cache())},
        hub=hub_states,
        kaggle_inputs=kaggle_inputs(Path("/kaggle/input")),
        gpus=gpus,
        smoke=smoke,
        matmul_tflops=rate,
    )


def probe_packages(file):
    """{name: (installed version or None, wanted range, fits)} of a requirements file; nothing is imported."""
    from packaging.requirements import Requirement

    found = {}
    lines = [line.partition("#")[0].strip() for line in file.read_text().splitlines()]
    for wanted in [Requirement(line) for line in lines if line] + [Requirement(name) for name in OPTIONAL]:
        try:
            installed = version(wanted.name)
            fits = wanted.specifier.contains(installed.partition("+")[0], prereleases=True)
        except PackageNotFoundError:
            installed, fits = None, wanted.name in OPTIONAL
        found[wanted.name] = (installed, str(wanted.specifier) or "any", fits)
    return found


def host_kind():
    if "KAGGLE_KERNEL_RUN_TYPE" in os.environ or Path("/kaggle/working").is_dir():
        return "Kaggle"
    return "Colab" if "COLAB_RELEASE_TAG" in os.environ else "plain"


def hub_cache():
    from huggingface_hub.constants import HF_HUB_CACHE

    return Path(HF_HUB_CACHE)


def free_gb(place):
    """Of the disk that a folder lies on, or will lie on."""
    there = next(folder for folder in (place.absolute(), *place.absolute().parents) if folder.exists())
    return shutil.disk_usage(there).free / 1e9


def hub_state(repo_type, repo_id):
    from huggingface_hub import HfApi, try_to_load_from_cache

    name = "README.md" if repo_type == "dataset" else "config.json" if repo_id == hub.FP16_VAE else "model_index.json"
    if isinstance(try_to_load_from_cache(repo_id, name, repo_type=repo_type), str):
        return "cached"
    if os.environ.get("HF_HUB_OFFLINE", "0") not in ("0", ""):
        return "not cached, and HF_HUB_OFFLINE is set"
    try:
        HfApi().repo_info(repo_id, repo_type=repo_type, timeout=3)
        return "reachable"
    except Exception as error:  # whatever the HTTP stack of the day raises for a dead network
        return f"not reachable ({type(error).__name__})"


def kaggle_inputs(folder):
    """Models and data sets attached to a Kaggle notebook: folders with model_index.json or metadata.jsonl, three levels deep."""
    patterns = ["/".join(["*"] * depth + [name]) for depth in (1, 2, 3) for name in ("model_index.json", "metadata.jsonl")]
    return sorted(str(file.parent) for pattern in patterns for file in folder.glob(pattern))


def probe_gpu():
    """(GPUs, smoke tests, TFLOP/s of fp16 matrix products or None)."""
    if importlib.util.find_spec("torch") is None:
        return [], {}, None
    import torch

    gpus = []
    for i in range(torch.cuda.device_count()):
        free, total = torch.cuda.mem_get_info(i)
        capability = ".".join(map(str, torch.cuda.get_device_capability(i)))
        gpus.append(dict(name=torch.cuda.get_device_name(i), capability=capability, total_gib=total / 2**30, free_gib=free / 2**30))
    device, dtype = ("cuda", torch.float16) if gpus else ("cpu", torch.float32)
    tests = {"matrix product": matmul, "attention": attention, "4-bit weights": four_bits}
    smoke = {name: outcome(test, torch, device, dtype) for name, test in tests.items()}
    return gpus, smoke, measure_matmul(torch) if gpus and smoke["matrix product"] == "ok" else None


def outcome(test, *arguments):
    """ "ok", or what went wrong in one line."""
    try:
        test(*arguments)
        return "ok"
    except Exception as error:  # the point of a smoke test is to show whatever comes
        return f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"


def matmul(torch, device, dtype):
    a = torch.ones(256, 256, device=device, dtype=dtype)
    assert (a @ a)[0, 0].item() == 256, "wrong result"


def attention(torch, device, dtype):
    q = torch.randn(1, 2, 64, 64, device=device, dtype=dtype, requires_grad=True)
    torch.nn.functional.scaled_dot_product_attention(q, q, q).sum().backward()
    assert q.grad.isfinite().all(), "gradient not finite"


def four_bits(torch, device, dtype):
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # it speaks while it is imported
    from bitsandbytes.functional import dequantize_4bit, quantize_4bit

    weight = torch.randn(64, 64, device=device, dtype=dtype)
    error = (dequantize_4bit(*quantize_4bit(weight, quant_type="nf4")) - weight).float().norm() / weight.float().norm()
    assert error < 0.15, f"relative error {error:.2f}"


def measure_matmul(torch, n=4096, seconds=0.5):
    """TFLOP/s of n x n fp16 matrix products on the first GPU."""
    a = torch.randn(n, n, device="cuda", dtype=torch.float16)
    a @ a
    torch.cuda.synchronize()
    started, count = time.perf_counter(), 0
    while time.perf_counter() - started < seconds:
        a @ a
        torch.cuda.synchronize()
        count += 1
    return 2 * n**3 * count / (time.perf_counter() - started) / 1e12


# ---------------------------------------------------------------- what follows from the facts


def judge(facts):
    """{"problems": [...], "notes": [...], "scripts": {name: verdict}, "recommended": script or "--demo"}."""
    problems = [
        f"{name} {installed or 'is missing'}: pip install '{name}{wanted if wanted != 'any' else ''}'"
        for name, (installed, wanted, fits) in facts.packages.items()
        if not fits
    ]
    failed = [f"{name}: {result}" for name, result in facts.smoke.items() if result != "ok"]
    free_gib = facts.gpus[0]["free_gib"] if facts.gpus else 0.0
    scripts = {script.name: verdict_of(script, free_gib, facts.matmul_tflops) for script in SCRIPTS}
    fitting = [s.name for s in SCRIPTS if free_gib >= s.comfortable_gib + SPARE_GIB]
    return dict(problems=problems + failed, notes=notes(facts), scripts=scripts, recommended=fitting[0] if fitting else "--demo")


def verdict_of(script, free_gib, matmul_tflops):
    """One line: whether the script's defaults fit, and how long they would take."""
    need_gib = script.least_gib + SPARE_GIB
    if free_gib == 0:
        return "needs a GPU; --demo runs on a CPU"
    if free_gib < need_gib:
        return f"does not fit: {need_gib:.1f} GiB needed, {free_gib:.1f} free"
    if not matmul_tflops:
        return f"fits: {need_gib:.1f} GiB needed, {free_gib:.1f} free"
    s_per_img = 2 * script.tflop / (matmul_tflops * script.share)
    minutes = s_per_img * script.images / 60
    length = f"{minutes / 60:.1f} h" if minutes >= 90 else f"{minutes:.0f} min"
    return f"fits; about {s_per_img:.2f} s an image, {length} for the documented run of {script.images:,} images (estimate)"


def notes(facts):
    """What is no obstacle but good to know."""
    said = []
    if len(facts.gpus) > 1:
        said.append(f"{len(facts.gpus)} GPUs: `accelerate launch SCRIPT` uses them all, `python SCRIPT` leaves the others idle")
    if facts.gpus and float(facts.gpus[0]["capability"]) < 8:
        said.append("this GPU has no bf16 units: fp16, which is the default, is right")
    absent = [repo_id for repo_id, state in facts.hub.items() if state not in ("cached", "reachable")]
    if absent:
        said.append(
            f"not to be had here: {', '.join(absent)}; use local folders (--pretrained_model_name_or_path, --train_data_dir) or --demo"
        )
    if facts.ram_gib < NEEDED_RAM_GIB:
        said.append(f"{facts.ram_gib:.1f} GiB of RAM are little: loading takes up to 4 GiB")
    for place, free in facts.disk_gb.items():
        if free < NEEDED_DISK_GB:
            roomy = max(facts.disk_gb, key=facts.disk_gb.get)
            said.append(
                f"{place}: {free:.0f} GB free, about {NEEDED_DISK_GB} are needed; more room at {roomy}: set HF_HOME, --cache_dir, --output_dir"
            )
    return list(dict.fromkeys(said))


def table(facts, verdict, seconds):
    """The findings for people to read."""
    lines = [f"{facts.host} host, Python {facts.python}, {facts.cores} cores, {facts.ram_gib:.1f} GiB of RAM"]
    lines += [
        f"GPU {g['name']}, capability {g['capability']}, {g['free_gib']:.1f} of {g['total_gib']:.1f} GiB free" for g in facts.gpus
    ] or ["no GPU"]
    lines += [f"fp16 matrix products: {facts.matmul_tflops:.0f} TFLOP/s"] if facts.matmul_tflops else []
    lines += [
        "",
        *(
            f"  {name:20} {installed or 'absent':14} {wanted:14} {'' if fits else '<-- '}"
            for name, (installed, wanted, fits) in facts.packages.items()
        ),
    ]
    lines += ["", *(f"  {name:20} {result}" for name, result in facts.smoke.items())]
    lines += ["", *(f"  {place:48} {free:.0f} GB free" for place, free in facts.disk_gb.items())]
    lines += ["", *(f"  {repo_id:48} {state}" for repo_id, state in facts.hub.items()), *(f"  {place}" for place in facts.kaggle_inputs)]
    lines += ["", *(f"  {name:20} {line}" for name, line in verdict["scripts"].items()), ""]
    lines += [f"problem: {line}" for line in verdict["problems"]] + [f"note: {line}" for line in verdict["notes"]]
    lines += [f"recommended: {verdict['recommended']}" + (" (python train_opt.py --demo)" if verdict["recommended"] == "--demo" else "")]
    return "\n".join([*lines, f"({seconds:.1f} s)"])


if __name__ == "__main__":
    run(lambda: sys.exit(main()))
