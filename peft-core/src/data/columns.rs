//! Records from files with columns.

use std::fs::File;
use std::path::Path;

use parquet::file::reader::{FileReader, SerializedFileReader};
use parquet::record::Field;
use serde_json::Value;

use super::DataError;
use super::records::{LineLimit, Record, malformed, unreadable};
use crate::contain::contained;

/// Rows under a header, as strings. Quotes have a meaning between commas alone: tab-separated files are commonly
/// written without any.
pub(super) fn read_table(
    path: &Path,
    file: File,
    delimiter: u8,
    limit: usize,
) -> Result<Vec<Record>, DataError> {
    let mut reader = csv::ReaderBuilder::new()
        .delimiter(delimiter)
        .quoting(delimiter == b',')
        .from_reader(LineLimit::new(file));
    let wrong = |error: csv::Error| {
        let place = error.position().map_or("header".into(), |position| format!("line {}", position.line()));
        match error.into_kind() {
            csv::ErrorKind::Io(error) => unreadable(path, place, error),
            csv::ErrorKind::UnequalLengths { expected_len, len, .. } => {
                malformed(path, place, format!("{len} values where the header has {expected_len}"))
            }
            csv::ErrorKind::Utf8 { err, .. } => malformed(path, place, format!("not UTF-8 text: {err}")),
            other => malformed(path, place, format!("{other:?}")),
        }
    };
    let header: Vec<String> = reader.headers().map_err(wrong)?.iter().map(String::from).collect();
    for (at, name) in header.iter().enumerate() {
        if header[..at].contains(name) {
            return Err(malformed(path, "header", format!("two columns are named `{name}`")));
        }
    }
    let rows = reader.records().take(limit).map(|row| {
        let row = row.map_err(wrong)?;
        let value = |text: &str| Value::String(text.to_string());
        Ok(header.iter().cloned().zip(row.iter().map(value)).collect())
    });
    rows.collect()
}

/// The rows of a Parquet file.
pub(super) fn read_parquet(path: &Path, file: File, limit: usize) -> Result<Vec<Record>, DataError> {
    // The library asserts that lists and maps have the usual form.
    contained(|| read_rows(path, file, limit))
        .unwrap_or_else(|problem| Err(malformed(path, "the file", problem)))
}

fn read_rows(path: &Path, file: File, limit: usize) -> Result<Vec<Record>, DataError> {
    let wrong =
        |place: String, error: parquet::errors::ParquetError| malformed(path, place, error.to_string());
    let reader = SerializedFileReader::new(file).map_err(|error| wrong("footer".into(), error))?;
    let rows = reader.get_row_iter(None).map_err(|error| wrong("schema".into(), error))?;
    let mut records = Vec::new();
    for (number, row) in rows.take(limit).enumerate() {
        let place = || format!("row {}", number + 1);
        let columns = row.map_err(|error| wrong(place(), error))?.into_columns();
        let record: Result<Record, String> =
            columns.into_iter().map(|(name, field)| Ok((name, field_to_json(&field)?))).collect();
        records.push(record.map_err(|problem| malformed(path, place(), problem))?);
    }
    Ok(records)
}

