"""Many strings in little memory."""

from array import array
from collections.abc import Iterable, Sequence

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
