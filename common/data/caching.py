"""Everything frozen is computed once: Samples -> latent moments and text embeddings, keyed by content.

A key is a hash of all that made the entry: a changed image or caption is a new entry, a stale one cannot be found.
"""

import collections
import concurrent.futures
import contextlib
import hashlib
import os
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from tqdm import tqdm

from common.cli.hub import FP16_VAE
from common.data import dataset, encoding, framing
from common.data.dataset import Sample
from common.data.pairs import fault, or_fault
from common.data.store import Store
from common.errors import UserError
from common.model import device, loading

# Raise them when the same inputs give other numbers: old entries are then never found.
LATENTS_VERSION = 2  # 2: colour profiles are converted to sRGB, thin pictures cropped before they are resized
TEXT_VERSION = 1
LATENT_CHANNELS, PIXELS_PER_LATENT = 4, 8
VAE_PIXELS = 1024 * 1024  # encoded at once: one picture of 1024 px, four of 512
TEXT_BATCH = 32


def content_key(*parts) -> str:
    """Hash of the repr of `parts`, as 32 hex digits."""
    return hashlib.blake2b(repr(parts).encode(), digest_size=16).hexdigest()


# ---------------------------------------------------------------- images


def cache_latents(
    samples: list[Sample],
    model: loading.Model,
    *,
    host: device.Host,
    cache_dir: Path | str,
    max_bad: int,
    flips: tuple[bool, ...] = (False,),
    bad_before: int = 0,
    **options,
) -> "LatentCache":
    """Encode the pictures that are not in the cache yet -> LatentCache over the samples that could be read.

    Args:
        flips: (False,) or (False, True): which mirror images are needed.
        bad_before: unreadable pictures that were counted already.
        options: arguments of `framing.frame`.
    Raises:
        UserError: more than `max_bad` pictures cannot be decoded, or the VAE gives non-finite latents.
    """
    # What is needed, and what of it is missing
    made_by = content_key("latents", LATENTS_VERSION, loading.fingerprint(model.variant, model.vae), str(host.dtype))
    store = Store(Path(cache_dir) / "latents" / made_by)
    framings = [framing.frame(sample, **options) for sample in samples]
    wanted = {_latent_key(s, f, flip): (s, f, flip) for s, f in zip(samples, framings) for flip in flips}
    store.drop_damaged(wanted)
    missing = [job for key, job in wanted.items() if key not in store]

    # Every process shares out the same list, before any of them adds to the store
    host.barrier()
    mine = missing[host.rank :: host.world]
    bad = dict(host.gather(_encode_images(mine, store, model, host) if missing else []))
    host.barrier()
    store.reload()

    # Without those that cannot be decoded
    dataset.refuse_bad(list(bad.values()), max_bad, bad_before, host.say)
    kept = [(s, f) for s, f in zip(samples, framings) if s.key not in bad]
    if any(_latent_key(s, f, flip) not in store for s, f in kept for flip in flips):
        raise UserError(
            f"--cache_dir {cache_dir}: entries were removed while they were being made; run the command again"
        )
    host.say(f"latents: {len(wanted)} in the cache, {len(missing)} of them new ({store.folder})")
    if not kept:
        raise UserError("none of the images could be decoded")
    return LatentCache([s for s, _ in kept], [f for _, f in kept], store)


