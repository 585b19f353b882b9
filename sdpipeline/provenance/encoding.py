"""Encoding of pixels as a file with its record and AI mark, and decoding of untrusted files."""

from __future__ import annotations

import hashlib
import io
import json
import struct
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from xml.sax.saxutils import escape

import numpy as np
import PIL
from PIL import Image, ImageCms, ImageOps, PngImagePlugin

from sdpipeline import __version__
from sdpipeline.domain import Json, OutputFormat
from sdpipeline.engine import Pixels
from sdpipeline.errors import InputImageError, RequestRefusedError
from sdpipeline.provenance import untrusted
from sdpipeline.provenance.record import Encoder
from sdpipeline.provenance.untrusted import ExcessiveError, UnreadableError

# IPTC's terms for a picture made only by a trained generator, and for one with a photograph among its inputs.
DIGITAL_SOURCE_TYPES = "http://cv.iptc.org/newscodes/digitalsourcetype/"
GENERATED = DIGITAL_SOURCE_TYPES + "trainedAlgorithmicMedia"
COMPOSITE = DIGITAL_SOURCE_TYPES + "compositeWithTrainedAlgorithmicMedia"

LARGEST_PICTURE = 2**28
"""Pixels of the largest picture of ours that is decoded."""

_CONTENT_TYPES = {"png": "image/png", "jpeg": "image/jpeg", "webp": "image/webp"}
_EXTENSIONS = {"png": "png", "jpeg": "jpg", "webp": "webp"}
_PNG_RECORD = "sdpipeline"
# One JPEG segment holds 65,533 bytes, and the XMP marker takes 29 of them.
_MAX_JPEG_XMP_BYTES = 65_504

# Errors of Pillow on broken files, from the list of its own fuzzers; defusedxml's errors are ValueErrors.
_BROKEN = (OSError, SyntaxError, ValueError, NotImplementedError, OverflowError, EOFError, struct.error, zlib.error)
_BOMB = (Image.DecompressionBombError, Image.DecompressionBombWarning)


@dataclass(frozen=True, slots=True, kw_only=True)
class EncodedImage:
    """Finished file; ``pixels_sha256`` hashes the pixels that this file decodes to, even if its format is lossy."""

    data: bytes
    sha256: str
    pixels_sha256: str
    extension: str
    content_type: str
    width: int
    height: int


def encode(pixels: Pixels, *, output: OutputFormat, record: Json, from_photograph: bool = False) -> EncodedImage:
    """Encode the picture as a file with its record and its mark as AI-made.

    ``from_photograph`` says that a picture which no generator made is among its inputs. The record is embedded
    unchanged: the caller keeps host names and paths out of it.
    """
    text = record_text(record)
    xmp = _xmp(text, COMPOSITE if from_photograph else GENERATED)
    if output.format == "jpeg" and len(xmp) > _MAX_JPEG_XMP_BYTES:
        raise RequestRefusedError(
            f"output.format: a record of {len(xmp):,} bytes does not fit into a jpeg (at most {_MAX_JPEG_XMP_BYTES:,}):"
            " shorten the prompts, or write png or webp"
        )
    if len(text) > untrusted.LARGEST_RECORD or len(xmp) > untrusted.LARGEST_XMP:
        raise RequestRefusedError(
            f"a record of {len(text):,} characters is too long to be read back (at most {untrusted.LARGEST_RECORD:,}):"
            " shorten the prompts of this stage and of those before it"
        )
    file = io.BytesIO()
    Image.fromarray(pixels, "RGB").save(file, **_parameters(output), **_embedded(output, text, xmp))
    data = file.getvalue()
    return _described(data, output, pixels if _is_lossless(output) else decode(data, max_pixels=pixels.size))


def encoder(output: OutputFormat) -> Encoder:
    """Return the encoder's version and parameters for the record: the same encoder gives the same pixels again."""
    return {"library": f"pillow {PIL.__version__}", "parameters": _parameters(output)}


def pixels_sha256(pixels: Pixels) -> str:
    """Return the SHA-256 of the line ``HEIGHTxWIDTHx3`` and the RGB bytes by row, which is independent of the file."""
    height, width, channels = pixels.shape
    digest = hashlib.sha256(f"{height}x{width}x{channels}\n".encode())
    digest.update(np.ascontiguousarray(pixels).data)
    return digest.hexdigest()


