# SPDX-License-Identifier: Apache-2.0
"""A model as a policy: batches, stop tokens, log-probabilities of what was sampled, evaluation."""

import math
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model

from tests import tiny_models
from tests.small_runs import NUMBER_LINE
from vlmq_trl.agent_format import JSONCoTFormat, JSONFormat, PlainFormat
from vlmq_trl.chat import completion_tokens, stop_token_ids, turn_opening
from vlmq_trl.collator import SegmentDataset, VLMQDataCollator
from vlmq_trl.modeling import AutoModelForImageTextToTextWithValueHead
from vlmq_trl.policy import ActionLogits, ModelPolicy, evaluate_model
from vlmq_trl.rollout import Request, Response
from vlmq_trl.trajectory import Episode, Turn, dataset_from_episodes, validate_trajectories


def requests_for(texts: list[str], name: str) -> list[Request]:
    rng = np.random.default_rng(0)
    requests = []
    for text in texts:
        observation = {"text": text}
        if name in tiny_models.VLM_NAMES:
            observation["image"] = rng.integers(0, 255, (64, 64, 3), dtype=np.uint8)
        prompt, images = PlainFormat().build_prompt("", observation)
        requests.append(Request(None, prompt, images, rng))
    return requests


TEXTS = ["red", "what colour is the square? " * 4, "up", "left right left", "hit or stand?"]


def answers(policy: ModelPolicy, requests: list[Request]) -> list[str]:
    return [response.text for response in policy.act(requests)]


@pytest.mark.parametrize("name", ["idefics3", "llama"])
def test_greedy_answers(name):
    """Batch size, padding and memory do not change greedy answers; equal requests are generated once."""
    model, processor = tiny_models.build(name)
    model.eval()
    requests = requests_for(TEXTS, name)
    policy = ModelPolicy(model, processor, max_completion_length=8)
    expected = answers(policy, requests)
    assert len(set(expected)) > 1
    alone = [answers(ModelPolicy(model, processor, max_completion_length=8), [r])[0] for r in requests]
    assert alone == expected
    for batch_size in (1, 2, 64):
        forgetful = ModelPolicy(model, processor, max_completion_length=8, batch_size=batch_size)
        forgetful.memory = None
        assert answers(forgetful, requests) == expected
    generated = []
    policy._generate = lambda rows: generated.extend(rows) or [Response("new")] * len(rows)
    new = requests_for([*TEXTS, "new", "new"], name)[len(TEXTS) :]
    if name == "idefics3":  # the same words with another picture are another request
        assert answers(policy, [*requests, *new, new[0]]) == [*expected, "new", "new", "new"] and len(generated) == 2
    else:
        assert answers(policy, [*requests, *new]) == [*expected, "new", "new"] and len(generated) == 1


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("wrapper", ["none", "LoRA", "critic"])
def test_the_models_own_generation_config_does_not_count(wrapper, temperature):
    model, processor = tiny_models.build("llama")
    own = model.generation_config
    if wrapper == "LoRA":
        model = get_peft_model(model, LoraConfig(target_modules=["q_proj"]))
    elif wrapper == "critic":
        model = AutoModelForImageTextToTextWithValueHead(model)
    requests = requests_for(TEXTS, "llama")

    def answer():
        torch.manual_seed(0)
        policy = ModelPolicy(
            model, processor, temperature=temperature, max_completion_length=8, logprobs=temperature > 0
        )
        return policy.act(requests)

    expected = answer()
    first = [processor(response.text, add_special_tokens=False)["input_ids"][0] for response in expected]
    for settings in (
        {"repetition_penalty": 5.0, "no_repeat_ngram_size": 1, "min_length": 50, "min_new_tokens": 8},
        {"min_p": 0.9, "typical_p": 0.1, "top_k": 1, "top_p": 0.1, "top_h": 0.1, "temperature": 0.1},
        {"suppress_tokens": first, "begin_suppress_tokens": first, "bad_words_ids": [[token] for token in first]},
        {"sequence_bias": [[[token], -10.0] for token in first], "encoder_repetition_penalty": 3.0},
        {"forced_eos_token_id": tiny_models.END_ID, "exponential_decay_length_penalty": (1, 5.0)},
        {"guidance_scale": 2.0},
        {"num_beams": 3, "num_return_sequences": 2},
        {"max_time": 1e-9, "max_length": 5},
        {"return_dict_in_generate": True, "output_scores": True},
        {"stop_strings": ["a"]},
        {"prompt_lookup_num_tokens": 3},
    ):
        before = own.to_dict()
        own.update(**settings)
        assert answer() == expected, settings
        own.update(**{name: before[name] for name in settings})


