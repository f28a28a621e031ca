"""The models that are compared: ours, those of transformers, and GPT-2 in plain torch."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM
from transformers.modeling_outputs import CausalLMOutput

from ..configuration_nanogpt import NanoGPTConfig
from ..convert.native import make_native_config
from ..cpu_kernels import use_cpu_kernels
from ..modeling_nanogpt import NanoGPTForCausalLM
from ..presets import load_preset

NANO, GPT2 = "ours, nano shape", "ours, GPT-2 shape"


def make_contestants(sizes: dict[str, int]) -> dict[str, nn.Module]:
    """Return models by name, in float32 on the CPU; for `sizes` see `steps.SIZES`."""
    settings: dict[str, Any] = sizes | {"dropout": 0.0, "bos_token_id": None, "eos_token_id": None}
    nano, gpt2 = load_preset("nano", **settings), load_preset("gpt2", **settings)
    # Llama has no norm of queries and keys; otherwise it is the same architecture as nano.
    _, llama = make_native_config(load_preset("nano", **settings, qk_norm=False), "llama")
    _, native_gpt2 = make_native_config(gpt2, "gpt2")
    nano_model = NanoGPTForCausalLM(nano)
    use_cpu_kernels(nano_model)  # as training does
    return {
        NANO: nano_model,
        "LlamaForCausalLM": AutoModelForCausalLM.from_config(llama, trust_remote_code=False),
        GPT2: NanoGPTForCausalLM(gpt2),
        "GPT2LMHeadModel": AutoModelForCausalLM.from_config(native_gpt2, trust_remote_code=False),
        "GPT-2 in plain torch": PlainGPT(gpt2),
    }


class PlainGPT(nn.Module):
    """GPT-2 in as little PyTorch as possible; it stands for nanoGPT in the comparisons.

    Learned positions, fused q, k and v, exact GELU, a tied head; called like transformers' models.
    """

    def __init__(self, config: NanoGPTConfig):
        super().__init__()
        width = config.hidden_size
        self.tokens = nn.Embedding(config.vocab_size, width)
        self.positions = nn.Embedding(config.max_position_embeddings, width)
        self.blocks = nn.ModuleList(
            PlainBlock(width, config.num_attention_heads) for _ in range(config.num_hidden_layers)
        )
        self.norm = nn.LayerNorm(width)
        for parameter in self.parameters():
            if parameter.ndim > 1:
                nn.init.normal_(parameter, std=0.02)

    def forward(
        self, input_ids: torch.Tensor, labels: torch.Tensor, use_cache: bool = False
    ) -> CausalLMOutput:
        logits = nn.functional.linear(self._run_blocks(input_ids), self.tokens.weight)  # (B, T, V)
        predictions, targets = logits[:, :-1].flatten(0, 1).float(), labels[:, 1:].flatten()
        loss = nn.functional.cross_entropy(predictions, targets)
        return CausalLMOutput(loss=loss, logits=logits)

    def generate(
        self,
        ids: torch.Tensor,
        *,
        max_new_tokens: int,
        stopping_criteria: Sequence[Callable[..., Any]],
        **settings: Any,
    ) -> torch.Tensor:
        """Append the most likely token, then read the whole text again, as nanoGPT does.

        `settings` are others of transformers' `generate()`, which have no effect.
        """
        for _ in range(max_new_tokens):
            last = self._run_blocks(ids)[:, -1]
            logits = nn.functional.linear(last, self.tokens.weight)  # (B, V)
            ids = torch.cat((ids, logits.argmax(dim=-1, keepdim=True)), dim=1)
            for criterion in stopping_criteria:
                criterion(ids, logits)
        return ids

    def _run_blocks(self, input_ids: torch.Tensor) -> torch.Tensor:
        x = self.tokens(input_ids) + self.positions.weight[: input_ids.shape[1]]
        for block in self.blocks:
            x = block(x)
        return self.norm(x)


class PlainBlock(nn.Module):
    """One layer of `PlainGPT`: attention, then the MLP, each after a norm and with a residual."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = self.qkv(self.norm1(x)).unflatten(-1, (3, self.heads, -1)).unbind(2)
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))  # (B, H, T, D)
        y = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(y.transpose(1, 2).flatten(2))
        return x + self.down(nn.functional.gelu(self.up(self.norm2(x))))
