"""PPO: advantages worked out by hand, probe environments with known answers, and one compilation."""

from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxroute.config import load_config
from jaxroute.errors import UserError
from jaxroute.learning import PPOConfig, generalised_advantages, make_ppo
from jaxroute.learning.ppo import relative_to_group
from jaxroute.networks import build_network
from jaxroute.scenarios import training_env
from jaxroute.serving import slot_status

pytestmark = pytest.mark.slow

# ---- Advantages by hand ------------------------------------------------------------------------------------

# Discount 1/2 and lambda 1/2, so that an advantage takes over a quarter of the next one. Each case has the same
# rewards and values; delta = r + v' / 2 - v is 1, 1.75, 2.5, 3.5 where nothing ends.
REWARDS, VALUES, NEXT_VALUES = [1.0, 2.0, 3.0, 4.0], [0.5, 1.0, 1.5, 2.0], [1.0, 1.5, 2.0, 3.0]
ADVANTAGES = {
    # 3.5; 2.5 + 3.5 / 4; and so on backwards.
    "endless": ([], {}, [1.6484375, 2.59375, 3.375, 3.5]),
    # delta_1 = 2 - 1 without any v', and nothing is taken over.
    "terminated": ([1], {}, [1.25, 1.0, 3.375, 3.5]),
    # delta_1 = 2 + 8 / 2 - 1 with the value of the final observation, and nothing is taken over.
    "truncated": ([], {1: 8.0}, [2.25, 5.0, 3.375, 3.5]),
    # delta_0 = 1 - 0.5; delta_2 = 3 + 6 / 2 - 1.5; 1.75 + 4.5 / 4.
    "both": ([0], {2: 6.0}, [0.5, 2.875, 4.5, 3.5]),
    # A termination that is also the horizon: there is nothing to expect any more.
    "at once": ([2], {2: 6.0}, [1.53125, 2.125, 1.5, 3.5]),
}


def column(case):
    terminated, truncated, expected = ADVANTAGES[case]
    next_values = [truncated.get(t, value) for t, value in enumerate(NEXT_VALUES)]
    ends = [[t in marks for t in range(4)] for marks in (terminated, truncated)]
    return REWARDS, VALUES, next_values, *ends, expected


def test_advantages_with_terminations_and_truncations():
    # All cases side by side, as environments are.
    *inputs, expected = (jnp.array(rows).T for rows in zip(*map(column, ADVANTAGES), strict=True))
    advantages, targets = generalised_advantages(*inputs, discount=0.5, gae_lambda=0.5)
    for e, case in enumerate(ADVANTAGES):
        np.testing.assert_allclose(advantages[:, e], expected[:, e], err_msg=case)
    np.testing.assert_allclose(targets, advantages + inputs[1])


def test_lambda_from_one_step_to_whole_returns():
    rewards, values, next_values, terminated, truncated, _ = (jnp.array(row) for row in column("endless"))
    one_step, _ = generalised_advantages(rewards, values, next_values, terminated, truncated, 0.5, 0.0)
    np.testing.assert_allclose(one_step, rewards + 0.5 * next_values - values)
    next_values = jnp.append(values[1:], 3.0)
    _, returns = generalised_advantages(rewards, values, next_values, terminated, truncated, 0.5, 1.0)
    np.testing.assert_allclose(
        returns, [1 + 2 / 2 + 3 / 4 + 4 / 8 + 3 / 16, 2 + 3 / 2 + 4 / 4 + 3 / 8, 3 + 4 / 2 + 3 / 4, 4 + 3 / 2]
    )


# ---- Probes with known answers -----------------------------------------------------------------------------


class Table(nn.Module):
    """A logit for each state and action, and a value for each state; states come as one-hot vectors."""

    num_actions: int

    def prepare(self, obs):
        return obs

    @nn.compact
    def __call__(self, obs):
        zeros = nn.initializers.zeros
        logits = nn.Dense(self.num_actions, use_bias=False, kernel_init=zeros)(obs)
        return logits, nn.Dense(1, use_bias=False, kernel_init=zeros)(obs)[0]


BANDIT, FORK, UNPAID, PAID, ENDLESS = slice(0, 3), 3, 4, 5, 6
NUM_STATES, NUM_ACTIONS = 7, 3
LAST = ENDLESS + 2


