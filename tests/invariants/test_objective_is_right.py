# SPDX-License-Identifier: Apache-2.0
"""The objective of a batch against plain loops: its returns, advantages and loss are those of `docs/algorithm.md`.

The reference reads the rows of the dataset, runs the stock model on one of them at a time, without padding, and goes
over segments, tokens and critics one by one. With the trainer it shares the weights, the arguments and the agent
format; what collator, heads, packing and formulas do is written out once more.

Axes: T tokens of a row, D hidden size, N critics, H width of a scalar head, R rank, V vocabulary.
"""

import math
from statistics import fmean
from types import SimpleNamespace

import datasets
import pytest
import torch

from tests import tiny_models
from tests.small_runs import config, text_number_line
from vlmq_trl import vlmq_trainer
from vlmq_trl.agent_format import JSONFormat

TOLERANCE = 1e-5  # float32, summed in another order
COMMON = {"gamma": 0.9, "token_gamma": 0.97, "turn_lambda": 0.6, "token_lambda": 0.8, "critic_coef": 0.4}
TREE_BACKUP = {"off_policy_trace": "tree_backup", "target_aggregation": "min"}
CASES = {
    "scalar": {"num_critics": 4, "off_policy_trace": "retrace"},
    "vocab": {"critic_type": "vocab", "num_critics": 3, "conservative_coef": 0.3, **TREE_BACKUP},
    "action": {"filter_scope": "action", "critic_scope": "action", "value_expectile": 0.3, **TREE_BACKUP},
    "return": {"filter_scope": "action", "critic_scope": "action", "advantage_estimator": "return"},
}


def scalar_head(head, n, state) -> float:
    """Critic n's value of a state [D]."""
    inner = (head.hidden.weight @ state + head.hidden.bias).chunk(len(head.weight))[n]  # [N * H] -> [H]
    return float(head.weight[n] @ (inner * inner.sigmoid()) + head.bias[n])


def critics(args, heads, before, after, policy, number) -> list[tuple[float, float, float]]:
    """N times Q, V and conservative term of a token: states [D] before and after it, policy [V], its number."""
    judgements = []
    for n in range(args.num_critics):
        if args.critic_type == "scalar":
            judgements.append((scalar_head(heads.q, n, after), scalar_head(heads.v, n, before), 0.0))
        else:
            inner = (heads.down.weight @ before + heads.down.bias).chunk(args.num_critics)[n]  # [N * R] -> [R]
            row = heads.up[n] @ inner + heads.bias[n]  # [V]
            judgements.append((float(row[number]), float(policy @ row), -float(row.log_softmax(0)[number])))
    return judgements


def response_tokens(trainer, turn) -> list[SimpleNamespace]:
    """What the data, the model and the critics say of each token of a turn's response."""
    args, tokenizer, critic = trainer.args, trainer.processing_class, trainer.model.critic
    prompt = tokenizer.apply_chat_template(turn["prompt"], tokenize=False, add_generation_prompt=True)
    whole = tokenizer.apply_chat_template(turn["prompt"] + turn["completion"], tokenize=False)
    start, response = tokenizer(prompt).input_ids, tokenizer(whole.removeprefix(prompt)).input_ids
    output = trainer.model.pretrained_model(input_ids=torch.tensor([start + response]), output_hidden_states=True)
    states, log_policy = output.hidden_states[-1][0], output.logits[0].log_softmax(-1)  # [T, D], [T, V]
    so_far = [tokenizer.decode(response[:count], skip_special_tokens=True) for count in range(len(response) + 1)]
    reached = [trainer.agent_format.reaches_action(text) for text in so_far]
    aggregate = min if args.target_aggregation == "min" else fmean
    tokens = []
    for place, number in enumerate(response):
        position, token = len(start) + place, SimpleNamespace(is_first=place == 0)
        token.is_action = reached[place] or not reached[-1]  # all of a response that never comes to its action
        token.reward, token.discount, token.is_last = 0.0, args.token_gamma, place == len(response) - 1
        if token.is_last:
            token.reward = turn["reward"]
            token.discount = 0.0 if turn["terminated"] else args.gamma
        token.log_prob = float(log_policy[position - 1, number])
        token.trace = 1.0 if args.off_policy_trace == "none" else math.exp(token.log_prob)
        if args.off_policy_trace == "retrace" and place < len(turn["behavior_logprobs"] or []):
            token.trace = min(1.0, math.exp(token.log_prob - turn["behavior_logprobs"][place]))
        seen = (states[position - 1], states[position], log_policy[position - 1].exp(), number)
        token.online = critics(args, critic.online, *seen)
        target = critics(args, critic.target, *seen)
        token.target_q, token.target_v = aggregate(q for q, _, _ in target), aggregate(v for _, v, _ in target)
        tokens.append(token)
    return tokens


