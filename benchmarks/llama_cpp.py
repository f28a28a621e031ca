"""The speed of generation compared with llama.cpp, which runs our GGUF export of the checkpoint.

Run: python benchmarks/llama_cpp.py [--num_threads 2] [--preset NAME ...] [--checkpoint FOLDER ...]
(by default GPT-2 with 10 and 124 million parameters and random weights; takes some minutes)
"""

import argparse
import tempfile
import time
from pathlib import Path
from statistics import fmean, median

import torch
import xllamacpp
from results_file import write_results
from transformers import set_seed

from hf_nanogpt import NanoGPTForCausalLM, load_checkpoint, load_preset, train_tokenizer
from hf_nanogpt.benchmark.decoding import SIZES
from hf_nanogpt.benchmark.turns import Clock, compare_speeds, take_turns
from hf_nanogpt.convert.gguf import export_gguf
from hf_nanogpt.quantization import quantize_model

PROMPT_TOKENS = 64
DTYPES = {"f32": "ours, float32", "q8_0": "ours, int8"}


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
        return text[0, len(prompt) :].tolist(), fmean(clock.seconds()[1:])

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
        # Its clock starts after the first token.
        return answer["tokens"], answer["timings"]["predicted_ms"] / 1000 / (new - 1)

    return generate


def make_contestants(checkpoint, folder, num_threads):
    """Return functions that generate, by name: for each dtype ours, then llama.cpp."""
    (model, _), (rounded, _) = load_checkpoint(checkpoint), load_checkpoint(checkpoint)
    ours = {"f32": model.float(), "q8_0": quantize_model(rounded.float())}
    contestants = {}
    for dtype, name in DTYPES.items():
        file = export_gguf(checkpoint, folder / f"{dtype}.gguf", dtype=dtype)
        contestants[name] = by_ours(ours[dtype])
        contestants[f"llama.cpp, {dtype}"] = by_llama_cpp(file, num_threads)
    return contestants, model.num_parameters()


def measure(checkpoint, *, num_threads, rounds, max_new_tokens):
    with tempfile.TemporaryDirectory() as folder:
        contestants, parameters = make_contestants(checkpoint, Path(folder), num_threads)
    prompt = torch.randint(256, (PROMPT_TOKENS,)).tolist()
    seconds, texts = {name: [] for name in contestants}, {}
    description = f"{parameters / 1e6:.0f} M parameters"
    for turn, name in take_turns(contestants, rounds, description=description):
        time.sleep(0.2)  # until the threads of the contestant before no longer wait for work
        texts[name], taken = contestants[name](prompt, max_new_tokens)
        if turn > 0:  # round 0 is a warm-up
            seconds[name].append(taken)
    rows, names = [], list(contestants)
    for i, name in enumerate(names):
        ours = names[i - i % 2]  # with weights of the same size
        same = sum(a == b for a, b in zip(texts[names[0]], texts[name], strict=True))
        rows.append(
            {
                "name": name,
                "tokens_per_second": 1 / median(seconds[name]),
                "speed_to_ours": compare_speeds(seconds[ours], seconds[name]),
                "same_tokens": same / max_new_tokens,
                "seconds_per_token": seconds[name],
            }
        )
    return {"parameters": parameters, "rows": rows}


def save_random(preset, folder):
    """Write a preset, or for None a GPT-2 of about 10 M parameters, with random weights."""
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
