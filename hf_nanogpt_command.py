"""The command `hf-nanogpt`, which reads its flags before it pays for importing torch.

`import hf_nanogpt` registers the model with transformers' Auto classes, which takes seconds. Only a
process that has imported this module registers later: when a verb has read its flags. So `--help`
and a mistyped flag are answered at once.
"""

import os

# Work that takes less than this many seconds shows no progress bar; tqdm reads it when imported.
os.environ.setdefault("TQDM_DELAY", "2")

from hf_nanogpt.cli import main

__all__ = ["main"]
