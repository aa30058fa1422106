"""A training run put together from its flags, for all trainers: data, engine, loop, results.

What a trainer's own technique is (which layers get which adapter, on which weights) stays in the trainer.
"""

import contextlib
import functools
import math
import tempfile
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path

import torch

from common import (
    adapters,
    batching,
    caching,
    captions,
    checkpoint,
    dataset,
    device,
    dora,
    files,
    fit,
    formats,
    fused,
    fused_unet,
    kernel_check,
    loading,
    loops,
    memory,
    prediction,
    report,
    resuming,
    run_folder,
    sampling,
    stopping,
    weights,
)
from common.command_line import DEMO_ROOT, UserError
from common.engine import Engine, lr_schedule
from common.flag_facts import names_where
from demo.build import demo_assets


@dataclass(frozen=True)
class Data:
    """Everything the loop reads, encoded once."""

    model: loading.Model
    schedule: object  # noise.NoiseSchedule
    text: object  # caching.CachedText or caching.LiveText
    examples: batching.Examples
    held_out: batching.Examples | None


def load_data(flags, host):
    """Image-caption pairs and a model -> Data: Samples, their latent moments and text embeddings, training and held out."""
    if host.device.type == "cuda":
        device.limit_memory(host.device, flags.max_vram_gb)
    if flags.demo:
        host.main_first(lambda: demo_assets(DEMO_ROOT))
    samples, bad = dataset.load_samples(
        flags.dataset_name,
        flags.train_data_dir,
        image_column=flags.image_column,
        caption_column=flags.caption_column,
        max_samples=flags.max_train_samples,
        max_bad=flags.max_bad_images,
        say=host.say,
    )
    options = captions.options_of(flags)
    host.say(captions.summary(samples, bad, options))
    model = host.main_first(lambda: loading.model_of(flags, host.say))
    framing = dict(
        resolution=flags.resolution, center_crop=flags.center_crop, aspect_ratio_buckets=flags.aspect_ratio_buckets
    )
    flips = (False, True) if flags.random_flip else (False,)
    latents = caching.cache_latents(samples, model, host, flags.cache_dir, flags.max_bad_images, flips, bad, **framing)
    training, held_out = dataset.hold_out(latents.samples, flags.validation_split)
    texts = [*captions.texts(latents.samples, held_out, options), "", *flags.validation_prompt]
    text_cache = "none" if flags.train_text_encoder else flags.text_cache
    text = caching.cache_text(texts, model, host, text_cache, flags.cache_dir)
    schedule = loading.load_noise_schedule(model, host.device)
    draws = dict(
        flip_share=0.5 if flags.random_flip else 0.0,
        drop_share=flags.caption_dropout,
        offset_strength=flags.offset_noise_strength,
        zero_unconditional=loading.zero_unconditional(model),
        captions=options,
    )
    make = functools.partial(
        batching.Examples, text=text, seed=flags.seed, num_timesteps=len(schedule.alphas_cumprod), **draws
    )
    return Data(
        model, schedule, text, make(latents.subset(training)), make(latents.subset(held_out)) if held_out else None
    )


