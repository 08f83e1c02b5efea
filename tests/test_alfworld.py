# SPDX-License-Identifier: Apache-2.0
"""ALFWorld: its own texts and commands, games from a seed or from files, pictures of what was seen, scripted play."""

import importlib.util
import itertools
import json
import re
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import gymnasium
import numpy as np
import pytest
import textworld

from vlmq_trl import collect_demonstrations, play_episodes
from vlmq_trl.agent_format import PlainFormat, default_format
from vlmq_trl.envs import DOMAINS, make_demonstrator
from vlmq_trl.envs.alfworld import DOMAIN, SIZES, TASKS, ALFWorld, Game, make_game, read_game, write_game
from vlmq_trl.envs.alfworld.games import data_folder, find_games
from vlmq_trl.envs.alfworld.memory import by_number
from vlmq_trl.envs.alfworld.planner import plan
from vlmq_trl.rollout import Response

ROOT = Path(__file__).parents[1]

tasks = pytest.mark.parametrize("task", list(TASKS))


@pytest.fixture(autouse=True)
def home(monkeypatch, tmp_path_factory):
    """A home without a data set."""
    home = tmp_path_factory.mktemp("home")
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.setenv("ALFWORLD_DATA", "unset")  # so that what `import alfworld` sets is taken back at the end
    monkeypatch.delenv("ALFWORLD_DATA")
    return home


def start(task="Pick", seed=0, options=None, **settings):
    env = ALFWorld(task, **settings)
    env.reset(seed=seed, options=options)
    return env


def game_of(task="Pick", seed=0, size="small"):
    return make_game(np.random.default_rng(seed), task, size)


def finish(env):
    """The return of the rest of an episode that the script's expert plays."""
    total, done = 0.0, False
    while not done:
        _, reward, terminated, truncated, info = env.step(env.script.expert())
        assert info["valid"]
        total, done = total + reward, terminated or truncated
    return total


def wander(env, turns, rng):
    """Random play, with a check of each turn."""
    for _ in range(turns):
        action = env.script.random(rng)
        yield action, *env.step(action)
        if not env._running:
            return


def test_it_is_registered():
    assert DOMAIN in DOMAINS and DOMAIN.missing() == ""
    ids = {f"vlmq_trl/ALFWorld-{task}-v0": task for task in TASKS} | {"vlmq_trl/ALFWorld-v0": None}
    assert list(ids) == list(DOMAIN.envs)
    for env_id, task in ids.items():
        env = gymnasium.make(env_id)
        assert isinstance(env.unwrapped, ALFWorld) and env.unwrapped.task_name == task
        env.close()


def test_importing_the_environments_imports_neither_alfworld_nor_textworld():
    code = (
        "import sys, vlmq_trl.envs, vlmq_trl.envs.alfworld.scripts\n"
        "assert not {'alfworld', 'textworld', 'fast_downward'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, timeout=120)


def test_without_alfworld_the_error_says_how_to_install_it(monkeypatch):
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name == "alfworld" else found(name))
    with pytest.raises(ImportError, match=r'ALFWorld.*alfworld not installed: pip install "vlmq_trl\[alfworld\]"'):
        gymnasium.make("vlmq_trl/ALFWorld-Heat-v0")


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({"task": "Fry"}, "task must be one of Pick, Look, Clean, Heat, Cool, Pick2, None, not 'Fry'"),
        ({"size": "huge"}, "size must be one of small, medium, large, not 'huge'"),
        ({"split": "test"}, "split must be one of train, valid_seen, valid_unseen, not 'test'"),
        ({"max_turns": 0}, "max_turns must be at least 1, or None, not 0"),
        ({"picture": False, "frames": lambda env: None}, "picture must not be False"),
        ({"invalid_penalty": -1.0}, "invalid_penalty must be finite and at least 0"),
    ],
)
def test_bad_settings(settings, text):
    with pytest.raises(ValueError, match=text):
        ALFWorld(**settings)


