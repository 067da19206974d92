//! The tiny models as one file in the original layout, whole or spoilt.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use half::f16;
use tronie::weights::{UnetNames, Weights};

use crate::safetensors_file::{f32_bytes, raw, well_formed};

/// A tensor on its way into a file.
#[derive(Debug, Clone, PartialEq)]
pub struct Stored {
    pub dtype: &'static str,
    pub shape: Vec<usize>,
    pub bytes: Vec<u8>,
}

/// A file's tensors and its metadata.
#[derive(Debug, Clone, Default)]
pub struct Whole {
    pub tensors: BTreeMap<String, Stored>,
    pub metadata: Option<(&'static str, &'static str)>,
}

impl Stored {
    fn new(dtype: &'static str, shape: &[usize], bytes: &[u8]) -> Self {
        Self {
            dtype,
            shape: shape.to_vec(),
            bytes: bytes.to_vec(),
        }
    }

    /// The same values, which are f16, as f32.
    pub fn widened(&self) -> Self {
        let (values, _) = self.bytes.as_chunks::<2>();
        let wide = values.iter().map(|v| f16::from_le_bytes(*v).to_f32());
        Self::new("F32", &self.shape, &f32_bytes(&wide.collect::<Vec<_>>()))
    }
}

impl Whole {
    /// The model in the folder `name` of `models`.
    pub fn of(name: &str) -> Self {
        let root = Path::new(env!("CARGO_MANIFEST_DIR"))
            .join("tests/models")
            .join(name);
        let mut whole = Self::default();
        let unet = read(&root.join("unet/diffusion_pytorch_model.safetensors"));
        let names = UnetNames::of(unet.keys().map(String::as_str));
        for (name, stored) in &unet {
            let original = names.original(name).unwrap();
            whole.add("model.diffusion_model", &original, stored.clone());
        }
        for (name, stored) in read(&root.join("vae/diffusion_pytorch_model.safetensors")) {
            let (name, stored) = vae(&name, stored);
            whole.add("first_stage_model", &name, stored);
        }
        let first = root.join("text_encoder/model.safetensors");
        let mut prefix = "conditioner.embedders.0";
        if first.is_file() {
            for (name, stored) in read(&first) {
                let name = format!("transformer.text_model.{name}");
                whole.add(prefix, &name, stored);
            }
            prefix = "conditioner.embedders.1";
        }
        let second = read(&root.join("text_encoder_2/model.safetensors"));
        for (name, stored) in open_clip(&second) {
            whole.add(&format!("{prefix}.model"), &name, stored);
        }
        // What published files have beside the components.
        let positions = Stored::new("I64", &[1, 1], &[0; 8]);
        let ids = "conditioner.embedders.0.transformer.text_model.embeddings.position_ids";
        whole.tensors.insert(ids.into(), positions);
        whole.mark("model_ema.decay");
        whole
    }

    fn add(&mut self, prefix: &str, name: &str, stored: Stored) {
        self.tensors.insert(format!("{prefix}.{name}"), stored);
    }

    /// Adds a tensor without values.
    pub fn mark(&mut self, name: &str) {
        let empty = Stored::new("F16", &[0], &[]);
        self.tensors.insert(name.to_owned(), empty);
    }

    /// Keeps tensors of some names.
    pub fn retain(&mut self, keep: impl Fn(&str) -> bool) {
        self.tensors.retain(|name, _| keep(name));
    }

    /// Calls tensors otherwise; those that become nothing go.
    pub fn rename(&mut self, new: impl Fn(&str) -> Option<String>) {
        let tensors = std::mem::take(&mut self.tensors).into_iter();
        self.tensors = tensors
            .filter_map(|(name, stored)| Some((new(&name)?, stored)))
            .collect();
    }

    /// Widens the tensors whose names begin so to f32.
    pub fn widen(&mut self, prefix: &str) {
        for (name, stored) in &mut self.tensors {
            if name.starts_with(prefix) && stored.dtype == "F16" {
                *stored = stored.widened();
            }
        }
    }

