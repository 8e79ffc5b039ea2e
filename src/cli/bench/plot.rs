//! The workloads as a picture: the distribution of times, throughput over time, and what partitions cost by their number.
//!
//! Owns the charts. The elements are `svg`'s.

use super::super::svg::{Canvas, LEFT, RIGHT, WIDTH};
use super::figures::as_figure;
use super::load::STEP;
use super::report::Report;

const HEIGHT: f64 = 180.0;
const BETWEEN: f64 = 90.0;
/// Below a chart, for its labels.
const LABELS: f64 = 22.0;
const LINE: &str = "#0072b2";
const OTHER: &str = "#e69f00";
const GRID: &str = "#d0d7de";

/// Where a chart stands.
#[derive(Clone, Copy)]
struct Frame {
    x: f64,
    y: f64,
    width: f64,
}

/// Both halves of a row.
fn halves(canvas: &Canvas) -> (Frame, Frame) {
    let width = (WIDTH - LEFT - RIGHT - BETWEEN) / 2.0;
    let left = Frame {
        x: LEFT,
        y: canvas.y,
        width,
    };
    let right = Frame {
        x: LEFT + width + BETWEEN,
        ..left
    };
    (left, right)
}

fn grid(canvas: &mut Canvas, frame: Frame, part: f64, label: &str) {
    let y = frame.y + HEIGHT * (1.0 - part);
    let (x, width) = (frame.x, frame.width);
    canvas.push(&format!(
        "<path d=\"M{x:.1} {y:.1}h{width:.1}\" stroke=\"{GRID}\" fill=\"none\"/>"
    ));
    canvas.text(x - 6.0, y + 4.0, "end", label);
}

/// Points between 0 and 1 of both axes, joined.
fn line(canvas: &mut Canvas, frame: Frame, points: &[(f64, f64)]) {
    let place = |(across, up): &(f64, f64)| {
        let x = frame.x + across * frame.width;
        let y = frame.y + HEIGHT * (1.0 - up.clamp(0.0, 1.0));
        format!("{x:.1} {y:.1}")
    };
    let path = format!(
        "M{}",
        points.iter().map(place).collect::<Vec<_>>().join("L")
    );
    canvas.push(&format!(
        "<path d=\"{path}\" stroke=\"{LINE}\" stroke-width=\"2\" fill=\"none\"/>"
    ));
}

/// Times by percentile; every nine takes as much room as the one before, and so does every power of ten of the time.
fn percentiles(canvas: &mut Canvas, frame: Frame, curve: &[(f64, f64)], name: &str) {
    let times = || curve.iter().map(|(_, ms)| ms.max(1e-3));
    let least = times().fold(f64::INFINITY, f64::min).log10().floor();
    let most = times().fold(0.0, f64::max).log10().ceil().max(least + 1.0);
    let nines = |part: f64| -(1.0 - part).max(1e-9).log10();
    let last = curve
        .iter()
        .map(|(part, _)| *part)
        .filter(|part| *part < 1.0);
    let last = last.fold(0.9, f64::max);
    // The maximum has a place of its own behind the last percentile.
    let across = |part: f64| {
        let place = if part < 1.0 {
            nines(part)
        } else {
            nines(last) + 0.5
        };
        place / (nines(last) + 0.5)
    };
    let mut power = least;
    while power <= most {
        let label = format!("{} ms", 10_f64.powf(power));
        grid(canvas, frame, (power - least) / (most - least), &label);
        power += 1.0;
    }
    let up = |ms: f64| (ms.max(1e-3).log10() - least) / (most - least);
    let points: Vec<(f64, f64)> = curve
        .iter()
        .map(|(part, ms)| (across(*part), up(*ms)))
        .collect();
    line(canvas, frame, &points);
    let bottom = frame.y + HEIGHT + 14.0;
    for part in [0.5, 0.9, 0.99, 0.999, 0.9999, 0.99999, 1.0] {
        if part < 1.0 && part > last {
            continue;
        }
        let label = if part < 1.0 {
            format!("p{}", (part * 1e5_f64).round() / 1e3)
        } else {
            "max".to_owned()
        };
        canvas.text(
            frame.x + across(part) * frame.width,
            bottom,
            "middle",
            &label,
        );
    }
    canvas.text(frame.x + 4.0, frame.y + 12.0, "start", name);
}

/// Records a second over time.
fn over_time(canvas: &mut Canvas, frame: Frame, steps: &[f64]) {
    // Room for the name.
    let most = steps.iter().copied().fold(1.0, f64::max) * 1.15;
    for part in [0.0, 0.5, 1.0] {
        grid(canvas, frame, part, &format!("{:.0}", most * part));
    }
    let count = as_figure(u64::try_from(steps.len()).unwrap_or(1)).max(2.0);
    let mut at = 0.0;
    let mut points = Vec::new();
    for records in steps {
        points.push((at / (count - 1.0), records / most));
        at += 1.0;
    }
    line(canvas, frame, &points);
    let (bottom, seconds) = (frame.y + HEIGHT + 14.0, count * STEP.as_secs_f64());
    for (part, anchor) in [(0.0, "start"), (1.0, "end")] {
        let label = format!("{:.1} s", seconds * part);
        canvas.text(frame.x + part * frame.width, bottom, anchor, &label);
    }
    canvas.text(frame.x + 4.0, frame.y + 12.0, "start", "records a second");
}

