// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! What swiotlb-relay decides by: messages of vfio-user, and which replies of a device a
//! VMM waits for. See README.md for the program.

#![forbid(unsafe_code)]

pub mod answers;
pub mod message;
#[cfg(any(test, feature = "testing"))]
pub mod testing;
