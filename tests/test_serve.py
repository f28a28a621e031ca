"""`hf-nanogpt serve` over real HTTP, asked by the clients that people use and by bad ones."""

import json
import os
import shlex
import signal
import socket
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from urllib.error import HTTPError
from urllib.request import Request, urlopen

import pytest
from children import PROCESSES, forked
from conftest import _HUB, ROOT
from huggingface_hub import constants
from test_chat import (
    FORGED,
    TOKENIZER,
    answer_forged,
    answer_whole,
    save_talker,
    talker,
    user,
)

from hf_nanogpt import generate_text
from hf_nanogpt.apps.addresses import open_socket
from hf_nanogpt.cli import main

openai = pytest.importorskip("openai", reason="needs pip install 'hf-nanogpt[serve]'")
pytest.importorskip("uvicorn", reason="needs pip install 'hf-nanogpt[serve]'")

pytestmark = forked
# The server could ask the Hub of these tests, which would note it.
ONLINE = os.environ | {"HF_HUB_OFFLINE": "0", "PYTHONPATH": str(ROOT)}
HELLO = {"model": "talker", "messages": [user("hello")]}
SHORT = {"max_tokens": 12, "temperature": 0}
ENDLESS = "{% for a in range(100000) %}{% for b in range(100000) %}{% endfor %}{% endfor %}"
KEY = "the key is sécret"


class Server:
    """`hf-nanogpt serve` in a process of its own, which is asked and told as a `Popen` is."""

    def __init__(self, folder, argv: list[str]):
        reader, writer = PROCESSES.Pipe(duplex=False)
        self.process = PROCESSES.Process(target=_serve, args=(argv, folder, writer), daemon=True)
        self.process.start()
        writer.close()
        self.stdout = os.fdopen(os.dup(reader.fileno()), encoding="utf-8")

    def send_signal(self, number: int) -> None:
        os.kill(self.process.pid, number)

    def wait(self) -> int:
        self.process.join()
        return self.process.exitcode


def _serve(argv: list[str], folder, output) -> None:
    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.chdir(folder)
    os.dup2(output.fileno(), 1)
    output.close()
    constants.HF_HUB_OFFLINE = False
    sys.exit(main(argv))


def start_server(folder, *arguments: str):
    """Start a server; return its process and all that it printed until it was ready."""
    _HUB.reset()
    server = Server(folder, ["serve", "--port=0", *arguments])
    printed = []
    while not printed or not printed[-1].startswith("curl "):
        printed.append(server.stdout.readline())
        assert printed[-1], "the server has ended"
    return server, printed


def address(printed: list[str]) -> str:
    return printed[-2].split("answers at ")[1].split("/v1")[0]


def batched():
    """Return a talker with settings that a batch can serve."""
    model = talker()
    model.generation_config.sequence_bias = None
    return model


@pytest.fixture(scope="module")
def printed(tmp_path_factory):
    folder = tmp_path_factory.mktemp("served")
    save_talker(folder / "talker")
    batched().save_pretrained(folder / "talker")
    server, printed = start_server(folder, "talker/")
    yield printed
    # Once a day huggingface_hub itself asks for a list of programs, as `transformers chat` starts.
    asked = [request for request in _HUB.requests if request[1] != "/api/agent-harnesses"]
    assert asked == [], "the server has asked the Hub"
    server.send_signal(signal.SIGINT)
    assert (server.stdout.read(), server.wait()) == ("Ended.\n", 0)


@pytest.fixture
def client(printed):
    with openai.OpenAI(base_url=f"{address(printed)}/v1", api_key="any", max_retries=0) as client:
        yield client


@pytest.fixture(scope="module")
def guarded(tmp_path_factory):
    """A server with a key, for a checkpoint that is not to be trusted and writes for very long."""
    folder = tmp_path_factory.mktemp("guarded")
    save_talker(folder / "talker", block_size=20_000)
    (folder / "talker" / "chat_template.jinja").write_text(ENDLESS)
    server, printed = start_server(folder, str(folder / "talker"), f"--api_key={KEY}")
    yield printed
    server.send_signal(signal.SIGTERM)
    assert (server.stdout.read(), server.wait()) == ("Ended.\n", 0)


def post(printed, path: str, body, **headers: str):
    """Return the status and the text of the answer to a body, of bytes or of JSON."""
    body = body if isinstance(body, bytes) else json.dumps(body).encode()
    headers = {"Content-Type": "application/json"} | {
        name.replace("_", "-"): value for name, value in headers.items()
    }
    try:
        with urlopen(Request(f"{address(printed)}{path}", body, headers)) as answer:
            return answer.status, answer.read().decode()
    except HTTPError as error:
        return error.code, error.read().decode()


