import dataclasses
import itertools
import json
import os
import shutil
import signal
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from transformers import Dinov2Config, Dinov2Model, ViTConfig, ViTModel

from asit_hf import ASiTForPreTraining, ASiTModel, export_model
from asit_hf.convert_original import convert
from asit_hf.data import PackedCrops
from asit_hf.data.packed import PackedAudio, write_packed
from asit_hf.data.parcels import encode_parcels
from asit_hf.pretraining.masking import GMML
from asit_hf.pretraining.trainer import ASiTPreTrainer
from examples import run_pretraining as script

EXAMPLES = Path(__file__).parents[2] / "examples"
FIXTURES = Path(__file__).parents[1] / "fixtures"
SMALL = (
    "hidden_size=32,num_hidden_layers=2,num_attention_heads=2,intermediate_size=64,num_mel_bins=32,"
    "distillation_hidden_size=16,distillation_bottleneck_size=8,num_prototypes=16"
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("audio")
    generator = np.random.default_rng(0)
    for index in range(8):
        soundfile.write(folder / f"{index}.flac", 0.1 * generator.standard_normal(8000), 8000)
    return folder


def options(folder, output, **kwargs):
    defaults = {
        "train_data": folder,
        "output_dir": output,
        "config_overrides": SMALL,
        "global_seconds": 0.5,
        "local_seconds": 0.25,
        "per_device_train_batch_size": 4,
        "num_train_epochs": 2,
        "warmup_epochs": 1,
        "report_to": "none",
        "use_cpu": True,
        "save_strategy": "no",
        "plot_steps": 0,
        "disable_tqdm": True,
    }
    chosen = {name: value for name, value in {**defaults, **kwargs}.items() if value is not None}
    return [text for name, value in chosen.items() for text in (f"--{name}", str(value))]


@pytest.fixture(scope="module")
def run(folder, tmp_path_factory):
    """A complete run of four steps, with checkpoints after two and four, and its command line."""
    output = tmp_path_factory.mktemp("run")
    return script.main(command_of_run(folder, output)), output


def command_of_run(folder, output):
    return options(folder, output, plot_steps=2, logging_steps=1, save_strategy="epoch", resume_from_checkpoint=True)


def test_a_run_gives_a_checkpoint_that_exports(run, tmp_path):
    trainer, output = run
    assert trainer.state.global_step == 4
    assert trainer.model.config.num_frames == 48
    assert (output / "pictures" / "curves.png").is_file()
    history = json.loads((output / "trainer_state.json").read_text())["log_history"]
    assert history[-1]["train_loss"] > 0
    encoder = ASiTModel.from_pretrained(export_model(output, tmp_path / "encoder"))
    teacher = trainer.model.teacher["asit"]
    assert (encoder.embeddings.cls_token == teacher.embeddings.cls_token).all()


def test_the_2023_preset_has_its_own_heads_and_no_local_crops(folder, tmp_path):
    trainer = script.main(options(folder, tmp_path, preset="2023", local_seconds=None, num_train_epochs=1))
    config = trainer.model.config
    assert (config.num_patch_prototypes, config.reconstruction_hidden_size) == (1024, 768)
    assert (config.global_loss_weight, config.reconstruction_loss_weight) == (1.0, 2.0)
    assert "local_waveforms" not in trainer.data_collator([trainer.train_dataset[0]])


def build(options):
    classes = (script.ModelArguments, script.DataArguments, script.ASiTPreTrainingArguments)
    model_args, data_args, args = script.parse_arguments(classes, options)
    return script.build_model(model_args, data_args, args)


def assert_teacher_is_student(model):
    for part, teacher in model.teacher.items():
        student = getattr(model, part).state_dict()
        assert all(torch.equal(student[name], value) for name, value in teacher.state_dict().items()), part


def assert_same(module, state):
    for name, value in module.state_dict().items():
        assert torch.equal(value, state[name]), name


def test_it_starts_from_an_encoder_with_new_heads(run, folder, tmp_path):
    trained = run[0].model
    encoder = export_model(run[1], tmp_path / "encoder")
    longer = {"model_name_or_path": encoder, "global_seconds": 0.7}
    model = build(options(folder, tmp_path / "next", **longer))
    assert isinstance(model, ASiTForPreTraining)
    assert_same(model.asit, ASiTModel.from_pretrained(encoder).state_dict())
    assert_teacher_is_student(model)
    assert model.config.num_frames == 48  # the encoder's, which resizes its positions itself
    for name, value in model.heads.named_parameters():
        if not name.endswith(("bias", "weight_g")):  # these have constant initial values
            for old in (trained.heads, trained.teacher["heads"]):
                assert not torch.allclose(value, old.get_parameter(name)), name
        elif "projection" not in name:
            assert (value == name.endswith("weight_g")).all(), name
    assert not model.cls_center.center.any()
    trainer = script.main(options(folder, tmp_path / "next", **longer, num_train_epochs=1))
    assert trainer.state.global_step == 2
    recipe = json.loads((tmp_path / "next" / "run.json").read_text())["recipe"]
    assert recipe["learning rate of the encoder"] == pytest.approx(0.02 * recipe["learning rate"])


def test_it_starts_from_a_pretraining_checkpoint_with_its_heads(folder, tmp_path, caplog):
    heads = f"{SMALL},num_patch_prototypes=12,reconstruction_hidden_size=20,reconstruction_bottleneck_size=10"
    preset = {"preset": "2023", "local_seconds": None}
    first = options(folder, tmp_path / "run", num_train_epochs=1, **preset, config_overrides=heads)
    trained = script.main(first).model
    chosen = {"model_name_or_path": tmp_path / "run", **preset, "config_overrides": "student_temperature=0.2"}
    model = build(options(folder, tmp_path / "next", **chosen))
    assert_same(model, {name: value.cpu() for name, value in trained.state_dict().items()})
    assert (model.config.num_patch_prototypes, model.config.global_loss_weight) == (12, 1.0)
    assert model.config.student_temperature == 0.2
    assert "keeps its own" not in caplog.text
    model = build(options(folder, tmp_path / "next", **{**chosen, "preset": "2024"}))
    assert (model.config.num_patch_prototypes, model.config.global_loss_weight) == (12, 1.0)
    assert "heads of the 2024 objective; it keeps its own" in caplog.text


def test_it_starts_from_a_vit(folder, tmp_path):
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 40}
    vit = ViTModel(ViTConfig(**sizes, image_size=64))
    vit.save_pretrained(tmp_path / "vit")
    heads = "num_mel_bins=32,distillation_hidden_size=16,distillation_bottleneck_size=8,num_prototypes=16"
    chosen = {"model_name_or_path": tmp_path / "vit", "config_overrides": heads}
    model = build(options(folder, tmp_path / "run", **chosen))
    assert (model.config.num_frames, model.config.intermediate_size, model.config.drop_path_rate) == (48, 40, 0.1)
    assert torch.equal(model.asit.layers[0].mlp.fc1.weight, vit.layers[0].mlp.fc1.weight)
    assert_teacher_is_student(model)
    trainer = script.main(options(folder, tmp_path / "run", **chosen, num_train_epochs=1))
    assert trainer.state.global_step == 2
    assert trainer.processing_class.num_mel_bins == 32


