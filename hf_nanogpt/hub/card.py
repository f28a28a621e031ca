"""The model card: written from what happened, a section only where there is something to say."""

import json
import shlex
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, constants
from huggingface_hub.repocard_data import eval_results_to_model_index
from transformers import PreTrainedConfig

from .card_edits import join_card

STDLIB = "python-stdlib"


def render_model_card(
    config: PreTrainedConfig,
    metrics: dict[str, Any],
    *,
    name: str,
    revision: str | None = None,
    native: str | None = None,
    license: str | None = None,
    language: list[str] | None = None,
) -> str:
    """Return the `README.md` of a checkpoint.

    Args:
        metrics: what `metrics.json` holds; what it lacks, the card does not speak of.
        name: the Hub id that the snippets load from; else the folder.
        revision: branch, tag or commit that they pin; `None` for a folder.
        native: the format, such as `"qwen3"`, of a card for the native twin.
        license: as the Hub calls it, of the weights.
        language: codes of the text that the model was trained on.
    """
    sections = {
        f"# {name.split('/')[-1]}": _summarize(config, metrics, native),
        "## Use": _show_use(metrics, name, revision, native),
        "## Architecture": _tabulate(_describe_architecture(config, metrics)),
        "## Training": _describe_training(metrics),
        "## Evaluation": _describe_evaluation(metrics, name, revision),
        "## Sample": _show_sample(metrics),
        "## Limitations": _admit(config, metrics),
        "## How to reproduce": _describe_reproduction(metrics),
        "## Citation": _cite(metrics),
    }
    data = _front_matter(metrics, name, revision, native, license, language)
    return join_card(data, {heading: text for heading, text in sections.items() if text})


def _front_matter(
    metrics: dict[str, Any],
    name: str,
    revision: str | None,
    native: str | None,
    license: str | None,
    language: list[str] | None,
) -> dict[str, Any]:
    if language is None and metrics.get("data") == STDLIB:
        language = ["en", "code"]
    data: dict[str, Any] = {
        "license": license or "unknown",
        "language": language,
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["nanogpt", "hf_nanogpt", *([] if native else ["custom_code"])],
        "datasets": metrics.get("datasets"),
    }
    if "eval_loss" in metrics:
        results = _eval_results(metrics, name, revision)
        data["model-index"] = eval_results_to_model_index(name.split("/")[-1], results)
    if metrics.get("sample"):
        prompt = metrics["prompt"]
        output = {"text": metrics["sample"].removeprefix(prompt)}
        data["widget"] = [{"text": prompt, "output": output}]
    return {key: value for key, value in data.items() if value}


def _eval_results(metrics: dict[str, Any], name: str, revision: str | None) -> list[EvalResult]:
    source = {}
    if revision:
        url = f"{constants.ENDPOINT}/{name}/blob/{revision}/metrics.json"
        source = {"source_name": "metrics.json, written by the training", "source_url": url}
    datasets = metrics.get("datasets")
    return [
        EvalResult(
            task_type="text-generation",
            dataset_type=datasets[0] if datasets else "text",
            dataset_name=f"{_say_data(metrics)}, held out",
            metric_type=kind,
            metric_name=label,
            metric_value=round(metrics[key], 4),
            **source,
        )
        for kind, label, key in (
            ("loss", "loss, nats per token", "eval_loss"),
            ("perplexity", "perplexity", "perplexity"),
            ("bits_per_byte", "bits per byte", "bits_per_byte"),
        )
    ]


def _tabulate(rows: dict[str, Any], *, head: str = "| | |") -> str:
    lines = [f"| {name} | {value} |" for name, value in rows.items() if value not in (None, "")]
    return "\n".join([head, "|---|---|", *lines]) if lines else ""


def _say_data(metrics: dict[str, Any]) -> str:
    data = metrics.get("data", "a text")
    if data == STDLIB:
        return "the source code of Python's standard library"
    return data if metrics.get("datasets") else Path(data).name


def _summarize(config: PreTrainedConfig, metrics: dict[str, Any], native: str | None) -> str:
    size = metrics["num_parameters"]
    words = f"A GPT of {size:,} parameters"
    if "train_tokens" in metrics:
        start = metrics.get("start_from")
        how = f"trained on from {start} with" if start else "trained from nothing on"
        words += f", {how} {metrics['train_tokens']:,} tokens of {_say_data(metrics)}"
    words += f" with hf_nanogpt; it reads {config.max_position_embeddings:,} tokens at a time."
    if native:
        words += f" This is its native form: a `{native}` model, which needs no code of its own."
    return words


def _show_use(metrics: dict[str, Any], name: str, revision: str | None, native: str | None) -> str:
    prompt = metrics.get("prompt") or "Once upon a time"
    options = "" if native else ", trust_remote_code=True"
    options += f', revision="{revision}"' if revision else ""
    place = f"{name}@{revision}" if revision else name
    start = json.dumps(prompt, ensure_ascii=False)
    command = f"generate {place} {shlex.quote(prompt)}"
    if metrics.get("is_chat"):
        start, command = '[{"role": "user", "content": "Hello!"}]', f"chat {place}"
    lines = [
        "```python",
        "from transformers import pipeline",
        "",
        f'generate = pipeline("text-generation", "{name}"{options})',
        f'print(generate({start}, max_new_tokens=50)[0]["generated_text"])',
        "```",
    ]
    if not native:
        lines += [
            "",
            "`trust_remote_code` lets transformers run the two model files of this repository; it "
            "is not needed where hf_nanogpt is installed, which also brings a command:",
            "",
            "```bash",
            f"hf-nanogpt {command}",
            "```",
        ]
    return "\n".join(lines)


