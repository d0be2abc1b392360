// SPDX-License-Identifier: GPL-2.0

//! KUnit suites that need more than their own file: a device, a driver, the real virtio core.

pub(crate) mod fake;