/// One bar for each number of partitions.
fn bars(canvas: &mut Canvas, frame: Frame, values: &[(String, f64)], name: &str, fill: &str) {
    let most = values.iter().map(|(_, value)| *value);
    // Room for the name.
    let most = most.fold(1e-9, f64::max) * 1.15;
    for part in [0.0, 0.5, 1.0] {
        grid(canvas, frame, part, &format!("{:.1}", most * part));
    }
    let count = as_figure(u64::try_from(values.len()).unwrap_or(1)).max(1.0);
    let width = frame.width / count;
    let mut x = frame.x;
    for (label, value) in values {
        let height = HEIGHT * (value / most).max(0.0);
        let place = (x + width * 0.2, frame.y + HEIGHT - height);
        canvas.bar(place, (width * 0.6, height), fill, &format!("{value:.2}"));
        canvas.text(x + width / 2.0, frame.y + HEIGHT + 14.0, "middle", label);
        x += width;
    }
    canvas.text(frame.x + 4.0, frame.y + 12.0, "start", name);
}

/// Draws all workloads, one below the other.
pub(super) fn draw(reports: &[Report]) -> String {
    let mut canvas = Canvas::default();
    for report in reports {
        let curve = report.times().curve();
        let steps = report.runs.last().map_or(&[][..], |run| &run.over_time);
        if report.times().count() == 0 && steps.is_empty() {
            continue;
        }
        canvas.heading(&format!("{} {}", report.workload, report.title));
        let (left, right) = halves(&canvas);
        if report.times().count() > 0 {
            let name = if report.workload == "W4" {
                "from a kill to the next acknowledgement, all runs"
            } else {
                "latency, all runs"
            };
            percentiles(&mut canvas, left, &curve, name);
        }
        if !steps.is_empty() {
            over_time(&mut canvas, right, steps);
        }
        canvas.y += HEIGHT + LABELS;
    }
    let of = |name: &str| -> Vec<(String, f64)> {
        let idle = reports.iter().filter(|report| report.workload == "W5");
        idle.filter_map(|report| Some((report.title.clone(), report.median(name)?)))
            .collect()
    };
    let (cpu, memory) = (
        of("idle_cpu_percent_of_a_core"),
        of("brokers_resident_megabytes"),
    );
    if !cpu.is_empty() {
        canvas.heading("W5 at rest, all brokers together");
        let (left, right) = halves(&canvas);
        bars(&mut canvas, left, &cpu, "% of a core", LINE);
        bars(&mut canvas, right, &memory, "resident MB", OTHER);
        canvas.y += HEIGHT + LABELS;
    }
    canvas.finish()
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use serde_json::Value;

    use super::super::figures::Figures;
    use super::super::machine::Machine;
    use super::super::report::Outcome;
    use super::*;

    fn report(workload: &'static str, outcome: Outcome) -> Report {
        Report {
            workload,
            title: "some <things>".to_owned(),
            promise: None,
            latency: None,
            settings: Value::Null,
            machine: Machine::default(),
            notes: Vec::new(),
            runs: vec![outcome],
        }
    }

    /// Goal: every kind of chart is drawn, and the picture is well-formed; nothing to show is no reason to fail. Method: one workload of each kind and
    /// one that came to nothing; the tags are counted.
    #[test]
    fn everything_is_drawn() {
        let mut busy = Outcome {
            over_time: vec![10.0, 0.0, 5.0],
            ..Outcome::default()
        };
        for ms in 1..=2_000 {
            busy.times.record(Duration::from_millis(ms));
        }
        let mut figures = Figures::default();
        figures.put("idle_cpu_percent_of_a_core", 3.0);
        figures.put("brokers_resident_megabytes", 50.0);
        let idle = Outcome {
            figures,
            ..Outcome::default()
        };
        let svg = draw(&[
            report("W2", busy),
            report("W5", idle),
            report("W6", Outcome::default()),
        ]);
        let parts = [
            "W2 some &lt;things&gt;",
            "p99.9",
            "max",
            "10000 ms",
            "records a second",
            "W5 at rest",
            "resident MB",
        ];
        for part in parts {
            assert!(svg.contains(part), "{part}: {svg}");
        }
        assert!(!svg.contains("W6") && !svg.contains("NaN"), "{svg}");
        for tag in ["svg", "text", "title"] {
            let (opened, closed) = (format!("<{tag}"), format!("</{tag}>"));
            let counts = (svg.matches(&opened).count(), svg.matches(&closed).count());
            assert_eq!(counts.0, counts.1, "{tag}");
        }
        assert!(draw(&[]).starts_with("<svg"));
    }
}
