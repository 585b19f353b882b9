"""Optional headers of a put, and detection of those that an endpoint refuses."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import combinations
from typing import TYPE_CHECKING, Any

import structlog

from sdpipeline.storage.s3_errors import ALREADY_THERE, error_code

if TYPE_CHECKING:
    from botocore.exceptions import ClientError

TRY_AGAIN_S = 3600.0
"""A header that was refused is sent again after this time: endpoints are upgraded."""

_PAUSE_S = 0.2
# Codes of a refused header; each has other causes too.
_MAY_BE_A_HEADER = {"NotImplemented", "XNotImplemented", "501", "InvalidArgument", "InvalidRequest", "400"}
_MAY_BE_A_HEADER |= {"BadRequest", "UnsupportedHeader", "BadDigest", "InvalidDigest", "XAmzContentChecksumMismatch"}

CHECKSUMS, TAGS, CONDITION = "checksums", "tags", "conditional put"
FEATURES: Mapping[str, frozenset[str]] = {
    CHECKSUMS: frozenset({"ChecksumAlgorithm", "ChecksumSHA256"}),
    TAGS: frozenset({"Tagging"}),
    CONDITION: frozenset({"IfNoneMatch"}),
}
"""Parameters of boto3's put_object, by the name that ``doctor`` and ``status`` give the feature."""

LOSSES = {
    CHECKSUMS: "the endpoint refuses x-amz-checksum headers: Content-MD5 and reading back detect damage in transit",
    TAGS: "the endpoint refuses x-amz-tagging: lifecycle, cost and access rules based on tags do not apply to objects",
    CONDITION: "the endpoint refuses If-None-Match: two simultaneous writers of one key are not detected",
}

_log = structlog.get_logger(__name__)

Send = Callable[[frozenset[str]], None]
"""Perform the put without these features; raises ClientError."""


@dataclass(slots=True)
class Refused:
    """Features that the endpoint at ``address`` refuses. Safe to use from several threads."""

    address: str
    _until: dict[str, float] = field(default_factory=dict)
    _logged: set[str] = field(default_factory=set)
    _learning: threading.Lock = field(default_factory=threading.Lock)

    def now(self) -> frozenset[str]:
        """Return the features to leave out of a put."""
        return frozenset(name for name, until in dict(self._until).items() if time.monotonic() < until)

    def losses(self) -> Mapping[str, str]:
        """Return each refused feature with the consequence."""
        return {name: LOSSES[name] for name in FEATURES if name in self.now()}

    def put(self, send: Send, used: Collection[str]) -> bool:
        """Return True if the object was written, False if the key was taken.

        A refused put is repeated once unchanged. If it is refused again, ``used`` features are left out, first one at a
        time. A feature counts as refused if the put without it is accepted and the put with it is refused again.
        """
        if isinstance(outcome := _outcome(send, self.now()), bool):
            return outcome
        time.sleep(_PAUSE_S)
        if isinstance(outcome := _outcome(send, self.now()), bool):
            return outcome
        return self._find_refused_features(send, used, outcome)

    def _find_refused_features(self, send: Send, used: Collection[str], refusal: ClientError) -> bool:
        with self._learning:
            known = self.now()
            suspected = [name for name in FEATURES if name in used and name not in known]
            for suspects in (frozenset[str](), *_sets(suspected)):
                # The empty set first: another thread may have found the refused feature meanwhile.
                if isinstance(written := _outcome(send, known | suspects), bool):
                    if written:
                        self._convict(send, known, suspects)
                    return written
        raise refusal

    def _convict(self, send: Send, known: frozenset[str], suspects: frozenset[str]) -> None:
        """Repeat the put of the object that exists now, with one suspect at a time."""
        for name in suspects:
            # A condition would be evaluated before the header; overwriting with the same bytes is harmless.
            others = suspects - {name} | ({CONDITION} if name != CONDITION else frozenset())
            if not isinstance(_outcome(send, known | others), bool):
                self._until[name] = time.monotonic() + TRY_AGAIN_S
                if name not in self._logged:
                    self._logged.add(name)
                    _log.warning("storage_feature_refused", address=self.address, feature=name, loss=LOSSES[name])


def used_in(target: Mapping[str, Any]) -> frozenset[str]:
    """Return the features that a put with these parameters uses; a condition and checksums are always used."""
    return frozenset(name for name in FEATURES if name != TAGS or FEATURES[name] & target.keys())


def without(parameters: Mapping[str, Any], dropped: Collection[str]) -> dict[str, Any]:
    """Return the parameters without those of the dropped features."""
    removed = frozenset[str]().union(*(FEATURES[name] for name in dropped))
    return {name: value for name, value in parameters.items() if name not in removed}


def _sets(names: list[str]) -> Iterator[frozenset[str]]:
    return (frozenset(some) for size in range(1, len(names) + 1) for some in combinations(names, size))


def _outcome(send: Send, dropped: frozenset[str]) -> bool | ClientError:
    """Return True if written, False if the key is taken, or the error if a header may have been refused."""
    from botocore.exceptions import ClientError

    try:
        send(dropped)
    except ClientError as error:
        code = error_code(error)
        if code in ALREADY_THERE:
            return False
        if code in _MAY_BE_A_HEADER:
            return error
        raise
    return True
