"""Tiny random checkpoints of every model family, with the logits transformers computes for them.

Run: python make_families.py [NAME ...]      (torch, transformers 5, safetensors)

Writes next to this file, for each family:
  families/NAME/config.json, model.safetensors   the checkpoint, as `save_pretrained` writes it
  families/NAME/config_v4.json                   where listed in V4: the same config as transformers 4 spelt it
  families/NAME/expected.safetensors             input_ids i64 [2, T]
                                                 logits    f32 [2, T, V]   eager attention, no cache
                                                 greedy    i64 [1, 6 + 16] greedy continuation with cache
and rope_init.json: inverse frequencies and attention scaling of each rope type at realistic sizes.

Weights are drawn wide so that every feature of a family moves the logits: the script fails if switching the
feature off changes them by less than 0.05, or if a greedy choice is too close for another f32 implementation.
"""

import json
import shutil
import sys
import tempfile
import zlib
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    MistralConfig,
    Qwen2Config,
    Qwen3Config,
    SmolLM3Config,
)
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

ROOT = Path(__file__).resolve().parent
PROMPT, NEW = 6, 16

COMMON = dict(
    vocab_size=96, hidden_size=24, intermediate_size=12, num_hidden_layers=2, num_attention_heads=4,
    max_position_embeddings=64, bos_token_id=None, eos_token_id=None,
)  # fmt: skip


def rope(kind="default", theta=1000.0, **keys):
    return {"rope_parameters": {"rope_type": kind, "rope_theta": theta, **keys}}


PLAIN = rope()
SLIDING = dict(use_sliding_window=True, sliding_window=7)

