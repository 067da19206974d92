//! Graphs that compute in f16, and inputs that stay bound from run to run, with the real library on the processor.
//!
//! The processor has no kernels for f16 nor for the CUDA provider's fused operators: ONNX Runtime widens around each
//! node, and `tests/golden/half` holds the tiny UNet of the `cuda` dialect with those operators spelt out, as
//! `export/golden/half.py` makes it. What is proved here is everything but the kernels: types, weights, ports, binding.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

#[path = "support/onnx_model.rs"]
mod onnx_model;

use std::path::{Path, PathBuf};

use ndarray::{Array1, Array2, ArrayD, IxDyn};
use onnx_model::{Message, external, model, opset, port, tensor, text};
use tronie::graph::{ConstantType, Graph, PortType, WeightType};
use tronie::memory::MemoryMode;
use tronie::noise::Noise;
use tronie::pipeline::{Options, Pipeline};
use tronie::request::Request;
use tronie::runtime::{Feed, Runtime, Session};
use tronie::tensor::{Latents, Tensor, TensorMap};
use tronie::weights::Weights;
use tronie::{Cancel, Control, Error, Provider};

fn root() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR"))
}

fn runtime() -> Runtime {
    Runtime::open(None, Provider::Cpu, Some(1), Cancel::default()).unwrap()
}

fn session(runtime: &Runtime, graph: &str, component: &str, weights: &str) -> Session {
    let graph = Graph::load(root().join(graph)).unwrap();
    let weights = Weights::open(&[root().join("tests/models/tiny").join(weights)]).unwrap();
    runtime
        .session(component, &graph, &weights, MemoryMode::Balanced)
        .unwrap()
}

const UNET: &str = "unet/diffusion_pytorch_model.safetensors";
const FUSED: &str = "tests/models/graphs/tiny/unet.fused.onnx.gz";
const HALF: &str = "tests/golden/half/unet.onnx.gz";

fn noise(seed: u64, shape: &[usize]) -> Tensor {
    let count = shape.iter().product();
    let values = Noise::new(seed).normal([1, 1, 1, count]);
    Tensor::from(ArrayD::from_shape_vec(IxDyn(shape), values.into_raw_vec_and_offset().0).unwrap())
}

/// What the tiny UNet is told over a whole segment.
fn told(rows: usize, tokens: usize) -> Vec<(&'static str, Tensor)> {
    vec![
        ("text_embeds", noise(2, &[rows, 20])),
        (
            "time_ids",
            Tensor::from(Array2::from_elem((rows, 6), 128.0_f32)),
        ),
        ("text_kv_16", noise(3, &[20, rows, tokens, 16])),
        ("text_kv_24", noise(4, &[12, rows, tokens, 24])),
    ]
}

