"""What the router sees, what the environment remembers, and what it is told."""

from __future__ import annotations

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jaxroute.banks.bank import NoWorse, RequestBank
from jaxroute.env.sessions import SessionState
from jaxroute.serving import Site, SiteState
from jaxroute.serving.prefixes import Text
from jaxroute.workloads.arrivals import ArrivalParams, ArrivalState
from jaxroute.workloads.limits import Limits
from jaxroute.workloads.sessions import SessionParams


class Recent(NamedTuple):
    """What a router remembers of recent arrivals: exponential means over them."""

    gap: Float[Array, ""]
    """Time between arrivals, s, over 32 arrivals."""
    slow_gap: Float[Array, ""]
    """Time between arrivals, s, over 512 arrivals."""
    net: Float[Array, ""]
    """Best net value that an expert offered, over 32 arrivals: own expected QoS minus what others lose."""
    net_square: Float[Array, ""]
    """Its square."""
    latest_gap: Float[Array, ""]
    """Time since the decision before this one, s."""


class Prices(NamedTuple):
    """What the operator pays, in QoS. A policy sees it, so that one router serves at any price."""

    accelerator: Float[Array, ""]
    """Per accelerator-second spent in iterations."""
    cloud: Float[Array, ""]
    """Multiple of the cloud's list prices."""


class Arrival(NamedTuple):
    """The arriving request, as the router sees it."""

    prompt_tokens: Float[Array, ""]
    limits: Limits
    arrival_rate: Float[Array, ""]
    """Recent request rate, 1/s: an exponential window of 32 arrivals."""
    age: Float[Array, ""]
    """Time since its first arrival, s: 0, unless an expert that failed has given it back."""
    recent: Recent
    prices: Prices
    session: Int[Array, ""] | None = None
    """Number of its session; None if requests have none."""


class Experts(NamedTuple):
    """The experts, as their metrics endpoints and profiles describe them."""

    num_running: Float[Array, "expert"]
    num_waiting: Float[Array, "expert"]
    max_num_seqs: Float[Array, "expert"]
    max_waiting: Float[Array, "expert"]
    kv_used: Float[Array, "expert"]
    """KV tokens held, without those of the iteration in progress."""
    kv_capacity: Float[Array, "expert"]
    pending_prefill: Float[Array, "expert"]
    """Tokens still to be prefilled for the requests there."""
    pending_output: Float[Array, "expert"]
    """Predicted output tokens still to be generated for the requests there."""
    iteration_time: Float[Array, "expert"]
    """Time of a decode iteration of the current batch, s."""
    weight_load: Float[Array, "expert"]
    compute_per_token: Float[Array, "expert"]
    network_delay: Float[Array, "expert"]
    recent_latency: Float[Array, "expert"]
    """Mean normalised latency of what completed there in about the last minute, s/token; 0 if nothing did."""
    expected_qos: Float[Array, "expert"]
    """Expected QoS of all requests there (the impact estimator's)."""
    up: Bool[Array, "expert"]
    """Whether it serves: the site has this expert, and it has not failed."""
    available: Bool[Array, "expert"]
    """Whether it would accept the arriving request: it is up, its queue has room, its memory could hold the prompt."""

    @property
    def eligible(self) -> Bool[Array, "expert"]:
        """Experts to choose from: those available; if none is, those that are up; if none is, all."""
        fallback = self.up | ~self.up.any(-1, keepdims=True)
        return jnp.where(self.available.any(-1, keepdims=True), self.available, fallback)


