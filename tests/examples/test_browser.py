"""The page that classifies sounds inside the browser, in headless Chromium; needs npm for ONNX Runtime."""

import base64
import functools
import json
import os
import re
import shutil
import struct
import threading
from contextlib import contextmanager
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from browsing import addresses, open_browser, wait_for
from tiny import build as build_tiny
from transformers import pipeline

from asit_hf import ASiTFeatureExtractor, ASiTForAudioClassification, ASiTModel
from asit_hf.data.audio import resample
from asit_hf.fbank_asit import log_mel_spectrogram
from examples.browser import build
from examples.demo_sounds import CLASSES, make_clip

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "examples" / "browser"
MODEL = ROOT / "model_cards" / "asit-tiny-pool26h-esc50"
TOLERANCE = 0.02  # between the scores of weights in 8 bits and in 32
LOSSY_TOLERANCE = 0.05  # of two decoders of Opus or AAC, whose samples differ
TIMES = ["0 s to 30 s", "15 s to 45 s", "30 s to 1:00", "32 s to 1:02"]
# format, subtype, sampling rate, channels, seconds
SOUNDS = [
    ("wav", "PCM_U8", 8000, 1, 2),
    ("wav", "PCM_16", 22050, 1, 2),
    ("wav", "PCM_24", 44100, 2, 2),
    ("wav", "PCM_32", 48000, 6, 2),
    ("wav", "FLOAT", 11025, 1, 2),
    ("wav", "ULAW", 8000, 1, 2),
    ("rf64", "PCM_16", 96000, 1, 2),
    ("flac", "PCM_16", 8000, 1, 2),
    ("flac", "PCM_24", 44100, 2, 2),
    ("flac", "PCM_16", 48000, 1, 2),
    ("ogg", "VORBIS", 8000, 1, 2),
    ("ogg", "VORBIS", 44100, 2, 2),
    ("ogg", "OPUS", 48000, 1, 2),
    ("ogg", "OPUS", 16000, 1, 2),
    ("mp3", "MPEG_LAYER_III", 22050, 1, 2),
    ("mp3", "MPEG_LAYER_III", 44100, 2, 2),
    ("mp3", "MPEG_LAYER_III", 48000, 1, 2),
    ("wav", "PCM_16", 16000, 1, 0.01),
    ("wav", "PCM_16", 44100, 1, 0.05),
    ("flac", "PCM_16", 16000, 1, 62),
]