def critic_loss(args, token, target) -> float:
    """What a token adds to the critic's loss; `target` is its normalised return."""
    total = 0.0
    for q, v, conservative in token.online:
        total += 0.5 * (q - target) ** 2 + args.conservative_coef * conservative
        if args.critic_type == "scalar":
            weight = 1 - args.value_expectile if token.target_q < v else args.value_expectile
            total += weight * (token.target_q - v) ** 2
    return total / len(token.online)


@torch.no_grad()
def objective(trainer, data, segments) -> tuple[list[float], list[float], float]:
    """Returns and advantages of a batch's tokens, and its loss; `segments` are lists of the data's row numbers."""
    args, mean = trainer.args, float(trainer.model.critic.target_mean)
    std = math.sqrt(trainer.model.critic.target_variance)
    returns, advantages, loss = [], [], 0.0
    for segment in segments:
        last, next_value, next_trace, next_is_state, backwards = data[segment[-1]], 0.0, 1.0, True, []
        if not last["terminated"]:
            prompt = last["final_prompt"] if last["truncated"] else data[segment[-1] + 1]["prompt"]
            # Any completion will do: the state at the end of the prompt does not depend on it.
            next_value = response_tokens(trainer, {**last, "prompt": prompt})[0].target_v * std + mean
        next_return = next_value
        tokens = [token for row in segment for token in response_tokens(trainer, data[row])]
        for token in reversed(tokens):
            # A turn's state is the prompt, or with `critic_scope="action"` what was read when the action comes.
            leaves_turn = token.is_last or (args.critic_scope == "action" and not token.is_action)
            decay = (args.turn_lambda if leaves_turn else args.token_lambda) * next_trace if next_is_state else 1.0
            next_return = token.reward + token.discount * ((1 - decay) * next_value + decay * next_return)
            next_value, next_trace = token.target_v * std + mean, token.trace
            next_is_state = args.critic_scope == "response" or token.is_action
            backwards.append(next_return)
        for token, token_return in zip(tokens, reversed(backwards), strict=True):
            usual = fmean(v for _, v, _ in token.online) if args.critic_type == "scalar" else token.target_v
            target = (token_return - mean) / std
            advantage = (target if args.advantage_estimator == "return" else token.target_q) - usual
            weight = min(math.exp(advantage / args.filter_temperature), args.filter_max_weight)
            loss -= token.log_prob * (weight if args.filter_scope == "response" or token.is_action else 1.0)
            if args.critic_scope == "response" or token.is_action or token.is_first:
                loss += args.critic_coef * critic_loss(args, token, target)
            returns.append(token_return)
            advantages.append(advantage)
    return returns, advantages, loss / len(returns)


def play() -> datasets.Dataset:
    """Six episodes; some responses never come to an action, and not all log-probabilities were recorded."""
    data = text_number_line(6, 3, JSONFormat())
    rows = data.to_list()
    for number, row in enumerate(rows):
        if number % 4 == 3:
            row["completion"][0]["content"] = "up and down and left"
        if number % 3 > 0:
            row["behavior_logprobs"] = [-1.0 * (number % 11), -8.0, -4.0]  # of the first three tokens
    return datasets.Dataset.from_list(rows, features=data.features)


@pytest.mark.parametrize("case", CASES)
def test_an_epoch_against_plain_loops(case, tmp_path, monkeypatch):
    """Every batch of an epoch: segments that terminate, are truncated, or are cut anywhere in an episode."""
    model, tokenizer = tiny_models.build("llama")
    args = config(tmp_path, segment_length=4, filter="exp", filter_max_weight=2.0, **COMMON, **CASES[case])
    data = play()
    trainer = vlmq_trainer.VLMQTrainer(
        model=model, args=args, train_dataset=data, processing_class=tokenizer, agent_format=JSONFormat()
    )
    critic = trainer.model.critic
    for weight in [*critic.online.parameters(), *critic.target.buffers()]:
        weight.data += 0.1 * torch.randn(weight.shape)  # no two heads agree
    critic.initialize_moments(mean=0.7, std=1.9)
    judged, critic_losses = [], vlmq_trainer.critic_losses
    monkeypatch.setattr(vlmq_trainer, "critic_losses", lambda *a: judged.append(critic_losses(*a)) or judged[-1])
    ends = set()
    for batch in trainer.get_train_dataloader():
        segments = []
        for row in batch["turn_row"].tolist():
            if segments and row == segments[-1][-1] + 1 and data[row]["turn"] > 0:
                segments[-1].append(row)
            else:
                segments.append([row])
        ends |= {(data[segment[-1]]["terminated"], data[segment[-1]]["truncated"]) for segment in segments}
        loss = trainer.compute_loss(trainer.model, batch)
        returns, advantages, expected = objective(trainer, data, segments)
        assert judged[-1].returns.tolist() == pytest.approx(returns, rel=TOLERANCE, abs=TOLERANCE)
        assert judged[-1].advantage.tolist() == pytest.approx(advantages, rel=TOLERANCE, abs=TOLERANCE)
        assert loss.item() == pytest.approx(expected, rel=TOLERANCE)
    assert ends == {(True, False), (False, True), (False, False)}  # the last two have bootstrap rows
