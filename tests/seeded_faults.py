"""Show that the short test suite finds faults: put each one in, and see a test of it fail.

Each fault is one that people have made, or that no generic test of transformers notices. It is put
into a copy of the package, and the test file named with it runs as `make test` would run it.

Run: python tests/seeded_faults.py [NUMBER ...]
"""

import os
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parent.parent
COPIED = ("hf_nanogpt", "tests", "examples", "benchmarks", "assets", "model_cards")
COPIED += ("hf_nanogpt_command.py", "pyproject.toml", "README.md", "LICENSE")


@dataclass(frozen=True)
class Fault:
    """One text of one file, what replaces it, and the tests that must notice."""

    what: str
    file: str
    right: str
    wrong: str
    tests: str


FAULTS = [
    # The model: the traps of a model outside transformers
    Fault(
        "attention scaled by 1 / head_dim",
        "modeling_nanogpt.py",
        "self.scaling = self.head_dim**-0.5",
        "self.scaling = self.head_dim**-1.0",
        "test_convert",
    ),
    Fault(
        "the length of the cache is forgotten where position_ids are not given",
        "modeling_nanogpt.py",
        "position_ids = (steps + past_seen_tokens).unsqueeze(0)",
        "position_ids = steps.unsqueeze(0)",
        "test_cache",
    ),
    Fault(
        "sliding layers get the mask of full attention",
        "modeling_nanogpt.py",
        "attention_mask=causal_masks[layer_type],",
        'attention_mask=causal_masks.get("full_attention", causal_masks[layer_type]),',
        "test_convert test_causality",
    ),
    Fault(
        "attention sees the future",
        "modeling_nanogpt.py",
        "self.is_causal = True",
        "self.is_causal = False",
        "test_causality",
    ),
    Fault(
        "the sine of the rotation has the wrong sign",
        "modeling_nanogpt.py",
        "sin = emb.sin() * self.attention_scaling",
        "sin = -emb.sin() * self.attention_scaling",
        "test_convert test_doctor",
    ),
    Fault(
        "num_items_in_batch does not reach the loss",
        "modeling_nanogpt.py",
        "labels=labels, vocab_size=self.config.vocab_size, **kwargs",
        "labels=labels, vocab_size=self.config.vocab_size",
        "test_loss",
    ),
    Fault(
        "the residual projections are initialised like all others",
        "modeling_nanogpt.py",
        'is_residual_proj = getattr(module, "is_residual_proj", False)',
        "is_residual_proj = False",
        "test_init",
    ),
    Fault(
        "a saved folder names one Auto class only",
        "modeling_nanogpt.py",
        "for auto_class, cls in AUTO_CLASSES.items()\n",
        "for auto_class, cls in AUTO_CLASSES.items() if isinstance(self, cls)\n",
        "test_loading",
    ),
    Fault(
        "the fast norm forgets the part of its gradient along x",
        "cpu_kernels.py",
        ".addcmul_(x, along_x, value=-1)",
        "",
        "test_cpu_kernels",
    ),
    # Data
    Fault(
        "packed documents see each other, as positions do not start again",
        "data/packing.py",
        "starts = np.where(is_start(ids, self.eos_token_id), index, 0)",
        "starts = np.zeros_like(ids)",
        "test_packing",
    ),
    Fault(
        "padding is learnt",
        "data/packing.py",
        "ids = encode_unlearnt(np.full((len(rows), length), self.eos_token_id or 0))",
        "ids = np.full((len(rows), length), self.eos_token_id or 0)",
        "test_packing",
    ),
    Fault(
        "blocks do not share a token, so that some tokens are never predicted",
        "data/packing.py",
        "step, last = self.context_length - 1, self.num_tokens - 1",
        "step, last = self.context_length, self.num_tokens - 1",
        "test_packing",
    ),
    Fault(
        "a resumed stream forgets the tokens that were left over",
        "data/streams.py",
        'rest = np.array(begin["rest"], dtype=np.int64)',
        "rest = np.array([], dtype=np.int64)",
        "test_packed_streams",
    ),
    Fault(
        "a person's words can end a turn",
        "data/chat_text.py",
        "self._words.sub(_hide_first, content)",
        "content",
        "test_chat_text",
    ),
    Fault(
        "special tokens count as text in bits per byte",
        "data/tokenization.py",
        "[0 if i in special else len(spell(i)) for i in ids]",
        "[len(spell(i)) for i in ids]",
        "test_tokenization test_evaluation",
    ),
    # Training
    Fault(
        "matrices with more rows than columns take too short steps",
        "training/optim.py",
        "scale = max(1.0, rows / columns) ** 0.5",
        "scale = 1.0",
        "test_optim",
    ),
    Fault(
        "momentum without Nesterov's look ahead",
        "training/optim.py",
        "orthogonalize(ahead)",
        "orthogonalize(torch.stack(self._buffers(same)))",
        "test_optim",
    ),
    Fault(
        "the validation loss leaves out the last batch",
        "training/evaluating.py",
        "args.dataloader_drop_last = False",
        "args.dataloader_drop_last = True",
        "test_training",
    ),
    Fault(
        "a resumed run forgets the loss since the last log",
        "training/restoring.py",
        "trainer._tr_loss += losses[args.process_index]",
        "pass",
        "test_interruption test_training",
    ),
    # The edges
    Fault(
        "a link in a checkpoint leads out of its folder",
        "untrusted.py",
        "if not any(target.is_relative_to(root) for root in _allowed_roots(folder)):",
        "if False:",
        "test_hub_safety",
    ),
    Fault(
        "the least likely token is drawn",
        "generation.py",
        "drawn = probabilities.argmax(dim=-1, keepdim=True)",
        "drawn = probabilities.argmin(dim=-1, keepdim=True)",
        "test_generate_text",
    ),
    Fault(
        "a damaged file of a checkpoint is not noticed",
        "checkpoint/steps.py",
        "if sum_file(path_inside(step, name)) != checksum:",
        "if not path_inside(step, name).exists():",
        "test_interruption",
    ),
    Fault(
        "a bug of the package looks like a mistake of the user",
        "cli/__init__.py",
        "if not isinstance(error, UserError):",
        "if not isinstance(error, ValueError):",
        "test_cli",
    ),
]


