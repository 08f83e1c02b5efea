# SPDX-License-Identifier: Apache-2.0
"""Rollouts: order and seeds, batching, truncation, history, invalid responses, errors."""

import json

import gymnasium
import numpy as np
import pytest
from gymnasium import spaces

from vlmq_trl.agent_format import JSONCoTFormat, JSONFormat, PlainFormat
from vlmq_trl.envs import Decision, make_demonstrator
from vlmq_trl.metrics import wilson_interval
from vlmq_trl.rollout import (
    DemonstratorPolicy,
    Response,
    collect_demonstrations,
    episode_metrics,
    make_env,
    play_episodes,
)
from vlmq_trl.trajectory import Episode, Turn, dataset_from_episodes, episodes_from_dataset, validate_trajectories

NUMBER_LINE = "vlmq_trl/NumberLine-v0"


class Countdown(gymnasium.Env):
    """Starts at 1..6 by seed; "down" counts down, 0 terminates with reward 1; `limit` turns truncate."""

    observation_space = spaces.Dict(
        {"image": spaces.Box(0, 255, (2, 2, 3), np.uint8), "text": spaces.Text(max_length=20)}
    )
    action_space = spaces.Text(max_length=10, min_length=0)
    task = "Say down."

    def __init__(self, limit=4, reward=1.0, images=True):
        self.limit, self.reward, self.images = limit, reward, images

    def observe(self):
        text = {"text": f"{self.count} left"}
        return {"image": np.full((2, 2, 3), self.count, dtype=np.uint8), **text} if self.images else text

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.count, self.turns = int(self.np_random.integers(1, 7)), 0
        return self.observe(), {}

    def step(self, action):
        self.turns += 1
        valid = action == "down"
        self.count -= valid
        done = self.count == 0
        reward = self.reward if done else -0.5 * (not valid)
        return self.observe(), reward, done, not done and self.turns >= self.limit, {"valid": valid}


SHARED = Countdown()


class Scripted:
    """Answers from the prompt and the episode's generator, and keeps the batch sizes."""

    def __init__(self, answers=("down",), logprobs=False):
        self.answers, self.logprobs, self.batches = answers, logprobs, []

    def act(self, requests):
        self.batches.append(len(requests))
        return [Response(str(r.rng.choice(self.answers)), [-0.5] if self.logprobs else None) for r in requests]


def summary(episode: Episode):
    return (
        episode.episode_id,
        episode.seed,
        episode.terminated,
        episode.truncated,
        [(t.completion, t.reward, t.valid, t.prompt, [i.tolist() for i in t.images]) for t in episode.turns],
        None if episode.final_images is None else [image.tolist() for image in episode.final_images],
    )


def test_episodes_come_in_order_and_do_not_depend_on_the_number_of_environments():
    results = []
    for num_envs in (1, 3, 20):
        policy = Scripted(("down", "up"))
        results.append(list(play_episodes(Countdown, policy, episodes=12, seed=7, num_envs=num_envs)))
        assert policy.batches[0] == min(num_envs, 12)
    assert [e.seed for e in results[0]] == list(range(7, 19))
    assert [e.episode_id for e in results[0]][:2] == ["Countdown/7", "Countdown/8"]
    assert {e.truncated for e in results[0]} == {False, True}
    for other in results[1:]:
        assert [summary(e) for e in other] == [summary(e) for e in results[0]]


