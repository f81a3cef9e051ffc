"""The edge site as a reinforcement-learning environment: one step routes one arriving request.

The protocol is gymnax 1.x's: `reset(key, params) -> obs, state` and `step(key, state, action, params) -> obs, state,
reward, terminated, truncated, info`, pure functions to jit and vmap. The task is continuing: `terminated` is always
False, and `truncated` marks the horizon, if one is set.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray, Shaped

from jaxroute.env.cloud import CloudAnswer, ask, describe_away, let_time_pass
from jaxroute.env.gateways import (
    at_gateway,
    draw_gateway,
    first_gateways,
    let_pass,
    of_gateway,
    own_requests,
    poll,
    remember_answers,
    remember_request,
    with_others,
)
from jaxroute.env.groups import group
from jaxroute.env.impact import assess, estimate_impact
from jaxroute.env.sessions import SessionState, first_sessions, next_turn
from jaxroute.env.types import (
    Arrival,
    Batch,
    Candidates,
    Described,
    EnvParams,
    EnvState,
    Experts,
    Fleet,
    Gateways,
    InFlight,
    Observation,
    Prices,
    Recent,
    Request,
    Retries,
    SlotTable,
    Snapshot,
)
from jaxroute.errors import UserError
from jaxroute.serving import (
    Site,
    SiteState,
    SlotStatus,
    advance,
    ages,
    cached_tokens,
    can_accept,
    clear,
    computed,
    enqueue,
    fold,
    generated,
    has_free_slot,
    idle_site,
    lanes_last,
    running_and_waiting,
    slot_status,
)
from jaxroute.serving.checks import whole
from jaxroute.serving.prefixes import NOBODY, CacheShape, Text
from jaxroute.serving.sessions import with_turn
from jaxroute.workloads.arrivals import ArrivalProcess, first_arrival_state
from jaxroute.workloads.limits import Limits, latencies

# The recent arrival rates are exponential means over this many gaps; the recent latency, over this time in s.
ARRIVAL_WINDOW, SLOW_ARRIVAL_WINDOW = 32.0, 512.0
LATENCY_WINDOW = 60.0
# The share of a class that was served, over so many of its requests.
CLASS_WINDOW = 64.0

# The ranges from which the experts of a random site are drawn, apart from their LLM.
_TIME_FACTORS = (0.5, 2.0)
_MEMORY_FACTORS = (0.5, 2.0)
_NETWORK_DELAYS = (0.001, 0.020)  # s
_FEWEST_EXPERTS = 2


@dataclass(frozen=True)
class EdgeRouting:
    """Route requests among the experts of one edge site. Every field is static, so the environment is hashable."""

    num_experts: int
    num_slots: int
    """How many requests the simulation holds at an expert at once, running and waiting. One more than that is lost to
    the simulation, if not to the expert: it ends with QoS 0, and counts as `overflowed`."""
    arrival_process: ArrivalProcess
    redraw_every: int = 0
    """Number of steps after which a new request rate is drawn; 0 keeps the first."""
    horizon: int = 0
    """Number of steps after which an episode is truncated and starts over; 0 never does, and compiles no reset."""
    expected_quality: bool = True
    """Reward the predicted quality instead of the drawn outcome; metrics always count the outcome."""
    outages: str = "none"
    """What happens to the requests at an expert that fails: "lost" or "retried"; with "none", no expert fails."""
    random_sites: float = 0.0
    """Fraction of environments that draw a site of their own at `reset`."""
    stale: bool = False
    """The router looks at the experts only every `params.refresh_interval` seconds, and decides on its latest look."""
    away: bool = False
    """One more action: the request goes to no expert. It is declined at once, or goes to the site's cloud."""
    cloud_places: int = 0
    """How many requests the cloud may have in flight at once; 0 where there is no cloud."""
    num_sessions: int = 0
    """How many sessions are alive at once; 0: each request stands for itself."""
    cache: CacheShape | None = None
    """How the experts cache prefixes; None if they do not."""
    see_prefixes: bool = True
    """Whether the router sees how much of the arriving prompt each expert has cached."""
    most_gateways: int = 0
    """How many gateways may share the site. Requests arrive at one of them at random, and it decides on what it knows:
    its own requests, and the servers' gauges. 0: the router sees every request at the site."""

    @property
    def num_actions(self) -> int:
        """One action per expert, and the last one, `num_experts`, for away."""
        return self.num_experts + self.away

    @partial(jax.jit, static_argnums=0)
    def reset(self, key: PRNGKeyArray, params: EnvParams) -> tuple[Observation, EnvState]:
        """Start with an idle site and its first request."""
        key_rate, key_start, key_request = jax.random.split(key, 3)
        nothing = jnp.zeros((self.num_experts, self.num_slots), jnp.float32)
        # `split` uses the numbers below 3.
        fleet = _draw_fleet(jax.random.fold_in(key, 3), params, self.random_sites) if self.random_sites else None
        rate = _draw_rate(key_rate, params, fleet)
        zeros = jnp.zeros(self.num_experts, jnp.float32)
        prices, quality_floor = _draw_terms(jax.random.fold_in(key, 4), params)
        request = _draw_request(key_request, jnp.int32(0), quality_floor, params, fleet)
        recent = Recent(1 / rate, 1 / rate, *(jnp.float32(0.0) for _ in range(3)))
        gateways = None
        if self.most_gateways:
            assert params.gateways is not None
            described = request.described()
            gateways = first_gateways(
                jax.random.fold_in(key, 6), params.gateways, self.most_gateways, recent, described
            )
            request = _at_any(request, key_request, gateways)
        site = idle_site(self.num_experts, self.num_slots, self.cache)
        sessions = first_sessions(self.num_sessions) if self.num_sessions else None
        request, sessions = self._with_text(key_request, request, sessions, site, params)
        retries = None
        if self.outages == "retried":
            none = nothing.astype(jnp.int32)
            retries = Retries(marked=none > 0, number=none, row=none, age=nothing, since_arrival=jnp.float32(0.0))
        state = EnvState(
            site=site,
            table=SlotTable(
                quality=nothing,
                predicted_quality=nothing,
                predicted_output_tokens=nothing,
                limits=jax.tree.map(lambda _: nothing, params.limits),
                gateway=nothing.astype(jnp.int32) if self.most_gateways else None,
                cached_tokens=nothing if self._shows_prefixes else None,
            ),
            up=jnp.ones(self.num_experts, bool) if fleet is None else fleet.present,
            request=request,
            recent=recent,
            prices=prices,
            served=None if params.class_floor is None else jnp.ones_like(params.class_floor),
            cloud=jnp.zeros(self.cloud_places, jnp.float32) if self.cloud_places else None,
            arrivals=first_arrival_state(key_start, params.arrivals),
            rate=rate,
            step=jnp.int32(0),
            latency_sum=zeros,
            latency_count=zeros,
            potential=jnp.float32(0.0),
            fleet=fleet,
            retries=retries,
            seen=None,
            refresh_interval=_between(params.refresh_interval, jax.random.fold_in(key, 7)),
            gateways=gateways,
            sessions=sessions,
        )
        # Nothing has been seen yet, so the first look is always at the present.
        return self._observe(state, params, jnp.float32(0.0))

    def step(
        self, key: PRNGKeyArray, state: EnvState, action: Int[Array, ""], params: EnvParams
    ) -> tuple[Observation, EnvState, Float[Array, ""], Bool[Array, ""], Bool[Array, ""], dict[str, Any]]:
        """Route the request to expert `action`, and let time pass until the next one arrives.

        The draws depend on `key` alone, not on the action, so two policies under the same keys meet the same
        requests at the same times, and the same outages. If requests are retried, not every step is an arrival: give
        the same key as long as `state.step` is the same.

        Returns:
            Observation and state at the next arrival, the reward, terminated (False), truncated, and `info`: per slot
            (slot, expert) what ended in this step (`ended`, `request`, `qos`, `quality`, `in_time`, `ttft`, `latency`,
            `output_tokens`, `limits`, `preemptions`; times as the router sees them) and what was `lost`, whether this
            step's request was `rejected`, `overflowed` or `declined`, per expert `busy_seconds` and `kv_token_seconds`,
            the `gap` in s, and the totals `qos_sum`, `num_completed`, `num_late`, `num_lost`. With a cloud, `cloud` is
            its answer (`CloudAnswer`), which counts in the totals of the step that asks for it. With a horizon,
            `final_observation` is the observation before the automatic reset.

        Raises:
            UserError: `action` is not one whole number or, outside of `jit`, names no expert and is not away. In
                compiled code, that is a request that is rejected.
        """
        obs, state, reward, info = self._step(key, state, _action_number(action, self.num_actions), params)
        terminated = jnp.bool_(False)
        if not self.horizon:
            return obs, state, reward, terminated, jnp.bool_(False), info
        truncated = state.step >= self.horizon
        info["final_observation"] = obs
        fresh = self.reset(jax.random.fold_in(key, 1), params)
        obs, state = jax.tree.map(lambda new, old: jnp.where(truncated, new, old), fresh, (obs, state))
        return obs, state, reward, terminated, truncated, info

    @partial(jax.jit, static_argnums=0)
    def _step(
        self, key: PRNGKeyArray, state: EnvState, action: Int[Array, ""], params: EnvParams
    ) -> tuple[Observation, EnvState, Float[Array, ""], dict[str, Any]]:
        request, retries, fleet = state.request, state.retries, state.fleet
        key_gap, key_request, key_rate = jax.random.split(key, 3)
        rate = state.rate
        if self.redraw_every:
            rate = jnp.where((state.step + 1) % self.redraw_every == 0, _draw_rate(key_rate, params, fleet), rate)
        gap, arrivals = self.arrival_process(key_gap, state.arrivals, params.arrivals)
        gap = gap / rate
        recent = remember_gap(state.recent, gap)
        if retries is not None:
            # Requests that were given back are routed one after the other at the moment of the failure, before the one
            # that has just arrived: no time passes between them.
            passes = request.age == 0
            arrivals, rate, since_arrival = jax.tree.map(
                lambda new, old: jnp.where(passes, new, old),
                (arrivals, rate, gap),
                (state.arrivals, state.rate, retries.since_arrival),
            )
            gap = jnp.where(passes, gap, 0.0)
        failed, up = jnp.zeros_like(state.up), state.up
        if self.outages != "none":
            failed, up = _outages(jax.random.fold_in(key, 3), up, gap, params, fleet)

        served = _serve(site_of(state, params), state, failed, action, gap)
        sent_away = (action == self.num_experts) & self.away
        info = served.info | {"gap": gap, "declined": sent_away, "rejected": served.info["rejected"] & ~sent_away}
        earned, spent, cloud = served.expected_qos, jnp.float32(0.0), state.cloud
        if cloud is not None:
            assert params.cloud is not None
            answer = ask(jax.random.fold_in(key, 5), params.cloud, cloud, request, state.prices, sent_away)
            cloud = let_time_pass(cloud, answer, request.age, gap)
            info |= _with_cloud(info, answer)
            earned, spent = earned + answer.expected_qos, answer.spent
        retries = served.retries
        step = state.step + 1
        next_request = _draw_request(key_request, step, request.quality_floor, params, fleet)
        sessions = state.sessions
        if sessions is not None:
            assert request.text is not None
            tokens = request.prompt_tokens + request.output_tokens[jnp.minimum(action, self.num_experts - 1)]
            texts = with_turn(sessions.texts, request.text, request.number, tokens, served.accepted)
            sessions = sessions._replace(texts=texts)
        next_request, sessions = self._with_text(key_request, next_request, sessions, served.site, params)
        fade = jnp.exp(-gap / LATENCY_WINDOW)
        gateways = state.gateways
        if gateways is not None:
            next_request = _at_any(next_request, key_request, gateways)
            assert served.table.gateway is not None
            gateways = remember_answers(let_pass(gateways, gap), served.table.gateway, info, fade)
            before, gateways = gateways, _with_arrival(gateways, next_request, gap)
        if retries is not None:
            again = retries.marked.any()
            retries, given_back = _take_first(retries, served.table, request.quality_floor, params, fleet)
            # An arrival counts once it is the request to be routed.
            step, next_request, recent, gateways = jax.tree.map(
                lambda old, new: jnp.where(again, old, new),
                (state.step, given_back, state.recent, None if gateways is None else before),
                (step, next_request, remember_gap(state.recent, since_arrival), gateways),
            )
            retries, recent = retries._replace(since_arrival=since_arrival), recent._replace(latest_gap=gap)

        new = EnvState(
            site=served.site,
            table=served.table,
            up=up,
            request=next_request,
            arrivals=arrivals,
            rate=rate,
            step=step,
            recent=recent,
            prices=state.prices,
            served=_remember_served(state.served, request.limits, params, served=~info["declined"]),
            cloud=cloud,
            latency_sum=state.latency_sum * fade + served.latency_sum,
            latency_count=state.latency_count * fade + served.num_ended,
            potential=state.potential,
            fleet=fleet,
            retries=retries,
            seen=state.seen,
            refresh_interval=state.refresh_interval,
            gateways=gateways,
            sessions=sessions,
        )
        obs, new = self._observe(new, params, gap)

        earned = earned if self.expected_quality else info["qos_sum"]
        spent += state.prices.accelerator * info["busy_seconds"].sum()
        return obs, new, _reward(params, state.potential, new.potential, earned - spent), info

    @property
    def _shows_prefixes(self) -> bool:
        return self.cache is not None and self.see_prefixes

    def _with_text(
        self,
        key: PRNGKeyArray,
        request: Request,
        sessions: SessionState | None,
        site: SiteState,
        params: EnvParams,
    ) -> tuple[Request, SessionState | None]:
        """Let an arriving request continue its session's text."""
        if sessions is not None:
            assert params.sessions is not None
            sessions, text, prompt_tokens = next_turn(
                jax.random.fold_in(key, 2), sessions, params.sessions, site, request.number, request.prompt_tokens
            )
            return request._replace(text=text, prompt_tokens=prompt_tokens), sessions
        if self.cache is None:
            return request, None
        nobody, nothing = jnp.int32(NOBODY), jnp.int32(0)
        return request._replace(text=Text(nobody, nothing, jnp.bool_(False), nobody, nothing)), None

    def believing(self, before: EnvState, state: EnvState, params: EnvParams) -> tuple[Observation, EnvState]:
        """Return what a router sees after a step that believes other parameters: servers of another speed, say.

        Args:
            before: the state before the step.
            state: the state after it, with what is true.
            params: what the router believes.
        """
        recent = state.recent._replace(net=before.recent.net, net_square=before.recent.net_square)
        return self._observe(state._replace(recent=recent), params, jnp.float32(0.0))

    def _observe(self, state: EnvState, params: EnvParams, gap: Float[Array, ""]) -> tuple[Observation, EnvState]:
        """Return what the router sees, and the state that remembers it."""
        site = site_of(state, params)
        requests = _requests(site, state)
        if self._shows_prefixes:
            request = state.request
            assert request.text is not None
            cached = cached_tokens(state.site, request.text, request.number, request.prompt_tokens)
            state = state._replace(request=request._replace(cached_tokens=cached.astype(jnp.float32)))
        truth, known, shown, gateways = group(site, requests), None, state, state.gateways
        own = state.request.gateway
        if gateways is not None:
            assert own is not None
            assert state.table.gateway is not None
            owner = state.table.gateway.T
            gateways = poll(gateways, state.refresh_interval, requests, owner)
            one = of_gateway(gateways.known, own)
            known = with_others(site, group(site, own_requests(requests, owner == own)), one.others, one.typical)
            shown = state._replace(
                recent=one.recent, latency_sum=one.latency_sum, latency_count=one.latency_count, gateways=None
            )
        seen, potential, obs, net = _see(
            site,
            by_expert(params.bank.log_length_error, state.fleet),
            truth,
            known,
            shown._replace(site=None, table=None, retries=None),  # type: ignore[arg-type]
            gap,
        )
        if self.away:
            away = describe_away(params.cloud, state.cloud, state.request, state.prices)
            if params.class_floor is not None:
                away = away._replace(allowed=away.to_cloud | _may_be_declined(state, params))
            obs = obs._replace(away=away)
        recent = remember_net(shown.recent, net)
        if gateways is not None:
            assert own is not None
            obs = obs._replace(gauge_age=gateways.age)
            own_recent = at_gateway(gateways.known.recent, own, recent)
            gateways = gateways._replace(known=gateways.known._replace(recent=own_recent))
        return obs, state._replace(
            potential=potential, seen=seen if self.stale else None, recent=recent, gateways=gateways
        )


