"""Download of weights from a hub repository, at one pinned revision, safetensors only."""

from __future__ import annotations

import glob
import re
from collections.abc import Collection
from pathlib import Path

from sdpipeline.engine.allowed_classes import UNUSED_PARTS
from sdpipeline.engine.part_files import unused
from sdpipeline.engine.weight_files import INDEX, MATTERS
from sdpipeline.errors import CheckpointError

REPOSITORY = re.compile(r"[\w.-]+/[\w.-]+")
REVISION = re.compile(r"[0-9a-f]{40}")
_CARD = re.compile(r"(README\.md|LICEN[CS]E[^/]*)", re.IGNORECASE)


def fetch(repository: str, revision: str, folder: Path) -> Path:
    """Download the files that are loaded into ``folder``; raises CheckpointError, also if no hub can be reached.

    Only a full commit hash is accepted, because a branch or tag can be moved. Of weights in several forms, only the one
    that :mod:`sdpipeline.engine.part_files` chooses is downloaded, with the model card and the licence.
    """
    if not REVISION.fullmatch(revision):
        raise CheckpointError(f"revision {revision!r} of {repository} is not a full commit hash of 40 digits")
    try:
        from huggingface_hub import HfApi, snapshot_download
    except ModuleNotFoundError as error:
        raise CheckpointError(f"{repository}: pip install 'sdpipeline[engine]' to fetch from a hub") from error
    try:
        wanted = fetched_files(HfApi().list_repo_files(repository, revision=revision))
        patterns = [glob.escape(name) for name in wanted]
        found = snapshot_download(repository, revision=revision, local_dir=folder, allow_patterns=patterns)
    except Exception as error:  # errors of the connection are those of its HTTP library, which is no part of its API
        raise CheckpointError(f"{repository} at {revision[:12]} cannot be fetched: {error}") from error
    return Path(found)


def fetched_files(names: Collection[str]) -> list[str]:
    """Return the files of a repository that are downloaded, from the names of all."""
    visible = [name for name in names if not any(part.startswith(".") for part in name.split("/"))]
    ignored = unused(visible) | _of_unused_parts(visible)
    return sorted(
        name for name in visible if name not in ignored and (name.endswith(tuple(MATTERS)) or _CARD.fullmatch(name))
    )


def _of_unused_parts(names: Collection[str]) -> set[str]:
    return {name for name in names if INDEX in names and name.partition("/")[0] in UNUSED_PARTS and "/" in name}
