//! LoRAs on a whole model in one file: they change what they change in the diffusers layout, bit for bit, through names,
//! slices (the second encoder's fused projections), transposes (its `text_projection`) and expansions.

use std::path::Path;

use tronie::memory::MemoryMode;
use tronie::request::LoraUse;
use tronie::weights::ExpansionCache;
use tronie::{Output, Request};

use crate::original_layout::Whole;
use crate::safetensors_file::{f32_bytes, well_formed};
use crate::{MODELS, ROOT, Shop, paint, pipeline, plain, request, same};

/// In kohya's names, of both spellings of blocks, and PEFT's with convolutions, patterns of ranks and text encoders.
const LORAS: [&str; 4] = [
    "tests/golden/tiny/loras/tiny-kohya.safetensors",
    "tests/golden/lora/kohya-original-blocks.safetensors",
    "tests/golden/lora/kohya-diffusers-blocks.safetensors",
    "tests/golden/lora/peft-metadata.safetensors",
];

fn with(model: &str, loras: &[(&str, f64)], memory: MemoryMode) -> Request {
    let uses = loras.iter().map(|(lora, scale)| LoraUse {
        lora: (*lora).to_owned(),
        scale: *scale,
        te_scale: None,
    });
    Request {
        loras: Some(uses.collect()),
        memory: Some(memory),
        ..request(model)
    }
}

/// A kohya file that changes what lies transposed in the original layout.
fn projection(shop: &Shop) -> String {
    let tiny = Path::new(ROOT).join("tests/models/tiny/text_encoder_2/model.safetensors");
    let weights = tronie::weights::Weights::open(&[tiny]).unwrap();
    let [outputs, inputs] = *weights.shape("text_projection.weight").unwrap() else {
        panic!("no matrix");
    };
    let wave = |count: usize| f32_bytes(&(0..count).map(|i| (i as f32).sin()).collect::<Vec<_>>());
    let (up, down) = (wave(outputs), wave(inputs));
    let name = "lora_te2_text_projection";
    let file = well_formed(
        &[
            (&format!("{name}.lora_up.weight"), "F32", &[outputs, 1], &up),
            (
                &format!("{name}.lora_down.weight"),
                "F32",
                &[1, inputs],
                &down,
            ),
        ],
        0,
    );
    let path = shop.path("projection.safetensors");
    std::fs::write(&path, file).unwrap();
    path.to_str().unwrap().to_owned()
}

#[test]
fn loras_change_a_file_as_they_change_its_weights_in_the_diffusers_layout() {
    let shop = Shop::new();
    let projection = projection(&shop);
    let paths = LORAS.map(|lora| Path::new(ROOT).join(lora).to_str().unwrap().to_owned());
    let [kohya, original, diffusers, peft] = paths.each_ref().map(String::as_str);
    let (narrow, mut mixed) = (Whole::of("tiny"), Whole::of("tiny"));
    mixed.widen("conditioner.embedders.1");
    mixed.widen("model.diffusion_model.middle_block");
    let files = [("f16", &narrow), ("mixed", &mixed)]
        .map(|(name, whole)| (name, shop.saved(&format!("{name}.safetensors"), whole)));
    let models = Path::new(ROOT).join("tests/models/models.yaml");
    let cache = ExpansionCache::at(shop.path("cache")).with_smallest(1);
    let sets: [&[(&str, f64)]; 5] = [
        &[(kohya, 0.8)],
        &[(original, -0.5)],
        &[(projection.as_str(), 0.4)],
        &[(diffusers, 0.3), (peft, 0.2)],
        &[
            (kohya, 0.7),
            (original, 0.2),
            (peft, -0.1),
            (projection.as_str(), 0.1),
        ],
    ];
    let mut painted: Vec<Output> = vec![paint(&plain(), &request("tiny")).unwrap()];
    for (loras, memory) in sets.iter().zip(MemoryMode::ALL.into_iter().cycle()) {
        let wanted = paint(&plain(), &with("tiny", loras, memory)).unwrap();
        let is_new = |other: &Output| other.handoff.latents != wanted.handoff.latents;
        assert!(painted.iter().all(is_new), "{loras:?} change nothing");
        for (name, file) in &files {
            let given = with(file, loras, memory);
            let label = format!("{name}, {memory}, {loras:?}");
            same(&paint(&plain(), &given).unwrap(), &wanted, &label);
            let found = paint(&pipeline(&models, cache.clone()), &given).unwrap();
            same(&found, &wanted, &format!("{label}, expanded"));
        }
        painted.push(wanted);
    }
}

#[test]
fn an_overlay_of_a_file_is_its_loras() {
    let shop = Shop::new();
    shop.tiny();
    let kohya = Path::new(ROOT).join(LORAS[0]);
    let kohya = kohya.to_str().unwrap();
    let model = ["--models", MODELS, "--model", "tiny.safetensors"];
    let merge = ["lora", "merge", "--lora", kohya, "-o", "merged.safetensors"];
    shop.tronie(&[&merge[..], &model].concat());
    let overlay = shop.path("merged.safetensors");
    let file = shop.path("tiny.safetensors");
    let (file, overlay) = (file.to_str().unwrap(), overlay.to_str().unwrap());
    let memory = MemoryMode::Balanced;
    let wanted = paint(&plain(), &with("tiny", &[(kohya, 1.0)], memory)).unwrap();
    let found = paint(&plain(), &with(file, &[(overlay, 1.0)], memory)).unwrap();
    same(&found, &wanted, "overlay");
    // In the diffusers layout it is another base, file by file.
    let told = paint(&plain(), &with("tiny", &[(overlay, 1.0)], memory)).unwrap_err();
    assert!(told.to_string().contains("overlay of another"), "{told}");
}
