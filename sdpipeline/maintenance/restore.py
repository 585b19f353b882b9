"""Recovery after a database restore: re-register images from sidecars and record the audit gap."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from itertools import islice
from typing import TypeVar

from sdpipeline import audit, provenance
from sdpipeline.archives import archiver, contents
from sdpipeline.audit import Gap, SealKey
from sdpipeline.db import archives, restore
from sdpipeline.db import reconcile as rows
from sdpipeline.db.audit import AuditLog
from sdpipeline.db.restore import FoundPicture
from sdpipeline.domain import Json, fingerprint
from sdpipeline.errors import InputImageError, ObjectMissingError
from sdpipeline.jobs import StoredImage
from sdpipeline.provenance import LARGEST_PICTURE
from sdpipeline.provenance.record import SIDECAR_SCHEMAS, Record, Sidecar
from sdpipeline.provenance.untrusted import SHAPE_ERRORS, parse_object
from sdpipeline.storage import ObjectStore

CHUNK = 500
THREADS = 16

_T = TypeVar("_T")
_HASH = "[0-9a-f]{64}"
SIDECAR = re.compile(
    rf"(?P<team>[^/]+)/(?P<campaign>[^/]+)/(?P<stage>[^/]+)/(?P<fingerprint>{_HASH})/"
    rf"((?P<identity>[0-9a-f]{{16}})/)?(?P<sha256>{_HASH})\.[0-9a-f]{{8}}\.json"
)
"""Key of a sidecar; the folder of a copy names its job."""


@dataclass(slots=True)
class Adoption:
    """Result of an adoption. ``waiting`` counts pictures whose jobs are not in this database.

    The next submit that asks for such a picture finds it. ``refused`` holds sidecar keys with the reason for each.
    """

    adopted: int = 0
    waiting: int = 0
    gap: Gap | None = None
    refused: list[tuple[str, str]] = field(default_factory=list)

    def document(self) -> Json:
        """Return the adoption's part of ``reconcile --json``."""
        gap = self.gap.document() if self.gap else None
        return {"adopted": self.adopted, "waiting": self.waiting, "gap": gap}


def adopt(log: AuditLog, store: ObjectStore, key: SealKey, gap: Gap | None) -> Adoption:
    """Assign unrecorded pictures to their jobs; after a restore, then continue the audit log.

    With a gap, all of storage is searched, because nothing is known of the lost rows; without one, only folders of
    attempts that did not end in order. The function can be interrupted and repeated: until its last step, workers are
    kept out.
    """
    done, database = Adoption(gap=gap), log.database
    # Fails before anything is changed if the log cannot be continued.
    seals = audit.lost_seals(database, store, key, gap) if gap else []
    if gap:
        # The holders of these leases have lost them: the leases date from before the lost period.
        with log.transaction() as tx:
            rows.reap(tx, rows.open_leases(tx.connection))
        archiver.find_private(log, store)
    with database.read() as connection:
        folders = [] if gap else rows.unfinished_folders(connection)
        editions = archives.archives(connection) if gap or folders else []
    archived = {each["sidecar_key"] for each in contents.pictures(store, editions)}
    keys = store.list() if gap else (key for folder in folders for key in store.list(f"{folder.prefix}/"))
    _find(log, store, (key for key in keys if key not in archived), done)
    with database.read() as connection:
        owners = restore.campaigns_found(connection)
    for campaign_id in owners:
        with log.transaction() as tx:
            done.adopted += restore.claim(tx, campaign_id=campaign_id)
    if gap:
        with log.transaction() as tx:
            audit.bridge(tx, seals, gap)
    with database.read() as connection:
        done.waiting = restore.waiting(connection)
    return done


