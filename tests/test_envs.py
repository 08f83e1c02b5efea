# SPDX-License-Identifier: Apache-2.0
"""Gym Cards: every rule and reward, equal episodes for equal seeds, any string as action, legible pictures."""

import itertools
import time
import warnings
from collections import Counter

import gymnasium
import numpy as np
import pytest
from gymnasium.error import ResetNeeded
from gymnasium.utils.env_checker import check_env
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from vlmq_trl.envs import TextActionEnv, register_envs
from vlmq_trl.envs.gym_cards import (
    RANKS,
    Blackjack,
    EZPoints,
    NumberLine,
    Points24,
    card_value,
    drawing,
    hand_total,
)

ENV_IDS = {
    "vlmq_trl/NumberLine-v0": NumberLine,
    "vlmq_trl/EZPoints-v0": EZPoints,
    "vlmq_trl/Points24-v0": Points24,
    "vlmq_trl/Blackjack-v0": Blackjack,
}

ids = pytest.mark.parametrize("env_id", list(ENV_IDS))


def start(cls, options=None, seed=0, **kwargs):
    env = cls(**kwargs)
    env.reset(seed=seed, options=options)
    return env


def play(env, actions):
    """Steps through `actions`; returns a list of (reward, terminated, truncated)."""
    return [env.step(action)[1:4] for action in actions]


# All games.


@ids
def test_env_checker_is_clean(env_id):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check_env(gymnasium.make(env_id, render_mode="rgb_array").unwrapped)


def test_registering_again_is_harmless():
    register_envs()
    assert set(ENV_IDS) <= set(gymnasium.registry)


@ids
def test_equal_seeds_give_equal_episodes(env_id):
    def episode(seed):
        env = gymnasium.make(env_id, on_invalid="random")
        choices = np.random.default_rng(seed)
        observation, _ = env.reset(seed=seed)
        trace = [observation["image"].tobytes()]
        done = False
        while not done:
            action = str(choices.choice([*env.unwrapped.legal_actions, "nonsense"]))
            observation, reward, terminated, truncated, info = env.step(action)
            trace.append((observation["image"].tobytes(), reward, terminated, truncated, tuple(info.items())))
            done = terminated or truncated
        return trace

    assert [episode(seed) for seed in range(8)] == [episode(seed) for seed in range(8)]
    assert len({episode(seed)[0] for seed in range(8)}) > 1


@ids
def test_reading_has_the_declared_fields_and_prompts_are_short(env_id):
    env = gymnasium.make(env_id).unwrapped
    env.reset(seed=0)
    assert tuple(env.state_text()) == env.reading_fields
    assert all(isinstance(value, str) for value in env.state_text().values())
    assert 0 < len(env.task) <= 120


@ids
def test_actions_ignore_case_and_outer_space(env_id):
    env = gymnasium.make(env_id).unwrapped
    for action in env.legal_actions:
        assert env.parse_env(f" \n{action.upper()}\t ") == action
    for other in ("", " ", "11", "0", "01", "++", "hit stand", "stand.", "\x00", "１", None, 3, b"+", ["+"]):
        assert env.parse_env(other) is None


@ids
def test_noop_costs_the_penalty_and_a_turn_and_nothing_else(env_id):
    env = gymnasium.make(env_id, invalid_penalty=0.25).unwrapped
    env.reset(seed=3)
    before = (env.state_text(), env.np_random.bit_generator.state)
    for turn in range(1, env.max_turns + 1):
        _, reward, terminated, truncated, info = env.step("no such action")
        assert (reward, terminated, truncated) == (-0.25, False, turn == env.max_turns)
        assert info == {"valid": False, "action": ""}
        assert (env.state_text(), env.np_random.bit_generator.state) == before


@ids
def test_terminate_ends_the_episode(env_id):
    env = gymnasium.make(env_id, on_invalid="terminate").unwrapped
    env.reset(seed=3)
    before = env.state_text()
    assert env.step("?")[1:4] == (-1.0, True, False)
    assert env.state_text() == before


