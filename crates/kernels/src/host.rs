//! Tensors whose numbers lie in this machine's memory, lent to operations that compute there.

use std::mem::MaybeUninit;

use burn::backend::Backend;
use burn::backend::tensor::{Device, FloatTensor};
use burn::tensor::{DType, Shape, Tensor};

use crate::computes_on_host;
use crate::rewritten::Rewritten;

/// Whether operations on `x` can be lent its numbers: float32, in this machine's memory.
pub fn lends<const D: usize>(x: &Tensor<D>) -> bool {
    x.dtype() == DType::F32 && computes_on_host(&x.device())
}

/// Whether operations on `x` have loops of our own: where it is lent, and on CubeCL's cards.
pub fn has_loops<const D: usize>(x: &Tensor<D>) -> bool {
    x.dtype() == DType::F32 && (computes_on_host(&x.device()) || is_on_card(x))
}

#[cfg(feature = "cube")]
fn is_on_card<const D: usize>(x: &Tensor<D>) -> bool {
    crate::card::card_of(&x.device()).is_some_and(|card| crate::card::has_even_planes(&card))
}

#[cfg(not(feature = "cube"))]
fn is_on_card<const D: usize>(_: &Tensor<D>) -> bool {
    false
}

/// A backend with loops of our own.
pub trait Loops: Backend {
    /// A number for each row, that a forward pass keeps for the backward pass.
    type Numbers: Clone + std::fmt::Debug + Send + 'static;

    /// The same tensor, its numbers one after another as its shape tells them.
    fn contiguous(tensor: FloatTensor<Self>) -> FloatTensor<Self>;
}

#[cfg(feature = "cube")]
impl Loops for burn::backend::Cube {
    type Numbers = FloatTensor<Self>;

    fn contiguous(tensor: FloatTensor<Self>) -> FloatTensor<Self> {
        burn_cubecl::kernel::into_contiguous(tensor)
    }
}

/// A backend that can lend the numbers of its tensors.
pub trait Host: Loops<Numbers = Vec<f32>> {
    /// Whether it does for this one: float32, in this machine's memory.
    fn lends(tensor: &FloatTensor<Self>) -> bool;

    /// The numbers of a tensor.
    ///
    /// # Panics
    /// Where the tensor is not lent or not [`Loops::contiguous`].
    fn numbers(tensor: &FloatTensor<Self>) -> &[f32];

    /// A new tensor, all of whose numbers `f` writes, in memory that nobody has filled with zeros first.
    fn write<R>(
        shape: Shape,
        device: &Device<Self>,
        f: impl FnOnce(&mut [MaybeUninit<f32>]) -> R,
    ) -> (FloatTensor<Self>, R);

    /// A tensor of the same shape, its numbers replaced by `f`: in the same memory if nobody else
    /// holds the tensor. `f` takes them all, by [`Rewritten::pieces`], or by [`Rewritten::places`] and writes all others.
    fn rewrite<R>(tensor: FloatTensor<Self>, f: impl FnOnce(Rewritten) -> R) -> (FloatTensor<Self>, R);
}

/// As many numbers as `f` writes, which is all of them.
pub fn filled<T, R>(length: usize, f: impl FnOnce(&mut [MaybeUninit<T>]) -> R) -> (Vec<T>, R) {
    let mut numbers = Vec::with_capacity(length);
    let result = f(&mut numbers.spare_capacity_mut()[..length]);
    // SAFETY: there is room for so many, and `f` has written them.
    #[allow(unsafe_code)]
    unsafe {
        numbers.set_len(length);
    }
    (numbers, result)
}

/// New tensors of some shapes, all of whose numbers `f` writes.
pub fn write_all<B: Host>(
    shapes: &[Shape],
    device: &Device<B>,
    f: impl FnOnce(Vec<&mut [MaybeUninit<f32>]>),
) -> Vec<FloatTensor<B>> {
    write_behind::<B, _>(shapes, device, Vec::new(), f)
}

