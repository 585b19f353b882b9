"""Standard streams that tolerate unencodable characters, closed descriptors and closed readers."""

from __future__ import annotations

import io
import os
import select
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TextIO

from sdpipeline.errors import SdpError

READER_GONE = 141
"""Exit code of a command whose reader closed the pipe, e.g. ``| head``: 128 and SIGPIPE."""

_UNWRITABLE = "stdout cannot be written"


def prepare_streams() -> None:
    """Open closed streams, and escape characters that a stream cannot encode; child processes inherit both."""
    # A closed descriptor would be reused for the next file or socket, and children would write into it.
    while (lowest := os.open(os.devnull, os.O_RDWR)) <= 2:
        pass
    os.close(lowest)
    sys.stdout = sys.stdout or _nowhere()
    sys.stderr = sys.stderr or _nowhere()
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    os.environ["PYTHONIOENCODING"] = f"{sys.stdout.encoding or 'utf-8'}:backslashreplace"


def encodable(text: str) -> str:
    """Escape characters that stdout cannot encode, so that the text has its printed width."""
    encoding = sys.stdout.encoding or "utf-8"
    return text.encode(encoding, "backslashreplace").decode(encoding)


def is_utf8() -> bool:
    """Return True if stdout can encode every character."""
    return (sys.stdout.encoding or "utf-8").lower().replace("_", "-") in {"utf-8", "utf8"}


def flushed(exit_code: int) -> int:
    """Flush stdout and return the exit code, or READER_GONE if the reader closed the pipe."""
    try:
        sys.stdout.flush()
    except BrokenPipeError:
        silence()
        return READER_GONE
    except OSError as error:
        silence()
        if exit_code == 0:
            with suppress(OSError):
                sys.stderr.write(f"{_UNWRITABLE}: {error.strerror}\n")
        return exit_code or 1
    return exit_code


@contextmanager
def written() -> Iterator[None]:
    """Raise SdpError if stdout cannot be written, e.g. on a full disk; BrokenPipeError passes through."""
    try:
        yield
    except BrokenPipeError:
        raise
    except OSError as error:
        raise SdpError(f"{_UNWRITABLE}: {error.strerror}") from error


def silence() -> None:
    """Discard buffered output, about which the interpreter would print an error at exit."""
    with suppress(OSError, ValueError):
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, sys.stdout.fileno())
        os.close(null)


def reader_is_gone() -> bool:
    """Return True if stdout or stderr is a pipe or socket without a reader."""
    poll = select.poll()
    for descriptor in (1, 2):
        poll.register(descriptor, 0)
    return any(events & (select.POLLERR | select.POLLHUP) for _, events in poll.poll(0))


def _nowhere() -> TextIO:
    return Path(os.devnull).open("w", encoding="utf-8")
