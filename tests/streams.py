"""
Streams of shards and a small trainer for them. Under torchrun, `streams.py FOLDER` trains on `FOLDER/source` for
test_streaming.py, uninterrupted and resumed, and saves the clips that each process used and its weights.
"""

import sys
from pathlib import Path

import torch

from asit_hf import ASiTConfig, ASiTFeatureExtractor, ASiTForPreTraining
from asit_hf.data import StreamingCrops, load_unlabelled
from asit_hf.pretraining.arguments import ASiTPreTrainingArguments
from asit_hf.pretraining.trainer import ASiTPreTrainer

RATE = 8000
SHORT = {"global_seconds": 0.2, "local_seconds": 0.1, "num_local_crops": 2}


def clip_of(waveform: torch.Tensor) -> int:
    return round(float(waveform.flatten()[0]) * 2**6) - 1


def stream_of(folder: Path, shuffle: bool = True, **kwargs) -> StreamingCrops:
    dataset = load_unlabelled(str(folder), streaming=True)
    if shuffle:
        dataset = dataset.shuffle(seed=3, buffer_size=6)
    return StreamingCrops(dataset, RATE, **SHORT, **kwargs)


def make_trainer(stream: StreamingCrops, output_dir: Path, seed: int = 0, **kwargs) -> ASiTPreTrainer:
    torch.manual_seed(seed)
    config = ASiTConfig(
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=16,
        num_mel_bins=16,
        num_frames=16,
        distillation_hidden_size=8,
        distillation_bottleneck_size=8,
        num_prototypes=16,
        drop_path_rate=0.1,
    )
    defaults = {
        "per_device_train_batch_size": 2,
        "max_steps": 16,
        "steps_per_epoch": 5,
        "warmup_epochs": 1,
        "learning_rate": 1e-3,
        "save_steps": 13,
        "plot_steps": 0,
        "logging_steps": 1,
        "report_to": "none",
        "use_cpu": True,
        "disable_tqdm": True,
    }
    args = ASiTPreTrainingArguments(output_dir=str(output_dir), **{**defaults, **kwargs})
    extractor = ASiTFeatureExtractor(num_mel_bins=16, sampling_rate=RATE)
    return ASiTPreTrainer(ASiTForPreTraining(config), args, extractor, train_dataset=stream)


def train(folder: Path, name: str, checkpoint: str | None = None) -> None:
    stream = stream_of(folder / "source")
    trainer = make_trainer(stream, folder / name, dataloader_num_workers=2, ddp_backend="gloo")
    clips, prepare = [], trainer.prepare_views

    def record(inputs):
        clips.extend(map(clip_of, inputs["global_waveforms"]))
        return prepare(inputs)

    trainer.prepare_views = record
    trainer.train(resume_from_checkpoint=checkpoint)
    state = {"clips": clips, "weights": trainer.model.state_dict()}
    torch.save(state, folder / f"{name}-{trainer.args.process_index}.pt")


if __name__ == "__main__":
    train(Path(sys.argv[1]), "whole")
    train(Path(sys.argv[1]), "resumed", str(Path(sys.argv[1], "whole", "checkpoint-13")))
