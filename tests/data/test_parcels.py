import json

import numpy as np
import pytest
import soundfile
import torch

from asit_hf.data import PackedAudio
from asit_hf.data.packed import AUDIO, INDEX, write_packed
from asit_hf.data.parcels import decode_parcels, encode_parcels, main

RATE = 16000


def tones(lengths, seed=0):
    """One tone for each clip, which low bit rates keep well."""
    generator = np.random.default_rng(seed)
    frequencies = generator.uniform(200, 2000, len(lengths))
    return [
        (8000 * np.sin(2 * np.pi * frequency / RATE * np.arange(length))).astype(np.int16)
        for frequency, length in zip(frequencies, lengths)
    ]


LENGTHS = (8000, 12345, 1, 319, 16000, 7777, 20001)


@pytest.fixture(scope="module")
def pool(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pool")
    clips = [(f"{index}.wav", "speech" if index < 4 else "music", clip) for index, clip in enumerate(tones(LENGTHS))]
    write_packed(folder, clips, RATE)
    return PackedAudio.load(folder)


def parcels_of(folder):
    return sorted(folder.glob("*.opus"))


def test_clips_come_back_with_their_lengths_names_and_parts(pool, tmp_path):
    encode_parcels(pool, tmp_path / "parcels")
    assert len(parcels_of(tmp_path / "parcels")) == 2  # one of each part
    back = decode_parcels(tmp_path / "parcels", tmp_path / "back")
    assert (back.names, back.parts, back.sampling_rate) == (pool.names, pool.parts, RATE)
    assert torch.equal(back.lengths, pool.lengths)
    for first, length in zip(pool.offsets, pool.lengths):
        if length > 1000:  # the middle of each clip: no delay, and nearly the same sound
            clip = slice(int(first) + 400, int(first + length) - 400)
            before, after = (one.audio[clip].double() for one in (pool, back))
            assert torch.nn.functional.cosine_similarity(before, after, dim=0) > 0.98


def test_files_stay_below_the_limit_and_hold_every_clip(tmp_path):
    noise = np.random.default_rng(0).integers(-9000, 9000, (12, RATE // 8)).astype(np.int16)
    write_packed(tmp_path / "pool", [(str(index), None, clip) for index, clip in enumerate(noise)], RATE)
    pool = PackedAudio.load(tmp_path / "pool")
    total = encode_parcels(pool, tmp_path / "parcels", kilobits=6, max_megabytes=1500 / 2**20)
    sizes = [path.stat().st_size for path in parcels_of(tmp_path / "parcels")]
    assert len(sizes) > 2  # at the bit rate aimed at two would do, but for the headers
    assert max(sizes) <= 1500
    assert sum(sizes) == total
    back = decode_parcels(tmp_path / "parcels", tmp_path / "back", num_threads=1)
    assert back.names == pool.names
    assert back.parts is None
    with pytest.raises(ValueError, match="MiB for the clip 0"):
        encode_parcels(pool, tmp_path / "other", max_megabytes=500 / 2**20)
    with pytest.raises(FileNotFoundError):
        decode_parcels(tmp_path / "other", tmp_path / "nothing")


def rewrite(path, samples):
    soundfile.write(path, samples.astype(np.int16), RATE, format="OGG", subtype="OPUS")


@pytest.mark.parametrize("change", [-200, 200])
def test_a_file_within_one_frame_of_its_clips_is_padded_or_cut(pool, tmp_path, change):
    encode_parcels(pool, tmp_path / "parcels")
    path = parcels_of(tmp_path / "parcels")[0]
    rewrite(path, np.zeros(sum(LENGTHS[:4]) + change))
    back = decode_parcels(tmp_path / "parcels", tmp_path / "back")
    assert torch.equal(back.lengths, pool.lengths)
    assert not back.audio[: sum(LENGTHS[:4])].any()
    assert back.audio[sum(LENGTHS[:4]) :].any()


@pytest.mark.parametrize(
    ("damage", "error"),
    [
        (lambda path: rewrite(path, np.zeros(sum(LENGTHS[:4]) - 400)), ValueError),
        (lambda path: rewrite(path, np.zeros(sum(LENGTHS[:4]) + 400)), ValueError),
        (lambda path: path.write_bytes(b"no audio"), ValueError),
        (lambda path: path.unlink(), FileNotFoundError),
    ],
)
def test_a_damaged_parcel_is_named_and_leaves_no_pool(pool, tmp_path, damage, error):
    encode_parcels(pool, tmp_path / "parcels")
    path = parcels_of(tmp_path / "parcels")[0]
    damage(path)
    with pytest.raises(error, match=path.name):
        decode_parcels(tmp_path / "parcels", tmp_path / "back")
    assert not (tmp_path / "back" / AUDIO).exists()


def test_wrong_inputs(pool, tmp_path):
    with pytest.raises(ValueError, match="kilobits"):
        encode_parcels(pool, tmp_path, kilobits=2)
    write_packed(tmp_path / "odd", [("a", None, np.ones(2000, np.int16))], 11025)
    with pytest.raises(ValueError, match="11025"):
        encode_parcels(PackedAudio.load(tmp_path / "odd"), tmp_path)
    with pytest.raises(FileExistsError, match=INDEX):
        encode_parcels(pool, tmp_path / "odd")
    with pytest.raises(ValueError, match="another kind"):
        decode_parcels(tmp_path / "odd", tmp_path)
    encode_parcels(pool, tmp_path / "parcels")
    index = tmp_path / "parcels" / INDEX
    fields = json.loads(index.read_text())
    index.write_text(json.dumps({**fields, "files": fields["files"][:1]}))
    with pytest.raises(ValueError, match="damaged"):
        decode_parcels(tmp_path / "parcels", tmp_path / "back")


def test_the_command_goes_both_ways(pool, tmp_path, capsys):
    main(["encode", str(pool.folder), str(tmp_path / "parcels"), "--kilobits", "24"])
    main(["decode", str(tmp_path / "parcels"), str(tmp_path / "back")])
    encoded, decoded = capsys.readouterr().out.splitlines()
    assert "kb/s" in encoded
    assert decoded.startswith(f"{len(LENGTHS)} clips")
    assert PackedAudio.load(tmp_path / "back").names == pool.names
