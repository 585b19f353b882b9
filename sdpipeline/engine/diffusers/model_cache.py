"""LRU cache of checkpoints in memory with a byte budget, verified when they are loaded."""

from __future__ import annotations

import gc
import json
import threading
import warnings
from collections import OrderedDict
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import diffusers
import structlog
import torch
import transformers
from safetensors import SafetensorError
from safetensors.torch import load_file

from sdpipeline.domain import CheckpointRef
from sdpipeline.engine.checkpoints import SAFETY_CHECKER, WEIGHTS, CheckpointFiles, header, unchanged
from sdpipeline.engine.components import ANNOTATOR_NETWORKS, check_index, check_network
from sdpipeline.engine.gan import load_upscaler
from sdpipeline.engine.stepwise.quantization import Quantization, quantize, size_bytes
from sdpipeline.errors import CheckpointError, DeviceExhaustedError

_log = structlog.get_logger(__name__)

_LOADING = threading.Lock()
"""Lock around ``from_pretrained``, which patches torch.nn process-wide: two concurrent calls leave it corrupted."""

HOST = torch.device("cpu")

TEXT_ENCODER = "text_encoder"
"""Prefix of the text encoders' names in a pipeline."""

PALETTE = "palette.json"
"""Optional file of an annotator: the colours its ControlNet was trained on, as a list of [red, green, blue]."""

IGNORED = frozenset({"safety_checker", "feature_extractor", "image_encoder", "watermarker"})
"""Parts of old checkpoints that no pipeline here uses."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TextEncoders:
    """Deployment settings of text encoders.

    ``offload``: when they move from the device to ``host`` after their prompts are encoded. ``auto``: after every batch
    once memory was short. ``always``: after every batch. ``never``: only if a picture does not fit in any other way.
    """

    offload: Literal["auto", "always", "never"] = "auto"
    host: torch.device = HOST


Form = tuple[str, Quantization | None]
"""Digest of a checkpoint, and the quantization of its denoiser or ``None``."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False, weakref_slot=True)
class Loaded:
    """A checkpoint in memory: parts by their names in the pipeline, schedulers as configurations."""

    files: CheckpointFiles
    parts: Mapping[str, Any]
    dtype: torch.dtype
    scheduler_configs: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    options: Mapping[str, Any] = field(default_factory=dict)
    quantized: Quantization | None = None

    @property
    def form(self) -> Form:
        """Key of this checkpoint in the cache."""
        return self.files.digest, self.quantized

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
        return _size_bytes(self.networks(), device) + _sum_bytes(self.parts.get("tensors", {}).values(), device)