class Impact(NamedTuple):
    """What routing the arriving request to each expert would do, by the action impact estimator."""

    ttft: Float[Array, "expert"]
    """Its predicted time to first token, s."""
    tpot: Float[Array, "expert"]
    """Its predicted time per further token, s."""
    tpot_alone: Float[Array, "expert"]
    """The same if nobody else were there, s."""
    normalised_latency: Float[Array, "expert"]
    """Its predicted E2E latency per output token, s."""
    relative_latency: Float[Array, "expert"]
    """Greatest ratio of a predicted latency to its limit; up to 1, it is predicted to be in time."""
    in_time: Float[Array, "expert"]
    """Probability that it keeps all its limits."""
    in_time_each: Limits
    """Probability that it keeps each of them, `(expert,)`."""
    qos: Float[Array, "expert"]
    """Its expected QoS: predicted quality times that probability."""
    qos_loss: Float[Array, "expert"]
    """Expected QoS that the requests in flight there lose."""
    added_violations: Float[Array, "expert"]
    """Expected number of these requests that become late."""
    seat_seconds: Float[Array, "expert"]
    """Time for which it will hold a seat, as a share of all there, s: predicted tokens x iteration time / seats."""
    kv_seconds: Float[Array, "expert"]
    """Time for which it will hold KV memory, as a share of all memory there, s."""
    free_seats: Float[Array, "expert"]
    """Seats that will be free for it within the time that its limits leave for waiting."""

    @property
    def net(self) -> Float[Array, "expert"]:
        """Its expected QoS minus the expected QoS that others lose."""
        return self.qos - self.qos_loss


class Candidates(NamedTuple):
    """Edges from the arriving request to each expert."""

    predicted_quality: Float[Array, "expert"]
    predicted_output_tokens: Float[Array, "expert"]
    impact: Impact
    no_worse: NoWorse | None = None
    """Scores of Hybrid LLM, if the bank has them."""
    cached_tokens: Float[Array, "expert"] | None = None
    """Tokens of its prompt that the expert has cached; None if the router knows of none."""

    @property
    def known_cached(self) -> Float[Array, "expert"]:
        """The same; 0 where the router knows of none."""
        return jnp.zeros_like(self.predicted_quality) if self.cached_tokens is None else self.cached_tokens


class Away(NamedTuple):
    """What becomes of the arriving request if no expert gets it: it is declined, or goes to the cloud."""

    allowed: Bool[Array, ""]
    """Whether it may be sent away: its class has its share (`EnvParams.class_floor`), or it would go to the cloud."""
    to_cloud: Bool[Array, ""]
    """Whether it would go to the cloud: there is one with room, and the request may leave the site."""
    predicted_quality: Float[Array, ""]
    """Of the cloud's answer; 0 if declined, as all below."""
    in_time: Float[Array, ""]
    """Probability that the cloud keeps its limits."""
    qos: Float[Array, ""]
    """Its expected QoS there: predicted quality times that probability."""
    cost: Float[Array, ""]
    """What the answer is expected to cost there, in QoS."""

    @property
    def net(self) -> Float[Array, ""]:
        """Its expected QoS there minus what that costs."""
        return self.qos - self.cost


class InFlight(NamedTuple):
    """The requests at each expert, running ones in order of admission, then waiting ones in queue order.

    Where they are many, a slot stands for several alike, and holds their means.
    """

    weight: Float[Array, "expert slot"]
    """How many requests it stands for; 0 where there is none."""

    prompt_tokens: Float[Array, "expert slot"]
    kv_tokens: Float[Array, "expert slot"]
    generated: Float[Array, "expert slot"]
    predicted_quality: Float[Array, "expert slot"]
    predicted_output_tokens: Float[Array, "expert slot"]
    limits: Limits
    """`(expert, slot)`."""
    age: Float[Array, "expert slot"]
    """Time since arrival at the router, s."""
    remaining_tokens: Float[Array, "expert slot"]
    """Expected output tokens still to come, given those generated."""
    in_time: Float[Array, "expert slot"]
    """Probability that it keeps its limits."""


