"""boto3 clients that resolve their credentials again when the service refuses them."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

from sdpipeline.aws.errors import CREDENTIALS_REFUSED, library_errors

if TYPE_CHECKING:
    from botocore.credentials import Credentials, ReadOnlyCredentials

_RENEWED = "sdpipeline_renewed"
# The reply to a HEAD request has no body that could name the refusal.
_UNNAMED = frozenset({"400", "401", "403"})


def make_client(service: str, **options: Any) -> Any:
    """Create a client with credentials of boto3's own chain; it must not be shared across fork().

    botocore reads a profile or the environment once. If the service refuses the credentials, the whole chain is
    resolved again, and the request is repeated if other credentials were found.
    """
    import boto3
    import botocore.session

    core = botocore.session.get_session()
    credentials = RenewableCredentials(options.get("region_name"))
    core.register_component("credential_provider", credentials)
    client = boto3.session.Session(botocore_session=core).client(service, **options)  # type: ignore[call-overload]
    client.meta.events.register(f"needs-retry.{service}", credentials.retry_with_others)
    return client


class RenewableCredentials:
    """Credentials for botocore, and the provider that returns them. Safe to use from several threads."""

    method = "renewable"

    def __init__(self, region: str | None = None) -> None:
        self._region = region
        self._found: Credentials | None = None
        self._changing = threading.Lock()
        self._sent = threading.local()

    def load_credentials(self) -> RenewableCredentials:
        """Implement botocore's credential resolver."""
        return self

    def get_frozen_credentials(self) -> ReadOnlyCredentials:
        """Implement botocore's Credentials; raises CredentialRetrievalError or NoCredentialsError."""
        with self._changing:
            found = self._found = self._found or self._resolve()
        self._sent.last = frozen = _frozen(found)
        return frozen

    def get_deferred_property(self, property_name: str) -> Callable[[], Any]:
        """Implement botocore's Credentials."""
        return lambda: getattr(self._found, property_name, None)

    def retry_with_others(self, request_dict: Any, response: Any = None, **_: Any) -> float | None:
        """Handle botocore's event needs-retry: a delay of 0 repeats the request with the renewed credentials."""
        if response is None or _RENEWED in request_dict["context"] or not _refused(response[1], request_dict):
            return None
        request_dict["context"][_RENEWED] = True
        from botocore.exceptions import BotoCoreError

        try:
            return 0.0 if self._renew(getattr(self._sent, "last", None)) else None
        except BotoCoreError:  # a file that is being written: the refusal stands, and the next request resolves again
            return None

    def _renew(self, refused: ReadOnlyCredentials | None) -> bool:
        """Resolve again unless another thread has; return True if the result differs from what was refused."""
        with self._changing:
            if self._found is None or _frozen(self._found) == refused:
                self._found = None
                self._found = self._resolve()
            return _frozen(self._found) != refused

    def _resolve(self) -> Credentials:
        import botocore.session
        from botocore.exceptions import NoCredentialsError

        fresh = botocore.session.get_session()  # a session caches the files that it has read
        if self._region:
            fresh.set_config_variable("region", self._region)
        with _retrieval():
            found = fresh.get_credentials()
        if found is None:
            raise NoCredentialsError
        return found


def _frozen(credentials: Credentials) -> ReadOnlyCredentials:
    with _retrieval():
        return credentials.get_frozen_credentials()


@contextlib.contextmanager
def _retrieval() -> Iterator[None]:
    """Raise CredentialRetrievalError for any error of a provider: files, programs, other services.

    RuntimeError is botocore's for refreshed credentials that are expired already; LookupError means that a reply lacks
    a field.
    """
    from botocore.exceptions import CredentialRetrievalError, NoCredentialsError

    errors: tuple[type[Exception], ...] = (*library_errors(), RuntimeError, LookupError, TypeError)
    try:
        yield
    except (CredentialRetrievalError, NoCredentialsError):
        raise
    except errors as error:
        raise CredentialRetrievalError(provider="credentials", error_msg=f"{type(error).__name__}: {error}") from error


def _refused(parsed: Any, request_dict: Any) -> bool:
    named = parsed.get("Error")
    code = named.get("Code") if isinstance(named, dict) else None
    unnamed = request_dict.get("method") == "HEAD" and str(code) in _UNNAMED
    return code in CREDENTIALS_REFUSED or unnamed
