# SPDX-License-Identifier: Apache-2.0
"""BabyAI: minigrid's own levels, pictures and rewards; any string as action; a reading that is true; scripted play."""

import importlib.util
import os
import subprocess
import sys
import time
import warnings
from collections import Counter
from pathlib import Path

import gymnasium
import numpy as np
import pytest
from gymnasium.utils.env_checker import check_env
from minigrid.core.constants import DIR_TO_VEC, IDX_TO_COLOR, IDX_TO_OBJECT
from minigrid.core.world_object import Ball, Box, Door, Key, Wall
from minigrid.wrappers import RGBImgObsWrapper, RGBImgPartialObsWrapper

from vlmq_trl import play_episodes
from vlmq_trl.envs import DOMAINS, make_demonstrator
from vlmq_trl.envs.babyai import DOMAIN, LEVELS, BabyAI
from vlmq_trl.envs.babyai.game import ACTIONS, NOT_AN_ACTION
from vlmq_trl.rollout import Response

ROOT = Path(__file__).parents[1]
WORDS = list(ACTIONS[:6])
SOME = ("GoToRedBall", "GoToObjMazeS4R2", "PickupLoc", "PutNextS5N2Carrying", "UnlockLocal", "SynthS5R2")

some = pytest.mark.parametrize("level", SOME)
views = pytest.mark.parametrize("view", ["partial", "full"])


def start(level="GoToLocal", seed=0, **settings):
    env = BabyAI(level, **settings)
    env.reset(seed=seed)
    return env


def id_of(level):
    return f"vlmq_trl/BabyAI-{level}-v0"


def minigrids_id(level):
    (found,) = [env_id for env_id in gymnasium.registry if env_id.startswith(f"BabyAI-{level}-v")]
    return found


def total(env):
    """The return of the rest of an episode that the script's expert plays."""
    gained, done = 0.0, False
    while not done:
        _, reward, terminated, truncated, _ = env.step(env.script.expert())
        gained, done = gained + reward, terminated or truncated
    return gained


def returns(level, policy, seeds, **settings):
    """Returns of the episodes with these seeds."""
    env, player = gymnasium.make(id_of(level), **settings), make_demonstrator(id_of(level), policy)
    gained = []
    for seed in seeds:
        env.reset(seed=seed)
        rng, done = np.random.default_rng(seed), False
        gained.append(0.0)
        while not done:
            _, reward, terminated, truncated, info = env.step(player(env, rng).action)
            assert info["valid"]
            gained[-1] += reward
            done = terminated or truncated
    return np.array(gained)


def facing(thing, carrying=None, **settings):
    """A started level whose agent has `thing` in front of it and carries something."""
    env = start(effects=True, **settings)
    env.game.grid.set(*env.game.front_pos, thing)
    env.game.carrying = carrying
    return env


# The domain.


def test_every_level_that_minigrid_registers_is_there():
    theirs = [
        env_id.rpartition("-v")[0].removeprefix("BabyAI-") for env_id in gymnasium.registry if "BabyAI" in env_id
    ]
    assert sorted(LEVELS) == sorted(level for level in theirs if not level.startswith("vlmq_trl/"))
    assert len(set(LEVELS)) == len(LEVELS) == 96
    assert DOMAIN in DOMAINS and list(DOMAIN.envs) == [id_of(level) for level in LEVELS]
    assert set(DOMAIN.envs) <= set(gymnasium.registry)


def test_every_level_starts():
    for level in LEVELS:
        env = gymnasium.make(id_of(level)).unwrapped
        observation, _ = env.reset(seed=0)
        assert observation in env.observation_space
        assert env.game.mission in env.task and env.max_turns == env.game.max_steps > 0
        env.close()
        short = start(level, max_turns=7, tile_size=8)
        assert short.max_turns == short.game.max_steps == 7


