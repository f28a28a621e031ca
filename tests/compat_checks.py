"""What a checkpoint must do in an environment without hf_nanogpt; `compat.py` runs this file.

Run: python compat_checks.py FOLDER ..., with folders that `compat.make_reference` has written. It
prints one JSON object: for each folder and check, "ok" or what went wrong.
"""

import json
import sys
import tempfile
from pathlib import Path

import torch
import transformers
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, pipeline

FOREIGN = {"trust_remote_code": True}
LENGTH, NEW = 24, 12  # tokens of the prompt and of what follows
TOLERANCE = 1e-5
REFUSED = "refused by this release"
TEXT = "def main(self):\n    return 'é𝔘 £'  # 12"


def load(folder, auto_class=AutoModelForCausalLM):
    return auto_class.from_pretrained(folder, **FOREIGN).eval()


def generate(model, ids, **settings):
    """Return what follows `ids`: `NEW` tokens, greedy, unless the settings say otherwise."""
    settings = {"max_new_tokens": NEW, "min_new_tokens": NEW, "do_sample": False} | settings
    mask = settings.pop("attention_mask", torch.ones_like(ids))
    with torch.no_grad():
        tokens = model.generate(ids, attention_mask=mask, pad_token_id=0, **settings)
    return tokens[:, ids.shape[1] :]


def logits_of(model, ids, **given):
    with torch.no_grad():
        return model(ids, **given).logits


def near(found, expected):
    difference = (found.float() - expected.float()).abs().max().item()
    assert difference <= TOLERANCE, f"largest difference {difference:.2g}"


def same(found, expected):
    if not torch.equal(found, expected):
        difference = (found != expected).sum().item()
        raise AssertionError(f"{difference} of {found.numel()} values differ")


class RefusedError(Exception):
    """This release of transformers does not do it for any model, and says so."""


def check_auto_classes(folder, expected):
    heads = ("SequenceClassification", "TokenClassification", "QuestionAnswering")
    config = transformers.AutoConfig.from_pretrained(folder, **FOREIGN)
    assert config.model_type == "nanogpt"
    for name in ("AutoModel", *(f"AutoModelFor{head}" for head in heads)):
        model = load(folder, getattr(transformers, name))
        output = model(expected["ids"][:1])
        assert torch.isfinite(output[0]).all(), name


def check_logits(folder, expected):
    logits = logits_of(load(folder), expected["ids"])
    assert expected["logits"].std() > 1, "the reference is too flat to prove anything"
    near(logits, expected["logits"])


def check_no_future_leak(folder, expected):
    model, ids = load(folder), expected["ids"]
    changed = torch.cat([ids[:, :-1], (ids[:, -1:] + 1) % model.config.vocab_size], dim=1)
    before, after = logits_of(model, ids), logits_of(model, changed)
    same(before[:, :-1], after[:, :-1])
    assert not torch.equal(before[:, -1], after[:, -1])


def check_greedy_without_cache(folder, expected):
    same(generate(load(folder), expected["ids"], use_cache=False), expected["greedy"])


def check_greedy_dynamic_cache(folder, expected):
    same(generate(load(folder), expected["ids"]), expected["greedy"])


def check_greedy_static_cache(folder, expected):
    # Compiling the steps, which transformers does by default for this cache on a GPU, is not meant.
    settings = {"cache_implementation": "static", "disable_compile": True}
    same(generate(load(folder), expected["ids"], **settings), expected["greedy"])


def check_cache_by_hand(folder, expected):
    model, ids = load(folder), expected["ids"]
    cache = transformers.DynamicCache(config=model.config)
    pieces = [logits_of(model, piece, past_key_values=cache) for piece in ids.split([9, 1, 14], 1)]
    near(torch.cat(pieces, dim=1), expected["logits"])


def check_left_padding(folder, expected):
    model, ids = load(folder), expected["ids"]
    short = ids[:1, 7:]
    padded = torch.cat([torch.zeros(1, 7, dtype=torch.long), short], dim=1)
    mask = torch.ones_like(ids)
    mask[0, :7] = 0
    both = generate(model, torch.cat([padded, ids[1:]]), attention_mask=mask)
    same(both, torch.cat([generate(model, short), expected["greedy"][1:]]))


def check_beams(folder, expected):
    same(generate(load(folder), expected["ids"], num_beams=3), expected["beams"])


def check_assisted(folder, expected):
    ids, greedy = expected["ids"][:1], expected["greedy"][:1]
    for helper in ({"assistant_model": load(folder)}, {"prompt_lookup_num_tokens": 3}):
        try:
            same(generate(load(folder), ids, **helper), greedy)
        except ValueError as error:
            # 5.12 cannot take tokens back out of a sliding layer, of any model, and says so.
            if "Cannot `crop` a `DynamicSlidingWindowLayer`" not in str(error):
                raise
            raise RefusedError(str(error)) from error


