// SPDX-License-Identifier: GPL-2.0

//! Guards the core against what a device reports of its status and of its configuration's
//! generation.
//!
//! May be called in any context.

use kernel::sync::atomic::{
    Atomic,
    Relaxed, //
};

// Status bits (virtio 1.4, 2.1).
const ACKNOWLEDGE: u8 = 1;
const DRIVER: u8 = 2;
const FEATURES_OK: u8 = 8;
const NEEDS_RESET: u8 = 64;
const FAILED: u8 = 128;

/// The status of a device, as the core may see it.
///
/// The driver sets all bits but NEEDS_RESET. The device may refuse FEATURES_OK, and no other bit
/// (virtio 1.4, 2.1 and 3.1.1). The core would warn of a device that reports anything else.
pub(super) struct Status {
    /// The status that the core has set since it reset the device.
    set: Atomic<u32>,
}

impl Status {
    /// The status of a device that was reset.
    pub(super) fn new() -> Self {
        Self {
            set: Atomic::new(0),
        }
    }

    /// A driver is about to be bound, and the device reports `status`. Before that only
    /// ACKNOWLEDGE, DRIVER and FAILED may be set: all other bits are masked.
    pub(super) fn begin(&self, status: u8) {
        self.set(status & (ACKNOWLEDGE | DRIVER | FAILED));
    }

    /// The core resets the device.
    pub(super) fn reset(&self) {
        self.set(0);
    }

    /// The core sets the status.
    pub(super) fn set(&self, status: u8) {
        self.set.store(status.into(), Relaxed);
    }

    /// The status for the core of a device that reports `status`.
    pub(super) fn filter(&self, status: u8) -> u8 {
        match self.set.load(Relaxed) as u8 {
            // A device that was reset has no driver, and NEEDS_RESET has no meaning.
            0 => 0,
            set => (set & !FEATURES_OK) | status & (set & FEATURES_OK | NEEDS_RESET),
        }
    }
}

/// The generation of a device's configuration. The core reads until it reads the same generation
/// twice, which a device can withhold for ever.
pub(super) struct Generation {
    last: Atomic<u32>,
    /// How many generations in a row differed from the one before.
    changes: Atomic<u32>,
}

impl Generation {
    /// More changes than a configuration has in the time of as many reads.
    const MOST_CHANGES: u32 = 100;

    /// A generation that has not changed.
    pub(super) fn new() -> Self {
        Self {
            last: Atomic::new(0),
            changes: Atomic::new(0),
        }
    }

    /// A driver is about to be bound.
    pub(super) fn begin(&self) {
        self.changes.store(0, Relaxed);
    }

    /// Returns the generation for the core of a device that reports `generation`, and whether the
    /// device is ignored from now on. It is ignored until a driver is bound again. Otherwise a
    /// device that pauses between two reads could start over for ever.
    pub(super) fn filter(&self, generation: u32) -> (u32, bool) {
        let before = self.changes.load(Relaxed);
        if before == Self::MOST_CHANGES {
            return (0, false);
        }
        let same = self.last.xchg(generation, Relaxed) == generation;
        let changes = if same { 0 } else { before + 1 };
        self.changes.store(changes, Relaxed);
        (generation, changes == Self::MOST_CHANGES)
    }
}
