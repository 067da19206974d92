//! What a model file is, told by its first bytes and never by its name.
//!
//! No Python twin: torch and diffusers go by the extension.

/// The longest header that the safetensors format allows, in bytes.
pub(crate) const MAX_SAFETENSORS_HEADER: u64 = 100_000_000;

/// How many first bytes [`Content::of`] looks at.
pub(crate) const HEAD: usize = 64;

/// A kind of file that people hand over as weights or as a graph.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Content {
    Empty,
    Safetensors,
    Onnx,
    Gzip,
    Pickle,
    Zip,
    Gguf,
    Numpy,
    Hdf5,
    Html,
    LfsPointer,
    Json,
}

const MAGIC: &[(&[u8], Content)] = &[
    (b"PK\x03\x04", Content::Zip),
    (b"\x1f\x8b", Content::Gzip),
    (b"GGUF", Content::Gguf),
    (b"\x93NUMPY", Content::Numpy),
    (b"\x89HDF\r\n\x1a\n", Content::Hdf5),
    (b"version https://git-lfs", Content::LfsPointer),
    (b"<!DOCTYPE", Content::Html),
    (b"<!doctype", Content::Html),
    (b"<html", Content::Html),
    (b"{", Content::Json),
    (b"[", Content::Json),
];

impl Content {
    /// The kind of a file that begins with `head`, if it is one of the kinds known here.
    pub(crate) fn of(head: &[u8]) -> Option<Self> {
        if head.is_empty() {
            return Some(Self::Empty);
        }
        // First, because a safetensors length prefix may happen to spell another format's magic number.
        if is_safetensors(head) {
            return Some(Self::Safetensors);
        }
        if let [0x80, 2..=5, ..] = head {
            return Some(Self::Pickle);
        }
        // ModelProto: field 1 (IR version) as a small varint, then one of the next string or message fields.
        if let [0x08, 1..=32, 0x12 | 0x1a | 0x22 | 0x28 | 0x3a | 0x42, ..] = head {
            return Some(Self::Onnx);
        }
        MAGIC
            .iter()
            .find(|(magic, _)| head.starts_with(magic))
            .map(|&(_, kind)| kind)
    }

    /// What the file is, as the end of "this file is …".
    pub(crate) fn what(self) -> &'static str {
        match self {
            Self::Empty => "empty",
            Self::Safetensors => "a safetensors file",
            Self::Onnx => "an ONNX model",
            Self::Gzip => "a gzip file",
            Self::Pickle => "a Python pickle, which can run any program when it is read",
            Self::Zip => {
                "a zip archive; as a .ckpt, .pt or .bin file that is a Python pickle, which can run any program when it \
                 is read"
            }
            Self::Gguf => "a GGUF file",
            Self::Numpy => "a NumPy array",
            Self::Hdf5 => "an HDF5 file",
            Self::Html => "a web page, probably a login or error page saved in place of the file",
            Self::LfsPointer => "a Git LFS pointer, not the file that it points to",
            Self::Json => "JSON text",
        }
    }

    /// What to do when the file ought to be weights.
    pub(crate) fn instead_of_weights(self) -> &'static str {
        match self {
            Self::Empty | Self::Html => "fetch the .safetensors file again",
            Self::Safetensors => "it can be used as it is",
            Self::Onnx => "give it as a graph, and the checkpoint's .safetensors file as weights",
            Self::Gzip => {
                "unpack it, or give it as a graph if it is one of this program's .onnx.gz files"
            }
            Self::Pickle | Self::Zip => {
                "use the model's .safetensors file, or convert it where you trust its origin \
                 (`save_pretrained(..., safe_serialization=True)`)"
            }
            Self::Gguf | Self::Numpy | Self::Hdf5 => {
                "use the original checkpoint in the safetensors format"
            }
            Self::LfsPointer => "run `git lfs pull`, or download the file itself",
            Self::Json => "if it is an index of shards, list the .safetensors shards themselves",
        }
    }

    /// What to do when the file ought to be a graph.
    pub(crate) fn instead_of_graph(self) -> &'static str {
        match self {
            Self::Safetensors => {
                "list it under `weights`, and the exported .onnx.gz under `graphs`"
            }
            Self::LfsPointer => "run `git lfs pull`, or download the file itself",
            _ => {
                "export the graph again with `python -m export` and point the catalogue at the .onnx or .onnx.gz file"
            }
        }
    }
}

fn is_safetensors(head: &[u8]) -> bool {
    let Some((length, rest)) = head.split_first_chunk::<8>() else {
        return false;
    };
    u64::from_le_bytes(*length) <= MAX_SAFETENSORS_HEADER && rest.first() == Some(&b'{')
}
