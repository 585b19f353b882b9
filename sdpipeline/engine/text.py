"""Prompts as embeddings: encoded one at a time, so that a prompt's bits never depend on its neighbours."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

WORDS_PER_CHUNK = 75
"""CLIP reads 77 tokens: a start, 75 of the prompt, and an end. Longer prompts take several such chunks."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Embedding:
    """What a pipeline takes in a prompt's place, batch dimension 1."""

    embeds: torch.Tensor
    pooled: torch.Tensor | None = None

    @property
    def size_bytes(self) -> int:
        """What it occupies in memory."""
        return sum(t.numel() * t.element_size() for t in (self.embeds, self.pooled) if t is not None)


class EmbeddingCache:
    """Embeddings by everything that determines them, the least recently used dropped beyond a byte budget."""

    def __init__(self, budget_bytes: int) -> None:
        self._budget_bytes = budget_bytes
        self._held: OrderedDict[object, Embedding] = OrderedDict()
        self._size_bytes = 0

    def get(self, key: object) -> Embedding | None:
        """The embedding, which counts as used now."""
        if key in self._held:
            self._held.move_to_end(key)
        return self._held.get(key)

    def put(self, key: object, embedding: Embedding) -> None:
        """Hold it, and drop old ones until the budget is met."""
        self._held[key] = embedding
        self._size_bytes += embedding.size_bytes
        while self._size_bytes > self._budget_bytes and len(self._held) > 1:
            _, dropped = self._held.popitem(last=False)
            self._size_bytes -= dropped.size_bytes


def chunks_needed(components: Mapping[str, Any], text: str) -> int:
    """How many chunks of 75 tokens the prompt takes, at least one."""
    return max(1, -(-len(_words(components["tokenizer"], text)) // WORDS_PER_CHUNK))


def encode_clip(components: Mapping[str, Any], text: str, *, chunks: int, clip_skip: int | None) -> Embedding:
    """SD 1.x and 2.x: the encoder's last states, or those ``clip_skip`` layers before, normalised."""
    encoder = components["text_encoder"]
    ids = _chunked(components["tokenizer"], text, chunks).to(encoder.device)
    with torch.no_grad():
        if clip_skip is None:
            states = encoder(ids)[0]
        else:
            hidden = encoder(ids, output_hidden_states=True).hidden_states
            states = _transformer(encoder).final_layer_norm(hidden[-(clip_skip + 1)])
    return Embedding(embeds=states.reshape(1, -1, states.shape[-1]))


def _transformer(encoder: Any) -> Any:
    """The inner transformer, which transformers 5.6 folded into ``CLIPTextModel`` itself."""
    return getattr(encoder, "text_model", encoder)


def _chunked(tokenizer: Any, text: str, chunks: int) -> torch.Tensor:
    """Token ids, one row of 77 per chunk, as the tokenizer pads a single short prompt."""
    words = _words(tokenizer, text)
    rows = []
    for n in range(chunks):
        part = words[n * WORDS_PER_CHUNK : (n + 1) * WORDS_PER_CHUNK]
        row = [tokenizer.bos_token_id, *part, tokenizer.eos_token_id]
        rows.append(row + [tokenizer.pad_token_id] * (WORDS_PER_CHUNK + 2 - len(row)))
    return torch.tensor(rows)


def _words(tokenizer: Any, text: str) -> list[int]:
    return list(tokenizer(text, add_special_tokens=False, truncation=False, verbose=False).input_ids)
