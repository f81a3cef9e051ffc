"""A client that sends a bank's requests to a gateway at given times, and notes what comes back."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import aiohttp
import numpy as np
from jaxtyping import Float, Int


class Prompts(NamedTuple):
    """What a client needs to know of a bank, on the host."""

    prompt_tokens: Int[np.ndarray, "prompt"]
    predicted_quality: Float[np.ndarray, "prompt expert"]
    predicted_output_tokens: Float[np.ndarray, "prompt expert"]


@dataclass(frozen=True)
class Planned:
    """A request to be sent."""

    at: float
    """s of real time since the start."""
    row: int
    """Its prompt in the bank."""
    service_class: str


@dataclass
class Sent:
    """What came of a request; times in s of real time."""

    planned: Planned
    status: int = 0
    """HTTP status; 0 if there was no answer."""
    expert: str | None = None
    code: str | None = None
    """Of the error, if it was refused."""
    ttft: float | None = None
    e2e: float | None = None
    whole: bool = False
    """Whether the stream ended as it should."""


def poisson(rate: float, num_prompts: int, shares: dict[str, float], seed: int) -> Iterator[Planned]:
    """Yield requests without end: exponential gaps, any prompt, classes in proportion to their shares.

    Args:
        rate: requests per second of real time.
        num_prompts: of the bank.
        shares: of each class.
        seed: of the draws.
    """
    rng, at = np.random.default_rng(seed), 0.0
    weights = np.array(list(shares.values()))
    while True:
        at += float(rng.exponential(1 / rate))
        chosen = str(rng.choice(list(shares), p=weights / weights.sum()))
        yield Planned(at, int(rng.integers(num_prompts)), chosen)


async def send_all(
    url: str,
    planned: Sequence[Planned] | Iterator[Planned],
    prompts: Prompts,
    *,
    key: str | None = None,
    done: Callable[[Sent], None] = lambda sent: None,
) -> list[Sent]:
    """Send each request at its time, as a stream, and wait for all; an endless iterator never returns.

    Args:
        url: of the gateway's API, with /v1.
        planned: in order of time.
        prompts: the bank's. A prompt goes as token ids, and its row as `seed`, by which emulated servers know it.
        key: API key.
        done: is called with each request that has ended.
    """
    tasks: set[asyncio.Task[None]] = set()
    kept: list[Sent] = []
    timeout = aiohttp.ClientTimeout(total=None)
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0), timeout=timeout) as session:
        start = time.monotonic()
        for plan in planned:
            await asyncio.sleep(max(start + plan.at - time.monotonic(), 0))
            sent = Sent(plan)
            if isinstance(planned, Sequence):
                kept.append(sent)
            task = asyncio.ensure_future(_send(session, f"{url}/completions", sent, prompts, key, done))
            tasks.add(task)
            task.add_done_callback(tasks.discard)
        await asyncio.gather(*tasks)
    return kept


async def _send(
    session: aiohttp.ClientSession,
    url: str,
    sent: Sent,
    prompts: Prompts,
    key: str | None,
    done: Callable[[Sent], None],
) -> None:
    row = sent.planned.row
    body = {"model": "auto", "prompt": [row] * int(prompts.prompt_tokens[row]), "seed": row, "stream": True}
    headers = {
        "x-jaxroute-class": sent.planned.service_class,
        "x-jaxroute-quality": ",".join(f"{value:.5f}" for value in prompts.predicted_quality[row]),
        "x-jaxroute-tokens": ",".join(f"{value:.4f}" for value in prompts.predicted_output_tokens[row]),
    }
    if key is not None:
        headers["authorization"] = f"Bearer {key}"
    start = time.monotonic()
    try:
        async with session.post(url, json=body, headers=headers) as response:
            sent.status = response.status
            sent.expert = response.headers.get("x-jaxroute-expert")
            if response.status != 200:
                sent.code = (await response.json())["error"]["code"]
                return
            end = b""
            async for part in response.content.iter_any():
                if sent.ttft is None:
                    sent.ttft = time.monotonic() - start
                end = (end + part)[-16:]
            sent.whole = end.endswith(b"data: [DONE]\n\n")
            sent.e2e = time.monotonic() - start
    except (aiohttp.ClientError, OSError, json.JSONDecodeError, KeyError):
        sent.code = sent.code or "no_answer"
    finally:
        done(sent)
