"""Fill the result tables of README.md and docs/ from the figures that they show.

`python -m benchmarks.result_tables` rewrites every block between `<!-- table: NAME -->` and `<!-- end of table -->`.
`settings`, `verdicts`, `ranks` and `efficiency` show the main study as published, benchmarks/results/study_main.json;
`overload` shows that of overload, study_overload.json; `pretrained` shows the routers of the package.
`--study outputs/study-main/study.json` publishes another study of that name first.
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from benchmarks import pretrained
from jaxroute.errors import UserError
from jaxroute.evaluation.report.tables import markdown, plus_minus, verdict_of
from jaxroute.evaluation.statistics import Interval
from jaxroute.files import write_file

ROOT = Path(__file__).parents[1]
RESULTS = Path(__file__).parent / "results"
STUDY, OVERLOAD = RESULTS / "study_main.json", RESULTS / "study_overload.json"

_IN_WORDS = {
    "poisson": "Poisson",
    "gamma": "clustered (gamma, CV 4)",
    "mmpp": "bursts (mmpp)",
    "diurnal": "drifting load (diurnal)",
    "azure": "Azure trace",
    "outages": "Poisson, failing experts",
    "late_observations": "Poisson, metrics 500 ms late",
    "edge16": "another site, 16 experts",
    "random_sites": "random sites",
    "azure_zeroeval": "Azure trace, zeroeval answers",
    "azure_mmlu_pro": "Azure trace, MMLU-Pro answers",
}


def published(study: dict[str, Any]) -> dict[str, Any]:
    """Return of a study.json what the tables show, rounded as they show it."""

    def interval(value: dict[str, float], digits: int) -> dict[str, float]:
        return {name: round(number, digits) for name, number in value.items()}

    verdicts = [
        {
            "setting": v["setting"],
            "rate": float(f"{v['rate']:.3g}"),
            "router": v["router"],
            "avg_qos": interval(v["avg_qos"], 3),
            "best_rule": v["best_rule"],
            "rule_avg_qos": round(v["rule_avg_qos"]["mean"], 3),
            "difference": interval(v["difference"], 4),
            "iqm": round(v["iqm"], 3),
            "least": round(min(v["training_seeds"]), 3),
            "greatest": round(max(v["training_seeds"]), 3),
            "efficiency": interval(v["efficiency"], 3),
            "rule_efficiency": interval(v["rule_efficiency"], 3),
            "efficiency_difference": interval(v["efficiency_difference"], 4),
            "efficiency_gain": round(100 * v["efficiency_difference"]["mean"] / v["rule_efficiency"]["mean"], 1),
        }
        for v in study["verdicts"]
    ]
    standings = [
        {name: value if name == "policy" else round(value, 3 if name == "avg_qos" else 2) for name, value in s.items()}
        for s in study["standings"]
    ]
    return {"verdicts": verdicts, "standings": standings}


def published_overload(study: dict[str, Any]) -> dict[str, Any]:
    """Return of a study of overload what its table shows: at each load the router and the best rules of both kinds."""
    router, *_ = study["routers"]
    rows = []
    for setting in study["settings"]:
        for load in setting["loads"]:
            policies = load["policies"]  # best first
            rules = [policy for policy in policies if policy not in study["routers"]]
            declining = next(policy for policy in rules if "+" in policy)
            taking = next(policy for policy in rules if "+" not in policy)

            def figures(policy: str, of: dict[str, Any] = policies) -> dict[str, Any]:
                names = ("avg_qos", "qos_per_second", "declined_rate", "qos_per_busy_second")
                return {"policy": policy} | {name: round(of[policy][name]["mean"], 3) for name in names}

            rows.append(
                {
                    "setting": setting["setting"],
                    "rate": float(f"{load['rate']:.3g}"),
                    "router": figures(router),
                    "declining": figures(declining),
                    "taking": figures(taking),
                    "difference": {
                        name: round(number, 4) for name, number in load["paired_difference"][declining].items()
                    },
                }
            )
    return {"rows": rows}


def overload_table(study: dict[str, Any]) -> str:
    """Return the router against the best rules with and without the right to send requests away."""
    rows = []
    for row in study["rows"]:
        router, declining, taking = row["router"], row["declining"], row["taking"]
        difference = Interval(**row["difference"])
        text = plus_minus(difference, 4, "+")
        rows.append(
            [
                _IN_WORDS.get(row["setting"], row["setting"]),
                f"{row['rate']:.3g}",
                f"`{taking['policy']}` {taking['avg_qos']:.3f}",
                f"`{declining['policy']}` {declining['avg_qos']:.3f}",
                f"{router['avg_qos']:.3f}",
                f"**{text}**" if verdict_of(difference) else text,
                f"{taking['qos_per_second']:.1f}, {declining['qos_per_second']:.1f}, {router['qos_per_second']:.1f}",
                f"{100 * router['declined_rate']:.0f} %",
            ]
        )
    header = ["arrivals", "requests/s", "best rule that takes everything", "best that may decline", "jaxroute"]
    return markdown([*header, "difference", "QoS/s of the three", "declined by jaxroute"], rows)


def settings_table(study: dict[str, Any]) -> str:
    """Return the README's table."""
    rows = []
    for v in study["verdicts"]:
        difference = Interval(**v["difference"])
        text = plus_minus(difference, 4, "+")
        rows.append(
            [
                _IN_WORDS.get(v["setting"], v["setting"]),
                f"{v['rate']:.3g}",
                f"{v['avg_qos']['mean']:.3f}",
                f"`{v['best_rule']}` {v['rule_avg_qos']:.3f}",
                f"**{text}**" if verdict_of(difference) else text,
            ]
        )
    return markdown(["setting", "requests/s", "jaxroute", "best rule", "difference"], rows)


