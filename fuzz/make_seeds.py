"""Writes the seed corpora: python3 fuzz/make_seeds.py [OUT, by default fuzz/corpus]. Needs Python alone.

Seeds come from tests/golden, recipes and the tests' own template cases, and from a few small files written here.
"""

import base64
import json
import struct
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
OUT = Path(sys.argv[1]) if len(sys.argv) > 1 else ROOT / "fuzz/corpus"
PART = b"\n=====\n"
GOLDEN = ROOT / "tests/golden"


def seed(target, name, content):
    folder = OUT / target
    folder.mkdir(parents=True, exist_ok=True)
    (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode())


def read(path):
    return (ROOT / path).read_bytes()


def safetensors(tensors, metadata=None):
    """`tensors`: name to (dtype, shape, bytes)."""
    header, data = {}, b""
    if metadata is not None:
        header["__metadata__"] = metadata
    for name, (dtype, shape, content) in tensors.items():
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [len(data), len(data) + len(content)]}
        data += content
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


ONE = safetensors({"a": ("F32", [2], b"\0\0\x80\x3f" * 2), "b": ("BF16", [1, 3], b"\x80\x3f" * 3)}, {"format": "pt"})
TWO = safetensors({"c": ("F16", [], b"\0\x3c"), "d": ("I64", [0], b"")})

# One file.
seed("safetensors_border", "one", ONE)
seed("safetensors_border", "two", TWO)
seed("safetensors_border", "f64", safetensors({"x": ("F64", [1], b"\0" * 8), "y": ("F8_E4M3", [1], b"\x38")}))
seed("safetensors_border", "zip", b"PK\x03\x04\0\0\x08\x08" + b"\0" * 30)
seed("safetensors_border", "pickle", b"\x80\x02}q\0.")
seed("safetensors_border", "lfs", b"version https://git-lfs.github.com/spec/v1\n")
for adapter in ["qv", "patterns"]:
    seed("safetensors_border", adapter, read(f"tests/golden/adapters/{adapter}/adapter_model.safetensors"))

# A folder: config, index, two files.
config = b'{"architectures": ["LlamaForCausalLM"]}'
index = {"metadata": {"total_size": 16}, "weight_map": {"a": "a.safetensors", "b": "a.safetensors", "c": "b.safetensors"}}
seed("checkpoint_index", "sharded", PART.join([config, json.dumps(index).encode(), ONE, TWO]))
seed("checkpoint_index", "single", PART.join([config, b"", ONE, TWO]))
for shard in ["../a.safetensors", "/etc/a.safetensors", "a\\b.safetensors", "x/./a.safetensors", "pytorch_model.bin"]:
    index = json.dumps({"weight_map": {"a": shard}}).encode()
    seed("checkpoint_index", f"shard_{base64.b32encode(shard.encode()).decode()[:12]}", PART.join([config, index, ONE, TWO]))

# Adapters, small enough for the fuzzer to change them.
for folder in sorted((GOLDEN / "adapters").iterdir()):
    if (folder / "adapter_config.json").is_file():
        config = json.loads((folder / "adapter_config.json").read_bytes())
        config = {key: value for key, value in config.items() if value not in (None, False, {}, [])}
        weights = (folder / "adapter_model.safetensors").read_bytes()
        seed("adapter_config", folder.name, PART.join([json.dumps(config).encode(), weights]))

# Recipes.
for path in sorted((ROOT / "recipes").rglob("*.yaml")) + [GOLDEN / "trajectory.yaml"]:
    seed("recipe", path.stem, path.read_bytes() + PART + b"method.r=4\ndatasets.0.limit=2\nseed=1\n")
seed(
    "recipe",
    "full",
    "base_model: b\nmethod: {type: full}\ndatasets: [{path: d.jsonl, type: messages, limit: 3}]\n"
    "optimizer: {type: adamw, betas: [0.9, 0.95], eps: 1e-8}\nmax_grad_norm: null\nval_set_size: 0.1\n",
)
seed("recipe", "anchors", "a: &a [1, 2]\nbase_model: &b m\ndatasets: [{path: *b, type: alpaca}]\n<<: {seed: 1}\n")

