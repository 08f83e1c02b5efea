# SPDX-License-Identifier: Apache-2.0
"""VLMAgentWrapper: Gymnasium's own games, MiniGrid and Atari give the episodes that they give without it."""

import re
import runpy
import string
import warnings
from pathlib import Path
from types import SimpleNamespace

import ale_py
import gymnasium
import minigrid
import numpy as np
import pytest
from gymnasium import spaces
from gymnasium.error import ResetNeeded
from gymnasium.utils.env_checker import check_env
from gymnasium.wrappers import TimeLimit

from vlmq_trl import (
    collect_demonstrations,
    dataset_from_episodes,
    episodes_from_dataset,
    play_episodes,
    validate_trajectories,
)
from vlmq_trl.agent_format import JSONFormat
from vlmq_trl.envs import Decision, VLMAgentWrapper
from vlmq_trl.rollout import DemonstratorPolicy, EnvFailureError, Response

gymnasium.register_envs(ale_py)
gymnasium.register_envs(minigrid)

LAKE_WORDS = {"left": 0, "down": 1, "right": 2, "up": 3}
TAXI_WORDS = {"south": 0, "north": 1, "east": 2, "west": 3, "pick up": 4, "drop off": 5}
GRID_WORDS = {"turn left": 0, "turn right": 1, "go forward": 2, "pick up": 3}
ROAD_WORDS = {"wait": 0, "up": 1, "down": 2}


def lake_alone(**settings):
    return gymnasium.make("FrozenLake-v1", render_mode="rgb_array", **settings)


def lake(**settings):
    return VLMAgentWrapper(lake_alone(), LAKE_WORDS, "Reach the gift.", **settings)


def cell(env, observation, info):
    return f"You are in cell {observation}."


def free_words(env, observation, info):
    return "Possible: " + ", ".join(word for word, number in TAXI_WORDS.items() if info["action_mask"][number])


def taxi_alone():
    return gymnasium.make("Taxi-v4", render_mode="rgb_array")


def taxi(**settings):
    return VLMAgentWrapper(taxi_alone(), TAXI_WORDS, "Take the passenger to the hotel.", text=free_words, **settings)


def grid_alone():
    return gymnasium.make("MiniGrid-Fetch-5x5-N2-v0", render_mode="rgb_array")


def grid(**settings):
    mission = settings.pop("task", lambda env, observation: f"{observation['mission'].capitalize()}.")
    return VLMAgentWrapper(grid_alone(), GRID_WORDS, mission, **settings)


def road_alone():
    return gymnasium.make("ALE/Freeway-v5", max_episode_steps=60)


def road(**settings):
    settings = {"picture": "observation", "frame_skip": 4, **settings}
    return VLMAgentWrapper(road_alone(), ROAD_WORDS, "Cross the road.", **settings)


GAMES = {
    "FrozenLake": SimpleNamespace(wrapped=lake, alone=lake_alone, words=LAKE_WORDS, skip=1),
    "Taxi": SimpleNamespace(wrapped=taxi, alone=taxi_alone, words=TAXI_WORDS, skip=1),
    "MiniGrid": SimpleNamespace(wrapped=grid, alone=grid_alone, words=GRID_WORDS, skip=1),
    "Atari": SimpleNamespace(wrapped=road, alone=road_alone, words=ROAD_WORDS, skip=4),
}
games = pytest.mark.parametrize("game", list(GAMES.values()), ids=list(GAMES))


class Counting(gymnasium.Env):
    """Open-ended actions: the words of the numbers 1, 2, 3, ... in turn; any other text ends the episode."""

    metadata = {"render_modes": ["rgb_array"], "render_fps": 7}
    observation_space = spaces.Discrete(100)
    action_space = spaces.Text(max_length=5, min_length=1, charset=string.ascii_lowercase)
    render_mode = "rgb_array"
    closed = False

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.count, self.options = 0, options
        return self.count, {"count": 0}

    def step(self, action):
        right = action == ("one", "two", "three")[self.count]
        self.count += right
        return self.count, float(right), not right, self.count == 3, {"count": self.count}

    def render(self):
        return np.full((8, 12, 3), self.count, np.uint8)

    def close(self):
        self.closed = True


