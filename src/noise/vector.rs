//! Box–Muller with polynomial f32 logarithm, sine and cosine, as many values at once as the processor can.
//!
//! Python twin: `normal_fill_AVX2` in torch's CPU kernels.
//!
//! The polynomials are those of the Cephes library (Moshier 1989). Every fused multiply-add rounds once and every
//! other operation rounds for itself; with the order of operations, that makes the result equal to torch's bit for bit.

#![allow(
    clippy::inline_always,
    reason = "only when all of it is inlined does a block become vector instructions"
)]

use pulp::Arch;

/// Number of pairs in a block: value j belongs with value j + 8.
const PAIRS: usize = 8;

/// Whether the machine is compiled for with a fused multiply-add instruction; elsewhere it is a call into the C library.
const FUSED: bool = cfg!(any(target_feature = "fma", target_arch = "aarch64"));

/// `a·b + c`, rounded once.
trait MultiplyAdd: Default {
    fn fma(&mut self, a: f32, b: f32, c: f32) -> f32;
}

/// The machine's or the C library's own.
#[derive(Default)]
struct Fused;

impl MultiplyAdd for Fused {
    #[inline(always)]
    fn fma(&mut self, a: f32, b: f32, c: f32) -> f32 {
        a.mul_add(b, c)
    }
}

/// By way of f64, several at once on any machine. The product of two f32 is exact there, and rounding the sum a second
/// time, to f32, can go wrong only where the first rounding cuts something off and lands half-way between two f32; that
/// is noticed.
#[derive(Default)]
struct Doubled {
    /// Set as soon as one result may be wrong.
    doubtful: u32,
}

impl MultiplyAdd for Doubled {
    #[inline(always)]
    fn fma(&mut self, a: f32, b: f32, c: f32) -> f32 {
        // f64 has 29 more digits than f32.
        const DROPPED: u32 = (1 << 29) - 1;
        let (product, c) = (f64::from(a) * f64::from(b), f64::from(c));
        let sum = product + c;
        // What the first rounding cut off (Knuth's two-sum): a sum that is exactly half-way rounds as it should.
        let added = sum - product;
        let cut = (product - (sum - added)) + (c - added);
        self.doubtful |=
            u32::from(sum.to_bits() as u32 & DROPPED == 1 << 28) & u32::from(cut != 0.0);
        sum as f32
    }
}

/// Turns sixteen uniform values into sixteen normal ones, block by block.
pub(super) fn box_muller(blocks: &mut [[f32; 2 * PAIRS]]) {
    if FUSED {
        return blocks.iter_mut().for_each(fused_block);
    }
    match Arch::new() {
        Arch::Scalar => blocks.iter_mut().for_each(doubled_block),
        fused => fused.dispatch(|| blocks.iter_mut().for_each(fused_block)),
    }
}

#[inline(always)]
fn fused_block(block: &mut [f32; 2 * PAIRS]) {
    *block = transform::<Fused>(block).0;
}

fn doubled_block(block: &mut [f32; 2 * PAIRS]) {
    let (normal, arithmetic) = transform::<Doubled>(block);
    if arithmetic.iter().any(|lane| lane.doubtful != 0) {
        fused_block(block);
    } else {
        *block = normal;
    }
}

/// `√(−2·ln u)·sin v` for u in (0, 1] and non-negative v, in place of u.
pub(super) fn radius_sin(us: &mut [f32], vs: &[f32]) {
    match Arch::new() {
        Arch::Scalar => radius_sin_each(us, vs),
        fused => fused.dispatch(|| radius_sin_each(us, vs)),
    }
}

#[inline(always)]
fn radius_sin_each(us: &mut [f32], vs: &[f32]) {
    for (u, v) in us.iter_mut().zip(vs) {
        *u = (-2.0 * ln(&mut Fused, *u)).sqrt() * sin_cos(&mut Fused, *v).0;
    }
}

/// The sixteen normal values, and the arithmetic that each pair was computed with.
#[inline(always)]
fn transform<A: MultiplyAdd>(block: &[f32; 2 * PAIRS]) -> ([f32; 2 * PAIRS], [A; PAIRS]) {
    let mut normal = [0.0; 2 * PAIRS];
    let mut arithmetic: [A; PAIRS] = Default::default();
    for j in 0..PAIRS {
        let lane = &mut arithmetic[j];
        // 1 − u lies in (0, 1], so that the logarithm exists.
        let radius = (-2.0 * ln(lane, 1.0 - block[j])).sqrt();
        let (sin, cos) = sin_cos(lane, std::f32::consts::TAU * block[j + PAIRS]);
        // Adding the mean, 0, turns −0 into 0.
        normal[j] = radius * cos + 0.0;
        normal[j + PAIRS] = radius * sin + 0.0;
    }
    (normal, arithmetic)
}

