from __future__ import annotations

import json
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sdpipeline.batching import batch_key
from sdpipeline.campaigns import expand
from sdpipeline.campaigns.loader import jobs_of_a_chain
from sdpipeline.domain import CheckpointRef, JobSpec, fingerprint, stage_seed
from tests.factories import CATALOG, campaign_of, checkpoint_files, input_folder, jobs_of, mistakes_of

ONE = """
    variables: {ground: [white, black]}
    stages:
      - {id: draft, task: text-to-image, prompt: "a circle on {{ ground }}"}
"""
CHAIN = """
    variables: {ground: [white, black]}
    seeds: {start: 5, count: 2}
    stages:
      - {id: draft, task: text-to-image, prompt: "a circle on {{ ground }}"}
      - {id: scene, task: text-to-image, prompt: x, controlnets: [{checkpoint: shapes-canny, image: {stage: draft}}]}
      - {id: final, task: image-to-image, prompt: x, image: {stage: scene}}
"""
FAN = """
    seeds: [1, 2]
    stages:
      - {id: draft, task: text-to-image, prompt: x}
      - {id: left, task: image-to-image, prompt: x, image: {stage: draft}, seeds: [10, 11]}
      - {id: right, task: image-to-image, prompt: x, image: {stage: draft}}
      - {id: join, task: image-to-image, prompt: x, image: {stage: left}, controlnets: [
          {checkpoint: shapes-canny, image: {stage: right}}, {checkpoint: shapes-canny, image: {stage: left}}]}
"""
PRODUCTS = "sku\tcolour\tnote\nA\tred\tfirst\nB\tblue\tsecond\n"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "products.tsv").write_text(PRODUCTS)
    return tmp_path


def by_stage(jobs: list[JobSpec], stage: str) -> list[JobSpec]:
    return [job for job in jobs if job.stage == stage]


def rows_campaign(
    *, prompt: str = "a {{ colour }} thing", rows: str = "{file: products.tsv, key: sku}", head: str = ""
) -> str:
    return f"""
name: spring
checkpoint: shapes
variables:
  rows: {rows}
{head}
stages:
  - {{id: draft, task: text-to-image, prompt: "{prompt}"}}
"""


def test_every_combination_and_seed_gets_a_chain_in_the_files_order() -> None:
    jobs = jobs_of(CHAIN)
    assert [(job.variables, job.seed, job.stage) for job in jobs[:6]] == [
        ((("ground", "white"),), seed, stage) for seed in (5, 6) for stage in ("draft", "scene", "final")
    ]
    assert len(jobs) == 2 * 2 * 3


def test_parents_come_before_their_children() -> None:
    seen: set[str] = set()
    for job in jobs_of(FAN):
        assert {identity for _, identity in job.parents} <= seen
        seen.add(job.identity)


def test_stages_may_be_written_in_any_order() -> None:
    stages = CHAIN.split("stages:\n")[1].splitlines(keepends=True)
    backwards = CHAIN.split("stages:\n", maxsplit=1)[0] + "stages:\n" + "".join(reversed(stages))
    assert {job.identity: job.fingerprint for job in jobs_of(backwards)} == {
        job.identity: job.fingerprint for job in jobs_of(CHAIN)
    }


def test_a_child_names_its_parent_and_depends_on_its_pixels() -> None:
    draft, scene, final = jobs_of(CHAIN)[:3]
    assert scene.parents == (("draft", draft.identity),)
    assert scene.request.controlnets[0].image.digest == draft.fingerprint
    assert final.request.image is not None
    assert final.request.image.digest == scene.fingerprint
    assert [job.depth for job in (draft, scene, final)] == [0, 1, 2]


def test_lists_multiply_and_zipped_lists_advance_together() -> None:
    jobs = jobs_of("""
        variables: {a: [1, 2], b: [x, y, z], zip: {c: [p, q], d: [r, s]}}
        stages: [{id: s, task: text-to-image, prompt: "{{ a }}{{ b }}{{ c }}{{ d }}"}]
    """)
    prompts = [job.request.prompt for job in jobs]
    assert len(set(prompts)) == 2 * 3 * 2
    assert prompts[:3] == ["1xpr", "1ypr", "1zpr"]
    assert {prompt[2:] for prompt in prompts} == {"pr", "qs"}


