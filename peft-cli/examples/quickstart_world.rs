//! Makes everything that the quickstart stands on, from one seed: a synthetic corpus of market stories, a tokenizer
//! trained on it, an untrained checkpoint to pretrain, and the data of the task (sentence to JSON).
//!
//! ```text
//! cargo run --release -p peft-cli --example quickstart_world -- out/quickstart-world
//! cargo run --release -p peft-cli -- train recipes/quickstart/pretrain.yaml
//! ```
//!
//! The second command writes `out/quickstart-pretrain/model`, which is what `recipes/quickstart/base` holds.

use peft_core::checkpoint::{CheckpointError, Dtype, LazyTensor, f32_bytes, write_safetensors};
use peft_core::random::Stream;
use serde_json::{Value, json};
use std::collections::BTreeMap;
use std::error::Error;
use std::path::{Path, PathBuf};
use tokenizers::models::bpe::{BPE, BpeTrainer};
use tokenizers::pre_tokenizers::byte_level::ByteLevel;
use tokenizers::processors::template::TemplateProcessing;
use tokenizers::{AddedToken, Tokenizer};

const SEED: u64 = 7;
const STORIES: u64 = 16_000;
const TASK_EXAMPLES: u64 = 1_600;
const HELD_OUT: u64 = 200;

const NAMES: [&str; 40] = [
    "Mia", "Ben", "Lena", "Tom", "Ada", "Noah", "Ivy", "Max", "Nora", "Finn", "Ella", "Hugo", "Lily", "Otto",
    "Zoe", "Sam", "Ruth", "Paul", "Iris", "Karl", "Anna", "Jack", "Rosa", "Theo", "Vera", "Emil", "Clara",
    "Leo", "Maya", "Oscar", "Hanna", "Felix", "Alma", "Jonas", "Greta", "Simon", "Ida", "Peter", "Olga",
    "Victor",
];
const COLORS: [&str; 10] =
    ["red", "blue", "green", "yellow", "white", "black", "brown", "pink", "orange", "gray"];
const ITEMS: [&str; 30] = [
    "apples", "pears", "plums", "lemons", "roses", "tulips", "hats", "scarves", "gloves", "boots", "cups",
    "plates", "bowls", "spoons", "pens", "books", "boxes", "bags", "lamps", "candles", "ropes", "baskets",
    "buttons", "ribbons", "stones", "shells", "eggs", "cakes", "kites", "drums",
];
const PLACES: [&str; 16] = [
    "market", "harbor", "station", "garden", "school", "museum", "library", "bakery", "castle", "farm",
    "mill", "bridge", "tower", "square", "park", "inn",
];
const NUMBERS: [&str; 12] =
    ["one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve"];
const DAYS: [&str; 7] = ["Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday"];
const WEATHER: [&str; 5] = ["sunny", "rainy", "windy", "cloudy", "snowy"];
/// Past and base form.
const VERBS: [(&str, &str); 6] = [
    ("bought", "buy"),
    ("sold", "sell"),
    ("found", "find"),
    ("lost", "lose"),
    ("carried", "carry"),
    ("painted", "paint"),
];

/// What happened once.
struct Event {
    who: &'static str,
    verb: (&'static str, &'static str),
    count: usize,
    color: &'static str,
    item: &'static str,
    place: &'static str,
    day: &'static str,
}

fn pick<T: Copy>(stream: &mut Stream, from: &[T]) -> T {
    from[stream.below(from.len() as u64) as usize]
}

impl Event {
    fn draw(stream: &mut Stream) -> Self {
        Self {
            who: pick(stream, &NAMES),
            verb: pick(stream, &VERBS),
            count: 1 + stream.below(NUMBERS.len() as u64) as usize,
            color: pick(stream, &COLORS),
            item: pick(stream, &ITEMS),
            place: pick(stream, &PLACES),
            day: pick(stream, &DAYS),
        }
    }

    fn number(&self) -> &'static str {
        NUMBERS[self.count - 1]
    }

    /// One of three ways to say it.
    fn sentence(&self, stream: &mut Stream) -> String {
        let Event { who, verb: (past, _), color, item, place, day, .. } = self;
        let number = self.number();
        match stream.below(3) {
            0 => format!("{who} {past} {number} {color} {item} at the {place} on {day}."),
            1 => format!("On {day} {who} {past} {number} {color} {item} at the {place}."),
            _ => format!("At the {place} {who} {past} {number} {color} {item} on {day}."),
        }
    }
}