/// Horner's rule, one rounding a step, highest power first.
#[inline(always)]
fn polynomial<const N: usize>(lane: &mut impl MultiplyAdd, x: f32, coefficients: [f32; N]) -> f32 {
    let mut value = coefficients[0];
    for coefficient in &coefficients[1..] {
        value = lane.fma(value, x, *coefficient);
    }
    value
}

/// Natural logarithm of a positive normal number (Cephes `logf`).
#[inline(always)]
fn ln(lane: &mut impl MultiplyAdd, x: f32) -> f32 {
    const ROOT_HALF: f32 = 0.707_106_77;
    let bits = x.to_bits();
    let mut exponent = (bits >> 23) as f32 - 126.0;
    // The same digits with the exponent of 0.5.
    let mantissa = f32::from_bits((bits & 0x007f_ffff) | 0x3f00_0000);
    let mut x = mantissa - 1.0;
    if mantissa < ROOT_HALF {
        exponent -= 1.0;
        x += mantissa;
    }
    let z = x * x;
    let series = polynomial(
        lane,
        x,
        [
            7.037_683_6e-2,
            -1.151_461e-1,
            1.167_699_84e-1,
            -1.242_014_1e-1,
            1.424_932_3e-1,
            -1.666_805_8e-1,
            2.000_071_4e-1,
            -2.499_999_4e-1,
            3.333_333e-1,
        ],
    );
    let mut y = lane.fma(series * x, z, exponent * -2.121_944_4e-4);
    y -= z * 0.5;
    lane.fma(exponent, 0.693_359_4, x + y)
}

/// Sine and cosine of a non-negative angle (Cephes `sinf`, `cosf`).
#[inline(always)]
fn sin_cos(lane: &mut impl MultiplyAdd, angle: f32) -> (f32, f32) {
    const FOUR_OVER_PI: f32 = 1.273_239_5;
    // The nearest even octant, counted from 0.
    let octant = ((angle * FOUR_OVER_PI) as i32 + 1) & !1;
    let y = octant as f32;
    // π/4 in three parts.
    let mut x = lane.fma(y, -0.785_156_25, angle);
    x = lane.fma(y, -2.418_756_5e-4, x);
    x = lane.fma(y, -3.774_895e-8, x);
    let z = x * x;
    let cos = polynomial(lane, z, [2.443_315_7e-5, -1.388_731_6e-3, 4.166_664_6e-2]) * z;
    let cos = lane.fma(cos, z, -(z * 0.5)) + 1.0;
    let sin = polynomial(lane, z, [-1.951_529_6e-4, 8.332_161e-3, -1.666_665_5e-1]) * z;
    let sin = lane.fma(sin, x, x);
    let (sin, cos) = if octant & 2 == 0 {
        (sin, cos)
    } else {
        (cos, sin)
    };
    let sin = if octant & 4 == 0 { sin } else { -sin };
    let cos = if (octant - 2) & 4 == 0 { -cos } else { cos };
    (sin, cos)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_sum_that_would_round_twice_is_noticed() {
        // 1 + 2⁻²³ + 2⁻²⁴ − 2⁻⁷⁰: just below half-way between two f32, and half-way in f64.
        let tiny = 1.0 / 4096.0;
        let (a, b, c) = (
            tiny * (1.0 + f32::EPSILON),
            tiny * (1.0 - f32::EPSILON),
            1.0 + f32::EPSILON,
        );
        let mut doubled = Doubled::default();
        let wrong = doubled.fma(a, b, c);
        assert_ne!(wrong.to_bits(), Fused.fma(a, b, c).to_bits());
        assert_eq!(doubled.doubtful, 1);
    }

    #[test]
    fn both_arithmetics_agree_where_there_is_no_doubt() {
        let mut block: [f32; 16] = std::array::from_fn(|i| i as f32 / 16.0);
        for _ in 0..10_000 {
            block = block.map(|u| (u * 1.234_567 + 0.321).fract());
            let (doubled, arithmetic) = transform::<Doubled>(&block);
            if arithmetic.iter().all(|lane| lane.doubtful == 0) {
                assert_eq!(
                    doubled.map(f32::to_bits),
                    transform::<Fused>(&block).0.map(f32::to_bits)
                );
            }
        }
    }

    #[test]
    fn logarithm_sine_and_cosine_are_close_to_the_exact_ones() {
        for i in 1..=10_000_u16 {
            let u = f32::from(i) / 10_000.0;
            assert!(
                (f64::from(ln(&mut Fused, u)) - f64::from(u).ln()).abs() <= 5e-7,
                "ln {u}"
            );
            let angle = std::f32::consts::TAU * u;
            let (sin, cos) = sin_cos(&mut Fused, angle);
            assert!(
                (f64::from(sin) - f64::from(angle).sin()).abs() <= 2e-7,
                "sin {angle}"
            );
            assert!(
                (f64::from(cos) - f64::from(angle).cos()).abs() <= 2e-7,
                "cos {angle}"
            );
        }
    }
}