def test_sampled_answers_follow_the_seed():
    model, processor = tiny_models.build("llama")
    requests = requests_for(["red"] * 4, "llama")

    def sample(seed):
        torch.manual_seed(seed)
        return answers(ModelPolicy(model, processor, temperature=1.0, max_completion_length=8), requests)

    assert sample(0) == sample(0) != sample(1)
    assert len(set(sample(0))) == 4, "equal requests are sampled independently"


def test_stop_tokens():
    """The tokenizer's, the generation config's, and the one that closes an assistant's turn in the template."""
    model, processor = tiny_models.build("idefics3")
    assert stop_token_ids(processor, model.generation_config) == [tiny_models.END_ID]
    utterance = processor.tokenizer.convert_tokens_to_ids("<end_of_utterance>")
    processor.chat_template = processor.chat_template.replace(tiny_models.END, "<end_of_utterance>")
    assert stop_token_ids(processor, model.generation_config) == sorted([tiny_models.END_ID, utterance])
    model.generation_config.eos_token_id = [tiny_models.END_ID, 7]
    assert stop_token_ids(processor, model.generation_config) == sorted([tiny_models.END_ID, 7, utterance])
    # A template that adds plain text after the answer has no end token of its own.
    processor.chat_template = processor.chat_template.replace("<end_of_utterance>", "\n")
    assert stop_token_ids(processor, model.generation_config) == [tiny_models.END_ID, 7]


def test_generation_stops_at_the_template_s_end():
    """A model that only says `<end_of_utterance>`, which is not its `eos_token`, gives empty answers of one token."""
    model, processor = tiny_models.build("idefics3")
    utterance = processor.tokenizer.convert_tokens_to_ids("<end_of_utterance>")
    processor.chat_template = processor.chat_template.replace(tiny_models.END, "<end_of_utterance>")
    head = torch.nn.Linear(model.lm_head.in_features, model.lm_head.out_features)
    torch.nn.init.zeros_(head.weight)
    head.bias.data = torch.nn.functional.one_hot(torch.tensor(utterance), head.out_features).float()
    model.set_output_embeddings(head)
    policy = ModelPolicy(model, processor, max_completion_length=8)
    lengths = []
    generate = model.generate
    model.generate = lambda **kw: lengths.append(kw["input_ids"].shape[1]) or generate(**kw)
    decode = policy.tokenizer.batch_decode
    policy.tokenizer.batch_decode = lambda tokens, **kw: lengths.append(tokens.shape[1]) or decode(tokens, **kw)
    assert answers(policy, requests_for(["red"], "idefics3")) == [""]
    assert lengths[1] == 1


def test_evaluation_leaves_no_trace():
    """Mode and random state stay; equal seeds give equal results."""
    model, processor = tiny_models.build("idefics3")
    model.train()
    state = torch.get_rng_state()

    def play(**kwargs):
        return evaluate_model(model, processor, NUMBER_LINE, episodes=3, num_envs=2, max_completion_length=4, **kwargs)

    assert play(temperature=1.0, seed=3) == play(temperature=1.0, seed=3)
    assert model.training and torch.equal(torch.get_rng_state(), state)
    model.eval()
    play()
    assert not model.training


# ---- log-probabilities of what was sampled ----


