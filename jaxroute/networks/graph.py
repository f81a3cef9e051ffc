"""The observation laid out as jraph graphs, one bipartite `GraphsTuple` per edge type."""

from __future__ import annotations

import jax.numpy as jnp
import jraph
from jaxtyping import Array

from jaxroute.networks.features import Features

RUNNING_TO_EXPERT = "running->expert"
WAITING_TO_EXPERT = "waiting->expert"
ARRIVAL_TO_EXPERT = "arrival->expert"
EXPERT_TO_ARRIVAL = "expert->arrival"
EDGE_TYPES = (RUNNING_TO_EXPERT, WAITING_TO_EXPERT, ARRIVAL_TO_EXPERT, EXPERT_TO_ARRIVAL)


def as_graphs(features: Features) -> dict[str, jraph.GraphsTuple]:
    """Lay out one graph by edge type.

    `nodes` holds both sides, {"senders": ..., "receivers": ...}; `edges` holds {"mask": ...} (a padded edge is
    False, and so is one of an expert that is not up) and, between arrival and experts, {"features": ...}.
    """
    num_experts, num_slots = features.running.shape
    expert = jnp.arange(num_experts)
    requests = features.in_flight.reshape(num_experts * num_slots, -1)
    arrival = features.arrival[None]
    nobody = jnp.zeros(num_experts, jnp.int32)

    def graph(
        sender_nodes: Array, receiver_nodes: Array, edges: dict[str, Array], senders: Array, receivers: Array
    ) -> jraph.GraphsTuple:
        return jraph.GraphsTuple(
            nodes={"senders": sender_nodes, "receivers": receiver_nodes},
            edges=edges,
            senders=senders,
            receivers=receivers,
            globals=None,
            n_node=jnp.array([sender_nodes.shape[0] + receiver_nodes.shape[0]]),
            n_edge=jnp.array([senders.shape[0]]),
        )

    slot_owner = jnp.repeat(expert, num_slots)
    slot = jnp.arange(num_experts * num_slots)
    known = {"mask": features.up, "features": features.candidates}
    return {
        RUNNING_TO_EXPERT: graph(requests, features.experts, {"mask": features.running.reshape(-1)}, slot, slot_owner),
        WAITING_TO_EXPERT: graph(requests, features.experts, {"mask": features.waiting.reshape(-1)}, slot, slot_owner),
        ARRIVAL_TO_EXPERT: graph(arrival, features.experts, known, nobody, expert),
        EXPERT_TO_ARRIVAL: graph(features.experts, arrival, known, expert, nobody),
    }
