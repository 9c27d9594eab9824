//! Adapters on parts of packed layers, as runtimes need them that know the packed layers alone.

use std::collections::{BTreeMap, BTreeSet};

use burn::tensor::Tensor;

use crate::{Adapter, LoraConfig, LoraPair, ModuleShape, PartOf, TargetModules};

impl Adapter {
    /// The same update on the layers that the base has: the pairs of a packed layer's parts become
    /// one pair, A their factors one below another, B a block for each.
    ///
    /// All pairs get one rank, as the configuration knows only one: the widest, the others filled
    /// up with zeros, and alpha so that the scale stays. Without parts among the pairs, or where
    /// `modules` knows none, the adapter as it is.
    #[must_use]
    pub fn onto_packed(&self, modules: &[ModuleShape]) -> Self {
        let parts: BTreeMap<&str, &PartOf> =
            modules.iter().filter_map(|m| Some((m.name.as_str(), m.part_of.as_ref()?))).collect();
        if !self.pairs.keys().any(|name| parts.contains_key(name.as_str())) {
            return self.clone();
        }
        let rows_of: BTreeMap<&str, usize> = modules
            .iter()
            .filter(|m| m.part_of.is_none())
            .map(|m| (m.name.as_str(), m.out_features))
            .collect();
        // What becomes one pair, with the first row that each of them changes.
        let mut gathered: BTreeMap<&str, Vec<(usize, &LoraPair)>> = BTreeMap::new();
        for (name, pair) in &self.pairs {
            let part = parts.get(name.as_str());
            let (module, first) =
                part.map_or((name.as_str(), 0), |part| (part.module.as_str(), part.rows.start));
            gathered.entry(module).or_default().push((first, pair));
        }
        let ranks = gathered.values().map(Vec::len).max().unwrap_or(1);
        let rank = self.config.rank * ranks;
        let pack = |(module, pairs): (&str, Vec<(usize, &LoraPair)>)| {
            let own = pairs.iter().map(|(_, pair)| pair.b.dims()[0]).max().unwrap_or(0);
            let rows = rows_of.get(module).copied().unwrap_or(own);
            (module.to_owned(), block_pair(&pairs, rows, rank))
        };
        let pairs: BTreeMap<String, LoraPair> = gathered.into_iter().map(pack).collect();
        let short = pairs.keys().map(|name| name.rsplit('.').next().unwrap_or(name).to_owned());
        let targets: BTreeSet<String> = short.collect();
        let wider = ranks as f64;
        let config = LoraConfig {
            rank,
            alpha: self.config.alpha * if self.config.rslora { wider.sqrt() } else { wider },
            target_modules: TargetModules::Names(targets.into_iter().collect()),
            ..self.config.clone()
        };
        Self { config, pairs }
    }
}

/// One pair that changes what all of `pairs` do, each from its first row on.
fn block_pair(pairs: &[(usize, &LoraPair)], rows: usize, rank: usize) -> LoraPair {
    let device = pairs.first().map(|(_, pair)| pair.a.device()).unwrap_or_default();
    let columns = pairs.first().map_or(0, |(_, pair)| pair.a.dims()[1]);
    let mut a = Tensor::<2>::zeros([rank, columns], &device);
    let mut b = Tensor::<2>::zeros([rows, rank], &device);
    let mut used = 0;
    for (first, pair) in pairs {
        let [out, own] = pair.b.dims();
        a = a.slice_assign([used..used + own, 0..columns], pair.a.clone());
        b = b.slice_assign([*first..first + out, used..used + own], pair.b.clone());
        used += own;
    }
    LoraPair { a, b }
}
