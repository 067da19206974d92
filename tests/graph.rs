//! Graph files: what the onnx package writes is read in full, and what is no graph is refused by what it is.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

#[path = "support/onnx_model.rs"]
mod onnx_model;

use std::collections::BTreeMap;
use std::io::Write;
use std::path::{Path, PathBuf};

use flate2::Compression;
use flate2::write::GzEncoder;
use onnx_model::{Message, model, opset, relu};
use tempfile::TempDir;
use tronie::Error;
use tronie::graph::{Attribute, ConstantType, Dim, Graph, MAX_BYTES, PortType};

fn golden(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("tests/golden/graph")
        .join(name)
}

fn packed(bytes: &[u8]) -> Vec<u8> {
    let mut encoder = GzEncoder::new(Vec::new(), Compression::fast());
    encoder.write_all(bytes).unwrap();
    encoder.finish().unwrap()
}

fn refused(bytes: &[u8]) -> String {
    Graph::parse(bytes.to_owned()).expect_err("a graph that has to be refused")
}

#[test]
fn a_graph_from_the_onnx_package_is_read_in_full() {
    let graph = Graph::load(golden("small.onnx.gz")).unwrap();
    assert_eq!(graph, Graph::load(golden("small.onnx")).unwrap());

    assert_eq!(
        graph.opsets,
        BTreeMap::from([(String::new(), 20), ("com.microsoft".into(), 1)])
    );
    let metadata = [("tronie.component", "unet"), ("tronie.dialect", "fused")];
    assert_eq!(
        graph.metadata,
        metadata.map(|(k, v)| (k.to_owned(), v.to_owned())).into()
    );

    let named = |name: &str| Dim::Named(name.into());
    let ports = graph
        .inputs
        .iter()
        .chain(&graph.outputs)
        .map(|p| (p.name.as_str(), p.element, p.dims.clone()));
    assert_eq!(
        ports.collect::<Vec<_>>(),
        [
            (
                "x",
                PortType::F32,
                vec![
                    named("batch"),
                    Dim::Fixed(4),
                    named("height"),
                    named("width")
                ]
            ),
            ("ids", PortType::I64, vec![Dim::Fixed(1)]),
            (
                "y",
                PortType::F32,
                vec![named("batch"), named("tokens"), Dim::Fixed(8)]
            ),
        ]
    );
}

#[test]
fn weights_are_names_and_shapes_and_constants_are_bytes() {
    let graph = Graph::load(golden("small.onnx")).unwrap();
    let weights = graph
        .weights
        .iter()
        .map(|w| (w.name.as_str(), w.key.as_str(), w.shape.as_slice()));
    assert_eq!(
        weights.collect::<Vec<_>>(),
        [
            ("conv.weight", "unet", &[8, 4, 3, 3][..]),
            ("conv.bias", "unet", &[8]),
            ("lstm.weight", "text_encoder.2", &[1, 4, 8]),
        ]
    );

    let f32s = |values: &[f32]| {
        values
            .iter()
            .flat_map(|v| v.to_le_bytes())
            .collect::<Vec<_>>()
    };
    let i64s = |values: &[i64]| {
        values
            .iter()
            .flat_map(|v| v.to_le_bytes())
            .collect::<Vec<_>>()
    };
    let constants = graph.constants.iter().map(|c| {
        (
            c.name.as_str(),
            c.element,
            c.shape.as_slice(),
            c.bytes.clone(),
        )
    });
    assert_eq!(
        constants.collect::<Vec<_>>(),
        [
            (
                "scales",
                ConstantType::F32,
                &[4][..],
                f32s(&[1.0, 1.0, 0.5, 0.5])
            ),
            ("shape", ConstantType::I64, &[3], i64s(&[0, -1, 8])),
            ("yes", ConstantType::Bool, &[], vec![1]),
            ("one", ConstantType::F32, &[1], f32s(&[1.5])),
            ("axis", ConstantType::I32, &[], 3_i32.to_le_bytes().to_vec()),
        ]
    );
}