def test_it_starts_from_dinov2(folder, tmp_path):
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "mlp_ratio": 2, "image_size": 56}
    dinov2 = Dinov2Model(Dinov2Config(**sizes, layerscale_value=0.5))
    dinov2.save_pretrained(tmp_path / "dinov2")
    heads = "num_mel_bins=64,distillation_hidden_size=16,distillation_bottleneck_size=8,num_prototypes=16"
    chosen = {"model_name_or_path": tmp_path / "dinov2", "config_overrides": heads}
    model = build(options(folder, tmp_path / "run", **chosen))
    assert (model.config.num_mel_bins, model.config.patch_size, model.config.num_frames) == (64, 16, 48)
    expected = 0.5 * dinov2.encoder.layer[0].mlp.fc2.weight
    assert torch.equal(model.asit.layers[0].mlp.fc2.weight, expected)
    assert_teacher_is_student(model)


def test_it_starts_from_a_converted_backbone(folder, tmp_path):
    """A checkpoint of the authors without heads, such as the public self-supervised one."""
    arrays = np.load(FIXTURES / "official_2024.npz")
    teacher = {name.removeprefix("teacher/"): torch.from_numpy(arrays[name]) for name in arrays.files}
    torch.save({name: value for name, value in teacher.items() if name.startswith("backbone.")}, tmp_path / "ssl.pt")
    with pytest.raises(ValueError, match="convert_original"):
        build(options(folder, tmp_path / "run", model_name_or_path=tmp_path / "ssl.pt"))
    convert(tmp_path / "ssl.pt", tmp_path / "asit", num_attention_heads=3, num_mel_bins=32)
    heads = "distillation_hidden_size=16,distillation_bottleneck_size=8,num_prototypes=16"
    chosen = {"model_name_or_path": tmp_path / "asit", "config_overrides": heads, "num_train_epochs": 1}
    model = build(options(folder, tmp_path / "run", **chosen))
    assert torch.equal(model.asit.embeddings.position_embeddings, teacher["backbone.pos_embed"])
    assert_teacher_is_student(model)
    trainer = script.main(options(folder, tmp_path / "run", **chosen))
    assert trainer.state.global_step == 2
    assert trainer.model.config.num_frames == 96
    assert not torch.equal(trainer.model.asit.embeddings.position_embeddings, teacher["backbone.pos_embed"])


