//! LoRA files in every form: the weights that they make of `tests/models/tiny` are those of diffusers, PEFT and LyCORIS, and
//! plain ones obey the algebra of sums.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use crate::safetensors_file::{f32_bytes, well_formed};
use proptest::prelude::*;
use tronie::lora::{Axis, Form, Format, LoraFile, Matched, change};
use tronie::model_file::ModelFile;
use tronie::weights::Weights;

/// Tensors of f32 values.
type Tensors<'a> = &'a [(&'a str, &'a [usize], &'a [f32])];

fn file(tensors: Tensors<'_>) -> Vec<u8> {
    let bytes: Vec<_> = tensors.iter().map(|(.., v)| f32_bytes(v)).collect();
    let entries = tensors.iter().zip(&bytes);
    let entries: Vec<_> = entries
        .map(|((name, shape, _), bytes)| (*name, "F32", *shape, bytes.as_slice()))
        .collect();
    well_formed(&entries, 0)
}

fn root(path: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join(path)
}

fn golden(name: &str) -> PathBuf {
    root("tests/golden/lora").join(name)
}

fn opened(name: &str) -> LoraFile {
    LoraFile::open(&ModelFile::from(&golden(name))).unwrap()
}

/// The tiny model's components, which LoRAs change.
fn tiny() -> BTreeMap<String, Weights> {
    [
        ("unet", "unet/diffusion_pytorch_model.safetensors"),
        ("text_encoder", "text_encoder/model.safetensors"),
        ("text_encoder_2", "text_encoder_2/model.safetensors"),
    ]
    .map(|(component, path)| {
        let path = root("tests/models/tiny").join(path);
        (component.to_owned(), Weights::open(&[path]).unwrap())
    })
    .into()
}

fn targets(model: &BTreeMap<String, Weights>) -> BTreeMap<String, &Weights> {
    model.iter().map(|(k, w)| (k.clone(), w)).collect()
}

fn fitted(lora: &LoraFile, model: &BTreeMap<String, Weights>) -> Vec<Matched> {
    let fit = lora.fit(&targets(model));
    assert_eq!(fit.unmatched, []);
    fit.matched
}

/// Applies files at scales, and returns the names of what they change, component first.
fn applied(model: &mut BTreeMap<String, Weights>, uses: &[(LoraFile, f64)]) -> BTreeSet<String> {
    let mut names = BTreeSet::new();
    let mut changes = Vec::new();
    for (lora, scale) in uses {
        changes.extend(fitted(lora, model).into_iter().map(|m| (m, *scale)));
    }
    changes.sort_by_key(|(matched, _)| matched.commutes());
    for (matched, scale) in changes {
        let (component, tensor) = (matched.component.clone(), matched.tensor.clone());
        names.insert(format!("{component}.{tensor}"));
        let weights = model.get_mut(&component).unwrap();
        weights
            .change(&tensor, change(Arc::new(matched), scale))
            .unwrap();
    }
    names
}

fn merged(model: &BTreeMap<String, Weights>, name: &str) -> Vec<f32> {
    let (component, tensor) = name.split_once('.').unwrap();
    let weights = &model[component];
    let shape = weights.shape(tensor).unwrap();
    weights
        .tensor_f32(tensor, shape)
        .unwrap()
        .as_slice()
        .to_vec()
}

/// The largest difference, in units of the largest value.
fn apart(found: &[f32], expected: &[f32]) -> f32 {
    let largest = expected.iter().fold(0.0_f32, |l, v| l.max(v.abs()));
    let pairs = found.iter().zip(expected);
    assert_eq!(found.len(), expected.len());
    pairs.map(|(a, b)| (a - b).abs()).fold(0.0, f32::max) / largest
}

fn compare_with_reference(case: &str) -> Vec<String> {
    let mut faults = Vec::new();
    let reference = Weights::open(&[golden(case)]).unwrap();
    let uses: Vec<(String, f64)> = serde_json::from_str(&reference.metadata()["uses"]).unwrap();
    let uses: Vec<_> = uses.into_iter().map(|(f, s)| (opened(&f), s)).collect();
    let mut model = tiny();
    let changed = applied(&mut model, &uses);
    let expected: BTreeSet<_> = reference.names().map(str::to_owned).collect();
    assert_eq!(changed, expected, "{case}");
    for name in changed {
        let shape = reference.shape(&name).unwrap();
        let expected = reference.tensor_f32(&name, shape).unwrap();
        let apart = apart(&merged(&model, &name), expected.as_slice());
        if apart > 1e-6 {
            faults.push(format!("{case}, {name}: {apart:e} apart"));
        }
    }
    faults
}

#[test]
fn merged_weights_are_those_of_the_reference() {
    let (mut count, mut faults) = (0, Vec::new());
    for entry in std::fs::read_dir(golden("")).unwrap() {
        let name = entry.unwrap().file_name().into_string().unwrap();
        if name.ends_with(".merged.safetensors") {
            faults.extend(compare_with_reference(&name));
            count += 1;
        }
    }
    assert!(faults.is_empty(), "{faults:#?}");
    assert!(count >= 21, "{count} cases");
}

#[test]
fn formats_and_forms_are_told() {
    use Form::{Bias, Conv, Full, Linear, Loha, Lokr, Tucker};

    let model = tiny();
    let told = |name: &str| {
        let lora = opened(name);
        let forms: BTreeSet<_> = fitted(&lora, &model).into_iter().map(|m| m.form).collect();
        (lora.format(), Vec::from_iter(forms))
    };
    for (name, format, forms) in [
        ("peft-plain", Format::Peft, vec![Linear]),
        ("peft-bias", Format::Peft, vec![Linear, Bias]),
        ("diffusers-old", Format::DiffusersOld, vec![Linear]),
        ("kohya-original-blocks", Format::Kohya, vec![Linear, Conv]),
        ("lycoris-tucker", Format::Kohya, vec![Linear, Tucker]),
        ("lycoris-loha-tucker", Format::Lycoris, vec![Loha]),
        ("lycoris-lokr-both", Format::Lycoris, vec![Lokr]),
        ("lycoris-full", Format::Lycoris, vec![Full, Bias]),
    ] {
        assert_eq!(
            told(&format!("{name}.safetensors")),
            (format, forms),
            "{name}"
        );
    }
    let axis = |name: &str| fitted(&opened(name), &model)[0].dora;
    assert_eq!(axis("peft-dora.safetensors"), Some(Axis::Output));
    assert_eq!(axis("lycoris-dora-input.safetensors"), Some(Axis::Input));
    assert_eq!(axis("lycoris-loha.safetensors"), None);
}

#[test]
fn ranks_and_alphas_are_those_of_each_module() {
    let model = tiny();
    let told: BTreeMap<_, _> = fitted(&opened("peft-metadata.safetensors"), &model)
        .into_iter()
        .map(|m| (m.tensor.clone(), (m.rank, m.alpha, m.factor())))
        .collect();
    let block = "down_blocks.1.attentions.0.transformer_blocks.0";
    let of = |name: &str| told[name];
    assert_eq!(
        of(&format!("{block}.attn2.to_k.weight")),
        (Some(4), Some(5.0), 1.25)
    );
    assert_eq!(
        of(&format!("{block}.ff.net.2.weight")),
        (Some(2), Some(3.0), 1.5)
    );
    assert_eq!(
        of("down_blocks.0.resnets.1.conv1.weight"),
        (Some(2), Some(1.0), 0.5)
    );
    assert_eq!(
        of("encoder.layers.0.mlp.fc1.weight"),
        (Some(2), Some(5.0), 2.5)
    );
}

#[test]
fn a_scale_of_zero_changes_no_bit() {
    let (mut model, base) = (tiny(), tiny());
    let names = ["peft-dora", "kohya-original-blocks", "lycoris-lokr"];
    let uses = names.map(|name| (opened(&format!("{name}.safetensors")), 0.0));
    for name in applied(&mut model, &uses) {
        let bits = |m| {
            merged(m, &name)
                .into_iter()
                .map(f32::to_bits)
                .collect::<Vec<_>>()
        };
        assert_eq!(bits(&model), bits(&base), "{name}");
    }
}

#[test]
fn deltas_are_what_is_added() {
    let base = tiny();
    for name in [
        "lycoris-loha",
        "lycoris-dora",
        "lycoris-dora-input",
        "peft-bias",
    ] {
        let lora = opened(&format!("{name}.safetensors"));
        let mut model = tiny();
        for matched in fitted(&lora, &base) {
            let weights = &base[&matched.component];
            let unchanged = weights
                .tensor_f32(&matched.tensor, matched.shape())
                .unwrap();
            let delta = matched.delta(&unchanged).unwrap();
            let sum: Vec<_> = unchanged
                .as_slice()
                .iter()
                .zip(delta)
                .map(|(a, b)| a + b)
                .collect();
            let low_rank = matched.low_rank().unwrap();
            assert_eq!(
                low_rank.is_some(),
                matched.form == Form::Linear && matched.commutes()
            );
            let (component, tensor) = (matched.component.clone(), matched.tensor.clone());
            let weights = model.get_mut(&component).unwrap();
            weights
                .change(&tensor, change(Arc::new(matched), 1.0))
                .unwrap();
            let name = format!("{component}.{tensor}");
            assert!(apart(&sum, &merged(&model, &name)) <= 1e-6, "{name}");
        }
    }
}

/// Kohya's trainer and diffusers with older transformers say `text_model.`, which the tiny's first encoder does not.
#[test]
fn text_encoders_are_found_under_every_name() {
    let model = tiny();
    for (name, component, tensor) in [
        (
            "lora_te2_text_projection",
            "text_encoder_2",
            "text_projection.weight",
        ),
        (
            "text_encoder_2.text_projection",
            "text_encoder_2",
            "text_projection.weight",
        ),
        (
            "lora_te1_text_model_encoder_layers_1_mlp_fc2",
            "text_encoder",
            "encoder.layers.1.mlp.fc2.weight",
        ),
        (
            "text_encoder.encoder.layers.1.mlp.fc2",
            "text_encoder",
            "encoder.layers.1.mlp.fc2.weight",
        ),
        (
            "lora_te2_encoder_layers_1_self_attn_out_proj",
            "text_encoder_2",
            "text_model.encoder.layers.1.self_attn.out_proj.weight",
        ),
    ] {
        let shape = model[component].shape(tensor).unwrap();
        let (down, up) = (vec![0.5; shape[1]], vec![0.5; shape[0]]);
        let [a, b] = ["lora_down.weight", "lora_up.weight"].map(|end| format!("{name}.{end}"));
        let tensors: Tensors<'_> = &[(&a, &[1, shape[1]], &down), (&b, &[shape[0], 1], &up)];
        let lora = LoraFile::from_bytes("lora", file(tensors)).unwrap();
        let matched = fitted(&lora, &model);
        let found = (matched[0].component.as_str(), matched[0].tensor.as_str());
        assert_eq!(found, (component, tensor), "{name}");
    }
}

#[test]
fn what_the_model_lacks_is_told_module_by_module() {
    let model = tiny();
    let lora = LoraFile::from_bytes(
        "lora",
        file(&[
            (
                "lora_unet_mid_block_attentions_7_proj_in.lora_down.weight",
                &[1, 2],
                &[1.0; 2],
            ),
            (
                "lora_unet_mid_block_attentions_7_proj_in.lora_up.weight",
                &[2, 1],
                &[1.0; 2],
            ),
            ("unet.conv_in.lora_A.weight", &[1, 5, 3, 3], &[1.0; 45]),
            ("unet.conv_in.lora_B.weight", &[8, 1, 1, 1], &[1.0; 8]),
            ("unet.conv_out.oft_diag", &[1], &[1.0]),
            ("bundle_emb.word.clip_l", &[2], &[1.0; 2]),
        ]),
    )
    .unwrap();
    let fit = lora.fit(&targets(&model));
    assert!(fit.matched.is_empty());
    let told: Vec<_> = fit
        .unmatched
        .iter()
        .map(|u| (u.module.as_str(), u.reason.as_str()))
        .collect();
    assert_eq!(
        told,
        [
            (
                "bundle_emb.word.clip_l",
                "is not the name of a LoRA's tensor"
            ),
            (
                "lora_unet_mid_block_attentions_7_proj_in",
                "is not in the model"
            ),
            (
                "unet.conv_in",
                "changes a tensor of 8 × 45 values and kernel [3, 3], and the model's has shape [8, 4, 3, 3]: it is made \
                 for another model"
            ),
            ("unet.conv_out", "is OFT, which is not supported"),
        ]
    );
}

#[test]
fn trigger_words_come_from_the_metadata() {
    let lora = opened("kohya-diffusers-blocks.safetensors");
    let told: Vec<_> = lora
        .triggers()
        .into_iter()
        .map(|t| (t.phrase, t.source, t.count))
        .collect();
    assert_eq!(
        told,
        [("sks tronie".into(), "ss_dataset_dirs".into(), Some(4))]
    );
    assert!(opened("peft-plain.safetensors").triggers().is_empty());
    let header = r#"{"__metadata__":{"modelspec.trigger_phrase":"a tok man","instance_prompt":"a tok man","ss_dataset_dirs":"broken",
        "ss_reg_dataset_dirs":"{\"1_men\":{\"n_repeats\":1,\"img_count\":99}}",
        "ss_tag_frequency":"{\"10_tok\":{\"man\":3,\" hat\":9},\"1_reg\":{\"hat\":1},\"1_men\":{\"men\":99}}"},
        "unet.conv_in.lora_A.weight":{"dtype":"F32","shape":[1,1],"data_offsets":[0,4]},
        "unet.conv_in.lora_B.weight":{"dtype":"F32","shape":[1,1],"data_offsets":[4,8]}}"#;
    let lora = LoraFile::from_bytes("lora", crate::safetensors_file::raw(header, &[0; 8])).unwrap();
    let told: Vec<_> = lora
        .triggers()
        .into_iter()
        .map(|t| (t.phrase, t.count))
        .collect();
    assert_eq!(
        told,
        [
            ("a tok man".into(), None),
            ("hat".into(), Some(10)),
            ("man".into(), Some(3))
        ]
    );
}

