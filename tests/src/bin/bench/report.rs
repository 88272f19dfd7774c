//! The results as a table and as JSON, with their targets.

use std::fmt;

use anyhow::Result;
use serde_json::{Map, Value, json};

/// The subject of a measurement.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Column {
    /// The product.
    Husk,
    /// containerd's runc shim.
    Runc,
    /// The baseline: the same kernel with a stub that only listens.
    Floor,
    /// The same QEMU, kernel and initramfs with a network card connected by hand.
    Manual,
    /// husk with user-mode networking.
    User,
    /// husk under containerd's Sandbox API.
    Sandboxer,
    /// husk without a pool, beside one with it.
    Cold,
    /// runc's shim with gVisor's runsc, which needs no hardware virtualization either.
    Gvisor,
    /// husk with the root filesystem on virtio-fs.
    Virtiofs,
    /// husk with an overlay of the guest's.
    Overlay,
    /// husk with an overlay of the guest's above erofs images.
    Erofs,
    /// husk with a volume.
    Volume,
}

/// Which of two values is the better one.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Better {
    /// A time.
    Less,
    /// A rate.
    More,
}

const COLUMNS: [(Column, &str); 12] = [
    (Column::Husk, "husk"),
    (Column::Virtiofs, "virtio-fs"),
    (Column::Overlay, "overlay"),
    (Column::Erofs, "erofs"),
    (Column::Volume, "volume"),
    (Column::Runc, "runc"),
    (Column::Floor, "floor"),
    (Column::Manual, "by hand"),
    (Column::User, "user mode"),
    (Column::Sandboxer, "sandboxer"),
    (Column::Cold, "no pool"),
    (Column::Gvisor, "gVisor"),
];

/// The limit of a value.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Target {
    /// No limit.
    Any,
    /// An absolute limit, in the row's unit.
    AtMost(f64),
    /// A multiple of runc's value.
    TimesRunc(f64),
    /// An absolute lower limit, in the row's unit.
    AtLeast(f64),
    /// A lower limit: a multiple of runc's value.
    AtLeastTimesRunc(f64),
    /// A lower limit: a multiple of the value of the connection made by hand.
    AtLeastTimesManual(f64),
}

/// A limit in the row's unit.
#[derive(Debug, Clone, Copy, PartialEq)]
enum Limit {
    AtMost(f64),
    AtLeast(f64),
}

impl Limit {
    fn is_met_by(self, value: f64) -> bool {
        match self {
            Self::AtMost(most) => value <= most,
            Self::AtLeast(least) => value >= least,
        }
    }
}

enum Line {
    Section(String),
    Row { name: String, unit: &'static str, values: Vec<(Column, f64)>, target: Target },
    Note(String),
}

/// All lines, in the order of measurement.
pub(crate) struct Report {
    lines: Vec<Line>,
    machine: Map<String, Value>,
    samples: Map<String, Value>,
}

impl Report {
    /// An empty report with a description of the machine.
    pub(crate) fn new() -> Result<Self> {
        let uname = nix::sys::utsname::uname()?;
        let mut machine = Map::new();
        machine.insert("kernel".into(), json!(uname.release().to_string_lossy()));
        machine.insert("cpus".into(), json!(std::thread::available_parallelism()?.get()));
        // Wall-clock values of a loaded machine mean little.
        let load = std::fs::read_to_string("/proc/loadavg")?;
        machine.insert("load average".into(), json!(load.split_whitespace().next()));
        Ok(Self { lines: Vec::new(), machine, samples: Map::new() })
    }

    /// Records a property of the machine or of the measured programs.
    pub(crate) fn about(&mut self, what: &str, value: impl Into<Value>) {
        self.machine.insert(what.into(), value.into());
    }

    /// Starts a section of the table.
    pub(crate) fn section(&mut self, title: &str) {
        self.lines.push(Line::Section(title.into()));
    }

    /// Adds a line of text.
    pub(crate) fn note(&mut self, text: impl Into<String>) {
        self.lines.push(Line::Note(text.into()));
    }

    /// Adds a row to the table.
    pub(crate) fn row(&mut self, name: &str, unit: &'static str, values: &[(Column, f64)], target: Target) {
        self.lines.push(Line::Row { name: name.into(), unit, values: values.to_vec(), target });
    }

