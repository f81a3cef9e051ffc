"""Fit an expert to a serving log: the coefficients with which a replay comes closest to what was measured.

A first guess is read off the log without a replay. From there Levenberg-Marquardt searches over the logarithms of the
coefficients. A replay is exact but has no gradient, so the Jacobian is taken by differences; all replays of a round run
side by side in one program, compiled once per log. For a long log these are replays of some windows.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Float
from scipy.optimize import least_squares

from jaxroute.errors import UserError
from jaxroute.fitting.logs import MIN_REQUESTS, ServingLog
from jaxroute.fitting.server import serve
from jaxroute.fitting.windows import Window, choose_windows, met_no_queue, most_decoding, progress, whole
from jaxroute.serving.site import Site

COEFFICIENTS = ("weight_load", "compute_per_token", "decode_per_seq", "attention_per_token", "kv_capacity")
"""What is fitted, in s and tokens as in `Site`."""

# Relative steps of the differences: as large as a replay's reaction to them is still linear.
_STEP = 0.01
# Memory is tried between two factors of the best so far, ever closer; each time so many rounds of steps follow.
_MEMORY = ((0.5, 1.2), (0.9, 1.1), (0.97, 1.03))
_ROUNDS = 6
# Rounds in which the first guess of a long log is corrected, each time by at most a factor of e.
_CORRECTIONS, _MOST_CORRECTED = 4, 1.0
# One way, s: the mean of the logarithm, and its spread.
_USUAL_DELAY = (0.005, 1.5)
# A fit is never better than this: the search ends where the loss is rough.
_SEARCH = 0.005
# A trade-off is told from this relative standard deviation on, with coefficients that take at least this part in it.
_TRADED, _PART = 0.05, 0.3
# Requests far behind all others fill a replay up to a power of two, s.
_FAR_BEHIND, _FEWEST_REQUESTS = 1e5, 128
# Relative errors of a first guess from which on they count less.
_ROBUST = 0.02
# Steps tried in a round: some shorter than the linear one, some drawn around it.
_SHORTER, _DRAWN = 4, 12
_TRIED = _SHORTER + _DRAWN
# Weight of the guess: little, and enough where the residuals say nothing.
_PULL = 1e-5
# What is usual, as parts of weight_load: the mean of the logarithm over the experts of configs/site that were profiled,
# that of the measured run in the tests left out, and at least its spread there (0.2, 1.2 and 0.8). What a log says
# nothing about is as usual.
_USUAL = {"compute_per_token": (3.7e-3, 0.5), "decode_per_seq": (1e-3, 1.2), "attention_per_token": (9e-6, 0.8)}
# First tokens of one iteration reach a log within this time, s.
_SAME_ITERATION = 1e-4
# A coefficient is said to be undetermined from this relative standard error on.
_UNCERTAIN = 0.25
_FEWEST_SLOTS = 32
# The search begins with the compared requests of a long log that met no queue, if there are at least so many.
_ENOUGH = 100
_TIMES_AT_ONCE = 1024
_MOST = 2**24


@dataclass(frozen=True)
class Limits:
    """What is known of the server: vLLM's options, and what of the iteration is overhead."""

    max_num_seqs: int = 256
    max_num_batched_tokens: int = 2048
    iteration_overhead: float = 0.0
    kv_capacity: int | None = None
    """Tokens; fitted if None."""
    network_delay: float | None = 0.0
    """From whoever measured to the server, one way, s; fitted if None. 0 for a log of the server's own."""