def decode(data: bytes, *, max_pixels: int) -> Pixels:
    """Decode an untrusted png, jpeg or webp file to upright sRGB pixels; raises InputImageError.

    Transparency is composited on white; 16-bit grey keeps its upper 8 bits; an embedded colour profile is applied.
    Animations are refused. Nothing larger than ``max_pixels`` or Pillow's own limit of 178 million is decompressed.
    """
    with _opened(data, max_pixels) as image:
        # A phone's jpeg may carry a second picture (depth, a thumbnail); that is not an animation.
        if image.format != "MPO" and getattr(image, "is_animated", False):
            raise InputImageError("the picture is an animation: give one frame of it")
        return np.asarray(_rgb(_upright(image)), dtype=np.uint8)


def read_record(data: bytes) -> Json | None:
    """Return the record embedded by ``encode``, or None; raises InputImageError as ``read_marks`` does."""
    return read_marks(data)[0]


def content_type(data: bytes) -> str:
    """Return the media type that the file's first bytes show; raises InputImageError."""
    if data.startswith(b"\x89PNG\r\n\x1a\n"):
        return "image/png"
    if data.startswith(b"\xff\xd8\xff"):
        return "image/jpeg"
    if data.startswith(b"RIFF") and data[8:12] == b"WEBP":
        return "image/webp"
    raise InputImageError("not a png, jpeg or webp picture")


def digital_source_type(data: bytes) -> str | None:
    """Return the IPTC digital source type in the picture's XMP, or None."""
    return read_marks(data)[1]


def read_marks(data: bytes) -> tuple[Json | None, str | None]:
    """Read the embedded record and the IPTC digital source type, each None if it is missing.

    Raises InputImageError for a file that is not a picture, and for marks that exceed the limits of ``untrusted``.
    """
    with _opened(data, None) as image:
        xmp = _xmp_properties(image)
        text, source_type = image.info.get(_PNG_RECORD) or xmp.get("record"), xmp.get("DigitalSourceType")
    return parsed_record(text), source_type if isinstance(source_type, str) else None


def record_text(record: Json) -> str:
    """Serialize the record for embedding; in ASCII, because XML cannot hold some characters of a prompt."""
    return json.dumps(record, sort_keys=True, separators=(",", ":"), allow_nan=False)


def parsed_record(text: object) -> Json | None:
    """Parse the text written by ``record_text``; return None for any other text.

    Raises InputImageError for a record that is too large or too deeply nested, as an attacker's may be.
    """
    if not isinstance(text, str):
        return None
    try:
        return untrusted.parse_object(text)
    except ExcessiveError as error:
        raise InputImageError(f"its embedded record {error}") from error
    except UnreadableError:
        return None


def _described(data: bytes, output: OutputFormat, decoded: Pixels) -> EncodedImage:
    height, width, _ = decoded.shape
    return EncodedImage(
        data=data,
        sha256=hashlib.sha256(data).hexdigest(),
        pixels_sha256=pixels_sha256(decoded),
        extension=_EXTENSIONS[output.format],
        content_type=_CONTENT_TYPES[output.format],
        width=width,
        height=height,
    )


def _is_lossless(output: OutputFormat) -> bool:
    return output.format == "png" or (output.format == "webp" and output.quality is None)


def _parameters(output: OutputFormat) -> Json:
    match output.format:
        case "png":
            # Run-length matching only: on three 1024² photographs it takes 71 ms and 1,330 KB. zlib's usual search
            # takes 79 ms and 1,510 KB at level 1, 156 ms and 1,345 KB at level 4; graphics also are smaller than at 4.
            return {"format": "PNG", "compress_level": 1, "compress_type": zlib.Z_RLE}
        case "jpeg":
            # Full colour resolution: 4:2:0 blurs edges that annotators and the next stage use.
            return {"format": "JPEG", "quality": output.quality or 95, "subsampling": 0}
        case "webp" if output.quality is None:
            # 182 ms and 912 KB; the library's default effort takes 552 ms and 881 KB.
            return {"format": "WEBP", "lossless": True, "quality": 20, "method": 1}
        case "webp":
            return {"format": "WEBP", "quality": output.quality, "method": 4}


