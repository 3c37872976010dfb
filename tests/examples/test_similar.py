"""The search for similar sounds, with a model from random weights."""

from pathlib import Path

import numpy as np
import pytest
import soundfile
from tiny import MEL, build

from asit_hf import ASiTFeatureExtractor
from examples import similar

RATE = 16000


@pytest.fixture
def sounds(tmp_path) -> Path:
    """Tones of 300 and 3000 Hz, of several lengths and rates, and a file that is no audio."""
    rng = np.random.default_rng(0)
    for index, hertz in enumerate((300, 300, 300, 3000, 3000)):
        rate, seconds = (RATE, 8000)[index % 2], 1 + 0.1 * index
        tone = np.sin(2 * np.pi * hertz * np.arange(round(rate * seconds)) / rate) + rng.normal(0, 0.01)
        (tmp_path / "sounds" / str(hertz)).mkdir(parents=True, exist_ok=True)
        soundfile.write(tmp_path / "sounds" / str(hertz) / f"{index}.wav", 0.5 * tone, rate)
    (tmp_path / "sounds" / "damaged.wav").write_bytes(b"not a sound")
    build(pooling_mode="cls_mean").save_pretrained(tmp_path / "model")
    ASiTFeatureExtractor(num_mel_bins=MEL).save_pretrained(tmp_path / "model")
    return tmp_path / "sounds"


def test_the_nearest_sounds_are_those_of_the_querys_pitch(sounds, capsys):
    pytest.importorskip("sentence_transformers")
    picture, query = sounds.parent / "similar.png", sounds / "300" / "0.wav"
    arguments = [str(sounds.parent / "model"), str(sounds), str(query), "--batch_size", "2"]
    found = similar.main([*arguments, "--top_k", "3", "--picture", str(picture)])
    assert [file.parent.name for file, _ in found] == ["300", "300", "3000"]
    assert query not in [file for file, _ in found]
    cosines = [cosine for _, cosine in found]
    assert cosines == sorted(cosines, reverse=True)
    assert 1 + 1e-6 > cosines[0] > cosines[2] > -1
    out, err = capsys.readouterr()
    assert [line.split()[1] for line in out.splitlines() if "/" in line and "damaged" not in line] == [
        str(file.relative_to(sounds)) for file, _ in found
    ]
    assert "damaged.wav" in out + err
    assert picture.stat().st_size > 1000
    assert len(similar.main([*arguments, "--top_k", "100"])) == 4


@pytest.mark.parametrize(
    ("query", "options", "said"),
    [
        ("none.wav", [], "none.wav"),
        ("300/0.wav", ["--top_k", "0"], "top_k"),
        ("300/0.wav", ["--batch_size", "-1"], "-1"),
    ],
)
def test_wrong_arguments(sounds, capsys, query, options, said):
    with pytest.raises(SystemExit):
        similar.main([str(sounds.parent / "model"), str(sounds), str(sounds / query), *options])
    assert said in capsys.readouterr().err


def test_an_unreadable_query(sounds, capsys):
    pytest.importorskip("sentence_transformers")
    with pytest.raises(ValueError, match="1 unreadable"):
        similar.main([str(sounds.parent / "model"), str(sounds), str(sounds / "damaged.wav")])
    assert "damaged.wav" in "".join(capsys.readouterr())
