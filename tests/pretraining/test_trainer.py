import copy
import json
import os
from functools import partial

import numpy as np
import pytest
import torch
from datasets import Dataset
from fake_clock import FakeClock
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tiny_pretraining import assert_equal, losses, make_arguments, make_model, make_trainer, rows, write_clips
from transformers import TrainerCallback

from asit_hf import ASiTFeatureExtractor, ASiTForPreTraining
from asit_hf.data import LabelledClips, PretrainingCrops
from asit_hf.pretraining.gradients import clip_tensor_norms
from asit_hf.pretraining.masking import GMML
from asit_hf.pretraining.monitoring import KnnProbeCallback, PlotCallback
from asit_hf.pretraining.trainer import ASiTPreTrainer


@pytest.fixture(scope="module")
def clips(tmp_path_factory):
    return write_clips(tmp_path_factory.mktemp("clips"))


@pytest.mark.parametrize("preset", ["2024", "2023"])
def test_a_run_logs_every_loss_and_moves_student_and_teacher(clips, tmp_path, preset):
    config = {"num_patch_prototypes": 12} if preset == "2023" else {}
    model = make_model(**config)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    trainer = make_trainer(clips, tmp_path, model, preset=preset)
    trainer.train()
    logged = rows(trainer)
    assert len(logged) == 6
    weights = model.config
    for row in logged:
        total = (
            weights.global_loss_weight * row["global_loss"]
            + weights.local_loss_weight * row["local_loss"]
            + weights.reconstruction_loss_weight * row["reconstruction_loss"]
        )
        assert row["loss"] == pytest.approx(total, rel=1e-4)
        assert 0 < row["cls_entropy"] <= np.log(24) + 1e-4
        assert 0 < row["feature_std"] < 1
    after = model.state_dict()
    for name in ("asit.layers.1.mlp.fc1.weight", "teacher.asit.layers.1.mlp.fc1.weight", "cls_center.center"):
        assert not torch.equal(before[name], after[name]), name


@pytest.mark.slow
def test_reconstruction_is_learned(clips, tmp_path):
    model = make_model(global_loss_weight=0, local_loss_weight=0)
    trainer = make_trainer(clips, tmp_path, model, num_train_epochs=30, learning_rate=3e-3)
    trainer.train()
    values = losses(trainer)
    assert np.mean(values[-10:]) < 0.85 * np.mean(values[:10])


def test_the_schedules_reach_the_optimizer(clips, tmp_path):
    seen = []

    class Recorder(TrainerCallback):
        def on_optimizer_step(self, args, state, control, optimizer=None, **kwargs):
            seen.append([(group["lr"], group["weight_decay"]) for group in optimizer.param_groups])

    trainer = make_trainer(clips, tmp_path, num_train_epochs=4)
    trainer.add_callback(Recorder())
    trainer.train()
    schedules = trainer.schedules
    assert len(seen) == 12
    for step, ((lr, decay), (lr_vectors, no_decay)) in enumerate(seen):
        assert lr == lr_vectors == pytest.approx(schedules.learning_rate[step], abs=1e-12)
        assert decay == pytest.approx(schedules.weight_decay[step])
        assert no_decay == 0
    assert schedules.learning_rate[0] == 0
    assert schedules.learning_rate.max() == pytest.approx(1e-3)


def test_new_heads_start_with_standardized_inputs(clips, tmp_path):
    def first_logits(**options):
        trainer = make_trainer(clips, tmp_path, max_steps=1, learning_rate=1e-6, **options)
        torch.nn.init.constant_(trainer.model.asit.layernorm.bias, 10.0)  # CLS tokens that are nearly the same
        trainer.model.reset_teacher()
        trainer.train()
        return rows(trainer)[0]["cls_logit_std"]

    assert first_logits(standardize_head_inputs=True) > 5 * first_logits()


def test_head_inputs_are_standardized_by_tokens_without_stochastic_depth(clips, tmp_path):
    given = []
    trainer = make_trainer(clips, tmp_path, make_model(drop_path_rate=0.9), standardize_head_inputs=True)
    trainer.model.standardize_head_inputs = given.append
    encoder = copy.deepcopy(trainer.model.asit).eval()
    batches = [trainer.prepare_views(batch)["input_values"] for batch in trainer.get_train_dataloader()]
    trainer.args.max_steps = 1
    trainer.train()
    with torch.no_grad():
        expected = [encoder(views.flatten(0, 1)).last_hidden_state[:, 0] for views in batches]
    assert torch.equal(*given, torch.cat(expected))


