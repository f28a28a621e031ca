"""hf_nanogpt: the small GPT that is at home in the Hugging Face ecosystem."""

import os
import sys
from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.2.0"

# torch's threads wait for each other by spinning. As soon as another program runs, they take the
# core from the thread they wait for, and small steps take ten times as long. A short spin costs
# nothing on a quiet machine. The variable is read when torch is imported: a script that imports
# torch or transformers before hf_nanogpt has to set it itself.
os.environ.setdefault("GOMP_SPINCOUNT", "10000")

if "hf_nanogpt_command" not in sys.modules:  # that module says why it registers later
    from . import auto  # noqa: F401

if TYPE_CHECKING:
    from .analysis.explain import Explanation, explain_text
    from .analysis.tasks import evaluate_tasks
    from .checkpoint.loading import load_checkpoint
    from .configuration_nanogpt import NanoGPTConfig
    from .convert import convert_checkpoint, export_checkpoint
    from .data.conversations import add_chat_template
    from .data.documents import DataArguments, load_documents, load_text
    from .data.packing import PackedCollator, pack_documents
    from .data.stored import tokenize_corpus
    from .data.tokenization import token_byte_counts, train_tokenizer
    from .evaluation import EvaluationResult, evaluate
    from .generation import generate_text, stream_text
    from .hub import pull_checkpoint, push_to_hub, render_model_card
    from .modeling_nanogpt import (
        NanoGPTForCausalLM,
        NanoGPTForQuestionAnswering,
        NanoGPTForSequenceClassification,
        NanoGPTForTokenClassification,
        NanoGPTModel,
        NanoGPTPreTrainedModel,
    )
    from .presets import list_presets, load_preset
    from .training.arguments import NanoGPTTrainingArguments, list_recipes
    from .training.optim import MuonAdamW, build_optimizer
    from .training.run import TrainingResult, train
    from .training.trainer import NanoGPTTrainer

__all__ = [
    "DataArguments",
    "EvaluationResult",
    "Explanation",
    "MuonAdamW",
    "NanoGPTConfig",
    "NanoGPTForCausalLM",
    "NanoGPTForQuestionAnswering",
    "NanoGPTForSequenceClassification",
    "NanoGPTForTokenClassification",
    "NanoGPTModel",
    "NanoGPTPreTrainedModel",
    "NanoGPTTrainer",
    "NanoGPTTrainingArguments",
    "PackedCollator",
    "TrainingResult",
    "add_chat_template",
    "build_optimizer",
    "convert_checkpoint",
    "evaluate",
    "evaluate_tasks",
    "explain_text",
    "export_checkpoint",
    "generate_text",
    "list_presets",
    "list_recipes",
    "load_checkpoint",
    "load_documents",
    "load_preset",
    "load_text",
    "pack_documents",
    "pull_checkpoint",
    "push_to_hub",
    "render_model_card",
    "stream_text",
    "token_byte_counts",
    "tokenize_corpus",
    "train",
    "train_tokenizer",
]

# The same names for run time: each module is imported when one of its names is first used.
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
    "checkpoint.loading": ["load_checkpoint"],
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


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return getattr(import_module(f".{_MODULES[name]}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return [*globals(), *__all__]
