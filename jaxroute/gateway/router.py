"""A trained router in a gateway: it is told what happens to requests, and decides where to send the next one.

`Router.load` reads what `python -m jaxroute export` wrote. The router keeps the observation graph itself, on the host:
what it believes of the requests at the experts (`jaxroute.gateway.belief`), the recent latencies, and what it remembers
of recent arrivals. A router that was trained to may also send a request away.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jaxtyping import Bool, Float

from jaxroute.env.environment import LATENCY_WINDOW, remember_gap, remember_net
from jaxroute.env.gateways import TYPICAL_WINDOW, UNREAD
from jaxroute.env.types import Prices, Recent
from jaxroute.errors import UserError
from jaxroute.gateway.artefact import (
    FIELDS,
    MANIFEST,
    OTHERS_FIELDS,
    compile_decision,
    load_predictor,
    read_manifest,
    site_config,
    site_values,
)
from jaxroute.gateway.belief import Belief, Loads
from jaxroute.serving import SiteConfig, build_site
from jaxroute.serving.checks import real, real_array, whole
from jaxroute.workloads.limits import Limits

# Requests that end at an expert between the asking for its figures and the answer.
_MOST_ENDS = 256

DECLINED, CLOUD = -1, -2
"""What `Router.route` returns of a request that no expert gets: turn it away, or send it to the site's cloud."""


