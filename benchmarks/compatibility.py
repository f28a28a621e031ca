"""How close converted models are to the classes of transformers and to nanoGPT's checkpoints.

Builds tiny random models in fp32 and converts them. Measures the largest difference of a logit on
the same tokens, and whether a conversion to the native format and back keeps every bit. (GPT-Neo
rounds queries of other models unless sqrt(head_dim) is a power of two: tests/test_export.py.)
Writes benchmarks/results/compatibility.json and prints the table in README.

Run: python benchmarks/compatibility.py (10 seconds)
"""

import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from hf_nanogpt.convert import convert_checkpoint, export_checkpoint

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "tests"))
from nanogpt_layout import evaluate_layout, make_state, write_checkpoint  # noqa: E402
from references import REFERENCES, make_reference, make_tokens  # noqa: E402

RESULTS = Path(__file__).parent / "results" / "compatibility.json"


@torch.no_grad()
def measure_reference(name: str, folder: Path) -> dict[str, Any]:
    """Compare a model of transformers with its conversion, then convert it to native and back."""
    reference, model = REFERENCES[name], make_reference(name)
    model.save_pretrained(folder / "original")
    convert_checkpoint(folder / "original", folder / "ours")
    export_checkpoint(folder / "ours", folder / "native", to=reference.format)
    convert_checkpoint(folder / "native", folder / "back")
    return {
        "format": reference.format,
        "reference": reference.architecture,
        "max_difference": _difference(folder / "ours", model(make_tokens()).logits),
        "round_trip": _is_same(folder / "ours", folder / "back"),
    }


def measure_nanogpt(bias: bool, folder: Path) -> dict[str, Any]:
    """Compare a ckpt.pt with its conversion."""
    state = make_state(bias=bias)
    convert_checkpoint(write_checkpoint(folder, state, bias=bias), folder / "ours")
    return {
        "format": "nanogpt",
        "reference": "its layout in plain torch",
        "max_difference": _difference(folder / "ours", evaluate_layout(state, make_tokens())),
        "round_trip": None,
    }


def _difference(ours: Path, expected: torch.Tensor) -> float:
    model = AutoModelForCausalLM.from_pretrained(ours).eval()
    with torch.no_grad():
        return float((model(make_tokens()).logits - expected).abs().max())


def _is_same(*folders: Path) -> bool:
    first, last = (load_file(folder / "model.safetensors") for folder in folders)
    return first.keys() == last.keys() and all(first[name].equal(last[name]) for name in first)


def render_table(rows: dict[str, dict[str, Any]]) -> str:
    """Return a Markdown table with one line for each format, the worst of its rows."""
    lines = [
        "| format | reference | shapes | largest difference | there and back |",
        "|---|---|---|---|---|",
    ]
    for name in dict.fromkeys(row["format"] for row in rows.values()):
        same = [row for row in rows.values() if row["format"] == name]
        trips = {row["round_trip"] for row in same}
        trip = "not written" if trips == {None} else "same bits" if trips == {True} else "differs"
        worst = max(row["max_difference"] for row in same)
        lines.append(f"| `{name}` | {same[0]['reference']} | {len(same)} | {worst:.1e} | {trip} |")
    return "\n".join(lines)


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        rows = {
            name: measure_reference(name, Path(folder) / str(i))
            for i, name in enumerate(REFERENCES)
        }
        for bias in (True, False):
            name = f"nanogpt, {'with' if bias else 'without'} biases"
            rows[name] = measure_nanogpt(bias, Path(folder) / name)
    versions = {"torch": torch.__version__, "transformers": transformers.__version__}
    RESULTS.write_text(json.dumps({"versions": versions, "rows": rows}, indent=2) + "\n", "utf-8")
    print(render_table(rows))


if __name__ == "__main__":
    main()
