# SPDX-License-Identifier: Apache-2.0
"""What a model may do in the browser: one call of one of these functions, with literal arguments, and nothing else.

The functions and their arguments are BrowserGym's. Its own parser looks for calls anywhere in a text and writes
Python code that is then run; here a string is parsed once, strictly, checked against `SIGNATURES`, and becomes a
`Call`, a name and values. No text is ever run. Left out are the functions that open addresses, tabs or files.

Contents: `Call`, `SIGNATURES`, `ACTION_SPACES`, `parse`, `ActionError`.
"""

from __future__ import annotations

import ast
import math
import re
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from vlmq_trl.envs.base import MAX_ACTION_LENGTH

MAX_PIXELS = 10_000
MAX_WAIT = 5_000  # milliseconds
MAX_OPTIONS = 32

BUTTONS = ("left", "middle", "right")
MODIFIERS = ("Alt", "Control", "ControlOrMeta", "Meta", "Shift")


class ActionError(ValueError):
    """A string is no action; says why."""


@dataclass(frozen=True)
class Call:
    """One action: a function's name and its arguments, trailing defaults left out. `str` spells it canonically."""

    name: str
    arguments: tuple[Any, ...]  # str, int, float, bool, or tuples of str

    def __str__(self) -> str:
        values = [list(value) if isinstance(value, tuple) else value for value in self.arguments]
        return f"{self.name}({', '.join(map(repr, values))})"

    @property
    def bids(self) -> tuple[str, ...]:
        """The elements that it names."""
        kinds = [parameter.kind for parameter in SIGNATURES[self.name]]
        return tuple(value for kind, value in zip(kinds, self.arguments, strict=False) if kind is _bid)


# Kinds of arguments: each gives the value as it is played, or raises ActionError.


def _bid(value: Any) -> str:
    if isinstance(value, str) and re.fullmatch(r"[A-Za-z]{0,16}[0-9]{1,8}", value, re.ASCII):
        return value
    raise ActionError("must be an element's number in quotes, such as '13'")


def _text(value: Any) -> str:
    if isinstance(value, str) and _encodable(value):
        return value
    raise ActionError("must be a text in quotes")


def _key(value: Any) -> str:
    if isinstance(value, str) and value.isprintable() and 1 <= len(value) <= 64 and _encodable(value):
        return value
    raise ActionError("must be a key such as 'Enter' or 'Control+a'")


def _pixels(value: Any) -> float:
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        if math.isfinite(value) and abs(value) <= MAX_PIXELS:
            return value
    raise ActionError(f"must be a number of pixels, at most {MAX_PIXELS}")


def _wait(value: Any) -> float:
    if isinstance(value, (int, float)) and not isinstance(value, bool) and 0 <= value <= MAX_WAIT:
        return value
    raise ActionError(f"must be milliseconds from 0 to {MAX_WAIT}")


def _flag(value: Any) -> bool:
    if isinstance(value, bool):
        return value
    raise ActionError("must be True or False")


def _button(value: Any) -> str:
    if isinstance(value, str) and value in BUTTONS:
        return value
    raise ActionError(f"must be one of {', '.join(BUTTONS)}")


def _modifiers(value: Any) -> tuple[str, ...]:
    if isinstance(value, list) and all(isinstance(one, str) and one in MODIFIERS for one in value):
        if len(value) <= len(MODIFIERS):
            return tuple(value)
    raise ActionError(f"must be a list out of {', '.join(MODIFIERS)}")


def _options(value: Any) -> str | tuple[str, ...]:
    if isinstance(value, str) and _encodable(value):
        return value
    if isinstance(value, list) and len(value) <= MAX_OPTIONS:
        if all(isinstance(one, str) and _encodable(one) for one in value):
            return tuple(value)
    raise ActionError("must be an option's text, or a list of such")


