"""Classification of checkpoint directories, and verification of their bytes against the registered manifest."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sdpipeline.domain import Task, digest
from sdpipeline.engine import allowed_classes, config_checks, weight_files
from sdpipeline.engine.families import FAMILIES
from sdpipeline.engine.hash_cache import HashCache
from sdpipeline.engine.refusal import Refusal
from sdpipeline.engine.weight_files import MATTERS, WEIGHTS, WeightFiles
from sdpipeline.errors import CheckpointError

__all__ = ["MATTERS", "WEIGHTS"]

SAFETY_CHECKER = "safety-checker"
"""Kind of a checkpoint that checks finished pictures."""

ANNOTATORS = {
    "depth_anything": "depth",
    "dpt": "depth",
    "segformer": "segmentation",
    "upernet": "segmentation",
    "vitpose": "pose",
}
"""transformers' model_type of the networks that turn a picture into a control map, with the kind of map."""


UNNAMED = frozenset({"emb_params", "clip_l", "clip_g"})
"""Tensors of textual inversions that do not name their token."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckpointFiles:
    """A checkpoint directory: its kind, its family and the SHA-256 of each relevant file.

    ``native_size`` is the side in pixels of the square pictures that it was trained on, None if unknown. ``defaults``
    are generation parameters by diffusers' names that replace those of the family, such as the steps of a distilled
    checkpoint. ``origin_sha256`` is the SHA-256 of the single file that the directory was converted from. ``licence``
    and ``purposes`` are those of its approval.
    """

    alias: str
    digest: str
    kind: str
    family: str
    directory: Path
    scale: int
    manifest: Mapping[str, str]
    size_bytes: int
    native_size: int | None = None
    defaults: Mapping[str, Any] = field(default_factory=dict)
    origin_sha256: str | None = None
    licence: str | None = None
    purposes: Sequence[str] = ()


def inspect(alias: str, directory: Path, *, cache: HashCache | None = None) -> CheckpointFiles:
    """Classify and hash a directory without loading it; CheckpointError if it may not or cannot run.

    ``cache`` avoids reading files that were hashed before and have not changed since.
    """
    with weight_files.opened(alias, directory) as found:
        names = found.approvable()
        if not any(name.endswith(WEIGHTS) for name in names):
            raise CheckpointError(f"checkpoint {alias!r} holds no {WEIGHTS} file")
        _check_configurations(alias, found.path, frozenset(names))
        kind, family, scale = _classify(alias, found.path, names)
        if kind == "checkpoint":
            config_checks.check(alias, found.path, family)
        manifest = {name: found.sha256(name, cache) for name in names}
        found.check_unchanged()
        return CheckpointFiles(
            alias=alias,
            digest=digest(manifest),
            kind=kind,
            family=family,
            directory=directory,
            scale=scale,
            manifest=manifest,
            size_bytes=sum(found.keys[name].size for name in manifest),
        )


def verify(files: CheckpointFiles, *, cache: HashCache | None = None) -> None:
    """Compare the directory with the approved manifest; CheckpointError names the first file that differs.

    Every file is hashed again, unless it is in ``cache``. An added file is a difference too.
    """
    with _verified(files, cache):
        pass


@contextmanager
def unchanged(files: CheckpointFiles) -> Iterator[Path]:
    """Verify a directory, and yield the path to load it from.

    Raises CheckpointError at the end if anything in it changed during the block. So do not use anything read there
    before the block has ended, and read everything within it: memory-mapped weights have to be copied.
    """
    with _verified(files) as found:
        yield found.path
        found.check_unchanged()


@contextmanager
def _verified(files: CheckpointFiles, cache: HashCache | None = None) -> Iterator[WeightFiles]:
    where = f"checkpoint {files.alias!r}"
    if digest(dict(files.manifest)) != files.digest:
        raise CheckpointError(f"{where}: its manifest does not hash to its digest")
    with weight_files.opened(files.alias, files.directory) as found:
        for name in sorted(files.manifest.keys() - set(found.names)):
            raise CheckpointError(f"{where}: {name} is missing from {files.directory}")
        for name in sorted(set(found.approvable()) - files.manifest.keys()):
            raise CheckpointError(
                f"{where}: {name} was added after approval, and a loader could prefer it; "
                f"remove it from {files.directory}, or approve the directory with `sdpipeline checkpoints add`"
            )
        for name, expected in files.manifest.items():
            if found.sha256(name, cache) != expected:
                raise CheckpointError(
                    f"{where}: {name} does not have the bytes that were registered; "
                    "restore the file, or register the directory again under a new alias"
                )
        _check_configurations(files.alias, found.path, frozenset(files.manifest))
        yield found


def _check_configurations(alias: str, directory: Path, names: frozenset[str]) -> None:
    """Raise CheckpointError for classes and keys outside the allow-list, and for an index that names other files."""
    for name in sorted(names):
        file = name.rpartition("/")[2]
        if file.endswith(".index.json"):
            allowed_classes.check_shards(alias, name, _json(alias, directory / name), names)
        elif file == "adapter_config.json" and f"{name.removesuffix(file)}config.json" in names:
            raise CheckpointError(f"checkpoint {alias!r}: {name} loads an adapter on top of the network; remove it")
        elif file == "model_index.json" or file.endswith("config.json"):
            document = _json(alias, directory / name)
            allowed_classes.check_configuration(alias, name, document)
            if name == "model_index.json":
                allowed_classes.check_index(alias, document)


def read_ahead(files: CheckpointFiles) -> None:
    """Ask the kernel to read the weights into its page cache in the background, if there is room.

    Loading itself cannot be done ahead: ``from_pretrained`` changes torch's defaults for the whole process while it
    runs, and a concurrent forward pass would be silently wrong.
    """
    weight_files.read_ahead(files.directory, sorted(files.manifest))


def controlnet_refusal(task: Task, base: CheckpointFiles, controlnet: CheckpointFiles) -> Refusal | None:
    """Refuse a ControlNet that does not fit this checkpoint."""
    if controlnet.kind != "controlnet":
        message = f"{controlnet.alias!r} is a {controlnet.kind}, not a ControlNet"
        return Refusal(key="controlnets", message=message)
    if not FAMILIES[base.family].accepts_controlnet(task, controlnet.family):
        message = f"{controlnet.alias!r} is for {controlnet.family} and cannot steer {task} of {base.alias!r}"
        fix = "name a ControlNet of the checkpoint's family"
        return Refusal(key="controlnets", message=f"{message} ({base.family})", fix=fix)
    return None


def adapter_refusal(field: str, kind: str, base: CheckpointFiles, adapter: CheckpointFiles) -> Refusal | None:
    """Refuse an adapter that does not fit the checkpoint; ``None`` if it fits, or only loading can tell."""
    if adapter.kind != kind:
        return Refusal(key=field, message=f"{adapter.alias!r} is a {adapter.kind}, not a {kind}")
    if adapter.family not in ("any", *FAMILIES[base.family].adapters_of):
        message = f"{adapter.alias!r} is for {adapter.family}, but {base.alias!r} is {base.family}"
        return Refusal(key=field, message=message)
    return None


def vae_refusal(base: CheckpointFiles, vae: CheckpointFiles) -> Refusal | None:
    """Refuse an autoencoder that cannot replace the checkpoint's own."""
    if vae.kind != "vae":
        return Refusal(key="vae", message=f"{vae.alias!r} is a {vae.kind}, not an autoencoder")
    own, other = _latents(base.directory / "vae" / "config.json"), _latents(vae.directory / "config.json")
    fits = own == other if own and other else vae.family == FAMILIES[base.family].latents_of
    if not fits:
        message = f"{vae.alias!r} is for {vae.family}, whose latents differ from those of {base.alias!r}"
        return Refusal(key="vae", message=message)
    return None


