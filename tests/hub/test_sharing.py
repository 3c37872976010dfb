"""Push and load through a server on this machine that speaks the Hub's calls, from processes of their own."""

import base64
import hashlib
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from fnmatch import fnmatchcase
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from urllib.parse import unquote, urlsplit

import numpy as np
import pytest
import soundfile
from huggingface_hub import ModelCard
from tiny import TINY

PACKAGE = Path(__file__).parents[2]
HUB_FILES = {"configuration_asit.py", "fbank_asit.py", "feature_extraction_asit.py", "modeling_asit.py"}


class Hub(ThreadingHTTPServer):
    """Repositories as `{name: {path: content}}`; weights travel by the large-file calls."""

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Calls)
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.repositories: dict[str, dict[str, bytes]] = {}
        self.large: dict[str, bytes] = {}

    def commit_of(self, name: str) -> str:
        content = b"".join(path.encode() + data for path, data in sorted(self.repositories[name].items()))
        return hashlib.sha1(content).hexdigest()


class Calls(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Hub

    def log_message(self, *args):
        pass

    def do_POST(self):
        body, path = self.read_body(), self.plain_path()
        if path == "/api/repos/create":
            request = json.loads(body)
            name = f"{request.get('organization') or 'me'}/{request['name']}"
            exists = name in self.server.repositories
            self.server.repositories.setdefault(name, {".gitattributes": b""})
            return self.answer({"url": f"{self.server.url}/{name}", "name": name}, 409 if exists else 200)
        if path == "/api/validate-yaml":
            return self.answer({"errors": [], "warnings": []})
        if match := re.fullmatch(r"/(.+)\.git/info/lfs/objects/batch", path):
            actions = {"upload": {"href": f"{self.server.url}/large/OID"}}
            objects = [
                {**one, "actions": json.loads(json.dumps(actions).replace("OID", one["oid"]))}
                for one in json.loads(body)["objects"]
            ]
            return self.answer({"transfer": "basic", "objects": objects})
        if match := re.fullmatch(r"/api/models/(.+)/preupload/(.+)", path):
            request = json.loads(body)
            kept = self.server.repositories[match[1]].get(".gitignore", b"").decode()
            patterns = request.get("gitIgnore", kept).split()
            files = [
                {
                    "path": one["path"],
                    "uploadMode": "lfs" if one["path"].endswith(".safetensors") else "regular",
                    "shouldIgnore": any(is_ignored(one["path"], pattern) for pattern in patterns),
                    "oid": None,
                }
                for one in request["files"]
            ]
            return self.answer({"files": files})
        if match := re.fullmatch(r"/api/models/(.+)/commit/(.+)", path):
            return self.commit(match[1], [json.loads(line) for line in body.splitlines()])
        return self.answer({"error": f"no such call {path}"}, 404)

    def do_PUT(self):
        self.server.large[self.plain_path().rpartition("/")[2]] = self.read_body()
        self.answer({})

    def do_HEAD(self):
        self.do_GET()

    def do_GET(self):
        path = self.plain_path()
        if path == "/api/whoami-v2":
            return self.answer({"name": "me", "type": "user", "orgs": [], "auth": {"accessToken": {"role": "write"}}})
        if match := re.fullmatch(r"/api/models/(.+)/tree/([^/]+)(/.*)?", path):
            files = self.server.repositories.get(match[1])
            if files is not None:
                return self.answer(
                    [{"type": "file", "path": one, "size": len(data), "oid": oid(data)} for one, data in files.items()]
                )
        match = re.fullmatch(r"/api/models/([^/]+/[^/]+)(/revision/.+)?", path)
        if match and match[1] in self.server.repositories:
            siblings = [{"rfilename": one} for one in self.server.repositories[match[1]]]
            commit = self.server.commit_of(match[1])
            return self.answer({"id": match[1], "sha": commit, "siblings": siblings, "tags": [], "private": False})
        if match := re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path):
            data = self.server.repositories.get(match[1], {}).get(match[3])
            if data is not None:
                headers = {"ETag": f'"{oid(data)}"', "X-Repo-Commit": self.server.commit_of(match[1])}
                return self.send(data, 200, headers)
            code = "EntryNotFound" if match[1] in self.server.repositories else "RepoNotFound"
            return self.send(b"", 404, {"X-Error-Code": code, "X-Error-Message": f"no {path}"})
        return self.send(b"{}", 404, {"X-Error-Code": "RepoNotFound"})

    def commit(self, name: str, lines: list[dict]) -> None:
        files = self.server.repositories[name]
        for line in lines:
            value = line["value"]
            if line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                files[value["path"]] = self.server.large[value["oid"]]
            elif line["key"] == "deletedFile":
                files.pop(value["path"], None)
        commit = self.server.commit_of(name)
        self.answer({"commitUrl": f"{self.server.url}/{name}/commit/{commit}", "commitOid": commit, "success": True})

    def plain_path(self) -> str:
        return unquote(urlsplit(self.path).path)

    def read_body(self) -> bytes:
        return self.rfile.read(int(self.headers.get("Content-Length") or 0))

    def answer(self, content: dict | list, status: int = 200) -> None:
        self.send(json.dumps(content).encode(), status, {"Content-Type": "application/json"})

    def send(self, content: bytes, status: int, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(content))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)


def is_ignored(path: str, pattern: str) -> bool:
    """Of git's patterns: names, and, with a slash before them, paths from the top; a slash behind is for folders."""
    folders = [str(folder) for folder in Path(path).parents][:-1]
    paths = folders if pattern.endswith("/") else [path, *folders]
    names = paths if pattern.startswith("/") else [Path(one).name for one in paths]
    return any(fnmatchcase(name, pattern.strip("/")) for name in names)


def oid(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


@pytest.fixture(scope="module")
def hub() -> Iterator[Hub]:
    server = Hub()
    Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


def run(code: str, hub: Hub, folder: Path, *arguments: str, package: bool = True) -> str:
    """Runs code in a process of its own, with a cache of its own, as the server's user."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    environment |= {"HF_ENDPOINT": hub.url, "HF_TOKEN": "hf_token", "HF_HOME": str(folder / "hf")}
    environment |= {"HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_TELEMETRY": "1", "OMP_NUM_THREADS": "1"}
    environment["PYTHONPATH"] = str(PACKAGE)
    if not package:
        code = f'import sys\nsys.modules["asit_hf"] = None\n{code}'
    command = [sys.executable, "-c", code, *arguments]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


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
