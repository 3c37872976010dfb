"""Uploads models to the Hub, and decides which files of a training run stay local."""

import json
import os
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from huggingface_hub import CommitOperationAdd, HfApi, get_token
from transformers.utils import CONFIG_NAME, FEATURE_EXTRACTOR_NAME

from ..configuration_asit import AUTO_MAP, HUB_FILES, sentence_transformers_files
from ..loading import load_config, load_feature_extractor, why_incomplete
from .cards import CARD_NAME, write_model_card

# Files of a Trainer's run folder that contain local paths or a token (both are in Trainer's pickled arguments), or
# that no user of the model needs, as patterns of a `.gitignore`. `hub_strategy="checkpoint"` still pushes the state of
# a checkpoint, from which training can be resumed.
PRIVATE_FILES = (
    "training_args.bin",
    "/trainer_state.json",
    "/bad_files.jsonl*",
    "/predictions.csv",
    "/events.tsv",
    "/epoch-*/",
    "/unfinished/",
)
# Also not uploaded with a model: state to resume from, logs (which name the host) and plots of the training audio.
_STATE_FILES = ("optimizer*", "scheduler.pt", "scaler.pt", "rng_state*", "runs", "events.out.tfevents*", "pictures")


def upload_model(folder: str | os.PathLike, name: str, private: bool = False) -> str:
    """
    Uploads the folder of a saved ASiT model in one commit, with the code and the `auto_map` that
    `trust_remote_code=True` needs and the files of sentence-transformers. The folder itself is not changed. The card's
    example loads the uploaded model.

    Args:
        folder: holds the model's configuration, weights and feature extractor; hidden files, `checkpoint-*` and
            `PRIVATE_FILES` are not uploaded.
        name: Hub name, `user/name`; the repository is created if it does not exist.
        private: whether a new repository is private.

    Returns:
        `str`: URL of the commit.

    Raises:
        FileNotFoundError: no complete model or no feature extractor in `folder`.
        ValueError: the model is not an ASiT, or there is no Hub token.
        OSError: the Hub refused the upload.
    """
    folder = Path(folder)
    if reason := why_incomplete(folder):
        raise FileNotFoundError(f"{folder}: expected a saved model, found {reason}")
    config = load_config(folder)
    load_feature_extractor(folder)
    if get_token() is None:
        raise ValueError("no Hub token found: run `hf auth login`, or set HF_TOKEN to a token with write access")
    paths = sorted(path for path in folder.rglob("*") if path.is_file() and not _is_private(path.relative_to(folder)))
    files = sentence_transformers_files(config.architectures)
    contents: dict[str, Any] = {name: content.encode() for name, content in files.items()}
    contents |= {path.relative_to(folder).as_posix(): path for path in paths}
    contents |= {code: Path(__file__).parents[1] / code for code in HUB_FILES}
    for settings in (CONFIG_NAME, FEATURE_EXTRACTOR_NAME):
        fields = json.loads((folder / settings).read_text(encoding="utf-8")) | {"auto_map": AUTO_MAP}
        contents[settings] = (json.dumps(fields, indent=2, sort_keys=True) + "\n").encode()
    if CARD_NAME in contents:
        card = (folder / CARD_NAME).read_text(encoding="utf-8")
        contents[CARD_NAME] = card.replace(f'"{folder.resolve().name}"', f'"{name}"').encode()
    api = HfApi()
    repository = api.create_repo(name, private=private, exist_ok=True).repo_id
    operations = [CommitOperationAdd(path, content) for path, content in contents.items()]
    return str(api.create_commit(repository, operations, commit_message="Upload model").commit_url)


def _is_private(path: Path) -> bool:
    patterns = [".*", "checkpoint-*", *_STATE_FILES, *(pattern.strip("/") for pattern in PRIVATE_FILES)]
    return any(fnmatchcase(part, pattern) for part in (path.parts[0], path.name) for pattern in patterns)


class PushMixin:
    """
    For a Trainer of an ASiT model: pushes its model card instead of Trainer's own, and writes a `.gitignore`, which
    the Hub respects, so that `PRIVATE_FILES` stay local.
    """

    def init_hf_repo(self, *args: Any, **kwargs: Any) -> None:
        super().init_hf_repo(*args, **kwargs)
        ignored = Path(self.args.output_dir, ".gitignore")
        if self.is_world_process_zero() and not ignored.exists():
            ignored.parent.mkdir(parents=True, exist_ok=True)
            ignored.write_text("\n".join(PRIVATE_FILES) + "\n")

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        if self.model.config.model_type != "asit":
            super().create_model_card(*args, **kwargs)
        elif self.is_world_process_zero() and not Path(self.args.output_dir, CARD_NAME).is_file():
            write_model_card(self.args.output_dir, name=self.args.hub_model_id)
