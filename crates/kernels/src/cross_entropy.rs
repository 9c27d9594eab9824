use burn::tensor::{Int, Tensor, TensorData};

/// Rows of logits alive at a time: at a vocabulary of 32,000 about 32 MB.
const CHUNK: usize = 256;

/// Sum of the losses and, where asked for, their gradient.
#[derive(Debug, Clone)]
pub struct CrossEntropy {
    /// `sum(-log p(target))`, `[1]`, still on the device.
    pub sum: Tensor<1>,
    /// Gradient of `sum` with respect to the hidden states, `[rows, hidden]`.
    pub gradient: Option<Tensor<2>>,
}

/// Cross-entropy straight from the hidden states, through the output projection `head`
/// `[vocab, hidden]`, a chunk of rows at a time, so that the full logits never exist.
///
/// The head is frozen and this is the end of the graph, so the gradient is written down rather
/// than recorded: with `p = softmax(h W^T)` it is `p W - W[target]`.
///
/// # Shapes
/// - hidden: `[rows, hidden]`, only rows that have a target; targets: one id for each
pub fn cross_entropy(
    hidden: &Tensor<2>,
    head: &Tensor<2>,
    targets: &[u32],
    with_gradient: bool,
) -> CrossEntropy {
    let device = hidden.device();
    let mut sum = Tensor::<1>::zeros([1], &device);
    let mut gradients = Vec::new();
    for (i, chunk) in targets.chunks(CHUNK).enumerate() {
        let ids: Vec<i64> = chunk.iter().map(|&t| i64::from(t)).collect();
        let ids = Tensor::<1, Int>::from_data(TensorData::new(ids, [chunk.len()]), &device);
        let h = hidden.clone().narrow(0, i * CHUNK, chunk.len());
        let target_rows = head.clone().select(0, ids); // [rows, hidden]

        let logits = h.clone().matmul(head.clone().transpose()); // [rows, vocab]
        let top = logits.clone().max_dim(1);
        let weights = (logits - top.clone()).exp();
        let total = weights.clone().sum_dim(1); // [rows, 1]
        let target_logits = (h * target_rows.clone()).sum_dim(1);
        sum = sum + (total.clone().log() + top - target_logits).sum();
        if with_gradient {
            gradients.push(weights.matmul(head.clone()) / total - target_rows);
        }
    }
    // Without targets there are no rows, and nothing to concatenate.
    let gradient = if gradients.is_empty() { hidden.zeros_like() } else { Tensor::cat(gradients, 0) };
    CrossEntropy { sum, gradient: with_gradient.then_some(gradient) }
}
