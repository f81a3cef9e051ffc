"""The serving engine: experts that batch continuously, token for token as vLLM V1 schedules them.

The engine knows requests, iterations and KV memory, and nothing of routing or rewards. Newcomers read
`jaxroute.serving.reference` first: the same semantics, one iteration at a time.
"""

from jaxroute.serving.engine import (
    Placement,
    SiteState,
    SlotStatus,
    advance,
    can_accept,
    clear,
    enqueue,
    has_free_slot,
    idle_site,
    num_waiting,
    running_and_waiting,
    with_output_tokens,
)
from jaxroute.serving.lanes import fold, lanes_last, positions, running_sums
from jaxroute.serving.playback import Outcomes, Requests, replay
from jaxroute.serving.site import CloudConfig, ExpertConfig, Site, SiteConfig, build_site

__all__ = [
    "CloudConfig",
    "ExpertConfig",
    "Outcomes",
    "Placement",
    "Requests",
    "Site",
    "SiteConfig",
    "SiteState",
    "SlotStatus",
    "advance",
    "build_site",
    "can_accept",
    "clear",
    "enqueue",
    "fold",
    "has_free_slot",
    "idle_site",
    "lanes_last",
    "num_waiting",
    "positions",
    "replay",
    "running_and_waiting",
    "running_sums",
    "with_output_tokens",
]
