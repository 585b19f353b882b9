"""Validation of a stage's adapters: LoRAs, textual inversions, IP-Adapters and a replacement autoencoder."""

from __future__ import annotations

from collections.abc import Iterator

from sdpipeline.campaigns.stage_plan import Catalog
from sdpipeline.campaigns.stage_spec import Stage
from sdpipeline.campaigns.yaml_source import Faults, KeyPath
from sdpipeline.engine.checkpoints import CheckpointFiles, adapter_misfit, vae_misfit
from sdpipeline.engine.families import Family
from sdpipeline.suggestions import nearest

KINDS = {
    "loras": ("lora", "LoRA"),
    "textual_inversions": ("textual-inversion", "textual inversion"),
    "ip_adapters": ("ip-adapter", "IP-Adapter"),
}
"""Kind of checkpoint and its display name, by the stage's key."""


def check(stage: Stage, path: KeyPath, faults: Faults, catalog: Catalog) -> None:
    """Note aliases that are unknown or of the wrong kind, for any base checkpoint."""
    for place, use in stage.adapters():
        if why := _no_such(use.checkpoint, *KINDS[str(place[0])], catalog):
            faults.add((*path, *place, "checkpoint"), *why)
    if stage.vae is not None and (why := _no_such(stage.vae, "vae", "autoencoder", catalog)):
        faults.add((*path, "vae"), *why)


def check_fit(
    stage: Stage, path: KeyPath, faults: Faults, catalog: Catalog, *, base: CheckpointFiles, row: Family
) -> None:
    """Note adapters that do not fit the stage's checkpoint."""
    can = {"loras": row.lora, "textual_inversions": row.textual_inversion, "ip_adapters": row.ip_adapter}
    for key in dict.fromkeys(str(place[0]) for place, _ in stage.adapters()):
        if not can[key]:
            faults.add((*path, key), f"{row.title} does not take it", "remove it")
    for place, use in stage.adapters():
        key = str(place[0])
        if can[key] and (why := _misfit(key, base, catalog.get(use.checkpoint))):
            fitting = [files.alias for files in _of_kind(key, catalog) if _misfit(key, base, files) is None]
            faults.add((*path, *place, "checkpoint"), why, nearest(use.checkpoint, fitting))
    if stage.vae is not None:
        _check_vae(stage.vae, (*path, "vae"), faults, catalog, base=base, row=row)


def _no_such(alias: str, kind: str, title: str, catalog: Catalog) -> tuple[str, str] | None:
    known = [files.alias for files in catalog.values() if files.kind == kind]
    if alias in known:
        return None
    is_else = f", it is a {catalog[alias].kind}" if alias in catalog else ""
    return f"no {title} {alias!r}{is_else}", nearest(alias, known)


def _misfit(key: str, base: CheckpointFiles, adapter: CheckpointFiles | None) -> str | None:
    kind = KINDS[key][0]
    if adapter is None or adapter.kind != kind:
        return None
    why = adapter_misfit(key, kind, base, adapter)
    return why and why.removeprefix(f"{key}: ")


def _of_kind(key: str, catalog: Catalog) -> Iterator[CheckpointFiles]:
    return (files for files in catalog.values() if files.kind == KINDS[key][0])


def _check_vae(
    alias: str, place: KeyPath, faults: Faults, catalog: Catalog, *, base: CheckpointFiles, row: Family
) -> None:
    if not row.latents_of:
        faults.add(place, f"{row.title} does not take it", "remove it")
        return
    vae = catalog.get(alias)
    if vae is not None and vae.kind == "vae" and (why := vae_misfit(base, vae)):
        fitting = [files.alias for files in catalog.values() if vae_misfit(base, files) is None]
        faults.add(place, why.removeprefix("vae: "), nearest(alias, fitting))
