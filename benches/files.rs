//! What is read before a run and written after it: weights, graphs, pictures.

#![allow(
    clippy::unwrap_used,
    reason = "a benchmark that cannot set itself up fails by panicking"
)]

use std::fs::File;
use std::hint::black_box;
use std::io::Read;
use std::path::{Path, PathBuf};

use criterion::{Criterion, Throughput};
use flate2::read::GzDecoder;
use half::{bf16, f16};
use ndarray::Array3;
use safetensors::tensor::{Dtype, TensorView};
use tempfile::TempDir;
use tronie::Request;
use tronie::graph::Graph;
use tronie::image::{to_rgb, write_png};
use tronie::noise::Noise;
use tronie::weights::Weights;

const UNET: &str = concat!(
    env!("CARGO_MANIFEST_DIR"),
    "/graphs/sdxl-base/unet.fused.onnx.gz"
);
/// The largest matrix of SDXL's `UNet`, `ff.net.0.proj` of its widest blocks.
const MATRIX: [usize; 2] = [10_240, 1_280];
const SIDE: usize = 1024;

fn main() {
    let mut criterion = Criterion::default().configure_from_args();
    widening(&mut criterion);
    header(&mut criterion);
    graph(&mut criterion);
    picture(&mut criterion);
    criterion.final_summary();
}

/// Half-precision weights to f32, out of a mapped file that is in memory; allocating the f32 counts.
fn widening(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("widen");
    let mut values = vec![0.0; MATRIX.iter().product()];
    Noise::new(1).fill(&mut values);
    group.throughput(Throughput::Elements(values.len() as u64));
    let bytes_of = |narrow: fn(f32) -> [u8; 2]| -> Vec<u8> {
        values.iter().flat_map(|&value| narrow(value)).collect()
    };
    let stored = [
        (
            "f16",
            Dtype::F16,
            bytes_of(|v| f16::from_f32(v).to_le_bytes()),
        ),
        (
            "bf16",
            Dtype::BF16,
            bytes_of(|v| bf16::from_f32(v).to_le_bytes()),
        ),
    ];
    for (name, dtype, bytes) in stored {
        let folder = TempDir::new().unwrap();
        let tensor = TensorView::new(dtype, MATRIX.to_vec(), &bytes).unwrap();
        let path = save(&folder, [("matrix".to_owned(), tensor)]);
        let weights = Weights::open(&[path]).unwrap();
        group.bench_function(format!("{name} to f32"), |b| {
            b.iter(|| weights.tensor_f32("matrix", &MATRIX).unwrap());
        });
    }
    group.finish();
}

/// A file with the tensor names of SDXL's `UNet` graph; the tensors are small, for only the header is read.
fn header(criterion: &mut Criterion) {
    let graph = Graph::load(Path::new(UNET)).unwrap();
    let folder = TempDir::new().unwrap();
    let tensors = graph.weights.iter().map(|weight| {
        let tensor = TensorView::new(Dtype::F32, vec![1], &[0; 4]).unwrap();
        (weight.name.clone(), tensor)
    });
    let paths = [save(&folder, tensors)];
    let name = format!("open a safetensors file of {} tensors", graph.weights.len());
    criterion.bench_function(&name, |b| {
        b.iter(|| Weights::open(black_box(&paths)).unwrap());
    });
}

fn save<'a>(
    folder: &TempDir,
    tensors: impl IntoIterator<Item = (String, TensorView<'a>)>,
) -> PathBuf {
    let path = folder.path().join("model.safetensors");
    safetensors::serialize_to_file(tensors, None, &path).unwrap();
    path
}

fn graph(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("graph of SDXL's UNet");
    let mut bytes = Vec::new();
    GzDecoder::new(File::open(UNET).unwrap())
        .read_to_end(&mut bytes)
        .unwrap();
    group.throughput(Throughput::Bytes(bytes.len() as u64));
    group.bench_function("parse", |b| {
        b.iter_batched(
            || bytes.clone(),
            |bytes| Graph::parse(bytes).unwrap(),
            criterion::BatchSize::LargeInput,
        );
    });
    group.bench_function("read, unpack and parse", |b| {
        b.iter(|| Graph::load(Path::new(UNET)).unwrap());
    });
    group.finish();
}

/// Soft shapes with grain, which compress about as photographs do.
fn picture(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("picture of 1024²");
    let grain = Noise::new(1).normal([1, 3, SIDE, SIDE]);
    let pixels = Array3::from_shape_fn((3, SIDE, SIDE), |(c, y, x)| {
        let wave = (x as f32 / 90.0).sin() * (y as f32 / (70.0 + 20.0 * c as f32)).cos();
        0.7 * wave + 0.02 * grain[[0, c, y, x]]
    });
    group.throughput(Throughput::Elements((SIDE * SIDE) as u64));
    group.bench_function("to 8 bits", |b| {
        b.iter(|| to_rgb(black_box(&pixels.view())));
    });
    let picture = to_rgb(&pixels.view());
    let request = Request::default();
    group.bench_function("encode PNG", |b| {
        b.iter(|| {
            let mut file = Vec::new();
            write_png(&mut file, &picture, &request).unwrap();
            file
        });
    });
    group.finish();
}
