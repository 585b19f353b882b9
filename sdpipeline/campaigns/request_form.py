"""Forms of generation requests: the parts that jobs of one stage have in common, hashed once."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from sdpipeline.batching import batch_key
from sdpipeline.domain import (
    AdapterInput,
    ControlNetInput,
    GenerationRequest,
    ImageSource,
    Json,
    canonical,
    fingerprint_document,
    hashed,
    to_document,
)

Size = tuple[int, int]
"""Width and height, pixels."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """Common part of requests that differ only in prompts, seed and parents' pictures.

    A source with ``stage`` is a placeholder to fill in. ``result`` is the size of the finished picture.
    """

    fixed: Mapping[str, Any]
    images: Mapping[str, ImageSource]
    controlnets: tuple[Mapping[str, Any], ...]
    ip_adapters: tuple[AdapterInput, ...]
    result: Size
    forms: dict[bool, RequestForm] = field(default_factory=dict)

    def request(self, prompt: str, negative_prompt: str, seed: int, digests: Mapping[str, str]) -> GenerationRequest:
        """Build one job's request; ``digests`` are the parents' fingerprints by stage."""
        pictures: dict[str, Any] = {role: _of_parent(source, digests) for role, source in self.images.items()}
        if self.controlnets:
            pictures["controlnets"] = tuple(
                ControlNetInput(**{**use, "image": _of_parent(use["image"], digests)}) for use in self.controlnets
            )
        if self.ip_adapters:
            pictures["ip_adapters"] = tuple(_referring(use, digests) for use in self.ip_adapters)
        return GenerationRequest(prompt=prompt, negative_prompt=negative_prompt, seed=seed, **pictures, **self.fixed)

    def form(self, *, negative: bool) -> RequestForm:
        """Return the cached form that hashes such requests, with or without a negative prompt."""
        if negative not in self.forms:
            stages = [source.stage for source in self.images.values()]
            stages += [use["image"].stage for use in self.controlnets]
            stages += [use.image.stage for use in self.ip_adapters if use.image]
            marks = {stage: f"\0{stage}" for stage in stages if stage}
            self.forms[negative] = RequestForm(self.request("\0.prompt", "\0.negative" if negative else "", 0, marks))
        return self.forms[negative]


def _of_parent(source: ImageSource, digests: Mapping[str, str]) -> ImageSource:
    return source if source.stage is None else ImageSource(stage=source.stage, digest=digests[source.stage])


def _referring(use: AdapterInput, digests: Mapping[str, str]) -> AdapterInput:
    return replace(use, image=use.image and _of_parent(use.image, digests))


class RequestForm:
    """Canonical text of a request with placeholders, so that a job's text and fingerprint cost only a string join.

    The sample marks placeholders with a NUL, which no campaign's text can contain.
    """

    def __init__(self, sample: GenerationRequest) -> None:
        seed = {"seed": "\0.seed"}
        self._document = _Form(to_document(sample) | seed)
        self._fingerprinted = _Form(fingerprint_document(sample) | seed)
        self.batch_key = batch_key(sample)

    def document(self, fillings: Mapping[str, str]) -> str:
        """Return the canonical text of :func:`sdpipeline.domain.to_document`.

        Fillings are JSON, by ``.prompt``, ``.negative``, ``.seed`` and each parent's stage.
        """
        return self._document.filled(fillings)

    def fingerprint(self, fillings: Mapping[str, str]) -> str:
        """Return the same digest as :func:`sdpipeline.domain.fingerprint`."""
        return hashed(self._fingerprinted.filled(fillings).encode())


class _Form:
    """Canonical text split at its placeholders."""

    def __init__(self, document: Json) -> None:
        parts = re.split(r'"\\u0000([^"]+)"', canonical(document).decode())
        self._parts, self._holes = parts, parts[1::2]

    def filled(self, fillings: Mapping[str, str]) -> str:
        parts = self._parts.copy()
        parts[1::2] = [fillings[hole] for hole in self._holes]
        return "".join(parts)


@dataclass(frozen=True, slots=True, kw_only=True)
class Resolved:
    """A stage for one combination, without seeds and parents' fingerprints; ``used`` are its variables.

    ``blocked`` names the policy rule that forbids it.
    """

    shape: Shape
    form: RequestForm
    prompt: str
    negative_prompt: str
    used: dict[str, Any]
    quoted: Mapping[str, str]
    blocked: str | None = None

    def request(self, seed: int, digests: Mapping[str, str]) -> tuple[GenerationRequest, str, str]:
        """Return one job's request, its document as canonical text, and its fingerprint."""
        fillings = {**self.quoted, ".seed": str(seed)}
        for stage, digest in digests.items():
            fillings[stage] = f'"{digest}"'
        request = self.shape.request(self.prompt, self.negative_prompt, seed, digests)
        return request, self.form.document(fillings), self.form.fingerprint(fillings)