def _embedded(output: OutputFormat, text: str, xmp: bytes) -> dict[str, Any]:
    if output.format != "png":
        return {"xmp": xmp}
    chunks = PngImagePlugin.PngInfo()
    chunks.add_itxt(_PNG_RECORD, text)
    chunks.add_itxt("XML:com.adobe.xmp", xmp.decode())
    return {"pnginfo": chunks}


def _xmp(record: str, source_type: str) -> bytes:
    return f"""<?xpacket begin="\ufeff" id="W5M0MpCehiHzreSzNTczkc9d"?>
<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:RDF xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#">
<rdf:Description rdf:about="" xmlns:Iptc4xmpExt="http://iptc.org/std/Iptc4xmpExt/2008-02-29/"
 xmlns:xmp="http://ns.adobe.com/xap/1.0/" xmlns:sdp="urn:sdpipeline:1.0/">
<Iptc4xmpExt:DigitalSourceType>{source_type}</Iptc4xmpExt:DigitalSourceType>
<Iptc4xmpExt:AISystemUsed>sdpipeline</Iptc4xmpExt:AISystemUsed>
<Iptc4xmpExt:AISystemVersionUsed>{__version__}</Iptc4xmpExt:AISystemVersionUsed>
<xmp:CreatorTool>sdpipeline {__version__}</xmp:CreatorTool>
<sdp:record>{escape(record)}</sdp:record>
</rdf:Description></rdf:RDF></x:xmpmeta>
<?xpacket end="w"?>""".encode()


def _xmp_properties(image: Image.Image) -> dict[str, Any]:
    xmp = image.info.get("xmp", b"")
    untrusted.check_xmp(xmp if isinstance(xmp, bytes) else xmp.encode())
    found: Any = image.getxmp()
    for name in ("xmpmeta", "RDF", "Description"):
        found = found.get(name, {}) if isinstance(found, dict) else {}
    # Other tools may split one description into several.
    descriptions = found if isinstance(found, list) else [found]
    return {name: value for part in descriptions if isinstance(part, dict) for name, value in part.items()}


@contextmanager
def _opened(data: bytes, max_pixels: int | None) -> Iterator[Image.Image]:
    untrusted.check_structure(data)
    try:
        with Image.open(io.BytesIO(data), formats=("PNG", "JPEG", "WEBP")) as image:
            if max_pixels is not None and image.width * image.height > max_pixels:
                raise InputImageError(
                    f"a picture of {image.width} x {image.height} is larger than the {max_pixels:,} pixels allowed"
                )
            yield image
    except PIL.UnidentifiedImageError as error:  # its message contains a memory address
        raise InputImageError("not a whole png, jpeg or webp picture") from error
    except _BOMB as error:
        raise InputImageError(f"the picture is a decompression bomb: {error}") from error
    except RecursionError as error:
        raise InputImageError("the picture's metadata is nested too deeply") from error
    except MemoryError as error:
        raise InputImageError("the picture needs more memory than is available") from error
    except _BROKEN as error:
        raise InputImageError(f"not a whole png, jpeg or webp picture: {error}") from error


def _upright(image: Image.Image) -> Image.Image:
    try:
        return ImageOps.exif_transpose(image)
    except (ArithmeticError, AttributeError, LookupError, TypeError) as error:  # values of types unknown to EXIF
        raise InputImageError(f"its EXIF metadata is broken: {error}") from error


def _rgb(image: Image.Image) -> Image.Image:
    if image.mode in ("I", "F"):
        raise InputImageError(f"pixels of mode {image.mode} have no known range: give 8 or 16 bits per channel")
    if image.mode.startswith("I;16"):
        # convert() would clip at 255 instead of scaling.
        return Image.fromarray((np.asarray(image) >> 8).astype(np.uint8), "L").convert("RGB")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return _in_srgb(image)


def _in_srgb(image: Image.Image) -> Image.Image:
    profile = image.info.get("icc_profile")
    if not profile or image.mode not in ("RGB", "CMYK"):
        return image.convert("RGB")
    try:
        own = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        converted = ImageCms.profileToProfile(image, own, ImageCms.createProfile("sRGB"), outputMode="RGB")
    except (ImageCms.PyCMSError, OSError) as error:
        raise InputImageError(f"the colour profile is broken: {error}") from error
    return image.convert("RGB") if converted is None else converted
