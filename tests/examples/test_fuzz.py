"""Mutated files are read or refused with an error that names them."""

import fuzz
import numpy as np
import pytest

from asit_hf.data import AudioReadError


@pytest.mark.slow
def test_no_mutated_input_fails(capsys):
    assert fuzz.main(["--inputs", "1000", "--first", "100000"]) == []
    assert "1000 inputs, 0 failed" in capsys.readouterr().out


def test_the_inputs_are_a_function_of_seed_and_number():
    content = bytes(range(256))
    first, again, other = (fuzz.mutate(content, np.random.default_rng([0, number])) for number in (1, 1, 2))
    assert first == again
    assert other not in (first, content)


def sample(read):
    return fuzz.Sample("kind", "sound.wav", b"", read, (AudioReadError,))


def fail(error):
    raise error


@pytest.mark.parametrize(
    ("read", "outcome"),
    [
        (lambda path: None, "read"),
        (lambda path: fail(AudioReadError(str(path), "damaged")), "refused"),
        (lambda path: fail(AudioReadError("bytes", "damaged")), "message without the file"),
        (lambda path: fail(KeyError("label")), "KeyError in test_fuzz.py"),
        (lambda path: np.ones(50 << 20).sum(), "memory: "),
    ],
)
def test_outcomes(read, outcome, tmp_path):
    path = tmp_path / "sound.wav"
    path.write_bytes(b"RIFF")
    assert fuzz.outcome_of(sample(read), path).startswith(outcome)


@pytest.mark.slow
def test_a_process_that_does_not_answer_is_killed(monkeypatch):
    monkeypatch.setattr(fuzz, "HANG_SECONDS", 0.0)
    results = fuzz.run(3, first=5)
    assert [number for number, *_ in results] == [5, 6, 7]
    # on a busy machine, an answer may arrive before it is waited for
    assert any("hangs" in outcome for _, _, outcome, _ in results)