def test_bad_reset_options():
    env = ALFWorld()
    with pytest.raises(ValueError, match=r"unknown options \['room'\]; it knows game"):
        env.reset(options={"room": 1})
    with pytest.raises(TypeError, match="game must be a Game, not str"):
        env.reset(options={"game": "Heat"})
    with pytest.raises(ValueError, match="its problem cannot be read"):
        env.reset(options={"game": Game("Pick", "put a mug in shelf", "(define (problem", "mug", "shelf")})
    env.close()


# Games.


@tasks
@pytest.mark.parametrize("size", list(SIZES))
def test_made_households_keep_their_rules(task, size):
    from alfworld.gen import constants

    least, most, few, many = SIZES[size]
    kind_of = {kind.lower(): kind for kind in constants.OBJECTS}
    goals = set()
    for seed in range(30):
        game = game_of(task, seed, size)
        assert game == game_of(task, seed, size) != game_of(task, seed + 1, size)
        facts = [tuple(line.strip("()").split()) for line in game.problem.splitlines() if line.startswith("(")]
        where = {fact[1]: fact[2] for fact in facts if fact[0] == "inReceptacle"}
        kind = {fact[1]: fact[2][:-4] for fact in facts if fact[0] in ("receptacleType", "objectType")}
        assert least <= sum(fact[0] == "receptacleType" for fact in facts) <= most
        assert few <= sum(kind[thing] != "DeskLamp" for thing in where) <= many
        for thing, place in where.items():
            assert kind[thing] == "DeskLamp" or kind[thing] in constants.VAL_RECEPTACLE_OBJECTS[kind[place]]
            assert (kind[thing].lower(), kind[place].lower()) != (game.target, game.place)
        assert sum(kind[thing].lower() == game.target for thing in where) >= (2 if task == "Pick2" else 1)
        assert kind_of[game.target].lower() in game.goal
        goals.add(game.goal)
    assert len(goals) > 10


@tasks
def test_texts_commands_and_shortest_plans_are_those_of_alfworld_and_textworld(task, tmp_path, monkeypatch):
    from alfworld.agents.environment.alfred_tw_env import AlfredDemangler
    from textworld.envs.pddl.pddl import PddlEnv

    monkeypatch.setattr(sys, "argv", sys.argv)  # theirs overwrites it
    rng = np.random.default_rng(1)
    theirs = AlfredDemangler(PddlEnv(textworld.EnvInfos(admissible_commands=True, policy_commands=True)))
    game = game_of(task, 1)
    theirs.load(str(write_game(game, tmp_path / "game")))
    state = theirs.reset()
    env = start(options={"game": game}, admissible=False, invalid_penalty=0.0)
    opening = f"-= Welcome to TextWorld, ALFRED! =-\n\n{env._text()}\n\nYour task is to: {game.goal}."
    assert state.feedback == opening
    for turn in range(12):
        assert list(env.legal_actions) == state.admissible_commands
        assert len(plan(game, env.facts())) == len(state.policy_commands) > 0
        action = "fly to the moon" if turn == 5 else env.script.random(rng)
        observation, reward, terminated, _, info = env.step(action)
        state, score, won = theirs.step(action)
        assert (observation["text"], reward, terminated) == (state.feedback, score, won)
        assert info["valid"] == (turn != 5)
        if won:
            break


def data_set(folder, split="train"):
    """A small data set, as ALFWorld's: two games of each task but Look, and some that do not count."""
    games = {}
    for task, kind in TASKS.items():
        for seed in range(2 if task != "Look" else 0):
            game = game_of(task, seed)
            home = folder / "json_2.1.1" / split / f"{kind}-{game.target}-None-{game.place}-{seed}" / "trial_T1"
            games[str(write_game(game, home))] = game
    movable = folder / "json_2.1.1" / split / "pick_and_place_with_movable_recep-Mug-Bowl-Shelf-1" / "trial_T1"
    write_game(game_of("Pick", 8), movable)
    sliced = folder / "json_2.1.1" / split / "pick_and_place_simple-AppleSliced-None-Shelf-1" / "trial_T1"
    write_game(game_of("Pick", 9), sliced)
    return games


