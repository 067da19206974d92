//! ONNX models written field by field, so that tests can write what no library would.
#![allow(dead_code)] // Each test file uses a part of it.

/// A message in the making.
#[derive(Clone, Default)]
pub struct Message(pub Vec<u8>);

impl Message {
    fn varint(mut self, mut value: u64) -> Self {
        while value > 127 {
            self.0.push(value as u8 | 128);
            value >>= 7;
        }
        self.0.push(value as u8);
        self
    }

    /// An integer, enum or boolean field.
    pub fn int(self, field: u64, value: i64) -> Self {
        self.varint(field << 3).varint(value as u64)
    }

    /// A 32-bit float field.
    pub fn float(self, field: u64, value: f32) -> Self {
        let mut message = self.varint(field << 3 | 5);
        message.0.extend(value.to_le_bytes());
        message
    }

    /// A bytes, string or message field.
    pub fn bytes(self, field: u64, value: impl AsRef<[u8]>) -> Self {
        let value = value.as_ref();
        let mut message = self.varint(field << 3 | 2).varint(value.len() as u64);
        message.0.extend(value);
        message
    }
}

impl AsRef<[u8]> for Message {
    fn as_ref(&self) -> &[u8] {
        &self.0
    }
}

// Field numbers are those of onnx.proto.

/// A `StringStringEntryProto`.
pub fn text(key: &str, value: &str) -> Message {
    Message::default().bytes(1, key).bytes(2, value)
}

/// An `OperatorSetIdProto`.
pub fn opset(domain: &str, version: i64) -> Message {
    Message::default().bytes(1, domain).int(2, version)
}

/// A `NodeProto`.
pub fn node(op: &str, inputs: &[&str], outputs: &[&str]) -> Message {
    let message = inputs
        .iter()
        .fold(Message::default(), |m, name| m.bytes(1, name));
    outputs
        .iter()
        .fold(message, |m, name| m.bytes(2, name))
        .bytes(4, op)
}

/// A `ValueInfoProto` of a tensor with fixed dimensions.
pub fn port(name: &str, element: i64, dims: &[i64]) -> Message {
    let shape = dims.iter().fold(Message::default(), |m, &dim| {
        m.bytes(1, Message::default().int(1, dim))
    });
    let tensor = Message::default().int(1, element).bytes(2, shape);
    Message::default()
        .bytes(1, name)
        .bytes(2, Message::default().bytes(1, tensor))
}

/// A `TensorProto` without values.
pub fn tensor(name: &str, data_type: i64, dims: &[i64]) -> Message {
    dims.iter().fold(
        Message::default().bytes(8, name).int(2, data_type),
        |m, &dim| m.int(1, dim),
    )
}

/// An f32 `TensorProto` whose values lie elsewhere.
pub fn external(name: &str, location: &str) -> Message {
    tensor(name, 1, &[2])
        .int(14, 1)
        .bytes(13, text("location", location))
}

/// `y = Relu(x)`, to which a test adds what it is about.
pub fn relu() -> Message {
    Message::default()
        .bytes(11, port("x", 1, &[2]))
        .bytes(12, port("y", 1, &[2]))
        .bytes(1, node("Relu", &["x"], &["y"]))
}

/// A `ModelProto` around a `GraphProto`.
pub fn model(graph: &Message) -> Message {
    Message::default()
        .int(1, 10)
        .bytes(7, graph)
        .bytes(8, opset("", 20))
        .bytes(8, opset("com.microsoft", 1))
}
