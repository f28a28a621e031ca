"""The recipes that come with the package: each is readable, complete and does what it says."""

import pytest
from conftest import ROOT
from transformers import TrainingArguments

from hf_nanogpt import (
    NanoGPTForCausalLM,
    build_optimizer,
    list_recipes,
    load_preset,
    train,
    train_tokenizer,
)
from hf_nanogpt.errors import UserError
from hf_nanogpt.presets import PRESETS
from hf_nanogpt.training.arguments import parse_settings
from hf_nanogpt.training.optim import OPTIM_DEFAULTS
from hf_nanogpt.training.origins import explain_settings
from hf_nanogpt.training.preparing import make_config, prepare_config, prepare_model

RECIPES = ROOT / "hf_nanogpt" / "recipes"


@pytest.mark.parametrize("name", list_recipes())
def test_each_recipe_parses_and_says_what_it_costs(name, tmp_path):
    data, architecture, args = parse_settings(name, output_dir=str(tmp_path), use_cpu=True)
    make_config(architecture, vocab_size=data.vocab_size)
    header = (RECIPES / f"{name}.yaml").read_text(encoding="utf-8").split("data:")[0]
    lines = header.splitlines()
    assert len(lines) >= 2 and all(line.startswith("# ") for line in lines)
    assert args.num_train_epochs == 1 or args.max_steps > 0


def test_an_impossible_architecture_is_refused_before_the_data_is_read(tmp_path):
    with pytest.raises(UserError, match=r"hidden_size .n_embd.=10 must be a multiple of"):
        train("quickstart", data="none.txt", output_dir=str(tmp_path / "a"), n_embd=10, n_head=3)
    with pytest.raises(UserError, match=r"none\.txt"):
        train("quickstart", data="none.txt", output_dir=str(tmp_path / "a"), n_embd=12, n_head=3)


def test_the_tokenizer_completes_the_configuration_that_was_made_before_the_data(tmp_path):
    settings = {"preset": "gpt2", "n_layer": 1, "n_embd": 16, "n_head": 2, "block_size": 32}
    settings |= {"output_dir": str(tmp_path), "use_cpu": True}
    data, architecture, args = parse_settings("quickstart", **settings)
    config, length = prepare_config(architecture, data, None)
    assert (config.vocab_size, config.eos_token_id, length) == (data.vocab_size, None, 32)
    tokenizer = train_tokenizer([], kind="byte")
    model = prepare_model(config, data, args, tokenizer, None)
    assert model.config is config
    ids = {name: getattr(config, name) for name in ("eos_token_id", "bos_token_id", "pad_token_id")}
    assert ids == {name: getattr(tokenizer, name) for name in ids}
    assert model.lm_head.weight.shape == (257, 16)
    assert model.generation_config.eos_token_id == tokenizer.eos_token_id


