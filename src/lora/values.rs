//! The numbers in a LoRA's file, looked through once when it is opened, so that a run does not begin with what it cannot
//! end with.
//!
//! No Python twin: diffusers merges what is there.

use rayon::prelude::*;

use super::keys::{Key, Role};
use crate::error::quoted;
use crate::weights::{Dtype, WeightView, Weights};

/// Checks that every tensor of a module has a type that is read, and only finite values.
pub(super) fn check(file: &Weights) -> Result<(), String> {
    let names: Vec<&str> = file.names().collect();
    let fault = names.par_iter().find_map_first(|name| {
        let role = Key::of(name)?.role;
        if matches!(role, Role::Alpha | Role::Other(_)) {
            return None;
        }
        let view = file.get(name).ok()?;
        match first_bad(&view) {
            Err(()) => Some(format!(
                "tensor {} is stored as {}, and only F32, F16 and BF16 can be used: save the LoRA again in one of them",
                quoted(name),
                view.dtype
            )),
            Ok(Some(place)) => Some(format!(
                "tensor {} is not finite (NaN or infinite) at value {place}: training failed, or the file is damaged; \
                 fetch it again or use another step of its training",
                quoted(name)
            )),
            Ok(None) => None,
        }
    });
    fault.map_or(Ok(()), Err)
}

/// The first value that is not finite; an error for a type that is not read.
fn first_bad(view: &WeightView<'_>) -> Result<Option<usize>, ()> {
    /// The exponent's bits, which are all set in what is not finite.
    fn narrow(bytes: &[u8], exponent: u16) -> Option<usize> {
        let (values, _) = bytes.as_chunks::<2>();
        let bad = |value: &[u8; 2]| u16::from_le_bytes(*value) & exponent == exponent;
        values.iter().position(bad)
    }
    match view.dtype {
        Dtype::F16 => Ok(narrow(view.bytes, 0x7c00)),
        Dtype::BF16 => Ok(narrow(view.bytes, 0x7f80)),
        Dtype::F32 => {
            let (values, _) = view.bytes.as_chunks::<4>();
            let bad = |value: &[u8; 4]| !f32::from_le_bytes(*value).is_finite();
            Ok(values.iter().position(bad))
        }
        _ => Err(()),
    }
}
