"""Plots of a benchmark's figures."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from sdpipeline.domain import Json
from sdpipeline.errors import BadInputError, Mistake
from sdpipeline.private_files import users_umask

ENDINGS = (".png", ".svg")


def check(path: Path) -> None:
    """Refuse, before anything is measured, a file that could not be written afterwards."""
    if path.suffix not in ENDINGS:
        raise BadInputError(Mistake(key="--plot", message=f"{path} ends in neither .png nor .svg"))
    if not path.absolute().parent.is_dir():
        raise BadInputError(Mistake(key="--plot", message=f"{path.parent} is not a folder"))
    try:
        import matplotlib as mpl
    except ModuleNotFoundError as error:
        fix = "pip install 'sdpipeline[plots]'"
        raise BadInputError(Mistake(key="--plot", message="needs matplotlib", fix=fix)) from error
    mpl.use("agg")


def lines(path: Path, rows: Sequence[Json], *, x: str, y: Sequence[str], title: str) -> None:
    """Plot one line for each ``y`` over ``x``, each in a panel of its own."""
    _written(path, rows, x=x, y=y, title=title, bars=False)


def bars(path: Path, rows: Sequence[Json], *, x: str, y: Sequence[str], title: str) -> None:
    """Plot one panel of bars for each ``y``, labelled by ``x``."""
    _written(path, rows, x=x, y=y, title=title, bars=True)


def _written(path: Path, rows: Sequence[Json], *, x: str, y: Sequence[str], title: str, bars: bool) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5 * len(y), 4), layout="constrained")
    figure.suptitle(title)
    for axes, name in zip(figure.subplots(1, len(y), squeeze=False)[0], y, strict=True):
        at, values = [row[x] for row in rows], [row[name] for row in rows]
        if bars:
            axes.bar([str(each) for each in at], values)
        else:
            axes.plot(at, values, marker="o")
        axes.set_xlabel(x.replace("_", " "))
        axes.set_ylabel(name.replace("_", " "))
        axes.set_ylim(bottom=0)
    with users_umask():
        figure.savefig(path)