fn field_to_json(field: &Field) -> Result<Value, String> {
    Ok(match field {
        Field::Null => Value::Null,
        Field::Bool(value) => (*value).into(),
        Field::Byte(value) => (*value).into(),
        Field::Short(value) => (*value).into(),
        Field::Int(value) => (*value).into(),
        Field::Long(value) => (*value).into(),
        Field::UByte(value) => (*value).into(),
        Field::UShort(value) => (*value).into(),
        Field::UInt(value) => (*value).into(),
        Field::ULong(value) => (*value).into(),
        Field::Float16(value) => f64::from(*value).into(),
        Field::Float(value) => f64::from(*value).into(),
        Field::Double(value) => (*value).into(),
        Field::Str(text) => text.as_str().into(),
        // Some writers leave out the mark that says that bytes are text.
        Field::Bytes(bytes) => match std::str::from_utf8(bytes.data()) {
            Ok(text) => text.into(),
            Err(_) => return Err(format!("a column holds {} bytes that are not text", bytes.len())),
        },
        Field::Group(row) => {
            let fields = row.get_column_iter().map(|(name, field)| Ok((name.clone(), field_to_json(field)?)));
            Value::Object(fields.collect::<Result<_, String>>()?)
        }
        Field::ListInternal(list) => {
            Value::Array(list.elements().iter().map(field_to_json).collect::<Result<_, _>>()?)
        }
        Field::MapInternal(map) => {
            let entry = |(key, value): &(Field, Field)| match field_to_json(key)? {
                Value::String(key) => Ok((key, field_to_json(value)?)),
                other => Ok((other.to_string(), field_to_json(value)?)),
            };
            Value::Object(map.entries().iter().map(entry).collect::<Result<_, String>>()?)
        }
        // Dates, times and decimals, which no prompt is made of, as the reader prints them.
        other => other.to_string().into(),
    })
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::super::records::tests::{failure, records};
    use parquet::data_type::{ByteArray, ByteArrayType, Int32Type, Int64Type};
    use parquet::file::properties::WriterProperties;
    use parquet::file::writer::SerializedFileWriter;
    use parquet::schema::parser::parse_message_type;
    use serde_json::json;
    use std::sync::Arc;

    #[test]
    fn tables_have_a_header() {
        let expected = json!([{"a": "x, \"y\"\nz", "b": "1"}]);
        assert_eq!(records("d.csv", "a,b\n\"x, \"\"y\"\"\nz\",1\n"), expected);
        assert_eq!(records("d.tsv", "a\tb\n\"x\t1\n"), json!([{"a": "\"x", "b": "1"}]));
        assert_eq!(failure("d.csv", "a,b\n1,2\n3\n"), "d.csv: line 3: 1 values where the header has 2");
        assert_eq!(failure("d.csv", "a,a\n1,2\n"), "d.csv: header: two columns are named `a`");
        assert_eq!(failure("d.csv", "a,b\n"), "d.csv: this file holds no records");
    }

    #[test]
    fn parquet_rows_may_be_nested() {
        let schema = "message m {
            required binary text (UTF8);
            optional int64 n;
            required group messages (LIST) { repeated group list { required group element {
                required binary role (UTF8); } } }
        }";
        let mut bytes = Vec::new();
        let schema = Arc::new(parse_message_type(schema).unwrap());
        let properties = Arc::new(WriterProperties::default());
        let mut writer = SerializedFileWriter::new(&mut bytes, schema, properties).unwrap();
        let mut group = writer.next_row_group().unwrap();
        let strings = |texts: &[&str]| texts.iter().map(|text| ByteArray::from(*text)).collect::<Vec<_>>();
        let mut column = group.next_column().unwrap().unwrap();
        column.typed::<ByteArrayType>().write_batch(&strings(&["é", "b"]), None, None).unwrap();
        column.close().unwrap();
        let mut column = group.next_column().unwrap().unwrap();
        column.typed::<Int64Type>().write_batch(&[5], Some(&[1, 0]), None).unwrap();
        column.close().unwrap();
        // The first row has two messages and the second none: levels mark the start of a row and an empty list.
        let mut column = group.next_column().unwrap().unwrap();
        let roles = strings(&["user", "assistant"]);
        column.typed::<ByteArrayType>().write_batch(&roles, Some(&[1, 1, 0]), Some(&[0, 1, 0])).unwrap();
        column.close().unwrap();
        group.close().unwrap();
        writer.close().unwrap();

        let expected = json!([
            {"text": "é", "n": 5, "messages": [{"role": "user"}, {"role": "assistant"}]},
            {"text": "b", "n": null, "messages": []}
        ]);
        assert_eq!(records("d.parquet", &bytes), expected);
        bytes.truncate(bytes.len() - 3);
        assert!(failure("d.parquet", &bytes).starts_with("d.parquet: footer: "));
    }

    #[test]
    fn parquet_maps_of_another_form_are_refused() {
        let schema = "message m { required group tags (MAP) { required int32 a; required int32 b; } }";
        let schema = Arc::new(parse_message_type(schema).unwrap());
        let mut bytes = Vec::new();
        let mut writer = SerializedFileWriter::new(&mut bytes, schema, Arc::default()).unwrap();
        let mut group = writer.next_row_group().unwrap();
        while let Some(mut column) = group.next_column().unwrap() {
            column.typed::<Int32Type>().write_batch(&[1], None, None).unwrap();
            column.close().unwrap();
        }
        group.close().unwrap();
        writer.close().unwrap();
        assert!(failure("d.parquet", &bytes).contains("map"));
    }
}
