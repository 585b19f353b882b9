"""What each profile trades for speed; the batch key and the fingerprint hold its name, the record these numbers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from sdpipeline.domain import Json, Profile


@dataclass(frozen=True, slots=True, kw_only=True)
class Shortcuts:
    """Guidance for the first ``guidance_until`` of the steps (0-1), the whole U-Net at every ``whole_unet_every``-th.

    Published numbers never change: a picture is made again by the name of its profile.
    """

    guidance_until: float = 1.0
    whole_unet_every: int = 1

    def document(self) -> Json:
        """As the record holds them; what is not cut short is left out."""
        found: Json = {}
        if self.guidance_until < 1:
            found["guidance_until"] = self.guidance_until
        if self.whole_unet_every > 1:
            found["whole_unet_every"] = self.whole_unet_every
        return found


PROFILES: Mapping[Profile, Shortcuts] = {
    "exact": Shortcuts(),
    "fast": Shortcuts(guidance_until=0.8),
    "turbo": Shortcuts(guidance_until=0.6, whole_unet_every=2),
}
"""From the one that changes nothing to the quickest."""
