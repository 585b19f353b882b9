"""Listing, hashing and change detection for the files of a checkpoint directory."""

from __future__ import annotations

import hashlib
import os
import re
import stat
import time
import unicodedata
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from sdpipeline.engine.hash_cache import HashCache, StatKey
from sdpipeline.errors import CheckpointError

WEIGHTS = ".safetensors"
INDEX = "model_index.json"
"""File of a diffusers pipeline that names its parts."""
PICKLES = frozenset({".bin", ".ckpt", ".pt", ".pth", ".pkl", ".pickle", ".dill", ".joblib", ".npy", ".npz"})
FOREIGN = frozenset({".gguf", ".h5", ".msgpack", ".onnx", ".onnx_data", ".ot", ".pb", ".tflite", ".xml"})
"""Weights for other frameworks. No loader here opens them."""
CODE = frozenset({".py", ".pyc", ".pyd", ".pyx", ".so", ".dll", ".dylib", ".sh"})
MATTERS = frozenset({WEIGHTS, ".json", ".txt", ".model"})
"""Weights, configurations and tokenizer files: they decide the picture, so the manifest holds them."""

HARMLESS = frozenset(
    {".md", ".rst", ".html", ".pdf", ".bib", ".cff", ".license", ".csv", ".tsv", ".ipynb", ".yaml", ".yml", ".sha256"}
    | {".png", ".jpg", ".jpeg", ".webp", ".gif", ".svg", ".avif", ".bmp", ".tif", ".tiff", ".mp4", ".webm", ".mov"}
)
"""Documentation and samples. No loader of diffusers, transformers, tokenizers or spandrel opens them."""
HARMLESS_NAMES = re.compile(
    r"(.*[-_ .])?(licen[cs]e|notice|readme|copying|authors|contributors|changelog|citation|attribution|use[_-]?policy"
    r"|terms|model[_-]?card|code[_-]of[_-]conduct)([\W_].*)?|thumbs\.db|desktop\.ini|sha256sums",
    re.IGNORECASE,
)
"""Documentation without a suffix or with an unusual one (LICENSE-1.0), and files that Windows creates in folders."""

_DISTRIBUTED = re.compile(r"shard-\d{5}-model-\d{5}-of-\d{5}\.safetensors", re.IGNORECASE)
"""One such file makes transformers read every safetensors of its folder, hidden ones included."""

MAX_FILES = 5_000
DEEPEST = 8
SETTLE_S = 0.05
"""Wait before a second listing: file systems take timestamps from a clock that ticks every few milliseconds."""


@dataclass(frozen=True, slots=True, kw_only=True)
class WeightFiles:
    """An open checkpoint directory. ``path`` refers to the same directory even if it is renamed."""

    alias: str
    directory: Path
    path: Path
    descriptor: int
    keys: Mapping[str, StatKey]

    @property
    def names(self) -> list[str]:
        """Regular files, sorted, as POSIX paths within the directory."""
        return sorted(name for name in self.keys if not name.endswith("/"))

    def approvable(self, ignored: Collection[str] = ()) -> list[str]:
        """Return the files for the manifest; CheckpointError for a file that no checkpoint may hold.

        ``ignored`` are files that no loader opens, such as a pickle next to the safetensors of the same part.
        """
        kept = [name for name in self.names if name not in ignored and _matters(self.alias, name)]
        _refuse_twins(self.alias, self.names)
        return kept

    def sha256(self, name: str, cache: HashCache | None = None) -> str:
        """Hash one file; ``cache`` avoids reading a file that was hashed before and has not changed since."""
        key = self.keys[name]
        if cache is not None and (known := cache.get(key)):
            return known
        with self._opened(name) as descriptor:
            if StatKey.of(os.fstat(descriptor)) != key:
                raise self._changed(name)
            with os.fdopen(descriptor, "rb", closefd=False) as file:
                found = hashlib.file_digest(file, "sha256").hexdigest()
            if StatKey.of(os.fstat(descriptor)) != key:
                raise self._changed(name)
        if cache is not None:
            cache.put(key, found)
        return found

    def check_unchanged(self) -> None:
        """Raise CheckpointError if any file or folder changed since the directory was opened."""
        now = _scan(self.alias, self.descriptor)
        for name in sorted(self.keys.keys() | now.keys(), key=lambda each: (each.endswith("/"), each)):
            if self.keys.get(name) != now.get(name):
                raise self._changed(name)

    def _changed(self, name: str) -> CheckpointError:
        what = "the directory" if name == "/" else name
        return CheckpointError(
            f"checkpoint {self.alias!r}: {what} changed while it was read; "
            "leave the directory alone, check it with `sdpipeline checkpoints verify`, and retry the jobs"
        )

    @contextmanager
    def _opened(self, name: str) -> Iterator[int]:
        # If a link or a FIFO has replaced the file, open neither follows it nor blocks, and its stat differs.
        with _errors(self.alias, name):
            descriptor = os.open(self.path / name, _FILE)
            try:
                yield descriptor
            finally:
                os.close(descriptor)


_FILE = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
_FOLDER = os.O_RDONLY | os.O_NOFOLLOW | os.O_DIRECTORY | os.O_CLOEXEC


