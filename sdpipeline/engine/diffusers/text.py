"""Prompt encoding, one prompt at a time, so that a prompt's bits never depend on the rest of the batch."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from cachetools import LRUCache

from sdpipeline.domain import PromptSyntax
from sdpipeline.engine.diffusers.emphasis import emphasised
from sdpipeline.engine.families import TextEncoding
from sdpipeline.engine.weighted_prompts import Part, read
from sdpipeline.errors import RequestRefusedError

CHUNK = 75
"""Prompt tokens in one CLIP chunk: CLIP reads 77 tokens, with a start and an end. Longer prompts take more chunks."""
T5_LENGTHS: Mapping[str, tuple[int, ...]] = {"sd3": (256, 512), "flux": (512,)}
"""Numbers of T5 tokens that a family's transformer was trained to read."""

Vectors = Mapping[str, torch.Tensor]
"""Token embeddings of a textual inversion, by the name of their text encoder."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Embedding:
    """Prompt embeddings that a pipeline takes in place of a prompt, with batch dimension 1."""

    embeds: torch.Tensor
    pooled: torch.Tensor | None = None

    @property
    def size_bytes(self) -> int:
        """Size in memory."""
        return sum(t.numel() * t.element_size() for t in (self.embeds, self.pooled) if t is not None)

    def zeros(self) -> Embedding:
        """Return zeros: SDXL's embedding for no prompt, which differs from that of the empty prompt."""
        pooled = None if self.pooled is None else torch.zeros_like(self.pooled)
        return Embedding(embeds=torch.zeros_like(self.embeds), pooled=pooled)


class EmbeddingCache(LRUCache[object, Embedding]):
    """LRU cache of embeddings with a byte budget; a key holds everything that determines an embedding."""

    def __init__(self, budget_bytes: int) -> None:
        super().__init__(maxsize=budget_bytes, getsizeof=lambda embedding: embedding.size_bytes)


