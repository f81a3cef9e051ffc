"""Configuration: every file composes and builds, and every mistake is one line that says what and where."""

from __future__ import annotations

import dataclasses
import re
from typing import get_args, get_origin, get_type_hints

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxroute
from jaxroute.config import Config, config_folder, config_yaml, load_config, read_config
from jaxroute.networks import build_network
from jaxroute.scenarios import build_env
from jaxroute.serving import build_site

CHOICES = {
    group.name: sorted(path.stem for path in group.glob("[!_]*.yaml"))
    for group in sorted(config_folder().iterdir())
    if group.is_dir()
}

# The embedded bank's YAML is long: with a short one instead, composing takes half as long.
SHORT = ("site=edge3", "bank=zeroeval")


@pytest.fixture
def no_data(monkeypatch):
    """A machine on which no data folder is set."""
    monkeypatch.delenv("JAXROUTE_DATA", raising=False)


def needs_data(config):
    return config.bank.kind in ("zeroeval", "mmlu_pro") or config.workload.arrivals == "trace"


def line_of(call, *args):
    """The message of the mistake that `call` reports; it is one line and shows nothing of Python's or Hydra's."""
    with pytest.raises(jaxroute.UserError) as raised:
        call(*args)
    message = str(raised.value)
    assert message
    assert "\n" not in message
    assert not re.search(r"Traceback|\w+Error|\w+Exception|Hydra|OmegaConf|ListConfig|full_key|object_type", message), (
        message
    )
    return message


# --- what is there ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("row", range(max(len(choices) for choices in CHOICES.values())))
def test_every_file_composes_to_its_types(row):
    config = load_config([f"{group}={choices[row % len(choices)]}" for group, choices in CHOICES.items()])
    assert type(config) is Config
    assert_typed(config, "config")


def assert_typed(value, where):
    """No plain dictionary where a dataclass belongs, no value missing, and numbers are of the declared type."""
    hints = get_type_hints(type(value))
    for entry in dataclasses.fields(value):
        item, here = getattr(value, entry.name), f"{where}.{entry.name}"
        hint = hints[entry.name]
        assert item != "???", here
        if dataclasses.is_dataclass(hint):
            assert type(item) is hint, here
            assert_typed(item, here)
        elif isinstance(item, list | dict):
            inner = get_args(hint)[-1]
            for name, member in item.items() if isinstance(item, dict) else enumerate(item):
                if dataclasses.is_dataclass(inner):
                    assert type(member) is inner, f"{here}.{name}"
                    assert_typed(member, f"{here}.{name}")
        else:
            assert isinstance(item, tuple(get_origin(kind) or kind for kind in get_args(hint) or (hint,))), here


def test_what_is_committed_are_the_defaults():
    config = load_config()
    assert (config.site.name, config.workload.name, config.bank.kind) == ("edge6", "poisson", "embedded")
    assert (config.network.kind, config.wandb.mode, config.checkpoint) == ("han", "disabled", None)


@pytest.mark.parametrize(
    "choices",
    # The largest site needs the most of a bank.
    [f"site={site}" for site in CHOICES["site"]]
    + [f"site=edge3 workload={workload}" for workload in CHOICES["workload"] if workload != "poisson"]
    # A table is the user's own: tests/test_bank_table.py builds one.
    + [f"site=edge16 bank={bank}" for bank in CHOICES["bank"] if bank not in ("embedded", "table")],
)
def test_every_choice_builds(choices, request, monkeypatch, no_data):
    config = load_config(choices.split())
    if needs_data(config):
        monkeypatch.setenv("JAXROUTE_DATA", str(request.getfixturevalue("data_dir")))
    env, params = build_env(config)
    assert env.num_experts == len(config.site.experts) == params.bank.quality.shape[1]
    if config.workload.name != "agents":  # whose prompts are several times as long
        # So that results compare.
        assert float(params.rate[0]) == pytest.approx(load_config(SHORT).workload.rate, rel=0.1)
    np.testing.assert_allclose(np.asarray(params.share).sum(), 1, rtol=1e-6)

    assert not any(np.isnan(leaf).any() for leaf in jax.tree.leaves(params))
    # Traced, and not compiled: what it computes is for other tests to see.
    state = jax.eval_shape(env.reset, jax.random.key(0), params)[1]
    following = jax.eval_shape(env.step, jax.random.key(0), state, jnp.int32(0), params)[1]
    chex.assert_trees_all_equal_shapes_and_dtypes(following, state)


