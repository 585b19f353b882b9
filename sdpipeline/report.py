"""What people look at: the contact sheet, and the closing report of a campaign."""

from __future__ import annotations

import io
import math
from collections.abc import Iterable, Sequence

import numpy as np
from PIL import Image

from sdpipeline import provenance
from sdpipeline.db import reports
from sdpipeline.db.connection import Database
from sdpipeline.domain import Json
from sdpipeline.errors import InputImageError, ObjectMissingError
from sdpipeline.storage import ObjectStore

THUMBNAIL = 128
MOST_PICTURES = 48


def contact_sheet(
    database: Database, store: ObjectStore, campaign_id: int, *, max_bytes: int, count: int = MOST_PICTURES
) -> bytes | None:
    """The newest pictures side by side as a JPEG of at most ``max_bytes``, or None before the first."""
    with database.read() as connection:
        newest = reports.newest_images(connection, campaign_id, count)
    thumbnails = [shown for each in newest if (shown := _thumbnail(store, each["key"])) is not None]
    if not thumbnails:
        return None
    sheet = tiled(thumbnails)
    for quality in (90, 75, 60, 45, 30, 15):
        file = io.BytesIO()
        sheet.save(file, format="JPEG", quality=quality)
        if file.tell() <= max_bytes:
            return file.getvalue()
    # Half as many pictures always fit in the end.
    return contact_sheet(database, store, campaign_id, max_bytes=max_bytes, count=count // 2) if count > 1 else None


def _thumbnail(store: ObjectStore, key: str) -> Image.Image | None:
    """The picture, small; None where it is gone or damaged: that is for the audit to say."""
    try:
        thumbnail = Image.fromarray(provenance.decode(store.get(key), max_pixels=2**28), "RGB")
    except (ObjectMissingError, InputImageError):
        return None
    thumbnail.thumbnail((THUMBNAIL, THUMBNAIL), Image.Resampling.LANCZOS)
    return thumbnail


def tiled(pictures: Sequence[Image.Image]) -> Image.Image:
    """Thumbnails in a grid about twice as wide as high."""
    columns = min(len(pictures), max(1, math.ceil(math.sqrt(2 * len(pictures)))))
    lines = math.ceil(len(pictures) / columns)
    sheet = np.full((lines * THUMBNAIL, columns * THUMBNAIL, 3), 255, dtype=np.uint8)
    for n, thumbnail in enumerate(pictures):
        top, left = n // columns * THUMBNAIL, n % columns * THUMBNAIL
        sheet[top : top + thumbnail.height, left : left + thumbnail.width] = np.asarray(thumbnail)
    return Image.fromarray(sheet, "RGB")


def time_spent(timings: Iterable[Json]) -> dict[str, float]:
    """Seconds per kind of work, added over pictures."""
    total: dict[str, float] = {}
    for each in timings:
        for name, seconds in each.items():
            total[name] = total.get(name, 0.0) + seconds
    return total


def closing_report(database: Database, campaign_id: int, *, signer: str) -> str:
    """Markdown: what was made, how fast, who signs it, where the time went, and what failed."""
    with database.read() as connection:
        progress = reports.progress(connection, campaign_id)
        stages = reports.stages(connection, campaign_id)
        spent = time_spent(reports.timings(connection, campaign_id))
        failed = reports.failures(connection, campaign_id, limit=20)
    lines = [
        f"# {progress.name}, version {progress.version}: {progress.status}",
        "",
        f"{progress.images} pictures of {progress.total} jobs, {progress.gpu_seconds:.1f} s on the device.",
        "",
        f"Pictures are signed by {signer}.",
        "",
        "| stage | jobs | pictures | device seconds |",
        "|---|---|---|---|",
        *(f"| {s['stage']} | {s['jobs']} | {s['succeeded']} | {s['gpu_seconds']:.1f} |" for s in stages),
        "",
        "| where the time went | seconds |",
        "|---|---|",
        *(f"| {name.removesuffix('_s')} | {seconds:.1f} |" for name, seconds in spent.items()),
    ]
    if failed:
        lines += ["", "| failed job | stage | row | attempts | reason |", "|---|---|---|---|---|"]
        lines += [
            f"| {f['job_id']} | {f['stage']} | {f['row']} | {f['attempts']} | {_cell(f['error'])} |" for f in failed
        ]
    return "\n".join(lines) + "\n"


def _cell(value: object) -> str:
    return str("" if value is None else value).replace("|", "\\|").replace("\n", " ")
