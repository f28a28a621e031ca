"""Adapt a checkpoint with PEFT and a training loop; save the adapter, then merge it.

Run: python examples/lora.py CHECKPOINT TEXT FOLDER
(`hf-nanogpt train finetune --lora --from CHECKPOINT --data TEXT` does more with less typing.)
"""

import sys

import torch
from peft import AutoPeftModelForCausalLM, LoraConfig, get_peft_model
from torch.utils.data import DataLoader

from hf_nanogpt import PackedCollator, generate_text, load_checkpoint, load_text, pack_documents


def adapt(checkpoint, text, folder, *, context_length=64, batch_size=8, learning_rate=2e-3):
    """Train once over a text; yield the loss of each step, and write the adapter to `folder`."""
    model, tokenizer = load_checkpoint(checkpoint)
    # All matrices but the output head. PEFT has defaults for the models it lists, and not for ours.
    config = LoraConfig(task_type="CAUSAL_LM", target_modules="all-linear")
    model = get_peft_model(model.train(), config)
    model.print_trainable_parameters()

    blocks = pack_documents(load_text(text), tokenizer, context_length=context_length)
    collate = PackedCollator(tokenizer.eos_token_id)
    batches = DataLoader(list(blocks), batch_size=batch_size, shuffle=True, collate_fn=collate)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=learning_rate)
    for batch in batches:
        loss = model(**batch, use_cache=False).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        yield loss.item()
    model.save_pretrained(folder)


if __name__ == "__main__":
    checkpoint, text, folder = sys.argv[1:]
    for step, loss in enumerate(adapt(checkpoint, text, folder), start=1):
        print(f"step {step}: loss {loss:.3f}")
    model = AutoPeftModelForCausalLM.from_pretrained(folder)  # the checkpoint and the adapter
    tokenizer = load_checkpoint(checkpoint)[1]
    whole = model.merge_and_unload()  # a normal model again: save it, export it, serve it
    print(generate_text(whole, tokenizer, "The ", max_new_tokens=40, seed=0)[0])
