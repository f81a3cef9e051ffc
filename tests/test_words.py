"""Words of a command line: text is taken literally, one value may stand for a list, and what is printed works."""

from __future__ import annotations

import ast
import asyncio
import dataclasses
import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import get_args, get_type_hints

import numpy as np
import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser
from hypothesis import given
from hypothesis import strategies as st
from omegaconf import OmegaConf

from jaxroute.commands import main as jaxroute_main
from jaxroute.commands.configured import _config, _runs
from jaxroute.commands.console import run_with_console
from jaxroute.config import Config, config_folder, config_yaml, load_config, read_config
from jaxroute.config.choices import usage_of_choice
from jaxroute.config.words import (
    PATHS,
    command_line,
    escaped,
    option_type,
    path_word,
    paths_word,
    program,
    quoted,
)
from jaxroute.devices import unusable_platform, use_compilation_cache
from jaxroute.errors import UserError
from jaxroute.files import check_writable

ROOT = Path(__file__).resolve().parents[1]
AWKWARD = """o (a)[b]{c} #=,d 'e' "f" \\g\\' ${seed} é漢 ~ :smile: %$HOME `x` !&;|<>*?\\"""
# What keeps a configuration with such an option valid.
NEEDED = {"bank.folder": ["bank=table"], "bank.predictions": ["bank=zeroeval"]}


def value_of(config, name):
    """The option of this name."""
    for part in name.split("."):
        config = config[part] if isinstance(config, dict) else getattr(config, part)
    return config


# --- text and paths ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("option", [*PATHS, "wandb.group", "bank.models.mine"])
def test_text_is_taken_literally(option, tmp_path):
    words = [*NEEDED.get(option, ["bank=zeroeval"]), f"{option}={AWKWARD}"]
    config = load_config(words)
    assert value_of(config, option) == AWKWARD
    (tmp_path / "config.yaml").write_text(config_yaml(config))
    again = read_config(tmp_path / "config.yaml")
    assert again == config
    assert value_of(load_config(["seed=3"], again), option) == AWKWARD


def test_every_path_is_an_option():
    assert {option: option_type(option) for option in PATHS} == dict.fromkeys(PATHS, str | None)


@given(st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=12))
def test_any_text_comes_back(text):
    override = f"checkpoint={quoted(escaped(text))}"
    value = OverridesParser.create().parse_override(override).value()
    config = OmegaConf.create({"text": value})
    assert text == "???" or config.text == text


def test_home_is_the_only_part_that_is_replaced(monkeypatch):
    monkeypatch.setenv("HOME", "/somewhere")
    short = ["bank=zeroeval", "site=edge3"]
    assert load_config([*short, "data_dir=~/data"]).data_dir == "/somewhere/data"
    assert load_config([*short, "data_dir=./~/data"]).data_dir == "./~/data"
    assert load_config([*short, "wandb.group=~/data"]).wandb.group == "~/data"
    assert path_word("data_dir", "~x") == "data_dir=./~x"

    def nobody():
        raise RuntimeError

    monkeypatch.setattr(Path, "home", nobody)
    with pytest.raises(UserError, match=r"^data_dir=~/data: ~ has no meaning, as no home folder is known"):
        load_config(["data_dir=~/data"])


# --- lists ------------------------------------------------------------------------------------------------


def lists(schema=Config, prefix=""):
    """Every option that is a list, found through the types."""
    hints = get_type_hints(schema)
    for entry in dataclasses.fields(schema):
        if "dict" in str(hints[entry.name]):
            continue
        kinds = [hints[entry.name], *get_args(hints[entry.name])]
        name = prefix + entry.name
        item = next((get_args(kind)[0] for kind in kinds if getattr(kind, "__origin__", None) is list), None)
        if item is not None:
            yield name, item
        for kind in kinds:
            if dataclasses.is_dataclass(kind) and item is None:
                yield from lists(kind, f"{name}.")


SCALARS = [(name, item) for name, item in lists() if item in (str, float, int)]


def test_there_are_lists():
    names = [name for name, _ in SCALARS]
    assert {"policies", "eval.loads", "train.loads", "wandb.tags", "study.rules", "study.planners"} <= set(names)


