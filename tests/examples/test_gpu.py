"""`gpu.py` at toy sizes on a CPU, and its handling of failures. `make gpu-rehearsal` runs the whole script."""

import importlib
import json
import os
import time
import warnings
from collections import Counter
from dataclasses import fields
from pathlib import Path
from types import SimpleNamespace

import pytest
import tiny
import torch

from asit_hf import ASiTConfig, ASiTFeatureExtractor, ASiTModel
from asit_hf.data import packed, parcels
from asit_hf.utils.arguments import parse_arguments, recipe_arguments
from examples import run_pretraining

FOLDER = Path(__file__).parents[2] / "examples" / "benchmarks"
FAKES = """
import os, time

def good(run, value=1.0):
    return {"values": {"clips/s": value}, "detail": "all well"}

def bounded(run, value):
    return {"value": value}

def fails(run):
    raise ValueError("a plain error")

def loses_device(run):
    raise RuntimeError(f"CUDA error in process {os.getpid()}")

def dies(run):
    print("last words", flush=True)
    os._exit(3)

def hangs(run):
    (run.output_dir / "pid").write_text(str(os.getpid()))
    run.update({"values": {"steps": 7}})
    time.sleep(60)

def compiles(run, compiled=True):
    if compiled:
        os._exit(1)
    return {"values": {"layers": "eager"}}

def process(run):
    return {"values": {"pid": os.getpid()}}

def nothing(run):
    return {"status": "no GPU"}
"""


def load(name: str):
    return importlib.import_module(name)


@pytest.fixture
def run(tmp_path):
    return load("gpu").Run(tmp_path, tmp_path / "scratch", quick=True)


@pytest.fixture
def measure(tmp_path, monkeypatch):
    """Runs fake measurements, given as (name, function, arguments of `Measurement`); returns all rows by name."""
    gpu = load("gpu")
    (tmp_path / "fake_measurements.py").write_text(FAKES)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(gpu, "START", 20)

    def call(*measurements, seconds=60.0):
        report = gpu.Report(tmp_path, {"quick": False})
        written = []

        def write_and_read():
            gpu.Report.write(report)
            written.append([row["name"] for row in json.loads((tmp_path / "gpu.json").read_text())["rows"]])
            assert (tmp_path / "gpu.md").read_text().startswith("# On a GPU")

        report.write = write_and_read
        listed = [
            gpu.Measurement("checks", name, f"fake_measurements:{function}", **more)
            for name, function, more in measurements
        ]
        run = gpu.Run(tmp_path, tmp_path / "scratch")
        fine = gpu.run_all(listed, report, run, time.monotonic() + seconds)
        names = [name for name, _, _ in measurements]
        assert all(one == names[: len(one)] for one in written)
        return fine, report.rows

    return call


def test_failures_are_reported_and_the_next_measurement_runs(measure, tmp_path):
    fine, rows = measure(
        ("first", "process", {}),
        ("error", "fails", {}),
        ("same process", "process", {}),
        ("stuck", "hangs", {"seconds": 1}),
        ("after", "good", {}),
        ("dead", "dies", {}),
        ("device lost", "loses_device", {}),
        ("below", "bounded", {"bound": 1e-4, "options": {"value": 1e-5}}),
        ("above", "bounded", {"bound": 1e-4, "options": {"value": 1e-3}}),
        ("not a number", "bounded", {"bound": 1e-4, "options": {"value": float("nan")}}),
        ("alone", "process", {"alone": True}),
        ("last", "process", {}),
    )
    assert not fine
    assert [row["name"] for row in json.loads((tmp_path / "gpu.json").read_text())["rows"]] == list(rows)
    assert [row["status"] for row in rows.values()] == [
        *("measured", "error", "measured", "timed out", "measured", "error", "error"),
        *("passed", "failed", "failed", "measured", "measured"),
    ]
    assert "a plain error" in rows["error"]["detail"]
    assert rows["first"]["values"] == rows["same process"]["values"]  # a Python error does not end the process
    assert rows["stuck"]["values"] == {"steps": 7}  # reported before the timeout
    with pytest.raises(ProcessLookupError):
        os.kill(int((tmp_path / "pid").read_text()), 0)
    assert "exit code 3" in rows["dead"]["detail"]
    assert "last words" in rows["dead"]["detail"]
    assert len({rows[name]["values"]["pid"] for name in ("first", "alone", "last")}) == 3
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".gpu")]


