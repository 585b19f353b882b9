"""Checkpoints of an installation: those that may run, those that are refused, and those that were approved."""

from __future__ import annotations

import os
import shlex
import stat
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from sdpipeline.app.model_card import ModelCard
from sdpipeline.campaigns.loader import Catalog
from sdpipeline.db import registry
from sdpipeline.db.connection import Database
from sdpipeline.demo.manifest import read_manifest
from sdpipeline.engine.checkpoints import WEIGHTS, CheckpointFiles, inspect, verify
from sdpipeline.engine.hash_cache import HashCache
from sdpipeline.engine.weight_files import FOREIGN, INDEX, MAX_FILES, PICKLES
from sdpipeline.errors import CheckpointError
from sdpipeline.settings import Settings

BUILTIN_CHECKPOINTS = Path(__file__).parents[1] / "demo" / "checkpoints"

BUILTIN_LICENCE = "Apache-2.0"

HASH_CACHE = "checkpoint-hashes.json"
"""Cache of the hashes of unchanged weights, for commands that load no weights."""

_WEIGHT_SUFFIXES = (frozenset({WEIGHTS}) | PICKLES | FOREIGN) - {".xml", ".npy", ".npz"}


def catalog(settings: Settings, database: Database | None = None) -> Catalog:
    """Return every checkpoint that a campaign may name: shipped, in the checkpoints folder, or already registered."""
    return inspect_all(settings, database, HashCache(settings.home / HASH_CACHE))[0]


def catalog_and_refused(
    settings: Settings, database: Database | None
) -> tuple[dict[str, CheckpointFiles], dict[str, CheckpointError]]:
    """Return :func:`catalog` and :func:`refused_checkpoints`, with every folder read only once."""
    return inspect_all(settings, database, HashCache(settings.home / HASH_CACHE))


def place_of(settings: Settings, alias: str) -> Path:
    """Return the path of a refused checkpoint."""
    own = settings.checkpoints / alias
    return own if os.path.lexists(own) else BUILTIN_CHECKPOINTS / alias


def shipped_card(directory: Path) -> ModelCard | None:
    """Return the licence and the source of a shipped checkpoint; None for any other directory."""
    if directory.parent != BUILTIN_CHECKPOINTS:
        return None
    return ModelCard(licence=BUILTIN_LICENCE, source="shipped with sdpipeline")


def refused_checkpoints(settings: Settings, database: Database | None = None) -> dict[str, CheckpointError]:
    """Return the directories that look like checkpoints but are refused, by name, with the reason."""
    return inspect_all(settings, database, HashCache(settings.home / HASH_CACHE))[1]


def approved_checkpoints(settings: Settings, database: Database) -> list[CheckpointFiles]:
    """Return the approved checkpoints, oldest first; a link in SDP_CHECKPOINTS_DIR is resolved to its directory."""
    with database.read() as connection:
        known = registry.known(connection)
    return [
        replace(files, directory=_resolved(files.directory))
        if files.directory.parent == settings.checkpoints
        else files
        for files in known
    ]


def as_approved_before(database: Database, files: CheckpointFiles) -> CheckpointFiles:
    """Return weights with the manifest of their earlier approval, if the directory still is exactly what was approved.

    Earlier releases counted files that are ignored now. A second approval of the same directory must not change the
    digest, because that would make the pictures of its campaigns anew.
    """
    with database.read() as connection:
        known = registry.known(connection)
    for old in known:
        if (old.alias, old.directory) != (files.alias, files.directory) or old.manifest == files.manifest:
            continue
        if not files.manifest.items() <= old.manifest.items():
            continue
        try:
            verify(old)
        except CheckpointError:
            continue
        return replace(files, digest=old.digest, manifest=old.manifest, size_bytes=old.size_bytes, ignored=old.ignored)
    return files


def _resolved(directory: Path) -> Path:
    try:
        return directory.resolve()
    except (OSError, RuntimeError):  # a loop of links: verification reports it
        return directory


def runnable_checkpoints(settings: Settings, database: Database | None) -> dict[str, CheckpointFiles]:
    """Return the checkpoints that may run, by digest: jobs keep their pinned weights when an alias changes."""
    approved = approved_checkpoints(settings, database) if database is not None else []
    return {files.digest: files for files in (*approved, *catalog(settings, database).values())}


