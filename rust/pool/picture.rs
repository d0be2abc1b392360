// SPDX-License-Identifier: GPL-2.0

//! The picture of a pool that debugfs shows: one line for each area.

use core::fmt;

use super::stats::Stats;

/// Characters for the pages of an area.
const WIDTH: usize = 32;

/// What one line shows.
pub(super) struct Row {
    /// Where in the pool the area begins, bytes.
    pub(super) base: usize,
    /// Bytes in the area.
    pub(super) bytes: usize,
    /// The longest run that could be mapped in it, bytes.
    pub(super) largest_free: usize,
    /// The area's own counters.
    pub(super) stats: Stats,
}

/// Draws the areas.
pub(super) fn draw(f: &mut impl fmt::Write, rows: impl Iterator<Item = Row>) -> fmt::Result {
    writeln!(
        f,
        "area      offset  KiB  [# mappings  R rings  . free]          maps live   used hiwater largest free (KiB)"
    )?;
    for (i, row) in rows.enumerate() {
        let Row {
            base, bytes, stats, ..
        } = row;
        // Rounded up: what there is shows.
        let rings = (stats.reserved_bytes * WIDTH + bytes - 1)
            .checked_div(bytes)
            .unwrap_or(0);
        let mappings = stats.used_bytes.saturating_sub(stats.reserved_bytes);
        let used = (mappings * WIDTH + bytes - 1)
            .checked_div(bytes)
            .unwrap_or(0);
        write!(f, "{:<4} {:>#11x} {:>4} [", i, base, bytes >> 10)?;
        for at in 0..WIDTH {
            f.write_char(if at < rings {
                'R'
            } else if at + used < WIDTH {
                '.'
            } else {
                '#'
            })?;
        }
        writeln!(
            f,
            "] {} {} {} {} {}",
            stats.maps,
            stats.live,
            stats.used_bytes >> 10,
            stats.hiwater_bytes >> 10,
            row.largest_free >> 10
        )?;
    }
    Ok(())
}
