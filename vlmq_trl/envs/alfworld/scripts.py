# SPDX-License-Identifier: Apache-2.0
"""ALFWorld's scripted players.

- Expert: the shortest plan from the household's true state, made anew at each turn.
- Mistake: absent-minded. It puts down what it holds, picks up something else that lies there, or else goes to the
  receptacle after the right one. A flawed player does not notice at once: in the turn after a mistake it walks on
  without what it put down or with what it picked up, and in a wrong place it acts as if it were the right one.
"""

from __future__ import annotations

from vlmq_trl.envs.alfworld.env import ALFWorld
from vlmq_trl.envs.alfworld.memory import by_number
from vlmq_trl.envs.alfworld.planner import plan
from vlmq_trl.envs.base import Script

_IDLE = "look"


def _undoes(command: str, last: str) -> bool:
    """Whether a command takes up what the last one put down, or the reverse."""
    verb, _, rest = command.partition(" ")
    last_verb, _, last_rest = last.partition(" ")
    if (last_verb, verb) == ("move", "take"):
        return last_rest.split(" to ") == rest.split(" from ")
    return (last_verb, verb) == ("take", "move") and last_rest.split(" from ") == rest.split(" to ")


def _kind(name: str) -> str:
    """Of an object or receptacle: "mug" of "mug 1"."""
    return name.rpartition(" ")[0]


class ALFWorldScript(Script):
    env: ALFWorld

    def _plan(self) -> list[str]:
        return plan(self.env.game, self.env.facts()) or [_IDLE]

    def _admissible(self, *verbs: str) -> list[str]:
        """The admissible commands with these verbs, verb by verb."""
        legal = self.env.legal_actions or ()
        return [command for verb in verbs for command in legal if command.startswith(f"{verb} ")]

    def expert(self) -> str:
        return self._plan()[0]

    def mistake(self) -> str:
        right = self.expert()
        at_hand = [command for command in self._admissible("move", "take") if command != right]
        return at_hand[0] if at_hand else self._next_place(right)

    def _next_place(self, right: str) -> str:
        """Going to the receptacle that follows, by name, the right one, or else the one where the agent stands."""
        here = f"go to {self.env.memory.here[0]}" if self.env.memory.here else ""
        gone_from = right if right.startswith("go ") else here
        others = [command for command in self._admissible("go") if command != right]
        return min(others, key=lambda command: (command <= gone_from, command), default=_IDLE)

    def unmistaken(self) -> str:
        commands = self._plan()
        right, last = commands[0], self.env.played[-1] if self.env.played else ""
        if _undoes(right, last):
            return next((c for c in commands if c.startswith("go ")), self._next_place(right))
        if last.startswith("go ") and right.startswith("go "):  # no shortest plan goes twice
            return next(iter(self._admissible("move", "open", "take")), right)
        return right

    def thoughts(self) -> str:
        """Whether the agent is where the wanted object belongs (in Look, where the lamp is), and where that object is:
        "shelf here, mug 1 carried", "shelf elsewhere, mug 1 here" or "shelf elsewhere, mug out of sight".

        Names come first, and the object's number only where it is seen: what follows can be looked up by the name.
        """
        game, memory = self.env.game, self.env.memory
        sight = sorted(memory.in_sight(), key=by_number)
        goal = game.place or game.lamp
        there = goal in map(_kind, (*memory.here, *sight))
        status = f"{game.target} out of sight"
        if _kind(memory.carrying) == game.target:
            status = f"{memory.carrying} carried"
        elif seen := [thing for thing in sight if _kind(thing) == game.target]:
            status = f"{seen[0]} here"
        return f"{goal} {'here' if there else 'elsewhere'}, {status}"
