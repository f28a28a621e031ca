"""Each field of OpenAI's API, asked for by the `openai` client: implemented, or refused by name."""

# ruff: noqa: F811 (fixtures are imported)

import itertools
import json
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from children import forked
from test_chat import END, TOKENIZER, user
from test_serve import batched, client, openai, post, printed  # noqa: F401
from transformers import LogitsProcessor, LogitsProcessorList
from transformers.convert_slow_tokenizer import bytes_to_unicode

from hf_nanogpt import generate_text
from hf_nanogpt.apps.scoring import Reading, Scorer, share_weights
from hf_nanogpt.errors import UserError

types = pytest.importorskip("openai.types")

pytestmark = forked
GREEDY = {"model": "talker", "temperature": 0, "max_tokens": 12}
DRAWN = {"model": "talker", "temperature": 1.0, "max_tokens": 12, "seed": 7}
SPELT = {TOKENIZER.convert_tokens_to_ids(s): bytes([b]) for b, s in bytes_to_unicode().items()}
SPELT |= {i: token.content.encode() for i, token in TOKENIZER.added_tokens_decoder.items()}


def encode(text: str) -> list[int]:
    return TOKENIZER(text)["input_ids"]


def follow(prompt: str, count: int = 12, **settings) -> str:
    """Return what transformers alone writes after a prompt."""
    ids = torch.tensor([encode(prompt)])
    given = {"max_new_tokens": count, "do_sample": False, "pad_token_id": 0, "eos_token_id": END}
    written = batched().generate(ids, **given | settings)[0, ids.shape[1] :]
    return TOKENIZER.decode(written, skip_special_tokens=True)


@torch.no_grad()
def log_probabilities(ids: list[int]) -> torch.Tensor:
    """Return those of each next token, (T, V), by the model itself."""
    return batched()(torch.tensor([ids])).logits[0].log_softmax(-1)


def ask(client, *, stream: bool = False, **given):
    """Return the choices of a completion, those of a stream put together."""
    done = client.completions.create(**{"prompt": "the cat"} | given, stream=stream)
    if not stream:
        return done.choices
    whole = {}
    for choice in itertools.chain.from_iterable(chunk.choices for chunk in done):
        first = whole.setdefault(choice.index, choice)
        if first is choice:
            continue
        assert first.finish_reason is None, "a choice goes on after its end"
        first.text += choice.text
        first.finish_reason = choice.finish_reason
        if choice.logprobs and first.logprobs:
            for name in ("tokens", "token_logprobs", "top_logprobs", "text_offset"):
                getattr(first.logprobs, name).extend(getattr(choice.logprobs, name))
        first.logprobs = first.logprobs or choice.logprobs
    return [whole[index] for index in sorted(whole)]


both = pytest.mark.parametrize("stream", [False, True])


# probabilities and echo


@both
@pytest.mark.parametrize("echo", [False, True])
def test_logprobs_are_those_of_the_model(echo, stream, client):
    [choice] = ask(client, **GREEDY, logprobs=3, echo=echo, stream=stream)
    text, found = follow("the cat"), choice.logprobs
    ids = encode("the cat" + text)
    assert choice.text == ("the cat" if echo else "") + text
    first = 0 if echo else len("the cat")
    assert found.tokens == list("the cat" + text)[first:]
    assert found.text_offset == list(range(len(ids)))[first:]
    expected = log_probabilities(ids)
    own = expected[:-1].gather(1, torch.tensor(ids[1:])[:, None])[:, 0]
    if echo:
        assert (found.token_logprobs[0], found.top_logprobs[0]) == (None, None)
    torch.testing.assert_close(torch.tensor(found.token_logprobs[-len(own) :][-12:]), own[-12:])
    if echo:
        torch.testing.assert_close(torch.tensor(found.token_logprobs[1:]), own)
    for n, top in enumerate(found.top_logprobs[-12:], len(ids) - 13):
        values = [*expected[n].topk(3).values.tolist(), own[n].item()]
        assert sorted(top.values()) == pytest.approx(sorted(set(values)))
        assert len(top) <= 4 and top[TOKENIZER.decode([ids[n + 1]])] == pytest.approx(own[n].item())