    /// Adds rows for p50 and p99 of samples. The JSON contains the samples themselves.
    pub(crate) fn distribution(
        &mut self,
        name: &str,
        unit: &'static str,
        samples: &[(Column, Vec<f64>)],
        target: Target,
    ) {
        for (percent, target) in [(50, target), (99, Target::Any)] {
            let values: Vec<_> = samples.iter().map(|(column, all)| (*column, percentile(all, percent))).collect();
            self.row(&format!("{name}, p{percent}"), unit, &values, target);
        }
        self.keep(name, samples);
    }

    /// Adds a row for the mean of values that are measured together.
    pub(crate) fn mean(&mut self, name: &str, unit: &'static str, samples: &[(Column, Vec<f64>)], target: Target) {
        let mean = |all: &[f64]| all.iter().sum::<f64>() / all.len().max(1) as f64;
        let values: Vec<_> = samples.iter().map(|(column, all)| (*column, mean(all))).collect();
        self.row(&format!("{name}, mean"), unit, &values, target);
        self.keep(name, samples);
    }

    /// Adds a row for the median of samples. The JSON contains the samples themselves.
    pub(crate) fn median(&mut self, name: &str, unit: &'static str, samples: &[(Column, Vec<f64>)], target: Target) {
        let values: Vec<_> = samples.iter().map(|(column, all)| (*column, percentile(all, 50))).collect();
        self.row(&format!("{name}, p50"), unit, &values, target);
        self.keep(name, samples);
    }

    /// Adds a row for the median of samples, and one for how many times as long as under runc it takes.
    pub(crate) fn beside_runc(
        &mut self,
        name: &str,
        unit: &'static str,
        samples: &[(Column, Vec<f64>)],
        better: Better,
    ) {
        let values: Vec<_> = samples.iter().map(|(column, all)| (*column, percentile(all, 50))).collect();
        let slower = slower(&values, better);
        self.row(name, unit, &values, Target::Any);
        self.row("  times as slow as under runc", "x", &slower, Target::Any);
        self.keep(name, samples);
    }

    fn keep(&mut self, name: &str, samples: &[(Column, Vec<f64>)]) {
        let all = samples.iter().map(|(column, all)| (title(*column).to_owned(), json!(all))).collect();
        self.samples.insert(name.into(), Value::Object(all));
    }

    /// The report as JSON.
    pub(crate) fn json(&self) -> Result<String> {
        let mut section = "";
        let mut rows = Vec::new();
        for line in &self.lines {
            match line {
                Line::Section(title) => section = title,
                Line::Row { name, unit, values, target } => {
                    let mut row = json!({"section": section, "name": name, "unit": unit});
                    for (column, value) in values {
                        row[title(*column)] = json!(value);
                    }
                    if let Some((limit, met)) = verdict(values, *target) {
                        match limit {
                            Limit::AtMost(most) => row["wanted_at_most"] = json!(most),
                            Limit::AtLeast(least) => row["wanted_at_least"] = json!(least),
                        }
                        row["met"] = json!(met);
                    }
                    rows.push(row);
                }
                Line::Note(text) => rows.push(json!({"section": section, "note": text})),
            }
        }
        let all = json!({"machine": self.machine, "rows": rows, "samples": self.samples});
        Ok(serde_json::to_string_pretty(&all)?)
    }
}

fn title(column: Column) -> &'static str {
    COLUMNS.iter().find(|(known, _)| *known == column).map_or("", |(_, title)| title)
}

fn value(values: &[(Column, f64)], target: Column) -> Option<f64> {
    values.iter().find(|(column, _)| *column == target).map(|(_, value)| *value)
}

/// How many times as slow as under runc the others are; nothing without runc.
fn slower(values: &[(Column, f64)], better: Better) -> Vec<(Column, f64)> {
    let Some(runc) = value(values, Column::Runc) else { return Vec::new() };
    let times = |value: f64| if better == Better::Less { value / runc } else { runc / value };
    let others = values.iter().filter(|(column, _)| *column != Column::Runc);
    others.map(|(column, value)| (*column, times(*value))).collect()
}

/// The limit of husk's value, and whether the value meets it.
fn verdict(values: &[(Column, f64)], target: Target) -> Option<(Limit, bool)> {
    let husk = value(values, Column::Husk)?;
    let limit = match target {
        Target::Any => return None,
        Target::AtMost(most) => Limit::AtMost(most),
        Target::TimesRunc(times) => Limit::AtMost(times * value(values, Column::Runc)?),
        Target::AtLeast(least) => Limit::AtLeast(least),
        Target::AtLeastTimesRunc(times) => Limit::AtLeast(times * value(values, Column::Runc)?),
        Target::AtLeastTimesManual(times) => Limit::AtLeast(times * value(values, Column::Manual)?),
    };
    Some((limit, limit.is_met_by(husk)))
}

