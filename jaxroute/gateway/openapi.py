"""The gateway's OpenAPI page: its paths, what they take, and how they answer."""

from __future__ import annotations

from typing import Any

from jaxroute import __version__
from jaxroute.gateway.demand import LIMIT_HEADERS
from jaxroute.gateway.fleet import AUTO, Fleet

_ANY = {"description": "Passed on to the server as it is."}
_FLAG = {"type": "string", "enum": ["0", "1", "false", "true"]}
_QUALITY, _TOKENS = r"(0(\.[0-9]{1,6})?|1)", r"[1-9][0-9]{0,6}(\.[0-9]{1,6})?"

_ERROR = {
    "type": "object",
    "required": ["error"],
    "properties": {
        "error": {
            "type": "object",
            "required": ["message", "type", "param", "code"],
            "properties": {
                "message": {"type": "string"},
                "type": {"type": "string"},
                "param": {"type": ["string", "null"]},
                "code": {"type": "string"},
            },
        }
    },
}
_ERRORS = {
    "400": "It cannot be understood, or the server refuses it.",
    "401": "The API key is missing or wrong.",
    "404": "There is no such model.",
    "408": "The body came too slowly.",
    "413": "The body is too large.",
    "422": "The server refuses it.",
    "429": "Declined, or the servers are full, or too many requests are in flight; see Retry-After.",
    "502": "The servers failed.",
    "503": "No server is up, or the gateway is about to stop.",
    "504": "The servers did not answer in time.",
}
_REQUEST: dict[str, Any] = {
    "stream": {"type": ["boolean", "null"]},
    "stream_options": {"type": ["object", "null"], "properties": {"include_usage": _ANY}},
    "max_tokens": _ANY,
}
_CHAT = {"messages": {"type": "array", "minItems": 1, "items": {}}}
_TEXT = {"prompt": {"anyOf": [{"type": "string", "minLength": 1}, {"type": "array", "minItems": 1, "items": {}}]}}


def page(fleet: Fleet) -> dict[str, Any]:
    """Return the page, which names the LLMs and classes of service of a fleet."""
    record = {"type": "object", "description": "As in the decision log."}
    id_of = {"name": "request_id", "in": "path", "required": True, "schema": {"type": "string", "minLength": 1}}
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "jaxroute gateway",
            "version": __version__,
            "description": "OpenAI's API in front of several servers.",
        },
        "paths": {
            "/v1/chat/completions": {"post": _completions("Chat", _CHAT, fleet)},
            "/v1/completions": {"post": _completions("Completion", _TEXT, fleet)},
            "/v1/models": {"get": _get("`auto` and every LLM.", {"type": "object", "required": ["object", "data"]})},
            "/health": {
                "get": _get("Whether any server is up.", {"type": "object", "required": ["status"]}, ("503",))
                | {"security": []}
            },
            "/metrics": {"get": _get("For Prometheus.", {"type": "string"}, kind="text/plain")},
            "/decisions/{request_id}": {
                "get": _get("A decision, and in words why it was taken.", record, ("404",)) | {"parameters": [id_of]}
            },
            "/events": {"get": _get("What the live page shows.", {"type": "string"}, kind="text/event-stream")},
            "/openapi.json": {"get": _get("This page.", {"type": "object"})},
            "/": {"get": _get("The live page.", {"type": "string"}, kind="text/html")},
        },
        "components": {
            "schemas": {"Error": _ERROR},
            "securitySchemes": {
                "key": {"type": "http", "scheme": "bearer", "description": "If the fleet file lists keys."}
            },
        },
        "security": [{}, {"key": []}],
    }


def _completions(what: str, content: dict[str, Any], fleet: Fleet) -> dict[str, Any]:
    models = [AUTO, *dict.fromkeys(expert.model for expert in fleet.experts)]
    model = {"enum": models, "default": AUTO, "description": f"`{AUTO}` leaves the choice to the policy."}
    schema = {
        "type": "object",
        "properties": {"model": model, **content, **_REQUEST},
        "required": list(content),
        "additionalProperties": True,
    }
    own = {
        "x-jaxroute-class": {"enum": list(fleet.classes), "default": fleet.usual_class},
        **{name: {"type": "number", "minimum": 0.001} for name in LIMIT_HEADERS},
        "x-jaxroute-quality": _numbers(_QUALITY, fleet),
        "x-jaxroute-tokens": _numbers(_TOKENS, fleet),
        "x-jaxroute-local-only": _FLAG,
        "x-jaxroute-explain": _FLAG,
    }
    told = ("x-jaxroute-request-id", "x-jaxroute-expert", "x-jaxroute-policy", "x-jaxroute-decision-ms")
    answer = {
        "description": "The answer: in one piece, or as events that end with [DONE].",
        "headers": {name: {"schema": {"type": "string"}} for name in told},
        "content": {"application/json": {"schema": {"type": "object"}}, "text/event-stream": {"schema": {}}},
    }
    return {
        "summary": f"{what}, routed by the policy if its model is `auto`.",
        "parameters": [{"name": name, "in": "header", "schema": of} for name, of in own.items()],
        "requestBody": {"required": True, "content": {"application/json": {"schema": schema}}},
        "responses": {"200": answer, **{status: _error(status) for status in _ERRORS}},
    }


def _numbers(number: str, fleet: Fleet) -> dict[str, Any]:
    """Return the schema of a prediction: a number, or one for each expert and one for the cloud if there is one."""
    others = len(fleet.experts) - 1 + (fleet.cloud is not None)
    return {"type": "string", "pattern": f"^{number}((,{number}){{{others}}})?$"}


def _get(
    summary: str, schema: dict[str, Any], errors: tuple[str, ...] = (), kind: str = "application/json"
) -> dict[str, Any]:
    answer = {"description": summary, "content": {kind: {"schema": schema}}}
    refused = {status: _error(status) for status in ("401", *errors)}
    if "503" in errors:  # the health page's own
        refused["503"] = {**answer, "description": "No server is up."}
    return {"summary": summary, "responses": {"200": answer, **refused}}


def _error(status: str) -> dict[str, Any]:
    reference = {"$ref": "#/components/schemas/Error"}
    return {"description": _ERRORS[status], "content": {"application/json": {"schema": reference}}}