def test_importing_the_environments_does_not_import_minigrid():
    code = (
        "import sys, vlmq_trl.envs; assert 'minigrid' not in sys.modules\n"
        "assert 'vlmq_trl/BabyAI-GoTo-v0' in __import__('gymnasium').registry"
    )
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, timeout=120)


def test_without_minigrid_the_error_says_how_to_install_it(monkeypatch):
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name == "minigrid" else found(name))
    with pytest.raises(ImportError, match=r'BabyAI.*minigrid not installed: pip install "vlmq_trl\[babyai\]"'):
        gymnasium.make(id_of("GoToLocal"))


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({"level": "GoToMars"}, "minigrid has no level 'GoToMars'; `vlmq_trl.envs.babyai.LEVELS` lists them"),
        ({"view": "top"}, "view must be one of partial, full, not 'top'"),
        ({"tile_size": 4}, "tile_size must be at least 8 pixels, not 4"),
        ({"max_turns": 0}, "max_turns must be at least 1, or None for the level's own, not 0"),
        ({"on_invalid": "ignore"}, "on_invalid must be one of"),
        ({"invalid_penalty": -1}, "invalid_penalty must be finite and at least 0"),
    ],
)
def test_bad_settings(settings, text):
    with pytest.raises(ValueError, match=f"BabyAI: {text}"):
        BabyAI(**settings)


# Episodes.


@some
@pytest.mark.parametrize("settings", [{"effects": True}, {"view": "full", "tile_size": 8}], ids=str)
def test_env_checker_is_clean(level, settings):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check_env(gymnasium.make(id_of(level), render_mode="rgb_array", **settings).unwrapped)


@some
@views
def test_equal_seeds_give_equal_episodes_and_those_of_minigrid(level, view):
    """The words do what minigrid's numbers do; pictures are those of its wrappers."""
    if view == "partial":
        theirs = RGBImgPartialObsWrapper(gymnasium.make(minigrids_id(level)), tile_size=16)
    else:
        theirs = RGBImgObsWrapper(gymnasium.make(minigrids_id(level)), tile_size=16)
    mine, again = (BabyAI(level, view=view, tile_size=16) for _ in range(2))
    for seed in range(3):
        expected, _ = theirs.reset(seed=seed)
        observations = [env.reset(seed=seed)[0] for env in (mine, again)]
        rng, done = np.random.default_rng(seed), False
        while not done and mine.turns < 60:
            for observation in observations:
                if view == "partial" or mine.game.carrying is None:  # the full view of minigrid does not show that
                    np.testing.assert_array_equal(observation["image"], expected["image"])
            assert expected["mission"] in mine.task and mine.task == again.task
            number = int(rng.integers(6))
            expected, *outcome, _ = theirs.step(number)
            steps = [env.step(WORDS[number]) for env in (mine, again)]
            observations = [step[0] for step in steps]
            assert all(step[4] == {"valid": True, "action": WORDS[number]} for step in steps)
            assert all(list(step[1:4]) == outcome for step in steps)
            done = any(outcome[1:])


def test_missions_and_tasks_change_from_episode_to_episode():
    env = BabyAI("PickupLoc")
    tasks = set()
    for seed in range(10):
        env.reset(seed=seed)
        assert env.task == (
            f"Your mission: {env.game.mission}. The picture shows what lies ahead of you; you are the red triangle. "
            "Actions: turn left, turn right, go forward, pick up, drop, toggle."
        )
        tasks.add(env.task)
    assert len(tasks) > 5
    assert "The picture shows all rooms;" in start(view="full").task


@some
def test_an_episode_of_invalid_actions_ends_and_is_no_success(level):
    env = start(level, invalid_penalty=0.25)
    before = env.state_text()
    for turn in range(1, env.max_turns + 1):
        _, reward, terminated, truncated, info = env.step("fly")
        assert (reward, terminated, truncated) == (-0.25, False, turn == env.max_turns)
        assert info == {"valid": False, "action": ""} and env.state_text() == before
    assert BabyAI(level).invalid_penalty == 0


