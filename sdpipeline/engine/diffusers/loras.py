"""LoRAs: loaded through diffusers into the resident networks, with a check that every tensor is used."""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from peft.tuners.lora import LoraLayer

from sdpipeline.engine.checkpoints import CheckpointFiles, unchanged
from sdpipeline.engine.classification import read_header
from sdpipeline.engine.diffusers.batch import Weights
from sdpipeline.engine.diffusers.loading import Form, Loaded, copy_mapped, load_copied
from sdpipeline.engine.lora_files import lora_refusal, second_matrix
from sdpipeline.errors import CheckpointError

Alphas = Mapping[str, float]
"""Alpha of each layer of a loaded LoRA, by ``<number of the network>.<path of the layer>``."""

PEFT_METADATA = "lora_adapter_metadata"
"""Key of a file's metadata in which diffusers saves the ranks and alphas of all layers."""


class LoraLoader:
    """Loads LoRAs into checkpoints, and checks each pair of LoRA and checkpoint once."""

    def __init__(self) -> None:
        self._checked: dict[tuple[str, Form], Alphas] = {}

    def load(self, pipe: Any, weights: Weights) -> None:
        """Load the LoRAs of these weights under the names ``lora_0``, ``lora_1``, ..., and set their weights.

        Raises CheckpointError for a LoRA of another network type, with values that are not finite, or with a tensor
        that this checkpoint does not use.
        """
        names = [f"lora_{n}" for n in range(len(weights.loras))]
        for name, (files, _) in zip(names, weights.loras, strict=True):
            self._load_one(pipe, weights.base, files, name)
        if names:
            pipe.set_adapters(names, [weight for _, weight in weights.loras])

    def _load_one(self, pipe: Any, base: Loaded, files: CheckpointFiles, name: str) -> None:
        file = next(each for each in files.manifest if each.endswith(".safetensors") and "/" not in each)
        pair = (files.digest, base.form)
        with unchanged(files) as directory:
            header = read_header(files.alias, directory / file)
            if refused := lora_refusal(header.tensors):
                raise CheckpointError(f"checkpoint {files.alias!r} {refused}")
            tensors = {} if pair in self._checked else load_copied(directory / file)
            _check_finite(files, tensors)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", RuntimeWarning)  # raised by peft for alphas, which are set below
                pipe.load_lora_weights(
                    str(directory), weight_name=file, adapter_name=name, local_files_only=True, use_safetensors=True
                )
            for network in base.networks():
                copy_mapped(each for each in network.named_parameters() if f".{name}." in each[0])
        if pair not in self._checked:
            _check_used(pipe, base, files, tensors, name)
            self._checked[pair] = {} if PEFT_METADATA in header.metadata else _alphas(base, tensors, name)
        _set_alphas(base, name, self._checked[pair])


def _check_finite(files: CheckpointFiles, tensors: Mapping[str, torch.Tensor]) -> None:
    for name, tensor in tensors.items():
        values = tensor.float() if tensor.is_floating_point() else tensor  # float8 has no isfinite
        if not bool(torch.isfinite(values).all()):
            raise CheckpointError(
                f"checkpoint {files.alias!r}: {name} holds values that are not finite; use another file"
            )


def _check_used(
    pipe: Any, base: Loaded, files: CheckpointFiles, tensors: Mapping[str, torch.Tensor], name: str
) -> None:
    """Raise CheckpointError for the first tensor that is not in a layer of the checkpoint's networks."""
    loaded = [parameter for _, parameter in _parameters(base, name)]
    dtypes = {parameter.dtype for parameter in loaded}
    held = {_digest(parameter) for parameter in loaded}
    converted = _converted(pipe, tensors)
    lost = [key for key, tensor in converted.items() if not any(_digest(tensor.to(each)) in held for each in dtypes)]
    lost = [key for key in lost if _has_effect(key, converted)]
    if not lost:
        lost = [key for key in _dropped(pipe, tensors, converted) if _has_effect(key, tensors)]
    if lost:
        raise CheckpointError(
            f"LoRA {files.alias!r} changes {_layer(lost[0])}, which {base.files.alias!r} ({base.files.family}) "
            f"does not have in this shape ({len(lost)} of its tensors would be ignored); use a LoRA made for it"
        )


