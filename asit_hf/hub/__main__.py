"""Sharing ASiT models: `python -m asit_hf.hub`."""

import argparse
import sys
from pathlib import Path

from .export import export_encoder, halve_weights


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m asit_hf.hub", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    export = commands.add_parser("export", help="write the encoder of a pretraining checkpoint as a plain ASiTModel")
    export.add_argument("pretraining_dir", type=Path, help="a checkpoint, or a Trainer's run folder")
    export.add_argument("output_dir", type=Path)
    export.add_argument("--source", choices=["teacher", "student"], default="teacher")
    export.add_argument("--overwrite", action="store_true", help="replace whatever output_dir holds")
    export.add_argument("--half", action="store_true", help="store the weights in 16 bits")
    halve = commands.add_parser("halve", help="store the weights of any saved model in 16 bits")
    halve.add_argument("output_dir", type=Path, metavar="folder")
    args = parser.parse_args(arguments)
    try:
        if args.command == "halve":
            halve_weights(args.output_dir)
        else:
            export_encoder(args.pretraining_dir, args.output_dir, args.source, args.overwrite, args.half)
    except (OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(args.output_dir.resolve())
    return 0


if __name__ == "__main__":
    sys.exit(main())
