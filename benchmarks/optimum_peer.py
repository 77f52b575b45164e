"""Run Optimum's ONNX model of a language model for :mod:`benchmarks.peers`, in a Python that has optimum-onnx.

optimum-onnx 0.1 needs transformers below 4.58, and this project a newer one. So this program runs in an environment of
its own, imports nothing of this project, and takes its tasks as lines of JSON on standard input.
"""

import json
import os
import sys
from time import perf_counter

import onnxruntime
import torch
from optimum.onnxruntime import ORTModelForCausalLM


def main() -> None:
    """Load and export the model, and generate the tokens that each line asks for."""
    job = json.loads(sys.argv[1])
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # keeps the output of the libraries apart from the answers
    torch.set_num_threads(job["threads"])
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = job["threads"]
    model = ORTModelForCausalLM.from_pretrained(job["folder"], export=True, session_options=options)
    print("ready", file=answers, flush=True)
    for line in sys.stdin:
        task = json.loads(line)
        ids = torch.tensor([task["ids"]])
        start = perf_counter()
        model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=task["tokens"],
            min_new_tokens=task["tokens"],
            do_sample=False,
            eos_token_id=None,
            pad_token_id=0,
        )
        print(perf_counter() - start, file=answers, flush=True)


if __name__ == "__main__":
    main()
