"""Names of schedulers against the classes of the installed diffusers."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from itertools import product
from typing import Any

import diffusers
import pytest
import torch

from sdpipeline.engine.diffusers import schedulers as creation
from sdpipeline.engine.families import FAMILIES, scheduler_config
from sdpipeline.engine.families.scheduler_config import CAPABILITIES, EDM_CLASSES
from sdpipeline.engine.families.schedulers import (
    EDM_SCHEDULERS,
    FLOW_OPTIONS,
    FLOW_SCHEDULERS,
    NOISE_SCHEDULERS,
    SCHEDULERS,
    TRAINING_OPTIONS,
)

BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "clip_sample": False}
NOISE_CLASSES = sorted(CAPABILITIES.keys() - EDM_CLASSES)
PREDICTIONS = ("epsilon", "v_prediction", "sample", "original_sample")
SCHEDULES = ("linear", "scaled_linear", "squaredcos_cap_v2", "sigmoid", "laplace", "exp", "unheard")

SOLVER_OPTIONS = frozenset(
    {
        "algorithm_type",
        "solver_order",
        "solver_type",
        "solver_p",
        "predict_x0",
        "disable_corrector",
        "lower_order_final",
        "euler_at_final",
        "final_sigmas_type",
        "interpolation_type",
        "variance_type",
        "skip_prk_steps",
        "use_karras_sigmas",
        "use_exponential_sigmas",
        "use_beta_sigmas",
        "use_lu_lambdas",
        # Flow matching by a noise scheduler, which no family here runs; see `scheduler_config.refusal`.
        "use_flow_sigmas",
        "flow_shift",
        "shift_terminal",
        "use_dynamic_shifting",
        "time_shift_type",
    }
)
"""Options of noise schedulers that the name decides: what it does not set stays at the class's default."""


def _options(class_name: str) -> set[str]:
    return set(inspect.signature(getattr(diffusers, class_name).__init__).parameters) - {"self"}


@pytest.mark.parametrize("class_name", CAPABILITIES)
def test_every_option_of_a_noise_scheduler_is_decided_by_the_name_or_by_the_checkpoint(class_name: str) -> None:
    assert _options(class_name) <= TRAINING_OPTIONS | SOLVER_OPTIONS
    assert not TRAINING_OPTIONS & SOLVER_OPTIONS


def test_every_option_of_flow_matching_comes_from_the_checkpoint_or_is_refused() -> None:
    assert _options("FlowMatchEulerDiscreteScheduler") == FLOW_OPTIONS | {"stochastic_sampling"}


@pytest.mark.parametrize(
    ("class_name", "options"), [row for table in (SCHEDULERS, EDM_SCHEDULERS) for row in table.values()]
)
def test_a_name_sets_options_that_its_class_has(class_name: str, options: Mapping[str, Any]) -> None:
    assert options.keys() <= _options(class_name)


@pytest.mark.parametrize("class_name", CAPABILITIES)
def test_an_ability_that_is_an_option_is_the_classs(class_name: str) -> None:
    capability, options = CAPABILITIES[class_name], _options(class_name)
    assert capability.zero_snr == ("rescale_betas_zero_snr" in options)
    assert capability.thresholding == ("thresholding" in options)
    assert capability.continuous == ("timestep_type" in options)


@pytest.mark.parametrize("class_name", CAPABILITIES)
def test_predictions_and_schedules_are_those_that_the_class_accepts(class_name: str) -> None:
    made: Any = getattr(diffusers, class_name)
    found = {each for each in PREDICTIONS if _runs(made, {"prediction_type": each})}
    assert found == CAPABILITIES[class_name].predictions
    if class_name not in EDM_CLASSES:
        schedules = {each for each in SCHEDULES if _runs(made, {"beta_schedule": each})}
        assert schedules == CAPABILITIES[class_name].schedules


def _runs(scheduler_class: Any, options: Mapping[str, Any]) -> bool:
    try:
        _run(scheduler_class.from_config(dict(options)), 3)
    except (ValueError, NotImplementedError):
        return False
    return True


