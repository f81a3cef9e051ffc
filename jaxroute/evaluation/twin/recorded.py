"""Traffic as it was recorded: the requests, who answered each, and how fast; and what is wrong with the record.

Two kinds of logs: the gateway's decision log, and a table with a row per request, as for calibration, and one column
more, `expert`, that names the server. What is wrong is said in `troubles`, each in one line; a trouble that leaves no
ground for a verdict is in `refusals` too.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int

from jaxroute.decisions import COMPLETED, DECLINED, REJECTED, is_decision_log, read_decisions
from jaxroute.errors import UserError
from jaxroute.gateway.dispatch import names_of
from jaxroute.gateway.fleet import Fleet
from jaxroute.tables import open_table
from jaxroute.workloads.limits import Limits, latencies

MIN_REQUESTS = 200
"""A verdict needs as many."""

_FEWEST = 30
_JUMP = 60.0  # s by which a clock goes back at least, if it has jumped
_PAUSE = 3600.0  # s without a request that are told
_IDLE = 60.0  # s to which a pause is cut: every server has been idle for long by then
_INTERLEAVED = 0.05  # share of lines whose clock goes back, from which on they are of two gateways
_CLOUD = 0.05  # requests that went to the cloud, in terms of the others, from which on nothing is judged
_MORE_IN_FLIGHT = 1.3  # times as many requests in flight as the gateway believed: others came past it
_TABLE = ("arrival_time", "first_token_time", "last_token_time", "prompt_tokens", "output_tokens")
_SERVER = ("expert", "server", "model")


class Recorded(NamedTuple):
    """Requests in order of arrival; R of them, and N servers. Times in s."""

    servers: tuple[str, ...]
    begin: float
    """When the first one arrived, s since 1970 or of the log's clock."""
    arrival: Float[np.ndarray, "request"]
    """Since then; long pauses are cut to a minute."""
    wall: Float[np.ndarray, "request"]
    """The same, with pauses."""
    prompt_tokens: Int[np.ndarray, "request"]
    choice: Int[np.ndarray, "request"]
    """The server that answered; N if none did: the request was declined or rejected."""
    output_tokens: Int[np.ndarray, "request"]
    """0 where there was no answer."""
    ttft: Float[np.ndarray, "request"]
    """As measured from arrival; nan where it is not known."""
    latency: Float[np.ndarray, "request"]
    """To the last token; nan where there was no answer."""
    limits: Limits
    """(R,) each; infinite where a request has none, None where none has."""
    quality: Float[np.ndarray, "request server"]
    """Predicted; likewise the next."""
    predicted_tokens: Float[np.ndarray, "request server"]
    may_decline: Bool[np.ndarray, "request"]
    policy: str | None
    """What has decided, if the log says so and it was one policy."""
    shadow: Mapping[str, Int[np.ndarray, "request"]]
    """What other rules would have chosen; -1 where the log does not say."""
    troubles: tuple[str, ...] = ()
    refusals: tuple[str, ...] = ()

    @property
    def answered(self) -> Bool[np.ndarray, "request"]:
        """Which requests got an answer."""
        return self.choice < len(self.servers)

    def in_time(
        self, ttft: Float[np.ndarray, "*draw request"], latency: Float[np.ndarray, "*draw request"], tokens: Any
    ) -> Bool[np.ndarray, "*draw request"]:
        """Whether answers with these times keep the limits; what is not known counts as kept, no answer as late."""
        of = latencies(ttft, latency, tokens)
        unknown = Limits(*(np.where(np.isnan(value), -np.inf, value) for value in of))
        return np.asarray(self.limits.met(unknown)) & np.isfinite(latency)

    def qos_of(self, choice: Any, in_time: Bool[np.ndarray, "*draw request"]) -> Float[np.ndarray, "*draw request"]:
        """Predicted quality at the chosen server if it was in time, else 0."""
        place = np.minimum(choice, len(self.servers) - 1)
        return np.where(in_time, self.quality[np.arange(len(self.arrival)), place], 0.0)

    @property
    def measured_in_time(self) -> Bool[np.ndarray, "request"]:
        """Whether each request was answered in time."""
        return self.in_time(self.ttft, self.latency, self.output_tokens)

    @property
    def measured_qos(self) -> Float[np.ndarray, "request"]:
        """Of each request, with predicted quality."""
        return self.qos_of(self.choice, self.measured_in_time)

    def most_at_once(self, chosen: Bool[np.ndarray, "request"]) -> int:
        """Return the most of some requests that were in flight at once."""
        return int(at_once(self.arrival[chosen], self.latency[chosen]).max(initial=-1)) + 1

    def part(self, chosen: Any) -> Recorded:
        """Return some of the requests, as a slice or a mask."""
        arrays = {name: value[chosen] for name, value in self._asdict().items() if isinstance(value, np.ndarray)}
        limits = Limits(*(None if limit is None else limit[chosen] for limit in self.limits))
        shadow = {name: value[chosen] for name, value in self.shadow.items()}
        return self._replace(**arrays, limits=limits, shadow=shadow)


