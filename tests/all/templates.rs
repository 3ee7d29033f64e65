//! Published chat templates: the same texts and the same loss masks as `transformers` makes, from
//! `tests/golden/make_templates.py`.
//!
//! With `PEFT_PUBLISHED_TEMPLATES` set to a folder of the templates as published (`NAME.jinja`), those are tested as
//! well as what the repository holds.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use peft_core::data::prompt::Prompter;
use peft_core::data::tokenise::Tokeniser;
use peft_core::data::{DatasetConfig, DatasetType};
use peft_core::text::{ChatTemplate, TextError, Tokenizer};
use peft_tests::{golden, peft_ok, peft_refuses, root};
use serde_json::{Map, Value, json};
use sha2::{Digest, Sha256};

fn read(name: &str) -> Value {
    let text = std::fs::read_to_string(golden("templates").join(name)).unwrap();
    serde_json::from_str(&text).unwrap()
}

fn sha256(text: &str) -> String {
    Sha256::digest(text.as_bytes()).iter().map(|byte| format!("{byte:02x}")).collect()
}

/// The sources to test under a name, with what each is called in failures.
fn sources(name: &str, published_sha256: &str) -> Vec<(String, String)> {
    let file = format!("{name}.jinja");
    let folders = [golden("templates"), golden("templates/own")];
    let mut sources: Vec<(String, String)> = folders
        .iter()
        .filter_map(|folder| std::fs::read_to_string(folder.join(&file)).ok())
        .map(|source| (name.to_string(), source))
        .collect();
    assert_eq!(sources.len(), 1, "{name}");
    if let Some(folder) = std::env::var_os("PEFT_PUBLISHED_TEMPLATES") {
        let source = std::fs::read_to_string(PathBuf::from(folder).join(&file)).unwrap();
        assert_eq!(sha256(&source), published_sha256, "{name} is not the template that was tested");
        sources.push((format!("{name} as published"), source));
    }
    sources
}

fn special_tokens(spec: &Value) -> BTreeMap<String, String> {
    let roles = [("bos_token", "bos"), ("eos_token", "eos")];
    roles.iter().filter_map(|(role, key)| Some((role.to_string(), spec[key].as_str()?.to_string()))).collect()
}

fn template(source: String, spec: &Value, now: &Value) -> ChatTemplate {
    let mut template = ChatTemplate::new(source, &special_tokens(spec)).unwrap();
    template.set_time(now.as_u64().unwrap());
    template
}

/// The quickstart's tokenizer with the templates' special tokens, set up for one of them.
fn tokenizer(dir: &Path, spec: &Value, special: &Value) -> Tokenizer {
    let base = std::fs::read_to_string(root().join("recipes/quickstart/base/tokenizer.json")).unwrap();
    let mut rules: Value = serde_json::from_str(&base).unwrap();
    let first = rules["model"]["vocab"].as_object().unwrap().len();
    let mut ids = BTreeMap::new();
    for token in rules["added_tokens"].as_array().unwrap() {
        ids.insert(token["content"].as_str().unwrap().to_string(), token["id"].as_u64().unwrap());
    }
    for (at, token) in special.as_array().unwrap().iter().enumerate() {
        ids.insert(token.as_str().unwrap().to_string(), (first + at) as u64);
        rules["added_tokens"].as_array_mut().unwrap().push(json!({
            "id": first + at, "content": token, "single_word": false, "lstrip": false, "rstrip": false,
            "normalized": false, "special": true}));
    }
    let stops: Vec<u64> =
        spec["stops"].as_array().unwrap().iter().map(|stop| ids[stop.as_str().unwrap()]).collect();
    // The templates alone say where a text begins.
    rules["post_processor"] = Value::Null;
    let write = |name: &str, value: &Value| std::fs::write(dir.join(name), value.to_string()).unwrap();
    write("tokenizer.json", &rules);
    write(
        "tokenizer_config.json",
        &json!({"bos_token": spec["bos"], "eos_token": spec["eos"], "add_bos_token": false, "add_eos_token": false}),
    );
    write("generation_config.json", &json!({"eos_token_id": stops}));
    Tokenizer::from_dir(dir).unwrap()
}

