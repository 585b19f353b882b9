"""Verification of database, storage and seals against each other."""

from __future__ import annotations

from sdpipeline.audit.archives import verify_archive
from sdpipeline.audit.campaigns import verify_campaigns
from sdpipeline.audit.chains import verify_chains, verify_newest, verify_seals, verify_stored_seal
from sdpipeline.audit.findings import Verification
from sdpipeline.audit.jobs import verify_jobs
from sdpipeline.audit.keys import PublicKeys, SealKey
from sdpipeline.audit.pictures import objects_of, verify_images, verify_objects
from sdpipeline.db import archives
from sdpipeline.db.connection import Database
from sdpipeline.storage import ObjectStore


def verify(
    database: Database,
    store: ObjectStore,
    key: SealKey | PublicKeys,
    *,
    sample: int | None = None,
) -> Verification:
    """Check every chain, seal, job row and picture; ``sample`` limits the pictures whose bytes are read.

    Workers may continue meanwhile: rows are compared as of one moment, storage afterwards.
    """
    found = Verification()
    with database.snapshot() as connection:
        replay = verify_chains(connection, found)
        found.gaps = replay.gaps
        sealed = verify_seals(connection, key, found, replay.lost)
        verify_jobs(connection, found, replay)
        verify_campaigns(connection, found, replay.campaigns)
        pictures, deleted_keys = verify_images(connection, found, replay, sample)
        archived = archives.archives(connection)
    for row in archived:
        of_archive = verify_archive(store, found, replay, row)
        found.skipped += len(of_archive) if sample is not None else 0
        found.images += len(of_archive) if sample is None else 0
        pictures += [each for picture in of_archive for each in objects_of(picture)] if sample is None else []
    for campaign_id, edition in set(replay.archived) - {(row["campaign_id"], row["edition"]) for row in archived}:
        found.fault("archive-missing", f"campaign:{campaign_id}", f"the archive of edition {edition!r} has no row")
    for row in sealed:
        verify_stored_seal(store, found, row)
    verify_newest(database, store, found)
    for deleted in deleted_keys:
        if store.versions(deleted):
            found.fault(
                "object-not-deleted", deleted, "the audit log says that it was deleted, but it is still in storage"
            )
    verify_objects(store, found, pictures)
    return found
