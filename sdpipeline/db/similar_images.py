"""Find recorded images by pixel hash or perceptual hash."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

from sqlalchemy import ColumnElement, Connection, Select, Text, cast, literal_column, or_, select

from sdpipeline.db.tables import LOOKS, campaign, image, job
from sdpipeline.domain import Json

MAX_BITS = 7
"""Number of 64 bits in which a copy may differ and is still certain to be found.

One of its four quarters then differs in no bit or in one, so a query asks for only 4 x 17 values.
"""

_PAGE = 500

_INDEXED: ColumnElement[bool] = literal_column("look_1 IS NOT NULL")
"""The condition of the partial indexes, verbatim."""

_KNOWN = or_(job.c.erased_at.is_(None), cast(job.c.request, Text).contains("checkpoint"))
"""Excludes jobs of an erased subject: their requests were deleted."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RecordedPicture:
    """A picture as the database or an archive records it; ``deleted`` says that storage has it no more."""

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
    """Return the lookup columns of a picture: its perceptual hash in four numbers of 16 bits."""
    found = scores.get("perceptual_hash")
    if not isinstance(found, str):
        return {}
    return {name: int(found[4 * n : 4 * n + 4], 16) for n, name in enumerate(LOOKS)}


def of_pixels(connection: Connection, *, team: str, pixels_sha256: str) -> list[RecordedPicture]:
    """List pictures with exactly these pixels, newest first."""
    return _owned(connection, team, connection.execute(_of_pixels(pixels_sha256)).mappings())


def of_fingerprint(
    connection: Connection, *, team: str, fingerprint: str, copies: bool = False
) -> list[RecordedPicture]:
    """List pictures made for this fingerprint, newest first; with ``copies``, also their copies."""
    own = [] if copies else [image.c.reused_from.is_(None)]
    found = _images(image.c.fingerprint == fingerprint, *own)
    return _owned(connection, team, connection.execute(found).mappings())


def alike(connection: Connection, *, team: str, perceptual_hash: str) -> list[RecordedPicture]:
    """List pictures whose perceptual hash differs from this one in at most ``MAX_BITS``, newest first."""
    asked = looks({"perceptual_hash": perceptual_hash})
    rows = connection.execute(_alike(asked)).mappings()
    near = (row for row in rows if sum((row[name] ^ bits).bit_count() for name, bits in asked.items()) <= MAX_BITS)
    return _owned(connection, team, near)


def without_index(connection: Connection, *, team: str) -> Iterator[RecordedPicture]:
    """Yield pictures that the previous release recorded; they are only found by a full scan."""
    rows = connection.execute(_images(image.c.look_1.is_(None), image.c.reused_from.is_(None))).mappings()
    while some := list(islice(rows, _PAGE)):
        yield from _owned(connection, team, some)


def archived(row: Json, lines: Iterator[Json], private: Iterator[Json]) -> Iterator[RecordedPicture]:
    """Yield the pictures of an archived edition, from its lines, except those of erased jobs."""
    scores = {line["id"]: line.get("scores", {}) for line in private}
    for line in lines:
        if line["id"] not in scores and line["erased_at"] is None:
            continue
        for each in line["images"]:
            own = {"scores": scores.get(line["id"], {}).get(each["fingerprint"], each["scores"])}
            yield _picture(each | own | {name: line[name] for name in ("stage", "identity")} | _place(row))


def _place(row: Json) -> Json:
    deleted_at = {"deleted_at": row["pictures_deleted_at"]} if row["pictures_deleted_at"] else {}
    return {"name": row["name"], "edition": row["edition"]} | deleted_at


def _of_pixels(pixels_sha256: str) -> Select[Any]:
    return _images(image.c.pixels_sha256 == pixels_sha256, _INDEXED)


def _alike(asked: Mapping[str, int]) -> Select[Any]:
    """Match each quarter as it is and with any one bit changed, using its index's own condition."""
    near = [
        image.c[name].in_([bits, *(bits ^ (1 << n) for n in range(16))]) & literal_column(f"{name} IS NOT NULL")
        for name, bits in asked.items()
    ]
    return _images(or_(*near))


def _images(*which: Any) -> Select[Any]:
    return select(image).where(*which).order_by(image.c.created_at.desc(), image.c.job_id.desc())


def _owned(connection: Connection, team: str, rows: Iterable[Any]) -> list[RecordedPicture]:
    """Keep the team's pictures; not by a join: SQLite would begin it at the team and read all of its jobs."""
    found, owners = list(rows), dict[int, Any]()
    for page in range(0, len(found), _PAGE):
        ids = {row["job_id"] for row in found[page : page + _PAGE]}
        statement = (
            select(job.c.id, job.c.edition, job.c.stage, job.c.identity, campaign.c.name)
            .join(campaign, campaign.c.id == job.c.campaign_id)
            .where(job.c.id.in_(ids), campaign.c.team == team, _KNOWN)
        )
        owners |= {row["id"]: row for row in connection.execute(statement).mappings()}
    return [_picture({**owners[row["job_id"]], **row}) for row in found if row["job_id"] in owners]


def _picture(row: Any) -> RecordedPicture:
    names: Sequence[str] = ("edition", "stage", "identity", "fingerprint", "sha256", "pixels_sha256", "url")
    return RecordedPicture(
        job=row["job_id"],
        campaign=row["name"],
        perceptual_hash=row["scores"].get("perceptual_hash"),
        deleted=row["deleted_at"] is not None,
        **{name: row[name] for name in names},
    )
