"""Every option of train.py and eval.py, with its type, default and meaning.

`python -m jaxroute.config.options` prints docs/reference/options.md, and with `fleet` after it the table of the
gateway's fleet file in docs/gateway.md. All is read from the dataclasses of the configuration and the YAML files in
configs/, so that nothing is said twice.
"""

from __future__ import annotations

import ast
import inspect
import sys
import textwrap
from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from typing import Any, NamedTuple, get_args, get_type_hints

from omegaconf import MISSING

from jaxroute.config.load import config_folder, load_config
from jaxroute.config.schema import Config
from jaxroute.gateway.fleet import Fleet


class Option(NamedTuple):
    """One option as on the command line."""

    name: str
    type: str
    default: str
    meaning: str


def options() -> Iterator[Option]:
    """All that is said about options, in their order; the entries of lists and dictionaries are `<n>` and `<name>`."""
    return _options(Config, load_config(), "")


def groups() -> dict[str, list[str]]:
    """Return the groups of configs/ and their choices."""
    return {
        group.name: sorted(path.stem for path in group.glob("[!_]*.yaml"))
        for group in sorted(config_folder().iterdir())
        if group.is_dir()
    }


def meanings(schema: type) -> dict[str, str]:
    """Return what is written below each field of a dataclass."""
    found = {}
    body = ast.parse(textwrap.dedent(inspect.getsource(schema))).body[0]
    assert isinstance(body, ast.ClassDef)
    for statement, following in zip(body.body, body.body[1:], strict=False):
        if isinstance(statement, ast.AnnAssign) and isinstance(statement.target, ast.Name):
            match following:
                case ast.Expr(value=ast.Constant(value=str(text))):
                    found[statement.target.id] = " ".join(text.split())
    return found


def page() -> str:
    """Return docs/reference/options.md."""
    lines = [
        "# Options",
        "",
        "Every option of `train.py` and `eval.py`, as on the command line: `python train.py workload=gamma seed=3`.",
        "`--cfg` prints the configuration that a command line results in.",
        "Text is taken as it stands, whatever characters it has; `~` at the start of a path is the home folder.",
        "A list is written `a,b` or `[a,b]`, and a single value will do. With `-m` (`--multirun`), commas separate the",
        "values of several runs, one for each combination, so that a list needs its brackets.",
        "Written by `python -m jaxroute.config.options`.",
        "",
        "| group | choices |",
        "|---|---|",
    ]
    lines += [f"| `{group}` | {', '.join(choices)} |" for group, choices in groups().items()]
    section = None
    for option in options():
        of = option.name.partition(".")[0] if "." in option.name else "General"
        if of != section:
            section = of
            lines += ["", f"## {section}", "", "| option | type | default | |", "|---|---|---|---|"]
        lines.append(
            f"| `{option.name}` | {option.type} | {option.default} | {option.meaning} |".replace("|  |", "| |")
        )
    return "\n".join(lines) + "\n"


def fleet_options() -> list[Option]:
    """Return all that is said about the gateway's fleet file."""
    return list(_options(Fleet, Fleet(), "", with_defaults=True))


def fleet_table() -> str:
    """Return the table of docs/gateway.md."""
    lines = ["| option | type | default | |", "|---|---|---|---|"]
    for option in fleet_options():
        default = "" if option.default == f"`{MISSING}`" else option.default
        lines.append(f"| `{option.name}` | {option.type} | {default} | {option.meaning} |".replace("|  |", "| |"))
    return "\n".join(lines) + "\n"


def _options(schema: type, values: Any, prefix: str, *, with_defaults: bool = False) -> Iterator[Option]:
    hints = get_type_hints(schema)
    about = meanings(schema)
    # What has no parts first, so that sections do not interrupt it.
    for entry in sorted(fields(schema), key=lambda entry: _inner(hints[entry.name]) is not None):
        hint, value, name = hints[entry.name], getattr(values, entry.name, None), prefix + entry.name
        inner = _inner(hint)
        if inner is None:
            yield Option(name, _type_name(hint), _shown(value), about.get(entry.name, ""))
        elif hint is inner or hint == inner | None:
            usual = inner() if value is None and with_defaults else value
            yield from _options(inner, usual, f"{name}.", with_defaults=with_defaults)
        else:
            place = f"{name}.<{'name' if 'dict' in str(hint) else 'n'}>."
            yield from _options(inner, inner() if with_defaults else None, place, with_defaults=with_defaults)


def _inner(hint: Any) -> Any:
    """Return the dataclass that an option consists of, if any."""
    return next((kind for kind in (hint, *get_args(hint)) if is_dataclass(kind)), None)


def _type_name(hint: Any) -> str:
    name = hint.__name__ if isinstance(hint, type) and not get_args(hint) else str(hint)
    return name.replace("None", "null").replace("|", "or")


def _shown(value: Any) -> str:
    if value is None:
        return ""
    text = str(value).lower() if isinstance(value, bool) else f"{value:g}" if isinstance(value, float) else str(value)
    # Long ones, such as the figures of a bank, are for the YAML file.
    return f"`{text}`" if len(text) <= 40 else "see configs/"


if __name__ == "__main__":
    print(fleet_table() if sys.argv[1:] == ["fleet"] else page(), end="")
