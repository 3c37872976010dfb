import importlib
import io
import json
import sys
from contextlib import redirect_stdout
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from tiny import MEL, build

from asit_hf import ASiTFeatureExtractor, ASiTForAudioClassification, predict
from asit_hf.fbank_asit import log_mel_spectrogram
from asit_hf.hub.export import export_model
from asit_hf.pretraining.masking import GMML, corrupt
from asit_hf.utils.cpu import has_bf16_instructions

FOLDER = Path(__file__).parents[2] / "examples" / "benchmarks"


def load(name: str):
    return importlib.import_module(name)


def views(batch: torch.Tensor) -> list[torch.Tensor]:
    return [view[:, None] for view in batch.unbind(1)]


@pytest.mark.parametrize("preset", ["2023", "2024"])
def test_the_restated_loop_computes_our_losses(preset):
    model = load("training_step").build_model(preset, quick=True)
    model.config.drop_path_rate = 0.0
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in [*model.asit.parameters(), *model.heads.parameters()]:
            parameter.add_(torch.randn_like(parameter) * 0.02)  # so that student and teacher differ
    model.cls_center.center.normal_(std=0.1)
    model.patch_center.center.normal_(std=0.1)
    batch = load("training_step").build_batch(model.config, preset, 3)
    clean, local = batch["input_values"], batch.get("local_values")
    corrupted, mask = corrupt(clean, torch.arange(3), 0, GMML())
    loop = load("official_loop").OfficialLoop(model, GMML())
    theirs = loop.losses(views(clean), views(corrupted), views(mask), [] if local is None else views(local))
    ours = model(clean, corrupted, mask, local, teacher_temperature=0.04)
    for name, value in theirs.items():
        assert value.item() == pytest.approx(ours[name].item(), rel=1e-5), name
    model.update_centers()
    torch.testing.assert_close(loop.cls_center, model.cls_center.center, rtol=0, atol=1e-6)
    torch.testing.assert_close(loop.patch_center, model.patch_center.center, rtol=0, atol=1e-6)


def test_the_restated_loop_supports_fused_attention_given_masks_and_other_devices():
    model = load("training_step").build_model("2024", quick=True)
    model.config.drop_path_rate = 0.0
    batch = load("training_step").build_batch(model.config, "2024", 3)
    clean, local = batch["input_values"], batch["local_values"]
    corruption = corrupt(clean, torch.arange(3), 0, GMML())
    official_loop = load("official_loop")
    eager, fused = (
        official_loop.OfficialLoop(model, GMML(), attention=attention).step(clean, local, corruption=corruption)
        for attention in ("eager", "sdpa")
    )
    assert fused == pytest.approx(eager, rel=1e-5)
    with pytest.raises(ValueError, match="attention"):
        official_loop.OfficialLoop(model, GMML(), attention="flash")
    loop = official_loop.OfficialLoop(model.to("meta"), GMML())
    tensors = [*loop.student.parameters(), *loop.teacher.parameters(), loop.cls_center, loop.patch_center]
    assert {tensor.device.type for tensor in tensors} == {"meta"}


def test_a_step_of_the_restated_loop_updates_student_teacher_and_centers():
    model = load("training_step").build_model("2024", quick=True)
    batch = load("training_step").build_batch(model.config, "2024", 2)
    loop = load("official_loop").OfficialLoop(model, GMML())
    before = [loop.student.encoder.cls_token.clone(), loop.teacher.encoder.cls_token.clone(), loop.cls_center]
    losses = loop.step(batch["input_values"], batch["local_values"])
    after = [loop.student.encoder.cls_token, loop.teacher.encoder.cls_token, loop.cls_center]
    assert all(np.isfinite(value) for value in losses.values())
    assert not any(torch.equal(one, other) for one, other in zip(before, after))


def test_restated_masks_reach_the_masking_ratio():
    clip = torch.randn(1, 96, 64)
    corrupted, mask = load("official_loop").draw_in_python(clip, torch.zeros_like(clip), 0.5, GMML())
    assert 0.5 <= mask.mean() < 0.6
    assert torch.equal(corrupted, clip * (1 - mask))


