# SPDX-License-Identifier: Apache-2.0
"""Critic heads on a backbone's last hidden states: an ensemble, its Polyak-averaged target copy, and the running
normalisation of the targets.

Two kinds (`CriticConfig.critic_type`):

- `"scalar"`: Q(s_t, a_t) from the hidden state *after* a_t is consumed, V(s_t) from the one before it. No unseen
  action is ever queried.
- `"vocab"`: Q(s_t, .) over the vocabulary, factorised hidden -> rank -> vocabulary, so that a vocabulary of 150,000
  costs megabytes; V(s_t) = sum_a pi(a|s_t) Q(s_t, a).

Heads speak in units of the normalised targets: (G - mean) / std. When the running mean and standard deviation move,
the last layers are rescaled so that the values they stand for stay put (PopArt, arXiv 1602.07714, section 2.2).

Axes: A action tokens, D hidden size, N critics, R rank, V vocabulary. Everything is float32, whatever the backbone is.
DeepSpeed may keep the online heads in half precision, beside float32 copies of its own; they still compute in float32.
"""

import copy
import dataclasses
import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

CRITIC_TYPES = ("scalar", "vocab")


@dataclass(frozen=True)
class CriticConfig:
    """Shape of a critic; saved as `critic_config.json`.

    Args:
        critic_type: `"scalar"` or `"vocab"`.
        num_critics: N, heads of the ensemble.
        critic_hidden_size: width of a hidden layer in scalar heads; 0 makes them linear.
        critic_rank: R, inner size of the vocabulary-wide critic.
        hidden_size: D of the backbone; filled in from the model.
        vocab_size: V of the backbone; filled in from the model.
    """

    critic_type: str = "scalar"
    num_critics: int = 2
    critic_hidden_size: int = 128
    critic_rank: int = 64
    hidden_size: int | None = None
    vocab_size: int | None = None

    def __post_init__(self):
        if self.critic_type not in CRITIC_TYPES:
            raise ValueError(f"`critic_type` is {self.critic_type!r}; choose one of {CRITIC_TYPES}.")
        if self.num_critics < 1:
            raise ValueError(f"`num_critics` is {self.num_critics}; a critic needs at least one head.")
        if self.critic_hidden_size < 0:
            raise ValueError(f"`critic_hidden_size` is {self.critic_hidden_size}; 0 makes linear heads, no less.")
        if self.critic_rank < 1:
            raise ValueError(f"`critic_rank` is {self.critic_rank}; it must be at least 1.")

    def to_dict(self) -> dict:
        return dataclasses.asdict(self)


class Float32Linear(nn.Linear):
    """A linear layer that computes in float32, whatever its weights are."""

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.weight.float(), self.bias.float())


class EnsembleHead(nn.Module):
    """N independent scalar heads: [..., D] -> [..., N]; linear, or with one SiLU hidden layer."""

    def __init__(self, input_size: int, hidden_size: int, num_heads: int):
        super().__init__()
        self.hidden = Float32Linear(input_size, num_heads * hidden_size) if hidden_size else None
        width = hidden_size or input_size
        self.weight = nn.Parameter(torch.empty(num_heads, width))
        self.bias = nn.Parameter(torch.zeros(num_heads))
        # Small, so that values start near the targets' mean and advantages near zero.
        nn.init.normal_(self.weight, std=0.1 / math.sqrt(width))

    def forward(self, x: Tensor) -> Tensor:
        if self.hidden is None:
            return x @ self.weight.float().T + self.bias.float()
        h = nn.functional.silu(self.hidden(x)).unflatten(-1, self.weight.shape)
        return (h * self.weight.float()).sum(-1) + self.bias.float()

    @torch.no_grad()
    def rescale_(self, scale: Tensor, shift: Tensor) -> None:
        """Makes the output `scale * output + shift`, in place."""
        self.weight.mul_(scale)
        self.bias.mul_(scale).add_(shift)


