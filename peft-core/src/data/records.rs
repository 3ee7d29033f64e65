//! Data files as lists of objects.

use std::fs::File;
use std::io::{self, BufRead, BufReader, Read};
use std::path::Path;

use serde_json::{Map, Value};
use sha2::{Digest, Sha256};

use super::columns::{read_parquet, read_table};
use super::{DataError, DatasetConfig};
use crate::nearest::did_you_mean;

/// One record: field names to values.
pub type Record = Map<String, Value>;

const EXTENSIONS: [&str; 6] = ["json", "jsonl", "csv", "tsv", "parquet", "txt"];

/// Extensions of Python's pickles and of archives with them inside.
const PICKLES: [&str; 6] = ["pkl", "pickle", "pt", "pth", "bin", "joblib"];

/// Bytes of the largest file that is read as one text (`.json`, `.txt`).
const MAX_TEXT: u64 = 4 << 30;

/// Bytes of the longest line elsewhere: what is longer is no record but, for instance, a file of zeros.
const MAX_LINE: usize = 256 << 20;

/// Reads the records that `config` asks for, in file order; the format is the file name's extension:
///
/// * `.json`: a list of objects, or one object in which exactly one value is a list of objects;
/// * `.jsonl`: one object a line, empty lines skipped;
/// * `.csv`, `.tsv`: a header, then rows, every value a string (quotes have a meaning in `.csv` alone);
/// * `.parquet`: rows;
/// * `.txt`: non-empty lines, or the texts between separators without the white space around them, as field `text`.
///
/// # Errors
/// When the file is missing, unreadable, of unknown format, malformed, or has no records.
pub fn read(config: &DatasetConfig) -> Result<Vec<Record>, DataError> {
    let path = config.path.as_path();
    let extension = path.extension().unwrap_or_default().to_string_lossy().to_lowercase();
    let file = open(path)?;
    let limit = config.limit.unwrap_or(usize::MAX);
    if config.separator.is_some() && extension != "txt" {
        let problem = "`separator` divides .txt files alone";
        return Err(malformed(path, format!(".{extension} file"), problem));
    }
    let mut records = match extension.as_str() {
        "json" => read_json(path, file)?,
        "jsonl" => read_jsonl(path, file, limit)?,
        "csv" => read_table(path, file, b',', limit)?,
        "tsv" => read_table(path, file, b'\t', limit)?,
        "parquet" => read_parquet(path, file, limit)?,
        "txt" => read_text(path, file, config.separator.as_deref(), limit)?,
        _ => {
            let hint = match PICKLES.contains(&extension.as_str()) {
                true => {
                    "; pickle is never read: write the records with pandas' to_json(lines=True) or to_parquet"
                        .into()
                }
                false => did_you_mean(&extension, EXTENSIONS),
            };
            return Err(DataError::UnknownFormat { path: path.into(), extension, hint });
        }
    };
    records.truncate(limit);
    if records.is_empty() {
        return Err(DataError::Empty { path: path.into() });
    }
    Ok(records)
}

/// SHA-256 of a file's bytes, in hexadecimal.
///
/// # Errors
/// When the file is missing or unreadable.
pub fn sha256(path: &Path) -> Result<String, DataError> {
    let mut file = open(path)?;
    let mut hash = Sha256::new();
    std::io::copy(&mut file, &mut hash).map_err(|source| DataError::Read { path: path.into(), source })?;
    Ok(hash.finalize().iter().map(|byte| format!("{byte:02x}")).collect())
}

fn open(path: &Path) -> Result<File, DataError> {
    let names = |dir: &Path| -> Vec<String> {
        let entries = std::fs::read_dir(dir).into_iter().flatten().flatten();
        let mut names: Vec<_> = entries.map(|e| e.file_name().to_string_lossy().into_owned()).collect();
        names.sort();
        names
    };
    // Checked before opening: a pipe would block.
    if path.metadata().is_ok_and(|metadata| !metadata.is_file() && !metadata.is_dir()) {
        return Err(malformed(path, "the file", "not a regular file; write the records to one"));
    }
    if path.is_dir() {
        let is_data = |name: &String| name.rsplit_once('.').is_some_and(|(_, ext)| EXTENSIONS.contains(&ext));
        let files: Vec<String> = names(path).into_iter().filter(is_data).take(8).collect();
        let hint =
            if files.is_empty() { String::new() } else { format!(", for example {}", files.join(", ")) };
        return Err(DataError::Folder { path: path.into(), hint });
    }
    File::open(path).map_err(|source| match source.kind() {
        std::io::ErrorKind::NotFound | std::io::ErrorKind::NotADirectory => {
            let dir = path.parent().filter(|dir| !dir.as_os_str().is_empty()).unwrap_or(Path::new("."));
            let hint = if dir.is_dir() {
                let wanted = path.file_name().unwrap_or_default().to_string_lossy();
                did_you_mean(&wanted, names(dir).iter().map(String::as_str))
            } else {
                format!("; the folder {} does not exist either", dir.display())
            };
            DataError::NotFound { path: path.into(), hint }
        }
        _ => DataError::Read { path: path.into(), source },
    })
}

