"""Load our checkpoints in other releases of transformers, without hf_nanogpt: `make compat`.

Each release is installed into a folder of its own, `.compat/RELEASE`, and shares torch with the
environment that runs this file. The expected values are computed here, by the installed package.

Run: python tests/compat.py [RELEASE ...]. By default it checks all releases that
`hf_nanogpt.auto` lists; `oldest` and `newest` name the two ends of that list. With `--broken`
it breaks the model's code on purpose, and fails if the checks do not notice.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from importlib.metadata import distributions, version
from pathlib import Path

import compat_checks
import torch
from compat_checks import LENGTH, TEXT, generate
from packaging.requirements import Requirement
from safetensors.torch import save_file

from hf_nanogpt import NanoGPTForCausalLM, load_preset, train_tokenizer
from hf_nanogpt.auto import TESTED_TRANSFORMERS

ROOT = Path(__file__).parent.parent
OVERLAYS = ROOT / ".compat"
# Rotary and learned positions, all norms, grouped and sliding attention.
MODELS = {
    "nano": {"num_key_value_heads": 2},
    "gpt2": {},
    "gpt3-125m": {"sliding_window": 5, "layer_types": None},
}
SIZES = {"vocab_size": 300, "n_layer": 3, "n_embd": 32, "n_head": 4, "block_size": 64}
IDS = {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}


def make_reference(preset: str, folder: Path) -> None:
    """Write a checkpoint with random weights, and what it must give, to a folder."""
    torch.manual_seed(1)
    # A deviation of 0.3: the logits then have one above 1, so that a fault anywhere shows in them.
    overrides = SIZES | IDS | MODELS[preset] | {"initializer_range": 0.3, "dropout": 0.0}
    if preset == "gpt3-125m":
        overrides["layer_types"] = ["full_attention", "sliding_attention", "full_attention"]
    model = NanoGPTForCausalLM(load_preset(preset, **overrides)).eval()
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    tokenizer = train_tokenizer([text], kind="bpe", vocab_size=SIZES["vocab_size"])
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    ids = torch.randint(1, 256, (2, LENGTH), generator=torch.Generator().manual_seed(2))
    output = model(ids, labels=ids, use_cache=False)
    (gradient,) = torch.autograd.grad(output.loss, [model.model.embed_tokens.weight])
    expected = {
        "ids": ids,
        "logits": output.logits,
        "loss": output.loss,
        "gradient": gradient,
        "greedy": generate(model, ids, use_cache=False),
        "beams": generate(model, ids, use_cache=False, num_beams=3),
        "text_ids": torch.tensor(tokenizer(TEXT)["input_ids"]),
    }
    tensors = {name: tensor.detach().contiguous() for name, tensor in expected.items()}
    save_file(tensors, folder / "expected.safetensors")


def find_environment(release: str) -> dict[str, str]:
    """Return the variables for a Python that has this release, after installing it if needed."""
    variables = dict(os.environ) | {"HF_HUB_OFFLINE": "1"}
    if release == version("transformers"):
        return variables
    folder = OVERLAYS / release
    if not (folder / ".ready").is_file():
        unmet = [f"transformers=={release}"]
        while unmet:
            _install(folder, *unmet)
            unmet = find_unmet(folder)
        (folder / ".ready").touch()
    return variables | {"PYTHONPATH": str(folder)}


def find_unmet(folder: Path) -> list[str]:
    """Return what the packages in a folder require and neither it nor this environment has.

    Those of an older release are other ones: huggingface-hub 1 needs httpx, and 2 needs httpx2.
    """
    unmet = []
    for package in distributions(path=[str(folder)]):
        for needed in map(Requirement, package.requires or []):
            if needed.marker and not needed.marker.evaluate({"extra": ""}):
                continue
            paths = [str(folder)], sys.path  # the folder wins
            found = [d for path in paths for d in distributions(name=needed.name, path=path)]
            if not found or not needed.specifier.contains(found[0].version, prereleases=True):
                unmet.append(f"{needed.name}{needed.specifier}")
    return unmet


def _install(folder: Path, *requirements: str) -> None:
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--upgrade"]
    subprocess.run([*pip, "--target", str(folder), *requirements], check=True)


def check_release(release: str, folders: list[Path]) -> dict[str, dict[str, str]]:
    """Return the results of all checks, by model."""
    variables = find_environment(release)
    with tempfile.TemporaryDirectory() as modules:  # where transformers copies our code to
        done = subprocess.run(
            [sys.executable, "-P", compat_checks.__file__, *map(str, folders)],
            env=variables | {"HF_MODULES_CACHE": modules},
            cwd=modules,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
        )
    if done.returncode:
        return {"all": {"start": done.stderr.strip().splitlines()[-1]}}
    found = json.loads(done.stdout.strip().splitlines()[-1])
    assert found["transformers"] == release, f"{found['transformers']} ran, not {release}"
    return found["results"]


# A change to the model's file for each, and a check that must then fail.
BROKEN = {
    "mask": (
        "attention_mask=causal_masks[layer_type],",
        "attention_mask=hidden_states.new_zeros(1, 1, 1, 1),",
    ),
    "sine": ("emb.sin() * self", "-emb.sin() * self"),
    "cache": ("0 if filled is None else filled.get_seq_length()", "0"),
}
NOTICED_BY = {"mask": "no_future_leak", "sine": "logits", "cache": "cache_by_hand"}


def check_broken(folder: Path) -> bool:
    """Break the model's code in three ways; print and return whether the checks notice each."""
    copies = [folder / fault for fault in BROKEN]
    for copy, (right, wrong) in zip(copies, BROKEN.values(), strict=True):
        make_reference("nano", copy)
        code = copy / "modeling_nanogpt.py"
        text = code.read_text(encoding="utf-8")
        assert text.count(right) == 1, f"{right!r} stands {text.count(right)} times in {code.name}"
        code.write_text(text.replace(right, wrong), encoding="utf-8")
    results = check_release(version("transformers"), copies)
    for fault, check in NOTICED_BY.items():
        print(f"{fault}: {check} says {results[fault][check]}")
    return all(results[fault][check] != "ok" for fault, check in NOTICED_BY.items())


