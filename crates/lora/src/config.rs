use std::collections::BTreeSet;
use std::fmt;

use serde::{Deserialize, Serialize};

use crate::patterns::{expression, matches, whole_name};
use crate::{InitLoraWeights, LoftQConfig, LoraError, ModuleShape, Patterns, TrainedBiases};

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
    /// Names of the linear layers to adapt, such as `["q_proj", "v_proj"]`; a regular expression that their whole
    /// names match; or "all-linear".
    pub target_modules: TargetModules,
    /// Scale by alpha / sqrt(rank) instead (rank-stabilized `LoRA`, Kalajdzievski 2023).
    pub rslora: bool,
    /// Train how long the rows of an adapted weight are apart from where they point
    /// (`DoRA`, Liu et al. 2024).
    pub use_dora: bool,
    /// What A and B hold before the first step.
    pub init_lora_weights: InitLoraWeights,
    /// Rank of what is fixed beside the adapter and gives a quantized base back what it has lost, as `QERA` finds it.
    pub restore_rank: usize,
    /// Set where the adapter belongs to a quantized base.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub loftq_config: Option<LoftQConfig>,
    /// Other ranks for some modules.
    pub rank_pattern: Patterns<usize>,
    /// Other alphas for some modules.
    pub alpha_pattern: Patterns<f64>,
    /// Numbers of the layers to adapt. Empty: all.
    pub layers_to_transform: Vec<usize>,
    /// Modules that are left as they are though `target_modules` names them: names, or a regular expression.
    pub exclude_modules: ModuleNames,
    /// Modules that are trained whole, in float32: "`embed_tokens`", "`lm_head`".
    pub modules_to_save: Vec<String>,
    /// Where embeddings and head are one weight, train them as one. Not, as PEFT by default: as copies that
    /// part.
    pub ensure_weight_tying: bool,
    /// Which biases are trained: "none", "`lora_only`" or "all".
    pub bias: TrainedBiases,
}

impl Default for LoraConfig {
    fn default() -> Self {
        Self {
            rank: 8,
            alpha: 16.0,
            dropout: 0.0,
            target_modules: TargetModules::Names(vec!["q_proj".into(), "v_proj".into()]),
            rslora: false,
            use_dora: false,
            init_lora_weights: InitLoraWeights::Default,
            restore_rank: 0,
            loftq_config: None,
            rank_pattern: Patterns::default(),
            alpha_pattern: Patterns::default(),
            layers_to_transform: Vec::new(),
            exclude_modules: ModuleNames::default(),
            modules_to_save: Vec::new(),
            ensure_weight_tying: true,
            bias: TrainedBiases::None,
        }
    }
}

impl LoraConfig {
    /// The rank of the module called `name`.
    pub fn rank_of(&self, name: &str) -> usize {
        self.rank_pattern.get(name).copied().unwrap_or(self.rank)
    }

    /// The factor in front of the update of the module called `name`.
    pub fn scale_of(&self, name: &str) -> f64 {
        let alpha = self.alpha_pattern.get(name).copied().unwrap_or(self.alpha);
        alpha / self.divisor(self.rank_of(name))
    }

    /// What alpha is divided by at `rank`.
    pub(crate) fn divisor(&self, rank: usize) -> f64 {
        let rank = rank as f64;
        if self.rslora { rank.sqrt() } else { rank }
    }

    /// Whether something of the adapter brings back what quantizing the base has taken away.
    pub fn restores(&self) -> bool {
        self.restore_rank > 0
            || matches!(self.init_lora_weights, InitLoraWeights::LoftQ | InitLoraWeights::Qera)
    }

    /// Whether that is found over inputs that the base's layers have.
    pub fn looks_at_inputs(&self) -> bool {
        self.restore_rank > 0 || self.init_lora_weights == InitLoraWeights::Qera
    }

    /// Rank of what is fixed beside the adapter's pair on the module.
    pub fn fixed_rank_of(&self, module: &ModuleShape) -> usize {
        if self.init_lora_weights.keeps_start() {
            return self.rank_of(&module.name);
        }
        self.restore_rank.min(module.in_features).min(module.out_features)
    }

