"""Checks of a LoRA file by its tensors' names and shapes: network type, pairs of matrices and ranks."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

from sdpipeline.engine.classification import lora_format, read_header
from sdpipeline.errors import CheckpointError

NETWORKS: Mapping[str, str] = {
    "loha": "a LoHa (LyCORIS, Hadamard products)",
    "lokr": "a LoKr (LyCORIS, Kronecker products)",
    "glora": "a GLoRA",
    "ia3": "an (IA)3",
    "full": "a file of whole weight differences (diff)",
    "norm": "a file of normalisation differences",
    "oft": "an OFT",
    "boft": "a BOFT",
    "vera": "a VeRA",
}
"""Titles of network types that are not applied here."""

PAIRS = (
    ("lora_embedding_A", "lora_embedding_B"),
    ("lora_A", "lora_B"),
    ("lora_down", "lora_up"),
    (".down.weight", ".up.weight"),
)
"""Names of a layer's first and second matrix, as peft, sd-scripts, and XLabs or older diffusers write them."""

_CHANGES_FORMULA = (".lora_mid.weight", ".scalar", ".rescale", ".reshape_weight")
"""Ends of tensors by which LyCORIS changes the product of the two matrices."""

_FIX = "merge it into a checkpoint with the tool that made it and register the result, or use a plain LoRA"


def check_lora(alias: str, directory: Path, names: Iterable[str]) -> None:
    """Raise CheckpointError for a LoRA's folder whose file cannot be applied, with the network type and the fix."""
    for name in names:
        if not name.endswith(".safetensors"):
            continue
        about = read_header(alias, directory / name)
        if refused := lora_refusal(about.tensors) or _quantized(about.dtypes):
            raise CheckpointError(f"checkpoint {alias!r} {refused}")


def lora_refusal(tensors: Mapping[str, Sequence[int]]) -> str | None:
    """Return why a LoRA file cannot be applied, as the end of ``checkpoint 'x' …``; None for a plain LoRA.

    A plain LoRA adds ``up @ down * alpha / rank`` to the weights of linear and convolutional layers. ``tensors`` are
    names with shapes.
    """
    found = lora_format(tensors)
    if found is None:
        return "holds no layer of a LoRA; fetch it again"
    others = [title for network, title in NETWORKS.items() if network in found.networks]
    if others:
        return f"is {others[0]}, which is not applied here; {_FIX}"
    if found.dora:
        return f"is a DoRA (weight-decomposed LoRA), which is not applied here; {_FIX}"
    for name in tensors:
        if name.endswith(_CHANGES_FORMULA):
            return f"is a LyCORIS network whose {name} changes the formula of a LoRA, which is not applied here; {_FIX}"
    if plain := next((name for name in tensors if name.endswith((".lora_down", ".lora_up"))), None):
        return f"has {plain} in place of {plain}.weight, as LoRAs of Nunchaku (SVDQuant); use the LoRA it was made from"
    if found.others:
        return f"holds {found.others[0]}, which does not belong to a LoRA; remove the tensor, or use another file"
    return next(_broken_pairs(tensors), None)


def _quantized(dtypes: Mapping[str, str]) -> str | None:
    """Return why matrices of integers cannot be applied: their scales are not in a LoRA's formula."""
    for name, dtype in dtypes.items():
        if second_matrix(name) and dtype.startswith(("I", "U", "BOOL", "C")):
            return f"holds {name} of dtype {dtype}: quantized weights; use the fp16 or bf16 file of this LoRA"
    return None


def second_matrix(name: str) -> str | None:
    """Return the name of a layer's second matrix by that of its first; None for any other tensor."""
    return next((second.join(name.rsplit(first, 1)) for first, second in PAIRS if first in name), None)


def _broken_pairs(tensors: Mapping[str, Sequence[int]]) -> Iterator[str]:
    """Yield the faults of each layer's two matrices."""
    seconds = set()
    for name, shape in tensors.items():
        other = second_matrix(name)
        if other is None or not name.endswith(("weight", "_A")):
            continue
        seconds.add(other)
        if other not in tensors:
            yield f"has {name} without {other}: the file is incomplete; fetch it again"
        elif 0 in shape or 0 in tensors[other] or len(shape) < 2:
            yield f"has {name} of shape {list(shape)}: a LoRA of rank 0 changes nothing; use another file"
        elif len(tensors[other]) < 2 or shape[0] != tensors[other][1]:
            yield (
                f"has {name} of rank {shape[0]}, but {other} of shape {list(tensors[other])}: "
                "the file is damaged; fetch it again"
            )
    for name in tensors:
        is_second = any(second in name for _, second in PAIRS) and name.endswith(("weight", "_B"))
        if is_second and name not in seconds:
            yield f"has {name} without its first matrix: the file is incomplete; fetch it again"
