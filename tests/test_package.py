"""What a release holds, and that it works where there is no checkout."""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
import tarfile
import venv
import zipfile
from importlib.metadata import version
from pathlib import Path

import pytest

import jaxroute

ROOT = Path(__file__).resolve().parents[1]

pytestmark = pytest.mark.slow


def _files(folder: Path) -> set[str]:
    return {
        str(path.relative_to(ROOT)) for path in folder.rglob("*") if path.is_file() and "__pycache__" not in path.parts
    }


@pytest.fixture(scope="module")
def release(tmp_path_factory):
    """Source distribution and wheel; the wheel is built from the source distribution."""
    folder = tmp_path_factory.mktemp("dist")
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(folder), str(ROOT)]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return next(folder.glob("*.tar.gz")), next(folder.glob("*.whl"))


@pytest.fixture(scope="module")
def installed(release, tmp_path_factory):
    """A fresh environment with the wheel, and the dependencies of the running one; its folder of executables."""
    folder = tmp_path_factory.mktemp("installed") / "environment"
    venv.create(folder, with_pip=False)
    python = folder / "bin" / "python"
    install = [sys.executable, "-m", "pip", "--python", str(python), "install", "--quiet", "--no-index", "--no-deps"]
    done = subprocess.run([*install, str(release[1])], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    packages = Path(sysconfig.get_path("purelib", vars={"base": str(folder)}))
    # Python appends the folder to its path and does not look for this checkout's editable installation there.
    (packages / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return folder / "bin"


def _run(command: list[str | Path], folder: Path) -> str:
    environment = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "JAXROUTE_DATA")}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_the_version_is_one():
    assert version("jaxroute") == jaxroute.__version__
    assert f"## [{jaxroute.__version__}]" in (ROOT / "CHANGELOG.md").read_text()
    assert f"\nversion: {jaxroute.__version__}\n" in (ROOT / "CITATION.cff").read_text()


def test_it_holds_the_package_with_its_data_and_nothing_else(release):
    source, wheel = release
    with zipfile.ZipFile(wheel) as archive:
        inside = {name for name in archive.namelist() if ".dist-info/" not in name}
    wanted = _files(ROOT / "jaxroute") | {f"jaxroute/{name}" for name in _files(ROOT / "configs")}
    assert inside == wanted
    assert any(name.endswith(".jinja") for name in inside)
    with tarfile.open(source) as archive:
        folders = {name.split("/")[1] for name in archive.getnames()}
    assert {"jaxroute", "configs", "train.py", "eval.py", "README.md", "LICENSE"} <= folders
    assert not {"tests", "benchmarks", "docs"} & folders


def test_commands_work_outside_of_a_checkout(installed, tmp_path):
    said = _run(
        [
            installed / "jaxroute",
            *("eval", "site=edge3", "policies=[qos_greedy]", "output_dir=judged"),
            *("eval.episodes=1", "eval.requests=20", "eval.warmup=10", "eval.loads=[1.0]"),
        ],
        tmp_path,
    )
    assert "qos_greedy" in said
    assert (tmp_path / "judged" / "report.html").is_file()


def test_the_library_works_outside_of_a_checkout(installed, tmp_path):
    code = (
        "import jax, jaxroute; env, params = jaxroute.make('edge3-poisson'); "
        "obs, state = jax.jit(env.reset)(jax.random.key(0), params); print(jaxroute.__file__, env.num_experts)"
    )
    path, number = _run([installed / "python", "-c", code], tmp_path).split()
    assert Path(path).is_relative_to(installed.parent)
    assert number == "3"