def build_engine(flags, host, unet, data):
    """The UNet with its adapter -> Engine: flat buffer, forward pass, optimizer, learning-rate schedule, EMA."""
    fused_layers = flags.lora_backend == "fused"
    if flags.enable_xformers_memory_efficient_attention:
        unet.enable_xformers_memory_efficient_attention()
    checkpointing = None
    if flags.gradient_checkpointing:
        # the fused layers' dropout is a function of a seed, so there is no generator to rewind before the second forward pass
        checkpointing = fit.BlockCheckpointing(preserve_rng_state=not fused_layers)
        unet.enable_gradient_checkpointing(checkpointing)
    encoders = _trained_encoders(flags, data)
    if encoders:
        adapters.add_text_lora(encoders, flags.lora_rank, flags.lora_alpha, flags.lora_dropout)
    groups = [(adapters.trainable(unet), {})]
    groups += (
        [([pair for encoder in encoders for pair in adapters.trainable(encoder)], {"lr": flags.text_encoder_lr})]
        if encoders
        else []
    )
    flat = adapters.FlatParameters(groups, host.dtype if fused_layers else torch.float32)
    dropout_seed = torch.zeros((), dtype=torch.int64, device=host.device)
    if fused_layers:
        fused.fuse([unet, *encoders], flat, dropout_seed, host.say)
        fused_unet.fuse_unet(unet, host.device, host.say)
    everything = sum(adapters.count(module) for module in (unet, *encoders))
    scale = (
        f"; scaled by alpha / rank = {flags.lora_alpha} / {flags.lora_rank}"
        if flags.lora_alpha != flags.lora_rank
        else ""
    )
    host.say(
        f"adapter: {len(flat):,} trainable parameters, {100 * len(flat) / everything:.2f} % of {everything:,}{scale}"
    )
    betas = (flags.adam_beta1, flags.adam_beta2)
    return Engine(
        unet,
        data.text,
        data.schedule,
        flat,
        adapters.make_optimizer(
            flat, flags.use_8bit_adam, flags.learning_rate, betas, flags.adam_weight_decay, flags.adam_epsilon
        ),
        lr_schedule(
            flags.lr_scheduler,
            flags.lr_warmup_steps,
            _plan(flags, host, data).total_steps,
            flags.learning_rate,
            flags.lr_num_cycles,
            flags.lr_power,
        ),
        host,
        flags.max_grad_norm,
        flags.min_snr_gamma,
        adapters.EMA(flat, flags.ema_decay) if flags.use_ema else None,
        flags.seed,
        dropout_seed,
        flags.cuda_graph,
        checkpointing,
    )


def train(flags, engine, data):
    """Run the loop, from a checkpoint if asked to, and write the results -> {"output_dir", "step", "ended", "weights", "metrics"}.

    Raises:
        UserError: another run is writing to the output folder; what `resume` and the loop refuse.
    """
    with run_folder.owned(Path(flags.output_dir), engine.host):
        return _train(flags, engine, data)


def _train(flags, engine, data):
    host, output_dir, plan = engine.host, Path(flags.output_dir), _plan(flags, engine.host, data)
    prediction.check(engine, data)
    recipe = _recipe(flags, data)
    progress = resuming.resume(flags, engine, recipe, plan)
    if host.is_main:
        files.write_json(output_dir / "config.json", recipe)
    passes = _fit(flags, engine, data, plan)
    if (
        plan.effective_batch % host.world
        or plan.effective_batch > flags.train_batch_size * flags.gradient_accumulation_steps
    ):
        host.say(_uneven_shares(flags, host.world, plan.effective_batch))
    host.say(
        f"training: {plan.total_steps} steps of {plan.effective_batch} images, {passes.micro_batch} at a time, from step {progress.step}"
    )
    log = report.Report(output_dir, plan.total_steps, progress.step, flags.report_to, asdict(flags), host.is_main)
    draw = functools.partial(_draw_samples, flags, engine, data) if flags.validation_prompt else None
    save_adapter = functools.partial(
        formats.save_adapter, unet=engine.unet, recipe=recipe, text_encoders=_trained_encoders(flags, data)
    )
    request = stopping.StopRequest(plan.ends_s)

    def save(step):
        save_adapter(output_dir / f"pytorch_lora_weights_{step:06d}.safetensors")
        log.plot()

    try:
        with request.listening():
            progress, ended = loops.train(
                engine, data.examples, data.held_out, plan, passes, log, progress, draw, save, request
            )
            request.doing = "writing the results"
            engine.run_pass.clear()
            if host.is_main:
                _write_results(output_dir, engine.ema, save_adapter, functools.partial(save_kohya, flags, engine, data))
                if flags.save_peft:
                    formats.save_peft(output_dir / "peft", engine.unet, recipe, _trained_encoders(flags, data))
            host.barrier()
    except OSError as error:
        raise _rescued(engine, output_dir, progress, save_adapter, error) from None
    peaks = f"peak {host.peak_gib():.2f} GiB on the {host.device.type}, {device.peak_ram_gib():.2f} GiB of RAM"
    host.say(f"{ended} after step {progress.step} of {plan.total_steps}; {peaks}; everything is in {output_dir}")
    name = output_dir.resolve().name
    host.say(f"{formats.WEIGHTS}: for diffusers and infer.py; kohya/{name}.safetensors: for {_readers(engine.unet)}")
    rows = report.read_metrics(output_dir / "metrics.jsonl")
    return {
        "output_dir": str(output_dir),
        "step": progress.step,
        "ended": ended,
        "weights": str(output_dir / formats.WEIGHTS),
        "metrics": rows[-1] if rows else None,  # the last line of metrics.jsonl
    }


