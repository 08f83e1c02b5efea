# SPDX-License-Identifier: Apache-2.0
"""What a table learns where a VLM is trained by `learning.py` and `online.py`: what data and budget allow.

    python examples/benchmarks/tabular.py        # a minute or two; writes results/tabular.json and docs/results.md

The learners here are told the state of the game, so they need not read; and they keep a number a state and action, so
they know nothing of states that they have not seen. Cloning plays each state's most frequent action, of all episodes
or of the best tenth; Q-learning iterates Q(s, a) = mean over the data of r + gamma * max_b Q(s', b), b among the
actions seen in s'. A network that does better has generalised; where the table gains little over filtered cloning,
the data hold little for a better method to find. Online it goes on by itself, as `online.py` has the VLM do: after the
same flawed episodes the same number of turns, in rounds, at random with probability 0.2, learning from all of them
after each round.
"""

import argparse
import sys
import time
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from examples.benchmarks.common import (
    PAGE,
    RESULTS,
    SEEDS,
    describe,
    machine,
    markdown_table,
    versions,
    write_json,
    write_section,
)
from examples.benchmarks.learning import METHODS, SETTINGS, LearningRun
from examples.benchmarks.online import BUDGET, OnlineRun
from examples.benchmarks.online import SETTINGS as ONLINE_SETTINGS
from vlmq_trl import VLMQConfig, make_demonstrator, wilson_interval
from vlmq_trl.envs.gym_cards import Blackjack, NumberLine, PointsGame, card_value

EPSILON = 0.2  # the table's, online; with 0.1 it wins half a point less in Blackjack, and as much in EZPoints
LEARNERS = {"cloning": "cloning", "filtered": "filtered cloning, best tenth", "q_learning": "Q-learning"}

Step = tuple[Any, str, float]  # state, action, reward


def state(game: Any) -> Any:
    """All that decides what to do: the order of the cards does not."""
    if isinstance(game, NumberLine):
        return game.current, game.target
    if isinstance(game, Blackjack):
        return game.total(), card_value(game.dealer[0])
    assert isinstance(game, PointsGame)
    return tuple(sorted(game.values)), tuple(game.formula)


def play(env_id: str, act: Any, episodes: int, seed: int) -> list[list[Step]]:
    """Episodes as `vlmq_trl.collect_demonstrations` plays them, without the pictures.

    Args:
        act: (game, state, generator) -> action.
    """
    game: Any = gymnasium.make(env_id).unwrapped
    game.render_mode = None
    played = []
    for number in range(seed, seed + episodes):
        rng = np.random.default_rng((number, 1))
        game.reset(seed=number)
        steps: list[Step] = []
        ended = False
        while not ended:
            here = state(game)
            action = act(game, here, rng)
            _, reward, terminated, truncated, _ = game.step(action)
            steps.append((here, action, float(reward)))
            ended = terminated or truncated
        played.append(steps)
    return played


def total(steps: list[Step]) -> float:
    return sum(reward for _, _, reward in steps)


def cloned(episodes: list[list[Step]]) -> dict[Any, str]:
    """Each state's most frequent action."""
    counts: dict[Any, Counter] = defaultdict(Counter)
    for steps in episodes:
        for here, action, _ in steps:
            counts[here][action] += 1
    return {here: count.most_common(1)[0][0] for here, count in counts.items()}


def best_episodes(episodes: list[list[Step]], fraction: float, seed: int) -> list[list[Step]]:
    """As `vlmq_trl.filter_top_returns`: ties are broken at random."""
    tie = np.random.default_rng(seed).permutation(len(episodes))
    order = np.lexsort((tie, [-total(steps) for steps in episodes]))
    return [episodes[k] for k in order[: int(np.ceil(fraction * len(episodes)))]]


def q_learned(episodes: list[list[Step]], gamma: float) -> dict[Any, str]:
    """Each state's action of the highest Q, iterated until no value changes (at most 500 times)."""
    pairs: dict[tuple[Any, str], int] = {}
    rows = [
        (pairs.setdefault((here, action), len(pairs)), reward, steps[k + 1][0] if k + 1 < len(steps) else None)
        for steps in episodes
        for k, (here, action, reward) in enumerate(steps)
    ]
    states = {here: number for number, here in enumerate(dict.fromkeys(here for here, _ in pairs))}
    state_of_pair = np.array([states[here] for here, _ in pairs])
    pair, rewards = np.array([row[0] for row in rows]), np.array([row[1] for row in rows])
    following = np.array([len(states) if row[2] is None else states[row[2]] for row in rows])
    count = np.bincount(pair)
    values = np.zeros(len(states) + 1)  # the last one: after the end
    for _ in range(500):
        q = np.bincount(pair, rewards + gamma * values[following]) / count
        new = np.full(len(states) + 1, -np.inf)
        np.maximum.at(new, state_of_pair, q)
        new[-1] = 0.0
        if np.abs(new - values).max() < 1e-9:
            break
        values = new
    best: dict[Any, tuple[float, str]] = {}
    for (here, action), value in zip(pairs, q, strict=True):
        if here not in best or value > best[here][0]:
            best[here] = (value, action)
    return {here: action for here, (_, action) in best.items()}


def success(env_id: str, policy: dict[Any, str], episodes: int, seed: int) -> int:
    """How many of the episodes a table wins; in a state that it does not know it plays at random."""

    def act(game: Any, here: Any, rng: np.random.Generator) -> str:
        return policy[here] if here in policy else str(rng.choice(game.legal_actions))

    return sum(total(steps) > 0 for steps in play(env_id, act, episodes, seed))


