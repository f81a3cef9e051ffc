"""Does the twin tell the truth? On logs of emulated servers, in simulated time, which is the emulator's exactly.

`python -m benchmarks.twin [--quick]` plays requests of the embedded bank to the servers of edge3, as a gateway with one
rule would, and writes down what its log would hold. It prints and writes, to outputs/benchmarks/twin.json,

- *coverage*: of 50 logs, how often the verdict's 95 % interval holds what the other policy really earns on the same
  arrivals, with the lengths that the servers' answers really have;
- *trouble*: a client that comes past the gateway to one server, and a server that slows down half-way: the twin's error
  without and with its remedies, and after how many requests the drift was found.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import jax
import numpy as np
import rich
from jaxtyping import Float, Int
from rich.table import Table

from benchmarks.publish import publish
from jaxroute.config import load_config
from jaxroute.decisions import FORMAT
from jaxroute.devices import use_compilation_cache
from jaxroute.evaluation.twin import judge
from jaxroute.evaluation.twin.recorded import Recorded
from jaxroute.evaluation.twin.simulate import Contender, Played, simulate
from jaxroute.policies import rules_named
from jaxroute.scenarios import build_env
from jaxroute.serving import Site
from jaxroute.workloads.limits import Limits


class Emulated:
    """The servers of edge3, and what clients may ask of them."""

    def __init__(self, bank_seed: int = 0) -> None:
        config = load_config(["site=edge3", f"bank.seed={bank_seed}"])
        self.config = config.site
        _, params = build_env(config)
        self.site = jax.tree.map(np.asarray, params.site)
        self.bank = jax.tree.map(np.asarray, params.bank)
        self.limits = jax.tree.map(np.asarray, params.limits)
        self.share = np.asarray(params.share)
        self.servers = tuple(expert.model for expert in config.site.experts)

    def requests(self, seed: int, number: int, rate: float) -> tuple[Recorded, Int[np.ndarray, "request server"]]:
        """Draw requests that nobody has answered yet, and the lengths of each server's answers."""
        rng = np.random.default_rng(seed)
        rows = rng.integers(len(self.bank.prompt_tokens), size=number)
        classes = rng.choice(len(self.share), number, p=self.share / self.share.sum())
        arrival = np.cumsum(rng.exponential(1 / rate, number))
        arrival -= arrival[0]
        unknown = np.full(number, np.nan)
        recorded = Recorded(
            servers=self.servers,
            begin=0.0,
            arrival=arrival,
            wall=arrival,
            prompt_tokens=self.bank.prompt_tokens[rows],
            choice=np.full(number, len(self.servers)),
            output_tokens=np.zeros(number, int),
            ttft=unknown,
            latency=unknown,
            limits=Limits(*(None if limit is None else limit[classes] for limit in self.limits)),
            quality=self.bank.predicted_quality[rows].astype(float),
            predicted_tokens=self.bank.predicted_output_tokens[rows].astype(float),
            may_decline=np.ones(number, bool),
            policy=None,
            shadow={},
        )
        return recorded, self.bank.output_tokens[rows]

    def served(
        self,
        recorded: Recorded,
        lengths: Int[np.ndarray, "request server"],
        contender: Contender | None,
        *,
        pace: Float[np.ndarray, "request server"] | None = None,
        forced: Int[np.ndarray, "request"] | None = None,
    ) -> tuple[Recorded, Played]:
        """Let a policy decide, and the servers answer; returns what its gateway would have logged."""
        pace = np.ones((len(recorded.arrival), len(self.servers))) if pace is None else pace
        site = Site(*(column[None] for column in self.site))
        played = simulate(
            recorded, contender, site, self.site, log_length_error=self.bank.log_length_error,
            output_tokens=lengths[None], pace=pace, forced=forced,
        )  # fmt: skip
        choice, nobody = played.choice[0], len(self.servers)
        return (
            recorded._replace(
                choice=choice,
                output_tokens=np.where(choice < nobody, played.output_tokens[0], 0),
                ttft=played.ttft[0],
                latency=played.latency[0],
                policy=contender and contender.name,
            ),
            played,
        )

    def write_log(self, recorded: Recorded, path: Path, begin: float = 1.7e9) -> None:
        """Write what a gateway would have written, in the order of the requests' ends."""
        names = [name for name in Limits._fields if getattr(recorded.limits, name) is not None]
        ends = np.where(recorded.answered, recorded.arrival + recorded.latency, recorded.arrival)
        lines = []
        for r in np.argsort(ends, kind="stable"):
            answered = bool(recorded.answered[r])
            first = begin + recorded.arrival[r] + recorded.ttft[r] if answered else None
            record = {
                "format": FORMAT,
                "id": f"r{r}",
                "outcome": "completed" if answered else "rejected",
                "limits": {name: float(getattr(recorded.limits, name)[r]) for name in names},
                "may_decline": bool(recorded.may_decline[r]),
                "arrival_time": float(begin + recorded.arrival[r]),
                "first_token_time": first,
                "last_token_time": float(begin + ends[r]) if answered else None,
                "end_time": float(begin + ends[r]),
                "prompt_tokens": int(recorded.prompt_tokens[r]),
                "output_tokens": int(recorded.output_tokens[r]) if answered else None,
                "expert": self.servers[recorded.choice[r]] if answered else None,
                "policy": recorded.policy,
                "predicted": {
                    "quality": recorded.quality[r].tolist(),
                    "output_tokens": recorded.predicted_tokens[r].tolist(),
                },
                "shadow": {name: int(choices[r]) for name, choices in recorded.shadow.items()},
                "ttft": float(recorded.ttft[r]) if answered else None,
            }
            lines.append(json.dumps(record))
        path.write_text("\n".join(lines) + "\n")