def test_the_second_attempt_uses_the_fallback(measure):
    fine, rows = measure(("step", "compiles", {"fallback": {"compiled": False}}))
    assert fine
    assert rows["step"]["values"] == {"layers": "eager"}
    assert "second attempt" in rows["step"]["detail"]


def test_measurements_without_time_left_are_reported(measure):
    fine, rows = measure(("first", "good", {}), ("second", "good", {}), seconds=0)
    assert not fine
    assert {row["status"] for row in rows.values()} == {"not measured"}
    assert "no time" in rows["second"]["detail"]


def test_without_a_gpu_nothing_is_measured_at_full_size(measure, run):
    row = load("gpu_checks").facts(SimpleNamespace(quick=False))
    if not torch.cuda.is_available():
        assert row["status"] == "no GPU"
    assert load("gpu_checks").facts(run)["values"]["torch"]
    fine, rows = measure(("machine", "nothing", {}), ("next", "good", {}))
    assert not fine
    assert list(rows) == ["machine"]
    assert not (run.output_dir / "gpu.json").exists()  # it would overwrite an earlier run's


def test_phases_share_the_time_and_end_with_it(monkeypatch, tmp_path):
    gpu = load("gpu")
    ends = {}
    monkeypatch.setattr(
        gpu, "_measure", lambda measurement, *rest: ends.setdefault(measurement.phase, rest[-1]) and None
    )
    report = SimpleNamespace(rows={})
    start = time.monotonic()
    gpu.run_all(gpu.plan(quick=False), report, gpu.Run(tmp_path, tmp_path / "scratch"), start + 1000)
    assert list(ends) == ["machine", *gpu.PHASES]
    assert ends["training"] == pytest.approx(start + 1000, abs=5)
    assert ends["checks"] == pytest.approx(start + 1000 * gpu.SHARES["checks"], abs=5)


@pytest.mark.parametrize("quick", [True, False])
def test_every_planned_measurement_exists(quick):
    planned = load("gpu").plan(quick)
    assert max(Counter(one.name for one in planned).values()) == 1
    for one in planned:
        module, _, name = one.function.partition(":")
        assert callable(getattr(load(module), name)), one.function


@pytest.mark.slow
def test_fallbacks_halve_the_batch_and_use_eager_layers():
    with_fallbacks = load("gpu_trainer").with_fallbacks
    tried = []

    def measure(batch, compiled):
        tried.append((batch, compiled))
        if compiled:
            raise RuntimeError("no compiler")
        if batch > 32:
            raise torch.OutOfMemoryError("too much")
        return {"clips/s": 1.0}

    values, batch, compiled, reasons = with_fallbacks(measure, 128, compiled=True)
    assert tried == [(128, True), (128, False), (64, False), (32, False)]
    assert (values, batch, compiled, len(reasons)) == ({"clips/s": 1.0}, 32, False, 3)

    def always(error):
        def measure(batch, compiled):
            raise error

        return measure

    with pytest.raises(torch.OutOfMemoryError):
        with_fallbacks(always(torch.OutOfMemoryError("too much")), 4, compiled=False)
    with pytest.raises(RuntimeError, match="CUDA error"):  # only a new process recovers from it
        with_fallbacks(always(RuntimeError("CUDA error: misaligned address")), 4, compiled=True)


@pytest.mark.parametrize(
    ("function", "options", "bound"),
    [
        ("masks", {"preset": "2023"}, 0),
        ("log_mel", {}, 1e-4),
        ("gradients", {"preset": "2024", "bf16": False}, 1e-4),
        ("gradients", {"preset": "2023", "bf16": True}, 2e-2),
        ("checkpointing", {}, 1e-4),
        ("resumed", {}, 1e-4),
        pytest.param("sharded", {}, 1e-4, marks=pytest.mark.needs_cpu_fsdp),
    ],
)
def test_checks_pass_at_toy_size(run, function, options, bound):
    row = getattr(load("gpu_checks"), function)(run, **options)
    assert 0 <= row["value"] <= bound
    if options.get("bf16"):
        assert row["value"] > 1e-5  # not float32 compared with itself


