"""Safety filter: run the safety checkers that a policy names on finished pictures."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from sdpipeline.domain import CheckpointRef
from sdpipeline.engine import Engine, GeneratedImage, GenerationFailure
from sdpipeline.errors import PictureBlockedError, SdpError
from sdpipeline.jobs import DeliveryRules

Result = GeneratedImage | GenerationFailure


def filter_results(engine: Engine, rules: Sequence[DeliveryRules], results: Sequence[Result]) -> list[Result]:
    """Return the results; a picture that a safety checker rejects or cannot check becomes a failure.

    ``rules`` are those of each result. The record of a picture that passed names the checkers that saw it.
    """
    judged = list(results)
    checks = dict.fromkeys(check for each in rules for check in each.safety)
    for check in checks:
        shown = [
            n for n, result in enumerate(judged) if isinstance(result, GeneratedImage) and check in rules[n].safety
        ]
        for n, result in zip(shown, _seen(engine, check.checker, [judged[n] for n in shown]), strict=True):
            judged[n] = result if result is not None else GenerationFailure(error=PictureBlockedError(check.rule))
    return judged


def _seen(engine: Engine, checker: CheckpointRef, pictures: Sequence[Result]) -> list[Result | None]:
    """Return each picture with the checker in its record, or None for a rejected picture."""
    made = [each for each in pictures if isinstance(each, GeneratedImage)]
    if not made:
        return []
    try:
        flagged = engine.flagged(checker, [each.pixels for each in made])
    except SdpError as error:
        return [GenerationFailure(error=error) for _ in made]
    return [None if bad else _passed(each, checker) for each, bad in zip(made, flagged, strict=True)]


def _passed(made: GeneratedImage, checker: CheckpointRef) -> GeneratedImage:
    own = {"alias": checker.alias, "digest": checker.digest}
    seen = [*made.ran.get("safety_checkers", ()), own]
    return replace(made, ran=made.ran | {"safety_checkers": seen})
