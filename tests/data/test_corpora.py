"""Miniatures of the published layouts: the exact names of folders and lists, little audio."""

import logging

import numpy as np
import pytest
import soundfile
from datasets import Audio, Dataset

from asit_hf.data import audio_info, label_names, load_corpus, read_audio
from asit_hf.data.corpora.audioset import load_audioset
from asit_hf.data.corpora.registry import CORPORA
from asit_hf.data.corpora.speech_commands import KEYWORDS, SPEECH_COMMANDS_WORDS, load_speech_commands
from asit_hf.data.corpora.voxceleb1 import load_voxceleb1

SEGMENTS_HEAD = (
    "# Segments csv created Sun Mar  5 10:54:31 2017\n"
    "# num_ytids=4, num_segs=4, num_unique_labels=3, num_positive_labels=6\n"
    "# YTID, start_seconds, end_seconds, positive_labels\n"
)
BALANCED = ["--PJHxphWEs", "--aE2O5G5WE", "YaE2O5G5WE_", "-0RWZT-miFs"]


def write_audio(path, seconds=0.1, rate=16000, level=0.1):
    path.parent.mkdir(parents=True, exist_ok=True)
    soundfile.write(path, np.full(int(seconds * rate), level), rate)
    return path


def paths_of(dataset, root):
    return [row["path"].removeprefix(f"{root}/") for row in dataset["audio"][:]]


@pytest.fixture
def audioset(tmp_path):
    (tmp_path / "class_labels_indices.csv").write_text(
        'index,mid,display_name\n0,/m/09x0r,"Speech"\n1,/t/dd00088,"Gush, spurt"\n'
        '2,/m/05zppz,"Male speech, man speaking"\n'
    )
    lines = [
        f'{BALANCED[0]}, 30.000, 40.000, "/m/09x0r,/t/dd00088"',
        f'{BALANCED[1]}, 0.000, 10.000, "/m/05zppz"',
        f'{BALANCED[2]}, 90.000, 100.000, "/m/09x0r"',
        f'{BALANCED[3]}, 20.000, 30.000, "/t/dd00088,/m/05zppz"',
    ]
    (tmp_path / "balanced_train_segments.csv").write_text(SEGMENTS_HEAD + "\n".join(lines) + "\n")
    (tmp_path / "unbalanced_train_segments.csv").write_text(
        SEGMENTS_HEAD + '---1_cCGK4M, 0.000, 10.000, "/m/09x0r"\n---2_BBVHAA, 30.000, 40.000, "/m/05zppz"\n'
    )
    (tmp_path / "eval_segments.csv").write_text(SEGMENTS_HEAD + '--4gqARaEJE, 0.000, 10.000, "/m/05zppz,/m/09x0r"\n')
    return tmp_path


def test_audioset_finds_every_way_of_naming_a_clip(audioset):
    write_audio(audioset / "audio" / "bal" / f"Y{BALANCED[0]}.wav")
    write_audio(audioset / "audio" / "bal" / f"{BALANCED[1]}_0_10.wav")
    write_audio(audioset / "audio" / "bal" / f"{BALANCED[2]}.wav")
    write_audio(audioset / "audio" / "bal" / f"{BALANCED[3]}_20.flac")
    write_audio(audioset / "audio" / "unbal" / "---1_cCGK4M_0.000_10.000.wav")
    write_audio(audioset / "audio" / "unbal" / "Y---2_BBVHAA_30000.wav")
    write_audio(audioset / "audio" / "eval" / "--4gqARaEJE.flac")
    dataset = load_corpus("audioset-20k", audioset, "train")
    assert label_names(dataset) == ["Speech", "Gush, spurt", "Male speech, man speaking"]
    assert dataset["video_id"][:] == BALANCED
    assert dataset["label"][:] == [[0, 1], [2], [0], [1, 2]]
    assert dataset.features["audio"] == Audio(decode=False)
    assert [path.split("/")[-1] for path in paths_of(dataset, audioset)] == [
        *(f"Y{BALANCED[0]}.wav", f"{BALANCED[1]}_0_10.wav", f"{BALANCED[2]}.wav", f"{BALANCED[3]}_20.flac")
    ]
    whole = load_corpus("audioset-2m", audioset, "train")
    assert whole["video_id"][:] == [*BALANCED, "---1_cCGK4M", "---2_BBVHAA"]
    for layout in ("audioset-20k", "audioset-2m"):
        assert load_corpus(layout, audioset, "test")["label"][:] == [[2, 0]]