class Probes:
    """Three small tasks; each episode is one of them, and as a table keeps them apart, all are learned at once.

    Bandit: the state is the action to take; one step. Delayed: at the fork, action 1 leads to the paid state and the
    others to the unpaid one; there the episode ends whatever one does. Endless: pays 1 for ever, but episodes are cut
    off after three steps, and the router cannot tell when.
    """

    def __init__(self):
        self.traces = 0

    def observe(self, state):
        return jax.nn.one_hot(jnp.minimum(state, ENDLESS), NUM_STATES)

    def start(self, key):
        return jax.random.choice(key, jnp.array([0, 1, 2, FORK, ENDLESS]))

    def reset(self, key, params):
        state = self.start(key)
        return self.observe(state), state

    def step(self, key, state, action, params):
        self.traces += 1
        endless = state >= ENDLESS
        right = jnp.where(state < FORK, action == state, (state == PAID) | endless)
        moved = jnp.where(state == FORK, jnp.where(action == 1, PAID, UNPAID), state + endless)
        terminated, truncated = (state != FORK) & ~endless, state == LAST
        state = jnp.where(terminated | truncated, self.start(key), moved)
        info = {"final_observation": self.observe(moved)}
        return self.observe(state), state, right.astype(jnp.float32), terminated, truncated, info


SETTINGS = {
    "num_envs": 64,
    "group_size": 1,
    "num_steps": 8,
    "num_epochs": 4,
    "num_minibatches": 4,
    "total_steps": 64 * 8 * 60,
    "learning_rate": 0.05,
    "discount": 0.5,
    "gae_lambda": 0.9,
    "entropy_bonus": 0.0,
}
CALLS, UPDATES_PER_CALL = 6, 10


class Run(NamedTuple):
    probabilities: np.ndarray
    """(state, action)."""
    values: np.ndarray
    """(state,), in rewards."""
    metrics: list[dict[str, float]]
    traces_after: list[int]
    updates: int


@pytest.fixture(scope="module")
def runs():
    """Three runs of one learner: two with the same seed, and another."""
    probes, network = Probes(), Table(NUM_ACTIONS)
    learner = make_ppo(PPOConfig(**SETTINGS), probes, (), network, UPDATES_PER_CALL)
    finished = []
    for seed in (0, 0, 1):
        state = learner.init(jax.random.key(seed))
        metrics, traces = [], []
        for _ in range(CALLS):
            state, now = learner.update(state)
            metrics.append({name: float(value) for name, value in now.items()})
            traces.append(probes.traces)
        logits, values = jax.vmap(lambda obs, params=state.params: network.apply(params, obs))(jnp.eye(NUM_STATES))
        values = np.asarray(values) / (1 - SETTINGS["discount"])
        finished.append(Run(np.asarray(jax.nn.softmax(logits)), values, metrics, traces, int(state.updates)))
    return finished


def test_a_bandit_is_learned(runs):
    for run in runs:
        assert (np.diag(run.probabilities[BANDIT]) > 0.97).all()
        np.testing.assert_allclose(run.values[BANDIT], 1, atol=0.05)


def test_a_late_reward_is_credited_to_the_first_action(runs):
    for run in runs:
        assert run.probabilities[FORK, 1] > 0.97
        # One step later the reward is worth half: discount 1/2. What follows a termination is worth nothing.
        np.testing.assert_allclose(run.values[[FORK, PAID]], [0.5, 1.0], atol=0.05)
        assert abs(run.values[UNPAID]) < 0.2


def test_a_truncation_is_not_an_end(runs):
    for run in runs:
        # 1 + 1/2 + 1/4 + ... = 2; were three steps all there is, it would be 1.42 on average.
        assert run.values[ENDLESS] == pytest.approx(2, abs=0.05)


# ---- The loop ----------------------------------------------------------------------------------------------


def test_same_seed_same_metrics(runs):
    first, again, other = runs
    assert first.metrics == again.metrics
    np.testing.assert_array_equal(first.probabilities, again.probabilities)
    assert first.metrics != other.metrics
    assert first.metrics[0]["train/reward"] < first.metrics[-1]["train/reward"]


