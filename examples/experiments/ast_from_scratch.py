r"""
Baseline: trains transformers' ASTForAudioClassification from random weights with the data, augmentation and options
of examples/run_audio_classification.py. `--model_name_or_path` is the ASiT whose width, depth and heads it copies;
`--max_seconds` is the length of its input, as AST has positions for one length only.

    python -m examples.experiments.ast_from_scratch --model_name_or_path CHECKPOINT --train_data train.csv \
        --eval_data test.csv --max_seconds 1 --output_dir runs/ast
"""

import sys
from collections.abc import Sequence
from typing import Any

from transformers import ASTConfig, ASTForAudioClassification

from asit_hf import ASiTFeatureExtractor
from asit_hf.loading import load_config
from asit_hf.utils.arguments import run_script
from examples import run_audio_classification as finetuning


class OneLength(ASiTFeatureExtractor):
    """The same log-mel as AST's own extractor computes, always padded or cut to `num_frames`."""

    def __init__(self, num_frames: int = 1024, **kwargs: Any):
        super().__init__(**kwargs)
        self.num_frames = num_frames

    def __call__(self, raw_speech: Any, padding: Any = None, **kwargs: Any) -> Any:
        fixed = {"padding": "max_length", "truncation": True, "num_frames": self.num_frames}
        return super().__call__(raw_speech, **{**kwargs, **fixed, "return_attention_mask": False})


def build_ast(
    args: finetuning.ModelArguments, inputs: finetuning.InputArguments, problem_type: str, names: Sequence[str]
) -> tuple[ASTForAudioClassification, OneLength]:
    if not args.model_name_or_path or not inputs.max_seconds:
        raise ValueError("expected --model_name_or_path, for the size, and --max_seconds, for the input length")
    like = load_config(args.model_name_or_path)
    extractor = OneLength.from_pretrained(args.model_name_or_path)
    extractor.num_frames = (
        round(inputs.max_seconds * 100) - 2
    )  # from_pretrained drops options that are not in the file
    sizes = ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "num_mel_bins")
    config = ASTConfig(
        **{name: getattr(like, name) for name in sizes},
        max_length=extractor.num_frames,
        problem_type=problem_type,
        id2label=dict(enumerate(names)),
        label2id={name: index for index, name in enumerate(names)},
    )
    return ASTForAudioClassification(config), extractor


def main(arguments: list[str] | None = None) -> dict[str, float]:
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    return finetuning.main(arguments, build=build_ast)


if __name__ == "__main__":
    run_script(main)