def finds(fault: Fault) -> str | None:
    """Return the first test that fails with the fault in place, or None."""
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder)
        for name in COPIED:
            source, target = ROOT / name, copy / name
            shutil.copytree(source, target) if source.is_dir() else shutil.copy(source, target)
        path = copy / "hf_nanogpt" / fault.file
        text = path.read_text(encoding="utf-8")
        assert text.count(fault.right) == 1, f"{fault.file} does not have once: {fault.right}"
        path.write_text(text.replace(fault.right, fault.wrong), encoding="utf-8")
        command = [sys.executable, "-m", "pytest", "-x", "-q", "-m", "not slow"]
        done = subprocess.run(
            [*command, *(f"tests/{name}.py" for name in fault.tests.split())],
            cwd=copy,
            env=os.environ | {"PYTHONPATH": str(copy)},
            capture_output=True,
            text=True,
            check=False,
        )
    failed = [line for line in done.stdout.splitlines() if line.startswith(("FAILED", "ERROR"))]
    return failed[0] if failed else None


def main() -> None:
    """Print a line for each fault; exit with 1 if one was not found."""
    chosen = [int(number) for number in sys.argv[1:]] or range(1, len(FAULTS) + 1)
    missed = 0
    for number in chosen:
        fault, started = FAULTS[number - 1], time.monotonic()
        found = finds(fault)
        missed += found is None
        seconds = time.monotonic() - started
        print(f"{number:2} {fault.what}: {found or 'NOT FOUND'} ({seconds:.0f} s)", flush=True)
    print(f"{len(chosen) - missed} of {len(chosen)} faults were found.")
    sys.exit(missed > 0)


if __name__ == "__main__":
    main()
