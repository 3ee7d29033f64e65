"""What `transformers` makes of published chat templates: texts, and which tokens the assistant wrote.

    python make_templates.py --published FOLDER          (transformers; writes templates/*.json)
    python make_templates.py --show NAME CASE            (prints one text)

FOLDER holds the templates as published, NAME.jinja each; see templates/LICENSES.md for where they come from. Those whose
licence allows it lie in templates/, for the others templates/own/ has one of ours that writes the same: this script fails
unless it does, on every case and every conversation.

The masks come from `return_assistant_tokens_mask` on a copy of the template with {% generation %} around what the
assistant writes: in our own templates the comments {#<#} and {#>#} stand there, in the others `ANNOTATE` puts them. The
tokenizer is the quickstart's with all the templates' special tokens added.
"""

import argparse
import datetime
import hashlib
import json
import random
import re
from pathlib import Path

import jinja2
import transformers.utils.chat_template_utils as chat_template_utils
from transformers import PreTrainedTokenizerFast

HERE = Path(__file__).parent / "templates"
QUICKSTART = Path(__file__).parents[2] / "recipes/quickstart/base/tokenizer.json"
# 29 February 2024, 13:05:09 UTC
NOW = 1_709_211_909

SPECIAL = [
    "<|im_start|>", "<|im_end|>", "<|im_sep|>", "<|endoftext|>", "<|begin_of_text|>", "<|start_header_id|>",
    "<|end_header_id|>", "<|eot_id|>", "<|eom_id|>", "<|python_tag|>", "<bos>", "<eos>", "<start_of_turn>",
    "<end_of_turn>", "<|system|>", "<|user|>", "<|assistant|>", "<|end|>",
]  # fmt: skip
LLAMA = {"bos": "<|begin_of_text|>", "eos": "<|eot_id|>", "stops": ["<|eot_id|>", "<|eom_id|>"]}
QWEN = {"bos": None, "eos": "<|im_end|>", "stops": ["<|im_end|>"]}
GEMMA = {"bos": "<bos>", "eos": "<eos>", "stops": ["<eos>", "<end_of_turn>"]}
MISTRAL = {"bos": "<s>", "eos": "</s>", "stops": ["</s>"]}
PHI = {"bos": "<s>", "eos": "<|endoftext|>", "stops": ["<|endoftext|>", "<|end|>"]}
# Special tokens; whether conversations with a system message and with tools are among those for the masks.
TEMPLATES = {
    "llama3": LLAMA | {"system": True, "tools": False},
    "llama3.1": LLAMA | {"system": True, "tools": True},
    "llama3.2": LLAMA | {"system": True, "tools": True},
    "qwen2.5": QWEN | {"system": True, "tools": True},
    "qwen3": QWEN | {"system": True, "tools": True},
    "qwen3-first": QWEN | {"system": True, "tools": True},
    "mistral-v0.1": MISTRAL | {"system": False, "tools": False},
    "mistral-v0.3": MISTRAL | {"system": True, "tools": True},
    "mistral-nemo": MISTRAL | {"system": True, "tools": True},
    "smollm2": QWEN | {"bos": "<|im_start|>", "system": True, "tools": False},
    "smollm3": QWEN | {"system": True, "tools": False},
    "gemma2": GEMMA | {"system": False, "tools": False},
    "gemma3": GEMMA | {"system": True, "tools": False},
    "phi3": PHI | {"system": True, "tools": False},
    "phi3.5": PHI | {"system": True, "tools": False},
    "phi4": QWEN | {"system": True, "tools": False},
    "phi4-first": QWEN | {"system": True, "tools": False},
}

