"""Conversion of a single file into a checkpoint folder in diffusers' layout, which records its origin."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sdpipeline.engine import part_files
from sdpipeline.engine.single_files import networks, schedulers, tokenizers
from sdpipeline.engine.single_files.given import Given
from sdpipeline.engine.single_files.layout import Layout, Part
from sdpipeline.engine.single_files.record import RECORD
from sdpipeline.engine.single_files.source_file import FLOAT8, SourceFile
from sdpipeline.engine.single_files.templates import FAMILIES, published, read_config, related
from sdpipeline.errors import CheckpointError

REVISION = 1
"""Revision of this converter: another one makes another folder of the same file."""

Report = Callable[[str], None]


@dataclass(slots=True)
class _Conversion:
    source: SourceFile
    layout: Layout
    given: Given
    target: Path
    report: Report
    notes: list[str] = field(default_factory=list)
    templates: dict[str, str] = field(default_factory=dict)

    @property
    def where(self) -> str:
        return str(self.source.path)

    @property
    def folders(self) -> list[Path]:
        """The user's folders, then the file's own."""
        named = [folder for folder in (self.given.tokenizer, self.given.parts) if folder is not None]
        return [*named, self.source.path.parent]

    @property
    def roots(self) -> list[Path]:
        """The diffusers folders to read configurations from."""
        return [root for folder in self.folders for root in tokenizers.roots(folder)]


def convert(source: SourceFile, layout: Layout, given: Given, target: Path, *, sha256: str, report: Report) -> None:
    """Write the checkpoint into the empty folder ``target``; CheckpointError if the file and folders do not suffice.

    ``report`` is called with a line before each step that takes long.
    """
    work = _Conversion(source, layout, given, target, report)
    if any(info.dtype in FLOAT8 for info in source.tensors.values()):
        work.notes.append("float8 tensors are stored as bfloat16, which holds their values exactly")
    index = _pipeline(work) if layout.kind == "checkpoint" else None
    if layout.kind != "checkpoint":
        _network(work)
    _write(target / RECORD, _record(work, sha256))
    if index is not None:
        _write(target / "model_index.json", index)  # last: without it, the folder is not a checkpoint


def _pipeline(work: _Conversion) -> dict[str, Any]:
    layout, family = work.layout, work.layout.family
    if work.given.family not in (None, family):
        raise CheckpointError(f"{work.where} holds {family} weights, not {work.given.family}; leave --family out")
    encoders = networks.text_encoders(family)
    denoiser = "transformer" if family in networks.DENOISERS else "unet"
    needed = {denoiser: networks.class_of(family, denoiser), "vae": "AutoencoderKL", **encoders}
    borrowed = _borrowed(work, [name for name in needed if name not in layout.parts])
    absent = [name for name in needed if name not in layout.parts and name not in borrowed]
    if family == "sd3" and "text_encoder_3" in absent:
        absent.remove("text_encoder_3")
        del encoders["text_encoder_3"]
        work.notes.append("the file has no T5: prompts are read by the two CLIP text encoders")
    _refuse_absent(work, absent)
    vocabularies = _vocabularies(work, encoders)
    configs = {name: _configuration(work, name, part) for name, part in layout.parts.items()}
    _size(work, configs[denoiser], denoiser)
    similar = [root for root in work.roots if related(root, denoiser, configs[denoiser])]
    if borrowed:
        _check_borrowed(work, borrowed, similar, needed)
    scheduler = schedulers.scheduler(work.source, layout, similar, work.given.prediction_type)
    for name, part in layout.parts.items():
        _write_part(work, name, part, configs[name], work.target / name)
    for name, folder in borrowed.items():
        _copy_part(work, name, folder)
    (work.target / "scheduler").mkdir()
    _write(work.target / "scheduler" / "scheduler_config.json", scheduler)
    index = _index(work, needed, encoders, configs.get("unet", {})) | _options(similar)
    index["scheduler"] = ["diffusers", scheduler["_class_name"]]
    for name, (folder, open_clip) in vocabularies.items():
        class_name = tokenizers.copy(folder, work.target / name, open_clip=open_clip)
        encoder = read_config(work.target / name.replace("tokenizer", "text_encoder") / "config.json") or {}
        size = int(encoder.get("vocab_size", 0))
        tokenizers.check_vocabulary(work.target / name, class_name, size=size, where=work.where)
        index[name] = ["transformers", class_name]
    return index


def _size(work: _Conversion, config: dict[str, Any], denoiser: str) -> None:
    """Set the size of the training pictures that the file states, or that its prediction type implies in SD 2."""
    if not work.templates[denoiser].startswith("published") or denoiser != "unet":
        return
    stated = re.fullmatch(r"(\d+)x\1", work.source.metadata.get("modelspec.resolution", ""))
    if stated and int(stated[1]) % 64 == 0:
        config["sample_size"] = int(stated[1]) // 8
    elif work.layout.family == "sd2" and work.given.prediction_type == "epsilon":
        config["sample_size"] = 64


def _index(
    work: _Conversion, needed: Mapping[str, str], encoders: Mapping[str, str], unet: Mapping[str, Any]
) -> dict[str, Any]:
    known = published(work.layout.family)
    pipeline = known["inpainting_pipeline"] if unet.get("in_channels") == 9 else known["pipeline"]
    index: dict[str, Any] = {"_class_name": pipeline, "_diffusers_version": _diffusers_version()}
    index |= known["options"]
    for name, class_name in needed.items():
        library = "transformers" if name.startswith("text_encoder") else "diffusers"
        index[name] = [library, class_name]
    for name in needed.keys() - encoders.keys():
        if name.startswith("text_encoder"):
            index[name] = index[name.replace("text_encoder", "tokenizer")] = [None, None]
    if "requires_safety_checker" in index:
        index |= {"safety_checker": [None, None], "feature_extractor": [None, None], "requires_safety_checker": False}
    return index


def _options(related: Sequence[Path]) -> dict[str, Any]:
    """Return the options of the first pipeline with the same architecture, such as force_zeros_for_empty_prompt."""
    for root in related:
        index = read_config(root / "model_index.json") or {}
        return {k: v for k, v in index.items() if not k.startswith("_") and isinstance(v, str | int | float | bool)}
    return {}


def _borrowed(work: _Conversion, missing: Sequence[str]) -> dict[str, Path]:
    """Return the folders of missing parts in the folder that ``--parts`` names."""
    if work.given.parts is None:
        return {}
    folders = {name: work.given.parts / name for name in missing}
    return {name: folder for name, folder in folders.items() if (folder / "config.json").is_file()}


def _check_borrowed(
    work: _Conversion, borrowed: Mapping[str, Path], similar: Sequence[Path], needed: Mapping[str, str]
) -> None:
    """Raise CheckpointError for parts of another family: many load, and every picture would be silently wrong."""
    root = next(iter(borrowed.values())).parent
    if root in similar:
        return
    family = work.layout.family
    foreign = [name for name, folder in borrowed.items() if not _is_of(family, name, folder, needed[name])]
    if foreign or any((root / name).is_dir() for name in ("unet", "transformer")):
        names = ", ".join(foreign or borrowed)
        raise CheckpointError(
            f"{work.where} is {family} of other widths than the pipeline in {root}, whose {names} would not fit; "
            f"name a {family} folder with --parts DIR_OR_ALIAS"
        )


def _is_of(family: str, name: str, folder: Path, class_name: str) -> bool:
    """Return True if a part without its pipeline is the published one of a family."""
    config, known = read_config(folder / "config.json") or {}, published(family)["parts"][name]
    if name == "vae":
        keys = ("latent_channels", "scaling_factor", "shift_factor")
        return all(config.get(key, _VAE_DEFAULTS[key]) == known.get(key, _VAE_DEFAULTS[key]) for key in keys)
    width = "d_model" if class_name == "T5EncoderModel" else "hidden_size"
    return class_name in config.get("architectures", ()) and config.get(width) == known[width]


_VAE_DEFAULTS = {"latent_channels": 4, "scaling_factor": 0.18215, "shift_factor": None}


def _refuse_absent(work: _Conversion, absent: Sequence[str]) -> None:
    if not absent:
        return
    tokenizer = work.given.tokenizer
    denoiser = "transformer" if work.layout.family in networks.DENOISERS else "unet"
    if tokenizer is not None and all((tokenizer / name / "config.json").is_file() for name in (*absent, denoiser)):
        fix = f"the folder of --tokenizer has them: add --parts {tokenizer}"
    else:
        fix = (
            "name a diffusers folder of the same family that has them and its tokenizers, or the alias of a registered "
            "checkpoint: --parts DIR_OR_ALIAS"
        )
    where = f", and {work.given.parts} has none either" if work.given.parts else ""
    raise CheckpointError(f"{work.where} holds no {', no '.join(absent)}{where}; {fix}")


def _vocabularies(work: _Conversion, encoders: Mapping[str, str]) -> dict[str, tuple[Path, bool]]:
    """Return each tokenizer's folder, with True if its padding has to become OpenCLIP's.

    Raises CheckpointError for missing vocabularies, by their names.
    """
    family = work.layout.family
    found: dict[str, tuple[Path, bool]] = {}
    missing: list[str] = []
    for name, kind in tokenizers.names(encoders).items():
        folder = tokenizers.find(name, kind, work.folders)
        open_clip = kind != "T5EncoderModel" and (name == "tokenizer_2" or family == "sd2")
        own = folder is not None and folder.name == name and (folder.parent / "model_index.json").is_file()
        if folder is None and name == "tokenizer_2" and open_clip:
            folder = found["tokenizer"][0] if "tokenizer" in found else None
        if folder is None:
            missing.append(tokenizers.title(family, name, kind))
        else:
            found[name] = (folder, open_clip and not own)
    if missing:
        raise CheckpointError(
            f"{work.where} holds no vocabularies, and they are not shipped: it needs the tokenizer of "
            f"{' and of '.join(missing)}. Give --tokenizer DIR_OR_ALIAS: a diffusers folder with tokenizer/ and "
            "tokenizer_2/, one such tokenizer folder, or the alias of a registered checkpoint of the same family"
        )
    return found


def _network(work: _Conversion) -> None:
    """Write a checkpoint that is one network: a ControlNet or an autoencoder."""
    (name, part), *_ = work.layout.parts.items()
    config = _configuration(work, name, part)
    _write_part(work, name, part, config, work.target)


def _configuration(work: _Conversion, name: str, part: Part) -> dict[str, Any]:
    own = work.source.path.parent if work.layout.kind != "checkpoint" else None
    family = work.layout.family or work.given.family
    families = [family] if family else list(FAMILIES)
    where = work.where
    if name == "controlnet":
        families = [each for each in families if each.startswith("sd") and each != "sd3"]
    config, origin = networks.configuration(name, part, families=families, roots=work.roots, own=own, where=where)
    if name == "vae" and len(families) > 1 and origin.startswith("published"):
        choices = "sd1 or sdxl" if config["latent_channels"] == 4 else "sd3 or flux"
        raise CheckpointError(
            f"{where}: autoencoders of two families have the same tensors, and differ in the scale of their latents; "
            f"say --family {choices}"
        )
    work.templates[name] = origin
    return config


def _write_part(work: _Conversion, name: str, part: Part, config: dict[str, Any], folder: Path) -> None:
    from safetensors.torch import save_file

    from sdpipeline.engine.single_files import state_dicts

    work.report(f"converting {name}")
    folder.mkdir(exist_ok=True)
    class_name = str(config.get("_class_name") or config["architectures"][0])
    expected = networks.expected_shapes(class_name, config)
    tensors = state_dicts.convert(work.source, name, part, config, expected)
    file = "model.safetensors" if name.startswith("text_encoder") else "diffusion_pytorch_model.safetensors"
    save_file(tensors, folder / file, metadata={"format": "pt"})
    _write(folder / "config.json", config)


def _copy_part(work: _Conversion, name: str, folder: Path) -> None:
    work.report(f"copying {name}")
    root = folder.parent
    names = [str(path.relative_to(root)) for path in root.rglob("*") if path.is_file()]
    unused = part_files.unused(names)
    (work.target / name).mkdir()
    for file in part_files.in_folder(set(names) - unused, name):
        if file.endswith((".safetensors", ".json")):
            shutil.copyfile(folder / file, work.target / name / file)
    work.templates[name] = "copied from a named folder"
    work.notes.append(f"the {name} is not of the file: it is copied from the folder of --parts")


def _record(work: _Conversion, sha256: str) -> dict[str, Any]:
    """Return the record of the conversion, without a time: the same file and options give the same bytes."""
    options = {"family": work.given.family, "prediction_type": work.given.prediction_type}
    ignored = sorted({re.sub(r"\.\d+\b.*", ".…", name) for name in work.layout.ignored})
    return {
        "origin": {"file": work.source.path.name, "sha256": sha256, "size_bytes": work.source.path.stat().st_size},
        "converter": {"diffusers": _diffusers_version(), "revision": REVISION},
        "options": {key: value for key, value in options.items() if value is not None},
        "configurations": work.templates,
        "ignored_tensors": ignored[:50],
        "notes": work.notes,
    }


def _diffusers_version() -> str:
    import diffusers

    return str(diffusers.__version__)


def _write(path: Path, document: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(document, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
