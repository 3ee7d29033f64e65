"""A reference LoRA fine-tuning run with HF PEFT and a plain PyTorch loop (no Trainer).

Run: PYTHONHASHSEED=0 python make_lora_trajectory.py BASE_DIR DATA.jsonl OUT_DIR [--steps 50 ...]
(torch, transformers 5, peft; the hash seed fixes the order in which PEFT writes `target_modules`)

DATA.jsonl holds {"prompt": ..., "completion": ...} records, used in file order, epoch after epoch. Writes
  OUT_DIR/initial/, final/         the adapter before and after training, as `save_pretrained` writes it
  OUT_DIR/trajectory.jsonl         step, loss (before the update), grad_norm (before clipping), lr,
                                   tokens, supervised_tokens of each optimizer step
  OUT_DIR/final_logits.safetensors input_ids i64 [1, T] (the first T tokens of the first record) and
                                   logits f32 [1, T, V] after training

An example is [BOS if the tokenizer adds it] + tokens of prompt+completion, tokenised once, + EOS. Supervised are the
tokens whose characters overlap the completion, and EOS. The loss of a step is the sum of cross-entropies over the
supervised tokens of the whole accumulation window, divided by their count; the last window of an epoch may be partial.
"""

import argparse
import json
import resource
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from peft import LoraConfig, get_peft_model
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, get_scheduler

ALL_LINEAR = "q_proj,k_proj,v_proj,o_proj,gate_proj,up_proj,down_proj"
IGNORED = -100


def parse_arguments():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("base_dir", type=Path)
    add("data", type=Path)
    add("out_dir", type=Path)
    add("--steps", type=int, default=50)
    add("--micro-batch-size", type=int, default=2)
    add("--gradient-accumulation-steps", type=int, default=2)
    add("--sequence-len", type=int, default=512)
    add("--learning-rate", type=float, default=1e-3)
    add("--weight-decay", type=float, default=0.01)
    add("--max-grad-norm", type=float, default=1.0)
    add("--lr-scheduler", default="constant_with_warmup", choices=["constant_with_warmup", "linear", "cosine"])
    add("--warmup-steps", type=int, default=0)
    add("--r", type=int, default=8)
    add("--lora-alpha", type=int, default=16)
    add("--use-rslora", action="store_true")
    add("--target-modules", default=ALL_LINEAR, help="comma-separated names, or all-linear")
    add("--rank-pattern", type=json.loads, default={}, help="JSON object")
    add("--alpha-pattern", type=json.loads, default={}, help="JSON object")
    add("--modules-to-save", default="", help="comma-separated names")
    add("--dtype", default="float32", choices=["float32", "bfloat16", "float16"], help="of the base model")
    add("--logit-tokens", type=int, default=16, help="T of final_logits.safetensors")
    add("--seed", type=int, default=0)
    add("--threads", type=int, default=1)
    return parser.parse_args()


def tokenise(tokenizer, record, sequence_len):
    """Input ids and labels of one record; labels[i] is input_ids[i] where supervised."""
    border = len(record["prompt"])
    encoded = tokenizer(record["prompt"] + record["completion"], return_offsets_mapping=True)
    ids = encoded["input_ids"] + [tokenizer.eos_token_id]
    if len(ids) > sequence_len:
        raise SystemExit(f"a record has {len(ids)} tokens, more than --sequence-len {sequence_len}")
    supervised = [end > border and end > start for start, end in encoded["offset_mapping"]] + [True]
    return ids, [token if keep else IGNORED for token, keep in zip(ids, supervised)]


def windows(examples, args):
    """Accumulation windows, each a list of micro-batches, without end."""
    size, micro = args.micro_batch_size * args.gradient_accumulation_steps, args.micro_batch_size
    while True:
        for start in range(0, len(examples), size):
            window = examples[start : start + size]
            yield [window[i : i + micro] for i in range(0, len(window), micro)]


