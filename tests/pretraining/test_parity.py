"""Equality with the authors' code: the numbers of both releases, see tests/fixtures/README.md."""

import copy
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils.data import Dataset
from transformers import TrainerCallback

from asit_hf import ASiTConfig, ASiTFeatureExtractor, ASiTForPreTraining
from asit_hf.pretraining.arguments import ASiTPreTrainingArguments
from asit_hf.pretraining.trainer import ASiTPreTrainer

FIXTURES = Path(__file__).parents[1] / "fixtures"
CONFIG = {
    "hidden_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "intermediate_size": 192,
    "num_frames": 96,
    "num_mel_bins": 32,
    "distillation_hidden_size": 64,
    "distillation_bottleneck_size": 32,
    "num_prototypes": 64,
}
PRESETS = {
    "2024": {},
    "2023": {
        "num_patch_prototypes": 32,
        "reconstruction_hidden_size": 40,
        "reconstruction_bottleneck_size": 24,
        "global_loss_weight": 1.0,
        "local_loss_weight": 1.0,
        "reconstruction_loss_weight": 2.0,
    },
}
LOSSES = ["global_loss", "local_loss", "reconstruction_loss"]
FIRST_STEP, EPOCHS, STEPS_PER_EPOCH, CLIP = 51, 40, 3, 0.05

RENAMED = [
    ("backbone.cls_token", "asit.embeddings.cls_token"),
    ("backbone.pos_embed", "asit.embeddings.position_embeddings"),
    ("backbone.patch_embed.proj", "asit.embeddings.patch_embeddings.projection"),
    ("backbone.blocks.", "asit.layers."),
    ("backbone.norm.", "asit.layernorm."),
    (".norm1.", ".layernorm_before."),
    (".norm2.", ".layernorm_after."),
    (".attn.proj.", ".attention.o_proj."),
    (".attn.qkv.", ".attention.qkv."),
    ("head_recons.convTrans", "heads.reconstruction.projection"),
    ("head_recons.", "heads.reconstruction."),
    ("head_cls.cls_layer", "heads.distillation.cls_prototypes"),
    ("head_cls.data_layer", "heads.distillation.patch_prototypes"),
    ("head_cls.", "heads.distillation."),
    ("head.last_layer", "heads.distillation.cls_prototypes"),
    ("head.", "heads.distillation."),
    (".mlp.0.", ".fc1."),
    (".mlp.2.", ".fc2."),
    (".mlp.4.", ".fc3."),
]


def our_name(official: str) -> str:
    for old, new in RENAMED:
        official = official.replace(old, new)
    return official


def group(arrays, prefix: str) -> dict[str, np.ndarray]:
    return {name.removeprefix(prefix + "/"): arrays[name] for name in arrays.files if name.startswith(prefix + "/")}


def our_parts(official: str) -> list[str]:
    """Our names of an official tensor: theirs joins queries, keys and values."""
    name = our_name(official)
    return [name.replace(".qkv.", f".{part}_proj.") for part in "qkv"] if ".qkv." in name else [name]


def our_state(weights: dict[str, np.ndarray], prefix: str = "") -> dict[str, torch.Tensor]:
    state = {}
    for official, value in weights.items():
        names = our_parts(official)
        for name, part in zip(names, torch.from_numpy(value).chunk(len(names))):
            state[prefix + name] = part
    return state


def our_tensor(tensors: dict[str, torch.Tensor], official: str, prefix: str = "") -> torch.Tensor:
    return torch.cat([tensors[prefix + part].flatten() for part in our_parts(official)])


def official_model(release: str) -> ASiTForPreTraining:
    """Our model with the authors' weights and centers."""
    arrays = np.load(FIXTURES / f"official_{release}.npz")
    state = {**our_state(group(arrays, "student")), **our_state(group(arrays, "teacher"), "teacher.")}
    for name in ("cls", "patch"):
        state[f"{name}_center.center"] = torch.from_numpy(arrays[f"input/{name}_center"])
    model = ASiTForPreTraining(ASiTConfig(**CONFIG, **PRESETS[release])).train()
    model.set_attn_implementation("eager")  # as theirs
    model.load_state_dict(state)
    return model


def views(given: dict[str, np.ndarray]) -> dict[str, torch.Tensor]:
    clean, mask = torch.from_numpy(given["clean"]), given["mask"]
    if mask.dtype == np.uint8:
        mask = np.unpackbits(mask).astype(bool).reshape(clean.shape)
    mask = torch.from_numpy(mask)
    corrupted = clean.masked_scatter(mask, torch.from_numpy(given["filling"]))
    batch = {"input_values": clean, "corrupted_values": corrupted, "corruption_mask": mask}
    if "local" in given:
        batch["local_values"] = torch.from_numpy(given["local"])
    return batch


