"""The schema, the same for SQLite and PostgreSQL. Times are seconds since 1970, UTC, as doubles."""

from __future__ import annotations

from sqlalchemy import (
    JSON,
    BigInteger,
    Boolean,
    Column,
    ColumnElement,
    Double,
    ForeignKey,
    Identity,
    Index,
    Integer,
    MetaData,
    SmallInteger,
    String,
    Table,
    Text,
    UniqueConstraint,
    literal_column,
    text,
)

READY: ColumnElement[str] = literal_column("'ready'")
LEASED: ColumnElement[str] = literal_column("'leased'")
WAITING: ColumnElement[str] = literal_column("'waiting'")
"""Literals, because a bound value cannot match a partial index under a generic plan."""

metadata = MetaData(
    naming_convention={
        "ix": "ix_%(table_name)s_%(column_0_N_name)s",
        "uq": "uq_%(table_name)s_%(column_0_N_name)s",
        "fk": "fk_%(table_name)s_%(column_0_N_name)s",
        "pk": "pk_%(table_name)s",
    }
)

# SQLite auto-increments only columns of the exact type INTEGER.
_Big = BigInteger().with_variant(Integer(), "sqlite")
_Hash = String(64)


def _id() -> Column[int]:
    return Column("id", _Big, Identity(), primary_key=True)


campaign = Table(
    "campaign",
    metadata,
    _id(),
    Column("team", String(63), nullable=False),
    Column("name", String(63), nullable=False),
    Column("status", String(12), nullable=False, server_default="active"),
    Column("priority", SmallInteger, nullable=False, server_default="100"),
    # The one pointer whose update publishes a version: workers see all of it or nothing.
    Column("version_id", _Big),
    # Spending limits (max_images, max_gpu_seconds, max_cost); chains with a number below ``admitted`` may begin.
    Column("budget", JSON),
    Column("admitted", BigInteger, nullable=False, server_default="0"),
    # Why the campaign paused itself; empty if a person paused it.
    Column("paused_because", Text),
    Column("created_at", Double, nullable=False),
    UniqueConstraint("team", "name"),
)

campaign_version = Table(
    "campaign_version",
    metadata,
    _id(),
    Column("campaign_id", ForeignKey("campaign.id"), nullable=False),
    Column("number", Integer, nullable=False),
    Column("source", Text, nullable=False),
    Column("source_sha256", _Hash, nullable=False),
    Column("jobs_added", Integer, nullable=False),
    Column("jobs_root", _Hash, nullable=False),
    Column("actor", String(200), nullable=False),
    Column("created_at", Double, nullable=False),
    UniqueConstraint("campaign_id", "number"),
)

# Jobs of one campaign and stage that may share a forward pass.
work_group = Table(
    "work_group",
    metadata,
    _id(),
    Column("campaign_id", ForeignKey("campaign.id"), nullable=False),
    Column("stage", String(63), nullable=False),
    Column("depth", SmallInteger, nullable=False),
    Column("batch_key", _Hash, nullable=False),
    Column("checkpoint_digest", _Hash, nullable=False),
    Column("description", JSON, nullable=False),
    # How its pictures are delivered: {"reuse": bool, "quality": thresholds}. Changes no pixel.
    Column("rules", JSON, nullable=False, server_default="{}"),
    UniqueConstraint("campaign_id", "stage", "batch_key"),
    Index("ix_work_group_batch_key", "batch_key"),
)

# Cost of a campaign's attempts, including failed ones; one row per worker, so that completions do not wait for one
# another.
spending = Table(
    "spending",
    metadata,
    Column("campaign_id", ForeignKey("campaign.id"), primary_key=True),
    Column("group_id", ForeignKey("work_group.id"), primary_key=True),
    Column("worker_id", String(32), primary_key=True),
    Column("images", BigInteger, nullable=False),
    Column("size_bytes", BigInteger, nullable=False),
    Column("gpu_seconds", Double, nullable=False),
    Column("cost", Double, nullable=False),
)

