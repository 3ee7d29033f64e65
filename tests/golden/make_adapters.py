"""PEFT LoRA adapters in every spelling of the configuration, with the logits PEFT computes with them.

Run: PYTHONHASHSEED=0 python make_adapters.py [NAME ...]     after make_families.py
(torch, transformers 5, peft; the hash seed fixes the order in which PEFT writes `target_modules`)

Writes next to this file, for each adapter:
  adapters/NAME/adapter_config.json, adapter_model.safetensors    as `save_pretrained` writes them, A and B random
  adapters/NAME/expected.safetensors     input_ids i64 [1, T], logits f32 [1, T, V] of base + adapter;
                                         where listed in MERGED also merged_logits f32, after `merge_and_unload`
"""

import os
import shutil
import sys
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

ROOT = Path(__file__).resolve().parent
TIED, UNTIED, BIASED = "families/llama_gqa_tied", "families/llama", "families/llama_bias"
LENGTH, VOCAB = 12, 96

# name: (base, LoraConfig arguments)
ADAPTERS = {
    "qv": (TIED, dict(r=4, lora_alpha=6, target_modules=["q_proj", "v_proj"])),
    "qv_untied": (UNTIED, dict(r=4, lora_alpha=6, target_modules=["q_proj", "v_proj"])),
    "all_linear_rslora": (TIED, dict(r=3, lora_alpha=5, use_rslora=True, target_modules="all-linear")),
    # Mixed keys: a name, a dotted suffix, a regular expression. The first key in sorted order that matches wins.
    "patterns": (
        TIED,
        dict(
            r=4, lora_alpha=8, target_modules=["q_proj", "k_proj", "v_proj", "down_proj"],
            rank_pattern={"q_proj": 2, "layers.1.self_attn.v_proj": 6, r"model\.layers\.\d+\.mlp\.down_proj": 3},
            alpha_pattern={"down_proj": 12, r".*\.0\.self_attn\.(q|k)_proj": 2},
        ),
    ),
    "patterns_rslora": (
        UNTIED,
        dict(
            r=4, lora_alpha=8, use_rslora=True, target_modules=["q_proj", "o_proj"],
            rank_pattern={"o_proj": 2}, alpha_pattern={"layers.0.self_attn.q_proj": 3},
        ),
    ),
    "regex": (TIED, dict(r=4, lora_alpha=8, target_modules=r".*\.layers\.1\.(self_attn\.[qo]_proj|mlp\.up_proj)")),
    "exclude": (
        UNTIED,
        dict(
            r=4, lora_alpha=8, target_modules="all-linear",
            exclude_modules=["mlp.up_proj", "k_proj", "model.layers.1.self_attn.q_proj"],
        ),
    ),
    "layers_to_transform": (
        TIED, dict(r=4, lora_alpha=8, target_modules=["gate_proj", "q_proj"], layers_to_transform=[1]),
    ),
    "modules_to_save_head": (
        UNTIED, dict(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"], modules_to_save=["lm_head"]),
    ),
    "lora_head": (UNTIED, dict(r=4, lora_alpha=8, target_modules=["q_proj", "lm_head"])),
    "gaussian": (UNTIED, dict(r=4, lora_alpha=8, target_modules=["k_proj", "down_proj"], init_lora_weights="gaussian")),
    "layers_pattern": (
        UNTIED,
        dict(r=4, lora_alpha=8, target_modules=["up_proj", "v_proj"], layers_to_transform=0, layers_pattern="layers"),
    ),
    # DoRA: magnitudes of the rows (of the columns for an embedding).
    "dora": (BIASED, dict(r=4, lora_alpha=6, use_dora=True, target_modules=["q_proj", "o_proj", "down_proj"])),
    "dora_rslora_embedding": (
        UNTIED, dict(r=3, lora_alpha=5, use_dora=True, use_rslora=True, target_modules=["embed_tokens", "v_proj"]),
    ),
    "bias_all": (BIASED, dict(r=4, lora_alpha=8, bias="all", target_modules=["q_proj", "up_proj"])),
    "bias_lora_only": (BIASED, dict(r=4, lora_alpha=8, bias="lora_only", target_modules=["q_proj", "up_proj"])),
    "lora_bias": (BIASED, dict(r=4, lora_alpha=8, lora_bias=True, target_modules=["q_proj", "v_proj"])),
    "embedding": (UNTIED, dict(r=4, lora_alpha=8, target_modules=["q_proj", "embed_tokens"])),
    # One weight at both ends of the model: the two ends part unless `ensure_weight_tying`.
    "embedding_parted": (TIED, dict(r=4, lora_alpha=8, target_modules=["q_proj", "embed_tokens"])),
    "head_parted": (TIED, dict(r=4, lora_alpha=8, target_modules=["q_proj", "lm_head"])),
    "both_parted": (TIED, dict(r=4, lora_alpha=8, target_modules=["lm_head", "embed_tokens"])),
    "embedding_tied": (
        TIED, dict(r=4, lora_alpha=8, target_modules=["q_proj", "embed_tokens"], ensure_weight_tying=True),
    ),
    "saved_embedding_parted": (
        TIED, dict(r=4, lora_alpha=8, target_modules=["q_proj"], modules_to_save=["embed_tokens"]),
    ),
    "saved_head_parted": (TIED, dict(r=4, lora_alpha=8, target_modules=["q_proj"], modules_to_save=["lm_head"])),
    "saved_embedding_tied": (
        TIED,
        dict(r=4, lora_alpha=8, target_modules=["q_proj"], modules_to_save=["embed_tokens"], ensure_weight_tying=True),
    ),
    "saved_head_tied": (
        TIED,
        dict(r=4, lora_alpha=8, target_modules=["q_proj"], modules_to_save=["lm_head"], ensure_weight_tying=True),
    ),
    "tokens": (UNTIED, dict(r=4, lora_alpha=8, target_modules=["q_proj"], trainable_token_indices=[5, 17, 90])),
    "tokens_tied": (TIED, dict(r=4, lora_alpha=8, target_modules=["q_proj"], trainable_token_indices=[5, 17, 90])),
    "tokens_by_module": (
        UNTIED,
        dict(
            r=4, lora_alpha=8, target_modules=["q_proj"],
            trainable_token_indices={"embed_tokens": [7, 3], "lm_head": [90]},
        ),
    ),
}  # fmt: skip
MERGED = {"patterns", "all_linear_rslora", "dora", "embedding"}


def load_base(base):
    return AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32, attn_implementation="eager").eval()


