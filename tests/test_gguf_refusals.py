"""What GGUF cannot express is refused by name, and nothing half written is left."""

import sys

import pytest
from children import forked, run_python
from conftest import tiny_model
from test_gguf import LLAMA3_ROPE, TEXT, split_tokenizer
from tokenizers import Tokenizer, models, normalizers
from transformers import PreTrainedTokenizerFast

from hf_nanogpt import train_tokenizer
from hf_nanogpt.convert.gguf import export_gguf
from hf_nanogpt.convert.gguf_tokenizer import LLAMA3_SPLIT, QWEN_SPLIT, describe_tokenizer

pytest.importorskip("gguf", reason="the GGUF writer is missing: pip install 'hf-nanogpt[gguf]'")


def _save(folder, family, **overrides):
    tokenizer = train_tokenizer([], kind="byte")
    model = tiny_model(family, vocab_size=len(tokenizer), **overrides)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return model


def test_a_text_ends_in_llama_cpp_where_ours_ends(tmp_path):
    from gguf import GGUFReader

    tokenizer = train_tokenizer([], kind="byte")
    for ends, keys in ((None, [tokenizer.eos_token_id]), (7, [7]), ([7, 7, 9], [7, 9])):
        model = _save(tmp_path, "nano", eos_token_id=ends)
        model.generation_config.eos_token_id = ends
        model.save_pretrained(tmp_path)
        path = export_gguf(tmp_path, tmp_path / f"{ends}.gguf")
        fields = GGUFReader(path).fields
        names = ("tokenizer.ggml.eos_token_id", "tokenizer.ggml.eot_token_id")
        assert [fields[name].contents() for name in names if name in fields] == keys


def test_several_chat_templates_are_written_by_name(tmp_path):
    from gguf import GGUFReader, Keys

    _save(tmp_path, "nano")
    tokenizer = train_tokenizer([], kind="byte")
    tokenizer.chat_template = {"default": "{{ messages }}", "tool_use": "{{ tools }}"}
    tokenizer.save_pretrained(tmp_path)
    fields = GGUFReader(export_gguf(tmp_path, tmp_path / "model.gguf")).fields
    names = Keys.Tokenizer
    assert fields[names.CHAT_TEMPLATE].contents() == "{{ messages }}"
    assert fields[names.CHAT_TEMPLATE_N.format(name="tool_use")].contents() == "{{ tools }}"
    assert fields[names.CHAT_TEMPLATES].contents() == ["tool_use"]


def test_a_tokenizer_that_llama_cpp_would_read_differently_is_refused():
    ours = train_tokenizer([TEXT], kind="char")
    describe_tokenizer(ours, vocab_size=len(ours))
    with pytest.raises(ValueError, match=f"has {len(ours)} tokens, but vocab_size=100"):
        describe_tokenizer(ours, vocab_size=100)
    words = Tokenizer(models.WordLevel({"a": 0}, unk_token="a"))
    cases = {
        "not a byte-level BPE": PreTrainedTokenizerFast(tokenizer_object=words, eos_token="a"),
        "rules that are not GPT-2's": split_tokenizer(r"\w+|\W"),
        "no token for the bytes 0x5A, 0xE1,": split_tokenizer(QWEN_SPLIT, lacks="\x04Zá"),
        "normalizer .*Lowercase": split_tokenizer(
            LLAMA3_SPLIT, ignore_merges=True, normalizer=normalizers.Lowercase()
        ),
    }
    for message, tokenizer in cases.items():
        with pytest.raises(ValueError, match=message):
            describe_tokenizer(tokenizer, vocab_size=999)
    with pytest.raises(ValueError, match="eos_token_id=999 is outside the vocabulary of 999"):
        describe_tokenizer(ours, vocab_size=999, ends=[999, 7])
    with pytest.raises(ValueError, match="eot_token_id=1000 is outside the vocabulary of 999"):
        describe_tokenizer(ours, vocab_size=999, ends=[7, 1000])
    ours.eos_token = None
    for ends in (None, []):
        with pytest.raises(ValueError, match=r"no eos_token_id .*: set it in"):
            describe_tokenizer(ours, vocab_size=999, ends=ends)


@pytest.mark.parametrize(
    ("family", "overrides", "message"),
    [
        ("gpt1", {}, "gpt2, .* norm_position='post'"),
        ("gpt3", {}, "gpt2, .* sliding_window=5"),
        ("gpt2", {"hidden_act": "gelu"}, "hidden_act='gelu'"),
        ("gpt2", {"num_key_value_heads": 2}, "num_key_value_heads=2"),
        ("gpt2", {"head_dim": 16}, "head_dim=16"),
        ("nanochat", {}, "norm_type='rmsnorm_unweighted'"),
        ("nano", {"final_logit_softcapping": 15.0}, "final_logit_softcapping=15.0"),
        ("qwen3", {"attention_bias": True}, "attention_bias=True"),
        ("qwen3", {"rope_parameters": LLAMA3_ROPE}, "rope_type='llama3'"),
        ("llama", {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0}}, "'dynamic'"),
    ],
)
def test_a_field_that_llama_cpp_lacks_is_named(family, overrides, message, tmp_path):
    _save(tmp_path, family, **overrides)
    with pytest.raises(ValueError, match=message):
        export_gguf(tmp_path, tmp_path / "new" / "model.gguf")
    assert not (tmp_path / "new").exists()


def test_bad_arguments_leave_nothing_behind(tmp_path, monkeypatch):
    model = _save(tmp_path, "nano")
    there, new = tmp_path / "there.gguf", tmp_path / "new.gguf"
    there.write_text("mine")
    for destination, more, message in (
        (there, {}, "already exists"),
        (tmp_path / "model.bin", {}, "ends in .gguf"),
        (new, {"dtype": "q8"}, "dtype='q8' is unknown"),
        (there / "new.gguf", {}, "cannot write to"),
    ):
        with pytest.raises(ValueError, match=message):
            export_gguf(tmp_path, destination, **more)
    assert there.read_text() == "mine"
    before = sorted(tmp_path.iterdir())
    with monkeypatch.context() as patch, pytest.raises(ValueError, match="No space left"):
        patch.setattr("gguf.GGUFWriter.write_tensor_data", _fail)
        export_gguf(tmp_path, new)
    with monkeypatch.context() as patch, pytest.raises(ValueError, match=r"hf-nanogpt\[gguf\]"):
        patch.setitem(sys.modules, "gguf", None)
        export_gguf(tmp_path, new)
    assert sorted(tmp_path.iterdir()) == before
    model.lm_head.weight.data[0, 0] = 1e5
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"output\.weight has weights beyond"):
        export_gguf(tmp_path, new, dtype="f16")
    _save(tmp_path, "nano", n_embd=48)
    with pytest.raises(ValueError, match="rows of 48 weights, and q8_0 packs 32 together"):
        export_gguf(tmp_path, new, dtype="q8_0")
    assert not new.exists()


# What a full disk does: a file may not grow beyond a limit, in its first tensor.
FULL = """
import resource, sys
from hf_nanogpt.convert.gguf import export_gguf
resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, resource.RLIM_INFINITY))
try:
    export_gguf(*sys.argv[1:])
except ValueError as error:
    print(error)
"""


@forked
def test_a_full_disk_is_called_full(tmp_path):
    _save(tmp_path / "ours", "gpt2")
    result = run_python(FULL, tmp_path / "ours", tmp_path / "new.gguf")
    assert "nothing was left there: the disk is full" in result.stdout, result.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["ours"]


def _fail(*args):
    raise OSError(28, "No space left on device")
