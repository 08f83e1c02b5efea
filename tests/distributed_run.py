# SPDX-License-Identifier: Apache-2.0
"""One training run, started by `accelerate launch` for the tests of several processes; rank 0 writes what came of it.

accelerate launch ... tests/distributed_run.py '{"model": "folder", "out": "folder", "config": {...}, ...}'
"""

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from peft import LoraConfig

from tests import small_runs
from vlmq_trl import VLMQTrainer
from vlmq_trl.sharding import gathered

LORA = r".*text_model.*\.(q_proj|v_proj)"


def main() -> None:
    task = json.loads(sys.argv[1])
    torch.set_num_threads(1)
    # First: the weights are split as they are loaded only if ZeRO-3 is known by then.
    args = small_runs.config(task["out"], **task["config"])
    trainer = VLMQTrainer(
        task["model"],
        args,
        train_dataset=small_runs.number_line(),
        env=small_runs.NUMBER_LINE if task.get("online") else None,
        eval_env=small_runs.NUMBER_LINE,
        peft_config=LoraConfig(target_modules=LORA, r=4) if task.get("lora") else None,
    )
    critic = trainer.model.critic
    target = next(iter(critic.target.parameters()))
    start = target.detach().clone()
    trainer.train(resume_from_checkpoint=task.get("resume"))
    trainer.evaluate(episodes=5)
    if task.get("save"):
        trainer.save_model(task["save"])
    with gathered(critic.parameters()):
        moved = float((target.detach() - start).abs().max())
        weights = {name: p.detach().double().abs().sum().item() for name, p in critic.named_parameters()}
    deepspeed = trainer.accelerator.state.deepspeed_plugin
    seen = torch.tensor([trainer.accelerator.process_index], device=args.device)
    ranks = trainer.accelerator.gather(seen).tolist()
    if trainer.is_world_process_zero():
        result = {
            "distributed_type": trainer.accelerator.distributed_type.value,
            "zero_stage": None if deepspeed is None else deepspeed.zero_stage,
            "ranks": ranks,
            "log": trainer.state.log_history,
            "target_moved": moved,
            "target_mean": critic.target_mean.item(),
            "target_std": critic.target_std.item(),
            "critic": weights,
        }
        (Path(task["out"]) / "result.json").write_text(json.dumps(result))


if __name__ == "__main__":
    main()
