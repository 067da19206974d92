//! Safetensors files, well-formed and not, written byte by byte.

/// One tensor to be written: name, type, shape, data.
pub type Tensor<'a> = (&'a str, &'a str, &'a [usize], &'a [u8]);

/// A file with any header text and any data.
pub fn raw(header: &str, data: &[u8]) -> Vec<u8> {
    with_length(header.len() as u64, header.as_bytes(), data)
}

/// A file whose length prefix may lie.
pub fn with_length(length: u64, header: &[u8], data: &[u8]) -> Vec<u8> {
    [&length.to_le_bytes(), header, data].concat()
}

/// A well-formed file whose data begin `misalign` bytes after a multiple of 8.
pub fn well_formed(tensors: &[Tensor<'_>], misalign: usize) -> Vec<u8> {
    let (mut entries, mut data) = (Vec::new(), Vec::new());
    for (name, dtype, shape, bytes) in tensors {
        let start = data.len();
        data.extend_from_slice(bytes);
        let end = data.len();
        entries.push(format!(
            r#"{name:?}:{{"dtype":"{dtype}","shape":{shape:?},"data_offsets":[{start},{end}]}}"#
        ));
    }
    let mut header = format!("{{{}}}", entries.join(","));
    while header.len() % 8 != misalign {
        header.push(' ');
    }
    raw(&header, &data)
}

/// f32 values as a file holds them.
pub fn f32_bytes(values: &[f32]) -> Vec<u8> {
    values.iter().flat_map(|v| v.to_le_bytes()).collect()
}
