"""Reconciliation of database and storage after a crash or a database restore."""

from __future__ import annotations

import hashlib
import secrets
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from functools import partial

from sdpipeline import audit
from sdpipeline.archives import contents
from sdpipeline.audit import SealKey
from sdpipeline.db import archives
from sdpipeline.db import audit as log_rows
from sdpipeline.db import reconcile as rows
from sdpipeline.db.audit import AuditLog
from sdpipeline.db.reconcile import Folder
from sdpipeline.domain import Json
from sdpipeline.errors import Mistake, ObjectMissingError, SettingsError
from sdpipeline.maintenance import restore
from sdpipeline.maintenance.restore import SIDECAR, THREADS, Adoption
from sdpipeline.provenance.record import control_maps_in
from sdpipeline.storage import ObjectStore
from sdpipeline.storage.keys import quarantine_folder, shared_stem

ADOPT = "sdpipeline reconcile --adopt"


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """Inconsistency left by a crash or a restore, with the action that repairs it."""

    kind: str
    subject: str
    detail: str
    action: str


@dataclass(slots=True)
class Reconciliation:
    """Findings of a reconciliation; ``ok`` is True if no work is left."""

    repair: bool
    faults: list[Finding] = field(default_factory=list)
    left: int = 0
    adoption: Adoption | None = None

    @property
    def ok(self) -> bool:
        """True if database and storage agree now."""
        return not self.left

    def found(self, kind: str, subject: str, detail: str, action: str) -> None:
        """Record a finding that ``--repair`` repairs."""
        self.left += not self.repair
        self.faults.append(Finding(kind=kind, subject=subject, detail=detail, action=action))

    def beyond_repair(self, kind: str, subject: str, detail: str, action: str) -> None:
        """Record a finding that needs a person's decision."""
        self.left += 1
        self.faults.append(Finding(kind=kind, subject=subject, detail=detail, action=action))

    def document(self) -> Json:
        """Return the document that ``reconcile --json`` prints."""
        faults = [{name: getattr(each, name) for name in Finding.__dataclass_fields__} for each in self.faults]
        adoption = self.adoption.document() if self.adoption else {}
        return {"ok": self.ok, "repaired": self.repair, "faults": faults} | adoption


def reconcile(
    log: AuditLog,
    store: ObjectStore,
    key: Callable[[], SealKey],
    *,
    grace_s: float,
    repair: bool = False,
    adopt: bool = False,
) -> Reconciliation:
    """Compare the database with storage; change nothing without ``repair`` or ``adopt``.

    Workers may keep running: their current jobs and objects younger than ``grace_s`` are left alone.
    Raises SettingsError if storage does not belong to this database.
    """
    done, database = Reconciliation(repair), log.database
    _refuse_another_storage(log, store)
    gap = audit.find_gap(database, store)
    if adopt:
        done.adoption = restore.adopt(log, store, key(), gap)
        for sidecar, why in done.adoption.refused:
            done.beyond_repair("record-refused", sidecar, why, "it was not adopted")
    elif gap is not None:
        # All other findings would follow from this one, and repairing them would quarantine what is to be adopted.
        seals = f"seals {gap.first_seal} to {gap.last_seal} of storage"
        detail = f"it lacks at least {gap.events} events that {seals} cover: it is a restored backup"
        done.beyond_repair("database-too-old", "database", detail, f"stop the workers, then: {ADOPT}")
        return done
    _leases(log, done)
    _recorded(log, store, done)
    _pictureless(log, done)
    _unrecorded(log, store, done, datetime.now(UTC) - timedelta(seconds=grace_s))
    return done


def _refuse_another_storage(log: AuditLog, store: ObjectStore) -> None:
    """Raise SettingsError if storage lacks the newest seal: an unmounted folder looks as if all pictures were gone."""
    with log.database.read() as connection:
        newest = log_rows.last_seal(connection)
    if newest is not None and store.head(newest["key"]) is None:
        message = f"storage does not hold {newest['key']}, the newest seal of this database"
        raise SettingsError(Mistake(key="SDP_STORAGE_URL", message=message, fix="name this database's own storage"))


def _leases(log: AuditLog, done: Reconciliation) -> None:
    with log.database.read() as connection:
        stale, stranded, left_open = (
            rows.stale_leases(connection),
            rows.stranded(connection),
            rows.open_attempts(connection),
        )
    for each in stale:
        action = f"closed: its {each.jobs} jobs are leased again"
        done.found("lease-stale", f"lease:{each.lease_id}", each.because, action)
    for job_id in stranded:
        done.found("lease-stale", f"job:{job_id}", "it is leased, but its lease is closed", "made again")
    for job_id, lease_id in left_open:
        detail = f"its attempt under lease {lease_id} is open, and the job is not leased under it"
        done.found("attempt-open", f"job:{job_id}", detail, "ended as abandoned")
    if done.repair and (stale or stranded or left_open):
        with log.transaction() as tx:
            rows.reap(tx, [each.lease_id for each in stale])
            rows.reopen(tx, stranded)
            rows.end_attempts(tx)


