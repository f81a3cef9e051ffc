"""Gateways that share a site: what each of them knows of the requests there.

A gateway knows its own requests at once. Of those that came past it, it knows what the servers' gauges said when it
last read them: how many run, how many wait, and how much memory they hold. It takes them for requests like those that
it gets itself, all of a kind: one node for those that run at an expert and one for those that wait, each of as many as
there are.
"""

from __future__ import annotations

from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from jaxroute.env.groups import in_line
from jaxroute.env.types import Batch, Described, GatewayParams, Gateways, Known, Others, Recent, Typical
from jaxroute.serving import Site
from jaxroute.workloads.limits import Limits

TYPICAL_WINDOW = 32.0
"""The typical request is an exponential mean over so many."""
UNREAD = 1e6
"""Age of gauges that have not been read yet, s."""

_Tree = TypeVar("_Tree")


def first_gateways(key: PRNGKeyArray, params: GatewayParams, most: int, recent: Recent, request: Described) -> Gateways:
    """Return the gateways at the start: they have read the gauges, or will soon, and nobody is there yet.

    Args:
        key: draws how many there are.
        params: the bounds.
        most: how many there may be.
        recent: what each remembers of arrivals at first.
        request: what each takes for typical at first.
    """
    least, greatest = params.number
    number = jax.random.randint(key, (), least, greatest + 1, jnp.int32)

    def each(value: Array) -> Array:
        return jnp.broadcast_to(value, (most, *value.shape))

    nothing = jnp.zeros((most, *request.predicted_quality.shape), jnp.float32)
    return Gateways(
        number=number,
        until_poll=params.first_poll,
        age=jnp.where(params.first_poll > 0, UNREAD, 0.0),
        known=Known(
            others=Others(nothing, nothing, nothing),
            recent=jax.tree.map(each, recent),
            since_arrival=jnp.zeros(most, jnp.float32),
            latency_sum=nothing,
            latency_count=nothing,
            typical=jax.tree.map(each, _typical(request)),
        ),
    )


def draw_gateway(key: PRNGKeyArray, gateways: Gateways) -> Int[Array, ""]:
    """Return the gateway at which the next request arrives."""
    return jax.random.randint(key, (), 0, gateways.number, jnp.int32)


def let_pass(gateways: Gateways, gap: Float[Array, ""]) -> Gateways:
    """Let time pass."""
    return gateways._replace(
        until_poll=gateways.until_poll - gap,
        age=gateways.age + gap,
        known=gateways.known._replace(since_arrival=gateways.known.since_arrival + gap),
    )


def remember_answers(
    gateways: Gateways, owner: Int[Array, "expert slot"], info: dict[str, Any], fade: Float[Array, ""]
) -> Gateways:
    """Add to each gateway's latencies those of its own answers; `info` is the step's, and older ones `fade`."""
    ended = info["ended"].T
    latency = jnp.where(ended, info["latency"].T / jnp.maximum(info["output_tokens"].T, 1), 0.0)
    own, known = _sent_by_each(gateways, owner), gateways.known
    known = known._replace(
        latency_sum=known.latency_sum * fade + (own * latency).sum(-1),
        latency_count=known.latency_count * fade + (own & ended).sum(-1),
    )
    return gateways._replace(known=known)


def remember_request(gateways: Gateways, gateway: Int[Array, ""], request: Described, recent: Recent) -> Gateways:
    """Add a request that has arrived at a gateway; `recent` is what that gateway now remembers of arrivals."""
    known = of_gateway(gateways.known, gateway)
    typical = jax.tree.map(lambda old, new: old + (new - old) / TYPICAL_WINDOW, known.typical, _typical(request))
    known = known._replace(recent=recent, typical=typical, since_arrival=jnp.float32(0.0))
    return gateways._replace(known=at_gateway(gateways.known, gateway, known))


def poll(gateways: Gateways, interval: Float[Array, ""], batch: Batch, owner: Int[Array, "slot expert"]) -> Gateways:
    """Read the gauges if it is time: every `interval` s, at the moment of a decision.

    What the gauges say less what a gateway has there itself is what others have there.
    """
    due = gateways.until_poll <= 0
    foreign = ~_sent_by_each(gateways, owner)
    now = Others(
        running=(foreign & batch.running).sum(1).astype(jnp.float32),
        waiting=(foreign & batch.waiting).sum(1).astype(jnp.float32),
        kv_tokens=jnp.where(foreign & batch.running, batch.computed, 0.0).sum(1),
    )
    others = jax.tree.map(lambda new, old: jnp.where(due, new, old), now, gateways.known.others)
    return gateways._replace(
        until_poll=jnp.where(due, interval, gateways.until_poll),
        age=jnp.where(due, 0.0, gateways.age),
        known=gateways.known._replace(others=others),
    )


