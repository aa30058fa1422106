"""What the demo's models minimize: pixel, contrast and label losses, and what the text encoders need beside them."""

import math

import torch
import torch.nn as nn
import torch.nn.functional as F

from demo import small


def pixel_loss(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Mean |difference| of pixels, and of their steps along y and x (crisp outlines), at full, 1/2 and 1/4 size."""
    total = 0
    for _ in range(3):
        total = total + F.l1_loss(output, target)
        total = total + sum(F.l1_loss(output.diff(dim=d), target.diff(dim=d)) for d in (2, 3))
        output = F.avg_pool2d(output, 2)
        target = F.avg_pool2d(target, 2)
    return total


def contrast(one: torch.Tensor, other: torch.Tensor, log_scale: torch.Tensor) -> torch.Tensor:
    """CLIP's loss of two [B, D]: each row is to find its partner among all (arXiv 2103.00020, fig. 3)."""
    scale = log_scale.float().exp().clamp(max=100)
    logits = scale * F.normalize(one.float(), dim=1) @ F.normalize(other.float(), dim=1).T
    own = torch.arange(len(logits), device=logits.device)
    return (F.cross_entropy(logits, own) + F.cross_entropy(logits.T, own)) / 2


def label_loss(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Mean cross-entropy of the first labels of LABELS: logits [B, sum of counts], labels [B, some]."""
    parts = logits.float().split(small.COUNTS[: labels.shape[1]], dim=1)
    return sum(F.cross_entropy(part, labels[:, i]) for i, part in enumerate(parts)) / len(parts)


class Aside(nn.Module):
    """What the text encoders learn with and the pipeline does not need.

    It has an image tower, heads that read attributes, and temperatures.

    SDXL hands the UNet the states before the last layer, so the heads read the mean of those.
    The contrast reads the pooled text.
    """

    def __init__(self, encoders):
        super().__init__()
        first, second = (encoder.config for encoder in encoders)
        self.tower = small.Judge(outputs=2 * second.projection_dim)
        self.projection = nn.Linear(first.hidden_size, second.projection_dim)
        self.heads = nn.ModuleList(nn.Linear(config.hidden_size, sum(small.COUNTS[:-1])) for config in (first, second))
        self.log_scales = nn.Parameter(torch.full((2,), math.log(10)))

    def forward(self, outputs, pictures, attributes):
        seen = self.tower(pictures).chunk(2, dim=1)
        read = (self.projection(outputs[0].pooler_output), outputs[1].text_embeds)
        contrasts = [contrast(a, b, scale) for a, b, scale in zip(read, seen, self.log_scales)]
        labels = [label_loss(logits, attributes) for logits in self.attribute_logits(outputs)]
        return sum(contrasts) + sum(labels)

    def attribute_logits(self, outputs) -> list[torch.Tensor]:
        """What each head reads in the output of its encoder: [B, sum of counts]."""
        return [head(output.hidden_states[-2].mean(1)) for head, output in zip(self.heads, outputs)]
