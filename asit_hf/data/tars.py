"""Tar files of audio, read as streams."""

import os
import tarfile
from collections.abc import Callable, Iterator

from ..utils.urls import is_url, stream_url
from .formats import AUDIO_EXTENSIONS, LeftOut


def read_tar(path: str | os.PathLike) -> Iterator[tuple[str, Callable[[], bytes]]]:
    """The names of the audio files in a tar file, path or URL, and functions that read them.

    Such a function is called before the next name is taken, or not at all.

    Raises:
        ValueError: a damaged file.
    """
    path = os.fspath(path)
    left_out = LeftOut(path)
    try:
        with (
            stream_url(path) if is_url(path) else open(path, "rb") as stream,
            tarfile.open(fileobj=stream, mode="r|*") as archive,
        ):
            for member in archive:
                if not member.isfile():
                    continue

                def content(member: tarfile.TarInfo = member) -> bytes:
                    return archive.extractfile(member).read()

                if os.path.splitext(member.name)[1].lower() in AUDIO_EXTENSIONS:
                    yield member.name, content
                else:
                    left_out.add(member.name, content)
    except tarfile.TarError as error:
        raise ValueError(f"cannot read {path}: damaged or truncated tar file ({error})") from error
    left_out.report()
