//! What a step does on a graphics card, on the shapes of Llama-2-7B: every operation with the bytes that it has to read
//! and write, then products by the kernel that makes them, bf16 factors and float32 sums.
//!
//!     cargo bench --package pronk-kernels --features cuda --bench cards -- [DEVICE [TOKENS [operations | products]]]

#![allow(clippy::unwrap_used)] // a benchmark reports by panicking

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::time::Instant;

use burn::backend::ops::FloatTensorOps;
use burn::backend::{Cube, DispatchDevice, try_read_sync};
use burn::tensor::{DType, Device, Distribution, Shape, Tensor};
use burn_cubecl::CubeDevice;
use burn_cubecl::tensor::CubeTensor;
use cubek::matmul::definition::{MatmulElems, MatmulGlobalElems};
use cubek::matmul::launch::launch_ref;
use cubek::matmul::multi_level::Strategy as Levels;
use cubek::matmul::multi_level::components::tile::TileMatmulKind::{self, Cmma, Mma};
use cubek::matmul::multi_level::routines::batch::double_buffering::DoubleBufferingArgs;
use cubek::matmul::multi_level::routines::batch::ordered_double_buffering::OrderedSelectionArgs;
use cubek::matmul::multi_level::routines::batch::simple::SimpleArgs;
use cubek::matmul::multi_level::routines::batch::specialized::SpecializedStrategy;
use cubek::matmul::routine::BlueprintStrategy::Inferred;
use cubek::matmul::strategy::Strategy;
use cubek::matmul::tiled::Strategy as Tiled;
use cubek::matmul::tiled::cmma::CmmaStrategy;
use cubek::std::InputBinding;
use pronk_kernels::{
    Activation, Format, FrozenLinear, FrozenMatrix, LossGradients, Precision, RopeScaling, Rotary, Scoring,
    Span, Tracked, add_low_rank, attention, cross_entropy, glu, open_device, pull_back, quantize_nf4,
    rms_norm,
};

/// Timed launches of each.
const LAUNCHES: usize = 20;

fn strategies() -> Vec<(String, Strategy)> {
    let simple = |multi_rows, tile_matmul| SimpleArgs { multi_rows, tile_matmul };
    let double = |specialized, tile_matmul| DoubleBufferingArgs { specialized, tile_matmul };
    let ordered = |rows, tile_matmul: TileMatmulKind| {
        Inferred(OrderedSelectionArgs {
            partition_k: Some(2),
            row_count: Some(rows),
            rows_per_plane: Some(2),
            tile_matmul,
        })
    };
    let special = |tile_matmul| SpecializedStrategy { tile_matmul };
    let levels = [
        ("simple cyclic cmma", Levels::SimpleCyclicCmma(Inferred(simple(false, Cmma)))),
        ("simple cyclic mma", Levels::SimpleCyclicMma(Inferred(simple(false, Mma)))),
        ("simple cyclic mma rows", Levels::SimpleCyclicMma(Inferred(simple(true, Mma)))),
        ("simple tma cmma", Levels::SimpleTmaCmma(Inferred(simple(false, Cmma)))),
        ("simple tma mma", Levels::SimpleTmaMma(Inferred(simple(false, Mma)))),
        ("simple tma mma rows", Levels::SimpleTmaMma(Inferred(simple(true, Mma)))),
        ("double cyclic mma", Levels::DoubleCyclicMma(Inferred(double(false, Mma)))),
        ("double cyclic mma special", Levels::DoubleCyclicMma(Inferred(double(true, Mma)))),
        ("double async mma", Levels::DoubleAsyncCyclicMma(Inferred(double(false, Mma)))),
        ("double tma cmma", Levels::DoubleTmaCmma(Inferred(double(false, Cmma)))),
        ("double tma mma", Levels::DoubleTmaMma(Inferred(double(false, Mma)))),
        ("ordered cmma 8", Levels::OrderedDoubleCmma(ordered(8, Cmma))),
        ("ordered mma 4", Levels::OrderedDoubleMma(ordered(4, Mma))),
        ("ordered mma 8", Levels::OrderedDoubleMma(ordered(8, Mma))),
        ("special cyclic cmma", Levels::SpecializedCyclicCmma(Inferred(special(Cmma)))),
        ("special cyclic mma", Levels::SpecializedCyclicMma(Inferred(special(Mma)))),
        ("special strided mma", Levels::SpecializedStridedMma(Inferred(special(Mma)))),
        ("special tma cmma", Levels::SpecializedTmaCmma(Inferred(special(Cmma)))),
        ("special tma mma", Levels::SpecializedTmaMma(Inferred(special(Mma)))),
    ];
    let tiled = [
        ("tiled", CmmaStrategy::default()),
        ("tiled async", CmmaStrategy::async_copy()),
        ("tiled tma", CmmaStrategy::tma()),
    ];
    let levels = levels.into_iter().map(|(name, strategy)| (name.to_owned(), Strategy::from(strategy)));
    let tiled = tiled.into_iter().map(|(name, how)| (name.to_owned(), Tiled::Cmma(Inferred(how)).into()));
    levels.chain(tiled).collect()
}

