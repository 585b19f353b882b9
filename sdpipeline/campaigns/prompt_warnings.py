"""Warnings about prompts: syntax of other programs, invisible characters, and gaps that empty values leave."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from sdpipeline.campaigns.templates import Template
from sdpipeline.campaigns.warnings import Warnings
from sdpipeline.campaigns.yaml_source import KeyPath
from sdpipeline.domain import PromptSyntax
from sdpipeline.engine.families import Family
from sdpipeline.engine.weighted_prompts import Doubt
from sdpipeline.suggestions import nearest_name

LONGEST_QUOTE = 40
QUOTES = "\u2018\u2019\u201a\u201b\u201c\u201d\u201e\u201f"
"""Curly quotes and apostrophes."""
INVISIBLE = "\u00a0\u00ad\u180e\u2007\u200b\u202a-\u202f\u2060\ufeff"
"""Spaces that do not break, and characters of no width."""
# Between ASCII characters joiners are left from copying; elsewhere emoji and some scripts need them.
JOINER = r"(?<=[ -~])[\u200c\u200d]|[\u200c\u200d](?=[ -~])"

_EDGES = " \t\n,"
_MARKS = tuple("()[]{<\\_+:")
_GAP = re.compile(r"\s\s|,\s*,|^\s|\s$|^,|,$")


@dataclass(frozen=True, slots=True, kw_only=True)
class Rule:
    """Pattern that is warned of, with the message about a match, and the fix.

    No rule without its ``trigger`` in the prompt matches. ``syntax`` is None for rules of every syntax. ``yields_to``
    are kinds that make this one superfluous; their rules come before.
    """

    kind: str
    trigger: str
    pattern: re.Pattern[str]
    message: str
    fix: str
    syntax: PromptSyntax | None = None
    yields_to: frozenset[str] = frozenset()


VARIABLE = "write {{ name }}, and its values under variables:"
WEIGHTED = "write prompt_syntax: weighted if weights are meant"

RULES = (
    Rule(
        kind="wildcard",
        trigger="__",
        pattern=re.compile(r"__(?!_)[\w/*.-]+?__"),
        message="is a wildcard of another program and is read as text",
        fix=VARIABLE,
    ),
    Rule(
        kind="dynamic prompt",
        trigger="{",
        pattern=re.compile(r"\{[^{}|$]*(?:\||\$\$)[^{}]*\}"),
        message="is a dynamic prompt, which is not expanded: it is read as text",
        fix=VARIABLE,
    ),
    Rule(
        kind="alternation",
        trigger="[",
        pattern=re.compile(r"\[[^\[\]|]*\|[^\[\]]*\]"),
        message="does not alternate between its words",
        fix="keep one of them",
    ),
    Rule(
        kind="prompt editing",
        trigger="[",
        pattern=re.compile(r"\[[^\[\]|:]*:[^\[\]|]*\d\s{0,3}\]"),
        message="does not change the prompt while it is denoised",
        fix="keep one of the texts",
    ),
    Rule(
        kind="AND",
        trigger="AND",
        pattern=re.compile(r"(?<![A-Z]\s)(?<=\s)AND(?=\s)(?!\s[A-Z]{2})"),
        message="does not combine two prompts",
        fix="write 'and', or a comma",
    ),
    Rule(
        kind="embedding",
        trigger="embedding:",
        pattern=re.compile(r"embedding:[^\s,()]+"),
        message="is read as text; it loads no textual inversion",
        fix="write textual_inversions: [{checkpoint: ALIAS}] in the stage and <ALIAS> in the prompt",
    ),
    Rule(
        kind="other weights",
        trigger="+",
        pattern=re.compile(r"\w{1,30}(?<!\bC)\+\+|\)\+"),
        message="does not add weight: plus signs are read as text",
        fix="write (word:1.2) and prompt_syntax: weighted if a weight is meant",
    ),
    Rule(
        kind="weight after the bracket",
        trigger=")",
        pattern=re.compile(r"\([^()]*\)[-+]?\d*\.\d+"),
        message="has its weight after the bracket, where it is read as text",
        fix="write (word:1.2) and prompt_syntax: weighted if a weight is meant",
    ),
    Rule(
        kind="parameters",
        trigger="--",
        pattern=re.compile(r"(?:^|(?<=\s))--[a-z]+\b(?:[ =]+[\d.:]+)?"),
        message="is a parameter of another program and is read as text",
        fix="remove it, and write the stage's own keys",
    ),
    Rule(
        kind="multi-prompt",
        trigger="::",
        pattern=re.compile(r"\w{1,30}::\s*-?\d[\d.]*"),
        message="is a weight of another program and is read as text",
        fix="write (word:1.2) and prompt_syntax: weighted if a weight is meant",
    ),
    Rule(
        kind="weight",
        trigger="(",
        pattern=re.compile(r"\((?!\d+\s*:)[^()]*:\s*[-+]?(?:[0-5]?\.\d+|[0-5])\s*\)|\(\([^()]*\){0,2}"),
        message="looks like a weight, but is read as text",
        fix=WEIGHTED,
        syntax="plain",
    ),
    Rule(
        kind="square brackets",
        trigger="[",
        pattern=re.compile(r"(?<!\\)\[[^\[\]|:]*\]"),
        message="looks like a lower weight, but is read as text",
        fix=WEIGHTED,
        syntax="plain",
    ),
    Rule(
        kind="escape",
        trigger="\\",
        pattern=re.compile(r"\\[()\[\]][^\\()\[\]]*(?:\\[()\[\]])?"),
        message="has backslashes, which are read as text",
        fix=f"remove them; {WEIGHTED}",
        syntax="plain",
    ),
    Rule(
        kind="BREAK",
        trigger="BREAK",
        pattern=re.compile(r"\bBREAK\b"),
        message="does not start a new chunk: it is read as text",
        fix=f"remove it; {WEIGHTED.replace('weights are', 'a new chunk is')}",
        syntax="plain",
    ),
    Rule(
        kind="parentheses",
        trigger="(",
        pattern=re.compile(r"\([^()]+\)"),
        message="is read as text: parentheses do not change weights",
        fix=f"nothing to do if it is text; {WEIGHTED}",
        syntax="plain",
        yields_to=frozenset({"weight", "escape", "weight after the bracket"}),
    ),
)

DOUBTS = {
    "unbalanced": ("is a bracket without its pair", r"close it, or write \( \) \[ \] for text"),
    "not-a-weight": ("is not followed by a number, and is read as text", r"write (word:1.2), or \( \) for text"),
}
"""Message and fix for each kind of doubt of the parser."""

_NETWORK = re.compile(r"<(lora|lyco|hypernet)\s*:\s*([^:<>]*)(?::\s*([^:<>]*))?[^<>]*>", re.IGNORECASE)
_ANGLE = re.compile(r"<([^<>:\s]+)>")
_QUOTE = re.compile(f"[{QUOTES}]")
_UNSEEN = re.compile(f"[{INVISIBLE}]|{JOINER}")


@dataclass(slots=True, kw_only=True)
class PromptWarnings:
    """Warnings about the prompts of one stage: each kind once, however many rows cause it.

    ``loras`` are the registered LoRAs, ``inversions`` the registered textual inversions that the stage does not list.
    """

    warnings: Warnings
    syntax: PromptSyntax
    family: Family
    loras: Sequence[str]
    inversions: Sequence[str]
    _found: set[str] = field(default_factory=set)
    _rules: tuple[Rule, ...] = field(init=False)

    def __post_init__(self) -> None:
        self._rules = tuple(rule for rule in RULES if rule.syntax in (None, self.syntax))

    def check(
        self,
        path: KeyPath,
        template: Template,
        values: Mapping[str, Any],
        prompt: str,
        doubts: Sequence[Doubt] = (),
    ) -> None:
        """Warn of what a filled-in prompt holds and probably should not; ``doubts`` are the parser's."""
        if not prompt or self.family.text == "none":
            return
        if _may_have_gap(prompt):
            self._check_gaps(path, template, values, prompt)
        if not _marked(prompt):
            return
        if not prompt.isascii():
            self._check_characters(path, template, prompt)
        if "<" in prompt:
            self._check_angles(path, template, prompt)
        for rule in self._rules:
            if rule.kind in self._found or rule.trigger not in prompt or not rule.yields_to.isdisjoint(self._found):
                continue
            if found := rule.pattern.search(prompt):
                message = f"{_quoted(found[0])} {rule.message}{self._row(template, found[0])}"
                self._add(path, rule.kind, message, self._fix(rule.fix))
        for doubt in doubts:
            if doubt.kind not in self._found:
                message, fix = DOUBTS[doubt.kind]
                quoted = _around(prompt, doubt.position)
                self._add(path, doubt.kind, f"{prompt[doubt.position]!r} in {quoted} {message}", fix)

    def _fix(self, fix: str) -> str:
        """Replace the advice to write weights for a family that does not take them."""
        if "prompt_syntax: weighted" in fix and not self.family.weighted_prompts:
            return f"{self.family.title} does not take weights; remove the brackets, or leave them as text"
        return fix

    def _check_gaps(self, path: KeyPath, template: Template, values: Mapping[str, Any], prompt: str) -> None:
        if not prompt.strip():
            message = f"is only white space{self._row(template, prompt)}"
            self._add(path, "blank", message, "write a prompt, or leave it out")
            return
        empty = next((name for name in sorted(template.names) if not str(values[name]).strip()), None)
        if empty and len(_GAP.findall(prompt)) > len(_GAP.findall(template.text)):
            message = f"{_quoted(prompt)} has a gap where {empty} is empty{self._row(template, prompt)}"
            self._add(path, "gap", message, f"fill it in, or write {{{{ {empty} | default('...', true) }}}}")

    def _check_characters(self, path: KeyPath, template: Template, prompt: str) -> None:
        if found := _QUOTE.search(prompt):
            row = self._row(template, found[0])
            message = f"{_around(prompt, found.start())} has the curly quote {found[0]!r}{row}"
            self._add(path, "quotes", message, "write ' or \", which text encoders know from their training")
        if found := _UNSEEN.search(prompt):
            row = self._row(template, found[0])
            message = f"{_around(prompt, found.start())} has the invisible character U+{ord(found[0]):04X}{row}"
            self._add(path, "invisible", message, "write a space, or remove it")

    def _check_angles(self, path: KeyPath, template: Template, prompt: str) -> None:
        for found in _NETWORK.finditer(prompt):
            kind = found[1].lower()
            if kind not in self._found:
                message = f"{_quoted(found[0])} is read as text; it loads nothing{self._row(template, found[0])}"
                self._add(path, kind, message, self._network_fix(found))
        for found in _ANGLE.finditer(prompt):
            if found[1] in self.inversions:
                fix = f"write textual_inversions: [{{checkpoint: {found[1]}}}] in the stage"
                message = f"{_quoted(found[0])} is not listed by the stage{self._row(template, found[0])}"
                self._add(path, "textual inversion", message, fix)

    def _row(self, template: Template, found: str) -> str:
        """Return ", in FILE:LINE" for a text that a row of a table brought; empty if it is in the template."""
        return f", in {self.warnings.row}" if self.warnings.row and found not in template.text else ""

    def _network_fix(self, found: re.Match[str]) -> str:
        kind, name, weight = found[1].lower(), found[2].strip(), (found[3] or "").strip()
        if kind == "hypernet":
            return "remove it; hypernetworks are not supported"
        alias = nearest_name(_comparable(name), self.loras, cutoff=0.5)
        more = f", weight: {weight}" if re.fullmatch(r"-?\d*\.?\d+", weight) else ""
        fix = f"remove it, and write loras: [{{checkpoint: {alias or 'ALIAS'}{more}}}] in the stage"
        return fix if alias else f"{fix}, after sdpipeline checkpoints add ALIAS FILE"

    def _add(self, path: KeyPath, kind: str, message: str, fix: str) -> None:
        if kind not in self._found:
            self._found.add(kind)
            self.warnings.add(path, ("prompt", kind, *path[:2]), message, fix)


def _marked(prompt: str) -> bool:
    """Return True if a rule may match. Most prompts end here, so this must cost less than a rule."""
    return (
        any(map(prompt.__contains__, _MARKS))
        or not prompt.isascii()
        or ("K" in prompt and "BREAK" in prompt)
        or ("D" in prompt and "AND" in prompt)
        or ("-" in prompt and "--" in prompt)
    )


def _may_have_gap(prompt: str) -> bool:
    """Return True if an empty value may have left a gap."""
    return "  " in prompt or ",," in prompt or ", ," in prompt or prompt[0] in _EDGES or prompt[-1] in _EDGES


def _comparable(name: str) -> str:
    """Return a file's name as an alias would be written."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower().removesuffix(".safetensors")).strip("-")


def _quoted(text: str) -> str:
    return repr(text if len(text) <= LONGEST_QUOTE else f"{text[: LONGEST_QUOTE - 3]}...")


def _around(text: str, position: int) -> str:
    """Quote the surroundings of a character."""
    start = max(0, position - LONGEST_QUOTE // 2)
    end = position + LONGEST_QUOTE // 2
    return repr(("..." if start else "") + text[start:end] + ("..." if end < len(text) else ""))
