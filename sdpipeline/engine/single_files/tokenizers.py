"""Tokenizers for a converted checkpoint: a single file holds none, and their vocabularies are not shipped."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path

from sdpipeline.engine.single_files.templates import read_config
from sdpipeline.errors import CheckpointError

_CLIP_FILES = ("tokenizer.json", "vocab.json")
_T5_FILES = ("tokenizer.json", "spiece.model")
_FILES = (
    *("tokenizer.json", "tokenizer_config.json", "vocab.json", "merges.txt", "spiece.model"),
    *("special_tokens_map.json", "added_tokens.json"),
)
_OPEN_CLIP_PAD = "!"
"""OpenCLIP pads with token 0; CLIP ViT-L/14 pads with its end token. Their vocabularies are equal."""


def names(text_encoders: Mapping[str, str]) -> dict[str, str]:
    """Return the text encoder's class by the tokenizer's name."""
    return {part.replace("text_encoder", "tokenizer"): kind for part, kind in text_encoders.items()}


def title(family: str, tokenizer: str, encoder_class: str) -> str:
    """Return the name of the vocabulary that a tokenizer needs."""
    if encoder_class == "T5EncoderModel":
        return "T5 v1.1 XXL (spiece.model or tokenizer.json)"
    clip = {"sd2": "OpenCLIP ViT-H/14"}.get(family, "CLIP ViT-L/14")
    return f"{clip if tokenizer == 'tokenizer' else 'OpenCLIP ViT-bigG/14'} (vocab.json and merges.txt)"


def roots(folder: Path) -> list[Path]:
    """Return the diffusers folders that a user's folder stands for: itself, or the one that holds this tokenizer."""
    if folder.name.startswith("tokenizer") and _holds(folder, (*_CLIP_FILES, *_T5_FILES)):
        return [folder.parent]
    return [folder]


def find(tokenizer: str, encoder_class: str, given: Sequence[Path]) -> Path | None:
    """Return the folder of a tokenizer within the user's folders; None if there is none."""
    files = _T5_FILES if encoder_class == "T5EncoderModel" else _CLIP_FILES
    for folder in given:
        for candidate in (folder / tokenizer, folder.parent / tokenizer, folder):
            beside = candidate.parent != folder.parent or folder.name.startswith("tokenizer")
            if beside and _holds(candidate, files) and _fits(candidate, tokenizer, encoder_class, folder):
                return candidate
    return None


def _holds(folder: Path, files: Sequence[str]) -> bool:
    return any((folder / name).is_file() for name in files)


def _fits(candidate: Path, tokenizer: str, encoder_class: str, given: Path) -> bool:
    """Return True for the named folder; a folder given by itself has to hold a vocabulary of the right kind."""
    if candidate.name == tokenizer and candidate != given:
        return True
    t5 = (candidate / "spiece.model").is_file() or _class(candidate).startswith("T5")
    return t5 == (encoder_class == "T5EncoderModel")


def _class(folder: Path) -> str:
    return str((read_config(folder / "tokenizer_config.json") or {}).get("tokenizer_class", ""))


def copy(source: Path, target: Path, *, open_clip: bool) -> str:
    """Copy a tokenizer's files, and return its transformers class.

    ``open_clip``: pad with OpenCLIP's token, for a vocabulary that was given as CLIP ViT-L/14's.
    """
    target.mkdir()
    for name in _FILES:
        if (source / name).is_file():
            if name.endswith(".json") and name != "vocab.json":
                read_config(source / name)
            shutil.copyfile(source / name, target / name)
    if open_clip:
        _pad_with(target, _OPEN_CLIP_PAD)
    t5 = (target / "spiece.model").is_file() or _class(target).startswith("T5")
    return "T5Tokenizer" if t5 else "CLIPTokenizer"


def _pad_with(folder: Path, token: str) -> None:
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        document = read_config(folder / name)
        if document is not None:
            (folder / name).write_text(json.dumps(document | {"pad_token": token}, indent=1), encoding="utf-8")
    if not (folder / "tokenizer_config.json").is_file():
        document = {"tokenizer_class": "CLIPTokenizer", "pad_token": token, "model_max_length": 77}
        (folder / "tokenizer_config.json").write_text(json.dumps(document, indent=1), encoding="utf-8")


def check_vocabulary(folder: Path, class_name: str, *, size: int, where: str) -> None:
    """Raise CheckpointError if a tokenizer's tokens are not those of its text encoder with ``size`` embeddings."""
    import transformers

    from sdpipeline.engine.diffusers.foreign_errors import checkpoint_errors

    with checkpoint_errors(f"{where}: {folder.name} does not load"):
        tokenizer = getattr(transformers, class_name).from_pretrained(
            folder, local_files_only=True, trust_remote_code=False
        )
        tokens = len(tokenizer)
    # T5's embeddings are padded to a multiple of 128; CLIP's are not.
    if tokens > size or (class_name == "CLIPTokenizer" and tokens != size):
        raise CheckpointError(
            f"{where}: the {folder.name} has {tokens} tokens and its text encoder {size}; name the tokenizer of these "
            "weights with --tokenizer DIR"
        )
