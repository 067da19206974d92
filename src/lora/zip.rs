//! `ZipLoRA`'s mergers of one layer, without gradients: the least squares of its outputs.
//!
//! `dW_m = dW_c diag(m_c) + dW_s diag(m_s)` shall do to the inputs that the layer sees in a content run what `dW_c` does,
//! and to those of a style run what `dW_s` does. With `C` the second moments of these inputs, the mergers minimise
//!
//! ```text
//! (|(dW_m - dW_c) X_c|² + |(dW_m - dW_s) X_s|²) / E + ridge · mean((m - 1)²) + similarity · mean|m_c m_s|
//! ```
//!
//! where `E = |dW_c X_c|² + |dW_s X_s|²`, so that ridge and similarity mean the same in every layer. As
//! `|a b| <= (a² |b₀/a₀| + b² |a₀/b₀|) / 2`, with equality at `a₀, b₀`, each round is a linear system.
//!
//! Python twin: `export/zip_closed.py`; the published way, with gradients, is `export/zip.py`. Paper: arXiv:2311.13600.

use ndarray::{Array1, Array2, ArrayView2, Axis};

use super::LowRank;
use super::cholesky::Cholesky;

/// Rounds of the similarity's bound.
const ROUNDS: usize = 5;
/// A merger below this weighs in the next round as if it were this large.
const SMALLEST: f64 = 1e-6;

/// How strongly mergers are drawn to where they begin, and away from each other.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Terms {
    /// Weight of the mean `(m - 1)²`; more than 0, because what a layer sees rarely decides on every column.
    pub ridge: f64,
    /// Weight of the mean `|m_c m_s|`, at least 0.
    pub similarity: f64,
}

impl Default for Terms {
    fn default() -> Self {
        Self {
            ridge: 0.01,
            similarity: 0.01,
        }
    }
}

/// The second moments of what a layer sees.
#[derive(Debug, Clone)]
pub struct Moments {
    rows: usize,
    /// `[inputs, inputs]`
    sum: Array2<f64>,
}

/// A layer's mergers, one number an input.
#[derive(Debug, Clone, PartialEq)]
pub struct Mergers {
    /// For the columns of the content LoRA.
    pub content: Array1<f64>,
    /// For those of the style LoRA.
    pub style: Array1<f64>,
}

impl Moments {
    /// None yet, of a layer with so many inputs.
    pub fn new(inputs: usize) -> Self {
        Self {
            rows: 0,
            sum: Array2::zeros((inputs, inputs)),
        }
    }

    /// Moments that are known: their mean `[inputs, inputs]` over rows.
    pub fn of_mean(mean: Array2<f64>) -> Self {
        Self { rows: 1, sum: mean }
    }

    /// Adds what the layer saw: `[rows, inputs]`.
    pub fn add(&mut self, seen: &ArrayView2<'_, f32>) {
        let products = seen.t().dot(seen);
        ndarray::Zip::from(&mut self.sum)
            .and(&products)
            .for_each(|sum, product| *sum += f64::from(*product));
        self.rows += seen.nrows();
    }

    /// Bytes that the moments of a layer with so many inputs take.
    pub const fn bytes(inputs: usize) -> u64 {
        8 * (inputs as u64).pow(2)
    }

    /// Bytes that it takes to solve a layer that sees these: six matrices like them, and two of twice the side.
    pub fn bytes_to_solve(&self) -> u64 {
        14 * Self::bytes(self.sum.ncols())
    }

    fn mean(&self) -> Array2<f64> {
        self.sum.mapv(|sum| sum / self.rows.max(1) as f64)
    }
}

impl Mergers {
    /// Plain addition.
    pub fn ones(inputs: usize) -> Self {
        Self {
            content: Array1::ones(inputs),
            style: Array1::ones(inputs),
        }
    }

