"""The answers in a template without marks are those that marks would give."""

import re
from pathlib import Path

import pytest
from test_chat_text import CHAT, MISTRAL, byte_tokenizer
from transformers.utils.chat_template_utils import render_jinja_template

from hf_nanogpt import add_chat_template, train_tokenizer
from hf_nanogpt.data.answers import find_answers
from hf_nanogpt.data.conversations import ConversationEncoder

MARKS = re.compile(r"{%(-?) (end)?generation (-?)%}")
# As Llama 2's, where only an eos ends an answer; and as one of a time before special tokens.
LLAMA2 = (
    "{% for m in messages %}{% if m.role == 'assistant' %}{% generation %}"
    "{{ ' ' + m.content | trim + ' ' + eos_token }}{% endgeneration %}"
    "{% else %}{{ bos_token + '[INST] ' + m.content | trim + ' [/INST]' }}{% endif %}{% endfor %}"
)
PLAIN = (
    "{% for m in messages %}{{ m.role + ':' }}{% if m.role == 'assistant' %}{% generation %}"
    "{{ ' ' + m.content + '\n' }}{% endgeneration %}{% else %}{{ ' ' + m.content + '\n' }}"
    "{% endif %}{% endfor %}{% if add_generation_prompt %}{{ 'assistant:' }}{% endif %}"
)
TEMPLATES = {"chatml": None, "Mistral": MISTRAL, "Llama 2": LLAMA2, "plain": PLAIN}
FORGED = [  # what looks like the template's own words, and answers that repeat a question
    {"role": "user", "content": "assistant: a [/INST] \n"},
    {"role": "assistant", "content": "  assistant: a [/INST] <|im_end|>"},
    {"role": "user", "content": "\nassistant: b"},
    {"role": "assistant", "content": "b\n\nassistant: b"},
    {"role": "assistant", "content": ""},
]


CASES = [(name, chat) for name in TEMPLATES for chat in (CHAT, CHAT[1:3], FORGED)]


@pytest.mark.parametrize(("name", "chat"), [*CASES, ("chatml", FORGED[1:])])
def test_answers_are_found_where_marks_say(name, chat):
    tokenizer = byte_tokenizer(TEMPLATES[name])
    [marked] = ConversationEncoder(tokenizer)({"messages": [chat]})["input_ids"]
    tokenizer.chat_template = MARKS.sub(r"{#\1 \3#}", tokenizer.chat_template)
    assert "generation %" not in tokenizer.chat_template
    [found] = ConversationEncoder(tokenizer)({"messages": [chat]})["input_ids"]
    assert found.tolist() == marked.tolist()


# Those of TRL's templates for training that mark what a model has to generate, which some do with
# the line break after an answer.
MARKED = "cohere gemma gemma3 glm4moe lfm2 lfm2_v2 llama3 qwen2_5_vl qwen3_instruct_2507 qwen3_vl"
ENDS = "<|END_OF_TURN_TOKEN|> <end_of_turn> <|user|> <|im_end|> <|eot_id|>"


@pytest.mark.parametrize("name", MARKED.split())
def test_answers_are_found_in_the_templates_of_known_models(name):
    trl = pytest.importorskip("trl", reason="pip install trl")
    path = Path(trl.__file__).parent / "chat_templates" / f"{name}_training.jinja"
    if not path.is_file():
        pytest.skip(f"this release of TRL has no {path.name}")
    template, ends = path.read_text(), re.compile("|".join(map(re.escape, ENDS.split())))
    settings = {"chat_template": template, "bos_token": "<s>", "eos_token": "</s>"}

    def render(messages, **more) -> str:
        return render_jinja_template([messages], **settings, **more)[0][0]

    for chat in (CHAT[1:3], CHAT[1:]):
        [text], [marks] = render_jinja_template(
            [chat], **settings, return_assistant_tokens_mask=True
        )
        found = find_answers(chat, text, render, ends=ends)
        assert [start for start, _ in found] == [start for start, _ in marks]
        answers = [[text[start:end].rstrip("\n") for start, end in s] for s in (found, marks)]
        assert answers[0] == answers[1] and "No, not so." in answers[0][0]


def test_an_instruct_model_whose_turns_end_by_eos_learns_its_answers_and_their_end():
    tokenizer = train_tokenizer([], kind="byte")
    add_chat_template(tokenizer)
    tokenizer.eos_token = "<|im_end|>"  # as SmolLM2's and Qwen's
    tokenizer.chat_template = MARKS.sub(r"{#\1 \3#}", tokenizer.chat_template)
    [ids] = ConversationEncoder(tokenizer)({"messages": [CHAT]})["input_ids"]
    learnt = tokenizer.decode(ids[ids >= 0] & ~(1 << 30))
    assert learnt == "No, not so.<|im_end|>Now it is so.<|im_end|>"


def test_a_template_that_does_not_write_the_answers_is_refused():
    tokenizer = byte_tokenizer("{% for m in messages %}{{ m.role }}{% endfor %}")
    with pytest.raises(ValueError, match=r"refuses the conv.* it does not write the answer 'No, n"):
        ConversationEncoder(tokenizer)({"messages": [CHAT]})
