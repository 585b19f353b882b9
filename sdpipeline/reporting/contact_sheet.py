"""Contact sheet of a campaign: its newest pictures in a grid, each with a label below."""

from __future__ import annotations

import io
import math
from collections.abc import MutableMapping, Sequence
from dataclasses import dataclass
from typing import Any

from PIL import Image, ImageDraw, ImageFont

from sdpipeline import escaping, provenance
from sdpipeline.db import queries
from sdpipeline.db.connection import Database
from sdpipeline.domain import Json
from sdpipeline.errors import InputImageError, ObjectMissingError
from sdpipeline.storage import ObjectStore

THUMBNAIL = 128
MARGIN = 4
LINE = 12
LABEL_LINES = 3
FONT_SIZE = 10
LONGEST_LABEL = 200
"""Characters of a label that are measured: about 25 are shown, and a cell may have 100,000."""
MAX_PICTURES = 48
MAX_PIXELS = 2**28
QUALITIES = (90, 75, 60, 45, 30, 15)

Thumbnails = MutableMapping[str, Image.Image]
"""Thumbnails by the key of their picture."""


@dataclass(frozen=True, slots=True)
class Tile:
    """Thumbnail and the lines of its label."""

    thumbnail: Image.Image
    label: Sequence[str]


def draw(
    database: Database,
    store: ObjectStore,
    campaign_id: int,
    *,
    max_bytes: int,
    kept: Thumbnails | None = None,
) -> bytes | None:
    """Draw a JPEG of at most ``max_bytes``; return None if no picture without a subject exists yet.

    Pictures with a subject are left out: Prefect keeps the sheet and people pass it on, so it outlives an erasure.
    ``kept`` caches thumbnails by key between calls, so that each picture is read once.
    """
    with database.read() as connection:
        newest = queries.newest_images(connection, campaign_id, MAX_PICTURES, without_subject=True)
    before = dict(kept or {})
    found = {each["key"]: before.get(each["key"]) or _thumbnail(store, each["key"]) for each in newest}
    thumbnails = {key: thumbnail for key, thumbnail in found.items() if thumbnail is not None}
    if kept is not None:
        kept.clear()
        kept.update(thumbnails)
    return fitted([Tile(thumbnails[e["key"]], label(e)) for e in newest if e["key"] in thumbnails], max_bytes)


def fitted(tiles: Sequence[Tile], max_bytes: int) -> bytes | None:
    """Return the sheet in the best quality that fits into ``max_bytes``; halve the number of pictures if none fits."""
    while tiles:
        sheet = tiled(tiles)
        for quality in QUALITIES:
            file = io.BytesIO()
            sheet.save(file, format="JPEG", quality=quality)
            if file.tell() <= max_bytes:
                return file.getvalue()
        tiles = tiles[: len(tiles) // 2]
    return None


def label(picture: Json) -> list[str]:
    """Return three lines: stage and seed (the stage's own if it has one), row, variables."""
    own = f"{picture['stage']}.seed"
    seed = picture["variables"].get(own, picture["seed"])
    variables = ", ".join(str(value) for name, value in picture["variables"].items() if name != own)
    return [f"{picture['stage']} · seed {seed}", picture["row"], variables]


def tiled(tiles: Sequence[Tile]) -> Image.Image:
    """Arrange tiles in a grid about twice as wide as high."""
    columns = min(len(tiles), max(1, math.ceil(math.sqrt(2 * len(tiles)))))
    width, height = THUMBNAIL + MARGIN, THUMBNAIL + LABEL_LINES * LINE + MARGIN
    sheet = Image.new("RGB", (columns * width, math.ceil(len(tiles) / columns) * height), "white")
    pen, font = ImageDraw.Draw(sheet), ImageFont.load_default(size=FONT_SIZE)
    for n, tile in enumerate(tiles):
        left, top = n % columns * width, n // columns * height
        sheet.paste(tile.thumbnail, (left, top))
        for line, text in enumerate(tile.label[:LABEL_LINES]):
            pen.text((left, top + THUMBNAIL + line * LINE), _shortened(text, font), fill="black", font=font)
    return sheet


def _shortened(text: str, font: Any) -> str:
    """Shorten a line to the width of a thumbnail."""
    text = escaping.terminal(" ".join(text[:LONGEST_LABEL].split()))
    if font.getlength(text) <= THUMBNAIL:
        return text
    while text and font.getlength(text + "…") > THUMBNAIL:
        text = text[:-1]
    return text + "…"


def _thumbnail(store: ObjectStore, key: str) -> Image.Image | None:
    """Return the picture as a thumbnail, or None if it is missing or damaged: the audit reports that."""
    try:
        thumbnail = Image.fromarray(provenance.decode(store.get(key), max_pixels=MAX_PIXELS), "RGB")
    except (ObjectMissingError, InputImageError):
        return None
    thumbnail.thumbnail((THUMBNAIL, THUMBNAIL), Image.Resampling.LANCZOS)
    return thumbnail
