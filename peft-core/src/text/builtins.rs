//! The filters, tests, methods and functions that templates may call, each one paid for before it runs.

use minijinja::value::{Kwargs, Rest, Value, ValueKind};
use minijinja::{Environment, Error, ErrorKind, State, filters, functions, tests};

use super::meter::{Meter, meter};
use super::operators::{contains, equal, to_str};
use super::python;

/// What stands around a `{% generation %}` block's text while its place is looked for: two noncharacters of Unicode,
/// which no text should hold.
pub(super) const MARKS: [char; 2] = ['\u{fdd0}', '\u{fdd1}'];
/// The variable that asks for the marks. No template can name it.
pub(super) const MARKING: &str = "<marks>";

/// Registers all of them.
pub(super) fn add_to(environment: &mut Environment<'static>) {
    add_filters(environment);
    add_tests(environment);
    add_functions(environment);
    environment.set_unknown_method_callback(method);
    environment.set_formatter(|out, state, value| {
        let text = to_str(&*meter(state)?, value)?;
        out.write_str(&text).map_err(Error::from)
    });
}

/// Filters that take anything for its text.
const OF_TEXT: [&str; 6] = ["lower", "upper", "title", "capitalize", "replace", "trim"];

/// What a filter reads of its arguments.
#[derive(Clone, Copy)]
enum Reads {
    /// The value itself.
    Shallow,
    /// A text character by character.
    Items,
    /// Everything in the value, again and again (sorting).
    Deep,
}

fn add_filters(environment: &mut Environment<'static>) {
    use Reads::{Deep, Items, Shallow};
    let built_in = [
        ("safe", Shallow, Value::from_function(filters::safe)),
        ("lower", Shallow, Value::from_function(filters::lower)),
        ("upper", Shallow, Value::from_function(filters::upper)),
        ("title", Shallow, Value::from_function(filters::title)),
        ("capitalize", Shallow, Value::from_function(filters::capitalize)),
        ("replace", Shallow, Value::from_function(filters::replace)),
        ("length", Shallow, Value::from_function(filters::length)),
        ("count", Shallow, Value::from_function(filters::length)),
        ("items", Shallow, Value::from_function(filters::items)),
        ("reverse", Shallow, Value::from_function(filters::reverse)),
        ("trim", Shallow, Value::from_function(filters::trim)),
        ("default", Shallow, Value::from_function(filters::default)),
        ("d", Shallow, Value::from_function(filters::default)),
        ("round", Shallow, Value::from_function(filters::round)),
        ("abs", Shallow, Value::from_function(filters::abs)),
        ("int", Shallow, Value::from_function(filters::int)),
        ("float", Shallow, Value::from_function(filters::float)),
        ("attr", Shallow, Value::from_function(filters::attr)),
        ("bool", Shallow, Value::from_function(filters::bool)),
        ("indent", Shallow, Value::from_function(filters::indent)),
        ("first", Items, Value::from_function(filters::first)),
        ("last", Items, Value::from_function(filters::last)),
        ("list", Items, Value::from_function(filters::list)),
        ("split", Items, Value::from_function(filters::split)),
        ("lines", Items, Value::from_function(filters::lines)),
        ("batch", Items, Value::from_function(filters::batch)),
        ("slice", Items, Value::from_function(filters::slice)),
        ("select", Items, Value::from_function(filters::select)),
        ("reject", Items, Value::from_function(filters::reject)),
        ("selectattr", Items, Value::from_function(filters::selectattr)),
        ("rejectattr", Items, Value::from_function(filters::rejectattr)),
        ("map", Items, Value::from_function(filters::map)),
        ("chain", Items, Value::from_function(filters::chain)),
        ("zip", Items, Value::from_function(filters::zip)),
        ("min", Deep, Value::from_function(filters::min)),
        ("max", Deep, Value::from_function(filters::max)),
        ("sort", Deep, Value::from_function(filters::sort)),
        ("sum", Deep, Value::from_function(filters::sum)),
        ("unique", Deep, Value::from_function(filters::unique)),
        ("groupby", Deep, Value::from_function(filters::groupby)),
        ("dictsort", Deep, Value::from_function(filters::dictsort)),
        ("format", Deep, Value::from_function(filters::format)),
    ];
    for (name, reads, filter) in built_in {
        environment.add_filter(name, move |state: &State, Rest(mut args): Rest<Value>| {
            let meter = meter(state)?;
            if let (true, Some(subject)) = (OF_TEXT.contains(&name), args.first_mut()) {
                *subject = Value::from(to_str(&meter, subject)?);
            }
            charge_arguments(&meter, reads, &args)?;
            charge_result(&meter, name, &args)?;
            meter.settle(filter.call(state, &args)?)
        });
    }
    for name in ["pprint", "escape", "e"] {
        environment.remove_filter(name);
    }
    environment.add_filter(
        "join",
        |state: &State, values: Value, separator: Option<String>, kwargs: Kwargs| {
            let attribute = kwargs.get::<Option<String>>("attribute")?;
            let separator = separator.or(kwargs.get::<Option<String>>("d")?).unwrap_or_default();
            kwargs.assert_all_used()?;
            let meter = meter(state)?;
            let mut texts = Vec::new();
            for item in meter.items(&values)? {
                let item = match &attribute {
                    Some(attribute) => item.get_attr(attribute)?,
                    None => item,
                };
                texts.push(to_str(&meter, &item)?);
            }
            joined(&meter, &texts, &separator)
        },
    );
    environment.add_filter("tojson", |state: &State, value: Value, indent: Option<Value>, kwargs: Kwargs| {
        let json = python::Json::from_kwargs(indent, &kwargs)?;
        let (each, level) = json.overhead();
        meter(state)?.charge_deep(&value, each, level)?;
        let text = json.dump(&value)?;
        meter(state)?.charge(text.len())?;
        Ok::<_, Error>(text)
    });
    environment.add_filter("string", |state: &State, value: Value| to_str(&*meter(state)?, &value));
    environment.add_filter("generation", |state: &State, text: &str| {
        meter(state)?.charge(text.len())?;
        Ok::<_, Error>(match state.lookup(MARKING) {
            Some(_) => format!("{}{text}{}", MARKS[0], MARKS[1]),
            None => text.to_string(),
        })
    });
}

