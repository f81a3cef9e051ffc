"""From a configuration, or a scenario's name, to an environment."""

from __future__ import annotations

import dataclasses
import math
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from jaxroute.banks import build_bank
from jaxroute.banks.bank import RequestBank
from jaxroute.config import Config, load_config
from jaxroute.env import EdgeRouting, EnvParams, OutageParams, RewardParams
from jaxroute.env.types import CloudParams, GatewayParams
from jaxroute.errors import UserError, did_you_mean
from jaxroute.networks import build_network
from jaxroute.serving import Site, build_site
from jaxroute.serving.checks import real, real_array, whole
from jaxroute.serving.prefixes import CacheShape
from jaxroute.serving.site import UNBOUNDED
from jaxroute.workloads import Workload, build_workload, training_mix
from jaxroute.workloads.sessions import num_sessions, session_params

SCENARIOS: dict[str, dict[str, str]] = {
    f"{prefix}-{workload}": {"site": site, "workload": "azure_conv" if workload == "azure" else workload}
    for prefix, site in (("edge", "edge6"), ("edge3", "edge3"), ("edge16", "edge16"))
    for workload in ("poisson", "gamma", "mmpp", "diurnal", "mixed", "azure")
}
"""Named scenarios; "edge" is the site edge6."""

# Of a queue without bound, the simulation holds an expert's share of what arrives in so many s: at least so many
# requests, and at most as many as it has seats.
_SECONDS_OF_QUEUE, _SHORTEST_QUEUE = 10.0, 16

# Tokens of a short text, and the logarithm of the fewest entries that a free list has.
_USUAL_TEXT, _FEWEST_ENTRIES = 256, 5

# Requests per second. Beyond, gaps and times at the experts are too far apart for float32.
_LEAST_RATE, _GREATEST_RATE = 1e-6, 1e6


def make(
    name: str,
    *,
    rate: float | tuple[float, float] | None = None,
    horizon: int = 0,
    redraw_every: int = 0,
    random_sites: float | None = None,
    overrides: tuple[str, ...] = (),
    **groups: str,
) -> tuple[EdgeRouting, EnvParams]:
    """Return the environment and parameters of a named scenario.

    Args:
        name: e.g. "edge-poisson"; `jaxroute.SCENARIOS` lists them.
        rate: requests per second, or the (least, greatest) between which each environment draws its own; the
            workload's by default.
        horizon: truncate episodes after so many steps; 0 for an endless task.
        redraw_every: draw a new rate every so many steps; 0 keeps the first.
        random_sites: share of environments that draw a site of their own at `reset`, from the scenario's experts and
            LLMs.
        overrides: further options as on the command line, e.g. ("bank.split=test", "reward.shaping=false").
        **groups: other choices than the scenario's for site, workload or bank, e.g. site="edge3".

    Raises:
        UserError: an unknown name or option, or data that is missing.
    """
    if name not in SCENARIOS:
        hint = did_you_mean(name, SCENARIOS)
        raise UserError(f"scenario {name} is unknown{hint}; choose one of {', '.join(SCENARIOS)}")
    chosen = SCENARIOS[name] | groups
    config = load_config([f"{group}={choice}" for group, choice in chosen.items()] + list(overrides))
    return build_env(config, rate=rate, horizon=horizon, redraw_every=redraw_every, random_sites=random_sites)


def build_env(
    config: Config,
    *,
    rate: float | tuple[float, float] | None = None,
    horizon: int = 0,
    redraw_every: int = 0,
    random_sites: float | None = None,
) -> tuple[EdgeRouting, EnvParams]:
    """Build the environment of a configuration; arguments as for `make`, `random_sites` by default as configured.

    Raises:
        UserError: data that is missing or malformed, a bank that does not fit the site.
    """
    workload = build_workload(config.workload, config.data_path)
    if rate is None:
        rate = workload.rate
    if random_sites is None:
        random_sites = config.dynamics.random_sites
    terms = _Terms(
        [config.reward.accelerator_price] * 2,
        [1.0, 1.0],
        [config.reward.quality_floor] * 2,
        [config.dynamics.refresh_interval] * 2,
        None if config.dynamics.gateways is None else [config.dynamics.gateways] * 2,
    )
    return _build(
        config, workload, terms, rate=rate, horizon=horizon, redraw_every=redraw_every, random_sites=random_sites
    )


class _Terms(NamedTuple):
    """What each environment draws: the least and the greatest."""

    accelerator_price: list[float]
    cloud_price: list[float]
    quality_floor: list[float]
    refresh_interval: list[float]
    gateways: list[int] | None


