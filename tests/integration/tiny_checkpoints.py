"""Random checkpoints of every family in diffusers' layout: a few megabytes, reproducible, built offline."""

from __future__ import annotations

import atexit
import math
import shutil
import tempfile
import warnings
from collections.abc import Callable
from functools import cache
from inspect import signature as inspect_signature
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers
from diffusers.pipelines.stable_diffusion.safety_checker import StableDiffusionSafetyChecker
from safetensors.torch import save_file

from sdpipeline.domain import CheckpointRef
from sdpipeline.engine.checkpoints import CheckpointFiles, inspect

SHIPPED = Path(__file__).parents[2] / "sdpipeline" / "demo" / "checkpoints"


class TinyCheckpoints:
    """Builds checkpoints on first use, and resolves them for the engine."""

    def __init__(self, root: Path) -> None:
        self._root = root
        self._files: dict[str, CheckpointFiles] = {}

    def files(self, name: str) -> CheckpointFiles:
        if name not in self._files:
            self._files[name] = inspect(name, self.directory(name))
        return self._files[name]

    def directory(self, name: str) -> Path:
        if (SHIPPED / name).is_dir():
            return SHIPPED / name
        directory = self._root / name
        if not directory.exists():
            transformers.utils.logging.disable_progress_bar()
            with torch.random.fork_rng():
                torch.manual_seed(sum(map(ord, name)))
                BUILDERS[name](self, directory)
        return directory

    def ref(self, name: str) -> CheckpointRef:
        return CheckpointRef(alias=name, digest=self.files(name).digest)

    def add(self, files: CheckpointFiles) -> CheckpointRef:
        self._files[files.alias] = files
        return CheckpointRef(alias=files.alias, digest=files.digest)

    def locate(self, ref: CheckpointRef) -> CheckpointFiles:
        return self.files(ref.alias)


@cache
def tiny_checkpoints() -> TinyCheckpoints:
    """One set for the whole test run, removed at its end."""
    root = Path(tempfile.mkdtemp(prefix="tiny-checkpoints-"))
    atexit.register(shutil.rmtree, root, ignore_errors=True)
    return TinyCheckpoints(root)


def _save(pipeline: Any, directory: Path) -> None:
    pipeline.save_pretrained(directory)


