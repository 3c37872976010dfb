"""Memory that the C library keeps."""

import ctypes


def return_freed_memory() -> None:
    """
    Returns freed memory to the system, if the C library is glibc. It keeps what lies below something small in use, so
    that a long run whose buffers differ in size grows by hundreds of megabytes, until no more is lost than in use.
    """
    try:
        trim = ctypes.CDLL(None).malloc_trim
    except (AttributeError, OSError, TypeError):
        return
    trim(0)