def draw_weights(model, seed):
    """A and B from N(0, 0.2), and noise on modules that are trained whole."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = 0.2 * torch.randn(parameter.shape, generator=generator)
            if "lora_magnitude_vector" in name:
                parameter.mul_(1 + noise)
            elif "lora_" in name:
                parameter.copy_(noise)
            elif "modules_to_save" in name or "trainable_tokens" in name or parameter.requires_grad:
                parameter.add_(noise)


@torch.no_grad()
def make_adapter(name, seed):
    base, arguments = ADAPTERS[name]
    folder = ROOT / "adapters" / name
    shutil.rmtree(folder, ignore_errors=True)
    model = get_peft_model(load_base(base), LoraConfig(task_type="CAUSAL_LM", lora_dropout=0.0, **arguments))
    draw_weights(model, seed)
    model.eval().save_pretrained(folder)
    (folder / "README.md").unlink()
    (folder / "adapter_model.safetensors").chmod(0o644)

    input_ids = torch.randint(3, VOCAB, (1, LENGTH), generator=torch.Generator().manual_seed(seed))
    logits = model(input_ids, use_cache=False).logits
    reloaded = PeftModel.from_pretrained(load_base(base), folder).eval()
    assert torch.equal(reloaded(input_ids, use_cache=False).logits, logits), f"{name}: reloads differently"
    change = (load_base(base)(input_ids, use_cache=False).logits - logits).abs().max().item()
    assert change > 0.5, f"{name}: the adapter moves the logits by {change} only"

    expected = {"input_ids": input_ids, "logits": logits}
    if name in MERGED:
        expected["merged_logits"] = model.merge_and_unload()(input_ids, use_cache=False).logits
    save_file(expected, folder / "expected.safetensors")
    (folder / "expected.safetensors").chmod(0o644)
    print(f"{name}: the adapter moves the logits by {change:.2f}")


if __name__ == "__main__":
    torch.set_num_threads(1)
    os.chdir(ROOT)  # so that base_model_name_or_path is a relative path
    for name in sys.argv[1:] or ADAPTERS:
        make_adapter(name, seed=100 + list(ADAPTERS).index(name))
