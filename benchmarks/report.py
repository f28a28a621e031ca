"""Write RESULTS.md from the files in results/, by `python benchmarks/report.py`."""

from pathlib import Path
from statistics import mean, median, stdev

import scaling
from generation import RUNS as GENERATION
from results_file import FOLDER, read_results

HERE = Path(__file__).parent
OURS = 2  # the row of our recipe in a race


def header(report: dict, command: str) -> str:
    machine = report["machine"]
    versions = ", ".join(f"{name} {machine[name]}" for name in ("torch", "transformers"))
    load = machine.get("load_average", "not recorded")
    return (
        f"`{command}`  \n{report['date']}, commit {report['commit']}, {machine['cpu']}, "
        f"{machine['threads']} threads, load average {load}; {versions}.\n"
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


def savings(report: dict) -> tuple[float, float]:
    """Return by what factor ours needs fewer tokens and seconds than nanoGPT's tuned recipe."""
    _, tuned, _, longer = report["runs"].values()
    tokens, seconds = (
        middle(tuned, key) / middle(longer, key) for key in ("train_tokens", "wall_seconds")
    )
    return tokens, seconds


def race() -> str:
    report = read_results("race")
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
    tokens_less, seconds_less = savings(report)
    plain, _, ours, _ = report["runs"].values()

    def pair(seed: int) -> str:
        losses = (runs[seed - 1]["eval_loss"] for runs in (ours, plain))
        return " against ".join(f"{loss:.4f}" for loss in losses)

    return f"""## Time to loss

Characters of tinyshakespeare with nanoGPT's CPU configuration (4 layers, width 128, context 64, 768
tokens per step) and its split. Losses are nats per character on the last tenth of the text. Times
are those of whole processes, from start to the written checkpoint, without evaluations during
training. Rows alternated; seeds 1, 2 and 3.

This compares our recipe with nanoGPT's recipe, both in our trainer. nanoGPT's own `train.py` did
not run here. All lengths were fixed before the runs; no row stopped when it reached a loss. The
learning rates were chosen without this tenth of the text (next section), but earlier prototypes of
the architecture had been compared on it.

Compare the second and the fourth row: nanoGPT's recipe with a tuned learning rate, and ours with
450 steps. Ours has the lower loss with each seed; nanoGPT's needs {tokens_less:.1f} times as many
tokens and {seconds_less:.1f} times as much time. The first and the third row are close: ours is
lower with seeds 2 and 3 ({pair(2)}; {pair(3)}), and higher with seed 1 ({pair(1)}) and seed 42
(1.9018 against 1.8862, `model_cards/`).

{table(columns, rows)}
{header(report, "python benchmarks/time_to_loss.py race tinyshakespeare.txt")}"""


def choice() -> str:
    report = read_results("choose")
    rows = [
        [name, f"{middle(runs, 'eval_loss'):.4f}", spread(runs)]
        for name, runs in report["runs"].items()
    ]
    return f"""### How the learning rates were chosen

Learning rates were compared on the first nine tenths of the text: models trained on 81 % of the
text and were measured on 9 %, with one seed. Untuned, nanoGPT's recipe is far from its best, so
compare with its tuned row. An earlier version of the code made this table: `shakespeare_char` then
had 210 steps, but the race has 190 and 450. How those numbers were chosen is not recorded.

{table(["recipe and learning rate", "median loss", "each seed"], rows)}
{header(report, "python benchmarks/time_to_loss.py choose tinyshakespeare.txt")}"""


def ablations() -> str:
    report = read_results("ablate")
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
    return f"""### Which parts of the recipe help

Changes to `shakespeare_char`, three seeds each. Ignore differences below 0.01. Each
row changes one thing, except "AdamW for all instead of Muon": it also changes the learning rate,
both betas, the weight decay and the clipping of gradients, so its difference is not due to the
optimizer alone.

{table(["", "median loss", "difference", "each seed"], rows)}
{header(report, "python benchmarks/time_to_loss.py ablate tinyshakespeare.txt")}"""


def equal_time() -> str:
    report = read_results("equal_time")
    rows = [
        [
            name,
            f"{middle(runs, 'bits_per_byte'):.3f}",
            " / ".join(f"{value:.3f}" for value in sorted(run["bits_per_byte"] for run in runs)),
            f"{middle(runs, 'train_steps'):.0f}",
            f"{middle(runs, 'step_seconds'):.0f} s",
        ]
        for name, runs in report["runs"].items()
    ]
    ours, *peers = report["runs"].values()
    seeds = len(ours)
    apart = max(
        abs(peer["step_seconds"] / our["step_seconds"] - 1)
        for runs in peers
        for our, peer in zip(ours, runs, strict=True)
    )
    return f"""## Quality at equal time

Bits per byte on unseen files of Python's standard library, with the sizes, blocks and tokenizer of
the recipe `quickstart`, after about the same time in training steps: within {apart:.0%} of ours
with each seed. {seeds} seed{"s" * (seeds > 1)}. The lower of the two learning rates is better for
nanoGPT's recipe. No lower one was tried, so this recipe may not be at its best.

{table(["", "median bits per byte", "each seed", "steps", "time"], rows)}
{header(report, f"python benchmarks/equal_time.py {report['steps']} {seeds}")}"""


def step_speed(name: str, command: str) -> str:
    report = read_results(name)
    rows = []
    for row in report["rows"]:
        lowest, ratio, highest = row["speed_to_ours"]
        alone = row["name"] == row["compared_with"]
        rows.append(
            [
                row["name"],
                f"{row['tokens_per_second']:,.0f}",
                f"{row['mfu']:.0%}",
                "1" if alone else f"{ratio:.2f} ({lowest:.2f} to {highest:.2f})",
            ]
        )
    columns = ["", "tokens/s", "share of the peak", "speed, ours of the shape = 1"]
    overhead, batch = report["trainer_overhead_ms"], report["batch_ms"]
    return f"""{table(columns, rows)}
Trainer adds {overhead[1]:.2f} ms per step to a plain loop ({overhead[0]:.2f} to {overhead[2]:.2f}).
Fetching and collating a batch takes {batch[1]:.2f} ms. The peak is
{report["peak_flops"] / 1e9:,.0f} GFLOP/s in matrix products, measured between the rounds.

{header(report, command)}"""


def speed() -> str:
    sizes = ", ".join(f"{k} {v}" for k, v in read_results("step_speed")["settings"].items())
    return f"""## Speed of a training step

Forward, backward and fused AdamW on the same batch for models of one shape, in turns in one
process: {sizes}. Medians of the rounds; ratios with the minimum and maximum of all rounds.

{step_speed("step_speed", "python benchmarks/step_speed.py")}"""


def generation() -> str:
    parts = []
    for name in GENERATION:
        report = read_results(name)
        lengths = list(report["rows"][0]["tokens_per_second"])
        rows = []
        for row in report["rows"]:
            lowest, ratio, highest = row["speed_to_ours"]
            share, same = row["bandwidth_share"], row["same_tokens"]
            rows.append(
                [
                    row["name"],
                    *(f"{row['tokens_per_second'][length]:,.0f}" for length in lengths),
                    "" if share is None else f"{median(share.values()):.0%}",
                    "" if same is None else f"{same:.0%}",
                    "1"
                    if row is report["rows"][0]
                    else f"{ratio:.2f} ({lowest:.2f} to {highest:.2f})",
                    f"{row['warm_up_seconds']:.0f} s",
                ]
            )
        columns = ["", *lengths, "bandwidth", "same", "speed, ours = 1", "warm-up"]
        texts, size = report["settings"]["batch_size"], report["parameters"] / 1e6
        parts.append(f"""### {size:.0f} M parameters, {texts} text{"s" * (texts > 1)}

{table(columns, rows)}
![Tokens per second against the length of the text]({name}.png)

{header(report, f"python benchmarks/generation.py {name}")}""")
    content = "\n".join(parts)
    return f"""## Speed of generation

Greedy `generate()` on shapes of GPT-2 with random weights: tokens per second, for all texts
together, by length of the text. In turns in one process; medians of the rounds. "Bandwidth" is the
median share of what these threads read in matrix-vector products of the model's size. "Same" is the
share of tokens that equal those of ours. Warm-up is the first turn, for all lengths together, and
includes compilation. GPT2LMHeadModel is neither compiled nor quantized here. Random weights have no
outliers, so "same" does not show how much 8 bits harm a trained model: see the last section.

{content}"""


def llama_cpp() -> str:
    report = read_results("llama_cpp")
    columns, tables = ["", "tokens/s", "speed, ours of that size = 1", "same"], []
    for name, model in report["models"].items():
        rows = []
        for i, row in enumerate(model["rows"]):
            lowest, ratio, highest = row["speed_to_ours"]
            compared = "1" if i % 2 == 0 else f"{ratio:.2f} ({lowest:.2f} to {highest:.2f})"
            speed, same = f"{row['tokens_per_second']:,.1f}", f"{row['same_tokens']:.0%}"
            rows.append([row["name"], speed, compared, same])
        tables.append(f"{name}, {model['parameters']:,} parameters:\n\n{table(columns, rows)}")
    content, settings = "\n".join(tables), report["settings"]
    numbers = ", ".join(f"{name} {value}" for name, value in settings.items())
    return f"""## Generation compared with llama.cpp

Greedy generation of one text at a time, timed after its first token; {numbers}. All take turns in
one process. llama.cpp (xllamacpp {report["xllamacpp"]}) runs our GGUF export with its defaults:
keys and values are in f16. Our int8 is not compiled here. Rows with weights of the same size are
compared. "Same" is the share of tokens that equal those of ours in float32, on random weights.

{content}
{header(report, "python benchmarks/llama_cpp.py")}"""


def compression() -> str:
    report = read_results("xz")
    rows = [[f"{row['bytes_first']:,}", f"{row['bits_per_byte']:.3f}"] for row in report["rows"]]
    return f"""## Compared with a compressor

Bits that `xz -9` adds for each byte of the text that the quickstart model is measured on, after
some training text: none, as much as the model trained on, and all of it.

{table(["bytes of training text first", "bits per byte"], rows)}
{header(report, "python benchmarks/xz.py")}"""


def document_mask() -> str:
    report = read_results("document_mask")
    masked, plain = report["runs"].values()
    rows = [
        [
            name,
            f"{middle(runs, 'eval_loss'):.4f}",
            " / ".join(f"{run['eval_loss']:.4f}" for run in runs),
            f"{middle(runs, 'bits_per_byte'):.4f}",
        ]
        for name, runs in report["runs"].items()
    ]
    apart = [b["eval_loss"] - a["eval_loss"] for a, b in zip(masked, plain, strict=True)]
    losses = [run["eval_loss"] for run in masked]
    noise = f"; two seeds of one row differ by {max(losses) - min(losses):.4f}" * (len(losses) > 1)
    return f"""## What `document_mask=false` costs

The recipe `quickstart` with {report["steps"]} steps; each model is measured as it was trained, on
the same documents. Without the mask the loss is higher by {" and ".join(f"{x:.4f}" for x in apart)}
(nats per token, the same seed){noise}. Most files here are longer than a block of 256 tokens, so
few blocks hold several: with short documents the cost may be larger.

{table(["", "median loss", "each seed", "bits per byte"], rows)}
{header(report, f"python benchmarks/document_mask.py {report['steps']} {len(masked)}")}"""


def loss_memory() -> str:
    report = read_results("loss_memory")
    rows = []
    for way, peak in report["peak_megabytes"].items():
        low, middle, high = report["seconds"][way]
        rows.append([way, f"{peak:,} MB", f"{middle:.2f} s ({low:.2f} to {high:.2f})"])
    return f"""## Memory and time of the loss

A step of GPT-2 with one layer on {report["rows"]} x {report["tokens"]} tokens, in float32: the loss
from all logits at once, and in chunks (`linear_cross_entropy`, what training uses for large
vocabularies). Memory is what the step adds to the process at its peak. Time is the processor's for
a step, forward and backward, in one thread: the median (minimum to maximum) of {report["rounds"]}
turns each.

{table(["", "memory", "time of a step"], rows)}
{header(report, "python benchmarks/loss_memory.py")}"""


def checkpoint_memory() -> str:
    report = read_results("checkpoint_memory")
    rows = [
        [row["name"], f"{row['before'] / 1e6:,.0f} MB", f"{row['added'] / 1e6:,.0f} MB"]
        for row in report["rows"]
    ]
    millions = report["rows"][0]["parameters"] / 1e6
    return f"""## Memory of a checkpoint under FSDP2

The first of {report["processes"]} processes on CPUs (gloo) while a model of {millions:.0f} M
weights and AdamW's two averages, all in float32, are saved by the functions that `Trainer` calls:
what it holds before, and what saving adds at its peak.

{table(["", "before", "added"], rows)}
{header(report, "python benchmarks/checkpoint_memory.py")}"""


def many_gpus() -> str:
    measured = read_results("gpu_h200")["calls"][2]["parts"]["train_124m"]
    mfu = round(measured["ours, GPT-2 shape, AdamW, causal"]["mfu"], 3)
    rows = scaling.rows(mfu)
    waiting = [
        f"{model} on {gpus} GPUs by {way} ({waits} ms)"
        for model, gpus, way, *_, waits, _, _ in rows
        if waits not in ("", "0.0")
    ]
    return f"""## Expected on many GPUs: arithmetic, not measured

A step of 0.5, 1 and 2 M tokens (gpt2, gpt2-xl, qwen3-8b) on H100s of 80 GB. One figure is measured:
ours with GPT-2's shape reached {mfu:.1%} of the peak on one H200 (below), and the table takes this
share for all models. The others are assumptions: {scaling.INSIDE / 1e9:.0f} GB/s for each GPU one
way inside a machine of {scaling.NODE}, and {scaling.BETWEEN / 1e9:.0f} GB/s between machines.
Delays before a transfer, slow GPUs and reading the data are left out, so real figures will be
lower. For the network wait: {"; ".join(waiting)}. All others compute longer than they send.

{table(scaling.COLUMNS, rows)}
`python benchmarks/scaling.py --mfu {mfu}`
"""


def own_text() -> str:
    if not (FOLDER / "own_text.json").is_file():
        return ""
    report = read_results("own_text")
    rows = []
    for name, cell in report["cells"].items():
        runs = cell["hf-nanogpt train"]
        ours = [run["bits_per_byte"] for run in runs]
        spread = f" ± {stdev(ours):.3f}" if len(runs) > 1 else ""
        seconds = mean(run["seconds"] for run in runs)
        figures = [f"{mean(ours):.3f}{spread} ({seconds:,.0f} s)"]
        for contestant in ("0.1.0", "GPT2LMHeadModel, Trainer's defaults", "n-gram", "xz -9"):
            found = cell.get(contestant)
            figures.append(
                f"{found['bits_per_byte']:.3f} ({found['seconds']:.{found['seconds'] < 10:d}f} s)"
                if found
                else "not measured"
            )
        text, size = name.split()
        rows.append([f"{text}, {int(size) / 1e3:,.0f} kB", *figures, str(len(runs))])
    columns = ["", "plain command", "0.1.0", "GPT2LMHeadModel, Trainer's defaults", "n-gram"]
    return f"""## Texts of one's own

Bits per byte of the end of a text after training on what comes before it, and the time. The plain
command is `hf-nanogpt train --data TEXT`: it chooses what it needs. The n-gram model is
interpolated by Witten and Bell's rule, and its order is the best one for the held-out text. `xz`
reads the training text first. The plain command has the mean and the standard deviation of its
seeds, the others have one run. Two or three ran at once, with a thread each, and beside the Chinese
ones ran test suites, so that their times are several times too long; Shakespeare's megabyte alone
had two threads and no other run. Version 0.1.0 is commit b3eb325, with `train --data TEXT
--validation_fraction 0.1 --seed 1`. Python's library repeats itself, so that `xz` wins
there, but for 200 kB.

{table([*columns, "xz -9", "seeds"], rows)}
{header(report, "python benchmarks/own_text.py tinyshakespeare.txt")}"""


def gpu() -> str:
    return (FOLDER / "gpu_by_hand.md").read_text(encoding="utf-8")


def by_hand() -> str:
    return (FOLDER / "by_hand.md").read_text(encoding="utf-8")


SECTIONS = (
    race,
    choice,
    ablations,
    equal_time,
    speed,
    generation,
    llama_cpp,
    compression,
    document_mask,
    loss_memory,
    checkpoint_memory,
    many_gpus,
    own_text,
    gpu,
    by_hand,
)
PREFACE = """# Results

The tables come from one machine, an Intel Xeon with 2 cores; the last two sections have figures
from others. Other programs ran during most measurements. The load average is below each table: that
at the start of a run of `bench`, and at the end of other runs. `hf-nanogpt bench` asks to repeat a
measurement if it is above 1. These have not been repeated yet, so trust only differences in time
that are far larger than their spread. The load does not change the loss after a number of steps.

"""


def render() -> str:
    """Return the text of RESULTS.md."""
    return PREFACE + "\n".join(filter(None, (section() for section in SECTIONS)))


if __name__ == "__main__":
    (HERE / "RESULTS.md").write_text(render(), encoding="utf-8")
