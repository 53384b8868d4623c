"""What happens where a loss or a gradient is not finite, or explodes: --non-finite stop, skip or rollback."""

import math
from typing import TYPE_CHECKING

from quire.errors import UserError
from quire.progress import say

if TYPE_CHECKING:
    from quire.training.loop import Trainer

EXPLODED = 2.0  # times the first loss
PASSES = 10  # steps in a row that may be passed over before training stops


def trusted(trainer: "Trainer", loss: float) -> bool:
    """Whether the step's gradients may be applied."""
    state = trainer.state
    if state.first_loss is None and math.isfinite(loss):
        state.first_loss = loss
    # An overflow of float16's range is not a fault: the scaler passes over the step and lowers its scale.
    overflow = trainer.scaler.is_enabled() and not math.isfinite(trainer.gradient_norm)
    finite = math.isfinite(loss) and (overflow or math.isfinite(trainer.gradient_norm))
    return finite and loss <= EXPLODED * max(state.first_loss or 0.0, 1.0)


def pass_over(trainer: "Trainer", loss: float) -> None:
    """Leave the weights alone; then stop, go on, or go back to the best checkpoint with half the learning rate."""
    state = trainer.state
    state.passed_over += 1
    what = f"the loss became {loss:.4g}" if math.isfinite(loss) else "the loss is not finite"
    if math.isfinite(loss) and not math.isfinite(trainer.gradient_norm):
        what = "the gradient is not finite"
    if trainer.settings.non_finite != "skip" or state.passed_over > PASSES:
        blame(trainer, what, stop=state.passed_over > PASSES)


def blame(trainer: "Trainer", what: str, stop: bool) -> None:
    """Go back to the best checkpoint with half the learning rate, where that is the policy; otherwise stop."""
    step, settings = trainer.state.step, trainer.settings
    cause = f"The likeliest cause is a learning rate that is too high ({settings.learning_rate:g})"
    if stop or settings.non_finite != "rollback":
        raise UserError(
            f"At step {step} {what}; training stopped, and the checkpoints from before are kept."
            f" {cause}: start anew with a lower --learning-rate, or with --non-finite rollback."
        )
    trainer.roll_back()
    say(f"At step {step} {what}: back to the best weights so far, at half the learning rate. {cause}.")
