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


def make_scheduler(name, folder):
    """The scheduler `name` of SCHEDULERS with the noise schedule of the model in `folder`."""
    import diffusers

    class_name, options = SCHEDULERS[name]
    scheduler = getattr(diffusers, class_name)
    return scheduler.from_config(scheduler.load_config(folder, subfolder="scheduler"), **options)