def test_a_stage_with_seeds_fans_out_and_its_children_follow_each_branch() -> None:
    counts = Counter(job.stage for job in jobs_of(FAN))
    assert counts == {"draft": 2, "left": 4, "right": 2, "join": 4}


def test_a_join_matches_the_branches_of_one_fan_out() -> None:
    jobs = {job.identity: job for job in jobs_of(FAN)}
    for join in by_stage(list(jobs.values()), "join"):
        left, right = (jobs[identity] for _, identity in join.parents)
        assert (left.seed, right.seed) == (join.seed, join.seed)
        assert dict(left.axes)["left.seed"] == dict(join.axes)["left.seed"]


def test_a_join_of_two_fan_outs_has_every_pair() -> None:
    jobs = jobs_of("""
        stages:
          - {id: a, task: text-to-image, prompt: x, seeds: [1, 2]}
          - {id: b, task: text-to-image, prompt: x, seeds: {start: 7, count: 3}}
          - {id: c, task: image-to-image, prompt: x, image: {stage: a}, controlnets: [
              {checkpoint: shapes-canny, image: {stage: b}}]}
    """)
    assert len({job.axes for job in by_stage(jobs, "c")}) == 6


def test_a_root_takes_the_seed_as_it_is_and_a_later_stage_derives_its_own() -> None:
    draft, scene, final = jobs_of(CHAIN)[:3]
    assert draft.request.seed == 5
    assert scene.request.seed == stage_seed(5, "scene")
    assert len({job.request.seed for job in (draft, scene, final)}) == 3
    assert {job.seed for job in (draft, scene, final)} == {5}


def test_seed_same_repeats_the_roots_noise() -> None:
    final = by_stage(jobs_of(CHAIN.replace("{stage: scene}}", "{stage: scene}, seed: same}")), "final")
    assert [job.request.seed for job in final] == [5, 6, 5, 6]


def test_a_fan_out_uses_its_seeds_as_written_and_its_children_differ_by_them() -> None:
    jobs = jobs_of(FAN)
    assert [job.request.seed for job in by_stage(jobs, "left")] == [10, 11, 10, 11]
    assert len({job.request.seed for job in by_stage(jobs, "join")}) == 4


def test_each_row_is_a_chain_known_by_its_key(folder: Path) -> None:
    jobs = jobs_of(rows_campaign(), folder)
    assert [(job.row_key, job.request.prompt) for job in jobs] == [("A", "a red thing"), ("B", "a blue thing")]


def test_a_value_that_looks_like_a_template_reaches_the_prompt_as_it_is(folder: Path) -> None:
    (folder / "products.tsv").write_text('sku\tcolour\nA\t"{{ 7 * 7 }}" {% for\n')
    (job,) = jobs_of(rows_campaign(), folder)
    assert job.request.prompt == 'a "{{ 7 * 7 }}" {% for thing'


def test_a_corrected_cell_changes_the_picture_but_not_the_job(folder: Path) -> None:
    before = jobs_of(rows_campaign(), folder)
    (folder / "products.tsv").write_text(PRODUCTS.replace("blue", "green"))
    after = jobs_of(rows_campaign(), folder)
    assert [job.identity for job in before] == [job.identity for job in after]
    assert [old.fingerprint == new.fingerprint for old, new in zip(before, after, strict=True)] == [True, False]


def test_a_cell_that_no_template_uses_changes_nothing(folder: Path) -> None:
    before = jobs_of(rows_campaign(), folder)
    (folder / "products.tsv").write_text(PRODUCTS.replace("second", "corrected"))
    assert jobs_of(rows_campaign(), folder) == before