fn charge_arguments(meter: &Meter, reads: Reads, args: &[Value]) -> Result<(), Error> {
    for arg in args {
        match (reads, arg.as_str()) {
            (Reads::Shallow, Some(text)) => meter.charge(text.len())?,
            (Reads::Items | Reads::Deep, Some(text)) => meter.charge(text.len().saturating_mul(32))?,
            (Reads::Deep, None) => meter.charge_deep(arg, 320, 0)?,
            (_, None) => meter.charge_shallow(arg)?,
        }
    }
    Ok(())
}

/// Pays for a result that can be far larger than what it is made from.
fn charge_result(meter: &Meter, name: &str, args: &[Value]) -> Result<(), Error> {
    let text = |at: usize| args.get(at).and_then(Value::as_str);
    let number = |at: usize| args.get(at).and_then(Value::as_usize).unwrap_or(0);
    match (name, text(0)) {
        ("replace", Some(subject)) => {
            charge_replacement(meter, subject, text(1).unwrap_or_default(), text(2).unwrap_or_default())
        }
        ("indent", Some(subject)) => {
            let lines = 1 + subject.matches('\n').count();
            let named = |arg: &Value| arg.get_attr("width").ok().and_then(|width| width.as_usize());
            let width = number(1).max(args.iter().skip(1).filter_map(named).max().unwrap_or(0));
            meter.charge(width.saturating_mul(lines))
        }
        ("batch" | "slice", _) => meter.charge(number(1).saturating_mul(64)),
        ("format", Some(subject)) => charge_format(meter, subject),
        _ => Ok(()),
    }
}

fn charge_replacement(meter: &Meter, text: &str, old: &str, new: &str) -> Result<(), Error> {
    let places = if old.is_empty() { text.len() + 1 } else { text.matches(old).count() };
    meter.charge(places.saturating_mul(new.len()).saturating_add(text.len()))
}

/// Pays for the widths and precisions in a format.
fn charge_format(meter: &Meter, format: &str) -> Result<(), Error> {
    let numbers = format.split(|c: char| !c.is_ascii_digit()).filter(|digits| !digits.is_empty());
    for digits in numbers {
        meter.charge(digits.parse().unwrap_or(usize::MAX).saturating_mul(4))?;
    }
    match format.contains('*') {
        true => Err(Error::new(ErrorKind::InvalidOperation, "`*` in a format is not supported")),
        false => Ok(()),
    }
}

fn joined(meter: &Meter, texts: &[String], separator: &str) -> Result<Value, Error> {
    let total = texts.iter().map(String::len).sum::<usize>();
    meter.charge(total.saturating_add(separator.len().saturating_mul(texts.len())))?;
    Ok(Value::from(texts.join(separator)))
}

