//! From a request to pictures.
//!
//! Networks are loaded for the stage that needs them and dropped after it, so that the text encoders, a UNet and the
//! VAE are never in memory together, unless the memory mode keeps them. Weight files stay mapped, which costs address
//! space only.

mod components;
mod denoise;
mod distilled;
mod encode;
mod expand;
mod guidance;
mod handoff;
mod identity;
mod image_embedding;
mod image_prompts;
mod lora_merge;
mod lora_report;
mod loras;
mod overlay;
mod overlay_write;
mod prepare;
mod projection;
mod residency;
mod saved_embedding;
mod segments;
mod sources;
mod zip;

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::time::Instant;

use image::RgbImage;

pub use encode::Read;
pub use handoff::LatentHandoff;
pub use image_embedding::ImageEmbedding;
pub use lora_merge::MergeReport;
pub use lora_report::{ComponentShare, LoraReport, TensorChange, TriggerWords};
use loras::Remembered;
pub use overlay_write::OverlayType;
use residency::Residents;
pub use zip::{Lost, Zipped, Zipping};

use crate::checkpoint;
use crate::error::{Error, Result};
use crate::hub::Hub;
use crate::manifest::Catalogue;
use crate::noise::Noise;
use crate::plan::{Plan, names};
use crate::progress::{Cancel, Event, Observer, Stage};
use crate::provider::Provider;
use crate::request::{Request, Resolved, StopAt};
use crate::runtime::Runtime;
use crate::tensor::Latents;
use crate::vae;
use crate::weights::ExpansionCache;

/// How a pipeline finds and drives its surroundings.
#[derive(Debug, Clone, Default)]
pub struct Options {
    /// The catalogue ([`Catalogue::named`]); `None` looks in the usual places ([`Catalogue::find`]).
    pub models: Option<PathBuf>,
    /// ONNX Runtime's library or its folder; `None` looks in the usual places.
    pub ort_lib: Option<PathBuf>,
    /// Where ONNX Runtime computes.
    pub provider: Provider,
    /// Threads inside an operator; `None` is one a physical core.
    pub threads: Option<usize>,
    /// Where f16 and bf16 weights are expanded to; `None` is what the environment says.
    pub expansions: Option<ExpansionCache>,
    /// Stops everything that the pipeline runs.
    pub cancel: Cancel,
    /// Folder for ONNX Runtime's profiles of the networks that run, one a session; `None` takes none, which is faster.
    /// [`crate::runtime::Profile::read_all`] reads them when the pipeline is dropped.
    pub profiles: Option<PathBuf>,
}

/// A catalogue, a runtime and the way to files: ready for any number of requests.
#[derive(Debug)]
pub struct Pipeline {
    catalogue: Catalogue,
    runtime: Runtime,
    hub: Hub,
    residents: Residents,
    loras: Remembered,
    expansions: ExpansionCache,
}

/// What a request led to.
#[derive(Debug)]
pub struct Output {
    /// The pictures; none when the run stopped before its end.
    pub pictures: Vec<RgbImage>,
    /// The latents where the run ended.
    pub handoff: LatentHandoff,
    /// The request without gaps: it makes the same pictures again.
    pub request: Request,
    /// Seconds by stage.
    pub seconds: BTreeMap<Stage, f64>,
}

impl Pipeline {
    /// Reads the catalogue and loads ONNX Runtime.
    ///
    /// # Errors
    /// Those of [`Hub::catalogue`], [`Runtime::open`] and [`Hub`]'s settings.
    pub fn open(options: Options) -> Result<Self> {
        let hub = Hub::from_env()?;
        let catalogue = hub.catalogue(options.models.as_deref())?;
        let runtime = Runtime::open(
            options.ort_lib.as_deref(),
            options.provider,
            options.threads,
            options.cancel,
        )?;
        let runtime = match options.profiles {
            Some(folder) => runtime.profiled(&folder),
            None => runtime,
        };
        Ok(Self {
            catalogue,
            runtime,
            hub,
            residents: Residents::default(),
            loras: Remembered::default(),
            expansions: options.expansions.unwrap_or_else(ExpansionCache::from_env),
        })
    }

    /// The models it knows.
    pub fn catalogue(&self) -> &Catalogue {
        &self.catalogue
    }

    /// The runtime it drives.
    pub fn runtime(&self) -> &Runtime {
        &self.runtime
    }

    /// Fills a request's gaps and checks every value, after the files that it names in place of models are opened.
    ///
    /// # Errors
    /// Those of [`checkpoint::open`] and [`Request::resolve`].
    pub fn resolve(&self, request: &Request, seed: u64) -> Result<Resolved> {
        checkpoint::open(&self.catalogue, request)?;
        request.resolve(&self.catalogue, seed)
    }

