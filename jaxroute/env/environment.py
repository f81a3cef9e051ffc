"""The edge site as a reinforcement-learning environment: one step routes one arriving request.

The protocol is gymnax 1.x's: `reset(key, params) -> obs, state` and `step(key, state, action, params) -> obs, state,
reward, terminated, truncated, info`, pure functions to jit and vmap. The task is continuing: `terminated` is always
False, and `truncated` marks the horizon, if one is set.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from jaxroute.env.impact import Batch, Outlook, assess, estimate_impact
from jaxroute.env.types import (
    Arrival,
    Candidates,
    EnvParams,
    EnvState,
    Experts,
    InFlight,
    Observation,
    Request,
    SlotTable,
)
from jaxroute.serving import SlotStatus, advance, can_accept, enqueue, idle_site, running_and_waiting
from jaxroute.workloads.arrivals import ArrivalProcess, first_arrival_state

# The recent arrival rate is an exponential mean over this many gaps, the recent latency over this time.
_ARRIVAL_WINDOW = 32.0
_LATENCY_WINDOW = 60.0


@dataclass(frozen=True)
class EdgeRouting:
    """Route requests among the experts of one edge site; hashable, as everything here is static."""

    num_experts: int
    num_slots: int
    """Requests that an expert can hold, running and waiting."""
    arrival_process: ArrivalProcess
    redraw_every: int = 0
    """Draw a new request rate every so many steps; 0 keeps the first."""
    horizon: int = 0
    """Truncate and start over after so many steps; 0 never does, and compiles no reset into `step`."""
    expected_quality: bool = True
    """Reward the predicted quality instead of the drawn outcome; the metrics always count the outcome."""

    @property
    def num_actions(self) -> int:
        """One action per expert."""
        return self.num_experts

    def reset(self, key: PRNGKeyArray, params: EnvParams) -> tuple[Observation, EnvState]:
        """Start with an idle site and its first request."""
        key_rate, key_start, key_request = jax.random.split(key, 3)
        state_shape = (self.num_slots, self.num_experts)
        rate = _draw_rate(key_rate, params)
        zeros = jnp.zeros(self.num_experts, jnp.float32)
        state = EnvState(
            site=idle_site(self.num_experts, self.num_slots),
            table=SlotTable(*(jnp.zeros(state_shape, jnp.float32) for _ in SlotTable._fields)),
            request=_draw_request(key_request, params),
            arrivals=first_arrival_state(key_start, params.arrivals),
            rate=rate,
            step=jnp.int32(0),
            mean_gap=1 / rate,
            latency_sum=zeros,
            latency_count=zeros,
            potential=jnp.float32(0.0),
        )
        obs, _ = _observe(state, params)
        return obs, state

    def step(
        self, key: PRNGKeyArray, state: EnvState, action: Int[Array, ""], params: EnvParams
    ) -> tuple[Observation, EnvState, Float[Array, ""], Bool[Array, ""], Bool[Array, ""], dict[str, Any]]:
        """Route the request to expert `action`, and let time pass until the next one arrives.

        The draws depend on `key` alone, not on the action, so two policies under the same keys meet the same
        requests at the same times.

        Returns:
            Observation and state at the next arrival, the reward, terminated (False), truncated, and `info`:
            per slot (slot, expert) what ended in this step (`ended`, `request`, `qos`, `quality`, `in_time`, `ttft`,
            `latency`, `output_tokens`, `latency_requirement`, `preemptions`; times as the router sees them), whether
            this step's request was `rejected`, per expert `busy_seconds` and `kv_token_seconds`, the `gap` in s, and
            the totals `qos_sum`, `num_completed`, `num_late`. With a horizon, `final_observation` is the observation
            before the automatic reset.
        """
        obs, state, reward, info = self._step(key, state, action, params)
        terminated = jnp.bool_(False)
        if not self.horizon:
            return obs, state, reward, terminated, jnp.bool_(False), info
        truncated = state.step >= self.horizon
        info["final_observation"] = obs
        fresh = self.reset(jax.random.fold_in(key, 1), params)
        obs, state = jax.tree.map(lambda new, old: jnp.where(truncated, new, old), fresh, (obs, state))
        return obs, state, reward, terminated, truncated, info

    def _step(
        self, key: PRNGKeyArray, state: EnvState, action: Int[Array, ""], params: EnvParams
    ) -> tuple[Observation, EnvState, Float[Array, ""], dict[str, Any]]:
        site, request = params.site, state.request
        prompt = jnp.broadcast_to(request.prompt_tokens, request.output_tokens.shape)
        chosen = jnp.arange(self.num_experts) == action
        accepted = chosen & can_accept(site, state.site, prompt, request.output_tokens)
        site_state, placement = enqueue(site, state.site, accepted, state.step, prompt, request.output_tokens)
        table = SlotTable(
            quality=placement.put(state.table.quality, request.quality),
            predicted_quality=placement.put(state.table.predicted_quality, request.predicted_quality),
            predicted_output_tokens=placement.put(state.table.predicted_output_tokens, request.predicted_output_tokens),
            latency_requirement=placement.put(state.table.latency_requirement, request.latency_requirement),
        )
        rejected = ~accepted.any()

        key_gap, key_request, key_rate = jax.random.split(key, 3)
        rate = state.rate
        if self.redraw_every:
            rate = jnp.where((state.step + 1) % self.redraw_every == 0, _draw_rate(key_rate, params), rate)
        gap, arrivals = self.arrival_process(key_gap, state.arrivals, params.arrivals)
        gap = gap / rate
        site_state = advance(site, site_state, gap)

        slots = site_state.slots
        ended = slots.status == SlotStatus.ENDED
        latency = slots.latency + site.network_delay
        normalised = latency / jnp.maximum(slots.output_tokens, 1)
        in_time = ended & (normalised <= table.latency_requirement)
        qos = jnp.where(in_time, table.quality, 0.0)
        fade = jnp.exp(-gap / _LATENCY_WINDOW)
        new = EnvState(
            site=site_state,
            table=table,
            request=_draw_request(key_request, params),
            arrivals=arrivals,
            rate=rate,
            step=state.step + 1,
            mean_gap=state.mean_gap + (gap - state.mean_gap) / _ARRIVAL_WINDOW,
            latency_sum=state.latency_sum * fade + jnp.where(ended, normalised, 0.0).sum(0),
            latency_count=state.latency_count * fade + ended.sum(0),
            potential=state.potential,
        )
        obs, outlook = _observe(new, params)
        new = new._replace(potential=outlook.expected_qos.sum())

        info = {
            "ended": ended,
            "request": slots.request,
            "qos": qos,
            "quality": table.quality,
            "in_time": in_time,
            "ttft": slots.ttft + site.network_delay,
            "latency": latency,
            "output_tokens": slots.output_tokens,
            "latency_requirement": table.latency_requirement,
            "preemptions": slots.preemptions,
            "rejected": rejected,
            "busy_seconds": site_state.busy_seconds,
            "kv_token_seconds": site_state.kv_token_seconds,
            "gap": gap,
            "qos_sum": qos.sum(),
            "num_completed": ended.sum(),
            "num_late": (ended & ~in_time).sum(),
        }
        earned = jnp.where(in_time, table.predicted_quality, 0.0).sum() if self.expected_quality else info["qos_sum"]
        return obs, new, _reward(params, state.potential, new.potential, earned, info), info


def _reward(
    params: EnvParams,
    potential: Float[Array, ""],
    next_potential: Float[Array, ""],
    earned: Float[Array, ""],
    info: dict[str, Array],
) -> Float[Array, ""]:
    """Return the tailored reward: QoS that ended, penalties, and potential-based shaping.

    The shaping term gamma Phi(s') - Phi(s) leaves the optimal policy unchanged (Ng, Harada and Russell, 1999).
    """
    weights = params.reward
    shaping = weights.discount * next_potential - potential
    return (
        earned
        - weights.violation_penalty * info["num_late"]
        - weights.rejection_penalty * info["rejected"]
        + weights.shaping * shaping
    )


def _draw_rate(key: PRNGKeyArray, params: EnvParams) -> Float[Array, ""]:
    low, high = params.rate
    return jax.random.uniform(key, (), minval=low, maxval=high)


def _draw_request(key: PRNGKeyArray, params: EnvParams) -> Request:
    key_row, key_class = jax.random.split(key)
    bank = params.bank
    row = jax.random.randint(key_row, (), 0, bank.prompt_tokens.shape[0])
    level = (jax.random.uniform(key_class) >= jnp.cumsum(params.share)[:-1]).sum()
    return Request(
        prompt_tokens=bank.prompt_tokens[row],
        output_tokens=bank.output_tokens[row],
        quality=bank.quality[row],
        predicted_quality=bank.predicted_quality[row],
        predicted_output_tokens=bank.predicted_output_tokens[row],
        latency_requirement=params.requirement[level],
    )


def _observe(state: EnvState, params: EnvParams) -> tuple[Observation, Outlook]:
    site, slots, table, request = params.site, state.site.slots, state.table, state.request
    running, waiting = running_and_waiting(state.site)
    batch = Batch(
        running=running,
        waiting=waiting,
        prompt_tokens=slots.prompt_tokens.astype(jnp.float32),
        computed=slots.computed.astype(jnp.float32),
        generated=slots.generated.astype(jnp.float32),
        age=site.network_delay - slots.ready,
        latency_requirement=table.latency_requirement,
        predicted_quality=table.predicted_quality,
        predicted_output_tokens=table.predicted_output_tokens,
    )
    log_error = params.bank.log_length_error
    outlook, load = assess(site, batch, log_error)
    prompt_tokens = request.prompt_tokens.astype(jnp.float32)
    impact = estimate_impact(
        site,
        batch,
        outlook,
        load,
        log_error,
        prompt_tokens,
        request.latency_requirement,
        request.predicted_quality,
        request.predicted_output_tokens,
    )
    num_waiting = waiting.sum(0)
    experts = Experts(
        num_running=running.sum(0).astype(jnp.float32),
        num_waiting=num_waiting.astype(jnp.float32),
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
        recent_latency=state.latency_sum / jnp.maximum(state.latency_count, 1e-6),
        expected_qos=outlook.expected_qos,
        # The true length is unknown to the router, so that a request too long for the memory is found out late.
        available=(num_waiting < site.max_waiting) & (request.prompt_tokens < site.kv_capacity),
    )
    active = running | waiting

    def per_expert(value: Array) -> Array:
        return jnp.where(active, value, 0.0).T

    obs = Observation(
        arrival=Arrival(prompt_tokens, request.latency_requirement, 1 / state.mean_gap),
        experts=experts,
        candidates=Candidates(request.predicted_quality, request.predicted_output_tokens, impact),
        in_flight=InFlight(
            prompt_tokens=per_expert(batch.prompt_tokens),
            kv_tokens=per_expert(batch.computed),
            generated=per_expert(batch.generated),
            predicted_quality=per_expert(batch.predicted_quality),
            predicted_output_tokens=per_expert(batch.predicted_output_tokens),
            latency_requirement=per_expert(batch.latency_requirement),
            age=per_expert(batch.age),
            remaining_tokens=per_expert(outlook.remaining_tokens),
            in_time=per_expert(outlook.in_time),
        ),
        running=running.T,
        waiting=waiting.T,
    )
    return obs, outlook