class ModelCache:
    """Load checkpoints on demand and keep the most recently used ones.

    Text encoders run only for prompts that are not cached yet, and may stay in host memory until then. ``budget_bytes``
    limits what is on the device; encoders that are moved back to it may exceed that limit.
    """

    def __init__(
        self,
        *,
        device: torch.device,
        dtype: Callable[[CheckpointFiles], torch.dtype],
        locate: Callable[[CheckpointRef], CheckpointFiles],
        budget_bytes: int | None,
        text_encoders: TextEncoders,
    ) -> None:
        self._device = device
        self._dtype = dtype
        self._locate = locate
        self._budget_bytes = budget_bytes
        self._text_encoders = text_encoders
        self._was_short = False
        self._held: OrderedDict[Form, Loaded] = OrderedDict()

    def digests(self) -> frozenset[str]:
        """Return the digests of the cached checkpoints."""
        return frozenset(digest for digest, _ in self._held)

    def files(self, ref: CheckpointRef) -> CheckpointFiles:
        """Locate the weights; CheckpointError if the registry now has others under that alias."""
        for (digest, _), loaded in self._held.items():
            if digest == ref.digest:
                return loaded.files
        files = self._locate(ref)
        if files.digest != ref.digest:
            raise CheckpointError(
                f"checkpoint {ref.alias!r} was pinned as {ref.digest[:12]}, but {files.digest[:12]} is registered now"
            )
        return files

    def get(
        self,
        ref: CheckpointRef,
        *,
        keep: Collection[Form] = (),
        exact: bool = False,
        quantized: Quantization | None = None,
    ) -> Loaded:
        """Return the checkpoint, loaded if necessary; those in ``keep`` are not dropped to make room for it.

        ``exact`` requires float32. A checkpoint is held in one dtype at a time, because two would fit into fewer
        devices. A ``quantized`` denoiser makes it a separate entry that shares no part with the plain one, so that
        adapters loaded into one are not in the other. If memory is short, the entry that is not needed is dropped.
        """
        files = self.files(ref)
        dtype = torch.float32 if exact else self._dtype(files)
        form = (ref.digest, quantized)
        held = self._held.get(form)
        if held is not None and held.dtype == dtype:
            self._held.move_to_end(form)
            return held
        if held is not None:
            del held
            self.drop(keep=self._held.keys() - {form})
        self._make_room(files.size_bytes, keep)
        loaded = self._loaded(files, dtype, quantized)
        if loaded is None and self.spare_encoders():
            loaded = self._loaded(files, dtype, quantized)
        loaded = loaded or self._loaded(files, dtype, quantized, instead_of_all_but=keep)
        if loaded is None:
            raise DeviceExhaustedError(
                f"out of memory while loading checkpoint {ref.alias!r}, with no other one resident"
            )
        # Weights in the file may take half their size in memory.
        self._make_room(loaded.size_bytes(self._device), keep)
        self._held[form] = loaded
        return loaded

    def _loaded(
        self,
        files: CheckpointFiles,
        dtype: torch.dtype,
        quantized: Quantization | None,
        *,
        instead_of_all_but: Collection[Form] | None = None,
    ) -> Loaded | None:
        """Load the checkpoint; ``None`` if the device has no room. The last try drops every other one not in use."""
        if instead_of_all_but is not None:
            self.drop(keep=instead_of_all_but)
        try:
            return load(files, device=self._device, dtype=dtype, quantized=quantized)
        except torch.OutOfMemoryError:
            return None

    def drop(self, *, keep: Collection[Form]) -> list[Form]:
        """Drop every checkpoint except those in ``keep``, and return the dropped ones."""
        dropped = [form for form in self._held if form not in keep]
        for form in dropped:
            del self._held[form]
        release(self._device)
        return dropped

    def recall_encoders(self, loaded: Loaded, *, keep: Collection[Form] = ()) -> None:
        """Move text encoders back to the device.

        Raises DeviceExhaustedError if they do not fit in addition to the checkpoints in ``keep``.
        """
        if self._recalled(loaded):
            return
        self.drop(keep={loaded.form, *keep})
        if not self._recalled(loaded):
            raise DeviceExhaustedError(
                f"out of memory while the text encoders of checkpoint {loaded.files.alias!r} were brought back"
            )

    def _recalled(self, loaded: Loaded) -> bool:
        try:
            _move(loaded, self._device)
        except torch.OutOfMemoryError:
            return False
        return True

    def prompts_encoded(self) -> None:
        """Offload the text encoders if the settings say so; called when all prompts of a batch are cached."""
        offload = self._text_encoders.offload
        if offload == "always" or (offload == "auto" and self._was_short):
            self.dismiss_encoders()

    def spare_encoders(self) -> bool:
        """Offload the text encoders unless ``offload`` is ``never``; called when memory is short.

        Return True if any was moved.
        """
        self._was_short = True
        left = self._text_encoders.offload != "never" and self.dismiss_encoders()
        if left:
            release(self._device)
        return left

    def dismiss_encoders(self) -> bool:
        """Move all text encoders to host memory, and return True if any was on the device."""
        left = [loaded for loaded in self._held.values() if _move(loaded, self._text_encoders.host)]
        return bool(left)

    def _make_room(self, needed_bytes: int, keep: Collection[Form]) -> None:
        if self._budget_bytes is None:
            return
        held_bytes = sum(loaded.size_bytes(self._device) for loaded in self._held.values())
        if held_bytes + needed_bytes <= self._budget_bytes:
            return
        encoders_bytes = sum(_size_bytes(loaded.text_encoders(), self._device) for loaded in self._held.values())
        if held_bytes - encoders_bytes + needed_bytes <= self._budget_bytes and self.spare_encoders():
            return
        for form in [form for form in self._held if form not in keep]:
            if held_bytes + needed_bytes <= self._budget_bytes:
                return
            held_bytes -= self._held.pop(form).size_bytes(self._device)
            release(self._device)


def _move(loaded: Loaded, device: torch.device) -> bool:
    """Move text encoders to that device, and return True if any was elsewhere, wholly or in part."""
    elsewhere = _elsewhere(loaded, device)
    for network in elsewhere:
        network.to(device)
    if elsewhere:
        _log.info("text_encoders_moved", checkpoint=loaded.files.alias, device=str(device))
    return bool(elsewhere)


