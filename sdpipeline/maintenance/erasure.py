"""Erasure: delete a subject's data on request, with a receipt.

Each deletion leaves a trace in the audit log. Objects are deleted first; one transaction then writes the tombstones and
their event. After a kill between the two, the next run finishes: an object that is missing counts as deleted.
"""

from __future__ import annotations

import re
import secrets
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field

from sdpipeline.archives import archiver
from sdpipeline.archives.archiver import Archived
from sdpipeline.db import retention
from sdpipeline.db.audit import AuditLog
from sdpipeline.db.retention import Held, Subject
from sdpipeline.domain import Json
from sdpipeline.storage import ObjectStore
from sdpipeline.storage.contract import delete_all
from sdpipeline.storage.keys import input_key, stem

BATCH = 200
"""Jobs in one transaction."""

_QUARANTINED = re.compile(r"quarantine/[^/]+/(?:[0-9a-f]{8}/)?((?:[^/]+/){3}[0-9a-f]{64}/)")


@dataclass(slots=True)
class Erasure:
    """Result of a subject's erasure. The receipt's salt proves that the log's ``subject_commitment`` is theirs."""

    subject: Subject
    jobs: int = 0
    pictures: int = 0
    inputs: int = 0
    objects: int = 0
    cancelled: int = 0
    sources: int = 0
    deleted_inputs: set[str] = field(default_factory=set)
    quarantined: dict[str, list[str]] = field(default_factory=dict)

    def document(self) -> Json:
        """Return the document that ``erase --json`` prints."""
        counts = ("jobs", "pictures", "inputs", "objects", "cancelled", "sources")
        receipt = {"salt": self.subject.salt, "subject_commitment": self.subject.commitment}
        return {name: getattr(self, name) for name in counts} | {"receipt": receipt}


def erase(
    audit: AuditLog, store: ObjectStore, seal: Callable[[], object], name: str, *, team: str, dry_run: bool = False
) -> Erasure:
    """Erase what a team's jobs hold of one subject; a run after a kill continues where the killed one ended."""
    subject = Subject(name=name, salt=secrets.token_hex(16))
    done = Erasure(subject)
    with audit.database.read() as connection:
        campaigns = retention.campaigns_of(connection, name, team=team)
        if dry_run:
            done.jobs, done.pictures = retention.extent(connection, name, team=team)
    if dry_run:
        archived = archiver.of_subject(audit, store, name, team=team)
        done.jobs += sum(len(each.jobs) for each in archived.editions)
        done.pictures += sum(len(each.pictures) for each in archived.editions)
        return done
    archiver.take_up(audit, store, seal, team=team)
    archived = archiver.of_subject(audit, store, name, team=team)
    if campaigns or archived.editions:
        done.quarantined = _quarantined(store)
    for campaign_id in campaigns:
        with audit.transaction() as tx:
            done.cancelled += retention.cancel_unfinished(tx, name, campaign_id=campaign_id)
        while jobs := _held(audit, name, campaign_id):
            _erase_jobs(audit, store, jobs, done, archived)
    for each in archived.editions:
        inputs = each.inputs - archived.inputs_of_others - done.deleted_inputs
        with audit.database.read() as connection:
            inputs -= retention.in_use_by_others(connection, inputs, name)
        _delete_folders(audit, store, each.folders, done, archived)
        with audit.database.read() as connection:
            shared = retention.keys_of_others(connection, each.folders, ()) | archived.shared(each.folders)
        for picture in each.pictures:
            if picture.key not in shared:
                done.objects += delete_all(store, stem(picture.key))
        done.pictures += archiver.erase(audit, store, each, subject, inputs)
        done.jobs += len(each.jobs)
        done.inputs += len(inputs)
        done.deleted_inputs |= inputs
    if touched := {*campaigns, *(each.row["campaign_id"] for each in archived.editions)}:
        with audit.transaction() as tx:
            done.sources = retention.drop_sources_naming(tx, subject, touched)
    return done


def _quarantined(store: ObjectStore) -> dict[str, list[str]]:
    """Return the keys that ``reconcile`` moved to the quarantine, by the folder that they came from."""
    found: dict[str, list[str]] = {}
    for key in store.list("quarantine/"):
        if place := _QUARANTINED.match(key):
            found.setdefault(place[1], []).append(key)
    return found


def _delete_folders(
    audit: AuditLog,
    store: ObjectStore,
    folders: Mapping[str, Collection[str]],
    done: Erasure,
    archived: Archived,
    *,
    owners: Collection[int] = (),
) -> None:
    """Delete all objects in the folders of these fingerprints, and those moved from there to the quarantine.

    Attempts may have left objects there that were never recorded: they hold the same data. Other jobs' pictures stay.
    """
    with audit.database.read() as connection:
        shared = retention.keys_of_others(connection, folders, owners) | archived.shared(folders)
        others = retention.wanted_by_others(connection, folders, done.subject.name)
    but = {stem(key) for key in shared}
    for fingerprint in sorted(folders.keys() - others):
        for folder in sorted(folders[fingerprint]):
            done.objects += delete_all(store, folder, but=but)
            for key in done.quarantined.pop(folder, ()):
                store.delete(key)
                done.objects += 1


def _held(audit: AuditLog, name: str, campaign_id: int) -> list[Held]:
    with audit.database.read() as connection:
        return retention.held(connection, name, campaign_id=campaign_id, limit=BATCH)


def _erase_jobs(audit: AuditLog, store: ObjectStore, jobs: Sequence[Held], done: Erasure, archived: Archived) -> None:
    subject, owners = done.subject, [job.id for job in jobs]
    named = set().union(*(job.inputs for job in jobs)) - archived.inputs_of_others
    with audit.database.read() as connection:
        pictures = retention.pictures_of(connection, owners)
        own = {picture.fingerprint for picture in pictures} | {job.fingerprint for job in jobs}
        shared = retention.keys_of_others(connection, own, owners) | archived.shared(own)
        inputs = named - done.deleted_inputs - retention.in_use_by_others(connection, named, subject.name)
    folders: dict[str, set[str]] = {}
    for job in jobs:
        for each in {job.fingerprint, *(picture.fingerprint for picture in pictures if picture.job_id == job.id)}:
            folders.setdefault(each, set()).add(job.folder(each))
    _delete_folders(audit, store, folders, done, archived, owners=owners)
    for picture in pictures:
        if picture.key not in shared:
            done.objects += delete_all(store, stem(picture.key))
    for digest in sorted(inputs):
        store.delete(input_key(digest))
    done.deleted_inputs |= inputs
    with audit.transaction() as tx:
        done.pictures += retention.mark_deleted(tx, pictures, because="erasure")
        done.jobs += retention.erase_subject(tx, owners, subject)
        if inputs:
            retention.record_input_deletion(tx, jobs[0].campaign_id, inputs, subject)
    done.inputs += len(inputs)