def test_resuming_finds_the_last_checkpoint(run, folder, tmp_path):
    trainer, output = run
    shutil.copytree(output, tmp_path / "copy", ignore=shutil.ignore_patterns("checkpoint-4"))
    resumed = script.main(command_of_run(folder, tmp_path / "copy"))
    assert resumed.state.global_step == 4
    assert_same(resumed.model, trainer.model.state_dict())


def test_resuming_a_complete_run_leaves_its_files_untouched(run, folder):
    def contents():
        return {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in output.rglob("*") if path.is_file()}

    _, output = run
    before = contents()
    assert {output / name for name in ("model.safetensors", "run.json", "README.md", "trainer_state.json")} <= set(
        before
    )
    assert script.main(command_of_run(folder, output)).state.global_step == 4
    assert contents() == before


def test_resuming_with_more_epochs_saves_the_longer_run(folder, tmp_path):
    given = {"save_strategy": "steps", "save_steps": 1, "resume_from_checkpoint": True}
    assert script.main(options(folder, tmp_path, **given, num_train_epochs=1.5)).state.global_step == 3
    before = (tmp_path / "model.safetensors").read_bytes()
    assert script.main(options(folder, tmp_path, **given, num_train_epochs=2)).state.global_step == 4
    assert (tmp_path / "model.safetensors").read_bytes() != before


def test_resuming_completes_the_files_of_a_run_killed_at_its_end(run, folder, tmp_path):
    missing = "trainer_state.json", "run.json", "README.md"
    shutil.copytree(run[1], tmp_path / "copy")
    for name in missing:
        (tmp_path / "copy" / name).unlink()
    script.main(command_of_run(folder, tmp_path / "copy"))
    assert all((tmp_path / "copy" / name).is_file() for name in missing)


@pytest.mark.parametrize(
    ("given", "option"),
    [
        ({"shuffle_buffer": 10}, "shuffle_buffer"),
        ({"steps_per_epoch": 10}, "steps_per_epoch"),
        ({"knn_steps": 10}, "knn_steps"),
        ({"knn_test": "test.csv"}, "knn_test"),
        ({"preset": "2023"}, "local_seconds"),
        ({"num_local_crops": 0}, "local_seconds"),
        ({"num_local_crops": 2, "global_loss_weight": 0}, "num_local_crops"),
        ({"size": "tiny", "model_name_or_path": "checkpoint"}, "size"),
    ],
)
def test_options_without_effect_are_refused(folder, tmp_path, given, option):
    with pytest.raises(ValueError, match=f"{option} cannot be used"):
        script.main(options(folder, tmp_path, **given))


def test_schedules_of_a_stream_count_steps_per_epoch(folder, tmp_path):
    lines = [json.dumps({"audio": str(path)}) for path in sorted(folder.glob("*.flac"))]
    (tmp_path / "clips.jsonl").write_text("\n".join(lines))
    streaming = {"streaming": True, "max_steps": 6, "steps_per_epoch": 2, "warmup_teacher_temperature_epochs": 3}
    trainer = script.main(options(tmp_path / "clips.jsonl", tmp_path / "run", **streaming))
    assert trainer.state.global_step == 6
    schedules = trainer.schedules
    assert schedules.learning_rate.argmax() in (1, 2)
    assert schedules.learning_rate[-1] < 0.5 * schedules.learning_rate.max()
    assert schedules.teacher_temperature.tolist() == pytest.approx([0.04, 0.04, 0.055, 0.055, 0.07, 0.07])
    model = trainer.model
    prototypes = [heads.distillation.cls_prototypes.weight_v for heads in (model.heads, model.teacher["heads"])]
    assert not (prototypes[0] == prototypes[1]).all()  # frozen in the first epoch only
    with pytest.raises(ValueError, match="steps_per_epoch"):
        script.main(options(tmp_path / "clips.jsonl", tmp_path / "other", streaming=True, max_steps=3))


