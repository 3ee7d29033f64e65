"""A reference run of sparse fine-tuning with moving positions in plain PyTorch (no PEFT, no Trainer).

Run: python make_sparse_trajectory.py BASE_DIR DATA.jsonl STATE.safetensors OUT_DIR --criterion accumulated_gradient|moment_approximation
(torch, transformers 5)

STATE.safetensors is that of a checkpoint of the same run before its first choice of positions; of it only the initial
positions are read, `method/MODULE.sparse_values.positions`. Data, batches and loss are those of make_lora_trajectory.py.
Writes
  OUT_DIR/trajectory.jsonl    step, loss (before the update), grad_norm (before clipping), lr of each step
  OUT_DIR/final.safetensors   MODULE.positions i64 and MODULE.values f32 after training, input_ids i64 and logits f32

Every linear layer below the head computes x(W + Δ)ᵀ with a dense Δ, whose whole gradient autograd gives; the choice of
positions and both optimizers are written from the paper's and the SM3 paper's formulas.
"""

import argparse
import json
import math
from pathlib import Path

import torch
import torch.nn.functional as F
from make_lora_trajectory import loss_sum, supervised_in, tokenise, windows
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, get_scheduler


def parse_arguments():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("base_dir", type=Path)
    add("data", type=Path)
    add("state", type=Path)
    add("out_dir", type=Path)
    add("--criterion", choices=["accumulated_gradient", "moment_approximation"], required=True)
    add("--steps", type=int, default=30)
    add("--micro-batch-size", type=int, default=2)
    add("--gradient-accumulation-steps", type=int, default=2)
    add("--sequence-len", type=int, default=512)
    add("--learning-rate", type=float, required=True)
    add("--weight-decay", type=float, default=0.0)
    add("--max-grad-norm", type=float, default=1.0)
    add("--warmup-steps", type=int, default=0)
    add("--reselection-steps", type=int, default=20)
    add("--selection-accumulation-steps", type=int, default=5)
    add("--initial-reselection-rate", type=float, default=0.2)
    add("--momentum", type=float, default=0.0)
    return parser.parse_args()


class SparseLinear(torch.nn.Module):
    """A linear layer with a dense change whose gradient is kept whole; what of it trains is decided outside."""

    def __init__(self, base, name, positions):
        super().__init__()
        self.base, self.name = base, name
        self.positions = positions  # flat, row-major
        self.values = torch.zeros(len(positions))
        self.delta = torch.zeros_like(base.weight, requires_grad=True)

    def forward(self, x):
        return F.linear(x, self.base.weight + self.delta, self.base.bias)

    def write(self):
        with torch.no_grad():
            self.delta.zero_()
            self.delta.view(-1)[self.positions] = self.values


class Adam:
    """AdamW with an age for each element; ε before the bias correction, decay after the step."""

    def __init__(self, layer, args):
        self.layer, self.decay = layer, args.weight_decay
        count = len(layer.positions)
        self.m, self.v, self.age = torch.zeros(count), torch.zeros(count), torch.ones(count)

    def step(self, gradient, rate):
        b1, b2, eps = 0.9, 0.999, 1e-6
        self.m = b1 * self.m + (1 - b1) * gradient
        self.v = b2 * self.v + (1 - b2) * gradient**2
        age = self.age.double()
        scale = torch.sqrt(1 - b2**age) / (1 - b1**age)
        self.layer.values = self.layer.values - rate * self.m * scale.float() / (self.v.sqrt() + eps)
        self.layer.values = self.layer.values - rate * self.decay * self.layer.values
        self.age = self.age + 1

    def exchange(self, out, new, seeds):
        """Entries `out` (a mask) leave and `new` positions come."""
        layer = self.layer
        keep = ~out
        layer.positions = torch.cat([layer.positions[keep], new])
        layer.values = torch.cat([layer.values[keep], torch.zeros(len(new))])
        self.m = torch.cat([self.m[keep], seeds[0]])
        self.v = torch.cat([self.v[keep], seeds[1]])
        self.age = torch.cat([self.age[keep], seeds[2]])