def remember_gap(recent: Recent, gap: Float[Array, ""]) -> Recent:
    """Add the time between the latest two arrivals."""
    return recent._replace(
        gap=recent.gap + (gap - recent.gap) / ARRIVAL_WINDOW,
        slow_gap=recent.slow_gap + (gap - recent.slow_gap) / SLOW_ARRIVAL_WINDOW,
        latest_gap=gap,
    )


def remember_net(recent: Recent, net: Float[Array, ""]) -> Recent:
    """Add the best net value that an expert offered to the latest request."""
    return recent._replace(
        net=recent.net + (net - recent.net) / ARRIVAL_WINDOW,
        net_square=recent.net_square + (net**2 - recent.net_square) / ARRIVAL_WINDOW,
    )


def _at_any(request: Request, key: PRNGKeyArray, gateways: Gateways) -> Request:
    """Let a request arrive at one of the gateways."""
    return request._replace(gateway=draw_gateway(jax.random.fold_in(key, 1), gateways))


def _with_arrival(gateways: Gateways, request: Request, gap: Float[Array, ""]) -> Gateways:
    """Let the gateway of a request that has just arrived remember it; `gap` s have passed since the decision before."""
    own = request.gateway
    assert own is not None
    # Each gets an equal part of all that arrive.
    between = of_gateway(gateways.known.since_arrival, own) / gateways.number
    recent = remember_gap(of_gateway(gateways.known.recent, own), between)._replace(latest_gap=gap)
    return remember_request(gateways, own, request.described(), recent)


