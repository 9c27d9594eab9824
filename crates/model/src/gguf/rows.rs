//! The order of the rows of queries and keys. llama.cpp turns neighbouring rows of a head together, Hugging
//! Face rows half a head apart: row `2 i + j` of a head there is row `i + j * head_dim / 2` here.

use super::names::gguf_name;
use crate::DecoderConfig;

impl DecoderConfig {
    /// llama.cpp's name of a tensor of this decoder; `None` where it knows none.
    pub fn gguf_name(&self, name: &str) -> Option<String> {
        gguf_name(name, self.traits())
    }

    /// The numbers of the tensor called `name`, `rows` of them, as llama.cpp has them: queries and keys in its own
    /// order, norms as they multiply.
    pub fn values_to_gguf(&self, name: &str, rows: usize, mut values: Vec<f32>) -> Vec<f32> {
        if self.traits().norms_less_one && name.ends_with("norm.weight") {
            for weight in &mut values {
                *weight += 1.0;
            }
        }
        let module = name.rsplit_once('.').map_or(name, |(module, _)| module);
        self.rows_to_gguf(module, rows, values)
    }

    /// The rows of the module called `module` (a weight's, a bias's, or an adapter's B), as Hugging Face has them,
    /// in the order that a GGUF file has them in.
    pub fn rows_to_gguf(&self, module: &str, rows: usize, values: Vec<f32>) -> Vec<f32> {
        match self.interleaved_heads(module) {
            Some(heads) => halves_to_interleaved(&values, rows, heads),
            None => values,
        }
    }

    /// The same, from a GGUF file's order to Hugging Face's.
    pub fn rows_from_gguf(&self, module: &str, rows: usize, values: Vec<f32>) -> Vec<f32> {
        match self.interleaved_heads(module) {
            Some(heads) => interleaved_to_halves(&values, rows, heads),
            None => values,
        }
    }

    /// Heads of a module whose rows llama.cpp has in another order.
    fn interleaved_heads(&self, module: &str) -> Option<usize> {
        match module.rsplit('.').next() {
            _ if !self.traits().gguf_interleaved => None,
            Some("q_proj") => Some(self.num_attention_heads),
            Some("k_proj") => Some(self.num_key_value_heads),
            _ => None,
        }
    }
}

/// Rows as Hugging Face has them, from llama.cpp's.
pub fn interleaved_to_halves(values: &[f32], rows: usize, heads: usize) -> Vec<f32> {
    moved(values, rows, heads, |within, half_dim| 2 * (within % half_dim) + within / half_dim)
}

/// Rows as llama.cpp has them, from Hugging Face's.
pub fn halves_to_interleaved(values: &[f32], rows: usize, heads: usize) -> Vec<f32> {
    moved(values, rows, heads, |within, half_dim| within / 2 + (within % 2) * half_dim)
}

/// Each row out of the one that `source` gives for its place in a head and half a head's rows. Rows that are no
/// whole number of heads, or heads that have no halves, stay where they are.
fn moved(values: &[f32], rows: usize, heads: usize, source: impl Fn(usize, usize) -> usize) -> Vec<f32> {
    if rows == 0 || heads == 0 || !rows.is_multiple_of(2 * heads) {
        return values.to_vec();
    }
    let (width, head_dim) = (values.len() / rows, rows / heads);
    let source = |row: usize| row - row % head_dim + source(row % head_dim, head_dim / 2);
    (0..rows).flat_map(|row| &values[source(row) * width..][..width]).copied().collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rows_move_from_pairs_to_halves_and_back() {
        // two heads of four rows, one column
        let rows = [0., 1., 2., 3., 10., 11., 12., 13.];
        let halves = interleaved_to_halves(&rows, 8, 2);
        assert_eq!(halves, [0., 2., 1., 3., 10., 12., 11., 13.]);
        assert_eq!(halves_to_interleaved(&halves, 8, 2), rows);
        // one head of six rows, two columns
        let wide: Vec<f32> = (0..12u8).map(f32::from).collect();
        assert_eq!(halves_to_interleaved(&wide, 6, 1), [0., 1., 6., 7., 2., 3., 8., 9., 4., 5., 10., 11.]);
        assert_eq!(interleaved_to_halves(&halves_to_interleaved(&wide, 6, 1), 6, 1), wide);
    }
}