def _alphabet() -> list[str]:
    """CLIP's printable replacements for the 256 bytes."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    return [chr(byte) for byte in printable] + [chr(256 + n) for n in range(len(others))]


def _clip_tokenizer(pad: str = "<|endoftext|>") -> Any:
    letters = _alphabet()
    merges: Any = [("c", "a"), ("ca", "t</w>"), ("d", "o"), ("do", "g</w>")]
    words = [*letters, *(letter + "</w>" for letter in letters), *(a + b for a, b in merges)]
    words += ["<|startoftext|>", "<|endoftext|>"]
    vocabulary = {word: n for n, word in enumerate(words)}
    return transformers.CLIPTokenizer(vocab=vocabulary, merges=merges, model_max_length=77, pad_token=pad)


def _t5_tokenizer() -> Any:
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("\u2581", -2.0)]
    pieces += [(chr(code), -3.0) for code in range(33, 127)]
    return transformers.T5Tokenizer(vocab=pieces, extra_ids=0, model_max_length=512)


def _clip(tokenizer: Any, *, width: int = 32, projected: bool = False, activation: str = "quick_gelu") -> Any:
    config = transformers.CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=64,
        num_hidden_layers=3,
        num_attention_heads=4,
        max_position_embeddings=77,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        projection_dim=32,
        hidden_act=activation,
    )
    return (transformers.CLIPTextModelWithProjection if projected else transformers.CLIPTextModel)(config)


def _t5(tokenizer: Any, width: int) -> Any:
    return transformers.T5EncoderModel(
        transformers.T5Config(
            vocab_size=len(tokenizer),
            d_model=width,
            d_ff=64,
            d_kv=8,
            num_layers=2,
            num_heads=4,
            relative_attention_num_buckets=8,
            feed_forward_proj="gated-gelu",
        )
    )


def _vae(*, channels: int = 4, scaling: float = 0.18215, blocks: int = 4, shift: float | None = None) -> Any:
    widths = (8, 8, 16, 16)[:blocks]
    return diffusers.AutoencoderKL(
        down_block_types=["DownEncoderBlock2D"] * blocks,
        up_block_types=["UpDecoderBlock2D"] * blocks,
        block_out_channels=widths,
        layers_per_block=1,
        latent_channels=channels,
        norm_num_groups=4,
        sample_size=64,
        scaling_factor=scaling,
        shift_factor=shift,
        use_quant_conv=channels == 4,
        use_post_quant_conv=channels == 4,
    )


def _unet(*, in_channels: int = 4, cross: int = 32, **more: Any) -> Any:
    unet: Any = diffusers.UNet2DConditionModel(
        **{
            "sample_size": 8,
            "in_channels": in_channels,
            "out_channels": 4,
            "block_out_channels": (32, 64),
            "layers_per_block": 1,
            "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
            "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
            "cross_attention_dim": cross,
            "attention_head_dim": 4,
            "norm_num_groups": 8,
        }
        | more
    )
    with torch.no_grad():  # otherwise a random network barely reacts to its prompt
        for name, parameter in unet.named_parameters():
            if "attn2.to_v" in name or "attn2.to_out" in name:
                parameter.mul_(20.0)
    return unet


def _sdxl_unet(in_channels: int = 4) -> Any:
    return _unet(
        in_channels=in_channels,
        cross=64,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=(2, 4),
        use_linear_projection=True,
        transformer_layers_per_block=(1, 2),
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=80,  # six sizes of 8 and a pooled prompt of 32
    )


def _ddim(**more: Any) -> Any:
    config = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
    return diffusers.DDIMScheduler(**config, clip_sample=False, set_alpha_to_one=False, steps_offset=1, **more)


def _sd(directory: Path, *, in_channels: int = 4, width: int = 32, prediction_type: str = "epsilon") -> None:
    tokenizer = _clip_tokenizer()
    pipeline = diffusers.StableDiffusionPipeline(
        vae=_vae(),
        text_encoder=_clip(tokenizer, width=width),
        tokenizer=tokenizer,
        unet=_unet(in_channels=in_channels, cross=width),
        scheduler=_ddim(prediction_type=prediction_type),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    _save(pipeline, directory)


def _sdxl(directory: Path, *, in_channels: int = 4) -> None:
    tokenizer, tokenizer_2 = _clip_tokenizer(), _clip_tokenizer(pad="!")
    pipeline = diffusers.StableDiffusionXLPipeline(
        vae=_vae(scaling=0.13025),
        text_encoder=_clip(tokenizer),
        text_encoder_2=_clip(tokenizer_2, projected=True, activation="gelu"),
        tokenizer=tokenizer,
        tokenizer_2=tokenizer_2,
        unet=_sdxl_unet(in_channels),
        scheduler=_ddim(timestep_spacing="leading"),
    )
    _save(pipeline, directory)


def _sd3(directory: Path) -> None:
    tokenizer, tokenizer_2, tokenizer_3 = _clip_tokenizer(), _clip_tokenizer(pad="!"), _t5_tokenizer()
    transformer = diffusers.SD3Transformer2DModel(
        sample_size=32,
        patch_size=2,
        in_channels=16,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=4,
        joint_attention_dim=64,
        caption_projection_dim=32,
        pooled_projection_dim=64,
        out_channels=16,
        pos_embed_max_size=96,
    )
    pipeline = diffusers.StableDiffusion3Pipeline(
        transformer=transformer,
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=_vae(channels=16, scaling=1.5305, shift=0.0609),
        text_encoder=_clip(tokenizer, projected=True),
        tokenizer=tokenizer,
        text_encoder_2=_clip(tokenizer_2, projected=True, activation="gelu"),
        tokenizer_2=tokenizer_2,
        text_encoder_3=_t5(tokenizer_3, 64),
        tokenizer_3=tokenizer_3,
    )
    _save(pipeline, directory)


def _flux(directory: Path) -> None:
    tokenizer, tokenizer_2 = _clip_tokenizer(), _t5_tokenizer()
    transformer = diffusers.FluxTransformer2DModel(
        patch_size=1,
        in_channels=64,
        num_layers=1,
        num_single_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=32,
        pooled_projection_dim=32,
        guidance_embeds=True,
        axes_dims_rope=(4, 4, 8),
    )
    pipeline = diffusers.FluxPipeline(
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(
            shift=3.0, use_dynamic_shifting=True, base_shift=0.5, max_shift=1.15
        ),
        vae=_vae(channels=16, scaling=0.3611, shift=0.1159),
        text_encoder=_clip(tokenizer),
        tokenizer=tokenizer,
        text_encoder_2=_t5(tokenizer_2, 32),
        tokenizer_2=tokenizer_2,
        transformer=transformer,
    )
    _save(pipeline, directory)


def _upscale(directory: Path) -> None:
    tokenizer = _clip_tokenizer()
    unet = _unet(
        in_channels=7,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=8,
        num_class_embeds=1000,
        use_linear_projection=True,
        only_cross_attention=(True, False),
    )
    pipeline = diffusers.StableDiffusionUpscalePipeline(
        vae=_vae(scaling=0.08333, blocks=3),
        text_encoder=_clip(tokenizer),
        tokenizer=tokenizer,
        unet=unet,
        low_res_scheduler=diffusers.DDPMScheduler(beta_schedule="scaled_linear", beta_start=0.0001, beta_end=0.02),
        scheduler=diffusers.DDIMScheduler(prediction_type="v_prediction", clip_sample=False),
        max_noise_level=350,
    )
    _save(pipeline, directory)


def _latent_upscale(directory: Path) -> None:
    tokenizer = _clip_tokenizer()
    down = ("KDownBlock2D", "KCrossAttnDownBlock2D", "KCrossAttnDownBlock2D", "KCrossAttnDownBlock2D")
    unet = diffusers.UNet2DConditionModel(
        act_fn="gelu",
        attention_head_dim=8,
        norm_num_groups=None,
        block_out_channels=[32, 32, 64, 64],
        time_cond_proj_dim=160,
        conv_in_kernel=1,
        conv_out_kernel=1,
        cross_attention_dim=32,
        down_block_types=down,
        in_channels=8,
        mid_block_type=None,
        only_cross_attention=False,
        out_channels=5,
        resnet_time_scale_shift="scale_shift",
        time_embedding_type="fourier",
        timestep_post_act="gelu",
        up_block_types=("KCrossAttnUpBlock2D", "KCrossAttnUpBlock2D", "KCrossAttnUpBlock2D", "KUpBlock2D"),
    )
    pipeline = diffusers.StableDiffusionLatentUpscalePipeline(
        vae=_vae(),
        text_encoder=_clip(tokenizer),
        tokenizer=tokenizer,
        unet=unet,
        scheduler=diffusers.EulerDiscreteScheduler(prediction_type="sample"),
    )
    _save(pipeline, directory)


def _effective(controlnet: Any) -> Any:
    """Give a new ControlNet an effect: its convolutions are zero, and its map is attenuated to 1e-4."""
    for parameter in controlnet.parameters():
        if parameter.abs().sum() == 0:
            fan_in = max(1, parameter[0].numel())
            torch.nn.init.normal_(parameter, std=0.05 if parameter.ndim < 2 else 2 / math.sqrt(fan_in))
    if hasattr(controlnet, "controlnet_cond_embedding"):
        with torch.no_grad():
            for parameter in controlnet.controlnet_cond_embedding.parameters():
                if parameter.ndim > 1:
                    parameter.mul_(4.0)
    return controlnet


def _controlnet(tiny: TinyCheckpoints, directory: Path, base: str) -> None:
    unet = diffusers.UNet2DConditionModel.from_pretrained(tiny.directory(base) / "unet")
    _effective(diffusers.ControlNetModel.from_unet(unet)).save_pretrained(directory)


def _sd3_controlnet(tiny: TinyCheckpoints, directory: Path, *, inpainting: bool) -> None:
    transformer = diffusers.SD3Transformer2DModel.from_pretrained(tiny.directory("sd3") / "transformer")
    # The last block has no context attention and cannot be copied; one extra channel holds the mask.
    controlnet = diffusers.SD3ControlNetModel.from_transformer(
        transformer, num_layers=1, num_extra_conditioning_channels=int(inpainting)
    )
    _effective(controlnet).save_pretrained(directory)


def _flux_controlnet(tiny: TinyCheckpoints, directory: Path) -> None:
    transformer = diffusers.FluxTransformer2DModel.from_pretrained(tiny.directory("flux") / "transformer")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # a warning of diffusers about its own import
        controlnet = diffusers.FluxControlNetModel.from_transformer(
            transformer, num_layers=1, num_single_layers=1, attention_head_dim=16, num_attention_heads=2
        )
    _effective(controlnet).save_pretrained(directory)


def _sdxl_union(tiny: TinyCheckpoints, directory: Path) -> None:
    """A union ControlNet of eight modes, whose configuration names an ordinary ControlNet, as published ones do."""
    unet: Any = diffusers.UNet2DConditionModel.from_pretrained(tiny.directory("sdxl") / "unet")
    named = set(inspect_signature(diffusers.ControlNetUnionModel.__init__).parameters)
    config = {name: value for name, value in unet.config.items() if name in named and not name.startswith("_")}
    width = unet.config.block_out_channels[0]
    union: Any = diffusers.ControlNetUnionModel(
        **config | {"conditioning_embedding_out_channels": (8, 8, 16, 16), "num_control_type": 8},
        num_trans_channel=width,
        num_trans_head=2,
        num_proj_channel=width,
    )
    with torch.no_grad():
        union.task_embedding.normal_(std=8.0)
    _effective(union).save_pretrained(directory)
    path = directory / "config.json"
    path.write_text(path.read_text().replace("ControlNetUnionModel", "ControlNetModel"))


def _flux_union(tiny: TinyCheckpoints, directory: Path) -> None:
    """A union ControlNet of ten modes."""
    transformer: Any = diffusers.FluxTransformer2DModel.from_pretrained(tiny.directory("flux") / "transformer")
    config = {name: value for name, value in transformer.config.items() if not name.startswith("_")}
    named = set(inspect_signature(diffusers.FluxControlNetModel.__init__).parameters)
    config = {name: value for name, value in config.items() if name in named}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # a warning of diffusers about its own import
        union = diffusers.FluxControlNetModel(**config | {"num_layers": 1, "num_single_layers": 1, "num_mode": 10})
    with torch.no_grad():
        union.controlnet_mode_embedder.weight.mul_(8.0)
    _effective(union).save_pretrained(directory)


def _lora(tiny: TinyCheckpoints, directory: Path, base: str) -> None:
    """A LoRA of rank 4 on attention, in the denoiser and, if there is one, in the first text encoder."""
    pipeline: Any = diffusers.DiffusionPipeline.from_pretrained(tiny.directory(base))
    denoiser = "transformer" if hasattr(pipeline, "transformer") else "unet"
    layers = {denoiser: _lora_state(getattr(pipeline, denoiser), ["to_k", "to_v"])}
    layers["text_encoder"] = _lora_state(pipeline.text_encoder, ["q_proj", "v_proj"])
    tensors = {f"{part}.{name}": tensor for part, state in layers.items() for name, tensor in state.items()}
    directory.mkdir(parents=True)
    save_file(tensors, directory / "pytorch_lora_weights.safetensors")


def _lora_state(network: torch.nn.Module, names: list[str]) -> dict[str, torch.Tensor]:
    state = {}
    for name, module in network.named_modules():
        if isinstance(module, torch.nn.Linear) and any(name.endswith(end) for end in names):
            state[f"{name}.lora_A.weight"] = torch.randn(4, module.in_features) * 0.3
            state[f"{name}.lora_B.weight"] = torch.randn(module.out_features, 4) * 0.3
    return state


def _inversion(directory: Path, tensors: dict[str, torch.Tensor]) -> None:
    directory.mkdir(parents=True)
    save_file(tensors, directory / "learned_embeds.safetensors")


def _ip_adapter(tiny: TinyCheckpoints, directory: Path, base: str) -> None:
    """A plain IP-Adapter: one picture embedding projected to four tokens, with keys and values for each attention."""
    unet: Any = diffusers.UNet2DConditionModel.from_pretrained(tiny.directory(base) / "unet")
    cross = unet.config.cross_attention_dim
    tensors = {
        "image_proj.proj.weight": torch.randn(4 * cross, 32),
        "image_proj.proj.bias": torch.zeros(4 * cross),
        "image_proj.norm.weight": torch.ones(cross),
        "image_proj.norm.bias": torch.zeros(cross),
    }
    cross_attentions = [name for name in unet.attn_processors if name.endswith("attn2.processor")]
    for n, name in enumerate(cross_attentions):
        attention = unet.get_submodule(name.removesuffix(".processor"))
        for part in ("to_k_ip", "to_v_ip"):
            tensors[f"ip_adapter.{2 * n + 1}.{part}.weight"] = torch.randn(attention.inner_dim, cross)
    directory.mkdir(parents=True)
    save_file(tensors, directory / "ip-adapter.safetensors")
    config = transformers.CLIPVisionConfig(
        hidden_size=32,
        intermediate_size=64,
        projection_dim=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        image_size=32,
        patch_size=8,
    )
    encoder: Any = transformers.CLIPVisionModelWithProjection(config)
    encoder.save_pretrained(directory / "image_encoder")


def _depth(directory: Path) -> None:
    backbone = transformers.Dinov2Config(
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=56,
        patch_size=14,
        out_features=["stage1", "stage2"],
        apply_layernorm=True,
        reshape_hidden_states=False,
    )
    config = transformers.DepthAnythingConfig(
        backbone_config=backbone,
        reassemble_hidden_size=32,
        patch_size=14,
        reassemble_factors=[1, 0.5],
        neck_hidden_sizes=[8, 8],
        fusion_hidden_size=8,
        head_hidden_size=8,
    )
    network: Any = transformers.DepthAnythingForDepthEstimation(config)
    network.save_pretrained(directory)
    transformers.DPTImageProcessor(size={"height": 56, "width": 56}).save_pretrained(directory)


def _segmentation(directory: Path) -> None:
    config = transformers.SegformerConfig(
        num_encoder_blocks=2,
        depths=[1, 1],
        sr_ratios=[2, 1],
        hidden_sizes=[8, 16],
        patch_sizes=[7, 3],
        strides=[4, 2],
        num_attention_heads=[1, 2],
        mlp_ratios=[2, 2],
        decoder_hidden_size=16,
        num_labels=5,
    )
    network: Any = transformers.SegformerForSemanticSegmentation(config)
    network.save_pretrained(directory)
    transformers.SegformerImageProcessor(size={"height": 64, "width": 64}).save_pretrained(directory)


def _pose(directory: Path) -> None:
    backbone = transformers.VitPoseBackboneConfig(
        image_size=[64, 48], patch_size=[16, 16], hidden_size=32, num_hidden_layers=2, num_attention_heads=2
    )
    config = transformers.VitPoseConfig(
        backbone_config=backbone, num_labels=17, id2label={n: str(n) for n in range(17)}, scale_factor=4
    )
    network: Any = transformers.VitPoseForPoseEstimation(config)
    network.save_pretrained(directory)
    transformers.VitPoseImageProcessor(size={"height": 64, "width": 48}).save_pretrained(directory)


def _safety_checker(directory: Path, *, threshold: float) -> None:
    """Cosines are between -1 and 1: a threshold outside that range passes everything, or nothing."""
    vision = {"hidden_size": 32, "intermediate_size": 37, "num_hidden_layers": 2, "num_attention_heads": 2}
    vision |= {"image_size": 32, "patch_size": 8}
    network: Any = StableDiffusionSafetyChecker(transformers.CLIPConfig(vision_config=vision, projection_dim=16))
    for name in ("concept_embeds", "special_care_embeds"):
        torch.nn.init.normal_(getattr(network, name))
        torch.nn.init.constant_(getattr(network, f"{name}_weights"), threshold)
    network.save_pretrained(directory)
    size = {"size": {"shortest_edge": 32}, "crop_size": {"height": 32, "width": 32}}
    transformers.CLIPImageProcessor(**size).save_pretrained(directory)


BUILDERS: dict[str, Callable[[TinyCheckpoints, Path], None]] = {
    "safety-allows": lambda _, directory: _safety_checker(directory, threshold=2.0),
    "safety-forbids": lambda _, directory: _safety_checker(directory, threshold=-2.0),
    "sd1": lambda _, to: _sd(to),
    "sd2": lambda _, to: _sd(to, width=1024, prediction_type="v_prediction"),
    "sd-inpaint": lambda _, to: _sd(to, in_channels=9),
    "sdxl": lambda _, to: _sdxl(to),
    "sdxl-inpaint": lambda _, to: _sdxl(to, in_channels=9),
    "sd3": lambda _, to: _sd3(to),
    "flux": lambda _, to: _flux(to),
    "upscale": lambda _, to: _upscale(to),
    "latent-upscale": lambda _, to: _latent_upscale(to),
    "controlnet-sd1": lambda tiny, to: _controlnet(tiny, to, "sd1"),
    "controlnet-sd1-other": lambda tiny, to: _controlnet(tiny, to, "sd1"),
    "controlnet-sd2": lambda tiny, to: _controlnet(tiny, to, "sd2"),
    "controlnet-sdxl": lambda tiny, to: _controlnet(tiny, to, "sdxl"),
    "controlnet-sd3": lambda tiny, to: _sd3_controlnet(tiny, to, inpainting=False),
    "controlnet-sd3-inpaint": lambda tiny, to: _sd3_controlnet(tiny, to, inpainting=True),
    "controlnet-flux": _flux_controlnet,
    "union-sdxl": _sdxl_union,
    "union-flux": _flux_union,
    "vae": lambda _, to: _vae().save_pretrained(to),
    "vae-sdxl": lambda _, to: _vae(scaling=0.13025).save_pretrained(to),
    "lora-sd1": lambda tiny, to: _lora(tiny, to, "sd1"),
    "lora-sd1-other": lambda tiny, to: _lora(tiny, to, "sd1"),
    "lora-sdxl": lambda tiny, to: _lora(tiny, to, "sdxl"),
    "lora-sd3": lambda tiny, to: _lora(tiny, to, "sd3"),
    "lora-flux": lambda tiny, to: _lora(tiny, to, "flux"),
    "toy": lambda _, to: _inversion(to, {"<cat-toy>": torch.randn(3, 32)}),
    "toy-sdxl": lambda _, to: _inversion(to, {"clip_l": torch.randn(2, 32), "clip_g": torch.randn(2, 32)}),
    "depth": lambda _, to: _depth(to),
    "segmentation": lambda _, to: _segmentation(to),
    "pose": lambda _, to: _pose(to),
    "ip-adapter-sd1": lambda tiny, to: _ip_adapter(tiny, to, "sd1"),
    "ip-adapter-sd1-other": lambda tiny, to: _ip_adapter(tiny, to, "sd1"),
    "ip-adapter-sdxl": lambda tiny, to: _ip_adapter(tiny, to, "sdxl"),
}
"""Builders by checkpoint name. ControlNets copy a part of their base first."""