def check_stop_strings(folder, expected):
    tokenizer = AutoTokenizer.from_pretrained(folder, **FOREIGN)
    ids, greedy = expected["ids"][:1], expected["greedy"][0]
    text = tokenizer.decode(greedy)
    stop = next(text[n : n + 3] for n in range(4, len(text)) if "\ufffd" not in text[n : n + 3])
    given = {"stop_strings": [stop], "tokenizer": tokenizer, "min_new_tokens": 0}
    found = tokenizer.decode(generate(load(folder), ids, **given)[0])
    assert stop in found and text.startswith(found), f"{found!r} of {text!r}, stop {stop!r}"


def check_packed_documents(folder, expected):
    model, ids = load(folder), expected["ids"][:1]
    positions = torch.cat([torch.arange(10), torch.arange(LENGTH - 10)])[None]
    alone = torch.cat([logits_of(model, ids[:, :10]), logits_of(model, ids[:, 10:])], dim=1)
    near(logits_of(model, ids, position_ids=positions), alone)


def check_pipeline(folder, expected):
    tokenizer = AutoTokenizer.from_pretrained(folder, **FOREIGN)
    write = pipeline("text-generation", model=load(folder), tokenizer=tokenizer)
    text = tokenizer.decode(expected["ids"][0])
    given = {"max_new_tokens": NEW, "min_new_tokens": NEW, "do_sample": False}
    # With an empty prompt's tokens the text would be encoded again, perhaps to other tokens.
    ids = torch.tensor([tokenizer.encode(text)])
    output = write(text, return_full_text=False, pad_token_id=0, **given)[0]["generated_text"]
    expected_text = tokenizer.decode(generate(load(folder), ids)[0], skip_special_tokens=True)
    assert output == expected_text, f"{output!r} instead of {expected_text!r}"


def check_trainer_step(folder, expected):
    model, ids = load(folder), expected["ids"]
    # The first label is never predicted, but the Trainer of some releases counts it.
    labels = torch.cat([torch.full_like(ids[:, :1], -100), ids[:, 1:]], dim=1)
    rows = [{"input_ids": ids[n], "labels": labels[n]} for n in range(len(ids))]
    with tempfile.TemporaryDirectory() as out:
        args = transformers.TrainingArguments(
            output_dir=out,
            max_steps=1,
            per_device_train_batch_size=len(rows),
            learning_rate=1e-3,
            max_grad_norm=0.0,
            optim="sgd",
            report_to=[],
            use_cpu=True,
            disable_tqdm=True,
            logging_strategy="no",
            save_strategy="no",
            lr_scheduler_type="constant",
        )
        before = model.model.embed_tokens.weight.detach().clone()
        result = transformers.Trainer(model=model, args=args, train_dataset=rows).train()
    near(torch.tensor(result.training_loss), expected["loss"])
    near(model.model.embed_tokens.weight, before - 1e-3 * expected["gradient"])


def check_save_and_load(folder, expected):
    with tempfile.TemporaryDirectory() as out:
        load(folder).save_pretrained(out)
        config = json.loads((Path(out) / "config.json").read_text())
        assert "AutoModel" in config["auto_map"], config["auto_map"]
        near(logits_of(load(out), expected["ids"]), expected["logits"])


def check_tokenizer(folder, expected):
    for tokenizer in (
        transformers.PreTrainedTokenizerFast.from_pretrained(folder),
        AutoTokenizer.from_pretrained(folder, **FOREIGN),
    ):
        ids = tokenizer(TEXT)["input_ids"]
        assert ids == expected["text_ids"].tolist(), ids
        assert tokenizer.decode(ids) == TEXT


def check_unknown_keyword(folder, expected):
    model, ids = load(folder), expected["ids"]
    model(ids, token_type_ids=torch.zeros_like(ids), something=None)
    try:
        model(ids, atention_mask=torch.ones_like(ids))
    except TypeError as error:
        assert "atention_mask" in str(error), error
    else:
        raise AssertionError("a misspelt argument was ignored")


CHECKS = {
    name.removeprefix("check_"): check
    for name, check in list(globals().items())
    if name.startswith("check_")
}


def run_checks(folder):
    expected, results = load_file(Path(folder) / "expected.safetensors"), {}
    for name, check in CHECKS.items():
        torch.manual_seed(0)
        try:
            check(folder, expected)
            results[name] = "ok"
        except RefusedError:
            results[name] = REFUSED
        except Exception as error:  # whatever it is, it belongs into the table
            results[name] = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
    return results


if __name__ == "__main__":
    sys.modules["hf_nanogpt"] = None  # as where it is not installed, also if it is
    torch.set_num_threads(1)  # more would only wait for each other: the models are tiny
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    results = {Path(folder).name: run_checks(folder) for folder in sys.argv[1:]}
    print(json.dumps({"transformers": transformers.__version__, "results": results}))
