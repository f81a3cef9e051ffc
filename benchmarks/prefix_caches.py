"""What prefix caches find on a public trace: by their size, the number of servers and the rule that routes.

`python -m benchmarks.prefix_caches [--quick] [--trace FILE]` prints the share of the prompts' blocks that are found,
writes outputs/benchmarks/prefix_caches.json and draws outputs/benchmarks/prefix_caches.png. The trace is Mooncake's
conversations, below JAXROUTE_DATA, or another one with prefixes; `--quick` takes its first 500 requests.

Time plays no role in what a cache holds: a request's blocks are held for no time, and what a cache loses depends on the
order of arrivals alone. Rules that look at load need some, so a request counts as outstanding for `OUTSTANDING_SECONDS`
after its arrival, at whatever server and of whatever length.
"""

from __future__ import annotations

import argparse
import hashlib
import os
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from rich import box
from rich.progress import track
from rich.table import Table

from benchmarks.publish import OUTPUTS, publish
from jaxroute.errors import UserError
from jaxroute.plotting import expert_colours, png_bytes
from jaxroute.workloads import PrefixCache, Trace, read_trace

SERVERS = (1, 2, 4, 8)
CACHES: tuple[int | None, ...] = (10_000, 100_000, 300_000, 1_000_000, 3_000_000, 10_000_000, None)
"""Tokens per server; None is without bound."""
OUTSTANDING_SECONDS = 30.0
"""A guess at how long 12,035 prompt tokens and 343 output tokens, the means of the trace, take at a busy server."""
SESSION_BLOCKS = 2
"""First blocks of a prompt that stand for its session: the first one alone is the same in all of Mooncake's."""

# Defaults of SGLang's router (sgl-model-gateway/bindings/python/src/sglang_router/router_args.py), and of vLLM's.
CACHE_THRESHOLD = 0.3
BALANCE_ABS_THRESHOLD, BALANCE_REL_THRESHOLD = 64, 1.5


class Servers:
    """Caches, and what is outstanding at each server."""

    def __init__(self, number: int, cache_blocks: int | None) -> None:
        self.caches = [PrefixCache(cache_blocks) for _ in range(number)]
        self.requests, self.tokens = [0] * number, [0] * number
        self.routed = 0
        self._outstanding: deque[tuple[float, int, int]] = deque()

    def advance(self, now: float) -> None:
        """Forget what has been outstanding long enough; s."""
        while self._outstanding and self._outstanding[0][0] <= now - OUTSTANDING_SECONDS:
            _, server, tokens = self._outstanding.popleft()
            self.requests[server] -= 1
            self.tokens[server] -= tokens

    def take(self, server: int, blocks: list[int], tokens: int, now: float) -> None:
        """Send a request to a server."""
        self.caches[server].add(blocks)
        self._outstanding.append((now, server, tokens))
        self.requests[server] += 1
        self.tokens[server] += tokens
        self.routed += 1


Rule = Callable[[Servers, list[int]], int]
"""Chooses the server of a request, given the blocks of its prompt."""


def round_robin() -> Rule:
    """One after the other."""
    return lambda servers, blocks: servers.routed % len(servers.caches)


def uniform() -> Rule:
    """At random."""
    rng = np.random.default_rng(0)
    return lambda servers, blocks: int(rng.integers(len(servers.caches)))


def least_loaded() -> Rule:
    """Fewest tokens outstanding, of prompts and answers."""
    return lambda servers, blocks: servers.tokens.index(min(servers.tokens))


def session_hash() -> Rule:
    """Consistent hashing of the session, by the highest random weight (Thaler and Ravishankar 1998)."""

    def weight(session: tuple[int, ...], server: int) -> bytes:
        return hashlib.blake2b(f"{session}{server}".encode(), digest_size=8).digest()

    def choose(servers: Servers, blocks: list[int]) -> int:
        session = tuple(blocks[:SESSION_BLOCKS])
        return max(range(len(servers.caches)), key=lambda server: weight(session, server))

    return choose


def longest_prefix() -> Rule:
    """Most blocks in the cache; of several servers the one with the fewest tokens outstanding."""

    def choose(servers: Servers, blocks: list[int]) -> int:
        found = [cache.find(blocks) for cache in servers.caches]
        return max(range(len(found)), key=lambda server: (found[server], -servers.tokens[server]))

    return choose


def cache_aware() -> Rule:
    """As SGLang's router: the longest prefix, unless it is short or the servers are far out of balance.

    They are if the numbers of requests outstanding differ by more than `BALANCE_ABS_THRESHOLD` and by more than the
    factor `BALANCE_REL_THRESHOLD`; then the server with the fewest takes the request. A prefix is short up to the
    share `CACHE_THRESHOLD` of the prompt; then the one with the fewest tokens outstanding does. SGLang's router guesses
    what the caches hold from what it has routed; here it knows.
    """
    longest = longest_prefix()

    def choose(servers: Servers, blocks: list[int]) -> int:
        most, fewest = max(servers.requests), min(servers.requests)
        if most - fewest > BALANCE_ABS_THRESHOLD and most > BALANCE_REL_THRESHOLD * fewest:
            return servers.requests.index(fewest)
        server = longest(servers, blocks)
        if servers.caches[server].find(blocks) > CACHE_THRESHOLD * len(blocks):
            return server
        return servers.tokens.index(min(servers.tokens))

    return choose


