import os
import re
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
import yaml
from browsing import addresses, open_browser, wait_for
from matplotlib.figure import Figure

from asit_hf import ASiTConfig, ASiTFeatureExtractor, ASiTForAudioClassification, ASiTForPreTraining, ASiTModel

gradio = pytest.importorskip("gradio", reason="gradio is not installed: pip install '.[space]'")

from examples.space import app  # noqa: E402  it needs gradio

ROOT = Path(__file__).parents[2]
SPACE = ROOT / "examples" / "space"
SMALL = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
SMALL |= {"num_mel_bins": 32, "num_frames": 96, "num_prototypes": 16, "distillation_hidden_size": 16}
SMALL |= {"distillation_bottleneck_size": 8}
# the label that an untrained classifier with a large bias always predicts
ANSWER = "a kettle that whistles"


def save(model_class, folder: Path, **options) -> str:
    torch.manual_seed(0)
    model = model_class(ASiTConfig(**SMALL, **options))
    if model_class is ASiTForAudioClassification:
        torch.nn.init.constant_(model.classifier.bias[1], 8.0)
    model.save_pretrained(folder)
    ASiTFeatureExtractor(num_mel_bins=32).save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def classifier(tmp_path_factory) -> str:
    return save(ASiTForAudioClassification, tmp_path_factory.mktemp("classifier"), id2label={0: "rain", 1: ANSWER})


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory) -> str:
    return save(ASiTForPreTraining, tmp_path_factory.mktemp("pretrained"))


