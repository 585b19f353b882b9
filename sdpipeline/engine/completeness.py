"""Completeness of a checkpoint directory: every part that will be loaded is there, whole, and of the right network."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from sdpipeline.engine.allowed_classes import UNUSED_PARTS
from sdpipeline.engine.classification import Header, read_header, read_json
from sdpipeline.engine.classification.headers import AGAIN, POINTERS
from sdpipeline.engine.families import FAMILIES
from sdpipeline.engine.network_tensors import missing_tensor
from sdpipeline.engine.part_files import DIFFUSERS, TRANSFORMERS, chosen_form, in_folder, is_index
from sdpipeline.engine.weight_files import INDEX, WEIGHTS
from sdpipeline.errors import CheckpointError

OPTIONAL = {"sd3": frozenset({"text_encoder_3", "tokenizer_3"})}
"""Parts that a family's pipelines run without if model_index.json has ``[null, null]`` for them, by family."""

_ENCODERS = {"clip": 1, "clip-hidden": 1, "sdxl": 2, "sd3": 3, "flux": 2}
"""Number of text encoders by a family's kind of text encoding."""
_TRANSFORMERS = frozenset({"sd3", "flux"})
_VOCABULARIES = (("tokenizer.json",), ("vocab.json", "merges.txt"), ("spiece.model",))


_PAGES = (b"<!doctype html", b"<html")
_SMALL = 4096
"""Bytes of the longest pointer file; a larger file is not one."""

Headers = Mapping[str, Header]
"""Headers of the weights of a checkpoint directory, by the names of the files."""


def check_contents(alias: str, directory: Path, names: Collection[str]) -> Headers:
    """Return the headers of all weights; CheckpointError for a file that is a pointer, empty, a page or truncated."""
    headers = {}
    for name in names:
        _check_content(alias, directory, name)
        if name.endswith(WEIGHTS):
            headers[name] = read_header(alias, directory / name, name=name)
    return headers


def _check_content(alias: str, directory: Path, name: str) -> None:
    """Raise CheckpointError for a file that is empty, a Git LFS pointer or an HTML page."""
    path = directory / name
    size = path.stat().st_size
    if size == 0 and not name.endswith(".txt"):
        raise CheckpointError(f"checkpoint {alias!r}: {name} is empty; {AGAIN}")
    if size > _SMALL and not name.endswith(WEIGHTS):
        return
    with path.open("rb") as file:
        start = file.read(64)
    if start.startswith(POINTERS):
        raise CheckpointError(
            f"checkpoint {alias!r}: {name} is a Git LFS pointer, not the file itself; run `git lfs pull` in its folder"
        )
    if start.lstrip().lower().startswith(_PAGES):
        raise CheckpointError(
            f"checkpoint {alias!r}: {name} is an HTML page, as a download without login leaves it; "
            f"accept the licence on the repository's page, log in with `hf auth login`, and {AGAIN}"
        )


def check_named_parts(alias: str, directory: Path, names: Collection[str], headers: Headers) -> None:
    """Raise CheckpointError for a part that model_index.json names and that is not there or not whole."""
    index = read_json(alias, directory / INDEX)
    for part, entry in index.items():
        if not isinstance(entry, list) or part.startswith("_") or entry[:1] == [None] or part in UNUSED_PARTS:
            continue
        if not any(name.startswith(f"{part}/") for name in names):
            raise CheckpointError(
                f"checkpoint {alias!r}: the folder {part} is missing, but {INDEX} names it; "
                f"download the whole repository again, or copy {part} from a checkpoint of the same family"
            )
        if part.endswith("scheduler"):
            _need(alias, names, part, "scheduler_config.json")
        elif part.startswith("tokenizer"):
            _check_tokenizer(alias, directory, names, part)
        else:
            stem = TRANSFORMERS if entry[0] == "transformers" else DIFFUSERS
            check_network(alias, directory, headers, names, part, stem=stem, class_name=str(entry[1]))


def check_needed_parts(alias: str, directory: Path, family: str, *, but: Collection[str] = ()) -> None:
    """Raise CheckpointError for a part that the family's pipelines need and that model_index.json does not name.

    Parts in ``but`` are not needed.
    """
    index = read_json(alias, directory / INDEX)
    optional = OPTIONAL.get(family, frozenset())
    for part in _needed(family):
        if part in but or not _is_null(index, part):
            continue
        if part not in optional:
            what = f"has {part}: [null, null]" if part in index else f"does not name {part}"
            raise CheckpointError(
                f"checkpoint {alias!r}: {INDEX} {what}, and the pipelines of {family} cannot run without it; "
                f"download the whole repository, or copy {part} from a checkpoint of the same family and name it there"
            )
        other = next(each for each in optional if each != part)
        if not _is_null(index, other):
            raise CheckpointError(
                f"checkpoint {alias!r}: {INDEX} names {other} without {part}; restore {part}, "
                f"or write [null, null] for both"
            )


