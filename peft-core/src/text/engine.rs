//! The template engine: Jinja as `transformers` sets it up, with every operation paid for.
//!
//! A template is parsed and compiled by minijinja. The compiled steps are then rewritten so that each one that can copy,
//! compare or keep more than a few bytes calls a function of ours, which pays before it works.

use std::collections::BTreeMap;
use std::ops::Range;

use minijinja::machinery::{
    CodeGenerator, Instruction, Instructions, Token, Vm, WhitespaceConfig, make_string_output, parse,
    tokenize,
};
use minijinja::syntax::SyntaxConfig;
use minijinja::value::Value;
use minijinja::{AutoEscape, Environment, Error, ErrorKind, UndefinedBehavior};

use super::meter::{METER, Meter};
use super::{builtins, operators};

/// Steps of one rendering; a conversation takes some hundred a message.
pub(super) const MAX_STEPS: u64 = 2_000_000;
/// Bytes that a rendering may read and write beyond its share for the messages; see [`Meter`].
const MIN_BYTES: u64 = 64 << 20;
/// How often each byte of the messages may be read or written on top.
const PASSES: u64 = 64;
/// Nesting of macro calls.
const MAX_RECURSION: usize = 100;
/// Bytes of a template; the longest published ones have some 20 000.
const MAX_SOURCE: usize = 1 << 20;
/// Tokens between `{{` and `}}` or `{%` and `%}`, and branches of one template: the compiler descends into them.
const MAX_TOKENS: usize = 1000;
const MAX_BRANCHES: usize = 500;
const NAME: &str = "chat_template";

/// A compiled template. Its source is kept for the rest of the process, as the templates of a process are few and stay
/// in use.
pub(super) struct Program {
    environment: Environment<'static>,
    steps: Instructions<'static>,
    blocks: BTreeMap<&'static str, Instructions<'static>>,
}

impl std::fmt::Debug for Program {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Program({} steps)", self.steps.len())
    }
}

impl Program {
    pub(super) fn new(source: String) -> Result<Self, Error> {
        let too_large = |what: &str| Error::new(ErrorKind::SyntaxError, format!("the template {what}"));
        if source.len() > MAX_SOURCE {
            return Err(too_large(&format!("has more than {MAX_SOURCE} bytes")));
        }
        let source: &'static str = prepared(&source).map_err(|problem| too_large(&problem))?.leak();
        let tree = parse(source, NAME, SyntaxConfig, whitespace())?;
        let mut generator = CodeGenerator::new(NAME, source);
        generator.compile_stmt(&tree);
        let (steps, blocks) = generator.finish();
        let blocks = blocks.into_iter().map(|(name, steps)| Ok((name, metered(&steps)?)));
        Ok(Self {
            environment: environment(),
            steps: metered(&steps)?,
            blocks: blocks.collect::<Result<_, Error>>()?,
        })
    }

    pub(super) fn add_function<F, R, A>(&mut self, name: &'static str, function: F)
    where
        F: minijinja::functions::Function<R, A>,
        R: minijinja::value::FunctionResult,
        A: for<'a> minijinja::value::FunctionArgs<'a>,
    {
        self.environment.add_function(name, function);
    }

    /// Runs the template. `input_bytes` is the size of what the variables hold.
    pub(super) fn run(
        &self,
        mut variables: BTreeMap<&str, Value>,
        input_bytes: usize,
    ) -> Result<String, Error> {
        let budget = MIN_BYTES.saturating_add(PASSES.saturating_mul(input_bytes as u64));
        variables.insert(METER, Value::from_object(Meter::new(budget)));
        let root = variables.into_iter().map(|(name, value)| (name.to_string(), value)).collect::<Value>();
        let mut text = String::new();
        let mut output = make_string_output(&mut text);
        Vm::new(&self.environment).eval(&self.steps, root, &self.blocks, &mut output, AutoEscape::None)?;
        Ok(text)
    }
}

/// The engine, set up as `transformers` sets up its own.
fn environment() -> Environment<'static> {
    let mut environment = Environment::new();
    environment.set_undefined_behavior(UndefinedBehavior::Lenient);
    environment.set_fuel(Some(MAX_STEPS));
    environment.set_recursion_limit(MAX_RECURSION);
    environment.set_auto_escape_callback(|_| AutoEscape::None);
    builtins::add_to(&mut environment);
    operators::add_to(&mut environment);
    environment
}

fn whitespace() -> WhitespaceConfig {
    WhitespaceConfig { trim_blocks: true, lstrip_blocks: true, ..WhitespaceConfig::default() }
}

