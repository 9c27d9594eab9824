use burn::backend::tensor::FloatTensor;
use burn::backend::{Backend, Dispatch, backend_extension};
use burn::tensor::Tensor;
use rayon::iter::ParallelIterator;

use crate::exp::tanh;
use crate::frozen::wide::widest;
use crate::host::{Host, lends};
use crate::plain;

/// `cap * tanh(x / cap)`: keeps logits within `cap` (Gemma 2). Nothing is recorded here;
/// [`crate::cross_entropy()`] knows the gradient.
pub fn soft_cap(x: Tensor<2>, cap: f32) -> Tensor<2> {
    if !lends(&x) {
        return plain::soft_cap(x, cap);
    }
    Tensor::from_dispatch(Dispatch::soft_cap(x.into_dispatch(), cap))
}

/// The operation, for backends that lend their numbers.
#[backend_extension(Flex: cfg(feature = "flex"), LibTorch: cfg(feature = "tch"))]
pub trait SoftCap: Backend {
    /// See [`soft_cap`].
    fn soft_cap(x: FloatTensor<Self>, cap: f32) -> FloatTensor<Self>;
}

impl<B: Host> SoftCap for B {
    fn soft_cap(x: FloatTensor<Self>, cap: f32) -> FloatTensor<Self> {
        const PIECE: usize = 1 << 14;
        let replace = |piece: &mut [f32]| {
            widest!(|| {
                for x in piece {
                    *x = cap * tanh(*x / cap);
                }
            });
        };
        B::rewrite(B::contiguous(x), |x| x.pieces(PIECE).for_each(replace)).0
    }
}
