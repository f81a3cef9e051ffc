"""The flat ablation: a multilayer perceptron on each expert's aggregate features, for one number of experts."""

from __future__ import annotations

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxroute.env.types import Observation
from jaxroute.networks.features import Features, features_of
from jaxroute.networks.han import mask_ineligible


def flatten(features: Features) -> Float[Array, "feature"]:
    """Return the arriving request's features and each expert's, as one vector."""
    parts = [features.arrival, features.experts.reshape(-1), features.candidates.reshape(-1)]
    return jnp.concatenate(parts if features.away is None else [*parts, features.away], axis=-1)


class FlatMLP(nn.Module):
    """Actor and critic without graph, estimator or residual."""

    hidden: int = 64
    away: bool = False
    """Score away too, where the environment has it."""
    gauges: bool = False
    """See how old the servers' gauges are."""
    prefixes: bool = False
    """See how much of the arriving prompt each expert has cached."""

    def prepare(self, obs: Observation) -> Features:
        """Return the input of the network."""
        return features_of(obs, use_impact=False, gauges=self.gauges, prefixes=self.prefixes)

    @nn.compact
    def __call__(self, features: Features) -> tuple[Float[Array, "action"], Float[Array, ""]]:
        """Return the logits of the experts, ineligible ones masked, perhaps that of away, and the value."""
        hidden = flatten(features)
        for layer in range(2):
            hidden = jnp.tanh(nn.Dense(self.hidden, name=f"hidden_{layer}")(hidden))
        small = nn.initializers.orthogonal(0.01)
        num_experts = features.experts.shape[0]
        away = self.away and features.away is not None
        logits = nn.Dense(num_experts + away, kernel_init=small, name="logits")(hidden)
        value = nn.Dense(1, kernel_init=small, name="value")(hidden)[..., 0]
        of_experts = mask_ineligible(logits[:num_experts], features.eligible)
        if not away or features.may_go_away is None:
            return of_experts, value
        return jnp.append(of_experts, mask_ineligible(logits[num_experts], features.may_go_away)), value