class Drawing(gymnasium.Env):
    """One action; what it renders, and what its reset and its step give, is given. It never ends by itself."""

    metadata = {"render_modes": ["rgb_array"]}
    observation_space = spaces.Discrete(1)
    action_space = spaces.Discrete(1)
    render_mode = "rgb_array"

    def __init__(self, picture=None, first=(0, {}), then=(0, 0.0, False, False, {})):
        self.picture = np.zeros((8, 8, 3), np.uint8) if picture is None else picture
        self.first, self.then = first, then

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        return self.first

    def step(self, action):
        return self.then

    def render(self):
        return self.picture


def equal(one, other):
    """Whether two infos or observations are the same, arrays in them included."""
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(equal(one[key], other[key]) for key in one)
    return np.array_equal(one, other)


# Every game.


@games
def test_env_checker_is_clean(game):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", message=".*render modes.*spec.*")  # it was not made by `gymnasium.make`
        check_env(game.wrapped())


@games
def test_equal_seeds_give_equal_episodes_and_those_of_the_environment_alone(game):
    first, second, alone = game.wrapped(), game.wrapped(), game.alone()
    words = list(game.words)
    for seed in range(3):
        rng = np.random.default_rng(seed)
        inner, info = alone.reset(seed=seed)
        (one, mine), (other, again) = first.reset(seed=seed), second.reset(seed=seed)
        assert first.task == second.task and equal(mine, info) and equal(again, info)
        done = False
        while not done:
            picture = inner if game.skip > 1 else alone.render()
            np.testing.assert_array_equal(one["image"], picture)
            assert equal(one, other) and one in first.observation_space
            word, gained = words[rng.integers(len(words))], 0.0
            for _ in range(game.skip):
                inner, reward, terminated, truncated, info = alone.step(game.words[word])
                gained += reward
                if terminated or truncated:
                    break
            one, *outcome, mine = first.step(word)
            other, *outcome_again, _ = second.step(word)
            assert outcome == outcome_again == [gained, terminated, truncated]
            assert equal(mine, {**info, "valid": True, "action": word})
            done = terminated or truncated
    for env in (first, second, alone):
        env.close()


@games
def test_invalid_actions_change_nothing_and_use_a_turn(game):
    env = game.wrapped(max_turns=3, invalid_penalty=0.5)
    before, _ = env.reset(seed=0)
    for turn in range(1, 4):
        observation, reward, terminated, truncated, info = env.step("fly away")
        assert equal(observation, before)
        assert (reward, terminated, truncated) == (-0.5, False, turn == 3)
        assert info == {"valid": False, "action": ""}
    with pytest.raises(ResetNeeded):
        env.step("fly away")
    assert game.wrapped().invalid_penalty == 0


@games
def test_invalid_actions_may_end_the_episode_or_play_at_random(game):
    env = game.wrapped(on_invalid="terminate")
    env.reset(seed=0)
    assert env.step("fly away")[1:4] == (0.0, True, False)
    env = game.wrapped(on_invalid="random")
    played = set()
    for seed in range(12):
        env.reset(seed=seed)
        info = env.step("fly away")[4]
        assert info["valid"] is False
        played.add(info["action"])
    assert len(played) > 1 and played <= set(game.words)


@games
def test_words_ignore_case_and_outer_space_and_any_string_will_do(game):
    env = game.wrapped()
    env.reset(seed=0)
    assert env.legal_actions == tuple(game.words)
    assert [env.parse_env(f"\n {word.upper()} ") for word in game.words] == list(game.words)
    for other in ("", "0", "up down", "\x00", "😀", "\ud800", None, 3, ["up"]):
        assert env.parse_env(other) is None
        if any(env.step(other)[2:4]):
            env.reset()


@games
def test_random_play_becomes_a_dataset(game):
    def at_random(env, rng):
        return Decision(env.unwrapped.script.random(rng), {}, "")

    agent_format = JSONFormat()
    played = play_episodes(
        game.wrapped,
        DemonstratorPolicy(at_random, agent_format),
        episodes=4,
        num_envs=2,
        max_turns=6,
        agent_format=agent_format,
    )
    dataset = dataset_from_episodes(played)
    assert len(validate_trajectories(dataset)) == 4
    turns = [turn for episode in episodes_from_dataset(dataset) for turn in episode.turns]
    assert {turn.action for turn in turns} <= set(game.words) and all(turn.valid for turn in turns)


