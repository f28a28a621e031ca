"""hf_nanogpt: the small GPT that is at home in the Hugging Face ecosystem."""

import sys
from importlib import import_module
from pathlib import Path
from typing import Any

__version__ = "0.2.0"

# The command line answers --help and wrong flags before it pays for importing torch, and its verbs
# import what they need; anywhere else `import hf_nanogpt` makes the Auto classes know our model.
if Path((sys.argv or [""])[0]).stem != "hf-nanogpt":
    from . import auto  # noqa: F401

_WHERE = {
    "configuration_nanogpt": ["NanoGPTConfig"],
    "modeling_nanogpt": [
        "NanoGPTForCausalLM",
        "NanoGPTForQuestionAnswering",
        "NanoGPTForSequenceClassification",
        "NanoGPTForTokenClassification",
        "NanoGPTModel",
        "NanoGPTPreTrainedModel",
    ],
    "presets": ["list_presets", "load_preset"],
    "data.tokenization": ["token_byte_counts", "train_tokenizer"],
    "checkpoint.folder": ["load_checkpoint"],
    "data.conversations": ["add_chat_template"],
    "data.documents": ["DataArguments", "load_documents", "load_text"],
    "data.packing": ["PackedCollator", "pack_documents"],
    "convert": ["convert_checkpoint", "export_checkpoint"],
    "training.optim": ["MuonAdamW", "build_optimizer"],
    "evaluation": ["EvaluationResult", "evaluate"],
    "generation": ["generate_text", "stream_text"],
    "analysis.tasks": ["evaluate_tasks"],
    "analysis.explain": ["Explanation", "explain_text"],
    "hub": ["pull_checkpoint", "push_to_hub", "render_model_card"],
    "training.arguments": ["NanoGPTTrainingArguments", "list_recipes"],
    "data.stored": ["tokenize_corpus"],
    "training.trainer": ["NanoGPTTrainer"],
    "training.run": ["TrainingResult", "train"],
}
_MODULES = {name: module for module, names in _WHERE.items() for name in names}
__all__ = sorted(_MODULES)


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return getattr(import_module(f".{_MODULES[name]}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return [*globals(), *__all__]
