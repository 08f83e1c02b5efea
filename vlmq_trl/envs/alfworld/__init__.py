# SPDX-License-Identifier: Apache-2.0
"""ALFWorld (arXiv 2010.03768): household tasks by text commands, from its data set or in households of our own.

`games` has the games, `engine` plays them by TextWorld, `memory` holds what the agent has observed, `picture` draws
that, `env` is the environment, `planner` finds the way to a goal, `scripts` has the scripted players.
"""

from vlmq_trl.envs.alfworld.env import ALFWorld
from vlmq_trl.envs.alfworld.games import SIZES, TASKS, Game, make_game, read_game, write_game
from vlmq_trl.envs.domain import Domain, EnvEntry

DOMAIN = Domain(
    name="ALFWorld",
    summary="household tasks by text commands, with a drawing of what has been seen",
    envs={
        f"vlmq_trl/ALFWorld{suffix}-v0": EnvEntry(f"{ALFWorld.__module__}:ALFWorld", {"task": task})
        for suffix, task in (*((f"-{task}", task) for task in TASKS), ("", None))
    },
    extra="alfworld",
    modules=("alfworld", "textworld"),
)

__all__ = ["DOMAIN", "SIZES", "TASKS", "ALFWorld", "Game", "make_game", "read_game", "write_game"]
