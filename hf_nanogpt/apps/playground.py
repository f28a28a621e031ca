"""A page in the browser to explore checkpoints: a text token by token, and its alternatives.

`analysis/likeliest.py` makes the tokens. Here are the HTML that shows them and the page around it,
which needs gradio (extra `demo`).
"""

import os
import socket
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from html import escape
from importlib.util import find_spec
from pathlib import Path
from time import monotonic
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..analysis.explain import show_token
from ..analysis.likeliest import Step, choose_candidate, stream_steps
from ..checkpoint.loading import load_checkpoint
from ..errors import UserError
from ..generation import find_temperature
from .addresses import list_hosts, open_socket
from .chat import find_turn_ends

# The lowest probability of each colour in playground.css, and its text in the legend.
BANDS = {
    0.9: "90 % and more",
    0.5: "50 to 90 %",
    0.1: "10 to 50 %",
    0.01: "1 to 10 %",
    0.0: "below 1 %",
}
_PAUSE = 0.1  # seconds between updates of a growing text: each costs gradio some hundredths
_STYLE = Path(__file__).parents[1] / "templates" / "playground.css"
_HEAD = (
    "<h1>Playground</h1><p>The colour of a token shows the probability that the model gave it, "
    "before temperature, top k and top p.</p>"
)
_NO_TEXT = "<p>Press Generate: the text appears here.</p>"
_NO_TOKEN = "<p>Click a token to see the alternatives, and to continue from one.</p>"


# the tokens as HTML


def render_legend() -> str:
    """Return the colours and their meaning."""
    bands = [f'<span class="token band{i}">{text}</span>' for i, text in enumerate(BANDS.values())]
    return (
        f'<p class="legend">Probability: {" ".join(bands)} <b>bold</b>: the prompt, '
        "<u>underlined</u>: your choice</p>"
    )


def render_text(prompt: str, steps: Sequence[Step], note: str = "", *, error: bool = False) -> str:
    """Return the prompt, each token in the colour of its probability, and a note below."""
    tokens = "".join(_render_token(step, place) for place, step in enumerate(steps))
    css = "note error" if error else "note"
    return (
        f'<div class="tokens"><span class="prompt">{_show(prompt)}</span>{tokens}</div>'
        f'<p class="{css}">{escape(note)}</p>'
    )


def _render_token(step: Step, place: int) -> str:
    band = next(i for i, least in enumerate(BANDS) if step.came.probability >= least)
    chosen = " chosen" if step.chosen else ""
    tip = f"{_percent(step.came.probability)}, rank {step.rank}" + (chosen and ", your choice")
    return (
        f'<span class="token band{band}{chosen}" role="button" tabindex="0" title="{tip}" '
        f'data-place="{place}">{_show(step.came.text)}</span>'
    )


def render_candidates(step: Step, place: int) -> str:
    """Return the most likely tokens at a place, each a button to continue from it."""
    rows = [
        f'<div class="candidate{" came" if candidate == step.came else ""}" role="button" '
        f'tabindex="0" data-place="{place}" data-choice="{i}">'
        f"<span>{escape(show_token(candidate.text))}</span>"
        f'<b><i style="width:{100 * candidate.probability:.1f}%"></i></b>'
        f"<span>{_percent(candidate.probability)}</span></div>"
        for i, candidate in enumerate(step.likeliest)
    ]
    came = f"“{escape(show_token(step.came.text))}” ({_percent(step.came.probability)})"
    return (
        f"<h3>Alternatives for token {place + 1}</h3><p>The text has {came}, rank {step.rank} of "
        f"all tokens. Click another to continue from it.</p>{''.join(rows)}"
    )


def _show(text: str) -> str:
    """Return the text as HTML in which white space other than spaces can be seen."""
    shown = []
    for c in text:
        mark = "" if c.isprintable() else f"<i>{escape(show_token(c))}</i>"
        shown.append(f"{mark}\n" if c == "\n" else mark or escape(c))
    return "".join(shown)


def _percent(probability: float) -> str:
    if probability < 0.001:
        return "under 0.1 %"
    return f"{100 * probability:.{1 if probability < 0.1 else 0}f} %"