def check_single_network(alias: str, directory: Path, names: Collection[str], headers: Headers) -> None:
    """Raise CheckpointError unless a directory with a config.json of its own holds that network, whole."""
    config = read_json(alias, directory / "config.json")
    if class_name := config.get("_class_name"):
        check_network(alias, directory, headers, names, "", stem=DIFFUSERS, class_name=str(class_name))
    else:
        class_name = next(iter(config.get("architectures") or ()), "")
        check_network(alias, directory, headers, names, "", stem=TRANSFORMERS, class_name=str(class_name))


def check_network(
    alias: str, directory: Path, headers: Headers, names: Collection[str], folder: str, *, stem: str, class_name: str
) -> None:
    """Raise CheckpointError unless a folder has a configuration and one whole form of the network's weights.

    An empty ``folder`` is the checkpoint's own directory, and ``stem`` the beginning of the names of its weights.
    """
    _need(alias, names, folder, "config.json")
    files, prefix = in_folder(names, folder), f"{folder}/" if folder else ""
    form = chosen_form(files, stem)
    if form is None:
        raise _no_weights(alias, prefix, stem, [file for file in files if file.endswith(WEIGHTS)])
    if not form.loadable:
        index = f"{stem}.{WEIGHTS[1:]}.index" + (f".{form.variant}.json" if form.variant else ".json")
        raise CheckpointError(
            f"checkpoint {alias!r}: {prefix}{form.shards[0]} is a shard, but its index {prefix}{index} is missing; "
            f"download the index"
        )
    tensors = _tensors(alias, directory, headers, prefix, form.files())
    config = read_json(alias, directory / f"{prefix}config.json")
    if tensor := missing_tensor(class_name, config, tensors):
        raise CheckpointError(
            f"checkpoint {alias!r}: {folder or form.files()[0]} has no tensor {tensor}; its weights are incomplete, or "
            f"those of another network than {class_name}: {AGAIN}"
        )


def _tensors(alias: str, directory: Path, headers: Headers, prefix: str, files: Collection[str]) -> set[str]:
    """Return the names of all tensors; CheckpointError for one that an index names and its shard does not have."""
    shards = {file: set(headers[f"{prefix}{file}"].tensors) for file in files if not is_index(file)}
    for file in files:
        if is_index(file):
            for tensor, shard in read_json(alias, directory / f"{prefix}{file}")["weight_map"].items():
                if tensor not in shards.get(str(shard), ()):
                    raise CheckpointError(f"checkpoint {alias!r}: {prefix}{shard} has no tensor {tensor}; {AGAIN}")
    return set().union(*shards.values())


def _check_tokenizer(alias: str, directory: Path, names: Collection[str], part: str) -> None:
    files = in_folder(names, part)
    if whole := [each for each in _VOCABULARIES if set(each) <= set(files)]:
        _check_vocabulary(alias, directory, f"{part}/{whole[0][0]}")
        return
    half = next((each for each in _VOCABULARIES if set(each) & set(files)), ())
    lacks = next((file for file in half if file not in files), "tokenizer.json")
    raise CheckpointError(
        f"checkpoint {alias!r}: {part}/{lacks} is missing, and there is no other vocabulary (tokenizer.json, or "
        "vocab.json with merges.txt, or spiece.model); download the folder again"
    )


def _check_vocabulary(alias: str, directory: Path, name: str) -> None:
    """Raise CheckpointError for a vocabulary without words: transformers would read every prompt as empty."""
    if not name.endswith(".json"):
        return
    words: Any = read_json(alias, directory / name)
    if name.endswith("tokenizer.json"):
        words = words["model"].get("vocab") if isinstance(words.get("model"), dict) else None
    if not words or not isinstance(words, dict | list):
        raise CheckpointError(f"checkpoint {alias!r}: {name} has no vocabulary; {AGAIN}")


def _need(alias: str, names: Collection[str], folder: str, file: str) -> None:
    name = f"{folder}/{file}" if folder else file
    if name not in names:
        raise CheckpointError(f"checkpoint {alias!r}: {name} is missing; download it")


def _no_weights(alias: str, prefix: str, stem: str, others: list[str]) -> CheckpointError:
    wanted = f"{prefix}{stem}{WEIGHTS}"
    if not others:
        return CheckpointError(f"checkpoint {alias!r}: {wanted} is missing; download it")
    return CheckpointError(
        f"checkpoint {alias!r}: {wanted} is missing, and {prefix}{others[0]} has a name that no loader looks for; "
        f"rename it to {stem}{WEIGHTS} if it holds the whole network"
    )


def _is_null(index: Mapping[str, Any], part: str) -> bool:
    entry = index.get(part)
    return not isinstance(entry, list) or entry[:1] == [None]


def _needed(family: str) -> list[str]:
    """Return the parts that a family's pipelines take, ``OPTIONAL`` ones included."""
    text = FAMILIES[family].text
    counts = range(1, _ENCODERS.get(text, 0) + 1)
    numbers = ["" if n == 1 else f"_{n}" for n in counts]
    parts = ["transformer" if text in _TRANSFORMERS else "unet", "vae", "scheduler"]
    parts += [f"{part}{n}" for n in numbers for part in ("text_encoder", "tokenizer")]
    return [*parts, "low_res_scheduler"] if family == "upscale" else parts