def rule(name: str) -> Contender:
    """Return a rule as a contender."""
    (policy,) = rules_named([name])
    return Contender(name, policy, away=policy.declines)


# --- Coverage -----------------------------------------------------------------------------------------------

RULES = ("shortest_queue", "round_robin", "impact_greedy")
"""Each log is of one of them, in turn, and the other two are judged."""

NUM_LOGS, NUM_REQUESTS = 50, 600
RATES = (0.8, 1.6)  # requests/s: most servers idle at times, and a tenth of the requests turned away


def coverage(emulated: Emulated, num_logs: int) -> list[dict[str, Any]]:
    """Judge two rules on each of the logs, and let them really decide."""
    rows = []
    for seed in range(num_logs):
        rate = float(np.random.default_rng((seed, 1)).uniform(*RATES))
        requests, lengths = emulated.requests(seed, NUM_REQUESTS, rate)
        base, *others = (rule(name) for name in np.roll(RULES, -(seed % len(RULES))).tolist())
        log, _ = emulated.served(requests, lengths, base)
        twin = judge(log, others, emulated.site, emulated.bank.log_length_error, seed=seed)
        for judged in twin.policies:
            real, _ = emulated.served(requests, lengths, rule(judged.name))
            rows.append(
                {
                    "log": seed,
                    "rate": rate,
                    "base": base.name,
                    "policy": judged.name,
                    "gain": judged.gain.mean,
                    "ci95": judged.gain.ci95,
                    "truth": float(real.measured_qos.mean() - log.measured_qos.mean()),
                    "late": judged.violations.mean,
                    "late_ci95": judged.violations.ci95,
                    "late_truth": float(log.measured_in_time.mean() - real.measured_in_time.mean()),
                    "status": judged.status,
                    "error": twin.check.error,
                    "drifts": len(twin.drifts),
                }
            )
    return rows


def summary(rows: list[dict[str, Any]]) -> dict[str, float]:
    """Say how often the intervals hold the truth, and how wide they are."""
    gain, half, truth = (np.array([row[name] for row in rows]) for name in ("gain", "ci95", "truth"))
    late, late_half, late_truth = (
        np.array([row[name] for row in rows]) for name in ("late", "late_ci95", "late_truth")
    )
    said = np.array([row["status"] in ("better", "worse") for row in rows])
    return {
        "verdicts": len(rows),
        "covered": float((np.abs(gain - truth) <= half).mean()),
        "late_covered": float((np.abs(late - late_truth) <= late_half).mean()),
        "mean_error": float((gain - truth).mean()),
        "rms_error": float(np.sqrt(np.square(gain - truth).mean())),
        "mean_ci95": float(half.mean()),
        "shown": float(said.mean()),
        "shown_with_right_sign": float((np.sign(gain) == np.sign(truth))[said].mean()) if said.any() else np.nan,
        "refused": float(np.mean([row["status"] == "refused" for row in rows])),
        "twin_error": float(np.mean([row["error"] for row in rows])),
        "false_alarms": float(np.mean([row["drifts"] > 0 for row in rows])),
    }


# --- Trouble ------------------------------------------------------------------------------------------------

CHANGE = 0.6  # of the log has passed when a server slows down, or another client comes
SLOWER, FOREIGN_RATE = 1.5, 0.5  # times; requests/s
SERVER = 0  # the one that gets most


