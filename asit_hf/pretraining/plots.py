"""What a pretraining run shows of itself; the trainer adds it where `plot_steps` is above 0."""

from pathlib import Path

from transformers import TrainerCallback
from transformers.integrations import TensorBoardCallback

from ..plotting import Figure, plot_curves, plot_reconstruction

CURVES = (
    "loss",
    "global_loss",
    "local_loss",
    "reconstruction_loss",
    "cls_entropy",
    "patch_entropy",
    "feature_std",
    "learning_rate",
    "grad_norm",
)


class PlotCallback(TrainerCallback):
    """
    Every `plot_steps` steps and at the end: a reconstruction of the first clip of the batch and the curves so far,
    as PNG in `output_dir/pictures` and, where TensorBoard is reported to, there too.
    """

    def __init__(self, trainer):
        self.trainer = trainer

    def on_step_end(self, args, state, control, **kwargs):
        # the last step's, not on_train_end: by then TensorBoard's writer is closed
        if state.global_step % args.plot_steps == 0 or state.global_step == state.max_steps:
            self.draw(args, state)

    def draw(self, args, state) -> None:
        if not state.is_world_process_zero:
            return
        if self.trainer.last_example is not None:
            figure = plot_reconstruction(**self.trainer.last_example)
            self._save(figure, args, state, f"reconstruction-{state.global_step}")
        if any("loss" in row for row in state.log_history):
            self._save(plot_curves(state.log_history, CURVES), args, state, "curves")

    def _save(self, figure: Figure, args, state, name: str) -> None:
        folder = Path(args.output_dir) / "pictures"
        folder.mkdir(parents=True, exist_ok=True)
        figure.savefig(folder / f"{name}.png", dpi=110)
        for callback in self.trainer.callback_handler.callbacks:
            writer = getattr(callback, "tb_writer", None)
            if isinstance(callback, TensorBoardCallback) and writer is not None:
                writer.add_figure(name.split("-")[0], figure, state.global_step)
