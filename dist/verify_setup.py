"""Can this machine run the suite, and which script? What is there, what is in the way, and what to type next.

python verify_setup.py [--json]

Needs nothing but Python. Exit status: 0 when the command it names can run, 1 when something is in the way, 2 for a
wrong flag.
"""

# Made by tools/bundle.py from verify_setup.py and 8 modules; edit those, not this file.

import importlib.abc
import importlib.util
import os
import sys

MODULES = {}

# ============================================================================================ common/__init__.py

MODULES['common/__init__.py'] = r'''
"""The data flow of the suite, and the wings in which it lies. Imports go down only, as a test reads them.

image, caption ─ data/dataset ─▶ Sample ─ data/caching ─▶ moments, text ─ data/batching ─▶ Batch ─ model/noise ─▶ x_t
     (model/loading: VAE and text encoders are on the GPU only while they encode)                                    │
                                                                                                                     ▼
images ◀─ render/sampling ◀─ adapter file ◀─ train/results ◀─ train/loops ◀─ train/engine: unet ─▶ loss ─▶ flat gradient
     (model/adapters: LoRA layers, the flat parameter buffer, optimizer, EMA)

train          assembly, the step, the loop, checkpoints, results
render         adapters -> pictures and grids
data           pictures and captions -> Batch             adapter_files  one file per format, writer facing reader
fast           the same numbers, sooner; skip it first    model          SDXL and its adapter on the device
cli            flags, checks, errors; without torch       system         the machine, launchers, signals; without torch
"""

import os
import sys


def _interrupted_or(hook):
    """`hook` for every error that nothing has caught, but for Ctrl-C before `run` can answer it: one line."""

    def excepthook(kind, error, traceback):
        if issubclass(kind, KeyboardInterrupt):
            sys.stderr.write(
                f"{os.path.basename(sys.argv[0])}: interrupted\n"
            )  # Python then ends by SIGINT: 130 in a shell
        else:
            hook(kind, error, traceback)

    return excepthook


sys.excepthook = _interrupted_or(sys.excepthook)

# PEFT refuses to make any adapter beside a torchao older than 0.16, which Kaggle and Colab have. Nothing here uses it.
sys.modules["torchao"] = None
'''

# ===================================================================================== common/system/__init__.py

MODULES['common/system/__init__.py'] = r'''
"""What this machine has and how a process lives on it: GPU, packages, folders, launchers, signals; without torch."""
'''

# ===================================================================================== common/system/attached.py

MODULES['common/system/attached.py'] = r'''
"""What is attached to a Kaggle notebook below /kaggle/input: models, captioned pictures and wheels.

There may be no internet, and these are all there is.
"""

import os
import time
from typing import NamedTuple

KAGGLE_INPUT = "/kaggle/input"
DEPTH = 6  # folders below the root: Kaggle's own layout takes up to five
SEARCH_S = 1.5  # a data set of a million files is not searched to its end
IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff")


class Attached(NamedTuple):
    """Folders, each list sorted."""

    models: list[str]  # with model_index.json
    data: list[str]  # with metadata.jsonl or .csv, or with a .txt beside a picture
    wheels: list[str]  # with .whl files


def find_attached(root: str = KAGGLE_INPUT) -> Attached:
    """Search `root`, which may be absent; below a model or a data folder nothing more is looked for."""
    found = Attached([], [], [])
    started_s = time.monotonic()
    for folder, below, files in os.walk(root):
        below.sort()
        if any(name.endswith(".whl") for name in files):
            found.wheels.append(folder)

        # A model or a data set ends the search of its branch, as do depth and time.
        if "model_index.json" in files:
            found.models.append(folder)
            below.clear()
        elif _holds_captions(files):
            found.data.append(folder)
            below.clear()
        elif folder.count(os.sep) - root.count(os.sep) >= DEPTH or time.monotonic() - started_s > SEARCH_S:
            below.clear()
    return Attached(*map(sorted, found))


def _holds_captions(files: list[str]) -> bool:
    """Whether these are the files of a folder that `--train_data_dir` can read."""
    if "metadata.jsonl" in files or "metadata.csv" in files:
        return True
    texts = {name.removesuffix(".txt") for name in files if name.endswith(".txt")}
    return any(os.path.splitext(name)[0] in texts for name in files if name.lower().endswith(IMAGE_SUFFIXES))
'''

# ======================================================================================== common/system/cards.py

