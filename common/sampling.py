"""Adapters -> images. One generator per image, so an image is the same alone or in a batch, on any device."""

import gc

import torch
from tqdm import tqdm

from common import device, loading

STEPS, GUIDANCE = 30, 7.5


def generator(seed):
    """The CPU generator of one image."""
    return torch.Generator("cpu").manual_seed(seed)


def condition(text, caption, host):
    """(prompt_embeds [1, 77, 2048], pooled [1, 1280]) of a caption that `text` (see caching) knows."""
    return text({name: value[None].to(host.device) for name, value in text.fields(caption).items()})


@torch.no_grad()
def draw_while_training(unet, text, model, host, prompts, resolution, seed):
    """One image per prompt with the UNet as it stands; the VAE is loaded for the decoding only, and gone afterwards.

    Returns:
        list of PIL images, `resolution` px square; prompt i is drawn with seed + i.
    """
    from diffusers import EulerDiscreteScheduler, StableDiffusionXLPipeline

    scheduler = EulerDiscreteScheduler.from_pretrained(model.folder, subfolder="scheduler")
    vae = loading.load_vae(model, host).to(host.dtype)  # the pipeline itself upcasts a VAE that needs it
    no_text = dict(text_encoder=None, text_encoder_2=None, tokenizer=None, tokenizer_2=None)
    zeros = loading.zero_unconditional(model)
    pipeline = StableDiffusionXLPipeline(vae, unet=unet, scheduler=scheduler, **no_text, force_zeros_for_empty_prompt=zeros, add_watermarker=False)
    pipeline.set_progress_bar_config(disable=True)
    unconditional = (None, None) if zeros else condition(text, "", host)
    unet.eval()
    images = []
    for i, prompt in enumerate(tqdm(prompts, desc="validation images", leave=False)):
        prompt_embeds, pooled = condition(text, prompt, host)
        images += pipeline(
            prompt_embeds=prompt_embeds,
            pooled_prompt_embeds=pooled,
            negative_prompt_embeds=unconditional[0],
            negative_pooled_prompt_embeds=unconditional[1],
            height=resolution,
            width=resolution,
            num_inference_steps=STEPS,
            guidance_scale=GUIDANCE,
            generator=generator(seed + i),
        ).images
    unet.train()
    del pipeline, vae
    gc.collect()
    device.free_memory(host.device)
    return images
