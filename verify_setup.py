"""Can this machine run the suite, and which script? Packages, disk, memory, GPU, hub and data in one table, in seconds, and a verdict.

python verify_setup.py [--json]; exit status: 0 when the recommended script can run, 1 when it lacks something, 2 for a wrong flag
"""

import json
import logging
import os
import platform
import shutil
import sys
import textwrap
import threading
import time
from dataclasses import asdict, dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import NamedTuple, Optional

try:
    import psutil
    from huggingface_hub import HfApi, constants, try_to_load_from_cache
    from packaging.requirements import Requirement

    from common import hub
    from common.flags import CACHE_DIR, flag, parse, run
except ModuleNotFoundError as error:
    sys.exit(f"verify_setup.py: {error.name} is missing: pip install -r requirements.txt")

GIB = 2**30
LEAST_PYTHON = 3, 11
OPTIONAL = ("xformers", "tensorboard", "wandb")
MODEL, DATA = "stabilityai/stable-diffusion-xl-base-1.0", "lambdalabs/naruto-blip-captions"
REPOS = {  # id -> type, and a file that is in the cache only when the repo was downloaded for use
    MODEL: ("model", "unet/diffusion_pytorch_model.fp16.safetensors"),
    hub.FP16_VAE: ("model", "diffusion_pytorch_model.safetensors"),
    DATA: ("dataset", "README.md"),
}
DISK_GB = {"HF cache": 9.0, "--cache_dir": 1.0, "working folder": 1.0}  # model 7, data 1.4; latents and text; adapters and checkpoints
CURES = {"HF cache": "set HF_HOME", "--cache_dir": "name it with --cache_dir", "working folder": "name it with --output_dir"}
LITTLE_RAM_GIB = 6  # 2.8 measured, loading included; the rest is the system's share
SPARE_GIB = 0.75
ROOMY_GIB = 13.0  # from here on train_sdxl.py is the one to take, and nothing need be recomputed


class Script(NamedTuple):
    """What a trainer's defaults need, as measured on an H100 (README.md)."""

    name: str
    peak_gib: float  # one image a pass, every block recomputed
    images: int  # of its default run: steps x effective batch, or epochs x images of the data set
    forward_tflop: float  # of the UNet, per image; a step is two of them
    share: float  # of the GPU's fp16 matrix rate that the step reached
    recommended_gib: float  # with less than this free another script suits the card better
    bitsandbytes: bool  # 4-bit weights or 8-bit AdamW


SCRIPTS = (  # in the order in which they are recommended
    Script("train_sdxl.py", 5.8, 2000 * 4, 6.761, 0.33, ROOMY_GIB, False),
    Script("train_opt.py", 5.5, 3000 * 8, 3.641, 0.32, 0, False),
    Script("train_qlora.py", 3.1, 3 * 1221, 1.589, 0.17, 0, True),
    Script("train_dora.py", 5.4, 3 * 1221, 1.589, 0.16, 0, True),
)


@dataclass
class Flags:
    """Check whether this machine can run the suite, and which script suits it."""

    json: bool = flag(False, "print one JSON object instead of the table")


@dataclass
class Facts:
    """What the probes found."""

    python: str
    packages: dict  # name -> (installed version or None, wanted range, fits)
    host: str  # "Kaggle", "Colab" or "plain"
    cores: int
    ram_gib: float
    disk: dict  # key of DISK_GB -> (folder, free GB)
    hub: dict  # repo id -> "cached", "reachable" or why not
    kaggle_models: list = field(default_factory=list)  # folders
    kaggle_data: list = field(default_factory=list)
    driver: bool = False  # NVIDIA's, whatever torch says
    gpus: list = field(default_factory=list)  # dicts: name, capability, bf16, total_gib, free_gib
    smoke: dict = field(default_factory=dict)  # test -> "ok" or the error
    matmul_tflops: Optional[float] = None  # of a GPU, in fp16


def main(argv=None):
    """Probe, judge, print; returns the exit status."""
    flags = parse(Flags, argv)
    started = time.monotonic()
    facts = probe()
    verdict = judge(facts)
    seconds = round(time.monotonic() - started, 1)
    print(json.dumps({**asdict(facts), **verdict, "seconds": seconds}, indent=2) if flags.json else table(facts, verdict, seconds))
    return 1 if verdict["problems"] else 0