@pytest.mark.parametrize("temperature", [1.0, 0.5])
@pytest.mark.parametrize("name", ["idefics3", "qwen2_5_vl", "llama"])
def test_log_probs_are_those_that_training_sees(name, temperature):
    """What is recorded while sampling, in one padded batch, equals what the collator and the model make of the row."""
    model, processor = tiny_models.build(name)
    model.eval()
    requests = requests_for(TEXTS * 8, name)
    policy = ModelPolicy(model, processor, temperature=temperature, max_completion_length=3, logprobs=True)
    torch.manual_seed(0)
    responses = policy.act(requests)
    known = [i for i, response in enumerate(responses) if response.behavior_logprobs is not None]
    # A random model's tokens seldom are those that its text has when it is tokenised again.
    assert 3 <= len(known) < len(requests)
    assert (policy.responses, policy.retokenized) == (len(requests), len(requests) - len(known))

    turns = [
        Turn(r.prompt, r.images, a.text, 0.0, behavior_logprobs=a.behavior_logprobs)
        for r, a in zip(requests, responses, strict=True)
    ]
    episodes = [Episode(str(i), (turns[i],), True, False) for i in known]
    dataset = dataset_from_episodes(episodes)
    items = SegmentDataset(dataset, validate_trajectories(dataset), gamma=1.0).__getitems__(list(range(len(dataset))))
    batch = VLMQDataCollator(processor)(items)
    recorded = batch["behavior_log_probs"]
    scored = score(model, batch, temperature)
    sampled = ~recorded.isnan()
    assert sampled.sum() >= len(known) and torch.allclose(recorded[sampled], scored[sampled], atol=1e-4)


class AfterFirst(PlainFormat):
    """The action begins after the first token."""

    def reaches_action(self, response: str) -> bool:
        return bool(response)


def test_the_action_has_a_temperature_of_its_own():
    """Until a response comes to its action the one temperature holds, row by row, and from there the other; the
    recorded log-probabilities say so."""
    model, processor = tiny_models.build("llama")
    letter = processor("q", add_special_tokens=False)["input_ids"]
    head = torch.nn.Linear(model.lm_head.in_features, model.lm_head.out_features)
    torch.nn.init.zeros_(head.weight)
    head.bias.data.fill_(-1e4)
    head.bias.data[[*letter, tiny_models.END_ID]] = torch.tensor([0.8, 0.2]).log()
    model.set_output_embeddings(head)
    common = {"temperature": 0.5, "max_completion_length": 2, "logprobs": True}
    torch.manual_seed(0)
    policy = ModelPolicy(model, processor, action_temperature=2.0, agent_format=AfterFirst(), **common)
    responses = policy.act(requests_for(["up", "what colour is the square?"] * 500, "llama"))
    sharp, flat = (np.array([0.8, 0.2]) ** (1 / t) for t in (0.5, 2.0))
    (word, end), (later_word, later_end) = np.log(sharp / sharp.sum()), np.log(flat / flat.sum())
    expected = {"": [end], "q": [word, later_end], "qq": [word, later_word]}
    for response in responses:
        assert response.behavior_logprobs == pytest.approx(expected[response.text], abs=1e-5)
    begun = [response.text for response in responses if response.text]
    assert abs(begun.count("q") / len(begun) - flat[1] / flat.sum()) < 0.06
    with pytest.raises(ValueError, match="`action_temperature` needs a temperature above 0, and `agent_format`"):
        ModelPolicy(model, processor, action_temperature=2.0, **common)
    with pytest.raises(ValueError, match="`action_temperature` needs a temperature above 0"):
        ModelPolicy(model, processor, action_temperature=2.0, agent_format=AfterFirst())


LEGAL = ("turn left", "turn right", "go", 'say "é"')
REQUESTS = [Request(None, [], [], np.random.default_rng(0), LEGAL)]


