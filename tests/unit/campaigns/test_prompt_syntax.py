"""Selection of a stage's prompt syntax, and the refusal of weights that are not valid."""

from __future__ import annotations

from pathlib import Path

import pytest

from sdpipeline.batching import batch_key
from sdpipeline.domain import fingerprint, request_from_document, to_document
from sdpipeline.errors import CampaignError
from tests.factories import CATALOG, checkpoint_files, jobs_of, mistakes_of, request

WEIGHTS = CATALOG | {
    files.alias: files
    for files in (checkpoint_files("gan", family="gan-upscale", scale=4), checkpoint_files("flow", family="sd3"))
}
STAGES = """
defaults: {{width: 64, height: 64}}
stages:
  - {{id: draft, task: text-to-image, prompt: a circle{draft}}}
  - {{id: final, task: image-to-image, prompt: a circle, image: {{stage: draft}}{final}}}
  - {{id: large, task: super-resolution, checkpoint: gan, image: {{stage: final}}{large}}}
"""


def _chosen(campaign: str = "", draft: str = "", final: str = "", large: str = "") -> dict[str, str]:
    text = f"{campaign}\n" + STAGES.format(draft=draft, final=final, large=large)
    found = {job.stage: job.request for job in jobs_of(text, catalog=WEIGHTS)}
    assert all(request_from_document(to_document(request)) == request for request in found.values())
    return {stage: request.prompt_syntax for stage, request in found.items()}


def _mistakes(campaign: str = "", **stages: str) -> list[str]:
    with pytest.raises(CampaignError) as raised:
        _chosen(campaign, **stages)
    return [str(mistake).split(": ", 1)[1] for mistake in raised.value.mistakes]


@pytest.mark.parametrize(
    ("campaign", "draft", "syntaxes"),
    [
        ("", "", ("plain", "plain")),
        ("prompt_syntax: weighted", "", ("weighted", "weighted")),
        ("prompt_syntax: weighted", ", prompt_syntax: plain", ("plain", "weighted")),
        ("", ", prompt_syntax: weighted", ("weighted", "plain")),
    ],
)
def test_a_stages_own_syntax_comes_before_the_campaigns(campaign: str, draft: str, syntaxes: tuple[str, str]) -> None:
    chosen = _chosen(campaign, draft)
    assert (chosen["draft"], chosen["final"]) == syntaxes
    assert chosen["large"] == "plain"


def test_a_family_without_weights_is_refused_by_name_where_it_is_asked_for() -> None:
    flow, gan = ", checkpoint: flow", ", prompt_syntax: weighted"
    refused = "Stable Diffusion 3 does not take weighted prompts"
    own = _mistakes(draft=f"{flow}, prompt_syntax: weighted")
    assert own == [f"stages[0].prompt_syntax: {refused} (write prompt_syntax: plain)"]
    campaigns = _mistakes("prompt_syntax: weighted", draft=flow)
    assert campaigns == [f"prompt_syntax: stage 'draft': {refused} (write prompt_syntax: plain in that stage)"]
    assert _chosen("prompt_syntax: weighted", f"{flow}, prompt_syntax: plain")["draft"] == "plain"
    assert "does not take weighted prompts" in _mistakes(large=gan)[0]


def test_a_word_that_is_not_a_syntax_is_refused() -> None:
    [found] = _mistakes("prompt_syntax: wieghted")
    assert found == "prompt_syntax: found 'wieghted' (did you mean 'weighted'?)"


def test_a_syntax_changes_the_fingerprint_and_not_the_batch_and_plain_changes_neither() -> None:
    plain, weighted = request(), request(prompt_syntax="weighted")
    assert "prompt_syntax" not in to_document(plain)
    assert fingerprint(plain) != fingerprint(weighted)
    assert batch_key(plain) == batch_key(weighted)


@pytest.mark.parametrize("key", ["prompt", "negative_prompt"])
def test_a_bad_weight_is_refused_with_its_place_and_its_row(key: str, tmp_path: Path) -> None:
    (tmp_path / "p.tsv").write_text("sku\ttext\n1\ta (red:1.2) cat\n2\ta (red:9) cat\n")
    text = f"""
prompt_syntax: weighted
variables: {{rows: {{file: p.tsv, key: sku}}}}
stages: [{{id: one, task: text-to-image, prompt: "a {{{{ sku }}}}", {key}: "{{{{ text }}}} {{{{ sku }}}}"}}]
""".replace('prompt: "a {{ sku }}", prompt:', "prompt:")
    [found] = mistakes_of(text, tmp_path)
    assert f"stages[0].{key}: at character 7, in 'a (red:9) cat 2': '9' is not a weight" in found
    assert r"a weight is a number from 0 to 5, in p.tsv:3 (write \( and \) around text" in found


def test_ten_thousand_brackets_are_refused_and_not_a_crash() -> None:
    text = f"stages: [{{id: one, task: text-to-image, prompt_syntax: weighted, prompt: '{'(' * 10_000}'}}]"
    [found] = mistakes_of(text)
    assert "at character 51" in found
    assert len(found) < 250


@pytest.mark.parametrize("prompt", ["a (bad:1.2) word", "a b(ad:1.0) word", "a bad BREAK word", r"a b\ad (word)"])
def test_weights_do_not_hide_a_denied_phrase(prompt: str) -> None:
    text = f"""
policy: {{deny: [bad word]}}
stages: [{{id: one, task: text-to-image, prompt_syntax: weighted, prompt: '{prompt}'}}]
"""
    [job] = jobs_of(text)
    assert job.blocked == "policy.deny: 'bad word'"


def test_a_wrong_weight_of_a_constant_prompt_is_one_mistake_however_many_rows(tmp_path: Path) -> None:
    (tmp_path / "things.csv").write_text("sku,seen\nA,cat\nB,dog\nC,fox\n")
    text = """
variables: {{rows: {{file: things.csv, key: sku, columns: {{seen: seen}}}}}}
prompt_syntax: weighted
stages: [{{id: one, task: text-to-image, prompt: '{prompt}', negative_prompt: '{{{{ seen }}}}'}}]
"""
    constant = mistakes_of(text.format(prompt="a (red:nan) cat"), tmp_path)
    assert len(constant) == 1
    assert "things.csv" not in constant[0]
    of_rows = mistakes_of(text.format(prompt="a ({{ seen }}:nan)"), tmp_path)
    assert [mistake.rpartition("things.csv:")[2][:1] for mistake in of_rows] == ["2", "3", "4"]
