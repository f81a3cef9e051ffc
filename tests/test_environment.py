"""The environment: dynamics, reward, observation and protocol, against what its parts and the reference say."""

import dataclasses
from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from episodes import NUM_ENVS, NUM_STEPS, changed, edge6, episode_keys, play, step_keys, tailored_reward
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

import jaxroute
from jaxroute.env import EnvState, Observation
from jaxroute.errors import UserError
from jaxroute.serving import SlotStatus, computed, generated, slot_status, with_output_tokens
from jaxroute.serving.reference import simulate

# The engine's times are float32 and count from now; over an episode of minutes they add up to this.
TIME_TOLERANCE = 1e-3  # s
# Nearer to each other than this, the order of two events is not float32's to get right (see test_replay.py).
RESOLUTION = 1e-5  # s


class Stepped(NamedTuple):
    """What single steps returned; leading axes env and step."""

    state: EnvState
    obs: Observation
    next_state: EnvState
    reward: np.ndarray
    terminated: np.ndarray
    truncated: np.ndarray
    info: dict[str, np.ndarray]


RATES = (2.0, 60.0)
"""Requests per second: from quiet to overloaded."""
SMALL = {"max_num_seqs": 4, "max_waiting": 2}


@pytest.fixture(scope="module")
def params():
    """Few seats, so that queues fill up and requests are turned away."""
    return changed(edge6()[1], RATES, **SMALL)


@pytest.fixture(scope="module")
def busy(params):
    """Episodes with random actions at half of the experts."""
    return play(params, num_experts=3)


# One environment steps with a horizon and new rates, both after the end of the batched episodes above, and rewards the
# predicted quality.
REDRAW, HORIZON = NUM_STEPS + 6, NUM_STEPS + 16


@pytest.fixture(scope="module")
def single(params):
    """One environment's compiled step; a second trace is an error."""
    env, _ = edge6()
    env = dataclasses.replace(env, horizon=HORIZON, redraw_every=REDRAW, expected_quality=True)
    step = jax.jit(chex.assert_max_traces(env.step, n=1))
    return lambda key, state, action, params=params: step(key, state, jnp.int32(action), params)


@pytest.fixture(scope="module")
def stepped(single, busy):
    """Environments 0 and 5 of `busy` step by step, and on into the next episode."""
    episodes = []
    for e in (0, 5):
        key = episode_keys(0)[e]
        keys = jnp.concatenate([step_keys(key, chunk)[:, 0] for chunk in range(2)])
        state, steps = lane(busy.state, e, 0), []
        for t in range(HORIZON + 10):
            after = single(keys[t], state, busy.action[e, t % NUM_STEPS])
            steps.append((state, *after))
            state = after[1]
        episodes.append(jax.tree.map(lambda *leaves: np.stack(leaves), *steps))
    return Stepped(*jax.tree.map(lambda *leaves: np.stack(leaves), *episodes))


def lane(tree, env, step=None):
    """One environment's part of recorded episodes, or one step of it."""
    return jax.tree.map(lambda leaf: leaf[env] if step is None else leaf[env, step], tree)


def assert_same(actual, expected, tolerance=1e-5):
    """Integers and masks are equal, floats close."""
    for (path, a), (_, b) in zip(
        jax.tree_util.tree_leaves_with_path(actual), jax.tree_util.tree_leaves_with_path(expected), strict=True
    ):
        a, b = np.asarray(a), np.asarray(b)
        where = jax.tree_util.keystr(path)
        assert a.dtype == b.dtype, where
        if np.issubdtype(a.dtype, np.floating):
            np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance, err_msg=where)
        else:
            np.testing.assert_array_equal(a, b, err_msg=where)


def count(mask):
    """How many slots of all experts."""
    return mask.sum((-2, -1))


def in_flight(obs):
    return count(obs.running) + count(obs.waiting)


# ---- Compilation and batching ------------------------------------------------------------------------------


def test_single_steps_compile_once_and_equal_batched_ones(stepped, busy):
    """`chex.assert_max_traces` watches both while all tests here call them with ever new values."""
    for row, e in enumerate((0, 5)):
        first = jax.tree.map(lambda leaf, row=row: leaf[row, :NUM_STEPS], stepped)
        assert_same(first.next_state, lane(busy.next_state, e))
        assert_same({name: first.info[name] for name in busy.info}, lane(busy.info, e))
        assert_same(
            jax.tree.map(lambda leaf: leaf[:-1], first.obs), jax.tree.map(lambda leaf: leaf[1:], lane(busy.obs, e))
        )


