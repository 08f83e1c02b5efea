# SPDX-License-Identifier: Apache-2.0
"""What the agent has observed of a household so far: the picture and the reading are made from this alone."""

from __future__ import annotations

from dataclasses import dataclass, field

from vlmq_trl.envs.alfworld.engine import Event

Fact = tuple[str, ...]

_MARKS = {"ishot": "hot", "iscool": "cool", "isclean": "clean", "issliced": "sliced", "istoggled": "on"}


def by_number(name: str) -> tuple[str, int]:
    """Sorts "drawer 2" before "drawer 10"."""
    kind, _, number = name.rpartition(" ")
    return (kind, int(number)) if number.isdigit() else (name, 0)


@dataclass
class Place:
    """A receptacle: whether it was looked at, and into, was found closed, and what was seen in it."""

    looked: bool = False
    seen: bool = False
    closed: bool = False
    things: set[str] = field(default_factory=set)


class Memory:
    """What was observed.

    Attributes:
        places: name -> `Place`, for all receptacles: the first text of a game names them all.
        here: the receptacles where the agent stands; () in the middle of the room.
        carrying: the object in its hand, or "".
        marks: object -> what was done to it or found on examining it: hot, cool, clean, sliced, on.
    """

    def __init__(self, facts: list[Fact]):
        names = sorted({fact[1] for fact in facts if fact[0] == "receptacleatlocation"}, key=by_number)
        self.places = {name: Place() for name in names}
        self.here = self._places_at(next(fact[2] for fact in facts if fact[0] == "atlocation"), facts)
        self.carrying = ""
        self.marks: dict[str, set[str]] = {}

    def update(self, event: Event, facts: list[Fact]) -> None:
        """Takes in what a command did and showed; `facts` are those after it."""
        thing, name = event.arguments.get("o", ""), event.arguments.get("r", "")
        if event.action == "gotolocation":
            self.here = self._places_at(event.arguments["lend"], facts)
        if event.action in ("gotolocation", "openobject", "examinereceptacle"):
            self._look_at(name, facts)
        elif event.action == "closeobject":
            self.places[name].closed = True
        elif event.action == "pickupobject":
            self.carrying = thing
            self.places[name].things.discard(thing)
        elif event.action == "putobject":
            self.carrying = ""
            self.places[name].things.add(thing)
        elif event.action == "heatobject":
            self._mark(thing, "hot", "cool")
        elif event.action == "coolobject":
            self._mark(thing, "cool", "hot")
        elif event.action == "cleanobject":
            self._mark(thing, "clean")
        elif event.action == "toggleobject":
            self._mark(thing, "on")
        elif event.action == "sliceobject":
            self._mark(event.arguments["co"], "sliced")
        elif event.action == "examineobject":
            self.marks[thing] = {mark for fact, mark in _MARKS.items() if (fact, thing) in facts}

    def _places_at(self, spot: str, facts: list[Fact]) -> tuple[str, ...]:
        return tuple(name for name in self.places if ("receptacleatlocation", name, spot) in facts)

    def _look_at(self, name: str, facts: list[Fact]) -> None:
        place = self.places[name]
        place.looked = True
        place.closed = ("openable", name) in facts and ("opened", name) not in facts
        if not place.closed:
            place.seen = True
            place.things = {fact[1] for fact in facts if fact[0] == "inreceptacle" and fact[2] == name}

    def _mark(self, thing: str, mark: str, gone: str = "") -> None:
        self.marks.setdefault(thing, set()).add(mark)
        self.marks[thing].discard(gone)

    def label(self, thing: str) -> str:
        """An object's name with its marks: "mug 1 (clean, hot)"."""
        marks = ", ".join(sorted(self.marks.get(thing, ())))
        return f"{thing} ({marks})" if marks else thing

    def labels(self, name: str) -> list[str]:
        """The objects that were seen in a receptacle, by name."""
        return [self.label(thing) for thing in sorted(self.places[name].things, key=by_number)]

    def in_sight(self) -> list[str]:
        """The objects that were seen where the agent stands, in what is not closed."""
        return [t for n in self.here if not self.places[n].closed for t in self.places[n].things]

    def unseen(self) -> list[str]:
        """The receptacles whose inside was not seen yet."""
        return [name for name, place in self.places.items() if not place.seen]

    def reading(self) -> dict[str, str]:
        """Where the agent stands, what it carries and what it sees there."""
        seen = {name: place for name in self.here if (place := self.places[name]).looked or place.things}
        shown = {name: "closed" if p.closed else ", ".join(self.labels(name)) or "nothing" for name, p in seen.items()}
        one = len(self.here) == 1
        return {
            "location": ", ".join(self.here) or "middle of the room",
            "carrying": self.label(self.carrying) if self.carrying else "nothing",
            "visible": "; ".join(text if one else f"{name}: {text}" for name, text in shown.items()) or "nothing",
        }