MODULES['common/system/cards.py'] = r'''
"""A GPU's name and capability -> why this PyTorch cannot compute on it, or None. Nothing here imports torch."""

import re


def unsupported_card(name: str, capability: tuple[int, int], built_for: list[str]) -> str | None:
    """Why PyTorch cannot compute on a card, and what to do, in one line; None when it can.

    Code for sm_XY runs on cards of the same X and at least that Y. Code for compute_XY runs on every later one
    (CUDA C++ programming guide, application compatibility). Builds for other makers' cards name neither: not judged.

    Args:
        name, capability, built_for: of torch.cuda.get_device_name, get_device_capability and get_arch_list.
    """
    matches = [re.fullmatch(r"(sm|compute)_(\d+)(\d)[a-z]?", architecture) for architecture in built_for]
    codes = [(match[1], (int(match[2]), int(match[3]))) for match in matches if match]
    if not codes or any(_runs(kind, built, capability) for kind, built in codes):
        return None
    oldest = min(built for _, built in codes)
    return (
        f"{name} (sm_{capability[0]}{capability[1]}): this PyTorch has no code for it,"
        f" only for sm_{oldest[0]}{oldest[1]} and other cards; choose another GPU (Kaggle: choose GPU T4 x2)"
    )


def _runs(kind, built, capability):
    return built <= capability if kind == "compute" else built[0] == capability[0] and built[1] <= capability[1]
'''

# ====================================================================================== common/system/machine.py

