"""Create the first schema."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0001"
down_revision = None


def upgrade() -> None:
    op.create_table(
        "audit_event",
        sa.Column("writer_id", sa.String(length=32), nullable=False),
        sa.Column("seq", sa.BigInteger(), nullable=False),
        sa.Column("body", sa.Text(), nullable=False),
        sa.Column("hash", sa.String(length=64), nullable=False),
        sa.Column("subject", sa.String(length=80), nullable=False),
        sa.PrimaryKeyConstraint("writer_id", "seq", name=op.f("pk_audit_event")),
    )
    op.create_index("ix_audit_event_subject", "audit_event", ["subject"], unique=False)
    op.create_table(
        "audit_seal",
        sa.Column("number", sa.Integer(), autoincrement=False, nullable=False),
        sa.Column("body", sa.Text(), nullable=False),
        sa.Column("signature", sa.String(length=128), nullable=False),
        sa.Column("hash", sa.String(length=64), nullable=False),
        sa.Column("key", sa.Text(), nullable=False),
        sa.Column("version_id", sa.Text(), nullable=True),
        sa.PrimaryKeyConstraint("number", name=op.f("pk_audit_seal")),
    )
    op.create_table(
        "campaign",
        sa.Column(
            "id", sa.BigInteger().with_variant(sa.Integer(), "sqlite"), sa.Identity(always=False), nullable=False
        ),
        sa.Column("team", sa.String(length=63), nullable=False),
        sa.Column("name", sa.String(length=63), nullable=False),
        sa.Column("status", sa.String(length=12), server_default="active", nullable=False),
        sa.Column("priority", sa.SmallInteger(), server_default="100", nullable=False),
        sa.Column("version_id", sa.BigInteger().with_variant(sa.Integer(), "sqlite"), nullable=True),
        sa.Column("created_at", sa.Double(), nullable=False),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_campaign")),
        sa.UniqueConstraint("team", "name", name=op.f("uq_campaign_team_name")),
    )
    op.create_table(
        "checkpoint",
        sa.Column("digest", sa.String(length=64), nullable=False),
        sa.Column("alias", sa.String(length=63), nullable=False),
        sa.Column("kind", sa.String(length=31), nullable=False),
        sa.Column("family", sa.String(length=31), nullable=False),
        sa.Column("location", sa.Text(), nullable=False),
        sa.Column("scale", sa.SmallInteger(), server_default="1", nullable=False),
        sa.Column("size_bytes", sa.BigInteger(), nullable=False),
        sa.Column("manifest", sa.JSON(), nullable=False),
        sa.Column("source", sa.Text(), nullable=True),
        sa.Column("licence", sa.Text(), nullable=True),
        sa.Column("purposes", sa.JSON(), nullable=False),
        sa.Column("approved_by", sa.String(length=200), nullable=False),
        sa.Column("created_at", sa.Double(), nullable=False),
        sa.Column("expires_at", sa.Double(), nullable=True),
        sa.Column("revoked_at", sa.Double(), nullable=True),
        sa.Column("revoked_because", sa.Text(), nullable=True),
        sa.PrimaryKeyConstraint("digest", "alias", name=op.f("pk_checkpoint")),
    )
    op.create_table(
        "input_image",
        sa.Column("sha256", sa.String(length=64), nullable=False),
        sa.Column("key", sa.Text(), nullable=False),
        sa.Column("name", sa.Text(), nullable=False),
        sa.Column("size_bytes", sa.BigInteger(), nullable=False),
        sa.Column("width", sa.Integer(), nullable=False),
        sa.Column("height", sa.Integer(), nullable=False),
        sa.Column("created_at", sa.Double(), nullable=False),
        sa.PrimaryKeyConstraint("sha256", name=op.f("pk_input_image")),
    )
    op.create_table(
        "worker",
        sa.Column("id", sa.String(length=32), nullable=False),
        sa.Column("host", sa.String(length=255), nullable=False),
        sa.Column("pid", sa.Integer(), nullable=False),
        sa.Column("device", sa.String(length=63), nullable=False),
        sa.Column("description", sa.JSON(), nullable=False),
        sa.Column("started_at", sa.Double(), nullable=False),
        sa.Column("seen_at", sa.Double(), nullable=False),
        sa.Column("stopped_at", sa.Double(), nullable=True),
        sa.Column("note", sa.Text(), nullable=True),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_worker")),
    )
    op.create_table(
        "audit_seal_range",
        sa.Column("number", sa.Integer(), nullable=False),
        sa.Column("writer_id", sa.String(length=32), nullable=False),
        sa.Column("first_seq", sa.BigInteger(), nullable=False),
        sa.Column("last_seq", sa.BigInteger(), nullable=False),
        sa.ForeignKeyConstraint(["number"], ["audit_seal.number"], name=op.f("fk_audit_seal_range_number")),
        sa.PrimaryKeyConstraint("number", "writer_id", name=op.f("pk_audit_seal_range")),
    )
    op.create_table(
        "campaign_version",
        sa.Column(
            "id", sa.BigInteger().with_variant(sa.Integer(), "sqlite"), sa.Identity(always=False), nullable=False
        ),
        sa.Column("campaign_id", sa.BigInteger().with_variant(sa.Integer(), "sqlite"), nullable=False),
        sa.Column("number", sa.Integer(), nullable=False),
        sa.Column("source", sa.Text(), nullable=False),
        sa.Column("source_sha256", sa.String(length=64), nullable=False),
        sa.Column("jobs_added", sa.Integer(), nullable=False),
        sa.Column("jobs_root", sa.String(length=64), nullable=False),
        sa.Column("actor", sa.String(length=200), nullable=False),
        sa.Column("created_at", sa.Double(), nullable=False),
        sa.ForeignKeyConstraint(["campaign_id"], ["campaign.id"], name=op.f("fk_campaign_version_campaign_id")),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_campaign_version")),
        sa.UniqueConstraint("campaign_id", "number", name=op.f("uq_campaign_version_campaign_id_number")),
    )
    op.create_table(
        "work_group",
        sa.Column(
            "id", sa.BigInteger().with_variant(sa.Integer(), "sqlite"), sa.Identity(always=False), nullable=False
        ),
        sa.Column("campaign_id", sa.BigInteger().with_variant(sa.Integer(), "sqlite"), nullable=False),
        sa.Column("stage", sa.String(length=63), nullable=False),
        sa.Column("depth", sa.SmallInteger(), nullable=False),
        sa.Column("batch_key", sa.String(length=64), nullable=False),
        sa.Column("checkpoint_digest", sa.String(length=64), nullable=False),
        sa.Column("description", sa.JSON(), nullable=False),
        sa.ForeignKeyConstraint(["campaign_id"], ["campaign.id"], name=op.f("fk_work_group_campaign_id")),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_work_group")),
        sa.UniqueConstraint(
            "campaign_id", "stage", "batch_key", name=op.f("uq_work_group_campaign_id_stage_batch_key")
        ),
    )
    op.create_table(
        "group_checkpoint",
        sa.Column("group_id", sa.BigInteger().with_variant(sa.Integer(), "sqlite"), nullable=False),
        sa.Column("digest", sa.String(length=64), nullable=False),
        sa.ForeignKeyConstraint(["group_id"], ["work_group.id"], name=op.f("fk_group_checkpoint_group_id")),
        sa.PrimaryKeyConstraint("group_id", "digest", name=op.f("pk_group_checkpoint")),
    )
    op.create_index("ix_group_checkpoint_digest", "group_checkpoint", ["digest"], unique=False)
    op.create_table(
        "lease",
        sa.Column("id", sa.String(length=32), nullable=False),
        sa.Column("worker_id", sa.String(length=32), nullable=False),
        sa.Column("group_id", sa.BigInteger().with_variant(sa.Integer(), "sqlite"), nullable=False),
        sa.Column("created_at", sa.Double(), nullable=False),
        sa.Column("expires_at", sa.Double(), nullable=False),
        sa.Column("closed_at", sa.Double(), nullable=True),
        sa.ForeignKeyConstraint(["group_id"], ["work_group.id"], name=op.f("fk_lease_group_id")),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_lease")),
    )
    op.create_index(
        "ix_lease_open",
        "lease",
        ["expires_at"],
        unique=False,
        postgresql_where=sa.text("closed_at IS NULL"),
        sqlite_where=sa.text("closed_at IS NULL"),
    )
    op.create_table(
        "job",
        sa.Column(
            "id", sa.BigInteger().with_variant(sa.Integer(), "sqlite"), sa.Identity(always=False), nullable=False
        ),
        sa.Column("campaign_id", sa.BigInteger().with_variant(sa.Integer(), "sqlite"), nullable=False),
        sa.Column("version_id", sa.BigInteger().with_variant(sa.Integer(), "sqlite"), nullable=False),
        sa.Column("group_id", sa.BigInteger().with_variant(sa.Integer(), "sqlite"), nullable=False),
        sa.Column("edition", sa.String(length=63), server_default="", nullable=False),
        sa.Column("stage", sa.String(length=63), nullable=False),
        sa.Column("depth", sa.SmallInteger(), nullable=False),
        sa.Column("row_key", sa.Text(), nullable=False),
        sa.Column("variables", sa.JSON(), nullable=False),
        sa.Column("axes", sa.JSON(), nullable=False),
        sa.Column("seed", sa.BigInteger(), nullable=False),
        sa.Column("identity", sa.String(length=64), nullable=False),
        sa.Column("fingerprint", sa.String(length=64), nullable=False),
        sa.Column("request", sa.JSON(), nullable=False),
        sa.Column("salt", sa.String(length=32), nullable=False),
        sa.Column("status", sa.String(length=12), nullable=False),
        sa.Column("priority", sa.SmallInteger(), server_default="100", nullable=False),
        sa.Column("attempt", sa.SmallInteger(), server_default="0", nullable=False),
        sa.Column("max_attempts", sa.SmallInteger(), server_default="3", nullable=False),
        sa.Column("alone", sa.Boolean(), server_default=sa.text("(false)"), nullable=False),
        sa.Column("parents_left", sa.SmallInteger(), server_default="0", nullable=False),
        sa.Column("not_before", sa.Double(), nullable=True),
        sa.Column("lease_id", sa.String(length=32), nullable=True),
        sa.Column("error_kind", sa.String(length=63), nullable=True),
        sa.Column("error", sa.Text(), nullable=True),
        sa.Column("created_at", sa.Double(), nullable=False),
        sa.Column("finished_at", sa.Double(), nullable=True),
        sa.ForeignKeyConstraint(["group_id"], ["work_group.id"], name=op.f("fk_job_group_id")),
        sa.ForeignKeyConstraint(["lease_id"], ["lease.id"], name=op.f("fk_job_lease_id")),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_job")),
        sa.UniqueConstraint("campaign_id", "identity", name=op.f("uq_job_campaign_id_identity")),
    )
    op.create_index("ix_job_campaign_status", "job", ["campaign_id", "status"], unique=False)
    op.create_index("ix_job_fingerprint", "job", ["fingerprint"], unique=False)
    op.create_index(
        "ix_job_leased",
        "job",
        ["lease_id"],
        unique=False,
        postgresql_where=sa.text("status = 'leased'"),
        sqlite_where=sa.text("status = 'leased'"),
    )
    op.create_index(
        "ix_job_ready",
        "job",
        ["group_id", "priority", "id"],
        unique=False,
        postgresql_where=sa.text("status = 'ready'"),
        sqlite_where=sa.text("status = 'ready'"),
    )
    op.create_index(
        "ix_job_waiting",
        "job",
        ["not_before"],
        unique=False,
        postgresql_where=sa.text("status = 'waiting' AND not_before IS NOT NULL"),
        sqlite_where=sa.text("status = 'waiting' AND not_before IS NOT NULL"),
    )
    op.create_table(
        "attempt",
        sa.Column("job_id", sa.BigInteger().with_variant(sa.Integer(), "sqlite"), nullable=False),
        sa.Column("lease_id", sa.String(length=32), nullable=False),
        sa.Column("number", sa.SmallInteger(), nullable=False),
        sa.Column("worker_id", sa.String(length=32), nullable=False),
        sa.Column("started_at", sa.Double(), nullable=False),
        sa.Column("finished_at", sa.Double(), nullable=True),
        sa.Column("outcome", sa.String(length=12), nullable=True),
        sa.Column("error_kind", sa.String(length=63), nullable=True),
        sa.Column("error", sa.Text(), nullable=True),
        sa.ForeignKeyConstraint(["job_id"], ["job.id"], name=op.f("fk_attempt_job_id")),
        sa.ForeignKeyConstraint(["lease_id"], ["lease.id"], name=op.f("fk_attempt_lease_id")),
        sa.PrimaryKeyConstraint("job_id", "lease_id", name=op.f("pk_attempt")),
    )
    op.create_index("ix_attempt_lease_id", "attempt", ["lease_id"], unique=False)
    op.create_table(
        "image",
        sa.Column("job_id", sa.BigInteger().with_variant(sa.Integer(), "sqlite"), nullable=False),
        sa.Column("fingerprint", sa.String(length=64), nullable=False),
        sa.Column("attempt", sa.SmallInteger(), nullable=False),
        sa.Column("key", sa.Text(), nullable=False),
        sa.Column("url", sa.Text(), nullable=False),
        sa.Column("sha256", sa.String(length=64), nullable=False),
        sa.Column("pixels_sha256", sa.String(length=64), nullable=False),
        sa.Column("size_bytes", sa.BigInteger(), nullable=False),
        sa.Column("version_id", sa.Text(), nullable=True),
        sa.Column("width", sa.Integer(), nullable=False),
        sa.Column("height", sa.Integer(), nullable=False),
        sa.Column("sidecar_key", sa.Text(), nullable=False),
        sa.Column("sidecar_sha256", sa.String(length=64), nullable=False),
        sa.Column("gpu_seconds", sa.Double(), nullable=False),
        sa.Column("timings", sa.JSON(), nullable=False),
        sa.Column("worker_id", sa.String(length=32), nullable=False),
        sa.Column("created_at", sa.Double(), nullable=False),
        sa.ForeignKeyConstraint(["job_id"], ["job.id"], name=op.f("fk_image_job_id")),
        sa.PrimaryKeyConstraint("job_id", "fingerprint", name=op.f("pk_image")),
    )
    op.create_index("ix_image_fingerprint", "image", ["fingerprint"], unique=False)
    op.create_table(
        "job_parent",
        sa.Column("job_id", sa.BigInteger().with_variant(sa.Integer(), "sqlite"), nullable=False),
        sa.Column("parent_id", sa.BigInteger().with_variant(sa.Integer(), "sqlite"), nullable=False),
        sa.ForeignKeyConstraint(["job_id"], ["job.id"], name=op.f("fk_job_parent_job_id")),
        sa.ForeignKeyConstraint(["parent_id"], ["job.id"], name=op.f("fk_job_parent_parent_id")),
        sa.PrimaryKeyConstraint("job_id", "parent_id", name=op.f("pk_job_parent")),
    )
    op.create_index("ix_job_parent_parent_id", "job_parent", ["parent_id"], unique=False)
    if op.get_context().dialect.name == "postgresql":
        _tune_hot_tables()


def _tune_hot_tables() -> None:
    """Reserve room for in-place updates in tables that change often, and vacuum long before a fifth of rows is dead."""
    for table in ("job", "lease", "attempt"):
        op.execute(
            f"ALTER TABLE {table} SET (fillfactor = 80, autovacuum_vacuum_scale_factor = 0.01,"
            " autovacuum_vacuum_threshold = 1000, autovacuum_analyze_scale_factor = 0.02,"
            " autovacuum_vacuum_cost_delay = 0)"
        )


def downgrade() -> None:
    op.drop_index("ix_job_parent_parent_id", table_name="job_parent")
    op.drop_table("job_parent")
    op.drop_index("ix_image_fingerprint", table_name="image")
    op.drop_table("image")
    op.drop_index("ix_attempt_lease_id", table_name="attempt")
    op.drop_table("attempt")
    op.drop_index(
        "ix_job_waiting",
        table_name="job",
        postgresql_where=sa.text("status = 'waiting' AND not_before IS NOT NULL"),
        sqlite_where=sa.text("status = 'waiting' AND not_before IS NOT NULL"),
    )
    op.drop_index(
        "ix_job_ready",
        table_name="job",
        postgresql_where=sa.text("status = 'ready'"),
        sqlite_where=sa.text("status = 'ready'"),
    )
    op.drop_index(
        "ix_job_leased",
        table_name="job",
        postgresql_where=sa.text("status = 'leased'"),
        sqlite_where=sa.text("status = 'leased'"),
    )
    op.drop_index("ix_job_fingerprint", table_name="job")
    op.drop_index("ix_job_campaign_status", table_name="job")
    op.drop_table("job")
    op.drop_index(
        "ix_lease_open",
        table_name="lease",
        postgresql_where=sa.text("closed_at IS NULL"),
        sqlite_where=sa.text("closed_at IS NULL"),
    )
    op.drop_table("lease")
    op.drop_index("ix_group_checkpoint_digest", table_name="group_checkpoint")
    op.drop_table("group_checkpoint")
    op.drop_table("work_group")
    op.drop_table("campaign_version")
    op.drop_table("audit_seal_range")
    op.drop_table("worker")
    op.drop_table("input_image")
    op.drop_table("checkpoint")
    op.drop_table("campaign")
    op.drop_table("audit_seal")
    op.drop_index("ix_audit_event_subject", table_name="audit_event")
    op.drop_table("audit_event")
