# SPDX-License-Identifier: Apache-2.0
"""Demonstrators: truthful reading, expert and flawed success rates, optimal Blackjack against known facts."""

from collections import Counter

import gymnasium
import numpy as np
import pytest

from vlmq_trl.envs import make_demonstrator
from vlmq_trl.envs.gym_cards import DOMAIN, Blackjack, EZPoints, NumberLine, Points24
from vlmq_trl.envs.gym_cards.scripts import blackjack_action, blackjack_values

ids = pytest.mark.parametrize("env_id", list(DOMAIN.envs))


def play(env_id, policy, episodes, flaw_probability=0.6):
    """Returns of `episodes` episodes."""
    demonstrator, env = make_demonstrator(env_id, policy, flaw_probability), gymnasium.make(env_id)
    returns = []
    for seed in range(episodes):
        env.reset(seed=seed)
        rng, total, done = np.random.default_rng(seed), 0.0, False
        while not done:
            _, reward, terminated, truncated, _ = env.step(demonstrator(env, rng).action)
            total += reward
            done = terminated or truncated
        returns.append(total)
    return np.array(returns)


def success(*args, **kwargs):
    return (play(*args, **kwargs) > 0).mean()


@ids
@pytest.mark.parametrize("policy", ["expert", "random", "flawed", "expert=0.5,random=0.5"])
def test_reading_is_true_and_actions_are_legal(env_id, policy):
    demonstrator, env = make_demonstrator(env_id, policy), gymnasium.make(env_id)
    rng = np.random.default_rng(0)
    for seed in range(30):
        env.reset(seed=seed)
        done = False
        while not done:
            decision = demonstrator(env, rng)
            assert decision.reading == env.unwrapped.state_text()
            assert decision.action in env.unwrapped.legal_actions
            _, _, terminated, truncated, info = env.step(decision.action)
            assert info["valid"]
            done = terminated or truncated


@ids
def test_thoughts_do_not_depend_on_the_action(env_id):
    """The same state gives the same reading and thoughts whoever plays; only the action differs."""
    env = gymnasium.make(env_id)
    rng = np.random.default_rng(0)
    players = [make_demonstrator(env_id, policy) for policy in ("expert", "random", "flawed:1")]
    for seed in range(20):
        env.reset(seed=seed)
        decisions = [player(env, rng) for player in players]
        assert len({decision.thoughts for decision in decisions}) == 1
        assert len({tuple(decision.reading.items()) for decision in decisions}) == 1
        assert decisions[0].action != decisions[2].action


def test_thoughts():
    def thoughts(env_id, options, actions=()):
        env = gymnasium.make(env_id)
        env.reset(seed=0, options=options)
        for action in actions:
            env.step(action)
        return make_demonstrator(env_id, "expert")(env, np.random.default_rng(0)).thoughts

    assert thoughts("vlmq_trl/NumberLine-v0", {"current": 2, "target": 4}) == "target is higher than current"
    assert thoughts("vlmq_trl/EZPoints-v0", {"cards": ["2", "K"]}, ["2"]) == "unused values: _, 10"
    assert thoughts("vlmq_trl/EZPoints-v0", {"cards": ["2", "K"]}, ["2", "+", "10"]) == "unused values: _, _"
    hand = {"cards": ["7", "7", "K", "A"]}
    assert thoughts("vlmq_trl/Points24-v0", hand, ["7", "+", "10"]) == "unused values: _, 7, _, 1"
    dealt = {"dealer": ["K", "2"], "player": ["A", "6"]}
    assert thoughts("vlmq_trl/Blackjack-v0", dealt) == "dealer shows K, cards add up to 1, 7, hand is soft 17"


@ids
def test_equal_generators_give_equal_play_and_environments_may_interleave(env_id):
    policy = "expert=0.3,random=0.3,flawed=0.4"

    def interleaved(together):
        demonstrator = make_demonstrator(env_id, policy)
        games = [(gymnasium.make(env_id), np.random.default_rng(seed)) for seed in range(6)]
        traces = [[] for _ in games]
        for seed, (env, _) in enumerate(games):
            env.reset(seed=seed)
        running = list(range(6))
        while running:
            for index in running if together else running[:1]:
                env, rng = games[index]
                decision = demonstrator(env, rng)
                traces[index].append(decision)
                if any(env.step(decision.action)[2:4]):
                    running = [other for other in running if other != index]
        return traces

    assert interleaved(True) == interleaved(False)


def test_a_mixture_draws_one_member_an_episode():
    demonstrator = make_demonstrator("vlmq_trl/NumberLine-v0", "expert=0.75,flawed:1=0.25")
    env, rng = gymnasium.make("vlmq_trl/NumberLine-v0"), np.random.default_rng(0)
    good = Counter()
    for seed in range(400):
        env.reset(seed=seed, options={"current": 2, "target": 5})
        right = []
        for _ in range(3):
            action = demonstrator(env, rng).action
            right.append(action == "+")
            env.step(action)
        assert len(set(right)) == 1  # never changes its mind
        good[right[0]] += 1
    assert abs(good[True] / 400 - 0.75) < 0.08


