mod input;

use std::io::{self, IsTerminal, Write};
use std::ops::ControlFlow;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use miette::{IntoDiagnostic, Result, WrapErr, miette};
use pronk_data::{Conversation, InstructRecord, Question};
use pronk_model::{Answer, KeyValueCache, Sampling};
use signal_hook::consts::SIGINT;
use signal_hook::flag;

use self::input::Input;
use crate::args;
use crate::speaker::{self, Speaker, Voices};
use crate::terminal::{print, say, without_repetition};

const COMMANDS: &str = "\
/reset          begin anew
/system TEXT    what the model is told before anyone speaks; nothing, without TEXT
/adapter NAME   speak through another adapter; without NAME, which there are
/save FILE      write the conversation, as a record to train on
/quit           end; so does Ctrl-D
Ctrl-C ends an answer. A line that begins with // is said with one slash.";

/// `pronk chat`
pub fn run(args: &args::Chat) -> Result<()> {
    let sampling = speaker::sampling(&args.speaking)?;
    let speaker = Voices::open(&args.speaking)?.load(&args.speaking.device.device)?;
    let mut chat = Chat::new(speaker, sampling)?;
    let mut input = Input::open()?;
    if input.is_terminal() {
        say("/help says what there is beside asking; Ctrl-D ends");
    }
    while let Some(line) = input.line(&chat.prompt())? {
        // What goes wrong with a line is told, and the next one may go better.
        match chat.heed(&line) {
            Ok(ControlFlow::Continue(())) => {}
            Ok(ControlFlow::Break(())) => break,
            Err(report) => say(&format!("{:?}", without_repetition(&report))),
        }
    }
    Ok(())
}

/// A conversation, and who answers in it.
struct Chat {
    speaker: Speaker,
    voice: usize,
    sampling: Sampling,
    conversation: Conversation,
    cache: KeyValueCache,
    /// Set by Ctrl-C.
    stop: Arc<AtomicBool>,
    /// Ctrl-C ends the program then, as ever.
    idle: Arc<AtomicBool>,
}