def _latents(config: Path) -> tuple[Any, ...] | None:
    """Return the latent settings that have to be equal; ``None`` if the file is not on this machine.

    Other latents would decode without an error, but to a wrong picture.
    """
    if not config.is_file():
        return None
    given = _json(str(config.parent), config)
    statistics = given.get("latents_mean"), given.get("latents_std")
    scaling = given.get("scaling_factor", 0.18215), given.get("shift_factor")
    return given.get("latent_channels", 4), *scaling, *statistics


def inversion_words(files: CheckpointFiles) -> list[str] | None:
    """Return the tokens of a textual inversion in prompts; ``None`` if its file is on another machine."""
    for name in files.manifest:
        if (path := files.directory / name).suffix == WEIGHTS and path.is_file():
            return words_of(files.alias, header(files.alias, path))
    return None


def words_of(alias: str, tensors: Iterable[str]) -> list[str]:
    """Return ``<alias>``, and the file's own token if it names one."""
    return [f"<{alias}>", *(name for name in tensors if name not in UNNAMED)]


def _classify(alias: str, directory: Path, names: list[str]) -> tuple[str, str, int]:
    """Return (kind, family, scale) from the configurations, else from the tensors' names."""
    if "model_index.json" in names:
        return _pipeline(alias, directory)
    if "config.json" in names:
        return _component(alias, _json(alias, directory / "config.json"))
    weights = [name for name in names if name.endswith(WEIGHTS) and "/" not in name]
    if len(weights) != 1:
        raise CheckpointError(
            f"checkpoint {alias!r}: expected model_index.json, config.json or exactly one {WEIGHTS} file"
        )
    return _bare(alias, directory / weights[0])


