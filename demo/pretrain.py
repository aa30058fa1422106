"""Trains the demo's models from nothing but the procedural world, in minutes on one GPU.

They are a small SDXL that renders the world's plain style, a small CLIP, and a judge of attributes and style.

    python demo/pretrain.py all --out outputs/pretrain               # all stages: 13 minutes, and the data
    python demo/pretrain.py unet --out outputs/pretrain --minutes 8  # one stage
    python demo/pretrain.py check --out outputs/pretrain
    python demo/pretrain.py pack --out outputs/pretrain --to demo/assets
    python demo/pretrain.py data --to demo/assets                    # the ink drawings: 100 to train on, 32 held out

Each stage (vae, text, clip, judge, unet) leaves one file, STAGE.safetensors: the average (EMA) of its weights in fp16.
It is written every minute, and an interrupted stage goes on from it. Optimizer moments are not kept: a resumed run
warms up again. `--minutes` counts all runs of a stage, so a stage that is over goes on when it is given more.

Like SDXL's, the VAE has seen every style, and colours and shapes that the world lacks. CLIP and judge have seen both
styles. Text encoders and UNet have seen the plain one alone: the ink style is left for the user's LoRA.
"""

import argparse
import os
import sys
import time
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")  # on two cores one thread is the faster
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch  # noqa: E402
import torch.nn as nn  # noqa: E402
import torch.nn.functional as F  # noqa: E402

from common.model import noise  # noqa: E402
from demo import examples, inspecting, small, world  # noqa: E402
from demo.examples import CHUNK, VARIANTS, caption_ids  # noqa: E402
from demo.learning import train_for  # noqa: E402
from demo.losses import Aside, contrast, label_loss, pixel_loss  # noqa: E402

# Minutes and batch on one H100; pictures: how many are rendered (of each style, where there are two).
STAGES = dict(
    vae=dict(minutes=2.0, batch=64, pictures=16384, lr=1e-3),
    text=dict(minutes=1.0, batch=1024, pictures=32768, lr=1e-3),
    clip=dict(minutes=1.0, batch=512, pictures=16384, lr=1e-3),
    judge=dict(minutes=0.7, batch=256, pictures=16384, lr=2e-3),
    unet=dict(minutes=8.0, batch=768, pictures=65536, lr=1e-3),
)
KL_WEIGHT = 1e-4
CAPTION_DROPOUT = 0.1
MIN_SNR = 5.0


def train_vae(flags) -> None:
    """Reconstruction plus a slight pull of the posterior to N(0, 1).

    Then the scaling factor is set: latents get a spread of 1.
    """
    seed = flags.seed * 100
    by_style = [examples.scenes(flags, style, flags.pictures, seed + i)[1] for i, style in enumerate(world.STYLES)]
    pictures = torch.cat(by_style)
    vae = small.pipeline(flags.size).vae
    compile_parts(flags, vae.encoder, vae.decoder)

    def loss():
        x = examples.distorted(
            small.to_floats(pictures[torch.randint(len(pictures), (flags.batch,), device=flags.device)])
        )
        posterior = vae.encode(x.to(flags.dtype)).latent_dist
        output = vae.decode(posterior.mean + posterior.std * torch.randn_like(posterior.mean)).sample
        mean = posterior.mean.float()
        logvar = posterior.logvar.float()
        divergence = 0.5 * (mean**2 + logvar.exp() - 1 - logvar).sum(1).mean()
        return pixel_loss(output.float(), x) + KL_WEIGHT * divergence

    parts = train_for(flags, nn.ModuleDict(dict(vae=vae)), loss)

    # The scaling factor
    some = pictures[torch.randperm(len(pictures), device=flags.device)[:2048]].split(CHUNK)
    with torch.no_grad(), torch.compiler.set_stance("force_eager"):
        latents = torch.cat([vae.encode(small.to_floats(x)).latent_dist.sample() for x in some])
    metadata = small.load_parts(flags.path, {}) | dict(scaling_factor=1 / latents.std().item())
    small.save_parts(flags.path, parts.state_dict(), **metadata)
    means = latents.mean((0, 2, 3)).tolist()
    print(f"vae: scaling factor {metadata['scaling_factor']:.4f}, mean of the channels {means}")


