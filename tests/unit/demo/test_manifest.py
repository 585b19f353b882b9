"""The manifest is up to date with the files."""

from pathlib import Path

from sdpipeline.demo.manifest import measure_manifest, read_manifest, size_bytes, write_manifest


def a_checkpoint(root: Path, content: bytes) -> Path:
    file = root / "shapes" / "unet" / "config.json"
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(content)
    return root


def test_a_manifest_reads_back_as_it_was_written(tmp_path: Path) -> None:
    write_manifest(a_checkpoint(tmp_path, b"{}"))
    assert list(read_manifest(tmp_path)["shapes"]) == ["unet/config.json"]
    assert read_manifest(tmp_path) == measure_manifest(tmp_path)


def test_a_changed_file_no_longer_matches_its_manifest(tmp_path: Path) -> None:
    write_manifest(a_checkpoint(tmp_path, b"{}"))
    a_checkpoint(tmp_path, b"{ }")
    assert read_manifest(tmp_path) != measure_manifest(tmp_path)


def test_the_size_counts_all_files(tmp_path: Path) -> None:
    assert size_bytes(a_checkpoint(tmp_path, b"12345")) == 5