def _with_cloud(info: dict[str, Any], answer: CloudAnswer) -> dict[str, Any]:
    """Return the step's info with the cloud's answer in its totals."""
    return {
        "cloud": answer,
        "declined": info["declined"] & ~answer.sent,
        "qos_sum": info["qos_sum"] + answer.qos,
        "num_completed": info["num_completed"] + answer.sent,
        "num_late": info["num_late"] + (answer.sent & ~answer.in_time),
    }


def _action_number(action: Int[Array, ""], num_actions: int) -> Int[Array, ""]:
    """Check an action; of a traced one, only its type and shape are known."""
    if not isinstance(action, jax.core.Tracer):
        return jnp.int32(whole("action", action, 0, num_actions - 1))
    if action.shape or not jnp.issubdtype(action.dtype, jnp.integer):
        raise UserError(f"action is {action.dtype}{list(action.shape)}; give the number of an action, one integer")
    return action


class _Served(NamedTuple):
    """What happened at the experts during a step."""

    site: SiteState
    """Without the requests that were lost."""
    accepted: Bool[Array, ""]
    table: SlotTable
    retries: Retries | None
    latency_sum: Float[Array, "expert"]
    """Sum of the normalised latencies of the requests that ended."""
    num_ended: Int[Array, "expert"]
    expected_qos: Float[Array, ""]
    """QoS of the requests that ended, with predicted quality."""
    info: dict[str, Any]


