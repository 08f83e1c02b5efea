# SPDX-License-Identifier: Apache-2.0
"""`VLMQConfig`: TRL's `SFTConfig` and what VLM Q-Learning adds, in reading order."""

import math
import os
from dataclasses import dataclass, field, fields
from numbers import Integral, Real
from typing import Any

from trl import SFTConfig

from .critic import CRITIC_TYPES, CriticConfig
from .losses import ADVANTAGE_ESTIMATORS, FILTER_SCOPES, FILTERS, THOUGHT_FILTERS, TRACES


@dataclass
class VLMQConfig(SFTConfig):
    r"""
    Configuration of the [`VLMQTrainer`]. Everything that [`~trl.SFTConfig`] has keeps its meaning; the defaults that
    differ are listed at the end.

    Parameters:
        > Parameters that control the returns (arXiv 2505.03181, section 4)

        gamma (`float`, *optional*, defaults to `0.95`):
            Discount across turns.
        token_gamma (`float`, *optional*, defaults to `1.0`):
            Discount inside a turn.
        turn_lambda (`float`, *optional*, defaults to `0.0`):
            Lambda of the returns across turns: 0 bootstraps from the next turn's value, 1 uses the data's own return.
        token_lambda (`float`, *optional*, defaults to `0.95`):
            Lambda of the returns inside a turn. One-step targets (0) do not cross a long completion.
        bootstrap_truncated (`bool`, *optional*, defaults to `True`):
            Whether a truncated episode is worth what was seen after its last turn: it would have gone on. Set it to
            `False` where the limit belongs to the task, so that reaching it is to fail: a state in which every episode
            is cut off never has a turn of its own to learn a value from.
        segment_length (`int`, *optional*, defaults to `8`):
            Consecutive turns of an episode in one training sample. Longer segments need fewer bootstrap rows.
        off_policy_trace (`str`, *optional*, defaults to `"none"`):
            `"none"`, `"retrace"` (needs `behavior_logprobs`) or `"tree_backup"`; multiplies both lambdas.

        > Parameters that control the critic

        critic_type (`str`, *optional*, defaults to `"scalar"`):
            `"scalar"` (Q and V heads) or `"vocab"` (a Q row over the vocabulary, with a conservative term).
        num_critics (`int`, *optional*, defaults to `2`):
            Heads of the ensemble.
        critic_hidden_size (`int`, *optional*, defaults to `128`):
            Width of the scalar heads' hidden layer; 0 for linear heads.
        critic_rank (`int`, *optional*, defaults to `64`):
            Inner size of the vocabulary-wide critic.
        critic_coef (`float`, *optional*, defaults to `1.0`):
            Weight of the critic's loss. 0 switches the critic off; that needs `filter="none"`.
        critic_learning_rate (`float`, *optional*):
            Learning rate of the critic's heads; `learning_rate` when not given.
        value_expectile (`float`, *optional*, defaults to `0.8`):
            Expectile of the scalar critic's V. 0.5 evaluates the data's policy, above it the better actions (IQL).
        conservative_coef (`float`, *optional*, defaults to `0.1`):
            Weight of the vocabulary-wide critic's conservative term, within the critic's loss.
        critic_scope (`str`, *optional*, defaults to `"response"`):
            `"response"` teaches the critic every token; `"action"`, where the filter has that scope too or there is no
            filter, those from where the response comes to its action, and the turn's first, which a segment that ends
            there bootstraps from. A reading of the state, whose tokens all have the same return, is passed over; the
            turn before it bootstraps from its end, with `turn_lambda`. The sum is still divided by all tokens, so that
            a larger `critic_coef` belongs to it.
        target_tau (`float`, *optional*, defaults to `0.05`):
            Step of the target heads towards the online heads, each update.
        target_aggregation (`str`, *optional*, defaults to `"mean"`):
            `"mean"` or `"min"` over the ensemble in targets.
        target_norm_rate (`float`, *optional*, defaults to `0.01`):
            Step of the running mean and variance that normalise the targets, each update.

        > Parameters that control the filter

        filter (`str`, *optional*, defaults to `"binary"`):
            `"binary"` 1[A > threshold], `"exp"` clipped exp(A / temperature), `"none"` (plain SFT). Advantages are in
            units of the targets' standard deviation.
        advantage_estimator (`str`, *optional*, defaults to `"q"`):
            `"q"`: A = Q(s, a) - V(s), what the critic thinks of the action. `"return"`: A = G - V(s), what came of it
            in the data, where `turn_lambda` below 1 takes V of the next state for what came later (AWR, arXiv
            1910.00177). For actions that differ by a name alone, which Q may learn late to tell apart; where the
            environment has chance, it takes luck for skill.
        filter_threshold (`float`, *optional*, defaults to `0.0`):
            Threshold of the binary filter.
        filter_temperature (`float`, *optional*, defaults to `0.3`):
            Temperature of the exponential filter.
        filter_max_weight (`float`, *optional*, defaults to `20.0`):
            Largest weight of the exponential filter.
        filter_scope (`str`, *optional*, defaults to `"response"`):
            `"response"` filters every token, `"action"` those from where the response comes to its action; what stands
            before it, such as a reading of the state, is cloned whole. For data whose readings are right: a critic
            that knows little yet takes a reading that tells good news for a good one.
        critic_warmup_steps (`int`, *optional*, defaults to `0`):
            First updates during which every token is kept, while the critic learns.

        > Parameters that control the memory

        vision_cache_gb (`float`, *optional*, defaults to `0.0`):
            Main memory in GB, of each process, for the features of pictures that were seen: a picture goes through
            the vision tower once. All that comes before the language model must be frozen. 0: no cache.

        > Parameters that control the collection, for a trainer that has an `env`

        offline_steps (`int`, *optional*, defaults to `0`):
            First updates, which learn from the offline data alone; then rounds of collection and learning follow.
        turns_per_round (`int`, *optional*, defaults to `512`):
            Environment turns that a round collects; whole episodes, so that it may be a few more.
        updates_per_turn (`float`, *optional*, defaults to `0.2`):
            Updates after each collected turn: a round is followed by `turns_per_round * updates_per_turn` of them.
        max_env_turns (`int`, *optional*):
            Budget of environment turns; further updates learn from what there is. Without `max_steps`, training ends
            when the budget is spent and learned from.
        replay_warmup_turns (`int`, *optional*, defaults to `0`):
            Turns that the first round collects, where that is more than `turns_per_round`.
        online_fraction (`float`, *optional*, defaults to `0.75`):
            Share of each batch's turns that comes from the collected data, the rest from the offline data.
        online_thought_weight (`float`, *optional*, defaults to `1.0`):
            Factor, in [0, 1], of the policy loss on what stands before the action in collected turns (lambda of
            RL4VLM, arXiv 2405.10292); offline turns keep theirs. An agent that imitates what it said itself keeps its
            misreadings, and the next round has more of them: below 1 its readings stay what they were taught to be,
            and what it learns is what to do.
        online_thought_filter (`str`, *optional*, defaults to `"none"`):
            `"reference"` multiplies the same loss, token by token, by the probability that the model gave the token
            before training, as the trainer was given it (resuming does not change that). For a model that reads well
            to begin with: its misreadings, which it would have thought improbable then, are not imitated, and the
            others become surer. Costs another forward pass each update, without gradient, and a copy of the trained
            weights.
        online_fraction_start (`float`, *optional*):
            The share after `offline_steps`, from which it moves to `online_fraction`; constant when not given.
        online_fraction_steps (`int`, *optional*, defaults to `0`):
            Updates that it moves for, linearly.
        replay_dir (`str`, *optional*):
            Folder of the replay buffer, on a disk of this machine; `output_dir/replay` when not given.
        replay_capacity (`int`, *optional*):
            Collected turns that the buffer keeps, the newest; all when not given. Offline data is always kept.
        replay_prioritized_fraction (`float`, *optional*, defaults to `0.0`):
            After `offline_steps`, the share of a batch that is drawn by priority, max(G - V, 0), of the offline as of
            the collected turns: by how much better a turn went than the critic expected when it last saw it. The rest
            is drawn uniformly. For environments without chance, where what went well once can be had again.
        rollout_num_envs (`int`, *optional*, defaults to `16`):
            Environments that collect at once.
        rollout_temperature (`float`, *optional*, defaults to `1.0`):
            Sampling temperature of the collecting policy; above 0.
        rollout_action_temperature (`float`, *optional*):
            The same from where a response comes to its action, by the agent format; `rollout_temperature` when not
            given. Above it, what explores is the action, and the thoughts that lead to it stay whole. Where the
            environment lists its `legal_actions`, the action then is one of them.
        rollout_epsilon (`float`, *optional*, defaults to `0.0`):
            Share of the collected turns in which a uniformly random legal action takes the place of the model's own,
            and with it of all actions that are not legal. Needs an environment that lists its `legal_actions`.
        rollout_temperature_start (`float`, *optional*):
            Temperature of the first round, to explore more at first; constant when not given.
        rollout_action_temperature_start (`float`, *optional*):
            The same of `rollout_action_temperature`, which then must be given.
        rollout_epsilon_start (`float`, *optional*):
            The same of `rollout_epsilon`.
        rollout_repeat_fraction (`float`, *optional*, defaults to `0.0`):
            Share of the collected episodes whose environment is reset with the seed of an earlier one, drawn by how
            much less than the best return that one last had (after prioritized level replay, arXiv 2010.03934). For
            environments in which nothing that the agent cannot see hangs on the seed.
        rollout_search_fraction (`float`, *optional*, defaults to `0.0`):
            Share of the collected episodes that search, by a table of what the buffer's turns did where the agent said
            the same before its action, given the same prompt. What had the highest return of all, a success, when it
            was last taken is done again; else the legal actions of the highest optimistic value come into question,
            where what was never taken is worth as much as the best that was seen (R-max), and one of them is drawn
            from pi(a|s) / (1 + N(s, a))^2, N being how often it was taken there. For what is never found otherwise,
            several improbable actions deep, where the outcome is the agent's doing and not luck. Needs an environment
            that lists its `legal_actions`, and a format whose responses read the state aloud.
        rollout_annealing_turns (`int`, *optional*, defaults to `0`):
            Collected turns over which these move from their start, linearly, round by round.
        rollout_seed (`int`, *optional*, defaults to `10_000_000`):
            Seed of the first collected episode; the evaluation's must lie below it.
        rollout_workers (`bool`, *optional*, defaults to `False`):
            Give each environment, in evaluations too, a process of its own.
        env_timeout (`float`, *optional*):
            Seconds that an environment with a process of its own may take for a reset or a step; no limit when not
            given.
        max_env_failures (`int`, *optional*, defaults to `10`):
            Failures in a row that are borne, in evaluations too; one more stops the run with an error. A failing
            environment is made anew, its episode dropped and counted.
        async_collection (`bool`, *optional*, defaults to `False`):
            Collect the next round in a thread, with a copy of the policy, while the model learns from the last one.
        max_staleness (`int`, *optional*, defaults to `50`):
            Updates that the copy may be behind when it answers.

        > Parameters that control the evaluation

        eval_episodes (`int`, *optional*, defaults to `200`):
            Episodes that an evaluation plays.
        eval_num_envs (`int`, *optional*, defaults to `64`):
            Environments played at once.
        eval_seed (`int`, *optional*, defaults to `1_000_000`):
            Seed of an evaluation's first episode; keep it away from the training data's.
        eval_temperature (`float`, *optional*, defaults to `0.0`):
            Sampling temperature of the evaluation; 0 is greedy.
        max_completion_length (`int`, *optional*, defaults to `256`):
            Longest response in tokens, in evaluations and collection.
        legal_actions_only (`bool`, *optional*, defaults to `False`):
            Hold the model, in evaluations, in collection and as the saved agent, to the actions that the environment
            lists as legal in each turn: once a response has come to its action, other tokens have no chance.
        stop_at_success (`float`, *optional*):
            End training once two evaluations in a row reach this success rate; never when not given.
        record_episodes (`int`, *optional*, defaults to `0`):
            Episodes that each evaluation during training writes to `output_dir/episodes` as GIF and JSON lines.

    > [!NOTE]
    > Defaults that differ from [`~trl.SFTConfig`]:
    > - `max_length`: `None` instead of `1024`. A row that is too long is an error, since its end carries the reward.
    > - `metric_for_best_model`: `"success_rate"` instead of `None`; without an environment to play, as there.
    """

    # Returns
    gamma: float = field(default=0.95, metadata={"help": "Discount across turns."})
    token_gamma: float = field(default=1.0, metadata={"help": "Discount inside a turn."})
    turn_lambda: float = field(default=0.0, metadata={"help": "Lambda of the returns across turns."})
    token_lambda: float = field(default=0.95, metadata={"help": "Lambda of the returns inside a turn."})
    bootstrap_truncated: bool = field(
        default=True, metadata={"help": "Whether a truncated episode is worth what was seen after its last turn."}
    )
    segment_length: int = field(default=8, metadata={"help": "Consecutive turns of an episode in one sample."})
    off_policy_trace: str = field(
        default="none", metadata={"help": "Off-policy trace on the lambdas.", "choices": list(TRACES)}
    )

    # Critic
    critic_type: str = field(default="scalar", metadata={"help": "Kind of critic.", "choices": list(CRITIC_TYPES)})
    num_critics: int = field(default=2, metadata={"help": "Heads of the critic's ensemble."})
    critic_hidden_size: int = field(default=128, metadata={"help": "Hidden width of scalar heads; 0: linear."})
    critic_rank: int = field(default=64, metadata={"help": "Inner size of the vocabulary-wide critic."})
    critic_coef: float = field(default=1.0, metadata={"help": "Weight of the critic's loss; 0: no critic."})
    critic_learning_rate: float | None = field(
        default=None, metadata={"help": "Learning rate of the critic's heads; default: `learning_rate`."}
    )
    value_expectile: float = field(default=0.8, metadata={"help": "Expectile of the scalar critic's V."})
    conservative_coef: float = field(default=0.1, metadata={"help": "Weight of the vocab critic's conservative term."})
    critic_scope: str = field(
        default="response", metadata={"help": "Tokens that the critic learns.", "choices": list(FILTER_SCOPES)}
    )
    target_tau: float = field(default=0.05, metadata={"help": "Polyak step of the target heads, each update."})
    target_aggregation: str = field(
        default="mean", metadata={"help": "Over the ensemble, in targets.", "choices": ["mean", "min"]}
    )
    target_norm_rate: float = field(default=0.01, metadata={"help": "Step of the targets' running moments."})

    # Filter
    filter: str = field(default="binary", metadata={"help": "Token filter.", "choices": list(FILTERS)})
    advantage_estimator: str = field(
        default="q", metadata={"help": "What V is subtracted from.", "choices": list(ADVANTAGE_ESTIMATORS)}
    )
    filter_threshold: float = field(default=0.0, metadata={"help": "Threshold of the binary filter."})
    filter_temperature: float = field(default=0.3, metadata={"help": "Temperature of the exponential filter."})
    filter_max_weight: float = field(default=20.0, metadata={"help": "Largest weight of the exponential filter."})
    filter_scope: str = field(
        default="response", metadata={"help": "Tokens that are filtered.", "choices": list(FILTER_SCOPES)}
    )
    critic_warmup_steps: int = field(default=0, metadata={"help": "First updates that keep every token."})
    vision_cache_gb: float = field(
        default=0.0,
        metadata={"help": "Main memory in GB for features of pictures, of a frozen vision tower; 0: none."},
    )

    # Collection
    offline_steps: int = field(default=0, metadata={"help": "First updates, from the offline data alone."})
    turns_per_round: int = field(default=512, metadata={"help": "Environment turns that a round collects."})
    updates_per_turn: float = field(default=0.2, metadata={"help": "Updates after each collected turn."})
    max_env_turns: int | None = field(default=None, metadata={"help": "Budget of environment turns; None: no limit."})
    replay_warmup_turns: int = field(default=0, metadata={"help": "Turns of the first round, if more than others'."})
    online_fraction: float = field(default=0.75, metadata={"help": "Share of a batch that was collected online."})
    online_thought_weight: float = field(
        default=1.0, metadata={"help": "Factor of the loss on what stands before the action in collected turns."}
    )
    online_thought_filter: str = field(
        default="none", metadata={"help": "Token filter of that loss.", "choices": list(THOUGHT_FILTERS)}
    )
    online_fraction_start: float | None = field(
        default=None, metadata={"help": "`online_fraction` right after `offline_steps`; default: as later."}
    )
    online_fraction_steps: int = field(
        default=0, metadata={"help": "Updates over which `online_fraction_start` moves to `online_fraction`."}
    )
    replay_dir: str | None = field(
        default=None, metadata={"help": "Folder of the replay buffer; default: `output_dir/replay`."}
    )
    replay_capacity: int | None = field(default=None, metadata={"help": "Collected turns that are kept; None: all."})
    replay_prioritized_fraction: float = field(
        default=0.0,
        metadata={"help": "Share of a batch, offline and collected, that is drawn by priority, max(G - V, 0)."},
    )
    rollout_num_envs: int = field(default=16, metadata={"help": "Environments that collect at once."})
    rollout_temperature: float = field(default=1.0, metadata={"help": "Sampling temperature of the collection."})
    rollout_action_temperature: float | None = field(
        default=None, metadata={"help": "Temperature of the action's own tokens; default: `rollout_temperature`."}
    )
    rollout_epsilon: float = field(
        default=0.0, metadata={"help": "Share of the collected turns with a random legal action in place of its own."}
    )
    rollout_temperature_start: float | None = field(
        default=None, metadata={"help": "`rollout_temperature` of the first round; default: as later."}
    )
    rollout_action_temperature_start: float | None = field(
        default=None, metadata={"help": "`rollout_action_temperature` of the first round; default: as later."}
    )
    rollout_epsilon_start: float | None = field(
        default=None, metadata={"help": "`rollout_epsilon` of the first round; default: as later."}
    )
    rollout_repeat_fraction: float = field(
        default=0.0, metadata={"help": "Share of the collected episodes that repeat an earlier one that went badly."}
    )
    rollout_search_fraction: float = field(
        default=0.0, metadata={"help": "Share of the collected episodes that search where no best is known."}
    )
    rollout_annealing_turns: int = field(
        default=0, metadata={"help": "Collected turns from the first round's temperatures and epsilon to the others."}
    )
    rollout_seed: int = field(default=10_000_000, metadata={"help": "Seed of the first collected episode."})
    rollout_workers: bool = field(default=False, metadata={"help": "A process of its own for each environment."})
    env_timeout: float | None = field(
        default=None, metadata={"help": "Seconds that an environment in a process of its own may take; None: any."}
    )
    max_env_failures: int = field(default=10, metadata={"help": "Environment failures in a row that are borne."})
    async_collection: bool = field(default=False, metadata={"help": "Collect while the model learns."})
    max_staleness: int = field(default=50, metadata={"help": "Updates that an asynchronous policy may be behind."})

    # Evaluation
    eval_episodes: int = field(default=200, metadata={"help": "Episodes that an evaluation plays."})
    eval_num_envs: int = field(default=64, metadata={"help": "Environments played at once in an evaluation."})
    eval_seed: int = field(default=1_000_000, metadata={"help": "Seed of an evaluation's first episode."})
    eval_temperature: float = field(default=0.0, metadata={"help": "Sampling temperature of evaluations; 0: greedy."})
    max_completion_length: int = field(default=256, metadata={"help": "Longest response in tokens."})
    legal_actions_only: bool = field(
        default=False, metadata={"help": "Hold the model to the actions that the environment lists as legal."}
    )

    stop_at_success: float | None = field(
        default=None, metadata={"help": "End once two evaluations in a row reach this success; None: never."}
    )
    record_episodes: int = field(default=0, metadata={"help": "Episodes of each evaluation to write as GIF."})

    # Defaults that differ from SFTConfig
    max_length: int | None = field(
        default=None, metadata={"help": "Longest row in tokens; a longer row is an error. None: no limit."}
    )
    metric_for_best_model: str | None = field(
        default="success_rate", metadata={"help": "Metric that names the best checkpoint."}
    )

    def __post_init__(self):
        super().__post_init__()
        if self.replay_dir is not None:
            self.replay_dir = os.path.expanduser(self.replay_dir)  # as `output_dir` is there
        for name, kind in VLMQConfig.__annotations__.items():
            value = getattr(self, name)
            if kind is int or (kind == int | None and value is not None):
                whole = isinstance(value, Integral) and not isinstance(value, bool)
                self._require(whole, name, "must be an integer")
            elif kind is float or (kind == float | None and value is not None):
                number = isinstance(value, Real) and not isinstance(value, bool) and math.isfinite(value)
                self._require(number, name, "must be a finite number")
            elif kind is bool:
                self._require(isinstance(value, bool), name, "must be True or False")
        for name in ("gamma", "token_gamma", "turn_lambda", "token_lambda"):
            self._require(0 <= getattr(self, name) <= 1, name, "must lie in [0, 1]")
        for name in (
            "segment_length",
            "eval_episodes",
            "eval_num_envs",
            "max_completion_length",
            "turns_per_round",
            "max_env_turns",
            "replay_capacity",
            "rollout_num_envs",
            "max_staleness",
        ):
            value = getattr(self, name)
            self._require(value is None or value >= 1, name, "must be at least 1")
        for name in (
            "critic_coef",
            "conservative_coef",
            "critic_warmup_steps",
            "vision_cache_gb",
            "eval_temperature",
            "eval_seed",
            "offline_steps",
            "replay_warmup_turns",
            "online_fraction_steps",
            "rollout_annealing_turns",
            "rollout_seed",
            "max_env_failures",
            "record_episodes",
        ):
            self._require(getattr(self, name) >= 0, name, "must not be negative")
        for name in (
            "filter_temperature",
            "filter_max_weight",
            "updates_per_turn",
            "rollout_temperature",
            "rollout_temperature_start",
            "rollout_action_temperature",
            "rollout_action_temperature_start",
            "env_timeout",
        ):
            value = getattr(self, name)
            self._require(value is None or value > 0, name, "must be positive")
        for name in (
            "online_fraction",
            "online_fraction_start",
            "replay_prioritized_fraction",
            "rollout_epsilon",
            "rollout_epsilon_start",
            "rollout_repeat_fraction",
            "online_thought_weight",
            "rollout_search_fraction",
        ):
            value = getattr(self, name)
            self._require(value is None or 0 <= value <= 1, name, "must lie in [0, 1]")
        for name in ("target_tau", "target_norm_rate", "stop_at_success"):
            value = getattr(self, name)
            self._require(value is None or 0 < value <= 1, name, "must lie in (0, 1]")
        starts = [f"rollout_{name}_start" for name in ("temperature", "action_temperature", "epsilon")]
        if any(getattr(self, name) is not None for name in starts) != bool(self.rollout_annealing_turns):
            raise ValueError(
                f"`rollout_annealing_turns={self.rollout_annealing_turns}` and one of {', '.join(starts)} go "
                "together: from where, and over how many collected turns."
            )
        if (self.online_fraction_start is not None) != bool(self.online_fraction_steps):
            raise ValueError(
                f"`online_fraction_start={self.online_fraction_start}` and `online_fraction_steps="
                f"{self.online_fraction_steps}` go together: from where, and over how many updates."
            )
        if self.rollout_action_temperature_start is not None and self.rollout_action_temperature is None:
            raise ValueError(
                f"`rollout_action_temperature_start={self.rollout_action_temperature_start}` needs to know where it "
                "moves to: set `rollout_action_temperature`."
            )
        if self.env_timeout is not None and not self.rollout_workers:
            raise ValueError(
                f"`env_timeout={self.env_timeout}` has no effect on an environment in this process, which cannot be "
                "interrupted. Set `rollout_workers=True`."
            )
        self._require(0 < self.value_expectile < 1, "value_expectile", "must lie strictly between 0 and 1")
        self._require(self.filter in FILTERS, "filter", f"must be one of {FILTERS}")
        self._require(self.filter_scope in FILTER_SCOPES, "filter_scope", f"must be one of {FILTER_SCOPES}")
        known = self.advantage_estimator in ADVANTAGE_ESTIMATORS
        self._require(known, "advantage_estimator", f"must be one of {ADVANTAGE_ESTIMATORS}")
        self._require(self.critic_scope in FILTER_SCOPES, "critic_scope", f"must be one of {FILTER_SCOPES}")
        if self.critic_scope == "action" and self.filter != "none" and self.filter_scope != "action":
            raise ValueError(
                "`critic_scope='action'` leaves the critic without an opinion on what stands before the action, which "
                "`filter_scope='response'` would filter by. Set `filter_scope='action'` too."
            )
        self._require(
            self.online_thought_filter in THOUGHT_FILTERS, "online_thought_filter", f"must be one of {THOUGHT_FILTERS}"
        )
        self._require(self.off_policy_trace in TRACES, "off_policy_trace", f"must be one of {TRACES}")
        self._require(self.target_aggregation in ("mean", "min"), "target_aggregation", "must be 'mean' or 'min'")
        self._require(
            self.critic_learning_rate is None or self.critic_learning_rate > 0,
            "critic_learning_rate",
            "must be positive",
        )
        self.critic_config()  # Checks the critic's own fields.
        if self.critic_coef == 0 and self.filter != "none":
            raise ValueError(
                f"`critic_coef=0` leaves the critic untrained, so `filter={self.filter!r}` would filter by noise. Set "
                "`filter='none'` for plain SFT, or a positive `critic_coef`."
            )
        if self.critic_coef == 0 and self.replay_prioritized_fraction:
            raise ValueError(
                f"`replay_prioritized_fraction={self.replay_prioritized_fraction}` needs the critic: the priority is "
                "what surprises it. Set it to 0, or give a positive `critic_coef`."
            )
        if self.token_gamma < 1 and self.replay_prioritized_fraction:
            raise ValueError(
                f"`token_gamma={self.token_gamma}` does not go with "
                f"`replay_prioritized_fraction={self.replay_prioritized_fraction}`: priorities compare the critic "
                "with returns that are discounted by turns alone. Leave one of them at its default."
            )
        for name, value in (("packing", False), ("padding_free", False), ("assistant_only_loss", False)):
            if getattr(self, name) != value:
                raise ValueError(f"`{name}=True` is not supported: each row is one turn, whose completion is learned.")
        if self.completion_only_loss is False:
            raise ValueError("`completion_only_loss=False` is not supported: only the agent's own tokens are learned.")
        if self.train_sampling_strategy != "random":
            raise ValueError(
                f"`train_sampling_strategy={self.train_sampling_strategy!r}` is not supported: whole segments of an "
                "episode are drawn at random."
            )
        if self.loss_type != "nll":
            raise ValueError(f"`loss_type={self.loss_type!r}` is not supported; VLMQ filters the 'nll' loss.")
        if self.label_smoothing_factor:
            raise ValueError("`label_smoothing_factor` is not supported: the filter weighs each token's own nll.")

    def _require(self, holds: bool, name: str, what: str) -> None:
        if not holds:
            raise ValueError(f"`{name}={getattr(self, name)!r}`: it {what}.")

    def to_dict(self) -> dict[str, Any]:
        """As `TrainingArguments.to_dict`, and no token inside `model_init_kwargs` and the like is written either."""
        written = {name: _without_tokens(value) for name, value in super().to_dict().items()}
        return written | {"eos_token": self.eos_token, "pad_token": self.pad_token}  # the tokenizer's are no secrets

    @property
    def needs_final_observation(self) -> bool:
        """Whether returns of truncated episodes bootstrap from what came after the last turn."""
        return self.critic_coef > 0 and self.bootstrap_truncated

    def critic_config(self) -> CriticConfig:
        """Shape of the critic that this configuration asks for."""
        return CriticConfig(
            critic_type=self.critic_type,
            num_critics=self.num_critics,
            critic_hidden_size=self.critic_hidden_size,
            critic_rank=self.critic_rank,
        )


