"""Prepares ASiT models for sharing, and uploads them to the Hub: `python -m asit_hf.hub`."""

import argparse
import sys
from pathlib import Path

from huggingface_hub.utils import httpx

from ..loading import ENCODERS
from .export import export_model, halve_weights
from .onnx import ONNX_FOLDER, summarize
from .upload import upload_model


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m asit_hf.hub", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    export = commands.add_parser("export", help="write the model of any checkpoint; of a pretraining run, its encoder")
    export.add_argument("model", help="checkpoint, Trainer run folder or Hub name")
    export.add_argument("output_dir", type=Path, help="folder to write; with --onnx, also the model's own folder")
    export.add_argument(
        "--encoder",
        choices=ENCODERS,
        default="teacher",
        help="which encoder of a pretraining run (default: %(default)s)",
    )
    export.add_argument("--half", action="store_true", help="store the weights in 16 bits")
    export.add_argument(
        "--max_shard_size", default="50GB", help="size of the largest weight file, such as 16MB (default: %(default)s)"
    )
    export.add_argument("--onnx", action="store_true", help="also write ONNX files, to output_dir/onnx")
    export.add_argument("--int8", action="store_true", help="with --onnx: also write files with weights in 8 bits")
    export.add_argument("--overwrite", action="store_true", help="replace any content of output_dir")
    halve = commands.add_parser("halve", help="store the weights of any saved model in 16 bits")
    halve.add_argument("folder", type=Path, help="saved model, changed in place")
    upload = commands.add_parser("upload", help="upload a saved model, with the code that trust_remote_code needs")
    upload.add_argument("folder", type=Path, help="saved model, not changed")
    upload.add_argument("name", help="Hub name, user/name")
    upload.add_argument("--private", action="store_true", help="make a new repository private")
    args = parser.parse_args(arguments)
    try:
        if args.command == "export":
            names = ("encoder", "overwrite", "half", "max_shard_size", "onnx", "int8")
            folder = export_model(args.model, args.output_dir, **{name: getattr(args, name) for name in names})
            print("\n".join([str(folder), *(summarize(folder / ONNX_FOLDER) if args.onnx else ())]))
        elif args.command == "halve":
            halve_weights(args.folder)
            print(args.folder.resolve())
        else:
            print(upload_model(args.folder, args.name, args.private))
    except (ImportError, OSError, ValueError, httpx.HTTPError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
