# SPDX-License-Identifier: Apache-2.0
"""The base class of environments that are seen as pictures or text and acted on with strings.

A string that `parse_env` does not understand never raises: it costs `invalid_penalty` and does what `on_invalid` says.

Contents: `TextActionEnv`; `Script`, scripted play of one episode; `FreeText`, the space of observations' texts; for
environments around others, `MAX_TURNS`, `check_counts` and `checked_reward`.
"""

from __future__ import annotations

import math
import string
from abc import abstractmethod
from typing import Any, Literal, SupportsFloat

import gymnasium
import numpy as np
from gymnasium import spaces
from gymnasium.error import ResetNeeded
from numpy.typing import NDArray

Observation = dict[str, Any]
OnInvalid = Literal["noop", "random", "terminate"]

ON_INVALID = ("noop", "random", "terminate")
SUCCESS_RULE = "an episode is a success when its undiscounted return is positive"
MAX_ACTION_LENGTH = 512
MAX_TURNS = 1000  # of an environment around another one whose own limit is not known


class FreeText(spaces.Text):
    """Strings of any characters up to a length; `spaces.Text` knows a fixed set of characters."""

    def contains(self, x: Any) -> bool:
        return isinstance(x, str) and len(x) <= self.max_length


def check_counts(owner: str, **counts: Any) -> None:
    """Refuses a number of things that is no whole number of at least 1.

    Raises:
        ValueError: names the owner and the argument.
    """
    for name, count in counts.items():
        if not isinstance(count, int | np.integer) or isinstance(count, bool) or count < 1:
            raise ValueError(f"{owner}: {name} must be a whole number of at least 1, not {count!r}")


def checked_reward(reward: Any) -> float:
    """What an environment gave as its reward, as a number, which need not be finite.

    Raises:
        ValueError: it is none; a string of digits is none either.
    """
    try:
        if not isinstance(reward, str | bytes):
            return float(reward)
    except (TypeError, ValueError, OverflowError):
        pass
    raise ValueError(f"the environment gave the reward {reward!r:.100}, not a number")


