//! The run as a picture: operations by outcome, faults, and who led each partition, over one axis of time.
//!
//! Owns the drawing. The SVG stands alone: no script, no font, no other file.

use std::collections::BTreeMap;
use std::fmt::Write as _;

use logboom::testkit::history::{History, Outcome};

use super::super::svg::{Canvas, GAP, LEFT, RIGHT, WIDTH};
use super::acts::Deed;
use super::schedule::Kind;

const CHART: f64 = 180.0;
const LANE: f64 = 20.0;
/// Columns of the chart at most: a long run is shown in wider steps than a second.
const COLUMNS_MAX: u64 = 540;
/// Distinguishable side by side, also without colours red and green.
const BROKERS: [&str; 9] = [
    "#0072b2", "#e69f00", "#009e73", "#cc79a7", "#56b4e9", "#d55e00", "#f0e442", "#8c6bb1",
    "#666666",
];
const DONE: &str = "#4c9f70";
const REFUSED: &str = "#e69f00";
const UNKNOWN: &str = "#c1121f";

#[allow(clippy::cast_precision_loss)] // for the screen
fn seconds(ns: u64) -> f64 {
    ns as f64 / 1e9
}

#[allow(clippy::cast_precision_loss)] // for the screen
fn number(count: u64) -> f64 {
    count as f64
}

/// Where a moment of the run lies.
#[derive(Clone, Copy)]
struct Scale {
    pixels_a_second: f64,
}

impl Scale {
    fn x(self, ns: u64) -> f64 {
        LEFT + seconds(ns) * self.pixels_a_second
    }
}

/// Draws the run.
pub(super) fn draw(histories: &[(String, History)], deeds: &[Deed]) -> String {
    let operations = histories
        .iter()
        .flat_map(|(_, history)| &history.operations);
    let ends = operations.map(|one| one.completed_ns.unwrap_or(one.invoked_ns));
    let ends = ends.chain(deeds.iter().map(|deed| deed.ended_ns));
    let end = ends.max().unwrap_or(0).max(1_000_000_000);
    let mut canvas = Canvas::default();
    let scale = Scale {
        pixels_a_second: (WIDTH - LEFT - RIGHT) / seconds(end),
    };
    chart(&mut canvas, scale, histories, end);
    faults(&mut canvas, scale, deeds);
    for (name, history) in histories {
        leaders(&mut canvas, scale, (name, history), end);
    }
    axis(&mut canvas, scale, end);
    canvas.finish()
}

/// Operations by the time of their answer, in columns.
fn chart(canvas: &mut Canvas, scale: Scale, histories: &[(String, History)], end: u64) {
    let column_ns = (end / COLUMNS_MAX).max(1_000_000_000);
    let mut columns: BTreeMap<u64, [u64; 3]> = BTreeMap::new();
    for operation in histories
        .iter()
        .flat_map(|(_, history)| &history.operations)
    {
        let at = operation.completed_ns.unwrap_or(operation.invoked_ns);
        let which = match (&operation.outcome, operation.completed_ns) {
            (Outcome::Unknown { .. }, _) | (_, None) => 2,
            (Outcome::Failed { .. }, _) => 1,
            _ => 0,
        };
        let column = columns.entry(at / column_ns).or_default();
        if let Some(count) = column.get_mut(which) {
            *count += 1;
        }
    }
    let highest = columns.values().map(|counts| counts.iter().sum::<u64>());
    let highest = highest.max().unwrap_or(1).max(1);
    canvas.heading("operations a second");
    canvas.key(&[("done", DONE), ("refused", REFUSED), ("unknown", UNKNOWN)]);
    let bottom = canvas.y + CHART;
    let width = (seconds(column_ns) * scale.pixels_a_second - 0.4).max(0.6);
    for (column, counts) in &columns {
        let mut y = bottom;
        for ((count, colour), name) in counts
            .iter()
            .zip([DONE, REFUSED, UNKNOWN])
            .zip(["done", "refused", "unknown"])
        {
            if *count == 0 {
                continue;
            }
            // One that failed among thousands is what one looks for.
            let height = (number(*count) / number(highest) * CHART).max(1.5);
            y -= height;
            let title = format!("{count} {name}");
            let place = (scale.x(column * column_ns), y);
            let width = width.min(WIDTH - RIGHT - place.0).max(0.6);
            canvas.bar(place, (width, height), colour, &title);
        }
    }
    let a_second = number(highest) / seconds(column_ns);
    for (part, label) in [(0.0, "0".to_owned()), (1.0, format!("{a_second:.0}"))] {
        let y = bottom - CHART * part;
        canvas.text(LEFT - 6.0, y + 4.0, "end", &label);
        let right = WIDTH - RIGHT;
        canvas.push(&format!(
            "<path d=\"M{LEFT} {y:.1}H{right}\" stroke=\"#d0d7de\" fill=\"none\"/>"
        ));
    }
    canvas.y = bottom;
}

