from pathlib import Path

import damaged_files as script
import numpy as np
import pytest

from asit_hf.data import read_audio

SCRIPT = Path(__file__).parents[2] / "examples" / "benchmarks" / "damaged_files.py"


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """A folder of 60 files with one of each kind, and the kinds by path."""
    folder = tmp_path_factory.mktemp("damaged") / "audio"
    kinds = script.write_folder(folder, 60, odd_share=len(script.KINDS) / 60)
    assert set(script.KINDS) < set(kinds.values())
    return folder, kinds


@pytest.mark.parametrize("num_workers", [0, 2])
def test_training_continues_and_reports_each_unreadable_file_once(written, tmp_path, num_workers):
    folder, kinds = written
    unreadable = {path for path, kind in kinds.items() if kind in script.KINDS and not script.KINDS[kind][1]}
    run = script.train(folder, tmp_path, num_workers, batch_size=20)
    assert set(run["reported"]) == unreadable
    assert all(run["reported"].values())
    assert run["lines"] == len(unreadable)
    assert len(run["trained_on"]) + run["lines"] == 60
    assert run["finite_losses"] == run["steps"] == 3


@pytest.mark.parametrize("num_workers", [0, 2])
def test_strict_stops_with_a_one_line_error_that_names_the_file(written, tmp_path, num_workers):
    error = script.strict_error(written[0], tmp_path, num_workers, batch_size=20)
    kind = written[1][error.source]
    assert not script.KINDS[kind][1]
    assert str(error) == f"cannot read {error.source}: {error.reason}"
    assert "\n" not in str(error)


def test_unusual_files_contain_the_written_sound(written):
    for path, kind in written[1].items():
        if kind in script.KINDS and script.KINDS[kind][1]:
            waveform = read_audio(path, script.RATE)
            assert 0.25 < len(waveform) / script.RATE < 0.65, kind
            assert 0.1 < np.abs(waveform).max() < 0.6, kind
