"""The generation loop by hand: forward, softmax, choose, append; and the time a cache saves.

Run: python examples/generate_by_hand.py CHECKPOINT [PROMPT ...]
"""

import sys
import time

import torch
from transformers import DynamicCache

from hf_nanogpt import load_checkpoint


@torch.no_grad()
def generate_by_hand(model, ids, mask, *, new_tokens, temperature=0.0, use_cache=True):
    """Append up to `new_tokens` to each row of `ids` (B, T), padded on the left (mask 0)."""
    config = model.generation_config
    ends = [] if config.eos_token_id is None else config.eos_token_id  # one id, or several
    cache = DynamicCache(config=model.config) if use_cache else None  # grows with each step
    running = torch.ones(len(ids), 1, dtype=torch.bool)
    for _ in range(new_tokens):
        # The model reads only the tokens that are not yet in the cache.
        new = slice(cache.get_seq_length() if cache else 0, None)
        positions = (mask.cumsum(dim=1) - 1).clamp(min=0)[:, new]
        output = model(ids[:, new], mask, positions, cache, use_cache=use_cache)
        # Choose a token from the logits of the last position.
        logits = output.logits[:, -1]  # (B, V)
        if temperature == 0:
            token = logits.argmax(dim=-1, keepdim=True)
        else:
            token = torch.multinomial(torch.softmax(logits / temperature, dim=-1), num_samples=1)
        # Append it; rows that have ended get padding.
        token = torch.where(running, token, config.pad_token_id or 0)
        ids, mask = torch.cat([ids, token], dim=1), torch.cat([mask, mask[:, -1:]], dim=1)
        running &= ~torch.isin(token, ids.new_tensor(ends))
        if not running.any():
            break
    return ids


if __name__ == "__main__":
    model, tokenizer = load_checkpoint(sys.argv[1])
    prompts = sys.argv[2:] or ["def"]
    inputs = tokenizer(prompts, padding=True, padding_side="left", return_tensors="pt")
    seconds = {}
    for use_cache in (False, True):
        start = time.perf_counter()
        ids = generate_by_hand(
            model, inputs.input_ids, inputs.attention_mask, new_tokens=60, use_cache=use_cache
        )
        seconds[use_cache] = time.perf_counter() - start
    print(*tokenizer.batch_decode(ids, skip_special_tokens=True), sep="\n---\n")
    print(f"\nWith a cache {seconds[True]:.2f} s, without {seconds[False]:.2f} s:", end=" ")
    print(f"it saves {1 - seconds[True] / seconds[False]:.0%} of the time.")
