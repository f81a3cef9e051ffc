"""Observations made by hand: three experts that are alike, but for what a test changes."""

import jax.numpy as jnp

from jaxroute.env.types import Arrival, Candidates, Experts, Impact, InFlight, Observation, Prices, Recent
from jaxroute.workloads.limits import Limits

NUM_EXPERTS, NUM_SLOTS = 3, 4

# Three experts that are alike in everything, and idle.
ALIKE = {
    "prompt_tokens": 100.0,
    # On the normalised latency, the only one.
    "limit": 0.04,
    "arrival_rate": 8.0,
    "max_num_seqs": 8.0,
    "max_waiting": 4.0,
    "kv_capacity": 10_000.0,
    "iteration_time": 0.02,
    "weight_load": 0.02,
    "compute_per_token": 1e-4,
    "predicted_quality": 0.5,
    "predicted_output_tokens": 100.0,
    "ttft": 0.1,
    "tpot": 0.02,
    "tpot_alone": 0.02,
    "normalised_latency": 0.021,
    "in_time": 0.9,
    "qos": 0.45,
    "up": True,
    "available": True,
}


def observation(away=None, no_worse=None, session=None, **changes):
    """What a router sees; values are per expert, or one for all."""
    known = {*ALIKE, *Experts._fields, *Impact._fields, *Recent._fields, "cached_tokens"}
    assert set(changes) <= known, "a field that does not exist"
    values = ALIKE | changes

    def fill(part, **others):
        shape = (NUM_EXPERTS,) if part in (Experts, Candidates, Impact) else ()
        columns = {
            name: jnp.broadcast_to(
                jnp.asarray(values.get(name, 0.0), bool if name in {"up", "available"} else jnp.float32), shape
            )
            for name in part._fields
            if name not in others
        }
        return part(**columns, **others)

    slots, limit = jnp.zeros((NUM_EXPERTS, NUM_SLOTS)), jnp.float32(values["limit"])
    latency, in_time = (
        jnp.broadcast_to(jnp.asarray(values[name], jnp.float32), (NUM_EXPERTS,))
        for name in ("normalised_latency", "in_time")
    )
    nothing = {name: slots for name in InFlight._fields if name != "limits"}
    return Observation(
        arrival=fill(
            Arrival, limits=Limits(normalised=limit), recent=fill(Recent), prices=fill(Prices), session=session
        ),
        experts=fill(Experts),
        candidates=fill(
            Candidates,
            no_worse=no_worse,
            impact=fill(Impact, in_time_each=Limits(normalised=in_time), relative_latency=latency / limit),
        ),
        in_flight=InFlight(limits=Limits(normalised=slots), **nothing),
        running=slots > 0,
        waiting=slots > 0,
        away=away,
        gauge_age=None,
    )
