# SPDX-License-Identifier: Apache-2.0
"""ALFWorld as a task for a vision-language model: text commands in a household, and a drawing of what was seen."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vlmq_trl.envs.alfworld import picture as drawing
from vlmq_trl.envs.alfworld.engine import NOTHING, Engine
from vlmq_trl.envs.alfworld.games import SIZES, SPLITS, TASKS, Game, data_folder, find_games, make_game, read_game
from vlmq_trl.envs.alfworld.memory import Memory
from vlmq_trl.envs.base import MAX_ACTION_LENGTH, Observation, OnInvalid, Script, TextActionEnv

OWN = "own"
_HOW = "Act with one of the commands listed."
_COMMANDS = (
    "Commands: go to (receptacle), open (receptacle), close (receptacle), take (object) from (receptacle), "
    "move (object) to (receptacle), use (lamp), heat (object) with (receptacle), clean (object) with (receptacle), "
    "cool (object) with (receptacle), slice (object) with (object), examine (thing), inventory, look."
)
_PUT = re.compile(r"put (.+) (?:in/on|into|onto|in|on) (.+)")  # as ALFWorld's commands once were


class ALFWorld(TextActionEnv):
    """A household task: find things, heat, cool or clean them, and bring them where they belong.

    The observation's text is ALFWorld's answer to the last command; the picture shows all that was seen so far and
    nothing else. An action is one of ALFWorld's commands; one that is not admissible changes nothing ("Nothing
    happens."). The reward is 1 when the goal is reached, which ends the episode; else 0.

    Args:
        task: one of `TASKS` ("Pick", "Look", "Clean", "Heat", "Cool", "Pick2"); None draws one for each episode.
        data: the folder of ALFWorld's data set, or "own" for small households made from the seed. None takes the
            folder that ALFWORLD_DATA names, or `~/.cache/alfworld`; without a data set, own households.
        split: of the data set: "train", "valid_seen" or "valid_unseen".
        size: of own households: "small" (5 to 7 receptacles), "medium" (8 to 10) or "large" (12 to 15).
        admissible: the text lists the admissible commands.
        unseen: the text and the reading list the receptacles whose inside was not seen yet, as the picture shows them:
            for agents that have neither a picture nor a memory, or read text better.
        picture: False leaves the picture out.
        frames: takes the place of the drawing: a function of this environment that returns uint8 [300, 300, 3], asked
            at each reset and after each turn, such as one that drives ai2thor along.
        max_turns: turns after which an episode is truncated; None: never.
        render_mode, invalid_penalty, on_invalid: as in `TextActionEnv`. Keep invalid_penalty * max_turns below 1.

    `reset(options={"game": game})` plays a `Game` of one's own.

    Raises:
        ImportError: ALFWorld is not installed; says how to install it.
        ValueError: a bad argument, or there are no games in the folder.

    Attributes:
        game: the running game.
        memory: what was observed.
        played: the commands that were executed in the episode.
        folder: of the data set; None for own households.
    """

    reading_fields: tuple[str, ...] = ("location", "carrying", "visible")
    reset_options = ("game",)
    text_length = 8192

    def __init__(
        self,
        task: str | None = None,
        data: str | None = None,
        split: str = "train",
        size: str = "small",
        admissible: bool = True,
        unseen: bool = False,
        picture: bool = True,
        frames: Callable[[ALFWorld], NDArray[np.uint8]] | None = None,
        max_turns: int | None = 50,
        render_mode: str | None = None,
        invalid_penalty: float = 0.01,
        on_invalid: OnInvalid = "noop",
    ) -> None:
        from vlmq_trl.envs.alfworld import DOMAIN

        for name, value, known in (("task", task, (*TASKS, None)), ("split", split, SPLITS), ("size", size, SIZES)):
            if value not in known:
                raise ValueError(f"ALFWorld: {name} must be one of {', '.join(map(str, known))}, not {value!r}")
        if max_turns is not None and max_turns < 1:
            raise ValueError(f"ALFWorld: max_turns must be at least 1, or None, not {max_turns}")
        if frames is not None and not picture:
            raise ValueError("ALFWorld: frames gives pictures, so picture must not be False")
        DOMAIN.require()
        self.task_name, self.size, self.admissible, self.frames = task, size, admissible, frames
        self.unseen, self.max_turns = unseen, max_turns
        if unseen:
            self.reading_fields = (*self.reading_fields, "unseen")
        self.picture_size = (drawing.SIZE, drawing.SIZE) if picture else None
        super().__init__(render_mode, invalid_penalty, on_invalid)
        self.folder = data_folder() if data is None else None if data == OWN else str(data)
        self._games = None if self.folder is None else find_games(self.folder, split)
        if self._games is not None and task is not None and not self._games[task]:
            raise ValueError(f"ALFWorld: no game of the task {task} under {self.folder}/json_2.1.1/{split}")
        self.task = _HOW if admissible else _COMMANDS
        self._engine: Engine | None = None
        self._feedback = ""
        self.played: list[str] = []

    def _draw_game(self) -> Game:
        """The next game; one without a solution is passed over."""
        tasks = [task for task in TASKS if self._games is None or self._games[task]]
        while True:
            task = self.task_name or tasks[int(self.np_random.integers(len(tasks)))]
            if self._games is None:
                return make_game(self.np_random, task, self.size)
            paths = self._games[task]
            game = read_game(paths[int(self.np_random.integers(len(paths)))])
            if game is not None:
                return game

    def _start(self, options: dict[str, Any], seed: int | None) -> None:
        game = options["game"] if "game" in options else self._draw_game()
        if not isinstance(game, Game):
            raise TypeError(f"ALFWorld.reset: game must be a Game, not {type(game).__name__}")
        self.game = game
        if self._engine is None:
            self._engine = Engine()
        self._engine.load(self.game)
        self.memory = Memory(self._engine.facts())
        self.played = []
        self.task = f"Your task is to: {self.game.goal}. {_HOW if self.admissible else _COMMANDS}"
        self._take_in()

    def _take_in(self) -> None:
        assert self._engine is not None
        self.legal_actions = self._engine.commands
        self._feedback = self._engine.feedback

    def facts(self) -> list[tuple[str, ...]]:
        """All that is true of the household, seen or not: (predicate, name, ...)."""
        assert self._engine is not None, "no episode has begun"
        return self._engine.facts()

    def parse_env(self, action: Any) -> str | None:
        """The admissible command; "put mug 1 in/on shelf 2" is taken for "move mug 1 to shelf 2"."""
        short = action.strip().lower() if isinstance(action, str) and len(action) <= MAX_ACTION_LENGTH else ""
        if put := _PUT.fullmatch(short):
            action = f"move {put.group(1)} to {put.group(2)}"
        return super().parse_env(action)

    def step(self, action: str) -> tuple[Observation, Any, bool, bool, dict[str, Any]]:
        self._feedback = NOTHING  # unless a command is played
        return super().step(action)

    def _play(self, action: str) -> tuple[float, bool, bool]:
        assert self._engine is not None
        event = self._engine.play(action)
        self.memory.update(event, self._engine.facts())
        self.played.append(action)
        self._take_in()
        return (1.0, True, False) if self._engine.won else (0.0, False, False)

    def _text(self) -> str:
        unseen = f"\nNot seen yet: {self._unseen()}." if self.unseen else ""
        listed = f"\nCommands: {'; '.join(self.legal_actions or ())}." if self.admissible else ""
        return (self._feedback + unseen + listed)[: self.text_length]

    def _unseen(self) -> str:
        return "; ".join(self.memory.unseen()) or "nothing"

    def _picture(self) -> NDArray[np.uint8]:
        if self.frames is None:
            return drawing.draw(self.memory)
        frame = np.array(self.frames(self))
        if frame.dtype != np.uint8 or frame.shape != (drawing.SIZE, drawing.SIZE, 3):
            raise ValueError(f"frames must return uint8 [300, 300, 3], not {frame.dtype} of shape {list(frame.shape)}")
        return frame

    def state_text(self) -> dict[str, str]:
        return {**self.memory.reading(), **({"unseen": self._unseen()} if self.unseen else {})}

    def _make_script(self) -> Script:
        from vlmq_trl.envs.alfworld.scripts import ALFWorldScript

        return ALFWorldScript(self)

    def close(self) -> None:
        """Unloads the engine's library; no file and no process is left."""
        if self._engine is not None:
            self._engine.close()
            self._engine = None
        self._running = False
