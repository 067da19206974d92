//! Small multiples: one panel a scheduler, noise levels on a logarithmic scale over the steps.

use image::{Rgb, RgbImage};

use super::lettering::{LETTER, write};

/// A panel.
pub(super) struct Chart {
    pub title: String,
    pub lines: Vec<Line>,
}

/// One curve of a panel.
pub(super) struct Line {
    pub name: &'static str,
    pub colour: [u8; 3],
    pub sigmas: Vec<f64>,
}

/// Panel size and margins, px.
const WIDTH: u32 = 380;
const HEIGHT: u32 = 260;
const LEFT: u32 = 52;
const RIGHT: u32 = 12;
const TOP: u32 = 24;
const BOTTOM: u32 = 24;
/// Panels side by side.
const COLUMNS: usize = 4;
/// Levels at the lower and the upper end of the scale; what lies outside is drawn at the end.
const LOWEST: f64 = 0.001;
const HIGHEST: f64 = 100.0;
const WHITE: Rgb<u8> = Rgb([255, 255, 255]);
const GRID: Rgb<u8> = Rgb([225, 225, 225]);
const INK: Rgb<u8> = Rgb([0, 0, 0]);

/// Lays panels out on one sheet.
pub(super) fn sheet(charts: &[Chart]) -> RgbImage {
    let rows = charts.len().div_ceil(COLUMNS) as u32;
    let mut sheet = RgbImage::from_pixel(WIDTH * COLUMNS as u32, HEIGHT * rows, WHITE);
    for (i, chart) in charts.iter().enumerate() {
        let corner = ((i % COLUMNS) as u32 * WIDTH, (i / COLUMNS) as u32 * HEIGHT);
        panel(&mut sheet, corner, chart);
    }
    sheet
}

fn panel(sheet: &mut RgbImage, (x, y): (u32, u32), chart: &Chart) {
    write(sheet, (x + LEFT, y + 8), &chart.title, INK);
    for level in [0.001, 0.01, 0.1, 1.0, 10.0, 100.0] {
        let row = y + row_of(level);
        for column in x + LEFT..x + WIDTH - RIGHT {
            sheet.put_pixel(column, row, GRID);
        }
        write(
            sheet,
            (x + 4, row.saturating_sub(4)),
            &level.to_string(),
            INK,
        );
    }
    write(sheet, (x + LEFT, y + HEIGHT - 14), "step 0", INK);
    for (i, line) in chart.lines.iter().enumerate() {
        let colour = Rgb(line.colour);
        curve(sheet, (x, y), line, colour);
        let below = TOP + 6 + i as u32 * (LETTER + 4);
        let width = line.name.len() as u32 * LETTER;
        write(
            sheet,
            (x + WIDTH - RIGHT - width, y + below),
            line.name,
            colour,
        );
    }
    let last = chart.lines.iter().map(|line| line.sigmas.len()).max();
    let last = last.unwrap_or(1).saturating_sub(1).to_string();
    let width = last.len() as u32 * LETTER;
    write(
        sheet,
        (x + WIDTH - RIGHT - width, y + HEIGHT - 14),
        &last,
        INK,
    );
}

/// The row of a level in its panel.
fn row_of(sigma: f64) -> u32 {
    let decades = (HIGHEST / LOWEST).log10();
    let share = (sigma.clamp(LOWEST, HIGHEST) / LOWEST).log10() / decades;
    let span = f64::from(HEIGHT - TOP - BOTTOM - 1);
    TOP + ((1.0 - share) * span).round() as u32
}

fn curve(sheet: &mut RgbImage, (x, y): (u32, u32), line: &Line, colour: Rgb<u8>) {
    let steps = line.sigmas.len().saturating_sub(1).max(1);
    let span = f64::from(WIDTH - LEFT - RIGHT - 1);
    let place = |i: usize, sigma: f64| {
        let column = f64::from(LEFT) + span * i as f64 / steps as f64;
        (f64::from(x) + column, f64::from(y + row_of(sigma)))
    };
    let points: Vec<_> = line
        .sigmas
        .iter()
        .enumerate()
        .map(|(i, &sigma)| place(i, sigma))
        .collect();
    for pair in points.windows(2) {
        stroke(sheet, pair[0], pair[1], colour);
    }
    for &(column, row) in &points {
        let (column, row) = (column as u32, row as u32);
        for (dx, dy) in [(0, 0), (1, 0), (0, 1), (1, 1)] {
            sheet.put_pixel(column + dx, row + dy, colour);
        }
    }
}

fn stroke(sheet: &mut RgbImage, from: (f64, f64), to: (f64, f64), colour: Rgb<u8>) {
    let (dx, dy) = (to.0 - from.0, to.1 - from.1);
    let pixels = dx.abs().max(dy.abs()).ceil().max(1.0) as usize;
    for i in 0..=pixels {
        let share = i as f64 / pixels as f64;
        let (column, row) = (from.0 + share * dx, from.1 + share * dy);
        sheet.put_pixel(column.round() as u32, row.round() as u32, colour);
    }
}