class Router:
    """Route the requests of one gateway; not for several threads at once.

    Times are seconds of any clock that never goes back. Experts are numbered as in `experts`. A request's id may be any
    hashable value, and may be used again once its request has ended.
    """

    experts: list[str]
    """The LLM and accelerator behind each expert's number."""
    away: bool
    """Whether it may send requests away."""
    decide: Callable[..., Any]
    """The decision, a function of three arrays as in `FIELDS`; a gateway may put one around it."""
    predict: Callable[[str], tuple[np.ndarray, np.ndarray]] | None
    """Predicts quality and length from a prompt's text, if the router was exported with a predictor."""
    logits: Float[np.ndarray, "action"]
    """Scores of the latest decision, that of away last if there is one. What was chosen has the highest, unless it had
    to be an expert; experts that are down or full have -1e9."""

    def __init__(
        self,
        site: SiteConfig,
        log_length_error: Sequence[float],
        slots: int,
        rate: float,
        decide: Callable[..., Any],
        predict: Callable[[str], tuple[np.ndarray, np.ndarray]] | None = None,
        *,
        prices: Prices | None = None,
        away: bool = False,
    ) -> None:
        """Start with an idle site; use `load`.

        `decide` is the exported function, without its first argument; `predict` returns (predicted,) arrays, as `route`
        takes them. `prices` are those of requests for which none are given. Requests may only be sent away if `away`.
        """
        self.experts = [expert.label for expert in site.experts]
        self.away = away
        self._site, self._slots = site, slots
        self._cloud = site.cloud if away else None
        self._at_cloud: set[Hashable] = set()
        # Numbers on the host, in the environment's types.
        free: list[Any] = [0.0, 1.0]
        self._prices = prices or Prices(*free)
        self._belief = Belief(jax.tree.map(lambda column: np.asarray(column, np.float64), build_site(site)), slots)
        self.decide, self.predict = decide, predict
        num_experts = len(self.experts)
        self._experts = np.zeros((len(FIELDS["experts"]), num_experts), np.float32)
        self._arrival = np.zeros(len(FIELDS["arrival"]), np.float32)
        self._up = np.ones(num_experts, bool)
        before: list[Any] = [1 / rate, 1 / rate, 0.0, 0.0, 0.0]
        self._recent = Recent(*before)
        self._latency = np.zeros((2, num_experts))  # discounted sum and count
        self._ended = np.zeros((2, num_experts))  # since the latest decision
        self.logits = np.full(num_experts + away, np.nan, np.float32)
        self._chosen: int | None = None
        self._had_to_stay = False
        self._seen: tuple[np.ndarray, ...] | None = None
        self._others = np.zeros((len(OTHERS_FIELDS), num_experts))
        self._read_at = np.full(num_experts, -math.inf)
        self._ends: list[deque[float]] = [deque(maxlen=_MOST_ENDS) for _ in range(num_experts)]
        """When the latest of its requests ended at each expert, s."""
        self._typical: tuple[np.ndarray, np.ndarray] | None = None
        """Means over recent requests: prompt tokens and what limits allow per second; quality and length per expert."""
        self._last_arrival: float | None = None
        self._last_decision: float | None = None

    @classmethod
    def load(cls, folder: str | Path, *, rate: float | None = None, platform: str = "cpu") -> Router:
        """Read and compile an exported router.

        Args:
            folder: what `python -m jaxroute export` wrote.
            rate: requests per second to expect at first, by default that of the export; soon, what arrives counts.
            platform: cpu, which decides fastest, or cuda.

        Raises:
            UserError: the folder is incomplete, damaged, or of another version; a rate out of range.
        """
        folder = Path(folder)
        manifest = read_manifest(folder)
        with _manifest_of(folder):
            of_site, slots, columns = site_values(manifest), int(manifest["slots"]), manifest["predictor"]
        decide = compile_decision(folder, of_site, slots, platform, f"jax {manifest.get('jax')}")
        predict = load_predictor(folder, columns) if columns else None
        with _manifest_of(folder):
            return cls.described(manifest, decide, predict, rate=rate)

    @classmethod
    def described(
        cls,
        manifest: dict[str, Any],
        decide: Callable[..., Any],
        predict: Callable[[str], tuple[np.ndarray, np.ndarray]] | None = None,
        *,
        rate: float | None = None,
    ) -> Router:
        """Return the router that a manifest describes, whose decision is `decide`; the others are as for `load`.

        Raises:
            UserError: a rate out of range.
            KeyError, TypeError, ValueError: the manifest lacks something.
        """
        if rate is not None:
            rate = real("rate", rate)
        usual: list[Any] = [float(manifest["prices"][name]) for name in Prices._fields]
        expected = float(manifest["rate"]) if rate is None else rate
        if not 0 < expected < math.inf:
            raise UserError(f"rate={expected} must be above 0 requests per second, and finite")
        return cls(
            site_config(manifest),
            [float(error) for error in manifest["log_length_error"]],
            int(manifest["slots"]),
            expected,
            decide,
            predict,
            prices=Prices(*usual),
            away=bool(manifest["away"]),
        )

    def route(
        self,
        request_id: Hashable,
        *,
        now: float,
        prompt_tokens: int,
        ttft: float | None = None,
        tpot: float | None = None,
        e2e: float | None = None,
        normalised: float | None = None,
        predicted_quality: Sequence[float] | Float[np.ndarray, "predicted"] | None = None,
        predicted_output_tokens: Sequence[float] | Float[np.ndarray, "predicted"] | None = None,
        prompt: str | None = None,
        arrived: float | None = None,
        accelerator_price: float | None = None,
        cloud_price: float | None = None,
        quality_floor: float = 0.0,
        may_go_away: bool = True,
        local_only: bool = False,
        among: Sequence[int] | None = None,
    ) -> int:
        """Choose where an arriving request goes; from now on it counts as being there.

        Limits are in s; at least one is needed.

        Args:
            request_id: a new one.
            now: s.
            prompt_tokens: at least 1.
            ttft: limit on the time to its first token.
            tpot: limit on the time per further token, (E2E - TTFT) / (tokens - 1).
            e2e: limit on the time to its last token.
            normalised: limit on the normalised latency, E2E / tokens.
            predicted_quality: at each expert, from 0 to 1; with a cloud, one more for it.
            predicted_output_tokens: at each expert, the median; with a cloud, one more for it.
            prompt: its text, instead of both predictions, if the router was exported with a predictor.
            arrived: time of its first arrival, s, if an expert has given it back; then it does not count as an arrival.
            accelerator_price: what an accelerator-second costs, in QoS; by default as in the run's configuration.
            cloud_price: what the cloud costs now, as a multiple of its list prices; by default 1.
            quality_floor: predicted quality below which an answer is worth nothing.
            may_go_away: False if the request must go to an expert, whatever the router thinks of it.
            local_only: whether it must not leave the site for the cloud.
            among: the experts that may have it: those that serve the LLM that the client has named, or those that have
                not failed it. The one of them with the highest score gets it if the router would choose another.

        Returns:
            The expert's number, or `DECLINED` or `CLOUD`. If every expert is full, it may be one of these, which may
            refuse (`rejected`). A request that is declined has ended; one in the cloud ends as at an expert.

        Raises:
            UserError: a value out of range, an id that is taken, a clock that goes back, a price of a cloud that the
                site does not have.
        """
        where = f"request {request_id!r}"
        _check_id(request_id)
        expert = self._belief.expert_of(request_id)
        if expert is not None or request_id in self._at_cloud:
            there = "in the cloud" if expert is None else f"at expert {expert}"
            raise UserError(f"{where} is {there} already; report its end first")
        now = real("now", now)
        prompt_tokens = whole(f"{where}: prompt_tokens", prompt_tokens, 1)
        limits = _checked(where, Limits(ttft, tpot, e2e, normalised))
        if arrived is not None:
            arrived = real(f"{where}: arrived", arrived)
            if not -math.inf < arrived <= now:
                raise UserError(f"{where}: arrived={arrived} must not be later than now={now}")
        prices = self._given_prices(where, accelerator_price, cloud_price)
        allowed = [self._number(expert) for expert in among or ()]
        if among is not None and not allowed:
            raise UserError(f"{where}: among is empty; name the experts that may have it")
        for name, answer in (("may_go_away", may_go_away), ("local_only", local_only)):
            if not isinstance(answer, bool | np.bool_):
                raise UserError(f"{where}: {name}={answer!r} must be True or False")
        quality, length, of_cloud = self._predictions(where, predicted_quality, predicted_output_tokens, prompt)
        floor: Any = real(f"{where}: quality_floor", quality_floor)
        if not 0 <= floor <= 1:
            raise UserError(f"{where}: quality_floor={quality_floor} must lie between 0 and 1")
        quality, of_cloud = (
            np.where(quality >= floor, quality, 0.0),
            (of_cloud[0] * (of_cloud[0] >= floor), of_cloud[1]),
        )
        self._belief.advance(now)
        again = arrived is not None
        self._note_arrival(now, again=again)
        arrived = now if arrived is None else arrived
        sums, counts = self._latency
        typical_request, typical_answers = self._note_typical(prompt_tokens, limits, quality, length, again=again)
        latency = sums / np.maximum(counts, 1e-6)
        self._experts[:] = (latency, self._up, quality, length, *self._others, *typical_answers)
        to_cloud = self._cloud is not None and not local_only and len(self._at_cloud) < self._cloud.max_in_flight
        self._arrival[:] = (
            *(prompt_tokens, *limits, now - arrived),
            *self._recent,
            *prices,
            *(to_cloud, *of_cloud),
            min(now - self._read_at.min(), UNREAD),
            *typical_request,
        )
        self._seen = self._belief.batch(), self._experts, self._arrival
        chosen, logits, best_net = self.decide(*self._seen)
        net: Any = float(best_net)
        self._recent = remember_net(self._recent, net)
        self.logits = np.asarray(logits)
        expert, num_experts = int(chosen), len(self.experts)
        self._had_to_stay = not may_go_away and expert == num_experts
        if self._had_to_stay:
            expert = int(self.logits[:num_experts].argmax())
        if allowed and expert != num_experts and expert not in allowed:
            expert = max(allowed, key=lambda number: self.logits[number])
        if expert == num_experts:
            self._chosen = CLOUD if to_cloud else DECLINED
            if to_cloud:
                self._at_cloud.add(request_id)
            return self._chosen
        self._chosen = expert
        self._belief.add(
            request_id,
            expert,
            limits=limits,
            predicted_quality=quality[expert],
            predicted_output_tokens=length[expert],
            prompt_tokens=prompt_tokens,
            arrived=arrived,
        )
        return expert

    @property
    def seen(self) -> tuple[np.ndarray, ...]:
        """What the latest decision was taken on: copies of its arguments, as in `FIELDS`, without the site."""
        assert self._seen is not None
        return tuple(array.copy() for array in self._seen)

    @property
    def loads(self) -> Loads:
        """How busy each expert is believed to be, as of the latest event."""
        return self._belief.loads()

    @property
    def up(self) -> Bool[np.ndarray, "expert"]:
        """Which experts serve."""
        return self._up.copy()

    def take_over(self, other: Router) -> None:
        """Go on where another router of the same site stands: with its requests, and all that it remembers.

        Raises:
            UserError: the other router has another site.
        """
        if self._site != other._site or self._slots != other._slots:
            raise UserError("a router can only take over from one of the same site, with as many slots")
        if (self._cloud is None) != (other._cloud is None):
            raise UserError("a router can only take over from one with the same cloud")
        for name in (
            "_belief",
            "_at_cloud",
            "_up",
            "_recent",
            "_latency",
            "_ended",
            "_last_arrival",
            "_last_decision",
            "_others",
            "_read_at",
            "_typical",
            "_ends",
        ):
            setattr(self, name, getattr(other, name))

    @property
    def reason(self) -> str:
        """Why the latest decision was taken, in words and numbers: the scores of away and of the best expert."""
        if self._chosen is None:
            return "no decision yet"
        num_experts = len(self.experts)
        best = int(self.logits[:num_experts].argmax())
        of_best = f"expert {best} scores {self.logits[best]:.2f}"
        if len(self.logits) == num_experts:
            return f"{of_best}, the best"
        of_away = f"away scores {self.logits[num_experts]:.2f}"
        if self._had_to_stay:
            return f"{of_best}, the best expert; {of_away}, but the request must go to an expert"
        if self._chosen >= 0:
            return f"{of_best}, and {of_away}"
        where = "declined" if self._chosen == DECLINED else "to the cloud"
        return f"{where}: {of_away}, and {of_best}, the best expert"

    def rejected(self, request_id: Hashable) -> None:
        """The expert, or the cloud, has refused the request.

        Raises:
            UserError: an unknown id.
        """
        self._remove(_check_id(request_id))

    def first_token(self, request_id: Hashable, *, now: float) -> None:
        """The first token of the answer has arrived; of no account if it is the cloud's.

        Raises:
            UserError: an unknown id, a clock that goes back.
        """
        if _check_id(request_id) in self._at_cloud:
            self._belief.advance(real("now", now))
            return
        self._belief.first_token(_check_id(request_id), real("now", now))

    def progress(
        self,
        request_id: Hashable,
        *,
        now: float,
        generated: int,
        kv_tokens: int | None = None,
        running: bool | None = None,
    ) -> None:
        """Tell how far the expert is with a request.

        Args:
            request_id: of a request at an expert.
            now: when it had got so far, s.
            generated: output tokens so far.
            kv_tokens: tokens whose KV the expert holds; by default all but the latest, once there is one.
            running: True if it is in the batch, False if it is in the queue: believed until told otherwise or until
                the first token. By default it is inferred.

        Raises:
            UserError: an unknown id, a count below 0, a clock that goes back.
        """
        where = f"request {_check_id(request_id)!r}"
        generated = whole(f"{where}: generated", generated, 0)
        if kv_tokens is not None:
            kv_tokens = whole(f"{where}: kv_tokens", kv_tokens, 0)
        if not (running is None or isinstance(running, bool | np.bool_)):
            raise UserError(f"{where}: running={running!r} must be True, False or None")
        self._belief.progress(request_id, real("now", now), generated=generated, kv_tokens=kv_tokens, running=running)

    def gauges(
        self,
        expert: int,
        *,
        now: float,
        running: int,
        waiting: int,
        kv_tokens: float | None = None,
        asked: float | None = None,
    ) -> None:
        """Tell what an expert's own metrics say: what it has beyond this router's requests came past the router.

        Args:
            expert: its number.
            now: when it said so, s.
            running: requests in its batch.
            waiting: requests in its queue.
            kv_tokens: tokens whose KV it holds; by default as many as typical requests would have.
            asked: when it was asked, s, by default now: a request that has ended since may still be in its figures.

        Raises:
            UserError: an unknown expert, a count below 0, a clock that goes back.
        """
        expert = self._number(expert)
        counts = [whole(name, count, 0) for name, count in (("running", running), ("waiting", waiting))]
        if kv_tokens is not None and not 0 <= real("kv_tokens", kv_tokens) < math.inf:
            raise UserError(f"kv_tokens={kv_tokens} must not be negative, and finite")
        self._belief.advance(real("now", now))
        own = self._belief.loads()
        ended = self._ends[expert]
        while ended and ended[0] < (now if asked is None else asked):
            ended.popleft()
        # Which of its own run already is inferred: how many there are in all is surer.
        others = max(sum(counts) - int(own.running[expert] + own.waiting[expert]) - len(ended), 0)
        in_batch = min(max(counts[0] - int(own.running[expert]), 0), others)
        held = 0.0
        if kv_tokens is not None:
            held = max(kv_tokens - own.kv_tokens[expert], 0.0) * (in_batch > 0)
        elif self._typical is not None:
            (prompt_tokens, *_), (_, length) = self._typical
            held = in_batch * (prompt_tokens + length[expert] / 2)
        self._others[:, expert] = in_batch, others - in_batch, held
        self._read_at[expert] = now

    def finished(self, request_id: Hashable, *, now: float, output_tokens: int) -> None:
        """The last token of the answer has arrived.

        Raises:
            UserError: an unknown id, fewer than 1 token, a clock that goes back.
        """
        now = real("now", now)
        output_tokens = whole(f"request {_check_id(request_id)!r}: output_tokens", output_tokens, 1)
        if request_id in self._at_cloud:
            self._belief.advance(now)
            self._at_cloud.remove(request_id)
            return
        age = self._belief.age(request_id, now)
        expert = self._belief.expert_of(request_id)
        assert expert is not None
        self._belief.advance(now)
        self._ended[:, expert] += age / output_tokens, 1
        self._ends[expert].append(now)
        self._belief.remove(request_id)

    def failed(self, request_id: Hashable) -> None:
        """The request has ended without an answer: it was cancelled, or went wrong.

        Raises:
            UserError: an unknown id.
        """
        self._remove(_check_id(request_id))

    def expert_down(self, expert: int) -> list[Hashable]:
        """The expert does not serve any more and has forgotten its requests, and so does the router.

        Returns:
            Their ids. They may be routed again, with `arrived`.

        Raises:
            UserError: an unknown expert.
        """
        expert = self._number(expert)
        self._up[expert] = False
        return self._belief.remove_all(expert)

    def expert_up(self, expert: int) -> None:
        """The expert serves again, idle.

        Raises:
            UserError: an unknown expert.
        """
        self._up[self._number(expert)] = True

    def _number(self, expert: int) -> int:
        try:
            return whole("expert", expert, 0, len(self.experts) - 1)
        except UserError:
            raise UserError(
                f"expert {expert!r} is unknown; experts are numbered from 0 to {len(self.experts) - 1}"
            ) from None

    def _remove(self, request_id: Hashable) -> None:
        if request_id in self._at_cloud:
            self._at_cloud.remove(request_id)
        else:
            self._belief.remove(request_id)

    def _given_prices(self, where: str, accelerator_price: Any, cloud_price: Any) -> Prices:
        """Return the prices for a request: those given, or the usual ones."""
        if cloud_price is not None and self._cloud is None:
            raise UserError(f"{where}: cloud_price={cloud_price!r} is given, and the exported site has no cloud")
        prices = self._prices
        given: dict[str, Any] = {"accelerator": accelerator_price, "cloud": cloud_price}
        for name, price in given.items():
            if price is None:
                continue
            number: Any = real(f"{where}: {name}_price", price)
            if not 0 <= number < math.inf:
                raise UserError(f"{where}: {name}_price={price} must not be negative, and finite")
            prices = prices._replace(**{name: number})
        return prices

    def _predictions(
        self, where: str, quality: Any, length: Any, prompt: str | None
    ) -> tuple[Float[np.ndarray, "expert"], Float[np.ndarray, "expert"], tuple[float, float]]:
        """Return both predictions, those given or those of the prompt's text, for the experts and for the cloud."""
        if prompt is not None:
            if self.predict is None:
                raise UserError(f"{where}: this router has no predictor; give both predictions, or export it with one")
            if quality is not None or length is not None:
                raise UserError(f"{where}: give the prompt or predictions, not both")
            if not isinstance(prompt, str):
                raise UserError(f"{where}: prompt must be text, not {type(prompt).__name__}")
            quality, length = self.predict(prompt)
        quality = real_array(f"{where}: predicted_quality", [] if quality is None else quality).astype(float)
        length = real_array(f"{where}: predicted_output_tokens", [] if length is None else length).astype(float)
        num_experts, cloud = len(self.experts), self._cloud is not None
        if not quality.shape == length.shape == (num_experts + cloud,):
            raise UserError(
                f"{where}: predicted_quality has shape {quality.shape} and predicted_output_tokens {length.shape}; "
                f"give a value for each of the {num_experts} experts{', and one more for the cloud' * cloud}"
            )
        if not ((quality >= 0) & (quality <= 1) & (length > 0) & (length < math.inf)).all():
            raise UserError(
                f"{where}: predicted_quality {quality.tolist()} must lie from 0 to 1, and predicted_output_tokens "
                f"{length.tolist()} be above 0"
            )
        of_cloud = (quality[-1], length[-1]) if cloud else (0.0, 0.0)
        return quality[:num_experts], length[:num_experts], of_cloud

    def _note_typical(
        self,
        prompt_tokens: int,
        limits: Limits,
        quality: Float[np.ndarray, "expert"],
        length: Float[np.ndarray, "expert"],
        *,
        again: bool,
    ) -> tuple[Float[np.ndarray, "value"], Float[np.ndarray, "2 expert"]]:
        """Add a request to what is typical, as the environment does, and return that."""
        if self._typical is None or not again:
            request = np.array([prompt_tokens, *limits.rates()]), np.stack([quality, length])
            request_before, answers_before = request if self._typical is None else self._typical
            self._typical = (
                request_before + (request[0] - request_before) / TYPICAL_WINDOW,
                answers_before + (request[1] - answers_before) / TYPICAL_WINDOW,
            )
        return self._typical

    def _note_arrival(self, now: float, *, again: bool) -> None:
        """Update what is remembered of arrivals, and the recent latencies, as the environment does."""
        gap: Any
        if not again:
            if self._last_arrival is not None:
                gap = now - self._last_arrival
                self._recent = remember_gap(self._recent, gap)
            self._last_arrival = now
        if self._last_decision is not None:
            gap = now - self._last_decision
            self._recent = self._recent._replace(latest_gap=gap)
            self._latency *= math.exp((self._last_decision - now) / LATENCY_WINDOW)
        self._latency += self._ended
        self._ended[:] = 0
        self._last_decision = now


@contextmanager
def _manifest_of(folder: Path) -> Iterator[None]:
    """Say which file is damaged if a manifest lacks something."""
    try:
        yield
    except UserError:
        raise
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"{folder / MANIFEST} is damaged ({error}); export the router again") from None


def _checked(where: str, limits: Limits) -> Limits:
    """Return the limits that a gateway gives, infinite where it gives none."""
    numbers = dict.fromkeys(Limits._fields, math.inf)
    for name, limit in limits._asdict().items():
        if limit is not None:
            numbers[name] = real(f"{where}: {name}", limit)
            if not 0 < numbers[name] < math.inf:
                raise UserError(f"{where}: {name}={limit} must be above 0 s, and finite")
    if limits == Limits():
        raise UserError(f"{where}: it limits nothing; give one of {', '.join(Limits._fields)}, in s")
    return Limits(**numbers)


def _check_id(request_id: Hashable) -> Hashable:
    try:
        hash(request_id)
    except TypeError:
        raise UserError(f"request_id={request_id!r} cannot be an id: give text, a number or a tuple") from None
    return request_id
