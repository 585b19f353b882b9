"""Measure the shipped checkpoints: `python -m sdpipeline.demo.evaluate` prints the model card's table."""

import argparse
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

from sdpipeline.demo.manifest import CHECKPOINTS
from sdpipeline.demo.studio import Studio
from sdpipeline.demo.trials import (
    Score,
    control,
    image_to_image,
    inpainting,
    several_objects,
    single_objects,
    speed,
    super_resolution,
)

TRIALS: Mapping[str, Callable[[Studio], list[Score]]] = {
    "single": single_objects,
    "several": several_objects,
    "control": control,
    "img2img": image_to_image,
    "inpaint": inpainting,
    "upscale": super_resolution,
    "speed": speed,
}


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line."""
    options = _parser().parse_args(arguments)
    studio = Studio(checkpoints=options.checkpoints, device=options.device, batch=options.batch)
    scores = [score for name in options.only or TRIALS for score in TRIALS[name](studio)]
    if options.json:
        print(json.dumps({"scores": [asdict(score) for score in scores]}, indent=2))
    else:
        print(table(scores))


def table(scores: Sequence[Score]) -> str:
    """Format scores as a Markdown table, one line per score."""
    lines = ["| measure | score | by chance | pictures | asked |", "|---|---|---|---|---|"]
    for score in scores:
        chance = "" if score.chance is None else f"{score.chance:.3g}"
        value = f"{score.value:.3f}" if score.unit == "share" else f"{score.value:.2f} {score.unit}"
        lines.append(f"| {score.measure} | {value} | {chance} | {score.count} | {score.asked} |")
    return "\n".join(lines)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m sdpipeline.demo.evaluate", description=__doc__)
    parser.add_argument("--json", action="store_true", help="one JSON document instead of the table")
    parser.add_argument("--only", nargs="+", choices=TRIALS, metavar="TRIAL", help=f"of {', '.join(TRIALS)}")
    parser.add_argument("--checkpoints", type=Path, default=CHECKPOINTS, metavar="DIR")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--batch", type=int, default=16)
    return parser


if __name__ == "__main__":
    main()
