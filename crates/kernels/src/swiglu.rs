use burn::tensor::{Tensor, activation::silu};

/// The gated activation of Llama's feed-forward, `silu(gate) * up`
/// (Shazeer 2020, <https://arxiv.org/abs/2002.05202>).
///
/// # Shapes
/// - gate, up and result: `[tokens, intermediate]`
pub fn swiglu(gate: Tensor<2>, up: Tensor<2>) -> Tensor<2> {
    silu(gate) * up
}
