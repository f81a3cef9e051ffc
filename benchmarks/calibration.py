"""Calibration by the length of the log: time, peak memory, and how far the coefficients are from the true ones.

`python -m benchmarks.calibration [--quick] [--rates QUIET BUSY]` lets the simulator serve synthetic requests, quiet and
busy by turns, and fits an expert to each log in a process of its own; it writes outputs/benchmarks/calibration.json.
"""

from __future__ import annotations

import argparse
import time

import numpy as np
from rich.table import Table

from benchmarks.measure import in_own_process, peak_memory
from benchmarks.publish import publish
from jaxroute.fitting import Limits, ServingLog, calibrate
from jaxroute.fitting.server import serve
from jaxroute.serving import Site
from jaxroute.serving.engine import idle_site
from jaxroute.serving.site import check_site

TRUE = {
    "weight_load": 0.017,
    "compute_per_token": 9e-5,
    "decode_per_seq": 1.5e-4,
    "attention_per_token": 1.4e-7,
    "kv_capacity": 41408,
}
"""An 8B model on an RTX 4090."""
SPELL = 500  # requests until the rate changes
LENGTHS = (300, 20_000, 200_000)
RATES = (2.0, 6.0)  # requests/s: an idle and a busy server


def serving_log(num_requests: int, limits: Limits, rates: tuple[float, float]) -> ServingLog:
    """Draw requests, and let the true server serve them."""
    rng = np.random.default_rng(0)
    rate = np.array(rates)[np.arange(num_requests) // SPELL % 2]
    arrival = np.cumsum(rng.exponential(size=num_requests) / rate)
    prompt = np.clip(rng.lognormal(6.0, 1.0, num_requests), 8, 4000).astype(np.int32)
    output = np.clip(rng.lognormal(5.0, 0.8, num_requests), 1, 2000).astype(np.int32)
    given = {
        "iteration_overhead": 0.0,
        "max_num_seqs": limits.max_num_seqs,
        "max_num_batched_tokens": limits.max_num_batched_tokens,
        "max_waiting": num_requests,
        "network_delay": 0.0,
    }
    site = check_site(Site(**{name: np.array([value]) for name, value in (TRUE | given).items()}))
    gaps = np.diff(arrival, prepend=arrival[0]).astype(np.float32)
    outcomes = serve(site, idle_site(1, 2 * limits.max_num_seqs), gaps, prompt, output)
    ttft, latency = (np.asarray(column[:, 0], np.float64) for column in (outcomes.ttft, outcomes.latency))
    return ServingLog(arrival, arrival + ttft, arrival + latency, prompt.astype(np.int64), output.astype(np.int64))


def measure(num_requests: int, rates: tuple[float, float]) -> dict[str, float]:
    """Fit to a log of this length."""
    limits = Limits()
    log = serving_log(num_requests, limits, rates)
    started = time.perf_counter()
    fit = calibrate(log, limits)
    seconds = time.perf_counter() - started
    off = {name: abs(fit.coefficients[name] / value - 1) for name, value in TRUE.items()}
    means = {f"mean {name}": abs(simulated / measured - 1) for name, (measured, simulated) in fit.means.items()}
    return {"seconds": seconds, "memory": peak_memory(), "compared": fit.num_compared, **off, **means}


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="a short log only")
    parser.add_argument(
        "--rates", nargs=2, type=float, default=RATES, metavar=("QUIET", "BUSY"), help="requests/s; 3 9 is an overload"
    )
    options = parser.parse_args()
    rates = tuple(options.rates)
    lengths = LENGTHS[:1] if options.quick else LENGTHS
    rows = {length: in_own_process(measure, length, rates) for length in lengths}
    table = Table("requests", "compared", "s", "peak memory, MB", *TRUE, "mean TTFT", "mean E2E")
    for length, row in rows.items():
        off = [f"{row[name]:.1%}" for name in (*TRUE, "mean TTFT", "mean E2E")]
        table.add_row(
            f"{length:,}", f"{row['compared']:,}", f"{row['seconds']:.0f}", f"{row['memory'] / 1e6:.0f}", *off
        )
    figures = {}
    for length, row in rows.items():
        figures |= {f"{length} requests, s": row["seconds"], f"{length} requests, MB": row["memory"] / 1e6}
    publish("calibration", table, {"rows": rows}, figures, remember=not options.quick and rates == RATES)


if __name__ == "__main__":
    main()
