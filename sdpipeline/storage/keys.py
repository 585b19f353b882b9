"""Object keys: the layout of everything in storage, below the prefix of SDP_STORAGE_URL.

{team}/{campaign}/{stage}/{fingerprint}/{sha256}.{ext}        a picture
{team}/{campaign}/{stage}/{fingerprint}/{identity}/{sha256}.… a byte copy of one, in the same campaign and stage
… .{lease}.json, … .control-{n}.png                           its sidecar and control maps
inputs/{sha256}                                               an input from outside
archive/{team}/{campaign}/{edition}.…                         an archived edition
audit/seals/{number}.json                                     a seal of the audit log
quarantine/{date}/{key}                                       an object that ``reconcile`` moved away
"""

from __future__ import annotations

from datetime import datetime
from pathlib import PurePosixPath

LEASE_CHARACTERS = 8
IDENTITY_CHARACTERS = 16
SHA256_CHARACTERS = 16


def picture_folder(*, team: str, campaign: str, stage: str, fingerprint: str) -> str:
    """Return the folder of all pictures of one fingerprint in one stage, without a slash at its end."""
    return f"{team}/{campaign}/{stage}/{fingerprint}"


def copy_folder(folder: str, identity: str) -> str:
    """Return the folder of a job's byte copy, below the folder of its fingerprint."""
    return f"{folder}/{identity[:IDENTITY_CHARACTERS]}"


def picture_stem(folder: str, sha256: str) -> str:
    """Return the common beginning of the keys of a picture, its sidecar and its control maps."""
    return f"{folder}/{sha256}"


def picture_key(stem: str, extension: str) -> str:
    """Key of a picture; ``extension`` is png, jpg or webp."""
    return f"{stem}.{extension}"


def sidecar_key(stem: str, lease_id: str) -> str:
    """Return the key of the sidecar that one attempt wrote."""
    return f"{stem}.{lease_id[:LEASE_CHARACTERS]}.json"


def control_map_key(stem: str, number: int) -> str:
    """Return the key of a picture's control map; ``number`` counts from 0."""
    return f"{stem}.control-{number}.png"


def moved_to(folder: str, key: str) -> str:
    """Return the key of an object of the same name in another folder."""
    return f"{folder}/{PurePosixPath(key).name}"


def stem(key: str) -> str:
    """Return a picture's key without its extension; its sidecars and control maps begin with it too."""
    return key.rpartition(".")[0]


def shared_stem(key: str) -> str:
    """Return the common beginning of the keys of a picture, its sidecars and its control maps, from any of them."""
    folder, _, name = key.rpartition("/")
    return f"{folder}/{name.partition('.')[0]}"


def input_key(sha256: str) -> str:
    """Return the key of an input from outside."""
    return f"inputs/{sha256}"


def archive_stem(*, team: str, campaign: str, edition: str | None) -> str:
    """Return the beginning of the keys of an archived edition; the edition without a name is ``_``."""
    return f"archive/{team}/{campaign}/{edition or '_'}"


def archive_key(stem: str, *, sha256: str = "") -> str:
    """Return the key of an edition's permanent part; with its SHA-256 if the plain key is taken."""
    return f"{stem}.{sha256[:SHA256_CHARACTERS]}.jsonl.gz" if sha256 else f"{stem}.jsonl.gz"


def private_archive_key(stem: str, sha256: str) -> str:
    """Return the key of an edition's private part, which erasure replaces."""
    return f"{stem}.{sha256[:SHA256_CHARACTERS]}.private.jsonl.gz"


def seal_object_key(number: int) -> str:
    """Return the key of a seal of the audit log."""
    return f"audit/seals/{number:08d}.json"


def quarantine_folder(day: datetime) -> str:
    """Return the folder of all objects quarantined on one day."""
    return f"quarantine/{day:%Y-%m-%d}"
