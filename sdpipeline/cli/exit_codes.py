"""Exit codes of the command line, and the messages of errors."""

from __future__ import annotations

import errno
from collections.abc import Sequence

from typer.exceptions import TyperException

from sdpipeline.errors import (
    AuditBrokenError,
    BadInputError,
    DatabaseRefusedError,
    DatabaseUnavailableError,
    Mistake,
    OrchestratorUnavailableError,
    SdpError,
    StorageUnavailableError,
)

DONE, FAILED, BAD_INPUT, INTERRUPTED = 0, 1, 2, 130

_DISK_FIXES = {
    errno.EROFS: "the disk is read-only: name a home or an output folder that is writable",
    errno.ENOSPC: "free space on that disk",
    errno.EDQUOT: "free space within the disk quota",
}
_DATABASE_FIX = "check that the server runs, and host, port and password (percent-encoded)"
_UNUSABLE = {
    AuditBrokenError: ("SDP_DATABASE_URL", "sdpipeline reconcile --adopt"),
    StorageUnavailableError: ("SDP_STORAGE_URL", "check the endpoint, the bucket and its credentials"),
    OrchestratorUnavailableError: ("PREFECT_API_URL", "check that the Prefect server runs there"),
}


def explained(error: Exception) -> tuple[Sequence[Mistake], int] | None:
    """Return the messages and the exit code of an error; None for an error that keeps its traceback."""
    if isinstance(error, TyperException):
        return [Mistake(message=error.format_message(), fix="see --help")], BAD_INPUT
    if isinstance(error, UnicodeEncodeError):
        if not any("\ud800" <= character <= "\udfff" for character in error.object):
            return None
        message = f"{error.object!r} holds characters that are not in this locale's encoding"
        return [Mistake(message=message, fix="set LC_ALL=C.UTF-8, or PYTHONUTF8=1")], BAD_INPUT
    if isinstance(error, BadInputError):
        return error.mistakes, BAD_INPUT
    if isinstance(error, DatabaseUnavailableError):
        return _explained_outage(error)
    if isinstance(error, tuple(_UNUSABLE)):
        key, fix = next(advice for kind, advice in _UNUSABLE.items() if kind in type(error).mro())
        return [Mistake(key=key, message=str(error), fix=fix)], BAD_INPUT
    if isinstance(error, SdpError):
        return [Mistake(message=str(error))], FAILED
    if isinstance(error, OSError) and error.errno in _DISK_FIXES:
        message = f"{error.filename}: {error.strerror}" if error.filename else str(error.strerror)
        return [Mistake(message=message, fix=_DISK_FIXES[error.errno])], FAILED
    return None


def _explained_outage(error: DatabaseUnavailableError) -> tuple[Sequence[Mistake], int]:
    if isinstance(error, DatabaseRefusedError) or error.fix is None:
        return [Mistake(key="SDP_DATABASE_URL", message=str(error), fix=error.fix or _DATABASE_FIX)], BAD_INPUT
    # The address is right: the database itself said what is wrong with it.
    return [Mistake(message=str(error), fix=error.fix)], FAILED
