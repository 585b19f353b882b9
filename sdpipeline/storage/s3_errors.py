"""Translation of S3 refusals and broken connections into our own errors."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from sdpipeline.aws import error_code, explained, library_errors
from sdpipeline.errors import ObjectMissingError, StorageUnavailableError

__all__ = ["ALREADY_THERE", "UnsupportedError", "check_listing", "check_reply", "cut_body_errors", "error_code"]
__all__ += ["is_web_page", "not_retried_errors", "translated"]

# We may have caused a 412 ourselves: if the reply to a put is lost, botocore repeats it and finds the object of the
# first attempt. For a completed upload, the repetition finds no upload. Some versions of MinIO send 304 for 412.
ALREADY_THERE = {"PreconditionFailed", "412", "NoSuchUpload", "NotModified", "304"}
_MISSING = {"404", "NotFound", "NoSuchKey", "NoSuchVersion"}


class UnsupportedError(StorageUnavailableError):
    """Operation that the endpoint does not support."""


@contextlib.contextmanager
def translated(address: str) -> Iterator[None]:
    """Translate every error of a boto3 call about ``address``; a missing object raises ObjectMissingError."""
    from botocore.exceptions import BotoCoreError, ClientError

    try:
        yield
    except ClientError as error:
        code = error_code(error)
        if code in _MISSING and (error.operation_name.startswith("Head") or not is_web_page(error)):
            raise ObjectMissingError(f"{address} does not exist") from error
        kind = UnsupportedError if code in {"NotImplemented", "501"} else StorageUnavailableError
        raise kind(f"{address}: {explained(error)}") from error
    except BotoCoreError as error:
        fix = "check SDP_STORAGE_URL, SDP_S3__ENDPOINT_URL and the credentials"
        raise StorageUnavailableError(f"{address}: {explained(error)} ({fix})") from error
    except library_errors() as error:
        raise StorageUnavailableError(
            f"{address}: the reply was cut or malformed: {type(error).__name__}: {explained(error)}"
        ) from error


def not_retried_errors() -> tuple[type[Exception], ...]:
    """Return the errors of broken connections that botocore neither translates nor retries.

    They occur when the body of an error reply was cut.
    """
    from urllib3.exceptions import HTTPError

    return (HTTPError,)


def cut_body_errors() -> tuple[type[Exception], ...]:
    """Return the errors of reading an object's body, which botocore does not retry."""
    from botocore.exceptions import HTTPClientError, IncompleteReadError
    from botocore.exceptions import SSLError as BrokenTlsError

    return (HTTPClientError, IncompleteReadError, BrokenTlsError, *not_retried_errors())


def check_reply(answer: Any, address: str) -> None:
    """Refuse a reply with status 200 that is not from an S3 server, e.g. the page of a proxy or captive portal."""
    if not answer.get("ETag") or answer.get("LastModified") is None:
        raise StorageUnavailableError(f"{address}: the reply has no ETag or date: it is not from an S3 endpoint")


def check_listing(page: Any, address: str) -> None:
    """Check a page of a listing as ``check_reply`` does: a foreign page would read as an empty bucket."""
    if "IsTruncated" not in page and not page.get("Name"):
        raise StorageUnavailableError(f"{address}: the reply is not a listing: it is not from an S3 endpoint")


def is_web_page(error: BaseException | None) -> bool:
    """Return True if a refusal may be a load balancer's page.

    S3 answers in XML; a reply to HEAD shows only its content type.
    """
    response: Any = getattr(error, "response", None) or {}
    headers = response.get("ResponseMetadata", {}).get("HTTPHeaders", {})
    return str(headers.get("content-type", "")).lower().startswith("text/html")