@ids
def test_random_plays_a_uniform_legal_action_and_adds_its_reward(env_id):
    env = gymnasium.make(env_id, on_invalid="random", invalid_penalty=0.5).unwrapped
    twin = gymnasium.make(env_id).unwrapped
    played = Counter()
    for seed in range(600):
        env.reset(seed=seed)
        twin.reset(seed=seed)
        _, reward, terminated, _, info = env.step("?")
        assert info["valid"] is False
        played[info["action"]] += 1
        if info["action"] != "hit" and info["action"] != "stand":  # those draw cards from another place of the stream
            _, expected, twin_terminated, _, _ = twin.step(info["action"])
            assert (reward, terminated) == (expected - 0.5, twin_terminated)
    expected = 600 / len(env.legal_actions)
    assert set(played) == set(env.legal_actions)
    assert all(abs(count - expected) < 5 * expected**0.5 for count in played.values())


@ids
def test_ten_thousand_random_strings_never_crash(env_id):
    rng = np.random.default_rng(0)
    pieces = [*"0123456789+-*/()= \n\t\"'{}:.,\\", "stand", "HIT", "action", "１", "é", "\x00", "😀", "\ud800"]
    for on_invalid in ("noop", "random", "terminate"):
        env = gymnasium.make(env_id, on_invalid=on_invalid).unwrapped
        env.reset(seed=0)
        for _ in range(3400):
            action = "".join(rng.choice(pieces, size=rng.integers(0, 4)))
            observation, reward, terminated, truncated, info = env.step(action)
            assert observation in env.observation_space
            assert isinstance(reward, float)
            assert np.isfinite(reward)
            assert info["valid"] == (env.parse_env(action) is not None)
            assert info["action"] in (*env.legal_actions, "")
            if terminated or truncated:
                env.reset()


@ids
@settings(max_examples=60, deadline=None)
@given(actions=st.lists(st.text(max_size=600) | st.sampled_from(["1", "5", "10", "+", "*", "(", ")", "=", "hit"])))
def test_any_strings_through_gymnasium_make(env_id, actions):
    env = gymnasium.make(env_id)
    env.reset(seed=1)
    for action in actions:
        if any(env.step(action)[2:4]):
            env.reset()


@ids
def test_a_finished_episode_needs_a_reset(env_id):
    env = gymnasium.make(env_id, on_invalid="terminate").unwrapped
    with pytest.raises(ResetNeeded, match=r"call reset\(\) first"):
        env.step("+")
    env.reset(seed=0)
    env.step("?")
    with pytest.raises(ResetNeeded):
        env.step("?")


@ids
@pytest.mark.parametrize(
    ("kwargs", "text"),
    [
        ({"render_mode": "human"}, "render_mode must be None or 'rgb_array', not 'human'"),
        ({"on_invalid": "ignore"}, "on_invalid must be one of noop, random, terminate, not 'ignore'"),
        ({"invalid_penalty": -1.0}, "invalid_penalty must be finite and at least 0"),
        ({"invalid_penalty": float("nan")}, "invalid_penalty must be finite and at least 0"),
    ],
)
def test_bad_settings(env_id, kwargs, text):
    with pytest.raises(ValueError, match=text):
        ENV_IDS[env_id](**kwargs)


@pytest.mark.parametrize(
    ("cls", "options", "text"),
    [
        (NumberLine, {"curent": 1}, r"unknown options \['curent'\]; it knows current, target"),
        (NumberLine, {"current": 2, "target": 2}, "two different whole numbers in 0..5, not 2 and 2"),
        (NumberLine, {"current": 6, "target": 2}, "two different whole numbers in 0..5, not 6 and 2"),
        (NumberLine, {"target": True}, "two different whole numbers in 0..5, not . and True"),
        (NumberLine, {"target": 1.5}, "two different whole numbers in 0..5, not . and 1.5"),
        (EZPoints, {"cards": ["5"]}, "cards must be 2 ranks"),
        (EZPoints, {"cards": ["5", "11"]}, "cards must be 2 ranks"),
        (Points24, {"cards": ["5", "5"]}, "cards must be 4 ranks"),
        (Blackjack, {"dealer": ["5"]}, "dealer must be 2 ranks"),
        (Blackjack, {"player": ["10", "5", "8"]}, "over 21 already"),
    ],
)
def test_bad_reset_options(cls, options, text):
    with pytest.raises(ValueError, match=text):
        cls().reset(seed=0, options=options)