class _Row(NamedTuple):
    """A request of a log."""

    arrival: float
    end: float | None
    """None where it is not known."""
    ttft: float | None
    latency: float | None
    prompt: int
    output: int
    server: int
    limits: tuple[float, ...]
    quality: Sequence[float]
    tokens: Sequence[float]
    may_decline: bool = True
    policy: str | None = None
    shadow: Mapping[str, int] | None = None
    believed: float | None = None
    """Requests in flight that the gateway knew of."""


class _Notes:
    """What is wrong, counted; the first example of each."""

    def __init__(self) -> None:
        self.left_out: Counter[str] = Counter()
        self.unknown: Counter[str] = Counter()
        self.troubles: list[str] = []
        self.refusals: list[str] = []

    def refuse(self, line: str) -> None:
        self.troubles.append(line)
        self.refusals.append(line)


def read_recorded(paths: Sequence[Path], fleet: Fleet, since: float | None = None) -> Recorded:
    """Read logs of one fleet, as if they were one.

    Args:
        paths: decision logs, or tables with a row per request.
        fleet: its servers; what a log does not predict comes from it, and so do the limits of a table's requests.
        since: leaves out what arrived before, s since 1970 or of the log's clock.

    Raises:
        UserError: a file cannot be read, or holds fewer than 30 requests of the fleet.
    """
    notes = _Notes()
    names = names_of(fleet)
    rows: list[_Row] = []
    for path in paths:
        rows += list(
            _decisions(path, fleet, names, notes) if is_decision_log(path) else _table(path, fleet, names, notes)
        )
    where = ", ".join(map(str, paths))
    rows = _on_one_clock(rows, notes)
    if since is not None:
        rows = [row for row in rows if row.arrival >= since]
    rows.sort(key=lambda row: row.arrival)
    for name, number in notes.unknown.items():
        notes.refuse(
            f"{number} requests went to {name}, which the fleet does not name ({', '.join(names)}): they are left out, "
            "and the policies are not judged; add the server to the fleet file"
        )
    if notes.left_out["that went to the cloud"] > _CLOUD * len(rows):
        notes.refuse("the twin plays no cloud, and many requests went there: the policies are not judged")
    for what, number in (+notes.left_out).items():
        share = number / max(len(rows) + number, 1)
        notes.troubles.append(f"{number} requests {what} are left out ({share:.1%})")
    if len(rows) < _FEWEST:
        more = f" ({'; '.join(notes.troubles)})" if notes.troubles else ""
        raise UserError(f"{where} has {len(rows)} requests of the fleet; the twin needs at least {_FEWEST}{more}")
    if len(rows) < MIN_REQUESTS:
        notes.refuse(
            f"the log has {len(rows)} requests, and a verdict needs {MIN_REQUESTS}: what was measured is told, and the "
            "policies are not judged"
        )
    recorded = _arrays(rows, names, notes)
    _look_for_others(rows, notes)
    return recorded._replace(troubles=tuple(notes.troubles), refusals=tuple(notes.refusals))


# --- Reading ------------------------------------------------------------------------------------------------