def train_text(flags) -> None:
    """Both text encoders against plain pictures (of half the size: it is quicker)."""
    attributes, pictures = examples.scenes(flags, "plain", flags.pictures, flags.seed * 100 + 10)
    pictures = small.to_bytes(torch.cat([F.avg_pool2d(small.to_floats(some), 2) for some in pictures.split(CHUNK)]))
    pipe = small.pipeline(flags.size)
    encoders = (pipe.text_encoder, pipe.text_encoder_2)
    ids = caption_ids(flags, (pipe.tokenizer, pipe.tokenizer_2), attributes, VARIANTS)
    aside = Aside(encoders)

    def loss():
        i = torch.randint(len(pictures), (flags.batch,), device=flags.device)
        tokens = ids[i, torch.randint(VARIANTS, i.shape, device=flags.device)]
        outputs = [encoder(rows, output_hidden_states=True) for encoder, rows in zip(encoders, tokens.unbind(1))]
        return aside(outputs, small.to_floats(pictures[i]).to(flags.dtype), attributes[i])

    modules = nn.ModuleDict(dict(text_encoder=encoders[0], text_encoder_2=encoders[1], aside=aside))
    train_for(flags, modules, loss, vocabulary=small.vocabulary_of(pipe.tokenizer))

    # What the heads read in held-out captions
    attributes = world.draw_attributes(512, small.HELD_OUT)
    ids = caption_ids(flags, (pipe.tokenizer, pipe.tokenizer_2), attributes, 1, full=True)[:, 0]
    with torch.no_grad():
        outputs = [encoder(rows, output_hidden_states=True) for encoder, rows in zip(encoders, ids.unbind(1))]
        for logits in aside.attribute_logits(outputs):
            read = torch.stack([part.argmax(1) for part in logits.split(small.COUNTS[:-1], dim=1)], dim=1)
            inspecting.print_shares("text: attributes read from full captions", read, attributes)


def train_clip(flags) -> None:
    """CLIP on both styles with complete captions, which never name the style: its score is blind to it."""
    from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD

    labels, pictures = examples.both_styles(flags, flags.pictures, flags.seed * 100 + 20)
    pipe = small.pipeline(flags.size)
    ids = caption_ids(flags, (pipe.tokenizer, pipe.tokenizer_2), labels[:, :-1], VARIANTS, full=True)[:, :, 0]
    clip = small.clip_model(flags.size, pipe.tokenizer)
    # a ViT learns faster when it is told what to look at
    head = nn.Linear(clip.config.projection_dim, sum(small.COUNTS[:-1]))
    mean, std = (torch.tensor(v, device=flags.device).view(3, 1, 1) for v in (OPENAI_CLIP_MEAN, OPENAI_CLIP_STD))

    def embed(i, variant, dtype, x):
        """(image, text) embeddings [B, 96] of unit length."""
        output = clip(input_ids=ids[i, variant], pixel_values=(((x + 1) / 2 - mean) / std).to(dtype))
        return output.image_embeds, output.text_embeds

    def loss():
        i = torch.randint(len(pictures), (flags.batch,), device=flags.device)
        variant = torch.randint(VARIANTS, i.shape, device=flags.device)
        image, text = embed(i, variant, flags.dtype, examples.roughened(small.to_floats(pictures[i])))
        told = sum(label_loss(head(10 * e), labels[i, :-1]) for e in (image, text))
        return contrast(image, text, clip.logit_scale) + told

    modules = nn.ModuleDict(dict(clip=clip, aside=head))
    train_for(flags, modules, loss, vocabulary=small.vocabulary_of(pipe.tokenizer))

    # Which held-out caption each held-out picture finds
    labels, pictures = examples.both_styles(flags, min(128, flags.pictures), small.HELD_OUT)
    ids = caption_ids(flags, (pipe.tokenizer, pipe.tokenizer_2), labels[:, :-1], 1, full=True)[:, :, 0]
    with torch.no_grad():
        image, text = embed(slice(None), 0, torch.float32, small.to_floats(pictures))
    found = (image @ text.T).argmax(1) == torch.arange(len(image), device=image.device)
    print(f"clip: {found.float().mean():.1%} of {len(image)} held-out pictures find their caption")


def train_judge(flags) -> None:
    """The judge on both styles, on blurred, noisy and decoded pictures too."""
    labels, pictures = examples.both_styles(flags, flags.pictures, flags.seed * 100 + 30)
    judge = small.Judge()

    def loss():
        i = torch.randint(len(pictures), (flags.batch,), device=flags.device)
        return label_loss(judge(examples.roughened(small.to_floats(pictures[i])).to(flags.dtype)), labels[i])

    train_for(flags, nn.ModuleDict(dict(judge=judge)), loss)
    labels, pictures = examples.both_styles(flags, min(512, flags.pictures), small.HELD_OUT)
    inspecting.print_shares("judge: read from held-out pictures", judge.read(pictures), labels)


