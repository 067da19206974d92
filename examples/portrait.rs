//! Text to picture as a library: `cargo run --release --example portrait -- "an old sailor"`.

use tronie::{Control, Event, Options, Pipeline, Request};

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let prompt = std::env::args().nth(1).ok_or("say what to paint")?;
    let pipeline = Pipeline::open(Options::default())?;
    let request = Request {
        prompt,
        model: Some("demo".into()),
        refiner: Some("demo-refiner".into()),
        refine_at: Some(0.8),
        ..Request::default()
    };
    let output = pipeline.generate(&request, &mut |event| {
        if let Event::Step { done, total, .. } = event {
            println!("step {done} of {total}");
        }
        Control::Continue
    })?;
    for (i, picture) in output.pictures.iter().enumerate() {
        picture.save(format!("portrait-{i}.png"))?;
    }
    Ok(())
}
