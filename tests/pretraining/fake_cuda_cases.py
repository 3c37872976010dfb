"""
Run by `test_fake_cuda.py` with the libraries of `examples/benchmarks/fake_cuda.py` loaded. Whatever waits for a value
of the device, mixes devices or has a size that depends on values raises here.
"""

from unittest import mock

import count_kernels
import pytest
import torch
from fake_cuda import KernelCounter, fake_cuda, to_fake_cuda
from training_step import TOY

from asit_hf import ASiTConfig, ASiTFeatureExtractor, ASiTForAudioClassification, ASiTForPreTraining
from asit_hf.corpus import engine
from asit_hf.corpus.labels import label_rows
from asit_hf.data.collators import collate_crops
from asit_hf.embed import EmbeddingJob
from asit_hf.finetuning.optimization import smooth_labels
from asit_hf.predict import LabelJob
from asit_hf.pretraining import gradients, masking
from asit_hf.pretraining.arguments import ASiTPreTrainingArguments
from asit_hf.pretraining.masking import GMML, corrupt
from asit_hf.pretraining.presets import get_preset
from asit_hf.pretraining.schedules import epoch_schedules
from asit_hf.pretraining.trainer import ASiTPreTrainer

BATCH, SAMPLES = 4, 15760  # 97 frames, of which 96 are whole patches


class Step:
    """One step of the training loop of `ASiTPreTrainer` on fake CUDA tensors."""

    def __init__(self, folder, preset="2024", dtype=None, attention="sdpa", checkpointing=False, **fields):
        self.chosen = get_preset(preset)
        config = ASiTConfig(**{**self.chosen.config, **TOY, "drop_path_rate": 0.1, **fields})
        config._attn_implementation = attention
        args = ASiTPreTrainingArguments(
            output_dir=str(folder),
            preset=preset,
            max_steps=10,
            use_cpu=True,
            report_to="none",
            plot_steps=0,
            max_grad_norm=0.0,
        )
        model = ASiTForPreTraining(config)
        if checkpointing:
            model.gradient_checkpointing_enable()
        extractor = ASiTFeatureExtractor(num_mel_bins=32)
        self.trainer = ASiTPreTrainer(model, args, extractor, train_dataset=[0] * 64, data_collator=collate_crops)
        self.trainer.schedules = epoch_schedules(args, 10, 5)
        self.trainer._steps_per_epoch = 5
        self.trainer._agree = lambda *flags: [False] * len(flags)  # the one place that waits for the device
        self.dtype = dtype
        extractor.extract(torch.randn(1, SAMPLES))  # cached constants need real tensors
        gmml = args.gmml
        masking.rounds_for(96, 32, max(gmml.mask_ratio[1], gmml.replace_ratio), gmml)

    def __call__(self) -> torch.Tensor:
        trainer, model = self.trainer, self.trainer.model
        if next(model.parameters()).device.type == "cpu":
            to_fake_cuda(model).train()
            trainer._last_loss = trainer._last_loss.to("cuda")
            trainer.create_optimizer()
        inputs = {
            "global_waveforms": torch.randn(BATCH, 2, SAMPLES, device="cuda"),
            "global_lengths": torch.full((BATCH, 2), SAMPLES, device="cuda"),
            "sample_keys": torch.randint(2**62, (BATCH,), device="cuda"),
        }
        if self.chosen.num_local_crops:
            inputs["local_waveforms"] = torch.randn(BATCH, self.chosen.num_local_crops, 5520, device="cuda")
            inputs["local_lengths"] = torch.full((BATCH, self.chosen.num_local_crops), 5520, device="cuda")
        with KernelCounter() as self.counter:
            with torch.autocast("cuda", dtype=self.dtype or torch.bfloat16, enabled=self.dtype is not None):
                loss = trainer.compute_loss(model, inputs)
            loss.backward()
            trainer._get_grad_norm(model)
            trainer.before_optimizer_step()
            trainer.optimizer.step()
            trainer.after_optimizer_step()
            model.zero_grad()
        return loss


@pytest.fixture(autouse=True)
def no_fake_constants():
    yield
    gradients._parts_of_tensors.cache_clear()


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"dtype": torch.bfloat16},
        {"dtype": torch.float16},
        {"dtype": torch.bfloat16, "preset": "2023"},
        {"dtype": torch.bfloat16, "attention": "eager"},
        {"dtype": torch.bfloat16, "checkpointing": True},
        {"dtype": torch.bfloat16, "local_loss_patches": "corrupted"},
        {"dtype": torch.bfloat16, "preset": "2023", "global_loss_weight": 0.0},
        {"local_loss_weight": 0.0, "global_loss_weight": 0.0},
    ],
    ids=lambda settings: "-".join(str(value) for value in settings.values()) or "fp32",
)
def test_a_step_never_waits_and_copies_nothing_to_the_device(settings, tmp_path):
    step = Step(tmp_path, **settings)
    with fake_cuda():
        for _ in range(2):
            loss = step()
        assert loss.device.type == "cuda"
        assert loss.dtype == torch.float32
        assert step.counter.kernels["mm"] > 20
        assert step.counter.host_copies == []  # the batch and constants are on the device


