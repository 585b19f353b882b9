"""Small files that are expensive to read."""

from __future__ import annotations

import io
import struct
import zlib

import numpy as np
from PIL import Image

_PIXELS = np.random.default_rng(1).integers(0, 256, (64, 64, 3), dtype=np.uint8)


def png(*chunks: bytes) -> bytes:
    """A picture of 64 x 64 pixels with these chunks before its pixel data."""
    lines = b"".join(b"\0" + row.tobytes() for row in _PIXELS)
    header = struct.pack(">IIBBBBB", 64, 64, 8, 2, 0, 0, 0)
    body = [png_chunk(b"IHDR", header), *chunks, png_chunk(b"IDAT", zlib.compress(lines)), png_chunk(b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(body)


def png_chunk(kind: bytes, data: bytes) -> bytes:
    """One chunk with its checksum."""
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def text_chunk(keyword: bytes, text: bytes) -> bytes:
    """An uncompressed iTXt chunk."""
    return png_chunk(b"iTXt", keyword + b"\0\0\0\0\0" + text)


def with_record(text: bytes) -> bytes:
    """A PNG with this text in place of the embedded record."""
    return png(text_chunk(b"sdpipeline", text))


def with_xmp(xmp: bytes) -> bytes:
    """A PNG with these bytes as its XMP."""
    return png(text_chunk(b"XML:com.adobe.xmp", xmp))


def progressive_jpeg(scans: int) -> bytes:
    """A JPEG whose second scan is repeated this often."""
    file = io.BytesIO()
    Image.fromarray(_PIXELS).save(file, "JPEG", progressive=True)
    data = file.getvalue()
    first = data.index(b"\xff\xda")
    second = data.index(b"\xff\xda", first + 2)
    third = data.index(b"\xff\xda", second + 2)
    return data[:second] + data[second:third] * scans + data[third:]


def many_segments(count: int) -> bytes:
    """A JPEG with this many empty application segments."""
    file = io.BytesIO()
    Image.fromarray(_PIXELS).save(file, "JPEG")
    data = file.getvalue()
    return data[:2] + b"\xff\xe5\x00\x02" * count + data[2:]


def webp(*chunks: bytes) -> bytes:
    """A picture of 64 x 64 pixels with these chunks after its pixel data."""
    file = io.BytesIO()
    Image.fromarray(_PIXELS).save(file, "WEBP")
    body = b"WEBP" + file.getvalue()[12:] + b"".join(chunks)
    return b"RIFF" + struct.pack("<I", len(body)) + body


DEEP_RECORD = with_record(b"[" * 200_000)
DEEP_BUT_PARSED = with_record(b'{"a":' * 300 + b"1" + b"}" * 300)
LARGE_RECORD = with_record(b'{"a":"' + b"a" * 2**23 + b'"}')
LARGE_DEFLATED_RECORD = png(
    png_chunk(b"iTXt", b"sdpipeline\0\x01\0\0\0" + zlib.compress(b'{"a":"' + b"a" * 2**27 + b'"}', 9))
)
DEEP_XMP = with_xmp(b"<a>" * 5_000 + b"</a>" * 5_000)
WIDE_XMP = with_xmp(b"<a>" + b"<b/>" * 300_000 + b"</a>")
LARGE_XMP = with_xmp(b"<a>" + b"x" * 2**23 + b"</a>")
LAUGHS = with_xmp(
    b'<!DOCTYPE l [<!ENTITY a "ha">'
    + b"".join(b'<!ENTITY %c "%s">' % (98 + n, b"&%c;" % (97 + n) * 10) for n in range(9))
    + b"]><l>&j;</l>"
)
MANY_CHUNKS = png(*[png_chunk(b"prVt", b"")] * 80_000)
MANY_WEBP_CHUNKS = webp(b"prVt\0\0\0\0" * 30_000)
MANY_SEGMENTS = many_segments(30_000)
MANY_SCANS = progressive_jpeg(300)

BOMBS = {name.lower(): value for name, value in list(globals().items()) if name.isupper() and isinstance(value, bytes)}
"""The files above by name. Readers that decode the whole picture refuse each of them."""