@pytest.fixture(scope="module", params=["2023", "2024"])
def official(request):
    """The authors' numbers, and our model with the authors' weights."""
    arrays = np.load(FIXTURES / f"official_{request.param}.npz")
    given, expected = group(arrays, "input"), group(arrays, "expected")
    batch = views(given) | {"teacher_temperature": float(given["teacher_temperature"])}
    return official_model(request.param), batch, given, expected, group(arrays, "grad_norm")


@pytest.mark.parametrize("chunk", [16, 256])
def test_a_step_equals_the_authors(official, monkeypatch, chunk):
    monkeypatch.setattr("asit_hf.pretraining.losses.CHUNK_ROWS", chunk)
    model, batch, _, expected, norms = official
    model = copy.deepcopy(model)
    outputs = model(**batch)
    for name in (*LOSSES, "loss"):
        assert outputs[name].item() == pytest.approx(float(expected[name]), rel=2e-6), name
    torch.testing.assert_close(
        outputs.reconstruction[:1], torch.from_numpy(expected["reconstruction"]), rtol=0, atol=1e-6
    )
    model.update_centers()
    for name in ("cls", "patch"):
        center = getattr(model, f"{name}_center").center
        torch.testing.assert_close(center, torch.from_numpy(expected[f"{name}_center"]), rtol=0, atol=1e-6)

    outputs.loss.backward()
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    for official_name, norm in norms.items():
        ours = our_tensor(gradients, official_name).norm().item()
        assert ours == pytest.approx(float(norm), rel=1e-4, abs=1e-7), official_name


@torch.no_grad()
def test_outputs_equal_the_authors(official):
    model, batch, given, expected, _ = official
    seen = {"student": batch["corrupted_values"], "teacher": batch["input_values"]}
    for who, values in seen.items():
        encoder, heads = (model.asit, model.heads) if who == "student" else model.teacher.values()
        tokens = encoder(values.transpose(0, 1).flatten(0, 1)).last_hidden_state
        features = heads.distillation(tokens)
        cls_logits = heads.distillation.cls_prototypes(features[:, 0])
        patch_logits = features[:, 1:] @ heads.distillation.patch_weight().T
        torch.testing.assert_close(cls_logits, torch.from_numpy(expected[f"{who}_cls"]), rtol=0, atol=1e-5)
        reference = torch.from_numpy(expected[f"{who}_patch"]).view_as(patch_logits)
        torch.testing.assert_close(patch_logits, reference, rtol=0, atol=1e-5)
        if who == "teacher":
            torch.testing.assert_close(tokens[:3], torch.from_numpy(expected["teacher_tokens"]), rtol=0, atol=1e-5)
    if "long" in given:
        longer = model.teacher["asit"](torch.from_numpy(given["long"])).last_hidden_state
        torch.testing.assert_close(longer, torch.from_numpy(expected["long_teacher_tokens"]), rtol=0, atol=1e-5)


# --- three steps of the trainer ------------------------------------------------------------------------------------


class GivenViews(Dataset):
    """The clips of the authors' three batches, in their order."""

    def __init__(self, batches: list[dict[str, torch.Tensor]]):
        self.clips = [
            {name: value[i] for name, value in batch.items()}
            for batch in batches
            for i in range(len(batch["input_values"]))
        ]

    def __len__(self) -> int:
        return len(self.clips)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return self.clips[index]


class FromStep51(TrainerCallback):
    """Starts the trainer in the middle of the run and stops it after one epoch."""

    def on_train_begin(self, args, state, control, lr_scheduler=None, **kwargs):
        state.global_step = FIRST_STEP
        for _ in range(FIRST_STEP):
            lr_scheduler.step()

    def on_step_end(self, args, state, control, **kwargs):
        control.should_training_stop = state.global_step == FIRST_STEP + STEPS_PER_EPOCH


class Gradients(TrainerCallback):
    """Records every step's gradients: before clipping as the first callback, after it as the last."""

    def __init__(self):
        self.steps: list[dict[str, torch.Tensor]] = []

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        self.steps.append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})


class Centers(TrainerCallback):
    def __init__(self):
        self.steps: list[dict[str, torch.Tensor]] = []

    def on_step_end(self, args, state, control, model=None, **kwargs):
        self.steps.append({name: getattr(model, f"{name}_center").center.clone() for name in ("cls", "patch")})