class Calibration(NamedTuple):
    """A fitted expert, and how well it explains the log."""

    coefficients: dict[str, float]
    """By name, with `iteration_overhead` and `network_delay`."""
    standard_error: dict[str, float]
    """Relative, of each coefficient; infinite where the log says nothing about it, nan where it was given."""
    num_fitted: int
    """Requests, the earliest, whose measured times could be used; the others judge."""
    num_compared: int
    """Of these, how many the search compared to a replay: all in a short log, those of some windows in a long one."""
    means: dict[str, tuple[float, float]]
    """Mean TTFT, TPOT and E2E of the other requests, s: measured, simulated."""
    ttft: Float[np.ndarray, "request"]
    """Simulated, of all requests."""
    latency: Float[np.ndarray, "request"]
    names: tuple[str, ...]
    """What was fitted."""
    covariance: Float[np.ndarray, "coefficient coefficient"]
    """Of the logarithms of these, by the linear model; infinite on the diagonal where the log says nothing."""

    def draws(self, number: int, rng: np.random.Generator) -> dict[str, Float[np.ndarray, "draw"]]:
        """Return draws of all coefficients, by name: normal in the logarithms (Laplace's approximation).

        What the log says nothing about stays as it is: `undetermined` tells.
        """
        known = np.isfinite(np.diag(self.covariance))
        covariance = np.where(known[:, None] & known, np.nan_to_num(self.covariance, posinf=0.0), 0.0)
        covariance += np.diag(np.where(known, _SEARCH**2, 0.0))
        factors = np.exp(rng.multivariate_normal(np.zeros(len(self.names)), covariance, number, method="eigh"))
        drawn = {name: np.full(number, value) for name, value in self.coefficients.items()}
        for column, name in zip(factors.T, self.names, strict=True):
            drawn[name] = drawn[name] * column
        return drawn

    def trade_offs(self) -> list[str]:
        """Say in words which coefficients are only known together: one may be larger if another is smaller."""
        known = np.flatnonzero(np.isfinite(np.diag(self.covariance)))
        names = [self.names[place] for place in known]
        variances, directions = np.linalg.eigh(self.covariance[np.ix_(known, known)])
        said = []
        for variance, direction in zip(variances[::-1], directions.T[::-1], strict=True):
            changes = math.sqrt(max(variance, 0.0)) * direction
            taking_part = np.flatnonzero(np.abs(direction) > _PART)
            if np.abs(changes).max() < _TRADED or len(taking_part) < 2:
                continue
            changes *= np.sign(changes[taking_part[np.abs(changes[taking_part]).argmax()]])
            parts = [f"{names[i]} {math.expm1(min(changes[i], 5.0)):+.0%}" for i in taking_part]
            said.append(f"known only together: {', '.join(parts)} would fit about as well")
        return said

    def undetermined(self) -> dict[str, str]:
        """Which coefficients the log does not determine, and why."""
        said = {}
        for name, error in self.standard_error.items():
            if name == "kv_capacity" and math.isinf(error):
                said[name] = "no request had to wait for memory: this is the most that was held, the least it can be"
            elif error > _UNCERTAIN:
                said[name] = f"uncertain by {error:.0%}: the log hardly depends on it"
        return said