/// The columns that the section at the beginning of `lines` has values for.
fn used(lines: &[Line]) -> Vec<Column> {
    let section = lines.iter().take_while(|line| !matches!(line, Line::Section(_)));
    let used: Vec<Column> = section
        .filter_map(|line| match line {
            Line::Row { values, .. } => Some(values.iter().map(|(column, _)| *column)),
            _ => None,
        })
        .flatten()
        .collect();
    COLUMNS.iter().map(|(column, _)| *column).filter(|column| used.contains(column)).collect()
}

/// Percentile of at least one sample, by nearest rank.
pub(crate) fn percentile(samples: &[f64], percent: usize) -> f64 {
    let mut sorted = samples.to_vec();
    sorted.sort_by(f64::total_cmp);
    let rank = (percent * sorted.len()).div_ceil(100).max(1);
    sorted.get(rank - 1).copied().unwrap_or(f64::NAN)
}

/// Formats a value with four significant digits, more than any measurement is exact to.
fn short(value: f64) -> String {
    match value.abs() {
        v if v >= 1000.0 || v == 0.0 => format!("{value:.0}"),
        v if v >= 100.0 => format!("{value:.1}"),
        v if v >= 1.0 => format!("{value:.2}"),
        _ => format!("{value:.3}"),
    }
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (what, value) in &self.machine {
            writeln!(f, "{what}: {}", value.as_str().map_or_else(|| value.to_string(), str::to_owned))?;
        }
        let mut columns = Vec::new();
        for (number, line) in self.lines.iter().enumerate() {
            match line {
                Line::Section(name) => {
                    columns = used(&self.lines[number + 1..]);
                    let titles: String = columns.iter().map(|column| format!("{:>11}", title(*column))).collect();
                    writeln!(f, "\n{name:<46}{titles}  {:<14}target", "unit")?;
                }
                Line::Row { name, unit, values, target } => {
                    write!(f, "  {name:<44}")?;
                    for column in &columns {
                        write!(f, "{:>11}", value(values, *column).map(short).unwrap_or_default())?;
                    }
                    let verdict = verdict(values, *target).map(|(limit, met)| match (limit, met) {
                        (Limit::AtMost(most), true) => format!("<= {} PASS", short(most)),
                        (Limit::AtMost(most), false) => format!("<= {} OVER", short(most)),
                        (Limit::AtLeast(least), true) => format!(">= {} PASS", short(least)),
                        (Limit::AtLeast(least), false) => format!(">= {} UNDER", short(least)),
                    });
                    writeln!(f, "  {unit:<14}{}", verdict.unwrap_or_default())?;
                }
                Line::Note(text) => writeln!(f, "  {text}")?,
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn percentiles_are_samples_by_nearest_rank() {
        let samples = [5.0, 1.0, 4.0, 2.0, 3.0];
        for (percent, target) in [(0, 1.0), (20, 1.0), (21, 2.0), (50, 3.0), (99, 5.0), (100, 5.0)] {
            assert_eq!(percentile(&samples, percent), target, "p{percent}");
        }
    }

    #[test]
    fn verdicts_compare_with_the_target() {
        let values = [(Column::Husk, 8.0), (Column::Runc, 2.0), (Column::Manual, 10.0)];
        let table = [
            (Target::AtMost(8.0), true),
            (Target::AtMost(7.9), false),
            (Target::TimesRunc(4.0), true),
            (Target::AtLeastTimesManual(0.8), true),
            (Target::AtLeastTimesManual(0.9), false),
        ];
        for (target, met) in table {
            assert_eq!(verdict(&values, target).map(|(_, met)| met), Some(met), "{target:?}");
        }
        assert_eq!(verdict(&values[..1], Target::TimesRunc(9.0)), None, "nothing to compare with");
    }

    #[test]
    fn slower_than_runc_is_longer_or_less_in_the_same_time() {
        let values = [(Column::Volume, 8.0), (Column::Runc, 2.0)];
        assert_eq!(slower(&values, Better::Less), [(Column::Volume, 4.0)]);
        assert_eq!(slower(&values, Better::More), [(Column::Volume, 0.25)]);
        assert_eq!(slower(&values[..1], Better::More), [], "nothing to compare with");
    }
}
