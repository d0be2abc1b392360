// SPDX-License-Identifier: GPL-2.0

//! Shortens the queues of a virtio-pci device before the driver makes them.
//!
//! The core makes a ring as long as the register `queue_size` of the device. A driver may write a
//! lower number to the register, "to reduce memory requirements" (virtio 1.4, 4.1.4.3). The device
//! then reports that number until it is reset. Linux drivers do not write it, so the module does.
//!
//! The register of virtio-mmio cannot be changed (virtio 1.4, 4.2.2). There `Bounce::alloc()`
//! refuses rings that are too long, and the core halves them.

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

/// The common configuration up to the registers that this file uses.
type Common = CommonConfig<COMMON_BYTES>;

/// The fewest entries of a queue among `queues`; `None` if the registers cannot be read. May sleep.
/// None of the queues may exist yet, and no other task may drive the device.
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
        // The device does not have the queue.
        .filter(|entries| *entries != 0)
        .min()
}

/// Shortens those of the first `count` queues that have more entries than `longest` allows. Returns
/// the number of shortened queues, and the fewest entries of one. May sleep. None of the queues may
/// exist yet, and no other task may drive the device.
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
