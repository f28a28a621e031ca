"""Write the model card of a checkpoint from its metrics, with the template `model_card.md`."""

import json
import re
import shlex
from functools import partial
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData, constants
from transformers import PreTrainedConfig

from .card_edits import seal_card
from .publishable import read_command

STDLIB = "python-stdlib"
_TEMPLATE = Path(__file__).parent.parent / "templates" / "model_card.md"
_MEASURES = (  # key in metrics.json, the Hub's type of metric, name, number format
    ("eval_loss", "loss", "loss, nats per token", ".4f"),
    ("perplexity", "perplexity", "perplexity", ".2f"),
    ("bits_per_byte", "bits_per_byte", "bits per byte", ".4f"),
)


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
        metrics: the content of `metrics.json`; the card leaves out what is missing there.
        name: the Hub id that the snippets load, or a folder.
        revision: the branch, tag or commit that the snippets load; `None` for a folder.
        native: the format, such as `"qwen3"`, if the card is for a native export.
        license: of the weights, as the Hub calls it.
        language: codes for the language of the training text.
    """
    card = ModelCard.from_template(
        _build_metadata(metrics, name, revision, native, license, language),
        str(_TEMPLATE),
        metrics=metrics,
        name=name,
        revision=revision,
        native=native,
        prompt=metrics.get("prompt") or "Once upon a time",
        data=_name_data(metrics),
        needed=[*([] if revision else [name]), *_list_files(metrics)],
        context_length=config.max_position_embeddings,
        architecture=_describe_architecture(config, metrics),
        training=_describe_training(metrics),
        evaluation=_describe_evaluation(metrics),
        shell=shlex.join,
        quote=partial(json.dumps, ensure_ascii=False),
        fence=_fence,
    )
    return seal_card(str(card))


def _build_metadata(
    metrics: dict[str, Any],
    name: str,
    revision: str | None,
    native: str | None,
    license: str | None,
    language: list[str] | None,
) -> ModelCardData:
    """Return the front matter, which the Hub reads."""
    if language is None and metrics.get("data") == STDLIB:
        language = ["en", "code"]
    widget = None
    if metrics.get("sample"):
        prompt = metrics["prompt"]
        widget = [{"text": prompt, "output": {"text": metrics["sample"].removeprefix(prompt)}}]
    return ModelCardData(
        license=license or "unknown",
        language=language or None,
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=["nanogpt", "hf_nanogpt", *([] if native else ["custom_code"])],
        datasets=metrics.get("datasets") or None,
        model_name=name.split("/")[-1],
        eval_results=_list_results(metrics, name, revision) if "eval_loss" in metrics else None,
        widget=widget,
    )


def _list_results(metrics: dict[str, Any], name: str, revision: str | None) -> list[EvalResult]:
    source: dict[str, Any] = {}
    if revision:
        url = f"{constants.ENDPOINT}/{name}/blob/{revision}/metrics.json"
        source = {"source_name": "metrics.json, written by the training", "source_url": url}
    datasets = metrics.get("datasets")
    return [
        EvalResult(
            task_type="text-generation",
            dataset_type=datasets[0] if datasets else "text",
            dataset_name=f"{_name_data(metrics)}, held out",
            metric_type=metric_type,
            metric_name=label,
            metric_value=round(metrics[key], 4),
            **source,
        )
        for key, metric_type, label, _ in _MEASURES
    ]


def _name_data(metrics: dict[str, Any]) -> str:
    data = metrics.get("data", "a text")
    if data == STDLIB:
        return "the source code of Python's standard library"
    return data if metrics.get("datasets") else Path(data).name


def _list_files(metrics: dict[str, Any]) -> list[str]:
    """Return the file that the evaluation reads, if it is neither on the Hub nor in the web."""
    if not metrics.get("eval_command"):
        return []
    data = read_command(metrics["eval_command"]).get("data", STDLIB)
    is_elsewhere = data == STDLIB or "://" in data or data in metrics.get("datasets", [])
    return [] if is_elsewhere else [data]


def _describe_architecture(config: PreTrainedConfig, metrics: dict[str, Any]) -> dict[str, Any]:
    def get(*names: str) -> Any:  # the first of these fields that is set: formats differ in names
        return next((v for n in names if (v := getattr(config, n, None)) is not None), None)

    heads, kv_heads = config.num_attention_heads, get("num_key_value_heads")
    return {
        "Model type": f"`{config.model_type}`",
        "Layers": config.num_hidden_layers,
        "Hidden size": config.hidden_size,
        "Attention heads": heads,
        "Heads for keys and values": kv_heads if kv_heads != heads else None,
        "MLP size": get("intermediate_size", "n_inner"),
        "Activation": get("hidden_act", "activation_function"),
        "Norm": get("norm_type"),
        "Positions": get("position_embedding_type"),
        "Context": f"{config.max_position_embeddings:,} tokens",
        "Vocabulary": f"{config.vocab_size:,} tokens",
        "Tied embeddings": "yes" if config.tie_word_embeddings else "no",
        "Parameters": f"{metrics['num_parameters']:,}",
    }


def _describe_training(metrics: dict[str, Any]) -> dict[str, Any]:
    if "train_tokens" not in metrics:
        return {}
    speed = metrics.get("tokens_per_second")
    return {
        "Data": _name_data(metrics),
        "Tokens": f"{metrics['train_tokens']:,} in {metrics['train_steps']:,} steps",
        "Time": f"{metrics['train_seconds']:,.0f} s"
        + (f", {speed:,.0f} tokens per second" if speed else ""),
        "Hardware": metrics.get("hardware"),
        "Recipe": metrics.get("recipe"),
        **metrics.get("settings", {}),
    }


def _describe_evaluation(metrics: dict[str, Any]) -> dict[str, str]:
    if "eval_loss" not in metrics:
        return {}
    before, rows = metrics.get("before"), {}
    if fresh := metrics.get("fresh_half"):
        rows["Bits per byte on the half that did not choose the weights"] = (
            f"{fresh['bits_per_byte']:.4f}"
        )
    if old := metrics.get("old_text"):
        rows[f"Bits per byte on the text of the training before ({old['data']})"] = (
            f"{old['after']:.4f} (before this training {old['before']:.4f})"
        )
    if ngram := metrics.get("ngram"):
        rows["Bits per byte of an n-gram model"] = (
            f"{ngram['bits_per_byte']:.4f} ({ngram['order']}-gram, on "
            f"{ngram['counted_characters']:,} characters of the text)"
        )
    return {
        label.capitalize(): f"{metrics[key]:{form}}"
        + (f" (before this training {before[key]:{form}})" if before else "")
        for key, _, label, form in _MEASURES
    } | rows


def _fence(text: str, language: str = "text") -> str:
    """Return a code block that no backticks in the text can close."""
    longest = max(map(len, re.findall("`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}{language}\n{text}\n{fence}"
