"""
Runs under torchrun for test_fsdp.py: `fsdp_processes.py MODE,MODE,... OUTPUT_DIR`; results in
`OUTPUT_DIR/MODE-RANK.pt`. Modes that start with "fsdp" shard the model with FSDP2, as Trainer and Accelerate do on
GPUs; the others, which must come first, use DDP.
"""

import json
import os
import sys
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin
from tiny_pretraining import make_model, make_trainer, save_result, stack
from torch.distributed.tensor import DTensor
from torch.utils.data import Dataset
from transformers import TrainerCallback, training_args

from asit_hf.pretraining import modeling
from asit_hf.pretraining.monitoring import KnnProbeCallback
from asit_hf.pretraining.trainer import ASiTPreTrainer

RANK, WORLD = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
RECIPE = Path(__file__).parents[2] / "examples" / "recipes" / "fsdp.json"
GLOBAL_BATCH, STEPS_PER_EPOCH = 4, 3
RECIPE_FIELDS = json.loads(RECIPE.read_text())
REFUSED = {
    "version": {
        "fsdp_config": RECIPE_FIELDS
        | {"version": 1, "reshard_after_forward": "full_shard", "sync_module_states": False}
    },
    "state_dict_type": {"fsdp_config": RECIPE_FIELDS | {"state_dict_type": "SHARDED_STATE_DICT"}},
    "cpu_ram_efficient_loading": {"fsdp_config": RECIPE_FIELDS | {"cpu_ram_efficient_loading": True}},
    "fp16": {"fp16": True},
}


def use_fsdp_on_cpu() -> None:
    """Makes Accelerate choose FSDP without an accelerator; everything after that choice runs unchanged on a CPU."""
    os.environ["ACCELERATE_TORCH_DEVICE"] = "cpu"
    PartialState._prepare_backend = lambda *args, **kwargs: ("gloo", DistributedType.MULTI_GPU)
    training_args.is_torch_bf16_gpu_available = lambda: True


class Waveforms(Dataset):
    """Crops of noise."""

    def __init__(self, count: int = GLOBAL_BATCH * STEPS_PER_EPOCH):
        generator = torch.Generator().manual_seed(0)
        self.items = {
            "global_waveforms": torch.rand(count, 2, 8000, generator=generator) - 0.5,
            "local_waveforms": torch.rand(count, 1, 4000, generator=generator) - 0.5,
            "sample_keys": torch.arange(count),
        }

    def __len__(self) -> int:
        return len(self.items["sample_keys"])

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {name: value[index] for name, value in self.items.items()}


class Labelled(Dataset):
    """Clips for the kNN probe."""

    labels = [0, 1] * 4

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> dict:
        generator = torch.Generator().manual_seed(index)
        return {"waveform": torch.rand(8000, generator=generator).numpy() - 0.5, "label": self.labels[index]}


def spoil(items: list[dict]) -> dict:
    batch = stack(items)
    spoil.count += 1
    if spoil.count == 2 and RANK == 0:
        batch["global_waveforms"][0, 0, 10] = float("nan")
    return batch


spoil.count = 0


def full(tensor: torch.Tensor) -> torch.Tensor:
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach().clone()


class Watch(TrainerCallback):
    """Records some weights before the run and after each step, and the weight decays of each step."""

    def __init__(self, trainer: ASiTPreTrainer):
        self.trainer = trainer
        self.weights = {"prototypes": [], "student": [], "teacher": []}
        self.weight_decays = []

    def on_train_begin(self, args, state, control, **kwargs):
        self.record()

    def on_step_end(self, args, state, control, **kwargs):
        self.record()
        self.weight_decays.append([group["weight_decay"] for group in self.trainer.optimizer.param_groups])

    def record(self) -> None:
        student, teacher = self.trainer.model.heads.distillation, self.trainer.model.teacher["heads"].distillation
        self.weights["prototypes"].append(full(student.cls_prototypes.weight_v))
        self.weights["student"].append(full(student.fc1.weight))
        self.weights["teacher"].append(full(teacher.fc1.weight))


