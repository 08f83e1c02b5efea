# SPDX-License-Identifier: Apache-2.0
"""The critic against exact dynamic programming of the policy that it evaluates.

With `filter="none"` and `value_expectile=0.5` the critic evaluates the policy that played the data. Its V at the
prompt and its Q after the completion must match the exact solution: mean absolute error at most 5 % of the range of
the exact values, rank correlation at least 0.98. A truncated episode bootstraps, so the values of the endless game are
the right ones although every episode is cut.

Gradients are not clipped here. Where nearly every step is clipped, as with a large `critic_coef`, the critic regresses
on something between mean and median of its targets, and bootstrapping multiplies that bias by the length of a chain.

Axes: S states, U actions.
"""

from dataclasses import dataclass

import gymnasium
import numpy as np
import pytest
import torch
from gymnasium import spaces

from tests import tiny_models
from tests.small_runs import NUMBER_LINE, TextNumberLine, config
from vlmq_trl.agent_format import PlainFormat
from vlmq_trl.losses import denormalize
from vlmq_trl.rollout import Response, play_episodes
from vlmq_trl.trajectory import dataset_from_episodes
from vlmq_trl.vlmq_trainer import VLMQTrainer

ERROR_LIMIT, RANK_LIMIT, GAMMA = 0.05, 0.98, 0.9
TEXT_SPACE = spaces.Text(max_length=64)


def exact_values(
    transitions: np.ndarray, rewards: np.ndarray, policy: np.ndarray, gamma: float
) -> tuple[np.ndarray, np.ndarray]:
    """V [S] and Q [S, U] of a policy, from (I - gamma P_pi) V = r_pi.

    Args:
        transitions: [S, U, S] probabilities; what is missing from 1 ends the episode.
        rewards: [S, U] expected.
        policy: [S, U] probabilities.
    """
    under_policy = np.einsum("su,sut->st", policy, transitions)
    values = np.linalg.solve(np.eye(len(policy)) - gamma * under_policy, (policy * rewards).sum(1))
    return values, rewards + gamma * transitions @ values


def test_exact_values_by_hand():
    # One state: action 0 pays 1 and stays, action 1 pays 0 and ends. V = 0.5 (1 + 0.5 V), so V = 2/3.
    values, q = exact_values(np.array([[[1.0], [0.0]]]), np.array([[1.0, 0.0]]), np.array([[0.5, 0.5]]), gamma=0.5)
    np.testing.assert_allclose(values, [2 / 3])
    np.testing.assert_allclose(q, [[4 / 3, 0.0]])


# ---- a random Markov decision process ----


@dataclass(frozen=True)
class RandomMDP:
    """5 states, 2 actions: random transitions, 10 % of them the end, and random noisy rewards; a random player."""

    transitions: np.ndarray  # [S, U, S], rows sum to 0.9
    rewards: np.ndarray  # [S, U] means; each reward has a standard deviation of 0.25
    policy: np.ndarray  # [S, U]

    @classmethod
    def make(cls, seed: int, states: int = 5) -> "RandomMDP":
        """The seed's first process whose exact values are apart: values that are all but equal have no order."""
        rng = np.random.default_rng(seed)
        while True:
            rewards = rng.uniform(-1, 1, (states, 2))
            mdp = cls(
                0.9 * rng.dirichlet(np.full(states, 0.5), (states, 2)),
                rewards - rewards.mean(),  # values about 0, which chance in the episodes' lengths does not shift
                0.2 + 0.6 * rng.dirichlet(np.ones(2), states),  # what is hardly ever played cannot be learned
            )
            values, q = exact_values(mdp.transitions, mdp.rewards, mdp.policy, GAMMA)
            gaps = [np.diff(np.sort(x.ravel())).min() / np.ptp(x) for x in (values, q)]
            if np.ptp(values) > 2 and gaps[0] > 0.05 and gaps[1] > 0.04:
                return mdp


class MDPEnv(gymnasium.Env):
    """A `RandomMDP` as text, truncated after 12 turns."""

    observation_space = spaces.Dict({"text": TEXT_SPACE})
    action_space = TEXT_SPACE
    actions = ("left", "right")
    task = ""

    def __init__(self, mdp: RandomMDP):
        self.mdp = mdp

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.state, self.turns = int(self.np_random.integers(len(self.mdp.policy))), 0
        return {"text": f"state {self.state}"}, {}

    def step(self, action):
        u = self.actions.index(action)
        reward = self.np_random.normal(self.mdp.rewards[self.state, u], 0.25)
        probabilities = self.mdp.transitions[self.state, u]
        following = self.np_random.choice(len(probabilities) + 1, p=[*probabilities, 1 - probabilities.sum()])
        terminated = bool(following == len(probabilities))
        self.turns += 1
        if not terminated:
            self.state = int(following)
        return {"text": f"state {self.state}"}, float(reward), terminated, self.turns == 12, {}


