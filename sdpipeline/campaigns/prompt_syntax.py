"""Choice and validation of a stage's prompt syntax, and the check of each of its prompts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from sdpipeline.campaigns.prompt_warnings import PromptWarnings
from sdpipeline.campaigns.spec import CampaignSpec
from sdpipeline.campaigns.stage_spec import Stage
from sdpipeline.campaigns.templates import Template
from sdpipeline.campaigns.warnings import Warnings
from sdpipeline.campaigns.yaml_source import Faults, KeyPath
from sdpipeline.domain import PromptSyntax
from sdpipeline.engine.checkpoints import CheckpointFiles
from sdpipeline.engine.families import Family, prompt_syntax_refusal
from sdpipeline.engine.weighted_prompts import parse

ESCAPE = r"write \( and \) around text that is in brackets"


def chosen(spec: CampaignSpec, stage: Stage, row: Family) -> PromptSyntax:
    """Return a stage's syntax: its own, else the campaign's; ``plain`` for a family without prompts."""
    return "plain" if row.text == "none" else stage.prompt_syntax or spec.prompt_syntax


def check_fit(spec: CampaignSpec, stage: Stage, path: KeyPath, faults: Faults, row: Family) -> None:
    """Refuse weighted prompts for a family that does not take them."""
    own = stage.prompt_syntax is not None
    refused = prompt_syntax_refusal(row, stage.prompt_syntax or spec.prompt_syntax)
    if refused and own:
        faults.add((*path, "prompt_syntax"), refused.message, refused.fix)
    elif refused and row.text != "none":
        faults.add(("prompt_syntax",), f"stage {stage.id!r}: {refused.message}", f"{refused.fix} in that stage")


@dataclass(slots=True)
class PromptCheck:
    """Check of the prompts of one stage, for one combination after the other."""

    syntax: PromptSyntax
    warnings: PromptWarnings
    _last: dict[KeyPath, tuple[str, str]] = field(default_factory=dict)

    def words(self, path: KeyPath, template: Template, values: Mapping[str, Any], prompt: str) -> str:
        """Return a prompt without its syntax; warn of what is probably not meant. Raises WeightRefusedError."""
        last, words = self._last.get(path, ("", ""))
        if last != prompt:
            words = self._checked(path, template, values, prompt)
            self._last[path] = prompt, words
        return words

    def _checked(self, path: KeyPath, template: Template, values: Mapping[str, Any], prompt: str) -> str:
        if self.syntax == "plain":
            self.warnings.check(path, template, values, prompt)
            return prompt
        parsed = parse(prompt)
        self.warnings.check(path, template, values, prompt, parsed.doubts)
        return parsed.text


def prompt_check(
    spec: CampaignSpec, stage: Stage, row: Family, catalog: Mapping[str, CheckpointFiles], warnings: Warnings
) -> PromptCheck:
    """Return the check of this stage's prompts."""
    syntax = chosen(spec, stage, row)
    aliases = {kind: _aliases(kind, catalog) for kind in ("lora", "textual-inversion")}
    listed = {use.checkpoint for use in stage.textual_inversions}
    about = PromptWarnings(
        warnings=warnings,
        syntax=syntax,
        family=row,
        loras=aliases["lora"],
        inversions=[alias for alias in aliases["textual-inversion"] if alias not in listed],
    )
    return PromptCheck(syntax=syntax, warnings=about)


def _aliases(kind: str, catalog: Mapping[str, CheckpointFiles]) -> list[str]:
    return sorted(alias for alias, files in catalog.items() if files.kind == kind)
