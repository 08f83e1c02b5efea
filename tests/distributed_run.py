# SPDX-License-Identifier: Apache-2.0
"""One training run, started by `accelerate launch` for `test_distributed.py`; rank 0 writes what came of it.

accelerate launch ... tests/distributed_run.py '{"model": "folder", "out": "folder", "config": {...}, ...}'
"""

import json
import os
import sys
from contextlib import contextmanager
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import gymnasium
import torch
from accelerate.state import AcceleratorState, DistributedType, PartialState
from peft import LoraConfig
from torch.distributed.fsdp._fully_shard import _fsdp_param_group as groups

from tests import small_runs
from vlmq_trl import EnvEvaluationCallback, VLMQTrainer, losses
from vlmq_trl.agent_format import default_format
from vlmq_trl.envs import make_demonstrator
from vlmq_trl.online import data as online_data
from vlmq_trl.rollout import DemonstratorPolicy
from vlmq_trl.sharding import assign, gathered, whole

if os.environ.get("ACCELERATE_USE_FSDP") == "true" and not torch.cuda.is_available():
    # accelerate takes FSDP for GPUs only; PyTorch's runs on CPUs too.
    initialize = AcceleratorState.__init__

    def with_fsdp(self, *args, fsdp_plugin=None, **kwargs):
        initialize(self, *args, fsdp_plugin=fsdp_plugin, **kwargs)
        if fsdp_plugin is not None:  # once, and shared with all that come later
            self.fsdp_plugin = fsdp_plugin
            self.distributed_type = PartialState._shared_state["distributed_type"] = DistributedType.FSDP
            if self._mixed_precision != "no":
                fsdp_plugin.set_mixed_precision(self._mixed_precision)

    AcceleratorState.__init__ = with_fsdp

LORA = r".*text_model.*\.(q_proj|v_proj)"


class BreaksOnRank1(gymnasium.Wrapper):
    """NumberLine that raises in its first step on rank 1."""

    def __init__(self):
        super().__init__(gymnasium.make(small_runs.NUMBER_LINE))

    def step(self, action):
        if os.environ["RANK"] == "1":
            raise OSError("the cable of rank 1 is unplugged")
        return super().step(action)


def main() -> None:
    task = json.loads(sys.argv[1])
    torch.set_num_threads(1)
    # First: the weights are split as they are loaded only if ZeRO-3 is known by then.
    args = small_runs.config(task["out"], **task["config"])
    envs = {
        None: None,
        "NumberLine": small_runs.NUMBER_LINE,
        "uneven": small_runs.UnevenNumberLine,
        "broken": BreaksOnRank1,
    }
    env = envs[task.get("env")]
    eval_env = env if task.get("env") == "uneven" else small_runs.NUMBER_LINE
    callback = EnvEvaluationCallback(eval_env, eval_steps=2, episodes=3, max_completion_length=8)
    trainer = VLMQTrainer(
        task["model"],
        args,
        train_dataset=None if task.get("purely") else small_runs.number_line(),
        env=env,
        eval_env=eval_env,
        rollout_policy=scripted() if task.get("scripted") else None,
        peft_config=LoraConfig(target_modules=LORA, r=4) if task.get("lora") else None,
        callbacks=[callback] if task.get("callback") else None,
    )
    if "nan_at" in task:
        break_the_loss(trainer, task["nan_at"])
    result = {"evaluated": trainer.evaluate(episodes=5), "gathers_while_playing": gathers_while_playing()}
    critic = trainer.model.critic
    before = {name: x.cpu().clone() for name, x in critic.target.named_buffers()}
    trainer.train(resume_from_checkpoint=task.get("resume"))
    trained = [p for p in trainer.model.parameters() if p.requires_grad]  # which FSDP2 has replaced
    if task.get("callback"):
        result["restored"] = best_weights_are_put_back(trainer, callback, trained)
    if task.get("save"):
        trainer.save_model(task["save"])
    if task.get("push"):
        trainer.push_to_hub()
    dtypes = sorted({str(p.dtype) for p in trained})
    result |= {
        "distributed_type": trainer.accelerator.distributed_type.value,
        "zero_stage": getattr(trainer.accelerator.state.deepspeed_plugin, "zero_stage", None),
        "ranks": trainer.accelerator.gather(torch.tensor([args.process_index], device=args.device)).tolist(),
        "log": trainer.state.log_history,
        "target_moved": {
            name: float((x.cpu() - before[name]).abs().max()) for name, x in critic.target.named_buffers()
        },
        "target_dtypes": sorted({str(x.dtype) for x in critic.target.buffers()}),
        "dtypes": dtypes,
    }
    if trainer.is_world_process_zero():
        (Path(task["out"]) / "result.json").write_text(json.dumps(result))


def scripted() -> DemonstratorPolicy:
    """Collects responses with thoughts and an action, which an untrained model does not give."""
    player = make_demonstrator(small_runs.NUMBER_LINE, "random")
    return DemonstratorPolicy(player, default_format(gymnasium.make(small_runs.NUMBER_LINE)))


def gathers_while_playing() -> list[int]:
    """FSDP2's collectives in each collection, beyond those of its beginning; filled as the run goes on."""
    gather, ready, counts, total = groups.foreach_all_gather, online_data.ready_to_generate, [], [0]

    def counted(*args, **kwargs):
        total[0] += 1
        return gather(*args, **kwargs)

    @contextmanager
    def watched(model):
        with ready(model):
            before = total[0]
            yield
            counts.append(total[0] - before)

    groups.foreach_all_gather, online_data.ready_to_generate = counted, watched
    return counts


def break_the_loss(trainer, update) -> None:
    """On rank 1 only."""
    policy_loss = losses.policy_loss

    def broken(*args):
        loss = policy_loss(*args)
        return loss * float("nan") if os.environ["RANK"] == "1" and trainer.state.global_step == update else loss

    losses.policy_loss = broken


def best_weights_are_put_back(trainer, callback, trained) -> bool:
    """The best are the last ones here, since no step is better than another."""
    assert callback.best is callback.history[-1]
    with gathered(trained, write=True):
        before = [whole(p).clone() for p in trained]
        for p, x in zip(trained, before, strict=True):
            assign(p, torch.zeros_like(x))
    callback.restore_best(trainer.model)
    with gathered(trained):
        restored = [whole(p).clone() for p in trained]  # all of them, on every process
    return all(torch.equal(a, b) for a, b in zip(before, restored, strict=True))


if __name__ == "__main__":
    main()
