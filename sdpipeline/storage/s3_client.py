"""Options of an S3 endpoint, and a client configured with them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

from sdpipeline import __version__
from sdpipeline.aws import make_client
from sdpipeline.errors import Mistake, SettingsError

if TYPE_CHECKING:
    from mypy_boto3_s3 import S3Client


@dataclass(frozen=True, slots=True, kw_only=True)
class S3Options:
    """Options of an S3 endpoint and of every object written; credentials come from boto3's own chain."""

    endpoint_url: str | None = None
    region: str | None = None
    addressing_style: Literal["auto", "path", "virtual"] = "auto"
    sse_kms_key_id: str | None = None
    tags: Mapping[str, str] = field(default_factory=dict)
    object_lock_mode: Literal["GOVERNANCE", "COMPLIANCE"] | None = None
    object_lock_days: int = 365
    total_max_attempts: int = 5
    connect_timeout_s: float = 5
    read_timeout_s: float = 30
    max_connections: int = 16
    part_size_bytes: int = 64 * 2**20


def connect(options: S3Options) -> S3Client:
    """Create a client, which takes a tenth of a second; raises SettingsError for a wrong endpoint URL."""
    from botocore.config import Config

    config = Config(
        signature_version="s3v4",
        connect_timeout=options.connect_timeout_s,
        read_timeout=options.read_timeout_s,
        tcp_keepalive=True,
        max_pool_connections=options.max_connections,
        # `max_attempts` would count the retries after the first attempt.
        retries={"mode": "standard", "total_max_attempts": options.total_max_attempts},
        s3={"addressing_style": options.addressing_style},
        # Weak endpoints do not understand boto3's default checksums; we send a SHA-256 and read back.
        request_checksum_calculation="when_required",
        response_checksum_validation="when_required",
        user_agent_extra=f"sdpipeline/{__version__}",
    )
    try:
        client: S3Client = make_client(
            "s3", endpoint_url=options.endpoint_url, region_name=options.region, config=config
        )
    except ValueError as error:
        raise SettingsError(Mistake(key="SDP_S3__ENDPOINT_URL", message=str(error), fix="https://host:port")) from error
    return client