def _serve(
    site: Site, state: EnvState, failed: Bool[Array, "expert"], action: Int[Array, ""], gap: Float[Array, ""]
) -> _Served:
    """Send the request to the chosen expert, if it accepts it, and let `gap` s pass, after which experts may fail."""
    request, retries, up = state.request, state.retries, state.up
    prompt = jnp.broadcast_to(request.prompt_tokens, request.output_tokens.shape)
    welcome = (jnp.arange(up.shape[0]) == action) & up & can_accept(site, state.site, prompt, request.output_tokens)
    accepted = welcome & has_free_slot(state.site)
    entry = SlotTable(
        request.quality,
        request.predicted_quality,
        request.predicted_output_tokens,
        request.limits,
        request.gateway,
        request.cached_tokens,
    )
    again = None if retries is None else (retries.number, retries.row, retries.age)
    again_entry = None if retries is None else (request.number, request.row, request.age)
    experts, (table, again) = enqueue(
        state.site,
        accepted,
        request.number,
        prompt,
        request.output_tokens,
        tables=(state.table, again),
        entries=(entry, again_entry),
        text=request.text,
    )
    experts = advance(site, experts, gap)

    if retries is not None:
        number, row, age = again
        retries = retries._replace(number=number, row=row, age=age)
    retries, sums, per_slot = _outcomes(site, experts, slot_status(experts), table, retries, failed)
    num_ended, latency_sum, expected_qos, totals = sums
    info = jax.tree.map(jnp.transpose, per_slot) | {
        "rejected": ~welcome.any(),
        "overflowed": (welcome & ~accepted).any(),
        "busy_seconds": experts.busy_seconds,
        "kv_token_seconds": experts.kv_token_seconds,
        **totals,
    }
    return _Served(
        site=clear(experts, failed),
        accepted=accepted.any(),
        table=table,
        retries=retries,
        latency_sum=latency_sum,
        num_ended=num_ended,
        expected_qos=expected_qos,
        info=info,
    )


