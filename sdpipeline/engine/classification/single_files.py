"""Classification of checkpoints, autoencoders and ControlNets in one file, by the names that their publishers use."""

from __future__ import annotations

import re
from collections.abc import Mapping

from sdpipeline.engine.classification import networks
from sdpipeline.engine.classification.classification import Classification, unsupported
from sdpipeline.engine.classification.loras import Layer, Shape, lora_format, path_of

_DENOISER = "model.diffusion_model."
_ALONE = "put it into the folder of a whole checkpoint, or use the checkpoint's single file"
_TEXT_KEYS = re.compile(r"^(?:text_model\.)?encoder\.layers\.\d+\.(?:self_attn|mlp)|^transformer\.resblocks\.")

_NAMED: Mapping[str, str] = {
    r"^lora_controlnet$|^input_blocks\.\d+\.\d+\..*\.(?:up|down)$": "a Control-LoRA",
    r"^lllite_": "a ControlNet-LLLite",
    r"^(?:adapter\.)?(?:body\.\d+\.(?:block1|in_conv)|body\.\d+\.resnets)\.": "a T2I-Adapter",
    r"^(?:model\.)?(?:language_model\.)?layers\.\d+\.self_attn\.q_proj": "a language model",
    r"^(?:vision_model\.|visual\.|image_encoder\.vision_model\.)": "a CLIP vision encoder",
    r"^(?:encoder\.block\.\d+\.layer\.\d+\.SelfAttention|t5xxl\.)": "a T5 text encoder",
    r"^(?:redux_up|redux_down)\.": "Flux Redux (it reads a picture in place of a prompt)",
    r"^concept_embeds$": "a safety checker without its config.json",
    r"motion_modules\.\d": "an AnimateDiff motion module",
    r"^(?:control_all_x_embedder|control_layers|control_noise_refiner)\.": "a ControlNet for Z-Image",
    r"^(?:id_encoder|pulid_)": "a face identity adapter",
    r"^(?:clip_txt_mapper|clip_img_mapper|effnet_mapper)\.": "a Stable Cascade stage",
    r"^edm_mean$": "Playground v2.5",
    r"^(?:taesd|encoder\.layers\.0\.weight$|decoder\.layers\.0\.)": "a tiny autoencoder (TAESD)",
    r"^decoder\.middle\.0\.residual\.|^decoder\.up_blocks\.\d+\.resnets\.\d+\.conv1\.conv": "a video autoencoder",
}
"""Patterns of tensor names, and what the file is, for files that nothing here loads."""


_ADAPTERS = re.compile(r"^(?:lora_controlnet$|lllite_)|\.(?:up|down)$")
"""Names of adapters whose other tensors are named as those of a whole ControlNet."""


def is_adapter(tensors: Mapping[str, Shape]) -> bool:
    """Return True for a LoRA or Control-LoRA, also if its layers have the names of the network that it changes."""
    return lora_format(tensors) is not None or any(_ADAPTERS.search(name) for name in tensors)


def classify_checkpoint(alias: str, tensors: Mapping[str, Shape], metadata: Mapping[str, str]) -> Classification | None:
    """Return what one file of a whole network holds; None if unknown, CheckpointError if it does not run here."""
    for pattern, what in _NAMED.items():
        if any(re.search(pattern, name) for name in tensors):
            raise unsupported(alias, what)
    return (
        _controlnet(alias, tensors)
        or _denoiser(alias, tensors, metadata)
        or _autoencoder(alias, tensors)
        or _text_encoder(alias, tensors)
    )


def _denoiser(alias: str, tensors: Mapping[str, Shape], metadata: Mapping[str, str]) -> Classification | None:
    whole = any(name.startswith(_DENOISER) for name in tensors)
    own = {
        name.removeprefix(_DENOISER): shape
        for name, shape in tensors.items()
        if not whole or name.startswith(_DENOISER)
    }
    if any(name.startswith("input_blocks.") for name in own):
        return _ldm_unet(alias, own, whole=whole)
    if "conv_in.weight" in own and any(name.startswith("down_blocks.") for name in own):
        raise unsupported(
            alias,
            "a U-Net alone, in diffusers' names",
            f"{_ALONE} (as unet/diffusion_pytorch_model.safetensors){_parts(alias)}",
        )
    network = networks.transformer(layers_of(own), native=True)
    if network is None or network.family == "any":
        return None
    if network.family is None:
        raise unsupported(alias, f"a checkpoint of {network.title}")
    if network.family == "flux":
        _refuse_flux_variants(alias, own, metadata)
    if any(re.match(r"(?:single_)?transformer_blocks\.", name) for name in own):
        fix = f"{_ALONE} (as transformer/diffusion_pytorch_model.safetensors){_parts(alias)}"
        raise unsupported(alias, f"a {network.family} transformer alone, in diffusers' names", fix)
    return Classification(kind="checkpoint", family=network.family, native_size=1024, layout="native")


def _parts(alias: str) -> str:
    return f", or type `sdpipeline checkpoints add {alias} FILE --parts DIR_OR_ALIAS`"