fn read_all(path: &Path, file: File) -> Result<String, DataError> {
    let failed = |source| DataError::Read { path: path.into(), source };
    if file.metadata().map_err(failed)?.len() > MAX_TEXT {
        let problem =
            format!("more than {MAX_TEXT} bytes; name records by line (.jsonl), which are read one by one");
        return Err(malformed(path, "the file", problem));
    }
    let mut bytes = Vec::new();
    file.take(MAX_TEXT).read_to_end(&mut bytes).map_err(failed)?;
    let mut text = String::from_utf8(bytes).map_err(|error| {
        let place = format!("byte {}", error.utf8_error().valid_up_to());
        malformed(path, place, "not UTF-8 text")
    })?;
    if text.starts_with('\u{feff}') {
        text.drain(..'\u{feff}'.len_utf8());
    }
    Ok(text)
}

fn read_json(path: &Path, file: File) -> Result<Vec<Record>, DataError> {
    let text = read_all(path, file)?;
    let wrong = |error: serde_json::Error| {
        let place = format!("line {}, column {}", error.line(), error.column());
        malformed(path, place, format!("{error}; expected a list of objects"))
    };
    match text.trim_start().chars().next() {
        None => Ok(Vec::new()),
        Some('{') => {
            let object: Record = serde_json::from_str(&text).map_err(|error| {
                // One object a line is the usual reason for text after the first object.
                if text
                    .trim_start()
                    .lines()
                    .next()
                    .is_some_and(|line| serde_json::from_str::<Record>(line).is_ok())
                {
                    return malformed(
                        path,
                        "line 2",
                        "text after the first object; for one object a line, name the file .jsonl",
                    );
                }
                wrong(error)
            })?;
            let is_list =
                |value: &Value| value.as_array().is_some_and(|items| items.iter().all(Value::is_object));
            let count = object.values().filter(|value| is_list(value)).count();
            match object.into_iter().map(|(_, value)| value).find(is_list) {
                Some(Value::Array(items)) if count == 1 => {
                    let objects = items.into_iter().map(|item| match item {
                        Value::Object(record) => record,
                        _ => Record::new(),
                    });
                    Ok(objects.collect())
                }
                _ => {
                    let problem = format!(
                        "an object in which {count} values are lists of objects; expected exactly one"
                    );
                    Err(malformed(path, "line 1", problem))
                }
            }
        }
        Some(_) => serde_json::from_str(&text).map_err(wrong),
    }
}

fn read_jsonl(path: &Path, file: File, limit: usize) -> Result<Vec<Record>, DataError> {
    let mut reader = BufReader::new(LineLimit::new(file));
    let mut records = Vec::new();
    let mut line = Vec::new();
    for number in 1.. {
        line.clear();
        let read = reader.read_until(b'\n', &mut line);
        if read.map_err(|error| unreadable(path, format!("line {number}"), error))? == 0
            || records.len() == limit
        {
            break;
        }
        let content = line.strip_prefix("\u{feff}".as_bytes()).filter(|_| number == 1).unwrap_or(&line);
        if content.trim_ascii().is_empty() {
            continue;
        }
        records.push(serde_json::from_slice(content).map_err(|error| {
            let place = format!("line {number}, column {}", error.column());
            // The parser saw one line, so its own position would say line 1.
            let problem = error.to_string();
            let problem = problem.split(" at line ").next().unwrap_or_default();
            malformed(path, place, format!("{problem}; expected one JSON object a line"))
        })?);
    }
    Ok(records)
}

fn read_text(
    path: &Path,
    file: File,
    separator: Option<&str>,
    limit: usize,
) -> Result<Vec<Record>, DataError> {
    let text = read_all(path, file)?;
    let record = |text: &str| Record::from_iter([("text".to_string(), Value::String(text.to_string()))]);
    Ok(match separator {
        Some("") => return Err(malformed(path, "separator", "an empty separator divides nothing")),
        Some(separator) => text
            .split(separator)
            .map(str::trim)
            .filter(|text| !text.is_empty())
            .take(limit)
            .map(record)
            .collect(),
        None => text.lines().filter(|line| !line.trim().is_empty()).take(limit).map(record).collect(),
    })
}

/// A file that fails with [`ErrorKind::InvalidData`](io::ErrorKind::InvalidData) where a line does not end.
pub(super) struct LineLimit {
    file: File,
    /// Bytes since the line's begin.
    length: usize,
}

impl LineLimit {
    pub(super) fn new(file: File) -> Self {
        Self { file, length: 0 }
    }
}

impl Read for LineLimit {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let count = self.file.read(buffer)?;
        self.length = match buffer[..count].iter().rposition(|&byte| byte == b'\n') {
            Some(end) => count - end - 1,
            None => self.length + count,
        };
        if self.length > MAX_LINE {
            let problem = format!("a line of more than {MAX_LINE} bytes");
            return Err(io::Error::new(io::ErrorKind::InvalidData, problem));
        }
        Ok(count)
    }
}

