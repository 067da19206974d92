//! Graphs that ask for something this engine does not run: each is refused by name, and nothing makes the parser panic.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

#[path = "support/onnx_model.rs"]
mod onnx_model;

use onnx_model::{Message, external, model, node, opset, port, relu, tensor, text};
use proptest::prelude::*;
use tronie::graph::{Graph, MAX_NODES};

fn refused(bytes: &[u8]) -> String {
    Graph::parse(bytes.to_owned()).expect_err("a graph that has to be refused")
}

fn with_node(node: Message) -> Message {
    relu().bytes(1, node)
}

fn with_attribute(attribute: Message) -> Message {
    with_node(node("Op", &["x"], &["z"]).bytes(5, attribute))
}

fn attribute(name: &str, kind: i64) -> Message {
    Message::default().bytes(1, name).int(20, kind)
}

fn assert_refused(cases: &[(Message, &str)]) {
    for (graph, expected) in cases {
        let found = refused(&model(graph).0);
        assert!(
            found.contains(expected),
            "expected `{expected}` in `{found}`"
        );
    }
}

#[test]
#[rustfmt::skip]
fn forbidden_nodes_and_attributes_are_refused() {
    Graph::parse(model(&relu()).0).unwrap();
    Graph::parse(model(&with_attribute(attribute("a", 2).int(3, -1))).0).unwrap();
    assert_refused(&[
        (with_node(node("EPContext", &[], &["z"]).bytes(7, "com.microsoft")), "node 1 (`EPContext`): is an engine compiled for one device"),
        (with_node(node("PyOp", &[], &["z"]).bytes(7, "ai.onnx.contrib")), "node 1 (`PyOp`): its operator domain `ai.onnx.contrib`"),
        (with_node(node("Mine", &["x"], &["z"]).bytes(8, "v1")), "calls a local function"),
        (with_node(node("", &["x"], &["z"])), "node 1: its operator has no name"),
        (with_node(node("A\0B", &["x"], &["z"])), r"its operator `A\0B` has a NUL in it"),
        (with_node(node("Add", &["x", "nowhere"], &["z"])), "node 1 (`Add`): reads `nowhere`, which nothing before it defines"),
        (with_node(node("Add", &["x", "z"], &["z"])), "reads `z`, which nothing before it defines"),
        (with_node(node("Relu", &["x"], &["y"])), "node 1 (`Relu`): output `y` is defined a second time"),
        (with_node(node("Relu", &["x"], &["x"])), "output `x` is defined a second time"),
        (with_node(node("Split", &["x"], &["z", "z"])), "output `z` is defined a second time"),
        (with_node(node("Relu", &["x"], &["z\0"])), "has a NUL in it"),
        (with_attribute(attribute("value", 4)), "node 1 (`Op`): attribute `value`: is a tensor"),
        (with_attribute(attribute("body", 5)), "attribute `body`: is a subgraph"),
        (with_attribute(attribute("bodies", 10)), "is a subgraph"),
        (with_attribute(attribute("s", 11)), "is a sparse tensor"),
        (with_attribute(attribute("t", 13)), "is a type"),
        (with_attribute(attribute("a", 0)), "is of unknown type"),
        (with_attribute(attribute("a", 99)), "is of unknown type"),
        (with_attribute(attribute("", 2)), "an attribute has no name"),
        (with_attribute(attribute("a", 3).bytes(4, b"\xff")), "is a string that is not UTF-8"),
        (with_attribute(attribute("a", 3).bytes(4, b"a\0")), "has a NUL in it"),
        (with_attribute(attribute("a", 2).bytes(21, "outer")), "refers to a function's attribute"),
        (with_node(node("Op", &["x"], &["z"]).bytes(5, attribute("a", 2)).bytes(5, attribute("a", 1))), "attribute `a` is given twice"),
    ]);
}

