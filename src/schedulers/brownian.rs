//! A path of Brownian motion that can be asked anywhere: the same seed, the same path, whatever is asked and in which
//! order.
//!
//! Python twin: torchsde's `BrownianInterval` as diffusers' `BrownianTreeNoiseSampler` sets it up (a tree of halves down to
//! 10⁻⁶, numpy's `SeedSequence` with a pool of 24 words for every node).

use std::collections::{BTreeMap, BTreeSet};

use rayon::prelude::*;

use crate::noise::{Noise, NoiseKind};

/// Words in the pool of a seed sequence.
const POOL: usize = 24;

/// Values that are worked out together: they stay in the fastest cache over all halvings.
const BLOCK: usize = 2048;

/// A path over an interval of noise levels.
pub(super) struct BrownianTree {
    kind: NoiseKind,
    seed: u64,
    /// The interval, in whole millionths; and its length before that rounding.
    start: f64,
    end: f64,
    length: f64,
    values: usize,
    /// Places where the path has been followed to, and its rise from the start to them.
    known: Vec<(f64, Vec<f64>)>,
    /// Buffers that wait for their next use: rises, and noise.
    idle: (Vec<Vec<f64>>, Vec<Vec<f32>>),
}

/// One halving: where it is, and what seeds its noise.
struct Halving {
    start: f64,
    middle: f64,
    end: f64,
    seed: u32,
    /// Whether the place asked for is in the first half.
    first: bool,
}

/// Noise by the seed that it is drawn from.
type Draws = BTreeMap<u32, Vec<f32>>;

impl BrownianTree {
    /// A path of `values` independent motions over the levels from `ends.0` up to `ends.1`, of this kind of noise and seed.
    pub(super) fn new((kind, seed): (NoiseKind, u64), ends: (f64, f64), values: usize) -> Self {
        Self {
            kind,
            seed,
            start: millionths(ends.0),
            end: millionths(ends.1),
            length: ends.1 - ends.0,
            values,
            known: Vec::new(),
            idle: (Vec::new(), Vec::new()),
        }
    }

    /// Number of independent motions.
    pub(super) fn len(&self) -> usize {
        self.values
    }

    /// Follows the path to some levels, so that increments between them are at hand; forgets all others.
    ///
    /// A level costs some twenty draws of noise as large as the latents, one for each halving.
    pub(super) fn follow(&mut self, levels: &[f64]) {
        let wanted: Vec<f64> = levels.iter().map(|level| millionths(*level)).collect();
        let is = |place: f64| move |other: &f64| other.to_bits() == place.to_bits();
        let forgotten = |(place, _): &mut (f64, Vec<f64>)| !wanted.iter().any(is(*place));
        let forgotten = self.known.extract_if(.., forgotten).map(|(_, rise)| rise);
        self.idle.0.extend(forgotten);
        let mut paths: Vec<(f64, Vec<Halving>)> = Vec::new();
        for place in wanted {
            let mut followed = self.known.iter().map(|(place, _)| place);
            if !followed.any(is(place)) && !paths.iter().any(|(other, _)| is(place)(other)) {
                paths.push((place, self.halvings(place.clamp(self.start, self.end))));
            }
        }
        if paths.is_empty() {
            return;
        }
        let root = sequence(self.seed, None)[0];
        let halvings = paths.iter().flat_map(|(_, path)| path);
        let seeds: BTreeSet<u32> = halvings.map(|h| h.seed).chain([root]).collect();
        // Paths to neighbouring places have their first halvings in common.
        let mut draws: Draws = seeds
            .into_iter()
            .map(|seed| (seed, self.idle.1.pop().unwrap_or_default()))
            .collect();
        draws
            .par_iter_mut()
            .for_each(|(seed, noise)| self.draw(*seed, noise));
        for (place, path) in paths {
            let mut rise = self.idle.0.pop().unwrap_or_default();
            self.rise(&mut rise, place, (&draws[&root], &path), &draws);
            self.known.push((place, rise));
        }
        self.idle.1.extend(draws.into_values());
    }

    /// Adds `weight` times the path's increment over the levels from `ends.0` up to `ends.1`, divided by the root of
    /// their distance: unit noise.
    pub(super) fn add_increment(&mut self, x: &mut [f32], ends: (f64, f64), weight: f64) {
        let places = (millionths(ends.0), millionths(ends.1));
        if places.0 >= places.1 {
            return;
        }
        if self.at(places.0).is_none() || self.at(places.1).is_none() {
            self.follow(&[ends.0, ends.1]);
        }
        let (Some(lower), Some(upper)) = (self.at(places.0), self.at(places.1)) else {
            return;
        };
        let scale = weight / (ends.1 - ends.0).sqrt();
        for (value, (lower, upper)) in x.iter_mut().zip(lower.iter().zip(upper)) {
            *value = (f64::from(*value) + scale * (upper - lower)) as f32;
        }
    }

    /// The path's rise from the start to a place that it has been followed to.
    fn at(&self, place: f64) -> Option<&[f64]> {
        let mut known = self.known.iter();
        let (_, rise) = known.find(|(other, _)| other.to_bits() == place.to_bits())?;
        Some(rise)
    }

