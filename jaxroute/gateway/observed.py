"""What a decision is given, as arrays of `FIELDS`, laid out as the environment's observation."""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxroute.env.cloud import expect_away
from jaxroute.env.environment import observe
from jaxroute.env.groups import group
from jaxroute.env.types import Batch, CloudParams, Described, Observation, Prices, Recent, Snapshot
from jaxroute.gateway.artefact import CLOUD_FIELDS, FIELDS, LIMIT_FIELDS
from jaxroute.serving import CloudConfig, Site
from jaxroute.workloads.limits import Limits


def observation(
    site: Float[Array, "field expert"],
    batch: Float[Array, "field slot expert"],
    experts: Float[Array, "field expert"],
    arrival: Float[Array, "field"],
    *,
    away: bool,
    cloud: CloudParams | None,
) -> Observation:
    """Return what a policy sees.

    Args:
        site: as `FIELDS` says; likewise the next three.
        batch: the requests at the experts.
        experts: the experts, and what is predicted for each.
        arrival: the arriving request.
        away: whether it may be sent away.
        cloud: where it goes then; None declines it.
    """
    of_site = dict(zip(FIELDS["site"], site, strict=True))
    log_error = of_site.pop("log_length_error")
    of_batch = dict(zip(FIELDS["batch"], batch, strict=True))
    requests = Batch(limits=Limits(*(of_batch.pop(name) for name in LIMIT_FIELDS)), **of_batch)
    recent_latency, up, predicted_quality, predicted_output_tokens = experts
    of_arrival = dict(zip(FIELDS["arrival"], arrival, strict=True))
    known = Snapshot(
        batch=group(Site(**of_site), requests._replace(running=requests.running > 0, waiting=requests.waiting > 0)),
        recent_latency=recent_latency,
        up=up > 0,
        age=jnp.float32(0.0),
    )
    request = Described(
        prompt_tokens=of_arrival["prompt_tokens"],
        limits=Limits(*(of_arrival[name] for name in LIMIT_FIELDS)),
        age=of_arrival["age"],
        predicted_quality=predicted_quality,
        predicted_output_tokens=predicted_output_tokens,
    )
    recent = Recent(*(of_arrival[name] for name in Recent._fields))
    prices = Prices(of_arrival["accelerator_price"], of_arrival["cloud_price"])
    obs = observe(Site(**of_site), log_error, known, request, recent, prices)
    if not away:
        return obs
    to_cloud, quality, tokens = (of_arrival[name] for name in CLOUD_FIELDS)
    return obs._replace(away=expect_away(cloud, to_cloud > 0, request, quality, tokens, prices))


def cloud_figures(config: CloudConfig, log_length_error: float) -> CloudParams:
    """Return what a policy needs to know of a cloud: its figures, and no prompts."""
    figures = {name: jnp.float32(getattr(config, name)) for name in CloudParams._fields if hasattr(config, name)}
    none = jnp.zeros(0, jnp.float32)
    columns = dict.fromkeys(
        ("quality", "output_tokens", "predicted_quality", "predicted_output_tokens", "local_only"), none
    )
    return CloudParams(**{**columns, **figures, "log_length_error": jnp.float32(log_length_error)})
