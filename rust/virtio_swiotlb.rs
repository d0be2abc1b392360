// SPDX-License-Identifier: GPL-2.0

//! virtio_swiotlb: a virtio device works without any access to guest memory.
//!
//! A device that must not access guest memory offers VIRTIO_F_SWIOTLB and brings a memory region.
//! This module keeps the rings and buffers of every unmodified driver for that device inside the
//! region. Documentation/design.rst describes the design.
//!
//! Imports go only to files that stand above in this table.
//!
//! | file | what it is |
//! |---|---|
//! | `compat.rs` | what differs between kernel series |
//! | `lock.rs`, `work.rs` | what the kernel crate lacks |
//! | `wire.rs` | numbers on the wire; configuration space to a region |
//! | `policy.rs` | what is done with a device, and why; limits; the plan of its features |
//! | `parameters.rs` | the module's parameters |
//! | `virtio.rs` | safe layer over the C side of virtio |
//! | `pool.rs` | the allocator of a region |
//! | `trace.rs` | tracepoints |
//! | `region.rs` | a device's region: found, checked, claimed, mapped |
//! | `bounce.rs` | region and pool: map, unmap, sync, alloc, free |
//! | `queues.rs` | shorter queues |
//! | `device.rs` | one device's states, its negotiation, its messages |
//! | `debugfs.rs` | a device's files |
//! | `sysfs.rs` | a device's attributes |
//! | `registry.rs` | all devices, events of the bus, the files of all devices |

use kernel::{
    prelude::*,
    sync::Arc, //
};

mod bindings;
mod bounce;
mod compat;
mod debugfs;
mod device;
mod lock;
mod parameters;
mod queues;
mod region;
mod registry;
mod sysfs;
#[cfg(CONFIG_KUNIT = "y")]
mod tests;
mod trace;
mod virtio;
mod work;

// The pure files. selftests/host compiles them too and tests them from outside.
#[allow(unreachable_pub)]
mod policy;
#[allow(unreachable_pub)]
mod pool;
#[allow(unreachable_pub)]
mod wire;

// The parameters are in `helpers.c`.
module! {
    type: VirtioSwiotlb,
    name: "virtio_swiotlb",
    authors: ["The virtio_swiotlb authors"],
    description: "VIRTIO_F_SWIOTLB: bounce buffers in a region that the device brings",
    license: "GPL",
    // A shared pool that ACPI describes is a device without another driver.
    alias: ["of:N*T*Crestricted-dma-pool", "of:N*T*Crestricted-dma-poolC*"],
}

#[pin_data(PinnedDrop)]
struct VirtioSwiotlb {
    registry: Arc<registry::Registry>,
    _files: registry::Files,
    #[pin]
    registration: virtio::bus::Registration<registry::Registry>,
}

impl kernel::InPlaceModule for VirtioSwiotlb {
    fn init(module: &'static ThisModule) -> impl PinInit<Self, Error> {
        pin_init::pin_init_scope(move || {
            let parameters = parameters::Parameters::new()?;
            let registry = Arc::pin_init(registry::Registry::new(module, parameters), GFP_KERNEL)?;
            Ok(try_pin_init!(Self {
                _files: registry::Files::new(&registry),
                registration <- virtio::bus::Registration::new(module, registry.clone()),
                registry,
            }? Error))
        })
        .pin_chain(|this| {
            let this = &*this;
            #[cfg(CONFIG_KUNIT = "y")]
            tests::set_registry(&this.registry);
            let visited = this.registration.for_each(
                |dev| dev.lock_interruptible().map(Some),
                |dev| this.registry.late(dev),
            );
            if visited.is_err() {
                // Load nevertheless: devices that are bounced by now need the module.
                pr_warn!("interrupted: not all devices were seen; unbind and bind their drivers\n");
            }
            this.registry.report_load();
            Ok(())
        })
    }
}

#[pinned_drop]
impl PinnedDrop for VirtioSwiotlb {
    fn drop(self: Pin<&mut Self>) {
        // No device is bounced: each bounced device holds the module. Devices that are being bound,
        // or were not bounced, may still have an override.
        self.registry.stop();
        // `lock()` cannot fail, unlike `lock_interruptible()`.
        let _ = self.registration.for_each(
            |dev| Ok(self.registry.is_concerned(dev).then(|| dev.lock())),
            |dev| self.registry.release(dev),
        );
        virtio::synchronize_hooks();
    }
}