/// A few sentences that come back to the same event and tell it again in other words, so that the model learns to look
/// back and copy; and now and then a note in the notation of the task, about something else.
fn story(stream: &mut Stream) -> String {
    let event = Event::draw(stream);
    let other = pick(stream, &NAMES);
    let Event { who, verb: (_, verb), color, item, place, day, .. } = &event;
    let mut lines = vec![event.sentence(stream)];
    lines.push(match stream.below(5) {
        0 => format!("Who was it? It was {who}."),
        1 => format!("The count was {}.", event.number()),
        2 => format!("The color was {color}."),
        3 => format!("The item? It was {item}."),
        _ => format!("The place was the {place}."),
    });
    lines.push(match stream.below(7) {
        0 => format!(
            "\"What did {who} {verb}?\" asked {other}. \"{} {color} {item},\" said {who}.",
            event.number()
        ),
        1 => format!("\"Where was {who}?\" asked {other}. \"At the {place},\" said {who}."),
        2 => format!("{other} asked how many {item} there were. There were {}.", event.number()),
        3 => format!("The {item} were {color}, and {other} liked the {color} {item}."),
        4 => format!("\"When was that?\" asked {other}. \"On {day},\" said {who}."),
        5 => format!("{who} counted: {} {item}, that is {}.", event.number(), event.count),
        _ => format!("{other} walked to the {place} and met {who} there."),
    });
    lines.push(match stream.below(3) {
        0 => format!("\"Tell me more,\" said {other}. \"{}\" said {who}.", event.sentence(stream)),
        1 => format!("{other} told it again: {}", event.sentence(stream)),
        _ => format!("{other} wrote: {who}, {}, {color}, {item}, {place}, {day}.", event.number()),
    });
    match stream.below(3) {
        0 => lines.push(format!("{}", json!({"day": day, "weather": pick(stream, &WEATHER)}))),
        1 => lines.push(format!("{}", json!({"price": stream.below(100), "shop": place, "seller": other}))),
        _ => {}
    }
    lines.join(" ")
}

/// The task: the sentence as JSON.
fn example(stream: &mut Stream) -> Value {
    let event = Event::draw(stream);
    let completion = json!({
        "who": event.who, "count": event.count, "color": event.color, "item": event.item, "place": event.place,
    });
    json!({"prompt": format!("{}\n", event.sentence(stream)), "completion": completion.to_string()})
}

fn write_lines(path: &Path, lines: impl Iterator<Item = Value>) -> Result<(), Box<dyn Error>> {
    let text: String = lines.map(|line| format!("{line}\n")).collect();
    Ok(std::fs::write(path, text)?)
}

fn tokenizer(corpus: &[String]) -> Result<Tokenizer, Box<dyn Error + Send + Sync>> {
    let special = |text: &str| AddedToken::from(text, true);
    let mut trainer = BpeTrainer::builder()
        .vocab_size(512)
        .min_frequency(2)
        .show_progress(false)
        .special_tokens(vec![special("<s>"), special("</s>")])
        .initial_alphabet(ByteLevel::alphabet().into_iter().collect())
        .build();
    let mut tokenizer = Tokenizer::new(BPE::default());
    let bytes = ByteLevel::default().add_prefix_space(false);
    tokenizer.with_pre_tokenizer(Some(bytes)).with_decoder(Some(bytes));
    let mut trainer = tokenizers::models::TrainerWrapper::from(std::mem::take(&mut trainer));
    tokenizer.train(&mut trainer, corpus.iter())?;
    let template = TemplateProcessing::builder()
        .try_single("<s> $A")?
        .try_pair("<s> $A $B")?
        .special_tokens(vec![("<s>", 0)])
        .build()?;
    tokenizer.with_post_processor(Some(template));
    Ok(tokenizer)
}

