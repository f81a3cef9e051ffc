"""Every command of the guide, one after the other, as a user types them; only training and judging are cut short."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

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
def workplace(tmp_path_factory, data_dir):
    """A checkout's files in a folder of its own, where the commands have run; and what each has printed."""
    folder = tmp_path_factory.mktemp("guide")
    for name in ("configs", "train.py", "jaxroute"):
        (folder / name).symlink_to(ROOT / name)
    environment = os.environ | {
        "JAXROUTE_DATA": str(data_dir.resolve()),
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
    site = (fleet / "site" / "fleet.yaml").read_text()
    assert re.findall(r"model: '?([\w.-]+)", site) == ["Meta-Llama-3.1-8B-Instruct", "gemma-2-2b-it", "gemma-2-9b-it"]
    assert re.findall(r"max_num_seqs: (\d+)", site) == ["12"] * 3
    results = json.loads((fleet / "run" / "results.json").read_text())
    assert set(results["policies"]) == {"jaxroute", "qos_greedy"}
    assert (fleet / "run" / "report.html").is_file()
    # Of the requests that the calibration has not seen.
    errors = re.findall(r"mean (TTFT|TPOT|E2E) .*\(([+-][\d.]+)%\)", said[2])
    assert [name for name, _ in errors] == ["TTFT", "TPOT", "E2E"]
    assert all(abs(float(error)) < 5 for _, error in errors)


def test_the_exported_router_routes_a_prompt(workplace):
    from jaxroute.gateway import Router

    router = Router.load(workplace[0] / "router")
    expert = router.route(
        "first", now=0.0, prompt="How many apples are left?", prompt_tokens=8, latency_requirement=0.04
    )
    assert expert in range(3)
    router.finished("first", now=3.0, output_tokens=60)