    pub fn save(&self, path: &Path) -> PathBuf {
        let tensors = self.tensors.iter();
        let tensors = tensors.map(|(name, s)| (name.as_str(), s.dtype, &s.shape[..], &s.bytes[..]));
        let mut file = well_formed(&tensors.collect::<Vec<_>>(), 0);
        if let Some((key, value)) = self.metadata {
            let (length, rest) = file.split_first_chunk::<8>().unwrap();
            let (header, data) = rest.split_at(u64::from_le_bytes(*length) as usize);
            let header = std::str::from_utf8(header).unwrap();
            let more = format!(r#"{{"__metadata__":{{"{key}":"{value}"}},"#);
            file = raw(&header.replacen('{', &more, 1), data);
        }
        std::fs::write(path, file).unwrap();
        path.to_owned()
    }
}

fn read(file: &Path) -> BTreeMap<String, Stored> {
    let weights = Weights::open(&[file]).unwrap();
    let names = weights.names();
    let stored = |name: &str| {
        let view = weights.get(name).unwrap();
        Stored::new("F16", view.shape, view.bytes)
    };
    names.map(|name| (name.to_owned(), stored(name))).collect()
}

fn vae(name: &str, mut stored: Stored) -> (String, Stored) {
    const NAMES: &[(&str, &str)] = &[
        ("mid_block.resnets.0.", "mid.block_1."),
        ("mid_block.resnets.1.", "mid.block_2."),
        ("mid_block.attentions.0.group_norm.", "mid.attn_1.norm."),
        ("mid_block.attentions.0.to_out.0.", "mid.attn_1.proj_out."),
        ("mid_block.attentions.0.to_", "mid.attn_1."),
        ("conv_norm_out.", "norm_out."),
        ("conv_shortcut.", "nin_shortcut."),
        ("down_blocks.", "down."),
        ("up_blocks.0.", "up.3."),
        ("up_blocks.1.", "up.2."),
        ("up_blocks.2.", "up.1."),
        ("up_blocks.3.", "up.0."),
        (".resnets.", ".block."),
        (".downsamplers.0.", ".downsample."),
        (".upsamplers.0.", ".upsample."),
    ];
    if name.contains("attentions") && stored.shape.len() == 2 {
        stored.shape.extend([1, 1]);
    }
    let mut original = name.to_owned();
    for (from, to) in NAMES {
        let replaced = original.replacen(from, to, 1);
        // The decoder's blocks are numbered once.
        let done = original.contains("decoder.up.") && from.starts_with("up_blocks");
        original = if done { original } else { replaced };
    }
    (original, stored)
}

fn open_clip(tensors: &BTreeMap<String, Stored>) -> BTreeMap<String, Stored> {
    const NAMES: &[(&str, &str)] = &[
        ("text_model.embeddings.token_embedding", "token_embedding"),
        (
            "text_model.embeddings.position_embedding.weight",
            "positional_embedding",
        ),
        ("text_model.final_layer_norm", "ln_final"),
        ("text_model.encoder.layers.", "transformer.resblocks."),
        ("layer_norm1", "ln_1"),
        ("layer_norm2", "ln_2"),
        ("self_attn.out_proj", "attn.out_proj"),
        ("self_attn.q_proj.", "attn.in_proj_"),
        ("mlp.fc1", "mlp.c_fc"),
        ("mlp.fc2", "mlp.c_proj"),
    ];
    let mut found = BTreeMap::new();
    for (name, stored) in tensors {
        let (mut original, mut stored) = (name.clone(), stored.clone());
        for (from, to) in NAMES {
            original = original.replacen(from, to, 1);
        }
        if name == "text_projection.weight" {
            "text_projection".clone_into(&mut original);
            let [rows, columns] = stored.shape[..] else {
                panic!("no matrix");
            };
            let (values, _) = stored.bytes.as_chunks::<2>();
            let column =
                |column: usize| (0..rows).flat_map(move |row| values[row * columns + column]);
            stored.bytes = (0..columns).flat_map(column).collect();
            stored.shape.reverse();
        } else if name.contains("k_proj") || name.contains("v_proj") {
            continue;
        } else if name.contains("q_proj") {
            for other in ["k_proj", "v_proj"] {
                stored
                    .bytes
                    .extend(&tensors[&name.replace("q_proj", other)].bytes);
            }
            stored.shape[0] *= 3;
        }
        found.insert(original, stored);
    }
    found
}