def test_checks_detect_differences(run, monkeypatch):
    checks = load("gpu_checks")
    first, second = checks.train(run), checks.train(run, learning_rate=1e-2)
    assert checks.compare_losses(second, first)["value"] > 1e-4
    given = {"a": torch.ones(3), "b": torch.zeros(2)}
    assert checks.relative_error({**given, "b": torch.ones(2)}, given) == pytest.approx((2 / 3) ** 0.5)
    with pytest.raises(AssertionError, match="expected tensors"):
        checks.relative_error({"a": torch.ones(3)}, given)
    spectrograms = iter((torch.zeros(9), torch.full((9,), 0.5)))
    monkeypatch.setattr(checks, "log_mel_spectrogram", lambda *args: next(spectrograms))
    assert checks.log_mel(run)["value"] == 0.5


def test_synchronizations_of_one_step_are_counted_by_place(monkeypatch):
    modes = []
    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", modes.append)
    monkeypatch.setattr(warnings, "showwarning", lambda *args, **kwargs: None)
    watch = load("gpu_checks")._WatchSynchronizations()
    with warnings.catch_warnings():
        for step in range(1, 7):
            for _ in range(2):
                warnings.warn("called a synchronizing CUDA operation", stacklevel=1)
            warnings.warn("something else", stacklevel=1)
            watch.on_step_end(None, SimpleNamespace(global_step=step), None)
    assert modes == ["warn", "default"]
    assert sum(watch.places.values()) == 2
    assert all(place.startswith("test_gpu.py:") for place in watch.places)


@pytest.mark.parametrize("preset", ["2024", "2023"])
def test_steps_are_measured_at_toy_size(run, preset):
    figures = load("gpu_figures")
    ours = figures.ours(run, "small", preset, compiled=False)["values"]
    plain = figures.plain(run, "small", preset, bf16=True, attention="sdpa")["values"]
    for values in (ours, plain):
        assert values["batch"] == figures.QUICK_BATCH
        assert values["clips/s"] == pytest.approx(1000 * values["batch"] / values["ms per step"])
    assert ours["layers"] == "eager"
    assert ours["GFLOP per clip"] > 0
    assert figures.inference(run, "small")["values"]["ours / AST"] > 0
    assert figures.corpus(run, "small")["values"]["clips/s"] > 0


def test_targets_are_computed_from_rows_and_missing_ones_reported():
    gpu = load("gpu")
    rows = {
        "small, 2024, ours": {"values": {"clips/s": 1300.0, "MB per clip": 100.0, "GFLOP per clip": 100.0}},
        "small, 2024, plain fp32": {"values": {"clips/s": 200.0, "MB per clip": 200.0}},
        "bf16 product": {"values": {"TFLOP/s": 650.0}},
        "host synchronizations of one step": {"value": 3},
    }
    found = {row["name"]: row for row in gpu.targets(rows, quick=False)}
    assert found["small, 2024, ours: clips/s"]["reached"] is True
    assert found["small, 2024, ours against plain fp32: clips/s"]["value"] == 6.5
    assert found["small, 2024, ours against plain fp32: memory per clip"]["reached"] is False
    assert found["small, 2024, ours: share of the rate of a bf16 product"]["value"] == pytest.approx(0.2)
    assert found["host synchronizations of one step"]["reached"] is False
    missing = found["base, 2024, ours: clips/s"]
    assert (missing["value"], missing["target"], missing["reached"]) == (None, 520, None)
    text = gpu.to_markdown([], list(found.values()), {})
    assert "| base, 2024, ours: clips/s | not measured | at least 520 |" in text
    assert all(row["reached"] is None for row in gpu.targets(rows, quick=True))  # toy sizes have no targets