@both
def test_chat_logprobs_are_those_of_the_model(stream, client):
    given = {"model": "talker", "messages": [user("hello")], "temperature": 0, "max_tokens": 12}
    given |= {"logprobs": True, "top_logprobs": 2, "stream": stream}
    done = client.chat.completions.create(**given)
    choices = [chunk.choices[0] for chunk in done] if stream else done.choices
    tokens = [token for c in choices if c.logprobs for token in c.logprobs.content]
    prompt = TOKENIZER.apply_chat_template(given["messages"], add_generation_prompt=True)
    prompt = list(prompt["input_ids"])
    text = "".join(token.token for token in tokens)
    ids = prompt + encode(text)
    expected = log_probabilities(ids)[len(prompt) - 1 : -1]
    own = expected.gather(1, torch.tensor(encode(text))[:, None])[:, 0]
    torch.testing.assert_close(torch.tensor([token.logprob for token in tokens]), own)
    assert len(tokens) == 12
    for token, row in zip(tokens, expected, strict=True):
        assert bytes(token.bytes) == token.token.encode()
        best = row.topk(2)
        found = [bytes(one.bytes) for one in token.top_logprobs]
        assert found == [SPELT[i] for i in best.indices.tolist()]
        assert [o.logprob for o in token.top_logprobs] == pytest.approx(best.values.tolist())


def test_the_probability_of_a_given_text_can_be_asked_for(client):
    """As lm-eval does: it takes what lies between the context and the one token that is written."""
    context, answer = "the cat", " sat"
    for settings in ({"max_tokens": 1}, {"max_tokens": 0}):
        [choice] = ask(
            client, **GREEDY | settings, prompt=encode(context + answer), logprobs=1, echo=True
        )
        last = len(choice.logprobs.token_logprobs) - settings["max_tokens"]
        found = choice.logprobs.token_logprobs[len(context) : last]
        ids = encode(context + answer)
        rows = log_probabilities(ids)[len(context) - 1 : -1]
        own = rows.gather(1, torch.tensor(encode(answer))[:, None])[:, 0]
        torch.testing.assert_close(torch.tensor(found), own)
        assert choice.finish_reason == "length"


@both
def test_offsets_are_where_the_tokens_are_in_the_text(stream, client):
    given = GREEDY | {"prompt": "<|im_start|>the <|im_end|>\ncat", "echo": True, "logprobs": 0}
    [choice] = ask(client, **given, stream=stream)
    text, found = choice.text, choice.logprobs
    assert len(found.tokens) == 9 + 1 + 12
    for token, offset in zip(found.tokens, found.text_offset, strict=True):
        assert text[offset:].startswith(token)


def test_infinite_logits_have_no_probabilities():
    model = share_weights(batched())
    model.lm_head = torch.nn.Linear(model.config.hidden_size, len(TOKENIZER))
    torch.nn.init.constant_(model.lm_head.bias, torch.inf)
    with pytest.raises(UserError, match="NaN"):
        Reading(Scorer(model, TOKENIZER), 2).read([1, 2, 3])


def test_tokens_after_a_stop_text_have_no_probabilities(client):
    text = follow("the cat")
    stop = text[5:7]
    whole = text[: text.index(stop)]
    for stream in (False, True):
        [choice] = ask(client, **GREEDY, stop=[stop], logprobs=0, stream=stream)
        assert (choice.text, choice.finish_reason) == (whole, "stop")
        assert "".join(choice.logprobs.tokens) == whole


def test_a_stop_text_at_once_leaves_no_text_and_no_probabilities(client):
    for stream in (False, True):
        given = GREEDY | {"stop": follow("the cat")[0], "logprobs": 2, "stream": stream}
        [choice] = ask(client, **given)
        assert (choice.text, choice.finish_reason) == ("", "stop")
        assert stream or choice.logprobs.tokens == choice.logprobs.token_logprobs == []


