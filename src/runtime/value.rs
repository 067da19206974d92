//! Host tensors to ONNX Runtime's and back; f16 exists only on the far side.

use std::borrow::Cow;

use half::f16;
use half::slice::HalfFloatSliceExt;
use ort::memory::Allocator;
use ort::session::SessionInputValue;
use ort::value::{
    DynValue, PrimitiveTensorElementType, Tensor as OrtTensor, TensorElementType, TensorRef,
    ValueType,
};

use crate::graph::PortType;
use crate::tensor::Tensor;

/// A tensor of ONNX Runtime's in one of the types that cross a graph's border.
#[derive(Debug)]
pub(super) enum Buffer {
    F32(OrtTensor<f32>),
    F16(OrtTensor<f16>),
    I64(OrtTensor<i64>),
}

impl Buffer {
    /// Memory from `allocator`, not yet filled.
    pub(super) fn new(
        allocator: &Allocator,
        element: PortType,
        shape: &[usize],
    ) -> ort::Result<Self> {
        Ok(match element {
            PortType::F32 => Self::F32(OrtTensor::new(allocator, shape)?),
            PortType::F16 => Self::F16(OrtTensor::new(allocator, shape)?),
            PortType::I64 => Self::I64(OrtTensor::new(allocator, shape)?),
        })
    }

    /// Overwrites a buffer that the processor can reach with a tensor of the same shape and kind. f32 is rounded where the
    /// buffer is f16; false if a finite value does not fit there.
    pub(super) fn fill(&mut self, tensor: &Tensor) -> bool {
        match (self, tensor) {
            (Self::F32(to), Tensor::F32(from)) => copy(to, from.iter().copied()),
            (Self::I64(to), Tensor::I64(from)) => copy(to, from.iter().copied()),
            (Self::F16(to), Tensor::F32(from)) => {
                copy(to, from.iter().map(|v| f16::from_f32(*v)));
                let (_, narrow) = to.extract_tensor();
                return narrow
                    .iter()
                    .zip(from)
                    .all(|(n, w)| n.is_finite() || !w.is_finite());
            }
            _ => return false,
        }
        true
    }

    /// Copies to a buffer of the same type and shape, which may be on another device.
    pub(super) fn copy_into(&self, to: &mut Self) -> ort::Result<()> {
        match (self, to) {
            (Self::F32(from), Self::F32(to)) => from.copy_into(to),
            (Self::F16(from), Self::F16(to)) => from.copy_into(to),
            (Self::I64(from), Self::I64(to)) => from.copy_into(to),
            _ => Err(ort::Error::new("buffers of different types")),
        }
    }

    /// The values as a host tensor, of a buffer that the processor can reach.
    pub(super) fn read(&self) -> ort::Result<Tensor> {
        Ok(match self {
            Self::F32(tensor) => tensor.try_extract_array::<f32>()?.to_owned().into(),
            Self::F16(tensor) => tensor.try_extract_array::<f16>()?.mapv(f16::to_f32).into(),
            Self::I64(tensor) => tensor.try_extract_array::<i64>()?.to_owned().into(),
        })
    }
}

fn copy<T>(to: &mut OrtTensor<T>, from: impl Iterator<Item = T>)
where
    T: PrimitiveTensorElementType + std::fmt::Debug,
{
    for (slot, value) in to.extract_tensor_mut().1.iter_mut().zip(from) {
        *slot = value;
    }
}

/// What a run is fed with: a view where the graph takes the host's type, else a rounded copy. `None` if a finite value does
/// not fit into f16.
pub(super) fn feed<'a>(
    name: &'a str,
    tensor: &'a Tensor,
    element: PortType,
) -> ort::Result<Option<(Cow<'a, str>, SessionInputValue<'a>)>> {
    let value = match (tensor, element) {
        (Tensor::F32(array), PortType::F16) => {
            let mut narrow = Buffer::new(&Allocator::default(), element, array.shape())?;
            if !narrow.fill(tensor) {
                return Ok(None);
            }
            let Buffer::F16(narrow) = narrow else {
                return Ok(None);
            };
            narrow.into()
        }
        (Tensor::F32(array), _) => TensorRef::from_array_view(array.view())?.into(),
        (Tensor::I64(array), _) => TensorRef::from_array_view(array.view())?.into(),
    };
    Ok(Some((Cow::Borrowed(name), value)))
}

/// A run's output as a host tensor.
pub(super) fn read(value: &DynValue) -> ort::Result<Tensor> {
    let ValueType::Tensor { ty, .. } = value.dtype() else {
        return Err(ort::Error::new("an output is not a tensor"));
    };
    Ok(match ty {
        TensorElementType::Int64 => value.try_extract_array::<i64>()?.to_owned().into(),
        TensorElementType::Float16 => {
            let narrow = value.try_extract_array::<f16>()?;
            let mut wide = ndarray::ArrayD::zeros(narrow.shape());
            match (narrow.as_slice(), wide.as_slice_mut()) {
                (Some(from), Some(to)) => from.convert_to_f32_slice(to),
                _ => wide.zip_mut_with(&narrow, |to, from| *to = from.to_f32()),
            }
            wide.into()
        }
        _ => value.try_extract_array::<f32>()?.to_owned().into(),
    })
}