def test_an_update_is_traced_once(runs):
    first, again, other = runs
    traces = first.traces_after + again.traces_after + other.traces_after
    assert traces[0] > 0
    assert len(set(traces)) == 1


def test_metrics_are_finite_and_plausible(runs):
    for run in runs:
        assert run.updates == CALLS * UPDATES_PER_CALL
        for now in run.metrics:
            assert np.isfinite(list(now.values())).all()
            assert 0 <= now["ppo/entropy"] <= np.log(3) + 1e-5
            assert 0 <= now["ppo/clip_fraction"] <= 1
            assert now["ppo/approx_kl"] > -1e-5
            assert now["ppo/explained_variance"] <= 1
    assert runs[0].metrics[0]["ppo/entropy"] > runs[0].metrics[-1]["ppo/entropy"]


def test_counts_and_sizes():
    learner = make_ppo(PPOConfig(**SETTINGS | {"total_steps": 2000}), Probes(), (), Table(NUM_ACTIONS))
    assert learner.steps_per_update == 64 * 8
    assert learner.num_updates == 3


# ---- Groups ------------------------------------------------------------------------------------------------


def test_the_group_mean_is_taken_away_at_each_step():
    advantages = jnp.array([[1.0, 3.0, 10.0, 30.0], [0.0, 0.0, -5.0, 5.0]])
    relative = relative_to_group(advantages, 2)
    np.testing.assert_allclose(relative, [[-1, 1, -10, 10], [0, 0, -5, 5]])
    np.testing.assert_array_equal(relative_to_group(advantages, 1), advantages)


@pytest.mark.parametrize("size", [2, 3])
def test_the_baseline_is_unbiased(size):
    """Over all that a group may do, the gradient expected is the true one, times (size - 1) / size."""
    probabilities, earned = np.array([0.2, 0.8]), np.array([3.0, 1.0])
    by_hand, true = np.zeros(2), np.zeros(2)
    of_log = np.eye(2) - probabilities  # gradient of the log-probability of each action with respect to the logits
    for actions in np.ndindex(*[2] * size):
        relative = np.asarray(relative_to_group(jnp.array(earned[list(actions)])[None], size))[0]
        by_hand += probabilities[list(actions)].prod() * (relative[:, None] * of_log[list(actions)]).mean(0)
    for action in range(2):
        true += probabilities[action] * earned[action] * of_log[action]
    np.testing.assert_allclose(by_hand, true * (size - 1) / size, rtol=1e-6)


class Weather:
    """A bandit whose state is the action to take, and whose pay depends on the weather far more than on the action.

    The weather and the next state are drawn from the key, whatever one does.
    """

    def observe(self, state):
        return jax.nn.one_hot(state, NUM_ACTIONS)

    def reset(self, key, params):
        state = jax.random.randint(key, (), 0, NUM_ACTIONS)
        return self.observe(state), state

    def step(self, key, state, action, params):
        key_weather, key_state = jax.random.split(key)
        reward = (action == state) + 300 * jax.random.normal(key_weather)
        obs, state = self.reset(key_state, params)
        return obs, state, reward, jnp.bool_(False), jnp.bool_(False), {}


def learn_weather(group_size, seed=0, **changes):
    """Return the probabilities (state, action) after training, the last metrics, and the state after each update."""
    network = Table(NUM_ACTIONS)
    config = PPOConfig(**SETTINGS | {"group_size": group_size, "num_epochs": 1, "total_steps": 64 * 8 * 30} | changes)
    learner = make_ppo(config, Weather(), (), network)
    states = [learner.init(jax.random.key(seed))]
    for _ in range(learner.num_updates):
        # A copy, as an update uses up the state that it is given.
        state, metrics = learner.update(jax.tree.map(lambda leaf: leaf.copy(), states[-1]))
        states.append(state)
    logits = jax.vmap(lambda obs: network.apply(states[-1].params, obs)[0])(jnp.eye(NUM_ACTIONS))
    return np.asarray(jax.nn.softmax(logits)), {name: float(value) for name, value in metrics.items()}, states


def test_a_group_sees_through_what_swamps_others():
    alone, _, _ = learn_weather(1)
    together, metrics, _ = learn_weather(4)
    assert np.diag(alone).mean() < 0.6
    assert (np.diag(together) > 0.97).all()
    assert metrics["ppo/variance_left"] < 1e-3


