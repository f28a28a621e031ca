"""What to train and to validate on, the tokenizer that goes with it, and the tokens of both."""

from dataclasses import dataclass
from functools import partial

from transformers import PreTrainedTokenizerBase

from ..errors import UserError
from .conversations import Documents, add_chat_template
from .documents import DataArguments
from .packing import Tokens, tokenize_documents
from .tokenization import make_tokenizer


@dataclass(frozen=True)
class Corpus:
    """Text, or the tokens that a folder holds.

    Attributes:
        train, validation: documents; with a `tokenizer`, their tokens.
        tokenizer: the tokenizer of the tokens; None for text.
        num_bytes: bytes of the text to validate on, if they are known.
    """

    train: Documents | Tokens
    validation: Documents | Tokens
    tokenizer: PreTrainedTokenizerBase | None = None
    num_bytes: int | None = None


def prepare_tokenizer(
    args: DataArguments,
    corpus: Corpus,
    tokenizer: PreTrainedTokenizerBase | None = None,
    *,
    max_length: int | None = None,
) -> PreTrainedTokenizerBase:
    """Return the tokenizer for a corpus, with the chat template that `args` asks for.

    That is the `tokenizer` of a checkpoint; or else the one of the tokens; or else the one that
    `args` names, which is trained or loaded. `max_length` is the context of its model.

    Raises:
        UserError: the tokens do not belong to `tokenizer`, or none can be trained or loaded.
    """
    stored = corpus.tokenizer
    if tokenizer and stored and not stored.get_vocab().items() <= tokenizer.get_vocab().items():
        raise UserError(
            f"data={args.data} was tokenised by another tokenizer than the one of the checkpoint: "
            "give the data that the checkpoint was trained on."
        )
    tokenizer = tokenizer or stored or make_tokenizer(args, corpus.train)
    add_chat_template(tokenizer, args.chat_template)
    if max_length:
        tokenizer.model_max_length = max_length
    return tokenizer


def tokenize_sides(
    args: DataArguments, corpus: Corpus, tokenizer: PreTrainedTokenizerBase
) -> tuple[Tokens, Tokens]:
    """Return the tokens to train on and to validate on."""
    if corpus.tokenizer:
        return corpus.train, corpus.validation
    tokenise = partial(tokenize_documents, tokenizer=tokenizer, num_proc=args.num_proc)
    return tokenise(corpus.train), tokenise(corpus.validation)
