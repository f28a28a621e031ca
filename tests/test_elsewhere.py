"""Other programs write the same text: ONNX, llama.cpp, CTranslate2, transformers without us."""

import re
import runpy
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, tiny_model

from hf_nanogpt import export_checkpoint, load_checkpoint, train_tokenizer
from hf_nanogpt.cli import main
from hf_nanogpt.convert import onnx
from hf_nanogpt.convert.onnx import export_onnx

# Importing the exporter takes long.
pytestmark = pytest.mark.xdist_group("elsewhere")
PAGE = (ROOT / "examples/run_elsewhere/README.md").read_text(encoding="utf-8")
TEXT = "def add(a, b):\n    return a + b\n\ndef sub(a, b):\n    return a - b\n"
PROMPT = [7, 3, 11, 40, 5]


@pytest.fixture(scope="module")
def workplace(tmp_path_factory) -> Path:
    """The folder that the page assumes, with a tiny model that is sure of what it writes."""
    place = tmp_path_factory.mktemp("elsewhere")
    tokenizer = train_tokenizer([TEXT] * 9, kind="bpe", vocab_size=270)
    model = tiny_model("nano", vocab_size=len(tokenizer)).train()
    ids = torch.tensor([tokenizer(TEXT).input_ids])
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    for _ in range(60):
        model(ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    for part in (model, tokenizer):
        part.save_pretrained(place / "runs/quickstart")
    return place


def blocks(section: str, language: str) -> str:
    """Return the code of a language below a heading of the page."""
    text = PAGE.split(f"\n## {section}\n")[1].split("\n## ")[0]
    return "\n".join(re.findall(rf"```{language}\n(.*?)```", text, re.DOTALL))


def run_here(command: list[str], place: Path) -> str:
    """Run a command where hf_nanogpt cannot be imported and return what it printed."""
    done = subprocess.run(command, cwd=place, capture_output=True, text=True, timeout=250)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


def run_commands(section: str, place: Path, monkeypatch) -> str:
    monkeypatch.chdir(place)
    for line in blocks(section, "bash").splitlines():
        program, *rest = shlex.split(line)
        if program == "hf-nanogpt":
            assert main(rest) == 0
        elif program == "python":
            output = run_here([sys.executable, str(ROOT / rest[0]), *rest[1:]], place)
        else:
            output = run_here([str(Path(sys.executable).with_name(program)), *rest], place)
    return output


def expected(place: Path) -> str:
    model, tokenizer = load_checkpoint(place / "runs/quickstart")
    ids = tokenizer("def", return_tensors="pt")
    return tokenizer.decode(model.generate(**ids, do_sample=False, max_new_tokens=40)[0]) + "\n"


@pytest.mark.slow
def test_onnxruntime_writes_the_text(workplace, monkeypatch, capsys):
    pytest.importorskip("onnxruntime", reason="pip install 'hf-nanogpt[onnx]'")
    assert run_commands("ONNX", workplace, monkeypatch) == expected(workplace)
    output = capsys.readouterr().out
    assert float(re.search(r"by at most (\S+)\.", output)[1]) < 1e-4
    assert str(ROOT) not in (workplace / "model.onnx").read_bytes().decode("latin-1")
    assert main(["export", "runs/quickstart", "model.onnx", "--to", "onnx"]) == 2


@pytest.mark.slow
def test_llama_cpp_writes_the_text(workplace, monkeypatch):
    for package in ("gguf", "xllamacpp"):
        pytest.importorskip(package, reason="pip install 'hf-nanogpt[gguf]' xllamacpp")
    assert run_commands("llama.cpp", workplace, monkeypatch) == expected(workplace)


@pytest.mark.slow
def test_transformers_and_ctranslate2_write_the_text(workplace, monkeypatch):
    monkeypatch.chdir(workplace)
    section = "transformers, without this package"
    (command,) = blocks(section, "bash").splitlines()
    assert main(shlex.split(command)[1:]) == 0
    alone = "import sys; sys.modules['hf_nanogpt'] = None\n" + blocks(section, "python")
    assert run_here([sys.executable, "-c", alone], workplace) == expected(workplace)
    pytest.importorskip("ctranslate2", reason="pip install ctranslate2")
    assert run_commands("CTranslate2", workplace, monkeypatch) == expected(workplace)


def save(family: str, folder: Path, **overrides):
    tokenizer = train_tokenizer([], kind="byte")
    model = tiny_model(family, vocab_size=len(tokenizer), **overrides)
    for name, p in model.named_parameters():
        if p.dim() == 1:
            torch.nn.init.normal_(p, mean=1.0 if name.endswith("norm.weight") else 0.0, std=0.2)
    for part in (model, tokenizer):
        part.save_pretrained(folder)
    return model


def generate(model, ids: list[int], new: int) -> list[int]:
    return model.generate(torch.tensor([ids]), do_sample=False, max_new_tokens=new)[0].tolist()


KINDS = ["full_attention", "sliding_attention"]
# With the page's nano they have every part that a family has.
PARTS = {
    "gpt1": {"n_layer": 1},
    "gpt3": {"layer_types": KINDS[1:], "n_layer": 1},
    "nanochat": {"num_key_value_heads": 2, "n_layer": 1},
}


@pytest.mark.slow
@pytest.mark.parametrize("family", PARTS)
def test_a_cache_loop_in_onnxruntime_gives_the_tokens_of_generate(family, tmp_path, monkeypatch):
    runtime = pytest.importorskip("onnxruntime", reason="pip install 'hf-nanogpt[onnx]'")
    model = save(family, tmp_path / "ours", **PARTS[family])
    if family == "gpt1":
        monkeypatch.setattr(onnx, "ONE_FILE_BYTES", 1000)
    file = export_onnx(tmp_path / "ours", tmp_path / "new" / "model.onnx")
    written = sorted((tmp_path / "new").iterdir())
    assert written == [file.path, *([file.data] if family == "gpt1" else [])]
    assert file.num_bytes == sum(path.stat().st_size for path in written)
    session = runtime.InferenceSession(file.path)
    script = runpy.run_path(str(ROOT / "examples/run_elsewhere/onnx_generate.py"))
    ids = script["generate"](session, PROMPT, max_new_tokens=30, ends=[0])
    assert ids == generate(model, PROMPT, 30)
    given = np.array([PROMPT, PROMPT[::-1], PROMPT])  # another batch than was traced
    past = {
        spec.name: np.zeros((3, spec.shape[1], 0, spec.shape[3]), np.float32)
        for spec in session.get_inputs()[2:]
    }
    feed = {"input_ids": given, "attention_mask": np.ones_like(given)} | past
    logits = session.run(["logits"], feed)[0]
    with torch.no_grad():
        own = model(torch.tensor(given)).logits
    torch.testing.assert_close(torch.tensor(logits), own, atol=1e-4, rtol=0)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "kind"), [("nano", None), ("gpt2", None), ("llama", None), ("nano", "int8")]
)
def test_ctranslate2_gives_the_tokens_of_generate(family, kind, tmp_path):
    ctranslate2 = pytest.importorskip("ctranslate2", reason="pip install ctranslate2")
    model, tokenizer = save(family, tmp_path / "ours"), train_tokenizer([], kind="byte")
    if family == "gpt2":  # see the page
        tokenizer.unk_token = tokenizer.eos_token
        tokenizer.save_pretrained(tmp_path / "ours")
    export_checkpoint(tmp_path / "ours", tmp_path / "native")
    converter = ctranslate2.converters.TransformersConverter(str(tmp_path / "native"))
    converter.convert(str(tmp_path / "ct2"), quantization=kind)
    generator = ctranslate2.Generator(str(tmp_path / "ct2"))
    prompt = tokenizer.convert_ids_to_tokens(PROMPT)
    score = generator.forward_batch([prompt])
    with torch.no_grad():
        own = model(torch.tensor([PROMPT])).logits
    off = (torch.tensor(np.array(score)) - own).abs().max()
    assert off < (0.2 if kind else 1e-4)
    if kind is None:
        settings = {"max_length": 20, "include_prompt_in_result": False}
        (result,) = generator.generate_batch([prompt], **settings)
        ids = generate(model, PROMPT, 20)[len(PROMPT) :]
        assert result.sequences_ids[0] == (ids[:-1] if ids[-1] == 0 else ids)  # it drops the end


