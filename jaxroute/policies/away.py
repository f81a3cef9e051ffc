"""Rules that may send a request away: any rule, and a form that decides whether its choice is worth it.

`impact_greedy+decline` is the rule `impact_greedy` with the form `decline`. A rule with a form sends a request away,
which declines it or sends it to the cloud where there is one; otherwise the rule chooses as always. q, W, K and L are
as in `jaxroute.policies.rules`; net is own expected QoS minus what others lose.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from jaxroute.env.types import Observation
from jaxroute.policies.protocol import Memory, Params, Policy
from jaxroute.policies.rules import RULES, capacity

# The sources' defaults.
QUEUE_LIMIT, KV_LIMIT = 5.0, 0.8
BURST = 10.0  # s


class Form(NamedTuple):
    """When a rule sends a request away."""

    goes_away: Callable[[Params, Observation, Int[Array, ""], Memory], tuple[Bool[Array, ""], Memory]]
    """`(params, observation, choice, memory) -> (away, memory)`; the choice is the rule's."""
    params: Params
    memory: Memory = ()


def decline(params: Params, obs: Observation, choice: Int[Array, ""], memory: Memory) -> tuple[Bool[Array, ""], Memory]:
    """Away if the net value of the choice is below a threshold, `params`; with a cloud, below that plus what it offers.

    Revenue management's booking limit, with the net value in the place of the fare.
    """
    return obs.candidates.impact.net[choice] - params < _offer(obs), memory


def price(params: Params, obs: Observation, choice: Int[Array, ""], memory: Memory) -> tuple[Bool[Array, ""], Memory]:
    """Away if no expert's net value covers the price of the seat or the KV memory that the request would hold.

    `params` is the bid price (Talluri and van Ryzin, 1998), in QoS per second of all seats, or of all memory, of an
    expert; whichever the request holds more of counts.
    """
    return ~_covers(obs, params).any(), memory


def rate_price(
    params: Params, obs: Observation, choice: Int[Array, ""], memory: Memory
) -> tuple[Bool[Array, ""], Memory]:
    """`price` in proportion to the recent arrival rate over the site's capacity in tokens per second.

    `params` is the price at one request for a hundred tokens of capacity.
    """
    return ~_covers(obs, bid_price(params, obs)).any(), memory


def saturation(
    params: Params, obs: Observation, choice: Int[Array, ""], memory: Memory
) -> tuple[Bool[Array, ""], Memory]:
    """Away if the pool is saturated (the Gateway API inference extension's and llm-d's detector).

    Saturation is the mean over experts of max(W / 5, K / 0.8); `params` is its limit, 1 in the source.
    """
    experts = obs.experts
    used = jnp.maximum(experts.num_waiting / QUEUE_LIMIT, experts.kv_used / experts.kv_capacity / KV_LIMIT)
    return (used * experts.up).sum() / jnp.maximum(experts.up.sum(), 1) >= params, memory


def predicted_latency(
    params: Params, obs: Observation, choice: Int[Array, ""], memory: Memory
) -> tuple[Bool[Array, ""], Memory]:
    """Away if the request is predicted to miss L, or to make others miss theirs (proposed for the inference extension).

    `params` is the number of others that may be expected to become late.
    """
    impact = obs.candidates.impact
    misses = impact.relative_latency[choice] > 1
    return misses | (impact.added_violations[choice] > params), memory


def early_rejection(
    params: Params, obs: Observation, choice: Int[Array, ""], memory: Memory
) -> tuple[Bool[Array, ""], Memory]:
    """Away if the pool's predicted load is too high (Mooncake, arXiv 2407.00079).

    The load is the least predicted latency over L among the available experts; `params` is its limit, 1 in the source.
    """
    relative = jnp.where(obs.experts.eligible, obs.candidates.impact.relative_latency, jnp.inf)
    return relative.min() > params, memory


def token_bucket(
    params: Params, obs: Observation, choice: Int[Array, ""], memory: Memory
) -> tuple[Bool[Array, ""], Memory]:
    """Away if the bucket holds fewer tokens than the answer is predicted to have.

    It fills at `params` times the site's capacity in tokens per second, and holds ten seconds of that. Memory is how
    full it is, from 0 to 1.
    """
    fill = params * _site_capacity(obs)
    tokens = jnp.minimum(memory * BURST + obs.arrival.recent.latest_gap, BURST) * fill
    needed = obs.candidates.predicted_output_tokens[choice]
    away = tokens < needed
    return away, jnp.where(away, tokens, tokens - needed) / (fill * BURST)


def bid_price(params: Params, obs: Observation) -> Float[Array, ""]:
    """Return the price of `rate_price`, in QoS per second of all seats of an expert."""
    return params * 100 * obs.arrival.arrival_rate / jnp.maximum(_site_capacity(obs), 1e-6)


def _offer(obs: Observation) -> Float[Array, ""]:
    """Net value of away: 0 if the request would be declined."""
    assert obs.away is not None
    return obs.away.net


def _covers(obs: Observation, price: Float[Array, ""]) -> Bool[Array, "expert"]:
    """Return which experts offer more than they would hold is worth, and than the cloud offers."""
    impact = obs.candidates.impact
    held = jnp.maximum(impact.seat_seconds, impact.kv_seconds)
    return obs.experts.eligible & (impact.net - price * held >= _offer(obs))


def _site_capacity(obs: Observation) -> Float[Array, ""]:
    """Tokens per second of all experts that are up."""
    return (obs.experts.up * capacity(obs)).sum()


# Tuned on the training workload by `python -m benchmarks.tune_rules`; see docs/reference/policies.md.
FORMS: dict[str, Form] = {
    "decline": Form(decline, params=0.3),
    "price": Form(price, params=0.8),
    "rate_price": Form(rate_price, params=2.0),
    "saturation": Form(saturation, params=1.0),
    "predicted_latency": Form(predicted_latency, params=0.5),
    "early_rejection": Form(early_rejection, params=1.0),
    "token_bucket": Form(token_bucket, params=0.5, memory=np.float32(1.0)),
}


def with_form(rule: str, form: str) -> Policy:
    """Return a rule that sends away what a form says."""
    of_rule, of_form = RULES[rule], FORMS[form]
    return Policy(
        name=f"{rule}+{form}",
        act=_act(rule, form),
        params=(of_rule.params, of_form.params),
        memory=(of_rule.memory, of_form.memory),
        declines=True,
    )


@cache
def _act(rule: str, form: str) -> Callable:
    """Return one function for equal names, so that evaluation compiles it once for all parameters."""

    def act(params: Params, obs: Observation, key: PRNGKeyArray, memory: Memory) -> tuple[Int[Array, ""], Memory]:
        of_rule, of_form = params
        choice, rule_memory = RULES[rule].act(of_rule, obs, key, memory[0])
        away, form_memory = FORMS[form].goes_away(of_form, obs, choice, memory[1])
        assert obs.away is not None
        away &= obs.away.allowed
        action = jnp.where(away, obs.experts.up.shape[0], choice).astype(jnp.int32)
        return action, (rule_memory, form_memory)

    act.__qualname__ = f"{rule}+{form}"  # by which a study recognises it
    return act
