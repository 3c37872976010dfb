"""
Write a static web page that classifies sounds inside the browser: `python examples/browser/build.py MODEL OUT`.

OUT holds all that the page loads: the page itself, the model as ONNX with 8-bit weights, and ONNX Runtime for the web,
which npm provides. Any server of files can serve it.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

from asit_hf import ASiTForAudioClassification
from asit_hf.hub.export import check_replaceable, export_model
from asit_hf.loading import load_config, resolve_checkpoint
from asit_hf.utils.files import whole_folder

HERE = Path(__file__).parent
DOWNLOADS = HERE.parents[1] / "build"
PAGE_FILES = ("*.html", "*.css", "*.svg", "*.js")
RUNTIME = "onnxruntime-web"
RUNTIME_FILES = ("ort.wasm.bundle.min.mjs", "ort-wasm-simd-threaded.wasm")
MODEL_FILES = ("config.json", "preprocessor_config.json")
GRAPHS = ("onnx/waveform_int8.onnx", "onnx/waveform.onnx")
# the settings of a static Space; with these headers, browsers let the model use several threads
CARD = """---
title: What is this sound?
emoji: 🔊
colorFrom: indigo
colorTo: yellow
sdk: static
app_file: index.html
custom_headers:
  cross-origin-embedder-policy: require-corp
  cross-origin-opener-policy: same-origin
---

A page that classifies sounds inside the browser, with [ONNX Runtime](https://onnxruntime.ai) ({runtime}, MIT license).
"""


def build(model: str | os.PathLike, out: Path, overwrite: bool = False) -> None:
    """Writes the page for any checkpoint of a clip classifier to the folder `out`, and exports the model if needed."""
    is_page = (out / "runtime" / RUNTIME_FILES[0]).is_file()
    check_replaceable(out, Path(resolve_checkpoint(model)).resolve(), overwrite or is_page)
    if (architectures := load_config(model).architectures) != [ASiTForAudioClassification.__name__]:
        raise ValueError(f"{model}: expected an {ASiTForAudioClassification.__name__}, got {architectures}")
    runtime = download_runtime()
    with tempfile.TemporaryDirectory() as scratch:
        if not any((Path(model) / graph).is_file() for graph in GRAPHS):
            model = export_model(model, Path(scratch) / "model", onnx=True, int8=True)
        write_page(Path(model), runtime, out)


def download_runtime() -> Path:
    """The folder of the runtime's files, downloaded by npm in the version that `package.json` pins, once."""
    version = json.loads((HERE / "package.json").read_text())["dependencies"][RUNTIME]
    runtime = DOWNLOADS / f"{RUNTIME}-{version}"
    if all((runtime / name).is_file() for name in RUNTIME_FILES):
        return runtime
    if (npm := shutil.which("npm")) is None:
        raise FileNotFoundError(f"expected npm on the PATH to download {RUNTIME} {version}: install Node.js")
    with tempfile.TemporaryDirectory() as scratch:
        command = [npm, "pack", f"{RUNTIME}@{version}", "--pack-destination", scratch]
        result = subprocess.run(command, cwd=scratch, capture_output=True, text=True)
        if result.returncode != 0:
            raise OSError(f"npm could not download {RUNTIME} {version}: {result.stderr.strip()}")
        (package,) = Path(scratch).glob("*.tgz")
        with tarfile.open(package) as archive, whole_folder(runtime) as folder:
            folder.mkdir()
            for name in RUNTIME_FILES:
                (folder / name).write_bytes(archive.extractfile(f"package/dist/{name}").read())
    return runtime


def write_page(model: Path, runtime: Path, out: Path) -> None:
    """Writes the page for an exported model, a folder with one of `GRAPHS`, to the folder `out`."""
    graph = next(graph for graph in GRAPHS if (model / graph).is_file())
    with whole_folder(out) as folder:
        copies = {path.name: path for pattern in PAGE_FILES for path in HERE.glob(pattern)}
        copies |= {f"runtime/{name}": runtime / name for name in RUNTIME_FILES}
        copies |= {f"model/{name}": model / name for name in MODEL_FILES}
        copies["model/waveform.onnx"] = model / graph  # one name, so that no copy of an earlier build is kept offline
        for name, source in copies.items():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source, folder / name)
        (folder / "README.md").write_text(CARD.format(runtime=runtime.name), encoding="utf-8")


def describe_sizes(out: Path) -> str:
    def megabytes(folder: Path) -> float:
        return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) / 1e6

    total, runtime, model = (megabytes(out / part) for part in ("", "runtime", "model"))
    return f"{total:.1f} MB: runtime {runtime:.1f} MB, model {model:.1f} MB, page {total - runtime - model:.2f} MB"


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "model", help="classifier: checkpoint, Trainer run folder or Hub name; exported, unless it has ONNX files"
    )
    parser.add_argument("out", type=Path, help="folder to write; an earlier page there is replaced")
    parser.add_argument("--overwrite", action="store_true", help="replace any content of out")
    args = parser.parse_args(arguments)
    try:
        build(args.model, args.out.resolve(), args.overwrite)
    except (ImportError, OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(f"{args.out}: {describe_sizes(args.out)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
