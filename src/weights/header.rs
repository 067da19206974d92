//! The header of a safetensors file: which tensor lies where, with every way in which it can lie refused by name.
//!
//! The rules are those of `safetensors::SafeTensors::read_metadata` (a test holds the two against each other), whose
//! types read the entries here. The rules are applied here and not by that function because its errors do not name the
//! tensor, it lets the second of two equal names win, and a last offset near 2^64 overflows its own arithmetic.
//!
//! Python twin: the header parsing inside `safetensors.safe_open`.

use std::collections::{BTreeMap, HashSet};
use std::fmt;
use std::ops::Range;

use safetensors::tensor::{Dtype, TensorInfo};
use serde::de::{DeserializeSeed, Deserializer, Error as _, MapAccess, Visitor};

use super::content::{Content, HEAD, MAX_SAFETENSORS_HEADER};
use crate::error::quoted;

const PREFIX: usize = 8;

/// One tensor of a file; `range` is in bytes from the file's beginning.
pub(super) struct Entry {
    pub(super) name: String,
    pub(super) dtype: Dtype,
    pub(super) shape: Vec<usize>,
    pub(super) range: Range<usize>,
}

/// What a header says: the tensors in the order of their data, and the text under `__metadata__`.
pub(super) struct Header {
    pub(super) entries: Vec<Entry>,
    pub(super) metadata: BTreeMap<String, String>,
}

/// Reads the header of a whole safetensors file. The error is the reason, without the path.
pub(super) fn read(file: &[u8]) -> Result<Header, String> {
    match Content::of(file.get(..HEAD).unwrap_or(file)) {
        None | Some(Content::Safetensors) => {}
        Some(other) => {
            return Err(format!(
                "is {}: {}",
                other.what(),
                other.instead_of_weights()
            ));
        }
    }
    let json = header_text(file)?;
    let mut json_reader = serde_json::Deserializer::from_str(json);
    let (mut tensors, metadata) = json_reader
        .deserialize_map(Tensors)
        .and_then(|tensors| json_reader.end().map(|()| tensors))
        .map_err(|e| format!("the safetensors header is not valid: {e}"))?;
    tensors.sort_by_key(|(_, info)| info.data_offsets);
    let data = PREFIX + json.len();
    let end = check_ranges(&tensors)?;
    check_length(data, end, file.len())?;
    let entries = tensors.into_iter().map(|(name, info)| {
        let (start, end) = info.data_offsets;
        Entry {
            name,
            dtype: info.dtype,
            shape: info.shape,
            range: data + start..data + end,
        }
    });
    Ok(Header {
        entries: entries.collect(),
        metadata,
    })
}

fn header_text(file: &[u8]) -> Result<&str, String> {
    let Some((prefix, rest)) = file.split_first_chunk::<PREFIX>() else {
        return Err(format!(
            "is not a safetensors file: {} bytes, and the format needs at least {PREFIX}",
            file.len()
        ));
    };
    let length = u64::from_le_bytes(*prefix);
    if length > MAX_SAFETENSORS_HEADER {
        return Err(format!(
            "is not a safetensors file: its first 8 bytes would mean a header of {length} bytes, and the format allows \
             {MAX_SAFETENSORS_HEADER}"
        ));
    }
    if length == 0 {
        return Err("is not a safetensors file: its header is empty".into());
    }
    // At most 10^8 by now, so it fits.
    let length = length as usize;
    let header = rest.get(..length).ok_or_else(|| {
        format!(
            "truncated: {} bytes expected for the header alone, {} found",
            PREFIX + length,
            file.len()
        )
    })?;
    std::str::from_utf8(header).map_err(|e| {
        format!(
            "the safetensors header is not UTF-8 at byte {}",
            PREFIX + e.valid_up_to()
        )
    })
}

/// Checks that the tensors, sorted by offset, tile the data without gap or overlap. Returns the data's length in bytes.
fn check_ranges(tensors: &[(String, TensorInfo)]) -> Result<usize, String> {
    let mut filled = 0;
    let mut before = None;
    for (name, info) in tensors {
        let fault = |what: String| format!("tensor {}: {what}", quoted(name));
        let (start, end) = info.data_offsets;
        if end < start {
            return Err(fault(format!(
                "its data ends at byte {end}, before it starts at byte {start}"
            )));
        }
        if start > filled {
            return Err(fault(format!(
                "a gap of {} bytes lies before its data",
                start - filled
            )));
        }
        if start < filled {
            let other = before.map_or_else(String::new, quoted);
            return Err(fault(format!(
                "its data overlaps the data of tensor {other}"
            )));
        }
        let needed = byte_size(info).ok_or_else(|| {
            fault(format!(
                "shape {:?} of {} is not a whole number of bytes that a file can hold",
                info.shape, info.dtype
            ))
        })?;
        if end - start != needed {
            let found = end - start;
            let (shape, dtype) = (&info.shape, info.dtype);
            return Err(fault(format!(
                "shape {shape:?} of {dtype} needs {needed} bytes, and its range has {found}"
            )));
        }
        filled = end;
        before = Some(name.as_str());
    }
    Ok(filled)
}

fn byte_size(info: &TensorInfo) -> Option<usize> {
    let count = info
        .shape
        .iter()
        .try_fold(1_usize, |product, &dim| product.checked_mul(dim))?;
    let bits = count.checked_mul(info.dtype.bitsize())?;
    bits.is_multiple_of(8).then_some(bits / 8)
}

fn check_length(data: usize, end: usize, found: usize) -> Result<(), String> {
    // In u128: a hostile header's last offset may be anything up to 2^64.
    let (expected, found) = (data as u128 + end as u128, found as u128);
    if expected > found {
        return Err(format!(
            "truncated: {expected} bytes expected, {found} found; fetch the file again"
        ));
    }
    if expected < found {
        return Err(format!(
            "{} bytes that belong to no tensor follow the data: {expected} bytes expected, {found} found",
            found - expected
        ));
    }
    Ok(())
}

/// Reads the header's JSON object into a list, so that equal names do not get lost as they would in a map.
struct Tensors;

impl<'de> Visitor<'de> for Tensors {
    type Value = (Vec<(String, TensorInfo)>, BTreeMap<String, String>);

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("an object with one entry per tensor")
    }

    fn visit_map<M: MapAccess<'de>>(self, mut map: M) -> Result<Self::Value, M::Error> {
        let mut seen = HashSet::new();
        let (mut tensors, mut metadata) = (Vec::new(), BTreeMap::new());
        while let Some(name) = map.next_key::<String>()? {
            if !seen.insert(name.clone()) {
                return Err(M::Error::custom(format!(
                    "tensor {} is listed twice",
                    quoted(&name)
                )));
            }
            if name == "__metadata__" {
                metadata = map.next_value::<Option<_>>()?.unwrap_or_default();
                continue;
            }
            let info = map.next_value_seed(Named(&name))?;
            tensors.push((name, info));
        }
        Ok((tensors, metadata))
    }
}

/// One entry, whose errors name the tensor.
struct Named<'a>(&'a str);

impl<'de> DeserializeSeed<'de> for Named<'_> {
    type Value = TensorInfo;

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<TensorInfo, D::Error> {
        serde::Deserialize::deserialize(deserializer)
            .map_err(|e| D::Error::custom(format!("tensor {}: {e}", quoted(self.0))))
    }
}
