// SPDX-License-Identifier: GPL-2.0

//! Shortens a device's queues before the driver makes them.
//!
//! The core makes a ring as long as the device says that the queue is. A driver may write a lower
//! number there, "to reduce memory requirements" (virtio 1.4, 4.1.4.3), which is then what the
//! device says until it is reset. The drivers do not; it is done for them.

use super::{
    region,
    virtio::Device,
    wire::capabilities::{
        COMMON_BYTES,
        COMMON_QUEUE_SELECT,
        COMMON_QUEUE_SIZE, //
    }, //
};
use core::{
    ops::Range,
    ptr::NonNull, //
};
use kernel::{
    bindings,
    prelude::*, //
};

/// A device's common configuration (virtio 1.4, 4.1.4.3), mapped once more.
///
/// # Invariants
///
/// A mapping of [`COMMON_BYTES`] bytes from `ioremap()`.
struct Common(NonNull<c_void>);

impl Common {
    fn new(dev: &Device) -> Option<Self> {
        let start = region::common(dev)?;
        // SAFETY: These registers are the device's, and in one of its BARs.
        let mapped = unsafe { bindings::ioremap(start, COMMON_BYTES) };
        // INVARIANT: Mapped just now.
        NonNull::new(mapped).map(Self)
    }

    fn read(&self, at: usize) -> u16 {
        // SAFETY: By the type invariant; the constants of `capabilities.rs` lie inside.
        unsafe { bindings::readw(self.0.as_ptr().byte_add(at)) }
    }

    fn write(&self, at: usize, value: u16) {
        // SAFETY: As above.
        unsafe { bindings::writew(value, self.0.as_ptr().byte_add(at)) };
    }
}

impl Drop for Common {
    fn drop(&mut self) {
        // SAFETY: By the type invariant.
        unsafe { bindings::iounmap(self.0.as_ptr()) };
    }
}

/// The fewest entries of those of `queues` that the device has; `None` if that cannot be known. May
/// sleep; none of the queues may exist yet, and nobody else may drive the device.
pub(crate) fn shortest(dev: &Device, queues: Range<u32>) -> Option<u16> {
    #[cfg(CONFIG_KUNIT = "y")]
    if let Some(fake) = crate::tests::fake::Region::of(dev) {
        return fake.shortest_queue(queues);
    }
    let common = Common::new(dev)?;
    queues
        .map(|index| {
            common.write(COMMON_QUEUE_SELECT, index as u16);
            common.read(COMMON_QUEUE_SIZE)
        })
        // There is no such queue.
        .filter(|entries| *entries != 0)
        .min()
}

/// Makes those of the first `count` queues shorter that have more entries than `longest` says, and
/// returns how many were, and the fewest entries that one has now. May sleep; none of the queues
/// may exist yet, and no other task may drive the device.
pub(crate) fn shorten(
    dev: &Device,
    count: u32,
    longest: impl Fn(u32) -> Option<u16>,
) -> Option<(usize, u16)> {
    let mut common = None;
    let mut shortened = None;
    for index in 0..count {
        let Some(longest) = longest(index) else {
            continue;
        };
        if common.is_none() {
            common = Common::new(dev);
        }
        let common = common.as_ref()?;
        common.write(COMMON_QUEUE_SELECT, index as u16);
        if common.read(COMMON_QUEUE_SIZE) > longest {
            common.write(COMMON_QUEUE_SIZE, longest);
            let (before, fewest) = shortened.unwrap_or((0, longest));
            shortened = Some((before + 1, fewest.min(longest)));
        }
    }
    shortened
}
