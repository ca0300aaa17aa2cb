"""What can be said of the sources of adapters without asking one: schemes, packages, and environment variables."""

from __future__ import annotations

import os
from collections.abc import Iterator

from adapter_store.schemes import lacks_package, package_remedy, scheme_mistake
from adapter_store.source import AdapterRef
from deployments.settings import FleetSettings


def scheme_mistakes(settings: FleetSettings, place: str) -> Iterator[str]:
    """References with a scheme that there is not. place: where the settings stand, such as ``args``."""
    for where, scheme in _schemes(settings, place):
        if (mistake := scheme_mistake(scheme)) is not None:
            yield f"{where}: {mistake}"


def source_warnings(settings: FleetSettings, place: str) -> Iterator[str]:
    """What this machine lacks of what references need; the machines of the replicas may have it."""
    told: set[str] = set()
    for where, scheme in _schemes(settings, place):
        if scheme not in told and lacks_package(scheme):
            yield f"{where}: {scheme}:// cannot be read on this machine: {package_remedy(scheme)}"
        told.add(scheme)
    for key, source in settings.store_settings().sources.items():
        for option, variable in source.env.items():
            if not os.environ.get(variable):
                yield (
                    f"args.store.sources[{key!r}].env.{option}: the environment variable {variable} is not set here: "
                    "set it where the server is started, on every machine"
                )


def _schemes(settings: FleetSettings, place: str) -> Iterator[tuple[str, str]]:
    """Each place that names a scheme of an object store, and the scheme."""
    references = [(f"{place}.adapters[{name!r}]", text) for name, text in settings.adapters.items()]
    references += [(f"{place}.allow", pattern) for pattern in settings.allow]
    references += [(f"args.store.sources[{key!r}]", key) for key in settings.store_settings().sources]
    for where, text in references:
        if AdapterRef.is_url(text):
            yield where, text.partition("://")[0]
