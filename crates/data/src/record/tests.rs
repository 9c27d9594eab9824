use std::fs;

use tempfile::TempDir;

use super::*;

fn read(content: impl AsRef<[u8]>) -> Result<Records, DataError> {
    let dir = TempDir::new().unwrap();
    let path = dir.path().join("d.json");
    fs::write(&path, content).unwrap();
    read_records(&[path])
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
    let problems: Vec<_> = found.problems.iter().map(|p| (p.origin.record, p.message.as_str())).collect();
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
    assert!(found.check(true).is_ok());
    let error = found.check(false).unwrap_err().to_string();
    assert!(error.starts_with("7 of 9 records cannot be used:\n"), "{error}");
}

#[test]
fn a_broken_line_is_one_bad_record() {
    let found = read("{\"instruction\": \"a\", \"output\": \"b\"}\n\n{\"instruction\": \"a\", \n7\n{\"instruction\": \"a\", \"output\": \"b\"} x\n").unwrap();
    assert_eq!(found.records.len(), 1);
    let shown: Vec<_> = found.problems.iter().map(ToString::to_string).collect();
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
        let error =
            read(format!("[{}]", vec!["{}"; count].join(","))).unwrap().check(false).unwrap_err().to_string();
        (error.matches("is missing;").count(), error)
    };
    let (lines, error) = listed(20);
    assert!(lines == 20 && !error.contains("more"), "{error}");
    let (lines, error) = listed(1234);
    assert!(lines == 20 && error.contains("... and 1214 more\n") && error.ends_with("--skip-bad"), "{error}");
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
fn all_files_that_fail_are_named() {
    let dir = TempDir::new().unwrap();
    let (good, empty, missing) =
        (dir.path().join("good"), dir.path().join("empty"), dir.path().join("missing"));
    fs::write(&good, "{\"instruction\": \"a\", \"output\": \"b\"}").unwrap();
    fs::write(&empty, "").unwrap();
    let error = read_records(&[good.clone(), empty, missing]).unwrap_err().to_string();
    assert!(
        error.contains("empty: the file is empty") && error.contains("missing: cannot read the data file"),
        "{error}"
    );
    let twice = read_records(&[good.clone(), good]).unwrap();
    assert_eq!(twice.records.len(), 2);
    assert_eq!(twice.origins[1].record, 1, "records are counted file by file");
    assert!(read_records(&[dir.path().to_path_buf()]).is_err(), "a folder is not a file");
}

#[test]
fn the_last_of_two_fields_of_one_name_counts() {
    let found = read(r#"[{"instruction": 1, "instruction": "a", "output": "b", "x": 1, "x": 2}]"#).unwrap();
    assert_eq!(found.records[0].instruction, "a");
    assert_eq!(found.ignored_fields["x"], 1);
}
