"""Nearest known name for a misspelt one."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

LONGEST_COMPARED = 100
MAX_LISTED = 30


def nearest_name(name: str, known: Iterable[str], *, cutoff: float = 0.6) -> str | None:
    """Return the known name most similar to ``name``; None if none reaches the similarity ``cutoff``."""
    close = difflib.get_close_matches(name[:LONGEST_COMPARED], list(known), n=1, cutoff=cutoff)
    return close[0] if close else None


def nearest(name: str, known: Iterable[str]) -> str:
    """Return ``did you mean X?`` or the list of known names."""
    names = sorted(known)
    close = nearest_name(name, names)
    if close is not None:
        return f"did you mean {close!r}?"
    some = ", ".join(names[:MAX_LISTED]) + (", ..." if len(names) > MAX_LISTED else "")
    return f"there are {some}" if len(names) > 1 else f"there is only {some}" if names else "there are none"
