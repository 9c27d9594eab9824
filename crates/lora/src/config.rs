use serde::{Deserialize, Serialize};

use crate::{LoraError, ModuleShape};

/// What to adapt, and how strongly. The names are PEFT's, `rank` and `alpha` the recipes'.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct LoraConfig {
    /// Rank r of the update. 8 to 16 is enough for tone and format, 32 to 64 for new skills.
    pub rank: usize,
    /// The update is scaled by alpha / rank. Twice the rank is a common choice.
    pub alpha: f64,
    /// Share of an adapted layer's inputs set to zero while training, 0 to below 1.
    pub dropout: f64,
    /// Names of the linear layers to adapt, such as `["q_proj", "v_proj"]`, or "all-linear".
    pub target_modules: TargetModules,
    /// Scale by alpha / sqrt(rank) instead (rank-stabilized `LoRA`, Kalajdzievski 2023).
    pub rslora: bool,
}

impl Default for LoraConfig {
    fn default() -> Self {
        Self {
            rank: 8,
            alpha: 16.0,
            dropout: 0.0,
            target_modules: TargetModules::Names(vec!["q_proj".into(), "v_proj".into()]),
            rslora: false,
        }
    }
}

impl LoraConfig {
    /// The factor in front of the update.
    pub fn scale(&self) -> f64 {
        let rank = self.rank as f64;
        self.alpha / if self.rslora { rank.sqrt() } else { rank }
    }

    /// Refuses values that cannot train, by name.
    pub fn validate(&self) -> Result<(), LoraError> {
        let refuse = |knob, expected, found: String| Err(LoraError::Config { knob, expected, found });
        if self.rank == 0 {
            return refuse("rank", "a whole number from 1", self.rank.to_string());
        }
        if !self.alpha.is_finite() || self.alpha <= 0.0 {
            return refuse("alpha", "a number above 0", self.alpha.to_string());
        }
        if !(0.0..1.0).contains(&self.dropout) {
            return refuse("dropout", "a number from 0 to below 1", self.dropout.to_string());
        }
        Ok(())
    }
}

/// The linear layers that get an adapter.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(untagged, expecting = "expected a list of module names or \"all-linear\"")]
pub enum TargetModules {
    /// Last parts of module names (`q_proj`) or whole names, matched as PEFT matches a list.
    Names(Vec<String>),
    /// "all-linear": every linear layer of the decoder's blocks, packed ones as they are.
    Word(AllLinear),
}

/// The one word that stands for a list.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum AllLinear {
    /// Every linear layer of the decoder's blocks.
    #[serde(rename = "all-linear")]
    AllLinear,
}

impl TargetModules {
    /// The chosen ones among `modules`. A name that matches nothing is an error that lists
    /// the names there are.
    pub fn select<'m>(&self, modules: &'m [ModuleShape]) -> Result<Vec<&'m ModuleShape>, LoraError> {
        let names = match self {
            Self::Word(AllLinear::AllLinear) => {
                return Ok(modules.iter().filter(|module| module.part_of.is_none()).collect());
            }
            Self::Names(names) => names,
        };
        let matches = |module: &ModuleShape, name: &String| {
            module.name == *name
                || module.name.strip_suffix(name.as_str()).is_some_and(|head| head.ends_with('.'))
        };
        let unmatched: Vec<&str> =
            names.iter().filter(|n| !modules.iter().any(|m| matches(m, n))).map(String::as_str).collect();
        if names.is_empty() || !unmatched.is_empty() {
            return Err(LoraError::NoSuchTarget {
                targets: unmatched.join(", "),
                available: short_names(modules).join(", "),
            });
        }
        Ok(modules.iter().filter(|m| names.iter().any(|n| matches(m, n))).collect())
    }

    /// The names as `adapter_config.json` lists them; "all-linear" spelled out.
    pub fn spelled_out(&self, modules: &[&ModuleShape]) -> Vec<String> {
        match self {
            Self::Names(names) => names.clone(),
            Self::Word(AllLinear::AllLinear) => short_names(modules.iter().copied()),
        }
    }
}

/// The last parts of the modules' names, each once, sorted.
fn short_names<'m>(modules: impl IntoIterator<Item = &'m ModuleShape>) -> Vec<String> {
    let short = modules.into_iter().filter_map(|m| m.name.rsplit('.').next().map(str::to_owned));
    short.collect::<std::collections::BTreeSet<_>>().into_iter().collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn modules() -> Vec<ModuleShape> {
        ["model.layers.0.self_attn.q_proj", "model.layers.0.mlp.up_proj"]
            .map(|name| ModuleShape::new(name, 4, 4))
            .to_vec()
    }

    #[test]
    fn names_match_as_in_peft() {
        let all = modules();
        let names = |list: &[&str]| TargetModules::Names(list.iter().map(|&s| s.into()).collect());
        assert_eq!(names(&["q_proj"]).select(&all).unwrap().len(), 1);
        assert_eq!(names(&["mlp.up_proj"]).select(&all).unwrap().len(), 1);
        let error = names(&["proj", "v_proj"]).select(&all).unwrap_err().to_string();
        assert!(error.contains("proj, v_proj") && error.contains("q_proj, up_proj"), "{error}");
        assert!(names(&[]).select(&all).is_err());
    }

    #[test]
    fn all_linear_is_a_word_and_nothing_else_is() {
        let parsed: TargetModules = serde_json::from_str("\"all-linear\"").unwrap();
        assert_eq!(parsed.select(&modules()).unwrap().len(), 2);
        assert!(serde_json::from_str::<TargetModules>("\"all-linears\"").is_err());
    }
}