#[test]
#[rustfmt::skip]
fn forbidden_initializers_are_refused() {
    let with = |tensor: Message| relu().bytes(5, tensor);
    let plain = |location: &str| Graph::parse(model(&with(external("w", location))).0);
    assert_eq!(plain("text_encoder-2.b").unwrap().weights[0].key, "text_encoder-2.b");
    for location in ["", "..", "../x", "a/../../x", "/etc/passwd", "a/b", r"C:\x", "a\\b", "a..b", "a b", "ä", "a\0", &"k".repeat(101)] {
        let found = plain(location).unwrap_err();
        assert!(found.contains("is no weights key") && found.contains("initializer `w`"), "{location}: {found}");
    }
    assert_refused(&[
        (with(tensor("c", 1, &[-1]).bytes(9, [])), "initializer `c`: has a negative dimension: [-1]"),
        (with(tensor("c", 1, &[1 << 40, 1 << 40])), "has more elements than can be addressed"),
        (with(tensor("c", 1, &[1 << 40])), "shape [1099511627776] needs 4398046511104 bytes of values, 0 found"),
        (with(tensor("c", 1, &[2]).bytes(9, [0; 7])), "shape [2] needs 8 bytes of values, 7 found"),
        (with(tensor("c", 7, &[2]).int(7, 1)), "shape [2] needs 16 bytes of values, 8 found"),
        (with(tensor("c", 11, &[1]).bytes(9, [0; 8])), "is a constant of type DOUBLE"),
        (with(tensor("c", 10, &[2]).bytes(9, [0; 3])), "shape [2] needs 4 bytes of values, 3 found"),
        (with(tensor("c", 10, &[1]).int(5, 65536)), "has 65536 for a FLOAT16's bits"),
        (with(tensor("c", 8, &[1]).bytes(6, "text")), "is a constant of type STRING"),
        (with(tensor("c", 9, &[1]).bytes(9, [2])), "has a BOOL that is neither 0 nor 1"),
        (with(tensor("c", 9, &[1]).int(5, 257)), "has a BOOL that is neither 0 nor 1"),
        (with(tensor("c", 1, &[1]).bytes(9, [0; 4]).float(4, 1.0)), "gives its values twice"),
        (with(tensor("c", 1, &[1]).bytes(3, Message::default().int(1, 0))), "is stored in segments"),
        (with(tensor("c", 1, &[0]).bytes(13, text("location", "unet"))), "says that its data is inside"),
        (with(tensor("", 1, &[])), "an initializer has no name"),
        (with(tensor("x", 1, &[]).float(4, 1.0)), "initializer `x` is defined a second time"),
        (with(external("w", "unet")).bytes(5, external("w", "unet")), "initializer `w` is defined a second time"),
        (with(external("w", "unet").bytes(13, text("offset", "8"))), "has the entry `offset`; only `location` is allowed"),
        (with(external("w", "unet").bytes(13, text("location", "vae"))), "has two locations"),
        (with(external("w", "unet").bytes(9, [0; 8])), "has values inside"),
        (with(tensor("w", 1, &[2]).int(14, 1)), "names no location"),
        (with(tensor("w", 16, &[2]).int(14, 1).bytes(13, text("location", "unet"))), "is a weight of type BFLOAT16, and FLOAT and FLOAT16 are allowed"),
        (with(tensor("w", 1, &[2]).int(14, 2)), "at place number 2, which is unknown"),
        (relu().bytes(15, []), "holds sparse initializers"),
    ]);
}