def calibrate(log: ServingLog, limits: Limits = Limits(), share: float = 1 / 3) -> Calibration:
    """Fit to the measured times of the first `share` of the requests, and judge on the others.

    The search replays all of a short log, and windows of a long one. The judgement is one replay of everything.

    Raises:
        UserError: too few requests for either part.
    """
    num_fitted = int(len(log.arrival_time) * share)
    if min(num_fitted, len(log.arrival_time) - num_fitted) < MIN_REQUESTS // 3:
        raise UserError(
            f"share={share:g} of {len(log.arrival_time)} requests leaves too few to fit or to judge; "
            f"each part needs {MIN_REQUESTS // 3}"
        )
    given = {"kv_capacity": limits.kv_capacity, "network_delay": limits.network_delay}
    names = [name for name in (*COEFFICIENTS, "network_delay") if given.get(name) is None]
    windows = choose_windows(log, num_fitted)
    replay = _Replay(log, limits, names)
    chosen = np.concatenate([window.requests[window.compared] for window in windows])
    measured = np.stack([log.ttft, log.latency - log.ttft])[:, chosen]
    # Relative errors, but of short times in terms of the mean: means are what has to agree.
    scale = measured + 0.1 * measured.mean(1, keepdims=True) + 1e-3

    def residuals(candidates: Float[np.ndarray, "candidate coefficient"]) -> Float[np.ndarray, "candidate residual"]:
        parts = []
        for window in windows:
            ttft, latency = replay(window, candidates, _TRIED)
            parts.append(np.stack([ttft, latency - ttft], axis=1)[:, :, window.compared])
        simulated = np.concatenate(parts, axis=2)
        return ((simulated - measured) / scale).reshape(len(candidates), -1)

    memory, usual = np.array(names) == "kv_capacity", _Usual(names)
    calm = met_no_queue(log)[chosen]
    if len(windows[0].requests) == len(log.ttft) or calm.sum() < _ENOUGH:
        guess = _first_guess(log, limits, names, windows, np.ones_like(calm))
        best = _search(residuals, guess, memory, usual)
    else:
        # Without a queue nobody is preempted: how long answers took is smooth there, and memory does not matter.
        guess = _first_guess(log, limits, names, windows, calm)
        of_calm, times = np.concatenate([calm, calm]), [name for name in names if name != "kv_capacity"]
        guess = _corrected(
            guess,
            memory,
            guess_again=lambda at: _first_guess(replay.log_of(windows, at), limits, times, windows, calm),
            loss=lambda at: np.square(residuals(at)[:, of_calm]).sum(1),
        )
        guess = _scan_memory(lambda at: np.square(residuals(at)).sum(1), guess, memory, _MEMORY)
        best = _search(residuals, guess, memory, usual, scans=_MEMORY[-1:])
    error, jacobian = _linearised(residuals, best)
    standard_error = dict.fromkeys((*COEFFICIENTS, "network_delay"), math.nan)
    covariance = _covariance(jacobian, error, usual)
    standard_error |= dict(zip(names, np.sqrt(np.diag(covariance)).tolist(), strict=True))
    found = np.exp(best)
    if limits.kv_capacity is None and math.isinf(standard_error["kv_capacity"]):
        found[names.index("kv_capacity")] = _most_held(log)
    everything = whole(log, num_fitted)
    # A short log has its program already.
    num_lanes = _TRIED if len(windows[0].requests) == len(everything.requests) else 1
    ttft, latency = (column[0] for column in replay(everything, np.log(found)[None], num_lanes))
    coefficients = {"iteration_overhead": limits.iteration_overhead, "network_delay": limits.network_delay or 0.0}
    coefficients |= dict(zip(names, found.tolist(), strict=True))
    coefficients["kv_capacity"] = float(limits.kv_capacity or round(coefficients["kv_capacity"]))
    rest = slice(num_fitted, None)
    tokens = np.maximum(log.output_tokens - 1, 1)
    means = {
        "TTFT": (log.ttft[rest].mean(), ttft[rest].mean()),
        "TPOT": tuple(
            ((e2e - first) / tokens)[rest].mean() for first, e2e in ((log.ttft, log.latency), (ttft, latency))
        ),
        "E2E": (log.latency[rest].mean(), latency[rest].mean()),
    }
    return Calibration(
        coefficients,
        standard_error,
        num_fitted,
        len(chosen),
        {name: (float(pair[0]), float(pair[1])) for name, pair in means.items()},
        ttft,
        latency,
        tuple(names),
        covariance,
    )


