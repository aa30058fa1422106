"""LoRA for a card of 8 GB or more: 768 px, rank 8, Min-SNR weighting, offset noise, EMA, text embeddings on disk.

python train_opt.py --resolution 768
python train_opt.py --demo
"""

import common  # noqa: F401  # isort: skip  (first: from here on Ctrl-C is one line)
from dataclasses import dataclass
from typing import Literal, Optional

from common.cli import hub
from common.cli.command_line import parse, print_config
from common.cli.flag_checks import check
from common.cli.flags import TrainFlags
from common.cli.running import run


@dataclass
class Flags(TrainFlags):
    """Fine-tune SDXL to a style with LoRA, fit for a card of 8 GB and faster on larger ones."""

    output_dir: str = "outputs/train_opt"
    resolution: int = 768
    text_cache: Literal["ram", "disk", "none"] = "disk"
    lora_rank: int = 8
    gradient_accumulation_steps: int = 8
    num_train_epochs: int = 15
    max_train_steps: Optional[int] = 3000
    lr_warmup_steps: int = 150
    min_snr_gamma: Optional[float] = 5.0
    offset_noise_strength: float = 0.1
    use_ema: bool = True


def main(argv=None):
    """Train; returns {"output_dir", "step", "ended", "weights", "metrics"}."""
    flags = parse(Flags, argv)
    check(flags)
    if flags.dry_run:
        return print_config(flags)
    hub.check(flags)

    from common.model import adapters, device, loading
    from common.train import assembly

    host = device.start(flags.mixed_precision, flags.seed)
    data = assembly.load_data(flags, host)  # image, caption -> Sample -> cached latents and text
    unet = loading.load_unet(data.model, host, flags.quantize)  # frozen
    adapters.add_lora(unet, flags.lora_target_modules, flags.lora_rank, flags.lora_alpha, flags.lora_dropout)
    engine = assembly.build_engine(flags, host, unet, data)  # flat buffer, optimizer, schedule, EMA
    return assembly.train(flags, engine, data)  # steps, validation, checkpoints, results


if __name__ == "__main__":
    run(main)
