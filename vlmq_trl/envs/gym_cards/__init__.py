# SPDX-License-Identifier: Apache-2.0
"""Gym Cards: the four games of RL4VLM (arXiv 2405.10292). `games` has the rules, `scripts` the scripted players."""

from vlmq_trl.envs.domain import Domain, EnvEntry
from vlmq_trl.envs.gym_cards.formula import evaluate_formula, solve
from vlmq_trl.envs.gym_cards.games import (
    NUMBERS,
    RANKS,
    Blackjack,
    EZPoints,
    NumberLine,
    Points24,
    PointsGame,
    card_value,
    hand_total,
)

DOMAIN = Domain(
    name="Gym Cards",
    summary="RL4VLM's card and number games, seen as pictures",
    envs={
        f"vlmq_trl/{game.__name__}-v0": EnvEntry(f"{game.__module__}:{game.__name__}")
        for game in (NumberLine, EZPoints, Points24, Blackjack)
    },
)

__all__ = [
    "DOMAIN",
    "NUMBERS",
    "RANKS",
    "Blackjack",
    "EZPoints",
    "NumberLine",
    "Points24",
    "PointsGame",
    "card_value",
    "evaluate_formula",
    "hand_total",
    "solve",
]
