//! A file's tensors sorted by module, each module's parts checked against each other.
//!
//! Python twin: `weights_from_state_dict` of LyCORIS, and diffusers' grouping of keys by rank and alpha.

use std::collections::BTreeMap;
use std::sync::Arc;

use half::{bf16, f16};

use super::config::Configs;
use super::factors::{Extent, Factor, Factors, Product, Tensor};
use super::keys::{Key, Role};
use super::update::{Axis, Magnitude, Update};
use super::{Form, Format, Unmatched};
use crate::error::quoted;
use crate::weights::{Dtype, Weights};

/// What a file says of one module.
#[derive(Debug, Default)]
pub(super) struct Module {
    pub(super) weight: Option<Part>,
    pub(super) bias: Option<Part>,
    /// Why the module cannot be used, whatever the model.
    pub(super) refused: Option<String>,
}

/// The change of one tensor.
#[derive(Debug)]
pub(super) struct Part {
    pub(super) form: Form,
    pub(super) extent: Extent,
    pub(super) rank: Option<usize>,
    pub(super) alpha: Option<f64>,
    pub(super) update: Arc<Update>,
}

/// All modules of a file by name, and tensors that belong to none.
#[derive(Debug, Default)]
pub(super) struct Modules {
    pub(super) by_name: BTreeMap<String, Module>,
    pub(super) strangers: Vec<Unmatched>,
}

impl Modules {
    /// Sorts a file's tensors. The error is the reason, without the path.
    pub(super) fn of(file: &Weights, configs: &Configs) -> Result<Self, String> {
        let mut modules = Self::default();
        let mut sorted: BTreeMap<String, Parts<'_>> = BTreeMap::new();
        for name in file.names() {
            let Some(key) = Key::of(name) else {
                modules.strangers.push(Unmatched {
                    module: name.to_owned(),
                    reason: "is not the name of a LoRA's tensor".into(),
                });
                continue;
            };
            let parts = sorted.entry(key.module).or_insert_with(|| Parts {
                file,
                names: BTreeMap::new(),
                format: key.format,
            });
            // `.alpha` is everybody's.
            if key.role != Role::Alpha {
                parts.format = key.format;
            }
            if let Some(other) = parts.names.insert(key.role, name) {
                return Err(format!(
                    "tensors {} and {} are the same part of one module: remove one",
                    quoted(other),
                    quoted(name)
                ));
            }
        }
        for (name, parts) in sorted {
            let module = parts
                .module(&name, configs)
                .map_err(|reason| format!("module {}: {reason}", quoted(&name)))?;
            modules.by_name.insert(name, module);
        }
        Ok(modules)
    }
}

impl Part {
    /// Checks that the change has the shape of a tensor of the model: equal but for a kernel of 1 × 1, which is none.
    pub(super) fn check(&self, shape: &[usize]) -> Result<(), String> {
        let (rows, rest) = shape.split_first().unwrap_or((&1, &[]));
        let columns: usize = rest.iter().product();
        let kernel = shape.get(2..).unwrap_or_default();
        let kernel_fits = match &self.extent.kernel {
            Some(own) => own == kernel,
            None => true,
        };
        let fits = *rows == self.extent.rows && columns == self.extent.columns && kernel_fits;
        let magnitudes_fit = match &self.update.magnitude {
            Some(Magnitude {
                tensor,
                axis: Axis::Input,
            }) => tensor.shape.iter().product::<usize>() == shape.get(1).copied().unwrap_or(1),
            _ => true,
        };
        if fits && magnitudes_fit {
            return Ok(());
        }
        let kernel = match &self.extent.kernel {
            Some(kernel) => format!(" and kernel {kernel:?}"),
            None => String::new(),
        };
        Err(format!(
            "changes a tensor of {} × {} values{kernel}, and the model's has shape {shape:?}: it is made for another model",
            self.extent.rows, self.extent.columns
        ))
    }
}

/// The tensors of one module.
struct Parts<'a> {
    file: &'a Weights,
    names: BTreeMap<Role, &'a str>,
    format: Format,
}

