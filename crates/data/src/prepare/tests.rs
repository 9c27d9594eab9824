use std::fs;

use serde_json::json;
use tempfile::TempDir;

use super::workers::CHUNK;
use super::*;
use crate::example::{DropReason, ExampleView, Learn};
use crate::tokenizer::tests::{edit, llama2, saved, smollm, split_for_ever};

const ROW: RowConfig = RowConfig { max_seq_len: 256, train_on_inputs: false, learn: Learn::All };

fn config(dir: &TempDir, content: &str) -> PrepareConfig {
    let path = dir.path().join("data.json");
    fs::write(&path, content).unwrap();
    PrepareConfig {
        files: vec![path.into()],
        format: RecordFormat::Auto,
        columns: Columns::default(),
        template: "alpaca-short".to_owned(),
        row: ROW,
        val_size: 0,
        skip_bad: false,
    }
}

fn numbered(count: usize) -> String {
    let rows: Vec<_> =
        (0..count).map(|i| json!({"instruction": format!("Say {i}"), "output": format!("{i}")})).collect();
    json!(rows).to_string()
}

fn run(config: &PrepareConfig) -> Result<PreparedDataset, DataError> {
    prepare(config, &smollm(), &std::env::temp_dir(), &mut |_, _| ())?.load()
}

/// The answer of a row of [`numbered`].
fn answer(row: ExampleView<'_>) -> usize {
    let labels = row.token_ids.iter().zip(row.loss_mask).filter(|(_, label)| **label).map(|(id, _)| *id);
    smollm().decode(&labels.collect::<Vec<_>>()).unwrap().parse().unwrap()
}

/// One record for which a template would compare lists for years, among many others.
#[test]
fn a_record_that_a_template_never_ends_with_is_named() {
    let dir = TempDir::new().unwrap();
    let path = dir.path().join("slow.jinja");
    let source = "{% set n = namespace(x=[1], y=[1]) %}{% if instruction == 'Say 300' %}{% for i in range(60) %}\
        {% set n.x = [n.x, n.x] %}{% set n.y = [n.y, n.y] %}{% endfor %}{% endif %}\
        {{ n.x == n.y }}{{ instruction }}{{ output }}";
    fs::write(&path, source).unwrap();
    let template = path.display().to_string();
    let config = PrepareConfig { template, ..config(&dir, &numbered(2 * CHUNK)) };
    let error = run(&config).unwrap_err().to_string();
    assert!(error.contains("record 301") && error.contains("not rendered after 5 s"), "{error}");
}

/// A regular expression of the tokenizer, whose reader panics on a worker's thread.
#[test]
fn a_record_that_a_tokenizer_gives_up_on_is_named() {
    let (dir, base) = (TempDir::new().unwrap(), saved(&smollm()));
    edit(base.path(), "tokenizer.json", split_for_ever);
    let tokenizer = TextTokenizer::from_dir(base.path()).unwrap();
    let rows =
        json!([{"instruction": "a", "output": "b"}, {"instruction": "a", "output": "a".repeat(40) + "b"}]);
    let config = config(&dir, &rows.to_string());
    let error = prepare(&config, &tokenizer, dir.path(), &mut |_, _| ()).err().unwrap().to_string();
    assert!(
        error.contains("data.json: record 2: tokenizer ") && error.contains("tokenizer.json: "),
        "{error}"
    );
    assert!(error.contains("cannot encode \"aaaa") && error.contains("retry-limit-in-match"), "{error}");
}

#[test]
fn rows_keep_file_order_whatever_the_threads_do() {
    let dir = TempDir::new().unwrap();
    let config = config(&dir, &numbered(3 * CHUNK + 7));
    let (mut last, size) = (0, fs::metadata(&config.files[0].path).unwrap().len());
    let mut progress = |done, total| {
        assert!(done >= last && total == size);
        last = done;
    };
    let prepared = prepare(&config, &smollm(), dir.path(), &mut progress).unwrap().load().unwrap();
    assert_eq!(last, size);
    assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 1, "the rows lay in files without a name");
    assert!(prepared.train.iter().map(answer).eq(0..3 * CHUNK + 7));
    assert!(prepared.validation.is_empty());
    assert_eq!(prepared, run(&config).unwrap());
}

#[test]
fn held_out_rows_are_the_same_each_time_and_in_no_training_row() {
    let dir = TempDir::new().unwrap();
    let config = PrepareConfig { val_size: 20, ..config(&dir, &numbered(100)) };
    let prepared = run(&config).unwrap();
    let held_out: Vec<usize> = prepared.validation.iter().map(answer).collect();
    let train: Vec<usize> = prepared.train.iter().map(answer).collect();
    assert_eq!((held_out.len(), train.len()), (20, 80));
    assert!(held_out.is_sorted() && train.is_sorted());
    assert!(held_out.iter().any(|row| *row < 50) && held_out.iter().any(|row| *row >= 50));
    assert!(!held_out.iter().any(|row| train.contains(row)));
    assert_eq!((prepared.report.train_rows, prepared.report.validation_rows), (80, 20));
    assert_eq!(run(&config).unwrap().validation, prepared.validation);
}

