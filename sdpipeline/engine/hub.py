"""Download of weights from a hub repository, at one pinned revision, safetensors only."""

from __future__ import annotations

import re
from pathlib import Path

from sdpipeline.engine.checkpoints import MATTERS
from sdpipeline.errors import CheckpointError

REPOSITORY = re.compile(r"[\w.-]+/[\w.-]+")
REVISION = re.compile(r"[0-9a-f]{40}")


def fetch(repository: str, revision: str, folder: Path) -> Path:
    """Download the relevant files into ``folder``; raises CheckpointError, also if no hub can be reached.

    Only a full commit hash is accepted, because a branch or tag can be moved.
    """
    if not REVISION.fullmatch(revision):
        raise CheckpointError(f"revision {revision!r} of {repository} is not a full commit hash of 40 digits")
    try:
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled
    except ModuleNotFoundError as error:
        raise CheckpointError(f"{repository}: pip install 'sdpipeline[engine]' to fetch from a hub") from error
    patterns = [f"*{suffix}" for suffix in sorted(MATTERS)]
    try:
        found = snapshot_download(repository, revision=revision, local_dir=folder, allow_patterns=patterns)
    except (HfHubHTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled, OSError, ValueError) as error:
        raise CheckpointError(f"{repository} at {revision[:12]} cannot be fetched: {error}") from error
    return Path(found)
