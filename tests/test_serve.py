"""`hf-nanogpt serve` over real HTTP, asked by the clients that people use."""

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
from conftest import _HUB, ROOT
from test_chat import END, TOKENIZER, answer_whole, save_talker, talker, user

from hf_nanogpt import generate_text
from hf_nanogpt.cli import main
from hf_nanogpt.serving import open_socket

openai = pytest.importorskip("openai", reason="needs pip install 'hf-nanogpt[serve]'")
pytest.importorskip("uvicorn", reason="needs pip install 'hf-nanogpt[serve]'")

# The server could ask the Hub of these tests, which would note it.
ONLINE = os.environ | {"HF_HUB_OFFLINE": "0", "PYTHONPATH": str(ROOT)}
HELLO = {"model": "talker", "messages": [user("hello")]}
SHORT = {"max_tokens": 12, "temperature": 0}


def start_server(folder, *flags: str):
    """Start a server; return its process and all that it printed until it was ready."""
    command = [sys.executable, "-m", "hf_nanogpt", "serve", "talker/", "--port=0", *flags]
    _HUB.reset()
    # In a shell's background a process ignores SIGINT from the start.
    heed = lambda: signal.signal(signal.SIGINT, signal.default_int_handler)  # noqa: E731
    given = {"env": ONLINE, "stdout": subprocess.PIPE, "text": True, "preexec_fn": heed}
    server = subprocess.Popen(command, cwd=folder, **given)
    printed = []
    while not printed or not printed[-1].startswith("curl "):
        printed.append(server.stdout.readline())
        assert printed[-1], "the server has ended"
    return server, printed


def address(printed: list[str]) -> str:
    return printed[-2].split("answers at ")[1].split("/v1")[0]


@pytest.fixture(scope="module")
def printed(tmp_path_factory):
    folder = tmp_path_factory.mktemp("served")
    save_talker(folder / "talker")
    server, printed = start_server(folder)
    yield printed
    assert _HUB.requests == [], "the server has asked the Hub"
    server.terminate()
    assert (server.stdout.read(), server.wait()) == ("Ended.\n", 0)


@pytest.fixture
def client(printed):
    with openai.OpenAI(base_url=f"{address(printed)}/v1", api_key="any", max_retries=0) as client:
        yield client


def test_server_is_on_this_machine_only_and_lists_one_model(printed, client):
    assert address(printed).startswith("http://127.0.0.1:")
    assert [model.id for model in client.models.list()] == ["talker"]
    with urlopen(f"{address(printed)}/health") as answer:
        assert json.load(answer) == {"status": "ok"}


def test_chat_completion_is_the_answer_of_transformers(client):
    done = client.chat.completions.create(**HELLO, **SHORT)
    assert done.choices[0].message.content == answer_whole(talker(), HELLO["messages"])
    assert (done.model, done.choices[0].finish_reason) == ("talker", "length")
    assert done.usage.completion_tokens == 12


def test_completion_is_the_text_of_generate(client):
    settings = {"max_new_tokens": 12, "temperature": 0}
    for prompt in ("the cat", ""):
        done = client.completions.create(model="talker", prompt=prompt, **SHORT)
        [text] = generate_text(talker(), TOKENIZER, prompt, **settings)
        assert prompt + done.choices[0].text == text


def test_streamed_pieces_are_the_whole_answer(client):
    chunks = list(client.chat.completions.create(**HELLO, **SHORT, stream=True))
    pieces = [chunk.choices[0].delta.content or "" for chunk in chunks]
    assert "".join(pieces) == answer_whole(talker(), HELLO["messages"])
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
    model = talker()
    assert answers == [answer_whole(model, [user(text)]) for text in texts]


def test_answers_are_sampled_unless_temperature_is_zero(client):
    def ask(**given) -> str:
        return client.completions.create(model="talker", prompt="a", max_tokens=12, **given)

    one, same, other = (ask(seed=seed).choices[0].text for seed in (1, 1, 2))
    assert one == same != other


def test_answer_ends_where_the_context_or_the_turn_ends(client):
    done = client.chat.completions.create(**HELLO)
    assert (done.usage.total_tokens, done.choices[0].finish_reason) == (256, "length")
    done = client.chat.completions.create(**HELLO, logit_bias={str(END): 1e4})
    assert (done.choices[0].message.content, done.choices[0].finish_reason) == ("", "stop")


