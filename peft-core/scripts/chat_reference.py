"""What `transformers` makes of the chat templates that the tests of `text/chat.rs` render.

    python chat_reference.py > ../src/text/chat_cases.json      (needs transformers and jinja2)

The templates are written for this purpose; each exercises idioms that published ones use.
"""

import json
import sys

from jinja2.exceptions import TemplateError
from transformers.utils.chat_template_utils import _compile_jinja_template

TOKENS = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
U = lambda text: {"role": "user", "content": text}
A = lambda text: {"role": "assistant", "content": text}
S = lambda text: {"role": "system", "content": text}
TALK = [S(" Be brief. "), U("Hi\n"), A(" Hello!"), U("Bye")]

# Turns between marks; a default system message when the conversation begins with another role.
CHATML = """{% for m in messages %}{% if loop.first and messages[0]['role'] != 'system' %}{{ '<|im_start|>system
Default.<|im_end|>
' }}{% endif %}{{ '<|im_start|>' + m['role'] + '
' + m['content'] + '<|im_end|>
' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant
' }}{% endif %}"""

# A header with a date, the system message taken off the list, tool calls as JSON.
HEADER = """{{- bos_token -}}
{%- if not day is defined %}
    {%- set day = "Monday" %}
{%- endif %}
{#- Everything below works on what is left of the list. #}
{%- if messages[0]['role'] == 'system' %}
    {%- set head, messages = messages[0]['content'] | trim, messages[1:] %}
{%- else %}
    {%- set head = "" %}
{%- endif %}
{{- "{head " ~ day + "}\\n" + head }}
{%- if tools is not none %}{{- "tools" }}{% endif %}
{%- for m in messages %}
    {%- if 'tool_calls' in m %}
        {%- if not m.tool_calls | length == 1 %}
            {{- raise_exception("one call at a time") }}
        {%- endif %}
        {%- set call = m.tool_calls[0].function %}
        {{- "{call " + call.name + " " }}
        {{- call.arguments | tojson }}
        {{- "}" }}
    {%- elif m.role in ["tool", "environment"] %}
        {%- if m.content is mapping or m.content is iterable %}
            {{- m.content | tojson }}
        {%- else %}
            {{- m.content }}
        {%- endif %}
    {%- elif not (m.role == 'hidden' or m.role == 'note') %}
        {{- '{' + m['role'] + '}\\n' + m['content'] | trim + '{end}' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '{assistant}\\n' }}
{%- endif %}
"""

# Thoughts are shown after the last question alone, which is found from the back.
THOUGHTS = """{%- set state = namespace(searching=true, question=-1) %}
{%- for m in messages[::-1] %}
    {%- set at = messages | length - 1 - loop.index0 %}
    {%- if state.searching and m.role == "user" and m.content is string and not m.content.startswith('[result]') %}
        {%- set state.searching = false %}
        {%- set state.question = at %}
    {%- endif %}
{%- endfor %}
{%- for m in messages %}
    {%- set text = m.content if m.content is string else '' %}
    {%- if m.role == 'assistant' and '</think>' in text %}
        {%- set thought = text.split('</think>')[0].split('<think>')[-1].strip('\\n') %}
        {%- set text = text.split('</think>')[-1].lstrip('\\n') %}
        {%- if loop.index0 > state.question and (loop.last or thought) %}
            {%- set text = '(' ~ thought.rstrip('\\n') ~ ') ' ~ text %}
        {%- endif %}
    {%- endif %}
    {{- m.role ~ ': ' ~ text }}
    {%- if not loop.last %}
        {{- '\\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '\\nassistant: ' }}
    {%- if think is defined and think is false %}
        {{- '()' }}
    {%- endif %}
{%- endif %}"""