def verdicts_table(study: dict[str, Any]) -> str:
    """Return every router against the best rule."""
    rows = [
        [
            v["setting"],
            f"{v['rate']:.3g}",
            plus_minus(Interval(**v["avg_qos"]), 3),
            v["best_rule"],
            f"{v['rule_avg_qos']:.3f}",
            plus_minus(Interval(**v["difference"]), 4, "+"),
            f"{v['iqm']:.3f} [{v['least']:.3f}, {v['greatest']:.3f}]",
        ]
        for v in study["verdicts"]
    ]
    return markdown(["setting", "req/s", "avg QoS", "best rule", "its QoS", "difference", "IQM"], rows)


def ranks_table(study: dict[str, Any]) -> str:
    """Return the ranks over all settings."""
    rows = [
        [
            s["policy"],
            f"{s['mean_rank']:.2f}",
            f"{s['best_rank']:g}",
            f"{s['worst_rank']:g}",
            f"{s['avg_qos']:.3f}",
        ]
        for s in study["standings"]
    ]
    return markdown(["policy", "mean rank", "best", "worst", "mean avg QoS"], rows)


def efficiency_table(study: dict[str, Any]) -> str:
    """Return QoS per accelerator-second against that of the best rule."""
    rows = [
        [
            v["setting"],
            f"{v['rate']:.3g}",
            plus_minus(Interval(**v["efficiency"]), 3),
            v["best_rule"],
            plus_minus(Interval(**v["rule_efficiency"]), 3),
            plus_minus(Interval(**v["efficiency_difference"]), 4, "+"),
            f"{v['efficiency_gain']:+.1f} %",
        ]
        for v in study["verdicts"]
    ]
    header = ["setting", "req/s", "QoS/acc.-s", "best rule", "its QoS/acc.-s", "difference", "relative"]
    return markdown(header, rows)


TABLES: dict[str, Callable[[dict[str, Any]], str]] = {
    "overload": lambda study: overload_table(json.loads(OVERLOAD.read_text())),
    "settings": settings_table,
    "verdicts": verdicts_table,
    "ranks": ranks_table,
    "efficiency": efficiency_table,
    "pretrained": lambda study: pretrained.table(),
}

_BLOCK = re.compile(r"(<!-- table: (\S+) -->\n).*?(<!-- end of table -->)", re.DOTALL)


def pages() -> Iterator[Path]:
    """Yield the pages that may hold tables."""
    yield ROOT / "README.md"
    yield from sorted((ROOT / "docs").rglob("*.md"))


def filled(text: str, study: dict[str, Any]) -> str:
    """Return a page with its tables as they should be.

    Raises:
        UserError: a block names no table.
    """

    def fill(block: re.Match[str]) -> str:
        begin, name, end = block.groups()
        if name not in TABLES:
            raise UserError(f"<!-- table: {name} --> is unknown; choose one of {', '.join(TABLES)}")
        return begin + TABLES[name](study) + end

    return _BLOCK.sub(fill, text)


def main() -> None:
    """Fill all tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--study", type=Path, metavar="STUDY.JSON", help="publish the figures of this study first")
    options = parser.parse_args()
    if options.study is not None:
        given = json.loads(options.study.read_text())
        of_overload = given["study"] == "overload"
        found = published_overload(given) if of_overload else published(given)
        parts = (f'"{name}": [\n' + ",\n".join(map(json.dumps, rows)) + "\n]" for name, rows in found.items())
        write_file(OVERLOAD if of_overload else STUDY, "{\n" + ",\n".join(parts) + "\n}\n")
    study = json.loads(STUDY.read_text())
    for page in pages():
        before = page.read_text()
        if (after := filled(before, study)) != before:
            write_file(page, after)
            print(f"Filled: {page.relative_to(ROOT)}")


if __name__ == "__main__":
    main()
