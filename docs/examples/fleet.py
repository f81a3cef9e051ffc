"""Write what the guide (docs/how-to/fleet.md) starts from: a log of traffic, logs of three servers, graded answers.

    python docs/examples/fleet.py FOLDER

The traffic comes in bursts. The servers' logs come from jaxroute's own engine, so that calibration has a right answer
to find. Prompts are sums and word problems; larger models answer the longer ones better.
"""

from __future__ import annotations

import csv
import sys
from pathlib import Path

import numpy as np

import jaxroute
from jaxroute import Requests, Site

MODELS = ("small-2b", "medium-8b", "large-27b")
SERVERS = Site(
    iteration_overhead=np.array([0.0, 0.0, 0.0]),
    weight_load=np.array([0.009, 0.019, 0.031]),
    compute_per_token=np.array([2.2e-5, 9.2e-5, 1.2e-4]),
    decode_per_seq=np.array([2.4e-5, 4.1e-5, 9.0e-5]),
    attention_per_token=np.array([1.5e-7, 1.4e-7, 3.0e-7]),
    max_num_seqs=np.array([256, 256, 256]),
    max_num_batched_tokens=np.array([2048, 2048, 2048]),
    max_waiting=np.array([10_000, 10_000, 10_000]),
    kv_capacity=np.array([60_000, 60_000, 60_000]),
    network_delay=np.array([0.005, 0.005, 0.005]),
)


def traffic(random: np.random.Generator, number: int = 12_000) -> list[dict[str, object]]:
    """Return requests at 40 per second on average, and three times as many in bursts of half a minute as outside."""
    time, busy, until, rows = 0.0, False, 60.0, []
    for _ in range(number):
        time += random.exponential(1 / (80.0 if busy else 27.0))
        if time > until:
            busy = not busy
            until = time + random.exponential(30.0 if busy else 90.0)
        prompt, output = random.lognormal(5.5, 0.8), random.lognormal(4.8, 0.6)
        rows.append(
            {"arrival_time": round(time, 6), "prompt_tokens": int(prompt) + 1, "output_tokens": int(output) + 1}
        )
    return rows


def serving_log(random: np.random.Generator, server: int, number: int = 400) -> list[dict[str, object]]:
    """Return what one server was asked and when it answered: some twenty to forty requests at a time."""
    arrival = np.cumsum(random.exponential(0.06 + 0.05 * server, number))
    prompt = random.lognormal(5.5, 0.8, number).astype(int) + 1
    output = random.lognormal(4.8, 0.6, number).astype(int) + 1
    outcomes = jaxroute.replay(SERVERS, Requests(arrival, prompt, output), np.full(number, server))
    times = np.stack([arrival, arrival + outcomes.ttft, arrival + outcomes.latency], axis=1).round(6)
    names = ("arrival_time", "first_token_time", "last_token_time", "prompt_tokens", "output_tokens")
    return [dict(zip(names, (*row, p, o), strict=True)) for row, p, o in zip(times, prompt, output, strict=True)]


def answers(random: np.random.Generator, number: int = 600) -> list[dict[str, object]]:
    """Return each model's answer to each prompt: whether it was right, and how long it was."""
    rows = []
    for _ in range(number):
        terms = int(random.integers(2, 8))
        numbers = [str(n) for n in random.integers(2, 500, terms)]
        if random.random() < 0.5:
            prompt, difficulty, category = f"What is {' + '.join(numbers)}?", terms - 4.0, "sums"
        else:
            bags = ", ".join(f"a bag of {n} apples" for n in numbers)
            prompt, difficulty, category = f"Ann has {bags}. How many apples has she?", terms - 3.0, "stories"
        for model, ability in zip(MODELS, (-1.0, 1.0, 2.5), strict=True):
            right = random.random() < 1 / (1 + np.exp(difficulty - ability))
            length = int(random.lognormal(3.6 + 0.15 * terms + 0.3 * (category == "stories"), 0.35)) + 1
            rows.append(
                {"prompt": prompt, "model": model, "quality": int(right), "output_tokens": length, "category": category}
            )
    return list({(row["prompt"], row["model"]): row for row in rows}.values())


def main(folder: Path) -> None:
    """Write the five files."""
    random = np.random.default_rng(0)
    tables = {"traffic": traffic(random), "answers": answers(random)}
    tables |= {model: serving_log(random, server) for server, model in enumerate(MODELS)}
    folder.mkdir(parents=True, exist_ok=True)
    for name, rows in tables.items():
        with (folder / f"{name}.csv").open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, rows[0])
            writer.writeheader()
            writer.writerows(rows)
    print(f"{folder}: {', '.join(f'{name}.csv' for name in tables)}")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
