"""Decoding with PyAV, which carries ffmpeg: m4a, aac, webm, wma, amr, video files, and what libsndfile lacks."""

import logging
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from fractions import Fraction
from typing import TYPE_CHECKING, BinaryIO

import numpy as np

from ...utils.extras import extra
from .decoder import AudioInfo, AudioReadError
from .headers import open_binary

if TYPE_CHECKING:
    import av

logger = logging.getLogger(__name__)

# The first bytes of a file and ffmpeg's name of its format. Formats are not left to ffmpeg's own probing, which also
# knows playlists that name other files, and finds some format in most garbage.
_SIGNATURES = {
    "mov": rb".{4}(ftyp|moov|moof|mdat|styp|sidx|wide|skip|free|pnot)",
    "matroska": rb"\x1a\x45\xdf\xa3",
    "asf": rb"\x30\x26\xb2\x75\x8e\x66\xcf\x11",
    "aac": rb"\xff[\xf0\xf1\xf8\xf9]",
    "amr": rb"#!AMR",
    "avi": rb"RIFF.{4}AVI ",
    "flv": rb"FLV\x01",
    "mpeg": rb"\x00\x00\x01\xba",
    "mpegts": rb"(.{4})?\x47.{187}(.{4})?\x47",
    "ac3": rb"\x0b\x77.{3}[\x00-\x57]",
    "eac3": rb"\x0b\x77.{3}[\x58-\x87]",
    "dts": rb"\x7f\xfe\x80\x01",
    "wv": rb"wvpk",
    "ape": rb"MAC ",
    "tta": rb"TTA[12]",
    "mpc": rb"MP\+",
    "mpc8": rb"MPCK",
    # codecs in them that libsndfile does not know: Speex, AAC, WMA, ...
    "ogg": rb"OggS",
    "caf": rb"caff",
    "wav": rb"RIFF.{4}WAVE",
    "aiff": rb"FORM.{4}AIF[FC]",
}
_SIGNATURE = re.compile(b"|".join(b"(?P<%s>%s)" % (name.encode(), s) for name, s in _SIGNATURES.items()), re.DOTALL)
_HEAD = 400  # bytes, two packets of an MPEG transport stream
# without a header that declares their length: ffmpeg estimates it from the bit rate
_OF_UNKNOWN_LENGTH = ("aac", "amr", "ac3", "eac3", "dts", "mpeg", "mpegts")
_WITHOUT_SEEKING = ("mpeg", "ac3", "eac3", "dts")  # time stamps after a seek are not those of the whole file
# decoders that a seek does not reset
_WITHOUT_RESET = (
    *("libopencore_amrnb", "libopencore_amrwb", "amrnb", "amrwb", "ac3", "eac3"),
    *("speex", "nellymoser", "g722", "g723_1", "g726"),
)
_FROM_THE_START = ("adpcm_yamaha", "g722", "g726")  # each sample is the last one and a difference
_COUNTED = ("ac3", "eac3", "dts")  # whose time stamps ffmpeg adds up from the rounded lengths of packets
_DELAYED = ("wmav1", "wmav2", "wmavoice")  # decoders that return the last frame after the last packet
# Seconds decoded before a window. Codecs carry state from packet to packet: AAC one, Opus 80 ms, mp3 up to 0.4 s.
_LEAD_IN = 1.0
# Recorders of live streams leave out packets of silence; elsewhere, and if it is longer, a gap is damage.
_WITH_GAPS = ("matroska", "mov", "flv", "mpegts")
_LONGEST_GAP = 60.0  # in seconds
_END = 1 << 40  # a time stamp past the end of any file: seeking to it finds the last packet
_said: set[str] = set()  # what is said once, with the first file as an example


def find_format(file: str | os.PathLike | bytes | BinaryIO) -> str | None:
    """ffmpeg's name of the format of a path, content or open file by its first bytes; None if not one of PyAV's."""
    with open_binary(file) as opened:
        head = opened.read(_HEAD)
        if head.startswith(b"ID3") and len(head) >= 10:  # a tag before an aac file
            opened.seek(10 + sum(byte << shift for byte, shift in zip(head[6:10], (21, 14, 7, 0))))
            head = opened.read(_HEAD)
    found = _SIGNATURE.match(head)
    return found and found.lastgroup