@pytest.fixture(scope="module", params=["2023", "2024"])
def run(request, tmp_path_factory):
    """Three steps of ASiTPreTrainer from the authors' weights, on their views."""
    first = np.load(FIXTURES / f"official_{request.param}.npz")
    steps = np.load(FIXTURES / f"official_steps_{request.param}.npz")
    batches = [views(group(first, "input")), *(views(group(steps, str(index))) for index in (1, 2))]
    args = ASiTPreTrainingArguments(
        output_dir=str(tmp_path_factory.mktemp("run")),
        preset=request.param,
        per_device_train_batch_size=3,
        num_train_epochs=EPOCHS,
        train_sampling_strategy="sequential",
        learning_rate=2e-3,
        warmup_epochs=10,
        max_tensor_grad_norm=CLIP,
        logging_steps=1,
        use_cpu=True,
        report_to="none",
        save_strategy="no",
        plot_steps=0,
        disable_tqdm=True,
    )
    trainer = ASiTPreTrainer(
        official_model(request.param),
        args,
        processing_class=ASiTFeatureExtractor(num_mel_bins=32),
        train_dataset=GivenViews(batches),
        data_collator=lambda clips: {name: torch.stack([clip[name] for clip in clips]) for name in clips[0]},
    )
    before, after, centers = Gradients(), Gradients(), Centers()
    trainer.callback_handler.callbacks.insert(0, before)  # before the callback through which the trainer clips
    for callback in (after, centers, FromStep51()):
        trainer.add_callback(callback)
    trainer.train()
    return trainer, steps, before.steps, after.steps, centers.steps


@pytest.mark.filterwarnings("ignore:Detected call of `lr_scheduler.step")
def test_three_steps_of_the_trainer_give_the_authors_losses_and_centers(run):
    trainer, expected, _, _, centers = run
    rows = [row for row in trainer.state.log_history if "global_loss" in row]
    assert [row["step"] for row in rows] == [52, 53, 54]
    for index, row in enumerate(rows):
        # Trainer averages the first loss that it logs over all steps before, of which only the last was run
        total = row["loss"] * (FIRST_STEP + 1 if index == 0 else 1)
        ours = [*(row[name] for name in LOSSES), total]
        np.testing.assert_allclose(ours, expected[f"{index}/losses"], rtol=0, atol=1e-5)
        for name, center in centers[index].items():
            np.testing.assert_allclose(center, expected[f"{index}/{name}_center"], rtol=0, atol=1e-6)


def test_three_steps_of_the_trainer_follow_the_authors_schedules(run):
    trainer, expected, *_ = run
    schedules = trainer.schedules
    for ours, theirs in (("learning_rate", "lr"), ("weight_decay", "wd"), ("teacher_momentum", "momentum")):
        np.testing.assert_allclose(getattr(schedules, ours), expected[f"schedule/{theirs}"], rtol=1e-12, atol=1e-15)
    for index in range(3):
        now = schedules.at(FIRST_STEP + index)
        names = ("learning_rate", "weight_decay", "teacher_momentum", "teacher_temperature")
        np.testing.assert_allclose([now[name] for name in names], expected[f"{index}/schedules"], rtol=1e-12)


def test_three_steps_of_the_trainer_give_the_authors_gradient_norms(run):
    _, expected, before, after, _ = run
    num_clipped = 0
    for index in range(3):
        for name, norm in group(expected, f"{index}/grad_norm").items():
            norm = float(norm)
            assert our_tensor(before[index], name).norm().item() == pytest.approx(norm, rel=1e-4, abs=1e-7), name
            clipped = our_tensor(after[index], name).norm().item()
            assert clipped == pytest.approx(min(norm, CLIP), rel=1e-4, abs=1e-7), name
            num_clipped += norm > CLIP
    assert num_clipped > 30  # the limit has an effect


@pytest.mark.parametrize("who", ["student", "teacher"])
def test_three_steps_of_the_trainer_give_the_authors_weights(run, who):
    """
    Within 1e-5, and 1e-6 for 99 %, except for the few elements with a gradient below AdamW's epsilon, 1e-8: there
    rounding errors become steps of a hundredth of the learning rate.
    """
    trainer, expected, _, after, _ = run
    state, prefix = trainer.model.state_dict(), "teacher." if who == "teacher" else ""
    start = official_model(trainer.args.preset).state_dict()
    errors, moves, noise = [], [], []
    for name, theirs in group(expected, f"final/{who}").items():
        ours = our_tensor(state, name, prefix).numpy()
        errors.append(np.abs(ours - theirs))
        moves.append(np.abs(theirs - our_tensor(start, name, prefix).numpy()))
        trained = all(part in after[0] for part in our_parts(name))
        gradient = our_tensor(after[0], name).abs().numpy() if trained else np.ones_like(ours)
        noise.append(gradient < 1e-8)
    errors, moves, noise = np.concatenate(errors), np.concatenate(moves), np.concatenate(noise)
    assert moves.max() > (1e-3 if who == "student" else 1e-6)
    assert noise.mean() < 3e-3
    assert errors[~noise].max() <= 1e-5
    assert errors.max() <= 1e-4
    assert (errors > 1e-5).sum() <= 3
    assert (errors <= 1e-6).mean() >= 0.99