def test_clips_missing_from_audioset_are_counted_once(audioset, caplog):
    write_audio(audioset / "wavs" / f"{BALANCED[0]}.wav")
    with caplog.at_level(logging.WARNING, "asit_hf"):
        assert len(load_corpus("audioset-20k", audioset, "train")) == 1
    (record,) = caplog.records
    assert "3 of 4 listed clips" in record.getMessage()
    with pytest.raises(FileNotFoundError, match=r"none of the 1 clips of AudioSet's eval .*--4gqARaEJE_0\.flac"):
        load_corpus("audioset-20k", audioset, "test")


@pytest.mark.parametrize("column", ["labels", "human_labels"])
@pytest.mark.parametrize("folders", [("bal_train", "unbal_train", "eval"), ("balanced", "unbalanced", "test")])
def test_audioset_in_parquet(audioset, column, folders):
    content = write_audio(audioset / "clip.wav").read_bytes()
    for shard, (folder, label) in enumerate(zip(folders, (1, 0, 2))):
        names = {
            "labels": ["/m/09x0r", "/t/dd00088", "/m/05zppz"],
            "human_labels": ["Speech", "Gush, spurt", "Male speech, man speaking"],
        }[column]
        audio = [{"bytes": content, "path": "x.flac"}] * 2
        rows = {"video_id": [f"id{shard}", "bare"], "audio": audio, column: [[names[label]], None]}
        (audioset / "data" / folder).mkdir(parents=True)
        dataset = Dataset.from_dict(rows).cast_column("audio", Audio(decode=False))
        dataset.to_parquet(audioset / "data" / folder / ("train-00.parquet" if shard < 2 else "00.parquet"))
    balanced = load_corpus("audioset-20k", audioset, "train")
    assert balanced["label"][:] == [[1], []]
    assert balanced["video_id"][:] == ["id0", "bare"]
    assert audio_info(balanced[0]["audio"]).num_samples == 1600
    assert load_corpus("audioset-2m", audioset, "train")["label"][:] == [[1], [], [0], []]
    assert load_corpus("audioset-2m", audioset, "test")["label"][:] == [[2], []]


def test_a_missing_list_of_audioset_is_named(audioset):
    write_audio(audioset / f"{BALANCED[0]}.wav")
    (audioset / "unbalanced_train_segments.csv").unlink()
    with pytest.raises(FileNotFoundError, match=r"unbalanced_train_segments\.csv is missing.*research\.google\.com"):
        load_corpus("audioset-2m", audioset, "train")
    (audioset / "class_labels_indices.csv").write_text('index,mid,display_name\n0,/m/09x0r,"Speech"\n')
    with pytest.raises(ValueError, match=r"class_labels_indices\.csv, got '/t/dd00088'"):
        load_corpus("audioset-20k", audioset, "train")


def test_lists_of_audioset_that_went_through_other_tools(audioset):
    """A byte order mark, Windows line ends, blank lines and spaces after commas."""
    write_audio(audioset / f"{BALANCED[0]}.wav")
    content = f'# YTID\r\n\r\n{BALANCED[0]},30,40,"/m/09x0r, /t/dd00088"\r\n\r\n'
    (audioset / "balanced_train_segments.csv").write_bytes(b"\xef\xbb\xbf" + content.encode())
    assert load_corpus("audioset-20k", audioset, "train")["label"][:] == [[0, 1]]