class ScalarHeads(nn.Module):
    """Q on the state after the action, V on the state before it."""

    def __init__(self, config: CriticConfig):
        super().__init__()
        assert config.hidden_size is not None
        self.q = EnsembleHead(config.hidden_size, config.critic_hidden_size, config.num_critics)
        self.v = EnsembleHead(config.hidden_size, config.critic_hidden_size, config.num_critics)

    def read_directly(self) -> list[nn.Parameter]:
        """No weight: `q` and `v` are called."""
        return []

    def rescale_(self, scale: Tensor, shift: Tensor) -> None:
        self.q.rescale_(scale, shift)
        self.v.rescale_(scale, shift)


class VocabHeads(nn.Module):
    """Q rows over the vocabulary, factorised: Q_n(s, a) = up[n][a] . down_n(s) + bias[n].

    `up` holds one [V, R] matrix a critic: slices of a single tensor would each cost a gradient of the whole.
    """

    def __init__(self, config: CriticConfig):
        super().__init__()
        assert config.hidden_size is not None and config.vocab_size is not None
        self.down = Float32Linear(config.hidden_size, config.num_critics * config.critic_rank)
        size, std = (config.vocab_size, config.critic_rank), 0.1 / math.sqrt(config.critic_rank)
        self.up = nn.ParameterList(nn.init.normal_(torch.empty(size), std=std) for _ in range(config.num_critics))
        self.bias = nn.Parameter(torch.zeros(config.num_critics))

    def read_directly(self) -> list[nn.Parameter]:
        """The weights that `taken` and `expected` read outside of their modules' forward."""
        return [*self.up, self.bias]

    def features(self, hidden: Tensor) -> Tensor:
        """[A, D] -> [A, N, R]."""
        return self.down(hidden).unflatten(-1, (len(self.up), -1))

    def taken(self, features: Tensor, tokens: Tensor) -> Tensor:
        """Q of the taken tokens: features [A, N, R], tokens [A] -> [A, N]."""
        rows = torch.stack([nn.functional.embedding(tokens, up) for up in self.up], dim=1)
        return (features * rows.float()).sum(-1) + self.bias.float()

    def expected(self, features: Tensor, probabilities: Tensor) -> Tensor:
        """sum_a pi(a|s) Q(s, a): features [A, N, R], probabilities [A, V] -> [A, N], with no [A, N, V] tensor."""
        rows = torch.stack([probabilities @ up.float() for up in self.up], dim=1)
        return (features * rows).sum(-1) + self.bias.float()

    @torch.no_grad()
    def rescale_(self, scale: Tensor, shift: Tensor) -> None:
        for up in self.up:
            up.mul_(scale)
        self.bias.mul_(scale).add_(shift)


