//! Frozen formats against bitsandbytes (a golden), candle's reading of llama.cpp's blocks, and the
//! `half` crate.

use std::borrow::Cow;
use std::path::Path;

use bytes::Bytes;
use candle_core::Device;
use candle_core::quantized::{GgmlDType, QStorage, QTensor};
use half::{bf16, f16};
use pronk_kernels::{
    DYNAMIC_MAP, Format, FrozenError, FrozenMatrix, NF4_CODEBOOK, Nf4Parts, Nf4QuantState, Nf4Scales,
    quantize_int8, quantize_nf4,
};
use safetensors::{Dtype, SafeTensors};

const GGML: [(Format, GgmlDType); 8] = [
    (Format::Q4_0, GgmlDType::Q4_0),
    (Format::Q4_1, GgmlDType::Q4_1),
    (Format::Q5_0, GgmlDType::Q5_0),
    (Format::Q5_1, GgmlDType::Q5_1),
    (Format::Q8_0, GgmlDType::Q8_0),
    (Format::Q4K, GgmlDType::Q4K),
    (Format::Q5K, GgmlDType::Q5K),
    (Format::Q6K, GgmlDType::Q6K),
];

/// Every row of a matrix, whole.
fn rows(matrix: &FrozenMatrix) -> Vec<f32> {
    let [rows, cols] = matrix.shape();
    let mut out = vec![f32::NAN; rows * cols];
    for (row, out) in out.chunks_mut(cols).enumerate() {
        matrix.dequantize(row, 0..cols, out);
    }
    out
}

/// Every range of columns that may be asked for holds what the whole row holds there.
fn assert_ranges_agree(matrix: &FrozenMatrix) {
    let ([rows, cols], whole) = (matrix.shape(), rows(matrix));
    let ends: Vec<usize> = (0..cols).step_by(matrix.column_step()).chain([cols]).collect();
    for row in 0..rows {
        for (i, &start) in ends.iter().enumerate() {
            for &end in &ends[i..] {
                let mut part = vec![f32::NAN; end - start];
                matrix.dequantize(row, start..end, &mut part);
                assert_eq!(part, whole[row * cols..][start..end], "row {row}, columns {start}..{end}");
            }
        }
    }
}

/// `bytes` at an odd address, as a mapped file may have them.
fn unaligned(bytes: &[u8]) -> Bytes {
    let mut padded = vec![0; bytes.len() + 2];
    let odd = 1 - padded.as_ptr() as usize % 2;
    padded[odd..][..bytes.len()].copy_from_slice(bytes);
    Bytes::from(padded).slice(odd..odd + bytes.len())
}