impl Parts<'_> {
    fn module(&self, name: &str, configs: &Configs) -> Result<Module, String> {
        let other = self.names.keys().find_map(|role| match role {
            Role::Other(what) => Some(*what),
            _ => None,
        });
        if let Some(what) = other {
            return Ok(Module {
                refused: Some(format!("is {what}, which is not supported")),
                ..Module::default()
            });
        }
        let weight = self.weight(name, configs)?;
        let bias = self.bias(weight.as_ref())?;
        if weight.is_none() && bias.is_none() {
            let names: Vec<_> = self.names.values().map(|name| quoted(name)).collect();
            return Err(format!(
                "has {} and no weights that it belongs to: fetch the file again",
                names.join(", ")
            ));
        }
        Ok(Module {
            weight,
            bias,
            refused: None,
        })
    }

    fn tensor(&self, role: Role) -> Option<Tensor> {
        let name = *self.names.get(&role)?;
        Some(Tensor {
            name: name.to_owned(),
            shape: self.file.shape(name)?.to_vec(),
        })
    }

    /// A product of which all parts are there, or none.
    fn product(&self, [up, down, core]: [Role; 3]) -> Result<Option<Product>, String> {
        let found = (self.tensor(up), self.tensor(down), self.tensor(core));
        let (there, missing) = match found {
            (Some(stored), Some(down), core) => {
                return Ok(Some(Product {
                    transposed: core.is_some() && up != Role::Up,
                    up: stored,
                    down,
                    core,
                }));
            }
            (None, None, None) => return Ok(None),
            (Some(there), None, _) | (None, None, Some(there)) => (there, down),
            (None, Some(there), _) => (there, up),
        };
        Err(format!(
            "has {} and no `{}`: the file is not whole; fetch it again",
            quoted(&there.name),
            missing.spelling(self.format)
        ))
    }

    fn factor(&self, full: Role, parts: [Role; 3]) -> Result<Option<Factor>, String> {
        match (self.tensor(full), self.product(parts)?) {
            (Some(tensor), None) => Ok(Some(Factor::Full(tensor))),
            (None, product) => Ok(product.map(Factor::Product)),
            (Some(tensor), Some(product)) => Err(format!(
                "has {} and {}, of which one is enough: it is not known which counts",
                quoted(&tensor.name),
                quoted(&product.up.name)
            )),
        }
    }

    /// Two halves that a form needs both.
    fn both<T>(&self, halves: [Option<T>; 2], parts: [Role; 2]) -> Result<Option<(T, T)>, String> {
        let missing = match halves {
            [Some(first), Some(second)] => return Ok(Some((first, second))),
            [None, None] => return Ok(None),
            [None, Some(_)] => parts[0],
            [Some(_), None] => parts[1],
        };
        Err(format!(
            "has no `{}`: the file is not whole; fetch it again",
            missing.spelling(self.format)
        ))
    }

    fn factors(&self) -> Result<Option<Factors>, String> {
        let plain = self.product([Role::Up, Role::Down, Role::Core])?;
        let hadamard = self.both(
            [
                self.product([Role::Hada1Up, Role::Hada1Down, Role::Hada1Core])?,
                self.product([Role::Hada2Up, Role::Hada2Down, Role::Hada2Core])?,
            ],
            [Role::Hada1Up, Role::Hada2Up],
        )?;
        let kronecker = self.both(
            [
                self.factor(
                    Role::Kron1,
                    [Role::Kron1Up, Role::Kron1Down, Role::Kron1Core],
                )?,
                self.factor(
                    Role::Kron2,
                    [Role::Kron2Up, Role::Kron2Down, Role::Kron2Core],
                )?,
            ],
            [Role::Kron1, Role::Kron2],
        )?;
        let mut forms = [
            plain.map(Factors::Product),
            hadamard.map(|(a, b)| Factors::Hadamard(a, b)),
            kronecker.map(|(a, b)| Factors::Kronecker(a, b)),
            self.tensor(Role::Diff).map(Factors::Full),
        ]
        .into_iter()
        .flatten();
        let (first, second) = (forms.next(), forms.next());
        if let (Some(first), Some(second)) = (&first, &second) {
            return Err(format!(
                "has {} and {}, parts of two forms: it is not known which counts",
                quoted(first.name()),
                quoted(second.name())
            ));
        }
        Ok(first)
    }

    fn weight(&self, name: &str, configs: &Configs) -> Result<Option<Part>, String> {
        let Some(factors) = self.factors()? else {
            return Ok(None);
        };
        let extent = factors.extent()?;
        let rank = factors.rank()?;
        let (alpha, scale) = self.scale(name, rank, configs)?;
        let form = match &factors {
            Factors::Product(product) if product.core.is_some() => Form::Tucker,
            Factors::Product(_) if extent.kernel.is_some() => Form::Conv,
            Factors::Product(_) => Form::Linear,
            Factors::Hadamard(..) => Form::Loha,
            Factors::Kronecker(..) => Form::Lokr,
            Factors::Full(_) => Form::Full,
        };
        let magnitude = self.magnitude(&extent)?;
        Ok(Some(Part {
            form,
            extent,
            rank,
            alpha,
            update: Arc::new(Update {
                factors,
                scale,
                magnitude,
            }),
        }))
    }

    /// Alpha, and what the product is multiplied by.
    fn scale(
        &self,
        name: &str,
        rank: Option<usize>,
        configs: &Configs,
    ) -> Result<(Option<f64>, f64), String> {
        let stored = match self.names.get(&Role::Alpha) {
            Some(tensor) => Some(alpha(self.file, tensor)?),
            None => None,
        };
        let Some(rank) = rank else {
            return Ok((None, 1.0));
        };
        let told = configs.scale(name, rank)?;
        match (stored, told) {
            (None, None) if name.starts_with("base_model.model.") => Err(
                "is in a file of PEFT's own, whose alphas are in an `adapter_config.json` that is not read: save it with \
                 diffusers' `save_lora_weights` and its metadata"
                    .into(),
            ),
            (None, None) => Ok((None, 1.0)),
            (None, Some((alpha, scale))) => Ok((Some(alpha), scale)),
            (Some(alpha), None) => Ok((Some(alpha), alpha / rank as f64)),
            (Some(alpha), Some((told, _))) => Err(format!(
                "has alpha {alpha} as a tensor, and {told} in the file's metadata: it is not known which counts"
            )),
        }
    }

    fn magnitude(&self, extent: &Extent) -> Result<Option<Magnitude>, String> {
        let (tensor, peft) = match (self.tensor(Role::DoraScale), self.tensor(Role::Magnitude)) {
            (Some(_), Some(_)) => return Err("has DoRA magnitudes twice".into()),
            (Some(tensor), None) => (tensor, false),
            (None, Some(tensor)) => (tensor, true),
            (None, None) => return Ok(None),
        };
        let count: usize = tensor.shape.iter().product();
        let first = tensor.shape.first() == Some(&count);
        // Of a layer with one output, [1, 1] is both: one norm for all of it is the output's.
        let axis = match tensor.shape.as_slice() {
            _ if count == extent.rows && (first || peft) => Axis::Output,
            [1, inputs, ..] if *inputs == count && !peft && count > 0 => Axis::Input,
            _ => {
                return Err(format!(
                    "DoRA's magnitudes {} are neither one for each of the {} outputs nor one an input",
                    tensor.shown(),
                    extent.rows
                ));
            }
        };
        Ok(Some(Magnitude { tensor, axis }))
    }

    fn bias(&self, weight: Option<&Part>) -> Result<Option<Part>, String> {
        let (tensor, scale) = match (self.tensor(Role::UpBias), self.tensor(Role::DiffBias)) {
            (Some(_), Some(_)) => return Err("has a bias twice".into()),
            (None, None) => return Ok(None),
            (None, Some(tensor)) => (tensor, 1.0),
            (Some(tensor), None) => match weight {
                Some(weight) => (tensor, weight.update.scale),
                None => return Ok(None),
            },
        };
        let factors = Factors::Full(tensor);
        Ok(Some(Part {
            form: Form::Bias,
            extent: factors.extent()?,
            rank: None,
            alpha: None,
            update: Arc::new(Update {
                factors,
                scale,
                magnitude: None,
            }),
        }))
    }
}