def test_an_impossible_token_has_a_number_in_json(printed):
    body = {"model": "talker", "prompt": "a", "max_tokens": 2, "logprobs": 5, "temperature": 0}
    status, text = post(printed, "/v1/completions", body)
    assert status == 200 and "Infinity" not in text and "NaN" not in text


# several choices and prompts


@both
def test_choices_are_those_of_the_seeds_that_follow(stream, client):
    several = ask(client, **DRAWN, n=3, stream=stream)
    alone = [ask(client, **DRAWN | {"seed": 7 + n})[0].text for n in range(3)]
    assert [choice.text for choice in several] == alone and len(set(alone)) == 3
    assert [choice.index for choice in several] == [0, 1, 2]
    assert {choice.finish_reason for choice in several} == {"length"}


def test_choices_without_a_seed_differ_and_all_count(client):
    given = {"model": "talker", "messages": [user("hello")], "n": 4, "max_completion_tokens": 12}
    done = client.chat.completions.create(**given)
    assert len({choice.message.content for choice in done.choices}) == 4
    assert done.usage.total_tokens == done.usage.prompt_tokens + done.usage.completion_tokens
    assert done.usage.completion_tokens > 12
    chunks = list(client.chat.completions.create(**given, stream=True))
    starts = [chunk.choices[0].index for chunk in chunks if chunk.choices[0].delta.role]
    ends = [chunk.choices[0].index for chunk in chunks if chunk.choices[0].finish_reason]
    assert sorted(starts) == sorted(ends) == [0, 1, 2, 3]


@both
def test_a_list_of_prompts_gets_the_answers_of_each(stream, client):
    prompts = ["the cat", "a", "dogs"]
    expected = [follow(prompt) for prompt in prompts]
    for given in (prompts, [encode(prompt) for prompt in prompts]):
        choices = ask(client, **GREEDY, prompt=given, stream=stream)
        assert [choice.text for choice in choices] == expected
    echoed = ask(client, **GREEDY, prompt=prompts, n=2, echo=True, stream=stream)
    both = zip(prompts, expected, strict=True)
    assert [choice.text for choice in echoed] == [a + b for a, b in both for _ in range(2)]
    [choice] = ask(client, **GREEDY, prompt=encode("dogs"), stream=stream)
    assert choice.text == expected[2]


# what changes the logits


def test_logit_bias_is_added_to_the_logits(client):
    forced, banned = encode("q")[0], encode(follow("the cat")[0])[0]
    [choice] = ask(client, **GREEDY, logit_bias={str(forced): 100})
    assert choice.text == "q" * 12
    [choice] = ask(client, **GREEDY, logit_bias={str(banned): -100, "5": 100})
    assert choice.text == follow("the cat", sequence_bias={(banned,): -100.0})


@pytest.mark.parametrize("penalty", ["presence_penalty", "frequency_penalty"])
@pytest.mark.parametrize("value", [2.0, -2.0, 0.5])
def test_penalties_are_those_of_the_reference(penalty, value, client):
    class Penalty(LogitsProcessor):
        def __call__(self, ids, scores):
            for token in set(ids[0, len("the cat") :].tolist()):
                count = ids[0, len("the cat") :].tolist().count(token)
                scores[0, token] -= value * (count if penalty.startswith("f") else 1)
            return scores

    [choice] = ask(client, **GREEDY | {"max_tokens": 40}, **{penalty: value})
    assert choice.text == follow("the cat", 40, logits_processor=LogitsProcessorList([Penalty()]))


# text and its end


@pytest.mark.parametrize("settings", [{}, {"seed": 3}, {"seed": 3, "top_p": 0.5}, {"n": 2}])
def test_stream_and_whole_are_the_same_text(settings, client):
    given = {**DRAWN, **settings, "presence_penalty": 1.0, "echo": True, "logprobs": 2}
    for one, other in zip(ask(client, **given), ask(client, **given, stream=True), strict=True):
        assert (one.text, one.finish_reason) == (other.text, other.finish_reason)
        assert one.logprobs.tokens == other.logprobs.tokens
        probabilities = [found.logprobs.token_logprobs[1:] for found in (one, other)]
        assert probabilities[0] == pytest.approx(probabilities[1], abs=1e-5)


