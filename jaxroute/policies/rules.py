"""Routing rules in production use and from the literature, each on the one protocol.

W waiting, R running requests; K fraction of KV memory in use; q predicted quality; n predicted output tokens; L the
limits on its latencies. Predictions of latency come from the action impact estimator (`jaxroute.env.impact`), the same
for every rule.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from jaxroute.env.types import Observation
from jaxroute.policies.protocol import Memory, Params, Policy, best_available

Decision = tuple[Int[Array, ""], Memory]

# The sources' defaults.
KV_BLOCK = 16  # tokens
EXPLORATION = 0.01  # of requests
MATCH_THRESHOLD, IMBALANCE, RELATIVE_IMBALANCE = 0.3, 64, 1.5
LEAST_MATCH = 0.1

# What slo_headroom prefers: the least or the most headroom.
LEAST, MOST = -1.0, 1.0


def _num_in_flight(obs: Observation) -> Float[Array, "expert"]:
    """W + R."""
    return obs.experts.num_waiting + obs.experts.num_running


def capacity(obs: Observation) -> Float[Array, "expert"]:
    """Tokens per second of a full batch as long as streaming the weights bounds it: `max_num_seqs` / `weight_load`."""
    return obs.experts.max_num_seqs / obs.experts.weight_load


def _relative_latency(obs: Observation) -> Float[Array, "expert"]:
    """Greatest ratio of a predicted latency to its limit; up to 1, the request is predicted to meet L."""
    return obs.candidates.impact.relative_latency


def _best_among(obs: Observation, preferred: Bool[Array, "expert"], score: Float[Array, "expert"]) -> Int[Array, ""]:
    """Return the best expert among the preferred ones that are available, or among all if none is."""
    preferred = preferred & obs.experts.available
    return best_available(obs, jnp.where(preferred | ~preferred.any(), score, -jnp.inf))


def random(params: Params, obs: Observation, key: PRNGKeyArray, memory: Memory) -> Decision:
    """Choose uniformly (SGLang, LiteLLM simple-shuffle)."""
    return best_available(obs, jax.random.uniform(key, obs.experts.available.shape, jnp.float32)), memory


def weighted_random(params: Params, obs: Observation, key: PRNGKeyArray, memory: Memory) -> Decision:
    """Choose in proportion to capacity (LiteLLM simple-shuffle with weights)."""
    weight = capacity(obs)
    # Of exponential clocks with these rates, each is the first with a probability in proportion to its rate.
    return best_available(obs, -jax.random.exponential(key, weight.shape, jnp.float32) / weight), memory


def round_robin(params: Params, obs: Observation, key: PRNGKeyArray, memory: Memory) -> Decision:
    """Take the experts in turn (every load balancer); memory is whose turn it is."""
    num_experts = obs.experts.available.shape[0]
    turns_until = (jnp.arange(num_experts) - memory) % num_experts
    action = best_available(obs, -turns_until.astype(jnp.float32))
    return action, (action + 1) % num_experts


def shortest_queue(params: Params, obs: Observation, key: PRNGKeyArray, memory: Memory) -> Decision:
    """Argmin W + R (Vidur lor, LiteLLM least-busy, BLIS least-loaded)."""
    return best_available(obs, -_num_in_flight(obs)), memory


def vllm_dp(params: Params, obs: Observation, key: PRNGKeyArray, memory: Memory) -> Decision:
    """Argmin 4 W + R (vLLM data-parallel balancer)."""
    return best_available(obs, -(4 * obs.experts.num_waiting + obs.experts.num_running)), memory


def least_kv(params: Params, obs: Observation, key: PRNGKeyArray, memory: Memory) -> Decision:
    """Argmin K, the fraction of KV memory in use (llm-d kv-cache-utilization scorer)."""
    return best_available(obs, -obs.experts.kv_used / obs.experts.kv_capacity), memory


def free_kv_per_request(params: Params, obs: Observation, key: PRNGKeyArray, memory: Memory) -> Decision:
    """Argmax free KV tokens / max(W + R, 1) (Llumnix)."""
    free = obs.experts.kv_capacity - obs.experts.kv_used
    return best_available(obs, free / jnp.maximum(_num_in_flight(obs), 1.0)), memory


def shortest_work(params: Params, obs: Observation, key: PRNGKeyArray, memory: Memory) -> Decision:
    """Argmin seconds of work at hand (splitwise token_jsq, with the expert's speed).

    Pending prefill takes `compute_per_token` each; pending output leaves in iterations of a token per running request.
    """
    experts = obs.experts
    # The batch that `iteration_time` is of: all who find a seat.
    batch = jnp.clip(_num_in_flight(obs), 1.0, experts.max_num_seqs)
    prefill = experts.pending_prefill * experts.compute_per_token
    return best_available(obs, -(prefill + experts.pending_output * experts.iteration_time / batch)), memory


def power_of_two(params: Params, obs: Observation, key: PRNGKeyArray, memory: Memory) -> Decision:
    """Draw two available experts and take the one with fewer pending tokens (SGLang)."""
    draw = jnp.where(obs.experts.available, jax.random.uniform(key, obs.experts.available.shape, jnp.float32), -1.0)
    two = draw >= jnp.sort(draw)[-2:].min()
    return _best_among(obs, two, -(obs.experts.pending_prefill + obs.experts.pending_output)), memory


def llm_d(params: Params, obs: Observation, key: PRNGKeyArray, memory: Memory) -> Decision:
    """Argmax queue score / 2 + KV score / 2 (llm-d endpoint picker).

    The queue score is (max - W) / (max - min) over the available experts, 1 if all have the same W; the KV score is
    1 - K.
    """
    kv_score = 1 - obs.experts.kv_used / obs.experts.kv_capacity
    return best_available(obs, 0.5 * _queue_score(obs) + 0.5 * kv_score), memory


def _queue_score(obs: Observation) -> Float[Array, "expert"]:
    waiting, available = obs.experts.num_waiting, obs.experts.available
    longest = jnp.where(available, waiting, -jnp.inf).max()
    spread = longest - jnp.where(available, waiting, jnp.inf).min()
    return jnp.where(spread > 0, (longest - waiting) / spread, 1.0)


def dynamo_kv(params: Params, obs: Observation, key: PRNGKeyArray, memory: Memory) -> Decision:
    """Argmin prefill blocks + decode blocks, of 16 tokens (NVIDIA Dynamo, whose overlap weight is 1).

    Prefill blocks, whole or not: what is pending there, and what of the arriving prompt is not cached there. Decode
    blocks: the KV memory in use.
    """
    prefill = (obs.experts.pending_prefill + obs.arrival.prompt_tokens - obs.candidates.known_cached) / KV_BLOCK
    return best_available(obs, -(prefill + jnp.ceil(obs.experts.kv_used / KV_BLOCK))), memory


def _match_rate(obs: Observation) -> Float[Array, "expert"]:
    """Share of the arriving prompt that each expert has cached."""
    return obs.candidates.known_cached / jnp.maximum(obs.arrival.prompt_tokens, 1.0)


def _longest_prefix(obs: Observation) -> Float[Array, "expert"]:
    """Score the experts by the cached prefix; of equal ones, the one with fewer requests is ahead."""
    load = _num_in_flight(obs)
    return _match_rate(obs) - load / (1 + load) * 1e-3


def llm_d_prefix(params: Params, obs: Observation, key: PRNGKeyArray, memory: Memory) -> Decision:
    """Argmax 3 prefix score + 2 queue score + 2 KV score (llm-d router's profile).

    The prefix score is the share of the prompt that is cached; the others are those of `llm_d`.
    """
    kv_score = 1 - obs.experts.kv_used / obs.experts.kv_capacity
    return best_available(obs, 3 * _match_rate(obs) + 2 * _queue_score(obs) + 2 * kv_score), memory


def sticky_until_saturated(params: Params, obs: Observation, key: PRNGKeyArray, memory: Memory) -> Decision:
    """Take the longest cached prefix until the prefill queue there is full, then the expert with least to prefill.

    llm-d's token-aware routing: load is counted in tokens that are to be prefilled, and an expert that has a limit of
    them in flight is saturated. `params` is that limit, in seconds of prefill, as experts differ in speed.
    """
    experts, cached = obs.experts, obs.candidates.known_cached
    seconds = (experts.pending_prefill + obs.arrival.prompt_tokens - cached) * experts.compute_per_token
    sticky = (experts.pending_prefill * experts.compute_per_token <= params) & (cached > 0) & experts.available
    # Equal prefixes go to the one with least to prefill.
    longest = cached - seconds / (1 + seconds)
    return best_available(obs, jnp.where(sticky.any(), jnp.where(sticky, longest, -jnp.inf), -seconds)), memory


def cache_aware(params: Params, obs: Observation, key: PRNGKeyArray, memory: Memory) -> Decision:
    """Take the longest cached prefix if it is more than 0.3 of the prompt, else fewest requests (SGLang, vLLM router).

    Where the busiest expert has more than 64 requests over the idlest and more than 1.5 times as many, load decides at
    once. Below the threshold of a match, the sources choose the expert with the smallest record of past prompts; here
    it is the one with the fewest requests.
    """
    load, available = _num_in_flight(obs), obs.experts.available
    most, least = jnp.where(available, load, -jnp.inf).max(), jnp.where(available, load, jnp.inf).min()
    balanced = (most - least <= IMBALANCE) | (most <= RELATIVE_IMBALANCE * least)
    rate = jnp.where(available, _match_rate(obs), 0.0)
    matched = balanced & (rate.max() > MATCH_THRESHOLD)
    return best_available(obs, jnp.where(matched, _longest_prefix(obs), -load)), memory


def prefix_affinity(params: Params, obs: Observation, key: PRNGKeyArray, memory: Memory) -> Decision:
    """Take the longest cached prefix if it is a tenth of the prompt or more, else the better of two (Ray Serve LLM)."""
    rate = jnp.where(obs.experts.available, _match_rate(obs), 0.0)
    two, _ = power_of_two(params, obs, key, memory)
    return jnp.where(rate.max() >= LEAST_MATCH, best_available(obs, _longest_prefix(obs)), two), memory


def session_hash(params: Params, obs: Observation, key: PRNGKeyArray, memory: Memory) -> Decision:
    """Send all requests of a session to one expert, by its number (consistent hashing; vLLM production stack).

    Rendezvous hashing: each expert has its own hash of the session, and the highest that is available wins. A request
    without a session goes anywhere.
    """
    expert = jnp.arange(obs.experts.available.shape[0], dtype=jnp.uint32)
    of_request = jax.random.bits(key, (), jnp.uint32)
    session = obs.arrival.session
    if session is not None:
        of_request = jnp.where(session < 0, of_request, session.astype(jnp.uint32))
    mixed = (of_request + 1) * jnp.uint32(0x9E3779B1) ^ (expert + 1) * jnp.uint32(0x85EBCA77)
    mixed = (mixed ^ (mixed >> 15)) * jnp.uint32(0x2C1B3C6D)
    mixed = (mixed ^ (mixed >> 12)) * jnp.uint32(0x297A2D39)
    return best_available(obs, ((mixed ^ (mixed >> 15)) >> 8).astype(jnp.float32)), memory


def shortest_expected_delay(params: Params, obs: Observation, key: PRNGKeyArray, memory: Memory) -> Decision:
    """Argmin TTFT + n TPOT, as predicted (Block)."""
    impact = obs.candidates.impact
    return best_available(obs, -(impact.ttft + obs.candidates.predicted_output_tokens * impact.tpot)), memory


def slo_headroom(params: Params, obs: Observation, key: PRNGKeyArray, memory: Memory) -> Decision:
    """Among the experts predicted to meet L, take the one closest to it, or furthest (llm-d predicted latency).

    `params` is `LEAST` for the closest, which keeps room on the others, or `MOST` for the furthest. If none is
    predicted to meet L, and for one request in a hundred even if some are, those that miss it compete: an idle one
    first, then the one that misses it least.
    """
    relative = _relative_latency(obs)
    meets = relative <= 1.0
    # 1 / relative is below 1 for those that miss L, so that no other comes before an idle one.
    missing = (_num_in_flight(obs) == 0) + 1 / relative
    explore = jax.random.uniform(key, (), jnp.float32) < EXPLORATION
    return _best_among(obs, meets ^ explore, jnp.where(meets, -params * relative, missing)), memory


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
    good_enough = quality >= jnp.where(obs.experts.eligible, quality, -jnp.inf).max() - params
    return _best_among(obs, good_enough, -obs.experts.weight_load), memory


def _hybrid(obs: Observation, name: str, threshold: Params) -> Int[Array, ""]:
    """Return the fastest LLM whose score exceeds the threshold; if none does, the one of the highest score.

    An expert's size is the time to stream its weights. Without a head's score, the predicted qualities give one.
    """
    scores = obs.candidates.no_worse
    score = _expected_no_worse(obs) if scores is None else getattr(scores, name)
    good_enough = (score > threshold) & obs.experts.eligible
    fastest = best_available(obs, jnp.where(good_enough, -obs.experts.weight_load, -jnp.inf))
    return jnp.where(good_enough.any(), fastest, best_available(obs, score))


def _expected_no_worse(obs: Observation) -> Float[Array, "expert"]:
    """Pr[an LLM's answer is no worse than that of the best LLM], if right answers are as likely as q and independent.

    The best LLM is compared with another answer of its own.
    """
    quality = obs.candidates.predicted_quality
    best = jnp.where(obs.experts.eligible, quality, -jnp.inf).max()
    return 1 - best * (1 - quality)


def hybrid_det(params: Params, obs: Observation, key: PRNGKeyArray, memory: Memory) -> Decision:
    """Take the fastest LLM of which r_det says that it is good enough (Hybrid LLM, arXiv 2404.14618).

    `params` is the threshold. Without a head's score (`bank.hybrid`) the predicted qualities give one, which is the
    same for all three rules: they differ in the labels of the heads.
    """
    return _hybrid(obs, "det", params), memory


def hybrid_prob(params: Params, obs: Observation, key: PRNGKeyArray, memory: Memory) -> Decision:
    """Take the fastest LLM of which r_prob says that it is good enough; as `hybrid_det` otherwise."""
    return _hybrid(obs, "prob", params), memory


def hybrid_trans(params: Params, obs: Observation, key: PRNGKeyArray, memory: Memory) -> Decision:
    """Take the fastest LLM of which r_trans says that it is good enough; as `hybrid_det` otherwise."""
    return _hybrid(obs, "trans", params), memory


def win_rate(params: Params, obs: Observation, key: PRNGKeyArray, memory: Memory) -> Decision:
    """Take the strong LLM if P(it wins) > alpha, else the weak one (RouteLLM).

    Of many, strong is the available one with the highest q, weak the fastest: least time to stream its weights. An
    answer is right or wrong, so strong wins with q_strong (1 - q_weak), and a tie goes to weak. `params` is alpha.
    """
    quality = obs.candidates.predicted_quality
    strong, weak = best_available(obs, quality), best_available(obs, -obs.experts.weight_load)
    wins = quality[strong] * (1 - quality[weak])
    return jnp.where(wins > params, strong, weak), memory


def lowest_latency(params: Params, obs: Observation, key: PRNGKeyArray, memory: Memory) -> Decision:
    """Choose at random among the experts within 1.1 times the lowest recent latency (LiteLLM latency-based).

    Latency is the mean of seconds per output token of what has completed there; if nothing has, it counts as 0.
    """
    recent = jnp.where(obs.experts.available, obs.experts.recent_latency, jnp.inf)
    close = recent <= 1.1 * recent.min()
    return best_available(obs, jnp.where(close, jax.random.uniform(key, close.shape, jnp.float32), -1.0)), memory


def weighted_sum(params: Params, obs: Observation, key: PRNGKeyArray, memory: Memory) -> Decision:
    """Argmax q - w (predicted latency / L) among the experts predicted to meet L (RouteBalance, arXiv 2606.17949).

    If none is predicted to meet L, all are candidates. `params` is w.
    """
    relative = _relative_latency(obs)
    return _best_among(obs, relative <= 1.0, obs.candidates.predicted_quality - params * relative), memory


def interference_aware(params: Params, obs: Observation, key: PRNGKeyArray, memory: Memory) -> Decision:
    """Argmin delta created + (1 - delta) received interference, each over its maximum, where L / latency >= theta.

    Interference-aware cooperative routing (arXiv 2201.01520) weighs the interference that a route creates and
    receives, under a floor on SINR. Created: by how much an iteration gets longer, relative to now, times the requests
    in flight. Received: by how much a token of the arriving request takes longer than if it were alone. Maxima are over
    the experts to choose from; if none has L / latency >= theta, all are candidates. `params` are delta and theta.
    """
    delta, theta = params
    impact = obs.candidates.impact
    created = _num_in_flight(obs) * (impact.tpot / obs.experts.iteration_time - 1)
    received = impact.tpot / impact.tpot_alone - 1
    cost = delta * _of_greatest(obs, created) + (1 - delta) * _of_greatest(obs, received)
    return _best_among(obs, theta * _relative_latency(obs) <= 1.0, -cost), memory


def _of_greatest(obs: Observation, value: Float[Array, "expert"]) -> Float[Array, "expert"]:
    """Divide by the maximum over the experts to choose from; nothing is changed where that is 0."""
    greatest = jnp.where(obs.experts.eligible, value, -jnp.inf).max()
    return value / jnp.where(greatest > 0, greatest, 1.0)


def qos_greedy(params: Params, obs: Observation, key: PRNGKeyArray, memory: Memory) -> Decision:
    """Argmax q Pr[in time]: the best for this request."""
    return best_available(obs, obs.candidates.impact.qos), memory


def impact_greedy(params: Params, obs: Observation, key: PRNGKeyArray, memory: Memory) -> Decision:
    """Argmax own expected QoS - expected QoS lost by the requests in flight there (the action impact estimator)."""
    return best_available(obs, obs.candidates.impact.net), memory


# Tuned on the training workload by `python -m benchmarks.tune_rules`; see docs/reference/policies.md.
QUALITY_GAP = 0.2
LATENCY_WEIGHT = 0.15
WIN_PROBABILITY = 0.55
NO_WORSE = 0.7
INTERFERENCE = (0.5, 1.0)  # delta, theta
HEADROOM = LEAST
# Not tuned: a tenth of a typical limit on the time to first token.
PREFILL_SECONDS = 0.2

RULES: dict[str, Policy] = {
    policy.name: policy
    for policy in (
        Policy("random", random),
        Policy("weighted_random", weighted_random),
        Policy("round_robin", round_robin, memory=np.int32(0)),
        Policy("shortest_queue", shortest_queue),
        Policy("vllm_dp", vllm_dp),
        Policy("least_kv", least_kv),
        Policy("free_kv_per_request", free_kv_per_request),
        Policy("shortest_work", shortest_work),
        Policy("power_of_two", power_of_two),
        Policy("llm_d", llm_d),
        Policy("dynamo_kv", dynamo_kv),
        Policy("llm_d_prefix", llm_d_prefix),
        Policy("sticky_until_saturated", sticky_until_saturated, params=PREFILL_SECONDS),
        Policy("cache_aware", cache_aware),
        Policy("prefix_affinity", prefix_affinity),
        Policy("session_hash", session_hash),
        Policy("shortest_expected_delay", shortest_expected_delay),
        Policy("slo_headroom", slo_headroom, params=HEADROOM),
        Policy("quality_only", quality_only),
        Policy("quality_threshold", quality_threshold, params=QUALITY_GAP),
        Policy("hybrid_det", hybrid_det, params=NO_WORSE),
        Policy("hybrid_prob", hybrid_prob, params=NO_WORSE),
        Policy("hybrid_trans", hybrid_trans, params=NO_WORSE),
        Policy("win_rate", win_rate, params=WIN_PROBABILITY),
        Policy("lowest_latency", lowest_latency),
        Policy("weighted_sum", weighted_sum, params=LATENCY_WEIGHT),
        Policy("interference_aware", interference_aware, params=INTERFERENCE),
        Policy("qos_greedy", qos_greedy),
        Policy("impact_greedy", impact_greedy),
    )
}

PREFIX_RULES = ("llm_d_prefix", "sticky_until_saturated", "cache_aware", "prefix_affinity", "session_hash")
"""Those that go by what is cached where, and are others under another name where nothing is."""