@pytest.mark.parametrize("choice", CHOICES["network"])
def test_every_network_builds(choice):
    config = load_config([*SHORT, f"network={choice}"]).network
    network = build_network(config)
    assert network.hidden == config.hidden


# --- what the command line can say ------------------------------------------------------------------------


def test_one_entry_of_a_list_can_be_changed():
    plain = load_config(SHORT)
    changed = load_config([*SHORT, "site.experts.1.kv_capacity=4096", "workload.requirements.0.normalised=0.5"])
    assert changed.site.experts[1].kv_capacity == 4096
    assert changed.workload.requirements[0].normalised == 0.5
    changed.site.experts[1].kv_capacity = plain.site.experts[1].kv_capacity
    changed.workload.requirements[0].normalised = plain.workload.requirements[0].normalised
    assert changed == plain


@pytest.mark.parametrize("override", ["bank.models.mine=gemma-2-2b-it", "bank.models={mine: gemma-2-2b-it}"])
def test_a_stand_in_for_a_model_that_the_bank_lacks(override):
    config = load_config(["site=edge3", "site.experts.0.model=mine", override])
    assert config.bank.models == {"mine": "gemma-2-2b-it"}


def test_a_site_of_my_own(tmp_path):
    write_site(tmp_path, kv_capacity=4096)
    config = load_config([f"hydra.searchpath=[{tmp_path}]", "site=mine"])
    assert config.site.models == ["gemma-2-2b-it"]
    assert np.asarray(build_site(config.site).kv_capacity).tolist() == [4096]


def write_site(folder, text=None, **changes):
    """Write `site/mine.yaml`, one expert, with some of its values changed or (None) left out."""
    (folder / "site").mkdir()
    figures = {
        "model": "gemma-2-2b-it", "accelerator": "L40S", "iteration_overhead": 0.002, "weight_load": 0.007,
        "compute_per_token": 2e-5, "decode_per_seq": 2e-5, "attention_per_token": 1e-7, "max_num_seqs": 4,
        "max_num_batched_tokens": 2048, "max_waiting": 2, "kv_capacity": 10000, "network_delay": 0.005,
    }  # fmt: skip
    lines = [f"    {key}: {value}" for key, value in (figures | changes).items() if value is not None]
    text = text or "name: mine\nexperts:\n  -\n" + "\n".join(lines) + "\n"
    (folder / "site" / "mine.yaml").write_text(text)


@pytest.mark.parametrize(
    "overrides",
    [
        ("site=edge6",),
        ("site=edge16", "bank=mmlu_pro", "workload=azure_conv", "network=mlp"),
        ("eval.loads=[0.25,3]", "policies=[random]", "ppo.num_envs=8", "output_dir=somewhere", "wandb.group=a"),
        ("workload.rate=12.5", "workload.requirements.1.normalised=0.033", "reward.shaping=false", "train.loads=[1,1]"),
    ],
)
def test_written_and_read_again(overrides, tmp_path):
    config = load_config(overrides)
    (tmp_path / "config.yaml").write_text(config_yaml(config))
    again = read_config(tmp_path / "config.yaml")
    assert again == config
    assert config_yaml(again) == config_yaml(config)


