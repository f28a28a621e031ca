"""Write RESULTS.md from the files in results/. Run: python benchmarks/report.py"""

import json
from pathlib import Path
from statistics import median

HERE = Path(__file__).parent
PEER, TUNED, OURS = 0, 1, 2  # the rows of a race, in their order


def load(name: str) -> dict:
    return json.loads((HERE / "results" / f"{name}.json").read_text(encoding="utf-8"))


def header(report: dict, command: str) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in report["versions"].items())
    return (
        f"`{command}`  \n{report['date']}, commit {report['commit']}, {report['machine']}; "
        f"{versions}.\n"
    )


def table(columns: list[str], rows: list[list[str]]) -> str:
    lines = [f"| {' | '.join(cells)} |" for cells in [columns, *rows]]
    lines.insert(1, "|---" * len(columns) + "|")
    return "\n".join(lines) + "\n"


def middle(runs: list[dict], key: str) -> float:
    return median(run[key] for run in runs)


def spread(runs: list[dict]) -> str:
    losses = sorted(run["eval_loss"] for run in runs)
    return " / ".join(f"{loss:.4f}" for loss in losses)


def race() -> str:
    report = load("race")
    rows, ours = [], list(report["runs"].values())[OURS]
    for name, runs in report["runs"].items():
        tokens = middle(runs, "train_tokens")
        seconds = middle(runs, "wall_seconds")
        rows.append(
            [
                name,
                f"{middle(runs, 'eval_loss'):.4f}",
                spread(runs),
                f"{tokens:,.0f}",
                f"{tokens / middle(ours, 'train_tokens'):.1f}x",
                f"{seconds:.1f} s",
                f"{seconds / middle(ours, 'wall_seconds'):.1f}x",
            ]
        )
    columns = ["", "median loss", "each seed", "tokens", "", "whole process", ""]
    return f"""## Time to loss

Characters of tinyshakespeare, nanoGPT's CPU configuration (4 layers, width 128, context 64, 768
tokens a step) and its split. Losses are nats per character of the last tenth of the text, which no
choice was made on; times are those of whole processes, from start to the written checkpoint. Rows
alternated.

{table(columns, rows)}
{header(report, "python benchmarks/time_to_loss.py race tinyshakespeare.txt")}"""


def choice() -> str:
    report = load("choose")
    rows = [
        [name, f"{middle(runs, 'eval_loss'):.4f}", spread(runs)]
        for name, runs in report["runs"].items()
    ]
    return f"""### What was chosen, and on what

Learning rates were compared on the first nine tenths of the text: trained on 81 % of it, measured
on 9 %.

{table(["recipe and learning rate", "median loss", "each seed"], rows)}
{header(report, "python benchmarks/time_to_loss.py choose tinyshakespeare.txt")}"""


def ablations() -> str:
    report = load("ablate")
    base = middle(next(iter(report["runs"].values())), "eval_loss")
    rows = [
        [
            name,
            f"{middle(runs, 'eval_loss'):.4f}",
            f"{middle(runs, 'eval_loss') - base:+.4f}",
            spread(runs),
        ]
        for name, runs in report["runs"].items()
    ]
    return f"""### Which ingredients earn their place

One change at a time to `shakespeare_char`, three seeds each; differences below 0.01 say nothing.

{table(["", "median loss", "difference", "each seed"], rows)}
{header(report, "python benchmarks/time_to_loss.py ablate tinyshakespeare.txt")}"""


SECTIONS = (race, choice, ablations)


def render() -> str:
    """Return the text of RESULTS.md."""
    return "# Results\n\n" + "\n".join(section() for section in SECTIONS)


if __name__ == "__main__":
    (HERE / "RESULTS.md").write_text(render(), encoding="utf-8")
