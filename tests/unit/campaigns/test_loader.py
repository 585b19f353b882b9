# ruff: noqa: E501 -- a mistake is one line, regardless of its length

from __future__ import annotations

from pathlib import Path

import pytest

from sdpipeline.campaigns import yaml_source
from sdpipeline.campaigns.loader import MAX_JOBS, check
from sdpipeline.errors import CampaignError
from tests.factories import CATALOG, campaign_of, checkpoint_files, input_folder, mistakes_of

FILE = """
name: spring
checkpoint: shapes
variables:
  colour: [red, blue]
seeds: {start: 0, count: 2}
defaults: {width: 128, height: 128, num_inference_steps: 20}
stages:
  - id: draft
    task: text-to-image
    prompt: "a {{ colour }} circle"
  - id: final
    task: image-to-image
    image: {stage: draft}
    prompt: "a {{ colour }} circle at night"
    strength: 0.5
"""


def changed(*changes: tuple[str, str]) -> str:
    """The file above with replaced texts; each must occur exactly once."""
    text = FILE
    for old, new in changes:
        assert text.count(old) == 1, old
        text = text.replace(old, new)
    return text


def test_the_file_that_the_mistakes_below_are_made_in_is_right() -> None:
    assert mistakes_of(FILE) == []


@pytest.mark.parametrize(
    ("old", "new", "expected"),
    [
        # The file's shape
        ("seeds:", "sedes:", "5:1: sedes: unknown key (did you mean 'seeds'?)"),
        ("task: image", "taks: image", "12:5: stages[1].taks: unknown key (did you mean 'task'?)"),
        ("    strength:", "    strenght:", "15:5: stages[1].strenght: unknown key (did you mean 'strength'?)"),
        ("count: 2}", "cuont: 2}", "5:19: seeds.cuont: unknown key (did you mean 'count'?)"),
        ("{stage: draft}", "{satge: draft}", "13:13: stages[1].image.satge: unknown key (did you mean 'stage'?)"),
        (
            "name: spring",
            "name: ../../etc",
            "1:1: name: found '../../etc', expected a name of a-z, 0-9 and -, at most 63, that does not start with -",
        ),
        (
            "id: final",
            'id: "a/b"',
            "11:5: stages[1].id: found 'a/b', expected a name of a-z, 0-9 and -, at most 63, that does not start with -",
        ),
        ("name: spring", "name: 7", "1:1: name: found 7, expected a text"),
        ("name: spring", "name: spring\nreuse: at times", "2:1: reuse: found 'at times', expected true or false"),
        ("count: 2}", "count: many}", "5:19: seeds.count: found 'many', expected a whole number"),
        ("count: 2}", "count: true}", "5:19: seeds.count: found true, expected a whole number"),
        ("count: 2}", 'count: "2"}', "5:19: seeds.count: found '2', expected a whole number"),
        ("count: 2}", "count: 0}", "5:19: seeds.count: found 0, expected at least 1"),
        ("count: 2}", "count: 9999999}", "5:19: seeds.count: found 9999999, expected at most 1,000,000"),
        ("start: 0", "start: -1", "5:9: seeds.start: found -1, expected at least 0"),
        ("{start: 0, count: 2}", "[]", "5:1: seeds: found a list, expected at least one entry"),
        ("{start: 0, count: 2}", "three", "5:1: seeds: found 'three', expected keys with values"),
        ("{start: 0, count: 2}", "[1, 2, 1]", "5:15: seeds[2]: the seed 1 is listed twice (remove one)"),
        ("[red, blue]", "red", "4:3: variables.colour: found 'red', expected a list of values"),
        ("[red, blue]", "[]", "4:3: variables.colour: found an empty list, expected a list of values"),
        (
            "[red, blue]",
            "[red, [blue]]",
            "4:17: variables.colour[1]: found a list, expected a text, a number, true or false",
        ),
        (
            "[red, blue]",
            "[red, null]",
            "4:17: variables.colour[1]: found nothing, expected a text, a number, true or false",
        ),
        ("[red, blue]", "[red, red]", "4:17: variables.colour[1]: 'red' is listed twice (remove one)"),
        (
            "  colour: [red, blue]",
            "  colour: [red, blue]\n  2nd: [x]",
            "5:3: variables.2nd: is not a valid variable name (a letter or _ first, then letters, digits and _, at most 63)",
        ),
        ("{stage: draft}", "draft", "13:5: stages[1].image: found 'draft', expected keys with values"),
        ("width: 128", "width: true", "6:12: defaults.width: found true, expected a whole number or a template"),
        ("width: 128", "width: 12.5", "6:12: defaults.width: found 12.5, expected a whole number or a template"),
        ("strength: 0.5", "strength: [1]", "15:5: stages[1].strength: found a list, expected a number or a template"),
        # Numbers
        ("width: 128", "width: 0", "6:12: defaults.width: 0 is not from 8 to 8192"),
        ("width: 128", "width: -128", "6:12: defaults.width: -128 is not from 8 to 8192"),
        ("width: 128", "width: 100000", "6:12: defaults.width: 100000 is not from 8 to 8192"),
        ("width: 128", "width: 100", "6:12: defaults.width: 100 is not a multiple of 8 (write 96)"),
        ("width: 128", "width: wide", "6:12: defaults.width: 'wide' is not a whole number from 8 to 8192"),
        ("num_inference_steps: 20", "num_inference_steps: 0", "6:37: defaults.num_inference_steps: 0 is not from 1 to"),
        ("strength: 0.5", "strength: .nan", "15:15: stages[1].strength: .nan is not a finite number (write a number)"),
        ("strength: 0.5", 'strength: "nan"', "15:5: stages[1].strength: 'nan' is not a number from 0 to 1"),
        ("strength: 0.5", "strength: 1.01", "15:5: stages[1].strength: 1.01 is not from 0 to 1"),
        (
            "strength: 0.5",
            "strength: 0.01",
            "15:5: stages[1].strength: 0.01 of 20 steps is less than one step (raise strength or num_inference_steps)",
        ),
        ("strength: 0.5", "guidance_scale: .inf", "15:21: stages[1].guidance_scale: .inf is not a finite number"),
        ("strength: 0.5", "guidance_scale: -1", "15:5: stages[1].guidance_scale: -1 is not from 0 to 100"),
        # Templates
        (
            "a {{ colour }} circle at night",
            "{{ color }}",
            "14:5: stages[1].prompt: the variable 'color' is not declared (did you mean 'colour'?)",
        ),
        (
            "a {{ colour }} circle at night",
            "{{ ''.__class__ }}",
            "14:5: stages[1].prompt: reaching into a value with a dot is not allowed in a template",
        ),
        (
            "a {{ colour }} circle at night",
            "{{ colour",
            "14:5: stages[1].prompt: is not a template: a {{ or {% has no end",
        ),
        (
            "[red, blue]",
            "[red, blue]\n  shape: [circle]",
            "5:3: variables.shape: the variable 'shape' is never used (use it or remove it)",
        ),
        # Stages
        ("id: final", "id: draft", "11:5: stages[1].id: there are two stages 'draft' (rename one)"),
        ("{stage: draft}", "{stage: drfat}", "13:13: stages[1].image.stage: no stage 'drfat' (did you mean 'draft'?)"),
        ("{stage: draft}", "{stage: final}", "13:13: stages[1].image.stage: 'final' cannot use its own picture"),
        ("{stage: draft}", "{}", "13:5: stages[1].image: needs exactly one of stage:, file: and url:"),
        (
            "{stage: draft}",
            "{url: 's3://b/{{ color }}'}",
            "13:13: stages[1].image.url: the variable 'color' is not declared (did you mean 'colour'?)",
        ),
        ("{stage: draft}", "{url: 's3://b'}", "13:13: stages[1].image.url: 's3://b' is not s3://bucket/key"),
        ("{stage: draft}", "{stage: draft, file: x}", "13:5: stages[1].image: needs exactly one of stage:, file: and url:"),
        (
            "    image: {stage: draft}\n",
            "",
            "11:5: stages[1].image: image-to-image needs it (add image: {stage: ID}, {file: PATH} or {url: s3://BUCKET/KEY})",
        ),
        (
            "task: image-to-image\n    image: {stage: draft}",
            "task: text-to-image",
            "14:5: stages[1].strength: text-to-image does not take it (remove it)",
        ),
        (
            "task: image-to-image",
            "task: inpainting",
            "11:5: stages[1].mask_image: inpainting needs it (add mask_image: {stage: ID}, {file: PATH} or {url: s3://BUCKET/KEY})",
        ),
        (
            "task: image-to-image",
            "task: img2img",
            "12:5: stages[1].task: found 'img2img' (there are image-to-image, inpainting, super-resolution, text-to-image)",
        ),
        ('prompt: "a {{ colour }} circle"\n', 'negative_prompt: "{{ colour }}"\n', "8:5: stages[0].prompt: text-to-image needs"),
        ("strength: 0.5", "seed: same\n    seeds: [1]", "15:5: stages[1].seed: has both seed: and seeds:"),
        # Checkpoints and their capabilities
        ("checkpoint: shapes", "checkpoint: shpaes", "2:1: checkpoint: no checkpoint 'shpaes' (did you mean 'shapes'?)"),
        ("checkpoint: shapes", "checkpoint: ../x", "2:1: checkpoint: no checkpoint '../x' (there are flux, shapes, upscaler)"),
        (
            "checkpoint: shapes",
            "checkpoint: shapes-canny",
            "2:1: checkpoint: 'shapes-canny' is a controlnet, which cannot make pictures by itself (did you mean 'shapes'?)",
        ),
        ("strength: 0.5", "checkpoint: shape", "15:5: stages[1].checkpoint: no checkpoint 'shape' (did you mean 'shapes'?)"),
        (
            "strength: 0.5",
            "checkpoint: upscaler",
            "12:5: stages[1].task: Stable Diffusion x4 upscaler has no image-to-image",
        ),
        ("strength: 0.5", "scheduler: eular", "15:5: stages[1].scheduler: no scheduler 'eular' (did you mean 'euler'?)"),
        (
            "strength: 0.5",
            "scheduler: flow-match-euler",
            "15:5: stages[1].scheduler: Stable Diffusion 1.x cannot use scheduler 'flow-match-euler' (use one of",
        ),
        ("strength: 0.5", "resize: squeeze", "15:5: stages[1].resize: no resize 'squeeze' (there are crop, pad, stretch)"),
        (
            "strength: 0.5",
            "noise_level: 5",
            "15:5: stages[1].noise_level: Stable Diffusion 1.x does not take it (remove it)",
        ),
        ("strength: 0.5", "output: {format: gif}", "15:14: stages[1].output.format: found 'gif' (there are jpeg, png, webp)"),
        (
            "strength: 0.5",
            "output: {format: jpeg, quality: 0}",
            "15:28: stages[1].output.quality: found 0, expected at least 1",
        ),
        ("{stage: draft}", "{file: missing.png}", "13:13: stages[1].image.file: 'missing.png' cannot be read: No such"),
        ("{stage: draft}", "{file: ../x.png}", "13:13: stages[1].image.file: '../x.png' lies outside the allowed folders"),
    ],
)  # fmt: skip
def test_a_mistake_is_one_line_that_says_where_what_and_the_way_out(old: str, new: str, expected: str) -> None:
    (found,) = mistakes_of(changed((old, new)))
    assert found.startswith(expected)


