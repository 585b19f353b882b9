"""Keys and URLs that storage accepts."""

from __future__ import annotations

import pytest

from sdpipeline.errors import BadInputError, SettingsError
from sdpipeline.storage import check_key, open_store


@pytest.mark.parametrize("key", ["a", "team/spring/draft/0af/9c.png", "Größe/ä b.png", "a..b/c...d"])
def test_a_key_is_segments_between_slashes(key: str) -> None:
    assert check_key(key) == key


@pytest.mark.parametrize(
    "key",
    [
        *("", "/", "/etc/passwd", "a/", "a//b", "..", "../a", "a/../b", "a/..", ".", "a/./b", ".incoming/a"),
        *("a\\b", "a\0b", "a\nb", "a" * 256, "a/" * 512 + "a"),
    ],
)
def test_a_key_that_could_leave_the_store_or_not_fit_is_refused(key: str) -> None:
    with pytest.raises(BadInputError, match="is not a storage key"):
        check_key(key)


@pytest.mark.parametrize("url", ["", "/tmp/pictures", "file:pictures", "file://host/pictures", "ftp://a/b", "s3:///a"])
def test_an_address_that_names_no_store_is_refused(url: str) -> None:
    with pytest.raises(SettingsError, match=r"neither file:///directory nor s3://bucket/prefix"):
        open_store(url)
