// SPDX-License-Identifier: GPL-2.0

//! A snapshot as a table.

use crate::{
    advise::bytes,
    snapshot::{Device, Snapshot},
};
use comfy_table::{presets, CellAlignment, Table};

/// Characters of a bar.
const BAR: usize = 10;

/// The table of all devices: one line each, with a bar for how full its pool is.
pub fn table(snapshot: &Snapshot) -> String {
    let mut table = Table::new();
    table.load_preset(presets::NOTHING);
    table.set_header([
        "device",
        "type",
        "driver",
        "mode",
        "region",
        "used",
        "",
        "hiwater",
        "full",
        "too_large",
        "bad_handle",
    ]);
    for device in &snapshot.devices {
        table.add_row(row(device));
    }
    for column in [4, 6, 7, 8, 9, 10] {
        if let Some(column) = table.column_mut(column) {
            column.set_cell_alignment(CellAlignment::Right);
        }
    }
    for column in table.column_iter_mut() {
        column.set_padding((0, 2));
    }
    let lines = table.lines().map(|line| line.trim_end().to_owned() + "\n");
    lines.collect()
}

fn row(device: &Device) -> Vec<String> {
    let dash = || "-".to_owned();
    let mode = device
        .state
        .as_ref()
        .map_or_else(dash, |state| state.mode.as_str().to_owned());
    let mut row = vec![
        device.name.clone(),
        device.kind.clone(),
        device.driver.clone().unwrap_or_else(dash),
        mode,
    ];
    let (Some(state), Some(fill)) = (&device.state, device.fill()) else {
        row.resize_with(11, dash);
        return row;
    };
    row.extend([
        bytes(state.region_bytes),
        bar(fill),
        format!("{:.1}%", 100.0 * fill),
        device.known("hiwater_bytes").map_or_else(dash, bytes),
    ]);
    row.extend(["full", "too_large", "bad_handle"].map(|key| {
        device
            .known(key)
            .map_or_else(dash, |number| number.to_string())
    }));
    row
}

/// A bar of [`BAR`] characters for a part from 0 to 1. What is not empty shows.
pub fn bar(part: f64) -> String {
    let filled = ((part.clamp(0.0, 1.0) * BAR as f64).ceil() as usize).min(BAR);
    format!("[{}{}]", "#".repeat(filled), ".".repeat(BAR - filled))
}
