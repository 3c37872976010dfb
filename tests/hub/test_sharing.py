"""Pushing to and loading from the Hub, played by a loopback server, in separate processes."""

import json
from pathlib import Path

import numpy as np
import pytest
import soundfile
from huggingface_hub import ModelCard
from loopback_hub import PACKAGE, run
from tiny import MEL, TINY, build

from asit_hf import ASiTFeatureExtractor, ASiTForAudioClassification, ASiTModel
from asit_hf.configuration_asit import AUTO_MAP, SENTENCE_TRANSFORMERS_FILES
from asit_hf.hub.__main__ import main
from asit_hf.hub.cards import write_model_card

HUB_FILES = {"configuration_asit.py", "fbank_asit.py", "feature_extraction_asit.py", "modeling_asit.py"}

PUSH = """
import json, sys
import torch
from asit_hf import (ASiTConfig, ASiTFeatureExtractor, ASiTForAudioClassification, ASiTForAudioFrameClassification,
                     ASiTForPreTraining, ASiTModel)

tiny = json.loads(sys.argv[1])
labels = {"id2label": {0: "dog", 1: "rain"}, "label2id": {"dog": 0, "rain": 1}}
extractor = ASiTFeatureExtractor(num_mel_bins=32)
torch.manual_seed(0)
models = {
    "encoder": ASiTModel(ASiTConfig(**tiny)),
    "classifier": ASiTForAudioClassification(ASiTConfig(**tiny, **labels)),
    "frames": ASiTForAudioFrameClassification(ASiTConfig(**tiny, **labels)),
    "pretraining": ASiTForPreTraining(ASiTConfig(**tiny)),
}
values = torch.randn(1, 96, 32, generator=torch.Generator().manual_seed(0))
outputs = {}
for name, model in models.items():
    model.eval().push_to_hub(f"me/{name}")
    extractor.push_to_hub(f"me/{name}")
    with torch.no_grad():
        encoder = getattr(model, "asit", model)
        outputs[name] = encoder(values).last_hidden_state
        if name in ("classifier", "frames"):
            outputs[f"{name} logits"] = model(values).logits
torch.save(outputs, "expected.pt")
extractor.save_pretrained("extractor", push_to_hub=True, repo_id="me/extractor")
ASiTConfig(**tiny).save_pretrained("config", push_to_hub=True, repo_id="me/config")
"""

LOAD = """
import sys
import numpy as np
import torch
import transformers
from transformers import AutoFeatureExtractor, AutoModel, AutoModelForAudioClassification, pipeline
from transformers import AutoModelForAudioFrameClassification

remote = {"trust_remote_code": True}
values = torch.randn(1, 96, 32, generator=torch.Generator().manual_seed(0))
expected = torch.load("expected.pt")


def check(name, output):
    torch.testing.assert_close(output, expected[name], rtol=0, atol=1e-6)
    print(name)


with torch.no_grad():
    for name in ("encoder", "classifier", "frames", "pretraining"):
        check(name, AutoModel.from_pretrained(f"me/{name}", **remote).eval()(values).last_hidden_state)
        assert AutoFeatureExtractor.from_pretrained(f"me/{name}", **remote).num_mel_bins == 32
    classifier = AutoModelForAudioClassification.from_pretrained("me/classifier", **remote).eval()
    check("classifier logits", classifier(values).logits)
    frames = AutoModelForAudioFrameClassification.from_pretrained("me/frames", **remote).eval()
    check("frames logits", frames(values).logits)
sound = np.random.default_rng(0).normal(0, 0.1, 16000).astype(np.float32)
labels = pipeline("audio-classification", model="me/classifier", **remote)(sound)
assert {row["label"] for row in labels} == {"dog", "rain"}
"""

ALL = {"encoder", "classifier", "classifier logits", "frames", "frames logits", "pretraining"}