def test_the_exported_teacher_consists_of_small_files_that_load(tmp_path):
    training = load("gpu_training")
    encoder = ASiTModel(ASiTConfig.from_size("small", num_frames=192))
    model = SimpleNamespace(teacher={"asit": encoder})
    for _ in range(2):  # the second replaces the first
        training.export_teacher(model, ASiTFeatureExtractor(), tmp_path / "encoder")
        with torch.no_grad():
            encoder.layernorm.bias += 1
    files = list((tmp_path / "encoder").iterdir())
    assert max(path.stat().st_size for path in files) < 16 * 2**20
    assert len(files) + len(("gpu.json", "gpu.md")) <= 8
    assert not [path for path in files if path.suffix == ".py"]
    assert list(tmp_path.iterdir()) == [tmp_path / "encoder"]
    loaded = ASiTModel.from_pretrained(tmp_path / "encoder")
    assert loaded.dtype == torch.float32
    weight = encoder.layers[0].mlp.fc1.weight
    torch.testing.assert_close(loaded.layers[0].mlp.fc1.weight, weight.half().float(), rtol=0, atol=0)
    torch.testing.assert_close(loaded.layernorm.bias, torch.ones(384), rtol=0, atol=0)
    assert ASiTFeatureExtractor.from_pretrained(tmp_path / "encoder").num_mel_bins == 128


@pytest.mark.parametrize("was_replaced", [True, False])
def test_the_previous_encoder_is_restored_after_a_killed_export(tmp_path, was_replaced):
    """Killed between the two renames of `whole_folder`, or before the first."""
    half = tmp_path / ".encoder-abc"
    for folder in (half / "encoder", half / "replaced" if was_replaced else tmp_path / "encoder"):
        folder.mkdir(parents=True)
        (folder / "weights").write_text(folder.name)
    load("gpu")._remove_half_exports(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["encoder"]
    assert (tmp_path / "encoder" / "weights").read_text() == ("replaced" if was_replaced else "encoder")


@pytest.mark.slow
def test_training_uses_the_remaining_time_and_exports(run, monkeypatch):
    training = load("gpu_training")
    monkeypatch.setattr(training, "QUICK_SECONDS", 3.0)
    monkeypatch.setattr(training, "QUICK_EXPORT_SECONDS", 0.5)
    assert training.pool(run)["values"]["clips"] > 0
    run.init = run.output_dir / "init"
    tiny.build().save_pretrained(run.init)
    ASiTFeatureExtractor(num_mel_bins=tiny.MEL).save_pretrained(run.init)
    updates = []
    run.update = updates.append
    row = training.train(run, compiled=False)
    assert row["values"]["steps"] > 0
    assert row["values"]["exports"] == len(updates) + 1
    assert row["values"]["log"]
    assert ASiTModel.from_pretrained(run.output_dir / "encoder").config.hidden_size == tiny.TINY["hidden_size"]


def test_the_pool_may_be_packed_audio_or_parcels(run, tmp_path):
    training = load("gpu_training")
    packed.write_packed(tmp_path / "packed", training.synthetic_clips(2), training.RATE)
    parcels.encode_parcels(packed.PackedAudio.load(tmp_path / "packed"), tmp_path / "parcels", num_threads=1)
    for number, name in enumerate(("packed", "parcels")):
        run.train_data, run.scratch = str(tmp_path / name), tmp_path / f"scratch-{number}"
        assert training.pool(run)["values"]["clips"] == 2
        assert len(packed.PackedAudio.load(training.pool_folder(run))) == 2
    run.train_data, run.scratch = str(tmp_path / "nothing"), tmp_path / "other"
    with pytest.raises(FileNotFoundError, match="nothing"):
        training.pool(run)
    run.train_data, run.quick = None, False
    assert training.pool(run)["status"] == training.train(run)["status"] == "skipped"


def test_the_training_recipe_is_valid_for_run_pretraining(tmp_path):
    training = load("gpu_training")
    options = recipe_arguments(training.RECIPE)
    names = {option.removeprefix("--") for option in options if option.startswith("--")}
    known = {one.name for one in (*fields(training.TrainingSettings), *fields(training.ASiTPreTrainingArguments))}
    assert names <= known
    given = ["--recipe", str(training.RECIPE), "--train_data", "x", "--output_dir", str(tmp_path), "--bf16", "False"]
    model, data, args = parse_arguments(
        (run_pretraining.ModelArguments, run_pretraining.DataArguments, training.ASiTPreTrainingArguments), given
    )
    assert (model.size, data.global_seconds, args.train_batch_size) == ("small", 2.0, training.BATCH)