def test_games_of_a_data_set(tmp_path, monkeypatch):
    games = data_set(tmp_path)
    for path, game in games.items():
        assert read_game(path) == Game(**{**vars(game), "source": path})
    found = find_games(str(tmp_path), "train")
    assert sorted(path for paths in found.values() for path in paths) == sorted(games)
    env = ALFWorld(data=str(tmp_path))
    seen = Counter()
    for seed in range(8):
        env.reset(seed=seed)
        assert env.game.source in games and env.game.goal in env.task
        seen[env.game.task] += 1
    assert len(seen) >= 3 and "Look" not in seen
    assert finish(env) == 1.0
    env.reset(seed=3)
    first = env.game
    env.reset(seed=3)
    assert env.game == first
    env.close()
    monkeypatch.setenv("ALFWORLD_DATA", str(tmp_path))
    assert start("Heat").game.source in games
    assert start("Heat", data="own").game.source == ""
    with pytest.raises(ValueError, match="no game of the task Look under"):
        ALFWorld("Look")
    with pytest.raises(ValueError, match=r"no ALFWorld game under .*valid_seen; it should hold folders such as"):
        ALFWorld(split="valid_seen")


def test_unsolvable_games_are_passed_over(tmp_path):
    games = data_set(tmp_path)
    heat = sorted(path for path in games if "heat" in path)
    for path in heat[:1]:
        data = json.loads(Path(path).read_text())
        Path(path).write_text(json.dumps({**data, "solvable": False}))
    env = ALFWorld("Heat", data=str(tmp_path))
    for seed in range(6):
        env.reset(seed=seed)
        assert env.game.source == heat[1]


def test_the_data_set_may_lie_where_alfworld_puts_it(home, monkeypatch):
    default = home / ".cache" / "alfworld"
    for named in (None, str(default)):  # ALFWorld itself sets the variable, with or without a data set
        if named:
            monkeypatch.setenv("ALFWORLD_DATA", named)
        assert data_folder() is None
    games = data_set(default, "valid_seen")
    for named in (str(default), ""):
        monkeypatch.setenv("ALFWORLD_DATA", named)
        assert data_folder() == str(default)
    assert set(find_games(ALFWorld(split="valid_seen").folder, "valid_seen")["Cool"]) < set(games)


def test_bad_folders_and_files(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match=r'no ALFWorld game under .*alfworld-download.*data="own"'):
        ALFWorld(data=str(tmp_path / "nowhere"))
    monkeypatch.setenv("ALFWORLD_DATA", str(tmp_path / "nowhere"))
    with pytest.raises(ValueError, match=r"no ALFWorld game under .*nowhere"):
        ALFWorld()
    path = write_game(game_of(), tmp_path / "game")
    for name, text, error in (
        ("game.tw-pddl", "{", "cannot be read as JSON"),
        ("game.tw-pddl", "[1]", "holds list, not an object"),
        ("traj_data.json", "{}", "lacks pddl_problem, pddl_params or a known task_type"),
        ("traj_data.json", None, "cannot be read as JSON"),
    ):
        file = path.with_name(name)
        good = file.read_text()
        file.unlink() if text is None else file.write_text(text)
        with pytest.raises(ValueError, match=error):
            read_game(path)
        file.write_text(good)
    data = json.loads(path.read_text())
    for problem in ("(:objects é - object)", f"(:objects {'x' * 2000} - object)", "(:objects mug{o} - object)"):
        path.write_text(json.dumps({**data, "pddl_problem": problem}))
        with pytest.raises(ValueError, match="too long, not ASCII, or has braces or a name of over 100 characters"):
            read_game(path)


def test_code_in_a_game_file_is_not_run(tmp_path):
    from textworld.envs.pddl.pddl import PddlEnv

    path = write_game(game_of(), tmp_path / "game")
    data, trace = json.loads(path.read_text()), tmp_path / "trace"
    code = "{__import__('pathlib').Path('TRACE').touch()}".replace("TRACE", str(trace))
    data["grammar"] = data["grammar"].replace("You are in the middle", f"{code} You are in the middle")
    path.write_text(json.dumps(data))
    env = start(options={"game": read_game(path)})
    assert finish(env) == 1.0 and not trace.exists()
    theirs = PddlEnv(textworld.EnvInfos())
    theirs.load(str(path))
    theirs.reset()
    assert trace.exists()  # TextWorld alone runs it


