"""Pictures of the shipped checkpoint follow their prompts and control maps."""

from __future__ import annotations

from typing import Any

import cv2
import numpy as np

from sdpipeline.domain import GenerationRequest, Task
from sdpipeline.engine import Pixels
from sdpipeline.engine.annotators import annotate
from tests.integration.engine_requests import controlnet, disc, image_of, images, middle_mask, prepared, ref, results
from tests.integration.engine_requests import request as ask

CANNY = (("low_threshold", 60), ("high_threshold", 140))
PALETTE = {
    "red": (220, 38, 38),
    "green": (34, 160, 70),
    "blue": (40, 80, 215),
    "yellow": (245, 215, 40),
    "purple": (140, 60, 185),
    "orange": (245, 130, 25),
    "white": (245, 245, 245),
    "black": (18, 18, 18),
}


def shapes(prompt: str, **changes: Any) -> GenerationRequest:
    sized = {"width": 128, "height": 128, "num_inference_steps": 12, "scheduler": "dpmpp-2m"}
    return ask("shapes", prompt=prompt, **sized | changes)


def nearest_colour(pixels: Pixels) -> str:
    colour = np.median(pixels.reshape(-1, 3), axis=0)
    return min(PALETTE, key=lambda name: float(np.square(colour - np.array(PALETTE[name])).sum()))


def ground(pixels: Pixels) -> str:
    return nearest_colour(np.concatenate([pixels[:4].reshape(-1, 3), pixels[-4:].reshape(-1, 3)]))


def centre(pixels: Pixels) -> str:
    return nearest_colour(pixels[54:74, 54:74])


def edge_recall(pixels: Pixels, control: Pixels) -> float:
    """Share of the control map's edges that the picture reproduces within 2 pixels."""
    edges = cv2.dilate(cv2.Canny(pixels, 60, 140), np.ones((5, 5), np.uint8)) > 0
    wanted = control[..., 0] > 0
    return float((wanted & edges).sum() / wanted.sum())


def test_the_colours_that_were_asked_for_appear() -> None:
    asked = [("red", "white"), ("yellow", "purple"), ("blue", "orange"), ("green", "black")]
    prompts = [f"a {colour} circle in the center on a {behind} background" for colour, behind in asked]
    made = images(*[prepared(shapes(prompt, seed=7)) for prompt in prompts])
    assert [(centre(image.pixels), ground(image.pixels)) for image in made] == asked


def test_control_edges_are_followed_in_other_colours() -> None:
    control = controlnet("shapes-canny", annotator="canny", annotator_parameters=CANNY)
    asked = shapes("a yellow circle on a purple background", controlnets=(control,))
    made = image_of(results(prepared(asked, controlnets_0=disc()))[0])
    without = image_of(results(prepared(shapes("a yellow circle on a purple background")))[0])
    assert edge_recall(made.pixels, made.control_maps[0]) > 0.8 > edge_recall(without.pixels, made.control_maps[0])
    assert (centre(made.pixels), ground(made.pixels)) == ("yellow", "purple")


def test_the_control_map_is_the_annotated_input() -> None:
    control = controlnet("shapes-canny", annotator="canny", annotator_parameters=CANNY)
    asked = shapes("a red circle on a white background", controlnets=(control,), num_inference_steps=1)
    made = image_of(results(prepared(asked, controlnets_0=disc()))[0])
    assert (made.control_maps[0] == annotate("canny", disc(), dict(CANNY))).all()


def test_image_to_image_keeps_the_place_of_its_input_and_takes_the_new_colours() -> None:
    asked = shapes("a yellow circle on a purple background", task=Task.IMAGE_TO_IMAGE, strength=0.7)
    made = images(*[prepared(shapes_seed(asked, seed), image=disc()) for seed in (1, 2)])
    for image in made:
        assert (centre(image.pixels), ground(image.pixels)) == ("yellow", "purple")


def test_a_weak_image_to_image_stays_with_its_input() -> None:
    asked = shapes("a red circle on a white background", task=Task.IMAGE_TO_IMAGE, strength=0.2)
    made = images(prepared(asked, image=disc()))[0]
    assert np.abs(made.pixels.astype(int) - disc().astype(int)).mean() < 12


def test_inpainting_paints_the_mask_and_keeps_every_pixel_outside_it() -> None:
    mask = middle_mask(128)
    asked = shapes("a yellow circle on a white background", task=Task.INPAINTING)
    made = images(prepared(asked, image=disc(), mask_image=mask))[0]
    outside = mask[..., 0] == 0
    assert (made.pixels[outside] == disc()[outside]).all()
    assert centre(made.pixels) == "yellow"
    assert made.ran["unmasked_pixels"] == "pasted back from the input"


def shapes_seed(asked: GenerationRequest, seed: int) -> GenerationRequest:
    return GenerationRequest(**{name: getattr(asked, name) for name in asked.__slots__} | {"seed": seed})


def test_the_shipped_checkpoints_are_what_their_names_say() -> None:
    from tests.integration.tiny_checkpoints import tiny_checkpoints

    files = tiny_checkpoints().files
    assert (files("shapes").kind, files("shapes").family) == ("checkpoint", "sd1")
    assert (files("shapes-canny").kind, files("shapes-canny").family) == ("controlnet", "sd1")
    assert ref("shapes").digest == files("shapes").digest
