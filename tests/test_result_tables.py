"""The result tables of README and docs show the figures that they are made from."""

from __future__ import annotations

import json

import pytest

from benchmarks import result_tables
from jaxroute.errors import UserError

STUDY = json.loads(result_tables.STUDY.read_text())


@pytest.mark.parametrize("page", list(result_tables.pages()), ids=lambda page: page.name)
def test_pages_are_in_step(page):
    """If not: python -m benchmarks.result_tables."""
    text = page.read_text()
    assert result_tables.filled(text, STUDY) == text


def test_readme_and_results_page_have_theirs():
    text = "".join(page.read_text() for page in result_tables.pages())
    for name in ("settings", "verdicts", "ranks", "efficiency"):
        assert f"<!-- table: {name} -->" in text


def test_a_changed_figure_changes_the_pages():
    changed = json.loads(json.dumps(STUDY))
    changed["verdicts"][0]["difference"]["mean"] = 0.9876
    readme = (result_tables.ROOT / "README.md").read_text()
    assert "+0.9876" in result_tables.filled(readme, changed)
    assert "+0.9876" not in readme


def test_an_unknown_table_is_refused():
    with pytest.raises(UserError, match="table: nothing --> is unknown; choose one of overload, settings,"):
        result_tables.filled("<!-- table: nothing -->\n<!-- end of table -->\n", STUDY)


def test_a_study_is_published_as_its_tables_show_it():
    interval = {"mean": 0.12345678, "ci95": 0.00012345}
    names = ("avg_qos", "rule_avg_qos", "difference", "efficiency", "rule_efficiency", "efficiency_difference")
    verdict = {"setting": "poisson", "rate": 7.7371, "router": "jaxroute", "best_rule": "random", "iqm": 0.12345}
    verdict |= dict.fromkeys(names, interval) | {"training_seeds": [0.1, 0.3, 0.2]}
    standing = {"policy": "jaxroute", "mean_rank": 1.0, "best_rank": 1.0, "worst_rank": 1.0, "avg_qos": 0.51777}
    found = result_tables.published({"verdicts": [verdict], "standings": [standing]})
    assert found["verdicts"][0].keys() == STUDY["verdicts"][0].keys()
    assert found["standings"][0].keys() == STUDY["standings"][0].keys()
    (row,) = result_tables.verdicts_table(found).splitlines()[2:]
    assert row == "| poisson | 7.74 | 0.123 ± 0.000 | random | 0.123 | +0.1235 ± 0.0001 | 0.123 [0.100, 0.300] |"
