# SPDX-License-Identifier: Apache-2.0
"""`examples/`: the Gym Cards script from its command line to table, curve, results and saved models; its errors."""

import functools
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import gymnasium
import PIL.Image
import pytest
import torch
import yaml
from huggingface_hub import ModelCard
from safetensors.torch import load_file
from transformers import AutoModelForImageTextToText, AutoProcessor

from examples import train_agent
from tests import tiny_models
from tests.misbehaving_envs import Misbehaving
from vlmq_trl import (
    AutoModelForImageTextToTextWithValueHead,
    PlainFormat,
    VLMAgent,
    callbacks,
    collect_demonstrations,
    save_trajectories,
    vlmq_trainer,
)
from vlmq_trl.modeling import load_pretrained
from vlmq_trl.replay import load_replay

ROOT = Path(__file__).parents[1]
CONFIGS = sorted((ROOT / "examples" / "configs").glob("*.yaml"))
SMALL = {
    "episodes": 12,
    "max_steps": 2,
    "eval_steps": 1,
    "eval_episodes": 3,
    "test_episodes": 6,
    "before_episodes": 4,
    "per_device_train_batch_size": 2,
    "max_completion_length": 2,
    "learning_rate": 1e-3,
}


@pytest.fixture(scope="module")
def model_name(tmp_path_factory):
    path = tmp_path_factory.mktemp("model")
    model, processor = tiny_models.build("idefics3")
    model.save_pretrained(path)
    processor.save_pretrained(path)
    return str(path)


def flags(**arguments):
    argv = []
    for name, value in arguments.items():
        argv += [f"--{name}", *(map(str, value) if isinstance(value, list) else [str(value)])]
    return argv


@pytest.mark.parametrize("save_strategy", ["no", "steps"])
def test_a_full_disk_shows_before_training(save_strategy, model_name, tmp_path, monkeypatch):
    """Room for the model is enough without checkpoints only."""
    size = (Path(model_name) / "model.safetensors").stat().st_size
    free = 1000 if save_strategy == "no" else 2 * size
    monkeypatch.setattr(train_agent.shutil, "disk_usage", lambda path: SimpleNamespace(free=free))
    argv = flags(model_name_or_path=model_name, output_dir=tmp_path, method="vlmq", disable_tqdm=True, **SMALL)
    what = "the trained model takes" if save_strategy == "no" else "the trained model and its checkpoints take"
    with pytest.raises(OSError, match=rf"MB free, and {what} .* choose another `--output_dir`"):
        train_agent.main([*argv, "--save_strategy", save_strategy])
    assert not list(tmp_path.glob("vlmq/*"))


def test_all_methods_side_by_side(model_name, tmp_path, capsys):
    methods = ["sft", "filtered_bc", "vlmq"]
    argv = flags(model_name_or_path=model_name, output_dir=tmp_path, method=methods, disable_tqdm=True, **SMALL)
    results = train_agent.main(argv)

    printed = capsys.readouterr().out
    lines = printed[printed.index("NumberLine: success") :].splitlines()
    assert [line.split("  ")[0] for line in lines[2:7]] == ["the data (random play)", "before training", *methods]
    assert "(" in lines[3] and " to " in lines[3]  # an interval

    saved = json.loads((tmp_path / "results.json").read_text())
    assert saved == json.loads(json.dumps(results))
    assert saved["data"]["episodes"] == 12 and saved["before"]["sampled"]["episodes"] == 4
    seen = set()
    for method in methods:
        run = saved["methods"][method]
        assert [record["step"] for record in run["history"]] == [0, 1, 2]
        assert run["greedy"]["episodes"] == run["sampled"]["episodes"] == 6
        assert run["greedy"]["success_rate_low"] <= run["greedy"]["success_rate"] <= run["greedy"]["success_rate_high"]
        seen.add((run["history"][0]["success_rate"], run["history"][0]["mean_return"]))
    assert len(seen) == 1  # the same model plays the same validation episodes before every method

    with PIL.Image.open(tmp_path / "learning_curve.png") as picture:
        assert picture.width > 600 and len(picture.convert("RGB").getcolors(2**24)) > 20
    AutoModelForImageTextToText.from_pretrained(tmp_path / "sft")
    AutoModelForImageTextToTextWithValueHead.from_pretrained(tmp_path / "vlmq")


def test_the_agent_knows_its_environment(model_name, tmp_path, monkeypatch):
    """Offline too, where the environment is not the trainer's to play: the callback alone does."""

    def evaluate_model(*args, **kwargs):
        raise AssertionError("the trainer played")

    monkeypatch.setattr(vlmq_trainer, "evaluate_model", evaluate_model)
    arguments = {**SMALL, "before_episodes": 0, "method": "vlmq", "output_dir": tmp_path, "save_steps": 1}
    train_agent.main(flags(model_name_or_path=model_name, **arguments, disable_tqdm=True))
    (episode,) = VLMAgent.from_pretrained(tmp_path / "vlmq").play(max_turns=1)
    assert len(episode.turns) == 1
    assert "to act in `vlmq_trl/NumberLine-v0`" in (tmp_path / "vlmq" / "README.md").read_text()