def _ldm_unet(alias: str, own: Mapping[str, Shape], *, whole: bool) -> Classification:
    """Classify a U-Net in latent-diffusion's names by its input channels and the width of its cross-attention."""
    network = networks.unet(layers_of(own))
    if any(name.startswith("encoder_hid_proj.") for name in own):
        raise unsupported(alias, "a checkpoint of Kolors", "use an SDXL checkpoint")
    if network is None or network.family is None:
        title = network.title if network else "an unknown U-Net"
        fix = "use the SDXL base checkpoint" if "refiner" in title else "use another checkpoint"
        raise unsupported(alias, title, fix)
    if not whole:
        raise unsupported(alias, f"a U-Net of {network.family} alone", _ALONE + _parts(alias))
    shape = own.get("input_blocks.0.0.weight", [0, 4])
    channels = shape[1] if len(shape) > 1 else 0
    if channels == 7:
        return Classification(kind="checkpoint", family="upscale", scale=4, layout="ldm")
    named = {5: "a depth-to-image checkpoint", 8: "an instruct-pix2pix checkpoint"}
    if channels not in (4, 9):
        raise unsupported(alias, named.get(channels, f"a checkpoint whose U-Net has {channels} input channels"))
    inpainting = "sdxl-inpaint" if network.family == "sdxl" else "sd-inpaint"
    family = network.family if channels == 4 else inpainting
    return Classification(kind="checkpoint", family=family, native_size=_ldm_sizes(family), layout="ldm")


def _ldm_sizes(family: str) -> int | None:
    """Return the size of the published base; None for SD 2.x, which has bases of 512 and of 768."""
    return {"sd1": 512, "sd-inpaint": 512, "sdxl": 1024, "sdxl-inpaint": 1024}.get(family)


def _refuse_flux_variants(alias: str, own: Mapping[str, Shape], metadata: Mapping[str, str]) -> None:
    """Raise CheckpointError for a Flux.1 that reads more than noise: its pictures would be silently wrong."""
    shape = own.get("img_in.weight") or own.get("x_embedder.weight") or [0, 64]
    channels = shape[1] if len(shape) > 1 else 0
    named = {384: "Flux Fill", 128: "Flux Control (Canny or Depth)", 196: "Flux Fill"}
    if channels != 64:
        raise unsupported(alias, named.get(channels, f"a Flux with {channels} input channels"), _FLUX)
    titles = " ".join(value for key, value in metadata.items() if key.startswith("modelspec.")).lower()
    if "kontext" in titles:
        raise unsupported(alias, "Flux Kontext (it edits a picture by an instruction)", _FLUX)


_FLUX = "use Flux.1 dev or schnell"


def _controlnet(alias: str, tensors: Mapping[str, Shape]) -> Classification | None:
    ldm = any(name.startswith(("control_model.", "input_hint_block.")) for name in tensors)
    diffusers = any(name.startswith(("controlnet_cond_embedding.", "controlnet_down_blocks.")) for name in tensors)
    joint = any(name.startswith(("controlnet_blocks.", "controlnet_x_embedder.")) for name in tensors)
    own = {name.removeprefix("control_model."): shape for name, shape in tensors.items()}
    if joint and ldm:
        raise unsupported(alias, "a ControlNet for Flux in X-Labs' names", "use a Flux ControlNet in diffusers' layout")
    if joint:
        return _joint_controlnet(alias, own, native=ldm)
    if not ldm and not diffusers:
        return None
    if any(name.startswith(("task_embedding", "control_add_embedding.", "transformer_layes.")) for name in own):
        raise unsupported(alias, "a ControlNet-Union without its config.json", "add its folder with config.json")
    network = networks.unet(layers_of(own))
    family = network.family if network else "any"
    if any(name.startswith(("label_emb.", "add_embedding.")) for name in own):
        family = "sdxl"
    if network is not None and family is None:
        raise unsupported(alias, f"a ControlNet for {network.title}")
    return Classification(kind="controlnet", family=family or "any", layout="ldm" if ldm else "diffusers")


def _joint_controlnet(alias: str, own: Mapping[str, Shape], *, native: bool) -> Classification:
    network = networks.transformer(layers_of(own), native=False)
    if network is None or network.family not in ("flux", "sd3", "any"):
        raise unsupported(alias, f"a ControlNet for {network.title if network else 'an unknown transformer'}")
    flux = any(
        name.startswith(("double_blocks.", "controlnet_x_embedder.", "single_transformer_blocks.")) for name in own
    )
    layout = "native" if native or any(name.startswith("double_blocks.") for name in own) else "diffusers"
    family = "flux" if flux else "sd3" if network.family == "any" else network.family
    return Classification(kind="controlnet", family=family, layout=layout)


def _autoencoder(alias: str, tensors: Mapping[str, Shape]) -> Classification | None:
    """Classify an autoencoder; those of SD 1.x and SDXL, and of SD3 and Flux, have equal shapes, so ``any``."""
    own = {re.sub(r"^(?:first_stage_model|vae)\.", "", name): shape for name, shape in tensors.items()}
    if not any(re.match(r"(?:encoder|decoder)\.(?:conv_in|mid|mid_block|up|down)\b", name) for name in own):
        return None
    shape = own.get("decoder.conv_in.weight", [])
    channels = shape[1] if len(shape) == 4 else 4
    if len(shape) == 5 or channels not in (4, 16):
        raise unsupported(alias, f"an autoencoder with {channels} latent channels or of videos")
    ldm = any(re.match(r"(?:encoder|decoder)\.(?:mid\.|up\.|down\.)", name) for name in own)
    return Classification(kind="vae", family="any", layout="ldm" if ldm else "diffusers")


def _text_encoder(alias: str, tensors: Mapping[str, Shape]) -> Classification | None:
    if any(_TEXT_KEYS.match(name) for name in tensors):
        raise unsupported(alias, "a CLIP text encoder alone", _ALONE)
    return None


def layers_of(tensors: Mapping[str, Shape]) -> list[Layer]:
    """Return the layers of a whole network, with the widths of their weights."""
    found = []
    for name, shape in tensors.items():
        layer, _, end = name.rpartition(".")
        wide = end == "weight" and len(shape) >= 2
        part, path = path_of(layer or name)
        found.append(
            Layer(name=path, part=part, width_in=shape[1] if wide else None, width_out=shape[0] if wide else None)
        )
    return found
