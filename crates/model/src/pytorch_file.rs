//! A PyTorch checkpoint, `pytorch_model.bin`: a zip archive with the tensors' bytes, stored as they
//! are, and a pickle that says where each lies. Nothing of the pickle is executed: what is neither
//! plain data nor a tensor's place is refused.

use std::io::Cursor;
use std::ops::Range;
use std::path::Path;

use candle_core::pickle::{Object, Stack};
use safetensors::{Dtype, tensor::TensorInfo};
use zip::{CompressionMethod, ZipArchive};

use crate::ModelError;

/// Deeper than any tensor's description goes, and shallow enough for a thread's stack.
const DEEPEST: usize = 32;

/// Opcodes of a pickle that bring an object back that was there before.
const GETS: [u8; 2] = [b'h', b'j'];

/// The opcode of a whole number of as many bytes as the next one says.
const LONG1: u8 = 0x8A;

/// What a file holds.
pub struct PytorchFile {
    /// Where the pickle lies.
    pub pickle: Range<usize>,
    /// Every tensor, with its first byte in the file.
    pub tensors: Vec<(String, usize, TensorInfo)>,
}

/// Reads where the tensors of the file `bytes` lie, and checks that they are there.
pub fn read(path: &Path, bytes: &[u8]) -> Result<PytorchFile, ModelError> {
    let malformed = |problem: String| ModelError::malformed(path, problem);
    let mut archive = ZipArchive::new(Cursor::new(bytes)).map_err(|e| {
        malformed(format!(
            "not a whole PyTorch file ({e}); if it was downloaded, download it again. Files from before PyTorch 1.6 \
             are no zip archives: load and save such a one with a newer PyTorch"
        ))
    })?;
    let names: Vec<String> = archive.file_names().filter_map(|name| Some(name.ok()?.into_owned())).collect();
    let Some(name) = names.iter().find(|name| name.ends_with("/data.pkl")) else {
        return Err(malformed("not a PyTorch checkpoint (there is no data.pkl in the archive)".into()));
    };
    let folder = name.trim_end_matches(".pkl").to_owned();
    let pickle = entry(&mut archive, bytes, name).map_err(malformed)?;
    let entries = unpickle(&bytes[pickle.clone()]).map_err(|e| malformed(format!("{name}: {e}")))?;
    let mut tensors = Vec::with_capacity(entries.len());
    let mut problems = Vec::new();
    for (tensor, value) in entries {
        let stored = Stored::of(value).and_then(|stored| {
            let storage = entry(&mut archive, bytes, &format!("{folder}/{}", stored.key))?;
            Ok((tensor.clone(), storage.start, stored.info(storage.len())?))
        });
        match stored {
            Ok(stored) => tensors.push(stored),
            Err(problem) => problems.push(format!("{tensor}: {problem}")),
        }
    }
    if problems.is_empty() {
        Ok(PytorchFile { pickle, tensors })
    } else {
        Err(ModelError::Weights { path: path.into(), problems })
    }
}

/// Where an entry of the archive lies in the file.
fn entry(archive: &mut ZipArchive<Cursor<&[u8]>>, bytes: &[u8], name: &str) -> Result<Range<usize>, String> {
    let entry = archive.by_name(name).map_err(|e| format!("{name}: {e}"))?;
    if entry.compression() != CompressionMethod::Stored || entry.encrypted() {
        return Err(format!("{name}: expected an entry that is stored as it is, found a packed one"));
    }
    let start = entry.data_start().and_then(|start| usize::try_from(start).ok());
    let range = start.and_then(|start| Some(start..start.checked_add(usize::try_from(entry.size()).ok()?)?));
    range.filter(|range| range.end <= bytes.len()).ok_or_else(|| format!("{name}: ends beyond the file"))
}

/// The entries of the dictionary that a pickle builds.
fn unpickle(pickle: &[u8]) -> Result<Vec<(String, Object)>, String> {
    let broken = |e: candle_core::Error| e.to_string().lines().next().unwrap_or_default().to_owned();
    let (mut stack, mut reader) = (Stack::empty(), Cursor::new(pickle));
    loop {
        let opcode = pickle.get(reader.position() as usize).copied();
        check_length(pickle, reader.position() as usize)?;
        if stack.read(&mut reader).map_err(broken)? {
            break;
        }
        // The reader copies what it brings back: of more than names, a few bytes would make gigabytes.
        let top = stack.stack().last();
        if opcode.is_some_and(|opcode| GETS.contains(&opcode)) && !top.is_some_and(is_small) {
            return Err("objects within each other, as no checkpoint has them".into());
        }
        if top.is_some_and(|object| !matches!(object, Object::Dict(_)) && depth(object, 0) > DEEPEST) {
            return Err(format!("objects more than {DEEPEST} deep, as no checkpoint has them"));
        }
    }
    match stack.finalize().map_err(broken)? {
        Object::Dict(entries) => entries
            .into_iter()
            .filter(|(_, value)| !matches!(value, Object::Dict(_))) // a state_dict's `_metadata`
            .map(|(key, value)| {
                Ok((key.unicode().map_err(|k| format!("a key that is no text: {}", shown(&k)))?, value))
            })
            .collect(),
        other => Err(format!("expected a dictionary of tensors, found {}", shown(&other))),
    }
}

