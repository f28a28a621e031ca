"""Part 4: generate text one token at a time, then the same text with `generate()`.

Run part 3 first, then: python examples/tutorial/part4_generate.py [FOLDER]
"""

import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch

from hf_nanogpt import load_checkpoint

FOLDER, PROMPT, SEED = "runs/tutorial", "the owl", 14
Choose = Callable[[torch.Tensor], torch.Tensor]  # logits (B, V) -> the next token (B, 1)


def choose_likeliest(logits: torch.Tensor) -> torch.Tensor:
    """Take the most probable token (greedy), so that the text is always the same."""
    return logits.argmax(dim=-1, keepdim=True)


def choose_top_k(logits: torch.Tensor, k: int) -> torch.Tensor:
    """Sample from the `k` most probable tokens."""
    smallest = logits.topk(k).values[:, -1:]
    return draw_token(logits.masked_fill(logits < smallest, -torch.inf))


def choose_nucleus(logits: torch.Tensor, p: float) -> torch.Tensor:
    """Sample from the most probable tokens that together reach the probability `p`."""
    ordered, order = logits.sort(descending=True)
    probabilities = ordered.softmax(dim=-1)
    outside = probabilities.cumsum(dim=-1) - probabilities >= p  # more probable tokens are enough
    return draw_token(logits.masked_fill(outside.scatter(1, order, outside), -torch.inf))


def draw_token(logits: torch.Tensor) -> torch.Tensor:
    """Sample a token according to the probabilities."""
    return torch.multinomial(logits.softmax(dim=-1), num_samples=1)


@torch.no_grad()
def continue_text(
    model, tokenizer, prompt: str, *, choose: Choose, limit: int = 30, show: bool = False
):
    """Predict, choose and append until the model ends the document or `limit` is reached."""
    ids = tokenizer(prompt, return_tensors="pt")["input_ids"]  # (1, T)
    end = model.generation_config.eos_token_id  # one id, or several: a chat ends its messages too
    ends = end if isinstance(end, list) else [end]
    for _ in range(limit):
        logits = model(ids).logits[:, -1]  # of the last position (1, V)
        token = choose(logits)
        ids = torch.cat([ids, token], dim=1)
        if show:
            best = logits.softmax(dim=-1)[0].topk(3)
            odds = [
                f"{tokenizer.decode(i)!r} {p:.0%}" for p, i in zip(*best, strict=True) if p > 0.005
            ]
            print(f"  {tokenizer.decode(token[0])!r:<16} of {', '.join(odds)}")
        if token.item() in ends:
            break
    return tokenizer.decode(ids[0], skip_special_tokens=True)


def main(folder: str = FOLDER) -> None:
    if not Path(folder).is_dir():
        raise SystemExit(f"{folder} does not exist: run part 3 first, which takes seconds.")
    model, tokenizer = load_checkpoint(folder)
    print(f"{PROMPT!r}, greedily, token by token:")
    continue_text(model, tokenizer, PROMPT, choose=choose_likeliest, show=True)

    inputs = tokenizer(PROMPT, return_tensors="pt")
    sampling = {"do_sample": True, "top_k": 0}
    # For each way to choose, the same settings of generate() must give the same text.
    ways: dict[str, tuple[Choose, dict]] = {
        "greedy": (choose_likeliest, {"do_sample": False}),
        "top-k, k=3": (partial(choose_top_k, k=3), sampling | {"top_k": 3}),
        "nucleus, p=0.5": (partial(choose_nucleus, p=0.5), sampling | {"top_p": 0.5}),
        "all tokens": (draw_token, sampling),
    }
    for name, (choose, settings) in ways.items():
        torch.manual_seed(SEED)
        by_hand = continue_text(model, tokenizer, PROMPT, choose=choose)
        torch.manual_seed(SEED)
        output = model.generate(**inputs, max_new_tokens=30, **settings)
        by_generate = tokenizer.decode(output[0], skip_special_tokens=True)
        print(f"\n{name}\n  our loop    {by_hand}\n  generate()  {by_generate}")
        print("  the same" if by_hand == by_generate else "  NOT THE SAME")


if __name__ == "__main__":
    main(*sys.argv[1:2])