def test_the_extractor_of_a_checkpoint_is_kept(folder, tmp_path):
    script.main(options(folder, tmp_path / "run", num_train_epochs=1, sampling_rate=8000, mean=-6.0, std=5.0))
    chosen = {"model_name_or_path": tmp_path / "run", "num_train_epochs": 1, "std": 4.0}
    trainer = script.main(options(folder, tmp_path / "next", **chosen))
    extractor = trainer.processing_class
    assert (extractor.sampling_rate, extractor.mean, extractor.std) == (8000, -6.0, 4.0)
    assert trainer.train_dataset.settings.sampling_rate == 8000


def test_config_overrides_take_any_field():
    text = "num_patch_prototypes=64,student_temperature=0.2,hidden_act=relu"
    assert script.parse_overrides(text) == {
        "num_patch_prototypes": 64,
        "student_temperature": 0.2,
        "hidden_act": "relu",
    }
    with pytest.raises(ValueError, match="no_field"):
        script.parse_overrides("no_field=1")


def test_a_folder_without_audio_is_refused(tmp_path):
    (tmp_path / "notes.txt").write_text("no audio")
    with pytest.raises(FileNotFoundError, match=r"\.txt"):
        script.main(options(tmp_path, tmp_path / "run"))


ABLATIONS = {
    "full": ({}, {}),
    "reconstruction": ({"global_loss_weight": 0, "local_loss_weight": 0}, {}),
    "reconstruction-local": ({"global_loss_weight": 0}, {}),
    "reconstruction-global": ({"local_loss_weight": 0}, {}),
    "no-groups": ({}, {"pattern": "patches"}),
    "no-replacement": ({}, {"replace_probability": 0}),
    "patch-aligned": ({}, {"alignment": 16}),
}


def test_every_ablation_recipe_is_tested():
    recipes = {path.stem.removeprefix("ablation-") for path in (EXAMPLES / "recipes").glob("ablation-*.yaml")}
    assert recipes == set(ABLATIONS)


@pytest.mark.parametrize("name", ABLATIONS)
def test_ablation_recipes_change_one_thing(folder, tmp_path, name):
    recipe = str(EXAMPLES / "recipes" / f"ablation-{name}.yaml")
    trainer = script.main([*options(folder, tmp_path, max_steps=1, logging_steps=1), "--recipe", recipe])
    config, gmml = ABLATIONS[name]
    weights = {"global_loss_weight": 0.5, "local_loss_weight": 0.5, "reconstruction_loss_weight": 1, **config}
    assert {field: getattr(trainer.model.config, field) for field in weights} == weights
    assert trainer.args.gmml == dataclasses.replace(GMML(), **gmml)
    assert trainer.train_dataset.settings.num_local_crops == (4 if weights["global_loss_weight"] else 0)
    logged = next(row for row in trainer.state.log_history if "learning_rate" in row)
    assert {field for field in weights if field.removesuffix("_weight") in logged} == {
        field for field, weight in weights.items() if weight
    }


def test_a_knn_probe_of_labelled_clips_is_logged(folder, tmp_path):
    for split in ("train", "test"):
        lines = [f"{folder / f'{index}.flac'},{'ab'[index % 2]}" for index in range(4)]
        (tmp_path / f"{split}.csv").write_text("\n".join(["file,label", *lines]))
    arguments = {"knn_train": tmp_path / "train.csv", "knn_test": tmp_path / "test.csv", "knn_steps": 2}
    trainer = script.main(options(folder, tmp_path / "run", logging_steps=2, **arguments))
    rows = [row for row in trainer.state.log_history if "knn_accuracy" in row]
    assert [row["step"] for row in rows] == [2, 4]
    assert all(row["knn_accuracy"] == 1 for row in rows)  # each clip is its own neighbor
    with pytest.raises(ValueError, match="needs knn_test"):
        script.main(options(folder, tmp_path / "run", knn_train=tmp_path / "train.csv"))


