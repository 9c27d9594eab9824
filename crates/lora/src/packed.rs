//! Adapters on parts of packed layers, as runtimes need them that know the packed layers alone.

use std::collections::BTreeMap;

use burn::tensor::Tensor;

use crate::{Adapter, LoraPair, ModuleShape, PartOf};

impl Adapter {
    /// The same update on the layers that the base has: the pairs of a packed layer's parts become
    /// one pair, A their factors one below another, B a block for each. Without parts among the pairs,
    /// or where `modules` knows none, the adapter as it is.
    #[must_use]
    pub fn onto_packed(&self, modules: &[ModuleShape]) -> Self {
        let parts: BTreeMap<&str, &PartOf> =
            modules.iter().filter_map(|m| Some((m.name.as_str(), m.part_of.as_ref()?))).collect();
        if !self.pairs.keys().any(|name| parts.contains_key(name.as_str())) {
            return self.clone();
        }
        if self.pairs.values().any(|pair| pair.fixed.is_some()) {
            return self.standalone().onto_packed(modules);
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
        let pack = |(module, pairs): (&str, Vec<(usize, &LoraPair)>)| {
            let own = pairs.iter().map(|(_, pair)| pair.b.dims()[0]).max().unwrap_or(0);
            let rows = rows_of.get(module).copied().unwrap_or(own);
            let packed = match pairs[..] {
                [(_, pair)] if pair.b.dims()[0] == rows => pair.clone(),
                _ => block_pair(&pairs, rows),
            };
            (module.to_owned(), packed)
        };
        self.with_pairs(&self.config, gathered.into_iter().map(pack).collect())
    }
}

/// One pair that changes what all of `pairs` do, each from its first row on. Its scale is that of the
/// first; the others' B are scaled to it.
fn block_pair(pairs: &[(usize, &LoraPair)], rows: usize) -> LoraPair {
    let scale = pairs.first().map_or(1.0, |(_, pair)| pair.scale);
    let device = pairs.first().map(|(_, pair)| pair.a.device()).unwrap_or_default();
    let rank = pairs.iter().map(|(_, pair)| pair.rank()).sum();
    let a = Tensor::cat(pairs.iter().map(|(_, pair)| pair.a.clone()).collect(), 0);
    let mut b = Tensor::<2>::zeros([rows, rank], &device);
    let mut used = 0;
    for (first, pair) in pairs {
        let [out, own] = pair.b.dims();
        let block = if pair.scale.to_bits() == scale.to_bits() {
            pair.b.clone()
        } else {
            pair.b.clone() * (pair.scale / scale)
        };
        b = b.slice_assign([*first..first + out, used..used + own], block);
        used += own;
    }
    LoraPair { a, b, scale, magnitude: None, fixed: None }
}
