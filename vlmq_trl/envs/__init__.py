# SPDX-License-Identifier: Apache-2.0
"""Gymnasium environments that are acted on with strings; importing this package registers them.

- `DOMAINS`: what there is and what it needs; `python -m vlmq_trl.envs` prints it
- `VLMAgentWrapper`: makes a task for a VLM of any Gymnasium environment that gives pictures
- `TextActionEnv`: the base class for environments of your own
- `make_demonstrator`: expert, random, flawed and mixed play
"""

from __future__ import annotations

from vlmq_trl.envs import alfworld, babyai, gym_cards, miniwob
from vlmq_trl.envs.base import SUCCESS_RULE, Script, TextActionEnv
from vlmq_trl.envs.demonstrators import Decision, Demonstrator, make_demonstrator
from vlmq_trl.envs.domain import Domain, EnvEntry, install_line
from vlmq_trl.envs.gym_cards import Blackjack, EZPoints, NumberLine, Points24, evaluate_formula, solve
from vlmq_trl.envs.wrapper import VLMAgentWrapper

DOMAINS: tuple[Domain, ...] = (gym_cards.DOMAIN, babyai.DOMAIN, miniwob.DOMAIN, alfworld.DOMAIN)


def register_envs() -> None:
    """Registers the environments with Gymnasium; may be called again. The `gymnasium.envs` entry point."""
    for domain in DOMAINS:
        domain.register()


register_envs()

__all__ = [
    "DOMAINS",
    "SUCCESS_RULE",
    "Blackjack",
    "Decision",
    "Demonstrator",
    "Domain",
    "EZPoints",
    "EnvEntry",
    "NumberLine",
    "Points24",
    "Script",
    "TextActionEnv",
    "VLMAgentWrapper",
    "evaluate_formula",
    "install_line",
    "make_demonstrator",
    "register_envs",
    "solve",
]