class MDPPlayer:
    """Draws actions from the process's own policy."""

    def act(self, requests):
        envs = [request.env.unwrapped for request in requests]
        draws = [r.rng.choice(2, p=e.mdp.policy[e.state]) for r, e in zip(requests, envs, strict=True)]
        return [Response(MDPEnv.actions[u]) for u in draws]


# ---- NumberLine under uniformly random play ----

POSITIONS = 6
STATES = [(current, target) for target in range(POSITIONS) for current in range(POSITIONS) if current != target]


def number_line() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Transitions [30, 2, 30], rewards [30, 2] and the uniform policy, over `STATES` and the actions "-", "+"."""
    transitions, rewards = np.zeros((len(STATES), 2, len(STATES))), np.zeros((len(STATES), 2))
    for s, (current, target) in enumerate(STATES):
        for u, move in enumerate((-1, 1)):
            following = min(max(current + move, 0), POSITIONS - 1)
            if following == target:
                rewards[s, u] = 1.0
                continue
            transitions[s, u, STATES.index((following, target))] = 1.0
            rewards[s, u] = 0.0 if abs(target - following) < abs(target - current) else -1.0
    return transitions, rewards, np.full((len(STATES), 2), 0.5)


class UniformPlayer:
    """Plays each legal action with equal probability."""

    def act(self, requests):
        return [Response(str(r.rng.choice(r.env.unwrapped.legal_actions))) for r in requests]


def test_number_line_by_its_own_rules():
    """The table of `number_line` is what the environment does."""
    transitions, rewards, _ = number_line()
    env = gymnasium.make(NUMBER_LINE)
    for s, (current, target) in enumerate(STATES):
        for u, action in enumerate("-+"):
            env.reset(seed=0, options={"current": current, "target": target})
            _, reward, terminated, _, _ = env.step(action)
            assert reward == rewards[s, u]
            assert terminated == (transitions[s, u].sum() == 0)
            if not terminated:
                assert STATES[int(transitions[s, u].argmax())] == (env.unwrapped.current, target)


# ---- the critic ----


def train(dataset, output_dir, seed, **kwargs) -> VLMQTrainer:
    """A small text-only model with a critic that evaluates the policy of the data."""
    model, tokenizer = tiny_models.build("llama", seed)
    args = config(
        output_dir,
        seed=seed,
        filter="none",
        value_expectile=0.5,
        turn_lambda=0.5,
        critic_coef=10.0,
        target_norm_rate=0.02,
        per_device_train_batch_size=64,
        warmup_steps=50,
        lr_scheduler_type="cosine",
        max_grad_norm=0.0,
        logging_steps=100,
        **kwargs,
    )
    trainer = VLMQTrainer(model=model, args=args, train_dataset=dataset, processing_class=tokenizer)
    trainer.train()
    return trainer


@torch.no_grad()
def learned_values(trainer: VLMQTrainer, texts: list[str], actions: tuple[str, ...]) -> tuple[np.ndarray, np.ndarray]:
    """V [S] at the prompt and Q [S, U] after the completion, in reward units; `texts` [S] are the observations."""
    items: list[dict] = []
    for text in texts:
        prompt, _ = PlainFormat().build_prompt("", {"text": text})
        for action in actions:
            k = len(items)
            turn = {"prompt": prompt, "completion": [{"role": "assistant", "content": action}], "bootstrap": None}
            items.append({**turn, "row": k, "segment": k, "reward": 0.0, "terminated": True, "return_to_go": 0.0})
    batch = trainer.data_collator(items)
    trainer.model.eval()
    output = trainer.model(**{k: batch[k] for k in ("input_ids", "attention_mask", "labels")})
    critic = trainer.model.critic
    row = (batch["labels"][:, 1:] != -100).nonzero()[:, 0]
    is_first = torch.cat([torch.ones(1, dtype=torch.bool), row[1:] != row[:-1]])
    # The vocabulary-wide critic has no V of its own online heads: its target's is sum_a pi(a|s) Q_target(s, a).
    values = output.target_state_values if output.state_values is None else output.state_values
    values, q = values.mean(-1)[is_first], output.q_values.mean(-1)[is_first.roll(-1)]
    values, q = (denormalize(x, critic.target_mean, critic.target_std) for x in (values, q))
    shape = (len(texts), len(actions))
    return values.reshape(shape)[:, 0].numpy(), q.reshape(shape).numpy()


def rank_correlation(x: np.ndarray, y: np.ndarray) -> float:
    """Spearman's; values that are equal up to 1e-9 share their mean rank."""

    def ranks(values):
        _, inverse, counts = np.unique(np.round(values.ravel(), 9), return_inverse=True, return_counts=True)
        return (np.cumsum(counts) - (counts - 1) / 2)[inverse]

    return float(np.corrcoef(ranks(x), ranks(y))[0, 1])


