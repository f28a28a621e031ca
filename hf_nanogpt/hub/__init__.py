"""Push checkpoints to the Hub, each with its model card and in one commit, and pull them."""

from .card import render_model_card
from .card_edits import write_card
from .pull import pull_checkpoint
from .push import push_to_hub
from .staging import stage_release

__all__ = [
    "pull_checkpoint",
    "push_to_hub",
    "render_model_card",
    "stage_release",
    "write_card",
]
