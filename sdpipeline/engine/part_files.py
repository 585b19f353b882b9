"""Selection of the weight files that are loaded: one form of each part, chosen by the names of the files alone.

A public repository holds the same network several times: in full precision, in half precision (``fp16``), without the
moving average (``non_ema``), in shards, as a pickle, for other frameworks, and once more as a single file next to
``model_index.json``. Loading names the chosen form (``variant=``, ``use_safetensors=True``), so no loader opens the
others. They are neither counted nor hashed nor fetched, and only their names are kept with the approval: a file that
appears later is still refused.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable
from dataclasses import dataclass, field

from sdpipeline.engine.allowed_classes import UNUSED_PARTS
from sdpipeline.engine.weight_files import INDEX, WEIGHTS, is_foreign

DIFFUSERS = "diffusion_pytorch_model"
TRANSFORMERS = "model"
STEMS = (DIFFUSERS, TRANSFORMERS)
"""Beginnings of the names under which the two libraries look for weights."""

_STEM = rf"(?P<stem>{DIFFUSERS}|{TRANSFORMERS})"
_SHARD = re.compile(
    rf"{_STEM}(?:\.(?P<before>[\w.-]+?))?-\d{{5}}-of-\d{{5}}(?:\.(?P<after>[\w.-]+))?\.safetensors", re.ASCII
)
_SINGLE = re.compile(rf"{_STEM}(?:\.(?P<variant>[\w.-]+))?\.safetensors", re.ASCII)
_INDEX = re.compile(rf"{_STEM}\.safetensors(?:\.(?P<before>[\w-]+))?\.index(?:\.(?P<after>[\w-]+))?\.json", re.ASCII)
_PREFERRED = (None, "fp16", "bf16")


@dataclass(slots=True, kw_only=True)
class WeightForm:
    """One form of a network's weights: a single file, or an index with its shards. ``variant`` is None if plain."""

    stem: str
    variant: str | None
    single: str | None = None
    index: str | None = None
    shards: list[str] = field(default_factory=list)

    @property
    def loadable(self) -> bool:
        """False for shards without their index, which no loader opens."""
        return self.single is not None or self.index is not None

    def files(self) -> list[str]:
        """Return the files that the library opens if both a single file and an index exist."""
        if self.single is not None and (self.stem == TRANSFORMERS or self.index is None):
            return [self.single]
        return [*([self.index] if self.index else []), *self.shards]


def is_index(name: str) -> bool:
    """Return True for an index of shards, of any variant."""
    file = name.rpartition("/")[2]
    return file.endswith(".index.json") or _INDEX.fullmatch(file) is not None


def forms(files: Iterable[str], stem: str) -> list[WeightForm]:
    """Return the forms of one network, the preferred one first, from the names in its folder.

    Full precision goes before ``fp16``, ``bf16`` and the others; weights without the moving average come last.
    """
    found: dict[str | None, WeightForm] = {}
    for file in sorted(files):
        for pattern in (_SHARD, _INDEX, _SINGLE):
            match = pattern.fullmatch(file)
            if match is None or match["stem"] != stem:
                continue
            named = match.groupdict()
            variant = named.get("variant") or named.get("before") or named.get("after")
            form = found.setdefault(variant, WeightForm(stem=stem, variant=variant))
            if pattern is _SHARD:
                form.shards.append(file)
            elif pattern is _INDEX:
                form.index = file
            else:
                form.single = file
            break
    return sorted(found.values(), key=_rank)


def _rank(form: WeightForm) -> tuple[bool, bool, int, str]:
    known = form.variant in _PREFERRED
    non_ema = "non_ema" in (form.variant or "").replace("-", "_")
    return not form.loadable, non_ema, _PREFERRED.index(form.variant) if known else len(_PREFERRED), str(form.variant)


def chosen_form(files: Iterable[str], stem: str) -> WeightForm | None:
    """Return the form of a network that is loaded; None if its folder holds no weights."""
    return next(iter(forms(files, stem)), None)


def in_folder(names: Iterable[str], folder: str) -> list[str]:
    """Return the names directly in a folder, without it; an empty ``folder`` is the checkpoint's own directory."""
    prefix = f"{folder}/" if folder else ""
    return [name[len(prefix) :] for name in names if name.startswith(prefix) and "/" not in name[len(prefix) :]]


def unused(names: Collection[str]) -> frozenset[str]:
    """Return the files of a checkpoint directory that no loader opens: other forms, pickles next to safetensors, …"""
    kept = _weights(names)
    folders = {_folder(name) for name in kept}
    root_is_read = INDEX not in names
    skipped = set()
    for name in names:
        top = name.partition("/")[0]
        if name.endswith(WEIGHTS) or is_index(name):
            if name not in kept:
                skipped.add(name)
        elif is_foreign(name):
            never_read = (not root_is_read and "/" not in name) or ("/" in name and top in UNUSED_PARTS)
            if never_read or _folder(name) in folders:
                skipped.add(name)
    return frozenset(skipped)


def _folder(name: str) -> str:
    return name.rpartition("/")[0]


def _weights(names: Collection[str]) -> frozenset[str]:
    """Return the weights and indexes that loaders open."""
    if INDEX in names:
        folders = {name.partition("/")[0] for name in names if "/" in name} - UNUSED_PARTS
        return frozenset().union(*(_part(names, folder) for folder in folders if _is_part(folder)))
    root = in_folder(names, "")
    if "config.json" in root:
        return _chosen(names, "", STEMS) or frozenset(name for name in root if name.endswith(WEIGHTS))
    # A LoRA, a textual inversion, an upscaler, or an IP-Adapter with its encoder: one file of any name.
    encoder = _chosen(names, "image_encoder", (TRANSFORMERS,))
    others = (name for name in names if not name.startswith("image_encoder/") or not encoder)
    return encoder | frozenset(name for name in others if name.endswith(WEIGHTS) or is_index(name))


def _is_part(folder: str) -> bool:
    return folder in ("unet", "transformer", "vae") or folder.startswith("text_encoder")


def _part(names: Collection[str], folder: str) -> frozenset[str]:
    stem = TRANSFORMERS if folder.startswith("text_encoder") else DIFFUSERS
    files = _chosen(names, folder, (stem,))
    # Without a name that the library knows, keep what is there: the check of the part names it.
    return files or frozenset(f"{folder}/{name}" for name in in_folder(names, folder) if name.endswith(WEIGHTS))


def _chosen(names: Collection[str], folder: str, stems: Iterable[str]) -> frozenset[str]:
    files = in_folder(names, folder)
    prefix = f"{folder}/" if folder else ""
    found = (chosen_form(files, stem) for stem in stems)
    return frozenset(f"{prefix}{file}" for form in found if form is not None for file in form.files())
