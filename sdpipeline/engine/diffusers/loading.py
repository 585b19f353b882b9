"""Reading of a checkpoint into memory: hashed, safetensors only, no missing key, no code execution."""

from __future__ import annotations

import json
import threading
import warnings
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import diffusers
import structlog
import torch
import transformers
from safetensors.torch import load_file

from sdpipeline.engine import part_files
from sdpipeline.engine.allowed_classes import ANNOTATOR_NETWORKS, UNUSED_PARTS, check_index, check_network
from sdpipeline.engine.checkpoints import SAFETY_CHECKER, WEIGHTS, CheckpointFiles, header, unchanged
from sdpipeline.engine.classification.unions import SDXL_UNION, network_tensors, union_family
from sdpipeline.engine.completeness import check_needed_parts
from sdpipeline.engine.diffusers.foreign_errors import checkpoint_errors
from sdpipeline.engine.gan import load_upscaler
from sdpipeline.engine.ip_adapters import ENCODER, check_ip_adapter, image_input
from sdpipeline.errors import CheckpointError

_log = structlog.get_logger(__name__)

_LOADING = threading.Lock()
"""Lock around ``from_pretrained``, which patches torch.nn process-wide: two concurrent calls leave it corrupted."""


TEXT_ENCODER = "text_encoder"
"""Prefix of the text encoders' names in a pipeline."""


PALETTE = "palette.json"
"""Optional file of an annotator: the colours its ControlNet was trained on, as a list of [red, green, blue]."""


Form = tuple[str, str | None]
"""Digest of a checkpoint, and the name of its denoiser's variant or ``None``."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Variant:
    """Change of a denoiser that cannot be reverted, such as quantization: its result is a checkpoint of its own."""

    name: str
    change: Callable[[torch.nn.Module], None] = field(compare=False, repr=False)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False, weakref_slot=True)
class Loaded:
    """A checkpoint in memory: parts by their names in the pipeline, schedulers as configurations."""

    files: CheckpointFiles
    parts: Mapping[str, Any]
    dtype: torch.dtype
    scheduler_configs: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    options: Mapping[str, Any] = field(default_factory=dict)
    variant: str | None = None

    @property
    def form(self) -> Form:
        """Key of this checkpoint in the cache."""
        return self.files.digest, self.variant

    @property
    def denoiser(self) -> Any:
        """The network that runs once per step; ``None`` if there is none."""
        return self.parts.get("transformer") or self.parts.get("unet")

    @property
    def module(self) -> Any:
        """The one network of a ControlNet or autoencoder."""
        return next(iter(self.parts.values()))

    def networks(self) -> list[torch.nn.Module]:
        """Return every part that holds weights."""
        return [part for part in self.parts.values() if isinstance(part, torch.nn.Module)]

    def text_encoders(self) -> list[torch.nn.Module]:
        """Return the parts that only read prompts."""
        return [network for name, network in self.parts.items() if name.startswith(TEXT_ENCODER)]

    def size_bytes(self, device: torch.device) -> int:
        """Return the size of the weights in that device's memory."""
        return networks_bytes(self.networks(), device) + _sum_bytes(self.parts.get("tensors", {}).values(), device)


def load(files: CheckpointFiles, *, device: torch.device, dtype: torch.dtype, variant: Variant | None = None) -> Loaded:
    """Hash and read a checkpoint: safetensors only, no download, no missing key, no code execution.

    The files are compared again after reading, so that the loaded bytes are the hashed ones.
    """
    transformers.utils.logging.disable_progress_bar()
    diffusers.utils.logging.disable_progress_bar()
    with unchanged(files) as directory:
        loaded = replace(_read_at(directory, files, dtype), files=files)
        for network in loaded.networks():
            network.to(device)
            network.requires_grad_(requires_grad=False)
            copy_mapped(network.named_parameters())
            copy_mapped(network.named_buffers())
    if variant:
        with checkpoint_errors(f"checkpoint {files.alias!r} cannot run as {variant.name}"):
            variant.change(loaded.denoiser)
        loaded = replace(loaded, variant=variant.name)
    _log.info("checkpoint_loaded", checkpoint=files.alias, digest=files.digest[:16], device=str(device))
    return loaded


