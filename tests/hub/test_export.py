import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModel

from asit_hf import (
    ASiTConfig,
    ASiTFeatureExtractor,
    ASiTForAudioClassification,
    ASiTForAudioFrameClassification,
    ASiTForPreTraining,
    ASiTModel,
)
from asit_hf.hub.__main__ import main
from asit_hf.hub.cards import write_model_card
from asit_hf.hub.export import export_model, halve_weights
from asit_hf.loading import find_checkpoint

EXTRACTOR = {"num_mel_bins": 32, "sampling_rate": 8000, "mean": -3.25, "std": 2.5}


def tiny_config(**kwargs) -> ASiTConfig:
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    heads = {"distillation_hidden_size": 16, "distillation_bottleneck_size": 8, "num_prototypes": 16}
    return ASiTConfig(**{**sizes, **heads, "num_mel_bins": 32, "num_frames": 96, **kwargs})


def save_pretraining(folder: Path, seed: int = 0, dtype: torch.dtype = torch.float32) -> ASiTForPreTraining:
    """A checkpoint whose teacher differs from its student."""
    torch.manual_seed(seed)
    model = ASiTForPreTraining(tiny_config())
    for parameter in model.teacher.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    model.to(dtype).save_pretrained(folder)
    ASiTFeatureExtractor(**EXTRACTOR).save_pretrained(folder)
    return model


def save_classifier(folder: Path, cls=ASiTForAudioClassification) -> Path:
    cls(tiny_config(id2label={0: "dog", 1: "rain"}, problem_type="multi_label_classification")).save_pretrained(folder)
    ASiTFeatureExtractor(**EXTRACTOR).save_pretrained(folder)
    return folder


def assert_bit_identical(folder: Path, encoder: ASiTModel) -> None:
    weights, expected = load_file(folder / "model.safetensors"), encoder.state_dict()
    assert set(weights) == set(expected)
    for name, tensor in expected.items():
        assert weights[name].dtype == tensor.dtype
        assert torch.equal(weights[name], tensor), name


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory) -> tuple[Path, ASiTForPreTraining]:
    folder = tmp_path_factory.mktemp("pretraining")
    return folder, save_pretraining(folder)


@pytest.mark.parametrize("name", ["teacher", "student"])
def test_export_is_bit_identical(pretrained, tmp_path, name):
    folder, model = pretrained
    output = export_model(folder, tmp_path / "a" / "encoder", encoder=name)
    assert output == tmp_path / "a" / "encoder"
    encoder, other = model.teacher["asit"], model.asit
    if name == "student":
        encoder, other = other, encoder
    assert_bit_identical(output, encoder)
    weights = load_file(output / "model.safetensors")
    assert not torch.equal(weights["embeddings.cls_token"], other.embeddings.cls_token)

    config = ASiTConfig.from_pretrained(output)
    assert config.architectures == ["ASiTModel"]
    assert config.position_grid == model.config.position_grid
    extractor = ASiTFeatureExtractor.from_pretrained(output)
    assert {name: getattr(extractor, name) for name in EXTRACTOR} == EXTRACTOR
    values = torch.randn(2, 96, 32)
    with torch.no_grad():
        exported = ASiTModel.from_pretrained(output).eval()(values).last_hidden_state
        assert torch.equal(exported, encoder.eval()(values).last_hidden_state)
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["encoder"]


def test_export_keeps_the_precision(tmp_path):
    model = save_pretraining(tmp_path / "half", dtype=torch.bfloat16)
    assert_bit_identical(export_model(tmp_path / "half", tmp_path / "encoder"), model.teacher["asit"])


def test_sharded_checkpoints_are_exported(pretrained, tmp_path):
    _, model = pretrained
    model.save_pretrained(tmp_path / "sharded", max_shard_size="20KB")
    ASiTFeatureExtractor(**EXTRACTOR).save_pretrained(tmp_path / "sharded")
    assert_bit_identical(export_model(tmp_path / "sharded", tmp_path / "encoder"), model.teacher["asit"])
    next(iter((tmp_path / "sharded").glob("model-*.safetensors"))).unlink()
    with pytest.raises(FileNotFoundError, match="no model-"):
        export_model(tmp_path / "sharded", tmp_path / "encoder")


def test_exported_encoder_starts_a_classifier(pretrained, tmp_path):
    folder, model = pretrained
    output = export_model(folder, tmp_path / "encoder")
    classifier = ASiTForAudioClassification.from_pretrained(output, num_labels=3)
    for name, tensor in model.teacher["asit"].state_dict().items():
        assert torch.equal(classifier.asit.state_dict()[name], tensor)


@pytest.fixture
def run_folder(tmp_path) -> Path:
    """A Trainer run cut off at step 30: the checkpoint of step 20 is the last complete, that of step 9 is older."""
    run = tmp_path / "run"
    for seed, step in enumerate((9, 20, 30)):
        save_pretraining(run / f"checkpoint-{step}", seed=seed)
        (run / f"checkpoint-{step}" / "preprocessor_config.json").unlink()
        state = {"global_step": step, "epoch": step / 10}
        (run / f"checkpoint-{step}" / "trainer_state.json").write_text(json.dumps(state))
    weights = run / "checkpoint-30" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    ASiTFeatureExtractor(**EXTRACTOR).save_pretrained(run)
    (run / "checkpoint-best").mkdir()
    return run


