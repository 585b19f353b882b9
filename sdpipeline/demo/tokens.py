"""Tokenizer of the checkpoints: CLIP's class with its own vocabulary."""

from collections.abc import Mapping, Sequence
from itertools import pairwise

import numpy as np
import numpy.typing as npt
from transformers import CLIPTokenizer


def build_tokenizer() -> CLIPTokenizer:
    """Build a tokenizer with CLIP's byte alphabet and each caption word as one token, length 77."""
    alphabet = _byte_alphabet()
    vocabulary = {letter: i for i, letter in enumerate([*alphabet, *(f"{letter}</w>" for letter in alphabet)])}
    ranks: dict[tuple[str, str], int] = {}
    for word in _WORDS:
        # Merges of later words rank below all earlier ones, so that no earlier word is split differently.
        while len(pieces := _merged(word, ranks)) > 1:
            ranks[pieces[0], pieces[1]] = len(ranks)
            vocabulary.setdefault(pieces[0] + pieces[1], len(vocabulary))
    for special in ("<|startoftext|>", "<|endoftext|>"):
        vocabulary[special] = len(vocabulary)
    return CLIPTokenizer(vocab=vocabulary, merges=list(ranks), model_max_length=77)


def token_ids(tokenizer: CLIPTokenizer, texts: Sequence[str]) -> npt.NDArray[np.int16]:
    """Return (texts, 77), padded to the full length because the U-Net pools over all of it."""
    encoded = tokenizer(texts, padding="max_length", max_length=77, truncation=True, return_tensors="np")
    return np.asarray(encoded.input_ids, np.int16)


_WORDS = """
    a an the two three one and on in at with of small big large little red green blue yellow purple
    orange white black circle square triangle star heart circles squares triangles stars hearts left
    right top bottom center centre middle background picture
""".split()  # noqa: SIM905 as a list it would be a page long


def _byte_alphabet() -> list[str]:
    """Return one printable letter per byte, in the order of CLIP's own vocabulary."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    hidden = [byte for byte in range(256) if byte not in printable]
    return [chr(byte) for byte in printable] + [chr(256 + i) for i in range(len(hidden))]


def _merged(word: str, ranks: Mapping[tuple[str, str], int]) -> list[str]:
    """Return the word's pieces after all known merges, the lowest rank first."""
    pieces = [*word[:-1], f"{word[-1]}</w>"]
    while True:
        known = [(ranks[pair], i) for i, pair in enumerate(pairwise(pieces)) if pair in ranks]
        if not known:
            return pieces
        _, i = min(known)
        pieces[i : i + 2] = [pieces[i] + pieces[i + 1]]
