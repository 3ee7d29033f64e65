"""Twenty training steps of every kind of PEFT LoRA on the families' checkpoints, with the logits they end at.

Run: PYTHONHASHSEED=0 python make_variants.py [NAME ...]     after make_families.py
(torch, transformers 5, peft; the hash seed fixes the order in which PEFT writes lists of names)

Writes next to this file, for each variant:
  variants/NAME/method.json           the recipe's method block
  variants/NAME/initial/              the adapter before training, as `save_pretrained` writes it
  variants/NAME/expected.safetensors  losses f32 [20] before each update, input_ids i64 [1, T] and logits f32 [1, T, V]
                                      after training
and once
  variants/batches.safetensors        input_ids i64 [20, 2, T]: a batch of two sequences a step, all tokens supervised

AdamW without weight decay at a constant rate, no clipping.
"""

import json
import os
import shutil
import sys
from pathlib import Path

import peft.optimizers.lorafa
import torch
import torch.nn.functional as F
from make_adapters import BIASED, TIED, UNTIED, load_base
from peft import LoraConfig, get_peft_model
from peft.optimizers import create_lorafa_optimizer, create_loraplus_optimizer
from safetensors.torch import save_file

# On machines that have it, PEFT computes LoRA-FA's gradient in bfloat16 whatever the model's type.
peft.optimizers.lorafa.is_bf16_available = lambda: False

ROOT = Path(__file__).resolve().parent
STEPS, LENGTH, VOCAB, RATE = 20, 12, 96, 1e-2

# name: (base, LoraConfig arguments, keys of the recipe alone)
VARIANTS = {
    "lora": (TIED, dict(target_modules=["q_proj", "v_proj", "down_proj"]), {}),
    "rslora": (UNTIED, dict(target_modules="all-linear", use_rslora=True), {}),
    "dora": (BIASED, dict(target_modules=["q_proj", "o_proj", "down_proj"], use_dora=True), {}),
    "dora_embedding": (UNTIED, dict(target_modules=["embed_tokens", "v_proj"], use_dora=True), {}),
    "bias_all": (BIASED, dict(target_modules=["q_proj", "up_proj"], bias="all"), {}),
    "bias_lora_only": (BIASED, dict(target_modules=["q_proj", "up_proj"], bias="lora_only"), {}),
    "lora_bias": (BIASED, dict(target_modules=["q_proj", "v_proj"], lora_bias=True), {}),
    "layers_to_transform": (TIED, dict(target_modules=["q_proj", "up_proj"], layers_to_transform=[1]), {}),
    "embedding": (UNTIED, dict(target_modules=["q_proj", "embed_tokens"]), {}),
    "embedding_parted": (
        TIED, dict(target_modules=["q_proj", "embed_tokens"]), dict(ensure_weight_tying=False),
    ),
    "head_parted": (TIED, dict(target_modules=["q_proj", "lm_head"]), dict(ensure_weight_tying=False)),
    "embedding_tied": (TIED, dict(target_modules=["q_proj", "embed_tokens"], ensure_weight_tying=True), {}),
    "saved_head_parted": (
        TIED, dict(target_modules=["q_proj"], modules_to_save=["lm_head"]), dict(ensure_weight_tying=False),
    ),
    "saved_embedding_tied": (
        TIED, dict(target_modules=["q_proj"], modules_to_save=["embed_tokens"], ensure_weight_tying=True), {},
    ),
    "tokens": (UNTIED, dict(target_modules=["q_proj"], trainable_token_indices=[5, 17, 90]), {}),
    "tokens_tied": (TIED, dict(target_modules=["q_proj"], trainable_token_indices=[5, 17, 90]), {}),
    "tokens_by_module": (
        UNTIED,
        dict(target_modules=["q_proj"], trainable_token_indices={"embed_tokens": [7, 3], "lm_head": [90, 4]}),
        {},
    ),
    "loraplus": (TIED, dict(target_modules=["q_proj", "v_proj", "down_proj"]), dict(loraplus_lr_ratio=4.0)),
    "loraplus_embedding": (
        UNTIED,
        dict(target_modules=["q_proj", "embed_tokens"], use_dora=True),
        dict(loraplus_lr_ratio=4.0, loraplus_lr_embedding=3e-3),
    ),
    "lora_fa": (UNTIED, dict(target_modules=["q_proj", "v_proj", "down_proj"]), dict(lora_fa=True)),
}  # fmt: skip