@pytest.mark.parametrize(
    ("controlnet", "expected"),
    [
        ("{checkpoint: shapes-cany, image: {stage: draft}}", "15:20: ...checkpoint: no ControlNet 'shapes-cany' (did you"),
        ("{checkpoint: shapes-canny}", "15:19: ...image: is missing (add it)"),
        (
            "{checkpoint: shapes-canny, image: {stage: draft}, annotator: cany}",
            "15:69: ...annotator: no annotator 'cany' (did you mean 'canny'?)",
        ),
        (
            "{checkpoint: shapes-canny, image: {stage: draft}, annotator: canny, annotator_parameters: {low: 1}}",
            "15:110: ...annotator_parameters.low: 'canny' does not take it (there are high_threshold, low_threshold)",
        ),
        (
            "{checkpoint: shapes-canny, image: {stage: draft}, annotator: canny, annotator_parameters: {low_threshold: -1}}",
            "15:110: ...annotator_parameters.low_threshold: annotator 'canny': low_threshold must be a number from 0 to",
        ),
        (
            "{checkpoint: shapes-canny, image: {stage: draft}, controlnet_conditioning_scale: 11}",
            "15:69: ...controlnet_conditioning_scale: 11 is not from 0 to 10",
        ),
        (
            "{checkpoint: shapes-canny, image: {stage: draft}, control_guidance_start: 0.5, control_guidance_end: 0.5}",
            "15:98: ...control_guidance_end: is not after control_guidance_start (raise it)",
        ),
        (
            "{checkpoint: shapes-canny, image: {stage: draft}, annotator: depth-learned}",
            "15:19: ...annotator_checkpoint: annotator 'depth-learned' needs a checkpoint (there is only depths)",
        ),
        (
            "{checkpoint: shapes-canny, image: {stage: draft}, annotator: depth-learned, annotator_checkpoint: shapes}",
            "15:95: ...annotator_checkpoint: no depth annotator 'shapes' (there is only depths)",
        ),
        (
            "{checkpoint: shapes-canny, image: {stage: draft}, annotator_checkpoint: depths}",
            "15:69: ...annotator_checkpoint: annotator 'none' does not take it (remove it)",
        ),
        ("nothing", "15:19: ...: found 'nothing', expected keys with values"),
    ],
)  # fmt: skip
def test_so_is_a_mistake_about_a_controlnet(controlnet: str, expected: str) -> None:
    (found,) = mistakes_of(changed(("strength: 0.5", f"controlnets: [{controlnet}]")))
    assert (
        found.replace("stages[1].controlnets[0].", "...")
        .replace("stages[1].controlnets[0]", "...")
        .startswith(expected)
    )


