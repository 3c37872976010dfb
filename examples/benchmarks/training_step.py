"""
A whole training step, ours against the authors' loop as restated in `official_loop.py`: time, memory, and the achieved
fraction of the CPU's matrix-product rate.

    python examples/benchmarks/training_step.py

Both sides get the same clean log-mel crops and initial weights and draw their own masks. Ours runs inside
`ASiTPreTrainer.train`.
"""

import logging
import tempfile
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from itertools import chain, repeat
from multiprocessing import get_context
from multiprocessing.connection import Connection
from operator import itemgetter
from pathlib import Path
from typing import Any

import torch
from common import Report, Row, medians, ranges, run_alone, time_interleaved
from official_loop import OfficialLoop
from torch.profiler import ProfilerActivity, profile
from torch.utils.data import IterableDataset
from torch.utils.flop_counter import FlopCounterMode
from transformers import PrinterCallback, TrainerCallback

from asit_hf import ASiTConfig, ASiTFeatureExtractor, ASiTForPreTraining
from asit_hf.pretraining.arguments import ASiTPreTrainingArguments
from asit_hf.pretraining.presets import get_preset
from asit_hf.pretraining.trainer import ASiTPreTrainer

BATCH = 4
MEMORY_BATCHES = (4, 16)
PRESETS = ("2023", "2024")
PRECISIONS = ("fp32", "bf16")
TARGETS = {
    ("2023", "fp32"): 1.0,
    ("2023", "bf16"): 1.25,
    ("2023", "best / fp32"): 2.2,
    ("2024", "bf16"): 1.4,
}
MEMORY_TARGET = 0.4
TOY = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 64,
    "num_frames": 96,
    "num_mel_bins": 32,
    "distillation_hidden_size": 32,
    "distillation_bottleneck_size": 16,
    "num_prototypes": 64,
}
# Kinds of operations, and the substrings of their names in a profile.
KINDS = {
    "matrix products": ("aten::mm", "aten::addmm", "aten::bmm", "aten::baddbmm", "mkldnn_conv", "convolution_back"),
    "fused attention": ("scaled_dot_product",),
    "softmax": ("softmax", "logsumexp", "aten::exp"),
    "activations and norms": ("gelu", "layer_norm"),
    "copies and casts": ("aten::copy_", "aten::cat", "aten::fill_", "aten::zero_", "aten::index"),
    "optimizer": ("adamw",),
}


def build_model(preset: str, quick: bool = False) -> ASiTForPreTraining:
    """The small model of a preset (a toy with `quick`), always with the same weights."""
    torch.manual_seed(0)
    fields = {**get_preset(preset).config, "drop_path_rate": 0.1}
    if quick:
        return ASiTForPreTraining(ASiTConfig(**fields, **TOY))
    return ASiTForPreTraining(ASiTConfig.from_size("small", **fields))


def build_batch(config: ASiTConfig, preset: str, size: int) -> dict[str, torch.Tensor]:
    """Log-mel crops of `size` clips: two of the model's length, and the preset's local crops of a third of it."""
    generator = torch.Generator().manual_seed(0)
    frames, mel, crops = config.num_frames, config.num_mel_bins, get_preset(preset).num_local_crops
    batch = {
        "input_values": torch.randn(size, 2, frames, mel, generator=generator),
        "sample_keys": torch.arange(size),
    }
    if crops:
        local_frames = frames // 3 // config.patch_size * config.patch_size
        batch["local_values"] = torch.randn(size, crops, local_frames, mel, generator=generator)
    return batch


class Batches(IterableDataset):
    """The given batches; the last one is repeated forever."""

    def __init__(self, *batches: dict[str, torch.Tensor]):
        self.batches = batches

    def __iter__(self) -> Iterator[dict[str, torch.Tensor]]:
        return chain(self.batches, repeat(self.batches[-1]))


def build_trainer(
    model: ASiTForPreTraining,
    dataset: Any,
    folder: str | Path,
    trainer_class: type[ASiTPreTrainer] = ASiTPreTrainer,
    **options: Any,
) -> ASiTPreTrainer:
    """Our trainer on a CPU, without logs, plots or checkpoints unless `options` of its arguments ask for them."""
    quiet = {"report_to": "none", "logging_strategy": "no", "save_strategy": "no", "plot_steps": 0}
    args = ASiTPreTrainingArguments(output_dir=str(folder), use_cpu=True, disable_tqdm=True, **{**quiet, **options})
    extractor = ASiTFeatureExtractor(num_mel_bins=model.config.num_mel_bins)
    trainer = trainer_class(model=model, args=args, train_dataset=dataset, processing_class=extractor)
    trainer.remove_callback(PrinterCallback)
    return trainer


