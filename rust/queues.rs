// SPDX-License-Identifier: GPL-2.0

//! Shortens a device's queues before the driver makes them.
//!
//! The core makes a ring as long as the device says that the queue is. A driver may write a lower
//! number there, "to reduce memory requirements" (virtio 1.4, 4.1.4.3), which is then what the
//! device says until it is reset. The drivers do not; it is done for them.
//!
//! This is for virtio-pci. What virtio-mmio says cannot be changed (virtio 1.4, 4.2.2): there
//! `Bounce::alloc()` refuses rings that are too long, and the core halves them.

use super::{
    region::CommonConfig,
    virtio::Device,
    wire::capabilities::{
        COMMON_BYTES,
        COMMON_QUEUE_SELECT,
        COMMON_QUEUE_SIZE, //
    }, //
};
use core::ops::Range;

/// A device's common configuration up to what is used here.
type Common = CommonConfig<COMMON_BYTES>;

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
            common.write::<COMMON_QUEUE_SELECT>(index as u16);
            common.read::<COMMON_QUEUE_SIZE>()
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
        common.write::<COMMON_QUEUE_SELECT>(index as u16);
        if common.read::<COMMON_QUEUE_SIZE>() > longest {
            common.write::<COMMON_QUEUE_SIZE>(longest);
            let (before, fewest) = shortened.unwrap_or((0, longest));
            shortened = Some((before + 1, fewest.min(longest)));
        }
    }
    shortened
}
