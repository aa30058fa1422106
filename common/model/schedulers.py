"""The name in --scheduler -> a sampler of diffusers. Nothing here imports torch, so that flags can list the names."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from diffusers import SchedulerMixin

    from common.model.model_kind import Kind

KARRAS = dict(use_karras_sigmas=True)
EXACT = dict(use_karras_sigmas=False)
# name -> (class of diffusers, what differs from the model's own scheduler configuration)
SCHEDULERS = {
    "euler": ("EulerDiscreteScheduler", {}),  # what SDXL ships with
    "euler_a": ("EulerAncestralDiscreteScheduler", {}),
    "ddim": ("DDIMScheduler", {}),
    "dpmpp_2m": ("DPMSolverMultistepScheduler", EXACT),
    "dpmpp_2m_karras": ("DPMSolverMultistepScheduler", KARRAS),
    "dpmpp_2m_sde_karras": ("DPMSolverMultistepScheduler", dict(algorithm_type="sde-dpmsolver++", **KARRAS)),
    "unipc": ("UniPCMultistepScheduler", {}),
    "lcm": ("LCMScheduler", {}),
}


def make_scheduler(name: str, config: dict) -> SchedulerMixin:
    """The scheduler `name` of SCHEDULERS with the noise schedule of `config`, which is loading.Model's `scheduler`."""
    import diffusers

    class_name, options = SCHEDULERS[name]
    return getattr(diffusers, class_name).from_config(config, **options)


def default_guidance_rescale(kind: Kind) -> float:
    """The rescale where no flag gives one: 0.7 for zero-terminal SNR (arXiv 2305.08891, sec. 3.4), else none (0)."""
    return 0.7 if kind.zero_terminal_snr else 0.0
