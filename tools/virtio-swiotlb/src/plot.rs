// SPDX-License-Identifier: GPL-2.0

//! Snapshots over time as a picture: how full each pool is, and how fast data and refusals come.

use crate::{
    error::{Error, Result},
    snapshot::{Device, Snapshot},
};
use plotters::prelude::*;
use std::{fmt::Display, path::Path};

/// Width and height of the picture in pixels.
const SIZE: (u32, u32) = (960, 840);
/// Width of a legend in pixels.
const LEGEND: i32 = 190;
const MIB: f64 = (1 << 20) as f64;

/// A line of a chart: points of seconds since the first sample, and a value.
#[derive(Clone, Debug, PartialEq)]
pub struct Line {
    /// What it shows.
    pub label: String,
    /// In the order of time.
    pub points: Vec<(f64, f64)>,
}

/// The lines of a picture.
#[derive(Clone, Debug, PartialEq)]
pub struct Chart {
    /// What it shows, and the unit.
    pub title: &'static str,
    /// By device.
    pub lines: Vec<Line>,
}

/// Parses recorded lines of `status --json`. Empty lines are passed over.
///
/// # Errors
///
/// [`Error::Sample`] with the first line that is no snapshot.
pub fn parse(path: &Path, text: &str) -> Result<Vec<Snapshot>> {
    let lines = text
        .lines()
        .enumerate()
        .filter(|(_, line)| !line.trim().is_empty());
    lines
        .map(|(index, line)| {
            serde_json::from_str(line).map_err(|source| Error::Sample {
                path: path.to_owned(),
                line: index + 1,
                source,
            })
        })
        .collect()
}

/// What the picture shows of the samples, which are in the order of time.
pub fn charts(samples: &[Snapshot]) -> [Chart; 3] {
    let start = samples.first().map_or(0.0, |sample| sample.time);
    let mut names = Vec::new();
    for device in samples.iter().flat_map(|sample| &sample.devices) {
        if device.is_bounced() && !names.contains(&device.name) {
            names.push(device.name.clone());
        }
    }
    let find = |sample: &Snapshot, name: &str| -> Option<Device> {
        let device = sample.devices.iter().find(|device| device.name == name)?;
        device.is_bounced().then(|| device.clone())
    };
    let level = |name: &str, value: &dyn Fn(&Device) -> Option<f64>| {
        let points = samples
            .iter()
            .filter_map(|sample| Some((sample.time - start, value(&find(sample, name)?)?)));
        points.collect()
    };
    let rate = |name: &str, key: &str, unit: f64| {
        let pairs = samples.windows(2).filter_map(|pair| {
            let [before, after] = pair else { return None };
            let seconds = after.time - before.time;
            let (old, new) = (
                find(before, name)?.known(key)?,
                find(after, name)?.known(key)?,
            );
            // The driver was bound anew if a counter fell.
            let added = new.checked_sub(old)?;
            (seconds > 0.0).then(|| (after.time - start, added as f64 / unit / seconds))
        });
        pairs.collect()
    };
    let pool = |device: &Device| device.counter("pool_bytes").max(1) as f64;
    let mut fill = Vec::new();
    let mut bytes = Vec::new();
    let mut refused = Vec::new();
    for name in &names {
        let add = |lines: &mut Vec<Line>, what: &str, points| {
            lines.push(Line {
                label: format!("{name} {what}"),
                points,
            });
        };
        add(
            &mut fill,
            "in use",
            level(name, &|device| device.fill().map(|fill| 100.0 * fill)),
        );
        add(
            &mut fill,
            "high-water mark",
            level(name, &|device| {
                let hiwater = device.known("hiwater_bytes")?;
                Some(100.0 * hiwater as f64 / pool(device))
            }),
        );
        add(&mut bytes, "to device", rate(name, "bytes_to_device", MIB));
        add(
            &mut bytes,
            "from device",
            rate(name, "bytes_from_device", MIB),
        );
        add(&mut refused, "full", rate(name, "full", 1.0));
        add(&mut refused, "too_large", rate(name, "too_large", 1.0));
    }
    [
        Chart {
            title: "Region in use (% of the pool)",
            lines: fill,
        },
        Chart {
            title: "Payload (MiB/s)",
            lines: bytes,
        },
        Chart {
            title: "Requests without room (1/s)",
            lines: refused,
        },
    ]
}

/// The picture as SVG.
///
/// # Errors
///
/// [`Error::TooFewSamples`] for less than two samples, [`Error::Draw`] from the library.
pub fn svg(samples: &[Snapshot]) -> Result<String> {
    if samples.len() < 2 {
        return Err(Error::TooFewSamples(samples.len()));
    }
    let mut picture = String::new();
    draw(&mut picture, &charts(samples)).map_err(|error| Error::Draw(error.to_string()))?;
    Ok(picture)
}

fn draw(
    picture: &mut String,
    charts: &[Chart; 3],
) -> std::result::Result<(), Box<dyn std::error::Error>> {
    let area = SVGBackend::with_string(picture, SIZE).into_drawing_area();
    area.fill(&WHITE)?;
    for (part, chart) in area.split_evenly((charts.len(), 1)).iter().zip(charts) {
        draw_chart(part, chart).map_err(|error| error.to_string())?;
    }
    area.present()?;
    Ok(())
}

type Area<'a> = DrawingArea<SVGBackend<'a>, plotters::coord::Shift>;

fn draw_chart(area: &Area<'_>, chart: &Chart) -> std::result::Result<(), impl Display> {
    let points = || chart.lines.iter().flat_map(|line| &line.points);
    let largest = |values: &mut dyn Iterator<Item = f64>| values.fold(0.0, f64::max);
    let seconds = largest(&mut points().map(|(seconds, _)| *seconds)).max(1e-3);
    let highest = largest(&mut points().map(|(_, value)| *value)).max(1.0) * 1.05;
    let mut context = ChartBuilder::on(area)
        .margin(12)
        .margin_right(LEGEND)
        .caption(chart.title, ("sans-serif", 18))
        .x_label_area_size(36)
        .y_label_area_size(60)
        .build_cartesian_2d(0.0..seconds, 0.0..highest)?;
    context
        .configure_mesh()
        .light_line_style(TRANSPARENT)
        .x_desc("seconds")
        .y_label_formatter(&|value| {
            format!("{value:.4}")
                .trim_end_matches('0')
                .trim_end_matches('.')
                .to_owned()
        })
        .draw()?;
    for (index, line) in chart.lines.iter().enumerate() {
        let colour = Palette99::pick(index);
        let style = colour.stroke_width(2);
        context.draw_series(LineSeries::new(line.points.iter().copied(), style))?;
        // The legend is outside of the chart: what is drawn is not hidden.
        let (x, y) = area.get_pixel_range();
        let at = (x.end - x.start - LEGEND + 12, 40 + 18 * index as i32);
        if at.1 + 18 < y.end - y.start {
            area.draw(&Rectangle::new(
                [at, (at.0 + 12, at.1 + 12)],
                colour.filled(),
            ))?;
            area.draw(&Text::new(
                line.label.clone(),
                (at.0 + 18, at.1 + 1),
                ("sans-serif", 13),
            ))?;
        }
    }
    Ok::<(), DrawingAreaErrorKind<_>>(())
}
