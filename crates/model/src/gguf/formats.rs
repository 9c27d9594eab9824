//! How tensors are kept in a GGUF file.

use candle_core::quantized::GgmlDType;
use pronk_kernels::Format;

/// The formats that are computed with as they are. The others of candle's have to be spelled out.
pub fn format(dtype: GgmlDType) -> Option<Format> {
    Some(match dtype {
        GgmlDType::F32 => Format::F32,
        GgmlDType::F16 => Format::F16,
        GgmlDType::BF16 => Format::Bf16,
        GgmlDType::Q4_0 => Format::Q4_0,
        GgmlDType::Q4_1 => Format::Q4_1,
        GgmlDType::Q5_0 => Format::Q5_0,
        GgmlDType::Q5_1 => Format::Q5_1,
        GgmlDType::Q8_0 => Format::Q8_0,
        GgmlDType::Q4K => Format::Q4K,
        GgmlDType::Q5K => Format::Q5K,
        GgmlDType::Q6K => Format::Q6K,
        GgmlDType::Q8_1 | GgmlDType::Q2K | GgmlDType::Q3K | GgmlDType::Q8K => return None,
    })
}

/// The one of candle's that `format` is; `None` for those of bitsandbytes.
pub fn dtype(of: Format) -> Option<GgmlDType> {
    const ALL: [GgmlDType; 11] = [
        GgmlDType::F32,
        GgmlDType::F16,
        GgmlDType::BF16,
        GgmlDType::Q4_0,
        GgmlDType::Q4_1,
        GgmlDType::Q5_0,
        GgmlDType::Q5_1,
        GgmlDType::Q8_0,
        GgmlDType::Q4K,
        GgmlDType::Q5K,
        GgmlDType::Q6K,
    ];
    ALL.into_iter().find(|dtype| format(*dtype) == Some(of))
}

/// The number that stands for `dtype` in a file, ggml's `ggml_type`.
pub fn number(dtype: GgmlDType) -> u32 {
    match dtype {
        GgmlDType::F32 => 0,
        GgmlDType::F16 => 1,
        GgmlDType::Q4_0 => 2,
        GgmlDType::Q4_1 => 3,
        GgmlDType::Q5_0 => 6,
        GgmlDType::Q5_1 => 7,
        GgmlDType::Q8_0 => 8,
        GgmlDType::Q8_1 => 9,
        GgmlDType::Q2K => 10,
        GgmlDType::Q3K => 11,
        GgmlDType::Q4K => 12,
        GgmlDType::Q5K => 13,
        GgmlDType::Q6K => 14,
        GgmlDType::Q8K => 15,
        GgmlDType::BF16 => 30,
    }
}

/// The name that llama.cpp gives the format.
pub fn name(dtype: GgmlDType) -> String {
    let name = match dtype {
        GgmlDType::Q8_1 => "Q8_1",
        GgmlDType::Q2K => "Q2_K",
        GgmlDType::Q3K => "Q3_K",
        GgmlDType::Q8K => "Q8_K",
        known => return format(known).map(|f| f.to_string()).unwrap_or_default(),
    };
    name.to_owned()
}

/// Numbers of formats in ggml's `ggml_type` that candle does not know.
const UNREAD: [(u32, &str); 12] = [
    (16, "IQ2_XXS"),
    (17, "IQ2_XS"),
    (18, "IQ3_XXS"),
    (19, "IQ1_S"),
    (20, "IQ4_NL"),
    (21, "IQ3_S"),
    (22, "IQ2_S"),
    (23, "IQ4_XS"),
    (29, "IQ1_M"),
    (34, "TQ1_0"),
    (35, "TQ2_0"),
    (39, "MXFP4"),
];

/// The format that candle's `error` stumbled over, if it is one that llama.cpp has.
pub fn unread(error: &str) -> Option<&'static str> {
    let number: u32 = error.strip_prefix("unknown dtype for tensor ")?.parse().ok()?;
    UNREAD.iter().find(|(id, _)| *id == number).map(|(_, name)| *name)
}
