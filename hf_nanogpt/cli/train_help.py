"""`train --help`: the settings that people use, on one screen; and all others on request."""

import argparse
import re
from collections.abc import Sequence

from ..errors import UserError, did_you_mean

# The defaults are those of the quickstart; a test compares them with the code.
_SETTINGS: dict[str, list[tuple[str, str, str]]] = {
    "the data": [
        ("data", "python-stdlib", "file, folder, glob, URL, table or Hub dataset of text"),
        ("validation_fraction", "0.03", "share that is held out, to measure on"),
        ("tokenizer", "bpe", "bpe, char, byte, or a folder or Hub id"),
        ("vocab_size", "2048", "tokens that bpe makes"),
        ("chat_template", "", "template for conversations, such as chatml"),
    ],
    "the model": [
        ("preset", "nano", "gpt2, llama-7b, qwen3-0.6b, ...: a known architecture"),
        ("n_layer", "4", "layers"),
        ("n_head", "3", "attention heads"),
        ("n_embd", "192", "width"),
        ("block_size", "256", "context in tokens"),
        ("dropout", "0.0", "share of activations dropped; 0.1 to 0.4 for small texts"),
    ],
    "the run": [
        ("output_dir", "runs/quickstart", "folder to write"),
        ("max_steps", "700", "steps; or num_train_epochs, passes over the data"),
        ("per_device_train_batch_size", "8", "blocks in a step"),
        ("learning_rate", "0.03", "peak; with --optim_recipe adamw 0.001"),
        ("optim_recipe", "muon", "muon or adamw"),
        ("eval_steps", "140", "steps between evaluations"),
        ("save_steps", "350", "steps between checkpoints"),
        ("seed", "42", "of weights, order and dropout"),
        ("bf16", "", "compute in bfloat16, on a GPU that has it"),
        ("lora", "", "with --from: train a small adapter only"),
        ("push_to_hub", "", "share the result, with --hub_model_id NAME"),
    ],
}
# The groups of `--help GROUP`, by the beginnings of the names.
_GROUPS = {
    "optim": "optim|(head_)?learning|weight_decay|adam|max_grad|momentum|lr_|warmup|label_|neft",
    "eval": "eval|do_eval|metric|greater|load_best|batch_eval|per_device_eval|predict|validation",
    "save": "save|output_dir|restore|overwrite|resume|ignore_data|enable_jit",
    "log": "log|report|run_name|disable_tqdm|include_num|sample_|project|trackio|skip_memory",
    "hub": "push|hub",
    "loader": "dataloader|remove_unused|group_by|length_column|train_sampling|data_seed|accel",
    "precision": "bf16|fp16|tf32|half|gradient_check|torch_compile|use_cpu|num_threads|torch_empty",
    "parallel": "ddp|fsdp|deepspeed|parallelism|local_rank|average|use_liger|liger",
}


def print_help(usage: str, recipes: Sequence[str], topic: str | None) -> None:
    """Print one screen, or the settings of a topic: `all`, `data`, `model` or one of the groups.

    Raises:
        UserError: the topic is unknown.
    """
    if topic is None:
        print(_one_screen(usage, recipes))
        return
    from ..training.arguments import ModelArguments, make_data_parser, make_parser

    if topic == "data":
        print(make_data_parser().format_help())
        return
    topics = ["all", "data", "model", *_GROUPS]
    if topic not in topics:
        hint = did_you_mean(topic, topics)
        raise UserError(f"--help {topic} is unknown.{hint} Known: {', '.join(topics)}.")
    parser = make_parser()
    if topic == "model":
        _keep(parser, "|".join(f"{name}$" for name in ModelArguments.__annotations__))
    elif topic != "all":
        _keep(parser, _GROUPS[topic])
    print(parser.format_help())


def _keep(parser: argparse.ArgumentParser, pattern: str) -> None:
    """Hide the settings that a pattern of names does not match."""
    for action in parser._actions:
        if not re.match(pattern, action.dest):
            action.help = argparse.SUPPRESS
    parser.usage = "hf-nanogpt train [--SETTING VALUE ...]"


def _one_screen(usage: str, recipes: Sequence[str]) -> str:
    lines = [
        f"usage: {usage}",
        f"recipes: {', '.join(recipes)}, or a YAML file",
        "without one, the settings are chosen from --data; shown here are those of quickstart",
    ]
    for title, rows in _SETTINGS.items():
        lines += [f"{title}:"]
        for name, default, text in rows:
            shown = f"  --{name} {default}".rstrip()
            lines.append(f"{shown:<36} {text}" if len(shown) < 37 else f"{shown} {text}")
    lines += [
        "",
        f"all settings: --help all; of one group: --help data, model, {', '.join(_GROUPS)}",
        "--from CHECKPOINT starts from a model; --resume continues a run; --overwrite deletes it",
        "--show prints each setting and where it comes from, and trains nothing",
    ]
    return "\n".join(lines)
