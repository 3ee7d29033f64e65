"""A static sparse adapter, PEFT's SHiRA with a random mask, trained on prompt_completion records in file order.

Run: python bench/hf_peft_shira.py BASE_DIR TRAIN.jsonl EVAL.jsonl [--r 1] [--steps 200] [--learning-rate 3e-3] ...
(torch, transformers 5, peft)

To be compared with a recipe of `type: sparse` whose num_tunable_weights is the number of values printed, with
`shuffle_data: false`, on the same files. Prints the loss over the supervised tokens of EVAL.jsonl before and after.
"""

import argparse
import sys
from pathlib import Path

import torch
from peft import ShiraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, get_scheduler

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests" / "golden"))
from make_lora_trajectory import ALL_LINEAR, loss_sum, supervised_in, tokenise, windows  # noqa: E402

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
add = parser.add_argument
add("base_dir", type=Path)
add("train", type=Path)
add("eval", type=Path)
add("--r", type=int, default=1)
add("--steps", type=int, default=200)
add("--micro-batch-size", type=int, default=8)
add("--learning-rate", type=float, default=3e-3)
add("--warmup-steps", type=int, default=6)
add("--sequence-len", type=int, default=512)
add("--seed", type=int, default=0)
args = parser.parse_args()
args.gradient_accumulation_steps = 1
torch.set_num_threads(1)

tokenizer = AutoTokenizer.from_pretrained(args.base_dir)


def examples(path):
    import json

    return [tokenise(tokenizer, json.loads(line), args.sequence_len) for line in path.read_text().splitlines()]


train, held_out = examples(args.train), examples(args.eval)
base = AutoModelForCausalLM.from_pretrained(args.base_dir, dtype=torch.float32)
model = get_peft_model(base, ShiraConfig(r=args.r, random_seed=args.seed, target_modules=ALL_LINEAR.split(",")))
trained = [p for p in model.parameters() if p.requires_grad]


def evaluate():
    model.eval()
    batches = [held_out[i : i + 8] for i in range(0, len(held_out), 8)]
    with torch.no_grad():
        return sum(loss_sum(model, b).item() for b in batches) / sum(supervised_in(b) for b in batches)


before = evaluate()
optimizer = torch.optim.AdamW(trained, lr=args.learning_rate, weight_decay=0.0)
scheduler = get_scheduler("linear", optimizer, args.warmup_steps, args.steps)
model.train()
for _, window in zip(range(args.steps), windows(train, args)):
    for batch in window:
        (loss_sum(model, batch) / supervised_in(batch)).backward()
    torch.nn.utils.clip_grad_norm_(trained, 1.0)
    optimizer.step()
    scheduler.step()
    optimizer.zero_grad()
print(f"{sum(p.numel() for p in trained)} values, lr {args.learning_rate:g}: loss {before:.4f} -> {evaluate():.4f}")
