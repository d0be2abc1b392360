// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Points at which a device decides what a driver gets from it: [`Hooks`].

use std::ops::Range;

use serde_json::Value;
use vmm_sys_util::eventfd::EventFd;

use crate::pci::{ConfigSpace, Layout};
use crate::region::Region;
use crate::ring::{Memory, RingAddresses};

/// What a [`Device`](crate::device::Device) calls where another device could do something else,
/// one that tests a driver, for example. All methods are called with the device locked. By
/// default they do what [`Honest`] does.
pub trait Hooks: Send + 'static {
    /// BARs and capabilities, before configuration space is made of them. Called once.
    fn layout(&mut self, _layout: &mut Layout) {}

    /// A session begins: the device is new, or it was reset. Drivers have set FEATURES_OK
    /// `negotiations` times before. Returns what the report is to say of the session.
    fn on_session(&mut self, _negotiations: u64) -> Option<Value> {
        None
    }

    /// The features to offer in this session; `features` are those that backend and
    /// configuration allow.
    fn features_to_offer(&self, features: u64) -> u64 {
        features
    }

    /// A driver reads `data` at `offset` of PCI configuration space.
    fn on_config_space_read(&mut self, _space: &ConfigSpace, _offset: u64, _data: &mut [u8]) {}

    /// A driver reads `data` at `offset` of the common configuration structure, in which
    /// `device_feature_select` has this value; or a register of virtio-mmio that stands for
    /// these bytes.
    fn on_common_read(&mut self, _feature_select: u32, _offset: u64, _data: &mut [u8]) {}

    /// A driver reads `data` of the device configuration structure.
    fn on_device_config_read(&mut self, _data: &mut [u8]) {}

    /// A driver's FEATURES_OK was accepted. Next it makes its rings in the region. Not called
    /// while a pool is missing.
    fn on_features_ok(&mut self, _region: &Region) {}

    /// A driver's DRIVER_OK was accepted. Its rings are at these offsets into the region, and
    /// the client listens to those MSI-X vectors that have an event file descriptor.
    fn on_driver_ok(
        &mut self,
        _region: &Region,
        _rings: &[Range<usize>],
        _vectors: &[Option<EventFd>],
    ) {
    }

    /// The pool that was the region is taken away. Whatever has a mapping of it has to end.
    fn on_pool_gone(&mut self) {}

    /// How the queues of this session run. It changes with the session only.
    fn queue_mode(&self) -> QueueMode {
        QueueMode::Checked
    }

    /// The backend has raised the interrupt of a queue ([`QueueMode::Relayed`]). Returns which
    /// interrupts the driver gets for it. `seen` is for the hook to keep; it is 0 when the queue
    /// begins.
    fn before_interrupt(
        &mut self,
        _memory: &Memory<'_>,
        _ring: &RingAddresses,
        _seen: &mut u16,
    ) -> Interrupt {
        Interrupt::Queue
    }

    /// Asked all the time: whether DEVICE_NEEDS_RESET is to be set now, and why.
    fn needs_reset(&mut self) -> Option<&'static str> {
        None
    }
}

/// The device as it should be.
#[derive(Clone, Copy, Debug, Default)]
pub struct Honest;

impl Hooks for Honest {}

/// How queues run. Each mode leaves out more than the one before.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum QueueMode {
    /// The device checks what a driver makes available, before the backend is notified.
    Checked,
    /// Nothing is checked.
    Unchecked,
    /// Nothing is checked, and the backend's interrupts go to [`Hooks::before_interrupt`].
    Relayed,
    /// Nothing is checked, and the backend is given no queue.
    Unserved,
}

/// Which interrupts a driver gets when a backend has raised that of a queue.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Interrupt {
    /// None.
    None,
    /// That of the queue.
    Queue,
    /// That of the queue, then every vector's.
    All,
}
