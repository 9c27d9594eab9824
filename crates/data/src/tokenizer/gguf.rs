//! A tokenizer as a GGUF file describes it, from whatever it came from.

use std::collections::HashMap;

use serde_json::Value;

use super::{TextTokenizer, token_name};
use crate::error::DataError;
use crate::gguf_vocabulary::{BYTE, CONTROL, GgufVocabulary, NORMAL, UNKNOWN, UNUSED, USER_DEFINED};

/// What llama.cpp calls the ways of cutting text into words. llama.cpp's converter tells them by what they make of a
/// text of everything awkward; so is it told here.
const PRE: [&str; 4] = ["gpt-2", "smollm", "llama-bpe", "qwen2"];

/// Numbers, spaces, line ends, contractions, capitals, scripts, marks that combine, signs, code.
const AWKWARD: [&str; 7] = [
    "Hello, world! 3 33 333 3333 33333 3.14159 1,000,000 v2.0 x86_64",
    "\n\n12\n\n\n345\r\n6\t7  8",
    "a  b   c    d\n\ne\n \n\tf \r\n\r\n  g\t\th   ",
    "I'm you're he'LL they'VE WE'D it's DON'T 'quoted' rock'n'roll",
    "Über señor naïve cafe\u{301} Ångström Ελληνικά Русский עברית العربية हिन्दी ไทย 漢字かな交じり文 한국어",
    "🚀 👩‍👩‍👧 ✅ → ∑∞≠ €£¥ ½ ² ﬁ \u{200b}\u{a0}\u{3000}end",
    "fn main() { let x = \"a\\n\"; /* !?!? */ } <|im_start|>user\n</s> [INST] <think> ### ======== ________ ....",
];

impl TextTokenizer {
    /// What a GGUF file says of this tokenizer, for a model of `vocab_size` tokens: those that the tokenizer does not
    /// know are marked as unused. It is read back and has to make the same of awkward texts, else it is refused.
    pub fn to_gguf(&self, vocab_size: usize) -> Result<GgufVocabulary, DataError> {
        let json: Value = serde_json::from_str(&self.to_json(false)?)
            .map_err(|error| self.no_gguf(&format!("it cannot be read back ({error})")))?;
        let model = &json["model"];
        if model["type"] != "BPE" {
            return Err(self.no_gguf(&format!("its model is {}, supported is \"BPE\"", model["type"])));
        }
        let vocabulary = self.vocabulary(&json, vocab_size)?;
        let merges = merges(model);
        if model["byte_fallback"] == true {
            let scores = scores(&vocabulary.tokens, &merges);
            let add_space_prefix = Some(self.adds_space);
            let found = GgufVocabulary { model: "llama".to_owned(), scores, add_space_prefix, ..vocabulary };
            return if self.agrees(&found) { Ok(found) } else { Err(self.no_gguf(DISAGREES)) };
        }
        let merges: Vec<String> = merges.into_iter().map(|(left, right)| format!("{left} {right}")).collect();
        let cut = |pre: &str| GgufVocabulary {
            model: "gpt2".to_owned(),
            pre: Some(pre.to_owned()),
            merges: merges.clone(),
            ..vocabulary.clone()
        };
        let found = PRE.into_iter().map(cut).find(|vocabulary| self.agrees(vocabulary));
        found.ok_or_else(|| self.no_gguf(DISAGREES))
    }

    /// `vocabulary`, which is that of the GGUF file that this tokenizer was read from, with what was added to it since,
    /// for a model of `vocab_size` tokens.
    pub fn extend_gguf(&self, mut vocabulary: GgufVocabulary, vocab_size: usize) -> GgufVocabulary {
        let GgufVocabulary { tokens, token_types, scores, .. } = &mut vocabulary;
        token_types.resize(tokens.len(), NORMAL);
        let added = self.added.iter().next_back().map_or(0, |(id, _)| *id as usize + 1);
        for id in tokens.len()..vocab_size.max(added) {
            tokens.push(format!("[PAD{id}]"));
            token_types.push(UNUSED);
        }
        if !scores.is_empty() {
            let least = scores.iter().copied().fold(0.0, f32::min);
            scores.resize(tokens.len(), least);
        }
        let special = self.control_tokens();
        for (&id, content) in &self.added {
            if let (Some(token), Some(kind)) = (tokens.get_mut(id as usize), token_types.get_mut(id as usize))
            {
                token.clone_from(content);
                *kind = if special.contains_key(&id) { CONTROL } else { USER_DEFINED };
            }
        }
        vocabulary
    }

