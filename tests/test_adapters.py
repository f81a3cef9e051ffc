"""The environment behind other libraries' interfaces: their own checks, and the same episodes as without them."""

from __future__ import annotations

import subprocess
import sys
import warnings
from functools import cache

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxroute
from jaxroute.adapters.flat import LIMIT, flat_observation
from jaxroute.adapters.gymnax import GymnaxAdapter
from jaxroute.errors import UserError

pytestmark = pytest.mark.slow

NUM_ENVS, HORIZON = 4, 12


@cache
def scenario():
    return jaxroute.make("edge3-poisson", rate=20.0, horizon=HORIZON, overrides=("bank.num_prompts=200",))


def vector_env(num_envs=NUM_ENVS):
    pytest.importorskip("gymnasium")
    from jaxroute.adapters.gymnasium import GymnasiumVectorEnv

    return GymnasiumVectorEnv(*scenario(), num_envs)


# ---- gymnax ------------------------------------------------------------------------------------------------


@cache
def gymnax_adapter():
    """One for all, as each compiles its own steps."""
    return GymnaxAdapter(*scenario())


def gymnax_episode(adapter):
    """Somewhat more than an episode: the first observation, and all that each step returned."""
    key_reset, *keys = jax.random.split(jax.random.key(0), HORIZON + 3)
    obs, state = adapter.reset(key_reset)
    steps = []
    for number, key in enumerate(keys):
        steps.append(adapter.step(key, state, jnp.int32(number % adapter.num_actions)))
        state = steps[-1][1]
    return obs, jax.device_get(steps)


def test_gymnax_protocol():
    """What gymnax 1.x promises of every step, of truncation and of the reset that follows in the same step."""
    adapter = gymnax_adapter()
    assert (adapter.name, adapter.num_actions) == ("EdgeRouting", 4)
    first, steps = gymnax_episode(adapter)
    fresh = adapter.reset(jax.random.key(1))[1]
    for number, (obs, state, reward, terminated, truncated, info) in enumerate(steps):
        chex.assert_trees_all_equal_shapes_and_dtypes(state, fresh)
        assert obs.shape == first.shape == info["final_observation"].shape
        assert obs.dtype == np.float32
        chex.assert_shape([reward, terminated, truncated], ())
        assert not terminated
        assert truncated == (number == HORIZON - 1)
        assert (info["terminated"], info["truncated"]) == (terminated, truncated)
        assert np.allclose(obs, info["final_observation"], atol=1e-5) == (not truncated)
        assert state.step == (number + 1) % HORIZON


def test_gymnax_spaces_and_wrappers():
    pytest.importorskip("gymnax")
    from gymnax.environments import spaces
    from gymnax.wrappers import FlattenObservationWrapper, LogWrapper

    adapter = GymnaxAdapter(*scenario())
    params = adapter.default_params
    space, actions = adapter.observation_space(params), adapter.action_space(params)
    assert isinstance(space, spaces.Box)
    assert isinstance(actions, spaces.Discrete)
    key = jax.random.key(0)
    assert space.contains(space.sample(key))
    wrapped = LogWrapper(FlattenObservationWrapper(adapter))
    step = jax.jit(chex.assert_max_traces(wrapped.step, n=1))
    obs, state = wrapped.reset(key, params)
    total = 0.0
    for _ in range(HORIZON):
        key, key_action, key_step = jax.random.split(key, 3)
        assert obs.shape == space.shape
        assert space.contains(obs)
        obs, state, reward, _, truncated, info = step(key_step, state, actions.sample(key_action), params)
        total += float(reward)
    assert truncated
    assert info["returned_episode"]
    assert info["returned_episode_lengths"] == HORIZON
    assert info["returned_episode_returns"] == pytest.approx(total, abs=1e-4)


# ---- Gymnasium ---------------------------------------------------------------------------------------------


def test_gymnasium_checker_finds_nothing():
    pytest.importorskip("gymnasium")
    from gymnasium.utils.env_checker import check_env

    from jaxroute.adapters.gymnasium import GymnasiumEnv

    env = GymnasiumEnv(*scenario())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check_env(env, skip_render_check=True)
    env.reset(seed=1)
    ends = [env.step(number % 3)[3] for number in range(HORIZON)]
    assert ends == [False] * (HORIZON - 1) + [True]


def test_vector_env_follows_gymnasium():
    envs = vector_env()
    from gymnasium.vector import AutoresetMode

    assert envs.metadata["autoreset_mode"] is AutoresetMode.SAME_STEP
    assert envs.single_action_space.n == 4
    obs, infos = envs.reset(seed=3)
    envs.action_space.seed(3)
    np.testing.assert_array_equal(infos["action_mask"], np.ones((NUM_ENVS, 4)))
    seen = [obs]
    for number in range(2 * HORIZON):
        obs, reward, terminated, truncated, infos = envs.step(envs.action_space.sample())
        assert envs.observation_space.contains(obs)
        assert envs.observation_space.dtype == obs.dtype
        for values, kind in ((reward, np.float32), (terminated, np.bool_), (truncated, np.bool_)):
            assert (values.shape, values.dtype) == ((NUM_ENVS,), kind)
        assert all(infos[f"_{name}"].shape == (NUM_ENVS,) for name in infos if not name.startswith("_"))
        assert not terminated.any()
        assert truncated.all() == truncated.any() == ((number + 1) % HORIZON == 0)
        assert ("final_obs" in infos) == truncated.any()
        seen.append(obs)
    # Everybody starts over in the same step: what it returns is the first observation, not the last one.
    final = np.stack(infos["final_obs"])
    assert final.shape == obs.shape
    assert (final != obs).any(1).all()
    assert len({row.tobytes() for row in np.concatenate(seen)}) == NUM_ENVS * len(seen), "two observations are alike"


