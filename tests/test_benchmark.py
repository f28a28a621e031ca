"""The benchmarks: equal models, right arithmetic, and files that are never replaced."""

import json
from statistics import median

import pytest
import torch
from conftest import tiny_config, tiny_model

from hf_nanogpt import NanoGPTForCausalLM, load_preset
from hf_nanogpt.benchmark import (
    benchmark_generation,
    benchmark_training,
    format_generation,
    format_report,
)
from hf_nanogpt.benchmark.contestants import GPT2, NANO, PlainGPT, make_contestants
from hf_nanogpt.benchmark.decoding import INT8, OURS, PLAIN, _load
from hf_nanogpt.cli import main
from hf_nanogpt.quantization import multiplies_exactly

TINY = {"n_layer": 1, "n_embd": 16, "n_head": 2, "block_size": 16, "vocab_size": 61}
QUICK = {"batch_size": 2, "rounds": 2, "steps": 1, "num_threads": 1}
FLAGS = [f"--{name}={value}" for name, value in (TINY | QUICK).items()]


def test_plain_gpt_computes_what_the_gpt2_shape_does(tokens):
    ours = tiny_model("gpt2", hidden_act="gelu")
    plain = PlainGPT(tiny_config("gpt2"))
    trunk = ours.model
    with torch.no_grad():
        plain.tokens.weight.copy_(trunk.embed_tokens.weight)
        plain.positions.weight.copy_(trunk.embed_positions.weight)
        plain.norm.load_state_dict(trunk.norm.state_dict())
        for block, layer in zip(plain.blocks, trunk.layers, strict=True):
            block.norm1.load_state_dict(layer.input_layernorm.state_dict())
            block.norm2.load_state_dict(layer.post_attention_layernorm.state_dict())
            attention = layer.self_attn
            parts = [attention.q_proj, attention.k_proj, attention.v_proj]
            block.qkv.weight.copy_(torch.cat([part.weight for part in parts]))
            block.qkv.bias.copy_(torch.cat([part.bias for part in parts]))
            block.out.load_state_dict(attention.o_proj.state_dict())
            block.up.load_state_dict(layer.mlp.up_proj.state_dict())
            block.down.load_state_dict(layer.mlp.down_proj.state_dict())
    expected, actual = ours(tokens, labels=tokens), plain(tokens, labels=tokens)
    torch.testing.assert_close(actual.logits, expected.logits, atol=1e-5, rtol=1e-5)
    assert actual.loss.item() == pytest.approx(expected.loss.item(), abs=1e-6)


def test_contestants_have_the_same_size():
    count = {
        name: sum(p.numel() for p in model.parameters())
        for name, model in make_contestants(TINY | {"n_layer": 3}).items()
    }
    qk_norms = 3 * 2 * TINY["n_embd"] // TINY["n_head"]
    assert count.pop(NANO) == count.pop("LlamaForCausalLM") + qk_norms
    assert count.keys() == {GPT2, "GPT2LMHeadModel", "GPT-2 in plain torch"}
    assert len(set(count.values())) == 1


def test_report_is_arithmetic_on_what_was_measured():
    report = benchmark_training("gpt2", **TINY, **QUICK)
    rows = {row["name"]: row for row in report["rows"]}
    for row in rows.values():
        ours = rows[row["compared_with"]]
        speed = 2 * 16 / median(row["seconds_per_step"])
        assert row["tokens_per_second"] == pytest.approx(speed)
        flops = report["flops_per_token"][row["compared_with"]]
        assert row["mfu"] == pytest.approx(speed * flops / report["peak_flops"])
        pairs = zip(ours["seconds_per_step"], row["seconds_per_step"], strict=True)
        ratios = [a / b for a, b in pairs]
        assert row["speed_to_ours"] == pytest.approx([min(ratios), median(ratios), max(ratios)])
        assert row["name"] in format_report(report)
    assert report["machine"]["threads"] == 1 and report["settings"]["n_embd"] == 16
    assert len(report["batch_ms"]) == len(report["trainer_overhead_ms"]) == 3