# Success rates.


def test_experts():
    assert success("vlmq_trl/NumberLine-v0", "expert", 200) == 1.0
    assert (play("vlmq_trl/NumberLine-v0", "expert", 200) == 1.0).all()  # no step is wasted
    assert (play("vlmq_trl/EZPoints-v0", "expert", 200) == 10.0).all()


def test_points24_expert_solves_exactly_the_solvable_hands():
    returns, env = play("vlmq_trl/Points24-v0", "expert", 200), gymnasium.make("vlmq_trl/Points24-v0")
    for seed, total in enumerate(returns):
        env.reset(seed=seed)
        assert total == (10.0 if env.unwrapped.solvable else -1.0)


@pytest.mark.parametrize(
    ("game", "policy", "low", "high"),
    [
        ("NumberLine", "flawed:0.6", 0.14, 0.27),
        ("NumberLine", "random", 0.23, 0.36),
        ("EZPoints", "flawed:0.6", 0.01, 0.045),  # about 0.4 ** 4
        ("EZPoints", "flawed:0.3", 0.20, 0.32),  # about 0.7 ** 4
        ("EZPoints", "random", 0.0, 0.01),
        ("Points24", "flawed:0.6", 0.0, 0.01),
        ("Points24", "flawed:0.3", 0.01, 0.07),
        ("Points24", "random", 0.0, 0.0),
        ("Blackjack", "flawed:0.6", 0.21, 0.32),
        ("Blackjack", "random", 0.23, 0.38),
    ],
)
def test_bad_play_succeeds_as_often_as_stated(game, policy, low, high):
    assert low <= success(f"vlmq_trl/{game}-v0", policy, 800) <= high


def test_flawed_without_flaws_is_the_expert_and_with_certainty_never_succeeds():
    for game in ("NumberLine", "EZPoints", "Points24", "Blackjack"):
        env_id = f"vlmq_trl/{game}-v0"
        np.testing.assert_array_equal(play(env_id, "flawed", 100, 0.0), play(env_id, "expert", 100))
        if game != "Blackjack":
            assert success(env_id, "flawed", 100, 1.0) == 0.0


# Experts and mistakes, action by action.


@pytest.mark.parametrize(
    ("cls", "options", "actions", "right", "wrong"),
    [
        (NumberLine, {"current": 1, "target": 4}, "", "+", "-"),
        (NumberLine, {"current": 4, "target": 1}, "", "-", "+"),
        (EZPoints, {"cards": ["5", "7"]}, "", "5", "6"),
        (EZPoints, {"cards": ["2", "K"]}, "2 +", "10", "9"),
        (EZPoints, {"cards": ["5", "7"]}, "5", "+", "*"),
        (EZPoints, {"cards": ["2", "6"]}, "2", "*", "+"),
        (EZPoints, {"cards": ["5", "7"]}, "5 + 7", "=", "+"),
        (EZPoints, {"cards": ["5", "7"]}, "5 *", "=", "+"),  # hopeless
        (Points24, {"cards": ["A", "A", "A", "A"]}, "", "=", "+"),  # unsolvable
        (Points24, {"cards": ["A", "5", "5", "5"]}, "5 *", "(", ")"),
        (Points24, {"cards": ["A", "5", "5", "5"]}, "5 * ( 5", "-", "/"),
        (Points24, {"cards": ["A", "5", "5", "5"]}, "5 * ( 5 - 1", "/", "-"),
        (Points24, {"cards": ["A", "5", "5", "5"]}, "5 * ( 5 - 1 / 5", ")", "("),
        (Blackjack, {"dealer": ["6", "2"], "player": ["10", "2"]}, "", "stand", "hit"),
        (Blackjack, {"dealer": ["7", "2"], "player": ["10", "6"]}, "", "hit", "stand"),
    ],
)
def test_right_and_wrong_actions(cls, options, actions, right, wrong):
    env = cls()
    env.reset(seed=0, options=options)
    for action in actions.split():
        env.step(action)
    assert (env.script.expert(), env.script.mistake()) == (right, wrong)


def test_the_expert_passes_over_a_blank_and_the_flawed_player_gives_up():
    env = EZPoints()
    env.reset(seed=0, options={"cards": ["5", "7"]})
    env.step("6")
    assert env.script.expert() == "5"
    assert env.script.unmistaken() == "="
    for _ in range(2):
        env.step("6")
    assert env.script.expert() == "="  # three blanks leave no room for three entries and "="


# Blackjack.


def test_blackjack_is_basic_strategy():
    """Hit or stand against the dealer's 1..10, as in Sutton and Barto's figure 5.2 and every published table."""
    for dealer in range(1, 11):
        weak = 2 <= dealer <= 6
        for total in range(4, 22):
            expected = (
                "stand" if total >= 17 or (weak and total >= 13) or (total == 12 and 4 <= dealer <= 6) else "hit"
            )
            assert blackjack_action(total, False, dealer) == expected
        for total in range(12, 22):
            if (total, dealer) != (18, 1):  # too close to call between rule sets
                expected = "stand" if total >= 19 or (total == 18 and dealer <= 8) else "hit"
                assert blackjack_action(total, True, dealer) == expected


