"""Decisions in words: what was chosen, what it was compared with, and what came of it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

_CLOSE = 0.005  # in QoS or quality; less is not worth a word


def why(record: dict[str, Any], names: Sequence[str]) -> str:
    """Return in a few sentences why a request went where it did.

    Args:
        record: a decision's, as in the log.
        names: of the experts.
    """
    expected, choice = record.get("expected"), record.get("choice")
    by = f"the fallback {record['fallback']} ({record['guard']})" if record.get("guard") else record.get("policy")
    if choice is None:
        return "No decision was taken: " + (record.get("error") or "the request ended before.")
    if expected is None:
        return f"{by} chose {_place(choice, names)}. What it expected was not recorded."
    if record.get("named"):
        return f"The client named {_place(choice, names)}. {_outlook(expected, choice)}."
    sentences = []
    if choice < 0:
        best = max(range(len(names)), key=lambda e: expected["qos"][e] - expected["qos_loss"][e])
        net = expected["qos"][best] - expected["qos_loss"][best]
        gain = (
            f"{names[best]} offered most: quality {_share(expected['quality'][best])}, in time with "
            f"{_percent(expected['in_time'][best])}, and others would have lost {_share(expected['qos_loss'][best])}, "
            f"{_share(net)} in all"
        )
        did = "declined it" if choice == -1 else "sent it to the cloud"
        sentences.append(f"{by} {did}: {gain}.")
        if choice == -2 and record.get("cloud"):
            cloud = record["cloud"]
            sentences.append(f"The cloud offered {_share(cloud['qos'])} at a cost of {_share(cloud['cost'])}.")
        return " ".join(sentences)
    sentences.append(f"{by} chose {names[choice]}: {_outlook(expected, choice)}.")
    for other in sorted(range(len(names)), key=lambda e: -expected["quality"][e]):
        better = expected["quality"][other] - expected["quality"][choice]
        if other == choice or better < _CLOSE:
            continue
        sentences.append(f"{names[other]} was better by {_share(better)} but {_objection(expected, other, choice)}.")
        if len(sentences) == 3:
            break
    return " ".join(sentences)


def _place(choice: int, names: Sequence[str]) -> str:
    return names[choice] if choice >= 0 else {-1: "to decline it", -2: "the cloud"}[choice]


def _outlook(expected: dict[str, list[float]], e: int) -> str:
    loses = expected["qos_loss"][e]
    others = f", and others lose {_share(loses)}" if loses >= _CLOSE else ""
    return f"quality {_share(expected['quality'][e])}, in time with {_percent(expected['in_time'][e])}{others}"


def _objection(expected: dict[str, list[float]], other: int, choice: int) -> str:
    """Say what speaks against another expert: what costs it most."""
    if not expected["eligible"][other]:
        return "was down or full"
    late = (1 - expected["in_time"][other]) * expected["quality"][other]
    lost = expected["qos_loss"][other]
    if late >= lost and late >= _CLOSE:
        return f"would have been late with {_percent(1 - expected['in_time'][other])}"
    if lost >= _CLOSE:
        return f"others would have lost {_share(lost)} there"
    return "the policy kept it free"


def _share(value: float) -> str:
    """Return a number between -1 and 1 as .08."""
    text = f"{abs(value):.2f}"
    sign = "-" if value < 0 and float(text) else ""
    return sign + (text[1:] if text.startswith("0") else text)


def _percent(value: float) -> str:
    return f"{100 * value:.0f} %"