def _decisions(path: Path, fleet: Fleet, names: Sequence[str], notes: _Notes) -> list[_Row]:
    rows = []
    # In the order of their ends, as a gateway writes them.
    log = read_decisions(path, by_arrival=False)
    if log.torn:
        notes.troubles.append(f"{path}: {log.torn} torn lines are left out")
    for record in log.records:
        outcome, expert = record["outcome"], record.get("expert")
        end = record.get("end_time")
        if outcome in (DECLINED, REJECTED) or expert is None:
            server = len(names)
        elif expert == "cloud":
            notes.left_out["that went to the cloud"] += 1
            continue
        elif expert not in names:
            notes.unknown[expert] += 1
            continue
        else:
            server = names.index(expert)
        answered = outcome == COMPLETED and server < len(names)
        if not answered and server < len(names):
            notes.left_out[f"that were {outcome}"] += 1
            continue
        if answered and (not record.get("output_tokens") or end is None):
            notes.left_out["without an end, or a number of tokens,"] += 1
            continue
        predicted, expected = record.get("predicted") or {}, record.get("expected") or {}
        quality, tokens = (_predictions(predicted.get(name), fleet, name) for name in ("quality", "output_tokens"))
        given = record.get("limits") or {}
        in_flight = [number for kind in ("running", "waiting") for number in expected.get(kind, [])]
        rows.append(
            _Row(
                record["arrival_time"],
                end,
                record.get("ttft") if answered else None,
                end - record["arrival_time"] if answered else None,
                max(int(record["prompt_tokens"] or 1), 1),
                int(record["output_tokens"]) if answered else 0,
                server,
                tuple(float(given.get(name, np.inf)) for name in Limits._fields),
                quality,
                tokens,
                bool(record.get("may_decline", True)),
                record.get("policy"),
                record.get("shadow"),
                sum(in_flight) if in_flight else None,
            )
        )
    return rows


def _predictions(given: Any, fleet: Fleet, name: str) -> Sequence[float]:
    """Return what was predicted per server, or the fleet's constants."""
    number = len(fleet.experts)
    if isinstance(given, list) and len(given) >= number and all(isinstance(value, int | float) for value in given):
        return given[:number]
    return [getattr(expert, name) for expert in fleet.experts]


def _table(path: Path, fleet: Fleet, names: Sequence[str], notes: _Notes) -> list[_Row]:
    limits = tuple(np.inf if limit is None else limit for limit in fleet.classes[fleet.usual_class].limits)
    quality, tokens = (_predictions(None, fleet, name) for name in ("quality", "output_tokens"))
    rows = []
    with open_table(path, "a row per request, or a gateway's decision log") as table:
        found = {name: table.find(name) for name in _TABLE}
        server = table.find(*_SERVER)
        missing = [name for name, known in {**found, "expert": server}.items() if known is None]
        if missing:
            raise UserError(
                f"{path}: {', '.join(missing)} is missing; the twin reads a gateway's decision log, or a table with "
                f"{', '.join(_TABLE)} and expert, the server that answered"
            )
        for place, (*cells, name) in table.rows([*map(str, found.values()), str(server)]):
            if str(name) not in names:
                notes.unknown[str(name)] += 1
                continue
            try:
                arrival, first, last, prompt, output = (float(cell) for cell in cells)
            except (TypeError, ValueError):
                notes.left_out["without an end, or a number of tokens,"] += 1
                continue
            if not arrival <= first <= last < np.inf or prompt < 1 or output < 1:
                raise UserError(
                    f"{table.where(place)}: the request ends before it begins, or has no tokens; correct or delete it"
                )
            rows.append(
                _Row(
                    arrival,
                    last,
                    first - arrival,
                    last - arrival,
                    int(prompt),
                    int(output),
                    names.index(str(name)),
                    limits,
                    quality,
                    tokens,
                )
            )
    return rows


# --- Checking -----------------------------------------------------------------------------------------------


