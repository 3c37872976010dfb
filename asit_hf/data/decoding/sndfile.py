"""Decoding with libsndfile: wav, flac, ogg, opus, mp3, aiff, au, caf, w64 and what else it knows."""

import os
from contextlib import ExitStack
from dataclasses import replace
from typing import TYPE_CHECKING, BinaryIO

import numpy as np

from ...utils.extras import extra
from ...utils.names import path_text
from .decoder import AudioInfo, AudioReadError, Decoder, Links, UnknownFormatError
from .headers import Pieces, file_size, open_binary, repaired, warn
from .mpeg import MpegDecoder, begins_with_frame, count_frames, is_recording
from .pyav import find_format
from .rare_formats import declared_size

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
_BLOCK = 1 << 22  # numbers read at once: memory grows with what a file has, not with what its header states


def open_sndfile(file: str | os.PathLike | bytes | BinaryIO, name: str) -> Decoder:
    """Decoder of a path, content or open file, with its true length whatever its header states; errors have `name`.

    Raises:
        UnknownFormatError: a format that libsndfile does not know, or a damaged header.
        AudioReadError: a truncated file.
    """
    with ExitStack() as stack:
        is_path = isinstance(file, (str, os.PathLike))
        stream = stack.enter_context(open_binary(file))
        links = _open_links(repaired(stream, name), name)
        if begins_with_frame(stream) or any(link.is_mpeg for link in links):
            links = _mpeg_links(stream, name) or links
        if not links:
            source = file if is_path else open_binary(file)
            # soundfile expects the caller to know the rate of .raw, and names in UTF-8
            if is_path and (os.fspath(file).lower().endswith(".raw") or path_text(file) != os.fspath(file)):
                source = Pieces(stream, [(0, file_size(stream))])
            try:
                decoder = SndfileDecoder(source, name)
            except UnknownFormatError:
                if find_format(file) or not is_recording(stream):  # mp4 may hold mp3
                    raise
                links = _mpeg_links(stream, name)
        if not links:
            if (declared := declared_size(stream, decoder.format)) > (found := file_size(stream)):
                decoder.close()
                raise AudioReadError(name, f"truncated: its header declares {declared} bytes, it has {found}")
            # an mp3 may begin with something else, such as the header of a wav
            links = _mpeg_links(stream, name) if decoder.is_mpeg and not begins_with_frame(stream) else []
            if source is file and not links:
                return decoder
            links = links or [decoder]
        joined = Links(links, stream, name)
        stack.pop_all()
        return joined


def _open_links(files: list[BinaryIO], name: str) -> list["SndfileDecoder"]:
    """Decoders of the links of a file. All but the first may be cut so early that they cannot be opened."""
    links = []
    for number, file in enumerate(files, 1):
        try:
            links.append(SndfileDecoder(file, name))
        except AudioReadError as error:
            if number == 1:
                raise
            warn(name, f"part {number} of {len(files)} is left out: {error.reason}")
    return links


def _mpeg_links(stream: BinaryIO, name: str) -> list[Decoder]:
    return [
        MpegDecoder(stream, stretch, lambda frames: SndfileDecoder(frames, name)) for stretch in count_frames(stream)
    ]


class SndfileDecoder:
    """An audio file opened with libsndfile (see `Decoder`), with the length that libsndfile gives it.

    Args:
        file: its path, or an open file.
        name: of the file, in errors.

    Raises:
        UnknownFormatError: a format that libsndfile does not know, or a damaged header.
    """

    def __init__(self, file: str | os.PathLike | BinaryIO, name: str):
        self.name = name
        self._source = file
        self._file = self._open()
        self.format: str = self._file.format
        self._first = file.first_sample if isinstance(file, Pieces) else 0
        self.info = AudioInfo(self._file.samplerate, self._file.frames - self._first, self._file.channels)

    def close(self) -> None:
        self._file.close()

    def read(self, first: int, last: int) -> np.ndarray:
        import soundfile

        try:
            begin = self._seek(max(0, first - self._lead_in(first)))
            frames = self._read(last - begin)[first - begin :]
        except soundfile.LibsndfileError as error:
            raise AudioReadError(self.name, _reason(error)) from error
        if len(frames) < last - first:
            self._ended_early(first, len(frames))
        return frames

    def _read(self, count: int) -> np.ndarray:
        """The next `count` samples, fewer at the end."""
        blocks, size = [], max(1, _BLOCK // self.info.num_channels)
        while True:
            blocks.append(self._file.read(min(count, size), dtype="float32", always_2d=True))
            count -= len(blocks[-1])
            if len(blocks[-1]) == 0 or count == 0:
                break
        return blocks[0] if len(blocks) == 1 else np.concatenate(blocks)

    def _open(self) -> "soundfile.SoundFile":
        with extra():
            import soundfile
        try:
            if not isinstance(self._source, (str, os.PathLike)):
                self._source.seek(0)
            file = soundfile.SoundFile(self._source)
        except soundfile.LibsndfileError as error:
            raise UnknownFormatError(self.name, _reason(error)) from error
        file.seekable = lambda: False  # soundfile seeks after every read, after which lossy formats go on inexactly
        return file

    def _ended_early(self, first: int, count: int) -> None:
        """Fewer samples than declared: an error, except in mp3 and vorbis' last block, where `info` is corrected."""
        missing = self.info.num_samples - first - count
        if not self.is_mpeg and not (self._file.subtype == "VORBIS" and missing <= _VORBIS_BLOCK):
            declared = f"its header declares {self.info.num_samples} samples"
            raise AudioReadError(self.name, f"damaged or truncated: {declared}, got none from {first + count} on")
        total = first + count
        if count == 0:
            self._seek(0)
            total = sum(iter(lambda: len(self._file.read(1 << 20, dtype="float32")), 0))
        self.info = replace(self.info, num_samples=total)

    def _lead_in(self, first: int) -> int:
        """Samples to decode before `first` so that those from `first` on are decoded as in the whole file."""
        if self.is_mpeg:
            return _MPEG_LEAD_IN
        if self._file.subtype == "VORBIS":
            return max(0, first - (self.info.num_samples - _VORBIS_PAGE))
        return 0

    @property
    def is_mpeg(self) -> bool:
        return self._file.subtype.startswith("MPEG")

    def _seek(self, frame: int) -> int:
        """Seek to `frame`, or to the beginning if the file cannot be sought; return the position."""
        import soundfile

        try:
            place = frame + self._first
            if self._file.tell() == place:
                return frame
            if self.format == "OGG" and self._file.tell() > 0:  # from elsewhere, some seeks in it are inexact
                self._file.close()
                self._file = self._open()
            if self._file.seek(place) == place:
                return frame
        except soundfile.LibsndfileError:
            pass
        self._file.close()
        self._file = self._open()
        return 0


def _reason(error: "soundfile.LibsndfileError") -> str:
    reason = error.error_string.removeprefix("Error : ").rstrip(".")
    return _REASONS.get(reason, reason)
