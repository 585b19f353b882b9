"""Import of weights in single files into the checkpoints folder, one by one or a folder of them."""

from __future__ import annotations

import re
import shlex
import unicodedata
from collections.abc import Callable, Iterator, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

from sdpipeline.campaigns.spec_part import NAME
from sdpipeline.engine.checkpoints import CheckpointFiles, errors_of
from sdpipeline.engine.ip_adapters import ENCODER
from sdpipeline.engine.single_files.given import Given
from sdpipeline.engine.single_files.importer import Imported, Progress, import_file
from sdpipeline.engine.weight_files import PICKLES, WEIGHTS
from sdpipeline.errors import CheckpointError
from sdpipeline.private_files import users_umask
from sdpipeline.settings import Settings

FILES = (PICKLES - {".npy", ".npz", ".joblib", ".dill", ".pickle", ".pkl"}) | {WEIGHTS, ".sft", ".gguf"}
"""Suffixes of weights in a folder of downloads: those that are refused are reported, not passed over."""

_GENERIC = frozenset(
    {"pytorch_lora_weights", "adapter_model", "learned_embeds", "diffusion_pytorch_model", "model", "lora", "weights"}
)
"""File names that a library gives to every file: the alias is the folder's name."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Found:
    """One file of a folder: its alias, or the reason why it cannot be registered."""

    path: Path
    alias: str
    refused: str | None = None


def add_file(settings: Settings, alias: str, path: Path, given: Given, progress: Progress) -> Imported:
    """Convert or copy one file into the checkpoints folder; CheckpointError if it cannot be used."""
    own_folder = settings.checkpoints.is_relative_to(settings.home)
    with nullcontext() if own_folder else users_umask():
        return import_file(alias, path, settings.checkpoints, given, progress)


def folder_given(name: str | None, option: str, known: Mapping[str, CheckpointFiles]) -> Path | None:
    """Return the folder that an option names, itself or by the alias of a registered checkpoint."""
    if name is None:
        return None
    path = Path(name).expanduser()
    if path.is_dir():
        return path.resolve()
    if name in known:
        return known[name].directory
    raise CheckpointError(f"{option} {name} is neither a folder nor the alias of a registered checkpoint")


def files_of(folder: Path) -> Iterator[Found]:
    """Yield every file of weights below a folder, sorted, with an alias from its name.

    Hidden files and folders are passed over. A folder in diffusers' or transformers' layout is one refusal, because
    its files are parts of one checkpoint.
    """
    taken: dict[str, Path] = {}
    for path in _weights(folder):
        alias = alias_of(path)
        if path.is_dir():
            why = f"{path} is a checkpoint folder; register it by itself: {_command(alias, path)}"
        elif not path.is_file():
            why = f"{path} is a link to a file that is not there, or not a regular file; fetch it again"
        elif not re.fullmatch(NAME, alias):
            why = f"{path.name} gives no alias; register it by itself: {_command('ALIAS', path)}"
        elif alias in taken:
            why = f"{taken[alias]} has the same alias {alias}; register {path} by itself under another alias"
        else:
            taken[alias] = path
            yield Found(path=path, alias=alias)
            continue
        yield Found(path=path, alias=alias, refused=why)


def _weights(folder: Path) -> Iterator[Path]:
    try:
        entries = sorted(folder.iterdir(), key=lambda path: path.name)
    except OSError as error:
        raise CheckpointError(f"{folder} cannot be read: {error.strerror or error}") from error
    for path in entries:
        if path.name.startswith(".") or path.name == ENCODER:  # an IP-Adapter's encoder goes with the adapter
            continue
        if path.suffix.lower() in FILES and not path.is_dir():
            yield path
        elif path.is_dir() and not path.is_symlink():
            whole = any((path / name).is_file() for name in ("model_index.json", "config.json"))
            yield from [path] if whole else _weights(path)


def alias_of(path: Path) -> str:
    """Return an alias made of a file's name: lower-case letters, digits and hyphens."""
    stem = path.name if path.is_dir() else path.stem
    name = path.parent.name if stem.lower() in _GENERIC else stem
    plain = unicodedata.normalize("NFKD", name).encode("ascii", "ignore").decode().lower()
    return re.sub(r"[^a-z0-9]+", "-", plain).strip("-")[:63].rstrip("-")


def _command(alias: str, path: Path) -> str:
    """Return the command that registers a file, as a shell takes it."""
    return f"sdpipeline checkpoints add {alias} {shlex.quote(str(path))}"


def refuse_replacing(alias: str, files: CheckpointFiles, known: Mapping[str, CheckpointFiles], path: Path) -> None:
    """Raise CheckpointError if an alias made of a file's name already means other weights."""
    if alias in known and known[alias].digest != files.digest:
        raise CheckpointError(
            f"alias {alias} already means other weights ({known[alias].directory}); to replace them, register this "
            f"file by itself: {_command(alias, path)}"
        )


Register = Callable[[Imported, Path], Mapping[str, object]]
"""Registers an imported file, and returns its row of the command's result."""


def add_all(
    settings: Settings, folder: Path, known: Mapping[str, CheckpointFiles], progress: Progress, register: Register
) -> Iterator[Mapping[str, object]]:
    """Register every adapter of a folder, and yield a row of each file; a refused one does not stop the others."""
    for found in files_of(folder):
        row = {"file": str(found.path), "alias": found.alias}
        try:
            check_adapter(found)
            imported = add_file(settings, found.alias, found.path, Given(), progress)
            refuse_replacing(found.alias, imported.files, known, found.path)
            yield row | {"ok": True, **register(imported, found.path), "detail": ""}
        except CheckpointError as error:
            yield row | {"ok": False, "digest": None, "kind": None, "family": None, "detail": str(error)}


def check_adapter(found: Found) -> None:
    """Raise CheckpointError for a file without an alias, or one to convert: that is slow and needs other folders."""
    from sdpipeline.engine.single_files.layout import recognise
    from sdpipeline.engine.single_files.source_file import read_header

    if found.refused:
        raise CheckpointError(found.refused)
    with errors_of(found.alias, found.path):
        layout = recognise(read_header(found.path))
    if layout is not None:
        raise CheckpointError(
            f"{found.path} is a {layout.kind} in one file, which has to be converted; register it by itself: "
            f"{_command(found.alias, found.path)}"
        )