def measure(setting: str, seed: int) -> dict[str, Any]:
    """Successes of each learner on the data and the test episodes of `learning.py`'s runs with this seed."""
    arguments = LearningRun(setting, "vlmq_scalar", seed).arguments
    env_id = f"vlmq_trl/{arguments['game']}-v0"
    demonstrate = make_demonstrator(env_id, arguments["policy"])
    data = play(
        env_id,
        lambda game, here, rng: demonstrate(game, rng).action,
        arguments["episodes"],
        arguments["collection_seed"],
    )
    gamma = arguments.get("gamma", VLMQConfig.gamma)
    tables = {
        "cloning": cloned(data),
        "filtered": cloned(best_episodes(data, METHODS["filtered_bc"]["top_fraction"], seed)),
        "q_learning": q_learned(data, gamma),
    }
    episodes = arguments["test_episodes"]
    return {
        "setting": setting,
        "seed": seed,
        "data": {"episodes": len(data), "successes": sum(total(steps) > 0 for steps in data)},
        "test_episodes": episodes,
        "successes": {
            name: success(env_id, table, episodes, arguments["test_seed"]) for name, table in tables.items()
        },
    }


def measure_online(setting: str, seed: int) -> dict[str, Any]:
    """Successes of Q-learning on the offline data of `online.py`'s run with this seed, and after its turns."""
    arguments = OnlineRun(setting, "online", seed).arguments
    env_id = f"vlmq_trl/{setting}-v0"
    demonstrate = make_demonstrator(env_id, arguments["policy"])
    gamma, rng_seed = arguments.get("gamma", VLMQConfig.gamma), arguments["rollout_seed"]
    episodes = play(
        env_id,
        lambda game, here, rng: demonstrate(game, rng).action,
        arguments["episodes"],
        arguments["collection_seed"],
    )
    tested = arguments["test_episodes"], arguments["test_seed"]
    table = q_learned(episodes, gamma)
    start, turns = success(env_id, table, *tested), 0

    def act(game: Any, here: Any, rng: np.random.Generator) -> str:
        return table[here] if here in table and rng.random() >= EPSILON else str(rng.choice(game.legal_actions))

    for goal in range(arguments["turns_per_round"], BUDGET + 1, arguments["turns_per_round"]):
        while turns < goal:
            episodes += play(env_id, act, 1, rng_seed)
            rng_seed, turns = rng_seed + 1, turns + len(episodes[-1])
        table = q_learned(episodes, gamma)
    return {
        "setting": setting,
        "seed": seed,
        "turns": turns,
        "test_episodes": tested[0],
        "successes": {"start": start, "online": success(env_id, table, *tested)},
    }


def online_section(results: list[dict[str, Any]]) -> str:
    """The page's table of what a table learns online."""
    rows = []
    for setting in ONLINE_SETTINGS:
        own = [result for result in results if result["setting"] == setting]
        row = [f"{setting}, {OnlineRun(setting, 'online', 0).arguments['policy']}"]
        for name in ("start", "online"):
            wins, episodes = (sum(r["successes"][name] for r in own), sum(r["test_episodes"] for r in own))
            low, high = wilson_interval(wins, episodes)
            row.append(f"**{100 * wins / episodes:.1f}** ({100 * low:.1f}–{100 * high:.1f})")
        seeds = [100 * r["successes"]["online"] / r["test_episodes"] for r in own]
        rows.append([*row, f"{min(seeds):.1f}–{max(seeds):.1f}"])
    head = ["success in %, greedy", "after 200 episodes", f"and {BUDGET:,} turns of its own", "seeds"]
    return markdown_table(head, rows)


def section(results: list[dict[str, Any]]) -> str:
    """The page's table of what a table learns from the data."""
    rows = []
    for setting, described in SETTINGS.items():
        own = [result for result in results if result["setting"] == setting]
        episodes = sum(result["test_episodes"] for result in own)
        data = sum(r["data"]["successes"] for r in own) / sum(r["data"]["episodes"] for r in own)
        row = [described["title"], f"{100 * data:.1f}"]
        for name in LEARNERS:
            wins = sum(result["successes"][name] for result in own)
            low, high = wilson_interval(wins, episodes)
            row.append(f"**{100 * wins / episodes:.1f}** ({100 * low:.1f}–{100 * high:.1f})")
        rows.append(row)
    return markdown_table(["success in %, greedy", "the data", *LEARNERS.values()], rows)


def main() -> int:
    summary, _, about = (__doc__ or "").partition("\n")
    argparse.ArgumentParser(
        description=summary, epilog=about, formatter_class=argparse.RawTextHelpFormatter
    ).parse_args()
    start = time.perf_counter()
    results = []
    for setting in SETTINGS:
        for seed in SEEDS:
            results.append(measure(setting, seed))
            shares = {name: wins / results[-1]["test_episodes"] for name, wins in results[-1]["successes"].items()}
            print(
                setting, seed, ", ".join(f"{name} {100 * share:.1f} %" for name, share in shares.items()), flush=True
            )
    online = []
    for setting in ONLINE_SETTINGS:
        for seed in SEEDS:
            online.append(measure_online(setting, seed))
            share = online[-1]["successes"]["online"] / online[-1]["test_episodes"]
            print(setting, seed, f"online {100 * share:.1f} %", flush=True)
    write_json(
        RESULTS / "tabular.json",
        {
            "command": "python examples/benchmarks/tabular.py",
            "machine": machine(),
            "versions": versions(),
            "wall_seconds": time.perf_counter() - start,
            "results": results,
            "online": online,
        },
    )
    text = f"Seeds {', '.join(map(str, SEEDS))} together, on: {describe(machine())}.\n\n{section(results)}"
    write_section(PAGE, "tabular", text)
    write_section(PAGE, "tabular-online", online_section(online))
    print(f"Report: {PAGE}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
