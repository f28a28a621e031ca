"""What `train` chooses for a text when no recipe is named: from its size, its script, the flags."""

import filecmp
import gzip
import json
import random
import re
import shutil
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import yaml
from conftest import CORPUS

from hf_nanogpt import train, train_tokenizer
from hf_nanogpt.checkpoint.writing import check_output_dir, clear_output_dir
from hf_nanogpt.cli import main
from hf_nanogpt.cli.last_screen import render_last_screen
from hf_nanogpt.data.corpus import prepare_tokenizer
from hf_nanogpt.data.documents import DataArguments, load_documents
from hf_nanogpt.data.packing import tokenize_documents
from hf_nanogpt.data.stored import prepare_data
from hf_nanogpt.data.tokenization import make_tokenizer
from hf_nanogpt.errors import UserError
from hf_nanogpt.hub.staging import Release, stage_step
from hf_nanogpt.training.arguments import parse_settings, read_flags
from hf_nanogpt.training.choosing import choose_recipe, settle_recipe, store_recipe
from hf_nanogpt.training.looking import Text, look_at
from hf_nanogpt.training.origins import explain_settings
from hf_nanogpt.training.preparing import make_config
from hf_nanogpt.training.recipes import Choice, as_flags

TINY = {
    "n_layer": 1,
    "n_embd": 16,
    "n_head": 2,
    "block_size": 16,
    "max_steps": 2,
    "per_device_train_batch_size": 2,
    "sample_steps": 0,
    "disable_tqdm": True,
    "num_threads": 1,
    "use_cpu": True,
}
RNG = random.Random(0)
# About 1,300 different characters, each of three bytes.
CHINESE = "".join(chr(0x4E00 + int(RNG.expovariate(1 / 300))) for _ in range(20_000))


