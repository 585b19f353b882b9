"""Import of a single file: a folder of its own next to the other checkpoints, made once and complete or not at all."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path

from safetensors import SafetensorError

from sdpipeline.domain import Json, digest
from sdpipeline.engine.checkpoints import CheckpointFiles, errors_of, inspect
from sdpipeline.engine.classification import classify_single_file
from sdpipeline.engine.hash_cache import StatKey
from sdpipeline.engine.ip_adapters import ip_adapter_folder
from sdpipeline.engine.single_files import conversion, tokenizers
from sdpipeline.engine.single_files.given import Given
from sdpipeline.engine.single_files.layout import Layout, recognise
from sdpipeline.engine.single_files.record import RECORD
from sdpipeline.engine.single_files.source_file import SourceFile, check_dtypes, read_header
from sdpipeline.engine.weight_files import WEIGHTS
from sdpipeline.errors import CheckpointError

_UNFINISHED = ".converting"
"""Folder of unfinished imports. It is hidden and holds no checkpoint itself, so the catalogue passes it over."""

_CHUNK = 16 << 20

Progress = Callable[[str, int, int], None]
"""Called with the step, the bytes done and the bytes in all; both are 0 for a step of unknown length."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Imported:
    """An imported file; ``record`` is that of its conversion, and empty for a copy.

    ``licence`` is that of the file's ``modelspec`` metadata.
    """

    files: CheckpointFiles
    sha256: str
    record: Json = field(default_factory=dict)
    licence: str | None = None

    @property
    def notes(self) -> list[str]:
        """Return what was decided that the file does not tell."""
        return [str(note) for note in self.record.get("notes", ())]


def import_file(alias: str, path: Path, folder: Path, given: Given, progress: Progress) -> Imported:
    """Convert or copy a single file into a folder within ``folder``, and return the folder's inspection.

    A conversion of the same bytes with the same options is used again. Raises CheckpointError if the file is not
    complete, needs more folders than ``given``, or holds weights that do not run here.
    """
    before = _stat(path)
    adapter: Mapping[str, Path] = {}
    with errors_of(alias, path):
        source = read_header(path)
        layout = recognise(source)
        if layout is None:
            adapter = _adapter_files(alias, source)
            _refuse_surplus(path, given)
        else:
            check_dtypes(source)
    sha256 = _sha256(path, progress)
    target = folder / (_name(source, given, sha256) if layout else _copy_name(source, adapter, sha256))
    if not target.is_dir():
        with _writing(folder), _unfinished(folder) as temporary:
            if layout is None:
                _copy(adapter, temporary, progress)
            else:
                _convert(source, layout, given, temporary, sha256=sha256, progress=progress)
            if _stat(path) != before:
                raise CheckpointError(f"{path} changed while it was read; leave it alone and try again")
            inspect(alias, temporary)
            _sync(temporary)
            with suppress(FileExistsError):
                _rename(temporary, target)
    licence = source.metadata.get("modelspec.license", "").strip() or None
    progress("hashing the checkpoint", 0, 0)
    files = inspect(alias, target)
    if layout is None:
        if sha256 not in files.manifest.values():
            raise CheckpointError(
                f"{target} holds a file that is not the file that it was copied from; remove that folder, and add "
                f"{path} again"
            )
        files = replace(files, origin_sha256=sha256)
        return Imported(files=files, sha256=sha256, licence=licence)
    record = json.loads((target / RECORD).read_text(encoding="utf-8"))
    return Imported(files=files, sha256=sha256, record=record, licence=licence)


def _copy(files: Mapping[str, Path], temporary: Path, progress: Progress) -> None:
    for name, path in files.items():
        progress(f"copying {path.name}", 0, 0)
        (temporary / name).parent.mkdir(exist_ok=True)
        shutil.copyfile(path, temporary / name)


def _convert(
    source: SourceFile, layout: Layout, given: Given, temporary: Path, *, sha256: str, progress: Progress
) -> None:
    try:
        conversion.convert(source, layout, given, temporary, sha256=sha256, report=lambda step: progress(step, 0, 0))
    except ModuleNotFoundError as error:
        raise CheckpointError(
            f"{source.path} has to be converted, and {error.name} is not installed: pip install 'sdpipeline[engine]'"
        ) from error


def _adapter_files(alias: str, source: SourceFile) -> dict[str, Path]:
    """Return the files to copy for weights that need no conversion; CheckpointError if they do not run here."""
    shapes = {name: list(info.shape) for name, info in source.tensors.items()}
    about = classify_single_file(alias, shapes, source.metadata, path=source.path)
    if about.layout is not None:
        raise CheckpointError(
            f"{source.path} is a {about.kind} of {about.family} under names that cannot be converted; fetch its "
            "publisher's folder with config.json, and register that folder"
        )
    if about.kind == "ip-adapter":
        return ip_adapter_folder(source.path)
    return {f"{source.path.stem}{WEIGHTS}": source.path}


