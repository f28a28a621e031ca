"""Continue a text with llama.cpp in this process, with the package xllamacpp.

Run: python examples/run_elsewhere/llama_cpp.py MODEL.gguf PROMPT [MAX_NEW_TOKENS]
"""

import sys

import xllamacpp


def load_model(path: str, *, num_threads: int = 0, context: int = 0) -> xllamacpp.Server:
    """Load a file for one text at a time; 0 means llama.cpp's or the model's default."""
    params = xllamacpp.CommonParams()
    params.model.path = path
    params.n_ctx, params.n_parallel, params.verbosity = context, 1, 0
    if num_threads:
        params.cpuparams.n_threads = params.cpuparams_batch.n_threads = num_threads
    return xllamacpp.Server(params)


def complete(server: xllamacpp.Server, prompt: str | list[int], *, max_new_tokens: int) -> dict:
    """Return llama.cpp's answer in the format of OpenAI's completions, with `timings` added."""
    return server.handle_completions(
        {
            "prompt": prompt,
            "n_predict": max_new_tokens,
            "temperature": 0,
            "cache_prompt": False,
        }
    )


if __name__ == "__main__":
    file, prompt, *limit = sys.argv[1:]
    answer = complete(load_model(file), prompt, max_new_tokens=int(*limit or [100]))
    print(prompt + answer["choices"][0]["text"])
