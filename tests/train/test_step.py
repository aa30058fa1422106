"""One optimizer step, against a reference made of diffusers, PEFT and plain autograd, in fp32."""

import json
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, DDPMScheduler, StableDiffusionXLPipeline, UNet2DConditionModel
from diffusers.optimization import get_scheduler
from diffusers.training_utils import compute_snr
from peft import LoraConfig
from PIL import Image, ImageOps

from common.data import dataset
from common.data.framing import frame, pixels
from common.data.framing import time_ids as framing_ids
from common.errors import UserError
from common.model import adapters
from common.model.noise import generator_for

SEED, EFFECTIVE = 42, 8
TARGETS = ["to_q", "to_k", "to_v", "to_out.0"]
SDXL_UNET = dict(  # unet/config.json of stabilityai/stable-diffusion-xl-base-1.0
    sample_size=128,
    down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    block_out_channels=(320, 640, 1280),
    layers_per_block=2,
    transformer_layers_per_block=[1, 2, 10],
    attention_head_dim=[5, 10, 20],
    cross_attention_dim=2048,
    use_linear_projection=True,
    addition_embed_type="text_time",
    addition_time_embed_dim=256,
    projection_class_embeddings_input_dim=2816,
)


def by_name(flat, buffer):
    """A flat buffer as {parameter name: tensor of its shape}."""
    parts = buffer.split([math.prod(shape) for _, shape in flat.layout])
    return {name: part.view(shape) for (name, shape), part in zip(flat.layout, parts)}


def fill_adapter(engine):
    """Numbers in A and B alike: as a run starts, with B = 0, half of the gradients are zero and would prove nothing."""
    with torch.no_grad():
        engine.flat.data.copy_(0.05 * torch.randn(len(engine.flat), generator=torch.Generator().manual_seed(7)))


class Reference:
    """The same training step, written once more: slow, one example at a time, with nothing from `common` but the random draws' seeds."""

    def __init__(self, demo, engine, rank, alpha, gamma=None, offset=0.0, dropout=0.0, flip=False):
        self.demo, self.gamma, self.offset, self.dropout, self.flip = demo, gamma, offset, dropout, flip
        self.unet = UNet2DConditionModel.from_pretrained(demo.model, subfolder="unet").requires_grad_(False)
        self.unet.add_adapter(LoraConfig(r=rank, lora_alpha=alpha, target_modules=TARGETS))
        self.parameters = {name: p for name, p in self.unet.named_parameters() if p.requires_grad}
        with torch.no_grad():
            for name, values in by_name(engine.flat, engine.flat.data).items():
                self.parameters[name].copy_(values)
        self.vae = AutoencoderKL.from_pretrained(demo.model, subfolder="vae")
        self.pipeline = StableDiffusionXLPipeline.from_pretrained(demo.model, unet=None, vae=None)
        self.scheduler = DDPMScheduler.from_pretrained(demo.model, subfolder="scheduler")
        self.captions = {
            row["file_name"]: row["text"]
            for row in map(json.loads, (demo.data / "metadata.jsonl").read_text().splitlines())
        }

    def backward(self, number, files):
        """Gradients of effective batch `number`, made of `files`, are left in the parameters; returns (loss, unweighted mse)."""
        losses, mses = zip(*(self.loss_of(generator_for(SEED, number, i), file) for i, file in enumerate(files)))
        loss = torch.stack(losses).mean()
        loss.backward()
        return loss.item(), torch.stack(mses).mean().item()

    def loss_of(self, generator, file):
        flip, drop = (torch.rand(2, generator=generator) < torch.tensor([0.5 * self.flip, self.dropout])).tolist()
        t = torch.randint(1000, (), generator=generator)[None]
        posterior_eps, eps = (torch.randn(1, 4, 8, 8, generator=generator) for _ in range(2))
        eps = eps + self.offset * torch.randn(1, 4, 1, 1, generator=generator)

        image = Image.open(file)
        with torch.no_grad():
            pixels, time_ids = self.preprocess(image, flip)
            posterior = self.vae.encode(pixels).latent_dist
            z = (posterior.mean + posterior.std * posterior_eps) * self.vae.config.scaling_factor
            prompt = self.captions[file.rpartition("/")[2]]
            prompt_embeds, negative, pooled, negative_pooled = self.pipeline.encode_prompt(
                prompt, device="cpu", do_classifier_free_guidance=True
            )
        if drop:
            prompt_embeds, pooled = negative, negative_pooled
        conditions = {"text_embeds": pooled, "time_ids": time_ids}
        prediction = self.unet(
            self.scheduler.add_noise(z, eps, t), t, prompt_embeds, added_cond_kwargs=conditions
        ).sample
        mse = torch.nn.functional.mse_loss(prediction, eps)
        if self.gamma is None:
            return mse, mse.detach()
        snr = compute_snr(self.scheduler, t)
        return mse * (snr.clamp(max=self.gamma) / snr)[0], mse.detach()

    def preprocess(self, image, flip):
        scale = 64 / min(image.size)
        resized = image.convert("RGB").resize(
            (round(image.width * scale), round(image.height * scale)), Image.Resampling.LANCZOS
        )
        left, top = round((resized.width - 64) / 2), round((resized.height - 64) / 2)
        cropped = resized.crop((left, top, left + 64, top + 64))
        if flip:
            cropped, left = ImageOps.mirror(cropped), resized.width - 64 - left
        pixels = torch.from_numpy(np.asarray(cropped, np.float32).transpose(2, 0, 1) / 127.5 - 1)[None]
        return pixels, torch.tensor([[image.height, image.width, top, left, 64, 64]], dtype=torch.float32)


