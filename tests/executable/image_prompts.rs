//! Image prompts on the command line: what is refused.

use crate::workshop::Workshop;

#[test]
fn a_model_without_adapters_says_how_to_add_one() {
    let w = Workshop::new();
    std::fs::write(w.path("a.jpg"), "").unwrap();
    w.assert_fails(
        &w.generate(&["--image-prompt", "plus=a.jpg"]),
        2,
        &[
            "image-prompt",
            "`plus`",
            "has none",
            "python -m export adapter",
        ],
    );
}

#[test]
fn every_image_prompt_of_the_command_line_is_read() {
    let w = Workshop::new();
    std::fs::write(w.path("a.jpg"), "").unwrap();
    let second = |form: &str| w.generate(&["--image-prompt", "plus=a.jpg", "--image-prompt", form]);
    w.assert_fails(
        &second("plus"),
        2,
        &["`plus` is not NAME=FILE", "--image-prompt"],
    );
    w.assert_fails(
        &second("plus=a.jpg@2,3"),
        2,
        &["`2,3` is no scale", "style+layout"],
    );
    w.assert_fails(
        &second("plus=a.jpg,b.jpg"),
        3,
        &["b.jpg", "not there", "JSON"],
    );
}
