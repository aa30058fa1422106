"""The samplers that --scheduler names. Nothing here imports torch, so that flags can list them."""

KARRAS, EXACT = dict(use_karras_sigmas=True), dict(use_karras_sigmas=False)
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


def make_scheduler(name, config):
    """The scheduler `name` of SCHEDULERS with the noise schedule of a model's scheduler configuration, see loading.Model."""
    import diffusers

    class_name, options = SCHEDULERS[name]
    return getattr(diffusers, class_name).from_config(config, **options)


def default_guidance_rescale(kind):
    """What guidance is rescaled by where the user says nothing: 0.7 for zero-terminal SNR (arXiv 2305.08891, sec. 3.4), else not at all."""
    return 0.7 if kind.zero_terminal_snr else 0.0
