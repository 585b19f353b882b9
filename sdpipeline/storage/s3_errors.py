"""What an S3 endpoint says when it refuses, in our own errors."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import TYPE_CHECKING

from sdpipeline.errors import ObjectMissingError, StorageUnavailableError

if TYPE_CHECKING:
    from botocore.exceptions import ClientError

# A 412 may be our own doing: when the reply to a put is lost, botocore repeats it and meets the object
# that the first one made. The same repetition finds a completed upload gone.
ALREADY_THERE = {"PreconditionFailed", "412", "NoSuchUpload"}
_MISSING = {"404", "NotFound", "NoSuchKey", "NoSuchVersion"}
_FIXES = {
    "NoSuchBucket": "create the bucket or correct SDP_STORAGE_URL",
    "AccessDenied": "check the credentials and what they may do",
    "403": "check the credentials and what they may do",
    "InvalidAccessKeyId": "check the credentials",
    "SignatureDoesNotMatch": "check the credentials",
    "ExpiredToken": "renew the credentials",
    "PermanentRedirect": "set SDP_S3__REGION",
    "AuthorizationHeaderMalformed": "set SDP_S3__REGION",
    "IllegalLocationConstraintException": "set SDP_S3__REGION",
}


class UnsupportedError(StorageUnavailableError):
    """The endpoint does not know this operation."""


@contextlib.contextmanager
def translated(address: str) -> Iterator[None]:
    """Turns botocore's errors about ``address`` into ours; what is not there raises ObjectMissingError."""
    from botocore.exceptions import BotoCoreError, ClientError

    try:
        yield
    except ClientError as error:
        code, message = error_code(error), error.response.get("Error", {}).get("Message", "")
        if code in _MISSING:
            raise ObjectMissingError(f"{address} does not exist") from error
        kind = UnsupportedError if code == "NotImplemented" else StorageUnavailableError
        fix = f" ({_FIXES[code]})" if code in _FIXES else ""
        raise kind(f"{address}: {code}: {message}{fix}") from error
    except BotoCoreError as error:
        fix = "check SDP_STORAGE_URL, SDP_S3__ENDPOINT_URL and the credentials"
        raise StorageUnavailableError(f"{address}: {error} ({fix})") from error


def error_code(error: ClientError) -> str:
    """S3's own name for the error, or the HTTP status where a reply without a body has no name."""
    return error.response.get("Error", {}).get("Code", "")