def test_blackjack_value_of_the_game():
    """The expected reward of optimal play over all deals."""
    deck = [min(rank, 10) for rank in range(1, 14)]
    total = 0.0
    for first in deck:
        for second in deck:
            soft = 1 in (first, second)
            points = first + second + 10 * soft
            total += sum(max(blackjack_values(points, soft, dealer)) for dealer in deck)
    assert total / 13**3 == pytest.approx(-0.0466, abs=0.002)


@pytest.mark.parametrize(
    ("player", "dealer", "action"),
    [(["10", "6"], "10", "stand"), (["10", "10"], "6", "stand"), (["10", "6"], "10", "hit"), (["A", "7"], "9", "hit")],
)
def test_blackjack_values_agree_with_play(player, dealer, action):
    env, rng = Blackjack(), np.random.default_rng(0)
    env.reset(seed=0)
    rewards = []
    for _ in range(3000):
        env.reset(options={"dealer": [dealer, str(rng.choice(["A", *range(2, 11), "J", "Q", "K"]))], "player": player})
        _, reward, done, _, _ = env.step(action)
        while not done:
            _, reward, done, _, _ = env.step(env.script.expert())
        rewards.append(reward)
    value = blackjack_values(*_total(player), 10 if dealer == "10" else int(dealer))[action == "hit"]
    assert np.mean(rewards) == pytest.approx(value, abs=4 * np.std(rewards) / 3000**0.5)


def _total(player):
    env = Blackjack()
    env.reset(seed=0, options={"player": player})
    return env.total()


def test_blackjack_expert_wins_about_43_percent():
    returns = play("vlmq_trl/Blackjack-v0", "expert", 6000)
    assert (returns > 0).mean() == pytest.approx(0.433, abs=0.02)
    assert returns.mean() == pytest.approx(-0.0466, abs=0.035)


# Bad input.


@pytest.mark.parametrize(
    ("env_id", "policy", "flaw", "text"),
    [
        ("vlmq_trl/Chess-v0", "expert", 0.6, "no demonstrator for 'vlmq_trl/Chess-v0', which is not registered"),
        ("vlmq_trl/EZPoints-v0", "epert", 0.6, "'epert' is not known; use expert, random, flawed"),
        ("vlmq_trl/EZPoints-v0", "", 0.6, "'' is not known"),
        ("vlmq_trl/EZPoints-v0", "expert:0.5", 0.6, "'expert:0.5' is not known"),
        ("vlmq_trl/EZPoints-v0", "flawed:x", 0.6, "'flawed:x' holds a number that does not parse"),
        ("vlmq_trl/EZPoints-v0", "expert=,random=1", 0.6, "'expert=' holds a number that does not parse"),
        ("vlmq_trl/EZPoints-v0", "flawed:1.5", 0.6, r"must lie in 0\.\.1, not 1\.5"),
        ("vlmq_trl/EZPoints-v0", "flawed", -0.1, r"must lie in 0\.\.1, not -0\.1"),
        ("vlmq_trl/EZPoints-v0", "flawed:nan", 0.6, r"must lie in 0\.\.1, not nan"),
        ("vlmq_trl/EZPoints-v0", "expert=0,random=1", 0.6, r"weights must be positive and finite, not 0\.0"),
        ("vlmq_trl/EZPoints-v0", "expert=inf", 0.6, "weights must be positive and finite, not inf"),
    ],
)
def test_bad_policies(env_id, policy, flaw, text):
    with pytest.raises(ValueError, match=text):
        make_demonstrator(env_id, policy, flaw)


def test_the_wrong_environment():
    env = gymnasium.make("vlmq_trl/EZPoints-v0")
    env.reset(seed=0)
    with pytest.raises(TypeError, match="plays vlmq_trl/NumberLine-v0, not vlmq_trl/EZPoints-v0"):
        make_demonstrator("vlmq_trl/NumberLine-v0", "expert")(env, np.random.default_rng(0))


def test_a_function_instead_of_an_id():
    env = EZPoints()
    env.reset(seed=0, options={"cards": ["5", "7"]})
    assert make_demonstrator(EZPoints, "expert")(env, np.random.default_rng(0)).action == "5"
    with pytest.raises(TypeError, match="no demonstrator for a EZPoints; give a Gymnasium id, or a function that"):
        make_demonstrator(env, "expert")


def test_an_environment_without_a_script():
    env = gymnasium.make("CartPole-v1")
    env.reset(seed=0)
    with pytest.raises(TypeError, match="not CartPoleEnv; give a function"):
        make_demonstrator("CartPole-v1", "random")(env, np.random.default_rng(0))
