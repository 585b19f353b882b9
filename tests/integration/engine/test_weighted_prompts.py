"""Weighted prompts equal a reference computed here, for each family of CLIP, alone and in a batch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from sdpipeline.domain import AdapterInput, Task
from sdpipeline.engine import GeneratedImage
from sdpipeline.engine.checkpoints import inspect
from sdpipeline.engine.diffusers.emphasis import NOISE, emphasised
from sdpipeline.engine.diffusers.text import Embedding, PromptEncoder, Vectors
from tests.integration.engine_requests import (
    SOURCE,
    adapter,
    distance,
    engine,
    equal,
    failure_of,
    images,
    middle_mask,
    noise,
    prepared,
    ref,
    request,
    results,
)
from tests.integration.tiny_checkpoints import tiny_checkpoints

Weighted = Sequence[tuple[str, float]]
"""Text and weight of each part, as the reference's parser gives them."""

PROMPT = "a (cat:1.3) on [dog] ((x))"
PARTS: Weighted = [("a ", 1.0), ("cat", 1.3), (" on ", 1.0), ("dog", 1 / 1.1), (" ", 1.0), ("x", 1.1 * 1.1)]


def one(checkpoint: str = "sd1", **changes: Any) -> GeneratedImage:
    return images(prepared(weighted(checkpoint, **changes)))[0]


def weighted(checkpoint: str = "sd1", **changes: Any) -> Any:
    return request(checkpoint, **{"prompt": PROMPT, "prompt_syntax": "weighted"} | changes)


def encoder(checkpoint: str, words: Mapping[str, Vectors] | None = None) -> PromptEncoder:
    images_of = engine().residency.get(ref(checkpoint))
    kind: Any = {"sdxl": "sdxl", "sdxl-inpaint": "sdxl", "latent-upscale": "clip-hidden"}.get(checkpoint, "clip")
    return PromptEncoder(kind=kind, parts=images_of.parts, words=words or {}, syntax="weighted")


def reference(parts: Mapping[str, Any], name: str, chunks: Sequence[Weighted], layer: int | None) -> torch.Tensor:
    """The states of one CLIP by the reference's rules: each chunk multiplied by its weights, with its mean restored."""
    network, tokenizer = parts[name], parts[name.replace("text_encoder", "tokenizer")]
    found = []
    for chunk in chunks:
        pairs = [(token, w) for text, w in chunk for token in tokenizer(text, add_special_tokens=False).input_ids]
        ids = [tokenizer.bos_token_id, *(token for token, _ in pairs), tokenizer.eos_token_id]
        ids += [tokenizer.pad_token_id] * (77 - len(ids))
        weights = torch.tensor([1.0, *(w for _, w in pairs)] + [1.0] * (76 - len(pairs)))
        with torch.no_grad():
            output = network(torch.tensor([ids]), output_hidden_states=True)
        z = output.last_hidden_state if layer is None else output.hidden_states[layer]
        scaled = z * weights.reshape(1, 77, 1)
        noise_only = min(z.mean().abs(), scaled.mean().abs()) <= NOISE * z.abs().mean()
        found.append(scaled if noise_only else scaled * (z.mean() / scaled.mean()))
    return torch.cat(found, dim=1)


def expected(checkpoint: str, chunks: Sequence[Weighted]) -> torch.Tensor:
    parts = engine().residency.get(ref(checkpoint)).parts
    names = [name for name in ("text_encoder", "text_encoder_2") if name in parts]
    layer = -2 if len(names) == 2 else -1 if checkpoint == "latent-upscale" else None
    return torch.cat([reference(parts, name, chunks, layer) for name in names], dim=-1)


def close(found: Embedding, wanted: torch.Tensor) -> bool:
    return found.embeds.shape == wanted.shape and torch.allclose(found.embeds, wanted, atol=1e-5)


@pytest.mark.parametrize(
    "checkpoint", ["sd1", "sd2", "sdxl", "sd-inpaint", "sdxl-inpaint", "upscale", "latent-upscale"]
)
def test_embeddings_equal_the_references(checkpoint: str) -> None:
    on = encoder(checkpoint)
    assert close(on.encode(PROMPT, length=1), expected(checkpoint, [PARTS]))
    assert not close(on.encode("a cat on dog x", length=1), expected(checkpoint, [PARTS]))


