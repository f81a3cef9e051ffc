"""From YAML files and the command line to a checked configuration."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any, get_args, get_type_hints

from hydra import compose, initialize_config_dir
from hydra.core.config_store import ConfigStore
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import MarkedYAMLError, YAMLError

from jaxroute.config.schema import Config
from jaxroute.errors import UserError, closest


def config_folder() -> Path:
    """Return where the YAML files are: beside the package in an installation, at the top of a checkout."""
    installed = Path(__file__).parents[1] / "configs"
    return installed if installed.is_dir() else Path(__file__).parents[2] / "configs"


def register_schema() -> None:
    """Tell Hydra the types behind configs/config.yaml."""
    ConfigStore.instance().store(name="schema", node=Config)


# The open dictionaries, to which an override may add: stand-ins for a bank's models, and the routers of a study.
_OPEN = ("bank.models.", "bank.models=", "study.routers.", "study.routers=")


def load_config(overrides: Sequence[str] = (), base: Config | None = None) -> Config:
    """Compose and check the configuration that these Hydra overrides describe; what they leave open is as in `base`.

    Raises:
        UserError: an unknown key or group, a wrong type, a value out of range.
    """
    register_schema()
    try:
        overrides = list(overrides)
        for position, override in enumerate(overrides):
            _check_override(override)
            option = override.lstrip("+")
            if option.startswith("study.") and not any(other.startswith("study=") for other in overrides):
                raise UserError(f"{option}: no study is chosen; add, for instance, study=main")
            if option.startswith(_OPEN):
                overrides[position] = f"++{option}"
            elif override.startswith("+"):
                raise UserError(f"unknown option {option}; every option exists already, so leave out the +")
        with initialize_config_dir(str(config_folder().resolve()), version_base="1.3"):
            composed = compose("config", overrides=overrides)
        return typed(composed if base is None else _changed(base, composed, overrides))
    except (HydraException, OmegaConfBaseException, YAMLError, ValueError) as error:
        raise UserError(_explain(error)) from None


def _changed(base: Config, composed: Any, overrides: Sequence[str]) -> Any:
    """Return `base` with what the overrides name as it is in `composed`."""
    changed = OmegaConf.structured(base)
    for override in OverridesParser.create().parse_overrides(list(overrides)):
        key = override.key_or_group
        OmegaConf.update(changed, key, OmegaConf.select(composed, key), merge=False)
    return changed


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
    return OmegaConf.to_yaml(OmegaConf.structured(config))


def _check_override(override: str) -> None:
    """Refuse what Hydra cannot read, which it says in its parser's words."""
    if override.startswith("-"):
        raise UserError(f"unknown flag {override}; options are written option=value, see python train.py --help")
    try:
        parsed = OverridesParser.create().parse_override(override)
    except HydraException:
        option, _, value = override.partition("=")
        if value.startswith("~"):
            raise UserError(f"{override}: ~ is not expanded here; write the whole path") from None
        raise UserError(
            f"cannot read {override}; write option=value, a list as [1,2], and a value with special characters in two "
            f"pairs of quotes: '{option}=\"...\"'"
        ) from None
    if parsed.is_sweep_override():
        option, _, value = override.partition("=")
        raise UserError(f"{override}: there can be one value only; a list is written {option}=[{value}]")


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
            return "; see python train.py --help"
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