def test_without_a_key_a_corrected_cell_is_another_job(folder: Path) -> None:
    text = rows_campaign(rows="{file: products.tsv}")
    before = jobs_of(text, folder)
    (folder / "products.tsv").write_text(PRODUCTS.replace("blue", "green"))
    after = jobs_of(text, folder)
    assert before[0].identity == after[0].identity
    assert before[1].identity != after[1].identity


def test_the_order_of_rows_decides_nothing_but_the_order_of_jobs(folder: Path) -> None:
    before = jobs_of(rows_campaign(), folder)
    first, *rest = PRODUCTS.splitlines()
    (folder / "products.tsv").write_text("\n".join([first, *reversed(rest)]))
    assert list(reversed(jobs_of(rows_campaign(), folder))) == before


def test_a_job_lists_the_variables_that_it_used(folder: Path) -> None:
    text = rows_campaign(head="  unrelated: [1]", prompt="a {{ colour }} thing {{ unrelated }}")
    job = jobs_of(text, folder)[0]
    assert dict(job.variables) == {"colour": "red", "unrelated": 1}
    assert dict(job.axes) == {"unrelated": 1}


def test_another_name_for_the_same_weights_changes_nothing() -> None:
    renamed = {**CATALOG, "shapes": checkpoint_files("shapes"), "forms": checkpoint_files("forms")}
    renamed["forms"] = checkpoint_files("forms", digest=CATALOG["shapes"].digest)
    text = "name: spring\ncheckpoint: {}\nstages: [{{id: a, task: text-to-image, prompt: x}}]"
    (one,), (two,) = (jobs_of(text.format(alias), catalog=renamed) for alias in ("shapes", "forms"))
    assert one.request.checkpoint != two.request.checkpoint
    assert (one.identity, one.fingerprint, one.batch_key) == (two.identity, two.fingerprint, two.batch_key)


def test_other_weights_under_the_same_name_change_the_picture_and_the_batch() -> None:
    altered = {**CATALOG, "shapes": checkpoint_files("shapes", digest="ab" * 32)}
    (one, *_), (two, *_) = jobs_of(ONE), jobs_of(ONE, catalog=altered)
    assert one.identity == two.identity
    assert one.fingerprint != two.fingerprint
    assert one.batch_key != two.batch_key
    assert two.request.checkpoint == CheckpointRef(alias="shapes", digest="ab" * 32)


def test_defaults_apply_where_the_task_takes_them_and_are_no_mistake_elsewhere() -> None:
    draft, soft, big = jobs_of("""
        defaults: {width: 128, height: 128, strength: 0.5, clip_skip: 2, noise_level: 30, resize: crop,
                   scheduler: euler, num_inference_steps: 30, guidance_scale: 3, negative_prompt: blurry}
        stages:
          - {id: draft, task: text-to-image, prompt: x}
          - {id: soft, task: image-to-image, prompt: x, image: {stage: draft}}
          - {id: big, task: super-resolution, checkpoint: upscaler, image: {stage: soft}}
    """)
    assert (draft.request.strength, soft.request.strength, big.request.strength) == (None, 0.5, None)
    assert (draft.request.noise_level, soft.request.noise_level, big.request.noise_level) == (None, None, 30)
    assert (draft.request.resize, soft.request.resize, big.request.resize) == (None, "crop", "crop")
    assert (big.request.width, big.request.height, big.request.num_inference_steps) == (128, 128, 30)


def test_a_default_scheduler_that_a_family_cannot_use_leaves_the_familys_own() -> None:
    one, other = jobs_of("""
        defaults: {scheduler: ddim}
        stages:
          - {id: a, task: text-to-image, prompt: x}
          - {id: b, task: text-to-image, prompt: x, checkpoint: flux, width: 512, height: 512}
    """)
    assert (one.request.scheduler, other.request.scheduler) == ("ddim", "flow-match-euler")