    /// All but how text is cut and merged.
    fn vocabulary(&self, json: &Value, vocab_size: usize) -> Result<GgufVocabulary, DataError> {
        let id = |value: &Value| value.as_u64().and_then(|id| usize::try_from(id).ok());
        let mut tokens: Vec<String> = (0..vocab_size).map(|id| format!("[PAD{id}]")).collect();
        let mut token_types = vec![UNUSED; vocab_size];
        let mut set = |id: Option<usize>, token: &str, kind: i32| {
            let place = id.and_then(|id| Some((tokens.get_mut(id)?, token_types.get_mut(id)?)));
            let Some((spelling, type_of)) = place else {
                return Err(
                    self.no_gguf(&format!("{token:?} has no place among the model's {vocab_size} tokens"))
                );
            };
            token.clone_into(spelling);
            *type_of = kind;
            Ok(())
        };
        let model = &json["model"];
        let (bytes, unknown) = (model["byte_fallback"] == true, model["unk_token"].as_str());
        for (token, number) in model["vocab"].as_object().into_iter().flatten() {
            let kind = match token.as_str() {
                token if bytes && Some(token) == unknown => UNKNOWN,
                token if bytes && is_byte(token) => BYTE,
                _ => NORMAL,
            };
            set(id(number), token, kind)?;
        }
        for added in json["added_tokens"].as_array().into_iter().flatten() {
            let token = added["content"].as_str().unwrap_or_default();
            let kind = match added["special"] == true {
                true if bytes && Some(token) == unknown => UNKNOWN,
                true => CONTROL,
                false => USER_DEFINED,
            };
            set(id(&added["id"]), token, kind)?;
        }
        let named = |key: &str| self.token_id(token_name(self.config.get(key)?)?);
        Ok(GgufVocabulary {
            tokens,
            token_types,
            bos: self.bos.or_else(|| named("bos_token")),
            eos: Some(self.eos()),
            unknown: named("unk_token"),
            padding: named("pad_token"),
            add_bos: Some(self.bos.is_some()),
            chat_template: self.chat_template().map(str::to_owned),
            ..GgufVocabulary::default()
        })
    }

    /// Whether a tokenizer of this vocabulary makes of awkward texts what this one does.
    fn agrees(&self, vocabulary: &GgufVocabulary) -> bool {
        let Ok(other) = Self::from_gguf(vocabulary) else { return false };
        let same = |text: &&str| match (self.encode(text), other.encode(text)) {
            (Ok(ours), Ok(theirs)) => ours == theirs,
            _ => false,
        };
        self.bos == other.bos && self.eos() == other.eos() && AWKWARD.iter().all(same)
    }

    fn no_gguf(&self, why: &str) -> DataError {
        let message = format!(
            "cannot be written into a GGUF file: {why}; give a GGUF file of the same model as the base, whose tokenizer is \
             copied, or merge to safetensors"
        );
        DataError::Tokenizer { place: format!("of {} tokens", self.vocab_size()), message }
    }
}

const DISAGREES: &str = "it cuts text in none of the ways that have a name there";

/// `<0x0A>` and the like.
fn is_byte(token: &str) -> bool {
    let hex = token.strip_prefix("<0x").and_then(|rest| rest.strip_suffix('>'));
    hex.is_some_and(|hex| hex.len() == 2 && u8::from_str_radix(hex, 16).is_ok())
}

/// Best first; a pair, or a line of two.
fn merges(model: &Value) -> Vec<(String, String)> {
    let pair = |merge: &Value| match merge {
        Value::String(line) => line.split_once(' ').map(|(l, r)| (l.to_owned(), r.to_owned())),
        pair => Some((pair.get(0)?.as_str()?.to_owned(), pair.get(1)?.as_str()?.to_owned())),
    };
    model["merges"].as_array().into_iter().flatten().filter_map(pair).collect()
}

/// `SentencePiece`'s scores, which order the merges by their result: the place of the first merge that gives a token,
/// and behind all of those what no merge gives.
fn scores(tokens: &[String], merges: &[(String, String)]) -> Vec<f32> {
    let mut places: HashMap<String, usize> = HashMap::with_capacity(merges.len());
    for (place, (left, right)) in merges.iter().enumerate() {
        places.entry(format!("{left}{right}")).or_insert(place);
    }
    let place = |token: &String| places.get(token).copied().unwrap_or(merges.len());
    tokens.iter().map(|token| -(place(token) as f32)).collect()
}

#[cfg(test)]
mod tests {
    use super::super::tests::tiny;
    use super::*;

    #[test]
    fn every_kind_of_tokenizer_is_described_so_that_it_comes_back() {
        for name in ["smollm", "gpt2", "llama3", "qwen2", "sentence_piece", "sentence_piece_gemma"] {
            let (vocabulary, cases) = tiny(name);
            let tokenizer = TextTokenizer::from_gguf(&vocabulary).unwrap();
            let size = vocabulary.tokens.len();
            let found = tokenizer.to_gguf(size + 3).unwrap();
            assert_eq!(found.tokens[..size], vocabulary.tokens, "{name}");
            assert_eq!(found.tokens[size], format!("[PAD{size}]"));
            assert_eq!(found.token_types[size..], [UNUSED; 3]);
            assert_eq!(
                (found.bos, found.eos),
                (tokenizer.bos().or(found.bos), Some(tokenizer.eos())),
                "{name}"
            );
            let back = TextTokenizer::from_gguf(&found).unwrap();
            for (text, ids) in cases {
                assert_eq!(back.encode(&text).unwrap(), ids, "{name}: {text:?}");
            }
            let refused = tokenizer.to_gguf(size - 1).unwrap_err().to_string();
            assert!(refused.contains("has no place"), "{refused}");
        }
    }

    #[test]
    fn the_way_of_cutting_is_found_by_what_it_does() {
        for (name, pre) in [("smollm", "smollm"), ("llama3", "llama-bpe"), ("qwen2", "qwen2")] {
            let tokenizer = TextTokenizer::from_gguf(&tiny(name).0).unwrap();
            let found = tokenizer.to_gguf(tokenizer.vocab_size()).unwrap();
            assert_eq!(found.pre.as_deref(), Some(pre));
        }
    }
}
