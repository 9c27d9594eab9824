//! What the linear layers of a base read.

use burn::tensor::{Device, Tensor};
use pronk_kernels::Precision;
use pronk_lora::{ForwardMode, LayerInputs};

use crate::{Base, Decoder, Layout, LoadConfig, ModelError, Residency};

/// About how many tokens run at a time.
pub(crate) const BATCH_TOKENS: usize = 2048;

/// A base that runs over some records, block by block, and the products of its layers' inputs. One block of it is in
/// memory.
pub(crate) struct Calibration {
    decoder: Decoder,
    batches: Vec<(Tensor<2>, Layout)>,
    /// The block that is next.
    layer: usize,
    /// Of the block before: layers that read the same X, and its `X^T X`.
    inputs: Vec<(Vec<String>, Tensor<2>)>,
}

impl Calibration {
    /// Before the first block. `records` are token ids.
    pub fn of(base: &Base, records: &[Vec<u32>], device: &Device) -> Result<Self, ModelError> {
        let config = LoadConfig { precision: Precision::fastest(), weights: Residency::Streamed };
        let decoder = Decoder::load(base, device, config, |_, _| ())?;
        // Tokens that were added have no embedding of the base's own.
        let known = |record: &Vec<u32>| {
            record.iter().copied().filter(|&id| (id as usize) < base.config.vocab_size).collect()
        };
        let records: Vec<Vec<u32>> = records.iter().map(known).collect();
        let batches = batches(&records).map(|records| batch(&decoder, records)).collect();
        Ok(Self { decoder, batches, layer: 0, inputs: Vec::new() })
    }

    /// `X^T X`, `[in, in]`, of all inputs X of `layer`. Nothing where a layer is asked for after one of a later block.
    pub fn inputs_of(&mut self, layer: &str) -> Option<&Tensor<2>> {
        let reads = |layers: &[String]| layers.iter().any(|name| name == layer);
        while !self.inputs.iter().any(|(layers, _)| reads(layers)) && self.layer < self.decoder.layers() {
            self.run_block();
        }
        self.inputs.iter().find(|(layers, _)| reads(layers)).map(|(_, products)| products)
    }

    fn run_block(&mut self) {
        self.inputs.clear();
        let read = LayerInputs::default();
        let mode = ForwardMode { inputs: Some(&read), ..ForwardMode::inference(None) };
        for (_, block) in self.decoder.visit(self.layer..=self.layer) {
            for (x, layout) in &mut self.batches {
                *x = block.forward(x.clone(), layout, mode, None);
                let read = read.take();
                let squares = block.readers().map(|layers| {
                    let x = &read[&layers[0]];
                    x.clone().transpose().matmul(x.clone())
                });
                if self.inputs.is_empty() {
                    self.inputs = block.readers().into_iter().zip(squares).collect();
                } else {
                    for ((_, sum), squares) in self.inputs.iter_mut().zip(squares) {
                        *sum = sum.clone() + squares;
                    }
                }
            }
        }
        self.layer += 1;
    }
}

/// Records by so many tokens as run at a time, or one that has more.
fn batches(records: &[Vec<u32>]) -> impl Iterator<Item = &[Vec<u32>]> {
    let mut tokens = 0;
    records.chunk_by(move |before, after| {
        tokens += before.len();
        let together = tokens + after.len() <= BATCH_TOKENS;
        tokens *= usize::from(together);
        together
    })
}

/// The embeddings of records that lie one after another.
fn batch(decoder: &Decoder, records: &[Vec<u32>]) -> (Tensor<2>, Layout) {
    let ends = records.iter().scan(0, |end, record| {
        *end += record.len();
        Some(*end)
    });
    let documents: Vec<_> = ends.zip(records).map(|(end, record)| end - record.len()..end).collect();
    let positions: Vec<u32> = records.iter().flat_map(|record| 0..record.len() as u32).collect();
    (decoder.embed(&records.concat(), None), decoder.layout(&positions, &documents))
}
