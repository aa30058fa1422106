"""Pictures -> latent moments, captions -> text conditioning; in leaner ways where GPU memory runs out."""

import functools
from collections.abc import Sequence

import torch

from common.model import loading
from common.model.device import Host
from common.model.memory import StepDown

MAX_TOKENS = 77


# ---------------------------------------------------------------- images


class ImageEncoder:
    """Pictures -> normalised latent moments, by the VAE on the device.

    Where memory runs out, pictures go through one at a time, then on the CPU.
    """

    def __init__(self, model: loading.Model, host: Host) -> None:
        ways = {"on the GPU": host, "it works on the CPU, slowly,": host.on_cpu()}
        load = {way: functools.partial(loading.load_vae, model, place) for way, place in ways.items()}
        self._vae = StepDown("while loading the VAE", load, host)()
        ways = {
            "together": self._moments,
            "one at a time": self._one_by_one,
            "one at a time on the CPU, which is slow,": self._one_by_one_on_cpu,
        }
        self._encode = StepDown("while encoding images", ways, host)

    @property
    def dtype_name(self) -> str:
        return str(self._vae.dtype).removeprefix("torch.")

    def __call__(self, images: list[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        """[fp32 [3, H, W]] of one shape -> (mean, std), each fp32 [B, C, h, w] on the CPU."""
        return self._encode(images)

    @torch.no_grad()
    def _moments(self, images):
        pixels = torch.stack(images).to(self._vae.device, self._vae.dtype)
        posterior = self._vae.encode(pixels).latent_dist
        mean, std = _normalise(self._vae.config, posterior.mean.float(), posterior.std.float())
        return mean.cpu(), std.cpu()

    def _one_by_one(self, images):
        means, stds = zip(*(self._moments([image]) for image in images))
        return torch.cat(means), torch.cat(stds)

    def _one_by_one_on_cpu(self, images):
        self._vae.to("cpu", torch.float32)
        return self._one_by_one(images)


def _normalise(config, mean, std):
    """Posterior of the VAE -> posterior of the latents the UNet sees (some fine-tunes ship channel statistics)."""
    if getattr(config, "latents_mean", None) is None:
        return mean * config.scaling_factor, std * config.scaling_factor
    centre = torch.tensor(config.latents_mean, device=mean.device).view(1, -1, 1, 1)
    scale = config.scaling_factor / torch.tensor(config.latents_std, device=mean.device).view(1, -1, 1, 1)
    return (mean - centre) * scale, std * scale


# ---------------------------------------------------------------- captions


def tokenize(tokenizers: Sequence, captions: list[str]) -> torch.Tensor:
    """Token ids of both tokenizers, padded and cut to 77: [B, 2, 77]."""
    options = dict(padding="max_length", max_length=MAX_TOKENS, truncation=True, return_tensors="pt")
    return torch.stack([tokenizer(captions, **options).input_ids for tokenizer in tokenizers], dim=1)


def encode_text(encoders: Sequence, input_ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """SDXL's text conditioning: ids [B, 2, 77] -> (prompt_embeds [B, 77, 768 + 1280], pooled [B, 1280]).

    The penultimate hidden states of both encoders side by side; `pooled` is bigG's projected end-of-text
    (arXiv 2307.01952, sec. 2.1).
    """
    outputs = [encoder(ids, output_hidden_states=True) for encoder, ids in zip(encoders, input_ids.unbind(1))]
    return torch.cat([output.hidden_states[-2] for output in outputs], dim=-1), outputs[1].text_embeds


class CaptionEncoder:
    """Captions -> text conditioning, by the encoders on the device.

    Where memory runs out, captions go through one at a time, then on the CPU.
    """

    def __init__(self, model: loading.Model, host: Host) -> None:
        ways = {"on the GPU": host, "they work on the CPU": host.on_cpu()}
        load = {way: functools.partial(loading.load_text_encoders, model, place) for way, place in ways.items()}
        self.tokenizers, self._encoders = zip(*StepDown("while loading the text encoders", load, host)())
        ways = {"together": self._together, "one at a time": self._one_by_one, "on the CPU": self._on_cpu}
        self._encode = StepDown("while encoding captions", ways, host)

    def __call__(self, captions: list[str]) -> tuple[torch.Tensor, torch.Tensor]:
        """Captions -> (prompt_embeds [B, 77, 2048], pooled [B, 1280]) on the CPU."""
        return self._encode(captions)

    @torch.no_grad()
    def _together(self, captions):
        input_ids = tokenize(self.tokenizers, captions).to(self._encoders[0].device)
        prompt_embeds, pooled = encode_text(self._encoders, input_ids)
        return prompt_embeds.cpu(), pooled.cpu()

    def _one_by_one(self, captions):
        embeds, pooled = zip(*(self._together([caption]) for caption in captions))
        return torch.cat(embeds), torch.cat(pooled)

    def _on_cpu(self, captions):
        for encoder in self._encoders:
            encoder.to("cpu", torch.float32)
        return self._together(captions)