def probe():
    """Everything, the hub meanwhile in threads -> Facts."""
    answers, asked = dict.fromkeys(REPOS, "unreachable (no answer in time)"), time.monotonic()
    threads = [threading.Thread(target=lambda repo: answers.update({repo: hub_state(repo)}), args=(repo,), daemon=True) for repo in REPOS]
    for thread in threads:
        thread.start()
    packages = probe_packages(Path(__file__).with_name("requirements.txt"))
    kaggle = "KAGGLE_KERNEL_RUN_TYPE" in os.environ or os.path.isdir("/kaggle/working")
    host = "Kaggle" if kaggle else "Colab" if "COLAB_RELEASE_TAG" in os.environ else "plain"
    cores, ram_gib = len(os.sched_getaffinity(0)), psutil.virtual_memory().total / GIB
    disk = {name: (folder, free_gb(Path(folder))) for name, folder in zip(DISK_GB, (constants.HF_HUB_CACHE, CACHE_DIR, os.getcwd()))}
    inputs, driver, found = kaggle_inputs("/kaggle/input"), os.path.exists("/proc/driver/nvidia/version"), probe_torch()
    for thread in threads:  # a name server that is silent knows no timeout
        thread.join(max(0.0, asked + 4 - time.monotonic()))
    return Facts(platform.python_version(), packages, host, cores, ram_gib, disk, dict(answers), *inputs, driver, *found)


def probe_packages(file):
    """{name: (installed version or None, wanted range, fits)} of a requirements file and OPTIONAL; nothing is imported."""
    found = {}
    lines = [line.partition("#")[0].strip() for line in file.read_text().splitlines()]
    for wanted in map(Requirement, [*filter(None, lines), *OPTIONAL]):
        try:
            installed = version(wanted.name)
            fits = wanted.specifier.contains(installed, prereleases=True)
        except PackageNotFoundError:
            installed, fits = None, wanted.name in OPTIONAL
        found[wanted.name] = (installed, str(wanted.specifier), fits)
    return found


def free_gb(folder):
    """Of the disk that a folder lies on, or will lie on."""
    there = next(place for place in (folder.absolute(), *folder.absolute().parents) if place.exists())
    return shutil.disk_usage(there).free / 1e9


def hub_state(repo_id):
    repo_type, filename = REPOS[repo_id]
    if isinstance(try_to_load_from_cache(repo_id, filename, repo_type=repo_type), str):
        return "cached"
    if os.environ.get("HF_HUB_OFFLINE", "0") not in ("0", ""):
        return "not cached, and HF_HUB_OFFLINE is set"
    try:
        HfApi().repo_info(repo_id, repo_type=repo_type, timeout=3)
        return "reachable"
    except Exception as error:  # whatever the HTTP stack of the day raises for a dead network
        return f"unreachable ({type(error).__name__})"


def kaggle_inputs(root, depth=6, seconds=1.5):
    """(model folders, data folders) attached to a Kaggle notebook: those with model_index.json or metadata.jsonl."""
    models, data, started = [], [], time.monotonic()
    for folder, below, files in os.walk(root):
        models += [folder] * ("model_index.json" in files)
        data += [folder] * ("metadata.jsonl" in files)
        if (
            {"model_index.json", "metadata.jsonl"} & {*files}
            or folder.count("/") - root.count("/") >= depth
            or time.monotonic() - started > seconds
        ):
            below.clear()  # goes no deeper
    return sorted(models), sorted(data)


def probe_torch():
    """(GPUs, smoke tests, TFLOP/s of fp16 matrix products or None)."""
    rates, smoke, gpus = [], {}, []
    try:
        import torch

        for i in range(torch.cuda.device_count()):
            (free, total), (major, minor) = torch.cuda.mem_get_info(i), torch.cuda.get_device_capability(i)
            gpu = dict(name=torch.cuda.get_device_name(i), capability=f"{major}.{minor}", bf16=major >= 8)  # torch counts emulation too
            gpus.append({**gpu, "total_gib": total / GIB, "free_gib": free / GIB})
    except Exception as error:  # a broken installation or driver
        return [], {"torch": one_line(error)}, None
    tests = {"matmul": lambda *where: rates.append(matmul(*where)), **({"attention": attention} if gpus else {}), "NF4 weights": nf4}
    for name, test in tests.items():
        try:
            test(torch, *(("cuda", torch.float16) if gpus else ("cpu", torch.float32)))
            smoke[name] = "ok"
        except Exception as error:  # the point of a smoke test is to show whatever comes
            smoke[name] = one_line(error)
    return gpus, smoke, rates[0] if rates else None