# Play.


@tasks
def test_the_expert_reaches_the_goal_at_once_and_after_mistakes(task):
    env = ALFWorld(task)
    for seed in range(3):
        env.reset(seed=seed)
        expected = len(plan(env.game, env.facts()))
        assert finish(env) == 1.0 and env.turns == expected <= 12
    env.reset(seed=5)
    for _ in range(12):
        env.step(env.script.mistake())
        assert env._running
    left = len(plan(env.game, env.facts()))
    assert finish(env) == 1.0 and env.turns == 12 + left
    env.close()


def test_equal_seeds_give_equal_episodes():
    def episode(env, seed):
        rng = np.random.default_rng(seed)
        observation, _ = env.reset(seed=seed)
        trace = [(observation["image"].tobytes(), observation["text"], env.task)]
        for action, observation, *rest in wander(env, 10, rng):
            trace.append((action, observation["image"].tobytes(), observation["text"], env.state_text(), *rest))
        return trace

    one, other = ALFWorld(), ALFWorld()
    traces = [episode(one, seed) for seed in range(4)]
    assert traces == [episode(other, seed) for seed in range(4)]
    assert len({trace[0] for trace in traces}) == 4


@pytest.mark.parametrize("size", list(SIZES))
def test_random_play_is_valid_and_what_is_remembered_is_true(size):
    env = ALFWorld(size=size, on_invalid="terminate")
    rng = np.random.default_rng(0)
    for seed in range(2):
        observation, _ = env.reset(seed=seed)
        for action, observation, reward, terminated, truncated, info in wander(env, 50, rng):
            assert info == {"valid": True, "action": action} and reward == float(terminated)
            assert truncated == (env.turns == 50 and not terminated)
            assert observation in env.observation_space
            assert observation["text"].endswith("\nCommands: " + "; ".join(env.legal_actions) + ".")
            facts, memory = set(env.facts()), env.memory
            inside = {name: {f[1] for f in facts if f[0] == "inreceptacle" and f[2] == name} for name in memory.places}
            for name, place in memory.places.items():
                known = place.looked and not place.closed
                assert place.things == inside[name] if known else place.things <= inside[name]
                if place.looked:
                    assert place.closed == (("openable", name) in facts and ("opened", name) not in facts)
            assert {memory.carrying} - {""} == {f[2] for f in facts if f[0] == "holds"}
            (spot,) = (f[2] for f in facts if f[0] == "atlocation")
            assert all(("receptacleatlocation", name, spot) in facts for name in memory.here)
            for thing, marks in memory.marks.items():
                assert {("is" + mark.replace("on", "toggled"), thing) for mark in marks} <= facts
            for sense in env.script.mistake(), env.script.unmistaken(), env.script.expert():
                assert sense in env.legal_actions


def test_what_is_not_admissible_changes_nothing_and_costs_little():
    env = start("Heat", seed=2, max_turns=4)
    before = env.facts(), env.legal_actions, env.state_text()
    for turn, action in enumerate(("go to the moon", "open", "", "take mug 1 from nowhere"), start=1):
        observation, reward, terminated, truncated, info = env.step(action)
        assert observation["text"].startswith("Nothing happens.\nCommands: go to ")
        assert (reward, terminated, truncated) == (-0.01, False, turn == 4)
        assert info == {"valid": False, "action": ""}
        assert (env.facts(), env.legal_actions, env.state_text()) == before
    env.reset()
    assert "Nothing" not in env._text()
    assert ALFWorld().invalid_penalty * ALFWorld().max_turns < 1