def test_lora_from_a_file_and_an_existing_dataset(model_name, tmp_path):
    data = collect_demonstrations("vlmq_trl/Points24-v0", policy="flawed:0.3", episodes=6, progress=False)
    save_trajectories(data, tmp_path / "data")
    config = {
        **SMALL,
        "game": "Points24",
        "method": "vlmq",
        "dataset_path": str(tmp_path / "data"),
        "before_episodes": 0,
        "model_name_or_path": model_name,
        "use_peft": True,
        "lora_target_modules": ["q_proj", "v_proj"],
        "output_dir": str(tmp_path / "out"),
        "max_steps": 1,
        "test_episodes": 30,
        "sampled_test_episodes": 2,
    }
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    argv = ["--config", str(tmp_path / "config.yaml"), *flags(max_steps=2, disable_tqdm=True)]
    results = train_agent.main(argv)
    run = results["methods"]["vlmq"]
    assert run["history"][-1]["step"] == 2  # the command line wins over the file
    assert results["before"] is None and results["data"]["episodes"] == 6
    env = gymnasium.make("vlmq_trl/Points24-v0").unwrapped
    solvable = [env.reset(seed=seed) and env.solvable for seed in range(2_000_000, 2_000_030)]
    assert run["greedy"]["solvable"] == sum(solvable) < 30 and run["greedy"]["solvable_success_rate"] == 0
    assert (tmp_path / "out" / "vlmq" / "adapter_model.safetensors").is_file()
    assert "of the hands that can be solved" in train_agent.table(results)


def test_another_domain_with_options(model_name, tmp_path):
    """BabyAI, in full view and cut after five turns, by all methods and online."""
    arguments = {
        **SMALL,
        "env_id": "vlmq_trl/BabyAI-GoToObj-v0",
        "env_options": ["max_turns=5", "view=full", "tile_size=8"],
        "policy": "flawed:0.5",
        "collection_num_envs": 4,
        "method": ["sft", "vlmq"],
        "online": True,
        "max_env_turns": 12,
        "turns_per_round": 6,
        "output_dir": tmp_path,
        "disable_tqdm": True,
    }
    results = train_agent.main(flags(**arguments, model_name_or_path=model_name))
    assert results["env_id"] == "vlmq_trl/BabyAI-GoToObj-v0" and results["data"]["episodes"] == 12
    assert results["data"]["turns"] <= 60
    assert all(run["greedy"]["mean_turns"] == 5 for run in results["methods"].values())  # it says nothing yet
    assert set(load_replay(tmp_path / "vlmq" / "replay")["env_id"]) == {"vlmq_trl/BabyAI-GoToObj-v0"}
    assert "BabyAI-GoToObj: success with its 95 % interval" in train_agent.table(results)


@pytest.mark.parametrize("method", ["sft", "vlmq"])
def test_best_weights_are_the_ones_that_are_tested(method, model_name, tmp_path, monkeypatch):
    evaluations = iter([0.0, 0.75, 0.5])
    played = callbacks.evaluate_model

    def evaluate_model(*args, **kwargs):
        return {**played(*args, **kwargs), "success_rate": next(evaluations)}

    monkeypatch.setattr(callbacks, "evaluate_model", evaluate_model)
    arguments = {**SMALL, "before_episodes": 0, "method": method, "output_dir": tmp_path, "disable_tqdm": True}
    results = train_agent.main(flags(model_name_or_path=model_name, **arguments))
    assert results["methods"][method]["best_step"] == 1
    if method == "vlmq":
        card = ModelCard.load(tmp_path / "vlmq" / "README.md")
        assert card.data.eval_results[0].metric_value == 0.75


class Interrupted(Exception):
    pass