@pytest.mark.slow
def test_command_writes_its_files_once(tmp_path, capsys):
    output = tmp_path / "bench"
    assert main(["bench", "train", *FLAGS, "--output", str(output)]) == 0
    assert "GPT-2 in plain torch" in capsys.readouterr().out
    assert {path.name for path in output.iterdir()} == {"bench_train.json", "bench_train.png"}
    assert json.loads((output / "bench_train.json").read_text())["settings"]["batch_size"] == 2
    assert (output / "bench_train.png").read_bytes().startswith(b"\x89PNG")
    assert main(["bench", "train", *FLAGS, "--output", str(output)]) == 2
    assert "already has bench_train.json" in capsys.readouterr().err


def test_generation_report_is_arithmetic_on_what_was_measured():
    quick = {"batch_size": 2, "rounds": 2, "tokens": 4, "num_threads": 1}
    report = benchmark_generation("qwen3-0.6b", **TINY, **quick, num_key_value_heads=2)
    rows = {row["name"]: row for row in report["rows"]}
    assert rows.keys() - {INT8} == {OURS, PLAIN, "Qwen3ForCausalLM"}
    assert (INT8 in rows) == multiplies_exactly()
    assert rows["Qwen3ForCausalLM"]["same_tokens"] == 1  # the same weights
    for row in rows.values():
        [(length, seconds)] = row["seconds_per_token"].items()
        speed = row["tokens_per_second"][length]
        assert length == 16 and speed == pytest.approx(2 / median(seconds))
        ratios = [a / b for a, b in zip(rows[OURS]["seconds_per_token"][16], seconds, strict=True)]
        assert row["speed_to_ours"] == pytest.approx([min(ratios), median(ratios), max(ratios)])
        assert row["name"] in format_generation(report)
    config = load_preset("qwen3-0.6b", **TINY, num_key_value_heads=2)
    model = NanoGPTForCausalLM(config)
    weights = 4 * model.num_parameters()  # the tied table is read as the head
    cache = 4 * 2 * 1 * 2 * config.head_dim * 16 * 2
    share = (weights + cache) * rows[OURS]["tokens_per_second"][16] / 2
    share /= report["bytes_per_second"]
    assert rows[OURS]["bandwidth_share"][16] == pytest.approx(share)


def test_random_weights_of_a_preset_generate_more_than_one_token():
    model = _load("nano", TINY).eval()
    assert model(torch.arange(1, 15)[None]).logits.std() > 0.01


def test_command_measures_generation_of_a_checkpoint(tmp_path, capsys):
    folder, output = tmp_path / "model", tmp_path / "bench"
    tiny_model("nano").save_pretrained(folder)
    argv = ["bench", "generate", str(folder), "--rounds=1", "--tokens=2", "--output", str(output)]
    assert main([*argv[:3], "--n_embd=16"]) == 2 and "own sizes" in capsys.readouterr().err
    assert main(argv) == 0 and "Qwen3ForCausalLM" in capsys.readouterr().out
    assert {path.suffix for path in output.iterdir()} == {".json", ".png"}


def test_bad_input_is_one_sentence(tmp_path, capsys):
    cases = {
        ("trian",): "choose one of train",
        ("train", "gpt-2"): "gpt2",
        ("train", str(tmp_path)): "not a checkpoint folder",
        ("train", "--rounds=0"): "rounds=0",
        ("train", "--steps=0"): "steps=0",
        ("train", "--batch_size=-1"): "batch_size=-1",
        ("train", "--num_threads=0"): "num_threads=0",
        ("train", "--n_embd=65"): "n_embd)=65",
        ("train", "--n_layers=2"): "--n_layer?",
        ("train", "--output", __file__): "output=",
        ("generate", "gpt-2"): "gpt2",
        ("generate", "--tokens=0"): "tokens=0",
        ("generate", "gpt2", "--n_layer=1", "--block_size=8", "--tokens=7"): "6 or fewer",
    }
    for argv, message in cases.items():
        assert main(["bench", *argv]) == 2
        assert message in capsys.readouterr().err, argv
    assert main(["bench"]) == 0 and "train" in capsys.readouterr().out
