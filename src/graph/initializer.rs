//! Initializers: small constants inside the graph file, or weights that are only a name and a shape.
//!
//! Python twin: `onnx.numpy_helper.to_array` and `onnx.external_data_helper`.

use super::check::{decode, named};
use super::{Constant, ConstantType, Weight, WeightType, proto};
use crate::error::quoted;

/// `TensorProto.DataType`.
pub(super) const FLOAT: i32 = 1;
const INT32: i32 = 6;
pub(super) const INT64: i32 = 7;
const BOOL: i32 = 9;
pub(super) const FLOAT16: i32 = 10;

/// `TensorProto.DataLocation`.
const INSIDE: i32 = 0;
const EXTERNAL: i32 = 1;

pub(super) enum Initializer {
    Constant(Constant),
    Weight(Weight),
}

/// The name of an ONNX element type, as far as a message needs it.
pub(super) fn type_name(data_type: i32) -> String {
    match data_type {
        FLOAT => "FLOAT",
        INT32 => "INT32",
        INT64 => "INT64",
        8 => "STRING",
        BOOL => "BOOL",
        FLOAT16 => "FLOAT16",
        11 => "DOUBLE",
        16 => "BFLOAT16",
        other => return format!("number {other}"),
    }
    .to_owned()
}

pub(super) fn read(mut tensor: proto::TensorData) -> Result<Initializer, String> {
    let name = named(std::mem::take(&mut tensor.name), "an initializer")?;
    let fault = |reason: String| format!("initializer {}: {reason}", quoted(&name));
    let shape = shape(&tensor.dims).map_err(fault)?;
    if tensor.segment.is_some() {
        return Err(fault("is stored in segments, which are not read".into()));
    }
    match tensor.data_location {
        INSIDE => {
            let (element, bytes) = values(tensor, &shape).map_err(fault)?;
            Ok(Initializer::Constant(Constant {
                name,
                element,
                shape,
                bytes,
            }))
        }
        EXTERNAL => {
            let (key, element) = weights_key(tensor).map_err(fault)?;
            Ok(Initializer::Weight(Weight {
                name,
                key,
                element,
                shape,
            }))
        }
        other => Err(fault(format!(
            "says its data is at place number {other}, which is unknown"
        ))),
    }
}

/// The dimensions, whose elements can be counted and addressed even at 8 bytes each.
fn shape(dims: &[i64]) -> Result<Vec<usize>, String> {
    let shape: Option<Vec<usize>> = dims.iter().map(|&dim| usize::try_from(dim).ok()).collect();
    let shape = shape.ok_or_else(|| format!("has a negative dimension: {dims:?}"))?;
    match shape
        .iter()
        .try_fold(8_usize, |product, &dim| product.checked_mul(dim))
    {
        Some(bytes) if bytes <= isize::MAX.unsigned_abs() => Ok(shape),
        _ => Err(format!("has more elements than can be addressed: {dims:?}")),
    }
}

/// A constant's type and its values as little-endian bytes.
fn values(tensor: proto::TensorData, shape: &[usize]) -> Result<(ConstantType, Vec<u8>), String> {
    if !tensor.external_data.is_empty() {
        return Err("names external data and says that its data is inside".into());
    }
    let typed = tensor.float_data.len() + tensor.int32_data.len() + tensor.int64_data.len();
    let element = match tensor.data_type {
        FLOAT => ConstantType::F32,
        INT64 => ConstantType::I64,
        INT32 => ConstantType::I32,
        BOOL => ConstantType::Bool,
        FLOAT16 => ConstantType::F16,
        other => {
            let found = type_name(other);
            return Err(format!(
                "is a constant of type {found}, and FLOAT, FLOAT16, INT64, INT32 and BOOL are allowed"
            ));
        }
    };
    let bytes = match (tensor.raw_data, element) {
        (Some(_), _) if typed > 0 => return Err("gives its values twice".into()),
        (Some(raw), _) => raw,
        (None, ConstantType::F32) => tensor
            .float_data
            .iter()
            .flat_map(|v| v.to_le_bytes())
            .collect(),
        (None, ConstantType::I64) => tensor
            .int64_data
            .iter()
            .flat_map(|v| v.to_le_bytes())
            .collect(),
        (None, ConstantType::I32) => tensor
            .int32_data
            .iter()
            .flat_map(|v| v.to_le_bytes())
            .collect(),
        (None, ConstantType::F16) => half_bits(&tensor.int32_data)?,
        // Anything above 255 becomes something that the check below refuses.
        (None, ConstantType::Bool) => tensor
            .int32_data
            .iter()
            .map(|&v| u8::try_from(v).unwrap_or(u8::MAX))
            .collect(),
    };
    let needed = shape.iter().product::<usize>() * element.size();
    if bytes.len() != needed {
        return Err(format!(
            "shape {shape:?} needs {needed} bytes of values, {} found",
            bytes.len()
        ));
    }
    if element == ConstantType::Bool && bytes.iter().any(|&b| b > 1) {
        return Err("has a BOOL that is neither 0 nor 1".into());
    }
    Ok((element, bytes))
}

/// f16 values, of which ONNX keeps the bits in integers.
fn half_bits(values: &[i32]) -> Result<Vec<u8>, String> {
    let mut bytes = Vec::with_capacity(values.len() * 2);
    for &value in values {
        let bits = u16::try_from(value).map_err(|_| format!("has {value} for a FLOAT16's bits"))?;
        bytes.extend(bits.to_le_bytes());
    }
    Ok(bytes)
}

/// The key of the catalogue's weights that hold this tensor, and the type in which the graph wants it.
fn weights_key(tensor: proto::TensorData) -> Result<(String, WeightType), String> {
    let element = match tensor.data_type {
        FLOAT => WeightType::F32,
        FLOAT16 => WeightType::F16,
        other => {
            let found = type_name(other);
            return Err(format!(
                "is a weight of type {found}, and FLOAT and FLOAT16 are allowed"
            ));
        }
    };
    if tensor.raw_data.is_some_and(|raw| !raw.is_empty()) || !tensor.float_data.is_empty() {
        return Err("says that its data is external and has values inside".into());
    }
    let mut location = None;
    for entry in tensor.external_data {
        let proto::StringEntry { key, value } = decode(entry, "external data")?;
        if key != "location" {
            return Err(format!(
                "its external data has the entry {}; only `location` is allowed",
                quoted(&key)
            ));
        }
        if location.replace(value).is_some() {
            return Err("its external data has two locations".into());
        }
    }
    let location = location.ok_or("says that its data is external and names no location")?;
    // A key of the catalogue, never a path: nothing here may lead to a file that the catalogue does not name.
    let plain = location
        .bytes()
        .all(|b| b.is_ascii_alphanumeric() || matches!(b, b'_' | b'-' | b'.'));
    if location.is_empty() || !plain || location.contains("..") || location.len() > 100 {
        return Err(format!(
            "its external data lies in {}, which is no weights key (letters, digits, `_`, `-`, single `.`): files \
             outside the graph are not followed",
            quoted(&location)
        ));
    }
    Ok((location, element))
}