class TextActionEnv(gymnasium.Env[Observation, str]):
    """An environment whose actions are strings and whose observation is `{"image": uint8 [H, W, 3], "text": str}`.

    A game implements `_start`, `_play` and `state_text`, and `_picture`, `_text` or both. It draws from
    `self.np_random` only. One that can be played by a script overrides `_make_script`.

    Attributes:
        task: the rules, the goal and the legal actions in one or two short sentences, for the prompt; may change from
            episode to episode.
        legal_actions: all legal actions in their canonical spelling, which may change from turn to turn; None where
            they are open-ended.
        reading_fields: the keys of `state_text`, in order.
        max_turns: turns after which an episode is truncated; an invalid action uses a turn too. None: never.
        picture_size: height and width of the observation's "image"; None where there is none.
        text_length: the longest "text" of an observation; 0 where there is none.
        turns: that were taken in the running episode.

    Args:
        render_mode: None or "rgb_array".
        invalid_penalty: taken from the reward of a turn whose action is not legal; finite, at least 0.
        on_invalid: what such a turn does besides: "noop" leaves the state unchanged, "random" plays a uniformly random
            legal action (and adds its reward), "terminate" ends the episode.

    `step` always sets `info["valid"]`, whether the action was legal, and `info["action"]`, the action that was
    executed in its canonical spelling, or "".
    """

    metadata: dict[str, Any] = {"render_modes": ["rgb_array"], "render_fps": 2}
    task: str
    legal_actions: tuple[str, ...] | None = None
    reading_fields: tuple[str, ...] = ()
    max_turns: int | None
    picture_size: tuple[int, int] | None = (300, 300)
    text_length: int = 0

    def __init__(
        self,
        render_mode: str | None = None,
        invalid_penalty: float = 1.0,
        on_invalid: OnInvalid = "noop",
    ) -> None:
        name = type(self).__name__
        if render_mode is not None and render_mode not in self.metadata["render_modes"]:
            raise ValueError(f"{name}: render_mode must be None or 'rgb_array', not {render_mode!r}")
        if on_invalid not in ON_INVALID:
            raise ValueError(f"{name}: on_invalid must be one of {', '.join(ON_INVALID)}, not {on_invalid!r}")
        if not math.isfinite(invalid_penalty) or invalid_penalty < 0:
            raise ValueError(
                f"{name}: invalid_penalty must be finite and at least 0 (it is subtracted from the reward), "
                f"not {invalid_penalty!r}"
            )
        self.render_mode = render_mode
        self.invalid_penalty = float(invalid_penalty)
        self.on_invalid = on_invalid
        parts: dict[str, spaces.Space] = {}
        if self.picture_size is not None:
            parts["image"] = spaces.Box(0, 255, (*self.picture_size, 3), np.uint8)
        if self.text_length:
            parts["text"] = FreeText(self.text_length, min_length=0, charset=string.printable)
        self.observation_space = spaces.Dict(parts)
        self.action_space = spaces.Text(max_length=MAX_ACTION_LENGTH, min_length=0, charset=string.printable)
        self.turns = 0
        self._running = False
        self._script: Script | None = None

    # What a game implements.

    @abstractmethod
    def _start(self, options: dict[str, Any], seed: int | None) -> None:
        """Sets the first state. Unknown keys of `options` were refused by `reset`; `np_random` is seeded already."""

    @abstractmethod
    def _play(self, action: Any) -> tuple[float, bool, bool]:
        """Executes a native action. Returns (reward, terminated, truncated), `max_turns` left out of it."""

    def _picture(self) -> NDArray[np.uint8]:
        """The state as a fresh uint8 array [H, W, 3] of `picture_size`."""
        raise NotImplementedError

    def _text(self) -> str:
        """The state as text, of at most `text_length` characters."""
        raise NotImplementedError

    def state_text(self) -> dict[str, str]:
        """What the observation shows, read aloud: one string for each of `reading_fields`."""
        return {}

    def _make_script(self) -> Script:
        """A script for the episode that has just begun."""
        return Script(self)

    @property
    def script(self) -> Script:
        """Scripted play of the running episode, made when it is first asked for."""
        if self._script is None:
            self._script = self._make_script()
        return self._script

    reset_options: tuple[str, ...] | None = ()  # keys that `reset(options=...)` takes; None: any

    def parse_env(self, action: Any) -> Any | None:
        """The native action that a string names; None if it is not legal. Total; ignores case and outer space."""
        if not isinstance(action, str) or self.legal_actions is None:
            return None
        action = action.strip().lower()
        return action if action in self.legal_actions else None

    # Gymnasium's interface.

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Observation, dict[str, Any]]:
        super().reset(seed=seed)
        options = dict(options or {})
        if self.reset_options is not None and (unknown := sorted(set(options) - set(self.reset_options))):
            known = ", ".join(self.reset_options) or "none"
            raise ValueError(f"{type(self).__name__}.reset: unknown options {unknown}; it knows {known}")
        self._start(options, seed)
        self.turns = 0
        self._running = True
        self._script = None
        return self._observation(), {}

    def step(self, action: str) -> tuple[Observation, SupportsFloat, bool, bool, dict[str, Any]]:
        if not self._running:
            raise ResetNeeded(f"{type(self).__name__}.step: no episode is running; call reset() first")
        self.turns += 1
        native = self.parse_env(action)
        valid = native is not None
        reward, terminated, truncated = 0.0, False, False
        if not valid:
            reward -= self.invalid_penalty
            if self.on_invalid == "random" and self.legal_actions:
                native = self.parse_env(self.legal_actions[int(self.np_random.integers(len(self.legal_actions)))])
            terminated = self.on_invalid == "terminate"
        if native is not None:
            gained, terminated, truncated = self._play(native)
            reward += gained
        truncated |= not terminated and self.max_turns is not None and self.turns >= self.max_turns
        self._running = not (terminated or truncated)
        info = {"valid": valid, "action": "" if native is None else str(native)}
        return self._observation(), reward, terminated, truncated, info

    def render(self) -> Any:
        """The current picture, uint8 [H, W, 3], in the mode "rgb_array"; None without a render mode."""
        if self.render_mode is None:
            gymnasium.logger.warn(
                f"{type(self).__name__}.render() was called without a render mode; "
                'pass render_mode="rgb_array" to gymnasium.make.'
            )
            return None
        return self._picture()

    def _observation(self) -> Observation:
        observation: Observation = {}
        if self.picture_size is not None:
            observation["image"] = self._picture()
        if self.text_length:
            observation["text"] = self._text()
        return observation


class Script:
    """Scripted play of one episode, which `make_demonstrator` builds its players from. This base can play at random.

    Each method may be asked any number of times in a turn, and answers for the environment's present state.
    """

    def __init__(self, env: Any):
        self.env = env

    def expert(self) -> str:
        """The right action.

        Raises:
            NotImplementedError: there is no expert.
        """
        raise NotImplementedError(f"{type(self.env).__name__} has no scripted expert; only random play")

    def unmistaken(self) -> str:
        """What a flawed player does when it makes no mistake."""
        return self.expert()

    def mistake(self) -> str:
        """What the environment's one systematic mistake makes of the right action.

        Raises:
            NotImplementedError: there is no such mistake.
        """
        raise NotImplementedError(f"{type(self.env).__name__} has no scripted mistake; only random play")

    def random(self, rng: np.random.Generator) -> str:
        """An action of random play: uniform over the legal ones.

        Raises:
            NotImplementedError: the legal actions are open-ended.
        """
        legal = self.env.legal_actions
        if not legal:
            raise NotImplementedError(f"{type(self.env).__name__} has no list of legal actions to draw from")
        return legal[int(rng.integers(len(legal)))]

    def thoughts(self) -> str:
        """A short sentence that follows from the reading and does not depend on the action taken."""
        return ""
