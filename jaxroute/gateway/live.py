"""The gateway at work, for the live page: the experts now, the last minutes in figures, the latest decisions."""

from __future__ import annotations

from collections import OrderedDict, deque
from pathlib import Path
from typing import Any

import numpy as np

from jaxroute.gateway.proxy import Proxy
from jaxroute.gateway.why import why

PAGE = Path(__file__).with_name("live.html")
WINDOW = 60.0
"""The figures are of so many seconds."""

_REMEMBERED = 1000  # decisions that can be asked for
_SHOWN = 12  # of the page's table
_MOST = 50_000  # requests in the window
_PERCENTILES = (50, 95, 99)


class Live:
    """Remembers what has ended of late."""

    def __init__(self, proxy: Proxy) -> None:
        """Listen to a proxy."""
        self._proxy = proxy
        self._ended: deque[dict[str, Any]] = deque(maxlen=_MOST)
        self._by_id: OrderedDict[str, dict[str, Any]] = OrderedDict()
        self._totals: dict[str, int] = {}
        proxy.on_end = self._add

    def _add(self, record: dict[str, Any]) -> None:
        kept = ("end_time", "arrival_time", "outcome", "qos", "in_time", "expert", "ttft", "tpot", "e2e", "spent")
        self._ended.append({name: record[name] for name in kept})
        self._by_id[record["id"]] = record
        if len(self._by_id) > _REMEMBERED:
            self._by_id.popitem(last=False)
        self._totals[record["outcome"]] = self._totals.get(record["outcome"], 0) + 1

    def decision(self, request_id: str) -> dict[str, Any] | None:
        """Return a request's record and the decision in words; None if it is unknown, or long ago."""
        exchange = self._proxy.exchanges.get(request_id)
        record = self._proxy.record(exchange) if exchange is not None else self._by_id.get(request_id)
        return None if record is None else {"why": why(record, self._proxy.names), **record}

    def snapshot(self) -> dict[str, Any]:
        """Return all that the page shows."""
        proxy = self._proxy
        clock = proxy.clock
        now = clock.wall(clock.now())
        window = WINDOW * clock.speed
        while self._ended and self._ended[0]["end_time"] < now - window:
            self._ended.popleft()
        recent = list(self._ended)
        num = len(recent)
        qos = [record["qos"] for record in recent if record["qos"] is not None]
        done = [record for record in recent if record["outcome"] == "completed"]
        late = sum(record["in_time"] is False for record in done)
        outcomes = {name: sum(record["outcome"] == name for record in recent) for name in self._totals}
        return {
            "policy": proxy.policies.name,
            "window_s": WINDOW,
            "in_flight": len(proxy.exchanges),
            "requests_per_s": num / window,
            "average_qos": float(np.mean(qos)) if qos else None,
            "violation_rate": late / len(done) if done else None,
            "spent": sum(record["spent"] for record in recent),
            "outcomes": outcomes,
            "totals": self._totals,
            "latency": {
                name: _percentiles([record[name] for record in done if record[name] is not None])
                for name in ("ttft", "tpot", "e2e")
            },
            "experts": self._experts(recent, num),
            "decisions": [self._short(record) for record in reversed(list(self._by_id.values())[-_SHOWN:])],
        }

    def _experts(self, recent: list[dict[str, Any]], num: int) -> list[dict[str, Any]]:
        proxy = self._proxy
        loads, up = proxy.policies.router.loads, proxy.policies.router.up
        site = proxy.policies.around.site.experts
        shown = []
        for number, name in enumerate(proxy.names):
            polled = proxy.health.polled[number]
            share = sum(record["expert"] == name for record in recent) / num if num else 0.0
            shown.append(
                {
                    "name": name,
                    "accelerator": site[number].accelerator,
                    "up": bool(up[number]),
                    "running": int(loads.running[number]),
                    "waiting": int(loads.waiting[number]),
                    "seats": site[number].max_num_seqs,
                    "kv_share": float(loads.kv_tokens[number] / site[number].kv_capacity),
                    "share": share,
                    "polled": polled,
                }
            )
        return shown

    def _short(self, record: dict[str, Any]) -> dict[str, Any]:
        kept = ("id", "outcome", "class", "expert", "prompt_tokens", "output_tokens", "ttft", "e2e", "qos", "end_time")
        return {name: record[name] for name in kept} | {"why": why(record, self._proxy.names)}


def _percentiles(values: list[float]) -> list[float] | None:
    return [float(value) for value in np.percentile(values, _PERCENTILES)] if values else None
