"""Errors of libraries while they read or run a checkpoint: the checkpoint's failure, unless the device is at fault."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from sdpipeline.errors import CheckpointError, SdpError

LONGEST_REASON = 300
"""Characters of a library's message that are shown: some list every layer of a network."""

_HOST_MEMORY = "can't allocate memory"


def out_of_memory(error: BaseException) -> bool:
    """Return True if the device is out of memory. The CPU's allocator has no exception type of its own."""
    return isinstance(error, torch.OutOfMemoryError) or _HOST_MEMORY in str(error)


def poisons_process(error: BaseException) -> bool:
    """Return True for a failed kernel, which leaves the CUDA context unusable for the whole process."""
    return isinstance(error, torch.AcceleratorError) and not isinstance(error, torch.OutOfMemoryError)


@contextmanager
def checkpoint_errors(failure: str, *, path: str = "", shown_path: str = "") -> Iterator[None]:
    """Raise CheckpointError for any exception of a library; ``failure`` says what failed, and the reason is added.

    diffusers, transformers, peft and spandrel raise whatever their code happens to do with an odd file, such as
    IndexError or ImportError, so no list of types would be complete. Errors of this package, of a failed device and of
    exhausted memory pass; those of the CPU's allocator become torch.OutOfMemoryError. ``path`` is replaced by
    ``shown_path`` in the reason.
    """
    try:
        yield
    except (SdpError, MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        if poisons_process(error):
            raise
        if out_of_memory(error):
            raise torch.OutOfMemoryError(str(error)) from error
        raise CheckpointError(f"{failure}: {_reason(error, path, shown_path)}") from error


def _reason(error: Exception, path: str, shown_path: str) -> str:
    """Return the exception's text in one line, with its type if that says more."""
    text = " ".join(str(error).split())
    if path:
        text = text.replace(path, shown_path)
    if len(text) > LONGEST_REASON:
        text = f"{text[:LONGEST_REASON]}..."
    return text if isinstance(error, OSError | ValueError) and text else f"{type(error).__name__}: {text}".rstrip(": ")
