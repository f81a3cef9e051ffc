"""The page of options says what there is."""

from __future__ import annotations

from pathlib import Path

from jaxroute.commands.configured import _COMMON, _runs
from jaxroute.commands.train import main as train_main
from jaxroute.config import load_config
from jaxroute.config.options import fleet_options, fleet_table, options, page

ROOT = Path(__file__).resolve().parents[1]


def test_the_page_is_up_to_date():
    assert (ROOT / "docs" / "reference" / "options.md").read_text() == page(), (
        "run: python -m jaxroute.config.options > docs/reference/options.md"
    )


def test_the_gateways_page_lists_every_option_of_a_fleet_file():
    assert fleet_table() in (ROOT / "docs" / "gateway.md").read_text(), (
        "put what python -m jaxroute.config.options fleet prints into docs/gateway.md"
    )


def test_every_option_is_explained():
    unexplained = [option.name for option in [*options(), *fleet_options()] if not option.meaning]
    assert not unexplained


def test_help_lists_what_people_set_most(capsys):
    assert train_main(["--help"]) == 0
    said = capsys.readouterr().out
    assert all(f"  {name}" in said for name in _COMMON["train"])
    assert "train.loads is the range of loads" in " ".join(said.split())
    assert "site=edge16, edge3, edge6" in said
    assert "ppo.gae_lambda" not in said
    assert max(map(len, said.splitlines())) <= 120
    train_main(["--help=all"])
    assert "ppo.gae_lambda (default 0.95)" in capsys.readouterr().out
    assert {name for names in _COMMON.values() for name in names} <= {option.name for option in options()}


def test_multirun_combines_what_is_listed():
    runs = _runs(["-m", "seed=0,1", "ppo.discount=choice(0.98,0.99)", "train.loads=[0.5,2]", "output_dir=some/where"])
    assert [run[:-1] for run in runs] == [
        ["train.loads=[0.5,2]", f"seed={seed}", f"ppo.discount={discount}"]
        for seed in (0, 1)
        for discount in (0.98, 0.99)
    ]
    assert runs[0][-1] == "output_dir=some/where/seed=0,ppo.discount=0.98"
    assert _runs(["seed=1"]) == [["seed=1"]]
    seeds = {load_config(run).seed for run in _runs(["--multirun", "seed=range(3,6)"])}
    assert seeds == {3, 4, 5}


def test_a_multirun_is_checked_before_it_begins(capsys, tmp_path):
    assert train_main(["-m", "seed=0,1", "ppo.clip=0.1,-1", f"output_dir={tmp_path / 'runs'}"]) == 2
    assert capsys.readouterr().err == "error: ppo: clip=-1.0 must be above 0, and finite\n"
    assert not (tmp_path / "runs").exists()
