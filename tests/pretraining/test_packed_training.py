"""Training on packed audio, and what is copied to an accelerator."""

import numpy as np
import pytest
import torch
from tiny_pretraining import CROPS, assert_equal, losses, make_arguments, make_model, make_trainer

from asit_hf.data import PackedCrops, PretrainingCrops
from asit_hf.data.collators import collate_crops
from asit_hf.data.packed import write_packed
from asit_hf.pretraining import trainer as module
from asit_hf.pretraining.arguments import ASiTPreTrainingArguments

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Twelve clips, some shorter than a crop."""
    folder = tmp_path_factory.mktemp("pool")
    rng = np.random.default_rng(0)
    clips = [(rng.standard_normal(int(16000 * rng.uniform(0.4, 1.5))) * 3000).astype(np.int16) for _ in range(12)]
    write_packed(folder, [(f"{index}.wav", None, clip) for index, clip in enumerate(clips)], 16000)
    return folder


def test_views_gathered_by_the_trainer_equal_those_of_collated_crops(folder, tmp_path):
    crops = PackedCrops(folder, 16000, **CROPS)
    trainer = make_trainer(crops, tmp_path)
    items = [crops[index] for index in range(3)]
    views, given = trainer.prepare_views(trainer.data_collator(items)), trainer.prepare_views(crops.collate(items))
    assert views["input_values"].shape == (3, 2, 48, 32)
    assert views["local_values"].shape[:2] == (3, 2)
    assert views.keys() == given.keys()
    for name, value in given.items():
        assert torch.equal(views[name], value), name


def test_a_resumed_run_equals_an_uninterrupted_one_bit_for_bit(folder, tmp_path):
    settings = {"save_strategy": "steps", "save_steps": 4, "standardize_head_inputs": True}
    whole = make_trainer(PackedCrops(folder, 16000, **CROPS), tmp_path / "whole", **settings)
    whole.train()
    assert len(set(losses(whole))) == 6
    resumed = make_trainer(PackedCrops(folder, 16000, **CROPS), tmp_path / "resumed", make_model(5), **settings)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-4"))
    assert_equal(whole.model, resumed.model)
    assert losses(whole)[4:] == losses(resumed)[4:]


def test_losses_do_not_depend_on_workers_or_on_where_crops_are_cut(folder, tmp_path):
    runs = [
        make_trainer(PackedCrops(folder, 16000, **CROPS), tmp_path, dataloader_num_workers=workers)
        for workers in (0, 2)
    ]
    runs[1].data_collator = runs[1].train_dataset.collate
    for trainer in runs:
        trainer.train()
    assert losses(runs[0]) == losses(runs[1])


def test_a_batch_without_crops_or_their_keys_is_refused(folder, tmp_path):
    trainer = make_trainer(PackedCrops(folder, 16000, **CROPS), tmp_path)
    with pytest.raises(ValueError, match="indices and sample_keys.*got.*sample_keys"):
        trainer.prepare_views({"sample_keys": torch.zeros(2, dtype=torch.int64)})
    other = make_trainer([{}] * 4, tmp_path)
    with pytest.raises(ValueError, match="PackedCrops"):
        other.prepare_views({name: torch.zeros(2, dtype=torch.int64) for name in ("indices", "sample_keys")})


@pytest.fixture
def accelerator(monkeypatch):
    """Replaces an accelerator by the meta device, which stores no values."""
    monkeypatch.setattr(ASiTPreTrainingArguments, "device", torch.device("meta"))


@pytest.mark.parametrize(("free", "resident"), [(None, True), (10**9, True), (10**5, False)])
def test_packed_audio_is_moved_to_a_device_with_enough_memory(
    folder, tmp_path, accelerator, monkeypatch, caplog, free, resident
):
    crops = PackedCrops(folder, 16000, **CROPS)
    trainer = make_trainer(crops, tmp_path)
    monkeypatch.setattr(module, "_free_memory", lambda device: free)
    with caplog.at_level("WARNING"):
        trainer.get_train_dataloader()
        trainer.get_train_dataloader()
    assert caplog.text.count("hours of packed audio") == 1  # once
    assert crops.sources.audio.device.type == ("meta" if resident else "cpu")
    batch = trainer.data_collator([crops[0], crops[1]])
    assert ("global_waveforms" in batch) is not resident
    if resident:
        assert crops.gather(batch["indices"], batch["sample_keys"])["global_waveforms"].device.type == "meta"


def test_crops_are_sent_as_int16_to_an_accelerator_only(tmp_path, accelerator, monkeypatch):
    clip = {"array": np.linspace(-0.9, 0.9, 16000), "sampling_rate": 16000}
    crops = PretrainingCrops([clip] * 4, 16000, **CROPS)
    dtypes = {}
    for device in ("meta", "cpu"):
        monkeypatch.setattr(ASiTPreTrainingArguments, "device", torch.device(device))
        batch = make_trainer(crops, tmp_path).data_collator([crops[0], crops[1]])
        dtypes[device] = {batch["global_waveforms"].dtype, batch["local_waveforms"].dtype}
    assert dtypes == {"meta": {torch.int16}, "cpu": {torch.float32}}


def test_crops_sent_as_int16_give_nearly_the_same_views(tmp_path):
    generator = np.random.default_rng(0)
    levels = (1e-4, 0.5, 1.0, 3.0)  # far below full scale to beyond it
    clips = [{"array": generator.uniform(-level, level, 16000), "sampling_rate": 16000} for level in levels]
    crops = PretrainingCrops(clips, 16000, **CROPS)
    trainer = make_trainer(crops, tmp_path)
    items = [crops[index] for index in range(4)]
    plain, rounded = (trainer.prepare_views(collate_crops(items, int16=int16)) for int16 in (False, True))
    for name in ("input_values", "local_values"):
        assert (plain[name] - rounded[name]).abs().max() < 0.01, name


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({"use_cpu": False}, True),
        ({"use_cpu": True}, False),
        ({"use_cpu": False, "dataloader_pin_memory": False}, False),
        ({"use_cpu": False, "accelerator_config": {"even_batches": False}}, False),
        ({"use_cpu": False, "accelerator_config": {"non_blocking": True, "even_batches": False}}, True),
    ],
)
def test_copies_to_an_accelerator_do_not_block_by_default(tmp_path, given, expected):
    args = make_arguments(tmp_path, **given)
    assert args.accelerator_config.non_blocking is expected
    asked = given.get("accelerator_config", {})
    assert args.accelerator_config.even_batches is asked.get("even_batches", True)
