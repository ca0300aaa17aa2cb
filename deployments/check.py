"""Look at a configuration file before Serve does, where a mistake can still stop the start.

    python -m deployments.check [--running] serve_config.yaml

The file may be a KubeRay RayService, too: what is in its serveConfigV2 is looked at, where its folders are.
Prints one line a mistake and exits with 1; a line that starts with "warning:" stops nothing. Ray Serve itself reports
a bad ``args`` in its log and keeps running, and shares a port that another server listens on without a word.
"""

from __future__ import annotations

import argparse
import socket
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import yaml
from pydantic import ValidationError
from ray.serve.config import ProxyLocation
from ray.serve.schema import ServeApplicationSchema, ServeDeploySchema

from adapter_store.digest import CONFIG_FILE
from adapter_store.names import AdapterNames
from adapter_store.references import parse_reference, parts_of
from adapter_store.store import check_host_cache
from deployments.adapters.directory import check_names
from deployments.config_file import repeated_keys, unknown_keys
from deployments.live import with_live
from deployments.mistakes import told
from deployments.observability.tracing import REMEDY, has_exporter
from deployments.settings import FleetSettings
from deployments.source_check import scheme_mistakes, source_warnings
from deployments.tenants.live_keys import LiveKeys
from deployments.tenants.open_mode import open_mistake
from engine.lora_targets import adapter_layout
from engine.parts import dtype_on
from engine.settings import EngineSettings
from engine.spec import ModelSpec

OURS = "deployments.app:build"
OUR_PACKAGE = "deployments."
OUR_DEPLOYMENTS = ("Gateway", "LoraReplica")
SHORT_PROMPT = 64  # tokens
MAX_PORT = 65535


def mistakes(file: Path, *, running: bool = False) -> Iterator[str]:
    """What is wrong with the file, and with what it points to on this machine.

    running: the file is for a server that runs, so that its port is in use as it should be.
    """
    try:
        text, elsewhere = serve_config(file)
        config = yaml.safe_load(text)
        schema = ServeDeploySchema.model_validate(config)
    except (OSError, yaml.YAMLError) as error:
        yield str(error)
        return
    except ValidationError as error:
        yield from told(error, "", ServeDeploySchema)
        return
    yield from repeated_keys(text)
    yield from unknown_keys(config)
    if wrong := _port_mistake(schema.http_options.host, schema.http_options.port, running or elsewhere):
        yield wrong
    for number, application in enumerate(schema.applications):
        place = f"applications.{number}"
        path = application.import_path
        if _is_ours(path):
            yield from application_mistakes(application.args)
            yield from tenant_mistakes(application.args, schema, elsewhere)
            yield from deployment_mistakes(application, place)
        elif path.startswith(OUR_PACKAGE):
            yield f"{place}.import_path: there is no application at {path!r}: write {OURS}"


def serve_config(file: Path) -> tuple[str, bool]:
    """Serve's configuration as text, and whether it is for other machines: that of a KubeRay ``RayService``.

    Raises OSError, and yaml.YAMLError where the file is no YAML.
    """
    text = file.read_text()
    for document in yaml.safe_load_all(text):
        if isinstance(document, dict) and document.get("kind") == "RayService":
            spec = document.get("spec")
            return str(spec.get("serveConfigV2", "") if isinstance(spec, dict) else ""), True
    return text, False


def application_mistakes(args: dict[str, Any]) -> Iterator[str]:
    """What is wrong with the ``args`` of one application."""
    try:
        settings = FleetSettings.model_validate(args)
    except ValidationError as error:
        yield from told(error, "args.", FleetSettings)
        return
    try:
        spec = ModelSpec.from_dir(settings.model_folder())
    except (OSError, ValueError) as error:
        yield f"args.model: {error}"
    else:
        asked = settings.engine_settings().max_model_len
        if asked is not None and asked > spec.max_position_embeddings:
            yield f"args.engine.max_model_len: {asked} is more than the model's {spec.max_position_embeddings}"
        needs = host_cache_needs(settings.engine_settings(), spec)
        if all(needs.values()):
            yield f"args.{needs.popitem()[1]}"
    yield from adapter_mistakes(settings, "args")


def tenant_mistakes(args: dict[str, Any], config: ServeDeploySchema, elsewhere: bool) -> Iterator[str]:
    """What is wrong with who may use the application: its keys file, and the lack of one. elsewhere: that file is on
    other machines."""
    try:
        settings = FleetSettings.model_validate(args)
    except ValidationError:
        return  # told already
    file, host = settings.gateway.keys_file, config.http_options.host
    if config.proxy_location == ProxyLocation.Disabled:
        host = None
    if wrong := open_mistake(host, file, stated=settings.gateway.open):
        yield f"args.gateway: {wrong}"
    if file is not None and not elsewhere:
        try:
            LiveKeys(settings.path(file))
        except ValueError as error:
            yield f"args.gateway.keys_file: {error}"


def host_cache_needs(engine: EngineSettings, spec: ModelSpec) -> dict[str, str | None]:
    """For each kind of device that the engine may run on: what is wrong with ``store.host_cache_bytes`` there."""
    found: dict[str, str | None] = {}
    for kind in ("cpu", "cuda") if engine.device == "auto" else (engine.device,):
        found[kind] = None
        dtype = dtype_on(engine, torch.device(kind))
        try:
            if engine.slots:
                check_host_cache(engine.store.host_cache_bytes, adapter_layout(spec), dtype, engine.max_rank)
        except ValueError as error:
            found[kind] = str(error)
    return found


