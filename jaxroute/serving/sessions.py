"""Turns of sessions: how much of its session's text an arriving request can share."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int

from jaxroute.serving.engine import SiteState, SlotStatus, slot_status
from jaxroute.serving.prefixes import NOBODY, Text


class Turn(NamedTuple):
    """Whose text a request continues, as its client states it."""

    session: Int[Array, ""]
    """-1 if none."""
    shared_tokens: Int[Array, ""]
    """Its first tokens, which its session's text had before; fewer than its prompt has."""
    application: Int[Array, ""]
    """-1 if none."""
    system_tokens: Int[Array, ""]
    """Length of its application's system prompt, with which it begins; the same for all of its requests."""


class Sessions(NamedTuple):
    """Of each session, the turn that carries its text on."""

    request: Int[Array, "session"]
    """Its number; -1 if there was none yet."""
    shared_tokens: Int[Array, "session"]
    """What it shares with the text before it."""
    tokens: Int[Array, "session"]
    """Length of the text at its end."""


def no_sessions(number: int) -> Sessions:
    """Return so many sessions that have not begun."""
    none = jnp.zeros(number, jnp.int32)
    return Sessions(none - 1, none, none)


def text_of(sessions: Sessions, state: SiteState, turn: Turn) -> Text:
    """Return what an arriving request shares.

    A text that does not exist yet cannot be shared: while the turn that carries it on is in flight, no more than what
    that one shared. A turn that comes while others of its session are in flight does not carry it on.
    """
    # Of sessions that follow each other in one place, the numbers differ by a multiple of the places.
    latest, shared, tokens = (column[turn.session % sessions.request.shape[0]] for column in sessions)
    has_session = turn.session != NOBODY
    active = (slot_status(state) == SlotStatus.ACTIVE) & has_session
    carries = active & (state.slots.request == latest)
    # Where nothing is cached, it makes no difference who else is in flight.
    others = carries if state.slots.texts is None else active & (state.slots.texts.session_key == turn.session)
    exists = jnp.where(carries.any(), shared, tokens)
    return Text(
        session=turn.session,
        shared_tokens=jnp.where(has_session, jnp.minimum(turn.shared_tokens, exists), 0),
        carries_on=has_session & ~others.any(),
        application=turn.application,
        system_tokens=turn.system_tokens,
    )


def with_turn(
    sessions: Sessions, text: Text, request: Int[Array, ""], tokens: Int[Array, ""], accepted: Bool[Array, ""]
) -> Sessions:
    """Note a request that an expert has accepted, and of how many tokens prompt and answer together will be there."""
    places = sessions.request.shape[0]
    carried_on = jnp.where(accepted & text.carries_on, text.session % places, places)
    new = Sessions(jnp.asarray(request, jnp.int32), text.shared_tokens, tokens)
    return jax.tree.map(lambda column, value: column.at[carried_on].set(value, mode="drop"), sessions, new)