def test_damaged_lists_of_audioset_and_no_audio(audioset):
    with pytest.raises(FileNotFoundError, match=r"no audio in .*https://research\.google\.com"):
        load_corpus("audioset-20k", audioset, "train")
    write_audio(audioset / f"{BALANCED[0]}.wav")
    for line, got in ((f'{BALANCED[0]}, soon, later, "/m/09x0r"', "'soon'"), ("# nothing else", "none")):
        (audioset / "balanced_train_segments.csv").write_text(line + "\n")
        with pytest.raises(ValueError, match=rf"id, start, end and labels in .*balanced_train.*got .*{got}"):
            load_corpus("audioset-20k", audioset, "train")
    (audioset / "class_labels_indices.csv").write_text('0,/m/09x0r,"Speech"\n')
    with pytest.raises(ValueError, match=r"columns index, mid, display_name in .*class_labels_indices\.csv"):
        load_corpus("audioset-20k", audioset, "train")


@pytest.fixture
def esc50(tmp_path):
    lines = ["filename,fold,target,category,esc10,src_file,take"]
    for fold in range(1, 6):
        for target, name in ((0, "dog"), (14, "chirping_birds")):
            file = f"{fold}-10003{fold}-A-{target}.wav"
            write_audio(tmp_path / "audio" / file)
            lines.append(f"{file},{fold},{target},{name},{target == 0},10003{fold},A")
    (tmp_path / "meta").mkdir()
    (tmp_path / "meta" / "esc50.csv").write_text("\n".join(lines) + "\n")
    return tmp_path


def test_esc50(esc50):
    dataset = load_corpus("esc50", esc50)
    assert label_names(dataset) == ["dog", "chirping_birds"]  # in the official order
    assert dataset["fold"][:] == [fold for fold in range(1, 6) for _ in range(2)]
    assert paths_of(dataset, esc50)[1] == "audio/1-100031-A-14.wav"
    with pytest.raises(ValueError, match="column fold"):
        load_corpus("esc50", esc50, "train")


def test_missing_pieces_of_esc50_are_named(esc50):
    (esc50 / "audio" / "3-100033-A-0.wav").unlink()
    with pytest.raises(FileNotFoundError, match=r"1 of 10 clips.*3-100033-A-0\.wav.*karolpiczak"):
        load_corpus("esc50", esc50)
    for clip in (esc50 / "audio").iterdir():
        clip.unlink()
    with pytest.raises(FileNotFoundError, match=r"no audio in .*audio.*karolpiczak"):
        load_corpus("esc50", esc50)
    for table in ("filename,fold\n1-100031-A-0.wav,1\n", "filename,fold,target,category,esc10,src_file,take\n", ""):
        (esc50 / "meta" / "esc50.csv").write_text(table)
        with pytest.raises(ValueError, match=r"columns filename, fold, target, category, src_file in .*esc50\.csv"):
            load_corpus("esc50", esc50)
    (esc50 / "meta" / "esc50.csv").unlink()
    with pytest.raises(FileNotFoundError, match=r"meta/esc50\.csv is missing.*karolpiczak"):
        load_corpus("esc50", esc50)


@pytest.mark.real_audio
def test_real_esc50(real_audio):
    dataset = load_corpus("esc50", real_audio / "esc50-16k")
    assert len(label_names(dataset)) == 50
    assert label_names(dataset)[:2] == ["dog", "rooster"]


def speech_commands(root, version):
    """Of each word four clips for training and one for each of the others; noise that tells its time."""
    lists = {"validation_list.txt": [], "testing_list.txt": []}
    for word in SPEECH_COMMANDS_WORDS[version]:
        for index in range(6):
            clip = f"{word}/{index:08x}_nohash_0.wav"
            write_audio(root / clip, seconds=0.05)
            if index > 3:
                lists["validation_list.txt" if index == 4 else "testing_list.txt"].append(clip)
    for name, clips in lists.items():
        (root / name).write_text("\n".join(clips) + "\n")
    for name in ("white_noise", "pink_noise"):
        path = write_audio(root / "_background_noise_" / f"{name}.wav", seconds=20)
        soundfile.write(path, np.linspace(0, 0.999, 20 * 16000), 16000)
    (root / "_background_noise_" / "README.md").write_text("noise")
    return root


