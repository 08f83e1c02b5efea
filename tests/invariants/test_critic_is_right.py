# SPDX-License-Identifier: Apache-2.0
"""The critic against exact dynamic programming of the policy that it evaluates.

With `filter="none"` and `value_expectile=0.5` the critic evaluates the policy that played the data. Its V at the
prompt and its Q after the completion must match the exact solution: mean absolute error at most 5 % of the range of
the expected returns, rank correlation at least 0.98. A truncated episode bootstraps, so the values of the endless game
are the right ones although every episode is cut.

Axes: S states, U actions.
"""

from dataclasses import dataclass

import gymnasium
import numpy as np
import pytest
import torch
from gymnasium import spaces

import vlmq_trl.envs  # noqa: F401  registers the environments
from tests import tiny_models
from vlmq_trl.agent_format import PlainFormat
from vlmq_trl.losses import denormalize
from vlmq_trl.rollout import Response, play_episodes
from vlmq_trl.trajectory import dataset_from_episodes
from vlmq_trl.vlmq_config import VLMQConfig
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
    rewards: np.ndarray  # [S, U] means; each reward has a standard deviation of 0.5
    policy: np.ndarray  # [S, U]

    @classmethod
    def make(cls, seed: int, states: int = 5) -> "RandomMDP":
        """The seed's first process whose exact values are apart: values that are all but equal have no order."""
        rng = np.random.default_rng(seed)
        while True:
            mdp = cls(
                0.9 * rng.dirichlet(np.full(states, 0.5), (states, 2)),
                rng.uniform(-1, 1, (states, 2)),
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
        reward = self.np_random.normal(self.mdp.rewards[self.state, u], 0.5)
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


class TextNumberLine(gymnasium.ObservationWrapper):
    """NumberLine with its two numbers as text in place of the picture."""

    task = ""

    def __init__(self):
        super().__init__(gymnasium.make("vlmq_trl/NumberLine-v0"))
        self.observation_space = spaces.Dict({"text": TEXT_SPACE})

    def observation(self, observation):
        return {"text": "{} to {}".format(*self.unwrapped.state_text().values())}


class UniformPlayer:
    """Plays each legal action with equal probability."""

    def act(self, requests):
        return [Response(str(r.rng.choice(r.env.unwrapped.legal_actions))) for r in requests]


def test_number_line_by_its_own_rules():
    """The table of `number_line` is what the environment does."""
    transitions, rewards, _ = number_line()
    env = gymnasium.make("vlmq_trl/NumberLine-v0")
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
    model, tokenizer = tiny_models.build("llama", seed)
    args = VLMQConfig(
        output_dir=str(output_dir),
        filter="none",
        value_expectile=0.5,
        seed=seed,
        **{
            "use_cpu": True,
            "bf16": False,
            "gradient_checkpointing": False,
            "report_to": "none",
            "disable_tqdm": True,
            "save_strategy": "no",
            "logging_steps": 100,
            **kwargs,
        },
    )
    trainer = VLMQTrainer(model=model, args=args, train_dataset=dataset, processing_class=tokenizer)
    trainer.train()
    return trainer


@torch.no_grad()
def learned_values(trainer: VLMQTrainer, texts: list[str], actions: tuple[str, ...]) -> tuple[np.ndarray, np.ndarray]:
    """V [S] at the prompt and Q [S, U] after the completion of the online heads, in reward units."""
    items = []
    for text in texts:
        prompt, _ = PlainFormat().build_prompt("", {"text": text})
        for action in actions:
            items.append(
                {
                    "prompt": prompt,
                    "completion": [{"role": "assistant", "content": action}],
                    "row": len(items),
                    "segment": len(items),
                    "reward": 0.0,
                    "terminated": True,
                    "return_to_go": 0.0,
                    "bootstrap": None,
                }
            )
    batch = trainer.data_collator(items)
    trainer.model.eval()
    output = trainer.model(**{k: batch[k] for k in ("input_ids", "attention_mask", "labels")})
    critic = trainer.model.critic
    row = (batch["labels"][:, 1:] != -100).nonzero()[:, 0]
    first = torch.cat([torch.ones(1, dtype=torch.bool), row[1:] != row[:-1]])
    last = first.roll(-1)
    values = (output.state_values if output.state_values is not None else output.target_state_values).mean(-1)[first]
    q_values = output.q_values.mean(-1)[last]
    values, q_values = (denormalize(x, critic.target_mean, critic.target_std) for x in (values, q_values))
    shape = (len(texts), len(actions))
    return values.reshape(shape).mean(1).numpy(), q_values.reshape(shape).numpy()


def rank_correlation(x: np.ndarray, y: np.ndarray) -> float:
    """Spearman's, for values without ties; ties in exact values (equal up to 1e-9) share their mean rank."""

    def ranks(values):
        values = np.round(np.ravel(values), 9)
        _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
        return (np.cumsum(counts) - (counts - 1) / 2)[inverse]

    return float(np.corrcoef(ranks(x), ranks(y))[0, 1])


def compare(learned: np.ndarray, exact: np.ndarray, spread: float) -> tuple[float, float]:
    """(mean absolute error as a fraction of the range, rank correlation)."""
    return float(np.abs(learned - exact).mean()) / spread, rank_correlation(learned, exact)


# Accurate rather than fast: a decaying rate, target heads that follow closely, a loss that is the critic's.
PATIENT = {
    "turn_lambda": 0.5,
    "per_device_train_batch_size": 64,
    "learning_rate": 1e-3,
    "lr_scheduler_type": "cosine",
    "warmup_steps": 50,
    "max_grad_norm": 0.0,
    "critic_coef": 10.0,
    "target_tau": 0.2,
    "target_norm_rate": 0.02,
}


def assert_right(learned: tuple[np.ndarray, np.ndarray], exact: tuple[np.ndarray, np.ndarray]) -> None:
    spread = float(np.ptp(np.concatenate([values.ravel() for values in exact])))  # of the expected returns
    for name, x, y in zip("VQ", learned, exact, strict=True):
        error, correlation = compare(x, y, spread)
        print(f"{name}: mean absolute error {error:.4f} of the range, rank correlation {correlation:.3f}")
        assert error <= ERROR_LIMIT and correlation >= RANK_LIMIT


@pytest.fixture
def small_llama(monkeypatch):
    monkeypatch.setattr(tiny_models, "TEXT", {**tiny_models.TEXT, "hidden_size": 64, "intermediate_size": 128})


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_values_of_a_random_mdp(tmp_path, small_llama, seed):
    mdp = RandomMDP.make(seed)
    played = play_episodes(
        lambda: MDPEnv(mdp), MDPPlayer(), episodes=6000, seed=100_000 * seed, agent_format=PlainFormat(), num_envs=64
    )
    dataset = dataset_from_episodes(played, with_images=False)
    trainer = train(dataset, tmp_path, seed, gamma=0.9, max_steps=600, **PATIENT)
    learned = learned_values(trainer, [f"state {s}" for s in range(5)], MDPEnv.actions)
    assert_right(learned, exact_values(mdp.transitions, mdp.rewards, mdp.policy, gamma=0.9))


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_values_of_number_line(tmp_path, small_llama, seed):
    """All 30 states and both actions of NumberLine, under uniformly random play."""
    played = play_episodes(
        TextNumberLine, UniformPlayer(), episodes=12_000, seed=100_000 * seed, agent_format=PlainFormat(), num_envs=64
    )
    dataset = dataset_from_episodes(played, with_images=False)
    rates = {"learning_rate": 5e-4, "critic_learning_rate": 1e-3, "target_tau": 0.3}
    trainer = train(dataset, tmp_path, seed, gamma=0.95, max_steps=2000, **{**PATIENT, **rates})
    learned = learned_values(trainer, [f"{current} to {target}" for current, target in STATES], ("-", "+"))
    assert_right(learned, exact_values(*number_line(), gamma=0.95))
