# SPDX-License-Identifier: Apache-2.0
"""`VLMAgent`: what a trainer saved, opened and played with."""

import functools
import json

import gymnasium
import numpy as np
import pytest
import torch
from peft import LoraConfig
from transformers import GPT2Config, GPT2LMHeadModel

from tests import small_runs, tiny_models
from tests.small_runs import NUMBER_LINE
from vlmq_trl import (
    AgentFormat,
    AutoModelForImageTextToTextWithValueHead,
    CallableFormat,
    CriticConfig,
    PlainFormat,
    VLMAgent,
    VLMQTrainer,
    episode_metrics,
    make_format,
)
from vlmq_trl.agent import agent_card
from vlmq_trl.collator import SegmentDataset, VLMQDataCollator
from vlmq_trl.rollout import Request
from vlmq_trl.trajectory import validate_trajectories

LORA = LoraConfig(target_modules=r".*text_model.*\.(q_proj|v_proj)", r=4)


def train(folder, family="idefics3", lora=False, **kwargs):
    """Two updates; the trainer, whose model is saved in `folder`."""
    torch.manual_seed(0)
    model, processor = tiny_models.build(family)
    model.save_pretrained(folder / "base")
    processor.save_pretrained(folder / "base")
    model = type(model).from_pretrained(folder / "base")  # so that an adapter knows where its base is
    text = family not in tiny_models.VLM_NAMES
    data = small_runs.text_number_line() if text else small_runs.number_line()
    trainer = VLMQTrainer(
        model,
        small_runs.config(folder / "agent", max_steps=2, **kwargs),
        train_dataset=data,
        eval_env=small_runs.TextNumberLine if text else NUMBER_LINE,
        processing_class=processor,
        peft_config=LORA if lora else None,
    )
    trainer.train()
    trainer.save_model()
    return trainer


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("trained")
    trainer = train(folder, lora=True, critic_type="vocab", off_policy_trace="tree_backup")
    return trainer, folder / "agent"


@pytest.fixture
def seen():
    env = gymnasium.make(NUMBER_LINE)
    observation, _ = env.reset(seed=0)
    return observation, env.unwrapped.task


def test_an_adapter_opens_with_all_it_needs(trained, seen):
    trainer, folder = trained
    agent = VLMAgent.from_pretrained(folder)
    assert agent.env == NUMBER_LINE and agent.max_completion_length == 8 and agent.critic is not None
    assert agent.agent_format == make_format("json_cot", reading_fields=("current number", "target number"))
    answer = agent.act(*seen)
    assert answer.response and answer.value is None
    assert (answer.action, answer.valid) == ("", False)  # it has not learned to speak
    played = episode_metrics(agent.play(episodes=4, seed=trainer.args.eval_seed))
    assert played == {k.removeprefix("eval_"): v for k, v in trainer.evaluate().items() if k[5:] in played}


def test_the_task_is_the_environments(trained, seen, tmp_path):
    """Unless it is given, or another one in each episode."""
    agent = VLMAgent.from_pretrained(trained[1], temperature=0.0)
    observation, task = seen
    assert agent.act(observation) == agent.act(observation, task)
    assert agent.token_values(observation, "+") == agent.token_values(observation, "+", task)
    assert agent.token_values(observation, "+", "") != agent.token_values(observation, "+", task)
    agent.env = "vlmq_trl/BabyAI-GoToObj-v0"
    with pytest.raises(ValueError, match="Give `task`: its environment has none before an episode"):
        agent.act(observation)
    agent.env = None
    with pytest.raises(ValueError, match="Give `task`: the agent's card names no environment"):
        agent.act(observation)


def test_scores_need_a_response_to_each_request(trained):
    agent = VLMAgent.from_pretrained(trained[1])
    with pytest.raises(ValueError, match="3 responses to 2 requests"):
        agent.score([None] * 2, ["a"] * 3, batch_size=2)


def test_the_card_is_json_and_is_checked(trained, tmp_path):
    _, folder = trained
    card = json.loads((folder / "agent.json").read_text())
    assert card["env_id"] == NUMBER_LINE and card["agent_format"]["name"] == "json_cot"
    for text in (
        "[]",
        "{",
        '{"env_kwargs": 3}',
        '{"agent_format": {"name": "telepathy"}}',
        '{"agent_format": {"colour": "red"}}',
    ):
        (tmp_path / "config.json").write_text("{}")
        (tmp_path / "agent.json").write_text(text)
        with pytest.raises(ValueError, match="is not an agent's card"):
            VLMAgent.from_pretrained(tmp_path)