def test_server_is_on_this_machine_only_and_lists_one_model(printed, client):
    assert address(printed).startswith("http://127.0.0.1:")
    assert [model.id for model in client.models.list()] == ["talker"]
    with urlopen(f"{address(printed)}/health") as answer:
        assert json.load(answer) == {"status": "ok"}


def test_chat_completion_equals_that_of_transformers(client):
    done = client.chat.completions.create(**HELLO, **SHORT)
    assert done.choices[0].message.content == answer_whole(batched(), HELLO["messages"])
    assert (done.model, done.choices[0].finish_reason) == ("talker", "length")
    assert done.usage.completion_tokens == 12


def test_a_message_cannot_forge_a_turn(client):
    messages = [{"role": "user", "content": FORGED}]
    done = client.chat.completions.create(model="talker", messages=messages, **SHORT)
    answer = done.choices[0].message.content, done.usage.prompt_tokens
    assert answer == answer_forged(batched())


def test_completion_is_the_text_of_generate(client):
    settings = {"max_new_tokens": 12, "temperature": 0}
    for prompt in ("the cat", ""):
        done = client.completions.create(model="talker", prompt=prompt, **SHORT)
        [text] = generate_text(batched(), TOKENIZER, prompt, **settings)
        assert prompt + done.choices[0].text == text


def test_streamed_pieces_are_the_whole_answer(client):
    chunks = list(client.chat.completions.create(**HELLO, **SHORT, stream=True))
    pieces = [chunk.choices[0].delta.content or "" for chunk in chunks]
    assert "".join(pieces) == answer_whole(batched(), HELLO["messages"])
    assert sum(map(bool, pieces)) == 12 and chunks[-1].choices[0].finish_reason == "length"
    chunks = client.completions.create(model="talker", prompt="the", stream=True, **SHORT)
    whole = client.completions.create(model="talker", prompt="the", **SHORT)
    assert "".join(chunk.choices[0].text for chunk in chunks) == whole.choices[0].text


def test_requests_at_once_get_the_answers_they_get_alone(client):
    def ask(text: str) -> str:
        messages = [user(text)]
        if len(text) % 2:
            done = client.chat.completions.create(model="talker", messages=messages, **SHORT)
            return done.choices[0].message.content
        given = {"model": "talker", "messages": messages, "stream": True}
        chunks = client.chat.completions.create(**given, **SHORT)
        return "".join(chunk.choices[0].delta.content or "" for chunk in chunks)

    texts = ["hello"[:n] for n in range(1, 6)] + ["and", "you?"]
    with ThreadPoolExecutor(len(texts)) as pool:
        answers = list(pool.map(ask, texts))
    model = batched()
    assert answers == [answer_whole(model, [user(text)]) for text in texts]


def test_answers_are_sampled_unless_temperature_is_zero(client):
    def ask(**given) -> str:
        return client.completions.create(model="talker", prompt="a", max_tokens=12, **given)

    one, same, other = (ask(seed=seed).choices[0].text for seed in (1, 1, 2))
    assert one == same != other


def test_answer_ends_where_the_context_or_the_turn_ends(client):
    def ask(**given):
        done = client.chat.completions.create(**HELLO, temperature=0, **given)
        return done.choices[0].finish_reason, done.usage.completion_tokens

    reason, length = ask()
    assert reason == "stop" and 12 < length < 200
    assert ask(max_tokens=length) == ("stop", length)  # the last one allowed ends the turn
    assert ask(max_tokens=length - 1) == ("length", length - 1)
    done = client.completions.create(model="talker", prompt="x" * 250, temperature=0)
    assert (done.usage.total_tokens, done.choices[0].finish_reason) == (256, "length")


@pytest.mark.parametrize("bias", [{}, {"0": -1}])  # in a batch, and alone
@pytest.mark.parametrize("stream", [False, True])
def test_text_ends_before_the_first_stop_text(bias, stream, client):
    given = {"model": "talker", "prompt": "the", "logit_bias": bias, **SHORT, "max_tokens": 30}
    [whole] = generate_text(batched(), TOKENIZER, "the", max_new_tokens=30, temperature=0)
    whole = whole.removeprefix("the")
    stops = [whole[14:17], whole[9:12], "never"]
    done = client.completions.create(**given, stop=stops, stream=stream)
    choices = [chunk.choices[0] for chunk in done] if stream else done.choices
    assert "".join(choice.text for choice in choices) == whole[: min(map(whole.index, stops[:2]))]
    assert choices[-1].finish_reason == "stop"
    # What begins a stop text, and does not become one, is not lost.
    given["stop"] = [whole[-1] + "~"]
    done = client.completions.create(**given, stream=stream)
    choices = [chunk.choices[0] for chunk in done] if stream else done.choices
    assert "".join(choice.text for choice in choices) == whole
    assert choices[-1].finish_reason == "length"