@pytest.mark.parametrize(("option", "item"), SCALARS)
def test_one_value_or_several_with_commas_make_a_list(option, item):
    one, two = {str: ("random", "qos_greedy"), int: (1, 2), float: (0.25, 0.5)}[item]
    short = ["bank=zeroeval", "site=edge3", *(["study=quick"] if option.startswith("study.") else [])]
    several = load_config([*short, f"{option}={one},{two}"])
    assert value_of(several, option) == [one, two]
    assert value_of(load_config([*short, f"{option}=[{one},{two}]"]), option) == [one, two]
    expected = [one, one] if option.startswith("train.") else [one]  # a range
    assert value_of(load_config([*short, f"{option}={one}"]), option) == expected


def test_one_group_of_options_makes_a_list():
    config = load_config(["bank=zeroeval", "site=edge3", "workload.requirements={name: a, normalised: 1, share: 1}"])
    assert [requirement.name for requirement in config.workload.requirements] == ["a"]


def test_runs_of_a_router_may_have_any_name():
    short = ["bank=zeroeval", "site=edge3", "study=quick"]
    runs = [AWKWARD, "outputs/a", "7"]
    config = load_config([*short, paths_word("study.routers.mine", runs)])
    assert config.study.routers["mine"] == runs
    for word in ("study.routers.mine=outputs/a(1),b=#", "study.routers.mine=[outputs/a(1),b=#]"):
        assert load_config([*short, word]).study.routers["mine"] == ["outputs/a(1)", "b=#"]


def test_a_multirun_sweeps_values_but_no_path():
    assert [run[:-1] for run in _runs(["-m", "policies=random,qos_greedy", "checkpoint=a,b(c)"])] == [
        ["checkpoint=a,b(c)", "policies=random"],
        ["checkpoint=a,b(c)", "policies=qos_greedy"],
    ]
    runs = _runs(["-m", "checkpoint=choice('a b',c)", f"output_dir={AWKWARD}"])
    assert [run[0] for run in runs] == ["checkpoint=a b", "checkpoint=c"]
    assert load_config([*runs[0], "bank=zeroeval"]).output_dir == f"{AWKWARD}/checkpoint=a_b"


# --- what is printed ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("started", "command", "printed"),
    [
        ("train.py", "eval", "python eval.py"),
        ("../train.py", "train", "python ../train.py"),
        ("eval.py", "bank", "python -m jaxroute bank"),
        ("/anywhere/jaxroute/__main__.py", "eval", "python -m jaxroute eval"),
        ("bin/jaxroute", "eval", "jaxroute eval"),
    ],
)
def test_a_command_is_printed_as_it_was_started(started, command, printed, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    for name in ("python", "jaxroute"):
        (tmp_path / "bin").mkdir(exist_ok=True)
        (tmp_path / "bin" / name).touch(mode=0o755)
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    monkeypatch.setattr(sys, "executable", str(tmp_path / "bin" / "python"))
    monkeypatch.setattr(sys, "argv", [started])
    assert program(command) == printed
    # Not to be found by its name, as in an environment that is not active.
    monkeypatch.setenv("PATH", "")
    assert program(command) == re.sub(r"^(python|jaxroute)", r"bin/\1", printed)


def test_no_command_is_printed_by_hand():
    """Advice names the program as it was started, and quotes what needs it: `command_line` does both."""
    by_hand = re.compile(r"python (train|eval)\.py \S*=|jaxroute (train|eval) \S*=|bank=table bank\.folder=\{")
    where = ROOT / "jaxroute"
    found = []
    for path in {*where.rglob("*.py")} - {where / "config" / "options.py"}:  # it writes a page, which is not run
        tree = ast.parse(path.read_text())
        documents = {
            id(node.body[0].value)
            for node in ast.walk(tree)
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef)
            and node.body
            and isinstance(node.body[0], ast.Expr)
        }
        for node in ast.walk(tree):
            if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in documents:
                found += [f"{path.relative_to(where)}: {match[0]}" for match in by_hand.finditer(node.value)]
    assert found == []


def test_printed_words_can_be_pasted(tmp_path):
    """A shell gives back every word, and the program reads it as it was meant."""
    printed = command_line("eval", path_word("checkpoint", AWKWARD), paths_word("study.routers.mine", [AWKWARD]))
    start = shlex.split(program("eval"))
    script = printed.replace(shlex.join(start), "printf '%s\\n'", 1)
    echoed = subprocess.run(["sh", "-c", script], capture_output=True, text=True, check=True)
    checkpoint, routers = echoed.stdout.splitlines()
    config = load_config(["study=quick", "bank=zeroeval", checkpoint, routers])
    assert config.checkpoint == AWKWARD
    assert config.study.routers["mine"] == [AWKWARD]


