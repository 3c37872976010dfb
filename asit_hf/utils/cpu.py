"""What the processor and the C library under a training run do, where there is no accelerator."""

import ctypes

import torch
from transformers import TrainingArguments
from transformers.utils import logging

logger = logging.get_logger(__name__)

# mallopt's parameters, from glibc's malloc.h
_TRIM_THRESHOLD, _MMAP_MAX = -1, -4
# bfloat16 products in x86's and Arm's instruction sets, as torch.cpu.get_capabilities names them
_BF16 = ("avx512_bf16", "amx_bf16", "bf16", "sve_bf16")


def keep_freed_memory() -> bool:
    """
    Asks glibc to keep what this process frees, for the next allocation. By itself it hands the tensors of a training
    step back to the system and gets them anew, page by page, in the next one. It costs some memory: kept blocks are
    split and do not fit every later request (measured, objective 2023: 121 against 110 MB for each added clip).

    Returns:
        `bool`: whether the C library has such a setting and took it.
    """
    try:
        set_option = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):  # not glibc
        return False
    return bool(set_option(_TRIM_THRESHOLD, -1) and set_option(_MMAP_MAX, 0))


def has_bf16_instructions() -> bool:
    """Whether the processor multiplies bfloat16 by itself; `True` as well where torch is too old to tell."""
    try:
        capabilities = torch.cpu.get_capabilities()
    except AttributeError:
        return True
    return any(capabilities.get(name) for name in _BF16)


def warn_of_emulated_bf16(args: TrainingArguments) -> None:
    """Warns if a run on a processor asks for bf16 and the processor has no instructions for it."""
    if args.bf16 and args.device.type == "cpu" and not has_bf16_instructions():
        logger.warning(
            f"bf16 was asked for, but this processor ({torch.backends.cpu.get_cpu_capability()}) has no instructions "
            "for it: matrix products will be many times slower than in fp32; set bf16 to False"
        )
