# SPDX-License-Identifier: Apache-2.0
"""ALFWorld's games: small households made from a generator's numbers, or those of ALFWorld's data set.

A game is a PDDL problem and a goal in words. The rules and the texts always come from the installed package: a game
file brings a grammar too, which TextWorld would run as Python code, so it is left unread but for the goal's sentence.

Contents: `TASKS`, `SIZES`, `Game`, `make_game`, `write_game`, `read_game`, `find_games`, `data_folder`.
"""

from __future__ import annotations

import json
import os
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

T = TypeVar("T")

# The task types by RL4VLM's names.
TASKS = {
    "Pick": "pick_and_place_simple",
    "Look": "look_at_obj_in_light",
    "Clean": "pick_clean_then_place_in_recep",
    "Heat": "pick_heat_then_place_in_recep",
    "Cool": "pick_cool_then_place_in_recep",
    "Pick2": "pick_two_obj_and_place",
}
SPLITS = ("train", "valid_seen", "valid_unseen")
# Size -> the least and the largest number of receptacles, the same of objects.
SIZES = {"small": (5, 7, 6, 9), "medium": (8, 10, 10, 14), "large": (12, 15, 18, 24)}

_ROOMS_OF = {
    "Pick": ("kitchen", "living room", "bedroom", "bathroom"),
    "Look": ("living room", "bedroom"),
    "Clean": ("kitchen", "bathroom"),
    "Heat": ("kitchen",),
    "Cool": ("kitchen",),
    "Pick2": ("kitchen", "living room", "bedroom", "bathroom"),
}
_TOOL = {"Clean": "SinkBasin", "Heat": "Microwave", "Cool": "Fridge"}
_ABLE = {"Clean": "Cleanable", "Heat": "Heatable", "Cool": "Coolable"}
_LAMP = "DeskLamp"
_LAMP_STANDS = ("Desk", "Dresser", "SideTable")

# Room -> its receptacles, each with how many there can be.
_RECEPTACLES = {
    "kitchen": {
        **{"CounterTop": 2, "Cabinet": 5, "Drawer": 4, "Fridge": 1, "Microwave": 1, "SinkBasin": 1},
        **{"DiningTable": 1, "GarbageCan": 1, "Shelf": 2, "CoffeeMachine": 1, "StoveBurner": 2},
    },
    "living room": {
        **{"Sofa": 1, "ArmChair": 2, "Ottoman": 1, "CoffeeTable": 1, "SideTable": 2, "Dresser": 1, "Shelf": 4},
        **{"Drawer": 4, "Cabinet": 3, "Safe": 1, "GarbageCan": 1},
    },
    "bedroom": {
        **{"Bed": 1, "Desk": 1, "Dresser": 1, "SideTable": 2, "Shelf": 4, "Drawer": 5, "Cabinet": 2},
        **{"Safe": 1, "GarbageCan": 1},
    },
    "bathroom": {
        **{"SinkBasin": 2, "CounterTop": 2, "Cabinet": 4, "Drawer": 4, "Shelf": 2, "Toilet": 1, "BathtubBasin": 1},
        **{"GarbageCan": 1, "ToiletPaperHanger": 1, "HandTowelHolder": 2},
    },
}
_OBJECTS = {
    "kitchen": (
        *("Apple", "Bread", "Egg", "Lettuce", "Potato", "Tomato", "Bowl", "Cup", "Mug", "Plate", "Pan", "Pot"),
        *("Kettle", "Fork", "Knife", "ButterKnife", "Spoon", "Spatula", "Ladle", "DishSponge", "SoapBottle"),
        *("PepperShaker", "SaltShaker", "WineBottle"),
    ),
    "living room": (
        *("Book", "Candle", "CreditCard", "KeyChain", "Laptop", "Newspaper", "Pillow", "Plate", "RemoteControl"),
        *("Statue", "TissueBox", "Vase", "Watch", "CellPhone"),
    ),
    "bedroom": (
        *("AlarmClock", "BasketBall", "Book", "CD", "CellPhone", "Cloth", "CreditCard", "KeyChain", "Laptop", "Mug"),
        *("Pen", "Pencil", "Pillow", "Watch"),
    ),
    "bathroom": (
        *("Candle", "Cloth", "DishSponge", "HandTowel", "SoapBar", "SoapBottle", "SprayBottle", "TissueBox"),
        *("ToiletPaper",),
    ),
}
_BASINS = ("SinkBasin", "BathtubBasin")
_ABILITIES = ("Cleanable", "Heatable", "Coolable", "Toggleable", "Sliceable")

