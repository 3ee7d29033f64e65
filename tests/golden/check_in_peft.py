"""Shows that an adapter of ours and the checkpoint it was folded into mean the same to PEFT and transformers.

Run: python check_in_peft.py BASE_DIR ADAPTER_DIR MERGED_DIR DATA.jsonl
(torch, transformers 5, peft)

Prints the loss over the supervised tokens of prompt_completion records by PEFT (base and adapter) and by transformers
(merged checkpoint), to be compared with `peft evaluate`, and the largest difference of their logits.
"""

import json
import sys

import torch
import torch.nn.functional as F
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

base_dir, adapter_dir, merged_dir, data = sys.argv[1:]
torch.set_num_threads(1)
tokenizer = AutoTokenizer.from_pretrained(base_dir)
load = lambda path: AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
adapted = PeftModel.from_pretrained(load(base_dir), adapter_dir)
merged = load(merged_dir)

losses, supervised, difference, scale = [0.0, 0.0], 0, 0.0, 0.0
for line in open(data):
    record = json.loads(line)
    text = record["prompt"] + record["completion"]
    encoded = tokenizer(text, return_offsets_mapping=True)
    ids = torch.tensor([encoded["input_ids"] + [tokenizer.eos_token_id]])
    border = len(record["prompt"])
    learn = torch.tensor([end > border for _, end in encoded["offset_mapping"]] + [True])
    targets = torch.where(learn, ids[0], -100)[1:]
    with torch.no_grad():
        logits = [model(ids).logits[0] for model in (adapted, merged)]
    for i, z in enumerate(logits):
        losses[i] += F.cross_entropy(z[:-1], targets, ignore_index=-100, reduction="sum").item()
    supervised += int((targets != -100).sum())
    difference = max(difference, (logits[0] - logits[1]).abs().max().item())
    scale = max(scale, logits[0].abs().max().item())

print(f"PEFT, base and adapter   loss {losses[0] / supervised:.9f} over {supervised} tokens")
print(f"transformers, merged     loss {losses[1] / supervised:.9f}")
print(f"largest logit difference {difference:.2e} of {scale:.1f}")
