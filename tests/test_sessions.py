"""Sessions and prefix caching in the environment, against the reference, which keeps every block."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxroute
from jaxroute.errors import UserError
from jaxroute.serving import SlotStatus, slot_status
from jaxroute.serving.reference import Texts, simulate

# As in test_environment.
TIME_TOLERANCE, RESOLUTION = 1e-3, 1e-5  # s
NUM_ENVS, NUM_STEPS = 8, 150
CACHED = ("site.prefix_caching=true", "workload.sessions.seconds_between_turns=3", "workload.sessions.max_context=900")


@pytest.fixture(scope="module")
def made():
    """Three experts that hold a few chats each."""
    env, params = jaxroute.make("edge3-poisson", rate=(1.0, 4.0), workload="chat", overrides=CACHED)
    small = jnp.array([1600, 2000, 2400], jnp.int32)
    return env, params._replace(site=params.site._replace(kv_capacity=small))


@pytest.fixture(scope="module")
def played(made):
    """Episodes with random actions, step by step; leading axes env and step."""
    env, params = made

    def episode(key):
        def step(carry, key):
            obs, state = carry
            action = jax.random.randint(jax.random.fold_in(key, 9), (), 0, env.num_experts, jnp.int32)
            after, new, _, _, _, info = env.step(key, state, action, params)
            return (after, new), (obs, state.request, action, info, new.site.slots.texts.cached_tokens)

        return jax.lax.scan(step, env.reset(key, params), jax.random.split(key, NUM_STEPS))[1]

    return jax.tree.map(np.asarray, jax.jit(jax.vmap(episode))(jax.random.split(jax.random.key(0), NUM_ENVS)))


def test_outcomes_equal_the_reference(made, played):
    site = {name: np.asarray(values) for name, values in made[1].site._asdict().items()}
    _, requests, actions, infos, cached = played
    compared = preempted = found = 0
    for e in range(NUM_ENVS):
        request, info, action = (jax.tree.map(lambda leaf: leaf[e], part) for part in (requests, infos, actions))  # noqa: B023
        arrival_time = np.concatenate([[0.0], np.cumsum(info["gap"].astype(np.float64))])[:-1]
        text = request.text
        texts = Texts(text.session, text.shared_tokens, text.application, text.system_tokens, block_size=16)
        expected = simulate(site, arrival_time, request.prompt_tokens, request.output_tokens, action, texts=texts)
        if expected.closest_call < RESOLUTION:
            continue
        np.testing.assert_array_equal(info["rejected"], expected.status == 1)
        step, slot, expert = np.nonzero(info["ended"])
        number = info["request"][step, slot, expert]
        np.testing.assert_array_equal(info["preemptions"][step, slot, expert], expected.preemptions[number])
        np.testing.assert_array_equal(cached[e][step, expert, slot], expected.cached_tokens[number])
        for name in ("ttft", "latency"):
            at_expert = info[name][step, slot, expert] - site["network_delay"][expert]
            np.testing.assert_allclose(at_expert, getattr(expected, name)[number], atol=TIME_TOLERANCE, err_msg=name)
        compared += len(number)
        preempted += expected.preemptions[number].sum()
        found += expected.cached_tokens[number].sum()
    # Enough of everything, or the comparison says nothing.
    assert compared > 200
    assert preempted > 10
    assert found > 2000


def test_a_prompt_begins_with_what_was_said_before(made, played):
    """Its application's system prompt and its session's text, and then its own words from the bank."""
    _, params = made
    _, request, *_ = played
    own = np.asarray(params.bank.prompt_tokens)[request.row]
    head = np.maximum(request.text.shared_tokens, request.text.system_tokens)
    np.testing.assert_array_equal(request.prompt_tokens, head + own)
    assert request.prompt_tokens.max() <= int(params.sessions.max_context)
    assert set(np.unique(request.text.system_tokens)) == {0, 256}
    turns = np.unique(request.text.session[0], return_counts=True)[1]
    assert 1.5 < turns.mean() < 3.5
    assert (request.text.shared_tokens > 0).mean() > 0.2


def test_the_router_sees_what_is_cached(played):
    obs, request, *_ = played
    cached = obs.candidates.cached_tokens
    assert (cached % 16 == 0).all()
    assert (cached < request.prompt_tokens[..., None]).all()
    assert (cached <= np.maximum(request.text.shared_tokens, request.text.system_tokens)[..., None]).all()
    assert (cached.max(-1) > 0).mean() > 0.2
    # A new session of an application without a system prompt has nothing anywhere.
    nothing = (request.text.shared_tokens == 0) & (request.text.system_tokens == 0)
    assert nothing.any()
    assert (cached[nothing] == 0).all()
    np.testing.assert_array_equal(obs.arrival.session, request.text.session)


def test_what_is_seen_is_what_is_found(made):
    """A request that an idle expert takes at once finds just what the router saw there."""
    env, params = made
    step = jax.jit(env.step)
    obs, state = env.reset(jax.random.key(3), params)
    seen = {}
    for t in range(60):
        action = jnp.int32(t % 3)
        idle = (state.site.num_running + state.site.num_waiting)[action] == 0
        if idle:
            seen[int(state.request.number)] = int(obs.candidates.cached_tokens[action])
        obs, state, *_, info = step(jax.random.key(t), state, action, params)
        active = slot_status(state.site) != SlotStatus.EMPTY
        for number, cached in zip(
            np.asarray(state.site.slots.request)[active],
            np.asarray(state.site.slots.texts.cached_tokens)[active],
            strict=True,
        ):
            if cached >= 0 and int(number) in seen:
                assert cached == seen.pop(int(number))
        del info
    assert len(seen) < 3


def test_hidden_prefixes_are_not_seen():
    env, params = jaxroute.make("edge3-poisson", workload="chat", overrides=(*CACHED, "env.see_prefixes=false"))
    obs, _ = jax.eval_shape(env.reset, jax.random.key(0), params)
    assert obs.candidates.cached_tokens is None


def test_nothing_is_kept_where_nothing_is_cached():
    env, params = jaxroute.make("edge3-poisson")
    obs, state = jax.eval_shape(env.reset, jax.random.key(0), params)
    assert state.site.cache is state.site.slots.texts is state.sessions is state.request.text is None
    assert obs.candidates.cached_tokens is obs.arrival.session is None


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (("dynamics.outages=retried",), "outages=retried does not go together with sessions"),
        (("dynamics.gateways=2",), "gateways does not go together with sessions"),
        (("workload.sessions.turns=0.5",), "turns=0.5 must be at least 1"),
        (("workload.sessions.max_context=200",), "max_context=200 must exceed the longest system prompt, 256"),
        (("workload.sessions.seconds_between_turns=1e5",), "sessions would be alive at once, and 4096 can be"),
        (("site.block_size=0",), "block_size=0 must be from 1"),
        (("site.block_size=100000",), "block_size=100000 exceeds an expert's kv_capacity"),
    ],
)
def test_mistakes_are_one_line(overrides, message):
    with pytest.raises(UserError, match=message):
        jaxroute.make("edge3-poisson", workload="chat", overrides=("site.prefix_caching=true", *overrides))
