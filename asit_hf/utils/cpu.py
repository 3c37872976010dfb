"""Settings and checks for training on a CPU."""

import ctypes

import torch
from transformers import TrainingArguments
from transformers.utils import logging

logger = logging.get_logger(__name__)

_TRIM_THRESHOLD, _MMAP_MAX = -1, -4  # mallopt's parameters, from glibc's malloc.h
_BF16 = ("avx512_bf16", "amx_bf16", "bf16", "sve_bf16")  # instructions of x86 and Arm, as torch.cpu names them


def keep_freed_memory() -> bool:
    """
    Makes glibc keep freed memory for later allocations. By default it returns the tensors of a training step to the
    system and requests them again, page by page, in the next step. Kept blocks fragment, which costs some memory
    (measured with the 2023 preset: 121 instead of 110 MB per additional clip).

    Returns:
        `bool`: whether the C library accepted the setting.
    """
    try:
        set_option = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):  # not glibc
        return False
    return bool(set_option(_TRIM_THRESHOLD, -1) and set_option(_MMAP_MAX, 0))


def has_bf16_instructions() -> bool:
    """Whether the CPU has bfloat16 instructions; also `True` if torch is too old to report them."""
    try:
        capabilities = torch.cpu.get_capabilities()
    except AttributeError:
        return True
    return any(capabilities.get(name) for name in _BF16)


def warn_of_emulated_bf16(args: TrainingArguments) -> None:
    """Warns if a run uses bf16 on a CPU without instructions for it."""
    if args.bf16 and args.device.type == "cpu" and not has_bf16_instructions():
        capability = torch.backends.cpu.get_cpu_capability()
        logger.warning(f"this CPU ({capability}) has no bf16 instructions; set bf16 to False, which is much faster")