# For templates that are not ours: texts to replace, so that {#<#} and {#>#} stand around what the assistant writes.
QWEN_CALLS = [("{{- '<|im_end|>\\n' }}\n    {%- elif message.role == \"tool\"", "{{- '<|im_end|>' }}{#>#}{{- '\\n' }}\n    {%- elif message.role == \"tool\"")]
QWEN3 = QWEN_CALLS + [
    ("{{- '<|im_start|>' + message.role + '\\n<think>", "{{- '<|im_start|>' + message.role + '\\n' }}{#<#}{{- '<think>"),
    ("{{- '<|im_start|>' + message.role + '\\n' + content }}", "{{- '<|im_start|>' + message.role + '\\n' }}{#<#}{{- content }}"),
]
PHI3 = [
    ("{{'<|assistant|>\n' + message['content'] + '<|end|>\n'}}", "{{'<|assistant|>\n'}}{#<#}{{message['content'] + '<|end|>'}}{#>#}{{'\n'}}"),
]
ANNOTATE = {
    "qwen2.5": QWEN_CALLS
    + [
        (' or (message.role == "assistant" and not message.tool_calls) %}', " %}"),
        ("{{- '<|im_start|>' + message.role }}\n        {%- if message.content %}\n            {{- '\\n' + message.content }}",
         "{{- '<|im_start|>' + message.role + '\\n' }}{#<#}\n        {%- if message.content or not message.tool_calls %}\n            {{- message.content }}"),
        ("{{- '\\n<tool_call>", "{{- ('\\n' if message.content or not loop.first else '') + '<tool_call>"),
    ],
    # A thought and an answer have one end in common, so the marks are made by a macro-free copy of both branches.
    "qwen3": QWEN3,
    "qwen3-first": QWEN3,
    "mistral-nemo": [
        ('{{- "[TOOL_CALLS][" }}', '{#<#}{{- "[TOOL_CALLS][" }}'),
        ("                {{- \"]\" + eos_token }}\n            {%- endif %}\n        {%- endfor %}", "                {{- \"]\" + eos_token }}\n            {%- endif %}\n        {%- endfor %}{#>#}"),
        ('{{- message["content"] + eos_token}}', '{#<#}{{- message["content"] + eos_token}}{#>#}'),
    ],
    "smollm2": [
        ("{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}",
         "{{'<|im_start|>' + message['role'] + '\n'}}{% if message['role'] == 'assistant' %}{#<#}{{message['content'] + '<|im_end|>'}}{#>#}"
         "{% else %}{{message['content'] + '<|im_end|>'}}{% endif %}{{'\n'}}"),
    ],
    "phi3": PHI3,
    "phi3.5": PHI3,
}  # fmt: skip


def annotated(name, source):
    for old, new in ANNOTATE.get(name, []):
        assert old in source, (name, old)
        source = source.replace(old, new)
    if name.startswith("qwen3"):
        # The marks begin in three branches and end after them: one block around all, headers before it.
        begin = source.index("        {%- if loop.index0 > ns.last_query_index %}")
        source = source[:begin] + "        {{- '<|im_start|>' + message.role + '\\n' }}{#<#}\n" + source[begin:]
        source = source.replace("{{- '<|im_start|>' + message.role + '\\n' }}{#<#}{{- ", "{{- ")
    return source.replace("{#<#}", "{% generation %}").replace("{#>#}", "{% endgeneration %}")


def tokenizer(name):
    spec = TEMPLATES[name]
    result = PreTrainedTokenizerFast(
        tokenizer_file=str(QUICKSTART), bos_token=spec["bos"], eos_token=spec["eos"], clean_up_tokenization_spaces=False
    )
    result.add_special_tokens({"additional_special_tokens": SPECIAL})
    return result


# ── cases for the texts

U = lambda content, **more: {"role": "user", "content": content, **more}
A = lambda content, **more: {"role": "assistant", "content": content, **more}
S = lambda content: {"role": "system", "content": content}
P = lambda *texts: [{"type": "text", "text": text} for text in texts]


def call(name, arguments, id="abcdefghi"):
    return {"type": "function", "id": id, "function": {"name": name, "arguments": arguments}}


def result(content, **more):
    return {"role": "tool", "tool_call_id": "abcdefghi", "name": "weather", "content": content, **more}


TOOLS = [
    {"type": "function", "function": {"name": "weather", "description": 'Größe & "Wetter" <b>', "parameters": {
        "type": "object", "properties": {"city": {"type": "string", "enum": ["Köln", "東京"]}, "days": {"type": "integer", "default": 1.5}},
        "required": ["city"]}}},
    {"type": "function", "function": {"name": "now", "description": "", "parameters": {"type": "object", "properties": {}}, "return": {"type": "string"}}},
]  # fmt: skip
TALK = [S("Be brief."), U("Hi"), A("Hello!"), U("Bye")]
THINK = [U("1+1?"), A("<think>\nadd\n\n</think>\n\n2"), U("2+2?"), A("<think>\nmore\n</think>\n\n4")]
USE = [U("Weather?"), A("", tool_calls=[call("weather", {"city": "Köln", "days": 2})]), result('{"t": 7}'), A("7 degrees.")]


