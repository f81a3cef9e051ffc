"""Rules as a gateway's policy, its fallback and its shadows: compiled in this process, without an export.

A rule acts on the same observation as a trained router, so `Router` keeps its books alike for both.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, UInt32

from jaxroute.env.environment import best_net
from jaxroute.env.types import CloudParams, Observation
from jaxroute.errors import UserError
from jaxroute.gateway.artefact import decision_shapes, site_array
from jaxroute.gateway.observed import cloud_figures, observation
from jaxroute.gateway.router import Router
from jaxroute.policies import RULES, Policy, rules_named
from jaxroute.serving import SiteConfig

Arrays = tuple[np.ndarray, np.ndarray, np.ndarray]
"""What a decision is given, as in `FIELDS`, without the site."""

DRAWS = ("random", "weighted_random", "power_of_two", "slo_headroom", "lowest_latency")
"""Rules that draw: what they choose does not follow from what they see."""

_UNAVAILABLE, _CHOSEN, _AWAY = -1e9, 1.0, 2.0


class Surroundings(NamedTuple):
    """What every policy of one gateway has in common."""

    site: SiteConfig
    log_length_error: tuple[float, ...]
    slots: int
    """Requests of each expert that a policy sees."""
    away: bool
    cloud_log_length_error: float = 0.5

    def array(self) -> Float[np.ndarray, "field expert"]:
        """Return the site as the first argument of a decision."""
        return site_array(self.site, self.log_length_error)

    @property
    def cloud(self) -> CloudParams | None:
        """What a policy knows of the cloud, if requests may go there."""
        if self.site.cloud is None or not self.away:
            return None
        return jax.tree.map(np.asarray, cloud_figures(self.site.cloud, self.cloud_log_length_error))

    def shapes(self) -> list[jax.ShapeDtypeStruct]:
        """Return the shapes of a decision's arguments, that of the site first."""
        return decision_shapes(len(self.site.experts), self.slots)


def slots_of(site: SiteConfig) -> int:
    """Return how many requests an expert can hold, running and waiting."""
    # Of a queue without bound, as many as there are seats.
    return max(
        expert.max_num_seqs + (expert.max_num_seqs if expert.max_waiting is None else expert.max_waiting)
        for expert in site.experts
    )


def rule_named(name: str, away: bool) -> Policy:
    """Return a rule, with or without a form, that may send requests away only if `away`.

    Raises:
        UserError: there is none of that name, or it only acts where requests may be sent away.
    """
    (rule,) = rules_named([name])
    if rule.declines and not away:
        raise UserError(f"policy {name} sends requests away, and this policy's site never does; leave out +...")
    return rule


def is_rule(name: str) -> bool:
    """Whether a policy's name is a rule's, with or without a form."""
    return name.partition("+")[0] in RULES


class RuleDecision:
    """A rule as a `Router`'s decision, with its memory. Calling it takes a decision, and remembers."""

    def __init__(self, rule: Policy, around: Surroundings, seed: int = 0) -> None:
        """Compile it, or take what has been compiled for another with the same name and site."""
        self._run = _once(_compiled_rule, rule.name, around)
        self._site, self._memory = around.array(), rule.memory
        self._count, self._seed = 0, seed

    def __call__(self, *seen: np.ndarray) -> tuple[Any, Any, Any]:
        """Return the action, scores, and the best net value that an expert offers.

        The rule's choice scores 1, and others their net value less 1; away scores 2 if it was chosen, else 0.
        """
        # A new number for every draw.
        draw = np.array([self._seed, self._count], np.uint32)
        action, scores, net, self._memory = self._run(self._site, *seen, draw, self._memory)
        self._count += 1
        return action, scores, net


def rule_router(rule: Policy, around: Surroundings, rate: float) -> Router:
    """Return a router that decides by a rule; `rate` is the request rate to expect at first, 1/s."""
    return Router(
        around.site,
        list(around.log_length_error),
        around.slots,
        rate,
        RuleDecision(rule, around),
        away=around.away,
    )


_COMPILED: dict[tuple[Any, ...], Callable[..., Any]] = {}


def _once(build: Callable[..., Any], names: str | tuple[str, ...], around: Surroundings) -> Callable[..., Any]:
    """Compile once per process: a rule may be policy and fallback, and come again at each reload."""
    key = build, names, repr(around)
    if key not in _COMPILED:
        _COMPILED[key] = build(names, around)
    return _COMPILED[key]


def _compiled_rule(name: str, around: Surroundings) -> Callable[..., Any]:
    rule = rule_named(name, around.away)
    cloud, away = around.cloud, around.away

    def decide(
        site: Array, batch: Array, experts: Array, arrival: Array, draw: UInt32[Array, "2"], memory: Any
    ) -> tuple[Array, Array, Array, Any]:
        obs = observation(site, batch, experts, arrival, away=away, cloud=cloud)
        action, remembered = _act(rule, obs, draw, memory)
        return action, _scores(rule, obs, action, draw, memory), best_net(obs), remembered

    draw = jax.ShapeDtypeStruct((2,), np.uint32)
    return jax.jit(decide).lower(*around.shapes(), draw, rule.memory).compile()