/// The number in an alpha tensor.
fn alpha(file: &Weights, name: &str) -> Result<f64, String> {
    let view = file.get(name).map_err(|e| e.to_string())?;
    let shown = quoted(name);
    let one = view.shape.iter().product::<usize>() == 1;
    let value = match (view.dtype, view.bytes) {
        _ if !one => None,
        (Dtype::F64, &[a, b, c, d, e, f, g, h]) => {
            Some(f64::from_le_bytes([a, b, c, d, e, f, g, h]))
        }
        (Dtype::F32, &[a, b, c, d]) => Some(f32::from_le_bytes([a, b, c, d]).into()),
        (Dtype::F16, &[a, b]) => Some(f16::from_le_bytes([a, b]).into()),
        (Dtype::BF16, &[a, b]) => Some(bf16::from_le_bytes([a, b]).into()),
        (Dtype::I32, &[a, b, c, d]) => Some(i32::from_le_bytes([a, b, c, d]).into()),
        (Dtype::I64, &[a, b, c, d, e, f, g, h]) => {
            Some(i64::from_le_bytes([a, b, c, d, e, f, g, h]) as f64)
        }
        _ => None,
    };
    let Some(value) = value else {
        return Err(format!(
            "alpha {shown} is {} of shape {:?}, and must be one number (F64, F32, F16, BF16, I64 or I32)",
            view.dtype, view.shape
        ));
    };
    if !value.is_finite() || value == 0.0 {
        return Err(format!(
            "alpha {shown} is {value}, and must be finite and not zero: fetch the file again, or ask its maker"
        ));
    }
    Ok(value)
}
