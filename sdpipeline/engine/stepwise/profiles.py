"""What each profile trades for speed; the batch key and the fingerprint hold its name, the record these numbers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from sdpipeline.domain import Json, Profile


@dataclass(frozen=True, slots=True, kw_only=True)
class Shortcuts:
    """What is left out of a denoising.

    What the prompt changes, which takes a second row of the network, is computed at every ``guidance_every``-th step,
    and taken from the step before at the others. The U-Net's deep half runs at every ``whole_unet_every``-th step; at
    the others what it gave before stands in for it. Published numbers never change: a picture is made again by the name
    of its profile.
    """

    guidance_every: int = 1
    whole_unet_every: int = 1

    def document(self) -> Json:
        """As the record holds them; what is not left out is not named."""
        every = {"guidance_every": self.guidance_every, "whole_unet_every": self.whole_unet_every}
        return {name: steps for name, steps in every.items() if steps > 1}


PROFILES: Mapping[Profile, Shortcuts] = {
    "exact": Shortcuts(),
    "fast": Shortcuts(guidance_every=2),
    "turbo": Shortcuts(guidance_every=2, whole_unet_every=2),
}
"""From the one that changes nothing to the quickest. Guidance that ends after 80 % of the steps was tried and left out:
it saves less than every second step does, and changes the demo's pictures twice as much."""
