# SPDX-License-Identifier: Apache-2.0
"""Critic heads against explicit computations, the running normalisation, and the target copy."""

import dataclasses

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.testing import assert_close

from vlmq_trl.critic import Critic, CriticConfig, EnsembleHead
from vlmq_trl.losses import denormalize

D, V, N, R, H = 6, 11, 3, 4, 5  # hidden size, vocabulary, critics, rank, width of a scalar head


def make(critic_type="scalar", **changes):
    """A critic whose online and target heads differ and whose biases are not zero."""
    config = CriticConfig(
        **{
            "critic_type": critic_type,
            "num_critics": N,
            "critic_hidden_size": H,
            "critic_rank": R,
            "hidden_size": D,
            "vocab_size": V,
            **changes,
        }
    )
    critic = Critic(config)
    with torch.no_grad():
        for p in critic.parameters():
            p.copy_(torch.randn_like(p))
    return critic


def outputs(critic):
    """Every output of both copies of the heads, in reward units."""
    generator = torch.Generator().manual_seed(1)
    states = torch.randn(7, D, generator=generator)
    tokens = torch.randint(V, (7,), generator=generator)
    probabilities = torch.randn(7, V, generator=generator).softmax(-1)
    values = []
    for heads in (critic.online, critic.target):
        if critic.config.critic_type == "scalar":
            values += [heads.q(states), heads.v(states)]
        else:
            features = heads.features(states)
            values += [heads.taken(features, tokens), heads.expected(features, probabilities)]
    return torch.stack([denormalize(value.detach(), critic.target_mean, critic.target_std) for value in values])


# ---- heads ----


def test_scalar_heads_against_one_network_each():
    head = make().online.q
    x = torch.randn(2, 7, D)
    out = head(x)
    assert out.shape == (2, 7, N) and out.dtype == torch.float32
    for n in range(N):
        own = slice(n * H, (n + 1) * H)
        h = torch.nn.functional.silu(x @ head.hidden.weight[own].T + head.hidden.bias[own])
        assert_close(out[..., n], h @ head.weight[n] + head.bias[n])


def test_linear_scalar_heads():
    head = make(critic_hidden_size=0).online.v
    assert head.hidden is None
    x = torch.randn(7, D)
    assert_close(head(x), torch.stack([x @ head.weight[n] + head.bias[n] for n in range(N)], -1))


@pytest.mark.parametrize("hidden_size", [0, H])
def test_heads_of_an_ensemble_are_independent(hidden_size):
    head = EnsembleHead(D, hidden_size, N)
    head(torch.randn(7, D))[:, 1].sum().backward()
    others = [n for n in range(N) if n != 1]
    assert head.weight.grad[1].abs().min() > 0 and not head.weight.grad[others].any()
    assert head.bias.grad.tolist() == [0.0, 7.0, 0.0]
    if hidden_size:
        grad = head.hidden.weight.grad.unflatten(0, (N, H))
        assert grad[1].any() and not grad[others].any()


def test_heads_differ_and_start_near_zero():
    head = EnsembleHead(64, 64, 4)
    out = head(torch.randn(256, 64)).detach()
    assert out.abs().mean() < 0.2 and (out.std(0) > 0.01).all()
    assert (torch.corrcoef(out.T) - torch.eye(4)).abs().max() < 0.9


def test_vocab_heads_against_the_dense_row():
    heads = make("vocab").online
    states, tokens = torch.randn(7, D), torch.randint(V, (7,))
    features = heads.features(states)
    assert features.shape == (7, N, R)
    # Q_n(s, a) = sum_r up[n][a, r] * down(s)[n, r] + bias[n], down's rows being critic 0's R, then critic 1's, ...
    down = heads.down(states)
    q = torch.zeros(7, N, V)
    for n in range(N):
        for a in range(V):
            q[:, n, a] = (down[:, n * R : (n + 1) * R] * heads.up[n][a]).sum(-1) + heads.bias[n]
    taken = heads.taken(features, tokens)
    assert taken.shape == (7, N)
    assert_close(taken, torch.stack([q[i, :, tokens[i]] for i in range(7)]))
    probabilities = torch.randn(7, V).softmax(-1)
    expected = heads.expected(features, probabilities)
    assert expected.shape == (7, N)
    assert_close(expected, (q * probabilities[:, None]).sum(-1))