def show(table: dict[str, dict[str, dict[str, str]]]) -> bool:
    """Print release x check, say what failed, and return whether nothing did."""
    checks, faults = list(compat_checks.CHECKS), []
    print("| check | " + " | ".join(table) + " |")
    print("|---" * (1 + len(table)) + "|")
    for check in checks:
        cells = []
        for release, models in table.items():
            bad = {model: row.get(check, row.get("start")) for model, row in models.items()}
            refused = [model for model, result in bad.items() if result == compat_checks.REFUSED]
            bad = {m: result for m, result in bad.items() if result != "ok" and m not in refused}
            cells.append(f"FAILED ({', '.join(bad)})" if bad else "ok")
            if refused:
                cells[-1] += f" (not {', '.join(refused)}: {compat_checks.REFUSED})"
            faults += [f"{release} {check} {model}: {result}" for model, result in bad.items()]
        print(f"| {check.replace('_', ' ')} | " + " | ".join(cells) + " |")
    print(*faults, sep="\n")
    return not faults


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("releases", nargs="*", default=list(TESTED_TRANSFORMERS))
    parser.add_argument("--broken", action="store_true", help="check that faults are noticed")
    args = parser.parse_args()
    if args.broken:
        with tempfile.TemporaryDirectory() as folder:
            return 0 if check_broken(Path(folder)) else 1
    ends = {"oldest": TESTED_TRANSFORMERS[0], "newest": TESTED_TRANSFORMERS[-1]}
    releases = [ends.get(name, name) for name in args.releases]
    with tempfile.TemporaryDirectory() as folder:
        folders = [Path(folder) / name for name in MODELS]
        for path in folders:
            make_reference(path.name, path)
        table = {}
        for release in releases:
            print(f"transformers {release} ...", file=sys.stderr)
            table[release] = check_release(release, folders)
    return 0 if show(table) else 1


if __name__ == "__main__":
    sys.exit(main())