    /// Works out the path's rise from the start to a place: `root` is the noise of the whole interval, with the halvings on the way.
    fn rise(
        &self,
        rise: &mut Vec<f64>,
        place: f64,
        (root, path): (&[f32], &[Halving]),
        draws: &Draws,
    ) {
        rise.clear();
        rise.resize(self.values, 0.0);
        if place <= self.start {
            return;
        }
        let scale = self.length.sqrt();
        let blocks = rise.par_chunks_mut(BLOCK).zip(root.par_chunks(BLOCK));
        blocks.enumerate().for_each(|(block, (rise, root))| {
            // The increment over the interval at hand.
            let mut whole = [0.0; BLOCK];
            for (whole, root) in whole.iter_mut().zip(root) {
                *whole = f64::from(*root) * scale;
            }
            for halving in path {
                let noise = &draws[&halving.seed][block * BLOCK..];
                halving.halve(&mut whole, rise, noise);
            }
            for (rise, whole) in rise.iter_mut().zip(whole) {
                *rise += whole;
            }
        });
    }

    /// The halvings that end in an interval whose upper end is `place`; none at the path's start, which has risen nowhere.
    fn halvings(&self, place: f64) -> Vec<Halving> {
        if place <= self.start {
            return Vec::new();
        }
        let (mut start, mut end) = (self.start, self.end);
        let (mut key, mut depth) = (0_u64, 0_u32);
        let mut path = Vec::new();
        while place < end {
            let middle = millionths(f64::midpoint(start, end));
            let first = place <= middle;
            path.push(Halving {
                start,
                middle,
                end,
                seed: sequence(self.seed, Some((key, depth)))[0],
                first,
            });
            if first {
                end = middle;
            } else {
                start = middle;
            }
            key = 2 * key + u64::from(!first);
            depth += 1;
        }
        path
    }

    fn draw(&self, seed: u32, values: &mut Vec<f32>) {
        values.resize(self.values, 0.0);
        Noise::of(self.kind, &[u64::from(seed)]).fill(values);
    }
}

impl Halving {
    /// Takes the increment over the interval to one over the half that the place is in, and adds the first half's to the
    /// rise where that is the second one.
    fn halve(&self, whole: &mut [f64], rise: &mut [f64], noise: &[f32]) {
        let (left, right) = (self.middle - self.start, self.end - self.middle);
        let share = left / (self.end - self.start);
        let deviation = (share * right).sqrt();
        for ((whole, rise), noise) in whole.iter_mut().zip(rise).zip(noise) {
            let first = share * *whole + deviation * f64::from(*noise);
            if self.first {
                *whole = first;
            } else {
                *rise += first;
                *whole -= first;
            }
        }
    }
}

/// Python's `round(x, 6)`.
fn millionths(value: f64) -> f64 {
    // Formatting rounds the exact decimal expansion, as Python does.
    format!("{value:.6}").parse().unwrap_or(value)
}

/// The first words of numpy's `SeedSequence(entropy, spawn_key=…, pool_size=24).generate_state`.
fn sequence(entropy: u64, spawn: Option<(u64, u32)>) -> [u32; 4] {
    let mut words = words_of(entropy);
    if let Some((key, depth)) = spawn {
        words.resize(POOL, 0);
        words.extend(words_of(key));
        words.extend(words_of(u64::from(depth)));
    }
    let mut hash = Hash(0x43b0_d7e5);
    let mut pool: [u32; POOL] =
        std::array::from_fn(|i| hash.mix(words.get(i).copied().unwrap_or(0), 0x931e_8875));
    for from in 0..POOL {
        for to in (0..POOL).filter(|to| *to != from) {
            pool[to] = join(pool[to], hash.mix(pool[from], 0x931e_8875));
        }
    }
    for word in words.iter().skip(POOL) {
        for slot in &mut pool {
            *slot = join(*slot, hash.mix(*word, 0x931e_8875));
        }
    }
    let mut hash = Hash(0x8b51_f9dd);
    std::array::from_fn(|i| hash.mix(pool[i], 0x58f3_8ded))
}

/// The 32-bit words of a number, the low one first, without zeros above; one zero for zero.
fn words_of(number: u64) -> Vec<u32> {
    let (low, high) = (number as u32, (number >> 32) as u32);
    if high == 0 {
        vec![low]
    } else {
        vec![low, high]
    }
}

/// A hash whose constant changes with every word.
struct Hash(u32);

impl Hash {
    fn mix(&mut self, word: u32, multiplier: u32) -> u32 {
        let mixed = word ^ self.0;
        self.0 = self.0.wrapping_mul(multiplier);
        let mixed = mixed.wrapping_mul(self.0);
        mixed ^ (mixed >> 16)
    }
}

fn join(a: u32, b: u32) -> u32 {
    let mixed = a
        .wrapping_mul(0xca01_f9dd)
        .wrapping_sub(b.wrapping_mul(0x4973_f715));
    mixed ^ (mixed >> 16)
}
