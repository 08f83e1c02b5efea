# SPDX-License-Identifier: Apache-2.0
"""Gym Cards: the four games of RL4VLM (arXiv 2405.10292), rules written anew and cards drawn here.

- `NumberLine`: step from the current number to the target; 10 turns.
- `EZPoints`: two cards, a formula that equals 12; at most 5 entries.
- `Points24`: four cards, a formula that equals 24; at most 20 entries.
- `Blackjack`: Gymnasium's Blackjack (infinite deck, the dealer draws to 17, an ace counts 11 while it can).

J, Q and K count as 10. An episode is a success when its undiscounted return is positive.

A points game's formula has binary operators and brackets only. What Python would accept besides (signs, `**`, `//`,
two numbers side by side read as one) is malformed. A blank, which an illegal number leaves, is passed over by `=`.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from vlmq_trl.envs.base import Script, TextActionEnv
from vlmq_trl.envs.gym_cards import drawing
from vlmq_trl.envs.gym_cards.formula import evaluate_formula, solve

RANKS = ("A", "2", "3", "4", "5", "6", "7", "8", "9", "10", "J", "Q", "K")
NUMBERS = tuple(str(n) for n in range(1, 11))


def card_value(rank: str) -> int:
    """1 for an ace, 10 for J, Q and K, else the rank's own number."""
    return min(RANKS.index(rank) + 1, 10)


def _checked_ranks(ranks: Any, count: int | None, where: str) -> list[str]:
    """`ranks` as a list, each one of `RANKS`, `count` of them (None: at least two)."""
    ranks = [str(rank).upper() for rank in ranks]
    if any(rank not in RANKS for rank in ranks) or (len(ranks) < 2 if count is None else len(ranks) != count):
        wanted = "two or more" if count is None else str(count)
        raise ValueError(f"{where} must be {wanted} ranks out of {', '.join(RANKS)}, not {ranks}")
    return ranks


def _listed(ranks: list[str]) -> str:
    return "[" + ", ".join(ranks) + "]"


class CardGame(TextActionEnv):
    """What all four share: a limit of turns, and `scripts.py`, which plays them."""

    max_turns: int

    def _make_script(self) -> Script:
        from vlmq_trl.envs.gym_cards.scripts import make_script  # it knows the games, not they it

        return make_script(self)


class NumberLine(CardGame):
    """Step left or right until the current number is the target; both lie in 0..5 and walls hold.

    The reward is 1 on reaching the target, -1 for a move that comes no closer, else 0. Truncated after 10 turns.
    `reset(options={"current": 1, "target": 4})` sets the start.
    """

    task = "Move the current number to the target number. Actions: -, +."
    legal_actions = ("-", "+")
    reading_fields = ("current number", "target number")
    reset_options = ("current", "target")
    max_turns = 10
    max_position = 5

    def _start(self, options: dict[str, Any], seed: int | None) -> None:
        self.target = int(self.np_random.integers(self.max_position + 1))
        self.current = int(self.np_random.integers(self.max_position))
        self.current += self.current >= self.target  # uniform over the five other positions
        if options:
            # A number that is drawn gives way to one that is set, and stays uniform over the five others.
            first, second = self.target, self.current
            self.target = options.get("target", second if first == options.get("current") else first)
            self.current = options.get("current", first if second == options.get("target") else second)
            if self.target == self.current or not all(
                isinstance(n, (int, np.integer)) and not isinstance(n, bool) and 0 <= n <= self.max_position
                for n in (self.target, self.current)
            ):
                raise ValueError(
                    "NumberLine.reset: current and target must be two different whole numbers in "
                    f"0..{self.max_position}, not {self.current} and {self.target}"
                )
            self.target, self.current = int(self.target), int(self.current)

    def _play(self, action: str) -> tuple[float, bool, bool]:
        before = abs(self.target - self.current)
        self.current = min(max(self.current + (1 if action == "+" else -1), 0), self.max_position)
        if self.current == self.target:
            return 1.0, True, False
        return (0.0 if abs(self.target - self.current) < before else -1.0), False, False

    def _picture(self) -> NDArray[np.uint8]:
        return drawing.number_line(self.target, self.current)

    def state_text(self) -> dict[str, str]:
        return {"current number": str(self.current), "target number": str(self.target)}


