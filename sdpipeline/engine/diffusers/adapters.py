"""LoRAs, IP-Adapters and textual inversions: loaded into a resident checkpoint for some passes, then unloaded."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
import transformers

from sdpipeline.engine import Pixels
from sdpipeline.engine.checkpoints import CheckpointFiles, unchanged, words_of
from sdpipeline.engine.diffusers import schedulers
from sdpipeline.engine.diffusers.batch import Reference, Weights
from sdpipeline.engine.diffusers.foreign_errors import checkpoint_errors
from sdpipeline.engine.diffusers.loading import Loaded, load_copied
from sdpipeline.engine.diffusers.loras import LoraLoader
from sdpipeline.engine.diffusers.pipeline_call import assemble
from sdpipeline.engine.diffusers.text import Vectors
from sdpipeline.engine.pixels import to_pil
from sdpipeline.errors import CheckpointError, RequestRefusedError


@dataclass(frozen=True, slots=True)
class AdapterSet:
    """LoRAs and IP-Adapters that are loaded into a checkpoint, by digest and weight."""

    loras: tuple[tuple[str, float], ...] = ()
    ip_adapters: tuple[tuple[str, float], ...] = ()


class AdapterState:
    """Adapters that each resident checkpoint has loaded, so that no picture gets another one's adapters.

    Adapters are never fused into the base weights: adding and subtracting in half precision leaves rounding errors.
    """

    def __init__(self) -> None:
        self._applied: WeakKeyDictionary[Loaded, AdapterSet] = WeakKeyDictionary()
        self._loras = LoraLoader()

    def apply(self, weights: Weights) -> None:
        """Load exactly these adapters into the checkpoint, and unload all others."""
        wanted = adapter_set(weights)
        if self.applied_to(weights.base) == wanted:
            return
        pipe = assemble(weights, _unused_scheduler(weights), with_text_encoders=True)
        self._unload(pipe, weights.base)
        # An error from here on may leave adapters partly loaded, so the next call has to unload them first.
        self._applied[weights.base] = wanted
        names = ", ".join(repr(files.alias) for files, _ in (*weights.loras, *_files(weights.ip_adapters)))
        failure = f"adapters {names} do not fit {weights.base.files.alias!r}"
        try:
            with checkpoint_errors(failure), warnings.catch_warnings():
                warnings.simplefilter("ignore", UserWarning)  # raised by peft for a second LoRA
                self._loras.load(pipe, weights)
                _load_ip_adapters(pipe, weights)
        except (torch.OutOfMemoryError, CheckpointError):
            self._unload(pipe, weights.base)
            raise

    def applied_to(self, base: Loaded) -> AdapterSet:
        """Return the adapters that are loaded into the checkpoint now."""
        return self._applied.get(base, AdapterSet())

    def _unload(self, pipe: Any, base: Loaded) -> None:
        applied = self._applied.pop(base, AdapterSet())
        if applied.ip_adapters:
            pipe.unload_ip_adapter()
        if applied.loras:
            pipe.unload_lora_weights()


def _unused_scheduler(weights: Weights) -> Any:
    """Return the scheduler of the pipeline that loads adapters; no step is run with it."""
    own = weights.base.scheduler_configs["scheduler"]
    return schedulers.create(weights.row.scheduler, weights.row, own, alias=weights.base.files.alias)


def adapter_set(weights: Weights) -> AdapterSet:
    """Return the adapters that these weights need."""
    return AdapterSet(
        loras=tuple((files.digest, weight) for files, weight in weights.loras),
        ip_adapters=tuple((loaded.files.digest, weight) for loaded, weight in weights.ip_adapters),
    )


def words(inversions: Sequence[Loaded], encoders: Mapping[str, Any]) -> dict[str, Vectors]:
    """Map trigger tokens to textual inversions: ``<alias>``, and the file's own token if it names one."""
    found: dict[str, Vectors] = {}
    for loaded in inversions:
        vectors = _vectors(loaded.parts["tensors"])
        for encoder, rows in vectors.items():
            width = encoders[encoder].config.hidden_size if encoder in encoders else None
            if rows.shape[-1] != width:
                raise CheckpointError(
                    f"textual inversion {loaded.files.alias!r} has vectors of {rows.shape[-1]} for {encoder}, "
                    f"which reads {width}: it was made for another family"
                )
        found |= dict.fromkeys(_tokens(loaded), vectors)
    return found


