"""Predictors of the quality and length of an LLM's answer, from the text of the prompt alone."""

from jaxroute.predictors.predictor import Predictor

__all__ = ["Predictor"]