def test_a_finished_environment_takes_the_next_episode_at_once():
    policy = Scripted()
    played = list(play_episodes(Countdown, policy, episodes=40, num_envs=4))
    turns = sum(len(episode.turns) for episode in played)
    assert sum(policy.batches) == turns
    assert all(size == 4 for size in policy.batches[: turns // 4 - 4])


def test_it_streams():
    policy = Scripted()
    first = next(play_episodes(Countdown, policy, episodes=10**9, num_envs=2))
    assert first.seed == 0 and len(policy.batches) < 10


def test_truncation_records_the_final_observation():
    played = list(play_episodes(Countdown, Scripted(), episodes=20, num_envs=5))
    for episode in played:
        assert episode.truncated != episode.terminated
        start = int(episode.turns[0].images[0][0, 0, 0])
        assert episode.truncated == (start > 4)
        if episode.truncated:
            assert int(episode.final_images[0][0, 0, 0]) == start - 4
            assert f"{start - 4} left" in episode.final_prompt[-1]["content"][-1]["text"]
        else:
            assert episode.final_prompt is None and episode.final_images is None
            assert episode.turns[-1].reward == 1.0 and episode.success
    index = validate_trajectories(dataset_from_episodes(played), "all")
    assert index.returns.tolist() == [episode.return_ for episode in played]


def test_max_turns():
    episode = next(play_episodes(lambda: Countdown(limit=10**6), Scripted(("up",)), episodes=1, max_turns=3))
    assert len(episode.turns) == 3 and episode.truncated and episode.final_prompt is not None


def test_responses_that_do_not_parse_cost_a_turn():
    episode = next(play_episodes(Countdown, Scripted(("down",)), episodes=1, agent_format=JSONFormat()))
    assert len(episode.turns) == 4 and episode.truncated
    for turn in episode.turns:
        assert (turn.completion, turn.action, turn.valid, turn.reward) == ("down", "", False, -0.5)
    illegal = next(play_episodes(Countdown, Scripted(("up",)), episodes=1))
    assert [(turn.action, turn.valid) for turn in illegal.turns] == [("up", False)] * 4
    penalties = list(play_episodes(NUMBER_LINE, Scripted(("nonsense",)), episodes=2))
    assert all(episode.return_ == -10.0 and episode.valid_rate == 0.0 for episode in penalties)


def test_history_shows_the_last_turns():
    fmt = PlainFormat(history=2)
    episode = next(play_episodes(Countdown, Scripted(("down", "up")), episodes=1, seed=1, agent_format=fmt))
    assert [len(turn.images) for turn in episode.turns[:4]] == [1, 2, 3, 3][: len(episode.turns)]
    last = episode.turns[-1]
    answers = [m["content"][0]["text"] for m in last.prompt if m["role"] == "assistant"]
    assert answers == [turn.completion for turn in episode.turns[:-1]][-2:]
    assert last.prompt[0]["content"][1]["text"].startswith("Say down.\n")


class OneBuffer(Countdown):
    """Draws every picture into the same array."""

    buffer = np.zeros((2, 2, 3), dtype=np.uint8)

    def observe(self):
        self.buffer[:] = self.count
        return {"image": self.buffer}


def test_pictures_are_kept_when_an_environment_draws_over_them():
    fmt = PlainFormat(history=1)
    episode = next(play_episodes(OneBuffer, Scripted(), episodes=1, seed=1, agent_format=fmt))
    shown = [[int(image[0, 0, 0]) for image in turn.images] for turn in episode.turns]
    first = shown[0][0]
    assert first > 1
    assert shown == [[first]] + [[count + 1, count] for count in range(first - 1, first - len(shown), -1)]


def test_text_only_environments_and_log_probabilities():
    played = list(play_episodes(lambda: Countdown(images=False), Scripted(logprobs=True), episodes=3))
    ds = dataset_from_episodes(played)
    assert "images" not in ds.column_names
    assert ds[0]["behavior_logprobs"] == [-0.5]
    validate_trajectories(ds)


@pytest.mark.parametrize(
    ("kwargs", "error", "words"),
    [
        ({"episodes": 0}, ValueError, "episodes must be at least 1"),
        ({"seed": -1}, ValueError, "seed must be at least 0"),
        ({"num_envs": 0}, ValueError, "num_envs must be at least 1"),
        ({"max_turns": 0}, ValueError, "max_turns must be at least 1"),
        ({"agent_format": "json"}, TypeError, "pass for example make_format\\('json'\\)"),
        ({"agent_format": str.strip}, TypeError, "pass for example CallableFormat"),
        ({"policy": make_demonstrator(NUMBER_LINE, "expert")}, TypeError, "becomes one by `DemonstratorPolicy"),
        ({"env": Countdown()}, TypeError, "a function that makes a new environment, got Countdown"),
        ({"env": lambda: SHARED}, ValueError, "returned the same object twice"),
        ({"env": lambda: "text"}, TypeError, "factory returned str"),
        ({"env": lambda: Countdown(reward=float("nan"))}, ValueError, "gave the reward nan on turn"),
        ({"env": "vlmq_trl/NoSuchGame-v0"}, gymnasium.error.NameNotFound, "NoSuchGame"),
    ],
)
def test_refuses(kwargs, error, words):
    kwargs = {"env": Countdown, "policy": Scripted(), "episodes": 3, **kwargs}
    with pytest.raises(error, match=words):
        list(play_episodes(kwargs.pop("env"), kwargs.pop("policy"), **kwargs))


def test_a_policy_must_answer_everything():
    class Lazy:
        def act(self, requests):
            return []

    with pytest.raises(ValueError, match="0 responses to 2 requests"):
        list(play_episodes(Countdown, Lazy(), episodes=2))


def test_environments_are_closed():
    closed = []

    class Closing(Countdown):
        def close(self):
            closed.append(self)

    episodes = play_episodes(Closing, Scripted(), episodes=5, num_envs=2)
    next(episodes)
    episodes.close()
    assert len(closed) == 2


def test_make_env_passes_arguments():
    assert make_env(NUMBER_LINE, {"invalid_penalty": 0.25}).unwrapped.invalid_penalty == 0.25
    assert make_env(Countdown, {"limit": 2}).limit == 2


@pytest.mark.parametrize("game", ["NumberLine", "EZPoints", "Points24", "Blackjack"])
def test_collect_demonstrations(game):
    env_id = f"vlmq_trl/{game}-v0"
    ds = collect_demonstrations(env_id, policy="flawed:0.5", episodes=6, seed=3, progress=False)
    index = validate_trajectories(ds, "all")
    assert len(index) == 6 and index.episode_ids[0] == f"{env_id}/3"
    assert all(ds["valid"]) and set(ds["env_id"]) == {env_id}
    again = collect_demonstrations(env_id, policy="flawed:0.5", episodes=6, seed=3, num_envs=1, progress=False)
    assert again["completion"][:] == ds["completion"][:]
    assert again.with_format("arrow")["images"].to_pylist() == ds.with_format("arrow")["images"].to_pylist()
    fields = make_env(env_id).unwrapped.reading_fields
    fmt = JSONCoTFormat(reading_fields=fields)
    for episode in episodes_from_dataset(ds):
        for turn in episode.turns:
            assert list(json.loads(turn.completion)) == [*fields, "thoughts", "action"]
            assert fmt.parse(turn.completion).action == turn.action


def test_collect_with_other_formats_and_players(tmp_path):
    plain = collect_demonstrations(
        NUMBER_LINE, policy="expert", episodes=5, agent_format=PlainFormat(), progress=False, cache_dir=tmp_path
    )
    assert set(plain["action"]) <= {"+", "-"}
    assert [message["content"] for (message,) in plain["completion"]] == plain["action"][:]
    assert validate_trajectories(plain).success.all()
    assert len(list(tmp_path.iterdir())) == 1
    own = collect_demonstrations(
        NUMBER_LINE,
        policy=lambda env, rng: Decision("+", env.unwrapped.state_text(), ""),
        episodes=2,
        progress=False,
    )
    assert set(own["action"]) == {"+"}
    policy = DemonstratorPolicy(make_demonstrator(NUMBER_LINE, "random"), PlainFormat())
    assert len(
        collect_demonstrations(NUMBER_LINE, policy=policy, episodes=2, agent_format=PlainFormat(), progress=False)
    )


def test_episode_metrics():
    def episode(rewards, valid):
        turns = tuple(Turn([], [], "", reward, "", ok) for reward, ok in zip(rewards, valid, strict=True))
        return Episode("e", turns, True, False)

    results = episode_metrics([episode([0.0, 1.0], [True, False]), episode([-1.0], [True])])
    assert results["success_rate"] == 0.5 and results["mean_turns"] == 1.5 and results["episodes"] == 2
    assert results["valid_rate"] == pytest.approx(2 / 3)
    assert (results["success_rate_low"], results["success_rate_high"]) == wilson_interval(1, 2)
    with pytest.raises(ValueError, match="no episodes"):
        episode_metrics([])