@pytest.mark.parametrize(
    ("fields", "has_new_heads", "reason"),
    [({}, False, "new heads"), ({"global_loss_weight": 0}, True, "no effect without the global loss")],
)
def test_trained_or_unused_heads_are_not_standardized(clips, tmp_path, fields, has_new_heads, reason):
    trainer = make_trainer(clips, tmp_path, make_model(**fields), standardize_head_inputs=True)
    trainer.model.has_new_heads = has_new_heads
    with pytest.raises(ValueError, match=reason):
        trainer.train()


@pytest.mark.parametrize(("chosen", "new_heads", "scale"), [(0.5, False, 0.5), (0.5, True, 0.5), (None, True, 0.02)])
def test_the_encoder_can_have_its_own_learning_rate(clips, tmp_path, chosen, new_heads, scale):
    trainer = make_trainer(clips, tmp_path, encoder_learning_rate_scale=chosen)
    trainer.model.has_trained_encoder, trainer.model.has_new_heads = True, new_heads
    rates = []

    class Recorder(TrainerCallback):
        def on_optimizer_step(self, args, state, control, **kwargs):
            rates.append([group["lr"] for group in trainer.optimizer.param_groups])

    trainer.add_callback(Recorder())
    trainer.train()
    peak = np.array(rates)[:, 0]
    assert peak.max() == pytest.approx(1e-3)
    np.testing.assert_allclose(np.array(rates), peak[:, None] * [[1, 1, scale, scale]])
    grouped = [id(parameter) for group in trainer.optimizer.param_groups for parameter in group["params"]]
    assert sorted(grouped) == sorted(
        id(parameter) for parameter in trainer.model.parameters() if parameter.requires_grad
    )
    encoder = {id(parameter) for parameter in trainer.model.asit.parameters()}
    assert [id(group["params"][0]) in encoder for group in trainer.optimizer.param_groups] == [
        False,
        False,
        True,
        True,
    ]
    logged = [row["learning_rate"] for row in trainer.state.log_history if "learning_rate" in row]
    assert max(logged) == pytest.approx(1e-3)


def test_weight_decay_spares_biases_and_norms_only(clips, tmp_path):
    model = make_model()
    optimizer = make_trainer(clips, tmp_path, model).create_optimizer()
    decayed, excluded = (set(map(id, group["params"])) for group in optimizer.param_groups)
    for name, parameter in model.named_parameters():
        if name.startswith("teacher."):
            assert id(parameter) not in decayed | excluded
        else:
            assert (id(parameter) in decayed) == (parameter.dim() > 1), name
    assert id(model.asit.embeddings.cls_token) in decayed
    assert id(model.asit.embeddings.position_embeddings) in decayed


def test_learning_rate_follows_the_global_batch(clips, tmp_path):
    args = make_trainer(
        clips, tmp_path, learning_rate=None, per_device_train_batch_size=4, gradient_accumulation_steps=2
    ).args
    assert args.learning_rate == pytest.approx(5e-4 * 8 / 256)


@pytest.mark.slow
def test_the_last_layer_rests_for_the_first_epoch_of_2024(clips, tmp_path):
    def prototypes_after(epochs, **kwargs):
        model = make_model()
        start = model.heads.distillation.cls_prototypes.weight_v.clone()
        make_trainer(clips, tmp_path, model, num_train_epochs=epochs, warmup_epochs=0, **kwargs).train()
        return torch.equal(start, model.heads.distillation.cls_prototypes.weight_v)

    assert prototypes_after(1)
    assert not prototypes_after(2)
    assert not prototypes_after(1, freeze_last_layer_epochs=0)


