"""Safety filter: run the safety checkers that a policy names on finished pictures."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from sdpipeline.domain import CheckpointRef, Json
from sdpipeline.engine import Engine, GeneratedImage, GenerationFailure
from sdpipeline.errors import PictureBlockedError, SdpError

Result = GeneratedImage | GenerationFailure


def filter_results(engine: Engine, rules: Sequence[Json], results: Sequence[Result]) -> list[Result]:
    """Return the results; a picture that a safety checker rejects or cannot check becomes a failure.

    ``rules`` are those of each result. The record of a picture that passed names the checkers that saw it.
    """
    judged = list(results)
    asked = {check["rule"]: check for each in rules for check in each.get("safety", ())}
    for rule, check in asked.items():
        shown = [
            n
            for n, result in enumerate(judged)
            if isinstance(result, GeneratedImage) and check in rules[n].get("safety", ())
        ]
        for n, result in zip(shown, _seen(engine, check, [judged[n] for n in shown]), strict=True):
            judged[n] = result if result is not None else GenerationFailure(error=PictureBlockedError(rule))
    return judged


def _seen(engine: Engine, check: Json, pictures: Sequence[Result]) -> list[Result | None]:
    """Return each picture with the checker in its record, or None for a rejected picture."""
    made = [each for each in pictures if isinstance(each, GeneratedImage)]
    if not made:
        return []
    own = {"alias": check["alias"], "digest": check["digest"]}
    try:
        flagged = engine.flagged(CheckpointRef(**own), [each.pixels for each in made])
    except SdpError as error:
        return [GenerationFailure(error=error) for _ in made]
    return [None if bad else _passed(each, own) for each, bad in zip(made, flagged, strict=True)]


def _passed(made: GeneratedImage, checker: Json) -> GeneratedImage:
    seen = [*made.ran.get("safety_checkers", ()), checker]
    return replace(made, ran=made.ran | {"safety_checkers": seen})