# what the buttons do


@dataclass(frozen=True)
class Speaker:
    """A loaded checkpoint and its name on the page."""

    name: str
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase

    def describe(self) -> str:
        """Return the name and size as HTML."""
        millions = self.model.num_parameters() / 1e6
        context = self.model.config.max_position_embeddings
        facts = f"{millions:,.1f} million parameters, context of {context:,} tokens"
        return f"<h2>{escape(self.name)}</h2><p>{facts}</p>"

    def write(
        self, prompt: str, steps: Sequence[Step], settings: dict[str, Any]
    ) -> Iterator[tuple[str, tuple[str, list[Step]]]]:
        """Yield the growing text as HTML, with its prompt and steps."""
        steps, shown = list(steps), monotonic()
        yield render_text(prompt, steps, "Reading …"), (prompt, steps)
        try:
            for step in stream_steps(self.model, self.tokenizer, prompt, steps=steps, **settings):
                steps.append(step)
                if monotonic() - shown > _PAUSE:
                    yield render_text(prompt, steps, "Writing …"), (prompt, steps)
                    shown = monotonic()
            yield render_text(prompt, steps, self.describe_end(steps)), (prompt, steps)
        except UserError as error:
            yield render_text(prompt, steps, str(error), error=True), (prompt, steps)

    def describe_end(self, steps: list[Step]) -> str:
        """Return the length of a text, and whether the model has ended it."""
        ended = steps[-1].came.id in find_turn_ends(self.model, self.tokenizer)
        return f"{len(steps)} tokens{': the model has ended the text' if ended else ''}."


# the page


def serve_playground(
    checkpoints: Sequence[str | Path], *, host: str = "127.0.0.1", port: int | None = None
) -> Any:
    """Serve a page for one or more checkpoints; return the running `gradio.Blocks`.

    The page loads nothing from other servers and reports to nobody. Without a `port` it takes the
    first free one, from 7860 on.

    Raises:
        UserError: gradio is missing, a checkpoint cannot be loaded, or the address is taken.
    """
    if find_spec("gradio") is None:
        raise UserError("The playground needs gradio: pip install 'hf-nanogpt[demo]'.")
    if port == 0:
        raise UserError("port=0 is invalid: leave out --port to use the first free one.")
    # gradio would load for seconds and then fail with a traceback; it knows IPv4 only.
    with open_socket(host, port or 0, family=socket.AF_INET) as listener:
        address = listener.getsockname()[0]
    speakers = [Speaker(str(name), *load_checkpoint(name)) for name in checkpoints]
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # read when gradio is imported
    # gradio asks its own server whether it is up, which must not go through a proxy.
    direct = [os.environ.get("no_proxy") or os.environ.get("NO_PROXY"), "localhost", host]
    os.environ["no_proxy"] = ",".join(filter(None, direct))
    import gradio
    from starlette.middleware import Middleware
    from starlette.middleware.trustedhost import TrustedHostMiddleware

    hosts: Any = {"allowed_hosts": list_hosts(host, address)}
    page = _build_page(speakers)
    page.launch(
        server_name=host,
        server_port=port,
        share=False,
        quiet=True,
        prevent_thread_lock=True,
        footer_links=[],
        run_history=False,
        ssr_mode=False,
        mcp_server=False,
        app_kwargs={"middleware": [Middleware(TrustedHostMiddleware, **hosts)]},
        theme=gradio.themes.Default(primary_hue="blue").set(
            body_text_color_subdued="*neutral_600", block_info_text_color="*neutral_600"
        ),
        css=_STYLE.read_text(encoding="utf-8"),
    )
    return page


def _build_page(speakers: Sequence[Speaker]) -> Any:
    import gradio

    with gradio.Blocks(title="hf_nanogpt playground", analytics_enabled=False) as page:
        gradio.HTML(_HEAD)
        prompt = gradio.Textbox(
            label="Prompt", lines=2, placeholder="A text to continue", elem_id="prompt"
        )
        settings = _build_settings(speakers)
        with gradio.Row():
            start = gradio.Button("Generate", variant="primary", scale=3, elem_id="generate")
            stop = gradio.Button("Stop", elem_id="stop")
        gradio.HTML(render_legend())
        with gradio.Row():
            for speaker in speakers:
                _build_column(speaker, prompt, settings, start, stop)
    return page