class Sm3:
    """SM3-II on the active entries."""

    def __init__(self, layer, args):
        self.layer, self.decay, self.momentum = layer, args.weight_decay, args.momentum
        self.row, self.column = (torch.zeros(n) for n in layer.delta.shape)
        self.buffer = torch.zeros(len(layer.positions))

    def step(self, gradient, rate):
        layer = self.layer
        width = layer.delta.shape[1]
        r, c = layer.positions // width, layer.positions % width
        u = torch.minimum(self.row[r], self.column[c]) + gradient**2
        update = gradient / torch.sqrt(u + 1e-8)
        if self.momentum > 0:
            update = self.buffer = (1 - self.momentum) * update + self.momentum * self.buffer
        layer.values = layer.values - rate * update
        layer.values = layer.values - rate * self.decay * layer.values
        self.row = self.row.scatter_reduce(0, r, u, "amax")
        self.column = self.column.scatter_reduce(0, c, u, "amax")

    def exchange(self, out, new, _):
        layer, keep = self.layer, ~out
        layer.positions = torch.cat([layer.positions[keep], new])
        layer.values = torch.cat([layer.values[keep], torch.zeros(len(new))])
        self.buffer = torch.cat([self.buffer[keep], torch.zeros(len(new))])


def smallest(layer, k):
    """A mask of the k entries of smallest magnitude, ties to the lower position."""
    order = sorted(range(len(layer.positions)), key=lambda i: (abs(layer.values[i].item()), layer.positions[i].item()))
    return order[:k]


def reselect_by_gradient(optimizer, k, found, steps):
    layer = optimizer.layer
    leaving = smallest(layer, k)
    leaves = {layer.positions[i].item() for i in leaving}
    remain = {p for p in layer.positions.tolist() if p not in leaves}
    ranked = sorted(range(len(found["positions"])), key=lambda i: (-abs(found["sum"][i].item()), found["positions"][i].item()))
    ranked = [i for i in ranked if found["positions"][i].item() not in remain and found["sum"][i] != 0][: len(leaving)]
    comes = {found["positions"][i].item() for i in ranked}
    leaving = [i for i in leaving if layer.positions[i].item() not in comes]
    coming = [i for i in ranked if found["positions"][i].item() not in leaves]
    count = min(len(leaving), len(coming))
    leaving, coming = leaving[:count], torch.tensor(coming[:count], dtype=torch.long)
    out = torch.zeros(len(layer.positions), dtype=torch.bool)
    out[leaving] = True
    samples = found["samples"]
    seeds = (
        (found["sum"][coming] / samples) * (1 - 0.9**steps),
        (found["squares"][coming] / samples) * (1 - 0.999**steps),
        torch.full((count,), steps + 1.0),
    )
    optimizer.exchange(out, found["positions"][coming], seeds)


def reselect_by_moments(optimizer, k):
    layer = optimizer.layer
    scores = torch.outer(optimizer.row.double(), optimizer.column.double()).flatten()
    scores[layer.positions] = -1
    order = torch.argsort(scores, descending=True, stable=True)[:k]
    order = order[scores[order] > 0]
    out = torch.zeros(len(layer.positions), dtype=torch.bool)
    out[smallest(layer, len(order))] = True
    optimizer.exchange(out, order, None)