MODULES['common/system/machine.py'] = r'''
"""This machine -> Facts: host, packages, memory, disks, GPUs, and what of the hub is within reach.

Needs nothing but Python, so that it can be asked before anything is installed. Torch and bitsandbytes are imported to
be tried.
"""

import logging
import os
import shutil
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType

from common.system import packages
from common.system.attached import Attached, find_attached
from common.system.cards import unsupported_card
from common.system.places import CACHE_DIR

GIB = 2**30
OPTIONAL = ("xformers", "tensorboard", "wandb")
NAMED = (*packages.REQUIREMENTS, *OPTIONAL, "torchao")
MODEL = "stabilityai/stable-diffusion-xl-base-1.0"
VAE = "madebyollin/sdxl-vae-fp16-fix"
DATA = "lambdalabs/naruto-blip-captions"
REPOS = {  # id -> type, and a file that is in the cache only when the repo was downloaded for use
    MODEL: ("model", "unet/diffusion_pytorch_model.fp16.safetensors"),
    VAE: ("model", "diffusion_pytorch_model.safetensors"),
    DATA: ("dataset", "README.md"),
}
ANSWER_S = 3  # of a server that takes the connection
PATIENCE_S = 4  # with the hub: a silent name server knows no timeout
MATMUL_S = 0.5


@dataclass
class Gpu:
    """One card as torch sees it."""

    name: str
    capability: tuple[int, int]  # (7, 5) is sm_75
    total_gib: float
    free_gib: float
    fault: str | None = None  # why this torch cannot compute on it


@dataclass
class Disk:
    """Free space where something will be written; 0 where nothing may be."""

    folder: str
    free_gb: float


@dataclass
class Facts:
    """What was found."""

    python: tuple[int, int, int]  # (3, 12, 3)
    host: str  # "Kaggle", "Colab" or "own machine"
    cores: int
    ram_gib: float
    packages: dict[str, str | None]  # name -> installed version or None
    lacking: dict[str, str | None]  # name -> None where it is absent, its version where that is too old
    requirements: bool  # requirements.txt lies in the working folder
    disks: dict[str, Disk]  # what for -> Disk
    hub: dict[str, str]  # repo id -> "cached", "reachable" or why it is neither
    attached: Attached
    driver: bool = False  # NVIDIA's, whatever torch says
    gpus: list[Gpu] = field(default_factory=list)
    smoke: dict[str, str] = field(default_factory=dict)  # test -> "ok" or the error
    matmul_tflops: float | None = None  # of the first GPU, in fp16


def probe() -> Facts:
    """Look at everything; the hub answers meanwhile."""
    hub = HubAnswers()
    gpus, smoke, matmul_tflops = probe_torch()
    return Facts(
        # the machine
        python=sys.version_info[:3],
        host=host(),
        cores=len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count(),
        ram_gib=os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / GIB,
        # what is installed and attached
        packages={name: packages.installed_version(name) for name in NAMED},
        lacking=lacking(),
        requirements=Path("requirements.txt").exists(),
        disks={name: Disk(str(folder), free_gb(folder)) for name, folder in places().items()},
        attached=find_attached(),
        # its GPUs, and the hub's answers at last
        driver=os.path.exists("/proc/driver/nvidia/version"),
        gpus=gpus,
        smoke=smoke,
        matmul_tflops=matmul_tflops,
        hub=hub.wait(),
    )


def host() -> str:
    """Kaggle, Colab or own machine."""
    if "KAGGLE_KERNEL_RUN_TYPE" in os.environ or os.path.isdir("/kaggle/working"):
        return "Kaggle"
    return "Colab" if "COLAB_RELEASE_TAG" in os.environ else "own machine"


def lacking() -> dict[str, str | None]:
    """Of all packages, name -> None where it is absent, or its version where that is too old."""
    absent = {name: None for name in packages.WHERE_USED if packages.is_absent(name)}
    return packages.lacking() | absent


# ---------------------------------------------------------------- disks


def places() -> dict[str, Path]:
    """Where something will be written: what for -> folder."""
    return {"model": hub_cache(), "encoded data": Path(CACHE_DIR), "results": Path.cwd()}


def hub_cache() -> Path:
    """huggingface_hub's cache, by the variables that move it."""
    home = os.path.join(os.environ.get("XDG_CACHE_HOME", "~/.cache"), "huggingface")
    cache = os.path.join(os.environ.get("HF_HOME", home), "hub")
    cache = os.environ.get("HF_HUB_CACHE", os.environ.get("HUGGINGFACE_HUB_CACHE", cache))
    return Path(os.path.expandvars(os.path.expanduser(cache)))


def free_gb(folder: Path) -> float:
    """Of the disk that `folder` lies on, or will lie on; 0 where nothing may be written."""
    nearest = next(place for place in (folder, *folder.absolute().parents) if place.exists())
    return shutil.disk_usage(nearest).free / 1e9 if os.access(nearest, os.W_OK) else 0.0


# ---------------------------------------------------------------- the hub


class HubAnswers:
    """Asks for every repo at once, in threads that nobody has to wait for."""

    def __init__(self):
        self.asked_s = time.monotonic()
        self.states = dict.fromkeys(REPOS, "no answer")
        self.threads = [threading.Thread(target=self._ask, args=(repo_id,), daemon=True) for repo_id in REPOS]
        for thread in self.threads:
            thread.start()

    def _ask(self, repo_id):
        self.states[repo_id] = hub_state(repo_id)

    def wait(self) -> dict[str, str]:
        """The states after PATIENCE_S at most: a name server that is silent knows no timeout."""
        for thread in self.threads:
            thread.join(max(0.0, self.asked_s + PATIENCE_S - time.monotonic()))
        return dict(self.states)


def hub_state(repo_id: str) -> str:
    repo_type, filename = REPOS[repo_id]
    folder = hub_cache() / f"{repo_type}s--{repo_id.replace('/', '--')}" / "snapshots"
    if any(folder.glob(f"*/{filename}")):
        return "cached"
    if os.environ.get("HF_HUB_OFFLINE", "0") not in ("0", ""):
        return "HF_HUB_OFFLINE is set"
    endpoint = os.environ.get("HF_ENDPOINT", "https://huggingface.co")
    try:
        urllib.request.urlopen(f"{endpoint}/api/{repo_type}s/{repo_id}", timeout=ANSWER_S).close()
        return "reachable"
    except urllib.error.HTTPError as error:
        return f"HTTP {error.code}"
    except Exception as error:  # whatever a dead network raises
        return f"unreachable ({type(error).__name__})"


# ---------------------------------------------------------------- GPUs


def probe_torch() -> tuple[list[Gpu], dict[str, str], float | None]:
    """(GPUs, smoke tests, TFLOP/s of fp16 matrix products or None)."""
    if packages.is_absent("torch"):
        return [], {}, None
    try:
        import torch

        gpus = [describe(torch, i) for i in range(torch.cuda.device_count())]
    except Exception as error:  # a broken installation or driver
        return [], {"torch": one_line(error)}, None

    # A card that this torch has no code for would fail every test in its own words.
    if gpus and gpus[0].fault:
        return gpus, {}, None

    # What a run will ask of the device, tried on a small scale.
    where = ("cuda", torch.float16) if gpus else ("cpu", torch.float32)
    tests = {"matrix product": matrix_product}
    if gpus:
        tests["attention"] = attention
    if not packages.is_absent("bitsandbytes"):
        tests["4-bit weights"] = nf4
    smoke = {name: tried(test, torch, *where) for name, test in tests.items()}
    measurable = gpus and smoke["matrix product"] == "ok"
    return gpus, smoke, matmul_rate(torch) if measurable else None


def describe(torch: ModuleType, index: int) -> Gpu:
    """What torch says of a card."""
    free_bytes, total_bytes = torch.cuda.mem_get_info(index)
    name = torch.cuda.get_device_name(index)
    capability = torch.cuda.get_device_capability(index)
    fault = unsupported_card(name, capability, torch.cuda.get_arch_list())
    return Gpu(name, capability, total_gib=total_bytes / GIB, free_gib=free_bytes / GIB, fault=fault)


def tried(test: Callable, torch: ModuleType, device: str, dtype: object) -> str:
    """`ok`, or the error of a smoke test."""
    try:
        test(torch, device, dtype)
        return "ok"
    except Exception as error:  # the point of a smoke test is to show whatever comes
        return one_line(error)


def one_line(error: Exception) -> str:
    """The class and the first line of an error."""
    return f"{type(error).__name__}: {next(iter(str(error).splitlines()), '')}"


def matrix_product(torch: ModuleType, device: str, dtype: object) -> None:
    """A product of which every entry is known."""
    ones = torch.ones(256, 256, device=device, dtype=dtype)
    assert (ones @ ones)[0, 0].item() == 256, "wrong result"


def attention(torch: ModuleType, device: str, dtype: object) -> None:
    """The memory-efficient kernel, forward and backward."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    q = torch.randn(1, 2, 64, 64, device=device, dtype=dtype, requires_grad=True)
    with sdpa_kernel(SDPBackend.EFFICIENT_ATTENTION):
        torch.nn.functional.scaled_dot_product_attention(q, q, q).sum().backward()
    assert q.grad.isfinite().all(), "gradient not finite"


def nf4(torch: ModuleType, device: str, dtype: object) -> None:
    """bitsandbytes' 4-bit weights, there and back."""
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # it speaks while it is imported
    from bitsandbytes.functional import dequantize_4bit, quantize_4bit

    weight = torch.randn(64, 64, device=device, dtype=dtype)
    restored = dequantize_4bit(*quantize_4bit(weight, quant_type="nf4"))
    error = (restored - weight).float().norm() / weight.float().norm()
    assert error < 0.15, f"relative error {error:.2f} after a round trip"


def matmul_rate(torch: ModuleType) -> float:
    """TFLOP/s of 4096 x 4096 fp16 products on the first GPU."""
    n = 4096
    count = 0
    a = torch.randn(n, n, device="cuda", dtype=torch.float16)
    a @ a  # warm-up
    torch.cuda.synchronize()
    started_s = time.perf_counter()
    while time.perf_counter() - started_s < MATMUL_S:
        for _ in range(4):
            a @ a
        torch.cuda.synchronize()
        count += 4
    return 2 * n**3 * count / (time.perf_counter() - started_s) / 1e12
'''