def test_invalid_turns_count_in_the_reward_and_against_the_limit():
    env, other = start("GoToObj", seed=1), start("GoToObj", seed=1)
    for _ in range(10):
        env.step("fly")
    gained = total(env)
    quick = total(other)
    assert env.turns == other.turns + 10
    assert gained == pytest.approx(1 - 0.9 * env.turns / env.max_turns) and gained < quick


def test_success_on_the_last_turn_terminates():
    turns = start("GoToObj", seed=1)
    total(turns)
    env = start("GoToObj", seed=1, max_turns=turns.turns)
    outcomes = []
    while not outcomes or not any(outcomes[-1][1:]):
        outcomes.append(env.step(env.script.expert())[1:4])
    assert outcomes[-1] == (pytest.approx(0.1), True, False)
    env = start("GoToObj", seed=1, max_turns=turns.turns - 1)
    assert total(env) == 0 and env.turns == turns.turns - 1


def test_terminate_and_random():
    assert start(on_invalid="terminate").step("fly")[1:4] == (0.0, True, False)
    env, played = BabyAI("GoToRedBallNoDists", on_invalid="random", tile_size=8), Counter()
    for seed in range(300):
        env.reset(seed=seed)
        info = env.step("fly")[4]
        assert info["valid"] is False
        played[info["action"]] += 1
    assert set(played) == set(WORDS) and all(25 < count < 75 for count in played.values())


@pytest.mark.parametrize("on_invalid", ["noop", "random", "terminate"])
def test_ten_thousand_random_strings_never_crash(on_invalid):
    rng = np.random.default_rng(0)
    pieces = [
        "turn",
        "left",
        "right",
        "go",
        "forward",
        "FORWARD",
        "pick up",
        "drop",
        "toggle",
        "done",
        " ",
        "\n",
        "\t",
    ]
    pieces += ["é", "\x00", "😀", "\ud800", "{", "}", '"', "1", "", "turn left", "go forward", "Turn Right "]
    level = "GoToRedBallNoDists" if on_invalid == "terminate" else "MiniBossLevel"  # one that is made fast
    env = start(level, on_invalid=on_invalid, tile_size=8, effects=True)
    valid = 0
    for _ in range(3400):
        action = "".join(rng.choice(pieces, size=rng.integers(1, 4)))
        observation, reward, terminated, truncated, info = env.step(action)
        assert observation in env.observation_space and np.isfinite(reward)
        assert info["valid"] == (action.strip().lower() in WORDS)
        assert info["action"] in (*WORDS, "")
        valid += info["valid"]
        if terminated or truncated:
            env.reset()
    assert 300 < valid < 3000


def test_actions_ignore_case_and_outer_space():
    env = start()
    assert [env.parse_env(f" {word.upper()}\n") for word in WORDS] == WORDS
    for other in ("", "done", "turn", "turn  left", "left", "0", "turn left.", None, 3, ["drop"]):
        assert env.parse_env(other) is None


def test_unknown_reset_options_are_refused():
    with pytest.raises(ValueError, match=r"unknown options \['room'\]; it knows none"):
        BabyAI().reset(seed=0, options={"room": 1})


def test_minigrid_asks_for_done_where_its_variable_says_so():
    code = (
        "from vlmq_trl.envs.babyai import BabyAI\n"
        "env = BabyAI('GoToLocal', tile_size=8); assert env.legal_actions[-1] == 'done'\n"
        "for seed in range(10):\n"
        "    env.reset(seed=seed); done = False; actions = []\n"
        "    assert 'done.' in env.task\n"
        "    while not done:\n"
        "        actions.append(env.script.expert())\n"
        "        _, reward, *ends, info = env.step(actions[-1]); done = any(ends)\n"
        "    assert reward > 0 and info['valid'] and actions[-1] == 'done', (seed, actions)"
    )
    environment = {**os.environ, "BABYAI_DONE_ACTIONS": "1"}
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, timeout=120, env=environment)


