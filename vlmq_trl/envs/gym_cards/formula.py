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

import numpy as np

# In the order in which solve() prefers them.
OPERATORS = ("+", "*", "-", "/", "(", ")")
MAX_DIGITS = 18


class _State(NamedTuple):
    """Where the machine stands. `pending` is "*" or "/" while an operand for `t` is awaited, "" after one."""

    outer: _State | None  # the state before the innermost open bracket
    s: Fraction
    t: Fraction
    pending: str


_ZERO, _ONE = Fraction(0), Fraction(1)
_START = _State(None, _ZERO, _ONE, "*")


def _operand(state: _State, value: Fraction) -> _State | None:
    if state.pending == "*":
        return _State(state.outer, state.s, state.t * value, "")
    return _State(state.outer, state.s, state.t / value, "") if value else None


def _advance(state: _State, entry: str) -> _State | None:
    """The state after one more entry; None where the formula is malformed or divides by zero."""
    outer, s, t, pending = state
    if pending:
        if entry == "(":
            return _State(state, _ZERO, _ONE, "*")
        if isinstance(entry, str) and entry.isascii() and entry.isdigit() and len(entry) <= MAX_DIGITS:
            return _operand(state, Fraction(int(entry)))
        return None
    if entry == "+":
        return _State(outer, s + t, _ONE, "*")
    if entry == "-":
        return _State(outer, s + t, -_ONE, "*")
    if entry in ("*", "/"):
        return _State(outer, s, t, entry)
    if entry == ")" and outer is not None:
        return _operand(outer, s + t)
    return None


def _run(entries: Sequence[str]) -> _State | None:
    state = _START
    for entry in entries:
        after = _advance(state, entry)
        if after is None:
            return None
        state = after
    return state


def evaluate_formula(entries: Sequence[str]) -> Fraction | None:
    """The exact value of a formula, or None if it is empty, malformed or divides by zero. Total; does not recurse.

    Signs, powers and two numbers side by side are malformed. `entries` has no "=".
    """
    state = _run(entries)
    return None if state is None or state.pending or state.outer is not None else state.s + state.t


# Search. What is still to come splits into operands and tails. A tail, such as "*3-(5+1)", takes a frame (s, t) to the
# value s + m * t + r with numbers m and r that do not depend on the frame, so the tails of a set of cards are listed
# once: {(m, r): shortest tail}. Formulas are tuples of codes here, a card's number or `_CODES[operator]`, which sort
# as solve() prefers.

_MAX_CARD = 999
_CODES = {operator: _MAX_CARD + 1 + index for index, operator in enumerate(OPERATORS)}
_ENTRIES = {code: operator for operator, code in _CODES.items()}
_OPEN, _CLOSE = (_CODES["("],), (_CODES[")"],)

Cards = tuple[int, ...]  # sorted
Codes = tuple[int, ...]


def _better(one: Codes, other: Codes | None) -> bool:
    return other is None or (len(one), one) < (len(other), other)


@lru_cache(maxsize=100_000)
def _splits(cards: Cards) -> list[tuple[Cards, Cards]]:
    """All ways to part the cards in two sorted hands, each once."""
    parts: dict[Cards, Cards] = {}
    for mask in range(1 << len(cards)):
        taken = tuple(card for i, card in enumerate(cards) if mask >> i & 1)
        parts[taken] = tuple(card for i, card in enumerate(cards) if not mask >> i & 1)
    return list(parts.items())


@lru_cache(maxsize=20_000)
def _factors(cards: Cards, operators: tuple[str, ...]) -> dict[Fraction, Codes]:
    """Every value of one operand made of all the cards, a number or a bracket, with the shortest such operand."""
    if len(cards) == 1:
        return {Fraction(cards[0]): cards}
    found: dict[Fraction, Codes] = {}
    if not cards or "(" not in operators or ")" not in operators:
        return found
    for taken, rest in _splits(cards):
        if taken and rest:
            for x, operand in _factors(taken, operators).items():
                for (m, r), tail in _tails(rest, operators).items():
                    codes = _OPEN + operand + tail + _CLOSE
                    if _better(codes, found.get(x * m + r)):
                        found[x * m + r] = codes
    return found


@lru_cache(maxsize=20_000)
def _tails(cards: Cards, operators: tuple[str, ...]) -> dict[tuple[Fraction, Fraction], Codes]:
    """Every (m, r) of a tail that uses all the cards, with the shortest such tail."""
    if not cards:
        return {(_ONE, _ZERO): ()}
    found: dict[tuple[Fraction, Fraction], Codes] = {}
    for taken, rest in _splits(cards):
        for x, operand in _factors(taken, operators).items():
            for (m, r), tail in _tails(rest, operators).items():
                for operator in operators:
                    if operator == "*":
                        effect = (x * m, r)
                    elif operator == "/" and x:
                        effect = (m / x, r)
                    elif operator == "+":
                        effect = (_ONE, r + x * m)
                    elif operator == "-":
                        effect = (_ONE, r - x * m)
                    else:
                        continue
                    codes = (_CODES[operator], *operand, *tail)
                    if _better(codes, found.get(effect)):
                        found[effect] = codes
    return found


