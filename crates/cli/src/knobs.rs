//! Knobs by their names, as a recipe's TOML and the command line have them: which there are, which was meant, and what is wrong
//! with the value of one.

use miette::{Result, miette};
use pronk_lora::LoraConfig;
use pronk_train::TrainConfig;
use serde::de::DeserializeOwned;
use toml::{Table, Value};

use crate::recipe::{BaseTable, DataTable, RunTable, TokensTable};

/// Knobs that stand in no default, because they are off, or found when the run starts.
const OPTIONAL: [(&str, &str); 7] = [
    ("base", "skip_modules"),
    ("data", "max_seq_len"),
    ("lora", "init_adapter"),
    ("lora", "loftq_config"),
    ("train", "max_steps"),
    ("train", "memory_budget"),
    ("train", "micro_batch_size"),
];

/// The table called `name` out of `table`, every knob read by itself, so that all that are wrong are in `problems`.
pub fn section<T: DeserializeOwned>(table: &mut Table, name: &str, problems: &mut Vec<String>) -> Option<T> {
    let value = table.remove(name).unwrap_or_else(|| Value::Table(Table::new()));
    let Value::Table(mut knobs) = value else {
        problems.push(format!("{name}: expected a table, found {value}"));
        return None;
    };
    let known = known_knobs(name);
    knobs.retain(|knob, _| known.iter().any(|k| k == knob)); // the others have been named already
    // Knob by knob first, so that every wrong one is named; the others are read all the same, so
    // that what is wrong with their values is named too.
    knobs.retain(|knob, value| {
        let one = Table::from_iter([(knob.to_owned(), value.clone())]);
        let wrong = one.try_into::<T>().err();
        problems.extend(wrong.iter().map(|e| format!("{name}.{knob}: {}, found {value}", expected(e))));
        wrong.is_none()
    });
    knobs.try_into().ok()
}

/// What a knob takes, in words of ours: `serde` speaks of Rust's types.
fn expected(error: &toml::de::Error) -> String {
    let message = error.message().lines().next().unwrap_or_default();
    let Some((_, kind)) = message.split_once("expected ") else { return message.to_owned() };
    let kind = match kind {
        "usize" | "u64" => "a whole number from 0",
        "f64" => "a number",
        "a boolean" => "true or false",
        "a sequence" => "a list",
        "path string" => "a path",
        kind => kind,
    };
    format!("expected {kind}")
}

/// The reader's words with the line they speak of, unless that is no line for people.
pub fn toml_error(error: &toml::de::Error) -> String {
    let whole = error.to_string();
    let readable = whole.lines().all(|line| line.len() < 200);
    if readable { whole.trim_end().to_owned() } else { format!("not TOML: {}", error.message()) }
}

/// Names of a table's knobs: those of its defaults, and those that are off by default.
fn known_knobs(section: &str) -> Vec<String> {
    let table = match section {
        "base" => Table::try_from(BaseTable::default()),
        "data" => Table::try_from(DataTable::default()),
        "tokens" => Table::try_from(TokensTable::default()),
        "lora" => Table::try_from(LoraConfig::default()),
        "train" => Table::try_from(TrainConfig::default()),
        _ => Table::try_from(RunTable::default()),
    };
    let optional = OPTIONAL.iter().filter(|(table, _)| *table == section).map(|(_, knob)| (*knob).to_owned());
    table.unwrap_or_default().into_iter().map(|(knob, _)| knob).chain(optional).collect()
}

const SECTIONS: [&str; 6] = ["base", "data", "tokens", "lora", "train", "run"];

/// Every table and knob that a recipe does not have, with the name that was probably meant.
pub fn unknown_knobs(table: &Table) -> Vec<String> {
    let mut problems = Vec::new();
    for (name, value) in table {
        if !SECTIONS.contains(&name.as_str()) {
            let tables = SECTIONS.map(str::to_owned);
            problems.push(format!("{name}: unknown table{}", suggestion(name, &tables)));
            continue;
        }
        let known = known_knobs(name);
        let knobs = value.as_table().into_iter().flat_map(Table::keys);
        let unknown = knobs.filter(|knob| !known.contains(knob));
        problems
            .extend(unknown.map(|knob| format!("{name}.{knob}: unknown knob{}", suggestion(knob, &known))));
    }
    problems
}

fn suggestion(name: &str, known: &[String]) -> String {
    let closest =
        known.iter().max_by(|a, b| strsim::jaro_winkler(name, a).total_cmp(&strsim::jaro_winkler(name, b)));
    match closest {
        Some(best) if strsim::jaro_winkler(name, best) > 0.7 => format!("; did you mean {best}?"),
        _ => format!("; there are: {}", known.join(", ")),
    }
}

/// Makes one `--set table.knob=value`. A value that is no TOML is taken as text.
pub fn apply(table: &mut Table, change: &str) -> Result<()> {
    let expected = || miette!("--set {change}: expected table.knob=value, such as train.max_steps=8");
    let (name, value) = change.split_once('=').ok_or_else(expected)?;
    let (section, knob) = name.trim().split_once('.').ok_or_else(expected)?;
    let value = match toml::from_str::<Table>(&format!("value = {value}")) {
        Ok(mut parsed) => parsed.remove("value").unwrap_or_else(|| Value::String(value.into())),
        Err(_) => Value::String(value.into()),
    };
    let mut tables: Vec<&str> = [section].into_iter().chain(knob.split('.')).collect();
    let knob = tables.pop().unwrap_or_default();
    let mut table = table;
    for name in tables {
        let inner = table.entry(name).or_insert_with(|| Value::Table(Table::new()));
        table = inner.as_table_mut().ok_or_else(expected)?;
    }
    table.insert(knob.to_owned(), value);
    Ok(())
}
