"""Hugging Face's Trainer with a PEFT LoRA on alpaca records, with their defaults.

    python hf_trainer_alpaca.py --model DIR --data alpaca.jsonl --steps 50 --batch 8 --losses losses.jsonl

Each line of the data (or each item of a .json list) has `instruction`, `input` and `output`. They are written in
alpaca's prompt, the answer is followed by the end-of-text token, the prompt is not supervised, longer examples are cut
at `--seq`. Batches are padded to their longest example, nothing is packed, and the order is the Trainer's own shuffle.
Samples a second count the optimisation steps after `--warmup` of them, without loading and tokenising. Prints one JSON
object; `--losses` gets one line a step.
"""

import argparse
import json
import tempfile
import time
from pathlib import Path

import peft
import torch
import transformers
from hf_common import DTYPES, device_name, finish, peak_memory
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    DataCollatorForSeq2Seq,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

PREAMBLE = {
    True: "Below is an instruction that describes a task, paired with an input that provides further context. "
    "Write a response that appropriately completes the request.",
    False: "Below is an instruction that describes a task. "
    "Write a response that appropriately completes the request.",
}


def prompt_of(record):
    parts = [PREAMBLE[bool(record.get("input"))], f"### Instruction:\n{record['instruction']}"]
    if record.get("input"):
        parts.append(f"### Input:\n{record['input']}")
    return "\n\n".join([*parts, "### Response:"])


def examples_of(path, tokenizer, limit):
    text = path.read_text(encoding="utf-8")
    records = json.loads(text) if path.suffix == ".json" else [json.loads(line) for line in text.splitlines()]
    examples = []
    for record in records:
        # As one text: where the answer's first characters and the prompt's last make one token, it is learned.
        prompt, answer = prompt_of(record), record["output"]
        encoded = tokenizer(prompt + answer, return_offsets_mapping=True)
        ids = (encoded["input_ids"] + [tokenizer.eos_token_id])[:limit]
        learned = [end > len(prompt) for _, end in encoded["offset_mapping"]] + [True]
        labels = [token if of_answer else -100 for token, of_answer in zip(ids, learned)]
        if any(label != -100 for label in labels):
            examples.append({"input_ids": ids, "attention_mask": [1] * len(ids), "labels": labels})
    return examples


class Watch(TrainerCallback):
    """Clocks each step and keeps what the Trainer logs of its loss."""

    def __init__(self, device):
        self.device = device
        self.ends = []
        self.losses = []

    def on_step_end(self, args, state, control, **kwargs):
        finish(self.device)
        self.ends.append(time.perf_counter())

    def on_log(self, args, state, control, logs=None, **kwargs):
        if logs and "loss" in logs:
            self.losses.append({"step": state.global_step, "loss": logs["loss"]})


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    default = Path.home() / ".cache/peft-models/smollm2-135m-instruct"
    parser.add_argument("--model", type=Path, default=default)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--dtype", choices=DTYPES, help="type of the base; f32 on the cpu, else bf16")
    parser.add_argument("--threads", type=int, default=2, help="of the cpu")
    parser.add_argument("--batch", type=int, default=8, help="per_device_train_batch_size")
    parser.add_argument("--accumulate", type=int, default=1, help="gradient_accumulation_steps")
    parser.add_argument("--seq", type=int, default=512)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--learning-rate", type=float, default=2e-4)
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--warmup", type=int, default=3, help="steps that are not timed")
    parser.add_argument("--ckpt", action="store_true", help="gradient checkpointing")
    parser.add_argument("--compile", action="store_true", help="torch.compile")
    parser.add_argument("--output", type=Path, default=Path(tempfile.gettempdir()), help="nothing is saved there")
    parser.add_argument("--losses", type=Path, help="a jsonl file of the loss curve")
    args = parser.parse_args()
    if args.steps <= args.warmup:
        parser.error("--steps must be more than --warmup")

    torch.set_num_threads(args.threads)
    args.dtype = args.dtype or ("f32" if args.device == "cpu" else "bf16")
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    examples = examples_of(args.data, tokenizer, args.seq)
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=DTYPES[args.dtype])
    lora = peft.LoraConfig(
        r=args.rank, lora_alpha=2 * args.rank, target_modules="all-linear", task_type="CAUSAL_LM"
    )
    if args.ckpt:
        model.enable_input_require_grads()
    model = peft.get_peft_model(model, lora)

    watch = Watch(args.device)
    settings = TrainingArguments(
        output_dir=str(args.output),
        per_device_train_batch_size=args.batch,
        gradient_accumulation_steps=args.accumulate,
        gradient_checkpointing=args.ckpt,
        torch_compile=args.compile,
        learning_rate=args.learning_rate,
        max_steps=args.steps,
        logging_steps=1,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
        use_cpu=args.device == "cpu",
        bf16=args.device == "cuda" and args.dtype == "bf16",
        seed=0,
    )
    collator = DataCollatorForSeq2Seq(tokenizer, padding=True)
    trainer = Trainer(
        model=model, args=settings, train_dataset=examples, data_collator=collator, callbacks=[watch]
    )
    trainer.train()

    timed = watch.ends[args.warmup - 1 :] if args.warmup else watch.ends
    seconds = timed[-1] - timed[0]
    steps = len(timed) - 1
    if args.losses:
        args.losses.write_text("".join(json.dumps(line) + "\n" for line in watch.losses))
    result = {
        "peer": f"Trainer, peft {peft.__version__}, transformers {transformers.__version__}, "
        f"torch {torch.__version__}",
        "device": device_name(args.device),
        "model": args.model.name,
        "dtype": args.dtype,
        "examples": len(examples),
        "batch": args.batch,
        "accumulate": args.accumulate,
        "seq": args.seq,
        "rank": args.rank,
        "ckpt": args.ckpt,
        "compile": args.compile,
        "timed_steps": steps,
        "step_ms": round(seconds / steps * 1e3, 2),
        "samples_per_second": round(args.batch * args.accumulate * steps / seconds, 3),
        **peak_memory(args.device),
        "first_loss": watch.losses[0]["loss"],
        "last_loss": watch.losses[-1]["loss"],
    }
    print(json.dumps(result), flush=True)


if __name__ == "__main__":
    main()