def test_vocab_heads_are_small():
    # 150,000 tokens at rank 64 for 2 critics: 19 M numbers, where a dense head on 2048 would take 614 M.
    with torch.device("meta"):
        critic = Critic(CriticConfig("vocab", hidden_size=2048, vocab_size=150_000))
    online = sum(p.numel() for p in critic.online.parameters())
    assert online == 2 * 64 * 2048 + 2 * 64 + 2 * 150_000 * 64 + 2


# ---- normalisation ----


@pytest.mark.parametrize("critic_type", ["scalar", "vocab"])
@given(
    moments=st.lists(st.tuples(st.floats(-5, 5), st.floats(0.1, 5)), min_size=1, max_size=4),
)
def test_moving_the_moments_leaves_the_values(critic_type, moments):
    torch.manual_seed(0)
    critic = make(critic_type)
    before = outputs(critic)
    for mean, std in moments:
        critic.set_moments(torch.tensor(mean), torch.tensor(std**2))
        assert_close(critic.target_mean, torch.tensor(mean))
        assert_close(critic.target_std, torch.tensor(std))
        assert_close(outputs(critic), before, atol=1e-5 * float(before.abs().max()), rtol=1e-5)


@pytest.mark.parametrize("critic_type", ["scalar", "vocab"])
@pytest.mark.parametrize("hidden_size", [0, H])
def test_the_heads_own_outputs_do_move(critic_type, hidden_size):
    # Mean 0 -> 3, std 1 -> 2: an output x stood for x, and (x - 3) / 2 stands for it now.
    critic = make(critic_type, critic_hidden_size=hidden_size)
    before = outputs(critic)
    critic.set_moments(torch.tensor(3.0), torch.tensor(4.0))
    assert critic.target_std == 2
    now = (outputs(critic) - 3) / 2
    assert_close(now, (before - 3) / 2)
    assert (now - before).abs().max() > 0.1


def test_constant_targets_keep_a_positive_deviation():
    critic = make()
    before = outputs(critic)
    critic.set_moments(torch.tensor(2.0), torch.tensor(0.0))
    assert critic.target_std.item() == pytest.approx(Critic.MIN_STD)
    after = outputs(critic)
    assert torch.isfinite(after).all()
    assert_close(after, before, atol=1e-5, rtol=1e-5)


def test_update_of_moments_by_hand():
    critic = make()
    assert (critic.target_mean, critic.target_variance) == (0, 1)
    before = outputs(critic)
    # Targets 1, 2, 3, mean 0, rate 0.5: mean 0 + 0.5 * (6 / 3 - 0) = 1; second moment 1 + 0.5 * (14 / 3 - 1) = 17 / 6;
    # variance 17 / 6 - 1 = 11 / 6.
    critic.update_moments(torch.tensor(6.0), torch.tensor(14.0), torch.tensor(3.0), rate=0.5)
    assert critic.target_mean.item() == pytest.approx(1)
    assert critic.target_variance.item() == pytest.approx(11 / 6)
    assert critic.target_std.item() == pytest.approx((11 / 6) ** 0.5)
    assert_close(outputs(critic), before, atol=1e-5, rtol=1e-5)
    # Rate 1 takes the batch's own moments: targets 2, 6 are 1, 5 above the mean.
    critic.update_moments(torch.tensor(6.0), torch.tensor(26.0), torch.tensor(2.0), rate=1.0)
    assert critic.target_mean.item() == pytest.approx(4) and critic.target_std.item() == pytest.approx(2)


