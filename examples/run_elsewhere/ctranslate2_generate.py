"""Continue a text with CTranslate2, which can use 8-bit weights, without PyTorch or transformers.

Run: python examples/run_elsewhere/ctranslate2_generate.py FOLDER PROMPT [MAX_NEW_TOKENS]
"""

import sys
from pathlib import Path

import ctranslate2
from tokenizers import Tokenizer

if __name__ == "__main__":
    folder, prompt, *limit = sys.argv[1:]
    tokenizer = Tokenizer.from_file(str(Path(folder, "tokenizer.json")))
    generator = ctranslate2.Generator(folder)
    text = tokenizer.encode(prompt)
    settings = {"max_length": int(*limit or [100]), "include_prompt_in_result": False}
    (result,) = generator.generate_batch([text.tokens], **settings)
    print(tokenizer.decode(text.ids + result.sequences_ids[0]))