class _Replay:
    """Replays windows of a log with candidates for the coefficients, in as many slots as are needed."""

    def __init__(self, log: ServingLog, limits: Limits, names: list[str]) -> None:
        self.log, self.limits, self.names = log, limits, names
        # Room for the longest request, whatever the search tries: none is turned away.
        self.least_memory = int((log.prompt_tokens + log.output_tokens).max())
        # With these slots a replay is exact, with fewer as long as nobody asks for more.
        self.most_slots = _power_of_two(max(2 * limits.max_num_seqs, 2 * most_decoding(log)))
        self.num_slots = min(_power_of_two(max(2 * most_decoding(log), _FEWEST_SLOTS)), self.most_slots)

    def __call__(
        self, window: Window, candidates: Float[np.ndarray, "candidate coefficient"], num_lanes: int
    ) -> tuple[Float[np.ndarray, "candidate request"], Float[np.ndarray, "candidate request"]]:
        """Return TTFT and latency, s, by the candidates' log coefficients; at most `num_lanes` candidates."""
        # Always as many at a time, so that there is one program.
        site = self._site(np.resize(candidates, (num_lanes, candidates.shape[1])).astype(np.float32))
        tokens = (self.log.prompt_tokens, self.log.output_tokens)
        # Logs of about the same length share a program.
        number = len(window.requests)
        behind = _power_of_two(max(number, _FEWEST_REQUESTS)) - number
        prompts, outputs = (
            np.pad(column[window.requests], (0, behind), constant_values=1).astype(np.int32) for column in tokens
        )
        gaps = np.pad(window.gaps(self.log), (0, behind), constant_values=1)
        gaps[number : number + 1] = _FAR_BEHIND
        while True:
            start = window.server(self.log, num_lanes, self.num_slots, self.limits.max_num_seqs)
            outcomes = serve(site, start, gaps, prompts, outputs)
            if self.num_slots >= self.most_slots or not np.asarray(outcomes.crowded).any():
                break
            self.num_slots *= 2
        way_back = np.asarray(site.network_delay)[:, None]
        ttft, latency = (
            (np.asarray(column, np.float64).T + way_back)[: len(candidates), :number]
            for column in (outcomes.ttft, outcomes.latency)
        )
        return ttft, latency

    def log_of(self, windows: list[Window], candidate: Float[np.ndarray, "coefficient"]) -> ServingLog:
        """Return the log with the times that the requests of the windows would have had by the candidate."""
        first, last = self.log.first_token_time.copy(), self.log.last_token_time.copy()
        for window in windows:
            arrival = self.log.arrival_time[window.requests]
            ttft, latency = (column[0] for column in self(window, candidate[None], _TRIED))
            first[window.requests], last[window.requests] = arrival + ttft, arrival + latency
        return self.log._replace(first_token_time=first, last_token_time=last)

    def _site(self, log_values: Float[np.ndarray, "candidate coefficient"]) -> Site:
        values = dict(zip(self.names, jnp.exp(log_values).T, strict=True))
        number, limits = len(log_values), self.limits
        kv_capacity = values.pop("kv_capacity", jnp.full(number, limits.kv_capacity or 0, jnp.float32))
        network_delay = values.pop("network_delay", jnp.full(number, limits.network_delay or 0, jnp.float32))
        return Site(
            iteration_overhead=jnp.full(number, limits.iteration_overhead, jnp.float32),
            **values,
            max_num_seqs=jnp.full(number, limits.max_num_seqs, jnp.int32),
            max_num_batched_tokens=jnp.full(number, limits.max_num_batched_tokens, jnp.int32),
            max_waiting=jnp.full(number, _MOST, jnp.int32),
            kv_capacity=jnp.clip(jnp.round(kv_capacity), self.least_memory, _MOST).astype(jnp.int32),
            network_delay=network_delay,
        )


def _power_of_two(number: int) -> int:
    """Round up, so that there are few programs."""
    return 1 << (number - 1).bit_length()


class _Circumstances(NamedTuple):
    """What went on while the compared requests of a window were served, as far as the measured times tell."""

    prompt: Float[np.ndarray, "request"]
    tokens: Float[np.ndarray, "request"]
    """Of the answer."""
    ttft: Float[np.ndarray, "request"]
    duration: Float[np.ndarray, "request"]
    """Of the answer, from its first token to its last, s."""
    mean_batch: Float[np.ndarray, "request"]
    """Requests that decoded meanwhile, itself included."""
    mean_context: Float[np.ndarray, "request"]
    """Tokens that these held together."""
    prefilled: Float[np.ndarray, "moment"]
    """Prompt tokens whose prefill ended at one moment."""
    meanwhile: Bool[np.ndarray, "request moment"]
    """Which of these moments fell into the answer."""
    alone: Bool[np.ndarray, "request"]
    """Whether it met an idle engine, and so waited for its own prefill alone."""