@ids
def test_render_is_the_observation(env_id):
    env = gymnasium.make(env_id, render_mode="rgb_array").unwrapped
    observation, _ = env.reset(seed=2)
    picture = env.render()
    assert picture.shape == (300, 300, 3)
    assert picture.dtype == np.uint8
    np.testing.assert_array_equal(picture, observation["image"])
    picture[:] = 0  # the caller's own copy
    np.testing.assert_array_equal(env.render(), observation["image"])
    with pytest.warns(UserWarning, match="without a render mode"):
        assert start(ENV_IDS[env_id]).render() is None


@ids
def test_fast_enough(env_id):
    env = gymnasium.make(env_id).unwrapped
    env.reset(seed=0)
    rng = np.random.default_rng(0)
    begin = time.perf_counter()
    for _ in range(2000):
        if any(env.step(env.legal_actions[rng.integers(len(env.legal_actions))])[2:4]):
            env.reset()
    assert time.perf_counter() - begin < 2  # 1,000 steps/s on a busy machine; measured 20,000 and more


def test_a_subclass_of_the_base_may_be_open_ended():
    class Echo(TextActionEnv):
        task, reading_fields, max_turns = "Say it.", ("word",), 2

        def _start(self, options, seed):
            self.word = "x"

        def parse_env(self, action):
            return action or None

        def _play(self, action):
            self.word = action
            return 1.0, action == "stop", False

        def _picture(self):
            return np.zeros((300, 300, 3), np.uint8)

        def state_text(self):
            return {"word": self.word}

    env = start(Echo, on_invalid="random")
    assert env.step("")[1:] == (-1.0, False, False, {"valid": False, "action": ""})  # nothing to draw from
    assert env.step("stop")[1:] == (1.0, True, False, {"valid": True, "action": "stop"})


# NumberLine.


@pytest.mark.parametrize(
    ("current", "target", "action", "outcome", "after"),
    [
        (2, 4, "+", (0.0, False, False), 3),
        (2, 4, "-", (-1.0, False, False), 1),
        (3, 4, "+", (1.0, True, False), 4),
        (1, 0, "-", (1.0, True, False), 0),
        (0, 3, "-", (-1.0, False, False), 0),  # the wall holds
        (5, 3, "+", (-1.0, False, False), 5),
    ],
)
def test_number_line_moves(current, target, action, outcome, after):
    env = start(NumberLine, {"current": current, "target": target})
    assert play(env, [action]) == [outcome]
    assert env.state_text() == {"current number": str(after), "target number": str(target)}


@pytest.mark.parametrize("name", ["current", "target"])
def test_number_line_one_number_set_leaves_the_other_uniform(name):
    seen = Counter()
    for seed in range(1000):
        env = start(NumberLine, {name: np.int64(3)}, seed=seed)
        assert getattr(env, name) == 3 and set(env.state_text().values()) <= set("012345")
        seen[env.target if name == "current" else env.current] += 1
    assert sorted(seen) == [0, 1, 2, 4, 5]
    assert all(150 < count < 250 for count in seen.values())


def test_number_line_is_truncated_after_ten_turns():
    outcomes = play(start(NumberLine, {"current": 0, "target": 5}), "-" * 10)
    assert outcomes == [(-1.0, False, False)] * 9 + [(-1.0, False, True)]


def test_number_line_reached_on_the_tenth_turn_terminates():
    outcomes = play(start(NumberLine, {"current": 0, "target": 2}), "--------++")
    assert outcomes[-1] == (1.0, True, False)