lease = Table(
    "lease",
    metadata,
    Column("id", String(32), primary_key=True),
    Column("worker_id", String(32), nullable=False),
    Column("group_id", ForeignKey("work_group.id"), nullable=False),
    Column("created_at", Double, nullable=False),
    Column("expires_at", Double, nullable=False),
    Column("closed_at", Double),
)
Index(
    "ix_lease_open",
    lease.c.expires_at,
    postgresql_where=text("closed_at IS NULL"),
    sqlite_where=text("closed_at IS NULL"),
)
# Time of a group's last lease: every lease looks for the longest wait.
Index("ix_lease_group", lease.c.group_id, lease.c.created_at)

job = Table(
    "job",
    metadata,
    _id(),
    # No foreign keys: the submit that inserts a job has just locked or made its campaign and version, and checking
    # them again for each row would take a fifth of a submit's time.
    Column("campaign_id", _Big, nullable=False),
    Column("version_id", _Big, nullable=False),
    Column("group_id", ForeignKey("work_group.id"), nullable=False),
    Column("edition", String(63), nullable=False, server_default=""),
    Column("stage", String(63), nullable=False),
    Column("depth", SmallInteger, nullable=False),
    Column("row_key", Text, nullable=False),
    Column("variables", JSON, nullable=False),
    # The variables that belong to the identity; a table's row is identified by its key instead.
    Column("axes", JSON, nullable=False),
    Column("seed", BigInteger, nullable=False),
    Column("identity", _Hash, nullable=False),
    Column("fingerprint", _Hash, nullable=False),
    Column("request", JSON, nullable=False),
    # Hashed together with the job's values into audit events; deleting it erases what they commit to.
    Column("salt", String(32), nullable=False),
    Column("status", String(12), nullable=False),
    Column("priority", SmallInteger, nullable=False, server_default="100"),
    Column("attempt", SmallInteger, nullable=False, server_default="0"),
    Column("max_attempts", SmallInteger, nullable=False, server_default="3"),
    # Set after a lease expired with this job in it: it is leased alone, so that a poison job costs no neighbours.
    Column("alone", Boolean, nullable=False, server_default=text("false")),
    Column("parents_left", SmallInteger, nullable=False, server_default="0"),
    # The number of its chain if the campaign has a budget: a job without parents or back-off is held until its chain
    # may be begun.
    Column("chain", BigInteger),
    # The person whose data it holds, from the campaign's `subject`; erasing it empties this column too.
    Column("subject", Text),
    # Time when its request was erased.
    Column("erased_at", Double),
    Column("not_before", Double),
    Column("lease_id", ForeignKey("lease.id")),
    Column("error_kind", String(63)),
    Column("error", Text),
    Column("created_at", Double, nullable=False),
    Column("finished_at", Double),
    UniqueConstraint("campaign_id", "identity"),
    Index("ix_job_fingerprint", "fingerprint"),
    Index("ix_job_campaign_status", "campaign_id", "status"),
)
# Status literals, never bound values: a bound value cannot match a partial index under a generic plan.
for _name, _columns, _where in (
    ("ix_job_ready", (job.c.group_id, job.c.priority, job.c.id), "status = 'ready'"),
    ("ix_job_leased", (job.c.lease_id,), "status = 'leased'"),
    ("ix_job_waiting", (job.c.not_before,), "status = 'waiting' AND not_before IS NOT NULL"),
    (
        "ix_job_chain",
        (job.c.campaign_id, job.c.chain),
        "chain IS NOT NULL AND status IN ('waiting', 'ready', 'leased')",
    ),
    ("ix_job_subject", (job.c.subject,), "subject IS NOT NULL"),
):
    Index(_name, *_columns, postgresql_where=text(_where), sqlite_where=text(_where))

job_parent = Table(
    "job_parent",
    metadata,
    Column("job_id", ForeignKey("job.id"), primary_key=True),
    Column("parent_id", ForeignKey("job.id"), primary_key=True),
    Index("ix_job_parent_parent_id", "parent_id"),
)