impl Chat {
    fn new(speaker: Speaker, sampling: Sampling) -> Result<Self> {
        let (stop, idle) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicBool::new(true)));
        flag::register_conditional_default(SIGINT, Arc::clone(&idle)).into_diagnostic()?;
        flag::register(SIGINT, Arc::clone(&stop)).into_diagnostic()?;
        let (conversation, cache) = (Conversation::default(), KeyValueCache::default());
        Ok(Self { speaker, voice: 0, sampling, conversation, cache, stop, idle })
    }

    /// What stands in front of the user's line.
    fn prompt(&self) -> String {
        let voices = self.speaker.voices().all();
        match voices.get(self.voice) {
            Some(voice) if voices.len() > 1 => format!("{}> ", voice.name),
            _ => "> ".to_owned(),
        }
    }

    /// Does what a line asks for.
    fn heed(&mut self, line: &str) -> Result<ControlFlow<()>> {
        let line = line.trim();
        let said = line.strip_prefix('/').filter(|rest| rest.starts_with('/')).unwrap_or(line);
        if line.is_empty() {
            return Ok(ControlFlow::Continue(()));
        }
        if !line.starts_with('/') || said != line {
            self.ask(said)?;
            return Ok(ControlFlow::Continue(()));
        }
        let (command, rest) = line.split_once(char::is_whitespace).unwrap_or((line, ""));
        match (command, rest.trim()) {
            ("/quit" | "/exit", _) => return Ok(ControlFlow::Break(())),
            ("/reset", _) => self.conversation.turns.clear(),
            ("/system", "") => self.conversation.system = None,
            ("/system", text) => self.set_system(text)?,
            ("/adapter", "") => self.list(),
            ("/adapter", name) => self.switch(name)?,
            ("/save", "") => return Err(miette!("/save: expected the name of a file")),
            ("/save", file) => self.save(Path::new(file))?,
            ("/help", _) => say(COMMANDS),
            (other, _) => return Err(miette!("{other}: no such command; there are:\n{COMMANDS}")),
        }
        Ok(ControlFlow::Continue(()))
    }

    /// Whether the template knows more than one question with its answer.
    fn remembers(&self) -> bool {
        let voice = self.speaker.voices().all().get(self.voice);
        voice.is_some_and(|voice| voice.template.writes_special_tokens())
    }

    fn ask(&mut self, instruction: &str) -> Result<()> {
        if !self.remembers() {
            // A template over instruction and input has no place for what was said before.
            self.conversation.turns.clear();
        }
        let turn = InstructRecord { instruction: instruction.to_owned(), ..InstructRecord::default() };
        self.conversation.turns.push(turn);
        let answered = self.answer();
        let text = answered.as_ref().map(String::as_str).unwrap_or_default();
        if text.is_empty() {
            self.conversation.turns.pop(); // as if it had not been asked
        } else if let Some(turn) = self.conversation.turns.last_mut() {
            text.clone_into(&mut turn.output);
        }
        answered.map(|_| ())
    }

    /// Answers the last turn's question.
    fn answer(&mut self) -> Result<String> {
        let question = Question::Conversation(self.conversation.clone());
        let prompt = self.speaker.voices().prompt(self.voice, &question).wrap_err("/reset begins anew")?;
        self.stop.store(false, Ordering::Relaxed);
        self.idle.store(false, Ordering::Relaxed);
        let mut clock = Clock::start();
        let found = self.speaker.answer(&mut self.cache, self.voice, &prompt, self.sampling, |text| {
            clock.token();
            print(text);
            if self.stop.load(Ordering::Relaxed) { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
        });
        self.idle.store(true, Ordering::Relaxed);
        print("\n");
        let (text, answer) = found.inspect_err(|_| self.cache = KeyValueCache::default())?;
        say(&clock.figures(prompt.len(), &answer));
        Ok(text)
    }

    fn set_system(&mut self, text: &str) -> Result<()> {
        if !self.remembers() {
            return Err(miette!(
                "/system: this template knows instruction and input only; take one over messages, such as \
                 --template chat"
            ));
        }
        self.conversation.system = Some(text.to_owned());
        Ok(())
    }

    fn list(&self) {
        for (number, voice) in self.speaker.voices().all().iter().enumerate() {
            let name = if voice.name.is_empty() { "the base alone" } else { &voice.name };
            say(&format!("{} {name}", if number == self.voice { "*" } else { " " }));
        }
    }

    fn switch(&mut self, name: &str) -> Result<()> {
        let voice = self.speaker.voices().find(name)?;
        if voice != self.voice {
            self.voice = voice;
            self.cache = KeyValueCache::default(); // keys and values are the other's
        }
        Ok(())
    }

    /// Never over a file that is there.
    fn save(&self, file: &Path) -> Result<()> {
        let record = format!("{}\n", self.conversation.to_messages());
        let write = || {
            let mut new = std::fs::File::create_new(file)?;
            new.write_all(record.as_bytes()).inspect_err(|_| drop(std::fs::remove_file(file)))
        };
        write().into_diagnostic().wrap_err_with(|| format!("/save {}", file.display()))
    }
}

/// When an answer began, and when its first and last tokens came.
struct Clock {
    start: Instant,
    tokens: Option<(Instant, Instant)>,
}

impl Clock {
    fn start() -> Self {
        Self { start: Instant::now(), tokens: None }
    }

    fn token(&mut self) {
        let now = Instant::now();
        let first = self.tokens.map_or(now, |(first, _)| first);
        self.tokens = Some((first, now));
    }

    /// What the answer took, for the line below it.
    fn figures(&self, prompt: usize, answer: &Answer) -> String {
        let Answer { token_ids, computed, .. } = answer;
        let (first, last) = self.tokens.unwrap_or((self.start, self.start));
        let read = first.duration_since(self.start).as_secs_f64();
        let tokens = token_ids.len();
        let took = last.duration_since(first);
        let speed = if tokens > 1 && took > Duration::ZERO {
            format!(", {:.1} tokens/s", (tokens - 1) as f64 / took.as_secs_f64())
        } else {
            String::new()
        };
        let text =
            format!("[{computed} of {prompt} prompt tokens read in {read:.2} s; {tokens} tokens{speed}]");
        let colour = io::stderr().is_terminal() && std::env::var_os("NO_COLOR").is_none();
        if colour { format!("\x1b[2m{text}\x1b[0m") } else { text }
    }
}
