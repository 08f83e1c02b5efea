# SPDX-License-Identifier: Apache-2.0
"""Formulas of the points games: evaluation and search in exact rationals, with a parser of its own.

A formula is a sequence of entries: decimal numbers, `+ - * /`, `(` and `)`. Both functions run the same left-to-right
machine. It keeps, for the innermost open bracket, a finished sum `s` and a running term `t`, so that the value of what
was read is s + t:

    1 + 2 * 3     s=0 t=1 | s=1 t=1, times | s=1 t=2 | s=1 t=2, times | s=1 t=6

- `evaluate_formula(entries)`: the value, or None
- `solve(cards, target, prefix)`: the entries that complete a formula
"""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from functools import lru_cache
from typing import NamedTuple

OPERATORS = ("+", "*", "-", "/", "(", ")")
MAX_DIGITS = 18


class _State(NamedTuple):
    """Where the machine stands. `pending` is "*" or "/" while an operand for `t` is awaited, "" after one."""

    outer: tuple[tuple[Fraction, Fraction, str], ...]  # (s, t, pending) of each bracket that is still open around
    s: Fraction
    t: Fraction
    pending: str


_ZERO, _ONE = Fraction(0), Fraction(1)
_START = _State((), _ZERO, _ONE, "*")


def _operand(state: _State, value: Fraction) -> _State | None:
    if state.pending == "*":
        return _State(state.outer, state.s, state.t * value, "")
    return _State(state.outer, state.s, state.t / value, "") if value else None


def _advance(state: _State, entry: str) -> _State | None:
    """The state after one more entry; None where the formula is malformed or divides by zero."""
    outer, s, t, pending = state
    if pending:
        if entry == "(":
            return _State((*outer, (s, t, pending)), _ZERO, _ONE, "*")
        if entry.isascii() and entry.isdigit() and len(entry) <= MAX_DIGITS:
            return _operand(state, Fraction(int(entry)))
        return None
    if entry == "+":
        return _State(outer, s + t, _ONE, "*")
    if entry == "-":
        return _State(outer, s + t, -_ONE, "*")
    if entry in ("*", "/"):
        return _State(outer, s, t, entry)
    if entry == ")" and outer:
        return _operand(_State(outer[:-1], *outer[-1]), s + t)
    return None


def _run(entries: Sequence[str]) -> _State | None:
    state: _State | None = _START
    for entry in entries:
        state = _advance(state, entry)
        if state is None:
            return None
    return state


def evaluate_formula(entries: Sequence[str]) -> Fraction | None:
    """The exact value of a formula, or None if it is empty, malformed or divides by zero. Total; linear time.

    Signs, powers and two numbers side by side are malformed. `entries` has no "=".
    """
    state = _run(entries)
    return None if state is None or state.pending or state.outer else state.s + state.t


@lru_cache(maxsize=200_000)
def _search(
    state: _State, left: tuple[int, ...], target: Fraction, operators: tuple[str, ...], brackets: int
) -> tuple[str, ...] | None:
    """The first completion in entry order that opens exactly `brackets` new brackets; `left` is sorted."""
    if not left:
        if state.pending or brackets:
            return None
        closing = (")",) * len(state.outer)
        final: _State | None = state
        for entry in closing:
            final = final and _advance(final, entry)
        return closing if final is not None and final.s + final.t == target else None
    choices: list[tuple[str, tuple[int, ...], int]] = []
    if state.pending:
        for index, number in enumerate(left):
            if index == 0 or number != left[index - 1]:
                choices.append((str(number), left[:index] + left[index + 1 :], brackets))
        if brackets and len(left) >= 2 and "(" in operators:
            choices.append(("(", left, brackets - 1))
    else:
        choices = [(entry, left, brackets) for entry in operators if entry not in "()"]
        if state.outer and ")" in operators:
            choices.append((")", left, brackets))
    for entry, rest, budget in choices:
        after = _advance(state, entry)
        if after is not None and (found := _search(after, rest, target, operators, budget)) is not None:
            return (entry, *found)
    return None


def solve(
    cards: Sequence[int],
    target: int,
    prefix: Sequence[str] = (),
    *,
    operators: Sequence[str] = OPERATORS,
) -> list[str] | None:
    """The entries, "=" last, that complete `prefix` to a formula that equals `target` and uses every card once.

    A shortest completion, hence one with no needless brackets; among those the first in the order: smaller numbers,
    then `operators` as given. So the answer depends on the hand, not on the cards' order, and following it leads
    through the answers to its own prefixes. None where nothing completes the prefix.

    Args:
        cards: the values of all cards, including those that the prefix has used; up to about five.
        prefix: entries so far.
        operators: the operators that the rest may use.

    Example:
        >>> solve([1, 5, 5, 5], 24)
        ['(', '5', '-', '1', '/', '5', ')', '*', '5', '=']
    """
    left = sorted(cards)
    for entry in prefix:
        if entry.isascii() and entry.isdigit():
            if len(entry) > MAX_DIGITS or int(entry) not in left:
                return None
            left.remove(int(entry))
    state = _run(prefix)
    if state is None:
        return None
    # A formula of n operands needs at most n - 2 pairs of brackets: one for each operation but the last.
    most = max(0, min(len(left) - 1, len(cards) - 2)) if "(" in operators else 0
    for brackets in range(most + 1):
        found = _search(state, tuple(left), Fraction(target), tuple(operators), brackets)
        if found is not None:
            return [*found, "="]
    return None