def _sent_by_each(gateways: Gateways, owner: Int[Array, "*place"]) -> Bool[Array, "gateway *place"]:
    number = jnp.arange(gateways.known.since_arrival.shape[0])
    return owner == number[:, None, None]


def own_requests(batch: Batch, own: Bool[Array, "slot expert"]) -> Batch:
    """Return a batch without the requests of others."""
    return batch._replace(running=batch.running & own, waiting=batch.waiting & own)


def with_others(site: Site, batch: Batch, others: Others, typical: Typical) -> Batch:
    """Return a gateway's own requests and two nodes more for each expert: others that run there, and that wait.

    In the order of admission the others are spread evenly among the own ones.

    Args:
        site: the experts.
        batch: the own requests or groups of them, `(slot, expert)`.
        others: how many others are there.
        typical: what they are taken to be like.
    """
    weight, size, place, tokens_so_far = in_line(batch)
    run, wait, kv_tokens = others
    own_run = (weight * batch.running).sum(0)
    own_wait = (weight * batch.waiting).sum(0)

    held = kv_tokens / jnp.maximum(run, 1.0)
    prompt = jnp.minimum(typical.prompt_tokens, held)
    generated = jnp.maximum(held - prompt + 1, 1.0) * (run > 0)
    seqs = jnp.minimum(run + own_run, site.max_num_seqs)
    pace = site.iteration_time(seqs, seqs, kv_tokens + (weight * batch.computed).sum(0))
    first = pace + 2 * site.network_delay
    expected = jnp.maximum(typical.predicted_output_tokens, 1.0)
    # Of the queue, half came before the mean of it, and a seat is free whenever one of the batch has ended.
    waited = wait / 2 * expected * pace / jnp.maximum(run + own_run, 1.0)
    limits = Limits.of_rates(typical.allowed)
    zero = jnp.zeros_like(run)

    def more(column: Array, of_running: Array, of_waiting: Array) -> Array:
        two = jnp.stack([jnp.broadcast_to(value, run.shape) for value in (of_running, of_waiting)])
        return jnp.concatenate([column, two.astype(column.dtype)])

    def spread(rank: Array, of_running: Array, of_waiting: Array, own: tuple[Array, Array]) -> Array:
        """Move own ranks back to let others in, in proportion."""
        in_batch, queued = own
        running = rank * (1 + of_running / jnp.maximum(in_batch, 1.0))
        waiting = in_batch + of_running + (rank - in_batch) * (1 + of_waiting / jnp.maximum(queued, 1.0))
        moved = jnp.where(batch.waiting, waiting, running)
        total = in_batch + of_running
        return more(moved, total / 2, total + (queued + of_waiting) / 2)

    own_sizes = (size * batch.running).sum(0), (size * batch.waiting).sum(0)
    return Batch(
        running=more(batch.running, run > 0, zero),
        waiting=more(batch.waiting, zero, wait > 0),
        prompt_tokens=more(batch.prompt_tokens, prompt, typical.prompt_tokens),
        computed=more(batch.computed, prompt + generated - 1, zero),
        generated=more(batch.generated, generated, zero),
        age=more(batch.age, first + generated * pace, waited),
        first_token=None if batch.first_token is None else more(batch.first_token, first, zero),
        limits=jax.tree.map(lambda column, limit: more(column, limit, limit), batch.limits, limits),
        predicted_quality=more(batch.predicted_quality, typical.predicted_quality, typical.predicted_quality),
        predicted_output_tokens=more(batch.predicted_output_tokens, expected, expected),
        weight=more(weight, run, wait),
        place=spread(place, run, wait, (own_run, own_wait)),
        tokens_so_far=spread(tokens_so_far, run * held, wait * typical.prompt_tokens, own_sizes),
    )


def of_gateway(of_each: _Tree, gateway: Int[Array, ""]) -> _Tree:
    """Return one gateway's values; the first axis of each array is that of gateways."""

    def row(values: Array) -> Array:
        # Few rows: a sum over them is quicker than looking one up for each environment.
        return jnp.where(_is(gateway, values), values, 0).sum(0).astype(values.dtype)

    return jax.tree.map(row, of_each)


def at_gateway(of_each: _Tree, gateway: Int[Array, ""], values: _Tree) -> _Tree:
    """Return the values of all gateways with those of one replaced."""
    return jax.tree.map(lambda all_values, new: jnp.where(_is(gateway, all_values), new, all_values), of_each, values)


def _is(gateway: Int[Array, ""], values: Array) -> Bool[Array, "gateway ..."]:
    number = jnp.arange(values.shape[0])
    return (number == gateway).reshape(-1, *([1] * (values.ndim - 1)))


def _typical(request: Described) -> Typical:
    return Typical(
        request.prompt_tokens,
        request.predicted_quality,
        request.predicted_output_tokens,
        allowed=request.limits.rates(),
    )
