// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! A guest in a test's process: a vfio-user client that finds the device's
//! structures as a driver does and keeps rings and buffers in the region.

pub mod driver;
pub mod machine;
pub mod packed_backend;
