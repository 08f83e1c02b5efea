# SPDX-License-Identifier: Apache-2.0
"""The critic's part of a batch's loss: what the model gives at the action tokens, the batch's turns and the
configuration come together here; the formulas themselves are those of `losses` (`docs/algorithm.md`).

Axes: R turns of a batch, S segments, L tokens of a segment, A action tokens (row by row, in order), N critics.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from . import losses
from .critic import Critic
from .modeling import ValueHeadOutput
from .vlmq_config import VLMQConfig


@dataclass(frozen=True)
class CriticLosses:
    """What the critic makes of a batch.

    Args:
        parts: scalars by name, each summed over the A tokens, or those of `critic_scope`, and averaged over N.
        advantage: [A] Q_target(s_t, a_t) - V(s_t), or with `advantage_estimator="return"` G_t - V(s_t); normalised,
            no gradient.
        returns: [A] the critic's targets, in units of the rewards, no gradient.
        turn_values: [R] V at each turn's first token, or with `critic_scope="action"` at its action's first;
            normalised, no gradient.
    """

    parts: dict[str, Tensor]
    advantage: Tensor
    returns: Tensor
    turn_values: Tensor


def critic_losses(
    args: VLMQConfig, critic: Critic, output: ValueHeadOutput, labels: Tensor, turns: dict[str, Tensor]
) -> CriticLosses:
    """Lambda-returns over each segment's action tokens, the critic's losses on them, and the advantages.

    Args:
        output: of the batch's forward with the critic.
        labels: [B, T], -100 but on action tokens; the rows that follow the R turns' are bootstrap states.
        turns: what `VLMQDataCollator` says of the turns and segments (`turn_*` [R], `segment_*` [S]), and
            `behavior_log_probs` [A] where some were recorded; `action_mask` [A] for `critic_scope="action"`.
    """
    mean, std = critic.target_mean, critic.target_std
    target_q = losses.aggregate_ensemble(output.target_q_values, args.target_aggregation)
    target_v = losses.aggregate_ensemble(output.target_state_values, args.target_aggregation)
    bootstrap = losses.aggregate_ensemble(output.bootstrap_values, args.target_aggregation)

    # Everything about the tokens' place in their turn and segment; [A] unless said otherwise.
    turn_of_token = (labels[:, 1:] != -100).nonzero()[:, 0]
    is_turn_end = torch.ones_like(turn_of_token, dtype=torch.bool)
    is_turn_end[:-1] = turn_of_token[1:] != turn_of_token[:-1]
    is_turn_start = is_turn_end.roll(1)
    segment = turns["turn_segment"][turn_of_token]
    is_segment_end = torch.ones_like(is_turn_end)
    is_segment_end[:-1] = segment[1:] != segment[:-1]
    terminal = is_turn_end & turns["turn_terminated"][turn_of_token]

    values = losses.denormalize(target_v.float(), mean, std)
    next_values = values.roll(-1)
    source = turns["segment_bootstrap"][segment[is_segment_end]]  # [S], -1: terminal
    padded = torch.cat([losses.denormalize(bootstrap.float(), mean, std), values.new_zeros(1)])
    next_values[is_segment_end] = padded[source]

    # With `critic_scope="action"` a turn's state is what has been read when it comes to its action. What stands before
    # is passed over; the first token's state only has a value for segments that bootstrap from it.
    in_scope = turns["action_mask"] if args.critic_scope == "action" else torch.ones_like(is_turn_end)
    learned = in_scope | is_turn_start
    enters_turn = in_scope.roll(-1) & (is_turn_end | ~in_scope)
    lambdas = torch.where(enters_turn, args.turn_lambda, args.token_lambda)
    behavior = turns.get("behavior_log_probs")
    if behavior is None:  # none recorded in this batch
        behavior = torch.full_like(output.log_probs, torch.nan)
    trace = losses.trace_coefficients(output.log_probs, behavior, args.off_policy_trace)
    if trace is not None:
        lambdas = lambdas * trace.roll(-1)
    lambdas = torch.where(in_scope.roll(-1), lambdas, 1.0)
    returns = packed_returns(
        segment,
        rewards=torch.where(is_turn_end, turns["turn_reward"][turn_of_token], 0.0),
        next_values=next_values,
        discounts=torch.where(is_turn_end, args.gamma, args.token_gamma).masked_fill(terminal, 0.0),
        lambdas=lambdas,
    )
    targets = losses.normalize(returns, mean, std)

    if args.critic_type == "scalar":
        q_loss, value_loss = losses.scalar_critic_loss(
            output.q_values[learned],
            output.state_values[learned],
            targets[learned],
            target_q[learned],
            args.value_expectile,
        )
        parts = {"q": q_loss, "value": value_loss}
        state_values = output.state_values.detach().mean(-1)
    else:
        q_loss, conservative = losses.vocab_critic_loss(
            output.q_values[learned], output.q_log_probs[learned], targets[learned]
        )
        parts = {"q": q_loss, "conservative": args.conservative_coef * conservative}
        state_values = target_v
    taken = target_q if args.advantage_estimator == "q" else targets
    return CriticLosses(parts, losses.advantages(taken, state_values), returns, state_values[enters_turn.roll(1)])


def packed_returns(segment: Tensor, **tokens: Tensor) -> Tensor:
    """`losses.token_returns` of packed tokens: [A] each, `segment` [A] non-decreasing -> [A], through [S, L]."""
    _, inverse, counts = segment.unique_consecutive(return_inverse=True, return_counts=True)
    position = torch.arange(len(segment), device=segment.device) - (counts.cumsum(0) - counts)[inverse]
    shape = (len(counts), int(counts.max()))
    dense = {name: x.new_zeros(shape).index_put((inverse, position), x) for name, x in tokens.items()}
    mask = torch.zeros(shape, dtype=torch.bool, device=segment.device)
    mask[inverse, position] = True
    return losses.token_returns(mask=mask, **dense)[inverse, position]