# Roles must alternate, and the system message goes into the last question.
ALTERNATE = """{%- if messages[0]["role"] == "system" %}
    {%- set system, turns = messages[0]["content"], messages[1:] %}
{%- else %}
    {%- set turns = messages %}
{%- endif %}
{%- set count = namespace() %}
{%- set count.turns = 0 %}
{%- for turn in turns %}
    {%- if turn.hidden is not defined or turn.hidden is none %}
        {%- if (turn["role"] == "user") != (count.turns % 2 == 0) %}
            {{- raise_exception("turn " ~ count.turns ~ " is by " ~ turn.role) }}
        {%- endif %}
        {%- set count.turns = count.turns + 1 %}
    {%- endif %}
{%- endfor %}
{{- bos_token }}
{%- for turn in turns %}
    {%- if turn["role"] == "user" %}
        {{- "[ASK]" }}
        {%- if loop.last and system is defined %}{{- system + "\\n" }}{% endif %}
        {{- turn["content"] + "[/ASK]" }}
    {%- else %}
        {{- " " + turn["content"] | trim + eos_token }}
    {%- endif %}
{%- endfor %}"""

MACRO = """{%- macro turn(role, text, end='<end>') -%}
<{{ role | upper }}>{{ text }}{{ end }}
{%- endmacro -%}
{%- for m in messages if m.role != 'system' -%}
    {{ turn(m.role, m.content.strip()) }}{% if not loop.last %}|{% endif %}
    {%- if loop.last %}{{ turn('x', 'y', end='!') }}{% endif %}
{%- endfor %}"""

GENERATION = """{% for m in messages %}
{% if m.role == 'assistant' %}
<a>{% generation %}{{ m.content }}</a>{% endgeneration %}

{% else %}
<{{ m.role }}>{{ m.content }}
  {%- generation -%}
    inner
  {%- endgeneration +%}
{% endif %}
{% endfor %}
"""

PARTS = """{% for m in messages %}{% if m.content is string %}{{ m.content }}{% else %}{% for part in m['content'] %}
{%- if part.type == 'text' %}{{ part.text }}{% elif part['type'] == 'image' %}<image>{% endif %}{% endfor %}{% endif %}
{% if loop.index is divisibleby 2 %}#{% else %}-{% endif %}
{% endfor %}"""

TOOLS = [{"type": "function", "function": {"name": "größe", "parameters": {"b": [1, 2.0, None, True], "a": {}, "c": "x\"y\\\n<&'\u0001"}}}]

