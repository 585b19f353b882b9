"""Policies: words in any spelling, checkpoints in any place, sizes from any source."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from sdpipeline.campaigns import policy
from sdpipeline.campaigns.policy import DEPLOYMENT, Rules
from sdpipeline.campaigns.spec import Policy
from sdpipeline.errors import CampaignError, SettingsError
from tests.factories import campaign_of, checkpoint_files, jobs_of, mistakes_of

SPIDERS = Rules(Policy(deny=["widow"], allow=["black widow spider"]))


def denied(prompt: str, *deny: str) -> bool:
    return Rules(Policy(deny=list(deny))).denial(prompt) is not None


@pytest.mark.parametrize(
    "prompt",
    [
        "a widow",
        "WIDOW, at dusk",
        "the widow's house",
        "a (widow:1.2) in black",
        "black_widow",
        "widow/orphan",
        "a “widow”…",
        "\uff57\uff49\uff44\uff4f\uff57",  # full width
        "\U0001d430\U0001d422\U0001d41d\U0001d428\U0001d430",  # mathematical bold
        "wi\u200bdow",  # zero-width space
        "wi\u00addow",  # soft hyphen
        "w\u2060i\u200dd\ufe0fow\U000e0020",
        "w\u0336i\u0336d\u0336o\u0336w\u0336",  # struck through
        "a\u00a0widow\u2003at\nnight",
    ],
)
def test_a_denied_word_is_found_however_it_is_written(prompt: str) -> None:
    assert denied(prompt, "widow")


@pytest.mark.parametrize("prompt", ["widowed", "a window", "wid ow", "", "witwe"])
def test_only_whole_words_are_denied(prompt: str) -> None:
    assert not denied(prompt, "widow")


@pytest.mark.parametrize(
    ("phrase", "prompt", "expected"),
    [
        ("Black  Widow!", "a black, widow", True),
        ("black widow", "BLACK-WIDOW", True),
        ("black widow", "black\u00a0\n widow", True),
        ("black widow", "widow black", False),
        ("black widow", "black and widow", False),
        ("straße", "die STRASSE", True),
        ("İstanbul", "i̇stanbul", True),
        ("café", "cafe\u0301", True),
        ("हिन्दी", "एक हिन्दी चित्र", True),
        ("हिन्दी", "हिन्दू", False),
        ("🔫", "a 🔫gun", True),
        ("👍", "so 👍🏽 good", True),
        ("50", "50 cents", True),
        ("50", "1950", False),
    ],
)
def test_phrases_are_compared_word_by_word_in_any_script(phrase: str, prompt: str, *, expected: bool) -> None:
    assert denied(prompt, phrase) is expected


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        ("a black widow spider", None),
        ("a Black-Widow  SPIDER", None),
        ("a black widow", "policy.deny: 'widow'"),
        ("a black widow spider beside a widow", "policy.deny: 'widow'"),
        ("a widow spider", "policy.deny: 'widow'"),
    ],
)
def test_a_denied_word_is_fine_inside_an_allowed_phrase_and_nowhere_else(prompt: str, expected: str | None) -> None:
    assert SPIDERS.denial(prompt) == expected


def test_the_rule_is_named_as_it_is_written_and_the_prompt_is_not() -> None:
    rules = Rules(Policy(deny=["x", "Lily  of the valley"]), name=DEPLOYMENT)
    assert rules.denial("secret lily-of-the-valley") == "deployment policy.deny: 'Lily  of the valley'"


CHAIN = """
    variables: {who: [widow, star]}
    policy: {deny: [widow], allow: [POLICY]}
    stages:
      - {id: draft, task: text-to-image, prompt: "a {{ who }}", negative_prompt: widow}
      - {id: scene, task: image-to-image, prompt: x, image: {stage: draft}}
