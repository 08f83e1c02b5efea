# SPDX-License-Identifier: Apache-2.0
"""The real client against a Hub on loopback: pushed from two processes under ZeRO-3, opened elsewhere.

Each step is a process of its own, since the client reads its address when it is imported.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests import tiny_models
from tests.hub_server import LoopbackHub

ROOT = Path(__file__).resolve().parents[1]
TOKEN = "hf_" + "loopback" * 4
STOCK = """
import sys
for name in ("vlmq_trl", "trl", "deepspeed"):
    sys.modules[name] = None  # as if they were not installed
import json, torch
from peft import PeftModel
from transformers import AutoModelForImageTextToText, AutoProcessor
model = PeftModel.from_pretrained(AutoModelForImageTextToText.from_pretrained("me/base"), "me/agent").eval()
processor = AutoProcessor.from_pretrained("me/agent")
torch.manual_seed(0)
inputs = {"pixel_values": torch.rand(1, 1, 3, 64, 64), "pixel_attention_mask": torch.ones(1, 1, 64, 64).bool()}
text = processor.tokenizer.convert_tokens_to_ids("<image>")
ids = torch.tensor([[2, 30, *[text] * 4, 31, 32, 33, 34]])
sequences = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **inputs, max_new_tokens=12)
print(json.dumps(sequences[0].tolist()))
"""
OURS = """
import json, sys, torch, gymnasium
from vlmq_trl import VLMAgent
agent = VLMAgent.from_pretrained(sys.argv[1])
torch.manual_seed(0)
inputs = {"pixel_values": torch.rand(1, 1, 3, 64, 64), "pixel_attention_mask": torch.ones(1, 1, 64, 64).bool()}
text = agent.processing_class.tokenizer.convert_tokens_to_ids("<image>")
ids = torch.tensor([[2, 30, *[text] * 4, 31, 32, 33, 34]])
sequences = agent.model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **inputs, max_new_tokens=12)
env = gymnasium.make(agent.env).unwrapped
observation, _ = env.reset(seed=5)
values = agent.token_values(observation, '{"action": "+"}', env.task)
print(json.dumps({"tokens": sequences[0].tolist(), "q": [value.q for value in values]}))
"""
PUSH = """
import sys
from vlmq_trl.modeling import AutoModelForImageTextToTextWithValueHead
model = AutoModelForImageTextToTextWithValueHead.from_pretrained(sys.argv[1])
for parameter in model.parameters():
    parameter.data.add_(0.125)  # so that nothing of it is there already
model.push_to_hub("me/other", token=sys.argv[2])
"""


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    folder = tmp_path_factory.mktemp("base")
    torch.manual_seed(0)
    for part in tiny_models.build("idefics3"):
        part.save_pretrained(folder)
    with LoopbackHub() as hub:
        hub.add("me/base", folder)
        yield hub


@pytest.fixture(scope="module")
def python(hub, tmp_path_factory):
    """python(arguments) -> the finished process, with a cache of its own; its output is kept in `python.said`."""

    def python(*arguments, check=True):
        environment = {**os.environ, **hub.environment(tmp_path_factory.mktemp("home")), "OMP_NUM_THREADS": "1"}
        environment["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), environment.get("PATH", "")])
        done = subprocess.run(
            [sys.executable, *map(str, arguments)],
            env=environment,
            cwd=ROOT,
            capture_output=True,
            text=True,
            timeout=600,
        )
        python.said += done.stdout + done.stderr
        assert not check or done.returncode == 0, done.stderr[-4000:]
        return done

    python.said = ""
    return python


@pytest.fixture(scope="module")
def pushed(hub, python, tmp_path_factory):
    """The folder of a run of two processes that has pushed at each save and at its end."""
    out = tmp_path_factory.mktemp("run")
    config = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2, "filter": "exp", "critic_type": "vocab"}
    config |= {"off_policy_trace": "tree_backup", "push_to_hub": True, "hub_model_id": "me/agent"}
    config |= {"hub_token": TOKEN, "hub_strategy": "every_save", "eval_strategy": "steps", "eval_steps": 2}
    task = {"model": "me/base", "out": str(out), "lora": True, "push": True, "config": config}
    python(
        *("-m", "accelerate.commands.launch", "--config_file", ROOT / "examples/accelerate_configs/zero3.yaml"),
        *("--num_processes", 2, "--mixed_precision", "no", "--main_process_port", 0),
        *(ROOT / "tests" / "distributed_run.py", json.dumps(task)),
        check=False,  # DeepSpeed aborts now and then when the interpreter ends after success
    )
    assert (out / "result.json").is_file(), python.said[-4000:]
    result = json.loads((out / "result.json").read_text())
    assert (result["distributed_type"], result["zero_stage"], result["ranks"]) == ("DEEPSPEED", 3, [0, 1])
    return out


def test_what_lies_on_the_hub(hub, pushed):
    files = hub.files("me/agent")
    assert {"adapter_model.safetensors", "adapter_config.json", "critic.safetensors", "critic_config.json"} <= set(
        files
    )
    assert {"agent.json", "vlmq_config.json", "README.md", "success.png", "tokenizer.json"} <= set(files)
    assert not [path for path in files if path.endswith((".bin", ".pt", ".pth", ".pkl")) or "global_step" in path]
    card = files["README.md"].decode()
    assert 'VLMAgent.from_pretrained("me/agent")' in card and "success_rate" in card and "base_model: me/base" in card
    assert len(hub.repos["me/agent"]) >= 3  # made, saved along the way, and at the end


def test_it_plays_the_same_elsewhere(pushed, python):
    """Generation with transformers and PEFT alone; generation and Q values with the package, from the Hub and from
    the run's own folder."""
    stock = json.loads(python("-c", STOCK).stdout.splitlines()[-1])
    ours, local = (json.loads(python("-c", OURS, name).stdout.splitlines()[-1]) for name in ("me/agent", pushed))
    assert stock == ours["tokens"] == local["tokens"] and len(stock) > 10
    assert ours["q"] == local["q"] and len(set(ours["q"])) > 1