#[test]
fn texts_are_those_of_transformers() {
    let (cases, expected) = (read("cases.json"), read("expected.json"));
    let mut failures = Vec::new();
    for (name, spec) in expected.as_object().unwrap() {
        for (called, source) in sources(name, spec["published_sha256"].as_str().unwrap()) {
            let template = template(source, spec, &cases["now"]);
            for (case, text) in
                cases["cases"].as_array().unwrap().iter().zip(spec["texts"].as_array().unwrap())
            {
                let messages = case["messages"].as_array().unwrap();
                let mut variables = case["options"].as_object().unwrap().clone();
                let mut flag = |name: &str| variables.remove(name) == Some(json!(true));
                let (prompt, open) = (flag("add_generation_prompt"), flag("continue_final_message"));
                let result = match open {
                    true => template.render_open(messages, &variables),
                    false => template.render(messages, prompt, &variables),
                };
                let text = text.as_str().unwrap();
                let right = match &result {
                    Ok(result) => sha256(result)[..16] == *text,
                    Err(TextError::TemplateRefused(message)) => format!("!{message}") == text,
                    // What Python cannot do, such as joining a text and a list, is an error here too.
                    Err(_) => text == "!",
                };
                if !right {
                    failures.push(format!("{called}, {}: expected {text}, got {result:?}", case["name"]));
                }
            }
        }
    }
    assert!(failures.is_empty(), "{} failures\n{}", failures.len(), failures.join("\n"));
}

/// The conversations that a template's masks are of.
fn conversations(spec: &Value, all: &Value) -> Vec<Value> {
    let plain = all["plain"].as_array().unwrap();
    let mut talks = match spec["tools"].as_bool().unwrap() {
        true => [&plain[..140], all["tools"].as_array().unwrap()].concat(),
        false => plain.clone(),
    };
    if !spec["system"].as_bool().unwrap() {
        for talk in &mut talks {
            talk.as_array_mut().unwrap().retain(|message| message["role"] != "system");
        }
    }
    talks
}

#[test]
fn masks_are_those_of_annotated_templates() {
    let (cases, talks, expected) = (read("cases.json"), read("conversations.json"), read("expected.json"));
    let mut failures = Vec::new();
    for (name, spec) in expected.as_object().unwrap() {
        let dir = tempfile::tempdir().unwrap();
        let tokenizer = tokenizer(dir.path(), spec, &cases["special"]);
        let mut sources = sources(name, spec["published_sha256"].as_str().unwrap());
        if sources[0].1.contains("{#<#}") {
            let marked =
                sources[0].1.replace("{#<#}", "{% generation %}").replace("{#>#}", "{% endgeneration %}");
            sources.push((format!("{name} with generation blocks"), marked));
        }
        for (called, source) in sources {
            let template = template(source, spec, &cases["now"]);
            let config = DatasetConfig::new("d.json", DatasetType::Messages);
            let prompter = Prompter::new(&config, Some(&template), &tokenizer, &Map::new());
            let tokeniser = Tokeniser::new(&tokenizer, false);
            let mut equal = 0;
            let masks = spec["masks"].as_array().unwrap();
            let conversations = conversations(spec, &talks);
            assert_eq!((masks.len(), conversations.len()), (200, 200));
            for (number, (talk, mask)) in conversations.iter().zip(masks).enumerate() {
                let record = Map::from_iter([("messages".to_string(), talk.clone())]);
                let result = prompter.prompt(&record, number + 1).and_then(|prompt| {
                    let example = tokeniser.example(&prompt, &config.path, number + 1)?;
                    Ok((prompt.text, example))
                });
                let found = result.map(|(text, example)| {
                    let at = (0..example.ids.len()).filter(|&at| example.supervised[at]);
                    let at: Vec<String> = at.map(|at| at.to_string()).collect();
                    let hash = sha256(&format!("{text}\n{}", at.join(",")))[..16].to_string();
                    (json!([at.len(), hash]), text, example)
                });
                match found {
                    Ok((found, ..)) if found == *mask => equal += 1,
                    Err(_) if mask.is_string() => equal += 1,
                    Ok((found, text, example)) => failures.push(format!(
                        "{called}, {number}: expected {mask}, got {found}\n{text:?}\n{:?}",
                        shown(&tokenizer, &example.ids, &example.supervised)
                    )),
                    Err(error) => failures.push(format!("{called}, {number}: {error}\n{talk}")),
                }
            }
            eprintln!("{called}: {equal} of 200");
        }
    }
    assert!(failures.is_empty(), "{} failures\n{}", failures.len(), failures.join("\n"));
}

