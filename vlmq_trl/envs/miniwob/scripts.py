# SPDX-License-Identifier: Apache-2.0
"""Scripted players of MiniWoB++ tasks: they read the goal and the page's elements, and act by the agent's strings.

The mistake is one and the same everywhere. A click goes to the neighbouring element of the same kind and another
name, and where there is none the mouse only hovers; a text loses its last letter (a date is a day off, a time a
minute); of a list the neighbouring option is chosen; an arrow key goes the other way. A flawed player takes a text
without its last letter for right once it stands there.

Random play (any task) acts on a uniformly drawn usable element: it clicks, types a word of the goal, or selects.
"""

from __future__ import annotations

import re
from collections.abc import Callable

import numpy as np

from vlmq_trl.envs.base import Script
from vlmq_trl.envs.miniwob.actions import Call, parse
from vlmq_trl.envs.miniwob.env import MiniWoB
from vlmq_trl.envs.miniwob.page import FILLED_IN, Element, texts


class _View:
    """The goal and the page, as a plan reads them.

    Args:
        env: an episode runs.
        lenient: take a text without its last letter for right.
    """

    def __init__(self, env: MiniWoB, lenient: bool):
        self.env, self.lenient, self.goal = env, lenient, env.goal
        self.quoted: list[str] = re.findall(r'"([^"]*)"', env.goal)

    def all(self, role: str, name: str | None = None) -> list[Element]:
        return [
            element
            for element in self.env.elements
            if element.usable and element.role == role and name in (None, element.name)
        ]

    def click(self, role: str, name: str | None = None) -> str:
        """A click on the first such element."""
        return click(self.all(role, name)[0])

    def push(self, name: str) -> str:
        """A click on a button, or the Enter key where another button covers its middle."""
        (button, *_) = self.all("button", name)
        covered = any(_holds_middle(other, button) for other in self.all("button") if other != button)
        return str(Call("press", (button.bid, "Enter"))) if covered else click(button)

    def filled(self, field: Element, text: str) -> bool:
        typed, wanted = field.value, {text, text[:-1]} if self.lenient else {text}
        hidden = bool(typed) and set(typed) == {"•"}  # a password shows its length only
        return typed in wanted or (hidden and len(typed) in {len(one) for one in wanted})

    def fill_and_submit(self, *fields: tuple[Element, str], button: str | None = None) -> str:
        """Fills the first field that is not, then presses the button."""
        for field, text in fields:
            if not self.filled(field, text):
                return str(Call("fill", (field.bid, text)))
        return self.click("button", button)


def click(element: Element) -> str:
    return str(Call("click", (element.bid,)))


def _holds_middle(other: Element, button: Element) -> bool:
    if other.box is None or button.box is None:
        return False
    x, y = button.box[0] + button.box[2] / 2, button.box[1] + button.box[3] / 2
    return 0 <= x - other.box[0] <= other.box[2] and 0 <= y - other.box[1] <= other.box[3]


def _listed(goal: str, end: str) -> list[str]:
    """The names between "Select" and `end`."""
    return re.fullmatch(rf"Select (.*) {end}.*", goal).group(1).split(", ")  # type: ignore[union-attr]


def _checkboxes(view: _View) -> str:
    wanted = _listed(view.goal, "and click Submit")
    for box in view.all("checkbox"):
        if (box.name in wanted) != ("checked" in box.states):
            return click(box)
    return view.click("button", "Submit")


def _option(view: _View) -> str:
    (radio, *_) = view.all("radio", _listed(view.goal, "and click Submit")[0])
    return view.click("button", "Submit") if "checked" in radio.states else click(radio)


def _tab(view: _View) -> str:
    return view.click("link", re.search(r"Tab #\d+", view.goal).group())  # type: ignore[union-attr]


def _tab_with_link(view: _View) -> str:
    """The link if it is in view, else the tab after the open one."""
    if found := view.all("clickable", view.quoted[0]):
        return click(found[0])
    tabs = view.all("tab")
    open_tab = next(index for index, tab in enumerate(tabs) if "selected" in tab.states)
    return view.click("link", tabs[(open_tab + 1) % len(tabs)].name)


def _focus(view: _View) -> str:
    ordinal = re.search(r"(\d)(?:st|nd|rd)", view.goal)
    return click(view.all("textbox")[int(ordinal.group(1)) - 1 if ordinal else 0])


def _text(view: _View) -> str:
    return view.fill_and_submit((view.all("textbox")[0], view.quoted[0]))


def _cased_text(view: _View) -> str:
    text = view.quoted[0]
    return view.fill_and_submit((view.all("textbox")[0], text.upper() if "upper case" in view.goal else text.lower()))


def _password(view: _View) -> str:
    first, second = view.all("textbox")
    return view.fill_and_submit((first, view.quoted[0]), (second, view.quoted[0]))


def _login(view: _View) -> str:
    user, password = view.all("textbox")
    return view.fill_and_submit((user, view.quoted[0]), (password, view.quoted[1]), button="Login")


