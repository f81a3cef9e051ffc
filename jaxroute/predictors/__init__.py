"""Predictors: what an LLM will answer to a prompt, how good and how long, from the prompt's text alone."""

from jaxroute.predictors.predictor import Predictor

__all__ = ["Predictor"]
