"""The command `hf-nanogpt`, which reads its flags before it pays for importing torch.

`import hf_nanogpt` registers the model with transformers' Auto classes, which takes seconds. Only a
process that has imported this module registers later: when a verb has read its flags. So `--help`
and a mistyped flag are answered at once.
"""

from hf_nanogpt.cli import main

__all__ = ["main"]
