"""Decoding with libsndfile: wav, flac, ogg, opus, mp3, aiff, au, caf, w64 and what else it knows."""

import io
import os
import re
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from ..utils.extras import extra
from .decoder import AudioInfo, AudioReadError, UnknownFormatError

if TYPE_CHECKING:  # imported where used: arrays do not need it
    import soundfile

# After a seek, the first mp3 frames lack data from earlier frames: up to 511 bytes, several frames at low bit rates.
_MPEG_LEAD_IN = 16 * 1152
# A seek into the last page of an Ogg Vorbis stream can be some samples off. A page has at most 255 packets of 1024
# samples (at the usual block size): a seek to before the last page is exact, and so is reading on from there.
_VORBIS_PAGE = 255 * 1024
# The last page of some intact files (Debian's naev-data) declares up to a block more than its packets hold.
_VORBIS_BLOCK = 8192
# clearer words for messages of libsndfile; it reports any damaged mp3 with the first one
_REASONS = {
    "File does not exist or is not a regular file (possibly a pipe?)": "Format not recognised",
    "Unspecified internal error": "damaged: decoding failed",
}
# Programs that write wav to a pipe leave a placeholder of about this size in the header.
_UNKNOWN_WAV_SIZE = 0x7FFFF000
_WAV_DATA_CHUNK = re.compile(r"^data : (\d+) \(should be (\d+)\)", re.MULTILINE)


class SndfileDecoder:
    """An audio file opened with libsndfile (see `Decoder`).

    Args:
        file: its path or content.
        name: of the file, in errors.

    Raises:
        UnknownFormatError: a format that libsndfile does not know, or a damaged header.
        AudioReadError: a truncated file.
    """

    def __init__(self, file: str | os.PathLike | bytes, name: str):
        self.name = name
        self._source = file
        self._file = self._open()
        self.info = AudioInfo(self._file.samplerate, self._file.frames, self._file.channels)
        cut = _WAV_DATA_CHUNK.search(self._file.extra_info) if self._file.format.startswith(("WAV", "RF64")) else None
        if cut and int(cut[1]) < _UNKNOWN_WAV_SIZE and int(cut[1]) > int(cut[2]):
            self.close()
            raise AudioReadError(self.name, f"truncated: its header declares {cut[1]} bytes of audio, it has {cut[2]}")

    def close(self) -> None:
        self._file.close()

    def read(self, first: int, last: int) -> np.ndarray:
        import soundfile

        # one call for lead-in and window, as soundfile seeks after every call
        try:
            begin = self._seek(max(0, first - self._lead_in(first)))
            frames = self._file.read(last - begin, dtype="float32", always_2d=True)[first - begin :]
        except soundfile.LibsndfileError as error:
            raise AudioReadError(self.name, _reason(error)) from error
        if len(frames) < last - first:
            self._ended_early(first, len(frames))
        return frames

    def _open(self) -> "soundfile.SoundFile":
        with extra():
            import soundfile
        try:
            in_memory = isinstance(self._source, (bytes, bytearray, memoryview))
            return soundfile.SoundFile(io.BytesIO(self._source) if in_memory else self._source)
        except soundfile.LibsndfileError as error:
            raise UnknownFormatError(self.name, _reason(error)) from error

    def _ended_early(self, first: int, count: int) -> None:
        """Fewer samples than declared: an error, except in mp3 and vorbis' last block, where `info` is corrected."""
        missing = self.info.num_samples - first - count
        if not self._is_mpeg() and not (self._file.subtype == "VORBIS" and missing <= _VORBIS_BLOCK):
            declared = f"its header declares {self.info.num_samples} samples"
            raise AudioReadError(self.name, f"damaged or truncated: {declared}, got none from {first + count} on")
        total = first + count
        if count == 0:
            self._seek(0)
            total = sum(iter(lambda: len(self._file.read(1 << 20, dtype="float32")), 0))
        self.info = replace(self.info, num_samples=total)

    def _lead_in(self, first: int) -> int:
        """Samples to decode before `first` so that those from `first` on are decoded as in the whole file."""
        if self._is_mpeg():
            return _MPEG_LEAD_IN
        if self._file.subtype == "VORBIS":
            return max(0, first - (self.info.num_samples - _VORBIS_PAGE))
        return 0

    def _is_mpeg(self) -> bool:
        return self._file.subtype.startswith("MPEG")

    def _seek(self, frame: int) -> int:
        """Seek to `frame`, or to the beginning if the file cannot be sought; return the position."""
        import soundfile

        try:
            if self._file.tell() == frame or self._file.seek(frame) == frame:
                return frame
        except soundfile.LibsndfileError:
            pass
        self._file.close()
        self._file = self._open()
        return 0


def _reason(error: "soundfile.LibsndfileError") -> str:
    reason = error.error_string.removeprefix("Error : ").rstrip(".")
    return _REASONS.get(reason, reason)