def one_line(error):
    return f"{type(error).__name__}: {next(iter(str(error).splitlines()), '')}"


def matmul(torch, device, dtype):
    """TFLOP/s of 4096^3 products in half a second, on a GPU; nothing, if the result is right, on a CPU."""
    n, count = 4096 if device == "cuda" else 256, 0
    a = torch.ones(n, n, device=device, dtype=dtype)
    assert (a @ a)[0, 0].item() == n, "wrong result"
    if device == "cpu":
        return None
    a.normal_()
    started = time.perf_counter()
    while time.perf_counter() - started < 0.5:
        for _ in range(4):
            a @ a
        torch.cuda.synchronize()
        count += 4
    return 2 * n**3 * count / (time.perf_counter() - started) / 1e12


def attention(torch, device, dtype):
    """The memory-efficient kernel, forward and backward."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    q = torch.randn(1, 2, 64, 64, device=device, dtype=dtype, requires_grad=True)
    with sdpa_kernel(SDPBackend.EFFICIENT_ATTENTION):
        torch.nn.functional.scaled_dot_product_attention(q, q, q).sum().backward()
    assert q.grad.isfinite().all(), "gradient not finite"


def nf4(torch, device, dtype):
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # it speaks while it is imported
    from bitsandbytes.functional import dequantize_4bit, quantize_4bit

    weight = torch.randn(64, 64, device=device, dtype=dtype)
    error = (dequantize_4bit(*quantize_4bit(weight, quant_type="nf4")) - weight).float().norm() / weight.float().norm()
    assert error < 0.15, f"relative error {error:.2f} after a round trip"


def judge(facts):
    """{"recommended": script or "--demo", "command", "scripts": as `judge_script` says, "problems", "notes"}.

    A problem stops what is recommended; what is only good to know is a note.
    """
    scripts = {script.name: judge_script(script, facts) for script in SCRIPTS}
    chosen = next((s for s in SCRIPTS if scripts[s.name]["fits"] and facts.gpus[0]["free_gib"] >= s.recommended_gib), None)
    problems, notes, command = [], [], "python train_opt.py --demo"
    if tuple(map(int, facts.python.split(".")[:2])) < LEAST_PYTHON:
        problems.append(f"Python {facts.python}: the packages need 3.{LEAST_PYTHON[1]} or newer")
    wrong = {name: found for name, found in facts.packages.items() if not found[2]}
    problems += [f"{name} {installed or 'is missing'}: pip install '{name}{wanted}'" for name, (installed, wanted, _) in wrong.items()]
    for name, result in facts.smoke.items():
        if result != "ok" and name == "NF4 weights" and not (chosen and chosen.bitsandbytes):
            notes.append(f"{name}: {result}; train_qlora.py and train_dora.py cannot run")
        elif result != "ok" and not (name == "torch" and "torch" in wrong):
            problems.append(f"{name}: {result}")
    if facts.driver and not facts.gpus:
        notes.append("there is an NVIDIA driver, but torch sees no GPU: is it a build for CPUs, or CUDA_VISIBLE_DEVICES empty?")
    if facts.ram_gib < LITTLE_RAM_GIB:
        notes.append(f"{facts.ram_gib:.1f} GiB of RAM is little: a trainer takes about 3")
    if chosen:
        count, first = len(facts.gpus), facts.gpus[0]
        command = f"accelerate launch --num_processes {count} {chosen.name}" if count > 1 else f"python {chosen.name}"
        notes += [f"{count} GPUs: with plain `python {chosen.name}` all but one would idle"] if count > 1 else []
        notes += [] if first["bf16"] else ["bf16: this GPU has no units for it; keep to fp16, the default"]
        notes += ["where a card this size has to recompute, a run takes up to half longer"] if first["free_gib"] < ROOMY_GIB else []
        model, data = ("--pretrained_model_name_or_path", facts.kaggle_models), ("--train_data_dir", facts.kaggle_data)
        for (option, folders), ids in ((model, [MODEL, hub.FP16_VAE]), (data, [DATA])):
            absent = [f"{repo_id} {facts.hub[repo_id]}" for repo_id in ids if facts.hub[repo_id] not in ("cached", "reachable")]
            command += f" {option} {folders[0]}" if absent and folders else ""
            problems += [f"{'; '.join(absent)}: name a local folder with {option}, or try --demo"] if absent and not folders else []
        for name, (folder, free) in facts.disk.items():
            if free < DISK_GB[name] and (name != "HF cache" or facts.hub[MODEL] == "reachable"):
                problems.append(f"{folder}: {free:.1f} GB free, about {DISK_GB[name]:.0f} needed; use a larger disk: {CURES[name]}")
    return dict(recommended=chosen.name if chosen else "--demo", command=command, scripts=scripts, problems=problems, notes=notes)


def judge_script(script, facts):
    """{"fits", "s_per_img", "hours", "line"}: whether a script's defaults fit, and how long they would take on one GPU."""
    free, need, s_per_img, hours = facts.gpus[0]["free_gib"] if facts.gpus else 0.0, script.peak_gib + SPARE_GIB, None, None
    line = f"fits: {need:.1f} GiB needed" if free >= need else f"does not fit: {need:.1f} GiB needed, {free:.1f} free"
    if free >= need and facts.matmul_tflops:
        s_per_img = 2 * script.forward_tflop / (facts.matmul_tflops * script.share)
        hours = s_per_img * script.images / 3600
        length = f"{hours:.1f} h" if hours >= 1.5 else f"{hours * 60:.0f} min"
        line += f"; estimate {s_per_img:.2g} s an image, {length} for the default run of {script.images:,} images"
    line = line if facts.gpus else "needs a GPU; --demo runs on a CPU"
    return dict(fits=free >= need, s_per_img=s_per_img, hours=hours, line=line)


