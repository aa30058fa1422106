"""DoRA, weight-decomposed LoRA (arXiv 2402.09353): the adapter also learns the length of every row of the weights.

python train_dora.py --quantize nf4
"""

import common  # noqa: F401  # isort: skip  (first: from here on Ctrl-C is one line)
from dataclasses import dataclass
from typing import Optional

from common.cli import hub
from common.cli.command_line import parse, print_config
from common.cli.flag_checks import check
from common.cli.flag_facts import allowing, flag
from common.cli.flags import TrainFlags
from common.cli.running import run


@dataclass
class Flags(TrainFlags):
    """Fine-tune SDXL to a style with DoRA, on an fp16 or an NF4 base (QDoRA)."""

    output_dir: str = "outputs/train_dora"
    resolution: int = 512
    lora_alpha: int = 32
    lora_dropout: float = 0.1
    gradient_accumulation_steps: int = 4
    num_train_epochs: int = 3
    lr_warmup_steps: int = 10
    use_8bit_adam: bool = True
    export_dora_as_lora: Optional[int] = flag(
        None,
        "write kohya/NAME_as_lora.safetensors too: the nearest plain LoRA of this rank, for A1111 and sd-scripts",
        group="output",
        range=allowing(lambda rank: rank >= 1, "must be at least 1; 64 holds most of a rank-16 DoRA"),
        resume="free",
    )


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
    adapters.add_lora(
        unet, flags.lora_target_modules, flags.lora_rank, flags.lora_alpha, flags.lora_dropout, use_dora=True
    )
    engine = assembly.build_engine(flags, host, unet, data)  # flat buffer, optimizer, schedule, EMA
    result = assembly.train(flags, engine, data)  # steps, validation, checkpoints, results
    if flags.export_dora_as_lora:
        assembly.export_dora_as_lora(flags, engine, data)
    return result


if __name__ == "__main__":
    run(main)
