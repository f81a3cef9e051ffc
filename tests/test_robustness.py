"""The environment on whatever sites, loads and actions: what must hold after every one of thousands of steps.

Everything random is drawn on the device from a seed, ends of ranges as often as what is in between, so that hypothesis
chooses values and never shapes: each of the two kinds of site compiles once.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from jax.flatten_util import ravel_pytree

from jaxroute.banks import RequestBank
from jaxroute.env import EdgeRouting, EnvParams, EnvState, OutageParams, RewardParams
from jaxroute.env.environment import best_net
from jaxroute.networks.features import features_of
from jaxroute.serving import Site, SlotStatus, ages, computed, generated, running_and_waiting, slot_status
from jaxroute.workloads.arrivals import ArrivalParams, Pattern, mixed, poisson
from jaxroute.workloads.limits import Limits

pytestmark = pytest.mark.slow

NUM_PROMPTS, NUM_CLASSES = 16, 2
# Prefill is computed chunk by chunk: this bounds the iterations that a prompt takes.
MOST_CHUNKS = 16


@dataclass(frozen=True)
class Shape:
    """What is compiled; everything else is drawn."""

    env: EdgeRouting
    num_envs: int
    num_steps: int


SHAPES = {
    "one expert": Shape(
        EdgeRouting(1, 16, poisson, expected_quality=False, outages="lost", stale=True, away=True),
        num_envs=32,
        num_steps=1000,
    ),
    "many experts": Shape(
        EdgeRouting(64, 4, mixed, redraw_every=50, expected_quality=False, outages="retried", random_sites=0.5),
        num_envs=8,
        num_steps=500,
    ),
}


# ---- Drawing -----------------------------------------------------------------------------------------------


class Draws:
    """One draw after the other, all from one call, which compiles quickly."""

    def __init__(self, key: jax.Array, size: int) -> None:
        self.left = jax.random.uniform(key, (size,))

    def uniform(self, shape: tuple[int, ...] = ()) -> jax.Array:
        size = math.prod(shape)
        drawn, self.left = self.left[:size], self.left[size:]
        return drawn.reshape(shape)

    def between(self, low: Any, high: Any, shape: tuple[int, ...] = ()) -> jax.Array:
        """Log-uniform; each of the ends one time in six."""
        place = jnp.clip(self.uniform(shape) * 1.5 - 0.25, 0.0, 1.0)
        return jnp.clip(low * (high / low) ** place, low, high).astype(jnp.float32)

    def or_zero(self, low: float, high: float, shape: tuple[int, ...]) -> jax.Array:
        """The same, with 0 for the lower end."""
        value = self.between(low, high, shape)
        return jnp.where(value > low, value, 0.0)

    def count_between(self, low: Any, high: Any, shape: tuple[int, ...] = ()) -> jax.Array:
        return jnp.clip(jnp.round(self.between(low, high, shape)), low, high).astype(jnp.int32)


def draw_limits(draws: Draws) -> Limits:
    """Each class of service has about half of the limits."""
    shape = (NUM_CLASSES,)
    return Limits(
        *(
            jnp.where(draws.uniform(shape) < 0.5, draws.between(low, high, shape), jnp.inf)
            for low, high in ((1e-2, 1e2), (1e-3, 1.0), (1e-1, 1e3), (1e-3, 10.0))
        )
    )


def draw_params(key: jax.Array, env: EdgeRouting, rates: jax.Array, most_tokens: jax.Array) -> EnvParams:
    """Any scenario of these shapes; prompts and answers have at most so many tokens each."""
    draws, n = Draws(key, 96 + 80 * env.num_experts), (env.num_experts,)
    per_prompt = (NUM_PROMPTS, *n)
    max_num_seqs = draws.count_between(1.0, env.num_slots - 1.0, n)
    site = Site(
        iteration_overhead=draws.or_zero(1e-6, 0.1, n),
        weight_load=draws.between(1e-9, 1.0, n),
        compute_per_token=draws.or_zero(1e-9, 1e-3, n),
        decode_per_seq=draws.or_zero(1e-9, 1e-2, n),
        attention_per_token=draws.or_zero(1e-12, 1e-5, n),
        max_num_seqs=max_num_seqs,
        max_num_batched_tokens=draws.count_between(jnp.maximum(most_tokens / MOST_CHUNKS, max_num_seqs), 2.0**24, n),
        max_waiting=draws.count_between(1.0, env.num_slots - max_num_seqs.astype(jnp.float32), n),
        # Up to room for all; below `most_tokens`, some are turned away for it.
        kv_capacity=draws.count_between(most_tokens / 8 + 2, 2.0**24, n),
        network_delay=draws.or_zero(1e-6, 1.0, n),
    )
    bank = RequestBank(
        prompt_tokens=draws.count_between(1.0, most_tokens, (NUM_PROMPTS,)),
        quality=(draws.uniform(per_prompt) < 0.5).astype(jnp.float32),
        output_tokens=draws.count_between(1.0, most_tokens, per_prompt),
        predicted_quality=jnp.clip(draws.uniform(per_prompt) * 1.5 - 0.25, 0.0, 1.0),
        predicted_output_tokens=draws.between(0.1, most_tokens * 4, per_prompt),
        log_length_error=draws.between(0.05, 3.0, n),
    )
    twice = Pattern(
        *(
            jnp.stack([low, high])
            for low, high in map(jnp.float32, ((1.0, 4.0), (1.0, 6.0), (1e-3, 1e3), (0.1, 0.9), (1.0, 1e6)))
        )
    )
    share = draws.uniform((NUM_CLASSES,)) + 1e-3
    return EnvParams(
        site=site,
        bank=bank,
        arrivals=ArrivalParams(
            shape=jnp.float32(1.0), gaps=jnp.ones(1), burst_share=draws.between(0.01, 0.9), pattern=twice
        ),
        rate=jnp.sort(draws.between(rates[0], rates[1], (2,))),
        limits=draw_limits(draws),
        share=share / share.sum(),
        reward=RewardParams(
            accelerator_price=jnp.broadcast_to(draws.or_zero(0.01, 1.0, ()), 2),
            cloud_price=jnp.ones(2),
            quality_floor=jnp.zeros(2),
            shaping=jnp.round(draws.uniform()),
        ),
        # From a failure in almost every gap to hardly any.
        outages=OutageParams(
            mean_uptime=draws.between(0.1, 1e3) / rates[0], mean_downtime=draws.between(0.1, 1e2) / rates[0]
        ),
        refresh_interval=jnp.broadcast_to(draws.or_zero(1e-6, 1e3, ()), 2),
        cloud=None,
        class_floor=None,
        gateways=None,
    )


def draw_action(draws: Draws, style: jax.Array, obs: Any, env: EdgeRouting) -> jax.Array:
    """Mostly in one style: one expert only, any, those open, those closed, none that exists, or away if there is."""
    noise = draws.uniform((env.num_experts,))
    beyond = jnp.array([-1, env.num_experts, jnp.iinfo(jnp.int32).min, jnp.iinfo(jnp.int32).max])
    choices = jnp.stack(
        [
            style % env.num_experts,
            jnp.argmax(noise),
            jnp.argmax(jnp.where(obs.experts.available, noise, -1.0)),
            jnp.argmax(jnp.where(obs.experts.available, -1.0, noise)),
            beyond[(draws.uniform() * 4).astype(jnp.int32)],
        ]
    )
    other = (draws.uniform() * len(choices)).astype(jnp.int32)
    return choices[jnp.where(draws.uniform() < 0.2, other, style % 4)]


# ---- What must hold ----------------------------------------------------------------------------------------


def wrong(
    env: EdgeRouting, site: Site, before: EnvState, after: EnvState, obs: Any, action: jax.Array, info: dict[str, Any]
) -> dict[str, jax.Array]:
    """Where this step has broken which rule; without reductions, which take long to compile."""
    gap, state, slots = info["gap"], after.site, after.site.slots
    active = slot_status(state) == SlotStatus.ACTIVE
    running, waiting = running_and_waiting(state)
    num_running = running.sum(1)
    held = jnp.where(running, computed(state), 0).sum(1)
    working = state.duration < 1e29
    # Of a time as long as the gap, the iteration in progress, or the idle time before it.
    rounding = 1e-6 * (1 + gap + jnp.abs(before.site.clock) + jnp.where(working, state.duration, 0.0))
    head_ready = jnp.where(waiting, site.network_delay[:, None] - ages(state), jnp.inf).min(1)
    ended, latency = info["ended"], info["latency"]
    tokens, limits = info["output_tokens"], info["limits"]
    in_time = (info["ttft"] <= limits.ttft) & (latency <= limits.e2e)
    in_time &= (latency - info["ttft"]) / jnp.maximum(tokens - 1, 1) <= limits.tpot
    in_time &= latency / jnp.maximum(tokens, 1) <= limits.normalised
    impact = obs.candidates.impact
    chances, _ = ravel_pytree((impact.in_time, impact.qos, obs.candidates.predicted_quality, obs.in_flight.in_time))
    # A net value may be below 0: others lose more than the request gains.
    recent = obs.arrival.recent
    nets, _ = ravel_pytree((recent.net, best_net(obs)))
    # A limit that does not hold is infinite.
    arrival = obs.arrival._replace(recent=recent._replace(net=recent.net_square), limits=())
    seen, _ = ravel_pytree((arrival, obs.experts, obs.candidates, obs.in_flight._replace(limits=())))
    features, _ = ravel_pytree(features_of(obs))
    return {
        "an action that does not exist is carried out": ((action < 0) | (action >= env.num_actions))
        & ~info["rejected"],
        "what is sent away is not declined": info["declined"] != (env.away & (action == env.num_experts)),
        "rejected and declined": info["rejected"] & info["declined"],
        "a gap is negative or not finite": ~(gap >= 0) | ~jnp.isfinite(gap),
        "a clock goes back": state.clock + gap < before.site.clock - rounding,
        "an iteration is overdue": working & (state.clock + state.duration < -rounding),
        "an iteration has begun in the future": working & (state.clock > rounding),
        "an expert idles before its queue": ~working & (jnp.maximum(state.clock, head_ready) < -rounding),
        "more work than time": info["busy_seconds"] > gap + jnp.maximum(-before.site.clock, 0.0) + rounding,
        "more run or wait than are counted": (num_running != state.num_running) | (waiting.sum(1) != state.num_waiting),
        "more run than there are seats": num_running > site.max_num_seqs,
        "more wait than there is room": waiting.sum(1) > site.max_waiting + site.max_num_seqs,
        "more tokens than a batch may have": working & (state.kv_held - held > site.max_num_batched_tokens),
        "more KV than there is": (held > site.kv_capacity) | (working & (state.kv_held > site.kv_capacity)),
        "KV in the queue": waiting & (computed(state) > 0),
        "more answered than asked": active & (generated(state) >= slots.output_tokens),
        "an expert that is down holds something": ~after.up[:, None] & active,
        "an outcome is not finite": ended & ~(jnp.isfinite(latency) & jnp.isfinite(info["ttft"])),
        "the last token comes before the first": ended & (info["ttft"] > latency),
        "an answer comes before its way there and back": ended & (info["ttft"] < 2 * site.network_delay * (1 - 1e-6)),
        "in time or not": info["in_time"] != ended & in_time,
        "QoS": info["qos"] != jnp.where(info["in_time"], info["quality"], 0.0),
        "number of completed": info["num_completed"] != ended.sum(),
        "number of late": info["num_late"] != (ended & ~info["in_time"]).sum(),
        "number of lost": info["num_lost"] != info["lost"].sum(),
        "observation: not finite or negative": ~jnp.isfinite(seen) | (seen < 0),
        "observation: a net value is not finite, or above 1": ~jnp.isfinite(nets) | (nets > 1 + 1e-6),
        "observation: a chance above 1": chances > 1 + 1e-6,
        "observation: a request runs and waits": obs.running & obs.waiting,
        "observation: more run than there are seats": obs.experts.num_running > obs.experts.max_num_seqs,
        "observation: more KV than there is": obs.experts.kv_used > obs.experts.kv_capacity,
        "features: not finite": ~jnp.isfinite(features),
    }


def count(sums: dict[str, jax.Array], before: EnvState, after: EnvState, info: dict[str, Any]) -> dict[str, jax.Array]:
    """Add this step to the sums over the episode."""
    given_back = after.request.age > 0
    preempted = after.site.slots.preemptions > before.site.slots.preemptions
    step = {
        "completed": info["num_completed"],
        "rejected": info["rejected"],
        "declined": info["declined"],
        "lost": info["num_lost"],
        "given back": given_back,
        "preempted": preempted.sum(),
        "shaping": after.potential - before.potential,
        "seconds": info["gap"],
        "busy": info["busy_seconds"],
    }
    return {name: sums[name] + step[name] for name in step}


def wrong_sums(
    params: EnvParams, sums: dict[str, Any], before: EnvState, after: EnvState, reward: Any, info: dict[str, Any]
) -> dict[str, jax.Array]:
    """Which rules about what has been since the beginning are broken, and whether the reward is right."""
    weights = params.reward
    accelerator_time = weights.accelerator_price[0] * info["busy_seconds"].sum()
    qos = reward + accelerator_time - weights.shaping * (after.potential - before.potential)
    in_flight = (slot_status(after.site) == SlotStatus.ACTIVE).sum()
    given_back = after.request.age > 0
    # The request that waits for its expert has arrived already if it was given back, and so have those marked.
    pending = given_back + (0 if after.retries is None else after.retries.marked.sum())
    scale = 1 + jnp.abs(after.potential) + jnp.abs(before.potential) + info["num_late"]
    return {
        "requests are not conserved": after.step + given_back
        != sums["completed"] + sums["rejected"] + sums["declined"] + sums["lost"] + in_flight + pending,
        "the reward is not the QoS": ~(jnp.abs(qos - info["qos_sum"]) <= 1e-5 * (scale + accelerator_time)),
        "shaping does not telescope": ~(jnp.abs(sums["shaping"] - after.potential) <= 1e-4 * scale),
        "more work than time since the beginning": sums["busy"] > sums["seconds"] * (1 + 1e-4) + 1e-3,
    }


NEVER = np.iinfo(np.int32).max


@partial(jax.jit, static_argnames="shape")
@chex.assert_max_traces(n=len(SHAPES))
def survey(shape: Shape, seed: jax.Array, rates: jax.Array, most_tokens: jax.Array) -> Any:
    """Run `num_envs` scenarios; return what has been counted, and by rule and place the first step that broke it."""
    env = shape.env

    def episode(key: jax.Array) -> Any:
        key_params, key_reset, key_style, key_steps = jax.random.split(key, 4)
        params = draw_params(key_params, env, rates, most_tokens)
        style = jax.random.randint(key_style, (), 0, 1000)

        def step(carry: Any, number: jax.Array) -> Any:
            state, action, sums, first = carry
            key_env, key_action = jax.random.split(jax.random.fold_in(key_steps, number))
            obs, after, reward, terminated, truncated, info = env.step(key_env, state, action, params)
            sums = count(sums, state, after, info)
            site = params.site if after.fleet is None else after.fleet.site
            broken = wrong(env, site, state, after, obs, action, info)
            broken |= wrong_sums(params, sums, state, after, reward, info)
            broken |= {"an end of what has none": terminated | truncated}
            if first is None:
                return broken
            first = jax.tree.map(lambda now, past: jnp.where(now, jnp.minimum(number, past), past), broken, first)
            action = draw_action(Draws(key_action, env.num_experts + 3), style, obs, env)
            return (after, action, sums, first), None

        # What a router sees first, nobody looks at: half as much to compile. Nothing is expected of an idle site.
        state = env.reset(key_reset, params)[1]._replace(potential=jnp.float32(0.0))
        numbers = ("completed", "rejected", "declined", "lost", "given back", "preempted")
        sums = dict.fromkeys(numbers, jnp.int32(0)) | dict.fromkeys(("shaping", "seconds"), jnp.float32(0.0))
        sums["busy"] = jnp.zeros(env.num_experts)
        begin = (state, jnp.int32(0), sums)
        places = jax.eval_shape(lambda begin: step((*begin, None), jnp.int32(0)), begin)
        first = jax.tree.map(lambda place: jnp.full(place.shape, NEVER), places)
        (_, _, sums, first), _ = jax.lax.scan(step, (*begin, first), jnp.arange(shape.num_steps))
        return sums, first

    return jax.vmap(episode)(jax.random.split(jax.random.key(seed), shape.num_envs))


def broken_rules(first: dict[str, np.ndarray]) -> dict[str, dict[int, int]]:
    """By rule, the environments that broke it and their first step."""
    by_env = {name: steps.reshape(len(steps), -1).min(1) for name, steps in first.items()}
    rules = {name: {int(e): int(steps[e]) for e in np.flatnonzero(steps < NEVER)} for name, steps in by_env.items()}
    return {name: where for name, where in rules.items() if where}


# ---- On anything -------------------------------------------------------------------------------------------

# Requests per second: the ends of what `jaxroute.make` takes, and all between them in one run.
RATES = [(0.1, 50.0), (1e-6, 1e-6), (1e6, 1e6), (1e-6, 1e6)]
# Single tokens, ordinary requests, and such as fill the memory alone.
MOST_TOKENS = [1.0, 200.0, 2.0**20]


def run(name: str, seed: int, rates: tuple[float, float], most_tokens: float) -> dict[str, np.ndarray]:
    """Survey one of the shapes; return what has been counted if no rule is broken."""
    counted, first = jax.device_get(survey(SHAPES[name], np.uint32(seed), np.float32(rates), np.float32(most_tokens)))
    broken = broken_rules(first)
    assert not broken, f"rules broken, with the first step by environment: {broken}"
    return counted


@pytest.mark.parametrize("name", SHAPES)
# Without the phase that explains a failure: it traces every line, and that takes minutes here.
@settings(max_examples=5, phases=[Phase.explicit, Phase.reuse, Phase.generate, Phase.shrink])
@given(seed=st.integers(0, 2**32 - 1), rates=st.sampled_from(RATES), most_tokens=st.sampled_from(MOST_TOKENS))
def test_no_rule_is_ever_broken(name, seed, rates, most_tokens):
    run(name, seed, rates, most_tokens)


@pytest.mark.parametrize(
    ("name", "happens"), [("one expert", ("lost", "declined")), ("many experts", ("given back",))], ids=list(SHAPES)
)
def test_everything_happens(name, happens):
    """Or that no rule is broken would say little."""
    counted = run(name, 0, RATES[0], MOST_TOKENS[1])
    for event in ("completed", "rejected", "preempted", *happens):
        assert counted[event].sum() > 0, event
    assert (counted["completed"] > 0).mean() > 0.8
