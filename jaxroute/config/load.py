"""From YAML files and the command line to a checked configuration."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import asdict, fields, is_dataclass
from pathlib import Path
from typing import Any, get_args, get_type_hints

from hydra import compose, initialize_config_dir
from hydra.core.config_store import ConfigStore
from hydra.errors import HydraException
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import MarkedYAMLError, YAMLError

from jaxroute.config.schema import Config
from jaxroute.config.words import as_override, escaped, parsed, program
from jaxroute.errors import UserError, closest


def config_folder() -> Path:
    """Return where the YAML files are: beside the package in an installation, at the top of a checkout."""
    installed = Path(__file__).parents[1] / "configs"
    return installed if installed.is_dir() else Path(__file__).parents[2] / "configs"


def register_schema() -> None:
    """Tell Hydra the types behind configs/config.yaml."""
    ConfigStore.instance().store(name="schema", node=Config)


# The open dictionaries, to which an override may add: stand-ins for models, routers of a study, floors of classes.
_OPEN = tuple(f"{name}{end}" for name in ("bank.models", "study.routers", "reward.class_floor") for end in ".=")

# Null unless the site's file says otherwise. Hydra's overrides fail there, and OmegaConf's merge does not.
_LATE = ("site.cloud.", "site.cloud=")


def load_config(words: Sequence[str] = (), base: Config | None = None) -> Config:
    """Compose and check the configuration of a command line, `option=value` each; what it leaves open is as in `base`.

    Raises:
        UserError: an unknown key or group, a wrong type, a value out of range.
    """
    register_schema()
    try:
        overrides = [_override(word, words) for word in words]
        with initialize_config_dir(str(config_folder().resolve()), version_base="1.3"):
            composed: Any = compose("config", overrides=[word for word in overrides if not word.startswith(_LATE)])
        for word in overrides:
            if word.startswith(_LATE):
                composed = OmegaConf.merge(composed, _nested(word))
        return typed(composed) if base is None else _changed(base, composed, overrides)
    except (HydraException, OmegaConfBaseException, YAMLError, ValueError) as error:
        raise UserError(_explain(error)) from None


def _override(word: str, words: Sequence[str]) -> str:
    """Return a word as an override for Hydra, whose own messages speak of its grammar."""
    if word.startswith("-"):
        raise UserError(f"unknown flag {word}; options are written option=value, see {program('train')} --help")
    try:
        override = as_override(word)
        understood = parsed(override)
    except HydraException:
        raise UserError(f"cannot read {word}; write option=value, and a list as [1,2]") from None
    if understood.is_sweep_override():
        raise UserError(f"{word}: {understood.key_or_group} takes one value; --multirun runs several, one by one")
    option = override.lstrip("+")
    if option.startswith("study.") and not any(other.startswith("study=") for other in words):
        raise UserError(f"{word}: no study is chosen; add, for instance, study=main")
    if option.startswith(_OPEN):
        return f"++{option}"
    if override.startswith("+"):
        raise UserError(f"unknown option {word.lstrip('+')}; every option exists already, so leave out the +")
    return override


def _nested(override: str) -> dict[str, Any]:
    """Return what an override says as a nested dictionary."""
    understood = parsed(override)
    value: Any = understood.value()
    for name in reversed(understood.key_or_group.split(".")):
        value = {name: value}
    return value


def _changed(base: Config, composed: Any, overrides: Sequence[str]) -> Config:
    """Return `base` with what the overrides name as it is in `composed`."""
    changed, given = asdict(base), OmegaConf.to_container(composed, resolve=True)
    for override in overrides:
        *names, last = (int(name) if name.isdigit() else name for name in parsed(override).key_or_group.split("."))
        place: Any = changed
        value: Any = given
        for name in names:
            if place[name] is None:
                last = name  # all of what the base has nothing of
                break
            place, value = place[name], value[name]
        place[last] = value[last]
    return typed(OmegaConf.merge(OmegaConf.structured(Config), escaped(changed)))


def read_config(path: Path) -> Config:
    """Read a configuration that a run has written.

    Raises:
        UserError: it is not one, or was written by a version with other options.
    """
    try:
        return typed(OmegaConf.merge(OmegaConf.structured(Config), OmegaConf.load(path)))
    except (OmegaConfBaseException, YAMLError, UserError) as error:
        raise UserError(f"{path}: {_explain(error)}") from None


def typed(composed: Any) -> Config:
    """Turn Hydra's composed configuration into the checked dataclasses."""
    config = OmegaConf.to_object(composed)
    assert isinstance(config, Config)
    return config


def config_yaml(config: Config) -> str:
    """Return the resolved configuration as YAML."""
    return OmegaConf.to_yaml(OmegaConf.create(escaped(asdict(config))))


def _explain(error: Exception) -> str:
    """Shorten Hydra's and OmegaConf's messages to one line that says what, where and what to do."""
    cause: BaseException = error
    while not isinstance(cause, UserError) and cause.__cause__ is not None and str(cause.__cause__):
        cause = cause.__cause__
    if isinstance(cause, UserError):
        return str(cause)
    if isinstance(cause, MarkedYAMLError) and cause.problem_mark is not None:
        return f"{cause.problem_mark.name}, line {cause.problem_mark.line + 1}: {cause.problem}"
    lines = [line.strip() for line in str(cause).splitlines() if line.strip()] or [type(cause).__name__]
    message, where = lines[0], ""
    if (file := re.match(r"In '(.+)': \w+ raised while composing", message)) and len(lines) > 1:
        message, where = lines[1], f"{file.group(1)}.yaml: "
    if full_key := re.search(r"full_key: (\S+)", str(cause)):
        key = re.sub(r"\[(\d+)\]", r".\1", full_key.group(1))
        if re.match(r"Key '[^']+' (?:is not in struct|not in)", message):
            return f"{where}unknown option {key}{_suggestion(key)}"
        if re.search(r"\.\d+$", key) and re.search(r"dict is not a subclass|index out of range", message):
            return f"{where}{key} does not exist: the list is shorter, and counted from 0"
        if "missing mandatory value" in message:
            return f"{where}{key} is missing; give it a value"
        return f"{where}{key}: {message}"
    if options := re.search(r"Could not find '(\S+)/(\S+)'", str(cause)):
        available = sorted(path.stem for path in (config_folder() / options.group(1)).glob("[!_]*.yaml"))
        return f"unknown {options.group(1)} {options.group(2)}; choose one of {', '.join(available)}"
    return where + message


def _suggestion(key: str) -> str:
    known = list(_option_names(Config))
    numbered = re.sub(r"\.\d+\.", f".{_NUMBER}.", key)
    near = closest(numbered, known)
    if near is None:
        by_last_word = {name.rpartition(".")[2]: name for name in reversed(known)}
        word = closest(key.rpartition(".")[2], by_last_word)
        if word is None:
            return f"; see {program('train')} --help=all"
        near = by_last_word[word]
    number = re.search(r"\.(\d+)\.", key)
    return f" (did you mean {near.replace(_NUMBER, number.group(1)) if number else near}?)"


def _option_names(schema: type, prefix: str = "") -> Iterator[str]:
    hints = get_type_hints(schema)
    for entry in fields(schema):
        inner = next((kind for kind in (hints[entry.name], *get_args(hints[entry.name])) if is_dataclass(kind)), None)
        yield prefix + entry.name
        if isinstance(inner, type):
            number = "" if hints[entry.name] in (inner, inner | None) else f"{_NUMBER}."
            yield from _option_names(inner, f"{prefix}{entry.name}.{number}")


# Stands for the place in a list.
_NUMBER = "<n>"
