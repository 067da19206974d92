//! Inputs and outputs that stay bound from run to run: what is constant over the steps goes to the device once, what
//! changes is a few hundred kilobytes a step.
//!
//! Where runs become CUDA graphs, that too gets a place of its own on the device, because a graph replays a run with
//! the addresses that it had.

use std::collections::BTreeMap;
use std::sync::Arc;

use ort::memory::{AllocationDevice, Allocator, AllocatorType, MemoryInfo, MemoryType};
use ort::session::IoBinding;

use super::session::{Feed, Running, Session};
use super::value::Buffer;
use crate::error::Result;
use crate::graph::{Dim, Port};
use crate::provider::Provider;
use crate::tensor::{Tensor, TensorMap};

/// One set of inputs and outputs of a [`Session`]; made by [`Session::bind`], run by [`Session::run_bound`].
pub struct Binding {
    // Declared before the buffers it points to.
    pub(super) inner: IoBinding,
    /// Of its own, because they say which CUDA graph is this binding's.
    pub(super) options: Arc<Running>,
    inputs: BTreeMap<String, Slot>,
    outputs: BTreeMap<String, Slot>,
}

/// A tensor that a binding points to: on the host, whence ONNX Runtime copies if need be, or on the device, with a place
/// on the host to come and go.
struct Slot {
    shape: Vec<usize>,
    host: Buffer,
    device: Option<Buffer>,
}

impl std::fmt::Debug for Binding {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Binding").finish_non_exhaustive()
    }
}

impl Slot {
    fn new(place: Option<&Allocator>, port: &Port, shape: Vec<usize>) -> ort::Result<Self> {
        let host = Buffer::new(&Allocator::default(), port.element, &shape)?;
        let device = place
            .map(|allocator| Buffer::new(allocator, port.element, &shape))
            .transpose()?;
        Ok(Self {
            shape,
            host,
            device,
        })
    }

    fn bound(&mut self) -> &mut Buffer {
        self.device.as_mut().unwrap_or(&mut self.host)
    }
}

impl Session {
    /// Binds all inputs and outputs. `fixed` inputs keep these values; `varying` ones get theirs at every
    /// [`Session::run_bound`] and keep these shapes. Together they are exactly the network's inputs, and their
    /// dimensions decide those of every output.
    ///
    /// # Errors
    /// [`crate::Error::Contract`] as [`Session::run`], and for outputs whose size the inputs' named dimensions do not say;
    /// [`crate::Error::Runtime`] when ONNX Runtime refuses, memory above all.
    pub fn bind(&mut self, fixed: &[Feed<'_>], varying: &[Feed<'_>]) -> Result<Binding> {
        let all = fixed.iter().chain(varying).copied().collect::<Vec<_>>();
        self.check(&all)?;
        let device = self.device().map_err(|e| self.failed(&e))?;
        let options = self.new_options();
        let mut binding = Binding {
            inner: self.inner.create_binding().map_err(|e| self.failed(&e))?,
            options: options.map_err(|e| self.failed(&e))?,
            inputs: BTreeMap::new(),
            outputs: BTreeMap::new(),
        };
        for (name, tensor) in fixed {
            self.bind_fixed(&mut binding, name, tensor)?;
        }
        for (name, tensor) in varying {
            let slot = self.slot(device.as_ref(), name, tensor)?;
            binding.inputs.insert((*name).to_owned(), slot);
        }
        for port in &self.outputs {
            let shape = self.output_shape(port, &all)?;
            let slot = Slot::new(device.as_ref(), port, shape).map_err(|e| self.failed(&e))?;
            binding.outputs.insert(port.name.clone(), slot);
        }
        binding.connect().map_err(|e| self.failed(&e))?;
        Ok(binding)
    }

