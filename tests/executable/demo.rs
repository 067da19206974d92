//! `tronie demo` with a sheet of the tiny models: what is beside the catalogue is painted and laid out.

use std::path::Path;
use std::process::Output;

use crate::workshop::Workshop;

const SHEET: &str = "models/demo-pictures/sheet.json";

/// A workshop with a sheet: a picture, and requests with and without it.
fn studio() -> Workshop {
    let w = Workshop::new();
    let folder = w.path("models/demo-pictures");
    std::fs::create_dir_all(&folder).unwrap();
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let face = root.join("tests/models/judge/p0.png");
    std::fs::copy(face, folder.join("face.png")).unwrap();
    let sheet = r#"{"columns": 2, "tiles": [
        {"caption": "the face", "picture": "face.png"},
        {"caption": "text only", "request": {"prompt": "a sailor", "model": "tiny", "steps": 2, "seed": 1}},
        {"caption": "the face, kept", "request": {"prompt": "a sailor", "model": "tiny", "steps": 2, "seed": 1,
            "image-prompts": [{"adapter": "ip-adapter-plus-face", "pictures": ["face.png"]}]}}]}"#;
    std::fs::write(w.path(SHEET), sheet).unwrap();
    w
}

fn demo(w: &Workshop, more: &[&str]) -> Output {
    let arguments = [&["demo", "-o", "sheet.png"], more].concat();
    w.tronie(&arguments).output().unwrap()
}

#[test]
fn a_sheet_has_every_tile() {
    let w = studio();
    let output = demo(&w, &[]);
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{said}");
    for part in [
        "the face, kept",
        "loading image_encoder of tiny",
        "wrote sheet.png",
    ] {
        assert!(said.contains(part), "no {part:?} in: {said}");
    }
    // The networks stay from tile to tile.
    assert_eq!(said.matches("loading text_encoder of tiny").count(), 1);
    let sheet = image::open(w.path("sheet.png")).unwrap().to_rgb8();
    assert_eq!(
        sheet.dimensions(),
        (16 + 2 * 272, 16 + 2 * (256 + 16 + 48 + 16))
    );
    let (shown, painted) = (sheet.get_pixel(144, 144), sheet.get_pixel(144 + 272, 144));
    assert_ne!(shown, painted);
    assert_ne!(painted.0, [255; 3]);
}

#[test]
fn what_is_wrong_with_a_sheet_is_said() {
    let w = studio();
    let text = std::fs::read_to_string(w.path(SHEET)).unwrap();
    for (from, to, parts) in [
        (
            "\"columns\": 2",
            "\"columns\": 0",
            ["sheet.json", "columns"],
        ),
        (
            "\"caption\": \"text only\", ",
            "",
            ["sheet.json", "caption"],
        ),
        (
            "\"picture\": \"face.png\"",
            "\"picture\": \"..\"",
            ["sheet.json", "`..`"],
        ),
    ] {
        assert!(text.contains(from), "{from}");
        std::fs::write(w.path(SHEET), text.replacen(from, to, 1)).unwrap();
        w.assert_fails(&demo(&w, &[]), 3, &parts);
    }
    std::fs::write(w.path(SHEET), text.replace("face.png", "nobody.png")).unwrap();
    w.assert_fails(&demo(&w, &[]), 4, &["nobody.png"]);
    std::fs::remove_file(w.path(SHEET)).unwrap();
    w.assert_fails(&demo(&w, &[]), 4, &["sheet.json", "--models built-in"]);
}