def test_minigrids_rejected_draws_are_not_printed(capfd):
    for seed in range(10):
        start("GoToObjDoor", seed=seed)
    assert capfd.readouterr().out == ""


# What is seen.


def test_pictures_have_the_size_that_was_asked_for():
    assert start().reset()[0]["image"].shape == (224, 224, 3)
    assert start(tile_size=10).reset()[0]["image"].shape == (70, 70, 3)
    env = start("PutNextS5N2", view="full", tile_size=20)
    assert env.reset()[0]["image"].shape == (20 * env.game.height, 20 * env.game.width, 3)
    assert env.game.height != env.game.width


@views
def test_what_is_carried_is_in_the_picture(view):
    pictures = {}
    for name, thing in {"nothing": None, "ball": Ball("blue"), "key": Key("blue"), "green": Key("green")}.items():
        env = start(view=view)
        env.game.carrying = thing
        pictures[name] = env._picture().astype(int)
        assert env.state_text()["carrying"] == (f"{thing.color} {thing.type}" if thing else "nothing")
        assert env.game.grid.get(*env.game.agent_pos) is None  # looking changes nothing
    names = list(pictures)
    for i, one in enumerate(names):
        for other in names[:i]:
            assert (np.abs(pictures[one] - pictures[other]).max(-1) > 60).sum() > 20, (one, other)