# --- mistakes on the command line --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("override", "message"),
    [
        # Names
        ("polices=[random]", "unknown option polices (did you mean policies?)"),
        ("ppo.num_env=8", "unknown option ppo.num_env (did you mean ppo.num_envs?)"),
        ("num_steps=8", "unknown option num_steps (did you mean ppo.num_steps?)"),
        ("site.experts.2.kv_capcity=8", "kv_capcity (did you mean site.experts.2.kv_capacity?)"),
        ("kv_capacity=8", "unknown option kv_capacity (did you mean site.experts.<n>.kv_capacity?)"),
        ("eval.nonsense=8", "unknown option eval.nonsense"),
        ("site=edge4", "unknown site edge4; choose one of edge16, edge3, edge6"),
        ("workload=poison", "unknown workload poison; choose one of agents, azure_conv, chat, diurnal, gamma, mixed, "),
        # Types
        ("seed=abc", "seed: Value 'abc'"),
        ("ppo.num_envs=many", "ppo.num_envs: Value 'many'"),
        ("reward.shaping=perhaps", "reward.shaping: Value 'perhaps' is not a valid bool"),
        ("site.experts.0.kv_capacity=large", "site.experts.0.kv_capacity: Value 'large'"),
        # Kinds
        ("workload.arrivals=weibull", "workload poisson: arrivals=weibull is unknown; choose one of poisson, gamma"),
        ("bank.kind=wikipedia", "bank.kind='wikipedia' is unknown: use one of embedded"),
        ("wandb.mode=on", "wandb: mode=on is unknown; choose disabled, offline or online"),
        # Values
        ("seed=-1", "seed=-1 must"),
        ("workload.rate=-1", "workload poisson: rate=-1.0 must be above 0"),
        ("workload.rate=nan", "workload poisson: rate=nan must be above 0"),
        ("workload.requirements=[]", "workload poisson: requirements is empty"),
        ("workload.requirements.0.share=-1", "requirement interactive: share=-1.0 must be at least 0"),
        ("workload.requirements=[{name: a, normalised: 1, share: 0}]", "the shares of all requirements are 0"),
        ("workload.requirements=[{name: a, normalised: 1}]", "workload.requirements.0.share"),
        ("workload.requirements=[{name: a, share: 1}]", "requirement a limits nothing; give one of ttft, tpot, e2e, "),
        ("workload.arrivals=trace", "workload poisson: trace is missing; name a file"),
        ("site.experts=[]", "site edge3: experts is empty; list at least one"),
        ("ppo.num_envs=7", "ppo: num_envs=7 must be a positive multiple of num_minibatches="),
        ("ppo.discount=1", "ppo: discount=1.0 must lie in [0, 1"),
        ("ppo.learning_rate=nan", "ppo: learning_rate=nan must be above 0"),
        ("reward.accelerator_price=-1", "reward: accelerator_price=-1.0 must not be negative"),
        ("train.loads=[2,1]", "train: loads=[2.0, 1.0] must be one or two numbers"),
        ("train.log_interval=0", "train: log_interval=0 must be at least 1"),
        ("eval.loads=[1,-1]", "eval: loads=[1.0, -1.0] must all be above 0"),
    ],
)  # fmt: skip
def test_bad_option(override, message):
    assert message in line_of(load_config, [*SHORT, override])


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("+ppo.num_env=8", "ppo.num_env"),  # Hydra's + adds a key; nothing would read it
        ("workload.requirements.0.normalised=nan", "requirement interactive: normalised=nan"),
        ("ppo.learning_rate=inf", "ppo: learning_rate=inf"),
        ("reward.accelerator_price=-0.1", "reward: accelerator_price=-0.1 must not be negative"),
        ("reward.accelerator_price=nan", "reward: accelerator_price=nan"),
        ("train.loads=[1,inf]", "train: loads=[1.0, inf]"),
        ("eval.loads=[inf]", "eval: loads=[inf]"),
        ("seed=99999999999999999999", "seed=99999999999999999999"),
        ("eval.seed=99999999999999999999", "eval: seed=99999999999999999999"),
        ("eval.seed=-1", "eval: seed=-1 must lie between 0 and 4294967295"),
        ("ppo.entropy_bonus=nan", "ppo: entropy_bonus=nan"),
        ("ppo.entropy_bonus=-0.1", "ppo: entropy_bonus=-0.1 must not be negative"),
        ("ppo.entropy_bonus=inf", "ppo: entropy_bonus=inf"),
        ("ppo.value_weight=nan", "ppo: value_weight=nan"),
        ("ppo.value_weight=-1", "ppo: value_weight=-1.0"),
    ],
)
def test_bad_option_that_must_not_pass(override, message):
    assert message in line_of(load_config, [*SHORT, override])


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("ppo.num_envs=[8", "cannot read ppo.num_envs=[8; write option=value, and a list as [1,2]"),
        ("policies=[random", "cannot read policies=[random; write option=value, and a list as [1,2]"),
        ("checkpoint=", "checkpoint= is empty; name a file or folder, or leave checkpoint out"),
        ("seed=0,1", "seed=0,1: seed takes one value; --multirun runs several"),
        ("seed", "cannot read seed; write option=value"),
        ("--multirun", "unknown flag --multirun"),
        ("site.experts.9.kv_capacity=64", "site.experts.9 does not exist"),
        ("eval.loads.9=1", "eval.loads.9 does not exist"),
    ],
)
def test_what_cannot_be_read_is_named(override, message):
    line = line_of(load_config, [*SHORT, override])
    assert message in line
    assert not re.search(r"unknown option bank|viable|mismatched|EOF|dict is not|Error parsing", line), line