fn random(shape: [usize; 2], device: &CubeDevice) -> CubeTensor {
    Cube::float_random(Shape::new(shape), Distribution::Uniform(-1.0, 1.0), device, DType::BF16.into())
}

fn launch(strategy: &Strategy, a: &CubeTensor, b: &CubeTensor, out: &CubeTensor) -> Result<(), String> {
    let [bf16, f32] = [DType::BF16, DType::F32].map(burn::backend::cubecl::dtype_to_storage_type);
    let [a, b] = [a, b].map(|x| InputBinding::new(x.clone().binding(), bf16));
    let mut elems = MatmulElems::from_globals(&MatmulGlobalElems { lhs: bf16, rhs: bf16, out: f32 });
    launch_ref(strategy, &out.client, a, b, out.clone().binding(), &mut elems).map_err(|e| format!("{e:?}"))
}

/// The first numbers of the result, once it is there.
fn first_numbers(out: &CubeTensor) -> Vec<f32> {
    let few = burn_cubecl::kernel::slice(out.clone(), &[0..2, 0..64]);
    let data = try_read_sync(Cube::float_into_data(few)).unwrap().unwrap();
    data.as_slice::<f32>().unwrap().to_vec()
}

/// Seconds of a product, after one to warm up, and its first numbers.
fn timed(
    strategy: &Strategy,
    a: &CubeTensor,
    b: &CubeTensor,
    out: &CubeTensor,
) -> Result<(f64, Vec<f32>), String> {
    launch(strategy, a, b, out)?;
    let numbers = first_numbers(out);
    let started = Instant::now();
    for _ in 0..LAUNCHES {
        launch(strategy, a, b, out)?;
    }
    first_numbers(out);
    Ok((started.elapsed().as_secs_f64() / LAUNCHES as f64, numbers))
}

fn table(what: &str, a: &CubeTensor, b: &CubeTensor) {
    let ([m, k], n) = ([a.meta.shape()[0], a.meta.shape()[1]], b.meta.shape()[1]);
    println!("\n{what}: [{m}, {k}] x [{k}, {n}]");
    let out = Cube::float_zeros(Shape::new([m, n]), &a.device, DType::F32.into());
    let mut expected: Option<Vec<f32>> = None;
    for (name, strategy) in strategies() {
        let started = Instant::now();
        let found = catch_unwind(AssertUnwindSafe(|| timed(&strategy, a, b, &out)));
        let whole = started.elapsed().as_secs_f64();
        match found {
            Ok(Ok((seconds, numbers))) => {
                let expected = expected.get_or_insert_with(|| numbers.clone());
                let off = expected.iter().zip(&numbers).fold(0.0_f32, |most, (a, b)| most.max((a - b).abs()));
                let rate = 2.0 * (m * n * k) as f64 / seconds / 1e12;
                println!(
                    "{name:28} {rate:8.1} TFLOP/s  {:8.3} ms  {off:.1e} off  ({whole:.1} s in all)",
                    seconds * 1e3
                );
            }
            Ok(Err(e)) => println!("{name:28} {}", e.chars().take(90).collect::<String>().replace('\n', " ")),
            Err(_) => println!("{name:28} panicked"),
        }
    }
}

/// Milliseconds of `work`, after one to warm up.
fn clock(device: &Device, mut work: impl FnMut()) -> f64 {
    work();
    device.sync().unwrap();
    let started = Instant::now();
    for _ in 0..LAUNCHES {
        work();
    }
    device.sync().unwrap();
    started.elapsed().as_secs_f64() / LAUNCHES as f64 * 1e3
}