@contextmanager
def opened(alias: str, directory: Path) -> Iterator[WeightFiles]:
    """Open a checkpoint directory and list it; CheckpointError for a link, a special file or unreadable content."""
    with _errors(alias, str(directory)):
        if directory.is_symlink():
            raise CheckpointError(
                f"checkpoint {alias!r}: {directory} is a symbolic link, which can be pointed elsewhere; "
                "put the directory itself there, or register the directory that the link names"
            )
        if not directory.is_dir():
            raise CheckpointError(f"checkpoint {alias!r}: {directory} is not a directory; register it again")
        descriptor = os.open(directory, _FOLDER)
    try:
        keys = _scan(alias, descriptor)
        if time.time_ns() - max(key.ctime_ns for key in keys.values()) < SETTLE_S * 1e9:
            time.sleep(SETTLE_S)  # else a change within the same clock tick would be missed
            keys = _scan(alias, descriptor)
        pinned = Path(f"/proc/self/fd/{descriptor}")
        path = pinned if pinned.is_dir() else directory
        yield WeightFiles(alias=alias, directory=directory, path=path, descriptor=descriptor, keys=keys)
    finally:
        os.close(descriptor)


def _scan(alias: str, descriptor: int, prefix: str = "") -> dict[str, StatKey]:
    """List every file, and every folder with a trailing slash. No loader reads hidden ones, so they are left out."""
    with _errors(alias, prefix or "its directory"):
        found = {prefix or "/": StatKey.of(os.fstat(descriptor))}
        with os.scandir(descriptor) as entries:
            listed = [(entry.name, entry.stat(follow_symlinks=False)) for entry in entries]
    for name, about in listed:
        full = f"{prefix}{name}"
        if not full.isprintable():
            raise CheckpointError(f"checkpoint {alias!r}: the name {full!a} is not printable; rename the file")
        if stat.S_ISLNK(about.st_mode):
            raise CheckpointError(
                f"checkpoint {alias!r}: {full} is a symbolic link, which can be pointed elsewhere; "
                "copy the directory with `cp -rL`, and register the copy with `sdpipeline checkpoints add`"
            )
        if name.startswith("."):
            continue
        if stat.S_ISDIR(about.st_mode) and full.count("/") < DEEPEST:
            with _errors(alias, full):
                inner = os.open(name, _FOLDER, dir_fd=descriptor)
            try:
                found |= _scan(alias, inner, f"{full}/")
            finally:
                os.close(inner)
        elif stat.S_ISREG(about.st_mode):
            found[full] = StatKey.of(about)
        else:
            what = "nested too deeply" if stat.S_ISDIR(about.st_mode) else "not a regular file"
            raise CheckpointError(f"checkpoint {alias!r}: {full} is {what}; remove it")
        if len(found) > MAX_FILES:
            raise CheckpointError(f"checkpoint {alias!r}: more than {MAX_FILES} files; name the checkpoint's directory")
    return found


@contextmanager
def _errors(alias: str, name: str) -> Iterator[None]:
    try:
        yield
    except FileNotFoundError as error:
        raise CheckpointError(f"checkpoint {alias!r}: {name} disappeared while it was read") from error
    except OSError as error:
        raise CheckpointError(f"checkpoint {alias!r}: {name} cannot be read: {error.strerror or error}") from error


def is_foreign(name: str) -> bool:
    """Return True for a pickle, and for weights of another framework."""
    return PurePosixPath(name).suffix.lower() in PICKLES | FOREIGN


def _matters(alias: str, name: str) -> bool:
    """Return True if the manifest holds this file; CheckpointError if no checkpoint may hold it."""
    path = PurePosixPath(name)
    suffix = path.suffix
    if _DISTRIBUTED.fullmatch(path.name):
        raise CheckpointError(
            f"checkpoint {alias!r}: {name} is a shard of a distributed checkpoint; save it again with save_pretrained, "
            "and remove the shards"
        )
    if suffix in MATTERS:
        return True
    lower = suffix.lower()
    if lower in CODE:
        raise CheckpointError(f"checkpoint {alias!r} contains code ({name}), which is never executed; remove it")
    if lower in PICKLES:
        raise CheckpointError(
            f"checkpoint {alias!r} holds {name}, but only {WEIGHTS} is loaded: a pickle can run code; "
            f"{_unpickled(path)}"
        )
    if lower in MATTERS:
        raise CheckpointError(f"checkpoint {alias!r}: write the suffix of {name} in lower case, or remove the file")
    if lower in HARMLESS or HARMLESS_NAMES.fullmatch(path.name):
        return False
    if lower in FOREIGN:
        raise CheckpointError(
            f"checkpoint {alias!r} holds {name}, which is for another framework, and only {WEIGHTS} is loaded; "
            f"download the {WEIGHTS} files of the repository instead, and remove it"
        )
    raise CheckpointError(
        f"checkpoint {alias!r}: {name} is neither weights, configuration nor documentation; remove it"
    )


def _unpickled(path: PurePosixPath) -> str:
    """Return how to get safetensors in place of a pickle, or how to go on if the pickle is not needed."""
    beside = f"{path.parent}/*.safetensors" if path.parent.name else "*.safetensors"
    return (
        f"download its safetensors instead (hf download REPO --include '{beside}'), or convert it in a sandbox: "
        "DiffusionPipeline.from_pretrained(OLD).save_pretrained(NEW); then remove the pickle"
    )


def _refuse_twins(alias: str, names: Sequence[str]) -> None:
    """Raise CheckpointError for names that a file system may treat as equal."""
    seen: dict[str, str] = {}
    for name in names:
        plain = unicodedata.normalize("NFKC", name).casefold()
        if plain in seen:
            raise CheckpointError(
                f"checkpoint {alias!r}: {seen[plain]} and {name} differ in upper and lower case only; remove one"
            )
        seen[plain] = name


def read_ahead(directory: Path, names: Sequence[str]) -> None:
    """Ask the kernel to read these files into its page cache."""
    for name in names:
        with suppress(OSError):  # loading reports what is missing
            descriptor = os.open(directory / name, _FILE)
            try:
                os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_WILLNEED)
            finally:
                os.close(descriptor)
