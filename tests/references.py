"""The models of transformers that ours are compared with: tiny, and random in every tensor.

A new format adds its rows here; `test_convert.py` and `benchmarks/compatibility.py` read them.
"""

from dataclasses import dataclass, field
from typing import Any

import torch
import transformers
from transformers import PreTrainedModel
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

VOCABULARY, LENGTH = 67, 24
IDS = {"vocab_size": VOCABULARY, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
GPT = {"initializer_range": 0.2, "n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 48}
LLAMA = {
    "hidden_size": 32,
    "intermediate_size": 56,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 48,
}
NEO = {
    "initializer_range": 0.1,
    "hidden_size": 64,
    "num_layers": 4,
    "num_heads": 4,
    "max_position_embeddings": 48,
    "attention_types": [[["global", "local"], 2]],
    "window_size": 5,  # shorter than the text
}
SLIDING = {
    "use_sliding_window": True,
    "sliding_window": 5,
    "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
}
OPT = {
    "init_std": 0.2,
    "hidden_size": 32,
    "ffn_dim": 56,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 48,
}
# What each type of RoPE scaling needs; a text of 24 tokens goes past the original 16.
SCALED = {"factor": 3.0, "original_max_position_embeddings": 16}
ROPE = {
    "linear": {"factor": 4.0},
    "dynamic": {"factor": 4.0},
    "yarn": SCALED,
    "longrope": SCALED
    | {"short_factor": [1.0, 1.1, 1.2, 1.3], "long_factor": [2.0, 3.0, 4.0, 5.0]},
    "llama3": SCALED | {"low_freq_factor": 1.0, "high_freq_factor": 4.0},
    "proportional": {"partial_rotary_factor": 0.5},
}
assert set(ROPE) == set(ROPE_INIT_FUNCTIONS), "transformers has another type of RoPE scaling"


@dataclass(frozen=True)
class Reference:
    """One shape of a foreign class: our name of its format, and settings of its configuration."""

    format: str
    architecture: str
    settings: dict[str, Any] = field(default_factory=dict)


def _rope(kind: str) -> dict[str, Any]:
    # "dynamic" scales beyond max_position_embeddings, the others beyond what they were trained on
    context = {"max_position_embeddings": 16} if kind == "dynamic" else {}
    return context | {"rope_parameters": {"rope_type": kind, "rope_theta": 1000.0, **ROPE[kind]}}


REFERENCES = {
    "gpt1": Reference("gpt1", "OpenAIGPTLMHeadModel", GPT),
    "gpt1, ReLU, untied": Reference(
        "gpt1", "OpenAIGPTLMHeadModel", GPT | {"afn": "relu", "tie_word_embeddings": False}
    ),
    "gpt2": Reference("gpt2", "GPT2LMHeadModel", GPT),
    "gpt2, own MLP width, exact GELU, untied": Reference(
        "gpt2",
        "GPT2LMHeadModel",
        GPT | {"n_inner": 40, "activation_function": "gelu", "tie_word_embeddings": False},
    ),
    "gpt_neo, global and local": Reference("gpt_neo", "GPTNeoForCausalLM", NEO),
    "gpt_neo, heads of 8": Reference("gpt_neo", "GPTNeoForCausalLM", NEO | {"num_heads": 8}),
    "llama": Reference("llama", "LlamaForCausalLM", LLAMA),
    "llama, tied, biases, heads of 12": Reference(
        "llama",
        "LlamaForCausalLM",
        LLAMA
        | {"tie_word_embeddings": True, "attention_bias": True, "mlp_bias": True, "head_dim": 12},
    ),
    **{
        f"llama, RoPE {kind}": Reference("llama", "LlamaForCausalLM", LLAMA | _rope(kind))
        for kind in ROPE
    },
    "qwen3": Reference("qwen3", "Qwen3ForCausalLM", LLAMA | {"head_dim": 16}),
    "qwen3, sliding, tied, biases": Reference(
        "qwen3",
        "Qwen3ForCausalLM",
        LLAMA | SLIDING | {"head_dim": 16, "tie_word_embeddings": True, "attention_bias": True},
    ),
    "qwen2": Reference("qwen2", "Qwen2ForCausalLM", LLAMA),
    "qwen2, sliding, tied": Reference(
        "qwen2", "Qwen2ForCausalLM", LLAMA | SLIDING | {"tie_word_embeddings": True}
    ),
    "opt": Reference("opt", "OPTForCausalLM", OPT),
    "opt, untied, GELU, no biases": Reference(
        "opt",
        "OPTForCausalLM",
        OPT | {"tie_word_embeddings": False, "activation_function": "gelu", "enable_bias": False},
    ),
    "nanochat": Reference("nanochat", "NanoChatForCausalLM", LLAMA),
    "nanochat, no softcap, biases, YaRN": Reference(
        "nanochat",
        "NanoChatForCausalLM",
        LLAMA | _rope("yarn") | {"final_logit_softcapping": None, "attention_bias": True},
    ),
}


def make_reference(name: str, *, seed: int = 0) -> PreTrainedModel:
    """Build the foreign model in eval mode; norms and biases, born as 1 and 0, are random too."""
    reference = REFERENCES[name]
    model_class = getattr(transformers, reference.architecture)
    config = model_class.config_class(**IDS | {"initializer_range": 0.15} | reference.settings)
    torch.manual_seed(seed)
    model = model_class(config).eval()
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            is_norm = parameter.ndim == 1 and parameter_name.endswith("weight")
            parameter.normal_(1.0 if is_norm else 0.0, config.initializer_range)
        model.get_output_embeddings().weight.mul_(1.5)  # logits of a standard deviation above 1
    return model


def make_tokens(rows: int = 2, *, seed: int = 1) -> torch.Tensor:
    """Return random token ids without the special ones, (rows, LENGTH)."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, VOCABULARY, (rows, LENGTH), generator=generator)
