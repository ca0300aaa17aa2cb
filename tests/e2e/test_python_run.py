"""``serve.run`` from Python again with other live settings keeps every process."""

from __future__ import annotations

import json
import subprocess
import sys

from examples.demo.words import answer, held_out_prompts

from .server import ROOT

PROMPT = held_out_prompts(1)[0]


def test_run_again_with_other_live_settings_no_process_restarts(server):
    process = subprocess.Popen(
        [sys.executable, "-m", "tests.e2e.python_run", server.gcs_address, PROMPT],
        cwd=ROOT,
        env=server.env,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdin is not None and process.stdout is not None
    lines = process.stdout

    def told():
        while (line := lines.readline()) and not line.startswith(("{", '"')):
            pass
        assert line, "the script ended"
        return json.loads(line)

    try:
        first, processes = told(), server.processes("ServeReplica:python")
        assert first["models"] == ["lorafleet-demo"] and len(processes) == 2
        process.stdin.write("\n")
        process.stdin.flush()
        second = told()
        assert second["models"] == ["lorafleet-demo", "loud"] and second["pids"] == first["pids"]
        assert server.processes("ServeReplica:python") == processes
    finally:  # it takes its application away at the end of its input, whatever was found
        process.stdin.close()
    assert told() == answer(PROMPT, "shout")
    assert process.wait(60) == 0