# Data: the first byte is format + 6·type + 24·truncation (see the target).
talk = '[{"messages": [{"role": "user", "content": "u"}, {"role": "assistant", "content": "a"}]}]'
share = '{"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]}\n'
seed("dataset_records", "alpaca.json", b"\x00" + b'{"data": [{"instruction": "Add.", "input": "1+1", "output": "2"}]}')
seed("dataset_records", "messages.json", b"\x0c" + talk.encode())
seed("dataset_records", "sharegpt.jsonl", b"\x0d" + share.encode() * 2)
seed("dataset_records", "pairs.jsonl", b"\x07" + b'{"prompt": "x:", "completion": "y"}\n\n' * 2)
seed("dataset_records", "pairs.csv", b"\x08" + b'prompt,completion\n"a, ""b""\nc",d\n')
seed("dataset_records", "pairs.tsv", b"\x09" + b"prompt\tcompletion\n\"a\tb\n")
seed("dataset_records", "text.txt", b"\x17" + b"one\n\n  two\r\n")
seed("dataset_records", "separated.txt", bytes([23 + 6 * 20]) + b"one\nmore\n<|end|>\ntwo\n<|end|>\n")
parquet = {"pairs": 10, "talk": 16, "texts": 22}
for name, choice in parquet.items():
    seed("dataset_records", f"{name}.parquet", bytes([choice]) + read(f"fuzz/seeds/{name}.parquet"))

# Templates: those that the tests compare with Python's engine.
cases = json.loads(read("peft-core/src/text/chat_cases.json"))
for number, template in enumerate(sorted({case["template"] for case in cases})):
    seed("template_render", f"case_{number:03}", template)
for name, text in {
    "repeat": "{{ 'x' * 1000 * 1000 }}",
    "pad": "{{ 'x'.center(99999999) }}{{ 'x' | indent(9999999) }}",
    "double": "{% set ns = namespace(a='xx') %}{% for i in range(99) %}{% set ns.a = ns.a ~ ns.a %}{% endfor %}",
    "macro": "{% macro f(x) %}{{ f(x) }}{% endmacro %}{{ f(1) }}",
    "range": "{{ range(99999) | list | tojson(indent=9) }}",
    "replace": "{{ ('x' * 9999).replace('x', 'y' * 9999) }}",
}.items():
    seed("template_render", name, text)

# Tokenizers: small ones of each kind.
byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
added = [{"id": i, "content": t, "single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True} for i, t in enumerate(["<s>", "</s>"])]
models = {
    "bpe": {"type": "BPE", "vocab": {"<s>": 0, "</s>": 1, "a": 2, "b": 3, "ab": 4, "H": 5, "e": 6, "l": 7}, "merges": [["a", "b"]], "unk_token": "<s>", "byte_fallback": True},
    "wordlevel": {"type": "WordLevel", "vocab": {"<s>": 0, "</s>": 1, "a": 2, "Hello": 3}, "unk_token": "<s>"},
    "wordpiece": {"type": "WordPiece", "vocab": {"<s>": 0, "</s>": 1, "a": 2, "##b": 3}, "unk_token": "<s>", "continuing_subword_prefix": "##", "max_input_chars_per_word": 100},
    "unigram": {"type": "Unigram", "unk_id": 0, "vocab": [["<s>", 0.0], ["</s>", 0.0], ["a", -1.5], ["▁H", -2.0]], "byte_fallback": False},
}
pipelines = {
    "plain": {},
    "byte_level": {"pre_tokenizer": byte_level, "decoder": byte_level, "post_processor": byte_level},
    "metaspace": {
        "normalizer": {"type": "Sequence", "normalizers": [{"type": "NFKC"}, {"type": "Prepend", "prepend": "▁"}, {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}]},
        "pre_tokenizer": {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "first", "split": True},
        "decoder": {"type": "Sequence", "decoders": [{"type": "Replace", "pattern": {"String": "▁"}, "content": " "}, {"type": "ByteFallback"}, {"type": "Fuse"}, {"type": "Strip", "content": " ", "start": 1, "stop": 0}]},
    },
    "split": {
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [{"type": "Split", "pattern": {"Regex": "(?i:'s|'t)|\\p{L}+|\\s+(?!\\S)|\\s+"}, "behavior": "Isolated", "invert": False}, {"type": "Digits", "individual_digits": True}]},
        "post_processor": {"type": "TemplateProcessing", "single": [{"SpecialToken": {"id": "<s>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}], "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}], "special_tokens": {"<s>": {"id": "<s>", "ids": [0], "tokens": ["<s>"]}}},
    },
}
names = json.dumps({"bos_token": "<s>", "eos_token": {"content": "</s>"}, "add_bos_token": True, "chat_template": [{"name": "default", "template": "{{ messages }}"}]})
for model_name, model in models.items():
    for pipeline_name, pipeline in pipelines.items():
        tokenizer = {"version": "1.0", "truncation": None, "padding": None, "added_tokens": added, "normalizer": None, "pre_tokenizer": None, "post_processor": None, "decoder": None} | pipeline | {"model": model}
        seed("tokenizer_json", f"{model_name}_{pipeline_name}", json.dumps(tokenizer).encode() + PART + names.encode())

# Configurations.
for folder in sorted((GOLDEN / "families").iterdir()):
    seed("model_config", folder.name, (folder / "config.json").read_bytes())
