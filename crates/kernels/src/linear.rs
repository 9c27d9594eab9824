use std::sync::Arc;

use burn::tensor::{Device, Int, Tensor, TensorData};

use crate::computes_on_host;
use crate::direction::Direction;
use crate::frozen::{
    FrozenMatrix, FrozenWeight, Layer, Precision, Update, feed_forward, frozen_layers, frozen_product,
    unread_product,
};
use crate::glu::Activation;
use crate::low_rank::add_low_rank;
use crate::residual::residual;

/// A linear layer of the frozen base, `y = x W^T + b`. It never gets a gradient.
#[derive(Debug, Clone)]
pub struct FrozenLinear {
    weight: Weight,
    bias: Option<Tensor<1>>,
}

#[derive(Debug, Clone)]
#[allow(clippy::large_enum_variant)] // a few hundred in all
enum Weight {
    /// Dense on the device, `[out, in]`.
    Dense(Tensor<2>),
    /// In the format that it is kept in, in host memory or on a card.
    Frozen(FrozenWeight, Precision),
}

impl FrozenLinear {
    /// `weight` is `[out, in]` as checkpoints store it, on the device; `bias` is `[out]`.
    pub fn new(weight: Tensor<2>, bias: Option<Tensor<1>>) -> Self {
        Self { weight: Weight::Dense(weight), bias }
    }

    /// `weight` is `[out, in]` in host memory, quantized or not, and stays as it is: products
    /// dequantize a tile of it at a time and round their factors to `precision`.
    pub fn on_host(weight: Arc<FrozenMatrix>, precision: Precision, bias: Option<Tensor<1>>) -> Self {
        Self { weight: Weight::Frozen(FrozenWeight::Host(weight), precision), bias }
    }

    /// What factors of its products are rounded to.
    pub fn precision(&self) -> Precision {
        match &self.weight {
            Weight::Dense(_) => Precision::F32,
            Weight::Frozen(_, precision) => *precision,
        }
    }

    /// Features of the input.
    pub fn in_features(&self) -> usize {
        self.shape()[1]
    }

    /// Features of the output.
    pub fn out_features(&self) -> usize {
        self.shape()[0]
    }

    fn shape(&self) -> [usize; 2] {
        match &self.weight {
            Weight::Dense(weight) => weight.dims(),
            Weight::Frozen(weight, _) => weight.shape(),
        }
    }

    /// The same layer with its weight on `device`: where it lies, if that is the host's processor; as it is kept, where one
    /// of CubeCL's cards multiplies it by itself; otherwise in float32.
    #[must_use]
    pub fn on_device(&self, device: &Device) -> Self {
        let Weight::Frozen(FrozenWeight::Host(weight), precision) = &self.weight else { return self.clone() };
        if computes_on_host(device) {
            return self.clone();
        }
        let bias = self.bias.clone().map(|bias| bias.to_device(device));
        if let Some(weight) = FrozenWeight::on_card(weight, device) {
            return Self { weight: Weight::Frozen(weight, *precision), bias };
        }
        let rows: Vec<u32> = (0..weight.shape()[0] as u32).collect();
        Self::new(Tensor::from_data(weight.select(&rows), device), bias)
    }

    /// # Shapes
    /// - x: `[tokens, in]`
    /// - result: `[tokens, out]`
    pub fn forward(&self, x: Tensor<2>) -> Tensor<2> {
        self.add_bias(self.product(x))
    }

    /// `x W^T`, without the bias.
    ///
    /// # Shapes
    /// - x: `[tokens, in]`
    /// - result: `[tokens, out]`
    pub fn product(&self, x: Tensor<2>) -> Tensor<2> {
        match &self.weight {
            // The transpose is a view: products read it through its strides.
            Weight::Dense(weight) => x.matmul(weight.clone().transpose()),
            Weight::Frozen(weight, precision) => frozen_product(x, weight, Direction::Forward, *precision),
        }
    }

