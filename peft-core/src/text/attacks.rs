//! Templates that mean harm: each must end with an error, soon and without much memory.

#![allow(clippy::unwrap_used)]

use serde_json::{Map, json};

use super::TextError;
use super::chat::tests::{parse, render, template};

#[test]
fn hostile_templates_end_soon_with_an_error() {
    let doubling = |step: &str| {
        format!(
            "{{% set n = namespace(x='xxxxxxxx') %}}{{% for i in range(99) %}}{{% set n.x = {step} %}}{{% endfor %}}{{{{ n.x | length }}}}"
        )
    };
    let again = |step: &str| {
        format!(
            "{{% set x = 'ab' * 1000000 %}}{{% for i in range(99999) %}}{{% set y = {step} %}}{{% endfor %}}"
        )
    };
    let nested = |inner: &str, end: &str| {
        format!(
            "{{% set n = namespace(x=[1]) %}}{{% for i in range(99999) %}}{{% set n.x = {inner} %}}{{% endfor %}}{end}"
        )
    };
    let mut attacks = vec![
        // Time: more steps than a life has.
        "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}".to_string(),
        "{% macro f(x) %}{{ f(x) }}{% endmacro %}{{ f(1) }}".into(),
        "{% macro f(x) %}{{ f(x ~ x) }}{{ f(x ~ x) }}{% endmacro %}{{ f('xxxx') }}".into(),
        "{% for x in [1] recursive %}{{ loop([1]) }}{% endfor %}".into(),
        // Output: terabytes.
        "{% set x = 'x' * 1000000 %}{% for a in range(99999) %}{{ x }}{% endfor %}".into(),
        format!("{{% for a in range(99999) %}}{}{{% endfor %}}", "x".repeat(100_000)),
        format!("{{% set x %}}{{% for a in range(99999) %}}{}{{% endfor %}}{{% endset %}}", "x".repeat(100_000)),
        "{% macro m(x) %}{{ x }}{{ x }}{% endmacro %}{% set n = namespace(x='xx') %}{% for i in range(99) %}\
         {% set n.x = m(n.x) %}{% endfor %}"
            .into(),
        // One operation that makes something huge of something small.
        "{{ 'x' * 99999999999 }}".into(),
        "{{ ([1] * 999999999999) | length }}".into(),
        "{{ 1 in [0] * 999999999999 }}".into(),
        "{{ 'a\nb' | indent(99999999999) }}".into(),
        "{{ 'a\nb' | indent(width=99999999999) }}".into(),
        "{{ '%99999999999d' | format(1) }}".into(),
        "{{ '%.99999999999f' | format(1.5) }}".into(),
        "{{ '{:99999999999}'.format(1) }}".into(),
        "{{ '%*d' | format(999999999, 1) }}".into(),
        "{{ [1] | batch(99999999999, 0) | list | length }}".into(),
        "{{ [1] | slice(99999999999) | list | length }}".into(),
        "{{ [[[[1]]]] | tojson(indent=99999999999) | length * 0 }}{{ 'x' * 99999999999 }}".into(),
        "{{ range(99999) | list | tojson(separators=('x' * 100000, ':')) }}".into(),
        "{{ ('x' * 100000) | join('y' * 100000) }}".into(),
        "{{ ('y' * 100000).join(('x ' * 100000).split()) }}".into(),
        "{{ ('x' * 100000).replace('x', 'y' * 100000) }}".into(),
        "{{ ('x' * 100000) | replace('', 'y' * 100000) }}".into(),
        "{{ ('ab' * 100000).strip('b' * 100000 ~ 'a') | length }}{{ ('a' * 1000000).strip('b' * 1000000 ~ 'a') }}".into(),
        "{{ (range(99999) | list + range(99999) | list) * 99999 }}".into(),
        // A value that holds itself twice, many levels deep.
        nested("[n.x, n.x]", "{{ n.x }}"),
        "{% set n = namespace(x=[1]) %}{% for i in range(60) %}{% set n.x = [n.x, n.x] %}{% endfor %}{{ n.x }}".into(),
        "{% set n = namespace(x=[1]) %}{% for i in range(60) %}{% set n.x = [n.x, n.x] %}{% endfor %}{{ n.x | tojson }}".into(),
        "{% set n = namespace(x=[1], y=[1]) %}{% for i in range(60) %}{% set n.x = [n.x, n.x] %}\
         {% set n.y = [n.y, n.y] %}{% endfor %}{{ n.x == n.y }}"
            .into(),
        // A chain so long that to walk or to free it overflows the stack.
        nested("[n.x]", ""),
        nested("{'a': n.x}", ""),
        nested("namespace(x=n.x)", ""),
        nested("dict(x=n.x)", ""),
        nested("n.x[0:] + []", "{{ 'x' * 99999999999 }}"),
        nested("n.x | reverse", "{% for i in n.x %}{% endfor %}{{ 'x' * 99999999999 }}"),
        nested("n.x | chain([1])", "{{ n.x | length }}"),
        "{% set n = namespace(x=none) %}{% for i in range(99999) %}{% set m = namespace() %}{% set m.x = n.x %}\
         {% set n.x = m %}{% endfor %}"
            .into(),
        "{% set n = namespace(x=none) %}{% for i in range(99999) %}{% set x = n.x %}\
         {% macro f() %}{{ x }}{% endmacro %}{% set n.x = f %}{% endfor %}"
            .into(),
        "{% set n = namespace() %}{% set n.n = n %}{{ n }}{{ n | tojson }}{{ n == n }}{{ 'x' * 99999999999 }}".into(),
        // Beyond what a template may ask for at all.
        "{% include '/etc/passwd' %}".into(),
        "{% include 'chat_template' %}".into(),
        "{% extends 'chat_template' %}".into(),
        "{{ debug() }}".into(),
        "{{ messages.__class__.__mro__ }}".into(),
    ];
    attacks.extend(
        ["n.x ~ n.x", "n.x + n.x", "n.x * 2", "n.x | replace('x', n.x)", "n.x.replace('x', n.x)"]
            .map(doubling),
    );
    attacks.extend(
        ["[n.x, n.x] | join", "n.x.join([n.x, n.x])", "'%s%s' | format(n.x, n.x)", "'{}{}'.format(n.x, n.x)"]
            .map(doubling),
    );
    attacks.extend(
        ["x[1:]", "x[::-1]", "x[-1]", "x | reverse", "x | upper", "x.upper()", "x | length", "x == x ~ ''"]
            .map(again),
    );
    attacks.extend(
        [
            "'c' in x",
            "x | trim",
            "x.strip('q')",
            "x is upper",
            "x < x",
            "x.split('a')",
            "x | list",
            "x | first",
        ]
        .map(again),
    );
    attacks.extend(
        ["x | tojson", "x | string", "x.find('c')", "x is in [x ~ '']", "x | int(0)", "x | title"].map(again),
    );
    for attack in attacks {
        let attempt = parse(&attack).and_then(|template| template.render(&[], false, &Map::new()));
        assert!(attempt.is_err(), "{attack}: {attempt:?}");
    }
}

