//! The factors that a change of a weight is stored as: their shapes checked against each other, and read as matrices.
//!
//! Every weight is a matrix here: `[outputs, inputs · kernel]`, row-major, which is how a convolution's
//! `[outputs, inputs, height, width]` lies in memory anyway.
//!
//! Python twin: `get_weight` of LyCORIS's modules. Papers: LoRA, arXiv:2106.09685; LoHa, arXiv:2108.06098; LoKr and
//! Tucker's form, arXiv:2309.14859.

use ndarray::linalg::general_mat_mul;
use ndarray::{Array2, ArrayViewMut2, Zip, s};

use crate::error::{Error, Result, quoted};
use crate::weights::{WeightData, Weights};

/// One tensor of the file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Tensor {
    pub(super) name: String,
    pub(super) shape: Vec<usize>,
}

/// `up · down`, or with a core `Σ up[o,i] core[i,j,…] down[j,n]`.
#[derive(Debug)]
pub(super) struct Product {
    pub(super) up: Tensor,
    pub(super) down: Tensor,
    pub(super) core: Option<Tensor>,
    /// `up` is stored as `[rank, outputs]`, as LyCORIS does beside a core.
    pub(super) transposed: bool,
}

/// One side of a Kronecker product.
#[derive(Debug)]
pub(super) enum Factor {
    Full(Tensor),
    Product(Product),
}

/// What a change of a weight is stored as.
#[derive(Debug)]
pub(super) enum Factors {
    Product(Product),
    Hadamard(Product, Product),
    Kronecker(Factor, Factor),
    Full(Tensor),
}

/// What a change is as a matrix, before it is read.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Extent {
    pub(super) rows: usize,
    pub(super) columns: usize,
    /// Height and width where the factors tell them apart from the inputs.
    pub(super) kernel: Option<Vec<usize>>,
}

impl Tensor {
    /// The first dimension, and the product of the others.
    fn matrix(&self) -> Option<(usize, usize)> {
        let (rows, rest) = self.shape.split_first()?;
        Some((*rows, product(rest)?))
    }

    /// Everything after the second dimension, unless that is all ones.
    fn kernel(&self) -> Option<Vec<usize>> {
        let kernel = self.shape.get(2..)?;
        kernel.iter().any(|&k| k != 1).then(|| kernel.to_vec())
    }

    pub(super) fn shown(&self) -> String {
        format!("{} of shape {:?}", quoted(&self.name), self.shape)
    }

    fn data(&self, file: &Weights) -> Result<WeightData> {
        file.tensor_f32(&self.name, &self.shape)
    }

    fn read(&self, file: &Weights) -> Result<Array2<f32>> {
        let (rows, columns) = self.matrix().unwrap_or_default();
        let values = self.data(file)?.into_vec();
        Array2::from_shape_vec((rows, columns), values).map_err(|e| Error::Weights {
            path: file.paths().next().map(Into::into).unwrap_or_default(),
            reason: format!("tensor {}: {e}", self.shown()),
        })
    }
}

fn product(dims: &[usize]) -> Option<usize> {
    dims.iter()
        .try_fold(1_usize, |all, &dim| all.checked_mul(dim))
}

impl Product {
    /// The number of columns of `up`, and of rows of `down`.
    pub(super) fn rank(&self) -> usize {
        self.down.shape.first().copied().unwrap_or(0)
    }