"""


def test_only_the_denied_jobs_are_blocked_and_a_negative_prompt_is_none() -> None:
    found = [(job.stage, dict(job.variables).get("who"), job.blocked) for job in jobs_of(CHAIN)]
    assert found == [
        ("draft", "widow", "policy.deny: 'widow'"),
        ("scene", "widow", None),
        ("draft", "star", None),
        ("scene", "star", None),
    ]


def test_neither_policy_allows_what_the_other_denies() -> None:
    strict = Rules(Policy(deny=["star", "widow"], allow=["a widow"]), name=DEPLOYMENT)
    loosened = CHAIN.replace("POLICY", "a star, a widow").replace("deny: [widow]", "deny: [x]")
    own = [job.blocked for job in jobs_of(CHAIN, deployment=strict) if job.stage == "draft"]
    both = [job.blocked for job in jobs_of(loosened, deployment=strict) if job.stage == "draft"]
    assert own == ["policy.deny: 'widow'", "deployment policy.deny: 'star'"]
    assert both == [None, "deployment policy.deny: 'star'"]


def test_a_policy_changes_no_fingerprint_and_no_identity() -> None:
    without = jobs_of(CHAIN.replace("policy:", "# policy:"))
    assert [(job.fingerprint, job.identity) for job in jobs_of(CHAIN)] == [
        (job.fingerprint, job.identity) for job in without
    ]


EVERYTHING = """
    policy: {checkpoints: ALLOWED}
    stages:
      - id: draft
        task: text-to-image
        prompt: <toy>
        loras: [{checkpoint: style}]
        textual_inversions: [{checkpoint: toy}]
        vae: sharp
      - id: scene
        task: text-to-image
        prompt: x
        controlnets:
          - {checkpoint: shapes-canny, image: {stage: draft}}
          - {checkpoint: shapes-canny, image: {stage: draft}, annotator: depth-learned, annotator_checkpoint: depths}
        ip_adapters: [{checkpoint: face, image: {stage: draft}}]
      - {id: final, task: super-resolution, checkpoint: upscaler, prompt: x, image: {stage: scene}}
"""
KEYS = {
    "shapes": ["checkpoint"],
    "style": ["stages[0].loras[0].checkpoint"],
    "toy": ["stages[0].textual_inversions[0].checkpoint"],
    "sharp": ["stages[0].vae"],
    "shapes-canny": ["stages[1].controlnets[0].checkpoint", "stages[1].controlnets[1].checkpoint"],
    "depths": ["stages[1].controlnets[1].annotator_checkpoint"],
    "face": ["stages[1].ip_adapters[0].checkpoint"],
    "upscaler": ["stages[2].checkpoint"],
}


@pytest.mark.parametrize("forbidden", KEYS)
def test_a_checkpoint_that_the_policy_does_not_name_is_refused_wherever_it_is_used(forbidden: str) -> None:
    allowed = [alias for alias in KEYS if alias != forbidden]
    found = mistakes_of(EVERYTHING.replace("ALLOWED", str(allowed)))
    assert [line.split(": ")[1] for line in found] == KEYS[forbidden]
    assert all(f"policy.checkpoints does not allow '{forbidden}'" in line for line in found)


def test_what_the_policy_names_may_be_used_and_a_default_that_no_stage_uses_is_not_asked() -> None:
    assert mistakes_of(EVERYTHING.replace("ALLOWED", str(list(KEYS)))) == []
    text = """
        policy: {checkpoints: [flux]}
        stages: [{id: only, task: text-to-image, checkpoint: flux, prompt: x}]
    """
    assert mistakes_of(text) == []


@pytest.mark.parametrize(
    ("sizes", "expected"),
    [
        ("{width: 64, height: 128}", []),
        (
            "{width: 128, height: 64}",
            ["defaults.width: makes a picture of width 128, policy.max_width is 64 (make"],
        ),
        ("{height: 256}", ["defaults.height: makes a picture of height 256, policy.max_height is 128"]),
        ("{clip_skip: 1}", ["stages[0].width: makes a picture of width 512, policy.max_width is 64"]),
    ],
)
def test_a_size_that_the_file_says_is_refused_at_its_key(sizes: str, expected: list[str]) -> None:
    text = f"""