    /// The modules that get an adapter. Whatever matches nothing is an error that lists what there is.
    pub fn select<'m>(&self, modules: &'m [ModuleShape]) -> Result<Vec<&'m ModuleShape>, LoraError> {
        let linear: Vec<&ModuleShape> = modules.iter().filter(|module| !module.is_vocabulary()).collect();
        let mut chosen = self.target_modules.select(&linear)?;
        let layers: BTreeSet<usize> = modules.iter().filter_map(|m| layer_of(&m.name)).collect();
        if let Some(absent) = self.layers_to_transform.iter().find(|layer| !layers.contains(layer)) {
            return Err(LoraError::Config {
                knob: "layers_to_transform",
                expected: format!("numbers from 0 to below {}", layers.last().map_or(0, |last| last + 1)),
                found: absent.to_string(),
            });
        }
        let in_layers = |m: &ModuleShape| {
            self.layers_to_transform.is_empty()
                || layer_of(&m.name).is_some_and(|layer| self.layers_to_transform.contains(&layer))
        };
        chosen.retain(|m| in_layers(m) && !self.exclude_modules.names(m));
        if chosen.is_empty() {
            let found = self.exclude_modules.to_string();
            return Err(LoraError::Config {
                knob: "exclude_modules",
                expected: "a module left".into(),
                found,
            });
        }
        if self.use_dora {
            let parts = chosen.iter().copied().filter(|m| m.part_of.is_some());
            let found = short_names(parts).join(", ");
            if !found.is_empty() {
                let whole = linear.iter().copied().filter(|m| m.part_of.is_none());
                let packed = short_names(whole).join(", ");
                let expected = format!("target_modules that are layers of the base themselves ({packed})");
                return Err(LoraError::Config { knob: "use_dora", expected, found });
            }
        }
        Ok(chosen)
    }

    /// Refuses keys of patterns that match none of the modules in `chosen`: typos.
    pub(crate) fn check_patterns(&self, chosen: &[&ModuleShape]) -> Result<(), LoraError> {
        let keys = |knob| move |key: &str| (knob, key.to_owned());
        let ranks = self.rank_pattern.iter().map(|(key, _)| key).map(keys("rank_pattern"));
        let alphas = self.alpha_pattern.iter().map(|(key, _)| key).map(keys("alpha_pattern"));
        for (knob, found) in ranks.chain(alphas) {
            if !chosen.iter().any(|m| matches(&found, &m.name)) {
                let expected =
                    format!("names of adapted layers: {}", short_names(chosen.iter().copied()).join(", "));
                return Err(LoraError::Config { knob, expected, found });
            }
        }
        Ok(())
    }

    /// Refuses values that cannot train, by name.
    pub fn validate(&self) -> Result<(), LoraError> {
        let refuse = |knob, expected: &str, found: String| {
            Err(LoraError::Config { knob, expected: expected.into(), found })
        };
        let positive = |alpha: f64| alpha.is_finite() && alpha > 0.0;
        if self.rank == 0 {
            return refuse("rank", "a whole number from 1", self.rank.to_string());
        }
        if !positive(self.alpha) {
            return refuse("alpha", "a number above 0", self.alpha.to_string());
        }
        if !(0.0..1.0).contains(&self.dropout) {
            return refuse("dropout", "a number from 0 to below 1", self.dropout.to_string());
        }
        if self.use_dora && self.init_lora_weights.keeps_start() {
            let found = format!("true with init_lora_weights = \"{}\"", self.init_lora_weights);
            return refuse("use_dora", "false where the factors start from the base's own weight", found);
        }
        if self.restore_rank > 0 && self.use_dora {
            let found = format!("{} with use_dora", self.restore_rank);
            return refuse(
                "restore_rank",
                "0 beside use_dora, whose norms are those of the whole update",
                found,
            );
        }
        if self.restore_rank > 0 && !self.init_lora_weights.starts_from_zero() {
            let found = format!("\"{}\" with restore_rank = {}", self.init_lora_weights, self.restore_rank);
            return refuse("init_lora_weights", "\"default\" or \"gaussian\" beside restore_rank", found);
        }
        match &self.loftq_config {
            Some(LoftQConfig { loftq_bits, .. }) if ![4, 8].contains(loftq_bits) => {
                return refuse("loftq_config.loftq_bits", "4 (nf4) or 8 (int8)", loftq_bits.to_string());
            }
            Some(LoftQConfig { loftq_iter, .. }) if *loftq_iter != 1 => {
                let expected = "1: the base is quantized once, for every run over it";
                return refuse("loftq_config.loftq_iter", expected, loftq_iter.to_string());
            }
            _ => {}
        }
        if let Some((key, rank)) = self.rank_pattern.iter().find(|(_, rank)| **rank == 0) {
            return refuse("rank_pattern", "whole numbers from 1", format!("{rank} for {key}"));
        }
        if let Some((key, alpha)) = self.alpha_pattern.iter().find(|(_, alpha)| !positive(**alpha)) {
            return refuse("alpha_pattern", "numbers above 0", format!("{alpha} for {key}"));
        }
        let targets = match &self.target_modules {
            TargetModules::Pattern(pattern) => Some(("target_modules", pattern)),
            _ => None,
        };
        let excluded = match &self.exclude_modules {
            ModuleNames::Pattern(pattern) => Some(("exclude_modules", pattern)),
            ModuleNames::Names(_) => None,
        };
        for (knob, pattern) in targets.into_iter().chain(excluded) {
            if let Err(error) = whole_name(pattern) {
                let expected = "names, or a regular expression without look-around and back-references";
                return refuse(knob, expected, format!("{pattern} ({error})"));
            }
        }
        if targets.is_some() && !self.layers_to_transform.is_empty() {
            let found = format!("{:?} beside a regular expression", self.layers_to_transform);
            return refuse("layers_to_transform", "target_modules as a list of names, as PEFT does", found);
        }
        let ranks = self.rank_pattern.iter().map(|(key, _)| ("rank_pattern", key));
        let alphas = self.alpha_pattern.iter().map(|(key, _)| ("alpha_pattern", key));
        match ranks.chain(alphas).find(|(_, key)| expression(key).is_err()) {
            Some((knob, key)) => refuse(knob, "names, or regular expressions of them", key.into()),
            None => Ok(()),
        }
    }
}

