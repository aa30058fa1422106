"""Adapters -> images. One generator per image, so an image is the same alone or in a batch, on any device."""

import dataclasses
import math

import torch

from common import errors
from common.adapter_files import into_pipeline
from common.errors import UserError
from common.fast import frozen_layers
from common.fast.graphs import Graphed
from common.model import device, loading
from common.model.schedulers import make_scheduler

STEPS, GUIDANCE = 30, 7.5
# GiB on the GPU, fp16: all of SDXL's weights, those of the UNet, and what one image of 1024 px needs beside them.
ALL_GIB, UNET_GIB, IMAGE_GIB = 6.5, 4.8, 4.0


def generator(seed):
    """The CPU generator of one image."""
    return torch.Generator("cpu").manual_seed(seed)


@dataclasses.dataclass(frozen=True)
class Settings:
    """What an image depends on beside prompt, seed and adapters.

    `image` (PIL, already `resolution` px square) makes it img2img.
    """

    resolution: int = 1024
    steps: int = STEPS
    guidance_scale: float = GUIDANCE
    guidance_rescale: float = 0.0
    negative_prompt: str | None = None
    image: object = None
    strength: float = 0.6

    @property
    def steps_run(self):
        """img2img starts part of the way."""
        return self.steps if self.image is None else int(self.steps * self.strength)


def choose_memory(memory, host, settings, batch_size):
    """The memory tier that `--memory` means here: gpu (everything), offload (the part at work), sequential (a layer).

    Returns:
        (tier, the reason for it, for people to read).
    Raises:
        UserError: a tier that moves weights to and from a GPU, without a GPU.
    """
    if host.device.type != "cuda":
        if memory in ("offload", "sequential"):
            raise UserError(f"--memory {memory}: needs a CUDA GPU; on a {host.device.type} use --memory auto")
        return host.device.type, "no GPU"
    if memory != "auto":
        return memory, f"--memory {memory}"

    # The fastest tier that fits what is free
    free_gib = torch.cuda.mem_get_info(host.device)[0] / device.GIB
    scale = torch.finfo(host.dtype).bits / 16
    image_gib = IMAGE_GIB * batch_size * (settings.resolution / 1024) ** 2
    for tier, weights_gib in (("gpu", ALL_GIB), ("offload", UNET_GIB)):
        need_gib = scale * (weights_gib + image_gib)
        if need_gib <= free_gib:
            return tier, f"{free_gib:.1f} GiB of GPU memory free, about {need_gib:.1f} needed"
    return (
        "sequential",
        f"{free_gib:.1f} GiB of GPU memory free, {need_gib:.1f} needed even for one part at a time; slow",
    )