def test_worker_processes_play_the_same():
    class Strolling:
        def act(self, requests):
            return [Response(list(LAKE_WORDS)[request.rng.integers(4)]) for request in requests]

    here = list(play_episodes(lake, Strolling(), episodes=3, num_envs=2))
    there = list(play_episodes(lake, Strolling(), episodes=3, num_envs=2, workers=True))
    for one, other in zip(here, there, strict=True):
        assert [(turn.action, turn.reward) for turn in one.turns] == [
            (turn.action, turn.reward) for turn in other.turns
        ]
        np.testing.assert_array_equal(one.turns[-1].images[0], other.turns[-1].images[0])


# What is shown.


def test_text_is_shown_beside_the_picture_and_cut_to_its_length():
    env = VLMAgentWrapper(lake_alone(is_slippery=False), LAKE_WORDS, text=cell)
    assert env.reset(seed=0)[0]["text"] == "You are in cell 0."
    assert env.step("right")[0]["text"] == "You are in cell 1."
    assert env.step("fly")[0]["text"] == "You are in cell 1."
    short = VLMAgentWrapper(lake_alone(), LAKE_WORDS, text=cell, text_length=7)
    assert short.reset(seed=0)[0]["text"] == "You are"
    assert short.observation_space["text"].max_length == 7
    assert "text" not in lake().reset(seed=0)[0]


def test_text_from_the_info_stays_after_an_invalid_action():
    env = taxi()
    shown = env.reset(seed=0)[0]["text"]
    assert shown == "Possible: south, north"
    assert env.step("fly")[0]["text"] == shown
    assert env.step("south")[0]["text"].startswith("Possible: ")


def test_task_and_actions():
    assert lake().task == "Reach the gift. Actions: left, down, right, up."
    assert VLMAgentWrapper(lake_alone(), LAKE_WORDS).task == "Actions: left, down, right, up."
    env, tasks = grid(), set()
    for seed in range(10):
        observation, _ = env.env.reset(seed=seed)
        env.reset(seed=seed)
        actions = "Actions: turn left, turn right, go forward, pick up."
        assert env.task == f"{observation['mission'].capitalize()}. {actions}"
        tasks.add(env.task)
    assert len(tasks) > 3


def test_a_function_may_draw_the_picture():
    env = VLMAgentWrapper(
        gymnasium.make("FrozenLake-v1"), LAKE_WORDS, picture=lambda env, seen: np.full((4, 6, 3), seen, np.uint8)
    )
    assert env.picture_size == (4, 6)
    assert (env.reset(seed=0)[0]["image"] == 0).all()


def test_the_observation_is_the_picture_of_an_atari_game_and_its_own_copy():
    env = road()
    observation, _ = env.reset(seed=0)
    assert observation["image"].shape == (210, 160, 3) == (*env.picture_size, 3)
    kept = observation["image"].copy()
    env.step("up")
    np.testing.assert_array_equal(observation["image"], kept)
    env.close()


def test_render_gives_the_picture():
    env = lake()
    observation, _ = env.reset(seed=0)
    np.testing.assert_array_equal(env.render(), observation["image"])
    with pytest.warns(UserWarning, match="without a render mode"):
        assert lake(render_mode=None).render() is None
    assert env.metadata["render_fps"] == lake_alone().metadata["render_fps"]


# How it plays.


def test_frames_are_skipped_and_their_rewards_added():
    env, one_by_one = road(frame_skip=5), road(frame_skip=1)
    for other in (env, one_by_one):
        other.reset(seed=3)
    for _ in range(8):
        observation, gained, *_ = env.step("up")
        steps = [one_by_one.step("up") for _ in range(5)]
        np.testing.assert_array_equal(observation["image"], steps[-1][0]["image"])
        assert gained == sum(step[1] for step in steps)


