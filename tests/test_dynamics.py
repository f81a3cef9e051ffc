"""What changes beside the load: experts that fail, sites that differ, observations that are late."""

import dataclasses
from functools import cache, partial
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from episodes import tailored_reward

import jaxroute
from jaxroute.config import load_config
from jaxroute.env import OutageParams
from jaxroute.errors import UserError
from jaxroute.evaluation.episodes import evaluate_policies
from jaxroute.evaluation.metrics import Outcome, summarise
from jaxroute.networks import HAN
from jaxroute.policies import rules_named
from jaxroute.scenarios import build_env
from jaxroute.serving import SlotStatus, slot_status

NUM_ENVS, NUM_STEPS, NUM_EXPERTS = 8, 192, 6
SEATS, WAITING = 4, 2
RATE = 20.0
UPTIME, DOWNTIME = 3.0, 1.0  # s: several of each within an episode
REFRESH = 0.5  # s: some ten requests
HORIZON = 48
TOLERANCE = 1e-4  # s, of times added up in float32

CALM = {}
FAILING, RETRYING = {"outages": "lost"}, {"outages": "retried"}
LATE = {"stale": True}
RANDOM = {"random_sites": 1.0, "horizon": HORIZON, "redraw_every": 7}


@cache
def scenario():
    """Few seats, a small bank, and outages and refreshes for those that look."""
    overrides = ("bank.num_prompts=200", "reward.accelerator_price=0.1")
    env, params = jaxroute.make("edge-poisson", rate=RATE, overrides=overrides)
    counts = {"max_num_seqs": SEATS, "max_waiting": WAITING}
    site = params.site._replace(**{name: jnp.full(NUM_EXPERTS, value, jnp.int32) for name, value in counts.items()})
    outages = OutageParams(mean_uptime=jnp.float32(UPTIME), mean_downtime=jnp.float32(DOWNTIME))
    params = params._replace(site=site, outages=outages, refresh_interval=jnp.full(2, REFRESH))
    return dataclasses.replace(env, num_slots=SEATS + WAITING), params


class Episodes(NamedTuple):
    """What happened, with the leading axes env and step; what the router saw, and the state, before and after."""

    obs: Any
    state: Any
    action: np.ndarray
    next_obs: Any
    next_state: Any
    reward: np.ndarray
    truncated: np.ndarray
    info: dict[str, np.ndarray]


@partial(jax.jit, static_argnames="env")
@chex.assert_max_traces(n=5)
def _play(env, params, keys, script):
    def episode(key, script):
        key_reset, key_steps = jax.random.split(key)
        keys = jax.random.split(key_steps, NUM_STEPS)

        def step(carry, action):
            obs, state, position = carry
            # With retries, the key of the arrival; a horizon starts to count anew.
            key = keys[state.step if env.outages == "retried" else position]
            next_obs, next_state, reward, _, truncated, info = env.step(key, state, action, params)
            after = Episodes(obs, state, action, next_obs, next_state, reward, truncated, info)
            return (next_obs, next_state, position + 1), after

        return jax.lax.scan(step, (*env.reset(key_reset, params), 0), script)[1]

    return jax.vmap(episode)(keys, script)


@cache
def play(flags, seed=0, params_of=lambda params: params):
    """Random actions under the same keys; `flags` as items, so that they hash."""
    env, params = scenario()
    script = np.random.default_rng(seed).integers(0, NUM_EXPERTS, (NUM_ENVS, NUM_STEPS)).astype(np.int32)
    keys = jax.random.split(jax.random.key(0), NUM_ENVS)
    env = dataclasses.replace(env, **dict(flags))
    return jax.tree.map(np.asarray, _play(env, params_of(params), keys, script))


def episodes(flags, **kwargs):
    return play(tuple(flags.items()), **kwargs)


def never(params):
    """Outages that do not come."""
    return params._replace(outages=params.outages._replace(mean_uptime=jnp.float32(jnp.inf)))


def active(state):
    return np.asarray(slot_status(state.site)) == SlotStatus.ACTIVE


def clock(played):
    """Time at which each step begins, and at which the last ends, s."""
    gaps = played.info["gap"].astype(np.float64)
    return np.concatenate([np.zeros((len(gaps), 1)), np.cumsum(gaps, axis=1)], axis=1)


def assert_same(actual, expected, tolerance=1e-6):  # two programs may round apart
    for (path, a), b in zip(jax.tree_util.tree_leaves_with_path(actual), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance, err_msg=jax.tree_util.keystr(path))


