"""Files and folders by URL, of any protocol that fsspec knows: hf://, s3://, memory://, https://, zip://...::, ..."""

import io
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, BinaryIO
from urllib.parse import urlsplit

_WHOLE = 16 << 20  # bytes of the largest file that is fetched in one request
_BLOCK, _NUM_BLOCKS = 4 << 20, 8  # of a larger file, kept in memory


def is_url(path: Any) -> bool:
    """Whether a path is opened with fsspec. `file:` URIs are local paths, see `asit_hf.utils.names.local_path`."""
    return isinstance(path, str) and "://" in path and not path.startswith("file:")


def url_path(url: str) -> str:
    """The path in a URL, without host and query: `/clips/a.wav` of `https://host/clips/a.wav?download=true`. Of a
    path, itself."""
    if not is_url(url):
        return url
    first = url.partition("::")[0]
    return urlsplit(first).path if first.startswith("http") else first.partition("://")[2]


def join_url(url: str, name: str) -> str:
    """The URL of the file `name` of a folder: `zip://clips/a.wav::s3://b.zip` of `zip://clips::s3://b.zip`."""
    if is_url(name):
        return name
    first, *archive = url.partition("::")
    return (first if first.endswith("/") else first + "/") + name.lstrip("/") + "".join(archive)


def split_url(url: str) -> tuple[str, str]:
    """The URL of the folder of a file, and the file's name, without a query."""
    first, *archive = url.partition("::")
    first = first.partition("?")[0] if first.startswith("http") else first
    folder, _, name = first.rpartition("/")
    return (folder + "/" if folder.endswith(":/") else folder) + "".join(archive), name


def list_url(url: str) -> list[str] | None:
    """The names of all files below a folder, relative to it, sorted, without hidden ones; None of a file.

    Raises:
        FileNotFoundError: neither a file nor a folder.
    """
    with _errors(url):
        fs, path = _file_system(url)
        if fs.isfile(path) and not fs.isdir(path):
            return None
        folder = path.rstrip("/") + "/" if path.strip("/") else path
        names = (file.removeprefix(folder).lstrip("/") for file in fs.find(path))
        names = [name for name in names if not any(part.startswith(".") for part in name.split("/"))]
        if not names and not fs.exists(path):
            fs.info(path)
            raise FileNotFoundError(path)
    return sorted(names, key=lambda name: name.split("/"))


def url_size(url: str) -> int | None:
    """Bytes of a file, if the server says; `FileNotFoundError` if there is none."""
    with _errors(url):
        fs, path = _file_system(url)
        return fs.info(path).get("size")


def open_url(url: str) -> BinaryIO:
    """A file to read and seek in.

    Files of up to 16 MiB are fetched whole. Of larger ones the blocks that are read are fetched, of which at most
    32 MiB stay in memory; if the server cannot send blocks, the file is copied to a temporary one.
    """
    with _errors(url):
        fs, path = _file_system(url)
        size = fs.info(path).get("size")
        if size is not None and size <= _WHOLE:
            with fs.open(path, "rb") as file:
                return io.BytesIO(file.read())
        options = {"cache_type": "blockcache", "cache_options": {"maxblocks": _NUM_BLOCKS}}
        file = fs.open(path, "rb", block_size=_BLOCK, **options)
        try:
            file.seek(size - 1)
            file.read(1)
            file.seek(0)
            return file
        except (TypeError, ValueError, OSError):  # no size, or no blocks
            file.close()
    copy = tempfile.TemporaryFile()  # noqa: SIM115  the caller closes it
    with _errors(url), fs.open(path, "rb", block_size=0) as stream:
        shutil.copyfileobj(stream, copy)
    copy.seek(0)
    return copy


def stream_url(url: str) -> BinaryIO:
    """A file to read from its beginning on."""
    with _errors(url):
        fs, path = _file_system(url)
        return fs.open(path, "rb")


def _file_system(url: str) -> tuple[Any, str]:
    # an object per call: fsspec keeps one per process, which must not be carried into forked processes
    from fsspec.core import url_to_fs

    return url_to_fs(url)


@contextmanager
def _errors(url: str) -> Iterator[None]:
    """Whatever a protocol raises as an error that says what to do."""
    try:
        yield
    except FileNotFoundError as error:
        cause = f" ({_reason(error.__cause__)})" if error.__cause__ else ""
        raise FileNotFoundError(f"no such file or folder: {url}{cause}") from error
    except ImportError as error:
        reason = " ".join(str(error).split())
        raise ModuleNotFoundError(f"{url} needs a package that is not installed: {reason}") from error
    except PermissionError as error:
        raise PermissionError(f"no access to {url}: {_reason(error)}; log in, or set the credentials") from error
    except Exception as error:  # each protocol has its own errors
        if isinstance(error, ValueError) and "Protocol not known" in str(error):
            raise ValueError(f"expected a URL of a protocol that fsspec knows, got {url}: {error}") from error
        what = "credentials" if "redential" in repr(error) else "the address, the network and the credentials"
        raise OSError(f"{_reason(error)}; check {what} ({url})") from error


def _reason(error: BaseException) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())
