//! `peft generate`: continue a prompt, or many, or chat. The continuation of one streams to stdout and nothing else goes
//! there; those of many are lines of JSON.

use super::data;
use crate::args::GenerateArgs;
use crate::error::CliError;
use crate::{device, open, prompts};
use peft_core::model::{Decoder, Prompt, Sampling, generate, generate_batches};
use peft_core::text::{ChatTemplate, DecodeStream, Tokenizer};
use serde_json::{Map, Value, json};
use std::io::{BufRead, IsTerminal, Write};
use std::path::Path;

/// Batches among which prompts are sorted by length, and after which results are printed.
const SORTED_BATCHES: usize = 16;

/// Runs the command.
pub fn run(args: GenerateArgs) -> Result<(), CliError> {
    if args.prompt.is_none() && args.prompts.is_none() && !args.chat {
        return Err(CliError::flag("--prompt", "give a prompt, or --chat to converse"));
    }
    if args.batch_size == 0 {
        return Err(CliError::flag("--batch-size", "0 prompts at a time are never done"));
    }
    if !args.temperature.is_finite() || args.temperature < 0.0 {
        return Err(CliError::flag("--temperature", format!("{} is no temperature", args.temperature)));
    }
    if args.top_k == Some(0) {
        return Err(CliError::flag("--top-k", "0 tokens leave nothing to draw from"));
    }
    if args.top_p.is_some_and(|p| !(p > 0.0 && p <= 1.0)) {
        return Err(CliError::flag("--top-p", "expected a probability above 0 and up to 1"));
    }
    let device = device::device(&args.model.device)?;
    let compute = device::compute_type(&args.model.dtype, &device)?;
    let hub = open::hub(args.model.revision.as_deref(), args.model.offline);
    let base = open::base(&args.model.base_model, &hub)?;
    let model = open::model(&base, args.model.adapter.as_deref(), args.model.offline, &device, compute)?;
    let template = match &args.template.chat_template {
        Some(value) => Some(ChatTemplate::new(data::chat_template(value)?, base.tokenizer.special_tokens())?),
        None if args.chat => Some(base.tokenizer.chat_template()?),
        None => None,
    };
    let variables = data::chat_template_kwargs(&args.template)?;
    let session = Session { model, tokenizer: base.tokenizer, template, variables, args: &args };

    device::watched(&device, || match (&args.prompt, &args.prompts) {
        (Some(prompt), _) => session.answer(&session.prompt_ids(prompt)?).map(|_| ()),
        (None, Some(file)) => session.answer_all(file),
        (None, None) => session.converse(),
    })
}

fn message(role: &str, content: &str) -> Value {
    json!({"role": role, "content": content})
}

struct Session<'a> {
    model: Decoder,
    tokenizer: Tokenizer,
    /// There in a chat.
    template: Option<ChatTemplate>,
    variables: Map<String, Value>,
    args: &'a GenerateArgs,
}