const TENSOR: &str = "mid_block.attentions.0.proj_in.weight";
const MODULE: &str = "lora_unet_middle_block_1_proj_in";

/// A LoRA of one module of shape [4, 6].
fn plain(up: &[f32], down: &[f32], alpha: f32) -> LoraFile {
    let rank = down.len() / 6;
    let [d, u, a] =
        ["lora_down.weight", "lora_up.weight", "alpha"].map(|end| format!("{MODULE}.{end}"));
    let tensors: Tensors<'_> = &[
        (&d, &[rank, 6], down),
        (&u, &[4, rank], up),
        (&a, &[1], &[alpha]),
    ];
    LoraFile::from_bytes("lora", file(tensors)).unwrap()
}

fn merge(base: &[f32], uses: &[(LoraFile, f64)]) -> Vec<f32> {
    let weights = Weights::from_bytes("unet", file(&[(TENSOR, &[4, 6], base)])).unwrap();
    let mut model = BTreeMap::from([("unet".to_owned(), weights)]);
    applied(&mut model, uses);
    merged(&model, &format!("unet.{TENSOR}"))
}

fn values(count: usize) -> impl Strategy<Value = Vec<f32>> {
    proptest::collection::vec(-2.0_f32..2.0, count)
}

proptest! {
    #[test]
    fn plain_loras_commute_and_are_one_of_joined_factors(
        base in values(24),
        (up1, down1, up2, down2) in (values(8), values(12), values(12), values(18)),
        (alpha1, alpha2) in (0.1_f32..8.0, 0.1_f32..8.0),
        (m1, m2) in (-2.0_f64..2.0, -2.0_f64..2.0),
    ) {
        let first = || (plain(&up1, &down1, alpha1), m1);
        let second = || (plain(&up2, &down2, alpha2), m2);
        let together = merge(&base, &[first(), second()]);
        let largest = together.iter().fold(20.0_f32, |l, v| l.max(v.abs()));
        let other = merge(&base, &[second(), first()]);
        let joined_up: Vec<f32> = up1.chunks(2).zip(up2.chunks(3)).flat_map(|(a, b)| {
            let a = a.iter().map(|v| v * (m1 * f64::from(alpha1) / 2.0) as f32);
            let b = b.iter().map(|v| v * (m2 * f64::from(alpha2) / 3.0) as f32);
            a.chain(b).collect::<Vec<_>>()
        }).collect();
        let joined = merge(&base, &[(plain(&joined_up, &[down1, down2].concat(), 5.0), 1.0)]);
        for (together, (other, joined)) in together.iter().zip(other.iter().zip(&joined)) {
            prop_assert!((together - other).abs() <= 1e-6 * largest);
            prop_assert!((together - joined).abs() <= 2e-6 * largest);
        }
    }

    #[test]
    fn strength_is_linear(base in values(24), up in values(8), down in values(12), m in -3.0_f64..3.0) {
        let one = merge(&base, &[(plain(&up, &down, 1.0), 1.0)]);
        let scaled = merge(&base, &[(plain(&up, &down, 1.0), m)]);
        for ((base, one), scaled) in base.iter().zip(one).zip(scaled) {
            let expected = f64::from(*base) + m * (f64::from(one) - f64::from(*base));
            prop_assert!((f64::from(scaled) - expected).abs() <= 2e-5);
        }
    }
}
