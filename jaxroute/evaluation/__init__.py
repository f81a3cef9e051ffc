"""Paired evaluation of policies: episodes, metrics, statistics, tables and figures."""

from jaxroute.evaluation.episodes import evaluate_policies
from jaxroute.evaluation.judge import evaluate
from jaxroute.evaluation.metrics import EpisodeRecords, summarise
from jaxroute.evaluation.report import write_all
from jaxroute.evaluation.result import EvaluationResult
from jaxroute.evaluation.tables import results_table, summary_text

__all__ = [
    "EpisodeRecords",
    "EvaluationResult",
    "evaluate",
    "evaluate_policies",
    "results_table",
    "summarise",
    "summary_text",
    "write_all",
]
