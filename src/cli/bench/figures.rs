//! Figures: distributions of times, what processes have used, and a workload's figures over its runs.
//!
//! Owns the names of all figures, with their units, and how several runs become a median and a spread. A figure that is not known is
//! left out, never zero.

use std::collections::BTreeMap;
use std::fs;
use std::time::Duration;

use anyhow::Context;
use hdrhistogram::Histogram;
use serde_json::{Map, Value};

use super::super::output;

/// Significant digits of recorded times.
const DIGITS: u8 = 3;
/// The percentiles that a curve is drawn through.
const CURVE: [f64; 13] = [
    0.0, 0.25, 0.5, 0.75, 0.9, 0.95, 0.99, 0.995, 0.999, 0.9995, 0.9999, 0.99999, 1.0,
];

/// A distribution of times, in ns, in memory that does not grow with their number.
#[derive(Debug, Clone)]
pub(super) struct Latencies(Histogram<u64>);

impl Default for Latencies {
    fn default() -> Self {
        let mut histogram = Histogram::new(DIGITS)
            .or_else(|_| Histogram::new(1))
            .unwrap_or_else(|_| unreachable!("0 to 5 digits are possible"));
        histogram.auto(true);
        Self(histogram)
    }
}

impl Latencies {
    pub(super) fn record(&mut self, time: Duration) {
        let ns = u64::try_from(time.as_nanos()).unwrap_or(u64::MAX);
        // Cannot fail: it grows as far as it must.
        self.0.record(ns).ok();
    }

    pub(super) fn add(&mut self, other: &Self) {
        // Cannot fail: it grows as far as it must.
        self.0.add(&other.0).ok();
    }

    pub(super) fn count(&self) -> u64 {
        self.0.len()
    }

    /// The time that this part of all times does not exceed, in µs.
    pub(super) fn at_us(&self, part: f64) -> f64 {
        as_figure(self.0.value_at_quantile(part)) / 1e3
    }

    pub(super) fn max_us(&self) -> f64 {
        as_figure(self.0.max()) / 1e3
    }

    /// Points of the distribution: part of all times, and ms.
    pub(super) fn curve(&self) -> Vec<(f64, f64)> {
        // Of few, the last ones are all the same.
        let count = as_figure(self.count()).max(1.0);
        let told = CURVE.iter().copied();
        told.filter(|part| *part >= 1.0 || (1.0 - part) * count >= 1.0)
            .map(|part| (part, self.at_us(part) / 1e3))
            .collect()
    }
}

/// A count as a figure; exact below 2⁵³.
#[allow(clippy::cast_precision_loss)] // a figure in a table
pub(super) fn as_figure(count: u64) -> f64 {
    count as f64
}

/// The number behind `name` in a text of `/proc`.
pub(super) fn proc_field(text: &str, name: &str) -> u64 {
    let line = text.lines().find_map(|line| line.strip_prefix(name));
    let number = line.and_then(|line| line.split_whitespace().next());
    number.and_then(|number| number.parse().ok()).unwrap_or(0)
}

/// What processes have used so far.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub(super) struct Usage {
    pub(super) cpu_seconds: f64,
    pub(super) resident_megabytes: f64,
}

impl Usage {
    /// Of the process with this number.
    pub(super) fn of(process: u32) -> anyhow::Result<Self> {
        let read = |file: &str| {
            let path = format!("/proc/{process}/{file}");
            fs::read_to_string(&path).with_context(|| format!("cannot read {path}"))
        };
        let ticks = cpu_ticks(&read("stat")?).context("/proc tells no CPU time")?;
        let ticks_a_second = rustix::param::clock_ticks_per_second();
        let status = read("status")?;
        Ok(Self {
            cpu_seconds: as_figure(ticks) / as_figure(ticks_a_second.max(1)),
            resident_megabytes: as_figure(proc_field(&status, "VmRSS:")) * 1_024.0 / 1e6,
        })
    }

