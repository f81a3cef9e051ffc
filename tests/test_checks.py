"""What is no number is refused at every public door, in one line, before anything happens."""

from __future__ import annotations

import datetime
from decimal import Decimal
from fractions import Fraction
from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import CLOCKWORK, site_arrays

import jaxroute
from jaxroute.config import load_config
from jaxroute.errors import UserError
from jaxroute.gateway import Router
from jaxroute.networks.features import features_of
from jaxroute.scenarios import build_env
from jaxroute.serving import ExpertConfig, Site, SiteConfig, build_site
from jaxroute.serving.checks import real, real_array, whole, whole_array

DATE = np.datetime64("2026-01-01T00:00:00", "ns")

# ---- Kinds of values ---------------------------------------------------------------------------------------

# Of one value, and of arrays that hold it among good ones.
NOT_A_NUMBER = {
    "none": None,
    "text": "three",
    "digits": "3",
    "bytes": b"3",
    "bool": True,
    "numpy bool": np.bool_(False),
    "complex": 1 + 2j,
    "date": DATE,
    "duration": np.timedelta64(3, "s"),
    "datetime": datetime.datetime(2026, 1, 1),
    "timedelta": datetime.timedelta(seconds=3),
    "list": [3],
    "dict": {3: 3},
    "object": object(),
}
NOT_FINITE = {"nan": float("nan"), "inf": float("inf"), "numpy nan": np.float32("nan"), "nan object": Decimal("nan")}
NOT_WHOLE = {"half": 2.5, "numpy half": np.float32(2.5), "fraction": Fraction(5, 2)}


def among(value, good=(1, 1, 1)):
    """Arrays that hold a value: as a list, as an array of objects, and of the value's own type where it has one."""
    objects = np.empty(len(good), object)
    for index, number in enumerate(good):
        objects[index] = value if index == 1 else number
    forms = [objects]
    if not isinstance(value, bool | np.bool_):
        forms.append(list(objects))  # NumPy takes a list of True and 1 for integers.
    if np.ndim(value) == 0:
        forms.append(np.array([value] * len(good)))
    return forms


MASKED = np.ma.masked_array([1, 1, 1], [False, True, False])


def refused(call, *words):
    with pytest.raises(UserError) as caught:
        call()
    message = str(caught.value)
    assert "\n" not in message
    assert len(message) < 400
    for word in words:
        assert word in message
    return message


# ---- The helper --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", NOT_A_NUMBER)
def test_what_is_no_number(kind):
    value = NOT_A_NUMBER[kind]
    refused(lambda: real("now", value), "now ")
    refused(lambda: whole("now", value), "now ")
    for values in among(value):
        refused(lambda values=values: real_array("times", values), "times")


@pytest.mark.parametrize("values", [[3, 1.5, Decimal("2.5"), Fraction(1, 2), np.float32(1), np.int8(4), 10**30]])
def test_every_kind_of_number_is_taken(values):
    expected = [float(value) for value in values]
    np.testing.assert_array_equal(real_array("x", values), expected)
    assert [float(real("x", value)) for value in values] == expected
    assert real_array("x", jnp.array([1.5, 2], jnp.bfloat16)).tolist() == [1.5, 2]
    assert real_array("x", []).shape == (0,)
    assert [whole("x", value, 0) for value in (3, 3.0, np.int8(3), Decimal(3), jnp.int32(3))] == [3] * 5
    assert whole_array("x", [1, 2.0], 0, 5).dtype == np.int64


def test_messages_say_where_and_what_to_do():
    refused(lambda: real_array("times", np.array([DATE, DATE])), "datetime64[ns]", "(times - times[0])")
    refused(lambda: real_array("times", [datetime.datetime(2026, 1, 1)]), "times[0] is", "(times - times[0])")
    refused(lambda: real_array("gaps", np.array([1, 2], "m8[ms]")), "timedelta64[ms]", "durations / np.timedelta64")
    refused(lambda: real_array("tokens", [[1, 2], [3, None]]), "tokens[1, 1] is None")
    refused(lambda: real_array("tokens", MASKED), "tokens[1] is masked")
    refused(lambda: real_array("tokens", [[1], [2, 3]]), "tokens")
    refused(lambda: whole_array("tokens", [[1, 2], [3, float("nan")]], 0, 9), "tokens[1, 1] is nan", "from 0 to 9")
    refused(lambda: whole("slots", 2.5, 1, 3), "slots=2.5", "at least 1 and at most 3")
    refused(lambda: jax.jit(lambda x: real_array("times", x))(1.0), "times")


# ---- replay and Site ---------------------------------------------------------------------------------------

SITE = site_arrays(CLOCKWORK, CLOCKWORK)
REQUESTS = {"arrival_time": [0, 1, 2], "prompt_tokens": [8, 8, 8], "output_tokens": [2, 2, 2]}


def replay(site=None, assignment=(0, 1, 0), **requests):
    return jaxroute.replay(Site(**(SITE | (site or {}))), jaxroute.Requests(**(REQUESTS | requests)), assignment)


BAD = [*NOT_A_NUMBER, *NOT_FINITE]
KINDS = NOT_A_NUMBER | NOT_FINITE | NOT_WHOLE