def join_ends(model):
    """Where embedding and head share a change, PEFT gives each end a gradient and an optimizer step of its own on the same
    memory. The reference is one step along the sum: adds the head's gradients to the embedding's and drops them."""
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    pairs = [
        (embedding.lora_embedding_A["default"], head.lora_B["default"].weight),
        (embedding.lora_embedding_B["default"], head.lora_A["default"].weight),
    ]
    for ours, theirs in pairs:
        ours.grad += theirs.grad.t()
        theirs.grad = None


def optimizer_for(model, keys):
    if "lora_fa" in keys:
        optimizer = create_lorafa_optimizer(model=model, r=4, lora_alpha=6, lr=RATE)
        # It adds ε to the root before the bias correction, PyTorch's AdamW after it; a vanishing one is the same.
        optimizer.param_groups[0]["eps"] = 1e-12
        return optimizer
    if "loraplus_lr_ratio" in keys:
        return create_loraplus_optimizer(model, torch.optim.AdamW, lr=RATE, eps=1e-8, betas=(0.9, 0.999), **keys)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return torch.optim.AdamW(trained, lr=RATE, weight_decay=0.0)


def make_batches():
    return torch.randint(3, VOCAB, (STEPS, 2, LENGTH), generator=torch.Generator().manual_seed(7))


def make_variant(name, batches):
    base, arguments, keys = VARIANTS[name]
    folder = ROOT / "variants" / name
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    block = dict(type="lora", r=4, lora_alpha=6, **{**arguments, **keys})
    (folder / "method.json").write_text(json.dumps(dict(base=base, method=block), indent=1) + "\n")

    torch.manual_seed(list(VARIANTS).index(name))
    model = get_peft_model(
        load_base(base), LoraConfig(task_type="CAUSAL_LM", r=4, lora_alpha=6, lora_dropout=0.0, **arguments)
    )
    model.save_pretrained(folder / "initial")
    (folder / "initial/README.md").unlink()
    (folder / "initial/adapter_model.safetensors").chmod(0o644)

    optimizer = optimizer_for(model, keys)
    losses = []
    model.train()
    for ids in batches:
        logits = model(input_ids=ids, use_cache=False).logits
        loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        if name == "embedding_tied":
            join_ends(model)
        optimizer.step()
    model.eval()
    input_ids = torch.randint(3, VOCAB, (1, LENGTH), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        logits = model(input_ids=input_ids, use_cache=False).logits
        change = (load_base(base)(input_ids=input_ids, use_cache=False).logits - logits).abs().max().item()
    expected = {"losses": torch.tensor(losses), "input_ids": input_ids, "logits": logits.contiguous()}
    save_file(expected, folder / "expected.safetensors")
    (folder / "expected.safetensors").chmod(0o644)
    print(f"{name}: loss {losses[0]:.3f} to {losses[-1]:.3f}, logits moved by {change:.2f}")


if __name__ == "__main__":
    torch.set_num_threads(1)
    os.chdir(ROOT)  # so that base_model_name_or_path is a relative path
    (ROOT / "variants").mkdir(exist_ok=True)
    batches = make_batches()
    save_file({"input_ids": batches}, ROOT / "variants/batches.safetensors")
    (ROOT / "variants/batches.safetensors").chmod(0o644)
    for name in sys.argv[1:] or VARIANTS:
        make_variant(name, batches)