fn random_bytes(n: usize, seed: u64) -> Vec<u8> {
    let mut state = seed;
    let mut next = || {
        // SplitMix64
        state = state.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let z = (state ^ (state >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        let z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        (z >> 56) as u8
    };
    (0..n).map(|_| next()).collect()
}

fn bits(numbers: &[f32]) -> Vec<u32> {
    numbers.iter().map(|x| x.to_bits()).collect()
}

#[test]
fn every_half_is_read_as_it_is() {
    let all: Vec<u8> = (0..=u16::MAX).flat_map(u16::to_le_bytes).collect();
    let check = |format, number: fn(u16) -> f32| {
        let matrix = FrozenMatrix::dense(format, [256, 256], unaligned(&all)).unwrap();
        for (x, bits) in rows(&matrix).into_iter().zip(0..=u16::MAX) {
            let expected = number(bits);
            assert!(
                x.to_bits() == expected.to_bits() || x.is_nan() && expected.is_nan(),
                "{format} {bits:#x}"
            );
        }
    };
    check(Format::F16, |bits| f16::from_bits(bits).to_f32());
    check(Format::Bf16, |bits| bf16::from_bits(bits).to_f32());
}

#[test]
fn single_precision_stays_as_it_is() {
    let values: Vec<f32> = (0..35).map(|i| i as f32 / 7.0 - 2.0).collect();
    let bytes: Vec<u8> = values.iter().flat_map(|x| x.to_le_bytes()).collect();
    let matrix = FrozenMatrix::dense(Format::F32, [5, 7], unaligned(&bytes)).unwrap();
    assert_eq!(rows(&matrix), values);
    assert_ranges_agree(&matrix);
}

/// Random blocks whose scales, at the offsets that the format has them, are finite.
pub fn random_blocks(format: Format, blocks: usize, seed: u64) -> Vec<u8> {
    let scales: &[usize] = match format {
        Format::Q4_0 | Format::Q5_0 | Format::Q8_0 => &[0],
        Format::Q6K => &[208],
        _ => &[0, 2],
    };
    let size = format.bytes_for(blocks, 1);
    let mut bytes = random_bytes(size, seed);
    for block in bytes.chunks_mut(size / blocks) {
        for &at in scales {
            // An exponent of all ones would be an infinity or a NaN.
            block[at + 1] &= if block[at + 1] & 0x7c == 0x7c { 0xbf } else { 0xff };
        }
    }
    bytes
}

#[test]
fn llama_cpps_blocks_are_what_candle_reads() {
    for (format, dtype) in GGML {
        let shape = [12, 768];
        let blocks = random_blocks(format, shape[0] * shape[1] / dtype.block_size(), 3);
        assert_eq!(blocks.len(), shape[0] * shape[1] / dtype.block_size() * dtype.type_size(), "{format}");

        let storage = QStorage::from_data(Cow::Borrowed(&blocks), &Device::Cpu, dtype).unwrap();
        let tensor = QTensor::new(storage, (shape[0], shape[1])).unwrap().dequantize(&Device::Cpu).unwrap();
        let expected: Vec<f32> = tensor.flatten_all().unwrap().to_vec1().unwrap();

        let matrix = FrozenMatrix::ggml(format, shape, unaligned(&blocks)).unwrap();
        assert_eq!(bits(&rows(&matrix)), bits(&expected), "{format}");
        assert_eq!(matrix.byte_len(), format.bytes_for(shape[0], shape[1]), "{format}");
        assert_ranges_agree(&matrix);
    }
}

#[test]
fn interleaved_heads_are_read_as_halves() {
    // Two heads of four rows, one column; the order that `GgufFile` undoes.
    let bytes: Vec<u8> =
        [0., 1., 2., 3., 10., 11., 12., 13.].iter().flat_map(|x: &f32| x.to_le_bytes()).collect();
    let matrix = FrozenMatrix::dense(Format::F32, [8, 1], bytes.into()).unwrap();
    let plain = rows(&matrix);
    assert_eq!(rows(&matrix.clone().with_interleaved_heads(4)), [0., 2., 1., 3., 10., 12., 11., 13.]);
    for no_head in [0, 1, 3, 16] {
        assert_eq!(rows(&matrix.clone().with_interleaved_heads(no_head)), plain, "heads of {no_head}");
    }
}

/// What bitsandbytes made; see `scripts/make-frozen-golden`.
struct Golden(Vec<u8>);

impl Golden {
    fn read() -> Self {
        let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/golden/bitsandbytes.safetensors");
        Self(std::fs::read(path).unwrap())
    }

    fn bytes(&self, name: &str) -> Bytes {
        Bytes::copy_from_slice(SafeTensors::deserialize(&self.0).unwrap().tensor(name).expect(name).data())
    }

    fn shape(&self, name: &str) -> [usize; 2] {
        let tensors = SafeTensors::deserialize(&self.0).unwrap();
        tensors.tensor(name).expect(name).shape().try_into().unwrap()
    }

    fn numbers(&self, name: &str) -> Vec<f32> {
        let dtype = SafeTensors::deserialize(&self.0).unwrap().tensor(name).expect(name).dtype();
        let bytes = self.bytes(name);
        match dtype {
            Dtype::F32 => bytes.as_chunks().0.iter().map(|&x| f32::from_le_bytes(x)).collect(),
            Dtype::BF16 => bytes.as_chunks().0.iter().map(|&x| bf16::from_le_bytes(x).to_f32()).collect(),
            other => panic!("{name} is {other:?}"),
        }
    }

    fn state(&self, name: &str) -> Nf4QuantState {
        Nf4QuantState::from_json(&self.bytes(&format!("{name}.quant_state.bitsandbytes__nf4"))).unwrap()
    }

    /// The doubly quantized scales of a weight.
    fn double(&self, name: &str) -> Nf4Scales {
        Nf4Scales::Double {
            absmax: self.bytes(&format!("{name}.absmax")),
            nested_absmax: self.bytes(&format!("{name}.nested_absmax")),
            nested_offset: self.state(name).nested_offset.unwrap() as f32,
        }
    }
}

/// Scales that are the same, but for the order in which torch adds to find their mean.
fn assert_same_scales(name: &str, found: &Nf4Scales, expected: &Nf4Scales) {
    let near = |what: &str, found: f32, expected: f32, of: f32| {
        let error = (found - expected).abs() / of.abs();
        assert!(error < 3e-7, "{name}, {what}: {found:e}, expected {expected:e}");
    };
    match (found, expected) {
        (Nf4Scales::Plain { absmax }, Nf4Scales::Plain { absmax: expected }) => {
            assert_eq!(absmax, expected, "{name}");
        }
        (
            Nf4Scales::Double { absmax, nested_absmax, nested_offset },
            Nf4Scales::Double {
                absmax: absmax0,
                nested_absmax: nested_absmax0,
                nested_offset: nested_offset0,
            },
        ) => {
            assert_eq!(absmax, absmax0, "{name}");
            near("offset", *nested_offset, *nested_offset0, *nested_offset0);
            let floats = |bytes: &Bytes| -> Vec<f32> {
                bytes.as_chunks().0.iter().map(|&x| f32::from_le_bytes(x)).collect()
            };
            let (found, expected) = (floats(nested_absmax), floats(nested_absmax0));
            assert_eq!(found.len(), expected.len(), "{name}");
            for (found, expected) in found.into_iter().zip(expected) {
                near("nested absmax", found, expected, expected.max(*nested_offset0));
            }
        }
        _ => panic!("{name}: scales of different kinds"),
    }
}

#[test]
fn nf4_is_bitsandbytes() {
    let golden = Golden::read();
    for name in ["ties", "wide", "even", "odd"] {
        let (values, shape) =
            (golden.numbers(&format!("{name}.input")), golden.shape(&format!("{name}.input")));
        let codes = golden.bytes(&format!("{name}.nf4"));
        for (double, kind) in [(false, "plain"), (true, "double")] {
            let name = format!("{name}.{kind}");
            let scales = if double {
                golden.double(&name)
            } else {
                Nf4Scales::Plain { absmax: golden.bytes(&format!("{name}.absmax")) }
            };
            let found = quantize_nf4(&values, double);
            assert_eq!(found.codes, codes, "{name}");
            assert_same_scales(&name, &found.scales, &scales);

            let parts = Nf4Parts { codes: codes.clone(), scales };
            let matrix = FrozenMatrix::nf4(shape, parts.clone()).unwrap();
            let expected = golden.numbers(&format!("{name}.values"));
            let dequantized = rows(&matrix);
            assert_eq!(dequantized[dequantized.len() - expected.len()..], expected, "{name}");
            assert_ranges_agree(&matrix);

            let state = golden.state(&name);
            assert_eq!(state, Nf4QuantState::new(shape, &state.dtype, &parts.scales), "{name}");
            assert_eq!(state, Nf4QuantState::from_json(&state.to_json().unwrap()).unwrap(), "{name}");
        }
    }
}

#[test]
fn scales_of_many_blocks_are_bitsandbytes() {
    let golden = Golden::read();
    let (scales, block) = (golden.numbers("many.scales"), golden.numbers("many.block"));
    let values: Vec<f32> = scales.iter().flat_map(|s| block.iter().map(move |x| s * x)).collect();
    assert_same_scales("many", &quantize_nf4(&values, true).scales, &golden.double("many"));
}

#[test]
fn the_maps_are_bitsandbytes() {
    let golden = Golden::read();
    assert_eq!(golden.numbers("quant_map"), NF4_CODEBOOK);
    assert_eq!(golden.numbers("nested_quant_map"), DYNAMIC_MAP);
}

#[test]
fn numbers_without_any_size_stay_zero() {
    for double in [false, true] {
        let shape = [3, 70];
        let matrix = FrozenMatrix::nf4(shape, quantize_nf4(&[0.0; 210], double)).unwrap();
        assert!(rows(&matrix).iter().all(|&x| x == 0.0), "double: {double}");
    }
    let (codes, scales) = quantize_int8(&[0.0; 210], 3);
    assert!(rows(&FrozenMatrix::int8([3, 70], codes, scales).unwrap()).iter().all(|&x| x == 0.0));
}

#[test]
fn matrices_without_numbers_are_matrices() {
    for double in [false, true] {
        FrozenMatrix::nf4([0, 64], quantize_nf4(&[], double)).unwrap();
    }
    for shape in [[0, 5], [5, 0], [0, 0]] {
        let (codes, scales) = quantize_int8(&[], shape[0]);
        FrozenMatrix::int8(shape, codes, scales).unwrap();
    }
}

#[test]
fn int8_is_bitsandbytes() {
    let golden = Golden::read();
    for name in ["wide", "even", "odd"] {
        let (values, shape) =
            (golden.numbers(&format!("{name}.input")), golden.shape(&format!("{name}.input")));
        let (codes, scales) = quantize_int8(&values, shape[0]);
        assert_eq!(codes, golden.bytes(&format!("{name}.int8")), "{name}");
        assert_eq!(scales, golden.bytes(&format!("{name}.int8.SCB")), "{name}");
        let matrix = FrozenMatrix::int8(shape, unaligned(&codes), unaligned(&scales)).unwrap();
        assert_eq!(matrix.byte_len(), Format::Int8.bytes_for(shape[0], shape[1]));
        let (found, expected) = (rows(&matrix), golden.numbers(&format!("{name}.int8.values")));
        assert_eq!(found[found.len() - expected.len()..], expected, "{name}");
        assert_ranges_agree(&matrix);
    }
}

#[test]
fn sizes_and_names_are_those_of_the_files() {
    // A row of 256: bits a number, times 32 bytes.
    let sizes = [
        (Format::F32, "f32", 1024),
        (Format::F16, "f16", 512),
        (Format::Bf16, "bf16", 512),
        (Format::Nf4, "nf4", 128 + 4 + 4),
        (Format::Int8, "int8", 256 + 4),
        (Format::Q4_0, "Q4_0", 144),
        (Format::Q4_1, "Q4_1", 160),
        (Format::Q5_0, "Q5_0", 176),
        (Format::Q5_1, "Q5_1", 192),
        (Format::Q8_0, "Q8_0", 272),
        (Format::Q4K, "Q4_K", 144),
        (Format::Q5K, "Q5_K", 176),
        (Format::Q6K, "Q6_K", 210),
    ];
    for (format, name, bytes) in sizes {
        assert_eq!((format.to_string().as_str(), format.bytes_for(1, 256)), (name, bytes));
        assert_eq!(format.bytes_for(usize::MAX, usize::MAX / 2), usize::MAX, "{name}");
    }
    let matrix = FrozenMatrix::nf4([5, 100], quantize_nf4(&[1.0; 500], true)).unwrap();
    assert_eq!(matrix.byte_len(), Format::Nf4.bytes_for(5, 100));
    assert_eq!(matrix.parts().count(), 3);
}

#[test]
fn bytes_that_do_not_fit_the_shape_are_refused() {
    let zeros = |n: usize| Bytes::from(vec![0; n]);
    let problem = |result: Result<FrozenMatrix, FrozenError>| result.unwrap_err().to_string();
    assert_eq!(
        problem(FrozenMatrix::dense(Format::Bf16, [3, 4], zeros(23))),
        "values of bf16 [3, 4]: expected 24 bytes, found 23"
    );
    assert_eq!(
        problem(FrozenMatrix::dense(Format::Nf4, [3, 4], zeros(23))),
        "expected f32, f16 or bf16, found nf4"
    );
    assert_eq!(
        problem(FrozenMatrix::ggml(Format::F16, [3, 4], zeros(24))),
        "expected one of llama.cpp's blocks, found f16"
    );
    assert_eq!(
        problem(FrozenMatrix::ggml(Format::Q6K, [2, 128], zeros(210))),
        "Q6_K: expected columns in multiples of 256, found 128"
    );
    assert_eq!(
        problem(FrozenMatrix::ggml(Format::Q4_0, [2, 64], zeros(71))),
        "blocks of Q4_0 [2, 64]: expected 72 bytes, found 71"
    );
    assert_eq!(
        problem(FrozenMatrix::int8([2, 3], zeros(6), zeros(4))),
        "scales of int8 [2, 3]: expected 8 bytes, found 4"
    );
    let whole = quantize_nf4(&[1.0; 130], true);
    let Nf4Scales::Double { absmax, nested_absmax, nested_offset } = whole.scales.clone() else { panic!() };
    let cut = |absmax: Bytes, nested_absmax: Bytes| Nf4Parts {
        codes: whole.codes.clone(),
        scales: Nf4Scales::Double { absmax, nested_absmax, nested_offset },
    };
    assert_eq!(
        problem(FrozenMatrix::nf4([1, 130], cut(absmax.slice(1..), nested_absmax.clone()))),
        "absmax of nf4 [1, 130]: expected 3 bytes, found 2"
    );
    assert_eq!(
        problem(FrozenMatrix::nf4([1, 130], cut(absmax, nested_absmax.slice(4..)))),
        "nested_absmax of nf4 [1, 130]: expected 4 bytes, found 0"
    );
    assert_eq!(problem(FrozenMatrix::nf4([1, 9], whole)), "weight of nf4 [1, 9]: expected 5 bytes, found 65");
}

#[test]
fn other_quantizations_are_refused() {
    let json = r#"{"quant_type": "nf4", "blocksize": 64, "dtype": "bfloat16", "shape": [4, 8],
        "nested_blocksize": 256, "nested_dtype": "float32", "nested_offset": 0.5}"#;
    assert_eq!(Nf4QuantState::from_json(json.as_bytes()).unwrap().shape, [4, 8]);
    for (from, to, problem) in [
        ("\"nf4\"", "\"fp4\"", "quant_state: expected quant_type nf4, found fp4"),
        ("64", "128", "quant_state: expected blocksize 64, found 128"),
        ("[4, 8]", "[32]", "quant_state: expected shape [rows, cols], found [32]"),
        ("256", "64", "quant_state: expected nested_blocksize 256, found 64"),
        (", \"nested_offset\": 0.5", "", "quant_state: expected nested_offset a number, found none"),
    ] {
        let found = Nf4QuantState::from_json(json.replace(from, to).as_bytes());
        assert_eq!(found.unwrap_err().to_string(), problem);
    }
    assert!(Nf4QuantState::from_json(b"{").is_err());
}
