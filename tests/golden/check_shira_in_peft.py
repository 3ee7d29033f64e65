"""Shows that a sparse adapter exported for PEFT and the checkpoint it was folded into give the same logits.

Run: python check_shira_in_peft.py BASE_DIR SHIRA_DIR MERGED_DIR DATA.jsonl [RECORDS]
(torch, transformers 5, peft)

SHIRA_DIR comes from `peft export --format peft-shira`, MERGED_DIR from `peft merge --dtype f32`. Prints the largest
difference of the logits over prompt_completion records, and how much the adapter changes them.
"""

import json
import sys

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

base_dir, shira_dir, merged_dir, data = sys.argv[1:5]
records = int(sys.argv[5]) if len(sys.argv) > 5 else 20
tokenizer = AutoTokenizer.from_pretrained(base_dir)
load = lambda path: AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
base, merged = load(base_dir), load(merged_dir)
adapted = PeftModel.from_pretrained(load(base_dir), shira_dir).eval()
values = sum(p.numel() for n, p in adapted.named_parameters() if "shira_weight" in n)
difference = effect = scale = 0.0
for line in list(open(data))[:records]:
    record = json.loads(line)
    ids = torch.tensor([tokenizer(record["prompt"] + record["completion"])["input_ids"][:256]])
    with torch.no_grad():
        of_base, of_merged, of_adapted = (model(ids).logits for model in (base, merged, adapted))
    difference = max(difference, (of_adapted - of_merged).abs().max().item())
    effect = max(effect, (of_adapted - of_base).abs().max().item())
    scale = max(scale, of_base.abs().max().item())
print(f"{values} values; largest logit difference {difference:.2e}, effect of the adapter {effect:.2e}, of {scale:.1f}")