def _build_settings(speakers: Sequence[Speaker]) -> dict[str, Any]:
    """Return the widgets, by the names of the settings of `stream_steps`."""
    from gradio import Number, Row, Slider

    defaults = speakers[0].model.generation_config
    longest = max(s.model.config.max_position_embeddings for s in speakers)
    top_k, top_p = defaults.top_k or 0, defaults.top_p or 1.0
    temperature = find_temperature(speakers[0].model)
    hottest = max(2, temperature)
    with Row():
        return {
            "temperature": Slider(
                0, hottest, temperature, step=0.05, label="Temperature", info="0: greedy"
            ),
            "top_k": Slider(0, max(100, top_k), top_k, step=1, label="Top k", info="0: all tokens"),
            "top_p": Slider(0.01, 1, top_p, step=0.01, label="Top p", info="1: all tokens"),
            "max_new_tokens": Slider(
                1, longest, min(100, longest), step=1, label="New tokens", info="at most"
            ),
            "seed": Number(1, precision=0, label="Seed", info="empty: another text each time"),
        }


# A click, Enter or the space bar on an element with the focus sends its data-* attributes.
_CLICKS = """
const choose = event => {
  const found = event.target.closest('[tabindex]');
  if (!found || (event.key && !['Enter', ' '].includes(event.key))) return;
  if (event.key) event.preventDefault();  // the space bar would scroll
  element.querySelectorAll('[aria-pressed]').forEach(one => one.removeAttribute('aria-pressed'));
  found.setAttribute('aria-pressed', true);
  trigger('click', {...found.dataset});
};
element.addEventListener('click', choose);
element.addEventListener('keydown', choose);
"""


def _build_column(speaker: Speaker, prompt, settings: dict[str, Any], start, stop) -> None:
    """Add the column of one speaker, and what its buttons do."""
    import gradio

    with gradio.Column(elem_classes="speaker"):
        gradio.HTML(speaker.describe())
        with gradio.Row():  # one below the other on a narrow page
            with gradio.Column(scale=3, min_width=340):
                text = gradio.HTML(_NO_TEXT, js_on_load=_CLICKS)
            with gradio.Column(scale=2, min_width=340):
                candidates = gradio.HTML(_NO_TOKEN, js_on_load=_CLICKS, elem_classes="candidates")
        story = gradio.State(("", []))  # the prompt and the steps on the page

    def write(prompt, steps, right, values):
        chosen = dict(zip(settings, values, strict=True))
        for shown, new_story in speaker.write(prompt, steps, chosen):
            yield shown, right, new_story

    def begin(prompt, *values):
        yield from write(prompt, [], _NO_TOKEN, values)

    def show_candidates(event: gradio.EventData, story):
        place = int(event.place)
        return render_candidates(story[1][place], place)

    def choose(event: gradio.EventData, story, *values):
        prompt, steps = story
        place = int(event.place)
        steps = choose_candidate(steps, place, int(event.choice))
        yield from write(prompt, steps, render_candidates(steps[place], place), values)

    def halt(story):
        prompt, steps = story
        return render_text(prompt, steps, speaker.describe_end(steps)) if steps else _NO_TEXT

    quiet: dict[str, Any] = {"show_progress": "hidden", "api_visibility": "private"}
    # One at a time: two at once would only slow each other down.
    alone: dict[str, Any] = quiet | {"concurrency_id": "model", "concurrency_limit": 1}
    widgets, outputs = list(settings.values()), [text, candidates, story]
    triggers = [start.click, prompt.submit]
    first = gradio.on(triggers, begin, [prompt, *widgets], outputs, **alone)
    text.click(show_candidates, story, candidates, **quiet)
    again = candidates.click(choose, [story, *widgets], outputs, cancels=[first], **alone)
    gradio.on(triggers, None, cancels=[again], **quiet)
    stop.click(halt, story, text, cancels=[first, again], **quiet)