/// The number of the layer that a module belongs to.
fn layer_of(module: &str) -> Option<usize> {
    module.split('.').find_map(|part| part.parse().ok())
}

impl ModuleShape {
    /// Whether `name` is its whole name, or the end of it after a dot.
    pub(crate) fn is_named(&self, name: &str) -> bool {
        self.name == name || self.name.strip_suffix(name).is_some_and(|head| head.ends_with('.'))
    }
}

/// The linear layers that get an adapter.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(untagged, expecting = "expected a list of module names, a regular expression, or \"all-linear\"")]
pub enum TargetModules {
    /// Last parts of module names (`q_proj`) or whole names, matched as PEFT matches a list.
    Names(Vec<String>),
    /// "all-linear": every linear layer of the decoder's blocks, packed ones as they are.
    Word(AllLinear),
    /// A regular expression that a layer's whole name matches.
    Pattern(String),
}

/// The one word that stands for a list.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum AllLinear {
    /// Every linear layer of the decoder's blocks.
    #[serde(rename = "all-linear")]
    AllLinear,
}

/// Names of modules, as PEFT matches them.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(untagged, expecting = "expected a list of module names, or a regular expression")]
pub enum ModuleNames {
    /// Last parts of module names (`q_proj`) or whole names.
    Names(Vec<String>),
    /// A regular expression that a module's whole name matches.
    Pattern(String),
}

impl Default for ModuleNames {
    fn default() -> Self {
        Self::Names(Vec::new())
    }
}

impl fmt::Display for ModuleNames {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Names(names) => f.write_str(&names.join(", ")),
            Self::Pattern(pattern) => f.write_str(pattern),
        }
    }
}

impl ModuleNames {
    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        matches!(self, Self::Names(names) if names.is_empty())
    }

    /// Whether the module is among them. An expression that is none stands for no module.
    fn names(&self, module: &ModuleShape) -> bool {
        match self {
            Self::Names(names) => names.iter().any(|name| module.is_named(name)),
            Self::Pattern(pattern) => is_wholly(module, pattern),
        }
    }
}

/// Whether the module's whole name matches `pattern`. An expression that is none stands for no module.
fn is_wholly(module: &ModuleShape, pattern: &str) -> bool {
    whole_name(pattern).is_ok_and(|pattern| pattern.is_match(&module.name))
}

impl TargetModules {
    /// Whether they are told otherwise than by the last parts of names.
    pub(crate) fn are_whole_names(&self) -> bool {
        match self {
            Self::Names(names) => names.iter().any(|name| name.contains('.')),
            Self::Word(_) => false,
            Self::Pattern(_) => true,
        }
    }