@dataclass(frozen=True, slots=True, kw_only=True)
class Token:
    """Token of a prompt: its id, or the word of a textual inversion and the row of its vectors; and its weight."""

    id: int | tuple[str, int]
    weight: float = 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class PromptEncoder:
    """Prompt encoder of one family, with a checkpoint's own tokenizers and text encoders.

    ``words`` maps tokens in a prompt to textual inversions. Their vectors replace the output of the encoder's
    token embedding for the length of one call, so the resident weights do not change. Prompts of the syntax
    ``weighted`` are cut into chunks and weighted as AUTOMATIC1111/stable-diffusion-webui does it
    (``modules/sd_hijack_clip.py``, with ``comma_padding_backtrack`` 0).
    """

    kind: TextEncoding
    parts: Mapping[str, Any]
    words: Mapping[str, Vectors] = field(default_factory=dict)
    syntax: PromptSyntax = "plain"

    def length(self, *texts: str) -> int:
        """Return the length that all prompts of a pass have to share: CLIP chunks or T5 tokens."""
        if self.kind == "sd3" and "text_encoder_3" not in self.parts:
            return self._length_without_t5(*texts)
        if self.kind in T5_LENGTHS:
            return self._t5_length(max(len(self._t5_ids(text)) for text in texts))
        tokenizers = [name for name in ("tokenizer", "tokenizer_2") if name in self.parts]
        if self.syntax == "plain":
            tokenizers = tokenizers[:1]
        return max(1, *(len(self._chunks(name, text)) for name in tokenizers for text in texts))

    def encode(self, text: str, *, length: int, clip_skip: int | None = None) -> Embedding:
        """Return the prompt's embedding, encoded alone in its batch."""
        self._check_clip_skip(clip_skip)
        with torch.no_grad():
            if self.kind == "sdxl":
                return self._sdxl(text, length, clip_skip)
            if self.kind == "sd3":
                return self._sd3(text, length, clip_skip)
            if self.kind == "flux":
                pooled = self._clip("text_encoder", self._rows("text_encoder", text, 1)).pooler_output
                return Embedding(embeds=self._t5("text_encoder_2", text, length), pooled=pooled)
            return self._single(text, length, clip_skip)

    def _check_clip_skip(self, clip_skip: int | None) -> None:
        layers = self.parts["text_encoder"].config.num_hidden_layers
        most = layers - (1 if self.kind == "clip" else 2)
        if clip_skip is not None and clip_skip > most:
            raise RequestRefusedError(f"clip_skip: the text encoder has {layers} layers; skip at most {most}")

    def _single(self, text: str, chunks: int, clip_skip: int | None) -> Embedding:
        rows = self._rows("text_encoder", text, chunks)
        output = self._clip("text_encoder", rows)
        if self.kind == "clip-hidden":
            return Embedding(embeds=_joined(output.hidden_states[-1], rows), pooled=output.pooler_output[:1])
        if clip_skip is None:
            return Embedding(embeds=_joined(output.last_hidden_state, rows))
        normalise = _transformer(self.parts["text_encoder"]).final_layer_norm
        return Embedding(embeds=_joined(normalise(output.hidden_states[-(clip_skip + 1)]), rows))

    def _sdxl(self, text: str, chunks: int, clip_skip: int | None) -> Embedding:
        names = ("text_encoder", "text_encoder_2")
        rows = [self._rows(name, text, chunks) for name in names]
        outputs = [self._clip(name, own) for name, own in zip(names, rows, strict=True)]
        layer = -(2 + (clip_skip or 0))
        hidden = [_joined(output.hidden_states[layer], own) for output, own in zip(outputs, rows, strict=True)]
        return Embedding(embeds=torch.cat(hidden, dim=-1), pooled=outputs[1].text_embeds[:1])

    def _sd3(self, text: str, length: int, clip_skip: int | None) -> Embedding:
        """Encode for SD3: the two CLIPs read the first chunk only, as they were trained; T5 reads the whole prompt."""
        outputs = [self._clip(name, self._rows(name, text, 1)) for name in ("text_encoder", "text_encoder_2")]
        layer = -(2 + (clip_skip or 0))
        clip = torch.cat([output.hidden_states[layer] for output in outputs], dim=-1)
        t5 = self._t5("text_encoder_3", text, length) if "text_encoder_3" in self.parts else self._no_t5(clip, length)
        clip = torch.nn.functional.pad(clip, (0, t5.shape[-1] - clip.shape[-1]))
        pooled = torch.cat([output.text_embeds for output in outputs], dim=-1)
        return Embedding(embeds=torch.cat([clip, t5], dim=1), pooled=pooled)

    def _no_t5(self, clip: torch.Tensor, length: int) -> torch.Tensor:
        """Return zeros, as StableDiffusion3Pipeline has them in place of T5's embedding if it has no T5."""
        return clip.new_zeros((1, length, self.parts["transformer"].config.joint_attention_dim))

    def _length_without_t5(self, *texts: str) -> int:
        for text in texts:
            if (tokens := sum(map(len, self._chunks("tokenizer", text)))) > CHUNK:
                raise RequestRefusedError(
                    f"prompt: it has {tokens} tokens, but this checkpoint has no T5, and its CLIPs read {CHUNK}; "
                    "shorten it, or use a checkpoint with text_encoder_3"
                )
        return T5_LENGTHS["sd3"][0]

    def _clip(self, encoder: str, rows: Sequence[Sequence[Token]]) -> Any:
        """Return the output of one CLIP, one row per chunk."""
        network = self.parts[encoder]
        ids = torch.tensor([[_id(token) for token in row] for row in rows], device=network.device)
        with self._vectors_in_place(encoder, rows):
            return network(ids, output_hidden_states=True)

    def _rows(self, encoder: str, text: str, count: int) -> list[list[Token]]:
        """Return that many chunks for one CLIP, with start, end and padding; missing ones are empty."""
        name = encoder.replace("text_encoder", "tokenizer")
        chunks = self._chunks(name, text)[:count]
        return [_row(self.parts[name], chunk) for chunk in [*chunks, *[[]] * (count - len(chunks))]]

    def _chunks(self, tokenizer: str, text: str) -> list[list[Token]]:
        """Return the tokens of each chunk. A ``BREAK`` ends a chunk; at the end of a prompt it adds none."""
        sections = [_cut(self._words(tokenizer, section)) for section in read(text, self.syntax).sections]
        if len(sections) > 1 and sections[-1] == [[]]:
            sections.pop()
        return [chunk for section in sections for chunk in section]

    def _words(self, tokenizer: str, section: Sequence[Part]) -> Iterator[list[Token]]:
        """Yield the tokens of a section. With weights, those of a textual inversion are together, to share a chunk."""
        encoder = tokenizer.replace("tokenizer", "text_encoder")
        for part in section:
            for piece in _pieces(part.text, self.words):
                if piece in self.words:
                    rows = range(len(self.words[piece][encoder]))
                    vectors = [Token(id=(piece, row), weight=part.weight) for row in rows]
                    yield from [vectors] if self.syntax == "weighted" else [[vector] for vector in vectors]
                else:
                    options = {"add_special_tokens": False, "truncation": False, "verbose": False}
                    ids = self.parts[tokenizer](piece, **options).input_ids
                    yield from ([Token(id=each, weight=part.weight)] for each in ids)

    @contextmanager
    def _vectors_in_place(self, encoder: str, rows: Sequence[Sequence[Token]]) -> Iterator[None]:
        places = [
            (r, c, token.id) for r, row in enumerate(rows) for c, token in enumerate(row) if isinstance(token.id, tuple)
        ]
        if not places:
            yield
            return

        def put(_module: Any, _inputs: Any, embedded: torch.Tensor) -> torch.Tensor:
            embedded = embedded.clone()
            for row, column, (word, n) in places:
                embedded[row, column] = self.words[word][encoder][n].to(embedded)
            return embedded

        handle = _transformer(self.parts[encoder]).embeddings.token_embedding.register_forward_hook(put)
        try:
            yield
        finally:
            handle.remove()

    def _t5_ids(self, text: str) -> list[int]:
        tokenizer = self.parts["tokenizer_3" if self.kind == "sd3" else "tokenizer_2"]
        return list(tokenizer(text, truncation=False, verbose=False).input_ids)

    def _t5_length(self, tokens: int) -> int:
        lengths = T5_LENGTHS[self.kind]
        for length in lengths:
            if tokens <= length:
                return length
        raise RequestRefusedError(
            f"prompt: it has {tokens} tokens, but this family reads at most {lengths[-1]}; shorten it"
        )

    def _t5(self, encoder: str, text: str, length: int) -> torch.Tensor:
        network, ids = self.parts[encoder], self._t5_ids(text)
        tokenizer = self.parts[encoder.replace("text_encoder", "tokenizer")]
        padded = ids + [tokenizer.pad_token_id] * (length - len(ids))
        return network(torch.tensor([padded], device=network.device))[0]  # type: ignore[no-any-return]


