"""Expansion of a campaign into a stream of jobs: rows x variables x seeds, stage by stage."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from sdpipeline.campaigns.inputs import InputFolder
from sdpipeline.campaigns.loader import EDITION, MAX_JOBS, Campaign, jobs_of_a_chain
from sdpipeline.campaigns.request_form import Resolved, Size
from sdpipeline.campaigns.seeds import SeedRange, seed_count
from sdpipeline.campaigns.stage_plan import StagePlan, WrongValueError
from sdpipeline.campaigns.tables import OnMistake, Row
from sdpipeline.campaigns.templates import TemplateRefusedError, compile_template
from sdpipeline.campaigns.variables import Axes
from sdpipeline.domain import JobSpec, canonical, identities, stage_seed
from sdpipeline.errors import CampaignError, Mistake

MAX_MISTAKES = 20
LONGEST_SUBJECT = 500


@dataclass(frozen=True, slots=True, kw_only=True)
class Combination:
    """One row and one value of each variable, shared by the stages of a chain before seeds apply."""

    row_key: str
    line: int | None
    axes: tuple[tuple[str, Any], ...]
    values: Mapping[str, Any]


def expand(campaign: Campaign, inputs: InputFolder) -> Iterator[JobSpec]:
    """Yield every job, parents before children, in the file's order; constant memory.

    Raises CampaignError with the first mistakes that only show in values: a number out of range, a
    missing picture, an invalid row.
    """
    chains = _Chains(campaign, inputs)
    for combination in chains.combinations():
        yield from chains.jobs(combination)
    chains.raise_mistakes()


def check(campaign: Campaign, inputs: InputFolder) -> int:
    """Find the mistakes that :func:`expand` would find, without making jobs; return the number of jobs."""
    chains = _Chains(campaign, inputs)
    each = sum(jobs_of_a_chain(campaign.spec).values()) * seed_count(campaign.spec.seeds)
    total = 0
    for combination in chains.combinations():
        chains.resolve(combination)
        total += each
        if total > MAX_JOBS:
            chains.note(campaign.source.mistake(("variables",), f"asks for more than {MAX_JOBS:,} pictures"))
            break
    chains.raise_mistakes()
    return total


def combinations(campaign: Campaign, on_mistake: OnMistake) -> Iterator[Combination]:
    """Yield rows x (zipped lists x product, minus ``exclude``, plus ``include``), in the file's order."""
    axes, edition = campaign.axes, {EDITION: campaign.edition} if campaign.edition else {}
    table: Iterable[Row | None] = axes.table.rows(on_mistake) if axes.table else (None,)
    together = [tuple(zip(axes.zipped, values, strict=True)) for values in zip(*axes.zipped.values(), strict=True)]
    left_out = [_matcher(choice, axes) for choice in campaign.spec.exclude]
    added = [tuple(sorted(choice.items())) for choice in campaign.spec.include]
    # 1 and True compare equal but are different values.
    texts = {canonical(own) for own in added}
    for row in table:
        key, line, cells = (row.key, row.line, row.values) if row else ("", None, {})
        seen = set()
        for own in itertools.chain(_products(axes, together), added):
            merged = {**cells, **dict(own), **edition}
            if added:
                text = canonical(own)
                if text in seen or (text not in texts and any(matches(merged) for matches in left_out)):
                    continue
                seen.add(text)
            elif any(matches(merged) for matches in left_out):
                continue
            yield Combination(row_key=key, line=line, axes=own, values=merged)


def _products(axes: Axes, together: Sequence[tuple[tuple[str, Any], ...]]) -> Iterator[tuple[tuple[str, Any], ...]]:
    for pairs in together or [()]:
        for values in itertools.product(*axes.product.values()):
            yield tuple(sorted((*pairs, *zip(axes.product, values, strict=True))))


def _matcher(choice: Mapping[str, Any], axes: Axes) -> Callable[[Mapping[str, Any]], bool]:
    """Return a predicate for combinations with these values; a table's cells compare as text."""
    columns = axes.columns()
    wanted = [(name, _cell(value) if name in columns else canonical(value)) for name, value in choice.items()]
    return lambda values: all(
        (values[name] if name in columns else canonical(values[name])) == value for name, value in wanted
    )