# --- mistakes that show when it is built -------------------------------------------------------------------


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["site.experts.0.network_delay=-1"], "site edge3: network_delay of expert 0 is -1.0; it must be at least 0"),
        (["site.experts.1.max_num_seqs=0"], "site edge3: max_num_seqs of expert 1 is 0; it must be at least 1"),
        (["site.experts.1.model=gemma-2-9b"], "no LLM 'gemma-2-9b' (did you mean gemma-2-9b-it?)"),
        (
            [f"site.experts.{expert}.kv_capacity=64" for expert in range(3)],
            "no expert of site edge3 has more than 64 tokens of KV cache; raise kv_capacity",
        ),
        (["bank=zeroeval"], "bank.kind='zeroeval' reads published tables and no data folder is set: set JAXROUTE_DATA"),
        (["bank=zeroeval", "data_dir=/none"], "/none/zeroeval/queries.parquet does not exist"),
        (["workload=azure_conv"], "set JAXROUTE_DATA or data_dir to it, or give an absolute path"),
        (["workload=azure_conv", "data_dir=/none"], "AzureLLMInferenceTrace_conv.csv.gz does not exist"),
        (["workload.arrivals=trace", "workload.trace=/none.csv"], "/none.csv does not exist or is not a file"),
        (
            ["site.experts.0.kv_capacity=99999999999"],
            "site edge3: kv_capacity of expert 0 is 99999999999; it must be at least 2, and at most 16777216",
        ),
    ],
)
def test_bad_configuration(overrides, message, no_data):
    config = load_config(["site=edge3", *overrides])
    assert message in line_of(build_env, config)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ("yesterday,1,2", "mine.csv:2: cannot read 'yesterday,1,2'"),
        ("2023-11-16 18:15:46,1,2", "mine.csv: needs at least two requests"),
        ("2023-11-16 18:15:46,1,2\n" * 2, "mine.csv: needs at least two requests at different times"),
    ],
)
def test_bad_trace(rows, message, tmp_path):
    (tmp_path / "mine.csv").write_text(f"TIMESTAMP,ContextTokens,GeneratedTokens\n{rows}\n")
    config = load_config([*SHORT, "workload.arrivals=trace", "workload.trace=mine.csv", f"data_dir={tmp_path}"])
    assert message in line_of(build_env, config)


@pytest.mark.parametrize(
    ("text", "changes", "message"),
    [
        (None, {"kv_capacity": None}, "site.experts.0.kv_capacity is missing; give it a value"),
        (None, {"kv_capacity": "much"}, "site/mine.yaml: kv_capacity: Value 'much'"),
        (None, {"kv_capcity": 3}, "site/mine.yaml: unknown option kv_capcity (did you mean site.experts.<n>"),
        ("name: mine\n", {}, "site mine: experts is empty"),
        ("name: mine\nexperts: [\n", {}, "mine.yaml, line 3: "),
    ],
)
def test_bad_site_of_my_own(text, changes, message, tmp_path):
    write_site(tmp_path, text, **changes)
    line = line_of(load_config, [f"hydra.searchpath=[{tmp_path}]", "site=mine", "bank=zeroeval"])
    assert message in line


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("num_steps: many", "ppo.num_steps: Value 'many'"),
        ("num_stepz: 64", "unknown option ppo.num_stepz (did you mean ppo.num_steps?)"),
        ("num_steps: 0", "ppo: num_steps=0 must be at least 1"),
        ("num_steps: [", "line"),
    ],
)
def test_bad_file_of_a_run(line, message, tmp_path):
    path = tmp_path / "config.yaml"
    path.write_text(re.sub(r"num_steps: \d+", line, config_yaml(load_config(SHORT))))
    said = line_of(read_config, path)
    assert said.startswith(f"{path}: ")
    assert message in said


def test_unknown_scenario():
    assert "did you mean edge-poisson?" in line_of(jaxroute.make, "edge-poison")