#[test]
fn answers_are_told_from_prompts_that_are_learned_too() {
    let dir = TempDir::new().unwrap();
    let config = PrepareConfig { val_size: 20, ..config(&dir, &numbered(100)) };
    let masked = run(&config).unwrap();
    let config = PrepareConfig { row: RowConfig { train_on_inputs: true, ..ROW }, ..config };
    let whole = run(&config).unwrap();
    let rows = |data: &PreparedDataset| -> Vec<(Vec<bool>, Vec<bool>)> {
        let rows = data.train.iter().chain(data.validation.iter());
        rows.map(|row| (row.loss_mask.to_vec(), row.answers.to_vec())).collect()
    };
    for ((masked, answers), (whole, of_whole)) in rows(&masked).into_iter().zip(rows(&whole)) {
        assert!(masked == answers && answers == of_whole && whole[1..].iter().all(|&label| label));
    }
    let out = dir.path().join("out");
    prepare(&config, &smollm(), dir.path(), &mut |_, _| ()).unwrap().write(&out).unwrap();
    assert_eq!(PreparedDataset::read(&out).unwrap(), whole);
    let again = dir.path().join("again");
    whole.write(&again).unwrap();
    assert_eq!(fs::read(&again).unwrap(), fs::read(&out).unwrap());
}

#[test]
fn everything_is_counted() {
    let dir = TempDir::new().unwrap();
    let rows = json!([
        {"instruction": "a", "output": "b", "id": 1},
        {"instruction": "a", "input": "", "output": "b", "id": 2, "source": "x"},
        {"instruction": "c", "output": " \n"},
        {"instruction": "d", "output": "word ".repeat(500)},
        {"instruction": "long ".repeat(500), "output": "e"},
        {"instruction": 7, "output": "e"},
    ]);
    let config = PrepareConfig { skip_bad: true, ..config(&dir, &rows.to_string()) };
    let prepared = run(&config).unwrap();
    let report = &prepared.report;
    assert_eq!((report.records, report.bad_records, report.train_rows), (6, 1, 4));
    assert_eq!((report.duplicates, report.empty_outputs, report.truncated), (1, 1, 1));
    assert_eq!(report.dropped.clone().into_iter().collect::<Vec<_>>(), [(DropReason::AnswerCutAway, 1)]);
    assert_eq!(
        report.ignored_fields.clone().into_iter().collect::<Vec<_>>(),
        [("id".into(), 2), ("source".into(), 1)]
    );
    assert_eq!(report.longest, 256);
    assert_eq!(report.tokens, prepared.train.tokens());
    assert_eq!(report.supervised_tokens, prepared.train.supervised());
    assert_eq!(report.length_histogram.iter().map(|bucket| bucket.rows).sum::<usize>(), 4);
    assert_eq!(report.files.len(), 1);
}