def write_sound(folder: Path, index: int) -> Path:
    format, subtype, rate, channels, seconds = SOUNDS[index]
    parts = [
        make_clip(list(CLASSES)[index % len(CLASSES)], 0, part, rate) for part in range(max(1, int(seconds) // 2))
    ]
    clip = np.concatenate(parts)[rate // 2 if seconds < 1 else 0 :][: round(seconds * rate)]
    path = folder / f"{index}-{subtype}-{rate}.{format}"
    soundfile.write(path, clip[:, None] * np.linspace(1, 0.5, channels), rate, subtype, format=format.upper())
    return path


@contextmanager
def served(folder: Path):
    """The address of a server of a folder, which collects the requests as (method, path)."""

    class Handler(SimpleHTTPRequestHandler):
        def log_message(self, *_):
            server.requests.append((self.command, self.path))

    with ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Handler, directory=folder)) as server:
        server.requests = []
        threading.Thread(target=server.serve_forever, daemon=True).start()
        try:
            yield f"http://127.0.0.1:{server.server_port}/", server.requests
        finally:
            server.shutdown()


@pytest.fixture(scope="module")
def browser():
    browser = open_browser()
    yield browser
    browser.quit()


@pytest.fixture(scope="module")
def folder(browser, tmp_path_factory) -> Path:
    """The built page; `browser` comes first, so that nothing is built without one."""
    try:
        build.download_runtime()
    except OSError as error:  # no npm, or no network; a version that npm does not have is a failure
        if "ETARGET" in str(error) or "E404" in str(error):
            raise
        pytest.skip(str(error))
    folder = tmp_path_factory.mktemp("built") / "page"
    assert build.main([str(MODEL), str(folder)]) == 0
    return folder


@pytest.fixture(scope="module")
def page(folder, browser):
    with served(folder) as (address, requests):
        open_page(browser, address)
        yield address
        assert {method for method, _ in requests} == {"GET"}  # no sound was sent


@pytest.fixture(scope="module")
def classifier():
    return pipeline("audio-classification", model=str(MODEL), top_k=None)


def open_page(browser, address: str) -> None:
    browser.get(address)
    wait_for(lambda: text_of(browser, "message") == "Ready.")


def text_of(browser, name: str) -> str:
    return browser.find_element("id", name).text


def choose(browser, file: Path) -> dict[str, float]:
    """The scores that the page shows for a file, best first, or an AssertionError with its message."""
    browser.find_element("id", "file").send_keys(str(file.resolve()))
    wait_for(lambda: text_of(browser, "name").startswith(file.name) or has_failed(browser))
    assert not has_failed(browser), text_of(browser, "message")
    return shown_scores(browser)


def has_failed(browser) -> bool:
    return "error" in browser.find_element("id", "message").get_attribute("class")


def shown_scores(browser) -> dict[str, float]:
    script = """return [...document.querySelectorAll('.bars li')].map(
        item => [item.querySelector('.label').textContent, Number(item.dataset.score)])"""
    return dict(browser.execute_script(script))


def check_scores(got: dict[str, float], expected: list[dict], tolerance: float = TOLERANCE) -> None:
    assert next(iter(got)) == expected[0]["label"]
    assert got == pytest.approx({row["label"]: row["score"] for row in expected}, abs=tolerance)


def run(browser, script: str, *arguments):
    """The result of an asynchronous script that may import the page's modules."""
    script = (
        f"const done = arguments[arguments.length - 1]; (async () => {{ {script} }})().then(done, e => done(`${{e}}`))"
    )
    return browser.execute_async_script(script, *arguments)


@pytest.mark.slow
@pytest.mark.parametrize("index", range(len(SOUNDS)), ids=["-".join(map(str, sound)) for sound in SOUNDS])
def test_scores_are_the_pipelines(browser, page, classifier, tmp_path, index):
    file = write_sound(tmp_path, index)
    tolerance = LOSSY_TOLERANCE if SOUNDS[index][1] == "OPUS" else TOLERANCE
    check_scores(choose(browser, file), classifier(str(file)), tolerance)


@pytest.mark.slow
@pytest.mark.parametrize(("format", "rate"), [("m4a", 16000), ("aac", 16000), ("m4a", 44100), ("webm", 48000)])
def test_formats_of_ffmpeg(browser, page, classifier, tmp_path, format, rate):
    file = encode(make_clip("click_train", 0, 2, rate), rate, tmp_path / f"clicks.{format}")
    check_scores(choose(browser, file), classifier(str(file)), LOSSY_TOLERANCE)  # AAC replaces some noise by its own


def encode(samples: np.ndarray, rate: int, path: Path) -> Path:
    av = pytest.importorskip("av")
    with av.open(path, "w") as container:
        codec, size, kind = ("libopus", 960, "flt") if path.suffix == ".webm" else ("aac", 1024, "fltp")
        stream = container.add_stream(codec, rate=rate, layout="mono", format=kind)
        for start in range(0, len(samples), size):
            frame = av.AudioFrame.from_ndarray(samples[None, start : start + size], kind, "mono")
            frame.sample_rate = rate
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


@pytest.mark.slow
@pytest.mark.real_audio
def test_scores_of_real_clips_are_the_pipelines(browser, page, classifier, real_audio):
    clips = sorted((real_audio / "esc50-16k").rglob("4-*.flac"))[::20]
    assert len(clips) == 20
    for clip in clips:
        check_scores(choose(browser, clip), classifier(str(clip)))


@pytest.mark.slow
def test_a_long_sound_has_the_pipelines_timeline(browser, page, classifier, tmp_path):
    file = write_sound(tmp_path, len(SOUNDS) - 1)
    timeline = classifier(str(file), return_timeline=True)["timeline"]
    choose(browser, file)
    rows = browser.find_elements("css selector", "tbody tr:nth-child(even)")
    cells = [[cell.get_attribute("title") for cell in row.find_elements("tag name", "td")] for row in rows]
    assert all([title.split(": ")[0] for title in row] == TIMES for row in cells)
    labels = [heading.text for heading in browser.find_elements("css selector", "tbody th")]
    best = {window["labels"][0]["label"] for window in timeline}
    assert best <= set(labels)
    for label, row in zip(labels, cells):
        shown = [float(title.split(": ")[1].split()[0]) / 100 for title in row]
        expected = [{one["label"]: one["score"] for one in window["labels"]}[label] for window in timeline]
        assert shown == pytest.approx(expected, abs=TOLERANCE)


@pytest.mark.slow
@pytest.mark.parametrize("problem_type", ["multi_label_classification", "regression"])
def test_other_problem_types(browser, folder, tmp_path, problem_type):
    page = shutil.copytree(folder, tmp_path / "page", copy_function=os.link)
    (page / "model" / "config.json").unlink()
    config = json.loads((folder / "model" / "config.json").read_text()) | {"problem_type": problem_type}
    (page / "model" / "config.json").write_text(json.dumps(config))
    model = ASiTForAudioClassification.from_pretrained(MODEL, problem_type=problem_type)
    extractor = ASiTFeatureExtractor.from_pretrained(MODEL)
    classifier = pipeline("audio-classification", model=model, feature_extractor=extractor, top_k=None)
    file = write_sound(tmp_path, 0)
    expected = classifier(str(file))
    with served(page) as (address, _):
        open_page(browser, address)
        got = choose(browser, file)
    check_scores(got, expected, 0.1 if problem_type == "regression" else TOLERANCE)
    assert ("%" in text_of(browser, "answer")) == (problem_type != "regression")


@pytest.mark.slow
def test_a_dropped_file(browser, page):
    script = """const transfer = new DataTransfer()
        transfer.items.add(new File(['not a sound'], 'dropped.txt'))
        document.dispatchEvent(new DragEvent('drop', { dataTransfer: transfer }))"""
    browser.execute_script(script)
    wait_for(lambda: text_of(browser, "message").startswith("dropped.txt"))


@pytest.mark.slow
@pytest.mark.parametrize(
    "content", [b"", b"not a sound", b"RIFF\x24\0\0\0WAVE", b"\0\0\0\0ftyp", b"ID3", b"OggS" + bytes(40)]
)
def test_a_file_that_cannot_be_read_is_named(browser, page, tmp_path, content):
    (tmp_path / "odd <b>name.wav").write_bytes(content)
    with pytest.raises(AssertionError, match="odd <b>name.wav"):
        choose(browser, tmp_path / "odd <b>name.wav")
    assert not browser.find_element("id", "result").is_displayed()
    choose(browser, write_sound(tmp_path, 0))


@pytest.mark.slow
def test_a_recording_gets_its_label(folder, classifier, tmp_path):
    steady = np.tile(make_clip("click_train", 0, 2, 48000)[24000:48000], 20)
    soundfile.write(tmp_path / "microphone.wav", steady, 48000)
    expected = classifier(str(tmp_path / "microphone.wav"))
    assert expected[0]["score"] > 2 * expected[1]["score"]
    fake = ("--use-fake-device-for-media-stream", "--use-fake-ui-for-media-stream")
    browser = open_browser(*fake, f"--use-file-for-fake-audio-capture={tmp_path / 'microphone.wav'}")
    try:
        with served(folder) as (address, requests):
            open_page(browser, address)
            button = browser.find_element("id", "record")
            button.click()
            wait_for(lambda: button.text == "Stop (2 s)")
            button.click()
            wait_for(lambda: text_of(browser, "name").startswith("recording.wav"))
            assert next(iter(shown_scores(browser))) == expected[0]["label"]
            assert button.text == "Record"
        assert {method for method, _ in requests} == {"GET"}
    finally:
        browser.quit()


@pytest.mark.slow
def test_without_a_microphone(browser, page):
    browser.execute_script(
        "navigator.mediaDevices.getUserMedia = async () => { throw new DOMException('', 'NotFoundError') }"
    )
    browser.find_element("id", "record").click()
    wait_for(lambda: "No microphone" in text_of(browser, "message"))
    assert browser.find_element("id", "record").is_enabled()


@pytest.mark.slow
def test_a_recording_that_cannot_start_frees_the_microphone(browser, page):
    open_page(browser, page)
    browser.execute_script("""
        window.stream = new AudioContext().createMediaStreamDestination().stream
        navigator.mediaDevices.getUserMedia = async () => stream
        AudioWorklet.prototype.addModule = async () => { throw new Error('no such module') }""")
    browser.find_element("id", "record").click()
    wait_for(lambda: "no such module" in text_of(browser, "message"))
    assert browser.execute_script("return stream.getTracks().map((track) => track.readyState)") == ["ended"]
    assert browser.find_element("id", "record").is_enabled()


@pytest.mark.slow
def test_the_model_stops_for_a_newer_sound(browser, page, tmp_path):
    open_page(browser, page)
    files = [write_sound(tmp_path, index) for index in (len(SOUNDS) - 1, 0)]
    browser.execute_script(
        """window.runs = 0
        const post = Worker.prototype.postMessage
        Worker.prototype.postMessage = function (message, ...others) {
            window.runs += message.type === 'run'
            return post.call(this, message, ...others)
        }
        for (const [name, content] of arguments[0]) {
            const transfer = new DataTransfer()
            transfer.items.add(new File([Uint8Array.from(atob(content), (one) => one.charCodeAt(0))], name))
            document.dispatchEvent(new DragEvent('drop', { dataTransfer: transfer }))
        }""",
        [(file.name, base64.b64encode(file.read_bytes()).decode()) for file in files],
    )
    wait_for(lambda: text_of(browser, "name").startswith(files[1].name))
    assert browser.execute_script("return runs") == 1


@pytest.mark.slow
def test_nothing_leaves_the_page(browser, page, tmp_path):
    open_page(browser, page)
    choose(browser, write_sound(tmp_path, 0))
    assert [address for address in addresses(browser) if not address.startswith(page)] == []
    with served(tmp_path) as (other, requests):
        assert "Failed to fetch" in run(browser, f"return (await fetch('{other}')).status")
        assert requests == []


@pytest.mark.slow
def test_the_page_opens_again_without_a_connection(browser, folder, classifier, tmp_path):
    with served(folder) as (address, _):
        open_page(browser, address)
    file = write_sound(tmp_path, 0)
    check_scores(choose(browser, file), classifier(str(file)))
    open_page(browser, address)
    check_scores(choose(browser, file), classifier(str(file)))


@pytest.mark.parametrize("graphs", [["waveform"], ["waveform", "waveform_int8"]])
def test_every_build_has_its_weights_under_one_name(tmp_path, graphs):
    """Otherwise the page would take those of an earlier build, or of none, without a connection."""
    files = {f"onnx/{graph}.onnx": graph for graph in graphs}
    files |= {name: name for name in (*build.MODEL_FILES, *build.RUNTIME_FILES)}
    for name, content in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(content)
    build.write_page(tmp_path, tmp_path, tmp_path / "page")
    names = {path.relative_to(tmp_path / "page").as_posix() for path in (tmp_path / "page" / "model").iterdir()}
    assert names == {f"model/{name}" for name in (*build.MODEL_FILES, "waveform.onnx")}
    assert (tmp_path / "page/model/waveform.onnx").read_text() == graphs[-1]
    assert "'model/waveform.onnx'" in (tmp_path / "page/model.js").read_text()


@pytest.mark.slow
@pytest.mark.parametrize(
    "rates", [(8000, 16000), (44100, 16000), (48000, 16000), (22050, 32000), (16000, 8000), (11111, 16000)]
)
def test_resampling_equals_soxrs(browser, page, rates):
    noise = np.random.default_rng(0).normal(size=rates[0] // 2).astype(np.float32)
    script = """const { resample } = await import('./resample.js')
        return [...await resample(Float32Array.from(arguments[0]), arguments[1], arguments[2])]"""
    got, expected = np.array(run(browser, script, noise.tolist(), *rates)), resample(noise, *rates)
    assert got.shape == expected.shape
    assert np.square(got - expected).mean() < 1e-5 * np.square(expected).mean()


@pytest.mark.slow
def test_the_picture_is_the_extractors(browser, page):
    clip = make_clip("bell", 0, 0)
    script = """const { logMel } = await import('./spectrogram.js')
        const { columns, bins, values } = logMel(Float32Array.from(arguments[0]), 16000, 64)
        return [columns, bins, [...values]]"""
    columns, bins, values = run(browser, script, clip.tolist())
    expected = log_mel_spectrogram(torch.from_numpy(clip), 16000, 64)
    assert (columns, bins) == tuple(expected.shape)
    np.testing.assert_allclose(np.reshape(values, expected.shape), expected, atol=0.02)


@pytest.mark.slow
def test_the_sampling_rate_is_read_from_the_header(browser, page, tmp_path):
    written = {index: write_sound(tmp_path, index) for index in range(len(SOUNDS))}
    contents = {index: file.read_bytes() for index, file in written.items()}
    expected = {index: SOUNDS[index][2] for index in written}
    first_mp3 = next(index for index, file in written.items() if file.suffix == ".mp3")
    contents["tag"] = b"ID3\4\0\0\0\0\1\1" + bytes(129) + contents[first_mp3]
    expected["tag"] = expected[first_mp3]
    contents |= {"empty": b"", "cut": contents[0][:20], "text": b"a text"}
    expected |= {"empty": None, "cut": None, "text": None}
    webm = b"\x1a\x45\xdf\xa3" + bytes(40)
    contents |= {"webm": webm + b"\xb5\x84" + struct.pack(">f", 11025), "opus": webm + b"A_OPUS\xb5\x84" + bytes(4)}
    expected |= {"webm": 11025, "opus": None}
    for rate, known in ((8000, 8000), (16000, 16000), (44100, None)):
        for format in ("m4a", "aac"):
            file = encode(make_clip("bell", 0, 0, rate), rate, tmp_path / f"{rate}.{format}")
            contents[file.name], expected[file.name] = file.read_bytes(), known
    script = """const { readHeader } = await import('./header.js')
        return readHeader(Uint8Array.from(atob(arguments[0]), letter => letter.charCodeAt(0)).buffer).rate"""
    found = {
        key: run(browser, script, base64.b64encode(content[: 2**16]).decode()) for key, content in contents.items()
    }
    assert found == expected


def test_the_page_names_no_other_address():
    for file in [path for pattern in build.PAGE_FILES for path in PAGE.glob(pattern)]:
        found = set(re.findall(r"https?://[\w.:]+", file.read_text(encoding="utf-8")))
        assert found <= {"http://localhost:8000", "http://www.w3.org"}, file.name


def test_the_runtime_is_pinned():
    (version,) = json.loads((PAGE / "package.json").read_text())["dependencies"].values()
    assert re.fullmatch(r"\d+\.\d+\.\d+", version)


def test_only_a_classifier_is_built_and_only_a_page_replaced(tmp_path, capsys):
    build_tiny(ASiTModel).save_pretrained(tmp_path / "encoder")
    assert build.main([str(tmp_path / "encoder"), str(tmp_path / "page")]) == 1
    assert "expected an ASiTForAudioClassification" in capsys.readouterr().err
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.txt").touch()
    assert build.main([str(MODEL), str(tmp_path / "full")]) == 1
    assert "full" in capsys.readouterr().err
    assert (tmp_path / "full" / "thesis.txt").exists()


def test_without_npm_the_error_says_so(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(build, "DOWNLOADS", tmp_path / "none")
    monkeypatch.setenv("PATH", str(tmp_path))
    assert build.main([str(MODEL), str(tmp_path / "page")]) == 1
    assert "npm" in capsys.readouterr().err
    assert not (tmp_path / "page").exists()