def refuse_unused(inversions: Sequence[Loaded], *texts: str) -> None:
    """Raise RequestRefusedError for a textual inversion that no prompt mentions: it would silently change nothing."""
    for loaded in inversions:
        if not any(token in text for token in _tokens(loaded) for text in texts):
            raise RequestRefusedError(
                f"textual_inversions: write <{loaded.files.alias}> where the prompt means {loaded.files.alias!r}"
            )


def reference(loaded: Loaded, pixels: Pixels) -> Reference:
    """Encode an IP-Adapter's reference picture, alone in its batch."""
    encoder = loaded.parts["image_encoder"]
    size = encoder.config.image_size
    processor = transformers.CLIPImageProcessor(size={"shortest_edge": size}, crop_size={"height": size, "width": size})
    values = processor(to_pil(pixels), return_tensors="pt").pixel_values.to(encoder.device, encoder.dtype)
    with torch.no_grad():
        if loaded.options["hidden_states"]:
            hidden = [encoder(given, output_hidden_states=True).hidden_states[-2] for given in (values, values * 0)]
            return Reference(image=hidden[0][None], nothing=hidden[1][None])
        image = encoder(values).image_embeds[None]
    return Reference(image=image, nothing=torch.zeros_like(image))


def _tokens(loaded: Loaded) -> list[str]:
    return words_of(loaded.files.alias, loaded.parts["tensors"])


def _vectors(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    if "clip_g" in tensors:
        named = {"text_encoder": tensors["clip_l"], "text_encoder_2": tensors["clip_g"]}
    else:
        named = {"text_encoder": next(iter(tensors.values()))}
    return {encoder: rows.reshape(-1, rows.shape[-1]) for encoder, rows in named.items()}


def _load_ip_adapters(pipe: Any, weights: Weights) -> None:
    if not weights.ip_adapters:
        return
    states = [_ip_adapter_state(loaded.files) for loaded, _ in weights.ip_adapters]
    for (loaded, _), state in zip(weights.ip_adapters, states, strict=True):
        _check_layers(loaded.files, state["ip_adapter"], weights)
    unused = [""] * len(states)  # file names, which are needed only if paths are given
    pipe.load_ip_adapter(states, subfolder=unused, weight_name=unused, image_encoder_folder=None)
    pipe.set_ip_adapter_scale([weight for _, weight in weights.ip_adapters])


def _check_layers(files: CheckpointFiles, tensors: Mapping[str, torch.Tensor], weights: Weights) -> None:
    """Raise CheckpointError if an IP-Adapter has not one pair of matrices for each cross-attention of the U-Net.

    diffusers would ignore those that are too many.
    """
    names = enumerate(weights.denoiser.attn_processors)
    needed = {f"{n}.{matrix}.weight" for n, name in names if ".attn2." in name for matrix in ("to_k_ip", "to_v_ip")}
    if differing := sorted(needed ^ tensors.keys()):
        base = weights.base.files
        raise CheckpointError(
            f"IP-Adapter {files.alias!r} was made for another network than {base.alias!r} ({base.family}): "
            f"ip_adapter.{differing[0]} {'is missing' if differing[0] in needed else 'has no layer there'}; "
            "use an adapter of this family"
        )


def _ip_adapter_state(files: CheckpointFiles) -> dict[str, dict[str, torch.Tensor]]:
    with unchanged(files) as directory:
        tensors = load_copied(directory / _weights_file(files))
    state: dict[str, dict[str, torch.Tensor]] = {"image_proj": {}, "ip_adapter": {}}
    for name, tensor in tensors.items():
        part, _, rest = name.partition(".")
        state[part][rest] = tensor
    return state


def _weights_file(files: CheckpointFiles) -> str:
    return next(name for name in files.manifest if name.endswith(".safetensors") and "/" not in name)


def _files(adapters: Sequence[tuple[Loaded, float]]) -> list[tuple[CheckpointFiles, float]]:
    return [(loaded.files, weight) for loaded, weight in adapters]
