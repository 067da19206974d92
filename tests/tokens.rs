//! Token ids of a thousand prompts in many scripts against transformers' tokenizer, and what chunks are.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::collections::BTreeMap;
use std::path::Path;

use proptest::prelude::*;
use serde::Deserialize;
use sha2::{Digest, Sha256};
use tronie::model_file::ModelFile;
use tronie::prompt::{Piece, passages};
use tronie::text::{ChunkRule, Frame, Tokenizer};

#[derive(Deserialize)]
struct Golden {
    prompts: Vec<String>,
    ids: BTreeMap<String, Vec<String>>,
}

const END: i64 = 753;

fn tokenizer(name: &str) -> Tokenizer {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("tests/models/tiny")
        .join(name);
    let file = |name| ModelFile::Disk(folder.join(name));
    let frame = Frame {
        bos: 752,
        eos: END,
        pad: if name == "tokenizer" { END } else { 0 },
        length: 77,
    };
    Tokenizer::from_vocab(&file("vocab.json"), &file("merges.txt"), frame).unwrap()
}

#[test]
fn a_thousand_prompts_have_the_ids_of_transformers() {
    let path = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/golden/tokens.json");
    let golden: Golden = serde_json::from_str(&std::fs::read_to_string(path).unwrap()).unwrap();
    assert_eq!(golden.prompts.len(), 1000);
    assert_eq!(golden.ids.len(), 2);
    for (name, expected) in golden.ids {
        let tokenizer = tokenizer(&name);
        let mut wrong = Vec::new();
        for (prompt, expected) in golden.prompts.iter().zip(expected) {
            let ids = tokenizer.encode("prompt", prompt).unwrap().ids;
            let ids = ids.iter().map(i64::to_string).collect::<Vec<_>>().join(",");
            let digits = Sha256::digest(ids);
            let digits = digits.iter().take(6).map(|byte| format!("{byte:02x}"));
            let digits = digits.collect::<Vec<_>>().concat();
            if digits != expected {
                wrong.push(prompt);
            }
        }
        assert!(
            wrong.is_empty(),
            "{name}: {} differ, e.g. {:?}",
            wrong.len(),
            wrong[0]
        );
    }
}

fn plain(text: &str) -> Vec<Vec<Piece>> {
    vec![vec![Piece {
        text: text.to_owned(),
        weight: 1.0,
    }]]
}

#[test]
fn a_chunk_ends_after_a_comma_among_its_last_tokens() {
    let tokenizer = tokenizer("tokenizer");
    let comma = tokenizer.encode("prompt", ",").unwrap().ids[1];
    let text = format!("{}, {}", "a ".repeat(60), "b ".repeat(40));
    let lengths = |rule| {
        let chunks = tokenizer.chunks("prompt", &plain(&text), rule).unwrap();
        let length = |ids: &[i64]| ids.iter().position(|id| *id == END).unwrap() - 1;
        chunks
            .iter()
            .map(|chunk| length(&chunk.ids))
            .collect::<Vec<_>>()
    };
    assert_eq!(lengths(ChunkRule::Full), [75, 26]);
    assert_eq!(lengths(ChunkRule::Comma), [61, 40]);
    let chunks = tokenizer
        .chunks("prompt", &plain(&text), ChunkRule::Comma)
        .unwrap();
    assert_eq!(chunks[0].ids[61], comma);
}

#[test]
fn a_short_prompt_is_one_chunk_and_an_endless_one_is_refused() {
    let tokenizer = tokenizer("tokenizer_2");
    for text in ["", "a sailor"] {
        let chunks = tokenizer
            .chunks("prompt", &plain(text), ChunkRule::Full)
            .unwrap();
        assert_eq!(chunks.len(), 1);
        assert_eq!(chunks[0].ids, tokenizer.encode("prompt", text).unwrap().ids);
    }
    let error = tokenizer.chunks("negative", &plain(&"a ".repeat(2_401)), ChunkRule::Full);
    let message = error.unwrap_err().to_string();
    assert!(
        message.contains("negative") && message.contains("33") && message.contains("32"),
        "{message}"
    );
}

proptest! {
    #[test]
    fn chunks_hold_every_token_once_with_its_weight(
        words in prop::collection::vec((prop::sample::select(vec!["a", "sailor", ",", "é", "日本", "BREAK"]), 1..20_u8), 0..31),
        commas: bool,
    ) {
        let tokenizer = tokenizer("tokenizer");
        let write = |(word, weight): &(&str, u8)| format!("({word}:{})", f32::from(*weight) / 10.0);
        let text = words.iter().map(write).collect::<String>();
        let passages = passages("prompt", &text).unwrap();
        let rule = if commas { ChunkRule::Comma } else { ChunkRule::Full };
        let mut expected = Vec::new();
        for piece in passages.iter().flatten() {
            let chunk = &tokenizer.chunks("prompt", &plain(&piece.text), ChunkRule::Full).unwrap()[0];
            let ids = chunk.ids[1..].iter().take_while(|id| **id != END);
            expected.extend(ids.map(|id| (*id, piece.weight)));
        }
        let mut found = Vec::new();
        for chunk in tokenizer.chunks("prompt", &passages, rule).unwrap() {
            prop_assert_eq!((chunk.ids.len(), chunk.weights.len()), (77, 77));
            let content = chunk.ids.iter().zip(chunk.weights).skip(1);
            found.extend(content.take_while(|(id, _)| **id != END).map(|(id, weight)| (*id, weight)));
        }
        prop_assert_eq!(found, expected);
    }
}