impl Session<'_> {
    fn opening(&self) -> Vec<Value> {
        self.args.system.iter().map(|text| message("system", text)).collect()
    }

    /// Reads messages from stdin, one a line, until its end.
    fn converse(&self) -> Result<(), CliError> {
        let mut messages = self.opening();
        let interactive = std::io::stdin().is_terminal();
        loop {
            if interactive {
                eprint!("> ");
            }
            let mut line = String::new();
            let read = std::io::stdin().lock().read_line(&mut line);
            let read = read.map_err(|source| CliError::Io { path: "stdin".into(), source })?;
            if read == 0 {
                return Ok(());
            }
            if line.trim().is_empty() {
                continue;
            }
            messages.push(message("user", line.trim()));
            let reply = self.answer(&self.message_ids(&messages)?)?;
            messages.push(message("assistant", &reply));
        }
    }

    /// The tokens of a prompt; in a chat, of the user's first message.
    fn prompt_ids(&self, prompt: &str) -> Result<Vec<u32>, CliError> {
        if self.args.chat {
            return self.message_ids(&[self.opening(), vec![message("user", prompt)]].concat());
        }
        self.started(self.tokenizer.encode(prompt, true)?.ids)
    }

    /// The tokens of a conversation up to where the answer begins.
    fn message_ids(&self, messages: &[Value]) -> Result<Vec<u32>, CliError> {
        let Some(template) = &self.template else {
            return Err(CliError::flag("--chat", "there is no chat template"));
        };
        let text = match &self.args.prefill {
            Some(prefill) => {
                let messages = [messages, &[message("assistant", prefill)]].concat();
                template.render_open(&messages, &self.variables)?
            }
            None => template.render(messages, true, &self.variables)?,
        };
        self.started(self.tokenizer.encode(&text, true)?.ids)
    }

    /// `ids` with something to start from, all of them in the model's vocabulary.
    fn started(&self, mut ids: Vec<u32>) -> Result<Vec<u32>, CliError> {
        if ids.is_empty() {
            // An empty prompt starts where every text starts.
            ids.extend(self.tokenizer.bos().or(self.tokenizer.eos()));
        }
        let vocab_size = self.model.config.vocab_size;
        if ids.is_empty() {
            return Err(CliError::flag("--prompt", "the prompt has no tokens"));
        }
        if let Some(id) = ids.iter().find(|id| **id as usize >= vocab_size) {
            let message = format!("token id {id} is outside the model's vocabulary of {vocab_size}");
            return Err(CliError::flag("--prompt", message));
        }
        Ok(ids)
    }

    fn sampling(&self) -> Sampling {
        Sampling {
            temperature: self.args.temperature,
            top_k: self.args.top_k,
            top_p: self.args.top_p,
            seed: self.args.seed,
        }
    }

    /// What turns the tokens that follow `ids` into text. It hears the prompt too: some decoders drop a space at the
    /// start of a text.
    fn stream(&self, ids: &[u32]) -> Result<DecodeStream<'_>, CliError> {
        let mut stream = self.tokenizer.decode_stream(true);
        for id in ids {
            stream.push(*id)?;
        }
        Ok(stream)
    }

    /// Continues every prompt of `file` and prints a line for each.
    fn answer_all(&self, file: &Path) -> Result<(), CliError> {
        let texts = prompts::from_file(file)?;
        let all = texts.iter().map(|text| self.prompt_ids(text)).collect::<Result<Vec<_>, _>>()?;
        let stop = self.tokenizer.stop_ids();
        let prompts: Vec<Prompt> = (0u64..)
            .zip(&all)
            .map(|(draws, ids)| Prompt { ids, max_new_tokens: self.args.max_new_tokens, draws })
            .collect();
        let part = SORTED_BATCHES.saturating_mul(self.args.batch_size);
        for (prompts, texts) in prompts.chunks(part).zip(texts.chunks(part)) {
            let answers = generate_batches(
                &self.model,
                prompts,
                self.args.batch_size,
                stop,
                &self.sampling(),
                |_, _| true,
            );
            for ((prompt, text), answer) in prompts.iter().zip(texts).zip(answers) {
                let mut stream = self.stream(prompt.ids)?;
                let pieces = answer.iter().map(|token| stream.push(*token)).collect::<Result<String, _>>()?;
                let line = json!({"prompt": text, "generated": pieces + &stream.finish()?});
                let mut out = std::io::stdout().lock();
                if writeln!(out, "{line}").and_then(|()| out.flush()).is_err() {
                    // A reader that has gone away needs no more answers.
                    return Ok(());
                }
            }
        }
        Ok(())
    }

    /// Streams the continuation of `ids` and returns it.
    fn answer(&self, ids: &[u32]) -> Result<String, CliError> {
        let mut stream = self.stream(ids)?;
        let mut text = String::new();
        let mut failed = None;
        let emit = |piece: String, text: &mut String| {
            let mut out = std::io::stdout().lock();
            let written = out.write_all(piece.as_bytes()).and_then(|()| out.flush());
            text.push_str(&piece);
            // A reader that has gone away needs no more tokens.
            written.is_ok()
        };
        generate(
            &self.model,
            ids,
            self.args.max_new_tokens,
            self.tokenizer.stop_ids(),
            &self.sampling(),
            |token| match stream.push(token) {
                Ok(piece) => emit(piece, &mut text),
                Err(error) => {
                    failed = Some(error);
                    false
                }
            },
        );
        if let Some(error) = failed {
            return Err(error.into());
        }
        emit(stream.finish()?, &mut text);
        println!();
        Ok(text)
    }
}