#[test]
#[rustfmt::skip]
fn forbidden_inputs_and_outputs_are_refused() {
    let unshaped = Message::default().bytes(1, "z").bytes(2, Message::default().bytes(1, Message::default().int(1, 1)));
    let unknown_dim = Message::default().bytes(1, "z").bytes(2, Message::default().bytes(1, Message::default().int(1, 1).bytes(2, Message::default().bytes(1, []))));
    let sequence = Message::default().bytes(1, "z").bytes(2, Message::default().bytes(4, []));
    assert_refused(&[
        (relu().bytes(11, port("x", 1, &[2])), "input `x` is defined a second time"),
        (relu().bytes(12, port("y", 1, &[2])), "output `y` is listed twice"),
        (relu().bytes(12, port("z", 1, &[2])), "output `z` is made by nothing"),
        (relu().bytes(11, port("", 1, &[2])), "input has no name"),
        (relu().bytes(11, port("z", 11, &[2])), "input `z`: has element type DOUBLE, and FLOAT, FLOAT16 and INT64 are allowed"),
        (relu().bytes(11, port("z", 1, &[-1])), "input `z`: dimension 0 has size -1"),
        (relu().bytes(11, port("z", 1, &[3, 0])), "input `z`: dimension 1 has size 0"),
        (relu().bytes(11, unshaped), "input `z`: says no shape"),
        (relu().bytes(11, unknown_dim), "input `z`: dimension 0 has neither size nor name"),
        (relu().bytes(11, sequence), "input `z`: is not a tensor"),
        (Message::default(), "has no outputs"),
    ]);
}

#[test]
#[rustfmt::skip]
fn forbidden_models_are_refused() {
    let base = || Message::default().int(1, 10).bytes(7, relu());
    let cases = [
        (base(), "imports no standard operators"),
        (base().bytes(8, opset("", 23)), "uses version 23 of the standard operators, and 18 to 21 can be run"),
        (base().bytes(8, opset("", 17)), "uses version 17"),
        (base().bytes(8, opset("", 20)).bytes(8, opset("ai.onnx", 20)), "imports the operator domain `` twice"),
        (base().bytes(8, opset("", 20)).bytes(8, opset("com.microsoft", 2)), "uses version 2 of com.microsoft"),
        (base().bytes(8, opset("", 20)).bytes(8, opset("evil.ops", 1)), "uses the operator domain `evil.ops`"),
        (base().bytes(8, opset("", 20)).bytes(25, []), "holds local functions"),
        (base().bytes(8, opset("", 20)).bytes(20, []), "holds training information"),
        (base().bytes(8, opset("", 20)).bytes(14, text("a", "1")).bytes(14, text("a", "2")), "metadata `a` has two values"),
    ];
    for (message, expected) in cases {
        let found = refused(&message.0);
        assert!(found.contains(expected), "expected `{expected}` in `{found}`");
    }
    let unimported = with_node(node("Gelu", &["x"], &["z"]).bytes(7, "com.microsoft"));
    let standard_only = Message::default().int(1, 10).bytes(7, unimported).bytes(8, opset("ai.onnx", 20));
    assert!(refused(&standard_only.0).contains("its operator domain `com.microsoft` is not imported"));
}

#[test]
fn a_file_full_of_empty_nodes_is_refused_before_they_are_decoded() {
    let nodes = [0x0a, 0x00].repeat(MAX_NODES + 1);
    let graph = Message([relu().0, nodes].concat());
    assert!(refused(&model(&graph).0).contains(&format!("nodes, and {MAX_NODES} are allowed")));
}

proptest! {
    #[test]
    fn random_bytes_never_panic(bytes in proptest::collection::vec(any::<u8>(), 0..300)) {
        drop(Graph::parse(bytes.clone()));
        drop(Graph::parse([&[0x08, 0x0a, 0x3a, 0x80, 0x02][..], &bytes].concat()));
        drop(Graph::parse([&[0x1f, 0x8b, 0x08, 0][..], &bytes].concat()));
    }

    #[test]
    fn changed_graphs_never_panic(
        edits in proptest::collection::vec((0_usize..936, any::<u8>()), 1..6),
        cut in proptest::option::of(0_usize..936),
    ) {
        let mut bytes = include_bytes!("golden/graph/small.onnx").to_vec();
        for (at, byte) in edits {
            bytes[at] = byte;
        }
        bytes.truncate(cut.unwrap_or(usize::MAX));
        drop(Graph::parse(bytes));
    }
}
