"""Tensor names and shapes of published weight files: real layers and widths, with rank 4 and few layers."""

from __future__ import annotations

RANK = 4

Tensors = dict[str, list[int]]


def kohya(layer: str, width_in: int, width_out: int, *, prefix: str = "lora_unet_") -> Tensors:
    """One layer as kohya sd-scripts writes it, with a scalar alpha."""
    name = f"{prefix}{layer}"
    return {
        f"{name}.lora_down.weight": [RANK, width_in],
        f"{name}.lora_up.weight": [width_out, RANK],
        f"{name}.alpha": [],
    }


def peft(layer: str, width_in: int, width_out: int) -> Tensors:
    """One layer as peft and diffusers write it."""
    return {f"{layer}.lora_A.weight": [RANK, width_in], f"{layer}.lora_B.weight": [width_out, RANK]}


def loha(layer: str, width_in: int, width_out: int) -> Tensors:
    """One layer of LyCORIS's Hadamard product."""
    sides = {"a": [width_out, RANK], "b": [RANK, width_in]}
    return {f"{layer}.alpha": []} | {f"{layer}.hada_w{n}_{side}": sides[side] for n in (1, 2) for side in "ab"}


def lokr(layer: str, width_in: int, width_out: int) -> Tensors:
    """One layer of LyCORIS's Kronecker product: a whole first matrix, and a second one in two factors."""
    return {
        f"{layer}.lokr_w1": [8, 8],
        f"{layer}.lokr_w2_a": [width_out // 8, RANK],
        f"{layer}.lokr_w2_b": [RANK, width_in // 8],
        f"{layer}.alpha": [],
    }


def network(*layers: str, width_in: int, width_out: int | None = None) -> Tensors:
    """Weights of whole layers."""
    return {f"{layer}.weight": [width_out or width_in, width_in] for layer in layers}


def ldm_unet(context: int, *, channels: int = 4, prefix: str = "model.diffusion_model.") -> Tensors:
    """A U-Net in latent-diffusion's names."""
    block = "input_blocks.4.1.transformer_blocks.0"
    names = {"input_blocks.0.0.weight": [320, channels, 3, 3], f"{block}.attn2.to_k.weight": [640, context]}
    names |= {f"{block}.attn1.to_k.weight": [640, 640], "out.2.weight": [4, 320, 3, 3]}
    return {f"{prefix}{name}": shape for name, shape in names.items()}


def flux(*, channels: int = 64, prefix: str = "") -> Tensors:
    """A Flux.1 transformer in its publisher's names."""
    return {
        f"{prefix}img_in.weight": [3072, channels],
        f"{prefix}double_blocks.0.img_attn.norm.key_norm.scale": [128],
        f"{prefix}double_blocks.0.img_attn.qkv.weight": [9216, 3072],
        f"{prefix}single_blocks.0.linear1.weight": [21504, 3072],
        f"{prefix}single_blocks.37.linear1.bias": [21504],
    }


def ldm_vae(latents: int = 4, prefix: str = "") -> Tensors:
    """An autoencoder in latent-diffusion's names."""
    return {
        f"{prefix}encoder.conv_in.weight": [128, 3, 3, 3],
        f"{prefix}decoder.conv_in.weight": [512, latents, 3, 3],
        f"{prefix}decoder.mid.attn_1.q.weight": [512, 512, 1, 1],
    }


def esrgan(scale: int = 4, channels: int = 3) -> Tensors:
    """A Real-ESRGAN in its publisher's names, with one block."""
    ups = {2: 1, 4: 2, 8: 3}[scale]
    convs = ("conv_first", "body.0.rdb1.conv1", "conv_body", *(f"conv_up{n + 1}" for n in range(ups)), "conv_hr")
    names = {f"{conv}.weight": [8, 8, 3, 3] for conv in convs}
    return names | {"conv_first.weight": [8, channels, 3, 3], "conv_last.weight": [3, 8, 3, 3]}
