//! The prompt syntax: AUTOMATIC1111's own examples, and what must hold for every text.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use proptest::prelude::*;
use tronie::prompt::{Piece, Scheduled, passages};

/// The texts of a schedule over ten steps, each with the step that it ends at.
fn schedule(text: &str) -> Vec<(usize, String)> {
    let scheduled = Scheduled::parse("prompt", text).unwrap();
    let mut found: Vec<(usize, String)> = Vec::new();
    for step in 0..10 {
        let text = scheduled.at(step, 10);
        match found.last_mut().filter(|(_, last)| *last == text) {
            Some(last) => last.0 = step + 1,
            None => found.push((step + 1, text)),
        }
    }
    found
}

fn weights(text: &str) -> Vec<(String, f32)> {
    let passages = passages("prompt", text).unwrap();
    let pieces = passages.into_iter().flatten();
    pieces.map(|p| (p.text, p.weight)).collect()
}

/// The examples in the documentation of `get_learned_conditioning_prompt_schedules`.
#[test]
fn schedules_are_those_of_the_web_ui() {
    for (text, expected) in [
        ("test", &[(10, "test")][..]),
        ("a [b:3]", &[(3, "a "), (10, "a b")]),
        ("a [b: 3]", &[(3, "a "), (10, "a b")]),
        ("a [[[b]]:2]", &[(2, "a "), (10, "a [[b]]")]),
        ("[(a:2):3]", &[(3, ""), (10, "(a:2)")]),
        ("a [b : c : 1] d", &[(1, "a b  d"), (10, "a  c  d")]),
        ("a[b:[c:d:2]:1]e", &[(1, "abe"), (2, "ace"), (10, "ade")]),
        ("a [unbalanced", &[(10, "a [unbalanced")]),
        ("a [b:.5] c", &[(5, "a  c"), (10, "a b c")]),
        ("((a][:b:c [d:3]", &[(3, "((a][:b:c "), (10, "((a][:b:c d")]),
        ("[a:b:0.4]", &[(4, "a"), (10, "b")]),
        ("[a:b:1.0]", &[(10, "a")]),
        ("[a:b:99]", &[(10, "a")]),
        ("[a:b:0]", &[(10, "b")]),
        ("[a:b:-1]", &[(10, "b")]),
        ("[a:b:0.55]", &[(5, "a"), (10, "b")]),
        (
            r"\[a:b:3\] [c\:d:3]",
            &[(3, r"\[a:b:3\] "), (10, r"\[a:b:3\] c\:d")],
        ),
        (
            "[a:b:nan] [a:b:inf] [a:b:c:3]",
            &[(10, "[a:b:nan] [a:b:inf] [a:b:c:3]")],
        ),
    ] {
        let expected = expected.iter().map(|(n, t)| (*n, (*t).to_owned()));
        assert_eq!(schedule(text), expected.collect::<Vec<_>>(), "{text}");
    }
}

#[test]
fn turns_are_those_of_the_web_ui() {
    let texts = |text: &str, steps: usize| {
        let scheduled = Scheduled::parse("prompt", text).unwrap();
        (0..steps)
            .map(|step| scheduled.at(step, 10))
            .collect::<Vec<_>>()
    };
    assert_eq!(texts("[a|(b:1.1)]", 3), ["a", "(b:1.1)", "a"]);
    assert_eq!(texts("[fe|]male", 3), ["female", "male", "female"]);
    assert_eq!(
        texts("[fe|||]male", 5),
        ["female", "male", "male", "male", "female"]
    );
    assert_eq!(texts("[a|[b:c:2]] x", 4), ["a x", "b x", "a x", "c x"]);
}

/// The examples in the documentation of `parse_prompt_attention`.
#[test]
fn weights_are_those_of_the_web_ui() {
    for (text, expected) in [
        ("normal text", &[("normal text", 1.0_f64)][..]),
        (
            "an (important) word",
            &[("an ", 1.0), ("important", 1.1), (" word", 1.0)],
        ),
        ("(unbalanced", &[("unbalanced", 1.1)]),
        (r"\(literal\]", &[("(literal]", 1.0)]),
        ("(unnecessary)(parens)", &[("unnecessaryparens", 1.1)]),
        (
            "a (((house:1.3)) [on] a (hill:0.5), sun, (((sky))).",
            &[
                ("a ", 1.0),
                ("house", 1.573),
                (" ", 1.1),
                ("on", 1.0),
                (" a ", 1.1),
                ("hill", 0.55),
                (", sun, ", 1.1),
                ("sky", 1.4641),
                (".", 1.1),
            ],
        ),
        ("a: b) c] :1.2)", &[("a: b) c] :1.2)", 1.0)]),
        ("(a:-0.5)(b: +2 )", &[("a", -0.5), ("b", 2.0)]),
        ("(a:1.2.3) b", &[("a:1.2.3", 1.1), (" b", 1.0)]),
        (r"a\\b \c", &[(r"a\b c", 1.0)]),
        ("", &[]),
        ("()", &[]),
    ] {
        let found = weights(text);
        assert_eq!(found.len(), expected.len(), "{text}: {found:?}");
        for ((found, weight), (text, expected)) in found.iter().zip(expected) {
            assert_eq!(found, text);
            assert!(
                (f64::from(*weight) - expected).abs() < 1e-6,
                "{text}: {weight}"
            );
        }
    }
}