def cases():
    yield "user", [U("Hi")], {}
    yield "user prompt", [U("Hi")], {"add_generation_prompt": True}
    yield "system", TALK, {}
    yield "system prompt", TALK, {"add_generation_prompt": True}
    yield "answered", TALK[1:3], {}
    yield "long", [S("s")] + [m for i in range(7) for m in (U(f"q{i}"), A(f"a{i}"))], {"add_generation_prompt": True}
    yield "long without system", [m for i in range(5) for m in (U(f"q{i}"), A(f"a{i}"))], {}
    yield "empty answer", [U("q"), A(""), U("r")], {}
    yield "empty question", [U(""), A("a")], {}
    yield "empty system", [S(""), U("q"), A("a")], {"add_generation_prompt": True}
    yield "space", [S("  s \n"), U("\n\n q \t"), A(" a\n\n"), U(" "), A("\n")], {}
    yield "unicode", [U("Grüße, 東京 🦙 \u00a0e\u0301"), A("\u200bzwölf\u2028ß")], {"add_generation_prompt": True}
    yield "special tokens", [U("<|im_end|>\n<|im_start|>system\nx <|eot_id|></s>[INST]"), A("[/INST] <end_of_turn>{{ bos_token }}{% raw %}")], {}
    yield "quotes", [U("it's \"q\" \\n \\ {x}"), A("<b>&amp;</b>")], {}
    yield "same", [U("yes"), A("yes"), U("yes"), A("yes")], {}
    yield "roles", [U("user"), A("assistant"), U("system"), A("model")], {"add_generation_prompt": True}
    yield "two questions", [U("a"), U("b")], {}
    yield "two answers", [U("a"), A("b"), A("c")], {}
    yield "answer first", [A("a"), U("b")], {}
    yield "system later", [U("a"), S("b"), A("c")], {}
    yield "unknown role", [U("a"), {"role": "critic", "content": "b"}], {}
    yield "system alone", [S("only")], {"add_generation_prompt": True}
    yield "thoughts", THINK, {}
    yield "thoughts prompt", THINK[:3], {"add_generation_prompt": True}
    yield "no thinking", THINK[:3], {"add_generation_prompt": True, "enable_thinking": False}
    yield "no thinking answered", THINK, {"enable_thinking": False}
    yield "thinking", THINK[:1], {"add_generation_prompt": True, "enable_thinking": True}
    yield "reasoning", [U("q"), A("a", reasoning_content="\nwhy\n"), U("r"), A("b", thinking="because")], {}
    yield "reasoning null", [U("q"), A("a", reasoning_content=None, tool_calls=None)], {}
    yield "broken thought", [U("q"), A("<think>no end"), U("r"), A("no begin</think>x</think>y")], {}
    yield "/no_think", [S("Short. /no_think"), U("q"), A("\na")], {"add_generation_prompt": True}
    yield "/think override", [S("X /think /system_override"), U("q")], {"add_generation_prompt": True}
    yield "tools", [U("Weather?")], {"tools": TOOLS, "add_generation_prompt": True}
    yield "tools system", [S(" sys "), U(" Weather? ")], {"tools": TOOLS, "add_generation_prompt": True}
    yield "tools empty", [U("Weather?")], {"tools": [], "add_generation_prompt": True}
    yield "use", USE, {"tools": TOOLS}
    yield "use prompt", USE[:3], {"tools": TOOLS, "add_generation_prompt": True}
    yield "use without tools", USE, {}
    yield "use and talk", USE + [U("Thanks"), A("Welcome.")], {"tools": TOOLS}
    yield "two calls", [U("q"), A("let me", tool_calls=[call("a", {"x": 1}), call("b", {})]), result("r"), result("ü\n"), A("done")], {"tools": TOOLS}
    yield "call as text", [U("q"), A("", tool_calls=[call("a", '{"x": 1}')]), result("r")], {}
    yield "call with thought", [U("q"), A("<think>\nhm\n</think>\n\nwell", tool_calls=[call("a", {"ü": [None, True, 1e-7]})]), result("<tool_response>"), A("end")], {}
    yield "call bad id", [U("q"), A("", tool_calls=[call("a", {}, id="1")]), result("r")], {}
    yield "result object", [U("q"), A("", tool_calls=[call("a", {})]), result({"content": 3})], {}
    yield "custom tools", [U("q")], {"custom_tools": TOOLS[1:], "tools_in_user_message": False}
    yield "builtin tools", [U("q"), A("", tool_calls=[call("brave_search", {"query": "x"})]), result("r")], {"builtin_tools": ["brave_search", "code_interpreter"]}
    yield "date string", [U("q")], {"date_string": "1 Jan 2000", "add_generation_prompt": True}
    yield "documents", [U("q")], {"documents": [{"title": "t", "text": "x"}], "add_generation_prompt": True}
    yield "python tools", [U("q")], {"python_tools": "def f(): ...", "xml_tools": "<x>"}
    yield "parts", [U(P(" a ", "b")), A(P("c\n"))], {"add_generation_prompt": True}
    yield "parts system", [S(P("sys")), U(P("q"))], {}
    yield "image", [U([{"type": "image"}, *P("what?")]), A("a llama")], {}
    yield "other bos", [U("q")], {"bos_token": "<B>", "eos_token": "<E>"}
    yield "continue", [U("q"), A("Well, ")], {"continue_final_message": True}
    yield "continue trimmed", [U("q"), A(" Well")], {"continue_final_message": True}
    yield "continue thought", [U("q"), A("<think>\nhm")], {"continue_final_message": True}
    yield "continue parts", [U("q"), A(P("a", "b"))], {"continue_final_message": True}