_GOAL = re.compile(r"Your task is to: ([^\n\"\\{}\[\]#|]{1,300}?)\.?(?=[\n\"\\])")
# The engine's library copies names into buffers of 1,024 characters, and TextWorld formats texts that hold names.
_BAD_NAME = re.compile(r"[^\s()]{101}|[{}]")
_MAX_PROBLEM = 4_000_000  # characters


@dataclass(frozen=True)
class Game:
    """One game.

    Attributes:
        task: one of `TASKS`.
        goal: in words, such as "put a hot apple in fridge".
        problem: PDDL of ALFWorld's domain.
        target, place, lamp: the kinds of thing that the goal speaks of, lower case; "" where it does not.
        source: the game's file; "" for a household of our own.
    """

    task: str
    goal: str
    problem: str
    target: str
    place: str = ""
    lamp: str = ""
    source: str = ""


# Households of our own.


def _one(rng: np.random.Generator, items: Sequence[T]) -> T:
    return items[int(rng.integers(len(items)))]


def _between(rng: np.random.Generator, least: int, most: int) -> int:
    return int(rng.integers(least, most + 1))


def _fits(thing: str, receptacle: str) -> bool:
    from alfworld.gen import constants

    return thing in constants.VAL_RECEPTACLE_OBJECTS[receptacle]


def _draw_receptacles(rng: np.random.Generator, room: str, needed: list[str], count: int) -> list[str]:
    """`count` kinds, `needed` among them, no kind more often than the room can have it."""
    limits = _RECEPTACLES[room]
    kinds = list(needed)
    while len(kinds) < count:
        have = Counter(kinds)
        kinds.append(_one(rng, [kind for kind, limit in limits.items() if have[kind] < limit]))
    return kinds


def _draw_goal(rng: np.random.Generator, task: str, room: str, kinds: list[str]) -> tuple[str, str] | None:
    """A (target, place) for which the household has another place to start from; place is "" for Look."""
    from alfworld.gen import constants

    able = constants.VAL_ACTION_OBJECTS[_ABLE[task]] if task in _ABLE else None
    places = [""] if task == "Look" else sorted(set(kinds))
    goals = [
        (thing, place)
        for thing in _OBJECTS[room]
        for place in places
        if (able is None or thing in able)
        and (not place or _fits(thing, place))
        and any(kind != place and _fits(thing, kind) for kind in kinds)
    ]
    return _one(rng, goals) if goals else None


def make_game(rng: np.random.Generator, task: str, size: str = "small") -> Game:
    """A household, and a goal in it that can be reached.

    The goal's objects lie anywhere but at the goal's place, every object lies where it may be put back to, and the
    receptacle that a task needs is there. All chance comes from `rng`.

    Args:
        task: one of `TASKS`.
        size: one of `SIZES`.
    """
    least, most, few, many = SIZES[size]
    room = _one(rng, _ROOMS_OF[task])
    needed = [_TOOL[task]] if task in _TOOL else []
    if task == "Look":
        needed = [_one(rng, [kind for kind in _LAMP_STANDS if kind in _RECEPTACLES[room]])]
    goal = None
    while goal is None:
        kinds = _draw_receptacles(rng, room, needed, _between(rng, least, most))
        goal = _draw_goal(rng, task, room, kinds)
    target, place = goal
    things = [target] * (2 if task == "Pick2" else 1)
    count = _between(rng, few, many)
    while len(things) < count:
        thing = _one(rng, _OBJECTS[room])
        if any(_fits(thing, kind) for kind in kinds if thing != target or kind != place):
            things.append(thing)
    where = [
        _one(rng, [i for i, kind in enumerate(kinds) if _fits(thing, kind) and (thing, kind) != goal])
        for thing in things
    ]
    lamp = _LAMP if task == "Look" else ""
    if lamp:
        things.append(lamp)
        where.append(0)  # the stand is what was needed
    problem = _problem(rng, kinds, things, where, _goal_pddl(task, target, place, lamp))
    words = _one(rng, _templates(task)).format(obj=target.lower(), recep=place.lower(), toggle=lamp.lower())
    return Game(task, words, problem, target.lower(), place.lower(), lamp.lower())