def test_without_a_prompt_a_document_begins(printed):
    for body in ({}, {"prompt": None}, {"prompt": ""}):
        _, text = post(printed, "/v1/completions", GREEDY | body)
        [expected] = generate_text(batched(), TOKENIZER, "", max_new_tokens=12, temperature=0)
        assert json.loads(text)["choices"][0]["text"] == expected


def test_an_unknown_address_is_told_those_that_exist(printed):
    status, text = post(printed, "/v1/embeddings", {"model": "talker", "input": "a"})
    assert status == 404 and "/v1/chat/completions" in json.loads(text)["error"]["message"]


def test_top_p_of_zero_and_seeds_of_64_bits_are_allowed(client):
    [choice] = ask(client, model="talker", max_tokens=12, top_p=0, seed=-(2**63))
    assert choice.text == follow("the cat")
    texts = {ask(client, **DRAWN | {"seed": seed})[0].text for seed in (-1, 2**32 - 1)}
    assert len(texts) == 1


def test_a_completion_has_16_tokens_by_default(client):
    done = client.completions.create(model="talker", prompt="the", temperature=0)
    assert (done.usage.completion_tokens, done.choices[0].text) == (16, follow("the", 16))


@both
def test_no_stop_text_is_returned_nor_what_follows_it(stream, client):
    text = follow("the cat", 30)
    for stop in [text[9], text[3:5], [text[20:], text[8:10]], ["~"], []]:
        stops = [stop] if isinstance(stop, str) else stop
        ends = [text.index(one) for one in stops if one in text]
        [choice] = ask(client, **GREEDY | {"max_tokens": 30, "stop": stop}, stream=stream)
        assert choice.text == text[: min(ends, default=30)]
        assert choice.finish_reason == ("stop" if ends else "length")


@pytest.mark.parametrize("echo", [False, True])
def test_an_end_token_that_is_the_last_allowed_is_a_stop(echo, client):
    given = GREEDY | {"max_tokens": 1, "logit_bias": {str(END): 100}, "echo": echo}
    [choice] = ask(client, **given, logprobs=0)
    assert (choice.text, choice.finish_reason) == ("the cat" if echo else "", "stop")
    assert choice.logprobs.tokens[-1] == "<|im_end|>" and choice.logprobs.text_offset[-1] == 7


# the form of answers and errors


def test_usage_is_null_until_the_last_chunk(printed):
    body = GREEDY | {"prompt": ["a", "b"], "stream": True}
    body["stream_options"] = {"include_usage": True}
    _, text = post(printed, "/v1/completions", body)
    *events, last, done, _ = text.split("\n\n")
    assert done == "data: [DONE]"
    assert all(json.loads(event[6:])["usage"] is None for event in events)
    usage = {"prompt_tokens": 2, "completion_tokens": 24, "total_tokens": 26}
    assert json.loads(last[6:])["usage"] == usage
    _, text = post(printed, "/v1/completions", body | {"stream_options": None})
    assert "usage" not in text


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
def test_each_field_of_the_client_works_or_is_refused_by_name(path, printed):
    chat = "chat" in path
    good = {"model": "talker", "messages": [user("a")]} if chat else GREEDY | {"prompt": "a"}
    module = (types.chat if chat else types).completion_create_params
    fields = sorted({*module.CompletionCreateParamsBase.__annotations__, "stream"})
    with ThreadPoolExecutor(8) as pool:
        bodies = [good | {field: {"no": "such value"}} for field in fields]
        answers = list(pool.map(lambda body: post(printed, path, body), bodies))
    for field, (status, text) in zip(fields, answers, strict=True):
        if field == "metadata":
            assert status == 200  # a label
            continue
        error = json.loads(text)["error"]
        assert (status, error["param"]) == (400, field), text
        assert error["type"] == "invalid_request_error" and field in error["message"]


