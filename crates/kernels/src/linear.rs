use burn::tensor::Tensor;

/// A linear layer of the frozen base, `y = x W^T + b`. It never gets a gradient.
#[derive(Debug, Clone)]
pub struct FrozenLinear {
    weight: Tensor<2>,
    bias: Option<Tensor<1>>,
}

impl FrozenLinear {
    /// `weight` is `[out, in]` as checkpoints store it, `bias` is `[out]`.
    pub fn new(weight: Tensor<2>, bias: Option<Tensor<1>>) -> Self {
        Self { weight, bias }
    }

    /// Features of the input.
    pub fn in_features(&self) -> usize {
        self.weight.dims()[1]
    }

    /// Features of the output.
    pub fn out_features(&self) -> usize {
        self.weight.dims()[0]
    }

    /// # Shapes
    /// - x: `[tokens, in]`
    /// - result: `[tokens, out]`
    pub fn forward(&self, x: Tensor<2>) -> Tensor<2> {
        // The transpose is a view: products read it through its strides.
        let y = x.matmul(self.weight.clone().transpose());
        match &self.bias {
            Some(bias) => y + bias.clone().unsqueeze(),
            None => y,
        }
    }

    /// The weight, `[out, in]`, as it takes part in products.
    pub fn weight(&self) -> Tensor<2> {
        self.weight.clone()
    }
}
