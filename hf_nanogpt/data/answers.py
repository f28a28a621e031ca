"""Where the answers are in the text that a chat template makes, if the template does not say.

What changes in the text when a message gets another content is the content; and what the text adds
to the prompt from which a model has to generate the answer is the answer.
"""

import re
from bisect import bisect_left
from collections.abc import Callable
from typing import Any, TypeAlias

from ..errors import UserError

Message: TypeAlias = dict[str, Any]
Span: TypeAlias = tuple[int, int]
"""The first and the last + 1 character of a part of a text."""


def find_answers(
    messages: list[Message],
    text: str,
    render: Callable[..., str],
    *,
    ends: re.Pattern[str],
) -> list[Span]:
    """Return the span of each answer of the assistant, with what ends it.

    Args:
        text: what `render` makes of the messages.
        render: applies the template to messages; with `add_generation_prompt=True` it lets the
            assistant begin.
        ends: the special tokens that may end an answer; where there are none, the blanks after the
            answer belong to it.

    Raises:
        UserError: the text does not hold the content of an answer.
    """
    contents = [_find_content(messages, i, text, render) for i in range(len(messages))]
    end_of_turn, spans = re.compile(rf"\s*(?:{ends.pattern})|\s*"), []
    for i, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        start, end = contents[i]
        if start == end == len(text) and message["content"].strip():
            raise UserError(f"it does not write the answer {message['content']!r:.80}")
        if i > 0:  # few templates begin without a message
            prompt = render(messages[:i], add_generation_prompt=True)
            shared = _count_shared(text, prompt)
            # Some templates write earlier messages otherwise as long as none follow.
            start = shared if contents[i - 1][1] <= shared < start else start
        found = end_of_turn.match(text, end)
        spans.append((start, found.end() if found else end))
    return spans


def _find_content(
    messages: list[Message], number: int, text: str, render: Callable[..., str]
) -> Span:
    """Return where the content of a message is: the part that another content changes."""
    other = next(c for c in map(chr, range(0xE000, 0xF900)) if c not in text)  # private use
    changed = messages[number] | {"content": other}
    rendered = render([*messages[:number], changed, *messages[number + 1 :]])
    start = _count_shared(text, rendered)
    same_end = _count_shared(text[start:][::-1], rendered[start:][::-1])
    return start, len(text) - same_end


def _count_shared(one: str, other: str) -> int:
    """Return how many characters two texts begin with alike."""
    ends = range(1, min(len(one), len(other)) + 1)
    return bisect_left(ends, True, key=lambda end: one[:end] != other[:end])
