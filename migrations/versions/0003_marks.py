"""Add pixel and perceptual hashes, which identify a copy of a picture that lost its marks.

Workers of the previous release keep running meanwhile: they leave the columns empty, and the indexes cover only rows
that have them. Rows without them are scanned instead.
"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0003"
down_revision = "0002"

_LOOKS = ("look_1", "look_2", "look_3", "look_4")


def upgrade() -> None:
    for name in _LOOKS:
        op.add_column("image", sa.Column(name, sa.Integer(), nullable=True))
    for name in ("pixels_sha256", *_LOOKS):
        where = sa.text(f"{name if name in _LOOKS else 'look_1'} IS NOT NULL")
        op.create_index(f"ix_image_{name}", "image", [name], unique=False, postgresql_where=where, sqlite_where=where)


def downgrade() -> None:
    for name in ("pixels_sha256", *_LOOKS):
        op.drop_index(f"ix_image_{name}", table_name="image")
    for name in _LOOKS:
        op.drop_column("image", name)