SMALL = {
    "prints python values": "{{ none }} {{ true }} {{ false }} {{ 1 }} {{ 1.0 }} {{ 1e-7 }} {{ [1, 'a', none, true] }} {{ {'a': \"it's\", 'b': [1.5]} }} {{ missing }}|",
    "arithmetic": "{{ 7 // 2 }} {{ 7 / 2 }} {{ 7 % 3 }} {{ -7 // 2 }} {{ 2 ** 3 }} {{ 1 + 2 * 3 }} {{ 'a' * 3 }} {{ 4 / 2 }}",
    "string methods": "{{ 'a,b,c'.split(',') | join('-') }} {{ 'a  b'.split() | length }} {{ 'abc'.upper() }} {{ 'xxabxx'.strip('x') }} {{ 'hello world'.title() }} {{ 'aXbX'.replace('X', '-') }} {{ 'a,b,c'.split(',', 1)[1] }} {{ 'abc'.find('c') }} {{ 'a:b:c'.rsplit(':', 1)[0] }} {{ 'abc'.startswith('ab') }} {{ ' x '.lstrip() }}| {{ 'x'.join(['a', 'b']) }} {{ 'prefix-a'.removeprefix('prefix-') }} {{ 'a=b=c'.partition('=')[2] }} {{ 'ABC'.lower() }} {{ 'aa'.count('a') }} {{ 'abc'.capitalize() }} {{ 'a\nb'.splitlines() | length }} {{ '12'.isdigit() }}",
    "string slices": "{{ 'hello'[1:3] }} {{ 'hello'[-2:] }} {{ 'hello'[::-1] }} {{ 'hello'[0] }} {{ 'hello'[-1] }} {{ 'hello'[:2] ~ 'x' }}",
    "list slices": "{{ [1,2,3,4][1:] | join }} {{ [1,2,3,4][::-1] | join }} {{ [1,2,3,4][-1] }} {{ ([1,2] + [3]) | length }} {{ messages[-1].content }} {{ messages[1:][0].role }}",
    "dict methods": "{% set d = {'a': 1, 'b': 2} %}{% for k, v in d.items() %}{{ k }}={{ v }};{% endfor %}{{ d.get('a') }}{{ d.get('z', 'no') }}{{ d.keys() | list | join }}{{ d.values() | sum }}{{ 'a' in d }}{{ d | length }}{% for k in d %}{{ k }}{% endfor %}{% for k, v in d | items %}{{ k }}{{ v }}{% endfor %}{% for k, v in d | dictsort(reverse=true) %}{{ k }}{% endfor %}",
    "tests": "{{ 'a' is string }} {{ [] is iterable }} {{ {} is mapping }} {{ none is none }} {{ x is defined }} {{ x is undefined }} {{ 1 is number }} {{ 'a' is sequence }} {{ [] is sequence }} {{ {} is iterable }} {{ true is boolean }} {{ 3 is odd }} {{ 'a' is iterable }} {{ 1 is integer }} {{ 1.5 is float }} {{ 'a' is not none }} {{ 2 is in [1, 2] }} {{ true is true }} {{ 1 == 1.0 }}",
    "filters": "{{ [3,1,2] | sort | join(',') }} {{ ' a ' | trim }} {{ messages | map(attribute='role') | join(',') }} {{ messages | selectattr('role', 'equalto', 'user') | list | length }} {{ messages | rejectattr('role', 'equalto', 'user') | map(attribute='content') | first }} {{ missing | default('d') }} {{ '' | default('e', true) }} {{ 'abc' | length }} {{ 'a' | upper }} {{ 'x y' | replace(' ', '_') }} {{ 3 | string + 'x' }} {{ '5' | int + 1 }} {{ 'abc' | reverse }} {{ [1, 2] | last }} {{ 'hello world' | title }} {{ 'a\nb' | indent(2) }} {{ 'hi' | capitalize }} {{ [1, 1, 2] | unique | list | length }} {{ 2.567 | round(1) }} {{ -3 | abs }} {{ 'abc' | list | join('.') }} {{ [[1, 2], [3]] | map('length') | join }}",
    "loop controls": "{% for i in range(5) %}{% if i == 1 %}{% continue %}{% endif %}{% if i == 3 %}{% break %}{% endif %}{{ i }}{{ loop.length }}{{ loop.revindex }}{{ loop.first }}{{ loop.cycle('a', 'b') }}{% endfor %}{% for x in [] %}{% else %}empty{% endfor %}",
    "loop neighbours": "{% for m in messages %}{{ loop.previtem.role if loop.previtem is defined else '^' }}>{{ m.role }}>{{ loop.nextitem.role if not loop.last else '$' }} {% endfor %}",
    "scopes": "{% set x = 1 %}{% for i in range(2) %}{% set x = 5 %}{% endfor %}{{ x }}{% if true %}{% set x = 2 %}{% endif %}{{ x }}{% set block %}in {{ x }}{% endset %}[{{ block }}]{% filter upper %}abc{% endfilter %}",
    "whitespace": "  {% if true %}  \n  a\n  {%- if true -%}   b   {%- endif %}{% endif %}\n\n  {# note #}\n{#- tight -#}\n  c {%+ if true %} d{% endif +%}\n e\n{{ 'f' }}\n\n",
    "conditional expressions": "{{ 'a' if messages else 'b' }}{{ 'c' if false }}{{ (messages | length) > 2 and 'yes' or 'no' }}{{ not missing }}{{ missing or 'fallback' }}{{ 'x' in 'xyz' and 'q' not in 'xyz' }}",
    "adjacent strings and quotes": "{{ 'it\\'s' ~ \"\\\"q\\\"\" ~ 'tab\\t' ~ 'nl\\n' ~ 'u\\u00e9' }}{{ 'a' 'b' }}",
    "tuples": "{% set a, b = (1, 2) %}{{ a }}{{ b }}{% for x, y in [(1, 'p'), [2, 'q']] %}{{ x }}{{ y }}{% endfor %}",
    "chained comparison and ternaries": "{{ 1 < 2 < 3 }}{{ 'b' > 'a' }}{{ (1 if none else 2) if true else 3 }}",
    "tojson": "{{ tools | tojson }}\n{{ tools | tojson(indent=2) }}\n{{ {'b': 1, 'a': [ ]} | tojson(sort_keys=true) }}{{ 'é' | tojson(ensure_ascii=true) }}{{ [1, 2] | tojson(separators=(',', ':')) }}{{ none | tojson }}{{ 1e20 | tojson }}{{ 'a/b' | tojson }}",
    "macro calls": "{% macro a(x, y=2) %}{{ x }}{{ y }}{% endmacro %}{{ a(1) }}{{ a(1, y=3) }}{{ a(x='k') }}{% macro b() %}[{{ caller() }}]{% endmacro %}{% call b() %}inner{% endcall %}",
    "format": "{{ '%s is %d' | format('a', 3) }}{{ '{} and {}'.format('a', 'b') }}",
    "namespace": "{% set ns = namespace(found=false, n=0, items=[]) %}{% for m in messages %}{% if m.role == 'assistant' %}{% set ns.found = true %}{% endif %}{% set ns.n = ns.n + 1 %}{% set ns.items = ns.items + [m.role] %}{% endfor %}{{ ns.found }}{{ ns.n }}{{ ns['items'] | join(',') }}",
    "special tokens": "{{ bos_token }}{{ eos_token }}{{ unk_token }}{{ pad_token }}{{ tools is none }}{{ documents is none }}{{ add_generation_prompt }}",
    "message attributes": "{% for m in messages %}{{ m.role[0] | upper }}{{ m['content'].strip() | length }}{{ m.get('name', '-') }}{{ m.name is defined }}{{ 'name' in m }}{% endfor %}",
    "do concatenation": "{{ 'a' ~ 1 ~ 'b' ~ 2.5 }}{{ 'n=' ~ messages | length }}",
    "raise": "{{ raise_exception('no ' + messages[0].role) }}",
    "recursive loop": "{% for x in [{'v': 1, 'c': [{'v': 2, 'c': []}]}] recursive %}{{ x.v }}{{ loop(x.c) }}{% endfor %}",
    "raw": "{% raw %}{{ not }}{% endraw %}",
}