class Contestant:
    """
    A process that makes one training step per call: "ours" inside `ASiTPreTrainer.train`, "theirs" in
    [`OfficialLoop`]. Threads of separate processes do not compete while one side is idle.

    Args:
        side (`str`): "ours" or "theirs", a space, and "bf16" or "fp32".
        sizes (`list[int]`): sizes of the first batches; the last size is repeated.
        options: arguments of our trainer.
    """

    def __init__(self, side: str, preset: str, sizes: list[int], quick: bool = False, **options: Any):
        context = get_context("forkserver")  # forking a process with running threads is unsafe
        context.set_forkserver_preload(["asit_hf.pretraining.trainer"])
        self._connection, theirs = context.Pipe()
        arguments = (theirs, side, preset, sizes, quick, options)
        self._process = context.Process(target=_compete, args=arguments, daemon=True)
        self._process.start()
        theirs.close()

    def __call__(self, command: str = "step") -> Any:
        """One step; for what each command returns see `_reply`."""
        self._connection.send(command)
        reply = self._connection.recv()
        if isinstance(reply, Exception):
            raise reply
        return reply

    def stop(self) -> None:
        self._connection.send("stop")
        self._process.join()


def _compete(
    connection: Connection, side: str, preset: str, sizes: list[int], quick: bool, options: dict[str, Any]
) -> None:
    logging.getLogger("transformers").setLevel(logging.ERROR)
    side, precision = side.split()
    try:
        model = build_model(preset, quick)
        batches = Batches(*(build_batch(model.config, preset, size) for size in sizes))
        if side == "ours":
            options |= {"preset": preset, "bf16": precision == "bf16", "learning_rate": 1e-6}
            options |= {"max_steps": 1000, "steps_per_epoch": 1000, "freeze_last_layer_epochs": 0}
            with tempfile.TemporaryDirectory() as folder:
                trainer = build_trainer(model, batches, folder, per_device_train_batch_size=1, **options)
                trainer.data_collator = itemgetter(0)  # one item is a batch
                trainer.add_callback(_OnCommand(connection))
                trainer.train()
        else:
            loop = OfficialLoop(model, get_preset(preset).gmml, bf16=precision == "bf16")
            for batch in batches:
                context = _await(connection)
                with context:
                    loop.step(batch["input_values"], batch.get("local_values"))
                connection.send(_reply(context))
    except Exception as error:
        connection.recv()
        connection.send(error)


class _OnCommand(TrainerCallback):
    def __init__(self, connection: Connection):
        self.connection = connection

    def on_step_begin(self, args, state, control, **kwargs):
        self.context = _await(self.connection)
        self.context.__enter__()

    def on_step_end(self, args, state, control, **kwargs):
        self.context.__exit__(None, None, None)
        self.connection.send(_reply(self.context))


def _await(connection: Connection) -> AbstractContextManager:
    """Waits for a command; returns the context in which to run the step."""
    command = connection.recv()
    if command == "stop":
        raise SystemExit
    if command == "profile":
        return profile(activities=[ProfilerActivity.CPU])
    return FlopCounterMode(display=False) if command == "count" else nullcontext()


def _reply(context: AbstractContextManager) -> Any:
    """For "profile", time fractions by kind; for "count", operations; for "step", the process's peak memory in MB."""
    if isinstance(context, FlopCounterMode):
        return context.get_total_flops()
    if not isinstance(context, profile):
        # not getrusage, whose peak is inherited from the parent process
        status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
        return int(status["VmHWM"].split()[0]) / 1024
    shares = dict.fromkeys([*KINDS, "the rest"], 0.0)
    for event in context.key_averages():
        kinds = (kind for kind, names in KINDS.items() if any(name in event.key.lower() for name in names))
        shares[next(kinds, "the rest")] += event.self_cpu_time_total
    return {kind: share / sum(shares.values()) for kind, share in shares.items()}


def measure(quick: bool = False) -> Report:
    """Step time and memory of both presets, our trainer's options, and a profile."""
    report = Report("training step")
    for preset in PRESETS:
        _measure_steps(report, preset, quick)
    _measure_options(report, quick)
    if not quick:  # a toy's memory is negligible
        for preset in PRESETS:
            _measure_memory(report, preset)
    return report