def save_kohya(flags, engine, data, ending="", **options):
    """Write kohya/NAME`ending`.safetensors, with the options and the result of formats.save_kohya."""
    output_dir = Path(flags.output_dir)
    unet_files = weights.weight_files(data.model.folder / "unet", data.model.variant)
    weight_of = dora.frozen_weights(engine.unet, unet_files)
    path = output_dir / "kohya" / f"{output_dir.resolve().name}{ending}.safetensors"
    return formats.save_kohya(
        path, engine.unet, _recipe(flags, data), _trained_encoders(flags, data), weight_of=weight_of, **options
    )


def export_dora_as_lora(flags, engine, data):
    """Write the plain LoRA that is nearest to a DoRA, and say how near."""
    host, rank = engine.host, flags.export_dora_as_lora
    if host.is_main:
        host.say(f"--export_dora_as_lora {rank}: takes about a second a layer on a CPU, less on a GPU")
        share = save_kohya(flags, engine, data, "_as_lora", dora_rank=rank)
        host.say(
            f"kohya/*_as_lora.safetensors: a LoRA of rank {rank} with {share:.1%} of the DoRA's change, by its norm"
        )


def _readers(unet):
    if not unet.peft_config["default"].use_dora:
        return "ComfyUI, Forge, A1111 and kohya's scripts"
    return "ComfyUI and Forge only (A1111 and kohya's scripts draw a DoRA wrong and do not say so: --export_dora_as_lora RANK)"


def _uneven_shares(flags, world, effective_batch):
    """What is done where the images of a step cannot be shared out evenly."""
    asked = flags.train_batch_size * flags.gradient_accumulation_steps
    if asked < world:
        return f"note: {asked} images a step cannot be shared by {world} processes: each takes one, so the effective batch is {world}"
    least, larger = divmod(effective_batch, world)
    return (
        f"note: {effective_batch} images a step cannot be shared evenly by {world} processes: {larger} of them take {least + 1}, the others"
        f" {least}; the effective batch stays {effective_batch}"
    )


def _rescued(engine, output_dir, progress, save_adapter, error):
    """A file cannot be read or written (a Drive that was unmounted, say): save to the local disk -> the UserError that says where."""
    place = Path(tempfile.mkdtemp(prefix=f"{output_dir.resolve().name}-"))
    save_adapter(place / formats.WEIGHTS)
    checkpoint.save_checkpoint(place, progress.step, engine, asdict(progress), None)
    what = " ".join(str(error).split())  # diffusers' errors have several lines
    return UserError(
        f"the run ended on a file error ({what}): perhaps --output_dir {output_dir} is full or gone, or a file of the model is; adapter and"
        f" checkpoint of step {progress.step} are in {place}: go on with --output_dir elsewhere"
        f" --resume_from_checkpoint {run_folder.find_checkpoints(place)[-1]}"
    )


def _trained_encoders(flags, data):
    return data.text.encoders if flags.train_text_encoder else ()