    /// The chosen ones among `modules`. A name that matches nothing is an error that lists
    /// the names there are.
    pub fn select<'m>(&self, modules: &[&'m ModuleShape]) -> Result<Vec<&'m ModuleShape>, LoraError> {
        let all = || modules.iter().copied();
        let whole = || all().filter(|module| module.part_of.is_none());
        let (chosen, unmatched): (Vec<&ModuleShape>, Vec<&str>) = match self {
            Self::Word(AllLinear::AllLinear) => (whole().collect(), Vec::new()),
            Self::Names(names) => {
                let unmatched = names.iter().filter(|name| !all().any(|m| m.is_named(name)));
                let chosen = all().filter(|m| names.iter().any(|name| m.is_named(name)));
                (chosen.collect(), unmatched.map(String::as_str).collect())
            }
            // PEFT knows a packed layer's parts by no name; an expression means them only where it means no layer.
            Self::Pattern(pattern) => {
                let mut chosen: Vec<&ModuleShape> = whole().filter(|m| is_wholly(m, pattern)).collect();
                if chosen.is_empty() {
                    chosen = all().filter(|m| is_wholly(m, pattern)).collect();
                }
                let unmatched = if chosen.is_empty() { vec![pattern.as_str()] } else { Vec::new() };
                (chosen, unmatched)
            }
        };
        if chosen.is_empty() || !unmatched.is_empty() {
            return Err(LoraError::NoSuchTarget {
                targets: unmatched.join(", "),
                available: short_names(all()).join(", "),
            });
        }
        Ok(chosen)
    }

    /// As `adapter_config.json` has them; "all-linear" spelled out.
    #[must_use]
    pub fn spelled_out(&self, modules: &[&ModuleShape]) -> Self {
        match self {
            Self::Word(AllLinear::AllLinear) => Self::Names(short_names(modules.iter().copied())),
            named => named.clone(),
        }
    }
}

/// The last part of a module's name, such as `q_proj`.
pub(crate) fn short_name(module: &str) -> &str {
    module.rsplit('.').next().unwrap_or(module)
}

/// The last parts of the modules' names, each once, sorted.
pub(crate) fn short_names<'m>(modules: impl IntoIterator<Item = &'m ModuleShape>) -> Vec<String> {
    let short = modules.into_iter().map(|m| short_name(&m.name).to_owned());
    short.collect::<BTreeSet<_>>().into_iter().collect()
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
        let all: Vec<&ModuleShape> = all.iter().collect();
        let names = |list: &[&str]| TargetModules::Names(list.iter().map(|&s| s.into()).collect());
        assert_eq!(names(&["q_proj"]).select(&all).unwrap().len(), 1);
        assert_eq!(names(&["mlp.up_proj"]).select(&all).unwrap().len(), 1);
        let error = names(&["proj", "v_proj"]).select(&all).unwrap_err().to_string();
        assert!(error.contains("proj, v_proj") && error.contains("q_proj, up_proj"), "{error}");
        assert!(names(&[]).select(&all).is_err());
    }

    #[test]
    fn a_string_is_all_linear_or_an_expression_of_whole_names() {
        let parsed = |text: &str| serde_json::from_value::<TargetModules>(text.into()).unwrap();
        let all = modules();
        let all: Vec<&ModuleShape> = all.iter().collect();
        let count =
            |text: &str| parsed(text).select(&all).map(|chosen| chosen.len()).map_err(|e| e.to_string());
        assert_eq!(parsed("all-linear"), TargetModules::Word(AllLinear::AllLinear));
        assert_eq!(count("all-linear"), Ok(2));
        assert_eq!(count(r".*\.(q|up)_proj"), Ok(2));
        assert_eq!(count(r".*layers\.0\.self_attn.*"), Ok(1));
        for nothing in ["q_proj", "all-linears", "model"] {
            let error = count(nothing).unwrap_err();
            assert!(error.contains(&format!("[{nothing}] matches no linear layer")), "{error}");
        }
        let config = LoraConfig { target_modules: parsed(".*(?=_proj)"), ..LoraConfig::default() };
        assert!(config.validate().unwrap_err().to_string().contains("without look-around"));
        let layers = LoraConfig { target_modules: parsed(".*"), layers_to_transform: vec![0], ..config };
        assert!(layers.validate().unwrap_err().to_string().contains("beside a regular expression"));
    }
}
