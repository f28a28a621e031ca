"""Part 2: predict the next token from the past. Why there is a mask, and a model that cheats.

Run: python examples/tutorial/part2_mask.py [PICTURE.png]
"""

import math
import sys
from collections.abc import Callable

import torch
from torch import nn

from hf_nanogpt import NanoGPTForCausalLM, load_preset

SYMBOLS, LENGTH = 16, 12
Predict = Callable[[torch.Tensor], torch.Tensor]  # token ids (B, T) -> logits (B, T, SYMBOLS)


def make_mask(length: int) -> torch.Tensor:
    """Return what is added to the scores: 0 if row i may look at column j, -inf if j > i."""
    return torch.full((length, length), -math.inf).triu(diagonal=1)


class ShortcutDecoder(nn.Module):
    """A tempting shortcut to a GPT: torch's decoder for translation, with its input as memory."""

    def __init__(self, width: int = 32, mask_memory: bool = False):
        super().__init__()
        self.mask_memory = mask_memory
        self.tokens, self.places = nn.Embedding(SYMBOLS, width), nn.Embedding(LENGTH, width)
        self.block = nn.TransformerDecoderLayer(width, 4, 64, dropout=0.0, batch_first=True)
        self.head = nn.Linear(width, SYMBOLS)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x, mask = self.tokens(ids) + self.places.weight[: ids.shape[1]], make_mask(ids.shape[1])
        # Self-attention is masked; cross-attention sees all of `memory`, including the future.
        memory_mask = mask if self.mask_memory else None
        return self.head(self.block(x, memory=x, tgt_mask=mask, memory_mask=memory_mask))


def build_gpt() -> NanoGPTForCausalLM:
    """Build a GPT of about the same size, without cross-attention."""
    size = {"n_layer": 1, "n_embd": 32, "n_head": 4, "block_size": LENGTH, "vocab_size": SYMBOLS}
    rest = {"dropout": 0.0, "bos_token_id": None, "eos_token_id": None}
    return NanoGPTForCausalLM(load_preset("gpt2", **size, **rest))


def next_token_loss(predict: Predict, ids: torch.Tensor) -> torch.Tensor:
    """Compare the logits at each position with the next token: causal language modelling."""
    logits, targets = predict(ids)[:, :-1], ids[:, 1:]
    return nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten())


def train_on_noise(model: nn.Module, predict: Predict, *, steps: int) -> float:
    """Train on new random tokens in each step, and return the mean of the last ten losses."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    losses = []
    for _ in range(steps):
        loss = next_token_loss(predict, torch.randint(SYMBOLS, (64, LENGTH)))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return sum(losses[-10:]) / 10


@torch.no_grad()
def measure_influence(predict: Predict) -> torch.Tensor:
    """Return how much the logits at position i change if token j is replaced, by (i, j)."""
    ids = torch.arange(LENGTH)[None] % SYMBOLS
    before, columns = predict(ids), []
    for j in range(LENGTH):
        other = ids.clone()
        other[0, j] = (other[0, j] + 7) % SYMBOLS
        columns.append((predict(other) - before)[0].abs().amax(dim=-1))
    return torch.stack(columns, dim=1)


def draw(panels: dict[str, torch.Tensor], path: str) -> None:
    """Draw matrices side by side, dark where they are large."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9.6, 3.6), dpi=144, layout="constrained")
    FigureCanvasAgg(figure)
    for axes, (title, matrix) in zip(figure.subplots(1, len(panels)), panels.items(), strict=True):
        axes.imshow(matrix, cmap="Blues", vmin=0)
        future = [(i, j) for i in range(LENGTH) for j in range(i + 1, LENGTH) if matrix[i, j]]
        if future:
            rows, columns = zip(*future, strict=True)
            axes.scatter(columns, rows, color="#ea580c", s=14, label="sees the future")
            axes.legend(loc="lower left", fontsize=8, framealpha=1)
        axes.set_title(title, fontsize=10)
        axes.set(xlabel="token j", ylabel="prediction at i", xticks=[], yticks=[])
    figure.savefig(path)


def main(picture: str = "mask.png", steps: int = 150) -> None:
    torch.manual_seed(0)
    words = ["the", "owl", "sees", "the", "moon"]
    print("Causal language modelling: each prefix is a question, and the next token is its answer.")
    for i in range(1, len(words)):
        print(f"  {' '.join(words[:i]):<18} -> {words[i]}")
    print(f"\nThe mask that is added to the scores of {len(words)} tokens:")
    for row in make_mask(len(words)).tolist():
        print(" ", *(f"{x:>4.0f}" for x in row))

    gpt, shortcut, repaired = build_gpt(), ShortcutDecoder(), ShortcutDecoder(mask_memory=True)
    contestants: dict[str, tuple[nn.Module, Predict]] = {
        "GPT": (gpt, lambda ids: gpt(ids, use_cache=False).logits),
        "shortcut": (shortcut, shortcut),
        "shortcut, memory masked": (repaired, repaired),
    }
    print(f"\nRandom tokens: no model can score better than ln {SYMBOLS} =", end=" ")
    print(f"{math.log(SYMBOLS):.3f} nats unless it sees them.")
    print("The loss in training, and the largest change of a logit if a later token is replaced:")
    panels = {"the mask: who may see whom": (make_mask(LENGTH) == 0).float()}
    for name, (model, predict) in contestants.items():
        loss = train_on_noise(model, predict, steps=steps)
        model.eval()
        influence = measure_influence(predict)
        print(f"  {name:<24} loss {loss:.3f}   leak {influence.triu(diagonal=1).max():.4f}")
        panels[f"{name}: what changes"] = influence
    print("\nThe shortcut looks up the next token in its memory. When it generates text, there is")
    print("no next token yet, so it has learnt nothing. Masking the memory as well stops the leak,")
    print("but then the block attends to the same past twice. GPT drops the second attention.")
    draw(dict(list(panels.items())[:3]), picture)
    print(f"\nPlot saved to {picture}: it shows which predictions depend on which tokens.")


if __name__ == "__main__":
    main(*sys.argv[1:2])
