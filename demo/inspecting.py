"""What the demo's models have learnt: reconstructions, pictures of held-out captions, what the judge reads."""

import time
from pathlib import Path

import torch
from PIL import Image

from demo import world
from demo.examples import reconstruct, scenes
from demo.small import HELD_OUT, LABELS, load_judge, load_pipeline, to_bytes


def print_shares(title: str, read: torch.Tensor, labels: torch.Tensor) -> None:
    """How much of each column of `labels` [N, some] was read right."""
    right = (read.cpu() == labels.cpu()).float().mean(0).tolist()
    print(f"{title}: " + ", ".join(f"{name} {share:.1%}" for name, share in zip(LABELS, right)), flush=True)


def save_sheet(path: Path, pictures: torch.Tensor, columns: int) -> None:
    """Pictures uint8 [N, 3, S, S], row by row."""
    rows = [torch.cat(list(row), dim=2) for row in pictures.cpu().split(columns) if len(row) == columns]
    Image.fromarray(torch.cat(rows, dim=1).permute(1, 2, 0).numpy()).save(path)
    print(path)


def check_vae(flags, vae) -> None:
    for style in world.STYLES:
        _, pictures = scenes(flags, style, 64, HELD_OUT)
        output = torch.cat([reconstruct(vae, some) for some in pictures.split(16)])
        error = (output.float() - pictures.float()) / 255
        print(f"vae: {style}: mean error {error.abs().mean():.4f}, PSNR {-10 * error.square().mean().log10():.1f} dB")
        save_sheet(flags.out / f"check_vae_{style}.png", torch.stack([pictures, output], 1).flatten(0, 1)[:32], 8)


def check(flags) -> None:
    """Reconstructions in both styles, and what the pipeline renders for held-out captions, read by the judge."""
    # The models of the stages
    pipe = load_pipeline(flags.out, flags.size).to(flags.device, flags.half)
    judge = load_judge(flags.out / "judge.safetensors").to(flags.device)
    pipe.set_progress_bar_config(disable=True)
    check_vae(flags, pipe.vae)

    # Pictures of held-out captions
    attributes = world.draw_attributes(flags.batch, HELD_OUT + 1)
    options = dict(
        num_inference_steps=20,
        guidance_scale=4.5,
        output_type="pt",
        generator=torch.Generator("cpu").manual_seed(flags.seed),
    )
    start = time.monotonic()
    rendered = to_bytes(pipe(world.captions(attributes, 0, full=True), **options).images * 2 - 1)
    print(f"unet: {len(rendered)} pictures in {time.monotonic() - start:.1f} s")

    # What the judge reads off them, and off the world's own
    read = judge.read(rendered)
    print_shares("unet: read from the pictures", read[:, :-1], attributes)
    print(f"unet: {(read[:, -1] == 1).float().mean():.1%} judged to be in the ink style")
    _, real = scenes(flags, "plain", len(rendered), HELD_OUT + 1)
    print_shares("judge: read from the world's pictures of the same attributes", judge.read(real)[:, :-1], attributes)
    save_sheet(flags.out / "check_unet.png", rendered, 8)