def test_usage_of_a_stream_comes_when_asked_for(client):
    def ask(**given):
        return list(client.chat.completions.create(**HELLO, **SHORT, stream=True, **given))

    assert not any(chunk.usage for chunk in ask())
    *chunks, last = ask(stream_options={"include_usage": True})
    assert not any(chunk.usage for chunk in chunks) and last.choices == []
    assert last.usage.completion_tokens == 12


def test_fields_with_neutral_values_are_accepted(client):
    nothing = {"n": 1, "stop": [], "presence_penalty": 0, "frequency_penalty": 0.0, "user": "me"}
    nothing |= {"logit_bias": {}, "seed": None, "top_p": 1}
    done = client.completions.create(
        model="talker", prompt="a", **SHORT, **nothing, best_of=1, echo=False, logprobs=None
    )
    parts = [{"role": "user", "content": [{"type": "text", "text": "hello"}]}]
    chat = HELLO | {"messages": parts, "max_completion_tokens": 12, "temperature": 0}
    said = client.chat.completions.create(**chat, **nothing, logprobs=False, tools=[])
    assert done.usage.completion_tokens == 12
    assert said.choices[0].message.content == answer_whole(batched(), HELLO["messages"])


# what is refused

REFUSED = {
    "another model": ({"model": "gpt2"}, "no model 'gpt2': it has 'talker' only"),
    "long prompt": ({"prompt": "x" * 256}, "256 tokens.*context is 256"),
    "temperature": ({"temperature": -1}, "temperature=-1"),
    "top_p": ({"top_p": 1.5}, "top_p=1.5"),
    "max_tokens": ({"max_tokens": 0}, "max_tokens=0"),
    "prompt": ({"prompt": ["a", 7]}, "prompt=.*must be a string"),
    "seed": ({"seed": 2**63}, "seed=9223372036854775808"),
    "stop": ({"stop": [""]}, "stop=.*1 to 1000 characters"),
    "n": ({"n": 0}, "n=0.*from 1 to 128"),
    "best_of": ({"best_of": 2}, "best_of=2"),
    "logprobs": ({"logprobs": 6}, "logprobs=6"),
    "logit_bias": ({"logit_bias": {"5": 101}}, r"logit_bias\.5=101"),
    "presence_penalty": ({"presence_penalty": 3}, "presence_penalty=3"),
    "suffix": ({"suffix": "x"}, "suffix='x'"),
    "top_k": ({"extra_body": {"top_k": 3}}, "top_k=3"),
    "template": ({"extra_body": {"chat_template": ENDLESS}}, "chat_template="),
    "padding": ({"extra_body": {"padding": "max_length"}}, "padding='max_length'"),
    "beams": (
        {"extra_body": {"generation_config": '{"num_beams": 20000}'}},
        "generation_config.num_beams",
    ),
}


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("name", REFUSED)
def test_bad_request_gets_a_sentence_before_any_text(name, stream, client):
    given, words = REFUSED[name]
    with pytest.raises(openai.APIStatusError, match=words) as error:
        client.completions.create(**{"model": "talker", "prompt": "a", "stream": stream} | given)
    assert error.value.status_code == (404 if name == "another model" else 400)


def test_prompt_that_cannot_fit_is_refused_before_it_becomes_tokens(printed):
    longest = max(map(len, TOKENIZER.get_vocab())) * 256
    for path, prompt in (("", {"prompt": "x" * (longest + 1)}), ("chat/", HELLO)):
        body = {"model": "talker", **prompt}
        if path:
            body = HELLO | {"messages": [user("x" * longest), user("y")]}
        status, text = post(printed, f"/v1/{path}completions", body)
        assert (status, f"{longest + 1:,} characters" in text) == (400, True)
    status, text = post(printed, "/v1/completions", {"model": "talker", "prompt": "x" * 5_000_000})
    assert status == 413 and "at most 4,194,304" in text


