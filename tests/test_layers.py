"""Who may import whom: packages know only what lies below them, and the light ones load nothing heavy."""

from __future__ import annotations

import ast
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import jaxroute

PACKAGE = Path(jaxroute.__file__).parent

# From the bottom to the top. A package or module may import those of the lines above its own, and nothing else.
LAYERS = (
    ("errors",),
    ("files",),
    ("devices", "plotting", "progress"),
    ("tables", "decisions"),
    ("serving",),
    ("banks", "workloads"),
    ("predictors", "fitting", "env"),
    ("policies", "networks"),
    ("learning", "gateway"),
    ("adapters",),
    ("config",),
    ("scenarios",),
    ("runs",),
    ("training", "evaluation"),
    ("commands",),
    ("__init__", "__main__", "emulate"),
)
LEVEL = {name: level for level, layer in enumerate(LAYERS) for name in layer}

LOOSE_FILES = {
    *("__init__", "__main__", "errors", "files", "tables", "devices", "plotting", "progress", "scenarios", "runs"),
    *("decisions", "emulate"),
}
NOT_CODE = {"configs", "pretrained", "__pycache__"}

# Of no use to a gateway, or to a program that wants one name of the package, and slow to import.
HEAVY = {
    *("hydra", "omegaconf", "optax", "flax", "orbax", "wandb", "matplotlib", "jraph", "chex", "pandas", "pyarrow"),
    *("scipy", "rich", "jinja2", "gymnasium", "torch"),
    *("starlette", "uvicorn", "aiohttp", "prometheus_client", "openai"),
}
LIGHT = """
import jaxroute
from jaxroute import Outcomes, Requests, Site, UserError, replay
from jaxroute.env import EdgeRouting
from jaxroute.gateway import Router
"""


def imported(source: str, package: str) -> Iterator[str]:
    """What a module of `package` imports from jaxroute: the packages, or "jaxroute.NAME" for a name of the root."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom):
            module = node.module or ""
            if node.level:
                above = package.split(".")[: len(package.split(".")) - node.level + 1]
                module = ".".join([*above, *([module] if module else [])])
            names = [f"{module}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        else:
            continue
        for name in names:
            parts = name.split(".")
            if parts[0] == "jaxroute":
                yield parts[1] if len(parts) > 1 and parts[1] in LEVEL else name


def modules() -> Iterator[tuple[str, str, str]]:
    """File, top-level name and dotted package of each module."""
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(PACKAGE).with_suffix("").parts
        # What `python -m jaxroute.PACKAGE` starts is a command.
        own = parts[-1] if parts[-1] == "__main__" else parts[0]
        yield str(path.relative_to(PACKAGE.parent)), own, ".".join(["jaxroute", *parts[:-1]])


def breaches(file: str, own: str, package: str, source: str) -> list[str]:
    """What a module imports against the rule; "jaxroute.__version__" is anybody's."""
    return [
        f"{file} imports {name}"
        for name in imported(source, package)
        if name not in (own, "jaxroute.__version__") and LEVEL.get(name, len(LAYERS)) >= LEVEL[own]
    ]


def test_imports_point_one_way():
    found = [
        breach
        for file, own, package in modules()
        for breach in breaches(file, own, package, (PACKAGE.parent / file).read_text())
    ]
    assert not found


@pytest.mark.parametrize(
    ("source", "breach"),
    [
        ("from jaxroute.env import EdgeRouting", "env"),
        ("import jaxroute.env.types", "env"),
        ("import jaxroute", "jaxroute"),
        ("from jaxroute import env", "env"),
        ("from jaxroute import make", "jaxroute.make"),
        ("from ..env import types", "env"),
        ("from .. import env", "env"),
        ("def late():\n    from jaxroute.commands.train import main", "commands"),
        ("if TYPE_CHECKING:\n    from jaxroute.workloads.arrivals import poisson", "workloads"),
    ],
)
def test_the_rule_sees_every_kind_of_import(source, breach):
    assert breaches("bank.py", "banks", "jaxroute.banks", source) == [f"bank.py imports {breach}"]


