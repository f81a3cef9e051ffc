"""The gateway's figures for Prometheus; docs/gateway.md says what to alert on."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    disable_created_metrics,
    generate_latest,
)

_SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 25, 60)
_PER_TOKEN = (0.005, 0.01, 0.02, 0.03, 0.05, 0.08, 0.12, 0.2, 0.5, 1)
_DECISIONS = (0.0002, 0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05)


class Metrics:
    """Counters, gauges and histograms of one gateway."""

    def __init__(self) -> None:
        """Start at nothing."""
        disable_created_metrics()  # a series more for each, which nobody reads
        self.registry = registry = CollectorRegistry()

        def counter(name: str, meaning: str, labels: Sequence[str] = ()) -> Counter:
            return Counter(f"jaxroute_{name}", meaning, labels, registry=registry)

        def gauge(name: str, meaning: str, labels: Sequence[str] = ()) -> Gauge:
            return Gauge(f"jaxroute_{name}", meaning, labels, registry=registry)

        def histogram(name: str, meaning: str, buckets: Sequence[float], labels: Sequence[str] = ()) -> Histogram:
            return Histogram(f"jaxroute_{name}", meaning, labels, buckets=buckets, registry=registry)

        self.requests = counter("requests", "Requests that ended.", ["expert", "service_class", "outcome"])
        self.refused = counter("refused", "Requests refused before they were understood or admitted.", ["code"])
        self.qos = counter("qos", "Sum of QoS: predicted quality of answers in time.", ["service_class"])
        self.judged = counter("judged", "Requests of which it is known whether they were in time.", ["service_class"])
        self.violations = counter("violations", "Completed requests that missed a limit.", ["service_class"])
        self.spent = counter("spent", "What the cloud has cost, in QoS.")
        self.retries = counter("retries", "Tries that failed before the answer began.", ["expert"])
        self.fallbacks = counter("fallbacks", "Decisions of the fallback.", ["reason"])
        self.prompt_tokens = counter("prompt_tokens", "Prompt tokens of completed requests.", ["expert"])
        self.output_tokens = counter("output_tokens", "Output tokens of completed requests.", ["expert"])
        self.log_lost = gauge("log_lines_lost", "Decisions that could not be logged.")
        self.reloads = counter("reloads", "Reloads of the fleet file.", ["result"])
        self.in_flight = gauge("in_flight", "Requests in flight.")
        self.up = gauge("expert_up", "1 if the expert serves.", ["expert"])
        self.running = gauge("expert_running", "Requests believed to be in its batch.", ["expert"])
        self.waiting = gauge("expert_waiting", "Requests believed to be in its queue.", ["expert"])
        self.foreign = gauge("expert_foreign", "Requests there that came past the gateway, by its metrics.", ["expert"])
        self.decision = histogram("decision_seconds", "Time of a decision.", _DECISIONS)
        self.ttft = histogram("ttft_seconds", "Time to first token.", _SECONDS, ["expert"])
        self.e2e = histogram("e2e_seconds", "Time to the last token.", _SECONDS, ["expert"])
        self.tpot = histogram("tpot_seconds", "Time per further token.", _PER_TOKEN, ["expert"])

    def ended(self, record: dict[str, Any]) -> None:
        """Count a request by its record."""
        expert, service = record["expert"] or "none", record["class"]
        self.requests.labels(expert, service, record["outcome"]).inc()
        if record["qos"] is not None:
            self.qos.labels(service).inc(record["qos"])
            self.judged.labels(service).inc()
        if record["outcome"] == "completed":
            if record["in_time"] is False:
                self.violations.labels(service).inc()
            self.prompt_tokens.labels(expert).inc(record["prompt_tokens"])
            self.output_tokens.labels(expert).inc(record["output_tokens"] or 0)
            for name, histogram in (("ttft", self.ttft), ("e2e", self.e2e), ("tpot", self.tpot)):
                if record[name] is not None:
                    histogram.labels(expert).observe(record[name])
        if record["spent"]:
            self.spent.inc(record["spent"])

    def text(self) -> bytes:
        """Return the page."""
        return generate_latest(self.registry)