WRONG = [None, True, -1, 0, 10**400, 1e308, "x", "", [], {}, [[]], [1], {"a": 1}, ["a"] * 99]
FIELDS = ["model", "prompt", "messages", "max_tokens", "max_completion_tokens", "temperature"]
FIELDS += ["top_p", "seed", "stop", "stream", "stream_options", "generation_config", "n", "user"]
FIELDS += ["logprobs", "tools", "response_format", "no such field"]
RAW = [
    b"",
    b"7",
    b"[]",
    b"{",
    b"nonsense",
    b"[" * 100_000,
    b'{"model": "talker", "prompt": "\xff"}',
]
RAW += [b'{"model": "talker", "prompt": "\\ud800"}', b'{"model": "talker", "temperature": NaN}']
RAW += [b'{"model": "\\udfff"}', b'{"model": "talker", "seed": 1e999}', b"\x00", b'{"a": ' * 9_999]
MESSAGES = [[{}], [7], [[]], ["a"], [{"role": "user"}], [{"role": "nobody", "content": "a"}]]
MESSAGES += [[{"role": [], "content": "a"}], [{"role": "user", "content": 7}]]
MESSAGES += [[{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]]
MESSAGES += [[{"role": "user", "content": "a", "tool_calls": [7]}], [user("a")] * 300]


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
def test_no_request_makes_the_server_fail(path, printed):
    good = {"model": "talker", "max_tokens": 1}
    good |= {"messages": [user("a")]} if "chat" in path else {"prompt": "a"}
    bodies = [good | {field: value} for field in FIELDS for value in WRONG]
    bodies += [good | {"messages": messages} for messages in MESSAGES]
    config = [{"max_new_tokens": value} for value in WRONG] + [{"do_sample": 7}, {"stop": "a"}]
    bodies += [good | {"generation_config": json.dumps(one)} for one in config]
    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(lambda body: post(printed, path, body), RAW + bodies))
    assert {status for status, _ in answers} <= {200, 400, 404}
    assert {status for status, _ in answers[: len(RAW)]} == {400}
    for status, text in answers:
        assert "/" + str(ROOT).split("/")[1] not in text and "/tmp" not in text
        assert status == 200 or json.loads(text)["error"]["type"] == "invalid_request_error"
    assert post(printed, path, good)[0] == 200


# who may ask


def test_a_page_from_elsewhere_does_not_reach_the_server(printed):
    body = {"model": "talker", "prompt": "a", "max_tokens": 1}
    assert post(printed, "/v1/completions", body, Host="evil.example")[0] == 400
    assert post(printed, "/v1/completions", body, Host="localhost:1234")[0] == 200
    status, text = post(printed, "/v1/completions", body, Content_Type="text/plain")
    assert status == 415 and "Content-Type: application/json" in text
    for path in ("/docs", "/redoc", "/openapi.json", "/v1/responses", "/reset"):
        assert post(printed, path, body)[0] == 404


def test_a_key_is_required_if_one_is_set(guarded):
    body = {"model": "talker", "prompt": "a", "max_tokens": 1}
    assert "Authorization: Bearer $HF_NANOGPT_API_KEY" in guarded[-1] and KEY not in guarded[-1]
    for headers in ({}, {"Authorization": "Bearer x"}, {"Authorization": "Bearer "}):
        status, text = post(guarded, "/v1/completions", body, **headers)
        assert (status, "Authorization: Bearer KEY" in text) == (401, True)
    for path in ("/v1/chat/completions", "/load_model"):
        assert post(guarded, path, HELLO)[0] == 401
    for path in ("/v1/models", "/v1/models/talker"):
        with pytest.raises(HTTPError, match="401"):
            urlopen(f"{address(guarded)}{path}")
    key = f"Bearer {KEY}".encode().decode("latin-1")  # as its bytes are
    for given in (key, key.replace("Bearer", "bearer")):
        assert post(guarded, "/v1/completions", body, Authorization=given)[0] == 200


def test_other_machines_need_a_key(tmp_path, monkeypatch, capsys):
    monkeypatch.delenv("HF_NANOGPT_API_KEY", raising=False)
    for key in ([], ["--api_key="]):
        command = ["serve", str(save_talker(tmp_path)), "--host=0.0.0.0", "--port=0", *key]
        assert main(command) == 2
        assert "host=0.0.0.0 lets other machines connect" in capsys.readouterr().err


