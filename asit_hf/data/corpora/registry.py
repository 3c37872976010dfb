"""Published corpora by name."""

import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

from .audioset import AUDIOSET_PARTS, load_audioset
from .esc50 import load_esc50
from .files import SPLITS
from .speech_commands import load_speech_commands
from .voxceleb1 import load_voxceleb1

if TYPE_CHECKING:
    from datasets import Dataset


@dataclass(frozen=True)
class Corpus:
    """A published data set: `load(root, split)`, or `load(root)` if it has folds instead of splits."""

    load: Callable[..., "Dataset"]
    splits: tuple[str, ...] = ()


CORPORA = {
    **{
        name: Corpus(lambda root, split, parts=parts: load_audioset(root, parts[split]), tuple(parts))
        for name, parts in AUDIOSET_PARTS.items()
    },
    "esc50": Corpus(load_esc50),
    **{
        f"speech-commands-v{version}{f'-{classes}' if classes else ''}": Corpus(
            partial(load_speech_commands, version=version, num_classes=classes), SPLITS
        )
        for version in (1, 2)
        for classes in (None, 12, 11)
    },
    "voxceleb1": Corpus(load_voxceleb1, SPLITS),
}


def load_corpus(name: str, root: str | os.PathLike, split: str | None = None) -> "Dataset":
    """Load a corpus of `CORPORA` from its root folder, with the class names of the whole corpus in every split.

    Raises:
        ValueError: no such corpus or split.
        FileNotFoundError: a missing file; the message has the URL to download it from.
    """
    if name not in CORPORA:
        raise ValueError(f"expected a corpus among {', '.join(CORPORA)}, got {name!r}")
    corpus = CORPORA[name]
    if not corpus.splits:
        if split is not None:
            raise ValueError(f"expected no split for {name}, got {split!r}: filter by its column fold instead")
        return corpus.load(root)
    if split not in corpus.splits:
        raise ValueError(f"expected a split of {name}, {', '.join(corpus.splits)}; got {split!r}")
    return corpus.load(root, split)
