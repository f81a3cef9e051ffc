"""A server's answer on its way to the client: events pass byte for byte, and their tokens are counted.

Tokens are counted from what the server says (`usage`), or from log probabilities, never from chunks: a loaded server
puts several tokens into one.
"""

from __future__ import annotations

import json
import re
from typing import Any

_BOUNDARY = re.compile(rb"\r\n\r\n|\n\n|\r\r")
_USAGE = re.compile(rb'"usage"\s*:\s*\{')
_FINISH = re.compile(rb'"finish_reason"\s*:\s*"')
_LONGEST_EVENT = 4 * 2**20
"""Bytes; something longer without an end is no event, and passes as it is."""

FROM_USAGE, FROM_LOGPROBS, FROM_LENGTH, NOT_TOLD = "usage", "logprobs", "length", "not told"
"""How the tokens were counted; by length is an estimate from the answer's characters."""


class Tally:
    """Counts the tokens of one answer."""

    def __init__(self, *, expects_usage: bool, hide_usage: bool, characters_per_token: float) -> None:
        """Start counting.

        Args:
            expects_usage: whether the server was asked for usage, so that the other events need not be read.
            hide_usage: whether to leave out the event that only the gateway has asked for.
            characters_per_token: to estimate the tokens if the server does not tell them.
        """
        self._expects, self._hide, self._per_token = expects_usage, hide_usage, characters_per_token
        self._pending = b""
        self._logprobs = self._characters = 0
        self.prompt_tokens: int | None = None
        self.has_content = False
        """Whether a token has come."""
        self.is_whole = False
        """Whether the answer has said that it ends."""
        self._reported: int | None = None
        self._refused: str | None = None

    @property
    def error(self) -> str | None:
        """What the server has said in an error event."""
        return self._refused

    @property
    def output_tokens(self) -> int | None:
        """Tokens so far, as far as the server or log probabilities say."""
        return self._reported if self._reported is not None else self._logprobs or None

    @property
    def counted(self) -> tuple[int | None, str]:
        """Tokens of the answer, and how they were counted; None if the server was asked and did not tell."""
        if self._reported is not None:
            return self._reported, FROM_USAGE
        if self._expects:
            return None, NOT_TOLD
        if self._logprobs:
            return self._logprobs, FROM_LOGPROBS
        return max(round(self._characters / self._per_token), int(self.has_content)), FROM_LENGTH

    def feed(self, data: bytes) -> bytes:
        """Take what has come of a stream; returns what may pass: whole events, byte for byte."""
        self._pending += data
        end = 0
        for match in _BOUNDARY.finditer(self._pending):
            end = match.end()
        if not end:
            if len(self._pending) <= _LONGEST_EVENT:
                return b""
            end = len(self._pending)
        block, self._pending = self._pending[:end], self._pending[end:]
        return self._look(block)

    def rest(self) -> bytes:
        """Return what is left once a stream has ended as it should."""
        block, self._pending = self._pending, b""
        return self._look(block) if block else b""

    def whole(self, body: bytes) -> None:
        """Take an answer that came in one piece."""
        self.is_whole = self.has_content = True
        try:
            answer = json.loads(body)
        except (ValueError, RecursionError):
            answer = None
        if isinstance(answer, dict):
            self._count(answer)

    def _look(self, block: bytes) -> bytes:
        self.is_whole = self.is_whole or b"[DONE]" in block or _FINISH.search(block) is not None
        if self._tells_nothing(block):
            return block
        kept, start = [], 0
        for match in [*_BOUNDARY.finditer(block), None]:
            end = match.end() if match else len(block)
            event = block[start:end]
            start = end
            if event and (self._tells_nothing(event) or not (self._read(event) and self._hide)):
                kept.append(event)
        return b"".join(kept)

    def _tells_nothing(self, block: bytes) -> bool:
        """Whether events may pass unread: the answer has begun, and its tokens will be told, but not here."""
        return self._expects and self.has_content and b'"error"' not in block and _USAGE.search(block) is None

    def _read(self, event: bytes) -> bool:
        """Read one event; returns whether it holds usage and nothing else."""
        lines = [line[5:].strip() for line in event.splitlines() if line.startswith(b"data:")]
        data = b"\n".join(lines)
        if not data.startswith(b"{"):
            return False
        try:
            chunk = json.loads(data)
        except (ValueError, RecursionError):
            return False
        if not isinstance(chunk, dict):
            return False
        if chunk.get("error"):
            problem = chunk["error"]
            self._refused = str(problem.get("message") if isinstance(problem, dict) else problem)
        self._count(chunk)
        return isinstance(chunk.get("usage"), dict) and not chunk.get("choices")

    def _count(self, chunk: dict[str, Any]) -> None:
        usage = chunk.get("usage")
        if isinstance(usage, dict):
            tokens, prompt = usage.get("completion_tokens"), usage.get("prompt_tokens")
            if isinstance(tokens, int) and tokens >= 0:
                self._reported = tokens
            if isinstance(prompt, int) and prompt > 0:
                self.prompt_tokens = prompt
        choices = chunk.get("choices")
        for choice in choices if isinstance(choices, list) else ():
            if not isinstance(choice, dict):
                continue
            part = choice.get("delta") or choice.get("message") or {}
            content = [choice.get("text")]
            if isinstance(part, dict):
                content += [value for key, value in part.items() if key != "role"]
            if any(content) or choice.get("finish_reason"):
                self.has_content = True
            self._characters += sum(len(text) for text in content if isinstance(text, str))
            logprobs = choice.get("logprobs")
            if isinstance(logprobs, dict):
                tokens = logprobs.get("content") or logprobs.get("tokens")
                self._logprobs += len(tokens) if isinstance(tokens, list) else 0