def test_same_seed_same_run(params, busy):
    chex.assert_trees_all_equal(play(params, num_experts=3), busy)
    assert (play(params, seed=1).info["gap"] != busy.info["gap"]).all()


def test_shapes_never_change(busy):
    for now, later in zip(jax.tree.leaves(busy.state), jax.tree.leaves(busy.next_state), strict=True):
        assert now.shape == later.shape
        assert now.dtype == later.dtype


# ---- Dynamics ----------------------------------------------------------------------------------------------


def assert_conserved(played):
    """Every request is rejected, declined, in flight or has ended, exactly once."""
    arrived = np.broadcast_to(np.arange(1, NUM_STEPS + 1), played.reward.shape)
    completed, rejected, declined = (
        np.cumsum(played.info[name], axis=1) for name in ("num_completed", "rejected", "declined")
    )
    status = np.asarray(slot_status(played.next_state.site))
    np.testing.assert_array_equal(arrived, completed + rejected + declined + count(status == SlotStatus.ACTIVE))
    np.testing.assert_array_equal(played.info["declined"], played.action == 6)
    np.testing.assert_array_equal(played.info["num_completed"], count(played.info["ended"]))
    for e in range(NUM_ENVS):
        ended = played.info["request"][e][played.info["ended"][e]]
        alive = played.next_state.site.slots.request[e, -1][status[e, -1] == SlotStatus.ACTIVE]
        turned_away = np.flatnonzero(played.info["rejected"][e] | played.info["declined"][e])
        everyone = np.concatenate([ended, alive, turned_away])
        np.testing.assert_array_equal(np.sort(everyone), np.arange(NUM_STEPS))


def assert_within_limits(played, site):
    after = played.next_state.site
    clock = after.clock + played.info["gap"][..., None]
    assert (clock >= played.state.site.clock - 1e-4).all(), "a clock went back"
    assert (after.num_running <= site.max_num_seqs).all()
    assert ((after.kv_held <= site.kv_capacity) | (after.num_running <= 1)).all()
    running, waiting, tokens = played.obs.running, played.obs.waiting, np.asarray(computed(played.state.site))
    held = np.where(running, tokens, 0).sum(-1)
    assert ((held <= site.kv_capacity) | (running.sum(-1) <= 1)).all()
    assert (np.where(running, 0, tokens * waiting) == 0).all(), "KV held in the queue"
    assert (waiting.sum(-1) <= site.max_waiting + site.max_num_seqs).all()
    busy_seconds = np.cumsum(played.info["busy_seconds"], axis=1)
    # What is applied was in progress at most since the beginning.
    assert (busy_seconds <= np.cumsum(played.info["gap"], axis=1)[..., None] + 1e-3).all()
    assert (played.info["kv_token_seconds"] <= played.info["busy_seconds"] * site.kv_capacity * 1.001 + 1e-3).all()


def assert_sane_observation(obs):
    for path, leaf in jax.tree_util.tree_leaves_with_path(obs):
        assert np.isfinite(leaf).all(), jax.tree_util.keystr(path)
        if ".recent.net" not in (where := jax.tree_util.keystr(path)):
            assert (leaf >= 0).all(), where
    impact = obs.candidates.impact
    for probability in (impact.in_time, obs.in_flight.in_time, impact.qos, obs.candidates.predicted_quality):
        assert (probability <= 1).all()
    assert not (obs.running & obs.waiting).any()
    np.testing.assert_array_equal(obs.running.sum(-1), obs.experts.num_running)
    np.testing.assert_array_equal(obs.waiting.sum(-1), obs.experts.num_waiting)
    for leaf in jax.tree.leaves(obs.in_flight):
        assert (leaf[~(obs.running | obs.waiting)] == 0).all(), "something is left in an empty slot"


def of_requests(played, values, slots):
    """Per slot, what was known of its request when it arrived: `values` (env, step, expert)."""
    num_experts = values.shape[-1]
    env = np.arange(NUM_ENVS)[:, None, None, None]
    # Empty slots may hold any number.
    return values[env, np.clip(slots, 0, NUM_STEPS - 1), np.arange(num_experts)[:, None]]