fn feeds<'a>(tensors: &'a [(&'static str, Tensor)]) -> Vec<Feed<'a>> {
    tensors.iter().map(|(name, t)| (*name, t)).collect()
}

fn step(index: u64, rows: usize) -> [(&'static str, Tensor); 2] {
    let timestep = Array1::from_elem(1, 999.0 - 40.0 * index as f32);
    [
        ("sample", noise(10 + index, &[rows, 4, 16, 12])),
        ("timestep", Tensor::from(timestep)),
    ]
}

fn values(outputs: &TensorMap, name: &str) -> ArrayD<f32> {
    match &outputs[name] {
        Tensor::F32(array) => array.clone(),
        Tensor::I64(_) => panic!("{name} is i64"),
    }
}

/// Largest difference as a share of the largest expected magnitude.
fn apart<D: ndarray::Dimension>(
    found: &ndarray::Array<f32, D>,
    expected: &ndarray::Array<f32, D>,
) -> f32 {
    assert_eq!(found.shape(), expected.shape());
    let largest = expected.iter().fold(0.0_f32, |m, v| m.max(v.abs()));
    let pairs = found.iter().zip(expected);
    pairs.fold(0.0_f32, |m, (a, b)| m.max((a - b).abs())) / largest
}

fn contract<T: std::fmt::Debug>(result: tronie::Result<T>) -> String {
    match result {
        Err(error @ Error::Contract { .. }) => error.to_string(),
        other => panic!("a broken contract was expected, not {other:?}"),
    }
}

#[test]
fn f16_ports_weights_and_constants_are_read() {
    let weight = tensor("w", 10, &[2])
        .int(14, 1)
        .bytes(13, text("location", "unet"));
    let graph = Message::default()
        .bytes(11, port("x", 10, &[2]))
        .bytes(12, port("y", 10, &[2]))
        .bytes(5, weight)
        .bytes(5, external("v", "unet"))
        .bytes(5, tensor("raw", 10, &[1]).bytes(9, [0x00, 0x3c]))
        .bytes(5, tensor("listed", 10, &[2]).int(5, 0x3c00).int(5, 0xbc00))
        .bytes(1, onnx_model::node("Relu", &["x"], &["y"]));
    let graph = Graph::parse(model(&graph).0).unwrap();
    let _ = opset("", 20);
    assert_eq!(graph.inputs[0].element, PortType::F16);
    let elements = graph.weights.iter().map(|w| (w.element, w.bytes()));
    assert_eq!(
        elements.collect::<Vec<_>>(),
        [(WeightType::F16, 4), (WeightType::F32, 8)]
    );
    let constants = graph.constants.iter().map(|c| (c.element, c.bytes.clone()));
    assert_eq!(
        constants.collect::<Vec<_>>(),
        [
            (ConstantType::F16, vec![0x00, 0x3c]),
            (ConstantType::F16, vec![0x00, 0x3c, 0x00, 0xbc])
        ]
    );
}

#[test]
fn a_bound_run_equals_a_plain_one_bit_for_bit_at_every_step() {
    let runtime = runtime();
    for graph in [FUSED, HALF] {
        let mut unet = session(&runtime, graph, "unet", UNET);
        let (told_negative, told_positive) = (told(1, 77), told(1, 7));
        let first = step(0, 1);
        let mut negative = unet.bind(&feeds(&told_negative), &feeds(&first)).unwrap();
        let mut positive = unet.bind(&feeds(&told_positive), &feeds(&first)).unwrap();
        for index in 0..4 {
            let now = step(index, 1);
            for (binding, told) in [
                (&mut negative, &told_negative),
                (&mut positive, &told_positive),
            ] {
                let bound = unet.run_bound(binding, &feeds(&now)).unwrap();
                let all = [feeds(told), feeds(&now)].concat();
                let plain = unet.run(&all).unwrap();
                let bits = |outputs| values(outputs, "out_sample").mapv(f32::to_bits);
                assert_eq!(bits(&bound), bits(&plain), "{graph}, step {index}");
            }
        }
    }
}

#[test]
fn a_binding_refuses_what_it_was_not_made_for() {
    let runtime = runtime();
    let mut unet = session(&runtime, FUSED, "unet", UNET);
    let (told, first) = (told(1, 7), step(0, 1));
    let mut binding = unet.bind(&feeds(&told), &feeds(&first)).unwrap();
    let message = contract(unet.run_bound(&mut binding, &feeds(&step(0, 2))));
    assert!(message.contains("[1, 4, 16, 12] as bound"), "{message}");
    let message = contract(unet.run_bound(&mut binding, &feeds(&first)[..1]));
    assert!(message.contains("`timestep`"), "{message}");
    let message = contract(unet.run_bound(&mut binding, &feeds(&told)));
    assert!(message.contains("bound as varying"), "{message}");
    let message = contract(unet.bind(&feeds(&told)[1..], &feeds(&first)));
    assert!(message.contains("`text_embeds`"), "{message}");

    let vae = "vae/diffusion_pytorch_model.safetensors";
    let mut decoder = session(
        &runtime,
        "tests/models/graphs/tiny/vae_decoder.fused.onnx.gz",
        "vae_decoder",
        vae,
    );
    let latents = noise(1, &[1, 4, 8, 8]);
    let message = contract(decoder.bind(&[("latent_sample", &latents)], &[]));
    assert!(message.contains("named in the inputs"), "{message}");
}

#[test]
fn f16_networks_are_as_near_to_f32_as_f16_allows() {
    let runtime = runtime();
    let compare = |files: [&str; 2], component: &str, weights: &str, inputs: &[Feed<'_>]| {
        let [expected, found] = files.map(|file| {
            let mut session = session(&runtime, file, component, weights);
            session.run(inputs).unwrap()
        });
        assert_eq!(
            expected.keys().collect::<Vec<_>>(),
            found.keys().collect::<Vec<_>>()
        );
        for name in expected.keys() {
            let apart = apart(&values(&found, name), &values(&expected, name));
            assert!(apart < 5e-3, "{component} {name}: {apart}");
            assert!(apart > 1e-6, "{component} {name} was not computed in f16");
        }
    };
    let both = |name: &str| {
        ["fused", "cuda"].map(|d| format!("tests/models/graphs/tiny/{name}.{d}.onnx.gz"))
    };
    let hidden = noise(5, &[2, 77, 40]);
    let [fused, cuda] = both("kv");
    compare(
        [&fused, &cuda],
        "kv",
        UNET,
        &[("encoder_hidden_states", &hidden)],
    );
    let ids = Array2::from_shape_fn((2, 77), |(b, t)| ((b * 31 + t * 7) % 750) as i64);
    let ids = Tensor::from(ids);
    for encoder in ["text_encoder", "text_encoder_2"] {
        let [fused, cuda] = both(encoder);
        let weights = format!("{encoder}/model.safetensors");
        compare([&fused, &cuda], encoder, &weights, &[("input_ids", &ids)]);
    }
    let (told, now) = (told(2, 77), step(0, 2));
    let all = [feeds(&told), feeds(&now)].concat();
    compare([FUSED, HALF], "unet", UNET, &all);
}

#[test]
fn a_number_too_large_for_f16_is_said_not_rounded_to_infinity() {
    let runtime = runtime();
    let mut unet = session(&runtime, HALF, "unet", UNET);
    let mut told = told(1, 7);
    let Tensor::F32(kv) = &mut told[2].1 else {
        panic!("K and V are floats")
    };
    kv[[3, 0, 2, 1]] = 1e5;
    let now = step(0, 1);
    let all = [feeds(&told), feeds(&now)].concat();
    for message in [
        contract(unet.run(&all)),
        contract(unet.bind(&feeds(&told), &feeds(&now))),
    ] {
        assert!(
            message.contains("text_kv_16") && message.contains("65504"),
            "{message}"
        );
    }
}

/// The tiny models' catalogue with other graphs in the place of the processor's.
fn catalogue(folder: &Path, graphs: &[(&str, &str)]) -> PathBuf {
    let mut text = std::fs::read_to_string(root().join("tests/models/models.yaml")).unwrap();
    let here = root().display().to_string();
    for place in ["tiny/", "tiny-refiner/", "tiny-adapters/", "graphs/"] {
        text = text.replace(
            &format!(" {place}"),
            &format!(" {here}/tests/models/{place}"),
        );
    }
    for (from, to) in graphs {
        let own = format!("fused: {here}/{from}\n");
        assert!(text.contains(&own), "{from}");
        text = text.replace(&own, &format!("fused: {here}/{to}\n"));
    }
    let path = folder.join("models.yaml");
    std::fs::write(&path, text).unwrap();
    path
}

fn final_latents(catalogue: PathBuf, request: &Request) -> Latents {
    let options = Options {
        models: Some(catalogue),
        ..Options::default()
    };
    let pipeline = Pipeline::open(options).unwrap();
    let output = pipeline.generate(request, &mut |_| Control::Continue);
    output.unwrap().handoff.latents
}

#[test]
fn a_whole_run_in_f16_ends_near_the_one_in_f32() {
    let folder = tempfile::tempdir().unwrap();
    let mut graphs = vec![(FUSED.to_owned(), HALF.to_owned())];
    for name in ["kv", "text_encoder", "text_encoder_2"] {
        let of = |dialect: &str| format!("tests/models/graphs/tiny/{name}.{dialect}.onnx.gz");
        graphs.push((of("fused"), of("cuda")));
    }
    let graphs = graphs
        .iter()
        .map(|(from, to)| (from.as_str(), to.as_str()))
        .collect::<Vec<_>>();
    for runs in ["batch", "split"] {
        let request = format!(
            r#"{{"prompt": "an old sailor", "negative": "blurred", "model": "tiny", "steps": 8, "seed": 3,
                "guidance": 5.0, "guidance-runs": "{runs}", "memory": "balanced"}}"#
        );
        let request = Request::from_json(&request, Path::new("request.json")).unwrap();
        let expected = final_latents(root().join("tests/models/models.yaml"), &request);
        let found = final_latents(catalogue(folder.path(), &graphs), &request);
        let apart = apart(&found, &expected);
        println!("{runs}: {apart:.1e}");
        assert!(apart > 1e-6 && apart < 2e-2, "{runs}: {apart}");
    }
}
