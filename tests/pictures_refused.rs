//! Pictures that cannot be read: refused with a reason, before memory is taken, and never a panic.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use std::io::Write as _;
use std::path::Path;

use flate2::Compression;
use flate2::write::ZlibEncoder;
use image::RgbImage;
use proptest::prelude::*;
use safetensors::SafeTensors;
use tempfile::TempDir;
use tronie::Error;
use tronie::image::{area_mask, read_picture};

fn golden() -> Vec<u8> {
    let path = concat!(
        env!("CARGO_MANIFEST_DIR"),
        "/tests/golden/pictures.safetensors"
    );
    std::fs::read(path).unwrap()
}

/// A file of `export/golden/pictures.py`.
fn file(name: &str) -> Vec<u8> {
    let bytes = golden();
    let tensors = SafeTensors::deserialize(&bytes).unwrap();
    let tensor = tensors.tensor(&format!("{name}.file")).unwrap();
    tensor.data().to_vec()
}

fn read(folder: &Path, content: &[u8]) -> tronie::Result<RgbImage> {
    let path = folder.join("picture");
    // Some file systems wait for the disk where an existing file is written anew.
    drop(std::fs::remove_file(&path));
    std::fs::write(&path, content).unwrap();
    read_picture(&path)
}

fn reason(result: tronie::Result<RgbImage>) -> String {
    match result {
        Err(Error::Input { path, reason }) => {
            assert!(path.ends_with("picture"));
            reason
        }
        other => panic!("an error about the file was expected, not {other:?}"),
    }
}

fn chunk(kind: [u8; 4], body: &[u8]) -> Vec<u8> {
    let mut crc = flate2::Crc::new();
    crc.update(&kind);
    crc.update(body);
    let length = (body.len() as u32).to_be_bytes();
    [&length[..], &kind, body, &crc.sum().to_be_bytes()].concat()
}

fn deflated(bytes: &[u8]) -> Vec<u8> {
    let mut encoder = ZlibEncoder::new(Vec::new(), Compression::best());
    encoder.write_all(bytes).unwrap();
    encoder.finish().unwrap()
}

/// A grey PNG of 8 bits with chunks after its header.
fn png((width, height): (u32, u32), chunks: &[Vec<u8>]) -> Vec<u8> {
    let mut header = [width.to_be_bytes(), height.to_be_bytes()].concat();
    header.extend([8, 0, 0, 0, 0]);
    let mut bytes = b"\x89PNG\r\n\x1a\n".to_vec();
    bytes.extend(chunk(*b"IHDR", &header));
    bytes.extend(chunks.concat());
    bytes.extend(chunk(*b"IEND", &[]));
    bytes
}

#[test]
fn what_is_no_picture_is_refused_with_what_would_be_one() {
    let folder = TempDir::new().unwrap();
    let cases: [(&[u8], &str); 5] = [
        (b"", "is empty"),
        (
            b"{\"prompt\": \"a cat\"}",
            "not a picture of a known format",
        ),
        (b"GIF89a\x01\x00\x01\x00\x00\x00\x00;", "is a Gif file"),
        (b"II*\0\x08\0\0\0\0\0", "is a Tiff file"),
        (b"\0\0\0\x20ftypavif\0\0\0\0avifmif1", "is a Avif file"),
    ];
    for (content, expected) in cases {
        let said = reason(read(folder.path(), content));
        assert!(said.contains(expected), "{said}");
        assert!(said.contains("PNG, JPEG, WebP and BMP are read"), "{said}");
    }
    for path in [folder.path().to_owned(), folder.path().join("absent.png")] {
        assert!(matches!(read_picture(&path), Err(Error::Input { .. })));
        assert!(matches!(area_mask(&path, (8, 8)), Err(Error::Input { .. })));
    }
}