defaults: {sizes}
policy: {{max_width: 64, max_height: 128}}
stages: [{{id: only, task: text-to-image, prompt: x}}]
"""
    found = mistakes_of(text)
    assert len(found) == len(expected)
    for line, start in zip(found, expected, strict=True):
        assert line.split(": ", 1)[1].startswith(start)


def test_a_size_that_a_row_says_is_refused_naming_the_row(tmp_path: Path) -> None:
    (tmp_path / "sizes.csv").write_text("name,w\nA,64\nB,128\n")
    text = """
        variables: {rows: {file: sizes.csv}}
        policy: {max_width: 64}
        stages: [{id: only, task: text-to-image, prompt: "{{ name }}", width: "{{ w }}", height: 64}]
    """
    (line,) = mistakes_of(text, tmp_path)
    assert "stages[0].width: makes a picture of width 128, policy.max_width is 64, in sizes.csv:3" in line


def test_an_enlarged_picture_counts_at_its_full_size() -> None:
    text = """
        policy: {max_width: 128}
        defaults: {width: 64, height: 64}
        stages:
          - {id: draft, task: text-to-image, prompt: x}
          - {id: final, task: super-resolution, checkpoint: upscaler, prompt: x, image: {stage: draft}}
    """
    (line,) = mistakes_of(text)
    assert "stages[1].width: makes a picture of width 256, policy.max_width is 128" in line


@pytest.mark.parametrize("head", ["", "policy:\n  "])
def test_the_deployments_policy_stands_under_its_key_or_alone(head: str, tmp_path: Path) -> None:
    file = tmp_path / "policy.yaml"
    file.write_text(f"{head}deny: [widow]\n")
    assert policy.load(file).denial("a widow") == "deployment policy.deny: 'widow'"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("deny: [widow]\nmax_widht: 64\n", "2:1: max_widht: unknown key (did you mean 'max_width'?)"),
        ("policy:\n  max_width: wide\n", "2:3: policy.max_width: found 'wide', expected a whole number"),
        ("deny:\n  - ' - '\n", "2:5: deny[0]: there is no word in ' - ' (write a word or a phrase)"),
        ("deny: [widow", "1:13: is not YAML"),
        ("- widow\n", "1:1: is not a policy (write checkpoints:, licences:, purposes:, safety_checker:, max_width:, "),
        ("", "1:1: is not a policy"),
    ],
)
def test_a_mistake_in_the_deployments_policy_is_named_with_its_line(text: str, expected: str, tmp_path: Path) -> None:
    file = tmp_path / "policy.yaml"
    file.write_text(text)
    with pytest.raises(SettingsError) as refused:
        policy.load(file)
    assert str(refused.value).startswith(f"{file}:{expected}")


def test_a_phrase_without_a_word_is_refused_in_a_campaign_too() -> None:
    text = "policy: {deny: ['!']}\nstages: [{id: only, task: text-to-image, prompt: x}]\n"
    assert mistakes_of(text) == ["3:17: policy.deny[0]: there is no word in '!' (write a word or a phrase)"]


# Terms under which checkpoints were approved.


def refused_terms(policy: str, **terms: Any) -> str | None:
    """The policy's messages for a campaign whose checkpoint is registered under these terms."""
    files = replace(checkpoint_files("shapes"), **terms)
    text = f"policy: {policy}\nstages: [{{id: draft, task: text-to-image, prompt: a cat}}]\n"
    try:
        campaign_of(f"{text}defaults: {{width: 64, height: 64}}\n", catalog={"shapes": files})
    except CampaignError as error:
        (mistake,) = error.mistakes
        assert mistake.fix is not None
        assert "checkpoints add shapes" in mistake.fix
        return mistake.message
    return None


@pytest.mark.parametrize(
    ("policy", "terms", "why"),
    [
        ("{licences: [apache-2.0]}", {"licence": "apache-2.0"}, None),
        ("{licences: [apache-2.0]}", {"licence": "research-only"}, "'shapes' is under 'research-only', "),
        ("{licences: [apache-2.0]}", {}, "'shapes' is registered without a licence, "),
        ("{licences: []}", {"licence": "apache-2.0"}, "policy.licences allows none"),
        ("{purposes: [web]}", {"purposes": ("web", "print")}, None),
        ("{purposes: [web, print]}", {"purposes": ("web",)}, "'shapes' is not approved for print, "),
        ("{}", {}, None),
    ],
)
def test_weights_are_held_to_the_terms_they_were_approved_under(
    policy: str, terms: dict[str, Any], why: str | None
) -> None:
    said = refused_terms(policy, **terms)
    assert (said is None) == (why is None)
    assert why is None or why in str(said)