def assert_accounted_for(played, e):
    """Every request of environment `e` has completed, was rejected or lost, is in flight, or waits for a retry."""
    info = jax.tree.map(lambda leaf: leaf[e], played.info)
    state = jax.tree.map(lambda leaf: leaf[e, -1], played.next_state)
    parts = [info["request"][info["ended"]], info["request"][info["lost"]]]
    parts += [played.state.request.number[e][info["rejected"]], state.site.slots.request[active(state)]]
    parts += [state.request.number[None]]
    if state.retries is not None:
        parts += [state.retries.number[state.retries.marked]]
    np.testing.assert_array_equal(np.sort(np.concatenate(parts)), np.arange(state.step + 1))


# ---- Outages -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("flags", [FAILING, RETRYING], ids=["lost", "retried"])
def test_an_expert_that_is_down_holds_and_takes_nothing(flags):
    played = episodes(flags)
    down = ~played.state.up
    assert 0.1 < down.mean() < 0.5
    for count in (active(played.state).sum(-1), played.state.site.num_running, played.state.site.kv_held):
        assert (count[down] == 0).all()
        assert (count[~down] > 0).any()
    np.testing.assert_array_equal(played.obs.experts.up, played.state.up)
    assert not (played.obs.experts.available & down).any()
    sent_to = np.take_along_axis(down, played.action[..., None], -1)[..., 0]
    assert played.info["rejected"][sent_to].all()
    assert (played.info["busy_seconds"][down] == 0).all()


@pytest.mark.parametrize("flags", [FAILING, RETRYING], ids=["lost", "retried"])
def test_every_request_is_accounted_for(flags):
    played = episodes(flags)
    for e in range(NUM_ENVS):
        assert_accounted_for(played, e)


def test_what_is_lost():
    played = episodes(FAILING)
    info = played.info
    failed = played.state.up & ~played.next_state.up
    lost = info["lost"]
    assert lost.sum() > 50
    assert not (lost & ~failed[..., None, :]).any()
    assert not (lost & info["ended"]).any()
    np.testing.assert_array_equal(info["num_lost"], lost.sum((-2, -1)))
    assert (info["qos"][lost] == 0).all()
    earned = np.where(info["in_time"], np.swapaxes(played.next_state.table.predicted_quality, -1, -2), 0).sum((-2, -1))
    np.testing.assert_allclose(played.reward, tailored_reward(scenario()[1], played, earned), atol=1e-5)
    np.testing.assert_allclose(played.next_state.potential, played.next_obs.experts.expected_qos.sum(-1), rtol=1e-5)


def test_outages_are_as_frequent_as_asked():
    played = episodes(FAILING)
    before, after, gap = played.state.up, played.next_state.up, played.info["gap"][..., None]
    for changed, could, mean in ((before & ~after, before, UPTIME), (~before & after, ~before, DOWNTIME)):
        chance = np.where(could, 1 - np.exp(-gap / mean), 0)
        spread = np.sqrt((chance * (1 - chance)).sum())
        assert changed.sum() > 100
        assert abs(changed.sum() - chance.sum()) < 4 * spread


def test_same_keys_same_outages_whatever_the_actions():
    one, other = episodes(FAILING), episodes(FAILING, seed=1)
    np.testing.assert_array_equal(one.state.up, other.state.up)
    chex.assert_trees_all_equal(one.state.request, other.state.request)
    assert (one.info["num_lost"] != other.info["num_lost"]).any()


@pytest.mark.parametrize("flags", [FAILING, RETRYING], ids=["lost", "retried"])
def test_without_a_failure_nothing_changes(flags):
    calm, spared = episodes(CALM), episodes(flags, params_of=never)
    assert_same((spared.obs, spared.reward, spared.info), (calm.obs, calm.reward, calm.info), 1e-4)


# ---- Retries -----------------------------------------------------------------------------------------------


def test_retries_come_before_the_next_arrival():
    played = episodes(RETRYING)
    number, age = played.state.request.number, played.state.request.age
    again, marked = age > 0, played.state.retries.marked.any((-2, -1))
    assert again.sum() > 50
    assert (played.info["gap"][again] == 0).all()
    assert (played.info["gap"][~again] > 0).all()
    assert not (marked & ~again).any(), "an arrival was seen while others waited for a retry"
    # Whatever is still marked is next, and only a new arrival has the next number.
    assert (again[:, 1:] >= marked[:, :-1]).all()
    np.testing.assert_array_equal(played.state.step[~again], number[~again])
    for e in range(NUM_ENVS):
        np.testing.assert_array_equal(number[e][~again[e]], np.arange((~again[e]).sum()))
        assert (number[e][again[e]] <= played.state.step[e][again[e]]).all()
    assert played.info["lost"].sum() == 0