attempt = Table(
    "attempt",
    metadata,
    Column("job_id", ForeignKey("job.id"), primary_key=True),
    Column("lease_id", ForeignKey("lease.id"), primary_key=True),
    Column("number", SmallInteger, nullable=False),
    Column("worker_id", String(32), nullable=False),
    Column("started_at", Double, nullable=False),
    Column("finished_at", Double),
    Column("outcome", String(12)),
    Column("error_kind", String(63)),
    Column("error", Text),
    # GPU-seconds of the attempt, and their cost at the deployment's price.
    Column("gpu_seconds", Double),
    Column("cost", Double),
    # Names the folder in which it may have left objects, even after the job's fingerprint changed.
    Column("fingerprint", _Hash),
    Index("ix_attempt_lease_id", "lease_id"),
)

LOOKS = ("look_1", "look_2", "look_3", "look_4")

# A job's picture is the one with the job's present fingerprint; older ones are kept for when a file is changed back.
image = Table(
    "image",
    metadata,
    Column("job_id", ForeignKey("job.id"), primary_key=True),
    Column("fingerprint", _Hash, primary_key=True),
    Column("attempt", SmallInteger, nullable=False),
    Column("key", Text, nullable=False),
    Column("url", Text, nullable=False),
    Column("sha256", _Hash, nullable=False),
    Column("pixels_sha256", _Hash, nullable=False),
    Column("size_bytes", BigInteger, nullable=False),
    Column("version_id", Text),
    Column("width", Integer, nullable=False),
    Column("height", Integer, nullable=False),
    Column("sidecar_key", Text, nullable=False),
    Column("sidecar_sha256", _Hash, nullable=False),
    Column("gpu_seconds", Double, nullable=False),
    Column("timings", JSON, nullable=False),
    # Quality metrics: sharpness, perceptual_hash, edge_agreement.
    Column("scores", JSON, nullable=False, server_default="{}"),
    # The key of the picture that this one is a byte copy of.
    Column("reused_from", Text),
    # Time when it was deleted from storage; the row stays as its tombstone.
    Column("deleted_at", Double),
    Column("worker_id", String(32), nullable=False),
    Column("created_at", Double, nullable=False),
    # The perceptual hash in four numbers of 16 bits; a copy has none, because it is found through its original.
    *(Column(name, Integer) for name in LOOKS),
    Index("ix_image_fingerprint", "fingerprint"),
)
for _name, _look in (("pixels_sha256", LOOKS[0]), *((name, name) for name in LOOKS)):
    _where = f"{_look} IS NOT NULL"
    Index(f"ix_image_{_name}", image.c[_name], postgresql_where=text(_where), sqlite_where=text(_where))

# Pictures with sidecars in storage that no job has, because a restored backup lacks them. Each waits for its job, which
# may come only with the next submit. Then it is recorded as that job's picture, and its row is deleted.
found_picture = Table(
    "found_picture",
    metadata,
    Column("sidecar_key", Text, primary_key=True),
    Column("team", String(63), nullable=False),
    Column("campaign", String(63), nullable=False),
    Column("stage", String(63), nullable=False),
    Column("fingerprint", _Hash, nullable=False),
    # The start of the job's identity, which is the only part in the name of a copy's folder.
    Column("identity_start", String(16), nullable=False),
    Column("key", Text, nullable=False),
    Column("stored", JSON, nullable=False),
    Column("attempt", SmallInteger, nullable=False),
    Column("worker_id", String(32), nullable=False),
    # Of two pictures of one job, the one that others were made from counts, else the newer one.
    Column("consumed", Boolean, nullable=False, server_default=text("false")),
    Column("made_at", String(40), nullable=False),
    Index("ix_found_picture_owner", "team", "campaign", "fingerprint"),
)

# Closed editions that were moved out of the tables above. Their private part is in a separate object, which can be
# deleted; the archive itself holds no personal data.
archive = Table(
    "archive",
    metadata,
    Column("campaign_id", ForeignKey("campaign.id"), primary_key=True),
    Column("edition", String(63), primary_key=True),
    Column("key", Text, nullable=False),
    Column("sha256", _Hash, nullable=False),
    Column("version_id", Text),
    Column("private_key", Text),
    Column("private_sha256", _Hash),
    # An older private object that is still to be deleted.
    Column("private_left", Text),
    Column("first_job", BigInteger, nullable=False),
    Column("last_job", BigInteger, nullable=False),
    # Time when its last job ended, and time when its last picture was deleted from storage.
    Column("newest_at", Double, nullable=False),
    Column("pictures_deleted_at", Double),
    Column("created_at", Double, nullable=False),
)

