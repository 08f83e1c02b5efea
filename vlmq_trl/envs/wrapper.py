# SPDX-License-Identifier: Apache-2.0
"""Any Gymnasium environment that gives pictures, as a task for a vision-language model."""

from __future__ import annotations

import copy
import string
import warnings
from collections.abc import Callable, Mapping
from typing import Any, SupportsFloat

import gymnasium
import numpy as np
from gymnasium import spaces
from gymnasium.spaces.text import alphanumeric
from gymnasium.wrappers import TimeLimit
from numpy.typing import NDArray

from vlmq_trl.envs.base import MAX_TURNS, Observation, OnInvalid, TextActionEnv, check_counts, checked_reward

TaskOf = Callable[[gymnasium.Env, Any], str]
TextOf = Callable[[gymnasium.Env, Any, dict[str, Any]], str]
PictureOf = Callable[[gymnasium.Env, Any], NDArray[np.uint8]]

RESET = ("observation", "info")
STEP = ("observation", "reward", "terminated", "truncated", "info")


class VLMAgentWrapper(TextActionEnv):
    """A Gymnasium environment, acted on with words and seen as pictures.

        env = VLMAgentWrapper(
            gymnasium.make("FrozenLake-v1", render_mode="rgb_array"),
            actions={"left": 0, "down": 1, "right": 2, "up": 3},
            task="Reach the gift without falling into a hole.",
        )

    `reset` hands seed and options on, so that equal seeds give the episodes that they give without the wrapper;
    `terminated` and `truncated` are the environment's own, and so is what `info` has beside "valid" and "action"
    (which is nothing where no action was executed). Success is a positive return, as everywhere.

    Args:
        env: the environment. It renders "rgb_array", unless `picture` is given.
        actions: words for the actions of a discrete space, or for any other actions; None hands the model's string to
            the environment, whose action space is then `spaces.Text`. A blank string is never an action.
        task: what to do, for the prompt, or a function (environment, its first observation) -> that, asked at each
            reset; the actions are listed behind it.
        text: (environment, its observation, its info) -> text shown beside the picture; None shows none.
        text_length: the longest such text, in characters; longer ones lose their end.
        picture: (environment, its observation) -> uint8 [H, W, 3], all of one size; None takes `env.render()`.
            "observation" takes the observation itself.
        frame_skip: how often the action is repeated, rewards added; 1 for turn-based environments.
        max_turns: turns after which an episode is truncated. The environment's own limit counts the actions that reach
            it, so that invalid ones alone would never end an episode. None takes that limit, if it is a `TimeLimit`
            (100 steps are 25 turns of 4 frames each), else 1000 turns.
        invalid_penalty, on_invalid: as in `TextActionEnv`. The penalty is 0 here: what is little beside a reward
            depends on the environment, and large ones make a failure of an episode that reached its goal.

    Raises:
        TypeError, ValueError: an argument does not fit the environment, or the environment does not keep to
            Gymnasium's interface (from `reset` and `step`, too); says which and why.
    """

    reset_options = None  # the environment's own

    def __init__(
        self,
        env: gymnasium.Env,
        actions: Mapping[str, Any] | None = None,
        task: str | TaskOf = "",
        *,
        text: TextOf | None = None,
        text_length: int = 4096,
        picture: PictureOf | str | None = None,
        frame_skip: int = 1,
        max_turns: int | None = None,
        render_mode: str | None = "rgb_array",
        invalid_penalty: float = 0.0,
        on_invalid: OnInvalid = "noop",
    ) -> None:
        if isinstance(env, gymnasium.vector.VectorEnv):
            raise TypeError(
                f"VLMAgentWrapper wraps a single environment, got {type(env).__name__}; make one with gymnasium.make "
                "(`num_envs` of `play_episodes` plays several)"
            )
        if isinstance(env, str):
            raise TypeError(f"VLMAgentWrapper wraps an environment, got the string {env!r}; pass gymnasium.make(...)")
        if not isinstance(env, gymnasium.Env):
            raise TypeError(f"VLMAgentWrapper wraps an environment, got {type(env).__name__}; make it first")
        check_counts("VLMAgentWrapper", frame_skip=frame_skip)
        if max_turns is None:
            limit = _step_limit(env)
            max_turns = MAX_TURNS if limit is None else -(-limit // frame_skip)  # rounded up
        check_counts("VLMAgentWrapper", max_turns=max_turns)
        if picture is None and env.render_mode != "rgb_array":
            raise ValueError(
                f"the environment renders {env.render_mode!r}; make it with render_mode='rgb_array', or say by "
                "`picture` where the pictures come from"
            )
        if isinstance(picture, str) and picture != "observation":
            raise ValueError(f"picture must be None, 'observation' or a function, not {picture!r}")
        self.env = env
        self.actions = None if actions is None else self._checked_actions(actions, env.action_space)
        if actions is None and not isinstance(env.action_space, spaces.Text):
            raise TypeError(
                f"the environment's actions are {env.action_space}: give words for them, "
                "actions={'left': 0, 'right': 1}"
            )
        self.legal_actions = None if self.actions is None else tuple(self.actions)
        self._task_of = task
        self.task = self._task() if isinstance(task, str) else ""
        self._text_of, self._picture_of, self.frame_skip = text, picture, frame_skip
        self.text_length = text_length if text is not None else 0
        self.max_turns = int(max_turns)
        self._seen: Any = None  # the environment's last observation
        self._info: dict[str, Any] = {}  # and its last info
        self._news: dict[str, Any] = {}  # that info, until it is handed on
        self._probed = False  # whether the environment was seeded to look at it
        self.picture_size = None  # not known yet
        self.picture_size = self._find_picture_size()
        super().__init__(render_mode, invalid_penalty, on_invalid)
        self.metadata = {**self.metadata, "render_fps": env.metadata.get("render_fps", 4)}
        if self.actions is None:
            assert isinstance(env.action_space, spaces.Text)
            if env.action_space.character_set == alphanumeric:
                warnings.warn(
                    "The environment's action space is spaces.Text with its default charset, letters and digits: an "
                    "action with a space or a sign in it, such as 'go north', is invalid. If there are any, give the "
                    "space a charset, such as string.printable.",
                    stacklevel=2,
                )
            longest = env.action_space.max_length
            self.action_space = spaces.Text(max_length=longest, min_length=0, charset=string.printable)

    @staticmethod
    def _checked_actions(actions: Mapping[str, Any], space: spaces.Space) -> dict[str, Any]:
        """`actions` with their words in lower case, each a member of the environment's action space."""
        if not isinstance(actions, Mapping):
            raise TypeError(f"actions must map words to actions, {{'left': 0, 'right': 1}}, not {actions!r:.100}")
        words = {str(word).strip().lower(): action for word, action in actions.items()}
        if not words or "" in words or len(words) < len(actions):
            raise ValueError(f"actions must be distinct, not blank, whatever their case; got {list(actions)}")
        for word, action in words.items():
            if not space.contains(action):
                raise ValueError(f"the action {word!r} stands for {action!r}, which is not in {space}")
        return words

    def _find_picture_size(self) -> tuple[int, int]:
        """Height and width of the pictures: from the observation space, or of the picture after a reset."""
        space = self.env.observation_space
        if self._picture_of == "observation":
            if not (isinstance(space, spaces.Box) and space.dtype == np.uint8 and len(space.shape) == 3):
                raise ValueError(f"the observation is no picture but {space}; leave out picture='observation'")
            return int(space.shape[0]), int(space.shape[1])
        self._seen, self._info = _checked("reset", self.env.reset(seed=0), RESET)
        self._probed = True
        height, width, _ = self._picture().shape
        return height, width

    def parse_env(self, action: Any) -> Any | None:
        """The action's word; without words, the string itself if the environment's space has it and it is not blank.

        A response without an action arrives here as "", which a space of `min_length` 0 has.
        """
        if self.actions is not None:
            return super().parse_env(action)
        is_action = isinstance(action, str) and action.strip() and self.env.action_space.contains(action)
        return action if is_action else None

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Observation, dict[str, Any]]:
        observation, info = super().reset(seed=seed, options=options)
        return observation, {**self._take_news(), **info}

    def step(self, action: str) -> tuple[Observation, SupportsFloat, bool, bool, dict[str, Any]]:
        observation, reward, terminated, truncated, info = super().step(action)
        return observation, reward, terminated, truncated, {**self._take_news(), **info}

    def _take_news(self) -> dict[str, Any]:
        """The environment's own info, once: what `reset` and `step` return is the caller's."""
        news, self._news = self._news, {}
        return news

    def _start(self, options: dict[str, Any], seed: int | None) -> None:
        if seed is None and self._probed:
            seed = int(self.np_random.integers(2**31))
        self._probed = False
        self._seen, self._info = _checked("reset", self.env.reset(seed=seed, options=options or None), RESET)
        self._news = self._info
        self.task = self._task()

    def _task(self) -> str:
        task = self._task_of if isinstance(self._task_of, str) else self._task_of(self.env, self._seen)
        if not isinstance(task, str):
            raise TypeError(f"`task` gave {type(task).__name__}, not a string")
        words = f"Actions: {', '.join(self.legal_actions)}." if self.legal_actions else ""
        return " ".join(part for part in (task.strip(), words) if part)

    def _play(self, action: str) -> tuple[float, bool, bool]:
        native = action if self.actions is None else self.actions[action]
        total = 0.0
        for _ in range(self.frame_skip):
            answer = self.env.step(copy.deepcopy(native))  # environments may change an action in place
            self._seen, reward, terminated, truncated, self._info = _checked("step", answer, STEP)
            total += checked_reward(reward)
            if terminated or truncated:
                break
        self._news = self._info
        return total, bool(terminated), bool(truncated)

    def _picture(self) -> NDArray[np.uint8]:
        if callable(self._picture_of):
            shown: Any = self._picture_of(self.env, self._seen)
        else:
            shown = self._seen if self._picture_of == "observation" else self.env.render()
        picture = np.array(shown)  # a copy: environments may draw every picture into the same buffer
        if picture.dtype != np.uint8 or picture.ndim != 3 or picture.shape[2] != 3 or not picture.size:
            raise ValueError(
                f"the environment's picture is {picture.dtype} of shape {list(picture.shape)}, not uint8 [H, W, 3]; "
                "give a function as `picture`"
            )
        if self.picture_size is not None and picture.shape[:2] != self.picture_size:
            raise ValueError(
                f"the environment's picture has the shape {list(picture.shape)}, not {[*self.picture_size, 3]} as "
                "before; give a function as `picture` that scales or pads all to one size"
            )
        return picture

    def _text(self) -> str:
        assert self._text_of is not None
        shown = self._text_of(self.env, self._seen, self._info)
        if not isinstance(shown, str):
            raise TypeError(f"`text` gave {type(shown).__name__}, not a string")
        return shown[: self.text_length]

    def close(self) -> None:
        self.env.close()


def _step_limit(env: gymnasium.Env) -> int | None:
    """The steps after which the environment's `TimeLimit` truncates; None where it has none.

    `env.spec` tells less: it is None for an environment that is not registered.
    """
    while isinstance(env, gymnasium.Wrapper):
        if isinstance(env, TimeLimit):
            return env._max_episode_steps
        env = env.env
    return None


def _checked(method: str, answer: Any, names: tuple[str, ...]) -> Any:
    """What the environment's method gave, the values of these names.

    Raises:
        TypeError: these are not the values that Gymnasium asks for, as in the old `gym`.
    """
    if not isinstance(answer, tuple) or len(answer) != len(names):
        count = {2: "two", 5: "five"}[len(names)]
        given = f"{len(answer)} values" if isinstance(answer, tuple) else type(answer).__name__
        raise TypeError(
            f"the environment's {method} gave {given}, not Gymnasium's {count} values ({', '.join(names)}); mend it, "
            "or wrap an environment of the old gym with shimmy"
        )
    if not isinstance(answer[-1], Mapping):
        raise TypeError(
            f"the environment's {method} gave {type(answer[-1]).__name__} as its info, not a dictionary; give {{}} "
            "where there is nothing to say"
        )
    return answer
