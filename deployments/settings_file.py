"""The settings of a configuration file, for commands that start no server."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any, NoReturn

import yaml
from pydantic import ValidationError

from deployments.check import OURS
from deployments.mistakes import told
from deployments.settings import FleetSettings

DEFAULT_CONFIG = Path("serve_config.yaml")
_OURS = OURS.replace(":", ".")


def read_settings(config: Path, model: Path | None) -> FleetSettings:
    """The settings of the configuration's first application of ours, with ``model`` in place of its own base model.

    With ``model`` there need be no configuration. Raises SystemExit with 2 after one line a mistake.
    """
    args: dict[str, Any] = {}
    if config.is_file():
        try:
            content = yaml.safe_load(config.read_text())
            ours = [one for one in content["applications"] if str(one["import_path"]).replace(":", ".") == _OURS]
            args = dict(ours[0].get("args") or {})
        except (yaml.YAMLError, TypeError, KeyError, IndexError) as error:
            stop(f"{config}: it holds no application with import_path {OURS} ({type(error).__name__})")
    elif model is None:
        stop(f"there is no {config}: name Serve's configuration with --config, or a base model with --model")
    if model is not None:
        args |= {"model": str(model.absolute()), "model_name": None}
        if not (model / "config.json").is_file():
            stop(f"--model: there is no config.json in {model}")
    try:
        return FleetSettings.model_validate(args)
    except ValidationError as error:
        stop(*(f"{config}: {line}" for line in told(error, "args.", FleetSettings)))


def stop(*lines: str) -> NoReturn:
    """End the command with 2, as for a command line that is wrong."""
    for line in lines:
        print(line, file=sys.stderr)
    raise SystemExit(2)
