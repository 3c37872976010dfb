import json
import os
from pathlib import Path

import pytest

from asit_hf.utils.names import local_path, path_text

PLAIN = [
    "a.wav",
    "-a.wav",
    'say "a".wav',
    "100%41.wav",
    "été ☂ 🎵.wav",
    "b/a: c.wav",
    "x" * 251 + ".wav",
    "hf://me/a.wav",
]
ODD = {
    os.fsdecode(b"na\xefve.wav"): "file:na%EFve.wav",
    os.fsdecode(b"/sounds/na\xefve 100%.wav"): "file:///sounds/na%EFve 100%25.wav",
    os.fsdecode("é/".encode() + b"\xe9.wav"): "file:é/%E9.wav",
    "line\nbreak\r.wav": "file:line%0Abreak%0D.wav",
    "tab\there.wav": "file:tab%09here.wav",
    "one\u2028two.wav": "file:one%E2%80%A8two.wav",
}


@pytest.mark.parametrize("name", PLAIN)
def test_other_names_stay_as_they_are(name):
    assert path_text(name) == name
    assert local_path(name) == name


@pytest.mark.parametrize(("name", "text"), ODD.items())
def test_odd_names_are_uris_that_lead_back(name, text):
    assert path_text(name) == text
    assert local_path(text) == name
    assert path_text(text) == text
    assert json.loads(json.dumps(text).encode().decode("ascii")) == text
    assert len(text.splitlines()) == 1


def test_names_that_look_like_uris_lead_back(tmp_path):
    for name in ("file:a%41.wav", "na%EFve.wav"):
        assert local_path(path_text(Path(name))) == name
    assert local_path((tmp_path / "a b%é.wav").as_uri()) == str(tmp_path / "a b%é.wav")
    assert local_path(f"file://localhost{tmp_path}") == str(tmp_path)