@lanes_last
def _outcomes(
    site: Site,
    experts: SiteState,
    status: Int[Array, "expert slot"],
    table: SlotTable,
    retries: Retries | None,
    failed: Bool[Array, "expert"],
) -> tuple[Retries | None, tuple[Array, Array, Array, dict[str, Array]], dict[str, Any]]:
    """Return what is to be retried, sums over what has ended, and what has become of each slot, `(expert, slot)`."""
    slots = experts.slots
    ended = status == SlotStatus.ENDED
    lost = failed[:, None] & (status == SlotStatus.ACTIVE)
    way_back = site.network_delay[:, None]
    if retries is not None:
        age = retries.age + (experts.since_epoch[:, None] - slots.arrival)
        way_back = way_back + retries.age
        retries = retries._replace(marked=retries.marked | lost, age=jnp.where(lost, age, retries.age))
        lost = jnp.zeros_like(lost)
    latency, ttft = slots.latency + way_back, slots.ttft + way_back
    measured = latencies(ttft, latency, slots.output_tokens)
    in_time = ended & table.limits.met(measured)
    qos = jnp.where(in_time, table.quality, 0.0)
    totals = {
        "qos_sum": _total(qos),
        "num_completed": _total(ended.astype(jnp.int32)),
        "num_late": _total((ended & ~in_time).astype(jnp.int32)),
        "num_lost": _total(lost.astype(jnp.int32)),
    }
    per_slot = {
        "ended": ended,
        "request": slots.request,
        "qos": qos,
        "quality": table.quality,
        "in_time": in_time,
        "ttft": ttft,
        "latency": latency,
        "output_tokens": slots.output_tokens,
        "limits": table.limits,
        "preemptions": slots.preemptions,
        "lost": lost,
    }
    sums = (
        _of_experts(ended.astype(jnp.int32)),
        _of_experts(jnp.where(ended, measured.normalised, 0.0)),
        _total(jnp.where(in_time, table.predicted_quality, 0.0)),
        totals,
    )
    return retries, sums, per_slot


def _of_experts(values: Shaped[Array, "expert slot"]) -> Shaped[Array, "expert"]:
    return fold(jnp.add, jnp.swapaxes(values, 0, 1))


def _total(values: Shaped[Array, "expert slot"]) -> Shaped[Array, ""]:
    return fold(jnp.add, values.reshape(-1, *values.shape[2:]))