def _templates(task: str) -> list[str]:
    """Goals of a task in words, to be formatted."""
    from alfworld.gen import goal_library

    return goal_library.gdict[TASKS[task]]["templates"]


def _goal_pddl(task: str, target: str, place: str, lamp: str) -> str:
    """The goal, with the bracket that closes the problem."""
    from alfworld.gen import goal_library

    return goal_library.gdict[TASKS[task]]["pddl"].format(obj=target, recep=place, toggle=lamp).replace("#", "-")


def _name(kind: str, number: int) -> str:
    """An identifier as ALFWorld writes it: the kind and a position; things are numbered in these names' order."""
    position = f"_plus_{number:02d}_dot_00_bar__plus_00_dot_00_bar__plus_00_dot_00"
    return f"{kind[:-5]}_bar_{position}_bar_{kind}" if kind in _BASINS else f"{kind}_bar_{position}"


def _problem(rng: np.random.Generator, kinds: list[str], things: list[str], where: list[int], goal: str) -> str:
    """The PDDL problem: receptacles, each at a location of its own, and objects in the receptacles `where`."""
    from alfworld.gen import constants

    numbers = [int(n) for n in rng.permutation(len(kinds) + len(things))]
    places = [(kind, _name(kind, n), f"loc_bar_{n + 1}") for kind, n in zip(kinds, numbers, strict=False)]
    objects = [(kind, _name(kind, n), i) for kind, n, i in zip(things, numbers[len(kinds) :], where, strict=True)]
    # The domain speaks of these kinds whether there are any or not.
    place_kinds = sorted({*kinds, "SinkBasin", "Microwave", "Fridge"})
    object_kinds = sorted({*things, "Knife", "ButterKnife"})
    declared = [
        "agent1 - agent",
        "loc_bar_0 - location",
        *(f"{kind}Type - rtype" for kind in place_kinds),
        *(f"{kind}Type - otype" for kind in object_kinds),
        *(f"{place} - receptacle\n{location} - location" for _, place, location in places),
        *(f"{thing} - object" for _, thing, _ in objects),
    ]
    facts = ["(atLocation agent1 loc_bar_0)", "(= (total-cost) 0)"]
    for kind, place, location in places:
        facts += [f"(receptacleType {place} {kind}Type)", f"(receptacleAtLocation {place} {location})"]
        if kind in constants.OPENABLE_CLASS_SET:
            facts.append(f"(openable {place})")
    for kind, thing, index in objects:
        _, place, location = places[index]
        facts += [f"(objectType {thing} {kind}Type)", f"(inReceptacle {thing} {place})"]
        facts.append(f"(objectAtLocation {thing} {location})")
        if kind != _LAMP:
            facts.append(f"(pickupable {thing})")
        facts += [f"({a.lower()} {thing})" for a in _ABILITIES if kind in constants.VAL_ACTION_OBJECTS[a]]
    for place_kind in place_kinds:
        facts += [f"(canContain {place_kind}Type {kind}Type)" for kind in object_kinds if _fits(kind, place_kind)]
    head = ["(define (problem household)", "(:domain alfred)", "(:objects", *declared, ")", "(:init", *facts, ")"]
    return "\n".join(head) + goal


# Files, as in ALFWorld's data set.


@lru_cache(maxsize=1)
def rules() -> tuple[str, str]:
    """The installed package's PDDL domain and its grammar."""
    from alfworld.info import ALFRED_PDDL_PATH, ALFRED_TWL2_PATH

    return Path(ALFRED_PDDL_PATH).read_text("utf-8"), Path(ALFRED_TWL2_PATH).read_text("utf-8")


