//! `peft inspect`: what is in a checkpoint, an adapter or a data file.

use super::data;
use crate::args::InspectArgs;
use crate::error::CliError;
use crate::{open, render};
use peft_core::adapter::{AdapterFolder, is_empty};
use peft_core::checkpoint::{Checkpoint, Dtype, SafetensorsFile, TensorRef};
use peft_core::data::{DatasetConfig, load, records::read};
use peft_core::model::ModelConfig;
use peft_methods::open_adapter;
use serde_json::{Map, Value, json};
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

const DATA: [&str; 6] = ["json", "jsonl", "csv", "tsv", "parquet", "txt"];

/// Runs the command.
pub fn run(args: InspectArgs) -> Result<(), CliError> {
    let path = PathBuf::from(&args.path);
    let extension =
        path.extension().and_then(|extension| extension.to_str()).unwrap_or_default().to_lowercase();
    if path.is_file() && DATA.contains(&extension.as_str()) {
        return dataset(&args, &path);
    }
    if path.is_file() && extension == "safetensors" {
        return file(&args, &path);
    }
    if path.is_file() {
        let message = format!("is no safetensors file and no data file ({})", DATA.join(", "));
        return Err(CliError::Inspect { path: args.path, message });
    }
    let dir = open::folder(&args.path, &open::hub(None, args.offline))?;
    if dir.join("adapter_config.json").is_file() { adapter(&args, &dir) } else { checkpoint(&args, &dir) }
}

/// Counts of tensors, values and bytes, by type.
fn summary<'a>(tensors: impl Iterator<Item = TensorRef<'a>>) -> BTreeMap<Dtype, (u64, u64, u64)> {
    let mut by_type = BTreeMap::new();
    for tensor in tensors {
        let entry = by_type.entry(tensor.dtype).or_insert((0, 0, 0));
        entry.0 += 1;
        entry.1 += tensor.numel() as u64;
        entry.2 += tensor.bytes.len() as u64;
    }
    by_type
}

fn by_type_json(by_type: &BTreeMap<Dtype, (u64, u64, u64)>) -> Value {
    let entry = |(tensors, values, bytes): &(u64, u64, u64)| json!({"tensors": tensors, "values": values, "bytes": bytes});
    by_type.iter().map(|(dtype, counts)| (dtype.to_string(), entry(counts))).collect()
}

fn by_type_rows(by_type: &BTreeMap<Dtype, (u64, u64, u64)>) -> Vec<Vec<String>> {
    let header = ["type", "tensors", "values", "size"].map(str::to_string).to_vec();
    let row = |(dtype, (tensors, values, bytes)): (&Dtype, &(u64, u64, u64))| {
        vec![dtype.to_string(), render::count(*tensors), render::count(*values), render::bytes(*bytes)]
    };
    std::iter::once(header).chain(by_type.iter().map(row)).collect()
}

/// Key, shape and type of every tensor.
fn tensor_rows<'a>(tensors: impl Iterator<Item = TensorRef<'a>>) -> Vec<Vec<String>> {
    tensors.map(|t| vec![t.name.to_string(), format!("{:?}", t.shape), t.dtype.to_string()]).collect()
}

fn checkpoint(args: &InspectArgs, dir: &Path) -> Result<(), CliError> {
    let checkpoint = Checkpoint::open(dir)?;
    let config = ModelConfig::from_json(checkpoint.dir(), checkpoint.config())?;
    let tensors = checkpoint.names().map(|name| checkpoint.tensor(name)).collect::<Result<Vec<_>, _>>()?;
    let by_type = summary(tensors.iter().copied());
    let values: u64 = by_type.values().map(|counts| counts.1).sum();
    let facts: Vec<(&str, Value)> = vec![
        ("architecture", json!(config.family.architecture())),
        ("parameters", json!(values)),
        ("layers", json!(config.num_hidden_layers)),
        ("hidden_size", json!(config.hidden_size)),
        ("intermediate_size", json!(config.intermediate_size)),
        ("heads", json!(config.num_attention_heads)),
        ("key_value_heads", json!(config.num_key_value_heads)),
        ("head_dim", json!(config.head_dim)),
        ("vocab_size", json!(config.vocab_size)),
        ("max_position_embeddings", json!(config.max_position_embeddings)),
        ("tied_head", json!(config.tie_word_embeddings)),
        ("rope", json!(format!("{:?}, theta {}", config.rope_scaling, config.rope_theta))),
    ];
    if args.json {
        let mut map: Map<String, Value> =
            facts.into_iter().map(|(key, value)| (key.to_string(), value)).collect();
        map.insert("kind".to_string(), json!("checkpoint"));
        map.insert("path".to_string(), json!(dir.display().to_string()));
        map.insert("types".to_string(), by_type_json(&by_type));
        println!("{}", Value::Object(map));
        return Ok(());
    }
    println!("checkpoint {}\n", dir.display());
    for (key, value) in facts {
        let shown = value
            .as_str()
            .map_or_else(|| value.as_u64().map_or(value.to_string(), render::count), str::to_string);
        println!("  {key:<24}{shown}");
    }
    println!();
    print!("{}", render::table(&by_type_rows(&by_type)));
    Ok(())
}

