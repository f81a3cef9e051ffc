"""The serving engine: experts that batch continuously, token for token as vLLM V1 schedules them.

The engine knows requests, iterations and KV memory, and nothing of routing or rewards. Newcomers read
`jaxroute.serving.reference` first: the same semantics, one iteration at a time.
"""

from jaxroute.serving.engine import (
    SiteState,
    SlotStatus,
    advance,
    ages,
    cached_tokens,
    can_accept,
    clear,
    computed,
    enqueue,
    generated,
    has_free_slot,
    idle_site,
    running_and_waiting,
    slot_status,
    with_output_tokens,
)
from jaxroute.serving.lanes import fold, lanes_last, running_sums
from jaxroute.serving.playback import Outcomes, Requests, Texts, replay
from jaxroute.serving.site import CloudConfig, ExpertConfig, Site, SiteConfig, build_site

__all__ = [
    "CloudConfig",
    "ExpertConfig",
    "Outcomes",
    "Requests",
    "Site",
    "SiteConfig",
    "SiteState",
    "SlotStatus",
    "Texts",
    "advance",
    "ages",
    "build_site",
    "cached_tokens",
    "can_accept",
    "clear",
    "computed",
    "enqueue",
    "fold",
    "generated",
    "has_free_slot",
    "idle_site",
    "lanes_last",
    "replay",
    "running_and_waiting",
    "running_sums",
    "slot_status",
    "with_output_tokens",
]
