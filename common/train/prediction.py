"""What the frozen UNet predicts, measured before it is trained: epsilon or v, by its error on a few cached samples.

The two targets, eps and v = sqrt(a) eps - sqrt(1 - a) z, differ most where noise is strong (a small). There v is nearly
-z, of which a UNet for epsilon knows nothing; a UNet for v, in turn, has little of eps in its output. Four forward
passes of one image decide.
"""

from dataclasses import replace

import torch

from common.data.batching import Examples
from common.errors import UserError
from common.model import noise
from common.model.adapters import without_dropout
from common.model.model_kind import EPSILON, V_PREDICTION
from common.train.engine import Engine

LEVELS = (0.1, 0.06, 0.03, 0.015)  # alphas_cumprod of the passes: timesteps 680 to 890 of SDXL's 1000
# A target is predicted when its error, as a share of its own mean square, is below PREDICTED, and below CLEARLY times
# that of the other target. An untrained UNet has 1 and more for both.
PREDICTED = 0.85
CLEARLY = 0.7


@torch.no_grad()
def relative_errors(engine: Engine, examples: Examples) -> dict[str, float]:
    """{prediction type: squared error of the UNet against that target, as a share of the target's own mean square}."""
    schedules = {kind: replace(engine.schedule, prediction_type=kind) for kind in (EPSILON, V_PREDICTION)}
    timesteps = [int((engine.schedule.alphas_cumprod - level).abs().argmin()) for level in LEVELS]
    errors = dict.fromkeys(schedules, 0.0)
    squares = dict.fromkeys(schedules, 0.0)
    with without_dropout([engine.unet, *engine.text.encoders]):
        for batch in examples.probes(timesteps):
            fields = {name: tensor.to(engine.host.device) for name, tensor in batch.tensors.items()}
            predicted, _ = engine.predict(fields)
            z = fields["mean"].float() + fields["std"].float() * fields["posterior_eps"]
            for kind, schedule in schedules.items():
                target = schedule.noise(z, fields["eps"], fields["t"])[1]
                errors[kind] += noise.mse_per_sample(predicted, target).item()
                squares[kind] += target.square().mean().item()
    return {kind: errors[kind] / squares[kind] for kind in schedules}


def check(engine: Engine, data) -> None:
    """Compare what the model's files or the flags say with what its UNet does, before the first step.

    A UNet that was not trained yet, or one in between, passes. A mark of v-prediction in the model's own files is
    nobody's default: there a disagreement is said, and training goes on.

    Args:
        data: assembly.Data.
    Raises:
        UserError: the UNet clearly predicts the other target.
    """
    kind = data.model.kind
    other = V_PREDICTION if kind.prediction_type == EPSILON else EPSILON
    errors = relative_errors(engine, data.examples)
    if not (errors[other] < PREDICTED and errors[other] < CLEARLY * errors[kind.prediction_type]):
        return

    # What was said against what was measured
    said = kind.prediction_type
    measured = (
        f"--pretrained_model_name_or_path {data.model.name}: is said to predict {said} (by {kind.said_by}), but its"
        f" error is {errors[other]:.2f} for {other} and {errors[said]:.2f} for {said} (untrained: 1)"
    )
    if kind.prediction_type == V_PREDICTION and not kind.said_by.startswith("--prediction_type"):
        engine.host.say(f"warning: {measured}; if that mark is wrong, correct it: what is trained would be of no use")
        return
    raise UserError(f"{measured}; use --prediction_type {other}")
