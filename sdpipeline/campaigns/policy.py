"""Policies on checkpoints, sizes and prompt words: a campaign's own and the deployment's."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import lru_cache
from pathlib import Path

from pydantic import ValidationError

from sdpipeline.campaigns import yaml_source
from sdpipeline.campaigns.spec import CampaignSpec, Policy
from sdpipeline.campaigns.spec_parser import note_faults
from sdpipeline.campaigns.stage_spec import Stage
from sdpipeline.campaigns.yaml_source import Faults, KeyPath, shown
from sdpipeline.domain import CheckpointRef
from sdpipeline.engine.checkpoints import SAFETY_CHECKER, CheckpointFiles
from sdpipeline.errors import CampaignError, SettingsError
from sdpipeline.jobs import SafetyCheck
from sdpipeline.suggestions import nearest

CAMPAIGN, DEPLOYMENT = "policy", "deployment policy"

# Unicode's Default_Ignorable_Code_Point: invisible, so they must not hide a denied word.
_INVISIBLE = re.compile(
    "[\u00ad\u034f\u061c\u115f\u1160\u17b4\u17b5\u180b-\u180f\u200b-\u200f\u202a-\u202e\u2060-\u206f\u3164\ufe00-\ufe0f"
    "\ufeff\uffa0\ufff0-\ufff8\U0001bca0-\U0001bca3\U0001d173-\U0001d17a\U000e0000-\U000e0fff]"
)
# Combining marks that remain after composition strike letters through or circle them.
_DRAWN_OVER = re.compile("[\u0300-\u036f\u1ab0-\u1aff\u1dc0-\u1dff\u20d0-\u20ff]")

Words = tuple[str, ...]
Span = tuple[int, int, str]
"""Start and end of a phrase among the words of a prompt, and the phrase as its policy writes it."""


class Rules:
    """One policy, indexed once for a million prompts; ``name`` is the campaign's or the deployment's."""

    def __init__(self, policy: Policy, *, name: str = CAMPAIGN) -> None:
        self.name = name
        self.policy = policy
        self._deny = _by_first_word(policy.deny)
        self._allow = _by_first_word(policy.allow)

    def denial(self, prompt: str) -> str | None:
        """Return the rule that forbids a prompt, without quoting the prompt; ``None`` if no rule does."""
        if not self._deny:
            return None
        found = words(prompt)
        if self._deny.keys().isdisjoint(found):
            return None
        allowed = list(_spans(found, self._allow))
        for start, end, phrase in _spans(found, self._deny):
            if not any(first <= start and end <= last for first, last, _ in allowed):
                return f"{self.name}.deny: {shown(phrase)}"
        return None

    def checkpoint_refusal(self, alias: str) -> tuple[str, str] | None:
        """Return why the policy refuses that checkpoint, and the fix; ``None`` if it is allowed."""
        known = self.policy.checkpoints
        if known is None or alias in known:
            return None
        return f"{self.name}.checkpoints does not allow {alias!r}", nearest(alias, known)

    def terms_refusal(self, files: CheckpointFiles) -> Iterator[tuple[str, str]]:
        """Yield why the policy refuses the weights' licence or purposes, and the fix."""
        asked, alias = self.policy, files.alias
        fix = f"sdpipeline checkpoints add {alias} DIR_OR_REPO --licence L --purpose P, or other weights"
        if asked.licences is not None and files.licence not in asked.licences:
            known = f"is under {files.licence!r}" if files.licence else "is registered without a licence"
            yield f"{alias!r} {known}, {self.name}.licences allows {', '.join(asked.licences) or 'none'}", fix
        if missing := [purpose for purpose in asked.purposes if purpose not in files.purposes]:
            yield f"{alias!r} is not approved for {', '.join(missing)}, as {self.name}.purposes asks", fix

    def size_refusal(self, side: str, pixels: int) -> tuple[str, str] | None:
        """Return why the policy refuses that ``width`` or ``height``, and the fix; ``None`` if it is allowed."""
        most = self.policy.max_width if side == "width" else self.policy.max_height
        if most is None or pixels <= most:
            return None
        return f"makes a picture of {side} {pixels}, {self.name}.max_{side} is {most}", "make it smaller"


def load(path: Path) -> Rules:
    """Load the deployment's policy from its file, with keys under ``policy:`` or at the top; raises SettingsError."""
    try:
        source = yaml_source.load(path)
    except CampaignError as error:
        raise SettingsError(*error.mistakes) from error
    faults = Faults(source)
    nested = isinstance(source.data, dict) and list(source.data) == ["policy"]
    at: KeyPath = ("policy",) if nested else ()
    given = source.data["policy"] if nested else source.data
    policy = Policy()
    if isinstance(given, dict):
        try:
            policy = Policy.model_validate(given)
        except ValidationError as error:
            note_faults(error, given, at, faults, shape=Policy)
    else:
        faults.add(at, "is not a policy", f"write {', '.join(f'{name}:' for name in Policy.model_fields)}")
    check_words(policy, at, faults)
    if faults.mistakes:
        raise SettingsError(*faults.in_order())
    return Rules(policy, name=DEPLOYMENT)


