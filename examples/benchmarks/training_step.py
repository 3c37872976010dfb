"""
A whole training step, ours against the authors' loop restated in `official_loop.py`: seconds, memory, and the share of
the processor's matrix-product rate that is reached.

    python examples/benchmarks/training_step.py

Both sides take the same clean log-mel crops, start from the same weights and draw their own masks. Ours runs inside
`ASiTPreTrainer.train`.
"""

import argparse
import json
import logging
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from itertools import chain, repeat
from operator import itemgetter
from pathlib import Path
from typing import Any

import torch
from common import Report, Row, medians, run_alone, spread, time_interleaved
from official_loop import OfficialLoop
from torch.profiler import ProfilerActivity, profile
from torch.utils.data import IterableDataset
from torch.utils.flop_counter import FlopCounterMode
from transformers import PrinterCallback, TrainerCallback

from asit_hf import ASiTConfig, ASiTFeatureExtractor, ASiTForPreTraining
from asit_hf.pretraining.objectives import get_objective
from asit_hf.pretraining.trainer import ASiTPreTrainer, ASiTPreTrainingArguments

BATCH = 4
MEMORY_BATCHES = (4, 16)
OBJECTIVES = ("2023", "2024")
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
# What a profile calls the operations, and what they are.
KINDS = {
    "matrix products": ("aten::mm", "aten::addmm", "aten::bmm", "aten::baddbmm", "mkldnn_conv", "convolution_back"),
    "fused attention": ("scaled_dot_product",),
    "softmax": ("softmax", "logsumexp", "aten::exp"),
    "activations and norms": ("gelu", "layer_norm"),
    "copies and casts": ("aten::copy_", "aten::cat", "aten::fill_", "aten::zero_", "aten::index"),
    "optimiser": ("adamw",),
}


def build_model(objective: str, quick: bool = False) -> ASiTForPreTraining:
    """The small model of an objective (a toy with `quick`), always with the same weights."""
    torch.manual_seed(0)
    fields = {**get_objective(objective).config, "drop_path_rate": 0.1}
    if quick:
        return ASiTForPreTraining(ASiTConfig(**fields, **TOY))
    return ASiTForPreTraining(ASiTConfig.from_size("small", **fields))


def build_batch(config: ASiTConfig, objective: str, size: int) -> dict[str, torch.Tensor]:
    """Log-mel crops of `size` clips: two of the model's length, and the objective's local crops of a third of it."""
    generator = torch.Generator().manual_seed(0)
    frames, mel, crops = config.num_frames, config.num_mel_bins, get_objective(objective).num_local_crops
    batch = {
        "input_values": torch.randn(size, 2, frames, mel, generator=generator),
        "sample_keys": torch.arange(size),
    }
    if crops:
        local_frames = frames // 3 // config.patch_size * config.patch_size
        batch["local_values"] = torch.randn(size, crops, local_frames, mel, generator=generator)
    return batch


class Batches(IterableDataset):
    """Whole batches, the last of them for ever."""

    def __init__(self, *batches: dict[str, torch.Tensor]):
        self.batches = batches

    def __iter__(self) -> Iterator[dict[str, torch.Tensor]]:
        return chain(self.batches, repeat(self.batches[-1]))


def build_trainer(
    model: ASiTForPreTraining, objective: str, batches: Batches, folder: str, **options: Any
) -> ASiTPreTrainer:
    """Our trainer on ready batches; it writes and logs nothing. `options` go to its arguments."""
    args = ASiTPreTrainingArguments(
        output_dir=folder,
        objective=objective,
        per_device_train_batch_size=1,  # one item is a batch
        steps_per_epoch=1000,
        **{"max_steps": 1000, **options},
        learning_rate=1e-6,
        freeze_last_layer_epochs=0,
        use_cpu=True,
        report_to="none",
        save_strategy="no",
        logging_strategy="no",
        picture_steps=0,
        disable_tqdm=True,
    )
    trainer = ASiTPreTrainer(
        model=model,
        args=args,
        train_dataset=batches,
        processing_class=ASiTFeatureExtractor(num_mel_bins=model.config.num_mel_bins),
        data_collator=itemgetter(0),
    )
    trainer.remove_callback(PrinterCallback)
    return trainer


class _Stopped(Exception):
    pass


