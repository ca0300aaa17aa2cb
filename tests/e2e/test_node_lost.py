"""Three nodes, four replicas, three gateways: a node is killed under load, and who had nothing yet loses nothing."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from .server import ROOT

# A process of its own: connecting to a Ray cluster is once for a process, and this one may be connected already.
OPTIONS = "--kill-node --requests 60 --adapters 12 --slots 4 --warm 12 --rate 8 --tokens 24"


@pytest.mark.timeout(180)
def test_a_node_killed_under_load(tmp_path: Path) -> None:
    result = tmp_path / "routing.json"
    command = [sys.executable, "-m", "benchmarks.routing", *OPTIONS.split(), "--json", str(result)]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=170, check=False)
    assert run.returncode == 0, f"{run.stdout[-4000:]}\n{run.stderr[-4000:]}"
    (row,) = json.loads(result.read_text())["rows"]
    assert row["requests"] == 60
    assert (row["lost"], row["wrong"], row["untold"]) == (0, 0, 0)
    assert row["whole"] + row["told"] + row["cut"] == 60, "every request came to an end that its client can tell"
    assert row["whole"] >= 40
    assert row["survivors"] >= 2, "two nodes are left, and served the rest"
