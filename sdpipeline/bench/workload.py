"""Benchmark workload: distinct pictures of one kind, as requests and as jobs of a campaign."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product

from sdpipeline.batching import batch_key, bucket_for
from sdpipeline.db import staging
from sdpipeline.db.audit import AuditLog
from sdpipeline.db.submit import Publication, submit
from sdpipeline.domain import CheckpointRef, GenerationRequest, JobSpec, Profile, Task, fingerprint
from sdpipeline.engine import Batch, PreparedRequest

_COLOURS = ("red", "green", "blue", "yellow", "purple", "orange")
_SHAPES = ("circle", "square", "triangle", "star", "heart")
_GROUNDS = ("white", "black", "green", "blue")
PROMPTS = tuple(
    f"a {size} {colour} {shape} on a {ground} background"
    for size, colour, shape, ground in product(("small", "large"), _COLOURS, _SHAPES, _GROUNDS)
    if colour != ground
)
"""Prompts in the vocabulary of the shipped checkpoint; other checkpoints can use them too."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Workload:
    """Text-to-image settings shared by all requests; sizes in pixels."""

    checkpoint: CheckpointRef
    width: int
    height: int
    num_inference_steps: int
    guidance_scale: float
    scheduler: str
    profile: Profile = "exact"

    def request(self, number: int) -> GenerationRequest:
        """Return the request with that number; prompts repeat after some hundreds, seeds never."""
        return GenerationRequest(
            task=Task.TEXT_TO_IMAGE,
            checkpoint=self.checkpoint,
            prompt=PROMPTS[number % len(PROMPTS)],
            seed=number,
            width=self.width,
            height=self.height,
            num_inference_steps=self.num_inference_steps,
            guidance_scale=self.guidance_scale,
            scheduler=self.scheduler,
            profile=self.profile,
        )

    def batch(self, first: int, count: int) -> Batch:
        """Return ``count`` pictures from the number ``first`` on, as one forward pass."""
        requests = [PreparedRequest(request=self.request(number)) for number in range(first, first + count)]
        return Batch(requests=requests, bucket=bucket_for(count))

    def jobs(self, first: int, count: int) -> Iterator[JobSpec]:
        """Yield the same pictures as jobs of one stage."""
        for number in range(first, first + count):
            asked = self.request(number)
            yield JobSpec(
                stage="picture",
                depth=0,
                row_key=str(number),
                variables=(),
                axes=(),
                seed=number,
                request=asked,
                fingerprint=fingerprint(asked),
                batch_key=batch_key(asked),
                chain=number,
            )


def publish(audit: AuditLog, jobs: Iterator[JobSpec], *, name: str) -> int:
    """Submit jobs as a campaign of that name; return its id."""
    asked = Publication(team="bench", name=name, source="", priority=100, max_attempts=1)
    with staging.prepared(jobs) as ready, audit.transaction() as tx:
        return submit(tx, ready, asked).campaign_id