def test_restated_log_mel_equals_ours():
    waveform = torch.rand(8000, generator=torch.Generator().manual_seed(0)) - 0.5
    expected = log_mel_spectrogram(waveform - waveform.mean(), 16000)
    torch.testing.assert_close(load("reading").plain_log_mel(waveform), expected, rtol=0, atol=2e-3)


def test_ratios_and_targets():
    row = load("common").Row
    assert row("time", ours=1.0, theirs=3.0, target=2.0).reached
    assert not row("time", ours=2.0, theirs=3.0, target=2.0).reached
    assert row("rate", ours=3.0, theirs=1.0, unit="1/s", higher_is_better=True).ratio == 3.0
    assert row("memory", ours=1.0, theirs=4.0, target=0.4, at_most=True).reached
    assert row("memory", ours=1.0, theirs=2.0, target=0.4, at_most=True).reached is False
    assert row("without target", ours=1.0, theirs=2.0).reached is None


def test_interleaved_rounds():
    called = []
    calls = {name: lambda name=name: called.append(name) for name in "ab"}
    seconds = load("common").time_interleaved(calls, rounds=2, warm_up=1)
    assert "".join(called) == "ababab"
    assert [len(values) for values in seconds.values()] == [2, 2]


@pytest.mark.slow
def test_contestants_step_on_command_and_report_their_memory():
    for side in ("ours bf16", "theirs fp32"):
        run = load("training_step").Contestant(side, "2024", [1, 2], quick=True)
        assert 100 < run() <= run()
        run.stop()


@pytest.mark.slow
def test_an_error_in_a_contestant_reaches_the_caller():
    run = load("training_step").Contestant("ours fp32", "2023", [2], quick=True, optim="no such optimizer")
    with pytest.raises(ValueError, match="no such optimizer"):
        run()


@pytest.mark.slow
def test_a_quick_run_writes_its_table(tmp_path, capsys, monkeypatch):
    monkeypatch.delenv("ASIT_REAL_AUDIO", raising=False)
    load("run").main(["--quick", "--output_dir", str(tmp_path)])
    results = json.loads((tmp_path / "results.json").read_text())
    assert [part["part"] for part in results["parts"]] == ["training step", "log-mel", "masks", "reading"]
    assert all(row["ratio"] > 0 for part in results["parts"] for row in part["rows"])
    assert results["machine"]["torch"] == torch.__version__
    table = (tmp_path / "results.md").read_text()
    assert table in capsys.readouterr().out
    assert table.count("| reading |") == len(results["parts"][-1]["rows"])


@pytest.mark.slow
def test_selected_parts_are_written_to_their_own_files(tmp_path):
    load("run").main(["--quick", "--parts", "inference", "--output_dir", str(tmp_path)])
    rows = json.loads((tmp_path / "inference.json").read_text())["parts"][0]["rows"]
    assert len(rows) == (8 if has_bf16_instructions() else 4)  # two lengths, two batch sizes, each precision
    assert all(row["ours"] > 0 for row in rows)


@pytest.mark.slow
def test_latencies_of_live_listening_are_measured():
    report = load("live").measure(quick=True)
    assert len(report.rows) == 3  # two sizes, and another rate
    assert all(row.ours > 0 and "3 windows" in note for row, note in zip(report.rows, report.notes))
    assert {row.reached for row in report.rows} <= {True, False, None}
    assert all(type(row.ours) is float for row in report.rows)  # json knows no number of numpy


def test_first_labels_are_compared_with_import_and_loading(monkeypatch):
    """The scripts of the fresh processes run within this one, which has imported everything."""
    startup = load("startup")

    def run_here(option: str, code: str, *arguments: str) -> tuple[float, list[float]]:
        output = io.StringIO()
        with redirect_stdout(output), monkeypatch.context() as patch:
            patch.setattr("sys.argv", [option, *arguments])
            if option == "-c":
                exec(code, {})
            else:
                assert predict.main(list(arguments)) == 0
                assert code == predict.__name__
        return 0.5, [float(word) for word in output.getvalue().split()] if option == "-c" else []

    seconds, printed = startup.run("-c", "print(2, sum(range(10**6)))")
    assert 0 < seconds < 10
    assert printed == [2, 499999500000]
    with pytest.raises(RuntimeError, match="no_such_name"):
        startup.run("-c", "no_such_name")
    monkeypatch.setattr(startup, "run", run_here)
    report = startup.measure(quick=True)
    assert [row.target for row in report.rows] == [1.0, None, 1.1, 1.1, None]
    assert [row.ratio for row in report.rows[2:4]] == [1.0, 1.0]
    assert 0.1 < report.rows[-1].theirs < 0.3  # MiB of weights
    assert sum("processor time 0.50 s" in note for note in report.notes) == 4


