//! Solves symmetric positive definite systems of some thousand unknowns: Cholesky's factors in blocks, almost all of whose
//! arithmetic is matrix products.
//!
//! Python twin: `scipy.linalg.cho_factor` and `cho_solve`.

use ndarray::linalg::general_mat_mul;
use ndarray::{Array1, Array2, ArrayView2, ArrayViewMut2, Axis, s};

/// Columns of a block: wide enough for products to be fast, narrow beside the whole.
const BLOCK: usize = 96;

/// The lower factor `L` of `L Lᵀ`; what is above the diagonal is not used.
#[derive(Debug)]
pub(super) struct Cholesky(Array2<f64>);

impl Cholesky {
    /// Takes a symmetric matrix apart, of which only the lower triangle is read; `None` if it is not positive definite, or
    /// not finite.
    pub(super) fn of(mut matrix: Array2<f64>) -> Option<Self> {
        let n = matrix.nrows();
        for start in (0..n).step_by(BLOCK) {
            let end = (start + BLOCK).min(n);
            let (upper, mut lower) = matrix.view_mut().split_at(Axis(0), end);
            let mut corner = upper.slice_move(s![start.., start..end]);
            factor(&mut corner)?;
            let mut panel = lower.slice_mut(s![.., start..end]);
            for mut row in panel.rows_mut() {
                for j in 0..row.len() {
                    let known = row.slice(s![..j]).dot(&corner.slice(s![j, ..j]));
                    row[j] = (row[j] - known) / corner[[j, j]];
                }
            }
            let panel = panel.to_owned();
            subtract_square(&panel.view(), &mut lower.slice_mut(s![.., end..]));
        }
        Some(Self(matrix))
    }

    /// The solution for a right side.
    pub(super) fn solve(&self, right: &Array1<f64>) -> Array1<f64> {
        let factor = &self.0;
        let mut x = right.clone();
        for i in 0..x.len() {
            let known = factor.slice(s![i, ..i]).dot(&x.slice(s![..i]));
            x[i] = (x[i] - known) / factor[[i, i]];
        }
        // By rows of L, so columns of its transpose: what is solved is taken out of what is not.
        for i in (0..x.len()).rev() {
            x[i] /= factor[[i, i]];
            let solved = x[i];
            x.slice_mut(s![..i])
                .scaled_add(-solved, &factor.slice(s![i, ..i]));
        }
        x
    }
}

/// Cholesky's factor of a small block, in place.
fn factor(block: &mut ArrayViewMut2<'_, f64>) -> Option<()> {
    for j in 0..block.ncols() {
        let row = block.slice(s![j, ..j]).to_owned();
        let pivot = block[[j, j]] - row.dot(&row);
        if !(pivot > 0.0 && pivot.is_finite()) {
            return None;
        }
        block[[j, j]] = pivot.sqrt();
        for i in j + 1..block.nrows() {
            let known = block.slice(s![i, ..j]).dot(&row);
            block[[i, j]] = (block[[i, j]] - known) / block[[j, j]];
        }
    }
    Some(())
}

/// `rest -= panel · panelᵀ` in blocks of rows, up to the diagonal's block.
fn subtract_square(panel: &ArrayView2<'_, f64>, rest: &mut ArrayViewMut2<'_, f64>) {
    let n = panel.nrows();
    for start in (0..n).step_by(BLOCK) {
        let end = (start + BLOCK).min(n);
        let left = panel.slice(s![start..end, ..]);
        let right = panel.slice(s![..end, ..]);
        let mut rows = rest.slice_mut(s![start..end, ..end]);
        general_mat_mul(-1.0, &left, &right.t(), 1.0, &mut rows);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A matrix with eigenvalues of at least `floor`, larger than two blocks.
    fn matrix(n: usize, floor: f64) -> Array2<f64> {
        let a = Array2::from_shape_fn((n, n / 2), |(i, j)| {
            ((i * 7 + j * j * 3) % 23) as f64 / 11.0 - 1.0
        });
        a.dot(&a.t()) + Array2::<f64>::eye(n) * floor
    }

    #[test]
    fn solutions_solve() {
        for n in [1, 5, BLOCK, BLOCK + 1, 2 * BLOCK + 31] {
            let matrix = matrix(n, 1e-3);
            let right = Array1::from_shape_fn(n, |i| (i as f64).sin());
            let x = Cholesky::of(matrix.clone()).unwrap().solve(&right);
            let rest = (matrix.dot(&x) - &right).mapv(f64::abs);
            assert!(rest.iter().all(|r| *r < 1e-8), "{n}: {rest}");
        }
    }

    #[test]
    fn what_is_not_positive_or_not_finite_has_no_factor() {
        let mut singular = matrix(2 * BLOCK, 1.0);
        singular[[150, 150]] = -1.0;
        assert!(Cholesky::of(singular.clone()).is_none());
        singular[[150, 150]] = f64::NAN;
        assert!(Cholesky::of(singular).is_none());
    }
}
