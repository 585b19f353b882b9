"""Scaffold of ``init``: a settings file, the campaign file's JSON Schema, and runnable examples."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from sdpipeline.campaigns import json_schema
from sdpipeline.errors import BadInputError, Mistake
from sdpipeline.private_files import users_umask
from sdpipeline.settings import PREFIX, TOML_NAME, setting_names, toml_keys

EXAMPLES = Path(__file__).parents[1] / "examples"
SCHEMA_NAME = "campaign.schema.json"
CAMPAIGNS = {
    "catalogue.yaml": "a product catalogue from a table",
    "grid.yaml": "an A/B grid of prompts, guidance scales and schedulers",
    "scene.yaml": "a scene with outlines from two drafts, by two ControlNets",
    "restore.yaml": "your own pictures, restored and upscaled",
}
"""Runnable examples, with a description of each."""

_HEAD = f"""\
# Settings of sdpipeline for this folder and those below it; paths are relative to this file. Uncomment a line to
# set it. The environment ({PREFIX}TEAM=web) and a .env file override this file.
"""


def files() -> dict[str, bytes]:
    """Return the bytes of every file by its path in the new folder."""
    found = {TOML_NAME: settings_file().encode(), SCHEMA_NAME: json_schema.text().encode()}
    examples = sorted(path for path in EXAMPLES.rglob("*") if path.is_file())
    return found | {path.relative_to(EXAMPLES).as_posix(): path.read_bytes() for path in examples}


def write(folder: Path, *, force: bool = False) -> list[str]:
    """Write all files or none; raises BadInputError naming each file that exists already."""
    wanted = files()
    existing = [name for name in wanted if (folder / name).exists() or (folder / name).is_symlink()]
    if existing and not force:
        fix = "name another folder, or overwrite with --force"
        raise BadInputError(*(Mistake(message=f"{folder / name} already exists", fix=fix) for name in existing))
    for name, data in wanted.items():
        path = folder / name
        try:
            with users_umask():
                path.parent.mkdir(parents=True, exist_ok=True)
                path.touch(0o600 if name == TOML_NAME else 0o666)  # users may add passwords to the settings
                path.write_bytes(data)
        except OSError as error:
            raise BadInputError(Mistake(message=f"{path} cannot be written: {error.strerror}")) from error
    return list(wanted)


def settings_file() -> str:
    """Return a settings file with every setting, its meaning and its default, commented out."""
    lines, table = [_HEAD], ""
    for name, (description, default) in setting_names().items():
        *section, key = toml_keys(name)
        if section and section[0] != table:
            table = section[0]
            lines += [f"[{table}]", ""]
        lines += [f"# {description}", f"# {key} ={_shown(default)}", ""]
    return "\n".join(lines)


def _shown(default: Any) -> str:
    if default is None:
        return ""
    return " " + json.dumps(str(default) if isinstance(default, Path) else default, ensure_ascii=False)