def _cell(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Branch:
    """One job of every chain: its stage, its fan-out seeds and its parents' branches.

    The noise seed is ``own_seed``, else derived from the name ``derived``, else the chain's root seed.
    """

    plan: StagePlan
    depth: int
    fanned: Mapping[str, int]
    parents: tuple[int, ...]
    own_seed: int | None
    derived: str | None

    def axes(self) -> tuple[tuple[str, int], ...]:
        """Return the fan-out seeds as axes of the job's identity."""
        return tuple((f"{stage}.seed", seed) for stage, seed in sorted(self.fanned.items()))

    def noise_seed(self, root: int) -> int:
        """Return this job's noise seed in the chain of that root seed."""
        if self.own_seed is not None:
            return self.own_seed
        return root if self.derived is None else stage_seed(root, self.derived)


@dataclass(slots=True)
class _Chains:
    """Stage plans and branches of a campaign, shared by all its job chains."""

    campaign: Campaign
    inputs: InputFolder
    mistakes: list[Mistake] = field(default_factory=list)
    _chain: int = 0
    _plans: list[StagePlan] = field(init=False)
    _branches: list[_Branch] = field(init=False, default_factory=list)

    def __post_init__(self) -> None:
        campaign = self.campaign
        self._plans = [
            StagePlan(campaign.spec, stage, campaign.catalog, campaign.policies, campaign.warnings)
            for stage in campaign.stage_order()
        ]
        for plan in self._plans:
            self._branches += list(_branches(plan, self._branches))

    def combinations(self) -> Iterator[Combination]:
        """Yield combinations until there are too many mistakes."""
        for combination in combinations(self.campaign, self.note):
            yield combination
            if len(self.mistakes) >= MAX_MISTAKES:
                return

    def note(self, mistake: Mistake) -> None:
        """Record a mistake, once."""
        if mistake not in self.mistakes:
            self.mistakes.append(mistake)

    def raise_mistakes(self) -> None:
        """Raise CampaignError if there were any."""
        if self.mistakes:
            raise CampaignError(*self.mistakes)

    def resolve(self, combination: Combination) -> dict[str, Resolved]:
        """Resolve each stage for this combination; note and skip an invalid one, and skip its descendants."""
        self._subject(combination)
        found: dict[str, Resolved] = {}
        sizes: dict[str, Size] = {}
        self.campaign.warnings.row = self._row(combination)
        for plan in self._plans:
            if not all(parent in found for parent in plan.parents):
                continue
            above = {parent: sizes[parent] for parent in plan.parents}
            try:
                resolved = plan.resolve(combination.values, above, self.inputs)
            except WrongValueError as wrong:
                self._note_value(wrong, combination)
                continue
            found[plan.stage.id] = resolved
            sizes[plan.stage.id] = resolved.shape.result
        return found

    def jobs(self, combination: Combination) -> Iterator[JobSpec]:
        """Yield all jobs of one combination, seed by seed."""
        resolved = self.resolve(combination)
        if len(resolved) < len(self._plans):
            return
        subject, branches = self._subject(combination), []
        for branch in self._branches:
            stage = resolved[branch.plan.stage.id]
            axes = combination.axes + branch.axes() if branch.fanned else combination.axes
            variables = tuple(sorted((dict(axes) | stage.used).items())) if axes else tuple(stage.used.items())
            identity = identities(self.campaign.edition, branch.plan.stage.id, combination.row_key, dict(axes))
            branches.append((branch, stage, axes, variables, identity))
        for seed in _seeds(self.campaign.spec.seeds):
            chain, self._chain = self._chain, self._chain + 1
            made: list[JobSpec] = []
            for branch, stage, axes, variables, identity in branches:
                above = [made[parent] for parent in branch.parents]
                request, document, fingerprint = stage.request(
                    branch.noise_seed(seed), {parent.stage: parent.fingerprint for parent in above}
                )
                spec = JobSpec(
                    stage=branch.plan.stage.id,
                    depth=branch.depth,
                    row_key=combination.row_key,
                    variables=variables,
                    axes=axes,
                    seed=seed,
                    request=request,
                    known_document=document,
                    fingerprint=fingerprint,
                    batch_key=stage.form.batch_key,
                    edition=self.campaign.edition,
                    parents=tuple((parent.stage, parent.identity) for parent in above),
                    chain=chain,
                    blocked=stage.blocked,
                    subject=subject,
                    known_identity=identity(seed),
                )
                made.append(spec)
                yield spec

    def _subject(self, combination: Combination) -> str | None:
        """Return the data subject of this combination, or None if the template renders to an empty text."""
        if self.campaign.spec.subject is None:
            return None
        try:
            found = str(compile_template(self.campaign.spec.subject).render(combination.values)).strip()
        except TemplateRefusedError as error:
            self._note_value(WrongValueError(("subject",), str(error)), combination)
            return None
        if len(found) > LONGEST_SUBJECT:
            why = f"is longer than {LONGEST_SUBJECT} characters"
            self._note_value(WrongValueError(("subject",), why, "name a column with an identifier"), combination)
        return found or None

    def _note_value(self, wrong: WrongValueError, combination: Combination) -> None:
        row = self._row(combination) if wrong.of_row else ""
        message = f"{wrong}, in {row}" if row else str(wrong)
        self.note(self.campaign.source.mistake(wrong.path, message, wrong.fix))

    def _row(self, combination: Combination) -> str:
        """Return file and line of a combination's row; empty without a table."""
        table = self.campaign.axes.table
        return f"{table.name}:{combination.line}" if table and combination.line is not None else ""


def _branches(plan: StagePlan, above: list[_Branch]) -> Iterator[_Branch]:
    """Yield every consistent choice of parents' branches, fanned out over the stage's own seeds."""
    stage = plan.stage
    choices = [[n for n, branch in enumerate(above) if branch.plan.stage.id == parent] for parent in plan.parents]
    for parents in itertools.product(*choices):
        inherited = _agreed([above[parent] for parent in parents])
        if inherited is None:
            continue
        depth = 1 + max((above[parent].depth for parent in parents), default=-1)
        for own in _seeds(stage.seeds) if stage.seeds is not None else (None,):
            fanned = inherited if own is None else {**inherited, stage.id: own}
            same = stage.seed == "same" or depth == 0
            derived = None if same else "/".join([stage.id, *(str(fanned[each]) for each in sorted(fanned))])
            yield _Branch(plan=plan, depth=depth, fanned=fanned, parents=parents, own_seed=own, derived=derived)


def _agreed(parents: Iterable[_Branch]) -> dict[str, int] | None:
    """Merge the parents' fan-out seeds; return None if a join would mix two branches of one fan-out."""
    merged: dict[str, int] = {}
    for parent in parents:
        if any(merged.get(stage, seed) != seed for stage, seed in parent.fanned.items()):
            return None
        merged |= parent.fanned
    return merged


def _seeds(seeds: SeedRange | list[int]) -> Iterable[int]:
    return range(seeds.start, seeds.start + seeds.count) if isinstance(seeds, SeedRange) else seeds