def main():
    args = parse_arguments()
    torch.set_num_threads(1)
    tokenizer = AutoTokenizer.from_pretrained(args.base_dir)
    records = [json.loads(line) for line in args.data.read_text().splitlines() if line.strip()]
    examples = [tokenise(tokenizer, record, args.sequence_len) for record in records]
    model = AutoModelForCausalLM.from_pretrained(args.base_dir, dtype=torch.float32, attn_implementation="eager")
    model.requires_grad_(False).train()
    by_gradient = args.criterion == "accumulated_gradient"
    optimizers = []
    for key, positions in load_file(args.state).items():
        if key.startswith("method/") and key.endswith(".sparse_values.positions"):
            name = key.removeprefix("method/").removesuffix(".sparse_values.positions")
            layer = SparseLinear(model.get_submodule(name), name, positions)
            parent, child = name.rsplit(".", 1)
            setattr(model.get_submodule(parent), child, layer)
            optimizers.append(Adam(layer, args) if by_gradient else Sm3(layer, args))
    print(f"{sum(len(o.layer.positions) for o in optimizers)} values in {len(optimizers)} modules")

    dummy = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=args.learning_rate)
    scheduler = get_scheduler("cosine", dummy, args.warmup_steps, args.steps)
    found, phase_steps, is_open = {}, 0, by_gradient
    args.out_dir.mkdir(parents=True, exist_ok=True)
    S, A = args.reselection_steps, args.selection_accumulation_steps
    with open(args.out_dir / "trajectory.jsonl", "w") as log:
        for step, window in zip(range(1, args.steps + 1), windows(examples, args)):
            count = sum(supervised_in(batch) for batch in window)
            loss, sums = 0.0, [torch.zeros(len(o.layer.positions)) for o in optimizers]
            for batch in window:
                for optimizer in optimizers:
                    optimizer.layer.write()
                part = loss_sum(model, batch) / count
                part.backward()
                loss += part.item()
                for i, optimizer in enumerate(optimizers):
                    layer = optimizer.layer
                    dense, layer.delta.grad = layer.delta.grad.flatten(), None
                    sums[i] += dense[layer.positions]
                    if is_open and layer.name not in found:
                        best = torch.argsort(dense.abs(), descending=True, stable=True)[: len(layer.positions)]
                        best = best.sort().values
                        found[layer.name] = {"positions": best, "sum": torch.zeros(len(best)), "squares": torch.zeros(len(best)), "samples": 0}
                    if is_open:
                        of = found[layer.name]
                        of["sum"] += dense[of["positions"]]
                        of["squares"] += dense[of["positions"]] ** 2
                        of["samples"] += 1
            norm = math.sqrt(sum((s.double() ** 2).sum().item() for s in sums))
            clip = min(1.0, args.max_grad_norm / (norm + 1e-6))
            rate = scheduler.get_last_lr()[0]
            log.write(json.dumps({"step": step, "loss": loss, "grad_norm": norm, "lr": rate}) + "\n")
            for optimizer, gradient in zip(optimizers, sums):
                optimizer.step(gradient * clip, rate)
            dummy.step()
            scheduler.step()
            phase_steps += is_open
            if step % S == A:
                share = 1.0 if step == A else args.initial_reselection_rate * (1 - step / args.steps)
                for optimizer in optimizers:
                    k = math.floor(len(optimizer.layer.positions) * share)
                    if by_gradient:
                        reselect_by_gradient(optimizer, k, found[optimizer.layer.name], phase_steps)
                    else:
                        reselect_by_moments(optimizer, k)
                found, phase_steps, is_open = {}, 0, False
            if by_gradient and (step + 1) % S == 0:
                is_open = True

    tensors = {}
    for optimizer in optimizers:
        layer = optimizer.layer
        layer.write()
        order = layer.positions.argsort()
        tensors[f"{layer.name}.positions"] = layer.positions[order].contiguous()
        tensors[f"{layer.name}.values"] = layer.values[order].contiguous()
    input_ids = torch.tensor([examples[0][0][:16]])
    with torch.no_grad():
        tensors["logits"] = model.eval()(input_ids=input_ids, use_cache=False).logits.float()
    tensors["input_ids"] = input_ids
    save_file(tensors, args.out_dir / "final.safetensors")
    (args.out_dir / "final.safetensors").chmod(0o644)


if __name__ == "__main__":
    main()