def _reward(
    params: EnvParams, potential: Float[Array, ""], next_potential: Float[Array, ""], net_earned: Float[Array, ""]
) -> Float[Array, ""]:
    """Return the tailored reward: QoS of what ended, minus what was spent, plus the change of the potential.

    Phi(s') - Phi(s) telescopes, so the policy with the best average QoS stays the best. It moves the credit from the
    step in which a request ends to that in which it is routed, and to those in which its prospects change. With a
    discount before Phi(s'), as for discounted returns (Ng, Harada and Russell, 1999), an answer would be worth less the
    longer it takes, which is not true of QoS.
    """
    return net_earned + params.reward.shaping * (next_potential - potential)


def _draw_rate(key: PRNGKeyArray, params: EnvParams, fleet: Fleet | None) -> Float[Array, ""]:
    low, high = params.rate
    rate = jax.random.uniform(key, (), jnp.float32, minval=low, maxval=high)
    if fleet is None:
        return rate
    # In proportion to the capacity of the drawn site, so that the load stays in the requested range.
    return rate * (fleet.site.capacity * fleet.present).sum() / params.site.capacity.sum()


def _draw_terms(key: PRNGKeyArray, params: EnvParams) -> tuple[Prices, Float[Array, ""]]:
    """Draw what the operator of this environment pays, and the quality floor."""
    reward = params.reward
    bounds = jnp.stack([reward.accelerator_price, reward.cloud_price, reward.quality_floor], axis=1)
    accelerator, cloud, floor = _between(bounds, key)
    return Prices(accelerator, cloud), floor


def _between(bounds: Float[Array, "2 *values"], key: PRNGKeyArray) -> Float[Array, "*values"]:
    least, greatest = bounds
    return least + (greatest - least) * jax.random.uniform(key, least.shape, jnp.float32)


def _class_of(limits: Limits, params: EnvParams) -> Bool[Array, "class"]:
    """Return which class of service states these limits; all of them if several do."""
    return jnp.stack(
        [of_class == limit for limit, of_class in zip(limits, params.limits, strict=True) if limit is not None]
    ).all(0)


def _remember_served(
    before: Float[Array, "class"] | None, limits: Limits, params: EnvParams, *, served: Bool[Array, ""]
) -> Float[Array, "class"] | None:
    """Add to its class whether the latest request was served."""
    if before is None:
        return None
    return jnp.where(_class_of(limits, params), before + (served - before) / CLASS_WINDOW, before)


def _may_be_declined(state: EnvState, params: EnvParams) -> Bool[Array, ""]:
    """Whether the class of the arriving request keeps its floor if the request is declined."""
    assert state.served is not None
    assert params.class_floor is not None
    keeps = state.served * (1 - 1 / CLASS_WINDOW) >= params.class_floor
    return (keeps | ~_class_of(state.request.limits, params)).all()


def _draw_fleet(key: PRNGKeyArray, params: EnvParams, share: float) -> Fleet:
    """Draw a site with probability `share`: how many experts, and each one's LLM, speed, memory and distance."""
    key_own, key_count, key_column, key_time, key_memory, key_delay = jax.random.split(key, 6)
    num_experts = params.site.num_experts
    column = jax.random.randint(key_column, (num_experts,), 0, num_experts, jnp.int32)
    site = jax.tree.map(lambda values: values[column], params.site)
    slower = _log_uniform(key_time, _TIME_FACTORS, num_experts)
    kv_capacity = (site.kv_capacity * _log_uniform(key_memory, _MEMORY_FACTORS, num_experts)).astype(jnp.int32)
    site = site._replace(
        weight_load=site.weight_load * slower,
        compute_per_token=site.compute_per_token * slower,
        decode_per_seq=site.decode_per_seq * slower,
        attention_per_token=site.attention_per_token * slower,
        kv_capacity=jnp.maximum(kv_capacity, params.bank.prompt_tokens.max() + 1),
        network_delay=jax.random.uniform(
            key_delay, (num_experts,), jnp.float32, minval=_NETWORK_DELAYS[0], maxval=_NETWORK_DELAYS[1]
        ),
    )
    # All experts are drawn from one distribution, so it does not matter which of them are present.
    count = jax.random.randint(key_count, (), min(_FEWEST_EXPERTS, num_experts), num_experts + 1, jnp.int32)
    expert = jnp.arange(num_experts, dtype=jnp.int32)
    drawn = Fleet(site, column, present=expert < count)
    given = Fleet(params.site, column=expert, present=expert >= 0)
    own = jax.random.uniform(key_own, (), jnp.float32) < share
    return jax.tree.map(lambda drawn, given: jnp.where(own, drawn, given), drawn, given)


def _log_uniform(key: PRNGKeyArray, between: tuple[float, float], size: int) -> Float[Array, "expert"]:
    low, high = between
    return low * (high / low) ** jax.random.uniform(key, (size,), jnp.float32)


def site_of(state: EnvState, params: EnvParams) -> Site:
    """Return the site of this environment: its own, or that of the parameters."""
    return params.site if state.fleet is None else state.fleet.site


