"""Allow-list of the classes and configuration keys that a checkpoint may name."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from sdpipeline.engine.classification.pipelines import check_pipeline_class
from sdpipeline.errors import CheckpointError

_CLIP = frozenset({"CLIPTextModel", "CLIPTextModelWithProjection"})
_ENCODERS = _CLIP | {"T5EncoderModel"}
_TOKENIZERS = frozenset({"CLIPTokenizer", "CLIPTokenizerFast", "T5Tokenizer", "T5TokenizerFast"})
_SCHEDULERS = frozenset(
    f"{name}Scheduler"
    for name in (
        "DDIM", "DDIMParallel", "DDPM", "DDPMParallel", "DEISMultistep", "DPMSolverMultistep", "DPMSolverSDE",
        "DPMSolverSinglestep", "EDMDPMSolverMultistep", "EDMEuler", "EulerAncestralDiscrete", "EulerDiscrete",
        "FlowMatchEulerDiscrete", "FlowMatchHeunDiscrete", "HeunDiscrete", "IPNDM", "KDPM2AncestralDiscrete",
        "KDPM2Discrete", "LCM", "LMSDiscrete", "PNDM", "SASolver", "TCD", "UniPCMultistep",
    )
)  # fmt: skip

COMPONENTS: Mapping[str, tuple[frozenset[str], frozenset[str]]] = {
    "unet": (frozenset({"diffusers"}), frozenset({"UNet2DConditionModel"})),
    "transformer": (frozenset({"diffusers"}), frozenset({"SD3Transformer2DModel", "FluxTransformer2DModel"})),
    "vae": (frozenset({"diffusers"}), frozenset({"AutoencoderKL"})),
    "text_encoder": (frozenset({"transformers"}), _CLIP),
    "text_encoder_2": (frozenset({"transformers"}), _ENCODERS),
    "text_encoder_3": (frozenset({"transformers"}), _ENCODERS),
    "tokenizer": (frozenset({"transformers"}), _TOKENIZERS),
    "tokenizer_2": (frozenset({"transformers"}), _TOKENIZERS),
    "tokenizer_3": (frozenset({"transformers"}), _TOKENIZERS),
    "scheduler": (frozenset({"diffusers"}), _SCHEDULERS),
    "low_res_scheduler": (frozenset({"diffusers"}), _SCHEDULERS),
    # Parts of older checkpoints, which this engine never loads.
    "safety_checker": (
        frozenset({"stable_diffusion", "diffusers"}),
        frozenset({"StableDiffusionSafetyChecker"}),
    ),
    "feature_extractor": (
        frozenset({"transformers"}),
        frozenset({"CLIPFeatureExtractor", "CLIPImageProcessor", "CLIPImageProcessorFast", "SiglipImageProcessor"}),
    ),
    "image_encoder": (
        frozenset({"transformers"}),
        frozenset({"CLIPVisionModel", "CLIPVisionModelWithProjection", "SiglipVisionModel"}),
    ),
    "watermarker": (frozenset({"stable_diffusion_xl"}), frozenset({"StableDiffusionXLWatermarker"})),
}
"""Libraries and classes by the component's name in model_index.json."""

UNUSED_PARTS = frozenset({"safety_checker", "feature_extractor", "image_encoder", "watermarker"})
"""Parts of a pipeline that this engine never loads: no loader is ever given their folders."""

NETWORKS = frozenset(
    {"ControlNetModel", "ControlNetUnionModel", "SD3ControlNetModel", "FluxControlNetModel", "AutoencoderKL"}
)
"""diffusers classes of checkpoints that are one network."""

ANNOTATOR_NETWORKS = frozenset(
    {
        "DPTForDepthEstimation",
        "DepthAnythingForDepthEstimation",
        "SegformerForSemanticSegmentation",
        "UperNetForSemanticSegmentation",
        "VitPoseForPoseEstimation",
    }
)
_PREPROCESSED = ("Beit", "CLIP", "ConvNext", "DPT", "Segformer", "ViT", "VitPose")
IMAGE_PROCESSORS = frozenset(
    f"{name}{suffix}"
    for name in _PREPROCESSED
    for suffix in ("ImageProcessor", "ImageProcessorFast", "ImageProcessorPil", "FeatureExtractor")
)
"""transformers classes that preprocessor_config.json may name."""

