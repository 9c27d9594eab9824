//! A file of questions to a file of answers, which goes on where it stopped.

use std::fs::{File, OpenOptions};
use std::io::{BufRead, BufReader, Write};
use std::ops::ControlFlow;
use std::path::Path;
use std::process::ExitCode;
use std::sync::atomic::Ordering;

use miette::{IntoDiagnostic, Result, WrapErr, miette};
use pronk_data::Question;
use pronk_model::{Ending, KeyValueCache, Sampling};
use serde_json::{Map, Value};

use crate::progress;
use crate::speaker::Voices;
use crate::terminal::{note, print, stop_on_signal};

/// What an answered line has beside its question's fields; transformers' name, and `OpenAI`'s.
const TEXT: &str = "generated_text";
const REASON: &str = "finish_reason";
/// Who answers; in a question, who is to.
const ADAPTER: &str = "adapter";

/// How many bad lines are listed.
const LISTED: usize = 20;

/// A line of the batch.
struct Request {
    fields: Map<String, Value>,
    voice: usize,
    prompt: Vec<u32>,
}

/// Answers the lines of `batch` that `out` has no answer for, in their order.
pub fn run(voices: Voices, device: &str, sampling: Sampling, batch: &Path, out: &Path) -> Result<ExitCode> {
    let total = check(&voices, batch)?;
    if std::fs::canonicalize(batch).into_diagnostic()? == std::fs::canonicalize(out).unwrap_or_default() {
        return Err(miette!("--out {}: that is the batch itself; expected another file", out.display()));
    }
    let done = resume(&voices, batch, out)?;
    let named = || out.display().to_string();
    let mut answers =
        OpenOptions::new().create(true).append(true).open(out).into_diagnostic().wrap_err_with(named)?;
    let speaker = if done < total { Some(voices.load(device)?) } else { None };
    let stop = stop_on_signal("ending here; what is answered is kept")?;
    let bar = progress::bar("answering", total);
    let mut made = 0;
    if let Some(speaker) = &speaker {
        for (number, request) in requests(speaker.voices(), batch)?.enumerate().skip(done) {
            bar.set_position(number as u64);
            let Request { mut fields, voice, prompt } = request?;
            // Each line has draws of its own, whatever was answered before it; and a cache of its own, so that its
            // answer does not depend on where the batch stopped.
            let sampling = Sampling { seed: sampling.seed.wrapping_add(number as u64), ..sampling };
            let going_on = |_: &str| {
                if stop.load(Ordering::Relaxed) { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
            };
            let mut cache = KeyValueCache::default();
            let (text, answer) = speaker.answer(&mut cache, voice, &prompt, sampling, going_on)?;
            if answer.ending == Ending::Interrupted || stop.load(Ordering::Relaxed) {
                break;
            }
            let reason = if answer.ending == Ending::Stop { "stop" } else { "length" };
            fields.insert(TEXT.to_owned(), text.into());
            fields.insert(REASON.to_owned(), reason.into());
            fields.insert(ADAPTER.to_owned(), name_of(speaker.voices(), voice));
            let line = format!("{}\n", Value::Object(fields));
            answers.write_all(line.as_bytes()).into_diagnostic().wrap_err_with(named)?;
            made += 1;
        }
    }
    bar.finish_and_clear();
    answers.sync_all().into_diagnostic().wrap_err_with(named)?;
    let answered = done + made;
    print(&format!("answered {answered} of {total}: {}\n", out.display()));
    if answered == total {
        return Ok(ExitCode::SUCCESS);
    }
    print("the same command goes on from there\n");
    Ok(ExitCode::from(130))
}

/// Null where the base speaks alone.
fn name_of(voices: &Voices, voice: usize) -> Value {
    let name = voices.all().get(voice).map(|voice| voice.name.as_str()).filter(|name| !name.is_empty());
    name.map_or(Value::Null, Value::from)
}

/// The objects of a file of JSON Lines with the numbers of their lines; blank lines are passed over.
fn lines(path: &Path) -> Result<impl Iterator<Item = Result<(usize, Map<String, Value>)>>> {
    let place = path.display().to_string();
    let file = File::open(path).into_diagnostic().wrap_err_with(|| place.clone())?;
    let lines = (1..).zip(BufReader::new(file).lines()).filter_map(move |(number, line)| {
        let line = match line.into_diagnostic().wrap_err_with(|| format!("{place}: line {number}")) {
            Ok(line) => line,
            Err(error) => return Some(Err(error)),
        };
        let line = line.strip_prefix('\u{feff}').unwrap_or(&line);
        if line.trim().is_empty() {
            return None;
        }
        let object = serde_json::from_str(line);
        Some(object.map(|object| (number, object)).map_err(|e| miette!("{place}: line {number}: {e}")))
    });
    Ok(lines)
}

fn requests<'a>(voices: &'a Voices, batch: &'a Path) -> Result<impl Iterator<Item = Result<Request>> + 'a> {
    let place = batch.display().to_string();
    Ok(lines(batch)?.map(move |line| {
        let (number, fields) = line?;
        request(voices, fields).wrap_err_with(|| format!("{place}: line {number}"))
    }))
}

fn request(voices: &Voices, fields: Map<String, Value>) -> Result<Request> {
    let voice = match fields.get(ADAPTER) {
        None | Some(Value::Null) => 0,
        Some(Value::String(name)) => voices.find(name)?,
        Some(other) => return Err(miette!("`{ADAPTER}` is {other}, expected the name of an adapter")),
    };
    let question = Question::parse(fields.clone()).map_err(|wrong| miette!("{wrong}"))?;
    Ok(Request { prompt: voices.prompt(voice, &question)?, fields, voice })
}

/// How many questions there are, all of which can be asked; or all that is wrong with them.
fn check(voices: &Voices, batch: &Path) -> Result<usize> {
    let (mut total, mut wrong) = (0, Vec::new());
    for request in requests(voices, batch)? {
        total += 1;
        wrong.extend(
            request.err().map(|error| error.chain().map(ToString::to_string).collect::<Vec<_>>().join(": ")),
        );
    }
    if let Some(more) = wrong.len().checked_sub(LISTED).filter(|&more| more > 0) {
        wrong.truncate(LISTED);
        wrong.push(format!("... and {more} more"));
    }
    match (total, wrong.is_empty()) {
        (0, _) => Err(miette!("{}: no question; expected an object a line", batch.display())),
        (_, true) => Ok(total),
        _ => Err(miette!("{}", wrong.join("\n"))),
    }
}

/// How many answers `out` holds, each of which is to the question of its place. A last line that was cut short is
/// taken off.
fn resume(voices: &Voices, batch: &Path, out: &Path) -> Result<usize> {
    if !out.exists() {
        return Ok(0);
    }
    let named = || out.display().to_string();
    let whole = whole_lines(out).into_diagnostic().wrap_err_with(named)?;
    let mut questions = requests(voices, batch)?;
    let mut done = 0;
    let mut answered = lines(out)?;
    while done < whole.lines {
        let Some(line) = answered.next() else { break };
        let (number, mut answer) = line?;
        let by = answer.shift_remove(ADAPTER).unwrap_or_default();
        let is_answer = answer.contains_key(TEXT);
        answer.retain(|name, _| ![TEXT, REASON].contains(&name.as_str()));
        let fits = match questions.next().transpose()? {
            Some(Request { mut fields, voice, .. }) => {
                fields.retain(|name, _| ![TEXT, REASON, ADAPTER].contains(&name.as_str()));
                fields == answer && by == name_of(voices, voice)
            }
            None => false,
        };
        if !(fits && is_answer) {
            return Err(miette!(
                "{}: line {number} is not what {} and its adapter make of that line; expected the answers that the \
                 same command began, or a new file",
                out.display(),
                batch.display()
            ));
        }
        done += 1;
    }
    drop(answered);
    if whole.torn {
        note(&format!("{}: its last line was cut short, and is made again", out.display()));
        let file = OpenOptions::new().write(true).open(out).into_diagnostic().wrap_err_with(named)?;
        file.set_len(whole.bytes).into_diagnostic().wrap_err_with(named)?;
    }
    Ok(done)
}

/// What of a file ends in a line's end.
struct Whole {
    lines: usize,
    bytes: u64,
    /// Whether something follows.
    torn: bool,
}

fn whole_lines(path: &Path) -> std::io::Result<Whole> {
    let mut file = BufReader::new(File::open(path)?);
    let mut whole = Whole { lines: 0, bytes: 0, torn: false };
    let mut line = Vec::new();
    while file.read_until(b'\n', &mut line)? > 0 {
        if line.ends_with(b"\n") {
            whole.lines += 1;
            whole.bytes += line.len() as u64;
        } else {
            whole.torn = true;
        }
        line.clear();
    }
    Ok(whole)
}
