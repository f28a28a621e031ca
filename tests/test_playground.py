"""The playground shows the model's probabilities, and continues from the token a person picks."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
from importlib.util import find_spec
from urllib.error import HTTPError
from urllib.request import Request, urlopen

import pytest
import torch
from browser import MISSING, open_browser
from conftest import ROOT, tiny_model

from hf_nanogpt import stream_text, train_tokenizer
from hf_nanogpt.analysis.likeliest import Candidate, Step, choose_candidate, stream_steps
from hf_nanogpt.apps.playground import (
    Speaker,
    _build_settings,
    render_candidates,
    render_legend,
    render_text,
)
from hf_nanogpt.cli import main
from hf_nanogpt.errors import UserError, printable

TOKENIZER = train_tokenizer([], kind="byte")
PROMPT = "the cat"


def talker(family: str = "nano", **overrides):
    model = tiny_model(family, vocab_size=len(TOKENIZER), **overrides)
    model.generation_config.eos_token_id = None  # it never ends by itself
    return model


def ids_of(prompt: str, steps) -> torch.Tensor:
    return torch.tensor([TOKENIZER(prompt)["input_ids"] + [step.came.id for step in steps]])


@torch.no_grad()
def shares_after(model, ids: torch.Tensor) -> torch.Tensor:
    return model(ids, use_cache=False).logits[0, -1].softmax(dim=-1)


# the steps


def test_each_step_has_the_softmax_of_the_logits_whatever_is_sampled(family):
    model = talker(family)
    model.generation_config.repetition_penalty = 1.5
    settings = {"max_new_tokens": 12, "temperature": 0.5, "top_k": 50, "top_p": 0.9, "seed": 3}
    steps = list(stream_steps(model, TOKENIZER, PROMPT, num_likeliest=4, **settings))
    assert len(steps) == 12
    for i, step in enumerate(steps):
        shares = shares_after(model, ids_of(PROMPT, steps[:i]))
        order = shares.argsort(descending=True).tolist()
        assert step.came.probability == pytest.approx(shares[step.came.id].item(), rel=1e-4)
        assert step.rank == order.index(step.came.id) + 1
        assert [candidate.id for candidate in step.likeliest] == order[:4]
        told = [candidate.probability for candidate in step.likeliest]
        assert told == pytest.approx(shares[order[:4]].tolist(), rel=1e-4)


@pytest.mark.parametrize(
    "setting",
    [{"guidance_scale": 2.0}, {"prefill_chunk_size": 2}, {"prompt_lookup_num_tokens": 3}],
    ids=str,
)
def test_a_setting_that_runs_the_model_not_once_for_each_token_is_refused(setting):
    model = talker()
    model.generation_config.update(**setting)
    steps = stream_steps(model, TOKENIZER, "the cat the cat", max_new_tokens=9, temperature=0)
    with pytest.raises(UserError, match=f"generation_config.json.*{next(iter(setting))}"):
        list(steps)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("speaker")
    talker().save_pretrained(folder)
    TOKENIZER.save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize("seed", [0, 7])
def test_same_seed_gives_the_text_of_the_command_generate(seed, checkpoint, capfd):
    flags = ["--max_new_tokens", "20", "--seed", str(seed), "--top_k", "30", "--top_p", "0.8"]
    assert main(["generate", checkpoint, PROMPT, *flags]) == 0
    settings = {"temperature": 0.8, "top_k": 30, "top_p": 0.8, "max_new_tokens": 20, "seed": seed}
    steps = list(stream_steps(talker(), TOKENIZER, PROMPT, **settings))
    text = TOKENIZER.decode([step.came.id for step in steps], skip_special_tokens=True)
    assert capfd.readouterr().out == printable(f"{PROMPT}{text}\n")


def test_continuing_from_a_candidate_keeps_the_text_before_it():
    model = talker()
    settings = {"max_new_tokens": 6, "temperature": 0}
    steps = list(stream_steps(model, TOKENIZER, PROMPT, **settings))
    kept = choose_candidate(steps, 3, 2)
    assert kept[:3] == steps[:3] and len(kept) == 4
    assert (kept[3].came, kept[3].rank, kept[3].chosen) == (steps[3].likeliest[2], 3, True)
    later = list(stream_steps(model, TOKENIZER, PROMPT, steps=kept, **settings))
    expected = model.generate(ids_of(PROMPT, kept), max_new_tokens=6, do_sample=False)
    assert ids_of(PROMPT, kept + later).tolist() == expected.tolist()


def test_steps_end_where_the_context_does_and_a_full_one_is_refused():
    model = talker()
    assert len(list(stream_steps(model, TOKENIZER, "a" * 60, max_new_tokens=100))) == 4
    with pytest.raises(ValueError, match=r"64 tokens.*context is 64"):
        next(stream_steps(model, TOKENIZER, "a" * 64))


def test_steps_of_one_model_taken_in_turns_are_those_taken_alone():
    model, settings = talker(), {"max_new_tokens": 8, "temperature": 0}
    alone = [list(stream_steps(model, TOKENIZER, text, **settings)) for text in ("one", "two")]
    one, two = (stream_steps(model, TOKENIZER, text, **settings) for text in ("one", "two"))
    assert list(zip(one, two, strict=True)) == list(zip(*alone, strict=True))


def test_closing_the_stream_stops_the_model():
    model, passes = talker(block_size=4096), []
    model.register_forward_hook(lambda *_: passes.append(1))
    for stream in (stream_text, stream_steps):
        passes.clear()
        pieces = stream(model, TOKENIZER, PROMPT, max_new_tokens=4000)
        next(pieces)
        pieces.close()
        seen = len(passes)
        assert seen < 4000
        shares_after(model, ids_of(PROMPT, []))
        assert len(passes) == seen + 1  # nobody else has used the model since
    assert len(model._forward_hooks) == 1


# the HTML


def made_step(text: str, probability: float) -> Step:
    came = Candidate(1, text, probability)
    return Step(came, 1, [came, Candidate(2, "<b>", 0.001)])


def test_markup_in_a_text_stays_text_and_white_space_is_seen():
    steps = [made_step("<script>&\"'", 0.5), made_step("\n\t", 0.5)]
    for html in (render_text("<i>${x}", steps, "<u>"), render_candidates(steps[0], 0)):
        assert not re.search(r"<(script|u|b>&|i>\$)", html)
    assert "&lt;script&gt;&amp;" in html
    assert "<i>↵</i>\n<i>⇥</i>" in render_text("", steps)


def test_colors_follow_the_probability_and_the_legend_names_each():
    shares = [0.95, 0.5, 0.2, 0.01, 0.0]
    html = render_text("", [made_step("a", share) for share in shares])
    assert re.findall(r"band\d", html) == [f"band{i}" for i in range(5)]
    assert re.findall(r"band\d", render_legend()) == [f"band{i}" for i in range(5)]


@pytest.mark.parametrize(
    ("prompt", "settings", "words"),
    [
        ("", {}, "has none: give a text"),
        ("a" * 64, {}, "64 tokens, and this model"),
        ("a", {"temperature": 0.0001}, "temperature=0.0001 is invalid"),
        ("a", {"seed": -1}, "seed=-1 is invalid"),
    ],
)
def test_bad_input_is_explained_on_the_page(prompt, settings, words):
    tokenizer = train_tokenizer([], kind="byte")
    tokenizer.bos_token = None
    *_, (html, (kept, steps)) = Speaker("a", talker(), tokenizer).write(prompt, [], settings)
    assert words in re.search('<p class="note error">(.*?)</p>', html)[1]
    assert (kept, steps) == (prompt, [])


# the command


def test_command_without_gradio_says_how_to_install_it(checkpoint, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "gradio", None)
    assert main(["playground", checkpoint]) == 2
    assert "pip install 'hf-nanogpt[demo]'" in capsys.readouterr().err


needs_gradio = pytest.mark.skipif(find_spec("gradio") is None, reason="needs the extra `demo`")


@needs_gradio
@pytest.mark.parametrize(("own", "expected"), [({}, 0.8), ({"temperature": 2.5}, 2.5)])
def test_the_page_starts_with_the_temperature_of_the_checkpoint(own, expected):
    import gradio

    model = talker()
    model.generation_config.update(**own)
    with gradio.Blocks():
        slider = _build_settings([Speaker("one", model, TOKENIZER)])["temperature"]
    assert slider.value == expected <= slider.maximum


@needs_gradio
def test_bad_input_to_the_command_is_one_sentence(checkpoint, tmp_path, capsys):
    talker().save_pretrained(tmp_path / "mute")
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = str(server.getsockname()[1])
        cases = {
            (tmp_path / "nothing",): "There is no checkpoint at",
            (tmp_path / "mute",): "has no tokenizer",
            (checkpoint, tmp_path / "mute"): "has no tokenizer",
            (checkpoint, "--port", port): f"port={port} (Address already in use",
            (checkpoint, "--port", "0"): "port=0 is invalid",
            (checkpoint, "--port", "70000"): "port=70000 is invalid",
            (checkpoint, "--host", "no.such.host.invalid"): "host=no.such.host.invalid ",
            (checkpoint, "--prot", "1"): "Did you mean --port?",
        }
        for argv, words in cases.items():
            assert main(["playground", *map(str, argv)]) == 2, argv
            output = capsys.readouterr()
            [sentence] = output.err.splitlines()[-1:]
            assert sentence.startswith("hf-nanogpt: ") and words in sentence, sentence
            assert output.out == "" and "Traceback" not in output.err


@pytest.mark.slow
@needs_gradio
def test_a_page_from_elsewhere_does_not_reach_the_playground(checkpoint):
    command = [sys.executable, "-m", "hf_nanogpt", "playground", checkpoint]
    given = {"stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, env=os.environ | {"PYTHONPATH": str(ROOT)}, **given) as server:
        try:
            url = re.search(r"http://127\.0\.0\.1:\d+/", server.stdout.readline())[0]
            with urlopen(Request(f"{url}config", headers={"Host": "localhost"})) as answer:
                assert answer.status == 200
            with pytest.raises(HTTPError, match="400"):
                urlopen(Request(f"{url}config", headers={"Host": "evil.example"}))
        finally:
            server.terminate()


@needs_gradio
@pytest.mark.skipif(bool(MISSING), reason=f"needs the Debian packages of {', '.join(MISSING)}")
def test_page_works_in_a_browser_without_a_network(checkpoint):
    command = [sys.executable, "-m", "hf_nanogpt", "playground", checkpoint, checkpoint]
    env = os.environ | {"PYTHONPATH": str(ROOT), "http_proxy": "http://127.0.0.1:9"}
    offline = "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1"
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=env) as server:
        try:
            url = re.search(r"http://127\.0\.0\.1:\d+/", server.stdout.readline())[0]
            with open_browser(offline) as browser:
                play(browser, url)
        finally:
            server.send_signal(signal.SIGINT)
    assert server.returncode == 0


def play(browser, url: str) -> None:
    def wait(script: str) -> None:
        # The browser waits, and its driver ends a script that takes longer than 30 seconds.
        look = f"const look = () => {script} ? done(true) : setTimeout(look, 50); look();"
        assert browser.run(f"return new Promise(done => {{ {look} }})"), script

    def write(selector: str, text: str) -> None:
        wait(f"document.querySelector({selector!r})")
        browser.run(
            f"const e = document.querySelector({selector!r}); e.value = {json.dumps(text)};"
            "e.dispatchEvent(new Event('input', {bubbles: true}))"
        )

    def texts(selector: str) -> list[str]:
        return browser.run(
            f"return [...document.querySelectorAll({selector!r})].map(e => e.textContent)"
        )

    def said(words: str) -> None:
        script = "[...document.querySelectorAll('.note')].map(e => e.textContent).join()"
        wait(f"{script} === {words!r}")

    browser.open(url)
    write("#prompt textarea", PROMPT)
    write("input[aria-label='number input for New tokens']", "12")
    browser.point("#generate", 0.5, 0.5, click=True)
    said("12 tokens.,12 tokens.")
    assert texts(".tokens .prompt") == [PROMPT, PROMPT]
    left, right = (texts(f".speaker:nth-child({i}) .tokens .token") for i in (1, 2))
    steps = list(
        stream_steps(talker(), TOKENIZER, PROMPT, max_new_tokens=12, temperature=0.8, seed=1)
    )
    assert len(left) == 12 and left == right
    found = browser.run(
        "return [...document.querySelectorAll('.speaker .token')].slice(0, 12).map(e => e.title)"
    )
    assert [int(re.search(r"rank (\d+)", title)[1]) for title in found] == [
        step.rank for step in steps
    ]
    browser.point(".speaker:nth-child(1) .token:nth-child(5)", 0.5, 0.5, click=True)
    wait("document.querySelectorAll('.candidate').length === 10")
    assert "for token 4" in texts(".candidates h3")[0]
    choice = next(i for i, c in enumerate(steps[3].likeliest) if c.id != steps[3].came.id)
    browser.point(f".candidate[data-choice='{choice}']", 0.5, 0.5, click=True)
    said("16 tokens.,12 tokens.")
    assert browser.run("return document.querySelector('.token.chosen').dataset.place") == "3"
    assert texts(".speaker:nth-child(1) .tokens .token")[:3] == left[:3]
    write("#prompt textarea", "a" * 64)
    browser.point("#generate", 0.5, 0.5, click=True)
    wait("document.querySelectorAll('.note.error').length === 2")
    assert "64 tokens, and this model" in texts(".note.error")[0]
    places = browser.run("return performance.getEntriesByType('resource').map(e => e.name)")
    assert places and all(place.startswith(url) for place in places)
    assert browser.log() == []