_RUNS_CODE = frozenset({"auto_map", "custom_pipeline", "custom_pipelines", "trust_remote_code", "use_kernels"})
_OTHER_FILES = frozenset(
    {"backbone", "base_model_name_or_path", "gguf_file", "merges_file", "spm_file", "tokenizer_file"}
    | {"use_pretrained_backbone", "use_timm_backbone", "vocab_file", "transformers_weights"}
)
_OTHER_LIBRARIES = frozenset({"quantization_config", "compression_config"})
_ATTENTION = frozenset({"attn_implementation", "_attn_implementation", "_attn_implementation_internal"})
_PROCESSORS = frozenset({"image_processor_type", "feature_extractor_type"})


def check_index(alias: str, index: Mapping[str, Any]) -> None:
    """Raise CheckpointError for a pipeline or a component outside the allow-list."""
    check_pipeline_class(alias, index.get("_class_name"))
    for name, entry in index.items():
        if isinstance(entry, list | dict) and not name.startswith("_"):
            _check_component(alias, name, entry)


def _check_component(alias: str, name: str, entry: Any) -> None:
    where = f"checkpoint {alias!r}: component {name}"
    if not isinstance(entry, list) or len(entry) != 2:
        raise CheckpointError(f"{where} of model_index.json is not [library, class]; use the published file")
    if entry == [None, None]:
        return
    library, class_name = entry
    if name == "controlnet":
        raise CheckpointError(
            f"{where} is an approved checkpoint of its own here: register its folder with `sdpipeline checkpoints add "
            f"{alias}-controlnet DIR/controlnet`, and remove controlnet from model_index.json, with _class_name "
            "changed to that of the plain pipeline"
        )
    if library not in ("diffusers", "transformers", "stable_diffusion", "stable_diffusion_xl"):
        raise CheckpointError(
            f"{where} asks for code from {library!r}, which is never run; use a checkpoint of diffusers' own classes"
        )
    libraries, classes = COMPONENTS.get(name, (frozenset(), frozenset()))
    if library not in libraries or class_name not in classes:
        allowed = ", ".join(sorted(classes)) or "none: the engine has no such component"
        raise CheckpointError(f"{where} asks for {library}.{class_name}, which is not loaded; allowed: {allowed}")


def check_network(alias: str, class_name: Any, allowed: frozenset[str] = NETWORKS) -> str:
    """Return the class of a one-network checkpoint; CheckpointError for a class outside the allow-list."""
    if not isinstance(class_name, str) or class_name not in allowed:
        raise CheckpointError(
            f"checkpoint {alias!r}: config.json asks for class {class_name!r}, which is not loaded; "
            f"allowed: {', '.join(sorted(allowed))}"
        )
    return class_name


def check_configuration(alias: str, name: str, document: Any) -> None:
    """Raise CheckpointError for a key that makes a loader run code, or read files outside the checkpoint."""
    for key, value in _items(document):
        where = f"checkpoint {alias!r}: {name} has {key!r}"
        if not value:
            continue
        if key in _RUNS_CODE or (key in _ATTENTION and "/" in str(value)):
            raise CheckpointError(f"{where}: code that a checkpoint names is never run; use a checkpoint without it")
        if key in _OTHER_FILES and (isinstance(value, str) or value is True):
            raise CheckpointError(f"{where}: a checkpoint may not name files outside itself; remove the key")
        if key in _OTHER_LIBRARIES:
            raise CheckpointError(f"{where}: weights quantized by another library are not loaded; use plain ones")
        if key in _PROCESSORS and value not in IMAGE_PROCESSORS:
            raise CheckpointError(
                f"{where}: class {value!r} is not loaded; allowed: {', '.join(sorted(IMAGE_PROCESSORS))}"
            )


def check_shards(alias: str, name: str, index: Any, manifest: Mapping[str, str] | frozenset[str]) -> None:
    """Raise CheckpointError if a weight index names a file that is not an approved one in its own folder."""
    shards = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(shards, dict) or not shards:
        raise CheckpointError(f"checkpoint {alias!r}: {name} has no weight_map; fetch the file again")
    folder = name.rpartition("/")[0]
    for shard in sorted({str(each) for each in shards.values()}):
        path = f"{folder}/{shard}" if folder else shard
        if "/" in shard or "\\" in shard or path not in manifest:
            raise CheckpointError(
                f"checkpoint {alias!r}: {name} names {shard}, which is not in the same folder; download {path}"
            )


def _items(document: Any) -> Iterator[tuple[str, Any]]:
    """Yield every key of a JSON document with its value, at any depth."""
    left = [document]
    while left:
        each = left.pop()
        if isinstance(each, dict):
            yield from each.items()
            left.extend(each.values())
        elif isinstance(each, list):
            left.extend(each)