/// The supervised pieces.
fn shown(tokenizer: &Tokenizer, ids: &[u32], supervised: &[bool]) -> Vec<String> {
    let mut pieces: Vec<Vec<u32>> = vec![Vec::new()];
    for (&id, &flag) in ids.iter().zip(supervised) {
        match flag {
            true => pieces.last_mut().unwrap().push(id),
            false if pieces.last().unwrap().is_empty() => {}
            false => pieces.push(Vec::new()),
        }
    }
    pieces.iter().map(|ids| tokenizer.decode(ids, false).unwrap()).collect()
}

#[test]
fn recipes_and_commands_take_a_template_and_its_variables() {
    let dir = tempfile::tempdir().unwrap();
    let path = |name: &str| dir.path().join(name).display().to_string();
    let record = json!({"functions": [{"type": "function", "function": {"name": "f"}}], "messages": [
        {"role": "user", "content": "who"}, {"role": "assistant", "content": "me"},
        {"role": "user", "content": "you"}, {"role": "assistant", "content": "no", "train": false}]});
    std::fs::write(path("m.jsonl"), format!("{record}\n")).unwrap();
    let template =
        "{{ mode }}{{ tools[0].function.name }}{% for m in messages %}[{{ m.content }}]{% endfor %}";
    std::fs::write(path("t.jinja"), template).unwrap();
    let base = "recipes/quickstart/base";
    let inspect = |template: &str, more: &[&str]| {
        let data = path("m.jsonl");
        let mut args = vec!["inspect", &data, "--type", "messages", "--base-model", base];
        args.extend(["--field", "tools=functions", "--chat-template", template]);
        args.extend(["--chat-template-kwargs", "{mode: low}"]);
        peft_ok(&[&args, more].concat())
    };
    for given in [template, &path("t.jinja")] {
        let shown = inspect(given, &[]);
        assert!(shown.contains("lowf[who]⟦[me]⟧[you][no]"), "{shown}");
    }
    let shown =
        inspect(template, &["--dataset", "roles_to_train=[user]", "--dataset", "message_field_training=x"]);
    assert!(shown.contains("lowf[⟦who]⟧[me][⟦you]⟧[no]"), "{shown}");

    let recipe = |template: &str| {
        let text = format!(
            "base_model: {base}\ndatasets:\n  - path: {}\n    type: messages\n    field_tools: functions\n    \
             chat_template_kwargs: {{mode: high}}\nchat_template: {template:?}\nchat_template_kwargs: {{mode: low}}\n\
             max_steps: 1\noutput_dir: {}\n",
            path("m.jsonl"),
            path("out")
        );
        std::fs::write(path("r.yaml"), text).unwrap();
        path("r.yaml")
    };
    peft_ok(&["train", &recipe(&path("t.jinja"))]);
    let info = std::fs::read_to_string(dir.path().join("out/run.json")).unwrap();
    assert!(info.contains("\"mode\""), "{info}");
    let message = peft_refuses(&["train", &recipe("none.jinja")]);
    assert!(message.contains("`none.jinja` is neither a template's text nor a file with one"), "{message}");

    let variables = "{tools: [{function: {name: f}}]}";
    let chat = ["generate", "--base-model", base, "--chat", "--prompt", "who", "--max-new-tokens", "2"];
    peft_ok(
        &[&chat[..], &["--chat-template", template, "--prefill", "m", "--chat-template-kwargs", variables]]
            .concat(),
    );
    let message = peft_refuses(&[&chat[..], &["--chat-template", "{{ raise_exception('no') }}"]].concat());
    assert!(message.contains("the chat template refuses these messages: no"), "{message}");
}
