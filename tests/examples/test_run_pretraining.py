import importlib.util
import json
import sys
from pathlib import Path

import numpy as np
import pytest
import soundfile

from asit_hf import ASiTForPreTraining, ASiTModel, export_encoder

EXAMPLES = Path(__file__).parents[2] / "examples"
SMALL = (
    "hidden_size=32,num_hidden_layers=2,num_attention_heads=2,intermediate_size=64,num_mel_bins=32,"
    "distillation_hidden_size=16,distillation_bottleneck_size=8,num_prototypes=16"
)


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location("run_pretraining", EXAMPLES / "run_pretraining.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


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
        "size": "tiny",
        "config_overrides": SMALL,
        "global_seconds": 0.5,
        "local_seconds": 0.25,
        "per_device_train_batch_size": 4,
        "num_train_epochs": 2,
        "warmup_epochs": 1,
        "report_to": "none",
        "use_cpu": True,
        "save_strategy": "no",
        "disable_tqdm": True,
    }
    return [text for name, value in {**defaults, **kwargs}.items() for text in (f"--{name}", str(value))]


def test_the_run_gives_a_checkpoint_that_exports(script, folder, tmp_path):
    trainer = script.main(options(folder, tmp_path / "run", picture_steps=2, logging_steps=1))
    assert trainer.state.global_step == 4
    assert trainer.model.config.num_frames == 48
    assert (tmp_path / "run" / "pictures" / "curves.png").is_file()
    history = json.loads((tmp_path / "run" / "trainer_state.json").read_text())["log_history"]
    assert history[-1]["train_loss"] > 0
    encoder = ASiTModel.from_pretrained(export_encoder(tmp_path / "run", tmp_path / "encoder"))
    teacher = trainer.model.teacher["asit"]
    assert (encoder.embeddings.cls_token == teacher.embeddings.cls_token).all()


def test_the_2023_objective_has_its_own_heads_and_no_local_crops(script, folder, tmp_path):
    trainer = script.main(options(folder, tmp_path, objective="2023", num_train_epochs=1))
    config = trainer.model.config
    assert (config.num_patch_prototypes, config.reconstruction_hidden_size) == (1024, 768)
    assert (config.global_loss_weight, config.reconstruction_loss_weight) == (1.0, 2.0)
    assert "local_waveforms" not in trainer.data_collator([trainer.train_dataset[0]])


def test_it_goes_on_from_an_encoder_with_fresh_heads(script, folder, tmp_path):
    script.main(options(folder, tmp_path / "run", num_train_epochs=1))
    encoder = export_encoder(tmp_path / "run", tmp_path / "encoder")
    model_args, data_args, args = script.parse_arguments(
        (script.ModelArguments, script.DataArguments, script.ASiTPreTrainingArguments),
        options(folder, tmp_path / "next", model_name_or_path=encoder),
    )
    model = script.build_model(model_args, data_args, args)
    assert isinstance(model, ASiTForPreTraining)
    expected = ASiTModel.from_pretrained(encoder).state_dict()
    for part in (model.asit, model.teacher["asit"]):
        assert all((part.state_dict()[name] == value).all() for name, value in expected.items())


def test_resuming_finds_the_last_checkpoint(script, folder, tmp_path):
    saving = {"save_strategy": "steps", "save_steps": 2, "num_train_epochs": 3}
    whole = script.main(options(folder, tmp_path, **saving))
    (tmp_path / "checkpoint-6").rename(tmp_path / "kept-6")
    resumed = script.main(options(folder, tmp_path, **saving, resume_from_checkpoint=True))
    assert resumed.state.global_step == 6
    for (name, expected), value in zip(whole.model.state_dict().items(), resumed.model.state_dict().values()):
        assert (expected == value).all(), name


def test_streaming_follows_the_schedules(script, folder, tmp_path):
    lines = [json.dumps({"audio": str(path)}) for path in sorted(folder.glob("*.flac"))]
    (tmp_path / "clips.jsonl").write_text("\n".join(lines))
    streaming = {"streaming": True, "max_steps": 6, "steps_per_epoch": 2, "teacher_temperature_warmup_epochs": 3}
    trainer = script.main(options(tmp_path / "clips.jsonl", tmp_path / "run", **streaming))
    assert trainer.state.global_step == 6
    schedules = trainer.schedules
    assert schedules.learning_rate.argmax() in (1, 2)
    assert schedules.learning_rate[-1] < 0.5 * schedules.learning_rate.max()
    assert schedules.teacher_temperature.tolist() == pytest.approx([0.04, 0.04, 0.055, 0.055, 0.07, 0.07])
    model = trainer.model
    prototypes = [heads.distillation.cls_prototypes.weight_v for heads in (model.heads, model.teacher["heads"])]
    assert not (prototypes[0] == prototypes[1]).all()  # they rested for the first epoch only
    with pytest.raises(ValueError, match="steps_per_epoch"):
        script.main(options(tmp_path / "clips.jsonl", tmp_path / "other", streaming=True, max_steps=3))


def test_a_checkpoint_keeps_its_rate_and_statistics(script, folder, tmp_path):
    script.main(options(folder, tmp_path / "run", num_train_epochs=1, sampling_rate=8000, mean=-6.0, std=5.0))
    chosen = {"model_name_or_path": tmp_path / "run", "num_train_epochs": 1, "std": 4.0}
    trainer = script.main(options(folder, tmp_path / "next", **chosen))
    extractor = trainer.processing_class
    assert (extractor.sampling_rate, extractor.mean, extractor.std) == (8000, -6.0, 4.0)
    assert trainer.train_dataset.settings.sampling_rate == 8000


def test_config_overrides_take_any_field(script):
    text = "num_patch_prototypes=64,student_temperature=0.2,hidden_act=relu"
    assert script.parse_overrides(text) == {
        "num_patch_prototypes": 64,
        "student_temperature": 0.2,
        "hidden_act": "relu",
    }
    with pytest.raises(ValueError, match="no_field"):
        script.parse_overrides("no_field=1")


def test_a_folder_without_audio_is_refused(script, tmp_path):
    (tmp_path / "notes.txt").write_text("nothing to hear")
    with pytest.raises(FileNotFoundError, match=r"\.txt"):
        script.main(options(tmp_path, tmp_path / "run"))