#[test]
fn a_break_is_a_word_of_its_own() {
    let texts = |text: &str| {
        let passages = passages("prompt", text).unwrap();
        let text = |p: &Vec<Piece>| p.iter().map(|p| p.text.as_str()).collect::<String>();
        passages.iter().map(text).collect::<Vec<_>>()
    };
    assert_eq!(texts("a BREAK b"), ["a", "b"]);
    assert_eq!(texts("a\n BREAK\tb BREAK"), ["a", "b", ""]);
    assert_eq!(texts("BREAK BREAK a"), ["", "", "a"]);
    assert_eq!(texts("(a BREAK b:1.2)"), ["a", "b"]);
    assert_eq!(
        texts("BREAKFAST xBREAK BREAK_ ÄBREAK"),
        ["BREAKFAST xBREAK BREAK_ ÄBREAK"]
    );
}

#[test]
fn what_cannot_be_computed_is_refused() {
    let deep = format!("{}a{}", "[".repeat(40), ":b:1]".repeat(40));
    let message = Scheduled::parse("negative", &deep).unwrap_err().to_string();
    assert!(
        message.contains("negative") && message.contains("32"),
        "{message}"
    );
    let heavy = format!("{}a", "(".repeat(2_000));
    let message = passages("prompt-2", &heavy).unwrap_err().to_string();
    assert!(
        message.contains("prompt-2") && message.contains("finite"),
        "{message}"
    );
}

/// A text in which everything that has a meaning has lost it.
fn escaped(text: &str) -> String {
    let mut escaped = String::new();
    for c in text.chars() {
        if "\\()[]".contains(c) {
            escaped.push('\\');
        }
        escaped.push(c);
    }
    escaped
}

/// Texts that are mostly syntax.
fn syntax() -> impl Strategy<Value = String> {
    let token = prop::sample::select(vec![
        "(", ")", "[", "]", ":", "|", "\\", "BREAK", " ", ",", "a", "b", "é", "日", "1.3", ".5",
        "3", "-", "1e9",
    ]);
    prop::collection::vec(token, 0..40).prop_map(|tokens| tokens.concat())
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(2_000))]

    #[test]
    fn no_text_panics_and_every_weight_is_finite(text in prop_oneof![syntax(), any::<String>()], step in 0_usize..50) {
        let scheduled = Scheduled::parse("prompt", &text).unwrap();
        let now = scheduled.at(step, 50);
        for piece in passages("prompt", &now).unwrap().iter().flatten() {
            prop_assert!(piece.weight.is_finite());
            prop_assert!(!piece.text.is_empty());
        }
    }

    #[test]
    fn an_escaped_text_is_itself(text in any::<String>()) {
        prop_assume!(!text.contains("BREAK"));
        let written = escaped(&text);
        let now = Scheduled::parse("prompt", &written).unwrap().at(3, 7);
        let pieces = weights(&now);
        prop_assert!(pieces.len() <= 1 && pieces.iter().all(|(_, weight)| weight.to_bits() == 1.0_f32.to_bits()));
        prop_assert_eq!(pieces.into_iter().map(|(text, _)| text).collect::<String>(), text);
    }

    #[test]
    fn pieces_that_are_written_down_are_read_again(
        pieces in prop::collection::vec(("[^\\x00]{1,8}", -3_000_i32..3_000), 0..8),
    ) {
        prop_assume!(pieces.iter().all(|(text, _)| !text.contains("BREAK")));
        let of = |n: i32| n as f32 / 1_000.0;
        let write = |(text, n): &(String, i32)| format!("({}:{})", escaped(text), of(*n));
        let written = pieces.iter().map(write).collect::<String>();
        let mut expected: Vec<(String, f32)> = Vec::new();
        for (text, n) in &pieces {
            match expected.last_mut().filter(|(_, w)| w.to_bits() == (of(*n)).to_bits()) {
                Some(last) => last.0.push_str(text),
                None => expected.push((text.clone(), of(*n))),
            }
        }
        let found = weights(&Scheduled::parse("prompt", &written).unwrap().at(0, 1));
        prop_assert_eq!(found, expected);
    }
}
