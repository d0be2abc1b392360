// SPDX-License-Identifier: GPL-2.0

//! The module's parameters, as it was loaded. They do not change afterwards.

use super::bindings;

/// All parameters.
#[derive(Clone, Copy)]
pub(crate) struct Parameters {
    /// Whether a region that comes without the bit is used.
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

impl FromDevice {
    /// As the module was loaded.
    pub(crate) fn parameter() -> Self {
        // SAFETY: No requirements.
        if unsafe { bindings::virtio_swiotlb_from_device_clear() } {
            Self::Clear
        } else {
            Self::Preserve
        }
    }
}
