"""IP-Adapters and the image encoders that they read: matched by widths, and gathered into one folder."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sdpipeline.engine.allowed_classes import check_shards
from sdpipeline.engine.classification import header, read_json
from sdpipeline.engine.weight_files import WEIGHTS
from sdpipeline.errors import CheckpointError

ENCODER = "image_encoder"
"""Folder of the image encoder next to an IP-Adapter's file."""

_FULL_INPUT = "image_proj.proj.0.weight"
_PLAIN_INPUT = "image_proj.proj.weight"
_PLUS_INPUT = "image_proj.proj_in.weight"


@dataclass(frozen=True, slots=True)
class ImageInput:
    """Input of an IP-Adapter: the width that it reads, and if that is of hidden states or of the embedding."""

    width: int
    hidden_states: bool

    def __str__(self) -> str:
        """Return it in words, for messages."""
        return f"{'hidden states' if self.hidden_states else 'embeddings'} of {self.width}"


def image_input(tensors: Mapping[str, Sequence[int]]) -> ImageInput | None:
    """Return the input of an IP-Adapter by its tensors' shapes; None for one of another kind.

    Plain adapters project the encoder's embedding; plus, plus-face and full ones read its hidden states, as
    ``load_ip_adapter`` and ``encode_image`` of diffusers do.
    """
    if shape := tensors.get(_PLAIN_INPUT):
        return ImageInput(width=shape[-1], hidden_states=False)
    if shape := tensors.get(_PLUS_INPUT) or tensors.get(_FULL_INPUT):
        return ImageInput(width=shape[-1], hidden_states=True)
    return None


def ip_adapter_folder(file: Path) -> dict[str, Path]:
    """Return the files of a folder for the IP-Adapter in ``file``: their names in it, and where each is now.

    The image encoder is looked for as the repository h94/IP-Adapter lays them out: next to the file, in ``models`` and
    in other folders next to the file's. Raises CheckpointError if none has the adapter's width.
    """
    wanted = image_input(header(file.stem, file))
    if wanted is None:
        raise CheckpointError(f"{file} is not an IP-Adapter that runs here; supported are plain, plus and full ones")
    found: list[str] = []
    for folder in _encoder_folders(file):
        config = read_json(file.stem, folder / "config.json")
        if _width(config, hidden_states=wanted.hidden_states) == wanted.width:
            names = _encoder_files(file, folder)
            return {file.name: file} | {f"{ENCODER}/{name}": folder / name for name in names}
        found.append(f"{folder} ({_described(config)})")
    seen = f"; found {', '.join(found)}" if found else ""
    raise CheckpointError(
        f"IP-Adapter {file} needs an image encoder with {wanted}, as {_published(wanted)}{seen}; "
        f"put its config.json and model{WEIGHTS} into {file.parent / ENCODER}"
    )


def check_ip_adapter(alias: str, directory: Path, names: Iterable[str]) -> None:
    """Raise CheckpointError for an IP-Adapter's folder without an image encoder, or with one of another width."""
    listed = list(names)
    file = next(name for name in listed if name.endswith(WEIGHTS) and "/" not in name)
    wanted = image_input(header(alias, directory / file))
    if wanted is None:
        raise CheckpointError(
            f"checkpoint {alias!r} is an IP-Adapter of a kind that does not run here; supported are plain, plus and "
            "full ones of SD 1.x and SDXL"
        )
    if f"{ENCODER}/config.json" not in listed or not any(
        name.startswith(f"{ENCODER}/") and name.endswith(WEIGHTS) for name in listed
    ):
        raise CheckpointError(
            f"IP-Adapter {alias!r} has no folder {ENCODER} with config.json and {WEIGHTS} weights; put there the "
            f"encoder with {wanted}, as {_published(wanted)}, or register the adapter's file in its repository's "
            f"layout: sdpipeline checkpoints add {alias} …/models/{file}"
        )
    config = read_json(alias, directory / ENCODER / "config.json")
    if _width(config, hidden_states=wanted.hidden_states) != wanted.width:
        raise CheckpointError(
            f"IP-Adapter {alias!r} reads {wanted}, but its {ENCODER} has {_described(config)}; "
            f"put there {_published(wanted)}"
        )


def _encoder_folders(file: Path) -> Iterator[Path]:
    """Yield the folders that may hold the encoder, the nearest first."""
    root = file.resolve().parent.parent
    near = [file.resolve().parent / ENCODER, root / "models" / ENCODER, root / ENCODER]
    others = sorted(root.glob(f"*/{ENCODER}"))
    for folder in dict.fromkeys([*near, *others]):
        if (folder / "config.json").is_file():
            yield folder


def _encoder_files(file: Path, folder: Path) -> list[str]:
    """Return the encoder's configuration and its safetensors weights, all shards if there are several."""
    index = f"model{WEIGHTS}.index.json"
    if (folder / f"model{WEIGHTS}").is_file():
        return ["config.json", f"model{WEIGHTS}"]
    if (folder / index).is_file():
        listed = frozenset(path.name for path in folder.iterdir() if path.is_file())
        document = read_json(file.stem, folder / index)
        check_shards(file.stem, index, document, listed)  # the index names files to copy: none of another folder
        return ["config.json", index, *sorted({str(shard) for shard in document["weight_map"].values()})]
    weights = sorted(path.name for path in folder.glob(f"*{WEIGHTS}"))
    if len(weights) == 1:
        raise CheckpointError(
            f"image encoder {folder} has {weights[0]}, but no model{WEIGHTS}; rename it if it holds the whole encoder"
        )
    raise CheckpointError(
        f"image encoder {folder} has no model{WEIGHTS}; fetch the {WEIGHTS} file, because pickles are never read"
    )


def _width(config: Mapping[str, Any], *, hidden_states: bool) -> Any:
    """Return a width of a CLIP vision encoder, also from the configuration of a whole CLIP model."""
    vision = config.get("vision_config")
    if hidden_states:
        return (vision if isinstance(vision, dict) else config).get("hidden_size", 768)
    return config.get("projection_dim", 512)


def _described(config: Mapping[str, Any]) -> str:
    hidden, embedded = (_width(config, hidden_states=each) for each in (True, False))
    return f"hidden states of {hidden} and embeddings of {embedded}"


def _published(wanted: ImageInput) -> str:
    """Return where the repository h94/IP-Adapter has an encoder of that width."""
    places = {(1024, False): "models", (1280, True): "models"}
    places |= {(1280, False): "sdxl_models", (1664, True): "sdxl_models"}
    place = places.get((wanted.width, wanted.hidden_states))
    return f"{place}/{ENCODER} of h94/IP-Adapter" if place else "its publisher has it"