def test_every_package_has_its_layer_and_no_file_lies_about():
    files = {path.stem for path in PACKAGE.glob("*.py")}
    packages = {path.name for path in PACKAGE.iterdir() if path.is_dir()} - NOT_CODE
    assert files == LOOSE_FILES
    assert packages | files == set(LEVEL)


def shapes(source: str) -> list[tuple[tuple[int, int], tuple[int, int]]]:
    """Where the shapes of jaxtyping begin and end: the string in `Float[Array, "lane"]`; row and column from 1."""
    pairs = [
        node.slice.elts
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.Subscript) and isinstance(node.slice, ast.Tuple) and len(node.slice.elts) == 2
    ]
    return [
        ((shape.lineno, shape.col_offset + 1), (shape.end_lineno, shape.end_col_offset + 1))
        for _, shape in pairs
        if isinstance(shape, ast.Constant) and isinstance(shape.value, str)
    ]


def undefined(*places: Path) -> list[str]:
    """Names that are used and nowhere defined. Ruff's rule is off elsewhere, as it takes shapes for names."""
    ruff = [sys.executable, "-m", "ruff", "check", "--isolated", "--select=F821", "--output-format=json"]
    done = subprocess.run([*ruff, *places], capture_output=True, text=True, timeout=60)
    assert done.returncode in (0, 1), done.stderr
    found = json.loads(done.stdout)
    apart = {path: shapes(Path(path).read_text()) for path in {name["filename"] for name in found}}
    return [
        f"{Path(name['filename']).name}:{name['location']['row']}: {name['message']}"
        for name in found
        if not any(
            begin <= (name["location"]["row"], name["location"]["column"]) < end
            for begin, end in apart[name["filename"]]
        )
    ]


def test_every_name_is_defined():
    root = Path(__file__).parents[1]
    assert not undefined(PACKAGE, root / "tests", root / "benchmarks")


def test_an_undefined_name_is_seen_and_a_shape_is_none(tmp_path):
    (tmp_path / "lost.py").write_text(
        "from __future__ import annotations\n"
        'def f(x: Float[Array, "lane"], y: "Site") -> None:\n'
        '    return g(x, {"a": 1}["a"])\n'
    )
    assert [found.partition("name ")[2] for found in undefined(tmp_path)] == [
        f"`{n}`" for n in ("Float", "Array", "Site", "g")
    ]


def loaded_by(statement: str) -> set[str]:
    """Top-level modules that a fresh interpreter holds after a statement."""
    program = f"import sys\n{statement}\nprint(*{{name.split('.')[0] for name in sys.modules}})"
    environment = os.environ | {"PYTHONPATH": str(PACKAGE.parent)}
    done = subprocess.run(
        [sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True, timeout=300
    )
    return set(done.stdout.split())


def test_engine_environment_and_router_load_nothing_heavy():
    loaded = loaded_by(LIGHT)
    assert {"jaxroute", "jax"} <= loaded
    assert not loaded & HEAVY


def test_the_package_alone_loads_not_even_jax():
    assert not loaded_by("import jaxroute; dir(jaxroute); jaxroute.UserError") & {"jax", "numpy"}


def test_public_names_are_loaded_when_they_are_used():
    assert set(jaxroute.__all__) <= set(dir(jaxroute))
    for name in jaxroute.__all__:
        assert getattr(jaxroute, name) is not None
    assert "edge-poisson" in jaxroute.SCENARIOS
    with pytest.raises(AttributeError, match="has no attribute 'mkae'"):
        jaxroute.mkae  # noqa: B018
    with pytest.raises(ImportError, match="cannot import name 'mkae'"):
        from jaxroute import mkae  # noqa: F401