def copy_mapped(tensors: Iterable[tuple[str, torch.Tensor]]) -> None:
    """Copy tensors in host memory: safetensors memory-maps them, and a later write to the file would change them."""
    for _, tensor in tensors:
        if tensor.device.type == "cpu":
            tensor.data = tensor.data.clone()


def _read_at(directory: Path, files: CheckpointFiles, dtype: torch.dtype) -> Loaded:
    failure = f"checkpoint {files.alias!r} does not load"
    with (
        checkpoint_errors(failure, path=str(directory), shown_path=str(files.directory)),
        _LOADING,
        warnings.catch_warnings(),
    ):
        warnings.simplefilter("ignore", FutureWarning)  # raised by diffusers' own imports
        return _read(replace(files, directory=directory), dtype)


def _read(files: CheckpointFiles, dtype: torch.dtype) -> Loaded:
    if files.kind in ("controlnet", "vae"):
        config = json.loads((files.directory / "config.json").read_text(encoding="utf-8"))
        network_class = getattr(diffusers, check_network(files.alias, config["_class_name"]))
        if files.kind == "controlnet":
            network_class = _controlnet_class(files, network_class)
        network = _network(files, files.directory, network_class, dtype)
        return Loaded(files=files, dtype=dtype, parts={files.kind: network})
    if files.kind == "textual-inversion":
        return Loaded(files=files, dtype=dtype, parts={"tensors": load_copied(_single_file(files))})
    if files.kind == "annotator":
        return _annotator(files, dtype)
    if files.kind == SAFETY_CHECKER:
        return _safety_checker(files, dtype)
    if files.kind == "ip-adapter":
        return _ip_adapter(files, dtype)
    if files.kind != "checkpoint":
        raise CheckpointError(f"checkpoint {files.alias!r} is a {files.kind}, which cannot be loaded by itself")
    if files.family == "gan-upscale":
        return Loaded(files=files, dtype=dtype, parts={"upscaler": load_upscaler(files, dtype)})
    return _pipeline(files, dtype)


def _controlnet_class(files: CheckpointFiles, named: Any) -> Any:
    """Return the class of a ControlNet by its tensors: published unions name the class of an ordinary one."""
    union = union_family(network_tensors(files.alias, files.directory, files.manifest))
    if union and union != files.family:
        raise CheckpointError(
            f"checkpoint {files.alias!r} is a union ControlNet, but an earlier release registered it as an ordinary "
            f"one; register it again with `sdpipeline checkpoints add` and give control_mode"
        )
    return diffusers.ControlNetUnionModel if union == SDXL_UNION else named


def _annotator(files: CheckpointFiles, dtype: torch.dtype) -> Loaded:
    config = json.loads((files.directory / "config.json").read_text(encoding="utf-8"))
    class_name = check_network(files.alias, config["architectures"][0], ANNOTATOR_NETWORKS)
    network = _network(files, files.directory, _class(files, ["transformers", class_name]), dtype)
    processor = transformers.AutoImageProcessor.from_pretrained(
        files.directory, local_files_only=True, trust_remote_code=False
    )
    options = {}
    if PALETTE in files.manifest:
        options["palette"] = json.loads((files.directory / PALETTE).read_text(encoding="utf-8"))
    return Loaded(files=files, dtype=dtype, parts={"annotator": network, "processor": processor}, options=options)


def _safety_checker(files: CheckpointFiles, dtype: torch.dtype) -> Loaded:
    from diffusers.pipelines.stable_diffusion.safety_checker import StableDiffusionSafetyChecker

    network = _network(files, files.directory, StableDiffusionSafetyChecker, dtype)
    processor = transformers.CLIPImageProcessor.from_pretrained(
        files.directory, local_files_only=True, trust_remote_code=False
    )
    return Loaded(files=files, dtype=dtype, parts={"safety_checker": network, "processor": processor})


def _ip_adapter(files: CheckpointFiles, dtype: torch.dtype) -> Loaded:
    """Read the image encoder; the rest is read when the adapter is loaded into a checkpoint."""
    check_ip_adapter(files.alias, files.directory, files.manifest)
    directory = files.directory / ENCODER
    encoder = _network(files, directory, transformers.CLIPVisionModelWithProjection, dtype)
    given = image_input(header(files.alias, _single_file(files)))
    assert given is not None  # checked
    options = {"hidden_states": given.hidden_states}
    return Loaded(files=files, dtype=dtype, parts={"image_encoder": encoder}, options=options)