class Batch(NamedTuple):
    """What the router knows of the requests at each expert, in the order of admission; slots lead.

    Where they are many, they are grouped (`jaxroute.env.groups`): a slot stands for several, and holds their means.
    """

    running: Bool[Array, "slot expert"]
    waiting: Bool[Array, "slot expert"]
    prompt_tokens: Float[Array, "slot expert"]
    computed: Float[Array, "slot expert"]
    generated: Float[Array, "slot expert"]
    age: Float[Array, "slot expert"]
    first_token: Float[Array, "slot expert"] | None
    """Time from arrival to first token, s; any number where there was none yet. None if nothing limits TTFT or TPOT."""
    limits: Limits
    """`(slot, expert)`."""
    predicted_quality: Float[Array, "slot expert"]
    predicted_output_tokens: Float[Array, "slot expert"]
    weight: Float[Array, "slot expert"] | None = None
    """How many requests it stands for; None if each for itself, as the next two."""
    place: Float[Array, "slot expert"] | None = None
    """Place in line: 1 for the first to be admitted."""
    tokens_so_far: Float[Array, "slot expert"] | None = None
    """Tokens of the requests up to this place, itself included."""


class Described(NamedTuple):
    """The arriving request as it is described to a router."""

    prompt_tokens: Float[Array, ""]
    limits: Limits
    age: Float[Array, ""]
    """Time since its first arrival, s: 0, unless an expert that failed has given it back."""
    predicted_quality: Float[Array, "expert"]
    predicted_output_tokens: Float[Array, "expert"]
    """Medians."""
    no_worse: NoWorse | None = None
    """Scores of Hybrid LLM, if the bank has them."""
    cached_tokens: Float[Array, "expert"] | None = None
    """Tokens of its prompt that each expert has cached; None if the router knows of none."""
    session: Int[Array, ""] | None = None
    """Number of its session; None if requests have none."""


class Snapshot(NamedTuple):
    """What the router knows of the experts, as of some moment."""

    batch: Batch
    recent_latency: Float[Array, "expert"]
    up: Bool[Array, "expert"]
    age: Float[Array, ""]
    """Time since then, s."""


class Observation(NamedTuple):
    """The dynamic state abstraction: a heterogeneous graph of fixed, padded shape in physical units.

    Nodes: the arriving request, the experts, the running and the waiting requests (both live in `in_flight`, told
    apart by the masks). Edges: arrival to each expert (`candidates`) and back, each request in flight to its expert.
    It holds only what a real router can know: predictions, never true qualities or lengths.
    `jaxroute.networks.graph.as_graphs` lays it out as `jraph.GraphsTuple`s.
    """

    arrival: Arrival
    experts: Experts
    candidates: Candidates
    in_flight: InFlight
    running: Bool[Array, "expert slot"]
    waiting: Bool[Array, "expert slot"]
    away: Away | None
    """None if every request must go to an expert."""
    gauge_age: Float[Array, ""] | None = None
    """Time since the router read the servers' gauges, s, from which it knows of requests that came past it; None if it
    sees them all."""


class RewardParams(NamedTuple):
    """Weights of the parts of the tailored reward."""

    accelerator_price: Float[Array, "2"]
    """Least and greatest price of an accelerator-second, in QoS; each environment draws its own in between."""
    cloud_price: Float[Array, "2"]
    """Least and greatest multiple of the cloud's list prices; likewise."""
    quality_floor: Float[Array, "2"]
    """Least and greatest quality floor; likewise."""
    shaping: Float[Array, ""]
    """1 adds the potential-based shaping term, 0 leaves it out."""


class OutageParams(NamedTuple):
    """How often experts fail and for how long; both times are exponential."""

    mean_uptime: Float[Array, ""]
    """s."""
    mean_downtime: Float[Array, ""]
    """s."""