def _find(log: AuditLog, store: ObjectStore, keys: Iterable[str], done: Adoption) -> None:
    """Register every complete picture whose sidecar no row names."""
    consumed: set[str] = set()
    with ThreadPoolExecutor(THREADS) as threads:
        for chunk in _chunks((key, place["fingerprint"]) for key in keys if (place := SIDECAR.fullmatch(key))):
            with log.database.read() as connection:
                unknown = restore.unknown(connection, chunk)
            examined = list(threads.map(partial(_examined, store), unknown))
            for sidecar, each in zip(unknown, examined, strict=True):
                if isinstance(each, str):
                    done.refused.append((sidecar, each))
            whole = [each for each in examined if not isinstance(each, str)]
            consumed.update(*(from_stages for _, from_stages in whole))
            with log.database.write() as connection:
                restore.remember(connection, [picture for picture, _ in whole])
    for some in _chunks(sorted(consumed)):
        with log.database.write() as connection:
            restore.mark_consumed(connection, some)


def _chunks(items: Iterable[_T]) -> Iterator[list[_T]]:
    all_of_them = iter(items)
    while chunk := list(islice(all_of_them, CHUNK)):
        yield chunk


def _examined(store: ObjectStore, sidecar_key: str) -> tuple[FoundPicture, frozenset[str]] | str:
    """Return the picture of a sidecar with the keys of its inputs, or a description of what is wrong with it."""
    try:
        return examine(store, sidecar_key)
    except (InputImageError, ObjectMissingError) as error:
        return str(error)
    except SHAPE_ERRORS:
        return "it is not a sidecar written by this program"


def examine(store: ObjectStore, sidecar_key: str) -> tuple[FoundPicture, frozenset[str]]:
    """Read the picture of a sidecar and compare every part with what the others say of it.

    Raises ObjectMissingError or InputImageError if a part is missing or altered, and the errors of reading a document
    if the sidecar is not valid.
    """
    place = SIDECAR.fullmatch(sidecar_key)
    if place is None:
        raise InputImageError(f"{sidecar_key} is not a sidecar's key")
    sidecar_bytes = store.get(sidecar_key)
    sidecar = Sidecar.from_document(parse_object(sidecar_bytes))
    record, image = Record.from_document(sidecar.record), sidecar.object
    if sidecar.scores is None:
        raise InputImageError(f"{sidecar_key} has no scores: an earlier release wrote it")
    data = store.get(image.key)
    pixels = provenance.decode(data, max_pixels=LARGEST_PICTURE)
    stem = sidecar_key.rsplit(".", 2)[0]
    agree = (
        sidecar.schema in SIDECAR_SCHEMAS
        and image.key.startswith(f"{stem}.")
        and hashlib.sha256(data).hexdigest() == image.sha256 == place["sha256"]
        and provenance.pixels_sha256(pixels) == image.pixels_sha256
        and provenance.read_record(data) == provenance.disclosed(sidecar.record)
        and fingerprint(record.asked) == record.fingerprint == place["fingerprint"]
        and (bool(place["identity"]) == bool(sidecar.reused_from))
    )
    if not agree or not all(_has(store, each.key, each.sha256) for each in sidecar.control_maps):
        raise InputImageError(f"{image.key} and its sidecar do not agree")
    height, width = pixels.shape[:2]
    stored = StoredImage(
        key=image.key,
        url=store.url(image.key),
        sha256=image.sha256,
        pixels_sha256=image.pixels_sha256,
        size_bytes=len(data),
        version_id=image.version_id,
        width=width,
        height=height,
        sidecar_key=sidecar_key,
        sidecar_sha256=hashlib.sha256(sidecar_bytes).hexdigest(),
        gpu_seconds=0.0 if sidecar.reused_from else sidecar.timings["generate_s"],
        timings=dict(sidecar.timings),
        reused_from=sidecar.reused_from.key if sidecar.reused_from else None,
        scores=dict(sidecar.scores),
    )
    found = FoundPicture(
        team=place["team"],
        campaign=place["campaign"],
        stage=place["stage"],
        fingerprint=place["fingerprint"],
        identity_start=place["identity"] or record.identity[:16],
        stored=stored,
        attempt=sidecar.attempt,
        worker_id=sidecar.worker,
        made_at=record.made_at,
    )
    return found, frozenset(each["key"] for each in record.inputs.values() if "stage" in each)


def _has(store: ObjectStore, key: str, sha256: str) -> bool:
    return hashlib.sha256(store.get(key)).hexdigest() == sha256