def test_other_spellings_of_commands():
    env = start("Pick", seed=0)
    while "move" not in env.script.expert():
        env.step(env.script.expert())
    right = env.script.expert()
    thing, place = right.removeprefix("move ").split(" to ")
    for word in ("in/on", "in", "on", "into"):
        assert env.parse_env(f" Put {thing} {word} {place.upper()}\n") == right
    assert env.parse_env(f"put {thing} in/on nowhere") is None
    began = time.perf_counter()
    assert env.parse_env("put " + "in " * 200_000 + "\n!") is None
    assert time.perf_counter() - began < 0.5
    _, reward, terminated, _, info = env.step(f"put {thing} in/on {place}")
    assert (reward, terminated, info["action"]) == (1.0, True, right)


def test_random_strings_never_crash():
    env = start(max_turns=None)
    rng = np.random.default_rng(0)
    pieces = [*env.legal_actions, *"(){}[]#|'\"\\\n\t é１\x00", "go to ", "put ", " in/on ", "😀", "\ud800", "mug 1"]
    for number in range(10_000):
        action = "".join(rng.choice(np.array(pieces, dtype=object), size=rng.integers(0, 5)))
        native = env.parse_env(action)
        assert native is None or native in env.legal_actions
        if number % 100 == 0:
            *_, info = env.step(action)
            assert info["valid"] == (native is not None)
            if not env._running:
                env.reset()
    assert all(env.parse_env(other) is None for other in (None, 3, b"look", ["look"]))


def test_mistakes_set_play_back():
    env_id = "vlmq_trl/ALFWorld-Pick-v0"
    won = Counter()
    env = gymnasium.make(env_id, picture=False)
    for policy in ("flawed:0.2", "flawed:1"):
        demonstrate = make_demonstrator(env_id, policy)
        for seed in range(3):
            rng, done = np.random.default_rng(seed), False
            env.reset(seed=seed)
            while not done:
                *_, terminated, truncated, info = env.step(demonstrate(env, rng).action)
                assert info["valid"]
                done = terminated or truncated
            won[policy] += terminated
    assert (won["flawed:0.2"], won["flawed:1"]) == (3, 0)


# What is seen.


def swapped_contents(seed):
    """A game, one that differs from it only in which closed receptacle an object lies in, and these receptacles."""
    env = start("Cool", seed=seed, size="medium")
    game, facts = env.game, list(env._engine._state.facts)
    openable = sorted(fact.arguments[0].name for fact in facts if fact.name == "openable")
    inside = {fact.arguments[0].name: fact.arguments[1].name for fact in facts if fact.name == "inreceptacle"}
    spot_of = {f.arguments[0].name: f.arguments[1].name for f in facts if f.name == "receptacleatlocation"}
    thing = next(thing for thing, place in sorted(inside.items()) if place in openable)
    here, there = inside[thing], next(place for place in openable if place != inside[thing])
    problem = game.problem.lower()
    moved = problem.replace(f"(inreceptacle {thing} {here})", f"(inreceptacle {thing} {there})")
    moved = moved.replace(
        f"(objectatlocation {thing} {spot_of[here]})", f"(objectatlocation {thing} {spot_of[there]})"
    )
    assert moved != problem
    names = [env._engine._things[place].name for place in (here, there)]
    return [Game(**{**vars(game), "problem": text}) for text in (problem, moved)], names


@pytest.mark.parametrize("seed", [0, 1])
def test_observations_show_nothing_that_was_not_seen(seed):
    games, closed = swapped_contents(seed)
    envs = [start(options={"game": game}, max_turns=None) for game in games]
    walks = [f"go to {name}" for name in envs[0].memory.places]

    def observed(action):
        seen = [env.step(action)[0] for env in envs]
        return seen, np.array_equal(seen[0]["image"], seen[1]["image"]) and seen[0]["text"] == seen[1]["text"]

    for action in (*walks, "look", "inventory"):
        assert observed(action)[1], action
        assert envs[0].state_text() == envs[1].state_text()
    for name in closed:
        envs[0].step(f"go to {name}")
        envs[1].step(f"go to {name}")
        before = envs[0]._picture()
        seen, same = observed(f"open {name}")
        assert not same and envs[0].state_text() != envs[1].state_text()
        assert not np.array_equal(before, seen[0]["image"])
        if name == closed[0]:  # closed again, it shows what was seen in it
            seen, same = observed(f"close {name}")
            assert not np.array_equal(seen[0]["image"], seen[1]["image"])