def test_an_environment_with_options(tmp_path):
    """As train_agent.py makes it from `env_options`."""
    trainer = train(tmp_path)
    trainer.eval_env = functools.partial(gymnasium.make, NUMBER_LINE, invalid_penalty=7.0)
    trainer.__dict__.pop("_agent_card")
    trainer.save_model()
    trainer.create_model_card()
    assert f'gymnasium.make("{NUMBER_LINE}", invalid_penalty=7.0)' in (tmp_path / "agent" / "README.md").read_text()
    (episode,) = VLMAgent.from_pretrained(tmp_path / "agent").play(max_turns=1)
    assert episode.turns[0].reward == -7.0  # it has not learned to speak
    card = agent_card(functools.partial(gymnasium.make, NUMBER_LINE, wrapper=print), PlainFormat(), 8)
    assert (card["env_id"], card["env_kwargs"]) == (None, {})


@pytest.mark.parametrize("family", ["idefics3", "llama"])
def test_legal_actions_only(family, seen, tmp_path):
    """An untrained model then plays nothing else: in the trainer's evaluations, in collection, and once saved."""
    model, processor = tiny_models.build(family)
    text = family == "llama"
    env = functools.partial(small_runs.TextNumberLine) if text else NUMBER_LINE
    trainer = VLMQTrainer(
        model,
        small_runs.config(tmp_path, legal_actions_only=True, max_steps=2, turns_per_round=4, rollout_num_envs=2),
        env=env,
        processing_class=processor,
        agent_format=PlainFormat(),
    )
    assert trainer.evaluate()["eval_valid_rate"] == 1
    trainer.train()
    (rounds,) = [entry for entry in trainer.state.log_history if "rollout_round" in entry][-1:]
    assert rounds["rollout_valid_rate"] == 1
    trainer.save_model()
    agent = VLMAgent.from_pretrained(tmp_path, env=env)
    assert (
        agent.legal_actions_only
        and not VLMAgent.from_pretrained(tmp_path, legal_actions_only=False).legal_actions_only
    )
    for best_of in (1, 2):
        assert episode_metrics(agent.play(episodes=2, best_of=best_of))["valid_rate"] == 1
    # In another format than its own, each call.
    fmt = CallableFormat(
        parse_fn=lambda text: text.removeprefix("<a>") if text.startswith("<a>") else None,
        render_fn=lambda action, reading, thoughts: f"<a>{action}",
    )
    agent.agent_format = None
    for best_of in (1, 2):
        (episode,) = agent.play(env, episodes=1, best_of=best_of, agent_format=fmt)
        assert episode.valid_rate == 1 and all(turn.completion.startswith("<a>") for turn in episode.turns)
    agent.agent_format = PlainFormat()
    if not text:
        assert agent.act(*seen, legal_actions=["+"]).action == "+"
        with pytest.raises(ValueError, match="say which there are, by `legal_actions`"):
            agent.act(*seen)


def test_functions_of_ones_own_are_asked_for(tmp_path, seen):
    """They are not saved, and the environment's own format is not what the model has learned."""
    trainer = train(tmp_path)
    own = CallableFormat(parse_fn=lambda text: "+")
    for env in (NUMBER_LINE, lambda: gymnasium.make(NUMBER_LINE)):
        trainer.agent_format, trainer.eval_env = own, env
        trainer.__dict__.pop("_agent_card")
        trainer.save_model()
        assert json.loads((tmp_path / "agent" / "agent.json").read_text())["agent_format"] == {"name": "custom"}
        agent = VLMAgent.from_pretrained(tmp_path / "agent", env=None if env is NUMBER_LINE else env)
        for ask, given in ((agent.act, seen), (agent.play, ()), (agent.token_values, (seen[0], "+", seen[1]))):
            with pytest.raises(ValueError, match=r"functions of your own.* Give `agent_format`"):
                ask(*given)
        (episode,) = agent.play(agent_format=own, max_turns=1)
        assert episode.turns[0].action == "+"
        agent.agent_format = own
        assert agent.act(*seen).action == "+" and agent.token_values(seen[0], "+", seen[1])
    with pytest.raises(ValueError, match="Give `env`"):
        VLMAgent.from_pretrained(tmp_path / "agent").play()
    mine = VLMAgent.from_pretrained(tmp_path / "agent", agent_format=own)
    assert mine.act(*seen).action == "+"


def test_acting_leaves_other_environments_their_own_format(trained, seen):
    """NumberLine's format, found for `act`, is not the one that Blackjack is played in."""
    trainer, _ = trained
    agent = VLMAgent(trainer.model.pretrained_model, trainer.processing_class, env=NUMBER_LINE)

    def asked():
        (episode,) = agent.play("vlmq_trl/Blackjack-v0", max_turns=1)
        return episode.turns[0].prompt

    before = asked()
    agent.act(*seen)
    assert asked() == before and agent.agent_format is None


@pytest.mark.parametrize("name", [None, "", 3])
def test_a_name_that_is_none(name):
    with pytest.raises(TypeError, match="A model's name is that of a folder, or of a repository on the Hub; got"):
        VLMAgent.from_pretrained(name)


def test_a_format_that_gives_no_action(trained, seen):
    trainer, _ = trained

    class Broken(AgentFormat):
        def parse(self, response):
            return response

    agent = VLMAgent(trainer.model.pretrained_model, trainer.processing_class, Broken())
    with pytest.raises(TypeError, match=r"Broken\.parse gave '"):
        agent.act(*seen)


