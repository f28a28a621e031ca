"""From text to packed blocks of tokens: sources, documents, tokenizers, conversations, packing."""