@pytest.mark.parametrize("kind", [*BAD, *NOT_WHOLE])
@pytest.mark.parametrize("name", ["arrival_time", "prompt_tokens", "output_tokens", "assignment"])
def test_replay_refuses(name, kind):
    if name == "arrival_time" and kind in NOT_WHOLE:
        return
    for values in among(KINDS[kind]):
        refused(lambda values=values: replay(**{name: values}), name)
    refused(lambda: replay(**{name: MASKED}), f"{name}[1] is masked")


@pytest.mark.parametrize("kind", [*BAD, *NOT_WHOLE])
@pytest.mark.parametrize("name", Site._fields)
def test_a_site_refuses(name, kind):
    if np.asarray(SITE[name]).dtype.kind == "f" and kind in NOT_WHOLE:
        return
    for values in among(KINDS[kind], good=(1, 1)):
        refused(lambda values=values: replay(site={name: values}), f"site: {name}")


def test_the_wrong_things_are_named():
    requests = jaxroute.Requests(**REQUESTS)
    refused(lambda: jaxroute.replay(SITE, requests, [0, 1, 0]), "site is a dict", "jaxroute.Site")
    refused(lambda: jaxroute.replay(Site(**SITE), tuple(requests), [0, 1, 0]), "requests is a tuple")
    refused(lambda: replay(prompt_tokens=[8, 8, 2**30]), "prompt_tokens[2] is 1073741824")
    refused(lambda: replay(arrival_time=np.array([DATE, DATE, DATE])), "arrival_time holds dates", "give seconds")


def test_a_site_as_configured_refuses():
    expert = {name: values[0].item() for name, values in SITE.items()}
    for name in Site._fields:
        if name == "max_waiting":
            continue  # a queue without bound
        config = SiteConfig("s", [ExpertConfig("m", "a", **(expert | {name: None}))])
        refused(lambda config=config: build_site(config), "site s", f"{name}[0] is None")


# ---- Environments ----------------------------------------------------------------------------------


@cache
def config():
    return load_config(["site=edge3", "bank.num_prompts=200"])


@cache
def scenario():
    return build_env(config(), horizon=8)


@pytest.mark.parametrize("kind", ["none in a pair", "one", "three", *(kind for kind in BAD if kind != "none")])
def test_an_environment_refuses_a_rate(kind):
    rate = {"none in a pair": (None, 3.0), "one": [3.0], "three": (1, 2, 3)}.get(kind, KINDS.get(kind))
    refused(lambda: build_env(config(), rate=rate), "rate")


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *(("horizon", value) for value in (-1, 2.5, "8")),
        *(("redraw_every", value) for value in (-1, None)),
        *(("random_sites", value) for value in (1.5, float("nan"), "half", True)),
    ],
)
def test_an_environment_refuses(name, value):
    refused(lambda: build_env(config(), **{name: value}), name)


def test_an_environment_takes_every_kind_of_rate():
    expected = {"one": [5.0, 5.0], "two": [2.0, 5.0]}
    for rate in (5, 5.0, np.float32(5), np.array(5)):
        _, params = build_env(config(), rate=rate)
        assert params.rate.tolist() == expected["one"]
    for rate in ((2, 5), [2.0, 5.0], np.array([2, 5])):
        _, params = build_env(config(), rate=rate)
        assert params.rate.tolist() == expected["two"]


@pytest.mark.parametrize("kind", [*BAD, *NOT_WHOLE, "beyond", "negative", "array"])
def test_a_step_refuses_an_action(kind):
    env, params = scenario()
    more = {"beyond": 4, "negative": -1, "array": np.array([1])}
    state = jax.eval_shape(env.reset, jax.random.key(0), params)[1]
    # Nothing is computed before it is refused, so that shapes do for a state.
    refused(lambda: env.step(jax.random.key(0), state, (KINDS | more)[kind], params), "action")


@pytest.mark.parametrize("action", [jnp.float32(1), jnp.array([1]), jnp.bool_(True)], ids=str)
def test_compiled_steps_refuse_an_action_of_another_type(action):
    env, params = scenario()
    state = jax.eval_shape(env.reset, jax.random.key(0), params)[1]
    refused(lambda: jax.eval_shape(env.step, jax.random.key(0), state, action, params), "action is")


def test_networks_refuse_what_is_no_observation():
    refused(lambda: features_of(np.zeros(30)), "obs is a ndarray", "Observation")


@pytest.mark.parametrize("kind", [*BAD, *NOT_WHOLE, "beyond", "negative", "too few"])
def test_adapters_refuse_an_action(kind):
    pytest.importorskip("gymnasium")
    from jaxroute.adapters.gymnasium import GymnasiumEnv, GymnasiumVectorEnv

    value = (KINDS | {"beyond": 4, "negative": -1, "too few": [1, 1]})[kind]
    one, several = GymnasiumEnv(*scenario()), GymnasiumVectorEnv(*scenario(), 3)
    # As if it had been reset, which would compile.
    one._envs._state = several._state = object()
    refused(lambda: one.step(value), "action")
    for actions in [value] if kind == "too few" else among(value):
        refused(lambda actions=actions: several.step(actions), "actions")
    if kind not in ("beyond", "too few"):
        refused(lambda: GymnasiumVectorEnv(*scenario(), value), "num_envs")