def by_expert(values: Float[Array, "expert"], fleet: Fleet | None) -> Float[Array, "expert"]:
    """Look up, for each expert, the value of the LLM that it serves."""
    return values if fleet is None else values[fleet.column]


def _outages(
    key: PRNGKeyArray, up: Bool[Array, "expert"], gap: Float[Array, ""], params: EnvParams, fleet: Fleet | None
) -> tuple[Bool[Array, "expert"], Bool[Array, "expert"]]:
    """Return which experts have failed within `gap`, and which are up after it."""
    draw = jax.random.uniform(key, up.shape, jnp.float32)
    failed = up & (draw < -jnp.expm1(-gap / params.outages.mean_uptime))
    recovered = ~up & (draw < -jnp.expm1(-gap / params.outages.mean_downtime))
    if fleet is not None:
        recovered &= fleet.present
    return failed, (up & ~failed) | recovered


def _draw_request(
    key: PRNGKeyArray, number: Int[Array, ""], quality_floor: Float[Array, ""], params: EnvParams, fleet: Fleet | None
) -> Request:
    # Two 32-bit numbers in one call, as random numbers take a good part of a step. The remainder favours no row by more
    # than one in 2^32 / rows.
    for_row, for_class = jax.random.bits(key, (2,), jnp.uint32)
    row = (for_row % params.bank.prompt_tokens.shape[0]).astype(jnp.int32)
    level = (for_class * jnp.float32(2**-32) >= jnp.cumsum(params.share)[:-1]).sum()
    limits = jax.tree.map(lambda of_class: of_class[level], params.limits)
    return _request(number, row, limits, jnp.float32(0.0), quality_floor, params, fleet)


def _take_first(
    retries: Retries, table: SlotTable, quality_floor: Float[Array, ""], params: EnvParams, fleet: Fleet | None
) -> tuple[Retries, Request]:
    """Take the first marked request, by expert and then by slot; if none is marked, any."""
    expert, slot = jnp.divmod(jnp.argmax(retries.marked), retries.marked.shape[1])
    number, row, age, limits, gateway = jax.tree.map(
        lambda column: column[expert, slot], (retries.number, retries.row, retries.age, table.limits, table.gateway)
    )
    marked = retries.marked.at[expert, slot].set(False)
    request = _request(number, row, limits, age, quality_floor, params, fleet)._replace(gateway=gateway)
    return retries._replace(marked=marked), request


def _request(
    number: Int[Array, ""],
    row: Int[Array, ""],
    limits: Limits,
    age: Float[Array, ""],
    quality_floor: Float[Array, ""],
    params: EnvParams,
    fleet: Fleet | None,
) -> Request:
    bank = params.bank
    predicted_quality = by_expert(_row(bank.predicted_quality, row), fleet)
    wanted = predicted_quality >= quality_floor
    return Request(
        number=number,
        row=row,
        age=age,
        prompt_tokens=bank.prompt_tokens[row],
        output_tokens=by_expert(_row(bank.output_tokens, row), fleet),
        quality=jnp.where(wanted, by_expert(_row(bank.quality, row), fleet), 0.0),
        predicted_quality=jnp.where(wanted, predicted_quality, 0.0),
        predicted_output_tokens=by_expert(_row(bank.predicted_output_tokens, row), fleet),
        limits=limits,
        local_only=jnp.bool_(False) if params.cloud is None else params.cloud.local_only[row],
        quality_floor=quality_floor,
        no_worse=jax.tree.map(lambda score: by_expert(_row(score, row), fleet), bank.no_worse),
    )


@lanes_last
def _row(table: Float[Array, "row expert"], row: Int[Array, ""]) -> Float[Array, "expert"]:
    # In the layout in which the result is read; the axes have length one where all environments share a table.
    return jnp.take_along_axis(table, row[None, None], axis=0)[0]


