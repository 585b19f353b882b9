"""Credentials that expire or are rotated while a process runs."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from sdpipeline.errors import StorageUnavailableError
from sdpipeline.storage import ForeignObjects, S3Options, S3Store
from tests.integration.conftest import CREDENTIALS, Bucket
from tests.integration.fault_proxy import FaultProxy

PICTURE = b"picture"
KEY, SECRET = CREDENTIALS.values()
REFUSED = ["ExpiredToken", "InvalidAccessKeyId", "TokenRefreshRequired", "InvalidClientTokenId", "InvalidToken"]

Write = Callable[[str, str, str], None]


@pytest.fixture
def profile(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Write:
    """A function that writes the credentials file that boto3 reads."""
    for name in CREDENTIALS:
        monkeypatch.delenv(name)
    path = tmp_path / "credentials"
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(path))

    def write(key: str, secret: str, token: str = "") -> None:
        session = f"aws_session_token={token}\n" if token else ""
        path.write_text(f"[default]\naws_access_key_id={key}\naws_secret_access_key={secret}\n{session}")

    return write


@pytest.fixture
def process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Write:
    """A function that writes the output of a credential_process."""
    for name in CREDENTIALS:
        monkeypatch.delenv(name)
    document, config = tmp_path / "printed.json", tmp_path / "config"
    program = f"{sys.executable} -c \"print(open('{document}').read())\""
    config.write_text(f"[default]\ncredential_process = {program}\n")
    monkeypatch.setenv("AWS_CONFIG_FILE", str(config))

    def write(key: str, secret: str, token: str = "") -> None:
        about = {"Version": 1, "AccessKeyId": key, "SecretAccessKey": secret, "SessionToken": token}
        document.write_text(json.dumps(about))

    return write


@pytest.mark.parametrize("source", ["profile", "process"])
@pytest.mark.parametrize("refused", [("wrong-key", SECRET), (KEY, "wrong-secret")])
def test_rotated_keys_are_seen_by_a_running_store(
    request: pytest.FixtureRequest, weak_bucket: Bucket, source: str, refused: tuple[str, str]
) -> None:
    write: Write = request.getfixturevalue(source)
    write(*refused, "")
    store, foreign = weak_bucket.store(), ForeignObjects(weak_bucket.store()._options)
    for ask in (lambda: store.put("a", PICTURE, content_type="image/png"), lambda: list(store.list())):
        with pytest.raises(StorageUnavailableError, match="read again at each attempt"):
            ask()
    write(KEY, SECRET, "")
    store.put("a", PICTURE, content_type="image/png")
    assert foreign.read(store.url("a"), most_bytes=100).data == PICTURE
    write(KEY, "another", "")  # credentials that work are not read again
    assert store.head("a") is not None


@pytest.mark.parametrize("code", REFUSED)
def test_a_renewed_token_is_used_in_the_same_request(moto_bucket: Bucket, profile: Write, code: str) -> None:
    def refuse(_method: str, headers: object) -> str | None:
        expired = isinstance(headers, dict) and headers.get("x-amz-security-token") == "old"
        return f"400 {code} The provided token has expired." if expired else None

    profile(KEY, SECRET, "old")
    with FaultProxy(moto_bucket.endpoint_url, refuse=refuse) as proxy:
        store = moto_bucket.store(endpoint_url=proxy.url)
        with pytest.raises(StorageUnavailableError, match=f"{code}.*read again at each attempt"):
            store.get("a")
        assert len(proxy.refused) == 1
        profile(KEY, SECRET, "new")
        store.put("a", PICTURE, content_type="image/png")
        assert store.head("a") is not None
        assert len(proxy.refused) == 2


def test_a_head_that_is_refused_without_a_name_renews_too(moto_bucket: Bucket, profile: Write) -> None:
    def refuse(_method: str, headers: object) -> str | None:
        return "400 ExpiredToken" if isinstance(headers, dict) and headers["x-amz-security-token"] == "old" else None

    profile(KEY, SECRET, "old")
    with FaultProxy(moto_bucket.endpoint_url, refuse=refuse) as proxy:
        store = moto_bucket.store(endpoint_url=proxy.url)
        with pytest.raises(StorageUnavailableError):
            store.head("a")
        profile(KEY, SECRET, "new")
        assert store.head("a") is None


@pytest.mark.parametrize(
    "broken",
    [
        "[default\n",
        "[default]\naws_access_key_id=only\n",
        "",
        None,
    ],
    ids=["not-ini", "half", "empty", "missing"],
)
def test_a_credentials_file_that_is_being_written_is_an_outage(
    weak_bucket: Bucket, profile: Write, broken: str | None
) -> None:
    store = weak_bucket.store()
    if broken is not None:
        Path(os.environ["AWS_SHARED_CREDENTIALS_FILE"]).write_text(broken)
    with pytest.raises(StorageUnavailableError, match=r"(?i)credential|config"):
        store.get("a")
    profile(KEY, SECRET, "")
    store.put("a", PICTURE, content_type="image/png")


@pytest.mark.parametrize("printed", ["no json", "{}", '{"Version": 1}'])
def test_a_credential_process_that_prints_nonsense_is_an_outage(
    weak_bucket: Bucket, process: Write, tmp_path: Path, printed: str
) -> None:
    (tmp_path / "printed.json").write_text(printed)
    store = weak_bucket.store()
    with pytest.raises(StorageUnavailableError, match="redentials"):
        store.get("a")
    process(KEY, SECRET, "")
    store.put("a", PICTURE, content_type="image/png")


def test_a_role_whose_token_file_is_missing_is_an_outage(
    moto_bucket: Bucket, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in CREDENTIALS:
        monkeypatch.delenv(name)
    token = tmp_path / "token"
    monkeypatch.setenv("AWS_WEB_IDENTITY_TOKEN_FILE", str(token))
    monkeypatch.setenv("AWS_ROLE_ARN", "arn:aws:iam::123456789012:role/worker")
    monkeypatch.setenv("AWS_ENDPOINT_URL_STS", moto_bucket.endpoint_url)
    store = S3Store(moto_bucket.name, options=S3Options(endpoint_url=moto_bucket.endpoint_url, region="us-east-1"))
    with pytest.raises(StorageUnavailableError, match="FileNotFoundError"):
        store.get("a")
    token.write_text("a token of the cluster's")
    store.put("a", PICTURE, content_type="image/png")
