"""Warnings about prompts: each kind once per stage, with the key that does what was meant."""

from __future__ import annotations

import re
import time
from contextlib import suppress
from pathlib import Path

import pytest

from sdpipeline.campaigns import expand
from sdpipeline.campaigns.loader import Campaign
from sdpipeline.errors import CampaignError
from tests.factories import CATALOG, campaign_of, checkpoint_files, input_folder

WEIGHTS = CATALOG | {
    files.alias: files
    for files in (checkpoint_files("gan", family="gan-upscale", scale=4), checkpoint_files("flow", family="sd3"))
}


def planned(text: str, folder: Path = Path("/nowhere")) -> Campaign:
    campaign = campaign_of(text, folder, catalog=WEIGHTS)
    list(expand.expand(campaign, input_folder(folder)))
    return campaign


def warned(prompt: str, syntax: str = "plain", more: str = "") -> list[str]:
    """Warnings about one prompt, without their place in the file."""
    text = f"""
prompt_syntax: {syntax}
variables: {{text: [{_quoted(prompt)}]}}
stages: [{{id: one, task: text-to-image, prompt: "{{{{ text }}}}"{more}}}]
"""
    return [str(each).split(": ", 1)[1] for each in planned(text).warnings.in_order()]


def _quoted(text: str) -> str:
    return "'" + text.replace("'", "''") + "'"


BOTH = {
    "a cat <lora:stile:0.8>": ("'<lora:stile:0.8>' is read as text", "loras: [{checkpoint: style, weight: 0.8}]"),
    "a cat <lora:elsewhere>": ("it loads nothing", "loras: [{checkpoint: ALIAS}] in the stage, after sdpipeline check"),
    "a cat <lyco:Style:1>": ("'<lyco:Style:1>'", "checkpoint: style, weight: 1"),
    "a cat <hypernet:x:1>": ("'<hypernet:x:1>'", "hypernetworks are not supported"),
    "a <toy>": ("'<toy>' is not listed by the stage", "textual_inversions: [{checkpoint: toy}]"),
    "a embedding:easy": ("'embedding:easy' is read as text", "textual_inversions:"),
    "a __colour__ cat": ("'__colour__' is a wildcard", "variables:"),
    "a {red|blue} cat": ("'{red|blue}' is a dynamic prompt, which is not expanded", "variables:"),
    "{2$$red|blue|green} cat": ("is a dynamic prompt", "variables:"),
    "a [cat|dog]": ("'[cat|dog]' does not alternate", "keep one"),
    "a [cat:dog:0.5]": ("'[cat:dog:0.5]' does not change the prompt while", "keep one"),
    "a [cat:10]": ("does not change the prompt while", "keep one"),
    "a cat AND a dog": ("'AND' does not combine", "write 'and'"),
    "a cat++ on grass": ("'cat++' does not add weight", "(word:1.2)"),
    "a (cat)1.3": ("'(cat)1.3' has its weight after the bracket", "(word:1.2)"),
    "a cat::2 dog": ("'cat::2' is a weight of another program", "(word:1.2)"),
    "a cat --ar 16:9": ("'--ar 16:9' is a parameter of another program", "remove it"),
    "a \u201cred\u201d cat": ("has the curly quote '\u201c'", "write '"),
    "a cat\u2019s toy": ("has the curly quote '\u2019'", "write '"),
    "a\u00a0cat": ("has the invisible character U+00A0", "write a space"),
    "a\u200b cat": ("has the invisible character U+200B", "write a space"),
    "a\u200dcat": ("has the invisible character U+200D", "write a space"),
    "   ": ("is only white space", "write a prompt"),
}
PLAIN = {
    "a (red:1.3) cat": ("'(red:1.3)' looks like a weight, but is read as text", "prompt_syntax: weighted"),
    "a ((red)) cat": ("'((red))' looks like a weight", "prompt_syntax: weighted"),
    "a [red] cat": ("'[red]' looks like a lower weight", "prompt_syntax: weighted"),
    r"saber \(fate\)": (r"has backslashes", "prompt_syntax: weighted"),
    "a cat BREAK a dog": ("'BREAK' does not start a new chunk", "prompt_syntax: weighted"),
    "a red (not blue) square": ("'(not blue)' is read as text: parentheses do not", "nothing to do if it is text"),
    "a poster (2026)": ("'(2026)' is read as text", "nothing to do if it is text"),
}
WEIGHTED = {
    "a (red cat": ("'(' in 'a (red cat' is a bracket without its pair", "close it"),
    "a red) cat": ("')' in 'a red) cat' is a bracket without its pair", "close it"),
    "a (note: red) cat": ("is not followed by a number", "(word:1.2)"),
}


@pytest.mark.parametrize("syntax", ["plain", "weighted"])
@pytest.mark.parametrize("prompt", BOTH)
def test_syntax_of_other_programs_is_warned_of_in_either_syntax(prompt: str, syntax: str) -> None:
    message, fix = BOTH[prompt]
    found = [each for each in warned(prompt, syntax) if message in each and fix in each]
    assert len(found) == 1, warned(prompt, syntax)


@pytest.mark.parametrize("prompt", PLAIN)
def test_what_plain_reads_as_text_is_warned_of(prompt: str) -> None:
    message, fix = PLAIN[prompt]
    [found] = warned(prompt)
    assert message in found
    assert fix in found
    assert warned(prompt, "weighted") == []


@pytest.mark.parametrize("prompt", WEIGHTED)
def test_what_weighted_probably_misreads_is_warned_of(prompt: str) -> None:
    message, fix = WEIGHTED[prompt]
    [found] = warned(prompt, "weighted")
    assert message in found
    assert fix in found


