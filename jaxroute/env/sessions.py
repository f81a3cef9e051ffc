"""Whose turn is next: requests of sessions, whose prompts begin with all that was said before."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int, PRNGKeyArray

from jaxroute.serving import SiteState
from jaxroute.serving.prefixes import Text
from jaxroute.serving.sessions import Sessions, Turn, no_sessions, text_of
from jaxroute.workloads.sessions import SessionParams


class SessionState(NamedTuple):
    """The sessions of one environment, in places that one session after the other takes."""

    key: Int[Array, "place"]
    """Number of the session; modulo the places, it is that of its place."""
    application: Int[Array, "place"]
    latest: Int[Array, "place"]
    """Number of its latest request."""
    texts: Sessions


def first_sessions(number: int) -> SessionState:
    """Return so many places, in each of which a session may go on that has said nothing yet."""
    place = jnp.arange(number, dtype=jnp.int32)
    return SessionState(key=place, application=jnp.zeros_like(place), latest=place - number, texts=no_sessions(number))


def next_turn(
    key: PRNGKeyArray,
    sessions: SessionState,
    params: SessionParams,
    site: SiteState,
    request: Int[Array, ""],
    own_tokens: Int[Array, ""],
) -> tuple[SessionState, Text, Int[Array, ""]]:
    """Draw the session of an arriving request, whose own words have so many tokens.

    With probability `params.begins` it is a new one, in the place of any other. Else one of two drawn sessions goes on:
    that whose latest turn is longer ago.

    Returns:
        The sessions, the text of the request, and the tokens of its prompt.
    """
    number = sessions.key.shape[0]
    for_begin, for_place, for_other, for_kind = jax.random.bits(key, (4,), jnp.uint32)
    unit = jnp.float32(2**-32)
    one, other = ((bits % number).astype(jnp.int32) for bits in (for_place, for_other))
    older = jnp.where(sessions.latest[other] < sessions.latest[one], other, one)
    begins = for_begin * unit < params.begins
    place = jnp.where(begins, one, older)

    # What a chat without history says is its system prompt.
    head = params.system_tokens[sessions.application[place]]
    going_on = _text(sessions, site, place, head)
    begins |= jnp.maximum(going_on.shared_tokens, head) + own_tokens > params.max_context
    begins |= sessions.latest[place] < 0
    drawn = (for_kind * unit >= params.share_up_to[:-1]).sum().astype(jnp.int32)
    application = jnp.where(begins, drawn, sessions.application[place])

    def put(column: Array, value: Array) -> Array:
        return column.at[place].set(value)

    texts = Sessions(
        *(put(new, jnp.where(begins, first, new[place])) for new, first in zip(sessions.texts, (-1, 0, 0), strict=True))
    )
    sessions = SessionState(
        key=put(sessions.key, sessions.key[place] + jnp.where(begins, number, 0)),
        application=put(sessions.application, application),
        latest=put(sessions.latest, request),
        texts=texts,
    )
    # A new session has said nothing, and none of its requests is in flight.
    text = going_on._replace(
        session=sessions.key[place],
        shared_tokens=jnp.where(begins, 0, going_on.shared_tokens),
        carries_on=begins | going_on.carries_on,
        application=application,
        system_tokens=params.system_tokens[application],
    )
    return sessions, text, jnp.maximum(text.shared_tokens, text.system_tokens) + own_tokens


def _text(sessions: SessionState, site: SiteState, place: Int[Array, ""], system_tokens: Int[Array, ""]) -> Text:
    everything = jnp.int32(2**28)
    turn = Turn(sessions.key[place], everything, sessions.application[place], system_tokens)
    return text_of(sessions.texts, site, turn)
