"""The episode viewer: one episode of one policy, recorded decision by decision, as a page that plays it."""

from __future__ import annotations

from collections.abc import Callable
from enum import IntEnum
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray
from rich.console import Console

from jaxroute.config import Config
from jaxroute.env import EdgeRouting, EnvParams, EnvState, Observation
from jaxroute.env.cloud import CloudAnswer
from jaxroute.env.environment import site_of
from jaxroute.env.types import Away, Candidates, Request
from jaxroute.errors import UserError, did_you_mean
from jaxroute.evaluation.episodes import check_may_decline, episode_keys, keys_of_episode, keys_of_step
from jaxroute.evaluation.judge import versions
from jaxroute.evaluation.report.write import fill_template, jsonable
from jaxroute.files import write_file
from jaxroute.policies import LEARNED, RULES, Policy, rules_named
from jaxroute.runs import load_policy
from jaxroute.scenarios import build_env, on_test_prompts
from jaxroute.serving import Site, computed, generated, running_and_waiting

SHOWN = 200
"""Requests that the page plays, at most: some twenty seconds at the default rate."""


class Ending(IntEnum):
    """How a request's stay at an expert, or away, ends; the page is given these names and numbers."""

    IN_TIME = 0
    LATE = 1
    REJECTED = 2
    LOST = 3
    GIVEN_BACK = 4
    IN_FLIGHT = 5
    DECLINED = 6


class Phase(IntEnum):
    """What a request at an expert is doing, or that it is in the cloud; the page is given these names and numbers."""

    WAITING = 0
    PREFILL = 1
    DECODE = 2
    CLOUD = 3


def view_episode(config: Config, console: Console, run: Path, *, command: str) -> Path:
    """Record an episode of the policy `config.view` and write `view.html`.

    It is the first one of an evaluation with the same options, at the workload's rate.

    Raises:
        UserError: an unknown policy, one that declines where that is ruled out, missing data, a checkpoint that does
            not exist or does not fit.
    """
    name = config.view
    rule = str(name).partition("+")[0]
    if name != LEARNED and rule not in RULES:
        hint = did_you_mean(rule, [LEARNED, *RULES])
        raise UserError(f"view={name} is unknown{hint}; choose {LEARNED} or a rule: {', '.join(RULES)}")
    if name == LEARNED and config.checkpoint is None:
        raise UserError(f"view={LEARNED} needs a trained router; add checkpoint=outputs/<run>")
    config = on_test_prompts(config)
    env, params = build_env(config)
    network = None
    checkpoint = "none"
    if name == LEARNED:
        trained = load_policy(str(config.checkpoint), env, params)
        policy, network = trained.policy, trained.network
        checkpoint = str(trained.source)
    else:
        try:
            (policy,) = rules_named([str(name)])
        except UserError as error:  # of its form
            raise UserError(str(error).replace("policies: ", "view=", 1)) from None
        check_may_decline(env, [policy])
    settings = config.eval
    shown = min(SHOWN, settings.requests)
    console.print(
        f"Recording {policy.name} on {config.workload.name}, bank {config.bank.kind}, site {config.site.name}: "
        f"{shown} requests after {settings.warmup}"
    )
    recording = record_episode(
        env, params, policy, seed=settings.seed, requests=shown, warmup=settings.warmup, network=network
    )
    labels = [expert.model if env.random_sites else expert.label for expert in config.site.experts]
    content = {
        "workload": config.workload.name,
        "site": config.site.name,
        "bank": config.bank.kind,
        "policy": policy.name,
        "rate": float(params.rate[0]),
        **episode_content(recording, labels, first=settings.warmup, last=settings.warmup + shown - 1),
    }
    about = {"command": command, "checkpoint": checkpoint, **versions(), "seed": str(settings.seed)}
    return write_file(run / "view.html", view_html(content, about))


def view_html(content: dict[str, Any], about: dict[str, str]) -> str:
    """Return the page that plays an episode, `episode_content` and what it is of; it needs no other file."""
    return fill_template("viewer/viewer.html.jinja", content=jsonable(content), about=about)


