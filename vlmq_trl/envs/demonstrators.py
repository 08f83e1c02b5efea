# SPDX-License-Identifier: Apache-2.0
"""Scripted play of the Gym Cards games: expert, random, systematically flawed, and mixtures of them.

A demonstrator reads the state truthfully (`Decision.reading`), says a neutral sentence that follows from that reading
(`Decision.thoughts`, the same whatever is played) and then acts. Only the action differs between the policies.

- NumberLine. Expert: towards the target. Mistake: away from it.
- EZPoints, Points24. Expert: the solver's next entry, `=` once nothing is missing or nothing helps. Mistake: n+1
  instead of the number n (9 instead of 10); `+` and `*` swapped, `-` and `/` swapped, `(` and `)` swapped; `+` instead
  of `=`. A flawed player also gives up a formula that holds a blank: to it the right action is `=`.
- Blackjack. Expert: optimal play of the infinite deck. Mistake: the other action.

Uniform noise would not do as bad data: the expert's action stays the most likely one, and an argmax washes it out.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any
from weakref import WeakKeyDictionary

import gymnasium
import numpy as np

from vlmq_trl.envs.drawing import BLANK
from vlmq_trl.envs.formula import solve
from vlmq_trl.envs.gym_cards import Blackjack, EZPoints, NumberLine, Points24, PointsGame, card_value

GAMES = {
    "vlmq_trl/NumberLine-v0": NumberLine,
    "vlmq_trl/EZPoints-v0": EZPoints,
    "vlmq_trl/Points24-v0": Points24,
    "vlmq_trl/Blackjack-v0": Blackjack,
}
POLICIES = ("expert", "random", "flawed")
_SWAPPED = {"+": "*", "*": "+", "-": "/", "/": "-", "(": ")", ")": "(", "=": "+"}


@dataclass(frozen=True)
class Decision:
    """One turn of a demonstrator.

    Attributes:
        action: a legal action of the environment.
        reading: the state read aloud, keys as the environment's `reading_fields`; always true.
        thoughts: a short sentence that follows from the reading and does not depend on the action.
    """

    action: str
    reading: Mapping[str, str]
    thoughts: str


Demonstrator = Callable[[gymnasium.Env, np.random.Generator], Decision]


def make_demonstrator(env_id: str, policy: str, flaw_probability: float = 0.6) -> Demonstrator:
    """A demonstrator for one of the four games.

    Args:
        env_id: a key of `GAMES`.
        policy: "expert", "random" (uniform over the legal actions), "flawed" (expert, but at each action the game's
            systematic mistake with `flaw_probability`; "flawed:0.3" sets it here), or a mixture with weights,
            "expert=0.5,flawed:0.3=0.5", of which one member is drawn for each episode.
        flaw_probability: in 0..1.

    Returns:
        A function of the environment (wrapped or not, an episode running) and a generator, its only source of
        randomness. It may serve many environments in turn.

    Raises:
        ValueError: the game or the policy is unknown, or a probability or weight is out of range.
    """
    env_id = env_id.rpartition(":")[2]  # Gymnasium's "module:id" imports the module first
    if env_id not in GAMES:
        raise ValueError(f"no demonstrator for {env_id!r}; there is one for {', '.join(GAMES)}")
    members = _parse_policy(policy, flaw_probability)
    names = [name for name, _, _ in members]
    shares = np.array([weight for _, _, weight in members])
    shares = shares / shares.sum()
    drawn: WeakKeyDictionary[gymnasium.Env, int] = WeakKeyDictionary()

    def demonstrate(env: gymnasium.Env, rng: np.random.Generator) -> Decision:
        if not isinstance(env.unwrapped, GAMES[env_id]):
            raise TypeError(f"this demonstrator plays {env_id}, not {type(env.unwrapped).__name__}")
        game: Any = env.unwrapped
        member = 0
        if len(members) > 1:
            if game.turns == 0 or game not in drawn:
                drawn[game] = int(rng.choice(len(members), p=shares))
            member = drawn[game]
        if names[member] == "random":
            legal: tuple[str, ...] = game.legal_actions
            action = legal[int(rng.integers(len(legal)))]
        elif names[member] == "flawed" and rng.random() < members[member][1]:
            action = mistaken_action(game)
        else:
            action = expert_action(game, repair=names[member] == "expert")
        return Decision(action, game.state_text(), _thoughts(game))

    return demonstrate


def _parse_policy(policy: str, flaw_probability: float) -> list[tuple[str, float, float]]:
    """A policy's members as (name, flaw probability, weight)."""
    members = []
    for part in policy.split(","):
        name, has_weight, weight_text = part.partition("=")
        name, has_flaw, flaw_text = name.strip().partition(":")
        try:
            weight = float(weight_text) if has_weight else 1.0
            flaw = float(flaw_text) if has_flaw else float(flaw_probability)
        except ValueError:
            raise ValueError(f"policy {policy!r}: {part.strip()!r} holds a number that does not parse") from None
        if name not in POLICIES or (has_flaw and name != "flawed"):
            raise ValueError(
                f"policy {policy!r}: {part.strip()!r} is not known; use expert, random, flawed, flawed:0.3, "
                "or a mixture such as expert=0.5,random=0.5"
            )
        if not 0.0 <= flaw <= 1.0:
            raise ValueError(f"policy {policy!r}: the flaw probability must lie in 0..1, not {flaw}")
        if not (math.isfinite(weight) and weight > 0):
            raise ValueError(f"policy {policy!r}: weights must be positive and finite, not {weight}")
        members.append((name, flaw, weight))
    return members


def expert_action(game: Any, repair: bool = True) -> str:
    """The expert's action in a game's present state.

    With `repair` false, a formula that holds a blank counts as spoilt and is ended with `=`, as `flawed` players do.
    """
    if isinstance(game, NumberLine):
        return "+" if game.target > game.current else "-"
    if isinstance(game, PointsGame):
        if BLANK in game.formula and not repair:
            return "="
        entries = [entry for entry in game.formula if entry != BLANK]
        rest = solve(game.values, game.goal, entries, operators=game.operators)
        # The last of `rest` is "=", which takes a turn but no entry.
        return rest[0] if rest is not None and game.turns + len(rest) <= game.max_turns else "="
    if isinstance(game, Blackjack):
        return blackjack_action(*game.total(), card_value(game.dealer[0]))
    raise TypeError(f"no expert for {type(game).__name__}")


def mistaken_action(game: Any) -> str:
    """What the game's systematic mistake makes of the right action; see the list at the top."""
    right = expert_action(game, repair=False)
    if isinstance(game, NumberLine):
        return "-" if right == "+" else "+"
    if isinstance(game, Blackjack):
        return "hit" if right == "stand" else "stand"
    if right in _SWAPPED:
        return _SWAPPED[right]
    return "9" if right == "10" else str(int(right) + 1)


def _thoughts(game: Any) -> str:
    if isinstance(game, NumberLine):
        return f"target is {'higher' if game.target > game.current else 'lower'} than current"
    if isinstance(game, PointsGame):
        # Card by card, so that a small model decides about one card at a time.
        return "unused values: " + ", ".join("_" if value is None else str(value) for value in game.left())
    total, usable = game.total()
    sums = np.cumsum([card_value(rank) for rank in game.player]).tolist()
    hand = f"{'soft' if usable else 'hard'} {total}"
    return f"dealer shows {game.dealer[0]}, cards add up to {', '.join(map(str, sums))}, hand is {hand}"


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
