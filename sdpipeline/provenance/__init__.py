"""From pixels to a file that says, signed, what made it, and back."""

from sdpipeline.provenance.encoding import (
    COMPOSITE,
    GENERATED,
    EncodedImage,
    content_type,
    decode,
    digital_source_type,
    encode,
    encoder,
    pixels_sha256,
    read_record,
)
from sdpipeline.provenance.manifest import Ingredient, ParentPicture, VerifiedPicture, sign, verify

__all__ = [
    "COMPOSITE",
    "GENERATED",
    "EncodedImage",
    "Ingredient",
    "ParentPicture",
    "VerifiedPicture",
    "content_type",
    "decode",
    "digital_source_type",
    "encode",
    "encoder",
    "pixels_sha256",
    "read_record",
    "sign",
    "verify",
]
