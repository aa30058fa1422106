"""Noise: the formulas against numpy and diffusers, and draws that belong to a sample and to nothing else."""

import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler
from diffusers.training_utils import compute_snr

from common.model import loading
from common.model.noise import QUARTERS, NoiseSchedule, by_quarter, draw, generator_for, mse_per_sample

BETAS = np.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2  # SDXL's scaled_linear schedule
A = np.cumprod(1 - BETAS)
SHAPE = (4, 6, 10)


@pytest.fixture
def schedule(request):
    return NoiseSchedule(torch.tensor(A, dtype=torch.float32), getattr(request, "param", "epsilon"))


@pytest.fixture
def latents():
    generator = torch.Generator().manual_seed(1)
    z, eps = (torch.randn((5, *SHAPE), generator=generator) for _ in range(2))
    return z, eps, torch.tensor([0, 1, 250, 700, 999])


# ---------------------------------------------------------------- formulas


def test_the_schedule_of_the_demo_model_is_sdxls(demo):
    loaded = loading.load_noise_schedule(loading.find_model(str(demo.model)), torch.device("cpu"))
    assert loaded.prediction_type == "epsilon" and loaded.alphas_cumprod.dtype == torch.float32
    np.testing.assert_allclose(loaded.alphas_cumprod, A, rtol=1e-5)


def test_x_t_is_the_closed_form_and_epsilon_prediction_predicts_the_noise(schedule, latents):
    z, eps, t = latents
    x_t, target = schedule.noise(z, eps, t)
    a = A[t.numpy()].reshape(-1, 1, 1, 1)
    np.testing.assert_allclose(x_t, np.sqrt(a) * z.numpy() + np.sqrt(1 - a) * eps.numpy(), rtol=1e-4, atol=1e-5)
    assert torch.equal(target, eps)


@pytest.mark.parametrize("schedule", ["v_prediction"], indirect=True)
def test_v_prediction_has_the_same_x_t_and_predicts_the_velocity(schedule, latents):
    z, eps, t = latents
    x_t, target = schedule.noise(z, eps, t)
    a = A[t.numpy()].reshape(-1, 1, 1, 1)
    np.testing.assert_allclose(target, np.sqrt(a) * eps.numpy() - np.sqrt(1 - a) * z.numpy(), rtol=1e-4, atol=1e-5)
    assert torch.equal(x_t, NoiseSchedule(schedule.alphas_cumprod, "epsilon").noise(z, eps, t)[0])


def test_noise_agrees_with_diffusers(schedule, latents):
    z, eps, t = latents
    scheduler = DDPMScheduler(1000, 0.00085, 0.012, "scaled_linear")
    torch.testing.assert_close(schedule.noise(z, eps, t)[0], scheduler.add_noise(z, eps, t))
    velocity = NoiseSchedule(schedule.alphas_cumprod, "v_prediction").noise(z, eps, t)[1]
    torch.testing.assert_close(velocity, scheduler.get_velocity(z, eps, t))


@pytest.mark.parametrize("gamma", [0.5, 5.0, 20.0])
def test_min_snr_weights_agree_with_the_paper_at_every_timestep(gamma):
    scheduler, t = DDPMScheduler(1000, 0.00085, 0.012, "scaled_linear"), torch.arange(1000)
    snr = compute_snr(scheduler, t)
    smaller = torch.minimum(snr, torch.tensor(gamma))
    for prediction_type, expected in (("epsilon", smaller / snr), ("v_prediction", smaller / (snr + 1))):
        weight = NoiseSchedule(scheduler.alphas_cumprod, prediction_type).min_snr_weight(t, gamma)
        torch.testing.assert_close(weight, expected, rtol=1e-4, atol=1e-6)


def test_min_snr_leaves_noisy_steps_alone_and_turns_nearly_clean_ones_down(schedule):
    weight = schedule.min_snr_weight(torch.arange(1000), 5.0).numpy()
    snr = A / (1 - A)
    assert (weight[snr <= 5 * 0.9999] == 1).all() and (weight[snr > 5 * 1.0001] < 1).all()
    assert (np.diff(weight) >= 0).all() and weight[0] < 0.01


@pytest.mark.parametrize("schedule", ["epsilon", "v_prediction"], indirect=True)
def test_a_zero_terminal_schedule_gives_finite_weights(schedule):
    """snr = 0 at the last step: 1 for epsilon prediction, min(0, g) / (0 + 1) = 0 for v prediction; never 0 / 0."""
    zero_terminal = NoiseSchedule(torch.cat([schedule.alphas_cumprod[:-1], torch.zeros(1)]), schedule.prediction_type)
    last = zero_terminal.min_snr_weight(torch.tensor([999]), 5.0).item()
    assert last == (1.0 if schedule.prediction_type == "epsilon" else 0.0)
    assert zero_terminal.min_snr_weight(torch.arange(1000), 5.0).isfinite().all()


def test_a_large_gamma_is_no_weighting(schedule):
    assert torch.equal(schedule.min_snr_weight(torch.arange(1000), 1e9), torch.ones(1000))


def test_a_large_gamma_weights_the_velocity_by_a(schedule):
    """Without the cap the weight is snr / (snr + 1) = a."""
    v = NoiseSchedule(schedule.alphas_cumprod, "v_prediction")
    torch.testing.assert_close(v.min_snr_weight(torch.arange(1000), 1e9), schedule.alphas_cumprod, rtol=1e-4, atol=1e-6)


