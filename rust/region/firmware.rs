// SPDX-License-Identifier: GPL-2.0

//! Finds the shared pool that is named for a device: by its own node in devicetree or ACPI, by the
//! node of its host bridge, or by the parameter `pool`.

use super::super::{
    bindings,
    virtio::Device,
    wire::{
        shared_pool::{
            check,
            Named,
            Ram,
            Surroundings, //
        },
        Fault,
        Finding,
        NamedBy, //
    }, //
};
use core::ptr::NonNull;
use kernel::{
    bindings as core_bindings,
    page::PAGE_SIZE,
    prelude::*, //
};

/// The shared pool for `dev`, if one is named. The first counts of: the pool that its own node
/// names, the pool that the node of its host bridge names, and `parameter` (wire format, R33). May
/// sleep.
pub(super) fn find(dev: &Device, parameter: Option<Named>) -> Finding {
    let Some(transport) = dev.parent() else {
        return Finding::Absent;
    };
    let bridge = dev.pci_parent().and_then(|pci| {
        // SAFETY: The parent of a registered device is on a bus.
        NonNull::new(unsafe { bindings::virtio_swiotlb_host_bridge(pci) })
    });
    // The device that a bridge was made for, where the bridge itself has no node.
    // SAFETY: A bridge lives as long as the devices behind it, and keeps its parent.
    let above = bridge.and_then(|bridge| NonNull::new(unsafe { (*bridge.as_ptr()).parent }));
    let nodes = [Some(transport), bridge, above];
    let by_firmware = nodes.into_iter().flatten().find_map(named_by);
    match by_firmware.or(parameter.map(Ok)) {
        Some(Ok(named)) => check(&named, PAGE_SIZE as u64, || around(transport, &named)),
        Some(Err(fault)) => Finding::Malformed(fault),
        None => Finding::Absent,
    }
}

/// The pool that the node of `device` names, if it names one.
fn named_by(device: NonNull<core_bindings::device>) -> Option<Result<Named, Fault>> {
    let (mut start, mut bytes) = (0, 0);
    // SAFETY: The device of a transport, and its bridge, are there as long as the virtio device.
    let named =
        unsafe { bindings::virtio_swiotlb_named_pool(device.as_ptr(), &mut start, &mut bytes) };
    let by = match named {
        0.. if named as u32 == bindings::virtio_swiotlb_named_by_VIRTIO_SWIOTLB_ACPI => {
            NamedBy::Acpi
        }
        0.. => NamedBy::Devicetree,
        _ => {
            return match Error::from_errno(named) {
                ENOENT => None,
                EEXIST => Some(Err(Fault::TwoPools)),
                EBUSY => Some(Err(Fault::PoolOfKernel)),
                _ => Some(Err(Fault::PoolWithoutRange)),
            }
        }
    };
    Some(Ok(Named { by, start, bytes }))
}

/// Collects what else is at the range of a pool, for a device of `transport`.
fn around(transport: NonNull<core_bindings::device>, named: &Named) -> Surroundings {
    let &Named { start, bytes, .. } = named;
    let bus_address = |address| {
        // SAFETY: As in `named_by()`.
        unsafe { bindings::virtio_swiotlb_bus_address(transport.as_ptr(), address) }
    };
    let last = bytes - 1;
    Surroundings {
        // SAFETY: No requirements.
        ram: match unsafe { bindings::virtio_swiotlb_ram(start, bytes) } {
            bindings::virtio_swiotlb_ram_VIRTIO_SWIOTLB_RAM_OUTSIDE => Ram::Outside,
            bindings::virtio_swiotlb_ram_VIRTIO_SWIOTLB_RAM_RESERVED => Ram::Reserved,
            _ => Ram::Used,
        },
        // SAFETY: No requirements.
        overlaps_bar: unsafe { bindings::virtio_swiotlb_overlaps_bar(start, bytes) },
        // SAFETY: As in `named_by()`.
        behind_iommu: unsafe { bindings::virtio_swiotlb_behind_iommu(transport.as_ptr()) },
        reachable: bus_address(start + last).wrapping_sub(bus_address(start)) == last,
    }
}
