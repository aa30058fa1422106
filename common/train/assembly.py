"""A training run put together from its flags, for all trainers: data, engine, loop.

What a trainer's own technique is (which layers get which adapter, on which weights) stays in the trainer.
"""

import functools
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from common import files, run_folder
from common.cli.command_line import DEMO_ROOT
from common.data import batching, caching, captions, dataset
from common.fast import adapter_layers, frozen_layers
from common.model import adapters, device, loading, noise
from common.model.device import Host
from common.model.schedules import lr_schedule
from common.model.tiny import demo_assets
from common.system import stopping
from common.train import loops, pass_plan, prediction, report, results, resuming
from common.train.engine import Engine, EngineSettings
from common.train.run_length import RunLength, run_length, uneven_shares


@dataclass(frozen=True)
class Data:
    """Everything the loop reads, encoded once."""

    model: loading.Model
    schedule: noise.NoiseSchedule
    text: caching.CachedText | caching.LiveText
    trained_encoders: tuple  # the text encoders, where they get adapters too
    examples: batching.Examples
    held_out: batching.Examples | None
    length: RunLength


# ---------------------------------------------------------------- data


def load_data(flags, host: Host) -> Data:
    """Image-caption pairs and a model -> Samples, their latent moments and text embeddings, training and held out."""
    if host.device.type == "cuda":
        device.limit_memory(host.device, flags.max_vram_gb)
    if flags.demo:
        host.main_first(lambda: demo_assets(DEMO_ROOT))

    # Pictures with captions, and the model that will see them
    samples, bad = dataset.load_samples(
        flags.dataset_name,
        flags.train_data_dir,
        image_column=flags.image_column,
        caption_column=flags.caption_column,
        max_samples=flags.max_train_samples,
        max_bad=flags.max_bad_images,
        say=host.say,
    )
    host.say(captions.summary(samples, bad, captions.options_of(flags)))
    model = host.main_first(lambda: loading.model_of(flags, host.say))

    # What is frozen is computed once
    latents = _cache_latents(flags, samples, model, host, bad)
    training, held_out = dataset.hold_out(latents.samples, flags.validation_split)
    text = _cache_text(flags, latents.samples, held_out, model, host)

    # Training examples by number
    schedule = loading.load_noise_schedule(model, host.device)
    make_examples = _examples_maker(flags, model, schedule, text)
    examples = make_examples(latents.subset(training))
    return Data(
        model=model,
        schedule=schedule,
        text=text,
        trained_encoders=tuple(text.encoders) if flags.train_text_encoder else (),
        examples=examples,
        held_out=make_examples(latents.subset(held_out)) if held_out else None,
        length=run_length(flags, host, len(examples)),
    )


def _cache_latents(flags, samples, model, host, bad):
    return caching.cache_latents(
        samples,
        model,
        host=host,
        cache_dir=flags.cache_dir,
        max_bad=flags.max_bad_images,
        flips=(False, True) if flags.random_flip else (False,),
        bad_before=bad,
        resolution=flags.resolution,
        center_crop=flags.center_crop,
        aspect_ratio_buckets=flags.aspect_ratio_buckets,
    )


def _cache_text(flags, samples, held_out, model, host):
    wanted = [*captions.texts(samples, held_out, captions.options_of(flags)), "", *flags.validation_prompt]
    mode = "none" if flags.train_text_encoder else flags.text_cache
    return caching.cache_text(wanted, model, host=host, mode=mode, cache_dir=flags.cache_dir)


def _examples_maker(flags, model, schedule, text) -> Callable[[caching.LatentCache], batching.Examples]:
    """Everything about Examples but the samples they are of."""
    return functools.partial(
        batching.Examples,
        text=text,
        seed=flags.seed,
        num_timesteps=len(schedule.alphas_cumprod),
        captions=captions.options_of(flags),
        flip_share=0.5 if flags.random_flip else 0.0,
        drop_share=flags.caption_dropout,
        offset_strength=flags.offset_noise_strength,
        zero_unconditional=loading.zero_unconditional(model),
    )


# ---------------------------------------------------------------- engine