/// The same, behind those that are there already.
fn write_behind<B: Host, F: FnOnce(Vec<&mut [MaybeUninit<f32>]>)>(
    shapes: &[Shape],
    device: &Device<B>,
    before: Vec<&mut [MaybeUninit<f32>]>,
    f: F,
) -> Vec<FloatTensor<B>> {
    let Some((first, others)) = shapes.split_first() else {
        f(before);
        return Vec::new();
    };
    let (first, mut all) = B::write(first.clone(), device, |numbers| {
        let mut before: Vec<&mut [_]> = before;
        before.push(numbers);
        write_behind::<B, F>(others, device, before, f)
    });
    all.insert(0, first);
    all
}

#[cfg(feature = "flex")]
mod flex {
    use std::mem::MaybeUninit;

    use burn::backend::flex::FlexTensor;
    use burn::backend::tensor::{Device, FloatTensor};
    use burn::backend::{Flex, TensorMetadata};
    use burn::tensor::{DType, Shape, TensorData};

    use super::{Host, Loops, Rewritten, filled};

    impl Loops for Flex {
        type Numbers = Vec<f32>;

        fn contiguous(tensor: FloatTensor<Self>) -> FloatTensor<Self> {
            if tensor.is_contiguous() { tensor } else { tensor.to_contiguous() }
        }
    }

    impl Host for Flex {
        fn lends(tensor: &FloatTensor<Self>) -> bool {
            tensor.dtype() == DType::F32
        }

        fn numbers(tensor: &FloatTensor<Self>) -> &[f32] {
            let Some(numbers) = tensor.as_slice() else { panic!("numbers of a contiguous float32 tensor") };
            numbers
        }

        fn write<R>(
            shape: Shape,
            _: &Device<Self>,
            f: impl FnOnce(&mut [MaybeUninit<f32>]) -> R,
        ) -> (FloatTensor<Self>, R) {
            let (numbers, result) = filled(shape.num_elements(), f);
            (FlexTensor::from_data(TensorData::new(numbers, shape)), result)
        }

        fn rewrite<R>(
            mut tensor: FloatTensor<Self>,
            f: impl FnOnce(Rewritten) -> R,
        ) -> (FloatTensor<Self>, R) {
            if let Some((start, end)) = tensor.layout().contiguous_offsets()
                && let Some(numbers) = tensor.try_storage_mut()
            {
                let result = f(Rewritten::InPlace(&mut numbers[start..end]));
                return (tensor, result);
            }
            let tensor = Self::contiguous(tensor);
            let from = Self::numbers(&tensor);
            let (numbers, result) = filled(from.len(), |numbers| f(Rewritten::Elsewhere(from, numbers)));
            (FlexTensor::from_data(TensorData::new(numbers, tensor.shape())), result)
        }
    }

    #[cfg(test)]
    #[allow(clippy::float_cmp)] // whole numbers
    mod tests {
        use rayon::prelude::*;

        use super::*;

        fn tensor() -> FlexTensor {
            FlexTensor::from_data(TensorData::new((0..24_u8).map(f32::from).collect::<Vec<_>>(), [6, 4]))
        }

        /// Twice the numbers of a tensor, and whether they are where they were.
        fn double(tensor: FlexTensor) -> (Vec<f32>, bool) {
            let (doubled, in_place) = Flex::rewrite(tensor, |numbers| {
                let in_place = matches!(numbers, Rewritten::InPlace(_));
                numbers.pieces(5).for_each(|piece| piece.iter_mut().for_each(|x| *x *= 2.0));
                in_place
            });
            (Flex::numbers(&doubled).to_vec(), in_place)
        }

        fn doubled(numbers: impl Iterator<Item = u8>) -> Vec<f32> {
            numbers.map(|x| f32::from(2 * x)).collect()
        }

        #[test]
        fn numbers_are_rewritten_in_place_where_nobody_holds_them() {
            assert_eq!(double(tensor()), (doubled(0..24), true));
            let held = tensor();
            assert_eq!(double(held.clone()), (doubled(0..24), false));
            assert_eq!(double(held), (doubled(0..24), true));
        }

        #[test]
        fn parts_and_turned_tensors_are_rewritten() {
            let [all, turned] = [tensor(), tensor().transpose(0, 1)];
            assert_eq!(double(all.narrow(0, 1, 2)).0, doubled(4..12));
            let columns = (0..4).flat_map(|col| (0..6).map(move |row| row * 4 + col));
            assert_eq!(double(turned).0, doubled(columns));
        }