def test_a_controlnet_of_another_family_is_refused() -> None:
    text = changed(("strength: 0.5", "controlnets: [{checkpoint: other, image: {stage: draft}}]"))
    catalog = {**CATALOG, "other": checkpoint_files("other", kind="controlnet", family="sdxl")}
    with pytest.raises(Exception, match="'other' is for sdxl and cannot steer image-to-image of 'shapes'"):
        campaign_of(text, catalog=catalog)


def test_twelve_mistakes_of_different_kinds_are_all_reported_with_their_lines() -> None:
    found = mistakes_of("""
        name: Spring Catalogue
        checkpoint: shapes
        priorty: 5
        variables:
          colour: [red, red]
          size: [1]
        seeds: {count: -4}
        defaults: {width: 0, guidance_scale: .nan}
        stages:
          - id: draft
            task: text-to-imge
            prompt: "{{ ''.__class__ }}"
          - id: scene
            task: image-to-image
            image: {stage: fianl}
            prompt: "{{ collour }} {{ colour }}"
            scheduler: dpm
          - id: final
            task: image-to-image
            image: {file: nope.png}
            prompt: x
            checkpoint: nosuch
    """)
    assert [int(line.split(":")[0]) for line in found] == [1, 3, 5, 6, 7, 8, 8, 11, 12, 15, 16, 17, 20, 22]