    /// [`Self::product`] of layers that read one input, each with what an adapter adds to it, in one operation where they
    /// are products in one precision on a device with loops of our own. That of an only layer is added to `onto`, if that is there.
    ///
    /// # Shapes
    /// - x: `[tokens, in]`
    /// - onto and each result: `[tokens, out]`, of its layer
    ///
    /// # Panics
    /// Where the shapes do not fit, or something is there to be added to by several.
    pub fn products(
        layers: Vec<(&Self, Option<Update<Tensor<2>>>)>,
        x: &Tensor<2>,
        onto: Option<&Tensor<2>>,
    ) -> Vec<Tensor<2>> {
        assert!(onto.is_none() || layers.len() == 1, "one product to be added");
        let precision = layers.first().map_or(Precision::F32, |(layer, _)| layer.precision());
        let together = layers.iter().map(|(layer, update)| match &layer.weight {
            Weight::Frozen(w, of) if *of == precision => Some(Layer { w: w.clone(), update: update.clone() }),
            _ => None,
        });
        let together = together.collect::<Option<Vec<_>>>();
        if let Some(results) = together.and_then(|layers| frozen_layers(x, layers, onto, precision)) {
            return results;
        }
        let alone = layers.into_iter().map(|(layer, update)| {
            let y = layer.product(x.clone());
            let y = match onto.cloned() {
                Some(onto) => residual(onto, y),
                None => y,
            };
            match update {
                Some(Update { a, b, scaling }) => add_low_rank(y, x.clone(), &a, &b, scaling),
                None => y,
            }
        });
        alone.collect()
    }

    /// `onto` with [`Self::product`] added to it, and what an adapter adds.
    ///
    /// # Shapes
    /// - x: `[tokens, in]`
    /// - onto and result: `[tokens, out]`
    pub fn product_onto(
        &self,
        onto: &Tensor<2>,
        x: &Tensor<2>,
        update: Option<Update<Tensor<2>>>,
    ) -> Tensor<2> {
        let sum = Self::products(vec![(self, update)], x, Some(onto)).pop();
        sum.unwrap_or_else(|| unreachable!("a product of the layer"))
    }

    /// `down(activation(gate(x)) * up(x))`, added to `onto` if that is there, in one operation of layers without a bias whose
    /// products are in bf16, where there is such an operation. It keeps what is gated in bf16 too. Where it is not to be
    /// `read`, gradients go back through it as they should, its numbers may be any.
    ///
    /// # Shapes
    /// - x, onto and result: `[tokens, hidden]`
    pub fn feed_forward(
        layers: [&Self; 3],
        x: &Tensor<2>,
        onto: Option<&Tensor<2>>,
        activation: Activation,
        read: bool,
    ) -> Option<Tensor<2>> {
        let weights = layers.map(|layer| match &layer.weight {
            Weight::Frozen(weight, Precision::Bf16) if layer.bias.is_none() => Some(weight),
            _ => None,
        });
        let [Some(gate), Some(up), Some(down)] = weights else { return None };
        feed_forward(x, onto, [gate, up, down], activation, read)
    }

    /// `y + b`, or `y` where there is no bias.
    pub fn add_bias(&self, y: Tensor<2>) -> Tensor<2> {
        match &self.bias {
            Some(bias) => y + bias.clone().unsqueeze(),
            None => y,
        }
    }

    /// [`Self::forward`] for a graph whose result nobody reads: gradients go back through it as they
    /// should, its numbers may be zeros.
    ///
    /// # Shapes
    /// - x: `[tokens, in]`
    /// - result: `[tokens, out]`
    pub fn forward_unread(&self, x: Tensor<2>) -> Tensor<2> {
        match &self.weight {
            Weight::Dense(_) => self.forward(x),
            Weight::Frozen(weight, precision) => unread_product(x, weight, *precision),
        }
    }

    /// The gradient at the input for `dy` at the output, `dy W`.
    ///
    /// # Shapes
    /// - dy: `[tokens, out]`
    /// - result: `[tokens, in]`
    pub fn backward(&self, dy: Tensor<2>) -> Tensor<2> {
        match &self.weight {
            Weight::Dense(weight) => dy.matmul(weight.clone()),
            Weight::Frozen(weight, precision) => frozen_product(dy, weight, Direction::Backward, *precision),
        }
    }

    /// The squared norm of every row of the weight, `[out]`, on `device`.
    pub fn row_squares(&self, device: &Device) -> Tensor<1> {
        match &self.weight {
            Weight::Dense(weight) => weight.clone().square().sum_dim(1).squeeze_dim(1),
            Weight::Frozen(weight, _) => weight.row_squares(device),
        }
    }

    /// Rows of the weight, `[ids, in]`: of an output projection, what points at those tokens.
    ///
    /// # Panics
    /// Where an id is no row.
    pub fn rows(&self, ids: &[u32], device: &Device) -> Tensor<2> {
        match &self.weight {
            Weight::Dense(weight) => {
                let indices: Vec<i64> = ids.iter().map(|&id| i64::from(id)).collect();
                let data = TensorData::new(indices, [ids.len()]);
                weight.clone().select(0, Tensor::<1, Int>::from_data(data, device))
            }
            Weight::Frozen(weight, _) => weight.rows(ids, device),
        }
    }
}
