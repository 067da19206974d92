//! Integrals of the solvers that predict clean latents as a polynomial in λ = −ln σ.
//!
//! Between two levels the flow and the reverse SDE have the same form: latents keep a share, x0 is integrated against an
//! exponential, and the SDE adds noise (Lu et al. 2022, "DPM-Solver++", equations 9 and 12).

use crate::schedule::Schedule;

/// What latents move along.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Path {
    /// The probability-flow ODE.
    Flow,
    /// The reverse SDE: every step draws noise.
    Sde,
}

/// One way from a level to a lower one.
#[derive(Debug, Clone, Copy)]
pub(super) struct Interval {
    /// λ's rise h, infinite where the way ends at zero.
    pub rise: f64,
    /// Share of the latents that stays.
    pub keep: f64,
    /// Weight of a constant x0.
    pub data: f64,
    /// Weight of x0's slope times h.
    pub slope: f64,
    /// Weight of the second difference that DPM-Solver's third order takes away.
    pub bend: f64,
    /// Weight of unit noise; zero without an SDE.
    pub noise: f64,
}

impl Interval {
    /// The way from σ = `from` down to `to`, in the schedule's convention.
    pub(super) fn new(schedule: &Schedule, from: f64, to: f64, path: Path) -> Self {
        let sde = path == Path::Sde;
        let ((alpha, s), (_, s_from)) = (schedule.mixture(to), schedule.mixture(from));
        let rise = (from / to).ln();
        // e^{−h} is the ratio of the levels, and 0 at the end.
        let ratio = to / from;
        if rise == 0.0 {
            // A curve that has reached its lowest level already: nothing is left to remove, and 1/h would not be finite.
            return Self {
                rise,
                keep: 1.0,
                data: 0.0,
                slope: 0.0,
                bend: 0.0,
                noise: 0.0,
            };
        }
        let (span, left) = if sde {
            (2.0 * rise, ratio * ratio)
        } else {
            (rise, ratio)
        };
        // diffusers' third order of the SDE adds a half where the integral takes one away.
        let half = if sde && schedule.options.diffusers_quirks {
            -0.5
        } else {
            0.5
        };
        Self {
            rise,
            keep: s / s_from * if sde { ratio } else { 1.0 },
            data: alpha * (1.0 - left),
            slope: alpha * ((left - 1.0) / span + 1.0),
            bend: alpha * ((left - 1.0 + span) / (span * span) - half),
            noise: if sde { s * (1.0 - left).sqrt() } else { 0.0 },
        }
    }

    /// λ's rise from `from` to `to` as a share of this way's.
    pub(super) fn share(&self, from: f64, to: f64) -> f64 {
        (from / to).ln() / self.rise
    }
}
