// SPDX-License-Identifier: GPL-2.0

//! The module's parameters, as it was loaded. They do not change afterwards.

use super::bindings;

/// All parameters.
#[derive(Clone, Copy)]
pub(crate) struct Parameters {
    /// Whether a region that a capability names is used if it comes without the bit.
    pub(crate) hint: bool,
    /// Whether devices that had a driver when the module was loaded are bound anew.
    pub(crate) takeover: bool,
    /// What a mapping that the device only writes begins with.
    pub(crate) from_device: FromDevice,
}

/// What a mapping that the device only writes begins with: the parameter `from_device`.
#[derive(Clone, Copy)]
pub(crate) enum FromDevice {
    /// The bytes of the buffer: a device that writes only part of it leaves the rest as it was.
    Preserve,
    /// Zeroes: the device does not see what happened to be in the buffer, and what it does not
    /// write comes back as zeroes.
    Clear,
}

impl Parameters {
    /// As the module was loaded.
    pub(crate) fn new() -> Self {
        // SAFETY: No requirements.
        let clear = unsafe { bindings::virtio_swiotlb_from_device_clear() };
        Self {
            // SAFETY: No requirements.
            hint: unsafe { bindings::virtio_swiotlb_hint_all() },
            // SAFETY: No requirements.
            takeover: unsafe { bindings::virtio_swiotlb_takeover() },
            from_device: if clear {
                FromDevice::Clear
            } else {
                FromDevice::Preserve
            },
        }
    }
}
