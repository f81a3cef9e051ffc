"""Fit an expert to a serving log: the coefficients with which a replay comes closest to what was measured.

A first guess is read off the log without a replay. From there Levenberg-Marquardt searches over the logarithms of the
coefficients. A replay is exact but has no gradient, so the Jacobian is taken by differences; all replays of a round run
side by side in one program, compiled once a log.
"""

from __future__ import annotations

import csv
import gzip
import json
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Float64, Int
from scipy.optimize import least_squares

from jaxroute.errors import UserError
from jaxroute.serving.playback import replay_program
from jaxroute.serving.site import Site
from jaxroute.tables import json_object

MIN_REQUESTS = 30
COEFFICIENTS = ("weight_load", "compute_per_token", "decode_per_seq", "attention_per_token", "kv_capacity")
"""What is fitted, in s and tokens as in `Site`."""

# Names of the columns: those of `ServingLog`, and what others call them.
_COLUMNS = {
    "arrival_time": ("arrival_time", "queued_ts"),
    "first_token_time": ("first_token_time", "first_token_ts"),
    "last_token_time": ("last_token_time", "last_token_ts"),
    "prompt_tokens": ("prompt_tokens", "input_toks"),
    "output_tokens": ("output_tokens", "output_toks"),
}
# Relative steps of the differences: as large as a replay's reaction to them is still linear.
_STEP = 0.01
# Memory is tried between two factors of the best so far, ever closer; each time so many rounds of steps follow.
_MEMORY = ((0.5, 1.2), (0.9, 1.1), (0.97, 1.03))
_ROUNDS = 6
# Steps tried in a round: some shorter than the linear one, some drawn around it.
_SHORTER, _DRAWN = 4, 12
_TRIED = _SHORTER + _DRAWN
# Weight of the guess: little, and enough where the residuals say nothing.
_PULL = 1e-5
# First tokens of one iteration reach a log within this time, s.
_TOGETHER = 1e-4
# A coefficient is said to be undetermined from this relative standard error on.
_UNCERTAIN = 0.25
_MOST = 2**24


class ServingLog(NamedTuple):
    """Requests that an expert has served, in order of arrival; times in s on one clock."""

    arrival_time: Float64[np.ndarray, "request"]
    first_token_time: Float64[np.ndarray, "request"]
    last_token_time: Float64[np.ndarray, "request"]
    prompt_tokens: Int[np.ndarray, "request"]
    output_tokens: Int[np.ndarray, "request"]

    @property
    def ttft(self) -> Float64[np.ndarray, "request"]:
        """Time to first token, s."""
        return self.first_token_time - self.arrival_time

    @property
    def latency(self) -> Float64[np.ndarray, "request"]:
        """Time to the last token, s."""
        return self.last_token_time - self.arrival_time


@dataclass(frozen=True)
class Limits:
    """What is known of the server: vLLM's options, and what of the iteration is overhead."""

    max_num_seqs: int = 256
    max_num_batched_tokens: int = 2048
    iteration_overhead: float = 0.0
    kv_capacity: int | None = None
    """Tokens; fitted if None."""