def test_number_line_starts_are_uniform_over_different_positions():
    env, starts = NumberLine(), Counter()
    env.reset(seed=0)
    for _ in range(3000):
        env.reset()
        starts[env.current, env.target] += 1
    assert set(starts) == {(c, t) for c in range(6) for t in range(6) if c != t}
    assert all(60 < count < 140 for count in starts.values())


# The points games.


@pytest.mark.parametrize(
    ("cards", "actions", "rewards"),
    [
        (["5", "7"], "5 + 7 =", [0, 0, 0, 10]),
        (["7", "5"], "5 + 7 =", [0, 0, 0, 10]),
        (["2", "6"], "6 * 2 =", [0, 0, 0, 10]),
        (["2", "K"], "10 + 2 =", [0, 0, 0, 10]),
        (["2", "6"], "2 + 6 =", [0, 0, 0, -1]),  # a wrong value
        (["5", "7"], "5 + =", [0, 0, -1]),  # malformed
        (["5", "7"], "5 =", [0, -1]),  # a card is left over
        (["5", "7"], "=", [-1]),
        (["5", "7"], "5 7 + =", [0, 0, 0, -1]),
        (["A", "2"], "1 2 =", [0, 0, -1]),  # two numbers are not twelve
        (["5", "7"], "5 5 + 7 =", [0, -1, 0, 0, 10]),  # a blank costs 1 and is passed over
        (["5", "7"], "6 5 6 + 7 =", [-1, 0, -1, 0, 0, 10]),
        (["6", "6"], "6 + 6 =", [0, 0, 0, 10]),
        (["6", "6"], "6 6 6 =", [0, 0, -1, -1]),  # only two sixes
        (["5", "7"], "+ 5 + 7 =", [0, 0, 0, 0, -1]),  # no signs
    ],
)
def test_ezpoints(cards, actions, rewards):
    outcomes = play(start(EZPoints, {"cards": cards}), actions.split())
    assert outcomes == [(float(r), i == len(rewards) - 1, False) for i, r in enumerate(rewards)]


def test_ezpoints_is_truncated_past_five_entries():
    env = start(EZPoints, {"cards": ["5", "7"]})
    outcomes = play(env, ["5", "+", "9", "9", "7", "+"])  # five entries still fit
    assert [o[0] for o in outcomes] == [0, 0, -1, -1, 0, -1]
    assert [o[1:] for o in outcomes] == [(False, False)] * 5 + [(False, True)]
    env = start(EZPoints, {"cards": ["5", "7"]})
    assert play(env, ["9"] * 6)[-1] == (-1.0, False, True)  # -1, not -2
    env = start(EZPoints, {"cards": ["5", "7"]})
    assert play(env, ["5", "+", "9", "9", "7", "="])[-1] == (10.0, True, False)


def test_invalid_turns_count_against_the_turns_and_not_against_the_entries():
    env = start(EZPoints, {"cards": ["5", "7"]}, invalid_penalty=0.5)
    outcomes = play(env, ["?", "?", "?", "5", "+", "7"])
    assert outcomes == [(-0.5, False, False)] * 3 + [(0.0, False, False)] * 2 + [(0.0, False, True)]


def test_an_illegal_number_is_a_valid_response_and_leaves_a_blank():
    env = start(EZPoints, {"cards": ["5", "K"]})
    _, reward, _, _, info = env.step("10")
    assert (reward, info) == (0.0, {"valid": True, "action": "10"})
    _, reward, _, _, info = env.step("10")
    assert (reward, info) == (-1.0, {"valid": True, "action": "10"})
    assert env.state_text() == {"cards": "[5, K]", "current formula": "10_"}
    assert env.parse_env("-") is None  # EZPoints knows + and * only


def test_ezpoints_hands_always_make_twelve_and_follow_the_deal():
    env, products, firsts = EZPoints(), 0, Counter()
    env.reset(seed=0)
    for _ in range(4000):
        env.reset()
        a, b = env.values
        assert a + b == 12 or a * b == 12
        assert env.solvable
        products += a * b == 12
        firsts[tuple(sorted(env.cards, key=RANKS.index))] += 1
    # 4 of 12 first cards (2, 3, 4, 6) divide 12, half of those make a product.
    assert abs(products / 4000 - 1 / 6) < 0.02
    assert firsts["2", "J"] > 0
    assert firsts["2", "10"] > firsts["2", "J"]
    assert not any("A" in hand for hand in firsts)  # 12 and 11 are not on cards