def test_a_retried_request_is_the_same_and_as_old_as_it_is():
    played = episodes(RETRYING)
    time, request, info = clock(played), played.state.request, played.info
    retried = 0
    for e in range(NUM_ENVS):
        number, (first, where) = request.number[e], np.unique(request.number[e], return_index=True)
        assert len(first) == first[-1] + 1
        origin = where[number]
        arrival = time[e][origin]
        for name in ("row", "prompt_tokens", "output_tokens", "quality", "predicted_quality", "limits"):
            for values in jax.tree.leaves(getattr(request, name)):
                np.testing.assert_array_equal(values[e], values[e][origin], err_msg=name)
        np.testing.assert_allclose(request.age[e], time[e][:-1] - arrival, atol=TOLERANCE)
        np.testing.assert_array_equal(played.obs.arrival.age[e], request.age[e])
        # Whoever ends does so within the step, counted from its first arrival.
        step, slot, expert = np.nonzero(info["ended"][e])
        who = where[info["request"][e][step, slot, expert]]
        way_back = np.asarray(scenario()[1].site.network_delay)[expert]
        end = time[e][who] + info["latency"][e][step, slot, expert] - way_back
        assert (end > time[e][step] - TOLERANCE).all()
        assert (end <= time[e][step + 1] + TOLERANCE).all()
        assert (info["ttft"][e] <= info["latency"][e])[info["ended"][e]].all()
        times_routed = np.bincount(number)
        retried += (times_routed[info["request"][e][step, slot, expert]] > 1).sum()
        # The router sees the true age of those in flight.
        holds = active(jax.tree.map(lambda leaf, e=e: leaf[e], played.state))
        step, expert, slot = np.nonzero(holds)
        who = where[played.state.site.slots.request[e][step, expert, slot]]
        seen = played.obs.in_flight.age[e][step, expert, slot]
        np.testing.assert_allclose(seen, time[e][step] - time[e][who], atol=TOLERANCE)
    assert retried > 10
    assert (played.obs.candidates.impact.ttft > request.age[..., None]).all()


def test_retries_do_not_change_what_arrives():
    """As long as a step has the key of the arrival that it delays."""
    one, other = episodes(RETRYING), episodes(RETRYING, seed=1)
    for e in range(NUM_ENVS):
        arrivals = []
        for played in (one, other):
            new = played.state.request.age[e] == 0
            request = jax.tree.map(lambda leaf, new=new, e=e: leaf[e][new], played.state.request)
            arrivals.append((request, clock(played)[e][:-1][new]))
        both = min(len(time) for _, time in arrivals)
        first, second = (jax.tree.map(lambda leaf, both=both: leaf[:both], arrival) for arrival in arrivals)
        assert_same(first, second, 1e-6)


# ---- Late observations -------------------------------------------------------------------------------------


def test_the_router_sees_the_latest_look():
    late, fresh = episodes(LATE), episodes(CALM)
    # Nothing but the observation is late.
    assert_same((late.state.site, late.info), (fresh.state.site, fresh.info))
    np.testing.assert_allclose(late.reward, fresh.reward, atol=1e-4)

    def of_requests(obs):
        # What experts have offered lately is known by late looks alone.
        recent = obs.arrival.recent._replace(net=(), net_square=())
        return obs.arrival._replace(recent=recent), obs.candidates[:2]

    assert_same(of_requests(late.obs), of_requests(fresh.obs), 1e-6)
    time, latest = clock(late)[:, :-1], np.zeros((NUM_ENVS, NUM_STEPS), int)
    for e in range(NUM_ENVS):
        for t in range(1, NUM_STEPS):
            latest[e, t] = t if time[e, t] - time[e, latest[e, t - 1]] >= REFRESH else latest[e, t - 1]
    seen, now = ((obs.experts._replace(available=()), obs.in_flight, obs.running) for obs in (late.obs, fresh.obs))
    assert_same(seen, jax.tree.map(lambda leaf: leaf[np.arange(NUM_ENVS)[:, None], latest], now), 1e-5)
    looks = (latest == np.arange(NUM_STEPS)).sum()
    assert NUM_ENVS * 5 < looks < NUM_ENVS * NUM_STEPS / 5


