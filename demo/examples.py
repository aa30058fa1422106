"""What the demo's models learn from: scenes as pictures, token ids and time ids, and what is done to pictures in a batch."""

import random
import string

import torch
import torch.nn.functional as F

from common.data import encoding
from demo import painting, small, world

VARIANTS = 2  # captions of a picture: different words left out, in another order
CHUNK = 256  # pictures that are rendered or encoded at once


def both_styles(flags, count: int, seed: int):
    """(labels [2N, A + 1], pictures [2N, 3, S, S]): N scenes of each style; every other picture has been through the VAE.

    What the pipeline draws comes out of the VAE's decoder: who reads pictures has to know its traces.
    """
    labels, pictures = [], []
    for i, style in enumerate(world.STYLES):
        attributes, drawn = small.scenes(flags, style, count, seed + i)
        labels.append(F.pad(attributes, (0, 1), value=i))
        pictures.append(drawn)
    vae = small.load_pipeline(flags.out, flags.size, ["vae"]).vae.to(flags.device, flags.half)
    pictures = torch.cat(pictures)
    pictures[::2] = torch.cat([small.reconstruct(vae, some) for some in pictures[::2].split(CHUNK)])
    return torch.cat(labels), pictures


def token_ids(tokenizers, captions: list[str]):
    """`encoding.tokenize` in half the time: ids [N, 2, 77], of which the second tokenizer's differ in the padding alone."""
    first = encoding.tokenize(tokenizers[:1], captions)
    padding = (first == tokenizers[0].eos_token_id).cumsum(-1) > 1
    return torch.cat([first, first.masked_fill(padding, tokenizers[1].pad_token_id)], dim=1)


def with_strange_styles(captions: list[str], seed: int) -> list[str]:
    """An eighth of the captions asks for a style of some random letters, in vain: names that nobody trained on are to change little."""
    rng = random.Random(seed)
    names = [
        "".join(rng.choices(string.ascii_lowercase, k=rng.randint(3, 7))) if rng.random() < 1 / 8 else ""
        for _ in captions
    ]
    return [f"{text} in {name} style" if name else text for text, name in zip(captions, names)]


def caption_ids(flags, tokenizers, attributes, variants: int, full=False):
    """Token ids of `variants` captions of each scene: [N, variants, 2, 77]; full ones are left as they are."""
    captions = [world.captions(attributes.cpu(), flags.seed + i, full) for i in range(variants)]
    if not full:
        captions = [with_strange_styles(some, flags.seed + i) for i, some in enumerate(captions)]
    return torch.stack([token_ids(tokenizers, some) for some in captions], dim=1).to(flags.device)


def framed(flags, attributes, seed: int):
    """Plain pictures uint8 [N, 3, S, S] and their time ids [N, 6] (SDXL's micro-conditioning).

    An eighth shows a window of a larger picture and an eighth is a small picture enlarged, with sizes and corners to match; one draw
    a chunk. So the model knows cut and blurred pictures, and at (S, S, 0, 0, S, S) draws neither.
    """
    size, pictures, time_ids = flags.size, [], []
    for k, some in enumerate(attributes.split(CHUNK)):
        rng, kind = random.Random(f"{seed} {k}"), k % 8
        drawn = {6: int(size * rng.uniform(1.1, 1.4)), 7: int(size * rng.uniform(0.35, 0.85))}.get(kind, size)
        top, left = (rng.randrange(drawn - size + 1) if kind == 6 else 0 for _ in "yx")
        some_pictures = painting.render(some, seed + k, "plain", drawn, flags.device)
        if kind == 7:
            enlarged = F.interpolate(small.to_floats(some_pictures), (size, size), mode="bicubic")
            some_pictures = small.to_bytes(enlarged)
        pictures.append(some_pictures[:, :, top : top + size, left : left + size])
        time_ids += [(drawn, drawn, top, left, size, size)] * len(some)
    return torch.cat(pictures), torch.tensor(time_ids, dtype=torch.float32, device=flags.device)


def distorted(x):
    """Pictures [B, 3, S, S] in [-1, 1], each turned and scaled, recoloured or pasted into another with a chance of 0.3 for each."""
    batch, side = len(x), x.shape[-1]

    def chosen(*shape):
        return (torch.rand(batch, *[1] * len(shape), device=x.device) < 0.3) * torch.ones(
            batch, *shape, device=x.device
        )

    eye = torch.eye(3, device=x.device)
    shift = eye[:2] + chosen(2, 3) * 0.25 * torch.randn(batch, 2, 3, device=x.device)
    x = F.grid_sample(
        x, F.affine_grid(shift, x.shape, align_corners=False), padding_mode="reflection", align_corners=False
    )
    colours = eye + chosen(3, 3) * 0.3 * torch.randn(batch, 3, 3, device=x.device)
    x = torch.einsum("bij,bjhw->bihw", colours, x).clamp(-1, 1)
    place = torch.rand(batch, 2, 1, device=x.device) * side - torch.arange(side, device=x.device)  # [B, (y, x), S]
    inside = (place.abs() < side / 4).float() * chosen(2, 1)
    return torch.lerp(x, x.roll(1, 0), inside[:, 0, None, :, None] * inside[:, 1, None, None, :])


def roughened(x):
    """Pictures [B, 3, S, S] in [-1, 1] with a little blur and noise, of another strength in each."""
    blur, grain = torch.rand(2, len(x), 1, 1, 1, device=x.device)
    x = torch.lerp(x, F.avg_pool2d(x, 3, stride=1, padding=1, count_include_pad=False), blur * 0.7)
    return x + 0.08 * grain**2 * torch.randn_like(x)


@torch.no_grad()
def encode_scenes(flags):
    """What the UNet trains on, computed once: latent mean and std, each [N, 4, S/8, S/8], text embeddings [N, V, 77, 224], pooled text
    [N, V, 128] and time ids [N, 6]."""
    pipe = small.load_pipeline(flags.out, flags.size, ["vae", "text"])
    attributes = world.draw_attributes(flags.pictures, flags.seed * 100 + 40)
    pictures, time_ids = framed(flags, attributes, flags.seed * 100000)
    vae = pipe.vae.to(flags.device, flags.half)
    posteriors = [vae.encode(small.to_floats(some).to(vae.dtype)).latent_dist for some in pictures.split(CHUNK)]
    mean, std = (
        torch.cat([getattr(p, name) for p in posteriors]).float() * vae.config.scaling_factor
        for name in ("mean", "std")
    )
    if not mean.isfinite().all():
        raise SystemExit("the VAE gives non-finite latents in half precision: train it again")
    ids = caption_ids(flags, (pipe.tokenizer, pipe.tokenizer_2), attributes, VARIANTS)
    encoders = [encoder.to(flags.device) for encoder in (pipe.text_encoder, pipe.text_encoder_2)]
    texts = [encoding.encode_text(encoders, some) for some in ids.flatten(0, 1).split(CHUNK)]
    prompt_embeds, pooled = (
        torch.cat([text[i].to(flags.dtype) for text in texts]).unflatten(0, ids.shape[:2]) for i in (0, 1)
    )
    return mean, std, prompt_embeds, pooled, time_ids