@pytest.mark.parametrize("syntax", ["plain", "weighted"])
@pytest.mark.parametrize(
    "prompt",
    [
        "a red square, on a white ground; 50% off & more!",
        "don't - a well-known 'quote', \"quoted\"",
        "a mug with SALT AND PEPPER on it",
        "LAND, BREAKFAST, a C++ logo",
        "snake_case and a/b c:d, at 12:30",
        "une fenêtre à Paris, 東京の夜",
        "a family \U0001f468\u200d\U0001f469\u200d\U0001f467",
        "line one\nline two",
        "a cell with  two spaces, and one at its end ",
    ],
)
def test_ordinary_words_are_not_warned_of(prompt: str, syntax: str) -> None:
    assert warned(prompt, syntax) == []


@pytest.mark.parametrize(
    ("template", "gaps"),
    [
        ("a small {{ colour }} square", 1),
        ("a square, {{ colour }}, on white", 1),
        ("{{ colour }} square", 1),
        ("a {{ colour }}", 1),
        ("a square{{ colour }} on white", 0),
        ("a {{ colour | default('red', true) }} square", 0),
        ("a  double space", 0),
    ],
)
def test_a_gap_that_an_empty_value_leaves_is_warned_of(template: str, gaps: int) -> None:
    text = f"""
variables: {{colour: [""], x: [1]}}
stages: [{{id: one, task: text-to-image, prompt: "{template}", negative_prompt: "b{{{{ x }}}}{{{{ colour }}}}"}}]
"""
    found = [str(each) for each in planned(text).warnings.in_order()]
    assert sum("has a gap where colour is empty" in each for each in found) == gaps == len(found)


def test_each_kind_is_warned_of_once_per_stage_however_many_rows_have_it(tmp_path: Path) -> None:
    (tmp_path / "p.tsv").write_text("sku\ttext\n" + "".join(f"{n}\ta (red:1.{n}) cat, [dim]\n" for n in range(9)))
    text = """
variables: {rows: {file: p.tsv, key: sku}}
defaults: {negative_prompt: "(ugly:1.4), BREAK"}
stages:
  - {id: one, task: text-to-image, prompt: "{{ text }}"}
  - {id: two, task: image-to-image, prompt: "{{ text }} {{ sku }}", image: {stage: one}}
"""
    found = [(each.key, str(each)) for each in planned(text, tmp_path).warnings.in_order()]
    assert [key for key, each in found if "looks like a weight" in each] == ["stages[0].prompt", "stages[1].prompt"]
    assert [key for key, each in found if "looks like a lower weight" in each] == [
        "stages[0].prompt",
        "stages[1].prompt",
    ]
    assert [key for key, each in found if "BREAK" in each] == ["defaults.negative_prompt"]


def test_a_warning_names_the_row_that_brings_its_text(tmp_path: Path) -> None:
    (tmp_path / "p.tsv").write_text("sku\tnote\tword\n1\tnew\tcat\n2\t\tcat\n3\tnew\t“cat”\n4\t\t“cat”\n")
    text = """
variables: {rows: {file: p.tsv, key: sku}}
stages: [{id: one, task: text-to-image, prompt: "a {{ word }}, {{ note }}, [dim] --ar 16:9 light"}]
"""
    found = [str(each) for each in planned(text, tmp_path).warnings.in_order()]
    ends = {each.split(": ", 2)[2].split(" (")[0] for each in found}
    assert "'[dim]' looks like a lower weight, but is read as text" in ends
    assert "'--ar 16:9' is a parameter of another program and is read as text" in ends
    assert any(each.endswith("has a gap where note is empty, in p.tsv:3") for each in ends)
    assert any(each.endswith("has the curly quote '“', in p.tsv:4") for each in ends)


def test_the_fix_for_a_family_without_weights_does_not_offer_them() -> None:
    [found] = warned("a (red:1.3) cat", more=", checkpoint: flow")
    assert "Stable Diffusion 3 does not take weights; remove the brackets" in found


def test_a_listed_textual_inversion_is_not_warned_of() -> None:
    assert warned("a <toy>", more=", textual_inversions: [{checkpoint: toy}]") == []


@pytest.mark.parametrize(
    "piece", ["[:1", "{|", "__a ", "<lora:", "(:", "--a ", "a" * 99 + "++", "aaaa::", "(a)", "\\(", ", ", " AND"]
)
@pytest.mark.parametrize("syntax", ["plain", "weighted"])
def test_the_longest_prompt_is_checked_in_time(piece: str, syntax: str) -> None:
    began = time.process_time()
    with suppress(CampaignError):
        warned(piece * (19_000 // len(piece)), syntax)
    assert time.process_time() - began < 2


def _examples() -> list[tuple[str, str]]:
    """Every YAML example of the documentation that names a prompt, and the bundled campaign."""
    root = Path(__file__).parents[3]
    found = [("campaign.yaml", (root / "sdpipeline/demo/campaign.yaml").read_text())]
    for page in sorted([root / "README.md", *(root / "docs").rglob("*.md")]):
        blocks = re.findall(r"```yaml\n(.*?)```", page.read_text(), re.DOTALL)
        found += [(f"{page.stem}-{n}", block) for n, block in enumerate(blocks) if "prompt:" in block]
    return found


@pytest.mark.parametrize(("name", "text"), _examples(), ids=[name for name, _ in _examples()])
def test_no_example_of_ours_is_warned_of(name: str, text: str) -> None:
    syntax = "weighted" if "prompt_syntax: weighted" in text else "plain"
    prompts = [line.strip(" '\"") for line in re.findall(r"\b(?:negative_)?prompt: *(.+)", text)]
    filled = [re.sub(r"\{\{.*?\}\}", "word", prompt) for prompt in prompts]
    assert [warned(prompt, syntax) for prompt in filled] == [[] for _ in filled], name