def assert_table_follows_requests(played):
    """What is kept beside the engine's slots still belongs to their requests, however they moved."""
    request, slots = played.state.request, played.next_state.site.slots
    table, used = played.next_state.table, np.asarray(slot_status(played.next_state.site)) != SlotStatus.EMPTY
    known = [(slots.output_tokens, request.output_tokens)]
    known += [
        (getattr(table, name), getattr(request, name))
        for name in ("quality", "predicted_quality", "predicted_output_tokens")
    ]
    for held, limit in zip(table.limits, request.limits, strict=True):
        if limit is not None:
            known.append((held, np.broadcast_to(limit[..., None], request.quality.shape)))
    assert len(known) > 4
    for held, values in known:
        np.testing.assert_array_equal(held[used], of_requests(played, values, slots.request)[used])


def assert_outcomes_add_up(played, params):
    info = played.info
    ended = info["ended"]
    late = info["latency"] / np.maximum(info["output_tokens"], 1) > info["limits"].normalised
    np.testing.assert_array_equal(info["in_time"], ended & ~late)
    np.testing.assert_array_equal(info["qos"], np.where(info["in_time"], info["quality"], 0))
    np.testing.assert_allclose(info["qos_sum"], info["qos"].sum((-2, -1)), rtol=1e-6)
    np.testing.assert_array_equal(info["num_late"], count(ended & late))
    assert (info["ttft"][ended] <= info["latency"][ended]).all()
    way = np.asarray(params.site.network_delay)
    assert (info["ttft"] >= 2 * way)[ended].all()


def assert_reward_adds_up(played, params):
    expected = tailored_reward(params, played, earned=played.info["qos_sum"])
    np.testing.assert_allclose(played.reward, expected, atol=1e-5)


# Without the phase that explains a failure: it traces every line, and that takes minutes here.
@settings(phases=[Phase.explicit, Phase.reuse, Phase.generate, Phase.shrink])
@given(
    seed=st.integers(0, 2**31 - 1),
    rate=st.floats(0.2, 100.0),
    spread=st.floats(1.0, 20.0),
    num_actions=st.sampled_from([1, 2, 6, 7]),
    kv_capacity=st.sampled_from([400, 1500, 6000, 20_000]),
    max_num_seqs=st.integers(1, 12),
    max_waiting=st.integers(1, 4),
    max_num_batched_tokens=st.sampled_from([16, 128, 2048]),
    network_delay=st.sampled_from([0.0, 0.02, 1.0]),
    requirement=st.floats(0.01, 0.2),
    price=st.floats(0.0, 1.0),
)
def test_any_actions_on_any_site(seed, rate, spread, num_actions, price, requirement, **limits):
    params = changed(edge6()[1], (rate, rate * spread), **limits)
    params = params._replace(
        limits=params.limits._replace(normalised=params.limits.normalised * jnp.float32(requirement / 0.04)),
        reward=params.reward._replace(accelerator_price=jnp.full(2, price, jnp.float32)),
    )
    played = play(params, seed, num_experts=num_actions)
    assert_conserved(played)
    assert_within_limits(played, jax.tree.map(np.asarray, params.site))
    assert_sane_observation(played.obs)
    assert_table_follows_requests(played)
    assert_outcomes_add_up(played, params)
    assert_reward_adds_up(played, params)
    for leaf in jax.tree.leaves(played.info):
        assert np.isfinite(leaf).all()


def test_full_experts_are_announced(busy):
    """An expert that is not available rejects; one that is takes every request that its memory can hold."""
    request = busy.state.request
    chosen = busy.action[..., None]
    available = np.take_along_axis(busy.obs.experts.available, chosen, -1)[..., 0]
    output = np.take_along_axis(request.output_tokens, chosen, -1)[..., 0]
    capacity = np.take_along_axis(busy.obs.experts.kv_capacity, chosen, -1)[..., 0]
    fits = request.prompt_tokens + output <= capacity
    np.testing.assert_array_equal(busy.info["rejected"], ~(available & fits))
    assert 0 < busy.info["rejected"].mean() < 1


def test_same_key_same_requests_whatever_the_actions(params, busy):
    other = play(params, script=np.zeros_like(busy.action))
    chex.assert_trees_all_equal(other.state.request, busy.state.request)
    np.testing.assert_array_equal(other.info["gap"], busy.info["gap"])
    np.testing.assert_array_equal(other.state.rate, busy.state.rate)
    assert (other.info["num_completed"] != busy.info["num_completed"]).any()


