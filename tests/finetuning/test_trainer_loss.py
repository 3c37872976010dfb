"""Losses and gradients of Trainer do not depend on the number of accumulation steps."""

import pytest
import torch
from transformers import Trainer, TrainingArguments

from asit_hf import ASiTConfig, ASiTForAudioClassification

CLIPS, CLASSES = 8, 5


def make_model(problem_type: str) -> ASiTForAudioClassification:
    torch.manual_seed(0)
    return ASiTForAudioClassification(
        ASiTConfig(
            hidden_size=16,
            num_hidden_layers=1,
            num_attention_heads=2,
            intermediate_size=32,
            num_frames=32,
            num_mel_bins=32,
            num_labels=1 if problem_type == "regression" else CLASSES,
            problem_type=problem_type,
        )
    )


def make_items(problem_type: str) -> list[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(1)
    values = torch.randn(CLIPS, 32, 32, generator=generator)
    if problem_type == "multi_label_classification":
        labels = (torch.rand(CLIPS, CLASSES, generator=generator) < 0.3).float()
    elif problem_type == "regression":
        labels = torch.randn(CLIPS, generator=generator)
    else:
        labels = torch.randint(CLASSES, (CLIPS,), generator=generator)
    return [{"input_values": one, "labels": label} for one, label in zip(values, labels)]


def train(folder, problem_type: str, batch_size: int) -> tuple[list[float], list[float], dict[str, torch.Tensor]]:
    """Logged losses and gradient norms, and the weights after two steps over all clips."""
    model = make_model(problem_type)
    args = TrainingArguments(
        output_dir=str(folder),
        per_device_train_batch_size=batch_size,
        gradient_accumulation_steps=CLIPS // batch_size,
        num_train_epochs=2,
        learning_rate=0.1,
        optim="sgd",
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
    )
    trainer = Trainer(model=model, args=args, train_dataset=make_items(problem_type))
    trainer.train()
    logs = [entry for entry in trainer.state.log_history if "grad_norm" in entry]
    return [entry["loss"] for entry in logs], [entry["grad_norm"] for entry in logs], model.state_dict()


@pytest.mark.parametrize("problem_type", ["single_label_classification", "multi_label_classification", "regression"])
def test_accumulation_equals_one_large_batch(tmp_path, problem_type):
    losses, norms, weights = train(tmp_path, problem_type, batch_size=CLIPS)
    accumulated_losses, accumulated_norms, accumulated_weights = train(tmp_path, problem_type, batch_size=2)
    assert len(losses) == 2
    assert accumulated_losses == pytest.approx(losses, rel=1e-4)
    assert accumulated_norms == pytest.approx(norms, rel=1e-4)
    for name, weight in weights.items():
        torch.testing.assert_close(accumulated_weights[name], weight, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("problem_type", ["single_label_classification", "multi_label_classification"])
def test_the_logged_loss_is_the_mean_over_clips(tmp_path, problem_type):
    items = make_items(problem_type)
    batch = {name: torch.stack([item[name] for item in items]) for name in items[0]}
    with torch.no_grad():
        expected = make_model(problem_type).eval()(**batch).loss.item()
    losses, _, _ = train(tmp_path, problem_type, batch_size=2)
    assert losses[0] == pytest.approx(expected, rel=1e-4)