def test_centers_and_teacher_move_once_a_step_with_accumulation(clips, tmp_path, monkeypatch):
    model = make_model()
    calls = []
    update_teacher, update_centers = model.update_teacher, model.update_centers
    weight = model.asit.layers[0].mlp.fc1.weight

    def record_teacher(momentum):
        calls.append(("teacher", momentum, weight.detach().clone()))
        update_teacher(momentum)

    def record_centers():
        calls.append(("centers", None, weight.detach().clone()))
        update_centers()

    monkeypatch.setattr(model, "update_teacher", record_teacher)
    monkeypatch.setattr(model, "update_centers", record_centers)
    trainer = make_trainer(
        clips,
        tmp_path,
        model,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        num_train_epochs=1,
        warmup_epochs=0,
    )
    before = weight.detach().clone()
    trainer.train()
    assert trainer.state.global_step == 3
    assert [name for name, *_ in calls] == ["centers", "teacher"] * 3
    assert [
        momentum for name, momentum, _ in calls if name == "teacher"
    ] == trainer.schedules.teacher_momentum.tolist()
    weights = [before, *(value for name, _, value in calls if name == "teacher")]
    assert all(not torch.equal(first, second) for first, second in zip(weights, weights[1:]))  # after the optimizer


def test_the_teacher_temperature_of_the_step_reaches_the_model(clips, tmp_path, monkeypatch):
    model = make_model()
    forward, seen = model.forward, []
    monkeypatch.setattr(
        model,
        "forward",
        lambda *args, **kwargs: (seen.append(kwargs["teacher_temperature"]), forward(*args, **kwargs))[1],
    )
    trainer = make_trainer(clips, tmp_path, model, num_train_epochs=3, warmup_teacher_temperature_epochs=3)
    trainer.train()
    assert seen == trainer.schedules.teacher_temperature.tolist()
    assert len(set(seen)) == 3


@pytest.fixture(scope="module")
def whole_runs(clips, tmp_path_factory):
    """Runs of nine steps without and with loader workers, with checkpoints after four and eight."""
    folder = tmp_path_factory.mktemp("whole")
    runs = {workers: make_trainer(clips, folder / str(workers), **settings_of_run(workers)) for workers in (0, 2)}
    for trainer in runs.values():
        trainer.train()
    return runs


def settings_of_run(workers):
    return {"num_train_epochs": 3, "save_strategy": "steps", "save_steps": 4, "dataloader_num_workers": workers}


@pytest.mark.slow
@pytest.mark.parametrize("workers", [0, 2])
def test_resumed_equals_uninterrupted_bit_for_bit(clips, tmp_path, whole_runs, workers):
    whole = whole_runs[workers]
    resumed = make_trainer(clips, tmp_path, make_model(seed=5), **settings_of_run(workers))
    resumed.train(resume_from_checkpoint=f"{whole.args.output_dir}/checkpoint-4")
    assert_equal(whole.model, resumed.model)
    assert losses(whole)[4:] == losses(resumed)[4:]


def test_workers_do_not_change_what_is_learned(whole_runs):
    assert losses(whole_runs[0]) == losses(whole_runs[2])
    assert_equal(whole_runs[0].model, whole_runs[2].model)


def test_masks_change_every_epoch(clips, tmp_path):
    trainer = make_trainer(clips, tmp_path)
    trainer.schedules = None
    dataset = trainer.train_dataset
    item = trainer.data_collator([dataset[0], dataset[1]])
    dataset.set_epoch(1)
    later = trainer.data_collator([dataset[0], dataset[1]])
    first, again, second = (trainer.prepare_views(batch) for batch in (item, item, later))
    assert torch.equal(first["corruption_mask"], again["corruption_mask"])
    assert torch.equal(first["corrupted_values"], again["corrupted_values"])
    assert not torch.equal(first["corruption_mask"], second["corruption_mask"])


def test_views_have_whole_patches_and_given_views_are_used(clips, tmp_path):
    trainer = make_trainer(clips, tmp_path)
    batch = trainer.data_collator([trainer.train_dataset[index] for index in range(3)])
    views = trainer.prepare_views(batch)
    assert views["input_values"].shape == (3, 2, 48, 32)
    assert views["local_values"].shape[:2] == (3, 2)
    given = {name: views[name] for name in ("input_values", "corrupted_values", "corruption_mask")}
    assert set(trainer.prepare_views(given)) == set(given)
    assert trainer.prepare_views(given)["corrupted_values"] is given["corrupted_values"]


def test_a_bad_file_is_skipped_and_reported_once(clips, tmp_path):
    bad = tmp_path / "bad.wav"
    bad.write_bytes(b"not audio")
    trainer = make_trainer([*clips, str(bad)], tmp_path / "run", num_train_epochs=3)
    trainer.train()
    (reported,) = (json.loads(line) for line in (tmp_path / "run" / "bad_files.jsonl").read_text().splitlines())
    assert reported["file"] == str(bad)
    assert reported["reason"]
    assert trainer.state.global_step == 9
    with pytest.raises(ValueError, match="bad.wav"):
        make_trainer([*clips, str(bad)], tmp_path / "strict", crops={"strict": True}, num_train_epochs=3).train()