def _circumstances(log: ServingLog, window: Window) -> _Circumstances:
    log, compared = window.part(log)
    first, last = log.first_token_time, log.last_token_time
    times = np.unique(np.concatenate([first, last]))
    middle, width = (times[1:] + times[:-1]) / 2, np.diff(times)
    decoding = (first[:, None] <= middle) & (middle < last[:, None])
    tokens_held = log.prompt_tokens[:, None] + progress(log, slice(None), middle) * log.output_tokens[:, None]
    context = (decoding * tokens_held).sum(0)
    overlap = decoding[compared] * width
    overlap /= np.maximum(overlap.sum(1, keepdims=True), 1e-9)
    # Prompts whose first tokens come together were prefilled together, in chunks.
    moments, which = np.unique(np.round(first / _SAME_ITERATION), return_inverse=True)
    moments, prefilled = moments * _SAME_ITERATION, np.bincount(which, log.prompt_tokens)
    first_of, last_of, arrival_of = (column[compared, None] for column in (first, last, log.arrival_time))
    others = (log.arrival_time < first_of) & (last > arrival_of)
    return _Circumstances(
        prompt=log.prompt_tokens[compared],
        tokens=log.output_tokens[compared],
        ttft=log.ttft[compared],
        duration=(last - first)[compared],
        mean_batch=overlap @ decoding.sum(0),
        mean_context=overlap @ context,
        prefilled=prefilled,
        meanwhile=(moments > first_of + _SAME_ITERATION) & (moments <= last_of + _SAME_ITERATION),
        alone=others.sum(1) == 1,
    )


def _first_guess(
    log: ServingLog, limits: Limits, names: list[str], windows: list[Window], trusted: Bool[np.ndarray, "request"]
) -> Float[np.ndarray, "coefficient"]:
    """Return log coefficients that explain how long trusted answers took, given what the log says went on meanwhile.

    This needs no replay, in which one late request would delay all that follow: how many requests decoded together with
    an answer, on how many tokens of context, and which prompts were prefilled meanwhile, is taken from the measured
    times.
    """
    parts = [_circumstances(log, window) for window in windows]

    def joined(name: str) -> np.ndarray:
        return np.concatenate([getattr(part, name) for part in parts])

    prompt, tokens, ttft, duration = (joined(name) for name in ("prompt", "tokens", "ttft", "duration"))
    mean_batch, mean_context, alone = (joined(name) for name in ("mean_batch", "mean_context", "alone"))
    answered = (tokens > 1) & trusted

    def prefill(prompt: np.ndarray, compute: float, weights: float) -> tuple[np.ndarray, np.ndarray]:
        """Iterations, and seconds by which computing makes them longer than loading the weights."""
        full, rest = np.divmod(prompt, limits.max_num_batched_tokens)
        longer = full * max(compute * limits.max_num_batched_tokens - weights, 0.0)
        return full + (rest > 0), longer + (rest > 0) * np.maximum(compute * rest - weights, 0)

    def errors(logs: Float[np.ndarray, "coefficient"]) -> Float[np.ndarray, "error"]:
        weights, compute, per_sequence, per_token, delay = np.exp(logs)
        delay = delay if limits.network_delay is None else limits.network_delay
        iteration = limits.iteration_overhead + weights + per_sequence * mean_batch + per_token * mean_context
        longer = [part.meanwhile @ prefill(part.prefilled, compute, weights)[1] for part in parts]
        of_answers = (tokens - 1) * iteration + np.concatenate(longer)
        count, own = prefill(prompt, compute, weights)
        of_first_tokens = count * (limits.iteration_overhead + weights) + own + 2 * delay
        return np.concatenate(
            [
                (of_answers[answered] - duration[answered]) / (duration[answered] + 1e-3),
                (of_first_tokens[alone] - ttft[alone]) / (ttft[alone] + 1e-3),
                1e-2 * (logs[:1] - typical[:1]),
                _ROBUST * usual.off(logs),
            ]
        )

    tpot = duration[answered] / (tokens[answered] - 1)
    fastest = float(np.quantile(tpot, 0.05)) if answered.any() else 0.02
    weight_load = max(0.8 * fastest - limits.iteration_overhead, 1e-5)
    compute = float(np.clip(np.quantile(ttft / prompt, 0.05), 1e-7, 1e-2))
    typical = np.log([weight_load, compute, 2e-3 * weight_load, 1e-5 * weight_load, _USUAL_DELAY[0]])
    usual = _Usual([*COEFFICIENTS[:-1], "network_delay"])
    # Answers that were preempted took longer for another reason: large errors count little more than small ones.
    fits = [
        least_squares(errors, typical + np.log(start), loss="soft_l1", f_scale=_ROBUST)
        for start in ([1, 1, 1, 1, 1], [0.6, 1, 10, 10, 1], [1, 1, 20, 1, 1])
    ]
    best = min(fits, key=lambda fit: fit.cost).x
    values = dict(zip((*COEFFICIENTS[:-1], "network_delay"), best, strict=True))
    values["kv_capacity"] = math.log(_most_held(log))
    return np.array([values[name] for name in names])


