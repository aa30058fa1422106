"""Validation prompts -> images, by the UNet that is being trained and the text conditioning that training has."""

import functools

import torch
from tqdm import tqdm

from common.model import device, loading, memory
from common.model.adapters import without_dropout
from common.model.schedulers import default_guidance_rescale, make_scheduler
from common.render.sampling import GUIDANCE, STEPS, generator


@torch.no_grad()
def render_while_training(unet, text, model, host, *, prompts, resolution, seed):
    """One image per prompt with the UNet as it stands; the VAE is loaded for the decoding only, and gone afterwards.

    Returns:
        list of PIL images, `resolution` px square; prompt i has seed + i.
    Raises:
        torch.OutOfMemoryError: the denoising does not fit; the decoding steps down to tiles and to the CPU.
    """
    from diffusers import StableDiffusionXLPipeline

    # The pipeline without its VAE, which would take memory while the UNet needs it
    scheduler = make_scheduler("euler", model.scheduler)
    absent = dict(vae=None, text_encoder=None, text_encoder_2=None, tokenizer=None, tokenizer_2=None)
    zeros = loading.zero_unconditional(model)
    pipeline = StableDiffusionXLPipeline(
        unet=unet, scheduler=scheduler, **absent, force_zeros_for_empty_prompt=zeros, add_watermarker=False
    )
    pipeline.set_progress_bar_config(disable=True)

    # One prompt at a time, each to its latent
    unconditional = (None, None) if zeros else condition(text, "", host)
    latents = []
    with without_dropout([unet, *text.encoders]):
        for i, prompt in enumerate(tqdm(prompts, desc="validation images", leave=False)):
            prompt_embeds, pooled = condition(text, prompt, host)
            latents += pipeline(
                prompt_embeds=prompt_embeds,
                pooled_prompt_embeds=pooled,
                negative_prompt_embeds=unconditional[0],
                negative_pooled_prompt_embeds=unconditional[1],
                height=resolution,
                width=resolution,
                # The settings that infer.py has by default
                num_inference_steps=STEPS,
                guidance_scale=GUIDANCE,
                guidance_rescale=default_guidance_rescale(model.kind),
                generator=generator(seed + i),
                output_type="latent",
            ).images

    # The VAE has the memory to itself
    del pipeline
    device.free_memory(host.device)
    return _decode(latents, model, host)


def _decode(latents, model, host):
    """[latent [C, h, w]] -> PIL images, by the VAE on the device; where memory runs out, in tiles, then on the CPU."""
    from diffusers.image_processor import VaeImageProcessor

    vae = loading.load_vae(model, host)
    whole = functools.partial(_to_pixels, vae=vae)

    def in_tiles(latent):
        vae.enable_tiling()
        return whole(latent)

    def on_cpu(latent):
        vae.disable_tiling()
        vae.to("cpu", torch.float32)
        return whole(latent)

    ways = {"whole": whole, "in tiles": in_tiles, "on the CPU, which is slow,": on_cpu}
    decode = memory.StepDown("while decoding", ways, host)
    return VaeImageProcessor().postprocess(torch.stack([decode(latent) for latent in latents]), output_type="pil")


def _to_pixels(latent, vae):
    """One latent [C, h, w] -> fp32 [3, H, W] in [-1, 1] on the CPU; some fine-tunes ship channel statistics."""
    config, latent = vae.config, latent[None].to(vae.device, vae.dtype)
    if config.latents_mean is None:
        latent = latent / config.scaling_factor
    else:
        mean, std = (
            torch.tensor(numbers).to(latent).view(1, -1, 1, 1) for numbers in (config.latents_mean, config.latents_std)
        )
        latent = latent * std / config.scaling_factor + mean
    return vae.decode(latent, return_dict=False)[0][0].float().cpu()


def condition(text, caption, host):
    """(prompt_embeds [1, 77, 2048], pooled [1, 1280]) of a caption that `text` (see caching) knows."""
    return text({name: value[None].to(host.device) for name, value in text.fields(caption).items()})