@dataclass(frozen=True)
class LatentCache:
    """The samples of a run with their framing and their latent moments."""

    samples: list[Sample]
    framings: list[framing.Framing]
    store: Store

    def __len__(self) -> int:
        return len(self.samples)

    def shape(self, index: int) -> tuple[int, int, int]:
        """(C, h, w) of a sample's latent, flipped or not: SDXL's VAE halves the sides of a picture three times."""
        framed = self.framings[index]
        return LATENT_CHANNELS, framed.height // PIXELS_PER_LATENT, framed.width // PIXELS_PER_LATENT

    def moments(self, index: int, flip: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
        """(mean, std), each [C, h, w], normalised: z = mean + std * eps is what the UNet is trained on."""
        return self.store[_latent_key(self.samples[index], self.framings[index], flip)]

    def subset(self, samples: list[Sample]) -> "LatentCache":
        """The same cache, restricted to `samples`."""
        wanted = {id(sample) for sample in samples}
        kept = [i for i, sample in enumerate(self.samples) if id(sample) in wanted]
        return replace(self, samples=[self.samples[i] for i in kept], framings=[self.framings[i] for i in kept])


def _latent_key(sample, framing, flip):
    return content_key(sample.key, framing, flip)


def _encode_images(jobs, store, model, host):
    """Fill `store` with the moments of the jobs -> [(sample key, what is wrong)] of what cannot be decoded."""
    encoder = encoding.ImageEncoder(model, host)
    bad = []
    bar = tqdm(total=len(jobs), desc="encoding images", unit="img", disable=not host.is_main)
    with bar, contextlib.ExitStack() as at_exit:
        at_exit.callback(store.flush)  # an interrupted encode goes on from here

        # Batches of one shape, each encoded as soon as it is full
        batches = collections.defaultdict(list)
        for job, image in _decoded(jobs):
            bar.update()
            if isinstance(image, Exception):
                sample = job[0]
                bad.append((sample.key, f"{sample.name} ({fault(image)})"))
                continue
            batch = batches[image.shape]
            batch.append((job, image))
            if (len(batch) + 1) * image[0].numel() > VAE_PIXELS:
                _encode_batch(batches.pop(image.shape), store, encoder, host)

        # What is left over
        for batch in batches.values():
            _encode_batch(batch, store, encoder, host)
    del encoder
    device.free_memory(host.device)
    return bad


def _decoded(jobs):
    """Yield (job, pixels or the exception), decoding a few pictures ahead on every core."""
    workers = os.cpu_count() or 1

    def decode(job):
        return or_fault(lambda: framing.pixels(*job))

    with concurrent.futures.ThreadPoolExecutor(workers) as pool:
        ahead = collections.deque()
        for job in jobs:
            ahead.append((job, pool.submit(decode, job)))
            if len(ahead) > 2 * workers:
                done, future = ahead.popleft()
                yield done, future.result()
        while ahead:
            done, future = ahead.popleft()
            yield done, future.result()


def _encode_batch(batch, store, encoder, host):
    mean, std = encoder([image for _, image in batch])
    mean, std = mean.to(host.dtype), std.to(host.dtype)
    for (job, _), m, s in zip(batch, mean, std):
        if not (m.isfinite().all() and s.isfinite().all()):
            raise UserError(
                f"{job[0].name}: the VAE gives non-finite latents in {encoder.dtype_name};"
                f" use --pretrained_vae_model_name_or_path {FP16_VAE}"
            )
        store[_latent_key(*job)] = (m, s)


# ---------------------------------------------------------------- captions


class CachedText:
    """Captions whose embeddings were computed once. A batch carries the embeddings."""

    encoders = ()  # none stay on the device

    def __init__(self, store: Store) -> None:
        self.store = store

    def fields(self, caption: str) -> dict[str, torch.Tensor]:
        """What one example's batch row carries: prompt_embeds [77, 2048] and pooled [1280]."""
        prompt_embeds, pooled = self.store[content_key(caption)]
        return {"prompt_embeds": prompt_embeds, "pooled": pooled}

    def __call__(self, fields: dict[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        """(prompt_embeds [B, 77, 2048], pooled [B, 1280]) on the device."""
        return fields["prompt_embeds"], fields["pooled"]


class LiveText:
    """Captions that are encoded in every step, by encoders that stay on the device. A batch carries token ids."""

    def __init__(self, pairs: list[tuple]) -> None:
        self.tokenizers, self.encoders = zip(*pairs)

    def fields(self, caption: str) -> dict[str, torch.Tensor]:
        """What one example's batch row carries: input_ids [2, 77]."""
        return {"input_ids": encoding.tokenize(self.tokenizers, [caption])[0]}

    def __call__(self, fields: dict[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        """(prompt_embeds [B, 77, 2048], pooled [B, 1280]) on the device."""
        return encoding.encode_text(self.encoders, fields["input_ids"])


def cache_text(
    captions: list[str], model: loading.Model, *, host: device.Host, mode: str, cache_dir: Path | str
) -> CachedText | LiveText:
    """Text conditioning for `captions`: CachedText in RAM ("ram") or on disk ("disk"), or LiveText ("none")."""
    if mode == "none":
        return LiveText(loading.load_text_encoders(model, host))

    # What is needed, and what of it is missing
    parts = [model.folder / name for name in ("text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2")]
    made_by = content_key("text", TEXT_VERSION, loading.fingerprint(model.variant, *parts), str(host.dtype))
    store = Store(Path(cache_dir) / "text" / made_by if mode == "disk" else None)
    store.drop_damaged(content_key(caption) for caption in captions)
    distinct = list(dict.fromkeys(captions))
    missing = [caption for caption in distinct if content_key(caption) not in store]

    # On disk it is shared out, as the images are; each process has its own RAM
    host.barrier()
    mine = missing[host.rank :: host.world] if mode == "disk" else missing
    if missing:
        _encode_captions(mine, store, model, host)
    host.barrier()
    store.reload()
    where = store.folder or "kept in RAM"
    host.say(f"text: {len(distinct)} distinct captions, {len(missing)} of them encoded now ({where})")
    return CachedText(store)


def _encode_captions(captions, store, model, host):
    encoder = encoding.CaptionEncoder(model, host)
    if cut := sum(len(encoder.tokenizers[0](caption).input_ids) > encoding.MAX_TOKENS for caption in captions):
        host.say(f"text: {cut} captions are longer than {encoding.MAX_TOKENS} tokens; what follows is not seen")
    with contextlib.ExitStack() as at_exit:
        at_exit.callback(store.flush)
        for start in tqdm(range(0, len(captions), TEXT_BATCH), desc="encoding captions", disable=not host.is_main):
            batch = captions[start : start + TEXT_BATCH]
            prompt_embeds, pooled = encoder(batch)
            for caption, p, q in zip(batch, prompt_embeds.to(host.dtype), pooled.to(host.dtype)):
                store[content_key(caption)] = (p, q)
    del encoder
    device.free_memory(host.device)