def supervised_in(batch):
    """Supervised next-token predictions: the first token of a sequence is never predicted."""
    return sum(label != IGNORED for _, labels in batch for label in labels[1:])


def loss_sum(model, batch):
    """Sum of cross-entropies over the supervised tokens of one right-padded micro-batch."""
    width = max(len(ids) for ids, _ in batch)
    ids = torch.tensor([ids + [0] * (width - len(ids)) for ids, _ in batch])
    mask = torch.tensor([[1] * len(ids) + [0] * (width - len(ids)) for ids, _ in batch])
    labels = torch.tensor([labels + [IGNORED] * (width - len(labels)) for _, labels in batch])
    logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits.float()
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), reduction="sum", ignore_index=IGNORED)


def build_model(args):
    base = AutoModelForCausalLM.from_pretrained(
        args.base_dir, dtype=getattr(torch, args.dtype), attn_implementation="eager"
    )
    names = args.target_modules.split(",")
    config = LoraConfig(
        task_type="CAUSAL_LM", r=args.r, lora_alpha=args.lora_alpha, lora_dropout=0.0, use_rslora=args.use_rslora,
        target_modules="all-linear" if names == ["all-linear"] else names,
        rank_pattern=args.rank_pattern, alpha_pattern=args.alpha_pattern,
        modules_to_save=args.modules_to_save.split(",") if args.modules_to_save else None,
    )  # fmt: skip
    torch.manual_seed(args.seed)  # for the Kaiming-uniform draws of A; B is zero
    return get_peft_model(base, config)


def save_adapter(model, folder, name):
    model.peft_config["default"].base_model_name_or_path = name
    model.save_pretrained(folder, save_embedding_layers=False)
    (folder / "README.md").unlink()
    (folder / "adapter_model.safetensors").chmod(0o644)


def train(model, examples, args, log):
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(
        trained, lr=args.learning_rate, betas=(0.9, 0.999), eps=1e-8, weight_decay=args.weight_decay
    )
    scheduler = get_scheduler(args.lr_scheduler, optimizer, args.warmup_steps, args.steps)
    for step, window in zip(range(1, args.steps + 1), windows(examples, args)):
        count = sum(supervised_in(batch) for batch in window)
        loss = 0.0
        for batch in window:
            part = loss_sum(model, batch) / count
            part.backward()
            loss += part.item()
        norm = torch.nn.utils.clip_grad_norm_(trained, args.max_grad_norm).item()
        row = {
            "step": step, "loss": loss, "grad_norm": norm, "lr": scheduler.get_last_lr()[0],
            "tokens": sum(len(ids) for batch in window for ids, _ in batch), "supervised_tokens": count,
        }  # fmt: skip
        log.write(json.dumps(row) + "\n")
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()


def main():
    args = parse_arguments()
    torch.set_num_threads(args.threads)
    tokenizer = AutoTokenizer.from_pretrained(args.base_dir)
    records = [json.loads(line) for line in args.data.read_text().splitlines() if line.strip()]
    examples = [tokenise(tokenizer, record, args.sequence_len) for record in records]
    model = build_model(args)
    args.out_dir.mkdir(parents=True, exist_ok=True)
    save_adapter(model, args.out_dir / "initial", args.base_dir.name)

    started = time.perf_counter()
    with open(args.out_dir / "trajectory.jsonl", "w") as log:
        train(model.train(), examples, args, log)
    seconds = (time.perf_counter() - started) / args.steps

    save_adapter(model, args.out_dir / "final", args.base_dir.name)
    input_ids = torch.tensor([examples[0][0][: args.logit_tokens]])
    with torch.no_grad():
        logits = model.eval()(input_ids=input_ids, use_cache=False).logits.float()
    save_file({"input_ids": input_ids, "logits": logits}, args.out_dir / "final_logits.safetensors")
    (args.out_dir / "final_logits.safetensors").chmod(0o644)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(f"{seconds:.4f} s/step, peak RSS {peak:.0f} MiB")


if __name__ == "__main__":
    main()