def _build(
    config: Config,
    workload: Workload,
    terms: _Terms,
    *,
    rate: float | tuple[float, float],
    horizon: int,
    redraw_every: int,
    random_sites: float,
) -> tuple[EdgeRouting, EnvParams]:
    rates = real_array("rate", rate)
    if rates.shape not in ((), (2,)):
        raise UserError(f"rate has shape {rates.shape}; give one number, or the least and the greatest")
    low, high = np.broadcast_to(rates, 2).tolist()
    if not _LEAST_RATE <= low <= high <= _GREATEST_RATE:
        raise UserError(
            f"rate={rate} must be from {_LEAST_RATE:g} to {_GREATEST_RATE:g} requests per second, the least first"
        )
    site = build_site(config.site)
    bank, cloud = _banks(config)
    longest, memory = int(np.max(np.asarray(bank.prompt_tokens))), int(np.max(np.asarray(site.kv_capacity)))
    if longest >= memory:
        raise UserError(
            f"bank {config.bank.kind}: its longest prompt has {longest} tokens, but no expert of site "
            f"{config.site.name} has more than {memory} tokens of KV cache; raise kv_capacity or choose another bank"
        )
    weights, dynamics = config.reward, config.dynamics
    share = real("random_sites", random_sites)
    if not 0 <= share <= 1:
        raise UserError(f"random_sites={share} must be a share of the environments, from 0 to 1")
    env = EdgeRouting(
        num_experts=site.num_experts,
        num_slots=_num_slots(config, site, high),
        arrival_process=workload.process,
        redraw_every=whole("redraw_every", redraw_every, 0),
        horizon=whole("horizon", horizon, 0),
        expected_quality=weights.expected_quality,
        outages=dynamics.outages,
        random_sites=share,
        stale=terms.gateways is None and terms.refresh_interval[1] > 0,
        away=config.env.away,
        cloud_places=config.site.cloud.max_in_flight if config.site.cloud and config.env.away else 0,
        most_gateways=terms.gateways[1] if terms.gateways else 0,
        num_sessions=num_sessions(config.workload.sessions, workload.rate) if config.workload.sessions else 0,
        cache=_cache(config, site),
        see_prefixes=config.env.see_prefixes,
    )
    params = EnvParams(
        site=site,
        bank=bank,
        arrivals=workload.params,
        rate=jnp.asarray([low, high], jnp.float32),
        limits=workload.limits,
        share=workload.share,
        reward=RewardParams(
            accelerator_price=jnp.asarray(terms.accelerator_price, jnp.float32),
            cloud_price=jnp.asarray(terms.cloud_price, jnp.float32),
            quality_floor=jnp.asarray(terms.quality_floor, jnp.float32),
            shaping=jnp.float32(weights.shaping),
        ),
        outages=OutageParams(
            mean_uptime=jnp.float32(dynamics.mean_uptime), mean_downtime=jnp.float32(dynamics.mean_downtime)
        ),
        refresh_interval=jnp.asarray(terms.refresh_interval, jnp.float32),
        cloud=cloud,
        class_floor=_class_floor(config),
        gateways=GatewayParams(jnp.asarray(terms.gateways, jnp.int32), jnp.float32(dynamics.first_poll))
        if terms.gateways
        else None,
        sessions=session_params(config.workload.sessions) if config.workload.sessions else None,
    )
    return env, params


def _cache(config: Config, site: Site) -> CacheShape | None:
    """Return how prefixes are cached, with as many entries as texts of a usual length find room in the largest memory.

    Raises:
        UserError: sessions or caches with what does not know of them yet.
    """
    if not config.site.prefix_caching and config.workload.sessions is None:
        return None
    for name, given in (
        ("outages=retried", config.dynamics.outages == "retried"),
        ("gateways", config.dynamics.gateways),
    ):
        if given:
            raise UserError(
                f"dynamics: {name} does not go together with sessions or prefix caching yet; leave one of them out"
            )
    if not config.site.prefix_caching:
        return None
    blocks = int(np.max(np.asarray(site.kv_capacity))) // config.site.block_size
    if not blocks:
        raise UserError(f"site {config.site.name}: block_size={config.site.block_size} exceeds an expert's kv_capacity")
    texts = blocks * config.site.block_size / _USUAL_TEXT
    return CacheShape(config.site.block_size, 1 << max(math.ceil(math.log2(texts)), _FEWEST_ENTRIES))


def network_of(config: Config) -> nn.Module:
    """Build the network of a router that is trained on this configuration: it sees what its environment shows it."""
    shows_prefixes = config.site.prefix_caching and config.env.see_prefixes
    return build_network(config.network, config.env.away, config.dynamics.gateways is not None, shows_prefixes)


