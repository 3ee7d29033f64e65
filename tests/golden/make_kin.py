"""Thirty training steps of the small methods beside LoRA, by PEFT where it has them and by plain PyTorch where not.

Run: PYTHONHASHSEED=0 python make_kin.py [NAME ...]     after make_families.py
(torch, transformers 5, peft; the hash seed fixes the order in which PEFT writes lists of names)

Writes next to this file, for each case:
  kin/NAME/method.json           the base and the recipe's method block
  kin/NAME/trained/              the adapter after training, as `save_pretrained` writes it; where PEFT has the method
  kin/NAME/expected.safetensors  losses f32 [30] before each update, input_ids i64 [1, T] and logits f32 [1, T, V]
                                 after training
and once
  kin/batches.safetensors        input_ids i64 [30, 2, T]: a batch of two sequences a step, all tokens supervised

First values are the methods' own, so nothing is handed over but the seed of VeRA's pair. AdamW without weight decay at a
constant rate, no clipping.
"""

import json
import os
import re
import shutil
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from make_adapters import BIASED, TIED, UNTIED, load_base
from peft import IA3Config, LNTuningConfig, VeraConfig, get_peft_model
from safetensors.torch import save_file

ROOT = Path(__file__).resolve().parent
STEPS, LENGTH, VOCAB, RATE = 30, 12, 96, 1e-2
QK_NORMS = "families/qwen3_tied"
NORMS = ["input_layernorm", "post_attention_layernorm", "norm"]

# name: (base, recipe's method block, PEFT's configuration or None)
KIN = {
    "ia3": (BIASED, dict(type="ia3"), IA3Config()),
    "ia3_more": (
        UNTIED,
        dict(type="ia3", target_modules="all-linear", feedforward_modules=["o_proj", "down_proj"]),
        IA3Config(target_modules="all-linear", feedforward_modules=["o_proj", "down_proj"]),
    ),
    "vera": (
        TIED,
        dict(type="vera", r=8, projection_prng_key=3, target_modules=["q_proj", "v_proj", "down_proj"]),
        VeraConfig(r=8, projection_prng_key=3, target_modules=["q_proj", "v_proj", "down_proj"]),
    ),
    "vera_drawn": (
        UNTIED,
        dict(type="vera", r=5, d_initial=0.3, save_projection=False, target_modules=["k_proj", "gate_proj"]),
        VeraConfig(r=5, d_initial=0.3, save_projection=False, target_modules=["k_proj", "gate_proj"]),
    ),
    "norm_only": (TIED, dict(type="norm_only"), LNTuningConfig(target_modules=NORMS)),
    "norm_only_heads": (
        QK_NORMS,
        dict(type="norm_only", target_modules=["q_norm", "k_norm", "norm"]),
        LNTuningConfig(target_modules=["q_norm", "k_norm", "norm"]),
    ),
    "bitfit": (BIASED, dict(type="bitfit"), None),
    "train_only": (UNTIED, dict(type="train_only", parameters=r".*\.1\..*(v_proj|layernorm)\.weight|lm_head.*"), None),
}  # fmt: skip


def trained_names(block):
    """What BitFit and train_only let train, by name."""
    return re.compile(r".*\.bias" if block["type"] == "bitfit" else block["parameters"])


def build(base, block, config):
    if config is not None:
        config.task_type = "CAUSAL_LM"
        return get_peft_model(load_base(base), config)
    model = load_base(base)
    names = trained_names(block)
    for name, parameter in model.named_parameters():
        parameter.requires_grad = names.fullmatch(name) is not None
    return model


def make_kin(name, batches):
    base, block, config = KIN[name]
    folder = ROOT / "kin" / name
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    (folder / "method.json").write_text(json.dumps(dict(base=base, method=block), indent=1) + "\n")

    model = build(base, block, config)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=RATE, weight_decay=0.0)
    losses = []
    model.train()
    for ids in batches:
        logits = model(input_ids=ids, use_cache=False).logits
        loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    model.eval()
    input_ids = torch.randint(3, VOCAB, (1, LENGTH), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        logits = model(input_ids=input_ids, use_cache=False).logits
        change = (load_base(base)(input_ids=input_ids, use_cache=False).logits - logits).abs().max().item()
    expected = {"losses": torch.tensor(losses), "input_ids": input_ids, "logits": logits.contiguous()}
    save_file(expected, folder / "expected.safetensors")
    (folder / "expected.safetensors").chmod(0o644)
    if config is not None:
        model.save_pretrained(folder / "trained", save_embedding_layers=False)
        (folder / "trained/README.md").unlink()
        (folder / "trained/adapter_model.safetensors").chmod(0o644)
    count = sum(parameter.numel() for parameter in trained)
    print(f"{name}: {count} trained, loss {losses[0]:.3f} to {losses[-1]:.3f}, logits moved by {change:.2f}")


if __name__ == "__main__":
    torch.set_num_threads(1)
    os.chdir(ROOT)  # so that base_model_name_or_path is a relative path
    (ROOT / "kin").mkdir(exist_ok=True)
    batches = torch.randint(3, VOCAB, (STEPS, 2, LENGTH), generator=torch.Generator().manual_seed(11))
    save_file({"input_ids": batches}, ROOT / "kin/batches.safetensors")
    (ROOT / "kin/batches.safetensors").chmod(0o644)
    for name in sys.argv[1:] or KIN:
        make_kin(name, batches)
