//! What kernels for CubeCL's graphics cards share. A unit takes a few numbers at a time, a plane of units a row.

use burn::backend::DispatchDevice;
use burn::tensor::{DType, Device, Shape};
use burn_cubecl::CubeDevice;
use burn_cubecl::cubecl;
use burn_cubecl::cubecl::calculate_cube_count_elemwise;
use burn_cubecl::cubecl::client::Client;
use burn_cubecl::cubecl::ir::{AddressType, ElemType, FloatKind};
use burn_cubecl::cubecl::prelude::{CubeCount, CubeDim};
use burn_cubecl::kernel::matmul::{MatmulStrategy, matmul};
use burn_cubecl::ops::numeric::empty_device_contiguous_dtype;
use burn_cubecl::tensor::CubeTensor;
use cubecl::prelude::*;

use crate::frozen::Precision;

/// Planes of a cube, each with rows of its own.
const PLANES: u32 = 4;

/// The card that `device` is, where it is one of CubeCL's.
pub fn card_of(device: &Device) -> Option<CubeDevice> {
    match device.clone().without_autodiff().as_dispatch() {
        DispatchDevice::Cube(device) => Some(device.clone()),
        #[allow(unreachable_patterns)] // where no other backend is in this build
        _ => None,
    }
}

/// Whether a row can be handed to a plane: only where all planes are of one size is it known how many.
pub fn has_even_planes(card: &CubeDevice) -> bool {
    let client = card.client();
    let hardware = &client.properties().hardware;
    hardware.plane_size_min == hardware.plane_size_max
}

/// A new tensor, all of whose numbers a kernel writes.
pub fn empty(like: &CubeTensor, shape: impl Into<Shape>, dtype: DType) -> CubeTensor {
    empty_device_contiguous_dtype(like.client.clone(), like.device.clone(), shape.into(), dtype)
}

/// How many numbers of a row of `width` a unit takes at a time.
pub fn lanes(width: usize) -> usize {
    [4, 2].into_iter().find(|lanes| width.is_multiple_of(*lanes)).unwrap_or(1)
}

/// A launch of one unit for each of `units`.
pub fn elements(client: &Client, units: usize) -> (CubeCount, CubeDim) {
    let dim = CubeDim::new(client, units);
    (calculate_cube_count_elemwise(client, units, dim), dim)
}

/// A launch of one plane for each of `rows`: see [`row_of_plane`] and [`unit_of_plane`].
pub fn planes(client: &Client, rows: usize) -> (CubeCount, CubeDim) {
    let plane = client.properties().hardware.plane_size_max;
    let dim = CubeDim::new_2d(plane, PLANES);
    (calculate_cube_count_elemwise(client, rows * plane as usize, dim), dim)
}

/// The row of this unit's plane.
#[cube]
pub fn row_of_plane() -> usize {
    CUBE_POS * (CUBE_DIM_Y as usize) + UNIT_POS_Y as usize
}

/// Which unit of its plane this is, and how many there are.
#[cube]
pub fn unit_of_plane() -> (usize, usize) {
    (UNIT_POS_X as usize, CUBE_DIM_X as usize)
}

/// Whether a plane is one unit, as on a processor: there it has nobody to sum with.
pub fn is_alone(client: &Client) -> bool {
    client.properties().hardware.plane_size_max == 1
}

/// The sum of the numbers of a plane's units.
#[cube]
pub fn sum_of_plane(x: f32, #[comptime] alone: bool) -> f32 {
    if comptime![alone] { x } else { plane_sum(x) }
}

/// The largest of the numbers of a plane's units.
#[cube]
pub fn max_of_plane(x: f32, #[comptime] alone: bool) -> f32 {
    if comptime![alone] { x } else { plane_max(x) }
}

/// What reaches every number of the largest of these tensors.
pub fn addresses(tensors: &[&CubeTensor]) -> AddressType {
    tensors.iter().map(|x| x.required_address_type()).max().unwrap_or_default()
}

/// `a b` in float32.
///
/// # Panics
/// Where no kernel fits, as burn's own products do.
pub fn multiply(a: CubeTensor, b: CubeTensor) -> CubeTensor {
    match matmul(a, b, None, MatmulStrategy::default(), DType::F32) {
        Ok(product) => product,
        Err(e) => panic!("a product on the graphics card: {e:?}"),
    }
}

/// bf16 where the card has an instruction that multiplies it and sums in float32, and where
/// `precision` allows it.
pub fn factor_type(precision: Precision, client: &Client) -> DType {
    let (bf16, f32) = (element(DType::BF16), ElemType::Float(FloatKind::F32));
    let matmul = &client.features().matmul;
    let fast = matmul.cmma.iter().chain(&matmul.mma);
    let fast = fast.into_iter().any(|mma| mma.a_type == bf16 && mma.b_type == bf16 && mma.cd_type == f32);
    if precision == Precision::Bf16 && fast { DType::BF16 } else { DType::F32 }
}

/// How CubeCL calls a type.
pub fn element(dtype: DType) -> ElemType {
    burn::backend::cubecl::dtype_to_storage_type(dtype)
}
