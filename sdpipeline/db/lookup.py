"""Whose picture is this: recorded pictures by their pixels, and by what they look like."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from sqlalchemy import ColumnElement, Connection, Select, literal_column, or_, select

from sdpipeline.db.tables import LOOKS, campaign, image, job
from sdpipeline.domain import Json

MOST_BITS = 7
"""In how many of 64 bits a copy may differ and still be found for sure: one of its four quarters then differs in none
or in one, so that these 4 x 17 values are all that has to be asked for."""

_INDEXED: ColumnElement[bool] = literal_column("look_1 IS NOT NULL")
"""As the partial indexes say it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RecordedPicture:
    """A picture as the database or an archive knows it. ``deleted`` says that storage has it no more."""

    job: int
    campaign: str
    edition: str
    stage: str
    identity: str
    fingerprint: str
    sha256: str
    pixels_sha256: str
    perceptual_hash: str | None
    url: str
    deleted: bool


def looks(scores: Json) -> dict[str, int]:
    """The columns that a picture is found by: its perceptual hash in four numbers of 16 bits."""
    found = scores.get("perceptual_hash")
    if not isinstance(found, str):
        return {}
    return {name: int(found[4 * n : 4 * n + 4], 16) for n, name in enumerate(LOOKS)}


def of_pixels(connection: Connection, *, team: str, pixels_sha256: str) -> list[RecordedPicture]:
    """Pictures with exactly these pixels, the newest first."""
    return _found(connection, team, image.c.pixels_sha256 == pixels_sha256, _INDEXED)


def of_fingerprint(connection: Connection, *, team: str, fingerprint: str) -> list[RecordedPicture]:
    """Pictures made for this fingerprint, the newest first."""
    return _found(connection, team, image.c.fingerprint == fingerprint, image.c.reused_from.is_(None))


def alike(connection: Connection, *, team: str, perceptual_hash: str) -> list[RecordedPicture]:
    """Pictures that may look like this one: all that differ in at most ``MOST_BITS``, and some that differ more."""
    asked = looks({"perceptual_hash": perceptual_hash})
    near = [image.c[name].in_([bits, *(bits ^ (1 << n) for n in range(16))]) for name, bits in asked.items()]
    # Each said with its index's own condition.
    said = [clause & literal_column(f"{name} IS NOT NULL") for name, clause in zip(asked, near, strict=True)]
    return _found(connection, team, or_(*said))


def without_index(connection: Connection, *, team: str) -> Iterator[RecordedPicture]:
    """Pictures that the release before recorded: they are found by reading them all."""
    statement = _statement(team, image.c.look_1.is_(None), image.c.reused_from.is_(None))
    for row in connection.execute(statement).mappings():
        yield _picture(row)


def archived(row: Json, lines: Iterator[Json]) -> Iterator[RecordedPicture]:
    """The pictures of an archived edition, from its lines."""
    for line in lines:
        for each in line["images"]:
            yield _picture(each | {name: line[name] for name in ("stage", "identity")} | _place(row))


def _place(row: Json) -> Json:
    gone = {"deleted_at": row["pictures_deleted_at"]} if row["pictures_deleted_at"] else {}
    return {"name": row["name"], "edition": row["edition"]} | gone


def _found(connection: Connection, team: str, *which: Any) -> list[RecordedPicture]:
    return [_picture(row) for row in connection.execute(_statement(team, *which)).mappings()]


def _statement(team: str, *which: Any) -> Select[Any]:
    return (
        select(image, campaign.c.name, job.c.edition, job.c.stage, job.c.identity)
        .join(job, job.c.id == image.c.job_id)
        .join(campaign, campaign.c.id == job.c.campaign_id)
        .where(campaign.c.team == team, *which)
        .order_by(image.c.created_at.desc(), image.c.job_id.desc())
    )


def _picture(row: Any) -> RecordedPicture:
    names: Sequence[str] = ("edition", "stage", "identity", "fingerprint", "sha256", "pixels_sha256", "url")
    return RecordedPicture(
        job=row["job_id"],
        campaign=row["name"],
        perceptual_hash=row["scores"].get("perceptual_hash"),
        deleted=row["deleted_at"] is not None,
        **{name: row[name] for name in names},
    )
