"""Add budgets, rules, scores, reuse, fairness, found pictures and retention; drop a table that nothing wrote.

Workers of the previous release keep running meanwhile. New columns have constant defaults, which PostgreSQL adds
without rewriting a row. New indexes of large tables cover only rows with a value in a new column, of which there are
none at first.
"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"

_UNFINISHED = "chain IS NOT NULL AND status IN ('waiting', 'ready', 'leased')"


def upgrade() -> None:
    # In the order in which a heartbeat and a lease lock these tables; any other order risks a deadlock with workers.
    op.add_column("worker", sa.Column("paused_at", sa.Double(), nullable=True))
    op.create_index("ix_lease_group", "lease", ["group_id", "created_at"], unique=False)
    op.add_column("work_group", sa.Column("rules", sa.JSON(), server_default="{}", nullable=False))
    op.add_column("campaign", sa.Column("budget", sa.JSON(), nullable=True))
    op.add_column("campaign", sa.Column("admitted", sa.BigInteger(), server_default="0", nullable=False))
    op.add_column("campaign", sa.Column("paused_because", sa.Text(), nullable=True))
    op.add_column("job", sa.Column("chain", sa.BigInteger(), nullable=True))
    op.add_column("job", sa.Column("subject", sa.Text(), nullable=True))
    op.add_column("job", sa.Column("erased_at", sa.Double(), nullable=True))
    op.add_column("attempt", sa.Column("gpu_seconds", sa.Double(), nullable=True))
    op.add_column("attempt", sa.Column("cost", sa.Double(), nullable=True))
    op.add_column("attempt", sa.Column("fingerprint", sa.String(length=64), nullable=True))
    op.add_column("image", sa.Column("scores", sa.JSON(), server_default="{}", nullable=False))
    op.add_column("image", sa.Column("reused_from", sa.Text(), nullable=True))
    op.add_column("image", sa.Column("deleted_at", sa.Double(), nullable=True))
    op.create_table(
        "archive",
        sa.Column("campaign_id", sa.BigInteger().with_variant(sa.Integer(), "sqlite"), nullable=False),
        sa.Column("edition", sa.String(length=63), nullable=False),
        sa.Column("key", sa.Text(), nullable=False),
        sa.Column("sha256", sa.String(length=64), nullable=False),
        sa.Column("version_id", sa.Text(), nullable=True),
        sa.Column("private_key", sa.Text(), nullable=True),
        sa.Column("private_sha256", sa.String(length=64), nullable=True),
        sa.Column("private_left", sa.Text(), nullable=True),
        sa.Column("first_job", sa.BigInteger(), nullable=False),
        sa.Column("last_job", sa.BigInteger(), nullable=False),
        sa.Column("newest_at", sa.Double(), nullable=False),
        sa.Column("pictures_deleted_at", sa.Double(), nullable=True),
        sa.Column("created_at", sa.Double(), nullable=False),
        sa.ForeignKeyConstraint(["campaign_id"], ["campaign.id"], name=op.f("fk_archive_campaign_id")),
        sa.PrimaryKeyConstraint("campaign_id", "edition", name=op.f("pk_archive")),
    )
    op.create_table(
        "spending",
        sa.Column("campaign_id", sa.BigInteger().with_variant(sa.Integer(), "sqlite"), nullable=False),
        sa.Column("group_id", sa.BigInteger().with_variant(sa.Integer(), "sqlite"), nullable=False),
        sa.Column("worker_id", sa.String(length=32), nullable=False),
        sa.Column("images", sa.BigInteger(), nullable=False),
        sa.Column("size_bytes", sa.BigInteger(), nullable=False),
        sa.Column("gpu_seconds", sa.Double(), nullable=False),
        sa.Column("cost", sa.Double(), nullable=False),
        sa.ForeignKeyConstraint(["campaign_id"], ["campaign.id"], name=op.f("fk_spending_campaign_id")),
        sa.ForeignKeyConstraint(["group_id"], ["work_group.id"], name=op.f("fk_spending_group_id")),
        sa.PrimaryKeyConstraint("campaign_id", "group_id", "worker_id", name=op.f("pk_spending")),
    )
    op.create_index("ix_work_group_batch_key", "work_group", ["batch_key"], unique=False)
    op.create_table(
        "found_picture",
        sa.Column("sidecar_key", sa.Text(), nullable=False),
        sa.Column("team", sa.String(length=63), nullable=False),
        sa.Column("campaign", sa.String(length=63), nullable=False),
        sa.Column("stage", sa.String(length=63), nullable=False),
        sa.Column("fingerprint", sa.String(length=64), nullable=False),
        sa.Column("identity_start", sa.String(length=16), nullable=False),
        sa.Column("key", sa.Text(), nullable=False),
        sa.Column("stored", sa.JSON(), nullable=False),
        sa.Column("attempt", sa.SmallInteger(), nullable=False),
        sa.Column("worker_id", sa.String(length=32), nullable=False),
        sa.Column("consumed", sa.Boolean(), server_default=sa.text("false"), nullable=False),
        sa.Column("made_at", sa.String(length=40), nullable=False),
        sa.PrimaryKeyConstraint("sidecar_key", name=op.f("pk_found_picture")),
    )
    op.create_index("ix_found_picture_owner", "found_picture", ["team", "campaign", "fingerprint"], unique=False)
    op.create_index(
        "ix_job_chain",
        "job",
        ["campaign_id", "chain"],
        unique=False,
        postgresql_where=sa.text(_UNFINISHED),
        sqlite_where=sa.text(_UNFINISHED),
    )
    op.create_index(
        "ix_job_subject",
        "job",
        ["subject"],
        unique=False,
        postgresql_where=sa.text("subject IS NOT NULL"),
        sqlite_where=sa.text("subject IS NOT NULL"),
    )
    op.drop_table("input_image")


def downgrade() -> None:
    # The previous release does not start chains.
    op.execute(
        "UPDATE job SET status = 'ready' WHERE status = 'waiting' AND chain IS NOT NULL AND parents_left = 0"
        " AND not_before IS NULL"
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
    op.drop_index("ix_lease_group", table_name="lease")
    op.drop_index("ix_job_subject", table_name="job")
    op.drop_index("ix_job_chain", table_name="job")
    op.drop_index("ix_work_group_batch_key", table_name="work_group")
    op.drop_table("found_picture")
    op.drop_table("spending")
    op.drop_table("archive")
    for table, column in (
        ("worker", "paused_at"),
        ("image", "deleted_at"),
        ("image", "reused_from"),
        ("image", "scores"),
        ("attempt", "fingerprint"),
        ("attempt", "cost"),
        ("attempt", "gpu_seconds"),
        ("job", "erased_at"),
        ("job", "subject"),
        ("job", "chain"),
        ("work_group", "rules"),
        ("campaign", "paused_because"),
        ("campaign", "admitted"),
        ("campaign", "budget"),
    ):
        op.drop_column(table, column)