def _date(view: _View) -> str:
    month, day, year = re.search(r"(\d+)/(\d+)/(\d+)", view.goal).groups()  # type: ignore[union-attr]
    return view.fill_and_submit((view.all("Date")[0], f"{year}-{month}-{day}"), button="Submit")


def _time(view: _View) -> str:
    """The field takes 24 hours."""
    hour, minute, half = re.search(r"(\d+):(\d+) ([AP])M", view.goal).groups()  # type: ignore[union-attr]
    text = f"{int(hour) % 12 + 12 * (half == 'P'):02d}:{minute}"
    return view.fill_and_submit((view.all("InputTime")[0], text), button="Submit")


def _spinner(view: _View) -> str:
    """One up or down a turn: the page takes no number from the keyboard."""
    (spinner, *_) = view.all("spinbutton")
    missing = int(re.search(r"-?\d+", view.goal).group()) - int(spinner.value)  # type: ignore[union-attr]
    if missing == 0:
        return view.click("button", "Submit")
    return str(Call("press", (spinner.bid, "ArrowUp" if missing > 0 else "ArrowDown")))


def _autocomplete(view: _View) -> str:
    """Types the beginning, takes the item with the right end from the menu, submits."""
    (field, *_), (start, *end) = view.all("textbox"), view.quoted
    ending = end[0] if end else ""

    def fits(text: str) -> bool:
        return text.startswith(start) and text.endswith(ending)

    if fits(field.value) and field.value != start:
        return view.click("button", "Submit")
    items = [one for one in view.env.elements if one.visible and one.role != "textbox" and fits(one.name)]
    if field.value and items and view.filled(field, start):
        return click(items[-1])  # the innermost
    return str(Call("fill", (field.bid, start, True)))


def _last_word(view: _View) -> str:
    text, field = view.all("textbox")
    words = text.value.split(" ")
    return view.fill_and_submit((field, re.sub(r"[^a-zA-Z0-9]", "", words[-1])))


def _select(view: _View) -> str:
    (chooser, *_) = view.all("combobox")
    wanted = re.fullmatch(r"Select (.*) from the list and click Submit\.", view.goal).group(1)  # type: ignore[union-attr]
    if chooser.value == wanted:
        return view.click("button", "Submit")
    return str(Call("select_option", (chooser.bid, wanted)))


def _select_several(view: _View) -> str:
    options = view.all("option")
    wanted = _listed(view.goal, "from the scroll list and click Submit")
    if [one.name for one in options if "selected" in one.states] == [
        one.name for one in options if one.name in wanted
    ]:
        return view.click("button", "Submit")
    return str(Call("select_option", (view.all("listbox")[0].bid, tuple(wanted))))


def _table(view: _View) -> str:
    key = re.search(r"the value of (.*) into", view.goal).group(1)  # type: ignore[union-attr]
    said = texts(view.env.seen)
    return view.fill_and_submit((view.all("textbox")[0], said[said.index(key) + 1]))


def _arithmetic(view: _View) -> str:
    sums = (re.fullmatch(r"(\d+) ([-+x]) (\d+) =", text) for text in texts(view.env.seen))
    first, sign, second = next(found.groups() for found in sums if found)
    a, b = int(first), int(second)
    return view.fill_and_submit((view.all("textbox")[0], str({"+": a + b, "-": a - b, "x": a * b}[sign])))


def _widget(view: _View) -> str:
    """A text area has the role of a text box; it is the taller one."""
    kind = view.quoted[0]
    if kind not in ("text", "textarea"):
        return view.click(kind)
    boxes = sorted(view.all("textbox"), key=lambda box: box.box[3] if box.box else 0.0)
    return click(boxes[0] if kind == "text" else boxes[-1])


def _sequence(view: _View) -> str:
    """ONE, which then has the focus, then TWO."""
    return view.push("TWO" if "focused" in view.all("button", "ONE")[0].states else "ONE")


def _dialog_button(view: _View) -> str:
    return view.click("button", "Close" if view.quoted[0] == "x" else view.quoted[0])


PLANS: dict[str, Callable[[_View], str]] = {
    "choose-list": _select,
    "click-button": lambda view: view.click("button", view.quoted[0]),
    "click-button-sequence": _sequence,
    "click-checkboxes": _checkboxes,
    "click-checkboxes-transfer": _checkboxes,
    "click-dialog": lambda view: view.click("button", "Close"),
    "click-dialog-2": _dialog_button,
    "click-link": lambda view: view.click("clickable", view.quoted[0]),
    "click-option": _option,
    "click-scroll-list": _select_several,
    "click-tab": _tab,
    "click-tab-2": _tab_with_link,
    "click-tab-2-easy": _tab_with_link,
    "click-test": lambda view: view.click("button"),
    "click-test-2": lambda view: view.push("ONE"),
    "click-test-transfer": lambda view: view.push("ONE"),
    "click-widget": _widget,
    "enter-date": _date,
    "enter-password": _password,
    "enter-text": _text,
    "enter-text-2": _cased_text,
    "enter-text-dynamic": _text,
    "enter-time": _time,
    "focus-text": _focus,
    "focus-text-2": _focus,
    "login-user": _login,
    "read-table": _table,
    "scroll-text": _last_word,
    "simple-arithmetic": _arithmetic,
    "unicode-test": lambda view: view.click("button", view.quoted[0]),
    "use-autocomplete": _autocomplete,
    "use-spinner": _spinner,
}
OTHER_WAY = {"ArrowUp": "ArrowDown", "ArrowDown": "ArrowUp"}


