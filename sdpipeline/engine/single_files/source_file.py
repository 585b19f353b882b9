"""Header of a safetensors file: names, shapes and dtypes of its tensors, without reading them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors

from sdpipeline.engine.weight_files import PICKLES, WEIGHTS
from sdpipeline.errors import CheckpointError

FLOAT8 = frozenset({"F8_E4M3", "F8_E5M2"})
"""Dtypes whose every value bfloat16 holds exactly."""

_READABLE = FLOAT8 | {"F64", "F32", "F16", "BF16", "I64", "I32", "BOOL"}
_LONGEST_HEADER = 100_000_000
_FETCH = "fetch the file again"


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """Shape and safetensors dtype of one tensor."""

    shape: tuple[int, ...]
    dtype: str


@dataclass(frozen=True, slots=True, kw_only=True)
class SourceFile:
    """A safetensors file; ``metadata`` is the free text of its header."""

    path: Path
    tensors: Mapping[str, TensorInfo]
    metadata: Mapping[str, str]

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Return the shape of every tensor by its name."""
        return {name: info.shape for name, info in self.tensors.items()}


def read_header(path: Path) -> SourceFile:
    """Read the header; CheckpointError for a pickle, GGUF, LFS pointer, page of HTML or incomplete download."""
    if path.suffix.lower() in PICKLES:
        raise CheckpointError(
            f"{path} is a pickle, which can run code and is never opened; fetch the author's {WEIGHTS} file, or "
            "convert it on a machine that you can discard: torch.load(…, weights_only=True), then "
            "safetensors.torch.save_file"
        )
    try:
        with path.open("rb") as file:
            start = file.read(8)
            _refuse_other_formats(path, start)
            length = int.from_bytes(start, "little")
            if len(start) < 8 or not 2 <= length <= _LONGEST_HEADER:
                raise CheckpointError(f"{path} is not a safetensors file; {_FETCH}")
            text = file.read(length)
            size = path.stat().st_size
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror or error}") from error
    if len(text) < length:
        raise CheckpointError(f"{path} is incomplete: it ends within its header; {_FETCH}")
    found = _parsed(path, text, size - 8 - length)
    try:  # the library also checks dtypes, offsets and duplicate names
        with safetensors.safe_open(path, framework="numpy"):
            return found
    except (safetensors.SafetensorError, OSError, ValueError, OverflowError) as error:
        raise CheckpointError(f"{path} is damaged: {error}; {_FETCH}") from error


def _refuse_other_formats(path: Path, start: bytes) -> None:
    found = next((name for magic, name in _MAGIC.items() if start.startswith(magic)), None)
    if found is not None:
        raise CheckpointError(f"{path} is {found}")


_MAGIC = {
    b"GGUF": f"a GGUF file, whose quantized weights are not read; use a {WEIGHTS} file in fp16 or bf16",
    b"version ": "a Git LFS pointer, not the weights; run `git lfs pull`, or download the file itself",
    b"PK\x03\x04": f"a pickle or zip archive, which is never opened; fetch the author's {WEIGHTS} file",
    b"<!DOCTYP": "a web page: the download needs a login or another link; download the file itself",
    b"<!doctyp": "a web page: the download needs a login or another link; download the file itself",
    b"<html": "a web page: the download needs a login or another link; download the file itself",
    b"\x80\x02": f"a pickle, which is never opened; fetch the author's {WEIGHTS} file",
}


def _parsed(path: Path, text: bytes, size: int) -> SourceFile:
    try:
        entries: dict[str, Any] = json.loads(text)
        metadata = entries.pop("__metadata__", None) or {}
        tensors = {name: TensorInfo(tuple(map(int, each["shape"])), each["dtype"]) for name, each in entries.items()}
        end = max((int(each["data_offsets"][1]) for each in entries.values()), default=0)
        notes = {str(key): str(value) for key, value in metadata.items()}
    except (ValueError, KeyError, TypeError, AttributeError, IndexError, RecursionError) as error:
        raise CheckpointError(f"{path} is not a safetensors file: its header is not readable; {_FETCH}") from error
    if not tensors:
        raise CheckpointError(f"{path} holds no tensors; {_FETCH}")
    if end != size:
        what = "incomplete" if size < end else "damaged"
        raise CheckpointError(f"{path} is {what}: its header describes {end} bytes of tensors, it has {size}; {_FETCH}")
    return SourceFile(path=path, tensors=tensors, metadata=notes)


def check_dtypes(source: SourceFile) -> None:
    """Raise CheckpointError for quantized weights, which need scales that no network here applies."""
    for name, info in source.tensors.items():
        scaled = name.endswith((".scale_weight", ".scale_input", ".weight_scale", ".input_scale")) or name in _SCALED
        if scaled or ".quant_state." in name or name.endswith((".absmax", ".qweight", ".comfy_quant")):
            raise CheckpointError(
                f"{source.path} holds quantized weights with scales ({name}); use the fp16 or bf16 file of them"
            )
        if info.dtype not in _READABLE:
            raise CheckpointError(
                f"{source.path}: {name} has dtype {info.dtype}; use the fp16 or bf16 file of these weights"
            )


_SCALED = frozenset({"scaled_fp8", "model.diffusion_model.scaled_fp8"})