def test_requests_come_from_the_bank(params, busy):
    rows = {prompt.tobytes() for prompt in np.asarray(params.bank.predicted_quality)}
    seen = busy.state.request.predicted_quality.reshape(-1, 6)
    assert all(row.tobytes() in rows for row in seen)
    assert len({row.tobytes() for row in seen}) > 0.8 * len(seen)
    limits, counts = np.unique(busy.state.request.limits.normalised, return_counts=True)
    np.testing.assert_allclose(limits, params.limits.normalised)
    np.testing.assert_allclose(counts / counts.sum(), params.share, atol=0.1)


# ---- Against replay and the reference ----------------------------------------------------------------------


@pytest.mark.parametrize(
    "changes",
    [{}, {"kv_capacity": 700, "max_num_batched_tokens": 100}],
    ids=["as it is", "little memory, small chunks"],
)
def test_outcomes_equal_replay_and_reference(changes):
    params = changed(edge6()[1], (0.5, 8.0), **SMALL | changes)
    site = {name: np.asarray(values) for name, values in params.site._asdict().items()}
    played = play(params, seed=3, num_experts=3)
    compared, preemptions, rejections = 0, 0, 0
    for e in range(NUM_ENVS):
        request, info, action = lane(played.state.request, e), lane(played.info, e), played.action[e]
        # A request arrives when a step begins, the next one `gap` later.
        arrival_time = np.concatenate([[0.0], np.cumsum(info["gap"].astype(np.float64))])
        prompt_tokens = np.repeat(request.prompt_tokens[:, None], 6, axis=1)
        requests = jaxroute.Requests(arrival_time[:-1], prompt_tokens, request.output_tokens)
        expected = simulate(site, *requests[:3], action)
        if expected.closest_call < RESOLUTION:
            continue
        replayed = jaxroute.replay(params.site, requests, action)
        ended = info["ended"]
        number, expert = info["request"][ended], np.nonzero(ended)[2]
        np.testing.assert_array_equal(expert, action[number])
        way_back = site["network_delay"][expert]
        for other, tolerance in ((replayed, 1e-4), (expected, TIME_TOLERANCE)):
            np.testing.assert_array_equal(info["rejected"], other.status == 1)
            np.testing.assert_array_equal(info["preemptions"][ended], other.preemptions[number])
            for name in ("ttft", "latency"):
                at_expert = info[name][ended] - way_back
                np.testing.assert_allclose(at_expert, getattr(other, name)[number], atol=tolerance, err_msg=name)
        # What has not ended here ends later there.
        left = np.setdiff1d(np.flatnonzero(expected.status == 0), number)
        assert (arrival_time[left] + expected.latency[left] > arrival_time[-1] - TIME_TOLERANCE).all()
        compared += len(number)
        preemptions += expected.preemptions[number].sum()
        rejections += info["rejected"].sum()
    # Enough of everything, or the comparison says nothing.
    assert compared > 100
    assert rejections > 10
    assert preemptions > 0 or not changes


# ---- Reward ------------------------------------------------------------------------------------------------


def test_plain_reward_is_the_quality_of_service():
    env, _ = edge6()
    weights = ("shaping=false", "expected_quality=false", "accelerator_price=0")
    plain_env, params = jaxroute.make("edge-poisson", overrides=tuple(f"reward.{weight}" for weight in weights))
    assert plain_env == env
    played = play(changed(params, (1.0, 12.0)))
    np.testing.assert_allclose(played.reward.sum(1), played.info["qos"].sum((1, 2, 3)), rtol=1e-5)
    assert played.reward.sum() > 50


def test_expected_quality_is_rewarded_when_asked(params, stepped):
    info = stepped.info
    predicted = np.where(info["in_time"], np.swapaxes(stepped.next_state.table.predicted_quality, -1, -2), 0).sum(
        (-2, -1)
    )
    expected = tailored_reward(params, stepped, earned=predicted)
    # After the last step of an episode, the state is already that of the next.
    within = ~stepped.truncated
    np.testing.assert_allclose(stepped.reward[within], expected[within], atol=1e-5)
    assert info["in_time"].sum() > 20
    assert (info["qos_sum"] != predicted)[within & info["in_time"].any((-2, -1))].all()


def test_shaping_telescopes(params, busy):
    without = params._replace(reward=params.reward._replace(shaping=jnp.float32(0.0)))
    unshaped = play(without, num_experts=3)
    shaping = (busy.reward - unshaped.reward).astype(np.float64)
    potential = busy.obs.experts.expected_qos.sum(-1)
    np.testing.assert_array_equal(potential[:, 0], 0)
    np.testing.assert_allclose(potential[:, 1:], busy.next_state.potential[:, :-1], rtol=1e-5)
    np.testing.assert_allclose(shaping.sum(1), busy.next_state.potential[:, -1], atol=1e-4)


