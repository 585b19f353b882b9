"""Error classes of this package.

::

    SdpError
    ├── BadInputError             the user's file, option or setting is wrong: exit 2, nothing written
    │   ├── CampaignError         ... in a campaign file, with one Mistake for each fault found
    │   └── SettingsError         ... in a setting, or a service a setting names does not answer
    ├── TransientError            the same work may succeed later: the job is tried again
    │   ├── StorageUnavailableError
    │   ├── DatabaseUnavailableError
    │   │   └── ChainTakenError   another process wrote into this process's chain of audit events
    │   │   └── DatabaseRefusedError  ... it answered: a wrong password, user or database, or a file that is read-only
    │   ├── OrchestratorUnavailableError
    │   ├── SigningUnavailableError
    │   ├── SealOverdueError      another process has the seal key, and does not seal
    │   ├── DeliveryLostError     the process that delivers pictures died repeatedly of the same call
    │   ├── DeliveryUnavailableError  ... or does not start
    │   └── DeviceExhaustedError  out of memory although every fallback was taken
    ├── PermanentError            the job fails; the message names the field and the fix
    │   ├── RequestRefusedError   the engine cannot do what the request asks
    │   ├── CheckpointError       weights are missing, altered, revoked or unsafe
    │   ├── InputImageError       an input picture is missing, altered, truncated or too large
    │   ├── BadPictureError       the engine's own output is no picture (NaN, flat, black) or scores too low
    │   ├── MarksLostError        a picture came back from storage without its marks as AI-made
    │   └── PictureBlockedError   a policy's safety checker forbids the finished picture: the job is blocked
    ├── ObjectMissingError        storage has no object under that key
    ├── ObjectConflictError       storage holds other bytes under that key
    ├── ForeignResultError        a Prefect server named a result to be read: somebody forced a run's state
    ├── RunForcedError            a Prefect run was given its final state from outside, with work left to do
    ├── AuditBrokenError          storage holds a seal that this database does not have the events of
    ├── LeaseLostError            another worker owns the job now: drop the work
    └── WorkersLostError          the worker processes died more often than they may be restarted
"""

from __future__ import annotations

from dataclasses import dataclass

PERCENT_ENCODE = "percent-encode user and password: @ is %40, # %23, / %2F, : %3A, ? %3F, % %25"
"""Advice for writing a password in an address."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Mistake:
    """Fault in user input: its location, the error and the fix."""

    message: str
    file: str | None = None
    line: int | None = None
    column: int | None = None
    key: str | None = None
    fix: str | None = None

    def document(self) -> dict[str, str | int | None]:
        """Return the JSON form of ``--json``."""
        return {name: getattr(self, name) for name in ("file", "line", "column", "key", "message", "fix")}

    def __str__(self) -> str:
        """Return one line in a compiler's format: ``file:line:column: key: message (fix)``."""
        place = ":".join(str(part) for part in (self.file, self.line, self.column) if part is not None)
        parts = [part for part in (place, self.key, self.message) if part]
        line = ": ".join(parts) + (f" ({self.fix})" if self.fix else "")
        # Names from a file may contain line ends and terminal codes; escape them to keep one harmless line.
        return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in line)


class SdpError(Exception):
    """Root of the tree above."""


class BadInputError(SdpError):
    """The user's input cannot be accepted; holds one or more mistakes."""

    def __init__(self, *mistakes: Mistake | str) -> None:
        self.mistakes = tuple(m if isinstance(m, Mistake) else Mistake(message=m) for m in mistakes)
        super().__init__("\n".join(str(mistake) for mistake in self.mistakes))


class CampaignError(BadInputError):
    """A campaign file is refused as a whole."""


class SettingsError(BadInputError):
    """A setting is wrong, or the service it names does not answer."""


class TransientError(SdpError):
    """The same work may succeed later."""


class StorageUnavailableError(TransientError):
    """Object storage did not answer, or answered with an error of its own, within the retries."""


class DatabaseUnavailableError(TransientError):
    """The database did not answer, or answered that it cannot do this now.

    ``fix`` says what to do about it; None if the database did not say why.
    """

    def __init__(self, message: str, *, fix: str | None = None) -> None:
        super().__init__(message)
        self.fix = fix


class DatabaseRefusedError(DatabaseUnavailableError):
    """The database refuses this user, password, database or file: an error at startup, waited out later."""


class ChainTakenError(DatabaseUnavailableError):
    """Another process wrote into this process's chain of audit events; the next transaction begins a new chain."""


class OrchestratorUnavailableError(TransientError):
    """The Prefect server did not answer."""


class SigningUnavailableError(TransientError):
    """The key that signs pictures did not answer, or its certificate is not accepted (any more)."""


class SealOverdueError(TransientError):
    """The process that has the seal key did not seal in time."""


class DeliveryLostError(TransientError):
    """The process that encodes, signs, stores and records pictures died repeatedly of the same call."""


class DeliveryUnavailableError(TransientError):
    """The process that encodes, signs, stores and records pictures does not start."""


class DeviceExhaustedError(TransientError):
    """The device has too little memory for even one picture of this kind."""


class PermanentError(SdpError):
    """A retry of the job would fail again."""


class RequestRefusedError(PermanentError):
    """The engine cannot do what this request asks; the message names the field and the fix."""


class CheckpointError(PermanentError):
    """Weights are missing, altered, revoked or in an unsafe format."""


class InputImageError(PermanentError):
    """An input picture is missing, altered, truncated or too large."""


class BadPictureError(PermanentError):
    """The engine's output is not a picture (not finite, flat or black), or scores less than its campaign asks for."""


class MarksLostError(PermanentError):
    """A picture came back from storage intact but without its marks as AI-made."""


class PictureBlockedError(PermanentError):
    """A policy forbids the finished picture: the job is blocked, not failed. The message is the policy's rule."""


class ObjectMissingError(SdpError):
    """Storage has no object under that key."""


class ObjectConflictError(SdpError):
    """Storage already holds other bytes under that key."""


class AuditBrokenError(SdpError):
    """Storage holds a seal over events that this database does not have: a restored backup, or worse."""


class ForeignResultError(SdpError):
    """A Prefect server named a result to be read. Flows of this package have none."""


class RunForcedError(SdpError):
    """A Prefect run was given its final state from outside, with work left to do."""


class LeaseLostError(SdpError):
    """The lease expired or was closed; the job's next holder will finish it."""


class WorkersLostError(SdpError):
    """Every worker process died more often than it may be restarted; the database still holds the work."""