#[test]
fn bad_records_stop_it_unless_skipped() {
    let dir = TempDir::new().unwrap();
    let error =
        run(&config(&dir, r#"[{"instruction": "a", "output": 1}, {"instruction": "a", "output": "b"}]"#));
    let error = error.unwrap_err().to_string();
    assert!(
        error.contains("data.json: record 1: `output` is a number") && error.contains("--skip-bad"),
        "{error}"
    );
    let error = run(&PrepareConfig { skip_bad: true, ..config(&dir, "[{}]") }).unwrap_err().to_string();
    assert!(error.contains("none of 1 records is left") && error.contains("1 bad"), "{error}");
}

#[test]
fn settings_out_of_range_say_so() {
    let dir = TempDir::new().unwrap();
    let good = config(&dir, &numbered(3));
    let error = |config: PrepareConfig| run(&config).unwrap_err().to_string();
    assert!(
        error(PrepareConfig { val_size: 3, ..good.clone() })
            .starts_with("val_size = 3: expected fewer than the 3")
    );
    assert!(
        error(PrepareConfig { row: RowConfig { max_seq_len: 1, ..ROW }, ..good.clone() })
            .starts_with("max_seq_len = 1: expected at least 2")
    );
    assert!(error(PrepareConfig { files: vec![], ..good.clone() }).contains("at least one data file"));
    let nothing = error(PrepareConfig { row: RowConfig { max_seq_len: 2, ..ROW }, ..good.clone() });
    assert!(nothing.contains("3 answer cut away") && nothing.contains("raise max_seq_len = 2"), "{nothing}");
    let missing =
        PrepareConfig { files: ["/no/a", "/no/b"].map(|path| PathBuf::from(path).into()).into(), ..good };
    let missing = error(missing);
    assert!(missing.contains("/no/a: cannot read") && missing.contains("/no/b: cannot read"), "{missing}");
}

#[test]
fn a_template_that_fails_on_one_record_names_it() {
    let dir = TempDir::new().unwrap();
    let template = dir.path().join("t.jinja");
    fs::write(&template, "{% for i in range(instruction | length) %}.{% endfor %}{{ output }}").unwrap();
    let rows =
        json!([{"instruction": "a", "output": "b"}, {"instruction": "a".repeat(99_999), "output": "b"}]);
    let config =
        PrepareConfig { template: template.display().to_string(), ..config(&dir, &rows.to_string()) };
    let error = run(&config).unwrap_err().to_string();
    assert!(error.contains("data.json: record 2: template") && error.contains("too many steps"), "{error}");
}

#[test]
fn the_key_changes_with_everything_that_matters_and_nothing_else() {
    let dir = TempDir::new().unwrap();
    let base = config(&dir, &numbered(10));
    let template = PromptTemplate::load(&base.template, &smollm()).unwrap();
    let of = |config: &PrepareConfig| key(config, &template, &smollm()).unwrap();
    let first = of(&base);
    assert_eq!(first.len(), 64);
    assert_eq!(run(&base).unwrap().key, first);

    let mut keys = vec![first.clone()];
    keys.push(of(&PrepareConfig { row: RowConfig { max_seq_len: 255, ..ROW }, ..base.clone() }));
    keys.push(of(&PrepareConfig { row: RowConfig { train_on_inputs: true, ..ROW }, ..base.clone() }));
    keys.push(of(&PrepareConfig { row: RowConfig { learn: Learn::Last, ..ROW }, ..base.clone() }));
    keys.push(of(&PrepareConfig { format: RecordFormat::Alpaca, ..base.clone() }));
    let columns = Columns { input: Some("context".into()), ..Columns::default() };
    keys.push(of(&PrepareConfig { columns, ..base.clone() }));
    let weighted = DataFile { weight: 2.0, ..base.files[0].clone() };
    keys.push(of(&PrepareConfig { files: vec![weighted], ..base.clone() }));
    keys.push(of(&PrepareConfig { val_size: 1, ..base.clone() }));
    keys.push(of(&PrepareConfig { skip_bad: true, ..base.clone() }));
    keys.push(key(&base, &PromptTemplate::load("alpaca", &smollm()).unwrap(), &smollm()).unwrap());
    keys.push(key(&base, &template, &llama2()).unwrap());
    let twice = vec![base.files[0].clone(), base.files[0].clone()];
    keys.push(of(&PrepareConfig { files: twice, ..base.clone() }));
    let moved = dir.path().join("moved.json");
    fs::copy(&base.files[0].path, &moved).unwrap();
    assert_eq!(
        of(&PrepareConfig { files: vec![moved.into()], ..base.clone() }),
        first,
        "the same bytes elsewhere"
    );
    fs::write(&base.files[0].path, numbered(11)).unwrap();
    keys.push(of(&base));
    let distinct: HashSet<_> = keys.iter().collect();
    assert_eq!(distinct.len(), keys.len());
}

/// What goes through the files without a name is what is in memory, held-out rows and weights included.
#[test]
fn a_written_file_holds_the_same_as_memory() {
    let dir = TempDir::new().unwrap();
    let mut config = PrepareConfig { val_size: 100, ..config(&dir, &numbered(700)) };
    config.files.push(DataFile { weight: 0.5, ..config.files[0].clone() });
    let loaded = run(&config).unwrap();
    assert_eq!((loaded.train.len(), loaded.validation.len()), (1300, 100));
    let rows: Vec<_> = loaded.mixture.parts().iter().map(|part| (part.rows, part.weight)).collect();
    assert!(rows[0].0 + rows[1].0 == 1300 && (rows[0].1, rows[1].1) == (1.0, 0.5), "{rows:?}");
    let out = dir.path().join("out");
    prepare(&config, &smollm(), dir.path(), &mut |_, _| ()).unwrap().write(&out).unwrap();
    assert_eq!(PreparedDataset::read(&out).unwrap(), loaded);
    let again = dir.path().join("again");
    loaded.write(&again).unwrap();
    assert_eq!(fs::read(&again).unwrap(), fs::read(&out).unwrap());
    for weight in [-1.0, f64::NAN, 1e9] {
        let files = vec![DataFile { weight, ..config.files[0].clone() }];
        let error = run(&PrepareConfig { files, ..config.clone() }).unwrap_err().to_string();
        assert!(error.contains("weight = ") && error.contains("from 0 to 1000"), "{error}");
    }
}