# name: (config class, config, T, the same family with its feature off: config changes or a parameter-name suffix)
FAMILIES = {
    "llama": (LlamaConfig, dict(PLAIN, num_key_value_heads=4), 24, rope(theta=10.0)),
    "llama_gqa_tied": (
        LlamaConfig,
        dict(PLAIN, hidden_size=30, num_attention_heads=6, num_key_value_heads=3, head_dim=6, tie_word_embeddings=True),
        24,
        rope(theta=10.0),
    ),
    "llama_bias": (
        LlamaConfig,
        dict(PLAIN, num_key_value_heads=2, attention_bias=True, mlp_bias=True, tie_word_embeddings=True),
        24,
        "bias",
    ),
    "llama_rope_linear": (
        LlamaConfig,
        dict(rope("linear", factor=3.0), num_key_value_heads=2, tie_word_embeddings=True),
        24,
        PLAIN,
    ),
    "llama_rope_dynamic": (
        LlamaConfig,
        dict(rope("dynamic", factor=2.5), num_key_value_heads=1, max_position_embeddings=14, tie_word_embeddings=True),
        28,
        PLAIN,
    ),
    "llama_rope_yarn": (
        LlamaConfig,
        dict(
            rope("yarn", factor=4.0, original_max_position_embeddings=12),
            num_attention_heads=3, num_key_value_heads=1, head_dim=16, max_position_embeddings=48,
            tie_word_embeddings=True,
        ),
        28,
        PLAIN,
    ),
    "llama_rope_yarn_mscale": (
        LlamaConfig,
        dict(
            rope("yarn", factor=4.0, original_max_position_embeddings=12, mscale=1.4, mscale_all_dim=0.5,
                 beta_fast=4.0, beta_slow=0.5, truncate=False),
            num_attention_heads=2, num_key_value_heads=1, head_dim=16, max_position_embeddings=48,
            tie_word_embeddings=True,
        ),
        28,
        rope("yarn", factor=4.0, original_max_position_embeddings=12, beta_fast=4.0, beta_slow=0.5),
    ),
    "llama3": (
        LlamaConfig,
        dict(
            rope("llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=32),
            num_attention_heads=2, num_key_value_heads=1, head_dim=16, tie_word_embeddings=True,
        ),
        28,
        PLAIN,
    ),
    "mistral_window": (
        MistralConfig,
        dict(PLAIN, num_key_value_heads=2, head_dim=10, sliding_window=7),
        26,
        dict(sliding_window=None),
    ),
    "mistral_nowindow": (
        MistralConfig,
        dict(PLAIN, num_key_value_heads=1, sliding_window=None),
        24,
        dict(sliding_window=7),
    ),
    "qwen2": (
        Qwen2Config,
        dict(PLAIN, num_key_value_heads=1, use_sliding_window=False,
             sliding_window=7, max_window_layers=1, tie_word_embeddings=True),
        24,
        "bias",
    ),
    "qwen2_window": (
        Qwen2Config,
        dict(PLAIN, num_hidden_layers=3, num_key_value_heads=2, max_window_layers=2, **SLIDING),
        24,
        dict(layer_types=["full_attention", "sliding_attention", "sliding_attention"]),
    ),
    "qwen3": (Qwen3Config, dict(PLAIN, num_key_value_heads=2, head_dim=10), 24, "_norm.weight"),
    "qwen3_tied": (
        Qwen3Config,
        dict(PLAIN, num_attention_heads=6, num_key_value_heads=2, head_dim=6, tie_word_embeddings=True),
        24,
        "_norm.weight",
    ),
    "smollm3": (
        SmolLM3Config,
        dict(PLAIN, num_hidden_layers=3, num_key_value_heads=2, no_rope_layers=[1, 0, 1],
             pad_token_id=None),
        24,
        dict(no_rope_layers=[1, 1, 1]),
    ),
}  # fmt: skip

# Copies of another family's weights in another storage: (family, save dtype, save_pretrained arguments).
VARIANTS = {
    "llama_sharded": ("llama_gqa_tied", torch.float32, {"max_shard_size": "20KB"}),
    "llama_bf16": ("llama", torch.bfloat16, {}),
    "llama_f16": ("llama", torch.float16, {}),
}

# Families that also get a transformers-4 config, and the name that `rope_type` had in it.
V4 = {"llama3": "rope_type", "llama_rope_yarn": "rope_type", "llama_rope_linear": "type", "qwen2": "", "qwen2_window": ""}

# Rope settings at realistic sizes: (head_dim, max_position_embeddings, rope parameters, seq_len or None).
ROPE_CASES = {
    "default": (64, 2048, dict(rope_type="default", rope_theta=10000.0), None),
    "linear": (64, 4096, dict(rope_type="linear", rope_theta=10000.0, factor=2.0), None),
    "dynamic_short": (64, 2048, dict(rope_type="dynamic", rope_theta=10000.0, factor=4.0), 2048),
    "dynamic_long": (64, 2048, dict(rope_type="dynamic", rope_theta=10000.0, factor=4.0), 5000),
    "llama3": (64, 131072, dict(rope_type="llama3", rope_theta=500000.0, factor=32.0, low_freq_factor=1.0,
                                high_freq_factor=4.0, original_max_position_embeddings=8192), None),
    "yarn": (128, 131072, dict(rope_type="yarn", rope_theta=1000000.0, factor=4.0,
                               original_max_position_embeddings=32768), None),
    "yarn_no_truncate": (128, 131072, dict(rope_type="yarn", rope_theta=1000000.0, factor=4.0, truncate=False,
                                           original_max_position_embeddings=32768), None),
    "yarn_attention_factor": (64, 16384, dict(rope_type="yarn", rope_theta=10000.0, factor=8.0, attention_factor=1.3,
                                              original_max_position_embeddings=2048), None),
    "yarn_mscale": (64, 163840, dict(rope_type="yarn", rope_theta=10000.0, factor=40.0, mscale=0.707,
                                     mscale_all_dim=1.0, beta_fast=32, beta_slow=1,
                                     original_max_position_embeddings=4096), None),
    "yarn_mscale_alone": (64, 163840, dict(rope_type="yarn", rope_theta=10000.0, factor=40.0, mscale=0.707,
                                           original_max_position_embeddings=4096), None),
}  # fmt: skip


def draw_weights(model, seed):
    """Matrices N(0, 0.25), norm weights N(1, 0.2), biases N(0, 0.5)."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if name.endswith("bias"):
                parameter.copy_(0.5 * noise)
            elif "norm" in name:
                parameter.copy_(1.0 + 0.2 * noise)
            else:
                parameter.copy_(0.25 * noise)


def load(folder, **config):
    return AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager", **config
    ).eval()


@torch.no_grad()
def logits_of(folder, input_ids, switch_off=None):
    """Logits of a freshly loaded model (dynamic rope keeps state between calls)."""
    model = load(folder, **(switch_off if isinstance(switch_off, dict) else {}))
    if isinstance(switch_off, str):
        for name, parameter in model.named_parameters():
            if name.endswith(switch_off) and "layernorm" not in name:
                parameter.fill_(0.0 if switch_off == "bias" else 1.0)
    return model(input_ids, use_cache=False).logits


@torch.no_grad()
def greedy_of(folder, prompt, use_cache=True):
    """Greedy continuation and the smallest gap between the best and the second-best logit on the way."""
    model = load(folder)
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0
    out = model.generate(
        prompt, attention_mask=torch.ones_like(prompt), do_sample=False, max_new_tokens=NEW, use_cache=use_cache,
        output_logits=True, return_dict_in_generate=True,
    )  # fmt: skip
    best = torch.cat(out.logits).topk(2).values
    return out.sequences, (best[:, 0] - best[:, 1]).min().item()


def save(model, folder, **arguments):
    shutil.rmtree(folder, ignore_errors=True)
    model.save_pretrained(folder, **arguments)
    (folder / "generation_config.json").unlink(missing_ok=True)


def write_expected(folder, length, seed):
    """Draw input ids, write expected.safetensors; false if the greedy continuation is close to a tie or repetitive."""
    generator = torch.Generator().manual_seed(seed)
    input_ids = torch.randint(3, COMMON["vocab_size"], (2, length), generator=generator)
    sequences, gap = greedy_of(folder, input_ids[:1, :PROMPT])
    tensors = {"input_ids": input_ids, "logits": logits_of(folder, input_ids), "greedy": sequences}
    save_file({k: v.contiguous() for k, v in tensors.items()}, folder / "expected.safetensors")
    for file in folder.glob("*.safetensors"):
        file.chmod(0o644)
    if folder.name == "llama_rope_dynamic":  # cached keys keep the frequencies of their own step: pin that too
        without_cache, _ = greedy_of(folder, input_ids[:1, :PROMPT], use_cache=False)
        if torch.equal(without_cache, sequences):
            return False
    return gap > 0.05 and len(set(sequences[0, PROMPT:].tolist())) > NEW // 3


def write_v4_config(folder, type_key):
    """`rope_theta`, `rope_scaling` and `torch_dtype` in place of `rope_parameters` and `dtype`."""
    config = json.loads((folder / "config.json").read_text())
    scaling = config.pop("rope_parameters")
    config["rope_theta"] = scaling.pop("rope_theta")
    kind = scaling.pop("rope_type")
    config["rope_scaling"] = {type_key: kind, **scaling} if type_key else None
    config["torch_dtype"] = config.pop("dtype")
    config["transformers_version"] = "4.46.0"
    config.pop("layer_types", None)
    (folder / "config_v4.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")


def check_v4_config(folder, expected):
    with tempfile.TemporaryDirectory() as copy:
        shutil.copy(folder / "config_v4.json", Path(copy) / "config.json")
        shutil.copy(folder / "model.safetensors", copy)
        assert torch.equal(logits_of(copy, expected["input_ids"]), expected["logits"]), folder.name


def seeds(name):
    first = zlib.crc32(name.encode()) % 10000
    yield from range(first, first + 200)
    raise SystemExit(f"{name}: no seed gives a clear greedy continuation")


def make_family(name):
    config_class, config, length, switch_off = FAMILIES[name]
    folder = ROOT / "families" / name
    for seed in seeds(name):
        model = AutoModelForCausalLM.from_config(config_class(**{**COMMON, **config}), dtype=torch.float32)
        draw_weights(model, seed)
        save(model, folder)
        if write_expected(folder, length, seed):
            break
    expected = load_file(folder / "expected.safetensors")
    change = (logits_of(folder, expected["input_ids"], switch_off) - expected["logits"]).abs().max().item()
    assert change > 0.05, f"{name}: its feature changes the logits by {change} only"
    if name in V4:
        write_v4_config(folder, V4[name])
        check_v4_config(folder, expected)
    print(f"{name}: seed {seed}, the feature moves logits by {change:.2f}")


def make_variant(name):
    source, dtype, arguments = VARIANTS[name]
    folder = ROOT / "families" / name
    model = load(ROOT / "families" / source).to(dtype)
    model.config.dtype = dtype
    save(model, folder, **arguments)
    seed = next(seed for seed in seeds(name) if write_expected(folder, 16, seed))
    print(f"{name}: from {source}, seed {seed}")


def make_rope_init():
    cases = {}
    for name, (head_dim, max_positions, parameters, seq_len) in ROPE_CASES.items():
        config = LlamaConfig(
            head_dim=head_dim, max_position_embeddings=max_positions, rope_parameters=dict(parameters)
        )
        if parameters["rope_type"] == "default":
            exponents = torch.arange(0, head_dim, 2, dtype=torch.float) / head_dim
            inv_freq, scaling = 1.0 / parameters["rope_theta"] ** exponents, 1.0
        else:
            inv_freq, scaling = ROPE_INIT_FUNCTIONS[parameters["rope_type"]](config, seq_len=seq_len)
        cases[name] = {
            "head_dim": head_dim,
            "max_position_embeddings": max_positions,
            "rope_parameters": parameters,
            "seq_len": seq_len,
            "inv_freq": [float(f"{value:.9g}") for value in inv_freq.tolist()],
            "attention_scaling": scaling,
        }
    lines = ",\n".join(f"  {json.dumps(name)}: {json.dumps(case)}" for name, case in cases.items())
    (ROOT / "rope_init.json").write_text(f"{{\n{lines}\n}}\n")


if __name__ == "__main__":
    torch.set_num_threads(1)
    wanted = sys.argv[1:] or [*FAMILIES, *VARIANTS]
    for family in wanted:
        make_family(family) if family in FAMILIES else make_variant(family)
    make_rope_init()