def test_the_mean_is_restored_unless_it_is_rounding_noise() -> None:
    states = torch.randn(1, 77, 32, generator=torch.Generator().manual_seed(0))
    weights = [[1.0, 1.56, 0.5] + [1.0] * 74]
    scaled = states * torch.tensor(weights)[0][:, None]
    trained, untrained = states - 0.1, torch.nn.functional.layer_norm(states, (32,))
    assert torch.allclose(emphasised(trained, weights).mean(), trained.mean())
    assert emphasised(untrained, weights).equal(untrained * torch.tensor(weights)[0][:, None])
    assert emphasised(torch.zeros(1, 77, 32), weights).equal(torch.zeros(1, 77, 32))
    assert not emphasised(trained, weights).equal(scaled)


@pytest.mark.parametrize("checkpoint", ["sd1", "sd2"])
@pytest.mark.parametrize("prompt", ["(a)", "((a:1.2):1.3)", "(cat)", "[dog] BREAK (x:0.5)", "a (red:1.5) ball"])
def test_an_encoder_whose_mean_is_zero_makes_finite_pictures(checkpoint: str, prompt: str) -> None:
    assert one(checkpoint, prompt=prompt).pixels.any()


@pytest.mark.parametrize("checkpoint", ["sd1", "sd2", "sdxl"])
def test_long_prompts_and_breaks_make_chunks_of_their_own(checkpoint: str) -> None:
    on = encoder(checkpoint)
    text = "(cat:0.5) " + "dog " * 80 + "BREAK (x) BREAK"
    chunks: list[Weighted] = [[("cat", 0.5), (" dog" * 74, 1.0)], [("dog " * 6, 1.0)], [("x", 1.1)], []]
    assert on.length(text) == 3
    found = on.encode(text, length=4)
    assert close(found, expected(checkpoint, chunks))
    if found.pooled is not None:
        alone = on.encode("cat " + "dog " * 74, length=1).pooled
        assert alone is not None
        assert torch.allclose(found.pooled, alone, atol=1e-6)


def test_a_break_inside_brackets_keeps_their_weight() -> None:
    found = encoder("sd1").encode("(cat BREAK dog:1.2)", length=2)
    assert close(found, expected("sd1", [[("cat", 1.2)], [("dog", 1.2)]]))


def test_escaped_brackets_are_text() -> None:
    assert torch.equal(
        encoder("sd1").encode(r"a \(cat\) \[x\]", length=1).embeds,
        PromptEncoder(kind="clip", parts=engine().residency.get(ref("sd1")).parts)
        .encode("a (cat) [x]", length=1)
        .embeds,
    )


def test_the_vectors_of_a_textual_inversion_are_weighted_together_and_share_a_chunk() -> None:
    parts = engine().residency.get(ref("sd1")).parts
    table = parts["text_encoder"].get_input_embeddings().weight
    cat, dog = (parts["tokenizer"](word, add_special_tokens=False).input_ids[0] for word in ("cat", "dog"))
    words = {"<toy>": {"text_encoder": table[[cat, dog]].detach()}}
    on = encoder("sd1", words)
    assert close(
        on.encode("a (<toy>:1.4) x", length=1), expected("sd1", [[("a ", 1.0), ("cat dog", 1.4), (" x", 1.0)]])
    )
    found = on.encode("cat " * 74 + "(<toy>:1.4)", length=2)
    assert close(found, expected("sd1", [[("cat " * 74, 1.0)], [("cat dog", 1.4)]]))


@pytest.mark.parametrize("checkpoint", ["sd1", "sdxl"])
def test_a_prompt_without_weights_is_bit_equal_to_a_plain_one(checkpoint: str) -> None:
    for text in ("a cat", "dog " * 100):
        assert equal(one(checkpoint, prompt=text), images(prepared(request(checkpoint, prompt=text)))[0])


@pytest.mark.parametrize("changes", [{"clip_skip": 1}, {"loras": True}, {"negative_prompt": "(x:1.4) BREAK y"}])
@pytest.mark.parametrize("checkpoint", ["sd1", "sdxl"])
def test_weights_are_felt_with(checkpoint: str, changes: dict[str, Any]) -> None:
    if "loras" in changes:
        changes = {"loras": (adapter(f"lora-{checkpoint}"),)}
    stronger = one(checkpoint, prompt="a (cat:2)", **changes)
    assert distance(stronger, one(checkpoint, prompt="a (cat:0.5)", **changes)) > 0
    assert distance(stronger, one(checkpoint, prompt="a cat", **changes)) > 0


