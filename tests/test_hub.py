# SPDX-License-Identifier: Apache-2.0
"""What would be uploaded, and what is opened: the critic goes along, and no pickle goes in or out.

No Hub can be reached here, so the calls that would reach one are replaced, and uploads recorded with their files.
"""

import copy
import fnmatch
from concurrent.futures import Future
from pathlib import Path

import pytest
import torch
from huggingface_hub import HfApi
from peft import LoraConfig, PeftModel
from safetensors.torch import load_file
from transformers import AutoProcessor

from tests import tiny_models
from tests.small_runs import TextNumberLine, config, number_line, text_number_line
from vlmq_trl.critic import CriticConfig
from vlmq_trl.modeling import AutoModelForImageTextToTextWithValueHead as ValueHeadModel
from vlmq_trl.modeling import load_pretrained, load_processor
from vlmq_trl.vlmq_trainer import VLMQTrainer

LORA = LoraConfig(r=4, target_modules=["q_proj", "v_proj"])
CRITIC = {"critic.safetensors", "critic_config.json"}


@pytest.fixture
def uploads(monkeypatch):
    """[{"repo_id": ..., "files": ..., ...}] of all uploads."""
    seen = []

    def create_repo(self, repo_id, **kwargs):
        return type("Url", (), {"repo_id": f"me/{repo_id}" if "/" not in repo_id else repo_id})

    def upload_folder(self, *, folder_path, ignore_patterns=(), run_as_future=False, **kwargs):
        root = Path(folder_path)
        files = {str(file.relative_to(root)) for file in root.rglob("*") if file.is_file()}
        kept = {f for f in files if not any(fnmatch.fnmatch(f, pattern) for pattern in ignore_patterns)}
        seen.append({**kwargs, "files": kept, "token": self.token})
        done: Future = Future()
        done.set_result(None)
        return done if run_as_future else "the commit"

    monkeypatch.setattr(HfApi, "create_repo", create_repo)
    monkeypatch.setattr(HfApi, "create_branch", lambda self, repo_id, *, branch, exist_ok: None)
    monkeypatch.setattr(HfApi, "upload_folder", upload_folder)
    monkeypatch.setattr(HfApi, "file_exists", lambda self, repo_id, filename, **kwargs: False)
    return seen


def wrapped(peft_config=None):
    model, processor = tiny_models.build("llama")
    if peft_config is not None:
        model = PeftModel(model, peft_config)
    return ValueHeadModel(model, CriticConfig()), processor


@pytest.mark.parametrize("peft_config", [None, LORA], ids=["full", "LoRA"])
def test_push_to_hub_brings_the_critic(uploads, peft_config):
    model, _ = wrapped(peft_config)
    assert model.push_to_hub("agent", private=True, token="secret", revision="next") == "the commit"
    (upload,) = uploads
    assert upload["repo_id"] == "me/agent" and upload["revision"] == "next" and upload["token"] == "secret"
    stock = "adapter_model.safetensors" if peft_config else "model.safetensors"
    assert CRITIC | {stock} <= upload["files"]
    assert not any(file.endswith(".bin") for file in upload["files"])


def test_no_whole_model_beside_an_adapter(uploads, tmp_path, monkeypatch):
    """It would never be opened."""
    there = {("me/agent", "adapter_config.json")}
    monkeypatch.setattr(HfApi, "file_exists", lambda self, repo_id, filename, **kwargs: (repo_id, filename) in there)
    refused = pytest.raises(ValueError, match="me/agent holds an adapter, and whoever opens it would get that")
    model, processor = wrapped()
    with refused:
        model.push_to_hub("me/agent")
    options = {"push_to_hub": True, "hub_model_id": "me/agent"}
    data = text_number_line()
    with refused:
        VLMQTrainer(model, config(tmp_path, **options), train_dataset=data, processing_class=processor)
    assert not uploads
    adapter, processor = wrapped(LORA)
    adapter.push_to_hub("me/agent")
    trainer = VLMQTrainer(adapter, config(tmp_path, **options), train_dataset=data, processing_class=processor)
    assert trainer.hub_model_id == "me/agent" and len(uploads) == 1


