"""Training data: scenes drawn, described and measured once, then kept on the device."""

from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, fields
from functools import cache, partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any, Self

import cv2
import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from tqdm import tqdm
from transformers import CLIPTokenizer

from sdpipeline.demo.captions import describe
from sdpipeline.demo.latents import SHAPES_LATENT
from sdpipeline.demo.scenes import Picture, render, sample_scene, texture
from sdpipeline.demo.tokens import build_tokenizer, token_ids
from sdpipeline.engine.quality import edges

SIDE = 128
UPSCALED_SIDE = 512
WORDINGS = 4
"""Random wordings kept for each scene; the last says nothing about place and size."""

Arrays = dict[str, npt.NDArray[Any]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Corpus:
    """Scenes in the form that U-Net and ControlNet need; the first axis is the scene."""

    latents: Tensor
    """(scenes, 4, 16, 16) float16, designed, standardised."""
    edges: Tensor
    """(scenes, 2048) uint8, the bits of a 128 x 128 edge map."""
    tokens: Tensor
    """(scenes, WORDINGS, 77) int16."""
    labels: Tensor
    """(scenes, WORDINGS, facets) int8; see captions.FACETS."""

    def __len__(self) -> int:
        """Return the number of scenes."""
        return len(self.latents)

    @classmethod
    def load(cls, path: Path, device: torch.device) -> Self:
        """Load the file of `save_corpus` onto the device."""
        with np.load(path) as arrays:
            return cls(**{field.name: torch.from_numpy(arrays[field.name]).to(device) for field in fields(cls)})

    def edge_maps(self, chosen: Tensor) -> Tensor:
        """Return the control pictures of the chosen scenes: (batch, 3, 128, 128), 0 or 1."""
        shifts = torch.arange(7, -1, -1, device=self.edges.device, dtype=torch.uint8)
        bits = (self.edges[chosen][..., None] >> shifts) & 1
        return bits.view(-1, 1, SIDE, SIDE).float().expand(-1, 3, -1, -1)


def save_corpus(path: Path, *, scenes: int, kinds: Mapping[str, float], seed: int, workers: int) -> None:
    """Draw and describe `scenes` scenes of these kinds, none of them held out."""
    describe_chunk = partial(_describe_chunk, kinds=kinds)
    parts = list(_render_chunks(describe_chunk, scenes, seed=seed, workers=workers, title="scenes"))
    path.parent.mkdir(parents=True, exist_ok=True)
    columns: Any = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
    np.savez(path, **columns)


def load_pictures(path: Path, *, pictures: int, seed: int, workers: int, device: torch.device) -> Tensor:
    """Return (pictures, 3, 512, 512) uint8 on the device, drawn on first use; one in ten is not a scene."""
    if not path.exists():
        chunks = _render_chunks(_draw_chunk, pictures, seed=seed, workers=workers, title="pictures")
        path.parent.mkdir(parents=True, exist_ok=True)
        np.save(path, np.concatenate([chunk["pictures"] for chunk in chunks]))
    return torch.from_numpy(np.load(path)).permute(0, 3, 1, 2).to(device)


def to_pixels(pictures: Sequence[Picture]) -> Tensor:
    """Convert pictures to (pictures, 3, height, width) in -1..1, on the CPU."""
    return torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2).float() / 127.5 - 1


_CHUNK = 128


def _render_chunks(render_chunk: Any, total: int, *, seed: int, workers: int, title: str) -> Iterator[Arrays]:
    """Yield `total` scenes in chunks, each from its own seed, so that the number of workers changes no picture."""
    sizes = [min(_CHUNK, total - start) for start in range(0, total, _CHUNK)]
    seeds = np.random.SeedSequence(seed).spawn(len(sizes))
    # A forked child inherits torch's threads in an undefined state, so spawn clean ones.
    with ProcessPoolExecutor(workers, get_context("spawn"), initializer=_single_thread) as pool:
        chunks = pool.map(render_chunk, sizes, seeds)
        yield from tqdm(chunks, total=len(sizes), desc=title, unit="chunk")


def _single_thread() -> None:
    cv2.setNumThreads(1)
    torch.set_num_threads(1)


@cache
def _tokenizer() -> CLIPTokenizer:
    return build_tokenizer()


def _describe_chunk(count: int, seed: np.random.SeedSequence, *, kinds: Mapping[str, float]) -> Arrays:
    rng = np.random.default_rng(seed)
    scenes = [sample_scene(rng, kinds=kinds) for _ in range(count)]
    pictures = [render(rng, scene, side=SIDE) for scene in scenes]
    captions = [
        [describe(rng, scene, silent=wording == WORDINGS - 1) for wording in range(WORDINGS)] for scene in scenes
    ]
    texts = [caption.text for row in captions for caption in row]
    return {
        "latents": np.concatenate([_designed(pictures[start : start + 16]) for start in range(0, count, 16)]),
        "edges": np.stack([np.packbits(edges(_softened(rng, picture))) for picture in pictures]),
        "tokens": token_ids(_tokenizer(), texts).reshape(count, WORDINGS, -1),
        "labels": np.array([[caption.labels for caption in row] for row in captions], np.int8),
    }


def _draw_chunk(count: int, seed: np.random.SeedSequence) -> Arrays:
    rng = np.random.default_rng(seed)
    drawn = [
        texture(rng, side=UPSCALED_SIDE) if rng.random() < 0.1 else render(rng, sample_scene(rng), side=UPSCALED_SIDE)
        for _ in range(count)
    ]
    return {"pictures": np.stack(drawn)}


def _designed(pictures: Sequence[Picture]) -> npt.NDArray[np.float16]:
    return SHAPES_LATENT.encode(to_pixels(pictures)).half().numpy()


def _softened(rng: np.random.Generator, picture: Picture) -> Picture:
    """Blur half of the pictures: edges of generated pictures are rounder than drawn ones."""
    if rng.random() < 0.5:
        return picture
    return np.asarray(cv2.GaussianBlur(picture, (0, 0), rng.uniform(0.4, 1.6)), np.uint8)
