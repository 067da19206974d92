//! The benchmark for people: a line a configuration, with units in every cell.

use super::{Document, Row};
use crate::bench::{Measured, OperatorTime, Rate, UnetTimes};
use crate::image::Difference;

const HEAD: [&str; 15] = [
    "provider",
    "memory",
    "load",
    "text",
    "UNet",
    "step 1",
    "step",
    "own",
    "work",
    "rate",
    "of limit",
    "VAE",
    "anonymous",
    "resident",
    "PSNR",
];
/// Fallen back nodes that are listed by name.
const LISTED: usize = 8;
/// The share of its network's time from which an operator is shown; JSON has them all.
const LEAST: f64 = 0.01;

/// The document as text.
pub(super) fn of(document: &Document, operators: bool) -> String {
    let mut lines = vec![heading(document)];
    let mut cells = vec![HEAD.map(str::to_owned)];
    for row in &document.rows {
        if let Some(measured) = &row.measured {
            let unets = measured.unets.iter().enumerate();
            cells.extend(unets.map(|(i, unet)| cells_of(row, measured, unet, i == 0)));
        }
    }
    if cells.len() > 1 {
        lines.extend(aligned(&cells));
    }
    for row in &document.rows {
        lines.extend(notes(row));
    }
    if operators {
        for row in &document.rows {
            lines.extend(operators_of(row));
        }
    }
    lines.join("\n")
}

fn heading(document: &Document) -> String {
    let request = &document.request;
    let size = [request.width, request.height].map(Option::unwrap_or_default);
    let threads = request
        .threads
        .map_or("default threads".into(), |t| format!("{t} threads"));
    format!(
        "{}, {}x{} px, {} steps, guidance {}, {threads}; {}",
        request.model.as_deref().unwrap_or_default(),
        size[0],
        size[1],
        request.steps.unwrap_or_default(),
        request.guidance.unwrap_or_default(),
        document.library.display()
    )
}

fn cells_of(row: &Row, measured: &Measured, unet: &UnetTimes, first: bool) -> [String; 15] {
    // What belongs to the configuration stands beside its first network.
    let once = |text: String| if first { text } else { String::new() };
    [
        once(row.configuration.provider.to_string()),
        once(row.configuration.memory.to_string()),
        once(seconds(measured.load_seconds)),
        once(seconds(measured.text_seconds)),
        unet.model.clone(),
        seconds(unet.first_step_seconds),
        unet.step_seconds.map_or("-".into(), seconds),
        unet.outside_runtime_share.map_or("-".into(), percent),
        work(unet.rate),
        speed(unet.rate),
        share(unet.rate),
        once(seconds(measured.decoder.seconds)),
        once(bytes(measured.peak_anonymous_bytes)),
        once(bytes(measured.peak_resident_bytes)),
        once(row.difference.map_or("no reference".into(), decibels)),
    ]
}

fn work(rate: Rate) -> String {
    rate.flops
        .map_or("-".into(), |f| engineering(f as f64, "FLOP"))
}

fn speed(rate: Rate) -> String {
    let speed = rate.flops_per_second;
    speed.map_or("-".into(), |f| engineering(f, "FLOP/s"))
}

fn share(rate: Rate) -> String {
    rate.share_of_limit.map_or("-".into(), percent)
}

/// What does not fit into the line of a row.
fn notes(row: &Row) -> Vec<String> {
    let name = format!(
        "{}, {}",
        row.configuration.provider, row.configuration.memory
    );
    let Some(measured) = &row.measured else {
        let reason = row.reason.as_deref().unwrap_or_default();
        let first_line = reason.lines().next().unwrap_or_default();
        return vec![format!("{name}: not measured: {first_line}")];
    };
    let rate = measured.decoder.rate;
    let limit = measured.limit_flops_per_second;
    let mut lines = vec![format!(
        "{name}: {} anonymous while denoising; VAE {}, {}, {} of the limit of {}",
        bytes(measured.denoise_anonymous_bytes),
        work(rate),
        speed(rate),
        share(rate),
        limit.map_or("-".into(), |f| engineering(f, "FLOP/s"))
    )];
    let fallen = &measured.fallen_back;
    if !fallen.is_empty() {
        let shown = fallen.iter().take(LISTED);
        let names = shown.map(|n| format!("{} {} in {}", n.operator, n.node, n.network));
        let more = fallen.len().saturating_sub(LISTED);
        let rest = if more > 0 {
            format!(" and {more} more")
        } else {
            String::new()
        };
        let names = names.collect::<Vec<_>>().join(", ");
        lines.push(format!(
            "{name}: {} nodes fell back to the processor: {names}{rest}",
            fallen.len()
        ));
    }
    lines
}

