"""Exceptions that a boto3 call can raise, and the fix for each refusal."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from email.utils import parsedate_to_datetime
from http.client import HTTPException
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from botocore.exceptions import ClientError

CREDENTIALS_REFUSED = frozenset(
    {
        "AuthFailure",
        "ExpiredToken",
        "ExpiredTokenException",
        "InvalidAccessKeyId",
        "InvalidClientTokenId",
        "InvalidSecurity",
        "InvalidToken",
        "SignatureDoesNotMatch",
        "TokenRefreshRequired",
        "UnrecognizedClientException",
    }
)
"""Refusals of the credentials themselves: other credentials may be accepted."""

CLOCK_IS_WRONG = frozenset({"RequestTimeTooSkewed", "RequestExpired", "RequestInTheFuture"})
_DENIED = frozenset({"AccessDenied", "AccessDeniedException", "AllAccessDisabled", "403", "401"})
_FULL = frozenset({"507", "InsufficientStorage", "QuotaExceeded", "XMinioAdminBucketQuotaExceeded"})
_FULL |= {"XMinioStorageFull", "StorageFull", "ServiceQuotaExceededException"}
_WRONG_REGION = frozenset({"301", "307", "PermanentRedirect", "AuthorizationHeaderMalformed"})
_WRONG_REGION |= {"IllegalLocationConstraintException", "TemporaryRedirect"}
_RENEW = (
    "check the credentials: those of a file, a role, a process or a container are read again at each attempt;"
    " those of AWS_ variables need a restart"
)
_FIXES = (
    dict.fromkeys(CREDENTIALS_REFUSED, _RENEW)
    | dict.fromkeys(_DENIED, "check the credentials and their permissions")
    | dict.fromkeys(_FULL, "free space there, or raise the quota")
    | dict.fromkeys(_WRONG_REGION, "set SDP_S3__REGION")
    | {
        "NoSuchBucket": "create the bucket or correct SDP_STORAGE_URL",
        "InvalidTag": "correct SDP_S3__TAGS",
        "NotFoundException": "correct SDP_SIGNING__KMS_KEY_ID",
        "DisabledException": "enable the key, or name another in SDP_SIGNING__KMS_KEY_ID",
    }
)
_ENCRYPTION = "SDP_S3__SSE_KMS_KEY_ID names a key that these credentials may not use, or that is disabled or missing:"
_ENCRYPTION += " allow kms:GenerateDataKey and kms:Decrypt on it"


def library_errors() -> tuple[type[Exception], ...]:
    """Return every exception class that boto3 raises for a request: its own, and those that pass through it.

    botocore translates urllib3's errors until the reply begins, and some of them while a body is read. The body of an
    error is read outside of that code: a cut connection raises ProtocolError. ValueError is a reply with malformed
    headers or fields.
    """
    from botocore.exceptions import BotoCoreError, ClientError
    from botocore.parsers import ResponseParserError
    from urllib3.exceptions import HTTPError

    return BotoCoreError, ClientError, ResponseParserError, HTTPError, HTTPException, OSError, ValueError


def error_code(error: ClientError) -> str:
    """Return the service's name for the error, or the HTTP status if the reply has no such name."""
    response: Any = error.response
    named = response.get("Error")
    code = named.get("Code") if isinstance(named, dict) else None
    return str(code or response.get("ResponseMetadata", {}).get("HTTPStatusCode", ""))


def explained(error: Exception) -> str:
    """Return the error in one line, with the fix if there is one."""
    from botocore.exceptions import ClientError, ReadTimeoutError, SSLError

    if isinstance(error, ClientError):
        code, message = error_code(error), str(error.response.get("Error", {}).get("Message") or "")
        fix = _fix(error, code, message)
        return f"{code}: {message or 'a reply without an error document'}" + (f" ({fix})" if fix else "")
    text = " ".join(str(error).split()) or type(error).__name__
    if isinstance(error, SSLError):
        return f"{text} (check the certificate of the endpoint; AWS_CA_BUNDLE names the authorities to trust)"
    if isinstance(error, ReadTimeoutError):
        return f"{text} (the endpoint is slow or hangs)"
    return text


def _fix(error: ClientError, code: str, message: str) -> str | None:
    if code.startswith("KMS.") or (code in _DENIED and "kms:" in message.lower()):
        return _ENCRYPTION
    if code in CLOCK_IS_WRONG:
        return f"{_clock(error)}: set it by NTP"
    return _FIXES.get(code)


def _clock(error: ClientError) -> str:
    """Describe the difference between this machine's clock and the service's, from the reply's Date header."""
    headers = error.response.get("ResponseMetadata", {}).get("HTTPHeaders", {})
    try:
        ahead = datetime.now(UTC) - parsedate_to_datetime(headers.get("date", ""))
    except (TypeError, ValueError):
        return "the clock of this machine or of the endpoint is wrong"
    if abs(ahead) < timedelta(seconds=1):
        return "the clock of this machine was wrong, or the request took too long"
    return f"the clock of this machine is {abs(ahead).total_seconds():.0f} s {'ahead' if ahead.days >= 0 else 'behind'}"
