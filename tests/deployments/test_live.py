"""``user_config``: what may change while replicas run, and what a mistake in it does: nothing."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from adapter_store.catalog import Catalog
from adapter_store.errors import AdapterNotFound
from deployments.live import LiveConfig, with_live
from deployments.settings import FleetSettings

ROOT = Path(__file__).parents[2]
ARGS = FleetSettings.model_validate(
    {
        "model": "examples/demo/model",
        "adapters": {"a": "hub:acme/a"},
        "adapter_folders": ["examples/demo/adapters"],
        "replicas": {"stream_items_per_s": 10, "num_replicas": 3},
    }
)


def test_a_key_replaces_the_one_of_args_whole_and_a_key_left_out_is_as_in_args():
    live = with_live(ARGS, {"adapters": {"b": "hub:acme/b"}, "stream_max_delay_s": 0.5})
    assert live.adapters == {"b": "hub:acme/b"} and live.adapter_folders == ARGS.adapter_folders
    assert (live.replicas.stream_items_per_s, live.replicas.stream_max_delay_s) == (10, 0.5)
    assert live.replicas.num_replicas == 3
    assert with_live(ARGS, {"adapters": {}, "adapter_folders": []}).adapter_folders == []
    assert with_live(ARGS, {}) == with_live(ARGS, None) == ARGS


@pytest.mark.parametrize(
    ("user_config", "said"),
    [
        ({"max_rows": 3}, "user_config.max_rows: unknown key; known are adapter_folders, adapters, allow, stream_"),
        ({"adapters": {"x": "x"}}, "user_config.adapters['x']: "),
        ({"adapters": ["x"]}, "user_config.adapters: "),
        ({"allow": ["acme/*"]}, "user_config.allow: 'acme/*' must start with"),
        ({"stream_items_per_s": 0}, "user_config.replicas.stream_items_per_s: Input should be greater than 0"),
    ],
)
def test_a_mistake_is_refused_by_its_place_and_what_was_in_force_stays(user_config, said):
    config, applied = LiveConfig(ARGS), []
    config.take({"allow": ["hub:acme/*"]}, applied.append)
    before = config.settings
    assert before.allow == ["hub:acme/*"] and applied == [before]
    config.take(user_config, applied.append)
    assert config.settings is before and applied == [before]
    assert config.refused is not None and config.refused.startswith(said)
    config.take({}, applied.append)
    assert config.settings == ARGS and config.refused is None


def test_what_cannot_be_applied_is_refused_too():
    config = LiveConfig(ARGS)

    def refuse(_):
        raise ValueError("folders: 'x' is not a folder")

    config.take({"adapter_folders": ["x"]}, refuse)
    assert config.settings is ARGS and config.refused == "folders: 'x' is not a folder"


def test_a_declared_folder_that_is_missing_is_taken_and_found_when_it_is_there(tmp_path):
    catalog = Catalog(ARGS.store_settings())
    config = LiveConfig(ARGS)
    folder = tmp_path / "later"
    config.take(
        {"adapters": {"json": f"local:{folder}"}}, lambda settings: catalog.reconfigure(settings.store_settings())
    )
    assert config.refused is None
    with pytest.raises(AdapterNotFound, match="no adapter_config"):
        catalog.resolve("json")  # although an adapter folder has one of this name
    shutil.copytree(ROOT / "examples" / "demo" / "adapters" / "json", folder)
    assert catalog.resolve("json").ref.id == str(folder)
    config.take(
        {"adapter_folders": [str(tmp_path / "gone")]}, lambda settings: catalog.reconfigure(settings.store_settings())
    )
    assert config.refused is not None and "is not a folder" in config.refused
    catalog.close()