class PyAVDecoder:
    """The audio of a file opened with PyAV (see `Decoder`), mixed to mono.

    The position of a sample is that of its packet's time stamp, counted from the first sample; missing packets are
    silence. Positions are exact if time stamps count samples (mp4, mov, aac, amr, wav) or if all packets have one
    size, and otherwise to the unit of the time stamps: 1 ms for Vorbis in webm.

    Args:
        file: its path or content, or an open file.
        format: ffmpeg's name of its format, see `find_format`.
        name: of the file, in errors.

    Raises:
        AudioReadError: no audio track, a codec that ffmpeg does not know, or a damaged or truncated file.
        ModuleNotFoundError: PyAV is not installed.
    """

    def __init__(self, file: str | os.PathLike | bytes | BinaryIO, format: str, name: str):
        self.name = name
        self._format = format
        with extra("av"):
            import av
        self._file = open_binary(file)
        self._container: av.container.InputContainer | None = None
        try:
            with self._errors():
                self._open()
                self._read_format()
                self.info = replace(self.info, num_samples=self._find_end())
        except AudioReadError:
            self.close()
            raise

    def close(self) -> None:
        if self._container is not None:
            self._container.close()
        self._file.close()

    def _open(self) -> None:
        import av

        self._file.seek(0)
        self._container = av.open(self._file, format=self._format, metadata_errors="ignore")
        self._stream = self._choose_track()

    def read(self, first: int, last: int) -> np.ndarray:
        blocks: list[np.ndarray] = []
        position = first
        with self._errors():
            for start, block in self._decode(first):
                gap = min(start, last) - position
                if gap > 0:
                    self._report_gap(position, start)
                    blocks.append(np.zeros(gap, np.float32))
                    position += gap
                blocks.append(block[position - start : last - start])
                position += len(blocks[-1])
                if position >= last:
                    break
        if position < last:  # the last packet may hold less than it declares
            if last - position > self._packet_samples():
                raise self._damaged(f"expected {self.info.num_samples} samples, got none from {position} on")
            self.info = replace(self.info, num_samples=position)
        return np.concatenate(blocks)[:, None] if blocks else np.empty((0, 1), np.float32)

    def _choose_track(self) -> "av.AudioStream":
        """The first default audio track, or else the first."""
        import av

        tracks = self._container.streams.audio
        if not tracks:
            raise AudioReadError(self.name, f"no audio track, it has {len(self._container.streams)} others")
        default = [track for track in tracks if track.disposition & av.stream.Disposition.default]
        chosen = (default or tracks)[0]
        if chosen.codec_context is None:
            raise AudioReadError(self.name, "its audio has a codec that ffmpeg does not know, or is encrypted")
        chosen.codec_context.options = {"err_detect": "crccheck+explode"}
        if len(tracks) > 1 and "tracks" not in _said:
            _said.add("tracks")
            what = "%s has %d audio tracks, track %d is read: of such files, the first that is marked as default"
            logger.warning(what, self.name, len(tracks), tracks.index(chosen) + 1)
        return chosen

    def _read_format(self) -> None:
        """Rate, channels, and where time begins, from two frames: the first may be cut, the second has full size."""
        self._first_pts: int | None = None
        frames = [frame for frame, _ in zip(self._frames(), range(2))]
        if not frames:
            raise AudioReadError(self.name, "no samples")
        self.info = AudioInfo(frames[0].sample_rate, 0, frames[0].layout.nb_channels)
        self._per_tick = Fraction(self._stream.time_base) * self.info.sampling_rate
        if self._format in _COUNTED and len(frames) == 2:
            self._per_tick = Fraction(frames[0].samples, frames[1].pts - frames[0].pts)
        self._pts_of_first_frame = frames[0].pts
        self._origin = frames[-1].pts, frames[0].samples if len(frames) == 2 else 0
        self._block = frames[-1].samples
        if self._first_pts is None or frames[-1].pts is None:
            raise AudioReadError(self.name, "no time stamps")

    def _position(self, pts: int) -> int:
        """The sample that a time stamp stands for; time stamps are rounded, so that whole packets are preferred."""
        pts_of_second, second = self._origin
        samples = (pts - pts_of_second) * self._per_tick
        in_packets = round(samples / self._block) * self._block
        return second + (in_packets if abs(in_packets - samples) <= self._per_tick + 1 else round(samples))

    def _packet_samples(self) -> int:
        """Samples by which a length may be off."""
        return max(self._block, round(2 * self._per_tick))

    def _find_end(self) -> int:
        """The number of samples: the end of the last packet, found by seeking there.

        Raises:
            AudioReadError: it is before the end that the header declares.
        """
        end, seconds = None, Fraction(0)
        for start in (self._first_pts,) if self._format in _WITHOUT_SEEKING else (_END, self._first_pts):
            self._container.seek(start, stream=self._stream)
            for packet in self._container.demux():
                if packet.pts is None:
                    continue
                if packet.stream is self._stream:
                    duration = (packet.duration or 0) * self._per_tick
                    is_whole = not duration or abs(duration - self._block) <= self._per_tick
                    end = self._position(packet.pts) + (self._block if is_whole else round(duration))
                seconds = max(seconds, (packet.pts + (packet.duration or 0)) * packet.time_base)
            if end is not None:
                break
        if end is not None and self._stream.codec_context.name in _DELAYED:
            end += self._block
        end, rate = max(0, end or 0), self.info.sampling_rate
        if self._format == "mov":
            missing = round((self._stream.duration or 0) * self._per_tick) - end
            tolerance = self._packet_samples()
        else:  # only the whole file has a declared length, not each of its tracks
            declared = Fraction(self._container.duration or 0, 1_000_000)
            if self._format == "avi":  # of a file without its index, ffmpeg estimates the duration
                declared = max(declared, self._stream.frames * self._stream.time_base)
            missing = round((declared - seconds) * rate)
            tolerance = self._packet_samples() if len(self._container.streams) == 1 else rate
        if missing > tolerance and self._format not in _OF_UNKNOWN_LENGTH:
            raise self._damaged(f"its header declares {missing / rate:.3f} s more than the {end / rate:.3f} s it has")
        return end

    def _decode(self, first: int) -> Iterator[tuple[int, np.ndarray]]:
        """(position, mono samples) of every frame that ends after `first`, decoded from some time before it."""
        codec = self._stream.codec_context.name
        begin = 0 if codec in _FROM_THE_START else first - round(_LEAD_IN * self.info.sampling_rate)
        pts = self._first_pts if begin <= 0 else self._origin[0] + int((begin - self._origin[1]) / self._per_tick)
        expected = None
        if codec in _WITHOUT_RESET:
            self._container.close()
            self._open()
        self._container.seek(pts, stream=self._stream)
        frames = self._frames(pts)
        frame = next(frames, None)
        if begin > 0 and (self._format in _WITHOUT_SEEKING or frame is None or self._position(frame.pts) > first):
            self._container.seek(self._first_pts, stream=self._stream)  # the file has no index that leads there
            frames = self._frames(pts)
            frame = next(frames, None)
        while frame is not None:
            if frame.sample_rate != self.info.sampling_rate:
                rates = f"from {self.info.sampling_rate} to {frame.sample_rate} Hz"
                raise AudioReadError(self.name, f"its sampling rate changes {rates}")
            samples = _to_mono(frame)
            start = 0 if frame.pts == self._pts_of_first_frame else expected
            if start is None or frame.pts is not None and self._position(frame.pts) - start >= self._packet_samples():
                start = self._position(frame.pts)
            expected = start + len(samples)
            if expected > first:
                yield start, samples
            frame = next(frames, None)

    def _report_gap(self, position: int, start: int) -> None:
        begin, end = position / self.info.sampling_rate, start / self.info.sampling_rate
        if self._format not in _WITH_GAPS or end - begin > _LONGEST_GAP:
            raise self._damaged(f"nothing from {begin:.3f} to {end:.3f} s")
        if "gap" not in _said:
            _said.add("gap")
            what = "%s has no audio from %.3f to %.3f s: such gaps are read as silence"
            logger.warning(what, self.name, begin, end)

    def _frames(self, begin: int | None = None) -> Iterator["av.AudioFrame"]:
        """Decoded packets from here on, without those that end before the time stamp `begin`."""
        import av

        decoded = begin is None or begin <= self._first_pts
        packets = self._container.demux(self._stream)
        for packet in packets:
            if self._first_pts is None:
                self._first_pts = packet.pts
            if begin is not None and packet.pts is not None and packet.pts + (packet.duration or 0) < begin:
                continue
            if packet.is_corrupt:
                raise self._damaged("a packet is incomplete")
            try:
                frames = packet.decode()
            except av.error.InvalidDataError:
                is_last = decoded and not getattr(next(packets, None), "size", 0)
                if decoded and not (is_last and self._format in _OF_UNKNOWN_LENGTH):
                    raise
                continue  # after a seek, mpeg streams begin with a part of a packet; recordings end with one
            decoded = True
            yield from frames

    def _damaged(self, what: str) -> AudioReadError:
        return AudioReadError(self.name, f"damaged or truncated: {what}")

    @contextmanager
    def _errors(self) -> Iterator[None]:
        try:
            yield
        except AudioReadError:
            raise
        except Exception as error:  # those of av derive from ValueError, OSError, LookupError and others
            raise self._damaged(getattr(error, "strerror", None) or str(error)) from error


def _to_mono(frame: "av.AudioFrame") -> np.ndarray:
    """Float32 samples of a frame of any sample format and channel layout, which may change from frame to frame."""
    samples = frame.to_ndarray()  # (channels, samples), or (1, samples * channels)
    if not frame.format.is_planar:
        samples = samples.reshape(-1, frame.layout.nb_channels).T
    if samples.dtype.kind == "u":  # only u8
        samples = (samples - np.float32(128)) / 128
    elif samples.dtype.kind == "i":
        samples = samples / -float(np.iinfo(samples.dtype).min)
    return samples.astype(np.float32).mean(axis=0)
