"""Patch of Prefect's engine: results that a Prefect server names are never read.

Prefect's engine treats a run in state Completed as done and reads the result that the state names: bytes in a file or
block. The state also names their serializer, by default pickle. Anyone who can set a run's state could therefore
execute code in the process that runs it. Flows and tasks of this package return nothing, so nothing needs to be read.
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NoReturn

from sdpipeline.errors import ForeignResultError

MESSAGE = "a Prefect server returned a persisted result; it was not read"
SERIALIZERS = frozenset({"cloudpickle", "pickle", "lzma", "zlib", "gzip", "bz2"})
"""Modules that a result's metadata may name; Prefect imports them while it reads a state."""


@dataclass(frozen=True, slots=True)
class _Place:
    """Function of Prefect that is replaced, and the parameters it must have."""

    owner: str
    name: str
    parameters: tuple[str, ...]


# Every path from stored bytes to a result uses these. The first three run before a byte is fetched.
READERS = (
    _Place("prefect.results:ResultStore", "_from_metadata", ("metadata",)),
    _Place("prefect.results:ResultStore", "read", ("self", "key", "holder")),
    _Place("prefect.results:ResultStore", "aread", ("self", "key", "holder")),
    _Place("prefect._internal.result_records:ResultRecord", "deserialize", ("data", "backup_serializer")),
    _Place(
        "prefect._internal.result_records:ResultRecord", "deserialize_from_result_and_metadata", ("result", "metadata")
    ),
    _Place("prefect.serializers:PickleSerializer", "loads", ("self", "blob")),
)
IMPORTERS = (
    _Place("prefect.serializers", "validate_picklelib", ("value",)),
    _Place("prefect.serializers", "validate_compressionlib", ("value",)),
)
# Prefect's functions that read a state's result, and the reader that each of them must call.
CALLERS = (
    _Place("prefect.states", "_get_state_result_data_with_retries", ("_from_metadata",)),
    _Place("prefect.states", "aget_state_exception", ("_from_metadata",)),
)


def install() -> None:
    """Patch Prefect in this process, once. Raises RuntimeError if this version is not the one the patch was written
    for."""
    for place in (*READERS, *IMPORTERS):
        _check(place)
    for place in CALLERS:
        if missing := set(place.parameters) - set(inspect.unwrap(_owner(place, place.name)).__code__.co_names):
            _refuse(place, f"does not call {', '.join(missing)}")
    for place in READERS:
        setattr(_owner(place), place.name, _refusal(asynchronous=place.name in {"_from_metadata", "aread"}))
    for place in IMPORTERS:
        original = _owner(place, place.name)
        if not hasattr(original, "__sdpipeline__"):
            setattr(_owner(place), place.name, _of_known_modules(original))


def _check(place: _Place) -> None:
    found = _owner(place, place.name)
    if hasattr(found, "__sdpipeline__"):
        return
    if tuple(inspect.signature(found).parameters) != place.parameters:
        _refuse(place, f"takes {inspect.signature(found)}")


def _owner(place: _Place, *names: str) -> Any:
    """Return the module or class that holds a function, or the named attribute in it."""
    module, _, attribute = place.owner.partition(":")
    found: Any = importlib.import_module(module)
    for name in (attribute, *names) if attribute else names:
        found = getattr(found, name, None)
        if found is None:
            _refuse(place, "does not exist")
    return found


def _refuse(place: _Place, why: str) -> NoReturn:
    import prefect

    raise RuntimeError(
        f"sdpipeline cannot close the results of Prefect {prefect.__version__}: {place.owner}.{place.name} {why}. "
        "No flow is run: install a Prefect that this release of sdpipeline supports (pip install sdpipeline)"
    )


def _refusal(*, asynchronous: bool) -> Any:
    """Return a function that accepts any arguments, as a method or on a class, and raises ForeignResultError."""

    def refuse(*_arguments: object, **_named: object) -> NoReturn:
        raise ForeignResultError(MESSAGE)

    async def arefuse(*_arguments: object, **_named: object) -> NoReturn:
        raise ForeignResultError(MESSAGE)

    chosen: Any = arefuse if asynchronous else refuse
    chosen.__sdpipeline__ = True
    return staticmethod(chosen)


def _of_known_modules(original: Callable[[str], str]) -> Callable[[str], str]:
    """Wrap Prefect's check of a module's name, so that it imports only known modules."""

    def validate(value: str) -> str:
        if value not in SERIALIZERS:
            raise ValueError(f"{value!r} is not an allowed serializer module for results")
        return original(value)

    validate.__sdpipeline__ = True  # type: ignore[attr-defined]
    return validate
