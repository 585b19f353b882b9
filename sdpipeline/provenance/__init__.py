"""Provenance of pictures: encoding with an embedded record, C2PA signing, and verification."""

from sdpipeline.provenance.disclosure import disclosed, discloses_more, include_prompt, own_part
from sdpipeline.provenance.encoding import (
    COMPOSITE,
    GENERATED,
    LARGEST_PICTURE,
    EncodedImage,
    content_type,
    decode,
    digital_source_type,
    encode,
    encoder,
    pixels_sha256,
    read_record,
)
from sdpipeline.provenance.manifest import Ingredient, ParentPicture, VerifiedPicture, inspect, rehearse, sign, verify

__all__ = [
    "COMPOSITE",
    "GENERATED",
    "LARGEST_PICTURE",
    "EncodedImage",
    "Ingredient",
    "ParentPicture",
    "VerifiedPicture",
    "content_type",
    "decode",
    "digital_source_type",
    "disclosed",
    "discloses_more",
    "encode",
    "encoder",
    "include_prompt",
    "inspect",
    "own_part",
    "pixels_sha256",
    "read_record",
    "rehearse",
    "sign",
    "verify",
]
