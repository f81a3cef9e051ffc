"""HAN on jraph's segment operations against the dense formulation, on observations of a busy site.

`python -m benchmarks.network` prints milliseconds per call, forward and forward with gradient, medians of several runs
taken in turn, and writes outputs/benchmarks/network.json.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
from rich.table import Table

import jaxroute
from benchmarks.measure import busy_sites, median_seconds
from benchmarks.publish import publish
from jaxroute.devices import use_compilation_cache
from jaxroute.networks import NetworkConfig, build_network


def main() -> None:
    """Time both formulations with the same parameters and the same observations."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=7)
    parser.add_argument("--quick", action="store_true", help="a small site and batch, and few runs")
    options = parser.parse_args()
    batch, runs = (128, 3) if options.quick else (2048, options.runs)
    use_compilation_cache()

    env, params = jaxroute.make("edge3-poisson" if options.quick else "edge-poisson", rate=14.0)
    obs, _ = busy_sites(env, params, batch)
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
            programs[name, kind] = partial(program, weights, features)

    medians = {key: 1000 * seconds for key, seconds in median_seconds(programs, runs).items()}
    shape = f"{env.num_experts} x {env.num_slots}"
    table = Table("ms per call", "dense", "segment", "segment / dense", title=f"HAN, {batch} states of {shape}")
    for kind in ("forward", "with gradient"):
        dense, segment = medians["dense", kind], medians["segment", kind]
        table.add_row(kind, f"{dense:.1f}", f"{segment:.1f}", f"{segment / dense:.2f}")
    figures = {f"{name} {kind}, ms": value for (name, kind), value in medians.items()}
    publish("network", table, {"batch": batch, "median_ms": figures}, figures, remember=not options.quick)


if __name__ == "__main__":
    main()
