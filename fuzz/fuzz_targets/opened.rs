//! A file from anywhere, opened as a LoRA, fitted to a small model, and merged.

use std::collections::BTreeMap;

use tronie::lora::LoraFile;
use tronie::weights::Weights;

/// A model whose modules have the names that the corpus names, all of 4 × 4 values.
fn model() -> Weights {
    let names = [
        "conv_in",
        "down_blocks.0.resnets.0.conv1",
        "mid_block.attentions.0.proj_in",
        "mid_block.attentions.0.transformer_blocks.0.attn2.to_k",
    ];
    let entries: Vec<_> = (names.iter().enumerate())
        .map(|(k, name)| {
            let (from, to) = (64 * k, 64 * (k + 1));
            format!(
                r#""{name}.weight":{{"dtype":"F32","shape":[4,4],"data_offsets":[{from},{to}]}}"#
            )
        })
        .collect();
    let header = format!("{{{}}}", entries.join(","));
    let data = 0.5_f32.to_le_bytes().repeat(16 * names.len());
    let file = [
        &(header.len() as u64).to_le_bytes(),
        header.as_bytes(),
        &data,
    ]
    .concat();
    Weights::from_bytes("model", file).unwrap()
}

/// Opens, fits and merges; whether anything was merged.
pub fn check(bytes: Vec<u8>) -> bool {
    let Ok(lora) = LoraFile::from_bytes("fuzzed", bytes) else {
        return false;
    };
    lora.triggers();
    let model = model();
    let fit = lora.fit(&BTreeMap::from([("unet".to_owned(), &model)]));
    let mut merged = false;
    for matched in fit.matched {
        let base = model.tensor_f32(&matched.tensor, matched.shape()).unwrap();
        merged |= matched.delta(&base).is_ok();
        let _ = matched.low_rank();
    }
    merged
}
