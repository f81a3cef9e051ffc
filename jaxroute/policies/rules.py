"""Routing rules in production use and from the literature, each on the one protocol.

W waiting, R running requests; q predicted quality; n predicted output tokens; L the latency requirement. Predictions
of latency come from the action impact estimator (`jaxroute.env.impact`), the same for every rule.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int, PRNGKeyArray

from jaxroute.env.types import Observation
from jaxroute.policies.protocol import Memory, Params, Policy, best_available

Decision = tuple[Int[Array, ""], Memory]


def random(params: Params, obs: Observation, key: PRNGKeyArray, memory: Memory) -> Decision:
    """Choose uniformly (SGLang, LiteLLM simple-shuffle)."""
    return best_available(obs, jax.random.uniform(key, obs.experts.available.shape)), memory


def round_robin(params: Params, obs: Observation, key: PRNGKeyArray, memory: Memory) -> Decision:
    """Take the experts in turn (every load balancer); memory is whose turn it is."""
    num_experts = obs.experts.available.shape[0]
    turns_until = (jnp.arange(num_experts) - memory) % num_experts
    action = best_available(obs, -turns_until.astype(jnp.float32))
    return action, (action + 1) % num_experts


def shortest_queue(params: Params, obs: Observation, key: PRNGKeyArray, memory: Memory) -> Decision:
    """Argmin W + R (Vidur lor, LiteLLM least-busy, BLIS least-loaded)."""
    return best_available(obs, -(obs.experts.num_waiting + obs.experts.num_running)), memory


def shortest_expected_delay(params: Params, obs: Observation, key: PRNGKeyArray, memory: Memory) -> Decision:
    """Argmin TTFT + n TPOT, as predicted (Block)."""
    impact = obs.candidates.impact
    return best_available(obs, -(impact.ttft + obs.candidates.predicted_output_tokens * impact.tpot)), memory


def quality_only(params: Params, obs: Observation, key: PRNGKeyArray, memory: Memory) -> Decision:
    """Argmax q (RouteLLM, LLMRouter, GraphRouter)."""
    return best_available(obs, obs.candidates.predicted_quality), memory


def quality_threshold(params: Params, obs: Observation, key: PRNGKeyArray, memory: Memory) -> Decision:
    """Take the fastest LLM that is good enough: q >= q_best - t (Hybrid LLM, arXiv 2404.14618, for many models).

    Hybrid LLM sends a query to the small model if the predicted chance that it is no worse than the large one by
    more than t is high; with calibrated predictions of quality that is a threshold on the predicted gap. `params` is
    t; an expert's size is the time to stream its weights.
    """
    quality = obs.candidates.predicted_quality
    good_enough = quality >= quality.max() - params
    return best_available(obs, jnp.where(good_enough, 1.0, -1.0) - obs.experts.weight_load), memory


def lowest_latency(params: Params, obs: Observation, key: PRNGKeyArray, memory: Memory) -> Decision:
    """Choose at random among the experts within 1.1 times the lowest recent latency (LiteLLM latency-based).

    Latency is the mean of seconds per output token of what completed there; unknown counts as 0.
    """
    recent = jnp.where(obs.experts.available, obs.experts.recent_latency, jnp.inf)
    close = recent <= 1.1 * recent.min()
    return best_available(obs, jnp.where(close, jax.random.uniform(key, close.shape), -1.0)), memory


def weighted_sum(params: Params, obs: Observation, key: PRNGKeyArray, memory: Memory) -> Decision:
    """Argmax q - w (predicted latency / L) among the experts predicted to meet L (RouteBalance, arXiv 2606.17949).

    If none is predicted to meet L, all are candidates. `params` is w.
    """
    relative = obs.candidates.impact.normalised_latency / obs.arrival.latency_requirement
    score = obs.candidates.predicted_quality - params * relative
    meets = (relative <= 1.0) & obs.experts.available
    return best_available(obs, jnp.where(meets | ~meets.any(), score, score - 1e3)), memory


def qos_greedy(params: Params, obs: Observation, key: PRNGKeyArray, memory: Memory) -> Decision:
    """Argmax q Pr[predicted normalised latency <= L]: the best for this request."""
    return best_available(obs, obs.candidates.impact.qos), memory


def impact_greedy(params: Params, obs: Observation, key: PRNGKeyArray, memory: Memory) -> Decision:
    """Argmax own expected QoS - expected QoS lost by the requests in flight there (the action impact estimator)."""
    return best_available(obs, obs.candidates.impact.qos - obs.candidates.impact.qos_loss), memory


# Tuned on the training workload by `python -m benchmarks.tune_rules`; see docs/policies.md.
QUALITY_GAP = 0.2
LATENCY_WEIGHT = 0.2

RULES: dict[str, Policy] = {
    policy.name: policy
    for policy in (
        Policy("random", random),
        Policy("round_robin", round_robin, memory=jnp.int32(0)),
        Policy("shortest_queue", shortest_queue),
        Policy("shortest_expected_delay", shortest_expected_delay),
        Policy("quality_only", quality_only),
        Policy("quality_threshold", quality_threshold, params=QUALITY_GAP),
        Policy("lowest_latency", lowest_latency),
        Policy("weighted_sum", weighted_sum, params=LATENCY_WEIGHT),
        Policy("qos_greedy", qos_greedy),
        Policy("impact_greedy", impact_greedy),
    )
}