def test_the_same_command_goes_on_after_an_interruption(model_name, tmp_path, monkeypatch, capsys):
    """Interrupted in the second method's training: the first is kept, the second ends as it would have."""
    arguments = {**SMALL, "max_steps": 3, "before_episodes": 2, "method": ["sft", "vlmq"], "save_steps": 1}
    arguments |= {"model_name_or_path": model_name, "disable_tqdm": True}
    straight = train_agent.main(flags(**arguments, output_dir=tmp_path / "straight"))
    assert not list((tmp_path / "straight").glob("*/checkpoint-*"))

    step = train_agent.TrainingBar.on_step_end
    tested = train_agent.test_model

    def interrupt(self, args, state, control, **kwargs):
        step(self, args, state, control, **kwargs)
        if self.method == "vlmq" and state.global_step == 3:
            raise Interrupted

    monkeypatch.setattr(train_agent.TrainingBar, "on_step_end", interrupt)
    with pytest.raises(Interrupted):
        train_agent.main(flags(**arguments, output_dir=tmp_path / "run"))
    monkeypatch.setattr(train_agent.TrainingBar, "on_step_end", step)
    assert [path.name for path in (tmp_path / "run").glob("*/checkpoint-*")] == ["checkpoint-2"]

    other = flags(**{**arguments, "learning_rate": 5e-4}, output_dir=tmp_path / "run")
    with pytest.raises(SystemExit, match="results of sft and checkpoints of a run with another `learning_rate`"):
        train_agent.main(other)

    tests = []
    monkeypatch.setattr(train_agent, "test_model", lambda *args, **kw: tests.append(kw) or tested(*args, **kw))
    monkeypatch.setattr(train_agent, "collect_demonstrations", None)  # the data is there
    capsys.readouterr()
    again = train_agent.main(flags(**arguments, output_dir=tmp_path / "run"))
    printed = capsys.readouterr().out
    assert "Going on with the run" in printed and "done: sft" in printed and "vlmq/checkpoint-2" in printed
    assert len(tests) == 1  # neither the model before training nor sft is tested again

    def plain(results):
        timeless = {"seconds", "train_seconds", "runtime"}

        def strip(value):
            if isinstance(value, dict):
                return {k: strip(v) for k, v in value.items() if k not in timeless}
            return [strip(v) for v in value] if isinstance(value, list) else value

        return strip({"methods": results["methods"], "before": results["before"], "data": results["data"]})

    assert plain(json.loads(json.dumps(again))) == plain(json.loads(json.dumps(straight)))


def test_collected_data_is_kept(model_name, tmp_path, monkeypatch):
    """For the same play only, and as a dataset to give to another run."""
    arguments = {**SMALL, "model_name_or_path": model_name, "output_dir": tmp_path / "run"}

    def data(**others):
        return train_agent.load_data(*train_agent.parse(flags(**{**arguments, **others}))[:2])

    first, other_seed = data(), data(collection_seed=50)
    folders = sorted((tmp_path / "run").glob("data-*"))
    assert len(folders) == 2
    monkeypatch.setattr(train_agent, "collect_demonstrations", None)
    assert data()[:] == first[:] != other_seed[:]
    assert data(collection_seed=50)[:] == other_seed[:]
    given = data(dataset_path=folders[0], output_dir=tmp_path / "other")
    assert given[:] in (first[:], other_seed[:]) and not (tmp_path / "other").exists()
    for others in ({"episodes": 13}, {"policy": "expert"}, {"env_options": ["invalid_penalty=2"]}):
        with pytest.raises(TypeError):  # there is nothing to collect it with
            data(**others)


def test_data_that_cannot_be_kept_is_trained_on(model_name, tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(train_agent, "save_trajectories", full)
    argv = flags(**SMALL, model_name_or_path=model_name, output_dir=tmp_path)
    with pytest.warns(UserWarning, match="is not kept in .*data-.* No space left on device"):
        data = train_agent.load_data(*train_agent.parse(argv)[:2])
    assert len(set(data["episode_id"])) == SMALL["episodes"]


def test_methods_are_added(model_name, tmp_path, monkeypatch):
    """In the same list or by themselves, also to a run that was interrupted in another method's training."""
    arguments = {**SMALL, "max_steps": 1, "before_episodes": 0, "model_name_or_path": model_name, "disable_tqdm": True}
    begun, train = [], train_agent.train

    def watched(method, *args):
        begun.append(method)
        if method == "vlmq" and begun.count("vlmq") == 1:
            (tmp_path / "vlmq" / "checkpoint-1").mkdir(parents=True)  # begun, not whole
            raise Interrupted
        return train(method, *args)

    monkeypatch.setattr(train_agent, "train", watched)

    def run(*methods):
        begun_before = len(begun)
        found = train_agent.main(flags(**arguments, method=list(methods), output_dir=tmp_path))
        return begun[begun_before:], list(found["methods"])

    with pytest.raises(Interrupted):
        run("sft", "vlmq")
    assert run("filtered_bc") == (["filtered_bc"], ["sft", "filtered_bc"])
    assert run("sft", "vlmq", "filtered_bc") == (["vlmq"], ["sft", "filtered_bc", "vlmq"])
    assert run("vlmq") == ([], ["sft", "filtered_bc", "vlmq"])


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"methods": 3, "arguments": {}}'])
def test_results_of_something_else(text, model_name, tmp_path):
    (tmp_path / "results.json").write_text(text)
    with pytest.raises(SystemExit, match=r"results\.json was not written by this script, or is damaged"):
        train_agent.main(flags(**SMALL, model_name_or_path=model_name, output_dir=tmp_path))


