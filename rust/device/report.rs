// SPDX-License-Identifier: GPL-2.0

//! Messages about a device: the decision, the reason, and the remedy.
//!
//! All functions may sleep.

use super::super::{
    policy::{
        limits::Split,
        plan::Plan,
        types::Name,
        Decision,
        Reason, //
    },
    virtio,
    wire::{
        AddressForm,
        At,
        Features,
        NamedBy, //
    }, //
};
use kernel::prelude::*;

/// Reports a decision.
pub(crate) fn decision(dev: &virtio::Device, decision: &Decision) {
    let kind = dev.device_type();
    let dev = dev.as_device();
    let origin = |at| match at {
        At::Bar { .. } => "",
        At::SharedPool { by, .. } => match by {
            NamedBy::Devicetree => ", a lease of the shared pool that the devicetree names",
            NamedBy::Acpi => ", a lease of the shared pool that ACPI names",
            NamedBy::Parameter => ", a lease of the shared pool that pool= names",
        },
    };
    match decision {
        Decision::Accept(extent) => {
            let form = match extent.form {
                AddressForm::Bus => "",
                AddressForm::Offset(_) => ", and the device is told offsets (VIRTIO_F_DMB)",
            };
            dev_info!(
                dev,
                "swiotlb: bounced: all rings and buffers stay in the region of {} bytes at {:#x}{}{form}\n",
                extent.bytes,
                extent.start,
                origin(extent.at)
            )
        }
        Decision::Hint(extent) => dev_info!(
            dev,
            "swiotlb: bounced on a hint: rings and buffers stay in the region of {} bytes at {:#x}{}, though the device does not offer VIRTIO_F_SWIOTLB\n",
            extent.bytes,
            extent.start,
            origin(extent.at)
        ),
        Decision::Decline(reason @ Reason::NoRegion) => dev_err!(
            dev,
            "swiotlb: not bounced: {reason}. The device is at fault: it needs the SWIOTLB capability or a shared pool that is named for it, or must not offer the feature\n"
        ),
        Decision::Decline(reason) => dev_warn!(
            dev,
            "swiotlb: not bounced: {reason}; VIRTIO_F_SWIOTLB (or VIRTIO_F_DMB) is not accepted, and the device may refuse to work without\n"
        ),
        Decision::Refuse(reason @ Reason::Moved) => dev_err!(
            dev,
            "swiotlb: not resumed: {reason}; unbind and bind the driver\n"
        ),
        Decision::Refuse(reason) => dev_err!(
            dev,
            "swiotlb: no driver is bound: {reason}. The device offers VIRTIO_F_SWIOTLB (or VIRTIO_F_DMB), so it is not used without\n"
        ),
        Decision::Bar(reason) => dev_err!(
            dev,
            "swiotlb: no driver is bound: the guest requires confinement (require=1): {reason}. Use a device that offers VIRTIO_F_SWIOTLB and brings a region, or load the module with except={}\n",
            Name(kind)
        ),
        Decision::Ignore(reason @ Reason::NotTakenOver) => dev_warn!(
            dev,
            "swiotlb: {reason}: a driver uses it already; unbind and bind the driver, or load the module with takeover=1\n"
        ),
        Decision::Ignore(reason) => dev_info!(dev, "swiotlb: not bounced: {reason}\n"),
    }
}

/// Reports which features a plan masks for a region of `bytes` bytes.
pub(super) fn masked(dev: &virtio::Device, plan: &Plan, bytes: u64) {
    let dev = dev.as_device();
    match plan.split {
        Some(Split::TooSmall) => dev_info!(
            dev,
            "swiotlb: split rings are used: the region of {bytes} bytes is too small for packed ones\n"
        ),
        Some(Split::Transport) => dev_info!(
            dev,
            "swiotlb: split rings are used: with this transport packed ones cannot be shorter than the device says\n"
        ),
        Some(Split::Disk) => dev_info!(
            dev,
            "swiotlb: split rings are used: with packed ones a request would fail when the region is full (packed_disks=1 accepts that)\n"
        ),
        None => {}
    }
    if plan.masked != Features(0) {
        dev_info!(
            dev,
            "swiotlb: features {:#x} are not used: the region of {bytes} bytes has no room for what they put into it\n",
            plan.masked.0
        );
    }
    if plan.masked_beyond != 0 {
        dev_info!(
            dev,
            "swiotlb: features {:#x} from 64 on are not used: nor do they fit the region\n",
            plan.masked_beyond
        );
    }
}

/// Reports that the transport does not know the features that confine the device.
pub(super) fn dropped(dev: &virtio::Device) {
    dev_err!(
        dev.as_device(),
        "swiotlb: no driver is bound: the transport dropped features that were agreed on\n"
    );
}

/// Reports the number of shortened queues, and the fewest entries of one.
pub(super) fn shortened(dev: &virtio::Device, queues: usize, entries: u16, bytes: usize) {
    dev_info!(
        dev.as_device(),
        "swiotlb: shortened {queues} queues, to {entries} entries: what the driver puts there has to leave room in the region of {bytes} bytes\n"
    );
}

/// Reports a configuration whose generation changes without end.
pub(super) fn unsteady(dev: &virtio::Device) {
    dev_err!(
        dev.as_device(),
        "swiotlb: the configuration never stands still: fields may not belong together\n"
    );
}

/// Reports mappings that the driver did not undo.
pub(super) fn leaked(dev: &virtio::Device, live: usize) {
    dev_err!(
        dev.as_device(),
        "swiotlb: the driver left {live} mappings in the region, unanswered or forgotten\n"
    );
}

/// Reports that a driver was bound to the device before the module was loaded, though the guest
/// requires confinement.
pub(crate) fn unconfined(dev: &virtio::Device, reason: Reason) {
    dev_err!(
        dev.as_device(),
        "swiotlb: not confined, though the guest requires confinement (require=1): {reason}. A driver was bound before the module was loaded: unbind it, and load the module before the drivers, or with except={}\n",
        Name(dev.device_type())
    );
}

/// Reports that the device could not be recorded, and so is not bounced. No driver is bound if
/// confinement is `required`.
pub(crate) fn no_memory(dev: &virtio::Device, required: bool) {
    if required {
        dev_err!(
            dev.as_device(),
            "swiotlb: no driver is bound: the guest requires confinement (require=1), and there is not enough memory; bind the driver when there is\n"
        );
        return;
    }
    dev_err!(
        dev.as_device(),
        "swiotlb: not bounced: not enough memory; unbind and bind the driver when there is\n"
    );
}

/// Reports that the device, which is not bounced, could not be recorded.
pub(crate) fn not_listed(dev: &virtio::Device) {
    dev_err!(
        dev.as_device(),
        "swiotlb: not enough memory to list the device\n"
    );
}

// The pure files implement traits of core only.
impl kernel::fmt::Display for Reason {
    fn fmt(&self, f: &mut kernel::fmt::Formatter<'_>) -> kernel::fmt::Result {
        core::fmt::Display::fmt(self, f)
    }
}

impl kernel::fmt::Display for Name {
    fn fmt(&self, f: &mut kernel::fmt::Formatter<'_>) -> kernel::fmt::Result {
        core::fmt::Display::fmt(self, f)
    }
}
