"""Which files are audio, by extension. Files are read by content: a list of files may have any extension."""

import logging
import os
from collections import Counter, defaultdict
from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

from ..utils.names import path_text
from .audio import HEADERLESS_EXTENSIONS, AudioReadError, audio_info

logger = logging.getLogger(__name__)

_SNDFILE = (
    *(".wav", ".wave", ".bwf", ".rf64", ".w64", ".flac", ".ogg", ".oga", ".opus", ".mp3", ".mp2", ".mp1", ".mpa"),
    *(".mpga", ".aif", ".aiff", ".aifc", ".au", ".snd", ".caf", ".sph", ".nist", ".voc", ".avr", ".htk", ".ircam"),
    *(".sf", ".paf", ".fap", ".pvf", ".sds", ".sd2", ".svx", ".8svx", ".iff", ".wve", ".xi"),
)
_PYAV = (
    *(".m4a", ".m4b", ".m4r", ".mp4", ".m4v", ".mov", ".qt", ".3gp", ".3gpp", ".3g2", ".aac", ".adts", ".webm"),
    *(".mkv", ".mka", ".wma", ".wmv", ".asf", ".amr", ".awb", ".avi", ".flv", ".f4v", ".mpg", ".mpeg", ".vob", ".mts"),
    *(".m2ts", ".ac3", ".eac3", ".ec3", ".dts", ".wv", ".ape", ".tta", ".mpc", ".spx", ".ogv", ".ogx"),
)
AUDIO_EXTENSIONS = _SNDFILE + (_PYAV if find_spec("av") else ())
_SHOWN = 5


class LeftOut:
    """Counts the audio among files that have none of `AUDIO_EXTENSIONS`, to say that it is left out.

    Files with another extension, or none, are audio if the first file with it is.

    Args:
        where: folder or archive that the files are in, for the message.
    """

    def __init__(self, where: str | os.PathLike):
        self.where = path_text(where)
        self.counts: Counter[str] = Counter()
        self.reasons: dict[str, str | None] = {}

    def add(self, name: str, open_file: Callable[[], Any], count: int = 1) -> None:
        """Takes a file's name, and a function that returns its path or content; `count` files with its extension."""
        extension = os.path.splitext(name)[1].lower()
        if extension not in self.reasons:
            self.reasons[extension] = why_left_out(extension, open_file)
        self.counts[extension] += count

    def report(self) -> None:
        """One warning for each reason, with the number of files by extension."""
        by_reason = defaultdict(list)
        for extension, reason in sorted(self.reasons.items()):
            by_reason[reason].append(extension)
        for reason, extensions in by_reason.items():
            if reason is None:
                continue
            total = sum(self.counts[extension] for extension in extensions)
            listed = ", ".join(f"{self.counts[one]} {one or 'without extension'}" for one in extensions[:_SHOWN])
            more = ", ..." if len(extensions) > _SHOWN else ""
            logger.warning_once(f"left out {total} audio files in {self.where} ({listed}{more}): {reason}")


def why_left_out(extension: str, open_file: Callable[[], Any]) -> str | None:
    """Why a file with none of `AUDIO_EXTENSIONS`, whose path or content `open_file` returns, is not read."""
    if extension in _PYAV:
        return "reading them needs PyAV, pip install 'asit-hf[av]'"
    if extension in HEADERLESS_EXTENSIONS:
        return "samples without a header cannot be read; convert them to wav"
    try:
        audio_info(open_file())
    except AudioReadError:
        return None
    return "unusual extension; list them in a manifest, or rename them"
