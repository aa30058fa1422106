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
