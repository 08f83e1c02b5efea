# SPDX-License-Identifier: Apache-2.0
"""The shortest way to a goal from any state, found by trying out the few sensible plans of the six tasks.

TextWorld brings a planner too (Fast Downward, a blind search), whose time grows exponentially with the receptacles
that can be opened. The plans here are as long as its plans, and take milliseconds in households of any size.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator
from itertools import permutations

from vlmq_trl.envs.alfworld.games import Game
from vlmq_trl.envs.alfworld.memory import Fact, by_number

# Task -> the verb, the kind of receptacle that it needs, and the fact that it makes true.
_TREATMENT = {
    "Clean": ("clean", "sinkbasin", "isclean"),
    "Heat": ("heat", "microwave", "ishot"),
    "Cool": ("cool", "fridge", "iscool"),
}


def _pairs(told: dict[str, list[Fact]], predicate: str) -> dict[str, str]:
    return {fact[0]: fact[1] for fact in told.get(predicate, ())}


class World:
    """A household's true state, which plans are tried out in. `commands` are those of the plan so far."""

    def __init__(self, facts: Iterable[Fact]):
        told: dict[str, list[Fact]] = {}
        for name, *arguments in facts:
            told.setdefault(name, []).append(tuple(arguments))
        self.spot_of = _pairs(told, "receptacleatlocation")
        self.kind_of = _pairs(told, "receptacletype") | _pairs(told, "objecttype")
        self.allowed = set(told.get("cancontain", ()))
        self.openable = {name for (name,) in told.get("openable", ())}
        self.treated = {fact: {name for (name,) in told.get(fact, ())} for fact in ("isclean", "ishot", "iscool")}
        self.lit = {name for (name,) in told.get("istoggled", ())}
        self.lamps = {name for (name,) in told.get("toggleable", ())}
        self.movable = {name for (name,) in told.get("pickupable", ())}
        self.spot = told["atlocation"][0][1]
        self.opened = {name for (name,) in told.get("opened", ())}
        self.place_of = _pairs(told, "inreceptacle")
        held = told.get("holds", ())
        self.held = held[0][1] if held else ""
        self.commands: list[str] = []

    def copy(self) -> World:
        """The same, for another plan: what a plan changes is copied."""
        new = copy.copy(self)
        new.opened, new.place_of, new.commands = set(self.opened), dict(self.place_of), list(self.commands)
        return new

    def of_kind(self, kind: str) -> list[str]:
        """The receptacles or objects of a kind that can be reached, by name."""
        names = (name for name, its_kind in self.kind_of.items() if its_kind == f"{kind}type")
        return sorted(filter(self._can_be_reached, names), key=by_number)

    def _can_be_reached(self, name: str) -> bool:
        return name == self.held or name in self.spot_of or self.place_of.get(name) in self.spot_of

    def holds(self, place: str, thing: str) -> bool:
        """Whether the thing may be put into the receptacle."""
        return (self.kind_of[place], self.kind_of[thing]) in self.allowed

    def go(self, place: str) -> None:
        if self.spot != self.spot_of[place]:
            self.spot = self.spot_of[place]
            self.commands.append(f"go to {place}")

    def open(self, place: str) -> None:
        self.go(place)
        if place in self.openable - self.opened:
            self.opened.add(place)
            self.commands.append(f"open {place}")

    def take(self, thing: str) -> None:
        if self.held != thing:
            place = self.place_of.pop(thing)
            self.open(place)
            self.held = thing
            self.commands.append(f"take {thing} from {place}")

    def put(self, place: str) -> None:
        self.open(place)
        self.place_of[self.held] = place
        self.commands.append(f"move {self.held} to {place}")
        self.held = ""

    def with_free_hand(self, thing: str) -> Iterator[World]:
        """Ways to put down what is in the way of taking `thing`."""
        if self.held in ("", thing):
            yield self.copy()
            return
        fits = [place for place in self.spot_of if self.holds(place, self.held)]
        near = [place for place in fits if self.spot_of[place] == self.spot or place == self.place_of[thing]]
        closed = self.openable - self.opened
        far = sorted(fits, key=lambda place: (place in closed, by_number(place)))[:1]
        for place in dict.fromkeys([*near, *far]):
            way = self.copy()
            way.put(place)
            yield way


def plan(game: Game, facts: Iterable[Fact]) -> list[str]:
    """The commands that reach a goal which is not reached yet, as few as there need be; [] if it is out of reach."""
    start = World(facts)
    ways = _two(game, start) if game.task == "Pick2" else _one(game, start)
    return min((way.commands for way in ways), key=lambda commands: (len(commands), commands), default=[])


def _targets(game: Game, world: World) -> list[str]:
    return [thing for thing in world.of_kind(game.target) if thing in world.movable]


def _one(game: Game, start: World) -> Iterator[World]:
    """Ways to bring one object to the goal, treated as the task asks."""
    verb, tool_kind, fact = _TREATMENT.get(game.task, ("", "", ""))
    for thing in _targets(game, start):
        tools = start.of_kind(tool_kind) if verb and thing not in start.treated[fact] else [""]
        for fetched in start.with_free_hand(thing):
            fetched.take(thing)
            for tool in tools:
                treated = fetched.copy()
                if tool:
                    treated.go(tool)
                    treated.commands.append(f"{verb} {thing} with {tool}")
                yield from _light(game, treated) if game.task == "Look" else _placed(game, treated)


def _placed(game: Game, world: World) -> Iterator[World]:
    for place in world.of_kind(game.place):
        if world.holds(place, world.held):
            way = world.copy()
            way.put(place)
            yield way


def _light(game: Game, world: World) -> Iterator[World]:
    for lamp in world.of_kind(game.lamp):
        if lamp in world.lamps:
            way = world.copy()
            way.go(way.place_of[lamp])
            if lamp not in way.lit:
                way.commands.append(f"use {lamp}")
            yield way


def _two(game: Game, start: World) -> Iterator[World]:
    """Ways to bring two objects into one receptacle."""
    targets = _targets(game, start)
    for place in start.of_kind(game.place):
        there = [thing for thing in targets if start.place_of.get(thing) == place]
        missing = [thing for thing in targets if thing not in there and start.holds(place, thing)]
        for order in permutations(missing, 2 - min(len(there), 2)):
            ways = [start.copy()]
            for thing in order:
                ways = [free for way in ways for free in way.with_free_hand(thing)]
                for way in ways:
                    way.take(thing)
                    way.put(place)
            yield from ways