def test_advice_for_a_choice_loads_it(tmp_path):
    folder = tmp_path / AWKWARD.replace("/", "") / "site"
    folder.mkdir(parents=True)
    text = (config_folder() / "site" / "edge3.yaml").read_text().replace("name: edge3", "name: mine")
    (folder / "mine.yaml").write_text(text)
    words = shlex.split(usage_of_choice("site", folder / "mine.yaml"))[len(shlex.split(program("train"))) :]
    assert load_config([*words, "bank=zeroeval"]).site.name == "mine"


JUDGED = (
    "site=edge3", "policies=random", "workload.rate=10", "eval.loads=1", "eval.episodes=2", "eval.requests=40",
    "eval.warmup=10",
)  # fmt: skip


@pytest.fixture
def awkward_run(tmp_path, monkeypatch):
    """A run with an awkward name in the working directory, as a training leaves it, of a network that never trained."""
    import jax

    from jaxroute.networks import build_network
    from jaxroute.runs import save_params, write_config
    from jaxroute.scenarios import build_env

    monkeypatch.chdir(tmp_path)
    run = Path("a b(1){x}[2]*?=#ä'q")
    run.mkdir()
    config = load_config(["site=edge3", "network.hidden=8", f"output_dir={run}", "seed=5"])
    env, params = build_env(config)
    network = build_network(config.network, config.env.away)
    key = jax.random.key(0)
    shapes = jax.eval_shape(lambda: network.init(key, network.prepare(env.reset(key, params)[0])))
    save_params(run, 64, jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), shapes))
    write_config(run, config)
    return run


@pytest.mark.exhaustive
@pytest.mark.slow
def test_the_advice_to_judge_runs_as_it_is_printed(awkward_run, monkeypatch):
    monkeypatch.setattr(sys, "argv", [str(ROOT / "train.py")])
    printed = command_line("eval", path_word("checkpoint", awkward_run))
    script = f"{printed} {shlex.join(JUDGED)} {path_word('output_dir', 'judged')}"
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(["sh", "-c", script], env=env, capture_output=True, text=True, timeout=600, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    results = json.loads(Path("judged/results.json").read_text())
    assert set(results["policies"]) == {"jaxroute", "random"}
    # The command in the results can be pasted as well.
    words = shlex.split(results["provenance"]["command"])
    assert f"checkpoint={awkward_run}" in words


@pytest.mark.slow
def test_judging_inside_an_event_loop(awkward_run, jax_as_it_was):
    """A Jupyter kernel runs cells in one, and Orbax has loops of its own."""
    from jaxroute.commands.eval import main as eval_main

    async def cell():
        return eval_main([*JUDGED, f"checkpoint={awkward_run}", "output_dir=judged"])

    assert asyncio.run(cell()) == 0
    assert Path("judged/report.html").exists()


def test_advice_to_resume_or_fork_is_read_as_it_is_printed(awkward_run):
    checkpoint = awkward_run / "checkpoints" / "64"
    with pytest.raises(UserError, match="is a part of a run; ") as error:
        _config([f"resume={checkpoint}"])
    (resume,) = shlex.split(str(error.value).partition("is a part of a run; ")[2].removesuffix(" goes on with it"))
    resumed = _config([resume])
    assert (resumed.resume, resumed.output_dir, resumed.seed) == (str(awkward_run), str(awkward_run), 5)
    with pytest.raises(UserError, match="start a new run with ") as error:
        _config([f"resume={awkward_run}", "ppo.clip=0.1"])
    (fork,) = shlex.split(str(error.value).partition("start a new run with ")[2])
    forked = _config([fork, "ppo.clip=0.1"])
    assert (forked.fork, forked.output_dir, forked.seed) == (str(awkward_run), None, 5)
    # As training prints them, when it stops and when it diverges.
    for word, field in ((path_word("resume", awkward_run), "resume"), (path_word("fork", checkpoint), "fork")):
        words = shlex.split(command_line("train", word))[len(shlex.split(program("train"))) :]
        assert getattr(_config(words), field) == word.partition("=")[2]


def test_version_and_a_misspelt_command(capsys):
    assert jaxroute_main(["--version"]) == 0
    assert re.fullmatch(r"jaxroute \d+\.\d+\.\d+\n", capsys.readouterr().out)
    assert jaxroute_main(["trian"]) == 2
    assert "no command trian (did you mean train?)" in capsys.readouterr().err
    assert jaxroute_main([]) == 0
    assert "usage: python -m jaxroute COMMAND" in capsys.readouterr().out


# --- places where a container runs ---------------------------------------------------------------------------


@pytest.fixture
def jax_as_it_was():
    """Give JAX its options back."""
    import jax

    names = ("jax_compilation_cache_dir", "jax_persistent_cache_min_compile_time_secs")
    before = {name: getattr(jax.config, name) for name in names}
    yield
    for name, value in before.items():
        jax.config.update(name, value)


@pytest.mark.parametrize("place", ["a file", "below a file", "no home", "a name too long"])
def test_without_a_place_for_a_cache_there_is_one_warning(place, tmp_path, monkeypatch, capsys, jax_as_it_was):
    import jax

    monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    jax.config.update("jax_compilation_cache_dir", None)
    (tmp_path / "jaxroute").touch()
    if place == "no home":
        monkeypatch.delenv("HOME", raising=False)
        monkeypatch.setattr("pwd.getpwuid", lambda uid: (_ for _ in ()).throw(KeyError(uid)))
    else:
        names = {"a file": "", "below a file": "jaxroute/cache", "a name too long": "x" * 300}
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / names[place]))
    use_compilation_cache()
    said = capsys.readouterr().err
    assert re.fullmatch(r"warning: compiled programs are not kept[^\n]*\n", said)
    assert jax.config.jax_compilation_cache_dir is None