class Calibration(NamedTuple):
    """A fitted expert, and how well it explains the log."""

    coefficients: dict[str, float]
    """By name, with `iteration_overhead`."""
    standard_error: dict[str, float]
    """Relative, of each coefficient; infinite where the log says nothing about it, nan where it was given."""
    num_fitted: int
    """Requests, the earliest, whose measured times were used."""
    means: dict[str, tuple[float, float]]
    """Mean TTFT, TPOT and E2E of the other requests, s: measured, simulated."""
    ttft: Float[np.ndarray, "request"]
    """Simulated, of all requests."""
    latency: Float[np.ndarray, "request"]

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

    Arrivals and token counts of all requests go into the replay, as later ones slow earlier ones.

    Raises:
        UserError: too few requests for either part.
    """
    num_fitted = int(len(log.arrival_time) * share)
    if min(num_fitted, len(log.arrival_time) - num_fitted) < MIN_REQUESTS // 3:
        raise UserError(
            f"share={share:g} of {len(log.arrival_time)} requests leaves too few to fit or to judge; "
            f"each part needs {MIN_REQUESTS // 3}"
        )
    names = [name for name in COEFFICIENTS if name != "kv_capacity" or limits.kv_capacity is None]
    simulate = _simulator(log, limits, names)
    measured = np.stack([log.ttft, log.latency - log.ttft])[:, :num_fitted]
    # Relative errors, but of short times in terms of the mean: means are what has to agree.
    scale = measured + 0.3 * measured.mean(1, keepdims=True) + 1e-3

    def residuals(candidates: Float[np.ndarray, "candidate coefficient"]) -> Float[np.ndarray, "candidate residual"]:
        ttft, latency = simulate(candidates)
        simulated = np.stack([ttft, latency - ttft], axis=1)[:, :, :num_fitted]
        return ((simulated - measured) / scale).reshape(len(candidates), -1)

    guess = _first_guess(log, limits, names, num_fitted)
    memory = np.array(names) == "kv_capacity"
    best, jacobian, error = _search(residuals, guess, memory)
    standard_error = dict.fromkeys(COEFFICIENTS, math.nan)
    standard_error |= dict(zip(names, _standard_errors(jacobian, error), strict=True))
    found = np.exp(best)
    if limits.kv_capacity is None and math.isinf(standard_error["kv_capacity"]):
        found[-1] = _most_held(log)
    ttft, latency = (column[0] for column in simulate(np.log(found)[None]))
    coefficients = {"iteration_overhead": limits.iteration_overhead} | dict(zip(names, found.tolist(), strict=True))
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
        {name: (float(pair[0]), float(pair[1])) for name, pair in means.items()},
        ttft,
        latency,
    )


def _simulator(
    log: ServingLog, limits: Limits, names: list[str]
) -> Callable[[Float[np.ndarray, "candidate coefficient"]], tuple[np.ndarray, np.ndarray]]:
    """Return a function from log coefficients to TTFT and latency, `(candidate, request)`; few candidates at a time."""
    gaps = np.diff(log.arrival_time, prepend=log.arrival_time[:1]).astype(np.float32)
    prompts, outputs = (np.asarray(column, np.int32)[:, None] for column in (log.prompt_tokens, log.output_tokens))
    num_slots = 1 << (len(gaps) - 1).bit_length()

    def one(log_values: Float[Array, "coefficient"]) -> tuple[Array, Array]:
        values = dict(zip(names, jnp.exp(log_values), strict=True))
        kv_capacity = values.pop("kv_capacity", jnp.float32(limits.kv_capacity or 0))
        # Room for the longest request, whatever the search tries: none is turned away.
        least = int((prompts + outputs).max())
        site = Site(
            iteration_overhead=jnp.full(1, limits.iteration_overhead, jnp.float32),
            **{name: value[None] for name, value in values.items()},
            max_num_seqs=jnp.full(1, min(limits.max_num_seqs, num_slots), jnp.int32),
            max_num_batched_tokens=jnp.full(1, limits.max_num_batched_tokens, jnp.int32),
            max_waiting=jnp.full(1, num_slots, jnp.int32),
            kv_capacity=jnp.clip(jnp.round(kv_capacity), least, _MOST).astype(jnp.int32)[None],
            network_delay=jnp.zeros(1),
        )
        _, ttft, latency, _ = replay_program(site, num_slots, gaps, prompts, outputs, np.zeros(len(gaps), np.int32))
        return ttft, latency

    compiled = jax.jit(jax.vmap(one))

    def simulate(candidates: Float[np.ndarray, "candidate coefficient"]) -> tuple[np.ndarray, np.ndarray]:
        # Always as many at a time, so that there is one program.
        padded = np.resize(candidates, (_TRIED, candidates.shape[1])).astype(np.float32)
        ttft, latency = compiled(padded)
        return np.asarray(ttft, np.float64)[: len(candidates)], np.asarray(latency, np.float64)[: len(candidates)]

    return simulate


def _first_guess(
    log: ServingLog, limits: Limits, names: list[str], num_fitted: int
) -> Float[np.ndarray, "coefficient"]:
    """Return log coefficients that explain how long answers took, given what the log says went on beside them.

    No replay yet, in which one late request would delay all that follow: how many others decoded beside an answer, on
    how many tokens of context, and which prompts were prefilled meanwhile, is taken from the measured times.
    """
    fitted = slice(None, num_fitted)
    first, last = log.first_token_time, log.last_token_time
    tokens, ttft, duration = log.output_tokens[fitted], log.ttft[fitted], (last - first)[fitted]
    times = np.unique(np.concatenate([first, last]))
    middle, width = (times[1:] + times[:-1]) / 2, np.diff(times)
    decoding = (first[:, None] <= middle) & (middle < last[:, None])
    context = (decoding * (log.prompt_tokens[:, None] + _progress(log, middle) * log.output_tokens[:, None])).sum(0)
    beside = decoding[fitted] * width
    beside /= np.maximum(beside.sum(1, keepdims=True), 1e-9)
    mean_batch, mean_context = beside @ decoding.sum(0), beside @ context
    # Prompts whose first tokens come together were prefilled together, in chunks.
    moments, which = np.unique(np.round(first / _TOGETHER), return_inverse=True)
    moments, prefilled = moments * _TOGETHER, np.bincount(which, log.prompt_tokens)
    meanwhile = (moments > first[fitted, None] + _TOGETHER) & (moments <= last[fitted, None] + _TOGETHER)
    # Who meets an idle engine waits for its own prefill alone.
    others = (log.arrival_time < first[fitted, None]) & (last > log.arrival_time[fitted, None])
    alone, answered = others.sum(1) == 1, tokens > 1

    def prefill(prompt: np.ndarray, compute: float, weights: float) -> tuple[np.ndarray, np.ndarray]:
        """Iterations, and seconds by which computing makes them longer than loading the weights."""
        full, rest = np.divmod(prompt, limits.max_num_batched_tokens)
        longer = full * max(compute * limits.max_num_batched_tokens - weights, 0.0)
        return full + (rest > 0), longer + (rest > 0) * np.maximum(compute * rest - weights, 0)

    def errors(logs: Float[np.ndarray, "coefficient"]) -> Float[np.ndarray, "error"]:
        weights, compute, per_sequence, per_token = np.exp(logs)
        iteration = limits.iteration_overhead + weights + per_sequence * mean_batch + per_token * mean_context
        of_answers = (tokens - 1) * iteration + meanwhile @ prefill(prefilled, compute, weights)[1]
        count, longer = prefill(log.prompt_tokens[fitted], compute, weights)
        of_first_tokens = count * (limits.iteration_overhead + weights) + longer
        return np.concatenate(
            [
                (of_answers[answered] - duration[answered]) / (duration[answered] + 1e-3),
                (of_first_tokens[alone] - ttft[alone]) / (ttft[alone] + 1e-3),
                # What the log says nothing about stays where it started.
                1e-2 * (logs - typical),
            ]
        )

    tpot = duration[answered] / (tokens[answered] - 1)
    fastest = float(np.quantile(tpot, 0.05)) if answered.any() else 0.02
    weight_load = max(0.8 * fastest - limits.iteration_overhead, 1e-5)
    compute = float(np.clip(np.quantile(ttft / log.prompt_tokens[fitted], 0.05), 1e-7, 1e-2))
    # Decoding as it is, as a part of the weights', on the accelerators of configs/site.
    typical = np.log([weight_load, compute, 2e-3 * weight_load, 1e-5 * weight_load])
    # Answers that were preempted took longer for another reason: large errors count little more than small ones.
    fits = [
        least_squares(errors, typical + np.log(start), loss="soft_l1", f_scale=0.02)
        for start in ([1, 1, 1, 1], [0.6, 1, 10, 10], [1, 1, 20, 1])
    ]
    values = dict(zip(COEFFICIENTS, min(fits, key=lambda fit: fit.cost).x, strict=False))
    return np.array([values.get(name, math.log(_most_held(log))) for name in names])


def _progress(log: ServingLog, times: Float[np.ndarray, "time"]) -> Float[np.ndarray, "request time"]:
    """Share of each answer that existed at each time, had its tokens come evenly."""
    first, last = log.first_token_time[:, None], log.last_token_time[:, None]
    return np.clip((times - first) / np.maximum(last - first, 1e-9), 0, 1)


def _most_held(log: ServingLog) -> float:
    """The most KV tokens that decoding requests seem to have held together, if none was preempted."""
    first, last = log.first_token_time[:, None], log.last_token_time[:, None]
    times = np.unique(np.concatenate([first, last]))
    tokens = log.prompt_tokens[:, None] + _progress(log, times) * log.output_tokens[:, None]
    held = (tokens * ((times >= first) & (times <= last))).sum(0)
    return float(np.clip(held.max(), (log.prompt_tokens + log.output_tokens).max(), _MOST))


def _search(
    residuals: Callable[[np.ndarray], np.ndarray],
    guess: Float[np.ndarray, "coefficient"],
    memory: Bool[np.ndarray, "coefficient"],
) -> tuple[Float[np.ndarray, "coefficient"], Float[np.ndarray, "residual coefficient"], Float[np.ndarray, "residual"]]:
    """Minimise the sum of squares from the guess, and return where, with the Jacobian and the residuals there.

    Levenberg-Marquardt, with draws from around each step, as the loss is smooth only from afar: who is admitted or
    preempted when changes at once. A weak pull to the guess keeps coefficients on which the residuals hardly depend
    from running away.
    """
    rng = np.random.default_rng(0)
    size = len(guess)
    best, damping = guess, 1.0
    neighbours = np.concatenate([np.zeros((1, size)), _STEP * np.eye(size)])

    def tried(at: Float[np.ndarray, "candidate coefficient"]) -> tuple[np.ndarray, np.ndarray]:
        error = residuals(at)
        return error, np.square(error).sum(1) + _PULL * np.square(at - guess).sum(1)

    for least, most in _MEMORY if memory.any() else _MEMORY[:1]:
        if memory.any():
            at = best + np.log(np.geomspace(least, most, _TRIED))[:, None] * memory
            at[0] = best
            best = at[tried(at)[1].argmin()]
        for _ in range(_ROUNDS):
            error, losses = tried(best + neighbours)
            jacobian = (error[1:] - error[0]).T / _STEP
            square = jacobian.T @ jacobian + _PULL * np.eye(size)
            downhill = -jacobian.T @ error[0] - _PULL * (best - guess)
            dampings = damping * np.logspace(-2, 2, _SHORTER)
            steps = [np.linalg.solve(square + d * np.diag(np.diag(square)), downhill) for d in dampings]
            # As uncertain as the linear model says that the minimum is, and up to a tenth of that.
            spread = np.linalg.cholesky(np.linalg.inv(square) * losses[0] / max(error.shape[1] - size, 1))
            drawn = rng.standard_normal((_DRAWN, size)) @ spread.T * np.geomspace(1, 0.1, _DRAWN)[:, None]
            drawn[::2] += steps[0]
            at = best + np.clip(np.concatenate([steps, drawn]), -1.5, 1.5)
            after = tried(at)[1]
            chosen = int(after.argmin())
            damping = float(np.clip(damping * (0.3 if chosen < _SHORTER // 2 else 2.0), 1e-4, 1e2))
            if after[chosen] < losses[0]:
                best = at[chosen]
    error = residuals(best + neighbours)
    return best, (error[1:] - error[0]).T / _STEP, error[0]


def _standard_errors(
    jacobian: Float[np.ndarray, "residual coefficient"], error: Float[np.ndarray, "residual"]
) -> list[float]:
    """Of the log coefficients, by the linear model; infinite for what changes nothing.

    A request is wrong as those before it are, because it waits for them: residuals that are correlated from one request
    to the next by r are worth (1 - r) / (1 + r) of as many independent ones.
    """
    matters = np.square(jacobian).sum(0) > 1e-8 * len(error)
    kept = jacobian[:, matters]
    of_kind = error.reshape(2, -1)
    correlation = float((of_kind[:, 1:] * of_kind[:, :-1]).sum() / max(np.square(error).sum(), 1e-12))
    correlation = min(max(correlation, 0.0), 0.99)
    variance = float((error**2).sum()) / max(len(error) - kept.shape[1], 1) * (1 + correlation) / (1 - correlation)
    # A perfect fit is still no better than float32.
    covariance = np.linalg.pinv(kept.T @ kept) * max(variance, 1e-8)
    known = iter(np.sqrt(np.diag(covariance)).tolist())
    return [next(known) if matter else math.inf for matter in matters]


# --- reading logs -------------------------------------------------------------------------------------------


def read_log(path: str | Path) -> ServingLog:
    """Read a log: CSV or JSON lines with a row per request, or what `vllm bench serve --save-detailed` has written.

    Rows need arrival_time (or queued_ts), first_token_time (first_token_ts), last_token_time (last_token_ts), in s on
    one clock, prompt_tokens (input_toks) and output_tokens (output_toks). A name that ends in .gz is decompressed.

    Raises:
        UserError: it cannot be read, a row is incomplete or impossible, or there are fewer than 30 requests.
    """
    path = Path(path)
    try:
        raw = path.read_bytes()
        text = (gzip.decompress(raw) if path.suffix == ".gz" else raw).decode()
    except (OSError, EOFError, UnicodeDecodeError) as error:
        raise UserError(
            f"{path} cannot be read ({error}); give a CSV, JSON or JSON lines file, or .gz of one"
        ) from None
    rows = list(_rows(path, text))
    if len(rows) < MIN_REQUESTS:
        raise UserError(f"{path} has {len(rows)} requests; a calibration needs at least {MIN_REQUESTS}")
    table = np.array([values for _, values in rows])
    where = [place for place, _ in rows]
    arrival, first, last, prompt, output = table.T
    backwards = np.diff(arrival, prepend=arrival[0]) < -60
    checks = {
        "arrives more than a minute before the row above it: has the clock jumped?": backwards,
        "has its first token before it arrives": first < arrival,
        "has its last token before its first": last < first,
        "has a time, or a number of tokens, that is not finite": ~np.isfinite(table).all(1),
        "has a negative time": (table[:, :3] < 0).any(1),
        "needs at least 1 prompt and 1 output token": (prompt < 1) | (output < 1),
    }
    for what, bad in checks.items():
        if bad.any():
            raise UserError(f"{path}:{where[int(np.argmax(bad))]}: the request {what}; correct or delete it")
    order = np.argsort(arrival, kind="stable")
    start = arrival.min()
    return ServingLog(
        *(column[order] - start for column in (arrival, first, last)),
        *(column[order].astype(np.int64) for column in (prompt, output)),
    )


def _rows(path: Path, text: str) -> Iterator[tuple[str, list[float]]]:
    """Yield each request's place in the file and its five numbers."""
    name = path.name.removesuffix(".gz")
    if name.endswith(".json"):
        yield from _vllm_rows(path, text)
        return
    if name.endswith(".csv"):
        reader = csv.DictReader(text.splitlines())
        records = ((str(reader.line_num), record) for record in reader)
    else:
        lines = enumerate(text.splitlines(), 1)
        records = ((str(number), json_object(line, f"{path}:{number}")) for number, line in lines if line.strip())
    for place, record in records:
        values = []
        for column, names in _COLUMNS.items():
            # The engine's own clock, where a row has it, is that of the other times.
            value = next((record[known] for known in reversed(names) if record.get(known) not in (None, "")), None)
            if value is None:
                raise UserError(f"{path}:{place}: {column} is missing; a row needs {', '.join(_COLUMNS)}")
            try:
                values.append(float(value))
            except (TypeError, ValueError):
                raise UserError(
                    f"{path}:{place}: {column}={value!r} is not a number; correct or delete the row"
                ) from None
        yield place, values