def test_a_cycle_is_told_once_and_in_full() -> None:
    stages = "stages:\n" + "".join(
        f"  - {{id: {own}, task: image-to-image, prompt: x, image: {{stage: {parent}}}}}\n"
        for own, parent in (("a", "c"), ("b", "a"), ("c", "b"), ("d", "c"))
    )
    assert mistakes_of(stages) == [
        "4:5: stages[0]: is part of a cycle: 'a' needs 'c' needs 'b' needs 'a' (let one of them use another picture)"
    ]


def test_a_mistake_hides_what_only_follows_from_it() -> None:
    found = mistakes_of(changed(("id: draft", "id: Draft!"), ("{stage: draft}", "{stage: Draft!}")))
    assert [line.split(":")[2] for line in found] == [" stages[0].id"]


def test_lists_that_advance_together_have_one_length_and_no_pair_twice() -> None:
    text = "  zip: {{colour: [red, blue], size: {}}}"
    for sizes, why in (("[1]", "different lengths: colour has 2, size has 1"), ("[1, 2]", "")):
        found = mistakes_of(
            changed(
                ("  colour: [red, blue]", text.format(sizes)), ("a {{ colour }} circle at", "{{ colour }} {{ size }}")
            )
        )
        assert [why in line for line in found] == ([True] if why else [])
    found = mistakes_of(changed(("  colour: [red, blue]", "  zip: {colour: [red, red]}")))
    assert found == ["4:3: variables.zip: 'red' is listed twice (remove one)"]


