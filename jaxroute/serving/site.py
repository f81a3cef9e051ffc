"""An edge site: one LLM on one accelerator per expert."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Shaped

from jaxroute.errors import UserError
from jaxroute.serving.checks import real_array


class Site(NamedTuple):
    """The experts of one site; every array has the expert as its leading axis."""

    iteration_overhead: Float[Array, "expert"]
    """Scheduler and launch cost of one iteration, s."""
    weight_load: Float[Array, "expert"]
    """Time to stream the weights once, the memory-bound floor of an iteration, s."""
    compute_per_token: Float[Array, "expert"]
    """Compute time per scheduled token, s/token."""
    decode_per_seq: Float[Array, "expert"]
    """Extra cost per decoding sequence, s/sequence."""
    attention_per_token: Float[Array, "expert"]
    """KV read per context token of the decoding sequences, s/token."""
    max_num_seqs: Int[Array, "expert"]
    """Maximum requests in one batch."""
    max_num_batched_tokens: Int[Array, "expert"]
    """Maximum tokens scheduled in one iteration; at least `max_num_seqs`."""
    max_waiting: Int[Array, "expert"]
    """Maximum requests in the waiting queue; further arrivals are rejected. `UNBOUNDED` never rejects one for that."""
    kv_capacity: Int[Array, "expert"]
    """KV cache size, tokens."""
    network_delay: Float[Array, "expert"]
    """Network delay from router to expert, one way, s."""

    @property
    def num_experts(self) -> int:
        """Number of experts."""
        return np.shape(self.weight_load)[0]

    @property
    def capacity(self) -> Float[Array, "*lanes"]:
        """Tokens per second of a full batch whose time is bounded by streaming the weights."""
        return self.max_num_seqs / self.weight_load

    def iteration_time(
        self,
        num_tokens: Shaped[Array, "*lanes"],
        num_decoding: Shaped[Array, "*lanes"],
        context: Shaped[Array, "*lanes"],
    ) -> Float[Array, "*lanes"]:
        """Time of one iteration, s (docs/reference/semantics.md, step 4); of JAX arrays or of NumPy's, as the site is.

        Args:
            num_tokens: tokens that it schedules.
            num_decoding: sequences among them that decode.
            context: tokens that these sequences attend to.
        """
        xp = self.weight_load.__array_namespace__()
        return (
            self.iteration_overhead
            + xp.maximum(self.weight_load, self.compute_per_token * num_tokens)
            + self.decode_per_seq * num_decoding
            + self.attention_per_token * context
        )


# The smallest sensible value of each field. With a weight_load of zero, an iteration could take no time.
_MINIMUM: dict[str, float] = {
    "iteration_overhead": 0.0,
    "weight_load": 1e-9,
    "compute_per_token": 0.0,
    "decode_per_seq": 0.0,
    "attention_per_token": 0.0,
    "max_num_seqs": 1,
    "max_num_batched_tokens": 1,
    "max_waiting": 1,
    "kv_capacity": 2,
    "network_delay": 0.0,
}

# Limit of every count. The router sees tokens in float32, which is exact for whole numbers up to here.
MAX_COUNT = 2**24

# A queue that never ends, as vLLM's.
UNBOUNDED = MAX_COUNT


def check_site(site: Site, name: str = "site") -> Site:
    """Check a site on the host and return it as device arrays of the engine's types.

    Raises:
        UserError: a field has another length than the others, is not finite, or is out of range; a batch takes fewer
            tokens than sequences.
    """
    if not isinstance(site, Site):
        raise UserError(f"{name} is a {type(site).__name__}; give a jaxroute.Site, e.g. build_site(...) or params.site")
    checked = {}
    num_experts = real_array(f"{name}: iteration_overhead", site.iteration_overhead).size
    for field_name, given in site._asdict().items():
        values = real_array(f"{name}: {field_name}", given)
        if values.shape != (num_experts,):
            raise UserError(
                f"{name}: {field_name} has shape {values.shape}, but iteration_overhead lists {num_experts} "
                "expert(s); give every field one value per expert"
            )
        low = _MINIMUM[field_name]
        counts = isinstance(low, int)
        bad = ~(np.isfinite(values) & (values >= low) & (not counts or values <= MAX_COUNT))
        broken = counts & (values != np.round(values))
        if (bad | broken).any():
            expert = int(np.argmax(bad | broken))
            wanted = f"at least {low}" + (f", and at most {MAX_COUNT}" if counts else "")
            wanted = wanted if bad[expert] else "a whole number"
            raise UserError(f"{name}: {field_name} of expert {expert} is {values[expert]}; it must be {wanted}")
        checked[field_name] = jnp.asarray(values, jnp.int32 if counts else jnp.float32)
    few = np.asarray(checked["max_num_batched_tokens"] < checked["max_num_seqs"])
    if few.any():
        expert = int(np.argmax(few))
        tokens, seqs = (int(checked[limit][expert]) for limit in ("max_num_batched_tokens", "max_num_seqs"))
        raise UserError(
            f"{name}: max_num_batched_tokens of expert {expert} is {tokens}; it must be at least its max_num_seqs, "
            f"{seqs}, as vLLM demands: a token for each sequence"
        )
    return Site(**checked)


@dataclass
class ExpertConfig:
    """One expert as written in configs/site."""

    model: str
    """Name by which the request bank knows the LLM."""
    accelerator: str
    """What it runs on."""
    iteration_overhead: float
    """Scheduler and launch cost of one iteration, s."""
    weight_load: float
    """Time to stream the weights once, the memory-bound floor of an iteration, s."""
    compute_per_token: float
    """Compute time per scheduled token, s/token."""
    decode_per_seq: float
    """Extra cost per decoding sequence, s/sequence."""
    attention_per_token: float
    """KV read per context token of the decoding sequences, s/token."""
    max_num_seqs: int
    """Maximum requests in one batch."""
    max_num_batched_tokens: int
    """Maximum tokens scheduled in one iteration."""
    max_waiting: int | None
    """Maximum requests in the waiting queue; further arrivals are rejected. null: no bound, as in vLLM."""
    kv_capacity: int
    """KV cache size, tokens."""
    network_delay: float
    """Network delay from router to expert, one way, s."""

    @property
    def label(self) -> str:
        """How tables and figures name this expert."""
        return f"{self.model} / {self.accelerator}"


@dataclass
class CloudConfig:
    """An LLM elsewhere that takes requests at a price, as written in configs/site."""

    model: str
    """Name by which the request bank knows the LLM."""
    ttft: float
    """Median time to first token, s, network both ways included."""
    tpot: float
    """Median time per further token, s."""
    price_per_request: float
    """Price of a request, in QoS."""
    price_per_1000_tokens: float
    """Price of a thousand tokens of prompt and answer, in QoS."""
    ttft_spread: float = 0.3
    """Standard deviation of the logarithm of TTFT."""
    tpot_spread: float = 0.2
    """Standard deviation of the logarithm of the time per token."""
    slow_share: float = 0.0
    """Share of the answers that are slow."""
    slow_factor: float = 4.0
    """How many times as long a slow answer takes."""
    max_in_flight: int = 64
    """Maximum requests of this site that it has in flight; further ones are declined."""

    def __post_init__(self) -> None:
        for name in ("price_per_request", "price_per_1000_tokens", "ttft_spread", "tpot_spread"):
            if not 0 <= getattr(self, name) < float("inf"):
                raise UserError(f"site.cloud: {name}={getattr(self, name)} must not be negative, and finite")
        for name in ("ttft", "tpot"):
            if not 0 < getattr(self, name) < float("inf"):
                raise UserError(f"site.cloud: {name}={getattr(self, name)} must be above 0 s, and finite")
        if not 0 <= self.slow_share <= 1:
            raise UserError(f"site.cloud: slow_share={self.slow_share} is a share; it must lie between 0 and 1")
        if not 1 <= self.slow_factor < float("inf"):
            raise UserError(f"site.cloud: slow_factor={self.slow_factor} must be at least 1, and finite")
        if not 1 <= self.max_in_flight <= MAX_COUNT:
            raise UserError(f"site.cloud: max_in_flight={self.max_in_flight} must be from 1 to {MAX_COUNT}")


@dataclass
class SiteConfig:
    """A site as written in configs/site."""

    name: str
    """Name of the site in tables and file names."""
    experts: list[ExpertConfig] = field(default_factory=list)
    """The experts: one LLM on one accelerator each."""
    cloud: CloudConfig | None = None
    """Where requests go that are sent away; null declines them."""
    prefix_caching: bool = False
    """Whether its experts keep the beginnings of texts in their KV memory, as vLLM does by default; it then counts in
    blocks, else in tokens."""
    block_size: int = 16
    """Tokens per block of KV memory, where prefixes are cached."""

    def __post_init__(self) -> None:
        if not self.experts:
            raise UserError(f"site {self.name}: experts is empty; list at least one")
        if not 1 <= self.block_size <= MAX_COUNT:
            raise UserError(f"site {self.name}: block_size={self.block_size} must be from 1 to {MAX_COUNT}")

    @property
    def models(self) -> list[str]:
        """Each expert's model, the name by which a request bank knows it."""
        return [expert.model for expert in self.experts]


def build_site(config: SiteConfig) -> Site:
    """Turn a site's configuration into arrays.

    Raises:
        UserError: a value is out of range.
    """
    columns: dict[str, Any] = {
        name: np.asarray([getattr(expert, name) for expert in config.experts]) for name in Site._fields
    }
    waiting = [expert.max_waiting for expert in config.experts]
    columns["max_waiting"] = np.asarray([UNBOUNDED if most is None else most for most in waiting])
    return check_site(Site(**columns), name=f"site {config.name}")
