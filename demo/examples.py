"""What the demo's models learn from: pictures, token ids and time ids of scenes, and changes to pictures."""

import random
import string

import torch
import torch.nn.functional as F

from common.data import encoding
from demo import painting, small, world

VARIANTS = 2  # captions of a picture: different words left out, in another order
CHUNK = 256  # pictures that are rendered or encoded at once


def scenes(flags, style: str, count: int, seed: int):
    """(attributes int64 [N, A], pictures uint8 [N, 3, S, S]) on the device; a seed gives equal scenes in all styles."""
    attributes = world.draw_attributes(count, seed)
    return attributes.to(flags.device), painting.render(attributes, seed, style, flags.size, flags.device)


@torch.no_grad()
def reconstruct(vae, pictures):
    """uint8 -> uint8 through the latents."""
    return small.to_bytes(vae.decode(vae.encode(small.to_floats(pictures).to(vae.dtype)).latent_dist.mode()).sample)


def both_styles(flags, count: int, seed: int):
    """(labels [2N, A + 1], pictures [2N, 3, S, S]): N scenes of each style.

    Every other picture has been through the VAE: what the pipeline renders comes out of its decoder, and models that
    read pictures have to know its traces.
    """
    labels = []
    pictures = []
    for i, style in enumerate(world.STYLES):
        attributes, rendered = scenes(flags, style, count, seed + i)
        labels.append(F.pad(attributes, (0, 1), value=i))
        pictures.append(rendered)
    vae = small.load_pipeline(flags.out, flags.size, ["vae"]).vae.to(flags.device, flags.half)
    pictures = torch.cat(pictures)
    pictures[::2] = torch.cat([reconstruct(vae, some) for some in pictures[::2].split(CHUNK)])
    return torch.cat(labels), pictures


def token_ids(tokenizers, captions: list[str]):
    """`encoding.tokenize` in half the time: ids [N, 2, 77], where the tokenizers differ in the padding alone."""
    first = encoding.tokenize(tokenizers[:1], captions)
    padding = (first == tokenizers[0].eos_token_id).cumsum(-1) > 1
    return torch.cat([first, first.masked_fill(padding, tokenizers[1].pad_token_id)], dim=1)


def with_strange_styles(captions: list[str], seed: int) -> list[str]:
    """An eighth of the captions asks for a style of some random letters, in vain.

    So the model learns that names which nobody trained on are to change little.
    """
    rng = random.Random(seed)
    names = [
        "".join(rng.choices(string.ascii_lowercase, k=rng.randint(3, 7))) if rng.random() < 1 / 8 else ""
        for _ in captions
    ]
    return [f"{text} in {name} style" if name else text for text, name in zip(captions, names)]


def caption_ids(flags, tokenizers, attributes, variants: int, full=False):
    """Token ids of `variants` captions of each scene: [N, variants, 2, 77]; full ones stay as they are."""
    captions = [world.captions(attributes.cpu(), flags.seed + i, full) for i in range(variants)]
    if not full:
        captions = [with_strange_styles(some, flags.seed + i) for i, some in enumerate(captions)]
    return torch.stack([token_ids(tokenizers, some) for some in captions], dim=1).to(flags.device)


def framed(flags, attributes, seed: int):
    """Plain pictures uint8 [N, 3, S, S] and their time ids [N, 6] (SDXL's micro-conditioning).

    An eighth shows a window of a larger picture and an eighth is a small picture enlarged, with sizes and corners to
    match; each chunk is of one kind.
    So the model knows cut and blurred pictures, and at (S, S, 0, 0, S, S) renders neither.
    """
    size = flags.size
    pictures = []
    time_ids = []
    for k, some in enumerate(attributes.split(CHUNK)):
        # The kind of the chunk, the size it is rendered at and the corner of the window
        kind = k % 8
        rng = random.Random(f"{seed} {k}")
        original = {6: int(size * rng.uniform(1.1, 1.4)), 7: int(size * rng.uniform(0.35, 0.85))}.get(kind, size)
        top, left = (rng.randrange(original - size + 1) if kind == 6 else 0 for _ in "yx")

        # Its pictures at the training size
        some_pictures = painting.render(some, seed + k, "plain", original, flags.device)
        if kind == 7:
            enlarged = F.interpolate(small.to_floats(some_pictures), (size, size), mode="bicubic")
            some_pictures = small.to_bytes(enlarged)
        pictures.append(some_pictures[:, :, top : top + size, left : left + size])
        time_ids += [(original, original, top, left, size, size)] * len(some)
    return torch.cat(pictures), torch.tensor(time_ids, dtype=torch.float32, device=flags.device)


def distorted(x: torch.Tensor) -> torch.Tensor:
    """Pictures [B, 3, S, S] in [-1, 1], each turned and scaled, recoloured or pasted into another: 0.3 of them each."""
    batch = len(x)
    side = x.shape[-1]

    def chosen(*shape):
        """[B, *shape]: ones for 0.3 of the pictures, zeros for the others."""
        hit = torch.rand(batch, *[1] * len(shape), device=x.device) < 0.3
        return hit * torch.ones(batch, *shape, device=x.device)

    # Turned and scaled
    eye = torch.eye(3, device=x.device)
    shift = eye[:2] + chosen(2, 3) * 0.25 * torch.randn(batch, 2, 3, device=x.device)
    grid = F.affine_grid(shift, x.shape, align_corners=False)
    x = F.grid_sample(x, grid, padding_mode="reflection", align_corners=False)

    # Recoloured
    colours = eye + chosen(3, 3) * 0.3 * torch.randn(batch, 3, 3, device=x.device)
    x = torch.einsum("bij,bjhw->bihw", colours, x).clamp(-1, 1)

    # Pasted into the next picture
    place = torch.rand(batch, 2, 1, device=x.device) * side - torch.arange(side, device=x.device)  # [B, (y, x), S]
    inside = (place.abs() < side / 4).float() * chosen(2, 1)
    return torch.lerp(x, x.roll(1, 0), inside[:, 0, None, :, None] * inside[:, 1, None, None, :])


def roughened(x: torch.Tensor) -> torch.Tensor:
    """Pictures [B, 3, S, S] in [-1, 1] with a little blur and noise, of another strength in each."""
    blur, grain = torch.rand(2, len(x), 1, 1, 1, device=x.device)
    x = torch.lerp(x, F.avg_pool2d(x, 3, stride=1, padding=1, count_include_pad=False), blur * 0.7)
    return x + 0.08 * grain**2 * torch.randn_like(x)


@torch.no_grad()
def encode_scenes(flags):
    """What the UNet trains on, computed once.

    Latent mean and std [N, 4, S/8, S/8]; text embeddings [N, V, 77, 224]; pooled text [N, V, 128]; time ids [N, 6].
    """
    # Pictures -> latents
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

    # Captions -> text embeddings
    ids = caption_ids(flags, (pipe.tokenizer, pipe.tokenizer_2), attributes, VARIANTS)
    encoders = [encoder.to(flags.device) for encoder in (pipe.text_encoder, pipe.text_encoder_2)]
    texts = [encoding.encode_text(encoders, some) for some in ids.flatten(0, 1).split(CHUNK)]
    prompt_embeds, pooled = (
        torch.cat([text[i].to(flags.dtype) for text in texts]).unflatten(0, ids.shape[:2]) for i in (0, 1)
    )
    return mean, std, prompt_embeds, pooled, time_ids