@pytest.mark.parametrize("replay_dir", [None, "deep/er", "../elsewhere"])
def test_the_training_data_stay_here(replay_dir, uploads, tmp_path):
    """The replay buffer and the recorded episodes, after a save and at the end."""
    model, processor = tiny_models.build("llama")
    folder, out = None if replay_dir is None else str(tmp_path / "out" / replay_dir), tmp_path / "out"
    rounds = {"turns_per_round": 20, "updates_per_turn": 0.1, "rollout_num_envs": 2, "replay_dir": folder}
    seen = {"eval_strategy": "steps", "eval_steps": 2, "record_episodes": 1, "eval_episodes": 2}
    hub = {"push_to_hub": True, "hub_model_id": "me/agent", "save_strategy": "steps", "save_steps": 2}
    args = config(out, max_steps=2, **rounds, **seen, **hub)
    trainer = VLMQTrainer(model, args, text_number_line(), env=TextNumberLine, processing_class=processor)
    trainer.train()
    assert trainer.push_to_hub(token="secret", revision="next", commit_message="done") == "the commit"
    assert list((out / "episodes").iterdir()) and list(Path(folder or out / "replay").rglob("*.arrow"))
    during, last = uploads
    assert (last["token"], last["revision"], last["commit_message"]) == ("secret", "next", "done")
    assert not [file for upload in (during, last) for file in upload["files"] if "/" in file]
    assert CRITIC | {"model.safetensors", "README.md", "agent.json"} <= last["files"]


def test_other_processes_do_not_push(uploads, tmp_path, monkeypatch):
    model, processor = tiny_models.build("llama")
    trainer = VLMQTrainer(model, config(tmp_path), text_number_line(), processing_class=processor)
    monkeypatch.setattr(trainer, "is_world_process_zero", lambda: False)
    trainer._push_from_checkpoint(str(tmp_path))  # there is no `push_in_progress` either
    assert uploads == []


def test_saving_with_push_to_hub_uploads_last(uploads, tmp_path):
    model, _ = wrapped()
    (tmp_path / "agent").mkdir()
    (tmp_path / "agent" / "notes.txt").write_text("not to be uploaded")
    model.save_pretrained(tmp_path / "agent", push_to_hub=True, commit_message="first")
    (upload,) = uploads
    assert upload["repo_id"] == "me/agent" and upload["commit_message"] == "first"
    assert upload["files"] >= CRITIC and "notes.txt" not in upload["files"]
    assert {file.name for file in (tmp_path / "agent").iterdir()} >= CRITIC


@pytest.mark.parametrize("peft_config", [None, LORA], ids=["full", "LoRA"])
@pytest.mark.parametrize("hub_strategy", ["every_save", "checkpoint", "end"])
def test_each_save_brings_the_critic(uploads, hub_strategy, peft_config, tmp_path):
    model, processor = tiny_models.build("llama")
    args = config(
        tmp_path / "out",
        max_steps=2,
        save_strategy="steps",
        save_steps=1,
        push_to_hub=True,
        hub_model_id="me/agent",
        hub_strategy=hub_strategy,
    )
    trainer = VLMQTrainer(
        model=model,
        args=args,
        train_dataset=text_number_line(),
        processing_class=processor,
        peft_config=peft_config,
    )
    trainer.train()
    during = list(uploads)
    stock = "adapter_model.safetensors" if peft_config else "model.safetensors"
    main = [upload for upload in during if "path_in_repo" not in upload]
    assert len(main) == (0 if hub_strategy == "end" else 2)
    for upload in main:
        assert CRITIC | {stock, "vlmq_config.json", "tokenizer.json"} <= upload["files"]
        assert not [file for file in upload["files"] if file.endswith((".bin", ".pt", ".pth"))]
        assert upload["repo_id"] == "me/agent" and "Training in progress, step" in upload["commit_message"]
        assert "README.md" in upload["files"]
    card = (tmp_path / "out" / "README.md").read_text()  # and not the template that PEFT puts beside an adapter
    assert 'VLMAgent.from_pretrained("me/agent")' in card and "[More Information Needed]" not in card
    if hub_strategy == "checkpoint":
        last = [upload for upload in during if upload.get("path_in_repo") == "last-checkpoint"]
        assert len(last) == 2 and {"optimizer.pt", "trainer_state.json", *CRITIC} <= last[-1]["files"]
    trainer.push_to_hub()
    assert CRITIC | {stock, "README.md"} <= uploads[-1]["files"]