def test_the_action_is_one_of_the_legal_ones():
    """An untrained model writes legal actions alone, each with its own probability among them, and then ends."""
    model, processor = tiny_models.build("llama")
    model.eval()
    requests = [replace(request, legal_actions=LEGAL) for request in requests_for(["up"] * 600, "llama")]
    unlisted = requests_for(["hit or stand?"], "llama")
    common = {"temperature": 0.7, "max_completion_length": 24, "logprobs": True, "batch_size": 601}
    policy = ModelPolicy(model, processor, action_temperature=1.0, agent_format=PlainFormat(), **common)
    torch.manual_seed(0)
    *responses, free = policy.act([*requests, *unlisted])
    assert {response.text for response in responses} == set(LEGAL) and free.text not in LEGAL
    for action in LEGAL:
        (log_prob,) = {round(sum(r.behavior_logprobs), 4) for r in responses if r.text == action}
        share = sum(response.text == action for response in responses) / len(responses)
        assert abs(share - np.exp(log_prob)) < 0.06


def test_the_choice_may_be_narrowed():
    """By request, once the response has come to its action; among what is left pi(a) / (1 + N(a))^2."""
    model, processor = tiny_models.build("llama")
    model.eval()
    (request,) = requests_for(["up"], "llama")
    requests = [replace(request, legal_actions=LEGAL, episode=k % 2) for k in range(400)]
    common = {"temperature": 0.7, "max_completion_length": 24, "logprobs": True, "batch_size": 400}
    common |= {"action_temperature": 1.3, "agent_format": PlainFormat()}
    asked = []

    def choices(request, said):
        asked.append(said)
        return dict.fromkeys(LEGAL, 0) if request.episode else {"turn left": 1, "turn right": 1, 'say "é"': 1, "go": 1}

    def drawn(**kwargs):
        torch.manual_seed(0)
        return ModelPolicy(model, processor, **common, **kwargs).act(requests)

    def first(responses):
        """By how they begin, the probability of the first token."""
        return {response.text.split()[0]: np.exp(response.behavior_logprobs[0]) for response in responses}

    free, responses = first(drawn()), drawn(choices=choices)
    assert asked == [""] * 400
    assert first(responses[1::2]) == pytest.approx(free), "nothing narrows it"
    # The two that begin alike were taken twice together.
    weights = {"turn": free["turn"] / 3**2, "go": free["go"] / 2**2, "say": free["say"] / 2**2}
    expected = {begun: weight / sum(weights.values()) for begun, weight in weights.items()}
    searched = first(responses[::2])
    assert {begun: searched[begun] for begun in expected} == pytest.approx(expected, rel=1e-3)
    for begun, chance in expected.items():
        assert np.mean([r.text.startswith(begun) for r in responses[::2]]) == pytest.approx(chance, abs=0.12)
    few = drawn(choices=lambda request, said: {"go": 3})
    assert {(response.text, sum(response.behavior_logprobs)) for response in few} == {("go", 0.0)}
    # Where one action begins another, the end of it counts as it does.
    free, searched = (
        {response.text: np.exp(sum(response.behavior_logprobs)) for response in responses}
        for responses in (
            drawn(choices=lambda request, said: {"go": 0, "go on": 0}),
            drawn(choices=lambda request, said: {"go": 3, "go on": 0}),
        )
    )
    rest = {"go": free["go"] / 4**2, "go on": free["go on"]}
    assert searched == pytest.approx({said: weight / sum(rest.values()) for said, weight in rest.items()}, rel=1e-3)
    with pytest.raises(ValueError, match="`choices` needs `agent_format`"):
        ModelPolicy(model, processor, temperature=1.0, choices=choices)


@pytest.mark.parametrize("temperature", [0.0, 0.7])
def test_nothing_but_legal_actions(temperature):
    """Also of the greedy answer, which takes the likeliest of those that are legal now, whatever was asked before."""
    model, processor = tiny_models.build("llama")
    model.eval()
    (request,) = requests_for(["up"], "llama")
    common = {"temperature": temperature, "max_completion_length": 24, "logprobs": bool(temperature)}
    policy = ModelPolicy(model, processor, legal_actions_only=True, agent_format=PlainFormat(), **common)
    for legal in (LEGAL, LEGAL[:1], LEGAL[1:2]):
        (response,) = policy.act([replace(request, legal_actions=legal)])
        assert response.text in legal
        if temperature:
            alone = math.isclose(sum(response.behavior_logprobs), 0.0, abs_tol=1e-5)
            assert alone == (len(legal) == 1)
    with pytest.raises(ValueError, match="`legal_actions_only` needs `agent_format`"):
        ModelPolicy(model, processor, legal_actions_only=True)