    /// Of several together.
    pub(super) fn sum(processes: &[u32]) -> anyhow::Result<Self> {
        let mut sum = Self::default();
        for process in processes {
            let one = Self::of(*process)?;
            sum.cpu_seconds += one.cpu_seconds;
            sum.resident_megabytes += one.resident_megabytes;
        }
        Ok(sum)
    }
}

/// User and system time in the text of `/proc/PID/stat`.
fn cpu_ticks(stat: &str) -> Option<u64> {
    // The name, in parentheses, may hold anything.
    let (_, fields) = stat.rsplit_once(") ")?;
    let mut fields = fields.split(' ').skip(11);
    let user: u64 = fields.next()?.parse().ok()?;
    let system: u64 = fields.next()?.parse().ok()?;
    Some(user + system)
}

/// The figures of one run, by name: the unit stands last in it.
#[derive(Debug, Clone, Default, PartialEq)]
pub(super) struct Figures(Vec<(&'static str, f64)>);

impl Figures {
    pub(super) fn put(&mut self, name: &'static str, value: f64) {
        if value.is_finite() {
            self.0.push((name, value));
        }
    }

    pub(super) fn extend(&mut self, more: Self) {
        self.0.extend(more.0);
    }

    /// Percentiles of an operation's latency.
    pub(super) fn put_latencies(&mut self, times: &Latencies) {
        if times.count() == 0 {
            return;
        }
        self.put("latency_p50_us", times.at_us(0.5));
        self.put("latency_p99_us", times.at_us(0.99));
        self.put("latency_p99_9_us", times.at_us(0.999));
        self.put("latency_max_us", times.max_us());
    }

    #[cfg(test)]
    pub(super) fn get(&self, name: &str) -> Option<f64> {
        let found = self.0.iter().find(|(known, _)| *known == name);
        found.map(|(_, value)| *value)
    }

    pub(super) fn json(&self) -> Value {
        let pairs = self.0.iter();
        object(pairs.map(|(name, value)| ((*name).to_owned(), *value)))
    }
}

fn object(pairs: impl Iterator<Item = (String, f64)>) -> Value {
    let pairs = pairs.map(|(name, value)| (name, Value::from(rounded(value))));
    Value::Object(pairs.collect::<Map<_, _>>())
}

/// To four significant digits: no run is more exact.
fn rounded(value: f64) -> f64 {
    if value == 0.0 || value.abs() >= 1e4 {
        return value.round();
    }
    let digits = 3.0 - value.abs().log10().floor();
    let scale = 10_f64.powf(digits);
    (value * scale).round() / scale
}

/// Median, least and greatest of each figure over several runs.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Spread(Vec<(&'static str, [f64; 3])>);

impl Spread {
    pub(super) fn of(runs: &[Figures]) -> Self {
        let mut order: Vec<&'static str> = Vec::new();
        let mut values: BTreeMap<&'static str, Vec<f64>> = BTreeMap::new();
        for (name, value) in runs.iter().flat_map(|run| &run.0) {
            if !order.contains(name) {
                order.push(name);
            }
            values.entry(name).or_default().push(*value);
        }
        let mut spread = |name: &'static str| {
            let mut values = values.remove(name).unwrap_or_default();
            values.sort_by(f64::total_cmp);
            let at = |at: usize| values.get(at).copied().unwrap_or(0.0);
            let (middle, last) = (values.len() / 2, values.len().saturating_sub(1));
            // Of an even number of runs there are two in the middle.
            let median = f64::midpoint(at(last / 2), at(middle.min(last)));
            (name, [median, at(0), at(last)])
        };
        Self(order.into_iter().map(&mut spread).collect())
    }

    pub(super) fn median(&self, name: &str) -> Option<f64> {
        let found = self.0.iter().find(|(known, _)| *known == name);
        found.map(|(_, [median, ..])| *median)
    }

    /// For people.
    pub(super) fn table(&self) -> String {
        let shown = |value: f64| {
            let value = rounded(value);
            format!("{value}")
        };
        let row = |(name, values): &(&'static str, [f64; 3])| {
            let mut row = vec![name.replace('_', " ").replace("p99 9", "p99.9")];
            row.extend(values.iter().map(|value| shown(*value)));
            row
        };
        let rows: Vec<Vec<String>> = self.0.iter().map(row).collect();
        output::table(&["FIGURE", "MEDIAN", "MIN", "MAX"], &rows)
    }

    /// `median`, `min` and `max`.
    pub(super) fn json(&self) -> Map<String, Value> {
        let mut all = Map::new();
        for (at, name) in ["median", "min", "max"].into_iter().enumerate() {
            let pick = |(name, values): &(&'static str, [f64; 3])| {
                ((*name).to_owned(), values.get(at).copied().unwrap_or(0.0))
            };
            all.insert(name.to_owned(), object(self.0.iter().map(pick)));
        }
        all
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Goal: percentiles are those of the times recorded, to three digits. Method: 1 to 1000 ms, in two halves.
    #[test]
    fn percentiles_are_right() {
        let (mut one, mut other) = (Latencies::default(), Latencies::default());
        for ms in 1..=500 {
            one.record(Duration::from_millis(ms));
            other.record(Duration::from_millis(ms + 500));
        }
        one.add(&other);
        assert_eq!(one.count(), 1_000);
        for (part, ms) in [(0.5, 500.0), (0.99, 990.0), (0.999, 999.0)] {
            let found = one.at_us(part) / 1e3;
            assert!((found - ms).abs() < ms / 500.0, "{part}: {found}");
        }
        assert!((one.max_us() / 1e6 - 1.0).abs() < 0.002);
        let curve = one.curve();
        assert!(curve.iter().all(|(part, _)| *part <= 0.999 || *part >= 1.0));
        assert!(
            curve.windows(2).all(|pair| pair[0].1 <= pair[1].1),
            "{curve:?}"
        );
        assert_eq!(Latencies::default().at_us(0.99).to_bits(), 0);
    }

    /// Goal: the median is the run in the middle, or between the two there. Method: runs of one figure, one of them without it.
    #[test]
    fn medians_and_spreads() {
        let run = |value: f64| {
            let mut figures = Figures::default();
            figures.put("records_per_second", value);
            figures.put("nothing", f64::NAN);
            figures
        };
        let runs = [run(30.0), run(10.0), run(20.0), Figures::default()];
        let spread = Spread::of(&runs);
        assert_eq!(spread.0, [("records_per_second", [20.0, 10.0, 30.0])]);
        let even = Spread::of(&[run(4.0), run(1.0)]);
        assert_eq!(even.median("records_per_second"), Some(2.5));
        assert_eq!(Spread::of(&[]).0, []);
        assert!(spread.table().contains("records per second  20"));
    }

    /// Goal: figures are as exact as they are, and not longer. Method: a table.
    #[test]
    fn figures_are_rounded() {
        for (value, shown) in [
            (0.0, "0"),
            (123_456.7, "123457"),
            (1234.56, "1235"),
            (12.3456, "12.35"),
            (0.001_234_56, "0.001235"),
        ] {
            assert_eq!(format!("{}", rounded(value)), shown);
        }
    }

    /// Goal: CPU time is read whatever the process is called. Method: a name with spaces and parentheses.
    #[test]
    fn cpu_time_is_read() {
        let stat = "7 (a) b (c)) S 1 2 3 4 5 6 7 8 9 10 40 2 0 0";
        assert_eq!(cpu_ticks(stat), Some(42));
        assert_eq!(cpu_ticks("7"), None);
        let me = Usage::of(std::process::id()).unwrap();
        assert!(me.resident_megabytes > 1.0, "{me:?}");
    }
}
