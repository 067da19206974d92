//! Host tensors: what goes into and comes out of a network, by name.

use std::collections::BTreeMap;

use ndarray::{Array, Array4, ArrayD, Dimension};

/// Latents `[batch, 4, height/8, width/8]`, in the convention of the scheduler that made them.
pub type Latents = Array4<f32>;

/// A tensor on the host. Networks speak f32 and i64; narrower types exist only inside `runtime`.
#[derive(Debug, Clone, PartialEq)]
pub enum Tensor {
    /// Activations, embeddings, pictures.
    F32(ArrayD<f32>),
    /// Token ids.
    I64(ArrayD<i64>),
}

/// Named tensors, as a graph's inputs or outputs.
pub type TensorMap = BTreeMap<String, Tensor>;

impl Tensor {
    /// The tensor's dimensions.
    pub fn shape(&self) -> &[usize] {
        match self {
            Self::F32(a) => a.shape(),
            Self::I64(a) => a.shape(),
        }
    }
}

impl<D: Dimension> From<ndarray::Array<f32, D>> for Tensor {
    fn from(array: ndarray::Array<f32, D>) -> Self {
        Self::F32(row_major(array))
    }
}

impl<D: Dimension> From<ndarray::Array<i64, D>> for Tensor {
    fn from(array: ndarray::Array<i64, D>) -> Self {
        Self::I64(row_major(array))
    }
}

/// Networks read row-major memory; joining and permuting leave other layouts.
fn row_major<T: Clone, D: Dimension>(array: Array<T, D>) -> ArrayD<T> {
    let array = if array.is_standard_layout() {
        array
    } else {
        array.as_standard_layout().into_owned()
    };
    array.into_dyn()
}

/// Whether every value is finite.
pub fn all_finite<'a>(values: impl IntoIterator<Item = &'a f32>) -> bool {
    // A sum of `x * 0` is NaN exactly when some x is NaN or infinite, and it vectorises where `all` does not.
    values.into_iter().fold(0.0_f32, |acc, &x| acc + x * 0.0) == 0.0
}