def test_without_a_critic_there_are_no_values(trained, seen):
    trainer, _ = trained
    agent = VLMAgent(trainer.model.pretrained_model, trainer.processing_class, env=NUMBER_LINE)
    with pytest.raises(ValueError, match="There is no critic beside this model"):
        agent.token_values(seen[0], "+", seen[1])
    scored = VLMAgent(trainer.model, trainer.processing_class, env=NUMBER_LINE)
    with pytest.raises(TypeError, match=r"A response must be a string, such as `Answer\.response`, got None"):
        scored.token_values(seen[0], None, seen[1])
    with pytest.raises(ValueError, match="`best_of=3`: it must be at least 1, and above 1 it needs a critic"):
        agent.act(*seen, best_of=3)


@pytest.mark.parametrize("family", [*tiny_models.VLM_NAMES, *tiny_models.TEXT_NAMES])
def test_token_values_are_those_of_the_training(family, tmp_path):
    """Q, V and log-probabilities of data rows, as the trainer's own collator and model give them."""
    trainer = train(tmp_path, family)
    # With the processor at hand: some of these families' are of a class of the tests' own.
    opened = AutoModelForImageTextToTextWithValueHead.from_pretrained(tmp_path / "agent")
    agent = VLMAgent(opened, trainer.processing_class)
    data, model, critic = trainer.train_dataset, trainer.model.eval(), trainer.model.critic
    rows = [0, 3, 5]
    items = SegmentDataset(data, validate_trajectories(data), 1.0).__getitems__(rows)
    batch = VLMQDataCollator(trainer.processing_class)(items)
    inputs = {k: v for k, v in batch.items() if not k.startswith(("turn_", "segment_"))}
    with torch.no_grad():
        output = model(**inputs)
    requests, responses = [], []
    for k in rows:
        images = [np.asarray(image) for image in data[k].get("images") or ()]
        requests.append(Request(None, data[k]["prompt"], images, np.random.default_rng(0)))
        responses.append(data[k]["completion"][0]["content"])
    responses = [text if isinstance(text, str) else text[0]["text"] for text in responses]
    scored = agent.score(requests, responses, batch_size=2)
    values = [value for row in scored for value in row]
    q = critic.target_mean + critic.target_std * output.q_values.mean(-1)
    v = critic.target_mean + critic.target_std * output.state_values.mean(-1)
    assert [value.log_prob for value in values] == pytest.approx(output.log_probs.tolist(), abs=1e-4)
    assert [value.q for value in values] == pytest.approx(q.tolist(), abs=1e-4)
    assert [value.v for value in values] == pytest.approx(v.tolist(), abs=1e-4)
    assert [value.advantage for value in values] == pytest.approx((q - v).tolist(), abs=1e-4)
    for row, response in zip(scored, responses, strict=True):
        assert "".join(value.token for value in row[:-1]).strip() == response.strip()


def test_a_models_absolute_positions_are_those_of_the_training():
    """GPT-2 counts them from a row's first column: what is scored beside a longer row is as when it is alone."""
    torch.manual_seed(0)
    tokenizer = tiny_models.make_tokenizer()
    tokenizer.chat_template = tiny_models.chat_template()
    config = GPT2Config(vocab_size=len(tokenizer), n_embd=64, n_layer=2, n_head=4, initializer_range=0.1)
    agent = VLMAgent(AutoModelForImageTextToTextWithValueHead(GPT2LMHeadModel(config), CriticConfig()), tokenizer)
    prompts = [[{"role": "user", "content": text}] for text in ("up", "a much longer question about the numbers")]
    requests = [Request(None, prompt, [], np.random.default_rng(0)) for prompt in prompts]
    together, alone = agent.score(requests, ["+", "-"]), agent.score(requests, ["+", "-"], batch_size=1)
    for values, expected in zip(together, alone, strict=True):
        assert [v.token for v in values] == [v.token for v in expected] and len(values) == 2
        for name in ("log_prob", "q", "v"):
            assert [getattr(v, name) for v in values] == pytest.approx([getattr(v, name) for v in expected], abs=1e-4)


def test_best_of_n_takes_the_response_of_the_highest_q(trained, seen):
    _, folder = trained
    agent = VLMAgent.from_pretrained(folder)
    torch.manual_seed(3)
    best = agent.act(*seen, best_of=6)
    policy = VLMAgent.from_pretrained(folder, temperature=1.0).policy()
    torch.manual_seed(3)
    prompt, images = agent.agent_format.build_prompt(seen[1], seen[0])
    request = Request(None, prompt, images, np.random.default_rng(0))
    responses = [response.text for response in policy.act([request] * 6)]
    q = [row[-1].q for row in agent.score([request] * 6, responses)]
    assert len(set(responses)) > 1 and best.response == responses[int(np.argmax(q))]
    assert best.value == pytest.approx(max(q), abs=1e-5)
    assert len(agent.play(episodes=2, best_of=2)) == 2
