"""Validation of a stage's adapters: LoRAs, textual inversions, IP-Adapters and a replacement autoencoder."""

from __future__ import annotations

from collections.abc import Iterator

from sdpipeline.campaigns.stage_plan import Catalog
from sdpipeline.campaigns.stage_spec import Stage
from sdpipeline.campaigns.yaml_source import Faults, KeyPath
from sdpipeline.engine.checkpoints import WEIGHTS, CheckpointFiles, adapter_refusal, header, vae_refusal
from sdpipeline.engine.families import Family
from sdpipeline.engine.lora_files import lora_refusal
from sdpipeline.engine.refusal import Refusal
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
        if can[key] and key == "loras" and (why := _not_plain(catalog.get(use.checkpoint))):
            faults.add((*path, *place, "checkpoint"), why)
        elif can[key] and (refused := _refused(key, base, catalog.get(use.checkpoint))):
            fitting = [files.alias for files in _of_kind(key, catalog) if _refused(key, base, files) is None]
            faults.add((*path, *place, "checkpoint"), refused.message, nearest(use.checkpoint, fitting))
    if stage.vae is not None:
        _check_vae(stage.vae, (*path, "vae"), faults, catalog, base=base, row=row)


def _no_such(alias: str, kind: str, title: str, catalog: Catalog) -> tuple[str, str] | None:
    known = [files.alias for files in catalog.values() if files.kind == kind]
    if alias in known:
        return None
    is_else = f", it is a {catalog[alias].kind}" if alias in catalog else ""
    return f"no {title} {alias!r}{is_else}", nearest(alias, known)


def _refused(key: str, base: CheckpointFiles, adapter: CheckpointFiles | None) -> Refusal | None:
    kind = KINDS[key][0]
    if adapter is None or adapter.kind != kind:
        return None
    return adapter_refusal(key, kind, base, adapter)


def _not_plain(adapter: CheckpointFiles | None) -> str | None:
    """Return why a LoRA that an earlier release registered cannot be applied; None if its file is elsewhere."""
    if adapter is None or adapter.kind != "lora":
        return None
    for name in adapter.manifest:
        path = adapter.directory / name
        if name.endswith(WEIGHTS) and path.is_file() and (why := lora_refusal(header(adapter.alias, path))):
            return f"{adapter.alias!r} {why}"
    return None


def _of_kind(key: str, catalog: Catalog) -> Iterator[CheckpointFiles]:
    return (files for files in catalog.values() if files.kind == KINDS[key][0])


def _check_vae(
    alias: str, place: KeyPath, faults: Faults, catalog: Catalog, *, base: CheckpointFiles, row: Family
) -> None:
    if not row.latents_of:
        faults.add(place, f"{row.title} does not take it", "remove it")
        return
    vae = catalog.get(alias)
    if vae is not None and vae.kind == "vae" and (refused := vae_refusal(base, vae)):
        fitting = [files.alias for files in catalog.values() if vae_refusal(base, files) is None]
        faults.add(place, refused.message, nearest(alias, fitting))
