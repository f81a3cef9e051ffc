"""Routers: rules from production use and the literature, planners, and the learned one, on one protocol."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import cache
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp

from jaxroute.errors import UserError, did_you_mean
from jaxroute.policies.away import FORMS, with_form
from jaxroute.policies.protocol import Memory, Params, Policy, best_available
from jaxroute.policies.rules import PREFIX_RULES, RULES

if TYPE_CHECKING:
    import flax.linen as nn

__all__ = ["FORMS", "LEARNED", "RULES", "Policy", "best_available", "learned_policy", "rules_named", "with_form"]

LEARNED = "jaxroute"
"""Name of the learned router in tables and figures."""


def learned_policy(network: nn.Module, params: Params) -> Policy:
    """Route to the expert that the network prefers."""
    return Policy(LEARNED, _greedy(network), params=params)


@cache
def _greedy(network: nn.Module) -> Callable:
    """Return one function for equal networks, so that evaluation compiles it once for all their parameters."""

    # Compiled as one program for who calls it alone: its operations one by one take seconds to compile.
    @jax.jit
    def act(params, obs, key, memory: Memory):  # type: ignore[no-untyped-def]
        logits, _ = network.apply(params, network.prepare(obs))
        return jnp.argmax(logits).astype(jnp.int32), memory

    return act


def rules_named(names: Sequence[str] | None, away: bool = False, prefixes: bool = False) -> list[Policy]:
    """Return the rules of these names, or all; `RULE+FORM` is a rule that may send requests away (`FORMS`).

    `RULE+FORM=VALUE` gives the form another parameter than the tuned one. With `away`, which says that requests may be
    sent away, `impact_greedy` with each form is among all; with `prefixes`, which says that they are cached, so are the
    rules that go by them.

    Raises:
        UserError: a name is unknown, or there twice.
    """
    if names is None:
        rules = [rule for name, rule in RULES.items() if prefixes or name not in PREFIX_RULES]
        return [*rules, *(with_form("impact_greedy", form) for form in FORMS if away)]
    if not names:
        raise UserError(f"policies is empty; leave it out for all rules, or name some: {', '.join(RULES)}")
    for name in names:
        rule, plus, form, _ = _parts(name)
        if rule not in RULES:
            hint = did_you_mean(rule, RULES)
            raise UserError(f"policies: {name} is unknown{hint}; choose from {', '.join(RULES)}, or add a form to one")
        if plus and form not in FORMS:
            hint = did_you_mean(form, FORMS)
            raise UserError(f"policies: {name}: the form {form} is unknown{hint}; choose from {', '.join(FORMS)}")
        if names.count(name) > 1:
            raise UserError(f"policies: {name} is there {names.count(name)} times; name each once")
    return [_named(name) for name in names]


def _parts(name: str) -> tuple[str, str, str, str]:
    """Return rule, plus, form and value of `RULE+FORM=VALUE`."""
    rule, plus, rest = name.partition("+")
    form, _, value = rest.partition("=")
    return rule, plus, form, value


def _named(name: str) -> Policy:
    rule, plus, form, value = _parts(name)
    if not plus:
        return RULES[rule]
    policy = with_form(rule, form)
    if not value:
        return policy
    try:
        number = float(value)
    except ValueError:
        number = math.nan
    if not math.isfinite(number):
        raise UserError(f"policies: {name}: {value} is no number; write for instance {rule}+{form}=0.3")
    return policy._replace(name=name, params=(policy.params[0], number))