def _num_slots(config: Config, site: Site, rate: float) -> int:
    """Return how many requests the simulation holds at an expert at once, at up to `rate` requests per second."""
    seats, waiting = np.asarray(site.max_num_seqs), np.asarray(site.max_waiting)
    given = config.env.num_slots
    if given is None:
        share = math.ceil(_SECONDS_OF_QUEUE * rate / site.num_experts)
        queue = np.clip(share, _SHORTEST_QUEUE, np.maximum(seats, _SHORTEST_QUEUE))
        return int(np.max(seats + np.where(waiting < UNBOUNDED, waiting, queue)))
    if given < seats.max():
        raise UserError(
            f"env: num_slots={given} is less than the {seats.max()} seats of site {config.site.name}: "
            f"its batches would not fit; set it to {seats.max()} or more, or to null"
        )
    return given


def _class_floor(config: Config) -> Float[Array, "class"] | None:
    """Return the floor of each class; None if there is none."""
    given = config.reward.class_floor
    if not any(given.values()):
        return None
    if not config.env.away:
        raise UserError(
            "reward: class_floor limits who may be declined, and env.away=false rules that out; leave it out"
        )
    names = [requirement.name for requirement in config.workload.requirements]
    for name in given:
        if name not in names:
            hint = did_you_mean(name, names)
            raise UserError(
                f"reward: class_floor names the class {name}, which the workload does not have{hint}; "
                f"choose from {', '.join(names)}"
            )
    return jnp.asarray([given.get(name, 0.0) for name in names], jnp.float32)


def _banks(config: Config) -> tuple[RequestBank, CloudParams | None]:
    """Return the bank of the site's experts, and what the cloud is like if requests may go there."""
    site = config.site
    if site.cloud is None or not config.env.away:
        return build_bank(config.bank, site.models, config.data_path), None
    bank = build_bank(config.bank, [*site.models, site.cloud.model], config.data_path)
    of_site = jax.tree.map(lambda column: column[..., :-1], bank)._replace(prompt_tokens=bank.prompt_tokens)
    names = [name for name in bank._fields if name in CloudParams._fields]
    columns = {name: getattr(bank, name)[..., -1] for name in names}
    figures = {
        name: jnp.float32(getattr(site.cloud, name)) for name in CloudParams._fields if hasattr(site.cloud, name)
    }
    # A prompt is private or not whenever it comes.
    draws = np.random.default_rng((config.bank.seed, len(bank.prompt_tokens))).random(len(bank.prompt_tokens))
    return of_site, CloudParams(**columns, **figures, local_only=jnp.asarray(draws < config.workload.local_only))


def training_workload(config: Config) -> Workload:
    """Build the workload that a router is trained on: the configured one, with the arrivals of `train.arrivals`.

    Raises:
        UserError: as `build_workload`.
    """
    workload = build_workload(config.workload, config.data_path)
    if config.train.arrivals is None:
        return workload
    if config.train.arrivals == "mixed":
        return training_mix(config.workload, workload)
    other = dataclasses.replace(config.workload, arrivals=config.train.arrivals, rate=workload.rate)
    return build_workload(other, config.data_path)


def training_env(config: Config) -> tuple[EdgeRouting, EnvParams]:
    """Build the environment that a router is trained in, as `config.train` describes it.

    Raises:
        UserError: as `build_env`.
    """
    workload = training_workload(config)
    low, high = (load * workload.rate for load in config.train.loads)
    train = config.train
    return _build(
        config,
        workload,
        _Terms(
            train.accelerator_prices or [config.reward.accelerator_price] * 2,
            train.cloud_prices,
            train.quality_floors or [config.reward.quality_floor] * 2,
            train.refresh_intervals or [config.dynamics.refresh_interval] * 2,
            _training_gateways(config),
        ),
        rate=(low, high),
        horizon=config.train.horizon,
        redraw_every=config.train.redraw_every,
        random_sites=config.train.random_sites,
    )


def _training_gateways(config: Config) -> list[int] | None:
    """Return how many gateways a router is trained for, at least and at most; None if it sees every request."""
    judged, trained = config.dynamics.gateways, config.train.gateways
    if judged is None and trained is not None:
        raise UserError(
            f"train: gateways={list(trained)} needs dynamics.gateways, the number of them that the router is judged "
            "with; set dynamics.gateways=1"
        )
    return None if judged is None else trained or [judged] * 2


def on_test_prompts(config: Config) -> Config:
    """Return the configuration with prompts that training has not seen."""
    return dataclasses.replace(config, bank=dataclasses.replace(config.bank, split="test"))
