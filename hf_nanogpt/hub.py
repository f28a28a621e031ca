"""The model card: written from what happened in training."""

from typing import Any

from transformers import PreTrainedConfig

_CARD = """---
library_name: transformers
pipeline_tag: text-generation
tags:
- nanogpt
- hf_nanogpt
---

# {name}

A GPT of {num_parameters:,} parameters, trained from nothing on `{data}` with hf_nanogpt.

| | |
|---|---|
| Architecture | {layers} layers, width {width}, {heads} heads, context {context} |
| Vocabulary | {vocabulary} tokens |
| Training | {train_tokens:,} tokens in {train_seconds:,.0f} s ({tokens_per_second:,.0f} tokens/s) |
| Validation loss | {eval_loss:.4f} nats per token |
| Perplexity | {perplexity:.2f} |
| Bits per byte | {bits_per_byte:.4f} |

![Training and validation loss against tokens](loss.png)

```python
from transformers import pipeline

generate = pipeline("text-generation", "{name}", trust_remote_code=True)
print(generate({prompt!r}, max_new_tokens=50)[0]["generated_text"])
```

`trust_remote_code` lets transformers run the two model files in this folder; with hf_nanogpt
installed, `import hf_nanogpt` does instead.

A sample:

```text
{sample}
```

The model is small and knows only its training text: what it writes looks right more often than it
is.
"""


def render_model_card(
    config: PreTrainedConfig,
    metrics: dict[str, Any],
    *,
    name: str,
    data: str,
    prompt: str = "",
    sample: str = "",
) -> str:
    """Return the `README.md` of a checkpoint; `metrics` is what `metrics.json` holds."""
    return _CARD.format(
        name=name,
        data=data,
        prompt=prompt,
        sample=sample.replace("```", "'''"),
        layers=config.num_hidden_layers,
        width=config.hidden_size,
        heads=config.num_attention_heads,
        context=config.max_position_embeddings,
        vocabulary=config.vocab_size,
        **metrics,
    )
