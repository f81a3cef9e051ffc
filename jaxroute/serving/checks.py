"""Checks of the numbers that callers pass in: one line says what is wrong, and nothing is cast silently.

Booleans, text, dates, durations, complex numbers and missing values are not numbers. Times are seconds. A date or a
duration is refused with the formula that converts it, because only the caller knows the time that counts as zero.
"""

from __future__ import annotations

import datetime
import math
from decimal import Decimal
from numbers import Real
from typing import Any

import jax.numpy as jnp
import numpy as np
from numpy.typing import ArrayLike

from jaxroute.errors import UserError

_DATES = "give seconds, e.g. (times - times[0]) / np.timedelta64(1, 's')"
_DURATIONS = "give seconds, e.g. durations / np.timedelta64(1, 's')"


def real_array(name: str, values: ArrayLike) -> np.ndarray:
    """Return `values` as an array of integers or floats, NaN and infinities included.

    Raises:
        UserError: they are something else; the line begins with `name`.
    """
    try:
        array = np.asarray(values)
    except Exception as error:  # Ragged lists, traced values, and what a library's own arrays raise.
        raise UserError(f"{name} is no array of numbers ({type(error).__name__}); give a list or an array") from None
    if np.ma.isMaskedArray(values) and np.ma.getmaskarray(values).any():
        raise UserError(f"{name}{_first(np.ma.getmaskarray(values))} is masked; fill in or leave out what is missing")
    kind = array.dtype.kind
    if kind == "M":
        raise UserError(f"{name} holds dates ({array.dtype}); {_DATES}")
    if kind == "m":
        raise UserError(f"{name} holds durations ({array.dtype}); {_DURATIONS}")
    if kind == "O":
        for index, value in np.ndenumerate(array):
            if not _is_real(value):
                raise UserError(
                    f"{name}{_at(index)} is {_shown(value)}; {_remedy(value, 'numbers' if index else 'a number')}"
                )
        return array.astype(np.float64)
    if kind in "iuf":
        return array
    if jnp.issubdtype(array.dtype, jnp.floating) or jnp.issubdtype(array.dtype, jnp.integer):
        return array.astype(np.float64)  # bfloat16 and its like
    if array.shape == ():
        raise UserError(f"{name} is {_shown(values)}; give a number")
    what = {"b": "booleans", "c": "complex numbers", "U": "text", "S": "text"}.get(kind, str(array.dtype))
    if array.size == 0 and kind in "US":
        return np.zeros(array.shape)
    first = f", e.g. {_shown(array.flat[0].item())}" if array.size and kind in "USc" else ""
    raise UserError(f"{name} holds {what}{first}; give numbers")


def whole_array(name: str, values: ArrayLike, least: int, most: int) -> np.ndarray:
    """Return `values` as an array of int64.

    Raises:
        UserError: one is no whole number from `least` to `most`.
    """
    array = real_array(name, values)
    with np.errstate(invalid="ignore"):
        bad = ~((array >= least) & (array <= most) & (array == np.round(array)))
    if bad.any():
        index = np.unravel_index(int(np.argmax(bad)), array.shape)
        raise UserError(f"{name}{_at(index)} is {array[index]}; give whole numbers from {least} to {most}")
    return array.astype(np.int64)


def real(name: str, value: Any) -> float:
    """Return one number, which may be infinite or NaN.

    Raises:
        UserError: it is something else.
    """
    if type(value) is float or type(value) is int:
        return value
    array = real_array(name, value)
    if array.shape != ():
        raise UserError(f"{name} has shape {array.shape}; give one number")
    return array.item()


def whole(name: str, value: Any, least: int | None = None, most: int | None = None) -> int:
    """Return one whole number.

    Raises:
        UserError: it is something else, or out of range.
    """
    number = real(name, value)
    if (
        not math.isfinite(number)
        or number != int(number)
        or (least is not None and number < least)
        or (most is not None and number > most)
    ):
        bounds = [f"at least {least}"] * (least is not None) + [f"at most {most}"] * (most is not None)
        raise UserError(f"{name}={value} must be a whole number" + (", " if bounds else "") + " and ".join(bounds))
    return int(number)


def _is_real(value: Any) -> bool:
    return isinstance(value, Real | Decimal) and not isinstance(value, bool | np.timedelta64)


def _remedy(value: Any, wanted: str) -> str:
    if isinstance(value, datetime.date | datetime.time | np.datetime64):
        return _DATES
    return _DURATIONS if isinstance(value, datetime.timedelta | np.timedelta64) else f"give {wanted}"


def _at(index: tuple[Any, ...]) -> str:
    return f"[{', '.join(str(int(number)) for number in index)}]" if index else ""


def _first(mask: np.ndarray) -> str:
    return _at(np.unravel_index(int(np.argmax(mask)), mask.shape))


def _shown(value: Any) -> str:
    text = " ".join(repr(value).split())
    return text if len(text) <= 60 else text[:57] + "..."
