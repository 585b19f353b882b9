"""Classification of checkpoint directories, and verification of their bytes against the registered manifest."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sdpipeline.domain import Task, digest
from sdpipeline.engine import allowed_classes, weight_files
from sdpipeline.engine.classification import SAFETY_CHECKER, classify, header, read_json
from sdpipeline.engine.families import FAMILIES
from sdpipeline.engine.hash_cache import HashCache
from sdpipeline.engine.ip_adapters import check_ip_adapter
from sdpipeline.engine.lora_files import check_lora
from sdpipeline.engine.refusal import Refusal
from sdpipeline.engine.weight_files import MATTERS, WEIGHTS, WeightFiles
from sdpipeline.errors import CheckpointError

__all__ = ["MATTERS", "SAFETY_CHECKER", "WEIGHTS", "header"]

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
        what = classify(alias, found.path, names)
        if what.kind == "lora":
            check_lora(alias, found.path, names)
        elif what.kind == "ip-adapter":
            check_ip_adapter(alias, found.path, names)
        manifest = {name: found.sha256(name, cache) for name in names}
        found.check_unchanged()
        return CheckpointFiles(
            alias=alias,
            digest=digest(manifest),
            kind=what.kind,
            family=what.family,
            directory=directory,
            scale=what.scale,
            manifest=manifest,
            size_bytes=sum(found.keys[name].size for name in manifest),
            native_size=what.native_size,
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
            allowed_classes.check_shards(alias, name, read_json(alias, directory / name), names)
        elif file == "adapter_config.json" and f"{name.removesuffix(file)}config.json" in names:
            raise CheckpointError(f"checkpoint {alias!r}: {name} loads an adapter on top of the network; remove it")
        elif file == "model_index.json" or file.endswith("config.json"):
            document = read_json(alias, directory / name)
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
    given = read_json(str(config.parent), config)
    return given.get("latent_channels", 4), given.get("scaling_factor", 0.18215), given.get("shift_factor")


def inversion_words(files: CheckpointFiles) -> list[str] | None:
    """Return the tokens of a textual inversion in prompts; ``None`` if its file is on another machine."""
    for name in files.manifest:
        if (path := files.directory / name).suffix == WEIGHTS and path.is_file():
            return words_of(files.alias, header(files.alias, path))
    return None


def words_of(alias: str, tensors: Iterable[str]) -> list[str]:
    """Return ``<alias>``, and the file's own token if it names one."""
    return [f"<{alias}>", *(name for name in tensors if name not in UNNAMED)]
