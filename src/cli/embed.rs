//! `tronie embed`: what an image encoder sees in a picture, kept for later runs.

use super::args::EmbedArgs;
use super::bars::Bars;
use super::console::{print, say};
use super::generate::stop_on_ctrl_c;
use crate::checkpoint;
use crate::error::{Error, Result};
use crate::files::check_writable;
use crate::pipeline::{ImageEmbedding, Options, Pipeline};
use crate::progress::Cancel;
use crate::request::Request;

pub(super) fn embed(args: &EmbedArgs) -> Result<()> {
    let output = args
        .output
        .clone()
        .unwrap_or_else(|| args.picture.with_extension("safetensors"));
    if ImageEmbedding::is_file(&args.picture) {
        let reason = format!("{} is one of embeddings already", args.picture.display());
        return Err(Error::request("picture", reason));
    }
    check_writable(&output)?;
    let cancel = Cancel::default();
    stop_on_ctrl_c(&cancel)?;
    let pipeline = Pipeline::open(Options {
        provider: args.provider,
        cancel,
        ..args.catalogue.options()
    })?;
    let named = Request {
        model: args.model.clone(),
        ..Request::default()
    };
    checkpoint::open(pipeline.catalogue(), &named)?;
    let model = named.model_name(pipeline.catalogue())?;
    let mut bars = Bars::new();
    let result = pipeline.embed_image(
        (&model, &args.adapter),
        (&args.picture, args.crop.unwrap_or_default()),
        args.memory,
        &mut |event| bars.show(&event),
    );
    bars.clear();
    let (embedding, encoder) = result?;
    embedding.save(&output, &encoder)?.publish()?;
    if args.json {
        let json = serde_json::json!({"output": output, "image-encoder": encoder});
        return print(&json.to_string());
    }
    say(&format!(
        "wrote {}, for every adapter with {encoder}",
        output.display()
    ));
    Ok(())
}