class Trainer(ASiTPreTrainer):
    """Records the dtypes of the reconstruction target and of the loss."""

    dtypes: set[str] = set()

    def compute_loss(self, *args, **kwargs):
        loss = super().compute_loss(*args, **kwargs)
        self.dtypes.add(f"loss {loss.dtype}")
        return loss


def watch_target(reconstruction_loss):
    def watched(reconstruction, target, *args):
        Trainer.dtypes.add(f"target {target.dtype}")
        return reconstruction_loss(reconstruction, target, *args)

    return watched


modeling.reconstruction_loss = watch_target(modeling.reconstruction_loss)


def build(mode: str, output: str, **arguments: Any) -> Trainer:
    sharded, kind = mode.startswith("fsdp"), mode.split("_")[1]
    if sharded:
        use_fsdp_on_cpu()
    passes = 2 if kind == "accumulated" else 1
    model = make_model()
    if kind == "compiled":
        for layer in (*model.asit.layers, *model.teacher["asit"].layers):
            layer.compile(fullgraph=True, dynamic=False, backend="eager")
    return make_trainer(
        Waveforms(),
        Path(output) / mode.replace("resumed", "whole"),
        model,
        cls=Trainer,
        data_collator=spoil if kind == "spoiled" else stack,
        per_device_train_batch_size=GLOBAL_BATCH // WORLD // passes,
        gradient_accumulation_steps=passes,
        warmup_epochs=0,
        use_cpu=not sharded,
        save_strategy="steps" if kind in ("whole", "resumed") else "no",
        save_steps=4,
        train_sampling_strategy="sequential",
        ddp_backend=None if sharded else "gloo",
        bf16=kind == "bf16",
        fsdp=sharded,
        **({"fsdp_config": str(RECIPE) if sharded and kind != "default" else None} | arguments),
    )


def describe(plugin: FullyShardedDataParallelPlugin) -> dict[str, Any]:
    return {
        "version": plugin.fsdp_version,
        "classes": list(plugin.transformer_cls_names_to_wrap),
        "reshard": plugin.reshard_after_forward,
        "state_dict": plugin.state_dict_type.name,
        "offload": type(plugin.cpu_offload).__name__,
    }


def train(mode: str, output: str) -> None:
    Trainer.dtypes, spoil.count = set(), 0
    trainer = build(mode, output)
    watch = Watch(trainer)
    trainer.add_callback(watch)
    if mode.endswith("probed"):
        trainer.add_callback(KnnProbeCallback(trainer, Labelled(), Labelled(), every_steps=2))
    checkpoint = Path(trainer.args.output_dir) / "checkpoint-4"
    trainer.train(resume_from_checkpoint=str(checkpoint) if mode.endswith("resumed") else None)
    plugin = getattr(trainer.accelerator.state, "fsdp_plugin", None)
    names = {type(module).__name__ for module in trainer.model.modules()}
    save_result(
        trainer,
        output,
        mode,
        RANK,
        state={name: full(value) for name, value in trainer.model.state_dict().items()},
        local_size=sum(getattr(value, "_local_tensor", value).numel() for value in trainer.model.parameters()),
        weights=watch.weights,
        weight_decays=watch.weight_decays,
        groups=[(group["decays"], len(group["params"])) for group in trainer.optimizer.param_groups],
        dtypes=sorted(Trainer.dtypes),
        sharded=sorted(name.removeprefix("FSDP") for name in names if name.startswith("FSDP")),
        plugin=plugin and describe(plugin),
    )


def refuse(mode: str, output: str) -> None:
    """Saves the errors of configurations that do not work."""
    errors = {}
    for name, arguments in REFUSED.items():
        try:
            build(mode, output, **arguments)
        except ValueError as error:
            errors[name] = str(error)
    torch.save(errors, Path(output) / f"{mode}-{RANK}.pt")


if __name__ == "__main__":
    for mode in sys.argv[1].split(","):
        (refuse if mode.endswith("refused") else train)(mode, sys.argv[2])