def _single_file(files: CheckpointFiles) -> Path:
    return files.directory / next(name for name in files.manifest if name.endswith(WEIGHTS) and "/" not in name)


def load_copied(path: Path) -> dict[str, torch.Tensor]:
    """Load the tensors of a safetensors file into memory of their own."""
    return {name: tensor.clone() for name, tensor in load_file(path).items()}


def _pipeline(files: CheckpointFiles, dtype: torch.dtype) -> Loaded:
    index = json.loads((files.directory / "model_index.json").read_text(encoding="utf-8"))
    check_index(files.alias, index)
    # Earlier releases approved checkpoints without these parts. A request may bring a vae of its own.
    check_needed_parts(files.alias, files.directory, files.family, but={"vae"})
    parts: dict[str, Any] = {}
    schedulers: dict[str, Mapping[str, Any]] = {}
    for name, entry in index.items():
        if not isinstance(entry, list) or entry[0] is None or name in UNUSED_PARTS:
            continue
        directory = files.directory / name
        if name.endswith("scheduler"):
            path = directory / "scheduler_config.json"
            schedulers[name] = json.loads(path.read_text(encoding="utf-8")) | {"_class_name": entry[1]}
        elif name.startswith("tokenizer"):
            parts[name] = _class(files, entry).from_pretrained(
                directory, local_files_only=True, trust_remote_code=False
            )
        else:
            parts[name] = _network(files, directory, _class(files, entry), dtype)
    options = {name: value for name, value in index.items() if not name.startswith("_") and not isinstance(value, list)}
    return Loaded(files=files, dtype=dtype, parts=parts, scheduler_configs=schedulers, options=options)


def _class(files: CheckpointFiles, entry: list[str]) -> Any:
    library = {"diffusers": diffusers, "transformers": transformers}.get(entry[0])
    found = getattr(library, entry[1], None)
    if found is None:
        raise CheckpointError(f"checkpoint {files.alias!r} needs {entry[0]}.{entry[1]}, which this release has not")
    return found


def _network(files: CheckpointFiles, directory: Path, network_class: Any, dtype: torch.dtype) -> Any:
    """Load a network and check that no key is missing: a U-Net that lacks one would load and paint noise."""
    # diffusers' own networks have no way to run code of a checkpoint, and no argument to forbid it.
    ours = issubclass(network_class, diffusers.ModelMixin)
    more: dict[str, Any] = {"torch_dtype": dtype} if ours else {"dtype": dtype, "trust_remote_code": False}
    names = part_files.in_folder(files.manifest, directory.relative_to(files.directory).as_posix().removeprefix("."))
    form = part_files.chosen_form(names, part_files.DIFFUSERS if ours else part_files.TRANSFORMERS)
    network, info = network_class.from_pretrained(
        directory,
        variant=form.variant if form else None,
        local_files_only=True,
        use_safetensors=True,
        output_loading_info=True,
        **more,
    )
    missing = sorted(info["missing_keys"])
    mismatched = sorted(str(key) for key in info.get("mismatched_keys", ()))
    if missing or mismatched:
        fault = f"has no tensor {missing[0]}" if missing else f"has a tensor of another shape: {mismatched[0]}"
        raise CheckpointError(f"checkpoint {files.alias!r}: {directory.name} {fault}")
    return network.eval()


def networks_bytes(networks: Iterable[torch.nn.Module], device: torch.device) -> int:
    """Return the size of the networks' weights in that device's memory."""
    return sum(_sum_bytes((*network.parameters(), *network.buffers()), device) for network in networks)


def _sum_bytes(tensors: Iterable[torch.Tensor], device: torch.device) -> int:
    return sum(size_bytes(tensor) for tensor in tensors if tensor.device.type == device.type)


def size_bytes(tensor: torch.Tensor) -> int:
    """Return a tensor's size in memory. A quantized one reports its original dtype, so its parts are summed."""
    if not hasattr(tensor, "__tensor_flatten__"):
        return tensor.numel() * tensor.element_size()
    names, _ = tensor.__tensor_flatten__()
    return sum(size_bytes(getattr(tensor, name)) for name in names)
