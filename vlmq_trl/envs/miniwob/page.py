# SPDX-License-Identifier: Apache-2.0
"""What BrowserGym's observation of a page shows: its elements, its tree as text within a budget, and marks.

Contents: `Element`, `elements`, `tree_text`, `texts`, `clip`, `one_line`, `mark`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

# Roles that say that an element can be acted on.
ACTED_ON = {
    "button", "checkbox", "combobox", "link", "listbox", "menuitem", "option", "radio", "searchbox", "slider",
    "spinbutton", "switch", "tab", "textbox", "Date", "DateTime", "InputTime", "ColorWell",
}  # fmt: skip
MARKED_BY_TAG = {"cell", "gridcell", "listitem", "LayoutTableCell"}  # by BrowserGym, whether they react or not
FILLED_IN = {"combobox", "searchbox", "spinbutton", "textbox", "Date", "InputTime"}
_SAID = {"checked", "selected", "focused", "disabled", "pressed"}  # the states that a reading tells, if they hold
_HIDDEN_ROLES = ("LineBreak", "InlineTextBox", "MenuListPopup")
_HIDDEN_PROPERTIES = (
    "editable", "readonly", "level", "settable", "multiline", "invalid", "focusable", "url", "hasPopup", "orientation",
    "multiselectable", "required", "modal", "describedby", "controls", "live", "atomic", "relevant", "busy",
)  # fmt: skip


@dataclass(frozen=True)
class Element:
    """One element of the page that has a number.

    Attributes:
        bid: BrowserGym's number of it.
        role: in the accessibility tree, such as "button"; "clickable" for one that has none but reacts to clicks.
        name: its label or text.
        value: what is typed or chosen in it; dots for a password.
        states: such as "checked" and "selected".
        parent: the bid of the element that holds it, "" for none.
        box: left, top, width, height in pixels of the picture; None if it is not drawn.
        visible: at least half of it lies in the picture.
        usable: it reacts to clicks or keys, and is visible or the option of a visible list.
    """

    bid: str
    role: str
    name: str
    value: str
    states: frozenset[str]
    parent: str
    box: tuple[float, float, float, float] | None
    visible: bool
    usable: bool

    def __str__(self) -> str:
        """`[13] textbox "Name" = "Bob"`, `[14] checkbox "x" (checked)`."""
        parts = [f"[{self.bid}] {self.role}"]
        if self.name or self.role not in FILLED_IN:
            parts.append(f'"{self.name}"')
        if self.value or self.role in FILLED_IN:
            parts.append(f'= "{self.value}"')
        if self.states:
            parts.append(f"({', '.join(sorted(self.states))})")
        return " ".join(parts)


def elements(observation: Mapping[str, Any]) -> list[Element]:
    """All elements of the tree that have a number, in the tree's order.

    Changes the tree of `observation` once: an element without a role that reacts to clicks gets the role "clickable"
    and the text in it as its name, without which BrowserGym leaves it out of the text.
    """
    properties = observation["extra_element_properties"]
    nodes = observation["axtree_object"]["nodes"]
    by_id = {node["nodeId"]: node for node in nodes}
    found: dict[str, Element] = {}

    def walk(node: dict[str, Any], parent: str) -> None:
        bid = node.get("browsergym_id")
        if bid is not None and bid in properties and bid not in found and not node.get("ignored"):
            found[bid] = _element(node, parent, properties[bid], by_id, found)
            parent = bid
        for child in _children(node, by_id):
            walk(child, parent)

    if nodes:
        walk(nodes[0], "")
    return list(found.values())


def _children(node: Mapping[str, Any], by_id: Mapping[str, dict[str, Any]]) -> list[dict[str, Any]]:
    return [by_id[key] for key in node["childIds"] if key in by_id and key != node["nodeId"]]


def _element(
    node: dict[str, Any],
    parent: str,
    known: Mapping[str, Any],
    by_id: Mapping[str, dict[str, Any]],
    found: Mapping[str, Element],
) -> Element:
    visible = (known["visibility"] or 0.0) >= 0.5
    role = node["role"]["value"]
    reacts = bool(known["clickable"] or (known["set_of_marks"] and role not in MARKED_BY_TAG))
    if role not in ACTED_ON:
        reacts &= role != "RootWebArea" and not _holds_usable(node, by_id)  # a label is clicked by what it labels
    if role not in ACTED_ON and reacts:
        node["role"]["value"] = role = "clickable"
        node["name"] = {"value": node.get("name", {}).get("value") or _text_in(node, by_id)}
    listed = role == "option" and parent in found and found[parent].visible
    return Element(
        bid=node["browsergym_id"],
        role=role,
        name=_clean(node.get("name", {}).get("value", "")),
        value=_clean(node.get("value", {}).get("value", "")),
        states=frozenset(_states(node)),
        parent=parent,
        box=tuple(known["bbox"]) if known["bbox"] else None,
        visible=visible,
        usable=(visible or listed) and (reacts or role in ACTED_ON),
    )


def _states(node: Mapping[str, Any]) -> Iterable[str]:
    for one in node.get("properties", ()):
        value = one.get("value", {}).get("value")
        if one["name"] in _SAID and value not in (False, None, "false"):
            yield one["name"]


def _holds_usable(node: Mapping[str, Any], by_id: Mapping[str, dict[str, Any]]) -> bool:
    return any(child["role"]["value"] in ACTED_ON or _holds_usable(child, by_id) for child in _children(node, by_id))


def _text_in(node: Mapping[str, Any], by_id: Mapping[str, dict[str, Any]]) -> str:
    """The text in an element, at any depth."""
    texts = []
    for child in _children(node, by_id):
        if child["role"]["value"] == "StaticText":
            texts.append(str(child.get("name", {}).get("value", "")))
        else:
            texts.append(_text_in(child, by_id))
    return " ".join(text for text in texts if text)


def _clean(text: Any) -> str:
    return " ".join(str(text).split())


def tree_text(observation: Mapping[str, Any], shown: Sequence[Element], budget: int) -> str:
    """The page's accessibility tree by BrowserGym's `flatten_axtree_to_str`, in at most `budget` characters.

    Where it is longer, lines go in this order: what is out of view, texts, other visible elements, usable elements;
    within each the last first. A last line then counts what is left out. A line longer than half the budget loses its
    middle.

    Args:
        observation: BrowserGym's, after `elements` has seen it.
        shown: its elements.
        budget: characters, at least 100.
    """
    from browsergym.utils.obs import flatten_axtree_to_str

    flat = flatten_axtree_to_str(
        observation["axtree_object"], ignored_roles=_HIDDEN_ROLES, ignored_properties=_HIDDEN_PROPERTIES
    )
    by_bid = {element.bid: element for element in shown}
    lines: list[str] = []
    kinds: list[int] = []
    for line in re.sub(r", (?:checked|selected|pressed)=(?:False|'false')", "", flat).split("\n"):
        depth = len(line) - len(line.lstrip("\t"))
        kind, text = _line(line.strip("\t"), by_bid, kinds[-1] if kinds else 0)
        if text.startswith("RootWebArea") or _repeats(text, lines):
            continue
        kinds.append(kind)
        lines.append(clip(" " * max(0, depth - 1) + text, budget // 2))
    return _within(lines, kinds, budget)


_USABLE, _VISIBLE, _TEXT, _OUT_OF_VIEW = range(4)


def _line(text: str, by_bid: Mapping[str, Element], above: int) -> tuple[int, str]:
    """A line's kind, and the line with a note if it is out of view; `above`: the kind of the line above."""
    match = re.match(r"\[(\w+)\] ", text)
    element = by_bid.get(match.group(1)) if match else None
    if element is None:
        return (_OUT_OF_VIEW if above == _OUT_OF_VIEW else _TEXT), text
    if element.usable:
        return _USABLE, text
    return (_VISIBLE, text) if element.visible else (_OUT_OF_VIEW, f"{text}, out of view")


