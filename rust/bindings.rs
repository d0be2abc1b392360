// SPDX-License-Identifier: GPL-2.0

//! Bindings of virtio's C side, made by bindgen from `bindings.h` at build time.

#![allow(
    clippy::all,
    dead_code,
    improper_ctypes,
    missing_docs,
    non_camel_case_types,
    non_snake_case,
    non_upper_case_globals,
    unreachable_pub,
    unsafe_op_in_unsafe_fn
)]

// The types that virtio's refer to are those of the kernel crate.
use kernel::{
    bindings::*,
    ffi, //
};

include!(env!("VIRTIO_SWIOTLB_BINDINGS"));
