"""Which model, at which precision, and where the cache is: the flags that every script has."""

from dataclasses import dataclass
from typing import Literal, Optional

from common.cli.flag_facts import Described, flag, local_path
from common.system.places import CACHE_DIR


@dataclass
class ModelFlags(Described):
    """Which model to load, and how: the same for every script."""

    pretrained_model_name_or_path: str = flag(
        "stabilityai/stable-diffusion-xl-base-1.0",
        "SDXL: hub id, local folder or single .safetensors file",
        type=local_path,
        group="model",
        changes_a_pass=True,
    )
    pretrained_vae_model_name_or_path: Optional[str] = flag(
        None,
        "VAE: hub id or folder; none means the model's own, or for a hub model with SDXL's original one"
        " madebyollin/sdxl-vae-fp16-fix",
        type=local_path,
        group="model",
    )
    config_name_or_path: str = flag(
        "stabilityai/stable-diffusion-xl-base-1.0",
        "where configs and tokenizers of a single-file model come from: hub id or folder",
        type=local_path,
        group="model",
    )
    variant: Optional[str] = flag(
        "fp16", "weight files to prefer; plain ones are used where a local folder has no such variant", group="model"
    )
    revision: Optional[str] = flag(None, "branch, tag or commit of the hub model", group="model")
    prediction_type: Optional[str] = flag(
        None,
        "what the model predicts, for files that do not say it; none means by its files",
        choices=["epsilon", "v_prediction"],
        group="model",
    )
    zero_terminal_snr: Optional[bool] = flag(
        None,
        "the last timestep is pure noise (arXiv 2305.08891), for files that do not say it; none means by its files",
        group="model",
    )
    mixed_precision: Literal["no", "fp16", "bf16"] = flag(
        "fp16", "precision of the model on a GPU; a CPU computes in fp32", group="memory and speed", changes_a_pass=True
    )
    cache_dir: str = flag(
        CACHE_DIR,
        "where encoded images and captions, and unpacked single-file models, are kept between runs",
        type=local_path,
        group="output",
        resume="free",
    )
    dry_run: bool = flag(False, "print the resolved configuration as JSON and stop", group="trying it out")
    demo: bool = flag(
        False,
        "a small SDXL and a small data set that come with the suite: no network, minutes on a CPU",
        group="trying it out",
    )