class PointsGame(CardGame):
    """What EZPoints and Points24 share: build a formula entry by entry out of the cards, `=` evaluates it and ends.

    A number appends if a card of that value is unused; otherwise it costs 1 and appends a blank. `=` gives 10 if every
    card is used and the formula equals `goal`, else -1. The turn that takes the formula past `max_entries` is
    truncated with -1 (not -2 if its number was illegal too); an invalid action uses up a turn, so that after one the
    episode is truncated before that. `reset(options={"cards": ["5", "7"]})` sets the cards.

    Attributes:
        cards: ranks in the order shown.
        values: their numbers.
        formula: the entries so far, `drawing.BLANK` for a blank.
    """

    goal: int
    max_entries: int
    num_cards: int
    layout: tuple[int, int]  # rows and columns of the formula's cells: at least max_entries + 1
    reading_fields = ("cards", "current formula")
    reset_options = ("cards",)

    def _deal(self) -> list[str]:
        raise NotImplementedError

    def _start(self, options: dict[str, Any], seed: int | None) -> None:
        self.cards = self._deal()
        if "cards" in options:
            self.cards = _checked_ranks(options["cards"], self.num_cards, f"{type(self).__name__}.reset: cards")
        self.values = [card_value(rank) for rank in self.cards]
        self.formula: list[str] = []

    def left(self) -> list[int | None]:
        """Card by card, its value, or None if the formula uses it already; of equal cards the first goes first."""
        left: list[int | None] = list(self.values)
        for entry in self.formula:
            if entry in NUMBERS:
                left[left.index(int(entry))] = None
        return left

    def unused(self) -> list[int]:
        """The values of the cards that the formula does not use yet, in the order shown."""
        return [value for value in self.left() if value is not None]

    @property
    def solvable(self) -> bool:
        """Whether any formula of these cards equals the goal.

        EZPoints: always. Points24: 566 of the 715 hands, which are 73.1 % of the deals (tens are dealt most often).
        """
        return solve(self.values, self.goal, operators=self.operators) is not None

    @property
    def operators(self) -> tuple[str, ...]:
        """The game's legal operators and brackets."""
        assert self.legal_actions is not None
        return tuple(a for a in self.legal_actions if a not in NUMBERS and a != "=")

    def _play(self, action: str) -> tuple[float, bool, bool]:
        if action == "=":
            entries = [entry for entry in self.formula if entry != drawing.BLANK]
            won = not self.unused() and evaluate_formula(entries) == self.goal
            return (10.0 if won else -1.0), True, False
        illegal = action in NUMBERS and int(action) not in self.unused()
        self.formula.append(drawing.BLANK if illegal else action)
        return (-1.0 if illegal or len(self.formula) > self.max_entries else 0.0), False, False

    def _picture(self) -> NDArray[np.uint8]:
        return drawing.points(self.cards, self.formula, *self.layout)

    def state_text(self) -> dict[str, str]:
        return {"cards": _listed(self.cards), "current formula": "".join(self.formula)}


class EZPoints(PointsGame):
    """Two cards, `+` and `*`, goal 12, at most 5 entries.

    The first card is uniform over 2..K. Where its value divides 12 the second completes the product with probability
    1/2, else the sum. The two are swapped with probability 1/2. So every hand has a solution.
    """

    task = "Use both cards once to write a formula equal to 12. J, Q, K count as 10. Actions: 1 to 10, +, *, =."
    legal_actions = (*NUMBERS, "+", "*", "=")
    goal, max_entries, num_cards, layout = 12, 5, 2, (1, 6)
    max_turns = max_entries + 1

    def _deal(self) -> list[str]:
        first = RANKS[int(self.np_random.integers(1, len(RANKS)))]
        value = card_value(first)
        product = 12 % value == 0 and self.np_random.random() < 0.5
        second = RANKS[(12 // value if product else 12 - value) - 1]
        return [second, first] if self.np_random.random() < 0.5 else [first, second]


class Points24(PointsGame):
    """Four cards uniform over A..K, `+ - * /` and brackets, goal 24, at most 20 entries; some hands are unsolvable."""

    task = "Use all four cards once to write a formula equal to 24. J, Q, K count as 10. Actions: 1 to 10, +-*/()=."
    legal_actions = (*NUMBERS, "+", "-", "*", "/", "(", ")", "=")
    goal, max_entries, num_cards, layout = 24, 20, 4, (3, 8)
    max_turns = max_entries + 1

    def _deal(self) -> list[str]:
        return [RANKS[int(i)] for i in self.np_random.integers(len(RANKS), size=4)]


def hand_total(values: list[int]) -> tuple[int, bool]:
    """A hand's best total and whether an ace in it counts 11. Values are 1 (ace) to 10."""
    usable = 1 in values and sum(values) + 10 <= 21
    return sum(values) + 10 * usable, usable


class Blackjack(CardGame):
    """Gymnasium's Blackjack with no bonus for naturals: +1 win, 0 draw, -1 loss; ends on `stand` or bust.

    Cards come from an infinite deck of 13 equally likely ranks; the face-down card is dealt with the first four. Legal
    play ends by turn 20, so `max_turns` only bounds episodes with invalid actions.
    `reset(options={"dealer": ["7", "K"], "player": ["A", "6"]})` sets the start.

    Attributes:
        dealer, player: ranks; the dealer's first card is the open one.
    """

    task = "Beat the dealer without going over 21. Actions: stand, hit."
    legal_actions = ("stand", "hit")
    reading_fields = ("dealer card", "player cards")
    reset_options = ("dealer", "player")
    max_turns = 20

    def _draw(self) -> str:
        return RANKS[int(self.np_random.integers(len(RANKS)))]

    def _start(self, options: dict[str, Any], seed: int | None) -> None:
        self.dealer = [self._draw(), self._draw()]
        self.player = [self._draw(), self._draw()]
        if "dealer" in options:
            self.dealer = _checked_ranks(options["dealer"], 2, "Blackjack.reset: dealer")
        if "player" in options:
            self.player = _checked_ranks(options["player"], None, "Blackjack.reset: player")
            if self.total()[0] > 21:
                raise ValueError(f"Blackjack.reset: player {self.player} is over 21 already")

    def total(self) -> tuple[int, bool]:
        """The player's total and whether it holds a usable ace."""
        return hand_total([card_value(rank) for rank in self.player])

    def _play(self, action: str) -> tuple[float, bool, bool]:
        if action == "hit":
            self.player.append(self._draw())
            return (-1.0, True, False) if self.total()[0] > 21 else (0.0, False, False)
        while (dealer := hand_total([card_value(rank) for rank in self.dealer])[0]) < 17:
            self.dealer.append(self._draw())
        player = self.total()[0]
        if dealer > 21 or player > dealer:
            return 1.0, True, False
        return (0.0 if player == dealer else -1.0), True, False

    def _picture(self) -> NDArray[np.uint8]:
        return drawing.blackjack(self.dealer[0], self.player)

    def state_text(self) -> dict[str, str]:
        return {"dealer card": self.dealer[0], "player cards": _listed(self.player)}