#[test]
fn nodes_keep_order_domains_omitted_tensors_and_attributes() {
    let graph = Graph::load(golden("small.onnx")).unwrap();
    let ops: Vec<_> = graph
        .nodes
        .iter()
        .map(|n| (n.domain.as_str(), n.op_type.as_str()))
        .collect();
    assert_eq!(
        ops,
        [
            ("", "Conv"),
            ("", "Resize"),
            ("", "Reshape"),
            ("com.microsoft", "MultiHeadAttention"),
            ("", "Where"),
            ("", "Cast"),
            ("", "Add"),
            ("", "LSTM"),
            ("", "Identity")
        ]
    );
    assert_eq!(graph.nodes[0].name, "conv");
    assert_eq!(graph.nodes[1].inputs, ["c", "", "scales"]);
    assert_eq!(graph.nodes[7].outputs, ["", "h"]);
    let attributes = |node: usize| {
        graph.nodes[node]
            .attributes
            .iter()
            .map(|(k, v)| (k.as_str(), v))
            .collect::<Vec<_>>()
    };
    assert_eq!(
        attributes(0),
        [
            ("pads", &Attribute::Ints(vec![1, 1, 1, 1])),
            ("strides", &Attribute::Ints(vec![2, 2]))
        ]
    );
    assert_eq!(
        attributes(1),
        [("mode", &Attribute::String("nearest".into()))]
    );
    assert_eq!(attributes(2), [("allowzero", &Attribute::Int(0))]);
    assert_eq!(
        attributes(3),
        [
            ("num_heads", &Attribute::Int(2)),
            ("scale", &Attribute::Float(0.5))
        ]
    );
    let activations = ["Tanh", "Relu", "Tanh"].map(str::to_owned).to_vec();
    assert_eq!(
        attributes(7),
        [
            ("activation_alpha", &Attribute::Floats(vec![0.25, 0.5])),
            ("activations", &Attribute::Strings(activations)),
            ("hidden_size", &Attribute::Int(1)),
        ]
    );
}

#[test]
fn errors_name_the_file() {
    let folder = TempDir::new().unwrap();
    let path = folder.path().join("unet.onnx");
    match Graph::load(&path) {
        Err(Error::Missing {
            path: found,
            remedy,
        }) => {
            assert_eq!(found, path);
            assert!(remedy.contains("python -m export"));
        }
        other => panic!("{other:?}"),
    }
    std::fs::write(&path, model(&relu())).unwrap();
    Graph::load(&path).unwrap();
    std::fs::write(&path, b"garbage").unwrap();
    let error = Graph::load(&path).unwrap_err();
    assert!(
        error.to_string().starts_with(&path.display().to_string()),
        "{error}"
    );
    assert!(
        Graph::load(folder.path())
            .unwrap_err()
            .to_string()
            .contains("is a directory")
    );
    std::fs::File::create(&path)
        .unwrap()
        .set_len(MAX_BYTES as u64 + 1)
        .unwrap();
    assert!(
        Graph::load(&path)
            .unwrap_err()
            .to_string()
            .contains("is larger than 32 MiB")
    );
}

#[test]
#[rustfmt::skip]
fn files_that_are_no_graph_are_refused_by_what_they_are() {
    let good = model(&relu()).0;
    let gz = packed(&good);
    assert_eq!(Graph::parse(gz.clone()), Graph::parse(good.clone()));
    let mut damaged = gz.clone();
    let crc = damaged.len() - 8;
    damaged[crc] ^= 1;
    let cases: &[(&str, Vec<u8>, &str)] = &[
        ("empty", vec![], "is empty"),
        ("one byte", vec![8], "is not an ONNX model"),
        ("text", b"a graph, honestly".to_vec(), "is not an ONNX model"),
        ("zeros", vec![0; 100], "is not an ONNX model"),
        ("safetensors", b"\x02\0\0\0\0\0\0\0{}".to_vec(), "is a safetensors file, not an ONNX model: list it under `weights`"),
        ("pickle", b"\x80\x02}q\0.".to_vec(), "is a Python pickle"),
        ("zip", b"PK\x03\x04".to_vec(), "is a zip archive"),
        ("web page", b"<html>".to_vec(), "is a web page"),
        ("packed web page", packed(b"<html>"), "is a web page"),
        ("packed twice", packed(&gz), "is a gzip file"),
        ("LFS pointer", b"version https://git-lfs.github.com/spec/v1".to_vec(), "git lfs pull"),
        ("no graph", Message::default().int(1, 10).bytes(8, opset("", 20)).0, "it holds no graph"),
        ("no IR version", Message::default().bytes(7, relu()).0, "does not say its IR version"),
        ("old IR", Message::default().int(1, 3).bytes(7, relu()).0, "has ONNX IR version 3, and 4 to 14 can be read"),
        ("new IR", Message::default().int(1, 99).bytes(7, relu()).0, "has ONNX IR version 99"),
        ("damaged gzip", damaged, "damaged gzip"),
        ("bytes after gzip", [&gz[..], b"more"].concat(), "4 bytes follow its end"),
        ("bomb", packed(&vec![0; MAX_BYTES + 1]), "is larger than 32 MiB"),
    ];
    for (label, bytes, expected) in cases {
        let found = refused(bytes);
        assert!(found.contains(expected), "{label}: expected `{expected}` in `{found}`");
    }
    for cut in 2..gz.len() {
        assert!(refused(&gz[..cut]).contains("truncated gzip"), "cut at {cut}");
    }
}

#[test]
fn a_graph_cut_anywhere_is_refused() {
    // With what it cannot do without at its end: the import of the standard operators.
    let whole = Message::default()
        .int(1, 10)
        .bytes(7, relu())
        .bytes(8, opset("", 20))
        .0;
    Graph::parse(whole.clone()).unwrap();
    for cut in 0..whole.len() {
        refused(&whole[..cut]);
    }
}