# ---- What the router may know ------------------------------------------------------------------------------


def test_truths_stay_hidden(params, single, busy):
    """Other true qualities and lengths of what is pending and in flight: with the same predictions, nothing to see.

    A rate this high lets no time pass, so that `step` shows the state as it is.
    """
    key = jax.random.key(0)
    bank = params.bank._replace(
        quality=1 - params.bank.quality, output_tokens=jnp.roll(params.bank.output_tokens, 1, axis=0)
    )
    seen = 0
    for e, t in [(e, t) for e in range(NUM_ENVS) for t in (20, 40, 60)]:
        state = lane(busy.state, e, t)._replace(rate=np.float32(1e9))
        request = state.request
        tampered = state._replace(
            site=with_output_tokens(params.site, state.site, generated(state.site) + 7),
            table=state.table._replace(quality=1 - state.table.quality),
            request=request._replace(quality=1 - request.quality, output_tokens=request.output_tokens // 2 + 1),
        )
        available = busy.obs.experts.available[e, t]
        if not available.any():
            continue
        action = int(np.argmax(available))
        honest, _, reward, _, _, info = single(key, state, action)
        other, _, other_reward, _, _, other_info = single(key, tampered, action, params._replace(bank=bank))
        assert not info["rejected"]
        assert not other_info["rejected"]
        chex.assert_trees_all_equal(honest, other)
        assert reward == other_reward
        seen += int(in_flight(honest))
    assert seen > 5 * 3 * NUM_ENVS


def test_quality_never_steers_the_dynamics(single, busy):
    key = jax.random.key(1)
    for e in range(NUM_ENVS):
        state = lane(busy.state, e, 50)
        tampered = state._replace(table=state.table._replace(quality=1 - state.table.quality))
        honest, other = single(key, state, 0), single(key, tampered, 0)
        chex.assert_trees_all_equal(honest[0], other[0])
        chex.assert_trees_all_equal(honest[1].site, other[1].site)


# ---- Horizon and rates ---------------------------------------------------------------------------------------


def test_an_episode_ends_at_the_horizon(stepped):
    assert not stepped.terminated.any()
    at_horizon = np.arange(1, stepped.truncated.shape[1] + 1) == HORIZON
    np.testing.assert_array_equal(stepped.truncated, np.stack([at_horizon, at_horizon]))
    np.testing.assert_array_equal(stepped.next_state.step, np.where(stepped.truncated, 0, stepped.state.step + 1))
    assert np.isfinite(stepped.reward).all()


def test_a_new_episode_starts_idle(stepped):
    obs, state = jax.tree.map(lambda leaf: leaf[stepped.truncated], (stepped.obs, stepped.next_state))
    assert (in_flight(obs) == 0).all()
    for name in ("kv_used", "expected_qos", "recent_latency", "pending_output"):
        assert (getattr(obs.experts, name) == 0).all(), name
    assert (state.potential == 0).all()
    assert (np.asarray(slot_status(state.site)) == SlotStatus.EMPTY).all()
    # Every episode starts anew, not all with the same request.
    assert len(np.unique(state.request.predicted_quality[:, 0])) == 2
    assert (state.request.predicted_quality != stepped.state.request.predicted_quality[:, 0]).any()


def test_final_observation_is_the_one_before_the_reset(stepped):
    final = stepped.info["final_observation"]
    for here, there in zip(jax.tree.leaves(stepped.obs), jax.tree.leaves(final), strict=True):
        np.testing.assert_array_equal(here[~stepped.truncated], there[~stepped.truncated])
    gone = (stepped.info["num_completed"] + stepped.info["rejected"])[:, :HORIZON].sum(1)
    left = in_flight(final)[stepped.truncated]
    np.testing.assert_array_equal(left, HORIZON - gone)
    assert (left > 0).all()


def test_the_reward_of_the_last_step_looks_at_the_final_state(params, stepped):
    """A truncation is not an end: shaping counts what is still in flight."""
    weights = jax.tree.map(np.asarray, params.reward)
    info, last = stepped.info, stepped.truncated
    potential = info["final_observation"].experts.expected_qos.sum(-1)[last]
    cost = weights.accelerator_price[0] * info["busy_seconds"].sum(-1)
    shaping = potential - stepped.state.potential[last]
    earned = stepped.reward[last] + cost[last] - shaping
    assert (potential > 0).all()
    # What is left is the predicted quality of those who came in time.
    assert (earned >= -1e-5).all()
    assert (earned <= info["in_time"][last].sum((-2, -1)) + 1e-5).all()


def test_the_rate_is_redrawn_when_asked(stepped):
    asked = ((stepped.state.step + 1) % REDRAW == 0) | stepped.truncated
    np.testing.assert_array_equal(stepped.next_state.rate != stepped.state.rate, asked)
    assert asked.sum() == 4
    assert (stepped.next_state.rate >= RATES[0]).all()
    assert (stepped.next_state.rate <= RATES[1]).all()


def test_the_rate_stays_unless_asked(busy):
    assert (busy.state.rate == busy.state.rate[:, :1]).all()
    assert len(np.unique(busy.state.rate[:, 0])) == NUM_ENVS


def test_gaps_follow_the_rate(params):
    gaps = play(changed(params, (4.0, 4.0)), seed=5).info["gap"]
    assert gaps.mean() == pytest.approx(0.25, abs=5 * 0.25 / gaps.size**0.5)


# ---- Scenarios by name -------------------------------------------------------------------------------------

SMALL_BANK = ("bank.num_prompts=200",)
WITHOUT_DATA = [name for name in jaxroute.SCENARIOS if not name.endswith("azure")]


@pytest.mark.parametrize("name", WITHOUT_DATA)
def test_every_scenario_steps(name):
    """Traced, not compiled: all other tests here run edge-poisson, and the others share its parts."""
    env, params = jaxroute.make(name, overrides=SMALL_BANK)

    def first_step(key):
        obs, state = env.reset(key, params)
        return (obs, state), env.step(key, state, jnp.int32(0), params)

    first, (obs, state, reward, terminated, truncated, info) = jax.eval_shape(first_step, jax.random.key(0))
    chex.assert_trees_all_equal_shapes_and_dtypes(first, (obs, state))
    chex.assert_shape([reward, terminated, truncated], ())
    assert obs.experts.available.shape == (env.num_experts,)
    assert env.num_actions == env.num_experts + 1
    assert info["ended"].shape == (env.num_slots, env.num_experts)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(params))


