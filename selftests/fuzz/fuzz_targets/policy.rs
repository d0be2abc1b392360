// SPDX-License-Identifier: GPL-2.0

//! libFuzzer calls it: bytes for what is decided of a device.

#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| virtio_swiotlb_fuzz::policy(data));
