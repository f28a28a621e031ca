"""The model card: written from what happened, by the template `model_card.md`."""

import json
import re
import shlex
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData, constants
from transformers import PreTrainedConfig

from .card_edits import seal_card

STDLIB = "python-stdlib"
_TEMPLATE = Path(__file__).parent.parent / "templates" / "model_card.md"


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
        native: the format, such as `"qwen3"`, of a card for the native equivalent.
        license: as the Hub calls it, of the weights.
        language: codes of the text that the model was trained on.
    """
    title, place = name.split("/")[-1], f"{name}@{revision}" if revision else name
    prompt = metrics.get("prompt") or "Once upon a time"
    start, command = json.dumps(prompt, ensure_ascii=False), f"generate {place} "
    command += shlex.quote(prompt)
    if metrics.get("is_chat"):
        start, command = '[{"role": "user", "content": "Hello!"}]', f"chat {place}"
    versions = metrics.get("versions", {})
    card = ModelCard.from_template(
        _card_data(metrics, name, revision, native, license, language),
        str(_TEMPLATE),
        metrics=metrics,
        title=title,
        name=name,
        revision=revision,
        place=place,
        native=native,
        data=_say_data(metrics),
        context=f"{config.max_position_embeddings:,}",
        start=start,
        command=command,
        architecture=_describe_architecture(config, metrics),
        training=_describe_training(metrics),
        evaluation=_describe_evaluation(metrics),
        versions=", ".join(f"{package} {version}" for package, version in versions.items()),
        shell=shlex.join,
        fence=_fence,
    )
    return seal_card(str(card))


def _card_data(
    metrics: dict[str, Any],
    name: str,
    revision: str | None,
    native: str | None,
    license: str | None,
    language: list[str] | None,
) -> ModelCardData:
    """Return the front matter, as the Hub reads it."""
    if language is None and metrics.get("data") == STDLIB:
        language = ["en", "code"]
    more: dict[str, Any] = {}
    if metrics.get("sample"):
        prompt = metrics["prompt"]
        output = {"text": metrics["sample"].removeprefix(prompt)}
        more["widget"] = [{"text": prompt, "output": output}]
    return ModelCardData(
        license=license or "unknown",
        language=language or None,
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=["nanogpt", "hf_nanogpt", *([] if native else ["custom_code"])],
        datasets=metrics.get("datasets") or None,
        model_name=name.split("/")[-1],
        eval_results=_eval_results(metrics, name, revision) if "eval_loss" in metrics else None,
        **more,
    )


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


def _say_data(metrics: dict[str, Any]) -> str:
    data = metrics.get("data", "a text")
    if data == STDLIB:
        return "the source code of Python's standard library"
    return data if metrics.get("datasets") else Path(data).name


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


def _describe_training(metrics: dict[str, Any]) -> dict[str, Any]:
    if "train_tokens" not in metrics:
        return {}
    speed = metrics.get("tokens_per_second")
    return {
        "Data": _say_data(metrics),
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
    before = metrics.get("before")
    return {
        label: f"{metrics[key]:{form}}"
        + (f" (before this training {before[key]:{form}})" if before else "")
        for label, key, form in (
            ("Loss, nats per token", "eval_loss", ".4f"),
            ("Perplexity", "perplexity", ".2f"),
            ("Bits per byte", "bits_per_byte", ".4f"),
        )
    }


def _fence(text: str, language: str = "text") -> str:
    """Return a text in a fence that nothing in it closes."""
    longest = max(map(len, re.findall("`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}{language}\n{text}\n{fence}"
