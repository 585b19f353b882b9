"""Standard streams that cannot fail for their encoding, for being closed, or for a reader that is gone."""

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
"""Exit code of a command whose output nobody reads any more, e.g. ``| head``: 128 and SIGPIPE."""

_UNWRITABLE = "stdout cannot be written"


def prepare_streams() -> None:
    """Open closed streams, and escape each character that a stream cannot encode; child processes do the same."""
    # A closed descriptor would be given to the next file or socket, and children would write into that.
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
    """The text with escapes for what stdout cannot encode, so that it is as wide as it is printed."""
    encoding = sys.stdout.encoding or "utf-8"
    return text.encode(encoding, "backslashreplace").decode(encoding)


def is_utf8() -> bool:
    """Whether stdout takes every character."""
    return (sys.stdout.encoding or "utf-8").lower().replace("_", "-") in {"utf-8", "utf8"}


def flushed(exit_code: int) -> int:
    """The exit code after the last output has left, or READER_GONE."""
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
    """Raises SdpError if stdout takes no more, e.g. a file on a full disk; BrokenPipeError passes."""
    try:
        yield
    except BrokenPipeError:
        raise
    except OSError as error:
        raise SdpError(f"{_UNWRITABLE}: {error.strerror}") from error


def silence() -> None:
    """Discard what stdout still buffers, which the interpreter would complain about at its end."""
    with suppress(OSError, ValueError):
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, sys.stdout.fileno())
        os.close(null)


def reader_is_gone() -> bool:
    """Whether stdout or stderr is a pipe or socket that nobody reads."""
    poll = select.poll()
    for descriptor in (1, 2):
        poll.register(descriptor, 0)
    return any(events & (select.POLLERR | select.POLLHUP) for _, events in poll.poll(0))


def _nowhere() -> TextIO:
    return Path(os.devnull).open("w", encoding="utf-8")
