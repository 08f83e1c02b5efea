# SPDX-License-Identifier: Apache-2.0
"""BabyAI's levels as an environment with words for actions. `minigrid` is imported when one is made."""

from __future__ import annotations

import logging
from typing import Any

import gymnasium
import numpy as np
from numpy.typing import NDArray

from vlmq_trl.envs.base import OnInvalid, Script, TextActionEnv

logger = logging.getLogger(__name__)

ACTIONS = ("turn left", "turn right", "go forward", "pick up", "drop", "toggle", "done")  # in minigrid's order
VIEWS = {"partial": "what lies ahead of you", "full": "all rooms"}
FACING = ("right", "down", "left", "up")  # in minigrid's order
NOT_AN_ACTION = "That is not one of the actions."

Seen = list[tuple[Any, int, int]]  # object, cells ahead of (in the full view: above) the agent, cells to the right


class BabyAI(TextActionEnv):
    """A level of BabyAI (arXiv 1810.08272) as `minigrid` has it: a mission in words, in rooms seen from above.

    A level's rules, rewards and episodes are minigrid's: equal seeds give the episodes of minigrid's own environment.
    Success gives 1 - 0.9 * turns / max_turns and ends the episode, everything else 0. A turn lost to an invalid action
    counts as a turn there too.

    Attributes:
        game: minigrid's environment.
        taken: minigrid's number of the action that the last turn executed; None for none.

    Args:
        level: one of `vlmq_trl.envs.babyai.LEVELS`, such as "GoToLocal".
        view: what the picture shows, "partial" (the 7 x 7 cells ahead of the agent, as far as walls and doors let it
            see; it stands in the middle of the lowest row and faces up) or "full" (all rooms; what the agent sees is
            lighter). In both, what the agent carries lies under it.
        tile_size: pixels of a cell's side, 8 or more. The partial view has 7 * tile_size pixels on each side.
        effects: show in the observation's "text" what the last action did, as far as the agent can notice it.
        max_turns: turns after which an episode is truncated, in place of the level's own limit.
        render_mode, invalid_penalty, on_invalid: as in `TextActionEnv`.

    Raises:
        ImportError: minigrid is not installed; says how to install it.
        ValueError: a setting is not as above.
    """

    def __init__(
        self,
        level: str = "GoToLocal",
        view: str = "partial",
        tile_size: int = 32,
        effects: bool = False,
        max_turns: int | None = None,
        render_mode: str | None = None,
        invalid_penalty: float = 0.0,
        on_invalid: OnInvalid = "noop",
    ) -> None:
        if view not in VIEWS:
            raise ValueError(f"BabyAI: view must be one of {', '.join(VIEWS)}, not {view!r}")
        if tile_size < 8:
            raise ValueError(f"BabyAI: tile_size must be at least 8 pixels, not {tile_size!r}")
        if max_turns is not None and max_turns < 1:
            raise ValueError(f"BabyAI: max_turns must be at least 1, or None for the level's own, not {max_turns!r}")
        self.game = _make_game(level, {} if max_turns is None else {"max_steps": max_turns})
        self.level, self.view, self.tile_size, self.effects = level, view, int(tile_size), effects
        self.legal_actions = ACTIONS if _done_is_needed() else ACTIONS[:-1]
        cells = (self.game.height, self.game.width) if view == "full" else (self.game.agent_view_size,) * 2
        self.picture_size = (cells[0] * self.tile_size, cells[1] * self.tile_size)
        self.text_length = 120 if effects else 0
        self.reading_fields = (("facing",) if view == "full" else ()) + ("in front", "carrying", "seen")
        self.task = ""  # each episode has its own
        self.max_turns = max_turns
        self.taken: int | None = None
        self._effect = ""
        super().__init__(render_mode, invalid_penalty, on_invalid)

    def _task(self, mission: str) -> str:
        return (
            f"Your mission: {mission}. The picture shows {VIEWS[self.view]}; you are the red triangle. "
            f"Actions: {', '.join(self.legal_actions or ())}."
        )

    def _start(self, options: dict[str, Any], seed: int | None) -> None:
        self.game.reset(seed=seed)
        self.max_turns = self.game.max_steps
        self.task = self._task(self.game.mission)
        self.taken, self._effect = None, ""

    def step(self, action: str) -> Any:
        self.taken, self._effect = None, NOT_AN_ACTION
        return super().step(action)

    def _play(self, action: str) -> tuple[float, bool, bool]:
        game = self.game
        game.step_count = self.turns - 1  # turns with invalid actions count
        before = (game.grid.get(*game.front_pos), game.carrying, tuple(game.agent_pos))
        self.taken = ACTIONS.index(action)
        _, reward, terminated, truncated, _ = game.step(self.taken)
        self._effect = self._effect_of(action, *before)
        return float(reward), terminated, truncated and not terminated

    def _effect_of(self, action: str, front: Any, carried: Any, stood: tuple[int, int]) -> str:
        """What the agent notices of the action that was just played, given what was before it."""
        game = self.game
        if action.startswith("turn"):
            return f"You turned {action.removeprefix('turn ')}."
        if action == "go forward":
            return "You moved forward." if tuple(game.agent_pos) != stood else "The way is blocked."
        if action == "drop":
            if carried is None:
                return "You carry nothing."
            return f"You dropped the {_kind(carried)}." if game.carrying is None else "There is no room to drop it."
        if action == "done":
            return "You said that you are done."
        if front is None:
            return f"There is nothing to {action}."
        if action == "pick up":
            if game.carrying is front:
                return f"You picked up the {_kind(front)}."
            return "You carry something already." if front.can_pickup() else "That cannot be picked up."
        if front.type == "door":
            opened = "opened" if front.is_open else "closed"
            return f"The {_kind(front)} is locked." if front.is_locked else f"You {opened} the {_kind(front)}."
        if front.type == "box":
            inside = f"A {_kind(front.contains)} was inside." if front.contains else "It was empty."
            return f"You opened the {_kind(front)}. {inside}"
        return "Nothing happened."

    def _text(self) -> str:
        return self._effect

    def _picture(self) -> NDArray[np.uint8]:
        game = self.game
        if self.view == "partial":
            return game.get_pov_render(self.tile_size)
        below = game.grid.get(*game.agent_pos)
        game.grid.set(*game.agent_pos, game.carrying or below)
        try:
            return game.get_full_render(True, self.tile_size)
        finally:
            game.grid.set(*game.agent_pos, below)

    def seen(self) -> Seen:
        """The objects that the picture shows, walls left out.

        The partial view's come row by row from the nearest, each from left to right; the full view's from the top.
        """
        if self.view == "full":
            x, y = self.game.agent_pos
            cells = [
                (self.game.grid.get(i, j), y - j, i - x)
                for j in range(self.game.height)
                for i in range(self.game.width)
            ]
        else:
            grid, visible = self.game.gen_obs_grid()
            cells = [
                (grid.get(i, j) if visible[i, j] else None, grid.height - 1 - j, i - grid.width // 2)
                for j in reversed(range(grid.height))
                for i in range(grid.width)
            ]
        return [cell for cell in cells if cell[0] is not None and cell[0].type != "wall" and cell[1:] != (0, 0)]

    def where(self, forward: int, right: int) -> str:
        """A place relative to the agent, such as "2 ahead 1 left", in the full view "2 up 1 left"."""
        along = ("up", "down") if self.view == "full" else ("ahead", "behind")
        parts = [(forward, *along), (right, "right", "left")]
        return " ".join(f"{abs(cells)} {plus if cells > 0 else minus}" for cells, plus, minus in parts if cells)

    def state_text(self) -> dict[str, str]:
        game = self.game
        seen = [f"{describe(thing)} {self.where(forward, right)}" for thing, forward, right in self.seen()]
        reading = {
            "facing": FACING[game.agent_dir],
            "in front": describe(game.grid.get(*game.front_pos)),
            "carrying": describe(game.carrying),
            "seen": ", ".join(seen) or "nothing",
        }
        return {field: reading[field] for field in self.reading_fields}

    def _make_script(self) -> Script:
        from vlmq_trl.envs.babyai.script import BabyAIScript

        return BabyAIScript(self)

    def close(self) -> None:
        self.game.close()


def describe(thing: Any) -> str:
    """An object in words: "red ball", "locked blue door", "wall"; "nothing" for None."""
    if thing is None:
        return "nothing"
    if thing.type == "door":
        return f"{'open' if thing.is_open else 'locked' if thing.is_locked else 'closed'} {_kind(thing)}"
    return thing.type if thing.type == "wall" else _kind(thing)


def _kind(thing: Any) -> str:
    return f"{thing.color} {thing.type}"


def _make_game(level: str, settings: dict[str, Any]) -> Any:
    """minigrid's environment of a level."""
    from vlmq_trl.envs.babyai import DOMAIN

    DOMAIN.require()
    import minigrid  # noqa: F401  registers the levels
    from minigrid.envs.babyai.core import roomgrid_level

    # minigrid prints each draw of a level that it rejects.
    vars(roomgrid_level)["print"] = lambda *words: logger.debug(" ".join(map(str, words)))
    ids = [env_id for env_id in gymnasium.registry if env_id.rpartition("-v")[0] == f"BabyAI-{level}"]
    if not ids:
        raise ValueError(f"BabyAI: minigrid has no level {level!r}; `vlmq_trl.envs.babyai.LEVELS` lists them")
    return gymnasium.make(ids[-1], disable_env_checker=True, **settings).unwrapped


def _done_is_needed() -> bool:
    """Whether minigrid ends a mission only when the agent says "done" (by the variable BABYAI_DONE_ACTIONS)."""
    from minigrid.envs.babyai.core import verifier

    return bool(verifier.use_done_actions)