def test_an_episode_that_ends_amid_skipped_frames_ends_there():
    env = VLMAgentWrapper(Counting(), frame_skip=3)
    env.reset(seed=0)
    assert env.step("one")[1:4] == (1.0, True, False)  # the second "one" is wrong
    env = road(frame_skip=50)
    env.reset(seed=0)
    assert env.step("wait")[2:4] == (False, False)
    assert env.step("wait")[2:4] == (False, True)  # the environment's own 60 frames


def test_terminated_and_truncated_are_the_environments():
    env = VLMAgentWrapper(lake_alone(is_slippery=False), LAKE_WORDS)
    env.reset(seed=0)
    outcomes = [env.step(word)[1:4] for word in ("down", "down", "right", "right", "down", "right")]
    assert outcomes == [(0.0, False, False)] * 5 + [(1.0, True, False)]
    env.reset(seed=0)
    assert [env.step("left")[2:4] for _ in range(100)] == [(False, False)] * 99 + [(False, True)]
    env = VLMAgentWrapper(lake_alone(is_slippery=False), LAKE_WORDS, max_turns=6)
    env.reset(seed=0)
    assert [env.step("left")[2:4] for _ in range(6)][-1] == (False, True)
    env.reset(seed=0)
    assert [env.step(word)[2:4] for word in ("down", "down", "right", "right", "down", "right")][-1] == (True, False)


@pytest.mark.parametrize(
    ("make", "turns"),
    [
        (lake, 100),  # FrozenLake's own limit of steps
        (road, 15),  # 60 frames, 4 a turn
        (lambda: road(frame_skip=7), 9),  # 60 = 8 * 7 + 4
        (lambda: lake(max_turns=3), 3),
        (lambda: VLMAgentWrapper(TimeLimit(Drawing(), 5), {"draw": 0}), 5),  # without a spec
        (lambda: VLMAgentWrapper(Drawing(), {"draw": 0}), 1000),  # no limit is known
        (grid, 1000),
    ],
)
def test_invalid_actions_alone_do_not_go_on_for_ever(make, turns):
    class Babbling:
        def act(self, requests):
            return [Response("I would go left.") for _ in requests]

    (episode,) = play_episodes(make, Babbling(), episodes=1, max_turns=1100)
    assert (len(episode.turns), episode.terminated, episode.truncated) == (turns, False, True)


@pytest.mark.parametrize("skip", [1, 4, 7])
def test_the_default_limit_does_not_cut_valid_play_short(skip):
    env = road(frame_skip=skip)
    env.reset(seed=0)
    while not env.step("wait")[3]:
        assert env.turns < env.max_turns
    assert env.env.get_wrapper_attr("_elapsed_steps") == 60


def test_an_environment_may_change_the_action_in_place():
    class Doubling(Drawing):
        action_space = spaces.Box(-10, 10, (2,), np.float32)
        got = ()

        def step(self, action):
            self.got = (*self.got, action.tolist())
            action *= 2
            return super().step(action)

    action = np.array([1, 0.5], np.float32)
    env = VLMAgentWrapper(Doubling(), {"push": action}, frame_skip=2)
    env.reset(seed=0)
    for _ in range(2):
        assert env.step("push")[4]["valid"]
    assert env.env.got == ([1, 0.5],) * 4 and action.tolist() == [1, 0.5]


def test_blank_text_is_no_action():
    env = Counting()
    env.action_space = spaces.Text(max_length=5, min_length=0, charset=string.printable)
    env = VLMAgentWrapper(env, invalid_penalty=0.5)
    env.reset(seed=0)
    for blank in ("", "   ", "\n"):  # a response without an action becomes ""
        assert env.step(blank)[1:] == (-0.5, False, False, {"valid": False, "action": ""})
    assert env.step("one")[1:3] == (1.0, False)


def test_text_without_spaces_warns():
    env = Counting()
    env.action_space = spaces.Text(max_length=20)
    with pytest.warns(UserWarning, match="such as 'go north', is invalid. If there are any, give the space a charset"):
        VLMAgentWrapper(env)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        VLMAgentWrapper(Counting())  # which says what characters it takes


