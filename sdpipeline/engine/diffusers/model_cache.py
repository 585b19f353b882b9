"""LRU cache of checkpoints in memory with a byte budget, verified when they are loaded."""

from __future__ import annotations

import gc
from collections import OrderedDict
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Literal

import structlog
import torch

from sdpipeline.domain import CheckpointRef
from sdpipeline.engine.checkpoints import CheckpointFiles
from sdpipeline.engine.diffusers.loading import Form, Loaded, Variant, load, networks_bytes
from sdpipeline.errors import CheckpointError, DeviceExhaustedError

_log = structlog.get_logger(__name__)

HOST = torch.device("cpu")


@dataclass(frozen=True, slots=True, kw_only=True)
class TextEncoders:
    """Deployment settings of text encoders.

    ``offload``: when they move from the device to ``host`` after their prompts are encoded. ``auto``: after every batch
    once memory was short. ``always``: after every batch. ``never``: only if a picture does not fit in any other way.
    """

    offload: Literal["auto", "always", "never"] = "auto"
    host: torch.device = HOST


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
        variant: Variant | None = None,
    ) -> Loaded:
        """Return the checkpoint, loaded if necessary; those in ``keep`` are not dropped to make room for it.

        ``exact`` requires float32. A checkpoint is held in one dtype at a time, because two would fit into fewer
        devices. A ``variant`` of the denoiser makes it a separate entry that shares no part with the plain one, so that
        adapters loaded into one are not in the other. If memory is short, the entry that is not needed is dropped.
        """
        files = self.files(ref)
        dtype = torch.float32 if exact else self._dtype(files)
        form = (ref.digest, variant.name if variant else None)
        held = self._held.get(form)
        if held is not None and held.dtype == dtype:
            self._held.move_to_end(form)
            return held
        if held is not None:
            del held
            self.drop(keep=self._held.keys() - {form})
        self._make_room(files.size_bytes, keep)
        loaded = self._loaded(files, dtype, variant)
        if loaded is None and self.free_encoders():
            loaded = self._loaded(files, dtype, variant)
        loaded = loaded or self._loaded(files, dtype, variant, instead_of_all_but=keep)
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
        variant: Variant | None,
        *,
        instead_of_all_but: Collection[Form] | None = None,
    ) -> Loaded | None:
        """Load the checkpoint; ``None`` if the device has no room. The last try drops every other one not in use."""
        if instead_of_all_but is not None:
            self.drop(keep=instead_of_all_but)
        try:
            return load(files, device=self._device, dtype=dtype, variant=variant)
        except torch.OutOfMemoryError:
            return None

    def drop(self, *, keep: Collection[Form]) -> list[Form]:
        """Drop every checkpoint except those in ``keep``, and return the dropped ones."""
        dropped = [form for form in self._held if form not in keep]
        for form in dropped:
            del self._held[form]
        release(self._device)
        return dropped

    def reload_encoders(self, loaded: Loaded, *, keep: Collection[Form] = ()) -> None:
        """Move text encoders back to the device.

        Raises DeviceExhaustedError if they do not fit in addition to the checkpoints in ``keep``.
        """
        if self._reloaded(loaded):
            return
        self.drop(keep={loaded.form, *keep})
        if not self._reloaded(loaded):
            raise DeviceExhaustedError(
                f"out of memory while the text encoders of checkpoint {loaded.files.alias!r} were loaded back"
            )

    def _reloaded(self, loaded: Loaded) -> bool:
        try:
            _move(loaded, self._device)
        except torch.OutOfMemoryError:
            return False
        return True

    def prompts_encoded(self) -> None:
        """Offload the text encoders if the settings say so; called when all prompts of a batch are cached."""
        offload = self._text_encoders.offload
        if offload == "always" or (offload == "auto" and self._was_short):
            self.offload_encoders()

    def free_encoders(self) -> bool:
        """Offload the text encoders unless ``offload`` is ``never``; called when memory is short.

        Return True if any was moved.
        """
        self._was_short = True
        left = self._text_encoders.offload != "never" and self.offload_encoders()
        if left:
            release(self._device)
        return left

    def offload_encoders(self) -> bool:
        """Move all text encoders to host memory, and return True if any was on the device."""
        left = [loaded for loaded in self._held.values() if _move(loaded, self._text_encoders.host)]
        return bool(left)

    def _make_room(self, needed_bytes: int, keep: Collection[Form]) -> None:
        if self._budget_bytes is None:
            return
        held_bytes = sum(loaded.size_bytes(self._device) for loaded in self._held.values())
        if held_bytes + needed_bytes <= self._budget_bytes:
            return
        encoders_bytes = sum(networks_bytes(loaded.text_encoders(), self._device) for loaded in self._held.values())
        if held_bytes - encoders_bytes + needed_bytes <= self._budget_bytes and self.free_encoders():
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


def release(device: torch.device) -> None:
    """Return freed memory to the device, which the caching allocator does not do by itself."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