def test_sigterm_ends_the_script_with_a_checkpoint_and_no_final_model(folder, tmp_path, monkeypatch):
    step = ASiTPreTrainer.training_step

    def terminated(self, *args, **kwargs):
        os.kill(os.getpid(), signal.SIGTERM)
        return step(self, *args, **kwargs)

    monkeypatch.setattr(ASiTPreTrainer, "training_step", terminated)
    with pytest.raises(SystemExit) as stopped:
        script.main(options(folder, tmp_path, save_strategy="steps", save_steps=100))
    assert stopped.value.code == 143
    assert (tmp_path / "checkpoint-1" / "model.safetensors").is_file()
    assert not (tmp_path / "model.safetensors").exists()


@pytest.fixture(scope="module")
def pool(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pool")
    noise = np.random.default_rng(0).integers(-3000, 3000, (8, 72000)).astype(np.int16)
    write_packed(folder, [(f"{index}.wav", "ab"[index // 6], clip) for index, clip in enumerate(noise)], 16000)
    return folder


def test_it_trains_on_packed_audio(pool, tmp_path):
    trainer = script.main(options(pool, tmp_path / "run", logging_steps=1))
    assert trainer.state.global_step == 4
    assert isinstance(trainer.train_dataset, PackedCrops)
    run = json.loads((tmp_path / "run" / "run.json").read_text())
    assert run["training_data"].startswith("8 clips, 0.01 hours, at 16000 Hz")


def test_parts_of_packed_audio_are_repeated(pool, tmp_path):
    trainer = script.main([*options(pool, tmp_path), "--repeat", "b=3"])
    names = [trainer.train_dataset[index]["file"] for index in range(len(trainer.train_dataset))]
    assert names == [f"{index}.wav" for index in (0, 1, 2, 3, 4, 5, 6, 6, 6, 7, 7, 7)]


@pytest.mark.parametrize("repeat", ["b", "b=", "b=1.5", "=2", "b=2 b=3"])
def test_repeat_takes_parts_and_whole_numbers(pool, tmp_path, repeat):
    with pytest.raises(ValueError, match="PART=TIMES"):
        script.main([*options(pool, tmp_path), "--repeat", *repeat.split()])


def test_only_packed_audio_is_repeated(folder, tmp_path):
    with pytest.raises(ValueError, match="packed audio with --repeat"):
        script.main([*options(folder, tmp_path), "--repeat", "b=3"])


@pytest.mark.parametrize(
    ("more", "error"),
    [
        ({"sampling_rate": 8000}, "8000 Hz.*16000 Hz.*cannot be resampled"),
        ({"streaming": True, "max_steps": 2, "steps_per_epoch": 2}, "streaming"),
    ],
)
def test_packed_audio_cannot_be_resampled_or_streamed(pool, tmp_path, more, error):
    with pytest.raises(ValueError, match=error):
        script.main(options(pool, tmp_path, **more))


def test_parcels_must_be_decoded_first(pool, tmp_path):
    encode_parcels(PackedAudio.load(pool), tmp_path / "parcels", num_threads=1)
    with pytest.raises(ValueError, match="decode"):
        script.main(options(tmp_path / "parcels", tmp_path / "run"))


def test_packed_audio_must_be_the_only_data(pool, folder, tmp_path):
    command = options(pool, tmp_path)
    command.insert(command.index(str(pool)) + 1, str(folder))
    with pytest.raises(ValueError, match="only train_data"):
        script.main(command)


@pytest.mark.parametrize("streaming", [False, True])
def test_a_run_with_max_minutes_records_its_steps(folder, tmp_path, monkeypatch, streaming):
    monkeypatch.setattr("asit_hf.utils.time_budget.now", itertools.count().__next__)  # each reading is 1 s later
    chosen = {"streaming": True, "steps_per_epoch": 2} if streaming else {}
    trainer = script.main(options(folder, tmp_path, max_minutes=0.5, **chosen))
    steps = trainer.state.global_step
    assert 8 <= steps <= 30
    recipe = json.loads((tmp_path / "run.json").read_text())["recipe"]
    assert (recipe["optimizer steps"], recipe["epochs"]) == (steps, steps / 2)
    assert recipe["duration"] in ("0.5 minutes", "0.6 minutes")  # by that clock
    assert trainer.schedules.at(steps)["learning_rate"] < 0.4 * trainer.args.learning_rate
