"""GGUF files against llama.cpp itself (xllamacpp) and against transformers' own reader of them."""

import json
import urllib.request
from pathlib import Path

import pytest
import torch
from conftest import tiny_model
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

from hf_nanogpt import train_tokenizer
from hf_nanogpt.convert.gguf import export_gguf, translate_tensors
from hf_nanogpt.convert.gguf_tokenizer import LLAMA3_SPLIT, QWEN_SPLIT

pytest.importorskip("gguf", reason="the GGUF writer is missing: pip install 'hf-nanogpt[gguf]'")

TEXT = (
    "The small cat sat on the mat, naïve as ever: 12 mice & 3 dögs — 你好世界!\n"
    "  It's fun, isn't it?\n\nनमस्ते दुनिया: «हाँ» 👍, and 2026 years later x² = ½.\n"
)
PROMPTS = ["The small cat", "naïve as ever: 12", "你好世", "It's  3 dögs\n\n", "नमस्ते 👍🏽 é"]
STRINGS = [
    *PROMPTS,
    "",
    " ",
    "don't DON'T  \n \t",
    "a<|endoftext|>b",
    "١٢٣ Ⅷ ﬁ\r\n\r\n x²y 12345!?…",
]
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
LINEAR_ROPE = {"rope_type": "linear", "rope_theta": 5000.0, "factor": 3.0}
VARIANTS = {
    "gpt2 without biases, untied": ("gpt2", {"bias": False, "tie_word_embeddings": False}),
    "llama with biases and wide heads": ("llama", {"bias": True, "head_dim": 12}),
    "llama tied, llama3 rope": (
        "llama",
        {"rope_parameters": LLAMA3_ROPE, "tie_word_embeddings": True},
    ),
    "qwen3, linear rope, tied": ("qwen3", {"rope_parameters": LINEAR_ROPE}),
}