@pytest.mark.parametrize(
    ("cards", "actions", "rewards"),
    [
        (["4", "6", "A", "A"], "4 * 6 * 1 * 1 =", [0] * 7 + [10]),
        (["5", "5", "5", "A"], "5 * ( 5 - 1 / 5 ) =", [0] * 9 + [10]),
        (["8", "3", "8", "3"], "8 / ( 3 - 8 / 3 ) =", [0] * 9 + [10]),
        (["J", "Q", "4", "4"], "( 10 * 10 - 4 ) / 4 =", [0] * 9 + [10]),
        (["4", "6", "A", "A"], "4 * 6 =", [0, 0, 0, -1]),
        (["4", "6", "A", "A"], "4 / ( 1 - 1 ) * 6 =", [0] * 9 + [-1]),  # division by zero
        (["4", "6", "A", "A"], ") =", [0, -1]),
        (["4", "6", "A", "A"], "( 4 * 6 * 1 * 1 =", [0] * 8 + [-1]),
    ],
)
def test_points24(cards, actions, rewards):
    outcomes = play(start(Points24, {"cards": cards}), actions.split())
    assert outcomes == [(float(r), i == len(rewards) - 1, False) for i, r in enumerate(rewards)]


def test_points24_is_truncated_past_twenty_entries():
    cards = {"cards": ["4", "6", "A", "A"]}
    assert play(start(Points24, cards), ["("] * 21) == [(0.0, False, False)] * 20 + [(-1.0, False, True)]
    assert play(start(Points24, cards), [*["("] * 20, "="])[-1] == (-1.0, True, False)
    padded = [*"((((((4))))))*6*1*1"]  # 19 entries
    assert play(start(Points24, cards), [*padded, "9", "="])[-2:] == [(-1.0, False, False), (10.0, True, False)]


def test_points24_deals_every_rank_and_about_a_quarter_is_unsolvable():
    env, ranks, solvable = Points24(), Counter(), 0
    env.reset(seed=0)
    for _ in range(1500):
        env.reset()
        ranks.update(env.cards)
        solvable += env.solvable
    assert set(ranks) == set(RANKS)
    assert all(abs(count - 6000 / 13) < 110 for count in ranks.values())
    assert abs(solvable / 1500 - 0.731) < 0.04


# Blackjack.


@pytest.mark.parametrize(
    ("values", "total"),
    [
        ([1, 6], (17, True)),
        ([1, 6, 10], (17, False)),
        ([1, 1], (12, True)),
        ([1, 10], (21, True)),
        ([10, 6, 5], (21, False)),
        ([10, 10, 2], (22, False)),
    ],
)
def test_hand_total(values, total):
    assert hand_total(values) == total


@pytest.mark.parametrize(
    ("dealer", "player", "reward"),
    [
        (["7", "K"], ["10", "8"], 1.0),
        (["7", "K"], ["10", "7"], 0.0),
        (["7", "K"], ["10", "6"], -1.0),
        (["A", "6"], ["10", "8"], 1.0),  # the dealer stands on a soft 17
        (["A", "K"], ["A", "K"], 0.0),  # naturals earn nothing extra
        (["9", "K"], ["A", "K"], 1.0),
    ],
)
def test_blackjack_stand(dealer, player, reward):
    env = start(Blackjack, {"dealer": dealer, "player": player})
    assert play(env, ["stand"]) == [(reward, True, False)]


def test_blackjack_dealer_draws_to_seventeen():
    for seed in range(300):
        env = start(Blackjack, {"dealer": ["2", "3"], "player": ["10", "9"]}, seed=seed)
        ((reward, terminated, _),) = play(env, ["stand"])
        values = [card_value(rank) for rank in env.dealer]
        total = hand_total(values)[0]
        assert terminated
        assert total >= 17 > hand_total(values[:-1])[0]
        assert reward == (1.0 if total > 21 or total < 19 else 0.0 if total == 19 else -1.0)


