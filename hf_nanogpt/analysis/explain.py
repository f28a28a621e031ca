"""What a model expected at each position of a text, as a table and as a web page."""

import base64
import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from unicodedata import east_asian_width

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..checkpoint.writing import check_writable
from ..errors import UserError
from ..generation import encode_prompt
from .likeliest import make_candidates, rank_tokens, show_token, spell_tokens
from .plots import replace_file

# Attention weights that a page may hold: about 10 MB, which a browser still draws at once.
MAX_WEIGHTS = 8_000_000


@dataclass(frozen=True)
class Position:
    """One position in a text: the token that came, and what the model expected before it came.

    `bits` is the surprise, -log2 of the probability that the model gave to `token`, and `rank` its
    rank among all tokens, 1 for the most likely. `likeliest` holds texts and probabilities.
    """

    token: str | None
    bits: float | None
    rank: int | None
    likeliest: list[tuple[str, float]]


@dataclass(frozen=True)
class Explanation:
    """The positions of a text of T tokens, and how they look back at each other.

    There are T + 1 positions: nothing was expected at the first (`bits=None`, `likeliest=[]`), and
    nothing came yet at the last (`token=None`). `attention` is (layers, heads, T, T), with a row
    for each position that looks and a column for each that it looks at; `None` unless asked for.
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
    """Read `text` once, after the bos token if there is one, and return what was expected.

    Args:
        num_likeliest: how many of the most likely tokens to return at each position.
        with_attention: keep the attention weights of every head, for `render_page`.

    Raises:
        UserError: the text does not fit into the model's context, or cannot be encoded.
    """
    ids = encode_prompt(model, tokenizer, text)
    bos = tokenizer.bos_token_id
    if bos is not None and ids[0, 0] != bos:
        ids = torch.cat([torch.full_like(ids[:, :1], bos), ids], dim=1)
    _check_length(model, ids.shape[1], with_attention)
    logits, attention = _read(model, ids, with_attention)
    rows = logits.log_softmax(dim=-1).cpu()
    positions = list(_make_positions(tokenizer, ids[0].tolist(), rows, num_likeliest))
    return Explanation(positions, attention)


def _check_length(model: PreTrainedModel, length: int, with_attention: bool) -> None:
    config = model.config
    if length > config.max_position_embeddings:
        raise UserError(
            f"The text has {length} tokens, and this model's context is "
            f"{config.max_position_embeddings}: shorten the text."
        )
    heads = config.num_hidden_layers * config.num_attention_heads
    room = math.isqrt(2 * MAX_WEIGHTS // heads)
    if with_attention and length > room:
        raise UserError(
            f"The text has {length} tokens, and the page of a model with {heads} heads has room "
            f"for {room}: shorten the text, or leave out --html."
        )


def _read(
    model: PreTrainedModel, ids: torch.Tensor, with_attention: bool
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Return logits (T, V) and, if asked for, attention weights (layers, heads, T, T)."""
    if not with_attention:
        return model(ids, use_cache=False).logits[0].float(), None
    kernel = model.config._attn_implementation
    model.set_attn_implementation("eager")  # the only one that computes the weights as a whole
    try:
        output = model(ids, use_cache=False, output_attentions=True)
    finally:
        model.set_attn_implementation(kernel)
    return output.logits[0].float(), torch.cat(output.attentions).float().cpu()


def _make_positions(
    tokenizer: PreTrainedTokenizerBase, ids: list[int], rows: torch.Tensor, num_likeliest: int
) -> Iterator[Position]:
    """Yield the first position, then one for each row of `rows` (T, V), log-probabilities."""
    tokens = spell_tokens(tokenizer, ids)
    yield Position(tokens[0], None, None, [])
    for t, row in enumerate(rows, start=1):
        order = rank_tokens(row)
        candidates = make_candidates(tokenizer, order[:num_likeliest], row)
        likeliest = [(candidate.text, candidate.probability) for candidate in candidates]
        if t < len(ids):
            bits = max(0.0, -row[ids[t]].item() / math.log(2))
            yield Position(tokens[t], bits, order.index(ids[t]) + 1, likeliest)
        else:  # nothing came after the last token
            yield Position(None, None, None, likeliest)


# The terminal


def render_table(explanation: Explanation, *, color: bool = False, width: int = 80) -> str:
    """Return one line for each position, at most `width` columns wide; color shows the surprise.

    `*` marks the token that came if it is among the most likely.
    """
    positions = explanation.positions
    # The widths of the position's number, of the token, and of each candidate.
    number = len(str(len(positions) - 1))
    name = min(16, max(5, *(_count_columns(show_token(p.token or "?")) for p in positions)))
    candidates = max(len(position.likeliest) for position in positions)
    room = max(3, (width - number - name - 9) // max(candidates, 1) - 7)

    lines = [f"{'':{number}}  {_fit('token', name)}   bits  most likely here"]
    for i, position in enumerate(positions):
        style = _style(position.bits) if color else ""
        token = _fit("?" if position.token is None else show_token(position.token), name)
        bits = "" if position.bits is None else f"{position.bits:.1f}"
        cells = []
        for rank, (text, probability) in enumerate(position.likeliest, start=1):
            came = position.rank == rank
            cell = f"{'*' if came else ' '}{_fit(show_token(text), room)} {100 * probability:3.0f}%"
            cells.append(_paint(cell, f"{style};1") if came and style else cell)
        start = f"{i:{number}}  {_paint(token, style)}  {_paint(f'{bits:>5}', style)}"
        lines.append("  ".join([start, " ".join(cells)]).rstrip())
    total, mean = explanation.bits, explanation.bits_per_token
    summary = f"{total:.1f} bits in total, {mean:.2f} bits per token, perplexity {2**mean:,.2f}"
    return "\n".join([*lines, "", summary])


def _style(bits: float | None) -> str:
    """Return the code of a color: green if expected, yellow if possible, red if a surprise."""
    if bits is None:
        return ""
    return "32" if bits < 2 else "33" if bits < 6 else "31"


def _paint(text: str, style: str) -> str:
    return f"\x1b[{style}m{text}\x1b[0m" if style else text


def _count_columns(text: str) -> int:
    return sum(2 if east_asian_width(character) in "WF" else 1 for character in text)


def _fit(text: str, columns: int) -> str:
    """Return `text` cut with an ellipsis or filled with spaces to this many columns."""
    if _count_columns(text) > columns:
        while _count_columns(text) > columns - 1:
            text = text[:-1]
        text += "…"
    return text + " " * (columns - _count_columns(text))


# The page


def check_page(path: str | Path) -> Path:
    """Return the path if a new page can be written there, or raise a `UserError`."""
    page = Path(path)
    if page.suffix != ".html":
        raise UserError(f"html={page} must end in .html.")
    if page.exists():
        raise UserError(f"html={page} already exists: choose another name.")
    check_writable(page.parent, name="html")
    return page


def write_page(explanation: Explanation, path: str | Path, *, title: str) -> None:
    """Write the page of `render_page` to a new file, completely or not at all."""
    replace_file(check_page(path), render_page(explanation, title=title).encode())


def render_page(explanation: Explanation, *, title: str) -> str:
    """Return one self-contained HTML page with an attention map for each head.

    The page stores weights as bytes, 255 for 1, and only those on and below the diagonal. It
    states the largest weight above the diagonal, which should be 0.
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
    # Without this, a token with "<" could end the script element that holds the data.
    return page.replace("{{data}}", json.dumps(data).replace("<", "\\u003c"))