def slowed_down(emulated: Emulated, seed: int) -> tuple[Recorded, int]:
    """Return a log in which a server slows down, and with which request."""
    requests, lengths = emulated.requests(1000 + seed, NUM_REQUESTS, 1.2)
    change = int(CHANGE * NUM_REQUESTS)
    pace = np.ones((NUM_REQUESTS, len(emulated.servers)))
    pace[change:, SERVER] = SLOWER
    return emulated.served(requests, lengths, rule("shortest_queue"), pace=pace)[0], change


def with_foreign_client(emulated: Emulated, seed: int) -> tuple[Recorded, int]:
    """Return a log during which a client comes past the gateway to a server, and with which request it comes."""
    requests, lengths = emulated.requests(1000 + seed, NUM_REQUESTS, 1.2)
    rng = np.random.default_rng((seed, 2))
    begin, end = requests.arrival[int(CHANGE * NUM_REQUESTS)], requests.arrival[-1]
    others, of_others = emulated.requests(2000 + seed, int(rng.poisson(FOREIGN_RATE * (end - begin))), FOREIGN_RATE)
    times = np.sort(rng.uniform(begin, end, len(others.arrival)))
    arrival = np.concatenate([requests.arrival, times])
    order = np.argsort(arrival, kind="stable")
    foreign = order >= NUM_REQUESTS

    def both(one: Any, other: Any) -> Any:
        return np.concatenate([one, other])[order]

    columns = {
        name: both(value, getattr(others, name))
        for name, value in requests._asdict().items()
        if isinstance(value, np.ndarray)
    }
    limits = Limits(
        *(None if one is None else both(one, other) for one, other in zip(requests.limits, others.limits, strict=True))
    )
    mixed = requests._replace(**columns | {"arrival": arrival[order], "wall": arrival[order]}, limits=limits)
    forced = np.where(foreign, SERVER, -1)
    log, _ = emulated.served(mixed, both(lengths, of_others), rule("shortest_queue"), forced=forced)
    return log.part(~foreign), int(CHANGE * NUM_REQUESTS)


def trouble(emulated: Emulated, make: Any, num_logs: int) -> list[dict[str, Any]]:
    """Judge logs with trouble: the twin's error without and with remedies, and when it saw what was wrong."""
    rows = []
    for seed in range(num_logs):
        log, change = make(emulated, seed)
        twin = judge(log, [rule("shortest_queue")], emulated.site, emulated.bank.log_length_error, seed=seed)
        # By the time of the ends: an answer that began before the change tells of it too.
        ends, since = log.arrival + log.latency, log.arrival[change]
        found = [drift for drift in twin.drifts if drift.server == SERVER and ends[drift.found] >= since]
        row: dict[str, Any] = {"found": bool(found), "false": len(twin.drifts) - len(found)}
        if found:
            between = (log.choice == SERVER) & (ends >= since) & (ends <= ends[found[0].found])
            row |= {"answers": int(between.sum()), "pace": found[0].pace}
        for name, check in (("plain", twin.plain), ("remedied", twin.check)):
            server = next(part for part in check.servers if part.name == emulated.servers[SERVER])
            row |= {
                f"{name}_qos": check.error,
                f"{name}_tpot": abs(server.tpot.error),
                f"{name}_ttft": abs(server.ttft.error),
                f"{name}_e2e": abs(server.e2e.error),
            }
        rows.append(row)
    return rows


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="few logs")
    options = parser.parse_args()
    use_compilation_cache()
    emulated = Emulated()
    num_logs, num_trouble = (3, 1) if options.quick else (NUM_LOGS, 10)
    rows = coverage(emulated, num_logs)
    troubles = {
        "slowed down": trouble(emulated, slowed_down, num_trouble),
        "foreign client": trouble(emulated, with_foreign_client, num_trouble),
    }
    covered = summary(rows)
    names = list(dict.fromkeys(name for of in troubles.values() for row in of for name in row))
    means = {
        kind: {name: float(np.mean([row[name] for row in of if name in row] or [np.nan])) for name in names}
        for kind, of in troubles.items()
    }
    table = Table("", *troubles, title=f"trouble, {num_trouble} logs each")
    for name in names:
        table.add_row(name, *(f"{of[name]:.3g}" for of in means.values()))
    rich.print(table)
    table = Table("coverage", "", title=f"{num_logs} logs of {NUM_REQUESTS} requests")
    for name, value in covered.items():
        table.add_row(name, f"{value:.3g}")
    publish(
        "twin",
        table,
        {"coverage": covered, "logs": rows, "trouble": means, "troubled_logs": troubles},
        {"verdicts not covered, share": 1 - covered["covered"], "the twin's error, QoS": covered["twin_error"]},
        remember=not options.quick,
    )


if __name__ == "__main__":
    main()
