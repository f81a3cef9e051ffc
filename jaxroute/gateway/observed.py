"""What a decision is given, as arrays of `FIELDS`, laid out as the environment's observation."""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxroute.env.cloud import expect_away
from jaxroute.env.environment import observe
from jaxroute.env.gateways import with_others
from jaxroute.env.groups import group
from jaxroute.env.types import (
    Batch,
    CloudParams,
    Described,
    Observation,
    Others,
    Prices,
    Recent,
    Snapshot,
    Typical,
)
from jaxroute.gateway.artefact import CLOUD_FIELDS, FIELDS, LIMIT_FIELDS, OTHERS_FIELDS, TYPICAL_LIMIT_FIELDS
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
    of_experts = dict(zip(FIELDS["experts"], experts, strict=True))
    of_arrival = dict(zip(FIELDS["arrival"], arrival, strict=True))
    own = group(Site(**of_site), requests._replace(running=requests.running > 0, waiting=requests.waiting > 0))
    typical = Typical(
        of_arrival["typical_prompt_tokens"],
        of_experts["typical_quality"],
        of_experts["typical_output_tokens"],
        Limits(*(of_arrival[name] for name in TYPICAL_LIMIT_FIELDS)),
    )
    others = Others(*(of_experts[name] for name in OTHERS_FIELDS))
    known = Snapshot(
        batch=with_others(Site(**of_site), own, others, typical),
        recent_latency=of_experts["recent_latency"],
        up=of_experts["up"] > 0,
        age=jnp.float32(0.0),
    )
    request = Described(
        prompt_tokens=of_arrival["prompt_tokens"],
        limits=Limits(*(of_arrival[name] for name in LIMIT_FIELDS)),
        age=of_arrival["age"],
        predicted_quality=of_experts["predicted_quality"],
        predicted_output_tokens=of_experts["predicted_output_tokens"],
    )
    recent = Recent(*(of_arrival[name] for name in Recent._fields))
    prices = Prices(of_arrival["accelerator_price"], of_arrival["cloud_price"])
    obs = observe(Site(**of_site), log_error, known, request, recent, prices)
    obs = obs._replace(gauge_age=of_arrival["gauge_age"])
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
