"""A short probe of one server: a few dozen requests that determine its coefficients, and what they took.

Rounds follow one another, and the server is idle in between. Single requests of three lengths tell what prefill costs,
batches of two sizes at two lengths of context tell what an iteration costs. The last rounds, of sizes in between, judge
the fit. Prompts are random tokens, so that no server has cached them.
"""

from __future__ import annotations

import asyncio
import re
import time
from typing import NamedTuple

import aiohttp
import numpy as np

from jaxroute.errors import UserError
from jaxroute.files import shown
from jaxroute.fitting import ServingLog
from jaxroute.gateway.stream import Tally

_TOKENS = (10, 500)  # ids of random prompts: every vocabulary has them
_PATIENCE = 120.0  # s for one answer
_KV = re.compile(r"^vllm:cache_config_info\{(.*)\}", re.MULTILINE)


class Round(NamedTuple):
    """Requests that are sent at once."""

    number: int
    prompt_tokens: int
    output_tokens: int


class Probed(NamedTuple):
    """What a probe has found."""

    model: str
    """The server's name of its LLM."""
    log: ServingLog
    """As seen by the client."""
    num_fitted: int
    """Requests to fit to; the others judge."""
    kv_capacity: int | None
    """Tokens, if the server's metrics say so."""


def rounds_of(seats: int, context: int, output_tokens: int) -> tuple[list[Round], list[Round]]:
    """Return the rounds to fit to, and those that judge.

    Args:
        seats: the large batch.
        context: the long prompt, tokens.
        output_tokens: of each answer of a batch.
    """
    few, short = max(seats // 8, 1), max(context // 16, 1)
    alone = [Round(1, length, 4) for length in (short, context // 2, context)]
    batches = [Round(number, length, output_tokens) for number in (few, seats) for length in (short, context)]
    between = [Round(max(seats // 2, 1), context // 2, output_tokens), Round(1, 3 * context // 4, 4)]
    return [*alone, *batches, *alone, *batches], [*between, *batches[1:3], *between, *alone]


async def probe(
    url: str, *, seats: int, context: int, output_tokens: int, model: str | None = None, key: str | None = None
) -> Probed:
    """Send the rounds to a server, and note when tokens come.

    Args:
        url: of its OpenAI API, with /v1.
        seats: requests of the large batch; at most its `max_num_seqs`.
        context: tokens of the long prompt; `seats` of them must fit into its memory.
        output_tokens: of each answer.
        model: its name of the LLM; by default the first that it lists.
        key: API key.

    Raises:
        UserError: it cannot be reached, or refuses a request, or answers otherwise than asked.
    """
    headers = {"authorization": f"Bearer {key}"} if key else {}
    fit, judging = rounds_of(seats, context, output_tokens)
    rng = np.random.default_rng(0)
    timeout = aiohttp.ClientTimeout(total=_PATIENCE)
    connector = aiohttp.TCPConnector(limit=0)
    async with aiohttp.ClientSession(connector=connector, timeout=timeout, headers=headers) as session:
        try:
            async with session.get(f"{url}/models") as response:
                models = [entry["id"] for entry in (await response.json())["data"]]
            name = model or models[0]
            # Connections are made, and whatever the server does once is done.
            await asyncio.gather(*(_ask(session, url, name, Round(1, 8, 2), rng) for _ in range(seats)))
            requests = []
            for sent in (*fit, *judging):
                requests += await asyncio.gather(*(_ask(session, url, name, sent, rng) for _ in range(sent.number)))
            capacity = await _kv_capacity(session, url)
        except UserError:
            raise
        except (aiohttp.ClientError, OSError, TimeoutError, KeyError, IndexError, TypeError, ValueError) as error:
            reason = str(error) or type(error).__name__
            raise UserError(
                f"--probe={url}: {reason}; give the address of an OpenAI API, with /v1 at the end"
            ) from None
    values = np.array(requests)
    arrival, first, last = values[:, :3].T - values[0, 0]
    log = ServingLog(arrival, first, last, *(column.astype(np.int64) for column in values[:, 3:].T))
    return Probed(name, log, sum(sent.number for sent in fit), capacity)


async def _ask(
    session: aiohttp.ClientSession, url: str, model: str, sent: Round, rng: np.random.Generator
) -> tuple[float, float, float, int, int]:
    """Send a request; returns when it was sent, when its first and its last token came, s, and its tokens."""
    body = {
        "model": model,
        "prompt": rng.integers(*_TOKENS, sent.prompt_tokens).tolist(),
        "max_tokens": sent.output_tokens,
        "ignore_eos": True,
        "temperature": 0,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    tally = Tally(expects_usage=True, hide_usage=False, characters_per_token=4.0)
    begin = time.monotonic()
    first = None
    async with session.post(f"{url}/completions", json=body) as response:
        if response.status != 200:
            hint = "; give a smaller --probe-batch" if response.status == 429 else ""
            raise UserError(f"--probe={url}: it answers {response.status}: {shown(await response.text())}{hint}")
        async for data in response.content.iter_any():
            tally.feed(data)
            if tally.has_content and first is None:
                first = time.monotonic()
    last = time.monotonic()
    tokens = tally.output_tokens
    if first is None or tokens != sent.output_tokens:
        raise UserError(
            f"--probe={url}: {sent.output_tokens} tokens were asked for with ignore_eos, and {tokens or 'none'} came; "
            "the probe needs a server that obeys, such as vLLM"
        )
    return begin, first, last, sent.prompt_tokens, tokens


async def _kv_capacity(session: aiohttp.ClientSession, url: str) -> int | None:
    """Return the tokens of the server's KV cache, if its metrics say so in vLLM's words."""
    async with session.get(f"{url.removesuffix('/v1')}/metrics") as response:
        found = _KV.search(await response.text()) if response.status == 200 else None
    if not found:
        return None
    labels = dict(re.findall(r'(\w+)="([^"]*)"', found[1]))
    try:
        return int(labels["num_gpu_blocks"]) * int(labels["block_size"])
    except (KeyError, ValueError):
        return None
