"""Quality at an equal number of tokens: the quickstart recipe beside what one would do without it.

Trains on Python's own source code, each on the same blocks of the same documents with the same
tokenizer, one after the other; the validation text is compressed by xz for scale. Writes
benchmarks/results/recipes.json. Run: make bench (10 minutes on 2 cores)
"""

import json
import lzma
import platform
import tempfile
from pathlib import Path

import torch
import transformers

from hf_nanogpt import DataArguments, load_documents, train
from hf_nanogpt.arguments import parse_settings

RESULTS = Path(__file__).parent / "results" / "recipes.json"
GPT2 = {"preset": "gpt2", "dropout": 0.0}
COSINE = {"optim_recipe": "adamw", "lr_scheduler_type": "cosine", "warmup_steps": 0.05}
RUNS: dict[str, dict] = {
    "quickstart (nano, Muon)": {},
    "nano, AdamW 1e-3, cosine": COSINE,
    "nano, AdamW 3e-3, cosine": COSINE | {"learning_rate": 3e-3},
    "GPT-2 shape, AdamW 1e-3, cosine": COSINE | GPT2,
    "GPT-2 shape, AdamW 3e-3, cosine": COSINE | GPT2 | {"learning_rate": 3e-3},
}


def measure_xz(data: DataArguments) -> dict[str, float]:
    """Return the bits per byte that `xz -9` needs for the validation text, as one file."""
    _, validation = load_documents(data)
    text = "".join(row["text"] for row in validation).encode()
    return {"bits_per_byte": 8 * len(lzma.compress(text, preset=9)) / len(text), "bytes": len(text)}


def main() -> None:
    data, _, _ = parse_settings("quickstart")
    rows: dict[str, dict] = {"xz -9": measure_xz(data)}
    with tempfile.TemporaryDirectory() as folder:
        for name, settings in RUNS.items():
            output_dir = str(Path(folder) / str(len(rows)))
            print(f"\n{name}", flush=True)
            rows[name] = train(output_dir=output_dir, eval_steps=0.5, **settings).metrics
    versions = {"torch": torch.__version__, "transformers": transformers.__version__}
    machine = f"{platform.machine()}, {torch.get_num_threads()} threads"
    report = {"machine": machine, "versions": versions, "rows": rows}
    RESULTS.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    print(f"\n{'':<34}{'bits per byte':>14}{'perplexity':>12}{'seconds':>9}{'parameters':>12}")
    for name, row in rows.items():
        cells = [row.get(key, "") for key in ("perplexity", "train_seconds", "num_parameters")]
        print(f"{name:<34}{row['bits_per_byte']:>14.4f}{cells[0]:>12.6}{cells[1]:>9}{cells[2]:>12}")


if __name__ == "__main__":
    main()
