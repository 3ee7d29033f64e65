"""One LoRA training step of Hugging Face PEFT on a randomly initialised Llama.

    python hf_peft_step.py --shape 25m --batch 4 --seq 256
    python hf_peft_step.py --shape 1b --batch 4 --seq 1024 --device cuda [--compile] [--ckpt]

A step is forward, backward and AdamW over one batch of `batch` × `seq` random tokens, all of them supervised, with
LoRA factors in f32 on all linear layers. The first `--warmup` steps are not counted; each counted step is timed alone, with
the device idle before and after. Prints one JSON object; `loss` is that of the last step.
"""

import argparse
import json
import statistics
import time

import peft
import torch
import transformers
from hf_common import add_model_arguments, device_name, finish, peak_memory, random_model


def build(args):
    model = random_model(args, context=args.seq)
    model.config.use_cache = False
    if args.ckpt:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        # The frozen embedding's output carries no gradient of its own.
        model.enable_input_require_grads()
    lora = peft.LoraConfig(
        r=args.rank, lora_alpha=2 * args.rank, target_modules="all-linear", task_type="CAUSAL_LM"
    )
    model = peft.get_peft_model(model, lora)
    model.train()
    return model


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add_model_arguments(parser)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--seq", type=int, default=256)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--ckpt", action="store_true", help="gradient checkpointing")
    parser.add_argument("--compile", action="store_true", help="torch.compile")
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--warmup", type=int, default=3)
    args = parser.parse_args()

    model = build(args)
    total = sum(parameter.numel() for parameter in model.parameters())
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4, weight_decay=0.0, fused=True)
    ids = torch.randint(model.config.vocab_size, (args.batch, args.seq), device=args.device)
    forward = torch.compile(model) if args.compile else model

    def step():
        loss = forward(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.detach()

    for _ in range(args.warmup):
        step()
    seconds = []
    for _ in range(args.steps):
        finish(args.device)
        start = time.perf_counter()
        loss = step()
        finish(args.device)
        seconds.append(time.perf_counter() - start)

    median = statistics.median(seconds)
    result = {
        "peer": f"peft {peft.__version__}, transformers {transformers.__version__}, torch {torch.__version__}",
        "device": device_name(args.device),
        "shape": args.shape,
        "dtype": args.dtype,
        "parameters": total,
        "trainable_parameters": sum(parameter.numel() for parameter in trained),
        "batch": args.batch,
        "seq": args.seq,
        "rank": args.rank,
        "ckpt": args.ckpt,
        "compile": args.compile,
        "steps": args.steps,
        "step_ms": round(median * 1e3, 2),
        "step_ms_min": round(min(seconds) * 1e3, 2),
        "tokens_per_second": round(args.batch * args.seq / median, 1),
        **peak_memory(args.device),
        "loss": loss.item(),
    }
    print(json.dumps(result), flush=True)


if __name__ == "__main__":
    main()