# What only a run that collects heeds.
ONLINE_ONLY = (
    "max_env_turns",
    "offline_steps",
    "turns_per_round",
    "updates_per_turn",
    "replay_warmup_turns",
    "replay_capacity",
    "replay_prioritized_fraction",
    "rollout_epsilon",
    "rollout_search_fraction",
    "rollout_repeat_fraction",
    "rollout_temperature",
    "rollout_temperature_start",
    "rollout_action_temperature",
    "rollout_action_temperature_start",
    "rollout_epsilon_start",
    "rollout_annealing_turns",
    "rollout_seed",
    "replay_dir",
    "online_fraction",
    "online_fraction_start",
    "online_fraction_steps",
    "online_thought_weight",
    "online_thought_filter",
    "async_collection",
    "max_staleness",
)


def idle_offline(args: VLMQConfig) -> list[str]:
    """The arguments, as "`name=value`", that were set in vain if there is no environment to collect in."""
    defaults = {one.name: one.default for one in fields(VLMQConfig) if one.name in ONLINE_ONLY}
    return [f"`{name}={getattr(args, name)}`" for name, default in defaults.items() if getattr(args, name) != default]


def _without_tokens(value: Any) -> Any:
    """A copy in which whatever is named `token`, or `..._token`, is replaced by its name."""
    if isinstance(value, dict):
        return {
            key: f"<{key.upper()}>"
            if isinstance(key, str) and key.endswith("token") and isinstance(inner, str)
            else _without_tokens(inner)
            for key, inner in value.items()
        }
    return [_without_tokens(inner) for inner in value] if isinstance(value, list) else value