    /// Paints a request: prepare, denoise, decode.
    ///
    /// # Errors
    /// [`Error::Request`] for unusable fields, otherwise those of the three stages.
    pub fn generate(&self, request: &Request, observer: &mut Observer<'_>) -> Result<Output> {
        let mut clock = Clock::default();
        let mut timed = |event: Event<'_>| {
            if let Event::Stage { stage, .. } = &event {
                clock.switch(Some(*stage));
            }
            observer(event)
        };
        let (pictures, handoff, request) = self.paint(request, &mut timed)?;
        clock.switch(None);
        Ok(Output {
            pictures,
            handoff,
            request,
            seconds: clock.seconds,
        })
    }

    fn paint(
        &self,
        request: &Request,
        observer: &mut Observer<'_>,
    ) -> Result<(Vec<RgbImage>, LatentHandoff, Request)> {
        let (mut resolved, resumed) = self.begin(request)?;
        // As the files are now; what is loaded later is the same.
        self.open_loras(&resolved.lora_set(), observer)?;
        self.settle_memory(&mut resolved, observer)?;
        let schedule = self.schedule(&resolved)?;
        let until = stop_step(request.stop_at, &resolved, &schedule)?;
        let start = resumed.as_ref().map_or(0, |h| h.next_step);
        let steps = start..until.unwrap_or(schedule.steps());
        if start > steps.end {
            return Err(Error::request(
                "stop-at",
                format!("{} is before the saved latents' step {start}", steps.end),
            ));
        }
        let plan = self.prepare(&resolved, schedule, &steps, observer)?;
        let from = match resumed {
            Some(handoff) => handoff.fitting(&plan, request.latents_in.as_deref())?,
            None => self.first_latents(&plan, &resolved),
        };
        let handoff = self.denoise(&plan, from, steps.end, observer)?;
        let pictures = match until {
            Some(_) => Vec::new(),
            None => self.decode(&resolved, &handoff.latents, observer)?,
        };
        Ok((pictures, handoff, resolved.request.without_places()))
    }

    /// Noise at the schedule's first level, ready to be denoised.
    pub fn first_latents(&self, plan: &Plan, request: &Resolved) -> LatentHandoff {
        let mut noise = Noise::of(request.request.noise.unwrap_or_default(), &request.seeds);
        let scale = plan.schedule.init_noise_sigma as f32;
        let latents = noise.normal(plan.latents).mapv_into(|x| x * scale);
        LatentHandoff::start(latents, noise)
    }

    /// Turns final latents into pictures, with the VAE of the request's base model.
    ///
    /// # Errors
    /// Those of loading and running the VAE; [`Error::NonFinite`], [`Error::Black`].
    pub fn decode(
        &self,
        request: &Resolved,
        latents: &Latents,
        observer: &mut Observer<'_>,
    ) -> Result<Vec<RgbImage>> {
        let model = Self::decoder_of(request);
        let facts = &self.catalogue.model("model", model)?.vae;
        let mut vae = self.network(
            model,
            names::VAE_DECODER,
            &request.memory().into(),
            observer,
        )?;
        self.begin_stage(observer, Stage::Decode, model)?;
        let tiling = request.request.vae_tiling.unwrap_or_default();
        let pictures = vae::decode(&mut vae.session, facts, latents, tiling)?;
        self.give_back(vae);
        Ok(pictures)
    }

    /// The resolved request, and the latents to go on from if it names some.
    fn begin(&self, request: &Request) -> Result<(Resolved, Option<LatentHandoff>)> {
        let Some(path) = &request.latents_in else {
            self.check_surroundings(request)?;
            return Ok((self.resolve(request, random_seed())?, None));
        };
        let (handoff, saved) = LatentHandoff::load(path)?;
        let whole = saved.overridden_by(request);
        self.check_surroundings(&whole)?;
        let resolved = self.resolve(&whole, random_seed())?;
        let before = self.resolve(&saved, random_seed())?;
        let schedule = self.schedule(&before)?;
        resolved.continues(&before, handoff.next_step, |at| schedule.handoff(at))?;
        Ok((resolved, Some(handoff)))
    }

    /// A request says where it wants to run; this pipeline must be that place.
    fn check_surroundings(&self, request: &Request) -> Result<()> {
        let provider = self.runtime.provider();
        if request.provider.is_some_and(|wanted| wanted != provider) {
            let reason = format!("this pipeline was opened for {provider}");
            return Err(Error::request("provider", reason));
        }
        if request
            .models
            .as_ref()
            .is_some_and(|wanted| Catalogue::named(wanted) != self.catalogue.file)
        {
            let reason = format!("this pipeline was opened with {}", self.catalogue.file);
            return Err(Error::request("models", reason));
        }
        Ok(())
    }

    /// The model whose VAE decodes: the refiner's where one is used, as the reference pipelines do.
    fn decoder_of(request: &Resolved) -> &str {
        request
            .refine
            .as_ref()
            .map_or(&request.model, |(refiner, _)| refiner)
    }
}

/// The step at which the run stops early, `None` for the whole way.
fn stop_step(
    stop: Option<StopAt>,
    request: &Resolved,
    schedule: &crate::schedule::Schedule,
) -> Result<Option<usize>> {
    let step = match (stop, &request.refine) {
        (None, _) => return Ok(None),
        (Some(StopAt::Step(step)), _) => step,
        (Some(StopAt::Handoff), Some((_, at))) => schedule.handoff(*at),
        (Some(StopAt::Handoff), None) => {
            return Err(Error::request("stop-at", "`handoff` needs --refiner NAME"));
        }
    };
    if step > schedule.steps() {
        return Err(Error::request(
            "stop-at",
            format!("{step} is beyond the last step, {}", schedule.steps()),
        ));
    }
    Ok(Some(step))
}

/// A seed for requests that name none. torch's CPU generator uses 32 bits, so more would only look like variety.
pub fn random_seed() -> u64 {
    use std::hash::{BuildHasher as _, Hasher as _};
    std::hash::RandomState::new().build_hasher().finish() >> 32
}

/// Seconds by stage: a stage lasts from its event to the next stage's.
#[derive(Debug, Default)]
struct Clock {
    seconds: BTreeMap<Stage, f64>,
    running: Option<(Stage, Instant)>,
}

impl Clock {
    fn switch(&mut self, to: Option<Stage>) {
        if let Some((stage, since)) = self.running.take() {
            *self.seconds.entry(stage).or_default() += since.elapsed().as_secs_f64();
        }
        self.running = to.map(|stage| (stage, Instant::now()));
    }
}