def _converted(pipe: Any, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return the tensors as diffusers names and scales them before it loads them; alphas are apart."""
    options = {"unet_config": pipe.unet.config} if hasattr(pipe, "text_encoder_2") and hasattr(pipe, "unet") else {}
    found = pipe.lora_state_dict(dict(tensors), **options)
    state = found[0] if isinstance(found, tuple) else found
    return {key: tensor for key, tensor in state.items() if torch.is_tensor(tensor) and tensor.ndim > 0}


def _dropped(pipe: Any, tensors: Mapping[str, torch.Tensor], converted: Mapping[str, torch.Tensor]) -> Iterator[str]:
    """Yield the tensors that diffusers' conversion drops without an error.

    Each tensor that the result does not hold as it is, is filled with a number of its own, to find it there after the
    scaling and splitting.
    """
    kept = {id(tensor) for tensor in converted.values()}
    if all(id(tensor) in kept for tensor in tensors.values() if tensor.ndim):
        return
    marked = {}
    for n, (key, tensor) in enumerate(tensors.items()):
        marked[key] = torch.full(tensor.shape, float(n + 1))
        if tensor.ndim == 0 or key.endswith(".alpha"):
            marked[key] = torch.full(tensor.shape, float(_rank(key, tensors)))  # alpha / rank is 1
    found: set[int] = set()
    for tensor in _converted(pipe, marked).values():
        found |= {int(value) for value in torch.unique(tensor)}
    for n, (key, tensor) in enumerate(tensors.items()):
        if n + 1 not in found and tensor.ndim and not key.endswith(".alpha"):
            yield key


def _rank(alpha: str, tensors: Mapping[str, torch.Tensor]) -> int:
    layer = alpha.removesuffix(".alpha")
    ranks = [tensor.shape[0] for key, tensor in tensors.items() if key.startswith(f"{layer}.") and second_matrix(key)]
    return ranks[0] if ranks else 1


def _has_effect(key: str, tensors: Mapping[str, torch.Tensor]) -> bool:
    """Return False for a layer that is all zero, as trainers write for networks that they left alone."""
    first = key if second_matrix(key) else next((name for name in tensors if second_matrix(name) == key), key)
    pair = [tensors[name] for name in (first, second_matrix(first) or first) if name in tensors]
    return all(bool(tensor.any()) for tensor in pair)


def _alphas(base: Loaded, tensors: Mapping[str, torch.Tensor], name: str) -> Alphas:
    """Return the alpha of each loaded layer whose first matrix is in the file unchanged, else its rank.

    diffusers finds a layer's own alpha by its name, which fails for most layers if alphas differ within one network:
    https://github.com/huggingface/diffusers/blob/v0.42.1/src/diffusers/utils/peft_utils.py (get_peft_kwargs). Files
    whose conversion multiplies by alpha / rank need the rank here.
    """
    own: dict[bytes, float] = {}
    dtypes = {parameter.dtype for _, parameter in _parameters(base, name)}
    for key, tensor in tensors.items():
        if not second_matrix(key):
            continue
        alpha = next((tensors[each] for each in _alpha_names(key) if each in tensors), None)
        if alpha is not None:
            own |= {_digest(tensor.to(dtype)): float(alpha.reshape(-1)[0]) for dtype in dtypes}
    return {
        path: own.get(_digest(layer.lora_A[name].weight), float(layer.r[name]))
        for path, layer in _layers(base, name)
        if name in layer.lora_A
    }


def _alpha_names(first: str) -> list[str]:
    """Return the names that a layer's alpha may have, by that of its first matrix."""
    layer = first.removesuffix(".weight")
    for ending in (".lora_A.default", ".lora_A", ".lora_down", ".lora.down", "_lora.down", ".lora_linear_layer.down"):
        layer = layer.removesuffix(ending)
    return [f"{layer}.alpha", f"{layer}.lora_A.alpha", f"{layer}.lora.alpha"]


def _set_alphas(base: Loaded, name: str, alphas: Alphas) -> None:
    for path, layer in _layers(base, name):
        if path in alphas:
            layer.lora_alpha[name] = alphas[path]


def _layers(base: Loaded, name: str) -> Iterator[tuple[str, Any]]:
    """Yield the layers into which an adapter of that name is loaded, by path."""
    for n, network in enumerate(base.networks()):
        for path, module in network.named_modules():
            if isinstance(module, LoraLayer) and name in module.r:
                yield f"{n}.{path}", module


def _parameters(base: Loaded, name: str) -> Iterator[tuple[str, torch.Tensor]]:
    for network in base.networks():
        for path, parameter in network.named_parameters():
            if f".{name}." in path or path.endswith(f".{name}"):
                yield path, parameter


def _digest(tensor: torch.Tensor) -> bytes:
    values = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
    return hashlib.sha256(str(tuple(tensor.shape)).encode() + values.tobytes()).digest()


def _layer(key: str) -> str:
    """Return the name of a tensor's layer for a message."""
    names = [key.rsplit(each, 1)[0].rstrip("._") for pair in _ENDS for each in pair if each in key]
    return min(names, key=len, default=key)


_ENDS: Sequence[tuple[str, str]] = (("lora_A", "lora_B"), ("lora_down", "lora_up"), (".down.", ".up."))
