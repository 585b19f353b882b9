"""Limits for untrusted documents and files: JSON by size and depth, picture files by their structure."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Mapping
from typing import Any

from sdpipeline.errors import InputImageError

LARGEST_RECORD = 4 * 2**20
"""Characters of a picture's record or sidecar. A stage's own part has about 4 kB, mostly prompts."""

LARGEST_MANIFEST = 16 * 2**20
"""Characters of a C2PA manifest store as JSON. Each ancestor takes about 17 kB."""

LARGEST_XMP = 5 * 2**20
MAX_XMP_ELEMENTS = 250_000
"""Photoshop lists each ancestor of a document: a picture of a few years has tens of thousands."""

DEEPEST_RECORD = 64
DEEPEST_MANIFEST = 200

MAX_PNG_CHUNKS = 70_000
"""Encoders write pixels in chunks of 8 kB or more: 70,000 of them are larger than any accepted file."""

MAX_WEBP_CHUNKS = 20_000
"""A still picture has about six, and its signature adds one."""

MAX_JPEG_SEGMENTS = 20_000
MAX_JPEG_SCANS = 100
"""Each scan of a progressive JPEG visits every block; encoders write about ten, bombs write thousands."""

_SAVE_AGAIN = "save it again without its metadata"

SHAPE_ERRORS = (AttributeError, IndexError, KeyError, TypeError, ValueError, OverflowError, RecursionError)
"""Errors of reading a parsed document that has a different structure than ours."""

_PNG = b"\x89PNG\r\n\x1a\n"
_SOS, _EOI = 0xDA, 0xD9
_NEXT_MARKER = re.compile(rb"\xff[^\x00\x01\xd0-\xd7\xff]")
"""Marker that ends a scan: an 0xFF in its data is followed by 0x00, and restart markers belong to the scan."""
_STANDALONE = frozenset({0x00, 0x01, *range(0xD0, 0xD9)})


class UnreadableError(ValueError):
    """Untrusted document that is not JSON, or is JSON that readers may interpret differently."""


class ExcessiveError(UnreadableError):
    """Untrusted document that exceeds a limit of size or depth."""


def parse_json(text: str | bytes, *, largest: int = LARGEST_RECORD, deepest: int = DEEPEST_RECORD) -> Any:
    """Parse a JSON document of at most ``largest`` characters and ``deepest`` levels.

    Repeated keys, non-finite numbers and lone surrogates are refused: readers could interpret them differently, and
    databases and terminals cannot store or show them. Raises UnreadableError.
    """
    if len(text) > largest:
        raise ExcessiveError(f"has {len(text):,} characters, at most {largest:,} are read")
    try:
        if isinstance(text, bytes):
            text = text.decode()
        document = json.loads(text, parse_float=_finite, parse_constant=_no_number, object_pairs_hook=_without_repeats)
    except (RecursionError, MemoryError) as error:
        raise ExcessiveError(f"is nested more than {deepest} levels deep") from error
    except UnreadableError:
        raise
    except ValueError as error:  # also for a number with too many digits, and for bytes that are not UTF-8
        raise UnreadableError(f"is not JSON: {error}") from error
    if not _is_flat(document, deepest):
        raise ExcessiveError(f"is nested more than {deepest} levels deep")
    if "\\u" in text and not _is_text(document):
        raise UnreadableError("holds half of a surrogate pair")
    return document


def parse_object(text: str | bytes, *, largest: int = LARGEST_RECORD, deepest: int = DEEPEST_RECORD) -> dict[str, Any]:
    """Parse a JSON document as ``parse_json`` does, and require an object."""
    document = parse_json(text, largest=largest, deepest=deepest)
    if not isinstance(document, dict):
        raise UnreadableError("is not a JSON object")
    return document


def check_structure(data: bytes) -> None:
    """Refuse a picture file whose headers would cost a decoder minutes or gigabytes; raises InputImageError."""
    if data.startswith(_PNG):
        _check_png(data)
    elif data.startswith(b"\xff\xd8"):
        _check_jpeg(data)
    elif data.startswith(b"RIFF"):
        _check_webp(data)


def check_xmp(xmp: bytes) -> None:
    """Refuse XMP that is too large to parse as XML; raises InputImageError."""
    if len(xmp) > LARGEST_XMP:
        raise InputImageError(f"its XMP has {len(xmp):,} bytes, at most {LARGEST_XMP:,} are read ({_SAVE_AGAIN})")
    if xmp.count(b"<") > MAX_XMP_ELEMENTS:
        raise InputImageError(f"its XMP has more than {MAX_XMP_ELEMENTS:,} elements ({_SAVE_AGAIN})")


def _finite(digits: str) -> float:
    value = float(digits)
    if not math.isfinite(value):
        raise UnreadableError(f"holds the number {digits[:20]}, which is not finite")
    return value


def _no_number(word: str) -> Any:
    raise UnreadableError(f"holds {word}, which is not JSON")


def _without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise UnreadableError("has a key twice")
    return found


def _is_flat(document: Any, deepest: int) -> bool:
    """Return True if the document has at most ``deepest`` levels.

    It is walked level by level: a recursive walk would need the stack that the limit protects.
    """
    level = [document]
    for _ in range(deepest):
        level = [child for each in level for child in _children(each) if isinstance(child, dict | list)]
        if not level:
            return True
    return False


def _children(value: Any) -> Iterable[Any]:
    if isinstance(value, Mapping):
        return value.values()
    return value if isinstance(value, list) else ()


def _is_text(document: Any) -> bool:
    try:
        json.dumps(document, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        return False
    return True


def _check_png(data: bytes) -> None:
    place, chunks = len(_PNG), 0
    while place + 8 <= len(data):
        place += 12 + int.from_bytes(data[place : place + 4], "big")
        chunks += 1
        if chunks > MAX_PNG_CHUNKS:
            raise InputImageError(f"a png of more than {MAX_PNG_CHUNKS:,} chunks")


def _check_webp(data: bytes) -> None:
    place, chunks = 12, 0
    while place + 8 <= len(data):
        size = int.from_bytes(data[place + 4 : place + 8], "little")
        place += 8 + size + size % 2
        chunks += 1
        if chunks > MAX_WEBP_CHUNKS:
            raise InputImageError(f"a webp of more than {MAX_WEBP_CHUNKS:,} chunks")


def _check_jpeg(data: bytes) -> None:
    place, segments, scans = 2, 0, 0
    while place + 4 <= len(data):
        marker = data[place + 1]
        if data[place] != 0xFF or marker == 0xFF:
            place += 1
        elif marker == _EOI:  # phones append a video or a depth map to the picture
            return
        elif marker in _STANDALONE:
            place += 2
        else:
            place += 2 + int.from_bytes(data[place + 2 : place + 4], "big")
            if marker == _SOS:
                scans += 1
                following = _NEXT_MARKER.search(data, place)
                place = following.start() if following else len(data)
        segments += 1
        if segments > MAX_JPEG_SEGMENTS:
            raise InputImageError(f"a jpeg of more than {MAX_JPEG_SEGMENTS:,} segments")
        if scans > MAX_JPEG_SCANS:
            raise InputImageError(f"a jpeg of more than {MAX_JPEG_SCANS} scans")