@pytest.fixture(scope="module")
def sounds(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("sounds")
    generator = np.random.default_rng(0)
    for name, seconds in (("short", 0.8), ("long", 3.0), ("click", 0.01)):
        soundfile.write(folder / f"{name}.wav", 0.1 * generator.normal(size=round(seconds * 22050)), 22050)
    (folder / "damaged<b>.wav").write_bytes(b"RIFF but not a sound")
    return folder


def test_a_classifier_shows_labels_plots_and_the_timeline_of_a_long_sound(classifier, sounds):
    checkpoint = app.load_checkpoint(classifier)
    labels, timeline, log_mel, attention = app.show(checkpoint, str(sounds / "long.wav"), 1.0)
    assert max(labels, key=labels.get) == ANSWER
    assert sum(labels.values()) == pytest.approx(1)
    assert len(timeline.axes[0].lines[0].get_xdata()) == 5  # 3 s in windows of 1 s that overlap by half
    assert isinstance(log_mel, Figure)
    assert len(attention.axes) == 2
    assert app.show(checkpoint, str(sounds / "long.wav"), 3.0)[1] is None


@pytest.mark.parametrize("name", ["short", "click"])
def test_a_short_sound_has_no_timeline(classifier, sounds, name):
    labels, timeline, *pictures = app.show(app.load_checkpoint(classifier), str(sounds / f"{name}.wav"), 1.0)
    assert max(labels, key=labels.get) == ANSWER
    assert timeline is None
    assert all(isinstance(picture, Figure) for picture in pictures)


def test_a_pretraining_checkpoint_shows_a_reconstruction(pretrained, sounds):
    checkpoint = app.load_checkpoint(pretrained)
    log_mel, attention, reconstruction = app.show(checkpoint, str(sounds / "long.wav"))
    assert [len(figure.axes) for figure in (log_mel, attention, reconstruction)] == [1, 2, 3]
    assert app.show(checkpoint, str(sounds / "click.wav"))[2] is None


def test_every_output_is_empty_without_a_sound(classifier, pretrained):
    for name in (classifier, pretrained):
        checkpoint = app.load_checkpoint(name)
        page = app.build_page(checkpoint, name)
        (event,) = page.fns.values()
        assert app.show(checkpoint, None, *[1.0] * (len(event.inputs) - 1)) == [None] * len(event.outputs)


def test_a_sound_that_cannot_be_shown_is_one_escaped_line(classifier, sounds, monkeypatch):
    checkpoint = app.load_checkpoint(classifier)
    with pytest.raises(gradio.Error) as raised:
        app.show(checkpoint, str(sounds / "damaged<b>.wav"), 1.0)
    assert raised.value.message.startswith("Cannot read damaged&lt;b&gt;.wav: ")
    assert "\n" not in raised.value.message
    monkeypatch.setattr(app, "MAX_SECONDS", 2)
    with pytest.raises(gradio.Error, match="it lasts 3 s, this page takes up to 2 s"):
        app.show(checkpoint, str(sounds / "long.wav"), 1.0)


def test_a_model_that_the_page_cannot_show_is_refused(tmp_path, capsys, monkeypatch):
    monkeypatch.delenv("ASIT_MODEL", raising=False)
    with pytest.raises(SystemExit):
        app.main([])
    assert "set ASIT_MODEL" in capsys.readouterr().err
    monkeypatch.setenv("ASIT_MODEL", save(ASiTModel, tmp_path))
    with pytest.raises(SystemExit):
        app.main([])
    assert "expected an ASiTForAudioClassification" in capsys.readouterr().err


def test_the_folder_has_what_the_hub_needs():
    front_matter = yaml.safe_load((SPACE / "README.md").read_text().split("---")[1])
    assert (front_matter["sdk"], front_matter["app_file"]) == ("gradio", "app.py")
    constraints = (ROOT / "constraints.txt").read_text().splitlines()
    assert f"gradio=={front_matter['sdk_version']}" in constraints
    project = (ROOT / "pyproject.toml").read_text()
    needed = re.search(r"^dependencies = \[(.*?)^\]", project, re.M | re.S)[1]
    requirements = (SPACE / "requirements.txt").read_text().split()
    assert set(re.findall(r'"(.*?)"', needed)) <= set(requirements)


@pytest.fixture(scope="module")
def page_address(classifier, tmp_path_factory):
    """The Space as on the Hub: the folder with the package beside it, and ASIT_MODEL set."""
    folder = tmp_path_factory.mktemp("space")
    shutil.copytree(SPACE, folder, dirs_exist_ok=True)
    shutil.copytree(ROOT / "asit_hf", folder / "asit_hf", ignore=shutil.ignore_patterns("__pycache__"))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    environment |= {"ASIT_MODEL": classifier, "GRADIO_SERVER_PORT": str(port), "HF_HUB_OFFLINE": "1"}
    log = folder / "log.txt"
    with log.open("w") as output:
        server = subprocess.Popen(
            [sys.executable, "app.py"], cwd=folder, env=environment, stdout=output, stderr=subprocess.STDOUT
        )
    try:
        wait_for(lambda: "Running on" in log.read_text() or server.poll() is not None, 120)
        assert server.poll() is None, log.read_text()
        yield f"http://127.0.0.1:{port}"
    finally:
        server.terminate()
        server.wait()


@pytest.fixture(scope="module")
def browser():
    browser = open_browser()
    yield browser
    browser.quit()


def upload(browser, address: str, file: Path) -> None:
    browser.get(address)
    (field, *_) = wait_for(lambda: browser.find_elements("css selector", "input[type=file]"))
    field.send_keys(str(file))


def text_of(browser) -> str:
    return browser.find_element("tag name", "body").text


def test_an_uploaded_file_gets_its_label(browser, page_address, sounds):
    upload(browser, page_address, sounds / "long.wav")
    wait_for(lambda: ANSWER in text_of(browser))
    wait_for(lambda: len(browser.find_elements("css selector", "[data-testid=matplotlib] img")) == 3)
    assert [address for address in addresses(browser) if not address.startswith(page_address)] == []


def test_a_damaged_file_is_a_line_on_the_page(browser, page_address, sounds):
    upload(browser, page_address, sounds / "damaged<b>.wav")
    wait_for(lambda: "Cannot read" in text_of(browser))
    assert "Traceback" not in text_of(browser)
    assert ANSWER not in text_of(browser)
