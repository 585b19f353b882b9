"""Licence and source of weights, from what their folder states."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from sdpipeline.app.model_card import LONGEST, read_model_card

APACHE = "                                 Apache License\n                           Version 2.0, January 2004\n"
MIT = "MIT License\n\nCopyright (c) 2024 Somebody\n"
FLUX = "FLUX.1 [dev] Non-Commercial License v1.1\n"
RAIL = "Copyright (c) 2022\n\nCreativeML Open RAIL-M\ndated August 22, 2022\n"
STABILITY = "STABILITY AI COMMUNITY LICENSE AGREEMENT\nLast Updated: July 5, 2024\n"


@pytest.mark.parametrize(
    ("front", "licence"),
    [
        ("license: apache-2.0", "apache-2.0"),
        ("license: other\nlicense_name: flux-1-dev-non-commercial-license", "flux-1-dev-non-commercial-license"),
        ("license_name: stabilityai-ai-community", "stabilityai-ai-community"),
        ("license: [mit, apache-2.0]", "mit or apache-2.0"),
        ("license: other", "other"),
        ("license: {a: 1}", None),
        ("license: true", None),
        ("license:\ntags: [x]", None),
        ("- a list", None),
        ("license: 'unclosed", None),
        ("license: !!python/object:os.system x", None),
    ],
)
def test_the_licence_of_a_model_card_is_taken_from_its_front_matter(
    front: str, licence: str | None, tmp_path: Path
) -> None:
    (tmp_path / "README.md").write_text(f"---\n{front}\n---\n# Model\nlicense: gpl\n")
    assert read_model_card(tmp_path).licence == licence


def test_a_model_card_with_windows_line_ends_and_a_byte_order_mark_is_read(tmp_path: Path) -> None:
    (tmp_path / "README.md").write_bytes(b"\xef\xbb\xbf---\r\nlicense: mit\r\nbase_model: a/b\r\n---\r\n")
    card = read_model_card(tmp_path)
    assert (card.licence, card.base_model) == ("mit", "a/b")


@pytest.mark.parametrize(
    ("name", "text", "licence"),
    [
        ("LICENSE", APACHE, "apache-2.0"),
        ("LICENSE.md", FLUX, "flux-1-dev-non-commercial-license"),
        ("LICENSE.txt", RAIL, "creativeml-openrail-m"),
        ("LICENCE", STABILITY, "stabilityai-ai-community"),
        ("COPYING", MIT, "mit"),
        ("LICENSE", "All rights reserved.", None),
    ],
)
def test_a_licence_file_is_named_by_its_heading(name: str, text: str, licence: str | None, tmp_path: Path) -> None:
    (tmp_path / name).write_text(text)
    assert read_model_card(tmp_path).licence == licence


def test_the_licence_in_the_header_of_a_single_file_is_read(tmp_path: Path) -> None:
    header = json.dumps({"__metadata__": {"modelspec.license": "CC-BY-4.0"}}).encode()
    (tmp_path / "lora.safetensors").write_bytes(len(header).to_bytes(8, "little") + header)
    assert read_model_card(tmp_path).licence == "CC-BY-4.0"


def test_the_source_is_the_repository_and_commit_of_a_download(tmp_path: Path) -> None:
    commit = "0123456789" * 4
    snapshot = tmp_path / "models--org--name" / "snapshots" / commit
    snapshot.mkdir(parents=True)
    assert read_model_card(snapshot).source == f"org/name@{commit}"
    git = tmp_path / "clone" / ".git"
    (git / "refs" / "heads").mkdir(parents=True)
    (git / "config").write_text(
        '[core]\n\tbare = false\n[remote "origin"]\n\turl = https://me:secret@hub.example/a/b\n'
    )
    (git / "HEAD").write_text("ref: refs/heads/main\n")
    (git / "refs" / "heads" / "main").write_text(f"{commit}\n")
    assert read_model_card(tmp_path / "clone").source == f"https://hub.example/a/b@{commit}"


def test_what_a_stranger_wrote_is_kept_short_and_in_one_line(tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text(f'---\nlicense: "a\\n\\x1b[31mb{"c" * 1000}"\n---\n')
    licence = read_model_card(tmp_path).licence
    assert licence is not None
    assert licence.isprintable()
    assert len(licence) == LONGEST


def test_a_folder_that_cannot_be_read_states_nothing(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "README.md")
    (tmp_path / "LICENSE").symlink_to(tmp_path / "LICENSE")
    (tmp_path / ".git").write_text("gitdir: elsewhere")
    for folder in (tmp_path, tmp_path / "nowhere"):
        card = read_model_card(folder)
        assert (card.licence, card.source, card.base_model) == (None, None, None)
