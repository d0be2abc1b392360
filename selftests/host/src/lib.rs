// SPDX-License-Identifier: GPL-2.0

//! The pure files of the virtio_swiotlb module, compiled for the host.
//!
//! In the kernel these files are modules of `rust/virtio_swiotlb.rs`; here they are modules of
//! this crate, under the same names, so that `super::` and `crate::` mean the same in both. Their
//! own tests run as they are under `cargo test` (and as KUnit suites in a guest); the tests in
//! this crate are the ones that need `std`.

#![forbid(unsafe_code)]
// What only the kernel half of the module calls has no caller here.
#![allow(dead_code)]
// In a KUnit case an assertion is the way to fail: a panic would stop the kernel.
#![allow(clippy::assertions_on_constants)]

#[path = "../../../rust/policy.rs"]
#[allow(unreachable_pub)]
mod policy;
#[cfg(feature = "pool")]
#[path = "../../../rust/pool.rs"]
mod pool;
#[path = "../../../rust/wire.rs"]
#[allow(unreachable_pub)]
mod wire;

#[cfg(feature = "pool")]
mod platform;

#[cfg(test)]
mod documented;

#[cfg(all(test, feature = "pool"))]
mod capacity;
#[cfg(all(test, feature = "pool"))]
mod loans;
#[cfg(all(test, feature = "pool"))]
mod model;
#[cfg(all(test, feature = "pool"))]
mod reuse;
#[cfg(all(test, feature = "pool"))]
mod threads;
