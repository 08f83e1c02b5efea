# SPDX-License-Identifier: Apache-2.0
"""The mathematics of VLM Q-Learning (arXiv 2505.03181) as pure functions: tensors in, tensors out.

Returns     `token_returns`, `trace_coefficients`
Critic      `scalar_critic_loss`, `vocab_critic_loss`, `expectile_loss`, `aggregate_ensemble`, `normalize`,
            `denormalize`
Policy      `advantages`, `filter_weights`, `policy_loss`

Axes: S segments, L tokens of a segment (its turns one after the other), A action tokens of a batch, N critics of the
ensemble. A segment's tokens are left-aligned: `mask` is True on a prefix of every row. Everything is float32.
"""

import torch
from torch import Tensor

FILTERS = ("binary", "exp", "none")
FILTER_SCOPES = ("response", "action")
ADVANTAGE_ESTIMATORS = ("q", "return")
THOUGHT_FILTERS = ("none", "reference")
TRACES = ("none", "retrace", "tree_backup")


def token_returns(
    rewards: Tensor,
    next_values: Tensor,
    discounts: Tensor,
    lambdas: Tensor,
    mask: Tensor,
) -> Tensor:
    r"""Lambda-returns over the tokens of each segment.

        G_t = r_t + gamma_t * ((1 - lambda_t) * V(s_{t+1}) + lambda_t * G_{t+1})

    At a segment's last token G_{t+1} is `next_values` itself: the value of the bootstrap state.

    Args:
        rewards: [S, L] reward of each token (0 but on a turn's last token).
        next_values: [S, L] V_target(s_{t+1}), the state that follows token t; not used where `discounts` is 0.
        discounts: [S, L] gamma_t: `token_gamma` inside a turn, `gamma` on its last token, 0 on a terminal token.
        lambdas: [S, L] lambda_t in [0, 1], with any off-policy trace multiplied in.
        mask: [S, L] True on real tokens; a prefix of each row.

    Returns:
        [S, L] returns, 0 where `mask` is False. No gradient flows.

    Worked example: one turn of two tokens that ends the episode with reward 1, gamma_t = (1, 0), lambda_t = (0.5, 0),
    V(s_2) = 0.4. Then G_2 = 1 and G_1 = 0 + 1 * (0.5 * 0.4 + 0.5 * 1) = 0.7.
    """
    for name, tensor in (("next_values", next_values), ("discounts", discounts), ("lambdas", lambdas), ("mask", mask)):
        if tensor.shape != rewards.shape:
            raise ValueError(f"`{name}` has shape {tuple(tensor.shape)}, `rewards` {tuple(rewards.shape)}.")
    with torch.no_grad():
        zero = torch.zeros((), dtype=rewards.dtype, device=rewards.device)
        next_values = torch.where(mask & (discounts != 0), next_values, zero)
        is_last = mask & ~torch.cat([mask[:, 1:], torch.zeros_like(mask[:, :1])], dim=1)
        # The last token's own lambda does not matter: both branches are the bootstrap value.
        lambdas = torch.where(is_last, zero, lambdas)
        base = torch.where(mask, rewards + discounts * (1 - lambdas) * next_values, zero)
        carry = torch.where(mask, discounts * lambdas, zero)
        returns = torch.empty_like(base)
        g = torch.zeros_like(base[:, 0])
        for t in range(base.shape[1] - 1, -1, -1):
            g = base[:, t] + carry[:, t] * g
            returns[:, t] = g
        return returns


def trace_coefficients(log_probs: Tensor, behavior_log_probs: Tensor | None, kind: str) -> Tensor | None:
    r"""Off-policy trace coefficients c_t, one a token; `token_returns` takes lambda_t * c_{t+1}.

    `"retrace"` (arXiv 1606.02647): c_t = min(1, pi(a_t|s_t) / mu(a_t|s_t)). `"tree_backup"` (Precup et al., 2000):
    c_t = pi(a_t|s_t). `"none"`: no trace, returns None.

    Args:
        log_probs: [...] log pi(a_t|s_t) of the current policy.
        behavior_log_probs: [...] log mu(a_t|s_t); NaN where it was not recorded, which falls back to tree-backup.
        kind: `"none"`, `"retrace"` or `"tree_backup"`.

    Raises:
        ValueError: for an unknown `kind`, or `"retrace"` without `behavior_log_probs`.
    """
    if kind == "none":
        return None
    if kind not in TRACES:
        raise ValueError(f"Unknown trace {kind!r}; choose one of {TRACES}.")
    pi = log_probs.detach().exp()
    if kind == "tree_backup":
        return pi
    if behavior_log_probs is None:
        raise ValueError(
            "`off_policy_trace='retrace'` needs the behaviour log-probabilities (`behavior_logprobs` column) of the "
            "data; choose 'tree_backup', which needs none."
        )
    ratio = (log_probs.detach() - behavior_log_probs).exp().clamp(max=1.0)
    return torch.where(behavior_log_probs.isnan(), pi, ratio)


