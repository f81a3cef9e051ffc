"""Heterogeneous graph attention (HAN; Wang et al., WWW 2019) as actor and critic.

Type-specific projections, multi-head attention over the neighbours of each edge type, then attention over edge
types, give every expert an embedding; the arriving request attends over the experts for the critic and for the
context of each score. No parameter depends on the number of experts or slots.

Two formulations share these parameters. `segment` follows jraph's segment operations edge by edge. `dense` uses that
every expert has the same number of slots, and that the projection is linear: it attends over raw features and
projects the result, N x heads projections instead of N x slots.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp
import jraph
from jaxtyping import Array, Bool, Float

from jaxroute.env.types import Observation
from jaxroute.networks.features import Features, features_of
from jaxroute.networks.graph import EXPERT_TO_ARRIVAL, RUNNING_TO_EXPERT, WAITING_TO_EXPERT, as_graphs

# Attention weight of the estimator in the first policy: exp(4.5) = 90, nearly greedy in it.
INITIAL_LOG_TRUST = 4.5
_MASKED = -1e9


class NeighbourAttention(nn.Module):
    """Node-level attention of the experts over their requests, separately for each type of request.

    For expert i, neighbour j and head h: e_ij = LeakyReLU(a_h . [W x_i || W' x_j]), alpha = softmax_j(e), and the
    output is the concatenation over heads of sum_j alpha_ij W' x_j; zero for an expert without neighbours. Each type
    has its own W, W' and a. A neighbour that stands for w requests counts w times, which is log w more in e_ij.
    """

    heads: int
    head_size: int

    @nn.compact
    def __call__(
        self,
        experts: Float[Array, "expert hidden"],
        requests: Float[Array, "expert slot feature"],
        weight: Float[Array, "expert slot"],
        masks: Bool[Array, "type expert slot"],
        graphs: Sequence[jraph.GraphsTuple],
    ) -> list[Float[Array, "expert hidden"]]:
        """Attend densely, or along the edges of `graphs` if they are given, one per type."""
        num_types = masks.shape[0]
        log_weight = jnp.log(jnp.maximum(weight, 1.0))
        weights_shape = (num_types, requests.shape[-1], self.heads, self.head_size)
        project = self.param("project", nn.initializers.lecun_normal(1, (2, 3), batch_axis=0), weights_shape)
        of_request = self.param("of_request", nn.initializers.normal(0.1), (num_types, self.heads, self.head_size))
        of_expert = nn.DenseGeneral((num_types, self.heads), use_bias=False, name="of_expert")(experts)
        if graphs:
            return [
                self._by_segments(graph, log_weight.reshape(-1), project[i], of_request[i], of_expert[:, i])
                for i, graph in enumerate(graphs)
            ]
        # One matrix product for all types and heads, with slots last for the softmax: on a CPU, 3 times as fast as one
        # product per type with heads last.
        by_feature = jnp.einsum("tfhd,thd->fth", project, of_request)
        logits = jnp.moveaxis(jnp.tensordot(requests, by_feature, 1), 1, -1) + of_expert[..., None]
        mask = jnp.moveaxis(masks, 0, 1)[:, :, None]
        logits = nn.leaky_relu(logits, 0.2) + log_weight[:, None, None]
        weights = jax.nn.softmax(jnp.where(mask, logits, _MASKED), axis=-1) * mask
        num_experts, num_slots = masks.shape[1:]
        attended = jnp.matmul(weights.reshape(num_experts, -1, num_slots), requests)
        attended = attended.reshape(num_experts, num_types, -1)
        # Each head has its own projection: a block of one plain matrix.
        blocks = jnp.einsum("tfhd,hg->thfgd", project, jnp.eye(self.heads))
        blocks = blocks.reshape(num_types, attended.shape[-1], -1)
        return [attended[:, i] @ blocks[i] for i in range(num_types)]

    def _by_segments(
        self, graph: jraph.GraphsTuple, log_weight: Array, project: Array, of_request: Array, of_expert: Array
    ) -> Array:
        num_experts = of_expert.shape[0]
        mask = graph.edges["mask"][:, None]
        projected = jnp.einsum("ef,fhd->ehd", graph.nodes["senders"], project)[graph.senders]
        logits = (projected * of_request).sum(-1) + of_expert[graph.receivers]
        logits = nn.leaky_relu(logits, 0.2) + log_weight[graph.senders, None]
        logits = jnp.where(mask, logits, _MASKED)
        weights = jraph.segment_softmax(logits, graph.receivers, num_segments=num_experts) * mask
        messages = weights[..., None] * projected
        return jraph.segment_sum(messages, graph.receivers, num_segments=num_experts).reshape(num_experts, -1)


class SemanticAttention(nn.Module):
    """Attention over edge types: beta = softmax over types of mean_i q . tanh(W z_i + b), i an expert that is up."""

    hidden: int

    @nn.compact
    def __call__(
        self, by_type: list[Float[Array, "expert hidden"]], up: Bool[Array, "expert"]
    ) -> Float[Array, "expert hidden"]:
        """Return the weighted sum over types."""
        project = nn.Dense(self.hidden)
        # q . is linear, so the mean over experts comes first.
        means = jnp.stack([_mean(jnp.tanh(project(embedding)), up) for embedding in by_type])
        weights = jax.nn.softmax(nn.Dense(1, use_bias=False)(means)[:, 0])
        return jnp.asarray(sum(weights[i] * embedding for i, embedding in enumerate(by_type)))


class HAN(nn.Module):
    """Actor and critic over the heterogeneous graph."""

    hidden: int = 32
    heads: int = 2
    dense: bool = True
    """The dense formulation; False takes jraph's segment operations. Same parameters, same result."""
    semantic_attention: bool = True
    """False averages over edge types (an ablation)."""
    use_impact: bool = True
    """False hides the action impact estimator, the residual term included (an ablation)."""
    away: bool = False
    """Score away too, where the environment has it: a logit that is the price of a seat, given all that is known."""
    gauges: bool = False
    """See how old the servers' gauges are."""
    prefixes: bool = False
    """See how much of the arriving prompt each expert has cached."""

    def prepare(self, obs: Observation) -> Features:
        """Return the input of the network; this has no parameters, so a learner computes it once per step."""
        return features_of(obs, self.use_impact, self.gauges, self.prefixes)

    @nn.compact
    def __call__(self, features: Features) -> tuple[Float[Array, "action"], Float[Array, ""]]:
        """Return the logits of the experts, ineligible ones masked, perhaps that of away, and the value."""
        experts = nn.Dense(self.hidden, name="expert")(features.experts)
        by_type = [
            experts,
            nn.Dense(self.hidden, name="arrival")(features.arrival)
            + nn.Dense(self.hidden, use_bias=False, name="candidate")(features.candidates),
        ]
        graphs = {} if self.dense else as_graphs(features)
        of_requests = NeighbourAttention(self.heads, self.hidden // self.heads, name="requests")(
            experts,
            features.in_flight,
            features.weight,
            jnp.stack([features.running, features.waiting]),
            [graphs[RUNNING_TO_EXPERT], graphs[WAITING_TO_EXPERT]] if graphs else [],
        )
        by_type = [jnp.tanh(embedding) for embedding in [*by_type, *of_requests]]
        if self.semantic_attention:
            embedding = SemanticAttention(self.hidden, name="semantic")(by_type, features.up)
        else:
            embedding = jnp.stack(by_type).mean(0)
        return _heads(self, features, embedding, by_type[1], graphs.get(EXPERT_TO_ARRIVAL))


def _heads(
    module: HAN,
    features: Features,
    embedding: Float[Array, "expert hidden"],
    candidates: Float[Array, "expert hidden"],
    graph: jraph.GraphsTuple | None,
) -> tuple[Float[Array, "action"], Float[Array, ""]]:
    """Score each expert with a shared head; pool those that are up by attention for the context and the value."""
    hidden, up = module.hidden, features.up
    attention = jnp.where(up[:, None], nn.Dense(module.heads, name="pool")(embedding), _MASKED)
    values = embedding.reshape(-1, module.heads, hidden // module.heads)
    if graph is None:
        weights = jax.nn.softmax(attention, axis=0) * up[:, None]
        attended = (weights[..., None] * values).sum(0)
    else:
        weights = jraph.segment_softmax(attention[graph.senders], graph.receivers, num_segments=1)
        weights = weights * graph.edges["mask"][:, None]
        attended = jraph.segment_sum(weights[..., None] * values[graph.senders], graph.receivers, num_segments=1)
    pooled = jnp.concatenate([attended.reshape(-1), _mean(embedding, up)])
    context = nn.Dense(hidden, name="context")(pooled)
    score = jnp.tanh(
        nn.Dense(hidden, name="score_embedding")(embedding)
        + nn.Dense(hidden, use_bias=False, name="score_candidate")(candidates)
        + context
    )
    score = jnp.tanh(nn.Dense(hidden, name="score_hidden")(score))
    logits = _last_layer("score")(score)[..., 0]
    trust = _trust(module)
    logits = mask_ineligible(logits + trust * features.expected_gain, features.eligible)
    if module.away and features.away is not None:
        assert features.away_gain is not None
        assert features.may_go_away is not None
        best = jnp.where(features.eligible[:, None], candidates, -1.0).max(0)
        gain = jnp.where(features.eligible, jnp.clip(features.expected_gain, -4.0, 1.0), -4.0).max(keepdims=True)
        of_away = jnp.concatenate([features.away, features.arrival, best, gain])
        score = jnp.tanh(nn.Dense(hidden, name="away")(of_away) + context)
        score = jnp.tanh(nn.Dense(hidden, name="away_hidden")(score))
        logit = _last_layer("away_score")(score)[..., 0] + trust * features.away_gain
        logits = jnp.append(logits, mask_ineligible(logit, features.may_go_away))
    value = jnp.tanh(nn.Dense(hidden, name="value_hidden")(context))
    return logits, _last_layer("value")(value)[..., 0]


def _trust(module: HAN) -> Array | float:
    """Weight of the estimator in the logits; none if it is hidden."""
    if not module.use_impact:
        return 0.0
    return jnp.exp(module.param("log_trust", nn.initializers.constant(INITIAL_LOG_TRUST), ()))


def _last_layer(name: str) -> Callable[[Array], Array]:
    """A small last layer: the first policy is the estimator's, the first value near zero."""
    return nn.Dense(1, kernel_init=nn.initializers.orthogonal(0.01), name=name)


def _mean(embedding: Float[Array, "expert hidden"], up: Bool[Array, "expert"]) -> Float[Array, "hidden"]:
    """Mean over the experts that are up; zero if none is."""
    return (embedding * up[:, None]).sum(0) / jnp.maximum(up.sum(), 1)


def mask_ineligible(logits: Float[Array, "*actions"], eligible: Bool[Array, "*actions"]) -> Float[Array, "*actions"]:
    """Rule out the experts that would visibly reject the request, unless all would, and away where it may not go."""
    return jnp.where(eligible, logits, _MASKED)
