"""Can this machine run the suite, and which script? Packages, disk, memory, GPU, hub and data in one table, in seconds, and a verdict.

python verify_setup.py [--json]; exit status: 0 when the recommended script can run, 1 when it lacks something, 2 for a wrong flag
"""

import common  # noqa: F401  # isort: skip  (first: from here on Ctrl-C is one line)
import json
import logging
import os
import platform
import shutil
import sys
import textwrap
import threading
import time
from collections import namedtuple
from dataclasses import asdict, dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

try:
    import psutil
    from huggingface_hub import HfApi, constants, try_to_load_from_cache
    from packaging.requirements import Requirement

    from common import hub
    from common.command_line import CACHE_DIR, flag, parse, run
except ModuleNotFoundError as error:
    sys.exit(f"verify_setup.py: {error.name} is missing: pip install -r requirements.txt")

GIB = 2**30
OPTIONAL, THERE = ("xformers", "tensorboard", "wandb"), ("cached", "reachable")
MODEL, DATA = "stabilityai/stable-diffusion-xl-base-1.0", "lambdalabs/naruto-blip-captions"
REPOS = {  # id -> type, and a file that is in the cache only when the repo was downloaded for use
    MODEL: ("model", "unet/diffusion_pytorch_model.fp16.safetensors"),
    hub.FP16_VAE: ("model", "diffusion_pytorch_model.safetensors"),
    DATA: ("dataset", "README.md"),
}
DISK_GB = {"HF cache": 9.0, "--cache_dir": 1.0, "working folder": 1.0}  # model 7, data 1.4; latents and text; adapters and checkpoints
SPARE_GIB, LITTLE_RAM_GIB = 0.75, 6  # of RAM 2.8 were measured, loading included; the rest is the system's share
ROOMY_GIB = 13.0  # from here on train_sdxl.py is the one to take, and little need be recomputed
# What a trainer's defaults need, measured on an H100 (README.md): peak with one image a pass and every block recomputed; images of the default
# run; TFLOP of the UNet's forward pass per image (a step is two); share of the GPU's fp16 matrix rate that the step reached; free memory
# below which another script suits the card better; whether it needs bitsandbytes, for 4-bit weights or 8-bit AdamW.
Script = namedtuple("Script", "name peak_gib images forward_tflop share recommended_gib bitsandbytes", defaults=(0.0, False))
SCRIPTS = (  # in the order in which they are recommended
    Script("train_sdxl.py", 5.7, 2000 * 4, 6.761, 0.39, recommended_gib=ROOMY_GIB),
    Script("train_opt.py", 5.5, 3000 * 8, 3.641, 0.38),
    Script("train_qlora.py", 3.1, 3 * 1221, 1.589, 0.20, bitsandbytes=True),
    Script("train_dora.py", 5.4, 3 * 1221, 1.589, 0.25, bitsandbytes=True),
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
    matmul_tflops: float | None = None  # of a GPU, in fp16


def main(argv=None):
    """Probe, judge, print; returns the exit status."""
    flags = parse(Flags, argv)
    started, facts = time.monotonic(), probe()
    verdict = {**judge(facts), "seconds": round(time.monotonic() - started, 1)}
    print(json.dumps({**asdict(facts), **verdict}, indent=2) if flags.json else table(facts, verdict))
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
    folders = zip(DISK_GB, (constants.HF_HUB_CACHE, CACHE_DIR, os.getcwd()))
    disk = {name: (folder, free_gb(Path(folder).absolute())) for name, folder in folders}
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
    """Of the disk that it lies on, or will lie on; 0 where nothing may be written."""
    place = next(place for place in (folder, *folder.parents) if place.exists())
    return shutil.disk_usage(place).free / 1e9 if os.access(place, os.W_OK) else 0.0


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
        too_deep = folder.count("/") - root.count("/") >= depth or time.monotonic() - started > seconds
        if too_deep or folder in models[-1:] + data[-1:]:
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
            smoke[name] = test(torch, *(("cuda", torch.float16) if gpus else ("cpu", torch.float32))) or "ok"
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
    a.normal_()
    started = time.perf_counter()
    while device == "cuda" and time.perf_counter() - started < 0.5:
        for _ in range(4):
            a @ a
        torch.cuda.synchronize()
        count += 4
    return 2 * n**3 * count / (time.perf_counter() - started) / 1e12 or None


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
    """{"recommended": script or "--demo", "command", "scripts", "problems": what stops it, "notes": what is only good to know}."""
    scripts = {script.name: judge_script(script, facts) for script in SCRIPTS}
    chosen = next((s for s in SCRIPTS if scripts[s.name]["fits"] and facts.gpus[0]["free_gib"] >= s.recommended_gib), None)
    name, count, gpu = chosen.name if chosen else "--demo", len(facts.gpus), facts.gpus[0] if chosen else None
    wrong = {package: found for package, found in facts.packages.items() if not found[2]}
    failed = {test: result for test, result in facts.smoke.items() if result != "ok" and (test != "torch" or "torch" not in wrong)}
    nf4_error = None if chosen and chosen.bitsandbytes else failed.pop("NF4 weights", None)
    python = tuple(map(int, facts.python.split(".")[:2]))
    problems = [f"Python {facts.python}: the packages need 3.11 or newer"] if python < (3, 11) else []
    problems += [f"{package} {has or 'is missing'}: pip install '{package}{wanted}'" for package, (has, wanted, _) in wrong.items()]
    problems += [f"{test}: {result}" for test, result in failed.items()]
    notes = {
        f"NF4 weights: {nf4_error}; train_qlora.py and train_dora.py cannot run": nf4_error,
        "there is an NVIDIA driver, but torch sees no GPU: is it a build for CPUs?": facts.driver and not facts.gpus,
        f"{facts.ram_gib:.1f} GiB of RAM is little: a trainer takes about 3": facts.ram_gib < LITTLE_RAM_GIB,
        f"{count} GPUs: with plain `python {name}` all but one would idle": chosen and count > 1,
        "this GPU has no bf16 units: keep to fp16, the default": chosen and not gpu["bf16"],
        "where a card this size has to recompute, a run takes up to half longer": chosen and gpu["free_gib"] < ROOMY_GIB,
    }
    launcher = f"accelerate launch --num_processes {count}" if count > 1 and chosen else "python"
    command = f"{launcher} {name if chosen else 'train_opt.py --demo'}"
    model, data = ("--pretrained_model_name_or_path", facts.kaggle_models), ("--train_data_dir", facts.kaggle_data)
    for (option, folders), ids in ((model, [MODEL, hub.FP16_VAE]), (data, [DATA])) if chosen else ():
        absent = [f"{repo_id} {facts.hub[repo_id]}" for repo_id in ids if facts.hub[repo_id] not in THERE]
        command += f" {option} {folders[0]}" if absent and folders else ""
        problems += [f"{'; '.join(absent)}: name a local folder with {option}, or try --demo"] if absent and not folders else []
    for place, (folder, free) in facts.disk.items() if chosen else ():
        if free < DISK_GB[place] and (place != "HF cache" or facts.hub[MODEL] == "reachable"):
            problems.append(
                f"{folder}: {free:.1f} GB free, about {DISK_GB[place]:.0f} needed; a larger disk can be named with HF_HOME, --cache_dir, --output_dir"
            )
    return dict(recommended=name, command=command, scripts=scripts, problems=problems, notes=list(filter(notes.get, notes)))


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


def table(facts, verdict):
    """The findings for people to read: a mark, what was looked at, what was found."""
    required = {name: found for name, found in facts.packages.items() if name not in OPTIONAL}
    fitting = [f"{name} {installed}" for name, (installed, _, fits) in required.items() if fits]
    extra = [f"{name} {facts.packages[name][0] or 'absent'}" for name in OPTIONAL if name in facts.packages]
    rows = [("machine", None, f"{facts.host} host, Python {facts.python}, {facts.cores} CPU cores, {facts.ram_gib:.1f} GiB of RAM")]
    card = "{name}, capability {capability}, {free_gib:.1f} of {total_gib:.1f} GiB free"
    rows += [(f"GPU {i}", None, card.format(**gpu)) for i, gpu in enumerate(facts.gpus)] or [("GPU", None, "none")]
    rows += [("packages", len(fitting) == len(required), ", ".join(fitting)), ("optional", None, ", ".join(extra))]
    rate = f", {facts.matmul_tflops:.0f} TFLOP/s in fp16" if facts.matmul_tflops else ""
    rows += [(name, result == "ok", result + (rate if name == "matmul" else "")) for name, result in facts.smoke.items()]
    rows += [(name, free >= DISK_GB[name], f"{free:.0f} GB free at {folder}") for name, (folder, free) in facts.disk.items()]
    rows += [("hub", state in THERE, f"{repo_id} {state}") for repo_id, state in facts.hub.items()]
    rows += [("attached", None, folder) for folder in facts.kaggle_models + facts.kaggle_data]
    rows += [(script, found["fits"], found["line"]) for script, found in verdict["scripts"].items()]
    rows += [(kind[:-1], None, line) for kind in ("problems", "notes") for line in verdict[kind]]
    lines, mark = [], {True: "ok", False: "no", None: "  "}
    for name, good, text in rows:
        lines += textwrap.wrap(f"{mark[good]}  {name:15} {text}", 132, subsequent_indent=" " * 20, break_on_hyphens=False)
    state = "NOT READY" if verdict["problems"] else "ready"
    return "\n".join([*lines, "", f"recommended ({state}): {verdict['command']}", f"({verdict['seconds']} s)"])


if __name__ == "__main__":
    run(lambda: sys.exit(main()))
