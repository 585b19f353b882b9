"""Classification of checkpoint directories, and verification of their bytes against the registered manifest."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sdpipeline.domain import Task, digest
from sdpipeline.engine import allowed_classes, completeness, config_checks, part_files, weight_files
from sdpipeline.engine.classification import SAFETY_CHECKER, Classification, classify, header, read_json
from sdpipeline.engine.distilled import detected_defaults
from sdpipeline.engine.families import FAMILIES
from sdpipeline.engine.hash_cache import HashCache
from sdpipeline.engine.ip_adapters import check_ip_adapter
from sdpipeline.engine.lora_files import check_lora
from sdpipeline.engine.refusal import Refusal
from sdpipeline.engine.single_files.record import origin_sha256
from sdpipeline.engine.weight_files import INDEX, MATTERS, WEIGHTS, WeightFiles
from sdpipeline.errors import CheckpointError, SdpError

__all__ = ["MATTERS", "SAFETY_CHECKER", "WEIGHTS", "header"]

UNNAMED = frozenset({"emb_params", "clip_l", "clip_g"})
"""Tensors of textual inversions that do not name their token."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckpointFiles:
    """A checkpoint directory: its kind, its family and the SHA-256 of each relevant file.

    ``native_size`` is the side in pixels of the square pictures that it was trained on, None if unknown. ``defaults``
    are generation parameters by diffusers' names that replace those of the family, such as the steps of a distilled
    checkpoint. ``origin_sha256`` is the SHA-256 of the single file that the directory was converted from. ``licence``
    and ``purposes`` are those of its approval. ``ignored`` are the names of files that lay beside the approved ones and
    that no loader opens, such as the same weights in another precision.
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
    ignored: Sequence[str] = ()


def inspect(alias: str, directory: Path, *, cache: HashCache | None = None) -> CheckpointFiles:
    """Classify and hash a directory without loading it; CheckpointError if it may not or cannot run.

    Every part that its pipelines need has to be there, whole. Of the same weights in several forms, one is chosen.
    ``cache`` avoids reading files that were hashed before and have not changed since.
    """
    with errors_of(alias, directory), weight_files.opened(alias, directory) as found:
        ignored = part_files.unused(found.names)
        names = found.approvable(ignored)
        if INDEX not in names and not any(name.endswith(WEIGHTS) for name in names):
            raise CheckpointError(f"checkpoint {alias!r} holds no {WEIGHTS} file; name the folder that holds one")
        headers = completeness.check_contents(alias, found.path, names)
        _check_configurations(alias, found.path, frozenset(names))
        about = _classify_complete(alias, found.path, names, headers)
        if about.kind == "checkpoint":
            config_checks.check(alias, found.path, about.family)
        elif about.kind == "lora":
            check_lora(alias, found.path, names)
        elif about.kind == "ip-adapter":
            check_ip_adapter(alias, found.path, names)
        manifest = {name: found.sha256(name, cache) for name in names}
        found.check_unchanged()
        return CheckpointFiles(
            alias=alias,
            digest=digest(manifest),
            kind=about.kind,
            family=about.family,
            directory=directory,
            scale=about.scale,
            native_size=about.native_size,
            manifest=manifest,
            ignored=tuple(sorted(ignored)),
            size_bytes=sum(found.keys[name].size for name in manifest),
            defaults=detected_defaults(found.path, about.kind, about.family),
            origin_sha256=origin_sha256(found.path, names),
        )


def native_size(alias: str, directory: Path) -> int | None:
    """Return the side in pixels that a pipeline's configurations show; None if they show none or are not here."""
    try:
        return classify(alias, directory, [INDEX]).native_size
    except CheckpointError:
        return None


def _classify_complete(alias: str, directory: Path, names: list[str], headers: completeness.Headers) -> Classification:
    """Classify a directory, and check that it has every part of its kind."""
    if INDEX in names:
        completeness.check_named_parts(alias, directory, names, headers)
        about = classify(alias, directory, names)
        completeness.check_needed_parts(alias, directory, about.family)
        return about
    about = classify(alias, directory, names)
    if "config.json" in names:
        completeness.check_single_network(alias, directory, names, headers)
    return about


@contextmanager
def errors_of(alias: str, path: Path) -> Iterator[None]:
    """Make any unexpected error the checkpoint's own: files are written by others, and must not stop a command."""
    try:
        yield
    except (SdpError, MemoryError):
        raise
    except Exception as error:
        why = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
        raise CheckpointError(
            f"checkpoint {alias!r}: {path} cannot be read as a checkpoint ({why}); remove it, or download it again"
        ) from error


def verify(files: CheckpointFiles, *, cache: HashCache | None = None) -> None:
    """Compare the directory with the approved manifest; CheckpointError names the first file that differs.

    Every file is hashed again, unless it is in ``cache``. An added file is a difference too.
    """
    with errors_of(files.alias, files.directory), _verified(files, cache):
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
        with errors_of(files.alias, files.directory):
            _compare(found, files, cache)
            _check_configurations(files.alias, found.path, frozenset(files.manifest))
        yield found


def _compare(found: WeightFiles, files: CheckpointFiles, cache: HashCache | None) -> None:
    """Raise CheckpointError for the first file that is missing, added or changed since the approval."""
    where = f"checkpoint {files.alias!r}"
    for name in sorted(files.manifest.keys() - set(found.names)):
        raise CheckpointError(f"{where}: {name} is missing from {files.directory}")
    # Ignored names are only names: none may stand for a file that a loader would open now.
    ignored = part_files.unused(found.names).intersection(files.ignored)
    for name in sorted(set(found.approvable(ignored)) - files.manifest.keys()):
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


def _check_configurations(alias: str, directory: Path, names: frozenset[str]) -> None:
    """Raise CheckpointError for classes and keys outside the allow-list, and for an index that names other files."""
    for name in sorted(names):
        file = name.rpartition("/")[2]
        if part_files.is_index(name):
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
    """Return the latent settings that have to be equal; ``None`` if the file cannot be read on this machine.

    Other latents would decode without an error, but to a wrong picture.
    """
    try:
        given = read_json(str(config.parent), config)
    except (CheckpointError, OSError):  # it is on another machine, or verification reports it
        return None
    statistics = given.get("latents_mean"), given.get("latents_std")
    scaling = given.get("scaling_factor", 0.18215), given.get("shift_factor")
    return given.get("latent_channels", 4), *scaling, *statistics


def inversion_words(files: CheckpointFiles) -> list[str] | None:
    """Return the tokens of a textual inversion in prompts; ``None`` if its file cannot be read on this machine."""
    for name in files.manifest:
        if (path := files.directory / name).suffix == WEIGHTS:
            try:
                return words_of(files.alias, header(files.alias, path))
            except (CheckpointError, OSError):  # verification reports it
                return None
    return None


def words_of(alias: str, tensors: Iterable[str]) -> list[str]:
    """Return ``<alias>``, and the file's own token if it names one."""
    return [f"<{alias}>", *(name for name in tensors if name not in UNNAMED)]
