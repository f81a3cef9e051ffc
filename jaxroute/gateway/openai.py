"""What gateway and emulator know of OpenAI's API: errors, and how long a prompt is."""

from __future__ import annotations

import math
from typing import Any

CHARACTERS_PER_TOKEN = 4.0
"""Of English text, roughly."""

_TYPES = {
    400: "invalid_request_error",
    401: "authentication_error",
    404: "not_found_error",
    413: "invalid_request_error",
    429: "rate_limit_error",
}


def error_body(status: int, message: str, code: str, param: str | None = None) -> dict[str, Any]:
    """Return an OpenAI error object for an HTTP status."""
    kind = _TYPES.get(status, "server_error" if status >= 500 else "invalid_request_error")
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


def prompt_tokens_of(body: dict[str, Any], chat: bool, characters_per_token: float = CHARACTERS_PER_TOKEN) -> int:
    """Estimate the tokens of a request's prompt: exactly if it is a list of token ids, else from its characters."""
    content: Any = body.get("messages") if chat else body.get("prompt")
    if isinstance(content, list) and content and all(isinstance(token, int) for token in content):
        return len(content)
    return max(math.ceil(len(text_of(content)) / characters_per_token), 1)


def text_of(content: Any) -> str:
    """Return the text of a prompt or of a chat's messages, as far as it is text."""
    if isinstance(content, str):
        return content
    if isinstance(content, list):
        return "\n".join(text_of(part) for part in content)
    if isinstance(content, dict):
        return text_of(content.get("content", content.get("text", "")))
    return ""
