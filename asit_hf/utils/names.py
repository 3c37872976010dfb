"""File names as text that any table, log or terminal can hold, and back."""

import os
import re
from urllib.parse import unquote_to_bytes

# what no table or terminal holds: control characters and line separators, and bytes that are not UTF-8, which Python
# keeps as surrogates
_UNSAFE = re.compile("[\0-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]")


def path_text(path: str | os.PathLike) -> str:
    r"""A path, or a `file:` URI if it is not UTF-8 or has control characters; `local_path` turns it back.

    Only the bytes in question and `%` are escaped.

    ```python
    >>> path_text("rain/été.wav")
    'rain/été.wav'
    >>> path_text(os.fsdecode(b"/sounds/\xe9t\xe9.wav"))
    'file:///sounds/%E9t%E9.wav'
    >>> path_text("rain/line\nbreak.wav")
    'file:rain/line%0Abreak.wav'
    ```
    """
    text = os.fspath(path)
    if isinstance(path, str) and text.startswith("file:"):
        return text
    if not _UNSAFE.search(text) and not text.startswith("file:"):
        return text
    prefix = "file://" if text.startswith("/") else "file:"
    return prefix + re.sub(f"%|{_UNSAFE.pattern}", lambda match: _escaped(match[0]), text)


def local_path(text: str | os.PathLike) -> str:
    """The path that a string with a `file:` URI names, or else `text` itself."""
    if not isinstance(text, str) or not text.startswith("file:"):
        return os.fspath(text)
    path = text.removeprefix("file:")
    if path.startswith("//"):
        path = path[2:].removeprefix("localhost")
    return os.fsdecode(unquote_to_bytes(path))


def _escaped(character: str) -> str:
    return "".join(f"%{byte:02X}" for byte in os.fsencode(character))
