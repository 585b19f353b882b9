"""Speed profiles: the batch key and the fingerprint hold a profile's name, the record holds its numbers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from sdpipeline.domain import Json, Profile


@dataclass(frozen=True, slots=True, kw_only=True)
class Shortcuts:
    """Computations that denoising skips.

    Guidance needs a second row of the network. The prompt's change of the output is computed at every
    ``guidance_every``-th step, and reused from the previous step at the others. The U-Net's deep half runs at every
    ``whole_unet_every``-th step, and its last output is reused at the others. Published numbers never change, because
    a picture is reproduced by the name of its profile.
    """

    guidance_every: int = 1
    whole_unet_every: int = 1

    def document(self) -> Json:
        """Return the shortcuts for the record, without those that skip nothing."""
        every = {"guidance_every": self.guidance_every, "whole_unet_every": self.whole_unet_every}
        return {name: steps for name, steps in every.items() if steps > 1}


PROFILES: Mapping[Profile, Shortcuts] = {
    "exact": Shortcuts(),
    "fast": Shortcuts(guidance_every=2),
    "turbo": Shortcuts(guidance_every=2, whole_unet_every=2),
}
"""Profiles from the one that changes nothing to the fastest. Guidance that ends after 80 % of the steps was tried and
left out: it saves less than guidance at every second step, and changes the demo's pictures twice as much."""