def test_a_variable_is_declared_once() -> None:
    found = mistakes_of(changed(("[red, blue]", "[red, blue]\n  zip: {colour: [green]}")))
    assert found == ["4:3: variables.colour: the variable 'colour' is declared twice (rename one)"]


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ([("count: 2}", "count: 1000000}"), ("strength: 0.5", "seeds: {count: 9}")], "5:1: seeds: asks for 20,000,000"),
        ([("strength: 0.5", "seeds: {count: 100000}")], "7:1: stages: asks for 100,001 pictures of one row and seed"),
    ],
)
def test_a_slip_in_a_count_is_refused_before_it_is_expanded(changes: list[tuple[str, str]], expected: str) -> None:
    (found,) = mistakes_of(changed(*changes))
    assert found.startswith(expected)


def test_a_product_of_many_lists_is_refused_before_it_is_expanded() -> None:
    lists = "".join(f"  v{n}: {list(range(100))}\n" for n in range(5))
    used = " ".join(f"{{{{ v{n} }}}}" for n in range(5))
    text = f"variables:\n{lists}stages:\n  - {{id: a, task: text-to-image, prompt: '{used}'}}\n"
    (found,) = mistakes_of(text)
    assert f"asks for 10,000,000,000 pictures, at most {MAX_JOBS:,}" in found


@pytest.mark.parametrize("text", ["", "[]", "just words", "7", "- a\n- b"])
def test_a_file_that_is_no_campaign_says_what_one_needs(text: str) -> None:
    with pytest.raises(CampaignError, match="is not a campaign \\(write at least name:, checkpoint: and stages:\\)"):
        check(yaml_source.parse(text, file="f.yaml"), CATALOG, input_folder(Path("/nowhere")))


def test_a_file_without_stages_says_so() -> None:
    assert mistakes_of("stages:") == ["3:1: stages: found nothing, expected a list"]
    assert mistakes_of("priority: 1") == ["1:1: stages: is missing (add it)"]


TABLE = "SKU,Colour,Note\nA,red,{{ colour }}\nB,blue,\n"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "products.csv").write_text(TABLE)
    (tmp_path / "twins.csv").write_text("a,A\n1,2\n")
    (tmp_path / "empty.csv").write_text("")
    (tmp_path / "latin.csv").write_bytes("colour\nrosé\n".encode("latin-1"))
    return tmp_path


def with_rows(rows: str) -> str:
    return changed(("  colour: [red, blue]", f"  rows: {rows}"))


@pytest.mark.parametrize(
    ("rows", "expected"),
    [
        ("{file: product.csv}", "4:10: variables.rows.file: 'product.csv' cannot be read: No such file or directory"),
        ("{file: ../products.csv}", "4:10: variables.rows.file: '../products.csv' lies outside the allowed folders"),
        ("{flie: products.csv}", "4:10: variables.rows.flie: unknown key (did you mean 'file'?)"),
        ("{}", "4:3: variables.rows: needs file: or files:, and not both"),
        ("{file: products.csv, files: '*.csv'}", "4:3: variables.rows: needs file: or files:, and not both"),
        ("{files: '*.csv', key: path}", "4:26: variables.rows.key: files are known by their path (remove it)"),
        ("{files: '*.gif'}", "4:10: variables.rows.files: '*.gif' matches no file"),
        (
            "{files: '*.csv', columns: {colour: stem}}",
            "4:36: variables.rows.columns.colour: no column 'stem' in *.csv (there are name, path)",
        ),
        (
            "{file: 's3://bucket/t.csv'}",
            "4:10: variables.rows.file: 's3://bucket/t.csv' lies outside the allowed buckets: see",
        ),
        (
            "{file: products.csv, columns: {colour: Color}}",
            "4:40: variables.rows.columns.colour: no column 'Color' in products.csv (did you mean 'Colour'?)",
        ),
        (
            "{file: products.csv, key: sku}",
            "4:30: variables.rows.key: no column 'sku' in products.csv (there are Colour, Note, SKU)",
        ),
        (
            "{file: products.csv, columns: {shape: Note, colour: Colour}}",
            "4:40: variables.rows.columns.shape: the variable 'shape' is never used (use it or remove it)",
        ),
    ],
)
def test_a_mistake_about_a_table_stands_where_the_file_names_it(folder: Path, rows: str, expected: str) -> None:
    assert expected in " | ".join(mistakes_of(with_rows(rows), folder))