def build_engine(flags, host: Host, unet: torch.nn.Module, data: Data) -> Engine:
    """The UNet with its adapter -> Engine: flat buffer, forward pass, optimizer, learning-rate schedule, EMA."""
    is_fused = flags.lora_backend == "fused"
    if flags.enable_xformers_memory_efficient_attention:
        unet.enable_xformers_memory_efficient_attention()
    recompute = None
    if flags.gradient_checkpointing:
        # The fused layers' dropout is a function of a seed: no generator to rewind before the second forward pass
        recompute = pass_plan.BlockRecompute(preserve_rng_state=not is_fused)
        unet.enable_gradient_checkpointing(recompute)

    # What is trained, as one flat buffer
    encoders = data.trained_encoders
    groups = [(adapters.trainable(unet), {})]
    if encoders:
        adapters.add_text_lora(encoders, rank=flags.lora_rank, alpha=flags.lora_alpha, dropout=flags.lora_dropout)
        pairs = [pair for encoder in encoders for pair in adapters.trainable(encoder)]
        groups.append((pairs, {"lr": flags.text_encoder_lr}))
    flat = adapters.FlatParameters(groups, host.dtype if is_fused else torch.float32)

    # The same numbers, sooner
    dropout_seed = torch.zeros((), dtype=torch.int64, device=host.device)
    if is_fused:
        adapter_layers.fuse([unet, *encoders], flat, dropout_seed, host.say)
        frozen_layers.fuse_unet(unet, host.device, host.say)
    _say_what_is_trained(flags, host, flat, [unet, *encoders])

    # What moves it
    optimizer = _make_optimizer(flags, flat)
    return Engine(
        unet=unet,
        text=data.text,
        schedule=data.schedule,
        flat=flat,
        optimizer=optimizer,
        lr_factor=_lr_factor(flags, data.length.total_steps),
        host=host,
        dropout_seed=dropout_seed,
        ema=adapters.EMA(flat, flags.ema_decay) if flags.use_ema else None,
        recompute=recompute,
        settings=EngineSettings(flags.max_grad_norm, flags.min_snr_gamma, flags.seed, flags.cuda_graph),
    )


def _say_what_is_trained(flags, host, flat, modules):
    everything = sum(adapters.count(module) for module in modules)
    share = f"{len(flat):,} trainable parameters, {100 * len(flat) / everything:.2f} % of {everything:,}"
    scale = f"; scaled by alpha / rank = {flags.lora_alpha} / {flags.lora_rank}"
    host.say(f"adapter: {share}{scale if flags.lora_alpha != flags.lora_rank else ''}")


def _make_optimizer(flags, flat):
    return adapters.make_optimizer(
        flat,
        use_8bit=flags.use_8bit_adam,
        lr=flags.learning_rate,
        betas=(flags.adam_beta1, flags.adam_beta2),
        weight_decay=flags.adam_weight_decay,
        eps=flags.adam_epsilon,
    )


def _lr_factor(flags, total_steps):
    return lr_schedule(
        flags.lr_scheduler,
        warmup_steps=flags.lr_warmup_steps,
        total_steps=total_steps,
        peak_lr=flags.learning_rate,
        num_cycles=flags.lr_num_cycles,
        power=flags.lr_power,
    )


# ---------------------------------------------------------------- training


def train(flags, engine: Engine, data: Data) -> dict:
    """Run the loop, from a checkpoint if asked to, and write the results.

    Returns:
        {"output_dir", "step", "ended", "weights", "metrics": the last line of metrics.jsonl}.
    Raises:
        UserError: another run is writing to the output folder; what `resume` and the loop refuse; a file that cannot
            be written.
    """
    with run_folder.owned(Path(flags.output_dir), engine.host):
        run = _prepare(flags, engine, data)
        try:
            with run.stopping.listening():
                ended = loops.train(run)
                run.stopping.doing = "writing the results"
                engine.run_pass.clear()
                run.results.write()
        except OSError as error:
            raise run.results.rescue(run.progress, error) from None
        return run.results.summary(run.progress, ended, data.length.total_steps)


def _prepare(flags, engine, data) -> loops.Run:
    """From which step, how much at a time, and where what is measured goes."""
    host, length, output_dir = engine.host, data.length, Path(flags.output_dir)
    prediction.check(engine, data)

    # Where it starts
    recipe = results.recipe_of(flags, data)
    progress = resuming.resume(flags, engine, recipe, length)
    if host.is_main:
        files.write_json(output_dir / "config.json", recipe)

    # How a step is cut
    plan = pass_plan.choose(flags, engine, data)
    if shares := uneven_shares(flags, host.world, length.effective_batch):
        host.say(shares)
    size = f"{length.effective_batch} images, {plan.micro_batch} at a time"
    host.say(f"training: {length.total_steps} steps of {size}, from step {progress.step}")

    # Where its numbers go
    log = report.Report(
        output_dir=output_dir,
        total_steps=length.total_steps,
        resumed_step=progress.step,
        report_to=flags.report_to,
        config=asdict(flags),
        is_main=host.is_main,
    )

    # What the loop works on
    return loops.Run(
        engine=engine,
        examples=data.examples,
        held_out=data.held_out,
        length=length,
        plan=plan,
        progress=progress,
        results=results.Results(flags, engine, data, recipe, saved_step=progress.step),
        report=log,
        stopping=stopping.StopRequest(length.ends_s),
    )


def export_dora_as_lora(flags, engine: Engine, data: Data) -> None:
    """Write the plain LoRA that is nearest to a DoRA, and say how near."""
    rank, host = flags.export_dora_as_lora, engine.host
    if host.is_main:
        host.say(f"--export_dora_as_lora {rank}: takes about a second a layer on a CPU, less on a GPU")
        made = results.Results(flags, engine, data, results.recipe_of(flags, data))
        share = made.save_kohya("_as_lora", dora_rank=rank)
        host.say(
            f"kohya/*_as_lora.safetensors: a LoRA of rank {rank} with {share:.1%} of the DoRA's change, by its norm"
        )
