"""What noise does to a latent, and what the loss makes of it: pure functions of tensors.

Notation: z latent, eps noise, a = alphas_cumprod[t], snr = a / (1 - a). Shapes: [B, C, H, W] unless said otherwise.
"""

import hashlib
from dataclasses import dataclass

import torch
import torch.nn.functional as F

QUARTERS = 4  # the loss is also reported by quarter of the timesteps


@dataclass(frozen=True)
class Draws:
    """All that is random about one training example."""

    flip: bool
    drop_caption: bool
    timestep: int
    posterior_eps: torch.Tensor  # [C, H, W]
    eps: torch.Tensor  # [C, H, W], offset noise included


def generator_for(*identity) -> torch.Generator:
    """A CPU generator that depends on `identity` alone: the same draws in any batch, any process, beside any device."""
    digest = hashlib.blake2b(repr(identity).encode(), digest_size=8).digest()
    return torch.Generator("cpu").manual_seed(int.from_bytes(digest, "little") >> 1)


def draw(
    generator: torch.Generator,
    shape: tuple[int, int, int],
    num_timesteps: int,
    flip_share: float = 0.0,
    drop_share: float = 0.0,
    offset_strength: float = 0.0,
) -> Draws:
    """Draw everything for one example whose latent has `shape` = (C, H, W).

    Every number is drawn whether it is used or not, so that switching one option on leaves the other draws alone.
    Offset noise is part of the noise to predict: eps' = eps + s * n, n ~ N(0, 1) per channel
    (https://www.crosslabs.org/blog/diffusion-with-offset-noise).
    """
    flip, drop = torch.rand(2, generator=generator).tolist()
    timestep = int(torch.randint(num_timesteps, (), generator=generator))
    posterior_eps = torch.randn(shape, generator=generator)
    eps = torch.randn(shape, generator=generator)
    offset = torch.randn((shape[0], 1, 1), generator=generator)
    return Draws(
        flip=flip < flip_share,
        drop_caption=drop < drop_share,
        timestep=timestep,
        posterior_eps=posterior_eps,
        eps=eps + offset_strength * offset,
    )


@dataclass(frozen=True)
class NoiseSchedule:
    """The forward process of a model: alphas_cumprod [T] in fp32 on the training device, and what the UNet predicts."""

    alphas_cumprod: torch.Tensor
    prediction_type: str  # "epsilon" or "v_prediction"

    def noise(self, z: torch.Tensor, eps: torch.Tensor, t: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(x_t, the UNet's target), both [B, C, H, W], for timesteps `t` [B].

        x_t = sqrt(a) z + sqrt(1 - a) eps (arXiv 2006.11239, eq. 4); the target is eps, or
        v = sqrt(a) eps - sqrt(1 - a) z (arXiv 2202.00512, app. D).
        """
        a = self.alphas_cumprod[t].view(-1, 1, 1, 1)
        x_t = a.sqrt() * z + (1 - a).sqrt() * eps
        if self.prediction_type == "epsilon":
            return x_t, eps
        return x_t, a.sqrt() * eps - (1 - a).sqrt() * z

    def min_snr_weight(self, t: torch.Tensor, gamma: float) -> torch.Tensor:
        """Loss weights [B] of Min-SNR-gamma (arXiv 2303.09556, sec. 3.4).

        min(snr, g) / snr for epsilon prediction, min(snr, g) / (snr + 1) for v prediction. For epsilon, noisy steps
        (snr <= g) keep weight 1, with snr = 0 too, where it would be 0 / 0.
        """
        a = self.alphas_cumprod[t]
        snr = a / (1 - a)
        if self.prediction_type == "epsilon":
            return (gamma / snr).clamp(max=1.0)
        return snr.clamp(max=gamma) / (snr + 1)


def mse_per_sample(prediction: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Mean squared error of each example in fp32: [B, C, H, W] twice -> [B]."""
    return F.mse_loss(prediction.float(), target.float(), reduction="none").mean(dim=(1, 2, 3))


def by_quarter(values: torch.Tensor, t: torch.Tensor, num_timesteps: int) -> torch.Tensor:
    """Sum `values` [B] into the quarter of the schedule that their timestep `t` [B] lies in -> [QUARTERS]."""
    sums = torch.zeros(QUARTERS, dtype=values.dtype, device=values.device)
    return sums.index_add_(0, t * QUARTERS // num_timesteps, values)