class Sampler:
    """One loaded SDXL, the adapters beside it, and the memory tier that it runs in. Not thread-safe.

    Adapters are never fused: every call names the active ones, and the base is the same model with all of them off.
    Use: `Sampler(...)`, `load` for each adapter, `place`, then `render`.
    """

    def __init__(self, model, host, scheduler, memory, *, img2img=False, cuda_graph=True):
        import diffusers

        self.host = host
        self.memory = memory
        self.cuda_graph = cuda_graph
        self.adapters = []
        self._active = None
        self._graph = None
        self._most_images = math.inf

        # What is offloaded lives in RAM; what is not goes straight to the GPU, so RAM never holds the model twice.
        home = dataclasses.replace(host, device=torch.device("cpu")) if memory in ("offload", "sequential") else host
        (tokenizer, text_encoder), (tokenizer_2, text_encoder_2) = loading.load_text_encoders(model, home)

        # The pipeline of diffusers around these parts
        pipeline = diffusers.StableDiffusionXLImg2ImgPipeline if img2img else diffusers.StableDiffusionXLPipeline
        self.pipeline = pipeline(
            vae=loading.load_vae(model, home).to(host.dtype),  # the pipeline itself upcasts a VAE that needs it
            text_encoder=text_encoder,
            text_encoder_2=text_encoder_2,
            tokenizer=tokenizer,
            tokenizer_2=tokenizer_2,
            unet=loading.load_unet(model, home).eval(),
            scheduler=make_scheduler(scheduler, model.scheduler),
            force_zeros_for_empty_prompt=loading.zero_unconditional(model),
            add_watermarker=False,
        )
        self.pipeline.set_progress_bar_config(disable=True)
        self.pipeline.vae.enable_slicing()  # a batch is decoded image by image: same pixels, less memory

    def load(self, file):
        """Load an adapter file; returns the name to activate it by. Before `place`."""
        name = f"adapter{len(self.adapters):02d}"
        into_pipeline.load_adapter(self.pipeline, file, name, say=self.host.say)
        self.adapters.append(name)
        return name

    def place(self):
        """Put the memory tier into effect: a UNet that is whole on the GPU has fused layers, if it stays, a graph."""
        unet = self.pipeline.unet
        if self.memory in ("gpu", "offload"):
            frozen_layers.fuse_unet(unet, self.host.device, self.host.say)
        if self.memory == "gpu":
            self._replay(unet)
        elif self.memory == "offload":
            self.pipeline.enable_model_cpu_offload(device=self.host.device)
        elif self.memory == "sequential":
            frozen_layers.unfuse_unet(unet)
            self.pipeline.enable_sequential_cpu_offload(device=self.host.device)

    def _replay(self, unet):
        """Let the UNet's passes be captured and replayed, see graphs.Graphed."""
        launch = unet.forward

        def predict(fields):
            added = {name: fields[name] for name in ("text_embeds", "time_ids")}
            return launch(
                fields["sample"], fields["timestep"], fields["text"], added_cond_kwargs=added, return_dict=False
            )[0]

        graph = self._graph = Graphed(predict, self.host.device, enabled=self.cuda_graph, say=self.host.say)

        def forward(sample, timestep, encoder_hidden_states, added_cond_kwargs, **none_of_the_rest):
            predicted = graph(dict(sample=sample, timestep=timestep, text=encoder_hidden_states, **added_cond_kwargs))
            return (predicted.clone(),)  # schedulers keep some; the next replay writes over it

        unet.forward = forward

    def _stop_replaying(self):
        if self._graph:
            self._graph.clear()
            del self.pipeline.unet.forward
            self._graph = None

    def render(self, adapters, prompt, seeds, settings, on_step=lambda images: None):
        """Images of one prompt, one per seed; out of GPU memory, the same in a smaller way that is announced.

        Args:
            adapters: [(name, scale)] to be active together; none is the base model.
            on_step: called after every denoising step with the number of images in it.
        Raises:
            UserError: out of memory in the smallest plan.
        """
        if len(seeds) > self._most_images:
            parts = [seeds[i : i + self._most_images] for i in range(0, len(seeds), self._most_images)]
            return [image for part in parts for image in self.render(adapters, prompt, part, settings, on_step)]
        try:
            return self._render(adapters, prompt, seeds, settings, on_step)
        except RuntimeError as error:
            if not errors.ran_out(error):
                raise
        # outside of this block the failed call's tensors are free
        self.pipeline.vae.to(
            dtype=self.host.dtype
        )  # cut short while upcast, it would stay in fp32 and fail every later call
        self.pipeline.maybe_free_model_hooks()
        if self._graph:
            self._graph.clear()
        device.free_memory(self.host.device)
        if len(seeds) > 1:
            self.host.say(f"out of GPU memory with {len(seeds)} images at a time: trying half")
            self._most_images = len(seeds) // 2  # of later prompts too
            return self.render(adapters, prompt, seeds, settings, on_step)
        self._step_down(settings)
        return self.render(adapters, prompt, seeds, settings, on_step)

    def _render(self, adapters, prompt, seeds, settings, on_step):
        def after_step(pipeline, step, t, tensors):
            on_step(len(seeds))
            return tensors

        self._activate(adapters)
        size = dict(height=settings.resolution, width=settings.resolution)
        framing = size if settings.image is None else dict(image=settings.image, strength=settings.strength)
        return self.pipeline(
            prompt=[prompt] * len(seeds),
            # Not "": only for None the pipeline uses the zeros that SDXL was trained with.
            negative_prompt=[settings.negative_prompt] * len(seeds) if settings.negative_prompt else None,
            num_inference_steps=settings.steps,
            guidance_scale=settings.guidance_scale,
            guidance_rescale=settings.guidance_rescale,
            generator=[generator(seed) for seed in seeds],
            callback_on_step_end=after_step,
            **framing,
        ).images

    def _activate(self, adapters):
        if not self.adapters or adapters == self._active:
            return
        self._active = adapters
        if self._graph:
            self._graph.clear()  # adapters and their scales are part of it
        if not adapters:
            return self.pipeline.disable_lora()
        self.pipeline.enable_lora()
        self.pipeline.set_adapters([name for name, _ in adapters], [scale for _, scale in adapters])

    def _step_down(self, settings):
        """The next smaller plan: gpu, offload, VAE in tiles, sequential."""
        if self.memory == "gpu":
            self.memory, plan = "offload", "only the part at work stays on the GPU"
        elif not self.pipeline.vae.use_tiling:
            plan = "the VAE works in tiles"
            self.pipeline.vae.enable_tiling()
        elif self.memory == "offload":
            self.memory, plan = "sequential", "one layer at a time on the GPU, which is slow"
        else:
            raise UserError(
                f"--resolution {settings.resolution}: out of GPU memory in the smallest plan; lower it, or free the GPU"
            )
        self.host.say(f"out of GPU memory: {plan}")
        self._stop_replaying()
        self.pipeline.remove_all_hooks()
        self.place()
