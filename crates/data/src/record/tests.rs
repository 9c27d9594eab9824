use std::collections::BTreeMap;
use std::fs;

use serde_json::{Value, json};
use tempfile::TempDir;

use super::container::MOST_BYTES;
use super::*;
use crate::error::DataError;

/// A file read to its end.
#[derive(Debug, Default)]
#[allow(clippy::struct_field_names)] // as the reader names them
struct Records {
    format: RecordFormat,
    records: Vec<Record>,
    origins: Vec<Origin>,
    bad: BadRecords,
    ignored_fields: BTreeMap<String, usize>,
}

fn read_file(path: &Path, format: RecordFormat, columns: &Columns) -> Result<Records, DataError> {
    let mut found = Records::default();
    let reader = RecordReader::open(path, format, columns)?;
    found.format = reader.format();
    for one in reader {
        let Found { origin, record } = one?;
        found.bad.records += 1;
        match record {
            Ok((record, ignored)) => {
                found.records.push(record);
                found.origins.push(origin);
                for field in ignored {
                    *found.ignored_fields.entry(field).or_default() += 1;
                }
            }
            Err(message) => found.bad.push(RecordProblem { origin, message }),
        }
    }
    Ok(found)
}

fn read_named(name: &str, content: impl AsRef<[u8]>) -> Result<Records, DataError> {
    let dir = TempDir::new().unwrap();
    let path = dir.path().join(name);
    fs::write(&path, content).unwrap();
    read_file(&path, RecordFormat::Auto, &Columns::default())
}

fn read(content: impl AsRef<[u8]>) -> Result<Records, DataError> {
    read_named("d.json", content)
}

/// The only turn of a record.
fn turn(record: &Record) -> &InstructRecord {
    match record {
        Record::Conversation(Conversation { system: None, turns }) if turns.len() == 1 => &turns[0],
        other => panic!("{other:?}"),
    }
}

fn complaint(content: impl AsRef<[u8]>) -> String {
    read(content).unwrap_err().to_string()
}

#[test]
fn an_array_and_json_lines_give_the_same_records() {
    let array = read(
        r#" [{"instruction": "a", "input": null, "output": "b\n\u00e4"},
             {"output": "d", "id": {"x": [1, {}]}, "instruction": "c", "input": "e"}]"#,
    )
    .unwrap();
    let lines = "\u{feff}{\"instruction\": \"a\", \"output\": \"b\\nä\"}\r\n\n  \n\
                 {\"output\": \"d\", \"id\": 7, \"instruction\": \"c\", \"input\": \"e\"}\n";
    let lines = read(lines).unwrap();
    assert_eq!(array.records, lines.records);
    let [first, second] = array.records.as_slice() else { panic!("{:?}", array.records) };
    let (first, second) = (turn(first), turn(second));
    assert_eq!((first.input.as_str(), first.output.as_str()), ("", "b\nä"));
    assert_eq!((second.instruction.as_str(), second.input.as_str()), ("c", "e"));
    assert_eq!(array.ignored_fields, BTreeMap::from([("id".to_owned(), 1)]));
    assert_eq!(lines.ignored_fields, array.ignored_fields);
    assert_eq!(array.origins.iter().map(|o| (o.record, o.line)).collect::<Vec<_>>(), [(1, None), (2, None)]);
    assert_eq!(
        lines.origins.iter().map(|o| (o.record, o.line)).collect::<Vec<_>>(),
        [(1, Some(1)), (2, Some(4))]
    );
}

#[test]
fn every_bad_record_is_named_and_the_good_ones_are_kept() {
    let found = read(
        r#"[{"instruction": "a", "output": "b"}, {}, 7, "x", null, [1, [2]], {"instruction": 1.5, "output": {"a": 1}},
            {"instruction": "c", "output": "d", "input": true}, {"instruction": "e", "output": "f"}]"#,
    )
    .unwrap();
    assert_eq!(found.records.len(), 2);
    assert_eq!(found.origins[1].record, 9);
    let problems: Vec<_> = found.bad.problems.iter().map(|p| (p.origin.record, p.message.as_str())).collect();
    assert_eq!(
        problems,
        [
            (2, "`instruction` is missing; `output` is missing"),
            (3, "expected an object with instruction and output, found a number"),
            (4, "expected an object with instruction and output, found a string"),
            (5, "expected an object with instruction and output, found null"),
            (6, "expected an object with instruction and output, found a list"),
            (7, "`instruction` is a number, expected a string; `output` is an object, expected a string"),
            (8, "`input` is true or false, expected a string"),
        ]
    );
    let error = found.bad.to_string();
    assert!(error.starts_with("7 of 9 records cannot be used:\n"), "{error}");
}

