//! The execution providers by name, and which graphs they want.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

use crate::error::{Error, Result};

/// Where ONNX Runtime computes.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Provider {
    /// The processor.
    #[default]
    Cpu,
    /// NVIDIA GPUs through CUDA.
    Cuda,
    /// NVIDIA GPUs through TensorRT.
    Trt,
    /// Apple's Core ML.
    Coreml,
}

/// The operators a graph is written in.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Dialect {
    /// With the fused operators (`com.microsoft`) that ONNX Runtime has on the processor, in f32.
    Fused,
    /// With the fused operators that ONNX Runtime has on NVIDIA GPUs, channels last, in f16.
    Cuda,
    /// With operators of the ONNX standard only.
    Plain,
}

impl Provider {
    /// Every provider.
    pub const ALL: [Self; 4] = [Self::Cpu, Self::Cuda, Self::Trt, Self::Coreml];

    /// The name on the command line and in requests.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Cpu => "cpu",
            Self::Cuda => "cuda",
            Self::Trt => "trt",
            Self::Coreml => "coreml",
        }
    }

    /// The dialect whose operators this provider has kernels for.
    pub const fn dialect(self) -> Dialect {
        match self {
            Self::Cpu => Dialect::Fused,
            Self::Cuda => Dialect::Cuda,
            Self::Trt | Self::Coreml => Dialect::Plain,
        }
    }
}

impl fmt::Display for Provider {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.name())
    }
}

impl FromStr for Provider {
    type Err = Error;

    fn from_str(name: &str) -> Result<Self> {
        Self::ALL
            .into_iter()
            .find(|p| p.name() == name)
            .ok_or_else(|| {
                let known = Self::ALL.map(Self::name).join(", ");
                Error::request(
                    "provider",
                    format!("`{name}` is not a provider; known: {known}"),
                )
            })
    }
}

impl fmt::Display for Dialect {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Self::Fused => "fused",
            Self::Cuda => "cuda",
            Self::Plain => "plain",
        })
    }
}
