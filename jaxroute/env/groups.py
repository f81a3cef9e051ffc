"""Many requests at an expert as few nodes: groups of alike requests, each with a weight.

A server of real size holds hundreds of requests. What matters of one of them is how close it is to its limit, and
whether it decodes, prefills or waits. So requests of a kind that use up about the same share of their limit become one
node, which stands for as many as there are, with the means of their columns. Sums over nodes are exact sums over
requests. As long as there are no more requests than nodes, each is a node of its own.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int

from jaxroute.env.types import Batch
from jaxroute.serving import Site, running_sums
from jaxroute.workloads.limits import Limits, latencies

# Shares of its limit that a request is expected to use up. On 96 states of rack4, the best expert by these groups is
# that by single requests in 96 %, and worth .001 of QoS less; by half as many groups, .002 to .005 less.
_BOUNDS = np.exp(np.linspace(np.log(0.5), np.log(1.5), 18))
# Of requests that are about to lose their memory, and of waiting ones, there are fewer.
_FEW_BOUNDS = np.exp(np.linspace(np.log(0.6), np.log(1.5), 5))
_PREFILLING = len(_BOUNDS) + 1
_AT_RISK = _PREFILLING + 1
_WAITING = _AT_RISK + len(_FEW_BOUNDS) + 1
NUM_GROUPS = _WAITING + len(_FEW_BOUNDS) + 1


def in_line(batch: Batch) -> tuple[Array, Array, Array, Array]:
    """Return how many requests each slot stands for, their tokens, the place in line, and the tokens up to there."""
    active = (batch.running | batch.waiting).astype(jnp.float32)
    weight = active if batch.weight is None else batch.weight
    size = weight * (batch.prompt_tokens + batch.generated)
    # The slots are in the order in which requests are admitted and keep their memory. First in line = 1.
    if batch.place is None or batch.tokens_so_far is None:
        place, tokens_so_far = running_sums(active, size)
    else:
        place, tokens_so_far = batch.place, batch.tokens_so_far
    return weight, size, place, tokens_so_far


def group(site: Site, batch: Batch) -> Batch:
    """Return the requests as `NUM_GROUPS` nodes per expert, `(group, expert)`; as they are if there are no more slots.

    Args:
        site: the experts.
        batch: `(slot, expert)`, in the order of admission.

    Returns:
        The nodes with their `weight`, and with `place` and `tokens_so_far`, which are means over requests, as all
        columns but the limits. Of these it is the harmonic mean, so that no limit stays none.
    """
    num_slots = batch.running.shape[0]
    if num_slots <= NUM_GROUPS:
        return batch
    return jax.tree.map(jnp.transpose, jax.vmap(_group_expert)(site, jax.tree.map(jnp.transpose, batch)))


def _group_expert(site: Site, batch: Batch) -> Batch:
    """Group the requests of one expert; columns are `(slot,)`, and those of the result `(group,)`."""
    active = batch.running | batch.waiting
    if batch.limits.ttft is not None and batch.first_token is not None:
        # Once kept, it limits nothing any more: its mean with others would.
        kept = (batch.generated > 0) & (batch.first_token <= batch.limits.ttft)
        batch = batch._replace(limits=batch.limits._replace(ttft=jnp.where(kept, jnp.inf, batch.limits.ttft)))
    weight, _, place, tokens_so_far = in_line(batch)
    index = jnp.where(place[-1] <= NUM_GROUPS, place - 1, _kind(site, batch, place[-1], tokens_so_far))
    columns = batch._replace(
        running=batch.running.astype(jnp.float32),
        waiting=batch.waiting.astype(jnp.float32),
        limits=batch.limits.rates(),
        place=place.astype(jnp.float32),
        tokens_so_far=tokens_so_far.astype(jnp.float32),
    )
    values, structure = jax.tree.flatten(columns)
    member = (index[:, None] == jnp.arange(NUM_GROUPS)) * weight[:, None]
    # What an empty slot holds may be anything.
    table = jnp.where(active, jnp.stack(values), 0.0)
    count, sums = member.sum(0), jnp.matmul(table, member, precision=jax.lax.Precision.HIGHEST)
    means: Batch = jax.tree.unflatten(structure, list(sums / jnp.maximum(count, 1.0)))
    return means._replace(
        running=means.running > 0,
        waiting=means.waiting > 0,
        limits=Limits.of_rates(means.limits),
        weight=count,
    )


def _kind(
    site: Site,
    batch: Batch,
    num_active: Int[Array, ""],
    tokens_so_far: Int[Array, "slot"],
) -> Int[Array, "slot"]:
    """Return the group of each request: by what it does, and by the share of its limit that it comes to use up."""
    num_seqs = jnp.minimum(num_active, site.max_num_seqs)
    pace = site.iteration_time(num_seqs, num_seqs, tokens_so_far[-1] * num_seqs / jnp.maximum(num_active, 1))
    predicted = jnp.maximum(batch.predicted_output_tokens, 1.0)
    # Longer than predicted by now: a good part of it is still to come.
    tokens = jnp.maximum(predicted, 1.3 * batch.generated)
    latency = batch.age + (tokens - batch.generated) * pace
    first = (
        latency if batch.first_token is None else jnp.where(batch.generated > 0, batch.first_token, batch.age + pace)
    )
    used = batch.limits.relative(latencies(first, latency, tokens))
    of_many = jnp.searchsorted(jnp.asarray(_BOUNDS), used, method="compare_all")
    of_few = jnp.searchsorted(jnp.asarray(_FEW_BOUNDS), used, method="compare_all")
    decodes = batch.prompt_tokens + batch.generated - batch.computed <= 1
    at_risk = tokens_so_far + tokens - batch.generated > site.kv_capacity
    of_running = jnp.where(decodes, jnp.where(at_risk, _AT_RISK + of_few, of_many), _PREFILLING)
    return jnp.where(batch.running, of_running, _WAITING + of_few)