    fn extent(&self) -> Result<Extent, String> {
        let shape = |tensor: &Tensor| {
            let fault = || format!("tensor {} is not a matrix", tensor.shown());
            tensor
                .matrix()
                .filter(|_| tensor.shape.len() >= 2)
                .ok_or_else(fault)
        };
        let ((first, second), (rank, columns)) = (shape(&self.up)?, shape(&self.down)?);
        if self.up.kernel().is_some() {
            return Err(format!(
                "tensor {} has a kernel, and only the down projection may have one",
                self.up.shown()
            ));
        }
        let (rows, up_rank) = if self.transposed {
            (second, first)
        } else {
            (first, second)
        };
        if rank == 0 || up_rank == 0 {
            return Err(format!(
                "tensors {} and {} have rank zero: the adapter holds nothing; fetch or train it again",
                self.up.shown(),
                self.down.shown()
            ));
        }
        let Some(core) = &self.core else {
            if rank != up_rank {
                return Err(format!(
                    "tensors {} and {} have ranks {up_rank} and {rank}, which must be equal: fetch the file again",
                    self.up.shown(),
                    self.down.shown()
                ));
            }
            let kernel = self.down.kernel();
            return Ok(Extent {
                rows,
                columns,
                kernel,
            });
        };
        shape(core)?;
        let fits = core.shape[0] == up_rank && core.shape[1] == rank;
        if !fits || self.down.kernel().is_some() {
            return Err(format!(
                "tensor {} does not fit between {} and {}: fetch the file again",
                core.shown(),
                self.up.shown(),
                self.down.shown()
            ));
        }
        let area = product(&core.shape[2..]).and_then(|area| columns.checked_mul(area));
        let columns = area.ok_or_else(|| format!("tensor {} is too large", core.shown()))?;
        let kernel = core.kernel();
        Ok(Extent {
            rows,
            columns,
            kernel,
        })
    }

    /// `up` as `[rows, rank]`, and `down` as `[rank, columns]` with the core multiplied in.
    fn read(&self, file: &Weights) -> Result<Pair> {
        let mut up = self.up.read(file)?;
        if self.transposed {
            up.swap_axes(0, 1);
        }
        let mut down = self.down.read(file)?;
        if let Some(core) = &self.core {
            down = with_core(&core.data(file)?, &down);
        }
        Ok(Pair { up, down })
    }
}

/// `Σ_j core[i, j, k] down[j, n]` as `[i, n · k]`.
fn with_core(core: &WeightData, down: &Array2<f32>) -> Array2<f32> {
    let (rank, inner) = (core.shape()[0], down.nrows());
    let area = core.as_slice().len() / (rank * inner).max(1);
    let kernels: Vec<&[f32]> = core.as_slice().chunks_exact(area.max(1)).collect();
    Array2::from_shape_fn((rank, down.ncols() * area), |(i, column)| {
        let (n, k) = (column / area, column % area);
        let kernels = &kernels[i * inner..(i + 1) * inner];
        kernels
            .iter()
            .zip(down.column(n))
            .map(|(kernel, value)| kernel[k] * value)
            .sum()
    })
}

impl Factor {
    fn extent(&self) -> Result<Extent, String> {
        match self {
            Self::Product(product) => product.extent(),
            Self::Full(tensor) => full(tensor),
        }
    }

    pub(super) fn rank(&self) -> Option<usize> {
        match self {
            Self::Product(product) => Some(product.rank()),
            Self::Full(_) => None,
        }
    }

    fn read(&self, file: &Weights) -> Result<Array2<f32>> {
        match self {
            Self::Full(tensor) => tensor.read(file),
            Self::Product(product) => {
                let Pair { up, down } = product.read(file)?;
                Ok(up.dot(&down))
            }
        }
    }
}

fn full(tensor: &Tensor) -> Result<Extent, String> {
    let (rows, columns) = tensor
        .matrix()
        .ok_or_else(|| format!("tensor {} is a single number", tensor.shown()))?;
    Ok(Extent {
        rows,
        columns,
        kernel: tensor.kernel(),
    })
}

impl Factors {
    /// What the change is as a matrix; the error is the reason why the factors do not fit together.
    pub(super) fn extent(&self) -> Result<Extent, String> {
        match self {
            Self::Product(product) => product.extent(),
            Self::Full(tensor) => full(tensor),
            Self::Hadamard(first, second) => {
                let (a, b) = (first.extent()?, second.extent()?);
                if a != b {
                    return Err(format!(
                        "the products of {} and of {} differ in shape: fetch the file again",
                        first.up.shown(),
                        second.up.shown()
                    ));
                }
                Ok(a)
            }
            Self::Kronecker(first, second) => {
                let (a, b) = (first.extent()?, second.extent()?);
                if a.kernel.is_some() {
                    return Err("the first factor of its Kronecker product has a kernel".into());
                }
                let rows = a.rows.checked_mul(b.rows);
                let columns = a.columns.checked_mul(b.columns);
                let (Some(rows), Some(columns)) = (rows, columns) else {
                    return Err("its Kronecker product is too large".into());
                };
                let kernel = b.kernel;
                Ok(Extent {
                    rows,
                    columns,
                    kernel,
                })
            }
        }
    }

