# SPDX-License-Identifier: Apache-2.0
"""Two processes, by `accelerate launch` and the configurations in `examples/accelerate_configs`, on the CPU.

Every run says how it was distributed: several commands that look right run alone, or as another kind.
"""

import itertools
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

from tests import small_runs, tiny_models
from vlmq_trl import evaluate_model, load_replay, validate_trajectories

ROOT = Path(__file__).resolve().parents[1]
KINDS = {"multi_gpu": ("MULTI_CPU", None), **{f"zero{stage}": ("DEEPSPEED", stage) for stage in (1, 2, 3)}}
KINDS["fsdp2"] = ("FSDP", None)
SPLIT = ("zero3", "fsdp2")  # the weights too
SCALAR = {"critic_type": "scalar"}
VOCAB = {"critic_type": "vocab", "off_policy_trace": "tree_backup"}
ONLINE = {"offline_steps": 2, "turns_per_round": 20, "updates_per_turn": 0.1, "rollout_num_envs": 2}
# DeepSpeed's first run compiles an extension, and looks for `ninja` there.
PATH = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
ADAPTER, MODEL, CRITIC = "adapter_model.safetensors", "model.safetensors", "critic.safetensors"


@pytest.fixture(scope="module")
def model_name(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    torch.manual_seed(0)
    for part in tiny_models.build("idefics3"):
        part.save_pretrained(folder)
    return str(folder)


@pytest.fixture
def launch(model_name, tmp_path):
    """launch(kind, name, steps, task, config) -> what rank 0 wrote, in the folder tmp_path / name."""

    def launch(kind, name, config, *, steps=8, fails="", precision="no", **task):
        out = tmp_path / name
        out.mkdir(exist_ok=True)
        task = {"model": model_name, "out": str(out), "save": str(out / "saved"), **task}
        task["config"] = {"max_steps": steps, "filter": "exp", "bf16": precision == "bf16", **config}
        configurations = ROOT / "examples" / "accelerate_configs"
        fsdp = {}
        if kind.startswith("fsdp"):  # the launcher wants GPUs; what it would hand on comes from its file all the same
            handed_on = yaml.safe_load((configurations / "fsdp2.yaml").read_text())["fsdp_config"]
            handed_on["fsdp_version"] = int(kind[-1])
            fsdp = {name.upper(): str(value) for name, value in handed_on.items()}
            fsdp["ACCELERATE_USE_FSDP"] = "true"
        configuration = configurations / f"{'multi_gpu' if fsdp else kind}.yaml"
        options = ["--num_processes", "2", "--mixed_precision", precision, "--main_process_port", "0"]
        done = subprocess.run(
            [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(configuration), *options]
            + [str(ROOT / "tests" / "distributed_run.py"), json.dumps(task)],
            env={**os.environ, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "PATH": PATH, **fsdp},
            capture_output=True,
            text=True,
            timeout=600,
        )
        written = out / "result.json"
        if fails:
            assert done.returncode != 0 and not written.exists()
            assert fails in done.stderr, done.stderr[-3000:]
            return done.stderr
        # The exit status counts for nothing: DeepSpeed aborts now and then when the interpreter ends after success.
        assert written.exists(), done.stderr[-6000:]
        result = json.loads(written.read_text())
        assert (result["distributed_type"], result["zero_stage"]) == KINDS[kind] and result["ranks"] == [0, 1]
        counts = result["gathers_while_playing"]
        assert not any(counts) and (counts or not task.get("env") or task.get("resume"))  # which has play already
        assert min(result["target_moved"].values()) > 1e-6 and result["target_dtypes"] == ["torch.float32"]
        return result

    return launch


def series(result, name):
    return [entry[name] for entry in result["log"] if name in entry]


def assert_equal_losses(result, other):
    for name in ("loss", "q_loss", "policy_loss", "target_mean", "kept_fraction"):
        assert series(result, name) == pytest.approx(series(other, name), abs=1e-4), name
    assert len(series(result, "loss")) == len(series(other, "loss")) > 0


def difference(folder, other, *names):
    """The largest difference of any weight in the saved files of these names."""
    largest = 0.0
    for name in names:
        a, b = load_file(folder / "saved" / name), load_file(other / "saved" / name)
        assert a.keys() == b.keys()
        largest = max([largest, *((a[key].float() - b[key].float()).abs().max().item() for key in a)])
    return largest


def test_split_weights_equal_ddp_online_and_resume(launch, tmp_path, model_name):
    """In an environment that keeps one process longer at play than the other, which may not wait for it."""
    config = {**VOCAB, **ONLINE, "save_strategy": "steps", "save_steps": 4, "critic_learning_rate": 3e-3}
    runs = {kind: launch(kind, kind, config, env="uneven", callback=True) for kind in ("multi_gpu", *SPLIT)}
    ddp = runs["multi_gpu"]
    reported = next(entry["env_turns"] for entry in ddp["log"] if "rollout_round" in entry)
    assert reported == next(
        e["rollout_episodes"] * e["rollout_mean_turns"] for e in ddp["log"] if "rollout_round" in e
    )
    # The processes share the episodes of an evaluation, and the play of a run.
    alone = tiny_models.build("idefics3")
    model = type(alone[0]).from_pretrained(model_name)
    seeds = small_runs.config(tmp_path).eval_seed
    played = evaluate_model(
        model, alone[1], small_runs.UnevenNumberLine, episodes=5, seed=seeds, max_completion_length=8, num_envs=2
    )
    for kind, run in runs.items():
        assert_equal_losses(run, ddp)
        assert series(run, "env_turns")[-1] >= 60
        assert series(run, "rollout_episodes") == series(ddp, "rollout_episodes")
        assert run["restored"]
        assert difference(tmp_path / kind, tmp_path / "multi_gpu", MODEL, CRITIC) < 1e-4
        assert run["evaluated"]["eval_episodes"] == 5
        assert run["evaluated"]["eval_mean_return"] == played["mean_return"]
        assert run["evaluated"]["eval_mean_turns"] == played["mean_turns"]
        replay = tmp_path / kind / "replay"
        offline = validate_trajectories(load_replay(replay, "offline"))
        assert sorted(offline.episode_ids) == sorted(validate_trajectories(small_runs.number_line()).episode_ids)
        online = load_replay(replay, "online")
        numbers = sorted(seed - small_runs.config(tmp_path).rollout_seed for seed in online.unique("seed"))
        assert {number % 2 for number in numbers} == {0, 1} and len(online) == series(run, "env_turns")[-1]

    # Bit by bit, from a checkpoint in the middle; the buffer has later rounds already.
    for kind in SPLIT:
        again = tmp_path / f"{kind}_again"
        checkpoint = str(tmp_path / kind / "checkpoint-4")
        resumed = launch(kind, kind, config, env="uneven", resume=checkpoint, save=str(again))
        assert_equal_losses(resumed, runs[kind])
        for name in (MODEL, CRITIC):
            a, b = load_file(again / name), load_file(tmp_path / kind / "saved" / name)
            assert all(torch.equal(a[key], b[key]) for key in b), (kind, name)


@pytest.mark.parametrize(
    ("kind", "dtype"), [("zero2", "bfloat16"), pytest.param("fsdp2", "float32", marks=pytest.mark.slow)]
)
def test_half_precision_keeps_the_critic_exact(kind, dtype, launch):
    """DeepSpeed casts the parameters, FSDP2 what it gathers; target heads are float32, online ones compute in it."""
    whole = launch(kind, "whole", SCALAR)
    half = launch(kind, "half", SCALAR, precision="bf16")
    assert half["dtypes"] == [f"torch.{dtype}"] and whole["dtypes"] == ["torch.float32"]
    for name, tolerance in (("q_loss", 1e-3), ("target_std", 1e-3), ("loss", 0.05)):
        assert series(half, name) == pytest.approx(series(whole, name), abs=tolerance)


def test_a_failing_process_ends_all_with_its_error(launch, tmp_path):
    error = launch("multi_gpu", "broken", {**SCALAR, **ONLINE}, env="broken", fails="the cable of rank 1 is unplugged")
    assert "Process 1 failed while it collected" in error  # what the other one says
    assert (tmp_path / "broken" / "checkpoint-2" / "trainer_state.json").is_file()  # both have saved, together


def test_fsdp_1_is_refused(launch):
    launch("fsdp1", "refused", {}, fails="Set `fsdp_version: 2`")


def test_a_loss_that_is_not_finite_on_one_process_stops_all_before_the_weights_change(launch, tmp_path):
    error = launch("zero2", "nan", SCALAR, nan_at=3, fails="The loss of update 3 is nan")
    assert "[rank0]: FloatingPointError" in error and "[rank1]: FloatingPointError" in error
    saved = load_file(tmp_path / "nan" / "stopped-3" / MODEL)
    assert all(x.isfinite().all() for x in saved.values())


@pytest.mark.slow
@pytest.mark.parametrize("lora", [False, True])
def test_a_reference_filters_alike_under_zero2_and_after_resuming(lora, launch, tmp_path):
    """It is the model as the script opens it, not as the checkpoint has it."""
    config = {**SCALAR, **ONLINE, "learning_rate": 1e-2, "save_strategy": "steps", "save_steps": 4}
    task = {"env": "NumberLine", "scripted": True, "lora": lora}
    plain = launch("zero2", "plain", config, **task)
    config["online_thought_filter"] = "reference"
    runs = {kind: launch(kind, kind, config, **task) for kind in ("multi_gpu", "zero2")}
    assert_equal_losses(runs["zero2"], runs["multi_gpu"])
    last, without = (series(run, "policy_loss")[-1] for run in (runs["zero2"], plain))
    assert abs(last - without) > 1e-2
    checkpoint, saved = tmp_path / "zero2" / "checkpoint-4", tmp_path / "resumed"
    launch("zero2", "zero2", config, **task, resume=str(checkpoint), save=str(saved))
    for name in (ADAPTER if lora else MODEL, CRITIC):
        a, b = load_file(saved / name), load_file(tmp_path / "multi_gpu" / "saved" / name)
        assert max((a[key] - b[key]).abs().max() for key in b) < 1e-3
    launch("zero3", "zero3", config, **task, fails="keeps a whole copy of the trained weights")


@pytest.mark.slow
@pytest.mark.parametrize("env", [None, "NumberLine"], ids=["offline", "online"])
@pytest.mark.parametrize(("lora", "critic"), list(itertools.product((False, True), (SCALAR, VOCAB))))
def test_all_kinds_are_equal_over_20_steps_and_resume(env, lora, critic, launch, tmp_path):
    config = {**critic, **(ONLINE if env else {}), "save_strategy": "steps", "save_steps": 10}
    files = (ADAPTER if lora else MODEL, CRITIC)
    runs = {kind: launch(kind, kind, config, steps=20, lora=lora, env=env) for kind in KINDS}
    for kind, run in runs.items():
        assert len(series(run, "loss")) == 20
        assert_equal_losses(run, runs["multi_gpu"])
        assert difference(tmp_path / kind, tmp_path / "multi_gpu", *files) < 1e-3
    for kind in KINDS:
        checkpoint, saved = tmp_path / kind / "checkpoint-10", tmp_path / f"{kind}_resumed"
        launch(kind, kind, config, steps=20, lora=lora, env=env, resume=str(checkpoint), save=str(saved))
        ended = tmp_path / f"{kind}_ended"  # a run that is resumed at its end only takes its weights back
        if kind in ("multi_gpu", "zero3"):
            checkpoint = tmp_path / kind / "checkpoint-20"
            launch(kind, kind, config, steps=20, lora=lora, env=env, resume=str(checkpoint), save=str(ended))
        for folder in filter(Path.exists, (saved, ended)):
            for name in files:
                a, b = load_file(folder / name), load_file(tmp_path / kind / "saved" / name)
                assert all(torch.equal(a[key], b[key]) for key in b), (folder.name, name)