/// A row per kind of fault, a bar per fault.
fn faults(canvas: &mut Canvas, scale: Scale, deeds: &[Deed]) {
    canvas.heading("faults");
    for kind in Kind::ALL {
        let mut of_kind = deeds
            .iter()
            .filter(|deed| deed.kind == kind.name())
            .peekable();
        if of_kind.peek().is_none() {
            continue;
        }
        canvas.text(LEFT - 6.0, canvas.y + 14.0, "end", kind.name());
        for deed in of_kind {
            let from = scale.x(deed.began_ns);
            let width = (scale.x(deed.ended_ns) - from).max(2.0);
            let all = deed.target.starts_with("all");
            let fill = match (deed.effect, all) {
                (false, _) => "#d0d7de",
                (true, false) => "#57606a",
                (true, true) => "#1f2328",
            };
            let title = format!("{}: {} {}", deed.kind, deed.target, deed.note);
            canvas.bar((from, canvas.y + 3.0), (width, LANE - 6.0), fill, &title);
        }
        canvas.y += LANE;
    }
}

/// A lane per partition, coloured by who led.
fn leaders(canvas: &mut Canvas, scale: Scale, (name, history): (&str, &History), end: u64) {
    canvas.heading(&format!("leaders of {name}"));
    let mut seen = history.leaders.clone();
    // A leader of an old epoch may be heard of late.
    seen.sort_by_key(|one| (one.partition, one.epoch, one.at_ns));
    let mut lanes: BTreeMap<u32, Vec<(u64, u64, u32)>> = BTreeMap::new();
    for one in seen {
        let lane = lanes.entry(one.partition).or_default();
        if lane.last().is_none_or(|(_, epoch, _)| *epoch != one.epoch) {
            lane.push((one.at_ns, one.epoch, one.broker));
        }
    }
    let mut brokers: Vec<u32> = history.leaders.iter().map(|one| one.broker).collect();
    brokers.sort_unstable();
    brokers.dedup();
    let names: Vec<(String, &str)> = (brokers.iter())
        .map(|broker| (format!("broker {broker}"), colour(*broker)))
        .collect();
    let key: Vec<(&str, &str)> = names
        .iter()
        .map(|(name, fill)| (name.as_str(), *fill))
        .collect();
    canvas.key(&key);
    for (partition, lane) in lanes {
        canvas.text(
            LEFT - 6.0,
            canvas.y + 14.0,
            "end",
            &format!("partition {partition}"),
        );
        let ends = lane.iter().skip(1).map(|(at, _, _)| *at).chain([end]);
        for ((at, epoch, broker), until) in lane.iter().zip(ends) {
            let from = scale.x(*at);
            let width = (scale.x(until) - from).max(1.0);
            let title = format!("broker {broker}, epoch {epoch}");
            canvas.bar(
                (from, canvas.y + 2.0),
                (width, LANE - 4.0),
                colour(*broker),
                &title,
            );
            // Where one leads again after itself, the seam is all there is to see.
            let seam = (canvas.y + 2.0, canvas.y + LANE - 2.0);
            canvas.push(&format!(
                "<path d=\"M{from:.1} {:.1}V{:.1}\" stroke=\"#ffffff\" fill=\"none\"/>",
                seam.0, seam.1
            ));
        }
        canvas.y += LANE;
    }
}