def test_a_stage_overrides_the_defaults_and_the_family_fills_the_rest() -> None:
    (job,) = jobs_of("""
        defaults: {width: 128, guidance_scale: 3}
        stages: [{id: a, task: text-to-image, prompt: x, width: 256}]
    """)
    assert (job.request.width, job.request.height) == (256, 512)
    assert (job.request.guidance_scale, job.request.num_inference_steps) == (3.0, 25)


def test_an_upscalers_child_sees_the_enlarged_picture() -> None:
    jobs = jobs_of("""
        defaults: {width: 128, height: 64}
        stages:
          - {id: a, task: text-to-image, prompt: x}
          - {id: b, task: super-resolution, checkpoint: upscaler, image: {stage: a}}
          - {id: c, task: image-to-image, prompt: x, image: {stage: b}, width: 512, height: 256}
    """)
    assert [(job.request.width, job.request.height) for job in jobs] == [(128, 64), (128, 64), (512, 256)]


@pytest.mark.parametrize(
    ("stage", "expected"),
    [
        ("width: 64, height: 64, image: {stage: a}", "the picture is 128x128, but the stage uses 64x64 (add resize:"),
        (
            "checkpoint: upscaler, task: super-resolution, width: 64, image: {stage: a}",
            "the picture is 128x128, but the stage uses 64x128 (add resize:",
        ),
    ],
)
def test_a_picture_of_another_size_is_resized_only_on_request(stage: str, expected: str) -> None:
    task = "" if "task:" in stage else "task: image-to-image, "
    text = f"""
        defaults: {{width: 128, height: 128}}
        stages:
          - {{id: a, task: text-to-image, prompt: x}}
          - {{id: b, {task}prompt: x, {stage}}}
    """
    (found,) = mistakes_of(text)
    assert expected in found
    assert mistakes_of(text.replace("{stage: a}", "{stage: a}, resize: crop")) == []


def test_a_result_too_large_to_read_again_is_refused() -> None:
    (found,) = mistakes_of("""
        stages:
          - {id: a, task: text-to-image, prompt: x, width: 1024, height: 1024}
          - {id: b, task: super-resolution, checkpoint: upscaler, image: {stage: a}}
    """)
    assert "makes a picture of 4096x4096, more than 10,000,000 pixels" in found


def test_a_learned_annotator_is_part_of_the_picture_by_its_digest() -> None:
    control = (
        "{checkpoint: shapes-canny, image: {stage: draft}, annotator: depth-learned, annotator_checkpoint: depths}"
    )
    text = CHAIN.replace("{checkpoint: shapes-canny, image: {stage: draft}}", control)
    altered = {**CATALOG, "depths": checkpoint_files("depths", kind="annotator", family="depth", digest="ab" * 32)}
    one, two = by_stage(jobs_of(text), "scene")[0], by_stage(jobs_of(text, catalog=altered), "scene")[0]
    assert one.request.controlnets[0].annotator_checkpoint is not None
    assert (one.fingerprint, one.batch_key) != (two.fingerprint, two.batch_key)
    assert one.fingerprint == fingerprint(one.request)


def test_templates_fill_numbers_too() -> None:
    jobs = jobs_of("""
        variables: {guidance: [1, 4.5], steps: ["10"]}
        stages: [{id: a, task: text-to-image, prompt: x, guidance_scale: "{{ guidance }}",
                  num_inference_steps: "{{ steps }}"}]
    """)
    assert [(job.request.guidance_scale, job.request.num_inference_steps) for job in jobs] == [(1.0, 10), (4.5, 10)]


def test_values_that_are_equal_but_written_differently_are_kept_apart() -> None:
    jobs = jobs_of("""
        variables: {v: [1, 1.0, true, "1"]}
        stages: [{id: a, task: text-to-image, prompt: "{{ v }}", scheduler: "{{ 'euler' if v == true else 'ddim' }}"}]
    """)
    assert [job.request.prompt for job in jobs] == ["1", "1.0", "True", "1"]
    assert len({job.identity for job in jobs}) == 4