/// An untrained checkpoint in Hugging Face layout.
fn checkpoint(dir: &Path) -> Result<(), Box<dyn Error>> {
    const HIDDEN: usize = 96;
    const INTERMEDIATE: usize = 256;
    const LAYERS: usize = 4;
    const HEADS: usize = 4;
    const KV_HEADS: usize = 2;
    const HEAD_DIM: usize = 24;
    const VOCAB: usize = 512;
    let config = json!({
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": HIDDEN,
        "intermediate_size": INTERMEDIATE, "num_hidden_layers": LAYERS, "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS, "head_dim": HEAD_DIM, "vocab_size": VOCAB, "max_position_embeddings": 256,
        "rms_norm_eps": 1e-5, "rope_theta": 10000.0, "hidden_act": "silu", "tie_word_embeddings": true,
        "attention_bias": false, "mlp_bias": false, "bos_token_id": 0, "eos_token_id": 1, "torch_dtype": "float32",
    });
    std::fs::write(dir.join("config.json"), format!("{config:#}\n"))?;
    let generation = json!({"bos_token_id": 0, "eos_token_id": 1});
    std::fs::write(dir.join("generation_config.json"), format!("{generation:#}\n"))?;
    let tokenizer = json!({
        "tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "</s>",
        "model_max_length": 256, "clean_up_tokenization_spaces": false,
    });
    std::fs::write(dir.join("tokenizer_config.json"), format!("{tokenizer:#}\n"))?;

    let mut shapes = vec![("model.embed_tokens.weight".to_string(), vec![VOCAB, HIDDEN])];
    for layer in 0..LAYERS {
        let matrices = [
            ("self_attn.q_proj", HEADS * HEAD_DIM, HIDDEN),
            ("self_attn.k_proj", KV_HEADS * HEAD_DIM, HIDDEN),
            ("self_attn.v_proj", KV_HEADS * HEAD_DIM, HIDDEN),
            ("self_attn.o_proj", HIDDEN, HEADS * HEAD_DIM),
            ("mlp.gate_proj", INTERMEDIATE, HIDDEN),
            ("mlp.up_proj", INTERMEDIATE, HIDDEN),
            ("mlp.down_proj", HIDDEN, INTERMEDIATE),
        ];
        for (name, rows, columns) in matrices {
            shapes.push((format!("model.layers.{layer}.{name}.weight"), vec![rows, columns]));
        }
        for name in ["input_layernorm", "post_attention_layernorm"] {
            shapes.push((format!("model.layers.{layer}.{name}.weight"), vec![HIDDEN]));
        }
    }
    shapes.push(("model.norm.weight".to_string(), vec![HIDDEN]));
    let tensors = shapes.into_iter().map(|(name, shape)| {
        let count = shape.iter().product();
        let mut stream = Stream::new(SEED, "initial weights", &name, &[]);
        let deviation = if shape.len() == 2 { 0.5 / (shape[1] as f64).sqrt() } else { 0.0 };
        let mean = if shape.len() == 1 { 1.0 } else { 0.0 };
        let values: Vec<f32> = (0..count).map(|_| (mean + deviation * stream.normal()) as f32).collect();
        LazyTensor::new(name, Dtype::F32, shape, move || Ok::<_, CheckpointError>(f32_bytes(&values).into()))
    });
    let metadata = BTreeMap::from([("format".to_string(), "pt".to_string())]);
    write_safetensors(&dir.join("model.safetensors"), tensors.collect(), &metadata)?;
    Ok(())
}

fn main() -> Result<(), Box<dyn Error + Send + Sync>> {
    let out = std::env::args().nth(1).map(PathBuf::from).ok_or("usage: quickstart_world FOLDER")?;
    let base = out.join("base");
    std::fs::create_dir_all(&base)?;
    let corpus: Vec<String> =
        (0..STORIES).map(|n| story(&mut Stream::new(SEED, "story", "", &[n]))).collect();
    let text = |story: &String| json!({ "text": story });
    write_lines(&out.join("corpus.jsonl"), corpus.iter().map(text)).map_err(|error| error.to_string())?;
    let task = |n: u64| example(&mut Stream::new(SEED, "example", "", &[n]));
    let write = |name: &str, range: std::ops::Range<u64>| {
        write_lines(&out.join(name), range.map(task)).map_err(|error| error.to_string())
    };
    write("train.jsonl", 0..TASK_EXAMPLES)?;
    write("held_out.jsonl", TASK_EXAMPLES..TASK_EXAMPLES + HELD_OUT)?;
    tokenizer(&corpus)?.save(base.join("tokenizer.json"), true)?;
    checkpoint(&base).map_err(|error| error.to_string())?;
    println!("{}", out.display());
    Ok(())
}