# The newest row of an alias is its current meaning; older ones are its history. A digest is revoked as a whole.
checkpoint = Table(
    "checkpoint",
    metadata,
    Column("digest", _Hash, primary_key=True),
    Column("alias", String(63), primary_key=True),
    Column("kind", String(31), nullable=False),
    Column("family", String(31), nullable=False),
    Column("location", Text, nullable=False),
    Column("scale", SmallInteger, nullable=False, server_default="1"),
    Column("size_bytes", BigInteger, nullable=False),
    Column("manifest", JSON, nullable=False),
    # NULL in rows of releases before migration 0005: the weights keep the defaults of their family.
    Column("native_size", Integer),
    Column("defaults", JSON),
    Column("origin_sha256", _Hash),
    # Names of files that lie next to the approved ones and that no loader opens; NULL if there are none.
    Column("ignored", JSON),
    Column("source", Text),
    Column("licence", Text),
    Column("purposes", JSON, nullable=False),
    Column("approved_by", String(200), nullable=False),
    Column("created_at", Double, nullable=False),
    Column("expires_at", Double),
    Column("revoked_at", Double),
    Column("revoked_because", Text),
)

# Every set of weights that a group uses: the base, ControlNets, adapters.
group_checkpoint = Table(
    "group_checkpoint",
    metadata,
    Column("group_id", ForeignKey("work_group.id"), primary_key=True),
    Column("digest", _Hash, primary_key=True),
    Index("ix_group_checkpoint_digest", "digest"),
)

worker = Table(
    "worker",
    metadata,
    Column("id", String(32), primary_key=True),
    Column("host", String(255), nullable=False),
    Column("pid", Integer, nullable=False),
    Column("device", String(63), nullable=False),
    Column("description", JSON, nullable=False),
    Column("started_at", Double, nullable=False),
    Column("seen_at", Double, nullable=False),
    Column("stopped_at", Double),
    Column("note", Text),
    # Set while the worker's circuit breaker is open because too much failed; the note gives the reason.
    Column("paused_at", Double),
)

# One chain per writer process. ``body`` holds the exact bytes that were hashed.
audit_event = Table(
    "audit_event",
    metadata,
    Column("writer_id", String(32), primary_key=True),
    Column("seq", BigInteger, primary_key=True),
    Column("body", Text, nullable=False),
    Column("hash", _Hash, nullable=False),
    Column("subject", String(80), nullable=False),
    Index("ix_audit_event_subject", "subject"),
)

# The database login that each chain of events belongs to, kept by a trigger; empty on SQLite, which has no logins.
# ``login`` is NULL for a chain that ended before migration 0004; ``kind`` is "worker" or "sealer" for a login
# that may write that kind of event only.
audit_writer = Table(
    "audit_writer",
    metadata,
    Column("writer_id", String(32), primary_key=True),
    Column("login", Text),
    Column("kind", String(12)),
    Column("actor", Text),
    Column("worker_id", Text),
    Index("ix_audit_writer_worker_id", "worker_id"),
)

audit_seal = Table(
    "audit_seal",
    metadata,
    Column("number", Integer, primary_key=True, autoincrement=False),
    Column("body", Text, nullable=False),
    Column("signature", String(128), nullable=False),
    Column("hash", _Hash, nullable=False),
    Column("key", Text, nullable=False),
    Column("version_id", Text),
)

# The range of each chain that a seal covers, so that events themselves are never updated.
audit_seal_range = Table(
    "audit_seal_range",
    metadata,
    Column("number", ForeignKey("audit_seal.number"), primary_key=True),
    Column("writer_id", String(32), primary_key=True),
    Column("first_seq", BigInteger, nullable=False),
    Column("last_seq", BigInteger, nullable=False),
)