def test_pictures_have_one_size():
    env = VLMAgentWrapper(Drawing(), {"draw": 0})
    env.reset(seed=0)
    env.env.picture = np.zeros((8, 9, 3), np.uint8)
    with pytest.raises(ValueError, match=r"has the shape \[8, 9, 3\], not \[8, 8, 3\] as before; give a function as"):
        env.step("draw")
    with pytest.raises(ValueError, match="as before"):
        env.reset()


@pytest.mark.parametrize(
    "reward", [None, "1", np.zeros(2), np.zeros(1), {}, 10**400], ids=lambda reward: f"{reward!r:.9}"
)
def test_rewards_are_numbers(reward):
    def make():
        return VLMAgentWrapper(Drawing(then=(0, reward, True, False, {})), {"draw": 0})

    env = make()
    env.reset(seed=0)
    with pytest.raises(ValueError, match=rf"gave the reward {re.escape(repr(reward)[:20])}.*, not a number"):
        env.step("draw")
    with pytest.raises(EnvFailureError, match=r"gave the reward .* on turn 0 of the episode with seed 0"):
        collect_demonstrations(make, policy="random", episodes=1, progress=False)


@pytest.mark.parametrize(
    ("given", "text"),
    [
        ({"then": (0, 1.0, True, {})}, r"step gave 4 values, not Gymnasium's five values \(observation, reward, term"),
        ({"then": None}, "step gave NoneType, not Gymnasium's five values"),
        ({"then": (0, 1.0, True, False, None)}, "step gave NoneType as its info, not a dictionary; give {}"),
        ({"first": np.zeros(2)}, r"reset gave ndarray, not Gymnasium's two values \(observation, info\); mend it"),
        ({"first": (0, None)}, "reset gave NoneType as its info, not a dictionary; give {}"),
    ],
)
def test_environments_that_do_not_keep_to_the_interface(given, text):
    with pytest.raises(TypeError, match=f"the environment's {text}"):
        env = VLMAgentWrapper(Drawing(**given), {"draw": 0})
        env.reset(seed=0)
        env.step("draw")


def test_a_demonstrator_plays_at_random_what_a_function_makes():
    dataset = collect_demonstrations(lake, policy="random", episodes=3, progress=False)
    turns = [turn for episode in episodes_from_dataset(dataset) for turn in episode.turns]
    assert {turn.action for turn in turns} <= set(LAKE_WORDS) and all(turn.valid for turn in turns)


def test_open_ended_text_actions():
    env = VLMAgentWrapper(Counting(), task="Count.")
    assert env.legal_actions is None and env.task == "Count." and env.metadata["render_fps"] == 7
    assert env.action_space.max_length == 5
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check_env(env, skip_render_check=True)
    env.reset(seed=0)
    assert env.step("one")[1:] == (1.0, False, False, {"count": 1, "valid": True, "action": "one"})
    for bad in ("", "Two", "eleven", "2", "two ", "\ud800"):  # outside the space: case, length, characters
        assert env.step(bad)[1:] == (0.0, False, False, {"valid": False, "action": ""})
    assert env.step("two")[1:4] == (1.0, False, False)
    assert env.step("three")[1:4] == (1.0, False, True)
    with pytest.raises(NotImplementedError, match="no list of legal actions"):
        env.script.random(np.random.default_rng(0))


def test_options_reach_the_environment_and_it_is_closed():
    env = VLMAgentWrapper(Counting())
    env.reset(seed=0, options={"from": 2})
    assert env.env.options == {"from": 2}
    env.reset(seed=0)
    assert env.env.options is None
    env.close()
    assert env.env.closed


def test_without_a_seed_episodes_differ_and_the_look_at_the_picture_leaves_no_seed_behind():
    starts = set()
    for _ in range(8):
        env = taxi()
        env.reset()
        starts.add(env._seen)
        env.reset()
        starts.add(env._seen)
    assert len(starts) > 8


# Errors.


def big(env, observation):
    return np.zeros((2, 2), np.uint8)


