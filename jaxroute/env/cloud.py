"""Away: what becomes of a request that no expert gets.

Without a cloud it is declined. A cloud answers as fast whatever the site sends: TTFT and time per token are log-normal,
and a share of the answers is slower by a factor. How long it takes is known when the request is sent, so that its QoS
counts then; until the answer ends, it holds one of the places that the site may use at once.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.scipy.special import ndtr
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from jaxroute.env.types import Away, CloudParams, Described, Prices, Request
from jaxroute.workloads.limits import Limits, latencies


class CloudAnswer(NamedTuple):
    """The cloud's answer to this step's request; zeros if it did not go there."""

    sent: Bool[Array, ""]
    quality: Float[Array, ""]
    output_tokens: Int[Array, ""]
    ttft: Float[Array, ""]
    """s, as all times at the router."""
    latency: Float[Array, ""]
    """E2E, s."""
    in_time: Bool[Array, ""]
    expected_qos: Float[Array, ""]
    """Predicted quality if it is in time."""
    spent: Float[Array, ""]
    """What it costs, in QoS."""

    @property
    def qos(self) -> Float[Array, ""]:
        """Quality if it is in time."""
        return jnp.where(self.in_time, self.quality, 0.0)


def describe_away(
    cloud: CloudParams | None, places: Float[Array, "place"] | None, request: Request, prices: Prices
) -> Away:
    """Return what away means for this request, as far as a router can know it."""
    nothing = jnp.zeros_like(request.age)
    if cloud is None or places is None:
        return expect_away(None, nothing > 0, request.described(), nothing, nothing, prices)
    return expect_away(
        cloud,
        _may_go(places, request),
        request.described(),
        _qualities(cloud, request)[1],
        cloud.predicted_output_tokens[request.row],
        prices,
    )


def expect_away(
    cloud: CloudParams | None,
    to_cloud: Bool[Array, ""],
    request: Described,
    quality: Float[Array, ""],
    tokens: Float[Array, ""],
    prices: Prices,
) -> Away:
    """Predict the cloud's answer, of predicted `quality` and median length `tokens`; all is 0 if there will be none.

    The request is allowed to go.

    Each latency is taken as log-normal, with a spread to first order in those of ttft, tpot and n, once for fast
    answers and once for slow ones; the least of their probabilities counts.
    """
    if cloud is None:
        nothing = jnp.zeros_like(request.age)
        return Away(nothing == 0, nothing > 0, *[nothing] * (len(Away._fields) - 2))
    mean_tokens = jnp.maximum(tokens * jnp.exp(cloud.log_length_error**2 / 2), 1.0)
    decode = cloud.tpot * (mean_tokens - 1)
    first = cloud.ttft / (cloud.ttft + decode)
    by_times = jnp.sqrt((first * cloud.ttft_spread) ** 2 + ((1 - first) * cloud.tpot_spread) ** 2)
    spreads = Limits(
        ttft=cloud.ttft_spread,
        tpot=cloud.tpot_spread,
        e2e=jnp.sqrt(by_times**2 + ((1 - first) * cloud.log_length_error) ** 2),
        normalised=jnp.sqrt(by_times**2 + (first * cloud.log_length_error) ** 2),
    )

    def in_time_if(factor: Float[Array, ""] | float) -> Float[Array, ""]:
        ttft = request.age + factor * cloud.ttft
        expected = latencies(ttft, ttft + factor * decode, mean_tokens)
        of_each = [
            ndtr(jnp.log(limit / jnp.maximum(value, 1e-6)) / jnp.sqrt(spread**2 + 0.02**2))
            for limit, value, spread in zip(request.limits, expected, spreads, strict=True)
            if limit is not None
        ]
        return jnp.stack(of_each).min(0)

    in_time = (1 - cloud.slow_share) * in_time_if(1.0) + cloud.slow_share * in_time_if(cloud.slow_factor)
    offer = {
        "predicted_quality": quality,
        "in_time": in_time,
        "qos": quality * in_time,
        "cost": _cost(cloud, request.prompt_tokens + mean_tokens, prices),
    }
    offer = {name: jnp.where(to_cloud, value, jnp.zeros_like(value)) for name, value in offer.items()}
    return Away(allowed=jnp.ones_like(to_cloud), to_cloud=to_cloud, **offer)


def ask(
    key: PRNGKeyArray,
    cloud: CloudParams,
    places: Float[Array, "place"],
    request: Request,
    prices: Prices,
    sent_away: Bool[Array, ""],
) -> CloudAnswer:
    """Send the request to the cloud, if it was sent away and may go there; the draws depend on `key` alone."""
    key_slow, key_times = jax.random.split(key)
    slow = jax.random.uniform(key_slow, (), jnp.float32) < cloud.slow_share
    for_ttft, for_tpot = jax.random.normal(key_times, (2,), jnp.float32)
    factor = jnp.where(slow, cloud.slow_factor, 1.0)
    tokens = cloud.output_tokens[request.row]
    ttft = factor * cloud.ttft * jnp.exp(cloud.ttft_spread * for_ttft)
    latency = ttft + factor * cloud.tpot * jnp.exp(cloud.tpot_spread * for_tpot) * (tokens - 1)
    in_time = request.limits.met(latencies(ttft + request.age, latency + request.age, tokens))
    quality, predicted_quality = _qualities(cloud, request)
    answer = CloudAnswer(
        sent=sent_away & _may_go(places, request),
        quality=quality,
        output_tokens=tokens,
        ttft=ttft + request.age,
        latency=latency + request.age,
        in_time=in_time,
        expected_qos=jnp.where(in_time, predicted_quality, 0.0),
        spent=_cost(cloud, request.prompt_tokens + tokens, prices),
    )
    return jax.tree.map(lambda value: jnp.where(answer.sent, value, jnp.zeros_like(value)), answer)


def let_time_pass(
    places: Float[Array, "place"], answer: CloudAnswer, age: Float[Array, ""], gap: Float[Array, ""]
) -> Float[Array, "place"]:
    """Return the places after `gap` s, with the new answer in a free one; `age` s of its latency are past already."""
    taken = answer.sent & (jnp.arange(places.shape[0]) == jnp.argmin(places))
    return jnp.maximum(jnp.where(taken, answer.latency - age, places) - gap, 0.0)


def _qualities(cloud: CloudParams, request: Request) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """Return true and predicted quality of the cloud's answer; 0 if the latter is below the floor."""
    quality, predicted = cloud.quality[request.row], cloud.predicted_quality[request.row]
    wanted = predicted >= request.quality_floor
    return jnp.where(wanted, quality, 0.0), jnp.where(wanted, predicted, 0.0)


def _may_go(places: Float[Array, "place"], request: Request) -> Bool[Array, ""]:
    return (places.min() <= 0) & ~request.local_only


def _cost(cloud: CloudParams, tokens: Array, prices: Prices) -> Float[Array, ""]:
    return prices.cloud * (cloud.price_per_request + cloud.price_per_1000_tokens * tokens / 1000)