def test_a_value_that_equals_a_right_one_is_not_taken_for_it() -> None:
    found = mistakes_of("""
        variables: {v: [1, true]}
        stages: [{id: a, task: text-to-image, prompt: x, guidance_scale: "{{ v }}"}]
    """)
    assert found == ["4:50: stages[0].guidance_scale: true is not a number from 0 to 100"]


def test_an_empty_prompt_is_a_mistake_of_its_row(folder: Path) -> None:
    (folder / "products.tsv").write_text("sku\tcolour\nA\tred\nB\t\n")
    (found,) = mistakes_of(rows_campaign(prompt="{{ colour }}"), folder)
    assert found.endswith("stages[0].prompt: is empty with these values, in products.tsv:3")


def test_guidance_off_is_another_batch_and_more_of_it_is_not() -> None:
    one, four, five = jobs_of("""
        variables: {g: [1, 4, 5]}
        stages: [{id: a, task: text-to-image, prompt: x, guidance_scale: "{{ g }}"}]
    """)
    assert one.batch_key != four.batch_key == five.batch_key


def test_jobs_that_differ_in_words_and_seeds_share_a_batch() -> None:
    jobs = jobs_of(CHAIN)
    assert {len({job.batch_key for job in by_stage(jobs, stage)}) for stage in ("draft", "scene", "final")} == {1}


def test_twenty_mistakes_of_values_are_enough(folder: Path) -> None:
    (folder / "products.tsv").write_text("sku\tcolour\n" + "".join(f"{n}\t\n" for n in range(100)))
    assert len(mistakes_of(rows_campaign(prompt="{{ colour }}"), folder)) == 20


def test_known_hashes_stay_what_they_are_or_every_picture_would_be_made_again(folder: Path) -> None:
    (folder / "products.tsv").write_text('sku\tColour\tNote\nA-1\tred\t"quoted\nB-2\t{{ ground }}\t\n')
    jobs = jobs_of(PINNED, folder)
    assert len(jobs) == 224
    assert [
        (j.stage, j.identity[:16], j.fingerprint[:16], j.batch_key[:16]) for j in (*jobs[:4:2], jobs[5], jobs[-1])
    ] == [
        ("draft", "dfbeff427e61e440", "f6cb1da3a921d840", "546447d07d3a3907"),
        ("scene", "6bac9c7f5e1bdd11", "13f48dacb229d7cc", "a7999ff42fb08f09"),
        ("final", "432f42ae1e76ab31", "6ed208bb81595b99", "d3bd0b954ad71e86"),
        ("final", "9c530bf54612047f", "72e02c8c355d304b", "40ec1dbd3fdc0b05"),
    ]


PINNED = r"""
name: pinned
checkpoint: shapes
variables:
  ground: [white, bläck]
  strength: [0.5, 0.75]
  zip: {shape: [circle, square], guidance: [1, 4.5]}
  rows: {file: products.tsv, key: sku, columns: {colour: Colour}}
seeds: [7, 9223372036854775807]
defaults: {width: 128, height: 128, num_inference_steps: 20, guidance_scale: "{{ guidance }}", scheduler: dpmpp-2m}
stages:
  - id: draft
    task: text-to-image
    prompt: "a {{ colour }} {{ shape }} on a {{ ground }} background"
    negative_prompt: "blurry"
  - id: scene
    task: text-to-image
    prompt: "a yellow {{ shape }} \"on\" purple"
    seeds: {start: 3, count: 2}
    controlnets:
      - checkpoint: shapes-canny
        image: {stage: draft}
        annotator: canny
        annotator_parameters: {low_threshold: 50}
        controlnet_conditioning_scale: 0.8
  - id: soft
    task: image-to-image
    seed: same
    image: {stage: scene}
    prompt: "{{ colour }}"
    strength: "{{ strength }}"
    output: {format: jpeg, quality: 90}
  - id: final
    task: super-resolution
    checkpoint: upscaler
    image: {stage: soft}
    noise_level: 30
"""

