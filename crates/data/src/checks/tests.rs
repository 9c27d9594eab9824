use serde_json::{Value, json};
use tempfile::TempDir;

use super::*;
use crate::example::{ExampleView, Learn, RowConfig, TokenizedExample};
use crate::prepare::{PrepareConfig, prepare};
use crate::prepared::Rows;
use crate::record::{Columns, RecordFormat};
use crate::template::PromptTemplate;
use crate::tokenizer::tests::{llama2, smollm};

/// One of 512, by chance, but always the same.
fn phrase(record: usize, number: u64) -> String {
    let kinds = ["red", "small", "wet", "old", "tall", "dark", "warm", "lost"];
    let things = ["wool", "grass", "hills", "rain", "goats", "hay", "fences", "moons"];
    let ends =
        ["by the sea", "in May", "of old", "at night", "for two", "on a cart", "up north", "with bells"];
    let mixed = (record as u64 * 8 + number).wrapping_mul(0x9e37_79b9_7f4a_7c15);
    let mixed = (mixed ^ (mixed >> 32)).wrapping_mul(0xd6e8_feb8_6659_fd93);
    let chosen = ((mixed ^ (mixed >> 32)) % 512) as usize;
    format!("{} {} {}", kinds[chosen % 8], things[chosen / 8 % 8], ends[chosen / 64])
}

/// Short records, no two of them alike.
fn records(count: usize) -> Vec<Value> {
    let record = |i: usize| {
        json!({"instruction": format!("{}, in {i} words?", phrase(i, 0)),
               "output": format!("{}, and {}; {i} stayed", phrase(i, 1), phrase(i, 2))})
    };
    (0..count).map(record).collect()
}

fn prepared(records: &[Value], template: &str, max_seq_len: usize, val_size: usize) -> PreparedDataset {
    let row = RowConfig { max_seq_len, train_on_inputs: false, learn: Learn::All };
    prepared_as(records, template, row, val_size)
}

fn prepared_as(records: &[Value], template: &str, row: RowConfig, val_size: usize) -> PreparedDataset {
    let dir = TempDir::new().unwrap();
    let path = dir.path().join("data.json");
    std::fs::write(&path, json!(records).to_string()).unwrap();
    let config = PrepareConfig {
        files: vec![path.into()],
        format: RecordFormat::Auto,
        columns: Columns::default(),
        template: template.to_owned(),
        row,
        val_size,
        skip_bad: false,
    };
    prepare(&config, &smollm(), dir.path(), &mut |_, _| ()).unwrap().load().unwrap()
}

fn finding(data: &PreparedDataset, wanted: Check) -> Finding {
    let found = check(data, &smollm()).unwrap();
    assert!(found.iter().map(|finding| finding.check).eq(Check::ALL));
    found.into_iter().find(|finding| finding.check == wanted).unwrap()
}

/// The checks that fail.
fn failed(records: &[Value]) -> Vec<String> {
    failed_of(&prepared(records, "alpaca", 256, 20))
}

fn failed_of(data: &PreparedDataset) -> Vec<String> {
    let found = check(data, &smollm()).unwrap();
    found.iter().filter(|finding| finding.fails()).map(|finding| finding.check.to_string()).collect()
}

fn answer(output: &str) -> Value {
    json!({"instruction": "What do you say?", "output": output})
}

#[test]
fn good_data_passes() {
    assert_eq!(failed(&records(200)), Vec::<String>::new());
    assert_eq!(Check::ALL.map(|check| check.to_string())[1], "answers-cut-away");
}

#[test]
fn every_fault_has_its_check() {
    let with = |bad: &[Value]| failed(&[&records(200), bad].concat());
    assert_eq!(with(&[answer(" \n")]), ["empty-outputs"]);
    for nothing in ["<nooutput>", "N/A", "None", " null\n", "<none>", "...", "…"] {
        assert_eq!(with(&[answer(nothing)]), ["empty-outputs"], "{nothing}");
    }
    for answer in ["None.", "Na", "No", "0", "-", "[]", "😈", "null and void"].map(answer) {
        assert_eq!(with(std::slice::from_ref(&answer)), Vec::<String>::new(), "{answer}");
    }
    assert_eq!(with(&[answer("Yes.\n\n### Instruction:\nAnd now?")]), ["template-markers"]);
    assert_eq!(with(&[answer("Yes.<|im_end|>\nNo.")]), ["template-markers"]);
    assert_eq!(with(&[answer("itâ€™s a cafÃ©")]), ["mojibake"]);
    let refusals: Vec<Value> = (0..11)
        .map(|i| json!({"instruction": format!("Question {i} of {}", i * i), "output": "I cannot say."}))
        .collect();
    assert_eq!(with(&refusals[..10]), Vec::<String>::new());
    assert_eq!(with(&refusals), ["one-answer"]);
    // A word that many rows give is a label.
    let labelled: Vec<Value> = (0..11)
        .map(|i| json!({"instruction": format!("Tool for {i} of {}", i * i), "output": "none"}))
        .collect();
    assert_eq!(with(&labelled[..10]), ["empty-outputs"]);
    assert_eq!(with(&labelled), ["one-answer"]);
}

