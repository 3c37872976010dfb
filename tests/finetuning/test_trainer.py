import numpy as np
import pytest
import torch
from transformers import TrainerCallback

from asit_hf import ASiTConfig, ASiTForAudioClassification
from asit_hf.finetuning.optimization import average_checkpoints
from asit_hf.finetuning.trainer import FinetuningArguments, FinetuningTrainer, epoch_folder
from asit_hf.modeling_asit import classification_loss

CLIPS, CLASSES = 12, 3


def make_trainer(folder, items=None, problem_type="single_label_classification", **kwargs) -> FinetuningTrainer:
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    config = ASiTConfig(**sizes, num_frames=32, num_mel_bins=32, num_labels=CLASSES, problem_type=problem_type)
    defaults = {
        "eval_strategy": "no",
        "save_strategy": "no",
        "load_best_model_at_end": False,
        "per_device_train_batch_size": 4,
        "logging_steps": 1,
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
    }
    args = FinetuningArguments(output_dir=str(folder), **{**defaults, **kwargs})
    items = make_items() if items is None else items
    return FinetuningTrainer(ASiTForAudioClassification(config), args, train_dataset=items)


def make_items() -> list[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(1)
    values = torch.randn(CLIPS, 32, 32, generator=generator)
    return [{"input_values": one, "labels": torch.tensor(index % CLASSES)} for index, one in enumerate(values)]


class Rates(TrainerCallback):
    def __init__(self):
        self.seen = []

    def on_pre_optimizer_step(self, args, state, control, optimizer=None, **kwargs):
        self.seen.append(sorted({group["lr"] for group in optimizer.param_groups}))


def test_layer_decay_and_step_decay_reach_the_optimizer(tmp_path):
    options = {"layer_decay": 0.5, "lr_decay_start": 2, "lr_decay_step": 1, "lr_decay_gamma": 0.1, "warmup_steps": 2}
    trainer = make_trainer(tmp_path, learning_rate=0.8, num_train_epochs=4, **options)
    rates = Rates()
    trainer.add_callback(rates)
    trainer.train()
    layers = np.array([0.1, 0.2, 0.4, 0.8])
    factors = [0, 0.5, *[1] * 4, *[0.1] * 3, *[0.01] * 3]
    assert len(rates.seen) == 12
    for seen, factor in zip(rates.seen, factors):
        np.testing.assert_allclose(seen, layers * factor if factor else [0])


def test_schedules_of_trainer_are_available(tmp_path):
    trainer = make_trainer(tmp_path, learning_rate=0.8, num_train_epochs=1, lr_scheduler_type="constant")
    rates = Rates()
    trainer.add_callback(rates)
    trainer.train()
    assert rates.seen == [[0.8]] * 3


@pytest.mark.parametrize("problem_type", ["single_label_classification", "multi_label_classification"])
def test_labels_are_smoothed_in_training_only(tmp_path, problem_type):
    items = [{**item, "labels": torch.tensor(0)} for item in make_items()]  # over balanced classes the effect cancels
    if problem_type == "multi_label_classification":
        items = [{**item, "labels": torch.nn.functional.one_hot(item["labels"], CLASSES).float()} for item in items]
    options = {"label_smoothing": 0.3, "num_train_epochs": 1, "per_device_train_batch_size": CLIPS}
    trainer = make_trainer(tmp_path, items, problem_type, **options)
    trainer.model.classifier.bias.data[0] = 4.0  # large logits, on which smoothing has an effect
    batch = {name: torch.stack([item[name] for item in items]) for name in items[0]}
    with torch.no_grad():
        logits = trainer.model.eval()(batch["input_values"]).logits
    targets = batch["labels"] if batch["labels"].dim() == 2 else torch.nn.functional.one_hot(batch["labels"], CLASSES)
    targets = 0.7 * targets + 0.1
    if problem_type == "multi_label_classification":
        smoothed = torch.nn.functional.binary_cross_entropy_with_logits(logits, targets)
    else:
        smoothed = -(targets * logits.log_softmax(-1)).sum(-1).mean()
    evaluated = trainer.evaluate(items)["eval_loss"]
    trainer.train()
    assert trainer.state.log_history[0]["loss"] == pytest.approx(smoothed.item(), rel=1e-4)
    assert evaluated == pytest.approx(classification_loss(logits, batch["labels"], problem_type).item(), rel=1e-4)
    assert abs(evaluated - smoothed.item()) > 0.1


def test_the_last_epochs_are_averaged(tmp_path):
    trainer = make_trainer(tmp_path, num_train_epochs=4, learning_rate=0.05, average_checkpoints=2)
    trainer.train()
    last = {name: value.clone() for name, value in trainer.model.state_dict().items()}
    assert sorted(path.name for path in tmp_path.glob("epoch-*")) == ["epoch-03", "epoch-04"]
    trainer.load_average()
    expected = average_checkpoints([epoch_folder(tmp_path, 3), epoch_folder(tmp_path, 4)])
    name = "classifier.weight"
    assert torch.equal(trainer.model.state_dict()[name], expected[name])
    assert not torch.equal(last[name], expected[name])
    saved = ASiTForAudioClassification.from_pretrained(epoch_folder(tmp_path, 4))
    assert torch.equal(saved.state_dict()[name], last[name])


def test_the_averaged_weights_are_calibrated(tmp_path):
    trainer = make_trainer(tmp_path, num_train_epochs=2, learning_rate=0.05, average_checkpoints=2)
    trainer.eval_dataset = make_items()
    trainer.train()
    trainer.load_average()
    averaged = trainer.model.classifier.weight.clone()
    found = trainer.calibrate()
    assert torch.equal(trainer.model.classifier.weight, averaged / found["temperature"])
    assert trainer.evaluate()["eval_loss"] == pytest.approx(found["nll"], rel=1e-4)
    assert found["clips"] == CLIPS


def test_averaging_more_epochs_than_a_run_of_max_steps_has(tmp_path):
    trainer = make_trainer(tmp_path, max_steps=5, average_checkpoints=9)
    trainer.train()
    assert sorted(path.name for path in tmp_path.glob("epoch-*")) == ["epoch-01", "epoch-02"]
    trainer.load_average()


def test_incomplete_batches_are_dropped_in_training_only(tmp_path):
    options = {"per_device_train_batch_size": 5, "per_device_eval_batch_size": 5, "num_train_epochs": 1}
    trainer = make_trainer(tmp_path, dataloader_drop_last=True, **options)
    trainer.train()
    assert trainer.state.global_step == 2
    assert len(trainer.predict(trainer.train_dataset).predictions) == CLIPS
    assert trainer.evaluate(trainer.train_dataset)["eval_loss"] > 0
    assert sum(len(batch["labels"]) for batch in trainer.get_eval_dataloader(trainer.train_dataset)) == CLIPS
    few = make_trainer(tmp_path, make_items()[:4], dataloader_drop_last=True, **options)
    with pytest.raises(ValueError, match="4 clips.*dataloader_drop_last"):
        few.train()


def test_noise_is_added_to_the_patch_embeddings(tmp_path):
    weights = []
    for alpha in (None, 50.0):
        trainer = make_trainer(
            tmp_path, max_steps=1, learning_rate=0.1, label_names=["labels"], neftune_noise_alpha=alpha
        )
        trainer.train()
        weights.append(trainer.model.classifier.weight.detach())
    assert not torch.allclose(*weights)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"average_checkpoints": 3}, "average_checkpoints.*load_best_model_at_end"),
        ({"label_smoothing_factor": 0.1}, "use label_smoothing"),
        ({"lr_decay_gamma": 0.85}, "lr_decay_gamma .*without lr_decay_start"),
        ({"lr_decay_start": 2, "lr_scheduler_type": "cosine"}, "lr_scheduler_type .*with lr_decay_start"),
        ({"remove_unused_columns": True}, "remove_unused_columns"),
        ({"prediction_loss_only": True}, "prediction_loss_only"),
        ({"batch_eval_metrics": True}, "batch_eval_metrics"),
        ({"eval_do_concat_batches": False}, "eval_do_concat_batches"),
        ({"include_for_metrics": ["inputs"]}, "include_for_metrics"),
        ({"label_names": ["target"]}, "label_names"),
        ({"train_sampling_strategy": "group_by_length"}, "train_sampling_strategy.*group_by_length"),
        ({"dataloader_persistent_workers": True}, "dataloader_persistent_workers.*dataloader_num_workers"),
        ({"per_device_eval_batch_size": 0}, "per_device_eval_batch_size.*got 0"),
        ({"bf16_full_eval": True}, "bf16_full_eval needs bf16"),
        ({"optim": "lomo"}, "lomo"),
        ({"lr_scheduler_type": "cosine_with_min_lr"}, "min_lr"),
        ({"do_predict": True}, "do_predict.*asit_hf.predict"),
        ({"do_train": False}, "do_train.*do_eval"),
        ({"do_train": False, "do_eval": True, "push_to_hub": True}, "push_to_hub"),
        ({"label_smoothing": 1.5}, "label_smoothing.*got 1.5"),
        ({"lr_decay_start": 2, "lr_decay_step": 0}, "lr_decay_step.*got 2, 0 and 0"),
        ({"load_best_model_at_end": False, "average_checkpoints": -1}, "average_checkpoints.*got None, -1 and 1"),
    ],
)
def test_wrong_options(tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        FinetuningArguments(output_dir=str(tmp_path), **options)


def test_fp16_needs_an_accelerator(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
    with pytest.raises(ValueError, match="fp16.*bf16"):
        FinetuningArguments(output_dir=str(tmp_path), fp16=True)
