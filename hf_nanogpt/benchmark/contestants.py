"""The models whose training is compared: ours, those of transformers, and one in plain torch."""

import torch
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM
from transformers.modeling_outputs import CausalLMOutput

from ..configuration_nanogpt import NanoGPTConfig
from ..modeling_nanogpt import NanoGPTForCausalLM
from ..presets import load_preset

NANO, GPT2 = "ours, nano shape", "ours, GPT-2 shape"


def make_contestants(sizes: dict[str, int]) -> dict[str, nn.Module]:
    """Return models by name, in float32 on the CPU; see `SIZES`."""
    no_ids = {"bos_token_id": None, "eos_token_id": None}
    nano, gpt2 = load_preset("nano", **sizes), load_preset("gpt2", **sizes, dropout=0.0, **no_ids)
    llama = LlamaConfig(
        vocab_size=nano.vocab_size,
        hidden_size=nano.hidden_size,
        intermediate_size=nano.intermediate_size,
        num_hidden_layers=nano.num_hidden_layers,
        num_attention_heads=nano.num_attention_heads,
        max_position_embeddings=nano.max_position_embeddings,
        attn_implementation="sdpa",
        **no_ids,
    )
    theirs = GPT2Config(
        vocab_size=gpt2.vocab_size,
        n_embd=gpt2.hidden_size,
        n_layer=gpt2.num_hidden_layers,
        n_head=gpt2.num_attention_heads,
        n_positions=gpt2.max_position_embeddings,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        attn_implementation="sdpa",
        **no_ids,
    )
    return {
        NANO: NanoGPTForCausalLM(nano),
        "LlamaForCausalLM": LlamaForCausalLM(llama),
        GPT2: NanoGPTForCausalLM(gpt2),
        "GPT2LMHeadModel": GPT2LMHeadModel(theirs),
        "GPT-2 in plain torch": PlainGPT(gpt2),
    }


class PlainGPT(nn.Module):
    """GPT-2 in as little PyTorch as it takes, in the manner of nanoGPT, which it stands for here.

    Learned positions, fused q, k and v, exact GELU, a tied head; called as transformers' models.
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
        logits = nn.functional.linear(self._run(input_ids), self.tokens.weight)  # (B, T, V)
        loss = nn.functional.cross_entropy(
            logits[:, :-1].flatten(0, 1).float(), labels[:, 1:].flatten()
        )
        return CausalLMOutput(loss=loss, logits=logits)

    def predict_next(self, input_ids: torch.Tensor) -> torch.Tensor:
        """Return the logits after the last token, (B, V), as nanoGPT's sampler computes them."""
        return nn.functional.linear(self._run(input_ids)[:, -1], self.tokens.weight)

    def _run(self, input_ids: torch.Tensor) -> torch.Tensor:
        x = self.tokens(input_ids) + self.positions.weight[: input_ids.shape[1]]
        for block in self.blocks:
            x = block(x)
        return self.norm(x)


class PlainBlock(nn.Module):
    """One layer of `PlainGPT`: attention, then the MLP, each after a norm and added."""

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