def test_a_plain_no_in_yaml_is_the_strategy_and_of_other_settings_false(tmp_path):
    path = tmp_path / "mine.yaml"
    names = ("eval_strategy", "logging_strategy", "save_strategy")
    path.write_text(f"training: {{{': no, '.join(names)}: no, push_to_hub: no, keep_best: no}}")
    _, _, args = parse_settings(path, use_cpu=True)
    assert {str(getattr(args, name).value) for name in names} == {"no"}
    assert args.push_to_hub is args.keep_best is False


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("training:\n  seed: 1\n  max_steps: 2\n  seed: 3\n", r"'seed' is there twice.*line 4,"),
        ("data: {}\nmodel: {}\ndata: {}\n", r"'data' is there twice.*line 3,"),
        ('{"training": {"seed": 1,\n "seed": 2}}', r"'seed' is there twice.*line 2,"),
        ("model: {rope_parameters: {a: 1,\n a: 2}}", r"'a' is there twice.*line 2,"),
        ("data: {seed: 1}\ntraining: {seed: 2}", r"one setting twice \(seed, seed\)"),
        ("model: {n_embd: 8, hidden_size: 16}", r"twice \(n_embd, hidden_size\)"),
    ],
)
def test_a_setting_that_is_there_twice_is_refused(text, words, tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text(text)
    with pytest.raises(UserError, match=words):
        parse_settings(path, use_cpu=True)


def test_the_peer_is_nanogpts_configuration():
    _, architecture, args = parse_settings("nanogpt_char")
    config = make_config(architecture, vocab_size=65)
    model = NanoGPTForCausalLM(config)
    # nanoGPT counts 0.80 M at 65 characters: 4 x 12 x 128^2, the tables, and norms.
    norms = sum(p.numel() for name, p in model.named_parameters() if "norm" in name)
    assert norms == 2 * 9 * 128
    assert model.num_parameters() - norms == 4 * 12 * 128**2 + (65 + 64) * 128
    biases = [n for n, _ in model.named_parameters() if n.endswith("bias") and "norm" not in n]
    assert not biases and config.tie_word_embeddings and config.hidden_act == "gelu"
    [matrices, vectors] = build_optimizer(
        model, recipe="adamw", learning_rate=args.learning_rate, weight_decay=args.weight_decay
    ).param_groups
    assert (matrices["weight_decay"], vectors["weight_decay"]) == (0.1, 0.0)
    assert (args.adam_beta1, args.adam_beta2, args.max_grad_norm) == (0.9, 0.99, 1.0)
    assert args.max_steps * args.per_device_train_batch_size * 64 == 1_536_000


def test_our_recipe_for_shakespeare_takes_an_eighth_of_the_peers_tokens():
    ours, peer = (parse_settings(name)[2] for name in ("shakespeare_char", "nanogpt_char"))
    assert ours.per_device_train_batch_size == peer.per_device_train_batch_size
    assert 8 * ours.max_steps <= peer.max_steps


def test_one_gpu_takes_the_batches_of_eight_and_at_most_1_7_billion_tokens():
    tokens = {}
    for name, processes in (("gpt2_124m", 8), ("gpt2_124m_one_gpu", 1)):
        _, architecture, args = parse_settings(name, use_cpu=True)
        rows = args.per_device_train_batch_size * args.gradient_accumulation_steps * processes
        tokens[name] = rows * architecture["max_position_embeddings"]
    assert tokens == dict.fromkeys(tokens, 2**19)
    assert 1.69e9 < 2**19 * args.max_steps <= 1.7e9


@pytest.mark.parametrize("recipe", ["quickstart", "nanogpt_char", "finetune"])
@pytest.mark.parametrize("preset", ["nano", "gpt2", "llama-7b"])
def test_a_typed_preset_wins_over_the_recipes_sizes_and_typed_sizes_stay(recipe, preset):
    for _, architecture, _ in (
        parse_settings(recipe, ["--preset", preset, "--n_layer=2"], use_cpu=True),
        parse_settings(recipe, ["--num-hidden-layers=2"], preset=preset, use_cpu=True),
    ):
        made = make_config(architecture, vocab_size=65).to_dict()
        # Its context is limited, see below.
        length = min(1024, load_preset(preset).max_position_embeddings)
        expected = load_preset(preset, n_layer=2, vocab_size=65, block_size=length)
        assert made == expected.to_dict()


def test_a_typed_setting_drops_those_of_the_recipe_that_would_hide_it(tmp_path):
    recipe = tmp_path / "mine.yaml"
    recipe.write_text("model: {attention_bias: true, mlp_bias: true, dropout: 0.3}\n")
    _, architecture, _ = parse_settings(recipe, bias=False, use_cpu=True)
    config = make_config(architecture, vocab_size=65)
    assert (config.attention_bias, config.mlp_bias, config.dropout) == (False, False, 0.3)
    args = parse_settings("quickstart", ["--num_train_epochs", "2"], use_cpu=True)[2]
    assert (args.num_train_epochs, args.max_steps) == (2, -1)  # Trainer prefers max_steps
    both = ["--num_train_epochs=2", "--max_steps=5"]
    assert parse_settings("quickstart", both, use_cpu=True)[2].max_steps == 5


def test_each_setting_is_shown_with_where_it_comes_from():
    flags = ["--preset", "gpt2", "--n_head=6", "--bias=False", "--learning_rate=1e-3", "--use_cpu"]
    shown = {s.name: (s.value, s.origin) for s in explain_settings("quickstart", flags)}
    assert shown["preset"] == ("gpt2", "flag")
    assert shown["num_attention_heads"] == (6, "flag")
    assert shown["attention_bias"] == shown["mlp_bias"] == (False, "flag")
    assert shown["num_hidden_layers"] == (12, "preset gpt2")
    assert shown["vocab_size"] == (2048, "recipe quickstart")
    assert shown["validation_documents"] == (200, "default")
    assert shown["learning_rate"] == (1e-3, "flag")
    assert shown["max_steps"] == (700, "recipe quickstart")
    assert "warmup_steps" not in shown and "adam_epsilon" not in shown  # as in TrainingArguments


def test_settings_of_an_adapter_are_shown_without_an_architecture():
    pytest.importorskip("peft")
    tuned = explain_settings("finetune", ["--use_cpu", "--lora"], start_from="runs/x")
    assert {s.group for s in tuned} == {"data", "training"}  # the checkpoint has the architecture
    [rate] = [s for s in tuned if s.name == "learning_rate"]
    assert (rate.value, rate.origin) == (2e-3, "recipe finetune")


def test_a_typed_optimizer_gets_its_own_rates_and_not_those_of_the_recipe(tmp_path):
    recipe = tmp_path / "mine.yaml"
    recipe.write_text(
        "training: {learning_rate: 0.05, weight_decay: 0.3, momentum_warmup_steps: 9, "
        "head_learning_rate: 0.002}"
    )

    def rates(*flags: str) -> tuple:
        args = parse_settings(recipe, flags, use_cpu=True)[2]
        shared = (args.learning_rate, args.weight_decay)
        return *shared, args.momentum_warmup_steps, args.head_learning_rate

    assert rates() == rates("--optim_recipe=muon") == (0.05, 0.3, 9, 0.002)
    adamw = OPTIM_DEFAULTS["adamw"]
    assert rates("--optim_recipe", "adamw") == (adamw.learning_rate, adamw.weight_decay, 0, None)
    assert rates("--optim=sgd") == (TrainingArguments.learning_rate, 0.0, 0, None)
    assert rates("--optim_recipe=adamw", "--learning_rate=0.002")[0] == 0.002
    # That of the head goes with that of the matrices.
    assert rates("--learning_rate=0.01") == (0.01, 0.3, 9, None)
    assert rates("--learning_rate=0.01", "--head_learning_rate=0.1") == (0.01, 0.3, 9, 0.1)
    recipe.write_text("training: {learning_rate: 0.05, optim_recipe: adamw}")
    assert rates("--optim_recipe=adamw")[0] == 0.05
    assert rates("--optim_recipe=muon")[0] == OPTIM_DEFAULTS["muon"].learning_rate


def test_typed_steps_win_over_a_recipe_that_counts_otherwise(tmp_path):
    recipe = tmp_path / "mine.yaml"
    names = ("eval", "save", "logging")
    recipe.write_text(
        "training: {eval_strategy: epoch, save_strategy: 'no', logging_strategy: epoch}"
    )
    for name in names:
        args = parse_settings(recipe, [f"--{name}_steps", "7"], use_cpu=True)[2]
        assert getattr(args, f"{name}_strategy") == "steps" and getattr(args, f"{name}_steps") == 7
        others = [getattr(args, f"{other}_strategy") for other in names if other != name]
        assert "steps" not in others
    args = parse_settings(recipe, ["--eval_steps=7", "--eval_strategy=no"], use_cpu=True)[2]
    assert args.eval_strategy == "no"


def test_settings_that_take_several_values_take_one_or_a_list(tmp_path):
    for name in (both := ["tensorboard", "trackio"]):
        pytest.importorskip(name, reason="pip install 'hf-nanogpt[track]'")
    recipe = tmp_path / "mine.yaml"
    recipe.write_text(
        "training: {report_to: [tensorboard, trackio], optim: galore_adamw, "
        "optim_target_modules: [a, b], include_for_metrics: [inputs], debug: [underflow_overflow]}"
    )
    args = parse_settings(recipe, use_cpu=True)[2]
    assert args.report_to == both and args.optim_target_modules == ["a", "b"]
    assert (args.include_for_metrics, args.debug) == (["inputs"], ["underflow_overflow"])
    assert parse_settings("quickstart", ["--report_to", *both])[2].report_to == both
    assert parse_settings("quickstart", report_to=both)[2].report_to == both
    assert parse_settings(recipe, ["--report_to=tensorboard"])[2].report_to == ["tensorboard"]
    args = parse_settings(recipe, ["--report_to=none", "--optim_target_modules=all-linear"])[2]
    assert args.report_to == [] and args.optim_target_modules == "all-linear"


@pytest.mark.parametrize("preset", PRESETS)
def test_the_context_of_a_preset_can_be_trained_unless_more_is_asked_for(preset, tmp_path):
    recipe = tmp_path / "mine.yaml"
    recipe.write_text("training: {max_steps: 1}")

    def context(*flags: str) -> int:
        _, architecture, _ = parse_settings(recipe, ["--preset", preset, *flags], use_cpu=True)
        return make_config(architecture).max_position_embeddings

    whole = load_preset(preset).max_position_embeddings
    assert context() == min(whole, 1024)
    assert context("--block_size=1500") == 1500
    assert context("--context_length=1500") == (1500 if whole > 1024 else whole)