fn operators_of(row: &Row) -> Vec<String> {
    let Some(measured) = &row.measured else {
        return Vec::new();
    };
    let head = ["network", "operator", "runs", "time", "share", "rate"].map(str::to_owned);
    let weighty = measured.operators.iter().filter(|o| o.share >= LEAST);
    let cells = weighty.map(|o| {
        [
            o.network.clone(),
            o.operator.clone(),
            o.runs.to_string(),
            seconds(o.seconds),
            percent(o.share),
            rate(o),
        ]
    });
    let table = std::iter::once(head).chain(cells).collect::<Vec<_>>();
    let name = format!(
        "\n{}, {}, one step and one decoding, operators of at least {}:",
        row.configuration.provider,
        row.configuration.memory,
        percent(LEAST)
    );
    std::iter::once(name).chain(aligned(&table)).collect()
}

fn rate(operator: &OperatorTime) -> String {
    match operator.flops {
        None => "?".into(),
        Some(0) => String::new(),
        Some(flops) => engineering(flops as f64 / operator.seconds, "FLOP/s"),
    }
}

/// Columns of one width, two spaces apart.
pub(super) fn aligned<const N: usize>(rows: &[[String; N]]) -> Vec<String> {
    let width = |i: usize| rows.iter().map(|r| r[i].chars().count()).max().unwrap_or(0);
    let widths: [usize; N] = std::array::from_fn(width);
    let line = |row: &[String; N]| {
        let cells = row
            .iter()
            .zip(widths)
            .map(|(cell, width)| format!("{cell:<width$}"));
        cells.collect::<Vec<_>>().join("  ").trim_end().to_owned()
    };
    rows.iter().map(line).collect()
}

fn seconds(seconds: f64) -> String {
    match seconds {
        s if s < 1e-3 => format!("{:.0} µs", s * 1e6),
        s if s < 1.0 => format!("{:.1} ms", s * 1e3),
        s if s < 100.0 => format!("{s:.2} s"),
        s => format!("{s:.0} s"),
    }
}

fn percent(share: f64) -> String {
    format!("{:.1} %", share * 100.0)
}

/// A number with the prefix that leaves at most three digits before the point.
fn engineering(value: f64, unit: &str) -> String {
    let prefixes = [(1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M")];
    let fitting = prefixes.into_iter().find(|(scale, _)| value >= *scale);
    let (scale, prefix) = fitting.unwrap_or((1e3, "k"));
    format!("{:.2} {prefix}{unit}", value / scale)
}

fn bytes(bytes: Option<u64>) -> String {
    match bytes {
        None => "not told".into(),
        Some(b) if b < 1 << 30 => format!("{} MiB", b >> 20),
        Some(b) => format!("{:.2} GiB", b as f64 / f64::from(1 << 30)),
    }
}

fn decibels(difference: Difference) -> String {
    match difference.psnr_db {
        None => "equal".into(),
        Some(db) => format!("{db:.1} dB"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_have_fitting_units() {
        assert_eq!(seconds(0.000_012_34), "12 µs");
        assert_eq!(seconds(0.012_34), "12.3 ms");
        assert_eq!(seconds(12.345), "12.35 s");
        assert_eq!(seconds(123.45), "123 s");
        assert_eq!(engineering(3.64e12, "FLOP"), "3.64 TFLOP");
        assert_eq!(engineering(5e2, "FLOP/s"), "0.50 kFLOP/s");
        assert_eq!(bytes(Some(3 << 29)), "1.50 GiB");
        assert_eq!(bytes(Some(5 << 20)), "5 MiB");
        assert_eq!(bytes(None), "not told");
    }

    #[test]
    fn columns_are_as_wide_as_their_widest_cell() {
        let rows = [["a", "bbb", "c"], ["aaaa", "b", ""]].map(|r| r.map(str::to_owned));
        assert_eq!(aligned(&rows), ["a     bbb  c", "aaaa  b"]);
    }
}