#[test]
fn a_picture_that_is_too_large_is_refused_by_its_header() {
    let folder = TempDir::new().unwrap();
    let data = [chunk(*b"IDAT", &deflated(&vec![0; 1 << 20]))];
    let mut jpeg = file("jpeg-420");
    let frame = jpeg.windows(2).position(|w| w == [0xFF, 0xC0]).unwrap();
    jpeg[frame + 5..frame + 9].copy_from_slice(&[0xFF; 4]);
    let mut bmp = file("bmp-rgb");
    bmp[18..22].copy_from_slice(&60_000_u32.to_le_bytes());
    bmp[22..26].copy_from_slice(&50_000_u32.to_le_bytes());
    let mut webp = file("webp-rgb");
    let at = webp.windows(4).position(|w| w == b"VP8L").unwrap() + 9;
    // Two sides of 14 bits each, less one.
    let sides = 15_999_u32 * ((1 << 14) + 1);
    webp[at..at + 4].copy_from_slice(&sides.to_le_bytes());
    let cases = [
        (png((100_000, 100_000), &data), "100000 x 100000"),
        (png((20_000, 20_000), &data), "20000 x 20000"),
        (png((1, 70_000), &data), "1 x 70000"),
        (jpeg, "65535 x 65535"),
        (bmp, "60000 x 50000"),
        (webp, "16000 x 16000"),
    ];
    for (content, expected) in cases {
        let said = reason(read(folder.path(), &content));
        assert!(said.contains(expected), "{expected}: {said}");
        assert!(said.contains("make it smaller"), "{said}");
    }
    let said = reason(read(folder.path(), &png((u32::MAX >> 1, 3), &data)));
    assert!(said.contains("make it smaller"), "{said}");
}

#[test]
fn what_expands_beyond_measure_beside_the_pixels_is_not_kept() {
    let folder = TempDir::new().unwrap();
    let data = chunk(*b"IDAT", &deflated(&[0, 7, 9, 0, 1, 2]));
    let zeros = deflated(&vec![0; 80 << 20]);
    let profile = chunk(*b"iCCP", &[b"a\0\0", &zeros[..]].concat());
    let text = chunk(*b"zTXt", &[b"a\0\0", &zeros[..]].concat());
    let picture = read(folder.path(), &png((2, 2), &[profile, text, data])).unwrap();
    assert_eq!(picture.as_raw(), &[7, 7, 7, 9, 9, 9, 1, 1, 1, 2, 2, 2]);
}

#[test]
fn a_file_that_is_cut_off_is_refused_or_whole() {
    let folder = TempDir::new().unwrap();
    for name in [
        "png-rgba",
        "png-palette",
        "jpeg-420",
        "jpeg-progressive",
        "jpeg-restarts",
        "jpeg-cmyk",
        "webp-rgba",
        "webp-lossy",
        "bmp-rgb",
    ] {
        let whole = file(name);
        let picture = read(folder.path(), &whole).unwrap();
        let mut refused = 0;
        for length in 0..whole.len() {
            match read(folder.path(), &whole[..length]) {
                Ok(read) => assert!(read == picture, "{name} of {length} bytes"),
                Err(Error::Input { .. }) => refused += 1,
                Err(other) => panic!("{other}"),
            }
        }
        // Only what follows the pixels may be absent.
        assert!(
            whole.len() - refused < 64,
            "{name}: {refused} of {}",
            whole.len()
        );
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn no_bytes_make_the_reader_panic(bytes in prop::collection::vec(any::<u8>(), 0..400)) {
        let folder = TempDir::new().unwrap();
        drop(read(folder.path(), &bytes));
        for start in [&b"\x89PNG\r\n\x1a\n"[..], b"\xFF\xD8\xFF\xE0", b"RIFF\x40\0\0\0WEBPVP8 ", b"BM"] {
            drop(read(folder.path(), &[start, &bytes[..]].concat()));
        }
    }

    #[test]
    fn no_damage_makes_the_reader_panic(
        changes in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..6),
    ) {
        let folder = TempDir::new().unwrap();
        let bytes = golden();
        let tensors = SafeTensors::deserialize(&bytes).unwrap();
        for (name, tensor) in tensors.iter() {
            if !name.contains(".file") || name.contains("turned") {
                continue;
            }
            let mut content = tensor.data().to_vec();
            for (place, value) in &changes {
                let place = place.index(content.len());
                content[place] = *value;
            }
            drop(read(folder.path(), &content));
        }
    }
}
