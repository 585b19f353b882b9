"""Keep the native size, the default parameters, the origin and the ignored files of each checkpoint.

Code of the previous release works unchanged on this schema. Rows of earlier releases have no values: their weights keep
the defaults of their family, so that an upgrade makes no picture anew.
"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0005"
down_revision = "0004"


def upgrade() -> None:
    op.add_column("checkpoint", sa.Column("native_size", sa.Integer(), nullable=True))
    op.add_column("checkpoint", sa.Column("defaults", sa.JSON(), nullable=True))
    op.add_column("checkpoint", sa.Column("origin_sha256", sa.String(length=64), nullable=True))
    op.add_column("checkpoint", sa.Column("ignored", sa.JSON(), nullable=True))


def downgrade() -> None:
    for name in ("ignored", "origin_sha256", "defaults", "native_size"):
        op.drop_column("checkpoint", name)
