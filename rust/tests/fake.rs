// SPDX-License-Identifier: GPL-2.0

//! A device that exists for KUnit only.

use crate::{
    virtio::Device,
    wire::{
        Bar,
        Extent,
        BARS,
        CONFIG_SPACE_BYTES, //
    }, //
};
use core::ptr::NonNull;

/// The region of a fake device.
pub(crate) struct Region;

impl Region {
    /// The region of `dev`, if that is a fake.
    pub(crate) fn of(_dev: &Device) -> Option<&'static Self> {
        None
    }

    pub(crate) fn config_space(&self) -> [u8; CONFIG_SPACE_BYTES] {
        [0; CONFIG_SPACE_BYTES]
    }

    pub(crate) fn bars(&self) -> [Bar; BARS] {
        [Bar::Absent; BARS]
    }

    pub(crate) fn bus_address(&self, _extent: &Extent) -> u64 {
        0
    }

    pub(crate) fn memory(&self, _extent: &Extent) -> NonNull<u8> {
        NonNull::dangling()
    }
}