fn add_tests(environment: &mut Environment<'static>) {
    environment.add_test("sequence", |value: &Value| {
        matches!(value.kind(), ValueKind::Seq | ValueKind::Map | ValueKind::String)
    });
    environment.add_test("iterable", |value: &Value| {
        matches!(value.kind(), ValueKind::String | ValueKind::Undefined) || value.try_iter().is_ok()
    });
    for name in ["eq", "equalto", "=="] {
        environment.add_test(name, |state: &State, a: Value, b: Value| equal(&*meter(state)?, &a, &b));
    }
    for name in ["ne", "!="] {
        environment.add_test(name, |state: &State, a: Value, b: Value| {
            equal(&*meter(state)?, &a, &b).map(|same| !same)
        });
    }
    environment
        .add_test("in", |state: &State, item: Value, all: Value| contains(&*meter(state)?, &all, &item));
    let built_in = [
        (&["lt", "lessthan", "<"][..], Value::from_function(tests::is_lt)),
        (&["le", "<="], Value::from_function(tests::is_le)),
        (&["gt", "greaterthan", ">"], Value::from_function(tests::is_gt)),
        (&["ge", ">="], Value::from_function(tests::is_ge)),
        (&["lower"], Value::from_function(tests::is_lower)),
        (&["upper"], Value::from_function(tests::is_upper)),
        (&["startingwith"], Value::from_function(tests::is_startingwith)),
        (&["endingwith"], Value::from_function(tests::is_endingwith)),
        (&["sameas"], Value::from_function(tests::is_sameas)),
    ];
    for (names, test) in built_in {
        for &name in names {
            let test = test.clone();
            environment.add_test(name, move |state: &State, args: Rest<Value>| {
                charge_arguments(&*meter(state)?, Reads::Deep, &args)?;
                test.call(state, &args).map(|answer| answer.is_true())
            });
        }
    }
}

fn add_functions(environment: &mut Environment<'static>) {
    environment.remove_global("debug");
    for (name, function) in [
        ("range", Value::from_function(functions::range)),
        ("dict", Value::from_function(functions::dict)),
        ("namespace", Value::from_function(functions::namespace)),
    ] {
        environment.add_function(name, move |state: &State, args: Rest<Value>| {
            let meter = meter(state)?;
            let result = meter.settle(function.call(state, &args)?)?;
            meter.check_depth(&result)?;
            Ok::<_, Error>(result)
        });
    }
    environment.add_function("raise_exception", |state: &State, message: Value| -> Result<String, Error> {
        let refusal = Refusal(to_str(&*meter(state)?, &message)?);
        Err(Error::new(ErrorKind::InvalidOperation, "raise_exception").with_source(refusal))
    });
}

/// What a template said to `raise_exception`.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
pub(super) struct Refusal(pub(super) String);

/// Methods of texts, lists and maps.
fn method(state: &State, value: &Value, method: &str, args: &[Value]) -> Result<Value, Error> {
    let meter = meter(state)?;
    let reads = match method {
        "split" | "rsplit" | "splitlines" | "partition" | "rpartition" => Reads::Items,
        "count" if value.as_str().is_none() => Reads::Deep,
        _ => Reads::Shallow,
    };
    charge_arguments(&meter, reads, std::slice::from_ref(value))?;
    charge_arguments(&meter, reads, args)?;
    if let Some(text) = value.as_str() {
        let argument = |at: usize| args.get(at).and_then(Value::as_str);
        match (method, argument(0)) {
            ("replace", Some(old)) => charge_replacement(&meter, text, old, argument(1).unwrap_or_default())?,
            ("strip" | "lstrip" | "rstrip", Some(set)) => {
                meter.charge(text.len().saturating_mul(set.len()))?
            }
            ("upper" | "lower" | "title" | "capitalize", _) => meter.charge(text.len().saturating_mul(2))?,
            ("format", _) => {
                charge_format(&meter, text)?;
                charge_arguments(&meter, Reads::Deep, args)?;
            }
            ("join", _) => {
                let items = args.first().map(|list| meter.items(list)).transpose()?.unwrap_or_default();
                let text_of = |item: &Value| {
                    let text = item.as_str().map(str::to_string);
                    text.ok_or_else(|| Error::new(ErrorKind::InvalidOperation, "join: expected texts"))
                };
                return joined(&meter, &items.iter().map(text_of).collect::<Result<Vec<_>, _>>()?, text);
            }
            _ => {}
        }
        if let Some(result) = python::string_method(text, method, args) {
            return meter.settle(result);
        }
    }
    meter.settle(minijinja_contrib::pycompat::unknown_method_callback(state, value, method, args)?)
}
