//! What is trained whole, in the place of the base's own: embeddings and head (`modules_to_save`), and biases.

use std::collections::BTreeMap;

use burn::tensor::Tensor;
use serde::{Deserialize, Serialize};

use crate::{Adapter, LoraConfig, LoraError, ModuleShape, TensorKind, TensorName};

/// The module that gives a token its embedding: its weight is `[vocab, hidden]`.
pub const EMBED_TOKENS: &str = "model.embed_tokens";
/// The output projection, `[vocab, hidden]`.
pub const LM_HEAD: &str = "lm_head";

/// Which biases are trained, by PEFT's names.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum TrainedBiases {
    /// None of them.
    #[default]
    None,
    /// Those of the layers that are adapted.
    LoraOnly,
    /// All that the base has.
    All,
}

impl ModuleShape {
    /// Whether its rows are the vocabulary's: it is trained whole or not at all.
    pub fn is_vocabulary(&self) -> bool {
        [EMBED_TOKENS, LM_HEAD].contains(&self.name.as_str())
    }
}

impl LoraConfig {
    /// The names of what is trained whole, with the shapes that the base has it in.
    pub fn whole(&self, modules: &[ModuleShape]) -> Result<BTreeMap<TensorName, [usize; 2]>, LoraError> {
        let mut whole = self.saved_weights(modules)?;
        let biased: Vec<&ModuleShape> = match self.bias {
            TrainedBiases::None => Vec::new(),
            TrainedBiases::LoraOnly => self.select(modules)?,
            TrainedBiases::All => modules.iter().collect(),
        };
        let biases = biased.into_iter().filter(|module| module.has_bias);
        whole.extend(biases.map(|m| (TensorName::new(&m.name, TensorKind::Bias), [1, m.out_features])));
        Ok(whole)
    }

    /// The weights of `modules_to_save`. A name of nothing that can be trained whole is an error.
    fn saved_weights(&self, modules: &[ModuleShape]) -> Result<BTreeMap<TensorName, [usize; 2]>, LoraError> {
        let mut weights = BTreeMap::new();
        for name in &self.modules_to_save {
            let is_meant = |module: &&ModuleShape| module.is_vocabulary() && module.is_named(name);
            let Some(module) = modules.iter().find(is_meant) else {
                return Err(LoraError::Config {
                    knob: "modules_to_save",
                    expected: "embed_tokens or lm_head; linear layers are trained by target_modules".into(),
                    found: name.clone(),
                });
            };
            let module_name = if self.ties(modules) { EMBED_TOKENS } else { &module.name };
            let shape = [module.out_features, module.in_features];
            weights.insert(TensorName::new(module_name, TensorKind::Weight), shape);
        }
        Ok(weights)
    }

    /// Whether embeddings and head, which are one weight in the base, stay one.
    pub(crate) fn ties(&self, modules: &[ModuleShape]) -> bool {
        self.ensure_weight_tying && modules.iter().any(|module| module.is_tied)
    }

    /// Refuses to train biases where there are none.
    pub(crate) fn check_biases(&self, modules: &[ModuleShape]) -> Result<(), LoraError> {
        let has_any = |whole: BTreeMap<TensorName, _>| whole.keys().any(|name| name.kind == TensorKind::Bias);
        let (expected, found) = match self.bias {
            TrainedBiases::None => return Ok(()),
            TrainedBiases::LoraOnly => ("\"none\": no layer that is adapted has a bias", "\"lora_only\""),
            TrainedBiases::All => ("\"none\": no layer of this base has a bias", "\"all\""),
        };
        if has_any(self.whole(modules)?) {
            return Ok(());
        }
        Err(LoraError::Config { knob: "bias", expected: expected.into(), found: found.into() })
    }
}

impl Adapter {
    /// The embeddings, `[vocab, hidden]`, where they are trained.
    pub fn embeddings(&self) -> Option<&Tensor<2>> {
        self.whole.get(&TensorName::new(EMBED_TOKENS, TensorKind::Weight))
    }

    /// The output projection's weight, `[vocab, hidden]`, where it is trained.
    pub fn head(&self) -> Option<&Tensor<2>> {
        self.whole.get(&self.head_name()?)
    }

    /// Under which name the output projection's weight stands, where it is trained.
    pub fn head_name(&self) -> Option<TensorName> {
        let tied = self.config.ensure_weight_tying.then_some(EMBED_TOKENS);
        let names = [LM_HEAD].into_iter().chain(tied);
        let mut names = names.map(|module| TensorName::new(module, TensorKind::Weight));
        names.find(|name| self.whole.contains_key(name))
    }

    /// The bias of `module`, `[1, out]`, where it is trained.
    pub fn bias(&self, module: &str) -> Option<&Tensor<2>> {
        // Asked by every layer, of adapters that mostly have none.
        if self.config.bias == TrainedBiases::None {
            return None;
        }
        self.whole.get(&TensorName::new(module, TensorKind::Bias))
    }

    /// How many tokens it has embeddings or logits for, where it is not the base that says so.
    pub fn vocab_size(&self) -> Option<usize> {
        self.head().or(self.embeddings()).map(|weight| weight.dims()[0])
    }

    /// Gives embeddings and head a row for each of `vocab_size` tokens: new ones are the mean of the others, as in
    /// transformers' `resize_token_embeddings` but for the noise of a billionth that it adds (Hewitt 2021,
    /// <https://www.cs.columbia.edu/~johnhew/vocab-expansion.html>).
    pub fn grow_vocabulary(&mut self, vocab_size: usize) {
        for (name, weight) in &mut self.whole {
            let [rows, columns] = weight.dims();
            if name.kind == TensorKind::Weight && rows < vocab_size {
                let new = weight.clone().mean_dim(0).expand([vocab_size - rows, columns]);
                *weight = Tensor::cat(vec![weight.clone(), new], 0);
            }
        }
    }
}