def _elsewhere(loaded: Loaded, device: torch.device) -> list[torch.nn.Module]:
    return [
        network
        for network in loaded.text_encoders()
        if any(parameter.device.type != device.type for parameter in network.parameters())
    ]


def _size_bytes(networks: Iterable[torch.nn.Module], device: torch.device) -> int:
    return sum(_sum_bytes((*network.parameters(), *network.buffers()), device) for network in networks)


def _sum_bytes(tensors: Iterable[torch.Tensor], device: torch.device) -> int:
    return sum(size_bytes(tensor) for tensor in tensors if tensor.device.type == device.type)


def release(device: torch.device) -> None:
    """Return freed memory to the device, which the caching allocator does not do by itself."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def load(
    files: CheckpointFiles, *, device: torch.device, dtype: torch.dtype, quantized: Quantization | None = None
) -> Loaded:
    """Hash and read a checkpoint: safetensors only, no download, no missing key, no code execution.

    The files are compared again after reading, so that the loaded bytes are the hashed ones.
    """
    transformers.utils.logging.disable_progress_bar()
    with unchanged(files) as directory:
        loaded = replace(_read_at(directory, files, dtype), files=files)
        for network in loaded.networks():
            network.to(device)
            network.requires_grad_(requires_grad=False)
            copy_mapped(network.named_parameters())
            copy_mapped(network.named_buffers())
    if quantized:
        quantize(loaded.denoiser, quantized)
        loaded = replace(loaded, quantized=quantized)
    _log.info("checkpoint_loaded", checkpoint=files.alias, digest=files.digest[:16], device=str(device))
    return loaded


def copy_mapped(tensors: Iterable[tuple[str, torch.Tensor]]) -> None:
    """Copy tensors in host memory: safetensors memory-maps them, and a later write to the file would change them."""
    for _, tensor in tensors:
        if tensor.device.type == "cpu":
            tensor.data = tensor.data.clone()


def _read_at(directory: Path, files: CheckpointFiles, dtype: torch.dtype) -> Loaded:
    try:
        with _LOADING, warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # raised by diffusers' own imports
            return _read(replace(files, directory=directory), dtype)
    except (OSError, SafetensorError, ValueError, KeyError, TypeError, AttributeError) as error:
        why = str(error).replace(str(directory), str(files.directory))
        raise CheckpointError(f"checkpoint {files.alias!r} does not load: {why}") from error


def _read(files: CheckpointFiles, dtype: torch.dtype) -> Loaded:
    if files.kind in ("controlnet", "vae"):
        config = json.loads((files.directory / "config.json").read_text(encoding="utf-8"))
        network_class = getattr(diffusers, check_network(files.alias, config["_class_name"]))
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
        raise CheckpointError(f"checkpoint {files.alias!r} is a {files.kind}, which does not stand by itself")
    if files.family == "gan-upscale":
        return Loaded(files=files, dtype=dtype, parts={"upscaler": load_upscaler(files, dtype)})
    return _pipeline(files, dtype)


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
    if not any(name.startswith("image_encoder/") for name in files.manifest):
        raise CheckpointError(f"IP-Adapter {files.alias!r} has no folder image_encoder; put its encoder there")
    directory = files.directory / "image_encoder"
    encoder = _network(files, directory, transformers.CLIPVisionModelWithProjection, dtype)
    # Plain adapters project one embedding; all others read the encoder's hidden states.
    plain = "image_proj.proj.weight" in header(files.alias, _single_file(files))
    return Loaded(files=files, dtype=dtype, parts={"image_encoder": encoder}, options={"hidden_states": not plain})


def _single_file(files: CheckpointFiles) -> Path:
    return files.directory / next(name for name in files.manifest if name.endswith(WEIGHTS) and "/" not in name)


def load_copied(path: Path) -> dict[str, torch.Tensor]:
    """Load the tensors of a safetensors file into memory of their own."""
    return {name: tensor.clone() for name, tensor in load_file(path).items()}


def _pipeline(files: CheckpointFiles, dtype: torch.dtype) -> Loaded:
    index = json.loads((files.directory / "model_index.json").read_text(encoding="utf-8"))
    check_index(files.alias, index)
    parts: dict[str, Any] = {}
    schedulers: dict[str, Mapping[str, Any]] = {}
    for name, entry in index.items():
        if not isinstance(entry, list) or entry[0] is None or name in IGNORED:
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
    network, info = network_class.from_pretrained(
        directory,
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
