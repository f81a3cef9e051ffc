"""Who goes without: whom a router declines, and whom full queues and missed limits leave out where it may not.

`python -m benchmarks.declined outputs/<run>` plays the router and `impact_greedy` on the same episodes and prints, by
class of service, by predicted length and by predicted quality, the share of the requests that earned nothing because
they were declined, rejected or late.
"""

from __future__ import annotations

import argparse
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PRNGKeyArray
from rich.table import Table

from benchmarks.publish import publish
from jaxroute.config import load_config
from jaxroute.devices import use_compilation_cache
from jaxroute.env import EdgeRouting, EnvParams
from jaxroute.evaluation.episodes import episode_keys, keys_of_episode, keys_of_step
from jaxroute.policies import RULES, Policy
from jaxroute.runs import read_policy
from jaxroute.scenarios import build_env, on_test_prompts

THIRDS = ("lowest third", "middle third", "highest third")


class Fates(NamedTuple):
    """What happened to the requests of all episodes, one array of `(episode, request)` for each column."""

    level: np.ndarray
    """Class of service."""
    tokens: np.ndarray
    """Predicted length, mean over experts."""
    quality: np.ndarray
    """Best predicted quality of an expert."""
    declined: np.ndarray
    rejected: np.ndarray
    late: np.ndarray


@partial(jax.jit, static_argnames=("env", "act", "num_steps"))
def _play(env: EdgeRouting, params: EnvParams, act: object, of_act: object, keys: PRNGKeyArray, num_steps: int) -> dict:
    """Play each episode, and return what is known of each request at its routing and of each end."""

    def episode(key: PRNGKeyArray) -> dict[str, Array]:
        key_reset, keys = keys_of_episode(key, num_steps)

        def step(carry: tuple, _: None) -> tuple[tuple, dict[str, Array]]:
            obs, state = carry
            key_action, key_env = keys_of_step(env, keys, state)
            action, _ = act(of_act, obs, key_action, ())  # type: ignore[operator]
            request = state.request
            obs, state, _, _, _, info = env.step(key_env, state, action, params)
            late = info["ended"] & ~info["in_time"]
            seen = {
                "limit": request.limits.per_token(jnp.float32(100.0)),
                "tokens": request.predicted_output_tokens.mean(),
                "quality": request.predicted_quality.max(),
                "declined": info["declined"],
                "rejected": info["rejected"],
                "late": jnp.where(late, info["request"], -1),
            }
            return (obs, state), seen

        return jax.lax.scan(step, env.reset(key_reset, params), length=num_steps)[1]

    return jax.vmap(episode)(keys)


def fates(env: EdgeRouting, params: EnvParams, policy: Policy, episodes: int, requests: int, warmup: int) -> Fates:
    """Return what happened to the requests after the warm-up; those that come after the last do not count."""
    num_steps = requests + 2 * warmup
    seen = jax.device_get(_play(env, params, policy.act, policy.params, episode_keys(11, episodes), num_steps))
    late = np.zeros((episodes, num_steps), bool)
    for episode, numbers in enumerate(seen["late"]):
        late[episode, numbers[numbers >= 0]] = True
    limits = np.unique(seen["limit"])
    counted = slice(warmup, warmup + requests)
    return Fates(
        level=np.searchsorted(limits, seen["limit"])[:, counted],
        tokens=seen["tokens"][:, counted],
        quality=seen["quality"][:, counted],
        declined=seen["declined"][:, counted],
        rejected=seen["rejected"][:, counted],
        late=late[:, counted],
    )


def shares(found: Fates, classes: list[str]) -> dict[str, dict[str, float]]:
    """Return for each group of requests the shares declined, rejected and late."""

    def thirds(values: Float[np.ndarray, "episode request"]) -> list[np.ndarray]:
        low, high = np.quantile(values, [1 / 3, 2 / 3])
        return [values <= low, (values > low) & (values <= high), values > high]

    groups = {"all": np.ones(found.level.shape, bool)}
    groups |= {f"class {name}": found.level == number for number, name in enumerate(classes)}
    for what, values in (("length", found.tokens), ("quality", found.quality)):
        groups |= {f"predicted {what}, {name}": mask for name, mask in zip(THIRDS, thirds(values), strict=True)}
    return {
        group: {fate: float(getattr(found, fate)[mask].mean()) for fate in ("declined", "rejected", "late")}
        for group, mask in groups.items()
    }


def main() -> None:
    """Play, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("router", help="a run directory, or pretrained/<name>")
    parser.add_argument("--rate", type=float, default=21.5, help="requests per second")
    parser.add_argument("--episodes", type=int, default=32)
    parser.add_argument("--requests", type=int, default=800)
    parser.add_argument("--warmup", type=int, default=300)
    options = parser.parse_args()
    use_compilation_cache()
    config = on_test_prompts(load_config(["workload=poisson"]))
    env, params = build_env(config, rate=options.rate)
    # In the order of their limits, as classes are told apart by them.
    classes = [one.name for one in sorted(config.workload.requirements, key=lambda one: one.normalised or 0.0)]
    policies = [read_policy(options.router).policy, RULES["impact_greedy"]]
    found = {
        policy.name: shares(fates(env, params, policy, options.episodes, options.requests, options.warmup), classes)
        for policy in policies
    }
    router, rule = found.values()
    table = Table("requests", "jaxroute declines", "late", "impact_greedy: rejected", "late ")
    for group, of_router in router.items():
        of_rule = rule[group]
        columns = (of_router["declined"], of_router["late"], of_rule["rejected"], of_rule["late"])
        table.add_row(group, *(f"{100 * share:.0f} %" for share in columns))
    publish("declined", table, {"rate": options.rate, "shares": found}, {}, remember=False)


if __name__ == "__main__":
    main()