/// Refuses lengths that the reader believes: of a text longer than the file, for which it would take memory first, and
/// of a number longer than its own, of which it would shift some bytes over others.
fn check_length(pickle: &[u8], at: usize) -> Result<(), String> {
    match pickle.get(at..).unwrap_or_default() {
        [b'X', a, b, c, d, ..] if u32::from_le_bytes([*a, *b, *c, *d]) as usize > pickle.len() => {
            Err("a text that ends beyond the file".into())
        }
        [LONG1, 9..=255, ..] => Err("a whole number of more than eight bytes".into()),
        _ => Ok(()),
    }
}

fn is_small(object: &Object) -> bool {
    match object {
        Object::Tuple(items) | Object::List(items) => items.is_empty(),
        Object::Dict(items) => items.is_empty(),
        Object::Build { .. } | Object::Reduce { .. } | Object::PersistentLoad(_) => false,
        _ => true,
    }
}

/// How deep an object goes; looks no further than where it is too deep.
fn depth(object: &Object, above: usize) -> usize {
    let below = |object: &Object| depth(object, above + 1);
    match object {
        _ if above > DEEPEST => above,
        Object::Tuple(items) | Object::List(items) => items.iter().map(below).max().unwrap_or(above),
        Object::Dict(items) => items.iter().map(|(k, v)| below(k).max(below(v))).max().unwrap_or(above),
        Object::Build { callable, args } | Object::Reduce { callable, args } => {
            below(callable).max(below(args))
        }
        Object::PersistentLoad(id) => below(id),
        _ => above,
    }
}

/// A tensor as its pickle describes it.
struct Stored {
    key: String,
    dtype: Dtype,
    offset: usize,
    shape: Vec<usize>,
}

impl Stored {
    /// `_rebuild_tensor_v2(('storage', class, key, device, length), offset, shape, strides, ..)`,
    /// within a `_rebuild_parameter` or not.
    fn of(value: Object) -> Result<Self, String> {
        let (module, name, mut args) = call(value)?;
        match (module.as_str(), name.as_str()) {
            ("torch._utils", "_rebuild_tensor_v2") => {}
            ("torch._utils", "_rebuild_parameter") if !args.is_empty() => {
                return Self::of(args.swap_remove(0));
            }
            _ => {
                return Err(format!(
                    "made by {module}.{name}, which is not executed here; expected a tensor"
                ));
            }
        }
        let described = || "a tensor that is described in another way than PyTorch does".to_owned();
        let [Object::PersistentLoad(storage), offset, shape, strides, ..] = &args[..] else {
            return Err(described());
        };
        let Object::Tuple(storage) = &**storage else { return Err(described()) };
        let [_, Object::Class { class_name, .. }, Object::Unicode(key), ..] = &storage[..] else {
            return Err(described());
        };
        let dtype = match class_name.as_str() {
            "FloatStorage" => Dtype::F32,
            "HalfStorage" => Dtype::F16,
            "BFloat16Storage" => Dtype::BF16,
            other => return Err(format!("expected float32, float16 or bfloat16, found torch.{other}")),
        };
        let offset = whole(offset).ok_or_else(described)?;
        let [shape, strides] = [shape, strides].map(|sizes| match sizes {
            Object::Tuple(sizes) => sizes.iter().map(whole).collect::<Option<Vec<usize>>>(),
            _ => None,
        });
        let (shape, strides) =
            shape.zip(strides).filter(|(a, b)| a.len() == b.len()).ok_or_else(described)?;
        if !in_order(&shape, &strides) {
            return Err(format!(
                "expected rows one after another, found shape {shape:?} with strides {strides:?}; save it contiguous"
            ));
        }
        Ok(Self { key: key.clone(), dtype, offset, shape })
    }

    /// Its place in a storage of so many bytes.
    fn info(self, storage: usize) -> Result<TensorInfo, String> {
        let size = self.dtype.bitsize() / 8;
        let numbers = self.shape.iter().try_fold(1_usize, |n, &size| n.checked_mul(size));
        let begin = self.offset.checked_mul(size);
        let end =
            numbers.and_then(|n| n.checked_mul(size)).zip(begin).and_then(|(n, begin)| n.checked_add(begin));
        match (begin, end) {
            (Some(begin), Some(end)) if end <= storage => {
                Ok(TensorInfo { dtype: self.dtype, shape: self.shape, data_offsets: (begin, end) })
            }
            _ => Err(format!("shape {:?} ends beyond the {storage} bytes that are stored", self.shape)),
        }
    }
}

/// The name of what an object is made by, and its arguments.
fn call(value: Object) -> Result<(String, String, Vec<Object>), String> {
    match value {
        Object::Reduce { callable, args } => match (*callable, *args) {
            (Object::Class { module_name, class_name }, Object::Tuple(args)) => {
                Ok((module_name, class_name, args))
            }
            (callable, _) => Err(format!("made by {}; expected a tensor", shown(&callable))),
        },
        other => Err(format!("expected a tensor, found {}", shown(&other))),
    }
}

fn whole(object: &Object) -> Option<usize> {
    match object {
        Object::Int(n) => usize::try_from(*n).ok(),
        Object::Long(n) => usize::try_from(*n).ok(),
        _ => None,
    }
}

/// Whether numbers of this shape lie one after another; a size of one has any stride.
fn in_order(shape: &[usize], strides: &[usize]) -> bool {
    let mut expected = Some(1_usize);
    shape.iter().zip(strides).rev().all(|(&size, &stride)| {
        let fits = size <= 1 || Some(stride) == expected;
        expected = expected.and_then(|e| e.checked_mul(size));
        fits
    })
}

/// An object in a message.
fn shown(object: &Object) -> String {
    let text: String = format!("{object:?}").chars().take(120).collect();
    text.replace('\n', " ")
}
