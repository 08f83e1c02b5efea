# SPDX-License-Identifier: Apache-2.0
"""Scripts of the Gym Cards games: expert play, each game's systematic mistake, and optimal Blackjack.

- NumberLine. Expert: towards the target. Mistake: away from it.
- EZPoints, Points24. Expert: the solver's next entry, `=` once nothing is missing or nothing helps. Mistake: n+1
  instead of the number n (9 instead of 10); `+` and `*` swapped, `-` and `/` swapped, `(` and `)` swapped; `+` instead
  of `=`. A flawed player also gives up a formula that holds a blank: to it the right action is `=`.
- Blackjack. Expert: optimal play of the infinite deck. Mistake: the other action.
"""

from __future__ import annotations

from functools import cache

import numpy as np

from vlmq_trl.envs.base import Script, TextActionEnv
from vlmq_trl.envs.gym_cards.drawing import BLANK
from vlmq_trl.envs.gym_cards.formula import solve
from vlmq_trl.envs.gym_cards.games import Blackjack, NumberLine, PointsGame, card_value

_SWAPPED = {"+": "*", "*": "+", "-": "/", "/": "-", "(": ")", ")": "(", "=": "+"}


def make_script(game: TextActionEnv) -> Script:
    """The script of one of the four games."""
    if isinstance(game, NumberLine):
        return NumberLineScript(game)
    if isinstance(game, PointsGame):
        return PointsScript(game)
    return BlackjackScript(game)


class NumberLineScript(Script):
    env: NumberLine

    def expert(self) -> str:
        return "+" if self.env.target > self.env.current else "-"

    def mistake(self) -> str:
        return "-" if self.expert() == "+" else "+"

    def thoughts(self) -> str:
        return f"target is {'higher' if self.env.target > self.env.current else 'lower'} than current"


class PointsScript(Script):
    env: PointsGame

    def expert(self) -> str:
        game = self.env
        entries = [entry for entry in game.formula if entry != BLANK]
        rest = solve(game.values, game.goal, entries, operators=game.operators)
        # The last of `rest` is "=", which takes a turn but no entry.
        return rest[0] if rest is not None and game.turns + len(rest) <= game.max_turns else "="

    def unmistaken(self) -> str:
        return "=" if BLANK in self.env.formula else self.expert()

    def mistake(self) -> str:
        right = self.unmistaken()
        if right in _SWAPPED:
            return _SWAPPED[right]
        return "9" if right == "10" else str(int(right) + 1)

    def thoughts(self) -> str:
        # Card by card, so that a small model decides about one card at a time.
        return "unused values: " + ", ".join("_" if value is None else str(value) for value in self.env.left())


class BlackjackScript(Script):
    env: Blackjack

    def expert(self) -> str:
        return blackjack_action(*self.env.total(), card_value(self.env.dealer[0]))

    def mistake(self) -> str:
        return "hit" if self.expert() == "stand" else "stand"

    def thoughts(self) -> str:
        total, usable = self.env.total()
        sums = np.cumsum([card_value(rank) for rank in self.env.player]).tolist()
        hand = f"{'soft' if usable else 'hard'} {total}"
        return f"dealer shows {self.env.dealer[0]}, cards add up to {', '.join(map(str, sums))}, hand is {hand}"


# Blackjack by dynamic programming over the infinite deck. Totals count an ace as 11 while `soft`.

_DECK = tuple((value, (4 if value == 10 else 1) / 13) for value in range(1, 11))


def _drawn(total: int, soft: bool, value: int) -> tuple[int, bool]:
    """The total after one more card; a usable ace falls back to 1 rather than bust."""
    total += value
    if value == 1 and total + 10 <= 21:
        total, soft = total + 10, True
    if total > 21 and soft:
        total, soft = total - 10, False
    return total, soft


@cache
def _dealer(total: int, soft: bool) -> tuple[float, ...]:
    """Probabilities of the dealer's final total from here: (17, 18, 19, 20, 21, bust)."""
    if total >= 17:
        return tuple(float(total == final) for final in range(17, 22)) + (float(total > 21),)
    results = np.zeros(6)
    for value, chance in _DECK:
        results += chance * np.array(_dealer(*_drawn(total, soft, value)))
    return tuple(results.tolist())


@cache
def blackjack_values(total: int, soft: bool, dealer: int) -> tuple[float, float]:
    """Expected rewards of (stand, hit), play afterwards optimal. `total` <= 21, the dealer's open card in 1..10."""
    *finals, bust = _dealer(*_drawn(0, False, dealer))
    stand = bust + sum(p * ((total > final) - (total < final)) for final, p in zip(range(17, 22), finals, strict=True))
    hit = 0.0
    for value, chance in _DECK:
        after = _drawn(total, soft, value)
        hit += chance * (-1.0 if after[0] > 21 else max(blackjack_values(*after, dealer)))
    return stand, hit


def blackjack_action(total: int, soft: bool, dealer: int) -> str:
    """Optimal play without doubling or splitting; a tie stands."""
    stand, hit = blackjack_values(total, soft, dealer)
    return "hit" if hit > stand else "stand"
