"""A study's files: JSON, CSV, Markdown, a figure, and one HTML page."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.figure import Figure

from jaxroute.evaluation.report.figures import (
    has_choices,
    has_overload,
    plot_expert_choice,
    plot_expert_share,
    plot_overload,
    plot_policy_comparison,
    plot_qos_against_load,
    plot_quality_latency,
    set_title,
    subtitle_of,
)
from jaxroute.evaluation.report.tables import markdown, markdown_table
from jaxroute.evaluation.report.write import (
    CSV_COLUMNS,
    base64_image,
    csv_number,
    csv_rows,
    csv_text,
    fill_template,
    flat_provenance,
    jsonable,
    load_content,
)
from jaxroute.evaluation.study.result import SettingResult, StudyResult, training_seed_name
from jaxroute.evaluation.study.tables import study_text, tables
from jaxroute.evaluation.study.verdicts import standings, verdicts
from jaxroute.files import write_file
from jaxroute.plotting import REFERENCE_COLOUR, STYLE, expert_colours, png_bytes


def write_study(study: StudyResult, directory: str | Path) -> dict[str, Path]:
    """Write study.json, study.csv, study.md, study.html and, with routers, study.png; return file name to path."""
    directory = Path(directory)
    content: dict[str, str | bytes] = {
        "study.json": json.dumps(jsonable(_json(study)), indent=2, allow_nan=False) + "\n",
        "study.csv": _csv_text(study),
        "study.md": _markdown_text(study),
        "study.html": _html(study),
    }
    if study.routers:
        content["study.png"] = png_bytes(plot_differences(study))
    return {name: write_file(directory / name, text) for name, text in content.items()}


def _json(study: StudyResult) -> dict[str, Any]:
    return {
        "study": study.name,
        "routers": study.routers,
        "rules": study.rules,
        "planners": study.planners,
        "verdicts": [verdict._asdict() for verdict in verdicts(study)],
        "standings": [standing._asdict() for standing in standings(study)],
        "settings": [
            {
                "setting": setting.setting,
                "workload": setting.result.workload,
                "site": setting.result.site,
                "bank": setting.result.bank,
                "episodes": setting.result.episodes,
                "requests": setting.result.requests,
                "warmup": setting.result.warmup,
                "experts": setting.result.expert_names,
                "loads": [load_content(setting.result, rate) for rate in setting.result.rates],
                "planners": setting.planned and [load_content(setting.planned, rate) for rate in setting.planned.rates],
            }
            for setting in study.settings
        ],
        "provenance": study.provenance,
    }


def _csv_text(study: StudyResult) -> str:
    lines = [["setting", "episodes", *CSV_COLUMNS]]
    for setting in study.settings:
        lines += [[setting.setting, "all", *row] for row in csv_rows(setting.result)]
        if setting.planned is not None:
            lines += [[setting.setting, "planners", *row] for row in csv_rows(setting.planned)]
    for v in verdicts(study):
        for index, qos in enumerate(v.training_seeds):
            name = training_seed_name(v.router, index)
            lines.append([v.setting, "all", csv_number(v.rate), name, "avg_qos", csv_number(qos), ""])
    return csv_text(lines)


def _markdown_text(study: StudyResult) -> str:
    sections = [f"# Study {study.name}", study_text(study)]
    for table in tables(study):
        sections += [f"## {table.title}", table.note, markdown(table.header, table.rows).rstrip()]
    for setting in study.settings:
        sections.append(f"## {setting.setting}: {subtitle_of(setting.result)}")
        for rate in setting.result.rates:
            sections += [f"### {rate:.3g} requests per second", markdown_table(setting.result, rate).rstrip()]
    return "\n\n".join(sections) + "\n"


def _html(study: StudyResult) -> str:
    def image(figure: Figure) -> str:
        return base64_image(png_bytes(figure))

    return fill_template(
        "study/study.html.jinja",
        study=study,
        summary=study_text(study),
        differences=image(plot_differences(study)) if study.routers else None,
        tables=tables(study),
        settings=[
            {
                "name": setting.setting,
                "subtitle": subtitle_of(setting.result),
                "images": {name: image(figure) for name, figure in _setting_figures(setting).items()},
            }
            for setting in study.settings
        ],
        provenance=flat_provenance(study.provenance),
    )


@mpl.rc_context(STYLE)
def plot_differences(study: StudyResult) -> Figure:
    """Plot every router's average QoS minus that of the best rule, with its interval and its training seeds."""
    found = verdicts(study)
    settings = list(dict.fromkeys((v.setting, v.rate) for v in found))
    figure = Figure(figsize=(8.2, 1.3 + 0.3 * len(found)), layout="constrained")
    axes = figure.subplots()
    axes.axvline(0, color="#888888", lw=1)
    colours = dict(zip(study.routers, _router_colours(len(study.routers)), strict=True))
    for number, router in enumerate(study.routers):
        of_router = [v for v in found if v.router == router]
        y = np.array([settings.index((v.setting, v.rate)) for v in of_router], np.float64)
        y += 0.7 * ((number + 0.5) / len(study.routers) - 0.5)
        mean = np.array([v.difference.mean for v in of_router])
        half = np.array([v.difference.ci95 for v in of_router])
        look: Any = {"color": colours[router], "label": router, "ms": 6, "capsize": 3}
        axes.errorbar(mean, y, xerr=half, fmt="o", **look)
        for v, height in zip(of_router, y, strict=True):
            seeds = np.array(v.training_seeds) - v.rule_avg_qos.mean
            axes.plot(seeds, np.full(len(seeds), height), "|", color=colours[router], alpha=0.6, ms=8)
    axes.set_yticks(range(len(settings)), [f"{setting}, {rate:.3g} req/s" for setting, rate in settings])
    axes.set_ylim(len(settings) - 0.4, -0.6)
    axes.grid(axis="x")
    axes.set_xlabel("Average QoS above the best rule of each setting")
    if len(study.routers) > 1:
        figure.legend(loc="outside lower center", ncols=min(len(study.routers), 6))
    set_title(axes, "Routers against the best rule", "bars: 95 % interval over episodes; ticks: training seeds")
    return figure


def _router_colours(number: int) -> list[str]:
    """Return the reference's colour and others."""
    others = [colour for colour in expert_colours(7) if colour != REFERENCE_COLOUR]
    return [REFERENCE_COLOUR, *(others * number)][:number]


def _setting_figures(setting: SettingResult) -> dict[str, Figure]:
    """Draw the figures of a single evaluation, by what they show; some need two loads, or what old settings lack."""
    plots = {
        "Average QoS against the load": plot_qos_against_load,
        "QoS per second against the load": plot_overload,
        "Average QoS, late and rejected requests": plot_policy_comparison,
        "Quality and requests in time": plot_quality_latency,
        "Share of each expert": plot_expert_share,
        "Choice of an expert against its load": plot_expert_choice,
    }
    if len(setting.result.rates) == 1:
        del plots["Average QoS against the load"]
    if not has_overload(setting.result):
        del plots["QoS per second against the load"]
    if not has_choices(setting.result):
        del plots["Choice of an expert against its load"]
    return {name: plot(setting.result) for name, plot in plots.items()}