def _repeats(text: str, lines: Sequence[str]) -> bool:
    """Whether a line is a text that is empty, or stands in the line above."""
    if not text.startswith("StaticText "):
        return False
    said = text.removeprefix("StaticText ")[1:-1]
    return not said or (bool(lines) and said in lines[-1])


def _within(lines: Sequence[str], kinds: Sequence[int], budget: int) -> str:
    if sum(map(len, lines)) + len(lines) - 1 <= budget:
        return "\n".join(lines)
    room = budget - len(_left_out(len(lines), len(lines)))
    kept = set()
    for index in sorted(range(len(lines)), key=lambda index: (kinds[index], index)):
        if len(lines[index]) + 1 <= room:
            room -= len(lines[index]) + 1
            kept.add(index)
    text = "\n".join(lines[index] for index in sorted(kept))
    return f"{text}\n{_left_out(len(lines) - len(kept), len(lines))}".lstrip("\n")


def _left_out(count: int, total: int) -> str:
    return f"({count} of {total} lines left out)"


def texts(observation: Mapping[str, Any]) -> list[str]:
    """The texts of the page, in order."""
    nodes = observation["axtree_object"]["nodes"]
    said = [_clean(node.get("name", {}).get("value", "")) for node in nodes if node["role"]["value"] == "StaticText"]
    return [text for text in said if text]


def clip(text: str, length: int) -> str:
    """`text`, without its middle if it is longer than `length`."""
    if len(text) <= length:
        return text
    half = (length - 3) // 2
    return f"{text[: length - 3 - half]}...{text[len(text) - half :]}"


def one_line(error: str) -> str:
    """A browser's complaint in one line: what failed and, where Playwright's log says so, why."""
    first, _, log = error.partition("\n")
    reasons = re.findall(r"- +(.*intercepts pointer events|element is not \w+|.*did not find some options.*)", log)
    return _clean(f"{first} ({reasons[-1]})" if reasons else first)


def mark(picture: NDArray[np.uint8], shown: Sequence[Element]) -> NDArray[np.uint8]:
    """The picture with a frame and a number on each visible usable element, by BrowserGym's `overlay_som`."""
    from browsergym.utils.obs import overlay_som

    marks = {
        element.bid: {"set_of_marks": True, "bbox": list(element.box)}
        for element in shown
        if element.usable and element.visible and element.box is not None and element.box[2] * element.box[3] >= 20
    }
    return np.ascontiguousarray(overlay_som(picture, marks))