@pytest.mark.parametrize("name", [name for name in jaxroute.SCENARIOS if name.endswith("azure")])
def test_scenarios_with_data_are_made(name, data_dir):
    env, params = jaxroute.make(name, overrides=(*SMALL_BANK, f"data_dir={data_dir}"))
    assert env.num_experts == params.site.num_experts
    assert params.arrivals.gaps.shape[0] > 1000


def test_arguments_reach_the_environment():
    env, params = jaxroute.make("edge-poisson", rate=(2, 5), horizon=7, redraw_every=3, site="edge3", workload="gamma")
    assert (env.num_experts, env.horizon, env.redraw_every) == (3, 7, 3)
    np.testing.assert_array_equal(params.rate, [2, 5])
    assert params.arrivals.shape == pytest.approx(1 / 16)


@pytest.mark.parametrize(
    ("name", "arguments", "named"),
    [
        ("edge-poison", {}, "edge-poisson"),
        ("nothing like it", {}, "edge16-gamma"),
        ("edge-poisson", {"rate": 0}, "rate=0"),
        ("edge-poisson", {"rate": -1.0}, "rate=-1.0"),
        ("edge-poisson", {"rate": (5.0, 2.0)}, "rate="),
        ("edge-poisson", {"rate": float("nan")}, "rate=nan"),
        ("edge-poisson", {"site": "edge4"}, "edge3"),
        ("edge-poisson", {"bank": "embeded"}, "embedded"),
        ("edge-poisson", {"sites": "edge3"}, "sites"),
        ("edge-poisson", {"overrides": ("reward.shapin=false",)}, "reward.shaping"),
        ("edge-poisson", {"overrides": ("reward.shaping=maybe",)}, "reward.shaping"),
        ("edge-poisson", {"overrides": ("reward.accelerator_price=-1",)}, "accelerator_price"),
        ("edge-poisson", {"overrides": ("workload.rate=0",)}, "rate"),
    ],
    ids=str,
)
def test_mistakes_are_one_line(name, arguments, named):
    with pytest.raises(UserError) as caught:
        jaxroute.make(name, **{"overrides": SMALL_BANK} | arguments)
    message = str(caught.value)
    assert named in message
    assert "\n" not in message