def test_rank_correlation_by_hand():
    # Ranks 1, 2, 3 against 1, 3, 2: 1 - 6 * 2 / (3 * 8) = 0.5; any growing map keeps it; ties share ranks.
    assert rank_correlation(np.array([1.0, 2.0, 3.0]), np.array([1.0, 9.0, 2.0])) == pytest.approx(0.5)
    assert rank_correlation(np.array([3.0, 1.0, 1.0]), np.array([7.0, 0.0, 0.0])) == pytest.approx(1.0)


def assert_right(learned, exact):
    """(V, Q) of the critic against the exact ones."""
    for name, x, y in zip(("V", "Q"), learned, exact, strict=True):
        error, rank = np.abs(x - y).mean() / np.ptp(y), rank_correlation(x, y)
        print(f"{name}: mean absolute error {error:.4f} of the range {np.ptp(y):.2f}, rank correlation {rank:.4f}")
        assert error <= ERROR_LIMIT, f"{name}: {error:.4f} of the range"
        assert rank >= RANK_LIMIT, f"{name}: rank correlation {rank:.4f}"


@pytest.fixture(autouse=True)
def smaller_model(monkeypatch):
    """A quarter of the tiny model, which is as good here and faster."""
    monkeypatch.setitem(tiny_models.TEXT, "hidden_size", 64)
    monkeypatch.setitem(tiny_models.TEXT, "intermediate_size", 128)


slow = pytest.mark.slow


@pytest.mark.parametrize(
    ("seed", "critic"),
    [
        (0, {}),
        pytest.param(1, {}, marks=slow),
        pytest.param(2, {}, marks=slow),
        # Q of what the policy never plays is not held down here: V weighs it by pi, which cloning takes to 0.
        *(pytest.param(seed, {"critic_type": "vocab", "conservative_coef": 0.0}, marks=slow) for seed in range(3)),
    ],
    ids=lambda value: value.get("critic_type", "scalar") if isinstance(value, dict) else None,
)
def test_on_a_random_process(seed, critic, tmp_path):
    mdp = RandomMDP.make(seed)
    played = play_episodes(
        lambda: MDPEnv(mdp), MDPPlayer(), episodes=6000, seed=10**5 * seed, agent_format=PlainFormat(), num_envs=64
    )
    dataset = dataset_from_episodes(played, with_images=False)
    rates = {"learning_rate": 1e-3, "critic_learning_rate": 1e-3, "target_tau": 0.2}
    trainer = train(dataset, tmp_path, seed, gamma=GAMMA, max_steps=500, **rates, **critic)
    learned = learned_values(trainer, [f"state {s}" for s in range(len(mdp.policy))], MDPEnv.actions)
    assert_right(learned, exact_values(mdp.transitions, mdp.rewards, mdp.policy, GAMMA))


@slow
@pytest.mark.parametrize("seed", range(3))
def test_on_number_line(seed, tmp_path):
    """All 30 states under uniformly random play, each read off two numbers of text."""
    played = play_episodes(
        TextNumberLine, UniformPlayer(), episodes=12_000, seed=10**5 * seed, agent_format=PlainFormat(), num_envs=64
    )
    dataset = dataset_from_episodes(played, with_images=False)
    rates = {"learning_rate": 5e-4, "critic_learning_rate": 1e-3, "target_tau": 0.3}
    trainer = train(dataset, tmp_path, seed, gamma=0.95, max_steps=2000, **rates)
    learned = learned_values(trainer, [f"{current} to {target}" for current, target in STATES], ("-", "+"))
    assert_right(learned, exact_values(*number_line(), gamma=0.95))