def render(source, tok, messages, options):
    """The text, `!message` where the template refuses, `!` where it fails."""
    try:
        return tok.apply_chat_template(messages, chat_template=source, tokenize=False, **options)
    except jinja2.exceptions.TemplateError as error:
        refused = type(error) is jinja2.exceptions.TemplateError
        return f"!{error}" if refused else "!"
    except Exception:
        return "!"


# ── conversations for the masks

WORDS = (
    "yes no llama grazes über 東京 assistant user system model think Answer: 42 3.14 {x} <b> [INST] it's \"so\" a\n\nb "
    "end , . ; tool_call content null None über-lang Ärger naïve 🦙 \\n %s"
).split(" ")


def sentence(rng, most=7):
    text = " ".join(rng.choice(WORDS) for _ in range(rng.randint(1, most)))
    return rng.choice(["", "", "", " ", "\n"]) + text + rng.choice(["", "", "", " ", "\n", " \n\n"])


def answer(rng, earlier):
    kind = rng.random()
    if kind < 0.15:
        return f"<think>\n{sentence(rng)}\n</think>\n\n{sentence(rng)}"
    if kind < 0.18:
        return rng.choice(["", "?!", "…", " "])
    if kind < 0.21:
        return sentence(rng) + rng.choice(SPECIAL) + rng.choice(["", "x"])
    if kind < 0.35 and earlier:
        return rng.choice(earlier)
    return sentence(rng)


def plain_talk(rng):
    messages = [S(sentence(rng))] if rng.random() < 0.5 else []
    said = []
    for _ in range(rng.randint(1, 4)):
        messages.append(U(rng.choice(said) if said and rng.random() < 0.2 else sentence(rng)))
        messages.append(A(answer(rng, said)))
        said += [message["content"] for message in messages[-2:]]
    if rng.random() < 0.1:
        messages.pop()
    if len(messages) < 2 or not any(message["role"] == "assistant" for message in messages):
        messages.append(A("so"))
    return messages


