"""The shape of Serve's configuration file: keys that Serve would pass over, and keys that are written twice."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import yaml
from pydantic import BaseModel
from ray.serve.schema import DeploymentSchema, HTTPOptionsSchema, ServeApplicationSchema, ServeDeploySchema

from deployments.mistakes import unknown


def repeated_keys(text: str) -> Iterator[str]:
    """One line a key that stands twice in a mapping, where YAML would take the last without a word.

    Raises yaml.YAMLError where the text is no YAML.
    """
    yield from _repeated(yaml.compose(text, Loader=yaml.SafeLoader), "", set())


def unknown_keys(config: Mapping[str, Any]) -> Iterator[str]:
    """One line a key that Serve's own schema lacks. config: what ``ServeDeploySchema`` has accepted."""
    yield from _unknown(config, ServeDeploySchema, "")
    yield from _unknown(config.get("http_options"), HTTPOptionsSchema, "http_options.")
    for number, application in enumerate(config["applications"]):
        place = f"applications.{number}."
        yield from _unknown(application, ServeApplicationSchema, place)
        for index, deployment in enumerate(application.get("deployments") or ()):
            yield from _unknown(deployment, DeploymentSchema, f"{place}deployments.{index}.")


def _unknown(written: Any, schema: type[BaseModel], before: str) -> Iterator[str]:
    if not isinstance(written, Mapping):
        return
    known = sorted(schema.model_fields)
    for key in sorted(map(str, set(written) - set(known))):
        yield f"{before}{key}: {unknown(known)}"


def _repeated(node: yaml.Node | None, before: str, seen: set[int]) -> Iterator[str]:
    """seen: ids of nodes that were looked at, for an alias is the node of its anchor."""
    if node is None or id(node) in seen:
        return
    seen.add(id(node))
    if isinstance(node, yaml.SequenceNode):
        for index, item in enumerate(node.value):
            yield from _repeated(item, f"{before}{index}.", seen)
    elif isinstance(node, yaml.MappingNode):
        lines: dict[tuple[str, str], int] = {}
        for key, value in node.value:
            name, line = str(key.value), key.start_mark.line + 1
            if (key.tag, name) in lines and isinstance(key, yaml.ScalarNode):
                first = lines[key.tag, name]
                yield f"{before}{name}: written in line {first} and again in line {line}: leave one of them"
            lines.setdefault((key.tag, name), line)
            yield from _repeated(value, f"{before}{name}.", seen)
