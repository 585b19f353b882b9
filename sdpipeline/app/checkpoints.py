"""Checkpoints of an installation: those that may run, those that are refused, and those that were approved."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from sdpipeline.campaigns.loader import Catalog
from sdpipeline.db import registry
from sdpipeline.db.connection import Database
from sdpipeline.demo.manifest import read_manifest
from sdpipeline.engine.checkpoints import WEIGHTS, CheckpointFiles, inspect
from sdpipeline.engine.hash_cache import HashCache
from sdpipeline.errors import CheckpointError
from sdpipeline.settings import Settings

BUILTIN_CHECKPOINTS = Path(__file__).parents[1] / "demo" / "checkpoints"

BUILTIN_LICENCE = "Apache-2.0"

HASH_CACHE = "checkpoint-hashes.json"
"""Cache of the hashes of unchanged weights, for commands that load no weights."""


def catalog(settings: Settings, database: Database | None = None) -> Catalog:
    """Return every checkpoint that a campaign may name: shipped, in the checkpoints folder, or already registered."""
    return inspect_all(settings, database, HashCache(settings.home / HASH_CACHE))[0]


def refused_checkpoints(settings: Settings, database: Database | None = None) -> dict[str, CheckpointError]:
    """Return the directories that look like checkpoints but are refused, by name, with the reason."""
    return inspect_all(settings, database, HashCache(settings.home / HASH_CACHE))[1]


def approved_checkpoints(settings: Settings, database: Database) -> list[CheckpointFiles]:
    """Return the approved checkpoints, oldest first; a link in SDP_CHECKPOINTS_DIR is resolved to its directory."""
    with database.read() as connection:
        known = registry.known(connection)
    return [
        replace(files, directory=files.directory.resolve()) if files.directory.parent == settings.checkpoints else files
        for files in known
    ]


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
    """Return the checkpoints of a folder by directory name, and the reasons why others are refused.

    A link to a directory is resolved once, here: the directory itself is registered and loaded.
    """
    known = but or {}
    approved = {files.directory for files in known.values()}
    found, refused = {}, {}
    for entry in sorted(folder.iterdir()) if folder.is_dir() else ():
        if not entry.is_dir() or entry in approved:
            continue
        name, directory = entry.name, entry.resolve() if entry.is_symlink() else entry
        if entry.is_symlink() and name in known and known[name].directory == directory:
            continue
        try:
            found[name] = inspect(name, directory, cache=cache)
        except CheckpointError as error:
            # `checkpoints add` downloads into hidden folders.
            if not name.startswith(".") and any(directory.rglob(f"*{WEIGHTS}")):
                refused[name] = error
    return found, refused