@pytest.fixture(scope="module")
def pushed(hub, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("pushed")
    run(PUSH, hub, folder, json.dumps(TINY))
    return folder


@pytest.mark.slow
def test_a_pushed_repository_has_all_that_loading_needs(hub, pushed):
    for name in ("encoder", "classifier", "frames", "pretraining"):
        files = set(hub.repositories[f"me/{name}"])
        assert files >= {"config.json", "preprocessor_config.json", "model.safetensors", *HUB_FILES}, name
        assert files >= {*SENTENCE_TRANSFORMERS_FILES}, name
    for name in ("extractor", "config"):  # pushed while they were saved
        assert set(hub.repositories[f"me/{name}"]) > HUB_FILES, name


@pytest.mark.slow
def test_everything_loads_with_the_package(hub, pushed):
    code = "import asit_hf\nfrom transformers import AutoModelForPreTraining\n" + LOAD
    code += "AutoModelForPreTraining.from_pretrained('me/pretraining')\n"
    assert set(run(code.replace("**remote", ""), hub, pushed).splitlines()) == ALL


@pytest.mark.slow
def test_everything_loads_without_the_package(hub, pushed, tmp_path):
    (tmp_path / "expected.pt").write_bytes((pushed / "expected.pt").read_bytes())
    assert set(run(LOAD, hub, tmp_path, package=False).splitlines()) == ALL


EXPORT = """
from asit_hf import ASiTForAudioClassification, ASiTModel, export_model
from asit_hf.hub import export
export.check_requirements = lambda: None
export.export_onnx = lambda model, extractor, folder, int8: folder.mkdir()  # the slow part
for name, cls in (("classifier", ASiTForAudioClassification), ("pretraining", ASiTModel)):
    weights = cls.from_pretrained(export_model(f"me/{name}", name, onnx=True)).state_dict()
    if name == "classifier":
        expected = cls.from_pretrained("me/classifier").state_dict()
        assert all((expected[key] == value).all() for key, value in weights.items())
"""


@pytest.mark.slow
def test_models_on_the_hub_are_exported(hub, pushed, tmp_path):
    run(EXPORT, hub, tmp_path)
    for name in ("classifier", "pretraining"):
        files = {path.name for path in (tmp_path / name).iterdir()}
        assert files >= {"config.json", "preprocessor_config.json", "model.safetensors", "README.md", *HUB_FILES}
        assert "onnx" in files


AGAIN = """
from transformers import AutoFeatureExtractor, AutoModelForAudioClassification
remote = {"trust_remote_code": True}
AutoModelForAudioClassification.from_pretrained("me/classifier", **remote).push_to_hub("me/again")
AutoFeatureExtractor.from_pretrained("me/classifier", **remote).push_to_hub("me/again")
"""


@pytest.mark.slow
@pytest.mark.parametrize("package", [True, False], ids=["with the package", "without"])
def test_what_was_loaded_can_be_pushed_on(hub, pushed, tmp_path, package):
    hub.repositories.pop("me/again", None)
    run(("import asit_hf\n" if package else "") + AGAIN, hub, tmp_path, package=package)
    first, again = hub.repositories["me/classifier"], hub.repositories["me/again"]
    assert {"config.json", "preprocessor_config.json", "model.safetensors", *HUB_FILES} <= set(again)
    assert set(SENTENCE_TRANSFORMERS_FILES) <= set(again)
    for name in ("config.json", "preprocessor_config.json"):
        assert json.loads(again[name]) == json.loads(first[name]), name
    assert again["model.safetensors"] == first["model.safetensors"]
    run(
        "from transformers import pipeline\nimport numpy as np\n"
        "pipeline('audio-classification', model='me/again', trust_remote_code=True)(np.zeros(16000, np.float32))",
        hub,
        tmp_path,
        package=False,
    )


UPLOAD = "import sys\nfrom asit_hf.hub.__main__ import main\nsys.exit(main(sys.argv[1:]))"


@pytest.mark.slow
def test_upload_adds_the_code_and_keeps_private_files_local(hub, tmp_path):
    folder = tmp_path / "run"
    build(ASiTForAudioClassification).save_pretrained(folder)
    ASiTFeatureExtractor(num_mel_bins=MEL).save_pretrained(folder)
    write_model_card(folder)
    for name in (*HUB_FILES, *SENTENCE_TRANSFORMERS_FILES):
        (folder / name).unlink()
    for name in ("config.json", "preprocessor_config.json"):
        fields = json.loads((folder / name).read_text())
        del fields["auto_map"]
        (folder / name).write_text(json.dumps(fields))
    for name in ("onnx/model.onnx", "training_args.bin", "checkpoint-1/model.safetensors", ".git/config", "epoch-1/a"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text("content")
    for name in (
        "optimizer.pt",
        "rng_state_0.pth",
        "scheduler.pt",
        "runs/events.out.tfevents.1.HOST",
        "pictures/a.png",
    ):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text("content")
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    out = run(UPLOAD, hub, tmp_path, "upload", str(folder), "me/uploaded", "--private")
    assert "/me/uploaded/commit/" in out
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before

    files = hub.repositories["me/uploaded"]
    expected = {"config.json", "preprocessor_config.json", "model.safetensors", "README.md", "onnx/model.onnx"}
    assert set(files) == {*expected, *HUB_FILES, *SENTENCE_TRANSFORMERS_FILES, ".gitattributes"}
    assert "me/uploaded" in hub.private
    assert json.loads(files["config.json"])["auto_map"] == AUTO_MAP
    assert json.loads(files["preprocessor_config.json"])["auto_map"] == AUTO_MAP
    assert b'model="me/uploaded"' in files["README.md"]
    labels = run(PREDICT, hub, tmp_path, "me/uploaded", package=False).strip()
    assert labels == str([f"LABEL_{index}" for index in range(5)])


def test_upload_fails_clearly(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("asit_hf.hub.upload.get_token", lambda: None)
    for path, error in ((tmp_path / "nowhere", "no config.json"), (tmp_path, "no Hub token")):
        build(ASiTModel).save_pretrained(tmp_path)
        ASiTFeatureExtractor(num_mel_bins=MEL).save_pretrained(tmp_path)
        assert main(["upload", str(path), "me/model"]) == 1
        assert error in capsys.readouterr().err


@pytest.fixture
def sounds(tmp_path) -> Path:
    generator = np.random.default_rng(0)
    for label, hertz in (("low", 200), ("high", 2000)):
        (tmp_path / "sounds" / label).mkdir(parents=True)
        for index in range(6):
            tone = 0.3 * np.sin(2 * np.pi * hertz * np.arange(8000) / 16000) + generator.normal(0, 0.01, 8000)
            soundfile.write(tmp_path / "sounds" / label / f"{index}.wav", tone, 16000)
    return tmp_path / "sounds"


TRAINER = """
import json, sys
import torch
from asit_hf import ASiTConfig, ASiTFeatureExtractor, ASiTForAudioClassification
from transformers import Trainer, TrainingArguments

model = ASiTForAudioClassification(ASiTConfig(**json.loads(sys.argv[1]), num_labels=2))
args = TrainingArguments("run", max_steps=2, save_steps=1, push_to_hub=True, hub_model_id="me/trained", use_cpu=True,
                         report_to="none", disable_tqdm=True)
data = [{"input_values": torch.randn(96, 32), "labels": index % 2} for index in range(4)]
trainer = Trainer(model, args, train_dataset=data, processing_class=ASiTFeatureExtractor(num_mel_bins=32))
trainer.train()
trainer.push_to_hub()
"""

PREDICT = """
import sys
import numpy as np
from transformers import pipeline

classifier = pipeline("audio-classification", model=sys.argv[1], trust_remote_code=True)
print(sorted(row["label"] for row in classifier(np.zeros(16000, np.float32))))
"""


@pytest.mark.slow
def test_transformers_own_trainer_pushes(hub, tmp_path):
    run(TRAINER, hub, tmp_path, json.dumps(TINY))
    assert run(PREDICT, hub, tmp_path, "me/trained", package=False).strip() == "['LABEL_0', 'LABEL_1']"


@pytest.mark.slow
def test_pretraining_and_finetuning_push(hub, sounds, tmp_path):
    """The scripts with --push_to_hub: what they leave on the server is a model, its extractor and a card."""
    (sounds / "low" / "damaged.wav").write_bytes(b"not a sound")
    code = "import sys, runpy\nsys.argv = sys.argv[1:]\nrunpy.run_path(sys.argv[0], run_name='__main__')"
    common = ["--train_data", str(sounds), "--max_steps", "2", "--per_device_train_batch_size", "13"]  # all
    common += ["--use_cpu", "True", "--report_to", "none", "--disable_tqdm", "True"]
    common += ["--push_to_hub", "True", "--hub_token", "hf_token"]
    overrides = ",".join(f"{name}={value}" for name, value in TINY.items())
    pretraining = ["--output_dir", str(tmp_path / "run"), "--global_seconds", "0.4", "--save_steps", "1"]
    pretraining += ["--config_overrides", overrides, "--num_local_crops", "0", "--plot_steps", "0"]
    pretraining += ["--hub_model_id", "me/pretrained", "--hub_strategy", "checkpoint"]
    script = str(PACKAGE / "examples" / "run_pretraining.py")
    run(code, hub, tmp_path, script, *pretraining, *common)
    finetuning = ["--eval_data", str(sounds), "--output_dir", str(tmp_path / "classifier")]
    finetuning += ["--model_name_or_path", "me/pretrained", "--hub_model_id", "me/finetuned"]
    script = str(PACKAGE / "examples" / "run_audio_classification.py")
    run(code, hub, tmp_path, script, *finetuning, *common)

    for name in ("me/pretrained", "me/finetuned"):
        files = set(hub.repositories[name])
        assert files >= {"config.json", "preprocessor_config.json", "model.safetensors", "README.md", *HUB_FILES}
        for private in (str(tmp_path).encode(), b"hf_token", b"damaged.wav"):
            assert not [path for path, data in hub.repositories[name].items() if private in data], private
    assert ModelCard(hub.repositories["me/finetuned"]["README.md"].decode()).data.base_model == "me/pretrained"
    assert "last-checkpoint/trainer_state.json" in hub.repositories["me/pretrained"]  # from which training goes on
    for name in ("bad_files.jsonl", "trainer_state.json", "training_args.bin"):
        assert (tmp_path / "run" / name).is_file(), "what is not pushed is there"
    assert run(PREDICT, hub, tmp_path, "me/finetuned", package=False).strip() == "['high', 'low']"