def check_words(policy: Policy, at: KeyPath, faults: Faults) -> None:
    """Refuse phrases without a word: no prompt could match them."""
    for key, phrases in (("deny", policy.deny), ("allow", policy.allow)):
        for n, phrase in enumerate(phrases):
            if not words(phrase):
                faults.add((*at, key, n), f"there is no word in {shown(phrase)}", "write a word or a phrase")


def check_checkpoints(
    spec: CampaignSpec,
    stage: Stage,
    path: KeyPath,
    faults: Faults,
    *,
    policies: Iterable[Rules],
    catalog: Mapping[str, CheckpointFiles],
) -> None:
    """Refuse checkpoints that a policy does not list, or whose terms it does not accept."""
    for rules in policies:
        for place, alias in _named(spec, stage, path):
            if why := rules.checkpoint_refusal(alias):
                faults.add(place, *why)
            elif alias in catalog:
                for terms in rules.terms_refusal(catalog[alias]):
                    faults.add(place, *terms)


def check_safety_checkers(policies: Iterable[Rules], catalog: Mapping[str, CheckpointFiles], faults: Faults) -> None:
    """Refuse a missing safety checker or one of the wrong kind: no picture may skip the check."""
    for rules in policies:
        alias = rules.policy.safety_checker
        if alias is None or (alias in catalog and catalog[alias].kind == SAFETY_CHECKER):
            continue
        known = [name for name, files in catalog.items() if files.kind == SAFETY_CHECKER]
        why = f"is a {catalog[alias].kind}, not a safety checker" if alias in catalog else "is not registered"
        place: KeyPath = ("policy", "safety_checker") if rules.name == CAMPAIGN else ()
        fix = f"sdpipeline checkpoints add {alias} DIR" if not known else nearest(alias, known)
        faults.add(place, f"{'' if place else f'{rules.name}.safety_checker: '}{alias!r} {why}", fix)


def safety_checks(policies: Iterable[Rules], catalog: Mapping[str, CheckpointFiles]) -> tuple[SafetyCheck, ...]:
    """Return the pinned safety checkers that every finished picture must pass, with their rules."""
    found = [(rules.name, catalog[alias]) for rules in policies if (alias := rules.policy.safety_checker)]
    return tuple(
        SafetyCheck(
            rule=f"{name}.safety_checker: {shown(files.alias)}",
            checker=CheckpointRef(alias=files.alias, digest=files.digest),
        )
        for name, files in found
    )


def words(text: str) -> list[str]:
    """Return a text's words as they are compared.

    The text is normalised by NFKC, without case, invisible characters, combining marks and punctuation. A pictograph
    is a word of its own.
    """
    if text.isascii():
        return text.lower().translate(_SPACED).split()
    return [word for token in text.split() for word in _compared(token)]


@lru_cache(maxsize=100_000)  # a million prompts are made of few words
def _compared(token: str) -> Words:
    composed = unicodedata.normalize("NFKC", _INVISIBLE.sub("", token))
    folded = unicodedata.normalize("NFKC", composed.casefold())
    return tuple(_DRAWN_OVER.sub("", folded).translate(_SPACED).split())


class _Spaced(dict[int, str]):
    """Table for ``str.translate`` that looks up every character once."""

    def __missing__(self, code: int) -> str:
        character = chr(code)
        category = unicodedata.category(character)
        kept = character if category[0] in "LMN" else f" {character} " if category == "So" else " "
        self[code] = kept
        return kept


_SPACED = _Spaced()


def _by_first_word(phrases: Iterable[str]) -> Mapping[str, list[tuple[Words, str]]]:
    found: dict[str, list[tuple[Words, str]]] = {}
    for phrase in phrases:
        if compared := words(phrase):
            found.setdefault(compared[0], []).append((tuple(compared), phrase))
    return found


def _spans(found: Sequence[str], phrases: Mapping[str, list[tuple[Words, str]]]) -> Iterator[Span]:
    for start, word in enumerate(found):
        for compared, phrase in phrases.get(word, ()):
            end = start + len(compared)
            if tuple(found[start:end]) == compared:
                yield start, end, phrase


def _named(spec: CampaignSpec, stage: Stage, path: KeyPath) -> Iterator[tuple[KeyPath, str]]:
    """Yield every checkpoint that a stage uses, with its place in the file."""
    if stage.checkpoint is None:
        yield ("checkpoint",), spec.checkpoint
    else:
        yield (*path, "checkpoint"), stage.checkpoint
    if stage.vae is not None:
        yield (*path, "vae"), stage.vae
    for n, use in enumerate(stage.controlnets):
        yield (*path, "controlnets", n, "checkpoint"), use.checkpoint
        if use.annotator_checkpoint is not None:
            yield (*path, "controlnets", n, "annotator_checkpoint"), use.annotator_checkpoint
    for place, adapter in stage.adapters():
        yield (*path, *place, "checkpoint"), adapter.checkpoint