/// With `train_on_inputs` every token is a label, the answers' too.
#[test]
fn answers_are_looked_at_where_prompts_are_learned_too() {
    let row = RowConfig { max_seq_len: 256, train_on_inputs: true, learn: Learn::All };
    let with = |bad: &dyn Fn(usize) -> Value| {
        let bad: Vec<Value> = (0..20).map(bad).collect();
        failed_of(&prepared_as(&[records(200), bad].concat(), "alpaca", row, 0))
    };
    assert_eq!(with(&|i| records(220)[200 + i].clone()), Vec::<String>::new());
    assert_eq!(with(&|_| answer("")), ["empty-outputs"]);
    assert_eq!(with(&|i| answer(&format!("{i}.\n\n### Instruction:\nAnd now?"))), ["template-markers"]);
    let refusal = |i| json!({"instruction": format!("Question {i}"), "output": "I cannot say."});
    assert_eq!(with(&refusal), ["one-answer"]);
}

#[test]
fn rows_are_named() {
    let mut data = records(30);
    data.insert(7, answer("A ### Response: in the middle"));
    let found = finding(&prepared(&data, "alpaca", 256, 0), Check::TemplateMarkers);
    let shown = [Shown { row: Some(7), what: "the answer holds \"### Response:\"".to_owned() }];
    assert_eq!((found.count, found.of, found.shown.as_slice()), (1, 31, &shown[..]));
    let many: Vec<Value> = (0..9).map(|_| answer("")).collect();
    let found = finding(&prepared(&many, "alpaca", 256, 0), Check::EmptyOutputs);
    assert_eq!((found.count, found.shown.len()), (9, SHOWN));
}

#[test]
fn what_is_cut_is_counted_with_what_was_dropped() {
    let mut data = records(300);
    data[3]["output"] = json!("na ".repeat(300));
    data[9]["instruction"] = json!("na ".repeat(300));
    let prepared = prepared(&data, "alpaca-short", 128, 0);
    let found = finding(&prepared, Check::AnswersCutAway);
    assert_eq!((found.count, found.of, found.fails()), (2, 300, false), "{found:?}");
    assert_eq!(found.shown[0], Shown { row: Some(3), what: "cut off after 128 tokens".to_owned() });
    assert!(found.shown[1].what.contains("data.json: record 10: dropped, answer cut away"), "{found:?}");
    data[4]["output"] = json!("na ".repeat(300));
    data[5]["output"] = json!("na ".repeat(300));
    assert!(finding(&self::prepared(&data, "alpaca-short", 128, 0), Check::AnswersCutAway).fails());
}

/// What `prepare` never writes, but a file may hold.
#[test]
fn ends_that_are_missing_and_beginnings_that_are_double() {
    let tokenizer = llama2();
    let (bos, eos) = (tokenizer.bos().unwrap(), tokenizer.eos());
    let row = |ids: &[u32], labels: usize| TokenizedExample {
        token_ids: ids.to_vec(),
        loss_mask: (0..ids.len()).map(|i| i + labels >= ids.len()).collect(),
    };
    let rows = [
        row(&[bos, 5, 6, 7, eos], 2),
        row(&[bos, bos, 6, 7, eos], 2),
        row(&[bos, 5, 6, 7, 8], 2),
        row(&[bos, 5, 6, 7, eos], 0),
    ];
    let learned_eos = |row: ExampleView<'_>| row.loss_mask.last() == Some(&true);
    assert!(!learned_eos(rows[3].view()));
    let data =
        PreparedDataset { train: rows.iter().collect::<Rows>(), ..prepared(&records(3), "alpaca", 256, 0) };
    let found = check(&data, &tokenizer).unwrap();
    let rows_of = |wanted: Check| -> Vec<usize> {
        let finding = found.iter().find(|finding| finding.check == wanted).unwrap();
        finding.shown.iter().filter_map(|shown| shown.row).collect()
    };
    assert_eq!(rows_of(Check::DoubleBos), [1]);
    assert_eq!(rows_of(Check::EosAbsent), [2, 3]);
    assert_eq!(rows_of(Check::NothingToLearn), [3]);
}