fn operations(device: &Device, tokens: usize) {
    println!("\noperations on {tokens} tokens");
    let show = |name: &str, numbers: usize, milliseconds: f64| {
        let rate = 4.0 * numbers as f64 / milliseconds / 1e6;
        println!("{name:40} {milliseconds:8.3} ms  {rate:7.0} GB/s");
    };
    let random = |shape: [usize; 2]| Tensor::<2>::random(shape, Distribution::Uniform(-1.0, 1.0), device);
    let (x, dy, wide) = (random([tokens, 4096]), random([tokens, 4096]), random([tokens, 11_008]));
    let numbers = tokens * 4096;
    show("x + y", 3 * numbers, clock(device, || drop(x.clone() + dy.clone())));
    let weight = random([1, 4096]).reshape([4096]);
    show("rms_norm", 2 * numbers, clock(device, || drop(rms_norm(x.clone(), &weight, 1e-5))));
    let both = |y: &dyn Fn(Tensor<2>) -> Tensor<2>, dy: &Tensor<2>| {
        let tracked = x.clone().tracked();
        drop(tracked.grad_remove(&mut pull_back(&y(tracked.clone()), dy.clone())));
    };
    show(
        "rms_norm, and backwards",
        5 * numbers,
        clock(device, || both(&|x| rms_norm(x, &weight, 1e-5), &dy)),
    );
    let gated = || drop(glu(wide.clone(), wide.clone(), Activation::Silu, Precision::F32));
    show("glu", 3 * tokens * 11_008, clock(device, gated));
    let positions: Vec<u32> = (0..tokens as u32).collect();
    let tables = Rotary::new(128, 1e4, RopeScaling::None).tables(&positions, device);
    let turned = || drop(tables.apply(x.clone().reshape([tokens, 32, 128])));
    show("rotary", 2 * numbers, clock(device, turned));
    let (a, b) = (random([8, 4096]), random([4096, 8]));
    show(
        "add_low_rank",
        3 * numbers,
        clock(device, || drop(add_low_rank(dy.clone(), x.clone(), &a, &b, 2.0))),
    );
    let update = |x| add_low_rank(dy.clone(), x, &a.clone().tracked(), &b.clone().tracked(), 2.0);
    show("add_low_rank, and backwards", 7 * numbers, clock(device, || both(&update, &dy)));
    for length in [128, 512, 2048].into_iter().filter(|length| *length <= tokens) {
        let spans: Vec<Span> =
            (0..tokens / length).map(|i| Span::document(i * length..(i + 1) * length)).collect();
        let scoring = Scoring { precision: Precision::Bf16, ..Scoring::of_heads(128) };
        let heads = |x: &Tensor<2>| x.clone().reshape([tokens, 32, 128]);
        let attend = |x: Tensor<2>| attention(heads(&x), &heads(&dy), &heads(&dy), &spans, scoring);
        let name = format!("attention, records of {length}");
        show(&name, 4 * numbers, clock(device, || drop(attend(x.clone()))));
        show(&format!("{name}, and backwards"), 11 * numbers, clock(device, || both(&attend, &dy)));
    }
    let values: Vec<f32> =
        (0..4096 * 4096_u32).map(|i| (i.wrapping_mul(2_654_435_761) >> 8) as f32 / 1e8).collect();
    let halves: Vec<u8> = values.iter().flat_map(|x| ((x.to_bits() >> 16) as u16).to_le_bytes()).collect();
    let dense = FrozenMatrix::dense(Format::Bf16, [4096, 4096], halves.into()).unwrap();
    let nf4 = FrozenMatrix::nf4([4096, 4096], quantize_nf4(&values, true)).unwrap();
    for (name, w) in [("bf16", dense), ("nf4", nf4)] {
        let w = FrozenLinear::on_host(Arc::new(w), Precision::Bf16, None).on_device(device);
        let name = format!("frozen linear, {name}, 4096 x 4096");
        show(&name, 2 * numbers, clock(device, || drop(w.forward(x.clone()))));
        show(&format!("{name}, backwards"), 2 * numbers, clock(device, || drop(w.backward(x.clone()))));
        if tokens >= 256 {
            let (hidden, targets) = (x.clone().narrow(0, 0, 256), vec![7; 256]);
            let loss = || drop(cross_entropy(&hidden, &w, &targets, None, LossGradients::Hidden));
            show("cross_entropy of 256 over 4096", 256 * 4096 * 3, clock(device, loss));
        }
    }
}

fn main() {
    std::panic::set_hook(Box::new(|_| ()));
    let mut words = std::env::args().skip(1).filter(|word| !word.starts_with("--"));
    let device = open_device(&words.next().unwrap_or_else(|| "cuda".into())).unwrap();
    let opened = device;
    let DispatchDevice::Cube(device) = opened.as_dispatch() else { panic!("one of CubeCL's devices") };
    let tokens = words.next().map_or(2048, |word| word.parse().unwrap());
    let only = words.next();
    let wanted = |what: &str| only.as_deref().is_none_or(|only| only == what);
    if wanted("operations") {
        operations(&opened, tokens);
    }
    for [rows, cols] in [[4096, 4096], [11_008, 4096], [4096, 11_008]] {
        if wanted("products") {
            let w = random([rows, cols], device);
            table("forward", &random([tokens, cols], device), &Cube::float_transpose(w.clone()));
            table("backward", &random([tokens, rows], device), &w);
        }
    }
}
