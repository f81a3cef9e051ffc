"""A twin's findings in plain words, as JSON, and as one page."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np

from jaxroute.evaluation.report.write import fill_template, jsonable
from jaxroute.evaluation.statistics import Interval
from jaxroute.evaluation.twin.judge import BETTER, REFUSED, WORSE, Compared, Judged, Twin
from jaxroute.evaluation.twin.recorded import Recorded
from jaxroute.files import write_file
from jaxroute.fitting import COEFFICIENTS


def verdict_lines(twin: Twin) -> list[str]:
    """Say in plain words what the policies would have earned, how far the twin errs, and what it cannot say."""
    lines = [f"{trouble}." for trouble in twin.recorded.troubles]
    done = twin.recorded.policy or "what was done"
    measured = float(twin.recorded.measured_qos.mean())
    lines.append(
        f"{done} earned {measured:.3f} of QoS per request, {twin.recorded.measured_in_time.mean():.0%} in time."
    )
    if math.isfinite(twin.check.error):
        lines.append(
            f"On the part of the log that it was not fitted to, the twin errs by {twin.check.error:.3f} of QoS."
        )
    if twin.recorded.refusals:
        lines.append("There is no verdict on other policies.")
    for judged in twin.policies:
        lines.append(_sentence(judged, done))
    lines += [drift_line(twin.recorded, drift) for drift in twin.drifts]
    return lines + [
        f"About {stream.rate:.2g} requests/s of others at {twin.recorded.servers[stream.server]} would explain it."
        for stream in twin.others
    ]


def _sentence(judged: Judged, done: str) -> str:
    gain = _interval(judged.gain)
    if judged.status == REFUSED:
        return f"{judged.name}: no verdict, as {'; '.join(judged.reasons)}."
    if judged.status not in (BETTER, WORSE):
        return f"{judged.name} would have earned {gain}: no difference to {done} is shown."
    more = f"{judged.violations.mean:+.1%} late or turned away"
    return f"{judged.name} would have earned {gain} ({more}): {judged.status} than {done}."


def drift_line(recorded: Recorded, drift: Any) -> str:
    """Say that a server has changed."""
    name = recorded.servers[drift.server]
    since, answers = time_of(recorded, drift.since), f"found within {drift.found_within} of its answers"
    if drift.kind == "queue":
        return (
            f"first tokens of {name} have come {drift.pace:.1f} times as late as the gateway's own requests explain "
            f"since {since}, {answers}: do others use it?"
        )
    change = f"{abs(drift.pace - 1):.0%} {'slower' if drift.pace > 1 else 'faster'}"
    return f"{name} has been {change} since {since}, {answers}: calibrate it and train again."


def time_of(recorded: Recorded, request: int) -> str:
    """Say when a request arrived: a date if the log's clock has one."""
    at = recorded.begin + recorded.wall[request]
    if at > 1e9:
        return datetime.fromtimestamp(at, UTC).strftime("%Y-%m-%d %H:%M:%S UTC")
    return f"{recorded.wall[request]:.0f} s"


def undetermined_lines(twin: Twin) -> list[str]:
    """Say which coefficients of which servers the log does not determine."""
    why_not = twin.servers.why_not
    lines = [f"{name}: not fitted, {why}; the fleet file's coefficients stand" for name, why in why_not.items()]
    for name, fit in zip(twin.recorded.servers, twin.servers.fits, strict=True):
        if fit is not None:
            lines += [f"{name}: {what}, {why}" for what, why in fit.undetermined().items()]
            lines += [f"{name}: {what}" for what in fit.trade_offs()]
    return lines


# --- Tables -------------------------------------------------------------------------------------------------

CHECK_HEADER = ("", "requests", "QoS", "in time", "TTFT, s", "TPOT, ms", "E2E, s")


def check_rows(parts: Sequence[Compared]) -> list[tuple[str, ...]]:
    """Return a row of text per part: measured, and what was predicted."""
    return [
        (
            part.name,
            str(part.requests),
            *(_pair(pair, unit) for pair, unit in zip(part[2:], (1, 1, 1, 1e3, 1), strict=True)),
        )
        for part in parts
    ]


def _pair(pair: Any, unit: float) -> str:
    if not math.isfinite(pair.measured):
        return ""
    return f"{unit * pair.measured:.3g} \N{RIGHTWARDS ARROW} {unit * pair.predicted:.3g}"


POLICY_HEADER = (
    "policy",
    "QoS",
    "gain",
    "late or turned away",
    "accelerator time, s",
    "in the log's places",
    "verdict",
)


def policy_rows(twin: Twin) -> list[tuple[str, ...]]:
    """Return a row of text per policy."""
    return [
        (
            judged.name,
            f"{judged.qos:.3f}",
            _interval(judged.gain),
            _interval(judged.violations),
            _interval(judged.busy),
            "" if judged.agreement is None else f"{judged.agreement:.1%}",
            judged.status,
        )
        for judged in twin.policies
    ]


