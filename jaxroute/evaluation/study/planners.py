"""The planners of a study by name."""

from __future__ import annotations

from jaxroute.config.schema import StudyConfig
from jaxroute.env import EdgeRouting
from jaxroute.policies import Policy
from jaxroute.policies.planning import clairvoyant, lookahead

LOOKAHEAD, CLAIRVOYANT = "lookahead", "clairvoyant"
PLANNERS = (LOOKAHEAD, CLAIRVOYANT)


def planners_named(study: StudyConfig, env: EdgeRouting) -> list[Policy]:
    """Return the study's planners, which simulate the future in `env`."""
    horizon = study.planner_horizon
    known = {
        LOOKAHEAD: lookahead(env, futures=study.planner_futures, horizon=horizon),
        CLAIRVOYANT: clairvoyant(env, horizon=horizon),
    }
    return [known[name] for name in study.planners]