    /// Runs a binding of this session with new values for its varying inputs; gives its outputs.
    ///
    /// # Errors
    /// As [`Session::run`]; [`crate::Error::Contract`] too when `varying` are not the inputs that vary, or have other shapes than
    /// when they were bound.
    pub fn run_bound(&mut self, binding: &mut Binding, varying: &[Feed<'_>]) -> Result<TensorMap> {
        for (name, tensor) in varying {
            self.set(binding, name, tensor)?;
        }
        if let Some(name) = binding
            .inputs
            .keys()
            .find(|name| varying.iter().all(|(given, _)| given != name))
        {
            return Err(self.mismatch(name, "a value for this run", "none"));
        }
        self.run_binding(binding)?;
        let mut result = TensorMap::new();
        for (name, slot) in &mut binding.outputs {
            let tensor = slot.fetch().map_err(|e| self.failed(&e))?;
            result.insert(name.clone(), tensor);
        }
        Ok(result)
    }

    /// Runs a binding and gives its f32 output called `wanted`.
    ///
    /// # Errors
    /// As [`Session::run_bound`], and [`crate::Error::Contract`] when there is no such output.
    pub fn run_bound_for(
        &mut self,
        binding: &mut Binding,
        varying: &[Feed<'_>],
        wanted: &str,
    ) -> Result<ndarray::ArrayD<f32>> {
        let outputs = self.run_bound(binding, varying)?;
        self.pick(outputs, wanted)
    }

    /// Puts a value into a varying input.
    fn set(&self, binding: &mut Binding, name: &str, tensor: &Tensor) -> Result<()> {
        let Some(slot) = binding.inputs.get_mut(name) else {
            return Err(self.mismatch(name, "an input that was bound as varying", "another"));
        };
        if slot.shape != tensor.shape() {
            let (want, found) = (&slot.shape, tensor.shape());
            return Err(self.mismatch(name, &format!("{want:?} as bound"), &format!("{found:?}")));
        }
        if !slot.host.fill(tensor) {
            return Err(self.too_large(name));
        }
        let sent = match &mut slot.device {
            Some(device) => slot.host.copy_into(device),
            // The processor reads the host's tensor itself; for the others it is copied when it is bound.
            None if self.provider == Provider::Cpu => Ok(()),
            None => bind_input(&mut binding.inner, name, &slot.host),
        };
        sent.map_err(|e| self.failed(&e))
    }

    /// Binds a value that stays. ONNX Runtime copies it to where the network wants it, now and not again.
    fn bind_fixed(&self, binding: &mut Binding, name: &str, tensor: &Tensor) -> Result<()> {
        let slot = self.slot(None, name, tensor)?;
        bind_input(&mut binding.inner, name, &slot.host).map_err(|e| self.failed(&e))
    }

    /// A place for an input, on the host filled with `tensor`.
    fn slot(&self, place: Option<&Allocator>, name: &str, tensor: &Tensor) -> Result<Slot> {
        let Some(port) = self.inputs.iter().find(|port| port.name == name) else {
            return Err(self.mismatch(name, "such an input", "none in the graph"));
        };
        let slot = Slot::new(place, port, tensor.shape().to_vec());
        let mut slot = slot.map_err(|e| self.failed(&e))?;
        if slot.host.fill(tensor) {
            Ok(slot)
        } else {
            Err(self.too_large(name))
        }
    }

    /// An output's dimensions, the named ones as the inputs have them.
    fn output_shape(&self, port: &Port, feeds: &[Feed<'_>]) -> Result<Vec<usize>> {
        let mut sizes = BTreeMap::new();
        for input in &self.inputs {
            let given = feeds.iter().find(|(name, _)| *name == input.name);
            let shape = given.map_or(&[][..], |(_, tensor)| tensor.shape());
            for (dim, size) in input.dims.iter().zip(shape) {
                if let Dim::Named(name) = dim {
                    sizes.insert(name.as_str(), *size);
                }
            }
        }
        let dims = port.dims.iter().map(|dim| match dim {
            Dim::Fixed(size) => Some(*size),
            Dim::Named(name) => sizes.get(name.as_str()).copied(),
        });
        dims.collect::<Option<Vec<_>>>().ok_or_else(|| {
            let wanted = "dimensions that are named in the inputs";
            self.mismatch(&port.name, wanted, "others, so it cannot be bound")
        })
    }

    /// The device that varying inputs and outputs have to lie on, if runs are captured.
    fn device(&self) -> ort::Result<Option<Allocator>> {
        if !self.captures() {
            return Ok(None);
        }
        let info = MemoryInfo::new(
            AllocationDevice::CUDA,
            0,
            AllocatorType::Device,
            MemoryType::Default,
        )?;
        Allocator::new(&self.inner, info).map(Some)
    }
}

impl Binding {
    /// Tells ONNX Runtime of every slot.
    fn connect(&mut self) -> ort::Result<()> {
        let inner = &mut self.inner;
        for (name, slot) in &mut self.inputs {
            bind_input(inner, name, slot.bound())?;
        }
        for (name, slot) in &mut self.outputs {
            match slot.bound() {
                Buffer::F32(tensor) => inner.bind_output(name, tensor)?,
                Buffer::F16(tensor) => inner.bind_output(name, tensor)?,
                Buffer::I64(tensor) => inner.bind_output(name, tensor)?,
            }
        }
        Ok(())
    }
}

fn bind_input(binding: &mut IoBinding, name: &str, buffer: &Buffer) -> ort::Result<()> {
    match buffer {
        Buffer::F32(tensor) => binding.bind_input(name, tensor),
        Buffer::F16(tensor) => binding.bind_input(name, tensor),
        Buffer::I64(tensor) => binding.bind_input(name, tensor),
    }
}

impl Slot {
    fn fetch(&mut self) -> ort::Result<Tensor> {
        if let Some(device) = &self.device {
            device.copy_into(&mut self.host)?;
        }
        self.host.read()
    }
}
