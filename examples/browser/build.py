"""
Write a static web page that classifies sounds inside the browser: `python examples/browser/build.py MODEL OUT`.

OUT holds all that the page loads: the page itself, the model as ONNX with 8-bit weights, and ONNX Runtime for the web,
which npm provides. Any server of files can serve it.
"""

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from asit_hf.utils.files import whole_folder

HERE = Path(__file__).parent
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

A page that classifies sounds inside the browser. It runs [ONNX Runtime](https://onnxruntime.ai) ({version}, MIT license).
"""


def install_runtime() -> Path:
    """Installs the pinned runtime beside this file, unless it is there, and returns its folder."""
    version = json.loads((HERE / "package.json").read_text())["dependencies"][RUNTIME]
    package = HERE / "node_modules" / RUNTIME
    installed = package / "package.json"
    if not installed.is_file() or json.loads(installed.read_text())["version"] != version:
        if (npm := shutil.which("npm")) is None:
            raise FileNotFoundError(f"expected npm on the PATH, to install {RUNTIME} {version}, got none: install Node.js")
        command = [npm, "install", "--ignore-scripts", "--no-package-lock", "--no-audit", "--no-fund"]
        subprocess.run(command, cwd=HERE, check=True, stdout=subprocess.DEVNULL)
    return package


def write_page(model: Path, out: Path) -> None:
    """Writes the page for an exported model, a folder with `config.json` and one of `GRAPHS`, to the folder `out`."""
    graph = next((graph for graph in GRAPHS if (model / graph).is_file()), None)
    if graph is None:
        raise FileNotFoundError(f"{model}: expected {' or '.join(GRAPHS)}, got neither")
    runtime = install_runtime()
    with whole_folder(out) as folder:
        copies = {folder / path.name: path for pattern in PAGE_FILES for path in HERE.glob(pattern)}
        copies |= {folder / "runtime" / name: runtime / "dist" / name for name in RUNTIME_FILES}
        copies |= {folder / "model" / name: model / name for name in (*MODEL_FILES, graph)}
        for target, source in copies.items():
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source, target)
        version = json.loads((runtime / "package.json").read_text())["version"]
        (folder / "README.md").write_text(CARD.format(version=f"{RUNTIME} {version}"), encoding="utf-8")


def describe_sizes(out: Path) -> str:
    def megabytes(folder: Path) -> float:
        return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) / 1e6

    total, runtime, model = (megabytes(out / part) for part in ("", "runtime", "model"))
    return f"{total:.1f} MB: runtime {runtime:.1f} MB, model {model:.1f} MB, page {total - runtime - model:.2f} MB"


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="classifier: a folder, a name on the Hub, or a folder with an exported ONNX file")
    parser.add_argument("out", type=Path, help="folder to write")
    parser.add_argument("--overwrite", action="store_true", help="replace any content of the folder")
    args = parser.parse_args(arguments)
    try:
        is_page = (args.out / "runtime" / RUNTIME_FILES[0]).is_file()
        if args.out.exists() and not (args.overwrite or is_page) and any(args.out.iterdir()):
            raise FileExistsError(f"{args.out} is neither empty nor an earlier page: --overwrite replaces it")
        with tempfile.TemporaryDirectory() as scratch:
            exported = Path(args.model)
            if not any((exported / graph).is_file() for graph in GRAPHS):
                exported = Path(scratch) / "model"
                export = [sys.executable, "-m", "asit_hf.hub", "export", args.model, str(exported), "--onnx", "--int8"]
                subprocess.run(export, check=True, stdout=subprocess.DEVNULL)
            write_page(exported, args.out.resolve())
    except (OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except subprocess.CalledProcessError as error:
        return error.returncode
    print(f"{args.out}: {describe_sizes(args.out)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
