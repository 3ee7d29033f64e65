"""Reference runs with HF PEFT from each of its initialisations, on the quickstart's base.

Run in the repository's root: python tests/golden/make_init_trajectories.py      (torch, transformers 5, peft)

Twenty steps of AdamW on the first 60 records of recipes/quickstart/train.jsonl, in micro-batches of 4, in file order.
Writes for each initialisation NAME
  init_trajectories/NAME.safetensors    input_ids i64 [1, T], logits f32 [1, T, V] after training
  init_trajectories/NAME.jsonl          step and loss
and init_trajectories/orthogonal/, the random adapter that run starts from, init_trajectories/eva.json, the ranks and
alphas that EVA chose, and init_trajectories/unconverted_pissa/ and unconverted_olora/, trained adapters that belong to
the base as their initialisation left it.

Randomised decompositions are replaced by exact ones with the toolkit's choice of signs (the entry of each right vector
that is largest in magnitude is positive): PEFT starts them from random numbers, and the product of LoRA-GA's factors
depends on the signs.
"""

import dataclasses
import json
import sys
import types
from argparse import Namespace
from pathlib import Path

import torch

# PEFT's CorDA takes one decorator from the attrs package, which PEFT does not depend on.
sys.modules.setdefault("attr", types.SimpleNamespace(dataclass=dataclasses.dataclass))

import peft.tuners.lora.layer
from make_lora_trajectory import IGNORED, loss_sum, save_adapter, supervised_in, tokenise, train
from peft import LoraConfig, get_peft_model
from peft.tuners.lora.config import CordaConfig, EvaConfig, LoraGAConfig
from peft.tuners.lora.corda import preprocess_corda
from peft.tuners.lora.eva import initialize_lora_eva_weights
from peft.tuners.lora.loraga import preprocess_loraga
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

BASE, DATA, RECORDS = Path("recipes/quickstart/base"), Path("recipes/quickstart/train.jsonl"), 60
OUT = Path("tests/golden/init_trajectories")
MICRO_BATCH = 4
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
SETTINGS = Namespace(
    learning_rate=1e-3, weight_decay=0.0, max_grad_norm=1.0, lr_scheduler="constant_with_warmup", warmup_steps=0,
    steps=20, micro_batch_size=MICRO_BATCH, gradient_accumulation_steps=1,
)  # fmt: skip
RUNS = {
    "pissa": {}, "pissa_niter_16": {}, "olora": {}, "orthogonal": {},
    "eva": {"eva_config": EvaConfig(rho=2.0, tau=0.99)},
    "corda_ipm": {"corda_config": CordaConfig(corda_method="ipm")},
    "corda_kpm": {"corda_config": CordaConfig(corda_method="kpm")},
    "lora_ga": {"lora_ga_config": LoraGAConfig()},
    "pissa_rslora": {"use_rslora": True},
}  # fmt: skip


def exact_svd_lowrank(a, q=6, niter=2, M=None):
    u, s, vt = torch.linalg.svd(a.double(), full_matrices=False)
    signs = torch.sign(vt.gather(1, vt.abs().argmax(dim=1, keepdim=True)))
    return (u * signs.T)[:, :q].to(a.dtype), s[:q].to(a.dtype), (vt * signs)[:q].T.to(a.dtype)


def collated(examples):
    for start in range(0, len(examples), MICRO_BATCH):
        batch = examples[start : start + MICRO_BATCH]
        width = max(len(ids) for ids, _ in batch)
        yield {
            "input_ids": torch.tensor([ids + [0] * (width - len(ids)) for ids, _ in batch]),
            "attention_mask": torch.tensor([[1] * len(ids) + [0] * (width - len(ids)) for ids, _ in batch]),
            "labels": torch.tensor([labels + [IGNORED] * (width - len(labels)) for _, labels in batch]),
        }


def prepared(name, arguments, examples):
    base = AutoModelForCausalLM.from_pretrained(BASE, dtype=torch.float32, attn_implementation="eager")
    init = name.removesuffix("_rslora").removesuffix("_ipm").removesuffix("_kpm")
    config = LoraConfig(
        task_type="CAUSAL_LM", r=4, lora_alpha=8, target_modules=TARGETS, init_lora_weights=init, **arguments
    )
    torch.manual_seed(0)
    if init == "corda":
        run = lambda: [base(input_ids=torch.tensor([ids])) for ids, _ in examples]
        preprocess_corda(base, config, run_model=run)
    if init == "lora_ga":

        def step():
            for start in range(0, len(examples), MICRO_BATCH):
                batch = examples[start : start + MICRO_BATCH]
                (loss_sum(base, batch) / supervised_in(batch)).backward()

        preprocess_loraga(base, config, step)
    model = get_peft_model(base, config)
    if init == "eva":
        initialize_lora_eva_weights(model, list(collated(examples)), show_progress_bar=False)
    return model


def main():
    torch.set_num_threads(1)
    torch.svd_lowrank = peft.tuners.lora.layer.svd_lowrank = exact_svd_lowrank
    tokenizer = AutoTokenizer.from_pretrained(BASE)
    records = [json.loads(line) for line in DATA.read_text().splitlines()[:RECORDS]]
    examples = [tokenise(tokenizer, record, 512) for record in records]
    OUT.mkdir(exist_ok=True)
    input_ids = torch.tensor([examples[0][0][:16]])
    for name in sys.argv[1:] or RUNS:
        model = prepared(name, RUNS[name], examples)
        with torch.no_grad():
            before = model.eval()(input_ids=input_ids, use_cache=False).logits.float()
        if name == "orthogonal":
            save_adapter(model, OUT / name, "base")
        if name == "eva":
            config = model.peft_config["default"]
            chosen = {"rank_pattern": config.rank_pattern, "alpha_pattern": config.alpha_pattern}
            chosen["target_modules"] = sorted(config.target_modules)
            (OUT / "eva.json").write_text(json.dumps(chosen, indent=1, sort_keys=True) + "\n")
        with open(OUT / f"{name}.jsonl", "w") as log:
            train(model.train(), examples, SETTINGS, log)
        if name in ["pissa", "olora"]:
            save_adapter(model, OUT / f"unconverted_{name}", "base")
        with torch.no_grad():
            logits = model.eval()(input_ids=input_ids, use_cache=False).logits.float()
        out = OUT / f"{name}.safetensors"
        save_file({"input_ids": input_ids, "logits": logits}, out)
        out.chmod(0o644)
        print(f"{name:<16} training changed the logits by {(logits - before).abs().max().item():.3f}")


if __name__ == "__main__":
    main()
