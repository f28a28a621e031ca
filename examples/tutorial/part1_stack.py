"""Part 1: a GPT is a stack of decoder blocks and nothing else.

Run: python examples/tutorial/part1_stack.py
"""

import inspect

import torch
from torch import nn

from hf_nanogpt import NanoGPTForCausalLM, NanoGPTModel, load_preset

STACKS = ["gpt1", "gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl", "gpt3-175b"]


def build_stack(name: str) -> NanoGPTForCausalLM:
    """Build a GPT at its full size without weights: 96 blocks do not fit into a laptop."""
    with torch.device("meta"):
        return NanoGPTForCausalLM(load_preset(name))


def list_sublayers(block: nn.Module) -> list[str]:
    """Return the names of the parts that compute something, without norms and dropout."""
    names = [name for name, _ in block.named_children()]
    return [name for name in names if "norm" not in name and "dropout" not in name]


def main() -> None:
    print(f"{'preset':<12} blocks   width  heads  context       parameters  norms    layers")
    for name in STACKS:
        model = build_stack(name)
        config, blocks = model.config, len(model.model.layers)
        layers = ", ".join(layer.split("_")[0] for layer in dict.fromkeys(config.layer_types))
        print(
            f"{name:<12} {blocks:>6}  {config.hidden_size:>6}  {config.num_attention_heads:>5}"
            f"  {config.max_position_embeddings:>7}  {model.num_parameters():>15,}"
            f"  {config.norm_position:<5}  {layers}"
        )

    block, original = model.model.layers[0], nn.TransformerDecoderLayer(8, 2)
    print("\nA decoder block for translation:", ", ".join(list_sublayers(original)))
    print("A block of GPT:                 ", ", ".join(list_sublayers(block)))
    print("multihead_attn is gone: this cross-attention looked at an encoder, and a GPT has none.")
    inputs = [name for name in inspect.signature(NanoGPTModel.forward).parameters if "_" in name]
    print("A GPT reads one stream of tokens. Its inputs are", ", ".join(inputs))


if __name__ == "__main__":
    main()