def _measure_steps(report: Report, preset: str, quick: bool) -> None:
    sides = [f"{side} {precision}" for precision in ("bf16", "fp32") for side in ("ours", "theirs")]
    runs = {side: Contestant(side, preset, [BATCH], quick) for side in sides}
    products = {f"matmul {precision}": MatrixProducts(precision, 64 if quick else 2048) for precision in PRECISIONS}
    flops = runs["theirs fp32"]("count")
    seconds = time_interleaved({**runs, **products}, rounds=1 if quick else 4)
    shares = runs["ours bf16"]("profile")
    for run in runs.values():
        run.stop()

    found = medians(seconds)
    for precision in PRECISIONS:
        ours, theirs = found[f"ours {precision}"], found[f"theirs {precision}"]
        target = TARGETS.get((preset, precision))
        report.add(Row(f"{preset}, {precision} against {precision}", ours, theirs, target=target))
    best = min(found["ours bf16"], found["ours fp32"])
    target = TARGETS.get((preset, "best / fp32"))
    report.add(Row(f"{preset}, best against fp32", best, found["theirs fp32"], target=target))
    report.notes.append(f"{preset}: {ranges(seconds)}.")
    for precision in PRECISIONS:
        rate = products[f"matmul {precision}"].flops / found[f"matmul {precision}"]
        reached = flops / found[f"ours {precision}"]
        report.notes.append(
            f"{preset}, {precision}: the loop's {flops / 1e9:.0f} GF in {found[f'ours {precision}']:.2f} s are "
            f"{reached / 1e9:.0f} GF/s, {reached / rate:.0%} of the {rate / 1e9:.0f} GF/s of a matrix product."
        )
    listed = ", ".join(f"{kind} {share:.0%}" for kind, share in shares.items())
    report.notes.append(f"{preset}, profile of one of our steps in bf16: {listed}.")


class MatrixProducts:
    """Square matrix products, whose rate is the reference for training steps."""

    def __init__(self, precision: str, size: int, count: int = 5):
        dtype = torch.bfloat16 if precision == "bf16" else torch.float32
        self.left, self.right = torch.randn(2, size, size).to(dtype)
        self.count = count
        self.flops = 2 * size**3 * count

    def __call__(self) -> None:
        for _ in range(self.count):
            self.left @ self.right


def _measure_options(report: Report, quick: bool) -> None:
    """Effect of Trainer's options on our step, preset 2023 in bf16."""
    options = {
        "default": {},
        "AdamW not fused": {"optim": "adamw_torch"},
        "gradient checkpointing": {"activation_checkpointing": True},
        "2 accumulated passes": {"gradient_accumulation_steps": 2},
        "freed memory not kept": {"keep_freed_memory": False},
    }
    runs = {name: Contestant("ours bf16", "2023", [BATCH], quick, **chosen) for name, chosen in options.items()}
    seconds = time_interleaved(runs, rounds=1 if quick else 3)
    for run in runs.values():
        run.stop()
    found = medians(seconds)
    found["2 accumulated passes"] /= 2  # per pass
    for name in list(options)[1:]:
        report.add(Row(f"2023, bf16, {name} against default", found[name], found["default"]))
    report.notes.append(f"options, 2023 in bf16: {ranges(seconds)}.")
    model = build_model("2023", quick)
    updates = {"foreach": lambda: model.update_teacher(0.996), "loop": lambda: _update_in_loop(model, 0.996)}
    found = medians(time_interleaved(updates, rounds=1 if quick else 5))
    report.add(Row("teacher's update, foreach against a loop", found["foreach"], found["loop"]))


@torch.no_grad()
def _update_in_loop(model: ASiTForPreTraining, momentum: float) -> None:
    for teacher, student in model._teacher_and_student():
        teacher.mul_(momentum).add_((1 - momentum) * student)


def _measure_memory(report: Report, preset: str) -> None:
    """Peak memory after two steps: one with a single clip, which allocates the optimizer's state, and a full one."""
    peaks: dict[tuple[str, int], float] = {}
    for side in ("ours bf16", "theirs fp32"):
        for size in MEMORY_BATCHES:
            run = Contestant(side, preset, [1, size])
            run()
            peaks[side, size] = run()
            run.stop()
    few, many = MEMORY_BATCHES
    ours, theirs = ((peaks[side, many] - peaks[side, few]) / (many - few) for side in ("ours bf16", "theirs fp32"))
    name = f"{preset}, memory per added clip, bf16 against fp32"
    report.add(Row(name, ours, theirs, unit="MB", target=MEMORY_TARGET, at_most=True))
    listed = ", ".join(f"{side} {size} clips {peak:.0f} MB" for (side, size), peak in peaks.items())
    report.notes.append(f"{preset}, peak memory of a process: {listed}.")


if __name__ == "__main__":
    run_alone(measure)
