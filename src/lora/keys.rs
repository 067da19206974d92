//! What the names of a LoRA file's tensors say: the module, and the tensor's role in what changes it.
//!
//! Python twin: the suffixes that diffusers' `state_dict_utils` and `lora_conversion_utils`, PEFT and LyCORIS read.

use super::Format;

/// What a tensor is to its module, in the words of the papers: the change of a weight is `up · down`, with a `core`
/// between them for Tucker's form, the Hadamard product of two such products (LoHa), a Kronecker product (LoKr), or given
/// in full.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Role {
    Down,
    Up,
    Core,
    /// Of the up projection; added to the layer's own bias.
    UpBias,
    Alpha,
    /// LyCORIS's and kohya's magnitudes; the shape tells the axis.
    DoraScale,
    /// PEFT's magnitudes, one an output.
    Magnitude,
    Hada1Up,
    Hada1Down,
    Hada1Core,
    Hada2Up,
    Hada2Down,
    Hada2Core,
    Kron1,
    Kron1Up,
    Kron1Down,
    Kron1Core,
    Kron2,
    Kron2Up,
    Kron2Down,
    Kron2Core,
    Diff,
    DiffBias,
    /// A part of a form that is known and not supported.
    Other(&'static str),
}

/// A tensor's name, taken apart.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Key {
    /// The module, with the parts removed that old diffusers versions put around its name.
    pub(super) module: String,
    pub(super) role: Role,
    /// Whose spelling it is.
    pub(super) format: Format,
}

/// Endings of names. Where one ends in another, the longer stands first.
const ENDINGS: &[(&str, Role, Format)] = &[
    (".lora_down.weight", Role::Down, Format::Kohya),
    (".lora_up.weight", Role::Up, Format::Kohya),
    (".lora_mid.weight", Role::Core, Format::Kohya),
    (".alpha", Role::Alpha, Format::Kohya),
    (".dora_scale", Role::DoraScale, Format::Kohya),
    (".lora_A.weight", Role::Down, Format::Peft),
    (".lora_B.weight", Role::Up, Format::Peft),
    (".lora_B.bias", Role::UpBias, Format::Peft),
    (".lora_magnitude_vector", Role::Magnitude, Format::Peft),
    (
        ".lora_magnitude_vector.weight",
        Role::Magnitude,
        Format::Peft,
    ),
    ("_lora.down.weight", Role::Down, Format::DiffusersOld),
    ("_lora.up.weight", Role::Up, Format::DiffusersOld),
    (".lora.down.weight", Role::Down, Format::DiffusersOld),
    (".lora.up.weight", Role::Up, Format::DiffusersOld),
    (
        ".lora_linear_layer.down.weight",
        Role::Down,
        Format::DiffusersOld,
    ),
    (
        ".lora_linear_layer.up.weight",
        Role::Up,
        Format::DiffusersOld,
    ),
    (".hada_w1_a", Role::Hada1Up, Format::Lycoris),
    (".hada_w1_b", Role::Hada1Down, Format::Lycoris),
    (".hada_t1", Role::Hada1Core, Format::Lycoris),
    (".hada_w2_a", Role::Hada2Up, Format::Lycoris),
    (".hada_w2_b", Role::Hada2Down, Format::Lycoris),
    (".hada_t2", Role::Hada2Core, Format::Lycoris),
    (".lokr_w1", Role::Kron1, Format::Lycoris),
    (".lokr_w1_a", Role::Kron1Up, Format::Lycoris),
    (".lokr_w1_b", Role::Kron1Down, Format::Lycoris),
    (".lokr_t1", Role::Kron1Core, Format::Lycoris),
    (".lokr_w2", Role::Kron2, Format::Lycoris),
    (".lokr_w2_a", Role::Kron2Up, Format::Lycoris),
    (".lokr_w2_b", Role::Kron2Down, Format::Lycoris),
    (".lokr_t2", Role::Kron2Core, Format::Lycoris),
    (".diff", Role::Diff, Format::Lycoris),
    (".diff_b", Role::DiffBias, Format::Lycoris),
    (".w_norm", Role::Diff, Format::Lycoris),
    (".b_norm", Role::DiffBias, Format::Lycoris),
    // The next are refused by name.
    (
        ".lora_A.bias",
        Role::Other("a bias of the down projection"),
        Format::Peft,
    ),
    (
        ".lora_down.bias",
        Role::Other("a bias of the down projection"),
        Format::Kohya,
    ),
    (
        ".lora_up.bias",
        Role::Other("a bias of kohya's up projection"),
        Format::Kohya,
    ),
    (
        ".lora_embedding_A",
        Role::Other("a LoRA of an embedding table"),
        Format::Peft,
    ),
    (
        ".lora_embedding_B",
        Role::Other("a LoRA of an embedding table"),
        Format::Peft,
    ),
    (".oft_blocks", Role::Other("OFT or BOFT"), Format::Lycoris),
    (".oft_diag", Role::Other("OFT"), Format::Lycoris),
    (".oft_R.weight", Role::Other("PEFT's OFT"), Format::Peft),
    (
        ".rescale",
        Role::Other("the rescaling of OFT and BOFT"),
        Format::Lycoris,
    ),
    (".on_input", Role::Other("(IA)³"), Format::Lycoris),
    (".a1.weight", Role::Other("GLoRA"), Format::Lycoris),
    (".a2.weight", Role::Other("GLoRA"), Format::Lycoris),
    (".b1.weight", Role::Other("GLoRA"), Format::Lycoris),
    (".b2.weight", Role::Other("GLoRA"), Format::Lycoris),
    (".bm.weight", Role::Other("GLoKr"), Format::Lycoris),
    (
        ".scalar",
        Role::Other("a trained scalar of LyCORIS that its own files fold into the factors"),
        Format::Lycoris,
    ),
    (
        ".hada_w1_a.weight",
        Role::Other("PEFT's own LoHa"),
        Format::Peft,
    ),
    (
        ".set_weight",
        Role::Other("a replaced weight"),
        Format::Kohya,
    ),
    (
        ".reshape_weight",
        Role::Other("a reshaped weight"),
        Format::Kohya,
    ),
];

