# SPDX-License-Identifier: Apache-2.0
"""Scripted play of BabyAI: minigrid's `BabyAIBot`, bounded, and told what was really played.

The bot keeps a stack of subgoals and thinks until the uppermost one names an action. It goes round for ever where the
nearest locked door is one whose key it has not seen: to open the door it wants the key, to find the key it explores,
and to explore it opens that same door; each round adds subgoals. So a turn may look at `MAX_SUBGOALS` of them; more is
an error. After an error, or when the bot takes an unfinished mission for done, it plans anew from the present state,
and if that fails too, after a detour: through a locked door whose key it has seen, or to a box with something in it.
If nothing helps (some levels lock a key into the room that it opens), the expert wanders, and asks the bot again after
1, 2, 4, ... turns.

The systematic mistake mixes up left and right, and walking and handling: it goes forward where something is to be
picked up, dropped or toggled, and picks up where the right action is to go forward.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from vlmq_trl.envs.babyai.game import ACTIONS, BabyAI, describe
from vlmq_trl.envs.base import Script

MAX_SUBGOALS = 25  # play that gets somewhere was seen to need 9

_MISTAKEN = {
    "turn left": "turn right",
    "turn right": "turn left",
    "go forward": "pick up",
    "pick up": "go forward",
    "drop": "go forward",
    "toggle": "go forward",
    "done": "go forward",
}
_WANDER = ("go forward", "go forward", "turn left", "turn right")


class BabyAIScript(Script):
    env: BabyAI

    def __init__(self, env: BabyAI):
        super().__init__(env)
        self._bot: Any = None
        self._followed = False  # whether the bot gave the last answer, and so can go on from there
        self._turn = -1  # the turn that was last asked about, and the answer
        self._answer = ""
        self._rest = 0  # turns to wander before the bot is asked again, and when those are over
        self._ask_again = 0
        self._dice = np.random.default_rng(0)

    def expert(self) -> str:
        turn = self.env.turns
        if self._turn != turn:
            action = None
            if turn >= self._ask_again:
                action = self._ask_bot(self._followed and self._turn == turn - 1)
                self._rest = 0 if action else max(1, 2 * self._rest)
                self._ask_again = turn + self._rest
            self._followed = action is not None
            self._answer = action or _WANDER[int(self._dice.integers(len(_WANDER)))]
            self._turn = turn
        return self._answer

    def mistake(self) -> str:
        return _MISTAKEN[self.expert()]

    def thoughts(self) -> str:
        """What the mission is about at present, and where it is seen."""
        parts = _left_to_do(self.env.game.instrs)
        return "; ".join(self._sighting(target) for target in _targets(parts[0])) if parts else ""

    def _sighting(self, target: Any) -> str:
        env = self.env
        if any(env.game.carrying is thing for thing in target.obj_set):
            return f"{describe(env.game.carrying)} carried"
        seen = [found for found in env.seen() if any(found[0] is thing for thing in target.obj_set)]
        if not seen:
            return " ".join(word for word in ("no", target.color, target.type or "object", "in view") if word)
        thing, forward, right = min(seen, key=lambda found: abs(found[1]) + abs(found[2]))
        return f"{describe(thing)} {env.where(forward, right)}"

    def _ask_bot(self, follow: bool) -> str | None:
        """The bot's action: with its plan if it can follow that, else with a new one; None if it has none."""
        for taken in self._plans(follow):
            self._bot.stack.looked = 0
            try:
                action = ACTIONS[self._bot.replan(taken)]
            except Exception:  # it guards most of its assumptions by assertions, and some not at all
                continue
            if action in (self.env.legal_actions or ()):
                return action
        return None

    def _plans(self, follow: bool) -> Iterator[int | None]:
        """Prepares the bot in one way after another; yields what it is to be told was played."""
        if follow:
            yield ACTIONS.index("done") if self.env.taken is None else self.env.taken  # "done" does nothing either
        self._plan_mission()
        yield None
        self._plan_mission()
        if self._add_detour():
            yield None

    def _plan_mission(self) -> None:
        """A new bot, which knows what the one before it saw and what of the mission is left to do."""
        from minigrid.utils import baby_ai_bot as bots

        game = self.env.game
        bot = bots.BabyAIBot(game)
        if self._bot is not None:
            bot.vis_mask |= self._bot.vis_mask
        self._bot, bot.stack = bot, _Stack()
        bot._process_obs()
        parts = _left_to_do(game.instrs)
        for part in reversed(parts):
            bot._process_instr(part)
        if game.carrying is None or not isinstance(bot.stack[-2:][0], bots.PickupSubgoal):
            return
        if len(_targets(parts[0])) == 2 and any(game.carrying is thing for thing in parts[0].desc_move.obj_set):
            del bot.stack[-2:]  # it has what it was to fetch
        else:  # it takes its hands for free
            bot.stack += [bots.DropSubgoal(bot), bots.GoNextToSubgoal(bot, bot._find_drop_pos())]

    def _add_detour(self) -> bool:
        """Puts a way to new things before the plan, if the bot has seen one: a door and its key, or a box."""
        from minigrid.utils import baby_ai_bot as bots

        game, bot = self.env.game, self._bot
        places = [(int(x), int(y)) for x, y in zip(*bot.vis_mask.nonzero(), strict=True)]
        known = {place: thing for place in places if (thing := game.grid.get(*place)) is not None}
        keys = {thing.color for thing in (*known.values(), game.carrying) if thing is not None and thing.type == "key"}
        for place, thing in known.items():
            if thing.type == "door" and thing.is_locked and thing.color in keys:
                bot.stack += [bots.OpenSubgoal(bot), bots.GoNextToSubgoal(bot, thing, reason="Open")]
                return True
            if thing.type == "box" and thing.contains is not None:
                bot.stack += [_OpenBox(bot), bots.GoNextToSubgoal(bot, place)]
                return True
        return False


class _Stack(list):
    """The bot's subgoals, which it looks at one by one."""

    looked = 0

    def __getitem__(self, index: Any) -> Any:
        self.looked += 1
        if self.looked > MAX_SUBGOALS:
            raise RuntimeError(f"BabyAIBot: no action after {MAX_SUBGOALS} subgoals")
        return super().__getitem__(index)


class _OpenBox:
    """A subgoal as the bot's own, which has none for boxes: opens the box ahead. The bot then gives up its plan."""

    def __init__(self, bot: Any):
        self.bot = bot

    def update_agent_attributes(self) -> None:
        """It needs none."""

    def is_exploratory(self) -> bool:
        return False

    def replan_before_action(self) -> int:
        return ACTIONS.index("toggle")

    def replan_after_action(self, taken: int | None) -> None:
        """A wrong turn is another plan's business."""
        self.bot.stack.pop()


def _left_to_do(instruction: Any) -> list[Any]:
    """The parts of a mission that are not done, in the order in which they are to be done."""
    if not hasattr(instruction, "instr_a"):
        return [instruction]
    parts = [(instruction.instr_a, instruction.a_done), (instruction.instr_b, instruction.b_done)]
    if type(instruction).__name__ == "AfterInstr":
        parts.reverse()
    return [left for part, done in parts if done != "success" for left in _left_to_do(part)]


def _targets(part: Any) -> list[Any]:
    """The descriptions of objects in a part of a mission: one, or the moved and the fixed one."""
    return [part.desc] if hasattr(part, "desc") else [part.desc_move, part.desc_fixed]
