"""LoRA at SDXL's own resolution, for the best quality on a 14 GB card: 1024 px, rank 16, plain MSE.

python train_sdxl.py
python train_sdxl.py --demo
"""

import common  # noqa: F401  # isort: skip  (first: from here on Ctrl-C is one line)
from dataclasses import dataclass
from typing import Optional

from common.cli import hub
from common.cli.command_line import parse, print_config
from common.cli.flag_checks import check
from common.cli.flags import TrainFlags
from common.cli.running import run


@dataclass
class Flags(TrainFlags):
    """Fine-tune SDXL to a style with LoRA at 1024 px on a 14 GB card."""

    output_dir: str = "outputs/train_sdxl"
    resolution: int = 1024
    lora_rank: int = 16
    gradient_accumulation_steps: int = 4
    num_train_epochs: int = 10
    max_train_steps: Optional[int] = 2000
    lr_warmup_steps: int = 100


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
