"""The speed of generation beside llama.cpp, which runs our GGUF export of the same checkpoint.

Run: python benchmarks/llama_cpp.py [--num_threads 2] [--preset NAME ...] [--checkpoint FOLDER ...]
(by default GPT-2 with 10 and 124 million parameters, random weights; some minutes)
"""

import argparse
import tempfile
import time
from itertools import pairwise
from pathlib import Path
from statistics import median

import torch
import xllamacpp
from results_file import write_results
from tqdm.auto import tqdm
from transformers import StoppingCriteria, set_seed

from hf_nanogpt import NanoGPTForCausalLM, load_checkpoint, load_preset, train_tokenizer
from hf_nanogpt.benchmark.decoding import SIZES
from hf_nanogpt.benchmark.report import summarize
from hf_nanogpt.convert.gguf import export_gguf
from hf_nanogpt.quantization import quantize_model

PROMPT_TOKENS = 64
KINDS = {"f32": "ours, float32", "q8_0": "ours, int8"}


class Clock(StoppingCriteria):
    def __init__(self):
        self.marks = []

    def __call__(self, input_ids, scores, **kwargs):
        self.marks.append(time.perf_counter())
        return torch.zeros(len(input_ids), dtype=torch.bool)


def by_ours(model):
    def generate(prompt, new):
        clock, ids = Clock(), torch.tensor([prompt])
        text = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=new,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=0,
            stopping_criteria=[clock],
        )
        gaps = [later - sooner for sooner, later in pairwise(clock.marks)]
        return text[0, len(prompt) :].tolist(), sum(gaps) / len(gaps)

    return generate


def by_llama_cpp(path, num_threads):
    params = xllamacpp.CommonParams()
    params.model.path = str(path)
    params.n_parallel, params.n_gpu_layers, params.verbosity = 1, 0, 0
    params.fit_params = False
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = num_threads
    server = xllamacpp.Server(params)

    def generate(prompt, new):
        settings = {"n_predict": new, "temperature": 0, "ignore_eos": True, "cache_prompt": False}
        more = {"verbose": True, "return_tokens": True}
        answer = server.handle_completions({"prompt": prompt} | settings | more)["__verbose"]
        # Its clock starts when the first token is there.
        return answer["tokens"], answer["timings"]["predicted_ms"] / 1000 / (new - 1)

    return generate


def make_contestants(checkpoint, folder, num_threads):
    """Return ways to generate by name, those of the same bits one after the other."""
    files = {kind: export_gguf(checkpoint, folder / f"{kind}.gguf", dtype=kind) for kind in KINDS}
    (model, _), (rounded, _) = load_checkpoint(checkpoint), load_checkpoint(checkpoint)
    ours = {"f32": model.float(), "q8_0": quantize_model(rounded.float())}
    contestants = {}
    for kind, name in KINDS.items():
        contestants[name] = by_ours(ours[kind])
        contestants[f"llama.cpp, {kind}"] = by_llama_cpp(files[kind], num_threads)
    return contestants, model.num_parameters()


def measure(checkpoint, *, num_threads, rounds, max_new_tokens):
    with tempfile.TemporaryDirectory() as folder:
        contestants, parameters = make_contestants(checkpoint, Path(folder), num_threads)
    prompt = torch.randint(256, (PROMPT_TOKENS,)).tolist()
    seconds, texts = {name: [] for name in contestants}, {}
    for turn in tqdm(range(rounds + 1), desc=f"{parameters / 1e6:.0f} M parameters"):
        for name, generate in contestants.items():
            time.sleep(0.2)  # until the threads of the one before have stopped to wait for work
            texts[name], taken = generate(prompt, max_new_tokens)
            if turn > 0:  # the first one warms up
                seconds[name].append(taken)
    rows, names = [], list(contestants)
    for at, name in enumerate(names):
        ours = names[at - at % 2]
        pairs = zip(seconds[ours], seconds[name], strict=True)
        same = sum(a == b for a, b in zip(texts[names[0]], texts[name], strict=True))
        rows.append(
            {
                "name": name,
                "tokens_per_second": 1 / median(seconds[name]),
                "speed_to_ours": summarize([a / b for a, b in pairs]),
                "same_tokens": same / max_new_tokens,
                "seconds_per_token": seconds[name],
            }
        )
    return {"parameters": parameters, "rows": rows}


def save_random(preset, folder):
    """Write a preset (GPT-2 of about 10 M parameters for None) with random weights."""
    set_seed(0)
    config = load_preset(preset or "gpt2", **({} if preset else SIZES))
    NanoGPTForCausalLM(config).save_pretrained(folder)
    train_tokenizer([], kind="byte").save_pretrained(folder)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--preset", action="append", default=[], help="with random weights")
    parser.add_argument("--checkpoint", action="append", default=[], help="folder or Hub id")
    parser.add_argument("--num_threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--max_new_tokens", type=int, default=64)
    args = vars(parser.parse_args())
    presets, checkpoints = args.pop("preset"), args.pop("checkpoint")
    torch.set_num_threads(args["num_threads"])
    if not presets and not checkpoints:
        presets = [None, "gpt2"]
    models = {}
    for preset in presets:
        with tempfile.TemporaryDirectory() as folder:
            save_random(preset, folder)
            models[preset or "GPT-2 of 10 M"] = measure(folder, **args)
    for checkpoint in checkpoints:
        models[Path(checkpoint).name] = measure(checkpoint, **args)
    version = xllamacpp.__version__
    settings = args | {"prompt_tokens": PROMPT_TOKENS}
    write_results("llama_cpp", {"settings": settings, "xllamacpp": version, "models": models})


if __name__ == "__main__":
    main()