def _describe_architecture(config: PreTrainedConfig, metrics: dict[str, Any]) -> dict[str, Any]:
    def get(*names: str) -> Any:
        return next((v for n in names if (v := getattr(config, n, None)) is not None), None)

    heads, kv_heads = config.num_attention_heads, get("num_key_value_heads")
    return {
        "Kind": f"`{config.model_type}`",
        "Layers": config.num_hidden_layers,
        "Width": config.hidden_size,
        "Heads": heads if kv_heads in (None, heads) else f"{heads}, {kv_heads} for keys and values",
        "Width of the MLP": get("intermediate_size", "n_inner"),
        "Activation": get("hidden_act", "activation_function"),
        "Norm": get("norm_type"),
        "Positions": get("position_embedding_type"),
        "Context": f"{config.max_position_embeddings:,} tokens",
        "Vocabulary": f"{config.vocab_size:,} tokens",
        "Head": "tied" if config.tie_word_embeddings else "untied",
        "Parameters": f"{metrics['num_parameters']:,}",
    }


def _describe_training(metrics: dict[str, Any]) -> str:
    if "train_tokens" not in metrics:
        return ""
    speed = metrics.get("tokens_per_second")
    rows = {
        "Data": _say_data(metrics),
        "Tokens": f"{metrics['train_tokens']:,} in {metrics['train_steps']:,} steps",
        "Time": f"{metrics['train_seconds']:,.0f} s"
        + (f", {speed:,.0f} tokens per second" if speed else ""),
        "Hardware": metrics.get("hardware"),
        "Recipe": metrics.get("recipe"),
        **metrics.get("settings", {}),
    }
    return _tabulate(rows)


def _describe_evaluation(metrics: dict[str, Any], name: str, revision: str | None) -> str:
    if "eval_loss" not in metrics:
        return ""
    before = metrics.get("before")
    rows = {
        label: f"{metrics[key]:{form}}"
        + (f" (before this training {before[key]:{form}})" if before else "")
        for label, key, form in (
            ("Loss, nats per token", "eval_loss", ".4f"),
            ("Perplexity", "perplexity", ".2f"),
            ("Bits per byte", "bits_per_byte", ".4f"),
        )
    }
    text = (
        f"On {metrics['eval_tokens']:,} tokens ({metrics['eval_bytes']:,} bytes) of text that was "
        f"held out of the training:\n\n{_tabulate(rows)}\n"
    )
    if command := metrics.get("eval_command"):
        place = f"{name}@{revision}" if revision else name
        command = shlex.join(command)
        text += f"\nTo repeat it:\n\n```bash\nhf-nanogpt eval {place} {command}\n```\n"
    return text + "\n![Training and validation loss against tokens](loss.png)"


def _show_sample(metrics: dict[str, Any]) -> str:
    if not (sample := metrics.get("sample")):
        return ""
    prompt = metrics["prompt"]
    shown = f"`{prompt}`" if "\n" not in prompt else f"\n\n{_quote(prompt)}\n\n"
    text = f"From the prompt {shown}, as it came:\n\n{_quote(sample)}"
    if before := metrics.get("before", {}).get("sample"):
        text += f"\n\nAnd before this training:\n\n{_quote(before)}"
    return text


def _quote(sample: str) -> str:
    fence = "````" if "```" in sample else "```"
    return f"{fence}text\n{sample}\n{fence}"


def _admit(config: PreTrainedConfig, metrics: dict[str, Any]) -> str:
    lines = ["- It goes on from a text; it was not taught to answer or to follow instructions."]
    if metrics.get("is_chat"):
        lines = [
            "- It answers as the conversations do that it was trained on, and was taught no more."
        ]
    if tokens := metrics.get("train_tokens"):
        start = metrics.get("start_from")
        known = f"besides what {start} knew, it knows" if start else "it knows"
        lines.append(
            f"- It has seen {tokens:,} tokens, {tokens / metrics['num_parameters']:.2g} for each "
            f"parameter, of {_say_data(metrics)}: {known} nothing else, repeats what is wrong or "
            "harmful there, and what it writes looks right more often than it is."
        )
    lines.append(f"- What is more than {config.max_position_embeddings:,} tokens back, it forgets.")
    return "\n".join(lines)


def _describe_reproduction(metrics: dict[str, Any]) -> str:
    if not (command := metrics.get("command")):
        return ""
    words = shlex.join(command)
    text = f"```bash\n{words}\n```\n"
    if versions := metrics.get("versions"):
        listed = ", ".join(f"{name} {version}" for name, version in versions.items())
        text += f"\nMade with {listed}."
    return text


def _cite(metrics: dict[str, Any]) -> str:
    version = metrics.get("versions", {}).get("hf_nanogpt")
    extra = f",\n  version = {{{version}}}" if version else ""
    title = "hf_nanogpt: a small GPT at home in the Hugging Face ecosystem"
    return f"```bibtex\n@software{{hf_nanogpt,\n  title = {{{title}}}{extra}\n}}\n```"