@pytest.mark.parametrize(("version", "classes"), [(1, 30), (2, 35)])
def test_all_words_of_speech_commands(tmp_path, version, classes):
    speech_commands(tmp_path, version)
    splits = {
        split: load_corpus(f"speech-commands-v{version}", tmp_path, split) for split in ("train", "validation", "test")
    }
    assert [len(dataset) for dataset in splits.values()] == [4 * classes, classes, classes]
    paths = [set(paths_of(dataset, tmp_path)) for dataset in splits.values()]
    assert len(set.union(*paths)) == 6 * classes
    names = label_names(splits["test"])
    assert len(names) == classes
    for row in splits["test"]:
        assert row["audio"]["path"].split("/")[-2] == names[row["label"]]
        assert row["speaker"] == "00000005"


@pytest.mark.parametrize("classes", [12, 11])
def test_the_task_of_ten_keywords(tmp_path, classes):
    speech_commands(tmp_path, 1)
    seconds = {}
    for split, count in (("train", 4), ("validation", 1), ("test", 1)):
        dataset = load_corpus(f"speech-commands-v1-{classes}", tmp_path, split)
        names = label_names(dataset)
        assert names == [*KEYWORDS, "unknown", "silence"][:classes]
        assert np.bincount(dataset["label"][:]).tolist() == [count] * classes
        unknown = [row["audio"]["path"].split("/")[-2] for row in dataset if names[row["label"]] == "unknown"]
        assert not set(unknown) & set(KEYWORDS)
        if classes == 12:
            silence = [row["audio"] for row in dataset if names[row["label"]] == "silence"]
            assert all(audio_info(audio).duration == 1 for audio in silence)
            seconds[split] = [20 * sample for audio in silence for sample in read_audio(audio, 16000)[[0, -1]]]
        again = load_corpus(f"speech-commands-v1-{classes}", tmp_path, split)
        assert again["audio"][:] == dataset["audio"][:]
    if classes == 12:  # each split has its own part of the noise
        assert max(seconds["train"]) <= 16.01
        assert min(seconds["validation"]) >= 15.99
        assert max(seconds["validation"]) <= 18.01
        assert min(seconds["test"]) >= 17.99


def test_the_test_archive_of_speech_commands(tmp_path):
    for folder in (*KEYWORDS, "_unknown_", "_silence_"):
        write_audio(tmp_path / folder / "00000001_nohash_0.wav")
    dataset = load_corpus("speech-commands-v1-12", tmp_path, "test")
    assert sorted(dataset["label"][:]) == list(range(12))
    with pytest.raises(ValueError, match="split test with 12 or 11 classes, got train"):
        load_corpus("speech-commands-v1-12", tmp_path, "train")
    with pytest.raises(ValueError, match="got test with 30"):
        load_corpus("speech-commands-v1", tmp_path, "test")
    (tmp_path / "_silence_" / "00000001_nohash_0.wav").unlink()
    with pytest.raises(FileNotFoundError, match=r"no audio in .*_silence_.*speech_commands_test_set_v0\.01"):
        load_corpus("speech-commands-v1-12", tmp_path, "test")


