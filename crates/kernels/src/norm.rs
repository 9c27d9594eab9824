use burn::tensor::Tensor;

/// Root mean square normalization, `y = x / sqrt(mean(x^2) + eps) * weight`
/// (Zhang and Sennrich 2019, <https://arxiv.org/abs/1910.07467>).
///
/// # Shapes
/// - x: `[tokens, hidden]`, weight: `[hidden]`
/// - result: `[tokens, hidden]`
pub fn rms_norm(x: Tensor<2>, weight: &Tensor<1>, eps: f64) -> Tensor<2> {
    let mean_square = x.clone().square().mean_dim(1); // [tokens, 1]
    x / (mean_square + eps).sqrt() * weight.clone().unsqueeze()
}
