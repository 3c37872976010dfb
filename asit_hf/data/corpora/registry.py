"""The corpora by name."""

import logging
import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

from .audioset import _AUDIOSET_PARTS, load_audioset
from .esc50 import load_esc50
from .files import _SPLITS
from .speech_commands import load_speech_commands
from .voxceleb1 import load_voxceleb1

if TYPE_CHECKING:
    from datasets import Dataset

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Corpus:
    """How a data set is read, and the splits it has: `load(root, split)`, or `load(root)` where it has folds."""

    load: Callable[..., "Dataset"]
    splits: tuple[str, ...] = ()


CORPORA = {
    **{
        name: Corpus(lambda root, split, parts=parts: load_audioset(root, parts[split]), tuple(parts))
        for name, parts in _AUDIOSET_PARTS.items()
    },
    "esc50": Corpus(load_esc50),
    **{
        f"speech-commands-v{version}{f'-{classes}' if classes else ''}": Corpus(
            partial(load_speech_commands, version=version, num_classes=classes), _SPLITS
        )
        for version in (1, 2)
        for classes in (None, 12, 11)
    },
    "voxceleb1": Corpus(load_voxceleb1, _SPLITS),
}


def load_corpus(name: str, root: str | os.PathLike, split: str | None = None) -> "Dataset":
    """A data set of `CORPORA` by name; its class names are all that it has, whatever the split holds.

    Raises:
        ValueError: no such corpus or split.
        FileNotFoundError: a piece is missing; the message names it and where it is published.
    """
    if name not in CORPORA:
        raise ValueError(f"expected a corpus among {', '.join(CORPORA)}, got {name!r}")
    corpus = CORPORA[name]
    if not corpus.splits:
        if split is not None:
            raise ValueError(f"{name} has folds, not splits: filter by its column fold; got split {split!r}")
        return corpus.load(root)
    if split not in corpus.splits:
        raise ValueError(f"expected a split of {name}, {', '.join(corpus.splits)}; got {split!r}")
    return corpus.load(root, split)