def test_an_empty_batch_moves_nothing():
    critic = make()
    critic.set_moments(torch.tensor(2.0), torch.tensor(1.0))
    before = {k: v.clone() for k, v in critic.state_dict().items()}
    zero = torch.tensor(0.0)
    critic.update_moments(zero, zero, zero, rate=0.5)
    assert all(torch.equal(before[k], v) for k, v in critic.state_dict().items())


def test_initial_moments_leave_the_heads():
    critic = make()
    before = {k: v.clone() for k, v in critic.named_parameters()}
    critic.initialize_moments(-1.5, 2.0)
    assert critic.target_mean == -1.5 and critic.target_std == 2
    assert all(torch.equal(before[k], v) for k, v in critic.named_parameters())
    for mean, std in ((1e4, 0.5), (1e-7, 2e-6)):
        critic.initialize_moments(mean, std)
        assert critic.min_std.item() == pytest.approx(Critic.MIN_STD * std)
        assert critic.target_std.item() == pytest.approx(std)
    for mean, std, scale in ((0.0, 0.0, 1.0), (-3.0, 0.0, 3.0), (5.0, 1e-8, 5.0)):  # all equal: their own size
        critic.initialize_moments(mean, std)
        assert critic.target_std.item() == pytest.approx(scale)


def update(critic, targets, rate=0.01):
    delta = targets - critic.target_mean
    critic.update_moments(delta.sum(), delta.square().sum(), torch.tensor(float(len(targets))), rate)


@pytest.mark.parametrize(("mean", "scale"), [(0.0, 1.0), (-3.0, 3.0)])
@pytest.mark.parametrize("noise", [0.0, 1e-7, 0.05])
@pytest.mark.parametrize("success", [1.0, 0.01])
def test_equal_returns_keep_their_size_as_deviation_until_one_differs(mean, scale, noise, success):
    """However long: the first success meets a normaliser of its own order, and then any scale is normalised."""
    critic = make()
    critic.initialize_moments(mean, 0.0)
    generator = torch.Generator().manual_seed(0)
    # The critic's own values, which bootstrapped targets hold, go to the mean as it learns.
    for step in range(3000):
        update(critic, mean + scale * noise * 0.998**step * torch.randn(40, generator=generator))
        assert critic.target_std.item() == pytest.approx(scale)
    before = outputs(critic)
    targets = torch.full((40,), mean)
    targets[:5] += scale * success
    update(critic, targets)
    assert critic.target_std.item() == pytest.approx(scale, rel=0.01)
    assert_close(outputs(critic), before, atol=1e-4, rtol=1e-4)
    for _ in range(3000):
        update(critic, targets)
    assert critic.target_std.item() == pytest.approx(float(targets.std(correction=0)), rel=1e-2)


@given(offset=st.sampled_from([0.0, 1e3, -1e5]), scale=st.sampled_from([1e-5, 1.0, 1e4]), seed=st.integers(0, 99))
def test_moments_do_not_depend_on_the_rewards_offset_or_scale(offset, scale, seed):
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(20, 8, generator=generator)
    plain, other = make(), make()
    plain.initialize_moments(0.0, 1.0)
    other.initialize_moments(offset * scale, scale)
    for row in rows:
        for critic, targets in ((plain, row), (other, (row.double() + offset) * scale)):
            delta = (targets - critic.target_mean).float()
            critic.update_moments(delta.sum(), delta.square().sum(), torch.tensor(8.0), rate=0.1)
    assert_close(other.target_std / scale, plain.target_std, rtol=2e-2 if offset else 1e-5, atol=0)
    assert_close(other.target_mean / scale - offset, plain.target_mean, atol=2e-2 if offset else 1e-5, rtol=1e-5)


@pytest.mark.parametrize("critic_type", ["scalar", "vocab"])
def test_a_critic_stays_float32(critic_type):
    critic = make(critic_type)
    before = {k: v.clone() for k, v in critic.state_dict().items()}
    around = torch.nn.ModuleList([critic, torch.nn.Linear(2, 2)]).to(torch.bfloat16).half()
    assert around[1].weight.dtype == torch.float16
    for k, v in critic.state_dict().items():
        assert v.dtype == torch.float32 and torch.equal(v, before[k])
    assert next(critic.to("meta").parameters()).device.type == "meta"