#[test]
fn a_broken_line_is_one_bad_record() {
    let found = read("{\"instruction\": \"a\", \"output\": \"b\"}\n\n{\"instruction\": \"a\", \n7\n{\"instruction\": \"a\", \"output\": \"b\"} x\n").unwrap();
    assert_eq!(found.records.len(), 1);
    let shown: Vec<_> = found.bad.problems.iter().map(ToString::to_string).collect();
    assert!(shown[0].contains("record 2 (line 3): broken JSON at column"), "{shown:?}");
    assert!(shown[1].contains("record 3 (line 4): expected an object"), "{shown:?}");
    assert!(
        shown[2].contains("record 4 (line 5): broken JSON at column 37: trailing characters"),
        "{shown:?}"
    );
}

#[test]
fn the_first_twenty_are_listed_and_the_others_counted() {
    let listed = |count: usize| {
        let error = read(format!("[{}]", vec!["{}"; count].join(","))).unwrap().bad.to_string();
        (error.matches("is missing;").count(), error)
    };
    let (lines, error) = listed(20);
    assert!(lines == 20 && !error.contains("more"), "{error}");
    let (lines, error) = listed(1234);
    assert!(lines == 20 && error.contains("... and 1214 more\n") && error.contains("--skip-bad"), "{error}");
}

#[test]
fn files_that_are_wrong_as_a_whole() {
    assert!(complaint("").contains("d.json: the file is empty"));
    assert!(complaint("\u{feff} \n\t").contains("the file is empty"));
    assert!(complaint("[ ]").contains("holds no record"));
    let error = complaint("[{\"instruction\": \"a\", \"output\": \"b\"},\n {\"instruction\": \"a\"");
    assert!(error.contains("broken JSON at line 2") && error.contains("after 1 whole records"), "{error}");
    assert!(!error.contains("at line 2 column"), "the place is said once: {error}");
    assert!(complaint("[1] 2").contains("trailing characters"));
    assert!(complaint("[{\"instruction\": \"a\", \"output\": \"b\"},]").contains("trailing comma"));
    let error = complaint("{\n \"data\": [{\"instruction\": \"a\", \"output\": \"b\"}]\n}\n");
    assert!(error.contains("is one JSON object") && error.contains("jq"), "{error}");
    let error = complaint(b"[{\"instruction\": \"a\",\n\"output\": \"\xe4\"}]");
    assert!(error.contains("invalid UTF-8 at byte 33 (line 2)"), "{error}");
    let deep = format!("[{{\"instruction\": {}", "[{\"a\":".repeat(100_000));
    assert!(complaint(deep).contains("broken JSON"), "deep nesting does not overflow the stack");
}