def _run(scheduler: Any, steps: int) -> Any:
    """Denoise a few numbers with a network that answers with numbers of a real one's size."""
    scheduler.set_timesteps(steps)
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(1, 1, 2, 2, generator=generator) * scheduler.init_noise_sigma
    more = {"generator": generator} if "generator" in inspect.signature(scheduler.step).parameters else {}
    for timestep in (
        [*scheduler.timesteps[:4], *scheduler.timesteps[4:][-4:]] if steps <= 8 else scheduler.timesteps[:4]
    ):
        answer = torch.tanh(scheduler.scale_model_input(values, timestep))
        values = scheduler.step(answer, timestep, values, return_dict=False, **more)[0]
    return values


def _configs() -> Iterator[dict[str, Any]]:
    spacings, schedules = ("leading", "trailing", "linspace"), ("scaled_linear", "squaredcos_cap_v2")
    for spacing, schedule, prediction, rescaled in product(spacings, schedules, PREDICTIONS[:3], (False, True)):
        yield BETAS | {
            "_class_name": "DDIMScheduler",
            "timestep_spacing": spacing,
            "beta_schedule": schedule,
            "prediction_type": prediction,
            "rescale_betas_zero_snr": rescaled,
            "steps_offset": 1,
        }


@pytest.mark.parametrize("name", sorted(NOISE_SCHEDULERS))
def test_what_is_not_refused_runs_and_stays_finite(name: str) -> None:
    row = FAMILIES["sdxl"]
    ran = 0
    for own, steps in product(_configs(), (1, 2, 3, 4, 8, 50, 1000)):
        if scheduler_config.refusal(row, own, name, steps):
            continue
        scheduler = creation.create(name, row, own, alias="any")
        assert torch.isfinite(_run(scheduler, steps)).all(), (own, steps)
        ran += 1
    assert ran > 30


@pytest.mark.parametrize("name", sorted(NOISE_SCHEDULERS - EDM_SCHEDULERS.keys()))
def test_a_checkpoint_trained_with_edm_refuses_other_names(name: str) -> None:
    refused = scheduler_config.refusal(FAMILIES["sdxl"], {"_class_name": "EDMEulerScheduler"}, name, 4)
    assert "use one of dpmpp-2m, dpmpp-2m-karras" in str(refused)


@pytest.mark.parametrize("name", EDM_SCHEDULERS)
@pytest.mark.parametrize("own", sorted(EDM_CLASSES))
def test_edm_names_run_on_either_configuration(name: str, own: str) -> None:
    config = {"_class_name": own, "sigma_data": 1.0, "sigma_schedule": "exponential", "solver_order": 3}
    scheduler = creation.create(name, FAMILIES["sdxl"], config, alias="any")
    assert scheduler.config.sigma_data == 1.0
    assert scheduler.config.sigma_schedule == ("karras" if "karras" in name else "exponential")
    assert scheduler.config.get("solver_order", 2) == 2
    assert torch.isfinite(_run(scheduler, 4)).all()


@pytest.mark.parametrize("name", ["heun", "lcm"])
def test_a_noise_schedule_that_is_left_out_is_the_default_of_the_checkpoints_own_class(name: str) -> None:
    scheduler = creation.create(name, FAMILIES["sdxl"], {"_class_name": "DDIMScheduler"}, alias="any")
    assert (scheduler.config.beta_start, scheduler.config.beta_schedule) == (0.0001, "linear")


def test_flow_matching_keeps_the_checkpoints_own_schedule() -> None:
    own = {"_class_name": "FlowMatchEulerDiscreteScheduler", "shift": 2.0, "use_karras_sigmas": True}
    (name,) = FLOW_SCHEDULERS
    scheduler = creation.create(name, FAMILIES["sd3"], own, alias="any")
    assert (scheduler.config.shift, scheduler.config.use_karras_sigmas) == (2.0, True)
