"""The loss of every step of a LoRA run in PyTorch and PEFT, to be laid beside that of `peft train`.

    python loss_curve.py --model DIR --data alpaca.jsonl --adapter OUT/adapter --steps 200 --device cuda --out torch.jsonl

Records are taken in file order, `--batch` a step, padded, with the prompt of `hf_trainer_alpaca.py`; AdamW at a constant
rate, gradients clipped at 1. `--adapter` is a folder with initial factors (a run of `peft train` with a rate of 1e-30 writes
them); without it PEFT draws them from `--seed`. One line a step: {"step": …, "loss": …}.
"""

import argparse
import json
from pathlib import Path

import peft
import torch
from hf_common import DTYPES
from hf_trainer_alpaca import examples_of
from transformers import AutoModelForCausalLM, AutoTokenizer


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--adapter", type=Path, help="initial factors")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--dtype", choices=DTYPES, help="type of the base; f32 on the cpu, else bf16")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--seq", type=int, default=512)
    parser.add_argument("--learning-rate", type=float, default=2e-4)
    parser.add_argument("--attention", choices=["sdpa", "eager"], default="sdpa", help="PyTorch's kernels or its plain operations")
    parser.add_argument("--autocast", action="store_true", help="products of the f32 factors in bf16, as with the Trainer's bf16: true")
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()

    torch.manual_seed(args.seed)
    dtype = DTYPES[args.dtype or ("f32" if args.device == "cpu" else "bf16")]
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    examples = examples_of(args.data, tokenizer, args.seq)
    model = AutoModelForCausalLM.from_pretrained(
        args.model, dtype=dtype, attn_implementation=args.attention
    ).to(args.device)
    if args.adapter:
        model = peft.PeftModel.from_pretrained(model, args.adapter, is_trainable=True)
    else:
        config = peft.LoraConfig(
            r=args.rank, lora_alpha=2 * args.rank, target_modules="all-linear", task_type="CAUSAL_LM"
        )
        model = peft.get_peft_model(model, config)
    model.train()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=args.learning_rate, weight_decay=0.0)

    with args.out.open("w") as out:
        for step in range(args.steps):
            picked = [examples[(step * args.batch + i) % len(examples)] for i in range(args.batch)]
            width = max(len(example["input_ids"]) for example in picked)

            def padded(key, filler):
                rows = [example[key] + [filler] * (width - len(example[key])) for example in picked]
                return torch.tensor(rows, device=args.device)

            labels = padded("labels", -100)
            with torch.autocast(args.device, torch.bfloat16, enabled=args.autocast):
                logits = model(input_ids=padded("input_ids", 0), attention_mask=padded("attention_mask", 0)).logits
            loss = torch.nn.functional.cross_entropy(
                logits[:, :-1].float().reshape(-1, logits.shape[-1]), labels[:, 1:].reshape(-1), ignore_index=-100
            )
            loss.backward()
            torch.nn.utils.clip_grad_norm_(trained, 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            out.write(json.dumps({"step": step + 1, "loss": loss.item()}) + "\n")


if __name__ == "__main__":
    main()
