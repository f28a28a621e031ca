"""What a model expected at each place of a text, as a table and as a page to look at."""

import base64
import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from unicodedata import east_asian_width

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.convert_slow_tokenizer import bytes_to_unicode

from ..checkpoint.folder import check_writable, staged_folder
from ..errors import UserError
from ..generation import encode_prompt

# Weights of attention that a page may hold: some 10 MB, which a browser still draws at once.
MAX_WEIGHTS = 8_000_000


@dataclass(frozen=True)
class Position:
    """One place in a text: the token that came, and what the model expected before it came.

    `bits` is the surprise, -log2 of the probability that the model gave to `token`, and `rank` its
    place among all tokens, 1 for the likeliest. `likeliest` holds texts and probabilities.
    """

    token: str | None
    bits: float | None
    rank: int | None
    likeliest: list[tuple[str, float]]


@dataclass(frozen=True)
class Explanation:
    """The positions of a text of T tokens, and how they look back at each other.

    There are T + 1 positions: nothing was expected at the first (`bits=None`, `likeliest=[]`), and
    nothing came yet at the last (`token=None`). `attention` is (layers, heads, T, T), a row for
    each position that looks and a column for each it looks at; `None` where it was not asked for.
    """

    positions: list[Position]
    attention: torch.Tensor | None

    @property
    def bits(self) -> float:
        """The surprise of the whole text, which is also its size when compressed by the model."""
        return sum(position.bits or 0.0 for position in self.positions)

    @property
    def bits_per_token(self) -> float:
        """The mean surprise of the tokens that were predicted; 0 if there were none."""
        return self.bits / max(len(self.positions) - 2, 1)


@torch.no_grad()
def explain_text(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    text: str,
    *,
    num_likeliest: int = 5,
    with_attention: bool = False,
) -> Explanation:
    """Read `text` once, after the bos token if there is one, and tell what was expected.

    Args:
        num_likeliest: tokens to tell at each position.
        with_attention: keep the attention weights of every head, for `render_page`.

    Raises:
        UserError: the text does not fit into the model's context, or cannot be encoded.
    """
    ids = _encode(model, tokenizer, text)
    if with_attention:
        _check_weights(model, ids.shape[1])
    output = _forward(model, ids, with_attention)
    logs = output.logits[0].float().log_softmax(dim=-1).cpu()
    positions = list(_judge(tokenizer, ids[0].tolist(), logs, num_likeliest))
    attention = torch.cat(output.attentions).float().cpu() if with_attention else None
    return Explanation(positions, attention)


def _encode(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, text: str) -> torch.Tensor:
    ids = encode_prompt(model, tokenizer, text)
    bos, limit = tokenizer.bos_token_id, model.config.max_position_embeddings
    if bos is not None and ids[0, 0] != bos:
        ids = torch.cat([torch.full_like(ids[:, :1], bos), ids], dim=1)
    if ids.shape[1] > limit:
        raise UserError(
            f"The text has {ids.shape[1]} tokens, and this model's context is {limit}: shorten it."
        )
    return ids


def _judge(tokenizer, ids: list[int], logs: torch.Tensor, num_likeliest: int) -> Iterator[Position]:
    """Yield the first position, and one for each row of `logs` (T, V), the logs of chances."""
    tokens = spell_tokens(tokenizer, ids)
    yield Position(tokens[0], None, None, [])
    for t, row in enumerate(logs, start=1):
        order = row.argsort(descending=True, stable=True)
        top = order[:num_likeliest]
        texts = spell_tokens(tokenizer, top.tolist())
        likeliest = list(zip(texts, row[top].exp().tolist(), strict=True))
        if t == len(ids):
            yield Position(None, None, None, likeliest)
            return
        bits = max(0.0, -row[ids[t]].item() / math.log(2))
        yield Position(tokens[t], bits, order.tolist().index(ids[t]) + 1, likeliest)


def _forward(model: PreTrainedModel, ids: torch.Tensor, with_attention: bool):
    if not with_attention:
        return model(ids, use_cache=False)
    kernel = model.config._attn_implementation
    model.set_attn_implementation("eager")  # the others never hold the weights in one piece
    try:
        return model(ids, use_cache=False, output_attentions=True)
    finally:
        model.set_attn_implementation(kernel)