class CloudParams(NamedTuple):
    """An LLM somewhere else that takes requests at a price, faster than it could be loaded by one site."""

    quality: Float[Array, "prompt"]
    output_tokens: Int[Array, "prompt"]
    predicted_quality: Float[Array, "prompt"]
    predicted_output_tokens: Float[Array, "prompt"]
    log_length_error: Float[Array, ""]
    """The bank's columns of its LLM, as in `RequestBank`."""
    ttft: Float[Array, ""]
    """Median time to first token, s, network both ways included."""
    ttft_spread: Float[Array, ""]
    """Standard deviation of its logarithm."""
    tpot: Float[Array, ""]
    """Median time per further token, s."""
    tpot_spread: Float[Array, ""]
    """Standard deviation of its logarithm."""
    slow_share: Float[Array, ""]
    """Share of answers that are slow."""
    slow_factor: Float[Array, ""]
    """How many times as long both take for a slow answer."""
    price_per_request: Float[Array, ""]
    """In QoS."""
    price_per_1000_tokens: Float[Array, ""]
    """Of prompt and answer, in QoS."""
    local_only: Bool[Array, "prompt"]
    """Which prompts must not leave the site."""


class GatewayParams(NamedTuple):
    """The gateways that share a site."""

    number: Int[Array, "2"]
    """How many there are at least and at most; each environment draws its own number in between."""
    first_poll: Float[Array, ""]
    """Time until they read the servers' gauges for the first time, s."""


class EnvParams(NamedTuple):
    """Everything about a scenario that can change without recompiling."""

    site: Site
    bank: RequestBank
    arrivals: ArrivalParams
    rate: Float[Array, "2"]
    """Least and greatest request rate, 1/s; each environment draws its own in between."""
    limits: Limits
    """Of each class of service, `(class,)`."""
    share: Float[Array, "class"]
    reward: RewardParams
    outages: OutageParams
    refresh_interval: Float[Array, "2"]
    """Least and greatest time between two looks at the experts, or at their gauges, s; each environment draws its own
    in between."""
    cloud: CloudParams | None
    """None if the site has none."""
    class_floor: Float[Array, "class"] | None
    """Least share of the recent requests of each class that must not be declined; None if there is none."""
    gateways: GatewayParams | None
    """None if the router sees every request at the site."""
    sessions: SessionParams | None = None
    """None if each request stands for itself."""


class Fleet(NamedTuple):
    """The site of one environment, if each draws its own."""

    site: Site
    column: Int[Array, "expert"]
    """The bank's column, the LLM, that each expert serves."""
    present: Bool[Array, "expert"]
    """Whether the site has this expert at all."""


class Request(NamedTuple):
    """The arriving request, with the true values that no router sees."""

    number: Int[Array, ""]
    """How many requests have arrived before it."""
    row: Int[Array, ""]
    """Its prompt's row in the bank."""
    age: Float[Array, ""]
    """Time since its first arrival, s: 0, unless an expert that failed has given it back."""
    prompt_tokens: Int[Array, ""]
    output_tokens: Int[Array, "expert"]
    quality: Float[Array, "expert"]
    predicted_quality: Float[Array, "expert"]
    predicted_output_tokens: Float[Array, "expert"]
    limits: Limits
    local_only: Bool[Array, ""]
    """Whether it must not leave the site."""
    quality_floor: Float[Array, ""]
    """Predicted quality below which an answer is worth nothing: both qualities are 0 there."""
    gateway: Int[Array, ""] | None = None
    """The gateway at which it has arrived, if there are several."""
    no_worse: NoWorse | None = None
    """Scores of Hybrid LLM, if the bank has them."""
    text: Text | None = None
    """Whose text it continues, where requests have sessions or prefixes are cached."""
    cached_tokens: Float[Array, "expert"] | None = None
    """Tokens of its prompt that each expert has cached; None where the router does not see them."""

    def described(self) -> Described:
        """Return the request as a router sees it."""
        return Described(
            prompt_tokens=self.prompt_tokens.astype(jnp.float32),
            limits=self.limits,
            age=self.age,
            predicted_quality=self.predicted_quality,
            predicted_output_tokens=self.predicted_output_tokens,
            no_worse=self.no_worse,
            cached_tokens=self.cached_tokens,
            session=None if self.text is None else self.text.session,
        )