def test_a_table_that_may_not_be_read_is_told_together_with_the_other_mistakes(folder: Path) -> None:
    text = with_rows("{file: 's3://bucket/t.csv'}").replace("task: image-to-image", "task: inpainting")
    assert [mistake.split(": ")[1] for mistake in mistakes_of(text, folder)] == [
        "variables.rows.file",
        "stages[1].mask_image",
    ]


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        (
            "twins.csv",
            "twins.csv:1: has two columns of one name (rename one, or name the columns you need in columns:)",
        ),
        ("empty.csv", "empty.csv:1: is empty (add a header line)"),
        ("latin.csv", "latin.csv: is not UTF-8 text (save it as UTF-8)"),
    ],
)
def test_a_mistake_inside_a_table_names_the_table(folder: Path, name: str, expected: str) -> None:
    assert expected in mistakes_of(with_rows(f"{{file: {name}}}"), folder)


def test_a_column_that_a_template_misspells_gets_the_nearest_title(folder: Path) -> None:
    text = with_rows("{file: products.csv}").replace("{{ colour }} circle at", "{{ color }} circle at")
    (found,) = mistakes_of(text, folder)
    assert found == "14:5: stages[1].prompt: the variable 'color' is not declared (did you mean 'colour'?)"


def test_a_column_and_a_list_cannot_have_one_name(folder: Path) -> None:
    found = mistakes_of(changed(("[red, blue]", "[red]\n  rows: {file: products.csv}")), folder)
    assert found == ["4:3: variables.colour: the variable 'colour' is declared twice (rename one)"]


def test_rows_that_are_wrong_are_named_by_their_line(folder: Path) -> None:
    (folder / "products.csv").write_text("sku,colour,w\nA,red,128\nB,blue\nC,green,nan\nD,grey,130\nA,red,128\n")
    text = with_rows("{file: products.csv, key: sku}").replace("width: 128", 'width: "{{ w }}"')
    assert mistakes_of(text, folder) == [
        "products.csv:3: has 2 cells where the first line has 3",
        "6:12: defaults.width: 'nan' is not a whole number from 8 to 8192, in products.csv:4",
        "6:12: defaults.width: 130 is not a multiple of 8, in products.csv:5 (write 128)",
        "products.csv:6: the key 'A' is used twice; keys must be unique",
    ]


def test_a_picture_that_only_a_row_names_is_looked_for(folder: Path) -> None:
    text = with_rows("{file: products.csv, key: SKU}").replace("{stage: draft}", '{file: "{{ sku }}.png"}')
    assert mistakes_of(text, folder) == [
        "13:13: stages[1].image.file: 'A.png' cannot be read: No such file or directory, in products.csv:2",
        "13:13: stages[1].image.file: 'B.png' cannot be read: No such file or directory, in products.csv:3",
    ]


def test_a_name_from_a_row_cannot_leave_the_folder(folder: Path) -> None:
    (folder / "products.csv").write_text("colour\n../../etc/passwd\n")
    text = with_rows("{file: products.csv}").replace("{stage: draft}", '{file: "{{ colour }}"}')
    (found,) = mistakes_of(text, folder)
    assert "lies outside the allowed folders" in found