def test_same_seed_same_episodes():
    envs = vector_env()
    script = np.random.default_rng(0).integers(0, 3, (5, NUM_ENVS))

    def run(seed):
        first = envs.reset(seed=seed)
        return [first, *(envs.step(actions) for actions in script)]

    chex.assert_trees_all_equal(run(7), run(7))
    assert (run(7)[0][0] != run(8)[0][0]).any()
    assert (run(None)[0][0] != run(None)[0][0]).any()


def test_gymnasium_and_gymnax_tell_the_same():
    """Under the keys of each environment of the batch, which only its insides know."""
    envs, adapter = vector_env(), gymnax_adapter()
    envs.reset(seed=0)
    actions = np.arange(NUM_ENVS) % 4
    for _ in range(HORIZON):
        keys = jax.random.split(jax.random.split(envs._key)[1], NUM_ENVS)
        states = envs._state
        obs, reward, _, truncated, infos = envs.step(actions)
        for e in range(NUM_ENVS):
            state = jax.tree.map(lambda leaf, e=e: leaf[e], states)
            alone = adapter.step(keys[e], state, jnp.int32(actions[e]))
            np.testing.assert_allclose(obs[e], alone[0], rtol=1e-4, atol=1e-4)
            np.testing.assert_allclose(reward[e], alone[2], rtol=1e-5, atol=1e-5)
            for name in (
                "rejected",
                "overflowed",
                "declined",
                "gap",
                "qos_sum",
                "num_completed",
                "num_late",
                "num_lost",
            ):
                np.testing.assert_allclose(infos[name][e], alone[5][name], rtol=1e-5, atol=1e-5, err_msg=name)
            assert infos["declined"][e] == (e == 3)
            assert infos["action_mask"][e, 3] == 1
            if truncated[e]:
                np.testing.assert_allclose(infos["final_obs"][e], alone[5]["final_observation"], rtol=1e-4, atol=1e-4)
    assert truncated.all()


def test_stable_baselines3_learns_in_it():
    pytest.importorskip("stable_baselines3")
    from stable_baselines3 import PPO
    from stable_baselines3.common.vec_env import VecMonitor

    from jaxroute.adapters.stable_baselines3 import StableBaselinesVecEnv

    envs = StableBaselinesVecEnv(*scenario(), num_envs=NUM_ENVS)
    agent = PPO("MlpPolicy", VecMonitor(envs), n_steps=128, batch_size=128, n_epochs=2, seed=0, device="cpu")
    before = [values.detach().clone() for values in agent.policy.parameters()]
    agent.learn(4 * 128 * NUM_ENVS)
    assert agent.num_timesteps == 2048
    assert all(values.isfinite().all() for values in agent.policy.parameters())
    assert any((values != old).any() for values, old in zip(agent.policy.parameters(), before, strict=True))
    # Each episode ended at the horizon, and the agent was told that it was cut off.
    assert {episode["l"] for episode in agent.ep_info_buffer} == {HORIZON}
    envs.reset()
    for _ in range(HORIZON):
        envs.step_async(np.zeros(NUM_ENVS, np.int64))
        obs, _, dones, infos = envs.step_wait()
    assert dones.all()
    assert all(info["TimeLimit.truncated"] for info in infos)
    assert all((info["terminal_observation"] != row).any() for info, row in zip(infos, obs, strict=True))


def test_without_away_there_is_a_mask_for_the_experts_alone():
    pytest.importorskip("gymnasium")
    from jaxroute.adapters.gymnasium import GymnasiumVectorEnv

    env, params = jaxroute.make("edge3-poisson", overrides=("bank.num_prompts=200", "env.away=false"))
    envs = GymnasiumVectorEnv(env, params, 2)
    assert envs.single_action_space.n == 3
    obs, infos = envs.reset(seed=0)
    np.testing.assert_array_equal(infos["action_mask"], np.ones((2, 3)))
    # What is seen of away: five numbers.
    assert obs.shape[1] == vector_env().single_observation_space.shape[0] - 5


# ---- Mistakes ----------------------------------------------------------------------------------------------


def test_mistakes_are_one_line():
    envs = vector_env()
    with pytest.raises(UserError, match="reset"):
        envs.step(np.zeros(NUM_ENVS, int))
    with pytest.raises(UserError, match="num_envs=0"):
        vector_env(num_envs=0)


@pytest.mark.parametrize("library", ["gymnasium", "gymnax"])
def test_a_missing_library_is_named_with_its_extra(library, tmp_path):
    # What Python finds first: a module that is not there.
    (tmp_path / f"{library}.py").write_text(f"raise ModuleNotFoundError(name='{library}')")
    use = {
        "gymnasium": "import jaxroute.adapters.gymnasium",
        "gymnax": "from jaxroute.adapters import gymnax; gymnax._spaces()",
    }[library]
    program = f"import sys; sys.path.insert(0, {str(tmp_path)!r}); {use}"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120, check=False)
    last = done.stderr.strip().splitlines()[-1]
    assert f"module {library}" in last
    assert f"pip install 'jaxroute[{library}]'" in last


def test_observations_are_cut_off_at_the_space():
    env, params = scenario()
    obs = jax.eval_shape(lambda key: env.reset(key, params)[0], jax.random.key(0))
    huge = jax.tree.map(lambda leaf: jnp.full(leaf.shape, 1e9 if leaf.dtype == jnp.float32 else 1, leaf.dtype), obs)
    flat = flat_observation(huge)
    assert flat.max() == LIMIT
    assert jnp.isfinite(flat).all()
