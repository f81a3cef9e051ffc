"""The files of an evaluation: JSON, CSV, figures and one HTML page."""

from __future__ import annotations

import base64
import csv
import io
import json
import math
from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np

from jaxroute.evaluation.metrics import LOADS, METRICS
from jaxroute.evaluation.report.tables import DETAIL_COLUMNS, columns_of, summary_text, table_rows
from jaxroute.evaluation.result import EvaluationResult, means
from jaxroute.evaluation.statistics import Interval
from jaxroute.files import write_file

# --- JSON and CSV --------------------------------------------------------------------------------------


def jsonable(value: Any) -> Any:
    """Turn a value into what strict JSON can hold: nan and infinities become null, the unknown a string."""
    if isinstance(value, Interval):
        return {"mean": jsonable(value.mean), "ci95": jsonable(value.ci95)}
    if isinstance(value, Mapping):
        return {str(key): jsonable(item) for key, item in value.items()}
    if isinstance(value, np.ndarray | np.generic):
        return jsonable(value.tolist())
    if isinstance(value, list | tuple):
        return [jsonable(item) for item in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return value if value is None or isinstance(value, bool | int | str) else str(value)


def load_content(result: EvaluationResult, rate: float) -> dict[str, Any]:
    """Everything measured at one load, as in results.json."""
    policies = {
        policy: {
            metric: means(value) if isinstance(value, list) else value
            for metric, value in result.intervals[rate][policy].items()
        }
        for policy in result.ranking(rate)
    }
    return {
        "rate": rate,
        "policies": policies,
        "paired_difference": result.paired_with_reference(rate),
    }


def write_results_json(result: EvaluationResult, path: str | Path) -> Path:
    """Write all intervals as strict JSON: the nominal load at the top, every load under "loads".

    Policies are in the order of their average QoS. A scalar metric is {"mean", "ci95"}, a metric per
    expert is a list of means in the order of "experts" (lists, where it is per load too), and what is
    undefined is null.
    "paired_difference" is the reference's average QoS minus that of each other policy.
    """
    content = {
        "workload": result.workload,
        "site": result.site,
        "bank": result.bank,
        "episodes": result.episodes,
        "requests": result.requests,
        "warmup": result.warmup,
        "reference": result.reference,
        "upper_references": list(result.upper_references),
        "experts": list(result.expert_names),
        **load_content(result, result.nominal_rate),
        "loads": [load_content(result, rate) for rate in result.rates],
        "provenance": result.provenance,
    }
    return write_file(path, json.dumps(jsonable(content), indent=2, allow_nan=False) + "\n")


def write_results_csv(result: EvaluationResult, path: str | Path) -> Path:
    """Write one line per number: workload, rate, policy, metric, mean, ci95; undefined is empty.

    Metrics per expert are called `metric[expert]`, those per load too `metric[expert][load]`, with the
    load that `LOADS` gives; `paired_difference` is the reference's average QoS minus that of the policy.
    """
    rows = [[result.workload, *row] for row in csv_rows(result)]
    return write_file(path, csv_text([["workload", *CSV_COLUMNS], *rows]))


CSV_COLUMNS = ["rate", "policy", "metric", "mean", "ci95"]


def csv_text(rows: Sequence[Sequence[str]]) -> str:
    """Write rows as CSV."""
    buffer = io.StringIO()
    csv.writer(buffer, lineterminator="\n").writerows(rows)
    return buffer.getvalue()


def csv_number(value: float) -> str:
    """Write a number for CSV; what is undefined is empty."""
    return "" if math.isnan(value) else f"{value:.9g}"


def csv_rows(result: EvaluationResult) -> list[list[str]]:
    """Write every number of an evaluation as a line of `CSV_COLUMNS`."""
    lines = []
    for rate in result.rates:
        differences = result.paired_with_reference(rate)
        for policy in result.ranking(rate):
            rows: dict[str, Interval] = {}
            for metric, value in result.intervals[rate][policy].items():
                if not isinstance(value, list):
                    rows[metric] = value
                    continue
                for expert, of_expert in zip(result.expert_names, value, strict=True):
                    name = f"{metric}[{expert}]"
                    if isinstance(of_expert, list):
                        rows |= {f"{name}[{load}]": at for load, at in zip(LOADS, of_expert, strict=True)}
                    else:
                        rows[name] = of_expert
            if policy in differences:
                rows["paired_difference"] = differences[policy]
            for metric, interval in rows.items():
                lines.append([csv_number(rate), policy, metric, csv_number(interval.mean), csv_number(interval.ci95)])
    return lines


# --- HTML ----------------------------------------------------------------------------------------------


def flat_provenance(provenance: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """Flatten nested provenance to dotted names."""
    flat: dict[str, str] = {}
    for key, value in provenance.items():
        if isinstance(value, Mapping):
            flat |= flat_provenance(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = str(value)
    return flat


def _definitions() -> list[dict[str, str]]:
    """List the metrics, the mean and the percentiles of one latency on one line."""
    definitions: dict[str, dict[str, str]] = {}
    for metric in METRICS.values():
        label = metric.label.split(",")[0]
        definitions[label] = {"label": label, "unit": metric.unit, "text": metric.definition}
    return list(definitions.values())


def fill_template(template: str, **content: Any) -> str:
    """Fill in a template, named by its path below jaxroute/evaluation."""
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.FunctionLoader(
            lambda name: resources.files("jaxroute.evaluation").joinpath(name).read_text("utf-8")
        ),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template(template).render(content) + "\n"


def base64_image(png: bytes) -> str:
    """Encode an image to stand inside a page."""
    return base64.b64encode(png).decode()


def _html(result: EvaluationResult, pngs: Mapping[str, bytes]) -> str:
    columns = [*columns_of(result), *DETAIL_COLUMNS]
    order = [result.nominal_rate, *(rate for rate in result.rates if rate != result.nominal_rate)]
    return fill_template(
        "report/report.html.jinja",
        result=result,
        summary=summary_text(result).replace(" ± ", "\N{NO-BREAK SPACE}±\N{NO-BREAK SPACE}"),
        metrics=METRICS,
        columns=columns,
        loads=[{"rate": f"{rate:g}", "rows": table_rows(result, rate, columns)} for rate in order],
        images={name: base64_image(png) for name, png in pngs.items()},
        definitions=_definitions(),
        provenance=flat_provenance(result.provenance),
    )


def write_html_report(result: EvaluationResult, path: str | Path) -> Path:
    """Write one self-contained page: summary, plots, a table per load, definitions and provenance."""
    return write_file(path, _html(result, _plots(result)))


def _plots(result: EvaluationResult) -> dict[str, bytes]:
    """Draw every figure; returns its name and its PNG."""
    # Imported here: matplotlib takes long to load, and judging comes first.
    from jaxroute.evaluation.report.figures import PLOTS
    from jaxroute.plotting import png_bytes

    return {name: png_bytes(plot(result)) for name, plot in PLOTS.items()}


def write_all(result: EvaluationResult, directory: str | Path) -> dict[str, Path]:
    """Write results.json, results.csv, five plots and report.html; return file name to path."""
    directory = Path(directory)
    pngs = _plots(result)
    paths = [
        write_results_json(result, directory / "results.json"),
        write_results_csv(result, directory / "results.csv"),
        *(write_file(directory / f"{name}.png", png) for name, png in pngs.items()),
        write_file(directory / "report.html", _html(result, pngs)),
    ]
    return {path.name: path for path in paths}