#[test]
fn the_last_of_two_fields_of_one_name_counts() {
    let found = read(r#"[{"instruction": 1, "instruction": "a", "output": "b", "x": 1, "x": 2}]"#).unwrap();
    assert_eq!(turn(&found.records[0]).instruction, "a");
    assert_eq!(found.ignored_fields["x"], 1);
}

fn conversation(system: Option<&str>, turns: &[(&str, &str)]) -> Record {
    let turns = turns.iter().map(|(instruction, output)| InstructRecord {
        instruction: (*instruction).to_owned(),
        input: String::new(),
        output: (*output).to_owned(),
    });
    Record::Conversation(Conversation { system: system.map(str::to_owned), turns: turns.collect() })
}

#[test]
fn formats_are_told_by_their_fields() {
    let two = conversation(Some("s"), &[("a", "b"), ("c", "d")]);
    let one = conversation(None, &[("a", "b")]);
    let text = |prompt: &str, completion: &str| Record::Text {
        prompt: prompt.to_owned(),
        completion: completion.to_owned(),
    };
    let message = |role: &str, content: &str| json!({"role": role, "content": content});
    let turns =
        [message("system", "s"), message("user", "a"), message("assistant", "b"), message("user", "c")];
    let answered: Vec<Value> = turns.iter().cloned().chain([message("assistant", "d")]).collect();
    let parts = json!([{"type": "text", "text": "a"}]);
    for (value, format, record) in [
        (json!({"messages": answered, "source": "x"}), RecordFormat::Messages, &two),
        (
            json!({"conversations": [{"from": "system", "value": "s"}, {"from": "human", "value": "a"},
                {"from": "gpt", "value": "b"}, {"from": "human", "value": "c"}, {"from": "gpt", "value": "d"}]}),
            RecordFormat::ShareGpt,
            &two,
        ),
        (
            json!({"messages": [{"role": "user", "content": parts}, message("assistant", "b"), message("user", "c")]}),
            RecordFormat::Messages,
            &one,
        ),
        (json!({"instruction": "a", "output": "b"}), RecordFormat::Alpaca, &one),
        (
            json!({"instruction": "a", "output": "b", "system": "s"}),
            RecordFormat::Alpaca,
            &conversation(Some("s"), &[("a", "b")]),
        ),
        (json!({"prompt": "a", "completion": "b"}), RecordFormat::PromptCompletion, &text("a", "b")),
        (
            json!({"prompt": [message("user", "a")], "completion": [message("assistant", "b")]}),
            RecordFormat::PromptCompletion,
            &one,
        ),
        (json!({"text": "b"}), RecordFormat::Text, &text("", "b")),
    ] {
        let found = read(json!([value]).to_string()).unwrap();
        assert_eq!(
            (found.format, &found.records),
            (format, &vec![record.clone()]),
            "{value}: {:?}",
            found.bad
        );
        let lines = read(format!("{value}\n")).unwrap();
        assert_eq!(lines.records, found.records);
    }
}

#[test]
fn the_format_is_that_of_most_of_the_first_records_or_as_told() {
    let both = json!([{"text": "a"}, {"instruction": "a", "output": "b", "text": "c"},
        {"instruction": "a", "output": "b", "text": "c"}]);
    let dir = TempDir::new().unwrap();
    let path = dir.path().join("d");
    fs::write(&path, both.to_string()).unwrap();
    let found = read_file(&path, RecordFormat::Auto, &Columns::default()).unwrap();
    assert_eq!((found.format, found.records.len()), (RecordFormat::Text, 3));
    let told = read_file(&path, RecordFormat::Alpaca, &Columns::default()).unwrap();
    assert_eq!((told.records.len(), told.bad.count, told.ignored_fields["text"]), (2, 1, 2));
    let expected = "`instruction` is missing; `output` is missing; there are: text";
    assert_eq!(told.bad.problems[0].message, expected);
}

#[test]
fn columns_may_be_called_otherwise() {
    let columns = Columns {
        instruction: Some("question".into()),
        output: Some("answer".into()),
        input: Some("context".into()),
        ..Columns::default()
    };
    let dir = TempDir::new().unwrap();
    let path = dir.path().join("d");
    fs::write(&path, r#"{"question": "a", "context": "b", "answer": "c", "output": 7}"#).unwrap();
    let found = read_file(&path, RecordFormat::Auto, &columns).unwrap();
    let record = turn(&found.records[0]);
    assert_eq!((record.instruction.as_str(), record.input.as_str(), record.output.as_str()), ("a", "b", "c"));
    assert_eq!(found.ignored_fields["output"], 1);
    fs::write(&path, r#"{"question": "a", "answer": 7}"#).unwrap();
    let found = read_file(&path, RecordFormat::Auto, &columns).unwrap();
    assert_eq!(found.bad.problems[0].message, "`answer` is a number, expected a string");
}

#[test]
fn conversations_that_are_none() {
    let user = json!({"role": "user", "content": "a"});
    let assistant = json!({"role": "assistant", "content": "b"});
    for (messages, expected) in [
        (json!("x"), "`messages` is a string, expected a list of messages"),
        (json!([]), "`messages` has no answered question"),
        (json!([user]), "`messages` has no answered question"),
        (json!([assistant]), "message 1 of `messages` is the assistant's, expected the user's"),
        (json!([user, user]), "message 2 of `messages` is the user's, as the one before it"),
        (
            json!([user, assistant, assistant]),
            "message 3 of `messages` is the assistant's, expected the user's",
        ),
        (json!([user, {"role": "system", "content": "s"}]), "message 2 of `messages` is the system's"),
        (json!([user, 7]), "message 2 of `messages` is a number, expected an object"),
        (json!([user, {"content": "b"}]), "message 2 of `messages` has neither `role` nor `from`"),
        (json!([user, {"role": "tool", "content": "b"}]), "has the role \"tool\", expected system, user or"),
        (json!([user, {"role": "assistant"}]), "message 2 of `messages` has neither `content` nor `value`"),
        (json!([user, {"role": "assistant", "content": null}]), "has null as its content, expected a string"),
        (json!([{"role": "user", "content": [{"type": "image"}]}]), "has a part that is no text"),
    ] {
        let found = read(json!([{"messages": messages}]).to_string()).unwrap();
        let message = &found.bad.problems[0].message;
        assert!(message.contains(expected), "expected {expected:?} in {message:?}");
    }
}

#[test]
fn tables_are_told_by_their_first_row() {
    let found = read("instruction,input,output,id\n\"a, \"\"b\"\"\nc\",,d,1\ne,f\ng,h,i,2\n").unwrap();
    assert_eq!(turn(&found.records[0]).instruction, "a, \"b\"\nc");
    assert_eq!(turn(&found.records[1]).output, "i");
    assert_eq!(
        found.origins.iter().map(|o| (o.record, o.line)).collect::<Vec<_>>(),
        [(1, Some(2)), (3, Some(5))]
    );
    assert_eq!(
        found.bad.problems[0].to_string().split("d.json: ").nth(1),
        Some("record 2 (line 4): 2 fields, expected 4")
    );
    assert_eq!(found.ignored_fields["id"], 2);
    for table in ["\u{feff}prompt;completion\na;b\n", "prompt\tcompletion\r\na\tb\r\n"] {
        let found = read(table).unwrap();
        let text = Record::Text { prompt: "a".into(), completion: "b".into() };
        assert_eq!(found.records, [text], "{table:?}");
    }
    let error = read_named("d.csv", "question,answer\na,b\n").unwrap_err().to_string();
    assert!(error.contains("the columns are question, answer") && error.contains("data.columns"), "{error}");
    let error = read("instruction,output\n").unwrap_err().to_string();
    assert!(error.contains("holds no record"), "{error}");
    let error = read(b"instruction,output\na,b\na,\xff\n").unwrap_err().to_string();
    assert!(error.contains("invalid UTF-8 at byte") && error.contains("line 3"), "{error}");
}

#[test]
fn compressed_files_are_told_by_their_first_bytes() {
    use std::io::Write;
    let lines = "{\"instruction\": \"a\", \"output\": \"b\"}\n".repeat(20_000);
    let mut gzip = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
    gzip.write_all(lines.as_bytes()).unwrap();
    let gzip = gzip.finish().unwrap();
    let zstd = zstd::encode_all(lines.as_bytes(), 1).unwrap();
    for packed in [gzip, zstd] {
        assert!(packed.len() < lines.len() / 10);
        let found = read(&packed).unwrap();
        assert_eq!((found.records.len(), found.bad.count), (20_000, 0));
        // Several members, or frames, one behind the other are one text.
        assert_eq!(read([packed.as_slice(), &packed].concat()).unwrap().records.len(), 40_000);
        let error = read(&packed[..packed.len() / 2]).unwrap_err().to_string();
        assert!(error.contains("cannot read the data file"), "{error}");
    }
}

/// A small file may be packed of one that goes on for ever.
#[test]
fn a_record_without_an_end_is_refused() {
    use std::io::Write;
    let packed = |parts: &[(&str, usize)]| {
        let mut gzip = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
        for (text, times) in parts {
            (0..*times).for_each(|_| gzip.write_all(text.as_bytes()).unwrap());
        }
        gzip.finish().unwrap()
    };
    let kilobyte = "a".repeat(1024);
    let too_many = MOST_BYTES / kilobyte.len() + 16; // a table's reader is some kilobytes ahead
    let record = r#"{"instruction": "a", "output": "b"}"#;
    let (first, array, lines) = (r#"{"instruction": ""#, format!("[{record}, "), format!("{record}\n"));
    for (before, place) in [
        ([lines.as_str(), first], "record 2 (line 2)"),
        ([array.as_str(), first], "record 2"),
        (["instruction,output\na,b\n", "a,\""], "record 2 (line 3)"),
        (["instruction,output\n", "a,b,"], "record 1 (line 2)"),
        (["instruction,output,", ""], "record 1 (line 1)"),
    ] {
        let [before, start] = before;
        let found = read(packed(&[(before, 1), (start, 1), (&kilobyte, too_many)]));
        let error = found.err().map(|error| error.to_string()).unwrap_or_default();
        let expected = format!("d.json: {place}: it is longer than 64 MiB");
        assert!(error.contains(&expected) && error.contains("Cut it into several"), "{error}");
    }
    // Together they may be longer.
    let (line, row) = (format!("{first}{kilobyte}\", \"output\": \"b\"}}\n"), format!("{kilobyte},b\n"));
    for (header, one) in [("", &line), ("instruction,output\n", &row)] {
        let found = read(packed(&[(header, 1), (one, too_many)])).unwrap();
        assert_eq!((found.records.len(), found.bad.count), (too_many, 0));
    }
}

/// What pyarrow wrote, by `make_tables.py`.
fn table(name: &str) -> std::path::PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/tables").join(name)
}

#[test]
fn columns_of_every_kind_are_read() {
    let auto = |path: &Path| read_file(path, RecordFormat::Auto, &Columns::default());
    let expected: Vec<Record> = (0..300)
        .map(|i| InstructRecord {
            instruction: format!("Say {i}."),
            input: if i % 3 == 0 { String::new() } else { format!("in {}", i % 7) },
            output: format!("It is {i}, “so”.\n"),
        })
        .map(Record::from)
        .collect();
    let packings = ["snappy", "zstd", "gzip", "lz4"].map(|codec| format!("alpaca-{codec}.parquet"));
    let others = ["alpaca.arrow", "others.parquet", "others.stream"].map(str::to_owned);
    for name in packings.iter().chain(&others) {
        let found = auto(&table(name)).unwrap();
        assert_eq!((found.format, found.bad.count), (RecordFormat::Alpaca, 0), "{name}: {:?}", found.bad);
        assert!(found.records == expected, "{name}");
        assert_eq!((found.ignored_fields["score"], found.origins[299].record), (300, 300), "{name}");
    }
    for name in ["messages.parquet", "messages-pages.parquet", "messages.stream"] {
        let found = auto(&table(name)).unwrap();
        assert_eq!(
            (found.format, found.records.len()),
            (RecordFormat::Messages, 300),
            "{name}: {:?}",
            found.bad
        );
        assert_eq!(found.records[299], conversation(None, &[("Say 299.", "It is 299."), ("Again.", "299")]));
    }
    // A stream is read in order, so that it may be packed; Parquet is not.
    let dir = TempDir::new().unwrap();
    let packed = |name: &str| {
        let path = dir.path().join(name);
        fs::write(&path, zstd::encode_all(fs::File::open(table(name)).unwrap(), 1).unwrap()).unwrap();
        auto(&path)
    };
    assert!(packed("alpaca.arrow").unwrap().records == expected);
    let error = packed("others.parquet").unwrap_err().to_string();
    assert!(error.contains("packed by gzip or zstd") && error.contains("unpack it"), "{error}");
    let error = auto(&table("lz4.arrow")).unwrap_err().to_string();
    assert!(error.contains("lz4") && error.contains("without compression, or as Parquet"), "{error}");
    let columns = Columns { instruction: Some("question".into()), ..Columns::default() };
    let error = read_file(&table("alpaca.arrow"), RecordFormat::Auto, &columns).unwrap_err().to_string();
    assert!(error.contains("the columns are instruction, input, output, score"), "{error}");
}

/// Found by fuzzing: its reader would have made room for 904 million values, 3.6 GB.
#[test]
fn a_dictionary_that_claims_more_than_it_has_is_refused() {
    let error = read_file(&table("dictionary.parquet"), RecordFormat::Auto, &Columns::default()).unwrap_err();
    let error = error.to_string();
    assert!(error.contains("a dictionary is to hold 904648623 values in "), "{error}");
}

/// A page's header is looked at before its reader makes room for what it says, and is nothing that both could read differently.
#[test]
fn a_page_that_claims_more_than_a_page_has_is_refused() {
    let dir = TempDir::new().unwrap();
    let bytes = fs::read(table("alpaca-snappy.parquet")).unwrap();
    // The first page stands behind the file's mark.
    let error = |header: &[u8]| {
        let mut bytes = bytes.clone();
        bytes[4..4 + header.len()].copy_from_slice(header);
        let path = dir.path().join("page.parquet");
        fs::write(&path, bytes).unwrap();
        read_file(&path, RecordFormat::Auto, &Columns::default()).unwrap_err().to_string()
    };
    // A dictionary (type 2) of 2^31 - 1 bytes, 8 of them in the file.
    let large = error(b"\x15\x04\x15\xfe\xff\xff\xff\x0f\x15\x10\x4c\x15\x02\x15\x00\x12\x00\x00");
    assert!(
        large.contains("a page at byte 4 is to unpack to 2147483647 bytes, 134217728 at most"),
        "{large}"
    );
    assert!(large.contains("at most are read (pages can be written smaller)"), "{large}");
    for (header, why) in [
        (b"\x15\x04\x15\xfe\xff\xff\xff\x1f\x15\x10\0\0".as_slice(), "a number is too large"),
        (b"\x15\x04\x15\x80\x80\x80\x80\x80\x80\x80\x80\x80\x80\x01", "a number is too long"),
        (b"\x15\x04\x15\x10\x15\x10\x05\x04\xfe\xff\xff\xff\x0f\0", "its fields are out of order"),
        (b"\x15\x04\x18\x02\x15\x10\x15\x10\0", "a field is not what it should be"),
        (b"\x15\x04\x15\x10\x15\x10\x4c\x18\x02\x15\x10\0\0", "a field is not what it should be"),
        (b"\x15\x04\x25\x10\0", "it has no size"),
        (b"\x15\x04\x15\x10\x15\x10\x6c\x1c\x1c\x1c\x1c\0\0\0\0\0", "it lies too deep"),
        (b"\x15\x04\x15\x10\x15\x10\x68\xff\xff\xff\xff\x0f", "unexpected end of file"),
    ] {
        let error = error(header);
        assert!(error.contains(&format!("the header of a page at byte 4: {why}")), "{why}: {error}");
    }
}

/// Cut anywhere, or with a byte changed anywhere, a table is read or refused, and never read in part.
#[test]
fn damaged_tables_are_refused() {
    let dir = TempDir::new().unwrap();
    let mut refused = 0;
    for name in ["alpaca-snappy.parquet", "messages.parquet", "alpaca.arrow", "others.stream"] {
        let bytes = fs::read(table(name)).unwrap();
        let damaged = |bytes: &[u8]| {
            let path = dir.path().join(name);
            fs::write(&path, bytes).unwrap();
            read_file(&path, RecordFormat::Auto, &Columns::default())
        };
        for part in 1..12 {
            let cut = bytes.len() * part / 12;
            let error = damaged(&bytes[..cut]).unwrap_err().to_string();
            assert!(error.contains("download it, or write it, again"), "{name} cut to {cut}: {error}");
        }
        for at in (0..bytes.len()).step_by(bytes.len() / 150) {
            let mut bytes = bytes.clone();
            bytes[at] ^= 1 << (at % 8);
            match damaged(&bytes) {
                Ok(found) => assert!(found.bad.records == 300 || at < 8, "{name}, byte {at}: {found:?}"),
                Err(_) => refused += 1,
            }
        }
    }
    assert!(refused > 100, "{refused}");
}

/// Elements that end where one buffer ends and the next begins, and braces in strings.
#[test]
fn arrays_are_cut_where_their_elements_end() {
    let rows: Vec<Value> = (0..5000)
        .map(|i| json!({"instruction": format!("}}]\"[{{,\\ {i}"), "output": "x".repeat(i % 300), "n": [[i], {}]}))
        .collect();
    for text in [json!(rows).to_string(), serde_json::to_string_pretty(&rows).unwrap()] {
        let found = read(&text).unwrap();
        assert_eq!((found.records.len(), found.bad.count), (5000, 0));
        assert_eq!(turn(&found.records[4999]).instruction, rows[4999]["instruction"].as_str().unwrap());
        let broken = text.replace("4321", "4321\u{1}");
        let error = read(broken).unwrap_err().to_string();
        assert!(error.contains("after 4321 whole records: control character"), "{error}");
    }
}