# --- Recording -----------------------------------------------------------------------------------------


class Decision(NamedTuple):
    """What there is to see at one decision, and what happens until the next one."""

    step: Int[Array, ""]
    """Number of the latest arrival."""
    request: Request
    """Another one than the latest arrival where an expert has given it back."""
    candidates: Candidates
    """As the router sees them."""
    available: Bool[Array, "expert"]
    """Whether an expert would take the request, as the router sees it."""
    away: Away | None
    """None if every request must go to an expert."""
    probability: Float[Array, "action"]
    """That a learned router gives each action; nan for a rule."""
    expert: Int[Array, ""]
    """One more than the last if the request was sent away."""
    rejected: Bool[Array, ""]
    cloud: CloudAnswer | None
    """None if the site has no cloud."""
    up: Bool[Array, "expert"]
    running: Bool[Array, "slot expert"]
    waiting: Bool[Array, "slot expert"]
    slot_number: Int[Array, "slot expert"]
    """Number of the request in each slot."""
    prompt_tokens: Int[Array, "slot expert"]
    computed: Int[Array, "slot expert"]
    generated: Int[Array, "slot expert"]
    preemptions: Int[Array, "slot expert"]
    gap: Float[Array, ""]
    """Time until the next decision, s."""
    info: dict[str, Array]
    """Per slot, after the gap: which request ended or was lost, and how."""


_INFO = ("ended", "lost", "request", "in_time", "ttft", "latency", "preemptions")


class Recording(NamedTuple):
    """An episode, as NumPy arrays."""

    decisions: Decision
    """Leading axis decision."""
    site: Site
    column: Int[np.ndarray, "expert"]
    """Which of the configured LLMs each expert serves."""


def record_episode(
    env: EdgeRouting,
    params: EnvParams,
    policy: Policy,
    *,
    seed: int,
    requests: int,
    warmup: int,
    network: nn.Module | None = None,
) -> Recording:
    """Run the first episode that `evaluate_policies` would run with these arguments, and keep every decision.

    `network` is a learned policy's own, which gives the probabilities.
    """
    num_steps = requests + 2 * warmup
    key_reset, keys = keys_of_episode(episode_keys(seed, 1)[0], num_steps)
    carry = (*_begin(env, params, key_reset), jax.tree.map(jnp.asarray, policy.memory))
    first = carry[1]
    chunks = []
    # Once is enough, unless requests are retried, which takes decisions of their own.
    while int(carry[1].step) < num_steps:
        carry, decisions = _play(env, policy.act, network, params, keys, policy.params, carry)
        chunks.append(jax.device_get(decisions))
    decisions = jax.tree.map(lambda *parts: np.concatenate(parts), *chunks)
    decisions = jax.tree.map(lambda column: column[decisions.step < num_steps], decisions)
    column = np.arange(env.num_experts) if first.fleet is None else np.asarray(first.fleet.column)
    return Recording(decisions, jax.device_get(site_of(first, params)), column)


_begin = jax.jit(lambda env, params, key: env.reset(key, params), static_argnums=0)


@partial(jax.jit, static_argnames=("env", "act", "network"))
def _play(
    env: EdgeRouting,
    act: Callable,
    network: nn.Module | None,
    params: EnvParams,
    keys: PRNGKeyArray,
    policy_params: Any,
    carry: tuple[Observation, EnvState, Any],
) -> tuple[tuple[Observation, EnvState, Any], Decision]:
    """Take as many decisions as there are keys, which are those of the steps."""

    def step(carry: tuple[Observation, EnvState, Any], xs: None) -> tuple[tuple[Observation, EnvState, Any], Decision]:
        obs, state, memory = carry
        key_action, key_env = keys_of_step(env, keys, state)
        action, new_memory = act(policy_params, obs, key_action, memory)
        new_memory = jax.tree.map(lambda new, old: new.astype(old.dtype), new_memory, memory)
        probability = jnp.full(env.num_actions, jnp.nan)
        if network is not None:
            logits, _ = network.apply(policy_params, network.prepare(obs))
            probability = jax.nn.softmax(logits)
        new_obs, new_state, _, _, _, info = env.step(key_env, state, action, params)
        running, waiting = running_and_waiting(state.site)
        slots = state.site.slots
        decision = Decision(
            step=state.step,
            request=state.request,
            candidates=obs.candidates,
            available=obs.experts.available,
            away=obs.away,
            probability=probability,
            expert=action,
            rejected=info["rejected"],
            cloud=info.get("cloud"),
            up=state.up,
            running=running.T,
            waiting=waiting.T,
            slot_number=slots.request.T,
            prompt_tokens=slots.prompt_tokens.T,
            computed=computed(state.site).T,
            generated=generated(state.site).T,
            preemptions=slots.preemptions.T,
            gap=info["gap"],
            info={name: info[name] for name in _INFO},
        )
        return (new_obs, new_state, new_memory), decision

    return jax.lax.scan(step, carry, length=keys.shape[0])