        #[test]
        fn a_new_tensor_holds_what_was_written() {
            let device = tensor().device();
            let (tensor, length) = Flex::write(Shape::from([2, 3]), &device, |numbers| {
                numbers.fill(MaybeUninit::new(7.0));
                numbers.len()
            });
            assert_eq!((Flex::numbers(&tensor), length), ([7.0; 6].as_slice(), 6));
        }
    }
}

#[cfg(feature = "tch")]
mod libtorch {
    use std::mem::MaybeUninit;

    use burn::backend::libtorch::{LibTorchDevice, TchTensor};
    use burn::backend::tensor::{Device, FloatTensor};
    use burn::backend::{LibTorch, TensorMetadata};
    use burn::tensor::{DType, Shape};

    use super::{Host, Loops, Rewritten};

    impl Loops for LibTorch {
        type Numbers = Vec<f32>;

        fn contiguous(tensor: FloatTensor<Self>) -> FloatTensor<Self> {
            if tensor.tensor.is_contiguous() { tensor } else { TchTensor::new(tensor.tensor.contiguous()) }
        }
    }

    impl Host for LibTorch {
        fn lends(tensor: &FloatTensor<Self>) -> bool {
            tensor.dtype() == DType::F32 && tensor.device() == LibTorchDevice::Cpu
        }

        fn numbers(tensor: &FloatTensor<Self>) -> &[f32] {
            let (start, length) = memory(tensor);
            if length == 0 {
                return &[];
            }
            // SAFETY: `memory` has checked that the numbers are there. Nobody writes to them while
            // the tensor is held: burn computes in place only where one tensor holds the memory.
            #[allow(unsafe_code)]
            unsafe {
                std::slice::from_raw_parts(start, length)
            }
        }

        fn write<R>(
            shape: Shape,
            device: &Device<Self>,
            f: impl FnOnce(&mut [MaybeUninit<f32>]) -> R,
        ) -> (FloatTensor<Self>, R) {
            let mut tensor = TchTensor::empty(shape, *device, DType::F32);
            let result = f(unwritten(&mut tensor));
            (tensor, result)
        }

        fn rewrite<R>(
            mut tensor: FloatTensor<Self>,
            f: impl FnOnce(Rewritten) -> R,
        ) -> (FloatTensor<Self>, R) {
            if tensor.tensor.is_contiguous() && tensor.can_mut() {
                let result = f(Rewritten::InPlace(numbers_mut(&mut tensor)));
                return (tensor, result);
            }
            let tensor = Self::contiguous(tensor);
            let mut out = TchTensor::empty(tensor.shape(), tensor.device(), DType::F32);
            let result = f(Rewritten::Elsewhere(Self::numbers(&tensor), unwritten(&mut out)));
            (out, result)
        }
    }

    /// The numbers of a tensor that nobody else holds.
    fn numbers_mut(tensor: &mut TchTensor) -> &mut [f32] {
        assert!(tensor.can_mut(), "numbers to be written, of one tensor only");
        let (start, length) = memory(tensor);
        if length == 0 {
            return &mut [];
        }
        // SAFETY: `memory` has checked that the numbers are there, and no other tensor holds them.
        // In a new tensor they are any floats; the compiler knows nothing of LibTorch's memory.
        #[allow(unsafe_code)]
        unsafe {
            std::slice::from_raw_parts_mut(start, length)
        }
    }

    /// The same, before anybody has written them.
    fn unwritten(tensor: &mut TchTensor) -> &mut [MaybeUninit<f32>] {
        let numbers = numbers_mut(tensor);
        // SAFETY: the same memory, of which less is said.
        #[allow(unsafe_code)]
        unsafe {
            std::slice::from_raw_parts_mut(numbers.as_mut_ptr().cast(), numbers.len())
        }
    }

    /// Where a tensor's numbers begin, and how many they are.
    fn memory(tensor: &TchTensor) -> (*mut f32, usize) {
        let reachable = LibTorch::lends(tensor) && tensor.tensor.is_contiguous();
        assert!(reachable, "numbers of a contiguous float32 tensor in this machine's memory");
        (tensor.tensor.data_ptr().cast(), tensor.tensor.numel())
    }
}
