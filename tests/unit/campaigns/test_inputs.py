"""Access rules for files that a campaign reads, tested with small files in a temporary folder."""

from __future__ import annotations

import hashlib
import io
import os
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from sdpipeline.campaigns.inputs import InputFolder
from sdpipeline.errors import InputImageError


def png(width: int = 16, height: int = 8) -> bytes:
    file = io.BytesIO()
    Image.fromarray(np.full((height, width, 3), 90, np.uint8)).save(file, "PNG")
    return file.getvalue()


def bomb(width: int, height: int) -> bytes:
    """A PNG whose header claims a huge size."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(bytes(99))) + chunk(b"IEND", b"")
    )


def refusal(folder: InputFolder, name: str) -> str:
    with pytest.raises(InputImageError) as refused:
        folder.open(name)
    return str(refused.value)


@pytest.fixture
def folder(tmp_path: Path) -> InputFolder:
    return InputFolder(tmp_path, max_pixels=10_000)


def test_a_picture_is_known_by_its_digest_and_its_size(folder: InputFolder) -> None:
    (folder.folder / "sub").mkdir()
    (folder.folder / "sub" / "a.png").write_bytes(png())
    found = folder.open("sub/a.png")
    assert (found.width, found.height) == (16, 8)
    assert found.key == f"inputs/{hashlib.sha256(png()).hexdigest()}"


def test_a_picture_is_read_once(folder: InputFolder) -> None:
    path = folder.folder / "a.png"
    path.write_bytes(png())
    first = folder.open("a.png")
    path.unlink()
    assert folder.open("a.png") is first


@pytest.mark.parametrize("name", ["../a.png", "/etc/hostname", "x/../../a.png", "link.png", "linked/a.png"])
def test_nothing_outside_the_folder_is_opened(tmp_path: Path, name: str) -> None:
    (tmp_path / "a.png").write_bytes(png())
    inner = tmp_path / "inner"
    inner.mkdir()
    (inner / "link.png").symlink_to(tmp_path / "a.png")
    (inner / "linked").symlink_to(tmp_path)
    assert "lies outside the allowed folders" in refusal(InputFolder(inner, max_pixels=10_000), name)


def test_an_allowed_folder_is_read_and_replaces_the_campaigns_own(tmp_path: Path) -> None:
    (tmp_path / "campaign").mkdir()
    (tmp_path / "pictures").mkdir()
    (tmp_path / "pictures" / "a.png").write_bytes(png())
    (tmp_path / "campaign" / "b.png").write_bytes(png())
    folder = InputFolder(tmp_path / "campaign", allowed=[tmp_path / "pictures"], max_pixels=10_000)
    assert folder.open("../pictures/a.png").width == 16
    assert "lies outside" in refusal(folder, "b.png")


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("missing.png", "cannot be read: No such file or directory"),
        ("a\0b", "is not a file name"),
        ("loop", "is not a file name"),
        ("", "is not a regular file"),
        ("pipe", "is not a regular file"),
        ("x" * 300, "cannot be read: File name too long"),
        ("text.png", "not a whole png, jpeg or webp picture"),
        ("empty.png", "not a whole png, jpeg or webp picture"),
        ("truncated.png", "not a whole png, jpeg or webp picture"),
        ("large.png", "larger than the 10,000 pixels allowed"),
        ("bomb.png", "is a decompression bomb"),
        ("animated.webp", "is an animation"),
    ],
)
def test_what_is_no_whole_picture_of_a_sensible_size_is_refused(folder: InputFolder, name: str, why: str) -> None:
    where = folder.folder
    os.mkfifo(where / "pipe")
    (where / "loop").symlink_to("loop")
    (where / "text.png").write_text("hello")
    (where / "empty.png").write_bytes(b"")
    (where / "truncated.png").write_bytes(noise()[:-300])
    (where / "large.png").write_bytes(png(200, 200))
    (where / "bomb.png").write_bytes(bomb(60_000, 60_000))
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue")]
    frames[0].save(where / "animated.webp", save_all=True, append_images=frames[1:])
    assert why in refusal(folder, name)


def noise() -> bytes:
    file = io.BytesIO()
    pixels = np.random.default_rng(0).integers(0, 255, (32, 32, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


def test_a_decompression_bomb_is_refused_whatever_the_limit(tmp_path: Path) -> None:
    (tmp_path / "bomb.png").write_bytes(bomb(60_000, 60_000))
    assert "bomb" in refusal(InputFolder(tmp_path, max_pixels=10**12), "bomb.png")


def listing(folder: InputFolder, pattern: str) -> str:
    with pytest.raises(InputImageError) as refused:
        folder.matching(pattern)
    return str(refused.value)


def test_files_that_a_pattern_finds_are_sorted_and_hidden_ones_and_folders_left_out(folder: InputFolder) -> None:
    many = [f"{n * 7 % 20:02}.png" for n in range(20)]
    for name in (*many, "sub/c.png", "folder.png/x.txt", ".hidden.png", ".git/d.png", "e.txt"):
        (folder.folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder.folder / name).write_bytes(b"")
    assert folder.matching("*.png") == sorted(many)
    assert folder.matching("**/*.png") == [*sorted(many), "sub/c.png"]


@pytest.mark.parametrize(
    ("pattern", "why"),
    [
        ("*.jpg", "'*.jpg' matches no file"),
        ("../*.png", "'../*.png' is not a pattern inside the campaign's folder"),
        ("/etc/*", "'/etc/*' is not a pattern inside the campaign's folder"),
        ("", "'' is not a pattern"),
        ("a**b", "'a**b' is not a pattern"),
        ("outside-*.png", "'outside-link.png' lies outside the allowed folders"),
    ],
)
def test_a_pattern_that_finds_nothing_or_leaves_the_folder_is_refused(tmp_path: Path, pattern: str, why: str) -> None:
    (tmp_path / "a.png").write_bytes(png())
    inner = tmp_path / "inner"
    inner.mkdir()
    (inner / "outside-link.png").symlink_to(tmp_path / "a.png")
    assert why in listing(InputFolder(inner, max_pixels=10_000), pattern)


@pytest.mark.parametrize(
    ("url", "allowed"),
    [
        ("s3://bucket/in/a.png", ["s3://bucket/in"]),
        ("s3://bucket/in/a.png", ["s3://bucket/in/"]),
        ("s3://bucket/in/a b%20.png", ["s3://other", "s3://bucket"]),
    ],
)
def test_an_object_under_an_allowed_prefix_is_admitted(tmp_path: Path, url: str, allowed: list[str]) -> None:
    InputFolder(tmp_path, buckets=allowed, max_pixels=1).admit(url)


@pytest.mark.parametrize(
    ("url", "why"),
    [
        ("s3://bucket/inside.png", "lies outside the allowed buckets: see SDP_INPUTS__ALLOWED"),
        ("s3://bucket/in", "lies outside the allowed buckets"),
        ("s3://bucket2/in/a.png", "lies outside the allowed buckets"),
        ("s3://bucket/in/../a.png", "is not s3://bucket/key"),
        ("s3://bucket/in/a\n.png", "is not s3://bucket/key"),
        ("s3://bucket", "is not s3://bucket/key"),
        ("https://bucket/in/a.png", "is not s3://bucket/key"),
        ("in/a.png", "is not s3://bucket/key"),
    ],
)
def test_any_other_object_is_refused_without_asking_for_it(tmp_path: Path, url: str, why: str) -> None:
    with pytest.raises(InputImageError) as refused:
        InputFolder(tmp_path, buckets=["s3://bucket/in"], max_pixels=1).open_object(url)
    assert why in str(refused.value)


def test_no_bucket_is_read_unless_the_settings_allow_it(tmp_path: Path) -> None:
    with pytest.raises(InputImageError, match="SDP_INPUTS__ALLOWED"):
        InputFolder(tmp_path, max_pixels=1).open_object("s3://bucket/a.png")