def deployment_mistakes(application: ServeApplicationSchema, place: str) -> Iterator[str]:
    """What is wrong with an application's deployments: their names, and their ``user_config``."""
    try:
        args = FleetSettings.model_validate(application.args)
    except ValidationError:
        args = None  # told already
    for number, deployment in enumerate(application.deployments):
        where = f"{place}.deployments.{number}"
        if deployment.name not in OUR_DEPLOYMENTS:
            known = " and ".join(OUR_DEPLOYMENTS)
            yield f"{where}.name: there is no deployment {deployment.name!r}: the application has {known}"
            continue
        if args is None:
            continue
        fixed = deployment.name == "LoraReplica" and "num_replicas" in deployment.model_fields_set
        if fixed and args.replicas.autoscaling is not None:
            yield f"{where}.num_replicas: args.replicas.autoscaling is set too, and goes first: leave one of them out"
        if not isinstance(deployment.user_config, dict):
            continue
        try:
            settings = with_live(args, deployment.user_config)
        except ValueError as error:
            yield f"{where}.{error}"
            continue
        yield from adapter_mistakes(settings, f"{where}.user_config")


def adapter_mistakes(settings: FleetSettings, place: str) -> Iterator[str]:
    """Adapters of the settings that are not where they should be, or have a name that is taken."""
    store = settings.store_settings()
    missing = [folder for folder in settings.adapter_folders if not store.path(folder).is_dir()]
    for folder in missing:
        yield f"{place}.adapter_folders: there is no folder {store.path(folder)}"
    there = tuple(folder for folder in settings.adapter_folders if folder not in missing)
    try:
        check_names(settings.base_model_name, AdapterNames(replace(store, folders=there)).names())
    except ValueError as error:
        yield f"args.model_name: {error}"
    yield from scheme_mistakes(settings, place)
    for name, text in settings.adapters.items():
        for ref in parts_of(parse_reference(text)):
            if ref.source == "local" and not (store.path(ref.id) / CONFIG_FILE).is_file():
                yield f"{place}.adapters[{name!r}]: there is no {CONFIG_FILE} in {store.path(ref.id)}"


def warnings(file: Path) -> Iterator[str]:
    """What will run in a file without mistakes, but hardly as it was meant."""
    for application in ServeDeploySchema.model_validate(yaml.safe_load(serve_config(file)[0])).applications:
        if _is_ours(application.import_path):
            # One user_config stands at both deployments, and says once what it says.
            yield from dict.fromkeys([*application_warnings(application.args), *_live_warnings(application)])


def _live_warnings(application: ServeApplicationSchema) -> Iterator[str]:
    args = FleetSettings.model_validate(application.args).model_copy(update={"adapters": {}, "allow": []})
    for deployment in application.deployments:
        if isinstance(deployment.user_config, dict):
            yield from source_warnings(with_live(args, deployment.user_config), "user_config")


def application_warnings(args: dict[str, Any]) -> Iterator[str]:
    """The same for the ``args`` of one application."""
    settings = FleetSettings.model_validate(args)
    engine = settings.engine_settings()
    yield from source_warnings(settings, "args")
    if settings.tracing.endpoint is not None and not has_exporter():
        yield f"args.tracing.endpoint: spans cannot be sent from this machine: {REMEDY}"
    for kind, need in host_cache_needs(engine, ModelSpec.from_dir(settings.model_folder())).items():
        if need is not None:
            yield f"args.{need} (where the engine runs on {kind})"
    if engine.num_pages is None:
        return
    room, wanted = engine.num_pages * engine.page_size, min(SHORT_PROMPT, settings.max_model_len())
    if room < wanted:
        yield (
            f"args.engine.num_pages: {engine.num_pages} pages of {engine.page_size} tokens hold {room} tokens in all, "
            f"less than a short prompt of {wanted}: raise num_pages, or leave it out to have it sized"
        )


def _is_ours(import_path: str) -> bool:
    return import_path.replace(":", ".") == OURS.replace(":", ".")  # Serve takes both


def _port_mistake(host: str | None, port: int, running: bool) -> str | None:
    if not 1 <= port <= MAX_PORT:
        return f"http_options.port: {port} is no port: it must be from 1 to {MAX_PORT}"
    if running:
        return None
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host or "127.0.0.1", port))
        except OSError as error:
            reason = f"{host}:{port} cannot be used ({error.strerror})"
            remedy = (
                "stop what listens there, change port, or, if it is the server to be changed, check the file with "
                "python -m deployments.check --running"
            )
            return f"http_options: {reason}: {remedy}"
    return None


def main() -> None:
    """Check the file that the command line names."""
    parser = argparse.ArgumentParser(prog="python -m deployments.check", description="Find mistakes before Serve does.")
    parser.add_argument("file", type=Path, help="Serve's configuration file")
    parser.add_argument("--running", action="store_true", help="for a server that runs: its port may be in use")
    arguments = parser.parse_args()
    file: Path = arguments.file
    found = list(mistakes(file, running=arguments.running))
    for mistake in found:
        print(f"{file}: {mistake}", file=sys.stderr)
    if not found:
        for warning in warnings(file):
            print(f"{file}: warning: {warning}", file=sys.stderr)
    sys.exit(1 if found else 0)


if __name__ == "__main__":
    main()
