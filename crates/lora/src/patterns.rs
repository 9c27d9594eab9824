use std::fmt;
use std::marker::PhantomData;

use regex::Regex;
use serde::de::{MapAccess, Visitor};
use serde::{Deserialize, Deserializer, Serialize, Serializer};

/// Values for some modules, as PEFT's `rank_pattern` and `alpha_pattern` give them: a module has the
/// value of the first key that its name, or an end of it after a dot, matches as a regular expression.
#[derive(Debug, Clone, PartialEq)]
pub struct Patterns<V>(Vec<(String, V)>);

impl<V> Patterns<V> {
    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// Keys and values, in their order.
    pub fn iter(&self) -> impl Iterator<Item = (&str, &V)> {
        self.0.iter().map(|(key, value)| (key.as_str(), value))
    }

    /// The value for the module called `name`.
    pub fn get(&self, name: &str) -> Option<&V> {
        self.0.iter().find(|(key, _)| matches(key, name)).map(|(_, value)| value)
    }
}

impl<V> Default for Patterns<V> {
    fn default() -> Self {
        Self(Vec::new())
    }
}

impl<V> FromIterator<(String, V)> for Patterns<V> {
    fn from_iter<I: IntoIterator<Item = (String, V)>>(pairs: I) -> Self {
        Self(pairs.into_iter().collect())
    }
}

/// Whether `key` stands for the module called `name`. One that is no regular expression stands for none.
pub fn matches(key: &str, name: &str) -> bool {
    expression(key).is_ok_and(|expression| expression.is_match(name))
}

/// What `pattern` means where it stands for whole names, as in PEFT's `target_modules`.
pub fn whole_name(pattern: &str) -> Result<Regex, regex::Error> {
    Regex::new(&format!("^(?:{pattern})$"))
}

/// What `key` means.
pub fn expression(key: &str) -> Result<Regex, regex::Error> {
    Regex::new(&format!(r"^(?:.*\.)?(?:{key})$"))
}

impl<V: Serialize> Serialize for Patterns<V> {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_map(self.iter())
    }
}

impl<'de, V: Deserialize<'de>> Deserialize<'de> for Patterns<V> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_map(InOrder(PhantomData))
    }
}

/// Reads a map without sorting it: the first key wins.
struct InOrder<V>(PhantomData<V>);

impl<'de, V: Deserialize<'de>> Visitor<'de> for InOrder<V> {
    type Value = Patterns<V>;

    fn expecting(&self, f: &mut fmt::Formatter) -> fmt::Result {
        f.write_str("a table of module names and values")
    }

    fn visit_map<M: MapAccess<'de>>(self, mut map: M) -> Result<Self::Value, M::Error> {
        std::iter::from_fn(|| map.next_entry().transpose()).collect::<Result<_, _>>()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_key_that_matches_wins() {
        let text = r#"{"layers.1.*q_proj": 2, "q_proj": 4, "self_attn.o_proj": 8, "^model.*v_proj": 16}"#;
        let ranks: Patterns<usize> = serde_json::from_str(text).unwrap();
        let rank = |name: &str| ranks.get(&format!("model.layers.{name}")).copied();
        assert_eq!(rank("1.self_attn.q_proj"), Some(2));
        assert_eq!(rank("0.self_attn.q_proj"), Some(4));
        assert_eq!(rank("0.self_attn.o_proj"), Some(8));
        assert_eq!(rank("0.self_attn.v_proj"), Some(16));
        assert_eq!(rank("0.self_attn.qq_proj"), None, "an end begins after a dot");
        assert_eq!(serde_json::to_string(&ranks).unwrap().replace([' ', '\n'], ""), text.replace(' ', ""));
    }
}