# --- What the page is given ----------------------------------------------------------------------------


def episode_content(recording: Recording, labels: list[str], *, first: int, last: int) -> dict[str, Any]:
    """Return what the page plays: from the arrival of request `first` to that of request `last`.

    Times are in s after the first one. A *stay* is a request's time at one expert, from its routing to its answer back
    at the router; its samples are taken at the decisions from number `sampled_from` on. A retried request has several
    stays. How they end is taken from the whole episode, beyond the last decision shown. A request that is sent away has
    a stay too, at an expert one more than the last, which ends at once if it is declined.
    """
    decisions = recording.decisions
    begin, end = (int(np.argmax(decisions.request.number == number)) for number in (first, last))
    gaps = np.asarray(decisions.gap, np.float64)
    time = np.concatenate([[0.0], np.cumsum(gaps)])[:-1]
    time -= time[begin]

    stays = _stays(decisions, time, range(begin, end + 1))
    impact = decisions.candidates.impact
    limits = {name: limit for name, limit in decisions.request.limits._asdict().items() if limit is not None}
    columns = {
        "time": time,
        "number": decisions.request.number,
        "expert": decisions.expert,
        "prompt_tokens": decisions.request.prompt_tokens,
        **{f"{name}_limit": limit for name, limit in limits.items()},
        "probability": decisions.probability,
        "quality": decisions.candidates.predicted_quality,
        "output_tokens": decisions.candidates.predicted_output_tokens,
        "ttft": impact.ttft,
        "latency": impact.normalised_latency,
        "in_time": impact.in_time,
        "qos": impact.qos,
        "qos_loss": impact.qos_loss,
        "available": decisions.available,
        "up": decisions.up,
        "kv": np.where(decisions.running | decisions.waiting, decisions.computed, 0).sum(1),
    }
    if decisions.candidates.cached_tokens is not None:
        columns["cached_tokens"] = decisions.candidates.cached_tokens
    if decisions.away is not None:
        columns |= {f"away_{name}": values for name, values in decisions.away._asdict().items()}
    site = recording.site
    return {
        "endings": {ending.name: ending.value for ending in Ending},
        "phases": {phase.name: phase.value for phase in Phase},
        "experts": [
            {
                "label": labels[column],
                "max_num_seqs": site.max_num_seqs[expert],
                "max_waiting": site.max_waiting[expert],
                "kv_capacity": site.kv_capacity[expert],
            }
            for expert, column in enumerate(recording.column)
        ],
        "decisions": {name: _rounded(values[begin : end + 1]) for name, values in columns.items()},
        "stays": [stay for stay in stays if stay["routed"] >= 0 or stay["end"] is None or stay["end"] > 0],
    }