def test_a_push_that_was_cut_off_goes_on(hub, pushed, python):
    hub.fail_uploads, before = 1, len(hub.uploads)
    failed = python("-c", PUSH, pushed, TOKEN, check=False)
    assert failed.returncode != 0 and "critic.safetensors" not in hub.files("me/other")
    python("-c", PUSH, pushed, TOKEN)
    assert {"adapter_model.safetensors", "critic.safetensors"} <= set(hub.files("me/other"))
    sent = hub.uploads[before:]
    assert len(sent) == len(set(sent))  # what had arrived was not sent again


def test_a_repository_that_does_not_fit_is_refused(hub, pushed, python):
    files = hub.files("me/agent")
    opening = "import sys; from vlmq_trl import VLMAgent; VLMAgent.from_pretrained(sys.argv[1])"
    pickled = {path: content for path, content in files.items() if path != "adapter_model.safetensors"}
    hub.commit("me/pickled", {**pickled, "adapter_model.bin": b"cos\nsystem\n(S'touch hacked'\ntR."})
    config = json.loads(files["critic_config.json"])
    hub.commit("me/misfit", {**files, "critic_config.json": json.dumps({**config, "critic_rank": 7}).encode()})
    for name, message in (
        ("me/pickled", "An adapter in a pickle is not opened"),
        ("me/misfit", "does not fit its own critic_config.json"),
    ):
        done = python("-c", opening, name, check=False)
        assert done.returncode != 0 and message in done.stderr, done.stderr[-2000:]


def test_a_whole_model_does_not_go_beside_an_adapter(hub, pushed, python):
    commits, push = len(hub.repos["me/agent"]), PUSH.replace("me/other", "me/agent")
    fresh = "from vlmq_trl.critic import CriticConfig" + push.replace(
        "argv[1])", "argv[1], critic_config=CriticConfig())"
    )
    done = python("-c", fresh, "me/base", TOKEN, check=False)
    assert done.returncode != 0 and "me/agent holds an adapter" in done.stderr, done.stderr[-2000:]
    assert len(hub.repos["me/agent"]) == commits


DATASET = """
import sys
from datasets import load_dataset
from vlmq_trl import collect_demonstrations, push_trajectories, validate_trajectories
play = collect_demonstrations("vlmq_trl/NumberLine-v0", policy="flawed:0.5", episodes=8, progress=False)
push_trajectories(play, "me/play", description="A player that errs in half of its turns.", token=sys.argv[1])
back = load_dataset("me/play", split="train")
assert back.column_names == play.column_names
validate_trajectories(back)
for name in play.column_names:
    if "images" not in name:
        assert back[name] == play[name], name
assert [row["images"][0].tobytes() for row in back] == [row["images"][0].tobytes() for row in play]
print("equal")
"""


def test_a_dataset_and_its_card(hub, python):
    assert python("-c", DATASET, TOKEN).stdout.splitlines()[-1] == "equal"
    files = hub.files("datasets/me/play")
    card = files["README.md"].decode()
    assert "dataset_info:" in card and "vlmq" in card  # what the viewer needs, and what people read
    assert "A player that errs in half of its turns." in card and "| episodes | 8 |" in card
    assert "`vlmq_trl/NumberLine-v0`" in card and "| `behavior_logprobs` |" in card
    assert any(path.endswith(".parquet") for path in files)


def test_the_token_is_nowhere(hub, pushed, python):
    assert hub.tokens >= {TOKEN}  # it was used
    assert TOKEN not in python.said
    everything = [file.read_bytes() for file in pushed.rglob("*") if file.is_file()]
    everything += [content for commits in hub.repos.values() for _, files in commits for content in files.values()]
    assert len(everything) > 40 and not any(TOKEN.encode() in content for content in everything)