def test_no_token_is_written(adapter, tmp_path):
    """Neither the configuration's own nor that of `model_init_kwargs`, wherever it stands; the model gets it."""
    secret = "hf_" + "s" * 34
    args = config(
        tmp_path / "out",
        max_steps=1,
        save_strategy="steps",
        save_steps=1,
        report_to="tensorboard",
        hub_token=secret,
        model_init_kwargs={"token": secret, "dtype": "float32", "more": [{"use_auth_token": secret}]},
    )
    given = args.to_dict()["model_init_kwargs"]
    assert given == {"token": "<TOKEN>", "dtype": "float32", "more": [{"use_auth_token": "<USE_AUTH_TOKEN>"}]}
    assert args.model_init_kwargs["token"] == secret
    args.eos_token = "<|im_end|>"  # no secret: it decides where the agent stops
    assert (args.to_dict()["eos_token"], args.to_dict()["pad_token"]) == ("<|im_end|>", None)
    del args.model_init_kwargs["more"]
    trainer = VLMQTrainer(str(adapter / "adapter"), args, text_number_line())
    trainer.train()
    trainer.save_model()
    trainer.create_model_card()
    files = [file for file in (tmp_path / "out").rglob("*") if file.is_file()]
    assert sum(file.name == "vlmq_config.json" for file in files) == 2
    assert any(file.name.startswith("events.out") for file in files)
    assert not [file for file in files if secret.encode() in file.read_bytes()]


# ---- what is opened ----


def as_pickle(folder, name):
    torch.save(load_file(folder / f"{name}.safetensors"), folder / f"{name}.bin")
    (folder / f"{name}.safetensors").unlink()