def _stays(decisions: Decision, time: Float[np.ndarray, "decision"], sampled: range) -> list[dict[str, Any]]:
    """List every stay up to the last of the `sampled` decisions, in order of routing."""
    stays: list[dict[str, Any]] = []
    latest: dict[int, dict[str, Any]] = {}
    arrival: dict[int, float] = {}
    for k in range(len(time)):
        number, expert = int(decisions.request.number[k]), int(decisions.expert[k])
        if k in sampled:
            _sample(decisions, k, latest, k - sampled.start)
        before = latest.pop(number, None)
        if before is not None:
            before |= {"outcome": Ending.GIVEN_BACK, "end": time[k]}
        request, away = decisions.request, expert == decisions.available.shape[1]
        stay = {
            "number": number,
            "expert": expert,
            "routed": time[k],
            "arrival": arrival.setdefault(number, time[k]),
            "prompt_tokens": request.prompt_tokens[k],
            "output_tokens": 0 if away else request.output_tokens[k, expert],
            "limits": {
                name: _rounded(limit[k])
                for name, limit in request.limits._asdict().items()
                if limit is not None and np.isfinite(limit[k])
            },
            "quality": 0.0 if away else _rounded(request.quality[k, expert]),
            "outcome": Ending.IN_FLIGHT,
            "end": None,
            "ttft": None,
            "preemptions": 0,
            "sampled_from": None,
            "samples": {"phase": [], "generated": [], "computed": [], "preemptions": []},
        }
        if decisions.rejected[k]:
            stay |= {"outcome": Ending.REJECTED, "end": time[k]}
        elif away:
            stay |= _sent_away(decisions.cloud, k, stay)
        else:
            latest[number] = stay
        if k <= sampled[-1]:
            stays.append(stay)
        _end(decisions.info, k, time[k] + decisions.gap[k], latest)
    for stay in stays:
        stay |= {name: _rounded(stay[name]) for name in ("routed", "arrival", "end", "ttft") if stay[name] is not None}
    return stays


def _sent_away(cloud: CloudAnswer | None, k: int, stay: dict[str, Any]) -> dict[str, Any]:
    """Return how the stay ends of a request that was sent away at decision `k`."""
    if cloud is None or not cloud.sent[k]:
        return {"outcome": Ending.DECLINED, "end": stay["routed"]}
    return {
        "outcome": Ending.IN_TIME if cloud.in_time[k] else Ending.LATE,
        "end": stay["arrival"] + float(cloud.latency[k]),
        "ttft": float(cloud.ttft[k]),
        "output_tokens": cloud.output_tokens[k],
        "quality": _rounded(cloud.quality[k]),
    }


def _sample(decisions: Decision, k: int, latest: dict[int, dict[str, Any]], sample: int) -> None:
    """Note what each request in flight is doing at decision `k`."""
    for slot, expert in np.argwhere(decisions.running[k] | decisions.waiting[k]):
        at = (k, slot, expert)
        stay = latest[int(decisions.slot_number[at])]
        if stay["sampled_from"] is None:
            stay["sampled_from"] = sample
        computed, generated = decisions.computed[at], decisions.generated[at]
        # A decoding request has everything in its KV cache but the latest token.
        decodes = decisions.prompt_tokens[at] + generated - computed == 1
        phase = (Phase.DECODE if decodes else Phase.PREFILL) if decisions.running[at] else Phase.WAITING
        values = {
            "phase": phase,
            "generated": generated,
            "computed": computed,
            "preemptions": decisions.preemptions[at],
        }
        for name, value in values.items():
            stay["samples"][name].append(value)


def _end(info: dict[str, Any], k: int, now: float, latest: dict[int, dict[str, Any]]) -> None:
    """Note what ended after decision `k`."""
    for slot, expert in np.argwhere(info["ended"][k] | info["lost"][k]):
        at = (k, slot, expert)
        stay = latest.pop(int(info["request"][at]))
        stay["preemptions"] = info["preemptions"][at]
        if info["lost"][at]:
            stay |= {"outcome": Ending.LOST, "end": now}
        else:
            stay |= {
                "outcome": Ending.IN_TIME if info["in_time"][at] else Ending.LATE,
                "end": stay["arrival"] + float(info["latency"][at]),
                "ttft": float(info["ttft"][at]),
            }


def _rounded(values: Any) -> Any:
    """Keep what can be seen of floating-point numbers, so that the page is small."""
    values = np.asarray(values)
    # By way of float64: rounded float32 numbers are long in decimals.
    return np.round(values.astype(np.float64), 5) if np.issubdtype(values.dtype, np.floating) else values
