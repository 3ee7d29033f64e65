//! The operators of expressions, with Python's meaning and paid for.

use minijinja::value::{Value, ValueKind};
use minijinja::{Environment, Error, ErrorKind, State};

use super::meter::{Meter, meter};
use super::python;

/// Registers each operator as a function of its own name, which the compiled steps call.
pub(super) fn add_to(environment: &mut Environment<'static>) {
    environment.add_function("+", |state: &State, a: Value, b: Value| add(&*meter(state)?, &a, &b));
    environment.add_function("*", |state: &State, a: Value, b: Value| multiply(&*meter(state)?, &a, &b));
    environment.add_function("~", |state: &State, a: Value, b: Value| {
        let meter = meter(state)?;
        Ok::<_, Error>(Value::from(to_str(&meter, &a)? + &to_str(&meter, &b)?))
    });
    environment.add_function("==", |state: &State, a: Value, b: Value| equal(&*meter(state)?, &a, &b));
    environment.add_function("!=", |state: &State, a: Value, b: Value| {
        equal(&*meter(state)?, &a, &b).map(|same| !same)
    });
    environment.add_function("<", |state: &State, a: Value, b: Value| ordered(state, &a, &b).map(|()| a < b));
    environment
        .add_function("<=", |state: &State, a: Value, b: Value| ordered(state, &a, &b).map(|()| a <= b));
    environment.add_function(">", |state: &State, a: Value, b: Value| ordered(state, &a, &b).map(|()| a > b));
    environment
        .add_function(">=", |state: &State, a: Value, b: Value| ordered(state, &a, &b).map(|()| a >= b));
    environment
        .add_function("in", |state: &State, item: Value, all: Value| contains(&*meter(state)?, &all, &item));
    environment.add_function("[]", |state: &State, value: Value, key: Value| {
        meter(state)?.charge(value.as_str().map_or(0, str::len))?;
        value.get_item(&key)
    });
    environment.add_function("[:]", |state: &State, value: Value, start: Value, stop: Value, step: Value| {
        slice(&*meter(state)?, &value, &start, &stop, &step)
    });
    // A loop's subject.
    environment.add_function("for", |state: &State, value: Value| match value.kind() {
        ValueKind::None => Err(failed("'NoneType' object is not iterable")),
        ValueKind::Seq | ValueKind::Iterable | ValueKind::Map | ValueKind::String => {
            let meter = meter(state)?;
            meter.charge(value.as_str().map_or(0, |text| text.len().saturating_mul(32)))?;
            meter.settle(value)
        }
        _ => Ok(value),
    });
    // A list or map that was just built, or a value that goes into a namespace.
    environment.add_function("{}", |state: &State, value: Value| {
        meter(state)?.check_depth(&value)?;
        Ok::<_, Error>(value)
    });
    // One side of a chained comparison.
    environment.add_function("a<b<c", |state: &State, value: Value| {
        meter(state)?.charge_deep(&value, 0, 0)?;
        match value.kind() {
            ValueKind::Seq | ValueKind::Iterable | ValueKind::Map => {
                Err(failed("lists cannot stand in a chained comparison"))
            }
            _ => Ok(value),
        }
    });
    // A macro keeps what it sees alive, so a chain of them is a chain of values; there is no use for many.
    environment.add_function("macro", |state: &State| meter(state)?.charge(1 << 16));
}

/// `str(value)`, paid for.
pub(super) fn to_str(meter: &Meter, value: &Value) -> Result<String, Error> {
    match value.as_str() {
        Some(text) => {
            meter.charge(text.len())?;
            Ok(text.to_string())
        }
        None => {
            meter.charge_deep(value, 32, 0)?;
            Ok(python::to_str(value))
        }
    }
}

fn failed(message: impl Into<String>) -> Error {
    Error::new(ErrorKind::InvalidOperation, message.into())
}

fn impossible(operator: &str, a: &Value, b: &Value) -> Error {
    failed(format!("tried to use {operator} operator on unsupported types {} and {}", a.kind(), b.kind()))
}

fn is_list(value: &Value) -> bool {
    matches!(value.kind(), ValueKind::Seq | ValueKind::Iterable)
}

/// A number or truth value as an integer, if it is a whole one by type.
fn integer(value: &Value) -> Option<i128> {
    match value.kind() {
        ValueKind::Bool => Some(value.is_true().into()),
        ValueKind::Number if value.is_integer() => i128::try_from(value.clone()).ok(),
        _ => None,
    }
}

fn float(value: &Value) -> Option<f64> {
    match integer(value) {
        Some(integer) => Some(integer as f64),
        None if value.kind() == ValueKind::Number => f64::try_from(value.clone()).ok(),
        None => None,
    }
}

fn arithmetic(
    operator: &str,
    a: &Value,
    b: &Value,
    integers: fn(i128, i128) -> Option<i128>,
    floats: fn(f64, f64) -> f64,
) -> Result<Value, Error> {
    match (integer(a), integer(b), float(a), float(b)) {
        (Some(x), Some(y), ..) => match integers(x, y) {
            Some(result) => Ok(i64::try_from(result).map_or_else(|_| Value::from(result), Value::from)),
            None => Err(failed("integer overflow")),
        },
        (_, _, Some(x), Some(y)) => Ok(Value::from(floats(x, y))),
        _ => Err(impossible(operator, a, b)),
    }
}

