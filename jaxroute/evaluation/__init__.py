"""Paired evaluation of policies: episodes, metrics, statistics, tables and figures."""

from jaxroute.evaluation.episodes import evaluate_policies
from jaxroute.evaluation.judge import evaluate
from jaxroute.evaluation.metrics import EpisodeRecords, summarise
from jaxroute.evaluation.report.tables import results_table, summary_text
from jaxroute.evaluation.report.write import write_all
from jaxroute.evaluation.result import EvaluationResult

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