def batches_of(parts, number, micro=4):
    return parts.data.examples.effective_batch(number, EFFECTIVE, micro)


def names_of(parts, number):
    """Files of an effective batch in order; one batch of one shape keeps it."""
    (batch,) = parts.data.examples.effective_batch(number, EFFECTIVE, EFFECTIVE)
    return batch.names


# ---------------------------------------------------------------- loss and gradients


def test_the_reference_reads_the_same_pictures(demo):
    """The hand-made preprocessing above and `framing` agree, so that the tests below compare what they mean to."""
    samples, _ = dataset.load_samples(None, [str(demo.data)], image_column="image", caption_column="text")
    prepare = Reference.preprocess
    for sample in samples[:6]:
        for flip in (False, True):
            expected, time_ids = prepare(SimpleNamespace(), Image.open(sample.name), flip)
            framing = frame(sample, 64)
            torch.testing.assert_close(pixels(sample, framing, flip), expected[0])
            assert framing_ids(sample, framing, flip).tolist() == time_ids[0].tolist()


RECIPES = {
    "mse": ("train_sdxl", ["--lora_alpha", 32], dict(rank=16, alpha=32)),
    "min-snr, offset noise": ("train_opt", [], dict(rank=8, alpha=8, gamma=5.0, offset=0.1)),
    "everything": (
        "train_opt",
        [
            "--caption_dropout",
            0.5,
            "--random_flip",
            "--offset_noise_strength",
            0.3,
            "--min_snr_gamma",
            1.0,
            "--lora_alpha",
            4,
        ],
        dict(rank=8, alpha=4, gamma=1.0, offset=0.3, dropout=0.5, flip=True),
    ),
}


@pytest.mark.parametrize("recipe", RECIPES)
def test_loss_and_gradients_equal_the_reference(assemble, demo, recipe):
    script, flags, options = RECIPES[recipe]
    parts = assemble(*flags, script=script)
    engine = parts.engine
    fill_adapter(engine)
    reference = Reference(demo, engine, **options)
    expected_loss, expected_mse = reference.backward(3, names_of(parts, 3))
    totals = sum(engine.forward_backward(batch.tensors) for batch in batches_of(parts, 3))
    assert totals[0].item() == pytest.approx(expected_loss, rel=1e-5)
    assert totals[1].item() == pytest.approx(expected_mse, rel=1e-5)
    assert (recipe == "mse") == (expected_loss == expected_mse)
    gradients = by_name(engine.flat, engine.flat.grad)
    assert gradients.keys() == reference.parameters.keys()
    for name, parameter in reference.parameters.items():
        assert parameter.grad.abs().max() > 0, name
        torch.testing.assert_close(
            gradients[name], parameter.grad, rtol=1e-3, atol=1e-4 * parameter.grad.abs().max().item(), msg=name
        )


def test_a_training_starts_at_the_reference_loss_and_its_log_says_so(train, demo, assemble):
    """The way through main, from files to metrics.jsonl: step 1 is computed with B = 0, that is with the frozen model."""
    run, parts = train("--max_train_steps", 1), assemble()
    reference = Reference(demo, parts.engine, rank=8, alpha=8, gamma=5.0, offset=0.1)
    loss, mse = reference.backward(0, names_of(parts, 0))
    assert run.rows[0]["loss"] == pytest.approx(loss, rel=1e-5) and run.rows[0]["mse"] == pytest.approx(mse, rel=1e-5)
    norm = torch.linalg.vector_norm(torch.stack([p.grad.norm() for p in reference.parameters.values()]))
    assert run.rows[0]["grad_norm"] == pytest.approx(norm.item(), rel=1e-4)