@pytest.mark.slow
def test_the_engine_is_compared_with_its_forward_passes_and_with_pipelines():
    rows = load("corpus").measure(quick=True, sizes=("base",)).rows
    assert len(rows) == 8  # clips and files, predict and embed; two pipelines, two batch sizes
    assert all(row.ours > 0 and row.theirs > 0 for row in rows)


def test_forward_passes_are_repeated_with_their_shapes_and_masks():
    corpus, model = load("corpus"), build(num_mel_bins=MEL)
    mask = torch.ones(2, 40, dtype=torch.long)
    mask[1, 20:] = 0
    with corpus.recorded(model) as calls, torch.no_grad():
        model(torch.randn(2, 40, MEL), attention_mask=mask)
        model(torch.randn(1, 32, MEL))
    with corpus.recorded(model) as again:
        corpus.repeat(model, calls)
    (before,), (after,) = calls.values(), again.values()
    assert [tuple(call[0]) for call in after] == [(2, 40, MEL), (1, 32, MEL)]
    assert torch.equal(after[0][3]["attention_mask"], before[0][3]["attention_mask"])
    assert not after[1][3]


@pytest.mark.slow
def test_peak_memory_is_that_of_a_process_and_its_children():
    memory = load("corpus_memory")
    block = "import time; block = bytearray(150_000_000); time.sleep(1)"
    code = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {block!r}])"
    peak = memory.peak_of([sys.executable, "-c", code], max_seconds=60)
    assert peak.finished
    assert peak.main < 100 < 150 < peak.worker < 250
    assert not memory.peak_of([sys.executable, "-c", block], max_seconds=0.2).finished


@pytest.mark.slow
def test_exported_models_are_compared(capsys):
    for package in ("onnx", "onnxscript", "onnxruntime", "torchao"):
        pytest.importorskip(package)
    report = load("exported").measure(quick=True)
    assert len(report.rows) == 16  # three contestants, two lengths, two batch sizes; two files, two lengths
    assert all(row.ratio > 0 for row in report.rows)
    differences = {note.partition(":")[0]: float(note.split("most ")[1].split()[0]) for note in report.notes[-5:]}
    assert differences["onnxruntime"] < 1e-4
    assert differences["waveform.onnx"] < 1e-2
    assert all(1e-4 < differences[name] < 0.3 for name in ("onnxruntime int8", "torchao int8"))


def test_probes_are_compared_with_scikit_learn():
    rows = load("probes").main(["--quick", "--probes", "ridge", "knn"])
    for row in rows:
        assert row["accuracy"] == pytest.approx(row["their_accuracy"], abs=0.1)


@pytest.mark.slow
def test_labels_of_exported_graphs_are_compared_with_the_pipelines(tmp_path):
    for package in ("onnx", "onnxscript", "onnxruntime"):
        pytest.importorskip(package)
    build(ASiTForAudioClassification).save_pretrained(tmp_path / "model")
    ASiTFeatureExtractor(num_mel_bins=MEL).save_pretrained(tmp_path / "model")
    export_model(tmp_path / "model", tmp_path / "exported", onnx=True)
    for label in ("rain", "wind"):
        (tmp_path / "clips" / label).mkdir(parents=True)
        noise = np.random.default_rng(len(label)).normal(size=16000).astype("float32")
        soundfile.write(tmp_path / "clips" / label / "a.wav", 0.1 * noise, 16000)
    found = load("exported_labels").main([str(tmp_path / "exported"), "--data", str(tmp_path / "clips")])
    assert set(found) == {"waveform.onnx", "onnx/"}
    assert all(same == 2 and difference < 1e-4 for same, difference in found.values())