def _check_weights(model: PreTrainedModel, length: int) -> None:
    heads = model.config.num_hidden_layers * model.config.num_attention_heads
    room = math.isqrt(2 * MAX_WEIGHTS // heads)
    if length > room:
        raise UserError(
            f"The text has {length} tokens, and the page of a model with {heads} heads has room "
            f"for {room}: shorten it, or leave out --html."
        )


def spell_tokens(tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> list[str]:
    """Return the text of each token; bytes that are no text by themselves as <E2><82>."""
    texts = []
    for raw, i in zip(tokenizer.convert_ids_to_tokens(ids), ids, strict=True):
        text = tokenizer.decode([i], clean_up_tokenization_spaces=False)
        if raw is None:  # the model's table may have more rows than there are tokens
            text = f"<{i}>"
        elif "\ufffd" in text and all(character in _BYTES for character in raw):
            text = "".join(f"<{_BYTES[character]:02X}>" for character in raw)
        elif raw.startswith("\u2581"):  # SentencePiece's space, which decoding drops at the start
            text = raw.replace("\u2581", " ")
        texts.append(text)
    return texts


_BYTES = {character: byte for byte, character in bytes_to_unicode().items()}
_SHOWN = str.maketrans({" ": "·", "\n": "↵", "\t": "⇥", "\r": "␍"})


def show_token(text: str) -> str:
    """Return `text` on one line, with visible white space and nothing that moves a cursor."""
    shown = text.translate(_SHOWN)
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in shown)


# the terminal


def render_table(explanation: Explanation, *, color: bool = False, width: int = 80) -> str:
    """Return one line for each position, at most `width` columns, coloured by surprise if asked.

    `*` marks the token that came where it is among the likeliest.
    """
    positions = explanation.positions
    count = max(len(position.likeliest) for position in positions)
    name = min(16, max(5, *(_columns(show_token(p.token or "?")) for p in positions)))
    number = len(str(len(positions) - 1))
    room = max(3, (width - number - name - 9) // max(count, 1) - 7)
    lines = [f"{'':{number}}  {_fit('token', name)}   bits  likeliest in this place"]
    for i, position in enumerate(positions):
        token = _fit("?" if position.token is None else show_token(position.token), name)
        bits = "" if position.bits is None else f"{position.bits:.1f}"
        style = _style(position.bits) if color else ""
        expected = [
            _candidate(position, rank, room, style) for rank in range(len(position.likeliest))
        ]
        lines.append(
            f"{i:{number}}  {_paint(token, style)}  {_paint(f'{bits:>5}', style)} "
            + "".join(expected).rstrip()
        )
    total, mean = explanation.bits, explanation.bits_per_token
    lines.append(f"\n{total:.1f} bits in all, {mean:.2f} bits per token, perplexity {2**mean:,.2f}")
    return "\n".join(line.rstrip() for line in lines)


def _candidate(position: Position, rank: int, room: int, style: str) -> str:
    text, probability = position.likeliest[rank]
    came = position.rank == rank + 1
    cell = f"{'*' if came else ' '}{_fit(show_token(text), room)} {100 * probability:3.0f}%"
    return " " + (_paint(cell, style and style + ";1") if came else cell)


def _style(bits: float | None) -> str:
    """Green for the expected, yellow for what might have come, red for a surprise."""
    if bits is None:
        return ""
    return "32" if bits < 2 else "33" if bits < 6 else "31"


def _paint(text: str, style: str) -> str:
    return f"\x1b[{style}m{text}\x1b[0m" if style else text


def _columns(text: str) -> int:
    return sum(2 if east_asian_width(character) in "WF" else 1 for character in text)


def _fit(text: str, columns: int) -> str:
    """Return `text` in exactly so many columns, cut with an ellipsis or filled with spaces."""
    if _columns(text) > columns:
        while _columns(text) > columns - 1:
            text = text[:-1]
        text += "…"
    return text + " " * (columns - _columns(text))


# the page


def check_page(path: str | Path) -> Path:
    """Return the path if a new page can be written there, or raise a `UserError`."""
    page = Path(path)
    if page.suffix != ".html":
        raise UserError(f"html={page} must be a path that ends in .html.")
    if page.exists():
        raise UserError(f"html={page} exists already: choose another name.")
    check_writable(page.parent, name="html")
    return page


def write_page(explanation: Explanation, path: str | Path, *, title: str) -> None:
    """Write the page of `render_page` to a path that `check_page` allows, whole or not at all."""
    page = check_page(path)
    with staged_folder(page.parent) as staged:
        text = render_page(explanation, title=title)
        (staged / page.name).write_text(text, encoding="utf-8")


def render_page(explanation: Explanation, *, title: str) -> str:
    """Return one HTML page that needs nothing else, with the map of each head to point at.

    The weights are stored as bytes, 255 for 1, and only those on and below the diagonal: the
    largest one above it is told in words.
    """
    attention = explanation.attention
    assert attention is not None, "explain_text(..., with_attention=True)"
    layers, heads, length, _ = attention.shape
    seen = torch.ones(length, length, dtype=torch.bool).tril()
    weights = (attention[:, :, seen] * 255).round().byte()  # (layers, heads, T * (T + 1) / 2)
    data = {
        "title": title,
        "bits": explanation.bits,
        "perplexity": 2**explanation.bits_per_token,
        "positions": [
            {
                "token": None if p.token is None else show_token(p.token),
                "newline": "\n" in (p.token or ""),
                "bits": p.bits,
                "rank": p.rank,
                "likeliest": [[show_token(text), share] for text, share in p.likeliest],
            }
            for p in explanation.positions
        ],
        "layers": layers,
        "heads": heads,
        "future": attention[:, :, ~seen].max().item() if length > 1 else 0.0,
        "weights": base64.b64encode(weights.numpy().tobytes()).decode(),
    }
    page = (Path(__file__).parent.parent / "templates" / "explain.html").read_text(encoding="utf-8")
    # "<" would let a token end the script element that holds the data
    return page.replace("{{data}}", json.dumps(data).replace("<", "\\u003c"))
