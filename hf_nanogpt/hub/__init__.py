"""Checkpoints on the Hub: pushed with a card in one commit, also while training; pulled whole."""

from .card import render_model_card
from .pull import pull_checkpoint
from .release import push_to_hub
from .staging import stage_release, write_card

__all__ = [
    "pull_checkpoint",
    "push_to_hub",
    "render_model_card",
    "stage_release",
    "write_card",
]
