"""Reference runs of NOLA in PyTorch, with the bases of `peft-core/scripts/basis_reference.py`, on the quickstart's base.

Run in the repository's root: python tests/golden/make_nola_trajectories.py      (torch, transformers 5, peft)

Thirty steps of AdamW on the first 60 records of recipes/quickstart/train.jsonl, two micro-batches of 4 a step, in file
order. Writes for each run NAME, whose recipe is nola/NAME.yaml,
  nola/NAME.jsonl                       step, loss, grad_norm (over the coefficients, before clipping)
  nola/NAME.safetensors                 input_ids i64 [1, T], logits f32 [1, T, V] after training, and the trained
                                        coefficients of one module, alpha f32 [k] and beta f32 [l]
"""

import json
import math
import sys
from argparse import Namespace
from pathlib import Path

import torch
import torch.nn.functional as F
from make_lora_trajectory import tokenise, train
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

sys.path.insert(0, "peft-core/scripts")
from basis_reference import Basis  # noqa: E402
from random_reference import Stream  # noqa: E402

BASE, DATA, RECORDS = Path("recipes/quickstart/base"), Path("recipes/quickstart/train.jsonl"), 60
OUT = Path("tests/golden/nola")
SEED, ONE_MODULE = 42, "model.layers.1.self_attn.v_proj"
SETTINGS = Namespace(
    weight_decay=0.01, max_grad_norm=0.5, lr_scheduler="constant_with_warmup", warmup_steps=3,
    steps=30, micro_batch_size=4, gradient_accumulation_steps=2,
)  # fmt: skip
RUNS = {
    "per_module": {"learning_rate": 1e-2, "k": 48, "l": 40, "shared": False, "scaled": True, "offset": True, "random_alpha": False},
    "shared": {"learning_rate": 2e-3, "k": 32, "l": 32, "shared": True, "scaled": False, "offset": False, "random_alpha": True},
}  # fmt: skip
RANK, ALPHA = 4, 8


class NolaLinear(torch.nn.Module):
    """y = x·Wᵀ + s·x·Aᵀ·Bᵀ with A = A₀ + c·Σ alphaᵢ·Aᵢ and B = c·Σ betaⱼ·Bⱼ."""

    def __init__(self, path, base, k, l, shared, scaled, offset, random_alpha):
        super().__init__()
        rows, columns = base.weight.shape
        name = f"{rows}x{columns}" if shared else path
        self.base, self.scale = base, ALPHA / RANK

        def basis(factor, count, shape, scale):
            elements = Basis(SEED, f"nola {factor}", name, math.prod(shape)).elements(count)
            return torch.from_numpy(elements).reshape(count, *shape) * scale

        law = (lambda count: 1 / math.sqrt(count)) if scaled else lambda count: 1.0
        a, b = (RANK, columns), (rows, RANK)
        self.basis_a = basis("A", k, a, law(k))
        self.basis_b = basis("B", l, b, law(l))
        self.offset = basis("A0", 1, a, 1 / math.sqrt(columns))[0] if offset else torch.zeros(a)
        alpha = torch.zeros(k)
        if random_alpha:
            # The entries of A then have the variance that Kaiming's law gives those of LoRA: 1/(3·columns).
            stream = Stream(SEED, "nola alpha", path)
            deviation = 1 / (math.sqrt(columns * k) * law(k))
            alpha = torch.tensor([stream.normal() * deviation for _ in range(k)])
        self.alpha, self.beta = torch.nn.Parameter(alpha.float()), torch.nn.Parameter(torch.zeros(l))

    def forward(self, x):
        a = self.offset + torch.einsum("k,krc->rc", self.alpha, self.basis_a)
        b = torch.einsum("l,lor->or", self.beta, self.basis_b)
        return self.base(x) + self.scale * F.linear(F.linear(x, a), b)


def main():
    torch.set_num_threads(1)
    tokenizer = AutoTokenizer.from_pretrained(BASE)
    records = [json.loads(line) for line in DATA.read_text().splitlines()[:RECORDS]]
    examples = [tokenise(tokenizer, record, 512) for record in records]
    input_ids = torch.tensor([examples[0][0][:16]])
    OUT.mkdir(exist_ok=True)
    for name, arguments in RUNS.items():
        SETTINGS.learning_rate = arguments.pop("learning_rate")
        model = AutoModelForCausalLM.from_pretrained(BASE, dtype=torch.float32, attn_implementation="eager")
        model.requires_grad_(False)
        for path, module in list(model.named_modules()):
            if isinstance(module, torch.nn.Linear) and path != "lm_head":
                model.set_submodule(path, NolaLinear(path, module, **arguments))
        with open(OUT / f"{name}.jsonl", "w") as log:
            train(model.train(), examples, SETTINGS, log)
        with torch.no_grad():
            logits = model.eval()(input_ids=input_ids, use_cache=False).logits.float()
        one = model.get_submodule(ONE_MODULE)
        tensors = {"alpha": one.alpha.data, "beta": one.beta.data, "input_ids": input_ids, "logits": logits}
        save_file(tensors, OUT / f"{name}.safetensors")
        (OUT / f"{name}.safetensors").chmod(0o644)
        losses = [json.loads(line)["loss"] for line in (OUT / f"{name}.jsonl").read_text().splitlines()]
        trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
        print(f"{name:<12} {trained} trained, loss {losses[0]:.4f} to {losses[-1]:.4f}")


if __name__ == "__main__":
    main()