def test_the_reading_follows_the_play():
    env = start("Heat", seed=0)
    place = env.game.place
    assert env.state_text() == {"location": "middle of the room", "carrying": "nothing", "visible": "nothing"}
    assert env.script.thoughts() == f"{place} elsewhere, apple out of sight"
    for action, location, carrying, visible, thought in (
        ("go to sinkbasin 1", "sinkbasin 1", "nothing", "apple 1", "apple 1 here"),
        ("take apple 1 from sinkbasin 1", "sinkbasin 1", "apple 1", "", "apple 1 carried"),
        ("go to microwave 1", "microwave 1", "apple 1", "closed", "apple 1 carried"),
        ("heat apple 1 with microwave 1", "microwave 1", "apple 1 (hot)", "closed", "apple 1 carried"),
    ):
        assert env.script.expert() == action
        env.step(action)
        reading = env.state_text()
        assert (reading["location"], reading["carrying"]) == (location, carrying)
        assert visible in reading["visible"] and env.script.thoughts() == f"{place} elsewhere, {thought}"
    env.step(env.script.expert())
    assert env.script.thoughts() == f"{place} here, apple 1 carried"


def test_in_look_the_lamp_is_where_it_was_seen():
    """Not a receptacle: it stands on one."""
    env = start("Look", seed=0)
    told = [env.script.thoughts()]
    while env.step(env.script.expert())[1] == 0:
        told.append(env.script.thoughts())
    assert told[0].startswith(f"{env.game.lamp} elsewhere, ") and told[-1].startswith(f"{env.game.lamp} here, ")


def test_what_was_not_seen_yet_can_be_told():
    """In the text and the reading: what lies in a closed receptacle was not seen."""
    env = start("Clean", seed=0, unseen=True)
    assert default_format(env).reading_fields == ("location", "carrying", "visible", "unseen")
    assert "unseen" not in start("Clean", seed=0).state_text()
    names, text = list(env.memory.places), env._observation()["text"]

    def told():
        found = re.search(r"\nNot seen yet: (.*)\.\nCommands: ", env._observation()["text"])
        assert found.group(1) == env.state_text()["unseen"]
        return [] if found.group(1) == "nothing" else found.group(1).split("; ")

    assert told() == names and all(name in text.splitlines()[0] for name in names)
    left, closed = list(names), []
    for name in names:
        env.step(f"go to {name}")
        if f"open {name}" in env.legal_actions:
            assert told() == left
            for action in ("open", "close"):  # what was seen stays seen, also where it was empty
                env.step(f"{action} {name}")
            closed.append(bool(env.memory.places[name].things))
        left.remove(name)
        assert told() == left
    assert set(closed) == {True, False} and not left


def test_names_are_sorted_by_number():
    assert sorted(["mug 10", "mug 9", "apple 1", "bed"], key=by_number) == ["apple 1", "bed", "mug 9", "mug 10"]


@pytest.mark.parametrize("size", list(SIZES))
def test_pictures_are_drawn_afresh_and_show_every_step(size):
    env = start("Pick2", size=size, render_mode="rgb_array")
    image = env.render()
    assert image.shape == (300, 300, 3) and image.dtype == np.uint8
    image[:] = 0
    pictures = [env.render()]
    assert pictures[0].any()
    for _ in range(4):
        env.step(env.script.expert())
        pictures.append(env.render())
    for one, other in itertools.pairwise(pictures):
        assert (np.abs(one.astype(int) - other).max(-1) > 60).sum() > 100


def test_text_only_and_without_the_list_of_commands():
    env = ALFWorld("Look", picture=False, admissible=False)
    observation, _ = env.reset(seed=0)
    assert list(observation) == list(env.observation_space.spaces) == ["text"]
    assert observation["text"].startswith("You are in the middle of a room.") and "Commands" not in observation["text"]
    assert env.task.startswith(f"Your task is to: {env.game.goal}. Commands: go to (receptacle)")