def _act(rule: Policy, obs: Observation, draw: UInt32[Array, "2"], memory: Any) -> tuple[Int[Array, ""], Any]:
    seed, count = draw
    key = jax.random.fold_in(jax.random.key(seed), count)
    return rule.act(jax.tree.map(jnp.asarray, rule.params), obs, key, jax.tree.map(jnp.asarray, memory))


def _scores(rule: Policy, obs: Observation, action: Int[Array, ""], draw: Array, memory: Any) -> Float[Array, "action"]:
    """Return the score of each expert, and of away if there is such an action."""
    net = obs.candidates.impact.net
    num_experts = net.shape[0]
    chosen = action
    if rule.declines:
        # What the rule chose before its form sent the request away: a request that must stay goes there.
        plain = RULES[rule.name.partition("+")[0]]
        chosen, _ = _act(plain._replace(params=rule.params[0]), obs, draw, memory[0])
        chosen = jnp.where(action == num_experts, chosen, action)
    score = jnp.where(jnp.arange(num_experts) == chosen, _CHOSEN, net - 1)
    score = jnp.where(obs.experts.eligible, score, _UNAVAILABLE)
    if obs.away is None:
        return score
    return jnp.append(score, jnp.where(action == num_experts, _AWAY, 0.0))


class Assessment(NamedTuple):
    """What was expected of each expert when a decision was taken, and what other rules would have chosen."""

    expected: dict[str, list[float]]
    """Per expert, by the names of `EXPECTED`."""
    cloud: dict[str, float] | None
    """What was expected of the cloud, if the request could go there."""
    shadows: dict[str, int]
    """Action of each rule: an expert's number, or one more than the last for away."""


EXPECTED = (
    *("quality", "output_tokens", "ttft", "tpot", "normalised", "in_time", "qos", "qos_loss", "running", "waiting"),
    *("kv_share", "eligible"),
)
"""Rows of an assessment."""


OF_CLOUD = ("to_cloud", "predicted_quality", "in_time", "qos", "cost")
"""What is kept of away: all zeros where there is no cloud."""


class Assessor:
    """Looks at decisions again, apart from whoever took them."""

    def __init__(self, around: Surroundings, shadows: Sequence[str]) -> None:
        """Compile the estimator, and the rules that would have decided too."""
        self._site = around.array()
        self._rules = [rule_named(name, around.away) for name in shadows]
        self._memories = [rule.memory for rule in self._rules]
        self._count = 0
        self._run = _once(_compiled_assessment, tuple(shadows), around)

    def __call__(self, seen: Arrays) -> Assessment:
        """Assess a decision; rules that remember take them in the order of the calls."""
        draw = np.array([1, self._count], np.uint32)
        self._count += 1
        table, of_cloud, actions, self._memories = self._run(self._site, *seen, draw, self._memories)
        rows = np.asarray(table)
        expected = {name: [_short(value) for value in row] for name, row in zip(EXPECTED, rows, strict=True)}
        # On the host first: a step through an array of JAX is a computation each.
        to_cloud, quality, in_time, qos, cost = np.asarray(of_cloud).tolist()
        cloud = {"quality": quality, "in_time": in_time, "qos": qos, "cost": cost} if to_cloud else None
        shadows = {rule.name: int(action) for rule, action in zip(self._rules, actions, strict=True)}
        return Assessment(expected, cloud, shadows)


def _compiled_assessment(names: tuple[str, ...], around: Surroundings) -> Callable[..., Any]:
    rules = [rule_named(name, around.away) for name in names]
    cloud, away = around.cloud, around.away

    def assess(
        site: Array, batch: Array, experts: Array, arrival: Array, draw: UInt32[Array, "2"], memories: Any
    ) -> tuple[Array, Array, list[Array], list[Any]]:
        obs = observation(site, batch, experts, arrival, away=away, cloud=cloud)
        impact, of = obs.candidates.impact, obs.experts
        table = jnp.stack(
            [
                obs.candidates.predicted_quality,
                obs.candidates.predicted_output_tokens,
                impact.ttft,
                impact.tpot,
                impact.normalised_latency,
                impact.in_time,
                impact.qos,
                impact.qos_loss,
                of.num_running,
                of.num_waiting,
                of.kv_used / of.kv_capacity,
                of.eligible.astype(jnp.float32),
            ]
        )
        of_away = jnp.zeros(5) if obs.away is None else [getattr(obs.away, name) for name in OF_CLOUD]
        of_cloud = jnp.stack([jnp.asarray(value, float) for value in of_away])
        acted = [_act(rule, obs, draw, memory) for rule, memory in zip(rules, memories, strict=True)]
        return table, of_cloud, [action for action, _ in acted], [memory for _, memory in acted]

    draw = jax.ShapeDtypeStruct((2,), np.uint32)
    return jax.jit(assess).lower(*around.shapes(), draw, [rule.memory for rule in rules]).compile()


def _short(value: Any) -> float:
    """Return a number with as many digits as anybody reads."""
    return float(f"{value:.4g}")
