"""QLoRA (arXiv 2305.14314): the frozen weights in 4 bits, for the least memory.

python train_qlora.py --strategy normal
"""

import common  # noqa: F401  # isort: skip  (first: from here on Ctrl-C is one line)
from dataclasses import dataclass
from typing import List, Literal, Optional

from common.cli import hub
from common.cli.command_line import parse, print_config
from common.cli.flag_checks import check
from common.cli.flag_facts import flag
from common.cli.flags import ATTENTION_PROJECTIONS, FEED_FORWARD, TrainFlags
from common.cli.running import run

STRATEGIES = {
    "aggressive": dict(lora_rank=32, lora_alpha=32, lora_target_modules=[*ATTENTION_PROJECTIONS, *FEED_FORWARD]),
    "normal": dict(lora_rank=16, lora_alpha=32, lora_target_modules=ATTENTION_PROJECTIONS),
}


@dataclass
class Flags(TrainFlags):
    """Fine-tune SDXL to a style with LoRA on a 4-bit (NF4) base, for the least memory."""

    strategy: Literal["aggressive", "normal"] = flag(
        "aggressive", "rank 32 on attention and feed-forward, or rank 16 on attention", group="adapter"
    )
    output_dir: str = "outputs/train_qlora"
    quantize: Literal["none", "nf4"] = "nf4"
    resolution: int = 512
    lora_rank: Optional[int] = flag(None, "rank r of the adapter; none means by strategy: 32 or 16")
    lora_alpha: Optional[int] = flag(None, "the adapter is scaled by alpha / rank; none means by strategy: 32")
    lora_target_modules: List[str] = flag([], "ends of names of adapted UNet layers; none means by strategy")
    lora_dropout: float = 0.1
    gradient_accumulation_steps: int = 4
    num_train_epochs: int = 3
    lr_warmup_steps: int = 10
    use_8bit_adam: bool = True

    def __post_init__(self):
        for name, value in STRATEGIES[self.strategy].items():
            if getattr(self, name) in (None, []):
                setattr(self, name, value)


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
    if flags.strategy == "aggressive":
        host.say("note: the published recipe also lists add_k_proj and add_v_proj; SDXL's UNet has no such layers")
    data = assembly.load_data(flags, host)  # image, caption -> Sample -> cached latents and text
    unet = loading.load_unet(data.model, host, flags.quantize)  # frozen
    adapters.add_lora(unet, flags.lora_target_modules, flags.lora_rank, flags.lora_alpha, flags.lora_dropout)
    engine = assembly.build_engine(flags, host, unet, data)  # flat buffer, optimizer, schedule, EMA
    return assembly.train(flags, engine, data)  # steps, validation, checkpoints, results


if __name__ == "__main__":
    run(main)