# ---------------------------------------------------------------- the update


def steps(parts, count, reference_step):
    """`count` engine steps; after each, `reference_step(number, gradients by name, result)`."""
    engine, seen = parts.engine, {}

    def keep_gradients():
        seen.update(by_name(engine.flat, engine.flat.grad.clone()))

    for number in range(1, count + 1):
        result = engine.step(number, batches_of(parts, number - 1), meanwhile=keep_gradients)
        reference_step(number, seen, result)


@pytest.mark.parametrize(
    ("flags", "max_grad_norm"),
    [
        ([], 1.0),
        (["--max_grad_norm", 1e-3], 1e-3),
        (["--max_grad_norm", 0], math.inf),
        (["--adam_weight_decay", 0.3, "--adam_beta1", 0.5], 1.0),
    ],
)
def test_the_update_is_adamw_with_clipping_over_tensors_of_their_own(assemble, flags, max_grad_norm):
    """One flat parameter or 272 separate ones make no difference."""
    parts = assemble("--max_train_steps", 6, "--lr_warmup_steps", 2, "--learning_rate", 1e-2, *flags)
    engine, given = parts.engine, parts.flags
    fill_adapter(engine)
    start = engine.flat.data.clone()
    parameters = {
        name: torch.nn.Parameter(values.clone()) for name, values in by_name(engine.flat, engine.flat.data).items()
    }
    betas, eps = (given.adam_beta1, given.adam_beta2), given.adam_epsilon
    optimizer = torch.optim.AdamW(
        parameters.values(), lr=given.learning_rate, betas=betas, eps=eps, weight_decay=given.adam_weight_decay
    )
    scheduler = get_scheduler("cosine", optimizer, num_warmup_steps=2, num_training_steps=6)

    def reference_step(number, gradients, result):
        for name, parameter in parameters.items():
            parameter.grad = gradients[name].clone()
        norm = torch.nn.utils.clip_grad_norm_(parameters.values(), max_grad_norm)
        assert result.applied and result.grad_norm == pytest.approx(norm.item(), rel=1e-5)
        optimizer.step()
        scheduler.step()
        for name, values in by_name(engine.flat, engine.flat.data).items():
            torch.testing.assert_close(
                values, parameters[name].data, rtol=1e-5, atol=1e-7, msg=f"{name} in step {number}"
            )
        assert not engine.flat.grad.any()

    steps(parts, 6, reference_step)
    assert (engine.flat.data - start).abs().max() > 5e-3  # it did move


@pytest.mark.parametrize(
    "name", ["linear", "cosine", "cosine_with_restarts", "polynomial", "constant", "constant_with_warmup"]
)
def test_the_learning_rate_is_diffusers_schedule_stepped_once_per_optimizer_step(train, name):
    """Whatever the accumulation: counting its passes leaves a cosine at 85 % of the peak."""
    flags = [
        "--lr_scheduler",
        name,
        "--lr_warmup_steps",
        3,
        "--learning_rate",
        2e-4,
        "--max_train_steps",
        8,
        "--max_train_samples",
        2,
    ]
    run = train(*flags, "--train_batch_size", 1, "--gradient_accumulation_steps", 2)
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=2e-4)
    scheduler = get_scheduler(name, optimizer, num_warmup_steps=3, num_training_steps=8, num_cycles=2)
    for row in run.rows:
        assert row["lr"] == pytest.approx(scheduler.get_last_lr()[0], rel=1e-6, abs=1e-12)
        optimizer.step()
        scheduler.step()