@pytest.fixture
def no_pickle(monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("torch.load was called")

    return lambda: monkeypatch.setattr(torch, "load", refuse)


@pytest.fixture
def adapter(tmp_path):
    """An adapter with its critic, and the base model that it names."""
    model, processor = tiny_models.build("llama")
    model.save_pretrained(tmp_path / "base")
    processor.save_pretrained(tmp_path / "base")
    trainer = VLMQTrainer(
        model=str(tmp_path / "base"),
        args=config(tmp_path / "run", max_steps=1, save_strategy="steps", save_steps=1),
        train_dataset=text_number_line(),
        peft_config=LORA,
    )
    trainer.train()
    trainer.save_model(tmp_path / "adapter")
    return tmp_path


def test_a_pickled_adapter_is_not_opened(adapter, no_pickle):
    for folder in (adapter / "adapter", adapter / "run" / "checkpoint-1"):
        as_pickle(folder, "adapter_model")
    no_pickle()
    for call in (
        lambda: ValueHeadModel.from_pretrained(adapter / "adapter"),
        lambda: VLMQTrainer(str(adapter / "adapter"), config(adapter / "new"), text_number_line()),
        lambda: VLMQTrainer(
            str(adapter / "base"), config(adapter / "new"), text_number_line(), peft_config=LORA
        )._load_from_checkpoint(str(adapter / "run" / "checkpoint-1")),
    ):
        with pytest.raises(OSError, match=r"has no adapter_model\.safetensors\. An adapter in a pickle is not opened"):
            call()


def test_a_pickled_model_is_not_opened(adapter, no_pickle):
    as_pickle(adapter / "base", "model")
    no_pickle()
    for call in (
        lambda: load_pretrained(str(adapter / "base")),
        lambda: VLMQTrainer(str(adapter / "base"), config(adapter / "new"), text_number_line()),
    ):
        with pytest.raises(OSError, match=r"model\.safetensors"):
            call()


def test_an_adapter_opens_with_the_users_arguments_and_its_own_processor(adapter):
    processor = AutoProcessor.from_pretrained(adapter / "base")
    processor.chat_template = "{# its own #}" + processor.chat_template
    processor.save_pretrained(adapter / "adapter")
    args = config(adapter / "new", model_init_kwargs={"dtype": "bfloat16", "attn_implementation": "eager"})
    trainer = VLMQTrainer(str(adapter / "adapter"), args, text_number_line())
    assert trainer.model.dtype == torch.bfloat16 and trainer.model.critic.target_mean.dtype == torch.float32
    assert trainer.model.config._attn_implementation == "eager"
    assert trainer.processing_class.chat_template.startswith("{# its own #}")
    assert args.model_init_kwargs == {"dtype": "bfloat16", "attn_implementation": "eager"}
    assert all(p.requires_grad for name, p in trainer.model.named_parameters() if "lora_" in name)
    # Without a processor of its own, the base model's.
    for file in (adapter / "adapter").iterdir():
        if file.name not in CRITIC and not file.name.startswith("adapter"):
            file.unlink()
    assert VLMQTrainer(str(adapter / "adapter"), config(adapter / "new"), text_number_line()).processing_class


def test_the_critic_comes_from_the_same_revision(adapter, tmp_path):
    """A repository in the Hub's cache whose two revisions hold different critics."""
    cache = tmp_path / "cache"
    repository = cache / "models--me--agent"
    means = {}
    for k, revision in enumerate(("main", "v1")):
        model = ValueHeadModel.from_pretrained(adapter / "adapter")
        model.critic.target_mean.fill_(float(k + 5))
        snapshot = repository / "snapshots" / (f"{k}" * 40)
        model.save_pretrained(snapshot)
        AutoProcessor.from_pretrained(adapter / "base").save_pretrained(snapshot)
        (repository / "refs").mkdir(exist_ok=True)
        (repository / "refs" / revision).write_text(f"{k}" * 40)
    for revision in ("main", "v1"):
        where = {"revision": revision, "cache_dir": str(cache), "local_files_only": True}
        trainer = VLMQTrainer("me/agent", config(tmp_path / "new", model_init_kwargs=where), text_number_line())
        means[revision] = trainer.model.critic.target_mean.item()
    assert means == {"main": 5.0, "v1": 6.0}


def test_an_adapter_says_on_which_revision_of_its_base_it_was_trained(tmp_path, monkeypatch):
    """A base model in the Hub's cache with two revisions of other weights."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    repository = tmp_path / "cache" / "models--me--base"
    for k, revision in enumerate(("main", "v1")):
        parts = tiny_models.build("llama", seed=k)
        parts[1].chat_template = f"{{# {revision} #}}{parts[1].chat_template}"
        for part in parts:
            part.save_pretrained(repository / "snapshots" / (f"{k}" * 40))
        (repository / "refs").mkdir(exist_ok=True)
        (repository / "refs" / revision).write_text(f"{k}" * 40)
    where = {"revision": "v1", "local_files_only": True}
    args, peft_config = config(tmp_path / "out", model_init_kwargs=where), copy.copy(LORA)
    trainer = VLMQTrainer("me/base", args, text_number_line(), peft_config=peft_config)
    trainer.save_model()
    opened = load_pretrained(tmp_path / "out", local_files_only=True)
    trained = trainer.model.pretrained_model.get_base_model().lm_head.weight
    assert torch.equal(opened.get_base_model().lm_head.weight, trained)
    (tmp_path / "out" / "tokenizer_config.json").unlink()
    tokenizer = load_processor(tmp_path / "out", opened.config, local_files_only=True)
    assert tokenizer.chat_template.startswith("{# v1 #}")
    assert peft_config.revision is None  # the user's own stays as it is


def test_an_adapter_without_a_base_model(adapter):
    path = adapter / "adapter" / "adapter_config.json"
    path.write_text(path.read_text().replace(f'"{adapter / "base"}"', "null"))
    with pytest.raises(ValueError, match="does not say which model the adapter belongs to"):
        ValueHeadModel.from_pretrained(adapter / "adapter")


def test_an_adapter_whose_base_model_is_gone(adapter):
    (adapter / "base").rename(adapter / "moved")
    for call in (load_pretrained, ValueHeadModel.from_pretrained):
        with pytest.raises(
            OSError, match=r"cannot be opened without its base model\. There is no folder .*/base\. Put"
        ):
            call(adapter / "adapter")


def test_a_named_adapter_resumes(tmp_path):
    """PEFT would save any adapter but "default" in a folder of its own."""

    def trainer(steps):
        model, processor = tiny_models.build("idefics3")
        torch.manual_seed(0)
        named = PeftModel(model, LORA, adapter_name="agent")
        args = config(tmp_path, max_steps=steps, save_strategy="steps", save_steps=1)
        return VLMQTrainer(named, args, number_line(), processing_class=processor)

    straight = trainer(2)
    straight.train()
    again = trainer(2)
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
    for key, value in straight.model.state_dict().items():
        assert torch.equal(again.model.state_dict()[key], value), key


@pytest.mark.parametrize("peft_config", [None, LORA], ids=["full", "LoRA"])
def test_a_checkpoint_that_is_not_there_is_not_looked_for_elsewhere(peft_config, tmp_path):
    model, processor = tiny_models.build("llama")
    trainer = VLMQTrainer(
        model, config(tmp_path, max_steps=1), text_number_line(), processing_class=processor, peft_config=peft_config
    )
    with pytest.raises(ValueError, match="Can't find a valid checkpoint at someone/agent"):
        trainer.train(resume_from_checkpoint="someone/agent")