class Critic(nn.Module):
    """Online heads, target heads, and the targets' running mean and standard deviation.

    Attributes:
        online: heads that are trained.
        target: their Polyak-averaged copy. Its weights are buffers: no optimiser, sharding or cast ever touches them
            (in half precision, so slow an average would stand still).
        target_mean, target_variance: running moments of the token returns, in reward units.
        min_std: floor of their standard deviation, in reward units; the deviation itself until returns have differed,
            which a variance below the floor's square says.
    """

    MIN_STD = 1e-4  # the floor, as a share of the deviation (or the mean) that the returns began with
    LARGEST = 1e18  # returns whose squares, and sums of them, float32 holds
    EQUAL = 1e-6  # returns whose deviation is a smaller share of their mean differ by rounding only
    NOISE = 0.1  # what fresh heads say in place of equal returns, as a share of the same
    SEEN = 5.0  # a batch whose deviation is as many times the running one has returns that differ

    target_mean: Tensor
    target_variance: Tensor
    min_std: Tensor

    def __init__(self, config: CriticConfig):
        super().__init__()
        if not config.hidden_size or (config.critic_type == "vocab" and not config.vocab_size):
            raise ValueError(
                "`CriticConfig` needs the backbone's `hidden_size`, and `vocab_size` for the vocab critic."
            )
        self.config = config
        self.online = ScalarHeads(config) if config.critic_type == "scalar" else VocabHeads(config)
        self.target = _with_buffers(copy.deepcopy(self.online))
        self.register_buffer("target_mean", torch.zeros(()))
        self.register_buffer("target_variance", torch.ones(()))
        self.register_buffer("min_std", torch.tensor(self.MIN_STD))

    def _apply(self, fn, recurse=True):
        """Moves to devices, but stays float32 where the model around it is cast."""

        def keep(x: Tensor) -> Tensor:
            moved = fn(x)
            return moved if moved.dtype == x.dtype else x.to(moved.device)

        return super()._apply(keep, recurse)

    @property
    def is_fresh(self) -> bool:
        """Whether the moments are still those of no data at all."""
        return bool(self.target_mean == 0) and bool(self.target_variance == 1)

    @property
    def target_std(self) -> Tensor:
        """Scalar standard deviation of the targets, at least `min_std`."""
        return self.target_variance.sqrt().maximum(self.min_std)

    @torch.no_grad()
    def set_moments(self, mean: Tensor, variance: Tensor) -> None:
        """Moves the running moments and rescales the last layers, so that denormalised values do not change."""
        old_mean, old_std = self.target_mean.clone(), self.target_std
        self.target_mean.copy_(mean)
        self.target_variance.copy_(variance)
        scale = old_std / self.target_std
        shift = (old_mean - self.target_mean) / self.target_std
        for heads in (self.online, self.target):
            heads.rescale_(scale, shift)

    @torch.no_grad()
    def initialize_moments(self, mean: float, std: float) -> None:
        """Sets the moments from known returns before training: the fresh heads' small outputs then mean `mean`.

        Returns that are all equal have no scale but their own size, or 1 where they are 0; it is the deviation until
        `update_moments` sees them differ. The variance begins at that of fresh heads, whose values targets hold too.

        Raises:
            ValueError: returns whose squares are too large for float32.
        """
        if not max(abs(mean), std) <= self.LARGEST:
            raise ValueError(
                f"The returns have a mean of {mean:.3g} and a standard deviation of {std:.3g}, too large for float32 "
                "arithmetic. Scale the rewards down."
            )
        if std > self.EQUAL * abs(mean):
            variance, floor = std**2, self.MIN_STD * std
        else:
            floor = abs(mean) or 1.0
            variance = (self.NOISE * floor) ** 2
        self.target_mean.fill_(mean)
        self.target_variance.fill_(variance)
        self.min_std.fill_(floor)

    @torch.no_grad()
    def update_moments(self, delta_sum: Tensor, delta_square_sum: Tensor, count: Tensor, rate: float) -> None:
        """Moves the running moments by `rate` in (0, 1] towards those of a batch of targets, if it has any.

        Args:
            delta_sum, delta_square_sum, count: scalars over the batch's targets, in reward units, each target less
                `target_mean`: sums of the targets themselves would drown a deviation that is small beside the mean.
        """
        rate_t = torch.where(count > 0, rate, 0.0)
        step = rate_t * delta_sum / count.clamp(min=1)
        spread = delta_square_sum / count.clamp(min=1)  # around the old mean
        variance = self.target_variance + rate_t * (spread - self.target_variance) - step.square()
        # While returns are equal, the variance is that of the critic's own values in the targets, from which a return
        # that differs stands out. The deviation then sets out from where it was held.
        floor = self.min_std.square()
        held = self.target_variance < floor
        seen = held & (spread > torch.minimum(self.SEEN**2 * self.target_variance, floor))
        variance = variance.maximum(torch.where(held, self.EQUAL**2 * floor, floor))
        self.set_moments(self.target_mean + step, torch.where(seen, floor, variance))
        self.min_std.mul_(torch.where(seen, self.MIN_STD, 1.0))

    @torch.no_grad()
    def update_target(self, tau: float) -> None:
        """target <- (1 - tau) * target + tau * online, parameter by parameter."""
        target = dict(self.target.named_buffers())
        online = {name: p.detach().float() for name, p in self.online.named_parameters()}
        torch._foreach_lerp_(list(target.values()), [online[name] for name in target], tau)


def _with_buffers(module: nn.Module) -> nn.Module:
    """The module, with buffers of the same names in place of its parameters."""
    for part in module.modules():
        for name, parameter in list(part.named_parameters(recurse=False)):
            delattr(part, name)
            part.register_buffer(name, parameter.detach())
    return module
