"""Reference runs of LoRA-XS and LoRA-SB in plain PyTorch, on the quickstart's base.

Run in the repository's root: python tests/golden/make_core_trajectories.py      (torch, transformers 5)

Thirty steps of AdamW on the first 60 records of recipes/quickstart/train.jsonl, in micro-batches of 4, in file order. A
change is s·B·R·A on every linear map of the layers, rank 4, of which R trains:
  lora_xs   A = Σ·Vᵀ and B = U of the weight, R normal with deviation 1e-5, s = 2
  lora_sb   A = Vᵀ, B = U and R = Σ/s of −η·sign(G), s = 1, where G is the sum over 16 examples, evenly spread, of the
            gradients of the weight, micro-batch by micro-batch of the mean loss over its number of examples;
            η = 1e-3 / 5
Writes for each NAME
  core_trajectories/NAME/                the adapter before training, in the toolkit's format
  core_trajectories/NAME.jsonl           step, loss and the rest of a step's row
  core_trajectories/NAME.safetensors     input_ids i64 [1, T], logits f32 [1, T, V] after training

Decompositions are exact; the entry of each right vector that is largest in magnitude is positive.
"""

import json
from argparse import Namespace
from pathlib import Path

import torch
from make_lora_trajectory import loss_sum, supervised_in, tokenise, train
from safetensors.torch import save_file
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer

BASE, DATA, RECORDS = Path("recipes/quickstart/base"), Path("recipes/quickstart/train.jsonl"), 60
OUT = Path("tests/golden/core_trajectories")
RANK, MICRO_BATCH, SAMPLES, RATE, WARMUP = 4, 4, 16, 1e-3, 5
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
SETTINGS = Namespace(
    learning_rate=RATE, weight_decay=0.0, max_grad_norm=1.0, lr_scheduler="linear", warmup_steps=WARMUP, steps=30,
    micro_batch_size=MICRO_BATCH, gradient_accumulation_steps=1,
)  # fmt: skip


class CoreLinear(nn.Module):
    """y = x·Wᵀ + s·x·Aᵀ·Rᵀ·Bᵀ with R trained."""

    def __init__(self, base, a, b, r, scale):
        super().__init__()
        self.base, self.scale = base, scale
        self.register_buffer("a", a)
        self.register_buffer("b", b)
        self.r = nn.Parameter(r)

    def forward(self, x):
        return self.base(x) + self.scale * (x @ self.a.T @ self.r.T @ self.b.T)


def decomposed(matrix):
    u, s, vt = torch.linalg.svd(matrix.double(), full_matrices=False)
    signs = torch.sign(vt.gather(1, vt.abs().argmax(dim=1, keepdim=True)))
    return (u * signs.T)[:, :RANK], s[:RANK], (vt * signs)[:RANK]


def targets(model):
    return {name: module for name, module in model.named_modules() if name.split(".")[-1] in TARGETS}


def weight_gradients(model, examples):
    model.requires_grad_(False)
    for module in targets(model).values():
        module.weight.requires_grad_(True)
    chosen = [examples[i * len(examples) // SAMPLES] for i in range(SAMPLES)]
    for start in range(0, SAMPLES, MICRO_BATCH):
        batch = chosen[start : start + MICRO_BATCH]
        (loss_sum(model, batch) / supervised_in(batch) / len(batch)).backward()
    gradients = {name: module.weight.grad for name, module in targets(model).items()}
    model.zero_grad(set_to_none=True)
    return gradients


def factors(name, model, examples):
    """A, R, B by module, and s."""
    if name == "lora_xs":
        generator = torch.Generator().manual_seed(0)
        found = {}
        for path, module in targets(model).items():
            u, s, vt = decomposed(module.weight.data)
            found[path] = (s[:, None] * vt, 1e-5 * torch.randn(RANK, RANK, generator=generator), u)
        return found, 2.0
    found = {}
    for path, gradient in weight_gradients(model, examples).items():
        u, s, vt = decomposed(-RATE / WARMUP * torch.sign(gradient))
        found[path] = (vt, torch.diag(s), u)
    return found, 1.0


def save(name, found, scale):
    folder = OUT / name
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {}
    for path, (a, r, b) in found.items():
        for part, value in [("A", a), ("R", r), ("B", b)]:
            tensors[f"base_model.model.{path}.lora_{part}.weight"] = value.float().contiguous()
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    (folder / "adapter_model.safetensors").chmod(0o644)
    config = {
        "base_model_name_or_path": "base", "peft_type": name.upper(), "r": RANK, "scale": scale, "lora_dropout": 0.0,
        "target_modules": TARGETS,
    }  # fmt: skip
    (folder / "adapter_config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")


def main():
    torch.set_num_threads(1)
    tokenizer = AutoTokenizer.from_pretrained(BASE)
    records = [json.loads(line) for line in DATA.read_text().splitlines()[:RECORDS]]
    examples = [tokenise(tokenizer, record, 512) for record in records]
    input_ids = torch.tensor([examples[0][0][:16]])
    for name in ["lora_xs", "lora_sb"]:
        model = AutoModelForCausalLM.from_pretrained(BASE, dtype=torch.float32, attn_implementation="eager")
        with torch.no_grad():
            before = model.eval()(input_ids=input_ids, use_cache=False).logits.float()
        found, scale = factors(name, model.train(), examples)
        save(name, found, scale)
        model.requires_grad_(False)
        for path, (a, r, b) in found.items():
            parent, _, child = path.rpartition(".")
            adapted = CoreLinear(model.get_submodule(path), a.float(), b.float(), r.float(), scale)
            setattr(model.get_submodule(parent), child, adapted)
        with torch.no_grad():
            start = model.eval()(input_ids=input_ids, use_cache=False).logits.float()
        with open(OUT / f"{name}.jsonl", "w") as log:
            train(model.train(), examples, SETTINGS, log)
        with torch.no_grad():
            logits = model.eval()(input_ids=input_ids, use_cache=False).logits.float()
        out = OUT / f"{name}.safetensors"
        save_file({"input_ids": input_ids, "logits": logits}, out)
        out.chmod(0o644)
        moved = [(start - before).abs().max().item(), (logits - start).abs().max().item()]
        print(f"{name}: the first values changed the logits by {moved[0]:.1e}, training by {moved[1]:.1e}")


if __name__ == "__main__":
    main()