def observe(
    site: Site,
    log_error: Float[Array, "expert"],
    known: Snapshot,
    request: Described,
    recent: Recent,
    prices: Prices,
) -> Observation:
    """Lay out what a router knows of the experts and of the arriving request, for rules and networks to decide on.

    It needs no engine: a gateway that keeps track of its requests calls it just as the environment does. Axes behind
    the named ones are batch axes, as in `lanes_last`.

    Args:
        site: limits and profile of the experts.
        log_error: standard deviation of the log length around its prediction.
        known: what is known of the experts.
        request: the arriving request.
        recent: what is remembered of the requests before it.
        prices: what the operator pays.

    Returns:
        The observation, without `away`.
    """
    batch = known.batch
    outlook, load = assess(site, log_error, batch)
    impact = estimate_impact(site, log_error, batch, outlook, load, request)
    experts = Experts(
        num_running=load.num_active - load.num_waiting,
        num_waiting=load.num_waiting,
        max_num_seqs=site.max_num_seqs.astype(jnp.float32),
        max_waiting=site.max_waiting.astype(jnp.float32),
        kv_used=outlook.kv_used,
        kv_capacity=site.kv_capacity.astype(jnp.float32),
        pending_prefill=outlook.pending_prefill,
        pending_output=outlook.pending_output,
        iteration_time=outlook.iteration_time,
        weight_load=site.weight_load,
        compute_per_token=site.compute_per_token,
        network_delay=site.network_delay,
        recent_latency=known.recent_latency,
        expected_qos=outlook.expected_qos,
        up=known.up,
        # The router does not know the true length: that a request is too long for the memory shows only later.
        available=known.up & (load.num_waiting < site.max_waiting) & (request.prompt_tokens < site.kv_capacity),
    )
    active = batch.running | batch.waiting

    def per_expert(value: Array) -> Array:
        return jnp.swapaxes(jnp.where(active, value, 0.0), 0, 1)

    return Observation(
        arrival=Arrival(
            request.prompt_tokens, request.limits, 1 / recent.gap, request.age, recent, prices, request.session
        ),
        experts=experts,
        candidates=Candidates(
            request.predicted_quality,
            request.predicted_output_tokens,
            impact,
            request.no_worse,
            request.cached_tokens,
        ),
        in_flight=InFlight(
            weight=per_expert(load.weight),
            prompt_tokens=per_expert(batch.prompt_tokens),
            kv_tokens=per_expert(batch.computed),
            generated=per_expert(batch.generated),
            predicted_quality=per_expert(batch.predicted_quality),
            predicted_output_tokens=per_expert(batch.predicted_output_tokens),
            limits=jax.tree.map(per_expert, batch.limits),
            age=per_expert(batch.age),
            remaining_tokens=per_expert(outlook.remaining_tokens),
            in_time=per_expert(outlook.in_time),
        ),
        running=jnp.swapaxes(batch.running, 0, 1),
        waiting=jnp.swapaxes(batch.waiting, 0, 1),
        away=None,
    )


def _requests(site: Site, state: EnvState) -> Batch:
    """Return what a router can know of the requests at each expert, one by one."""
    experts, table = state.site, state.table
    running, waiting = running_and_waiting(experts)
    way_back = site.network_delay[:, None]
    age, first_token = ages(experts), experts.slots.ttft + way_back
    if state.retries is not None:
        age, first_token = age + state.retries.age, first_token + state.retries.age
    tokens = computed(experts)
    if table.cached_tokens is not None:
        # Those that wait will not compute what was cached when they were sent.
        tokens = jnp.where(waiting & (generated(experts) == 0), table.cached_tokens, tokens)
    by_expert = Batch(
        running=running,
        waiting=waiting,
        prompt_tokens=experts.slots.prompt_tokens.astype(jnp.float32),
        computed=tokens.astype(jnp.float32),
        generated=generated(experts).astype(jnp.float32),
        age=age,
        first_token=None if table.limits.ttft is None and table.limits.tpot is None else first_token,
        limits=table.limits,
        predicted_quality=table.predicted_quality,
        predicted_output_tokens=table.predicted_output_tokens,
    )
    return jax.tree.map(jnp.transpose, by_expert)


@lanes_last
def _see(
    site: Site,
    log_error: Float[Array, "expert"],
    truth: Batch,
    known: Batch | None,
    state: EnvState,
    gap: Float[Array, ""],
) -> tuple[Snapshot, Float[Array, ""], Observation, Float[Array, ""]]:
    """Return the latest look at the experts, the potential of their present state, the observation, and the best net.

    `gap` s have passed since the previous step. If the look in `state.seen` is younger than `state.refresh_interval`,
    it still counts; otherwise the router looks again. It sees `known`, or, if that is None, the requests as they are.
    No more is asked of the engine's state and its tables.
    """
    seen = state.seen
    recent_latency = state.latency_sum / jnp.maximum(state.latency_count, 1e-6)
    look = Snapshot(truth if known is None else known, recent_latency, state.up, age=jnp.zeros_like(gap))
    if seen is not None:
        old = seen._replace(age=seen.age + gap)
        again = seen.age + gap >= state.refresh_interval
        look = jax.tree.map(lambda new, old: jnp.where(again, new, old), look, old)
    obs = observe(site, log_error, look, state.request.described(), state.recent, state.prices)
    # The potential is that of the true state, which is what the router sees unless it knows less, or its look is old.
    exact = seen is None and known is None
    expected_qos = obs.experts.expected_qos if exact else assess(site, log_error, truth)[0].expected_qos
    return look, expected_qos.sum(0), obs, best_net(obs)


def best_net(obs: Observation) -> Float[Array, ""]:
    """Return the greatest net value that an expert offers to the arriving request; 0 if none could take it."""
    available = obs.experts.available
    return jnp.where(available, obs.candidates.impact.net, jnp.where(available.any(0), -jnp.inf, 0.0)).max(0)