@pytest.mark.parametrize("size", [1, 4])
def test_members_share_the_keys_of_their_steps(size):
    """One key for each group at each step; groups of one draw what environments without groups do."""
    *_, states = learn_weather(size, total_steps=64 * 8)
    _, key_rollout = jax.random.split(states[0].key)
    for key in jax.random.split(key_rollout, 8):
        _, key_env = jax.random.split(key)
        _, drawn = jax.vmap(lambda key: Weather().reset(jax.random.split(key)[1], ()))(
            jax.random.split(key_env, 64 // size)
        )
    np.testing.assert_array_equal(states[1].env_state, np.repeat(drawn, size))


class Memory:
    """Each environment keeps the number that it has drawn at its reset."""

    def reset(self, key, params):
        state = jax.random.bits(key)
        return jnp.zeros(NUM_STATES), state

    def step(self, key, state, action, params):
        return jnp.zeros(NUM_STATES), state, jnp.float32(0.0), jnp.bool_(False), jnp.bool_(False), {}


def test_a_group_goes_on_from_one_of_its_members():
    learner = make_ppo(
        PPOConfig(**SETTINGS | {"group_size": 4, "num_steps": 1, "num_epochs": 1}), Memory(), (), Table(NUM_ACTIONS)
    )
    before = learner.init(jax.random.key(0))
    numbers = np.array(before.env_state).reshape(-1, 4)
    assert len(np.unique(numbers)) == 64
    after = np.asarray(learner.update(before)[0].env_state).reshape(-1, 4)
    assert (after == after[:, :1]).all()
    chosen = (numbers == after[:, :1]).argmax(1)
    assert (numbers[np.arange(16), chosen] == after[:, 0]).all()
    assert len(np.unique(chosen)) == 4  # not always the same member


def test_members_of_a_group_meet_the_same_requests():
    """Through a change of load and a reset, on sites of their own, whatever each has done to its experts."""
    overrides = ["site=edge3", "network=mlp", "train.random_sites=1", "train.redraw_every=5", "train.horizon=11"]
    config = load_config([*overrides, "ppo.num_envs=16", "ppo.group_size=4", "ppo.num_steps=8", "ppo.total_steps=256"])
    learner = make_ppo(config.ppo, *training_env(config), build_network(config.network, config.env.away))
    state = learner.init(jax.random.key(0))
    for _ in range(2):
        state, _ = learner.update(state)
    after = state.env_state
    for of_envs in (after.request, after.arrivals, after.rate, after.recent.gap, after.fleet, after.step):
        for leaf in map(np.asarray, jax.tree.leaves(of_envs)):
            of_groups = leaf.reshape(4, 4, *leaf.shape[1:])
            np.testing.assert_array_equal(of_groups, np.broadcast_to(of_groups[:, :1], of_groups.shape))
    assert len(np.unique(after.rate)) == 4
    assert (np.asarray(after.step) == 16 - 11).all()
    placed = np.asarray(slot_status(after.site)).reshape(4, 4, -1)
    assert (placed != placed[:, :1]).any()


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"num_envs": 30}, "num_envs=30"),
        ({"group_size": 0}, "group_size=0"),
        ({"group_size": 24}, "num_envs=64 must be a positive multiple of num_minibatches=4 and of group_size=24"),
        ({"num_envs": 0}, "num_envs=0"),
        ({"num_steps": 0}, "num_steps=0"),
        ({"total_steps": 0}, "total_steps=0"),
        ({"learning_rate": 0.0}, "learning_rate"),
        ({"learning_rate": float("nan")}, "learning_rate"),
        ({"discount": 1.0}, "discount=1.0"),
        ({"discount": -0.1}, "discount"),
        ({"gae_lambda": 1.1}, "gae_lambda=1.1"),
        ({"clip": 0.0}, "clip"),
    ],
    ids=str,
)
def test_mistakes_are_one_line(changes, named):
    with pytest.raises(UserError) as caught:
        PPOConfig(**SETTINGS | changes)
    message = str(caught.value)
    assert named in message
    assert "\n" not in message