def test_in_float32_nothing_is_cast_to_half_precision(tmp_path):
    step = Step(tmp_path)
    with fake_cuda():
        step()
        assert all(
            parameter.grad is None or parameter.grad.dtype == torch.float32
            for parameter in step.trainer.model.parameters()
        )


@pytest.mark.parametrize("pattern", masking.PATTERNS)
@pytest.mark.parametrize("fill", masking.FILLS)
def test_all_corruptions_run_on_the_device(pattern, fill):
    config = GMML(pattern=pattern, fill=fill)
    if pattern != "patches":
        masking.rounds_for(96, 32, 0.5, config)
    with fake_cuda():
        clean = torch.randn(BATCH, 2, 96, 32, device="cuda")
        corrupted, mask = corrupt(clean, torch.randint(2**62, (BATCH,), device="cuda"), 5, config)
        assert corrupted.device == mask.device == clean.device
        assert corrupted.shape == mask.shape == clean.shape


def test_waveforms_in_half_precision_become_float32_spectrograms():
    extractor = ASiTFeatureExtractor(num_mel_bins=32)
    extractor.extract(torch.randn(1, SAMPLES))
    with fake_cuda():
        spectrograms = extractor.extract(torch.randn(2, SAMPLES, device="cuda").half())
        assert spectrograms.dtype == torch.float32
        assert spectrograms.device.type == "cuda"


@pytest.mark.parametrize("problem_type", ["single_label_classification", "multi_label_classification", "regression"])
def test_a_classifier_trains_on_the_device(problem_type):
    num_labels = 1 if problem_type == "regression" else 5
    config = ASiTConfig(**TOY, problem_type=problem_type, num_labels=num_labels, pooling_mode="cls_mean")
    model = ASiTForAudioClassification(config)
    with fake_cuda():
        to_fake_cuda(model).train()
        labels = {
            "single_label_classification": torch.zeros(BATCH, dtype=torch.long, device="cuda"),
            "multi_label_classification": torch.zeros(BATCH, 5, device="cuda"),
            "regression": torch.zeros(BATCH, device="cuda"),
        }[problem_type]
        if problem_type == "single_label_classification":
            labels = smooth_labels(labels, 5, 0.1)
        with torch.autocast("cuda", dtype=torch.bfloat16):
            loss = model(torch.randn(BATCH, 64, 32, device="cuda"), labels=labels).loss
        loss.backward()
        assert loss.device.type == "cuda"
        assert loss.dtype == torch.float32


@pytest.mark.parametrize("lengths", [[SAMPLES] * 3, [SAMPLES, 12000, 100]], ids=["same", "unlike"])
@pytest.mark.parametrize("pooling", [None, "cls", "cls_mean", "mean_std_time"])
def test_a_batch_of_a_corpus_is_computed_without_waiting(pooling, lengths, monkeypatch):
    monkeypatch.setattr(torch.cuda, "Event", mock.MagicMock())
    extractor, model = ASiTFeatureExtractor(num_mel_bins=32), ASiTForAudioClassification(ASiTConfig(**TOY))
    extractor.extract(torch.randn(1, SAMPLES))
    with fake_cuda():
        to_fake_cuda(model.to(torch.bfloat16))
        if pooling is None:
            job = LabelJob(model, extractor, label_rows(["rain", "wind"], "softmax"))
        else:
            job = EmbeddingJob(model.asit, extractor, pooling=pooling)
        waveforms = torch.zeros(len(lengths), SAMPLES, dtype=torch.int16)
        batch = engine.Batch(0, 0, waveforms, lengths, list(range(len(lengths))))
        values, arrived = engine._compute(job, batch)
        assert {value.device.type for value in values} == {"cpu"}
        assert arrived.record.called
        assert all(len(value) == len(lengths) for value in values)


def test_launches_of_a_step_of_small():
    """Without chunks, norms and casts for accelerators, a step launches 9619 kernels besides the masks."""
    parts = count_kernels.count_step("small", 128)["parts"]
    kernels = {name: part["kernels"] for name, part in parts.items()}
    assert sum(kernels.values()) - kernels["masks"] < 9400 / 3
    assert kernels["masks"] < 330
    assert all(part["host_copies"] == 0 for part in parts.values())