class SlotTable(NamedTuple):
    """What the environment knows of the request in each of the engine's slots."""

    quality: Float[Array, "expert slot"]
    predicted_quality: Float[Array, "expert slot"]
    predicted_output_tokens: Float[Array, "expert slot"]
    limits: Limits
    """`(expert, slot)`."""
    gateway: Int[Array, "expert slot"] | None
    """The gateway that has sent it, if there are several."""
    cached_tokens: Float[Array, "expert slot"] | None = None
    """Tokens of its prompt that the expert had cached when it was sent there; None if the router does not see them."""


class Typical(NamedTuple):
    """What a gateway's recent requests are like: exponential means."""

    prompt_tokens: Float[Array, ""]
    predicted_quality: Float[Array, "expert"]
    predicted_output_tokens: Float[Array, "expert"]
    allowed: Limits
    """Their limits as what they allow per second, 1/s, which is 0 for none."""


class Others(NamedTuple):
    """Requests at each expert that came past a gateway."""

    running: Float[Array, "expert"]
    waiting: Float[Array, "expert"]
    kv_tokens: Float[Array, "expert"]


class Known(NamedTuple):
    """What a gateway that shares a site knows, apart from its own requests; of all of them, with an axis before."""

    others: Others
    """What it found when it read the gauges."""
    recent: Recent
    """Gaps are between all arrivals, as it reckons from its own."""
    since_arrival: Float[Array, ""]
    """Time since its own latest arrival, s."""
    latency_sum: Float[Array, "expert"]
    latency_count: Float[Array, "expert"]
    """As the environment's, of own answers."""
    typical: Typical


class Gateways(NamedTuple):
    """The gateways that share a site; there may be fewer."""

    number: Int[Array, ""]
    """How many there are."""
    until_poll: Float[Array, ""]
    """Time until they read the servers' gauges again, s."""
    age: Float[Array, ""]
    """Time since they did, s."""
    known: Known
    """What each knows: `(gateway, ...)`."""


class Retries(NamedTuple):
    """What is needed to route the request in each slot again after its expert has failed."""

    marked: Bool[Array, "expert slot"]
    """Slots whose request waits to be routed again; the expert is down, so the entries stay."""
    number: Int[Array, "expert slot"]
    row: Int[Array, "expert slot"]
    age: Float[Array, "expert slot"]
    """Time from its first arrival until it was sent here or given back, s."""
    since_arrival: Float[Array, ""]
    """Time between the latest two arrivals, s: the later one may still wait for those that were given back."""


class EnvState(NamedTuple):
    """State of one environment, at the moment a request has arrived and waits for its expert."""

    site: SiteState
    table: SlotTable
    up: Bool[Array, "expert"]
    request: Request
    arrivals: ArrivalState
    rate: Float[Array, ""]
    """Current request rate, 1/s."""
    step: Int[Array, ""]
    """Number of the latest arrival: requests routed so far, not counting those routed again."""
    recent: Recent
    prices: Prices
    served: Float[Array, "class"] | None
    """Share of the recent requests of each class that were not declined; None if no class has a floor."""
    cloud: Float[Array, "place"] | None
    """For each request that the cloud may have in flight at once, the time until its answer ends, s; 0 if there is
    none. None if the site has no cloud."""
    latency_sum: Float[Array, "expert"]
    latency_count: Float[Array, "expert"]
    """Discounted sum and count of the normalised latencies of completed requests."""
    potential: Float[Array, ""]
    """Phi of the shaping term: expected QoS of all requests in flight."""
    fleet: Fleet | None
    """None if all environments use the site in the parameters."""
    retries: Retries | None
    """None unless requests are retried."""
    seen: Snapshot | None
    """What the router sees of the experts; None if it sees their present state."""
    refresh_interval: Float[Array, ""]
    """Time between two looks, s."""
    gateways: Gateways | None
    """None if the router sees every request at the site."""
    sessions: SessionState | None = None
    """None if each request stands for itself."""
