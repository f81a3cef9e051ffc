"""How reliable the action impact estimator is: what it said of a request when it was routed, and what came of it.

`python -m benchmarks.reliability [--quick]` lets two rules route test prompts from half to three times the usual load,
prints a table in Markdown, and writes outputs/benchmarks/reliability.json and a reliability diagram, reliability.png.
Requests that were accepted and have ended count.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray
from matplotlib.figure import Figure
from rich import box
from rich.table import Table

from benchmarks.publish import OUTPUTS, publish
from jaxroute.config import load_config
from jaxroute.devices import use_compilation_cache
from jaxroute.env import EdgeRouting, EnvParams
from jaxroute.evaluation.episodes import episode_keys, keys_of_episode
from jaxroute.plotting import REFERENCE_COLOUR, expert_colours, png_bytes
from jaxroute.policies import RULES, Policy
from jaxroute.scenarios import build_env

ROUTERS = ("impact_greedy", "shortest_queue")
LOADS = (0.5, 1.0, 1.5, 2.0, 3.0)
SITES = {"edge6": 8.0, "edge6_large": 40.0}
"""The usual rate of each, requests/s."""
NUM_BINS = 10


class Routed(NamedTuple):
    """Requests that were accepted and have ended: what was predicted of each when it was routed, and what happened."""

    predicted_in_time: Float[np.ndarray, "request"]
    predicted_ttft: Float[np.ndarray, "request"]
    """s, at the expert."""
    predicted_tpot: Float[np.ndarray, "request"]
    """s."""
    in_time: Bool[np.ndarray, "request"]
    ttft: Float[np.ndarray, "request"]
    """s, at the expert."""
    tpot: Float[np.ndarray, "request"]
    """s; NaN where the answer has a single token."""


def routed_requests(
    env: EdgeRouting,
    params: EnvParams,
    routers: Sequence[str],
    rates: Sequence[float],
    *,
    episodes: int,
    requests: int,
    seconds: float = 60.0,
    seed: int = 0,
) -> dict[tuple[str, float], Routed]:
    """Let each rule route the same episodes at each rate, side by side.

    Args:
        env: the environment.
        params: its parameters; their rate is not used.
        routers: names of rules.
        rates: requests/s.
        episodes: number of episodes for each rule and rate.
        requests: that count, in each episode.
        seconds: time before them, in which the site fills, and after them, in which they come to an end; what is still
            in flight then does not count.
        seed: of the episodes.
    """
    grid = [(router, rate) for router in routers for rate in rates]
    which = jnp.repeat(jnp.asarray([routers.index(router) for router, _ in grid]), episodes)
    low_high = jnp.repeat(jnp.asarray([[rate, rate] for _, rate in grid], jnp.float32), episodes, axis=0)
    keys = jnp.tile(episode_keys(seed, episodes), len(grid))
    policies = tuple(RULES[router] for router in routers)
    num_steps = requests + 2 * round(seconds * max(rates))
    tables = np.asarray(_episodes(env, policies, num_steps, params, low_high, keys, which))
    by_name = {}
    for name, table in zip(grid, np.split(tables, len(grid)), strict=True):
        first = round(seconds * name[1])
        table = table[:, first : first + requests].reshape(-1, tables.shape[-1])
        _, _, *columns = table[(table[:, 0] > 0) & (table[:, 1] > 0)].T
        routed = Routed(*columns)
        by_name[name] = routed._replace(in_time=routed.in_time > 0)
    return by_name


def _episodes(
    env: EdgeRouting,
    policies: tuple[Policy, ...],
    num_steps: int,
    params: EnvParams,
    low_high: Float[Array, "episode 2"],
    keys: PRNGKeyArray,
    which: Int[Array, "episode"],
) -> Float[Array, "episode row column"]:
    """Return a row for each request: whether it was accepted, whether it has ended, and the columns of `Routed`."""

    @jax.jit
    @partial(jax.vmap, in_axes=(None, 0, 0, 0))
    def play(params: EnvParams, low_high: Array, key: PRNGKeyArray, which: Array) -> Array:
        params = params._replace(rate=low_high)
        key_reset, step_keys = keys_of_episode(key, num_steps)
        obs, state = env.reset(key_reset, params)

        def step(carry: tuple, key: PRNGKeyArray) -> tuple[tuple, None]:
            obs, state, table = carry
            key_action, key_env = jax.random.split(key)
            actions = [policy.act(policy.params, obs, key_action, policy.memory)[0] for policy in policies]
            action = jnp.stack(actions)[which]
            impact = jax.tree.map(lambda of_expert: of_expert[action], obs.candidates.impact)
            row = state.request.number
            obs, state, _, _, _, info = env.step(key_env, state, action, params)
            predicted = jnp.stack([~info["rejected"], 0.0, impact.in_time, impact.ttft, impact.tpot])
            table = table.at[row, : len(predicted)].set(predicted)
            ended = info["ended"]
            rows = jnp.where(ended, info["request"], num_steps)
            tokens_after_first = info["output_tokens"] - 1
            tpot = jnp.where(
                tokens_after_first > 0,
                (info["latency"] - info["ttft"]) / jnp.maximum(tokens_after_first, 1),
                jnp.nan,
            )
            # The estimator's time to first token is the expert's: without the way back.
            ttft = info["ttft"] - params.site.network_delay
            outcome = jnp.stack([info["in_time"].astype(jnp.float32), ttft, tpot], axis=-1)
            table = table.at[rows, 1].set(1.0).at[rows, len(predicted) :].set(outcome)
            return (obs, state, table), None

        table = jnp.zeros((num_steps + 1, 2 + len(Routed._fields)), jnp.float32)
        return jax.lax.scan(step, (obs, state, table), step_keys)[0][2]

    return play(params, low_high, keys, which)


def reliability(routed: Routed) -> dict[str, Float[np.ndarray, "bin"]]:
    """Return per bin of predicted probability the number of requests, and the mean predicted and observed share."""
    bins = np.minimum((routed.predicted_in_time * NUM_BINS).astype(int), NUM_BINS - 1)
    count = np.bincount(bins, minlength=NUM_BINS)
    some = np.maximum(count, 1)
    predicted = np.bincount(bins, routed.predicted_in_time, NUM_BINS) / some
    observed = np.bincount(bins, routed.in_time, NUM_BINS) / some
    return {"count": count, "predicted": predicted, "observed": observed}


def summary(routed: Routed) -> dict[str, float]:
    """Return calibration in the large, expected calibration error, Brier score, and the bias of both times.

    The expected calibration error is the mean over the bins of |predicted - observed share|, weighted by their counts.
    """
    bins = reliability(routed)
    several = np.isfinite(routed.tpot)
    tpot, predicted_tpot = routed.tpot[several], routed.predicted_tpot[several]
    figures = {
        "requests": len(routed.in_time),
        "predicted_in_time": routed.predicted_in_time.mean(),
        "in_time": routed.in_time.mean(),
        "calibration_error": np.average(np.abs(bins["predicted"] - bins["observed"]), weights=bins["count"]),
        "brier_score": np.square(routed.predicted_in_time - routed.in_time).mean(),
        "ttft_bias": (routed.predicted_ttft - routed.ttft).mean(),
        "ttft_ratio": routed.predicted_ttft.mean() / routed.ttft.mean(),
        "tpot_bias": (predicted_tpot - tpot).mean(),
        "tpot_ratio": predicted_tpot.mean() / tpot.mean(),
    }
    return {name: float(value) for name, value in figures.items()}


def draw(routed: dict[tuple[str, str, float], Routed]) -> Figure:
    """Draw a reliability diagram for each site and rule, with a line for each rate; the keys are these three."""
    panels = list(dict.fromkeys((site, router) for site, router, _ in routed))
    figure = Figure(figsize=(4 * len(panels), 4), layout="constrained")
    for axes, panel in zip(np.atleast_1d(figure.subplots(1, len(panels), sharey=True)), panels, strict=True):
        axes.plot([0, 1], [0, 1], color=REFERENCE_COLOUR, linewidth=0.8, linestyle="--")
        mine = {rate: requests for (*name, rate), requests in routed.items() if tuple(name) == panel}
        for colour, (rate, requests) in zip(expert_colours(len(mine)), mine.items(), strict=True):
            bins = reliability(requests)
            shown = bins["count"] >= 20
            label = f"{rate:g} requests/s"
            axes.plot(bins["predicted"][shown], bins["observed"][shown], "o-", color=colour, markersize=3, label=label)
        axes.set(title=", ".join(panel), xlabel="predicted probability in time", xlim=(0, 1), ylim=(0, 1))
        axes.legend()
    figure.axes[0].set_ylabel("share in time")
    return figure


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="edge6 at its usual load only, few requests")
    parser.add_argument("--episodes", type=int, default=32)
    options = parser.parse_args()
    use_compilation_cache()
    routed = {}
    for site, usual in SITES.items():
        if options.quick and site != "edge6":
            continue
        env, params = build_env(load_config([f"site={site}", "bank.split=test"]))
        larger = usual / SITES["edge6"]
        loads = (1.0,) if options.quick else LOADS
        found = routed_requests(
            env,
            params,
            ROUTERS,
            [load * usual for load in loads],
            # As many requests in all, over as much time.
            episodes=2 if options.quick else max(round(options.episodes / larger), 1),
            requests=round(600 * larger),
        )
        routed |= {(site, router, rate): requests for (router, rate), requests in found.items()}
    rows = {name: summary(requests) for name, requests in routed.items()}
    table = Table(
        "site", "rule", "requests/s", "predicted", "in time", "difference", "ECE", "TTFT, s", "ratio", "TPOT, ms",
        "ratio", box=box.MARKDOWN,
    )  # fmt: skip
    for (site, router, rate), row in rows.items():
        table.add_row(
            site,
            router,
            f"{rate:g}",
            f"{row['predicted_in_time']:.3f}",
            f"{row['in_time']:.3f}",
            f"{row['predicted_in_time'] - row['in_time']:+.3f}",
            f"{row['calibration_error']:.3f}",
            f"{row['ttft_bias']:+.3f}",
            f"{row['ttft_ratio']:.2f}",
            f"{1e3 * row['tpot_bias']:+.2f}",
            f"{row['tpot_ratio']:.2f}",
        )
    described = [
        {"site": site, "rule": router, "rate": rate}
        | row
        | {"bins": {name: values.tolist() for name, values in reliability(routed[site, router, rate]).items()}}
        for (site, router, rate), row in rows.items()
    ]
    main_figures = {
        f"{site} {router}, calibration error": max(
            row["calibration_error"] for name, row in rows.items() if name[:2] == (site, router)
        )
        for site, router in dict.fromkeys(name[:2] for name in rows)
    }
    publish("reliability", table, {"rows": described}, main_figures, remember=not options.quick)
    (OUTPUTS / "reliability.png").write_bytes(png_bytes(draw(routed)))


if __name__ == "__main__":
    main()