# ===================================================================================== common/system/packages.py

MODULES['common/system/packages.py'] = r'''
"""The packages the suite needs, in the ranges it was tested with. Nothing here imports them."""

import importlib.util
import os
import re
import sys
from importlib.metadata import PackageNotFoundError, version

# The same as requirements.txt, which a one-file script does not have beside it.
# Floors: what Kaggle and Colab ship with (hosts/). Upper bounds: the newest minor release that was tested.
REQUIREMENTS = {
    "torch": ">=2.6",  # transformers switches PyTorch off below
    "diffusers": ">=0.37.1,<0.43",
    "transformers": ">=5.0,<5.25",
    "peft": ">=0.19.1,<0.22",
    "accelerate": ">=1.13,<1.16",
    "bitsandbytes": ">=0.50.2,<0.51",
    "datasets": ">=4.0,<5.3",
    "argparse-dataclass": ">=2.0,<3",
    "huggingface_hub": ">=1.11,<2.5",
    "safetensors": ">=0.7,<0.9",
    "tqdm": ">=4.67",
    "pillow": ">=11.3",
    "numpy": ">=2.0",
    "psutil": ">=5.9.5",
    "matplotlib": ">=3.10",
}
MODULES = {"argparse-dataclass": "argparse_dataclass", "pillow": "PIL"}  # where the name to import is another one
WHERE_USED = ("bitsandbytes",)  # asked for by the flags that use it


def lacking() -> dict[str, str | None]:
    """{package: its version, or None when it is absent} of what is missing or too old, those of WHERE_USED left out.

    The upper bounds are for pip: a newer package may well work.
    """
    found = {}
    for name, wanted in REQUIREMENTS.items():
        if name in WHERE_USED:
            continue
        if is_absent(name):
            found[name] = None
        elif (installed := installed_version(name)) and release(installed) < release(wanted.removeprefix(">=")):
            found[name] = installed
    return found


def is_absent(name: str) -> bool:
    return importlib.util.find_spec(MODULES.get(name, name)) is None


def installed_version(name: str) -> str | None:
    """None also where a package lies on the path without its metadata."""
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def release(text: str) -> tuple[int, ...]:
    """The numbers a version or a list of bounds begins with: (2, 6, 0) of 2.6.0+cu124."""
    return tuple(int(number) for number in re.match(r"\d+(\.\d+)*", text)[0].split("."))


def refusal(found: dict[str, str | None]) -> str:
    """One line that names what `lacking` found, with the command that brings it."""
    said = ", ".join(f"{name} is missing" if has is None else f"{name} {has} is too old" for name, has in found.items())
    return f"{said}: pip install " + " ".join(f'"{name}{REQUIREMENTS[name]}"' for name in found)


def require_parser() -> None:
    """End with one line and exit status 2 where argparse-dataclass is absent: common.cli.command_line imports it."""
    if is_absent("argparse-dataclass"):
        print(f"{os.path.basename(sys.argv[0])}: error: {refusal(lacking())}", file=sys.stderr)
        sys.exit(2)
'''

