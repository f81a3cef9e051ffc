"""Every command of the guide, one after the other, as a user types them; only training and judging are cut short."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[1]
COMMANDS = [
    line
    for block in re.findall(r"```sh\n(.*?)```", (ROOT / "docs" / "how-to" / "fleet.md").read_text(), re.DOTALL)
    for line in block.splitlines()
]
SHORT = (
    "warm_start.num_states=0 ppo.num_envs=8 ppo.num_steps=8 ppo.num_minibatches=4 ppo.total_steps=128 "
    "eval.episodes=2 eval.requests=20 eval.warmup=10 eval.loads=[1.0] policies=[qos_greedy]"
)


@pytest.fixture(scope="module")
def workplace(tmp_path_factory):
    """A checkout's files in a folder of its own, where the commands have run; and what each has printed."""
    folder = tmp_path_factory.mktemp("guide")
    for name in ("configs", "docs", "train.py", "jaxroute"):
        (folder / name).symlink_to(ROOT / name)
    environment = os.environ | {
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "JAX_PLATFORMS": "cpu",
    }
    said = []
    for command in COMMANDS:
        shortened = f"{command} {SHORT}" if "train.py" in command else command
        done = subprocess.run(shortened, shell=True, cwd=folder, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
        said.append(done.stdout)
    return folder / "fleet", said


def test_every_step_leaves_what_the_next_one_needs(workplace):
    fleet, said = workplace
    assert len(COMMANDS) == 9
    site = (fleet / "site" / "mine.yaml").read_text()
    assert re.findall(r"model: '?([\w.-]+)", site) == ["small-2b", "medium-8b", "large-27b"]
    assert re.findall(r"max_num_seqs: (\d+)", site) == ["256"] * 3
    assert re.findall(r"kv_capacity: (\d+)", site) == ["60000"] * 3
    assert "max_waiting: null" in site
    # Calibration finds the engine that wrote the logs.
    speeds = [float(value) for value in re.findall(r"weight_load: ([\d.e-]+)", site)]
    assert speeds == pytest.approx([0.009, 0.019, 0.031], rel=0.05)
    results = json.loads((fleet / "run" / "results.json").read_text())
    assert set(results["policies"]) == {"jaxroute", "qos_greedy"}
    assert (fleet / "run" / "report.html").is_file()
    # Of the requests that the calibration has not seen.
    errors = re.findall(r"mean (TPOT|E2E) .*\(([+-][\d.]+) ?%\)", said[3])
    assert [name for name, _ in errors] == ["TPOT", "E2E"] * 3
    assert all(abs(float(error)) < 5 for _, error in errors)


def test_the_exported_router_routes_a_prompt(workplace):
    from jaxroute.gateway import Router

    router = Router.load(workplace[0] / "router")
    expert = router.route("first", now=0.0, prompt="How many apples are left?", prompt_tokens=8, normalised=0.04)
    assert expert in range(3)
    router.finished("first", now=3.0, output_tokens=60)
