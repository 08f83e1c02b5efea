# SPDX-License-Identifier: Apache-2.0
"""MiniWoB++ as a task for a vision-language model: the page's picture and tree, BrowserGym's actions as strings."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, SupportsFloat

import numpy as np
from numpy.typing import NDArray

from vlmq_trl.envs.base import Observation, OnInvalid, Script, TextActionEnv
from vlmq_trl.envs.miniwob import DOMAIN, TASKS, find_chromium, page
from vlmq_trl.envs.miniwob.actions import ACTION_SPACES, ActionError, Call, parse

if TYPE_CHECKING:
    from vlmq_trl.envs.miniwob.browser import Browser

PICTURE_SIZE = (321, 498)  # BrowserGym's viewport of 332 x 214, drawn 1.5 times as large
GOAL_LENGTH = 700
ERROR_LENGTH = 200

_EXAMPLES = {
    "bid": "click('13'), fill('13', 'text'), select_option('13', 'text'), press('13', 'Enter'), scroll(0, 100)",
    "coord": (
        "mouse_click(x, y), keyboard_type('text'), keyboard_press('Enter'), scroll_at(x, y, dx, dy), with x and y in "
        "pixels of the picture"
    ),
}
_EXAMPLES["both"] = f"{_EXAMPLES['bid']}, {_EXAMPLES['coord']}"


class MiniWoB(TextActionEnv):
    """One task of MiniWoB++, in a Chromium of its own that starts at the first `reset` and ends with `close`.

    The reward is BrowserGym's: 1 in the turn that solves the task, whenever that is, else 0. An action that the
    browser refuses (the element is covered, the key unknown) is legal, earns 0, and is told in the next observation.
    One that is no call of an allowed function, or names an element that the page does not have, is invalid.

    Attributes:
        goal: what to do, in MiniWoB++'s words.
        elements: of the page as it was last seen, `page.Element`.
        error: why the last action had no effect, in one line; "" if it had.
        seen: BrowserGym's last observation.
        browser: Chromium and BrowserGym's environment.

    Args:
        task: a name out of `vlmq_trl.envs.miniwob.TASKS`.
        action_space: "bid", actions on elements by their numbers; "coord", by pixels of the picture; "both".
        image, tree: whether the observation has the picture, and the page's accessibility tree in its text.
        marks: draw the numbers of the elements that can be used into the picture.
        text_budget: the tree's longest text, in characters; at least 100.
        reading_budget: the same of the reading's list of elements.
        max_turns: turns after which an episode is truncated.
        delay: seconds between an action and the observation, for pages that change a while after it. Animations of
            jQuery are waited for anyway, a second at most.
        patience: seconds that an element may take to become ready for an action (uncovered, at rest), after which the
            action fails.
        render_mode, invalid_penalty, on_invalid: as in `TextActionEnv`; "random" acts as "noop", as the legal actions
            are open-ended.

    Raises:
        ImportError: a package or Chromium is missing; says how to install it.
        ValueError: an argument is out of range.
    """

    reading_fields = ("goal", "elements")
    max_turns: int

    def __init__(
        self,
        task: str,
        *,
        action_space: str = "bid",
        image: bool = True,
        tree: bool = True,
        marks: bool = False,
        text_budget: int = 2000,
        reading_budget: int = 400,
        max_turns: int = 10,
        delay: float = 0.0,
        patience: float = 2.0,
        render_mode: str | None = None,
        invalid_penalty: float = 0.05,
        on_invalid: OnInvalid = "noop",
    ) -> None:
        DOMAIN.require()
        if task not in TASKS:
            raise ValueError(f"MiniWoB: no task {task!r}; `python -m vlmq_trl.envs miniwob` lists them")
        if action_space not in ACTION_SPACES:
            raise ValueError(f"MiniWoB: action_space must be one of {', '.join(ACTION_SPACES)}, not {action_space!r}")
        if min(text_budget, reading_budget) < 100 or max_turns < 1 or delay < 0 or patience <= 0:
            raise ValueError(
                "MiniWoB: text_budget and reading_budget must be at least 100, max_turns at least 1, delay at least "
                f"0, patience above 0, not {text_budget}, {reading_budget}, {max_turns}, {delay} and {patience}"
            )
        self.picture_size = PICTURE_SIZE if image else None
        self.text_length = GOAL_LENGTH + ERROR_LENGTH + (text_budget if tree else 0) + 100
        super().__init__(render_mode, invalid_penalty, on_invalid)
        self.name, self.actions, self.max_turns = task, action_space, max_turns
        self.tree, self.marks, self.text_budget, self.reading_budget = tree, marks, text_budget, reading_budget
        self.task = f"Do in the web page what the goal says, by one action a turn: {_EXAMPLES[action_space]}."
        self.goal = self.error = ""
        self.elements: list[page.Element] = []
        self.browser = self._make_browser(delay, patience)
        self.seen: Mapping[str, Any] = {}

    def _make_browser(self, delay: float, patience: float) -> Browser:
        from vlmq_trl.envs.miniwob.browser import Browser

        chromium = find_chromium()
        assert chromium is not None  # `DOMAIN.require` has seen it
        return Browser(self.name, chromium, delay, patience)

    def _start(self, options: dict[str, Any], seed: int | None) -> None:
        if seed is None or seed >= 2**32:  # BrowserGym's bound; smaller ones are its own, so that episodes are
            seed = int(self.np_random.integers(2**32))
        self._look(self.browser.reset(seed))
        self.goal, self.error = str(self.seen["goal"]), ""

    def _look(self, observation: Mapping[str, Any]) -> None:
        self.seen, self.elements = observation, page.elements(observation)

    def step(self, action: str) -> tuple[Observation, SupportsFloat, bool, bool, dict[str, Any]]:
        """As in `TextActionEnv`.

        Raises:
            BrowserCrashedError: the browser died; `reset` starts another.
        """
        call = self._read(action)
        self.error = call if isinstance(call, str) else ""
        return super().step(action)

    def _read(self, action: Any) -> Call | str:
        """The call that a string is, or why it is none."""
        try:
            call = parse(action, ACTION_SPACES[self.actions])
        except ActionError as error:
            return f"not an action: {error}"
        known = self.seen.get("extra_element_properties", ())
        unknown = [bid for bid in call.bids if bid not in known]
        return f"not an action: no element has the number {unknown[0]}" if unknown else call

    def parse_env(self, action: Any) -> Call | None:
        call = self._read(action)
        return None if isinstance(call, str) else call

    def _play(self, action: Call) -> tuple[float, bool, bool]:
        drawn = self.seen["extra_element_properties"]
        hidden = [bid for bid in action.bids if not drawn[bid]["bbox"]]
        if hidden:  # Playwright would wait for it
            self.error = f"element {hidden[0]} is not drawn"
            return 0.0, False, False
        self._running = False  # unless the browser survives it
        observation, reward, terminated = self.browser.play(action)
        self._running = True
        self._look(observation)
        self.error = page.one_line(str(observation["last_action_error"]))
        return reward, terminated, False

    def _picture(self) -> NDArray[np.uint8]:
        picture = np.array(self.seen["screenshot"], dtype=np.uint8)
        return page.mark(picture, self.elements) if self.marks else picture

    def _text(self) -> str:
        parts = [f"Goal: {page.clip(self.goal, GOAL_LENGTH)}"]
        if self.tree:
            parts.append(page.tree_text(self.seen, self.elements, self.text_budget))
        if self.error:
            parts.append(f"The last action failed: {page.clip(self.error, ERROR_LENGTH)}")
        return "\n".join(part for part in parts if part)

    def state_text(self) -> dict[str, str]:
        """`goal`, and `elements`: those that can be used, by number, with role, name, value and state."""
        said: list[str] = []
        room = self.reading_budget - len("; 999 more")
        usable = [page.clip(str(element), 80) for element in self.elements if element.usable]
        for text in usable:
            room -= len(text) + 2
            if room < 0:
                said.append(f"{len(usable) - len(said)} more")
                break
            said.append(text)
        return {"goal": self.goal, "elements": "; ".join(said)}

    def _make_script(self) -> Script:
        from vlmq_trl.envs.miniwob.scripts import MiniWoBScript  # it knows the environment, not it the script

        return MiniWoBScript(self)

    def close(self) -> None:
        """Ends the browser. May be called again; `reset` starts another."""
        self._running = False
        self.browser.close()
