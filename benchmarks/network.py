"""HAN on jraph's segment operations against the dense formulation, on observations of a busy site.

`python -m benchmarks.network` prints milliseconds per call, forward and forward with gradient, medians of several runs
taken in turn, and writes outputs/benchmarks/network.json.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
from rich.table import Table

import jaxroute
from benchmarks.publish import publish
from jaxroute.cli import use_compilation_cache
from jaxroute.networks import NetworkConfig, build_network


def _finish(program: Callable, *arguments: object) -> object:
    return jax.block_until_ready(program(*arguments))


def main() -> None:
    """Time both formulations with the same parameters and the same observations."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--batch", type=int, default=2048)
    parser.add_argument("--runs", type=int, default=7)
    parser.add_argument("--quick", action="store_true", help="a small batch and few runs")
    options = parser.parse_args()
    batch, runs = (128, 3) if options.quick else (options.batch, options.runs)
    use_compilation_cache()

    env, params = jaxroute.make("edge-poisson", rate=14.0)

    def busy(key: jax.Array) -> object:
        key_reset, key_steps = jax.random.split(key)
        obs, state = env.reset(key_reset, params)

        def step(carry: tuple, key: jax.Array) -> tuple[tuple, None]:
            action = jax.random.randint(key, (), 0, env.num_actions)
            return env.step(key, carry[1], action, params)[:2], None

        (obs, _), _ = jax.lax.scan(step, (obs, state), jax.random.split(key_steps, 100))
        return obs

    obs = jax.jit(jax.vmap(busy))(jax.random.split(jax.random.key(0), batch))
    programs: dict[tuple[str, str], Callable[[], object]] = {}
    weights = None
    for name, dense in (("dense", True), ("segment", False)):
        network = build_network(NetworkConfig(hidden=32, heads=2, dense=dense))
        features = jax.jit(jax.vmap(network.prepare))(obs)
        if weights is None:
            weights = network.init(jax.random.key(1), jax.tree.map(lambda leaf: leaf[0], features))

        def forward(weights, features, network=network):  # type: ignore[no-untyped-def]
            return jax.vmap(lambda features: network.apply(weights, features))(features)

        def loss(weights, features, forward=forward):  # type: ignore[no-untyped-def]
            logits, value = forward(weights, features)
            return jax.nn.log_softmax(logits)[:, 0].mean() + jnp.square(value).mean()

        for kind, program in (("forward", jax.jit(forward)), ("with gradient", jax.jit(jax.grad(loss)))):
            call = partial(_finish, program, weights, features)
            call()
            programs[name, kind] = call

    times: dict[tuple[str, str], list[float]] = {key: [] for key in programs}
    for _ in range(runs):
        for key, call in programs.items():
            started = time.perf_counter()
            call()
            times[key].append(1e3 * (time.perf_counter() - started))
    medians = {key: statistics.median(values) for key, values in times.items()}

    table = Table("ms per call", "dense", "segment", "segment / dense", title=f"HAN, {batch} states of 6 x 16")
    for kind in ("forward", "with gradient"):
        dense, segment = medians["dense", kind], medians["segment", kind]
        table.add_row(kind, f"{dense:.1f}", f"{segment:.1f}", f"{segment / dense:.2f}")
    publish(
        "network",
        table,
        {"batch": batch, "median_ms": {f"{name} {kind}": value for (name, kind), value in medians.items()}},
    )


if __name__ == "__main__":
    main()