# ======================================================================================= common/system/places.py

MODULES['common/system/places.py'] = r'''
"""Where the suite keeps things on this machine. Nothing but Python is needed to ask."""

import os

CACHE_DIR = os.path.join(os.environ.get("XDG_CACHE_HOME", os.path.expanduser("~/.cache")), "sdxl-style")
'''

# ====================================================================================== common/system/verdict.py

MODULES['common/system/verdict.py'] = r'''
"""machine.Facts -> Verdict: which script suits the machine, how long it takes there, what stands in the way.

What the trainers' defaults need was measured on an H100 (docs/benchmarks.json). A test compares the figures here with
that file and with the trainers' own flags.
"""

from collections.abc import Iterator
from typing import NamedTuple

from common.system import packages
from common.system.machine import DATA, MODEL, VAE, Facts

NEWEST_PYTHON = (3, 13)  # that was tried; one that is too old is refused at once
WITHIN_REACH = ("cached", "reachable")
# Model 7 and data 1.4; latents and text; adapters and checkpoints.
DISK_GB = {"model": 9.0, "encoded data": 1.0, "results": 1.0}
SPARE_GIB = 0.5  # beside the peak: fragments, and what others take meanwhile
LITTLE_RAM_GIB = 6  # of RAM 2.8 were measured, loading included; the rest is the system's share
ROOMY_GIB = 13.0  # the speeds were measured with this much; on less, more is recomputed
FLASH_CAPABILITY = (8, 0)  # from here on attention has the fast kernels
SUSTAINED_TFLOPS = {"T4": 24.0}  # under its 70 W cap; half a second measures more


class Script(NamedTuple):
    """A trainer's defaults on one GPU."""

    command: str
    peak_gib: float  # all that torch takes from the card: one image a pass, every block recomputed
    images: int  # of the default run
    forward_tflop: float  # of the UNet, per image; a step is two
    share: float  # of the GPU's fp16 matrix rate that a step reaches
    share_t4: float  # the same with the attention kernels of a T4
    needs_bitsandbytes: bool = False  # for 4-bit weights or 8-bit AdamW


SHORT = dict(images=3664, forward_tflop=1.589)  # three epochs of the default data set at 512 px
SCRIPTS = (  # in the order in which they are recommended
    Script("train_sdxl.py", 6.39, images=8000, forward_tflop=6.761, share=0.390, share_t4=0.257),
    Script("train_opt.py", 5.95, images=24000, forward_tflop=3.641, share=0.371, share_t4=0.298),
    Script("train_qlora.py", 3.35, share=0.202, share_t4=0.190, needs_bitsandbytes=True, **SHORT),
    Script("train_qlora.py --strategy normal", 3.13, share=0.228, share_t4=0.212, needs_bitsandbytes=True, **SHORT),
    Script("train_dora.py", 5.83, share=0.255, share_t4=0.233, needs_bitsandbytes=True, **SHORT),
)
DEMO = "python train_opt.py --demo"
AGAIN = "python verify_setup.py"


class Estimate(NamedTuple):
    """One script on one GPU of this machine."""

    needs_gib: float
    fits: bool
    s_per_img: float | None  # None where it does not fit, or the GPU's rate is unknown
    hours: float | None


class Verdict(NamedTuple):
    """`problems` and `notes` are sentences; a command that mends a problem stands on a line of its own."""

    command: str  # what to run on this machine
    estimates: dict[str, Estimate]  # command of a script -> Estimate
    problems: list[str]  # what keeps `command` from running
    notes: list[str]  # what is good to know


def judge(facts: Facts) -> Verdict:
    """Everything that follows from the facts."""
    estimates = {script.command: estimate(script, facts) for script in SCRIPTS}
    chosen = next((script for script in SCRIPTS if estimates[script.command].fits), None)

    # The command: every GPU, and what is attached where the hub is out of reach.
    # Without torch no GPU can be seen yet.
    unseen = "torch" in facts.lacking or any(gpu.fault for gpu in facts.gpus[:1])
    command = AGAIN if unseen else DEMO
    unreachable = []
    if chosen:
        count = len(facts.gpus)
        launcher = f"accelerate launch --num_processes {count}" if count > 1 else "python"
        options, unreachable = instead_of_the_hub(facts)
        command = " ".join([launcher, chosen.command, *options])

    # what keeps it from running
    problems = [
        *package_problems(facts, chosen),
        *gpu_problems(facts),
        *smoke_problems(facts, chosen),
        *unreachable,
    ]
    problems += disk_problems(facts) if chosen else []
    return Verdict(command, estimates, problems, notes(facts, chosen, unseen))


def estimate(script: Script, facts: Facts) -> Estimate:
    """Whether a script's default run fits the first GPU, and how long it takes there."""
    needs_gib = script.peak_gib + SPARE_GIB
    gpu = facts.gpus[0] if facts.gpus else None
    fits = gpu is not None and not gpu.fault and gpu.free_gib >= needs_gib
    if not fits or facts.matmul_tflops is None:
        return Estimate(needs_gib, fits, s_per_img=None, hours=None)

    share = script.share if gpu.capability >= FLASH_CAPABILITY else script.share_t4
    sustained = [rate for name, rate in SUSTAINED_TFLOPS.items() if name in gpu.name.split()]
    s_per_img = 2 * script.forward_tflop / (min([facts.matmul_tflops, *sustained]) * share)
    return Estimate(needs_gib, fits, s_per_img=s_per_img, hours=s_per_img * script.images / 3600)


# ---------------------------------------------------------------- what stands in the way


def package_problems(facts: Facts, chosen: Script | None) -> list[str]:
    """One sentence and one command for all of them, if the chosen script uses any."""
    unused = () if chosen and chosen.needs_bitsandbytes else packages.WHERE_USED
    if facts.lacking.keys() <= set(unused):
        return []
    missing = [name for name, version in facts.lacking.items() if version is None]
    too_old = [f"{name} {version}" for name, version in facts.lacking.items() if version is not None]
    named = [f"missing: {', '.join(missing)}"] if missing else []
    named += [f"too old: {', '.join(too_old)}"] if too_old else []
    return [f"{'; '.join(named)}\n{pip_command(facts)}"]


def pip_command(facts: Facts) -> str:
    """Installs all that is lacking; without internet, from attached wheels."""
    wanted = " ".join(f'"{name}{packages.REQUIREMENTS[name]}"' for name in facts.lacking)
    if facts.attached.wheels and "reachable" not in facts.hub.values():
        return f"pip install --no-index --find-links {facts.attached.wheels[0]} {wanted}"
    return "pip install -r requirements.txt" if facts.requirements else f"pip install {wanted}"


def gpu_problems(facts: Facts) -> list[str]:
    """Why torch cannot compute on the first GPU."""
    return [gpu.fault for gpu in facts.gpus[:1] if gpu.fault]


def smoke_problems(facts: Facts, chosen: Script | None) -> Iterator[str]:
    """A package that is too old explains its own failure; 4-bit weights stop only what uses them."""
    for test, result in facts.smoke.items():
        stops = test != "4-bit weights" or (chosen is not None and chosen.needs_bitsandbytes)
        if result != "ok" and stops and "torch" not in facts.lacking:
            yield f"{test}: {result}"


def instead_of_the_hub(facts: Facts) -> tuple[list[str], list[str]]:
    """(flags that name attached folders, sentences on what is neither attached nor within reach)."""
    wanted = (
        ("--pretrained_model_name_or_path", facts.attached.models, (MODEL, VAE)),
        ("--train_data_dir", facts.attached.data, (DATA,)),
    )
    options = []
    problems = []
    for flag, folders, repo_ids in wanted:
        absent = [repo_id for repo_id in repo_ids if facts.hub[repo_id] not in WITHIN_REACH]
        if absent and folders:
            options += [flag, folders[0]]
        elif absent:
            states = ", ".join(dict.fromkeys(facts.hub[repo_id] for repo_id in absent))
            problems.append(f"{' and '.join(absent)}: {states}, and not in the cache; {offline_ways(facts, flag)}")
    return options, problems


def offline_ways(facts: Facts, flag: str) -> str:
    """What to do where the hub is out of reach."""
    if facts.host == "Kaggle":
        return "switch Internet on in the notebook's settings, or attach it as an input (docs/hosts.md)"
    return f"connect to the internet, or name a local folder with {flag}"


def disk_problems(facts: Facts) -> Iterator[str]:
    """Disks that are too full, each with the way to another."""
    cures = {"model": "HF_HOME", "encoded data": "--cache_dir", "results": "--output_dir"}
    for name, disk in facts.disks.items():
        is_needed = name != "model" or facts.hub[MODEL] == "reachable"
        if is_needed and disk.free_gb < DISK_GB[name]:
            yield (
                f"disk for the {name}, {disk.folder}: {disk.free_gb:.1f} GB free, about {DISK_GB[name]:.0f} needed; "
                f"name another with {cures[name]}"
            )


# ---------------------------------------------------------------- what is good to know


def notes(facts: Facts, chosen: Script | None, unseen: bool) -> list[str]:
    """Sentences, each beside whether it holds here."""
    is_small = chosen and facts.gpus[0].free_gib < ROOMY_GIB
    is_new = facts.python[:2] > NEWEST_PYTHON
    has_none = not facts.gpus and not unseen
    torchao = facts.packages["torchao"]
    count = len(facts.gpus)

    # sentence -> whether it holds here
    said = {
        f"Python {dotted(facts.python)} was not tried, up to {dotted(NEWEST_PYTHON)} were": is_new,
        f"torchao {torchao} is harmless: the scripts hide it from PEFT": torchao,
        "there is an NVIDIA driver, but torch sees no GPU: is it a build for CPUs?": facts.driver and has_none,
        f"training needs a GPU: 8 GB for every script, 4 GB for some; --demo runs without{choose_gpu(facts)}": has_none,
        "no default run fits this GPU; --demo runs on it": facts.gpus and not chosen and not unseen,
        f"{facts.ram_gib:.1f} GiB of RAM is little: a trainer takes about 3": facts.ram_gib < LITTLE_RAM_GIB,
        f"{count} GPUs: times are those of one; two are about 1.9 times as fast": chosen and count > 1,
        "with this much memory more is recomputed: runs take up to half longer": is_small,
    }
    return [*(note for note, holds in said.items() if holds), *without_bitsandbytes(facts, chosen)]


def choose_gpu(facts: Facts) -> str:
    """Where a host's GPU is switched on."""
    places = {"Kaggle": "Settings > Accelerator > GPU T4 x2", "Colab": "Runtime > Change runtime type > T4 GPU"}
    return f"; {places[facts.host]}" if facts.host in places else ""


def without_bitsandbytes(facts: Facts, chosen: Script | None) -> Iterator[str]:
    """The scripts that cannot run without it, where they are not what stands in the way."""
    users = "train_qlora.py and train_dora.py"
    if chosen and chosen.needs_bitsandbytes:
        return
    if facts.lacking.keys() == {"bitsandbytes"}:
        yield f"{users} need bitsandbytes\n{pip_command(facts)}"
    result = facts.smoke.get("4-bit weights", "ok")
    if result != "ok":
        yield f"4-bit weights: {result}; {users} cannot run"


def dotted(version: tuple[int, ...]) -> str:
    """(3, 12, 3) -> 3.12.3"""
    return ".".join(map(str, version))
'''