def parse_seen(reading, words):
    """{(steps along the first word, steps along the third): name} from the text of "seen"; as 2 ahead 1 left."""
    found = {}
    for entry in [] if reading == "nothing" else reading.split(", "):
        name, *moves = entry.split(" ")
        while not moves[0].isdigit():
            name += " " + moves.pop(0)
        place = [0, 0]
        for cells, word in zip(moves[::2], moves[1::2], strict=True):
            place[words.index(word) // 2] += int(cells) * (1 if words.index(word) % 2 == 0 else -1)
        assert tuple(place) not in found
        found[tuple(place)] = name
    return found


def name_of(code):
    """The words for minigrid's three numbers of a cell."""
    kind, color, state = (int(number) for number in code)
    name = f"{IDX_TO_COLOR[color]} {IDX_TO_OBJECT[kind]}"
    return f"{('open', 'closed', 'locked')[state]} {name}" if IDX_TO_OBJECT[kind] == "door" else name


def is_object(code):
    return IDX_TO_OBJECT[int(code[0])] not in ("unseen", "empty", "wall", "agent")


def check_reading(env):
    """Compares the reading with minigrid's encoded grid and encoded view."""
    game, reading = env.game, env.state_text()
    grid, (x, y) = game.grid.encode(), (int(n) for n in game.agent_pos)
    ahead = DIR_TO_VEC[game.agent_dir]
    front = grid[x + ahead[0], y + ahead[1]]
    words = {"wall": "wall", "empty": "nothing"}
    assert reading["in front"] == words.get(IDX_TO_OBJECT[int(front[0])]) or reading["in front"] == name_of(front)
    assert reading["carrying"] == (name_of(game.carrying.encode()) if game.carrying else "nothing")
    if env.view == "full":
        assert reading["facing"] == ("right", "down", "left", "up")[game.agent_dir]
        seen = parse_seen(reading["seen"], ["up", "down", "right", "left"])
        places = [(i, j) for i in range(game.width) for j in range(game.height) if is_object(grid[i, j])]
        assert seen == {(y - j, i - x): name_of(grid[i, j]) for i, j in places if (i, j) != (x, y)}
        return
    seen = parse_seen(reading["seen"], ["ahead", "behind", "right", "left"])
    view = game.gen_obs()["image"]
    places = [(i, j) for i in range(7) for j in range(7) if is_object(view[i, j]) and (i, j) != (3, 6)]
    assert seen == {(6 - j, i - 3): name_of(view[i, j]) for i, j in places}
    for (forward, right), name in seen.items():  # and where the world has it
        place = np.array([x, y]) + forward * ahead + right * np.array([-ahead[1], ahead[0]])
        assert name_of(grid[tuple(place)]) == name


@some
@views
def test_the_reading_is_true(level, view):
    carried = 0
    for seed in range(4):
        env, rng = start(level, seed=seed, view=view, tile_size=8), np.random.default_rng(seed)
        for turn in range(60):
            check_reading(env)
            carried += env.game.carrying is not None
            action = env.script.expert() if turn % 2 else WORDS[rng.integers(6)]
            if any(env.step(action)[2:4]):
                break
        check_reading(env)
    assert carried or level.startswith(("GoTo", "PickupLoc"))


def test_the_reading_in_words():
    env = start("OneRoomS8", seed=0)
    game = env.game
    game.grid.wall_rect(0, 0, 8, 8)
    for i in range(1, 7):
        for j in range(1, 7):
            game.grid.set(i, j, None)
    game.agent_pos, game.agent_dir = (3, 5), 3  # it looks up
    for x, y, thing in [
        (3, 4, Door("red", is_locked=True)),
        (2, 3, Ball("blue")),
        (5, 3, Box("grey")),
        (4, 5, Key("green")),
        (3, 6, Ball("red")),
    ]:
        game.grid.set(x, y, thing)
    assert env.state_text() == {
        "in front": "locked red door",
        "carrying": "nothing",
        "seen": "green key 1 right, locked red door 1 ahead, blue ball 2 ahead 1 left, grey box 2 ahead 2 right",
    }
    env.view, env.reading_fields = "full", ("facing", "in front", "carrying", "seen")
    assert env.state_text() == {
        "facing": "up",
        "in front": "locked red door",
        "carrying": "nothing",
        "seen": "blue ball 2 up 1 left, grey box 2 up 2 right, locked red door 1 up, green key 1 right, "
        "red ball 1 down",
    }
    game.agent_dir = 1
    game.grid.set(3, 6, None)
    assert env.state_text()["in front"] == "nothing"
    game.agent_pos = (3, 6)
    assert env.state_text()["in front"] == "wall"


@pytest.mark.parametrize(
    ("thing", "carrying", "action", "effect"),
    [
        (None, None, "turn left", "You turned left."),
        (None, None, "turn right", "You turned right."),
        (None, None, "go forward", "You moved forward."),
        (Wall(), None, "go forward", "The way is blocked."),
        (Ball("red"), None, "go forward", "The way is blocked."),
        (Door("red", is_open=True), None, "go forward", "You moved forward."),
        (Ball("red"), None, "pick up", "You picked up the red ball."),
        (Ball("red"), Key("blue"), "pick up", "You carry something already."),
        (None, None, "pick up", "There is nothing to pick up."),
        (Wall(), None, "pick up", "That cannot be picked up."),
        (None, Key("blue"), "drop", "You dropped the blue key."),
        (Wall(), Key("blue"), "drop", "There is no room to drop it."),
        (None, None, "drop", "You carry nothing."),
        (None, None, "toggle", "There is nothing to toggle."),
        (Wall(), None, "toggle", "Nothing happened."),
        (Door("red"), None, "toggle", "You opened the red door."),
        (Door("red", is_open=True), None, "toggle", "You closed the red door."),
        (Door("red", is_locked=True), None, "toggle", "The red door is locked."),
        (Door("red", is_locked=True), Key("blue"), "toggle", "The red door is locked."),
        (Door("red", is_locked=True), Key("red"), "toggle", "You opened the red door."),
        (Box("grey"), None, "toggle", "You opened the grey box. It was empty."),
        (Box("grey", Key("blue")), None, "toggle", "You opened the grey box. A blue key was inside."),
        (None, None, "fly", NOT_AN_ACTION),
    ],
)
def test_effects(thing, carrying, action, effect):
    env = facing(thing, carrying)
    assert env._observation()["text"] == ""
    assert env.step(action)[0]["text"] == effect
    assert env.reset()[0]["text"] == ""


def test_without_effects_there_is_no_text():
    assert set(start().step("drop")[0]) == {"image"}


def test_render_is_the_observation():
    env = BabyAI(render_mode="rgb_array")
    observation, _ = env.reset(seed=2)
    picture = env.render()
    np.testing.assert_array_equal(picture, observation["image"])
    picture[:] = 0  # the caller's own copy
    np.testing.assert_array_equal(env.render(), observation["image"])


# Scripted play.


@pytest.mark.parametrize(
    "level",
    ["GoToLocal", "GoToObjMazeS4", "PickupLoc", "PutNextLocal", "PutNextS6N3Carrying", "OpenDoorsOrderN4", "KeyInBox"]
    + ["UnlockLocalDist", "UnlockToUnlock", "KeyCorridorS3R3", "GoToSeqS5R2", "MoveTwoAcrossS5N2", "MiniBossLevel"],
)
def test_the_expert_succeeds(level):
    assert (returns(level, "expert", range(6), tile_size=8) > 0).all()


TWENTY = (
    "GoToRedBall GoToObj GoToLocal GoToObjMaze GoToSeq GoToDoor Open OpenRedBlueDoors OpenDoorsOrderN4 Pickup "
    "UnblockPickup PickupDist PickupAbove PutNextLocal PutNextS7N4Carrying KeyInBox BlockedUnlockPickup KeyCorridor "
    "SynthLoc BossLevel"
)


@pytest.mark.slow
def test_the_expert_succeeds_on_twenty_levels():
    for level in TWENTY.split():
        assert (returns(level, "expert", range(50), tile_size=8) > 0).mean() >= 0.99, level


def test_a_mission_without_a_solution_ends_in_time():
    """The key of a locked room lies in that room: no play succeeds. The bot alone would think for ever."""
    env = start("GoToImpUnlock", seed=6, tile_size=8)
    slowest, done = 0.0, False
    while not done:
        begin = time.perf_counter()
        action = env.script.expert()
        slowest = max(slowest, time.perf_counter() - begin)
        assert action in WORDS
        *_, terminated, truncated, _ = env.step(action)
        done = terminated or truncated
    assert truncated and not terminated and env.turns == env.max_turns
    assert slowest < 10  # measured 0.3 s


@pytest.mark.parametrize(
    "level", ["GoToLocal", "PickupLoc", "PutNextLocal", "OpenDoorsOrderN4", "UnlockLocal", "GoToObjMazeS4"]
)
def test_the_expert_recovers_from_whatever_was_played(level):
    """The same after random turns that it was asked about, and after random turns that it was not."""
    for asked in (True, False):
        recovered = played = 0
        for seed in range(6):
            env, rng = start(level, seed=seed, tile_size=8), np.random.default_rng(seed)
            for _ in range(12):
                if asked:
                    env.script.expert()
                if any(env.step([*WORDS, "fly"][rng.integers(7)])[2:4]):
                    break
            else:
                played += 1
                recovered += total(env) > 0
        assert played >= 3 and recovered >= played - 1, (asked, played, recovered)


def test_it_goes_on_after_an_invalid_action_as_if_nothing_had_happened():
    for seed in range(10):
        env, twin = start("PutNextLocal", seed=seed), start("PutNextLocal", seed=seed)
        done = False
        while not done:
            action = env.script.expert()
            env.step("fly")
            assert env.script.expert() == action == twin.script.expert()
            done = env.step(action)[2]
            assert twin.step(action)[2] == done


@some
def test_mistakes_and_thoughts(level):
    """The mistake is a function of the right action; thoughts and reading are the same whoever plays."""
    swapped = {"turn left": "turn right", "turn right": "turn left", "go forward": "pick up"}
    env = gymnasium.make(id_of(level), tile_size=8)
    players = [make_demonstrator(id_of(level), policy) for policy in ("expert", "flawed:1", "random")]
    for seed in range(5):
        env.reset(seed=seed)
        done = False
        while not done:
            rng = np.random.default_rng(0)
            right, wrong, other = (player(env, rng) for player in players)
            assert wrong.action == swapped.get(right.action, "go forward")
            assert right.reading == wrong.reading == other.reading == env.unwrapped.state_text()
            assert right.thoughts == wrong.thoughts == other.thoughts != ""
            assert not any(action in right.thoughts for action in WORDS)
            done = any(env.step(right.action)[2:4])


def test_thoughts_say_where_the_present_target_is():
    env = start("PutNextS5N2Carrying", seed=1)
    instruction = env.game.instrs
    fixed = instruction.desc_fixed
    carried = f"{env.game.carrying.color} {env.game.carrying.type} carried"
    assert env.script.thoughts() == f"{carried}; no {fixed.color} {fixed.type} in view"
    total(env)
    assert env.script.thoughts().startswith(f"{instruction.desc_move.color} {instruction.desc_move.type} ")

    env = start("GoToLocal", seed=3, view="full")
    target = env.game.instrs.desc
    assert any(env.script.thoughts() == entry for entry in env.state_text()["seen"].split(", "))
    assert env.script.thoughts().startswith(f"{target.color} {target.type} ")


def test_thoughts_follow_the_order_of_the_mission():
    for seed in range(12):
        env = start("OpenDoorsOrderN4", seed=seed)
        instruction = env.game.instrs
        if not hasattr(instruction, "instr_a"):
            continue
        first, second = instruction.instr_a, instruction.instr_b
        if "after" in env.game.mission:
            first, second = second, first
        assert f"{first.desc.color} door" in env.script.thoughts()
        while "success" not in (instruction.a_done, instruction.b_done):
            env.step(env.script.expert())
        assert f"{second.desc.color} door" in env.script.thoughts()


def test_random_play_is_uniform():
    env, rng = start(), np.random.default_rng(0)
    played = Counter(env.script.random(rng) for _ in range(1200))
    assert set(played) == set(WORDS) and all(140 < count < 260 for count in played.values())


@pytest.mark.parametrize("level", ["GoToObj", "GoToLocal", "PickupLoc"])
def test_the_flaw_leaves_successes_and_costs_turns(level):
    seeds = range(12)
    expert, flawed = (returns(level, policy, seeds, tile_size=8) for policy in ("expert", "flawed:0.5"))
    assert (flawed > 0).mean() >= 0.5
    assert flawed.mean() < expert.mean() - 0.05
    assert (returns(level, "flawed:1", seeds, tile_size=8) > 0).mean() <= 0.5


class Chooser:
    """Plays a random action, one in eight of them no action."""

    def act(self, requests):
        words = [*WORDS, "fly", "turn left"]
        return [Response(f'{{"action": "{words[request.rng.integers(8)]}"}}') for request in requests]


def test_worker_processes_play_the_same_episodes():
    settings = {"episodes": 4, "num_envs": 2, "env_kwargs": {"tile_size": 8, "effects": True}}
    here = list(play_episodes(id_of("GoToLocal"), Chooser(), **settings))
    there = list(play_episodes(id_of("GoToLocal"), Chooser(), workers=True, **settings))
    for one, other in zip(here, there, strict=True):
        assert [(turn.action, turn.reward, turn.valid) for turn in one.turns] == [
            (turn.action, turn.reward, turn.valid) for turn in other.turns
        ]
        assert (one.terminated, one.truncated) == (other.terminated, other.truncated)
        for mine, theirs in zip(one.turns, other.turns, strict=True):
            assert mine.prompt == theirs.prompt
            np.testing.assert_array_equal(mine.images[0], theirs.images[0])


def test_fast_enough():
    env = start()
    rng = np.random.default_rng(0)
    begin = time.perf_counter()
    for _ in range(500):
        if any(env.step(WORDS[rng.integers(6)])[2:4]):
            env.reset()
    assert time.perf_counter() - begin < 10  # 50 turns/s on a busy machine; measured 1,000 and more
