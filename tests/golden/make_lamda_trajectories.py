"""Reference runs of LaMDA and LaMDA++ in PyTorch on the quickstart's base.

Run in the repository's root: python tests/golden/make_lamda_trajectories.py      (torch, transformers 5, peft)

Thirty steps of AdamW on the first 60 records of recipes/quickstart/train.jsonl, two micro-batches of 4 a step, in file
order. Writes for each run NAME, whose recipe is lamda/NAME.yaml,
  lamda/NAME.jsonl                      step, loss, grad_norm (over what trains in the step, before clipping)
  lamda/NAME.safetensors                input_ids i64 [1, T], logits f32 [1, T, V] after training, and B [out, r], S [r, r]
                                        of one module
and lamda/ranks.json, the ranks of the run plus.

Columns freeze in truth: their gradient is zero, and what weight decay and momentum did to them is undone. The run
`released` only has the gradients masked, by the rule of the authors' program.
"""

import json
import math
from argparse import Namespace
from pathlib import Path

import torch
import torch.nn.functional as F
from make_lora_trajectory import tokenise, train
from safetensors.torch import save_file
from torch.optim.optimizer import register_optimizer_step_post_hook
from transformers import AutoModelForCausalLM, AutoTokenizer

BASE, DATA, RECORDS = Path("recipes/quickstart/base"), Path("recipes/quickstart/train.jsonl"), 60
OUT = Path("tests/golden/lamda")
ONE_MODULE = "model.layers.1.mlp.up_proj"
SETTINGS = Namespace(
    learning_rate=3e-3, weight_decay=0.1, max_grad_norm=0.5, lr_scheduler="constant_with_warmup", warmup_steps=3,
    steps=30, micro_batch_size=4, gradient_accumulation_steps=2,
)  # fmt: skip
RANK, SCALE, ETA = 4, 2.0, 0.4
RUNS = {
    "principal": {},
    "plus": {"plus": True},
    "no_residual": {"subtract": False},
    "released": {"released": True},
}


def decomposed(weight):
    u, s, vt = torch.linalg.svd(weight.double(), full_matrices=False)
    signs = torch.sign(vt.gather(1, vt.abs().argmax(dim=1, keepdim=True)))
    return u * signs.T, s, vt * signs


class LamdaLinear(torch.nn.Module):
    """y = x·W_resᵀ + s·x·Aᵀ·Sᵀ·Bᵀ."""

    def __init__(self, base, rank, subtract=True, released=False):
        super().__init__()
        u, s, vt = decomposed(base.weight.data)
        self.rank, self.released = rank, released
        self.a = vt[:rank].float()
        self.b = torch.nn.Parameter(u[:, :rank].float())
        core = torch.diag(s[:rank] / SCALE) if subtract else torch.zeros(rank, rank)
        self.core = torch.nn.Parameter(core.float())
        if subtract:
            rest = base.weight.data.double() - (u[:, :rank] * s[:rank]) @ vt[:rank]
            base.weight.data = rest.float()
        self.base, self.step = base, 0
        self.b.register_hook(self.masked)

    def frozen(self):
        end = ETA * SETTINGS.steps
        rule = self.step / end if self.released else self.rank * self.step / end
        return min(self.rank, math.floor(rule + 1e-9))

    def masked(self, gradient):
        gradient = gradient.clone()
        gradient[:, : self.frozen()] = 0
        return gradient

    def updated(self):
        if not self.released:
            self.b.data[:, : self.frozen()] = self.kept[:, : self.frozen()]
        self.step += 1

    def forward(self, x):
        self.kept = self.b.data.clone()
        low = F.linear(F.linear(F.linear(x, self.a), self.core), self.b)
        return self.base(x) + SCALE * low


def ranks_by_spectrum(weights, mean):
    """More rank for flat spectra, in five groups; unit steps, as the mean is below 8."""
    scores = {}
    for path, weight in weights.items():
        s = torch.linalg.svdvals(weight.double())
        scores[path] = ((s[:mean] ** 2).sum() / (s**2).sum()).item()
    order = sorted(weights, key=scores.__getitem__)
    ranks = {}
    for place, path in enumerate(order):
        share = [1.5, 1.25, 1.0, 0.75, 0.5][place * 5 // len(order)]
        ranks[path] = math.floor(share * mean + 0.5)
    for path in reversed(order):
        if sum(ranks.values()) <= mean * len(order):
            break
        ranks[path] -= 1
    return ranks


def main():
    torch.set_num_threads(1)
    tokenizer = AutoTokenizer.from_pretrained(BASE)
    records = [json.loads(line) for line in DATA.read_text().splitlines()[:RECORDS]]
    examples = [tokenise(tokenizer, record, 512) for record in records]
    input_ids = torch.tensor([examples[0][0][:16]])
    OUT.mkdir(exist_ok=True)
    for name, arguments in RUNS.items():
        model = AutoModelForCausalLM.from_pretrained(BASE, dtype=torch.float32, attn_implementation="eager")
        model.requires_grad_(False)
        linear = {p: m for p, m in model.named_modules() if isinstance(m, torch.nn.Linear) and p != "lm_head"}
        ranks = dict.fromkeys(linear, RANK)
        if arguments.get("plus"):
            ranks = ranks_by_spectrum({path: module.weight.data for path, module in linear.items()}, RANK)
            (OUT / "ranks.json").write_text(json.dumps(ranks, indent=1, sort_keys=True) + "\n")
        arguments = {key: value for key, value in arguments.items() if key != "plus"}
        adapted = []
        for path, module in linear.items():
            adapted.append(LamdaLinear(module, ranks[path], **arguments))
            model.set_submodule(path, adapted[-1])
        hook = lambda *_: [module.updated() for module in adapted]
        handle = register_optimizer_step_post_hook(hook)
        with open(OUT / f"{name}.jsonl", "w") as log:
            train(model.train(), examples, SETTINGS, log)
        handle.remove()
        with torch.no_grad():
            logits = model.eval()(input_ids=input_ids, use_cache=False).logits.float()
        one = model.get_submodule(ONE_MODULE)
        tensors = {"B": one.b.data.contiguous(), "S": one.core.data, "input_ids": input_ids, "logits": logits}
        save_file(tensors, OUT / f"{name}.safetensors")
        (OUT / f"{name}.safetensors").chmod(0o644)
        losses = [json.loads(line)["loss"] for line in (OUT / f"{name}.jsonl").read_text().splitlines()]
        print(f"{name:<12} loss {losses[0]:.4f} to {losses[-1]:.4f}")


if __name__ == "__main__":
    main()