    /// The first tensor's name.
    pub(super) fn name(&self) -> &str {
        match self {
            Self::Product(product)
            | Self::Hadamard(product, _)
            | Self::Kronecker(Factor::Product(product), _) => &product.up.name,
            Self::Kronecker(Factor::Full(tensor), _) | Self::Full(tensor) => &tensor.name,
        }
    }

    /// The rank that alpha is divided by; `None` where nothing is divided.
    pub(super) fn rank(&self) -> Result<Option<usize>, String> {
        match self {
            Self::Product(product) | Self::Hadamard(product, _) => Ok(Some(product.rank())),
            Self::Kronecker(first, second) => match (first.rank(), second.rank()) {
                (Some(a), Some(b)) if a != b => Err(format!(
                    "the factors of its Kronecker product have ranks {a} and {b}, which must be equal"
                )),
                (a, b) => Ok(a.or(b)),
            },
            Self::Full(_) => Ok(None),
        }
    }

    /// Reads the factors; a small matrix that is made of others is made here.
    pub(super) fn read(&self, file: &Weights) -> Result<Loaded> {
        Ok(match self {
            Self::Product(product) => Loaded::Product(product.read(file)?),
            Self::Hadamard(first, second) => {
                Loaded::Hadamard(first.read(file)?, second.read(file)?)
            }
            Self::Kronecker(first, second) => {
                Loaded::Kronecker(first.read(file)?, second.read(file)?)
            }
            Self::Full(tensor) => Loaded::Full(tensor.data(file)?),
        })
    }
}

/// Two matrices to be multiplied.
#[derive(Debug)]
pub(super) struct Pair {
    up: Array2<f32>,
    down: Array2<f32>,
}

/// Factors that were read.
#[derive(Debug)]
pub(super) enum Loaded {
    Product(Pair),
    Hadamard(Pair, Pair),
    Kronecker(Array2<f32>, Array2<f32>),
    Full(WeightData),
}

impl Loaded {
    /// Adds `scale` times the change's rows from `first` on to a block of whole rows.
    pub(super) fn add(&self, scale: f32, first: usize, block: &mut ArrayViewMut2<'_, f32>) {
        match self {
            Self::Product(pair) => pair.multiply(scale, first, 1.0, block),
            Self::Hadamard(a, b) => {
                let mut left = Array2::zeros(block.dim());
                let mut right = left.clone();
                a.multiply(1.0, first, 0.0, &mut left.view_mut());
                b.multiply(1.0, first, 0.0, &mut right.view_mut());
                Zip::from(block)
                    .and(&left)
                    .and(&right)
                    .for_each(|to, a, b| *to += scale * (a * b));
            }
            Self::Kronecker(a, b) => {
                for (row, mut to) in (first..).zip(block.rows_mut()) {
                    let (a, b) = (a.row(row / b.nrows()), b.row(row % b.nrows()));
                    for (mut to, a) in to.exact_chunks_mut(b.len()).into_iter().zip(a) {
                        to.scaled_add(scale * a, &b);
                    }
                }
            }
            Self::Full(data) => {
                let from = first * block.ncols();
                for (to, value) in block.iter_mut().zip(&data.as_slice()[from..]) {
                    *to += scale * value;
                }
            }
        }
    }

    /// The factors, if they are two matrices.
    pub(super) fn low_rank(self, scale: f32) -> Option<LowRank> {
        match self {
            Self::Product(Pair { up, down }) => Some(LowRank {
                up: up * scale,
                down,
            }),
            _ => None,
        }
    }
}

impl Pair {
    /// `block = scale · up[first..] · down + keep · block`.
    fn multiply(&self, scale: f32, first: usize, keep: f32, block: &mut ArrayViewMut2<'_, f32>) {
        let up = self.up.slice(s![first..first + block.nrows(), ..]);
        general_mat_mul(scale, &up, &self.down, keep, block);
    }
}

/// The factors of a plain low-rank change: `up · down`.
#[derive(Debug, Clone)]
pub struct LowRank {
    /// `[outputs, rank]`, with alpha / rank multiplied in.
    pub up: Array2<f32>,
    /// `[rank, inputs · kernel]`.
    pub down: Array2<f32>,
}