REFUSED = {
    "best_of": {"best_of": 3, "n": 2},
    "logprobs": {"logprobs": 6},
    "logit_bias": {"logit_bias": {"x": 1}},
    "n": {"n": 129},
    "prompt": {"prompt": ["a", [1]]},
    "max_tokens": {"max_tokens": 0},
    "suffix": {"suffix": "x"},
    "presence_penalty": {"presence_penalty": 2.5},
    "stream_options": {"stream_options": {"include_usage": True}},
    "tools": {"extra_body": {"tools": [{"type": "function"}]}},
    "response_format": {"extra_body": {"response_format": {"type": "json_object"}}},
}


@pytest.mark.parametrize("field", REFUSED)
def test_an_error_names_its_field(field, client):
    with pytest.raises(openai.BadRequestError, match=field) as error:
        client.completions.create(**{"model": "talker", "prompt": "a"} | REFUSED[field])
    assert error.value.param == field


@pytest.mark.parametrize(
    ("given", "status", "code", "field"),
    [
        ({"model": "gpt2"}, 404, "model_not_found", "model"),
        ({"prompt": "x" * 256}, 400, "context_length_exceeded", "prompt"),
        ({"prompt": "x" * 100_000}, 400, "context_length_exceeded", "prompt"),
        ({"suffix": "x"}, 400, "unsupported_parameter", "suffix"),
        ({"extra_body": {"chat_template": "x"}}, 400, "unsupported_parameter", "chat_template"),
    ],
)
def test_errors_have_the_codes_of_openai(given, status, code, field, client):
    with pytest.raises(openai.APIStatusError) as error:
        client.completions.create(**{"model": "talker", "prompt": "a"} | given)
    assert (error.value.status_code, error.value.code) == (status, code)
    assert error.value.param == field


@pytest.mark.parametrize("empty", [{"tool_calls": []}, {"annotations": [], "refusal": None}])
def test_an_answer_may_be_repeated_with_empty_parts(empty, client):
    answer = {"role": "assistant", "content": "hello"}
    given = {"model": "talker", "temperature": 0, "max_tokens": 5}
    texts = {
        client.chat.completions.create(messages=[user("a"), message, user("b")], **given)
        .choices[0]
        .message.content
        for message in (answer, answer | empty)
    }
    assert len(texts) == 1


@pytest.mark.parametrize("length", [{}, {"max_tokens": 3}])
def test_a_chat_that_leaves_no_room_for_an_answer_is_refused(length, client):
    given = {"model": "talker", "messages": [user("a" * 250)]}
    with pytest.raises(openai.BadRequestError, match="context is 256") as error:
        client.chat.completions.create(**given | length)
    assert (error.value.code, error.value.param) == ("context_length_exceeded", "messages")


NUMBERS = "n best_of max_tokens seed temperature top_p presence_penalty frequency_penalty logprobs"


@pytest.mark.parametrize("field", NUMBERS.split())
@pytest.mark.parametrize("value", [True, "1", [1]])
def test_a_number_is_a_number(field, value, printed):
    body = {"model": "talker", "prompt": "a", field: value}
    status, text = post(printed, "/v1/completions", body)
    assert (status, json.loads(text)["error"]["param"]) == (400, field)


def test_a_field_with_two_values_is_refused(printed):
    body = b'{"model": "talker", "prompt": "a", "max_tokens": 3, "max_tokens": 4}'
    status, text = post(printed, "/v1/completions", body)
    message = json.loads(text)["error"]["message"]
    assert status == 400 and "'max_tokens' is there twice, as 3 and as 4" in message


def test_too_many_choices_and_both_lengths_are_refused(client):
    with pytest.raises(openai.BadRequestError, match="n=2 is invalid"):
        client.completions.create(model="talker", prompt=["a"] * 100, n=2)
    with pytest.raises(openai.BadRequestError, match="send only one"):
        given = {"max_tokens": 3, "max_completion_tokens": 3, "messages": [user("a")]}
        client.chat.completions.create(model="talker", **given)