/// The error for a file that fails to be read at `place`.
pub(super) fn unreadable(path: &Path, place: String, error: io::Error) -> DataError {
    match error.kind() {
        io::ErrorKind::InvalidData => malformed(path, place, error.to_string()),
        _ => DataError::Read { path: path.into(), source: error },
    }
}

/// The error for a file that is wrong at `place`.
pub(super) fn malformed(path: &Path, place: impl Into<String>, problem: impl Into<String>) -> DataError {
    DataError::Malformed { path: path.into(), place: place.into(), problem: problem.into() }
}

#[cfg(test)]
pub(super) mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use crate::data::DatasetType;
    use serde_json::json;

    pub(crate) fn config(name: &str, bytes: impl AsRef<[u8]>) -> (tempfile::TempDir, DatasetConfig) {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join(name);
        std::fs::write(&path, bytes).unwrap();
        (dir, DatasetConfig::new(path, DatasetType::Completion))
    }

    pub(crate) fn records(name: &str, bytes: impl AsRef<[u8]>) -> Value {
        let (_dir, config) = config(name, bytes);
        json!(read(&config).unwrap())
    }

    pub(crate) fn failure(name: &str, bytes: impl AsRef<[u8]>) -> String {
        let (dir, config) = config(name, bytes);
        let error = read(&config).unwrap_err();
        assert!(error.is_bad_input());
        error.to_string().replace(&format!("{}/", dir.path().display()), "")
    }

    #[test]
    fn json_is_a_list_or_holds_one() {
        let expected = json!([{"b": 1, "a": "ü"}, {"a": null}]);
        assert_eq!(records("d.json", r#" [{"b": 1, "a": "ü"}, {"a": null}]"#), expected);
        assert_eq!(
            records("d.json", "\u{feff}{\"v\": 1, \"data\": [{\"b\": 1, \"a\": \"ü\"}, {\"a\": null}]}"),
            expected
        );
        assert!(
            failure("d.json", r#"{"train": [{}], "test": [{}]}"#).contains("2 values are lists of objects")
        );
        assert!(
            failure("d.json", r#"[{"a": 1}, 2]"#)
                .starts_with("d.json: line 1, column 12: invalid type: integer")
        );
        assert!(failure("d.json", "{\"a\": 1}\n{\"a\": 2}\n").contains("name the file .jsonl"));
        assert_eq!(failure("d.json", "[]"), "d.json: this file holds no records");
        assert_eq!(failure("d.json", ""), "d.json: this file holds no records");
        assert_eq!(failure("d.json", b"[\"\xff"), "d.json: byte 2: not UTF-8 text");
    }

    #[test]
    fn json_lines_name_the_line() {
        assert_eq!(records("d.jsonl", "{\"a\": 1}\r\n\n{\"a\": 2}"), json!([{"a": 1}, {"a": 2}]));
        assert_eq!(
            failure("d.jsonl", "{\"a\": 1}\n\n{\"a\": }\n"),
            "d.jsonl: line 3, column 7: expected value; expected one JSON object a line"
        );
        assert!(failure("d.jsonl", "{\"a\": 1}\n[]\n").starts_with("d.jsonl: line 2, column"));
    }

    #[test]
    fn text_is_lines_or_what_separators_leave() {
        assert_eq!(records("d.txt", "one\n\n  two\r\n"), json!([{"text": "one"}, {"text": "  two"}]));
        let (_dir, mut config) = config("d.txt", "one\nmore\n<|end|>\ntwo\n<|end|>\n");
        config.separator = Some("<|end|>".into());
        assert_eq!(json!(read(&config).unwrap()), json!([{"text": "one\nmore"}, {"text": "two"}]));
        config.limit = Some(1);
        assert_eq!(read(&config).unwrap().len(), 1);
    }

    #[test]
    fn wrong_paths_suggest_the_right_ones() {
        let (dir, mut config) = config("train.jsonl", "{}");
        let mut failure = |path: &Path| {
            config.path = path.into();
            read(&config).unwrap_err().to_string()
        };
        assert!(
            failure(&dir.path().join("trian.jsonl")).ends_with("no such file (did you mean `train.jsonl`?)")
        );
        assert!(failure(&dir.path().join("no/t.jsonl")).contains("does not exist either"));
        assert!(failure(dir.path()).ends_with("name a data file, for example train.jsonl"));
        std::fs::write(dir.path().join("t.jsonll"), "").unwrap();
        assert!(failure(&dir.path().join("t.jsonll")).contains("unknown format `jsonll`"));
        std::fs::write(dir.path().join("t.pkl"), b"\x80\x04.").unwrap();
        assert!(failure(&dir.path().join("t.pkl")).contains("pickle is never read"));
    }

    #[test]
    fn the_hash_is_sha256() {
        let (_dir, config) = config("d.txt", "abc");
        let expected = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad";
        assert_eq!(sha256(&config.path).unwrap(), expected);
    }
}