def _interval(interval: Interval) -> str:
    return f"{interval.mean:+.3f} \N{PLUS-MINUS SIGN} {interval.ci95:.3f}"


FIT_HEADER = ("server", *COEFFICIENTS[:-1], "network_delay")


def fit_rows(twin: Twin) -> list[tuple[str, ...]]:
    """Return a row of text per server: its coefficients, and how uncertain each is."""
    rows = []
    for server, name in enumerate(twin.recorded.servers):
        cells = []
        for column in FIT_HEADER[1:]:
            draws = np.asarray(getattr(twin.servers.site, column))[:, server]
            spread = np.log(np.maximum(draws[1:], 1e-12)).std() if len(draws) > 2 else 0.0
            cells.append(f"{draws[0]:.3g} \N{PLUS-MINUS SIGN} {spread:.0%}")
        rows.append((name, *cells))
    return rows


def pace_rows(twin: Twin) -> list[tuple[str, ...]]:
    """Return a row per server that has changed: how many times as long it took, block by block."""
    changed = sorted({drift.server for drift in twin.drifts})
    return [
        (twin.recorded.servers[server], " ".join(f"{pace:.2f}" for pace in twin.pace[:, server])) for server in changed
    ]


# --- Files --------------------------------------------------------------------------------------------------


def content(twin: Twin) -> dict[str, Any]:
    """Return everything as JSON has it."""
    recorded = twin.recorded

    def compared(part: Compared) -> dict[str, Any]:
        pairs = {name: dict(value._asdict()) for name, value in part._asdict().items() if hasattr(value, "measured")}
        return {"name": part.name, "requests": part.requests, **pairs}

    def checked(check: Any) -> dict[str, Any]:
        return {
            "error": check.error,
            "whole": compared(check.whole),
            "servers": [compared(part) for part in check.servers],
            "blocks": [compared(part) for part in check.blocks],
        }

    def judged(one: Judged) -> dict[str, Any]:
        return {**one._asdict(), "shares": dict(zip(recorded.servers, one.shares, strict=True))}

    return {
        "requests": len(recorded.arrival),
        "fitted_to": int(twin.fitted.sum()),
        "policy": recorded.policy,
        "measured": {"qos": recorded.measured_qos.mean(), "in_time": recorded.measured_in_time.mean()},
        "troubles": list(recorded.troubles),
        "refusals": list(recorded.refusals),
        "check": checked(twin.plain),
        "check_with_remedies": None if twin.remedied is None else checked(twin.remedied),
        "servers": {
            name: {
                "coefficients": {
                    column: np.asarray(getattr(twin.servers.site, column))[:, server] for column in FIT_HEADER[1:]
                },
                "fitted": fit is not None,
            }
            for server, (name, fit) in enumerate(zip(recorded.servers, twin.servers.fits, strict=True))
        },
        "undetermined": undetermined_lines(twin),
        "drifts": [
            {
                **drift._asdict(),
                "server": recorded.servers[drift.server],
                "time": recorded.begin + recorded.wall[drift.since],
            }
            for drift in twin.drifts
        ],
        "others": [{**stream._asdict(), "server": recorded.servers[stream.server]} for stream in twin.others],
        "pace": {name: twin.pace[:, server] for server, name in enumerate(recorded.servers)},
        "policies": [judged(one) for one in twin.policies],
        "verdict": verdict_lines(twin),
    }


def write_twin(
    twin: Twin, folder: Path, provenance: Mapping[str, str], commands: Sequence[str] = ()
) -> dict[str, Path]:
    """Write twin.json and twin.html; return file name to path.

    Args:
        twin: what was found.
        folder: where; it is made if need be.
        provenance: what ran.
        commands: to calibrate and train again, if a server has changed.
    """
    everything = {**content(twin), "commands": list(commands), "provenance": dict(provenance)}
    page = fill_template(
        "twin/twin.html.jinja",
        lines=verdict_lines(twin),
        requests=len(twin.recorded.arrival),
        fitted=int(twin.fitted.sum()),
        policies=(POLICY_HEADER, policy_rows(twin)),
        reasons=[(one.name, one.reasons) for one in twin.policies if one.reasons],
        checks=[
            (
                title,
                [(CHECK_HEADER, check_rows([check.whole, *check.servers])), (CHECK_HEADER, check_rows(check.blocks))],
            )
            for title, check in (
                ("The twin's error" + (", without remedies" if twin.remedied else ""), twin.plain),
                ("The twin's error, with the pace of each part of the log", twin.remedied),
            )
            if check is not None
        ],
        fits=(FIT_HEADER, fit_rows(twin)),
        undetermined=undetermined_lines(twin),
        paces=pace_rows(twin),
        commands=commands,
        provenance=provenance,
    )
    return {
        "twin.json": write_file(
            folder / "twin.json", json.dumps(jsonable(everything), indent=2, allow_nan=False) + "\n"
        ),
        "twin.html": write_file(folder / "twin.html", page),
    }
