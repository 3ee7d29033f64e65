"""Greedy generation with transformers' `generate` on a randomly initialised Llama.

    python hf_generate.py --shape smollm2-135m --batch 1 8
    python hf_generate.py --shape 1b --device cuda

Every prompt has `--prompt` random tokens and nothing stops early, so each row makes `--new` tokens. The reading of the
prompt is timed apart, as a generation of one token. Prints one JSON object for each batch size.
"""

import argparse
import json
import statistics
import time

import torch
import transformers
from hf_common import add_model_arguments, device_name, finish, peak_memory, random_model


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add_model_arguments(parser)
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--prompt", type=int, default=128)
    parser.add_argument("--new", type=int, default=128)
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args()

    model = random_model(args, context=args.prompt + args.new).eval()
    read = sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())
    if not model.config.tie_word_embeddings:
        # Of an embedding apart from the head only single rows are read.
        embedding = model.get_input_embeddings().weight
        read -= embedding.numel() * embedding.element_size()

    for batch in args.batch:
        ids = torch.randint(model.config.vocab_size, (batch, args.prompt), device=args.device)

        def seconds(new):
            finish(args.device)
            start = time.perf_counter()
            out = model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                do_sample=False,
                max_new_tokens=new,
                min_new_tokens=new,
                eos_token_id=None,
                pad_token_id=0,
            )
            finish(args.device)
            assert out.shape[1] == args.prompt + new
            return time.perf_counter() - start

        seconds(8)
        prefill = statistics.median(seconds(1) for _ in range(args.repeats))
        whole = statistics.median(seconds(args.new) for _ in range(args.repeats))
        token = (whole - prefill) / (args.new - 1)
        result = {
            "peer": f"transformers {transformers.__version__}, torch {torch.__version__}",
            "device": device_name(args.device),
            "shape": args.shape,
            "dtype": args.dtype,
            "batch": batch,
            "prompt": args.prompt,
            "new": args.new,
            "prefill_ms": round(prefill * 1e3, 2),
            "token_ms": round(token * 1e3, 3),
            "tokens_per_second": round(batch / token, 1),
            "tokens_per_second_with_prefill": round(batch * args.new / whole, 1),
            "weight_bytes_per_token": read,
            "weight_gb_per_second": round(read / token / 1e9, 2),
            **peak_memory(args.device),
        }
        print(json.dumps(result), flush=True)


if __name__ == "__main__":
    with torch.inference_mode():
        main()