@lru_cache(maxsize=20_000)
def _tail_arrays(cards: Cards, operators: tuple[str, ...]) -> tuple[np.ndarray, np.ndarray, list[tuple]]:
    """`_tails` as floats m (K,) and r (K,), and its items in the same order."""
    items = list(_tails(cards, operators).items())
    return np.array([float(m) for (m, _), _ in items]), np.array([float(r) for (_, r), _ in items]), items


def _complete(state: _State, left: Cards, target: Fraction, operators: tuple[str, ...]) -> Codes | None:
    """The best completion of a state that uses all the cards left."""
    best: Codes | None = None
    if state.pending:
        starts: list[tuple[_State, Codes, Cards]] = []
        fresh = (state.s, state.t, state.pending) == (_ZERO, _ONE, "*")
        for taken, rest in _splits(left):
            if len(taken) > 1 and not rest and fresh:
                continue  # a bracket around everything
            for x, operand in _factors(taken, operators).items():
                after = _operand(state, x)
                if after is not None:
                    starts.append((after, operand, rest))
    else:
        starts = [(state, (), left)]
    if state.outer is None:
        by_rest: dict[Cards, list[tuple[_State, Codes]]] = {}
        for after, operand, rest in starts:
            by_rest.setdefault(rest, []).append((after, operand))
        for rest, group in by_rest.items():
            ms, rs, items = _tail_arrays(rest, operators)
            if not items:
                continue
            t = np.array([float(after.t) for after, _ in group])
            near = np.abs(float(state.s) + t[:, None] * ms + rs - float(target)) < 1e-6  # (len(group), K)
            for row, column in np.argwhere(near):
                (after, operand), ((m_exact, r_exact), tail) = group[row], items[column]
                if after.s + after.t * m_exact + r_exact == target and _better(operand + tail, best):
                    best = operand + tail
        return best
    for after, operand, remaining in starts:
        for taken, rest in _splits(remaining):
            for (m, r), tail in _tails(taken, operators).items():
                closed = _operand(state.outer, after.s + after.t * m + r)
                end = None if closed is None else _complete(closed, rest, target, operators)
                if end is not None and _better(operand + tail + _CLOSE + end, best):
                    best = operand + tail + _CLOSE + end
    return best


_Question = tuple[Cards, int, tuple[str, ...], tuple[str, ...]]
_answers: dict[_Question, tuple[str, ...] | None] = {}
_MAX_ANSWERS = 200_000


def solve(
    cards: Sequence[int],
    target: int,
    prefix: Sequence[str] = (),
    *,
    operators: Sequence[str] = OPERATORS,
) -> list[str] | None:
    """The entries, "=" last, that complete `prefix` to a formula that equals `target` and uses every card once.

    A shortest completion, hence one with no needless brackets; among those the first in the order: smaller numbers,
    then `+ * - / ( )`. So the answer depends on the hand, not on the cards' order, and following it leads through the
    answers to its own prefixes. None where nothing completes the prefix.

    Args:
        cards: the values of all cards, including those that the prefix has used: at most five, each in 0..999.
        prefix: entries so far.
        operators: the operators that the rest may use.

    Example:
        >>> solve([1, 5, 5, 5], 24)
        ['5', '*', '(', '5', '-', '1', '/', '5', ')', '=']
    """
    hand = tuple(sorted(cards))
    if not 1 <= len(hand) <= 5 or hand[0] < 0 or hand[-1] > _MAX_CARD:
        raise ValueError(f"solve: cards must be 1 to 5 numbers in 0..{_MAX_CARD}, not {list(cards)}")
    unknown = [operator for operator in operators if operator not in OPERATORS]
    if unknown:
        raise ValueError(f"solve: unknown operators {unknown}; known are {' '.join(OPERATORS)}")
    question = (hand, int(target), tuple(prefix), tuple(operators))
    if question not in _answers:
        if len(_answers) >= _MAX_ANSWERS:
            _answers.clear()
        answer = _solve(*question)
        _answers[question] = answer
        if answer is not None:  # it answers its own prefixes as well
            for done in range(1, len(answer)):
                _answers[hand, int(target), (*prefix, *answer[:done]), tuple(operators)] = answer[done:]
    answer = _answers[question]
    return None if answer is None else list(answer)


def _solve(hand: Cards, target: int, prefix: tuple[str, ...], operators: tuple[str, ...]) -> tuple[str, ...] | None:
    left = list(hand)
    for entry in prefix:
        if entry.isascii() and entry.isdigit():
            if len(entry) > MAX_DIGITS or int(entry) not in left:
                return None
            left.remove(int(entry))
    state = _run(prefix)
    if state is None:
        return None
    codes = _complete(state, tuple(left), Fraction(target), operators)
    return None if codes is None else (*(_ENTRIES.get(code) or str(code) for code in codes), "=")