def tool_talk(rng):
    messages = [S(sentence(rng))] if rng.random() < 0.3 else []
    for _ in range(rng.randint(1, 2)):
        messages.append(U(sentence(rng)))
        for _ in range(rng.randint(0, 2)):
            id = "".join(rng.choice("abcdefgh0123") for _ in range(9))
            arguments = {rng.choice(["city", "größe", "n"]): rng.choice(["Köln", 3, [1, None], "yes", ""]) for _ in range(rng.randint(0, 2))}
            messages.append(A("", tool_calls=[call(rng.choice(["weather", "now", "user"]), arguments, id)]))
            messages.append({"role": "tool", "tool_call_id": id, "content": sentence(rng)})
        messages.append(A(answer(rng, [])))
    return messages


def conversations():
    rng = random.Random(20240229)
    return {"plain": [plain_talk(rng) for _ in range(200)], "tools": [tool_talk(rng) for _ in range(60)]}


def chosen(spec, talks):
    """The 200 conversations of a template."""
    talks = talks["plain"][:140] + talks["tools"] if spec["tools"] else talks["plain"]
    if not spec["system"]:
        talks = [[message for message in talk if message["role"] != "system"] for talk in talks]
    return talks


def digest(text):
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def masks(name, source, talks):
    """For each conversation the number of supervised tokens and a hash of text and positions; the text's `!…` otherwise."""
    tok = tokenizer(name)
    marked = annotated(name, source)
    out = []
    for talk in chosen(TEMPLATES[name], talks):
        text = render(source, tok, talk, {})
        assert text == render(marked, tok, talk, {}), (name, talk, text, render(marked, tok, talk, {}))
        if text.startswith("!"):
            out.append(text)
            continue
        encoded = tok.apply_chat_template(
            talk, chat_template=marked, tokenize=True, return_dict=True, return_assistant_tokens_mask=True
        )
        at = [i for i, flag in enumerate(encoded["assistant_masks"]) if flag]
        out.append([len(at), digest(text + "\n" + ",".join(map(str, at)))])
    return out


def fixed_clock():
    class Clock(datetime.datetime):
        @classmethod
        def now(cls, tz=None):
            return datetime.datetime.fromtimestamp(NOW, datetime.timezone.utc)

    chat_template_utils.datetime = Clock


def ours(name):
    own = HERE / "own" / f"{name}.jinja"
    return own if own.exists() else HERE / f"{name}.jinja"


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--published", type=Path)
    parser.add_argument("--show", nargs=2)
    args = parser.parse_args()
    fixed_clock()
    all_cases = list(cases())
    if args.show:
        name, case = args.show
        messages, options = next((m, o) for n, m, o in all_cases if n == case)
        print(render(ours(name).read_text(), tokenizer(name), messages, options))
        return
    talks = conversations()
    expected = {}
    for name, spec in TEMPLATES.items():
        published = (args.published / f"{name}.jinja").read_text()
        source = ours(name).read_text()
        tok = tokenizer(name)
        texts = []
        for case, messages, options in all_cases:
            text = render(published, tok, messages, options)
            mine = render(source, tok, messages, options)
            assert mine == text, f"{name}, {case}:\n{text!r}\n{mine!r}"
            texts.append(text if text.startswith("!") else digest(text))
        for talk in chosen(spec, talks):
            assert render(published, tok, talk, {}) == render(source, tok, talk, {}), (name, talk)
        expected[name] = {
            "published_sha256": hashlib.sha256(published.encode()).hexdigest(),
            **spec,
            "texts": texts,
            "masks": masks(name, source, talks),
        }
        refused = sum(text.startswith("!") for text in texts)
        supervised = sum(mask[0] for mask in expected[name]["masks"] if isinstance(mask, list))
        print(f"{name:14} {len(texts)} texts, {refused} of them refused; {len(expected[name]['masks'])} masks, {supervised} tokens")
    write = lambda name, value: (HERE / name).write_text(json.dumps(value, ensure_ascii=False, separators=(",", ":")) + "\n")
    write("cases.json", {"now": NOW, "special": SPECIAL, "cases": [{"name": n, "messages": m, "options": o} for n, m, o in all_cases]})
    write("conversations.json", talks)
    lines = ",\n".join(f"{json.dumps(name)}:{json.dumps(value, ensure_ascii=False, separators=(',', ':'))}" for name, value in expected.items())
    (HERE / "expected.json").write_text("{" + lines + "}\n")


if __name__ == "__main__":
    main()