def _fit(flags, engine, data, plan):
    """On a GPU the measured Fit, unless --no_auto_fit; else the documented micro-batch."""
    host = engine.host
    if host.device.type != "cuda" or not flags.auto_fit:
        return fit.Fit(flags.train_batch_size, engine.checkpointing)
    budget_gib = device.limit_memory(host.device, flags.max_vram_gb)  # anew: encoding may have left less

    def make_batches(micro_batch):
        return data.examples.effective_batch(0, plan.effective_batch, micro_batch, host.rank, host.world)

    share = len(
        range(host.rank, plan.effective_batch, host.world)
    )  # where they do not divide, the first processes have one more
    budget_gib = int(8 * budget_gib) / 8  # what is free differs by some MiB from run to run; the plan need not
    shape = make_batches(1)[0].tensors["mean"].shape
    gpu = torch.cuda.get_device_name(), torch.backends.cuda.flash_sdp_enabled(), budget_gib, host.rank
    remembered = Path(flags.cache_dir) / "plans" / f"{_plan_key(flags, gpu, share, shape, len(engine.flat))}.json"
    chosen, line = fit.measured(engine, make_batches, share, engine.checkpointing, budget_gib, remembered)
    host.say(line)
    return chosen


def _plan_key(flags, *measured_with):
    """What a remembered Fit belongs to."""
    versions = fit.VERSION, version("torch"), version("diffusers"), kernel_check.refused()
    values = [getattr(flags, name) for name in names_where(flags, changes_a_pass=True)]
    return caching.content_key("plan", *versions, *measured_with, values)


def _plan(flags, host, data):
    # the same on however many processes: they share its images out, and each has at least one
    effective_batch = max(flags.train_batch_size * flags.gradient_accumulation_steps, host.world)
    return loops.Plan(
        Path(flags.output_dir),
        loops.total_steps(flags.max_train_steps, flags.num_train_epochs, len(data.examples), effective_batch),
        effective_batch,
        flags.checkpointing_steps,
        flags.checkpoints_total_limit,
        flags.validation_steps,
        flags.early_stopping_patience,
        host.started_s + 60 * (flags.max_train_minutes or math.inf),
    )


def _recipe(flags, data):
    """What config.json and every adapter file say about how they were made."""
    packages = ("torch", "diffusers", "transformers", "peft", "accelerate")
    latents = data.examples.latents
    examples = [(sample.key, sample.caption) for sample in latents.samples for _ in range(sample.repeats)]
    return {
        "flags": asdict(flags),
        "base_model": data.model.name,
        "revision": flags.revision,
        "license_note": "a derivative of base_model, under its licence (SDXL base 1.0: CreativeML Open RAIL++-M); the images have theirs",
        "vae": str(data.model.vae),
        "prediction_type": data.model.kind.prediction_type,
        "zero_terminal_snr": data.model.kind.zero_terminal_snr,
        "data": {"images": len(latents), "fingerprint": caching.content_key(examples)},
        "versions": {package: version(package) for package in packages},
    }


def _draw_samples(flags, engine, data, step):
    """samples/STEP_I.png for every --validation_prompt, with the average where there is one; left out where memory runs out."""
    if not engine.host.is_main:
        return
    engine.run_pass.clear()  # its memory is needed for the pictures; the next steps capture it again
    try:
        with engine.ema.applied() if engine.ema else contextlib.nullcontext():
            images = sampling.draw_while_training(
                engine.unet, data.text, data.model, engine.host, flags.validation_prompt, flags.resolution, flags.seed
            )
    except (RuntimeError, memory.OutOfMemory) as error:
        if not memory.ran_out(error):
            raise
        engine.host.say(f"no validation images of step {step}: out of GPU memory; everything trained so far is saved")
        images = []
    device.free_memory(engine.host.device)
    folder = Path(flags.output_dir) / "samples"
    folder.mkdir(exist_ok=True)
    for i, image in enumerate(images):
        image.save(folder / f"{step:06d}_{i}.png")


def _write_results(output_dir, ema, save_adapter, save_kohya):
    save_adapter(output_dir / formats.WEIGHTS)
    save_kohya()
    if ema is not None:
        with ema.applied():
            save_adapter(output_dir / "ema_unet" / formats.WEIGHTS)
            save_kohya(ending="_ema")