    /// The mergers of a layer, from the updates of both `LoRA`s and what it sees in the run of each, content first.
    ///
    /// # Errors
    /// The reason, as the end of "this layer …", if the updates or what it sees are not finite, or of other sizes.
    pub fn solve(
        content: &LowRank,
        style: &LowRank,
        seen: [&Moments; 2],
        terms: Terms,
    ) -> Result<Self, String> {
        let inputs = content.down.ncols();
        let sizes = [style.down.ncols(), seen[0].sum.ncols(), seen[1].sum.ncols()];
        if sizes.iter().any(|size| *size != inputs) || content.up.nrows() != style.up.nrows() {
            return Err(format!(
                "has {inputs} inputs in one LoRA, and {sizes:?} are seen"
            ));
        }
        let system = System::of(content, style, seen);
        if !system.energy.is_finite() {
            return Err("has an update, or sees values, that are not finite".into());
        }
        if system.energy <= 0.0 {
            return Ok(Self::ones(inputs));
        }
        let mut mergers = Array1::ones(2 * inputs);
        let rounds = if terms.similarity > 0.0 { ROUNDS } else { 1 };
        for _ in 0..rounds {
            mergers = system.round(&mergers, terms)?;
        }
        let (content, style) = mergers.view().split_at(Axis(0), inputs);
        Ok(Self {
            content: content.to_owned(),
            style: style.to_owned(),
        })
    }
}

/// The normal equations, content's unknowns first, divided by the energy of both updates.
struct System {
    normal: Array2<f64>,
    right: Array1<f64>,
    energy: f64,
}

impl System {
    fn of(content: &LowRank, style: &LowRank, seen: [&Moments; 2]) -> Self {
        let n = content.down.ncols();
        let (cc, ss) = (gram(content, content), gram(style, style));
        let cs = gram(content, style);
        let [seen_c, seen_s] = seen.map(Moments::mean);
        let energy = (&cc * &seen_c).sum() + (&ss * &seen_s).sum();
        let at = |i: usize, j: usize| (i % n, j % n);
        let sums = |a: Array2<f64>| a.sum_axis(Axis(1)) / energy;
        let right = [
            sums(&cc * &seen_c + &cs * &seen_s),
            sums(&cs.t() * &seen_c + &ss * &seen_s),
        ];
        let both = seen_c + seen_s;
        let normal = Array2::from_shape_fn((2 * n, 2 * n), |(i, j)| {
            let gram = match (i < n, j < n) {
                (true, true) => cc[at(i, j)],
                (true, false) => cs[at(i, j)],
                (false, true) => cs[at(j, i)],
                (false, false) => ss[at(i, j)],
            };
            gram * both[at(i, j)] / energy
        });
        let right = right.iter().flatten().copied().collect();
        Self {
            normal,
            right,
            energy,
        }
    }

    /// The minimum of the bound that touches the objective at `mergers`.
    fn round(&self, mergers: &Array1<f64>, terms: Terms) -> Result<Array1<f64>, String> {
        let unknowns = mergers.len();
        let n = unknowns / 2;
        let (pull, push) = (
            terms.ridge / unknowns as f64,
            terms.similarity / unknowns as f64,
        );
        let size = |at: usize| mergers[at].abs().max(SMALLEST);
        let mut bound = self.normal.clone();
        for (i, entry) in bound.diag_mut().iter_mut().enumerate() {
            *entry += pull + push * size((i + n) % unknowns) / size(i);
        }
        let factors = Cholesky::of(bound);
        let factors = factors.ok_or("has no mergers that are decided: raise the ridge")?;
        Ok(factors.solve(&self.right.mapv(|right| right + pull)))
    }
}

/// `dW_aᵀ dW_b`, `[inputs, inputs]`, by way of the ranks.
fn gram(a: &LowRank, b: &LowRank) -> Array2<f64> {
    let wide = |values: &Array2<f32>| values.mapv(f64::from);
    let core = wide(&a.up).t().dot(&wide(&b.up));
    wide(&a.down).t().dot(&core.dot(&wide(&b.down)))
}