class SteppedRun(TrainerCallback):
    """`trainer.train()` in a thread of its own, which goes one optimiser step further at each call of `step`."""

    def __init__(self, trainer: ASiTPreTrainer):
        self._go, self._done = threading.Semaphore(0), threading.Semaphore(0)
        self._stops = False
        self._context: AbstractContextManager = nullcontext()
        self._error: BaseException | None = None
        trainer.add_callback(self)
        self._thread = threading.Thread(target=self._train, args=(trainer,), daemon=True)

    def step(self, context: AbstractContextManager | None = None) -> None:
        """One step; `context` is entered around it, in the thread that trains."""
        self._context = nullcontext() if context is None else context
        if not self._thread.is_alive():
            self._thread.start()
        self._go.release()
        self._done.acquire()
        if self._error is not None:
            raise self._error

    def stop(self) -> None:
        self._stops = True
        self._go.release()
        self._thread.join()

    def on_step_begin(self, args, state, control, **kwargs):
        self._go.acquire()
        if self._stops:
            raise _Stopped
        self._context.__enter__()

    def on_step_end(self, args, state, control, **kwargs):
        self._context.__exit__(None, None, None)
        self._done.release()

    def _train(self, trainer: ASiTPreTrainer) -> None:
        try:
            trainer.train()
        except _Stopped:
            pass
        except BaseException as error:
            self._error = error
            self._done.release()


def measure(quick: bool = False) -> Report:
    """Steps and memory of both objectives, options of ours, and where the time goes."""
    logging.getLogger("transformers").setLevel(logging.ERROR)
    report = Report("training step")
    with tempfile.TemporaryDirectory() as folder:
        for objective in OBJECTIVES:
            _measure_steps(report, objective, folder, quick)
        _measure_options(report, folder, quick)
    if not quick:  # toys take no memory to speak of
        for objective in OBJECTIVES:
            _measure_memory(report, objective)
    return report


def _measure_steps(report: Report, objective: str, folder: str, quick: bool) -> None:
    batch = build_batch(build_model(objective, quick).config, objective, BATCH)
    runs = {
        f"ours {precision}": SteppedRun(
            build_trainer(build_model(objective, quick), objective, Batches(batch), folder, bf16=precision == "bf16")
        )
        for precision in ("bf16", "fp32")
    }
    loops = {
        f"theirs {precision}": OfficialLoop(
            build_model(objective, quick), get_objective(objective).gmml, bf16=precision == "bf16"
        )
        for precision in ("bf16", "fp32")
    }
    calls: dict[str, Callable[[], object]] = {}
    for precision in ("bf16", "fp32"):
        calls[f"ours {precision}"] = runs[f"ours {precision}"].step
        calls[f"theirs {precision}"] = lambda loop=loops[f"theirs {precision}"]: _official_step(loop, batch)
        calls[f"matmul {precision}"] = MatrixProducts(precision, 64 if quick else 2048)
    with FlopCounterMode(display=False) as counter:
        _official_step(loops["theirs fp32"], batch)
    flops = counter.get_total_flops()
    seconds = time_interleaved(calls, rounds=1 if quick else 4)
    table = profile_step(runs["ours bf16"])
    for run in runs.values():
        run.stop()

    found = medians(seconds)
    for precision in ("fp32", "bf16"):
        report.add(
            Row(
                f"{objective}, {precision} against {precision}",
                found[f"ours {precision}"],
                found[f"theirs {precision}"],
                target=TARGETS.get((objective, precision)),
            )
        )
    best = min(found["ours bf16"], found["ours fp32"])
    target = TARGETS.get((objective, "best / fp32"))
    report.add(Row(f"{objective}, best against fp32", best, found["theirs fp32"], target=target))
    report.notes.append(f"{objective}: {spread(seconds)}.")
    for precision in ("bf16", "fp32"):
        rate = calls[f"matmul {precision}"].flops / found[f"matmul {precision}"]
        reached = flops / found[f"ours {precision}"]
        report.notes.append(
            f"{objective}, {precision}: the loop's {flops / 1e9:.0f} GF in {found[f'ours {precision}']:.2f} s are "
            f"{reached / 1e9:.0f} GF/s, {reached / rate:.0%} of the {rate / 1e9:.0f} GF/s of a matrix product."
        )
    report.notes.append(f"{objective}, profile of one of our steps in bf16: {table}.")


def _official_step(loop: OfficialLoop, batch: dict[str, torch.Tensor]) -> None:
    loop.step(batch["input_values"], batch.get("local_values"))


class MatrixProducts:
    """Square matrix products: the rate that steps are compared with."""

    def __init__(self, precision: str, size: int, count: int = 5):
        dtype = torch.bfloat16 if precision == "bf16" else torch.float32
        self.left, self.right = torch.randn(2, size, size).to(dtype)
        self.count = count
        self.flops = 2 * size**3 * count

    def __call__(self) -> None:
        for _ in range(self.count):
            self.left @ self.right