# ---- Random sites ------------------------------------------------------------------------------------------


def test_drawn_sites_are_in_range():
    params, played = scenario()[1], episodes(RANDOM)
    fleet, nominal = played.state.fleet, jax.tree.map(np.asarray, params.site)
    site, column = fleet.site, fleet.column
    assert set(np.unique(fleet.present.sum(-1))) == set(range(2, NUM_EXPERTS + 1))
    assert set(np.unique(column)) == set(range(NUM_EXPERTS))
    slower = site.weight_load / nominal.weight_load[column]
    assert slower.min() < 0.6
    assert slower.max() > 1.6
    for name in ("weight_load", "compute_per_token", "decode_per_seq", "attention_per_token"):
        np.testing.assert_allclose(getattr(site, name), getattr(nominal, name)[column] * slower, rtol=1e-5)
    assert ((slower > 0.499) & (slower < 2.001)).all()
    longest = int(params.bank.prompt_tokens.max())
    relative = site.kv_capacity / nominal.kv_capacity[column]
    assert (site.kv_capacity > longest).all()
    assert ((relative > 0.499) | (site.kv_capacity == longest + 1)).all()
    assert (relative < 2.001).all()
    assert ((site.network_delay >= 0.001) & (site.network_delay <= 0.020)).all()
    for name in ("iteration_overhead", "max_num_seqs", "max_waiting", "max_num_batched_tokens"):
        np.testing.assert_array_equal(getattr(site, name), getattr(nominal, name)[column])
    capacity = (site.max_num_seqs / site.weight_load * fleet.present).sum(-1)
    share = capacity / (nominal.max_num_seqs / nominal.weight_load).sum()
    np.testing.assert_allclose(played.state.rate, RATE * share, rtol=1e-4)


def test_a_site_stays_until_the_horizon():
    played = episodes(RANDOM)
    ends = np.arange(1, NUM_STEPS + 1) % HORIZON == 0
    np.testing.assert_array_equal(played.truncated, np.broadcast_to(ends, (NUM_ENVS, NUM_STEPS)))
    moved = (played.next_state.fleet.site.weight_load != played.state.fleet.site.weight_load).any(-1)
    np.testing.assert_array_equal(moved, played.truncated)


def test_absent_experts_never_get_anything():
    played = episodes(RANDOM)
    absent = ~played.state.fleet.present
    np.testing.assert_array_equal(played.state.up, ~absent)
    np.testing.assert_array_equal(played.obs.experts.up, ~absent)
    assert (active(played.state).sum(-1)[absent] == 0).all()
    sent_to = np.take_along_axis(absent, played.action[..., None], -1)[..., 0]
    assert played.info["rejected"][sent_to].all()
    assert not played.info["rejected"][~sent_to].all()


def test_requests_are_those_of_the_drawn_llms():
    params, played = scenario()[1], episodes(RANDOM)
    request, column = played.state.request, played.state.fleet.column
    for name in ("quality", "output_tokens", "predicted_quality", "predicted_output_tokens"):
        rows = np.asarray(getattr(params.bank, name))[request.row]
        np.testing.assert_array_equal(getattr(request, name), np.take_along_axis(rows, column, -1), err_msg=name)


def test_sites_of_their_own_side_by_side_and_alone():
    env, params = scenario()
    played = episodes(RANDOM)
    step = jax.jit(dataclasses.replace(env, **RANDOM).step)
    for e, t in ((0, 20), (1, 40), (2, 100)):
        key_steps = jax.random.split(jax.random.split(jax.random.key(0), NUM_ENVS)[e])[1]
        state, obs, after = (
            jax.tree.map(lambda leaf, e=e, t=t: leaf[e, t], tree)
            for tree in (played.state, played.next_obs, played.next_state)
        )
        alone = step(jax.random.split(key_steps, NUM_STEPS)[t], state, played.action[e, t], params)
        assert_same(alone[:2], (obs, after), 1e-5)