fn add(meter: &Meter, a: &Value, b: &Value) -> Result<Value, Error> {
    if let (Some(x), Some(y)) = (a.as_str(), b.as_str()) {
        meter.charge(x.len().saturating_add(y.len()))?;
        return Ok(Value::from([x, y].concat()));
    }
    if is_list(a) && is_list(b) {
        let mut items = meter.items(a)?;
        items.extend(meter.items(b)?);
        return Ok(Value::from(items));
    }
    arithmetic("+", a, b, i128::checked_add, |x, y| x + y)
}

fn multiply(meter: &Meter, a: &Value, b: &Value) -> Result<Value, Error> {
    let (repeated, count) = match integer(a) {
        Some(count) => (b, Some(count)),
        None => (a, integer(b)),
    };
    let count = count.map(|count| usize::try_from(count.max(0)).unwrap_or(usize::MAX));
    match (repeated.as_str(), count) {
        (Some(text), Some(count)) => {
            meter.charge(text.len().saturating_mul(count))?;
            Ok(Value::from(text.repeat(count)))
        }
        (None, Some(count)) if is_list(repeated) => {
            let items = meter.items(repeated)?;
            meter.charge((32 * items.len()).saturating_mul(count))?;
            Ok(Value::from((0..count).flat_map(|_| items.iter().cloned()).collect::<Vec<_>>()))
        }
        _ => arithmetic("*", a, b, i128::checked_mul, |x, y| x * y),
    }
}

/// `a == b`.
pub(super) fn equal(meter: &Meter, a: &Value, b: &Value) -> Result<bool, Error> {
    match (a.as_str(), b.as_str()) {
        (Some(x), Some(y)) => meter.charge(if x.len() == y.len() { x.len() } else { 0 })?,
        _ if a.kind() == b.kind() || (is_list(a) && is_list(b)) => {
            meter.charge_deep(a, 0, 0)?;
            meter.charge_deep(b, 0, 0)?;
        }
        _ => {}
    }
    Ok(a == b)
}

fn ordered(state: &State, a: &Value, b: &Value) -> Result<(), Error> {
    let meter = meter(state)?;
    meter.charge_deep(a, 0, 0)?;
    meter.charge_deep(b, 0, 0)
}

/// `item in all`.
pub(super) fn contains(meter: &Meter, all: &Value, item: &Value) -> Result<bool, Error> {
    match (all.kind(), all.as_object()) {
        (ValueKind::Undefined, _) => Ok(false),
        (ValueKind::String, _) => {
            let text = all.as_str().unwrap_or_default();
            meter.charge(text.len())?;
            Ok(text.contains(&to_str(meter, item)?))
        }
        (ValueKind::Map, Some(map)) => {
            meter.charge_shallow(item)?;
            Ok(map.get_value(item).is_some())
        }
        (ValueKind::Seq | ValueKind::Iterable, _) => {
            for candidate in meter.items(all)? {
                if equal(meter, &candidate, item)? {
                    return Ok(true);
                }
            }
            Ok(false)
        }
        (kind, _) => Err(failed(format!("cannot look for something in a value of type {kind}"))),
    }
}

/// `value[start:stop:step]`, by characters for a text.
fn slice(meter: &Meter, value: &Value, start: &Value, stop: &Value, step: &Value) -> Result<Value, Error> {
    let bound = |bound: &Value| match bound.is_none() {
        true => Ok(None),
        false => integer(bound).map(Some).ok_or_else(|| failed("slice bounds are integers")),
    };
    let (start, stop, step) = (bound(start)?, bound(stop)?, bound(step)?.unwrap_or(1));
    if step == 0 {
        return Err(failed("slice step cannot be zero"));
    }
    let positions = |len: usize| {
        let len = len as i128;
        let (low, high) = if step > 0 { (0, len) } else { (-1, len - 1) };
        let place =
            |bound: i128| (if bound < 0 { bound.saturating_add(len) } else { bound }).clamp(low, high);
        let first = start.map_or(if step > 0 { low } else { high }, place);
        let last = stop.map_or(if step > 0 { high } else { low }, place);
        std::iter::successors(Some(first), move |at| at.checked_add(step))
            .take_while(move |&at| if step > 0 { at < last } else { at > last })
            .map(|at| at as usize)
    };
    match value.kind() {
        ValueKind::String => {
            let text = value.as_str().unwrap_or_default();
            meter.charge(text.len().saturating_mul(5))?;
            let characters: Vec<char> = text.chars().collect();
            Ok(Value::from(positions(characters.len()).map(|at| characters[at]).collect::<String>()))
        }
        ValueKind::Seq | ValueKind::Iterable => {
            let items = meter.items(value)?;
            Ok(Value::from(positions(items.len()).map(|at| items[at].clone()).collect::<Vec<_>>()))
        }
        kind => Err(failed(format!("a value of type {kind} cannot be sliced"))),
    }
}
