"""A simulated clock for runs with `max_minutes`."""

from transformers import TrainerCallback


class FakeClock(TrainerCallback):
    """
    Added to a trainer, it makes every optimizer step last `step` seconds.

    Args:
        step (`float`): seconds per step.
        first (`float`): additional seconds of the first step of a process.
        events (`dict[int, float]`): additional seconds after these steps, for example for a checkpoint.
        evaluation (`float`): seconds per evaluated batch.
    """

    def __init__(self, step: float = 1.0, first: float = 0.0, events=None, evaluation: float = 0.0):
        self.step, self.first, self.events, self.evaluation = step, first, events or {}, evaluation
        self.seconds = 1000.0  # like a real clock, it does not start at 0
        self.rates: list[float] = []

    def __call__(self) -> float:
        return self.seconds

    def on_train_begin(self, args, state, control, **kwargs):
        self.first_step = state.global_step

    def on_step_begin(self, args, state, control, **kwargs):
        self.seconds += self.step + self.first * (state.global_step == self.first_step)

    def on_pre_optimizer_step(self, args, state, control, optimizer=None, **kwargs):
        self.rates.append(optimizer.param_groups[-1]["lr"])

    def on_step_end(self, args, state, control, **kwargs):
        self.seconds += self.events.get(state.global_step, 0.0)

    def on_prediction_step(self, args, state, control, **kwargs):
        self.seconds += self.evaluation