def _cut(words: Iterable[Sequence[Token]]) -> list[list[Token]]:
    """Cut tokens into chunks. A word that fits into a chunk is not split; there is always one chunk."""
    chunks: list[list[Token]] = [[]]
    for word in words:
        if len(word) <= CHUNK < len(chunks[-1]) + len(word):
            chunks.append([])
        for token in word:
            if len(chunks[-1]) == CHUNK:
                chunks.append([])
            chunks[-1].append(token)
    return chunks


def _row(tokenizer: Any, tokens: Sequence[Token]) -> list[Token]:
    """Return start, words, end and padding, as the tokenizer pads a single short prompt."""
    row = [Token(id=tokenizer.bos_token_id), *tokens, Token(id=tokenizer.eos_token_id)]
    return row + [Token(id=tokenizer.pad_token_id)] * (CHUNK + 2 - len(row))


def _id(token: Token) -> int:
    """Return a token's id, and 0 as the placeholder of a vector.

    0 is below the id of the end token, by which encoders find the position to pool.
    """
    return token.id if isinstance(token.id, int) else 0


def _pieces(text: str, words: Mapping[str, object]) -> list[str]:
    """Split the text at textual inversions, which stay as pieces of their own."""
    if not words:
        return [text]
    longest_first = sorted(words, key=len, reverse=True)
    return [piece for piece in re.split("(" + "|".join(map(re.escape, longest_first)) + ")", text) if piece.strip()]


def _joined(states: torch.Tensor, rows: Sequence[Sequence[Token]]) -> torch.Tensor:
    """Weight the tokens of each chunk, and concatenate the chunks into one prompt."""
    weighted = emphasised(states, [[token.weight for token in row] for row in rows])
    return weighted.reshape(1, -1, states.shape[-1])


def _transformer(encoder: Any) -> Any:
    """Return the inner transformer, which transformers 5.6 merged into ``CLIPTextModel`` itself."""
    return getattr(encoder, "text_model", encoder)