fn adapter(args: &InspectArgs, dir: &Path) -> Result<(), CliError> {
    let adapter = open_adapter(dir)?;
    let AdapterFolder { file, config, warnings, .. } = adapter.folder();
    let tensors = file.names().map(|name| file.tensor(name)).collect::<Result<Vec<_>, _>>()?;
    let by_type = summary(tensors.iter().copied());
    if args.json {
        let types = by_type_json(&by_type);
        println!(
            "{}",
            json!({"kind": "adapter", "path": dir.display().to_string(), "config": config, "types": types})
        );
        return Ok(());
    }
    println!("adapter {}\n", dir.display());
    for (key, value) in config.iter().filter(|(_, value)| !is_empty(value)) {
        println!("  {key:<24}{value}");
    }
    println!();
    print!("{}", render::table(&tensor_rows(tensors.iter().copied())));
    println!();
    print!("{}", render::table(&by_type_rows(&by_type)));
    for warning in warnings {
        render::warning(warning);
    }
    Ok(())
}

fn file(args: &InspectArgs, path: &Path) -> Result<(), CliError> {
    let file = SafetensorsFile::open(path)?;
    let tensors = file.names().map(|name| file.tensor(name)).collect::<Result<Vec<_>, _>>()?;
    let by_type = summary(tensors.iter().copied());
    if args.json {
        let list: Vec<Value> = tensors
            .iter()
            .map(|t| json!({"name": t.name, "shape": t.shape, "type": t.dtype.to_string()}))
            .collect();
        println!(
            "{}",
            json!({"kind": "safetensors", "path": args.path, "tensors": list, "types": by_type_json(&by_type)})
        );
        return Ok(());
    }
    print!("{}", render::table(&tensor_rows(tensors.iter().copied())));
    println!();
    print!("{}", render::table(&by_type_rows(&by_type)));
    Ok(())
}

fn dataset(args: &InspectArgs, path: &Path) -> Result<(), CliError> {
    let config = data::config(path, &args.format)?;
    let Some(base) = &args.base_model else {
        return records(args, path, &config);
    };
    let base = open::base(base, &open::hub(None, args.offline))?;
    let dataset = load(std::slice::from_ref(&config), &base.tokenizer, &data::options(&args.format)?)?;
    if args.json {
        println!(
            "{}",
            json!({"kind": "data", "path": args.path, "report": dataset.report, "files": dataset.files})
        );
        return Ok(());
    }
    let report = &dataset.report;
    let share = 100.0 * report.supervised_tokens as f64 / report.tokens.max(1) as f64;
    let mut lengths: Vec<usize> = dataset.examples.iter().map(|example| example.ids.len()).collect();
    lengths.sort_unstable();
    let at =
        |share: f64| lengths.get(((lengths.len().max(1) - 1) as f64 * share) as usize).copied().unwrap_or(0);
    let rows = vec![
        vec!["records".to_string(), render::count(report.records as u64)],
        vec!["examples".to_string(), render::count(report.examples as u64)],
        vec!["tokens".to_string(), render::count(report.tokens as u64)],
        vec!["supervised".to_string(), format!("{share:.1} %")],
        vec!["length: median, 90 %, longest".to_string(), format!("{}, {}, {}", at(0.5), at(0.9), at(1.0))],
        vec!["truncated".to_string(), render::count(report.truncated as u64)],
        vec!["dropped".to_string(), render::count(report.dropped as u64)],
    ];
    print!("{}", render::table(&rows));
    for (index, example) in dataset.examples.iter().take(args.examples).enumerate() {
        println!("\n── example {} · {} tokens", index + 1, example.ids.len());
        println!("{}", render::tokens(example, &base.tokenizer)?);
    }
    Ok(())
}

/// Without a tokenizer: the records as they are.
fn records(args: &InspectArgs, path: &Path, config: &DatasetConfig) -> Result<(), CliError> {
    let records = read(config)?;
    let mut fields: BTreeMap<String, u64> = BTreeMap::new();
    for key in records.iter().flat_map(|record| record.keys()) {
        *fields.entry(key.clone()).or_default() += 1;
    }
    if args.json {
        println!(
            "{}",
            json!({"kind": "data", "path": args.path, "records": records.len(), "fields": fields})
        );
        return Ok(());
    }
    println!("{}: {} records\n", path.display(), render::count(records.len() as u64));
    let rows: Vec<Vec<String>> =
        fields.into_iter().map(|(key, count)| vec![key, format!("in {}", render::count(count))]).collect();
    print!("{}", render::table(&rows));
    for record in records.into_iter().take(args.examples) {
        println!("\n{:#}", Value::Object(record));
    }
    println!("\nwith --base-model B the examples are shown as tokens with their loss mask");
    Ok(())
}