def _vllm_rows(path: Path, text: str) -> Iterator[tuple[str, list[float]]]:
    """The result of vLLM's serving benchmark: a list per figure, with an entry per request."""
    try:
        result = json.loads(text)
    except json.JSONDecodeError as error:
        raise UserError(f"{path}: not JSON ({error.msg})") from None
    needed = ("start_times", "ttfts", "itls", "input_lens", "output_lens")
    if not isinstance(result, dict) or (missing := [name for name in needed if name not in result]):
        lacks = "a JSON object" if not isinstance(result, dict) else ", ".join(missing)
        raise UserError(f"{path}: {lacks} missing; record it with vllm bench serve --save-result --save-detailed")
    columns = [result[name] for name in needed]
    if len({len(column) for column in columns}) > 1:
        raise UserError(f"{path}: {', '.join(needed)} differ in length; record it again")
    for number, (start, ttft, gaps, prompt, output) in enumerate(zip(*columns, strict=True)):
        if output > 0:  # vLLM notes a request that failed without output
            yield f"request {number}", [start, start + ttft, start + ttft + sum(gaps), prompt, output]


# --- profile tables -----------------------------------------------------------------------------------------


def fit_profile(path: str | Path, limits: Limits) -> tuple[dict[str, float], dict[str, float]]:
    """Fit to a profile, a CSV with columns batch, context, prompt, ms: one iteration a row.

    `batch` sequences decode with `context` tokens among them, or `prompt` tokens are computed. Returns coefficients and
    their relative standard errors; memory is not in it, so `limits.kv_capacity` must be given.

    Raises:
        UserError: a column or number is missing, or rows do not determine the coefficients.
    """
    path = Path(path)
    with path.open(newline="") as file:
        reader = csv.DictReader(file)
        if missing := {"batch", "context", "prompt", "ms"} - set(reader.fieldnames or ()):
            raise UserError(
                f"{path}:1: no column {', '.join(sorted(missing))}; a profile has batch, context, prompt, ms"
            )
        rows = []
        for record in reader:
            try:
                rows.append([float(record[name]) for name in ("batch", "context", "prompt", "ms")])
            except (TypeError, ValueError):
                raise UserError(f"{path}:{reader.line_num}: not four numbers; correct or delete the row") from None
            if min(rows[-1]) < 0 or not np.isfinite(rows[-1]).all() or rows[-1][3] == 0:
                raise UserError(f"{path}:{reader.line_num}: negative, infinite, or 0 ms; correct or delete the row")
    if limits.kv_capacity is None:
        raise UserError(f"{path}: a profile says nothing about memory; give --kv-capacity")
    batch, context, prompt, seconds = np.array(rows or np.zeros((0, 4))).T * np.array([[1], [1], [1], [1e-3]])
    decode, prefill = prompt == 0, (prompt > 0) & (batch == 0)
    design = np.stack([np.ones(decode.sum()), batch[decode], context[decode]], axis=1)
    if np.linalg.matrix_rank(design) < 3:
        raise UserError(f"{path}: rows with prompt=0 must differ in batch and in context, three at least")
    floor, per_sequence, per_token = _non_negative(design, seconds[decode])
    # What takes no longer than the weights is bound by them and says nothing about computing.
    bound = prefill & (seconds > 1.2 * floor)
    if not bound.any():
        raise UserError(f"{path}: no row with batch=0 and enough prompt tokens to take longer than loading the weights")
    compute = float(
        (prompt[bound] * (seconds[bound] - limits.iteration_overhead)).sum() / np.square(prompt[bound]).sum()
    )
    coefficients = {
        "iteration_overhead": limits.iteration_overhead,
        "weight_load": max(floor - limits.iteration_overhead, 1e-6),
        "compute_per_token": compute,
        "decode_per_seq": per_sequence,
        "attention_per_token": per_token,
        "kv_capacity": float(limits.kv_capacity),
    }
    error = design @ np.array([floor, per_sequence, per_token]) - seconds[decode]
    spread = np.sqrt(np.diag(np.linalg.inv(design.T @ design)) * np.square(error).sum() / max(len(error) - 3, 1))
    of_compute = float(np.std(compute * prompt[bound] - seconds[bound]) / np.sqrt(np.square(prompt[bound]).sum()))
    errors = dict.fromkeys(COEFFICIENTS, math.nan) | {"compute_per_token": of_compute / compute}
    for name, value, deviation in zip(
        ("weight_load", "decode_per_seq", "attention_per_token"), (floor, per_sequence, per_token), spread, strict=True
    ):
        errors[name] = float(deviation / value) if value > 0 else math.inf
    return coefficients, errors


def _non_negative(design: np.ndarray, target: np.ndarray) -> list[float]:
    """Least squares without negative coefficients: those that would be are left out one by one."""
    kept = list(range(design.shape[1]))
    while True:
        solution = np.linalg.lstsq(design[:, kept], target, rcond=None)[0]
        if (solution >= 0).all() or len(kept) == 1:
            values = np.zeros(design.shape[1])
            values[kept] = np.maximum(solution, 0)
            return values.tolist()
        kept.pop(int(np.argmin(solution)))