def _pipeline(alias: str, directory: Path) -> tuple[str, str, int]:
    index = _json(alias, directory / "model_index.json")
    name = str(index.get("_class_name", ""))
    if name == "StableDiffusionUpscalePipeline":
        vae = _json(alias, directory / "vae" / "config.json")
        return "checkpoint", "upscale", 2 ** (len(vae["block_out_channels"]) - 1)
    if name == "StableDiffusionLatentUpscalePipeline":
        return "checkpoint", "latent-upscale", 2
    if name.startswith("StableDiffusion3"):
        return "checkpoint", "sd3", 1
    if name.startswith("Flux"):
        return _flux(alias, directory)
    if name.startswith("StableDiffusion") and "unet" in index:
        return _unet_family(alias, index, _json(alias, directory / "unet" / "config.json"))
    raise CheckpointError(f"checkpoint {alias!r}: no family runs a {name or 'pipeline without a name'}")


def _flux(alias: str, directory: Path) -> tuple[str, str, int]:
    channels = _json(alias, directory / "transformer" / "config.json").get("in_channels", 64)
    if channels != 64:
        raise CheckpointError(f"checkpoint {alias!r}: a Flux with {channels} input channels is not supported")
    return "checkpoint", "flux", 1


def _unet_family(alias: str, index: Mapping[str, Any], unet: Mapping[str, Any]) -> tuple[str, str, int]:
    channels = unet.get("in_channels", 4)
    if channels not in (4, 9):
        raise CheckpointError(f"checkpoint {alias!r}: a U-Net with {channels} input channels is not supported")
    if unet.get("addition_embed_type") == "text_time":
        if (index.get("text_encoder") or [None])[0] is None:
            raise CheckpointError(f"checkpoint {alias!r}: an SDXL refiner cannot start a picture; use its base")
        return "checkpoint", "sdxl" if channels == 4 else "sdxl-inpaint", 1
    if channels == 9:
        return "checkpoint", "sd-inpaint", 1
    return "checkpoint", "sd2" if unet.get("cross_attention_dim") == 1024 else "sd1", 1