# ---- Router ------------------------------------------------------------------------------------------------


def router():
    expert = ExpertConfig("m", "a", **{name: values[0].item() for name, values in SITE.items()})
    gateway = Router(SiteConfig("s", [expert, expert]), [0.5, 0.5], 4, 2.0, lambda *_: (0, np.zeros(2), 0.0))
    route(gateway, "a")
    return gateway


def route(gateway, request_id="b", **changes):
    known = {"now": 1.0, "prompt_tokens": 8, "normalised": 0.1}
    predictions = {"predicted_quality": [0.5, 0.5], "predicted_output_tokens": [9, 9]}
    return gateway.route(request_id, **(known | predictions | changes))


CALLS = {
    ("route", "now"): lambda gateway, value: route(gateway, now=value),
    ("route", "prompt_tokens"): lambda gateway, value: route(gateway, prompt_tokens=value),
    ("route", "ttft"): lambda gateway, value: route(gateway, ttft=value),
    ("route", "tpot"): lambda gateway, value: route(gateway, tpot=value),
    ("route", "e2e"): lambda gateway, value: route(gateway, e2e=value),
    ("route", "normalised"): lambda gateway, value: route(gateway, normalised=value),
    ("route", "arrived"): lambda gateway, value: route(gateway, arrived=value),
    ("route", "accelerator_price"): lambda gateway, value: route(gateway, accelerator_price=value),
    ("route", "predicted_quality"): lambda gateway, value: route(gateway, predicted_quality=[0.5, value]),
    ("route", "predicted_output_tokens"): lambda gateway, value: route(gateway, predicted_output_tokens=[9, value]),
    ("first_token", "now"): lambda gateway, value: gateway.first_token("a", now=value),
    ("progress", "now"): lambda gateway, value: gateway.progress("a", now=value, generated=1),
    ("progress", "generated"): lambda gateway, value: gateway.progress("a", now=1.0, generated=value),
    ("progress", "kv_tokens"): lambda gateway, value: gateway.progress("a", now=1.0, generated=1, kv_tokens=value),
    ("finished", "now"): lambda gateway, value: gateway.finished("a", now=value, output_tokens=1),
    ("finished", "output_tokens"): lambda gateway, value: gateway.finished("a", now=1.0, output_tokens=value),
    ("expert_down", "expert"): lambda gateway, value: gateway.expert_down(value),
    ("expert_up", "expert"): lambda gateway, value: gateway.expert_up(value),
}
COUNTS = {"prompt_tokens", "generated", "kv_tokens", "output_tokens", "expert"}
OPTIONAL = {"ttft", "tpot", "e2e", "arrived", "kv_tokens", "accelerator_price"}
PREDICTIONS = {"predicted_quality", "predicted_output_tokens"}


@pytest.mark.parametrize(("method", "name"), CALLS, ids=lambda part: part)
def test_a_router_refuses(method, name):
    gateway = router()
    before, batch = gateway._belief._held.copy(), gateway._belief.batch().copy()
    for kind, value in KINDS.items():
        if (kind == "none" and name in OPTIONAL) or (kind in NOT_WHOLE and name not in COUNTS):
            continue
        if name in PREDICTIONS and "bool" in kind:
            continue  # NumPy takes a list of True and 1 for numbers.
        message = refused(lambda value=value: CALLS[method, name](gateway, value))
        assert (name in message) or name == "now"
    # Nothing has changed, and it goes on.
    np.testing.assert_array_equal(gateway._belief._held, before)
    np.testing.assert_array_equal(gateway._belief.batch(), batch)
    assert gateway._up.all()
    gateway.finished("a", now=1.0, output_tokens=1)


def test_a_router_refuses_ids_flags_and_prompts():
    gateway = router()
    for call in (gateway.rejected, gateway.failed, lambda name: gateway.first_token(name, now=1.0)):
        refused(lambda call=call: call(["a"]), "request_id=['a'] cannot be an id")
    refused(lambda: route(gateway, request_id={}), "request_id={}")
    for flag in ("yes", 1, 0.0, [True]):
        refused(lambda flag=flag: gateway.progress("a", now=1.0, generated=1, running=flag), "running=")
    gateway.progress("a", now=1.0, generated=1, running=np.bool_(True))


def test_a_router_takes_every_kind_of_number():
    gateway = router()
    numbers = {
        "now": np.float32(1.5),
        "prompt_tokens": np.int64(8),
        "normalised": Fraction(1, 10),
        "e2e": np.float32(9),
    }
    assert route(gateway, **numbers, predicted_quality=np.array([0, 1]), arrived=np.int32(1)) == 0
    gateway.progress("b", now=jnp.float32(2.0), generated=np.uint8(3), kv_tokens=10.0)
    gateway.finished("b", now=Decimal("2.5"), output_tokens=np.float64(4))
    gateway.expert_down(np.int8(1))
    assert gateway._up.tolist() == [True, False]