@pytest.mark.slow
def test_what_cannot_be_onnx_is_refused_and_leaves_nothing(tmp_path, monkeypatch):
    pytest.importorskip("onnxruntime", reason="pip install 'hf-nanogpt[onnx]'")
    rope = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}
    save("llama", tmp_path / "dynamic", rope_parameters=rope)
    save("gpt2", tmp_path / "ours", n_layer=1)
    there, new = tmp_path / "there.onnx", tmp_path / "new.onnx"
    there.with_name("there.onnx.data").write_text("mine")
    before = sorted(tmp_path.iterdir())
    for checkpoint, destination, message in (
        ("dynamic", new, "rope_type='dynamic'"),
        ("ours", tmp_path / "model.bin", "ends in .onnx"),
        ("ours", there, r"there.onnx.data already exists"),
        ("ours", tmp_path / "there.onnx.data" / "new.onnx", "cannot write to"),
        ("none", new, "no checkpoint at"),
    ):
        with pytest.raises(ValueError, match=message):
            export_onnx(tmp_path / checkpoint, destination)
    with monkeypatch.context() as patch, pytest.raises(ValueError, match=r"hf-nanogpt\[onnx\]"):
        patch.setitem(sys.modules, "onnxscript", None)
        export_onnx(tmp_path / "ours", new)
    with monkeypatch.context() as patch, pytest.raises(ValueError, match="nothing was written"):
        patch.setattr(onnx, "TOLERANCE", 0)
        export_onnx(tmp_path / "ours", new)
    assert sorted(tmp_path.iterdir()) == before


def test_the_page_names_things_that_exist():
    for path in re.findall(r"\]\(([^)#]+)\)", PAGE):
        assert (ROOT / "examples/run_elsewhere" / path).exists(), path
    for path in re.findall(r"(examples/\S+\.py|tests/\w+\.py)", PAGE):
        assert (ROOT / path).is_file(), path