def test_missing_pieces_of_speech_commands_are_named(tmp_path):
    speech_commands(tmp_path, 1)
    with pytest.raises(FileNotFoundError, match=r"no folder backward.*speech_commands_v0\.02\.tar\.gz"):
        load_corpus("speech-commands-v2", tmp_path, "train")
    (tmp_path / "tree" / "00000005_nohash_0.wav").unlink()
    with pytest.raises(FileNotFoundError, match=r"1 clips of the test list .*first tree/00000005_nohash_0\.wav"):
        load_corpus("speech-commands-v1", tmp_path, "test")
    for noise in (tmp_path / "_background_noise_").glob("*.wav"):
        noise.unlink()
    with pytest.raises(FileNotFoundError, match=r"no audio in .*_background_noise_.*speech_commands_v0\.01\.tar\.gz"):
        load_corpus("speech-commands-v1-12", tmp_path, "train")
    (tmp_path / "validation_list.txt").unlink()
    with pytest.raises(FileNotFoundError, match=r"validation_list\.txt is missing.*speech_commands_v0\.01\.tar\.gz"):
        load_corpus("speech-commands-v1", tmp_path, "train")


def test_the_second_version_is_not_taken_for_the_first(tmp_path):
    speech_commands(tmp_path, 2)
    with pytest.raises(ValueError, match=r"v0\.01\.tar\.gz.*got V2, which has the folder backward"):
        load_corpus("speech-commands-v1", tmp_path, "train")


@pytest.mark.parametrize("folders", [("", ""), ("wav", "wav"), ("dev/wav", "test/wav")])
def test_voxceleb1(tmp_path, folders):
    lines = []
    for folder, speaker in zip(folders, ("id10001", "id10270")):
        for mark, video in ((1, "1zcIwhmdeo4"), (1, "7gWzIy6yIIk"), (2, "7w0IBEWc9Qw"), (3, "J9lHsKG98U8")):
            clip = f"{speaker}/{video}/00001.wav"
            write_audio(tmp_path / folder / clip)
            lines.append(f"{mark} {clip}")
    (tmp_path / "iden_split.txt").write_text("\n".join(lines) + "\n")
    splits = [load_corpus("voxceleb1", tmp_path, split) for split in ("train", "validation", "test")]
    assert [dataset["label"][:] for dataset in splits] == [[0, 0, 1, 1], [0, 1], [0, 1]]
    assert label_names(splits[0]) == ["id10001", "id10270"]
    assert splits[2]["video"][:] == ["id10001/J9lHsKG98U8", "id10270/J9lHsKG98U8"]
    assert audio_info(splits[0][3]["audio"]).num_samples == 1600

    (tmp_path / folders[1] / "id10270/J9lHsKG98U8/00001.wav").unlink()
    with pytest.raises(FileNotFoundError, match="1 of 2 clips of the test list .*first id10270/J9lHsKG98U8"):
        load_corpus("voxceleb1", tmp_path, "test")
    for list_, message in (("1 id10001/a/00001.wav\nid10270\n", "got 'id10270'"), ("1 a/b/c.wav\n", "marked 2")):
        (tmp_path / "iden_split.txt").write_text(list_)
        with pytest.raises(ValueError, match=message):
            load_corpus("voxceleb1", tmp_path, "validation")
    (tmp_path / "iden_split.txt").unlink()
    with pytest.raises(FileNotFoundError, match=r"iden_split\.txt is missing.*robots\.ox\.ac\.uk"):
        load_corpus("voxceleb1", tmp_path, "train")


def test_wrong_names(tmp_path):
    with pytest.raises(ValueError, match=r"expected a corpus among audioset-20k, .*got 'urbansound'"):
        load_corpus("urbansound", tmp_path)
    with pytest.raises(ValueError, match="expected a split of voxceleb1, train, validation, test; got None"):
        load_corpus("voxceleb1", tmp_path)
    with pytest.raises(ValueError, match="balanced_train, unbalanced_train, eval; got"):
        load_audioset(tmp_path, ["train"])
    for load in (load_speech_commands, load_voxceleb1):
        with pytest.raises(ValueError, match="train, validation, test; got 'dev'"):
            load(tmp_path, "dev")
    with pytest.raises(ValueError, match="version 1 or 2 of Speech Commands, got 3"):
        load_speech_commands(tmp_path, "train", version=3)
    for layout, benchmark in CORPORA.items():
        with pytest.raises(FileNotFoundError):
            load_corpus(layout, tmp_path / "nothing", next(iter(benchmark.splits), None))