def test_clipping_treats_every_tensor_by_itself_and_qkv_as_one():
    model = make_model()
    for parameter in model.asit.parameters():
        parameter.grad = torch.randn_like(parameter)
    before = {name: parameter.grad.clone() for name, parameter in model.asit.named_parameters()}
    clip_tensor_norms(model, 2.0)
    for name, parameter in model.asit.named_parameters():
        if not any(part in name for part in ("q_proj", "k_proj", "v_proj")):
            norm = before[name].norm()
            assert parameter.grad.norm().item() == pytest.approx(min(norm.item(), 2.0), rel=1e-4), name
    attention = model.asit.layers[0].attention
    merged = torch.cat([attention.q_proj.weight.grad, attention.k_proj.weight.grad, attention.v_proj.weight.grad])
    assert merged.norm().item() == pytest.approx(2.0, rel=1e-4)


@pytest.mark.slow
def test_pictures_and_tensorboard(clips, tmp_path):
    trainer = make_trainer(clips, tmp_path, plot_steps=4, report_to="tensorboard", num_train_epochs=2)
    trainer.train()
    names = {path.name for path in (tmp_path / "pictures").iterdir()}
    assert {"curves.png", "reconstruction-4.png", "reconstruction-6.png"} <= names
    assert all(path.stat().st_size > 5000 for path in (tmp_path / "pictures").iterdir())
    events = EventAccumulator(str(next(tmp_path.rglob("events.out.tfevents*")).parent), size_guidance={"images": 0})
    events.Reload()
    assert {event.step for event in events.Images("reconstruction")} == {4, 6}
    assert len(events.Scalars("train/local_loss")) == 6


def test_defaults_of_the_presets(tmp_path):
    arguments = partial(make_arguments, tmp_path)
    assert arguments().gmml == GMML(mask_ratio=(0.5, 0.5))
    assert arguments().warmup_teacher_temperature_epochs == 5
    assert arguments(preset="2023").gmml == GMML(mask_ratio=(0.5, 0.7))
    assert arguments(preset="2023").warmup_teacher_temperature_epochs == 30
    assert arguments(preset="2023").freeze_last_layer_epochs == 0
    assert arguments(mask_alignment=16, mask_ratio_min=0.6).gmml == GMML(mask_ratio=(0.6, 0.6), alignment=16)


@pytest.mark.parametrize(
    ("kwargs", "words"),
    [
        ({"preset": "2022"}, ["2023", "2024", "2022"]),
        ({"mask_ratio_min": 1.5}, ["mask_ratio", "1.5"]),
        ({"replace_probability": -1.0}, ["replace_probability", "-1.0"]),
        ({"mask_alignment": 0}, ["alignment", "0"]),
        ({"warmup_steps": 10}, ["warmup_steps", "no effect"]),
        ({"lr_scheduler_type": "cosine"}, ["lr_scheduler_type", "no effect"]),
        ({"metric_for_best_model": "loss", "eval_steps": 5}, ["metric_for_best_model", "eval_steps", "no effect"]),
        ({"neftune_noise_alpha": 1.0}, ["neftune_noise_alpha", "no effect"]),
        ({"remove_unused_columns": True}, ["remove_unused_columns", "True"]),
        ({"train_sampling_strategy": "group_by_length"}, ["random", "group_by_length"]),
        ({"save_strategy": "best"}, ["steps", "best"]),
        ({"do_eval": True}, ["do_eval", "no effect"]),
        ({"do_predict": True}, ["do_predict", "no effect"]),
        ({"do_train": False}, ["do_train", "True", "False"]),
        ({"dataloader_persistent_workers": True}, ["dataloader_persistent_workers", "dataloader_num_workers"]),
        ({"torch_compile": True}, ["torch_compile", "compile_layers"]),
    ],
)
def test_wrong_arguments_are_refused(tmp_path, kwargs, words):
    with pytest.raises(ValueError) as error:
        make_arguments(tmp_path, **kwargs)
    assert all(word in str(error.value) for word in words)