# ---- target copy ----


@pytest.mark.parametrize("critic_type", ["scalar", "vocab"])
def test_the_target_starts_as_a_copy(critic_type):
    critic = Critic(CriticConfig(critic_type, hidden_size=D, vocab_size=V))
    pairs = list(zip(critic.online.parameters(), critic.target.buffers(), strict=True))
    assert pairs and all(torch.equal(o, t) and o.data_ptr() != t.data_ptr() for o, t in pairs)


@pytest.mark.parametrize("critic_type", ["scalar", "vocab"])
def test_polyak_update_is_exact(critic_type):
    # 1 + 0.25 * (3 - 1) = 1.5, then 1.5 + 0.25 * 1.5 = 1.875: no rounding in either.
    critic = make(critic_type)
    with torch.no_grad():
        for o, t in zip(critic.online.parameters(), critic.target.buffers(), strict=True):
            o.fill_(3)
            t.fill_(1)
    for expected in (1.5, 1.875):
        critic.update_target(0.25)
        assert all((t == expected).all() for t in critic.target.buffers())
        assert all((o == 3).all() for o in critic.online.parameters())
    critic.update_target(1.0)
    assert all((t == 3).all() for t in critic.target.buffers())


def test_polyak_update_moves_each_parameter_towards_its_own():
    critic = make()
    online = {k: v.detach().clone() for k, v in critic.online.named_parameters()}
    target = {k: v.clone() for k, v in critic.target.named_buffers()}
    critic.update_target(0.1)
    for k, v in critic.target.named_buffers():
        assert_close(v, 0.9 * target[k] + 0.1 * online[k])
        assert torch.equal(online[k], critic.online.get_parameter(k))


@pytest.mark.parametrize("critic_type", ["scalar", "vocab"])
def test_the_target_receives_no_gradient(critic_type):
    critic = make(critic_type).train()
    states = torch.randn(7, D, requires_grad=True)
    for heads in (critic.online, critic.target):
        if critic_type == "scalar":
            (heads.q(states) + heads.v(states)).sum().backward()
        else:
            features = heads.features(states)
            (heads.taken(features, torch.arange(7)) + heads.expected(features, torch.ones(7, V))).sum().backward()
    assert states.grad.any()
    assert all(p.grad is not None and p.grad.any() for p in critic.online.parameters())
    assert not any(p.requires_grad or p.grad is not None for p in critic.target.buffers())
    critic.update_target(0.5)
    assert not any(p.requires_grad for p in critic.target.buffers())


def test_what_is_saved():
    names = set(make().state_dict())
    assert {"target_mean", "target_variance", "min_std", "online.q.weight", "target.v.hidden.bias"} <= names
    assert len(names) == 3 + 2 * 8


# ---- configuration ----


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"critic_type": "token"}, "`critic_type` is 'token'; choose one of"),
        ({"num_critics": 0}, "`num_critics` is 0; a critic needs at least one head"),
        ({"critic_hidden_size": -1}, "`critic_hidden_size` is -1; 0 makes linear heads"),
        ({"critic_rank": 0}, "`critic_rank` is 0; it must be at least 1"),
    ],
)
def test_configurations_refused(change, message):
    with pytest.raises(ValueError, match=message):
        CriticConfig(**change)


@pytest.mark.parametrize("config", [CriticConfig(), CriticConfig("vocab", hidden_size=D)])
def test_a_critic_needs_the_backbones_sizes(config):
    with pytest.raises(ValueError, match="needs the backbone's `hidden_size`, and `vocab_size`"):
        Critic(config)


def test_configuration_round_trip():
    config = CriticConfig("vocab", 3, 0, 8, 16, 32)
    assert CriticConfig(**config.to_dict()) == config
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.num_critics = 1