def write_game(game: Game, folder: str | os.PathLike) -> Path:
    """Writes `game.tw-pddl` and `traj_data.json` into a new folder, for `read_game` or ALFWorld's own loader.

    Returns:
        The game's file.
    """
    from alfworld.gen import constants

    kind_of = {kind.lower(): kind for kind in constants.OBJECTS}
    domain, grammar = rules()
    folder = Path(folder)
    folder.mkdir(parents=True)
    trajectory = {
        "task_type": TASKS[game.task],
        "pddl_params": {
            "object_target": kind_of[game.target],
            "parent_target": kind_of.get(game.place, ""),
            "toggle_target": kind_of.get(game.lamp, ""),
            "mrecep_target": "",
            "object_sliced": False,
        },
    }
    (folder / "traj_data.json").write_text(json.dumps(trajectory), "utf-8")
    data = {
        "pddl_domain": domain,
        "grammar": grammar.replace("UNKNOWN GOAL", game.goal),
        "pddl_problem": game.problem,
        "solvable": True,
        "walkthrough": None,
    }
    path = folder / "game.tw-pddl"
    path.write_text(json.dumps(data), "utf-8")
    return path


def _load_json(path: Path) -> dict[str, Any]:
    try:
        data = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} cannot be read as JSON: {error}") from None
    if not isinstance(data, dict):
        raise ValueError(f"{path} holds {type(data).__name__}, not an object as ALFWorld writes it")
    return data


def read_game(path: str | os.PathLike) -> Game | None:
    """The game of a `game.tw-pddl` with its `traj_data.json`; None if it is marked as one without a solution.

    Both are read as data: the file's own domain and grammar have no part in the game.

    Raises:
        ValueError: a file is missing or not as ALFWorld writes it.
    """
    path = Path(path)
    data, trajectory = _load_json(path), _load_json(path.with_name("traj_data.json"))
    if not data.get("solvable"):
        return None
    task = {kind: task for task, kind in TASKS.items()}.get(str(trajectory.get("task_type")))
    problem, params = data.get("pddl_problem"), trajectory.get("pddl_params")
    if task is None or not isinstance(problem, str) or not isinstance(params, dict):
        raise ValueError(f"{path}: it or its traj_data.json lacks pddl_problem, pddl_params or a known task_type")
    if len(problem) > _MAX_PROBLEM or not problem.isascii() or _BAD_NAME.search(problem):
        raise ValueError(
            f"{path}: its pddl_problem is too long, not ASCII, or has braces or a name of over 100 characters"
        )
    target, place, lamp = (
        str(params.get(key, "")).lower() for key in ("object_target", "parent_target", "toggle_target")
    )
    found = _GOAL.search(str(data.get("grammar", "")))
    words = found.group(1).strip() if found else _templates(task)[0].format(obj=target, recep=place, toggle=lamp)
    return Game(task, words, problem, target, place, lamp, str(path))


@lru_cache(maxsize=16)
def find_games(folder: str, split: str) -> dict[str, tuple[str, ...]]:
    """Task -> the paths of its `game.tw-pddl` files below `folder`/json_2.1.1/`split`, sorted.

    The task is read off the folders' names (`pick_and_place_simple-Mug-None-Desk-308`). Games with movable receptacles
    or slices have no task here, as in ALFWorld itself.

    Raises:
        ValueError: there is no such folder, or no game in it.
    """
    root = Path(folder) / "json_2.1.1" / split
    games: dict[str, list[str]] = {task: [] for task in TASKS}
    task_of = {kind: task for task, kind in TASKS.items()}
    for path in root.glob("**/game.tw-pddl"):
        inside = path.relative_to(root)
        task = task_of.get(inside.parts[0].partition("-")[0])
        if task is not None and "movable" not in str(inside) and "Sliced" not in str(inside):
            games[task].append(str(path))
    if not any(games.values()):
        raise ValueError(
            f"no ALFWorld game under {root}; it should hold folders such as "
            "pick_and_place_simple-Mug-None-Desk-308/trial_.../game.tw-pddl, which `alfworld-download` brings. "
            'data="own" makes small households instead'
        )
    return {task: tuple(sorted(paths)) for task, paths in games.items()}


def data_folder() -> str | None:
    """The data set's folder: the one that ALFWORLD_DATA names, or ALFWorld's own default if it holds the data set."""
    default = Path("~/.cache/alfworld").expanduser()
    folder = os.environ.get("ALFWORLD_DATA") or str(default)
    # `import alfworld` sets the variable to the default, whether there is anything or not.
    return None if folder == str(default) and not (default / "json_2.1.1").is_dir() else folder