def test_blackjack_hit_until_bust():
    busts = 0
    for seed in range(200):
        env = start(Blackjack, {"player": ["10", "6"]}, seed=seed)
        ((reward, terminated, truncated),) = play(env, ["hit"])
        assert terminated == (env.total()[0] > 21)
        assert (reward, truncated) == (-1.0 if terminated else 0.0, False)
        busts += terminated
    assert abs(busts / 200 - 8 / 13) < 0.12


def test_blackjack_longest_hand_ends_within_the_turn_limit_and_is_drawn():
    env = start(Blackjack, {"player": ["A", "A"]})
    env._draw = lambda: "A"
    outcomes = play(env, ["hit"] * 20)
    assert outcomes == [(0.0, False, False)] * 19 + [(-1.0, True, False)]
    assert len(env.player) == 22


def test_blackjack_shows_the_open_card_only():
    pictures = [
        start(Blackjack, {"dealer": ["7", hidden], "player": ["A", "6"]})._picture().tobytes() for hidden in RANKS
    ]
    assert len(set(pictures)) == 1
    env = start(Blackjack, {"dealer": ["7", "K"], "player": ["A", "6"]})
    assert env.state_text() == {"dealer card": "7", "player cards": "[A, 6]"}


def test_blackjack_ranks_are_uniform():
    env, ranks = Blackjack(), Counter()
    env.reset(seed=0)
    for _ in range(1500):
        env.reset()
        ranks.update(env.dealer + env.player)
    assert all(abs(ranks[rank] - 6000 / 13) < 110 for rank in RANKS)


# Pictures.


def at_128(picture):
    return np.asarray(Image.fromarray(picture).resize((128, 128), Image.Resampling.BILINEAR)).astype(float)


def assert_distinct(pictures, pixels):
    """Any two pictures differ strongly in at least `pixels` pixels at 128x128."""
    small = [at_128(picture) for picture in pictures]
    for a, b in itertools.combinations(small, 2):
        assert (np.abs(a - b).max(-1) > 100).sum() >= pixels


def test_number_line_pictures_differ_at_128():
    assert_distinct([drawing.number_line(t, c) for t in range(6) for c in range(6)], 100)


def test_number_line_digits_are_at_least_100_pixels_tall():
    for number in range(6):
        dark = (drawing.number_line(number, 0)[:148, 180:] < 100).all(-1).any(1)
        assert dark.sum() >= 100


@pytest.mark.parametrize("slot", range(4))
def test_ranks_differ_at_128_in_every_slot(slot):
    hands = [["A"] * slot + [rank] + ["A"] * (3 - slot) for rank in RANKS]
    assert_distinct([drawing.points(hand, [], 3, 7) for hand in hands], 20)
    assert_distinct([drawing.blackjack("7", hand) for hand in hands], 20)


@pytest.mark.parametrize(("rows", "columns", "cell"), [(1, 6, 0), (1, 6, 5), (3, 8, 0), (3, 8, 11), (3, 8, 20)])
def test_formula_entries_differ_at_128_in_every_cell(rows, columns, cell):
    entries = [*map(str, range(1, 11)), *"+-*/()=", drawing.BLANK]
    pictures = [drawing.points(["A", "A"], ["+"] * cell + [entry], rows, columns) for entry in entries]
    assert_distinct(pictures, 8)


def test_a_formula_too_long_for_its_cells_is_an_error():
    with pytest.raises(ValueError, match="7 entries does not fit 1 x 6"):
        drawing.points(["5", "7"], ["+"] * 7, 1, 6)


def test_hidden_card_differs_from_every_open_card():
    back = drawing._card_back(70, 95)
    for rank in RANKS:
        assert (np.abs(back.astype(int) - drawing._card(rank, 0, 70, 95)).max(-1) > 100).mean() > 0.4
