"""Configurations that supply what shapes cannot tell: of diffusers folders that the user named, and published ones."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from sdpipeline.domain import Json
from sdpipeline.engine.allowed_classes import check_configuration
from sdpipeline.errors import CheckpointError

PUBLISHED = Path(__file__).with_name("published")
"""Configurations of the published architectures by family, written from the papers and model repositories they name."""

FAMILIES = ("sd1", "sd2", "sdxl", "sd3", "flux")


@dataclass(frozen=True, slots=True, kw_only=True)
class Template:
    """A configuration and where it is from; ``label`` is its origin without the folders of this machine."""

    config: Mapping[str, Any]
    origin: str
    label: str


@cache
def published(family: str) -> Json:
    """Return the published configurations of a family."""
    document: Json = json.loads((PUBLISHED / f"{family}.json").read_text(encoding="utf-8"))
    return document


def read_config(path: Path) -> Json | None:
    """Return a configuration of a folder that the user named; None if the file does not exist."""
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is not readable JSON: {error}") from error
    if not isinstance(document, dict):
        raise CheckpointError(f"{path} is not a JSON object")
    check_configuration(str(path.parent), path.name, document)
    return document


def templates(part: str, families: Sequence[str], roots: Sequence[Path], *, own: Path | None = None) -> list[Template]:
    """Return the configurations for a part, the best first: the file's own, of the user's folders, published ones."""
    found = [
        Template(config=config, origin=str(path), label="config.json of a named folder")
        for path, config in _of_folders(part, roots, own)
    ]
    for family in families:
        parts = published(family)["parts"]
        names = (part, f"{part}_large") if part == "transformer" else ("unet",) if part == "controlnet" else (part,)
        label = f"published {family}"
        found += [Template(config=parts[name], origin=label, label=label) for name in names if name in parts]
    return found


def _of_folders(part: str, roots: Sequence[Path], own: Path | None) -> Iterator[tuple[Path, Json]]:
    names = ("controlnet", "unet") if part == "controlnet" else (part,)
    paths = [own / "config.json"] if own else []
    for root in roots:
        paths += [root / name / "config.json" for name in names]
        paths += [root / "config.json"] if part in ("controlnet", "vae") else []
    for path in paths:
        if (config := read_config(path)) is not None:
            yield path, config


def related(root: Path, part: str, config: Mapping[str, Any]) -> bool:
    """Return True if a diffusers folder holds a pipeline whose denoiser has the widths of this configuration."""
    own = read_config(root / part / "config.json")
    return own is not None and own.get("_class_name") == config["_class_name"] and _MATCHES[part](own, config)


Match = Callable[[Mapping[str, Any], Mapping[str, Any]], bool]


def choose(part: str, inferred: Mapping[str, Any], found: Sequence[Template], *, where: str) -> Template:
    """Return the first template of the same architecture; CheckpointError if there is none.

    Head counts, norm groups and activations follow from no shape. A template's values hold only if the widths of its
    network are those of the file.
    """
    for template in found:
        if _MATCHES[_KINDS.get(part, part)](template.config, inferred):
            return template
    named = ", ".join(template.origin for template in found) or "none"
    raise CheckpointError(
        f"{where}: the {part} is of no published architecture ({_shown(inferred)}), and its tensors do not tell the "
        f"number of attention heads and groups; name a diffusers folder of the same architecture with --parts DIR, "
        f"which holds {part}/config.json (compared: {named})"
    )


def _shown(inferred: Mapping[str, Any]) -> str:
    keys = ("block_out_channels", "cross_attention_dim", "hidden_size", "d_model", "caption_projection_dim")
    return ", ".join(f"{key} {inferred[key]}" for key in (*keys, "attention_head_dim") if key in inferred)


def _unet(template: Mapping[str, Any], inferred: Mapping[str, Any]) -> bool:
    keys = {"cross_attention_dim": 1280, "use_linear_projection": False, "addition_embed_type": None}
    same = all(template.get(key, default) == inferred.get(key, default) for key, default in keys.items())
    return same and _widths(template) == _widths(inferred)


def _widths(config: Mapping[str, Any]) -> list[int]:
    return list(config.get("block_out_channels", ()))


def _vae(template: Mapping[str, Any], inferred: Mapping[str, Any]) -> bool:
    channels = template.get("latent_channels", 4) == inferred["latent_channels"]
    return channels and _widths(template) == _widths(inferred)


def _clip(template: Mapping[str, Any], inferred: Mapping[str, Any]) -> bool:
    return all(template.get(key) == inferred[key] for key in ("hidden_size", "intermediate_size"))


def _t5(template: Mapping[str, Any], _: Mapping[str, Any]) -> bool:
    return template.get("model_type") == "t5"


def _transformer(template: Mapping[str, Any], inferred: Mapping[str, Any]) -> bool:
    head = template.get("attention_head_dim", 0)
    if "guidance_embeds" in inferred:
        axes = template.get("axes_dims_rope", (16, 56, 56))
        return bool(head == inferred["attention_head_dim"] and sum(axes) == head)
    width = head * template.get("num_attention_heads", 0)
    return bool(width == inferred.get("caption_projection_dim"))


_MATCHES: Mapping[str, Match] = {
    "unet": _unet,
    "controlnet": _unet,
    "vae": _vae,
    "clip": _clip,
    "t5": _t5,
    "transformer": _transformer,
}
_KINDS = {"text_encoder": "clip"}
