"""The cache of prompt embeddings is limited by a number of bytes."""

from __future__ import annotations

import torch

from sdpipeline.engine.diffusers.text import Embedding, EmbeddingCache


def test_the_least_recently_used_embedding_makes_room_for_a_new_one() -> None:
    one = Embedding(embeds=torch.zeros(1, 4, 8))
    cache = EmbeddingCache(2 * one.size_bytes)
    cache["a"], cache["b"] = one, one
    assert cache.get("a") is one
    cache["c"] = one
    assert set(cache) == {"a", "c"}