CASES = [(name, template, TALK, True, {"tools": TOOLS} if name == "tojson" else {}) for name, template in SMALL.items()]
CALL = {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "f", "arguments": {"x": 1, "y": "ü"}}}]}
THINK = [U("1+1?"), A("<think>\nadd\n</think>\n\n2"), U("2+2?"), A("<think>\nmore\n</think>\n\n4")]
for prompt in (True, False):
    CASES += [
        (f"chatml {prompt}", CHATML, [U("Hi"), A("Hello")], prompt, {}),
        (f"chatml system {prompt}", CHATML, TALK, prompt, {}),
        (f"header {prompt}", HEADER, TALK, prompt, {}),
        (f"header date {prompt}", HEADER, TALK[1:], prompt, {"day": "1 Jan"}),
        (f"thoughts {prompt}", THOUGHTS, THINK, prompt, {}),
        (f"thoughts without thinking {prompt}", THOUGHTS, THINK[:3], prompt, {"think": False}),
        (f"alternate {prompt}", ALTERNATE, TALK[1:], prompt, {}),
        (f"alternate system {prompt}", ALTERNATE, TALK, prompt, {}),
    ]
CASES += [
    ("header tool", HEADER, [U("x"), CALL, {"role": "tool", "content": {"r": 1}}, {"role": "tool", "content": "ok"}], True, {}),
    ("header two tools", HEADER, [U("x"), {**CALL, "tool_calls": CALL["tool_calls"] * 2}], True, {}),
    ("alternate order", ALTERNATE, [U("x"), U("y")], False, {}),
    ("macro", MACRO, TALK, False, {}),
    ("generation", GENERATION, TALK, False, {}),
    ("parts", PARTS, [U([{"type": "text", "text": "see "}, {"type": "image"}]), A("yes")], False, {}),
]


def expected(template, messages, prompt, extra):
    variables = {"tools": None, "documents": None, **TOKENS, **extra}
    try:
        return _compile_jinja_template(template).render(messages=messages, add_generation_prompt=prompt, **variables)
    except TemplateError as error:
        return f"raised: {error}"


json.dump(
    [
        {"name": n, "template": t, "messages": m, "add_generation_prompt": p, "extra": e, "expected": expected(t, m, p, e)}
        for n, t, m, p, e in CASES
    ],
    sys.stdout,
    ensure_ascii=False,
    indent=1,
)
print()
