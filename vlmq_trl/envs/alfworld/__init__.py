# SPDX-License-Identifier: Apache-2.0
"""ALFWorld (arXiv 2010.03768): household tasks by text commands, from its data set or in households of our own.

`games` has the games, `engine` plays them by TextWorld, `memory` holds what the agent has observed, `picture` draws
that, `env` is the environment, `scripts` the scripted players.
"""

from vlmq_trl.envs.alfworld.games import TASKS
from vlmq_trl.envs.domain import Domain, EnvEntry

DOMAIN = Domain(
    name="ALFWorld",
    summary="household tasks by text commands, with a drawing of what has been seen",
    envs={
        f"vlmq_trl/ALFWorld{suffix}-v0": EnvEntry("vlmq_trl.envs.alfworld.env:ALFWorld", {"task": task})
        for suffix, task in (*((f"-{task}", task) for task in TASKS), ("", None))
    },
    extra="alfworld",
    modules=("alfworld", "textworld"),
)

__all__ = ["DOMAIN", "TASKS"]
