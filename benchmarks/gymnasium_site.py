"""The site as a Gymnasium environment in plain Python and NumPy, for comparison: needs the `benchmark` extra."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import gymnasium
import numpy as np
from jaxtyping import Float

from jaxroute.env import EnvParams
from jaxroute.serving.reference import Expert, Request

_EXPERT_FEATURES, _ARRIVAL_FEATURES = 7, 2


class _Routed(NamedTuple):
    """A request in flight, and what it will earn."""

    request: Request
    quality: float
    requirement: float


class GymnasiumSite(gymnasium.Env):
    """Routes Poisson arrivals among the experts of `params.site`, one request per step, without end.

    Dynamics are those of the token-by-token reference simulator. The observation is a flat vector: load and predictions
    of every expert, then the arriving request. The reward is jaxroute's without shaping and the accelerators' price.
    """

    def __init__(self, params: EnvParams, seed: int) -> None:
        self.site = {name: np.asarray(values) for name, values in params.site._asdict().items()}
        self.num_experts = params.site.num_experts
        self.bank = params.bank._replace(**{name: np.asarray(column) for name, column in params.bank._asdict().items()})
        self.rate = float(params.rate[0])
        self.requirements, self.shares = np.asarray(params.limits.normalised), np.asarray(params.share, np.float64)
        self.shares /= self.shares.sum()
        self.generator = np.random.default_rng(seed)
        self.action_space = gymnasium.spaces.Discrete(self.num_experts)
        size = self.num_experts * _EXPERT_FEATURES + _ARRIVAL_FEATURES
        self.observation_space = gymnasium.spaces.Box(-np.inf, np.inf, (size,), np.float32)

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Float[np.ndarray, "feature"], dict[str, Any]]:
        """Start with an idle site and its first request."""
        super().reset(seed=seed)
        self.now, self.count = 0.0, 0
        self.experts = [
            Expert(index=index, **{name: values[index].item() for name, values in self.site.items()})
            for index in range(self.num_experts)
        ]
        self.in_flight: list[list[_Routed]] = [[] for _ in self.experts]
        self._draw_request()
        return self._observe(), {}

    def step(self, action: int) -> tuple[Float[np.ndarray, "feature"], float, bool, bool, dict[str, Any]]:
        """Route the request to expert `action`, and let time pass until the next one arrives."""
        bank, expert = self.bank, self.experts[action]
        request = Request(
            index=self.count,
            arrival=self.now,
            ready=self.now + expert.network_delay,
            prompt=int(bank.prompt_tokens[self.row]),
            output=int(bank.output_tokens[self.row, action]),
        )
        reward = 0.0
        if expert.arrive(request):
            quality = float(bank.predicted_quality[self.row, action])
            self.in_flight[action].append(_Routed(request, quality, self.requirement))
        self.now += self.generator.exponential(1 / self.rate)
        for expert, in_flight in zip(self.experts, self.in_flight, strict=True):
            expert.advance(self.now)
            expert.log.clear()
            for routed in in_flight:
                request = routed.request
                if math.isfinite(request.finish):
                    latency = request.finish + expert.network_delay - request.arrival
                    reward += routed.quality if latency / request.output <= routed.requirement else 0.0
            in_flight[:] = [routed for routed in in_flight if not math.isfinite(routed.request.finish)]
        self.count += 1
        self._draw_request()
        return self._observe(), reward, False, False, {}

    def _draw_request(self) -> None:
        self.row = self.generator.integers(len(self.bank.prompt_tokens))
        self.requirement = float(self.generator.choice(self.requirements, p=self.shares))

    def _observe(self) -> Float[np.ndarray, "feature"]:
        bank = self.bank
        features = []
        for index, expert in enumerate(self.experts):
            features += [
                len(expert.running) / expert.max_num_seqs,
                len(expert.waiting) / expert.max_waiting,
                sum(request.computed for request in expert.running) / expert.kv_capacity,
                sum(max(request.prompt - request.computed, 0) for request in expert.waiting) / expert.kv_capacity,
                expert.weight_load / 0.03,
                bank.predicted_quality[self.row, index],
                math.log1p(bank.predicted_output_tokens[self.row, index]) / 8,
            ]
        features += [math.log1p(bank.prompt_tokens[self.row]) / 8, math.log(self.requirement / 0.03)]
        return np.asarray(features, np.float32)
