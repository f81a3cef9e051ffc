"""What a client asks for: its request, checked as far as the gateway has to understand it."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from jaxroute.gateway.fleet import AUTO, Fleet
from jaxroute.gateway.openai import error_body, prompt_tokens_of, text_of
from jaxroute.workloads.limits import Limits

LIMIT_HEADERS = {
    "x-jaxroute-ttft-ms": "ttft",
    "x-jaxroute-tpot-ms": "tpot",
    "x-jaxroute-e2e-ms": "e2e",
    "x-jaxroute-normalised-ms": "normalised",
    "x-slo-ttft-ms": "ttft",
    "x-slo-tpot-ms": "tpot",
}
"""The last two are llm-d's; where both are given, ours count."""


class RefusalError(Exception):
    """A request that gets an error object instead of an answer."""

    def __init__(
        self, status: int, message: str, code: str, param: str | None = None, retry_after: int | None = None
    ) -> None:
        super().__init__(message)
        self.status, self.code, self.retry_after = status, code, retry_after
        self.body = json.dumps(error_body(status, message, code, param)).encode()


@dataclass
class Demand:
    """A request as the gateway understands it."""

    body: dict[str, Any]
    """The client's JSON, of which only `model`, `stream` and `stream_options` are ever changed."""
    chat: bool
    model: str
    stream: bool
    service_class: str
    limits: Limits
    """None where there is none, s."""
    may_decline: bool
    local_only: bool
    explain: bool
    prompt_tokens: int
    """An estimate, or exact if the prompt came as token ids."""
    characters: int
    """Of the prompt's text, 0 if it came as token ids."""
    quality: list[float] | None
    """Predictions from the request's headers; likewise the next."""
    output_tokens: list[float] | None

    @property
    def wants_usage(self) -> bool:
        """Whether the client has asked for the tokens of a stream."""
        return bool((self.body.get("stream_options") or {}).get("include_usage"))

    @property
    def text(self) -> str:
        """The prompt's text."""
        return text_of(self.body.get("messages") if self.chat else self.body.get("prompt"))

    @property
    def is_routed(self) -> bool:
        """Whether the policy chooses the LLM."""
        return self.model == AUTO


def demand_of(
    body: dict[str, Any],
    headers: Mapping[str, str],
    fleet: Fleet,
    *,
    chat: bool,
    characters_per_token: float,
    num_places: int,
) -> Demand:
    """Check a request.

    Args:
        body: its JSON.
        headers: by lower-case name.
        fleet: classes, and models.
        chat: whether it has messages instead of a prompt.
        characters_per_token: to estimate the prompt's length.
        num_places: experts, and one for the cloud if there is one.

    Raises:
        RefusalError: it cannot be understood, or names a model or a class that does not exist.
    """
    key = "messages" if chat else "prompt"
    content = body.get(key)
    if not content or not isinstance(content, list if chat else list | str):
        kind = "a list of messages" if chat else "text, or a list of token ids"
        raise RefusalError(400, f"{key} is missing or of the wrong kind; give {kind}", "invalid_request", key)
    model = body.get("model", AUTO)
    known = [AUTO, *dict.fromkeys(expert.model for expert in fleet.experts)]
    if not isinstance(model, str) or model not in known:
        raise RefusalError(
            404, f"the model {model!r} does not exist; choose from {', '.join(known)}", "model_not_found", "model"
        )
    stream = body.get("stream") or False
    if not isinstance(stream, bool):
        raise RefusalError(400, f"stream is {stream!r}; give true or false", "invalid_request", "stream")
    options = body.get("stream_options")
    if not isinstance(options, dict | None):
        raise RefusalError(
            400, f"stream_options is {options!r}; give an object, or leave it out", "invalid_request", "stream_options"
        )
    name = headers.get("x-jaxroute-class", fleet.usual_class)
    service = fleet.classes.get(name)
    if service is None:
        raise RefusalError(
            400,
            f"x-jaxroute-class: there is no class {name!r}; choose from {', '.join(fleet.classes)}",
            "unknown_class",
        )
    text = text_of(content)
    return Demand(
        body=body,
        chat=chat,
        model=model,
        stream=stream,
        service_class=name,
        limits=_limits(headers) or service.limits,
        may_decline=service.decline,
        local_only=service.local_only or _flag(headers, "x-jaxroute-local-only"),
        explain=_flag(headers, "x-jaxroute-explain"),
        prompt_tokens=prompt_tokens_of(body, chat, characters_per_token),
        characters=len(text),
        quality=_predictions(headers, "x-jaxroute-quality", num_places, most=1.0),
        output_tokens=_predictions(headers, "x-jaxroute-tokens", num_places, most=math.inf),
    )


def body_of(raw: bytes) -> dict[str, Any]:
    """Return a request's JSON.

    Raises:
        RefusalError: it is none, or no object.
    """

    def refuse(name: str) -> Any:
        raise ValueError(f"{name} is no JSON")

    try:
        body = json.loads(raw, parse_constant=refuse)
    except (ValueError, RecursionError) as error:
        raise RefusalError(400, f"the body is no JSON: {str(error)[:200]}", "invalid_json") from None
    if not isinstance(body, dict):
        raise RefusalError(400, "the body is no JSON object; give model, and messages or a prompt", "invalid_json")
    return body


def _limits(headers: Mapping[str, str]) -> Limits | None:
    """Return the limits that a request's own headers state, or None if there is none."""
    given: dict[str, float] = {}
    for header, name in LIMIT_HEADERS.items():
        if header in headers and name not in given:
            limit = _number(header, headers[header]) / 1000
            if not 0 < limit < math.inf:
                raise RefusalError(400, f"{header}={headers[header]} must be above 0, in ms", "invalid_limit")
            given[name] = limit
    return Limits(**given) if given else None


def _number(header: str, text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise RefusalError(400, f"{header}={text[:100]!r} is no number", "invalid_header") from None


def _flag(headers: Mapping[str, str], header: str) -> bool:
    text = headers.get(header, "0").strip().lower()
    if text not in ("0", "1", "false", "true"):
        raise RefusalError(400, f"{header}={text[:100]!r} must be 1 or 0", "invalid_header")
    return text in ("1", "true")


def _predictions(headers: Mapping[str, str], header: str, num_places: int, *, most: float) -> list[float] | None:
    """Return a prediction for each expert, and for the cloud if there is one; one number stands for all."""
    if header not in headers:
        return None
    values = [_number(header, part) for part in headers[header].split(",")]
    if len(values) == 1:
        values *= num_places
    if len(values) != num_places:
        raise RefusalError(
            400, f"{header} has {len(values)} values; give one, or {num_places}, with commas between", "invalid_header"
        )
    low = 0 if most == 1 else 1e-9
    if not all(low <= value <= most and value < math.inf for value in values):
        wanted = "lie from 0 to 1" if most == 1 else "be above 0, and finite"
        raise RefusalError(400, f"{header}={headers[header][:100]!r}: predictions must {wanted}", "invalid_header")
    return values