# ============================================================================= how the texts above become modules


class _Texts(importlib.abc.MetaPathFinder, importlib.abc.InspectLoader):
    """Imports a module from its text; Python's own machinery does the rest."""

    def _path(self, name):
        path = name.replace(".", "/")
        return f"{path}/__init__.py" if self.is_package(name) else f"{path}.py"

    def is_package(self, name):
        return name.replace(".", "/") + "/__init__.py" in MODULES

    def get_source(self, name):
        return MODULES[self._path(name)].removeprefix("\n")

    def get_code(self, name):
        return self.source_to_code(self.get_source(name), os.path.join(_HERE, self._path(name)))

    def find_spec(self, name, path=None, target=None):
        if self._path(name) not in MODULES:
            return None
        spec = importlib.util.spec_from_loader(name, self, origin=os.path.join(_HERE, self._path(name)))
        spec.has_location = True
        return spec


_HERE = os.path.dirname(os.path.abspath(__file__))
sys.meta_path.insert(0, _Texts())


# =============================================================================================== verify_setup.py

import argparse
import json
import platform
import sys
import textwrap
import time

if sys.version_info < (3, 11):  # noqa: UP036  the imports below would end in a traceback
    sys.exit("verify_setup.py: Python " + platform.python_version() + " is too old: the packages need 3.11 or newer")
