"""Actor-critic networks over the observation graph."""

from __future__ import annotations

from dataclasses import dataclass

import flax.linen as nn

from jaxroute.errors import UserError
from jaxroute.networks.han import HAN, INITIAL_LOG_TRUST
from jaxroute.networks.mlp import FlatMLP

__all__ = ["HAN", "INITIAL_LOG_TRUST", "FlatMLP", "NetworkConfig", "build_network"]


@dataclass
class NetworkConfig:
    """A network as written in configs/network."""

    kind: str = "han"
    """han (the graph network) or mlp (the flat ablation)."""
    hidden: int = 32
    """Width of the embeddings; a multiple of heads."""
    heads: int = 2
    """Attention heads; each gets an equal part of the width."""
    dense: bool = True
    """Compute on dense arrays, which is faster as all experts have the same number of slots; false uses jraph."""
    semantic_attention: bool = True
    """Weight the edge types by attention; false takes their mean."""
    use_impact: bool = True
    """Show the network the estimated impact of each choice and let it learn a correction; false hides the estimate."""

    def __post_init__(self) -> None:
        if self.kind not in ("han", "mlp"):
            raise UserError(f"network: kind={self.kind} is unknown; choose han or mlp")
        if self.hidden < 1 or self.heads < 1 or self.hidden % self.heads:
            raise UserError(f"network: hidden={self.hidden} must be a positive multiple of heads={self.heads}")


def build_network(config: NetworkConfig, away: bool = False, gauges: bool = False, prefixes: bool = False) -> nn.Module:
    """Return the network that the configuration describes.

    With `away`, it has a score for that too; with `gauges`, it sees how old those of the servers are; with `prefixes`,
    how much of the arriving prompt each expert has cached.
    """
    if config.kind == "mlp":
        return FlatMLP(hidden=config.hidden, away=away, gauges=gauges, prefixes=prefixes)
    return HAN(
        hidden=config.hidden,
        heads=config.heads,
        dense=config.dense,
        semantic_attention=config.semantic_attention,
        use_impact=config.use_impact,
        away=away,
        gauges=gauges,
        prefixes=prefixes,
    )