def _checkpoint(folder: Path, family: str, kind: str = "bpe", *, steps: int = 40, **overrides):
    """Save a tiny model with random norms and biases, trained a little so that it is sure."""
    tokenizer = train_tokenizer([TEXT] * 9, kind=kind, vocab_size=300)
    model = tiny_model(family, **({"vocab_size": len(tokenizer) + 3} | overrides))
    for name, p in model.named_parameters():
        if p.dim() == 1:
            torch.nn.init.normal_(p, mean=1.0 if name.endswith("norm.weight") else 0.0, std=0.2)
    ids = tokenizer(TEXT * 3, return_tensors="pt").input_ids
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    for step in range(steps):
        batch = ids[:, step % 48 :][:, : 48 * (ids.shape[1] // 48 - 1)].reshape(-1, 48)[:4]
        model(batch, labels=batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.eval().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return model, tokenizer


class LlamaCpp:
    """llama.cpp with one file, asked over its own local HTTP interface."""

    def __init__(self, path: Path):
        xllamacpp = pytest.importorskip(
            "xllamacpp", reason="llama.cpp is missing: pip install xllamacpp"
        )
        params = xllamacpp.CommonParams()
        params.model.path = str(path)
        params.n_ctx, params.n_parallel, params.n_gpu_layers, params.verbosity = 64, 1, 0, 0
        params.cpuparams.n_threads = params.cpuparams_batch.n_threads = 1
        params.warmup = params.fit_params = False
        params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
        off = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
        params.flash_attn_type = off
        self.server = xllamacpp.Server(params)

    def ask(self, path: str, **body):
        url, headers = self.server.listening_address + path, {"Content-Type": "application/json"}
        request = urllib.request.Request(url, json.dumps(body).encode(), headers)
        with urllib.request.urlopen(request, timeout=60) as answer:
            return json.load(answer)

    def tokenize(self, text: str) -> list[int]:
        return self.ask("/tokenize", content=text, add_special=True)["tokens"]

    def complete(self, prompt, count: int = 20):
        return self.ask(
            "/completion",
            prompt=prompt,
            n_predict=count,
            temperature=0,
            n_probs=1,
            return_tokens=True,
            cache_prompt=False,
        )


def _count_same(a: list[int], b: list[int]) -> int:
    pairs = enumerate(zip(a, b, strict=False))
    return next((i for i, (x, y) in pairs if x != y), min(len(a), len(b)))


def _assert_same_text(model, tokenizer, llama: LlamaCpp, *, tolerance: float) -> float:
    """Compare ids, log-probabilities and text of greedy continuations; return the difference."""
    worst = 0.0
    for prompt in PROMPTS:
        ids = tokenizer(prompt, return_tensors="pt")
        assert llama.tokenize(prompt) == ids.input_ids[0].tolist(), prompt
        out = model.generate(
            **ids,
            max_new_tokens=20,
            do_sample=False,
            output_logits=True,
            return_dict_in_generate=True,
        )
        new = out.sequences[0, ids.input_ids.shape[1] :]
        theirs = llama.complete(prompt)
        count = _count_same(theirs["tokens"], new.tolist())
        if count < min(len(theirs["tokens"]), len(new)):  # a tie, which rounding may break
            likely = out.logits[count][0].log_softmax(-1)
            gap = likely[new[count]] - likely[theirs["tokens"][count]]
            assert gap < tolerance, (prompt, gap)
        else:
            rest = new[count:].tolist()  # where ours chose the end, theirs stops silently
            assert rest in ([], [tokenizer.eos_token_id]), (prompt, rest)
            ours = tokenizer.decode(new[:count])
            assert theirs["content"].rstrip("\ufffd") == ours.rstrip("\ufffd"), prompt
        steps = out.logits, new, theirs["completion_probabilities"]
        for logits, token, said in zip(*steps, strict=False):
            if said["id"] != token:
                break  # it leaves out tokens that end inside a character
            gap = logits[0].log_softmax(-1)[token] - said["logprob"]
            worst = max(worst, gap.abs().item())
    assert 0 < worst < tolerance, worst
    return worst


@pytest.mark.slow
# A tokenizer is written alike for every family, so each kind comes with one or two of them.
@pytest.mark.parametrize(
    ("family", "kind"), [("gpt2", "bpe"), ("llama", "char"), ("qwen3", "byte"), ("nano", "bpe")]
)
def test_llama_cpp_writes_the_same_text(family, kind, tmp_path):
    model, tokenizer = _checkpoint(tmp_path, family, kind)
    llama = LlamaCpp(export_gguf(tmp_path, tmp_path / "new" / "model.gguf"))
    assert [p.name for p in (tmp_path / "new").iterdir()] == ["model.gguf"]
    # llama.cpp looks GELU up in a table of half-precision values
    _assert_same_text(model, tokenizer, llama, tolerance=1e-2 if family == "gpt2" else 1e-4)
    for text in STRINGS:
        assert llama.tokenize(text) == tokenizer(text).input_ids, text


@pytest.mark.slow
@pytest.mark.parametrize("variant", VARIANTS)
def test_llama_cpp_understands_every_field(variant, tmp_path):
    family, overrides = VARIANTS[variant]
    model, tokenizer = _checkpoint(tmp_path, family, **overrides)
    llama = LlamaCpp(export_gguf(tmp_path, tmp_path / "model.gguf"))
    _assert_same_text(model, tokenizer, llama, tolerance=1e-2 if family == "gpt2" else 1e-4)


@pytest.mark.slow
def test_f16_is_half_the_size_and_nearly_the_same(tmp_path):
    model, tokenizer = _checkpoint(tmp_path, "gpt2")  # which has biases too
    sizes = [
        export_gguf(tmp_path, tmp_path / f"{dtype}.gguf", dtype=dtype).stat().st_size
        for dtype in ("f32", "f16")
    ]
    assert sizes[1] < 0.62 * sizes[0]
    _assert_same_text(
        model.half().float(), tokenizer, LlamaCpp(tmp_path / "f16.gguf"), tolerance=2e-2
    )


@pytest.mark.slow
def test_q8_0_is_the_models_weights_in_whole_steps(tmp_path):
    from gguf import GGMLQuantizationType, GGUFReader, dequantize

    model, tokenizer = _checkpoint(tmp_path, "qwen3")
    reader = GGUFReader(export_gguf(tmp_path, tmp_path / "q8_0.gguf", dtype="q8_0"))
    weights = dict(translate_tensors(model, "qwen3"))
    for tensor in reader.tensors:
        weight = weights.pop(tensor.name)
        if weight.dim() == 1:
            assert tensor.tensor_type == GGMLQuantizationType.F32
            continue
        read = torch.tensor(dequantize(tensor.data, tensor.tensor_type))
        blocks = weight.unflatten(-1, (-1, 32)), read.unflatten(-1, (-1, 32))
        step = blocks[0].abs().amax(dim=-1, keepdim=True) / 127
        assert ((blocks[0] - blocks[1]).abs() <= 0.51 * step + 127 * step / 2**11).all()
        weight.data.copy_(read)
    assert not weights
    # llama.cpp rounds what it multiplies the weights by to 8 bits too
    _assert_same_text(model, tokenizer, LlamaCpp(tmp_path / "q8_0.gguf"), tolerance=0.2)


@pytest.mark.parametrize("family", ["gpt2", "llama", "qwen3", "nano"])
def test_transformers_reads_the_file_back_with_the_same_logits(family, tmp_path, tokens):
    model, _ = _checkpoint(tmp_path, family, steps=0)
    export_gguf(tmp_path, tmp_path / "theirs" / "model.gguf")
    where = {"pretrained_model_name_or_path": tmp_path / "theirs", "gguf_file": "model.gguf"}
    config = AutoConfig.from_pretrained(**where)  # its reader knows neither of the next two
    if family == "gpt2":
        config.n_positions = model.config.max_position_embeddings
        config.tie_word_embeddings = True
    else:
        config.head_dim = model.config.head_dim
    native = AutoModelForCausalLM.from_pretrained(**where, config=config).eval()
    with torch.no_grad():
        torch.testing.assert_close(native(tokens).logits, model(tokens).logits, atol=1e-4, rtol=0)


def split_tokenizer(pattern: str | None, *, ignore_merges: bool = False, **parts):
    """Train a byte-level BPE that splits by `pattern`, as Qwen's and Llama 3's do."""
    tokenizer = Tokenizer(models.BPE(ignore_merges=ignore_merges))
    split = pre_tokenizers.Split(Regex(pattern), behavior="isolated")
    level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, level])
    tokenizer.decoder = decoders.ByteLevel()
    for name, part in parts.items():
        setattr(tokenizer, name, part)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=330,
        initial_alphabet=alphabet,
        special_tokens=["<|endoftext|>"],
        show_progress=False,
    )
    tokenizer.train_from_iterator([TEXT] * 9, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|endoftext|>")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("pattern", "more"),
    [
        (LLAMA3_SPLIT, {"ignore_merges": True}),
        (QWEN_SPLIT, {"normalizer": normalizers.NFC()}),
    ],
    ids=["llama-3", "qwen"],
)
def test_llama_cpp_splits_text_as_llama_3_and_qwen_do(pattern, more, tmp_path):
    tokenizer = split_tokenizer(pattern, **more)
    tokenizer.save_pretrained(tmp_path)
    tiny_model("nano", vocab_size=len(tokenizer)).save_pretrained(tmp_path)
    llama = LlamaCpp(export_gguf(tmp_path, tmp_path / "model.gguf"))
    for text in STRINGS:
        assert llama.tokenize(text) == tokenizer(text).input_ids, text
