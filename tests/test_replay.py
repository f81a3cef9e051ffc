"""`jaxroute.replay` against the token-by-token reference, worked examples and a measured run."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import (
    HAND_CASES,
    PENCIL,
    REAL_SIZES,
    Case,
    heavy_case,
    mean_latencies,
    random_case,
    random_site,
    real_size_case,
    site_arrays,
    vllm_run,
)
from hypothesis import assume, given
from hypothesis import strategies as st

import jaxroute
from jaxroute.errors import UserError
from jaxroute.serving import (
    SiteState,
    SlotStatus,
    advance,
    ages,
    can_accept,
    computed,
    enqueue,
    generated,
    idle_site,
    slot_status,
)
from jaxroute.serving.reference import Result, simulate

TOLERANCE = 1e-3  # s, on every request
# The engine computes in float32. Where two events are nearer to each other than this, their order is not its
# to get right, and one order or the other changes everything after it. A case with such a pair says nothing.
RESOLUTION = 1e-5  # s

# One shape for all random cases, so that the engine compiles once.
PADDED = (64, 6)


def replay(case: Case) -> "jaxroute.Outcomes":
    requests = jaxroute.Requests(
        arrival_time=case.arrival_time, prompt_tokens=case.prompt_tokens, output_tokens=case.output_tokens
    )
    return jaxroute.replay(jaxroute.Site(**case.site), requests, case.assignment)


def assert_agree(outcomes: "jaxroute.Outcomes", expected: Result) -> None:
    np.testing.assert_array_equal(outcomes.status, expected.status, err_msg="status")
    np.testing.assert_array_equal(outcomes.preemptions, expected.preemptions, err_msg="preemptions")
    for name in ("ttft", "latency"):
        np.testing.assert_allclose(
            getattr(outcomes, name), getattr(expected, name), rtol=0, atol=TOLERANCE, err_msg=name
        )


# ---- Against the reference ---------------------------------------------------------------------------------


@given(
    seed=st.integers(0, 2**32 - 1),
    num_requests=st.integers(1, PADDED[0]),
    num_experts=st.integers(1, PADDED[1] - 1),
)
def test_random_sites_agree_with_the_reference(seed, num_requests, num_experts):
    case = random_case(seed, num_requests, num_experts, PADDED)
    expected = simulate(*case.inputs)
    assume(expected.closest_call > RESOLUTION)
    assert_agree(replay(case), expected)


def contents(state: SiteState) -> dict[str, jax.Array]:
    """What the experts and their requests have come to, however it is kept."""
    slots = state.slots._replace(arrival=ages(state), finish=generated(state), prefilled=computed(state))
    empty = slot_status(state) == SlotStatus.EMPTY
    columns = {name: values for name, values in slots._asdict().items() if values is not None}
    requests = {name: jnp.where(empty, 0, values) for name, values in columns.items()}
    experts = {name: getattr(state, name) for name in ("clock", "duration", "num_running", "num_waiting", "kv_held")}
    return requests | experts | {"status": slot_status(state)}


def test_many_experts_fare_as_each_site_alone():
    """Among many, those with an event are gathered, more than once if need be; every one must come out unchanged."""
    num_sites, num_experts, num_steps = 24, 5, 60
    rng = np.random.default_rng(7)
    sites = [jaxroute.Site(**random_site(rng, num_experts, num_experts)) for _ in range(num_sites)]
    sites = jax.tree.map(lambda *leaves: jnp.stack(leaves), *sites)
    steps = (
        rng.integers(0, num_experts, (num_sites, num_steps)),
        rng.integers(1, 90, (num_sites, num_steps)),
        rng.integers(1, 160, (num_sites, num_steps)),
        # Some sites meet nothing for long, and then everything at once.
        (rng.exponential(0.05, (num_sites, num_steps)) * rng.choice([0, 1, 20], (num_sites, num_steps))).astype("f4"),
    )

    def run(site, steps):
        def step(state, request):
            expert, prompt, output, gap = request
            prompt, output = (jnp.broadcast_to(tokens, (num_experts,)) for tokens in (prompt, output))
            accepted = (jnp.arange(num_experts) == expert) & can_accept(site, state, prompt, output)
            state, _ = enqueue(state, accepted, jnp.int32(0), prompt, output)
            state = advance(site, state, gap)
            return state, contents(state)

        return jax.lax.scan(step, idle_site(num_experts, 16), steps)[1]

    together = jax.jit(jax.vmap(run))(sites, steps)
    alone = jax.jit(lambda *inputs: jax.lax.map(lambda each: run(*each), inputs))(sites, steps)
    assert (together["status"] == SlotStatus.ENDED).sum() > 100
    assert together["preemptions"].sum() > 0
    # The compiler rounds a little differently; a request that fared otherwise would differ by more.
    chex.assert_trees_all_close(together, alone, rtol=1e-5, atol=1e-5)


def test_heavy_load_agrees_with_the_reference():
    case = heavy_case()
    expected = simulate(*case.inputs)
    assert expected.closest_call > RESOLUTION
    assert expected.preemptions.sum() >= 300
    assert expected.status.sum() >= 20
    assert_agree(replay(case), expected)


@pytest.mark.slow
@pytest.mark.parametrize("size", REAL_SIZES, ids=lambda size: f"{size.max_num_seqs} seats")
def test_servers_of_real_size_agree_with_the_reference(size):
    """Full batches, long queues, and preemptions at 40,000 KV tokens and at 400,000."""
    case = real_size_case(size)
    expected = simulate(*case.inputs)
    assert expected.closest_call > RESOLUTION
    for server in (0, 1):
        assert expected.preemptions[case.assignment == server].sum() >= 200
    assert_agree(replay(case), expected)


def test_measured_vllm_run(data_dir):
    run = vllm_run(data_dir)
    outcomes = replay(run.case)
    assert (outcomes.status == 0).all()
    means = mean_latencies(outcomes.ttft, outcomes.latency, run.case.output_tokens)
    for name, measured in run.means.items():
        assert means[name] == pytest.approx(measured, rel=0.02), name


# ---- By hand -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", HAND_CASES.values(), ids=HAND_CASES)
def test_worked_examples(case):
    outcomes = replay(case)
    for name, expected in case.expected.items():
        np.testing.assert_allclose(getattr(outcomes, name)[: len(expected)], expected, rtol=0, atol=1e-5, err_msg=name)


def test_one_request_alone():
    case = Case(site_arrays(PENCIL), *map(np.array, ([2.0], [16], [3], [0])))
    outcomes = replay(case)
    assert all(
        isinstance(field, np.ndarray) and field.shape == (1,)
        for field in (outcomes.status, outcomes.ttft, outcomes.latency, outcomes.preemptions)
    )
    assert outcomes.ttft[0] == pytest.approx(2.25, abs=1e-5)
    assert outcomes.latency[0] == pytest.approx(5.421875, abs=1e-5)


def test_late_start_keeps_precision():
    # Traces carry times of day: at 1e9 s a float32 step is a minute.
    case = HAND_CASES["preemption"]
    late = Case(case.site, case.arrival_time + 2.0**30, *case.inputs[2:])
    np.testing.assert_allclose(replay(late).latency, replay(case).latency, atol=1e-5)


# ---- Mistakes of the caller --------------------------------------------------------------------------------

GOOD = {
    "site": {name: np.repeat(values, 2) for name, values in site_arrays(PENCIL).items()},
    "arrival_time": np.array([0.0, 1.0, 2.0]),
    "prompt_tokens": np.array([8, 8, 8]),
    "output_tokens": np.array([2, 2, 2]),
    "assignment": np.array([0, 1, 0]),
}

MISTAKES = [
    # The field that is wrong, which the message names, and its value.
    ("arrival_time", [0.0, 2.0, 1.0]),
    ("arrival_time", [0.0, np.nan, 2.0]),
    ("prompt_tokens", [8, 8]),
    ("prompt_tokens", [8, 0, 8]),
    ("prompt_tokens", [[8, 8, 8]] * 3),
    ("output_tokens", [2, 2, 2, 2]),
    ("output_tokens", [2, 0, 2]),
    ("assignment", [0, 1]),
    ("assignment", [0, 2, 0]),
    ("assignment", [0, -1, 0]),
    ("iteration_overhead", [-0.1, 0.1]),
    ("weight_load", [1.0, -1.0]),
    ("weight_load", [1.0, np.nan]),
    ("compute_per_token", [0.1, -0.1]),
    ("decode_per_seq", [0.1, -0.1]),
    ("attention_per_token", [0.1, -0.1]),
    ("network_delay", [-0.1, 0.1]),
    ("weight_load", [1.0, 1.0, 1.0]),
    ("max_num_seqs", [4, 0]),
    ("max_num_batched_tokens", [0, 4]),
    ("max_num_batched_tokens", [3, 4]),
    ("kv_capacity", [0, 4]),
    ("max_waiting", [-1, 4]),
]


@pytest.mark.parametrize(("name", "value"), MISTAKES, ids=[f"{name}={value}" for name, value in MISTAKES])
def test_mistakes_are_named(name, value):
    value = np.array(value)
    case = GOOD | {"site": GOOD["site"] | {name: value}} if name in GOOD["site"] else GOOD | {name: value}
    with pytest.raises(UserError) as caught:
        replay(Case(**case))
    message = str(caught.value)
    assert name in message
    assert "\n" not in message


def test_an_arrival_at_a_rounded_boundary_does_not_hang():
    # In float32 clock + duration <= now and duration <= now - clock can differ; the engine once looped for ever where
    # a request came exactly at the rounded end of the second iteration.
    weight_load, compute = np.float32(0.0171), np.float32(9.2e-5)
    prompt = 220
    first = compute * np.float32(prompt)
    boundary = first + weight_load
    assert weight_load > boundary - first, "the case no longer shows the rounding"
    zero = np.zeros(1)
    site = jaxroute.Site(
        iteration_overhead=zero,
        weight_load=np.array([weight_load]),
        compute_per_token=np.array([compute]),
        decode_per_seq=zero,
        attention_per_token=zero,
        max_num_seqs=np.array([4]),
        max_num_batched_tokens=np.array([2048]),
        max_waiting=np.array([4]),
        kv_capacity=np.array([9000]),
        network_delay=zero,
    )
    requests = jaxroute.Requests(np.array([0.0, boundary]), np.array([prompt, 50]), np.array([20, 20]))
    outcomes = jaxroute.replay(site, requests, np.array([0, 0]))
    assert (outcomes.status == 0).all()
    assert outcomes.ttft[0] == pytest.approx(first, abs=1e-4)