@pytest.mark.parametrize(
    ("flags", "expected"),
    [  # peak 1e-4; warm-up to step 2, 8 steps of decay
        (["cosine_with_restarts"], {1: 0.5, 2: 1.0, 4: 0.5, 6: 1.0, 8: 0.5}),  # begins anew in the middle
        (["cosine_with_restarts", "--lr_num_cycles", 1], {2: 1.0, 6: 0.5, 10: 0.0}),
        (["polynomial"], {2: 1.0, 6: 0.5 * 0.999 + 0.001, 10: 0.001}),  # ends at 1e-7
        (["polynomial", "--lr_power", 2], {2: 1.0, 6: 0.25 * 0.999 + 0.001, 10: 0.001}),
    ],
)
def test_restarts_restart_and_a_polynomial_has_its_power(assemble, flags, expected):
    lengths = ["--lr_warmup_steps", 2, "--max_train_steps", 10, "--learning_rate", 1e-4, "--max_train_samples", 2]
    factor = assemble("--lr_scheduler", *flags, *lengths).engine.lr_factor
    assert {step: factor(step) for step in expected} == pytest.approx(expected)


@pytest.mark.parametrize("decay", [0.9999, 0.3])
def test_the_average_follows_the_ramp(assemble, decay):
    parts = assemble(
        "--use_ema", "--ema_decay", decay, "--learning_rate", 1e-2, "--max_train_steps", 5, "--lr_warmup_steps", 0
    )
    engine = parts.engine
    average = engine.flat.data.double()

    def reference_step(number, gradients, result):
        nonlocal average
        d = min(decay, (1 + number) / (10 + number))
        average = d * average + (1 - d) * engine.flat.data.double()
        torch.testing.assert_close(engine.ema.average.double(), average, rtol=1e-5, atol=1e-7)

    steps(parts, 5, reference_step)
    assert not torch.allclose(engine.ema.average, engine.flat.data, atol=1e-5)


def test_using_the_average_leaves_the_trained_values_as_they_were(assemble):
    parts = assemble("--learning_rate", 1e-2, "--lr_warmup_steps", 0)
    engine = parts.engine
    steps(parts, 2, lambda *_: None)
    before, batch = engine.flat.data.clone(), batches_of(parts, 5)[0].tensors
    with torch.no_grad():
        trained = engine.predict(batch)[0]
        with pytest.raises(KeyboardInterrupt), engine.ema.applied():
            assert torch.equal(engine.flat.data, engine.ema.average)
            assert not torch.equal(engine.predict(batch)[0], trained)
            raise KeyboardInterrupt
        assert torch.equal(engine.flat.data, before) and torch.equal(engine.predict(batch)[0], trained)


def test_the_parameters_are_views_of_the_flat_buffer(assemble):
    """PEFT's parameters and the optimizer's are the same memory; so is what reads them: files, forward pass, average."""
    engine = assemble().engine
    trained = adapters.trainable(engine.unet)
    assert sum(p.numel() for _, p in trained) == len(engine.flat) == 125_696
    engine.flat.data.copy_(torch.arange(len(engine.flat)))
    engine.flat.grad.copy_(-torch.arange(len(engine.flat)))
    assert torch.equal(torch.cat([p.detach().flatten() for _, p in trained]), engine.flat.data)
    assert torch.equal(torch.cat([p.grad.flatten() for _, p in trained]), engine.flat.grad)
    assert torch.equal(
        torch.cat([p.detach() for group in engine.optimizer.param_groups for p in group["params"]]), engine.flat.data
    )
    assert engine.flat.data.dtype == torch.float32


# ---------------------------------------------------------------- how a batch is cut


@pytest.mark.parametrize(
    "flags",
    [[], ["--aspect_ratio_buckets", "--random_flip", "--caption_dropout", 0.3]],
    ids=["squares", "buckets, flips"],
)
def test_losses_do_not_depend_on_how_the_effective_batch_is_cut(train, flags):
    runs = [
        train(
            "--max_train_steps",
            4,
            *flags,
            "--train_batch_size",
            micro,
            "--gradient_accumulation_steps",
            EFFECTIVE // micro,
        )
        for micro in (1, 2, 4, 8)
    ]
    first, start = (
        runs[0].weights(),
        train("--max_train_steps", 1, *flags).weights(),
    )  # the first step of a warm-up has lr 0
    for run in runs[1:]:
        for name in ("loss", "mse", "grad_norm", "lr", "epoch"):
            assert [row[name] for row in run.rows] == pytest.approx([row[name] for row in runs[0].rows], rel=1e-4), name
        weights = run.weights()
        apart = sum((weights[name] - first[name]).square().sum() for name in first)
        moved = sum((first[name] - start[name]).square().sum() for name in first)
        assert apart.sqrt() < 1e-2 * moved.sqrt()


