"""Does the twin tell the truth? On logs of emulated servers, in simulated time, which is the emulator's exactly.

`python -m benchmarks.twin [--quick]` plays requests of the embedded bank to the servers of edge3, as a gateway with one
rule would, and writes down what its log would hold. It prints and writes, to outputs/benchmarks/twin.json,

- *coverage*: of 50 logs, how often the verdict's 95 % interval holds what the other policy really earns on the same
  arrivals, with the lengths that the servers' answers really have;
- *trouble*: a client that comes past the gateway to one server, and a server that slows down half-way: the twin's error
  without and with its remedies, and after how many requests the drift was found.
"""

from __future__ import annotations

import json
from pathlib import Path

import jax
import numpy as np
from jaxtyping import Float, Int

from jaxroute.config import load_config
from jaxroute.decisions import FORMAT
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
        seed: int = 0,
    ) -> tuple[Recorded, Played]:
        """Let a policy decide, and the servers answer; returns what its gateway would have logged."""
        pace = np.ones((len(recorded.arrival), len(self.servers))) if pace is None else pace
        site = Site(*(column[None] for column in self.site))
        played = simulate(
            recorded, contender, site, self.site, log_length_error=self.bank.log_length_error,
            output_tokens=lengths[None], pace=pace, seed=seed,
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