def table(facts, verdict, seconds):
    """The findings for people to read: a mark, what was looked at, what was found."""
    required = {name: found for name, found in facts.packages.items() if name not in OPTIONAL}
    fitting = [f"{name} {installed}" for name, (installed, _, fits) in required.items() if fits]
    extra = [f"{name} {facts.packages[name][0] or 'absent'}" for name in OPTIONAL if name in facts.packages]
    rows = [("machine", None, f"{facts.host} host, Python {facts.python}, {facts.cores} CPU cores, {facts.ram_gib:.1f} GiB of RAM")]
    gpu_line = "{name}, capability {capability}, {free_gib:.1f} of {total_gib:.1f} GiB free"
    rows += [(f"GPU {i}", None, gpu_line.format(**gpu)) for i, gpu in enumerate(facts.gpus)] or [("GPU", None, "none")]
    rows += [("packages", len(fitting) == len(required), ", ".join(fitting)), ("optional", None, ", ".join(extra))]
    rate = f", {facts.matmul_tflops:.0f} TFLOP/s in fp16" if facts.matmul_tflops else ""
    rows += [(name, result == "ok", result + (rate if name == "matmul" else "")) for name, result in facts.smoke.items()]
    rows += [(name, free >= DISK_GB[name], f"{free:.0f} GB free at {folder}") for name, (folder, free) in facts.disk.items()]
    rows += [("hub", state in ("cached", "reachable"), f"{repo_id} {state}") for repo_id, state in facts.hub.items()]
    rows += [("attached", None, folder) for folder in facts.kaggle_models + facts.kaggle_data]
    rows += [(script, found["fits"], found["line"]) for script, found in verdict["scripts"].items()]
    rows += [("problem", False, line) for line in verdict["problems"]] + [("note", None, line) for line in verdict["notes"]]
    lines = []
    for name, good, text in rows:
        start = f"{ {True: 'ok', False: 'no', None: '  '}[good] }  {name:15} "
        lines += textwrap.wrap(text, 132, initial_indent=start, subsequent_indent=" " * 20, break_on_hyphens=False, break_long_words=False)
    state = "cannot run yet" if verdict["problems"] else "can run"
    return "\n".join([*lines, "", f"recommended, {state}: {verdict['command']}", f"({seconds:.1f} s)"])


if __name__ == "__main__":
    run(lambda: sys.exit(main()))
