//! What of a row is its own, as shingles: the runs of three tokens that it has (Broder 1997, "On the resemblance and
//! containment of documents").

use std::collections::{HashMap, HashSet};
use std::hash::{DefaultHasher, Hash, Hasher};

use crate::example::ExampleView;
use crate::prepared::PreparedDataset;

/// Shingles that more rows have are the data's form, in percent.
pub(super) const FORM: usize = 90;
/// Prompts that are looked at for what they all have.
const PROMPTS: usize = 1000;
/// Tokens of a shingle. Of longer ones, a short answer would lose most by a single other word.
const SHINGLE: usize = 3;
/// What more rows than so many have in common is nobody's, ..
pub(super) const FEW: usize = 10;
/// .. if they are more than one in so many, too.
pub(super) const SHARE: usize = 100;

/// The rows of a dataset, those held out behind those to train on.
///
/// What many prompts begin or end with is not theirs but the template's, or a task's that many rows have. The answers
/// are the rows' own, however many give nearly the same.
pub(super) struct Shingles<'a> {
    data: &'a PreparedDataset,
    /// By row, how many tokens its prompt begins and ends with that are not its own.
    begins: Vec<usize>,
    ends: Vec<usize>,
    /// What nearly all prompts have: the template's.
    form: HashSet<u64>,
}

impl<'a> Shingles<'a> {
    pub(super) fn new(data: &'a PreparedDataset) -> Self {
        let prompts: Vec<&[u32]> = data.train.iter().chain(data.validation.iter()).map(prompt).collect();
        // Of few rows, those that more than half of them have.
        let most = (prompts.len() / SHARE).max(FEW).min(prompts.len() / 2).max(1);
        let begins = shared(&prompts, most, |prompt, at| prompt.get(at).copied());
        let ends = shared(&prompts, most, |prompt, at| prompt.iter().nth_back(at).copied());
        Self { data, begins, ends, form: form(&prompts) }
    }

    /// Of row `number`, in order. One that comes again is another.
    pub(super) fn of(&self, number: usize) -> Vec<u64> {
        let Some(row) = self.row(number) else { return Vec::new() };
        let of = |tokens: &[usize]| tokens.get(number).copied().unwrap_or(0);
        let prompt = prompt(row);
        let (begin, end) = (of(&self.begins), prompt.len() - of(&self.ends).min(prompt.len()));
        let own = |&(at, _): &(usize, _)| {
            let behind = at + SHINGLE;
            behind > begin && !(at >= end && behind <= prompt.len())
        };
        let shingles = row.token_ids.windows(SHINGLE).enumerate().filter(own).map(|(_, run)| hash(run));
        // Where nothing of the prompt is left, it still is this one and not another.
        let whole = (begin >= end && !prompt.is_empty()).then(|| hash(prompt));
        numbered(shingles.chain(whole).collect())
    }

    /// Of its prompt alone, whatever many others begin or end with, less what nearly all have.
    pub(super) fn of_prompt(&self, number: usize) -> Vec<u64> {
        let prompt = self.row(number).map_or(&[][..], prompt);
        let shingles = prompt.windows(SHINGLE).map(hash).filter(|shingle| !self.form.contains(shingle));
        numbered(shingles.collect())
    }

    fn row(&self, number: usize) -> Option<ExampleView<'a>> {
        let PreparedDataset { train, validation, .. } = self.data;
        let held_out = number.checked_sub(train.len());
        held_out.map_or_else(|| train.get(number), |row| validation.get(row))
    }
}

/// What more than [`FORM`] percent of some of the prompts have.
fn form(prompts: &[&[u32]]) -> HashSet<u64> {
    let some = prompts.iter().step_by(prompts.len().div_ceil(PROMPTS).max(1));
    let mut having: HashMap<u64, usize> = HashMap::new();
    for prompt in some.clone() {
        let own: HashSet<u64> = prompt.windows(SHINGLE).map(hash).collect();
        for shingle in own {
            *having.entry(shingle).or_default() += 1;
        }
    }
    let looked_at = some.len();
    having.retain(|_, rows| *rows > FEW.min(looked_at / 2) && 100 * *rows > FORM * looked_at);
    having.into_keys().collect()
}

/// In order; one that comes again is another.
fn numbered(mut shingles: Vec<u64>) -> Vec<u64> {
    shingles.sort_unstable();
    let again = |(times, &shingle): (usize, &u64)| if times == 0 { shingle } else { hash(&(shingle, times)) };
    let mut shingles: Vec<u64> =
        shingles.chunk_by(|a, b| a == b).flat_map(|same| same.iter().enumerate().map(again)).collect();
    shingles.sort_unstable();
    shingles
}

/// What precedes the first answer; nothing where no prompt can be told from it.
fn prompt(row: ExampleView<'_>) -> &[u32] {
    let first = row.answers.iter().position(|&answer| answer).filter(|&first| first > 1);
    row.token_ids.get(..first.unwrap_or(0)).unwrap_or_default()
}

fn hash(content: &(impl Hash + ?Sized)) -> u64 {
    let mut hasher = DefaultHasher::new();
    content.hash(&mut hasher);
    hasher.finish()
}

/// The token of a prompt that stands so far from the end that is looked at.
type At = fn(&[u32], usize) -> Option<u32>;

/// How many tokens each prompt has in common with `most` others or more, from that end on.
fn shared(prompts: &[&[u32]], most: usize, at: At) -> Vec<usize> {
    let mut order: Vec<(usize, &[u32])> = prompts.iter().copied().enumerate().collect();
    order.sort_unstable_by(|(_, a), (_, b)| from_end(a, at).cmp(from_end(b, at)));
    let mut tokens = vec![0; prompts.len()];
    // Prompts with a beginning in common stand together now: a group, and how long it is at least.
    let mut open = if order.len() > most { vec![(order.as_slice(), 0)] } else { Vec::new() };
    while let Some((group, known)) = open.pop() {
        let (Some((_, first)), Some((_, last))) = (group.first(), group.last()) else { continue };
        let differ = |far: &usize| at(first, *far).is_none() || at(first, *far) != at(last, *far);
        let far = (known..=first.len()).find(differ).unwrap_or(known);
        for part in group.chunk_by(|(_, a), (_, b)| at(a, far) == at(b, far)) {
            let goes_on = part.first().is_some_and(|(_, prompt)| at(prompt, far).is_some());
            if goes_on && part.len() > most {
                open.push((part, far + 1));
                continue;
            }
            for &(number, _) in part {
                tokens.get_mut(number).into_iter().for_each(|tokens| *tokens = far);
            }
        }
    }
    tokens
}

fn from_end(prompt: &[u32], at: At) -> impl Iterator<Item = u32> {
    (0..).map_while(move |far| at(prompt, far))
}