def _encodable(text: str) -> bool:
    """Whether it can be sent to the browser: a lone surrogate cannot."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


_REQUIRED: Any = object()


@dataclass(frozen=True)
class Parameter:
    """One parameter of a function: `kind` checks its value."""

    name: str
    kind: Callable[[Any], Any]
    default: Any = _REQUIRED


_BID = Parameter("bid", _bid)
_XY = (Parameter("x", _pixels), Parameter("y", _pixels))
_FROM_TO = tuple(Parameter(name, _pixels) for name in ("from_x", "from_y", "to_x", "to_y"))
_BUTTON = Parameter("button", _button, "left")
_HOW = (_BUTTON, Parameter("modifiers", _modifiers, ()))

_COMMON: dict[str, tuple[Parameter, ...]] = {"noop": (Parameter("wait_ms", _wait, 1000),)}
_BID_ACTIONS: dict[str, tuple[Parameter, ...]] = {
    "click": (_BID, *_HOW),
    "dblclick": (_BID, *_HOW),
    "hover": (_BID,),
    "focus": (_BID,),
    "fill": (_BID, Parameter("value", _text), Parameter("enable_autocomplete_menu", _flag, False)),
    "clear": (_BID,),
    "press": (_BID, Parameter("key_comb", _key)),
    "select_option": (_BID, Parameter("options", _options)),
    "drag_and_drop": (Parameter("from_bid", _bid), Parameter("to_bid", _bid)),
    "scroll": (Parameter("delta_x", _pixels), Parameter("delta_y", _pixels)),
}
_COORD_ACTIONS: dict[str, tuple[Parameter, ...]] = {
    "mouse_click": (*_XY, _BUTTON),
    "mouse_dblclick": (*_XY, _BUTTON),
    "mouse_move": _XY,
    "mouse_down": (*_XY, _BUTTON),
    "mouse_up": (*_XY, _BUTTON),
    "mouse_drag_and_drop": _FROM_TO,
    "scroll_at": (*_XY, Parameter("dx", _pixels), Parameter("dy", _pixels)),
    "keyboard_press": (Parameter("key", _key),),
    "keyboard_down": (Parameter("key", _key),),
    "keyboard_up": (Parameter("key", _key),),
    "keyboard_type": (Parameter("text", _text),),
    "keyboard_insert_text": (Parameter("text", _text),),
}

SIGNATURES = {**_COMMON, **_BID_ACTIONS, **_COORD_ACTIONS}
ACTION_SPACES: dict[str, tuple[str, ...]] = {
    "bid": (*_BID_ACTIONS, *_COMMON),
    "coord": (*_COORD_ACTIONS, *_COMMON),
    "both": (*_BID_ACTIONS, *_COORD_ACTIONS, *_COMMON),
}


def parse(action: Any, names: tuple[str, ...] = ACTION_SPACES["both"]) -> Call:
    """The one call that `action` is, outer white space aside.

    Args:
        action: anything; what is no string is no action.
        names: the functions allowed.

    Raises:
        ActionError: it is anything else; says what is wrong.
    """
    name, positional, named = _read_call(action)
    if name not in names:
        raise ActionError(f"no action {name!r}; there are {', '.join(names)}")
    parameters = SIGNATURES[name]
    if len(positional) > len(parameters):
        raise ActionError(f"{name} takes {len(parameters)} arguments at most, not {len(positional)}")
    given = {parameter.name: value for parameter, value in zip(parameters, positional, strict=False)}
    for key, value in named:
        if key in given or key not in {parameter.name for parameter in parameters}:
            raise ActionError(f"{name} has no argument {key!r}, or it is given twice")
        given[key] = value
    values = [_checked(name, parameter, given) for parameter in parameters]
    while values and values[-1] == parameters[len(values) - 1].default:
        values.pop()
    return Call(name, tuple(values))


def _checked(name: str, parameter: Parameter, given: dict[str, Any]) -> Any:
    """The value of one parameter."""
    if parameter.name not in given:
        if parameter.default is _REQUIRED:
            raise ActionError(f"{name} needs {parameter.name}")
        return parameter.default
    try:
        return parameter.kind(given[parameter.name])
    except ActionError as error:
        raise ActionError(f"{name}: {parameter.name} {error}") from None


def _read_call(action: Any) -> tuple[str, list[Any], list[tuple[str, Any]]]:
    """Name, positional and named arguments of a string that is one call with literal arguments."""
    if not isinstance(action, str):
        raise ActionError(f"an action is a string, not {type(action).__name__}")
    text = action.strip()
    if len(text) > MAX_ACTION_LENGTH:
        raise ActionError(f"longer than {MAX_ACTION_LENGTH} characters")
    malformed = ActionError("not one call of an action, such as click('13')")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about "\d" in a text
            node = ast.parse(text, mode="eval").body
        if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Name) or not _covers(node, text):
            raise malformed
        positional = [ast.literal_eval(argument) for argument in node.args]
        named = [(keyword.arg, ast.literal_eval(keyword.value)) for keyword in node.keywords]
    except ActionError:
        raise
    except (SyntaxError, ValueError, TypeError, MemoryError, RecursionError):
        raise malformed from None
    if any(key is None for key, _ in named):  # **{...}
        raise malformed
    return node.func.id, positional, [(str(key), value) for key, value in named]


def _covers(node: ast.expr, text: str) -> bool:
    """Whether an expression is all of the text: no brackets around it, no comment, no second line."""
    end = len(text.encode("utf-8"))
    return (node.lineno, node.col_offset, node.end_lineno, node.end_col_offset) == (1, 0, 1, end)