@pytest.mark.parametrize("stop", [None, 1.0])
def test_a_run_interrupted_in_its_test_is_not_trained_further(stop, model_name, tmp_path, monkeypatch, capsys):
    """Nor one that `stop_at_success` had ended."""
    arguments = {**SMALL, "max_steps": 4 if stop else 2, "before_episodes": 0, "method": "vlmq", "save_steps": 1}
    argv = flags(**arguments, model_name_or_path=model_name, disable_tqdm=True, output_dir=tmp_path)
    argv += flags(stop_at_success=stop) if stop else []
    if stop:
        played = callbacks.evaluate_model
        monkeypatch.setattr(callbacks, "evaluate_model", lambda *a, **kw: {**played(*a, **kw), "success_rate": 1.0})
    tested = train_agent.test_model

    def interrupt(*args, **kwargs):
        raise Interrupted

    monkeypatch.setattr(train_agent, "test_model", interrupt)
    with pytest.raises(Interrupted):
        train_agent.main(argv)
    monkeypatch.setattr(train_agent, "test_model", tested)
    (tmp_path / "vlmq" / "checkpoint-9").mkdir()  # one that a kill left unwritten
    history = train_agent.main(argv)["methods"]["vlmq"]["history"]
    assert [record["step"] for record in history] == ([0, 1] if stop else [0, 1, 2])
    assert not list(tmp_path.glob("vlmq/checkpoint-*"))
    # Killed at the very end, or simply given again: nothing is left to do, and nothing is lost.
    (tmp_path / "vlmq" / "checkpoint-2").mkdir()
    monkeypatch.setattr(train_agent, "train", interrupt)
    before = (tmp_path / "results.json").read_text()
    capsys.readouterr()
    assert train_agent.main(argv)["methods"]["vlmq"]["history"] == history
    assert "holds this run, which is done" in capsys.readouterr().out
    assert (tmp_path / "results.json").read_text() == before and not list(tmp_path.glob("vlmq/checkpoint-*"))


ONLINE = {
    "online": True,
    "max_steps": 6,
    "offline_steps": 2,
    "turns_per_round": 8,
    "updates_per_turn": 0.25,
    "rollout_num_envs": 2,
    "before_episodes": 0,
    "method": "vlmq",
    "disable_tqdm": True,
}


def test_online(model_name, tmp_path, capsys):
    """Offline, then rounds of its own play: turns in the history, the table and a second panel of the picture."""
    arguments = {**SMALL, **ONLINE, "eval_steps": 2, "output_dir": tmp_path, "model_name_or_path": model_name}
    run = train_agent.main(flags(**arguments))["methods"]["vlmq"]
    turns = [record.get("env_turns", 0) for record in run["history"]]
    assert [record["step"] for record in run["history"]] == [0, 2, 4, 6]
    assert turns[:2] == [0, 0] and 8 <= turns[2] <= turns[3] and 16 <= turns[3] < 16 + 2 * 10
    assert f", {turns[-1]} turns, " in capsys.readouterr().out
    play = load_replay(tmp_path / "vlmq" / "replay", "online")
    assert len(play) == turns[-1]
    with PIL.Image.open(tmp_path / "learning_curve.png") as picture:
        assert picture.width > 1200


def test_purely_online(model_name, tmp_path, capsys):
    arguments = {**SMALL, **ONLINE, "offline_steps": 0, "episodes": 0, "eval_steps": 2, "output_dir": tmp_path}
    results = train_agent.main(flags(**arguments, model_name_or_path=model_name))
    assert results["data"] is None and results["methods"]["vlmq"]["history"][-1]["env_turns"] >= 24
    assert "the data" not in capsys.readouterr().out


def test_a_budget_of_turns_says_how_long_training_is():
    _, args, _ = train_agent.parse(["--online", "--method", "vlmq", "--max_env_turns", "1000"])
    assert args.max_steps == -1
    _, args, _ = train_agent.parse(["--online", "--method", "vlmq", "--max_env_turns", "9", "--max_steps", "7"])
    assert args.max_steps == 7
    _, args, _ = train_agent.parse(["--online", "--method", "vlmq"])
    assert args.max_steps == 600


def test_another_models_run_is_neither_gone_on_with_nor_lost(model_name, tmp_path):
    arguments = {**SMALL, "max_steps": 1, "before_episodes": 0, "disable_tqdm": True, "output_dir": tmp_path}
    lora = {"use_peft": True, "lora_target_modules": ["q_proj", "v_proj"]}
    train_agent.main(flags(**arguments, **lora, model_name_or_path=model_name, method="sft"))
    files = {path: path.stat().st_mtime_ns for path in tmp_path.glob("**/*") if path.is_file()}
    for method in ("sft", "vlmq"):
        other = flags(**arguments, **lora, lora_r=4, model_name_or_path=model_name, method=method)
        with pytest.raises(
            SystemExit, match=r"results of sft of a run with another `lora_r`.* choose another `--output"
        ):
            train_agent.main(other)
    assert {path: path.stat().st_mtime_ns for path in tmp_path.glob("**/*") if path.is_file()} == files


