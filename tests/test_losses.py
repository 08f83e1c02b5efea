# SPDX-License-Identifier: Apache-2.0
"""The formulas of VLM Q-Learning, against numbers worked by hand and properties that hold for any batch."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.testing import assert_close

from vlmq_trl import losses

NAN, INF = math.nan, math.inf

numbers = st.floats(-10, 10, width=32)
fractions = st.floats(0, 1, width=32)
garbage = st.sampled_from([NAN, INF, -INF, 1e30, -7.0, 0.0])
# One token: reward, V(s_{t+1}), discount, lambda. A batch is a list of segments of at least one token.
batches = st.lists(
    st.lists(st.tuples(numbers, numbers, fractions, fractions), min_size=1, max_size=6), min_size=1, max_size=4
)


def pack(batch, padding=0, fill=0.0):
    """Segments of tokens -> the four [S, L] inputs and the mask, `fill` wherever there is no token."""
    width = max(map(len, batch)) + padding
    rows = [segment + [(fill,) * 4] * (width - len(segment)) for segment in batch]
    mask = torch.tensor([[i < len(segment) for i in range(width)] for segment in batch])
    return (*torch.tensor(rows, dtype=torch.float32).unbind(-1), mask)


def returns_of(batch, **changes):
    rewards, next_values, discounts, lambdas, mask = pack(batch)
    inputs = {"next_values": next_values, "discounts": discounts, "lambdas": lambdas, "mask": mask} | changes
    return losses.token_returns(rewards, **inputs)


# ---- token_returns ----


def test_returns_of_two_turns_by_hand():
    # Two turns of two tokens. token_gamma 1, gamma 0.5, token_lambda 0.8, turn_lambda 0.25; the second ends the
    # segment, not the episode: V(s_5) = 4 is its bootstrap value. Rewards 1 and 2.
    #   G_4 = 2 + 0.5 * 4                                   = 4
    #   G_3 = 0 + 1 * (0.2 * V(s_4) + 0.8 * G_4) = 0.2 * 3 + 3.2 = 3.8
    #   G_2 = 1 + 0.5 * (0.75 * V(s_3) + 0.25 * G_3) = 1 + 0.5 * (0.75 * 2 + 0.95) = 2.225
    #   G_1 = 0 + 1 * (0.2 * V(s_2) + 0.8 * G_2) = 0.2 * 1 + 1.78 = 1.98
    segment = [(0, 1, 1, 0.8), (1, 2, 0.5, 0.25), (0, 3, 1, 0.8), (2, 4, 0.5, 0.25)]
    assert_close(returns_of([segment]), torch.tensor([[1.98, 2.225, 3.8, 4.0]]))
    # The same turns, and the second ends the episode: G_4 = 2, G_3 = 0.6 + 1.6 = 2.2,
    # G_2 = 1 + 0.5 * (1.5 + 0.55) = 2.025, G_1 = 0.2 + 1.62 = 1.82.
    segment[3] = (2, 4, 0, 0.25)
    assert_close(returns_of([segment]), torch.tensor([[1.82, 2.025, 2.2, 2.0]]))


def test_returns_worked_example_of_the_docstring():
    segment = [(0, 0.4, 1, 0.5), (1, NAN, 0, 0)]
    assert_close(returns_of([segment]), torch.tensor([[0.7, 1.0]]))


def test_returns_of_unequal_segments_by_hand():
    # Row 0: one token, cut: 1 + 0.9 * 2 = 2.8. Row 1: G_2 = -1 + 0.5 * 4 = 1, G_1 = 0 + 1 * (0.5 * 6 + 0.5 * 1) = 3.5.
    batch = [[(1, 2, 0.9, 0.7)], [(0, 6, 1, 0.5), (-1, 4, 0.5, 1)]]
    assert_close(returns_of(batch), torch.tensor([[2.8, 0.0], [3.5, 1.0]]))


@given(batches, st.integers(0, 3), garbage)
def test_returns_do_not_see_what_lies_beyond_the_mask(batch, padding, fill):
    clean = returns_of(batch)
    rewards, *rest = pack(batch, padding, fill)
    padded = losses.token_returns(rewards, *rest)
    assert torch.equal(padded[:, : clean.shape[1]], clean)
    assert not padded[~rest[-1]].any()


@given(batches, batches)
def test_returns_of_a_segment_do_not_see_its_neighbours(batch, others):
    together = returns_of(batch + others)
    for i, segment in enumerate(batch):
        assert torch.equal(together[i, : len(segment)], returns_of([segment])[0])


@given(batches)
def test_lambda_one_is_monte_carlo(batch):
    returns = returns_of(batch, lambdas=torch.ones(pack(batch)[0].shape))
    for segment, row in zip(batch, returns.tolist(), strict=True):
        for t in range(len(segment)):
            # sum_k (prod of the discounts before k) * r_k, then the discount that is left times the bootstrap value.
            expected, discount = 0.0, 1.0
            for reward, _, gamma, _ in segment[t:]:
                expected += discount * reward
                discount *= gamma
            assert row[t] == pytest.approx(expected + discount * segment[-1][1], rel=1e-4, abs=1e-4)


@given(batches)
def test_lambda_zero_is_one_step_td(batch):
    returns = returns_of(batch, lambdas=torch.zeros(pack(batch)[0].shape))
    for segment, row in zip(batch, returns.tolist(), strict=True):
        for t, (reward, value, gamma, _) in enumerate(segment):
            assert row[t] == pytest.approx(reward + gamma * value, rel=1e-5, abs=1e-5)


@given(batches)
def test_returns_are_the_mixture_of_the_two_branches(batch):
    # The recursion written out token by token, in double precision.
    for segment, row in zip(batch, returns_of(batch).tolist(), strict=True):
        g = segment[-1][1]
        for t in range(len(segment) - 1, -1, -1):
            reward, value, gamma, lam = segment[t]
            g = reward + gamma * ((1 - lam) * value + lam * g)
            assert row[t] == pytest.approx(g, rel=1e-4, abs=1e-4)


@given(batches, st.integers(0, 5), garbage)
def test_a_terminal_token_cuts(batch, t, fill):
    t = min(t, min(map(len, batch)) - 1)
    rewards, next_values, discounts, lambdas, mask = pack(batch)
    discounts[:, t] = 0
    expected = losses.token_returns(rewards, next_values, discounts, lambdas, mask)
    assert torch.equal(expected[:, t], rewards[:, t])
    # Neither the value of the state that does not follow, nor (up to the terminal token) anything later is looked at.
    next_values[:, t] = fill
    rewards[:, t + 1 :] += 5
    changed = losses.token_returns(rewards, next_values, discounts, lambdas, mask)
    assert torch.equal(changed[:, : t + 1], expected[:, : t + 1])


@given(st.lists(st.tuples(numbers, numbers, fractions, fractions), min_size=2, max_size=8), st.integers(1, 7))
def test_where_a_segment_is_cut_does_not_matter_without_turn_lambda(segment, cut):
    cut = min(cut, len(segment) - 1)
    reward, value, gamma, _ = segment[cut - 1]
    segment[cut - 1] = (reward, value, gamma, 0.0)  # the first turn's last token
    whole = returns_of([segment])[0]
    halves = [returns_of([half])[0] for half in (segment[:cut], segment[cut:])]
    assert torch.equal(whole, torch.cat(halves))


def test_no_gradient_flows_into_returns():
    rewards, next_values, discounts, lambdas, mask = pack([[(0, 1, 1, 0.5), (1, 2, 1, 0.5)]])
    next_values.requires_grad_()
    assert not losses.token_returns(rewards, next_values, discounts, lambdas, mask).requires_grad


@pytest.mark.parametrize("name", ["next_values", "discounts", "lambdas", "mask"])
def test_returns_refuse_other_shapes(name):
    wrong = torch.ones(1, 3, dtype=torch.bool if name == "mask" else torch.float32)
    with pytest.raises(ValueError, match=rf"`{name}` has shape \(1, 3\), `rewards` \(1, 2\)"):
        returns_of([[(0, 1, 1, 0.5), (1, 2, 1, 0.5)]], **{name: wrong})


# ---- trace_coefficients ----


def test_traces_by_hand():
    pi = torch.tensor([0.5, 0.2, 0.3, 0.1], requires_grad=True)
    mu = torch.tensor([0.25, 0.4, NAN, 0.1])
    # Retrace: min(1, 0.5 / 0.25) = 1; 0.2 / 0.4 = 0.5; not recorded: tree-backup's 0.3; 0.1 / 0.1 = 1.
    retrace = losses.trace_coefficients(pi.log(), mu.log(), "retrace")
    assert_close(retrace, torch.tensor([1.0, 0.5, 0.3, 1.0]))
    tree_backup = losses.trace_coefficients(pi.log(), None, "tree_backup")
    assert_close(tree_backup, pi.detach())
    assert not retrace.requires_grad and not tree_backup.requires_grad
    assert losses.trace_coefficients(pi.log(), mu.log(), "none") is None


def test_returns_with_a_trace_by_hand():
    # lambda_t = token_lambda * c_{t+1}, gamma 1, V(s_2) = 2, terminal reward 1, token_lambda 0.5, c_2 = 0.4:
    # G_2 = 1, G_1 = (1 - 0.2) * 2 + 0.2 * 1 = 1.8
    trace = losses.trace_coefficients(torch.tensor([[0.9, 0.4]]).log(), None, "tree_backup")
    rewards, next_values, discounts, lambdas, mask = pack([[(0, 2, 1, 0.5), (1, 0, 0, 0.5)]])
    returns = losses.token_returns(rewards, next_values, discounts, lambdas * trace.roll(-1), mask)
    assert_close(returns, torch.tensor([[1.8, 1.0]]))


@given(st.lists(st.tuples(st.floats(-100, 0), st.one_of(st.just(NAN), st.floats(-100, 0))), min_size=1, max_size=8))
def test_traces_lie_in_the_unit_interval(pairs):
    log_pi, log_mu = torch.tensor(pairs, dtype=torch.float32).unbind(-1)
    for kind in ("retrace", "tree_backup"):
        trace = losses.trace_coefficients(log_pi, log_mu, kind)
        assert ((trace >= 0) & (trace <= 1)).all()
        assert (trace >= log_pi.exp()).all()  # mu <= 1, so Retrace never cuts more than tree-backup


def test_traces_refuse():
    log_probs = torch.zeros(2)
    with pytest.raises(ValueError, match="Unknown trace 'vtrace'"):
        losses.trace_coefficients(log_probs, log_probs, "vtrace")
    with pytest.raises(ValueError, match=r"behavior_logprobs.*tree_backup"):
        losses.trace_coefficients(log_probs, None, "retrace")


# ---- critic losses ----


def test_expectile_by_hand():
    prediction, target = torch.tensor([0.0, 0.0, 2.0]), torch.tensor([3.0, -1.0, 2.0])
    # expectile 0.8: 0.8 * 3² = 7.2; below the prediction 0.2 * 1² = 0.2; 0.
    assert_close(losses.expectile_loss(prediction, target, 0.8), torch.tensor([7.2, 0.2, 0.0]))
    # 0.5: half of the squared error.
    assert_close(losses.expectile_loss(prediction, target, 0.5), torch.tensor([4.5, 0.5, 0.0]))


@pytest.mark.parametrize("expectile", [0.2, 0.5, 0.8])
def test_expectile_of_two_values(expectile):
    # Of 0 and 1: (1 - e) * m = e * (1 - m), so the loss is least at m = e.
    m = torch.tensor(expectile, requires_grad=True)
    losses.expectile_loss(m, torch.tensor([0.0, 1.0]), expectile).sum().backward()
    assert_close(m.grad, torch.tensor(0.0), atol=1e-6, rtol=0)


def test_scalar_critic_loss_by_hand():
    # Q against (1, 0):  token 1: (1, 3) errors 0, 2; token 2: (-1, 1) errors 1, 1.
    #   half squares, mean over the critics, summed over tokens: (0 + 2) / 2 + (0.5 + 0.5) / 2 = 1.5
    # V against (2, -1), expectile 0.75:  token 1: (0, 3): 0.75 * 4 = 3, 0.25 * 1 = 0.25;
    #   token 2: (-1, 1): 0, 0.25 * 4 = 1. Together (3 + 0.25) / 2 + (0 + 1) / 2 = 2.125
    q = torch.tensor([[1.0, 3.0], [-1.0, 1.0]], requires_grad=True)
    v = torch.tensor([[0.0, 3.0], [-1.0, 1.0]], requires_grad=True)
    q_loss, value_loss = losses.scalar_critic_loss(q, v, torch.tensor([1.0, 0.0]), torch.tensor([2.0, -1.0]), 0.75)
    assert_close((q_loss, value_loss), (torch.tensor(1.5), torch.tensor(2.125)))
    (q_loss + value_loss).backward()
    # dQ: error / N. dV: 2 * weight * (prediction - target) / N.
    assert_close(q.grad, torch.tensor([[0.0, 1.0], [-0.5, 0.5]]))
    assert_close(v.grad, torch.tensor([[-1.5, 0.25], [0.0, 0.5]]))
    # With 0.5 both are half of a squared error.
    _, value_loss = losses.scalar_critic_loss(q, q, torch.zeros(2), torch.tensor([1.0, 0.0]), 0.5)
    assert_close(value_loss, torch.tensor(1.5))


def test_vocab_critic_loss_by_hand():
    # The Q loss as above; the conservative term -(log 0.5 + log 0.25) / 2 - (log 1 + log 0.5) / 2 = 2 log 2.
    q = torch.tensor([[1.0, 3.0], [-1.0, 1.0]])
    log_probs = torch.tensor([[0.5, 0.25], [1.0, 0.5]]).log()
    q_loss, conservative = losses.vocab_critic_loss(q, log_probs, torch.tensor([1.0, 0.0]))
    assert_close((q_loss, conservative), (torch.tensor(1.5), torch.tensor(2 * math.log(2))))


def test_losses_of_no_token_are_zero():
    none, pairs = torch.zeros(0), torch.zeros(0, 2)
    parts = [
        *losses.scalar_critic_loss(pairs, pairs, none, none, 0.8),
        *losses.vocab_critic_loss(pairs, pairs, none),
        losses.policy_loss(none, none, 1),
    ]
    assert [part.item() for part in parts] == [0.0] * 5


def test_ensembles_by_hand():
    values = torch.tensor([[1.0, 2.0, 6.0], [-3.0, 0.0, 3.0]])
    assert losses.aggregate_ensemble(values, "mean").tolist() == [3.0, 0.0]
    assert losses.aggregate_ensemble(values, "min").tolist() == [1.0, -3.0]
    with pytest.raises(ValueError, match="Unknown ensemble aggregation 'max'"):
        losses.aggregate_ensemble(values, "max")


def test_normalisation_by_hand():
    mean, std = torch.tensor(3.0), torch.tensor(2.0)
    values = torch.tensor([3.0, 7.0, -1.0])
    assert losses.normalize(values, mean, std).tolist() == [0.0, 2.0, -2.0]
    assert losses.denormalize(torch.tensor([0.0, 2.0, -2.0]), mean, std).tolist() == values.tolist()


# ---- filters and policy loss ----


def test_advantages_by_hand():
    q, v = torch.tensor([1.0, -2.0], requires_grad=True), torch.tensor([0.5, 1.0], requires_grad=True)
    advantage = losses.advantages(q, v)
    assert advantage.tolist() == [0.5, -3.0] and not advantage.requires_grad


def test_filters_by_hand():
    advantage = torch.tensor([-1.0, 0.0, 0.25, 0.5, 3.0])
    assert losses.filter_weights(advantage, "binary").tolist() == [0, 0, 1, 1, 1]
    assert losses.filter_weights(advantage, "binary", threshold=0.25).tolist() == [0, 0, 0, 1, 1]
    assert losses.filter_weights(advantage, "binary", threshold=-2.0).tolist() == [1] * 5
    assert losses.filter_weights(advantage, "none").tolist() == [1] * 5
    # exp(A / 0.5): e^-2, 1, e^0.5, e, e^6 = 403 clipped to 20.
    weights = losses.filter_weights(advantage, "exp", temperature=0.5, max_weight=20.0)
    assert_close(weights, torch.tensor([0.1353353, 1.0, 1.6487213, 2.7182818, 20.0]))
    with pytest.raises(ValueError, match="Unknown filter 'softmax'"):
        losses.filter_weights(advantage, "softmax")


@given(
    st.lists(st.one_of(st.floats(width=32, allow_nan=False), numbers), min_size=1),
    st.floats(1e-3, 10),
    st.floats(0.1, 100),
)
def test_exponential_weights_are_finite_and_clipped(values, temperature, max_weight):
    # Any float32 advantage, infinities and the largest ones included.
    advantage = torch.tensor(values)
    weights = losses.filter_weights(advantage, "exp", temperature=temperature, max_weight=max_weight)
    assert torch.isfinite(weights).all()
    assert (weights >= 0).all() and (weights <= max_weight * (1 + 1e-5)).all()
    order = advantage.argsort()
    assert (weights[order].diff() >= 0).all()


@pytest.mark.parametrize("kind", losses.FILTERS)
def test_weights_carry_no_gradient(kind):
    q = torch.tensor([1.0, -2.0], requires_grad=True)
    assert not losses.filter_weights(losses.advantages(q, torch.zeros(2)), kind).requires_grad


def test_policy_loss_by_hand():
    # Four tokens, two of them kept, one with weight 2: (log 2 + 2 log 4) / 4 = 5 log 2 / 4.
    log_probs = torch.tensor([0.5, 0.1, 0.25, 0.9]).log().requires_grad_()
    weights = torch.tensor([1.0, 0.0, 2.0, 0.0])
    loss = losses.policy_loss(log_probs, weights, 4)
    assert_close(loss, torch.tensor(1.25 * math.log(2)))
    loss.backward()
    assert log_probs.grad.tolist() == [-0.25, 0.0, -0.5, 0.0]


def test_policy_loss_counts_dropped_tokens():
    log_probs = torch.tensor([-1.0, -3.0])
    # Were the dropped token left out of the denominator, the loss would stay at 1.
    assert losses.policy_loss(log_probs, torch.tensor([1.0, 0.0]), 2).item() == 0.5
    assert losses.policy_loss(log_probs, torch.tensor([1.0, 1.0]), torch.tensor(2)).item() == 2.0
    # Micro-batches of one optimiser step share its count, so their losses add up to the whole batch's.
    parts = [losses.policy_loss(log_probs[i : i + 1], torch.ones(1), 2).item() for i in range(2)]
    assert sum(parts) == 2.0


@pytest.mark.parametrize(("trace", "share"), [("none", 0.05), ("tree_backup", 1.0)])
def test_how_much_of_a_better_action_reaches_the_prompt(trace, share):
    """Five neutral tokens, then an action that is worth 0 or 1, half of the data each; V before it is the better one.

    Without a trace the return runs through the data's own action, and all but 1 - token_lambda of the improvement is
    lost on the way to the prompt; with tree-backup and a policy that takes the better action, none is.
    """
    neutral, token_lambda = 5, 0.95
    values = torch.zeros(neutral + 1)  # V before each token; the last one decides
    log_probs = torch.zeros(2, neutral + 1)
    log_probs[0, -1] = -torch.inf  # the policy never takes the worse action
    lambdas = torch.full((2, neutral + 1), token_lambda)
    coefficients = losses.trace_coefficients(log_probs, None, trace)
    if coefficients is not None:
        lambdas = lambdas * coefficients.roll(-1, dims=1)
    discounts = torch.ones(2, neutral + 1)
    discounts[:, -1] = 0.0
    rewards = torch.zeros(2, neutral + 1)
    rewards[1, -1] = 1.0
    for _ in range(200):
        following = values.roll(-1).expand(2, -1)
        returns = losses.token_returns(
            rewards, following, discounts, lambdas, torch.ones(2, neutral + 1, dtype=torch.bool)
        )
        values = returns.mean(0)  # Q of a neutral token, and so V before it: the mean over the data
        values[-1] = returns[:, -1].max()  # the expectile at its limit
    assert_close(values[0], torch.tensor(0.5 + share * 0.5))
