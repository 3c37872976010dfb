"""Many strings, or values that occur often, in little memory."""

from array import array
from collections.abc import Hashable, Iterable, Sequence
from typing import Any

import numpy as np


class Texts(Sequence):
    """Strings in one piece of memory: a million of them take little more than their characters.

    Processes that are forked share it. Characters that are not Unicode (surrogates) are kept.
    """

    def __init__(self, texts: Iterable[str] = ()):
        content, ends = bytearray(), array("q")
        for text in texts:
            content += text.encode(errors="surrogatepass")
            ends.append(len(content))
        self.content, self.ends = bytes(content), np.frombuffer(ends, np.int64) if ends else np.zeros(0, np.int64)

    def __len__(self) -> int:
        return len(self.ends)

    def __getitem__(self, index: int) -> str:
        index = range(len(self))[index]
        start = self.ends[index - 1] if index else 0
        return self.content[start : self.ends[index]].decode(errors="surrogatepass")


class Categories(Sequence):
    """Values of which many are equal.

    Attributes:
        values: the different ones, in the order of their first occurrence.
        codes: the index among them of each value, `(len,)`.
    """

    def __init__(self, values: Iterable[Hashable]):
        found: dict[Hashable, int] = {}
        codes = array("i", (found.setdefault(value, len(found)) for value in values))
        self.codes = np.frombuffer(codes, np.int32) if codes else np.zeros(0, np.int32)
        self.values: list[Any] = list(found)

    def __len__(self) -> int:
        return len(self.codes)

    def __getitem__(self, index: int) -> Any:
        return self.values[self.codes[index]]

    def counts(self) -> dict[Any, int]:
        """How often each value occurs."""
        return dict(zip(self.values, np.bincount(self.codes, minlength=len(self.values)).tolist()))
