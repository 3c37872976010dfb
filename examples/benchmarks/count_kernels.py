"""
Count the CUDA kernels that a pretraining step would launch, on a machine without a GPU.

    python examples/benchmarks/count_kernels.py --size small --batch 128

Host and device work in parallel, so a step takes at least the time of its kernel launches (about 5 us each), of its
memory traffic, and of its arithmetic. Counts are for eager execution, without `--compile_layers`. Needs g++. To count
another version of the package, set `PYTHONPATH` to it.
"""

import argparse
import json
import os
import shlex
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from common import RESULTS
from fake_cuda import KernelCounter, build, fake_cuda, to_fake_cuda
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException
from torch.utils.flop_counter import FlopCounterMode
from transformers.initialization import no_init_weights

from asit_hf import ASiTConfig, ASiTFeatureExtractor, ASiTForPreTraining
from asit_hf.pretraining import masking
from asit_hf.pretraining.gradients import clip_tensor_norms
from asit_hf.pretraining.presets import get_preset

RATE = 16000
GLOBAL_SECONDS, LOCAL_SECONDS = 6.0, 2.0
COUNTED = ("kernels", "gigabytes", "host_copies")


def count_step(size: str, batch: int, preset: str = "2024", repeats: int = 2) -> dict:
    """
    Kernels, bytes and host copies of each part of a step in bf16, counted in the last of `repeats` steps, and the
    operations of the step. A part that waits for the device cannot be counted; it has the reason under "error".
    """
    chosen = get_preset(preset)
    with no_init_weights():
        model = ASiTForPreTraining(ASiTConfig.from_size(size, **chosen.config, drop_path_rate=0.1))
    extractor = ASiTFeatureExtractor()
    frames, gmml = model.config.num_frames, chosen.gmml
    # constants that are computed once and cached need real tensors
    extractor.extract(torch.randn(1, RATE))
    masking.rounds_for(frames, model.config.num_mel_bins, max(gmml.mask_ratio[1], gmml.replace_ratio), gmml)
    with fake_cuda():
        to_fake_cuda(model).train()
        for _ in range(repeats):
            parts, flops = _step(model, extractor, chosen, batch, frames)
    return {"size": size, "batch": batch, "preset": preset, "tera_operations": flops / 1e12, "parts": parts}


def _step(model, extractor, chosen, batch: int, frames: int) -> tuple[dict[str, dict], int]:
    parts: dict[str, dict] = {}

    def count(name: str, call):
        with KernelCounter() as counter:
            try:
                result = call()
            except (DataDependentOutputException, DynamicOutputShapeException) as error:
                parts[name] = {"error": f"the host waits: {error}"}
                return None
        parts[name] = {
            "kernels": counter.kernels.total(),
            "gigabytes": counter.bytes / 1e9,
            "host_copies": len(counter.host_copies),
            "top": counter.kernels.most_common(12),
        }
        return result

    def waveforms(crops: int, seconds: float) -> tuple[torch.Tensor, torch.Tensor]:
        samples = int(seconds * RATE)
        return torch.randn(batch, crops, samples, device="cuda"), torch.full((batch, crops), samples, device="cuda")

    keys = torch.randint(2**62, (batch,), device="cuda")
    inputs = {"global": waveforms(2, GLOBAL_SECONDS)}
    if chosen.num_local_crops:
        inputs["local"] = waveforms(chosen.num_local_crops, LOCAL_SECONDS)
    spectrograms = count("log-mel", lambda: [extractor.extract(*crops) for crops in inputs.values()])
    clean = spectrograms[0][:, :, :frames]
    corrupted = count("masks", lambda: masking.corrupt(clean, keys, 0, chosen.gmml))
    corrupted = corrupted or (clean + 1, clean > 0)
    views = {"input_values": clean, "corrupted_values": corrupted[0], "corruption_mask": corrupted[1]}
    views["local_values"] = spectrograms[1] if len(spectrograms) > 1 else None
    with FlopCounterMode(display=False) as counter:
        with torch.autocast("cuda", dtype=torch.bfloat16):
            output = count("forward", lambda: model(**views, drop_path_keys=keys))
        count("backward", output.loss.backward)
    count("clipping", lambda: clip_tensor_norms(model, 3.0))
    count("centers and teacher", lambda: (model.update_centers(), model.update_teacher(0.99)))
    model.zero_grad()
    return parts, counter.get_total_flops()


def main(arguments: list[str] | None = None) -> dict:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", default="small", choices=("tiny", "small", "base"), help="model size")
    parser.add_argument("--batch", type=int, default=128, help="clips per step")
    parser.add_argument("--preset", default="2024", choices=("2024", "2023"), help="pretraining objective")
    parser.add_argument("--name", help="store the counts in results/kernels.json under this name")
    args = parser.parse_args(arguments)
    if "LD_PRELOAD" not in os.environ:  # restart with the libraries loaded
        with tempfile.TemporaryDirectory() as folder:
            environment = {**os.environ, "LD_PRELOAD": build(Path(folder))}
            command = [sys.executable, __file__, *(sys.argv[1:] if arguments is None else arguments)]
            sys.exit(subprocess.run(command, env=environment).returncode)
    counts = count_step(args.size, args.batch, args.preset)
    print(to_markdown({args.name or "this version": counts}))
    if args.name:
        path = RESULTS / "kernels.json"
        kept = json.loads(path.read_text()) if path.exists() else {}
        kept[args.name] = {**counts, "command": shlex.join(["count_kernels.py", *sys.argv[1:]])}
        path.write_text(json.dumps(kept, indent=2) + "\n")
        (RESULTS / "kernels.md").write_text(to_markdown(kept))
    return counts


def to_markdown(kept: dict[str, dict]) -> str:
    """A table with a row for each version and part of the step."""
    lines = [
        "# Kernels of a pretraining step",
        "",
        "Counted on fake CUDA tensors, in bf16, without compiled layers (`examples/benchmarks/count_kernels.py`); no",
        "time was measured. Gigabytes are the least that the kernels read and write; copies are from the host.",
        "",
        "| version | step | part | kernels | gigabytes | copies |",
        "|---|---|---|---|---|---|",
    ]
    for name, counts in kept.items():
        step = f"{counts['size']}, batch {counts['batch']}, {counts['preset']}"
        rows = [(part, found) for part, found in counts["parts"].items() if "error" not in found]
        for part, found in counts["parts"].items():
            if "error" in found:
                lines.append(f"| {name} | {step} | {part} | {found['error']} | | |")
            else:
                lines.append(f"| {name} | {step} | {part} | {_cells(found)} |")
        without = {key: sum(found[key] for part, found in rows if part != "masks") for key in COUNTED}
        lines.append(f"| {name} | {step} | **all but the masks** | {_cells(without)} |")
    return "\n".join([*lines, ""])


def _cells(found: dict) -> str:
    return f"{found['kernels']} | {found['gigabytes']:.1f} | {found['host_copies']}"


if __name__ == "__main__":
    main()