# ---- Networks ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dense", [True, False], ids=["dense", "segment"])
def test_absent_experts_are_never_seen(dense):
    """The same site without the padding: the same logits and the same value."""
    network = HAN(hidden=8, heads=2, dense=dense)
    played = episodes(RANDOM)
    obs = jax.tree.map(lambda leaf: leaf[:, HORIZON // 2 :: HORIZON].reshape(-1, *leaf.shape[2:]), played.obs)
    count = obs.experts.up.sum(-1)
    first = network.prepare(jax.tree.map(lambda leaf: leaf[0], obs))
    shapes = jax.eval_shape(network.init, jax.random.key(0), first)
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda leaf: np.asarray(rng.standard_normal(leaf.shape), np.float32), shapes)
    forward = jax.jit(jax.vmap(lambda obs: network.apply(params, network.prepare(obs))))
    logits, values = forward(obs)
    assert np.std(values) > 0.1
    for present in (2, 4):
        rows = np.flatnonzero(count == present)
        assert rows.size
        alone = jax.tree.map(lambda leaf, rows=rows: leaf[rows], obs)
        cut = jax.tree.map(lambda leaf, n=present: leaf[:, :n], alone._replace(arrival=(), away=()))
        cut_logits, cut_values = forward(cut._replace(arrival=alone.arrival, away=alone.away))
        np.testing.assert_allclose(logits[rows, :present], cut_logits, rtol=1e-4, atol=1e-4)
        np.testing.assert_allclose(values[rows], cut_values, rtol=1e-4, atol=1e-4)
        assert (logits[rows, present:] < -1e8).all()


def test_when_all_that_are_up_are_full_one_of_them_is_chosen():
    experts = episodes(RANDOM).obs.experts
    for available, up, eligible in (
        ([True, False, False], [True, True, False], [True, False, False]),
        ([False, False, False], [True, True, False], [True, True, False]),
        ([False, False, False], [False, False, False], [True, True, True]),
    ):
        some = experts._replace(available=jnp.array(available), up=jnp.array(up))
        np.testing.assert_array_equal(some.eligible, eligible)


# ---- Evaluation --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("outages", ["lost", "retried"])
def test_outages_are_judged(outages):
    env, params = scenario()
    env = dataclasses.replace(env, outages=outages)
    policies = rules_named(["random", "shortest_queue"])
    settings = {"seed": 0, "episodes": 4, "requests": 150, "warmup": 20}
    judged = evaluate_policies(env, params, policies, [RATE], **settings)[RATE]
    a, b = judged["random"], judged["shortest_queue"]
    np.testing.assert_array_equal(a.limits.normalised, b.limits.normalised)
    np.testing.assert_allclose(a.duration, b.duration, rtol=1e-5)
    for records in judged.values():
        summary = summarise(records, settings["warmup"])
        rates = [summary[f"{name}_rate"] for name in ("in_time", "violation", "rejection", "lost")]
        np.testing.assert_allclose(sum(rates), 1)
        np.testing.assert_array_equal(
            records.status == Outcome.LOST, (records.status == Outcome.LOST) & (outages == "lost")
        )
        assert (summary["lost_rate"] > 0).all() == (outages == "lost")
        assert (records.status == Outcome.IN_FLIGHT).sum(1).max() <= NUM_EXPERTS * env.num_slots
        np.testing.assert_array_equal(np.isfinite(records.latency), records.status == Outcome.COMPLETED)
        assert (records.output_tokens > 0).all()


# ---- Configuration -----------------------------------------------------------------------------------------


def test_options_reach_the_environment():
    config = load_config(["dynamics.outages=retried", "dynamics.mean_uptime=5", "dynamics.refresh_interval=0.2"])
    env, params = build_env(config)
    assert (env.outages, env.stale, env.random_sites) == ("retried", True, 0.0)
    assert params.outages == (5.0, 60.0)
    assert params.refresh_interval == pytest.approx(0.2)
    assert jaxroute.make("edge-poisson", random_sites=0.5)[0].random_sites
    assert not jaxroute.make("edge-poisson")[0].stale


@pytest.mark.parametrize(
    ("override", "named"),
    [
        ("dynamics.outages=some", "choose none, lost or retried"),
        ("dynamics.mean_uptime=0", "mean_uptime=0"),
        ("dynamics.mean_downtime=-1", "mean_downtime=-1"),
        ("dynamics.refresh_interval=-5", "refresh_interval=-5"),
        ("train.horizon=-1", "horizon=-1"),
    ],
    ids=str,
)
def test_mistakes_are_one_line(override, named):
    with pytest.raises(UserError) as caught:
        load_config([override])
    assert named in str(caught.value)
    assert "\n" not in str(caught.value)
