"""
Runs under torchrun for test_fsdp.py: `fsdp_processes.py MODE,MODE,... OUTPUT_DIR`. Writes what each run left as
`OUTPUT_DIR/MODE-RANK.pt`. Modes that start with "fsdp" shard the model by FSDP2, as Trainer and Accelerate do on GPUs;
the others, which have to come first, copy it to every process.
"""

import json
import os
import sys
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin
from torch.distributed.tensor import DTensor
from torch.utils.data import Dataset
from transformers import TrainerCallback, training_args
from two_processes import stack

from asit_hf import ASiTConfig, ASiTFeatureExtractor, ASiTForPreTraining
from asit_hf.pretraining import modeling
from asit_hf.pretraining.arguments import ASiTPreTrainingArguments
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
    """Accelerate chooses FSDP for accelerators only. After that choice all of it runs on a CPU, unchanged."""
    os.environ["ACCELERATE_TORCH_DEVICE"] = "cpu"
    PartialState._prepare_backend = lambda *args, **kwargs: ("gloo", DistributedType.MULTI_GPU)
    training_args.is_torch_bf16_gpu_available = lambda: True


class Waveforms(Dataset):
    """Noise, as crops of clips."""

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
    """Keeps some weights as they were before the run and after each step, and the weight decays of each step."""

    def __init__(self, trainer: ASiTPreTrainer):
        self.trainer = trainer
        self.weights = {"prototypes": [], "student": [], "teacher": []}
        self.weight_decays = []

    def on_train_begin(self, args, state, control, **kwargs):
        self.look()

    def on_step_end(self, args, state, control, **kwargs):
        self.look()
        self.weight_decays.append([group["weight_decay"] for group in self.trainer.optimizer.param_groups])

    def look(self) -> None:
        student, teacher = self.trainer.model.heads.distillation, self.trainer.model.teacher["heads"].distillation
        self.weights["prototypes"].append(full(student.cls_prototypes.weight_v))
        self.weights["student"].append(full(student.fc1.weight))
        self.weights["teacher"].append(full(teacher.fc1.weight))


class Trainer(ASiTPreTrainer):
    """Keeps the dtypes of what the losses are computed from and come out as."""

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
    torch.manual_seed(0)
    model = ASiTForPreTraining(
        ASiTConfig(
            hidden_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            intermediate_size=64,
            num_mel_bins=32,
            num_frames=48,
            distillation_hidden_size=32,
            distillation_bottleneck_size=16,
            num_prototypes=24,
            drop_path_rate=0.1,
        )
    )
    if kind == "compiled":
        for layer in (*model.asit.layers, *model.teacher["asit"].layers):
            layer.compile(fullgraph=True, dynamic=False, backend="eager")
    args = ASiTPreTrainingArguments(
        output_dir=str(Path(output) / mode.replace("resumed", "whole")),
        per_device_train_batch_size=GLOBAL_BATCH // WORLD // passes,
        gradient_accumulation_steps=passes,
        num_train_epochs=2,
        warmup_epochs=0,
        learning_rate=1e-3,
        use_cpu=not sharded,
        report_to="none",
        save_strategy="steps" if kind in ("whole", "resumed") else "no",
        save_steps=4,
        logging_steps=1,
        plot_steps=0,
        disable_tqdm=True,
        train_sampling_strategy="sequential",
        ddp_backend=None if sharded else "gloo",
        bf16=kind == "bf16",
        fsdp=sharded,
        **({"fsdp_config": str(RECIPE) if sharded and kind != "default" else None} | arguments),
    )
    return Trainer(
        model,
        args,
        processing_class=ASiTFeatureExtractor(num_mel_bins=32),
        train_dataset=Waveforms(),
        data_collator=spoil if kind == "spoiled" else stack,
    )


def describe(plugin: FullyShardedDataParallelPlugin) -> dict[str, Any]:
    return {
        "version": plugin.fsdp_version,
        "classes": list(plugin.transformer_cls_names_to_wrap),
        "reshard": plugin.reshard_after_forward,
        "state_dict": plugin.state_dict_type.name,
        "offload": type(plugin.cpu_offload).__name__,
    }


def train(mode: str, output: str) -> dict[str, Any]:
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
    return {
        "state": {name: full(value) for name, value in trainer.model.state_dict().items()},
        "local_size": sum(getattr(value, "_local_tensor", value).numel() for value in trainer.model.parameters()),
        "weights": watch.weights,
        "weight_decays": watch.weight_decays,
        "groups": [(group["decays"], len(group["params"])) for group in trainer.optimizer.param_groups],
        "dtypes": sorted(Trainer.dtypes),
        "sharded": sorted(name.removeprefix("FSDP") for name in names if name.startswith("FSDP")),
        "plugin": plugin and describe(plugin),
        "steps": trainer.state.global_step,
        "skipped": trainer.num_skipped_steps,
        "logs": json.dumps([row for row in trainer.state.log_history if "loss" in row]),
    }


def refuse(mode: str, output: str) -> dict[str, str]:
    """What is said of each configuration that does not work."""
    said = {}
    for name, arguments in REFUSED.items():
        try:
            build(mode, output, **arguments)
        except ValueError as error:
            said[name] = str(error)
    return said


if __name__ == "__main__":
    for mode in sys.argv[1].split(","):
        result = (refuse if mode.endswith("refused") else train)(mode, sys.argv[2])
        torch.save(result, Path(sys.argv[2]) / f"{mode}-{RANK}.pt")
