"""``python -m adapter_store``: what it says is what a server with the same settings does."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from deployments.adapters.command import main
from tests.adapter_store.hub_server import HubServer

ROOT = Path(__file__).parents[2]
SHOUT = ROOT / "examples/demo/adapters/shout"
FILES = ("adapter_config.json", "adapter_model.safetensors")


@pytest.fixture
def hub() -> Iterator[HubServer]:
    with HubServer() as server:
        server.publish("acme/shout", {name: (SHOUT / name).read_bytes() for name in FILES})
        yield server


@pytest.fixture
def config(tmp_path: Path) -> Path:
    return written(tmp_path)


def written(folder: Path, **args: Any) -> Path:
    content = yaml.safe_load((ROOT / "serve_config.yaml").read_text())
    content["applications"][0]["args"] |= args
    content["applications"][0]["args"]["store"] |= {"cache_dir": str(folder / "cache")} | args.get("store", {})
    file = folder / "config.yaml"
    file.write_text(yaml.safe_dump(content))
    return file


def told(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, list[dict[str, Any]]]:
    with pytest.raises(SystemExit) as ended:
        main(["--json", *map(str, arguments)])
    assert isinstance(ended.value.code, int)
    return ended.value.code, [json.loads(line) for line in capsys.readouterr().out.splitlines()]


def broken(folder: Path, **changed: object) -> Path:
    shutil.copytree(SHOUT, folder)
    file = folder / FILES[0]
    file.write_text(json.dumps(json.loads(file.read_text()) | changed))
    return folder


def test_check_packs_as_a_replica_would(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, (by_folder, by_name) = told(capsys, "--config", config, "check", SHOUT, "shout")
    assert code == 0
    assert by_name == by_folder | {"name": "shout"}
    assert (by_name["rank"], by_name["slot_rank"], by_name["ok"]) == (4, 16, True)


def test_check_says_what_would_be_refused_and_goes_on(
    tmp_path: Path, config: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    dora = broken(tmp_path / "dora", use_dora=True)
    other = broken(tmp_path / "other", base_model_name_or_path="acme/another-base")
    pickle = tmp_path / "pickle"
    pickle.mkdir()
    shutil.copy(SHOUT / FILES[0], pickle)
    (pickle / "adapter_model.bin").write_bytes(b"")
    code, rows = told(capsys, "--config", config, "check", dora, other, pickle, "nosuch", "hub:nosuch", "shout")
    assert code == 1
    assert [row["ok"] for row in rows] == [False] * 5 + [True]
    for row, reason in zip(
        rows,
        ("use_dora", "trained for 'acme/another-base'", "are a pickle", "no adapter of this name", "no Hub repository"),
        strict=False,
    ):
        assert reason in row["reason"]


def test_a_base_model_alone_will_do(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = tmp_path / "lorafleet-demo"
    model.mkdir()
    shutil.copy(ROOT / "examples/demo/model/config.json", model)
    code, rows = told(capsys, "--config", tmp_path / "none.yaml", "--model", model, "check", SHOUT)
    assert (code, rows[0]["rank"]) == (0, 4)


def test_pack_writes_what_is_served_and_nothing_else(
    tmp_path: Path, config: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    trained = tmp_path / "checkpoint-900"
    shutil.copytree(SHOUT, trained)
    save_file({key: value.float() for key, value in load_file(SHOUT / FILES[1]).items()}, trained / FILES[1])
    (trained / "optimizer.pt").write_bytes(b"state")
    code, (row,) = told(capsys, "--config", config, "pack", trained, tmp_path / "upload")
    assert (code, row["rank"]) == (0, 4)
    assert sorted(file.name for file in (tmp_path / "upload").iterdir()) == sorted(FILES)
    packed, before = load_file(tmp_path / "upload" / FILES[1]), load_file(SHOUT / FILES[1])
    assert packed.keys() == before.keys()
    assert all(torch.equal(packed[key], before[key].to(torch.bfloat16)) for key in before)
    code, (row,) = told(capsys, "--config", config, "pack", trained, tmp_path / "upload")
    assert code == 1
    assert "not empty" in row["reason"]


def test_list_asks_no_network(tmp_path: Path, hub: HubServer, capsys: pytest.CaptureFixture[str]) -> None:
    config = written(tmp_path, adapters={"loud": "hub:acme/shout"}, store={"hub_endpoint": hub.endpoint})
    code, rows = told(capsys, "--config", config, "list")
    assert code == 0
    assert {row["name"]: (row["origin"], row["on_disk"]) for row in rows} == {
        "json": ("folder", True),
        "loud": ("configured", False),
        "mirror": ("folder", True),
        "shout": ("folder", True),
        "spanish": ("folder", True),
    }
    assert not hub.seen


def test_prefetch_leaves_nothing_to_download(
    tmp_path: Path, hub: HubServer, capsys: pytest.CaptureFixture[str]
) -> None:
    args = {"adapters": {"loud": "hub:acme/shout", "gone": "hub:acme/gone"}, "adapter_folders": []}
    config = written(tmp_path, **args, store={"hub_endpoint": hub.endpoint, "hub_retries": 0})
    code, rows = told(capsys, "--config", config, "prefetch")
    assert code == 1
    assert {row["name"]: row["ok"] for row in rows} == {"gone": False, "loud": True}
    asked = len([one for one in hub.seen if "resolve" in one.path])
    code, rows = told(capsys, "--config", config, "check", "loud")
    assert (code, rows[0]["rank"]) == (0, 4)
    assert len([one for one in hub.seen if "resolve" in one.path]) == asked


def test_mistakes_of_the_settings_end_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = written(tmp_path, modle="x")
    with pytest.raises(SystemExit) as ended:
        main(["--config", str(config), "list"])
    assert ended.value.code == 2
    assert "modle: unknown key" in capsys.readouterr().err


def test_as_a_command() -> None:
    command = [sys.executable, "-m", "adapter_store", "check", "shout", "nosuch"]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert run.returncode == 1
    first, second = run.stdout.splitlines()
    assert first.startswith("shout: reference local:")
    assert second.startswith("nosuch: AdapterNotFound: there is no adapter of this name")


def test_a_merge_is_packed_and_its_parts_are_fetched(
    hub: HubServer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    parts = [{"ref": "hub:acme/shout", "weight": 0.5}, {"ref": f"local:{SHOUT}", "weight": 0.5}]
    blend = {"blend": "merge:" + json.dumps({"adapters": parts})}
    config = written(tmp_path, adapters=blend, store={"hub_endpoint": hub.endpoint})
    code, (fetched,) = told(capsys, "--config", config, "prefetch", "blend")
    assert code == 0
    hub.stop()
    code, (packed,) = told(capsys, "--config", config, "check", "blend")
    assert (code, packed["digest"], packed["rank"]) == (0, fetched["digest"], 4)
