"""Checkpoints with random weights in the shapes of real ones: as fast, created offline, useless for pictures."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers

from sdpipeline.bench.shapes import shape
from sdpipeline.domain import Json

SEED = 0


def ensure(name: str, folder: Path, *, device: str) -> Path:
    """Return ``folder/name`` in diffusers' layout; create it if missing, never partially."""
    directory, unfinished = folder / name, folder / f".{name}.unfinished"
    if directory.is_dir():
        return directory
    shutil.rmtree(unfinished, ignore_errors=True)
    pipeline = build(shape(name), device=device, dtype=torch.bfloat16)
    pipeline.save_pretrained(unfinished)
    unfinished.rename(directory)
    return directory


def build(about: Json, *, device: str, dtype: torch.dtype) -> Any:
    """Build a pipeline of that shape; each layer initializes its weights as before training."""
    pipeline_class = getattr(diffusers, about["pipeline"])
    transformers.utils.logging.disable_progress_bar()
    with _drawing(device, dtype):
        parts: dict[str, Any] = {
            "unet": diffusers.UNet2DConditionModel(**about["unet"]),
            "vae": diffusers.AutoencoderKL(**about["vae"]),
        }
        for name, config in about["text_encoders"].items():
            tokenizer_name, tokenizer = name.replace("text_encoder", "tokenizer"), _tokenizer(name)
            parts |= {name: _text_encoder(config, tokenizer), tokenizer_name: tokenizer}
    scheduler = {key: value for key, value in about["scheduler"].items() if key != "class"}
    parts["scheduler"] = getattr(diffusers, about["scheduler"]["class"])(**scheduler)
    if about["pipeline"] == "StableDiffusionPipeline":
        parts |= {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
    return pipeline_class(**parts)


@contextmanager
def _drawing(device: str, dtype: torch.dtype) -> Iterator[None]:
    """Make weights reproducible on one device; billions of them are drawn on the device, where that is fast."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.random.fork_rng(), torch.device(device):
            torch.manual_seed(SEED)
            yield
    finally:
        torch.set_default_dtype(before)


def _text_encoder(config: Json, tokenizer: Any) -> Any:
    own = {key: value for key, value in config.items() if key != "class"}
    special = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    return getattr(transformers, config["class"])(transformers.CLIPTextConfig(**own, **special))


def _tokenizer(encoder: str) -> Any:
    """Build a tokenizer with CLIP's letters but without its merges.

    A prompt has more tokens, but the text encoder gets the same 77.
    """
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    letters = [chr(byte) for byte in printable] + [chr(256 + n) for n in range(len(others))]
    words = [*letters, *(letter + "</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    pad = "!" if encoder.endswith("_2") else "<|endoftext|>"
    vocabulary = {word: n for n, word in enumerate(words)}
    return transformers.CLIPTokenizer(vocab=vocabulary, merges=[], model_max_length=77, pad_token=pad)