def expectile_loss(prediction: Tensor, target: Tensor, expectile: float) -> Tensor:
    r"""Asymmetric squared error |expectile - 1[target < prediction]| * (target - prediction)^2 (IQL, arXiv 2110.06169,
    eq. 5). 0.5 gives half of the squared error. Element-wise; shapes broadcast."""
    error = target - prediction
    weight = torch.where(error < 0, 1 - expectile, expectile)
    return weight * error.square()


def scalar_critic_loss(
    q_values: Tensor,
    state_values: Tensor,
    q_targets: Tensor,
    value_targets: Tensor,
    value_expectile: float,
) -> tuple[Tensor, Tensor]:
    r"""Summed losses of the scalar critic: Q regresses on the token return, V on Q_target of the data's own action.

    Args:
        q_values: [A, N] Q(s_t, a_t) of each critic, normalised.
        state_values: [A, N] V(s_t) of each critic, normalised.
        q_targets: [A] normalised token returns.
        value_targets: [A] normalised Q_target(s_t, a_t).
        value_expectile: in (0, 1); 0.5 regresses V on the mean, above it V leans to the better actions (IQL).

    Returns:
        (q_loss, value_loss): scalars, summed over A and averaged over N; each is half of a squared error at 0.5.
    """
    q_loss = 0.5 * (q_values - q_targets[:, None]).square().mean(1).sum()
    value_loss = expectile_loss(state_values, value_targets[:, None], value_expectile).mean(1).sum()
    return q_loss, value_loss


def vocab_critic_loss(q_values: Tensor, q_log_probs: Tensor, q_targets: Tensor) -> tuple[Tensor, Tensor]:
    r"""Summed losses of the vocabulary-wide critic: regression of the taken token's Q, and the conservative term.

    The conservative term is the cross-entropy of the Q row, read as logits, to the taken token (CQL(H), arXiv
    2006.04779, eq. 4, as in ILQL, arXiv 2206.11871): it holds down the Q of tokens that no data ever trained.

    Args:
        q_values: [A, N] Q(s_t, a_t), normalised.
        q_log_probs: [A, N] log softmax(Q(s_t, .))[a_t].
        q_targets: [A] normalised token returns.

    Returns:
        (q_loss, conservative_loss): scalars, summed over A and averaged over N.
    """
    q_loss = 0.5 * (q_values - q_targets[:, None]).square().mean(1).sum()
    return q_loss, -q_log_probs.mean(1).sum()


def aggregate_ensemble(values: Tensor, how: str) -> Tensor:
    """[..., N] values of an ensemble -> [...], their `"mean"` or `"min"`."""
    if how == "mean":
        return values.mean(-1)
    if how == "min":
        return values.amin(-1)
    raise ValueError(f"Unknown ensemble aggregation {how!r}; choose 'mean' or 'min'.")


def advantages(q_values: Tensor, state_values: Tensor) -> Tensor:
    """A_t = Q_target(s_t, a_t) - V(s_t), detached; or G_t - V(s_t) (AWR, arXiv 1910.00177). Element-wise on [A]."""
    return (q_values - state_values).detach()


def filter_weights(
    advantage: Tensor, kind: str, *, threshold: float = 0.0, temperature: float = 1.0, max_weight: float = 20.0
) -> Tensor:
    r"""f_t, the weight of each token's imitation loss (advantage-filtered SFT).

    `"binary"`: 1[A_t > threshold]. `"exp"`: min(exp(A_t / temperature), max_weight) (AWAC, arXiv 2006.09359).
    `"none"`: 1, plain SFT.

    Args:
        advantage: [A], in units of the targets' running standard deviation.

    Returns:
        [A] weights >= 0, without gradient.
    """
    if kind == "binary":
        return (advantage > threshold).to(advantage.dtype)
    if kind == "exp":
        # Clipped before the exponential, so that no infinity is ever made.
        limit = torch.log(torch.as_tensor(max_weight, dtype=advantage.dtype, device=advantage.device))
        return (advantage / temperature).clamp(max=limit).exp()
    if kind == "none":
        return torch.ones_like(advantage)
    raise ValueError(f"Unknown filter {kind!r}; choose one of {FILTERS}.")


def policy_loss(log_probs: Tensor, weights: Tensor, num_action_tokens: Tensor | float) -> Tensor:
    """sum_t f_t * (-log pi(a_t|s_t)) / number of action tokens.

    The denominator counts every action token, kept or not, so that a strict filter does not inflate the step.

    Args:
        log_probs: [A] log pi(a_t|s_t), with gradient.
        weights: [A] filter weights.
        num_action_tokens: the whole optimiser step's action tokens, over all micro-batches and processes.
    """
    return -(weights * log_probs).sum() / num_action_tokens


def normalize(values: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """(values - mean) / std, the critic heads' own unit."""
    return (values - mean) / std


def denormalize(values: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """values * std + mean: from the critic heads' unit to that of the rewards."""
    return values * std + mean