def profile_step(run: SteppedRun) -> str:
    """`kind share, ...` of the time of one step."""
    profiler = profile(activities=[ProfilerActivity.CPU])
    run.step(profiler)
    shares = dict.fromkeys([*KINDS, "the rest"], 0.0)
    for event in profiler.key_averages():
        kinds = (kind for kind, names in KINDS.items() if any(name in event.key.lower() for name in names))
        shares[next(kinds, "the rest")] += event.self_cpu_time_total
    total = sum(shares.values())
    return ", ".join(f"{kind} {share / total:.0%}" for kind, share in shares.items())


def _measure_options(report: Report, folder: str, quick: bool) -> None:
    """What Trainer's options do to our step, objective 2023 in bf16."""
    options = {
        "as it is": {},
        "AdamW not fused": {"optim": "adamw_torch"},
        "gradient checkpointing": {"activation_checkpointing": True},
        "2 accumulated passes": {"gradient_accumulation_steps": 2},
    }
    batch = build_batch(build_model("2023", quick).config, "2023", BATCH)
    runs = {
        name: SteppedRun(
            build_trainer(build_model("2023", quick), "2023", Batches(batch), folder, bf16=True, **chosen)
        )
        for name, chosen in options.items()
    }
    seconds = time_interleaved({name: run.step for name, run in runs.items()}, rounds=1 if quick else 3)
    for run in runs.values():
        run.stop()
    found = medians(seconds)
    found["2 accumulated passes"] /= 2  # a pass each
    for name in list(options)[1:]:
        report.add(Row(f"2023, bf16, {name} against without", found[name], found["as it is"]))
    report.notes.append(f"options, 2023 in bf16: {spread(seconds)}.")
    model = build_model("2023", quick)
    updates = {"foreach": lambda: model.update_teacher(0.996), "loop": lambda: _update_in_loop(model, 0.996)}
    found = medians(time_interleaved(updates, rounds=1 if quick else 5))
    report.add(Row("teacher's update, foreach against a loop", found["foreach"], found["loop"]))


@torch.no_grad()
def _update_in_loop(model: ASiTForPreTraining, momentum: float) -> None:
    for teacher, student in model._teacher_and_student():
        teacher.mul_(momentum).add_((1 - momentum) * student)


def _measure_memory(report: Report, objective: str) -> None:
    peaks = {
        (side, size): _peak_in_subprocess(side, objective, size)
        for side in ("ours bf16", "theirs fp32")
        for size in MEMORY_BATCHES
    }
    few, many = MEMORY_BATCHES
    slopes = {side: (peaks[side, many] - peaks[side, few]) / (many - few) for side, _ in peaks}
    report.add(
        Row(
            f"{objective}, memory per added clip, bf16 against fp32",
            slopes["ours bf16"],
            slopes["theirs fp32"],
            unit="MB",
            target=MEMORY_TARGET,
            at_most=True,
        )
    )
    listed = ", ".join(f"{side} {size} clips {peak:.0f} MB" for (side, size), peak in peaks.items())
    report.notes.append(f"{objective}, peak memory of a process: {listed}.")


def _peak_in_subprocess(side: str, objective: str, size: int) -> float:
    command = [sys.executable, __file__, "--peak", side, "--objective", objective, "--batch", str(size)]
    return json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout.splitlines()[-1])


def peak_memory(side: str, objective: str, size: int, quick: bool = False) -> float:
    """Peak memory in MB of this process after a step of one clip, for the optimiser's state, and a step of all."""
    side, precision = side.split()
    model = build_model(objective, quick)
    batches = [build_batch(model.config, objective, count) for count in (1, size)]
    if side == "ours":
        with tempfile.TemporaryDirectory() as folder:
            options = {"bf16": precision == "bf16", "max_steps": len(batches)}
            build_trainer(model, objective, Batches(*batches), folder, **options).train()
    else:
        loop = OfficialLoop(model, get_objective(objective).gmml, bf16=precision == "bf16")
        for batch in batches:
            _official_step(loop, batch)
    # not getrusage: its peak is inherited from the process that started this one
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(status["VmHWM"].split()[0]) / 1024


if __name__ == "__main__":
    if "--peak" in sys.argv:
        parser = argparse.ArgumentParser()
        parser.add_argument("--peak")
        parser.add_argument("--objective")
        parser.add_argument("--batch", type=int)
        chosen = parser.parse_args()
        print(json.dumps(peak_memory(chosen.peak, chosen.objective, chosen.batch)))
    else:
        run_alone(measure)