def _component(alias: str, config: Mapping[str, Any]) -> tuple[str, str, int]:
    name = str(config.get("_class_name", ""))
    if name == "ControlNetModel":
        if config.get("addition_embed_type") == "text_time":
            return "controlnet", "sdxl", 1
        return "controlnet", "sd2" if config.get("cross_attention_dim") == 1024 else "sd1", 1
    if name == "SD3ControlNetModel":
        return "controlnet", "sd3-inpaint" if config.get("extra_conditioning_channels") else "sd3", 1
    if name == "FluxControlNetModel":
        return "controlnet", "flux", 1
    if name == "AutoencoderKL":
        return "vae", _vae_family(config), 1
    if config.get("architectures") == ["StableDiffusionSafetyChecker"]:
        return SAFETY_CHECKER, "clip", 1
    if config.get("model_type") in ANNOTATORS:
        return "annotator", ANNOTATORS[config["model_type"]], 1
    raise CheckpointError(
        f"checkpoint {alias!r}: a {name or config.get('model_type') or 'config.json'} is not supported"
    )


def _vae_family(config: Mapping[str, Any]) -> str:
    """Return the family by the range of the latents, which has to match between autoencoders."""
    if config.get("latent_channels") == 16:
        return "flux" if abs((config.get("shift_factor") or 0) - 0.1159) < 1e-3 else "sd3"
    scaling = config.get("scaling_factor", 0.18215)
    known = {0.13025: "sdxl", 0.08333: "upscale"}
    return next((family for factor, family in known.items() if abs(scaling - factor) < 1e-4), "sd1")


def _bare(alias: str, path: Path) -> tuple[str, str, int]:
    tensors = header(alias, path)
    if any("lora" in name.lower() for name in tensors):
        return "lora", _lora_family(tensors), 1
    if any(name.startswith(("image_proj.", "ip_adapter.")) for name in tensors):
        return "ip-adapter", _width_family(tensors, "to_k_ip"), 1
    if {"clip_l", "clip_g"} <= tensors.keys():
        return "textual-inversion", "sdxl", 1
    if len(tensors) == 1 and len(next(iter(tensors.values()))) <= 2:
        width = next(iter(tensors.values()))[-1]
        return "textual-inversion", "sd2" if width == 1024 else "sd1", 1
    factor = re.search(r"(?:^|\D)(\d)x(?=[-_ .]|$)|[xX](\d)", path.stem)
    if factor:
        return "checkpoint", "gan-upscale", int(factor[1] or factor[2])
    raise CheckpointError(
        f"checkpoint {alias!r}: {path.name} is not a LoRA, IP-Adapter or textual inversion; "
        "an upscaler has its factor in its file name, as in 4x-name.safetensors"
    )


def _lora_family(tensors: Mapping[str, list[int]]) -> str:
    if any("single_transformer_blocks" in name or "single_blocks" in name for name in tensors):
        return "flux"
    if any(name.startswith("transformer.") for name in tensors):
        return "sd3"
    return _width_family(tensors, "attn2.to_k", "attn2_to_k")


def _width_family(tensors: Mapping[str, list[int]], *parts: str) -> str:
    """Return the family by the width of the text embedding that cross-attention reads; ``any`` if it changes none."""
    widths = {shape[-1] for name, shape in tensors.items() if any(p in name for p in parts) and "up" not in name}
    for width, family in ((2048, "sdxl"), (1024, "sd2"), (768, "sd1")):
        if width in widths:
            return family
    return "any"


def header(alias: str, path: Path) -> dict[str, list[int]]:
    """Return the tensors' names and shapes of a safetensors file, from its header alone."""
    try:
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if length > 100_000_000:
                raise CheckpointError(f"checkpoint {alias!r}: {path.name} is not a safetensors file")
            entries = json.loads(file.read(length))
        return {name: entry["shape"] for name, entry in entries.items() if name != "__metadata__"}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"checkpoint {alias!r}: {path.name} is not a safetensors file") from error


def _json(alias: str, path: Path) -> dict[str, Any]:
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise CheckpointError(f"checkpoint {alias!r}: {path.parent.name}/{path.name} is missing") from error
    except ValueError as error:
        raise CheckpointError(f"checkpoint {alias!r}: {path.name} is not JSON: {error}") from error
    except RecursionError as error:
        raise CheckpointError(f"checkpoint {alias!r}: {path.name} is nested too deeply") from error
    if not isinstance(document, dict):
        raise CheckpointError(f"checkpoint {alias!r}: {path.name} is not a JSON object")
    return document
