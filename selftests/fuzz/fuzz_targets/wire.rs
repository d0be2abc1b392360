// SPDX-License-Identifier: GPL-2.0

//! libFuzzer calls it: bytes for the capability's reader.

#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| virtio_swiotlb_fuzz::wire(data));
