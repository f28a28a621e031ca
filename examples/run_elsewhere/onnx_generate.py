"""Continue a text with onnxruntime, from one file, without PyTorch or transformers.

Run: python examples/run_elsewhere/onnx_generate.py MODEL.onnx PROMPT [MAX_NEW_TOKENS]
"""

import json
import sys

import numpy as np
import onnxruntime
from tokenizers import Tokenizer


def generate(session, ids: list[int], *, max_new_tokens: int, ends: list[int]) -> list[int]:
    """Append the most likely token again and again; the cache keeps what was read before."""
    past = {
        spec.name: np.zeros((1, spec.shape[1], 0, spec.shape[3]), np.float32)
        for spec in session.get_inputs()[2:]
    }
    new = ids
    for _ in range(max_new_tokens):
        mask = np.ones((1, len(ids)), np.int64)
        feed = {"input_ids": np.array([new]), "attention_mask": mask}
        logits, *present = session.run(None, feed | past)
        past = dict(zip(past, present, strict=True))
        new = [int(logits[0, -1].argmax())]
        ids = ids + new
        if new[0] in ends:
            break
    return ids


if __name__ == "__main__":
    file, prompt, *limit = sys.argv[1:]
    session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
    metadata = session.get_modelmeta().custom_metadata_map
    tokenizer = Tokenizer.from_str(metadata["tokenizer.json"])
    ids = tokenizer.encode(prompt).ids
    room = json.loads(metadata["max_position_embeddings"]) - len(ids)
    ends = np.atleast_1d(json.loads(metadata["eos_token_id"])).tolist()
    ids = generate(session, ids, max_new_tokens=min(room, *map(int, limit or [100])), ends=ends)
    print(tokenizer.decode(ids))
