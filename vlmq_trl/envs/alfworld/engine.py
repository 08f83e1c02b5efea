# SPDX-License-Identifier: Apache-2.0
"""Plays one game at a time by TextWorld's PDDL engine, a C library that holds the state of one game.

Each `Engine` has a copy of the library of its own. A closed engine's copy is kept for the next: unloading it makes the
program crash at its end.

Contents: `Engine`, `Event`, `NOTHING`.
"""

from __future__ import annotations

import contextlib
import sys
import weakref
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from vlmq_trl.envs.alfworld.games import Game, rules

NOTHING = "Nothing happens."


@dataclass(frozen=True)
class Event:
    """What a command did: the action's name in the PDDL domain, lower case, and its arguments' names in the game."""

    action: str
    arguments: dict[str, str]  # by the domain's letters: o an object, r a receptacle, ...


@lru_cache(maxsize=1)
def _logic() -> Any:
    """The rules and the grammar, compiled once; a goal's words are put into the texts afterwards."""
    from textworld.envs.pddl.logic import GameLogic

    return GameLogic(*rules())


@contextlib.contextmanager
def _same_arguments() -> Iterator[None]:
    """Puts `sys.argv` back, which the PDDL translator overwrites."""
    before = sys.argv
    try:
        yield
    finally:
        sys.argv = before


_libraries: list[Any] = []  # copies that no engine holds


def _borrow_library() -> Any:
    import fast_downward

    return _libraries.pop() if _libraries else fast_downward.load_lib()


def _return_library(library: Any) -> None:
    library.cleanup()
    _libraries.append(library)


class Engine:
    """The state of a game, its texts and its admissible commands, as ALFWorld gives them.

    Attributes:
        commands: what is admissible now, sorted.
        feedback: ALFWorld's answer to the last command; at the start, the look around the room.
        won: whether the goal is reached.
    """

    def __init__(self) -> None:
        self._library = _borrow_library()
        self.close = weakref.finalize(self, _return_library, self._library)
        self.close.atexit = False
        self.commands: tuple[str, ...] = ()
        self.feedback = ""
        self.won = False

    def load(self, game: Game) -> None:
        """Starts a game.

        Raises:
            ValueError: the game's problem is no PDDL of ALFWorld's domain.
        """
        from alfworld.agents.utils.misc import Demangler
        from textworld.envs.pddl.logic import PddlState
        from textworld.generator.game import EntityInfo

        try:
            with _same_arguments():
                self._state = PddlState(self._library, game.problem, _logic())
        except (Exception, SystemExit) as error:  # the translator ends the program where it cannot parse
            raise ValueError(f"{game.source or 'the game'}: its problem cannot be read: {error!r}") from None
        things = {v.name: EntityInfo(v.name, v.type) for fact in self._state.facts for v in fact.arguments}
        demangler = Demangler(game_infos=things)
        for thing in things.values():
            thing.name = demangler.demangle_alfred_name(thing.id).strip()
            thing.definite, thing.indefinite = "the", "a"
        self._things = things
        self._command_of: dict[str, str] = {}  # by action and arguments: names never change in a game
        self.feedback = self._said("#look.feedback#", {})
        self._look_up()

    def play(self, command: str) -> Event:
        """Executes an admissible command."""
        action = self._actions[command]
        self._state.apply(action)
        self.feedback = self._said(action.feedback_rule, action.mapping)
        self._look_up()
        return Event(action.name, {ph.name: self._things[v.name].name for ph, v in action.mapping.items()})

    def facts(self) -> list[tuple[str, ...]]:
        """All that is true now: (predicate, name, ...), lower case."""
        return [(fact.name, *(self._things[v.name].name for v in fact.arguments)) for fact in self._state.facts]

    def _look_up(self) -> None:
        self._actions = {self._command(action): action for action in self._state.all_applicable_actions()}
        self.commands = tuple(sorted(self._actions))
        self.won = bool(self._state.check_goal())

    def _command(self, action: Any) -> str:
        key = " ".join((action.name, *(v.name for v in action.mapping.values())))
        if key not in self._command_of:
            action.command_template = self._said(action.command_template, action.mapping)
            names = {name: thing.name for name, thing in self._things.items()}
            self._command_of[key] = action.format_command(names)
        return self._command_of[key]

    def _said(self, rule: str, mapping: Any) -> str:
        """A text by the grammar."""
        context = {
            "state": self._state,
            "facts": [],
            "variables": {ph.name: self._things[v.name] for ph, v in mapping.items()},
            "mapping": mapping,
            "entity_infos": self._things,
        }
        return _logic().grammar.derive(rule, context)