RULES: dict[str, Callable[[], Rule]] = {
    "round robin": round_robin,
    "random": uniform,
    "least loaded": least_loaded,
    "session hash": session_hash,
    "cache-aware": cache_aware,
    "longest prefix": longest_prefix,
}

ALONE = "one server"
"""In the place of a rule where there is nothing to choose."""


def make(name: str) -> Rule:
    """Return a rule that has not routed anything yet."""
    return RULES.get(name, round_robin)()


def route(trace: Trace, texts: list[list[int]], rule: Rule, num_servers: int, cache: int | None) -> dict[str, float]:
    """Route a trace, whose requests have these blocks, to servers with caches of so many tokens.

    Returns:
        `hit_rate`, the share of the prompts' blocks that are found, and `busiest`, the blocks that the busiest server
        has to compute, as a multiple of the mean.

    """
    prefixes = trace.prefixes
    assert prefixes is not None
    servers = Servers(num_servers, None if cache is None else cache // prefixes.block_size)
    asked = prefixes.prompt_blocks(trace.prompt_tokens).tolist()
    tokens = (trace.prompt_tokens + trace.output_tokens).tolist()
    computed = [0] * num_servers
    for now, blocks, number, load in zip(trace.arrival_time.tolist(), texts, asked, tokens, strict=True):
        prompt = blocks[:number]
        servers.advance(now)
        server = rule(servers, prompt)
        computed[server] += number - servers.caches[server].find(prompt)
        servers.take(server, blocks, load, now)
    return {
        "hit_rate": 1 - sum(computed) / sum(asked),
        "busiest": max(computed) * num_servers / sum(computed),
    }


def draw(rows: list[dict[str, Any]]) -> Figure:
    """Draw hit rate against the size of a server's cache, a panel for each number of servers."""
    counts = sorted({row["servers"] for row in rows if row["servers"] > 1})
    figure = Figure(figsize=(4 * len(counts), 4), layout="constrained")
    for axes, count in zip(np.atleast_1d(figure.subplots(1, len(counts), sharey=True)), counts, strict=True):
        for colour, rule in zip(expert_colours(len(RULES)), RULES, strict=True):
            mine = [row for row in rows if row["rule"] == rule and row["servers"] == count and row["cache"]]
            rates = [100 * row["hit_rate"] for row in mine]
            axes.plot([row["cache"] for row in mine], rates, "o-", ms=4, color=colour, label=rule)
        alone = [row for row in rows if row["servers"] == 1 and row["cache"]]
        sizes, rates = [row["cache"] for row in alone], [100 * row["hit_rate"] for row in alone]
        axes.plot(sizes, rates, "--", color="0.5", label="one server")
        axes.set(xscale="log", xlabel="cache per server, tokens", title=f"{count} servers")
        axes.set_ylim(0, 105 * max(row["hit_rate"] for row in rows))
    figure.axes[0].set_ylabel("blocks found, %")
    figure.axes[0].legend()
    return figure


def main() -> None:
    """Route, print, draw and write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="500 requests, two servers and two sizes of caches")
    parser.add_argument("--trace", type=Path, help="a trace with prefixes, instead of Mooncake's conversations")
    options = parser.parse_args()
    folder = Path(os.environ.get("JAXROUTE_DATA", "."))
    path = options.trace or folder / "mooncake" / "conversation_trace.jsonl.gz"
    counts, caches = ((1, 2), (100_000, None)) if options.quick else (SERVERS, CACHES)
    try:
        trace = read_trace(path)
    except UserError as error:
        raise SystemExit(f"error: {error}") from None
    if trace.prefixes is None:
        raise SystemExit(f"error: {path} does not say what prompts have in common: see docs/how-to/traces.md")
    number = min(len(trace.arrival_time), 500) if options.quick else len(trace.arrival_time)
    trace = trace._replace(
        arrival_time=trace.arrival_time[:number],
        prompt_tokens=trace.prompt_tokens[:number],
        output_tokens=trace.output_tokens[:number],
    )
    texts = [trace.prefixes.blocks(request) for request in range(number)]
    cases = [(rule, count, cache) for count in counts for rule in (RULES if count > 1 else [ALONE]) for cache in caches]
    rows = [
        {"rule": rule, "servers": count, "cache": cache} | route(trace, texts, make(rule), count, cache)
        for rule, count, cache in track(cases, "caches")
    ]
    table = Table(
        "servers",
        "rule",
        box=box.MARKDOWN,
        caption="Tokens per cache; % of the blocks found, and what the busiest server computes against the mean",
    )
    for cache in caches:
        table.add_column("no bound" if cache is None else f"{cache:,}", justify="right")
    for count, rule in dict.fromkeys((row["servers"], row["rule"]) for row in rows):
        mine = [row for row in rows if (row["servers"], row["rule"]) == (count, rule)]
        cells = [f"{100 * row['hit_rate']:.1f}, {row['busiest']:.2f}" for row in mine]
        table.add_row(str(count), rule, *cells)
    main_figures = {
        f"{row['rule']}, {row['servers']} servers, blocks missed without bound, %": 100 * (1 - row["hit_rate"])
        for row in rows
        if row["cache"] is None
    }
    # The figures are the same on every machine: they have no history.
    publish("prefix_caches", table, {"requests": number, "rows": rows}, main_figures, remember=False)
    (OUTPUTS / "prefix_caches.png").write_bytes(png_bytes(draw(rows)))


if __name__ == "__main__":
    main()