def _refuse_surplus(path: Path, given: Given) -> None:
    named: dict[str, object] = {"--tokenizer": given.tokenizer, "--parts": given.parts}
    named |= {"--family": given.family, "--prediction-type": given.prediction_type}
    for option, value in named.items():
        if value is not None:
            raise CheckpointError(f"{path} is not a checkpoint, ControlNet or autoencoder; leave {option} out")


def _stat(path: Path) -> StatKey:
    try:
        return StatKey.of(path.stat())
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror or error}") from error


def _sha256(path: Path, progress: Progress) -> str:
    total, done, hashed = path.stat().st_size, 0, hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            hashed.update(chunk)
            done += len(chunk)
            progress(f"hashing {path.name}", done, total)
    return hashed.hexdigest()


def _stem(source: SourceFile) -> str:
    return re.sub(r"[^a-z0-9]+", "-", source.path.stem.lower()).strip("-")[:40] or "file"


def _copy_name(source: SourceFile, files: Mapping[str, Path], sha256: str) -> str:
    """Return the folder's name for a copy: of its files' names and sizes, and of the adapter's bytes."""
    about = {name: path.stat().st_size for name, path in sorted(files.items())}
    return f".{_stem(source)}-{digest({'sha256': sha256, 'files': about})[:16]}"


def _name(source: SourceFile, given: Given, sha256: str) -> str:
    """Return the folder's name for a conversion: of the file, and of everything that decides the result."""
    options = {"family": given.family, "prediction_type": given.prediction_type}
    folders = {"tokenizer": given.tokenizer, "parts": given.parts, "own": source.path.parent}
    parts = {key: _fingerprint(path, weights=key == "parts") for key, path in folders.items() if path is not None}
    about = {"sha256": sha256, "file": source.path.name, "revision": conversion.REVISION, **options, **parts}
    return f".{_stem(source)}-{digest(about)[:16]}"


_PARTS = (
    *("unet", "transformer", "vae", "controlnet", "scheduler", "text_encoder", "text_encoder_2", "text_encoder_3"),
    *("tokenizer", "tokenizer_2", "tokenizer_3"),
)


def _fingerprint(folder: Path, *, weights: bool) -> dict[str, str]:
    """Return the small files of a user's folder by their hashes, and its weights by their sizes."""
    (root,) = tokenizers.roots(folder)
    found = {}
    for path in sorted(path for part in ("", *_PARTS) if (root / part).is_dir() for path in (root / part).iterdir()):
        name = str(path.relative_to(root))
        if path.is_file() and path.suffix in (".json", ".txt", ".model"):
            found[name] = hashlib.sha256(path.read_bytes()).hexdigest()
        elif weights and path.suffix == WEIGHTS and path.parent != root:
            found[name] = str(path.stat().st_size)
    return found


@contextmanager
def _writing(folder: Path) -> Iterator[None]:
    """Raise OSError where safetensors cannot write, as on a full disk: its own error is of a type of its own."""
    try:
        yield
    except SafetensorError as error:
        number = re.search(r"os error (\d+)", str(error))
        if number is None:
            raise
        raise OSError(int(number[1]), os.strerror(int(number[1])), str(folder)) from error


@contextmanager
def _unfinished(folder: Path) -> Iterator[Path]:
    """Yield an empty folder on the same file system; it is removed at the end, as are those of dead processes."""
    waiting = folder / _UNFINISHED
    try:
        waiting.mkdir(parents=True, exist_ok=True)
    except (PermissionError, FileExistsError, NotADirectoryError) as error:
        raise CheckpointError(
            f"{waiting} cannot be created: {error.strerror}; make the folder of SDP_CHECKPOINTS_DIR writable"
        ) from error
    with _locked(waiting):  # so that another import cannot remove the new folder before it is locked
        for left in waiting.iterdir():
            _remove_if_abandoned(left)
        held = Path(tempfile.mkdtemp(dir=waiting))
        descriptor = os.open(held, os.O_RDONLY | os.O_DIRECTORY)
        fcntl.flock(descriptor, fcntl.LOCK_EX)
    try:
        inner = held / "checkpoint"
        inner.mkdir()
        yield inner
    finally:
        shutil.rmtree(held, ignore_errors=True)
        os.close(descriptor)


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def _remove_if_abandoned(folder: Path) -> None:
    """Remove the unfinished import of a process that has died: the kernel released its lock."""
    try:
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    except OSError:
        return
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return
    else:
        shutil.rmtree(folder, ignore_errors=True)
    finally:
        os.close(descriptor)


def _sync(folder: Path) -> None:
    """Write everything to disk before the rename, so that a power cut cannot leave a complete name on half a file."""
    for path in (*folder.rglob("*"), folder):
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _rename(temporary: Path, target: Path) -> None:
    try:
        temporary.rename(target)
    except OSError as error:
        if target.is_dir():  # another process imported the same file
            raise FileExistsError(str(target)) from error
        raise