WORDS = st.text(st.characters(exclude_categories=("Cc", "Cs", "Cn"), exclude_characters="{}"), min_size=1, max_size=8)
SCALARS = st.one_of(WORDS, st.integers(-5, 5), st.booleans(), st.floats(-2, 2))


@st.composite
def campaigns(draw: st.DrawFn) -> str:
    """A random DAG of image-to-image stages over random variables and seeds, as YAML's subset JSON."""
    names = draw(st.lists(st.sampled_from("abcd"), unique=True, max_size=3))
    variables = {name: draw(st.lists(SCALARS, min_size=1, max_size=3, unique_by=json.dumps)) for name in names}
    stages = []
    for n in range(draw(st.integers(1, 4))):
        stage: dict[str, object] = {
            "id": f"s{n}",
            "prompt": draw(WORDS) + " ".join(f"{{{{ {name} }}}}" for name in names),
        }
        parents = draw(st.lists(st.integers(0, n - 1), unique=True, max_size=2)) if n else []
        stage["task"] = "image-to-image" if parents else "text-to-image"
        if parents:
            stage["image"] = {"stage": f"s{parents[0]}"}
            stage["controlnets"] = [{"checkpoint": "shapes-canny", "image": {"stage": f"s{p}"}} for p in parents[1:]]
        if draw(st.booleans()):
            stage["seeds"] = draw(st.lists(st.integers(0, 99), min_size=1, max_size=3, unique=True))
        if draw(st.booleans()):
            stage["negative_prompt"] = draw(WORDS)
        stages.append(stage)
    document = {"variables": variables, "seeds": {"count": draw(st.integers(1, 3))}, "stages": stages}
    return "\n".join(f"{key}: {json.dumps(value)}" for key, value in document.items())


@settings(max_examples=60)
@given(campaigns())
def test_expansion_is_deterministic_unique_and_counted_without_expanding(text: str) -> None:
    jobs = jobs_of(text)
    assert jobs == jobs_of(text)
    assert len({job.identity for job in jobs}) == len(jobs)
    campaign = campaign_of(text)
    assert expand.check(campaign, input_folder(campaign.folder)) == len(jobs)
    chains = len(jobs) // sum(jobs_of_a_chain(campaign.spec).values())
    assert Counter(job.stage for job in jobs) == {
        stage: count * chains for stage, count in jobs_of_a_chain(campaign.spec).items()
    }


@settings(max_examples=60)
@given(campaigns())
def test_what_is_put_together_from_parts_is_that_of_the_whole_job(text: str) -> None:
    for job in jobs_of(text):
        assert job.fingerprint == fingerprint(job.request)
        assert job.batch_key == batch_key(job.request)
        whole = replace(job)  # rebuilds all that was shared
        assert (whole.identity, whole.document) == (job.identity, job.document)


def test_a_subject_is_a_template_of_the_jobs_own_values_and_may_be_nobodys(tmp_path: Path) -> None:
    (tmp_path / "people.csv").write_text("customer,shape\nanna,circle\n,square\n")
    text = """
    subject: "{{ customer }}"
    variables: {rows: {file: people.csv}}
    stages: [{id: draft, task: text-to-image, prompt: "a {{ shape }}"}]
    """
    assert [job.subject for job in jobs_of(text, tmp_path)] == ["anna", None]


@pytest.mark.parametrize(
    ("subject", "mistake"),
    [
        ("{{ custmer }}", "3:1: subject: the variable 'custmer' is not declared (did you mean 'customer'?)"),
        ("{{ customer", "3:1: subject: is not a template"),
        ("{{ customer - 1 }}", "3:1: subject: cannot be filled in"),
        ("{{ customer }}" * 100, "3:1: subject: is longer than 500 characters"),
    ],
)
def test_a_wrong_subject_is_refused(subject: str, mistake: str) -> None:
    text = f"""
    subject: "{subject}"
    variables: {{customer: [anna-a]}}
    stages: [{{id: draft, task: text-to-image, prompt: "for {{{{ customer }}}}"}}]
    """
    assert mistakes_of(text)[0].startswith(mistake)