fn colour(broker: u32) -> &'static str {
    let at = usize::try_from(broker.saturating_sub(1)).unwrap_or(0) % BROKERS.len();
    BROKERS.get(at).copied().unwrap_or("#666666")
}

/// Seconds, about ten of them.
fn axis(canvas: &mut Canvas, scale: Scale, end: u64) {
    let step = [1_u64, 2, 5, 10, 20, 30, 60, 120, 300, 600, 1_800, 3_600]
        .into_iter()
        .find(|step| seconds(end) / number(*step) <= 14.0)
        .unwrap_or(7_200);
    let (top, bottom) = (GAP, canvas.y + 6.0);
    let mut at = 0;
    let mut lines = String::new();
    while at <= end / 1_000_000_000 {
        let x = scale.x(at * 1_000_000_000);
        writeln!(
            lines,
            "<path d=\"M{x:.1} {top:.1}V{bottom:.1}\" stroke=\"#eaeef2\" fill=\"none\"/>"
        )
        .unwrap_or_default();
        let label = if step >= 60 {
            format!("{} min", at / 60)
        } else {
            format!("{at} s")
        };
        canvas.text(x, bottom + 14.0, "middle", &label);
        at += step;
    }
    // Behind everything else.
    canvas.push_behind(&lines);
    canvas.y = bottom + 16.0;
}

#[cfg(test)]
mod tests {
    use super::*;
    use logboom::testkit::history::{Call, LeaderSeen, Operation};

    /// Goal: the picture has the run's operations, faults and leaders, and is well-formed. Method: one of each; the tags are counted.
    #[test]
    fn everything_is_drawn() {
        let operation = |at: u64, outcome: Outcome| Operation {
            session: 0,
            invoked_ns: at,
            completed_ns: Some(at),
            partition: 0,
            call: Call::End,
            outcome,
        };
        let reason = String::new();
        let history = History {
            operations: vec![
                operation(
                    1,
                    Outcome::End {
                        end: 1,
                        epoch: None,
                    },
                ),
                operation(
                    2,
                    Outcome::Failed {
                        reason: reason.clone(),
                    },
                ),
                operation(9_000_000_000, Outcome::Unknown { reason }),
            ],
            leaders: vec![LeaderSeen {
                at_ns: 5,
                partition: 0,
                epoch: 7,
                broker: 2,
            }],
            ..History::default()
        };
        let deed = Deed {
            kind: "kill",
            target: "all <brokers>".to_owned(),
            began_ns: 3,
            ended_ns: 4,
            effect: true,
            note: String::new(),
            failover_of: None,
        };
        let svg = draw(&[("chaos-3".to_owned(), history)], &[deed]);
        for part in [
            "1 done",
            "1 refused",
            "1 unknown",
            "kill: all &lt;brokers&gt;",
            "broker 2, epoch 7",
            "leaders of chaos-3",
            "9 s",
        ] {
            assert!(svg.contains(part), "{part}: {svg}");
        }
        for tag in ["svg", "text", "title"] {
            let (opened, closed) = (format!("<{tag}"), format!("</{tag}>"));
            assert_eq!(
                svg.matches(&opened).count(),
                svg.matches(&closed).count(),
                "{tag}"
            );
        }
        assert_eq!(
            svg.matches("<rect").count() - 1,
            svg.matches("</rect>").count()
        );
    }

    /// Goal: nothing to show is no reason to fail. Method: an empty run.
    #[test]
    fn an_empty_run_is_drawn() {
        assert!(draw(&[], &[]).starts_with("<svg"));
    }
}