class MiniWoBScript(Script):
    """Scripted play; the expert and its mistake where `PLANS` has the task, random play everywhere."""

    env: MiniWoB

    def _plan(self, lenient: bool) -> str:
        plan = PLANS.get(self.env.name)
        if plan is None:
            raise NotImplementedError(
                f"MiniWoB: no script plays {self.env.name}, only random play; there are scripts for {', '.join(PLANS)}"
            )
        if self.env.actions == "coord":
            raise NotImplementedError(
                "MiniWoB: scripts act on elements; make the environment with action_space='bid' or 'both'"
            )
        return plan(_View(self.env, lenient))

    def expert(self) -> str:
        return self._plan(lenient=False)

    def unmistaken(self) -> str:
        return self._plan(lenient=True)

    def mistake(self) -> str:
        call = parse(self.unmistaken())
        target = next(element for element in self.env.elements if element.bid == call.bids[0])
        if call.name == "fill":
            return str(Call("fill", (target.bid, _mistyped(target, call.arguments[1]), *call.arguments[2:])))
        if call.name == "select_option":
            return str(Call("select_option", (target.bid, self._misread(target, call.arguments[1]))))
        if call.name == "press" and call.arguments[1] in OTHER_WAY:
            return str(Call("press", (target.bid, OTHER_WAY[call.arguments[1]])))
        others = self._neighbours(target)
        return click(others[0]) if others else str(Call("hover", (target.bid,)))

    def _neighbours(self, target: Element) -> list[Element]:
        """Usable elements of the same role and another name, those behind it first, then from the top."""
        usable = [one for one in self.env.elements if one.usable and one.role == target.role]
        at = next(index for index, one in enumerate(usable) if one.bid == target.bid) if target in usable else -1
        return [one for one in usable[at + 1 :] + usable[: max(at, 0)] if not one.name or one.name != target.name]

    def _misread(self, target: Element, wanted: str | tuple[str, ...]) -> str | tuple[str, ...]:
        """The options, the first of them replaced by the one behind it that is not wanted."""
        names = [one.name for one in self.env.elements if one.role == "option" and one.parent == target.bid]
        first, *rest = [wanted] if isinstance(wanted, str) else wanted
        at = names.index(first)
        other = next(name for name in names[at + 1 :] + names[:at] if name not in (first, *rest))
        return other if isinstance(wanted, str) else (other, *rest)

    def random(self, rng: np.random.Generator) -> str:
        """An action on a usable element, drawn uniformly; `noop` where there is none."""
        usable = [one for one in self.env.elements if one.usable and (one.box or one.role == "option")]
        usable = [one for one in usable if one.role != "option" or self._list_of(one) is not None]
        if not usable:
            return "noop(0)"
        element = usable[int(rng.integers(len(usable)))]
        if self.env.actions == "coord":
            return self._random_in_pixels(element, rng)
        if element.role == "option":
            return str(Call("select_option", (element.parent, element.name)))
        if element.role in FILLED_IN - {"combobox", "Date", "InputTime"} and rng.random() < 0.5:
            return str(Call("fill", (element.bid, self._word(rng))))
        return click(element)

    def _random_in_pixels(self, element: Element, rng: np.random.Generator) -> str:
        if element.box is None or rng.random() < 0.2:
            return str(Call("keyboard_type", (self._word(rng),)))
        left, top, width, height = element.box
        return str(Call("mouse_click", (round(left + width / 2), round(top + height / 2))))

    def _list_of(self, option: Element) -> Element | None:
        """The list that an option belongs to."""
        holders = (one for one in self.env.elements if one.bid == option.parent)
        return next((one for one in holders if one.role in ("combobox", "listbox")), None)

    def _word(self, rng: np.random.Generator) -> str:
        words = re.findall(r'"([^"]+)"', self.env.goal) or self.env.goal.split() or [""]
        return words[int(rng.integers(len(words)))]

    def thoughts(self) -> str:
        named = [
            f"[{one.bid}]"
            for one in self.env.elements
            if one.usable and one.name and re.search(rf"(?<!\w){re.escape(one.name)}(?!\w)", self.env.goal)
        ]
        return f"named in the goal: {', '.join(named[:8])}" if named else "no element is named in the goal"


def _mistyped(field: Element, text: str) -> str:
    """A text without its last letter; the next day of a date's month or minute of an hour."""
    if field.role == "Date":
        return f"{text[:-2]}{int(text[-2:]) % 28 + 1:02d}"
    if field.role == "InputTime":
        return f"{text[:-2]}{(int(text[-2:]) + 1) % 60:02d}"
    return text[:-1]