@pytest.mark.parametrize(
    ("make", "error", "text"),
    [
        (lambda: VLMAgentWrapper("Lake-v1"), TypeError, r"got the string 'Lake-v1'; pass gymnasium.make\(\.\.\.\)"),
        (lambda: VLMAgentWrapper(lake_alone), TypeError, "wraps an environment, got function; make it first"),
        (
            lambda: VLMAgentWrapper(gymnasium.make_vec("FrozenLake-v1", 2), LAKE_WORDS),
            TypeError,
            "wraps a single environment, got SyncVectorEnv; make one with gymnasium.make",
        ),
        (lambda: lake(frame_skip=0), ValueError, "frame_skip must be a whole number of at least 1, not 0"),
        (lambda: lake(frame_skip=1.5), ValueError, "frame_skip must be a whole number of at least 1, not 1.5"),
        (lambda: lake(max_turns=0), ValueError, "max_turns must be a whole number of at least 1, not 0"),
        (lambda: lake(max_turns=2.5), ValueError, "max_turns must be a whole number of at least 1, not 2.5"),
        (
            lambda: VLMAgentWrapper(lake_alone(), ["left", "down"]),
            TypeError,
            r"actions must map words to actions, \{'left': 0, 'right': 1\}, not \['left', 'down'\]",
        ),
        (
            lambda: VLMAgentWrapper(gymnasium.make("FrozenLake-v1"), LAKE_WORDS),
            ValueError,
            "the environment renders None; make it with render_mode='rgb_array', or say by `picture`",
        ),
        (
            lambda: lake(picture="render"),
            ValueError,
            "picture must be None, 'observation' or a function, not 'render'",
        ),
        (lambda: lake(picture="observation"), ValueError, "the observation is no picture but Discrete.16.; leave out"),
        (
            lambda: VLMAgentWrapper(lake_alone()),
            TypeError,
            "the environment's actions are Discrete.4.: give words for",
        ),
        (lambda: VLMAgentWrapper(lake_alone(), {}), ValueError, "actions must be distinct, not blank"),
        (lambda: VLMAgentWrapper(lake_alone(), {" ": 0}), ValueError, "actions must be distinct, not blank"),
        (
            lambda: VLMAgentWrapper(lake_alone(), {"Up": 3, "up ": 1}),
            ValueError,
            "whatever their case; got .'Up', 'up '",
        ),
        (
            lambda: VLMAgentWrapper(lake_alone(), {"fly": 4}),
            ValueError,
            "'fly' stands for 4, which is not in Discrete",
        ),
        (lambda: lake(picture=big), ValueError, r"picture is uint8 of shape \[2, 2\], not uint8 \[H, W, 3\]; give a"),
        (
            lambda: VLMAgentWrapper(Drawing(np.zeros((4, 4, 3))), {"draw": 0}),
            ValueError,
            "picture is float64 of shape",
        ),
        (lambda: lake(text=lambda *_: None).reset(seed=0), TypeError, "`text` gave NoneType, not a string"),
        (lambda: grid(task=lambda *_: 3).reset(seed=0), TypeError, "`task` gave int, not a string"),
        (lambda: lake(render_mode="human"), ValueError, "render_mode must be None or 'rgb_array', not 'human'"),
        (lambda: lake(on_invalid="ignore"), ValueError, "on_invalid must be one of noop, random, terminate"),
        (lambda: lake(invalid_penalty=-1), ValueError, "invalid_penalty must be finite and at least 0"),
    ],
)
def test_errors(make, error, text):
    with pytest.raises(error, match=text):
        make()


def test_a_game_that_was_not_reset_says_so():
    with pytest.raises(ResetNeeded, match=r"VLMAgentWrapper.step: no episode is running; call reset\(\) first"):
        lake().step("left")


# The page.


def test_the_page_runs_as_it_stands(tmp_path):
    page = (Path(__file__).parents[1] / "docs" / "bring_your_own.md").read_text()
    (snippet,) = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    assert len(snippet.splitlines()) < 40
    (tmp_path / "page.py").write_text(snippet)
    ran = runpy.run_path(str(tmp_path / "page.py"))
    episodes = list(episodes_from_dataset(ran["play"]))
    assert len(episodes) == len(validate_trajectories(ran["play"])) == 200
    assert all(turn.valid for episode in episodes for turn in episode.turns)
    assert 0 < sum(episode.turns[-1].reward > 0 for episode in episodes) < 20  # random play: about 1 in 70
    check_env(ran["make_lake"](), skip_render_check=True)