@pytest.mark.parametrize(
    "wanted", ['{"action": "fly"}', '{"action" : "fly"}', "{'action': 'fly'}", '{ "action":"fly"}', '{"action": fly}']
)
def test_nothing_but_legal_actions_however_the_key_is_spelt(wanted):
    """A model that wants to say this, one token after the other."""
    model, tokenizer = tiny_models.build("llama")
    fmt, (request,) = JSONFormat(), requests_for(["up"], "llama")
    wish = [*tokenizer(wanted, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]

    def generate(input_ids, logits_processor, **kwargs):
        for k in range(40):
            scores = torch.zeros(1, len(tokenizer))
            scores[0, wish[min(k, len(wish) - 1)]] = 9.0
            token = logits_processor(input_ids, scores).argmax(-1)
            input_ids = torch.cat([input_ids, token[:, None]], 1)
            if token.item() == tokenizer.eos_token_id:
                return input_ids

    says = SimpleNamespace(generate=generate, device=model.device, generation_config=model.generation_config)
    policy = ModelPolicy(says, tokenizer, legal_actions_only=True, agent_format=fmt)
    (response,) = policy.act([replace(request, legal_actions=LEGAL)])
    assert fmt.parse(response.text).action in LEGAL and response.text.startswith(wanted[: wanted.index(":")])


@pytest.mark.parametrize("opening", [" ", "<think>\n\n</think>\n\n", "<answer>", "<|im_start|>final: "])
@pytest.mark.parametrize("name", ["idefics3", "llama"])
def test_what_the_template_puts_before_an_answer_is_no_part_of_it(name, opening):
    """SmolVLM's "Assistant:" is followed by a space, Qwen3's answer by an empty thought before it. A model that has
    learned it says it; were it kept in the response, training would see it twice, and a plain format an action that
    begins with it."""
    model, processor = tiny_models.build(name)
    tokenizer = getattr(processor, "tokenizer", processor)
    begun = "<|im_start|>{{ m.role }}\n"
    put = f"{begun}{{% if m.role == 'assistant' and loop.last %}}{{{{ {opening!r} }}}}{{% endif %}}"
    processor.chat_template = processor.chat_template.replace(begun, put)
    assert turn_opening(processor) == opening
    wish = completion_tokens(processor, "up")
    assert tokenizer.decode(wish) == f"{opening}up{tiny_models.END}"
    (request,) = requests_for(["red"], name)

    def generate(input_ids, logits_processor, **kwargs):
        for token in [*wish, tiny_models.END_ID]:
            scores = torch.zeros(1, len(tokenizer))
            scores[0, token] = 9.0
            token = logits_processor(input_ids, scores).argmax(-1)
            input_ids = torch.cat([input_ids, token[:, None]], 1)
            if token.item() == tiny_models.END_ID:
                return input_ids

    says = SimpleNamespace(generate=generate, device=model.device, generation_config=model.generation_config)
    (response,) = ModelPolicy(says, processor, temperature=1.0, logprobs=True).act([request])
    assert response.text == "up" and len(response.behavior_logprobs) == len(wish)
    policy = ModelPolicy(says, processor, legal_actions_only=True, agent_format=PlainFormat())
    (response,) = policy.act([replace(request, legal_actions=("down", "up", "left"))])
    assert response.text == "up"


@pytest.mark.parametrize("name", tiny_models.VLM_NAMES + tiny_models.TEXT_NAMES)
def test_the_tokens_of_the_legal_actions(name):
    """Whatever the tokenizer does with quotes and colons: after any part of a response that a model may have written,
    the ways on are those of the legal actions."""
    _, processor = tiny_models.build(name)
    tokenizer = getattr(processor, "tokenizer", processor)
    fmt = JSONCoTFormat()
    texts = {fmt.render(action, {}, "it is up") for action in LEGAL}
    whole = tokenizer(min(texts), add_special_tokens=False)["input_ids"]
    begun = next(n for n in range(len(whole)) if fmt.reaches_action(tokenizer.decode(whole[:n])))
    stop = tokenizer.eos_token_id
    logits = ActionLogits(fmt, tokenizer, 0, REQUESTS, {stop}, temperature=0.5, action_temperature=1.0)
    found, ends = [whole[:begun]], []
    while found:
        tokens = found.pop()
        scores = logits(torch.tensor([tokens]), torch.ones(1, max(len(tokenizer), stop + 1)))[0]
        allowed = (scores == 0.5).nonzero()[:, 0].tolist()
        assert 1 <= len(allowed) <= len(LEGAL) and scores.isneginf().sum() == len(scores) - len(allowed)
        ends += [tokens] if allowed == [stop] else []
        found += [[*tokens, token] for token in allowed if token != stop]
    assert {tokenizer.decode(tokens) for tokens in ends} == texts
    untouched = torch.ones(1, len(tokenizer))
    before = ActionLogits(fmt, tokenizer, 0, REQUESTS, {stop}, temperature=0.5, action_temperature=1.0)(
        torch.tensor([whole[: begun - 1]]), untouched
    )
    assert torch.equal(before, untouched)


def score(model, batch, temperature) -> torch.Tensor:
    """[A] log softmax(logits / temperature) of the action tokens, by the model's own plain forward."""
    known = ("input_ids", "attention_mask", "labels", "bootstrap_mask", "segment_bootstrap", "behavior_log_probs")
    inputs = {k: v for k, v in batch.items() if k not in known and not k.startswith("turn_")}
    with torch.no_grad():
        logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], **inputs).logits
    log_probs = (logits[:, :-1] / temperature).log_softmax(-1)
    labels = batch["labels"][:, 1:]
    taken = log_probs.gather(2, labels.clamp(min=0)[..., None])[..., 0]
    return taken[labels != -100]