def inspect_all(
    settings: Settings, database: Database | None, cache: HashCache
) -> tuple[dict[str, CheckpointFiles], dict[str, CheckpointError]]:
    """Return the checkpoints that a campaign may name, and the refused ones with the reason; both by alias."""
    known: dict[str, CheckpointFiles] = {}
    revoked: frozenset[str] = frozenset()
    expired: frozenset[tuple[str, str]] = frozenset()
    if database is not None:
        known = {files.alias: files for files in approved_checkpoints(settings, database)}
        with database.read() as connection:
            revoked, expired = registry.withdrawn(connection)
    # The shipped weights are small and change with the package; other approved weights stay as they were approved.
    approved = {alias: files for alias, files in known.items() if files.directory.parent != BUILTIN_CHECKPOINTS}
    shipped, refused = _inspected(BUILTIN_CHECKPOINTS, cache)
    for alias, why in _altered_shipped(shipped).items():
        refused[alias] = why
        del shipped[alias]
    found = {alias: _on_terms(files, known.get(alias)) for alias, files in shipped.items()}
    own, refused_own = _inspected(settings.checkpoints, cache, but=known)
    found |= own | approved
    running = {
        alias: files
        for alias, files in found.items()
        if files.digest not in revoked and (files.digest, alias) not in expired
    }
    return running, {alias: why for alias, why in (refused | refused_own).items() if alias not in running}


def _altered_shipped(shipped: Mapping[str, CheckpointFiles]) -> dict[str, CheckpointError]:
    """Return the shipped checkpoints that differ from those of this release."""
    released = read_manifest(BUILTIN_CHECKPOINTS)
    altered = {}
    for alias, files in shipped.items():
        differing = dict(files.manifest).items() ^ dict(released.get(alias, {})).items()
        if differing:
            name = min(differing)[0]
            altered[alias] = CheckpointError(
                f"checkpoint {alias!r}: {name} is not as shipped; install sdpipeline again"
            )
    return altered


def _on_terms(shipped: CheckpointFiles, approved: CheckpointFiles | None) -> CheckpointFiles:
    """Return shipped weights with their own licence, and the purposes and defaults approved for exactly these bytes.

    They have no native size and no detected defaults: releases before there were any used the same weights.
    """
    shipped = replace(shipped, licence=BUILTIN_LICENCE, native_size=None, defaults={})
    if approved is None or approved.digest != shipped.digest:
        return shipped
    return replace(
        shipped,
        licence=approved.licence or BUILTIN_LICENCE,
        purposes=approved.purposes,
        defaults=approved.defaults,
    )


def _inspected(
    folder: Path, cache: HashCache, *, but: Mapping[str, CheckpointFiles] | None = None
) -> tuple[dict[str, CheckpointFiles], dict[str, CheckpointError]]:
    """Return the checkpoints of a folder by directory name, and the reasons why other entries are refused.

    A link to a directory is resolved once, here: the directory itself is registered and loaded. Nothing in the folder
    stops the others: an entry that cannot be read is refused with the reason. Hidden entries are skipped, because
    `checkpoints add` downloads into hidden folders.
    """
    known = but or {}
    approved = {files.directory for files in known.values()}
    found: dict[str, CheckpointFiles] = {}
    refused: dict[str, CheckpointError] = {}
    try:
        entries = sorted(folder.iterdir()) if folder.is_dir() else []
    except OSError as error:
        return {}, {folder.name: CheckpointError(f"{folder} cannot be read: {error.strerror}; check its permissions")}
    for entry in entries:
        if entry.name.startswith(".") or entry in approved:
            continue
        try:
            if (directory := _directory(entry)) and not _is_link_to(directory, known.get(entry.name)):
                found[entry.name] = inspect(entry.name, directory, cache=cache)
        except CheckpointError as error:
            if not entry.is_symlink() and entry.is_dir() and not _holds_weights(entry):
                continue
            refused[entry.name] = error
    return found, refused


def _directory(entry: Path) -> Path | None:
    """Return the directory that an entry is or names; None for documents; CheckpointError for anything else."""
    try:
        if entry.is_symlink():
            entry = entry.resolve(strict=True)
        mode = entry.stat().st_mode
    except (OSError, RuntimeError) as error:
        why = getattr(error, "strerror", None) or str(error)
        raise CheckpointError(f"checkpoint {entry.name!r}: {entry} cannot be read: {why}; remove it") from error
    if stat.S_ISDIR(mode):
        return entry
    if stat.S_ISREG(mode):
        if entry.suffix.lower() not in _WEIGHT_SUFFIXES:
            return None
        raise CheckpointError(
            f"checkpoint {entry.name!r} is a single file; register it with `sdpipeline checkpoints add ALIAS "
            f"{shlex.quote(str(entry))}`, or put it into a folder of its own"
        )
    raise CheckpointError(f"checkpoint {entry.name!r}: {entry} is neither a folder nor a file; remove it")


def _is_link_to(directory: Path, known: CheckpointFiles | None) -> bool:
    return known is not None and known.directory == directory


def _holds_weights(directory: Path) -> bool:
    """Return True for a folder that somebody may take for a checkpoint: with weights of any kind, or unreadable."""
    unreadable: list[OSError] = []
    for n, (_, folders, files) in enumerate(os.walk(directory, onerror=unreadable.append)):
        names = [*folders, *files]  # a link to a folder is listed with the folders
        if n > MAX_FILES or any(name == INDEX or Path(name).suffix.lower() in _WEIGHT_SUFFIXES for name in names):
            return True
    return bool(unreadable)
