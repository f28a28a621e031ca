"""Native exports in MLX, Apple's framework, which runs on Linux's CPUs too.

MLX has an environment of its own, because it shares nothing with ours but the folder that it reads:
`python tests/test_mlx.py` installs it.
"""

import json
import shlex
import subprocess
import sys

import pytest
import torch
from compat import OVERLAYS
from test_elsewhere import PROMPT, blocks, expected, save, workplace

from hf_nanogpt import export_checkpoint
from hf_nanogpt.cli import main

MLX = OVERLAYS / "mlx"
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not (MLX / ".ready").is_file(), reason="MLX is not there: python tests/test_mlx.py"
    ),
]
__all__ = ["workplace"]  # the fixture
# Prints the logits of a prompt and its greedy continuation, for each folder.
SCRIPT = """
import json, sys
import mlx.core as mx
from mlx_lm import load
from mlx_lm.generate import generate_step
prompt, *folders = sys.argv[1:]
ids = mx.array(json.loads(prompt))
for folder in folders:
    model, _ = load(folder)
    tokens = [int(token) for token, _ in generate_step(ids, model, max_tokens=20)]
    print(json.dumps({"logits": model(ids[None])[0].tolist(), "tokens": tokens}))
"""


def run_mlx(program: str, *arguments: str) -> str:
    command = [str(MLX / "bin" / program), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=250)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


def test_mlx_gives_the_logits_and_tokens_of_our_models(tmp_path):
    models, folders = [], []
    for family in ("gpt2", "llama", "qwen3", "nano"):
        models.append(save(family, tmp_path / family))
        folders.append(str(export_checkpoint(tmp_path / family, tmp_path / f"{family}-n").folder))
    results = run_mlx("python", "-c", SCRIPT, json.dumps(PROMPT), *folders).splitlines()
    for model, line in zip(models, results, strict=True):
        found, ids = json.loads(line), list(PROMPT)
        with torch.no_grad():
            logits = model(torch.tensor([ids])).logits[0]
            for _ in found["tokens"]:
                ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
        torch.testing.assert_close(torch.tensor(found["logits"]), logits, atol=1e-4, rtol=0)
        assert found["tokens"] == ids[len(PROMPT) :] and len(found["tokens"]) == 20


@pytest.mark.parametrize(
    ("family", "overrides"), [("gpt2", {"tie_word_embeddings": False}), ("nanochat", {})]
)
def test_mlx_refuses_what_its_page_leaves_out(family, overrides, tmp_path):
    save(family, tmp_path / "ours", **overrides)
    export_checkpoint(tmp_path / "ours", tmp_path / "native")
    command = [str(MLX / "bin" / "python"), "-c", SCRIPT, json.dumps(PROMPT)]
    done = subprocess.run([*command, str(tmp_path / "native")], capture_output=True, text=True)
    assert done.returncode == 1 and "parameters not in model" in done.stderr, done.stderr


def test_mlx_writes_the_text(workplace, monkeypatch):
    monkeypatch.chdir(workplace)
    ours, theirs = map(shlex.split, blocks("MLX", "bash").splitlines())
    assert main(ours[1:]) == 0
    text = expected(workplace).removeprefix("def")
    assert run_mlx(*theirs).strip() == text.strip()  # it leaves out a space at the start


if __name__ == "__main__":
    subprocess.run([sys.executable, "-m", "venv", str(MLX)], check=True)
    pip = [str(MLX / "bin" / "python"), "-m", "pip", "install", "--quiet"]
    subprocess.run([*pip, "mlx[cpu]>=0.32", "mlx-lm>=0.32"], check=True)
    (MLX / ".ready").touch()