def test_another_method_into_the_same_folder_keeps_the_first_ones_results(model_name, tmp_path):
    arguments = {**SMALL, "max_steps": 1, "before_episodes": 0, "disable_tqdm": True, "output_dir": tmp_path}
    train_agent.main(flags(**arguments, model_name_or_path=model_name, method="sft"))
    results = train_agent.main(flags(**arguments, model_name_or_path=model_name, method="filtered_bc"))
    assert list(results["methods"]) == ["sft", "filtered_bc"]
    changed = {**arguments, "episodes": 13}
    with pytest.raises(SystemExit, match="holds the results of sft, filtered_bc of a run with another `episodes`"):
        train_agent.main(flags(**changed, model_name_or_path=model_name, method="filtered_bc"))


@pytest.mark.parametrize(
    ("env_id", "seed", "message"),
    [
        ("vlmq_trl/Blackjack-v0", 0, "holds play of vlmq_trl/Blackjack-v0, not of vlmq_trl/NumberLine-v0"),
        ("vlmq_trl/NumberLine-v0", 2_000_003, r"holds 3 of the test's episodes \(seeds 2000000 to 2000005\)"),
        ("vlmq_trl/NumberLine-v0", 999_995, "holds 1 of the validation's episodes .*move `eval_seed`"),
    ],
)
def test_data_that_must_not_be_trained_on(env_id, seed, message, model_name, tmp_path):
    save_trajectories(collect_demonstrations(env_id, episodes=6, seed=seed, progress=False), tmp_path / "data")
    arguments = {**SMALL, "dataset_path": tmp_path / "data", "output_dir": tmp_path / "out"}
    with pytest.raises(ValueError, match=message):
        train_agent.main(flags(model_name_or_path=model_name, **arguments))


def test_the_module_that_registers_an_environment_is_no_part_of_its_id():
    data = collect_demonstrations("vlmq_trl/NumberLine-v0", episodes=2, progress=False)
    script, args, _ = train_agent.parse(["--env_id", "vlmq_trl.envs:vlmq_trl/NumberLine-v0"])
    train_agent.check_data(data, script, args)
    script, args, _ = train_agent.parse(["--env_id", "vlmq_trl.envs:vlmq_trl/EZPoints-v0"])
    with pytest.raises(ValueError, match="holds play of vlmq_trl/NumberLine-v0, not of"):
        train_agent.check_data(data, script, args)


def test_a_module_that_registers_an_environment_is_imported(tmp_path, monkeypatch):
    """Before the embedded model is asked for, which is made for a registered one."""
    (tmp_path / "games_of_ones_own.py").write_text(
        "import gymnasium\ngymnasium.register('Own-v0', 'vlmq_trl.envs.gym_cards:NumberLine')\n"
    )
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.chdir(tmp_path)  # where the command is given
    recipes = []
    monkeypatch.setattr(train_agent, "load_embedded_model", recipes.append)
    try:
        train_agent.embedded_model(train_agent.parse(["--env_id", "games_of_ones_own:Own-v0"])[0])
    finally:
        gymnasium.registry.pop("Own-v0", None)
    assert [recipe.games for recipe in recipes] == [("Own-v0",)]


def test_an_environment_without_reading_lessons_needs_a_model(capsys):
    gymnasium.register("Silent-v0", entry_point=Misbehaving)
    try:
        argv = ["--env_id", "Silent-v0", "--online", "true", "--episodes", "0", "--method", "vlmq"]
        with pytest.raises(SystemExit):
            train_agent.parse(argv)
        assert "Silent-v0 has no reading lessons" in " ".join(capsys.readouterr().err.split())
        train_agent.parse([*argv, "--model_name_or_path", "someone/model"])
    finally:
        gymnasium.registry.pop("Silent-v0", None)


def test_the_embedded_model_is_taught_what_the_options_show(monkeypatch):
    recipes = []
    monkeypatch.setattr(train_agent, "load_embedded_model", recipes.append)
    for options in (["max_turns=9"], ["view=full"], ["max_turns=9", "view=full"]):
        argv = ["--env_id", "vlmq_trl/BabyAI-GoToObj-v0", "--env_options", *options]
        train_agent.embedded_model(train_agent.parse(argv)[0])
    assert [recipe.env_kwargs for recipe in recipes] == [{}, {"view": "full"}, {"max_turns": 9, "view": "full"}]


def test_an_environment_that_fails_in_the_test(model_name, monkeypatch):
    """Its episode is dropped, as in training."""
    argv = flags(**SMALL, model_name_or_path=model_name, max_env_failures=1)
    script, args, _ = train_agent.parse(argv)
    first = script.test_seed
    monkeypatch.setattr(
        train_agent.AgentArguments, "env", property(lambda self: functools.partial(Misbehaving, "raise", (first + 1,)))
    )
    model, processor = load_pretrained(model_name), AutoProcessor.from_pretrained(model_name)
    tested = train_agent.test_model(model, processor, script, args, PlainFormat())
    for kind, asked in (("greedy", script.test_episodes), ("sampled", script.sampled_test_episodes)):
        assert tested[kind]["episodes"] == asked - 1
        assert tested[kind]["successes"] == round(tested[kind]["success_rate"] * (asked - 1))