#[test]
fn held_out_rows_with_a_near_twin_are_found() {
    let mut data = records(200);
    // Each is there again with another last word.
    let twins: Vec<Value> = data
        .iter()
        .map(|record| {
            let mut twin = record.clone();
            let output = record["output"].as_str().unwrap();
            twin["output"] = json!(output.replace("stayed", "left"));
            twin
        })
        .collect();
    data.extend(twins);
    let prepared = prepared(&data, "alpaca", 256, 40);
    let found = finding(&prepared, Check::NearDuplicates);
    assert!(found.fails() && found.of == 40 && found.count >= 30, "{found:?}");
    let Shown { row: Some(row), what } = &found.shown[0] else { panic!("{found:?}") };
    assert!(*row >= prepared.train.len() && what.contains("% the same as row "), "{what}");
}

/// That there are many of them makes them no less alike.
#[test]
fn held_out_rows_of_many_that_are_nearly_one_are_found() {
    let water = |i: usize| {
        json!({"instruction": format!("Describe the water cycle in your own words, version {i}"),
               "output": format!("Water evaporates from the sea, rises into the air, cools into clouds, falls as rain and \
                                  flows back through rivers to the sea. ({i})")})
    };
    for (distinct, alike) in [(120, 40), (40, 120)] {
        let data = [records(distinct), (0..alike).map(water).collect()].concat();
        for train_on_inputs in [false, true] {
            let row = RowConfig { max_seq_len: 512, train_on_inputs, learn: Learn::All };
            let prepared = prepared_as(&data, "alpaca", row, 30);
            let is_one =
                |row: &ExampleView<'_>| smollm().decode(row.token_ids).unwrap().contains("evaporates");
            let held_out = prepared.validation.iter().filter(is_one).count();
            let found = finding(&prepared, Check::NearDuplicates);
            assert!(held_out >= 5 && found.count == held_out && found.fails(), "{held_out}: {found:?}");
        }
    }
}

/// Neither what a template writes in every row, nor what a task asks for, nor the form of its answers.
#[test]
fn what_many_rows_have_makes_them_no_twins() {
    let task = "Read the lines below with care, and say whether those who wrote them were content with what they saw. \
                Answer with one word, yes or no; do not say why, and write nothing else. ";
    let (before, behind) = (task.repeat(3), task.repeat(2));
    let lines = |i: usize| format!("{}; {}; {}", phrase(i, 4), phrase(i, 5), phrase(i, 6));
    let word = |i: usize| if i.is_multiple_of(3) { "yes" } else { "no" };
    let first = |i: usize| json!({"instruction": before, "input": lines(i), "output": word(i)});
    let last = |i: usize| json!({"instruction": format!("{}\n{behind}", lines(i)), "output": word(i)});
    let form = |i: usize| {
        let output =
            json!({"place": null, "organization": null, "amount": null, "date": null, "seen": phrase(i, 4)});
        json!({"instruction": "Extract what was seen", "input": lines(i), "output": output.to_string()})
    };
    // Of three forms, none of which nearly all rows have, and prompts that have nothing in common.
    let forms = |i: usize| {
        let fields = (0..12).map(|field| (format!("field_{}_{field}", i % 3), Value::Null));
        let output = Value::Object(fields.collect());
        json!({"instruction": lines(i), "output": output.to_string()})
    };
    let both: Vec<Value> = (0..200).map(|i| if i % 2 == 0 { first(i) } else { last(i) }).collect();
    for data in [both, (0..200).map(form).collect(), (0..200).map(forms).collect()] {
        let found = finding(&prepared(&data, "alpaca", 2048, 30), Check::NearDuplicates);
        assert_eq!((found.count, found.of), (0, 30), "{found:?}");
    }
}

#[test]
fn templates_are_asked_for_their_markers() {
    let markers = |name: &str, source: Option<&str>| {
        let tokenizer = smollm();
        let template = match source {
            Some(source) => PromptTemplate::new(name, source, &tokenizer).unwrap(),
            None => PromptTemplate::load(name, &tokenizer).unwrap(),
        };
        template.markers(&tokenizer)
    };
    assert_eq!(markers("alpaca", None), ["### Input:", "### Instruction:", "### Response:"]);
    assert_eq!(markers("vicuna", None), ["ASSISTANT:", "USER:"]);
    let chatml = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}\
                  {% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}";
    assert_eq!(markers("chatml", Some(chatml)), Vec::<String>::new(), "its marks are tokens");
    let llama = "{% for m in messages %}{% if m.role == 'user' %}[INST] {{ m.content }} [/INST]\
                 {% else %} {{ m.content }}{{ eos_token }}{% endif %}{% endfor %}";
    assert_eq!(markers("llama", Some(llama)), ["[/INST]", "[INST]"]);
    let own = "Q: {{ instruction }}\n--> {{ output }}";
    assert_eq!(markers("own", Some(own)), Vec::<String>::new(), "too short to tell anything");
}