#[test]
fn sources_that_would_overflow_the_parser_are_refused() {
    let long = |piece: &str, count: usize| piece.repeat(count);
    for source in [
        format!("{{{{ {}1{} }}}}", long("(", 100_000), long(")", 100_000)),
        format!("{{{{ 1{} }}}}", long("+1", 100_000)),
        format!("{{{{ x{} }}}}", long(".a", 100_000)),
        format!("{{{{ x{} }}}}", long("|trim", 100_000)),
        format!("{{{{ {}x }}}}", long("not ", 100_000)),
        format!("{{{{ {}1 }}}}", long("-", 100_000)),
        format!("{}x{}", long("{% if x %}", 20_000), long("{% endif %}", 20_000)),
        format!("{{% if x %}}{}{{% endif %}}", long("{% elif x %}", 50_000)),
        long("{{ 1 }}", 1 << 20),
    ] {
        assert!(matches!(parse(&source), Err(TextError::TemplateSyntax(_))), "{}", &source[..40]);
    }
}

/// Found by fuzzing: an end that shares a character with its beginning.
#[test]
fn a_tag_that_seems_to_end_in_its_beginning_is_refused() {
    for source in ["{%}", "x{%}{{ a }}{% for x in [1] %}{{ x }}{% endfor %}", "{%-%}", "{%"] {
        let attempt = parse(source).and_then(|template| template.render(&[], false, &Map::new()));
        assert!(attempt.is_err(), "{source}: {attempt:?}");
    }
}

#[test]
fn limits_are_told() {
    let loops = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}";
    assert!(matches!(render(loops), Err(TextError::TemplateLimit(what)) if what == "2000000 steps"));
    let writes = "{% set x = 'x' * 1000000 %}{% for a in range(99999) %}{{ x }}{% endfor %}";
    let error = render(writes).unwrap_err();
    assert_eq!(
        error.to_string(),
        "the chat template was stopped: it exceeds the limit of bytes read and written"
    );
    assert!(error.is_bad_input());
}

#[test]
fn long_conversations_are_within_the_limits() {
    let source =
        "{% for m in messages %}{{ '<' + m.role + '>\n' + m.content | trim + '</s>\n' }}{% endfor %}";
    let messages: Vec<_> =
        (0..2000).map(|_| json!({"role": "user", "content": "word ".repeat(2000)})).collect();
    let text = template(source).render(&messages, false, &Map::new()).unwrap();
    assert!(text.len() > 19_000_000);
}
