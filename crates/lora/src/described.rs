//! A configuration for pairs that came about otherwise than by one.

use std::collections::BTreeMap;

use crate::config::short_name;
use crate::{Adapter, LoraConfig, LoraPair, ModuleNames, Patterns, TargetModules};

impl Adapter {
    /// An adapter of these pairs, with `config` changed to tell their ranks and scales, and what they
    /// sit on by whole names where the last parts would choose other modules too.
    pub fn of_pairs(config: &LoraConfig, pairs: BTreeMap<String, LoraPair>) -> Self {
        let ranks: BTreeMap<&str, usize> = pairs.iter().map(|(name, p)| (name.as_str(), p.rank())).collect();
        let alpha = |pair: &LoraPair| whole(pair.scale * config.divisor(pair.rank()));
        let alphas: BTreeMap<&str, f64> = pairs.iter().map(|(name, p)| (name.as_str(), alpha(p))).collect();
        let (rank, rank_pattern) = told(&ranks, config.rank);
        let (alpha, alpha_pattern) = told(&alphas, config.alpha);
        let by_whole_names = config.target_modules.are_whole_names() || !config.exclude_modules.is_empty();
        let named = |name: &String| if by_whole_names { name.clone() } else { short_name(name).to_owned() };
        let mut names: Vec<String> = pairs.keys().map(named).collect();
        names.sort();
        names.dedup();
        let config = LoraConfig {
            rank,
            alpha,
            rank_pattern,
            alpha_pattern,
            use_dora: pairs.values().any(|pair| pair.magnitude.is_some()),
            target_modules: TargetModules::Names(names),
            layers_to_transform: if by_whole_names { Vec::new() } else { config.layers_to_transform.clone() },
            exclude_modules: ModuleNames::default(),
            ..config.clone()
        };
        Self { config, pairs, whole: BTreeMap::new() }
    }

    /// The same with other pairs; what is trained whole stays.
    pub(crate) fn with_pairs(&self, config: &LoraConfig, pairs: BTreeMap<String, LoraPair>) -> Self {
        Self { whole: self.whole.clone(), ..Self::of_pairs(config, pairs) }
    }
}

/// `alpha`, where it is off a whole number by rounding alone, as that.
fn whole(alpha: f64) -> f64 {
    if (alpha - alpha.round()).abs() < 1e-9 * alpha.abs() { alpha.round() } else { alpha }
}

/// The value that most modules have, and a pattern for the others. No two keys match one module, as
/// readers sort them: where the modules of a last part differ, they stand by their whole names.
fn told<V: Copy + PartialEq>(values: &BTreeMap<&str, V>, default: V) -> (V, Patterns<V>) {
    let count = |value: V| values.values().filter(|other| **other == value).count();
    let most = values.values().copied().max_by_key(|value| count(*value)).unwrap_or(default);
    let mut by_part: BTreeMap<&str, Vec<(&str, V)>> = BTreeMap::new();
    for (name, value) in values {
        by_part.entry(short_name(name)).or_default().push((name, *value));
    }
    let mut pattern = Vec::new();
    for (part, modules) in by_part {
        match modules.first() {
            Some(&(_, first)) if modules.iter().all(|(_, value)| *value == first) => {
                pattern.extend((first != most).then(|| (part.to_owned(), first)));
            }
            _ => {
                let others = modules.iter().filter(|(_, value)| *value != most);
                pattern.extend(others.map(|(name, value)| ((*name).to_owned(), *value)));
            }
        }
    }
    (most, pattern.into_iter().collect())
}