def test_frames_take_the_place_of_the_drawing():
    shown = []

    def frame(env):
        shown.append((env.game.task, tuple(env.played)))
        return np.full((300, 300, 3), len(env.played), np.uint8)

    env = start("Clean", frames=frame)
    action = env.script.expert()
    assert (env.step(action)[0]["image"] == 1).all()
    assert shown == [("Clean", ()), ("Clean", (action,))]
    for bad in (np.zeros((128, 128, 3), np.uint8), np.zeros((300, 300, 3))):
        with pytest.raises(ValueError, match=r"frames must return uint8 \[300, 300, 3\], not"):
            ALFWorld(frames=lambda env, bad=bad: bad).reset(seed=0)


# Its surroundings.


def test_nothing_is_left_behind_and_a_closed_environment_can_begin_again(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    arguments = sys.argv
    for _ in range(2):
        env = start()
        env.step("look")
        env.close()
        env.close()
    env.reset(seed=1)
    assert finish(env) == 1.0
    env.close()
    assert list(tmp_path.iterdir()) == [] and sys.argv is arguments


def test_a_program_with_open_environments_ends_well():
    code = (
        "from vlmq_trl.envs.alfworld.env import ALFWorld\n"
        "envs = [ALFWorld() for _ in range(3)]\n"
        "for seed, env in enumerate(envs): env.reset(seed=seed); env.step(env.script.expert())\n"
        "envs.pop().close(); del envs[0]"
    )
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, timeout=120)


class Listed:
    """Plays a command that the prompt lists, drawn with the episode's own generator."""

    def act(self, requests):
        responses = []
        for request in requests:
            text = request.prompt[-1]["content"][-1]["text"]
            commands = text.rpartition("Commands: ")[2].removesuffix(".").split("; ")
            responses.append(Response(str(request.rng.choice(commands))))
        return responses


def test_episodes_in_processes_of_their_own():
    def played(workers):
        episodes = play_episodes(
            *("vlmq_trl/ALFWorld-v0", Listed()),
            **{"episodes": 3, "num_envs": 2, "max_turns": 8, "agent_format": PlainFormat(), "workers": workers},
        )
        return [
            [(t.prompt, t.action, t.valid, t.reward, [i.tobytes() for i in t.images]) for t in episode.turns]
            for episode in episodes
        ]

    inside = played(False)
    assert inside == played(True)
    assert all(turn[2] for turns in inside for turn in turns)


def test_demonstrations_can_be_collected():
    data = collect_demonstrations("vlmq_trl/ALFWorld-Pick-v0", policy="expert", episodes=4, seed=0, progress=False)
    last = [row for row in data if row["terminated"]]
    assert len(last) == 4 and all(row["reward"] == 1.0 and row["valid"] for row in last)
    answer = json.loads(data[0]["completion"][0]["content"])
    assert list(answer) == ["location", "carrying", "visible", "thoughts", "action"]


@pytest.mark.slow
@tasks
def test_the_expert_solves_fifty_households(task):
    env = ALFWorld(task, picture=False)
    for seed in range(50):
        env.reset(seed=1000 + seed)
        assert finish(env) == 1.0
    for seed in range(10):  # from wherever random play has led
        env.reset(seed=seed)
        turns = list(wander(env, 25, np.random.default_rng(seed)))
        assert turns[-1][3] or finish(env) == 1.0
    env.close()


@pytest.mark.slow
@tasks
def test_large_households_are_solved_in_bounded_time(task):
    env = ALFWorld(task, picture=False, size="large")
    slowest = 0.0
    for seed in range(10):
        env.reset(seed=seed)
        done = False
        while not done:
            began = time.perf_counter()
            action = env.script.expert()
            slowest = max(slowest, time.perf_counter() - began)
            _, reward, terminated, truncated, _ = env.step(action)
            done = terminated or truncated
        assert reward == 1.0
    assert slowest < 0.5
    env.close()