@pytest.mark.parametrize("name", ["taken", "taken/run", "taken/deeper/run", "x" * 300])
def test_a_folder_that_cannot_be_written_is_found_out(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("taken").touch()
    with pytest.raises(UserError, match=r"name (a|another) folder by output_dir="):
        check_writable(Path(name), "output_dir")
    check_writable(Path("new/run"), "output_dir")
    assert [path.name for path in Path.cwd().iterdir()] == ["taken"]


COMMANDS = {
    "predict": ["bank", "--out"],
    "bank": ["build", "answers.csv", "--out"],
    "export": ["run", "--out"],
    "calibrate": ["log.csv", "--out"],
    "trace": ["fit", "trace.csv", "--plot", "new.png", "--out"],
}


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("name", ["taken", "below/it", "x" * 300])
def test_commands_find_out_before_they_read_anything(command, name, tmp_path, monkeypatch, capsys):
    """Nothing that they would read is there, so that reading it would be another error."""
    monkeypatch.chdir(tmp_path)
    suffix = ".yaml" if command in ("calibrate", "trace") else ""
    Path(f"taken{suffix}").touch()
    Path("below").touch()
    assert jaxroute_main([command, *COMMANDS[command], name + suffix]) == 2
    what = "file" if suffix else "folder"
    why = "exists already" if name == "taken" else r"cannot be written \([^\n]*\)"
    assert re.fullmatch(rf"error: {name}{suffix} {why}: name another {what} by --out=[^\n]*\n", capsys.readouterr().err)


def test_a_figure_that_cannot_be_written_is_found_out(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("below").touch()
    assert jaxroute_main(["trace", "describe", "trace.csv", "--plot", "below/it.png"]) == 2
    assert "below/it.png cannot be written" in capsys.readouterr().err


def test_a_full_disk_is_one_line(capsys):
    def write(console):
        with open("/dev/full", "w") as file:
            file.write("x")

    assert run_with_console(write) == 2
    assert re.fullmatch(r"error: [^\n]*No space left on device\n", capsys.readouterr().err)


def test_what_is_no_fault_of_the_machine_is_shown_whole():
    def fail(console):
        Path("does/not/exist").read_text()

    with pytest.raises(FileNotFoundError):
        run_with_console(fail)


@pytest.mark.parametrize("platform", ["cud", "cpu,tpuu"])
def test_a_misspelt_platform_is_one_line(platform, tmp_path):
    env = os.environ | {"JAX_PLATFORMS": platform, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, str(ROOT / "eval.py"), "site=edge3", "eval.episodes=2", "policies=random"]
    refused = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=300, check=False)
    assert (refused.returncode, refused.stdout) == (2, "")
    assert re.fullmatch(
        rf"error: JAX_PLATFORMS={platform} cannot be used on this machine; choose .*cpu.*\n", refused.stderr
    )


def test_a_platform_that_is_there_is_usable():
    assert unusable_platform(RuntimeError("something else")) is None