def english(num_bytes: int) -> Text:
    return Text(num_bytes, bytes_per_character=1.0, num_characters=65, num_words=num_bytes // 50)


def settings_of(text: Text, **typed) -> dict:
    """Return the settings of a training on such a text, with those that are typed."""
    flags = as_flags(typed | {"use_cpu": True})
    data, architecture, args = parse_settings(choose_recipe(text, flags), flags)
    config = make_config(architecture, vocab_size=data.vocab_size)
    return vars(data) | vars(args) | config.to_dict()


def write_chats(path: Path, count: int, words: int = 5) -> Path:
    said = [" ".join(RNG.choices(CORPUS.split(), k=words)) for _ in range(2 * count)]
    roles = ("user", "assistant")
    chats = (
        [{"role": role, "content": said[2 * i + k]} for k, role in enumerate(roles)]
        for i in range(count)
    )
    path.write_text("".join(json.dumps({"messages": chat}) + "\n" for chat in chats))
    return path


def passes_of(chosen: dict, text: Text) -> float:
    tokens = chosen["max_steps"] * chosen["per_device_train_batch_size"]
    return tokens * chosen["max_position_embeddings"] / (0.9 * text.num_bytes)


@pytest.mark.parametrize("size", [20_000, 50_000, 200_000])
def test_a_short_text_gets_characters_and_dropout_that_grows_with_the_passes(size):
    chosen = settings_of(english(size))
    assert chosen["tokenizer"] == "char" and chosen["validation_fraction"] == 0.1
    passes = passes_of(chosen, english(size))
    lowest, highest = {20_000: (30, 40), 50_000: (30, 45), 200_000: (6, 12)}[size]
    assert lowest < passes < highest
    # Measured on texts of these sizes.
    best = {20_000: (0.3, 0.4), 50_000: (0.3, 0.4), 200_000: (0.05, 0.1)}[size]
    assert best[0] <= chosen["dropout"] <= best[1]


def test_a_megabyte_gets_a_small_bpe_and_fewer_than_four_passes():
    chosen = settings_of(english(1_000_000))
    assert (chosen["tokenizer"], chosen["vocab_size"], chosen["dropout"]) == ("bpe", 1024, 0)
    assert 2.3 * passes_of(chosen, english(1_000_000)) < 4  # a token has about 2.3 bytes


def test_a_long_text_gets_the_quickstarts_settings_and_holds_out_half_a_megabyte():
    data, architecture, args = parse_settings("quickstart", use_cpu=True)
    quickstart = vars(data) | vars(args) | make_config(architecture, vocab_size=2048).to_dict()
    for size, fraction in ((3_000_000, 0.1), (10_000_000, 0.05), (1_000_000_000, 0.0005)):
        chosen = settings_of(english(size))
        names = ("tokenizer", "vocab_size", "hidden_size", "num_attention_heads", "max_steps")
        names += ("max_position_embeddings", "per_device_train_batch_size", "dropout")
        assert {n: chosen[n] for n in names} == {n: quickstart[n] for n in names}
        assert chosen["validation_fraction"] == fraction


@pytest.mark.parametrize(
    ("num_bytes", "characters", "vocab_size", "steps"),
    [(50_000, 1354, 1610, 105), (200_000, 2353, 2609, 205), (1_000_000, 3468, 3724, 465)],
)
def test_a_script_of_many_characters_gets_tokens_for_all_and_few_passes(
    num_bytes, characters, vocab_size, steps
):
    sections = choose_recipe(Text(num_bytes, 3.0, characters, 10_000, 0, characters)).sections
    chosen = {name: value for part in sections.values() for name, value in part.items()}
    assert (chosen["tokenizer"], chosen["vocab_size"]) == ("bpe", vocab_size)
    assert chosen["max_steps"] == steps and chosen["dropout"] <= 0.15
    assert chosen["head_learning_rate"] == 0.003


def test_a_script_of_many_characters_gets_a_bpe_that_the_text_can_give(tmp_path):
    path = tmp_path / "chinese.txt"
    path.write_text(CHINESE, encoding="utf-8")
    text = look_at(DataArguments(data=str(path)))
    most = sorted(Counter(CHINESE).values(), reverse=True)
    common = next(n for n in range(len(most)) if sum(most[:n]) >= 0.99 * len(CHINESE))
    assert text == Text(60_000, 3.0, len(set(CHINESE)), 1, 0, common)
    assert text.num_characters > 1000
    chosen = settings_of(text)
    assert chosen["tokenizer"] == "bpe"
    made = train_tokenizer([CHINESE], kind="bpe", vocab_size=chosen["vocab_size"])
    assert len(made) == chosen["vocab_size"]


def test_the_size_of_a_compressed_text_is_that_of_the_text(tmp_path):
    path = tmp_path / "text.txt.gz"
    text = (CORPUS * (1 + 6_000_000 // len(CORPUS)))[:6_000_000].encode()
    path.write_bytes(gzip.compress(text, compresslevel=1))
    assert look_at(DataArguments(data=str(path))).num_bytes == len(text)


def test_the_size_of_a_table_is_that_of_its_text_not_of_its_other_columns(tmp_path):
    path, text = tmp_path / "rows.jsonl", CORPUS[:10_000]
    row = json.dumps({"text": text, "other": [0.123456789] * 5_000})
    path.write_text(f"{row}\n" * 600)
    found = look_at(DataArguments(data=str(path)))
    assert found.num_bytes == pytest.approx(600 * len(text.encode()), rel=0.02)


def test_the_size_of_a_table_is_that_of_its_text_not_of_its_compressed_file(tmp_path):
    text, path = CORPUS[:10_000], tmp_path / "rows.jsonl.gz"
    row = json.dumps({"text": text, "other": "x" * 10_000})
    path.write_bytes(gzip.compress(f"{row}\n".encode() * 600, compresslevel=1))
    found = look_at(DataArguments(data=str(path)))
    assert found and found.num_bytes == pytest.approx(600 * len(text.encode()), rel=0.02)
    assert settings_of(found)["validation_fraction"] == 0.08


def test_rare_signs_do_not_make_a_script_of_many_characters(tmp_path):
    path = tmp_path / "text.txt"
    signs = "".join(map(chr, range(0x4E00, 0x4E00 + 400)))
    path.write_text((CORPUS * 10)[:49_000] + signs, encoding="utf-8")
    found = look_at(DataArguments(data=str(path)))
    assert found and found.num_characters > 400 > found.num_common
    chosen = settings_of(found)
    plain = settings_of(english(50_000))
    for name in ("tokenizer", "max_steps", "dropout", "hidden_size"):
        assert chosen[name] == plain[name]


@pytest.mark.parametrize("text", ["yes no\n", "ACGTTGCA"])
def test_a_long_text_of_too_few_words_for_a_bpe_gets_characters(tmp_path, text):
    path = tmp_path / "text.txt"
    path.write_text(text * (5_000_000 // len(text)), encoding="utf-8")
    found = look_at(DataArguments(data=str(path)))
    assert found and found.num_bytes >= 4_999_990
    assert settings_of(found)["tokenizer"] == "char"


def test_typed_settings_stay_and_the_others_follow_them():
    text = english(50_000)
    assert settings_of(text, max_steps=10)["dropout"] == 0
    assert settings_of(text, num_train_epochs=30)["max_steps"] == -1  # Trainer prefers it
    assert settings_of(text, min_train_tokens=5_000_000)["dropout"] == 0.4
    assert settings_of(text, num_train_epochs=30)["dropout"] == 0.35
    assert settings_of(text, dropout=0.5, tokenizer="byte")["dropout"] == 0.5
    assert settings_of(text)["attention_dropout"] == 0
    assert settings_of(text, dropout=0.5)["attention_dropout"] is None  # everywhere, as is typed
    assert settings_of(text, max_steps=10)["attention_dropout"] is None
    for typed in ({"n_embd": 96}, {"n_embd": 50}, {"n_head": 3}, {"n_head": 6}, {"n_embd": 8}):
        chosen = settings_of(text, **typed)
        assert chosen["hidden_size"] % (2 * chosen["num_attention_heads"]) == 0
        assert typed.get("n_embd", chosen["hidden_size"]) == chosen["hidden_size"]
        assert typed.get("n_head", chosen["num_attention_heads"]) == chosen["num_attention_heads"]
    gpt2 = settings_of(text, preset="gpt2", tokenizer="char")
    assert (gpt2["num_hidden_layers"], gpt2["hidden_size"], gpt2["dropout"]) == (12, 768, 0.1)
    assert gpt2["attention_dropout"] is None
    assert (
        "validation_fraction" not in choose_recipe(text, ["--validation_data=x"]).sections["data"]
    )


def test_what_is_typed_decides_the_passes_and_the_tokenizer(monkeypatch):
    text = english(50_000)
    assert settings_of(text, vocab_size=1000)["tokenizer"] == "bpe"
    assert settings_of(text, vocab_size=1000, tokenizer="char")["tokenizer"] == "char"
    full, quarter = (settings_of(text, context_length=n)["dropout"] for n in (128, 32))
    assert (full, quarter) == (0.4, 0.1)
    # Nothing is held out of a text that has another one to validate on.
    both = choose_recipe(text, ["--validation_data=x", "--validation_fraction=0.5"])
    assert both.sections["training"]["max_steps"] == 900 and both.reasons[0].startswith(
        "tokenizer char: 50 kB"
    )
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert choose_recipe(text, ["--context_length=32"]).sections["model"]["dropout"] == 0.25
    monkeypatch.delenv("WORLD_SIZE")
    # GPT-1 has a context of 512, twice as long as what is chosen.
    chinese = Text(300_000, 3.0, 2500, 10_000, 0, 2000)
    steps, _ = (settings_of(chinese, preset=name)["max_steps"] for name in ("gpt1", "gpt2"))
    assert steps == pytest.approx(settings_of(chinese)["max_steps"] / 2, abs=10)


def test_three_lines_say_what_was_chosen_and_why():
    lines = choose_recipe(english(50_000)).reasons
    assert len(lines) == 3
    assert re.fullmatch("tokenizer char: 45 kB to train on, with 65 different characters", lines[0])
    assert "max_steps" in lines[1] and re.search(r"dropout 0\.\d+: .* by heart", lines[2])
    for setting in ("tokenizer=byte", "dropout=0.1", "preset=gpt2"):  # what is typed is not chosen
        name = setting.partition("=")[0]
        assert not any(
            name in line for line in choose_recipe(english(50_000), [f"--{setting}"]).reasons
        )


def test_a_run_stores_what_was_chosen_and_resumes_with_it(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("my text.txt").write_text(CORPUS, encoding="utf-8")
    quiet = {name: TINY[name] for name in TINY if name not in ("n_layer", "disable_tqdm")}
    result = train(data="my text.txt", n_layer=1, **quiet)
    assert result.output_dir == Path("runs/my-text")
    assert re.search(r"^chosen +tokenizer char: 10\.\d kB", capsys.readouterr().out, re.MULTILINE)
    assert result.metrics["recipe"] == "chosen from the corpus"
    assert result.metrics["command"][:3] == ["hf-nanogpt", "train", "--data=my text.txt"]
    stored = yaml.safe_load(Path("runs/my-text/chosen_recipe.yaml").read_text())
    assert stored["data"] == {"tokenizer": "char", "vocab_size": 512, "validation_fraction": 0.1}
    # The folder's recipe is one, and resuming does not choose again.
    assert parse_settings("runs/my-text/chosen_recipe.yaml", use_cpu=True)[0].tokenizer == "char"
    stored["model"]["dropout"] = 0.15
    Path("runs/my-text/chosen_recipe.yaml").write_text(yaml.safe_dump(stored))
    flags = as_flags({"data": "my text.txt"})
    again = settle_recipe(None, flags, resume=True)
    assert again.sections["model"]["dropout"] == 0.15
    assert again.sections["training"]["output_dir"] == "runs/my-text"
    assert settle_recipe(None, flags).sections["model"]["dropout"] == 0.4
    # A checkpoint alone, as it is copied or pushed, has what was chosen too.
    last = max(Path("runs/my-text").glob("checkpoint-*"))
    shutil.copytree(last, Path("copied", last.name))
    alone = settle_recipe(None, [*flags, "--output_dir=copied"], resume=True)
    assert alone.sections["data"] == again.sections["data"]
    assert alone.sections["model"] == again.sections["model"] | {"dropout": 0.0}  # as it was chosen
    (staged := Path("staged")).mkdir()
    stage_step(last, Release(staged, "user/gpt", branch="x"), 1)
    assert filecmp.cmp(last / "chosen_recipe.yaml", "staged/chosen_recipe.yaml", shallow=False)
    with pytest.raises(UserError, match=r"output_dir=copied .* another text"):
        settle_recipe(None, ["--output_dir=copied"], resume=True)
    # Whoever wrote it can set only what is chosen.
    stored["training"] |= {"push_to_hub": True, "hub_model_id": "somebody/else"}
    Path("copied", last.name, "chosen_recipe.yaml").write_text(yaml.safe_dump(stored))
    with pytest.raises(UserError, match="sets hub_model_id, push_to_hub to a value that"):
        settle_recipe(None, [*flags, "--output_dir=copied"], resume=True)
    # A named recipe takes the place of the stored one.
    train(
        "quickstart",
        data="my text.txt",
        output_dir="runs/my-text",
        overwrite=True,
        tokenizer="byte",
        n_layer=1,
        **quiet,
    )
    assert not Path("runs/my-text/chosen_recipe.yaml").exists()


def test_a_stored_recipe_cannot_hide_flags_in_a_list(tmp_path):
    (step := tmp_path / "checkpoint-5").mkdir()
    for value in ("[4, '--push_to_hub=true', '--hub_model_id=somebody/else']", "{a: 4}", "null"):
        (step / "chosen_recipe.yaml").write_text(f"model: {{n_layer: {value}}}")
        with pytest.raises(UserError, match="sets n_layer to a value that is never chosen"):
            settle_recipe(None, ["--data=x/y", f"--output_dir={tmp_path}"], resume=True)
    (step / "chosen_recipe.yaml").write_text("model: {1: 4, a: 4}")
    with pytest.raises(UserError, match="sets 1, a to a value"):
        settle_recipe(None, ["--data=x/y", f"--output_dir={tmp_path}"], resume=True)


def test_a_stored_recipe_that_is_named_to_resume_is_kept(tmp_path):
    for content in ("model: {n_layer: 2}", "model: {n_layer: 3}"):
        (path := tmp_path / "chosen_recipe.yaml").write_text(content)
        store_recipe(path, tmp_path)
        assert path.read_text() == content
    store_recipe("quickstart", tmp_path)
    assert not path.exists()


def test_show_with_resume_prints_the_stored_settings(tmp_path, capsys):
    (path := tmp_path / "my.txt").write_text(CORPUS, encoding="utf-8")
    (folder := tmp_path / "run").mkdir()
    (folder / "chosen_recipe.yaml").write_text("model: {dropout: 0.123}")
    for resume, dropout in ((["--resume"], "0.123"), ([], "0.4")):
        flags = [f"--data={path}", f"--output_dir={folder}", "--use_cpu", *resume]
        assert main(["train", "--show", *flags]) == 0
        told = capsys.readouterr().out
        assert re.search(r"^  dropout +(\S+)", told, re.MULTILINE)[1] == dropout
        assert ("\nchosen from the corpus:\n" in told) == (not resume)


def test_the_size_of_the_whole_does_not_stretch_its_conversations(tmp_path, monkeypatch):
    path = write_chats(tmp_path / "chats.jsonl", 1_000, 15)
    size = path.stat().st_size
    whole = look_at(DataArguments(data=str(path)))
    monkeypatch.setattr("hf_nanogpt.training.looking._LOOK", size // 20)
    start = look_at(DataArguments(data=str(path)))
    assert start.num_bytes == pytest.approx(whole.num_bytes, rel=0.2)
    assert start.bytes_per_character == whole.bytes_per_character == 1.0  # as in ASCII
    assert choose_recipe(start).sections["model"]["block_size"] == 256


def test_reasons_name_the_vocabulary_only_of_a_bpe():
    char = choose_recipe(english(5_000_000), ["--tokenizer=char"]).reasons
    assert not any("vocab_size" in line for line in char)
    bpe = choose_recipe(english(50_000), ["--tokenizer=bpe"]).reasons
    assert bpe[0].startswith("vocab_size 512: ")


def test_a_recipe_of_the_user_in_the_output_folder_stays(tmp_path):
    text, folder = tmp_path / "text.txt", tmp_path / "run"
    text.write_text(CORPUS, encoding="utf-8")
    folder.mkdir()
    mine = folder / "recipe.yaml"
    mine.write_text("data: {tokenizer: char}")
    choice = settle_recipe(None, [f"--data={text}", f"--output_dir={folder}"])
    for recipe in (mine, choice):
        store_recipe(recipe, folder)
        assert mine.read_text() == "data: {tokenizer: char}"
    with pytest.raises(UserError, match=r"files that no training wrote \(recipe.yaml\)"):
        check_output_dir(folder, overwrite=True)


def test_overwriting_a_run_keeps_the_recipe_that_is_given(tmp_path):
    recipe = tmp_path / "chosen_recipe.yaml"
    recipe.write_text("data: {tokenizer: char}")
    (tmp_path / "model.safetensors").touch()
    clear_output_dir(tmp_path, str(recipe))
    store_recipe(recipe, tmp_path)
    assert recipe.read_text() == "data: {tokenizer: char}" and len(list(tmp_path.iterdir())) == 1
    store_recipe("quickstart", tmp_path)  # which is another one
    assert not recipe.exists()


def test_overwriting_a_run_replaces_its_choice_though_all_is_typed(tmp_path):
    recipe = tmp_path / "chosen_recipe.yaml"
    recipe.write_text("data: {tokenizer: byte}")
    choice = Choice({"data": {"tokenizer": "char"}, "training": {}})  # without a reason to say
    clear_output_dir(tmp_path, str(choice))
    store_recipe(choice, tmp_path)
    assert "tokenizer: char" in recipe.read_text()


def test_settings_are_checked_against_the_chosen_ones_not_against_the_quickstarts(tmp_path):
    path = tmp_path / "my.txt"
    path.write_text(CORPUS, encoding="utf-8")
    # The quickstart evaluates every 140 steps and saves every 350, which would not go together.
    flags = [f"--data={path}", "--load_best_model_at_end", "--use_cpu"]
    _, _, args = parse_settings(settle_recipe(None, flags), flags)
    assert args.load_best_model_at_end and (args.eval_steps, args.save_steps) == (0.1, 0.2)


def test_max_steps_of_minus_1_leaves_the_length_to_the_epochs():
    # The default of `TrainingArguments` is 3 epochs.
    for epochs, dropout in ((30, 0.35), (3, 0.0)):
        flags = ["--max_steps=-1", f"--num_train_epochs={epochs}"]
        choice = choose_recipe(english(50_000), flags)
        assert choice.sections["model"]["dropout"] == dropout
        assert ("by heart" in choice.reasons[-1]) == (epochs == 30)
    assert "a few times" in choose_recipe(english(50_000), ["--max_steps=-1"]).reasons[-1]


def test_nothing_is_chosen_for_other_sources_and_named_recipes(tmp_path):
    (tmp_path / "rows.jsonl").write_text('{"text": "a"}\n{"text": "b"}\n' * 30)
    rows = f"--data={tmp_path / 'rows.jsonl'}"
    assert settle_recipe(None, []) == settle_recipe(None, ["--data=python-stdlib"]) == "quickstart"
    assert settle_recipe(None, [rows, "--streaming=True", "--max_steps=1"]) == "quickstart"
    assert settle_recipe("finetune", [rows]) == "finetune"
    assert settle_recipe(None, [rows]).sections["data"]["tokenizer"] == "char"


def test_conversations_get_a_template_characters_and_blocks_that_hold_one(tmp_path):
    for count, words, block_size in ((30, 5, 128), (30, 40, 1024), (500, 15, 256)):
        path = write_chats(tmp_path / f"{count}-{words}.jsonl", count, words)
        flags = [f"--data={path}", f"--output_dir={tmp_path / path.stem}", "--use_cpu"]
        choice = settle_recipe(None, flags)
        data, architecture, args = parse_settings(choice, flags)
        assert (data.tokenizer, data.chat_template) == ("char", "chatml")
        assert architecture["max_position_embeddings"] == block_size
        assert block_size * args.per_device_train_batch_size == 128 * 16
        # The tokens of the longest but a tenth fit, with eos in front and the first of the next.
        corpus = prepare_data(data)
        tokenizer = prepare_tokenizer(data, corpus)
        rows = tokenize_documents(corpus.train, tokenizer).rows
        lengths = [len(ids) for ids in rows["input_ids"]]
        assert block_size / 2 < np.quantile(lengths, 0.9) < block_size
        assert re.match(
            r"tokenizer char, chat_template chatml: .* kB of conversations", choice.reasons[0]
        )
    named = settle_recipe(None, [*flags, "--tokenizer=gpt2"]).sections["data"]
    assert "chat_template" not in named  # the tokenizer brings its own
    assert settings_of(Text(9_000_000, 1.0, 90, 50_000, 200))["tokenizer"] == "bpe"


@pytest.mark.slow
def test_conversations_alone_train_a_model_that_answers(tmp_path):
    path = write_chats(tmp_path / "chats.jsonl", 30)
    settings = {name: TINY[name] for name in ("max_steps", "num_threads", "use_cpu")}
    result = train(data=str(path), output_dir=str(tmp_path / "run"), n_layer=1, **settings)
    metrics = result.metrics
    assert metrics["is_chat"] and metrics["learnt_answers"]
    answers = [sample.removeprefix(result.prompt) for sample in metrics["samples"]]
    assert all(answers) and answers != metrics["samples"]
    role, said, *_, last = result.question.splitlines()
    assert (role, last) == ("user", "assistant") and said in path.read_text()
    screen = render_last_screen(result, "hf-nanogpt")
    assert "in answer to:\n  > user\n" in screen and "<|im_end|>" not in screen.split("Next:")[0]


@pytest.mark.parametrize(("times", "kind"), [(1, "char"), (5, "char"), (7, "bpe")])
def test_a_short_text_of_rare_characters_gets_no_bpe(tmp_path, times, kind):
    characters = [chr(0xAC00 + i) for i in range(450)] * times
    RNG.shuffle(characters)
    path = tmp_path / "text.txt"
    path.write_text("".join(characters), encoding="utf-8")
    chosen = settings_of(look_at(DataArguments(data=str(path))))
    assert chosen["tokenizer"] == kind
    train_tokenizer(["".join(characters)], kind=kind, vocab_size=chosen["vocab_size"])


def test_the_corpus_is_an_origin_of_settings(tmp_path):
    path = tmp_path / "my.txt"
    path.write_text(CORPUS, encoding="utf-8")
    flags = [f"--data={path}", "--n_layer=2", "--use_cpu"]
    shown = {s.name: (s.value, s.origin) for s in explain_settings(None, flags)}
    assert shown["tokenizer"] == ("char", "chosen from the corpus")
    assert shown["hidden_size"] == (128, "chosen from the corpus")
    assert shown["output_dir"] == ("runs/my", "chosen from the corpus")
    assert shown["num_hidden_layers"] == (2, "flag")
    assert shown["streaming"] == (False, "default")
    assert {"use_cpu", "dropout"} <= shown.keys() and read_flags(flags).keys() <= shown.keys()
    # Only a BPE has a size that is asked for.
    for tokenizer, has_size in (("char", False), ("byte", False), ("bpe", True)):
        shown = {s.name for s in explain_settings(None, [*flags, f"--tokenizer={tokenizer}"])}
        assert ("vocab_size" in shown) == has_size
    tuned = {s.name for s in explain_settings("finetune", flags[:1], start_from="somewhere")}
    assert not tuned & {"tokenizer", "vocab_size"} and "validation_fraction" in tuned


def test_show_prints_the_reasons(tmp_path, capsys):
    path = tmp_path / "my.txt"
    path.write_text(CORPUS, encoding="utf-8")
    assert main(["train", "--show", f"--data={path}"]) == 0
    _, _, told = capsys.readouterr().out.partition("\nchosen from the corpus:\n")
    assert told.splitlines() == [
        f"  {reason}" for reason in settle_recipe(None, [f"--data={path}"]).reasons
    ]
    assert len(told.splitlines()) == 3


def test_tables_with_other_columns_are_refused_in_a_sentence(tmp_path):
    (tmp_path / "1.csv").write_text("a,text\n1,hello there\n")
    (tmp_path / "2.csv").write_text("b,body\n1,other\n")
    with pytest.raises(UserError, match=r"text_column='text' is not in .*2.csv"):
        settle_recipe(None, [f"--data={tmp_path}"])


@pytest.mark.parametrize("between", ["", " ", "\n"])
def test_a_chosen_bpe_takes_the_tokens_that_the_text_can_give(tmp_path, between):
    path = tmp_path / "text.txt"
    text = between.join(CHINESE)
    path.write_text(text, encoding="utf-8")
    flags = [f"--data={path}", "--validation_fraction=0.5"]
    chosen = settle_recipe(None, flags)
    data, _, _ = parse_settings(chosen, flags)
    assert (data.tokenizer, data.vocab_size) == ("bpe", 256 + len(set(text)))
    assert 1000 < len(make_tokenizer(data, load_documents(data)[0])) <= data.vocab_size
    # One that is typed is what the person gets.
    typed, _, _ = parse_settings(chosen, [*flags, "--vocab_size=9000"])
    with pytest.raises(UserError, match="not vocab_size=9000"):
        make_tokenizer(typed, load_documents(typed)[0])


def test_a_script_of_many_characters_gets_a_context_of_256_and_at_least_25_steps():
    chinese = Text(50_000, 3.0, 1354, 10_000, 0, 1354)
    assert settings_of(chinese)["max_position_embeddings"] == 256
    assert settings_of(chinese)["per_device_train_batch_size"] == 8
    assert settings_of(chinese, max_position_embeddings=2048)["max_steps"] == 25
    assert choose_recipe(chinese, ["--block_size=0"])  # which is refused later, by name


def test_only_a_text_that_is_gone_over_gets_a_slow_head():
    def is_slow(num_bytes: int, *flags: str) -> bool:
        text = Text(num_bytes, 3.0, 4000, 10_000, 0, 4000)
        return "head_learning_rate" in choose_recipe(text, flags).sections["training"]

    assert is_slow(1_000_000) and is_slow(10_000_000, "--max_steps=2000")
    assert not is_slow(10_000_000) and not is_slow(1_000_000, "--max_steps=100")