def test_fewer_clips_than_a_batch_are_refused(clips, tmp_path):
    with pytest.raises(ValueError, match="2 clips.*batch of 4"):
        make_trainer(clips[:2], tmp_path)
    make_trainer(clips[:2], tmp_path, dataloader_drop_last=False, num_train_epochs=1).train()


def test_evaluation_data_are_refused(clips, tmp_path):
    arguments, extractor = make_arguments(tmp_path), ASiTFeatureExtractor(num_mel_bins=32)
    with pytest.raises(ValueError, match="no evaluation data"):
        ASiTPreTrainer(make_model(), arguments, extractor, train_dataset=clips, eval_dataset=clips)


def test_a_new_run_starts_a_new_report_of_bad_files(clips, tmp_path):
    (tmp_path / "bad_files.jsonl").write_text(json.dumps({"file": "old.wav", "reason": "gone"}) + "\n")
    make_trainer(clips, tmp_path, num_train_epochs=1).train()
    assert not (tmp_path / "bad_files.jsonl").exists()


def test_a_model_of_another_class_is_refused(tmp_path):
    with pytest.raises(TypeError, match="ASiTForPreTraining.*Linear"):
        ASiTPreTrainer(torch.nn.Linear(2, 2), make_arguments(tmp_path), processing_class=ASiTFeatureExtractor())


@pytest.mark.parametrize(("pattern", "filling"), [("time", "zeros"), ("frequency", "noise"), ("patches", "zeros")])
def test_mask_pattern_and_fill_reach_the_model(clips, tmp_path, pattern, filling):
    seen = []

    class Recorder(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            seen.append(trainer.last_example)

    trainer = make_trainer(
        clips, tmp_path, mask_pattern=pattern, mask_fill=filling, replace_probability=0.0, plot_steps=1
    )
    trainer.remove_callback(PlotCallback)
    trainer.add_callback(Recorder())
    trainer.train()
    for example in seen:
        mask, corrupted = example["mask"], example["corrupted"]
        assert 0.5 <= mask.float().mean() < 0.9
        assert bool((corrupted[mask] == 0).all()) is (filling == "zeros")
        squares = mask.unfold(0, 16, 16).unfold(1, 16, 16).flatten(-2)
        whole = {
            "time": mask.all(1) == mask.any(1),
            "frequency": mask.all(0) == mask.any(0),
            "patches": squares.all(-1) == squares.any(-1),
        }
        assert whole[pattern].all()


def test_a_batch_without_keys_and_masks_is_refused(clips, tmp_path):
    trainer = make_trainer(clips, tmp_path)
    with pytest.raises(ValueError, match="sample_keys of shape"):
        trainer.prepare_views({"input_values": torch.zeros(2, 2, 48, 32)})


def in_float16(trainer, init_scale):
    """Makes a trainer on a CPU use float16 and a gradient scaler, which Trainer does on GPUs only."""
    accelerator = trainer.accelerator
    accelerator.state._mixed_precision = "fp16"
    accelerator.native_amp = True
    accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=init_scale)
    return trainer


@pytest.mark.parametrize("max_grad_norm", [0.0, 1.0])
def test_float16_unscales_gradients_once(clips, tmp_path, max_grad_norm):
    norms = []
    for name in ("float32", "float16"):
        trainer = make_trainer(clips, tmp_path / name, max_grad_norm=max_grad_norm, num_train_epochs=1)
        if name == "float16":
            in_float16(trainer, 4.0)
        trainer.train()
        assert trainer.state.global_step == 3
        assert trainer.num_skipped_steps == 0
        norms.append([row["grad_norm"] for row in trainer.state.log_history if "grad_norm" in row])
    assert len(norms[0]) == 3
    assert norms[1] == pytest.approx(norms[0], rel=0.05)


@pytest.mark.slow
def test_float16_lowers_the_scale_after_an_overflow(clips, tmp_path):
    trainer = in_float16(make_trainer(clips, tmp_path, num_train_epochs=4), 2.0**40)
    before = trainer.model.asit.layers[0].mlp.fc1.weight.clone()
    trainer.train()
    assert trainer.num_skipped_steps == trainer.state.global_step == 12  # twelve halvings are not enough
    assert torch.equal(trainer.model.asit.layers[0].mlp.fc1.weight, before)
    trainer = in_float16(make_trainer(clips, tmp_path, num_train_epochs=4), 2.0**9)
    trainer.train()
    assert 0 < trainer.num_skipped_steps < 12
    assert not torch.equal(trainer.model.asit.layers[0].mlp.fc1.weight, before)
    assert all(value.isfinite().all() for value in trainer.model.state_dict().values())