/// Layers of attention as the processors of old diffusers versions called them, in the UNet and in the text encoders.
const OLD_UNET: &[(&str, &str)] = &[
    (".to_q", ".to_q"),
    (".to_k", ".to_k"),
    (".to_v", ".to_v"),
    (".to_out", ".to_out.0"),
];
const OLD_TEXT: &[(&str, &str)] = &[
    (".to_q", ".q_proj"),
    (".to_k", ".k_proj"),
    (".to_v", ".v_proj"),
    (".to_out", ".out_proj"),
];

impl Role {
    /// How a format ends the name of such a tensor.
    pub(super) fn spelling(self, format: Format) -> &'static str {
        let mut spelled = ENDINGS.iter().filter(|(_, role, _)| *role == self);
        let own = spelled.clone().find(|(.., of)| *of == format);
        own.or_else(|| spelled.next())
            .map_or("", |(ending, ..)| ending.trim_start_matches(['.', '_']))
    }
}

impl Key {
    /// Takes a name apart; `None` if it is not that of a LoRA's tensor.
    pub(super) fn of(name: &str) -> Option<Self> {
        let (ending, role, format) = ENDINGS.iter().find(|(ending, ..)| name.ends_with(ending))?;
        let module = &name[..name.len() - ending.len()];
        if module.is_empty() {
            return None;
        }
        let old = ending.starts_with("_lora.") || *role == Role::Magnitude;
        Some(Self {
            module: if old {
                renewed(module)
            } else {
                module.to_owned()
            },
            role: *role,
            format: *format,
        })
    }
}

/// A module's name from one that names a processor's layer: `….attn2.processor.to_out` is `….attn2.to_out.0`.
fn renewed(module: &str) -> String {
    let table = if module.contains(".self_attn.") {
        OLD_TEXT
    } else {
        OLD_UNET
    };
    for (from, to) in table {
        if let Some(rest) = module.strip_suffix(from) {
            let rest = rest.strip_suffix(".processor").unwrap_or(rest);
            return format!("{rest}{to}");
        }
    }
    module.to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_ending_hides_another() {
        for (at, (ending, ..)) in ENDINGS.iter().enumerate() {
            let first = ENDINGS.iter().position(|(e, ..)| ending.ends_with(e));
            assert_eq!(first, Some(at), "{ending}");
        }
    }

    #[test]
    fn old_names_become_new_ones() {
        for (name, module) in [
            (
                "unet.a.attn2.processor.to_k_lora.down.weight",
                "unet.a.attn2.to_k",
            ),
            (
                "unet.a.attn2.processor.to_out_lora.up.weight",
                "unet.a.attn2.to_out.0",
            ),
            ("unet.a.attn2.to_k.lora.up.weight", "unet.a.attn2.to_k"),
            (
                "unet.a.attn2.to_out.lora_magnitude_vector",
                "unet.a.attn2.to_out.0",
            ),
            (
                "text_encoder.text_model.encoder.layers.0.self_attn.to_out_lora.up.weight",
                "text_encoder.text_model.encoder.layers.0.self_attn.out_proj",
            ),
            (
                "text_encoder.text_model.encoder.layers.0.self_attn.q_proj.lora_linear_layer.up.weight",
                "text_encoder.text_model.encoder.layers.0.self_attn.q_proj",
            ),
        ] {
            assert_eq!(
                Key::of(name).map(|k| k.module).as_deref(),
                Some(module),
                "{name}"
            );
        }
    }
}
