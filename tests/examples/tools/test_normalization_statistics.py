import json
from pathlib import Path

import numpy as np
import pytest
import soundfile

from asit_hf.data import AudioReadError, read_audio
from asit_hf.data.statistics import log_mel_statistics
from examples.tools import normalization_statistics as script


@pytest.fixture(scope="module")
def clips(tmp_path_factory) -> Path:
    """Five clips, two of them at 8 kHz, and a damaged one."""
    folder = tmp_path_factory.mktemp("clips")
    generator = np.random.default_rng(0)
    lines = ["file,part"]
    for index in range(5):
        rate = 8000 if index < 2 else 16000
        soundfile.write(folder / f"{index}.wav", generator.normal(0, 0.02 * (index + 1), rate // 2), rate)
        lines.append(f"{index}.wav,{'a' if index % 2 else 'b'}")
    (folder / "5.wav").write_bytes(b"not audio")
    (folder / "table.csv").write_text("\n".join([*lines, "5.wav,b"]) + "\n")
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("options", [[], ["--streaming"], ["--num_workers", "2"]])
def test_statistics_of_a_folder(clips, tmp_path, capsys, caplog, options):
    expected = log_mel_statistics(read_audio(clips / f"{index}.wav", 16000) for index in range(5))
    results = script.main(["--data", str(clips), "--output", str(tmp_path / "out" / "statistics.json"), *options])
    assert results["mean"] == pytest.approx(expected.mean, rel=1e-12)
    assert results["std"] == pytest.approx(expected.std, rel=1e-12)
    assert (results["clips"], results["unreadable_clips"]) == (5, 1)
    assert f"--mean {expected.mean:.7f} --std {expected.std:.7f}" in capsys.readouterr().out
    assert "5.wav: Format not recognised" in caplog.text
    assert json.loads((tmp_path / "out" / "statistics.json").read_text()) == results
    with pytest.raises(AudioReadError, match=r"5\.wav"):
        script.main(["--data", str(clips), "--strict", *options])


def test_filters_and_limits(clips):
    expected = log_mel_statistics([read_audio(clips / f"{index}.wav", 8000, 0, 0.1) for index in (1, 3)], 8000, 64)
    options = ["--filter", "part=a", "--max_seconds", "0.1", "--sampling_rate", "8000", "--num_mel_bins", "64"]
    results = script.main(["--data", str(clips / "table.csv"), *options])
    assert (results["mean"], results["std"]) == (expected.mean, expected.std)
    assert script.main(["--data", str(clips / "table.csv"), "--filter", "part=a", "--max_clips", "1"])["clips"] == 1


def test_a_corpus(tmp_path):
    lines = ["filename,fold,target,category,esc10,src_file,take"]
    (tmp_path / "audio").mkdir()
    for fold in (1, 2):
        lines.append(f"{fold}-1-A-0.wav,{fold},0,dog,True,1,A")
        soundfile.write(tmp_path / "audio" / f"{fold}-1-A-0.wav", np.full(8000, 0.1), 16000)
    (tmp_path / "meta").mkdir()
    (tmp_path / "meta" / "esc50.csv").write_text("\n".join(lines) + "\n")
    assert script.main(["--data", str(tmp_path), "--corpus", "esc50", "--filter", "fold=1"])["clips"] == 1
    with pytest.raises(SystemExit):
        script.main(["--data", str(tmp_path), "--corpus", "esc50", "--streaming"])
    with pytest.raises(SystemExit):
        script.main(["--data", str(tmp_path), "--streaming", "--num_workers", "1"])