def _corrected(
    guess: Float[np.ndarray, "coefficient"],
    memory: Bool[np.ndarray, "coefficient"],
    guess_again: Callable[[np.ndarray], np.ndarray],
    loss: Callable[[np.ndarray], np.ndarray],
) -> Float[np.ndarray, "coefficient"]:
    """Return the coefficients by whose replay one guesses the same times as from the log; memory stays.

    A guess errs, but from a replay as much as from the log (indirect inference: Gouriéroux, Monfort and Renault, 1993).
    Of all rounds, the one of least loss counts.
    """
    tried = [guess]
    for _ in range(_CORRECTIONS):
        corrected = tried[-1].copy()
        corrected[~memory] += np.clip(guess[~memory] - guess_again(corrected), -_MOST_CORRECTED, _MOST_CORRECTED)
        tried.append(corrected)
    return tried[loss(np.array(tried)).argmin()]


def _most_held(log: ServingLog) -> float:
    """The most KV tokens that decoding requests seem to have held together, if none was preempted."""
    first, last = log.first_token_time, log.last_token_time
    times = np.unique(np.concatenate([first, last]))
    most = 0.0
    # By and by, as a table of all requests and times would not fit into memory.
    for some in np.array_split(times, -(-len(times) // _TIMES_AT_ONCE)):
        decoding = np.flatnonzero((first <= some[-1]) & (last >= some[0]))
        begin, end = first[decoding, None], last[decoding, None]
        tokens = log.prompt_tokens[decoding, None] + progress(log, decoding, some) * log.output_tokens[decoding, None]
        most = max(most, (tokens * ((some >= begin) & (some <= end))).sum(0).max())
    return float(np.clip(most, (log.prompt_tokens + log.output_tokens).max(), _MOST))


class _Usual:
    """What is usual, as a prior of the logarithms: normal parts of weight_load, and the network's delay."""

    def __init__(self, names: list[str]) -> None:
        known = [(name, *_USUAL[name]) for name in names if name in _USUAL]
        known += [(name, *_USUAL_DELAY) for name in names if name == "network_delay"]
        self.rows = np.zeros((len(known), len(names)))
        self.means = np.zeros(len(known))
        for row, (name, usual, spread) in enumerate(known):
            self.rows[row, names.index(name)] = 1 / spread
            if name in _USUAL:
                self.rows[row, names.index("weight_load")] = -1 / spread
            self.means[row] = math.log(usual) / spread

    def off(self, at: Float[np.ndarray, "*candidate coefficient"]) -> Float[np.ndarray, "*candidate part"]:
        """Return how many standard deviations each part is off."""
        return at @ self.rows.T - self.means


def _search(
    residuals: Callable[[np.ndarray], np.ndarray],
    guess: Float[np.ndarray, "coefficient"],
    memory: Bool[np.ndarray, "coefficient"],
    usual: _Usual,
    scans: Sequence[tuple[float, float]] = _MEMORY,
    rounds: int = _ROUNDS,
) -> Float[np.ndarray, "coefficient"]:
    """Minimise the sum of squares from the guess, in rounds after each scan of memory, and return where.

    Levenberg-Marquardt, with draws from around each step, as the loss is smooth only from afar: who is admitted or
    preempted when changes at once. To the squares of the residuals come those of what is unusual, in units of the
    residuals' noise: the most probable coefficients, if both are normal. A weak pull to the guess keeps the others on
    which the residuals hardly depend from running away.
    """
    rng = np.random.default_rng(0)
    size = len(guess)
    best, damping = guess, 1.0
    noise = _noise(residuals(guess[None])[0], size)

    def loss(at: Float[np.ndarray, "candidate coefficient"]) -> Float[np.ndarray, "candidate"]:
        unusual = noise * np.square(usual.off(at)).sum(1)
        return np.square(residuals(at)).sum(1) + unusual + _PULL * np.square(at - guess).sum(1)

    for scan in scans if memory.any() else scans[:1]:
        best = _scan_memory(loss, best, memory, [scan])
        for _ in range(rounds):
            error, jacobian = _linearised(residuals, best)
            noise = _noise(error, size)
            off = usual.off(best)
            least = np.square(error).sum() + noise * np.square(off).sum() + _PULL * np.square(best - guess).sum()
            square = jacobian.T @ jacobian + noise * usual.rows.T @ usual.rows + _PULL * np.eye(size)
            downhill = -jacobian.T @ error - noise * usual.rows.T @ off - _PULL * (best - guess)
            dampings = damping * np.logspace(-2, 2, _SHORTER)
            steps = [np.linalg.solve(square + d * np.diag(np.diag(square)), downhill) for d in dampings]
            # As uncertain as the linear model says that the minimum is, and up to a tenth of that.
            spread = np.linalg.cholesky(np.linalg.inv(square) * least / max(len(error) - size, 1))
            drawn = rng.standard_normal((_DRAWN, size)) @ spread.T * np.geomspace(1, 0.1, _DRAWN)[:, None]
            drawn[::2] += steps[0]
            at = best + np.clip(np.concatenate([steps, drawn]), -1.5, 1.5)
            after = loss(at)
            chosen = int(after.argmin())
            damping = float(np.clip(damping * (0.3 if chosen < _SHORTER // 2 else 2.0), 1e-4, 1e2))
            if after[chosen] < least:
                best = at[chosen]
    return best


def _scan_memory(
    loss: Callable[[np.ndarray], np.ndarray],
    best: Float[np.ndarray, "coefficient"],
    memory: Bool[np.ndarray, "coefficient"],
    scans: Sequence[tuple[float, float]],
) -> Float[np.ndarray, "coefficient"]:
    """Return the best with the memory of least loss; unchanged if memory is not fitted."""
    for least, most in scans if memory.any() else ():
        at = best + np.log(np.geomspace(least, most, _TRIED))[:, None] * memory
        at[0] = best
        best = at[loss(at).argmin()]
    return best


def _linearised(
    residuals: Callable[[np.ndarray], np.ndarray], at: Float[np.ndarray, "coefficient"]
) -> tuple[Float[np.ndarray, "residual"], Float[np.ndarray, "residual coefficient"]]:
    """Return the residuals and their Jacobian."""
    error = residuals(at + np.concatenate([np.zeros((1, len(at))), _STEP * np.eye(len(at))]))
    return error[0], (error[1:] - error[0]).T / _STEP


def _noise(error: Float[np.ndarray, "residual"], size: int) -> float:
    """Variance of a residual that was worth as much as if all were independent.

    A request is wrong as those before it are, because it waits for them: residuals that are correlated from one request
    to the next by r are worth (1 - r) / (1 + r) of as many independent ones.
    """
    of_kind = error.reshape(2, -1)
    correlation = float((of_kind[:, 1:] * of_kind[:, :-1]).sum() / max(np.square(error).sum(), 1e-12))
    correlation = min(max(correlation, 0.0), 0.99)
    variance = float(np.square(error).sum()) / max(len(error) - size, 1) * (1 + correlation) / (1 - correlation)
    # A perfect fit is still no better than float32.
    return max(variance, 1e-8)


def _covariance(
    jacobian: Float[np.ndarray, "residual coefficient"], error: Float[np.ndarray, "residual"], usual: _Usual
) -> Float[np.ndarray, "coefficient coefficient"]:
    """Return that of the log coefficients, by the linear model; infinite for what nothing depends on."""
    noise = _noise(error, jacobian.shape[1])
    square = jacobian.T @ jacobian / noise + usual.rows.T @ usual.rows
    matters = (np.square(jacobian).sum(0) > 1e-8 * len(error)) | (np.square(usual.rows).sum(0) > 0)
    kept = np.ix_(matters, matters)
    covariance = np.diag(np.where(matters, 0.0, np.inf))
    covariance[kept] = np.linalg.pinv(square[kept])
    return covariance