def test_mse_is_the_mean_over_each_example_in_fp32():
    generator = torch.Generator().manual_seed(2)
    prediction, target = (torch.randn((3, *SHAPE), generator=generator) for _ in range(2))
    expected = ((prediction.double() - target.double()) ** 2).flatten(1).mean(1)
    torch.testing.assert_close(mse_per_sample(prediction, target).double(), expected, rtol=1e-5, atol=0)
    in_halves = mse_per_sample(prediction.half() * 100, target.half() * 100)
    assert in_halves.dtype == torch.float32 and in_halves.isfinite().all()


def test_quarters_split_the_schedule_at_250_500_and_750():
    t = torch.tensor([0, 249, 250, 499, 500, 749, 750, 999])
    values = 2.0 ** torch.arange(8)
    assert QUARTERS == 4
    assert by_quarter(values, t, 1000).tolist() == [1 + 2, 4 + 8, 16 + 32, 64 + 128]
    assert by_quarter(values[:2], t[6:], 1000).tolist() == [0, 0, 0, 3]


# ---------------------------------------------------------------- draws


def drawn(identity=("run", 0, 0), shape=SHAPE, **options):
    return draw(generator_for(*identity), shape, 1000, **options)


def test_draws_do_not_depend_on_the_options():
    """Switching flips, caption dropout or offset noise on leaves the timestep and all other noise alone."""
    off, on = drawn(), drawn(flip_share=0.5, drop_share=0.9, offset_strength=0.0)
    assert off.timestep == on.timestep
    assert torch.equal(off.eps, on.eps) and torch.equal(off.posterior_eps, on.posterior_eps)
    offset = drawn(offset_strength=0.3)
    assert offset.timestep == off.timestep and torch.equal(offset.posterior_eps, off.posterior_eps)
    identities = [("run", i, 1) for i in range(50)]
    flips = [drawn(i, flip_share=0.5).flip for i in identities]
    assert flips == [drawn(i, flip_share=0.5, drop_share=0.5, offset_strength=1.0).flip for i in identities]


def test_offset_noise_is_one_number_per_channel_times_the_strength():
    base, weak, strong = (drawn(offset_strength=s).eps for s in (0.0, 0.1, 1.0))
    offset = strong - base
    torch.testing.assert_close(offset, offset[:, :1, :1].expand(SHAPE), rtol=0, atol=1e-6)
    assert len(offset[:, 0, 0].unique()) == SHAPE[0]  # channels differ
    torch.testing.assert_close(weak, base + 0.1 * offset)


def test_offset_noise_is_part_of_the_target(schedule):
    """eps' = eps + s n is both in x_t and what the UNet has to predict."""
    eps = drawn(offset_strength=0.5).eps[None]
    z, t = torch.zeros_like(eps), torch.tensor([600])
    x_t, target = schedule.noise(z, eps, t)
    assert torch.equal(target, eps)
    torch.testing.assert_close(x_t, (1 - schedule.alphas_cumprod[600]).sqrt() * eps)


def test_shares_are_shares():
    many = [drawn(("shares", i), shape=(1, 1, 1), flip_share=0.5, drop_share=0.2) for i in range(4000)]
    assert abs(np.mean([d.flip for d in many]) - 0.5) < 0.03
    assert abs(np.mean([d.drop_caption for d in many]) - 0.2) < 0.025
    both = np.mean([d.flip and d.drop_caption for d in many])
    assert abs(both - 0.1) < 0.02  # independent of each other
    none, always = drawn(), drawn(flip_share=1.0, drop_share=1.0)
    assert (none.flip, none.drop_caption, always.flip, always.drop_caption) == (False, False, True, True)


def test_timesteps_are_uniform_over_the_whole_schedule():
    t = np.array([drawn(("t", i), shape=(1, 1, 1)).timestep for i in range(8000)])
    assert t.min() >= 0 and t.max() <= 999 and t.min() < 5 and t.max() > 994
    counts = np.histogram(t, bins=10, range=(0, 1000))[0]
    assert (abs(counts - 800) < 5 * 800**0.5).all()


def test_noise_is_standard_normal_and_its_parts_are_independent():
    d = drawn(shape=(4, 64, 64))
    for eps in (d.eps, d.posterior_eps):
        assert abs(eps.mean()) < 0.03 and abs(eps.std() - 1) < 0.03
    assert abs((d.eps * d.posterior_eps).mean()) < 0.03


def test_a_generator_depends_on_its_identity_alone():
    torch.manual_seed(0)
    before = torch.get_rng_state()
    first = torch.randn(8, generator=generator_for(42, 3, 1))
    assert torch.equal(torch.get_rng_state(), before)  # the global generator is not touched
    torch.manual_seed(123)
    torch.randn(5)
    assert torch.equal(torch.randn(8, generator=generator_for(42, 3, 1)), first)


def test_different_identities_have_different_noise():
    """(seed, step, index): none may be mixed up with another, as adding them up would."""
    identities = [(seed, step, i) for seed in range(3) for step in range(12) for i in range(12)] + [
        (0, "epoch", 1),
        (0, "validation", 1),
    ]
    streams = {tuple(torch.rand(2, generator=generator_for(*identity)).tolist()) for identity in identities}
    assert len(streams) == len(identities)


def test_two_generators_do_not_disturb_each_other():
    a, b = generator_for("a"), generator_for("b")
    pieces = []
    for _ in range(6):
        pieces.append(torch.randn(1, generator=a))
        torch.randn(1, generator=b)
    together = torch.cat(pieces)
    a_again = generator_for("a")
    assert torch.equal(together, torch.cat([torch.randn(1, generator=a_again) for _ in range(6)]))