@pytest.mark.parametrize("method", ["sft", "vlmq"])
@pytest.mark.parametrize("targets", [["q_proj", "v_proj"], None], ids=["chosen", "default"])
def test_the_vision_tower_is_frozen_for_lora_too(targets, method, model_name, tmp_path):
    arguments = {**SMALL, "max_steps": 1, "before_episodes": 0, "method": method, "output_dir": tmp_path}
    lora = {"use_peft": True, "disable_tqdm": True, **({"lora_target_modules": targets} if targets else {})}
    train_agent.main(flags(model_name_or_path=model_name, **arguments, **lora))
    names = list(load_file(tmp_path / method / "adapter_model.safetensors"))
    assert names and not [name for name in names if "vision" in name or "lm_head" in name]
    assert any("down_proj" in name for name in names) == (targets is None)


def test_no_token_is_written(model_name, tmp_path):
    secret = "hf_" + "s" * 34
    arguments = {**SMALL, "max_steps": 1, "before_episodes": 0, "output_dir": tmp_path, "disable_tqdm": True}
    arguments |= {"method": ["sft", "vlmq"], "report_to": "tensorboard", "save_steps": 1}
    argv = flags(model_name_or_path=model_name, **arguments, model_init_kwargs=json.dumps({"token": secret}))
    results = train_agent.main(argv)
    assert results["training_arguments"]["model_init_kwargs"]["token"] == "<TOKEN>"
    files = [file for file in tmp_path.rglob("*") if file.is_file()]
    assert files and not [file for file in files if secret.encode() in file.read_bytes()]


@pytest.mark.parametrize("config", CONFIGS, ids=lambda path: path.stem)
def test_configuration_files_are_understood(config):
    script, args, _ = train_agent.parse(["--config", str(config)])
    wanted = yaml.safe_load(config.read_text())
    assert script.env_id == f"vlmq_trl/{wanted['game']}-v0" and args.max_steps == wanted.get("max_steps", -1)
    assert script.online == wanted.get("online", False) == (args.max_env_turns is not None)
    assert args.learning_rate == wanted["learning_rate"]


class Spied(vlmq_trainer.VLMQTrainer):
    """Remembers what the last trainer began with."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        Spied.critic = {name: x.clone() for name, x in self.model.critic.state_dict().items()}
        Spied.processor = self.processing_class


@pytest.mark.parametrize("lora", [False, True], ids=["full", "LoRA"])
def test_an_earlier_runs_model_is_trained_further(lora, model_name, tmp_path, monkeypatch):
    """With its critic, and its own processor."""
    arguments = {**SMALL, "max_steps": 1, "before_episodes": 2, "method": "vlmq", "disable_tqdm": True}
    peft = {"use_peft": True, "lora_target_modules": ["q_proj", "v_proj"]} if lora else {}
    train_agent.main(flags(**arguments, **peft, model_name_or_path=model_name, output_dir=tmp_path / "one"))
    earlier = tmp_path / "one" / "vlmq"
    template = earlier / "chat_template.jinja"
    template.write_text("{# its own #}" + template.read_text())
    monkeypatch.setattr(train_agent, "VLMQTrainer", Spied)
    tested, processors = train_agent.test_model, []
    monkeypatch.setattr(train_agent, "test_model", lambda *a, **kw: processors.append(a[1]) or tested(*a, **kw))
    train_agent.main(flags(**arguments, model_name_or_path=earlier, output_dir=tmp_path / "two"))
    saved = load_file(earlier / "critic.safetensors")
    assert saved.keys() == Spied.critic.keys() and all(torch.equal(Spied.critic[name], saved[name]) for name in saved)
    assert len(processors) == 2  # before training and after
    assert all(p.chat_template.startswith("{# its own #}") for p in (*processors, Spied.processor))


OWN_CODE = """
from transformers import Idefics3Config, Idefics3ForConditionalGeneration

class OwnConfig(Idefics3Config):
    model_type = "own"

class Own(Idefics3ForConditionalGeneration):
    config_class = OwnConfig