/// The source as it is compiled. Refuses what would take the parser or the compiler down a very deep tree, and hides
/// numbers that are multiplied: the compiler works out what is constant, and `[0] * 999999999999` is.
fn prepared(source: &str) -> Result<String, String> {
    let (mut inside, mut branches, mut opened, mut dotted) = (0, 0, false, false);
    let (mut numbers, mut multiplied): (Vec<Range<usize>>, bool) = (Vec::new(), false);
    let (mut out, mut copied) = (String::with_capacity(source.len()), 0);
    for token in tokenize(source, false, SyntaxConfig, whitespace()) {
        // The parser says what is wrong with it.
        let Ok((token, span)) = token else { return Ok(source.to_string()) };
        match token {
            Token::VariableStart | Token::BlockStart => inside = 0,
            Token::VariableEnd | Token::BlockEnd => {
                for number in numbers.drain(..).filter(|_| multiplied) {
                    out.push_str(&source[copied..number.start]);
                    out.push_str(&format!("({}|abs)", &source[number.clone()]));
                    copied = number.end;
                }
                multiplied = false;
            }
            Token::Ident("elif") if opened => branches += 1,
            Token::Mul | Token::Pow => multiplied = true,
            Token::Int(_) | Token::Int128(_) | Token::Float(_) if !dotted => {
                numbers.push(span.start_offset as usize..span.end_offset as usize);
            }
            _ => {}
        }
        inside += 1;
        opened = matches!(token, Token::BlockStart);
        dotted = matches!(token, Token::Dot);
        if inside > MAX_TOKENS {
            return Err(format!("has a tag with more than {MAX_TOKENS} tokens"));
        }
        if branches > MAX_BRANCHES {
            return Err(format!("has more than {MAX_BRANCHES} branches"));
        }
    }
    out.push_str(&source[copied..]);
    Ok(out)
}

/// The same steps, with those that handle values of any size replaced by calls or preceded by a check.
fn metered(steps: &Instructions<'static>) -> Result<Instructions<'static>, Error> {
    use Instruction as I;
    let call = |name: &'static str, arguments: u16| I::CallFunction(name, Some(arguments));
    let mut moved = Vec::with_capacity(steps.len() + 1);
    let mut out = Instructions::new(NAME, steps.source());
    for at in 0..steps.len() as u32 {
        moved.push(out.len() as u32);
        let Some(step) = steps.get(at) else { break };
        let replacement = match step.clone() {
            I::EmitRaw(text) => vec![I::LoadConst(Value::from(text)), I::Emit],
            I::Add => vec![call("+", 2)],
            I::Mul => vec![call("*", 2)],
            I::StringConcat => vec![call("~", 2)],
            I::Eq => vec![call("==", 2)],
            I::Ne => vec![call("!=", 2)],
            I::Lt => vec![call("<", 2)],
            I::Lte => vec![call("<=", 2)],
            I::Gt => vec![call(">", 2)],
            I::Gte => vec![call(">=", 2)],
            I::In => vec![call("in", 2)],
            I::GetItem => vec![call("[]", 2)],
            I::Slice => vec![call("[:]", 4)],
            I::CompareAndPreserve(operator) => vec![call("a<b<c", 1), I::CompareAndPreserve(operator)],
            I::PushLoop(flags) => vec![call("for", 1), I::PushLoop(flags)],
            I::FastRecurse => vec![call("for", 1), I::FastRecurse],
            I::UnpackList(count) => vec![call("for", 1), I::UnpackList(count)],
            I::BuildList(count) => vec![I::BuildList(count), call("{}", 1)],
            I::BuildMap(count) => vec![I::BuildMap(count), call("{}", 1)],
            I::SetAttr(name) => vec![I::Swap, call("{}", 1), I::Swap, I::SetAttr(name)],
            I::BuildMacro(name, offset, flags) => {
                vec![call("macro", 0), I::DiscardTop, I::BuildMacro(name, offset, flags)]
            }
            I::UnpackLists(_) | I::MergeKwargs(_) => {
                let message = "`*` and `**` before an argument are not supported";
                return Err(Error::new(ErrorKind::SyntaxError, message));
            }
            other => vec![other],
        };
        for step in replacement {
            match steps.get_span(at) {
                Some(span) => out.add_with_span(step, span),
                None => out.add(step),
            };
        }
    }
    moved.push(out.len() as u32);
    for at in 0..out.len() as u32 {
        let target = match out.get_mut(at) {
            Some(I::Jump(target) | I::JumpIfFalse(target) | I::Iterate(target)) => target,
            Some(I::JumpIfFalseOrPop(target) | I::JumpIfTrueOrPop(target)) => target,
            Some(I::BuildMacro(_, target, _)) => target,
            _ => continue,
        };
        *target = moved.get(*target as usize).copied().unwrap_or(*target);
    }
    Ok(out)
}