if sys.platform == "win32":
    sys.exit("verify_setup.py: Windows itself is not supported: run it in WSL 2, or on Kaggle or Colab")

from collections.abc import Iterator
from dataclasses import asdict
from typing import NoReturn

from common.system import packages
from common.system.machine import OPTIONAL, Facts, probe
from common.system.verdict import SCRIPTS, Estimate, Script, Verdict, dotted, judge

WIDTH = 80  # of a notebook's output
SHOWN = ("torch", "diffusers", "transformers", "peft", "bitsandbytes")
LABEL = 11  # columns of the first word of a row


class Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {message}; the flags are --json and --help\n")


def main(argv: list[str] | None = None) -> int:
    """Probe, judge, print; returns the exit status."""
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    parser.add_argument("--json", action="store_true", help="print one JSON object instead")
    flags = parser.parse_args(argv)

    started_s = time.monotonic()
    facts = probe()
    verdict = judge(facts)
    if flags.json:
        print(as_json(facts, verdict, time.monotonic() - started_s))
    else:
        print(screen(facts, verdict))
    return 1 if verdict.problems else 0


def as_json(facts: Facts, verdict: Verdict, seconds: float) -> str:
    """Facts and verdict as one JSON object."""
    estimates = {command: found._asdict() for command, found in verdict.estimates.items()}
    named = {"attached": facts.attached._asdict(), "estimates": estimates}
    return json.dumps({**asdict(facts), **verdict._asdict(), **named, "seconds": round(seconds, 1)}, indent=2)


