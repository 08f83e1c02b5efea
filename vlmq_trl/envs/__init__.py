# SPDX-License-Identifier: Apache-2.0
"""Gymnasium environments that are acted on with strings; importing this package registers them.

- `vlmq_trl/NumberLine-v0`, `vlmq_trl/EZPoints-v0`, `vlmq_trl/Points24-v0`, `vlmq_trl/Blackjack-v0`: `gym_cards`
- `TextActionEnv`: the base class for environments of your own
- `make_demonstrator`: expert, random, flawed and mixed play for the four games
"""

from __future__ import annotations

import gymnasium

from vlmq_trl.envs.base import SUCCESS_RULE, TextActionEnv
from vlmq_trl.envs.demonstrators import Decision, Demonstrator, make_demonstrator
from vlmq_trl.envs.formula import evaluate_formula, solve
from vlmq_trl.envs.gym_cards import Blackjack, EZPoints, NumberLine, Points24

ENV_IDS = {
    "vlmq_trl/NumberLine-v0": NumberLine,
    "vlmq_trl/EZPoints-v0": EZPoints,
    "vlmq_trl/Points24-v0": Points24,
    "vlmq_trl/Blackjack-v0": Blackjack,
}


def register_envs() -> None:
    """Registers the environments with Gymnasium; may be called again. The `gymnasium.envs` entry point."""
    for env_id, cls in ENV_IDS.items():
        if env_id not in gymnasium.registry:
            gymnasium.register(env_id, entry_point=f"{cls.__module__}:{cls.__qualname__}")


register_envs()

__all__ = [
    "ENV_IDS",
    "SUCCESS_RULE",
    "Blackjack",
    "Decision",
    "Demonstrator",
    "EZPoints",
    "NumberLine",
    "Points24",
    "TextActionEnv",
    "evaluate_formula",
    "make_demonstrator",
    "register_envs",
    "solve",
]