def test_a_run_folder_means_its_last_complete_checkpoint(run_folder, tmp_path, caplog):
    assert find_checkpoint(run_folder) == run_folder / "checkpoint-20"
    assert "checkpoint-30" in caplog.text
    output = export_model(run_folder, tmp_path / "encoder")
    model = ASiTForPreTraining.from_pretrained(run_folder / "checkpoint-20")
    assert_bit_identical(output, model.teacher["asit"])
    assert ASiTFeatureExtractor.from_pretrained(output).mean == EXTRACTOR["mean"]
    assert "| optimizer steps | 20 |" in (output / "README.md").read_text()


def test_a_model_saved_in_the_run_folder_comes_first(run_folder):
    save_pretraining(run_folder)
    assert find_checkpoint(run_folder) == run_folder


def test_no_complete_checkpoint(run_folder, tmp_path):
    for step in (9, 20):
        (run_folder / f"checkpoint-{step}" / "model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match="checkpoint-30: damaged.*checkpoint-9: no model.safetensors"):
        export_model(run_folder, tmp_path / "encoder")
    assert not (tmp_path / "encoder").exists()


def test_wrong_inputs(pretrained, tmp_path):
    folder, _ = pretrained
    output = tmp_path / "encoder"
    with pytest.raises(FileNotFoundError, match="nowhere"):
        export_model(tmp_path / "nowhere", output)
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match="no config.json"):
        export_model(tmp_path / "empty", output)
    with pytest.raises(ValueError, match="'mentor'"):
        export_model(folder, output, encoder="mentor")
    with pytest.raises(ValueError, match="ASiTForAudioClassification"):
        export_model(save_classifier(tmp_path / "classifier"), output, encoder="student")
    with pytest.raises(ValueError, match="int8.*onnx"):
        export_model(folder, output, int8=True)

    shutil.copytree(folder, tmp_path / "bare")
    (tmp_path / "bare" / "preprocessor_config.json").unlink()
    with pytest.raises(FileNotFoundError, match="no preprocessor_config.json in .*bare"):
        export_model(tmp_path / "bare", output)
    ASiTFeatureExtractor(num_mel_bins=64).save_pretrained(tmp_path / "bare")
    with pytest.raises(ValueError, match="32 mel bins.*64"):
        export_model(tmp_path / "bare", output)

    shutil.copytree(folder, tmp_path / "foreign")
    config = json.loads((folder / "config.json").read_text())
    (tmp_path / "foreign" / "config.json").write_text(json.dumps(config | {"model_type": "vit"}))
    with pytest.raises(ValueError, match="'vit'"):
        export_model(tmp_path / "foreign", output)
    assert not output.exists()


def test_a_checkpoint_without_its_teacher(pretrained, tmp_path):
    folder, model = pretrained
    shutil.copytree(folder, tmp_path / "student")
    weights = {name: tensor for name, tensor in model.state_dict().items() if not name.startswith("teacher.")}
    model.save_pretrained(tmp_path / "student", state_dict=weights)
    with pytest.raises(ValueError, match="weights of the teacher's encoder"):
        export_model(tmp_path / "student", tmp_path / "encoder")
    assert_bit_identical(export_model(tmp_path / "student", tmp_path / "encoder", encoder="student"), model.asit)


def test_only_earlier_exports_are_replaced(pretrained, tmp_path):
    folder, model = pretrained
    output = tmp_path / "encoder"
    export_model(folder, output, encoder="student")
    export_model(folder, output, encoder="teacher")
    assert_bit_identical(output, model.teacher["asit"])

    (output / "notes.txt").write_text("mine")
    with pytest.raises(FileExistsError, match="overwrite"):
        export_model(folder, output)
    assert (output / "notes.txt").read_text() == "mine"
    export_model(folder, output, encoder="student", overwrite=True)
    assert_bit_identical(output, model.asit)
    assert not (output / "notes.txt").exists()

    classifier = save_classifier(tmp_path / "classifier")
    with pytest.raises(FileExistsError):
        export_model(folder, classifier)
    (tmp_path / "file").write_text("mine")
    with pytest.raises(FileExistsError, match="is a file"):
        export_model(folder, tmp_path / "file", overwrite=True)


@pytest.mark.parametrize("cls", [ASiTForAudioClassification, ASiTForAudioFrameClassification])
def test_classifiers_are_exported_as_they_were_saved(tmp_path, cls):
    source, output = save_classifier(tmp_path / "source", cls), tmp_path / "output"
    write_model_card(source, limitations="Dogs and rain only.")
    for _ in range(2):  # the second replaces the first
        export_model(source, output)
        assert_bit_identical(output, cls.from_pretrained(source))
    config = ASiTConfig.from_pretrained(output)
    assert (config.architectures, config.problem_type) == ([cls.__name__], "multi_label_classification")
    assert config.id2label == {0: "dog", 1: "rain"}
    assert ASiTFeatureExtractor.from_pretrained(output).std == EXTRACTOR["std"]
    card = (output / "README.md").read_text()
    assert "Dogs and rain only." in card
    assert '"output"' in card
    assert '"source"' not in card

    export_model(source, tmp_path / "half", half=True, license="cc0-1.0")
    assert {tensor.dtype for tensor in load_file(tmp_path / "half" / "model.safetensors").values()} == {torch.float16}
    assert "license: cc0-1.0" in (tmp_path / "half" / "README.md").read_text()

    save_classifier(output, cls)  # a model trained since
    with pytest.raises(FileExistsError, match="overwrite"):
        export_model(source, output)


