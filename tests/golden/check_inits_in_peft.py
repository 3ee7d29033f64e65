"""Shows that adapters of ours from each initialisation mean to PEFT, on the original base, what PEFT's own runs gave.

Run in the repository's root:
  PEFT_KEEP_INIT_RUNS=RUNS cargo test --release -p peft-tests twenty_steps
  python tests/golden/check_inits_in_peft.py RUNS        (torch, transformers 5, peft)

Prints for each run the largest difference of the logits after twenty steps, relative to the largest logit, between
PEFT with our adapter on recipes/quickstart/base and PEFT's own run (make_init_trajectories.py).
"""

import json
import sys
from pathlib import Path

import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

torch.set_num_threads(1)
for run in sorted(Path(sys.argv[1]).iterdir()):
    expected = load_file(f"tests/golden/init_trajectories/{run.name}.safetensors")
    base = AutoModelForCausalLM.from_pretrained("recipes/quickstart/base", dtype=torch.float32)
    model = PeftModel.from_pretrained(base, run / "adapter").eval()
    with torch.no_grad():
        logits = model(input_ids=expected["input_ids"]).logits
    difference = (logits - expected["logits"]).abs().max() / expected["logits"].abs().max()
    config = json.loads((run / "adapter/adapter_config.json").read_text())
    print(f"{run.name:<16} r {config['r']}, init {str(config['init_lora_weights']):<12} difference {difference.item():.1e}")