def test_clip_skip_weights_the_states_after_the_final_norm() -> None:
    parts = engine().residency.get(ref("sd1")).parts
    states: list[torch.Tensor] = []
    norm = parts["text_encoder"].final_layer_norm
    handle = norm.register_forward_hook(lambda _module, _inputs, output: states.append(output))
    try:
        found = encoder("sd1").encode("a (cat:1.5)", length=1, clip_skip=1)
    finally:
        handle.remove()
    z, weights = states[-1], torch.ones(77)
    weights[2] = 1.5
    scaled = z * weights[None, :, None]
    assert close(found, scaled)  # the tiny encoder's mean is zero


@pytest.mark.parametrize("checkpoint", ["sd1", "sdxl"])
def test_a_neighbour_changes_no_bit(checkpoint: str) -> None:
    asked = [
        prepared(weighted(checkpoint, seed=1)),
        prepared(request(checkpoint, prompt=PROMPT, seed=2)),
        prepared(weighted(checkpoint, prompt="(cat:1.2) BREAK dog", seed=3)),
        prepared(weighted(checkpoint, negative_prompt="[x] BREAK y", seed=4)),
    ]
    together = images(*asked, bucket=4)
    for picture, each in zip(together, asked, strict=True):
        assert equal(picture, images(each, bucket=4)[0])
    assert distance(together[0], images(prepared(request(checkpoint, prompt=PROMPT, seed=1)), bucket=4)[0]) > 0


def test_the_record_has_the_weights_without_the_words() -> None:
    ran = one(negative_prompt="(x) BREAK y").ran
    assert ran["prompt_weights"] == {
        "reference": "AUTOMATIC1111 Original",
        "prompt": pytest.approx([weight for _, weight in PARTS]),
        "negative_prompt": pytest.approx([1.1, 1.0]),
    }
    assert ran["prompt_tokens"] == 154
    assert "prompt_weights" not in images(prepared(request()))[0].ran


@pytest.mark.parametrize("checkpoint", ["sd3", "flux"])
def test_a_family_that_reads_prompts_by_t5_is_refused(checkpoint: str) -> None:
    assert "does not take weighted prompts; write prompt_syntax: plain" in failure_of(
        results(prepared(weighted(checkpoint)))[0]
    )


@pytest.mark.parametrize("field", ["prompt", "negative_prompt"])
def test_a_bad_weight_is_refused_before_anything_is_loaded(field: str) -> None:
    refused = failure_of(results(prepared(weighted(**{field: "(a:nan)"})))[0])
    assert refused.startswith(f"RequestRefusedError: {field}: at character 3, in '(a:nan)': 'nan' is not a weight")


def test_an_inpainting_checkpoint_takes_weights() -> None:
    given = {"task": Task.INPAINTING, "image": SOURCE, "mask_image": SOURCE}
    asked = [weighted("sd-inpaint", prompt=f"(cat:{weight})", **given) for weight in (0.4, 2)]
    pictures = [images(prepared(each, image=noise(), mask_image=middle_mask()))[0] for each in asked]
    assert distance(*pictures) > 0


def test_a_word_of_a_textual_inversion_that_brackets_take_apart_is_refused_and_not_ignored(tmp_path: Path) -> None:
    save_file({"cat(toy)": torch.ones(1, 32)}, tmp_path / "weights.safetensors")
    toy = AdapterInput(checkpoint=tiny_checkpoints().add(inspect("odd", tmp_path)))
    refused = failure_of(results(prepared(weighted(prompt="a cat(toy)", textual_inversions=(toy,))))[0])
    assert refused == "RequestRefusedError: textual_inversions: write <odd> where the prompt means 'odd'"
    escaped = images(prepared(weighted(prompt=r"a cat\(toy\)", textual_inversions=(toy,))))[0]
    assert equal(escaped, images(prepared(weighted(prompt="a <odd>", textual_inversions=(toy,))))[0])