def _on_one_clock(rows: list[_Row], notes: _Notes) -> list[_Row]:
    """Return the longest part whose clock never goes back by much; or everything, if two gateways have written it."""
    # A gateway writes a request when it ends, and a table may be in the order of arrival.
    by_end = np.array([row.arrival if row.end is None else row.end for row in rows])
    by_arrival = np.array([row.arrival for row in rows])
    back = min(
        (np.flatnonzero(np.diff(times) < -_JUMP) for times in (by_end, by_arrival)), key=len, default=np.zeros(0, int)
    )
    if not len(back):
        return rows
    if len(back) > _INTERLEAVED * len(rows):
        notes.refuse(
            f"the clock goes back {len(back)} times: lines of two gateways, or of two clocks, are interleaved; the "
            "policies are not judged; give the logs as files of their own"
        )
        return rows
    parts = np.split(np.arange(len(rows)), back + 1)
    longest = max(parts, key=len)
    notes.troubles.append(
        f"the clock goes back {len(back)} times, first by {-np.diff(by_end)[back[0]]:.0f} s: only the longest part "
        f"between two jumps counts, {len(longest)} of {len(rows)} requests"
    )
    return [rows[place] for place in longest]


def _look_for_others(rows: list[_Row], notes: _Notes) -> None:
    """See whether a log holds more requests in flight than its gateway knew of."""
    answered = [row for row in rows if row.latency is not None]
    believed = np.array([np.nan if row.believed is None else row.believed for row in answered])
    known = np.isfinite(believed)
    if known.sum() < _FEWEST:
        return
    in_flight = at_once(*(np.array([getattr(row, name) for row in answered], float) for name in ("arrival", "latency")))
    if in_flight[known].mean() > _MORE_IN_FLIGHT * believed[known].mean() + 1:
        notes.refuse(
            f"{in_flight[known].mean():.1f} requests are in flight at once, and the gateway knew of "
            f"{believed[known].mean():.1f}: lines of several gateways are interleaved; the servers are fitted to all, "
            "and the policies are not judged"
        )


def at_once(arrival: Float[np.ndarray, "request"], latency: Float[np.ndarray, "request"]) -> Int[np.ndarray, "request"]:
    """Return how many requests are in flight at each arrival, itself left out; they are in order of arrival."""
    return np.arange(len(arrival)) - np.searchsorted(np.sort(arrival + latency), arrival)


def _arrays(rows: list[_Row], names: Sequence[str], notes: _Notes) -> Recorded:
    def column(name: str) -> np.ndarray:
        return np.array([getattr(row, name) for row in rows])

    arrival = column("arrival")
    gaps = np.diff(arrival, prepend=arrival[0])
    for place in np.flatnonzero(gaps > _PAUSE):
        notes.troubles.append(
            f"no request came for {gaps[place] / 3600:.1f} h, after {(arrival[place - 1] - arrival[0]) / 3600:.1f} h: "
            "the pause is left out of every figure"
        )
    ends = np.maximum.accumulate([row.arrival if row.end is None else row.end for row in rows])
    idle = np.append(-np.inf, ends[:-1]) < arrival  # nothing was in flight
    limits = np.array([row.limits for row in rows])
    policies = {row.policy for row in rows}
    shadows = sorted({name for row in rows for name in row.shadow or ()})
    return Recorded(
        servers=tuple(names),
        begin=float(arrival[0]),
        arrival=np.cumsum(np.where(idle & (gaps > _IDLE), _IDLE, gaps)),
        wall=arrival - arrival[0],
        prompt_tokens=column("prompt"),
        choice=column("server"),
        output_tokens=column("output"),
        ttft=column("ttft").astype(float),
        latency=column("latency").astype(float),
        limits=Limits(*(None if np.isinf(limit).all() else limit for limit in limits.T)),
        quality=np.array([row.quality for row in rows], float),
        predicted_tokens=np.maximum(np.array([row.tokens for row in rows], float), 1.0),
        may_decline=column("may_decline"),
        policy=policies.pop() if len(policies) == 1 else None,
        shadow={name: np.array([(row.shadow or {}).get(name, -1) for row in rows]) for name in shadows},
    )