def test_encoders_are_exported_as_they_were_saved(pretrained, tmp_path):
    folder, model = pretrained
    export_model(export_model(folder, tmp_path / "encoder"), tmp_path / "copy")
    assert_bit_identical(tmp_path / "copy", model.teacher["asit"])
    assert "| encoder | teacher |" in (tmp_path / "copy" / "README.md").read_text()


def test_an_export_with_its_run_record_is_replaced(pretrained, tmp_path):
    folder = shutil.copytree(pretrained[0], tmp_path / "run")
    (folder / "run.json").write_text(json.dumps({"global_step": 7}))
    for name in ("student", "teacher"):
        output = export_model(folder, tmp_path / "encoder", encoder=name)
    assert_bit_identical(output, pretrained[1].teacher["asit"])
    assert json.loads((output / "run.json").read_text()) == {"global_step": 7}


def test_a_run_cannot_replace_itself(run_folder):
    for output in (run_folder, run_folder / "checkpoint-20", run_folder.parent):
        with pytest.raises(ValueError, match="choose another folder"):
            export_model(run_folder, output, overwrite=True)
    assert (run_folder / "checkpoint-20" / "model.safetensors").is_file()


def test_a_failed_export_leaves_the_earlier_one(pretrained, tmp_path):
    folder, model = pretrained
    output = export_model(folder, tmp_path / "encoder")
    with pytest.raises(ValueError, match="command"):
        export_model(folder, output, encoder="student", results=[{"task": "events"}])
    assert_bit_identical(output, model.teacher["asit"])
    assert [path.name for path in tmp_path.iterdir()] == ["encoder"]


def test_command_line(pretrained, tmp_path, capsys):
    folder, model = pretrained
    output = tmp_path / "encoder"
    assert main(["export", str(folder), str(output), "--encoder", "student"]) == 0
    assert capsys.readouterr().out.strip() == str(output)
    assert_bit_identical(output, model.asit)
    (output / "notes.txt").touch()
    assert main(["export", str(folder), str(output)]) == 1
    assert "overwrite" in capsys.readouterr().err
    assert main(["export", str(folder), str(output), "--overwrite"]) == 0
    assert_bit_identical(output, model.teacher["asit"])


def test_shards_of_a_given_size(pretrained, tmp_path):
    folder, model = pretrained
    whole, shards = tmp_path / "whole", tmp_path / "shards"
    assert main(["export", str(folder), str(whole), "--half"]) == 0
    size = (whole / "model.safetensors").stat().st_size
    assert main(["export", str(folder), str(shards), "--half", "--max_shard_size", f"{size // 2000}KB"]) == 0
    files = sorted(shards.glob("model-*.safetensors"))
    assert len(files) > 1
    assert max(path.stat().st_size for path in files) < 0.75 * size
    loaded = AutoModel.from_pretrained(shards)
    assert loaded.dtype == torch.float32
    for name, tensor in AutoModel.from_pretrained(whole).state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor), name
    assert main(["export", str(folder), str(shards)]) == 0  # replaces the shards
    assert not list(shards.glob("model-*.safetensors"))


def test_half_the_size_computes_in_float32(pretrained, tmp_path):
    folder, model = pretrained
    assert main(["export", str(folder), str(tmp_path / "half"), "--half"]) == 0
    stored = load_file(tmp_path / "half" / "model.safetensors")
    assert {tensor.dtype for tensor in stored.values()} == {torch.float16}
    for loaded in (AutoModel.from_pretrained(tmp_path / "half"), ASiTModel.from_pretrained(tmp_path / "half")):
        assert loaded.dtype == torch.float32
        for name, tensor in model.teacher["asit"].state_dict().items():
            assert torch.equal(loaded.state_dict()[name], tensor.half().float()), name
    assert AutoModel.from_pretrained(tmp_path / "half", dtype=torch.float16).dtype == torch.float16

    classifier = save_classifier(tmp_path / "classifier")
    assert main(["halve", str(classifier)]) == 0
    assert ASiTForAudioClassification.from_pretrained(classifier).dtype == torch.float32


def test_weights_beyond_float16_stay_unchanged(tmp_path, capsys):
    assert main(["halve", str(tmp_path)]) == 1
    assert "no config.json" in capsys.readouterr().err
    model = ASiTModel(tiny_config())
    model.embeddings.cls_token.data[:] = 1e6
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="float16 .* embeddings.cls_token"):
        halve_weights(tmp_path)
    assert_bit_identical(tmp_path, model)