@pytest.mark.parametrize("processes", [2, 4])
def test_the_shares_of_the_processes_make_up_the_effective_batch(assemble, processes):
    """Each example once, with the same noise and weight, whoever computes it."""
    parts = assemble("--aspect_ratio_buckets", "--random_flip", "--caption_dropout", 0.5)

    def examples(rank, world):
        shares = parts.data.examples.effective_batch(2, EFFECTIVE, 2, rank, world)
        return [
            (name, {key: values[i].tolist() for key, values in batch.tensors.items()})
            for batch in shares
            for i, name in enumerate(batch.names)
        ]

    whole = examples(0, 1)
    shared = [example for rank in range(processes) for example in examples(rank, processes)]
    assert sorted(map(repr, shared)) == sorted(map(repr, whole)) and len(whole) == EFFECTIVE
    assert sum(fields["weight"] for _, fields in whole) == pytest.approx(1)


def test_every_epoch_is_a_fresh_permutation_and_windows_run_across_its_end(assemble):
    """24 samples, effective batches of 7: no sample is left out or averaged twice."""
    examples = assemble().data.examples
    names = [name for number in range(24) for batch in examples.effective_batch(number, 7, 7) for name in batch.names]
    epochs = [names[i : i + 24] for i in range(0, 7 * 24, 24)]
    assert all(sorted(epoch) == sorted(epochs[0]) and len(set(epoch)) == 24 for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == len(epochs)
    assert all(name == examples.name_at(position) for position, name in enumerate(names))


def test_another_seed_is_another_order_with_other_noise(assemble):
    first, again, other = (assemble("--seed", seed).data.examples.effective_batch(0, 8, 8)[0] for seed in (1, 1, 2))
    assert first.names == again.names and torch.equal(first.tensors["eps"], again.tensors["eps"])
    assert first.names != other.names and not torch.equal(first.tensors["t"], other.tensors["t"])


# ---------------------------------------------------------------- what is trained


def frozen(engine):
    return {name: p.detach().clone() for name, p in engine.unet.named_parameters() if not p.requires_grad}


def test_the_base_is_bit_equal_after_training(train, demo):
    seen = {}
    run = train(
        "--max_train_steps",
        3,
        "--lr_warmup_steps",
        0,
        prepare=lambda engine, data: seen.update(engine=engine, before=frozen(engine)),
    )
    after = frozen(seen["engine"])
    assert after.keys() == seen["before"].keys() and len(after) > 500
    assert all(torch.equal(seen["before"][name], after[name]) for name in after)
    on_disk = UNet2DConditionModel.from_pretrained(demo.model, subfolder="unet").state_dict()
    assert all(torch.equal(on_disk[name.replace(".base_layer", "")], values) for name, values in after.items())
    assert all(
        values.any() for name, values in run.weights().items()
    )  # and every tensor of the adapter has moved off zero


def test_an_untrained_adapter_changes_nothing(assemble, demo):
    engine = assemble().engine
    batch = batches_of(assemble(), 0)[0].tensors
    with torch.no_grad():
        with_adapter = engine.predict(batch)[0]
        engine.unet.disable_adapters()
        assert torch.equal(engine.predict(batch)[0], with_adapter)


@pytest.fixture(scope="module")
def full_size_unet():
    with torch.device("meta"):
        return UNet2DConditionModel(**SDXL_UNET)


@pytest.mark.parametrize(("rank", "expected"), [(16, 23_224_320), (8, 11_612_160), (4, 5_806_080)])
def test_trainable_parameters_of_the_real_sdxl(full_size_unet, rank, expected):
    unet = full_size_unet
    assert sum(p.numel() for p in unet.parameters()) == 2_567_463_684
    unet.requires_grad_(False)
    try:
        adapters.add_lora(unet, TARGETS, rank, rank)
        trained = adapters.trainable(unet)
        assert sum(p.numel() for _, p in trained) == expected
        assert len(trained) == 1_120 and all("lora_" in name and p.dtype == torch.float32 for name, p in trained)
    finally:
        unet.delete_adapters("default")


def test_a_target_that_no_layer_has_is_refused_by_name(train):
    with pytest.raises(UserError, match="--lora_target_modules to_qq"):
        train("--lora_target_modules", "to_q", "to_qq")


def test_the_adapter_weights_are_fp32_on_a_base_of_half_precision(demo):
    unet = UNet2DConditionModel.from_pretrained(demo.model, subfolder="unet").half().requires_grad_(False)
    adapters.add_lora(unet, TARGETS, 8, 8)
    assert {p.dtype for _, p in adapters.trainable(unet)} == {torch.float32}
