// SPDX-License-Identifier: GPL-2.0

//! KUnit suites that need more than their own file: a device, a driver, the real virtio core.
//!
//! A fake transport ([`fake`], `transport.c`) is registered with the virtio core like any other,
//! and the module sees its devices on the bus like all others: what is tested is the module as it
//! was loaded, with the device that is made here playing its part ([`device`]).
//!
//! Suites run when the module has been initialised. A failed assertion ends its thread without
//! running destructors: nothing is asserted with a lock held, and devices are removed by KUnit.

mod bounce;
mod device;
mod dialect;
pub(crate) mod fake;
mod negotiation;
mod shared_pool;

pub(crate) use fake::set_registry;