def train_unet(flags) -> None:
    """SDXL's objective on the plain style: predict the noise, weighted by Min-SNR; the unconditional input is zeros."""
    from diffusers import DDPMScheduler

    mean, std, prompt_embeds, pooled, time_ids = examples.encode_scenes(flags)
    pipe = small.pipeline(flags.size)
    unet = pipe.unet
    compile_parts(flags, unet)
    alphas_cumprod = DDPMScheduler.from_config(pipe.scheduler.config).alphas_cumprod
    schedule = noise.NoiseSchedule(alphas_cumprod.to(flags.device), "epsilon")

    def loss():
        # Scenes, and which of them lose their caption
        i = torch.randint(len(mean), (flags.batch,), device=flags.device)
        variant = torch.randint(VARIANTS, i.shape, device=flags.device)
        keep = (torch.rand(flags.batch, 1, device=flags.device) >= CAPTION_DROPOUT).to(flags.dtype)
        conditions = dict(text_embeds=pooled[i, variant] * keep, time_ids=time_ids[i])

        # The noise, and its prediction
        z = mean[i] + std[i] * torch.randn_like(mean[i])
        t = torch.randint(len(schedule.alphas_cumprod), i.shape, device=flags.device)
        x_t, target = schedule.noise(z, torch.randn_like(z), t)
        text = prompt_embeds[i, variant] * keep.unsqueeze(-1)
        prediction = unet(x_t.to(flags.dtype), t, text, added_cond_kwargs=conditions, return_dict=False)[0]
        return (schedule.min_snr_weight(t, MIN_SNR) * noise.mse_per_sample(prediction, target)).mean()

    train_for(flags, nn.ModuleDict(dict(unet=unet)), loss, graph=True)


def compile_parts(flags, *modules) -> None:
    if flags.compile:
        torch._dynamo.config.suppress_errors = True
        for module in modules:
            module.to(memory_format=torch.channels_last).compile(dynamic=False)


TRAINERS = dict(vae=train_vae, text=train_text, clip=train_clip, judge=train_judge, unet=train_unet)


def read_flags(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=[*STAGES, "all", "check", "pack", "data"])
    option = parser.add_argument

    # Where files lie
    out_help = "folder of the stages' files (default: outputs/pretrain)"
    to_help = "pack, data: where to (default: demo/assets)"
    option("--out", type=Path, default=Path("outputs/pretrain"), metavar="DIR", help=out_help)
    option("--to", type=Path, default=Path("demo/assets"), metavar="DIR", help=to_help)

    # How much is learnt
    minutes_help = "budget of the stage, all its runs together; with `all`, of all stages (default: 12.7)"
    pictures_help = "how many are rendered, of each style where both are used (default: by stage)"
    option("--minutes", type=float, help=minutes_help)
    option("--steps", type=int, help="budget in steps instead")
    option("--batch", type=int, help="default: by stage; check: 64 pictures")
    option("--pictures", type=int, help=pictures_help)
    option("--lr", type=float, help="peak learning rate (default: by stage)")
    option("--size", type=int, default=128, help="pixels a side, a multiple of 16 (default: 128)")
    option("--seed", type=int, default=0, help="default: 0")

    # How fast
    option("--compile", action="store_true", help="torch.compile for VAE and UNet: costs a minute, then saves time")
    option("--eager", action="store_true", help="no CUDA graph for the UNet")

    # What follows from the machine: where to compute, in which precision to train and to encode
    flags = parser.parse_args(argv)
    gpu = torch.cuda.is_available()
    flags.device = "cuda" if gpu else "cpu"
    flags.dtype = torch.bfloat16 if gpu else torch.float32
    flags.half = torch.float16 if gpu else torch.float32
    return flags


def for_stage(flags, stage: str) -> argparse.Namespace:
    """The flags of one stage: what was not given is the stage's own default."""
    own = dict(STAGES[stage], path=flags.out / f"{stage}.safetensors")
    given = {name: value for name, value in vars(flags).items() if value is not None}
    if flags.command == "all" and flags.minutes:
        given["minutes"] = flags.minutes * own["minutes"] / sum(options["minutes"] for options in STAGES.values())
    return argparse.Namespace(**vars(flags) | own | given)


def main(argv: list[str] | None = None) -> None:
    flags = read_flags(argv)
    torch.set_float32_matmul_precision("high")

    # What trains nothing
    if flags.command == "pack":
        return small.pack(flags.out, flags.to, flags.size)
    if flags.command == "data":
        small.write_pictures(flags.to / "data", count=100, seed=777, size=flags.size)
        return small.write_pictures(flags.to / "held_out", count=32, seed=999, size=flags.size, full=True)
    if flags.command == "check":
        flags.batch = flags.batch or 64
        return inspecting.check(flags)

    # The stages
    for stage in STAGES if flags.command == "all" else [flags.command]:
        start = time.monotonic()
        TRAINERS[stage](for_stage(flags, stage))
        print(f"{stage}: {time.monotonic() - start:.0f} s with the data", flush=True)


if __name__ == "__main__":
    main()