# ---------------------------------------------------------------- the screen


def screen(facts: Facts, verdict: Verdict) -> str:
    """Everything for a person to read, 80 columns wide; only commands and paths are longer."""
    # what was found, and what each script needs
    lines = [line for label, text in rows(facts) for line in wrapped(label, text)]
    if facts.gpus and not facts.gpus[0].fault:
        lines += ["", *script_table(verdict)]

    # what to know, what to mend, what to type
    for label, sentences in (("note", verdict.notes), ("PROBLEM", verdict.problems)):
        lines += [""] if sentences else []
        lines += [line for sentence in sentences for line in wrapped(label, sentence)]
    before = "when that is mended" if verdict.problems else "ready"
    return "\n".join([*lines, "", f"{before}:", f"    {verdict.command}"])


def rows(facts: Facts) -> Iterator[tuple[str, str]]:
    """(label, text) of what was found."""
    # the machine
    python = f"Python {dotted(facts.python)}"
    yield "machine", f"{facts.host}, {python}, {facts.cores} CPU cores, {facts.ram_gib:.1f} GiB of RAM"
    for i, gpu in enumerate(facts.gpus):
        major, minor = gpu.capability
        yield f"GPU {i}", f"{gpu.name} (sm_{major}{minor}), {gpu.free_gib:.1f} of {gpu.total_gib:.1f} GiB free"
    if not facts.gpus:
        yield "GPU", "none"

    # what is installed, and how it fared
    yield "packages", package_row(facts)
    if facts.smoke:
        results = {test: "ok" if result == "ok" else "FAILED" for test, result in facts.smoke.items()}
        yield "tried", ", ".join(f"{test} {result}" for test, result in results.items())
    if facts.matmul_tflops:
        yield "speed", f"{facts.matmul_tflops:.0f} TFLOP/s of fp16 matrix products"

    # where files come from and go to
    yield "disk", "free: " + ", ".join(f"{disk.free_gb:.0f} GB ({name})" for name, disk in facts.disks.items())
    for state in dict.fromkeys(facts.hub.values()):
        repo_ids = [repo_id for repo_id in facts.hub if facts.hub[repo_id] == state]
        yield "hub", f"{state}: {', '.join(repo_ids)}"
    for kind, folders in facts.attached._asdict().items():
        for folder in folders:
            yield "attached", f"{kind}: {folder}"


def package_row(facts: Facts) -> str:
    """How many of them there are, and the versions of those that matter most."""
    count = len(packages.REQUIREMENTS)
    versions = [f"{name} {facts.packages[name]}" for name in (*SHOWN, *OPTIONAL) if facts.packages[name]]
    return ", ".join([f"{count - len(facts.lacking)} of {count} ok", *versions])


def script_table(verdict: Verdict) -> Iterator[str]:
    """What the default run of each script needs, whether that is free, and how long it takes."""
    yield f"{'default run of':<34}{'needs':>9}  takes about, on GPU 0"
    for script in SCRIPTS:
        found = verdict.estimates[script.command]
        yield f"{script.command:<34}{found.needs_gib:>5.1f} GiB  {time_line(script, found)}"


def time_line(script: Script, found: Estimate) -> str:
    """How long the default run takes, where it fits and the rate of the GPU is known."""
    if not found.fits:
        return "does not fit"
    if found.hours is None:
        return "fits"
    length = f"{found.hours:.1f} h" if found.hours >= 1.5 else f"{found.hours * 60:.0f} min"
    digits = 1 if found.s_per_img >= 1 else 2
    return f"{length} ({script.images:,} images of {found.s_per_img:.{digits}f} s)"


def wrapped(label: str, text: str) -> Iterator[str]:
    """A labelled sentence in lines of 80 columns; a command after a line break stays in one piece."""
    sentence, _, command = text.partition("\n")
    indent = " " * LABEL
    whole = dict(break_on_hyphens=False, break_long_words=False)
    yield from textwrap.wrap(f"{label:<{LABEL}}{sentence}", WIDTH, subsequent_indent=indent, **whole)
    if command:
        yield f"{indent}{command}"


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        print("verify_setup.py: interrupted", file=sys.stderr)
        sys.exit(130)
