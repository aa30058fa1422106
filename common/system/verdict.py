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