BAD = {
    "another model": ({"model": "gpt2"}, "pinned to 'talker'"),
    "long prompt": ({"prompt": "x" * 256}, "256 tokens.*context is 256"),
    "temperature": ({"temperature": -1}, "temperature=-1.0"),
    "top_p": ({"top_p": 1.5}, "top_p=1.5"),
    "length": ({"max_tokens": 0}, "max_new_tokens=0"),
    "prompts": ({"prompt": ["a", "b"]}, "must be a string"),
    "stop": ({"extra_body": {"top_k": 3}}, "Unexpected fields.*top_k"),
}


@pytest.mark.parametrize("body", [{}, {"messages": [{"content": "a"}]}, {"messages": 3}, 7])
def test_a_chat_request_of_another_form_gets_a_sentence(body, printed):
    body = json.dumps({"model": "talker", **body} if isinstance(body, dict) else body).encode()
    where = f"{address(printed)}/v1/chat/completions"
    with pytest.raises(HTTPError) as error:
        urlopen(Request(where, body, {"Content-Type": "application/json"}))
    assert error.value.code in (400, 422)
    assert json.load(error.value)["error"]["type"] == "invalid_request_error"


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("name", BAD)
def test_bad_request_gets_a_sentence_before_any_text(name, stream, client):
    given, words = BAD[name]
    with pytest.raises(openai.APIStatusError, match=words) as error:
        client.completions.create(**{"model": "talker", "prompt": "a", "stream": stream} | given)
    assert error.value.status_code in (400, 422)


def test_no_other_model_is_loaded(printed):
    body = json.dumps({"model": "user/other"}).encode()
    request = Request(f"{address(printed)}/load_model", body, {"Content-Type": "application/json"})
    with urlopen(request) as answer:
        assert "This server has no model 'user/other'." in answer.read().decode()


def test_printed_curl_command_works(printed):
    done = subprocess.run(shlex.split(printed[-1]), capture_output=True, text=True)
    answer = json.loads(done.stdout)
    assert answer["choices"][0]["message"]["role"] == "assistant"


def test_transformers_chat_talks_with_it(printed):
    program = "from transformers.cli.transformers import main; main()"
    flags = ["max_new_tokens=12", "do_sample=False"]
    command = [sys.executable, "-c", program, "chat", "talker", address(printed), *flags]
    given = {"input": "hello\nn\n!exit\n", "env": ONLINE}
    done = subprocess.run(command, capture_output=True, text=True, **given)
    assert answer_whole(talker(), HELLO["messages"]) in done.stdout, done.stderr


def test_without_a_template_texts_go_on_and_chats_are_told_why_not(tmp_path):
    (save_talker(tmp_path / "talker", block_size=20_000) / "chat_template.jinja").unlink()
    server, printed = start_server(tmp_path)
    assert "--chat_template chatml" in printed[0] and "/v1/completions" in printed[-1]
    with openai.OpenAI(base_url=f"{address(printed)}/v1", api_key="any", max_retries=0) as client:
        with pytest.raises(openai.BadRequestError, match="--chat_template chatml"):
            client.chat.completions.create(**HELLO)
        given = {"prompt": "a", "max_tokens": 1000, "stream": True}
        next(iter(client.completions.create(model="talker", **given)))
        server.send_signal(signal.SIGINT)  # while it answers
        assert (server.stdout.read(), server.wait()) == ("Ended.\n", 0)


def test_address_that_cannot_be_had_is_refused():
    sentence = r"port=\d+ cannot be listened at .*--port, or 0"
    with socket.create_server(("127.0.0.1", 0)) as taken, pytest.raises(ValueError, match=sentence):
        open_socket("127.0.0.1", taken.getsockname()[1])
    with pytest.raises(ValueError, match="port=70000 is not possible"):
        open_socket("127.0.0.1", 70_000)
    with pytest.raises(ValueError, match=r"host=300\.1\.1\.1"):
        open_socket("300.1.1.1", 0)


def test_bad_checkpoint_is_refused(tmp_path, capsys):
    assert main(["serve", str(tmp_path)]) == 2
    assert "no checkpoint folder" in capsys.readouterr().err


def test_without_the_extra_the_verb_names_it(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "fastapi", None)
    assert main(["serve", "x"]) == 2
    assert "pip install 'hf-nanogpt[serve]'" in capsys.readouterr().err