@pytest.mark.slow
def test_compiled_layers_share_their_graphs_and_learn_the_same(clips, tmp_path, monkeypatch):
    graphs = []

    def backend(graph, examples):
        graphs.append(graph)
        return graph.forward

    compile_layers = ASiTForPreTraining.compile_layers
    monkeypatch.setattr(ASiTForPreTraining, "compile_layers", lambda model: compile_layers(model, backend=backend))
    torch._dynamo.reset()
    runs, counts = [], []

    class Counter(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            counts.append(len(graphs))

    for compiled in (False, True):
        trainer = make_trainer(clips, tmp_path / str(compiled), compile_layers=compiled, num_train_epochs=3)
        trainer.add_callback(Counter())
        trainer.train()
        runs.append(trainer)
    # two of the student's layers and one of the teacher's, and the local loss
    assert counts[-9:] == [4] * 9
    assert counts[:9] == [0] * 9
    assert losses(runs[1]) == pytest.approx(losses(runs[0]), rel=1e-4)
    trainer.save_model()
    reloaded = ASiTForPreTraining.from_pretrained(tmp_path / "True")
    for name, value in trainer.model.state_dict().items():
        assert torch.equal(value, reloaded.state_dict()[name]), name


def test_a_knn_probe_does_not_compile_layers_for_every_length(clips, tmp_path):
    graphs = []
    trainer = make_trainer(clips, tmp_path)
    labelled = LabelledClips(Dataset.from_dict({"audio": clips, "label": [0, 1] * 6}), 16000)
    probe = KnnProbeCallback(trainer, labelled, labelled, 1)
    teacher = trainer.model.teacher["asit"].eval()
    expected = probe.accuracy(teacher)
    trainer.model.compile_layers(backend=lambda graph, examples: graphs.append(graph) or graph.forward)
    assert probe.accuracy(teacher) == expected
    assert graphs == []
    teacher(torch.randn(2, 48, 32))
    assert len(graphs) == 1


def test_fsdp_without_processes_or_without_a_gpu_is_refused(clips, tmp_path, monkeypatch):
    trainer = make_trainer(clips, tmp_path)
    monkeypatch.setattr(trainer.args, "fsdp", True)  # as torchrun on a CPU has it: Accelerate takes no notice
    with pytest.raises(ValueError, match="torchrun"):
        trainer.create_accelerator_and_postprocess()


def test_defaults_of_trainer_that_would_wait_for_the_device_are_off(tmp_path):
    args = make_arguments(tmp_path)
    assert not args.logging_nan_inf_filter
    assert args.ddp_find_unused_parameters is False


def make_timed_trainer(clips, output_dir, monkeypatch, clock, **kwargs):
    monkeypatch.setattr("asit_hf.utils.time_budget.now", clock)
    trainer = make_trainer(clips, output_dir, **kwargs)
    trainer.add_callback(clock)
    return trainer


class Values(TrainerCallback):
    """Records the schedules' values at every step."""

    def __init__(self, trainer):
        self.trainer, self.rows, self.frozen = trainer, [], []

    def on_optimizer_step(self, args, state, control, optimizer=None, **kwargs):
        values = self.trainer.schedules.at(state.global_step)
        group = next(group for group in optimizer.param_groups if group["decays"])
        assert group["lr"] == pytest.approx(values["learning_rate"], abs=1e-12)
        assert group["weight_decay"] == pytest.approx(values["weight_decay"], abs=1e-3)
        self.rows.append(values)
        self.frozen.append(self.trainer.model.heads.distillation.cls_prototypes.weight_v.grad is None)

    def of(self, name):
        return np.array([row[name] for row in self.rows])


@pytest.mark.slow
def test_all_schedules_end_with_max_minutes(clips, tmp_path, monkeypatch):
    options = {"max_minutes": 0.5, "warmup_epochs": 2, "warmup_teacher_temperature_epochs": 3}
    trainer = make_timed_trainer(clips, tmp_path, monkeypatch, FakeClock(1.0), **options)
    values = Values(trainer)
    trainer.add_callback(values)
    trainer.train()
    assert trainer.state.global_step == trainer.state.max_steps == 30
    rates = values.of("learning_rate")
    np.testing.assert_allclose(rates[:7], 1e-3 * np.arange(7) / 6, atol=1e-9)  # two epochs of three steps
    assert rates[-1] < 1e-5
    assert values.of("weight_decay")[[0, -1]] == pytest.approx([0.04, 0.4], abs=0.005)
    assert values.of("teacher_momentum")[[0, -1]] == pytest.approx([0.996, 1.0], abs=1e-4)
    temperatures = values.of("teacher_temperature")
    assert temperatures[[0, 2, 3, 6, -1]] == pytest.approx([0.04, 0.04, 0.055, 0.07, 0.07])
    assert values.frozen == [True] * 3 + [False] * 27
    assert abs(np.diff(rates[6:])).max() < 1e-4


@pytest.mark.slow
def test_schedules_in_epochs_are_shortened_together_if_the_minutes_are_few(clips, tmp_path, monkeypatch):
    options = {"max_minutes": 1, "warmup_epochs": 100, "warmup_teacher_temperature_epochs": 50}
    trainer = make_timed_trainer(clips, tmp_path, monkeypatch, FakeClock(1.0), freeze_last_layer_epochs=10, **options)
    values = Values(trainer)
    trainer.add_callback(values)
    trainer.train()
    rates = values.of("learning_rate")
    assert len(rates) == 60
    assert rates.max() == pytest.approx(1e-3, rel=0.01)
    assert 12 <= rates.argmax() <= 18
    assert abs(np.diff(rates)).max() < 1.2e-4
    assert rates[-1] < 2e-5
    temperatures = values.of("teacher_temperature")
    assert temperatures[-1] == 0.07
    assert (np.diff(temperatures) >= 0).all()
    assert 5 <= sum(values.frozen) <= 8  # a tenth of the warm-up, from the first plan on


def test_a_stream_with_max_minutes(clips, tmp_path, monkeypatch):
    class Endless(torch.utils.data.IterableDataset):
        def __iter__(self):
            crops = PretrainingCrops(clips, 16000, global_seconds=0.5, local_seconds=0.25)
            while True:
                yield from (crops[index] for index in range(12))

    def make(**kwargs):
        clock = FakeClock(1.0)
        monkeypatch.setattr("asit_hf.utils.time_budget.now", clock)
        trainer = make_trainer(Endless(), tmp_path, max_minutes=0.25, **kwargs)
        trainer.add_callback(clock)
        return trainer

    trainer = make(steps_per_epoch=5)
    trainer.train()
    assert trainer.state.global_step == 15
    assert trainer.state.epoch == pytest.approx(3)
    with pytest.raises(ValueError, match="set steps_per_epoch"):
        make().train()


@pytest.mark.slow
def test_a_terminated_run_with_max_minutes_resumes_with_the_remaining_time(clips, tmp_path, monkeypatch, caplog):
    class Terminate(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            if state.global_step == 11:
                os.kill(os.getpid(), 15)

    options = {"max_minutes": 0.4, "save_strategy": "steps", "save_steps": 100}
    first = make_timed_trainer(clips, tmp_path, monkeypatch, FakeClock(1.0), **options)
    first.add_callback(Terminate())
    first.train()
    assert first.terminated
    assert first.state.global_step == 12
    clock = FakeClock(1.0)
    second = make_timed_trainer(clips, tmp_path, monkeypatch, clock, **options)
    before = clock.seconds
    second.train(resume_from_checkpoint=str(tmp_path / "checkpoint-12"))
    assert second.state.global_step == 24
    assert clock.seconds - before == 12
    assert clock.rates[0] == pytest.approx(first.lr_scheduler.get_last_lr()[0])
    assert clock.rates[-1] < 2e-5
    third = make_timed_trainer(clips, tmp_path, monkeypatch, FakeClock(1.0), **options)
    third.train(resume_from_checkpoint=str(tmp_path / "checkpoint-24"))
    assert third.state.global_step == 24


def test_max_minutes_with_max_steps_is_refused(clips, tmp_path):
    with pytest.raises(ValueError, match="max_minutes 2 and max_steps 10"):
        make_trainer(clips, tmp_path, max_minutes=2, max_steps=10)
