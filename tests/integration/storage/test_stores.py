"""Behaviour that differs between the stores."""

from __future__ import annotations

import resource
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.request import urlopen

import pytest

from sdpipeline.errors import StorageUnavailableError
from sdpipeline.storage import LocalStore, open_store


def test_a_directory_is_opened_by_its_address(tmp_path: Path) -> None:
    root = tmp_path / "two words & ä"
    store = open_store(root.as_uri())
    store.put("a/b.png", b"picture", content_type="image/png")
    assert (root / "a/b.png").read_bytes() == b"picture"
    assert store.url("a/b.png") == (root / "a/b.png").as_uri()
    with urlopen(store.link("a/b.png")) as opened:
        assert opened.read() == b"picture"


def test_a_put_leaves_nothing_but_the_object(tmp_path: Path) -> None:
    store = LocalStore(tmp_path)
    for data in (b"one", b"one"):
        store.put("a", data, content_type="text/plain")
    assert [path.name for path in tmp_path.rglob("*") if path.is_file()] == ["a"]


def test_a_full_disk_leaves_no_object(tmp_path: Path) -> None:
    store = LocalStore(tmp_path)
    with _files_of_at_most(1000), pytest.raises(StorageUnavailableError, match="File too large"):
        store.put("a", bytes(2000), content_type="image/png")
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []


def test_a_directory_that_cannot_be_made_is_unavailable(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(StorageUnavailableError, match=r"Not a directory|File exists"):
        LocalStore(tmp_path / "file").put("a/b", b"x", content_type="text/plain")


@contextmanager
def _files_of_at_most(size_bytes: int) -> Iterator[None]:
    # The closest equivalent of a full disk without a mount: writes beyond the limit fail with EFBIG.
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size_bytes, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