def _pictureless(log: AuditLog, done: Reconciliation) -> None:
    with log.database.read() as connection:
        job_ids = rows.without_picture(connection)
    for job_id in job_ids:
        done.found("image-missing", f"job:{job_id}", "it succeeded, but no picture is recorded", "made again")
    if done.repair and job_ids:
        with log.transaction() as tx:
            rows.reopen(tx, job_ids)


# Recorded pictures.


def _recorded(log: AuditLog, store: ObjectStore, done: Reconciliation) -> None:
    """Check every recorded picture with its sidecar and control maps."""
    after: tuple[int, str] | None = None
    with ThreadPoolExecutor(THREADS) as threads:
        while True:
            with log.database.read() as connection:
                page = rows.page_of_pictures(connection, after)
            if not page:
                return
            for picture, damage in zip(page, threads.map(partial(_damage, store), page), strict=True):
                action = (
                    "made again" if picture["present"] else "its row is deleted: its job asks for another picture now"
                )
                for kind, key, detail in damage:
                    done.found(kind, key, f"{detail} (job {picture['job_id']})", action)
                if damage and done.repair:
                    _give_up(log, store, picture, because=damage[0][0])
            after = (page[-1]["job_id"], page[-1]["fingerprint"])


def _damage(store: ObjectStore, picture: Json) -> list[tuple[str, str, str]]:
    """Return (kind, key, detail) for each part of a picture that is missing in storage or differs from its record."""
    found: list[tuple[str, str, str]] = []
    _checked(store, picture["key"], picture["sha256"], found)
    sidecar = _checked(store, picture["sidecar_key"], picture["sidecar_sha256"], found)
    for control_map in control_maps_in(sidecar) if sidecar is not None else ():
        _checked(store, control_map.key, control_map.sha256, found)
    return found


def _checked(store: ObjectStore, key: str, sha256: str, found: list[tuple[str, str, str]]) -> bytes | None:
    try:
        data = store.get(key)
    except ObjectMissingError:
        found.append(("object-missing", key, "it is not in storage"))
        return None
    if hashlib.sha256(data).hexdigest() != sha256:
        found.append(("object-altered", key, "its bytes do not hash to the recorded SHA-256"))
        return None
    return data


def _give_up(log: AuditLog, store: ObjectStore, picture: Json, *, because: str) -> None:
    """Quarantine the remains of a picture and reopen its job.

    Until the last step, the next run finds the picture damaged again.
    """
    job_id, stem = picture["job_id"], picture["key"].rsplit(".", 1)[0]
    keys = list(store.list(f"{stem}."))
    with log.database.read() as connection:
        used = rows.still_used(connection, keys, picture["fingerprint"], but_of=job_id)
    _quarantine(log, store, job_id, [key for key in keys if key not in used])
    with log.transaction() as tx:
        if rows.delete_picture(tx, picture, because=because) and picture["present"]:
            rows.reopen(tx, [job_id])


# Unrecorded objects.


def _unrecorded(log: AuditLog, store: ObjectStore, done: Reconciliation, before: datetime) -> None:
    """Find unrecorded objects in the folders of attempts that did not finish.

    All other folders hold only recorded objects, however many there are.
    """
    with log.database.read() as connection:
        folders = rows.unfinished_folders(connection)
        editions = archives.archives(connection) if folders else []
    made = {folder.fingerprint for folder in folders}
    archived = {shared_stem(each["key"]) for each in contents.pictures(store, editions) if each["fingerprint"] in made}
    instead = f", or {ADOPT}" if done.adoption is None else ""
    for folder in folders:
        orphans = [key for key in _orphans(log, store, folder, before) if shared_stem(key) not in archived]
        for key in orphans:
            record = SIDECAR.fullmatch(key) is not None
            kind, what = ("record-unknown", "a sidecar") if record else ("object-orphan", "an object")
            detail = f"{what} without a row, of an attempt of job {folder.job_id} that did not finish"
            done.found(kind, key, detail, "quarantined" if done.repair or not record else f"quarantined{instead}")
        if done.repair:
            _quarantine(log, store, folder.job_id, orphans)


def _orphans(log: AuditLog, store: ObjectStore, folder: Folder, before: datetime) -> Iterator[str]:
    keys = list(store.list(f"{folder.prefix}/"))
    if not keys:
        return
    with log.database.read() as connection:
        used = rows.still_used(connection, keys, folder.fingerprint)
    for key in keys:
        if key in used:
            continue
        about = store.head(key)
        if about is not None and (about.stored_at is None or about.stored_at <= before):
            yield key


def _quarantine(log: AuditLog, store: ObjectStore, job_id: int, keys: list[str]) -> None:
    """Write the audit event, then move objects to the quarantine; nothing is deleted."""
    if not keys:
        return
    today = quarantine_folder(datetime.now(UTC))
    moved = [(key, _free(store, today, key)) for key in keys]
    with log.transaction() as tx:
        rows.record_quarantine(tx, job_id, moved)
    for key, to in moved:
        store.move(key, to)


def _free(store: ObjectStore, folder: str, key: str) -> str:
    """Return an unused key in quarantine: the same object may be damaged twice in a day."""
    taken = store.head(f"{folder}/{key}") is not None
    return f"{folder}/{secrets.token_hex(4)}/{key}" if taken else f"{folder}/{key}"