def ask_and_leave(printed, body: dict) -> None:
    """Send a request with the key, and close the connection before the answer."""
    host, port = address(printed).removeprefix("http://").split(":")
    raw = json.dumps(body).encode()
    head = (
        f"POST /v1/completions HTTP/1.1\r\nHost: {host}\r\nAuthorization: Bearer {KEY}\r\n"
        f"Content-Type: application/json\r\nContent-Length: {len(raw)}\r\n\r\n"
    )
    with socket.create_connection((host, int(port))) as connection:
        connection.sendall(head.encode() + raw)


def test_a_template_that_never_ends_is_stopped_and_others_are_answered(guarded):
    key = {"Authorization": f"Bearer {KEY}".encode().decode("latin-1")}
    with ThreadPoolExecutor(1) as pool:
        chat = pool.submit(post, guarded, "/v1/chat/completions", HELLO, **key)
        body = {"model": "talker", "prompt": "a", "max_tokens": 1}
        assert post(guarded, "/v1/completions", body, **key)[0] == 200
        status, text = chat.result()
    assert status == 400 and "takes more than 2 seconds" in text


@pytest.mark.parametrize("stream", [False, True])
def test_work_for_a_client_that_left_ends(stream, guarded):
    key = {"Authorization": f"Bearer {KEY}".encode().decode("latin-1")}
    body = {"model": "talker", "prompt": "a", "seed": 1, "max_tokens": 19_000}
    for _ in range(6):  # each would take minutes
        ask_and_leave(guarded, body | {"stream": stream})
    assert post(guarded, "/v1/completions", body | {"max_tokens": 1}, **key)[0] == 200


def test_the_name_of_a_model_shows_no_path(guarded):
    assert guarded[-2].startswith("talker answers at http://127.0.0.1:")


# other clients


def test_printed_curl_command_works(printed):
    done = subprocess.run(shlex.split(printed[-1]), capture_output=True, text=True)
    answer = json.loads(done.stdout)
    assert answer["choices"][0]["message"]["role"] == "assistant"


@pytest.mark.slow
def test_transformers_chat_talks_with_it(printed):
    program = "from transformers.cli.transformers import main; main()"
    flags = ["max_new_tokens=12", "do_sample=False"]
    command = [sys.executable, "-c", program, "chat", "talker", address(printed), *flags]
    given = {"input": "hello\nn\n!exit\n", "env": ONLINE}
    done = subprocess.run(command, capture_output=True, text=True, **given)
    assert answer_whole(batched(), HELLO["messages"]) in done.stdout, done.stderr


@pytest.mark.slow
def test_without_a_template_only_texts_are_answered_and_sigterm_ends_all(tmp_path):
    (save_talker(tmp_path / "talker", block_size=20_000) / "chat_template.jinja").unlink()
    server, printed = start_server(tmp_path, "talker")
    assert "--chat_template chatml" in printed[0] and "/v1/completions" in printed[-1]
    given = {"base_url": f"{address(printed)}/v1", "api_key": "any", "max_retries": 0}
    with openai.OpenAI(**given) as client, ThreadPoolExecutor(8) as pool:
        with pytest.raises(openai.BadRequestError, match="--chat_template chatml"):
            client.chat.completions.create(**HELLO)
        long = {"model": "talker", "prompt": "a", "seed": 1, "max_tokens": 19_000}
        stream = client.completions.create(**long, stream=True)
        next(iter(stream))
        waiting = [pool.submit(client.completions.create, **long) for _ in range(8)]
        server.send_signal(signal.SIGTERM)  # while it answers
        assert (server.stdout.read(), server.wait()) == ("Ended.\n", 0)
        assert all(isinstance(one.exception(), openai.APIError) for one in waiting)


def test_unusable_address_is_refused():
    sentence = r"Cannot listen on host=127\.0\.0\.1 port=\d+ .*--port"
    with socket.create_server(("127.0.0.1", 0)) as taken, pytest.raises(ValueError, match=sentence):
        open_socket("127.0.0.1", taken.getsockname()[1])
    with pytest.raises(ValueError, match="port=70000 is invalid"):
        open_socket("127.0.0.1", 70_000)
    with pytest.raises(ValueError, match=r"host=300\.1\.1\.1"):
        open_socket("300.1.1.1", 0)


def test_bad_checkpoint_is_refused(tmp_path, capsys):
    assert main(["serve", str(tmp_path)]) == 2
    assert "not a checkpoint folder" in capsys.readouterr().err


def test_without_the_extra_the_command_names_it(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "starlette", None)
    assert main(["serve", "x"]) == 2
    assert "pip install 'hf-nanogpt[serve]'" in capsys.readouterr().err