def test_the_end_token_is_recorded():
    """A response that ends has the end token's log-probability last; one that was cut has its tokens' only."""
    model, processor = tiny_models.build("llama")
    letter = processor("q", add_special_tokens=False)["input_ids"]
    assert len(letter) == 1
    head = torch.nn.Linear(model.lm_head.in_features, model.lm_head.out_features)
    torch.nn.init.zeros_(head.weight)
    head.bias.data.fill_(-1e4)
    head.bias.data[[*letter, tiny_models.END_ID]] = torch.tensor([0.75, 0.25]).log()
    model.set_output_embeddings(head)
    policy = ModelPolicy(model, processor, temperature=1.0, max_completion_length=2, logprobs=True)
    torch.manual_seed(0)
    word, end = np.log([0.75, 0.25])
    expected = {"": [end], "q": [word, end], "qq": [word, word]}
    seen = set()
    for response in policy.act(requests_for(["up"] * 32, "llama")):
        assert response.behavior_logprobs == pytest.approx(expected[response.text], abs=1e-5)
        seen.add(response.text)
    assert seen == set(expected)


def test_a_greedy_answer_has_no_distribution():
    model, processor = tiny_models.build("llama")
    with pytest.raises(ValueError, match="needs a temperature above 0"):
        ModelPolicy(model, processor, logprobs=True)
    (response,) = ModelPolicy(model, processor, temperature=1.0, max_completion_length=2).act(
        requests_for(["up"], "llama")
    )
    assert response.behavior_logprobs is None, "not asked for"


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_broken_weights_are_told(temperature):
    """Greedily NaN would be an answer like any other."""
    model, processor = tiny_models.build("llama")
    policy = ModelPolicy(model, processor, temperature=temperature, max_completion_length=2)
    policy.act(requests_for(["up"], "llama"))
    model.model.norm.weight.data.fill_(float("nan"))
    with pytest.raises(FloatingPointError, match="Lower it, or `max_grad_norm`"):
        policy.act(requests_for(["down"], "llama"))