"""


def test_remote_code_runs_where_it_is_trusted(model_name, tmp_path):
    own = tmp_path / "own"
    shutil.copytree(model_name, own)
    (own / "own.py").write_text(OWN_CODE)
    config = json.loads((own / "config.json").read_text())
    auto_map = {"AutoConfig": "own.OwnConfig", "AutoModelForImageTextToText": "own.Own"}
    (own / "config.json").write_text(json.dumps({**config, "model_type": "own", "auto_map": auto_map}))
    arguments = {**SMALL, "max_steps": 1, "before_episodes": 2, "method": ["sft", "vlmq"], "disable_tqdm": True}
    argv = flags(**arguments, model_name_or_path=own, output_dir=tmp_path / "out")
    with pytest.raises(ValueError, match="trust_remote_code"):
        train_agent.main([*argv, "--trust_remote_code", "false"])
    assert len(train_agent.main([*argv, "--trust_remote_code"])["methods"]) == 2


def test_paths_in_the_home_folder(model_name, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    shutil.copytree(model_name, tmp_path / "model")
    save_trajectories(collect_demonstrations("vlmq_trl/NumberLine-v0", episodes=2, progress=False), tmp_path / "data")
    paths = {"model_name_or_path": "~/model", "dataset_path": "~/data", "output_dir": "~/out", "replay_dir": "~/play"}
    (tmp_path / "paths.yaml").write_text(yaml.safe_dump({**paths, "online": True, "method": ["vlmq"]}))
    for argv in (flags(**paths, online=True, method="vlmq"), ["--config", str(tmp_path / "paths.yaml")]):
        script, args, model_config = train_agent.parse(argv)
        found = (model_config.model_name_or_path, script.dataset_path, args.output_dir, args.replay_dir)
        assert found == tuple(str(tmp_path / name) for name in ("model", "data", "out", "play"))


def test_defaults_depend_on_the_model(model_name):
    _, embedded, _ = train_agent.parse([])
    _, given, _ = train_agent.parse(["--model_name_or_path", model_name])
    assert embedded.learning_rate == 1e-3 and given.learning_rate == 2e-5
    _, chosen, _ = train_agent.parse(["--learning_rate", "3e-4"])
    assert chosen.learning_rate == 3e-4


def test_few_browsers_at_once(model_name):
    env = ["--env_id", "vlmq_trl/MiniWoB-click-test-v0"]
    for model in ([], ["--model_name_or_path", model_name]):
        script, args, _ = train_agent.parse([*env, *model])
        counts = (script.collection_num_envs, args.eval_num_envs, args.rollout_num_envs)
        assert counts == (4, 4, 4) and args.rollout_workers
    script, args, _ = train_agent.parse([*env, "--eval_num_envs", "2", "--rollout_workers", "false"])
    assert args.eval_num_envs == 2 and not args.rollout_workers
    assert train_agent.parse([])[1].eval_num_envs == 64


def test_epochs_count_where_they_are_given():
    assert train_agent.parse([])[1].max_steps == 600
    assert train_agent.parse(["--num_train_epochs", "1"])[1].max_steps == -1
    assert train_agent.parse(["--num_train_epochs", "1", "--max_steps", "7"])[1].max_steps == 7


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--game", "Chess"], "--game: invalid choice: 'Chess'"),
        (["--game", "EZPoints", "--env_id", "vlmq_trl/Blackjack-v0"], "`game` EZPoints is short for an `env_id`"),
        (["--env_id", "vlmq_trl/Chess-v0"], "no demonstrator for 'vlmq_trl/Chess-v0', which is not registered"),
        (["--env_options", "max_turns"], "an option of the environment is of the form key=value, not 'max_turns'"),
        (
            ["--env_options", "foo=1"],
            "`env_options` foo=1: TextActionEnv.__init__() got an unexpected keyword argument",
        ),
        (["--method", "ppo"], "--method: invalid choice: 'ppo'"),
        (["--method", "sft", "sft"], "name one or several different methods"),
        (
            ["--env_id", "no_module:Chess-v0"],
            "`env_id` no_module:Chess-v0: No module named 'no_module'",
        ),
        (
            ["--max_env_turns", "900", "--offline_steps", "5"],
            "`offline_steps=5`, `max_env_turns=900` would have no effect: set `online`",
        ),
        (["--policy", "drunk"], "policy 'drunk': 'drunk' is not known; use expert, random"),
        (["--episodes", "-1"], "`episodes` is -1; it must be a whole number, at least 0"),
        (["--episodes", "0"], "`episodes` is 0: only `--online` and `--method vlmq` can do without data"),
        (["--online", "--episodes", "0"], "`episodes` is 0: only `--online` and `--method vlmq`"),
        (["--online", "--method", "sft"], "`online` is for the method vlmq"),
        (
            ["--online", "--rollout_seed", "2000100"],
            "`test_seed` 2000000 and its 500 episodes run into `rollout_seed`",
        ),
        (["--sampled_test_episodes", "-3"], "`sampled_test_episodes` is -3; it must be a whole number, at least 1"),
        (["--before_episodes", "-4"], "`before_episodes` is -4; it must be a whole number, at least 0"),
        (["--collection_seed", "-1"], "`collection_seed` is -1; it must be a whole number, at least 0"),
        (["--embedded_steps", "0"], "`embedded_steps` is 0; it must be a whole number, at least 1"),
        (["--stop_at_success", "98"], "`stop_at_success=98.0`: it must lie in (0, 1]"),
        (["--off_policy_trace", "retrace"], "scripted players do not have. Choose 'tree_backup'"),
        (["--save_strategy", "best"], "keeps each method's best weights by success itself"),
        (["--eval_strategy", "epoch"], "Validation comes every `eval_steps` steps: leave `eval_strategy` out"),
        (["--hub_model_id", "me/agent"], "`hub_model_id` me/agent: each of 2 methods would replace the one before"),
        (["--method", "vlmq", "--use_liger_kernel"], "`use_liger_kernel` does nothing for vlmq"),
        (["--lora_r", "8", "--lora_target_modules", "q_proj"], "`lora_r=8`, `lora_target_modules=q_proj` would"),
        (["--report_to", "paper"], "`report_to` paper: the package is not installed, or transformers"),
        (["--record_episodes", "2"], "`record_episodes` would have no effect: the script's validation writes no"),
        (["--resume_from_checkpoint", "nope"], "the same command with the same `output_dir` goes on by itself"),
        (["--model_name_or_path", "/nope/x"], "`model_name_or_path`: There is no folder /nope/x"),
        (["--model_name_or_path", str(ROOT / "docs")], "docs holds no model, neither config.json nor"),
        (["--model_name_or_path", __file__], "test_examples.py is a file; give the folder"),
        (["--config"], "`--config` needs the name of a YAML file"),
        (["--episodes", "many"], "--episodes: invalid int value: 'many'"),
        (["--top_fraction", "2"], "`top_fraction` is 2.0; it must lie in (0, 1]"),
        (["--dataset_path", "/nowhere"], "`dataset_path`: No trajectories at /nowhere"),
        (["--dataset_path", __file__], "test_examples.py: neither a dataset saved by save_trajectories nor parquet"),
        (["--learning_rate", "-1"], "`learning_rate` is -1.0; it must be a number, at least 0"),
        (
            ["--per_device_train_batch_size", "0"],
            "`per_device_train_batch_size` is 0; it must be a number, at least 1",
        ),
        (["--seed", "-1"], "`seed` is -1; it must be a number, at least 0"),
        (["--output_dir", __file__], "test_examples.py is a file: name a folder"),
        (["--gamma", "1.5"], "`gamma=1.5`: it must lie in [0, 1]"),
        (["--eval_steps", "0.5"], "`eval_steps` is 0.5; it must be a whole number of optimiser steps"),
        (["--test_seed", "1000100"], "`eval_seed` 1000000 and its 200 episodes run into `test_seed` 1000100"),
        (["--episodes", "1000001"], "`collection_seed` 0 and its 1000001 episodes run into `eval_seed`"),
        (["--nonsense", "1"], "['--nonsense', '1']"),
        (["--config", "/nowhere.yaml"], "No such file or directory: '/nowhere.yaml'"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_bad_arguments_end_with_a_message(argv, message, capsys):
    with pytest.raises(SystemExit) as stopped:
        train_agent.parse(argv)
    assert stopped.value.code == 2
    printed = capsys.readouterr().err
    assert message in printed and len(printed) < 500


def test_a_bad_value_in_a_file_ends_with_a_message(tmp_path, capsys):
    for text, message in (
        ("game: Chess", "`game` is 'Chess'"),
        ("gmae: NumberLine", "gmae"),
        ("- 1", "YAML mapping"),
        ("episodes: 20.5", "`episodes` is 20.5; it must be a whole number"),
        ("episodes: [", "while parsing"),
        ("episodes: true", "`episodes` is True; it must be a whole number"),
        ("policy: 0.5", "`policy` is 0.5; it must be text"),
        ("policy: [expert, random]", "`policy` is ['expert', 'random']; it must be text"),
        ("env_options: 5", "`env_options` is 5; it must be a list of texts"),
        ("method: 5", "`method` is 5; it must be a list of texts"),
        ("top_fraction: null", "`top_fraction` is None; it must lie in (0, 1]"),
        ("eval_steps: null", "`eval_steps` is None; it must be a whole number"),
    ):
        (tmp_path / "bad.yaml").write_text(text)
        with pytest.raises(SystemExit):
            train_agent.parse(["--config", str(tmp_path / "bad.yaml")])
        assert message in capsys.readouterr().err


@pytest.mark.parametrize("name", ["train_agent", "train_gym_cards"])
def test_the_script_runs_as_a_script(name, model_name, tmp_path):
    arguments = {**SMALL, "before_episodes": 0, "method": "vlmq", "max_steps": 1, "output_dir": tmp_path}
    command = [sys.executable, f"examples/{name}.py", *flags(model_name_or_path=model_name, **arguments)]
    done = subprocess.run(command, cwd=ROOT, env=os.environ, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "NumberLine: success with its 95 % interval" in done.stdout
    assert "Warning" not in done.stderr and "Traceback" not in done.stderr
