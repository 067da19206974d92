//! Noise as torch draws it on CUDA: Philox4x32-10 (Salmon et al. 2011) and Box–Muller.
//!
//! Python twin: `modules/rng_philox.py` of AUTOMATIC1111's web UI, its "NV" noise; `torch.randn(…, device="cuda")` where
//! the GPU holds a thread for every value, as any with 32 multiprocessors does for SDXL's latents. With fewer threads
//! than values, CUDA's noise depends on the GPU; this does not.
//!
//! CUDA's own sine is a short approximation, so its values are these within 10⁻⁵, not bit for bit.

#![allow(
    clippy::inline_always,
    reason = "only when all of it is inlined does a group become vector instructions"
)]

use pulp::Arch;
use rayon::prelude::*;

use super::vector;

/// Values that one task makes.
const TASK: usize = 4096;
/// Values that are made side by side.
const LANES: usize = 16;
/// 2⁻³² and 2π·2⁻³².
const UNIT: f32 = 2.328_306_4e-10;
const UNIT_TURN: f32 = 2.328_306_4e-10 * std::f32::consts::TAU;

/// Fills a tensor as the `call`-th draw of a generator.
pub(super) fn fill(seed: u64, call: u64, values: &mut [f32]) {
    let arch = Arch::new();
    values
        .par_chunks_mut(TASK)
        .enumerate()
        .for_each(|(task, values)| {
            let mut angles = [0.0; TASK];
            let first = (task * TASK) as u32;
            arch.dispatch(|| uniform((seed, call), first, values, &mut angles));
            vector::radius_sin(values, &angles);
        });
}

/// The uniform values that become radius and angle, for the threads from `first` on.
#[inline(always)]
fn uniform((seed, call): (u64, u64), first: u32, radii: &mut [f32], angles: &mut [f32]) {
    let groups = radii.chunks_mut(LANES).zip(angles.chunks_mut(LANES));
    for (group, (radii, angles)) in groups.enumerate() {
        let place = first + (group * LANES) as u32;
        // The counter's halves: which draw, and which thread.
        let mut counter = [[0; LANES]; 4];
        counter[0] = [call as u32; LANES];
        counter[1] = [(call >> 32) as u32; LANES];
        counter[2] = std::array::from_fn(|lane| place + lane as u32);
        let [x, y, ..] = philox(counter, seed);
        let x = x.map(|x| x as f32 * UNIT + UNIT / 2.0);
        let y = y.map(|y| y as f32 * UNIT_TURN + UNIT_TURN / 2.0);
        radii.copy_from_slice(&x[..radii.len()]);
        angles.copy_from_slice(&y[..angles.len()]);
    }
}

/// Ten rounds on some counters.
#[inline(always)]
fn philox<const N: usize>(mut counter: [[u32; N]; 4], key: u64) -> [[u32; N]; 4] {
    let (mut low, mut high) = (key as u32, (key >> 32) as u32);
    for _ in 0..10 {
        let [first, second, third, fourth] = &mut counter;
        let lanes = first.iter_mut().zip(second).zip(third).zip(fourth);
        for (((a, b), c), d) in lanes {
            let even = u64::from(*a) * 0xd251_1f53;
            let odd = u64::from(*c) * 0xcd9e_8d57;
            *a = (odd >> 32) as u32 ^ *b ^ low;
            *b = odd as u32;
            *c = (even >> 32) as u32 ^ *d ^ high;
            *d = even as u32;
        }
        low = low.wrapping_add(0x9e37_79b9);
        high = high.wrapping_add(0xbb67_ae85);
    }
    counter
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The known answers that the authors publish with Random123 (`kat_vectors`, philox4x32 with 10 rounds).
    #[test]
    fn the_published_answers_come_out() {
        let pi = (
            [0x243f_6a88, 0x85a3_08d3, 0x1319_8a2e, 0x0370_7344],
            0x299f_31d0_a409_3822,
        );
        for ((counter, key), answer) in [
            (
                ([0; 4], 0),
                [0x6627_e8d5, 0xe169_c58d, 0xbc57_ac4c, 0x9b00_dbd8],
            ),
            (
                ([u32::MAX; 4], u64::MAX),
                [0x408f_276d, 0x41c8_3b0e, 0xa20b_c7c6, 0x6d54_51fd],
            ),
            (pi, [0xd16c_fe09, 0x94fd_cceb, 0x5001_e420, 0x2412_6ea1]),
        ] {
            assert_eq!(
                philox(counter.map(|word| [word]), key),
                answer.map(|word| [word])
            );
        }
    }
}
